"""The fused operations as Triton kernels for CUDA, each with its gradient; ops.py defines them.

The functions take and return what their plain forms do. Two have no plain form there: the SDE step is that of flow_grpo.py,
scan_tile the loop body of log_probs.scan_vocabulary.
Memory and not arithmetic limits all of them, so each reads its inputs and writes its results once. Common to all:
- float32 inside, float32, bfloat16 or float16 outside. A result is rounded where the plain form rounds it, if that is
  cheap (rms_norm, split_qkv, split_rotate, swiglu), else only once, at the end. Gradients are rounded once.
- Gradients recompute a row's statistics from the row, which they read anyway, so nothing but inputs is kept.
- Sums over rows have two stages: a program sums its rows into a buffer of float32, torch sums the buffer. There are no
  atomics: equal inputs give equal bits. Sums whose gradient nobody asks for are not formed (a frozen adaLN, say).
- Widths are constants of the compiled kernel: a model has few, and the compiler then knows how far loads can be widened.
  Sizes of tiles are fixed, not tuned at the start, so that two runs are alike.

Shapes: B batch, L tokens, N rows (all leading dimensions as one), H heads, K key-value heads, E channels of one head,
D width, M width of the MLP, V vocabulary entries of a tile, s bytes of an element. "Moves" counts main memory; what all
rows share, such as a weight [D], is read from the cache and not counted.
"""

import functools
import math

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

WIDEST = 8192  # of a row held in registers: 16 values for each of 512 threads
ROWS = 16  # that a program sums before it writes to the buffer, which then has 1/8 of the bytes of bfloat16 rows
GATE_ROWS, GATE_COLUMNS = 32, 128  # tile of gate_residual: 256 bytes or more of a row, and few partial sums
HEAD_TILE = 2048  # values of a tile of heads: 16 for each of 128 threads, few enough for all that its gradient holds
COLUMNS = 1024  # of a row's block in swiglu
LATENTS = 2048  # values of a picture's block in the SDE step; any fixed number will do, see sde_kernel


def launch(kernel, grid, *args, num_warps=4, **constants):
    """Run `kernel` on the device of its first argument; a grid without programs is no launch.

    Products and sums are not fused, so that each is rounded where the plain form rounds it.
    """
    if any(isinstance(x, torch.Tensor) and x.dtype == torch.float64 for x in args):
        raise TypeError("the Triton kernels compute in float32; float64 is for the plain forms")
    if 0 not in grid:
        with torch.cuda.device_of(args[0]):
            kernel[grid](*args, num_warps=num_warps, enable_fp_fusion=False, **constants)


def row_block(width):
    """(BLOCK, warps) for rows held whole: 16 values a thread, so that what the gradients hold at once fits the registers."""
    if width > WIDEST:
        raise ValueError(f"rows of at most {WIDEST} values, got {width}")
    block = triton.next_power_of_2(width)
    return block, min(16, max(1, block // 512))


def unit_stride(x):
    """x itself if its last dimension lies without gaps, else a copy."""
    return x if x.stride(-1) == 1 else x.contiguous()


def check(name, x, shape):
    if x.shape != torch.Size(shape):  # a kernel would read past the end
        raise ValueError(f"{name} must have the shape {list(shape)}, got {list(x.shape)}")


def promoted(*tensors):
    return functools.reduce(torch.promote_types, (x.dtype for x in tensors))


@triton.jit
def rounded(x, like):
    """x as a tensor of the type behind the pointer `like` would hold it, again in float32."""
    return x.to(like.dtype.element_ty).to(tl.float32)


# ---------------------------------------------------------------------------------------------------------------------
# LayerNorm and adaLN


@triton.jit
def layer_norm(x, inside, eps, D: tl.constexpr):
    """(normalised row, 1/deviation) of a row in float32 that is 0 outside."""
    x = tl.where(inside, x - tl.sum(x, 0) / D, 0.0)
    r = tl.rsqrt(tl.sum(x * x, 0) / D + eps)
    return x * r, r


@triton.jit
def modulate_kernel(x, shift, scale, y, shift_step, scale_step, L, eps, D: tl.constexpr, BLOCK: tl.constexpr):
    """x [B,L,D], shift, scale [B,D] at their steps from row to row -> y [B,L,D]. A program a token. Moves 2·s·D a token."""
    row = tl.program_id(0).to(tl.int64)
    picture, at = row // L, tl.arange(0, BLOCK)
    inside = at < D
    normed, _ = layer_norm(tl.load(x + row * D + at, mask=inside, other=0.0).to(tl.float32), inside, eps, D)
    factor = 1 + tl.load(scale + picture * scale_step + at, mask=inside, other=0.0).to(tl.float32)
    added = tl.load(shift + picture * shift_step + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + row * D + at, normed * factor + added, mask=inside)


@triton.jit
def modulate_backward_kernel(x, scale, dy, dx, partial, scale_step, L, eps, D: tl.constexpr, BLOCK: tl.constexpr,
                             ROWS: tl.constexpr, SUMS: tl.constexpr):
    """x, dy -> dx [B,L,D], and the parts of dshift, dscale in partial [2,B,blocks,D]. A program ROWS tokens of a picture.

    Moves 3·s·D a token, and 8·D for each program.
    """
    block, picture = tl.program_id(0), tl.program_id(1).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < D
    factor = 1 + tl.load(scale + picture * scale_step + at, mask=inside, other=0.0).to(tl.float32)
    dshift, dscale = tl.full([BLOCK], 0.0, tl.float32), tl.full([BLOCK], 0.0, tl.float32)
    for i in range(ROWS):
        token = block * ROWS + i
        if token < L:
            start = (picture * L + token) * D
            row = tl.load(x + start + at, mask=inside, other=0.0).to(tl.float32)
            g = tl.load(dy + start + at, mask=inside, other=0.0).to(tl.float32)
            normed, r = layer_norm(row, inside, eps, D)
            if SUMS:
                dshift += g
                dscale += g * normed
            g = g * factor
            g = r * (g - tl.sum(g, 0) / D - normed * (tl.sum(g * normed, 0) / D))
            tl.store(dx + start + at, g, mask=inside)
    if SUMS:
        blocks = tl.num_programs(0)
        start = (picture * blocks + block) * D
        tl.store(partial + start + at, dshift, mask=inside)
        tl.store(partial + (tl.num_programs(1) * blocks).to(tl.int64) * D + start + at, dscale, mask=inside)


class Modulate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, shift, scale, eps):
        (B, L, D), x, shift, scale = x.shape, x.contiguous(), unit_stride(shift), unit_stride(scale)
        ctx.save_for_backward(x, scale)
        ctx.eps, ctx.shift_dtype = eps, shift.dtype
        y, (block, warps) = torch.empty_like(x, dtype=promoted(x, shift, scale)), row_block(D)
        launch(modulate_kernel, (B * L,), x, shift, scale, y, shift.stride(0), scale.stride(0), L, eps,
               D=D, BLOCK=block, num_warps=warps)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        (x, scale), dy, sums = ctx.saved_tensors, dy.contiguous(), any(ctx.needs_input_grad[1:3])
        (B, L, D), rows = x.shape, ROWS if sums else 1
        dx, blocks, (block, warps) = torch.empty_like(x), triton.cdiv(L, rows), row_block(D)
        partial = torch.empty(2, B, blocks if sums else 0, D, device=x.device)
        launch(modulate_backward_kernel, (blocks, B), x, scale, dy, dx, partial, scale.stride(0), L, ctx.eps,
               D=D, BLOCK=block, ROWS=rows, SUMS=sums, num_warps=warps)
        if not sums:
            return dx, None, None, None
        dshift, dscale = partial.sum(2)
        return dx, dshift.to(ctx.shift_dtype), dscale.to(scale.dtype), None


def modulate(x, shift, scale, eps=1e-6):
    """LayerNorm without its own affine part, then ·(1 + scale) + shift. x [B,L,D]; shift, scale [B,D], rows at any step."""
    check("shift", shift, (x.shape[0], x.shape[2]))
    check("scale", scale, shift.shape)
    return Modulate.apply(x, shift, scale, eps)


# ---------------------------------------------------------------------------------------------------------------------
# Gated residual


@triton.jit
def gate_tile(L, D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """(offsets [ROWS,COLUMNS] in [B,L,D], which of them exist, columns [1,COLUMNS], picture) of a program's tile."""
    picture = tl.program_id(2).to(tl.int64)
    token = tl.program_id(1) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    return (picture * L + token) * D + column, (token < L) & (column < D), column, picture


@triton.jit
def gate_residual_kernel(x, branch, gate, y, gate_step, L, D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """x, branch [B,L,D], gate [B,D] at its step from row to row -> y [B,L,D]. Moves 3·s·D a token."""
    at, inside, column, picture = gate_tile(L, D, ROWS, COLUMNS)
    g = tl.load(gate + picture * gate_step + column, mask=column < D, other=0.0).to(tl.float32)
    added = g * tl.load(branch + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + at, tl.load(x + at, mask=inside, other=0.0).to(tl.float32) + added, mask=inside)


@triton.jit
def gate_residual_backward_kernel(dy, branch, gate, dbranch, partial, gate_step, L, D: tl.constexpr, ROWS: tl.constexpr,
                                  COLUMNS: tl.constexpr, BRANCH: tl.constexpr, SUMS: tl.constexpr):
    """dy -> dbranch [B,L,D] if BRANCH; with branch, the parts of dgate in partial [B,blocks,D] if SUMS.

    Moves s·D a token for each of dy, dbranch and branch, and 4·D for each block of rows.
    """
    at, inside, column, picture = gate_tile(L, D, ROWS, COLUMNS)
    g = tl.load(dy + at, mask=inside, other=0.0).to(tl.float32)
    if BRANCH:
        factor = tl.load(gate + picture * gate_step + column, mask=column < D, other=0.0).to(tl.float32)
        tl.store(dbranch + at, factor * g, mask=inside)
    if SUMS:
        dgate = tl.sum(g * tl.load(branch + at, mask=inside, other=0.0).to(tl.float32), 0)[None, :]
        tl.store(partial + (picture * tl.num_programs(1) + tl.program_id(1)) * D + column, dgate, mask=column < D)


class GateResidual(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, branch, gate):
        (B, L, D), x, branch, gate = x.shape, x.contiguous(), branch.contiguous(), unit_stride(gate)
        ctx.save_for_backward(branch if ctx.needs_input_grad[2] else None, gate)
        ctx.dtypes, y = (x.dtype, branch.dtype), torch.empty_like(x, dtype=promoted(x, branch, gate))
        grid = triton.cdiv(D, GATE_COLUMNS), triton.cdiv(L, GATE_ROWS), B
        launch(gate_residual_kernel, grid, x, branch, gate, y, gate.stride(0), L, D=D, ROWS=GATE_ROWS, COLUMNS=GATE_COLUMNS)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        (branch, gate), (_, for_branch, sums), dy = ctx.saved_tensors, ctx.needs_input_grad, dy.contiguous()
        (B, L, D), blocks = dy.shape, triton.cdiv(dy.shape[1], GATE_ROWS)
        dbranch = torch.empty_like(dy, dtype=ctx.dtypes[1]) if for_branch else None
        partial = torch.empty(B, blocks if sums else 0, D, device=dy.device)
        if for_branch or sums:
            launch(gate_residual_backward_kernel, (triton.cdiv(D, GATE_COLUMNS), blocks, B), dy,
                   branch if sums else partial, gate, dbranch if for_branch else partial, partial, gate.stride(0), L,
                   D=D, ROWS=GATE_ROWS, COLUMNS=GATE_COLUMNS, BRANCH=for_branch, SUMS=sums)
        return dy.to(ctx.dtypes[0]), dbranch, partial.sum(1).to(gate.dtype) if sums else None


def gate_residual(x, branch, gate):
    """x + gate·branch. x, branch [B,L,D]; gate [B,D], rows at any step. The gradient of x is that of the result, no copy."""
    check("branch", branch, x.shape)
    check("gate", gate, (x.shape[0], x.shape[2]))
    return GateResidual.apply(x, branch, gate)


# ---------------------------------------------------------------------------------------------------------------------
# RMSNorm


@triton.jit
def rms_norm_kernel(x, weight, y, eps, D: tl.constexpr, BLOCK: tl.constexpr):
    """x [N,D], weight [D] -> y [N,D]. A program a row. Moves 2·s·D a row."""
    start, at = tl.program_id(0).to(tl.int64) * D, tl.arange(0, BLOCK)
    inside = at < D
    row = tl.load(x + start + at, mask=inside, other=0.0).to(tl.float32)
    factor = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + start + at, rounded(row * tl.rsqrt(tl.sum(row * row, 0) / D + eps), x) * factor, mask=inside)


@triton.jit
def rms_norm_backward_kernel(x, weight, dy, dx, partial, N, eps, D: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
                             SUMS: tl.constexpr):
    """x, dy -> dx [N,D], and the parts of dweight in partial [blocks,D]. A program ROWS rows.

    Moves 3·s·D a row, and 4·D for each program.
    """
    block, at = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    inside = at < D
    factor = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    dweight = tl.full([BLOCK], 0.0, tl.float32)
    for i in range(ROWS):
        if block * ROWS + i < N:
            start = (block * ROWS + i) * D
            row = tl.load(x + start + at, mask=inside, other=0.0).to(tl.float32)
            g = tl.load(dy + start + at, mask=inside, other=0.0).to(tl.float32)
            r = tl.rsqrt(tl.sum(row * row, 0) / D + eps)
            row = row * r
            if SUMS:
                dweight += g * row
            g = g * factor
            tl.store(dx + start + at, r * (g - row * (tl.sum(g * row, 0) / D)), mask=inside)
    if SUMS:
        tl.store(partial + block * D + at, dweight, mask=inside)


class RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps):
        x, weight, D = x.contiguous(), weight.contiguous(), x.shape[-1]
        ctx.save_for_backward(x, weight)
        ctx.eps, y, (block, warps) = eps, torch.empty_like(x, dtype=promoted(x, weight)), row_block(D)
        launch(rms_norm_kernel, (x.numel() // D,), x, weight, y, eps, D=D, BLOCK=block, num_warps=warps)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        (x, weight), dy, sums, D = ctx.saved_tensors, dy.contiguous(), ctx.needs_input_grad[1], dy.shape[-1]
        dx, N, rows, (block, warps) = torch.empty_like(x), x.numel() // D, ROWS if sums else 1, row_block(D)
        blocks = triton.cdiv(N, rows)
        partial = torch.empty(blocks if sums else 0, D, device=x.device)
        launch(rms_norm_backward_kernel, (blocks,), x, weight, dy, dx, partial, N, ctx.eps,
               D=D, BLOCK=block, ROWS=rows, SUMS=sums, num_warps=warps)
        return dx, partial.sum(0).to(weight.dtype) if sums else None, None


def rms_norm(x, weight, eps=1e-6):
    """x / sqrt(mean(x²) + eps), rounded to x's type, · weight. x [...,D], weight [D]."""
    check("weight", weight, x.shape[-1:])
    return RMSNorm.apply(x, weight, eps)


# ---------------------------------------------------------------------------------------------------------------------
# Heads: a packed projection is a list of heads, the queries' first, then the keys', then the values'


def head_tile(E, rows):
    """(BLOCK, ROWS, programs) of tiles [ROWS,BLOCK] over `rows` heads of E channels."""
    block = triton.next_power_of_2(E)
    tile = max(1, HEAD_TILE // block)
    return block, tile, triton.cdiv(rows, tile)


@triton.jit
def head_norm_kernel(qkv, q_weight, k_weight, out, out_step, N, L, eps, H: tl.constexpr, PARTS: tl.constexpr,
                     E: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """The first PARTS·H heads of qkv [N,3,H,E], weights [E] -> out [B,L,PARTS,H,E] at its step from picture to picture.

    Queries and keys are normalised, values (PARTS 3) copied. A program ROWS heads. Moves 2·PARTS·s·D a token.
    """
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    token, head, at = (i // (PARTS * H)).to(tl.int64), i % (PARTS * H), tl.arange(0, BLOCK)[None, :]
    inside = (token < N) & (at < E)
    x = tl.load(qkv + token * (3 * H * E) + head * E + at, mask=inside, other=0.0).to(tl.float32)
    normed = rounded(x * tl.rsqrt(tl.sum(x * x, 1)[:, None] / E + eps), qkv)
    wq = tl.load(q_weight + at, mask=at < E, other=0.0).to(tl.float32)
    wk = tl.load(k_weight + at, mask=at < E, other=0.0).to(tl.float32)
    x = tl.where(head < 2 * H, normed * tl.where(head < H, wq, wk), x)
    tl.store(out + token // L * out_step + token % L * (PARTS * H * E) + head * E + at, x, mask=inside)


@triton.jit
def head_norm_backward_kernel(qkv, q_weight, k_weight, dq, dk, dv, dqkv, partial, q_b, q_h, q_l, k_b, k_h, k_l,
                              v_b, v_h, v_l, N, L, eps, H: tl.constexpr, E: tl.constexpr, BLOCK: tl.constexpr,
                              ROWS: tl.constexpr, SUMS: tl.constexpr):
    """dq, dk, dv [B,H,L,E] at their steps, with qkv's queries and keys -> dqkv [N,3,H,E], parts of dweights [blocks,2,E].

    A program ROWS heads. Moves 8·s·D a token, and 8·E for each program.
    """
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    token, head, at = (i // (3 * H)).to(tl.int64), i % (3 * H), tl.arange(0, BLOCK)[None, :]
    b, t, inside = token // L, token % L, (token < N) & (at < E)
    is_q, is_v = head < H, head >= 2 * H
    is_k = (head >= H) & (head < 2 * H)
    g = tl.load(dq + b * q_b + head * q_h + t * q_l + at, mask=inside & is_q, other=0.0).to(tl.float32)
    g += tl.load(dk + b * k_b + (head - H) * k_h + t * k_l + at, mask=inside & is_k, other=0.0).to(tl.float32)
    g += tl.load(dv + b * v_b + (head - 2 * H) * v_h + t * v_l + at, mask=inside & is_v, other=0.0).to(tl.float32)
    start = token * (3 * H * E) + head * E + at
    x = tl.load(qkv + start, mask=inside & (head < 2 * H), other=0.0).to(tl.float32)
    r = tl.rsqrt(tl.sum(x * x, 1)[:, None] / E + eps)
    x = x * r
    if SUMS:
        out = partial + tl.program_id(0).to(tl.int64) * (2 * E) + at
        tl.store(out, tl.sum(tl.where(is_q, g * x, 0.0), 0)[None, :], mask=at < E)
        tl.store(out + E, tl.sum(tl.where(is_k, g * x, 0.0), 0)[None, :], mask=at < E)
    wq = tl.load(q_weight + at, mask=at < E, other=0.0).to(tl.float32)
    wk = tl.load(k_weight + at, mask=at < E, other=0.0).to(tl.float32)
    weighed = g * tl.where(is_q, wq, wk)
    dx = r * (weighed - x * (tl.sum(weighed * x, 1)[:, None] / E))
    tl.store(dqkv + start, tl.where(is_v, g, dx), mask=inside)


def norm_heads(qkv, q_weight, k_weight, out, eps):
    """Write the normalised heads of qkv [B,L,3D] into out [B,L,2 or 3,H,E], some tokens of a tensor; 3: the values too."""
    B, L, parts, H, E = out.shape
    block, rows, blocks = head_tile(E, B * L * parts * H)
    launch(head_norm_kernel, (blocks,), qkv[..., :parts * H * E], q_weight, k_weight, out, out.stride(0), B * L, L, eps,
           H=H, PARTS=parts, E=E, BLOCK=block, ROWS=rows)


def norm_heads_backward(qkv, q_weight, k_weight, grads, eps, sums):
    """(dqkv [B,L,3D], dq_weight, dk_weight [E], None without sums) for grads dq, dk, dv [B,H,L,E]."""
    (B, H, L, E), grads = grads[0].shape, [unit_stride(g) for g in grads]
    dqkv, (block, rows, blocks) = torch.empty_like(qkv), head_tile(E, B * L * 3 * H)
    partial = torch.empty(blocks if sums else 0, 2, E, device=qkv.device)
    launch(head_norm_backward_kernel, (blocks,), qkv[..., :2 * H * E], q_weight, k_weight, *grads, dqkv, partial,
           *(step for g in grads for step in g.stride()[:3]), B * L, L, eps, H=H, E=E, BLOCK=block, ROWS=rows, SUMS=sums)
    if not sums:
        return dqkv, None, None
    q_sum, k_sum = partial.sum(0)
    return dqkv, q_sum.to(q_weight.dtype), k_sum.to(k_weight.dtype)


class SplitQKV(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv, q_weight, k_weight, num_heads, eps):
        qkv, q_weight, k_weight = qkv.contiguous(), q_weight.contiguous(), k_weight.contiguous()
        (B, L, width), H = qkv.shape, num_heads
        ctx.save_for_backward(qkv, q_weight, k_weight)
        ctx.eps = eps
        out = torch.empty(B, L, 2, H, width // (3 * H), dtype=promoted(qkv, q_weight, k_weight), device=qkv.device)
        norm_heads(qkv, q_weight, k_weight, out, eps)
        return tuple(t.transpose(1, 2) for t in (*out.unbind(2), qkv.view(B, L, 3, H, -1)[:, :, 2]))

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        return *norm_heads_backward(*ctx.saved_tensors, grads, ctx.eps, any(ctx.needs_input_grad[1:3])), None, None


class JointQKV(torch.autograd.Function):
    @staticmethod
    def forward(ctx, context, x, num_heads, eps, *norms):
        context, x, *norms = (t.contiguous() for t in (context, x, *norms))
        (B, L, width), N, dtype = context.shape, x.shape[1], promoted(context, x, *norms)
        ctx.save_for_backward(context, x, *norms)
        ctx.eps = eps
        out = torch.empty(B, L + N, 3, num_heads, width // (3 * num_heads), dtype=dtype, device=x.device)
        norm_heads(context, *norms[:2], out[:, :L], eps)
        norm_heads(x, *norms[2:], out[:, L:], eps)
        return tuple(t.transpose(1, 2) for t in out.unbind(2))

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        (context, x, *norms), sums, L = ctx.saved_tensors, ctx.needs_input_grad[4:], ctx.saved_tensors[0].shape[1]
        dcontext, *first = norm_heads_backward(context, *norms[:2], [g[:, :, :L] for g in grads], ctx.eps, any(sums[:2]))
        dx, *second = norm_heads_backward(x, *norms[2:], [g[:, :, L:] for g in grads], ctx.eps, any(sums[2:]))
        return dcontext, dx, None, None, *first, *second


def split_qkv(qkv, num_heads, q_weight=None, k_weight=None, eps=1e-6):
    """Packed projection [B,L,3D] -> q, k, v [B,H,L,E]; q and k RMS-normalised per head if weights [E] are given.

    The three are views of token-major memory, as scaled_dot_product_attention takes it without a copy: q and k of one
    new tensor [B,L,2,H,E], v of qkv itself. Without weights all three are views of qkv and no kernel runs.
    """
    B, L, width = qkv.shape
    E = width // (3 * num_heads)
    if q_weight is None:
        return tuple(t.transpose(1, 2) for t in qkv.view(B, L, 3, num_heads, E).unbind(2))
    check("qkv", qkv, (B, L, 3 * num_heads * E))
    check("q_weight", q_weight, (E,))
    check("k_weight", k_weight, (E,))
    return SplitQKV.apply(qkv, q_weight, k_weight, num_heads, eps)


def joint_qkv(context, x, num_heads, context_norms, x_norms, eps=1e-6):
    """`split_qkv` of two streams [B,L,3D], [B,N,3D], one behind the other: q, k, v [B,H,L+N,E], views of one new tensor
    [B,L+N,3,H,E]. context_norms, x_norms: (q_weight, k_weight), each [E]."""
    E = x.shape[2] // (3 * num_heads)
    check("context", context, (len(x), context.shape[1], 3 * num_heads * E))
    check("x", x, (len(x), x.shape[1], 3 * num_heads * E))
    for weight in (*context_norms, *x_norms):
        check("a norm's weight", weight, (E,))
    return JointQKV.apply(context, x, num_heads, eps, *context_norms, *x_norms)


@triton.jit
def rotate_kernel(qkv, cos, sin, out, cos_step, sin_step, N, HEADS: tl.constexpr, PACKED: tl.constexpr, E: tl.constexpr,
                  BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """The first HEADS of PACKED heads of qkv [N,PACKED,E], first halves of cos, sin [N,E] -> out [N,HEADS,E].

    A program ROWS heads. Each product is rounded to the type of cos. Moves 2·s·HEADS·E + s·E a row.
    """
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    token, head, at = (i // HEADS).to(tl.int64), i % HEADS, tl.arange(0, BLOCK // 2)[None, :]
    HALF: tl.constexpr = E // 2
    inside = (token < N) & (at < HALF)
    start, end = qkv + (token * PACKED + head) * E + at, out + (token * HEADS + head) * E + at
    first = tl.load(start, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(start + HALF, mask=inside, other=0.0).to(tl.float32)
    c = tl.load(cos + token * cos_step + at, mask=inside, other=0.0).to(tl.float32)
    s = tl.load(sin + token * sin_step + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(end, rounded(first * c, cos) - rounded(second * s, cos), mask=inside)
    tl.store(end + HALF, rounded(second * c, cos) + rounded(first * s, cos), mask=inside)


@triton.jit
def load_head(q, k, v, q_n, q_h, k_n, k_h, v_n, v_h, token, head, at, inside, H: tl.constexpr, K: tl.constexpr):
    """Values `at` of packed head `head`, which lies in q [N,H,E], k or v [N,K,E] at their steps; float32."""
    x = tl.load(q + token * q_n + head * q_h + at, mask=inside & (head < H), other=0.0).to(tl.float32)
    own = inside & (head >= H) & (head < H + K)
    x += tl.load(k + token * k_n + (head - H) * k_h + at, mask=own, other=0.0).to(tl.float32)
    own = inside & (head >= H + K)
    return x + tl.load(v + token * v_n + (head - H - K) * v_h + at, mask=own, other=0.0).to(tl.float32)


@triton.jit
def rotate_backward_kernel(dq, dk, dv, cos, sin, dqkv, q_n, q_h, k_n, k_h, v_n, v_h, cos_step, sin_step, N,
                           H: tl.constexpr, K: tl.constexpr, E: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """dq [N,H,E], dk, dv [N,K,E] at their steps -> dqkv [N,H+2K,E]: queries and keys turned back, values copied.

    A program ROWS heads. Moves 2·s·(H+2K)·E + s·E a row.
    """
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    token, head, at = (i // (H + 2 * K)).to(tl.int64), i % (H + 2 * K), tl.arange(0, BLOCK // 2)[None, :]
    HALF: tl.constexpr = E // 2
    inside = (token < N) & (at < HALF)
    first = load_head(dq, dk, dv, q_n, q_h, k_n, k_h, v_n, v_h, token, head, at, inside, H, K)
    second = load_head(dq, dk, dv, q_n, q_h, k_n, k_h, v_n, v_h, token, head, at + HALF, inside, H, K)
    turned = inside & (head < H + K)  # the values' angle is 0
    c = tl.load(cos + token * cos_step + at, mask=turned, other=1.0).to(tl.float32)
    s = tl.load(sin + token * sin_step + at, mask=turned, other=0.0).to(tl.float32)
    end = dqkv + (token * (H + 2 * K) + head) * E + at
    tl.store(end, first * c + second * s, mask=inside)
    tl.store(end + HALF, second * c - first * s, mask=inside)


class SplitRotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv, cos, sin, heads, kv_heads):
        qkv, turned = qkv.contiguous(), heads + kv_heads
        N, packed, E = len(qkv), heads + 2 * kv_heads, cos.shape[-1]
        cos, sin = (unit_stride(t)[:, 0, :E // 2].to(promoted(qkv, cos)) for t in (cos, sin))
        ctx.save_for_backward(cos, sin)
        ctx.heads = heads, kv_heads
        out = torch.empty(N, turned, E, dtype=qkv.dtype, device=qkv.device)
        block, rows, blocks = head_tile(E, N * turned)
        launch(rotate_kernel, (blocks,), qkv[:, :turned * E], cos, sin, out, cos.stride(0), sin.stride(0), N,
               HEADS=turned, PACKED=packed, E=E, BLOCK=block, ROWS=rows)
        return out[:, :heads], out[:, heads:], qkv.view(N, packed, E)[:, turned:]

    @staticmethod
    @once_differentiable
    def backward(ctx, dq, dk, dv):
        (cos, sin), (H, K), (N, _, E) = ctx.saved_tensors, ctx.heads, dq.shape
        grads = [unit_stride(g) for g in (dq, dk, dv)]
        dqkv = torch.empty(N, (H + 2 * K) * E, dtype=dq.dtype, device=dq.device)
        block, rows, blocks = head_tile(E, N * (H + 2 * K))
        launch(rotate_backward_kernel, (blocks,), *grads, cos, sin, dqkv, *(step for g in grads for step in g.stride()[:2]),
               cos.stride(0), sin.stride(0), N, H=H, K=K, E=E, BLOCK=block, ROWS=rows)
        return dqkv, None, None, None, None


def split_rotate(qkv, heads, kv_heads, cos, sin):
    """Packed projection [N,(H+2K)·E] -> q [N,H,E], k, v [N,K,E] in its type, q and k turned as by ops.rotate.

    cos, sin [N,1,E], each angle once per half of a head: only the first half is read. They are constants. Products are
    rounded as the plain form rounds them: not if cos is float32 (the vision tower), else to the model's type (the text).
    q and k are views of one new tensor [N,H+K,E], v of qkv.
    """
    N, E = len(qkv), cos.shape[-1]
    check("qkv", qkv, (N, (heads + 2 * kv_heads) * E))
    check("cos", cos, (N, 1, E))
    check("sin", sin, (N, 1, E))
    return SplitRotate.apply(qkv, cos, sin, heads, kv_heads)


# ---------------------------------------------------------------------------------------------------------------------
# SwiGLU


@triton.jit
def swiglu_kernel(gate_up, y, M: tl.constexpr, BLOCK: tl.constexpr):
    """gate_up [N,2M] -> y [N,M]. A program BLOCK columns of a row. Moves 3·s·M a row."""
    row, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < M
    gate = tl.load(gate_up + row * (2 * M) + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * (2 * M) + M + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + row * M + at, rounded(gate / (1 + tl.exp(-gate)), gate_up) * up, mask=inside)


@triton.jit
def swiglu_backward_kernel(gate_up, dy, dgate_up, M: tl.constexpr, BLOCK: tl.constexpr):
    """gate_up [N,2M], dy [N,M] -> dgate_up [N,2M]. A program BLOCK columns of a row. Moves 5·s·M a row."""
    row, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < M
    gate = tl.load(gate_up + row * (2 * M) + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * (2 * M) + M + at, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(dy + row * M + at, mask=inside, other=0.0).to(tl.float32)
    s = 1 / (1 + tl.exp(-gate))
    tl.store(dgate_up + row * (2 * M) + at, g * up * s * (1 + gate * (1 - s)), mask=inside)
    tl.store(dgate_up + row * (2 * M) + M + at, g * gate * s, mask=inside)


class SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate_up):
        gate_up, M = gate_up.contiguous(), gate_up.shape[-1] // 2
        ctx.save_for_backward(gate_up)
        y = gate_up.new_empty(*gate_up.shape[:-1], M)
        launch(swiglu_kernel, (y.numel() // M, triton.cdiv(M, COLUMNS)), gate_up, y, M=M, BLOCK=COLUMNS)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        (gate_up,), dy, M = ctx.saved_tensors, dy.contiguous(), dy.shape[-1]
        dgate_up = torch.empty_like(gate_up)
        launch(swiglu_backward_kernel, (dy.numel() // M, triton.cdiv(M, COLUMNS)), gate_up, dy, dgate_up, M=M, BLOCK=COLUMNS)
        return dgate_up


def swiglu(gate_up):
    """silu(gate)·up of a packed projection [...,2M] -> [...,M]."""
    check("gate_up", gate_up, (*gate_up.shape[:-1], gate_up.shape[-1] // 2 * 2))
    return SwiGLU.apply(gate_up)


# ---------------------------------------------------------------------------------------------------------------------
# One step of the reverse SDE: mean = a·latents + b·velocity, deviation std (flow_grpo.sde_step has the three numbers)


@triton.jit
def sde_kernel(velocity, latents, given, ref_velocity, drawn, partial, a, b, std, draw, compare, n, BLOCK: tl.constexpr):
    """velocity, latents, given, ref_velocity [B,n] -> drawn [B,n]; the parts of Σz² and Σ(mean − ref_mean)² [2,B,blocks].

    given: the noise if draw is 1.0, which makes the step `drawn`, or the step if it is 0.0. ref_velocity is read if
    compare is 1.0. Both are numbers and not constants: the same machine code draws a step and evaluates it, in the same
    order, so the log-probabilities of the two are equal in every bit. Moves s·n for each tensor there is.
    """
    block, picture = tl.program_id(0), tl.program_id(1).to(tl.int64)
    i = block * BLOCK + tl.arange(0, BLOCK)
    inside, at = i < n, picture * n + i
    v = tl.load(velocity + at, mask=inside, other=0.0).to(tl.float32)
    x = tl.load(latents + at, mask=inside, other=0.0).to(tl.float32)
    after = tl.load(given + at, mask=inside, other=0.0).to(tl.float32)
    mean = a * x + b * v
    after = tl.where(draw > 0, mean + std * after, after)
    tl.store(drawn + at, after, mask=inside & (draw > 0))
    z = (after - mean) / std
    ref = tl.load(ref_velocity + at, mask=inside & (compare > 0), other=0.0).to(tl.float32)
    gap = tl.where(compare > 0, b * (v - ref), 0.0)
    out = partial + picture * tl.num_programs(0) + block
    tl.store(out, tl.sum(z * z, 0))
    tl.store(out + tl.num_programs(1) * tl.num_programs(0), tl.sum(gap * gap, 0))


@triton.jit
def sde_backward_kernel(velocity, latents, after, ref_velocity, dlog_prob, dkl, dvelocity, a, b, std, sigma_t, n,
                        COMPARE: tl.constexpr, BLOCK: tl.constexpr):
    """velocity, latents, after, ref_velocity [B,n], dlog_prob, dkl [B] -> dvelocity [B,n]. Moves s·n for each of them."""
    picture, i = tl.program_id(1).to(tl.int64), tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside, at = i < n, picture * n + i
    v = tl.load(velocity + at, mask=inside, other=0.0).to(tl.float32)
    x = tl.load(latents + at, mask=inside, other=0.0).to(tl.float32)
    z = (tl.load(after + at, mask=inside, other=0.0).to(tl.float32) - a * x - b * v) / std
    g = tl.load(dlog_prob + picture) * z / std
    if COMPARE:
        ref = tl.load(ref_velocity + at, mask=inside, other=0.0).to(tl.float32)
        g += tl.load(dkl + picture) * b * (v - ref) / (sigma_t * sigma_t)
    tl.store(dvelocity + at, g * b / n, mask=inside)


class SDEStep(torch.autograd.Function):
    @staticmethod
    def forward(ctx, velocity, latents, given, ref_velocity, a, b, std, sigma_t, draw):
        velocity, latents, given = velocity.contiguous(), latents.contiguous(), given.contiguous()
        B, n, compare = len(latents), latents.shape[1:].numel(), ref_velocity is not None
        a, b, std, sigma_t = float(a), float(b), float(std), float(sigma_t)
        ref = ref_velocity.contiguous() if compare else velocity.new_empty(1)  # else never read
        drawn = torch.empty_like(given if draw else given[:0], dtype=torch.float32)
        blocks = triton.cdiv(n, LATENTS)
        partial = torch.empty(2, B, blocks, device=velocity.device)
        launch(sde_kernel, (blocks, B), velocity, latents, given, ref, drawn, partial, a, b, std, float(draw),
               float(compare), n, BLOCK=LATENTS)
        squares, gaps = partial.sum(2) / n
        after = drawn if draw else given
        ctx.save_for_backward(velocity, latents, after, ref)
        ctx.numbers, ctx.compare = (a, b, std, sigma_t), compare
        ctx.mark_non_differentiable(drawn)
        log_prob = -0.5 * squares - math.log(std) - 0.5 * math.log(2 * math.pi)
        return drawn, log_prob, gaps / (2 * sigma_t**2) if compare else None

    @staticmethod
    @once_differentiable
    def backward(ctx, _, dlog_prob, dkl):
        velocity, *rest = ctx.saved_tensors
        n, dlog_prob = velocity.shape[1:].numel(), dlog_prob.float().contiguous()
        dkl, dvelocity = dkl.float().contiguous() if ctx.compare else dlog_prob, torch.empty_like(velocity)
        launch(sde_backward_kernel, (triton.cdiv(n, LATENTS), len(velocity)), velocity, *rest, dlog_prob, dkl, dvelocity,
               *ctx.numbers, n, COMPARE=ctx.compare, BLOCK=LATENTS)
        return dvelocity, *(None,) * 8


def sde_log_prob(velocity, latents, next_latents, a, b, std, ref_velocity=None, sigma_t=1.0):
    """(log_prob [B], kl [B] or None) of a given step, float32, differentiable in the velocity; tensors [B,C,h,w].

    log_prob: log density of next_latents under mean = a·latents + b·velocity and std, averaged over elements. kl, with
    ref_velocity, which is a constant: (mean − ref_mean)²/(2·sigma_t²), averaged over elements, as flow_grpo.kl_of.
    """
    for name, x in (("velocity", velocity), ("next_latents", next_latents), ("ref_velocity", ref_velocity)):
        if x is not None:
            check(name, x, latents.shape)
    return SDEStep.apply(velocity, latents, next_latents, ref_velocity, a, b, std, sigma_t, False)[1:]


def sde_draw(velocity, latents, noise, a, b, std):
    """(next_latents [B,C,h,w], log_prob [B]), float32: the step mean + std·noise, a constant, and what sde_log_prob says of
    it, bit for bit where the types of the tensors are the same."""
    check("velocity", velocity, latents.shape)
    check("noise", noise, latents.shape)
    return SDEStep.apply(velocity, latents, noise, None, a, b, std, 1.0, True)[:2]


# ---------------------------------------------------------------------------------------------------------------------
# Softmax over a vocabulary that passes by in tiles


@triton.jit
def scan_kernel(z, exps, targets, peak, total, picked, keep, scale, start, row_step, V: tl.constexpr, BLOCK: tl.constexpr):
    """Logits z [N,V] -> exps [N,V], which may be z; peak, total, picked [N] updated, keep [N] written. A program a row.

    Moves 2·s·V a row.
    """
    row, at = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    inside = at < V
    x = tl.load(z + row * row_step + at, mask=inside, other=float("-inf")).to(tl.float32) * scale
    before, place = tl.load(peak + row), tl.load(targets + row) - start
    tl.store(picked + row, tl.sum(tl.where(at == place, x, 0.0), 0), mask=(place >= 0) & (place < V))
    top = tl.maximum(before, tl.max(x, 0))
    kept = tl.exp(before - top)
    x = tl.exp(x - top)
    tl.store(exps + row * row_step + at, x, mask=inside)
    tl.store(total + row, tl.load(total + row) * kept + tl.sum(x, 0))
    tl.store(peak + row, top)
    tl.store(keep + row, kept)


def scan_tile(z, targets, start, peak, total, picked, scale=1.0):
    """One tile of a running log-softmax, in place: logits z [N,V], already in memory, become exp(scale·z − peak).

    V vocabulary entries from `start` on; targets [N] int64, counted over the whole vocabulary. peak, total, picked [N]
    float32: the greatest scaled logit so far (−inf at first), Σ exp(logit − peak), and the target's scaled logit once its
    tile has passed. scale: 1/temperature. Returns keep [N]: what sums of exp(logit − old peak) must be multiplied by.
    Sums are of values before they are rounded to z's type. No gradient of its own: log_probs.TokenLogProbs forms it.
    """
    N, V = z.shape
    for name, x in (("targets", targets), ("peak", peak), ("total", total), ("picked", picked)):
        check(name, x, (N,))
        if not x.is_contiguous():
            raise ValueError(f"{name} must be contiguous: it is changed in place or read as it lies")
    if z.stride(1) != 1:
        raise ValueError("the columns of z must lie without gaps: it is changed in place")
    keep, (block, warps) = torch.empty_like(peak), row_block(V)
    launch(scan_kernel, (N,), z, z, targets, peak, total, picked, keep, float(scale), start, z.stride(0),
           V=V, BLOCK=block, num_warps=warps)
    return keep
