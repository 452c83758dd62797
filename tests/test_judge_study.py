"""The study of the miniature judge: every run once, and a table of what their logs say."""

import os
import re
import sys

import pytest

import qwen_vl
import train_judge
from tests.launch import run_command
from tiny import judge_study
from tiny.dataset import write_tiny

SMALL = "--steps 1 --group 2 --batch 2 --eval-rows 4 --device cpu --jobs 1".split()


@pytest.fixture
def folders(tmp_path, monkeypatch):
    for name, path in (("SUPERVISED", train_judge.TINY), ("STUDY", tmp_path / "study"), ("DATASETS", tmp_path),
                       ("SHIPPED", tmp_path / "shipped"), ("SEEDS", (0, 1))):
        monkeypatch.setattr(judge_study, name, path)
    monkeypatch.setattr(judge_study.subprocess, "run", run_command)
    monkeypatch.setattr(judge_study, "ABLATIONS", {"class only": ("class", ["--tasks", "class"], "dataset")})
    for name in ("dataset", "dataset_drawn"):
        write_tiny(tmp_path / name, 4, 4)
    return tmp_path


def test_a_study_trains_what_is_missing_and_prints_one_table(folders, capsys):
    assert judge_study.main(SMALL) == 0
    first = capsys.readouterr().out
    rows = [line.split("|")[1].strip() for line in first.splitlines()]
    assert rows == ["judge", "---", "before GRPO", "after GRPO, 2 seeds", "class only"]
    assert "±" in first.splitlines()[3] and "±" not in first.splitlines()[2]
    assert qwen_vl.QwenVL.from_pretrained(folders / "shipped").config.tied
    written = (folders / "study" / "class" / "judge" / "model.safetensors").stat().st_mtime_ns
    judge_study.main(SMALL)
    assert capsys.readouterr().out == first
    assert (folders / "study" / "class" / "judge" / "model.safetensors").stat().st_mtime_ns == written


def test_a_failed_run_is_named(folders, capsys):
    assert judge_study.main([*SMALL, "--reward", "soft"]) == 2
    assert re.search(r"ended with code 2; see .*output.txt", capsys.readouterr().err)


def test_a_study_without_a_supervised_judge_says_what_to_run(folders, monkeypatch, capsys):
    monkeypatch.setattr(judge_study, "SUPERVISED", folders / "nothing")
    assert judge_study.main([]) == 2
    assert "run `python -m tiny.pretrain judge` first" in capsys.readouterr().err


def test_the_runs_are_processes_that_find_the_project_and_share_the_cores(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    ask = [sys.executable, "-c", "import importlib.util, os\n"
           "print(importlib.util.find_spec('train_judge') is not None, os.environ['OMP_NUM_THREADS'])"]
    judge_study.run_all([(tmp_path / "one", [ask]), (tmp_path / "two", [ask, ask])], 2, "runs")
    said = f"True {max(1, os.cpu_count() // 2)}\n"
    assert [(tmp_path / name / "output.txt").read_text() for name in ("one", "two")] == [said, 2 * said]


def test_a_row_is_mean_and_standard_deviation_and_says_when_nothing_was_readable():
    records = [{"eval_format": f, "eval_v_error": v, "eval_a_error": None, "eval_class_accuracy": 0.5}
               for f, v in ((1.0, 1.0), (0.5, 3.0))]
    assert judge_study.table_row("x", records) == ["x", "75.0 % ± 35", "2.00 ± 1.4", "none readable", "50.0 % ± 0"]
