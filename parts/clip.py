"""CLIP (Radford et al. 2021): a text tower and an image tower that meet in one space.

SD3.5 reads prompts with the text towers of CLIP-L and OpenCLIP-bigG (`TextTower`); scores of pictures use both towers
(`CLIP`): `pick_score`, `clip_score`, `clip_iqa` and, with LAION's head on the image tower, `aesthetic_score`. Weights are
read in the layout that transformers publishes (`text_model.*`, `vision_model.*`), with the q, k and v projections fused into
one here.

In the order data meets them: pictures, prompts, the towers, scores, checkpoints.

Shapes: B batch, L text tokens, N image tokens with the class token, D width, P dimension of the shared space, S side of
the pictures the image tower reads.
Left out: attention masks (CLIP is trained without them: padding follows the end token, and attention is causal).
"""

import functools
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from torch import nn

from parts import ops, weights
from parts.cli import UserError
from parts.files import read_json, to_rgb, write_json

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
PICKSCORE_TEXT = TextConfig(1024, 24, 16, 4096, "gelu", 1024)
PICKSCORE_VISION = VisionConfig(1280, 32, 16, 5120, "gelu", 1024)
PICKSCORE_PROCESSOR = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"  # PickScore is published without one and was trained with this


# ---------------------------------------------------------------------------------------------------------------------
# Pictures


@dataclass(frozen=True)
class ImageConfig:
    size: int = 224
    mean: tuple = (0.48145466, 0.4578275, 0.40821073)
    std: tuple = (0.26862954, 0.26130258, 0.27577711)
    square: bool = False  # both sides are resized to `size`: the aspect ratio changes, and nothing is cropped


def preprocess(images, size=ImageConfig.size, mean=ImageConfig.mean, std=ImageConfig.std, square=False):
    """PIL images of any size and mode, or uint8 [B,3,H,W] -> [B,3,S,S] float32 on the CPU, as transformers'
    CLIPImageProcessor makes them: the shorter side becomes S = size by bicubic resizing, the middle is cut out, and
    values in 0..1 are normalised. Raises ValueError.
    """
    squares = np.stack([np.asarray(cut_out(to_rgb(image), size, square)) for image in to_pil(images)])  # [B,S,S,3]
    pixels = torch.from_numpy(squares).permute(0, 3, 1, 2).contiguous().float() / 255
    return (pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


def to_pil(images):
    """A list of PIL images, or uint8 [B,3,H,W], as a list of PIL images. Raises ValueError for anything else or nothing."""
    got = type(images).__name__
    if isinstance(images, torch.Tensor):
        if images.dtype == torch.uint8 and images.dim() == 4 and images.shape[1] == 3 and len(images):
            return [Image.fromarray(image.permute(1, 2, 0).cpu().numpy()) for image in images]
        got = f"{images.dtype} {list(images.shape)}"
    elif isinstance(images, (list, tuple)):
        if images and all(isinstance(image, Image.Image) for image in images):
            return list(images)
        got = f"{got} of {', '.join(sorted({type(image).__name__ for image in images})) or 'nothing'}"
    raise ValueError(f"pictures are a list of PIL images, or uint8 [B,3,H,W]; got {got}")


def cut_out(image, size, square=False):
    """The middle of a PIL image as size × size pixels."""
    shorter = min(image.size)
    width, height = (size, size) if square else (int(size * side / shorter) for side in image.size)  # rounded down
    left, top = (width - size) // 2, (height - size) // 2
    return image.resize((width, height), Image.Resampling.BICUBIC).crop((left, top, left + size, top + size))


# ---------------------------------------------------------------------------------------------------------------------
# Prompts


class PromptTokenizer:
    """A published tokenizer, CLIP's or T5's, that pads and cuts to one length, and warns with the words it cut."""

    def __init__(self, folder, max_length=None):
        """folder: holds tokenizer.json, or CLIP's vocab.json and merges.txt. max_length: of T5; CLIP's is in its config."""
        folder = Path(folder)
        config, self.name = read_json(folder / "tokenizer_config.json"), "T5" if max_length else "CLIP"
        try:
            if (folder / "tokenizer.json").exists():
                self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
            else:
                self.tokenizer = clip_tokenizer(read_json(folder / "vocab.json"),
                                                weights.read_merges(folder / "merges.txt"))
        except UserError:
            raise
        except Exception as error:  # tokenizers raises plain Exception for a malformed file
            raise UserError(f"{folder}: its tokenizer cannot be read ({error}); download it again") from error
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()
        self.max_length = max_length or config.get("model_max_length", 77)
        pad = config.get("pad_token") or "<|endoftext|>"
        self.pad = self.tokenizer.token_to_id(pad["content"] if isinstance(pad, dict) else pad)
        if self.pad is None:
            raise UserError(f"{folder}: the padding token {pad!r} is not in its vocabulary")

    def __call__(self, prompts, warn=True):
        """list of B strings -> ids [B, max_length]."""
        rows = []
        for prompt, encoding in zip(prompts, self.tokenizer.encode_batch(list(prompts)), strict=True):
            ids = encoding.ids
            if len(ids) > self.max_length:
                cut = encoding.offsets[self.max_length - 1][0]  # the end token takes the last place
                if warn:
                    warnings.warn(f"prompt longer than {self.max_length} tokens; {self.name} does not see "
                                  f"{prompt[cut:].strip()!r}", stacklevel=3)
                ids = ids[: self.max_length - 1] + ids[-1:]
            rows.append(ids + [self.pad] * (self.max_length - len(ids)))
        return torch.tensor(rows)


def clip_tokenizer(vocab, merges):
    """CLIP's byte-level BPE over lower-cased words, each closed by `</w>`. vocab {token: id}, merges [(left, right)]."""
    start, end = "<|startoftext|>", "<|endoftext|>"
    tokenizer = Tokenizer(models.BPE(vocab, merges, end_of_word_suffix="</w>", continuing_subword_prefix="", unk_token=end))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()])
    words = Regex(r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(words, behavior="removed", invert=True), pre_tokenizers.ByteLevel(False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(start, special=True), AddedToken(end, special=True)])
    tokenizer.post_processor = processors.RobertaProcessing(
        (end, vocab[end]), (start, vocab[start]), trim_offsets=False, add_prefix_space=False)
    return tokenizer


def byte_alphabet():
    """The 256 characters that stand for bytes in a byte-level BPE, in CLIP's order: printable bytes first."""
    alphabet = set(pre_tokenizers.ByteLevel.alphabet())
    own = sorted(c for c in alphabet if ord(c) < 256)  # a printable byte stands for itself
    return own + sorted(alphabet - set(own))


@dataclass(frozen=True)
class Processor:
    """What makes a CLIP's input of pictures and prompts."""
    tokenizer: PromptTokenizer
    image: ImageConfig

    @classmethod
    def from_pretrained(cls, source, text, vision):
        """A folder or hub id with tokenizer files and, if pictures are not read as ImageConfig says, a
        preprocessor_config.json. text, vision: configs of the model it is for. Raises UserError."""
        for wanted in ("*.txt", "*.json"):  # of a hub id these files are downloaded, and no weights
            folder = weights.root(source, wanted)
        tokenizer = PromptTokenizer(folder)
        end = tokenizer.tokenizer.token_to_id("<|endoftext|>")
        if end != text.end_token:
            raise UserError(f"{folder}: <|endoftext|> is token {end} of its tokenizer and {text.end_token} of "
                                          f"the model; give a processor that belongs to the model")
        tokenizer.max_length = min(tokenizer.max_length, text.positions)
        names = (name for name in ("preprocessor_config.json", "processor_config.json") if (folder / name).exists())
        file = folder / next(names, "preprocessor_config.json")
        return cls(tokenizer, image_config(read_json(file) if file.exists() else {}, vision.image, file))

    def save_pretrained(self, folder):
        """Write tokenizer.json, tokenizer_config.json and preprocessor_config.json, which transformers reads too."""
        folder, tokenizer, c = Path(folder), self.tokenizer, self.image
        write_json(folder / "tokenizer_config.json", {
            "tokenizer_class": "CLIPTokenizer", "model_max_length": tokenizer.max_length, "bos_token": "<|startoftext|>",
            "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>",
            "pad_token": tokenizer.tokenizer.id_to_token(tokenizer.pad)})
        tokenizer.tokenizer.save(str(folder / "tokenizer.json.tmp"), pretty=False)
        (folder / "tokenizer.json.tmp").replace(folder / "tokenizer.json")
        both = {"height": c.size, "width": c.size}
        write_json(folder / "preprocessor_config.json", {
            "image_processor_type": "CLIPImageProcessor", "size": both if c.square else {"shortest_edge": c.size},
            "crop_size": both, "resample": 3, "image_mean": list(c.mean), "image_std": list(c.std)})


# ---------------------------------------------------------------------------------------------------------------------
# Towers


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
        q, k, v = ops.split_qkv(self.qkv(self.norm1(x)), self.heads)
        x = x + self.out(ops.attention(q, k, v, causal=causal))
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
        write_json(Path(folder) / "config.json", {
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

    def __init__(self, text, vision, processor=None):
        """processor: what the scores need to read pictures and prompts."""
        super().__init__()
        self.text, self.vision, self.processor = TextTower(text), VisionTower(vision), processor
        self.logit_scale = nn.Parameter(torch.tensor(2.6592))  # ln(1/0.07)

    def embed_text(self, ids):  # [B,L] -> unit vectors [B,P] float32
        return F.normalize(self.text(ids)[1].float(), dim=-1)

    def embed_images(self, pixels):  # [B,3,S,S] -> unit vectors [B,P] float32
        return F.normalize(self.vision(pixels).float(), dim=-1)

    def forward(self, ids, pixels):
        """Logits [B_images, B_texts]: cosine similarity times exp(logit_scale)."""
        return self.logit_scale.exp() * self.embed_images(pixels) @ self.embed_text(ids).T

    def views(self):
        return {"logit_scale": [self.logit_scale], **self.text.views(), **self.vision.views()}

    @classmethod
    def from_pretrained(cls, source, device="cpu", dtype=None, processor=None):
        """A folder or hub id in the layout of transformers' CLIPModel (openai/clip-vit-*, PickScore, …).

        processor: folder or hub id with the tokenizer and preprocessor_config.json, if `source` has none of its own, as
        PICKSCORE_PROCESSOR for yuvalkirstain/PickScore_v1. Without one the model embeds but does not score.
        Raises UserError.
        """
        path = weights.find(source)
        raw = weights.read_config(path)
        if "text_config" not in raw or "vision_config" not in raw:
            raise UserError(f"{path}/config.json: not a CLIP model with two towers; give a folder that "
                                          f"holds a CLIPModel")
        shared = {"projection_dim": raw.get("projection_dim", 512)}
        text, vision = text_config({**raw["text_config"], **shared}), vision_config({**raw["vision_config"], **shared})
        if processor is None and any((path / name).exists() for name in ("tokenizer.json", "vocab.json")):
            processor = path
        if processor is not None:
            processor = Processor.from_pretrained(processor, text, vision)
        make, entries = functools.partial(cls, text, vision, processor), weights.index(path)
        model = weights.build(make, cls.views, entries, path, device, dtype, OPTIONAL[:1])
        model.logit_scale.data = model.logit_scale.data.float()  # in bfloat16 a temperature of 100 would be 98.9
        weights.load({"logit_scale": [model.logit_scale]}, {"logit_scale": entries["logit_scale"]}, path)
        return model

    def save_pretrained(self, folder, dtype=None):
        c = self.vision.config
        write_json(Path(folder) / "config.json", {
            "architectures": ["CLIPModel"], "model_type": "clip", "projection_dim": c.projection,
            "text_config": text_config_json(self.text.config), "vision_config": {
                "model_type": "clip_vision_model", "hidden_size": c.width, "num_hidden_layers": c.layers,
                "num_attention_heads": c.heads, "intermediate_size": c.mlp, "hidden_act": c.activation,
                "projection_dim": c.projection, "image_size": c.image, "patch_size": c.patch, "layer_norm_eps": c.eps}})
        if self.processor is not None:
            self.processor.save_pretrained(folder)
        weights.save(Path(folder) / "model.safetensors", self.views(), dtype)


# ---------------------------------------------------------------------------------------------------------------------
# Scores


def pick_score(model, images, prompts):
    """PickScore (Kirstain et al. 2023) of picture i for prompt i: exp(logit_scale) times their cosine -> [B] float32.

    model: a CLIP with a processor. images: B PIL images, or uint8 [B,3,H,W], or their embeddings from `embed_pictures`.
    prompts: B strings, cut with a warning to the 77 tokens that the text tower reads. Raises ValueError, and
    UserError if the model has no processor.
    """
    return model.logit_scale.detach().exp() * cosines(model, images, prompts)


def cosines(model, images, prompts):
    """Cosine of the embeddings of picture i and prompt i -> [B] float32. A prompt of many pictures is embedded once."""
    pictures = embed_pictures(model, images)
    if isinstance(prompts, str) or len(prompts) != len(pictures):
        raise ValueError(f"every picture needs its prompt: {len(pictures)} pictures, "
                         f"{'one string' if isinstance(prompts, str) else len(prompts)} as prompts")
    different = list(dict.fromkeys(prompts))
    texts = embed_prompts(model, different)[[different.index(prompt) for prompt in prompts]]  # [B,P]
    return (pictures * texts).sum(dim=-1)


@torch.no_grad()
def embed_pictures(model, images):
    """B PIL images, or uint8 [B,3,H,W] -> unit vectors [B,P] float32, which every score takes in their place.

    Raises ValueError, and UserError if the model has no processor.
    """
    if isinstance(images, torch.Tensor) and images.dim() == 2 and images.is_floating_point():
        return images
    c = processor_of(model).image
    pixels = preprocess(to_pil(images), c.size, c.mean, c.std, c.square)
    return model.embed_images(pixels.to(model.vision.class_token))


@torch.no_grad()
def embed_prompts(model, prompts):
    """B strings -> unit vectors [B,P] float32."""
    return model.embed_text(processor_of(model).tokenizer(prompts).to(model.vision.class_token.device))


def processor_of(model):
    if model.processor is None:
        raise UserError(f"this CLIP has no tokenizer; load it with CLIP.from_pretrained(…, processor=…), for "
                                      f"PickScore with processor={PICKSCORE_PROCESSOR!r}")
    return model.processor


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
        raise UserError(f"CLIP with hidden_act {activation!r} is not supported; known are "
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


def image_config(raw, side, file):
    """ImageConfig of a preprocessor_config.json. side: of the pictures the model reads; file: named in errors.

    Sizes are a number, {"shortest_edge": …} or {"height": …, "width": …}. Raises UserError for another side
    and for steps that `preprocess` does not take.
    """
    raw, default = raw.get("image_processor", raw), ImageConfig()
    steps = {"resample": 3, "do_resize": True, "do_center_crop": True, "do_rescale": True, "do_normalize": True}
    odd = [name for name, usual in steps.items() if raw.get(name, usual) != usual]
    for name in ("size", "crop_size"):
        sides = raw.get(name, side)
        if any(s != side for s in (sides.values() if isinstance(sides, dict) else [sides])):
            odd.append(name)
    colours = [raw.get("image_mean", list(default.mean)), raw.get("image_std", list(default.std))]
    if odd:
        found = ", ".join(f"{name} {raw[name]}" for name in odd)
        raise UserError(f"{file}: {found}; the model reads pictures of {side} px, resized by bicubic "
                                      f"interpolation, cropped and normalised; give the processor that belongs to it")
    if not all(isinstance(x, list) and len(x) == 3 for x in colours):
        raise UserError(f"{file}: image_mean and image_std must be lists of 3 numbers, got {colours}")
    size = raw.get("size")
    return ImageConfig(side, *map(tuple, colours), square=isinstance(size, dict) and "height" in size)


def text_config_json(c):
    return {"model_type": "clip_text_model", "hidden_size": c.width, "num_hidden_layers": c.layers,
            "num_attention_heads": c.heads, "intermediate_size": c.mlp, "hidden_act": c.activation,
            "projection_dim": c.projection, "vocab_size": c.vocab, "max_position_embeddings": c.positions,
            "bos_token_id": c.end_token - 1, "eos_token_id": c.end_token, "layer_norm_eps": c.eps}
