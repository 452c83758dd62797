"""Rectified flow (Esser et al. 2024): the noise schedule and the deterministic sampler with classifier-free guidance.

A latent on the way from data x₀ to noise ε is x_σ = (1 − σ)·x₀ + σ·ε, and the MMDiT predicts the velocity ε − x₀.
Drawing a picture integrates dx/dσ = velocity from σ = 1 to σ = 0.

Shapes: B batch, C, h, w latents, L text tokens, T steps. The state is float32 whatever the model computes in.
"""

import torch

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
    """Velocity [B,C,h,w] float32 at `latents` [B,C,h,w] and noise level `sigma` (a float or 0-d tensor).

    guidance > 1: context [2B,L,·] and pooled [2B,·] hold the unconditional rows first, both halves run as one batch,
    and the result is v_uncond + guidance·(v_cond − v_uncond). Else context and pooled have B rows.
    """
    x = torch.cat([latents, latents]) if guidance > 1 else latents
    timestep = (sigma * TRAIN_STEPS).expand(len(x))
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
    sigmas = sigma_schedule(num_steps, shift).to(latents.device)
    x = latents.float()
    for i in progress(range(num_steps)):
        velocity = guided_velocity(model, x, sigmas[i], context, pooled, guidance)
        x = x + (sigmas[i + 1] - sigmas[i]) * velocity
    return x
