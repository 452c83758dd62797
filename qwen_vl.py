"""Qwen2.5-VL, the judge: a picture and a question in, an answer in words out.

Bai et al. 2025; EmoFeedback², section 3.1. In the order data meets it: vision tower (window
attention, full attention in a few blocks, patch merger), language model (grouped queries, M-RoPE,
SwiGLU), which tokens attend to which, the whole model with generation and loading. The input is a
`Prompt` of parts/chat.py: tokens, and the patches of pictures. Modules carry the published names.
Left out: video, sliding windows, beam search, top-p, and the published repetition penalty.

All layers see one flat list of tokens without padding: sequences of any length lie one behind the
other. Only attention must know which tokens belong together, and that knowledge is a function
`attend(layer, q, k, v)` that every block calls:

    Sequences      whole sequences, windows or pictures; in text a token sees itself and its past
    StaticCache    generation; the n answers to a prompt share the keys and values of the prompt
    SharedPrompts  training; the G completions of a prompt share one pass over the prompt

Letters: N tokens of the flat list, B rows, L tokens of a sequence or prompt, P prompts, n answers
to each, G completions of each, C tokens of a completion, t tokens of an answer so far, D width,
M width of the MLP, H heads, K key-value heads, E channels of a head, V vocabulary; h, w patches
of a picture's sides; m = 2: m·m patches become one token.
"""

import functools
import itertools
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from parts import layouts, lora, ops, weights
from parts.chat import IMAGE_TOKEN, Processor, Prompt
from parts.files import write_json


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
    image_token: int = IMAGE_TOKEN

    @property
    def head_dim(self):
        return self.width // self.heads


QWEN25_VL_7B = QwenVLConfig()
QWEN25_VL_3B = QwenVLConfig(
    width=2048, layers=36, heads=16, kv_heads=2, mlp=11_008, vocab=151_936, tied=True)


# --------------------------------------------------------------------------------------------------
# What both towers are made of


@ops.fusable
def rotate(x, cos, sin):
    """Rotary position embedding (Su et al. 2021): x [...,H,E] turned by angles [...,1,E].

    Channels i and i + E/2 are a complex number, turned by an angle that grows with the position;
    so every angle stands twice in cos and sin, once for each half. The product of a query and a
    key then depends on the difference of their positions only.
    """
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


@ops.fusable
def split_rotate(qkv, heads, kv_heads, cos, sin):
    """Packed projection [N,(H+2K)·E] -> q [N,H,E], k, v [N,K,E], q and k turned; cos, sin [N,1,E].

    If cos is float32 so is the rotation, and its result is rounded (the vision tower); else all is
    in the type of qkv (the text).
    """
    qkv = qkv.view(len(qkv), heads + 2 * kv_heads, -1)  # [N,H+2K,E]
    qk, v = qkv.split([heads + kv_heads, kv_heads], dim=1)
    wide = torch.promote_types(qkv.dtype, cos.dtype)
    q, k = rotate(qk.to(wide), cos, sin).to(qkv.dtype).split([heads, kv_heads], dim=1)
    return q, k, v


@ops.fusable
def swiglu(gate_up):
    """silu(gate)·up of a packed projection [...,2M] -> [...,M] (Shazeer 2020)."""
    gate, up = gate_up.chunk(2, dim=-1)  # each [...,M]
    return F.silu(gate) * up


class MLP(nn.Module):
    def __init__(self, width, hidden, bias):
        super().__init__()
        self.gate_up_proj = nn.Linear(width, 2 * hidden, bias)  # two published layers in one
        self.down_proj = nn.Linear(hidden, width, bias)

    def forward(self, x):
        return self.down_proj(swiglu(self.gate_up_proj(x)))


def grouped_attention(q, k, v, mask=None, causal=False):
    """Attention of q [B,L,H,E] over k, v [B,S,K,E] -> [B·L,H·E]."""
    groups = q.shape[2] // k.shape[2]
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # [B,H,L,E], [B,K,S,E]
    if groups > 1:  # H/K query heads in a row read the same keys and values: a smaller cache
        k = k.repeat_interleave(groups, dim=1)
        v = v.repeat_interleave(groups, dim=1)
    return ops.attention(q, k, v, mask, causal).flatten(0, 1)


class Sequences:
    """Attention within each of several whole sequences, one behind the other."""

    def __init__(self, lengths, causal=True):
        # [(count, length)]: consecutive sequences of one length are computed as one batch.
        self.runs = [(len(list(same)), length) for length, same in itertools.groupby(lengths)]
        self.causal = causal

    def __call__(self, layer, q, k, v):
        """q [N,H,E], k, v [N,K,E] -> [N,H·E]; alike in every layer."""
        out = []
        start = 0
        for count, length in self.runs:
            end = start + count * length
            batch = (t[start:end].unflatten(0, (count, length)) for t in (q, k, v))  # [B,L,·,E]
            out.append(grouped_attention(*batch, causal=self.causal))
            start = end
        return torch.cat(out) if len(out) > 1 else out[0]


# --------------------------------------------------------------------------------------------------
# Vision tower


def window_order(grids, merge, window):
    """How window attention sees the merged tokens of all pictures.

    grids: [(1, h, w)]; window: side in merged tokens. Returns (order [merged tokens], lengths of
    the windows in merged tokens). `order` lists window after window, in each picture those of
    equal length together, so that attention runs on a few large batches.
    """
    windows = []
    start = 0
    for _, h, w in grids:
        rows = h // merge
        columns = w // merge
        index = torch.arange(start, start + rows * columns).view(rows, columns)
        corners = itertools.product(range(0, rows, window), range(0, columns, window))
        own = [index[i:i + window, j:j + window].flatten() for i, j in corners]
        windows += sorted(own, key=len)
        start += rows * columns
    # A picture that no whole number of windows covers has smaller ones at its right and lower edge.
    return torch.cat(windows), [len(window) for window in windows]


def vision_angles(grids, merge, head_dim):
    """(cos, sin) [N,E]: a quarter of a head turns with the row of a patch, one with its column.

    The other half repeats these angles, see `rotate`.
    """
    half = head_dim // 2
    frequencies = 10_000.0 ** (-torch.arange(0, half, 2).float() / half)  # [E/4]
    rows = []
    columns = []
    for _, h, w in grids:
        # The patches of one merged token follow each other: [h/m,m,w/m,m] -> [h/m,w/m,m,m].
        index = torch.arange(h * w).view(h // merge, merge, w // merge, merge)
        index = index.transpose(1, 2).flatten()
        rows.append(index // w)
        columns.append(index % w)
    positions = [torch.cat(rows).float(), torch.cat(columns).float()]
    angles = torch.cat([p[:, None] * frequencies for p in positions], dim=-1)  # [N,E/2]
    angles = torch.cat([angles, angles], dim=-1)  # [N,E]
    return angles.cos(), angles.sin()


class VisionBlock(nn.Module):
    def __init__(self, c):
        super().__init__()
        D = c.vision_width
        self.heads = c.vision_heads
        self.norm1 = ops.RMSNorm(D)
        self.norm2 = ops.RMSNorm(D)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(D, 3 * D), "proj": nn.Linear(D, D)})
        self.mlp = MLP(D, c.vision_mlp, bias=True)

    def forward(self, x, cos, sin, attend):  # x [N,D]; cos, sin [N,1,E] float32
        qkv = self.attn.qkv(self.norm1(x))
        x = x + self.attn.proj(attend(*split_rotate(qkv, self.heads, self.heads, cos, sin)))
        return x + self.mlp(self.norm2(x))


class VisionTower(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.config = c
        D = c.vision_width
        merged = D * c.merge**2
        # Published as a convolution; its patches do not overlap, so it is a matrix product.
        self.patch_embed = nn.ModuleDict({"proj": nn.Linear(3 * c.frames * c.patch**2, D, False)})
        self.blocks = nn.ModuleList(VisionBlock(c) for _ in range(c.vision_layers))
        self.merger = nn.ModuleDict({
            "ln_q": ops.RMSNorm(D),
            "mlp": nn.Sequential(nn.Linear(merged, merged), nn.GELU(), nn.Linear(merged, c.width))})

    def forward(self, pixels, grids, checkpointing=False):
        """pixels [N,3·frames·patch²], grids [(1, h, w)] -> one vector for each m·m patches."""
        c = self.config
        unit = c.merge**2
        order, lengths = window_order(grids, c.merge, c.window // c.patch // c.merge)
        order = order.to(pixels.device)
        in_windows = Sequences([length * unit for length in lengths], causal=False)
        in_pictures = Sequences([h * w for _, h, w in grids], causal=False)
        x = self.patch_embed.proj(pixels.to(self.patch_embed.proj.weight.dtype))
        angles = vision_angles(grids, c.merge, c.vision_width // c.vision_heads)
        flat = (x, *(t.to(x.device) for t in angles))
        # From here on window after window: [N,·] -> [merged tokens,m·m,·] -> [N,·].
        x, cos, sin = (t.view(len(order), unit, -1)[order].flatten(0, 1) for t in flat)
        for i, block in enumerate(self.blocks):
            # Windows keep the cost linear in the picture; a few blocks carry news across them.
            attend = in_pictures if i in c.full_blocks else in_windows
            if checkpointing and x.requires_grad:  # frozen blocks keep nothing for a backward pass
                block = functools.partial(checkpoint, block, use_reentrant=False)
            x = block(x, cos[:, None], sin[:, None], functools.partial(attend, i))
        x = self.merger.ln_q(x).view(len(order), -1)  # [merged tokens,m·m·D]
        return self.merger.mlp(x)[order.argsort()]  # back in reading order


# --------------------------------------------------------------------------------------------------
# Language model


def position_ids(ids, grids, c):
    """M-RoPE positions [3,L] (time, height, width) of one sequence of ids [L].

    Text counts up in all three, a picture spans its grid, and the text after it goes on from its
    greater side. grids: (1, h, w) of pictures, as many as the ids need. Raises ValueError.
    """
    left = iter(grids)
    positions = []
    start = 0
    for is_picture, tokens in itertools.groupby((ids == c.image_token).tolist()):
        length = len(list(tokens))
        if not is_picture:
            positions.append(torch.arange(start, start + length).expand(3, -1))
            start += length
            continue
        _, h, w = next(left, (1, 0, 0))
        rows = h // c.merge
        columns = w // c.merge
        if rows * columns != length:
            raise ValueError(f"{length} image tokens for a picture that needs {rows * columns}; "
                             f"the grids do not belong to these ids")
        i = torch.arange(length)  # in reading order
        positions.append(start + torch.stack([torch.zeros_like(i), i // columns, i % columns]))
        start += max(rows, columns)
    return torch.cat(positions, dim=1)


def text_angles(positions, c, dtype):
    """(cos, sin) [N,1,E] of M-RoPE positions [3,N]: each section follows one of the three."""
    channels = torch.arange(0, c.head_dim, 2, device=positions.device)
    frequencies = c.theta ** (-channels.float() / c.head_dim)  # [E/2]
    angles = (positions[..., None].float() * frequencies).split(c.sections, dim=-1)  # [3,N,·] each
    angles = torch.cat([section[i] for i, section in enumerate(angles)], dim=-1)  # [N,E/2]
    angles = torch.cat([angles, angles], dim=-1)[:, None]  # [N,1,E]
    return angles.cos().to(dtype), angles.sin().to(dtype)


class Block(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.heads = (c.heads, c.kv_heads)
        self.input_layernorm = ops.RMSNorm(c.width, c.eps)
        self.post_attention_layernorm = ops.RMSNorm(c.width, c.eps)
        self.self_attn = nn.ModuleDict({  # q_proj, k_proj, v_proj are the rows of one layer
            "qkv_proj": nn.Linear(c.width, (c.heads + 2 * c.kv_heads) * c.head_dim),
            "o_proj": nn.Linear(c.width, c.width, bias=False)})
        self.mlp = MLP(c.width, c.mlp, bias=False)

    def forward(self, x, cos, sin, attend):  # x [N,D]; cos, sin [N,1,E]
        qkv = self.self_attn.qkv_proj(self.input_layernorm(x))
        x = x + self.self_attn.o_proj(attend(*split_rotate(qkv, *self.heads, cos, sin)))
        return x + self.mlp(self.post_attention_layernorm(x))


# --------------------------------------------------------------------------------------------------
# Which tokens attend to which


@ops.fusable
def attend_shared(q, prompt_k, prompt_v, k, v, hidden):
    """Attention of one new token in each of P·n rows over its prompt and its row's own tokens.

    q [P·n,H,E]; prompt_k, prompt_v [P,K,L,E]; k, v [P·n,K,t,E]; hidden [P or 1,L+t], True where
    none attends. Returns [P·n,H·E]. A new token is little work for much reading, so what is read
    decides how long it takes: a prompt's keys and values are read once for all its n rows.
    """
    P, K, L, E = prompt_k.shape
    q = q.view(P, -1, K, q.shape[1] // K, E)  # [P,n,K,g,E]: g = H/K heads read the same keys
    k, v = (t.unflatten(0, (P, -1)) for t in (k, v))  # [P,n,K,t,E]
    to_prompt = torch.einsum("pnkge,pkle->pnkgl", q, prompt_k)
    to_own = torch.einsum("pnkge,pnkte->pnkgt", q, k)
    scores = torch.cat([to_prompt, to_own], dim=-1).float() * E**-0.5
    scores = scores.masked_fill(hidden[:, None, None, None], -torch.inf)
    shares = scores.softmax(-1).to(q.dtype)  # [P,n,K,g,L+t], over prompt and own tokens together
    out = torch.einsum("pnkgl,pkle->pnkge", shares[..., :L], prompt_v)
    out = out + torch.einsum("pnkgt,pnkte->pnkge", shares[..., L:], v)
    return out.flatten(0, 1).flatten(1)  # [P,n,K,g,E] -> [P·n,H·E]


class StaticCache:
    """Keys and values of all tokens so far, so that a new token is computed alone.

    Prefill is the first pass: it computes the P prompts as a whole and keeps their keys and values,
    once for each prompt. Decoding then computes one new token of each of the P·n answers at a time,
    which attends to what is kept and adds its own key and value. Memory is allocated once; where a
    prompt is shorter than the longest, a mask hides the rest.
    """

    def __init__(self, c, lengths, n, new_tokens, like):
        """lengths: of the P prompts; like: a tensor of the device and type to use."""
        P = len(lengths)
        self.lengths = lengths
        self.causal = Sequences(lengths)
        # Keys and values: [2,layers,rows,K,tokens,E].
        self.prompts = like.new_zeros(2, c.layers, P, c.kv_heads, max(lengths), c.head_dim)
        self.own = like.new_zeros(2, c.layers, P * n, c.kv_heads, new_tokens, c.head_dim)
        self.steps = torch.arange(new_tokens, device=like.device)
        self.room = new_tokens  # of each answer's tokens attention reads; those to come are hidden
        ends = torch.tensor(lengths, device=like.device)[:, None]
        self.padding = torch.arange(max(lengths), device=like.device) >= ends  # [P,L]

    def prefill(self, layer, q, k, v):
        """`attend` for the prompts, one behind the other."""
        for cache, flat in zip(self.prompts, (k, v), strict=True):
            for p, prompt in enumerate(flat.split(self.lengths)):
                cache[layer, p, :, :len(prompt)] = prompt.transpose(0, 1)  # [K,L,E]
        return self.causal(layer, q, k, v)

    def go_to(self, index):
        """The next tokens are the index-th of their answers; index: a tensor [1], from 0 on."""
        self.index = index
        future = (self.steps[:self.room] > index).expand(len(self.padding), -1)
        self.hidden = torch.cat([self.padding, future], dim=1)  # [P,L+room]

    def decode(self, layer, q, k, v):
        """`attend` for one new token of each answer: q [P·n,H,E], k, v [P·n,K,E]."""
        for cache, new in zip(self.own, (k, v), strict=True):
            cache[layer].index_copy_(2, self.index, new[:, :, None])
        own = self.own[:, layer, :, :, :self.room]  # [2,P·n,K,room,E]
        return attend_shared(q, *self.prompts[:, layer], *own, self.hidden)


class SharedPrompts:
    """P prompts, then G completions of each, padded to C tokens, in one flat list.

    A completion sees its prompt and its own past. A question with a picture is many times as long
    as an answer, so one pass over it for all its completions saves most of the work.
    """

    def __init__(self, lengths, G, C, device):
        self.prompts = Sequences(lengths)
        self.total = sum(lengths)
        self.shape = (len(lengths), G, C)
        # [C,L+C] for each length: the whole prompt, and of the own tokens those before and itself.
        self.masks = {L: torch.ones(C, L + C, dtype=torch.bool, device=device).tril(L)
                      for L in set(lengths)}

    def __call__(self, layer, q, k, v):
        _, G, C = self.shape
        out = [self.prompts(layer, q[:self.total], k[:self.total], v[:self.total])]
        own = [t[self.total:].unflatten(0, self.shape) for t in (q, k, v)]  # [P,G,C,·,E]
        start = 0
        row = 0
        for count, L in self.prompts.runs:
            end = start + count * L
            queries, *pair = (t[row:row + count].flatten(0, 1) for t in own)  # [count·G,C,·,E]
            prompts = (t[start:end].view(count, L, *t.shape[1:]) for t in (k, v))
            keys, values = (torch.cat([prompt.repeat_interleave(G, dim=0), answers], dim=1)
                            for prompt, answers in zip(prompts, pair))  # [count·G,L+C,K,E]
            out.append(grouped_attention(queries, keys, values, self.masks[L]))
            start = end
            row += count
        return torch.cat(out)


# --------------------------------------------------------------------------------------------------
# The whole model


class QwenVL(nn.Module):
    def __init__(self, config=QWEN25_VL_7B, processor=None):
        super().__init__()
        c = self.config = config
        self.visual = VisionTower(c)
        self.model = nn.ModuleDict({
            "embed_tokens": nn.Embedding(c.vocab, c.width),
            "layers": nn.ModuleList(Block(c) for _ in range(c.layers)),
            "norm": ops.RMSNorm(c.width, c.eps)})
        self.lm_head = None if c.tied else nn.Linear(c.width, c.vocab, bias=False)
        self.processor = processor
        self.checkpointing = False  # recompute the blocks in the backward pass
        self.graphs = True  # on a GPU decode by a CUDA graph: one launch a step, not hundreds

    @property
    def head_weight(self):
        """[V,D]: the head, or the embedding if they are tied."""
        return self.model.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    def trunk(self, attend, ids, positions, pixels=None, grids=()):
        """Hidden states [N,D] after the last norm, of ids [N] and positions [3,N].

        attend: see the top of this file. pixels, grids: of the pictures, in the order of their
        tokens; image tokens beyond theirs were written by a model and stand for no picture.
        """
        x = self.model.embed_tokens(ids)
        if len(grids):
            features = self.visual(pixels, grids, self.checkpointing).to(x.dtype)
            slots = (ids == self.config.image_token).nonzero()[:, 0]
            if len(slots) < len(features):
                raise ValueError(f"{len(slots)} image tokens for pictures that need "
                                 f"{len(features)}; the grids do not belong to these ids")
            x = x.index_copy(0, slots[:len(features)], features)  # where an image token stood
        cos, sin = text_angles(positions, self.config, x.dtype)
        for i, block in enumerate(self.model.layers):
            if self.checkpointing and torch.is_grad_enabled():
                block = functools.partial(checkpoint, block, use_reentrant=False)
            x = block(x, cos, sin, functools.partial(attend, i))
        return self.model.norm(x)

    def forward(self, input_ids, pixel_values=None, image_grid_thw=None, attention_mask=None):
        """Logits [B,L,V] of whole sequences.

        input_ids [B,L]; pixel_values [patches, 3·frames·patch²] and image_grid_thw [pictures, 3] of
        all pictures, in the order of their tokens; attention_mask [B,L]: 0 marks padding, on either
        side, whose logits are 0.
        """
        keep = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        keep = keep.bool()
        grids = [] if image_grid_thw is None else torch.as_tensor(image_grid_thw).tolist()
        left = iter(grids)  # every row takes as many as it has pictures
        rows = [row[kept].cpu() for row, kept in zip(input_ids, keep, strict=True)]
        positions = [position_ids(row, left, self.config) for row in rows]
        positions = torch.cat(positions, dim=1).to(input_ids.device)
        attend = Sequences([len(row) for row in rows])
        hidden = self.trunk(attend, input_ids[keep], positions, pixel_values, grids)
        logits = hidden.new_zeros(*input_ids.shape, self.config.vocab)
        logits[keep] = F.linear(hidden, self.head_weight)
        return logits

    def completion_hidden(self, prompts, completions):
        """Hidden states [P,G,C,D] from which each token of the completions is predicted.

        prompts: P of Prompt; completions [P,G,C], padded on the right by any token.
        """
        P, G, C = completions.shape
        device = completions.device
        lengths = [len(p.ids) for p in prompts]
        ids, positions, pixels, grids = joined(prompts, self.config, device)
        # The state at a token predicts the next one, so the last of a completion is no input.
        steps = torch.arange(C - 1, device=device)
        # The answer's positions go on after the greatest of its prompt, for all G alike.
        own = [(at.max() + 1 + steps).repeat(G).expand(3, -1) for at in positions.split(lengths, 1)]
        hidden = self.trunk(
            SharedPrompts(lengths, G, C - 1, device),
            torch.cat([ids, completions[:, :, :-1].flatten()]),
            torch.cat([positions, *own], dim=1), pixels, grids)
        last = torch.tensor(lengths, device=device).cumsum(0) - 1
        first = hidden[last].view(P, 1, 1, -1).expand(-1, G, -1, -1)  # [P,G,1,D]
        following = hidden[sum(lengths):].unflatten(0, (P, G, C - 1))  # [P,G,C-1,D]
        return torch.cat([first, following], dim=2)

    @torch.no_grad()
    def generate(self, messages, n=1, max_new_tokens=512, temperature=1.0, generator=None,
                 progress=iter):
        """n answers to each of P conversations -> list of P lists of n Completion.

        messages: P conversations as in parts/chat.py, or Prompts. temperature 0 takes the likeliest
        token. generator: one for all, or a list of one for each conversation, whose answers then do
        not depend on the others. progress: wraps the steps, e.g. in tqdm. Raises ValueError.
        """
        # 1. prompts
        if n < 1 or max_new_tokens < 1 or temperature < 0:
            raise ValueError(f"expected n >= 1, max_new_tokens >= 1, temperature >= 0; "
                             f"got {n}, {max_new_tokens}, {temperature}")
        if not messages or isinstance(messages[0], dict):
            raise ValueError("expected a list of conversations, each of them a list of messages")
        prompts = [m if isinstance(m, Prompt) else self.processor(m) for m in messages]
        generators = generator if isinstance(generator, list) else [generator] * len(prompts)
        if len(generators) != len(prompts):
            raise ValueError(f"expected one generator, or one for each of {len(prompts)} "
                             f"conversations; got {len(generators)}")
        device = self.head_weight.device
        uniforms = [torch.rand(n, max_new_tokens, generator=own) for own in generators]
        uniforms = torch.cat(uniforms).to(device)  # [P·n,max_new_tokens]

        # 2. prefill: one pass over all prompts; the last token of each predicts the first of its n
        lengths = [len(p.ids) for p in prompts]
        ids, positions, pixels, grids = joined(prompts, self.config, device)
        cache = StaticCache(self.config, lengths, n, max_new_tokens, self.head_weight)
        with ops.fast_linears(self, copy=False):
            hidden = self.trunk(cache.prefill, ids, positions, pixels, grids)
        del pixels  # in float32 6 MB a picture, and the decode is long
        last = torch.tensor(lengths, device=device).cumsum(0) - 1
        logits = ops.logits(hidden[last], self.head_weight).repeat_interleave(n, dim=0)  # [P·n,V]
        token, log_prob = sample(logits, temperature, uniforms[:, 0])

        # 3. decode: the next token of all answers at a time, until each has met a stop token
        first = torch.stack([at.max() + 1 for at in positions.split(lengths, dim=1)])
        first = first.repeat_interleave(n)  # [P·n]: position of the first token
        stop = torch.tensor(self.processor.stop, device=device)
        done = torch.zeros_like(token, dtype=torch.bool)
        graph = self.graphs and ops.can_record(self.model.layers)
        drawn = []
        # Asking whether all are done waits for the GPU, so ask every 16 steps.
        every = 16 if device.type == "cuda" else 1
        with ops.fast_linears(self.model.layers):
            head = functools.partial(ops.logits, weight=self.head_weight)
            # FSDP2 gathers and frees sharded weights, so nothing may hold on to a laid out copy.
            if device.type == "cpu" and not ops.is_sharded(self):
                head = ops.fast_linear(self.head_weight)

            def next_token(token, index, position, uniforms):
                """(token, log-probability), both [P·n], after `token`, the index-th of its row."""
                cache.go_to(index)
                hidden = self.trunk(cache.decode, token, position.expand(3, -1))
                return sample(head(hidden), temperature, uniforms)

            decode = next_token
            for step in progress(range(max_new_tokens)):
                drawn.append((token, log_prob))
                done |= torch.isin(token, stop)
                ask = (step + 1) % every == 0
                if step + 1 == max_new_tokens or (ask and done.all()):
                    break
                index = torch.full((1,), step, device=device)
                inputs = (token, index, first + step, uniforms[:, step + 1])
                if not graph:  # a graph needs equal shapes in all steps, so it keeps the whole room
                    cache.room = step + 1
                elif step == 0:
                    decode = ops.as_graph(next_token, *inputs)
                token, log_prob = decode(*inputs)

        # 4. texts: [max_new_tokens] of [P·n] -> rows, each cut at its first stop token
        tokens, log_probs = (torch.stack(t, dim=1).cpu() for t in zip(*drawn, strict=True))
        answers = [self.completion(*row) for row in zip(tokens, log_probs, strict=True)]
        return [answers[i:i + n] for i in range(0, len(answers), n)]

    def completion(self, tokens, log_probs):
        """Completion of a row of drawn tokens, up to its first stop token, if there is one."""
        ends = torch.isin(tokens, torch.tensor(self.processor.stop)).nonzero()
        finished = len(ends) > 0
        length = int(ends[0]) + 1 if finished else len(tokens)
        text = self.processor.decode(tokens[:length - finished].tolist())
        return Completion(text, tokens[:length], log_probs[:length], finished)

    def lora_targets(self):
        """What an adapter changes: all linear layers of the language model; see parts/lora.py."""
        return layouts.qwen_lora_targets(self)

    @classmethod
    def from_pretrained(cls, source, device="cpu", dtype=None, build=weights.build):
        """A folder or hub id of Qwen2.5-VL, or of an adapter, merged into the model it names.

        Both published naming schemes are read. build: as in parts/sharding.py. Raises UserError.
        """
        folder = Path(weights.find(source))
        base = lora.base_of(folder)
        if base is not None:
            model = cls.from_pretrained(base, device, dtype, build)
            lora.load_lora(folder, model, model.lora_targets())
            model.processor.take_image_config(folder, model.config)
            return model
        entries = weights.renamed(weights.index(folder), layouts.QWEN_NEWER)
        config = QwenVLConfig(**layouts.qwen_fields(folder, len(entries)))
        processor = Processor.from_pretrained(folder, config)
        unused = ("lm_head.weight",) if config.tied else ()
        make = functools.partial(cls, config, processor)
        return build(make, layouts.qwen_views, entries, folder, device, dtype, unused)

    def save_pretrained(self, folder, dtype=None):
        """Write weights, configuration and tokenizer in the published layout."""
        weights.save(Path(folder) / "model.safetensors", layouts.qwen_views(self), dtype)
        write_json(Path(folder) / "config.json", layouts.qwen_json(self.config, self.processor))
        self.processor.save_pretrained(folder)


@dataclass(frozen=True)
class Completion:
    text: str
    tokens: torch.Tensor  # [C], the stop token included
    log_probs: torch.Tensor  # [C] float32, of each token under the temperature
    finished: bool  # ended by itself, not by max_new_tokens


def joined(prompts, c, device):
    """(ids [N], positions [3,N], pixels, grids) of prompts, one behind the other."""
    ids = torch.cat([p.ids for p in prompts])
    positions = torch.cat([position_ids(p.ids, p.grids, c) for p in prompts], dim=1)
    pixels = torch.cat([p.pixels for p in prompts])
    grids = [grid for p in prompts for grid in p.grids]
    return ids.to(device), positions.to(device), pixels.to(device), grids


def sample(logits, temperature, uniforms):
    """(token, its log-probability), both [B], of logits [B,V]; temperature 0 takes the likeliest.

    uniforms [B] in [0,1): where in the distribution a token is drawn.
    """
    logits = logits.float() if temperature in (0, 1) else logits.float() / temperature
    probabilities = logits.softmax(-1)
    token = inverse_cdf(probabilities, uniforms) if temperature else logits.argmax(-1)
    # never log(0): a drawn token has probability > 0
    return token, probabilities.gather(1, token[:, None])[:, 0].log()


@ops.fusable
def inverse_cdf(mass, uniforms):
    """Index [B] where the running sum of mass [B,V] exceeds a share, uniforms [B], of the sum."""
    reached = mass.cumsum(-1)
    # A share below 1 stays below the last sum however it is rounded, so that it is exceeded.
    return torch.searchsorted(reached, uniforms[:, None] * reached[:, -1:], right=True)[:, 0]
