"""Prompts to pictures, the whole line against diffusers."""

import contextlib
import json
import shutil
from argparse import Namespace
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from diffusers.training_utils import _collate_lora_metadata
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import load_file, save_file

import data
from parts import lora, pipeline
from parts.cli import UserError
from parts.files import write_json
from parts.pipeline import (
    TINY,
    PromptCache,
    brought,
    check_parts,
    fingerprints,
    home_of_weights,
    load_generator,
    load_judge,
    name_of,
)
from tests.checkpoint import make_pipeline
from tests.test_mmdit import stability_file


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sd3")
    make_pipeline().save_pretrained(folder)
    return folder


def diffusers_picture(pipeline, prompt, noise, **options):
    images = pipeline(prompt, latents=noise.clone(), output_type="np", **options).images  # [1,H,W,3] in 0..1
    return torch.from_numpy((images * 255).round().astype(np.uint8)).permute(0, 3, 1, 2)


def difference(ours, theirs):
    return int((ours.int() - theirs.int()).abs().max())


@pytest.mark.parametrize("use_t5", [True, False])
def test_a_folder_written_by_diffusers_gives_the_same_picture(folder, use_t5):
    parts = {} if use_t5 else {"text_encoder_3": None, "tokenizer_3": None}
    pipeline = StableDiffusion3Pipeline.from_pretrained(folder, **parts)
    pipeline.set_progress_bar_config(disable=True)
    generator = load_generator(folder, use_t5=use_t5)
    noise = torch.randn(1, 16, 16, 16, generator=torch.Generator().manual_seed(3))
    prompt = "a lone tree over the lake at night"
    for guidance in (4.5, 1.0):
        theirs = diffusers_picture(pipeline, prompt, noise, num_inference_steps=6, guidance_scale=guidance, height=128,
                                   width=128)
        ours = generator.draw([prompt], [0], 128, steps=6, guidance=guidance, noise=noise)
        assert theirs.float().std() > 20  # a picture, not a flat colour
        assert difference(ours, theirs) <= 2


def test_the_miniature_is_an_ordinary_checkpoint_that_diffusers_draws_from():
    pipeline = StableDiffusion3Pipeline.from_pretrained(TINY, text_encoder_3=None, tokenizer_3=None,
                                                       dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    generator = load_generator(TINY)
    noise = torch.randn(1, 16, 16, 16, generator=torch.Generator().manual_seed(0))
    prompt = data.with_words("a castle in the hills at noon", 8, 7)
    theirs = diffusers_picture(pipeline, prompt, noise, num_inference_steps=8, guidance_scale=4.5, height=128, width=128,
                               max_sequence_length=generator.encoders.t5_tokens)
    assert difference(generator.draw([prompt], [0], 128, steps=8, noise=noise), theirs) <= 2


OFFICIAL = ["attn.add_k_proj", "attn.add_q_proj", "attn.add_v_proj", "attn.to_add_out",  # Flow-GRPO's own code
            "attn.to_k", "attn.to_out.0", "attn.to_q", "attn.to_v"]


def both_pictures(pipeline, generator):
    """(ours, diffusers') of one prompt and noise."""
    noise = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(3))
    prompt = "a dark horse at night"
    theirs = diffusers_picture(pipeline, prompt, noise, num_inference_steps=3, guidance_scale=2.0, height=64, width=64)
    return generator.draw([prompt], [0], 64, steps=3, guidance=2.0, noise=noise), theirs


@pytest.fixture(scope="module")
def plain_picture(folder):
    return load_generator(folder).draw(["a dark horse at night"], [0], 64, steps=3, guidance=2.0, noise=torch.randn(
        1, 16, 8, 8, generator=torch.Generator().manual_seed(3)))


@torch.no_grad()
def liven(parameters):
    generator = torch.Generator().manual_seed(1)
    for p in parameters:
        p.copy_(0.15 * torch.randn(p.shape, generator=generator))


@pytest.mark.parametrize("targets", [{}, {"dual": True}])
def test_diffusers_draws_the_same_picture_with_an_adapter_of_ours(folder, plain_picture, tmp_path, targets):
    model = load_generator(folder).mmdit
    lora.add_lora(model, model.lora_targets(**targets), 4, 12.0)
    liven(p for p in model.parameters() if p.requires_grad)
    lora.save_lora(tmp_path / "both", model, folder, diffusers=True)
    pipeline = StableDiffusion3Pipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.load_lora_weights(tmp_path / "both")
    ours, theirs = both_pictures(pipeline, load_generator(folder, adapter=tmp_path / "both"))
    assert difference(ours, theirs) <= 2 and difference(ours, plain_picture) > 20
    # the folder without peft's files, and the file alone
    (tmp_path / "one").mkdir()
    file = (tmp_path / "both" / lora.DIFFUSERS_FILE).rename(tmp_path / "one" / lora.DIFFUSERS_FILE)
    for source in (tmp_path / "one", file):
        alone = load_generator(folder, adapter=source)
        assert torch.equal(both_pictures(pipeline, alone)[0], ours)


@pytest.mark.parametrize("targets, alpha, said", [
    (OFFICIAL, 2, True), (OFFICIAL, 4, False), (["to_q", "attn.to_v", "attn.to_add_out"], 12, True)])
def test_an_adapter_of_diffusers_and_of_peft_gives_us_the_same_picture(
        folder, plain_picture, tmp_path, targets, alpha, said):
    pipeline = StableDiffusion3Pipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    transformer = pipeline.transformer
    transformer.add_adapter(LoraConfig(r=4, lora_alpha=alpha, target_modules=targets))
    liven(p for name, p in transformer.named_parameters() if "lora_" in name)
    tensors = get_peft_model_state_dict(transformer)
    # Without peft's configuration in it a file means that alpha is the rank.
    metadata = _collate_lora_metadata({"transformer": transformer}) if said else {}
    pipeline.save_lora_weights(tmp_path / "diffusers", tensors, **metadata)
    config = transformer.peft_config["default"].to_dict()
    write_json(tmp_path / "peft" / "adapter_config.json", config | {"target_modules": targets})
    save_file({f"base_model.model.{name}": t for name, t in tensors.items()},
              tmp_path / "peft" / "adapter_model.safetensors")
    for name in ("diffusers", "peft"):
        ours, theirs = both_pictures(pipeline, load_generator(folder, adapter=tmp_path / name))
        assert difference(ours, theirs) <= 2 and difference(ours, plain_picture) > 20


def test_an_adapter_that_also_changes_text_encoders_is_refused(folder, tmp_path):
    tensors = {name: torch.ones(shape) for name, shape in (
        ("transformer.transformer_blocks.0.attn.to_out.0.lora_A.weight", (4, 64)),
        ("transformer.transformer_blocks.0.attn.to_out.0.lora_B.weight", (64, 4)),
        ("text_encoder.text_model.encoder.layers.0.mlp.fc1.lora_B.weight", (64, 4)))}
    save_file(tensors, tmp_path / lora.DIFFUSERS_FILE)
    with pytest.raises(UserError, match="unexpected 'text_encoder.text_model"):
        load_generator(folder, adapter=tmp_path)


def test_stabilitys_single_file_gives_the_same_picture(folder, tmp_path):
    whole = load_generator(folder)
    tensors = {f"model.diffusion_model.{n}": t for n, t in stability_file(whole.mmdit).items()}
    tensors |= {f"first_stage_model.{n}": t for n, t in whole.vae.state_dict().items()}
    file = tmp_path / "sd3.5.safetensors"
    save_file({name: t.clone().contiguous() for name, t in tensors.items()}, file)
    with pytest.raises(UserError, match="--text-encoders"):
        load_generator(file)
    single = load_generator(file, encoders_from=folder)
    pictures = [g.draw(["a lake"], [1], 64, steps=2) for g in (whole, single)]
    assert torch.equal(*pictures)


def test_parts_of_different_checkpoints_are_refused(folder):
    whole = load_generator(folder)
    for field in ("context_dim", "pooled_dim", "channels"):
        other = replace(whole.mmdit.config, **{field: 7})
        with pytest.raises(UserError, match="the transformer takes .* 7.*; give parts of one checkpoint"):
            check_parts(other, whole.encoders, whole.vae.config, "x")


def test_half_precision_weights_draw_nearly_the_same_picture(folder):
    full, half = (load_generator(folder, dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
    assert {p.dtype for m in (half.mmdit, half.vae) for p in m.parameters()} == {torch.bfloat16}
    pictures = [g.draw(["a lake"], [1], 64, steps=3, guidance=2.0) for g in (full, half)]
    assert (pictures[0].float() - pictures[1].float()).abs().mean() < 6


def test_a_picture_depends_on_its_own_seed_only():
    generator = load_generator(TINY)
    prompts = ["a swan on the lake at noon", "a tent in the hills at night"]
    together = generator.draw(prompts, [5, 6], 64, steps=3)
    alone = torch.cat([generator.draw([p], [s], 64, steps=3) for p, s in zip(prompts, (5, 6))])
    assert difference(together, alone) <= 1
    assert difference(generator.draw(prompts[:1], [7], 64, steps=3), together[:1]) > 20


def test_the_judge_looks_at_no_more_pixels_than_are_drawn():
    limits = load_judge(TINY / "judge", "cpu", 64).processor.image
    assert limits.max_pixels == max(limits.min_pixels, 64**2)


def test_a_name_does_not_tell_where_the_miniature_lies():
    assert name_of(TINY) == "tiny/weights" and name_of(TINY / "judge") == "tiny/weights/judge"
    assert name_of("owner/name") == "owner/name"


def test_each_prompt_is_encoded_once(monkeypatch):
    generator = load_generator(TINY)
    encode, asked = generator.encoders.encode, []
    monkeypatch.setattr(generator.encoders, "encode", lambda texts: asked.extend(texts) or encode(texts))
    generator.encoders = PromptCache(generator.encoders, generator.dtype)
    context, pooled = generator.encode_prompts(["a lake", "a hill", "a lake"], 4.5)
    again, _ = generator.encode_prompts(["a hill"], 1.0)
    assert asked == ["", "a lake", "a hill"] and context.shape[0] == pooled.shape[0] == 6
    expected, _ = encode(["", "", "", "a lake", "a hill", "a lake"])
    torch.testing.assert_close(context, expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(again[0], context[4])


def test_encoders_may_leave_when_all_prompts_are_encoded():
    prompts = ["", "a lake", "a hill"]
    caches = [PromptCache(load_generator(TINY).encoders, torch.float32) for _ in range(2)]
    caches[0].encode_and_free(prompts, progress=False)
    assert caches[0].encoders is None
    for ours, theirs in zip(caches[0].encode(prompts), caches[1].encode(prompts), strict=True):
        assert torch.equal(ours, theirs)


class Weight:
    """A parameter that only knows where its data lie."""

    def __init__(self):
        self.data = self

    def to(self, device):
        return f"copy on {device}"


def test_models_are_brought_to_a_device_and_are_where_they_were_afterwards():
    weights = [Weight(), Weight()]
    model = SimpleNamespace(parameters=lambda: weights[:1], buffers=lambda: weights[1:])
    with pytest.raises(ValueError), brought("cuda:1", model):
        assert [w.data for w in weights] == ["copy on cuda:1"] * 2
        raise ValueError
    assert [w.data for w in weights] == weights
    with brought(None, model):
        assert [w.data for w in weights] == weights


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_models_that_take_turns_on_a_gpu_draw_the_same_picture_and_leave_it_empty():
    usual = load_generator(TINY, "cuda").draw(["a lake"], [0], 64, steps=2)
    generator = load_generator(TINY, "cuda", offload=True)
    assert generator.device.type == "cpu" and torch.equal(generator.draw(["a lake"], [0], 64, steps=2), usual)
    assert all(p.device.type == "cpu" for model in generator.coming for p in model.parameters())


def test_an_offloaded_judge_comes_to_the_gpu_for_every_kind_of_reading(monkeypatch):
    came = []

    @contextlib.contextmanager
    def remember(device, *modules):
        came.append(device)
        yield
        came.append("back")

    monkeypatch.setattr(pipeline, "brought", remember)
    monkeypatch.setattr(pipeline, "expected_va", lambda model, questions, *thoughts: came.append("read") or [(5.0, 5.0)])
    judge = pipeline.judge_of(None, offload="cuda", progress=False)
    assert judge.expected_va(["a question"]) == [(5.0, 5.0)] and came == ["cuda", "read", "back"]


def test_offloaded_weights_have_the_type_they_have_on_a_gpu():
    assert home_of_weights("cuda", True) == ("cpu", torch.bfloat16) and home_of_weights("cuda", False) == ("cuda", None)
    assert home_of_weights("cpu", True) == ("cpu", None)
    generator = load_generator(TINY, "cuda", encoders="cpu", offload=True)
    assert generator.mmdit.pos_embed.dtype == torch.bfloat16 and len(generator.coming) == 2
    assert generator.encoders.clip_l.token_embedding.weight.dtype == torch.float32


class Counting:
    """Text encoders that count what they are asked for."""

    def __init__(self):
        self.asked = []

    def encode(self, prompts):
        self.asked += prompts
        return torch.full((1, 2, 3), float(len(prompts[0]))), torch.full((1, 4), float(len(prompts[0])))


def test_a_prompt_is_encoded_once_while_it_is_among_the_last_that_were_used():
    cache = PromptCache(Counting(), torch.float32, limit=3)
    context, pooled = cache.encode(["a", "bb", "a"])
    assert context[:, 0, 0].tolist() == pooled[:, 0].tolist() == [1, 2, 1]
    cache.encode(["ccc"])
    cache.encode(["a"])  # used again, so that "bb" is now the one that was not used for longest
    cache.encode(["dddd"])
    assert cache.encoders.asked == ["a", "bb", "ccc", "dddd"] and list(cache.known) == ["ccc", "a", "dddd"]
    cache.encode(["bb", "a", "eeeee", "ffffff"])  # more than the limit at a time are no difficulty
    assert cache.encoders.asked[4:] == ["bb", "eeeee", "ffffff"] and len(cache.known) == 3


def test_prompts_that_are_encoded_ahead_all_stay():
    cache = PromptCache(Counting(), torch.float32, limit=2)
    prompts = ["a", "bb", "ccc", "dddd"]
    cache.encode_and_free(prompts, progress=False)
    assert cache.encode(prompts)[1][:, 0].tolist() == [1, 2, 3, 4] and cache.encoders is None


def test_each_model_of_a_training_is_told_apart_by_its_own_files(tmp_path):
    shutil.copytree(TINY, tmp_path / "tiny")
    folder = tmp_path / "tiny"
    args = Namespace(model=str(folder), no_t5=False, judge=str(folder / "judge"), pickscore=str(folder / "clip"),
                     init_adapter=str(folder / "adapter"))

    def changed(path):
        """The flags whose models differ after the values in a file are others, as after training."""
        save_file({name: tensor + 1 for name, tensor in load_file(path).items()}, path)
        before.append(fingerprints(args))
        return [flag for flag, digest in before[-1].items() if digest != before[-2][flag]]

    before = [fingerprints(args)]
    assert before[0].keys() == {"model", "judge", "pickscore", "init_adapter"} and len(set(before[0].values())) == 4
    assert changed(folder / "vae" / "diffusion_pytorch_model.safetensors") == ["model"]
    assert changed(folder / "judge" / "model.safetensors") == ["judge"]
    assert changed(folder / "clip" / "model.safetensors") == ["pickscore"]
    assert changed(folder / "adapter" / "adapter_model.safetensors") == ["init_adapter"]
    args.judge = args.pickscore = args.init_adapter = "none"
    assert fingerprints(args).keys() == {"model"}


def test_the_model_of_an_adapter_is_part_of_its_fingerprint(tmp_path):
    for name, base in (("a", TINY / "judge"), ("b", tmp_path / "a")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(base)}))
    assert lora.with_base(tmp_path / "b") == [tmp_path / "b", tmp_path / "a", TINY / "judge"]
