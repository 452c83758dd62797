"""Qwen2.5-VL, the judge: a picture and a question in, an answer in words out (Bai et al. 2025; EmoFeedback², section 3.1).

In the order data meets it: image processor, chat template and tokenizer, vision tower (window attention, full attention
in a few blocks, patch merger), language model (grouped queries, M-RoPE, SwiGLU), generation, loading.

All layers see one flat list of tokens without padding; only attention knows which of them belong together. That
knowledge is a function `attend(layer, q, k, v)`: `Sequences` for whole sequences, `StaticCache` for generation (one
prefill of a prompt serves its n completions), `SharedPrompts` for training (one pass over a prompt serves its G
completions). Left out: video, sliding windows, beam search, and the repetition penalty of the published defaults.

Shapes: N tokens in the list, B sequences, L tokens of a sequence, P prompts, G completions of each, C tokens of a
completion, D width, H heads, K key-value heads, E channels of one head, V vocabulary.
"""

import functools
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from torch import nn
from torch.utils.checkpoint import checkpoint

from parts import lora, ops, weights
from parts.cli import UserError
from parts.files import read_json, write_json


@dataclass(frozen=True)
class QwenVLConfig:
    width: int = 3584
    layers: int = 28
    heads: int = 28
    kv_heads: int = 4
    mlp: int = 18_944
    vocab: int = 152_064
    tied: bool = False  # the head is the embedding
    eps: float = 1e-6
    theta: float = 1e6
    sections: tuple = (16, 24, 24)  # of a head's angles: time, height, width
    vision_width: int = 1280
    vision_layers: int = 32
    vision_heads: int = 16
    vision_mlp: int = 3420
    patch: int = 14
    frames: int = 2  # of one patch in time; a picture is shown twice
    merge: int = 2  # merge² patches become one token
    window: int = 112  # pixels
    full_blocks: tuple = (7, 15, 23, 31)  # vision blocks with attention over the whole picture
    image_token: int = 151_655

    @property
    def head_dim(self):
        return self.width // self.heads


QWEN25_VL_7B = QwenVLConfig()
QWEN25_VL_3B = QwenVLConfig(width=2048, layers=36, heads=16, kv_heads=2, mlp=11_008, vocab=151_936, tied=True)


# ---------------------------------------------------------------------------------------------------------------------
# Image processor


@dataclass(frozen=True)
class ImageConfig:
    patch: int = 14
    frames: int = 2
    merge: int = 2
    min_pixels: int = 56 * 56
    max_pixels: int = 28 * 28 * 16_384  # as published; lower it to save memory
    mean: tuple = (0.48145466, 0.4578275, 0.40821073)
    std: tuple = (0.26862954, 0.26130258, 0.27577711)


def smart_resize(height, width, factor, min_pixels, max_pixels):
    """(height, width) as multiples of `factor` with the pixels in range and the aspect ratio nearly kept.

    Raises ValueError if one side is more than 200 times the other.
    """
    if max(height, width) > 200 * min(height, width):
        raise ValueError(f"a picture of {width}×{height} pixels is more than 200 times as long as wide; crop it")
    tall, wide = round(height / factor) * factor, round(width / factor) * factor
    if tall * wide > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        tall = max(factor, math.floor(height / shrink / factor) * factor)
        wide = max(factor, math.floor(width / shrink / factor) * factor)
    elif tall * wide < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        tall, wide = math.ceil(height * grow / factor) * factor, math.ceil(width * grow / factor) * factor
    return tall, wide


def image_patches(image, c):
    """PIL image -> (patches [h·w, 3·frames·patch²] float32, grid (1, h, w)), c an ImageConfig.

    The patches of one merged token follow each other: that is the order of the vision tower's input.
    """
    image = image.convert("RGB")
    height, width = smart_resize(image.height, image.width, c.patch * c.merge, c.min_pixels, c.max_pixels)
    if (height, width) != (image.height, image.width):
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    pixels = (np.asarray(image, np.float32) / 255 - np.float32(c.mean)) / np.float32(c.std)  # [h·patch, w·patch, 3]
    h, w = height // c.patch, width // c.patch
    x = torch.from_numpy(pixels).view(h // c.merge, c.merge, c.patch, w // c.merge, c.merge, c.patch, 3)
    x = x.permute(0, 3, 1, 4, 6, 2, 5)  # [h/m, w/m, m, m, 3, patch, patch]
    x = x.unsqueeze(5).expand(*x.shape[:5], c.frames, c.patch, c.patch)
    return x.reshape(h * w, -1), (1, h, w)


# ---------------------------------------------------------------------------------------------------------------------
# Chat template and tokenizer


WORDS = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
         r"|\s+(?!\S)|\s+")
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>",
           "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
           "<|image_pad|>", "<|video_pad|>", "<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>",
           "<|fim_suffix|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>")


def byte_bpe(vocab, merges, special=SPECIAL):
    """Qwen's tokenizer: byte-level BPE over words and single digits. vocab {token: id}, merges [(left, right)].

    The special tokens follow the vocabulary in the order given. Those of tool calls and code files are published as
    ordinary text, which stays in a decoded answer.
    """
    tokenizer = Tokenizer(models.BPE(vocab, merges))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(WORDS), behavior="isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([AddedToken(t, special=t not in SPECIAL[14:], normalized=False) for t in special])
    return tokenizer


def read_tokenizer(folder):
    """A folder's tokenizer: tokenizer.json, or vocab.json, merges.txt and the added tokens of tokenizer_config.json."""
    folder = Path(folder)
    try:
        if (folder / "tokenizer.json").exists():
            return Tokenizer.from_file(str(folder / "tokenizer.json"))
        added = read_json(folder / "tokenizer_config.json").get("added_tokens_decoder", {})
        special = [added[i]["content"] for i in sorted(added, key=int)] or SPECIAL
        return byte_bpe(read_json(folder / "vocab.json"), weights.read_merges(folder / "merges.txt"), special)
    except UserError:
        raise
    except Exception as error:  # tokenizers raises plain Exception for a malformed file
        raise UserError(f"{folder}: its tokenizer cannot be read ({error}); download it again") from error


def chat_text(messages, answer=True):
    """A conversation as Qwen reads it. Each picture is one `<|image_pad|>`; `answer` opens the assistant's turn.

    messages: [{"role": "system" | "user" | "assistant", "content": text, or a list of
    {"type": "text", "text": …} and {"type": "image", "image": PIL image}}]. Without a system message the published
    default is put in front. Raises ValueError for anything else.
    """
    if not messages or messages[0].get("role") != "system":
        messages = [{"role": "system", "content": "You are a helpful assistant."}, *messages]
    turns = []
    for message in messages:
        role, content = message.get("role"), message.get("content")
        if role not in ("system", "user", "assistant") or not isinstance(content, (str, list)):
            raise ValueError(f"a message needs a role (system, user, assistant) and content (text or a list of parts), "
                             f"got {role!r} and {type(content).__name__}")
        text = ""
        for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
            kind, own = (part.get("type"), part.get("text")) if isinstance(part, dict) else (None, None)
            if kind == "image" and isinstance(part.get("image"), Image.Image):
                text += "<|vision_start|><|image_pad|><|vision_end|>"
            elif kind == "text" and isinstance(own, str) and "<|image_pad|>" not in own:
                text += own
            else:
                raise ValueError("a part of a message is an image or a text without <|image_pad|>; "
                                 f"got {str(part)[:80]}")
        turns.append(f"<|im_start|>{role}\n{text}<|im_end|>\n")
    return "".join(turns) + ("<|im_start|>assistant\n" if answer else "")


@dataclass(frozen=True)
class Prompt:
    """A conversation as tokens, ready for the model."""
    ids: torch.Tensor  # [L]
    pixels: torch.Tensor  # [patches of all its pictures, 3·frames·patch²]
    grids: tuple  # (1, h, w) of each picture, in patches


class Processor:
    """Conversations to prompts, and tokens back to text."""

    def __init__(self, tokenizer, image=ImageConfig(), image_token=QwenVLConfig.image_token, stop=None):
        """stop: ids that end an answer; by default those of <|im_end|> and <|endoftext|>."""
        self.tokenizer, self.image, self.image_token = tokenizer, image, image_token
        tokenizer.no_padding()
        tokenizer.no_truncation()
        if tokenizer.id_to_token(image_token) != "<|image_pad|>":
            raise UserError(f"token {image_token} of the tokenizer is {tokenizer.id_to_token(image_token)!r}, "
                                          f"expected '<|image_pad|>'; model and tokenizer are of different checkpoints")
        self.stop = tuple(stop or (tokenizer.token_to_id(t) for t in ("<|im_end|>", "<|endoftext|>")))

    def __call__(self, messages, answer=True):
        """One conversation -> Prompt. Raises ValueError for a malformed one."""
        text = chat_text(messages, answer)
        parts = [part for m in messages if isinstance(m.get("content"), list) for part in m["content"]]
        pictures = [image_patches(part["image"], self.image) for part in parts if part.get("type") == "image"]
        ids, grids = [], iter(pictures)
        for token in self.tokenizer.encode(text, add_special_tokens=False).ids:
            if token == self.image_token:
                _, (_, h, w) = next(grids)
                ids += [token] * (h * w // self.image.merge**2)
            else:
                ids.append(token)
        patch = 3 * self.image.frames * self.image.patch**2
        pixels = torch.cat([p for p, _ in pictures]) if pictures else torch.empty(0, patch)
        return Prompt(torch.tensor(ids), pixels, tuple(grid for _, grid in pictures))

    def decode(self, ids):
        """Tokens -> text, without special tokens."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=True)

    @classmethod
    def from_pretrained(cls, source, image_token=QwenVLConfig.image_token):
        folder = Path(weights.find(source))
        name = next((n for n in ("preprocessor_config.json", "processor_config.json") if (folder / n).exists()),
                    "preprocessor_config.json")
        raw = read_json(folder / name)
        raw = raw.get("image_processor", raw)
        size, default = raw.get("size") or {}, ImageConfig()
        image = ImageConfig(
            raw.get("patch_size", default.patch), raw.get("temporal_patch_size", default.frames),
            raw.get("merge_size", default.merge), raw.get("min_pixels") or size.get("shortest_edge", default.min_pixels),
            raw.get("max_pixels") or size.get("longest_edge", default.max_pixels),
            tuple(raw.get("image_mean", default.mean)), tuple(raw.get("image_std", default.std)))
        stop = None
        if (folder / "generation_config.json").exists():
            stop = read_json(folder / "generation_config.json").get("eos_token_id")
            stop = [stop] if isinstance(stop, int) else stop
        return cls(read_tokenizer(folder), image, image_token, stop)


# ---------------------------------------------------------------------------------------------------------------------
# Vision tower


def window_order(grids, merge, window):
    """How window attention sees the merged tokens of all pictures.

    grids: [(1, h, w)]; window: side in merged tokens. Returns (order [merged tokens], lengths of the windows in merged
    tokens). `order` lists window after window, in each picture those of equal length together: attention then runs on
    a few large batches.
    """
    order, lengths, start = [], [], 0
    for _, h, w in grids:
        rows, columns = h // merge, w // merge
        index = torch.arange(rows * columns).view(rows, columns) + start
        windows = [index[i:i + window, j:j + window].flatten()
                   for i in range(0, rows, window) for j in range(0, columns, window)]
        windows.sort(key=len)
        order += windows
        lengths += [len(w) for w in windows]
        start += rows * columns
    return torch.cat(order), lengths


def runs(lengths):
    """Lengths of consecutive sequences -> [(count, length)] of consecutive equal ones."""
    out = []
    for length in lengths:
        if out and out[-1][1] == length:
            out[-1] = (out[-1][0] + 1, length)
        else:
            out.append((1, length))
    return out


def attend_runs(q, k, v, sequence_runs, causal):
    """Attention within each sequence of a flat list. q [N,H,E], k, v [N,K,E] -> [N,H·E]."""
    out, start, groups = [], 0, q.shape[1] // k.shape[1]
    for count, length in sequence_runs:
        end = start + count * length
        q_, k_, v_ = (t[start:end].view(count, length, *t.shape[1:]).transpose(1, 2) for t in (q, k, v))  # [count,H,L,E]
        if groups > 1:
            k_, v_ = k_.repeat_interleave(groups, 1), v_.repeat_interleave(groups, 1)
        out.append(ops.attention(q_, k_, v_, causal=causal).flatten(0, 1))
        start = end
    return torch.cat(out) if len(out) > 1 else out[0]


class VisionBlock(nn.Module):
    def __init__(self, c):
        super().__init__()
        D = c.vision_width
        self.norm1, self.norm2 = ops.RMSNorm(D), ops.RMSNorm(D)
        self.qkv, self.out = nn.Linear(D, 3 * D), nn.Linear(D, D)
        self.gate_up, self.down = nn.Linear(D, 2 * c.vision_mlp), nn.Linear(c.vision_mlp, D)
        self.heads = c.vision_heads

    def forward(self, x, cos, sin, sequence_runs):  # x [N,D]; cos, sin [N,1,E] float32
        q, k, v = ops.split_rotate(self.qkv(self.norm1(x)), self.heads, self.heads, cos, sin)  # each [N,H,E]
        x = x + self.out(attend_runs(q, k, v, sequence_runs, causal=False))
        return x + self.down(ops.swiglu(self.gate_up(self.norm2(x))))


class VisionTower(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.config = c
        merged = c.vision_width * c.merge**2
        self.patches = nn.Linear(3 * c.frames * c.patch**2, c.vision_width, bias=False)
        self.blocks = nn.ModuleList(VisionBlock(c) for _ in range(c.vision_layers))
        self.norm = ops.RMSNorm(c.vision_width)
        self.merge1, self.merge2 = nn.Linear(merged, merged), nn.Linear(merged, c.width)

    def forward(self, pixels, grids):
        """pixels [patches, 3·frames·patch²], grids [(1, h, w)] -> one vector [D] for each merge² patches."""
        c, unit = self.config, self.config.merge**2
        order, lengths = window_order(grids, c.merge, c.window // c.patch // c.merge)
        order = order.to(pixels.device)
        windows = runs([n * unit for n in lengths])
        pictures = runs([h * w for _, h, w in grids])
        cos, sin = (t.to(pixels.device).view(len(order), unit, -1)[order].view(len(pixels), 1, -1)
                    for t in vision_angles(grids, c.merge, c.vision_width // c.vision_heads))
        x = self.patches(pixels.to(self.patches.weight.dtype))
        x = x.view(len(order), unit, -1)[order].flatten(0, 1)  # window after window
        for i, block in enumerate(self.blocks):
            x = block(x, cos, sin, pictures if i in c.full_blocks else windows)
        x = self.norm(x).view(len(order), -1)  # [N/merge², merge²·D]
        x = self.merge2(F.gelu(self.merge1(x)))
        return x[order.argsort()]  # back to reading order


def vision_angles(grids, merge, head_dim):
    """(cos, sin) [N,E] of 2-D rotary positions: a quarter of a head turns with the row, a quarter with the column."""
    frequencies = 10_000.0 ** (-torch.arange(0, head_dim // 2, 2).float() / (head_dim // 2))  # [E/4]
    rows, columns = [], []
    for _, h, w in grids:
        row, column = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
        for place, out in ((row, rows), (column, columns)):
            out.append(place.reshape(h // merge, merge, w // merge, merge).transpose(1, 2).flatten())
    angles = torch.cat([torch.cat(p).float()[:, None] * frequencies for p in (rows, columns)], dim=-1)  # [N,E/2]
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


# ---------------------------------------------------------------------------------------------------------------------
# Language model


def position_ids(ids, grids, c):
    """M-RoPE positions [3,L] (time, height, width) of one sequence: text counts up in all three, a picture spans its grid.

    ids [L]; grids: (1, h, w) of its pictures in order. The text after a picture goes on from the greater side.
    """
    out, at, left, i = [], 0, iter(grids), 0
    is_image = (ids == c.image_token).tolist()
    while i < len(is_image):
        if is_image[i]:
            _, h, w = next(left, (0, 0, 0))
            if not h:
                raise ValueError("more image tokens than the pictures need; the grids do not belong to these ids")
            h, w = h // c.merge, w // c.merge
            row, column = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
            out.append(torch.stack([torch.zeros(h * w, dtype=torch.long), row.flatten(), column.flatten()]) + at)
            at, i = at + max(h, w), i + h * w
        else:
            end = i + 1
            while end < len(is_image) and not is_image[end]:
                end += 1
            out.append(torch.arange(at, at + end - i).expand(3, -1))
            at, i = at + end - i, end
    return torch.cat(out, dim=1)


def text_angles(positions, c, dtype):
    """(cos, sin) [N,1,E] of M-RoPE positions [3,N]: each section of a head's angles follows one of the three."""
    E = c.head_dim
    frequencies = c.theta ** (-torch.arange(0, E, 2, device=positions.device).float() / E)  # [E/2]
    angles = (positions[..., None].float() * frequencies).split(c.sections, dim=-1)  # 3 of [3,N,section]
    angles = torch.cat([part[i] for i, part in enumerate(angles)], dim=-1)  # [N,E/2]
    angles = torch.cat([angles, angles], dim=-1)[:, None]
    return angles.cos().to(dtype), angles.sin().to(dtype)


class Block(nn.Module):
    def __init__(self, c):
        super().__init__()
        D, self.split = c.width, (c.heads, c.kv_heads, c.kv_heads)
        self.norm1, self.norm2 = ops.RMSNorm(D, c.eps), ops.RMSNorm(D, c.eps)
        self.qkv = nn.Linear(D, sum(self.split) * c.head_dim)
        self.out = nn.Linear(D, D, bias=False)
        self.gate_up, self.down = nn.Linear(D, 2 * c.mlp, bias=False), nn.Linear(c.mlp, D, bias=False)

    def forward(self, x, cos, sin, attend):  # x [N,D]; cos, sin [N,1,E]
        x = x + self.out(attend(*ops.split_rotate(self.qkv(self.norm1(x)), *self.split[:2], cos, sin)))
        return x + self.down(ops.swiglu(self.gate_up(self.norm2(x))))


class Sequences:
    """Causal attention within each of several whole sequences."""

    def __init__(self, lengths):
        self.runs = runs(lengths)

    def __call__(self, layer, q, k, v):
        return attend_runs(q, k, v, self.runs, causal=True)


class StaticCache:
    """Keys and values while answers are generated: of P prompts, once each, written by one prefill, and of the new tokens of
    their P·n completions. Memory is allocated once; shorter prompts are padded, and a mask hides that.

    fixed: every step has the same shapes and is at `place`, a tensor, as a CUDA graph needs it; attention then goes over the
    room of tokens to come too, hidden.
    """

    def __init__(self, c, lengths, n, new_tokens, device, dtype, fixed=False):
        self.lengths, self.longest, self.new_tokens, self.prefilled = lengths, max(lengths), new_tokens, False
        self.prompts = Sequences(lengths)

        def room(rows, tokens):
            return torch.zeros(c.layers, rows, c.kv_heads, tokens, c.head_dim, device=device, dtype=dtype)

        self.prompt_k, self.prompt_v = (room(len(lengths), self.longest) for _ in "kv")
        self.k, self.v = (room(len(lengths) * n, new_tokens) for _ in "kv")
        self.padding = None
        if min(lengths) < self.longest:
            own = torch.tensor(lengths, device=device)[:, None]
            self.padding = F.pad(torch.arange(self.longest, device=device) >= own, (0, new_tokens))  # [P,L+new tokens]
        self.steps = torch.arange(new_tokens, device=device) if fixed else None

    def go_to(self, place):
        """The next tokens are the place-th of their rows, counted from 0: a tensor [1] if fixed, else a number."""
        self.place, self.end = place, self.new_tokens if self.steps is not None else place + 1
        self.hidden = None if self.padding is None else self.padding[:, :self.longest + self.end]
        if self.steps is not None:
            to_come = F.pad(self.steps > place, (self.longest, 0))[None]  # [1,L+new tokens]
            self.hidden = to_come if self.hidden is None else self.hidden | to_come
        return self

    def __call__(self, layer, q, k, v):
        if not self.prefilled:
            return self.prefill(layer, q, k, v)
        for cache, new in ((self.k, k), (self.v, v)):
            if self.steps is None:
                cache[layer, :, :, self.place] = new  # [rows,K,E]
            else:
                cache[layer].index_copy_(2, self.place, new[:, :, None])
        return ops.attend_shared(q, self.prompt_k[layer], self.prompt_v[layer], self.k[layer, :, :, :self.end],
                                     self.v[layer, :, :, :self.end], self.hidden)

    def prefill(self, layer, q, k, v):
        for cache, flat in ((self.prompt_k, k), (self.prompt_v, v)):
            for p, own in enumerate(flat.split(self.lengths)):
                cache[layer, p, :, :len(own)] = own.transpose(0, 1)  # [K,L,E]
        self.prefilled = layer == len(self.k) - 1
        return self.prompts(layer, q, k, v)


class SharedPrompts:
    """P prompts, then G completions of each, padded to C tokens: each sees its prompt and its own past."""

    def __init__(self, lengths, G, C, device):
        self.prompts, self.total, self.G, self.C = Sequences(lengths), sum(lengths), G, C
        self.masks = {n: torch.ones(C, n + C, dtype=torch.bool, device=device).tril(n) for n in set(lengths)}

    def __call__(self, layer, q, k, v):
        G, C, start, row = self.G, self.C, 0, 0
        out = [self.prompts(layer, q[:self.total], k[:self.total], v[:self.total])]
        if not C:
            return out[0]
        groups = q.shape[1] // k.shape[1]
        own = [t[self.total:].view(-1, G, C, *t.shape[1:]) for t in (q, k, v)]  # [P,G,C,·,E]
        for count, length in self.prompts.runs:
            end, queries = start + count * length, own[0][row:row + count].flatten(0, 1)
            keys, values = (
                torch.cat([t[start:end].view(count, 1, length, *t.shape[1:]).expand(-1, G, -1, -1, -1),
                           mine[row:row + count]], dim=2).flatten(0, 1).repeat_interleave(groups, 2).transpose(1, 2)
                for t, mine in zip((k, v), own[1:], strict=True))  # [count·G,H,length+C,E]
            out.append(ops.attention(queries.transpose(1, 2), keys, values, mask=self.masks[length]).flatten(0, 1))
            start, row = end, row + count
        return torch.cat(out)


class QwenVL(nn.Module):
    def __init__(self, config=QWEN25_VL_7B, processor=None):
        super().__init__()
        c = self.config = config
        self.visual = VisionTower(c)
        self.tokens = nn.Embedding(c.vocab, c.width)
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.layers))
        self.norm = ops.RMSNorm(c.width, c.eps)
        self.head = None if c.tied else nn.Linear(c.width, c.vocab, bias=False)
        self.processor = processor
        self.checkpointing = False  # recompute the blocks in the backward pass
        self.graphs = False  # generate by a CUDA graph: fewer launches for the host, attention over room still empty

    @property
    def head_weight(self):
        """[V,D]: the head, or the embedding if they are tied."""
        return self.tokens.weight if self.head is None else self.head.weight

    def logits(self, hidden):
        return F.linear(hidden, self.head_weight)

    def trunk(self, ids, positions, attend, pixels=None, grids=(), answers=False):
        """ids [N], positions [3,N], pictures in the order of their tokens -> hidden states [N,D] after the last norm.

        answers: what follows the prompts may hold image tokens that a model wrote; they stand for no picture.
        """
        x = self.tokens(ids)
        if grids:
            features = self.visual(pixels, grids).to(x.dtype)
            holes = (ids == self.config.image_token).nonzero()[:, 0]
            if len(holes) < len(features) or (len(holes) > len(features) and not answers):
                raise ValueError(f"{len(holes)} image tokens for pictures that need {len(features)}; the grids do not "
                                 f"belong to these ids")
            x = x.index_copy(0, holes[:len(features)], features)
        cos, sin = text_angles(positions, self.config, x.dtype)
        for i, block in enumerate(self.blocks):
            inner = functools.partial(attend, i)
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, cos, sin, inner, use_reentrant=False)
            else:
                x = block(x, cos, sin, inner)
        return self.norm(x)

    def forward(self, input_ids, pixel_values=None, image_grid_thw=None, attention_mask=None):
        """Logits [B,L,V] of whole sequences.

        input_ids [B,L]; pixel_values [patches, 3·frames·patch²] and image_grid_thw [pictures, 3] of all pictures, in the
        order of their tokens; attention_mask [B,L]: 0 marks padding, on either side, whose logits are 0.
        """
        keep = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
        grids = () if image_grid_thw is None else tuple(tuple(map(int, grid)) for grid in image_grid_thw)
        positions, left = [], list(grids)
        for row, kept in zip(input_ids, keep, strict=True):
            own = row[kept]
            tokens = int((own == self.config.image_token).sum())
            mine = []
            while tokens > 0 and left:
                mine.append(left.pop(0))
                tokens -= mine[-1][1] * mine[-1][2] // self.config.merge**2
            positions.append(position_ids(own.cpu(), mine, self.config))
        hidden = self.trunk(input_ids[keep], torch.cat(positions, dim=1).to(input_ids.device),
                            Sequences(keep.sum(1).tolist()), pixel_values, grids)
        logits = hidden.new_zeros(*input_ids.shape, self.config.vocab)
        logits[keep] = self.logits(hidden)
        return logits

    def completion_hidden(self, prompts, completions):
        """Hidden states [P,G,C,D] from which each token of the completions is predicted; one pass over each prompt.

        prompts: P of Prompt; completions [P,G,C], padded on the right by any token.
        """
        (P, G, C), device = completions.shape, completions.device
        lengths = [len(p.ids) for p in prompts]
        at = [position_ids(p.ids, p.grids, self.config) for p in prompts]
        own = torch.arange(C - 1)
        at += [(a.max() + 1 + own).repeat(G).expand(3, -1) for a in at]
        ids = torch.cat([*(p.ids.to(device) for p in prompts), completions[:, :, :-1].flatten()])
        hidden = self.trunk(ids, torch.cat(at, dim=1).to(device), SharedPrompts(lengths, G, C - 1, device),
                            torch.cat([p.pixels for p in prompts]).to(device), sum((p.grids for p in prompts), ()), True)
        last = torch.tensor(lengths, device=device).cumsum(0) - 1
        first = hidden[last].view(P, 1, 1, -1).expand(-1, G, -1, -1)  # the prompt's last token predicts the first one
        return torch.cat([first, hidden[sum(lengths):].view(P, G, C - 1, hidden.shape[-1])], dim=2)

    # -----------------------------------------------------------------------------------------------------------------
    # Generation

    @torch.no_grad()
    def generate(self, messages, n=1, max_new_tokens=512, temperature=1.0, top_p=1.0, generator=None, progress=iter):
        """n answers to each of P conversations -> list of P lists of n Completion.

        messages: P conversations as in `chat_text`, or Prompts. temperature 0 takes the likeliest token. generator: of the
        samples; one for all, or a list of one for each conversation, whose answers then do not depend on the others.
        progress: wraps the steps, e.g. in tqdm. Raises ValueError for settings out of range.
        """
        if n < 1 or max_new_tokens < 1 or temperature < 0 or not 0 < top_p <= 1:
            raise ValueError(f"expected n >= 1, max_new_tokens >= 1, temperature >= 0, 0 < top_p <= 1; got {n}, "
                             f"{max_new_tokens}, {temperature}, {top_p}")
        if not messages or isinstance(messages[0], dict):
            raise ValueError("expected a list of conversations, each of them a list of messages")
        prompts = [m if isinstance(m, Prompt) else self.processor(m) for m in messages]
        P, device, dtype = len(prompts), self.tokens.weight.device, self.tokens.weight.dtype
        generators = generator if isinstance(generator, (list, tuple)) else [generator] * P
        if len(generators) != P:
            raise ValueError(f"expected one generator or a list of {P}, one for each conversation; got {len(generators)}")
        luck = torch.stack([torch.rand(n, max_new_tokens, generator=g) for g in generators]).flatten(0, 1).to(device)
        lengths, sharded = [len(p.ids) for p in prompts], ops.is_sharded(self)
        graph = self.graphs and not sharded
        cache = StaticCache(self.config, lengths, n, max_new_tokens, device, dtype, fixed=graph)
        positions = [position_ids(p.ids, p.grids, self.config) for p in prompts]
        with ops.all_laid_out(self, copy=False):
            hidden = self.trunk(torch.cat([p.ids for p in prompts]).to(device), torch.cat(positions, dim=1).to(device),
                                cache, torch.cat([p.pixels for p in prompts]).to(device),
                                sum((p.grids for p in prompts), ()))
        last = torch.tensor(lengths, device=device).cumsum(0) - 1
        token, log_prob = sample(self.logits(hidden[last]).repeat_interleave(n, dim=0), temperature, top_p, luck[:, 0])
        after = torch.tensor([int(p.max()) + 1 for p in positions], device=device).repeat_interleave(n)  # [P·n]
        stop, steps = torch.tensor(self.processor.stop, device=device), [(token, log_prob)]
        done, wait = torch.isin(token, stop), 16 if device.type == "cuda" else 1  # steps between looks at what a GPU has
        with ops.all_laid_out(self.blocks):
            head = self.logits if sharded else ops.laid_out(self.head_weight)

            def following(token, at, place, luck):
                """(token [P·n], log-probability) after `token`, which is the place-th of its row and at position `at`."""
                return sample(head(self.trunk(token, at.expand(3, -1), cache.go_to(place))), temperature, top_p, luck)

            for step in progress(range(max_new_tokens)):  # the first token is drawn already
                if step:
                    place = torch.full((1,), step - 1, device=device) if graph else step - 1
                    inputs = token, after + (step - 1), place, luck[:, step]
                    if step == 1 and graph:
                        following = ops.as_graph(following, *inputs)
                    token, log_prob = following(*inputs)
                    steps.append((token, log_prob))
                    done |= torch.isin(token, stop)
                if (step + 1) % wait == 0 and bool(done.all()):
                    break
        tokens, log_probs = (torch.stack(t, dim=1).cpu() for t in zip(*steps, strict=True))  # [P·n,C]
        ends = torch.isin(tokens, stop.cpu())
        out = []
        for row in range(P * n):
            finished = bool(ends[row].any())
            length = int(ends[row].int().argmax()) + 1 if finished else tokens.shape[1]
            own = tokens[row, :length]
            out.append(Completion(self.processor.decode(own[:length - finished].tolist()), own, log_probs[row, :length],
                                  finished))
        return [out[p * n:(p + 1) * n] for p in range(P)]

    # -----------------------------------------------------------------------------------------------------------------
    # Loading

    def views(self):
        """{published tensor name: [destinations]}; see weights.py."""
        c, v = self.config, self.visual
        views = {"visual.patch_embed.proj.weight": [v.patches.weight.view(-1, 3, c.frames, c.patch, c.patch)],
                 "visual.merger.ln_q.weight": [v.norm.weight], **weights.affine_views("visual.merger.mlp.0", v.merge1),
                 **weights.affine_views("visual.merger.mlp.2", v.merge2)}
        for i, block in enumerate(v.blocks):
            at = f"visual.blocks.{i}."
            views |= {f"{at}norm1.weight": [block.norm1.weight], f"{at}norm2.weight": [block.norm2.weight],
                      **weights.affine_views(f"{at}attn.qkv", block.qkv),
                      **weights.affine_views(f"{at}attn.proj", block.out),
                      **weights.affine_views(f"{at}mlp.down_proj", block.down)}
            for kind in ("weight", "bias"):
                for name, rows in zip(("gate", "up"), weights.split_rows(getattr(block.gate_up, kind), 2), strict=True):
                    views[f"{at}mlp.{name}_proj.{kind}"] = [rows]
        views |= {"model.embed_tokens.weight": [self.tokens.weight], "model.norm.weight": [self.norm.weight]}
        if self.head is not None:
            views["lm_head.weight"] = [self.head.weight]
        for i, block in enumerate(self.blocks):
            at = f"model.layers.{i}."
            gate, up = weights.split_rows(block.gate_up.weight, 2)
            views |= {f"{at}input_layernorm.weight": [block.norm1.weight],
                      f"{at}post_attention_layernorm.weight": [block.norm2.weight],
                      f"{at}self_attn.o_proj.weight": [block.out.weight], f"{at}mlp.gate_proj.weight": [gate],
                      f"{at}mlp.up_proj.weight": [up], f"{at}mlp.down_proj.weight": [block.down.weight]}
            rows = [heads * c.head_dim for heads in block.split]
            for kind in ("weight", "bias"):
                for name, part in zip("qkv", getattr(block.qkv, kind).split(rows), strict=True):
                    views[f"{at}self_attn.{name}_proj.{kind}"] = [part]
        return views

    def lora_targets(self):
        """{module path: {peft's name: rows}} of the language model's linear layers; see lora.add_lora."""
        c, targets = self.config, {}
        for i, block in enumerate(self.blocks):
            at = f"model.language_model.layers.{i}."
            heads = [n * c.head_dim for n in block.split]
            for name, parts in (("qkv", dict(zip(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), heads))),
                                ("out", {"self_attn.o_proj": c.width}), ("down", {"mlp.down_proj": c.width}),
                                ("gate_up", {"mlp.gate_proj": c.mlp, "mlp.up_proj": c.mlp})):
                targets[f"blocks.{i}.{name}"] = {at + part: rows for part, rows in parts.items()}
        return targets

    @classmethod
    def from_pretrained(cls, source, device="cpu", dtype=None):
        """A folder or hub id of Qwen2.5-VL, in either published naming scheme, or of a LoRA adapter, which is merged into
        the model it names. Raises UserError."""
        folder = Path(weights.find(source))
        if (folder / "adapter_config.json").exists():
            base = read_json(folder / "adapter_config.json").get("base_model_name_or_path")
            if not base:
                raise UserError(f"{folder}/adapter_config.json: no base_model_name_or_path; add the folder or "
                                              f"hub id of the model this adapter belongs to")
            model = cls.from_pretrained(base, device, dtype)
            lora.load_lora(folder, model, model.lora_targets())
            return model
        config = read_config(folder)
        processor = Processor.from_pretrained(folder, config.image_token)
        entries = {published_name(name): entry for name, entry in weights.index(folder).items()}
        model = weights.build(functools.partial(cls, config), cls.views, entries, folder, device, dtype,
                              optional=("lm_head.weight",) if config.tied else ())
        model.processor = processor
        return model

    def save_pretrained(self, folder, dtype=None):
        """Write model.safetensors, configuration and tokenizer in the published layout."""
        folder, c, image = Path(folder), self.config, self.processor.image
        stop = list(self.processor.stop)
        weights.save(folder / "model.safetensors", self.views(), dtype)
        write_json(folder / "config.json", {
            "architectures": ["Qwen2_5_VLForConditionalGeneration"], "model_type": "qwen2_5_vl", "hidden_size": c.width,
            "num_hidden_layers": c.layers, "num_attention_heads": c.heads, "num_key_value_heads": c.kv_heads,
            "intermediate_size": c.mlp, "vocab_size": c.vocab, "tie_word_embeddings": c.tied, "rms_norm_eps": c.eps,
            "rope_theta": c.theta, "rope_scaling": {"type": "mrope", "mrope_section": list(c.sections)},
            "hidden_act": "silu", "use_sliding_window": False, "image_token_id": c.image_token,
            **{f"{name}_token_id": self.processor.tokenizer.token_to_id(f"<|{token}|>") for name, token in (
                ("video", "video_pad"), ("vision_start", "vision_start"), ("vision_end", "vision_end"))},
            "bos_token_id": stop[-1], "eos_token_id": stop[0], "vision_config": {
                "model_type": "qwen2_5_vl", "depth": c.vision_layers, "hidden_size": c.vision_width, "hidden_act": "silu",
                "intermediate_size": c.vision_mlp, "num_heads": c.vision_heads, "in_chans": 3, "out_hidden_size": c.width,
                "patch_size": c.patch, "spatial_merge_size": c.merge, "temporal_patch_size": c.frames,
                "window_size": c.window, "fullatt_block_indexes": list(c.full_blocks)}})
        write_json(folder / "preprocessor_config.json", {
            "image_processor_type": "Qwen2VLImageProcessor", "patch_size": image.patch, "temporal_patch_size": image.frames,
            "merge_size": image.merge, "min_pixels": image.min_pixels, "max_pixels": image.max_pixels,
            "image_mean": list(image.mean), "image_std": list(image.std)})
        write_json(folder / "generation_config.json", {"eos_token_id": stop, "pad_token_id": stop[-1]})
        self.processor.tokenizer.save(str(folder / "tokenizer.json.tmp"), pretty=False)
        (folder / "tokenizer.json.tmp").replace(folder / "tokenizer.json")
        write_json(folder / "tokenizer_config.json", {
            "tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"})


@dataclass(frozen=True)
class Completion:
    text: str
    tokens: torch.Tensor  # [C], the stop token included
    log_probs: torch.Tensor  # [C] float32, of each token under the temperature (before top-p)
    finished: bool  # ended by itself, not by max_new_tokens


def sample(logits, temperature, top_p, luck):
    """(token [B], its log-probability [B]) of logits [B,V]; luck [B] in 0..1 decides where in the distribution."""
    logits = logits.float() if temperature in (0, 1) else logits.float() / temperature
    probabilities = logits.softmax(-1)
    if temperature == 0:
        token = logits.argmax(-1, keepdim=True)
    elif top_p < 1:
        share, places = probabilities.sort(dim=-1, descending=True, stable=True)
        share = share * (share.cumsum(-1) - share < top_p)  # the fewest tokens that reach top_p
        token = places.gather(1, place_of(share, luck[:, None]))
    else:
        token = place_of(probabilities, luck[:, None])
    return token[:, 0], probabilities.gather(1, token)[:, 0].log()  # what is drawn is far from the least number


def place_of(mass, luck, block=256):
    """Where in mass [B,V], none below 0, the share luck [B,1] in 0..1 of the sum is passed: [B,1]. Never where mass is 0.

    First among the blocks, then in one of them: a running sum over all of V would take longer than the exponentials.
    """
    V = mass.shape[1]
    blocks = (F.pad(mass, (0, -V % block)) if V % block else mass).view(len(mass), -1, block)
    sums = blocks.sum(-1)
    reach = sums.cumsum(-1)
    wanted = luck * reach[:, -1:]
    at = passed(reach, wanted)
    inside = blocks.gather(1, at[..., None].expand(-1, -1, block))[:, 0].cumsum(-1)
    return at * block + passed(inside, wanted - (reach.gather(1, at) - sums.gather(1, at)))


def passed(reach, wanted):
    """First place [B,1] where the running sum [B,n] is above `wanted` [B,1], kept in its range however it was rounded."""
    below_all = torch.nextafter(reach[:, -1:], torch.zeros_like(wanted))
    return torch.searchsorted(reach, torch.minimum(wanted.clamp(min=0), below_all), right=True)


def published_name(name):
    """A tensor's name in the first published scheme; the newer one puts both towers under `model.`."""
    for new, old in (("model.visual.", "visual."), ("model.language_model.", "model.")):
        if name.startswith(new):
            return old + name[len(new):]
    return name


def read_config(folder):
    """QwenVLConfig of a folder's config.json: flat as first published, or with a text_config. Raises UserError."""
    raw = weights.read_config(folder)
    text, vision = raw.get("text_config") or raw, raw.get("vision_config") or {}
    try:
        if raw.get("model_type") != "qwen2_5_vl":
            raise ValueError(f"model_type {raw.get('model_type')!r}")
        if text.get("use_sliding_window"):
            raise ValueError("use_sliding_window is true")
        rope = text.get("rope_parameters") or text.get("rope_scaling")
        tied = raw.get("tie_word_embeddings", text.get("tie_word_embeddings", False))
        return QwenVLConfig(
            text["hidden_size"], text["num_hidden_layers"], text["num_attention_heads"], text["num_key_value_heads"],
            text["intermediate_size"], text["vocab_size"], tied, text.get("rms_norm_eps", 1e-6),
            rope.get("rope_theta", text.get("rope_theta", 1e6)), tuple(rope["mrope_section"]), vision["hidden_size"],
            vision["depth"], vision["num_heads"], vision["intermediate_size"], vision.get("patch_size", 14),
            vision.get("temporal_patch_size", 2), vision.get("spatial_merge_size", 2), vision.get("window_size", 112),
            tuple(vision.get("fullatt_block_indexes", (7, 15, 23, 31))), raw.get("image_token_id", 151_655))
    except (KeyError, ValueError, AttributeError, TypeError) as error:
        raise UserError(f"{folder}/config.json: not a Qwen2.5-VL configuration this file knows ({error}); "
                                      f"give Qwen/Qwen2.5-VL-7B-Instruct or a folder in its layout") from error
