"""Every fused operation of the project: the plain torch form that defines it, and what runs in its place.

On a GPU that is a Triton kernel (triton_kernels.py), on a CPU whatever form of torch's is fastest. KERNELS=plain runs the
plain forms only. A model calls only this file, so an operation has one home.

Shapes: B batch, L tokens, H heads, K key-value heads, E channels of one head, D = H·E width.
"""

import contextlib
import math
import os

import torch
import torch.nn.functional as F
from torch import nn

FUSED = os.environ.get("KERNELS", "fused") != "plain"


def on_gpu(x):
    """triton_kernels if an operation on x is to run there, else None: Triton comes with CUDA builds of torch."""
    if not FUSED or not x.is_cuda or x.dtype == torch.float64 or torch.compiler.is_compiling():
        return None
    from kernels import triton_forms as triton_kernels
    return triton_kernels


def on_cpu(x):
    return FUSED and x.device.type == "cpu"


def modulate(x, shift, scale, eps=1e-6):
    """LayerNorm without its own affine part, then adaLN: norm(x)·(1 + scale) + shift. x [B,L,D], shift, scale [B,D]."""
    if gpu := on_gpu(x):
        return gpu.modulate(x, shift, scale, eps)
    if on_cpu(x) and x[0].numel() < 2**17:  # so small that calls cost more than passes
        return torch.addcmul(shift[:, None], F.layer_norm(x, x.shape[-1:], eps=eps), 1 + scale[:, None])
    if on_cpu(x):  # one pass over each picture: its own affine LayerNorm
        parts = [F.layer_norm(*part, eps) for part in zip(x, [x.shape[-1:]] * len(x), 1 + scale, shift)]
        return torch.stack(parts) if len(parts) > 1 else parts[0][None]
    return F.layer_norm(x, x.shape[-1:], eps=eps) * (1 + scale[:, None]) + shift[:, None]


def gate_residual(x, branch, gate):
    """x + gate·branch. x, branch [B,L,D], gate [B,D]."""
    if gpu := on_gpu(x):
        return gpu.gate_residual(x, branch, gate)
    if on_cpu(x):
        return torch.addcmul(x, gate[:, None], branch)
    return x + gate[:, None] * branch


def rms_norm(x, weight, eps=1e-6):
    """x / sqrt(mean(x²) + eps) · weight over the last dimension, the mean in float32."""
    if gpu := on_gpu(x):
        return gpu.rms_norm(x, weight, eps)
    if on_cpu(x) and x.dtype == torch.float32:  # a norm is one pass that writes nothing, a mean of squares two that do
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        y = x * (norm * norm).div_(x.shape[-1]).add_(eps).rsqrt_()
        return y * weight if weight.requires_grad and torch.is_grad_enabled() else y.mul_(weight)
    wide = x.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype) * weight


class RMSNorm(nn.Module):
    """`rms_norm` with its learned scale [D]."""

    def __init__(self, width, eps=1e-6):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x):
        return rms_norm(x, self.weight, self.eps)


def split_qkv(qkv, num_heads, q_weight=None, k_weight=None, eps=1e-6):
    """Packed projection [B,L,3D] -> q, k, v [B,H,L,E]; q and k RMS-normalised per head if weights [E] are given."""
    if gpu := on_gpu(qkv):
        return gpu.split_qkv(qkv, num_heads, q_weight, k_weight, eps)
    B, L, width = qkv.shape
    q, k, v = qkv.view(B, L, 3, num_heads, width // (3 * num_heads)).unbind(2)  # each [B,L,H,E]
    if q_weight is not None:
        q, k = rms_norm(q, q_weight, eps), rms_norm(k, k_weight, eps)
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


def joint_qkv(context, x, num_heads, context_norms, x_norms, eps=1e-6):
    """`split_qkv` of two streams [B,L,3D] and [B,N,3D], one behind the other: q, k, v [B,H,L+N,E].

    context_norms, x_norms: (q_weight, k_weight), each [E] or None.
    """
    gpu = on_gpu(x) if x_norms[0] is not None else None
    if gpu:
        return gpu.joint_qkv(context, x, num_heads, context_norms, x_norms, eps)
    streams = split_qkv(context, num_heads, *context_norms, eps), split_qkv(x, num_heads, *x_norms, eps)
    return tuple(torch.cat(pair, dim=2) for pair in zip(*streams, strict=True))


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


def attention(q, k, v, mask=None, causal=False, scale=None):
    """softmax(q·kᵀ·scale)·v over q [B,H,L,E], k, v [B,H,S,E]; heads joined: [B,L,D].

    mask: added to the scores, or boolean (True: may attend).
    """
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=scale)
    return out.transpose(1, 2).flatten(2)


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


# ---------------------------------------------------------------------------------------------------------------------
# One step of a stochastic sampler, in float32: mean = a·latents + b·velocity, deviation std; all [B,C,h,w] but the numbers


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


# ---------------------------------------------------------------------------------------------------------------------
# Softmax over a vocabulary that passes by in tiles


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


# ---------------------------------------------------------------------------------------------------------------------
# Layouts


def for_convolutions(x):
    """x [B,C,H,W], on a CPU with its channels last in memory, which all convolutions that follow keep and are faster by."""
    return x.contiguous(memory_format=torch.channels_last) if on_cpu(x) else x


def laid_out(weight, bias=None, copy=True):
    """A function x [...,D] -> x·Wᵀ + bias of a frozen W [V,D], for many calls with the same number of rows.

    On a CPU oneDNN multiplies faster by a copy of W that lies in blocks: a tenth with many rows, two to four times with few,
    where all that counts is how fast W can be read. The first call makes the copy, as large as W, for its number of rows.
    Without a copy oneDNN is still the faster with a few hundred rows. The function's `gelu=True` applies GELU (tanh form) to
    the result while it is in the cache.
    """
    if not (on_cpu(weight) and weight.dtype == torch.float32 and torch.backends.mkldnn.is_available()):
        return lambda x, gelu=False: plain_linear(x, weight, bias, gelu)
    weight, ready = weight.detach(), []

    def product(x, gelu=False):
        if not ready:
            rows = x.numel() // x.shape[-1]
            ready.append(torch.ops.mkldnn._reorder_linear_weight(weight, rows) if copy else weight)
        after = ("gelu", [], "tanh") if gelu else ("none", [], "")
        return torch.ops.mkldnn._linear_pointwise(x, ready[0], bias, *after)

    return product


def plain_linear(x, weight, bias, gelu=False):
    y = F.linear(x, weight, bias)
    return F.gelu(y, approximate="tanh") if gelu else y


def gelu_linear(layer, x):
    """GELU (tanh form) of an nn.Linear's output; in one pass where the layer is `all_laid_out`."""
    product = vars(layer).get("forward")
    return F.gelu(layer(x), approximate="tanh") if product is None else product(x, gelu=True)


def is_sharded(module):
    return any(hasattr(part, "reshard") for part in module.modules())


def is_compiled(module):
    return any(part._compiled_call_impl is not None for part in module.modules())  # what nn.Module.compile sets


@contextlib.contextmanager
def all_laid_out(module, copy=True):
    """Within it every nn.Linear of a module is computed by `laid_out`: no gradients, and no change of weights meanwhile.

    Not those of a module that FSDP2 shards, whose weights come and go, nor of a compiled one.
    """
    left_alone = is_sharded(module) or is_compiled(module)
    layers = [layer for layer in module.modules() if type(layer) is nn.Linear and not left_alone]
    for layer in layers:
        layer.forward = laid_out(layer.weight, layer.bias, copy)  # of this object, before that of its class
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def has_graphs(x):
    return x.is_cuda


def as_graph(function, *inputs):
    """`function` for tensors like `inputs`, on a GPU as a CUDA graph: its launches are recorded once and made as one.

    What it writes beside its result must lie in tensors that stay where they are. Results are copies.
    """
    if not has_graphs(inputs[0]):
        return function
    held, side = [x.clone() for x in inputs], torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # the first call compiles kernels and makes workspaces, which cannot be recorded
        function(*held)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = function(*held)

    def replay(*inputs):
        for mine, x in zip(held, inputs, strict=True):
            mine.copy_(x)
        graph.replay()
        return tuple(x.clone() for x in results)

    return replay
