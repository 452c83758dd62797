"""CLIP (Radford et al. 2021): a text tower and an image tower that meet in one space.

SD3.5 reads prompts with the text towers of CLIP-L and OpenCLIP-bigG (`TextTower`); scores of pictures against words use
both towers (`CLIP`). Weights are read in the layout that transformers publishes (`text_model.*`, `vision_model.*`),
with the q, k and v projections fused into one here.

Shapes: B batch, L text tokens, N image tokens with the class token, D width, P dimension of the shared space.
Left out: attention masks (CLIP is trained without them: padding follows the end token, and attention is causal).
"""

import functools
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import kernels
import weights

OPTIONAL = ("*position_ids", "logit_scale")  # in some published files, used by no text tower
ACTIVATIONS = {"quick_gelu": lambda x: x * torch.sigmoid(1.702 * x), "gelu": F.gelu}


@dataclass(frozen=True)
class TextConfig:
    width: int = 768
    layers: int = 12
    heads: int = 12
    mlp: int = 3072
    activation: str = "quick_gelu"
    projection: int = 768
    vocab: int = 49_408
    positions: int = 77
    end_token: int = 49_407
    eps: float = 1e-5


@dataclass(frozen=True)
class VisionConfig:
    width: int = 1024
    layers: int = 24
    heads: int = 16
    mlp: int = 4096
    activation: str = "quick_gelu"
    projection: int = 768
    image: int = 224  # side in pixels
    patch: int = 14
    eps: float = 1e-5


CLIP_L_TEXT = TextConfig()
BIG_G_TEXT = TextConfig(1280, 32, 20, 5120, "gelu", 1280)


class Layer(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.norm1 = nn.LayerNorm(c.width, eps=c.eps)
        self.qkv = nn.Linear(c.width, 3 * c.width)
        self.out = nn.Linear(c.width, c.width)
        self.norm2 = nn.LayerNorm(c.width, eps=c.eps)
        self.fc1, self.fc2 = nn.Linear(c.width, c.mlp), nn.Linear(c.mlp, c.width)
        self.heads, self.activation = c.heads, ACTIVATIONS[c.activation]

    def forward(self, x, causal):  # [B,L,D] -> [B,L,D]
        q, k, v = kernels.split_qkv(self.qkv(self.norm1(x)), self.heads)
        x = x + self.out(kernels.attention(q, k, v, causal=causal))
        return x + self.fc2(self.activation(self.fc1(self.norm2(x))))


class TextTower(nn.Module):
    def __init__(self, config=CLIP_L_TEXT):
        super().__init__()
        c = self.config = config
        self.tokens, self.positions = nn.Embedding(c.vocab, c.width), nn.Embedding(c.positions, c.width)
        self.layers = nn.ModuleList(Layer(c) for _ in range(c.layers))
        self.norm = nn.LayerNorm(c.width, eps=c.eps)
        self.projection = nn.Linear(c.width, c.projection, bias=False)

    def forward(self, ids):
        """ids [B,L] -> (hidden states before the last layer [B,L,D], projected state of the end token [B,P])."""
        x = self.tokens(ids) + self.positions.weight[: ids.shape[1]]  # [B,L,D]
        for layer in self.layers:
            penultimate = x
            x = layer(x, causal=True)
        end = (ids == self.config.end_token).int().argmax(dim=1)  # the first one: CLIP-L also pads with it
        return penultimate, self.projection(self.norm(x[torch.arange(len(x), device=x.device), end]))

    def views(self):
        """transformers' CLIPTextModelWithProjection."""
        return {"text_model.embeddings.token_embedding.weight": [self.tokens.weight],
                "text_model.embeddings.position_embedding.weight": [self.positions.weight],
                **layer_views("text_model.encoder.layers", self.layers),
                **weights.affine_views("text_model.final_layer_norm", self.norm),
                "text_projection.weight": [self.projection.weight]}

    @classmethod
    def from_pretrained(cls, source, device="cpu", dtype=None, component=None):
        """A folder or hub id with CLIPTextModelWithProjection (its `component`, e.g. `text_encoder`, if one is named)."""
        path = weights.find(source, component)
        make = functools.partial(cls, text_config(weights.read_config(path)))
        return weights.build(make, cls.views, weights.index(path), path, device, dtype, OPTIONAL)

    def save_pretrained(self, folder, dtype=None):
        weights.write_json(Path(folder) / "config.json", {
            "architectures": ["CLIPTextModelWithProjection"], **text_config_json(self.config)})
        weights.save(Path(folder) / "model.safetensors", self.views(), dtype)


class VisionTower(nn.Module):
    def __init__(self, config):
        super().__init__()
        c = self.config = config
        self.patches = nn.Conv2d(3, c.width, c.patch, stride=c.patch, bias=False)
        self.class_token = nn.Parameter(torch.zeros(c.width))
        self.positions = nn.Embedding((c.image // c.patch) ** 2 + 1, c.width)
        self.norm_in = nn.LayerNorm(c.width, eps=c.eps)
        self.layers = nn.ModuleList(Layer(c) for _ in range(c.layers))
        self.norm_out = nn.LayerNorm(c.width, eps=c.eps)
        self.projection = nn.Linear(c.width, c.projection, bias=False)

    def forward(self, pixels):
        """Normalised pixels [B,3,S,S], S = config.image -> embeddings [B,P], not normalised to length one."""
        x = self.patches(pixels).flatten(2).transpose(1, 2)  # [B,N-1,D]
        x = torch.cat([self.class_token.expand(len(x), 1, -1), x], dim=1) + self.positions.weight  # [B,N,D]
        x = self.norm_in(x)
        for layer in self.layers:
            x = layer(x, causal=False)
        return self.projection(self.norm_out(x[:, 0]))

    def views(self):
        """The image half of transformers' CLIPModel (its `pre_layrnorm` is spelt so in every published file)."""
        return {"vision_model.embeddings.class_embedding": [self.class_token],
                "vision_model.embeddings.patch_embedding.weight": [self.patches.weight],
                "vision_model.embeddings.position_embedding.weight": [self.positions.weight],
                **weights.affine_views("vision_model.pre_layrnorm", self.norm_in),
                **layer_views("vision_model.encoder.layers", self.layers),
                **weights.affine_views("vision_model.post_layernorm", self.norm_out),
                "visual_projection.weight": [self.projection.weight]}


class CLIP(nn.Module):
    """Both towers and the learned temperature of the contrastive loss."""

    def __init__(self, text, vision):
        super().__init__()
        self.text, self.vision = TextTower(text), VisionTower(vision)
        self.logit_scale = nn.Parameter(torch.tensor(2.6592))  # ln(1/0.07)

    def embed_text(self, ids):  # [B,L] -> unit vectors [B,P]
        return F.normalize(self.text(ids)[1], dim=-1)

    def embed_images(self, pixels):  # [B,3,S,S] -> unit vectors [B,P]
        return F.normalize(self.vision(pixels), dim=-1)

    def forward(self, ids, pixels):
        """Logits [B_images, B_texts]: cosine similarity times exp(logit_scale)."""
        return self.logit_scale.exp() * self.embed_images(pixels) @ self.embed_text(ids).T

    def views(self):
        return {"logit_scale": [self.logit_scale], **self.text.views(), **self.vision.views()}

    @classmethod
    def from_pretrained(cls, source, device="cpu", dtype=None):
        """A folder or hub id in the layout of transformers' CLIPModel (openai/clip-vit-*, PickScore, …)."""
        path = weights.find(source)
        raw = weights.read_config(path)
        if "text_config" not in raw or "vision_config" not in raw:
            raise weights.CheckpointError(f"{path}/config.json: not a CLIP model with two towers; give a folder that "
                                          f"holds a CLIPModel")
        shared = {"projection_dim": raw.get("projection_dim", 512)}
        text, vision = text_config({**raw["text_config"], **shared}), vision_config({**raw["vision_config"], **shared})
        make = functools.partial(cls, text, vision)
        return weights.build(make, cls.views, weights.index(path), path, device, dtype, OPTIONAL[:1])

    def save_pretrained(self, folder, dtype=None):
        c = self.vision.config
        weights.write_json(Path(folder) / "config.json", {
            "architectures": ["CLIPModel"], "model_type": "clip", "projection_dim": c.projection,
            "text_config": text_config_json(self.text.config), "vision_config": {
                "model_type": "clip_vision_model", "hidden_size": c.width, "num_hidden_layers": c.layers,
                "num_attention_heads": c.heads, "intermediate_size": c.mlp, "hidden_act": c.activation,
                "projection_dim": c.projection, "image_size": c.image, "patch_size": c.patch, "layer_norm_eps": c.eps}})
        weights.save(Path(folder) / "model.safetensors", self.views(), dtype)


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints


def layer_views(prefix, layers):
    views = {}
    for i, layer in enumerate(layers):
        at = f"{prefix}.{i}"
        for kind in ("weight", "bias"):
            for name, rows in zip("qkv", weights.split_rows(getattr(layer.qkv, kind), 3), strict=True):
                views[f"{at}.self_attn.{name}_proj.{kind}"] = [rows]
        for theirs, module in (("self_attn.out_proj", layer.out), ("layer_norm1", layer.norm1),
                               ("layer_norm2", layer.norm2), ("mlp.fc1", layer.fc1), ("mlp.fc2", layer.fc2)):
            views.update(weights.affine_views(f"{at}.{theirs}", module))
    return views


def tower_fields(raw, width, heads, mlp):
    """The fields both towers share; the defaults are those that transformers leaves out of a config.json."""
    activation = raw.get("hidden_act", "quick_gelu")
    if activation not in ACTIVATIONS:
        raise weights.CheckpointError(f"CLIP with hidden_act {activation!r} is not supported; known are "
                                      f"{', '.join(ACTIVATIONS)}")
    return {"width": raw.get("hidden_size", width), "layers": raw.get("num_hidden_layers", 12),
            "heads": raw.get("num_attention_heads", heads), "mlp": raw.get("intermediate_size", mlp),
            "activation": activation, "projection": raw.get("projection_dim", 512), "eps": raw.get("layer_norm_eps", 1e-5)}


def text_config(raw):
    """TextConfig of a config.json. Its eos_token_id is often a wrong 2; CLIP's end token is then the last one."""
    vocab, end = raw.get("vocab_size", 49_408), raw.get("eos_token_id", 2)
    return TextConfig(**tower_fields(raw, 512, 8, 2048), vocab=vocab, positions=raw.get("max_position_embeddings", 77),
                      end_token=vocab - 1 if end in (2, None) else end)


def vision_config(raw):
    return VisionConfig(**tower_fields(raw, 768, 12, 3072), image=raw.get("image_size", 224),
                        patch=raw.get("patch_size", 32))


def text_config_json(c):
    return {"model_type": "clip_text_model", "hidden_size": c.width, "num_hidden_layers": c.layers,
            "num_attention_heads": c.heads, "intermediate_size": c.mlp, "hidden_act": c.activation,
            "projection_dim": c.projection, "vocab_size": c.vocab, "max_position_embeddings": c.positions,
            "bos_token_id": c.end_token - 1, "eos_token_id": c.end_token, "layer_norm_eps": c.eps}
