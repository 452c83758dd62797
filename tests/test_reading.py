"""Expected valence and arousal from the judge's probabilities: equal to the sum over all answers, in one pass."""

import itertools

import pytest
import torch

import feedback
import qwen_vl
from parts import reading
from parts.pipeline import TINY
from tests.test_scenes import some_scenes
from tiny import scenes


@pytest.fixture(scope="module")
def judge():
    return qwen_vl.QwenVL.from_pretrained(TINY / "judge")


PICTURES = [scenes.render(scene, v, a) for scene, v, a in zip(some_scenes(3), (2, 5, 8), (7, 3, 5))]
QUESTIONS = [feedback.ask("regression", picture) for picture in PICTURES]


def log_probability(model, prompt, text, start):
    """Of the tokens of `text` from number `start` on, after the prompt and those before."""
    ids = torch.tensor(model.processor.tokenizer.encode(text).ids)
    hidden = model.completion_hidden([prompt], ids[None, None])[0, 0]
    log_probs = (hidden @ model.head_weight.T).log_softmax(-1)
    return float(log_probs.gather(1, ids[:, None])[start:, 0].sum())


def thoughts_of(judge):
    """What the judge thinks of the pictures, by its likeliest tokens."""
    answers = judge.generate(QUESTIONS, temperature=0)
    return [answer.text.split("</think>")[0].removeprefix("<think>") for answer, in answers]


def test_the_valence_is_the_mean_over_all_numbers_that_can_be_said(judge):
    thoughts = thoughts_of(judge)
    prompt = judge.processor(QUESTIONS[0])
    before = f'<think>{thoughts[0]}</think><answer>{{"valence": '
    start = len(judge.processor.tokenizer.encode(before).ids)
    values, weights = [], []
    with torch.no_grad():
        for digit, tenth in itertools.product(range(1, 10), range(10)):
            values.append(min(9.0, digit + tenth / 10))
            weights.append(log_probability(judge, prompt, f"{before}{digit}.{tenth}", start))
    weights = torch.tensor(weights, dtype=torch.float64).softmax(0)
    (v, _), *_ = reading.expected_va(judge, QUESTIONS, thoughts)
    # after its thought the judge hardly ever says anything but such a number
    assert v == pytest.approx(float((weights * torch.tensor(values, dtype=torch.float64)).sum()), abs=0.01)


def test_readings_are_on_the_scale_follow_the_picture_and_do_not_depend_on_the_batch(judge):
    thoughts = thoughts_of(judge)
    together = reading.expected_va(judge, QUESTIONS, thoughts)
    alone = [reading.expected_va(judge, [question], [own])[0] for question, own in zip(QUESTIONS, thoughts)]
    assert all(1 <= x <= 9 for pair in (*together, *reading.expected_va(judge, QUESTIONS)) for x in pair)
    torch.testing.assert_close(torch.tensor(together), torch.tensor(alone), atol=1e-4, rtol=0)
    valences, arousals = zip(*together)
    assert valences[0] < valences[1] < valences[2] and arousals[0] > arousals[1]


def test_nothing_is_decoded(judge, monkeypatch):
    monkeypatch.setattr(qwen_vl.QwenVL, "generate", None)
    assert len(reading.expected_va(judge, QUESTIONS, batch=2)) == 3
