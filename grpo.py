"""GRPO for the judge (EmoFeedback², section 3.1): rewards of its answers, advantages,
log-probabilities of its tokens, the loss.

In the order of a training step: `format_reward`, `va_reward` and `class_reward` score the sampled
texts, `group_advantages` compares the answers to one question, `token_log_probs` says how likely
the model finds each of their tokens, and `grpo_loss` is what the optimizer sees. Nothing here knows
the model. GRPO is of DeepSeekMath (Shao et al. 2024); where it leaves a choice, ours is TRL's.

Shapes: P prompts, G answers to each, B = P·G completions, L tokens of the longest, N tokens of all,
D width, V vocabulary. Â is an advantage here, as in the paper; elsewhere it is the judged arousal.
"""

import torch
import torch.nn.functional as F

import feedback
from data import VA_MAX, VA_MIN
from parts import ops
from parts.cli import UserError

# --------------------------------------------------------------------------------------------------
# Rewards. Answers are read strictly, for what a lenient reader forgives would never be unlearnt.


def format_reward(text):
    """1.0 if the text is `<think>…</think><answer>{…}</answer>` with a JSON object, else 0.0."""
    return float(feedback.strict_object(text) is not None)


def va_reward(text, v, a, kind="step", epsilon=0.70, weights=(0.25, 0.75)):
    """Reward in 0..sum(weights) of a V-A answer against the true v and a; 0.0 if it is unreadable.

    kind "step": α₁·[|ΔV| ≤ ε] + α₂·[|ΔA| ≤ ε]. The paper gives α₁, α₂ and ε (appendix B.2) and
    draws the formula in figure 2 only. kind "nested": α₂ counts only if V is right, too, as the
    second part of Q-Insight's reward does after its first (Li et al. 2025; α₁ and α₂ are theirs).
    kind "continuous": α₁·(1 − |ΔV|/8) + α₂·(1 − |ΔA|/8), the other reward of Table 4.
    """
    answer = feedback.read_answer(text, "regression", strict=True)
    if answer is None:
        return 0.0
    v_error = abs(answer[0] - v)
    a_error = abs(answer[1] - a)
    if kind == "continuous":
        width = VA_MAX - VA_MIN
        return float(weights[0] * (1 - v_error / width) + weights[1] * (1 - a_error / width))
    limit = epsilon + 1e-9  # 7.7 - 7.0 is a little more than 0.70 in floating point
    v_right = v_error <= limit
    a_right = a_error <= limit and (v_right or kind != "nested")
    return float(weights[0] * v_right + weights[1] * a_right)


def class_reward(text, label):
    """1.0 if the answer names the class `label`, else 0.0."""
    return float(feedback.read_answer(text, "class", strict=True) == label)


# --------------------------------------------------------------------------------------------------
# Advantages


def group_advantages(rewards, eps=1e-4, global_std=False):
    """Advantages [P,G] of rewards [P,G], equation 1: Â = (r − mean)/(std + eps) within each row.

    The std is the unbiased one, as in TRL; with global_std the biased one of all rewards, as in
    Flow-GRPO's code. A row without spread, or with no more than rounding leaves, gives exact zeros.
    Computed in float64, returned in the rewards' own floating type. ValueError for another shape or
    rewards that are not finite.
    """
    rewards = torch.as_tensor(rewards)
    if rewards.dim() != 2 or rewards.shape[1] < 1:
        raise ValueError(f"rewards must have the shape [P,G], G ≥ 1, got {list(rewards.shape)}")
    bad_rows = (~rewards.isfinite()).any(dim=1).nonzero().flatten().tolist()
    if bad_rows:
        row = bad_rows[0]
        raise ValueError(f"rewards of prompt row {row} are not finite: {rewards[row].tolist()}")
    dtype = rewards.dtype if rewards.is_floating_point() else torch.float32
    r = rewards.double()
    mean = r.mean(dim=1, keepdim=True)  # [P,1]
    degrees = max(1, r.shape[1] - 1)
    std = ((r - mean).square().sum(dim=1, keepdim=True) / degrees).sqrt()
    if global_std:
        std = r.std(correction=0)
    # Rewards that differ by rounding only must not be blown up to advantages of about ±1.
    spread = r.amax(dim=1, keepdim=True) - r.amin(dim=1, keepdim=True)
    differs = spread > 1e-6 * mean.abs().clamp(min=1)
    return torch.where(differs, (r - mean) / (std + eps), 0.0).to(dtype)


# --------------------------------------------------------------------------------------------------
# Log-probabilities of the tokens


@ops.fusable
def token_log_probs(hidden, lm_head_weight, targets, temperature=1.0):
    """log softmax(hidden·Wᵀ/temperature)[targets]: hidden [N,D], W [V,D], targets [N] -> [N].

    The result is float32 (float64 for float64 inputs), differentiable in hidden and W. This form
    holds the logits of all tokens; kernels/log_probs.py computes the same a tile at a time.
    """
    wide = torch.promote_types(hidden.dtype, torch.float32)
    logits = hidden.to(wide) @ lm_head_weight.to(wide).T  # [N,V]; not rounded, as in `ops.logits`
    log_probs = F.log_softmax(logits / temperature, dim=-1)
    return log_probs.gather(1, targets.long()[:, None])[:, 0]  # [N,1] -> [N]


def check_on_policy(sampled, computed, mask, limits, rounding=1.0):
    """How far log-probabilities that training computes are from those of sampling, all [B,L].

    Before an update the two differ by rounding only. Returns {"mean": of |Δ log p| over the tokens,
    "share": of the tokens with |ratio − 1| > 0.5, "max": the greatest |ratio − 1|}. UserError if
    one is above its limit; "max" usually has none, as in bfloat16 a few of 100,000 tokens are off
    by half. rounding: 1 for bfloat16, 1e-3 for float32; it scales the limit of "mean", and the 0.5.
    """
    difference = torch.where(mask, computed - sampled, 0.0)
    deviation = (difference.exp() - 1).abs()
    far = ~(deviation <= 0.5 * rounding)  # true for NaN, too
    sums = {"mean": difference.abs().sum(), "share": far.sum()}
    figures = {name: float(value / mask.sum()) for name, value in sums.items()}
    figures["max"] = float(deviation.max())
    for name, limit in limits.items():
        limit = limit * rounding if name == "mean" else limit
        if not figures[name] <= limit:
            off = ", ".join(f"{part} {figure:.2g}" for part, figure in figures.items())
            first = int(far.any(dim=0).int().argmax())
            raise UserError(f"before the first update training's log-probabilities differ from "
                            f"sampling's by {off} (allowed: {name} {limit:g}), from token {first} "
                            f"of an answer on; compare their prompts, adapter, positions, "
                            f"temperature, or give --mismatch")
    return figures


# --------------------------------------------------------------------------------------------------
# The loss


def k3_kl(log_probs, ref_log_probs):
    """Estimate of KL(policy ‖ reference) at each token sampled from the policy: exp(d) − d − 1 with
    d = log π_ref − log π. Never negative, and unbiased (Schulman's k3). Any shape."""
    d = ref_log_probs - log_probs
    return d.expm1() - d  # d.exp() - 1 would round small differences away


def grpo_loss(log_probs, old_log_probs, ref_log_probs, advantages, mask, clip=0.2, beta=1e-3,
              normalizer=None):
    """(loss, metrics) of GRPO (DeepSeekMath, equation 3): clipped surrogate and KL to a reference.

    log_probs, old_log_probs, ref_log_probs [B,L]: of the tokens under the model that trains, the
    one that sampled and the reference; only the first is differentiated. The last may be None if
    beta is 0. advantages [B]. mask [B,L]: true at tokens of the completion; what stands elsewhere,
    NaN included, reaches neither loss nor gradient.

    Tokens are averaged within a completion and completions over `normalizer` (default B). A
    completion without tokens counts and adds 0. With the number of completions of the whole batch
    as normalizer, the losses of its parts add up to the loss of the whole (where gradients are
    averaged over processes rather than summed, give the number per process).

    metrics: detached 0-d tensors, see `loss_metrics`. ValueError for shapes that do not fit.
    """
    check_shapes(log_probs, old_log_probs, ref_log_probs, advantages, mask)
    if ref_log_probs is None and beta != 0:
        raise ValueError(f"beta is {beta}, so the reference's log-probabilities are needed")
    mask = mask.bool()
    wide = torch.promote_types(log_probs.dtype, torch.float32)
    # Padding becomes 0 before any arithmetic: a NaN times a mask of 0 would still be NaN.
    new = torch.where(mask, log_probs.to(wide), 0.0)
    old = torch.where(mask, old_log_probs.detach().to(wide), 0.0)
    A = advantages.detach().to(wide)[:, None]  # [B,1]

    # The policy gradient: min(ρ·Â, clip(ρ, 1 − ε, 1 + ε)·Â) with the ratio ρ = π/π_old.
    ratio = (new - old).exp()
    per_token = -torch.minimum(ratio * A, ratio.clamp(1 - clip, 1 + clip) * A)  # [B,L]

    # β times the KL to the reference.
    kl = None
    if ref_log_probs is not None:
        kl = k3_kl(new, torch.where(mask, ref_log_probs.detach().to(wide), 0.0))
        if beta != 0:
            per_token = per_token + beta * kl

    # The mean over the tokens of a completion, then over completions.
    lengths = mask.sum(dim=1).clamp(min=1)
    per_completion = torch.where(mask, per_token, 0.0).sum(dim=1) / lengths
    loss = per_completion.sum() / (max(1, len(log_probs)) if normalizer is None else normalizer)
    return loss, loss_metrics(ratio.detach(), kl, A, mask, clip)


def check_shapes(log_probs, old_log_probs, ref_log_probs, advantages, mask):
    """ValueError unless all but the advantages [B] have one shape [B,L]."""
    same = {"old_log_probs": old_log_probs, "mask": mask}
    if ref_log_probs is not None:
        same["ref_log_probs"] = ref_log_probs
    for name, x in same.items():
        if log_probs.dim() != 2 or x.shape != log_probs.shape:
            raise ValueError(f"log_probs and {name} must have one shape [B,L], got "
                             f"{list(log_probs.shape)} and {list(x.shape)}")
    if advantages.shape != log_probs.shape[:1]:
        raise ValueError(f"advantages must have the shape {list(log_probs.shape[:1])}, got "
                         f"{list(advantages.shape)}")


def loss_metrics(ratio, kl, advantages, mask, clip):
    """What the log shows of `grpo_loss`, over the tokens: the mean ratio, the greatest |ratio − 1|,
    the share of tokens whose gradient the clip takes away, and the mean KL if there is one.

    ratio, kl, mask [B,L], advantages [B,1]; ratio is 1 and kl 0 outside the mask.
    """
    tokens = mask.sum().clamp(min=1)
    # The clip takes a gradient away only where it would push the ratio further out.
    beyond = torch.where(advantages > 0, ratio > 1 + clip, ratio < 1 - clip)
    clipped = beyond & (advantages != 0) & mask
    worst = (ratio - 1).abs().max() if ratio.numel() else ratio.new_zeros(())
    metrics = {
        "ratio": (ratio * mask).sum() / tokens,
        "ratio_max_deviation": worst,
        "clip_fraction": clipped.sum() / tokens,
    }
    if kl is not None:
        metrics["kl"] = kl.detach().sum() / tokens
    return metrics
