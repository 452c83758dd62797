"""Rectified flow (Esser et al. 2024) and its training by rewards, Flow-GRPO (Liu et al. 2025).

A latent on the way from data x₀ to noise ε is x_σ = (1 − σ)·x₀ + σ·ε, and the MMDiT predicts the
velocity v = ε − x₀. Drawing a picture integrates dx/dσ = v from σ = 1 to σ = 0: `sample_ode`.
Rewards need a sampler that explores and knows how likely its steps were: `sample_sde` adds noise to
each, scaled by `noise_level`, and corrects the drift for it, so that x_σ keeps its distribution.
`evaluate_step` takes a kept step again under the model that trains, and `flow_grpo_loss` compares
(EmoFeedback², section 3.2). `difference_loss` does without log-probabilities. Shapes: B batch, C,
h, w latents, L text tokens, T steps.
"""

import math
from dataclasses import dataclass

import torch

from parts import ops

TRAIN_STEPS = 1000  # timesteps the model was trained on: the MMDiT is given 1000·σ


def sigma_schedule(num_steps, shift=3.0):
    """[T+1] float32, from 1 down to 0: σ, the share of noise, before each step, and the end.

    Equal to diffusers' FlowMatchEulerDiscreteScheduler, whose quirk it keeps: the last σ above
    zero is that of timestep 1, shifted twice (once as the end of the range, once with all others).
    """
    if num_steps < 1:
        raise ValueError(f"num_steps must be at least 1, got {num_steps}")
    lowest = shift_sigma(torch.tensor(1.0) / TRAIN_STEPS, shift).item()  # rounded to float32
    spaced = torch.linspace(TRAIN_STEPS, lowest * TRAIN_STEPS, num_steps, dtype=torch.float64)
    return torch.cat([shift_sigma(spaced / TRAIN_STEPS, shift).float(), torch.zeros(1)])


def shift_sigma(sigma, shift):
    """Move σ towards 1: larger pictures need more noise to lose their content."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def guided_velocity(model, latents, sigma, context, pooled, guidance, detach=False):
    """Velocity [B,C,h,w] float32 at `latents` [B,C,h,w] and σ = `sigma`.

    sigma: a float or a 0-d tensor on the CPU: the host would have to wait for one on a GPU.
    guidance > 1: context [2B,L,·] and pooled [2B,·] hold the unconditional rows first, and the
    result is v_uncond + guidance·(v_cond − v_uncond). Else context and pooled have B rows.
    detach: v_uncond has no gradient, and so needs no activations.
    """
    if guidance <= 1:
        timestep = torch.full((len(latents),), float(sigma) * TRAIN_STEPS, device=latents.device)
        return model(latents.to(context.dtype), timestep, context, pooled).float()
    if detach:
        halves = zip(context.chunk(2), pooled.chunk(2))
        with torch.no_grad():
            unconditional = guided_velocity(model, latents, sigma, *next(halves), guidance=1)
        conditional = guided_velocity(model, latents, sigma, *next(halves), guidance=1)
    else:
        both = torch.cat([latents, latents])
        velocities = guided_velocity(model, both, sigma, context, pooled, guidance=1)
        unconditional, conditional = velocities.chunk(2)
    return unconditional + guidance * (conditional - unconditional)


@torch.no_grad()
def sample_ode(model, latents, context, pooled, num_steps=25, guidance=4.5, shift=3.0,
               progress=iter):
    """Euler steps from noise [B,C,h,w] to scaled latents [B,C,h,w], float32.

    context, pooled: as in `guided_velocity`. progress: wraps the list of steps, e.g. in tqdm.
    """
    sigmas = sigma_schedule(num_steps, shift)
    x = latents.float()
    for i in progress(range(num_steps)):
        velocity = guided_velocity(model, x, sigmas[i], context, pooled, guidance)
        x = x + (sigmas[i + 1] - sigmas[i]) * velocity
    return x


# --------------------------------------------------------------------------------------------------
# One stochastic step: its mean, density and KL


def step_numbers(sigma, sigma_next, noise_level):
    """(a, b, std, σ_t) of the step, whose distribution is N(a·x + b·v, std²) (Flow-GRPO, eq. 9).

    mean = x·(1 + σ_t²/(2σ)·dt) + v·(1 + σ_t²·(1 − σ)/(2σ))·dt and std = σ_t·√(−dt), with
    dt = sigma_next − σ and σ_t = noise_level·√(σ/(1 − σ)).
    """
    if not 0 < noise_level < math.inf:
        raise ValueError(f"noise_level must be above 0, got {noise_level}; sample_ode needs none")
    if not 0 <= sigma_next < sigma <= 1:
        raise ValueError(f"a step goes down within 0..1, got sigma {sigma} to {sigma_next}")
    dt = sigma_next - sigma
    # At σ = 1 the noise σ_t has no bound; there 1 − sigma_next stands for 1 − σ.
    below = sigma if sigma < 1 else sigma_next
    sigma_t = noise_level * math.sqrt(sigma / (1 - below))
    pull = sigma_t**2 / (2 * sigma)  # how strongly the added noise is drawn back to the data
    return 1 + pull * dt, (1 + pull * (1 - sigma)) * dt, sigma_t * math.sqrt(-dt), sigma_t


def step_mean(velocity, latents, a, b):
    """Mean a·x + b·v of a step [B,C,h,w], in float32."""
    return latents.float() * a + velocity.float() * b


def log_density(x, mean, std):
    """Log density [B] of x under N(mean, std²), averaged over the elements of a latent."""
    z = (x - mean) / std
    return -0.5 * z.square().flatten(1).mean(1) - math.log(std) - 0.5 * math.log(2 * math.pi)


@ops.fusable
def sde_draw(velocity, latents, noise, a, b, std):
    """Draw a step: (next latents [B,C,h,w], without gradient, and their log-probability [B])."""
    mean = step_mean(velocity, latents, a, b)
    drawn = (mean + std * noise).detach()
    return drawn, log_density(drawn, mean, std)


@ops.fusable
def sde_log_prob(velocity, latents, next_latents, a, b, std, ref_velocity=None, sigma_t=1.0):
    """Evaluate a given step: (log-probability [B], KL [B] to the reference's step or None).

    The KL of two Gaussians of one width: (mean − ref_mean)²/(2·σ_t²), averaged over the elements.
    The latents cancel in the difference of the means. As in Flow-GRPO's code the width is σ_t,
    without dt, so that all steps weigh alike. ref_velocity is a constant.
    """
    mean = step_mean(velocity, latents, a, b)
    log_prob = log_density(next_latents.float(), mean, std)
    if ref_velocity is None:
        return log_prob, None
    gap = b * (velocity.float() - ref_velocity.detach().float())
    return log_prob, gap.square().flatten(1).mean(1) / (2 * sigma_t**2)


@dataclass
class SDEStep:
    next_latents: torch.Tensor  # [B,C,h,w] float32, without gradient
    log_prob: torch.Tensor  # [B]: log density of next_latents, averaged over their elements
    kl: torch.Tensor | None  # [B]: to the reference's step, if there is one
    std: float  # σ_t·√(−dt), of the noise of this step
    sigma_t: float  # of the noise per unit of σ
    terms: tuple  # (velocity, latents, a, b) of the mean

    @property
    def mean(self):  # [B,C,h,w] float32, made when asked for: log_prob and kl do without it
        return step_mean(*self.terms)


def sde_step(velocity, latents, sigma, sigma_next, noise_level, next_latents=None, generator=None,
             ref_velocity=None):
    """The SDEStep from `sigma` to `sigma_next`, 0 ≤ sigma_next < sigma ≤ 1.

    All tensors [B,C,h,w]. Without next_latents a step is drawn; with them that step is evaluated,
    by the same arithmetic, and with ref_velocity its KL to the reference's step is given.
    generator: one for all rows, or a list of one for each. mean, log_prob and kl are float32 and
    differentiable in the velocity; the step taken is a constant to them. ValueError for a σ out of
    range and shapes that do not fit.
    """
    check_shapes(latents, velocity=velocity, next_latents=next_latents, ref_velocity=ref_velocity)
    velocity = velocity.float()
    latents = latents.float()
    a, b, std, sigma_t = step_numbers(float(sigma), float(sigma_next), noise_level)
    terms = velocity, latents, a, b
    if next_latents is None:
        noise = draw_noise(latents, generator)
        next_latents, log_prob = sde_draw(velocity, latents, noise, a, b, std)
        return SDEStep(next_latents, log_prob, None, std, sigma_t, terms)
    after = next_latents.detach().float()
    log_prob, kl = sde_log_prob(velocity, latents, after, a, b, std, ref_velocity, sigma_t)
    return SDEStep(after, log_prob, kl, std, sigma_t, terms)


def check_shapes(like, **tensors):
    """ValueError unless every tensor, where there is one, has the shape of `like`."""
    for name, x in tensors.items():
        if x is not None and x.shape != like.shape:
            raise ValueError(f"{name} must have the shape {list(like.shape)}, got {list(x.shape)}")


def draw_noise(like, generator):
    """Standard normal noise like a tensor [B,…], from a CPU's generator the same on any device."""
    if isinstance(generator, list | tuple):
        rows = zip(like, generator, strict=True)  # ValueError unless there is one for each
        return torch.stack([draw_noise(row, own) for row, own in rows])
    device = like.device if generator is None else generator.device
    return torch.randn(like.shape, generator=generator, device=device).to(like.device)


@dataclass(frozen=True)
class SDESettings:
    num_steps: int = 10  # T
    guidance: float = 4.5
    shift: float = 3.0  # of the noise schedule
    noise_level: float = 0.7
    stochastic: range = range(10)  # which of the T steps are; the others are Euler steps
    trained: range = range(9)  # and which of these are kept; not the last, as in Flow-GRPO's code
    detach: bool = True  # the unconditional half of guidance, as there
    branch: int = 1  # rows in turn that share a start: drawn as one until the first stochastic step


@dataclass
class KeptStep:
    index: int  # of the T steps
    before: torch.Tensor  # [B,C,h,w] float32
    after: torch.Tensor  # [B,C,h,w]; the same memory as the next step's `before`
    log_prob: torch.Tensor  # [B]: under the model that drew it


@dataclass
class Trajectory:
    latents: torch.Tensor  # [B,C,h,w] float32: the end, scaled latents to decode
    steps: list[KeptStep]  # the stochastic ones that are trained, in order
    sigmas: torch.Tensor  # [T+1], on the CPU
    settings: SDESettings


@torch.no_grad()
def sample_sde(model, latents, context, pooled, settings, generator=None, progress=iter):
    """The Trajectory from noise [B,C,h,w]. generator: as in `sde_step`. context, pooled, progress:
    as in `sample_ode`."""
    sigmas = sigma_schedule(settings.num_steps, settings.shift)
    x = latents.float()[::settings.branch]
    texts = [every(settings.branch, text, len(latents)) for text in (context, pooled)]
    kept = []
    for i in progress(range(settings.num_steps)):
        if i == settings.stochastic.start:  # from here on every row is a picture of its own
            x = x.repeat_interleave(settings.branch, dim=0)
            texts = context, pooled
        velocity = guided_velocity(
            model, x, sigmas[i], *texts, settings.guidance, settings.detach)
        if i in settings.stochastic:
            step = sde_step(velocity, x, sigmas[i], sigmas[i + 1], settings.noise_level,
                            generator=generator)
            if i in settings.trained:
                kept.append(KeptStep(i, x, step.next_latents, step.log_prob))
            x = step.next_latents
        else:
            x = x + (sigmas[i + 1] - sigmas[i]) * velocity
    return Trajectory(x, kept, sigmas, settings)


def every(branch, text, rows):
    """Every branch-th row of text [rows,…], or of each half of [2·rows,…]."""
    return torch.cat([half[::branch] for half in text.split(rows)])


def evaluate_step(model, trajectory, k, context, pooled, ref_velocity=None):
    """The SDEStep that was kept k-th, under the model as it is now, with gradients.

    The arithmetic is that of `sample_sde`: before any update and in the same batch, log_prob equals
    the kept one bit for bit. ref_velocity: `kept_velocity` of the reference, for the KL.
    """
    kept = trajectory.steps[k]
    sigma, sigma_next = trajectory.sigmas[kept.index:kept.index + 2]
    velocity = kept_velocity(model, trajectory, k, context, pooled)
    return sde_step(velocity, kept.before, sigma, sigma_next, trajectory.settings.noise_level,
                    kept.after, ref_velocity=ref_velocity)


def kept_velocity(model, trajectory, k, context, pooled):
    """The guided velocity [B,C,h,w] before the step that was kept k-th, under the model now."""
    kept = trajectory.steps[k]
    sigma = trajectory.sigmas[kept.index]
    settings = trajectory.settings
    return guided_velocity(
        model, kept.before, sigma, context, pooled, settings.guidance, settings.detach)


def flow_grpo_loss(log_prob, old_log_prob, advantages, kl, clip=1e-4, beta=0.1, normalizer=None,
                   advantage_clip=5.0):
    """(loss, metrics) of Flow-GRPO at one step of B trajectories: clipped surrogate + beta·KL.

    log_prob, old_log_prob [B]: of the step under the model that trains and the one that drew it.
    advantages [B]: of the picture at its end, cut to ±advantage_clip. kl [B]: SDEStep.kl, or None
    if beta is 0. Only log_prob and kl are differentiated. Rows are summed and divided by
    `normalizer` (default B): give the rows × steps of this process's batch, and the losses of its
    parts add up to the batch's. metrics, detached: means of ratio, clip_fraction (where the clip
    takes the gradient away) and kl; greatest |ratio − 1|.
    """
    if kl is None and beta != 0:
        raise ValueError(f"beta is {beta}, so the KL is needed: give ref_velocity to the step")
    check_shapes(log_prob, old_log_prob=old_log_prob, advantages=advantages, kl=kl)
    wide = torch.promote_types(log_prob.dtype, torch.float32)
    A = advantages.detach().to(wide).clamp(-advantage_clip, advantage_clip)
    ratio = (log_prob.to(wide) - old_log_prob.detach().to(wide)).exp()
    per_row = -torch.minimum(ratio * A, ratio.clamp(1 - clip, 1 + clip) * A)
    if beta != 0:
        per_row = per_row + beta * kl
    loss = per_row.sum() / (len(log_prob) if normalizer is None else normalizer)
    # The gradient is gone where the clipped term is the smaller of the two.
    r = ratio.detach()
    clipped = torch.where(A > 0, r > 1 + clip, r < 1 - clip) & (A != 0)
    metrics = {"ratio": r.mean(), "ratio_max_deviation": (r - 1).abs().max(),
               "clip_fraction": clipped.to(wide).mean()}
    if kl is not None:
        metrics["kl"] = kl.detach().mean()
    return loss, metrics


# --------------------------------------------------------------------------------------------------
# Finite differences instead of log-probabilities


def towards_better(latents, advantages, group):
    """The direction [N,C,h,w] in which the pictures of each group get better: the mean of advantage
    × (latent − mean latent of the group).

    latents [N,C,h,w]: the ends of trajectories that differ by their stochastic steps only, groups
    of `group` in turn; advantages [N].
    """
    x = latents.unflatten(0, (-1, group))  # [N/group,group,C,h,w]
    A = advantages.view(-1, group, 1, 1, 1)
    direction = (A * (x - x.mean(dim=1, keepdim=True))).mean(dim=1)
    return direction.repeat_interleave(group, dim=0)


def difference_loss(velocity, direction, ref_velocity=None, beta=0.1, normalizer=None):
    """(loss, metrics) that pulls the ends x₀ = x_σ − σ·v of B trajectories along a direction.

    After FDFO (McAllister et al. 2026), which takes pairs where this takes groups: the mean over a
    latent of v·direction, all [B,C,h,w], and beta times that of (v − ref_velocity)². A smaller
    v·direction moves x₀ along the direction; σ is left out, so that all steps weigh alike. Only
    velocity is differentiated. normalizer: as in `flow_grpo_loss`. metrics: "kl", the mean squared
    gap of the velocities, on another scale than flow_grpo_loss's.
    """
    check_shapes(velocity, direction=direction, ref_velocity=ref_velocity)
    per_row = (velocity * direction.detach()).flatten(1).mean(1)
    metrics = {}
    if ref_velocity is not None:
        kl = (velocity - ref_velocity.detach()).square().flatten(1).mean(1)
        per_row = per_row + beta * kl
        metrics["kl"] = kl.detach().mean()
    return per_row.sum() / (len(velocity) if normalizer is None else normalizer), metrics
