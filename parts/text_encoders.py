"""The three text encoders of Stable Diffusion 3.5 and their tokenizers, joined as the MMDiT expects them.

Each prompt becomes a sequence of 77 CLIP tokens (CLIP-L's hidden states beside OpenCLIP-bigG's, padded with zeros to
T5's width) followed by T T5 tokens, and one pooled vector (CLIP-L's beside bigG's) (Esser et al. 2024, section 4).
T5 may be left out: zeros stand in its place, as in training, where it is dropped at random.

Shapes: B batch, L CLIP tokens (77), T T5 tokens (256), D width of a tower, C context width (4096).
"""

import functools
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from parts import clip, ops, weights
from parts.cli import UserError
from parts.files import read_json

T5_TOKENS = 256  # of SD3.5's pipeline


# ---------------------------------------------------------------------------------------------------------------------
# T5's encoder (Raffel et al. 2020, version 1.1)


@dataclass(frozen=True)
class T5Config:
    width: int = 4096
    layers: int = 24
    heads: int = 64
    head_dim: int = 64
    mlp: int = 10_240
    vocab: int = 32_128
    buckets: int = 32  # of relative distance, half of them for each direction
    distance: int = 128  # from where on all distances share the last bucket
    eps: float = 1e-6


T5_XXL = T5Config()


class T5Block(nn.Module):
    def __init__(self, c):
        super().__init__()
        inner = c.heads * c.head_dim
        self.norm1, self.norm2 = ops.RMSNorm(c.width, c.eps), ops.RMSNorm(c.width, c.eps)
        self.qkv, self.out = nn.Linear(c.width, 3 * inner, bias=False), nn.Linear(inner, c.width, bias=False)
        self.gate_up = nn.Linear(c.width, 2 * c.mlp, bias=False)  # wi_0 (through GELU) and wi_1
        self.down = nn.Linear(c.mlp, c.width, bias=False)
        self.heads = c.heads

    def forward(self, x, bias):  # x [B,T,D], bias [1,H,T,T]
        q, k, v = ops.split_qkv(self.qkv(self.norm1(x)), self.heads)
        x = x + self.out(ops.attention(q, k, v, mask=bias, scale=1.0))  # T5 does not scale its scores
        gate, up = self.gate_up(self.norm2(x)).chunk(2, dim=-1)
        return x + self.down(F.gelu(gate, approximate="tanh") * up)


class T5Encoder(nn.Module):
    def __init__(self, config=T5_XXL):
        super().__init__()
        c = self.config = config
        self.tokens = nn.Embedding(c.vocab, c.width)
        self.distance_bias = nn.Embedding(c.buckets, c.heads)
        self.blocks = nn.ModuleList(T5Block(c) for _ in range(c.layers))
        self.norm = ops.RMSNorm(c.width, c.eps)

    def forward(self, ids):
        """ids [B,T] -> hidden states [B,T,D]. No mask: SD3.5 lets tokens attend to the padding."""
        x, length = self.tokens(ids), ids.shape[1]
        position = torch.arange(length, device=ids.device)
        bucket = distance_bucket(position[None, :] - position[:, None], self.config)  # [T,T]
        bias = self.distance_bias(bucket).permute(2, 0, 1)[None]  # [1,H,T,T]
        for block in self.blocks:
            x = block(x, bias)
        return self.norm(x)

    def views(self):
        views = {"shared.weight": [self.tokens.weight], "encoder.final_layer_norm.weight": [self.norm.weight],
                 "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": [self.distance_bias.weight]}
        for i, block in enumerate(self.blocks):
            at = f"encoder.block.{i}.layer"
            for name, rows in zip("qkv", weights.split_rows(block.qkv.weight, 3), strict=True):
                views[f"{at}.0.SelfAttention.{name}.weight"] = [rows]
            gate, up = weights.split_rows(block.gate_up.weight, 2)
            views |= {f"{at}.0.SelfAttention.o.weight": [block.out.weight],
                      f"{at}.0.layer_norm.weight": [block.norm1.weight],
                      f"{at}.1.DenseReluDense.wi_0.weight": [gate], f"{at}.1.DenseReluDense.wi_1.weight": [up],
                      f"{at}.1.DenseReluDense.wo.weight": [block.down.weight],
                      f"{at}.1.layer_norm.weight": [block.norm2.weight]}
        return views

    @classmethod
    def from_pretrained(cls, source, device="cpu", dtype=None, component=None):
        """A folder or hub id with T5EncoderModel (its `component`, e.g. `text_encoder_3`, if one is named)."""
        path = weights.find(source, component)
        raw = weights.read_config(path)
        try:
            if raw.get("feed_forward_proj") != "gated-gelu":
                raise ValueError(f"feed_forward_proj {raw.get('feed_forward_proj')!r}, expected 'gated-gelu'")
            config = T5Config(raw["d_model"], raw["num_layers"], raw["num_heads"], raw["d_kv"], raw["d_ff"],
                              raw["vocab_size"], raw.get("relative_attention_num_buckets", 32),
                              raw.get("relative_attention_max_distance", 128), raw.get("layer_norm_epsilon", 1e-6))
        except (KeyError, ValueError) as error:
            raise UserError(f"{path}/config.json: not T5 version 1.1 ({error}); give an SD3.5 "
                                          f"text_encoder_3/ folder") from error
        entries = weights.index(path)
        if "shared.weight" not in entries and "encoder.embed_tokens.weight" in entries:  # the same table, tied
            entries["shared.weight"] = entries.pop("encoder.embed_tokens.weight")
        return weights.build(functools.partial(cls, config), cls.views, entries, path, device, dtype,
                             optional=("encoder.embed_tokens.weight",))


def distance_bucket(offset, c):
    """Bucket of each key − query offset: exact for small distances, logarithmic up to c.distance, then one for all."""
    half = c.buckets // 2
    exact, far = half // 2, offset.abs()
    ratio = torch.log(far.clamp(min=1).float() / exact) / math.log(c.distance / exact)
    logarithmic = (exact + (ratio * (half - exact)).long()).clamp(max=half - 1)
    return torch.where(far < exact, far, logarithmic) + half * (offset > 0)


# ---------------------------------------------------------------------------------------------------------------------
# The three together


def has_t5(index):
    """Whether a pipeline's model_index.json lists T5."""
    return index.get("text_encoder_3", [None])[0] is not None


class TextEncoders:
    """Not a module: three frozen encoders that may live on another device than the MMDiT."""

    def __init__(self, clip_l, clip_g, t5, tokenizers, context_width=4096, t5_tokens=T5_TOKENS):
        """tokenizers: of CLIP-L, bigG and, unless t5 is None, T5. t5 None: t5_tokens rows of zeros in its place."""
        self.clip_l, self.clip_g, self.t5, self.tokenizers = clip_l, clip_g, t5, tokenizers
        self.context_width, self.t5_tokens = context_width, t5_tokens

    @torch.no_grad()
    def encode(self, prompts):
        """list of B strings -> (context [B, 77 + T, 4096], pooled [B, 2048]). Warns about what a prompt is cut by."""
        device = self.clip_l.tokens.weight.device
        hidden_l, pooled_l = self.clip_l(self.tokenizers[0](prompts).to(device))
        hidden_g, pooled_g = self.clip_g(self.tokenizers[1](prompts, warn=False).to(device))  # it cuts where CLIP-L does
        context = torch.cat([hidden_l, hidden_g], dim=-1)  # [B,L,D_l+D_g]
        context = F.pad(context, (0, self.context_width - context.shape[-1]))  # [B,L,C]
        if self.t5 is None:
            long = context.new_zeros(len(prompts), self.t5_tokens, self.context_width)
        else:
            long = self.t5(self.tokenizers[2](prompts).to(self.t5.tokens.weight.device)).to(context)  # [B,T,C]
        return torch.cat([context, long], dim=1), torch.cat([pooled_l, pooled_g], dim=-1)

    @classmethod
    def from_pretrained(cls, source, device="cpu", dtype=None, use_t5=True):
        """A diffusers folder or hub id: text_encoder{,_2,_3}/ and tokenizer{,_2,_3}/, as its model_index.json lists them.

        use_t5 False: T5 is not loaded and zeros stand in its place. `t5_tokens` in model_index.json overrides T = 256.
        """
        index = read_json(weights.find_file(source, "model_index.json"))
        use_t5 = use_t5 and has_t5(index)
        t5_tokens = index.get("t5_tokens", T5_TOKENS)
        tokenizers = [clip.PromptTokenizer(weights.find(source, name)) for name in ("tokenizer", "tokenizer_2")]
        if use_t5:
            tokenizers.append(clip.PromptTokenizer(weights.find(source, "tokenizer_3"), max_length=t5_tokens))
        clip_l, clip_g = (clip.TextTower.from_pretrained(source, device, dtype, component)
                          for component in ("text_encoder", "text_encoder_2"))
        t5 = T5Encoder.from_pretrained(source, device, dtype, "text_encoder_3") if use_t5 else None
        if t5 is not None:
            width = t5.config.width
        else:
            width = read_json(weights.find_file(source, "transformer/config.json"))["joint_attention_dim"]
        return cls(clip_l, clip_g, t5, tokenizers, width, t5_tokens)
