"""The study of reward and textual feedback: every case once, resumed after a kill, and its tables."""

import json
from functools import partial

import pytest

import data
from evaluation.cases import held_out_cases
from tests.launch import run_command
from tiny import feedback_study as study
from tiny import judge_study


def fewer_rounds():
    study.ROUNDS = 2


def run(folder):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study, "ROUNDS", 2)
        patch.setattr(judge_study.subprocess, "run", partial(run_command, before=fewer_rounds))
        assert study.main(["--cases", "2", "--seeds", "0", "--n", "2", "--readings", "2", "--sample-steps", "1", "--out",
                           str(folder), "--jobs", "1"]) == 0


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    run(folder)
    return folder


def records(folder, generator, seed):
    return [json.loads(line) for line in (folder / f"{generator}_seed{seed}" / "cases.jsonl").read_text().splitlines()]


def test_every_case_is_drawn_once_by_feedback_and_by_a_control_that_shares_round_0(finished):
    for generator in study.GENERATORS:
        for record, case in zip(records(finished, generator, 0), held_out_cases(2, 5), strict=True):
            assert record["case"] == [case.neutral, case.v, case.a]
            assert record["prompts"][0] == data.with_numbers(case.neutral, case.v, case.a)
            assert record["words"][0]["v"] == record["control"][0]["v"]
            assert [r["pictures"] for r in record["control"]] == [2, 4]
            for kind in ("words", "control"):
                losses = [r["loss"] for r in record[kind]]
                assert losses == sorted(losses, reverse=True)  # the best so far


def test_a_killed_study_goes_on_and_prints_the_same_tables(finished, capsys):
    path = finished / "RF_seed0" / "cases.jsonl"
    whole = path.read_text()
    path.write_text(whole[:len(whole) - 40])
    run(finished)
    again = [{k: v for k, v in r["words"][-1].items() if k != "seconds"} for r in records(finished, "RF", 0)]
    assert again == [{k: v for k, v in json.loads(r)["words"][-1].items() if k != "seconds"} for r in whole.splitlines()]
    rows = [line.split("|")[1].strip() for line in capsys.readouterr().out.splitlines() if line]
    assert rows[2:8] == ["base", "base, best of as many as TF", "TF", "RF", "RF, best of as many as TF", "RF + TF"]
    assert sum("TF, mean of the round" in row for row in rows) == 2


def test_a_table_holds_means_over_cases_and_spread_over_seeds():
    def record(x):
        figures = {"v": x, "a": 1.0, "judge_v": float("nan"), "judge_a": 0.5, "clip": 70.0, "pictures": 4}
        return {"one": figures, "control": [figures] * study.ROUNDS, "words": [figures] * study.ROUNDS,
                "words_round": [{"v": x, "a": 1.0}] * study.ROUNDS}

    text = study.tables({"base": [[record(1.0), record(2.0)], [record(2.0), record(3.0)]]})
    assert "| base | 2.00 ± 0.71 | 1.00 ± 0.00 |" in text and "3.00 ± 0.71 | 3.00 ± 0.71" in text
