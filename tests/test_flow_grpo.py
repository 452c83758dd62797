"""The schedule against diffusers' scheduler, the samplers on flows whose end is known, and the stochastic steps, their
probabilities and the loss against the equations written out in float64."""

import itertools
import math

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

import flow_grpo
import mmdit


def sample_sde(model, latents, context, pooled, num_steps=10, guidance=4.5, shift=3.0, noise_level=0.7, trained=None,
               generator=None, progress=iter, detach=False):
    """flow_grpo.sample_sde with its settings one by one; all steps are trained, or those of a range alone stochastic."""
    steps = range(num_steps) if trained is None else trained
    settings = flow_grpo.SDESettings(num_steps, guidance, shift, noise_level, steps, steps, detach)
    return flow_grpo.sample_sde(model, latents, context, pooled, settings, generator, progress)


def kl_of(mean, ref_mean, sigma_t):
    """(mean − ref_mean)²/(2σ_t²), averaged over the elements of each row."""
    return (mean.double() - ref_mean.double()).square().flatten(1).mean(1) / (2 * sigma_t**2)


def loss_of(log_prob, old, advantages, mean, ref_mean, sigma_t, *args, **more):
    """flow_grpo.flow_grpo_loss of the means of a step under the model and the reference."""
    kl = None if ref_mean is None else kl_of(mean, ref_mean.detach(), sigma_t)
    return flow_grpo.flow_grpo_loss(log_prob, old, advantages, kl, *args, **more)


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


def test_the_noise_level_may_be_a_plain_number():
    seen = []

    def model(x, timestep, context, pooled):
        seen.append(timestep)
        return x

    for sigma in (0.3, torch.tensor(0.3)):
        flow_grpo.guided_velocity(model, torch.zeros(2, 1, 1, 1), sigma, torch.zeros(2, 1, 1), torch.zeros(2, 1), 1.0)
    assert torch.equal(*seen) and seen[0].shape == (2,)


# ---------------------------------------------------------------------------------------------------------------------
# One stochastic step


def equations(velocity, latents, sigma, sigma_next, noise_level, after):
    """(mean, std, log_prob, σ_t) in float64, element by element from the specification; no code shared with the module."""
    sigma, sigma_next = float(sigma), float(sigma_next)
    dt = sigma_next - sigma
    sigma_t = noise_level * (sigma / (1 - (sigma_next if sigma == 1.0 else sigma))) ** 0.5
    std = sigma_t * (-dt) ** 0.5
    x, v, after = latents.double(), velocity.double(), after.double()
    mean = x * (1 + sigma_t**2 / (2 * sigma) * dt) + v * (1 + sigma_t**2 * (1 - sigma) / (2 * sigma)) * dt
    density = torch.distributions.Normal(mean, std).log_prob(after)
    return mean, std, torch.stack([row.mean() for row in density]), sigma_t


def drawn(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("noise_level", [0.7, 0.4, 1.5])
@pytest.mark.parametrize("steps", [10, 25])
def test_every_step_equals_the_equations(steps, noise_level):
    sigmas = flow_grpo.sigma_schedule(steps)
    for i in range(steps):  # the first is at σ = 1, the last ends at 0
        latents, velocity = drawn(i, 3, 16, 8, 8), drawn(i + 100, 3, 16, 8, 8)
        step = flow_grpo.sde_step(velocity, latents, sigmas[i], sigmas[i + 1], noise_level,
                                  generator=torch.Generator().manual_seed(i + 200))
        mean, std, log_prob, sigma_t = equations(velocity, latents, sigmas[i], sigmas[i + 1], noise_level, step.next_latents)
        assert (step.mean - mean).abs().max() < 1e-6 * mean.abs().max()
        assert step.std == pytest.approx(std, rel=1e-6) and step.sigma_t == pytest.approx(sigma_t, rel=1e-6)
        assert ((step.log_prob - log_prob).abs() < 1e-6 * log_prob.abs().clamp(min=1)).all(), i
        noise = (step.next_latents.double() - mean) / std
        assert (noise - drawn(i + 200, 3, 16, 8, 8)).abs().max() < 1e-6 * mean.abs().max() / std + 1e-5
        assert step.log_prob.shape == (3,) and step.log_prob.dtype == torch.float32


@given(st.integers(0, 2**31), st.floats(0.02, 1), st.floats(0, 0.95), st.floats(0.1, 2),
       st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 5), st.integers(1, 5)))
def test_any_step_equals_the_equations(seed, sigma, fraction, noise_level, shape):
    latents, velocity, after = drawn(seed, *shape), drawn(seed + 1, *shape), drawn(seed + 2, *shape)
    step = flow_grpo.sde_step(velocity, latents, sigma, sigma * fraction, noise_level, after)
    mean, std, log_prob, sigma_t = equations(velocity, latents, sigma, sigma * fraction, noise_level, after)
    assert torch.equal(step.next_latents, after)
    rounding = 1e-6 * (1 + mean.abs().max())  # of the mean; where the step is narrow, many deviations
    assert (step.mean - mean).abs().max() <= rounding
    assert step.std == pytest.approx(std) and step.sigma_t == pytest.approx(sigma_t)
    moved = ((after.double() - mean) / std).abs().flatten(1).mean(1) * rounding / std
    assert ((step.log_prob - log_prob).abs() <= 1e-5 * (1 + log_prob.abs()) + moved).all()


def test_a_drawn_step_evaluates_to_the_same_bits():
    latents, velocity = drawn(0, 2, 16, 8, 8), drawn(1, 2, 16, 8, 8)
    first = flow_grpo.sde_step(velocity, latents, 0.5, 0.4, 0.7)
    again = flow_grpo.sde_step(velocity, latents, torch.tensor(0.5), torch.tensor(0.4, dtype=torch.float64), 0.7,
                               first.next_latents)
    assert torch.equal(first.log_prob, again.log_prob) and torch.equal(first.mean, again.mean)
    assert (first.std, first.sigma_t) == (again.std, again.sigma_t)


def test_the_gradient_takes_the_step_as_given():
    """d log_prob/d velocity = (next − mean)/std² · d mean/d velocity, averaged; it would be 0 if the step moved along."""
    latents = drawn(0, 2, 3, 4, 4)
    for after in (None, drawn(2, 2, 3, 4, 4)):
        velocity = drawn(1, 2, 3, 4, 4).requires_grad_()
        step = flow_grpo.sde_step(velocity, latents, 0.6, 0.45, 0.7, after)
        (gradient,) = torch.autograd.grad(step.log_prob.sum(), velocity)
        sigma_t = 0.7 * math.sqrt(0.6 / 0.4)
        slope = (1 + sigma_t**2 * 0.4 / (2 * 0.6)) * -0.15
        expected = (step.next_latents - step.mean).detach() / step.std**2 * slope / velocity[0].numel()
        assert not step.next_latents.requires_grad
        assert torch.allclose(gradient, expected, rtol=1e-4, atol=1e-6)


def test_the_step_is_float32_whatever_the_inputs_are():
    latents, velocity = drawn(0, 2, 4, 4, 4).bfloat16(), drawn(1, 2, 4, 4, 4).bfloat16()
    step = flow_grpo.sde_step(velocity, latents, 0.5, 0.4, 0.7, drawn(2, 2, 4, 4, 4).bfloat16())
    assert {x.dtype for x in (step.next_latents, step.log_prob, step.mean)} == {torch.float32}
    mean = equations(velocity, latents, 0.5, 0.4, 0.7, step.next_latents)[0]
    assert (step.mean - mean).abs().max() < 1e-5


def generators(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def test_a_row_with_its_own_generator_does_not_see_the_others():
    latents, velocity = drawn(0, 3, 4, 4, 4), drawn(1, 3, 4, 4, 4)
    step = flow_grpo.sde_step(velocity, latents, 0.5, 0.4, 0.7, generator=generators(5, 6, 7))
    for row, seed in enumerate((5, 6, 7)):
        alone = flow_grpo.sde_step(velocity[row, None], latents[row, None], 0.5, 0.4, 0.7, generator=generators(seed))
        assert torch.equal(alone.next_latents[0], step.next_latents[row])
        assert torch.allclose(alone.log_prob[0], step.log_prob[row], rtol=1e-6)
        single = flow_grpo.sde_step(velocity[row, None], latents[row, None], 0.5, 0.4, 0.7, generator=generators(seed)[0])
        assert torch.equal(single.next_latents, alone.next_latents)


def test_noise_comes_from_the_generator_alone():
    x = torch.zeros(2, 4, 4, 4)
    draws = [flow_grpo.sde_step(x, x, 0.5, 0.4, 0.7, generator=one).next_latents for one in generators(1, 1, 2)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    assert not torch.equal(draws[0][0], draws[0][1])


@pytest.mark.parametrize("change, match", [
    ({"noise_level": 0.0}, "sample_ode"), ({"noise_level": -0.7}, "above 0"), ({"noise_level": math.nan}, "above 0"),
    ({"noise_level": math.inf}, "above 0"), ({"sigma_next": 0.5}, "goes down"), ({"sigma_next": 0.6}, "goes down"),
    ({"sigma": 1.01}, "0..1"), ({"sigma_next": -0.1}, "0..1"), ({"sigma": math.nan}, "0..1"),
    ({"velocity": torch.zeros(2, 3, 2, 1)}, "velocity must"),
    ({"next_latents": torch.zeros(1, 3, 2, 2)}, "next_latents must"),
    ({"next_latents": torch.zeros(2, 3, 2, 2), "ref_velocity": torch.zeros(2, 1, 2, 2)}, "ref_velocity must"),
    ({"generator": generators(1)}, "shorter"), ({"generator": generators(1, 2, 3)}, "longer")])
def test_steps_that_do_not_exist_are_refused(change, match):
    x = torch.zeros(2, 3, 2, 2)
    good = {"velocity": x, "latents": x, "sigma": 0.5, "sigma_next": 0.4, "noise_level": 0.7}
    flow_grpo.sde_step(**good)
    with pytest.raises(ValueError, match=match):
        flow_grpo.sde_step(**good | change)


# ---------------------------------------------------------------------------------------------------------------------
# Distributions: the data are N(M, S²) in one dimension, whose velocity is known

M, S = 1.5, 0.6


def variance_at(sigma):
    return (1 - sigma) ** 2 * S**2 + sigma**2


def exact_velocity(x, sigma):
    """E[ε − x₀ | x_σ = x]: both conditional means are linear in what x differs from its own mean."""
    surprise = (x - (1 - sigma) * M) / variance_at(sigma)
    return sigma * surprise - (M + (1 - sigma) * S**2 * surprise)


def gaussian_model(x, timestep, context, pooled):
    return exact_velocity(x, timestep.view(-1, 1, 1, 1) / 1000)


def variance_errors(steps):
    """Relative error of the variance after each step, without sampling: a step is linear, so two points give its line."""
    sigmas, mean, variance, errors = flow_grpo.sigma_schedule(steps), 0.0, 1.0, []
    points = torch.tensor([0.0, 1.0]).view(2, 1, 1, 1)
    for sigma, sigma_next in itertools.pairwise(sigmas):
        step = flow_grpo.sde_step(exact_velocity(points, sigma), points, sigma, sigma_next, 0.7, points)
        zero, one = step.mean.flatten().tolist()
        mean, variance = zero + (one - zero) * mean, (one - zero) ** 2 * variance + step.std**2
        assert mean == pytest.approx((1 - sigma_next.item()) * M, abs=1e-3)
        errors.append(abs(variance / variance_at(sigma_next.item()) - 1))
    return torch.tensor(errors), sigmas[1:]


def test_the_marginals_become_exact_as_steps_get_finer():
    ends, inner = [], []
    for steps in (50, 200, 800):
        errors, sigmas = variance_errors(steps)
        ends.append(errors[-1].item())
        inner.append(errors[(sigmas > 0.1) & (sigmas < 0.8)].max().item())
    assert ends[0] > 3 * ends[1] > 9 * ends[2] and ends[2] < 2e-3  # first order
    assert inner[0] > 1.9 * inner[1] > 3.6 * inner[2] and inner[2] < 0.01  # σ = 1, where σ_t is cut, heals like 1/√T


def assert_marginal(x, sigma):
    """Mean and variance of x at noise level σ, within four standard errors."""
    variance, n = variance_at(sigma), x.numel()
    assert abs(x.double().mean().item() - (1 - sigma) * M) < 4 * math.sqrt(variance / n)
    assert abs(x.double().var().item() / variance - 1) < 4 * math.sqrt(2 / n)


def test_stochastic_and_deterministic_samples_have_the_marginals_of_the_data():
    n, steps = 100_000, 800
    sigmas, generator = flow_grpo.sigma_schedule(steps), torch.Generator().manual_seed(0)
    noise = torch.randn(n, 1, 1, 1, generator=generator)
    x, log_density, checked = noise, [], [int((sigmas > level).sum()) for level in (0.75, 0.5, 0.25, 0.0)]
    for i in range(steps):
        step = flow_grpo.sde_step(exact_velocity(x, sigmas[i]), x, sigmas[i], sigmas[i + 1], 0.7, generator=generator)
        x = step.next_latents
        if i + 1 in checked:
            assert_marginal(x, sigmas[i + 1].item())
            log_density.append(step.log_prob.mean().item() + math.log(step.std))
    assert sigmas[checked[-1]] == 0 and len(log_density) == 4
    for value in log_density:  # minus the entropy of a standard normal: the noise is as likely as it should be
        assert value == pytest.approx(-0.5 * math.log(2 * math.pi * math.e), abs=0.01)
    end = flow_grpo.sample_ode(gaussian_model, noise, torch.zeros(n, 1, 1), torch.zeros(n, 1), steps, guidance=1.0)
    assert_marginal(end, 0.0)
    assert torch.corrcoef(torch.stack([noise.flatten(), end.flatten()]))[0, 1] > 0.999  # the ODE keeps its noise,
    assert torch.corrcoef(torch.stack([noise.flatten(), x.flatten()]))[0, 1] < 0.5  # the SDE forgets it


# ---------------------------------------------------------------------------------------------------------------------
# Trajectories

SMALL = mmdit.MMDiTConfig(depth=2, heads=2, head_dim=16, dual_blocks=(0,), channels=4, context_dim=12, pooled_dim=8,
                          positions=8, sample_size=8)


def small_model(dtype=torch.float32):
    model = mmdit.MMDiT(SMALL)
    for i, tensor in enumerate([*model.parameters(), *model.buffers()]):
        tensor.data.copy_(drawn(i, *tensor.shape) * 0.2 + 0.2 * (tensor.dim() == 1))
    return model.to(dtype)


def small_inputs(guidance, rows=2, dtype=torch.float32):
    texts = 2 * rows if guidance > 1 else rows
    return drawn(50, rows, 4, 4, 8), drawn(51, texts, 5, 12).to(dtype), drawn(52, texts, 8).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("trained", [range(6), range(2), range(3, 4), range(4, 6)])
@pytest.mark.parametrize("guidance", [4.5, 1.0])
def test_kept_steps_evaluate_to_the_same_bits_before_an_update(guidance, trained, dtype):
    model, (latents, context, pooled) = small_model(dtype), small_inputs(guidance, dtype=dtype)
    trajectory = sample_sde(model, latents, context, pooled, 6, guidance, 2.0, 0.9, trained)
    assert [kept.index for kept in trajectory.steps] == list(trained)
    for k, kept in enumerate(trajectory.steps):
        step = flow_grpo.evaluate_step(model, trajectory, k, context, pooled)
        assert step.log_prob.requires_grad and not kept.log_prob.requires_grad
        assert torch.equal(step.log_prob, kept.log_prob) and torch.equal(step.next_latents, kept.after)
        A = torch.tensor([1.0, -1.0])
        _, metrics = loss_of(step.log_prob, kept.log_prob, A, step.mean, step.mean, step.sigma_t)
        assert metrics["ratio_max_deviation"] == 0 and metrics["kl"] == 0


def test_a_kept_step_starts_where_the_one_before_ended():
    latents, context, pooled = small_inputs(1.0)
    trajectory = sample_sde(small_model(), latents, context, pooled, 4, 1.0)
    assert torch.equal(trajectory.steps[0].before, latents) and trajectory.steps[-1].after is trajectory.latents
    assert all(a.after is b.before for a, b in itertools.pairwise(trajectory.steps))
    assert torch.equal(trajectory.sigmas, flow_grpo.sigma_schedule(4))


def test_gradients_of_a_step_reach_the_model_and_both_halves_of_the_guidance():
    model, (latents, context, pooled) = small_model(), small_inputs(4.5)
    trajectory = sample_sde(model, latents, context, pooled, 3, 4.5)
    context = context.requires_grad_()
    flow_grpo.evaluate_step(model, trajectory, 1, context, pooled).log_prob[0].backward()
    reached = context.grad.flatten(1).abs().sum(1) > 0
    assert reached.tolist() == [True, False, True, False]  # row 0 in both halves, row 1 in none
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.final_layer.parameters())


@pytest.mark.parametrize("guidance", [4.5, 1.0])
def test_a_trajectory_does_not_depend_on_the_rows_beside_it(guidance):
    model, (latents, context, pooled) = small_model(), small_inputs(guidance, rows=3)
    whole = sample_sde(model, latents, context, pooled, 4, guidance, generator=generators(1, 2, 3))
    rows = [1, 4] if guidance > 1 else [1]
    alone = sample_sde(model, latents[1:2], context[rows], pooled[rows], 4, guidance, generator=generators(2))
    assert torch.allclose(whole.latents[1], alone.latents[0], rtol=1e-4, atol=1e-4)  # matrix products round by batch size
    for a, b in zip(whole.steps, alone.steps, strict=True):
        assert torch.allclose(a.log_prob[1], b.log_prob[0], atol=1e-5)


def test_rows_of_an_elementwise_flow_are_the_same_bits_alone():
    noise, zeros = drawn(0, 3, 2, 3, 3), torch.zeros(3, 1, 1)
    whole = sample_sde(gaussian_model, noise, zeros, zeros, 5, 1.0, generator=generators(1, 2, 3))
    alone = sample_sde(gaussian_model, noise[2:], zeros[2:], zeros[2:], 5, 1.0, generator=generators(3))
    assert torch.equal(whole.latents[2:], alone.latents)


@pytest.mark.parametrize("guidance", [4.5, 1.0])
@pytest.mark.parametrize("start", [0, 3, 7])
def test_an_empty_window_is_the_deterministic_sampler(start, guidance):
    model, (latents, context, pooled) = small_model(), small_inputs(guidance)
    trajectory = sample_sde(model, latents, context, pooled, 7, guidance, trained=range(start, start), noise_level=0.0)
    expected = flow_grpo.sample_ode(model, latents, context, pooled, 7, guidance)
    assert trajectory.steps == [] and torch.equal(trajectory.latents, expected)


def test_a_detached_half_of_guidance_has_the_same_velocity_and_no_gradient():
    torch.manual_seed(0)
    weight = torch.randn(2, dtype=torch.float64, requires_grad=True)

    def model(x, timestep, context, pooled):  # unconditional rows have context 0 and see the first weight only
        return x.double() * (weight[0] + weight[1] * context.mean((1, 2))[:, None, None, None])

    latents, context, pooled = torch.randn(2, 1, 2, 2), torch.tensor([0.0, 0, 1, 1]).view(4, 1, 1), torch.zeros(4, 1)
    gradients = []
    for detach in (False, True):
        velocity = flow_grpo.guided_velocity(model, latents, 0.5, context, pooled, 4.5, detach)
        torch.testing.assert_close(velocity, latents * (weight[0] + 4.5 * weight[1]), check_dtype=False)
        gradients.append(torch.autograd.grad(velocity.sum(), weight)[0] / latents.double().sum())
    torch.testing.assert_close(gradients[0], torch.tensor([1.0, 4.5], dtype=torch.float64), rtol=1e-5, atol=0)
    torch.testing.assert_close(gradients[1], torch.tensor([4.5, 4.5], dtype=torch.float64), rtol=1e-5, atol=0)


@pytest.mark.parametrize("detach", [False, True])
def test_the_ratio_is_exactly_one_with_either_gradient_of_guidance(detach):
    model, (latents, context, pooled) = small_model(), small_inputs(4.5)
    trajectory = sample_sde(model, latents, context, pooled, 3, detach=detach)
    for k, kept in enumerate(trajectory.steps):
        assert torch.equal(flow_grpo.evaluate_step(model, trajectory, k, context, pooled).log_prob, kept.log_prob)


def test_steps_outside_the_window_are_deterministic():
    noise, zeros = drawn(0, 2, 1, 2, 2), torch.zeros(2, 1, 1)
    sigmas = flow_grpo.sigma_schedule(6)
    trajectory = sample_sde(gaussian_model, noise, zeros, zeros, 6, 1.0, trained=range(2, 4))

    def euler(x, steps):
        for i in steps:
            x = x + (sigmas[i + 1] - sigmas[i]) * gaussian_model(x, (sigmas[i] * 1000).expand(2), None, None)
        return x

    assert torch.equal(trajectory.steps[0].before, euler(noise, (0, 1)))
    assert torch.equal(trajectory.latents, euler(trajectory.steps[1].after, (4, 5)))
    assert not torch.allclose(trajectory.steps[1].after, euler(trajectory.steps[0].before, (2, 3)))


def test_every_step_is_reported_and_the_shift_moves_the_schedule():
    noise, zeros, seen = drawn(0, 1, 1, 2, 2), torch.zeros(1, 1, 1), []

    def progress(steps):
        for i in steps:
            seen.append(i)
            yield i

    trajectory = sample_sde(gaussian_model, noise, zeros, zeros, 5, 1.0, shift=1.5, progress=progress)
    assert seen == [0, 1, 2, 3, 4] and torch.equal(trajectory.sigmas, flow_grpo.sigma_schedule(5, 1.5))


def test_a_trajectory_without_noise_is_refused():
    zeros = torch.zeros(1, 1, 1, 1)
    with pytest.raises(ValueError, match="sample_ode"):
        sample_sde(gaussian_model, zeros, zeros, zeros, 5, 1.0, noise_level=0)


# ---------------------------------------------------------------------------------------------------------------------
# The KL and the loss


def test_the_kl_is_that_of_the_step_without_its_time():
    mean, ref_mean = drawn(0, 3, 4, 2, 2), drawn(1, 3, 4, 2, 2)
    step = flow_grpo.sde_step(mean, mean, 0.5, 0.4, 0.7)
    kl = torch.distributions.kl_divergence(torch.distributions.Normal(mean.double(), step.std),
                                           torch.distributions.Normal(ref_mean.double(), step.std))
    ours = kl_of(mean, ref_mean, step.sigma_t)
    assert torch.allclose(ours, kl.mean((1, 2, 3)) * (0.5 - 0.4), rtol=1e-5)


def test_the_kl_of_an_evaluated_step_is_that_of_its_means_and_their_gradient():
    velocity, ref, latents, after = (drawn(i, 3, 4, 2, 2) for i in range(4))
    velocity.requires_grad_()
    step = flow_grpo.sde_step(velocity, latents, 0.5, 0.4, 0.7, after, ref_velocity=ref.clone().requires_grad_())
    ref_mean = flow_grpo.sde_step(ref, latents, 0.5, 0.4, 0.7, after).mean
    kl = kl_of(step.mean, ref_mean, step.sigma_t)
    torch.testing.assert_close(step.kl.double(), kl, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(*(torch.autograd.grad(x.sum(), velocity, retain_graph=True)[0] for x in (step.kl, kl)),
                               rtol=1e-4, atol=1e-7)


def loss_inputs(seed, rows=6, spread=0.1):
    """log_prob, old_log_prob, advantages, mean, ref_mean in float64; some advantages beyond ±5 and some 0."""
    old = drawn(seed, rows).double()
    advantages = drawn(seed + 2, rows).double() * 4
    advantages[::5] = 0
    return (old + drawn(seed + 1, rows).double() * spread, old, advantages,
            drawn(seed + 3, rows, 2, 3, 3).double(), drawn(seed + 4, rows, 2, 3, 3).double())


def loop(log_prob, old_log_prob, advantages, mean, ref_mean, sigma_t, clip, beta, normalizer):
    """(loss, metrics) row by row in Python numbers."""
    total, ratios, clipped, kls = 0.0, [], 0, []
    for row in range(len(log_prob)):
        A = max(-5.0, min(5.0, advantages[row].item()))
        ratio = math.exp(log_prob[row].item() - old_log_prob[row].item())
        inside = max(1 - clip, min(1 + clip, ratio))
        clipped += inside * A < ratio * A
        differences = (mean[row] - ref_mean[row]).flatten().tolist()
        kls.append(sum(d * d for d in differences) / len(differences) / (2 * sigma_t * sigma_t))
        total += -min(ratio * A, inside * A) + beta * kls[-1]
        ratios.append(ratio)
    B = len(log_prob)
    return total / normalizer, {"ratio": sum(ratios) / B, "ratio_max_deviation": max(abs(r - 1) for r in ratios),
                                "clip_fraction": clipped / B, "kl": sum(kls) / B}


@given(st.integers(0, 10_000), st.integers(1, 9), st.sampled_from([1e-4, 0.05, 0.2]), st.sampled_from([0.0, 0.1, 2.0]),
       st.floats(0.05, 5), st.one_of(st.none(), st.integers(1, 300)))
def test_the_loss_and_its_metrics_equal_the_equations_written_out(seed, rows, clip, beta, sigma_t, normalizer):
    inputs = loss_inputs(seed, rows)
    loss, metrics = loss_of(*inputs, sigma_t, clip, beta, normalizer)
    expected, expected_metrics = loop(*inputs, sigma_t, clip, beta, normalizer or rows)
    assert loss.item() == pytest.approx(expected, rel=1e-10, abs=1e-12)
    assert {name: x.item() for name, x in metrics.items()} == pytest.approx(expected_metrics, rel=1e-10, abs=1e-12)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000))
def test_the_loss_passes_gradcheck(seed):
    log_prob, old, advantages, mean, ref_mean = loss_inputs(seed)
    assert torch.autograd.gradcheck(
        lambda p, m: loss_of(p, old, advantages, m, ref_mean, 0.9, 0.05, 0.1)[0],
        (log_prob.requires_grad_(), mean.requires_grad_()))


def test_at_ratio_one_the_gradient_is_the_policy_gradient():
    _, old, advantages, mean, _ = loss_inputs(0)
    advantages[1] = 7.0
    log_prob = old.clone().requires_grad_()
    loss, metrics = loss_of(log_prob, old, advantages, mean, None, 0.7, beta=0)
    loss.backward()
    assert torch.allclose(log_prob.grad, -advantages.clamp(-5, 5) / 6, rtol=1e-12)
    assert log_prob.grad[1].item() == pytest.approx(-5 / 6)
    assert metrics["ratio"] == 1 and metrics["clip_fraction"] == 0 and "kl" not in metrics


def test_clipped_rows_get_no_gradient_from_the_surrogate_and_the_others_do():
    old, advantages = torch.zeros(6), torch.tensor([1.0, 1.0, -1.0, -1.0, 1.0, 0.0])
    log_prob = torch.tensor([1e-3, -1e-3, 1e-3, -1e-3, 5e-5, 1e-3]).requires_grad_()  # the clip is at 1e-4
    mean, ref_mean = drawn(0, 6, 1, 2, 2).requires_grad_(), drawn(1, 6, 1, 2, 2)
    loss, metrics = loss_of(log_prob, old, advantages, mean, ref_mean, 0.7)
    loss.backward()
    assert (log_prob.grad != 0).tolist() == [False, True, True, False, True, False]
    assert metrics["clip_fraction"].item() == pytest.approx(2 / 6)
    assert (mean.grad != 0).all()  # the KL pulls at every row


def test_advantages_are_cut_where_they_are_told_to():
    _, old, _, mean, _ = loss_inputs(0)
    advantages = torch.tensor([9.0, -9.0, 1.0, -1.0, 5.0, 0.0])
    for limit, kept in ((5.0, [5, -5, 1, -1, 5, 0]), (0.5, [0.5, -0.5, 0.5, -0.5, 0.5, 0]), (100.0, advantages.tolist())):
        log_prob = old.clone().requires_grad_()
        loss_of(log_prob, old, advantages, mean, None, 0.7, beta=0, normalizer=1,
                                 advantage_clip=limit)[0].backward()
        assert (-log_prob.grad).tolist() == pytest.approx(kept)


def test_parts_of_a_batch_add_up_to_the_whole():
    inputs = loss_inputs(3, rows=12)
    log_prob, mean = inputs[0].requires_grad_(), inputs[3].requires_grad_()
    whole = loss_of(*inputs, 0.7)[0]
    expected = torch.autograd.grad(whole, (log_prob, mean))
    total = 0
    for rows in (slice(0, 1), slice(1, 8), slice(8, 12)):
        part = loss_of(*(x[rows] for x in inputs), 0.7, normalizer=12)[0]
        part.backward()
        total += part.item()
    assert total == pytest.approx(whole.item(), rel=1e-12)
    assert torch.allclose(log_prob.grad, expected[0], rtol=1e-12) and torch.allclose(mean.grad, expected[1], rtol=1e-12)


def test_only_the_model_that_trains_is_differentiated():
    inputs = [x.requires_grad_() for x in loss_inputs(0)]
    loss, metrics = loss_of(*inputs, 0.7)
    loss.backward()
    assert [x.grad is not None for x in inputs] == [True, False, False, True, False]
    assert not any(x.requires_grad for x in metrics.values())


def test_the_kl_vanishes_without_a_difference_and_is_only_reported_at_beta_zero():
    log_prob, old, advantages, mean, ref_mean = loss_inputs(0)
    bare = loss_of(log_prob, old, advantages, mean, None, 0.7, beta=0)[0]
    same, metrics = loss_of(log_prob, old, advantages, mean, mean.clone(), 0.7, beta=0.1)
    assert same == bare and metrics["kl"] == 0
    reported, metrics = loss_of(log_prob, old, advantages, mean, ref_mean, 0.7, beta=0)
    assert reported == bare and metrics["kl"] > 0


@pytest.mark.parametrize("change, match", [
    ({"kl": None}, "beta is 0.1"), ({"old_log_prob": torch.zeros(1)}, "old_log_prob must"),
    ({"advantages": torch.zeros(2, 1)}, "advantages must"), ({"kl": torch.zeros(2, 1)}, "kl must")])
def test_inputs_of_the_loss_that_do_not_fit_are_refused(change, match):
    good = {"log_prob": torch.zeros(2), "old_log_prob": torch.zeros(2), "advantages": torch.ones(2), "kl": torch.zeros(2)}
    flow_grpo.flow_grpo_loss(**good)
    with pytest.raises(ValueError, match=match):
        flow_grpo.flow_grpo_loss(**good | change)


def test_training_by_the_loss_raises_the_reward():
    """A flow with one free number, the mean of its pictures, which are rewarded for being bright."""
    shift = torch.nn.Parameter(torch.zeros(()))
    optimizer, generator = torch.optim.Adam([shift], lr=0.05), torch.Generator().manual_seed(0)
    zeros, rewards = torch.zeros(64, 1, 1), []

    def model(x, timestep, context, pooled):
        return gaussian_model(x, timestep, context, pooled) - shift

    for step in range(20):
        noise = torch.randn(64, 1, 2, 2, generator=generator)
        trained = range(step % 5, step % 5 + 4)
        trajectory = sample_sde(model, noise, zeros, zeros, 8, 1.0, trained=trained, generator=generator)
        reward = trajectory.latents.mean((1, 2, 3))
        advantages = (reward - reward.mean()) / reward.std()
        optimizer.zero_grad()
        for k, kept in enumerate(trajectory.steps):
            now = flow_grpo.evaluate_step(model, trajectory, k, zeros, zeros)
            loss_of(now.log_prob, kept.log_prob, advantages, now.mean, None, now.sigma_t, beta=0,
                                     normalizer=64 * len(trajectory.steps))[0].backward()
        optimizer.step()
        rewards.append(reward.mean().item())
    assert shift > 0.5 and sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 0.3


# ---------------------------------------------------------------------------------------------------------------------
# Finite differences


@pytest.mark.parametrize("guidance", [1.0, 4.5])
def test_a_branched_group_is_one_picture_until_its_window(guidance):
    model, (latents, context, pooled) = small_model(), small_inputs(guidance, rows=2)
    rows = [0, 0, 0, 1, 1, 1]
    halves = 1 if guidance == 1 else 2
    texts = [torch.cat([half[rows] for half in text.chunk(halves)]) for text in (context, pooled)]
    made = {}
    for branch in (1, 3):
        settings = flow_grpo.SDESettings(5, guidance, 3.0, 0.7, range(2, 4), range(2, 4), branch=branch)
        made[branch] = flow_grpo.sample_sde(model, latents[rows], *texts, settings, generators(*range(6)))
    assert torch.allclose(made[1].latents, made[3].latents, atol=1e-5)
    before = made[3].steps[0].before
    assert torch.equal(before[0], before[2]) and torch.equal(before[3], before[5])
    assert not torch.equal(made[3].latents[0], made[3].latents[1])


def test_a_group_gets_better_along_the_slope_of_a_linear_reward():
    slope = drawn(0, 2, 3, 3)
    latents = drawn(1, 20_000, 2, 3, 3)
    advantages = (latents * slope).flatten(1).sum(1)
    direction = flow_grpo.towards_better(latents, advantages, len(latents))
    assert torch.cosine_similarity(direction[0].flatten(), slope.flatten(), dim=0) > 0.99
    assert torch.equal(direction[0], direction[-1])


def test_groups_do_not_see_each_other_and_equal_rewards_give_no_direction():
    latents, advantages = drawn(0, 6, 2, 3, 3), drawn(1, 6)
    whole = flow_grpo.towards_better(latents, advantages, 3)
    assert torch.equal(whole[3:], flow_grpo.towards_better(latents[3:], advantages[3:], 3))
    assert flow_grpo.towards_better(latents, torch.ones(6), 3).abs().max() < 1e-6


def test_the_difference_loss_pulls_the_end_along_the_direction_and_to_the_reference():
    velocity, direction, reference = (drawn(seed, 4, 2, 3, 3) for seed in range(3))
    velocity.requires_grad_()
    loss, metrics = flow_grpo.difference_loss(velocity, direction, reference, 0.5, normalizer=8)
    gap = velocity - reference
    expected = ((velocity * direction).mean((1, 2, 3)) + 0.5 * gap.square().mean((1, 2, 3))).sum() / 8
    torch.testing.assert_close(loss, expected)
    assert metrics["kl"].item() == pytest.approx(gap.square().mean().item())
    loss, _ = flow_grpo.difference_loss(velocity, direction)
    loss.backward()
    end = -0.3 * velocity  # of x₀ = x − σ·v
    moved = -0.3 * (velocity - velocity.grad)
    assert ((moved - end) * direction).sum() > 0


def test_the_direction_is_the_mean_of_advantage_times_what_a_picture_differs_by():
    latents, advantages = drawn(0, 6, 2, 3, 3), drawn(1, 6)
    direction = flow_grpo.towards_better(latents, advantages, 3)
    for rows in (slice(0, 3), slice(3, 6)):
        off = latents[rows] - latents[rows].mean(0)
        expected = sum(a * own for a, own in zip(advantages[rows], off)) / 3
        torch.testing.assert_close(direction[rows], expected.expand(3, -1, -1, -1))


def test_the_difference_loss_is_a_mean_over_the_rows_unless_told_otherwise():
    velocity, direction = drawn(0, 4, 2, 3, 3), drawn(1, 4, 2, 3, 3)
    loss, _ = flow_grpo.difference_loss(velocity, direction)
    torch.testing.assert_close(loss, (velocity * direction).mean())
