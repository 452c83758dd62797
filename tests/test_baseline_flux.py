"""FLUX.1 against diffusers: the transformer, the whole pipeline, its plan of memory, and files that do not fit."""

import json
import shutil

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
)
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel

from baselines import flux
from baselines.case import Case
from parts import clip, hub, pipeline, text_encoders, vae, weights
from parts.cli import UserError
from tests.checkpoint import T5, WORDS, t5_tokenizer
from tests.test_mmdit import relative_error, shake
from tests.test_pipeline import difference, diffusers_picture
from tiny.pretrain import learn_bpe

SMALL = flux.FluxConfig(double_blocks=2, single_blocks=3, heads=4, head_dim=16, context_dim=96, pooled_dim=32,
                        axes=(4, 6, 6))
SCHEDULES = {True: {"shift": 3.0, "use_dynamic_shifting": True}, False: {"shift": 1.0}}  # of dev and of schnell


def reference(c, device="cpu"):
    with torch.device(device):
        return FluxTransformer2DModel(
            in_channels=4 * c.channels, num_layers=c.double_blocks, num_single_layers=c.single_blocks,
            num_attention_heads=c.heads, attention_head_dim=c.head_dim, joint_attention_dim=c.context_dim,
            pooled_projection_dim=c.pooled_dim, guidance_embeds=c.guided, axes_dims_rope=c.axes).eval()


def small(guided):
    return flux.FluxConfig(**{**vars(SMALL), "guided": guided})


def tokens_of(latents):
    return FluxPipeline._pack_latents(latents, *latents.shape)


@pytest.mark.parametrize("forms", ["fused", "plain"], indirect=True)
@pytest.mark.parametrize("guided", [True, False], ids=["dev", "schnell"])
@torch.no_grad()
def test_the_velocity_equals_diffusers(guided, forms, tmp_path):
    c = small(guided)
    theirs = shake(reference(c))
    theirs.save_pretrained(tmp_path / "transformer", max_shard_size="200KB")
    ours = flux.FluxTransformer.from_pretrained(tmp_path)
    assert ours.config == c and len(list((tmp_path / "transformer").glob("*.safetensors"))) > 2
    g = torch.Generator().manual_seed(1)
    latents = torch.randn(2, c.channels, 6, 10, generator=g)
    context = torch.randn(2, 7, c.context_dim, generator=g)
    pooled = torch.randn(2, c.pooled_dim, generator=g)
    timestep = torch.tensor([900.0, 31.0])
    guidance = torch.tensor([3.5, 7.0]) if guided else None
    expected = theirs(tokens_of(latents), context, pooled, timestep / 1000, guidance=guidance,
                      img_ids=FluxPipeline._prepare_latent_image_ids(2, 3, 5, "cpu", torch.float32),
                      txt_ids=torch.zeros(7, 3)).sample
    velocity = ours(latents, timestep, context, pooled, guidance)
    assert relative_error(tokens_of(velocity), expected) < 1e-4
    with pytest.raises(ValueError, match="a guided model, and no other"):
        ours(latents, timestep, context, pooled, None if guided else timestep)
    with pytest.raises(ValueError, match="5×10; both sides must be even"):
        ours(latents[:, :, 1:], timestep, context, pooled, guidance)


@pytest.mark.parametrize("config, count", [(flux.FLUX_DEV, 11_901_408_320), (flux.FLUX_SCHNELL, 11_891_178_560)],
                         ids=["dev", "schnell"])
def test_full_size_names_shapes_and_counts_equal_the_published_models(config, count):
    with torch.device("meta"):
        ours = flux.FluxTransformer(config)
    theirs = reference(config, "meta")
    assert weights.count_parameters(ours) == count == weights.count_parameters(theirs)
    assert weights.shapes(ours.views()) == {name: tuple(t.shape) for name, t in theirs.state_dict().items()}


def make_flux(guided):
    torch.manual_seed(0)
    vocab, merges = learn_bpe([" ".join(WORDS)] * 3, 700)
    made = FluxPipeline(
        transformer=reference(small(guided)),
        vae=AutoencoderKL(
            down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4,
            block_out_channels=[32, 32, 64, 64], layers_per_block=1, latent_channels=16, norm_num_groups=32,
            scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=CLIPTextModel(CLIPTextConfig(
            hidden_size=32, intermediate_size=64, projection_dim=48, vocab_size=len(vocab), num_hidden_layers=3,
            num_attention_heads=4, eos_token_id=2)),
        text_encoder_2=T5EncoderModel(T5Config(**T5)), tokenizer=CLIPTokenizer(vocab, merges, model_max_length=77),
        tokenizer_2=t5_tokenizer(), scheduler=FlowMatchEulerDiscreteScheduler(**SCHEDULES[guided]))
    generator = torch.Generator().manual_seed(0)
    for name in ("transformer", "text_encoder", "text_encoder_2"):
        for p in getattr(made, name).eval().parameters():  # lively weights: an untrained model hides mistakes
            p.data.copy_(torch.randn(p.shape, generator=generator) * (p.shape[-1] ** -0.5 if p.dim() > 1 else 0.3)
                         + (p.dim() == 1) * 0.5)
    made.set_progress_bar_config(disable=True)
    return made


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory):
    """{guided: (diffusers' pipeline, the folder it wrote)}."""
    pairs = {guided: (make_flux(guided), tmp_path_factory.mktemp("flux")) for guided in (True, False)}
    for made, folder in pairs.values():
        made.save_pretrained(folder)
    return pairs


@pytest.fixture(scope="module")
def dev(pipelines):
    return flux.Flux.from_pretrained(pipelines[True][1])


@pytest.fixture(scope="module")
def schnell(pipelines):
    return flux.Flux.from_pretrained(pipelines[False][1])


PROMPT = "a lone tree over the lake at night"
CASES = [Case(PROMPT, 7.0, 3.0)]


def starting_noise():
    return torch.randn(1, 16, 16, 16, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("guided", [True, False], ids=["dev", "schnell"])
def test_a_folder_written_by_diffusers_gives_the_same_picture(guided, pipelines, dev, schnell):
    made, _ = pipelines[guided]
    ours = dev if guided else schnell
    assert (ours.steps, ours.guidance) == ((50, 3.5) if guided else (4, None))
    options = {"guidance_scale": 2.5} if guided else {"max_sequence_length": 256}
    theirs = diffusers_picture(made, PROMPT, tokens_of(starting_noise()), num_inference_steps=5, height=128, width=128,
                               **options)
    drawn = ours.draw(CASES, [3], 128, 5, 2.5 if guided else None, starting_noise())
    assert theirs.float().std() > 20  # a picture, not a flat colour
    assert difference(drawn, theirs) <= 2
    # of a seed comes the noise that diffusers draws with it, in every row its own
    both = ours.draw(CASES * 2, [4, 3], 128, 5, 2.5 if guided else None)
    assert difference(both[1:], drawn) <= 1 and difference(both[:1], drawn) > 20


@pytest.mark.parametrize("guided, size", [(True, 1024), (True, 512), (False, 1024)])
def test_the_schedule_is_that_of_diffusers(guided, size):
    scheduler = FlowMatchEulerDiscreteScheduler(**SCHEDULES[guided])
    tokens = (size // 16) ** 2
    mu = 0.5 + (1.15 - 0.5) * (tokens - 256) / (4096 - 256)
    scheduler.set_timesteps(sigmas=[1 - i / 28 for i in range(28)], mu=mu)
    ours = flux.Schedule(**SCHEDULES[guided]).sigmas(28, tokens)
    torch.testing.assert_close(ours, scheduler.sigmas, atol=1e-6, rtol=0)


def test_offloaded_blocks_come_one_by_one_and_give_the_same_picture(pipelines, dev, monkeypatch):
    usual = dev.draw(CASES, [3], 64, 2)
    offloaded = flux.Flux.from_pretrained(pipelines[True][1], offload=True)
    brought, asked = flux.brought, []
    monkeypatch.setattr(flux, "brought", lambda device, *models: asked.append((device, models)) or brought(device, *models))
    assert torch.equal(offloaded.draw(CASES, [3], 64, 2), usual)
    blocks = [(block,) for block in (*offloaded.transformer.joint_blocks, *offloaded.transformer.single_blocks)]
    towers = (offloaded.encoders.clip_l, offloaded.encoders.t5)
    assert asked == [("cpu", models) for models in (towers, *blocks, *blocks)]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("encoders", pipeline.ENCODERS)
def test_offloaded_weights_leave_the_gpu_and_draw_the_same_picture(pipelines, encoders):
    _, folder = pipelines[True]
    usual = flux.Flux.from_pretrained(folder, "cuda", torch.float32).draw(CASES, [3], 64, 2)
    offloaded = flux.Flux.from_pretrained(folder, "cuda", torch.float32, encoders, offload=True)
    assert difference(offloaded.draw(CASES, [3], 64, 2), usual) <= 1
    transformer = offloaded.transformer
    on_gpu = {name.split(".")[0] for name, p in transformer.named_parameters() if p.is_cuda}
    assert not on_gpu & {"joint_blocks", "single_blocks"} and "final_layer" in on_gpu


def test_encoders_leave_when_all_prompts_are_encoded(pipelines):
    ours = flux.Flux.from_pretrained(pipelines[False][1], encoders="leave")
    usual = ours.draw(CASES, [3], 64, 2)
    pipeline.encode_and_free(ours, [PROMPT])
    assert ours.encoders.encoders is None and torch.equal(ours.draw(CASES, [3], 64, 2), usual)


def test_half_precision_weights_draw_nearly_the_same_picture(pipelines, dev):
    half = flux.Flux.from_pretrained(pipelines[True][1], dtype=torch.bfloat16)
    pictures = [each.draw(CASES, [1], 64, 3) for each in (dev, half)]
    assert (pictures[0].float() - pictures[1].float()).abs().mean() < 8


def test_the_plan_of_memory_counts_what_is_loaded(dev, monkeypatch):
    monkeypatch.setattr(flux, "FLUX_VAE", dev.vae.config)
    monkeypatch.setattr(clip, "CLIP_L_TEXT", dev.encoders.clip_l.config)
    monkeypatch.setattr(text_encoders, "T5_XXL", dev.encoders.t5.config)

    def size(*modules):
        return sum(p.nbytes for module in modules for p in module.parameters()) / 2**30

    def plan(*args):
        return [pytest.approx(flux.memory(SMALL, *args, torch.float32)[key]) for key in ("host", "encoding", "drawing")]

    transformer = dev.transformer
    blocks = [*transformer.joint_blocks, *transformer.single_blocks]
    towers = size(dev.encoders.clip_l, dev.encoders.t5)
    whole = size(transformer, dev.vae)
    rest = whole - size(*blocks)
    largest = max(map(size, blocks))
    assert plan("gpu", False) == [0, whole + towers, whole + towers]
    assert plan("cpu", False) == [towers, whole, whole]
    assert plan("leave", False) == [0, whole + towers, whole]
    assert plan("gpu", True) == [size(*blocks) + towers, rest + towers, rest + largest]
    assert plan("cpu", True) == [size(*blocks) + towers, rest, rest + largest]
    assert plan("leave", True) == [size(*blocks), rest + towers, rest + largest]


def test_the_published_weights_fit_24_gb_only_with_blocks_in_the_hosts_memory():
    whole = flux.memory(encoders="leave")
    offloaded = flux.memory(encoders="leave", offload=True)
    assert 22 < whole["drawing"] < 23 and 31 < whole["encoding"] < 32
    assert offloaded["drawing"] < 1 and 9 < offloaded["encoding"] < 10 and 22 < offloaded["host"] < 23


# ---------------------------------------------------------------------------------------------------------------------
# Files that do not fit


def rewrite(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def other_pipeline(folder):
    rewrite(folder / "model_index.json", _class_name="StableDiffusion3Pipeline")
    return "of 'StableDiffusion3Pipeline', expected FluxPipeline"


def other_transformer(folder):
    rewrite(folder / "transformer" / "config.json", in_channels=384, out_channels=64)
    return "it fills or controls"


def other_axes(folder):
    rewrite(folder / "transformer" / "config.json", axes_dims_rope=[4, 6, 8])
    return "axes_dims_rope"


def other_schedule(folder):
    rewrite(folder / "scheduler" / "scheduler_config.json", use_karras_sigmas=True)
    return "use_karras_sigmas"


def schnells_weights(folder):
    rewrite(folder / "transformer" / "config.json", guidance_embeds=False)
    return "unexpected 'time_text_embed.guidance_embedder"


def other_vae(folder):
    rewrite(folder / "vae" / "config.json", use_quant_conv=True)
    return "quant_conv"


def other_texts(folder):
    rewrite(folder / "transformer" / "config.json", pooled_projection_dim=33)
    return r"time_text_embed.text_embedder.linear_1.weight is \[64, 32\], expected \[64, 33\]"


def missing_tensor(folder):
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    save_file({name: t for name, t in load_file(file).items() if name != "single_transformer_blocks.1.attn.norm_k.weight"},
              file)
    return "missing single_transformer_blocks.1.attn.norm_k.weight"


def adapter(folder):
    (folder / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    layers = [f"transformer.transformer_blocks.{i}.attn.to_q.lora_{part}.weight" for i in (0, 1) for part in "AB"]
    save_file({name: torch.zeros(4, 64) for name in layers},
              folder / "transformer" / "pytorch_lora_weights.safetensors")
    return "tensors do not fit this model: missing"


def pickle_with_code(folder):
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    file.unlink()
    file.with_suffix(".bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    return "expected one .safetensors file"


def no_t5(folder):
    shutil.rmtree(folder / "text_encoder_2")
    return "no folder text_encoder_2/"


@pytest.mark.parametrize("damage", [other_pipeline, other_transformer, other_axes, other_schedule, schnells_weights,
                                    other_vae, other_texts, missing_tensor, adapter, pickle_with_code, no_t5])
def test_files_that_do_not_fit_are_refused_in_one_line(damage, pipelines, tmp_path):
    folder = tmp_path / "flux"
    shutil.copytree(pipelines[True][1], folder)
    message = damage(folder)
    with pytest.raises(UserError, match=message) as caught:
        flux.Flux.from_pretrained(folder)
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)


def test_an_adapter_or_a_single_file_is_no_pipeline(tmp_path):
    file = tmp_path / "pytorch_lora_weights.safetensors"
    save_file({"transformer.x_embedder.lora_A.weight": torch.zeros(4, 64)}, file)
    for source in (tmp_path, file):
        with pytest.raises(UserError, match="no model_index.json in it"):
            flux.Flux.from_pretrained(source)


def test_parts_of_different_checkpoints_are_refused(dev):
    with pytest.raises(UserError, match="latents of 16 channels.* 4; give parts of one checkpoint"):
        flux.check_parts(SMALL, dev.encoders, vae.VAEConfig(latent_channels=4), "x")


def test_schnell_takes_no_guidance(schnell):
    with pytest.raises(UserError, match="takes no guidance"):
        schnell.draw(CASES, [3], 64, 1, guidance=3.5)


def test_only_the_pipelines_folders_are_downloaded():
    ((source, patterns),) = flux.files_of_flux("black-forest-labs/FLUX.1-dev")
    assert hub.is_hub_id(source) and "flux1-dev.safetensors" not in patterns and "transformer/*" in patterns
