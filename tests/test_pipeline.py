"""Prompts to pictures, the whole line against diffusers."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from safetensors.torch import save_file

import data
from parts.cli import UserError
from parts.pipeline import (
    TINY,
    PromptCache,
    check_parts,
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
