"""Rectified flow (Esser et al. 2024) and its training by rewards, Flow-GRPO (Liu et al. 2025; EmoFeedback², section 3.2).

A latent on the way from data x₀ to noise ε is x_σ = (1 − σ)·x₀ + σ·ε, and the MMDiT predicts the velocity ε − x₀.
Drawing a picture integrates dx/dσ = velocity from σ = 1 to σ = 0: `sample_ode`. Rewards need a sampler that explores and
knows how likely its own steps were: `sample_sde` adds noise to each step and corrects the drift for it, so that x_σ keeps
its distribution. `evaluate_step` takes a kept step again under the model that trains, `flow_grpo_loss` and
`step_loss` compare.

Shapes: B batch, C, h, w latents, L text tokens, T steps. The state is float32 whatever the model computes in.
"""

import math
import random
from dataclasses import dataclass

import torch

from parts import ops

TRAIN_STEPS = 1000  # timesteps the model was trained on: the MMDiT is given 1000·σ


def sigma_schedule(num_steps, shift=3.0):
    """[T+1] float32, from 1 down to 0: the noise level before each step, and the end.

    Equal to diffusers' FlowMatchEulerDiscreteScheduler, whose quirk it keeps: the last level above zero is that of
    timestep 1, shifted twice (once as the end of the range, once with all others).
    """
    if num_steps < 1:
        raise ValueError(f"num_steps must be at least 1, got {num_steps}")
    lowest = shift_sigma(torch.tensor(1.0) / TRAIN_STEPS, shift).item()  # rounded to float32
    spaced = torch.linspace(TRAIN_STEPS, lowest * TRAIN_STEPS, num_steps, dtype=torch.float64) / TRAIN_STEPS
    return torch.cat([shift_sigma(spaced, shift).float(), torch.zeros(1)])


def shift_sigma(sigma, shift):
    """Move noise levels towards 1: larger pictures need more noise to lose their content."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def guided_velocity(model, latents, sigma, context, pooled, guidance):
    """Velocity [B,C,h,w] float32 at `latents` [B,C,h,w] and noise level `sigma` (a float, or a 0-d
    tensor on the CPU: one on a GPU would have to be waited for).

    guidance > 1: context [2B,L,·] and pooled [2B,·] hold the unconditional rows first, both halves run as one batch,
    and the result is v_uncond + guidance·(v_cond − v_uncond). Else context and pooled have B rows.
    """
    x = torch.cat([latents, latents]) if guidance > 1 else latents
    timestep = torch.full((len(x),), float(sigma) * TRAIN_STEPS, dtype=torch.float32, device=x.device)
    velocity = model(x.to(context.dtype), timestep, context, pooled).float()
    if guidance > 1:
        unconditional, conditional = velocity.chunk(2)
        velocity = unconditional + guidance * (conditional - unconditional)
    return velocity


@torch.no_grad()
def sample_ode(model, latents, context, pooled, num_steps=25, guidance=4.5, shift=3.0, progress=iter):
    """Euler steps from noise [B,C,h,w] to scaled latents [B,C,h,w], float32.

    context, pooled: as in `guided_velocity`. progress: wraps the list of steps, e.g. in tqdm.
    """
    sigmas, x = sigma_schedule(num_steps, shift), latents.float()
    for i in progress(range(num_steps)):
        velocity = guided_velocity(model, x, sigmas[i], context, pooled, guidance)
        x = euler_step(velocity, x, sigmas[i], sigmas[i + 1])
    return x


def euler_step(velocity, latents, sigma, sigma_next):
    return latents + (sigma_next - sigma) * velocity


# ---------------------------------------------------------------------------------------------------------------------
# One stochastic step


@dataclass
class SDEStep:
    next_latents: torch.Tensor  # [B,C,h,w] float32, without gradient
    log_prob: torch.Tensor  # [B]: log density of next_latents, averaged over their elements
    kl: torch.Tensor | None  # [B]: to the reference's step, if there is one; see `kl_of`
    std: float  # of the noise of this step, σ_t·√(−dt)
    sigma_t: float  # of the noise per unit of σ; the KL is measured in it
    terms: tuple  # (velocity, latents, a, b) of the mean a·latents + b·velocity

    @property
    def mean(self):  # [B,C,h,w] float32, made when asked for: log_prob and kl do without it
        return ops.sde_mean(*self.terms)


def sde_step(velocity, latents, sigma, sigma_next, noise_level, next_latents=None, generator=None, ref_velocity=None):
    """The SDEStep from noise level `sigma` to `sigma_next`, 0 ≤ sigma_next < sigma ≤ 1 (floats or 0-d tensors).

    velocity, latents [B,C,h,w]. Without next_latents a step is drawn; with them [B,C,h,w] that step is evaluated, by the
    same arithmetic. generator: one for all rows, or a list of one for each row, whose noise is then its own. ref_velocity
    [B,C,h,w], only with next_latents: the reference model's, a constant.

    With dt = sigma_next − σ and σ_t = noise_level·√(σ/(1 − σ)), the step is Gaussian with
    mean = x·(1 + σ_t²/(2σ)·dt) + v·(1 + σ_t²·(1 − σ)/(2σ))·dt and standard deviation σ_t·√(−dt) (Flow-GRPO). At σ = 1,
    where σ_t has no bound, 1 − sigma_next replaces 1 − σ in σ_t. All in float32. mean, log_prob and kl are differentiable in
    the velocity; the step taken is a constant to them. ValueError for levels out of range and shapes that do not fit.
    """
    sigma, sigma_next = float(sigma), float(sigma_next)
    check_step(velocity, latents, sigma, sigma_next, noise_level, next_latents, generator, ref_velocity)
    velocity, latents, dt = velocity.float(), latents.float(), sigma_next - sigma
    sigma_t = noise_level * math.sqrt(sigma / (1 - (sigma if sigma < 1 else sigma_next)))
    std = sigma_t * math.sqrt(-dt)
    pull = sigma_t**2 / (2 * sigma)  # how strongly the added noise is drawn back to the data
    a, b, kl = 1 + pull * dt, (1 + pull * (1 - sigma)) * dt, None
    if next_latents is None:
        next_latents, log_prob = ops.sde_draw(velocity, latents, draw_noise(latents, generator), a, b, std)
    else:
        next_latents = next_latents.detach().float()
        log_prob, kl = ops.sde_log_prob(velocity, latents, next_latents, a, b, std, ref_velocity, sigma_t)
    return SDEStep(next_latents, log_prob, kl, std, sigma_t, (velocity, latents, a, b))


def check_step(velocity, latents, sigma, sigma_next, noise_level, next_latents, generator, ref_velocity):
    if not 0 < noise_level < math.inf:
        raise ValueError(f"noise_level must be above 0, got {noise_level}: without noise a step has no log-probability; "
                         "use sample_ode to draw without noise")
    if not 0 <= sigma_next < sigma <= 1:
        raise ValueError(f"a step goes down from sigma to sigma_next within 0..1, got {sigma} and {sigma_next}")
    if ref_velocity is not None and next_latents is None:
        raise ValueError("ref_velocity is for a step that is evaluated; give next_latents too")
    for name, x in (("velocity", velocity), ("next_latents", next_latents), ("ref_velocity", ref_velocity)):
        if x is not None and x.shape != latents.shape:
            raise ValueError(f"{name} must have the shape of latents, {list(latents.shape)}, got {list(x.shape)}")
    if isinstance(generator, list | tuple) and len(generator) != len(latents):
        raise ValueError(f"{len(generator)} generators for {len(latents)} rows; give one for each row, or a single one")


def draw_noise(like, generator):
    """Standard normal noise in the shape of `like` [B,…]; each generator draws on its own device, so that a CPU generator
    gives the same noise wherever the model runs."""
    if isinstance(generator, list | tuple):
        return torch.stack([draw_noise(row, one) for row, one in zip(like, generator, strict=True)])
    device = like.device if generator is None else generator.device
    return torch.randn(like.shape, generator=generator, device=device).to(like.device)


def kl_of(mean, ref_mean, sigma_t):
    """KL of the model's step to the reference's [B], both Gaussians of one width: (mean − ref_mean)²/(2σ_t²), averaged
    over the elements. As in Flow-GRPO's code the width is `sigma_t`, without dt, so that all steps weigh alike.
    """
    if mean.shape != ref_mean.shape:
        raise ValueError(f"mean and ref_mean must share a shape, got {list(mean.shape)} and {list(ref_mean.shape)}")
    if not sigma_t > 0:
        raise ValueError(f"sigma_t must be above 0, got {sigma_t}")
    wide = torch.promote_types(mean.dtype, torch.float32)
    return (mean.to(wide) - ref_mean.to(wide)).square().flatten(1).mean(1) / (2 * sigma_t**2)


# ---------------------------------------------------------------------------------------------------------------------
# Whole trajectories


@dataclass
class KeptStep:
    index: int  # of the T steps
    before: torch.Tensor  # [B,C,h,w] float32
    after: torch.Tensor  # [B,C,h,w] float32; the same memory as the next step's `before`
    log_prob: torch.Tensor  # [B]: under the model that drew it


@dataclass
class Trajectory:
    latents: torch.Tensor  # [B,C,h,w] float32: the end, scaled latents to decode
    steps: list[KeptStep]  # the stochastic ones, in order
    sigmas: torch.Tensor  # [T+1], on the CPU; this and what follows make evaluate_step repeat the drawing
    guidance: float
    noise_level: float


@torch.no_grad()
def sample_sde(model, latents, context, pooled, num_steps=10, guidance=4.5, shift=3.0, noise_level=0.7, window=None,
               generator=None, progress=iter):
    """The Trajectory from noise [B,C,h,w]: stochastic steps inside the window, those of `sample_ode` outside.

    window: (start, length) of the T steps, 0 ≤ start, start + length ≤ T; all steps if None. generator: as in `sde_step`.
    context, pooled, progress: as in `sample_ode`. ValueError for a window outside the steps.
    """
    start, length = (0, num_steps) if window is None else window
    if not 0 <= start <= start + length <= num_steps:
        raise ValueError(f"window (start {start}, length {length}) must lie within the {num_steps} steps")
    sigmas, x, kept = sigma_schedule(num_steps, shift), latents.float(), []
    for i in progress(range(num_steps)):
        velocity = guided_velocity(model, x, sigmas[i], context, pooled, guidance)
        if start <= i < start + length:
            step = sde_step(velocity, x, sigmas[i], sigmas[i + 1], noise_level, generator=generator)
            kept.append(KeptStep(i, x, step.next_latents, step.log_prob))
            x = step.next_latents
        else:
            x = euler_step(velocity, x, sigmas[i], sigmas[i + 1])
    return Trajectory(x, kept, sigmas, guidance, noise_level)


def evaluate_step(model, trajectory, k, context, pooled, ref_velocity=None):
    """The SDEStep that was kept k-th, under the model as it is now, with gradients.

    context, pooled: those of the drawing. Model, step and arithmetic are those of `sample_sde`, so before any update
    log_prob equals the kept one bit for bit, as long as the batch is the same (other batch sizes round differently).
    ref_velocity: `kept_velocity` of the reference, to have the KL.
    """
    kept, sigmas = trajectory.steps[k], trajectory.sigmas
    velocity = kept_velocity(model, trajectory, k, context, pooled)
    return sde_step(velocity, kept.before, sigmas[kept.index], sigmas[kept.index + 1], trajectory.noise_level, kept.after,
                    ref_velocity=ref_velocity)


def kept_velocity(model, trajectory, k, context, pooled):
    """The guided velocity [B,C,h,w] before the step that was kept k-th, under the model as it is now."""
    kept = trajectory.steps[k]
    return guided_velocity(model, kept.before, trajectory.sigmas[kept.index], context, pooled, trajectory.guidance)


def window_of(step, num_steps, length, seed):
    """The window (start, length) of a training step for `sample_sde`, its start drawn evenly from all that fit.

    Every process of a run gets the same, and a resumed run what the first would have had. length None, for no window,
    gives None. ValueError for a length outside 1..num_steps.
    """
    if length is None:
        return None
    if not 1 <= length <= num_steps:
        raise ValueError(f"the window's length must lie in 1..{num_steps}, got {length}")
    return random.Random(f"window {seed} {step}").randint(0, num_steps - length), length


# ---------------------------------------------------------------------------------------------------------------------
# The loss


def flow_grpo_loss(log_prob, old_log_prob, advantages, mean, ref_mean, std, clip=1e-4, beta=0.1, normalizer=None,
                   advantage_clip=5.0):
    """`step_loss` of the means [B,C,h,w] of a step under the model and the reference, which may be None if beta is 0.

    std: SDEStep.sigma_t, which has no dt in it, not SDEStep.std; it only enters the KL (`kl_of`). mean is differentiated,
    ref_mean is not.
    """
    kl = None if ref_mean is None else kl_of(mean, ref_mean.detach(), std)
    return step_loss(log_prob, old_log_prob, advantages, kl, clip, beta, normalizer, advantage_clip)


def step_loss(log_prob, old_log_prob, advantages, kl, clip=1e-4, beta=0.1, normalizer=None, advantage_clip=5.0):
    """(loss, metrics) of Flow-GRPO at one step of B trajectories: the clipped surrogate plus beta times the KL.

    log_prob, old_log_prob, advantages, kl [B]: of the step under the model that trains and the one that drew it, of the
    picture at its end, cut to ±advantage_clip, and SDEStep.kl. log_prob and kl are differentiated, nothing else.

    Rows are summed and divided by `normalizer` (default B). With the number of rows of the whole batch as normalizer
    (times the number of steps, to average over these too) the losses of its parts add up to the loss of the whole; where
    gradients are averaged over processes rather than summed, give the number per process.

    metrics, detached, over the rows: ratio (mean), ratio_max_deviation (greatest |ratio − 1|), clip_fraction (share where
    the clip takes the gradient away), and kl (mean), the last only with a reference. kl may be None if beta is 0.
    ValueError for shapes that do not fit.
    """
    if kl is None and beta != 0:
        raise ValueError(f"beta is {beta}, so the KL to the reference is needed: its mean, or its velocity for the step")
    check_rows(log_prob, old_log_prob, advantages, kl)
    wide = torch.promote_types(log_prob.dtype, torch.float32)
    A = advantages.detach().to(wide).clamp(-advantage_clip, advantage_clip)
    ratio = (log_prob.to(wide) - old_log_prob.detach().to(wide)).exp()
    per_row = -torch.minimum(ratio * A, ratio.clamp(1 - clip, 1 + clip) * A)
    if beta != 0:
        per_row = per_row + beta * kl
    loss = per_row.sum() / (len(log_prob) if normalizer is None else normalizer)
    return loss, loss_metrics(ratio.detach(), None if kl is None else kl.detach(), A, clip)


def check_rows(log_prob, old_log_prob, advantages, kl):
    if log_prob.dim() != 1 or not len(log_prob):
        raise ValueError(f"log_prob must have the shape [B] with B at least 1, got {list(log_prob.shape)}")
    for name, x in (("old_log_prob", old_log_prob), ("advantages", advantages), ("kl", kl)):
        if x is not None and x.shape != log_prob.shape:
            raise ValueError(f"{name} must have the shape of log_prob, {list(log_prob.shape)}, got {list(x.shape)}")


def loss_metrics(ratio, kl, advantages, clip):
    """0-d tensors of `step_loss`. ratio, kl, advantages [B]."""
    clipped = torch.where(advantages > 0, ratio > 1 + clip, ratio < 1 - clip) & (advantages != 0)
    metrics = {"ratio": ratio.mean(), "ratio_max_deviation": (ratio - 1).abs().max(),
               "clip_fraction": clipped.to(ratio.dtype).mean()}
    return metrics if kl is None else {**metrics, "kl": kl.mean()}
