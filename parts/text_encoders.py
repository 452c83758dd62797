"""The three text encoders of Stable Diffusion 3.5 and their tokenizers, joined for the MMDiT.

Each prompt becomes a sequence of 77 CLIP tokens (CLIP-L's hidden states beside OpenCLIP-bigG's,
padded with zeros to T5's width) followed by T T5 tokens, and one pooled vector (CLIP-L's beside
bigG's) (Esser et al. 2024, section 4). T5 may be left out: zeros stand in its place, as in
training, where it is dropped at random.

Shapes: B batch, L CLIP tokens (77), T T5 tokens (256), D width of a tower, H heads, C context
width (4096).
"""

import functools
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from parts import clip, layouts, ops, weights
from parts.cli import UserError

T5_TOKENS = 256  # of SD3.5's pipeline


# --------------------------------------------------------------------------------------------------
# T5's encoder (Raffel et al. 2020, version 1.1)


@dataclass(frozen=True)
class T5Config:
    d_model: int = 4096
    num_layers: int = 24
    num_heads: int = 64
    d_kv: int = 64  # channels of a head
    d_ff: int = 10_240
    vocab_size: int = 32_128
    relative_attention_num_buckets: int = 32  # of distance, half of them for each direction
    relative_attention_max_distance: int = 128  # from where on all share the last bucket
    layer_norm_epsilon: float = 1e-6


T5_XXL = T5Config()
T5_FUSED = {"qkv": ("q", "k", "v"), "wi": ("wi_0", "wi_1")}
T5_NAMES = (  # (ours, published)
    (r"^blocks\.(\d+)\.attn_norm\.", r"encoder.block.\1.layer.0.layer_norm."),
    (r"^blocks\.(\d+)\.([qkvo])\.", r"encoder.block.\1.layer.0.SelfAttention.\2."),
    (r"^blocks\.(\d+)\.mlp_norm\.", r"encoder.block.\1.layer.1.layer_norm."),
    (r"^blocks\.(\d+)\.(w\w+)\.", r"encoder.block.\1.layer.1.DenseReluDense.\2."),
    (r"^relative_attention", "encoder.block.0.layer.0.SelfAttention.relative_attention"),
    (r"^final_layer_norm\.", "encoder.final_layer_norm."),
)


class T5Block(nn.Module):
    def __init__(self, c):
        super().__init__()
        inner = c.num_heads * c.d_kv
        self.heads = c.num_heads
        self.attn_norm = ops.RMSNorm(c.d_model, c.layer_norm_epsilon)
        self.mlp_norm = ops.RMSNorm(c.d_model, c.layer_norm_epsilon)
        self.qkv = nn.Linear(c.d_model, 3 * inner, bias=False)
        self.o = nn.Linear(inner, c.d_model, bias=False)
        self.wi = nn.Linear(c.d_model, 2 * c.d_ff, bias=False)  # the gate's half, then the other
        self.wo = nn.Linear(c.d_ff, c.d_model, bias=False)

    def forward(self, x, bias):  # x [B,T,D], bias [1,H,T,T]
        q, k, v = ops.split_qkv(self.qkv(self.attn_norm(x)), self.heads)  # each [B,H,T,E]
        x = x + self.o(ops.attention(q, k, v, mask=bias, scale=1.0))  # T5 does not scale its scores
        gate, up = self.wi(self.mlp_norm(x)).chunk(2, dim=-1)
        return x + self.wo(F.gelu(gate, approximate="tanh") * up)


class T5Encoder(nn.Module):
    def __init__(self, config=T5_XXL):
        super().__init__()
        c = self.config = config
        self.shared = nn.Embedding(c.vocab_size, c.d_model)
        self.relative_attention_bias = nn.Embedding(c.relative_attention_num_buckets, c.num_heads)
        self.blocks = nn.ModuleList(T5Block(c) for _ in range(c.num_layers))
        self.final_layer_norm = ops.RMSNorm(c.d_model, c.layer_norm_epsilon)

    def forward(self, ids):
        """ids [B,T] -> hidden states [B,T,D]. No mask: SD3.5 lets tokens attend to the padding."""
        x = self.shared(ids)  # [B,T,D]
        position = torch.arange(ids.shape[1], device=ids.device)
        bucket = distance_bucket(position[None, :] - position[:, None], self.config)  # [T,T]
        bias = self.relative_attention_bias(bucket).permute(2, 0, 1)[None]  # [1,H,T,T]
        for block in self.blocks:  # the first block's bias serves all
            x = block(x, bias)
        return self.final_layer_norm(x)

    def views(self):
        """Names of transformers' T5EncoderModel."""
        return weights.renamed(weights.named_views(self, T5_FUSED), T5_NAMES)

    @classmethod
    def from_pretrained(cls, source, device="cpu", dtype=None, component=None):
        """A folder or hub id with T5EncoderModel. Raises UserError.

        component: its folder in a whole pipeline, e.g. `text_encoder_3`.
        """
        path = weights.find(source, component)
        entries = weights.index(path)
        raw = weights.read_config(path / "config.json", len(entries))
        if raw.get("feed_forward_proj") != "gated-gelu":
            raise UserError(
                f"{path}/config.json: not T5 version 1.1, whose feed_forward_proj is gated-gelu; "
                f"give an SD3.5 text_encoder_3/ folder")
        config = weights.fields_of(T5Config, raw)
        if config.relative_attention_max_distance <= config.relative_attention_num_buckets // 4:
            raise UserError(f"{path}/config.json: relative_attention_max_distance is too small for "
                            f"its relative_attention_num_buckets; download it again")
        make = functools.partial(cls, config)
        tied = "encoder.embed_tokens.weight"  # a second name of the same table
        if "shared.weight" not in entries and tied in entries:
            entries["shared.weight"] = entries.pop(tied)
        return weights.build(make, cls.views, entries, path, device, dtype, optional=(tied,))


def distance_bucket(offset, c):
    """Bucket of each key − query offset.

    Small distances have one each; the others share, on a logarithmic scale up to the greatest.
    """
    half = c.relative_attention_num_buckets // 2
    exact = half // 2
    far = offset.abs()
    span = math.log(c.relative_attention_max_distance / exact)
    ratio = torch.log(far.clamp(min=1).float() / exact) / span
    logarithmic = (exact + (ratio * (half - exact)).long()).clamp(max=half - 1)
    return torch.where(far < exact, far, logarithmic) + half * (offset > 0)


# --------------------------------------------------------------------------------------------------
# The three together


def has_t5(index):
    """Whether a pipeline's model_index.json lists T5."""
    listed = index.get("text_encoder_3")
    return isinstance(listed, list) and listed[:1] not in ([], [None])


class TextEncoders:
    """Not a module: three frozen encoders that may live on another device than the MMDiT."""

    def __init__(self, clip_l, clip_g, t5, tokenizers, context_width=4096, t5_tokens=T5_TOKENS):
        """tokenizers: of CLIP-L, bigG and T5. t5 None: t5_tokens rows of zeros in its place."""
        self.clip_l = clip_l
        self.clip_g = clip_g
        self.t5 = t5
        self.tokenizers = tokenizers
        self.context_width = context_width
        self.t5_tokens = t5_tokens

    def towers(self):
        """The models of the three."""
        return [tower for tower in (self.clip_l, self.clip_g, self.t5) if tower is not None]

    @torch.no_grad()
    def encode(self, prompts):
        """list of B strings -> (context [B, 77 + T, 4096], pooled [B, 2048]).

        Warns with the words that a prompt loses because it is too long.
        """
        # 1. both CLIPs, side by side
        device = self.clip_l.token_embedding.weight.device
        hidden_l, pooled_l = self.clip_l(self.tokenizers[0](prompts).to(device))
        # bigG cuts where CLIP-L does, so one warning is enough
        hidden_g, pooled_g = self.clip_g(self.tokenizers[1](prompts, warn=False).to(device))
        context = torch.cat([hidden_l, hidden_g], dim=-1)  # [B,L,D_l+D_g]
        context = F.pad(context, (0, self.context_width - context.shape[-1]))  # [B,L,C]
        # 2. T5 behind them
        if self.t5 is None:
            long = context.new_zeros(len(prompts), self.t5_tokens, self.context_width)
        else:
            ids = self.tokenizers[2](prompts).to(self.t5.shared.weight.device)
            long = self.t5(ids).to(context)  # [B,T,C]
        return torch.cat([context, long], dim=1), torch.cat([pooled_l, pooled_g], dim=-1)

    @classmethod
    def from_pretrained(cls, source, device="cpu", dtype=None, use_t5=True):
        """A diffusers folder or hub id: text_encoder{,_2,_3}/ and tokenizer{,_2,_3}/.

        use_t5 False, or no T5 in model_index.json: T5 is not loaded and zeros stand in its place.
        `t5_tokens` in model_index.json overrides T = 256.
        """
        index = weights.read_config(weights.find_file(source, "model_index.json"))
        use_t5 = use_t5 and has_t5(index)
        t5_tokens = index.get("t5_tokens", T5_TOKENS)
        tokenizers = [
            clip.PromptTokenizer(weights.find(source, component))
            for component in ("tokenizer", "tokenizer_2")]
        if use_t5:
            folder = weights.find(source, "tokenizer_3")
            tokenizers.append(clip.PromptTokenizer(folder, max_length=t5_tokens))
        clip_l, clip_g = (
            clip.TextTower.from_pretrained(source, device, dtype, component)
            for component in ("text_encoder", "text_encoder_2"))
        for tower, tokenizer in zip((clip_l, clip_g), tokenizers):
            tokenizer.fit(tower.config.vocab_size, tower.config.max_position_embeddings)
        if use_t5:
            t5 = T5Encoder.from_pretrained(source, device, dtype, "text_encoder_3")
            tokenizers[2].fit(t5.config.vocab_size)
            width = t5.config.d_model
        else:
            t5 = None
            config = weights.find_file(source, "transformer/config.json")
            width = layouts.mmdit_fields(config.parent)["context_dim"]
        return cls(clip_l, clip_g, t5, tokenizers, width, t5_tokens)
