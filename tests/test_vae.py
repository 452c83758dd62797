"""The autoencoder against diffusers' AutoencoderKL, its file layouts, and bad input."""

import pytest
import torch
from diffusers import AutoencoderKL
from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint
from safetensors.torch import save_file

from parts import layouts, vae, weights
from parts.cli import UserError
from tiny import publish

SMALL = {"block_out_channels": [32, 64, 64, 96], "norm_num_groups": 16, "layers_per_block": 2}


def reference(**options):
    torch.manual_seed(0)
    levels = len(options["block_out_channels"])
    model = AutoencoderKL(
        in_channels=3, out_channels=3, latent_channels=16, down_block_types=["DownEncoderBlock2D"] * levels,
        up_block_types=["UpDecoderBlock2D"] * levels, scaling_factor=1.5305, shift_factor=0.0609,
        use_quant_conv=False, use_post_quant_conv=False, **options).eval()
    for p in model.parameters():  # norms away from one and biases away from zero, so that none can be forgotten
        torch.nn.init.normal_(p, std=0.05 if p.dim() > 1 else 0.2)
    return model


def close(ours, theirs, tolerance=1e-4):
    return float((ours - theirs).norm() / theirs.norm()) < tolerance


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    theirs = reference(**SMALL)
    theirs.save_pretrained(folder / "vae")
    return theirs, vae.VAE.from_pretrained(folder), folder


@torch.no_grad()
@pytest.mark.parametrize("height, width", [(32, 32), (48, 80)])
def test_encoder_and_decoder_equal_diffusers(pair, height, width):
    theirs, ours, _ = pair
    images = torch.rand(2, 3, height, width) * 2 - 1
    posterior = theirs.encode(images).latent_dist
    mean, logvar = ours.moments(images)
    assert close(mean, posterior.mean) and close(logvar, posterior.logvar)
    latents = ours.encode(images)
    assert close(latents, (posterior.mean - 0.0609) * 1.5305)
    assert close(ours.decode(latents), theirs.decode(latents / 1.5305 + 0.0609).sample)


@pytest.mark.one_form
@torch.no_grad()
def test_pictures_of_narrow_latents_are_whole_numbers_of_0_to_255(pair):
    _, ours, _ = pair
    latents = 3 * torch.randn(2, 16, 4, 6)
    pixels = ours.pictures(latents.bfloat16())
    expected = (ours.decode(latents.bfloat16().float()).clamp(-1, 1) + 1) * 127.5
    assert pixels.dtype == torch.uint8 and pixels.shape == (2, 3, 32, 48) and pixels.float().std() > 10
    assert (pixels - expected).abs().max() <= 0.51


@pytest.mark.one_form
@torch.no_grad()
def test_a_generator_draws_from_the_posterior(pair):
    _, ours, _ = pair
    images = torch.rand(1, 3, 32, 32) * 2 - 1
    draws = torch.cat([ours.encode(images, torch.Generator().manual_seed(k)) for k in range(100)])
    mean, logvar = ours.moments(images)
    expected = (mean - 0.0609) * 1.5305
    deviation = torch.exp(0.5 * logvar) * 1.5305
    assert ((draws.mean(0) - expected[0]).abs() < 5 * deviation[0] / 10).all()
    assert torch.equal(ours.encode(images, torch.Generator().manual_seed(3)), draws[3:4])


@pytest.mark.one_form
@pytest.mark.parametrize("config, count", [
    (vae.SD3_VAE, 83_819_683), (vae.VAEConfig(latent_channels=4, quant_convs=True), 83_653_863)], ids=["SD3", "SDXL"])
def test_full_size_names_shapes_and_count_equal_the_published_model(config, count):
    with torch.device("meta"):
        ours = vae.VAE(config)
        theirs = AutoencoderKL(
            in_channels=3, out_channels=3, latent_channels=config.latent_channels,
            down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4,
            block_out_channels=[128, 256, 512, 512], layers_per_block=2, use_quant_conv=config.quant_convs,
            use_post_quant_conv=config.quant_convs)
    assert weights.count_parameters(ours) == count
    expected = {name: tuple(t.shape) for name, t in theirs.state_dict().items()}
    assert weights.shapes(layouts.vae_views(ours)) == expected


@pytest.mark.one_form
@torch.no_grad()
def test_saving_and_the_single_file_give_the_same_model(pair, tmp_path):
    theirs, ours, _ = pair
    publish.save_vae(tmp_path / "vae", ours)
    again = AutoencoderKL.from_pretrained(tmp_path / "vae")
    assert all(torch.equal(t, again.state_dict()[name]) for name, t in theirs.state_dict().items())
    file = tmp_path / "sd3.5.safetensors"
    save_file({f"first_stage_model.{n}": t.clone() for n, t in ours.state_dict().items()}, file)
    # groups are not visible in tensor shapes; a single file is Stability's, with 32 of them
    single = vae.VAE.from_pretrained(file)
    assert single.config == vae.VAEConfig((32, 64, 64, 96), 2, 16, 32)
    assert all(torch.equal(t, single.state_dict()[n]) for n, t in ours.state_dict().items())


@pytest.mark.one_form
def test_stabilitys_names_mean_what_diffusers_converter_takes_them_for(pair):
    """The single file's layout, read by diffusers' own converter, gives the tensors that our diffusers layout has."""
    _, ours, _ = pair
    tensors = {f"first_stage_model.{n}": t for n, t in ours.state_dict().items()}
    converted = convert_ldm_vae_checkpoint(tensors, dict.fromkeys(("down_block_types", "up_block_types"), [""] * 4))
    views = layouts.vae_views(ours)
    assert set(converted) == set(views)
    for name, (tensor,) in views.items():
        assert torch.equal(converted[name], tensor), name


@pytest.mark.one_form
def test_bad_images_and_foreign_files_are_refused(pair, tmp_path):
    _, ours, _ = pair
    with pytest.raises(ValueError, match="multiples of 8"):
        ours.encode(torch.zeros(1, 3, 30, 32))
    file = tmp_path / "other.safetensors"
    save_file({"model.weight": torch.zeros(2)}, file)
    with pytest.raises(UserError, match="first_stage_model"):
        vae.VAE.from_pretrained(file)
    for config in ("{}", "[]", '{"use_quant_conv": true}', '{"use_quant_conv": false}'):
        (tmp_path / "config.json").write_text(config)
        with pytest.raises(UserError, match="config.json"):
            vae.VAE.from_pretrained(tmp_path)
