"""Operations that models share, and the way to faster forms of them.

An operation is defined once, in plain torch, in the file where its equation belongs, and marked
there:

    @ops.fusable
    def modulate(x, shift, scale, eps=1e-6): ...

The folder kernels/ may hold a faster form of it for CUDA or for the CPU. It is looked up by the
operation's name on first use. Whoever edits the plain form is never fooled: kernels/ notes for
which definition its forms were written, and where the definition is another one, the plain form
runs and one line on standard error says so. Without the folder, or with KERNELS=plain in the
environment, the plain forms run everywhere.

Shapes: B batch, L tokens, H heads, E channels of one head, D = H·E width.
"""

import contextlib
import functools
import hashlib
import importlib
import importlib.util
import inspect
import io
import os
import textwrap
import tokenize
import types

import torch
import torch.nn.functional as F
from torch import nn

from parts.cli import say

FUSED = os.environ.get("KERNELS", "fused") != "plain"
# cuDNN's attention, torch's first choice on Hopper, plans anew for every shape it meets (seconds,
# where the judge's shapes change at every call), and has given NaN gradients with a mask
# (pytorch#196678). Flash attention takes its place; a training step was no slower with it.
torch.backends.cuda.enable_cudnn_sdp(False)
LAYOUT = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)


# --------------------------------------------------------------------------------------------------
# Plain forms and where faster ones are


def fusable(plain):
    """Mark the plain form of an operation, whose first argument is a tensor.

    The result computes a fused form of kernels/ for that tensor's device if there is one, else the
    plain form, which stays reachable as its attribute `plain`.
    """
    forms = {}  # {device type: fused form, or None}

    @functools.wraps(plain)
    def operation(x, *args, **kwargs):
        # torch.compile fuses plain forms itself, and float64 is for checks of exactness.
        if not FUSED or x.dtype == torch.float64 or torch.compiler.is_compiling():
            return plain(x, *args, **kwargs)
        device = x.device.type
        if device not in forms:
            forms[device] = find_form(plain, device)
        result = NotImplemented
        if forms[device] is not None:
            result = forms[device](x, *args, **kwargs)
        if result is NotImplemented:  # a fused form may decline what it was not written for
            return plain(x, *args, **kwargs)
        return result

    operation.plain = plain
    operation.forms = forms
    return operation


def find_form(plain, device):
    """The fused form of a plain one on a type of device ("cpu", "cuda"), or None."""
    if not has_kernels():
        return None
    kernels = importlib.import_module("kernels")
    name = f"{plain.__module__}.{plain.__name__}"
    form = kernels.FORMS.get(name)
    module = None if form is None else getattr(form, device, None)
    if module is None:
        return None
    if definition(plain) != form.definition:
        say(f"{name} was edited: its plain form runs, not the fused one of kernels/, which "
            f"computes what it was before (see kernels/__init__.py)")
        return None
    return getattr(importlib.import_module(f"kernels.{module}"), plain.__name__)


@functools.cache  # a search of the path, which need not be repeated at each generation
def has_kernels():
    """Whether the folder kernels/ is there: it may be deleted."""
    return importlib.util.find_spec("kernels") is not None


def definition(function):
    """Digest of what a function computes: its code, and that of the project's functions it calls.

    Comments, docstrings and layout do not count, so that they can be mended freely.
    """
    return hashlib.sha256(" ".join(code_of(function, set())).encode()).hexdigest()[:12]


def code_of(function, seen):
    """The tokens of a function and of all that it calls in its own module and in this one."""
    function = getattr(function, "plain", function)
    if function in seen:
        return []
    seen.add(function)
    # Tokens, because a syntax tree prints differently from one version of Python to the next.
    source = textwrap.dedent(inspect.getsource(function))
    words = []
    begins = True  # whether a statement begins here: a string there is a docstring
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in LAYOUT and not (begins and token.type == tokenize.STRING):
            words.append(token.string)
        if token.type not in (tokenize.COMMENT, tokenize.NL):
            begins = token.type in LAYOUT
    words = words[words.index("def"):]  # without decorators
    scope = function.__globals__
    own = (function.__module__, __name__)
    called = []
    for word, following in zip(words, [*words[2:], "", ""], strict=True):
        value = scope.get(word)
        if isinstance(value, types.ModuleType):  # as in ops.rms_norm
            value = getattr(value, following, None)
        if isinstance(value, int | float):  # a constant of the module belongs to the definition
            called.append(f"{word}={value}")
        elif inspect.isfunction(value) and value.__module__ in own:
            called += code_of(value, seen)
    return words + called


def faster(module, name):
    """The function kernels.<module>.<name>, or None without the folder or with KERNELS=plain."""
    if not (FUSED and has_kernels()):
        return None
    return getattr(importlib.import_module(f"kernels.{module}"), name)


# --------------------------------------------------------------------------------------------------
# Operations of more than one model


@fusable
def rms_norm(x, weight, eps=1e-6):
    """x / sqrt(mean(x²) + eps) · weight over the last dimension, the mean in float32."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype) * weight


class RMSNorm(nn.Module):
    """`rms_norm` with its learned scale [D]."""

    def __init__(self, width, eps=1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x):
        return rms_norm(x, self.weight, self.eps)


@fusable
def split_qkv(qkv, num_heads, q_weight=None, k_weight=None, eps=1e-6):
    """Packed projection [B,L,3D] -> q, k, v [B,H,L,E].

    With weights [E], q and k are RMS-normalised per head (qk-norm of SD3.5).
    """
    B, L, width = qkv.shape
    q, k, v = qkv.view(B, L, 3, num_heads, width // (3 * num_heads)).unbind(2)  # each [B,L,H,E]
    if q_weight is not None:
        q = rms_norm(q, q_weight, eps)
        k = rms_norm(k, k_weight, eps)
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


def in_heads(x, num_heads):
    """Queries, keys or values of all heads [B,L,D] -> [B,H,L,E]."""
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def attention(q, k, v, mask=None, causal=False, scale=None):
    """softmax(q·kᵀ·scale)·v over q [B,H,L,E], k, v [B,H,S,E]; heads joined: [B,L,D].

    mask: added to the scores, or boolean (True: may attend).
    """
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=scale)
    return out.transpose(1, 2).flatten(2)


def logits(hidden, weight):
    """hidden·Wᵀ [N,V] in float32 of hidden [N,D] and a head W [V,D], without gradient.

    Sampling and training must see the same numbers. Logits rounded to bfloat16 are off by up to
    2⁻⁸ of their size, which for a logit of 20 is a factor of 1.08 in the token's probability, so on
    a GPU the product of narrow types is taken in float32.
    """
    if hidden.is_cuda and hidden.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(hidden, weight.t(), out_dtype=torch.float32)
    return F.linear(hidden.float(), weight.float())


@fusable
def channels_last(x):
    """x [B,C,H,W] in the memory layout that convolutions are fastest in; no value changes."""
    return x


# --------------------------------------------------------------------------------------------------
# Faster ways to do the same from outside of a model


def is_sharded(module):
    """Whether FSDP2 has divided the weights of a module among processes."""
    return any(hasattr(part, "reshard") for part in module.modules())


def fast_linears(module, copy=True):
    """Within this context all nn.Linear of a module may compute from weights laid out for speed.

    There are no gradients within it, and the weights must not change. copy: a laid out copy of
    each weight may be made, as large as the weight.
    """
    context = faster("linears", "fast_linears")
    return contextlib.nullcontext() if context is None else context(module, copy)


def fast_linear(weight, bias=None):
    """A function x [...,D] -> x·Wᵀ + bias of a frozen W [V,D], for many calls."""
    make = faster("linears", "fast_linear")
    if make is None:
        return functools.partial(F.linear, weight=weight, bias=bias)
    return make(weight, bias)


def can_record(module):
    """Whether `as_graph` may record the launches of a module: its weights lie on a GPU, and whole,
    which they do under FSDP2 only while it keeps them gathered."""
    on_gpu = all(p.is_cuda for p in module.parameters())
    return on_gpu and is_whole(module) and faster("graphs", "as_graph") is not None


def is_whole(module):
    """Whether no weight of a module is divided at the moment: such a DTensor has placements."""
    return not any(hasattr(p, "placements") for p in module.parameters())


def as_graph(function, *inputs):
    """`function` for tensors like `inputs` on a GPU, its launches recorded and made as one.

    What it writes beside its result must lie in tensors that stay where they are.
    """
    return faster("graphs", "as_graph")(function, *inputs)
