"""Rewards on honest and hostile answers, advantages, log-probabilities and the loss by hand."""

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import data
import feedback
import grpo
from parts.cli import UserError

GOOD = '{"valence": 7.0, "arousal": 3.0}'  # the truth in these tests is V 7, A 3, awe
CLASS = '{"emotion_class": "awe"}'


def wrap(answer, thought="warm light"):
    return f"<think>{thought}</think><answer>{answer}</answer>"


def rewards(text):
    """(format, V-A by steps, class)"""
    return grpo.format_reward(text), grpo.va_reward(text, 7, 3), grpo.class_reward(text, "awe")


# ---------------------------------------------------------------------------------------------------------------------
# Reading an answer, rewards

HONEST = {
    "both values": (wrap(GOOD), (1, 1, 0)),
    "white space everywhere": (f" \n<think>\n x \n</think>\n\n<answer>\n {GOOD} \n</answer>\n", (1, 1, 0)),
    "no thought": (wrap(GOOD, ""), (1, 1, 0)),
    "integers": (wrap('{"valence": 7, "arousal": 3}'), (1, 1, 0)),
    "exponents": (wrap('{"valence": 70e-1, "arousal": 0.3E1}'), (1, 1, 0)),
    "keys the other way round": (wrap('{"arousal": 3, "valence": 7}'), (1, 1, 0)),
    "only valence near": (wrap('{"valence": 7, "arousal": 9}'), (1, 0.25, 0)),
    "only arousal near": (wrap('{"valence": 1, "arousal": 3}'), (1, 0.75, 0)),
    "neither near": (wrap('{"valence": 1, "arousal": 9}'), (1, 0, 0)),
    "lone surrogate in the thought": (wrap(GOOD, "\ud800"), (1, 1, 0)),
    "other tags in the thought": (wrap(GOOD, "<b>1 < 2</b> <THINK> </ answer>"), (1, 1, 0)),
    "the longest text": (wrap(GOOD, "x" * (feedback.LONGEST_ANSWER - len(wrap(GOOD, "")))), (1, 1, 0)),
    "class": (wrap(CLASS), (1, 0, 1)),
    "class in capitals with spaces": (wrap('{"emotion_class": " Awe\\n"}'), (1, 0, 1)),
    "another class": (wrap('{"emotion_class": "fear"}'), (1, 0, 0)),
}
NO_JSON_OBJECT = [
    "", " ", "7", "null", f"[{GOOD}]", '"awe"', "awe",
    GOOD[:-1], GOOD + GOOD, GOOD + "}", GOOD + "\0", "\u00a0" + GOOD, "\ufeff" + GOOD,
    f"```json\n{GOOD}\n```",
    GOOD.replace('"', "'"),
    '{"valence": 7, "arousal": 3,}',
    '{"valence": 7 /* */, "arousal": 3}',
    '{"valence": NaN, "arousal": 3}',
    '{"valence": Infinity, "arousal": 3}',
    '{"valence": 7, "arousal": -Infinity}',
    '{"valence": 7, "valence": 7, "arousal": 3}',
    '{"emotion_class": "fear", "emotion_class": "awe"}',
    '{"x": {"valence": 7, "valence": 7}}',
    '{"valence": 07, "arousal": 3}',
    '{"valence": 7., "arousal": 3}',
    '{"valence": +7, "arousal": 3}',
    '{"valence": ７, "arousal": 3}',
    "[" * 9000 + "]" * 9000,
    '{"a":' * 3000 + "1" + "}" * 3000,
    '{"valence": ' + "7" * 5000 + ', "arousal": 3}',
]
NO_PLAIN_ANSWER = [
    "{}", '{"valence": 7}', '{"arousal": 3}', '{"Valence": 7, "arousal": 3}', '{"\\ud800": 1}',
    '{"valence": true, "arousal": 3}',
    '{"valence": 7, "arousal": true}',
    '{"valence": "7", "arousal": "3"}',
    '{"valence": [7], "arousal": [3]}',
    '{"valence": {"valence": 7}, "arousal": 3}',
    '{"valence": null, "arousal": 3}',
    '{"valence": 1e999, "arousal": 3}',
    '{"valence": -1e999, "arousal": 3}',
    '{"valence": -0, "arousal": 3}',
    '{"valence": -0.0, "arousal": 3}',
    '{"valence": 0.99, "arousal": 3}',
    '{"valence": 9.01, "arousal": 3}',
    '{"valence": 7, "arousal": 30}',
    '{"valence": ' + "7" * 4000 + ', "arousal": 3}',
    '{"valence": 7, "arousal": 3, "note": "sure"}',
    '{"valence": 7, "arousal": 3, "emotion_class": "awe"}',
    '{"emotion_class": "awe", "or": "fear"}',
    '{"emotion_class": ["awe"]}',
    '{"emotion_class": {"awe": 1}}',
    '{"emotion_class": null}',
    '{"emotion_class": 1}',
    '{"emotion_class": ""}',
    '{"emotion_class": "awe."}',
    '{"emotion_class": "awe, fear"}',
    '{"emotion": "awe"}',
]
ANSWER = f"<answer>{GOOD}</answer>"
MALFORMED = {
    "empty": "",
    "white space": " \n",
    "bare JSON": GOOD,
    "no think block": ANSWER,
    "answer first": f"{ANSWER}<think>x</think>",
    "two answers": wrap(GOOD) + ANSWER,
    "two thoughts": "<think>y</think>" + wrap(GOOD),
    "the whole twice": wrap(GOOD) * 2,
    "thought not closed": f"<think>x{ANSWER}",
    "answer not closed": wrap(GOOD).removesuffix("</answer>"),
    "thought not opened": wrap(GOOD).removeprefix("<think>"),
    "nested thought": wrap(GOOD, "<think>x</think>"),
    "answer inside the thought": f"<think>x{ANSWER}</think>",
    "answer tags in the thought too": wrap(GOOD, ANSWER),
    "blocks that overlap": f"<think><answer></think>{GOOD}</answer>",
    "closing before opening": f"</think>x<think></answer>{GOOD}<answer>",
    "a tag in a string": wrap('{"x": "</answer>"}'),
    "tags in a string": wrap('{"x": "<think></think>"}'),
    "upper case": wrap(GOOD).upper(),
    "mixed case": f"<Think>x</Think>{ANSWER}",
    "spaces in tags": wrap(GOOD).replace("<", "< "),
    "an attribute": wrap(GOOD).replace("<answer>", '<answer id="1">'),
    "text before": "Sure! " + wrap(GOOD),
    "text after": wrap(GOOD) + " I am sure.",
    "zero width space after": wrap(GOOD) + "\u200b",
    "text between": wrap(GOOD).replace("<answer>", "so <answer>"),
    "code fence": f"```\n{wrap(GOOD)}\n```",
    "one character too long": wrap(GOOD, "x" * (feedback.LONGEST_ANSWER + 1 - len(wrap(GOOD, "")))),
    "200 kB of thought": wrap(GOOD, "a" * 200_000),
    "200 kB of tags": "<think>" * 30_000,
    "200 kB of less-than": "<" * 200_000,
    "100,000 brackets": wrap("[" * 100_000),
    "an integer of a million digits": wrap('{"valence": ' + "7" * 1_000_000 + ', "arousal": 3}'),
}


@pytest.mark.parametrize("name", HONEST)
def test_honest_answers_earn_their_rewards(name):
    text, expected = HONEST[name]
    assert rewards(text) == expected


@pytest.mark.parametrize("text", [*map(wrap, NO_JSON_OBJECT), *MALFORMED.values()], ids=lambda text: repr(text[:60]))
def test_malformed_answers_earn_nothing(text):
    assert feedback.strict_object(text) is None
    assert rewards(text) == (0, 0, 0)


@pytest.mark.parametrize("answer", NO_PLAIN_ANSWER, ids=lambda text: text[:60])
def test_objects_that_are_no_plain_answer_earn_the_format_only(answer):
    assert rewards(wrap(answer)) == (1, 0, 0)
    assert grpo.va_reward(wrap(answer), 7, 3, kind="continuous") == 0


PARTS = st.sampled_from([*feedback.TAGS, GOOD, CLASS, *'{}[]":,\\\n\ud800 7', "valence", "NaN", "1e999"])


@settings(max_examples=400, deadline=None)
@given(st.one_of(st.text(), st.lists(st.one_of(PARTS, st.text(max_size=5)), max_size=12).map("".join), st.text().map(wrap),
                 st.lists(PARTS, max_size=8).map("".join).map(wrap)),
       st.floats(1, 9), st.floats(1, 9), st.sampled_from(data.EMOTIONS))
def test_any_text_gives_rewards_from_0_to_1_and_never_an_exception(text, v, a, label):
    found = [grpo.format_reward(text), grpo.class_reward(text, label),
             *(grpo.va_reward(text, v, a, kind=kind) for kind in ("step", "nested", "continuous"))]
    assert all(type(x) is float and 0 <= x <= 1 for x in found)
    assert found[0] == 1 or found == [0, 0, 0, 0, 0]


STRINGS = st.text(st.characters(exclude_characters="<", exclude_categories=["Cs"]))  # no tags
JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | STRINGS,
                    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(STRINGS, inner, max_size=3), max_leaves=8)


@settings(deadline=None)
@given(JSON, st.booleans())
def test_every_json_object_is_read_as_it_is_and_nothing_else(value, ascii_only):
    text = json.dumps(value, ensure_ascii=ascii_only)
    assert feedback.strict_object(wrap(text)) == (value if isinstance(value, dict) else None)


@given(st.integers(100, 900), st.integers(-70, 70))
def test_an_error_of_exactly_epsilon_is_accepted_whatever_the_rounding(truth, error):
    told = truth + error
    if 100 <= told <= 900:
        text = wrap(json.dumps({"valence": told / 100, "arousal": 5.0}))
        assert grpo.va_reward(text, truth / 100, 5) == 1
    told = truth + (71 if error > 0 else -71)
    if 100 <= told <= 900:
        text = wrap(json.dumps({"valence": told / 100, "arousal": 5.0}))
        assert grpo.va_reward(text, truth / 100, 5) == 0.75


@given(*[st.floats(1, 9)] * 4)
def test_the_continuous_reward_falls_linearly_with_each_error(v, a, v_told, a_told):
    text = wrap(json.dumps({"valence": v_told, "arousal": a_told}))
    expected = 0.25 * (1 - abs(v - v_told) / 8) + 0.75 * (1 - abs(a - a_told) / 8)
    assert grpo.va_reward(text, v, a, kind="continuous") == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("told, step, nested", [((7, 3), 1, 1), ((7, 5), 0.25, 0.25), ((5, 3), 0.75, 0), ((5, 5), 0, 0)])
def test_the_nested_reward_gives_nothing_for_arousal_without_valence(told, step, nested):
    text = wrap(json.dumps(dict(zip(("valence", "arousal"), told, strict=True))))
    assert grpo.va_reward(text, 7, 3) == step and grpo.va_reward(text, 7, 3, kind="nested") == nested


def test_epsilon_and_weights_can_be_set():
    text = wrap('{"valence": 5.5, "arousal": 5.0}')
    assert grpo.va_reward(text, 7, 7, epsilon=1.5, weights=(2, 3)) == 2
    assert grpo.va_reward(text, 7, 7, epsilon=2, weights=(2, 3)) == 5


# ---------------------------------------------------------------------------------------------------------------------
# Advantages

GROUPS = st.integers(2, 9).flatmap(  # P rows of G rewards
    lambda size: st.lists(st.lists(st.floats(-100, 100), min_size=size, max_size=size), min_size=1, max_size=4))


@given(GROUPS)
def test_advantages_of_a_group_have_mean_zero_and_the_order_of_the_rewards(groups):
    r = torch.tensor(groups, dtype=torch.float64)
    advantages = grpo.group_advantages(r)
    assert advantages.shape == r.shape and advantages.dtype == r.dtype and advantages.isfinite().all()
    assert advantages.mean(1).abs().max() < 1e-6
    assert ((advantages[:, :, None] - advantages[:, None]) * (r[:, :, None] - r[:, None]) >= 0).all()
    for row, a in zip(r, advantages):
        if row.max() - row.min() > 1e-3:
            assert torch.allclose(a, (row - row.mean()) / (row.std() + 1e-4), atol=1e-9)


@given(GROUPS, st.floats(-50, 50), st.floats(0.1, 20))
def test_advantages_do_not_change_when_rewards_are_shifted_or_scaled(groups, shift, scale):
    r = torch.tensor(groups, dtype=torch.float64)
    r = r[r.std(1) > 0.1]
    assert torch.allclose(grpo.group_advantages(r + shift), grpo.group_advantages(r), atol=1e-6)
    assert torch.allclose(grpo.group_advantages(r * scale, eps=0), grpo.group_advantages(r, eps=0), atol=1e-6)


@given(st.floats(-1e6, 1e6, width=32), st.integers(1, 16))
def test_groups_without_spread_give_exact_zeros(value, size):
    assert (grpo.group_advantages(torch.full((2, size), value)) == 0).all()


def test_spread_that_is_only_rounding_gives_zeros_and_real_spread_does_not():
    assert (grpo.group_advantages(torch.tensor([[0.1 + 0.2, 0.3], [0.75 + 1e-8, 0.75]], dtype=torch.float64)) == 0).all()
    assert grpo.group_advantages(torch.tensor([[0.25, 1.0]])).abs().min() > 0.7


def test_advantages_use_the_unbiased_deviation():
    assert torch.allclose(grpo.group_advantages([[0, 1]]), torch.tensor([[-0.5, 0.5]]) / (math.sqrt(0.5) + 1e-4))


def test_rewards_that_are_not_finite_are_refused_with_their_row():
    for bad in (math.nan, math.inf):
        with pytest.raises(ValueError, match="row 1"):
            grpo.group_advantages(torch.tensor([[0.0, 1.0], [bad, 1.0]]))
    for shape in ((3,), (2, 0), (1, 2, 3)):
        with pytest.raises(ValueError, match="shape"):
            grpo.group_advantages(torch.zeros(shape))


# ---------------------------------------------------------------------------------------------------------------------
# Log-probabilities (the form in tiles: test_log_probs.py)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probabilities_are_those_of_the_softmax_over_the_vocabulary(temperature):
    g = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(*shape, generator=g, dtype=torch.float64) for shape in ((5, 4), (9, 4)))
    targets = torch.tensor([0, 8, 3, 3, 7])
    for i, (row, target) in enumerate(zip((hidden @ weight.T / temperature).tolist(), targets.tolist())):
        expected = row[target] - math.log(sum(math.exp(z) for z in row))
        for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.1)):
            for form in (grpo.token_log_probs, grpo.token_log_probs.plain):
                out = form(hidden.to(dtype), weight.to(dtype), targets, temperature)
                assert out[i].item() == pytest.approx(expected, abs=tolerance)
                assert out.dtype == torch.promote_types(dtype, torch.float32)


def test_log_probabilities_have_gradients_in_states_and_head():
    g = torch.Generator().manual_seed(0)
    inputs = [torch.randn(*shape, generator=g, dtype=torch.float64).requires_grad_() for shape in ((4, 3), (7, 3))]
    assert torch.autograd.gradcheck(lambda h, w: grpo.token_log_probs(h, w, torch.tensor([0, 6, 2, 2]), 0.8), inputs)


@pytest.mark.parametrize("spoil, message", [
    (lambda x: x + 0.1, "by mean 0.1, share 1, max 0.11 .*from token 0 of"),
    (lambda x: torch.cat([x[:, :1], x[:, 1:] + 0.1], 1), "from token 1 of"),
    (lambda x: torch.cat([x[:, :-1], x[:, -1:] + 0.1], 1), "from token 7 of"), (lambda x: x * math.nan, "by mean nan")])
def test_training_must_see_the_probabilities_that_sampling_saw(spoil, message):
    x = torch.randn(3, 8)
    mask = torch.ones_like(x, dtype=torch.bool)
    mask[0, 5:] = False
    limits = {"mean": 1e-3, "share": 0.01}
    figures = grpo.check_on_policy(x.masked_fill(~mask, math.nan), x + 1e-6, mask, limits)
    assert 0 < figures["mean"] < 1e-4 and figures["share"] == 0 and 0 < figures["max"] < 1e-4
    with pytest.raises(UserError, match=message):
        grpo.check_on_policy(x, spoil(x), mask, limits, rounding=0.1)
    assert grpo.check_on_policy(x, x + 0.1, mask, {})["mean"] == pytest.approx(0.1, rel=1e-4)  # no limits, no error


def test_a_few_far_tokens_do_not_stop_a_run_but_a_share_of_them_does():
    x = torch.randn(10, 100)
    mask = torch.ones_like(x, dtype=torch.bool)
    computed = x.clone()
    computed[0, :9] += 0.6  # |ratio - 1| is 0.82, as bfloat16 may give for a few of many tokens
    figures = grpo.check_on_policy(x, computed, mask, {"mean": 0.1, "share": 0.01})
    assert figures["share"] == pytest.approx(0.009) and figures["max"] > 0.8 and figures["mean"] < 0.01
    computed[1, :9] += 0.6
    with pytest.raises(UserError, match=r"allowed: share 0.01"):
        grpo.check_on_policy(x, computed, mask, {"mean": 0.1, "share": 0.01})


def test_a_global_std_is_that_of_all_rewards_and_means_stay_those_of_the_groups():
    rewards = torch.tensor([[0.0, 1.0], [2.0, 6.0], [3.0, 3.0]], dtype=torch.float64)
    std = rewards.numpy().std() + 1e-4
    advantages = grpo.group_advantages(rewards, global_std=True)
    expected = torch.tensor([[-0.5, 0.5], [-2.0, 2.0], [0.0, 0.0]], dtype=torch.float64) / std
    torch.testing.assert_close(advantages, expected)


# ---------------------------------------------------------------------------------------------------------------------
# The loss


def batch(B=5, L=7, seed=0, dtype=torch.float64, distance=0.3):
    """Log-probabilities new, old, ref [B,L], advantages [B] and a mask [B,L], its first row empty, its second full."""
    g = torch.Generator().manual_seed(seed)
    old = -3 * torch.rand(B, L, generator=g, dtype=torch.float64)
    new, ref = (old + distance * torch.randn(B, L, generator=g, dtype=torch.float64) for _ in range(2))
    mask = torch.rand(B, L, generator=g) < 0.6
    mask[0], mask[1] = False, True
    advantages = torch.randn(B, generator=g, dtype=torch.float64)
    advantages[2] = 0  # as in a group without spread
    return *(x.to(dtype) for x in (new, old, ref, advantages)), mask


def loss_by_hand(new, old, ref, advantages, mask, clip, beta):
    """The equations in plain Python, one token at a time."""
    total, kls, ratios, clipped = 0.0, [], [], 0
    for i in range(len(new)):
        terms = []
        for t in range(new.shape[1]):
            if mask[i, t]:
                A, r, d = advantages[i].item(), math.exp(new[i, t] - old[i, t]), (ref[i, t] - new[i, t]).item()
                kl = math.exp(d) - d - 1
                terms.append(-min(r * A, min(max(r, 1 - clip), 1 + clip) * A) + beta * kl)
                kls.append(kl)
                ratios.append(r)
                clipped += (A > 0 and r > 1 + clip) or (A < 0 and r < 1 - clip)
        total += sum(terms) / len(terms) if terms else 0.0
    n = len(ratios)
    return total / len(new), {"kl": sum(kls) / n, "ratio": sum(ratios) / n, "clip_fraction": clipped / n,
                              "ratio_max_deviation": max(abs(r - 1) for r in ratios)}


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("clip, beta", [(0.2, 1e-3), (0.1, 0.5), (0.3, 0.0)])
def test_the_loss_and_its_metrics_equal_the_equations_written_out(seed, clip, beta):
    inputs = batch(seed=seed)
    loss, metrics = grpo.grpo_loss(*inputs, clip=clip, beta=beta)
    expected, expected_metrics = loss_by_hand(*inputs, clip, beta)
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    assert {name: value.item() for name, value in metrics.items()} == pytest.approx(expected_metrics, rel=1e-6)


def test_the_loss_passes_gradcheck():
    new, *rest = batch(seed=1)
    assert torch.autograd.gradcheck(lambda x: grpo.grpo_loss(x, *rest, beta=0.1)[0], new.requires_grad_())


def test_on_policy_the_gradient_is_the_policy_gradient():
    new, _, _, advantages, mask = batch()
    new.requires_grad_()
    loss, metrics = grpo.grpo_loss(new, new.detach(), new.detach(), advantages, mask, beta=0.7)
    loss.backward()
    expected = -advantages[:, None] * mask / mask.sum(1, keepdim=True).clamp(min=1) / len(new)
    assert torch.allclose(new.grad, expected, atol=1e-15)
    assert metrics["ratio"] == 1 and metrics["kl"] == metrics["clip_fraction"] == metrics["ratio_max_deviation"] == 0


def test_clipped_tokens_get_no_gradient_and_the_others_do():
    new = torch.tensor([[0.5, 0.1, -0.5], [0.5, 0.1, -0.5]]).requires_grad_()  # log ratios
    advantages, mask = torch.tensor([1.0, -1.0]), torch.ones(2, 3)
    loss, metrics = grpo.grpo_loss(new, torch.zeros(2, 3), None, advantages, mask, clip=0.2, beta=0)
    loss.backward()
    assert (new.grad != 0).tolist() == [[False, True, True], [True, True, False]]
    assert metrics["clip_fraction"].item() == pytest.approx(2 / 6) and "kl" not in metrics


@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf, 1e30])
def test_padding_reaches_neither_loss_nor_gradient(garbage):
    new, old, ref, advantages, mask = batch()
    clean = new.clone().requires_grad_()
    expected, expected_metrics = grpo.grpo_loss(clean, old, ref, advantages, mask)
    expected.backward()
    for which in ((0,), (1,), (2,), (0, 1), (0, 1, 2)):
        dirty = [x.masked_fill(~mask, garbage) if i in which else x.clone() for i, x in enumerate((new, old, ref))]
        advantages_dirty = advantages.clone()
        advantages_dirty[0] = garbage  # the completion without tokens
        dirty[0].requires_grad_()
        loss, metrics = grpo.grpo_loss(*dirty, advantages_dirty, mask)
        loss.backward()
        assert loss == expected and torch.equal(dirty[0].grad, clean.grad) and metrics == expected_metrics


def test_parts_of_a_batch_add_up_to_the_whole():
    new, old, ref, advantages, mask = batch(B=6)
    whole, parts = new.clone().requires_grad_(), new.clone().requires_grad_()
    loss = grpo.grpo_loss(whole, old, ref, advantages, mask)[0]
    loss.backward()
    total = 0.0
    for rows in (slice(0, 1), slice(1, 4), slice(4, 6)):
        part = grpo.grpo_loss(parts[rows], old[rows], ref[rows], advantages[rows], mask[rows], normalizer=6)[0]
        part.backward()
        total += part.item()
    assert total == pytest.approx(loss.item(), rel=1e-12) and torch.allclose(parts.grad, whole.grad, atol=1e-15)


def test_only_the_first_log_probabilities_are_differentiated():
    new, old, ref, advantages, mask = (x.requires_grad_() if x.is_floating_point() else x for x in batch())
    loss, metrics = grpo.grpo_loss(new, old, ref, advantages, mask)
    loss.backward()
    assert new.grad is not None and old.grad is None and ref.grad is None and advantages.grad is None
    assert not any(value.requires_grad for value in metrics.values())


def test_half_precision_log_probabilities_are_compared_in_float32():
    new, old, ref, advantages, mask = batch(dtype=torch.bfloat16)
    loss, _ = grpo.grpo_loss(new, old, ref, advantages, mask)
    wide, _ = grpo.grpo_loss(new.float(), old.float(), ref.float(), advantages.float(), mask)
    assert loss.dtype == torch.float32 and loss == wide


def test_a_batch_without_any_token_gives_zero():
    new, old, ref, advantages, mask = batch()
    loss, metrics = grpo.grpo_loss(new.requires_grad_(), old, ref, advantages, torch.zeros_like(mask))
    loss.backward()
    assert loss == 0 and (new.grad == 0).all() and all(value == 0 for value in metrics.values())


def test_shapes_that_do_not_fit_and_a_missing_reference_are_refused():
    new, old, ref, advantages, mask = batch()
    for arguments, match in (
            ((new[0], old, ref, advantages, mask), r"\[B,L\]"),
            ((new, old[:, 1:], ref, advantages, mask), "old_log_probs"),
            ((new, old, ref[1:], advantages, mask), "ref_log_probs"),
            ((new, old, ref, advantages[:, None], mask), "advantages"),
            ((new, old, ref, advantages, mask[:, 1:]), "mask"),
            ((new, old, None, advantages, mask), "reference")):
        with pytest.raises(ValueError, match=match):
            grpo.grpo_loss(*arguments)


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=8))
def test_k3_is_never_negative_and_zero_only_without_a_difference(differences):
    d = torch.tensor(differences, dtype=torch.float64)
    kl = grpo.k3_kl(-d, torch.zeros_like(d))
    assert (kl >= 0).all() and (kl[d.abs() > 1e-6] > 0).all() and (kl[d == 0] == 0).all()


def test_k3_of_a_small_difference_is_half_its_square_in_float32():
    d = torch.tensor([1e-4, -1e-4, 1e-3])
    assert torch.allclose(grpo.k3_kl(-d, torch.zeros_like(d)), d.square() / 2, rtol=2e-3)


def test_k3_is_unbiased():
    policy, reference = (torch.randn(50, generator=torch.Generator().manual_seed(i)).double().log_softmax(0) for i in (0, 1))
    expected = (policy.exp() * (policy - reference)).sum()
    assert torch.allclose((policy.exp() * grpo.k3_kl(policy, reference)).sum(), expected)


def test_the_limit_of_the_mean_is_as_narrow_as_the_rounding():
    x, mask, limits = torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool), {"mean": 0.1, "share": 1.0}
    grpo.check_on_policy(x, x + 0.05, mask, limits)
    with pytest.raises(UserError, match="allowed: mean 0.01"):
        grpo.check_on_policy(x, x + 0.05, mask, limits, rounding=0.1)
