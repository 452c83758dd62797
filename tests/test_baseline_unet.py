"""SDXL and InstructPix2Pix against diffusers: U-Nets, whole pipelines, published sizes; bad folders."""

import json
import shutil

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from baselines import unet
from baselines.case import Case
from parts import vae, weights
from parts.cli import UserError
from parts.files import write_json
from tests.checkpoint import WORDS
from tiny.pretrain import learn_bpe

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
# What the published config.json files say beside diffusers' defaults.
PUBLISHED = {
    "sdxl": {
        "attention_head_dim": [5, 10, 20], "block_out_channels": [320, 640, 1280], "cross_attention_dim": 2048,
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"], "sample_size": 128,
        "transformer_layers_per_block": [1, 2, 10], "use_linear_projection": True, "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816},
    "pix2pix": {"in_channels": 8, "cross_attention_dim": 768, "attention_head_dim": 8, "sample_size": 64}}
SMALL = {
    "sdxl": PUBLISHED["sdxl"] | {
        "attention_head_dim": [1, 2, 4], "block_out_channels": [16, 32, 64], "cross_attention_dim": 80, "sample_size": 8,
        "transformer_layers_per_block": [1, 1, 2], "addition_time_embed_dim": 8, "norm_num_groups": 8,
        "projection_class_embeddings_input_dim": 48 + 6 * 8},
    "pix2pix": PUBLISHED["pix2pix"] | {
        "attention_head_dim": 4, "block_out_channels": [16, 32, 32, 48], "cross_attention_dim": 32, "sample_size": 8,
        "norm_num_groups": 8, "layers_per_block": 1}}


@torch.no_grad()
def shake(model, generator):
    for p in model.eval().parameters():  # lively weights: an untrained model hides mistakes
        scale = p[0].numel() ** -0.5 if p.dim() > 1 else 0.3
        p.copy_(torch.randn(p.shape, generator=generator) * scale + (p.dim() == 1) * 0.5)


def make_pipeline(kind):
    """A small random pipeline of diffusers."""
    torch.manual_seed(0)
    vocab, merges = learn_bpe([" ".join(WORDS)] * 3, 700)
    sizes = {"vocab_size": len(vocab), "num_hidden_layers": 2, "num_attention_heads": 4, "eos_token_id": 2}
    tiny = CLIPTextConfig(hidden_size=32, intermediate_size=64, projection_dim=24, **sizes)
    parts = {
        "unet": UNet2DConditionModel(**SMALL[kind]), "text_encoder": CLIPTextModel(tiny),
        "tokenizer": CLIPTokenizer(vocab, merges, model_max_length=77),
        "vae": AutoencoderKL(
            down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4,
            block_out_channels=[16, 16, 32, 32], layers_per_block=1, norm_num_groups=8, sample_size=64,
            scaling_factor=0.13025 if kind == "sdxl" else 0.18215)}
    if kind == "sdxl":
        other = CLIPTextConfig(hidden_size=48, intermediate_size=96, hidden_act="gelu", projection_dim=48, **sizes)
        made = StableDiffusionXLPipeline(
            **parts, text_encoder_2=CLIPTextModelWithProjection(other),
            tokenizer_2=CLIPTokenizer(vocab, merges, pad_token="!", model_max_length=77),
            scheduler=EulerDiscreteScheduler(**BETAS, timestep_spacing="leading"), add_watermarker=False)
    else:
        made = StableDiffusionInstructPix2PixPipeline(
            **parts, scheduler=EulerAncestralDiscreteScheduler(**BETAS), safety_checker=None, feature_extractor=None,
            requires_safety_checker=False)
    generator = torch.Generator().manual_seed(1)
    for name in ("unet", "text_encoder", "text_encoder_2", "vae"):
        if name in made.components:
            shake(made.components[name], generator)
    made.set_progress_bar_config(disable=True)
    return made


def both(kind, ours, folder):
    """(diffusers' pipeline, ours, the folder that diffusers wrote and we read)."""
    theirs = make_pipeline(kind)
    theirs.save_pretrained(folder)
    return theirs, ours.from_pretrained(folder), folder


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory):
    return both("sdxl", unet.SDXL, tmp_path_factory.mktemp("sdxl"))


@pytest.fixture(scope="module")
def pix2pix(tmp_path_factory):
    return both("pix2pix", unet.InstructPix2Pix, tmp_path_factory.mktemp("pix2pix"))


@pytest.fixture(params=["sdxl", "pix2pix"])
def pair(request):
    return request.getfixturevalue(request.param)


def difference(ours, theirs):
    theirs = torch.from_numpy((theirs * 255).round().astype(np.uint8)).permute(0, 3, 1, 2)
    assert theirs.float().std() > 20  # a picture, not a flat colour
    return int((ours.int() - theirs.int()).abs().max())


def source_picture(side=64, seed=2):
    coarse = np.random.default_rng(seed).integers(0, 255, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC)


# ---------------------------------------------------------------------------------------------------------------------
# The U-Net


@torch.no_grad()
@pytest.mark.parametrize("height, width", [(8, 8), (12, 10), (9, 7)])
def test_the_u_net_equals_diffusers_at_even_and_odd_sizes(pair, height, width):
    theirs, ours, _ = pair
    c = ours.model.unet.config
    latents, context = torch.randn(2, c.in_channels, height, width), torch.randn(2, 77, c.context_dim)
    timestep, added = torch.tensor([961.0, 12.5]), {}
    inputs = [latents, timestep, context]
    if c.pooled_dim:
        pooled, sizes = torch.randn(2, 48), torch.tensor([640, 512, 0, 8, 600, 500])
        added = {"added_cond_kwargs": {"text_embeds": pooled, "time_ids": sizes.expand(2, -1)}}
        inputs += [pooled, sizes]
    expected = theirs.unet(latents, timestep, context, **added).sample
    out = ours.model.unet(*inputs)
    assert float((out - expected).norm() / expected.norm()) < 1e-4


@pytest.mark.parametrize("kind, config, count", [
    ("sdxl", unet.SDXL_UNET, 2_567_463_684), ("pix2pix", unet.INSTRUCT_PIX2PIX_UNET, 859_532_484)])
def test_full_size_configurations_names_shapes_and_counts_equal_the_published_ones(kind, config, count, tmp_path):
    with torch.device("meta"):
        ours, theirs = unet.UNet(config), UNet2DConditionModel(**PUBLISHED[kind])
    theirs.save_config(tmp_path)
    assert unet.unet_config(tmp_path / "config.json") == config
    assert weights.count_parameters(ours) == count == sum(p.numel() for p in theirs.parameters())
    assert weights.shapes(ours.views()) == {name: tuple(t.shape) for name, t in theirs.state_dict().items()}


# ---------------------------------------------------------------------------------------------------------------------
# Schedules and pipelines


@pytest.mark.parametrize("theirs, ancestral, spacing", [
    (EulerDiscreteScheduler, False, "leading"), (EulerAncestralDiscreteScheduler, True, "linspace")])
@pytest.mark.parametrize("steps", [1, 25, 50, 100])
def test_noise_levels_equal_those_of_diffusers_schedulers(theirs, ancestral, spacing, steps):
    scheduler = theirs(**BETAS, timestep_spacing=spacing)
    scheduler.set_timesteps(steps)
    schedule = unet.Schedule(0.00085, 0.012, 1000, spacing, 1, ancestral)
    timesteps, sigmas = schedule.noise_levels(steps)
    assert np.allclose(timesteps, scheduler.timesteps) and np.allclose(sigmas, scheduler.sigmas, rtol=1e-5)


@pytest.mark.parametrize("guidance", [5.0, 1.0])
def test_sdxl_draws_what_diffusers_draws_from_the_same_noise(sdxl, guidance):
    theirs, ours, _ = sdxl
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    prompts = ["a lone tree over the lake at night", "a dark horse"]
    expected = theirs(prompts, latents=noise.clone(), num_inference_steps=5, guidance_scale=guidance, height=64, width=64,
                      output_type="np").images
    cases = [Case(prompt, 5, 5) for prompt in prompts]
    assert difference(ours.draw(cases, [0, 1], 64, 5, guidance, noise), expected) <= 2


def test_sdxl_draws_from_a_seed_and_encodes_the_empty_prompt_where_zeros_do_not_stand_for_it(sdxl):
    theirs, ours, _ = sdxl
    generators = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    options = {"num_inference_steps": 3, "height": 64, "width": 64, "output_type": "np"}
    expected = theirs(["a tree", "a lake"], generator=generators, **options).images
    cases = [Case("a tree", 5, 5), Case("a lake", 5, 5)]
    assert difference(ours.draw(cases, [3, 4], 64, 3), expected) <= 2
    other = unet.SDXL(ours.model, ours.encoders, zeros=False)
    theirs.register_to_config(force_zeros_for_empty_prompt=False)
    expected = theirs("a tree", generator=generators[0].manual_seed(3), **options).images
    theirs.register_to_config(force_zeros_for_empty_prompt=True)
    assert difference(other.draw(cases[:1], [3], 64, 3), expected) <= 2


def test_instruct_pix2pix_draws_what_diffusers_draws_from_the_same_seeds(pix2pix):
    theirs, ours, _ = pix2pix
    sources = [source_picture(), source_picture(seed=5)]
    prompts = ["a bright night", "a storm over the lake"]
    generators = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    expected = theirs(prompts, sources, generator=generators, num_inference_steps=5, guidance_scale=6.0,
                      image_guidance_scale=1.5, output_type="np").images
    cases = [Case(prompt, 5, 5, source=source) for prompt, source in zip(prompts, sources, strict=True)]
    assert difference(ours.draw(cases, [3, 4], 64, 5, 6.0), expected) <= 2


def test_instruct_pix2pix_takes_embeddings_noise_and_a_source_of_any_shape(pix2pix):
    theirs, ours, _ = pix2pix
    context, empty = torch.randn(1, 77, 32), torch.randn(1, 77, 32)
    noise = torch.randn(1, 4, 8, 12)
    wide = Image.new("RGB", (96, 64))
    wide.paste(source_picture(), (16, 0))
    expected = theirs(image=wide, prompt_embeds=context, negative_prompt_embeds=empty, latents=noise.clone(),
                      generator=torch.Generator().manual_seed(7), num_inference_steps=3, guidance_scale=3.0,
                      image_guidance_scale=2.0, output_type="np").images
    out = ours.draw_embedded((context, empty), [wide], [7], 64, 3, (3.0, 2.0), noise)
    assert difference(out, expected) <= 2 and out.shape == (1, 3, 64, 96)
    assert unet.resized(Image.new("RGB", (300, 1001)), 64, 8).size == (64, 216)
    with pytest.raises(UserError, match="must have one form; draw one at a time"):
        ours.draw_embedded((context.repeat(2, 1, 1), empty.repeat(2, 1, 1)), [wide, source_picture()], [7, 8], 64, 3)
    with pytest.raises(UserError, match="source picture"):
        ours.draw([Case("a tree", 5, 5)], [0])


@torch.no_grad()
def test_the_autoencoder_is_read_under_its_older_names_and_without_a_scale(pix2pix, tmp_path):
    theirs, _, folder = pix2pix
    shutil.copytree(folder / "vae", tmp_path / "vae")
    older = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    file = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = {}
    for name, tensor in load_file(file).items():
        for new, old in older.items():
            name = name.replace(f"attentions.0.{new}.", f"attentions.0.{old}.")
        tensors[name] = tensor
    assert "encoder.mid_block.attentions.0.proj_attn.bias" in tensors
    save_file(tensors, file)
    config = json.loads((tmp_path / "vae" / "config.json").read_text())
    del config["scaling_factor"], config["use_quant_conv"], config["use_post_quant_conv"]
    write_json(tmp_path / "vae" / "config.json", config)
    ours = vae.VAE.from_pretrained(tmp_path)
    images = torch.rand(1, 3, 32, 32) * 2 - 1
    mean, logvar = ours.moments(images)
    posterior = theirs.vae.encode(images).latent_dist
    assert torch.allclose(mean, posterior.mean, atol=1e-4) and torch.allclose(logvar, posterior.logvar, atol=1e-4)
    assert ours.config.scale == 0.18215
    assert torch.allclose(ours.decode(mean * 0.18215), theirs.vae.decode(mean).sample, atol=1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# Bad folders


def changed(folder, tmp_path, file, **values):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    raw = json.loads((copy / file).read_text())
    write_json(copy / file, raw | values)
    return copy


@pytest.mark.parametrize("file, values, message", [
    ("unet/config.json", {"act_fn": "gelu"}, "act_fn 'gelu'"),
    ("unet/config.json", {"attention_head_dim": [1, 2]}, "2 numbers for"),
    ("unet/config.json", {"attention_head_dim": "4"}, "attention_head_dim"),
    ("unet/config.json", {"layers_per_block": 100}, "more layers than tensors"),
    ("unet/config.json", {"block_out_channels": None}, "block_out_channels"),
    ("unet/config.json", {"cross_attention_dim": 81}, "attn2.to_k.weight"),
    ("scheduler/scheduler_config.json", {"prediction_type": "v_prediction"}, "v_prediction"),
    ("scheduler/scheduler_config.json", {"_class_name": "DDIMScheduler"}, "DDIMScheduler"),
    ("scheduler/scheduler_config.json", {"timestep_spacing": "trailing"}, "trailing"),
    ("model_index.json", {"_class_name": "StableDiffusionPipeline"}, "'StableDiffusionPipeline', expected"),
])
def test_other_models_and_damaged_configurations_are_refused(pair, tmp_path, file, values, message):
    _, ours, folder = pair
    with pytest.raises(UserError, match=message):
        type(ours).from_pretrained(changed(folder, tmp_path, file, **values))


def test_missing_tensors_adapters_and_parts_of_other_checkpoints_are_refused(pair, tmp_path):
    _, ours, folder = pair
    copy = changed(folder, tmp_path, "model_index.json")
    file = copy / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    del tensors["conv_out.bias"]
    save_file(tensors, file)
    with pytest.raises(UserError, match=r"missing conv_out.bias \[4\]"):
        type(ours).from_pretrained(copy)
    adapter = tmp_path / "lora.safetensors"
    save_file({"unet.down_blocks.0.attn1.to_q.lora_A.weight": torch.ones(1)}, adapter)
    with pytest.raises(UserError, match="it is an adapter"):
        type(ours).from_pretrained(adapter)
    with pytest.raises(UserError, match="parts of one checkpoint"):
        unet.check_parts(folder, ours.model, 7, 32, 0)
