"""CLIP (Radford et al. 2021): a text tower and an image tower that meet in one space.

SD3.5 reads prompts with the text towers of CLIP-L and OpenCLIP-bigG (`TextTower`). Scores of
pictures use both towers (`CLIP`): `pick_score` here, others in evaluation/metrics.py. Modules and
fields of the configurations carry the names that transformers publishes, but q, k and v are one
projection here.

In the order data meets them: pictures, prompts, the towers, their checkpoints, scores.

Shapes: B batch, L text tokens, N image tokens with the class token, D width, H heads, E = D/H,
P dimension of the shared space, S side of the pictures the image tower reads.
Left out: attention masks (CLIP is trained without them: padding follows the end token, and
attention is causal).
"""

import functools
import warnings
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import tokenizers
import torch
import torch.nn.functional as F
from PIL import Image
from tokenizers import Regex, normalizers, pre_tokenizers
from torch import nn

from parts import ops, weights
from parts.cli import UserError
from parts.files import to_rgb

END = "<|endoftext|>"
# quick_gelu is OpenAI's cheaper form of the same curve; weights fit only the one they had.
ACTIVATIONS = {"quick_gelu": lambda x: x * torch.sigmoid(1.702 * x), "gelu": F.gelu}


@dataclass(frozen=True)
class TextConfig:  # names and defaults are those of transformers
    hidden_size: int = 512
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    intermediate_size: int = 2048
    hidden_act: str = "quick_gelu"
    projection_dim: int = 512
    vocab_size: int = 49_408
    max_position_embeddings: int = 77
    eos_token_id: int = 49_407
    layer_norm_eps: float = 1e-5


@dataclass(frozen=True)
class VisionConfig:
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "quick_gelu"
    projection_dim: int = 512
    image_size: int = 224  # side in pixels
    patch_size: int = 32
    layer_norm_eps: float = 1e-5


CLIP_L_TEXT = TextConfig(768, 12, 12, 3072, "quick_gelu", 768)
BIG_G_TEXT = TextConfig(1280, 32, 20, 5120, "gelu", 1280)
PICKSCORE_TEXT = TextConfig(1024, 24, 16, 4096, "gelu", 1024)
PICKSCORE_VISION = VisionConfig(1280, 32, 16, 5120, "gelu", 1024, 224, 14)
# PickScore is published without a processor; it was trained with that of this model.
PICKSCORE_PROCESSOR = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"


# --------------------------------------------------------------------------------------------------
# Pictures


@dataclass(frozen=True)
class ImageConfig:
    size: int = 224
    mean: tuple = (0.48145466, 0.4578275, 0.40821073)
    std: tuple = (0.26862954, 0.26130258, 0.27577711)
    square: bool = False  # both sides are resized to `size`: the aspect ratio changes, no crop


def preprocess(images, config=ImageConfig()):
    """Pictures as transformers' CLIPImageProcessor makes them: [B,3,S,S] float32 on the CPU.

    images: PIL images of any size and mode, or uint8 [B,3,H,W]. The shorter side becomes S by
    bicubic resizing, the middle is cut out, and values in 0..1 are normalised. Raises ValueError.
    """
    squares = [cut_out(to_rgb(image), config.size, config.square) for image in to_pil(images)]
    pixels = torch.from_numpy(np.stack([np.asarray(square) for square in squares]))  # [B,S,S,3]
    return normalised(pixels.permute(0, 3, 1, 2).contiguous().float() / 255, config)


def normalised(pixels, config):
    """(x − mean) / std of pixels [B,3,H,W] in 0..1."""
    mean = torch.tensor(config.mean).view(3, 1, 1)
    std = torch.tensor(config.std).view(3, 1, 1)
    return (pixels - mean) / std


def to_pil(images):
    """PIL images, or uint8 [B,3,H,W], as a list of PIL images. Raises ValueError for all else."""
    got = type(images).__name__
    if isinstance(images, torch.Tensor):
        got = f"{images.dtype} {list(images.shape)}"
        if images.dtype == torch.uint8 and images.dim() == 4 and images.shape[1] == 3:
            images = [Image.fromarray(image.permute(1, 2, 0).cpu().numpy()) for image in images]
    is_list = isinstance(images, (list, tuple)) and len(images) > 0
    if not is_list or not all(isinstance(image, Image.Image) for image in images):
        raise ValueError(f"pictures are a list of PIL images, or uint8 [B,3,H,W]; got {got}")
    return list(images)


def cut_out(image, size, square=False):
    """The middle of a PIL image as size × size pixels."""
    shorter = min(image.size)
    sides = [size if square else int(size * side / shorter) for side in image.size]  # rounded down
    width, height = sides
    left = (width - size) // 2
    top = (height - size) // 2
    resized = image.resize(sides, Image.Resampling.BICUBIC)
    return resized.crop((left, top, left + size, top + size))


def image_config(folder, side):
    """ImageConfig of a processor's folder; without a file, CLIP's own. side: the model's pictures.

    Sizes are a number, {"shortest_edge": …} or {"height": …, "width": …}. Raises UserError for
    another side and for steps that `preprocess` does not take.
    """
    file = weights.image_file(folder)
    raw = weights.read_config(file) if file.exists() else {}
    # Newer folders put the settings of pictures inside those of the whole processor.
    raw = raw.get("image_processor", raw)
    usual = {
        "do_resize": True, "do_center_crop": True, "do_rescale": True, "do_normalize": True,
        "resample": 3}  # PIL's number of bicubic interpolation
    odd = [name for name, value in usual.items() if raw.get(name, value) != value]
    for name in ("size", "crop_size"):
        sizes = raw.get(name, side)
        sides = sizes.values() if isinstance(sizes, dict) else [sizes]
        if any(given != side for given in sides):
            odd.append(name)
    mean = raw.get("image_mean", ImageConfig.mean)
    std = raw.get("image_std", ImageConfig.std)
    for name, values in (("image_mean", mean), ("image_std", std)):
        if len(values) != 3:
            odd.append(name)
    if odd:
        found = ", ".join(f"{name} {raw[name]!r:.80}" for name in odd)
        raise UserError(
            f"{file}: {found}; the model reads pictures of {side} px, resized by bicubic "
            f"interpolation, cropped and normalised by 3 means and deviations; give the processor "
            f"that belongs to it")
    square = isinstance(raw.get("size"), dict) and "height" in raw["size"]
    return ImageConfig(side, tuple(mean), tuple(std), square)


# --------------------------------------------------------------------------------------------------
# Prompts


class PromptTokenizer:
    """A published tokenizer, CLIP's or T5's, that pads and cuts prompts to one length."""

    def __init__(self, folder, max_length=None):
        """folder: holds tokenizer.json, or CLIP's vocab.json and merges.txt. Raises UserError.

        max_length: of T5; that of CLIP is in its tokenizer_config.json.
        """
        self.folder = folder = Path(folder)
        config = weights.read_config(folder / "tokenizer_config.json")
        self.name = "T5" if max_length else "CLIP"
        self.max_length = max_length or config.get("model_max_length", 77)
        self.tokenizer = weights.read_tokenizer(folder, clip_tokenizer)
        pad = config.get("pad_token") or END
        pad = pad.get("content") if isinstance(pad, dict) else pad
        # Not token_to_id, which raises for half of a surrogate pair.
        self.pad = self.tokenizer.get_vocab().get(pad) if isinstance(pad, str) else None
        if self.pad is None:
            raise UserError(f"{folder}: the padding token {pad!r} is not in its vocabulary")

    def fit(self, vocab_size, positions=None):
        """Cut to what a model reads. UserError if it does not know all of the tokens."""
        weights.check_vocabulary(self.tokenizer, vocab_size, self.folder)
        self.max_length = min(self.max_length, positions or self.max_length)

    def __call__(self, prompts, warn=True):
        """list of B strings -> ids [B, max_length]. Warns with the words that it cuts."""
        rows = []
        encodings = self.tokenizer.encode_batch(list(prompts))
        for prompt, encoding in zip(prompts, encodings, strict=True):
            ids = encoding.ids
            if len(ids) > self.max_length:
                cut = encoding.offsets[self.max_length - 1][0]  # the end token takes the last place
                if warn:
                    warnings.warn(
                        f"prompt longer than {self.max_length} tokens; {self.name} does not see "
                        f"{prompt[cut:].strip()!r}", stacklevel=3)
                ids = ids[: self.max_length - 1] + ids[-1:]
            rows.append(ids + [self.pad] * (self.max_length - len(ids)))
        return torch.tensor(rows)


def clip_tokenizer(vocab, merges):
    """CLIP's byte-level BPE over lower-cased words, each closed by `</w>`.

    vocab {token: id}, merges [(left, right)].
    """
    start = "<|startoftext|>"
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(
        vocab, merges, end_of_word_suffix="</w>", continuing_subword_prefix="", unk_token=END))
    tokenizer.normalizer = normalizers.Sequence([
        normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()])
    words = Regex(r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(words, behavior="removed", invert=True),
        pre_tokenizers.ByteLevel(False, use_regex=False)])
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens([start, END])
    tokenizer.post_processor = tokenizers.processors.RobertaProcessing(
        (END, vocab[END]), (start, vocab[start]), trim_offsets=False, add_prefix_space=False)
    return tokenizer


@dataclass(frozen=True)
class Processor:
    """What makes a CLIP's input of pictures and prompts."""
    tokenizer: PromptTokenizer
    image: ImageConfig

    @classmethod
    def from_pretrained(cls, source, text, vision):
        """A folder or hub id with tokenizer files and perhaps a preprocessor_config.json.

        text, vision: configurations of the model it is for. Raises UserError.
        """
        for wanted in ("*.txt", "*.json"):  # of a hub id these are downloaded, and no weights
            folder = weights.root(source, wanted)
        tokenizer = PromptTokenizer(folder)
        # The tower looks for the end token by its number, so another vocabulary reads nonsense.
        end = tokenizer.tokenizer.token_to_id(END)
        if end != text.eos_token_id:
            raise UserError(
                f"{folder}: {END} is token {end} of its tokenizer and {text.eos_token_id} of the "
                f"model; give a processor that belongs to the model")
        tokenizer.fit(text.vocab_size, text.max_position_embeddings)
        return cls(tokenizer, image_config(folder, vision.image_size))


# --------------------------------------------------------------------------------------------------
# Towers


class Layer(nn.Module):
    """Attention, then an MLP, each on a normalised copy and added to the stream."""

    def __init__(self, c):
        super().__init__()
        D = c.hidden_size
        self.layer_norm1 = nn.LayerNorm(D, eps=c.layer_norm_eps)
        self.qkv_proj = nn.Linear(D, 3 * D)
        self.out_proj = nn.Linear(D, D)
        self.layer_norm2 = nn.LayerNorm(D, eps=c.layer_norm_eps)
        self.fc1 = nn.Linear(D, c.intermediate_size)
        self.fc2 = nn.Linear(c.intermediate_size, D)
        self.heads = c.num_attention_heads
        self.activation = ACTIVATIONS[c.hidden_act]

    def forward(self, x, causal):  # [B,L,D] -> [B,L,D]
        q, k, v = ops.split_qkv(self.qkv_proj(self.layer_norm1(x)), self.heads)  # each [B,H,L,E]
        x = x + self.out_proj(ops.attention(q, k, v, causal=causal))
        return x + self.fc2(self.activation(self.fc1(self.layer_norm2(x))))


class TextTower(nn.Module):
    def __init__(self, config=CLIP_L_TEXT, project=True):
        """project: False for CLIPTextModel, which has no projection of the end token."""
        super().__init__()
        c = self.config = config
        self.token_embedding = nn.Embedding(c.vocab_size, c.hidden_size)
        self.position_embedding = nn.Embedding(c.max_position_embeddings, c.hidden_size)
        self.layers = nn.ModuleList(Layer(c) for _ in range(c.num_hidden_layers))
        self.final_layer_norm = nn.LayerNorm(c.hidden_size, eps=c.layer_norm_eps)
        self.text_projection = nn.Identity()
        if project:
            self.text_projection = nn.Linear(c.hidden_size, c.projection_dim, bias=False)

    def states(self, ids):
        """ids [B,L] -> states before and after the last layer, both [B,L,D]."""
        x = self.token_embedding(ids) + self.position_embedding.weight[: ids.shape[1]]  # [B,L,D]
        for layer in self.layers:
            penultimate = x
            x = layer(x, causal=True)
        return penultimate, x

    def forward(self, ids):
        """ids [B,L] -> (states before the last layer [B,L,D], projected end token [B,P])."""
        penultimate, x = self.states(ids)
        # The first end token closes the prompt; CLIP-L pads with further ones.
        end = (ids == self.config.eos_token_id).int().argmax(dim=1)  # [B]
        x = x[torch.arange(len(x), device=x.device), end]  # [B,D]
        return penultimate, self.text_projection(self.final_layer_norm(x))

    def views(self):
        """Names of transformers' CLIPTextModelWithProjection."""
        return published(self, "text_model")

    @classmethod
    def from_pretrained(cls, source, device="cpu", dtype=None, component=None, project=True):
        """A folder or hub id with CLIPTextModelWithProjection, or CLIPTextModel if not `project`.

        component: its folder in a whole pipeline, e.g. `text_encoder`.
        """
        path = weights.find(source, component)
        entries = weights.index(path)
        if not project and not any(name.startswith("text_model.") for name in entries):
            # transformers 5 leaves out the first part of all names when it writes a CLIPTextModel.
            entries = {f"text_model.{name}": entry for name, entry in entries.items()}
        file = path / "config.json"
        config = tower_config(TextConfig, weights.read_config(file, len(entries)), file)
        make = functools.partial(cls, config, project)
        unused = ("*position_ids", "logit_scale")  # in some published files
        return weights.build(make, cls.views, entries, path, device, dtype, unused)


class VisionTower(nn.Module):
    def __init__(self, config):
        super().__init__()
        c = self.config = config
        tokens = (c.image_size // c.patch_size) ** 2 + 1
        self.class_embedding = nn.Parameter(torch.zeros(c.hidden_size))
        self.patch_embedding = nn.Conv2d(
            3, c.hidden_size, c.patch_size, stride=c.patch_size, bias=False)
        self.position_embedding = nn.Embedding(tokens, c.hidden_size)
        # "pre_layrnorm" is spelt so in every published file.
        self.pre_layrnorm = nn.LayerNorm(c.hidden_size, eps=c.layer_norm_eps)
        self.layers = nn.ModuleList(Layer(c) for _ in range(c.num_hidden_layers))
        self.post_layernorm = nn.LayerNorm(c.hidden_size, eps=c.layer_norm_eps)
        self.visual_projection = nn.Linear(c.hidden_size, c.projection_dim, bias=False)

    def forward(self, pixels):
        """Normalised pixels [B,3,S,S] -> embeddings [B,P], not normalised to length one."""
        x = self.patch_embedding(pixels).flatten(2).transpose(1, 2)  # [B,N-1,D]
        first = self.class_embedding.expand(len(x), 1, -1)  # [B,1,D]
        x = torch.cat([first, x], dim=1) + self.position_embedding.weight  # [B,N,D]
        x = self.pre_layrnorm(x)
        for layer in self.layers:
            x = layer(x, causal=False)
        return self.visual_projection(self.post_layernorm(x[:, 0]))

    def views(self):
        """Names of the image half of transformers' CLIPModel."""
        return published(self, "vision_model")


def published(tower, prefix):
    """Views of a tower: transformers groups embeddings and layers, and splits q, k and v."""
    table = (
        (r"^(\w+_embedding)", rf"{prefix}.embeddings.\1"),
        (r"^layers\.", f"{prefix}.encoder.layers."),
        (r"\.(\w+_proj)\.", r".self_attn.\1."),
        (r"\.(fc[12])\.", r".mlp.\1."),
        (r"^(final_layer_norm|pre_layrnorm|post_layernorm)\.", rf"{prefix}.\1."))
    fused = {"qkv_proj": ("q_proj", "k_proj", "v_proj")}
    return weights.renamed(weights.named_views(tower, fused), table)


def tower_config(kind, raw, path):
    """TextConfig or VisionConfig of a config.json; what it leaves out is as in transformers."""
    config = weights.fields_of(kind, raw)
    if config.hidden_act not in tuple(ACTIVATIONS):
        raise UserError(
            f"{path}: CLIP with hidden_act {config.hidden_act!r} is not supported; known are "
            f"{', '.join(ACTIVATIONS)}")
    if kind is TextConfig and raw.get("eos_token_id", 2) == 2:
        # Published files often say 2, which is wrong: CLIP's end token is its vocabulary's last.
        config = replace(config, eos_token_id=config.vocab_size - 1)
    wrong = None
    if config.hidden_size % config.num_attention_heads:
        wrong = "hidden_size is no multiple of num_attention_heads"
    elif kind is VisionConfig and config.patch_size > config.image_size:
        wrong = "patch_size is more than image_size"
    elif kind is TextConfig:
        end = config.eos_token_id
        if type(end) is not int or not 0 <= end < config.vocab_size:
            wrong = f"eos_token_id is {end!r:.80}, expected a whole number below vocab_size"
    if wrong:
        raise UserError(f"{path}: {wrong}; download it again")
    return config


class CLIP(nn.Module):
    """Both towers and the learned temperature of the contrastive loss."""

    def __init__(self, text, vision, processor=None):
        """processor: what the scores need to read pictures and prompts."""
        super().__init__()
        self.text = TextTower(text)
        self.vision = VisionTower(vision)
        self.processor = processor
        self.logit_scale = nn.Parameter(torch.tensor(2.6592))  # ln(1/0.07)

    def embed_text(self, ids):  # [B,L] -> unit vectors [B,P] float32
        return F.normalize(self.text(ids)[1].float(), dim=-1)

    def embed_images(self, pixels):  # [B,3,S,S] -> unit vectors [B,P] float32
        return F.normalize(self.vision(pixels).float(), dim=-1)

    def views(self):
        return {"logit_scale": [self.logit_scale], **self.text.views(), **self.vision.views()}

    @classmethod
    def from_pretrained(cls, source, device="cpu", dtype=None, processor=None):
        """A folder or hub id in the layout of transformers' CLIPModel (PickScore, …).

        processor: folder or hub id with the tokenizer and preprocessor_config.json, if `source`
        has none of its own, as PICKSCORE_PROCESSOR for yuvalkirstain/PickScore_v1. Without one the
        model embeds but does not score. Raises UserError.
        """
        path = weights.find(source)
        entries = weights.index(path)
        file = path / "config.json"
        raw = weights.read_config(file, len(entries))
        if "text_config" not in raw or "vision_config" not in raw:
            raise UserError(
                f"{file}: not a CLIP model with two towers; give a folder that holds a CLIPModel")
        shared = {"projection_dim": raw.get("projection_dim", 512)}
        text = tower_config(TextConfig, raw["text_config"] | shared, file)
        vision = tower_config(VisionConfig, raw["vision_config"] | shared, file)
        if processor is None and any((path / f).exists() for f in ("tokenizer.json", "vocab.json")):
            processor = path
        if processor is not None:
            processor = Processor.from_pretrained(processor, text, vision)
        make = functools.partial(cls, text, vision, processor)
        unused = ("*position_ids",)
        model = weights.build(make, cls.views, entries, path, device, dtype, unused)
        # The temperature stays float32: in bfloat16 one of 100 would be 98.9.
        model.logit_scale.data = model.logit_scale.data.float()
        scale = {"logit_scale": entries["logit_scale"]}
        weights.load({"logit_scale": [model.logit_scale]}, scale, path)
        return model


# --------------------------------------------------------------------------------------------------
# Scores


def load_pickscore(source, device):
    """PickScore from a folder or hub id."""
    return CLIP.from_pretrained(source, device, processor=pickscore_processor(source))


def pickscore_processor(source):
    """The hub id of PickScore's processor; as published it has none of its own. Else None."""
    complete = (Path(source).expanduser() / "preprocessor_config.json").exists()
    return None if complete else PICKSCORE_PROCESSOR


def files_of_pickscore(source):
    """What `load_pickscore` reads, for hub.fetch; of the source "none" nothing."""
    if source == "none":
        return []
    return [(source, ["*"]), (pickscore_processor(source), ["*.txt", "*.json"])]


def pick_score(model, images, prompts):
    """PickScore (Kirstain et al. 2023): exp(logit_scale) · cosine of pairs -> [B] float32.

    model: a CLIP with a processor. images: B PIL images, or uint8 [B,3,H,W], or their embeddings
    from `embed_pictures`. prompts: B strings, cut with a warning to the 77 tokens that the text
    tower reads. Raises ValueError, and UserError if the model has no processor.
    """
    return model.logit_scale.detach().exp() * cosines(model, images, prompts)


def cosines(model, images, prompts):
    """Cosine of the embeddings of picture i and prompt i -> [B] float32."""
    pictures = embed_pictures(model, images)
    if isinstance(prompts, str) or len(prompts) != len(pictures):
        raise ValueError(
            f"every picture needs its prompt: {len(pictures)} pictures, "
            f"{'one string' if isinstance(prompts, str) else len(prompts)} as prompts")
    unique = list(dict.fromkeys(prompts))  # a prompt of many pictures is embedded once
    rows = [unique.index(prompt) for prompt in prompts]
    return (pictures * embed_prompts(model, unique)[rows]).sum(dim=-1)


@torch.no_grad()
def embed_pictures(model, images):
    """B PIL images, or uint8 [B,3,H,W] -> unit vectors [B,P] float32.

    Every score takes these in place of the pictures. Raises ValueError, and UserError if the model
    has no processor.
    """
    if isinstance(images, torch.Tensor) and images.dim() == 2 and images.is_floating_point():
        return images
    pixels = preprocess(images, processor_of(model).image)
    return model.embed_images(pixels.to(model.vision.class_embedding))


@torch.no_grad()
def embed_prompts(model, prompts):
    """B strings -> unit vectors [B,P] float32."""
    ids = processor_of(model).tokenizer(prompts)
    return model.embed_text(ids.to(model.vision.class_embedding.device))


def processor_of(model):
    if model.processor is None:
        raise UserError(
            f"this CLIP has no tokenizer; load it with CLIP.from_pretrained(…, processor=…), for "
            f"PickScore with processor={PICKSCORE_PROCESSOR!r}")
    return model.processor
