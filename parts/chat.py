"""What Qwen2.5-VL reads: a conversation with pictures becomes tokens and patches.

In the order data meets it: pictures to patches, the chat template, the tokenizer, and `Processor`,
which joins them. `qwen_vl.py` goes on from a `Prompt`.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from parts import weights
from parts.cli import UserError
from parts.files import MOST_PIXELS, as_json, read_json, write_whole

IMAGE_TOKEN = 151_655  # published id of <|image_pad|>
TEMPLATE = Path(__file__).parent / "chat_template.jinja"  # `chat_text`, for other programs
CARRIED = (  # files of a folder that a processor read there is written with, too, as they are
    "tokenizer.json", "vocab.json", "merges.txt", "added_tokens.json", "special_tokens_map.json",
    "generation_config.json", "chat_template.jinja", "chat_template.json",
    "video_preprocessor_config.json", "preprocessor_config.json", "processor_config.json",
    "tokenizer_config.json")


# --------------------------------------------------------------------------------------------------
# Pictures


@dataclass(frozen=True)
class ImageConfig:
    patch: int = 14  # pixels
    frames: int = 2  # of one patch in time; a picture is shown twice
    merge: int = 2  # merge² patches become one token
    min_pixels: int = 56 * 56
    max_pixels: int = 28 * 28 * 16_384  # as published; lower it to save memory
    mean: tuple = (0.48145466, 0.4578275, 0.40821073)
    std: tuple = (0.26862954, 0.26130258, 0.27577711)


def smart_resize(height, width, factor, min_pixels, max_pixels):
    """[height, width] as multiples of `factor`, pixels in range, aspect ratio nearly kept.

    Raises ValueError if one side is more than 200 times the other.
    """
    sides = (height, width)
    if max(sides) > 200 * min(sides):
        raise ValueError(f"a picture of {width}×{height} pixels is more than 200 times as long as "
                         f"wide; crop it")
    rounded = [round(side / factor) * factor for side in sides]
    if math.prod(rounded) > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        return [max(factor, math.floor(side / shrink / factor) * factor) for side in sides]
    if math.prod(rounded) < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        return [math.ceil(side * grow / factor) * factor for side in sides]
    return rounded


def image_patches(image, c):
    """PIL image -> (patches [h·w, 3·frames·patch²] float32, grid (1, h, w)); c an ImageConfig.

    h, w: patches of the sides. The m·m patches of one merged token, m = merge, follow each other:
    that is the order of the vision tower's input.
    """
    image = image.convert("RGB")
    unit = c.patch * c.merge
    height, width = smart_resize(image.height, image.width, unit, c.min_pixels, c.max_pixels)
    if (width, height) != image.size:
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    # In float32 throughout, as the published processor computes.
    pixels = (np.asarray(image, np.float32) / 255 - np.float32(c.mean)) / np.float32(c.std)
    h = height // c.patch
    w = width // c.patch
    x = torch.from_numpy(pixels)  # [h·patch, w·patch, 3]
    x = x.view(h // c.merge, c.merge, c.patch, w // c.merge, c.merge, c.patch, 3)
    x = x.permute(0, 3, 1, 4, 6, 2, 5)  # [h/m, w/m, m, m, 3, patch, patch]
    # The tower reads patches of a film; a picture is a film of `frames` equal pictures.
    x = x.unsqueeze(5).expand(*x.shape[:5], c.frames, c.patch, c.patch)
    return x.reshape(h * w, -1), (1, h, w)


# --------------------------------------------------------------------------------------------------
# Chat template


def chat_text(messages):
    """A conversation as Qwen reads it, up to where its answer begins; a picture is <|image_pad|>.

    messages: [{"role": "system" | "user" | "assistant", "content": text, or a list of
    {"type": "text", "text": …} and {"type": "image", "image": PIL image}}]. Without a system
    message the published default is put in front. Raises ValueError for anything else.
    """
    if not messages or messages[0].get("role") != "system":
        messages = [{"role": "system", "content": "You are a helpful assistant."}, *messages]
    turns = []
    for message in messages:
        text = "".join(part_text(part) for part in parts_of(message))
        turns.append(f"<|im_start|>{message['role']}\n{text}<|im_end|>\n")
    return "".join(turns) + "<|im_start|>assistant\n"


def parts_of(message):
    """The texts and pictures of a message. Raises ValueError if it is none."""
    match message:
        case {"role": "system" | "user" | "assistant", "content": str(text)}:
            return [{"type": "text", "text": text}]
        case {"role": "system" | "user" | "assistant", "content": list(parts)}:
            return parts
    raise ValueError(f"a message needs a role (system, user, assistant) and content (text or a "
                     f"list of parts), got {str(message)[:80]}")


def part_text(part):
    match part:
        case {"type": "image", "image": Image.Image()}:
            return "<|vision_start|><|image_pad|><|vision_end|>"
        case {"type": "text", "text": str(text)} if "<|image_pad|>" not in text:
            return text
    raise ValueError(f"a part of a message is an image or a text without <|image_pad|>; got "
                     f"{str(part)[:80]}")


# --------------------------------------------------------------------------------------------------
# Tokenizer


WORDS = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
         r"|\s*[\r\n]+|\s+(?!\S)|\s+")
CONTROL = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>",
    "<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>",
    "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>")
TOOLS = (
    "<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>",
    "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>")
SPECIAL = CONTROL + TOOLS


def byte_bpe(vocab, merges, special=SPECIAL):
    """Qwen's tokenizer: byte-level BPE over words and single digits.

    vocab: {token: id}; merges: [(left, right)]. The special tokens follow the vocabulary in the
    order given. TOOLS are published as ordinary text, which stays in a decoded answer.
    """
    tokenizer = Tokenizer(models.BPE(vocab, merges))
    tokenizer.normalizer = normalizers.NFC()
    # Merges never cross the borders of these words; every digit is a word of its own.
    words = pre_tokenizers.Split(Regex(WORDS), behavior="isolated")
    letters = pre_tokenizers.ByteLevel(False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, letters])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens(
        [AddedToken(text, special=text not in TOOLS, normalized=False) for text in special])
    return tokenizer


def read_tokenizer(folder):
    """A folder's tokenizer: tokenizer.json, or vocab.json, merges.txt and the added tokens."""
    folder = Path(folder)

    def assemble(vocab, merges):
        added = read_json(folder / "tokenizer_config.json").get("added_tokens_decoder", {})
        special = [added[i]["content"] for i in sorted(added, key=int)] or SPECIAL
        return byte_bpe(vocab, merges, special)

    return weights.read_tokenizer(folder, assemble)


# --------------------------------------------------------------------------------------------------
# Both together


@dataclass(frozen=True)
class Prompt:
    """A conversation as tokens, ready for the model."""
    ids: torch.Tensor  # [L]
    pixels: torch.Tensor  # [patches of all its pictures, 3·frames·patch²]
    grids: tuple  # (1, h, w) of each picture, in patches


def read_image_config(folder, model):
    """The ImageConfig of a folder of Qwen2.5-VL, for its QwenVLConfig. Raises UserError."""
    file = weights.image_file(folder)
    raw = weights.read_config(file)
    raw = raw.get("image_processor", raw)
    size = raw.get("size") if isinstance(raw.get("size"), dict) else {}
    given = {
        "patch": raw.get("patch_size"), "frames": raw.get("temporal_patch_size"),
        "merge": raw.get("merge_size"), "mean": raw.get("image_mean"), "std": raw.get("image_std"),
        "min_pixels": raw.get("min_pixels", size.get("shortest_edge")),
        "max_pixels": raw.get("max_pixels", size.get("longest_edge"))}
    config = ImageConfig(**{name: tuple(value) if isinstance(value, list) else value
                            for name, value in given.items() if value is not None})
    fits = {
        "patch_size": config.patch == model.patch, "merge_size": config.merge == model.merge,
        "temporal_patch_size": config.frames == model.frames,
        "image_mean": len(config.mean) == 3, "image_std": len(config.std) == 3,
        "min_pixels or max_pixels": config.min_pixels <= config.max_pixels <= MOST_PIXELS}
    if not all(fits.values()):
        wrong = ", ".join(name for name, holds in fits.items() if not holds)
        raise UserError(f"{file}: {wrong} cannot be those of this model; give the processor that "
                        f"belongs to it")
    return config


def stop_of(folder, vocab):
    """The ids, below vocab, that end an answer by generation_config.json; None if it says none."""
    file = folder / "generation_config.json"
    stop = read_json(file).get("eos_token_id") if file.exists() else None
    if stop is None:
        return None
    ids = stop if isinstance(stop, list) else [stop]
    if not all(type(i) is int and 0 <= i < vocab for i in ids):
        raise UserError(f"{file}: eos_token_id is {stop!r:.80}, expected whole numbers below "
                        f"{vocab:,}; download it again")
    return ids


class Processor:
    """Conversations to prompts."""

    def __init__(self, tokenizer, image=ImageConfig(), image_token=IMAGE_TOKEN, stop=None):
        """stop: ids that end an answer; by default those of <|im_end|> and <|endoftext|>."""
        self.tokenizer = tokenizer
        self.image = image
        self.image_token = image_token
        self.source = None  # the folder that it was read from
        self.stop = tuple(stop or map(tokenizer.token_to_id, ("<|im_end|>", "<|endoftext|>")))
        tokenizer.no_padding()
        tokenizer.no_truncation()

    def __call__(self, messages):
        """One conversation -> Prompt. Raises ValueError for a malformed one."""
        # Only a picture's size tells how many tokens it is, so the text is cut where it stands.
        text, *following = chat_text(messages).split("<|image_pad|>")
        parts = [part for message in messages for part in parts_of(message)]
        images = [part["image"] for part in parts if part["type"] == "image"]
        patches = [torch.empty(0, 3 * self.image.frames * self.image.patch**2)]
        grids = []
        for image, piece in zip(images, following, strict=True):
            own, (_, h, w) = image_patches(image, self.image)
            patches.append(own)
            grids.append((1, h, w))
            # The picture's features will stand at these tokens, one for each m·m patches.
            text += "<|image_pad|>" * (h * w // self.image.merge**2) + piece
        ids = self.tokenizer.encode(text, add_special_tokens=False).ids
        return Prompt(torch.tensor(ids), torch.cat(patches), tuple(grids))

    def take_image_config(self, folder, model):
        """Read the settings of pictures of an adapter's folder, if it has any: it may have been
        trained on smaller ones. model: the QwenVLConfig. Raises UserError."""
        if weights.image_file(folder).exists():
            self.image = read_image_config(folder, model)

    def decode(self, ids):
        """Tokens -> text, without special tokens."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=True)

    @classmethod
    def from_pretrained(cls, folder, model):
        """The processor of a folder of Qwen2.5-VL. model: its QwenVLConfig. Raises UserError."""
        folder = Path(folder)
        tokenizer = read_tokenizer(folder)
        weights.check_vocabulary(tokenizer, model.vocab, folder)
        found = tokenizer.id_to_token(model.image_token)
        if found != "<|image_pad|>":
            raise UserError(f"{folder}: token {model.image_token} of its tokenizer is {found!r}, "
                            f"expected '<|image_pad|>'; model and tokenizer are of different "
                            f"checkpoints")
        image = read_image_config(folder, model)
        processor = cls(tokenizer, image, model.image_token, stop_of(folder, model.vocab))
        if None in processor.stop:
            raise UserError(f"{folder}: its generation_config.json has no eos_token_id, and its "
                            f"tokenizer no <|im_end|>; download it again")
        processor.source = folder
        return processor

    def save_pretrained(self, folder):
        """Write the tokenizer and what else from_pretrained reads, in the published layout, and the
        chat template, which transformers and servers of models want.

        The files of the folder that this processor was read from are carried over. Only of the
        settings of pictures ours count, for training may have changed them.
        """
        folder = Path(folder)
        # 1. what there was
        source = self.source
        names = [name for name in CARRIED if source and (source / name).exists()]
        files = {name: (source / name).read_bytes() for name in names}
        # 2. the settings of pictures
        image = self.image
        file = weights.image_file(source).name if names else "preprocessor_config.json"
        whole = json.loads(files.get(file, "{}"))
        settings = {
            "image_processor_type": "Qwen2VLImageProcessor", **whole.get("image_processor", whole),
            "patch_size": image.patch, "temporal_patch_size": image.frames,
            "merge_size": image.merge, "min_pixels": image.min_pixels,
            "max_pixels": image.max_pixels, "image_mean": list(image.mean),
            "image_std": list(image.std)}
        settings.pop("size", None)  # another name for min_pixels and max_pixels
        if "image_processor" in whole:
            settings = whole | {"image_processor": settings}
        settings["processor_class"] = "Qwen2_5_VLProcessor"
        files[file] = as_json(settings)
        # 3. what there was not
        files.setdefault("generation_config.json", as_json({
            "eos_token_id": list(self.stop), "pad_token_id": self.stop[-1]}))
        if "vocab.json" not in files:
            files.setdefault("tokenizer.json", self.tokenizer.to_str())
        files.setdefault("tokenizer_config.json", as_json({
            "tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>"}))
        in_config = "chat_template" in json.loads(files["tokenizer_config.json"])
        if not in_config and files.keys().isdisjoint({"chat_template.jinja", "chat_template.json"}):
            files["chat_template.jinja"] = TEMPLATE.read_text(encoding="utf-8")
        # 4. the tokenizer's configuration last: a folder that has one is whole
        for name in sorted(files, key=CARRIED.index):
            write_whole(folder / name, files[name])
