"""The study of reward feedback: every run once, and a table of what was measured."""

import json
import re

import pytest

import train_judge
from parts.pipeline import TINY, load_generator
from tests.launch import run_command
from tiny import generator_study, judge_study
from tiny.dataset import write_tiny

SMALL = ("--cases 4 --steps 1 --group 2 --batch 2 --micro 4 --sde-steps 2 --sample-steps 2 "
         "--eval-rows 4 --size 64 --window 1 --window-within 1 --jobs 1").split()


@pytest.fixture
def folders(tmp_path, monkeypatch):
    for name, path in (("SUPERVISED", train_judge.TINY), ("STUDY", tmp_path / "study"), ("DATASET", tmp_path / "dataset"),
                       ("SHIPPED", tmp_path / "shipped"), ("SEEDS", (0, 1))):
        monkeypatch.setattr(generator_study, name, path)
    monkeypatch.setattr(judge_study.subprocess, "run", run_command)
    rows = generator_study.ROWS
    monkeypatch.setattr(generator_study, "ROWS", {name: rows[name] for name in list(rows)[:2]})
    write_tiny(tmp_path / "dataset", 4, 4)
    return tmp_path


def test_a_study_trains_what_is_missing_and_prints_one_table(folders, capsys):
    assert generator_study.main(SMALL) == 0
    first = capsys.readouterr().out
    rows = [line.split("|")[1].strip() for line in first.splitlines()]
    assert rows == ["rewards", "---", "base", "judge and PickScore"] and first.count("±") == 2 * len(generator_study.FIGURES)
    assert load_generator(TINY, adapter=folders / "shipped").name.endswith(f"with {folders / 'shipped'}")
    files = [folders / f"study/{name}_seed1" / generator_study.RESULT for name in ("base", "both")]
    facts = [json.loads(file.read_text())["settings"] for file in files]
    assert facts[0]["adapter"] is None and facts[1]["adapter"][0].endswith("both_seed1/adapter")
    assert {f["seed"] for f in facts} == {1}
    written = (folders / "study/both_seed0" / generator_study.RESULT).stat().st_mtime_ns
    generator_study.main(SMALL)
    assert capsys.readouterr().out == first
    assert (folders / "study/both_seed0" / generator_study.RESULT).stat().st_mtime_ns == written


def test_a_failed_run_is_named(folders, capsys):
    del generator_study.ROWS["base"]  # which trains nothing
    assert generator_study.main([*SMALL, "--window", "9"]) == 2
    assert re.search(r"the run both_seed0 ended with code 2; see .*output.txt", capsys.readouterr().err)


def test_a_study_without_a_supervised_judge_says_what_to_run(folders, monkeypatch, capsys):
    monkeypatch.setattr(generator_study, "SUPERVISED", folders / "nothing")
    assert generator_study.main([]) == 2
    assert "run `python -m tiny.pretrain judge` first" in capsys.readouterr().err
