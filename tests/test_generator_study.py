"""The study of reward feedback: every run once, its best adapter on validation, records and a shipped adapter."""

import json
import re
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

import train_judge
from parts.files import read_records, write_rows
from parts.pipeline import TINY, load_generator
from tests.launch import run_command
from tiny import generator_study, judge_study, results
from tiny.dataset import write_tiny
from tiny.generator_study import Cases, Row

SMALL = ("--group 2 --batch 2 --micro 4 --sde-steps 2 --sample-steps 2 --readings 1 "
         "--eval-rows 2 --size 64 --window 1 --window-within 1 --jobs 1").split()
ROWS = {
    "base": Row("base", None),
    "emotion and PickScore": Row("both", ("--steps", "1"), (0, 1)),
    "more steps": Row("more", ("--steps", "2"), (0,), after="both"),
    "imitation": Row("imitation", ("--steps", "1", "--group", "2"), program="imitation"),
    "an emotion network": Row("emotion_network", ("--steps", "1", "--batch", "2", "--cases", "3"),
                              program="emotion_network"),
}
CANDIDATES = {name: ROWS[name] for name in ("base", "more steps")}
NEW = CANDIDATES | {"its first step": replace(ROWS["more steps"], step=1)}
TABLES = {"reward_feedback": Cases(ROWS, 3, 0, "evaluation"), "reward_feedback_new": Cases(NEW, 2, 1, "evaluation_new"),
          "reward_feedback_validation": Cases(CANDIDATES, 2, 1, "evaluation_validation", "validation")}


@pytest.fixture
def folders(tmp_path, monkeypatch):
    for name, path in (("SUPERVISED", train_judge.TINY), ("STUDY", tmp_path / "study"), ("DATASET", tmp_path / "dataset"),
                       ("SHIPPED", tmp_path / "shipped"), ("SHIPPED_ROW", "more steps"), ("TABLES", TABLES),
                       ("CANDIDATES", CANDIDATES), ("EVERY", 1)):
        monkeypatch.setattr(generator_study, name, path)
    monkeypatch.setattr(results, "RECORDS", tmp_path / "records")
    (tmp_path / "records").mkdir()
    monkeypatch.setattr(judge_study.subprocess, "run", run_command)
    write_tiny(tmp_path / "dataset", 4, 4)
    return tmp_path


def test_a_study_trains_what_is_missing_and_keeps_every_case(folders, capsys):
    assert generator_study.main(SMALL) == 0
    first = capsys.readouterr().out
    rows = [line.split("|")[1].strip() for line in first.splitlines() if line.startswith("|")]
    assert rows == ["", "---", *ROWS, "", "---", *NEW, "", "---", *CANDIDATES] and "both_seed0: step 1" in first
    records = read_records(folders / "records" / "reward_feedback.jsonl")
    heads = [record for record in records if "row" in record]
    assert [head["run"] for head in heads] == ["base_seed0", "both_seed0", "both_seed1", "more_seed0", "imitation_seed0",
                                               "emotion_network_seed0"]
    assert len(records) == 6 * (1 + 3) and len({head["data"] for head in heads}) == 1
    assert heads[1]["commands"][0].startswith("python train_gen.py") and "--adapter" in heads[1]["commands"][1]
    assert re.search(r"--seed 10 --steps 2 --judge \S+ --init-adapter \S+/both_seed0/adapter ", heads[3]["commands"][0])
    assert "--images" in heads[5]["commands"][1] and heads[5]["form"] == "images"
    # new cases, and a row of the same run at another step
    new = [record for record in read_records(folders / "records/reward_feedback_new.jsonl") if "row" in record]
    assert [head["run"] for head in new] == ["base_seed0", "more_seed0", "more_seed0_1"]
    assert new[0]["cases"] != heads[0]["cases"] and "--seed 1 --split test" in new[0]["commands"][0]
    assert "adapters/00000001" in new[2]["commands"][1] and "evaluation_new_1_of_2" in new[2]["commands"][1]
    shipped = load_file(folders / "shipped" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in shipped.values()} == {torch.bfloat16}
    assert load_generator(TINY, adapter=folders / "shipped").name.endswith(f"with {folders / 'shipped'}")
    file = folders / "study/both_seed0/evaluation_of_3/evaluate.json"
    assert json.loads(file.read_text())["settings"]["seed"] == 0
    written = file.stat().st_mtime_ns
    generator_study.main(SMALL)
    assert capsys.readouterr().out == first and file.stat().st_mtime_ns == written


def test_the_best_adapter_on_validation_keeps_the_base_s_content(tmp_path, monkeypatch):
    monkeypatch.setattr(generator_study, "STUDY", tmp_path)

    def log(*steps, row=ROWS["emotion and PickScore"]):
        out = generator_study.folder_of(row.folder, 0)
        out.mkdir(exist_ok=True)
        write_rows(out / "log.jsonl", [
            {"step": step, "eval_content": content, "eval_meter_v_error": error, "eval_meter_a_error": 0.5}
            for step, content, error in steps])
        return generator_study.chosen(row, 0)

    assert log((0, 0.9, 2.0), (10, 0.86, 1.0), (20, 0.84, 0.2)) == (tmp_path / "both_seed0" / "adapters" / "00000010", 10)
    assert log((0, 0.9, 2.0), (10, 0.9, 1.0), (20, 0.9, 0.2))[1] == 20
    assert log((0, 0.9, 2.0), (10, 0.5, 1.0), (20, 0.4, 0.2))[1] == 20  # none keeps it: the last
    # a run that goes on from another is held to what the base had before both
    assert log((0, 0.7, 1.0), (10, 0.86, 0.9), (20, 0.7, 0.2), row=ROWS["more steps"])[1] == 10
    assert log() == (tmp_path / "both_seed0" / "adapter", None)


def test_the_shipped_seed_errs_least_on_validation_and_keeps_the_base_s_content(tmp_path, monkeypatch):
    row = Row("both", ("--steps", "1"), (0, 1, 2), step=1)
    candidates = {"base": Row("base", None), "more": row}
    for name, value in (("STUDY", tmp_path), ("SHIPPED_ROW", "more"), ("CANDIDATES", candidates)):
        monkeypatch.setattr(generator_study, name, value)
    cases = Cases(candidates, 2, 1, "evaluation", "validation")

    def measured(row, seed, content, error):
        folder, _ = generator_study.evaluation(row, seed, cases)
        folder.mkdir(parents=True, exist_ok=True)
        figures = {"content": content, "meter_v_error": error, "meter_a_error": 0.5}
        (folder / "evaluate.json").write_text(json.dumps({"results": {"numbers": figures}}))

    measured(candidates["base"], 0, 80.0, 2.0)
    for seed, content, error in ((0, 74.0, 0.1), (1, 75.0, 0.4), (2, 79.0, 0.5)):
        measured(row, seed, content, error)
    assert generator_study.best_seed(cases) == 1
    measured(row, 1, 75.0, 0.6)
    assert generator_study.best_seed(cases) == 2


def test_an_evaluation_of_fewer_cases_does_not_stand_for_all():
    cases = Cases({}, 200, 0, "evaluation")
    few, _ = generator_study.evaluation(ROWS["base"], 0, replace(cases, count=3))
    assert few != generator_study.evaluation(ROWS["base"], 0, cases)[0]


def test_a_failed_run_is_named(folders, capsys):
    assert generator_study.main([*SMALL, "--rows", "both", "--window", "9"]) == 2
    assert re.search(r"the run both_seed0 ended with code 2; see .*output.txt", capsys.readouterr().err)


def test_a_study_without_a_supervised_judge_says_what_to_run(folders, monkeypatch, capsys):
    monkeypatch.setattr(generator_study, "SUPERVISED", folders / "nothing")
    assert generator_study.main([]) == 2
    assert "run `python -m tiny.pretrain judge` first" in capsys.readouterr().err
