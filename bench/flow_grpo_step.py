"""A training step of Flow-GRPO against the same step from diffusers and peft: seconds, and memory.

    python -m bench.flow_grpo_step  # about five minutes on 2 idle cores, 6 GB
    python -m bench.flow_grpo_step --blocks 2 --heads 2 --latent 8 --text 5 --context 32  # seconds

Models and adapters are those of bench/mmdit_lora_step.py. A step draws a group by `--steps`
stochastic steps with guidance, takes every one again with gradients, without the adapter for the KL
too, and ends with AdamW. Ours is what train_gen.py calls of flow_grpo.py. The peer does it as
Flow-GRPO's published code does: diffusers' scheduler, transformer and peft's `disable_adapter`, the
step and the loss in plain torch. Advantages are random; there is no text encoder, judge or
autoencoder. Both draw the same noise, and after the first step losses, gradient norms and adapters
are compared; then the two take turns in one process. Memory is measured in a process of its own for
each: the resident peak of two steps less what was resident before. float32, on the CPU, which must
be idle.
"""

import argparse
import math
import sys

import diffusers
import peft
import torch

import flow_grpo
from bench import memory, mmdit_forward, mmdit_lora_step, timing
from parts import lora

# the paper's settings, as in train_gen.py
GUIDANCE = 4.5
NOISE_LEVEL = 0.7
SHIFT = 3.0
CLIP = 1e-4
ADVANTAGE_CLIP = 5.0
BETA = 0.1
LR = 3e-4
MAX_GRAD_NORM = 1.0


def make_optimizer(parameters):
    return torch.optim.AdamW(parameters, lr=LR, weight_decay=1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# From diffusers and peft. Shapes: B pictures; context [2B,L,·] and pooled [2B,·], the unconditional rows first


def peer_velocity(model, latents, timestep, context, pooled):
    timesteps = timestep.expand(2 * len(latents))
    velocity = model(torch.cat([latents, latents]), context, pooled, timesteps, return_dict=False)[0]
    unconditional, conditional = velocity.chunk(2)
    return unconditional + GUIDANCE * (conditional - unconditional)


def peer_step(velocity, latents, sigmas, i, after=None, generator=None):
    """(latents after step i, log-probability [B], mean [B,C,h,w], σ_t). after: a step taken before, to be evaluated."""
    sigma, dt = sigmas[i], sigmas[i + 1] - sigmas[i]
    sigma_t = NOISE_LEVEL * torch.sqrt(sigma / (1 - torch.where(sigma == 1, sigmas[1], sigma)))
    mean = (latents * (1 + sigma_t**2 / (2 * sigma) * dt)
            + velocity * (1 + sigma_t**2 * (1 - sigma) / (2 * sigma)) * dt)
    std = sigma_t * torch.sqrt(-dt)
    if after is None:
        after = mean + std * torch.randn(mean.shape, generator=generator)
    log_prob = -(after.detach() - mean) ** 2 / (2 * std**2) - torch.log(std) - math.log(math.sqrt(2 * math.pi))
    return after, log_prob.mean(dim=(1, 2, 3)), mean, sigma_t


def peer_training_step(model, parameters, optimizer, inputs, generator):
    """(loss, gradient norm)."""
    latents, context, pooled, advantages, num_steps = inputs
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=SHIFT)
    scheduler.set_timesteps(num_steps)
    timesteps, sigmas = scheduler.timesteps, scheduler.sigmas
    states, old_log_probs = [latents], []
    with torch.no_grad():
        for i in range(num_steps):
            velocity = peer_velocity(model, states[-1], timesteps[i], context, pooled)
            after, log_prob, _, _ = peer_step(velocity, states[-1], sigmas, i, generator=generator)
            states.append(after)
            old_log_probs.append(log_prob)
    A, total = advantages.clamp(-ADVANTAGE_CLIP, ADVANTAGE_CLIP), 0.0
    optimizer.zero_grad()
    for i in range(num_steps):
        velocity = peer_velocity(model, states[i], timesteps[i], context, pooled)
        _, log_prob, mean, sigma_t = peer_step(velocity, states[i], sigmas, i, after=states[i + 1])
        with torch.no_grad(), model.disable_adapter():
            velocity = peer_velocity(model, states[i], timesteps[i], context, pooled)
            _, _, ref_mean, _ = peer_step(velocity, states[i], sigmas, i, after=states[i + 1])
        ratio = torch.exp(log_prob - old_log_probs[i])
        policy_loss = torch.maximum(-A * ratio, -A * ratio.clamp(1 - CLIP, 1 + CLIP)).mean()
        kl = (((mean - ref_mean) ** 2).mean(dim=(1, 2, 3)) / (2 * sigma_t**2)).mean()
        loss = (policy_loss + BETA * kl) / num_steps
        loss.backward()
        total += float(loss.detach())
    norm = float(torch.nn.utils.clip_grad_norm_(parameters, MAX_GRAD_NORM))
    optimizer.step()
    return total, norm


# ---------------------------------------------------------------------------------------------------------------------
# Ours


def our_training_step(model, parameters, optimizer, inputs, generator):
    """(loss, gradient norm)."""
    latents, context, pooled, advantages, num_steps = inputs
    every = range(num_steps)
    settings = flow_grpo.SDESettings(
        num_steps, GUIDANCE, SHIFT, NOISE_LEVEL, stochastic=every, trained=every, detach=False)
    trajectory = flow_grpo.sample_sde(model, latents, context, pooled, settings, generator)
    total = 0.0
    optimizer.zero_grad()
    for k, kept in enumerate(trajectory.steps):
        with torch.no_grad(), lora.lora_disabled(model):
            reference = flow_grpo.kept_velocity(model, trajectory, k, context, pooled)
        step = flow_grpo.evaluate_step(model, trajectory, k, context, pooled, reference)
        loss, _ = flow_grpo.flow_grpo_loss(step.log_prob, kept.log_prob, advantages, step.kl, CLIP,
                                           BETA, normalizer=len(latents) * num_steps)
        loss.backward()
        total += float(loss.detach())
    norm = float(torch.nn.utils.clip_grad_norm_(parameters, MAX_GRAD_NORM))
    optimizer.step()
    return total, norm


# ---------------------------------------------------------------------------------------------------------------------
# Side by side


def steps_of(args):
    """({name: step() -> (loss, gradient norm)}, our model, theirs)."""
    ours, theirs = mmdit_lora_step.with_adapters(args)
    B, config = args.batch, ours.config
    latents = torch.randn(B, config.channels, args.latent, args.latent)
    inputs = (latents, torch.randn(2 * B, args.text, args.context), torch.randn(2 * B, config.pooled_dim), torch.randn(B),
              args.steps)

    def step_of(take_step, model):
        parameters, generator = mmdit_lora_step.trained(model), torch.Generator().manual_seed(0)
        optimizer = make_optimizer(parameters)
        return lambda: take_step(model, parameters, optimizer, inputs, generator)

    return {"theirs": step_of(peer_training_step, theirs), "ours": step_of(our_training_step, ours)}, ours, theirs


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    parser = timing.make_parser(__doc__)
    mmdit_forward.add_arguments(parser, text=154)
    parser.set_defaults(blocks=2, latent=32, batch=4)
    parser.add_argument("--steps", type=int, default=2, help="of the sampler, all trained (default: %(default)s)")
    parser.add_argument("--rank", type=int, default=32, help="of the adapter (default: %(default)s)")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    args = mmdit_forward.checked(parser, argv)
    steps, ours, theirs = steps_of(args)
    if args.memory_of:
        step = steps[args.memory_of]
        del steps, ours, theirs
        print(memory.peak(step, times=2))
        return 0
    if args.profile:
        return timing.profile(steps["ours"])
    first = {name: step() for name, step in steps.items()}
    gaps = [abs(a - b) / abs(a) for a, b in zip(*first.values(), strict=True)] + [mmdit_lora_step.adapter_gap(ours, theirs)]
    seconds = timing.in_turn(steps, args.repeats)
    used = {name: memory.in_fresh_process(__file__, argv, name) for name in steps}
    flop, rate = timing.flop_of(steps["ours"]), timing.matmul_rate()
    work = f"Flow-GRPO step, {mmdit_forward.work(args)}, {args.steps} steps, guidance {GUIDANCE}, rank {args.rank}"
    row = timing.row(work, f"diffusers {diffusers.__version__}, peft {peft.__version__}", *seconds.values(),
                     memory=used["ours"] / used["theirs"],
                     share=timing.share(flop, seconds["ours"], rate, "the matmul rate"))
    note = (f"{flop / 1e9:,.0f} GFLOP; matmul rate {rate / 1e9:,.0f} GFLOP/s. Memory beyond the weights: "
            f"{used['theirs']:,.0f} and {used['ours']:,.0f} MB. After the first step the two differ by {gaps[0]:.1e} of the "
            f"loss, {gaps[1]:.1e} of the gradient norm, {gaps[2]:.1e} of the adapter.")
    return timing.show([row], args, note, max(gaps) < 1e-3)


if __name__ == "__main__":
    sys.exit(main())
