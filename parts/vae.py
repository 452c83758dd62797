"""The autoencoder of Stable Diffusion: 16 channels for SD3 (Esser et al. 2024), 4 before it.

It turns pictures into latents an eighth as high and wide, and back. Modules carry the tensor names
of Stability's single file (`first_stage_model.encoder.down.0.block.0.norm1.weight`);
parts/layouts.py maps the layout of diffusers (`vae/`) on them.

Shapes: B batch, C channels, H, W pixels, h = H/8, w = W/8 latent cells. Left out: tiling and
slicing, by which others decode very large pictures piece by piece.
"""

import functools
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn

from parts import layouts, ops, weights


@dataclass(frozen=True)
class VAEConfig:
    channels: tuple = (128, 256, 512, 512)  # of each level, from full resolution down
    blocks: int = 2  # residual blocks of an encoder level; a decoder level has one more
    latent_channels: int = 16
    groups: int = 32  # of every GroupNorm
    scale: float = 1.5305  # latents handed out are (z - shift)·scale, about unit variance
    shift: float = 0.0609
    quant_convs: bool = False  # 1×1 convolutions before and behind the latents, as before SD3


SD3_VAE = VAEConfig()


# --------------------------------------------------------------------------------------------------
# Blocks


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
        if hasattr(self, "nin_shortcut"):  # a sum needs as many channels on both sides
            x = self.nin_shortcut(x)
        return x + y


class Attention(nn.Module):
    """One head over all positions of the coarsest level.

    Stability's file keeps its projections as 1×1 convolutions, and so do we.
    """

    def __init__(self, c, groups):
        super().__init__()
        self.norm = nn.GroupNorm(groups, c, eps=1e-6)
        self.q = nn.Conv2d(c, c, 1)
        self.k = nn.Conv2d(c, c, 1)
        self.v = nn.Conv2d(c, c, 1)
        self.proj_out = nn.Conv2d(c, c, 1)

    def forward(self, x):
        y = self.norm(x)
        projected = (self.q(y), self.k(y), self.v(y))
        q, k, v = (z.flatten(2).transpose(1, 2)[:, None] for z in projected)  # each [B,1,HW,C]
        y = ops.attention(q, k, v)  # [B,HW,C]: every position attends to all others
        return x + self.proj_out(y.transpose(1, 2).reshape(x.shape))


class Middle(nn.Module):
    def __init__(self, c, groups):
        super().__init__()
        self.block_1 = ResBlock(c, c, groups)
        self.attn_1 = Attention(c, groups)
        self.block_2 = ResBlock(c, c, groups)

    def forward(self, x):
        return self.block_2(self.attn_1(self.block_1(x)))


class Downsample(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, stride=2)

    def forward(self, x):
        # One row and column of zeros at the far edges only; padding=1 would pad all four.
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, padding=1)

    def forward(self, x):
        # Nearest neighbours, then a convolution: a transposed one leaves a checkerboard.
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """Residual blocks at one resolution, then perhaps a change of resolution."""

    def __init__(self, c_in, c_out, blocks, groups, downsample=False, upsample=False):
        super().__init__()
        widths = [c_in] + [c_out] * blocks
        self.block = nn.ModuleList(ResBlock(*pair, groups) for pair in pairwise(widths))
        if downsample:
            self.downsample = Downsample(c_out)
        if upsample:
            self.upsample = Upsample(c_out)

    def forward(self, x):
        for block in self.block:
            x = block(x)
        if hasattr(self, "downsample"):
            x = self.downsample(x)
        if hasattr(self, "upsample"):
            x = self.upsample(x)
        return x


# --------------------------------------------------------------------------------------------------
# Model


class Encoder(nn.Module):
    def __init__(self, config):
        super().__init__()
        widths = config.channels
        groups = config.groups
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(3, widths[0], 3, padding=1)
        self.down = nn.ModuleList(  # down[0] is at full resolution, the last has no downsample
            Level(widths[max(i - 1, 0)], widths[i], config.blocks, groups, downsample=i < last)
            for i in range(len(widths)))
        self.mid = Middle(widths[-1], groups)
        self.norm_out = nn.GroupNorm(groups, widths[-1], eps=1e-6)
        # Twice the channels: a mean and a log-variance for each of the latent's.
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, x):  # [B,3,H,W] -> mean and log-variance [B,2·16,h,w]
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    def __init__(self, config):
        super().__init__()
        widths = config.channels
        groups = config.groups
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(config.latent_channels, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1], groups)
        self.up = nn.ModuleList(  # numbered by resolution: up[0] is the finest and runs last
            Level(widths[min(i + 1, last)], widths[i], config.blocks + 1, groups, upsample=i > 0)
            for i in range(len(widths)))
        self.norm_out = nn.GroupNorm(groups, widths[0], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, z):  # [B,16,h,w] -> [B,3,H,W]
        x = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class VAE(nn.Module):
    def __init__(self, config=SD3_VAE):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        if config.quant_convs:
            C = config.latent_channels
            self.quant_conv = nn.Conv2d(2 * C, 2 * C, 1)
            self.post_quant_conv = nn.Conv2d(C, C, 1)

    @property
    def factor(self):
        """Pixels per latent cell along a side: every level but the last halves the picture."""
        return 2 ** (len(self.config.channels) - 1)

    def moments(self, images):
        """Mean and log-variance [B,16,h,w] of the unscaled latent posterior."""
        z = self.encoder(ops.channels_last(images))
        if self.config.quant_convs:
            z = self.quant_conv(z)
        mean, logvar = z.chunk(2, dim=1)
        return mean, logvar.clamp(-30.0, 20.0)  # so that exp() of it stays finite

    def encode(self, images, generator=None):
        """images [B,3,H,W] in -1..1 -> scaled latents [B,16,h,w].

        They are the posterior's mean, or a sample if a generator is given. Raises ValueError.
        """
        fits = images.dim() == 4 and images.shape[1] == 3
        if not fits or images.shape[2] % self.factor or images.shape[3] % self.factor:
            raise ValueError(
                f"images are {list(images.shape)}; expected [B, 3, H, W] with H and W multiples "
                f"of {self.factor}")
        z, logvar = self.moments(images)
        if generator is not None:
            # float32 on the generator's own device: a seed means one picture on every device.
            noise = torch.randn(z.shape, generator=generator, device=generator.device)
            z = z + torch.exp(0.5 * logvar) * noise.to(z)
        return (z - self.config.shift) * self.config.scale

    def decode(self, latents):
        """Scaled latents [B,16,h,w] -> images [B,3,8h,8w], nominally in -1..1."""
        z = latents / self.config.scale + self.config.shift
        if self.config.quant_convs:
            z = self.post_quant_conv(z)
        return self.decoder(ops.channels_last(z))

    @torch.no_grad()
    def pictures(self, latents):
        """Pictures [B,3,8h,8w] uint8, on the CPU, of scaled latents [B,16,h,w] of any type."""
        weight = self.decoder.conv_in.weight
        # One picture at a time, because the decoder's maps at full resolution fill the memory.
        images = [self.decode(z[None].to(weight)) for z in latents]
        images = torch.cat(images).float()  # [B,3,8h,8w] in -1..1
        return ((images / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).cpu()

    @classmethod
    def from_pretrained(cls, source, device="cpu", dtype=None):
        """A diffusers folder or hub id (its `vae/`), or Stability's single file."""
        path = weights.find(source, "vae")
        if path.is_file():
            entries = weights.index(path, "first_stage_model.")
            views = weights.named_views
            fields = layouts.vae_fields_of_tensors(entries, path)
        else:
            entries = weights.renamed(weights.index(path), layouts.VAE_OLDER)
            views = layouts.vae_views
            fields = layouts.vae_fields(path)
        make = functools.partial(cls, VAEConfig(**fields))
        return weights.build(make, views, entries, path, device, dtype)
