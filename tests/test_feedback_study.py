"""The study of textual feedback: its blind judges, every case once, resumed after a kill, and its records."""

from functools import partial

import pytest
from PIL import Image

import data
import feedback
from evaluation.cases import held_out_cases
from parts.files import read_records
from tests.launch import run_command
from tiny import feedback_study as study
from tiny import judge_study, results

BLIND = ("blind, compares blank pictures", "blind, compares another case's", "blind, its scores too")


def fewer_rounds():
    study.ROUNDS = 2


def run(folder):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study, "ROUNDS", 2)
        patch.setattr(results, "RECORDS", folder)
        patch.setattr(judge_study.subprocess, "run", partial(run_command, before=fewer_rounds))
        assert study.main(["--cases", "2", "--n", "2", "--sample-steps", "1", "--out", str(folder), "--jobs", "1",
                           "--split", "validation"]) == 0


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    run(folder)
    return folder


def test_every_case_is_drawn_in_each_way_from_one_noise(finished):
    for generator in study.GENERATORS:
        for record, case in zip(read_records(finished / f"{generator}.jsonl"), held_out_cases(2, study.SEED, "validation"),
                                strict=True):
            seeing = record["feedback"]
            assert seeing["prompts"][0] == data.with_numbers(case.neutral, case.v, case.a)
            assert len(seeing["losses"]) == 2 and seeing["changed"][0] == (seeing["prompts"][1] != seeing["prompts"][0])
            assert {(found["id"], found["v"], found["a"]) for found in record.values()} == {(case.id, case.v, case.a)}
            for name in BLIND:  # round 0 is the same pictures
                assert record[name]["round_errors"][0] == seeing["round_errors"][0]


def test_a_picture_is_drawn_once_however_often_it_is_asked_for():
    asked = []

    def draw(prompt, seeds):
        asked.append((prompt, list(seeds)))
        return [f"{prompt} {seed}" for seed in seeds]

    draw_once = study.once(draw)
    assert draw_once("a swan", range(2)) == ["a swan 0", "a swan 1"]
    assert draw_once("a swan", [1, 2]) == ["a swan 1", "a swan 2"] and draw_once("a swan", [0]) == ["a swan 0"]
    assert draw_once("a tent", [1]) == ["a tent 1"]
    assert asked == [("a swan", [0, 1]), ("a swan", [2]), ("a tent", [1])]


def test_a_killed_study_goes_on_and_has_the_same_records(finished):
    path = finished / "RF.jsonl"
    whole = path.read_text()
    before = (finished / "feedback_validation.jsonl").read_text()
    path.write_text(whole[:len(whole) - 40])
    run(finished)
    assert path.read_text() == whole and (finished / "feedback_validation.jsonl").read_text() == before


def test_cases_of_other_settings_are_not_taken_for_these(finished, capsys):
    flags = ["--cases", "2", "--n", "2", "--sample-steps", "1", "--out", str(finished)]
    for other, changed in (((), "split"), (("--split", "validation", "--readings", "1"), "readings")):
        assert study.main([*flags, *other]) == 2
        assert f"holds another feedback_study ({changed} changed)" in capsys.readouterr().err
        assert study.main([*flags, *other, "--only", "base"]) == 2
        assert f"({changed} changed)" in capsys.readouterr().err
    assert study.parse_args([]).out != study.parse_args(["--split", "validation"]).out


def seen_by(judge, questions):
    """The pictures of each question as the judge behind a Blind one is shown them."""
    seen = []

    def remember(conversations, *counts):
        seen.extend([part["image"] for part in user["content"] if part["type"] == "image"] for _, user in conversations)
        return [""] * len(conversations)

    judge.judge = remember
    judge(questions, 0)
    return seen


def test_a_blind_judge_is_shown_other_pictures_and_told_the_same():
    colours = [Image.new("RGB", (28, 28), name) for name in ("red", "blue", "grey", "white")]
    one = feedback.ask("regression", colours[0])
    two = feedback.ask_compare("a swan", "a swan", 7, 3, (colours[0], 6, 3), (colours[1], 5, 3))
    assert seen_by(study.Blind(None, colours[2:], comparing=True), [one, two]) == [[colours[0]], colours[2:]]
    assert seen_by(study.Blind(None, colours[2:], comparing=False), [one, two]) == [[colours[2]], colours[2:]]
    hidden = study.Blind(None, colours[2:], comparing=True).hidden(two)
    assert hidden[0] == two[0] and hidden[1]["content"][2:] == two[1]["content"][2:]


def test_the_tables_compare_case_by_case_and_follow_the_rounds(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "RECORDS", tmp_path)
    for method, off in (("one picture", 2.0), ("feedback", 1.0)):
        records = [{"id": str(i), "v": 5.0, "a": 5.0, "meter": [5 + off, 5 + off / 2], "judge": None, "content": 50.0 * off,
                    "clip_score": 1.0, "other_clip_score": 1.0, "round_errors": [3.0, 2.0], "best_errors": [2.0, 1.0],
                    "losses": [0.2 + i, 0.1], "changed": [min(i, 1)]} for i in range(3)]
        results.add_figures("feedback", f"base: {method}", {}, records)
    pairs = results.table_of("feedback_pairs").splitlines()
    assert pairs[2:] == ["| base: feedback | base: one picture | -50 [-50, -50] | -50 [-50, -50] | -50 [-50, -50] |"
                         " -50.0 [-50.0, -50.0] |"]
    pictures, best, changed = results.table_of("feedback_rounds").splitlines()[2:]
    assert pictures.endswith("| 3.00 [3.00, 3.00] | 2.00 [2.00, 2.00] |")
    assert best.endswith("| 2.00 [2.00, 2.00] | 1.00 [1.00, 1.00] |")
    assert changed.endswith("| 100 % of 2 | – |")  # the first case is settled


def test_each_blind_judge_is_shown_what_its_row_says_and_one_that_never_saw_does_not_choose(monkeypatch):
    (case, another), judges = held_out_cases(2), []

    def refine(neutral, v, a, draw, judge, rounds, n, **options):
        judges.append(judge)
        return [feedback.Round("", [feedback.Picture("drawn", 0, feedback.Judgement(1.0, 1.0), 0.0)], 0, 0, None, None, "", {})]

    monkeypatch.setattr(feedback, "refine", refine)
    monkeypatch.setattr(feedback, "judge_images", lambda judge, images, readings: [feedback.Judgement(5.0, 5.0)] * len(images))
    monkeypatch.setattr(study, "figures", lambda image, judgement, *_: {"judge": judgement.va})
    monkeypatch.setattr(study, "by_round", lambda *_: {})
    tools = study.Tools(lambda prompt, seeds: [(prompt, seed) for seed in seeds], "seeing", None, 2, 1)
    found = study.run_case(case, another, 0, tools)
    seeing, blank, strangers, nothing = judges
    assert seeing == "seeing" and {each.judge for each in judges[1:]} == {"seeing"}
    assert [each.comparing for each in judges[1:]] == [True, True, False]
    grey = Image.new("RGB", (128, 128), (128, 128, 128))
    assert blank.pictures == nothing.pictures == [grey, grey]
    assert strangers.pictures == [(data.with_numbers(another.neutral, another.v, another.a), seed) for seed in (8, 9)]
    assert [found[name]["judge"] for name in ("feedback", *BLIND)] == [(1, 1)] * 3 + [(5, 5)]
