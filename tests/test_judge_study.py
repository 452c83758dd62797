"""The study of the miniature judge: every run once, and a table of what its judges say of the test pictures."""

import os
import re
import shutil
import sys

import pytest

import data
import train_judge
from parts.files import read_records
from tests.test_grpo import wrap
from tiny import judge_study, results
from tiny.dataset import write_tiny

ROWS = {"step": judge_study.Row("step", seeds=(0, 1)), "α by task": judge_study.Row("by_task", judge_study.BY_TASK),
        "drawn": judge_study.Row("drawn", labels="drawn")}


@pytest.fixture
def folders(tmp_path, monkeypatch):
    for name, path in (("SUPERVISED", train_judge.TINY), ("STUDY", tmp_path / "study"), ("DATASETS", tmp_path),
                       ("ROWS", ROWS)):
        monkeypatch.setattr(judge_study, name, path)
    monkeypatch.setattr(results, "RECORDS", tmp_path / "records")
    monkeypatch.setattr(judge_study, "write_tiny", lambda folder, train, test, labels: write_tiny(folder, 2, 4, labels))
    write_tiny(tmp_path / "dataset", 2, 4)
    return tmp_path


@pytest.fixture
def made_up(folders, monkeypatch):
    """Runs that train nothing, and judges that are right by as much as their folder says. (commands, pictures asked about)"""
    commands, asked = [], []
    off = {"step_seed0": 0.5, "step_seed1": 1.5}

    def run_all(runs, jobs, what):
        for folder, (command,) in runs:
            commands.append([str(part) for part in command])
            shutil.copytree(train_judge.TINY, folder / "judge")
            (folder / "judge" / "model.safetensors").touch()  # copying keeps the time

    def judge_of(name, **_):
        cases = {row.id: row for row in data.load_rows(folders / "dataset", "test")}

        def judge(questions):
            asked.append(name)
            texts = []
            for row, messages in zip(cases.values(), questions, strict=True):
                about = messages[1]["content"][-1]["text"]
                va = f'{{"valence": {min(9, row.v + off.get(name, 0))}, "arousal": {row.a}}}'
                texts.append(wrap(va if "arousal" in about else f'{{"emotion_class": "{row.label}"}}'))
            return [*texts[:-1], ""] if name == "judge" else texts  # one answer of the supervised one is unreadable
        return judge

    monkeypatch.setattr(judge_study, "run_all", run_all)
    monkeypatch.setattr(judge_study, "load_judge", lambda folder, *_: folder.parent.name if folder.name == "judge"
                        and folder != train_judge.TINY else "judge")
    monkeypatch.setattr(judge_study, "judge_of", judge_of)
    return commands, asked


def test_a_study_trains_what_is_missing_and_prints_one_table(folders, made_up, capsys):
    commands, asked = made_up
    assert judge_study.main(["--batch", "2"]) == 0
    first = capsys.readouterr().out
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in first.splitlines()]
    assert [row[0] for row in rows] == ["", "---", "before GRPO", *ROWS] and [row[1] for row in rows[2:]] == ["1", "2", "1", "1"]
    assert rows[2][2].startswith("75.0 [") and rows[2][5].startswith("75.0 [") and rows[3][2] == "100.0 [100.0, 100.0]"
    # a mean over two seeds, one of which is off by 0.5 and one by 1.5, but for pictures near 9
    assert 0.5 < float(rows[3][3].split()[0]) <= 1 and rows[3][4] == rows[4][3] == "0.00 [0.00, 0.00]"
    settings = [train_judge.parse_args(command[2:]) for command in commands]
    assert [str(args.data.name) for args in settings] == ["dataset"] * 3 + ["dataset_drawn"]
    assert [args.seed for args in settings] == [0, 1, 0, 0] and {args.batch for args in settings} == {2}
    assert settings[2].task_weights == {"class": 0.25, "regression": 0.75} and settings[2].reward == "nested"
    assert data.load_rows(folders / "dataset_drawn", "train")[0].labels == "drawn"

    records = (folders / "records" / "judge.jsonl").read_bytes()
    asked.clear()
    assert judge_study.main(["--batch", "2"]) == 0  # nothing is missing, and no judge has changed
    assert capsys.readouterr().out == first and len(commands) == 4 and not asked
    assert (folders / "records" / "judge.jsonl").read_bytes() == records
    head = read_records(folders / "records" / "judge.jsonl")[5]
    assert head["run"] == "step_seed0" and head["row"] == "step" and "train_judge.py --model" in head["commands"][0]


def test_some_rows_can_be_run_alone_and_a_judge_that_was_trained_again_is_asked_again(folders, made_up):
    commands, asked = made_up
    assert judge_study.main(["--rows", "drawn"]) == 0
    assert len(commands) == 1 and set(asked) == {"judge", "drawn_seed0"}
    asked.clear()
    shutil.rmtree(folders / "study" / "drawn_seed0" / "judge")
    assert judge_study.main(["--rows", "drawn"]) == 0
    assert set(asked) == {"drawn_seed0"} and len(commands) == 2


def test_every_row_is_a_command_that_train_judge_understands():
    settings = [train_judge.parse_args([str(part) for part in judge_study.training(row, 0, [])[2:]])
                for row in judge_study.ROWS.values()]
    assert {args.epsilon for args in settings} == {0.2, 0.35, 0.7, 1.5}
    assert {args.reward for args in settings} == {"step", "nested", "continuous"}
    assert len({args.out for args in settings}) == len(settings)


def test_a_failed_run_is_named(folders, capsys):
    assert judge_study.main(["--rows", "by_task", "--group", "1"]) == 2
    assert re.search(r"by_task_seed0 ended with code 2; see .*output.txt", capsys.readouterr().err)


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
