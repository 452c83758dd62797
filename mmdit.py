"""MMDiT-X, the diffusion transformer of Stable Diffusion 3.5 (Esser et al. 2024, section 4).

It is the generator of EmoFeedback² and predicts the velocity of rectified flow. Two streams, image
("x") and text ("context"), have their own weights and meet in one joint attention per block. In the
first blocks of SD3.5-Medium the image stream has a second attention to itself. What time and the
pooled text say enters by adaLN: they shift, scale and gate every step of a block. Modules carry the
tensor names of Stability's single file; parts/layouts.py maps the layout of diffusers on them.

Shapes: B batch, C latent channels, h, w latent cells, p patch side, N = (h/p)(w/p) image tokens,
L text tokens, D width, H heads, E = D/H. Left out: control nets, skip-layer guidance.
"""

import functools
import math
from collections import namedtuple
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from parts import files, layouts, ops, weights

FREQUENCIES = 256  # of the sinusoidal timestep embedding


@dataclass(frozen=True)
class MMDiTConfig:
    depth: int = 24
    heads: int = 24
    head_dim: int = 64
    dual_blocks: tuple = tuple(range(13))  # whose image stream also attends to itself alone
    channels: int = 16
    patch: int = 2
    context_dim: int = 4096
    pooled_dim: int = 2048
    positions: int = 384  # side of the position table, in patches; a picture takes its centre
    qk_norm: bool = True
    sample_size: int = 128  # side of the latents it was trained for: 1024 pixels

    @property
    def width(self):
        return self.heads * self.head_dim


SD35_MEDIUM = MMDiTConfig()
SD35_LARGE = MMDiTConfig(depth=38, heads=38, dual_blocks=(), positions=192)


# --------------------------------------------------------------------------------------------------
# Operations, in their plain form; kernels/ has faster ones of the same names


@ops.fusable
def modulate(x, shift, scale, eps=1e-6):
    """adaLN: LayerNorm(x)·(1 + scale) + shift. x [B,L,D], shift and scale [B,D]."""
    normed = F.layer_norm(x, x.shape[-1:], eps=eps)  # without an affine part of its own
    return normed * (1 + scale[:, None]) + shift[:, None]


@ops.fusable
def gate_residual(x, branch, gate):
    """x + gate·branch. x and branch [B,L,D], gate [B,D]."""
    return x + gate[:, None] * branch


@ops.fusable
def gelu_linear(x, layer):
    """GELU (tanh form) of what a linear layer makes of x."""
    return F.gelu(layer(x), approximate="tanh")


@ops.fusable
def joint_qkv(context, x, num_heads, context_norms, x_norms, eps=1e-6):
    """`ops.split_qkv` of two streams [B,L,3D] and [B,N,3D], text first: q, k, v [B,H,L+N,E].

    context_norms, x_norms: (weight of q, weight of k), each [E] or None.
    """
    text = ops.split_qkv(context, num_heads, *context_norms, eps)
    image = ops.split_qkv(x, num_heads, *x_norms, eps)
    return tuple(torch.cat(pair, dim=2) for pair in zip(text, image, strict=True))


# --------------------------------------------------------------------------------------------------
# Embeddings


class PatchEmbed(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.proj = nn.Conv2d(c.channels, c.width, c.patch, stride=c.patch)

    def forward(self, latents):  # [B,C,h,w] -> [B,N,D]
        x = self.proj(latents).flatten(2).transpose(1, 2)
        return x.contiguous()  # every later pass keeps this layout and is faster for it


class Embedder(nn.Module):
    """Two linear layers with SiLU between, for the timestep's sinusoids and the pooled text."""

    def __init__(self, c_in, width):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(c_in, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, x):
        return self.mlp(x)


def sinusoids(timestep, width=FREQUENCIES):
    """timestep [B] in 0..1000 -> [B,width] float32: cosines, then sines, of spaced frequencies."""
    half = width // 2
    steps = torch.arange(half, dtype=torch.float32, device=timestep.device)
    frequencies = torch.exp(-math.log(10_000) * steps / half)
    angles = timestep.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


# --------------------------------------------------------------------------------------------------
# One block


# The adaLN vectors [B,D] of one stream in one block, in the order of the file's rows. A stream that
# is only read has the first two, one without a second attention the first six.
VECTORS = ("attn_shift", "attn_scale", "attn_gate", "mlp_shift", "mlp_scale", "mlp_gate",
           "attn2_shift", "attn2_scale", "attn2_gate")
Modulation = namedtuple("Modulation", VECTORS, defaults=[None] * len(VECTORS))


class Mlp(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x):
        return self.fc2(gelu_linear(x, self.fc1))


class Attention(nn.Module):
    """The projections of one stream; the attention over both streams is in `JointBlock`."""

    def __init__(self, c, has_output=True):
        super().__init__()
        self.qkv = nn.Linear(c.width, 3 * c.width)
        if has_output:
            self.proj = nn.Linear(c.width, c.width)
        self.heads = c.heads
        if c.qk_norm:  # applied as the heads are split
            self.ln_q = ops.RMSNorm(c.head_dim)
            self.ln_k = ops.RMSNorm(c.head_dim)

    def norms(self):
        return (self.ln_q.weight, self.ln_k.weight) if hasattr(self, "ln_q") else (None, None)

    def forward(self, x):  # [B,L,D] -> [B,L,D]: the stream attends to itself
        q, k, v = ops.split_qkv(self.qkv(x), self.heads, *self.norms())  # each [B,H,L,E]
        return self.proj(ops.attention(q, k, v))


class Stream(nn.Module):
    """Attention projections, MLP and modulation of one stream in one block.

    read_only: the last block's text, which gives keys and values and is not written again.
    """

    def __init__(self, c, dual=False, read_only=False):
        super().__init__()
        self.dual = dual
        self.read_only = read_only
        self.attn = Attention(c, has_output=not read_only)
        if dual:
            self.attn2 = Attention(c)
        if not read_only:
            self.mlp = Mlp(c.width)
        self.vectors = 2 if read_only else 9 if dual else 6
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(c.width, self.vectors * c.width))

    def modulation(self, cond):  # [B,D] -> Modulation of vectors [B,D]
        return Modulation(*self.adaLN_modulation(cond).chunk(self.vectors, dim=-1))

    def after_attention(self, x, attended, mod):
        """What follows the joint attention: its gated output, then the MLP. All [B,L,D]."""
        branch = self.attn.proj(attended)
        if self.dual:  # the second attention reads the same x as the first
            alone = self.attn2(modulate(x, mod.attn2_shift, mod.attn2_scale))
        x = gate_residual(x, branch, mod.attn_gate)
        if self.dual:
            x = gate_residual(x, alone, mod.attn2_gate)
        return gate_residual(x, self.mlp(modulate(x, mod.mlp_shift, mod.mlp_scale)), mod.mlp_gate)


class JointBlock(nn.Module):
    def __init__(self, c, dual, last):
        super().__init__()
        self.context_block = Stream(c, read_only=last)
        self.x_block = Stream(c, dual)

    def forward(self, x, context, cond):
        """x [B,N,D], context [B,L,D], cond [B,D] -> x and context, which is None after the last."""
        L = context.shape[1]
        mod_x = self.x_block.modulation(cond)
        mod_c = self.context_block.modulation(cond)
        # Joint attention goes over the tokens of both streams, text first.
        qkv_c = self.context_block.attn.qkv(modulate(context, mod_c.attn_shift, mod_c.attn_scale))
        qkv_x = self.x_block.attn.qkv(modulate(x, mod_x.attn_shift, mod_x.attn_scale))
        norms = self.context_block.attn.norms(), self.x_block.attn.norms()
        q, k, v = joint_qkv(qkv_c, qkv_x, self.x_block.attn.heads, *norms)  # [B,H,L+N,E]
        if self.context_block.read_only:  # no query of the text is needed
            attended = ops.attention(q[:, :, L:], k, v)
            return self.x_block.after_attention(x, attended, mod_x), None
        attended_c, attended_x = ops.attention(q, k, v).split([L, x.shape[1]], dim=1)
        x = self.x_block.after_attention(x, attended_x, mod_x)
        return x, self.context_block.after_attention(context, attended_c, mod_c)


class FinalLayer(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.linear = nn.Linear(c.width, c.patch**2 * c.channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(c.width, 2 * c.width))

    def forward(self, x, cond):  # [B,N,D], [B,D] -> [B,N,p·p·C]
        shift, scale = self.adaLN_modulation(cond).chunk(2, dim=-1)
        return self.linear(modulate(x, shift, scale))


class MMDiT(nn.Module):
    def __init__(self, config=SD35_MEDIUM):
        super().__init__()
        c = self.config = config
        self.register_buffer("pos_embed", torch.empty(1, c.positions**2, c.width))
        self.x_embedder = PatchEmbed(c)
        self.t_embedder = Embedder(FREQUENCIES, c.width)
        self.y_embedder = Embedder(c.pooled_dim, c.width)
        self.context_embedder = nn.Linear(c.context_dim, c.width)
        blocks = [JointBlock(c, i in c.dual_blocks, last=i == c.depth - 1) for i in range(c.depth)]
        self.joint_blocks = nn.ModuleList(blocks)
        self.final_layer = FinalLayer(c)
        self.checkpointing = False  # recompute the blocks in the backward pass

    def forward(self, latents, timestep, context, pooled):
        """Velocity noise − data [B,C,h,w] at `latents` [B,C,h,w].

        timestep [B] in 0..1000 (1000·σ), context [B,L,context_dim], pooled [B,pooled_dim]. Raises
        ValueError for a size the position table cannot hold.
        """
        B, C, h, w = latents.shape
        p = self.config.patch
        if h % p or w % p or max(h, w) > self.config.positions * p:
            raise ValueError(f"latents are {h}×{w}; both sides must be multiples of {p} and at "
                             f"most {self.config.positions * p}")
        rows, cols = h // p, w // p
        x = self.x_embedder(latents) + self.positions(rows, cols)  # [B,N,D]
        cond = self.t_embedder(sinusoids(timestep).to(x.dtype)) + self.y_embedder(pooled)  # [B,D]
        context = self.context_embedder(context)  # [B,L,D]
        for block in self.joint_blocks:
            if self.checkpointing and torch.is_grad_enabled():
                x, context = checkpoint(block, x, context, cond, use_reentrant=False)
            else:
                x, context = block(x, context, cond)
        x = self.final_layer(x, cond).view(B, rows, cols, p, p, C)
        return x.permute(0, 5, 1, 3, 2, 4).reshape(B, C, h, w)  # from [B,C,rows,p,cols,p]

    def positions(self, rows, cols):
        """The centre of the position table, [1, rows·cols, D]."""
        side = self.config.positions
        top = (side - rows) // 2
        left = (side - cols) // 2
        table = self.pos_embed.view(1, side, side, -1)[:, top:top + rows, left:left + cols]
        return table.reshape(1, rows * cols, -1)

    def lora_targets(self, dual=False):
        """{module path: {peft's name: rows}} of attention projections; see parts/layouts.py."""
        return layouts.mmdit_lora_targets(self, dual)

    @classmethod
    def from_pretrained(cls, source, device="cpu", dtype=None):
        """A diffusers folder or hub id (its `transformer/`), or Stability's single file.

        Raises UserError that lists all that does not fit.
        """
        path = weights.find(source, "transformer")
        if path.is_file():
            entries = weights.index(path, "model.diffusion_model.")
            views = weights.named_views
            fields = layouts.mmdit_fields_of_tensors(entries, path)
        else:
            entries = weights.index(path)
            views = layouts.mmdit_views
            fields = layouts.mmdit_fields(path, len(entries))
        make = functools.partial(cls, MMDiTConfig(**fields))
        return weights.build(make, views, entries, path, device, dtype)

    def save_pretrained(self, folder, dtype=None):
        """Write the diffusers layout: config.json and diffusion_pytorch_model.safetensors."""
        files.write_json(Path(folder) / "config.json", layouts.mmdit_json(self.config))
        path = Path(folder) / "diffusion_pytorch_model.safetensors"
        weights.save(path, layouts.mmdit_views(self), dtype)
