"""`grpo.token_log_probs` a tile of the logits at a time, so that they are never held whole.

The logits of 2,048 tokens over Qwen's vocabulary of 152,064 entries are 1.2 GB in float32, and
their softmax and its gradient as much again. Here one tile of at most ROWS × CHUNK exists, 32 MiB
whatever N and V are. Logits and softmax are float32; products take factors of the inputs' type.

Shapes: N tokens, D width, V vocabulary.
"""

import math

import torch
from torch.autograd.function import once_differentiable

from parts import ops

ROWS = 4096  # tokens of a tile
CHUNK = 2048  # vocabulary entries of a tile


def token_log_probs(hidden, lm_head_weight, targets, temperature=1.0):
    """hidden [N,D], W [V,D], targets [N] in 0..V−1 -> log-probabilities [N]. Differentiable once.

    ValueError for shapes or types that do not fit, or a target out of range, which would give no
    error here but a wrong number.
    """
    V, D = lm_head_weight.shape
    if hidden.dim() != 2 or hidden.shape[1] != D or hidden.dtype != lm_head_weight.dtype:
        raise ValueError(f"hidden must be [N,{D}] of {lm_head_weight.dtype} as the head is, got "
                         f"{list(hidden.shape)} of {hidden.dtype}")
    hidden = hidden.contiguous()
    targets = targets.long()
    if targets.shape != hidden.shape[:1] or not ((targets >= 0) & (targets < V)).all():
        raise ValueError(f"targets must be {len(hidden)} integers in 0..{V - 1}")
    if torch.is_grad_enabled() and (hidden.requires_grad or lm_head_weight.requires_grad):
        return TokenLogProbs.apply(hidden, lm_head_weight, targets, temperature)
    return scan_vocabulary(hidden, lm_head_weight, targets, temperature, with_slope=False)[0]


class TokenLogProbs(torch.autograd.Function):
    """`token_log_probs` with its gradients.

    hidden: d log p_i / d hidden_i = (W[target_i] − Σ_v p_iv·W_v)/T is one row, whatever comes
    after, so the forward pass forms it while it has the tile, and the backward pass only scales it.
    W: the backward pass makes the tiles again. Forward and backward together cost two matrix
    products with a frozen head and four with a trained one.
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature):
        hidden_needs, weight_needs = ctx.needs_input_grad[:2]
        log_probs, lse, slope = scan_vocabulary(hidden, weight, targets, temperature, hidden_needs)
        ctx.save_for_backward(slope, *((hidden, weight, targets, lse) if weight_needs else ()))
        ctx.temperature = temperature
        ctx.hidden_dtype = hidden.dtype
        return log_probs

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        slope, *trained = ctx.saved_tensors
        weight_grad = head_gradient(*trained, grad, ctx.temperature) if trained else None
        hidden_grad = None if slope is None else (slope * grad[:, None]).to(ctx.hidden_dtype)
        return hidden_grad, weight_grad, None, None


def scan_vocabulary(hidden, weight, targets, temperature, with_slope):
    """(log p [N], logsumexp of the logits [N], d log p/d hidden [N,D] or None), float32 or wider.

    One pass over the vocabulary with a running maximum, to which the sums so far are rescaled at
    every tile.
    """
    N = len(hidden)
    buffer = tile_buffer(hidden, weight)
    peak = buffer.new_full((N,), -math.inf)  # the greatest logit so far
    total = buffer.new_zeros(N)  # Σ_v exp(logit_v − peak)
    picked = buffer.new_zeros(N)  # the target's logit
    pull = buffer.new_zeros(hidden.shape) if with_slope else None  # Σ_v exp(logit_v − peak)·W_v
    for columns in slices(len(weight), CHUNK):
        for rows in slices(N, ROWS):
            z = logits_tile(buffer, hidden[rows], weight[columns])  # [rows, columns]
            keep = scan_tile(z, targets[rows], columns.start, peak[rows], total[rows],
                             picked[rows], 1 / temperature)
            if with_slope:
                add_product(pull[rows].mul_(keep[:, None]), z, weight[columns])
    lse = peak + total.log()
    slope = None
    if with_slope:
        slope = pull.div_(-total[:, None]).add_(weight[targets]).div_(temperature)
    return picked - lse, lse, slope


def head_gradient(hidden, weight, targets, lse, grad, temperature):
    """dLoss/dW [V,D] = Σ_i grad_i/T·(onehot_i − p_i)·hidden_iᵀ for dLoss/dlog p = grad [N]."""
    gradient = torch.empty_like(weight)
    buffer = tile_buffer(hidden, weight)
    scaled = (hidden * (-grad / temperature)[:, None]).to(hidden.dtype)  # [N,D]
    for columns in slices(len(weight), CHUNK):
        part = buffer.new_zeros(weight[columns].shape)  # summed in float32 or wider
        for rows in slices(len(hidden), ROWS):
            p = logits_tile(buffer, hidden[rows], weight[columns])  # [rows, columns]
            if temperature != 1:
                p.div_(temperature)
            p.sub_(lse[rows, None]).exp_()
            index, inside = index_in_tile(targets[rows], columns.start, p.shape[1])
            p.scatter_add_(1, index, -inside.to(p.dtype))
            add_product(part, p.t(), scaled[rows])
        gradient[columns] = part
    return gradient


# --------------------------------------------------------------------------------------------------
# Tiles


def slices(length, size):
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


def tile_buffer(hidden, weight):
    """Room for the largest tile, flat, in float32 or wider."""
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    return hidden.new_empty(min(len(hidden), ROWS) * min(len(weight), CHUNK), dtype=dtype)


def logits_tile(buffer, hidden, weight):
    """hidden·Wᵀ for some rows of each, in the buffer, or on their own if types are narrower."""
    if hidden.dtype != buffer.dtype:
        # The product of sampling: one that rounds otherwise would take the ratio away from 1.
        return ops.logits(hidden, weight)
    z = buffer[:len(hidden) * len(weight)].view(len(hidden), len(weight))
    return torch.mm(hidden, weight.t(), out=z)


def add_product(total, a, b):
    """total += a·b; a is rounded to the type of b for the product, the sum keeps total's type."""
    if b.dtype == total.dtype:
        total.addmm_(a, b)
    else:
        total.add_(a.to(b.dtype) @ b)


@ops.fusable
def scan_tile(z, targets, start, peak, total, picked, scale=1.0):
    """One tile of a running log-softmax, in place: logits z [N,V] become exp(scale·z − peak).

    V vocabulary entries from `start` on; targets [N], counted over the whole vocabulary. peak,
    total, picked [N], float32 or wider: the greatest scaled logit so far (−inf at first),
    Σ exp(logit − peak), and the target's scaled logit once its tile has passed. Returns keep [N]:
    what sums of exp(logit − old peak) must be multiplied by.
    """
    if scale != 1:
        z.mul_(scale)
    index, inside = index_in_tile(targets, start, z.shape[1])
    picked.copy_(torch.where(inside, z.gather(1, index), picked[:, None])[:, 0])
    top = torch.maximum(peak, z.amax(1))
    keep = (peak - top).exp()
    z.sub_(top[:, None]).exp_()
    total.mul_(keep).add_(z.sum(1))
    peak.copy_(top)
    return keep


def index_in_tile(targets, start, width):
    """Column [N,1] of each target within a tile, and whether it lies there; if not, it is any."""
    index = (targets - start)[:, None]
    return index.clamp(0, width - 1), (index >= 0) & (index < width)
