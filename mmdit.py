"""MMDiT-X, the diffusion transformer of Stable Diffusion 3.5 (Esser et al. 2024, section 4; the generator of EmoFeedback²).

Two streams, image ("x") and text ("context"), have their own weights and meet in one joint attention per block. In the
first blocks of SD3.5-Medium the image stream has a second attention to itself. It predicts the velocity of rectified
flow. Modules carry the tensor names of Stability's single file (`stability_views` has the one exception);
`diffusers_views` maps the diffusers layout on them.

Shapes: B batch, C latent channels, h, w latent cells, p patch side, N = (h/p)(w/p) image tokens, L text tokens,
D width, H heads, E = D/H. Left out: control nets, skip-layer guidance.
"""

import functools
import math
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from parts import ops, weights
from parts.cli import UserError
from parts.files import write_json

FREQUENCIES = 256  # of the sinusoidal timestep embedding


@dataclass(frozen=True)
class MMDiTConfig:
    depth: int = 24
    heads: int = 24
    head_dim: int = 64
    dual_blocks: tuple = tuple(range(13))  # blocks whose image stream also attends to itself alone
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


class PatchEmbed(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.proj = nn.Conv2d(c.channels, c.width, c.patch, stride=c.patch)

    def forward(self, latents):  # [B,C,h,w] -> [B,N,D]
        return self.proj(latents).flatten(2).transpose(1, 2).contiguous()  # every later pass keeps the layout


class Embedder(nn.Module):
    """Two linear layers with SiLU between, for the timestep's sinusoids and for the pooled text."""

    def __init__(self, c_in, width):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(c_in, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, x):
        return self.mlp(x)


class Mlp(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        return self.fc2(ops.gelu_linear(self.fc1, x))


class Attention(nn.Module):
    """The projections of one stream; the attention over both streams is in `JointBlock`."""

    def __init__(self, c, has_output=True):
        super().__init__()
        self.qkv = nn.Linear(c.width, 3 * c.width)
        if has_output:
            self.proj = nn.Linear(c.width, c.width)
        self.heads = c.heads
        if c.qk_norm:
            self.ln_q, self.ln_k = ops.RMSNorm(c.head_dim), ops.RMSNorm(c.head_dim)  # applied as heads are split

    def norms(self):
        return (self.ln_q.weight, self.ln_k.weight) if hasattr(self, "ln_q") else (None, None)

    def forward(self, x):  # [B,L,D] -> [B,L,D]: the stream attends to itself
        return self.proj(ops.attention(*ops.split_qkv(self.qkv(x), self.heads, *self.norms())))


class Stream(nn.Module):
    """The attention projections and the MLP of one stream in one block.

    Its modulation vectors are, in the file's order: shift, scale, gate of the attention; shift, scale, gate of the MLP;
    shift, scale, gate of the second attention (dual). The last text stream is only read (shift and scale alone).
    """

    def __init__(self, c, dual=False, read_only=False):
        super().__init__()
        self.vectors = 2 if read_only else 9 if dual else 6
        self.attn = Attention(c, has_output=not read_only)
        if dual:
            self.attn2 = Attention(c)
        if not read_only:
            self.mlp = Mlp(c.width)


class JointBlock(nn.Module):
    def __init__(self, c, dual, last):
        super().__init__()
        self.context_block = Stream(c, read_only=last)
        self.x_block = Stream(c, dual)

    def forward(self, x, context, *vectors):
        """x [B,N,D], context [B,L,D], modulation vectors [B,D] of both -> x and context, which is None after the last."""
        sx, sc = self.x_block, self.context_block
        mx, mc = vectors[:sx.vectors], vectors[sx.vectors:]
        L = context.shape[1]
        # joint attention over the tokens of both streams, text first
        qkv_c = sc.attn.qkv(ops.modulate(context, mc[0], mc[1]))
        qkv_x = sx.attn.qkv(ops.modulate(x, mx[0], mx[1]))
        q, k, v = ops.joint_qkv(qkv_c, qkv_x, sx.attn.heads, sc.attn.norms(), sx.attn.norms())  # [B,H,L+N,E]
        if sc.vectors == 2:  # the last block's text output is not used
            out_c, out_x = None, ops.attention(q[:, :, L:], k, v)
        else:
            out_c, out_x = ops.attention(q, k, v).split([L, x.shape[1]], dim=1)
        if sx.vectors == 9:  # dual attention reads the same x as the joint one
            alone = sx.attn2(ops.modulate(x, mx[6], mx[7]))
            x = ops.gate_residual(x, sx.attn.proj(out_x), mx[2])
            x = ops.gate_residual(x, alone, mx[8])
        else:
            x = ops.gate_residual(x, sx.attn.proj(out_x), mx[2])
        x = ops.gate_residual(x, sx.mlp(ops.modulate(x, mx[3], mx[4])), mx[5])
        if out_c is None:
            return x, None
        context = ops.gate_residual(context, sc.attn.proj(out_c), mc[2])
        context = ops.gate_residual(context, sc.mlp(ops.modulate(context, mc[3], mc[4])), mc[5])
        return x, context


class FinalLayer(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.vectors = 2  # shift, scale
        self.linear = nn.Linear(c.width, c.patch**2 * c.channels)

    def forward(self, x, shift, scale):  # [B,N,D] -> [B,N,p·p·C]
        return self.linear(ops.modulate(x, shift, scale))


class MMDiT(nn.Module):
    def __init__(self, config=SD35_MEDIUM):
        super().__init__()
        c = self.config = config
        self.register_buffer("pos_embed", torch.empty(1, c.positions**2, c.width))
        self.x_embedder = PatchEmbed(c)
        self.t_embedder = Embedder(FREQUENCIES, c.width)
        self.y_embedder = Embedder(c.pooled_dim, c.width)
        self.context_embedder = nn.Linear(c.context_dim, c.width)
        self.joint_blocks = nn.ModuleList(
            JointBlock(c, dual=i in c.dual_blocks, last=i == c.depth - 1) for i in range(c.depth))
        self.final_layer = FinalLayer(c)
        self.modulation = nn.Linear(c.width, sum(n for _, n in self.modulated()) * c.width)  # of all blocks at once
        self.checkpointing = False  # recompute the blocks in the backward pass

    def forward(self, latents, timestep, context, pooled):
        """Velocity noise − data [B,C,h,w] at `latents` [B,C,h,w].

        timestep [B] in 0..1000 (1000·σ), context [B,L,context_dim], pooled [B,pooled_dim]. Raises ValueError for a size
        the position table cannot hold.
        """
        c, (B, C, h, w) = self.config, latents.shape
        if h % c.patch or w % c.patch or max(h, w) > c.positions * c.patch:
            raise ValueError(f"latents are {h}×{w}; both sides must be multiples of {c.patch} and at most "
                             f"{c.positions * c.patch}")
        rows, cols = h // c.patch, w // c.patch
        x = self.x_embedder(latents) + self.positions(rows, cols)  # [B,N,D]
        cond = self.t_embedder(sinusoids(timestep).to(x.dtype)) + self.y_embedder(pooled)  # [B,D]
        vectors = iter(self.modulation(F.silu(cond)).split(c.width, dim=-1))  # each [B,D]
        context = self.context_embedder(context)  # [B,L,D]
        for block in self.joint_blocks:
            own = islice(vectors, block.x_block.vectors + block.context_block.vectors)
            if self.checkpointing and torch.is_grad_enabled():
                x, context = checkpoint(block, x, context, *own, use_reentrant=False)
            else:
                x, context = block(x, context, *own)
        x = self.final_layer(x, *vectors).view(B, rows, cols, c.patch, c.patch, C)
        return x.permute(0, 5, 1, 3, 2, 4).reshape(B, C, h, w)  # [B,C,rows,p,cols,p]

    def compile_blocks(self):
        """Have torch.compile fuse the plain forms of each block, in place of the kernels: a minute at the first step."""
        for block in self.joint_blocks:
            block.compile()

    def modulated(self):
        """(module path, its number of vectors) of all that is modulated, in the order of `modulation`'s rows."""
        for i, block in enumerate(self.joint_blocks):
            yield f"joint_blocks.{i}.x_block", block.x_block.vectors
            yield f"joint_blocks.{i}.context_block", block.context_block.vectors
        yield "final_layer", self.final_layer.vectors

    def positions(self, rows, cols):
        """The centre of the position table, [1, rows·cols, D]."""
        side = self.config.positions
        top, left = (side - rows) // 2, (side - cols) // 2
        table = self.pos_embed.view(1, side, side, -1)[:, top:top + rows, left:left + cols]
        return table.reshape(1, rows * cols, -1)

    def initialise(self):
        """Random weights to train from: zero gates and output (adaLN-zero), so that every block starts as identity."""
        c = self.config
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.xavier_uniform_(module.weight.flatten(1))  # a patch is one long input
                nn.init.zeros_(module.bias)
            elif isinstance(module, ops.RMSNorm):
                nn.init.ones_(module.weight)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.final_layer.linear.weight)
        self.pos_embed.copy_(position_table(c.width, c.positions, c.sample_size // c.patch))
        return self

    def lora_targets(self):
        """{module path: {peft's name: rows}} of all attention projections: both streams and the dual attention."""
        targets, D = {}, self.config.width
        for i, block in enumerate(self.joint_blocks):
            at, places = f"transformer_blocks.{i}.", [
                ("x_block.attn", "attn", ("to_q", "to_k", "to_v"), "to_out.0"),
                ("context_block.attn", "attn", ("add_q_proj", "add_k_proj", "add_v_proj"), "to_add_out"),
                ("x_block.attn2", "attn2", ("to_q", "to_k", "to_v"), "to_out.0")]
            for path, theirs, inputs, output in places:
                parent, name = path.split(".")
                module = getattr(getattr(block, parent), name, None)
                if module is None:
                    continue
                path = f"joint_blocks.{i}.{path}"
                targets[f"{path}.qkv"] = {f"{at}{theirs}.{n}": D for n in inputs}
                if hasattr(module, "proj"):
                    targets[f"{path}.proj"] = {f"{at}{theirs}.{output}": D}
        return targets

    # -- checkpoints ---------------------------------------------------------------------------------------------------

    def modulation_views(self):
        """{module path: {"weight" or "bias": its rows of `modulation`}}."""
        rows = [n * self.config.width for _, n in self.modulated()]
        parts = zip(self.modulation.weight.split(rows), self.modulation.bias.split(rows), strict=True)
        return {path: {"weight": w, "bias": b} for (path, _), (w, b) in zip(self.modulated(), parts, strict=True)}

    def stability_views(self):
        """The names of Stability's single file, which are the modules' own but for the modulations, one for each stream."""
        views = {name: view for name, view in weights.identity_views(self).items() if not name.startswith("modulation.")}
        for path, parts in self.modulation_views().items():
            views |= {f"{path}.adaLN_modulation.1.{kind}": [rows] for kind, rows in parts.items()}
        return views

    def diffusers_views(self):
        """The diffusers layout of `transformer/`: separate q, k, v; scale before shift in the two final modulations."""
        views, modulations = {}, self.modulation_views()

        def linear(theirs, module):
            views.update(weights.affine_views(theirs, module))

        def modulation(theirs, path, swapped=False):  # ours: shift, scale; theirs, if swapped: scale, shift
            for kind, rows in modulations[path].items():
                views[f"{theirs}.{kind}"] = list(reversed(weights.split_rows(rows, 2))) if swapped else [rows]

        def attention(module, names, output, norms):
            for kind in ("weight", "bias"):
                for name, rows in zip(names, weights.split_rows(getattr(module.qkv, kind), 3), strict=True):
                    views[f"{name}.{kind}"] = [rows]
            if hasattr(module, "proj"):
                linear(output, module.proj)
            if hasattr(module, "ln_q"):
                views[f"{norms[0]}.weight"], views[f"{norms[1]}.weight"] = [module.ln_q.weight], [module.ln_k.weight]

        views["pos_embed.pos_embed"] = [self.pos_embed]
        linear("pos_embed.proj", self.x_embedder.proj)
        for theirs, module in (("timestep_embedder", self.t_embedder), ("text_embedder", self.y_embedder)):
            linear(f"time_text_embed.{theirs}.linear_1", module.mlp[0])
            linear(f"time_text_embed.{theirs}.linear_2", module.mlp[2])
        linear("context_embedder", self.context_embedder)
        for i, block in enumerate(self.joint_blocks):
            at, x, context = f"transformer_blocks.{i}", block.x_block, block.context_block
            modulation(f"{at}.norm1.linear", f"joint_blocks.{i}.x_block")
            modulation(f"{at}.norm1_context.linear", f"joint_blocks.{i}.context_block", swapped=context.vectors == 2)
            attention(x.attn, [f"{at}.attn.to_{n}" for n in "qkv"], f"{at}.attn.to_out.0",
                      [f"{at}.attn.norm_q", f"{at}.attn.norm_k"])
            attention(context.attn, [f"{at}.attn.add_{n}_proj" for n in "qkv"], f"{at}.attn.to_add_out",
                      [f"{at}.attn.norm_added_q", f"{at}.attn.norm_added_k"])
            if hasattr(x, "attn2"):
                attention(x.attn2, [f"{at}.attn2.to_{n}" for n in "qkv"], f"{at}.attn2.to_out.0",
                          [f"{at}.attn2.norm_q", f"{at}.attn2.norm_k"])
            for theirs, stream in (("ff", x), ("ff_context", context)):
                if hasattr(stream, "mlp"):
                    linear(f"{at}.{theirs}.net.0.proj", stream.mlp.fc1)
                    linear(f"{at}.{theirs}.net.2", stream.mlp.fc2)
        modulation("norm_out.linear", "final_layer", swapped=True)
        linear("proj_out", self.final_layer.linear)
        return views

    @classmethod
    def from_pretrained(cls, source, device="cpu", dtype=None):
        """A diffusers folder or hub id (its `transformer/`), or Stability's single file (`model.diffusion_model.*`)."""
        path = weights.find(source, "transformer")
        if path.is_file():
            entries = weights.index(path, "model.diffusion_model.")
            make = functools.partial(cls, infer_config(entries, path))
            return weights.build(make, cls.stability_views, entries, path, device, dtype)
        make = functools.partial(cls, read_config(path))
        return weights.build(make, cls.diffusers_views, weights.index(path), path, device, dtype)

    def save_pretrained(self, folder, dtype=None):
        """Write the diffusers layout: config.json and diffusion_pytorch_model.safetensors."""
        c = self.config
        write_json(Path(folder) / "config.json", {
            "_class_name": "SD3Transformer2DModel", "sample_size": c.sample_size, "patch_size": c.patch,
            "in_channels": c.channels, "out_channels": c.channels, "num_layers": c.depth, "num_attention_heads": c.heads,
            "attention_head_dim": c.head_dim, "joint_attention_dim": c.context_dim, "caption_projection_dim": c.width,
            "pooled_projection_dim": c.pooled_dim, "pos_embed_max_size": c.positions,
            "dual_attention_layers": list(c.dual_blocks), "qk_norm": "rms_norm" if c.qk_norm else None})
        weights.save(Path(folder) / "diffusion_pytorch_model.safetensors", self.diffusers_views(), dtype)


def sinusoids(timestep):
    """timestep [B] in 0..1000 -> [B,256] float32: cosines, then sines, of geometrically spaced frequencies."""
    half = FREQUENCIES // 2
    frequencies = torch.exp(-math.log(10_000) * torch.arange(half, dtype=torch.float32, device=timestep.device) / half)
    angles = timestep.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def position_table(width, side, base):
    """The sinusoidal table [1, side², D] that a new model starts with; one step is base/side of a cell.

    The first half of the channels encodes the column, the second the row; sines before cosines (as in MAE).
    """
    frequencies = 1.0 / 10_000 ** (torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angles = torch.outer(torch.arange(side, dtype=torch.float64) * base / side, frequencies)  # [side, D/4]
    wave = torch.cat([angles.sin(), angles.cos()], dim=-1).float()  # [side, D/2]
    table = torch.cat([wave[None].expand(side, -1, -1), wave[:, None].expand(-1, side, -1)], dim=-1)
    return table.reshape(1, side * side, width)


def read_config(folder):
    """MMDiTConfig of a diffusers folder's config.json."""
    raw = weights.read_config(folder)
    try:
        if raw.get("qk_norm") not in (None, "rms_norm"):
            raise ValueError(f"qk_norm {raw['qk_norm']!r} is not supported")
        return MMDiTConfig(
            raw["num_layers"], raw["num_attention_heads"], raw["attention_head_dim"],
            tuple(raw.get("dual_attention_layers") or ()), raw["in_channels"], raw["patch_size"],
            raw["joint_attention_dim"], raw["pooled_projection_dim"], raw["pos_embed_max_size"],
            raw.get("qk_norm") == "rms_norm", raw["sample_size"])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{folder}/config.json: not a configuration of SD3.5's transformer ({error}); "
                                      f"give the folder of an SD3.5 checkpoint") from error


def infer_config(entries, path):
    """MMDiTConfig from tensor shapes, for a single file, which has no configuration."""
    try:
        blocks = [name.split(".") for name in entries if name.startswith("joint_blocks.")]
        width, channels, patch, _ = entries["x_embedder.proj.weight"].shape
        qk_norm = "joint_blocks.0.x_block.attn.ln_q.weight" in entries
        head_dim = entries["joint_blocks.0.x_block.attn.ln_q.weight"].shape[0] if qk_norm else 64
        return MMDiTConfig(
            depth=1 + max(int(parts[1]) for parts in blocks), heads=width // head_dim, head_dim=head_dim,
            dual_blocks=tuple(sorted({int(parts[1]) for parts in blocks if parts[3] == "attn2"})),
            channels=channels, patch=patch, context_dim=entries["context_embedder.weight"].shape[1],
            pooled_dim=entries["y_embedder.mlp.0.weight"].shape[1], qk_norm=qk_norm,
            positions=math.isqrt(entries["pos_embed"].shape[1]))
    except (KeyError, ValueError, IndexError) as error:
        raise UserError(f"{path}: no SD3.5 transformer under model.diffusion_model.* (looking for {error})"
                                      f"; give sd3.5_medium.safetensors or a diffusers folder") from error
