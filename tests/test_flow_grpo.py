"""The schedule against diffusers' scheduler, and the sampler on flows whose end is known."""

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from hypothesis import given
from hypothesis import strategies as st

import flow_grpo


@pytest.mark.parametrize("shift", [1.0, 3.0, 2.5])
def test_the_schedule_equals_diffusers_for_every_number_of_steps(shift):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    for steps in (*range(1, 61), 100, 250, 999, 1000):
        scheduler.set_timesteps(steps)
        ours = flow_grpo.sigma_schedule(steps, shift)
        assert torch.equal(ours, scheduler.sigmas), steps
        assert torch.equal(ours[:-1] * 1000, scheduler.timesteps), steps


@given(st.integers(2, 300), st.floats(1, 10))
def test_noise_levels_fall_from_one_to_zero(steps, shift):
    sigmas = flow_grpo.sigma_schedule(steps, shift)
    assert sigmas[0] == 1 and sigmas[-1] == 0 and (sigmas.diff() < 0).all()


def test_no_steps_are_refused():
    with pytest.raises(ValueError, match="at least 1"):
        flow_grpo.sigma_schedule(0)


def straight(target):
    """The velocity of straight lines into one point: (x - target)/σ."""
    return lambda x, timestep, context, pooled: (x - target) / (timestep.view(-1, 1, 1, 1) / 1000)


def test_straight_flows_end_at_their_target_whatever_the_number_of_steps():
    target, noise = torch.randn(1, 16, 4, 4), torch.randn(3, 16, 4, 4)
    for steps in (1, 4, 25):
        end = flow_grpo.sample_ode(straight(target), noise, torch.zeros(3, 1, 1), torch.zeros(3, 1), steps, guidance=1.0)
        assert (end - target).abs().max() < 1e-5


def test_guidance_goes_past_the_conditional_velocity():
    def model(x, timestep, context, pooled):
        return context.view(-1, 1, 1, 1).expand_as(x)  # the velocity is the context's only number

    context = torch.tensor([1.0, 1.0, 2.0, 5.0]).view(4, 1, 1)  # two unconditional rows, then two conditional ones
    velocity = flow_grpo.guided_velocity(model, torch.zeros(2, 16, 2, 2), torch.tensor(0.5), context, torch.zeros(4, 1), 3.0)
    assert (velocity[0] == 1 + 3 * (2 - 1)).all() and (velocity[1] == 1 + 3 * (5 - 1)).all()


def test_the_state_stays_float32_when_the_model_is_half_precision():
    seen = []

    def model(x, timestep, context, pooled):
        seen.append((x.dtype, timestep.dtype))
        return x * 0.1

    context = torch.zeros(4, 1, 1, dtype=torch.bfloat16)
    end = flow_grpo.sample_ode(model, torch.randn(2, 16, 2, 2), context, torch.zeros(4, 1), 3)
    assert end.dtype == torch.float32 and set(seen) == {(torch.bfloat16, torch.float32)}
