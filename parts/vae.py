"""The 16-channel autoencoder of Stable Diffusion 3 (Esser et al. 2024): images to latents an eighth their size, and back.

Modules carry the tensor names of Stability's single file (`first_stage_model.encoder.down.0.block.0.norm1.weight`);
`diffusers_views` maps the diffusers layout (`vae/`) onto them.
Shapes: B batch, C channels, H, W pixels, h = H/8, w = W/8 latent cells. Left out: tiling and slicing.
"""

import functools
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from parts import ops, weights
from parts.cli import UserError
from parts.files import write_json


@dataclass(frozen=True)
class VAEConfig:
    channels: tuple = (128, 256, 512, 512)  # of each level, from full resolution down
    blocks: int = 2  # residual blocks of an encoder level; a decoder level has one more
    latent_channels: int = 16
    groups: int = 32  # of every GroupNorm
    scale: float = 1.5305  # latents handed out are (z - shift)·scale, about unit variance
    shift: float = 0.0609


SD3_VAE = VAEConfig()


class ResBlock(nn.Module):
    def __init__(self, c_in, c_out, groups):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, c_in, eps=1e-6)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, c_out, eps=1e-6)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        if c_in != c_out:
            self.nin_shortcut = nn.Conv2d(c_in, c_out, 1)

    def forward(self, x):  # [B,C_in,H,W] -> [B,C_out,H,W]
        y = self.conv1(F.silu(self.norm1(x)))
        y = self.conv2(F.silu(self.norm2(y)))
        return (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x) + y


class Attention(nn.Module):
    """One head over all positions of the coarsest level. The file keeps its projections as 1×1 convolutions."""

    def __init__(self, c, groups):
        super().__init__()
        self.norm = nn.GroupNorm(groups, c, eps=1e-6)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(c, c, 1) for _ in range(4))

    def forward(self, x):
        B, C, H, W = x.shape
        y = self.norm(x)
        q, k, v = (layer(y).flatten(2).transpose(1, 2)[:, None] for layer in (self.q, self.k, self.v))  # [B,1,HW,C]
        y = ops.attention(q, k, v)  # [B,HW,C]
        return x + self.proj_out(y.transpose(1, 2).reshape(B, C, H, W))


class Middle(nn.Module):
    def __init__(self, c, groups):
        super().__init__()
        self.block_1, self.attn_1 = ResBlock(c, c, groups), Attention(c, groups)
        self.block_2 = ResBlock(c, c, groups)

    def forward(self, x):
        return self.block_2(self.attn_1(self.block_1(x)))


class Downsample(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, stride=2)

    def forward(self, x):
        return self.conv(F.pad(x, (0, 1, 0, 1)))  # one row and column of zeros, at the far edges only


class Upsample(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, padding=1)

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """Residual blocks at one resolution, then perhaps a change of resolution."""

    def __init__(self, c_in, c_out, blocks, groups, downsample=False, upsample=False):
        super().__init__()
        self.block = nn.ModuleList(ResBlock(c_in if i == 0 else c_out, c_out, groups) for i in range(blocks))
        if downsample:
            self.downsample = Downsample(c_out)
        if upsample:
            self.upsample = Upsample(c_out)

    def forward(self, x):
        for block in self.block:
            x = block(x)
        if hasattr(self, "downsample"):
            x = self.downsample(x)
        return self.upsample(x) if hasattr(self, "upsample") else x


class Encoder(nn.Module):
    def __init__(self, config):
        super().__init__()
        chans, groups = config.channels, config.groups
        self.conv_in = nn.Conv2d(3, chans[0], 3, padding=1)
        self.down = nn.ModuleList(
            Level(chans[max(i - 1, 0)], chans[i], config.blocks, groups, downsample=i < len(chans) - 1)
            for i in range(len(chans)))
        self.mid = Middle(chans[-1], groups)
        self.norm_out = nn.GroupNorm(groups, chans[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(chans[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, x):  # [B,3,H,W] -> mean and log-variance [B,2·16,h,w]
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    def __init__(self, config):
        super().__init__()
        chans, groups, last = config.channels, config.groups, len(config.channels) - 1
        self.conv_in = nn.Conv2d(config.latent_channels, chans[-1], 3, padding=1)
        self.mid = Middle(chans[-1], groups)
        self.up = nn.ModuleList(  # numbered by resolution: up[0] is the finest and runs last
            Level(chans[min(i + 1, last)], chans[i], config.blocks + 1, groups, upsample=i > 0)
            for i in range(len(chans)))
        self.norm_out = nn.GroupNorm(groups, chans[0], eps=1e-6)
        self.conv_out = nn.Conv2d(chans[0], 3, 3, padding=1)

    def forward(self, z):  # [B,16,h,w] -> [B,3,H,W]
        x = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class VAE(nn.Module):
    def __init__(self, config=SD3_VAE):
        super().__init__()
        self.config = config
        self.encoder, self.decoder = Encoder(config), Decoder(config)

    @property
    def factor(self):
        """Pixels per latent cell along a side."""
        return 2 ** (len(self.config.channels) - 1)

    def moments(self, images):
        """Mean and log-variance [B,16,h,w] of the unscaled latent posterior."""
        mean, logvar = self.encoder(ops.for_convolutions(images)).chunk(2, dim=1)
        return mean, logvar.clamp(-30.0, 20.0)

    def encode(self, images, generator=None):
        """images [B,3,H,W] in -1..1 -> scaled latents [B,16,h,w]: the posterior mean, or a sample if given a generator."""
        if images.dim() != 4 or images.shape[1] != 3 or images.shape[2] % self.factor or images.shape[3] % self.factor:
            raise ValueError(f"images are {list(images.shape)}; expected [B, 3, H, W] with H and W multiples of "
                             f"{self.factor}")
        z, logvar = self.moments(images)
        if generator is not None:
            noise = torch.randn(z.shape, generator=generator, dtype=torch.float32, device=generator.device)
            z = z + torch.exp(0.5 * logvar) * noise.to(z)
        return (z - self.config.shift) * self.config.scale

    def decode(self, latents):
        """Scaled latents [B,16,h,w] -> images [B,3,8h,8w], nominally in -1..1."""
        return self.decoder(ops.for_convolutions(latents / self.config.scale + self.config.shift))

    # -- checkpoints ---------------------------------------------------------------------------------------------------

    def diffusers_views(self):
        """The diffusers layout: the decoder's levels counted from the coarse end, attention projections as matrices."""
        views, last = {}, len(self.config.channels) - 1
        for name, (tensor,) in weights.identity_views(self).items():
            side, *parts = name.split(".")
            if parts[0] in ("down", "up"):
                index = int(parts[1]) if parts[0] == "down" else last - int(parts[1])
                kind = {"block": f"resnets.{parts[3]}", "downsample": "downsamplers.0", "upsample": "upsamplers.0"}
                rest = parts[4:] if parts[2] == "block" else parts[3:]
                parts = [f"{parts[0]}_blocks.{index}", kind[parts[2]], *rest]
            elif parts[0] == "mid":
                block = {"block_1": "resnets.0", "attn_1": "attentions.0", "block_2": "resnets.1"}[parts[1]]
                if parts[1] == "attn_1":
                    inner = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
                    parts[2] = inner[parts[2]]
                    tensor = tensor.flatten(1) if tensor.dim() == 4 else tensor  # [C,C,1,1] -> [C,C]
                parts = ["mid_block", block, *parts[2:]]
            elif parts[0] == "norm_out":
                parts[0] = "conv_norm_out"
            views[".".join([side, *parts]).replace("nin_shortcut", "conv_shortcut")] = [tensor]
        return views

    @classmethod
    def from_pretrained(cls, source, device="cpu", dtype=None):
        """A diffusers folder or hub id (its `vae/`), or Stability's single file (`first_stage_model.*`)."""
        path = weights.find(source, "vae")
        if path.is_file():
            entries = weights.index(path, "first_stage_model.")
            make = functools.partial(cls, infer_config(entries, path))
            return weights.build(make, weights.identity_views, entries, path, device, dtype)
        make = functools.partial(cls, read_config(path))
        return weights.build(make, cls.diffusers_views, weights.index(path), path, device, dtype)

    def save_pretrained(self, folder, dtype=None):
        """Write the diffusers layout: config.json and diffusion_pytorch_model.safetensors."""
        c = self.config
        write_json(Path(folder) / "config.json", {
            "_class_name": "AutoencoderKL", "act_fn": "silu", "block_out_channels": list(c.channels), "in_channels": 3,
            "down_block_types": ["DownEncoderBlock2D"] * len(c.channels), "latent_channels": c.latent_channels,
            "up_block_types": ["UpDecoderBlock2D"] * len(c.channels), "layers_per_block": c.blocks, "out_channels": 3,
            "norm_num_groups": c.groups, "scaling_factor": c.scale, "shift_factor": c.shift, "force_upcast": True,
            "use_quant_conv": False, "use_post_quant_conv": False, "mid_block_add_attention": True})
        weights.save(Path(folder) / "diffusion_pytorch_model.safetensors", self.diffusers_views(), dtype)


def read_config(folder):
    """VAEConfig of a diffusers folder's config.json; refuses options that this file does not implement."""
    raw = weights.read_config(folder)
    try:
        if raw.get("use_quant_conv", True) or raw.get("use_post_quant_conv", True):
            raise ValueError("it has a quant_conv")
        return VAEConfig(tuple(raw["block_out_channels"]), raw["layers_per_block"], raw["latent_channels"],
                         raw.get("norm_num_groups", 32), raw["scaling_factor"], raw.get("shift_factor") or 0.0)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{folder}/config.json: not a configuration of SD3's autoencoder ({error}); give the "
                                      f"vae/ of an SD3 or SD3.5 checkpoint") from error


def infer_config(entries, path):
    """VAEConfig from tensor shapes, for files without a configuration; scale and shift are SD3's."""
    try:
        levels = 1 + max(int(name.split(".")[2]) for name in entries if name.startswith("encoder.down."))
        channels = tuple(entries[f"encoder.down.{i}.block.0.conv1.weight"].shape[0] for i in range(levels))
        blocks = 1 + max(int(name.split(".")[4]) for name in entries if name.startswith("encoder.down.0.block."))
        return VAEConfig(channels, blocks, entries["decoder.conv_in.weight"].shape[1])
    except (KeyError, ValueError, IndexError) as error:
        raise UserError(f"{path}: no SD3 autoencoder under first_stage_model.* ({error}); give "
                                      f"sd3.5_medium.safetensors or a diffusers folder") from error
