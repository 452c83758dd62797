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
import math
import os
import textwrap
import tokenize
import types

import torch
import torch.nn.functional as F
from torch import nn

from parts.cli import say

FUSED = os.environ.get("KERNELS", "fused") != "plain"
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
    if importlib.util.find_spec("kernels") is None:
        return None
    kernels = importlib.import_module("kernels")
    name = f"{plain.__module__}.{plain.__name__}"
    form = kernels.FORMS.get(name)
    module = None if form is None else getattr(form, device, None)
    if module is None:
        return None
    if definition(plain) != form.definition:
        say(f"{name} was edited: its plain form runs, not the fused one of kernels/, which computes "
            f"what it was before (see kernels/__init__.py)")
        return None
    return getattr(importlib.import_module(f"kernels.{module}"), plain.__name__)


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
        if isinstance(value, int | float):
            called.append(f"{word}={value}")
        elif inspect.isfunction(value) and value.__module__ in own:
            called += code_of(value, seen)
    return words + called


def faster(module, name):
    """The function kernels.<module>.<name>, or None without the folder or with KERNELS=plain."""
    if not FUSED or importlib.util.find_spec("kernels") is None:
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


def attention(q, k, v, mask=None, causal=False, scale=None):
    """softmax(q·kᵀ·scale)·v over q [B,H,L,E], k, v [B,H,S,E]; heads joined: [B,L,D].

    mask: added to the scores, or boolean (True: may attend).
    """
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=scale)
    return out.transpose(1, 2).flatten(2)


@fusable
def channels_last(x):
    """x [B,C,H,W] in the memory layout that convolutions are fastest in; its values do not change."""
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
    return functools.partial(F.linear, weight=weight, bias=bias) if make is None else make(weight, bias)


def as_graph(function, *inputs):
    """`function` for tensors like `inputs`; on a GPU its launches may be recorded and made as one.

    What it writes beside its result must lie in tensors that stay where they are.
    """
    record = faster("graphs", "as_graph")
    return function if record is None else record(function, *inputs)


# LEGACY: goes as soon as its last user has switched

def on_gpu(x):
    """triton_kernels if an operation on x is to run there, else None: Triton comes with CUDA builds of torch."""
    if not FUSED or not x.is_cuda or x.dtype == torch.float64 or torch.compiler.is_compiling():
        return None
    from kernels import triton_forms as triton_kernels
    return triton_kernels


def on_cpu(x):
    return FUSED and x.device.type == "cpu"


def rotate(x, cos, sin):
    """Rotary position embedding: the two halves of a head are the parts of complex numbers, turned by an angle.

    x [..., H, E], cos, sin [..., 1, E] (each angle twice, once per half).
    """
    first, second = x.chunk(2, dim=-1)
    if on_cpu(x) and not torch.is_grad_enabled():  # in place, where autograd would have to copy
        y, (sin, other) = x * cos, sin.chunk(2, dim=-1)
        y[..., :first.shape[-1]].addcmul_(second, sin, value=-1)
        y[..., first.shape[-1]:].addcmul_(first, other)
        return y
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def split_rotate(qkv, heads, kv_heads, cos, sin):
    """Packed projection [N,(H+2K)·E] -> q [N,H,E], k, v [N,K,E], q and k turned by `rotate`; cos, sin [N,1,E].

    If cos is float32 so is the rotation, and its result is rounded (the vision tower); else all is in qkv's type (the text).
    """
    if gpu := on_gpu(qkv):
        return gpu.split_rotate(qkv, heads, kv_heads, cos, sin)
    qk, v = qkv.view(len(qkv), heads + 2 * kv_heads, -1).split([heads + kv_heads, kv_heads], dim=1)
    q, k = rotate(qk.to(torch.promote_types(qkv.dtype, cos.dtype)), cos, sin).to(qkv.dtype).split([heads, kv_heads], dim=1)
    return q, k, v


def swiglu(gate_up):
    """silu(gate)·up of a packed projection [..., 2M] -> [..., M]."""
    if gpu := on_gpu(gate_up):
        return gpu.swiglu(gate_up)
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def attend_shared(q, prompt_k, prompt_v, k, v, hidden=None):
    """Attention of one new token in each of P·n rows, over the tokens of its prompt, which n rows share, and its row's own.

    q [P·n,H,E], prompt_k, prompt_v [P,K,L,E], k, v [P·n,K,t,E] -> [P·n,H·E]. hidden [P or 1,L+t]: True where none attends.
    A prompt's keys and values are read once for its n rows. Scores and their softmax are float32 (float64 for that).
    """
    (R, H, E), (P, K, L, _) = q.shape, prompt_k.shape
    n, G = R // P, H // K
    q = q.view(P, n, K, G, E)
    scores = torch.cat([  # [P,n,K,G,L+t]
        batched(q.transpose(1, 2).reshape(P * K, n * G, E), prompt_k.flatten(0, 1).mT).view(P, K, n, G, L).transpose(1, 2),
        batched(q.reshape(R * K, G, E), k.flatten(0, 1).mT).view(P, n, K, G, -1)], dim=-1).mul_(E ** -0.5)
    if hidden is not None:
        scores.masked_fill_(hidden[:, None, None, None], float("-inf"))
    over_prompt, own = scores.softmax(-1).to(q.dtype).tensor_split([L], dim=-1)
    out = batched(over_prompt.transpose(1, 2).reshape(P * K, n * G, L), prompt_v.flatten(0, 1))
    out = out.view(P, K, n, G, E).transpose(1, 2) + batched(own.reshape(R * K, G, -1), v.flatten(0, 1)).view(P, n, K, G, E)
    return out.to(q.dtype).reshape(R, H * E)


def batched(a, b):
    """a·b [N,·,·], not rounded below float32 where the device can do so."""
    if a.is_cuda and a.dtype in (torch.float16, torch.bfloat16):
        return torch.bmm(a, b, out_dtype=torch.float32)
    return torch.bmm(a, b).to(torch.promote_types(a.dtype, torch.float32))


def sde_draw(velocity, latents, noise, a, b, std):
    """(the step mean + std·noise, without gradient, its log-probability [B], see `sde_log_prob`)."""
    if gpu := on_gpu(velocity):
        return gpu.sde_draw(velocity, latents, noise, a, b, std)
    mean = sde_mean(velocity, latents, a, b)
    drawn = (mean + std * noise).detach()
    return drawn, log_density(drawn, mean, std)


def sde_log_prob(velocity, latents, next_latents, a, b, std, ref_velocity=None, sigma_t=1.0):
    """(log density [B] of the given step, averaged over its elements, KL [B] to the reference's step or None).

    The KL, with ref_velocity, a constant: (mean − ref_mean)²/(2·sigma_t²), averaged over elements, where latents cancel.
    """
    if gpu := on_gpu(velocity):
        return gpu.sde_log_prob(velocity, latents, next_latents, a, b, std, ref_velocity, sigma_t)
    log_prob = log_density(next_latents.float(), sde_mean(velocity, latents, a, b), std)
    if ref_velocity is None:
        return log_prob, None
    gap = b * (velocity.float() - ref_velocity.detach().float())
    return log_prob, gap.square().flatten(1).mean(1) / (2 * sigma_t**2)


def sde_mean(velocity, latents, a, b):
    return latents.float() * a + velocity.float() * b


def log_density(x, mean, std):
    return -0.5 * ((x - mean) / std).square().flatten(1).mean(1) - math.log(std) - 0.5 * math.log(2 * math.pi)


def scan_tile(z, targets, start, peak, total, picked, scale=1.0):
    """One tile of a running log-softmax, in place: logits z [N,V] become exp(scale·z − peak).

    V vocabulary entries from `start` on; targets [N], counted over the whole vocabulary. peak, total, picked [N], float32 or
    wider: the greatest scaled logit so far (−inf at first), Σ exp(logit − peak), and the target's scaled logit once its tile
    has passed. Returns keep [N]: what sums of exp(logit − old peak) must be multiplied by.
    """
    if gpu := on_gpu(z):
        return gpu.scan_tile(z, targets, start, peak, total, picked, scale)
    if scale != 1:
        z.mul_(scale)
    index, inside = place_in_tile(targets, start, z.shape[1])
    picked.copy_(torch.where(inside, z.gather(1, index), picked[:, None])[:, 0])
    top = torch.maximum(peak, z.amax(1))
    keep = (peak - top).exp()
    z.sub_(top[:, None]).exp_()
    total.mul_(keep).add_(z.sum(1))
    peak.copy_(top)
    return keep


def place_in_tile(targets, start, width):
    """Column of each of targets [N] within a tile of the vocabulary [N,1], and whether it lies there (if not, it is any)."""
    index = (targets - start)[:, None]
    return index.clamp(0, width - 1), (index >= 0) & (index < width)


all_laid_out = fast_linears
laid_out = fast_linear
for_convolutions = channels_last
