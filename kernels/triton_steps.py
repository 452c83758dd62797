"""SwiGLU, the step of the reverse SDE and a tile of the log-softmax as Triton kernels.

See triton_launch.py for what all kernels have in common, and for the letters.
"""

import math

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from kernels.triton_launch import check, launch, load, rounded, row_block

# Columns of a row that a program of swiglu computes: no value meets another, so any number will do.
COLUMNS = 1024
# Values of a picture that a program of the SDE step sums. It is fixed, not tuned on the device: a
# drawn step and an evaluated one must add in the same order, see sde_kernel.
LATENTS = 2048


# --------------------------------------------------------------------------------------------------
# SwiGLU


@triton.jit
def swiglu_kernel(gate_up, y, M: tl.constexpr, BLOCK: tl.constexpr):
    """gate_up [N,2M] -> y [N,M]. A program computes BLOCK columns of a row."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < M
    gate = load(gate_up + row * (2 * M) + column, inside)
    up = load(gate_up + row * (2 * M) + M + column, inside)
    # As in the plain form, silu(gate) is rounded before the product.
    silu = rounded(gate / (1 + tl.exp(-gate)), gate_up)
    tl.store(y + row * M + column, silu * up, mask=inside)


@triton.jit
def swiglu_backward_kernel(gate_up, dy, dgate_up, M: tl.constexpr, BLOCK: tl.constexpr):
    """gate_up [N,2M], dy [N,M] -> dgate_up [N,2M]."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < M
    start = row * (2 * M) + column
    gate = load(gate_up + start, inside)
    up = load(gate_up + start + M, inside)
    g = load(dy + row * M + column, inside)
    s = 1 / (1 + tl.exp(-gate))
    # silu(x) = x·s(x) with the sigmoid s, whose derivative is s·(1 − s).
    tl.store(dgate_up + start, g * up * s * (1 + gate * (1 - s)), mask=inside)
    tl.store(dgate_up + start + M, g * gate * s, mask=inside)


class SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate_up):
        gate_up = gate_up.contiguous()
        M = gate_up.shape[-1] // 2
        ctx.save_for_backward(gate_up)
        y = gate_up.new_empty(*gate_up.shape[:-1], M)
        grid = (y.numel() // M, triton.cdiv(M, COLUMNS))
        launch(swiglu_kernel, grid, gate_up, y, M=M, BLOCK=COLUMNS)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        (gate_up,) = ctx.saved_tensors
        dy = dy.contiguous()
        M = dy.shape[-1]
        dgate_up = torch.empty_like(gate_up)
        grid = (dy.numel() // M, triton.cdiv(M, COLUMNS))
        launch(swiglu_backward_kernel, grid, gate_up, dy, dgate_up, M=M, BLOCK=COLUMNS)
        return dgate_up


def swiglu(gate_up):
    check("gate_up", gate_up, (*gate_up.shape[:-1], gate_up.shape[-1] // 2 * 2))
    return SwiGLU.apply(gate_up)


# --------------------------------------------------------------------------------------------------
# One step of the reverse SDE: mean = a·latents + b·velocity, deviation std (flow_grpo.step_numbers)


@triton.jit
def sde_kernel(velocity, latents, given, ref_velocity, drawn, partial, a, b, std, draw, compare, n,
               BLOCK: tl.constexpr):
    """velocity, latents, given, ref_velocity [B,n] -> drawn [B,n] and partial [2,B,blocks].

    given: the noise if draw is 1.0, which makes the step `drawn`, or the step if draw is 0.0.
    ref_velocity is read if compare is 1.0. partial: the parts of Σz² and Σ(mean − ref_mean)².
    """
    # draw and compare are numbers and not constants: the same machine code draws a step and
    # evaluates it, in the same order, so the log-probabilities of the two are equal in every bit.
    block = tl.program_id(0)
    picture = tl.program_id(1).to(tl.int64)
    i = block * BLOCK + tl.arange(0, BLOCK)
    inside = i < n
    offset = picture * n + i
    v = load(velocity + offset, inside)
    x = load(latents + offset, inside)
    after = load(given + offset, inside)
    mean = a * x + b * v
    after = tl.where(draw > 0, mean + std * after, after)
    tl.store(drawn + offset, after, mask=inside & (draw > 0))
    z = (after - mean) / std
    ref = load(ref_velocity + offset, inside & (compare > 0))
    # The latents cancel in the difference of the two means.
    gap = tl.where(compare > 0, b * (v - ref), 0.0)
    out = partial + picture * tl.num_programs(0) + block
    tl.store(out, tl.sum(z * z, 0))
    tl.store(out + tl.num_programs(1) * tl.num_programs(0), tl.sum(gap * gap, 0))


@triton.jit
def sde_backward_kernel(velocity, latents, after, ref_velocity, dlog_prob, dkl, dvelocity, a, b,
                        std, sigma_t, n, COMPARE: tl.constexpr, BLOCK: tl.constexpr):
    """velocity, latents, after, ref_velocity [B,n], dlog_prob, dkl [B] -> dvelocity [B,n]."""
    picture = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < n
    offset = picture * n + i
    v = load(velocity + offset, inside)
    x = load(latents + offset, inside)
    z = (load(after + offset, inside) - a * x - b * v) / std
    # d log p/d mean = z/std and d mean/d v = b.
    g = tl.load(dlog_prob + picture) * z / std
    if COMPARE:
        ref = load(ref_velocity + offset, inside)
        g += tl.load(dkl + picture) * b * (v - ref) / (sigma_t * sigma_t)
    tl.store(dvelocity + offset, g * b / n, mask=inside)


class SDEStep(torch.autograd.Function):
    @staticmethod
    def forward(ctx, velocity, latents, given, ref_velocity, numbers, draw):
        """numbers: (a, b, std, σ_t) as floats. given: the noise if `draw`, else the step."""
        velocity, latents, given = (t.contiguous() for t in (velocity, latents, given))
        a, b, std, sigma_t = numbers
        B = len(latents)
        n = latents.shape[1:].numel()
        compare = ref_velocity is not None
        # A kernel takes a tensor for each argument; one of a single value is never read.
        ref = ref_velocity.contiguous() if compare else velocity.new_empty(1)
        drawn = torch.empty_like(given if draw else given[:0], dtype=torch.float32)
        blocks = triton.cdiv(n, LATENTS)
        partial = torch.empty(2, B, blocks, device=velocity.device)
        launch(sde_kernel, (blocks, B), velocity, latents, given, ref, drawn, partial, a, b, std,
               float(draw), float(compare), n, BLOCK=LATENTS)
        squares, gaps = partial.sum(2) / n  # each [B]
        ctx.save_for_backward(velocity, latents, drawn if draw else given, ref)
        ctx.numbers = numbers
        ctx.compare = compare
        ctx.mark_non_differentiable(drawn)
        log_prob = -0.5 * squares - math.log(std) - 0.5 * math.log(2 * math.pi)
        return drawn, log_prob, gaps / (2 * sigma_t**2) if compare else None

    @staticmethod
    @once_differentiable
    def backward(ctx, _, dlog_prob, dkl):
        velocity, *rest = ctx.saved_tensors
        n = velocity.shape[1:].numel()
        dlog_prob = dlog_prob.float().contiguous()
        dkl = dkl.float().contiguous() if ctx.compare else dlog_prob
        dvelocity = torch.empty_like(velocity)
        grid = (triton.cdiv(n, LATENTS), len(velocity))
        launch(sde_backward_kernel, grid, velocity, *rest, dlog_prob, dkl, dvelocity, *ctx.numbers,
               n, COMPARE=ctx.compare, BLOCK=LATENTS)
        return dvelocity, None, None, None, None, None


def sde_log_prob(velocity, latents, next_latents, a, b, std, ref_velocity=None, sigma_t=1.0):
    given = {"velocity": velocity, "next_latents": next_latents, "ref_velocity": ref_velocity}
    for name, x in given.items():
        if x is not None:
            check(name, x, latents.shape)
    numbers = (float(a), float(b), float(std), float(sigma_t))
    step = SDEStep.apply(velocity, latents, next_latents, ref_velocity, numbers, False)
    return step[1:]


def sde_draw(velocity, latents, noise, a, b, std):
    check("velocity", velocity, latents.shape)
    check("noise", noise, latents.shape)
    numbers = (float(a), float(b), float(std), 1.0)
    return SDEStep.apply(velocity, latents, noise, None, numbers, True)[:2]


# --------------------------------------------------------------------------------------------------
# Softmax over a vocabulary that passes by in tiles


@triton.jit
def scan_kernel(z, exps, targets, peak, total, picked, keep, scale, start, row_step,
                V: tl.constexpr, BLOCK: tl.constexpr):
    """Logits z [N,V] -> exps [N,V], which may be z; peak, total, picked, keep [N]. A row each."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < V
    # −inf outside, where exp gives 0 and which is never the maximum.
    x = tl.load(z + row * row_step + column, mask=inside, other=float("-inf")).to(tl.float32)
    x = x * scale
    before = tl.load(peak + row)
    target = tl.load(targets + row) - start
    in_tile = (target >= 0) & (target < V)
    tl.store(picked + row, tl.sum(tl.where(column == target, x, 0.0), 0), mask=in_tile)
    # Online softmax: the sum so far was over exp(x − before) and is rescaled to the new maximum.
    top = tl.maximum(before, tl.max(x, 0))
    kept = tl.exp(before - top)
    x = tl.exp(x - top)
    tl.store(exps + row * row_step + column, x, mask=inside)
    tl.store(total + row, tl.load(total + row) * kept + tl.sum(x, 0))
    tl.store(peak + row, top)
    tl.store(keep + row, kept)


def scan_tile(z, targets, start, peak, total, picked, scale=1.0):
    """log_probs.scan_tile; without a gradient, which log_probs.TokenLogProbs forms."""
    N, V = z.shape
    state = {"targets": targets, "peak": peak, "total": total, "picked": picked}
    for name, x in state.items():
        check(name, x, (N,))
        if not x.is_contiguous():
            raise ValueError(f"{name} must be contiguous: it is read or changed as it lies")
    if z.stride(1) != 1:
        raise ValueError("the columns of z must lie without gaps: it is changed in place")
    keep = torch.empty_like(peak)
    launch(scan_kernel, (N,), z, z, targets, peak, total, picked, keep, float(scale), start,
           z.stride(0), V=V, **row_block(V))
    return keep
