"""GRPO for the judge (EmoFeedback², section 3.1): rewards of its answers, advantages, token log-probabilities, the loss.

In the order of a training step: `format_reward`, `va_reward` and `class_reward` score the sampled texts,
`group_advantages` compares the answers to one question, `token_log_probs` says how likely the model finds each token
without ever holding the logits of all tokens, `grpo_loss` is what the optimizer sees. Nothing here knows the model.

Shapes: P prompts, G answers to each, B = P·G completions, L tokens of the longest, N tokens of all, D width, V vocabulary.
"""

import json
import math
import re

import torch
from torch.autograd.function import once_differentiable

from data import EMOTIONS, VA_MAX, VA_MIN, check_va
from parts import ops

# ---------------------------------------------------------------------------------------------------------------------
# Reading an answer

TAGS = ["<think>", "</think>", "<answer>", "</answer>"]
ANY_TAG = re.compile(r"(</?(?:think|answer)>)")
LONGEST_TEXT = 20_000  # characters; a longer answer is refused unread


def parse_answer(text):
    """The JSON object of `<think>…</think><answer>{…}</answer>` as a dict, or None for any other text; never raises.

    Every tag stands exactly once in the whole text, in this order, with nothing but white space outside the two blocks.
    The JSON is strict: no NaN, no Infinity, no key twice. The thought may be empty. At most LONGEST_TEXT characters.
    """
    if len(text) > LONGEST_TEXT:
        return None
    pieces = ANY_TAG.split(text)  # text and tags in turn
    if pieces[1::2] != TAGS or any(outside.strip() for outside in (pieces[0], pieces[4], pieces[8])):
        return None
    try:
        answer = json.loads(pieces[6], object_pairs_hook=unique_keys, parse_constant=refuse_constant)
    except (ValueError, RecursionError):  # also of integers with thousands of digits, and of deep nesting
        return None
    return answer if isinstance(answer, dict) else None


def unique_keys(pairs):
    """dict(pairs); ValueError if a key comes twice."""
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a key comes twice")
    return dict(pairs)


def refuse_constant(name):
    raise ValueError(f"{name} is not JSON")


def read_va(answer):
    """(v, a) as floats in 1..9 of a parsed answer, or None.

    The keys are `valence` and `arousal` and no other, so that an answer cannot hedge; the values are JSON numbers, not
    strings, booleans or lists.
    """
    if answer is None or answer.keys() != {"valence", "arousal"}:
        return None
    values = answer["valence"], answer["arousal"]
    if any(type(x) not in (int, float) or not VA_MIN <= x <= VA_MAX for x in values):  # a bool's type is bool
        return None
    return float(values[0]), float(values[1])


def read_emotion(answer):
    """The class named by a parsed answer, in lower case, or None. The only key is `emotion_class`, its value a string."""
    if answer is None or answer.keys() != {"emotion_class"} or not isinstance(answer["emotion_class"], str):
        return None
    name = answer["emotion_class"].strip().lower()
    return name if name in EMOTIONS else None


# ---------------------------------------------------------------------------------------------------------------------
# Rewards


def format_reward(text):
    """1.0 if the text has the form `parse_answer` asks for, else 0.0."""
    return float(parse_answer(text) is not None)


def va_reward(text, v, a, kind="step", epsilon=0.70, weights=(0.25, 0.75)):
    """Reward in 0..sum(weights) of a V-A answer against the true v and a, both in 1..9; 0.0 if it cannot be read.

    "step": α₁·[|ΔV| ≤ ε] + α₂·[|ΔA| ≤ ε]; the constants are those of appendix B.2, the formula is read after Q-Insight
    (the paper draws it in figure 2 only). "continuous": α₁·(1 − |ΔV|/8) + α₂·(1 − |ΔA|/8), the other reward of table 4.
    ValueError for another kind or a v or a out of range.
    """
    if kind not in ("step", "continuous"):
        raise ValueError(f'kind must be "step" or "continuous", got {kind!r}')
    truth, told = check_va(v, a), read_va(parse_answer(text))
    if told is None:
        return 0.0
    errors = [abs(x - y) for x, y in zip(told, truth)]
    if kind == "step":
        parts = [float(error <= epsilon + 1e-9) for error in errors]  # the slack is for rounding: 7.7 - 7.0 > 0.70
    else:
        parts = [1 - error / (VA_MAX - VA_MIN) for error in errors]
    return float(weights[0] * parts[0] + weights[1] * parts[1])


def class_reward(text, label):
    """1.0 if the answer names the class `label`, else 0.0. ValueError for a label that is not in data.EMOTIONS."""
    if label not in EMOTIONS:
        raise ValueError(f"unknown emotion {label!r}; the classes are {', '.join(EMOTIONS)}")
    return float(read_emotion(parse_answer(text)) == label)


def group_advantages(rewards, eps=1e-4):
    """Advantages [P,G] of rewards [P,G]: (r − mean)/(std + eps) within each row, the std unbiased, as in TRL.

    A row without spread, or with no more than rounding leaves (and any row of one), gives exact zeros. Computed in
    float64, returned in the rewards' own floating type. ValueError for another shape or rewards that are not finite.
    """
    rewards = torch.as_tensor(rewards)
    if rewards.dim() != 2 or rewards.shape[1] < 1:
        raise ValueError(f"rewards must have the shape [P,G] with G at least 1, got {list(rewards.shape)}")
    dtype = rewards.dtype if rewards.is_floating_point() else torch.float32
    bad = (~rewards.isfinite()).any(1).nonzero().flatten().tolist()
    if bad:
        raise ValueError(f"rewards of prompt row {bad[0]} are not finite: {rewards[bad[0]].tolist()}")
    r = rewards.double()
    mean = r.mean(1, keepdim=True)
    std = ((r - mean).square().sum(1, keepdim=True) / max(1, r.shape[1] - 1)).sqrt()
    spread = r.amax(1, keepdim=True) - r.amin(1, keepdim=True)
    differs = spread > 1e-6 * mean.abs().clamp(min=1)
    return torch.where(differs, (r - mean) / (std + eps), 0.0).to(dtype)


# ---------------------------------------------------------------------------------------------------------------------
# Log-probabilities of the tokens, a tile of the logits at a time

ROWS, CHUNK = 4096, 2048  # tokens and vocabulary entries of a tile: 32 MiB of float32


def token_log_probs(hidden, lm_head_weight, targets, chunk=None, temperature=1.0):
    """log softmax(hidden·Wᵀ/temperature)[targets]: hidden [N,D], W [V,D], targets [N] in 0..V-1 -> [N].

    The result is float32 (float64 for float64 inputs). Logits exist as tiles of at most ROWS × chunk, which is 32 MiB
    whatever N and V are. Products are taken in the type of the inputs, the softmax in float32. Differentiable once, in
    hidden and W. ValueError for shapes or types that do not fit, targets out of range, or a chunk or temperature below
    or at 0.
    """
    chunk = CHUNK if chunk is None else chunk
    if hidden.dim() != 2 or lm_head_weight.dim() != 2 or hidden.shape[1] != lm_head_weight.shape[1]:
        raise ValueError("hidden and lm_head_weight must have the shapes [N,D] and [V,D], "
                         f"got {list(hidden.shape)} and {list(lm_head_weight.shape)}")
    if hidden.dtype != lm_head_weight.dtype or not hidden.is_floating_point():
        raise ValueError(f"hidden and lm_head_weight must share a floating type, got {hidden.dtype}, {lm_head_weight.dtype}")
    if targets.shape != hidden.shape[:1] or targets.is_floating_point() or targets.dtype == torch.bool:
        raise ValueError(f"targets must be {len(hidden)} integers, got {list(targets.shape)} of {targets.dtype}")
    if chunk < 1 or not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"chunk must be at least 1 and temperature above 0, got {chunk} and {temperature}")
    hidden, targets = hidden.contiguous(), targets.long()
    if len(targets) and not ((targets >= 0) & (targets < len(lm_head_weight))).all():
        raise ValueError(f"targets must lie in 0..{len(lm_head_weight) - 1}, "
                         f"got {targets.min().item()}..{targets.max().item()}")
    if torch.is_grad_enabled() and (hidden.requires_grad or lm_head_weight.requires_grad):
        return TokenLogProbs.apply(hidden, lm_head_weight, targets, chunk, temperature)
    return scan_vocabulary(hidden, lm_head_weight, targets, chunk, temperature, with_slope=False)[0]


class TokenLogProbs(torch.autograd.Function):
    """`token_log_probs` with its gradients.

    hidden: d log p_i / d hidden_i = (W[target_i] − Σ_v p_iv·W_v)/T is one row, whatever comes after, so the forward pass
    forms it while it has the tile, and the backward pass only scales it. W: the backward pass makes the tiles again.
    Forward and backward together cost two matrix products with a frozen head and four with a trained one.
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets, chunk, temperature):
        hidden_needs, weight_needs = ctx.needs_input_grad[:2]
        log_probs, lse, slope = scan_vocabulary(hidden, weight, targets, chunk, temperature, with_slope=hidden_needs)
        ctx.save_for_backward(slope, *((hidden, weight, targets, lse) if weight_needs else ()))
        ctx.chunk, ctx.temperature, ctx.hidden_dtype = chunk, temperature, hidden.dtype
        return log_probs

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        slope, *trained = ctx.saved_tensors
        weight_grad = head_gradient(*trained, grad, ctx.chunk, ctx.temperature) if trained else None
        hidden_grad = None if slope is None else (slope * grad[:, None]).to(ctx.hidden_dtype)
        return hidden_grad, weight_grad, None, None, None


def scan_vocabulary(hidden, weight, targets, chunk, temperature, with_slope):
    """(log p [N], logsumexp of the logits [N], d log p/d hidden [N,D] or None), all float32 or wider.

    One pass over the vocabulary with a running maximum, to which the sums so far are rescaled at every tile.
    """
    N, V = len(hidden), len(weight)
    on_gpu = ops.on_gpu(hidden)  # whose kernel computes in float32 whatever type the tile has
    buffer = tile_buffer(hidden, weight, chunk, hidden.dtype if on_gpu else None)
    wide = torch.promote_types(buffer.dtype, torch.float32)
    peak, total, picked = (buffer.new_full((N,), start, dtype=wide) for start in (-math.inf, 0.0, 0.0))
    pull = buffer.new_zeros(hidden.shape, dtype=wide) if with_slope else None  # Σ_v exp(logit_v − peak)·W_v
    for columns in slices(V, chunk):
        for rows in slices(N, ROWS):
            z = logits_tile(buffer, hidden[rows], weight[columns])  # [rows, columns]
            keep = ops.scan_tile(z, targets[rows], columns.start, peak[rows], total[rows], picked[rows], 1 / temperature)
            if with_slope:
                add_product(pull[rows].mul_(keep[:, None]), z, weight[columns])
    lse = peak + total.log()
    slope = pull.div_(-total[:, None]).add_(weight[targets]).div_(temperature) if with_slope else None
    return picked - lse, lse, slope


def head_gradient(hidden, weight, targets, lse, grad, chunk, temperature):
    """dLoss/dW [V,D] for dLoss/dlog p = grad [N]: Σ_i grad_i/T·(onehot_i − p_i)·hidden_iᵀ, summed in float32 or wider."""
    gradient, buffer = torch.empty_like(weight), tile_buffer(hidden, weight, chunk)
    scaled = (hidden * (-grad / temperature)[:, None]).to(hidden.dtype)  # [N,D]
    for columns in slices(len(weight), chunk):
        part = buffer.new_zeros(weight[columns].shape)
        for rows in slices(len(hidden), ROWS):
            p = logits_tile(buffer, hidden[rows], weight[columns])
            p = (p if temperature == 1 else p.div_(temperature)).sub_(lse[rows, None]).exp_()
            index, inside = ops.place_in_tile(targets[rows], columns.start, p.shape[1])
            p.scatter_add_(1, index, -inside.to(p.dtype))
            add_product(part, p.t(), scaled[rows])
        gradient[columns] = part
    return gradient


def slices(length, size):
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


def tile_buffer(hidden, weight, chunk, dtype=None):
    """Room for the largest tile, flat, in float32 or wider if no type is given."""
    dtype = dtype or torch.promote_types(hidden.dtype, torch.float32)
    return hidden.new_empty(min(len(hidden), ROWS) * min(len(weight), chunk), dtype=dtype)


def logits_tile(buffer, hidden, weight):
    """hidden·Wᵀ for some rows of each, written into the buffer."""
    z = buffer[:len(hidden) * len(weight)].view(len(hidden), len(weight))
    return torch.mm(hidden, weight.t(), out=z) if hidden.dtype == z.dtype else z.copy_(hidden @ weight.t())


def add_product(total, a, b):
    """total += a·b; a is rounded to the type of b for the product, the sum keeps the type of total."""
    if b.dtype == total.dtype:
        total.addmm_(a, b)
    else:
        total.add_(a.to(b.dtype) @ b)


# ---------------------------------------------------------------------------------------------------------------------
# The loss


def k3_kl(log_probs, ref_log_probs):
    """Estimate of KL(policy ‖ reference) at each token sampled from the policy: exp(d) − d − 1 with d = ref − policy.

    Never negative, and unbiased (Schulman's k3). Any shape.
    """
    d = ref_log_probs - log_probs
    return d.exp() - d - 1


def grpo_loss(log_probs, old_log_probs, ref_log_probs, advantages, mask, clip=0.2, beta=1e-3, normalizer=None):
    """(loss, metrics) of GRPO (DeepSeekMath, eq. 3): the clipped surrogate plus beta times the KL to the reference.

    log_probs, old_log_probs, ref_log_probs [B,L]: of the tokens under the model that trains, the one that sampled and
    the reference; only the first is differentiated. advantages [B]. mask [B,L]: true (or not 0) at tokens of the
    completion; what stands elsewhere, NaN included, reaches neither loss nor gradient.

    Tokens are averaged within a completion and completions over `normalizer` (default B). A completion without tokens
    counts and adds 0. With the number of completions of the whole batch as normalizer, the losses of its parts add up to
    the loss of the whole (where gradients are averaged over processes rather than summed, give the number per process).

    metrics, detached, over the tokens: ratio (mean), ratio_max_deviation (greatest |ratio − 1|), clip_fraction (share
    where the clip takes the gradient away), and kl (mean), the last only with a reference. ref_log_probs may be None
    if beta is 0. ValueError for shapes that do not fit.
    """
    if ref_log_probs is None and beta != 0:
        raise ValueError(f"beta is {beta}, so the log-probabilities of the reference are needed")
    B = len(log_probs)
    check_loss_shapes(log_probs, old_log_probs, ref_log_probs, advantages, mask)
    mask, wide = mask.bool(), torch.promote_types(log_probs.dtype, torch.float32)

    def clean(x):  # 0 in place of padding, before any arithmetic
        return torch.where(mask, x.to(wide), 0.0)

    new, old = clean(log_probs), clean(old_log_probs.detach())
    A = advantages.detach().to(wide)[:, None]  # [B,1]
    ratio = (new - old).exp()
    per_token = -torch.minimum(ratio * A, ratio.clamp(1 - clip, 1 + clip) * A)
    kl = None if ref_log_probs is None else k3_kl(new, clean(ref_log_probs.detach()))
    if beta != 0:
        per_token = per_token + beta * kl
    per_completion = clean(per_token).sum(1) / mask.sum(1).clamp(min=1)
    loss = per_completion.sum() / (max(1, B) if normalizer is None else normalizer)
    return loss, loss_metrics(ratio.detach(), None if kl is None else kl.detach(), A, mask, clip)


def check_loss_shapes(log_probs, old_log_probs, ref_log_probs, advantages, mask):
    shape = log_probs.shape
    if len(shape) != 2:
        raise ValueError(f"log_probs must have the shape [B,L], got {list(shape)}")
    for name, x in (("old_log_probs", old_log_probs), ("ref_log_probs", ref_log_probs), ("mask", mask)):
        if x is not None and x.shape != shape:
            raise ValueError(f"{name} must have the shape of log_probs, {list(shape)}, got {list(x.shape)}")
    if advantages.shape != shape[:1]:
        raise ValueError(f"advantages must have the shape [{shape[0]}], got {list(advantages.shape)}")


def loss_metrics(ratio, kl, advantages, mask, clip):
    """0-d tensors of `grpo_loss`. ratio, kl, mask [B,L], advantages [B,1]; ratio is 1 and kl 0 outside the mask."""
    tokens = mask.sum().clamp(min=1)
    clipped = torch.where(advantages > 0, ratio > 1 + clip, ratio < 1 - clip) & (advantages != 0) & mask
    metrics = {"ratio": (ratio * mask).sum() / tokens, "clip_fraction": clipped.sum() / tokens,
               "ratio_max_deviation": (ratio - 1).abs().max() if ratio.numel() else ratio.new_zeros(())}
    return metrics if kl is None else {**metrics, "kl": kl.sum() / tokens}
