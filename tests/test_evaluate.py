"""Metrics, held-out cases and the evaluation program."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import evaluate
import sample
from tiny import scenes


@given(st.lists(st.tuples(st.integers(-5, 5), st.integers(-5, 5)), min_size=2, max_size=30))
def test_spearman_is_the_correlation_of_average_ranks(pairs):
    x, y = np.array(pairs, float).T

    def average_ranks(values):  # by counting, element by element
        return [sum(v < u for v in values) + (sum(v == u for v in values) - 1) / 2 for u in values]

    assert evaluate.ranks(x).tolist() == average_ranks(x)
    value = evaluate.spearman(x, y)
    if len(set(x)) == 1 or len(set(y)) == 1:
        assert np.isnan(value)
    else:
        assert value == pytest.approx(np.corrcoef(average_ranks(x), average_ranks(y))[0, 1], abs=1e-9)


def test_a_monotone_but_biased_generator_is_ranked_well_and_erred_by_its_bias():
    targets = [(v, a) for v in range(1, 10) for a in range(1, 10)]
    result = evaluate.scores(targets, [(v + 1, 10 - a) for v, a in targets])
    assert result["v_error"] == 1 and result["v_spearman"] == pytest.approx(1)
    assert result["a_error"] == pytest.approx(40 / 9) and result["a_spearman"] == pytest.approx(-1)


def test_cases_repeat_with_the_seed_and_spread_over_the_plane():
    cases = evaluate.held_out_cases(200)
    assert cases == evaluate.held_out_cases(200) != evaluate.held_out_cases(200, seed=1)
    va = np.array([case[1:] for case in cases])
    assert va.min() >= 1 and va.max() <= 9 and (va.std(0) > 2).all()
    assert len({case[0] for case in cases}) > 100


def test_a_generator_that_draws_the_scenes_themselves_is_measured_as_nearly_perfect():
    cases, rng = evaluate.held_out_cases(30), np.random.default_rng(0)

    def draw(prompts, seeds):
        pictures = [scenes.render(scenes.random_scene(rng), *cases[seed][1:], 64) for seed in seeds]
        return torch.stack([torch.from_numpy(np.array(p)).permute(2, 0, 1) for p in pictures])

    measured = evaluate.measure(draw, cases, "words", batch=7, seed=0)
    assert measured["judge"] == measured["clip"] == []
    result = evaluate.scores([case[1:] for case in cases], measured["meter"])
    assert result["v_error"] < 0.5 and result["a_error"] < 0.5 and min(result["v_spearman"], result["a_spearman"]) > 0.9


def test_the_shipped_miniature_follows_emotion_words_and_numbers_less_well():
    generator, cases = sample.load_generator(sample.TINY), evaluate.held_out_cases(40, seed=9)
    result = {}
    for form in evaluate.FORMS:
        measured = evaluate.measure(lambda p, s: generator.draw(p, s, 128, steps=10), cases, form, batch=20, seed=0)
        result[form] = evaluate.scores([case[1:] for case in cases], measured["meter"])
    assert min(result["words"]["v_spearman"], result["words"]["a_spearman"]) >= 0.7
    assert result["numbers"]["a_error"] > result["words"]["a_error"]


def test_the_program_prints_a_table_and_writes_json(tmp_path, capsys):
    assert evaluate.main(["--cases", "4", "--steps", "2", "--size", "64", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "V-Error" in printed and "| numbers |" in printed and "| words |" in printed
    written = json.loads((tmp_path / "evaluate.json").read_text())
    assert set(written["results"]) == {"numbers", "words"} and written["arguments"]["cases"] == 4


def test_a_judge_adds_its_own_errors(tmp_path, capsys):
    flags = ["--cases", "4", "--steps", "8", "--forms", "words", "--out", str(tmp_path),
             "--judge", str(sample.TINY / "judge")]
    assert evaluate.main(flags) == 0
    result = json.loads((tmp_path / "evaluate.json").read_text())["results"]["words"]
    assert "V-Error by judge" in capsys.readouterr().out and 0 <= result["judge_v_error"] < 8
    assert result["judge_unreadable"] < 1 and 0 < result["clip_score"] <= 100


def test_bad_arguments_and_models_end_with_code_2(tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        evaluate.main(["--cases", "1"])
    assert end.value.code == 2
    with pytest.raises(SystemExit):
        evaluate.main(["--forms", "verse"])
    assert evaluate.main(["--model", "./nowhere", "--out", str(tmp_path)]) == 2
    assert "no such file" in capsys.readouterr().err
