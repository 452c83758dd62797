"""Statistics, the forms of the paper's tables, and people's ratings."""

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evaluation import rate, tables
from evaluation.__main__ import main


def test_agreement_is_that_of_shrout_and_fleiss_example():
    ratings = [[9, 2, 5, 8], [6, 1, 3, 2], [8, 4, 6, 8], [7, 1, 2, 6], [10, 5, 6, 9], [6, 2, 4, 7]]  # their table 2
    assert tables.icc(ratings) == pytest.approx((0.29, 0.62), abs=0.005)  # their table 4


def test_agreement_is_one_for_equal_raters_and_undefined_for_one():
    assert tables.icc([[1, 1], [5, 5], [9, 9]]) == pytest.approx((1, 1))
    assert all(map(math.isnan, tables.icc([[1], [5]]))) and all(map(math.isnan, tables.icc([[3, 3]])))
    assert all(map(math.isnan, tables.icc([[3, 3], [3, 3]])))


@given(st.integers(0, 99))
def test_intervals_hold_the_mean_of_normal_values_about_as_often_as_they_say(seed):
    values = np.random.default_rng(seed).normal(0, 1, 200)
    low, high = tables.interval([values[s].mean() for s in tables.resamples([None] * 200, 0, 400)])
    assert low < values.mean() < high and high - low == pytest.approx(2 * 1.96 * values.std() / 200**0.5, rel=0.25)


def test_the_95_percent_intervals_cover_the_truth():
    inside, rng = 0, np.random.default_rng(0)
    for _ in range(200):
        values = rng.normal(3, 1, 60)
        low, high = tables.interval([values[s].mean() for s in tables.resamples([None] * 60, 1, 300)])
        inside += low <= 3 <= high
    assert 0.88 <= inside / 200 <= 0.99


def test_cases_of_a_group_are_resampled_together():
    groups = ["a", "a", None, "b", "b", "b"]
    for sample in tables.resamples(groups, 0, 50):
        counts = np.bincount(sample, minlength=6)
        assert counts[0] == counts[1] and counts[3] == counts[4] == counts[5]
        assert counts[0] + counts[2] + counts[3] == 3


def test_intervals_leave_out_what_could_not_be_read():
    assert all(map(math.isnan, tables.interval([math.nan]))) and tables.interval([1, math.nan, 1]) == [1, 1]


# ---------------------------------------------------------------------------------------------------------------------
# Tables of runs


def records(errors, clip=30.0, readers=("judge",), seconds=1.0):
    """Cases at V 5, A 5, read off by the errors [(v, a) or None] of every reader."""
    return [{"id": f"c{i}", "v": 5.0, "a": 5.0, "group": None,
             "read": {reader: e and [5 + e[0], 5 - e[1]] for reader in readers},
             "clip_score": clip, "clip_iqa": 0.5, "aesthetic": 5.0 + i, "seconds": seconds} for i, e in enumerate(errors)]


def write_run(folder, name, rows, **facts):
    folder.mkdir()
    (folder / "images.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    facts = {"name": name, "command": f"evaluation run --name {name}", "count": len(rows), "seed": 0, "images": "x",
             "billions": None, "seconds_given": None,
             "judges": {"judge": ["tiny/weights/judge", ["model.safetensors", 1]]}, **facts}
    (folder / "settings.json").write_text(json.dumps(facts))
    return folder


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch):
    monkeypatch.setattr(tables.resamples, "__defaults__", (0, 200))  # of its seed and count


@pytest.fixture
def runs(tmp_path):
    worse, better = [(1.0, 2.0)] * 9 + [(3.0, 2.0)], [(0.5, 1.0)] * 10
    return [write_run(tmp_path / "a", "FLUX", records(worse, 25.0), seconds_given=17, billions=12),
            write_run(tmp_path / "b", "ours", records(better, 24.0), images=None, billions=2.243)]


def test_form_1_has_methods_as_rows_with_intervals_and_paired_differences(runs, tmp_path, capsys):
    assert main(["table", *map(str, runs), "--form", "1", "--out", str(tmp_path / "out" / "table")]) == 0
    printed = capsys.readouterr().out
    head, _, flux, ours = printed.splitlines()[:4]
    assert head == "| method | V-Error ↓ | A-Error ↓ | CLIP-Score ↑ | CLIP-IQA ↑ | Aes-Score ↑ |"
    assert flux.startswith("| FLUX | *1.200 [1.000, ") and "**25.000 [25.000, 25.000]**" in flux
    assert ours.startswith("| ours | **0.500 [0.500, 0.500]**")
    assert "Difference to ours on the same cases" in printed and "| FLUX | +0.700 [+0.500, " in printed
    written = json.loads((tmp_path / "out" / "table.json").read_text())
    assert written["runs"]["FLUX"]["command"] == "evaluation run --name FLUX" and written["seed"] == 0
    assert written["figures"]["FLUX"]["judge_a_error"]["difference"] == 1
    said = (tmp_path / "out" / "table.md").read_text()
    assert said.startswith(printed.rstrip())
    assert "- FLUX: `evaluation run --name FLUX`, seed 0, judge judge tiny/weights/judge\n" in said


def test_differences_are_paired_by_case_and_use_shared_cases_only(tmp_path):
    noise = [(float(x), 1.0) for x in np.random.default_rng(0).uniform(0, 4, 50)]
    a = tables.read_run(write_run(tmp_path / "a", "a", records([(v + 0.1, x) for v, x in noise])))
    b = tables.read_run(write_run(tmp_path / "b", "b", records(noise)[:40]))
    found = tables.compared(a + b, ["judge_v_error"], 0)["a"]["judge_v_error"]
    assert found["cases"] == 40 and found["difference"] == pytest.approx(0.1)
    assert found["difference_high"] - found["difference_low"] < 1e-9 < found["high"] - found["low"]


@pytest.mark.parametrize("form, head", [("4", "model"), ("5", "task")])
def test_forms_4_and_5_have_methods_as_columns(runs, capsys, form, head):
    main(["table", f"Ours={runs[1]}", f"Qwen-3B-S={runs[0]}", "--form", form])
    rows = [line.split(" |")[0] for line in capsys.readouterr().out.splitlines()[:4]]
    assert rows == [f"| {head}", "| ---", "| V-Error ↓", "| A-Error ↓"]


def test_form_10_has_the_five_metrics_by_reward(runs, capsys):
    main(["table", *map(str, runs), "--form", "10"])
    assert capsys.readouterr().out.startswith("| reward | V-Error ↓ | A-Error ↓ | CLIP-Score ↑ | CLIP-IQA ↑ | Aes-Score ↑ |")


def test_form_7_has_seconds_and_sizes(runs, capsys):
    main(["table", *map(str, runs), "--form", "7"])
    assert capsys.readouterr().out.splitlines()[2:] == [
        "| inference latency (s), a case | 17.00 | 1.00 |", "| the same, a picture drawn | 17.00 | 1.00 |",
        "| model size (B) | 12 | 2.24 |"]


def test_every_reader_has_its_own_columns_and_unreadable_answers_are_told(tmp_path, capsys):
    rows = records([(1.0, 1.0), None, (1.0, 1.0), (1.0, 1.0)], readers=("judge", "other"))
    main(["table", str(write_run(tmp_path / "a", "ours", rows))])
    printed = capsys.readouterr().out
    assert "V-Error, judge ↓ | A-Error, judge ↓ | V-Error, other ↓" in printed
    assert "left out above: ours, judge 25.0%; ours, other 25.0%" in printed


def test_runs_that_are_not_whole_or_have_nothing_in_common_are_refused(runs, tmp_path, capsys):
    (runs[0] / "images.jsonl").write_text((runs[0] / "images.jsonl").read_text()[:-20])
    assert main(["table", str(runs[0])]) == 2
    assert "9 of 10 cases; run `evaluation run --name FLUX` to its end" in capsys.readouterr().err
    rows = [{k: v for k, v in r.items() if k not in tables.SCORES} for r in records([(1, 1)] * 3, readers=("other",))]
    other = write_run(tmp_path / "c", "other", rows)
    assert main(["table", str(other), str(runs[1]), "--form", "1"]) == 2
    assert "no figure in common" in capsys.readouterr().err
    assert main(["table", str(runs[1]), str(runs[1])]) == 2
    assert "ours, ours: some have the same label" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------------
# People


def write_ratings(path, rows):
    path.write_text("time,rater,case,method,v,a,quality,best\n" + "".join(
        f"2026-01-01T00:00:00+00:00,{','.join(map(str, row))}\n" for row in rows))
    return path


def test_form_6_compares_the_readings_with_the_label_and_with_people(runs, tmp_path, capsys):
    rows = [(rater, f"c{i}", "test", 6 + shift, 3, 4, "") for i in range(10) for rater, shift in (("ann", 0), ("bob", 1))]
    path = write_ratings(tmp_path / "r.csv", rows)
    assert main(["table", str(runs[1]), "--form", "6", "--human", str(path)]) == 0
    printed = capsys.readouterr().out  # read as V 5.5, A 4; the label is 5, 5, people's mean 6.5, 3
    head, _, v, a = printed.splitlines()[:4]
    assert head == "| annotator | Lexicon-based annotation | Human annotation |"
    assert v.startswith("| V-Error ↓ | **0.500") and "*1.000 [1.000" in v and a.count("1.000 [1.000, 1.000]") == 2
    assert "2 raters, 10 pictures rated by all" in printed
    for content, method, message in ((rows, ":FLUX", "no ratings of 'FLUX'"), ([], "", "none of its cases was rated"),
                                     ([("ann", "z", "test", 5, 5, 3, "")], "", "none of its cases was rated")):
        assert main(["table", str(runs[1]), "--form", "6", "--human", f"{write_ratings(path, content)}{method}"]) == 2
        assert message in capsys.readouterr().err


def test_form_6_asks_for_a_run_of_one_form(tmp_path, capsys):
    folder = write_run(tmp_path / "a", "ours", records([(1, 1)] * 3))
    (folder / "words.jsonl").write_text((folder / "images.jsonl").read_text())
    path = write_ratings(tmp_path / "r.csv", [("ann", "c0", "images", 5, 5, 3, "")])
    assert main(["table", str(folder), "--form", "6", "--human", str(path)]) == 2
    assert "the last run has its target as images and as words; give one of a single form" in capsys.readouterr().err


def test_form_3_counts_preferences_and_averages_quality(tmp_path, capsys):
    rows = [(rater, f"c{i}", method, 5, 5, quality, int((method == "ours") == (i != 0)))
            for i in range(4) for rater in ("ann", "bob") for method, quality in (("FLUX", 3), ("ours", 4))]
    path = write_ratings(tmp_path / "r.csv", rows)
    assert main(["table", "--form", "3", "--human", str(path)]) == 0
    head, _, preference, quality = capsys.readouterr().out.splitlines()[:4]
    assert head == "| metric | FLUX | ours |" and "**4.00 [4.00, 4.00]**" in quality
    assert "*25.0 % [" in preference and "**75.0 % [" in preference
    assert len(rate.read_ratings(path)) == 16


def test_intervals_and_differences_keep_the_cases_of_a_grid_together(tmp_path):
    def read(name, errors):
        rows = [row | {"group": f"g{i // 5}"} for i, row in enumerate(records([(e, 1.0) for e in errors]))]
        return tables.read_run(write_run(tmp_path / name, name, rows))

    a, b = read("a", [float(i // 5) for i in range(20)]), read("b", [0.5] * 20)  # four scenes, alike within each
    found = tables.compared(a + b, ["judge_v_error"], 0)["a"]["judge_v_error"]
    assert found["high"] - found["low"] > 1.6  # 20 independent cases would give 1
    assert found["difference_high"] - found["difference_low"] > 1.6


def test_the_raters_of_a_case_are_no_independent_evidence():
    ratings = [{"method": "ours", "case": f"c{i}", "rater": f"r{j}", "best": i % 2, "quality": quality}
               for i, quality in enumerate((1, 2, 4, 5)) for j in range(8)]
    found = tables.preference_table(ratings, 0)[1]["ours"]
    assert found["quality"]["high"] - found["quality"]["low"] > 2  # 32 independent answers would give 1.1
    assert found["preference"]["high"] - found["preference"]["low"] > 70


def test_feedback_draws_all_rounds_of_pictures_for_a_case():
    facts = {"images": None, "rounds": 3, "n": 4, "billions": 2.0}
    methods = [tables.Method(form, form, records([(1, 1)], seconds=24.0), facts) for form in ("feedback", "numbers")]
    found = tables.latency_table(methods)[1]
    assert [found[form]["picture"] for form in ("feedback", "numbers")] == [2, 24]
