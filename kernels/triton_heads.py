"""A packed projection split into heads, with qk-norm or rotation on the way, as Triton kernels.

A packed projection is a list of heads, the queries' first, then the keys', then the values'. See
triton_launch.py for what all kernels have in common, and for the letters.
"""

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from kernels.triton_launch import check, launch, load, promoted, rounded, unit_stride

# Values of a tile: 16 for each of 128 threads, few enough that all that a gradient holds at once
# fits the registers.
HEAD_TILE = 2048


def head_tile(E, rows):
    """(BLOCK, ROWS, programs) of tiles [ROWS,BLOCK] over `rows` heads of E channels."""
    block = triton.next_power_of_2(E)
    tile = max(1, HEAD_TILE // block)
    return block, tile, triton.cdiv(rows, tile)


@triton.jit
def heads_of_tile(HEADS: tl.constexpr, ROWS: tl.constexpr):
    """(token [ROWS,1], head [ROWS,1]) of the heads that a program computes, HEADS of each token."""
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    # Offsets are int64, because those of a large batch pass 2³¹.
    return (i // HEADS).to(tl.int64), i % HEADS


# --------------------------------------------------------------------------------------------------
# Heads of the MMDiT: queries and keys RMS-normalised


@triton.jit
def head_norm_kernel(qkv, q_weight, k_weight, out, out_step, N, L, eps, H: tl.constexpr,
                     PARTS: tl.constexpr, E: tl.constexpr, BLOCK: tl.constexpr,
                     ROWS: tl.constexpr):
    """The first PARTS·H heads of qkv [N,3,H,E], weights [E] -> out [B,L,PARTS,H,E].

    out_step is that from picture to picture. Queries and keys are normalised, values copied.
    """
    token, head = heads_of_tile(PARTS * H, ROWS)  # each [ROWS,1]
    channel = tl.arange(0, BLOCK)[None, :]  # [1,BLOCK], of which E exist
    inside = (token < N) & (channel < E)
    x = load(qkv + token * (3 * H * E) + head * E + channel, inside)
    normed = rounded(x * tl.rsqrt(tl.sum(x * x, 1)[:, None] / E + eps), qkv)
    # A tile may hold heads of all three kinds, so both weights are read, from the cache.
    wq = load(q_weight + channel, channel < E)
    wk = load(k_weight + channel, channel < E)
    x = tl.where(head < 2 * H, normed * tl.where(head < H, wq, wk), x)
    start = token // L * out_step + token % L * (PARTS * H * E)
    tl.store(out + start + head * E + channel, x, mask=inside)


@triton.jit
def head_norm_backward_kernel(qkv, q_weight, k_weight, dq, dk, dv, dqkv, partial, q_b, q_h, q_l,
                              k_b, k_h, k_l, v_b, v_h, v_l, N, L, eps, H: tl.constexpr,
                              E: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
                              SUMS: tl.constexpr):
    """dq, dk, dv [B,H,L,E] at their steps, with qkv's queries and keys -> dqkv [N,3,H,E].

    With SUMS also the parts of the weights' gradients in partial [blocks,2,E].
    """
    token, head = heads_of_tile(3 * H, ROWS)  # each [ROWS,1]
    channel = tl.arange(0, BLOCK)[None, :]  # [1,BLOCK], of which E exist
    inside = (token < N) & (channel < E)
    b = token // L
    t = token % L
    is_q = head < H
    is_k = (head >= H) & (head < 2 * H)
    is_v = head >= 2 * H
    # A head lies in one of the three gradients; the other two loads are masked and give 0.
    g = load(dq + b * q_b + head * q_h + t * q_l + channel, inside & is_q)
    g += load(dk + b * k_b + (head - H) * k_h + t * k_l + channel, inside & is_k)
    g += load(dv + b * v_b + (head - 2 * H) * v_h + t * v_l + channel, inside & is_v)
    start = token * (3 * H * E) + head * E + channel
    x = load(qkv + start, inside & (head < 2 * H))
    r = tl.rsqrt(tl.sum(x * x, 1)[:, None] / E + eps)
    x = x * r
    if SUMS:
        out = partial + tl.program_id(0).to(tl.int64) * (2 * E) + channel
        tl.store(out, tl.sum(tl.where(is_q, g * x, 0.0), 0)[None, :], mask=channel < E)
        tl.store(out + E, tl.sum(tl.where(is_k, g * x, 0.0), 0)[None, :], mask=channel < E)
    wq = load(q_weight + channel, channel < E)
    wk = load(k_weight + channel, channel < E)
    weighed = g * tl.where(is_q, wq, wk)
    dx = r * (weighed - x * (tl.sum(weighed * x, 1)[:, None] / E))
    tl.store(dqkv + start, tl.where(is_v, g, dx), mask=inside)


def norm_heads(qkv, q_weight, k_weight, out, eps):
    """Write the normalised heads of qkv [B,L,3D] into out [B,L,2 or 3,H,E]; 3: the values too."""
    B, L, parts, H, E = out.shape
    block, rows, programs = head_tile(E, B * L * parts * H)
    launch(head_norm_kernel, (programs,), qkv[..., :parts * H * E], q_weight, k_weight, out,
           out.stride(0), B * L, L, eps, H=H, PARTS=parts, E=E, BLOCK=block, ROWS=rows)


def norm_heads_backward(qkv, q_weight, k_weight, grads, eps, sums):
    """(dqkv [B,L,3D], dq_weight, dk_weight [E], None without sums) for dq, dk, dv [B,H,L,E]."""
    B, H, L, E = grads[0].shape
    grads = [unit_stride(g) for g in grads]
    # Attention gives its gradients in a layout of its own, so the kernel is told their steps.
    steps = [step for g in grads for step in g.stride()[:3]]
    dqkv = torch.empty_like(qkv)
    block, rows, programs = head_tile(E, B * L * 3 * H)
    partial = torch.empty(programs if sums else 0, 2, E, device=qkv.device)
    launch(head_norm_backward_kernel, (programs,), qkv[..., :2 * H * E], q_weight, k_weight, *grads,
           dqkv, partial, *steps, B * L, L, eps, H=H, E=E, BLOCK=block, ROWS=rows, SUMS=sums)
    if not sums:
        return dqkv, None, None
    q_sum, k_sum = partial.sum(0)
    return dqkv, q_sum.to(q_weight.dtype), k_sum.to(k_weight.dtype)


class SplitQKV(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv, q_weight, k_weight, num_heads, eps):
        qkv, q_weight, k_weight = (t.contiguous() for t in (qkv, q_weight, k_weight))
        B, L, width = qkv.shape
        E = width // (3 * num_heads)
        ctx.save_for_backward(qkv, q_weight, k_weight)
        ctx.eps = eps
        dtype = promoted(qkv, q_weight, k_weight)
        out = torch.empty(B, L, 2, num_heads, E, dtype=dtype, device=qkv.device)
        norm_heads(qkv, q_weight, k_weight, out, eps)
        q, k = out.unbind(2)  # each [B,L,H,E]
        # Attention takes token-major memory without a copy. The values are not normalised, so they
        # stay where they are.
        v = qkv.view(B, L, 3, num_heads, E)[:, :, 2]
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        sums = any(ctx.needs_input_grad[1:3])
        gradients = norm_heads_backward(*ctx.saved_tensors, grads, ctx.eps, sums)
        return *gradients, None, None


def split_qkv(qkv, num_heads, q_weight=None, k_weight=None, eps=1e-6):
    if q_weight is None:
        return NotImplemented  # the plain form, which then only makes views
    B, L, width = qkv.shape
    E = width // (3 * num_heads)
    check("qkv", qkv, (B, L, 3 * num_heads * E))
    check("q_weight", q_weight, (E,))
    check("k_weight", k_weight, (E,))
    return SplitQKV.apply(qkv, q_weight, k_weight, num_heads, eps)


class JointQKV(torch.autograd.Function):
    @staticmethod
    def forward(ctx, context, x, num_heads, eps, *norms):
        context, x, *norms = (t.contiguous() for t in (context, x, *norms))
        B, L, width = context.shape
        N = x.shape[1]
        E = width // (3 * num_heads)
        ctx.save_for_backward(context, x, *norms)
        ctx.eps = eps
        dtype = promoted(context, x, *norms)
        out = torch.empty(B, L + N, 3, num_heads, E, dtype=dtype, device=x.device)
        # Both streams write into one tensor, so that nothing is left to concatenate.
        norm_heads(context, *norms[:2], out[:, :L], eps)
        norm_heads(x, *norms[2:], out[:, L:], eps)
        return tuple(t.transpose(1, 2) for t in out.unbind(2))

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        # With checkpointing each access of saved_tensors recomputes, and a second one is an error.
        context, x, *norms = ctx.saved_tensors
        L = context.shape[1]
        sums = ctx.needs_input_grad[4:]
        text = [g[:, :, :L] for g in grads]
        image = [g[:, :, L:] for g in grads]
        dcontext, *dtext = norm_heads_backward(context, *norms[:2], text, ctx.eps, any(sums[:2]))
        dx, *dimage = norm_heads_backward(x, *norms[2:], image, ctx.eps, any(sums[2:]))
        return dcontext, dx, None, None, *dtext, *dimage


def joint_qkv(context, x, num_heads, context_norms, x_norms, eps=1e-6):
    if any(weight is None for weight in (*context_norms, *x_norms)):
        return NotImplemented  # without norms there is nothing to fuse
    E = x.shape[2] // (3 * num_heads)
    check("context", context, (len(x), context.shape[1], 3 * num_heads * E))
    check("x", x, (len(x), x.shape[1], 3 * num_heads * E))
    for weight in (*context_norms, *x_norms):
        check("a norm's weight", weight, (E,))
    return JointQKV.apply(context, x, num_heads, eps, *context_norms, *x_norms)


# --------------------------------------------------------------------------------------------------
# Heads of Qwen2.5-VL: queries and keys rotated


@triton.jit
def rotate_kernel(qkv, cos, sin, out, cos_step, sin_step, N, HEADS: tl.constexpr,
                  PACKED: tl.constexpr, E: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """The first HEADS of PACKED heads of qkv [N,PACKED,E], turned -> out [N,HEADS,E]."""
    token, head = heads_of_tile(HEADS, ROWS)  # each [ROWS,1]
    channel = tl.arange(0, BLOCK // 2)[None, :]  # of the first half of a head
    HALF: tl.constexpr = E // 2
    inside = (token < N) & (channel < HALF)
    start = qkv + (token * PACKED + head) * E + channel
    end = out + (token * HEADS + head) * E + channel
    first = load(start, inside)
    second = load(start + HALF, inside)
    c = load(cos + token * cos_step + channel, inside)
    s = load(sin + token * sin_step + channel, inside)
    # The plain form rounds each product to the type of cos, before the two are added.
    tl.store(end, rounded(first * c, cos) - rounded(second * s, cos), mask=inside)
    tl.store(end + HALF, rounded(second * c, cos) + rounded(first * s, cos), mask=inside)


@triton.jit
def load_one_of(q, k, v, is_q, is_k, is_v):
    """Values of a head that lies in one of three tensors; masked loads of the others give 0."""
    return load(q, is_q) + load(k, is_k) + load(v, is_v)


@triton.jit
def rotate_backward_kernel(dq, dk, dv, cos, sin, dqkv, q_n, q_h, k_n, k_h, v_n, v_h, cos_step,
                           sin_step, N, H: tl.constexpr, K: tl.constexpr, E: tl.constexpr,
                           BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """dq [N,H,E], dk, dv [N,K,E] at their steps -> dqkv [N,H+2K,E], values just copied."""
    token, head = heads_of_tile(H + 2 * K, ROWS)  # each [ROWS,1]
    channel = tl.arange(0, BLOCK // 2)[None, :]  # of the first half of a head
    HALF: tl.constexpr = E // 2
    inside = (token < N) & (channel < HALF)
    is_q = inside & (head < H)
    is_k = inside & (head >= H) & (head < H + K)
    is_v = inside & (head >= H + K)
    q = dq + token * q_n + head * q_h + channel
    k = dk + token * k_n + (head - H) * k_h + channel
    v = dv + token * v_n + (head - H - K) * v_h + channel
    first = load_one_of(q, k, v, is_q, is_k, is_v)
    second = load_one_of(q + HALF, k + HALF, v + HALF, is_q, is_k, is_v)
    # The values' angle is 0: cos 1, sin 0.
    turned = inside & (head < H + K)
    c = tl.load(cos + token * cos_step + channel, mask=turned, other=1.0).to(tl.float32)
    s = load(sin + token * sin_step + channel, turned)
    end = dqkv + (token * (H + 2 * K) + head) * E + channel
    tl.store(end, first * c + second * s, mask=inside)
    tl.store(end + HALF, second * c - first * s, mask=inside)


class SplitRotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv, cos, sin, heads, kv_heads):
        qkv = qkv.contiguous()
        N = len(qkv)
        E = cos.shape[-1]
        turned = heads + kv_heads
        packed = heads + 2 * kv_heads
        # Every angle stands twice, once for each half of a head, so half of them are read.
        dtype = promoted(qkv, cos)
        cos, sin = (unit_stride(t)[:, 0, :E // 2].to(dtype) for t in (cos, sin))
        ctx.save_for_backward(cos, sin)
        ctx.heads = (heads, kv_heads)
        out = torch.empty(N, turned, E, dtype=qkv.dtype, device=qkv.device)
        block, rows, programs = head_tile(E, N * turned)
        launch(rotate_kernel, (programs,), qkv[:, :turned * E], cos, sin, out, cos.stride(0),
               sin.stride(0), N, HEADS=turned, PACKED=packed, E=E, BLOCK=block, ROWS=rows)
        return out[:, :heads], out[:, heads:], qkv.view(N, packed, E)[:, turned:]

    @staticmethod
    @once_differentiable
    def backward(ctx, dq, dk, dv):
        cos, sin = ctx.saved_tensors
        H, K = ctx.heads
        N, _, E = dq.shape
        grads = [unit_stride(g) for g in (dq, dk, dv)]
        steps = [step for g in grads for step in g.stride()[:2]]
        dqkv = torch.empty(N, (H + 2 * K) * E, dtype=dq.dtype, device=dq.device)
        block, rows, programs = head_tile(E, N * (H + 2 * K))
        launch(rotate_backward_kernel, (programs,), *grads, cos, sin, dqkv, *steps, cos.stride(0),
               sin.stride(0), N, H=H, K=K, E=E, BLOCK=block, ROWS=rows)
        return dqkv, None, None, None, None


def split_rotate(qkv, heads, kv_heads, cos, sin):
    N = len(qkv)
    E = cos.shape[-1]
    check("qkv", qkv, (N, (heads + 2 * kv_heads) * E))
    check("cos", cos, (N, 1, E))
    check("sin", sin, (N, 1, E))
    return SplitRotate.apply(qkv, cos, sin, heads, kv_heads)
