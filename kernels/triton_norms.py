"""adaLN, gated residual and RMSNorm as Triton kernels: what happens to whole rows of tokens.

See triton_launch.py for what all kernels have in common, and for the letters. A vector of adaLN,
such as shift [B,D], may have any step from row to row.
"""

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from kernels.triton_launch import check, launch, load, promoted, rounded, row_block, unit_stride

# Rows that a program sums before it writes to the buffer of partial sums. The buffer is float32 and
# has an eighth of the bytes of the rows in bfloat16, so it adds little to what is moved anyway.
ROWS = 16
# The tile of gate_residual is wide enough to read 256 bytes of a row at once, and high enough that
# there are few partial sums.
GATE_ROWS = 32
GATE_COLUMNS = 128


# --------------------------------------------------------------------------------------------------
# LayerNorm and adaLN


@triton.jit
def layer_norm(x, inside, eps, D: tl.constexpr):
    """(normalised row, 1/deviation) of a row in float32 that is 0 outside."""
    # The variance of the centred row, as mean(x²) − mean(x)² would cancel for a large mean.
    x = tl.where(inside, x - tl.sum(x, 0) / D, 0.0)
    r = tl.rsqrt(tl.sum(x * x, 0) / D + eps)
    return x * r, r


@triton.jit
def modulate_kernel(x, shift, scale, y, shift_step, scale_step, L, eps, D: tl.constexpr,
                    BLOCK: tl.constexpr):
    """x [B,L,D], shift, scale [B,D] -> y [B,L,D]. A program computes a token."""
    # Offsets are int64, because those of a large batch pass 2³¹.
    row = tl.program_id(0).to(tl.int64)
    picture = row // L
    column = tl.arange(0, BLOCK)
    inside = column < D
    normed, _ = layer_norm(load(x + row * D + column, inside), inside, eps, D)
    factor = 1 + load(scale + picture * scale_step + column, inside)
    added = load(shift + picture * shift_step + column, inside)
    tl.store(y + row * D + column, normed * factor + added, mask=inside)


@triton.jit
def modulate_backward_kernel(x, scale, dy, dx, partial, scale_step, L, eps, D: tl.constexpr,
                             BLOCK: tl.constexpr, ROWS: tl.constexpr, SUMS: tl.constexpr):
    """x, dy -> dx [B,L,D], and the parts of dshift, dscale in partial [2,B,blocks,D]."""
    block = tl.program_id(0)
    picture = tl.program_id(1).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < D
    factor = 1 + load(scale + picture * scale_step + column, inside)
    dshift = tl.full([BLOCK], 0.0, tl.float32)
    dscale = tl.full([BLOCK], 0.0, tl.float32)
    for i in range(ROWS):
        token = block * ROWS + i
        if token < L:
            start = (picture * L + token) * D
            row = load(x + start + column, inside)
            g = load(dy + start + column, inside)
            normed, r = layer_norm(row, inside, eps, D)
            if SUMS:
                dshift += g
                dscale += g * normed
            # dx loses its mean and its part along the row, as the norm takes both away.
            g = g * factor
            g = r * (g - tl.sum(g, 0) / D - normed * (tl.sum(g * normed, 0) / D))
            tl.store(dx + start + column, g, mask=inside)
    if SUMS:
        # Each program writes to its own place. Atomics would add in an order that changes, and
        # equal inputs must give equal bits.
        blocks = tl.num_programs(0)
        start = (picture * blocks + block) * D
        second = (tl.num_programs(1) * blocks).to(tl.int64) * D
        tl.store(partial + start + column, dshift, mask=inside)
        tl.store(partial + second + start + column, dscale, mask=inside)


class Modulate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, shift, scale, eps):
        B, L, D = x.shape
        x = x.contiguous()
        # adaLN gives the vectors as parts of one tensor, which need no copies.
        shift, scale = (unit_stride(t) for t in (shift, scale))
        ctx.save_for_backward(x, scale)
        ctx.eps = eps
        ctx.shift_dtype = shift.dtype
        y = torch.empty_like(x, dtype=promoted(x, shift, scale))
        launch(modulate_kernel, (B * L,), x, shift, scale, y, shift.stride(0), scale.stride(0), L,
               eps, D=D, **row_block(D))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, scale = ctx.saved_tensors
        B, L, D = x.shape
        dy = dy.contiguous()
        dx = torch.empty_like(x)
        sums = any(ctx.needs_input_grad[1:3])
        rows = ROWS if sums else 1
        blocks = triton.cdiv(L, rows)
        partial = torch.empty(2, B, blocks if sums else 0, D, device=x.device)
        launch(modulate_backward_kernel, (blocks, B), x, scale, dy, dx, partial, scale.stride(0), L,
               ctx.eps, ROWS=rows, SUMS=sums, D=D, **row_block(D))
        if not sums:
            return dx, None, None, None
        dshift, dscale = partial.sum(2)
        return dx, dshift.to(ctx.shift_dtype), dscale.to(scale.dtype), None


def modulate(x, shift, scale, eps=1e-6):
    check("shift", shift, (x.shape[0], x.shape[2]))
    check("scale", scale, shift.shape)
    return Modulate.apply(x, shift, scale, eps)


# --------------------------------------------------------------------------------------------------
# Gated residual


@triton.jit
def gate_tile(L, D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """(offsets [ROWS,COLUMNS] in [B,L,D], which of them exist, columns [1,COLUMNS], picture)."""
    picture = tl.program_id(2).to(tl.int64)
    token = tl.program_id(1) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    return (picture * L + token) * D + column, (token < L) & (column < D), column, picture


@triton.jit
def gate_residual_kernel(x, branch, gate, y, gate_step, L, D: tl.constexpr, ROWS: tl.constexpr,
                         COLUMNS: tl.constexpr):
    """x, branch [B,L,D], gate [B,D] at its step from row to row -> y [B,L,D]."""
    offset, inside, column, picture = gate_tile(L, D, ROWS, COLUMNS)
    # A tile has one picture, so it reads its part of the gate once for all its tokens.
    g = load(gate + picture * gate_step + column, column < D)
    added = g * load(branch + offset, inside)
    tl.store(y + offset, load(x + offset, inside) + added, mask=inside)


@triton.jit
def gate_residual_backward_kernel(dy, branch, gate, dbranch, partial, gate_step, L,
                                  D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
                                  BRANCH: tl.constexpr, SUMS: tl.constexpr):
    """dy -> dbranch [B,L,D] if BRANCH; the parts of dgate in partial [B,blocks,D] if SUMS."""
    offset, inside, column, picture = gate_tile(L, D, ROWS, COLUMNS)
    g = load(dy + offset, inside)
    if BRANCH:
        factor = load(gate + picture * gate_step + column, column < D)
        tl.store(dbranch + offset, factor * g, mask=inside)
    if SUMS:
        dgate = tl.sum(g * load(branch + offset, inside), 0)[None, :]
        block = picture * tl.num_programs(1) + tl.program_id(1)
        tl.store(partial + block * D + column, dgate, mask=column < D)


class GateResidual(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, branch, gate):
        B, L, D = x.shape
        x, branch = (t.contiguous() for t in (x, branch))
        gate = unit_stride(gate)
        # A frozen gate needs no sum over tokens, so the branch need not stay in memory for it.
        ctx.save_for_backward(branch if ctx.needs_input_grad[2] else None, gate)
        ctx.dtypes = (x.dtype, branch.dtype)
        y = torch.empty_like(x, dtype=promoted(x, branch, gate))
        grid = (triton.cdiv(D, GATE_COLUMNS), triton.cdiv(L, GATE_ROWS), B)
        launch(gate_residual_kernel, grid, x, branch, gate, y, gate.stride(0), L, D=D,
               ROWS=GATE_ROWS, COLUMNS=GATE_COLUMNS)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        branch, gate = ctx.saved_tensors
        x_dtype, branch_dtype = ctx.dtypes
        _, for_branch, sums = ctx.needs_input_grad
        dy = dy.contiguous()
        B, L, D = dy.shape
        blocks = triton.cdiv(L, GATE_ROWS)
        partial = torch.empty(B, blocks if sums else 0, D, device=dy.device)
        # A kernel takes a tensor for each argument; `partial` stands for those it does not touch.
        dbranch = torch.empty_like(dy, dtype=branch_dtype) if for_branch else partial
        branch = branch if sums else partial
        if for_branch or sums:
            launch(gate_residual_backward_kernel, (triton.cdiv(D, GATE_COLUMNS), blocks, B), dy,
                   branch, gate, dbranch, partial, gate.stride(0), L, D=D, ROWS=GATE_ROWS,
                   COLUMNS=GATE_COLUMNS, BRANCH=for_branch, SUMS=sums)
        dgate = partial.sum(1).to(gate.dtype) if sums else None
        # The gradient of x is that of the result itself, without a copy.
        return dy.to(x_dtype), dbranch if for_branch else None, dgate


def gate_residual(x, branch, gate):
    check("branch", branch, x.shape)
    check("gate", gate, (x.shape[0], x.shape[2]))
    return GateResidual.apply(x, branch, gate)


# --------------------------------------------------------------------------------------------------
# RMSNorm


@triton.jit
def rms_norm_kernel(x, weight, y, eps, D: tl.constexpr, BLOCK: tl.constexpr):
    """x [N,D], weight [D] -> y [N,D]. A program computes a row."""
    start = tl.program_id(0).to(tl.int64) * D
    column = tl.arange(0, BLOCK)
    inside = column < D
    row = load(x + start + column, inside)
    factor = load(weight + column, inside)
    # As in the plain form, the normalised row is rounded before it is scaled.
    normed = rounded(row * tl.rsqrt(tl.sum(row * row, 0) / D + eps), x)
    tl.store(y + start + column, normed * factor, mask=inside)


@triton.jit
def rms_norm_backward_kernel(x, weight, dy, dx, partial, N, eps, D: tl.constexpr,
                             BLOCK: tl.constexpr, ROWS: tl.constexpr, SUMS: tl.constexpr):
    """x, dy -> dx [N,D], and the parts of dweight in partial [blocks,D]."""
    block = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < D
    factor = load(weight + column, inside)
    dweight = tl.full([BLOCK], 0.0, tl.float32)
    for i in range(ROWS):
        if block * ROWS + i < N:
            start = (block * ROWS + i) * D
            row = load(x + start + column, inside)
            g = load(dy + start + column, inside)
            r = tl.rsqrt(tl.sum(row * row, 0) / D + eps)
            row = row * r
            if SUMS:
                dweight += g * row
            # dx loses its part along the row, as the norm takes the length away.
            g = g * factor
            tl.store(dx + start + column, r * (g - row * (tl.sum(g * row, 0) / D)), mask=inside)
    if SUMS:
        tl.store(partial + block * D + column, dweight, mask=inside)


class RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps):
        x, weight = (t.contiguous() for t in (x, weight))
        D = x.shape[-1]
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        y = torch.empty_like(x, dtype=promoted(x, weight))
        launch(rms_norm_kernel, (x.numel() // D,), x, weight, y, eps, D=D, **row_block(D))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        dy = dy.contiguous()
        dx = torch.empty_like(x)
        D = x.shape[-1]
        N = x.numel() // D
        sums = ctx.needs_input_grad[1]
        # Without sums a program has one row, so that more of them run at a time.
        rows = ROWS if sums else 1
        blocks = triton.cdiv(N, rows)
        partial = torch.empty(blocks if sums else 0, D, device=x.device)
        launch(rms_norm_backward_kernel, (blocks,), x, weight, dy, dx, partial, N, ctx.eps,
               ROWS=rows, SUMS=sums, D=D, **row_block(D))
        return dx, partial.sum(0).to(weight.dtype) if sums else None, None


def rms_norm(x, weight, eps=1e-6):
    check("weight", weight, x.shape[-1:])
    return RMSNorm.apply(x, weight, eps)
