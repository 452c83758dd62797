"""Cases: read from files, made, laid over a grid, and written for other methods."""

import dataclasses
import json

import numpy as np
import pytest
from PIL import Image

import data
from evaluation.__main__ import main
from evaluation.cases import (
    Case,
    for_others,
    grid_of,
    held_out_cases,
    load_cases,
    pictures_of,
    seeds_of,
)
from parts.cli import UserError
from tiny import scenes
from tiny.dataset import write_tiny


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cases") / "data"
    write_tiny(folder, train=1, test=4)
    return folder


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_cases_are_read_from_a_datasets_test_rows(dataset):
    rows, cases = data.load_rows(dataset, "test"), load_cases(dataset / "test.jsonl")
    assert [(c.id, c.neutral, c.v, c.a) for c in cases] == [(r.id, r.neutral, r.v, r.a) for r in rows]


@pytest.mark.parametrize("row, message", [
    ({"id": "b", "neutral": "x", "v": 0.5, "a": 5}, "valence must be a finite number in 1..9"),
    ({"id": "b", "v": 5, "a": 5}, "no 'neutral'"), ({"id": "a", "neutral": "x", "v": 5, "a": 5}, "'a' a second time"),
    ({"id": "../b", "neutral": "x", "v": 5, "a": 5}, "cannot name a file"), ([1], "mend or remove")])
def test_an_unusable_case_is_named(tmp_path, row, message):
    path = write_lines(tmp_path / "cases.jsonl", [{"id": "a", "neutral": "a lake", "v": 1, "a": 9}, row])
    with pytest.raises(UserError, match=r"cases.jsonl, line 2: .*mend or remove") as caught:
        load_cases(path)
    assert message in str(caught.value)


def test_missing_or_empty_cases_say_what_is_expected(tmp_path):
    with pytest.raises(UserError, match="JSON lines with id, neutral, v and a"):
        load_cases(tmp_path / "none.jsonl")
    with pytest.raises(UserError, match="no rows"):
        load_cases(write_lines(tmp_path / "cases.jsonl", []))


def test_a_cases_picture_is_found_by_its_id(tmp_path):
    case = Case("lake_1", "a lake", 5, 5)
    with pytest.raises(UserError, match="1 of 1 pictures are missing: lake_1; expected <id>.png"):
        pictures_of(tmp_path, [case])
    Image.new("RGB", (4, 4)).save(tmp_path / "lake_1.webp")
    assert pictures_of(tmp_path, [case]) == [tmp_path / "lake_1.webp"]


def test_cases_repeat_with_the_seed_and_spread_over_the_plane():
    cases = held_out_cases(200)
    assert cases == held_out_cases(200) != held_out_cases(200, seed=1)
    va = np.array([(case.v, case.a) for case in cases])
    assert va.min() >= 1 and va.max() <= 9 and (va.std(0) > 2).all()
    assert len({case.neutral for case in cases}) > 100 and len({case.id for case in cases}) == 200


def test_a_file_of_cases_says_the_target_in_every_methods_own_terms(tmp_path, capsys):
    assert main(["cases", "--count", "3", "--out", str(tmp_path / "cases.jsonl")]) == 0
    assert "3 cases" in capsys.readouterr().out
    cases = load_cases(tmp_path / "cases.jsonl")
    assert cases == held_out_cases(3)
    for case, row in zip(cases, lines(tmp_path / "cases.jsonl"), strict=True):
        assert row["emoedit"] == data.nearest_emotion(case.v, case.a)
        assert row["emoticrafter"] == pytest.approx([(case.v - 5) * 0.75, (case.a - 5) * 0.75], abs=1e-4)
        assert row["words"] == data.with_words(case.neutral, case.v, case.a) and f"valence {case.v:.1f}" in row["numbers"]
    ends = [for_others(Case("x", "a lake", v, a))["emoticrafter"] for v, a in ((1, 9), (9, 1))]
    assert ends == [[-3, 3], [3, -3]]


def test_all_test_rows_of_a_dataset_are_cases(dataset, tmp_path, monkeypatch, capsys):
    row = data.load_rows(dataset, "test")[0]
    many = [dataclasses.replace(row, id=f"row_{i}") for i in range(1001)]  # more than there are cases of made scenes
    monkeypatch.setattr(data, "load_rows", lambda folder, split: many)
    assert main(["cases", "--data", str(dataset), "--out", str(tmp_path / "a.jsonl")]) == 0
    assert "1001 cases" in capsys.readouterr().out


def test_a_datasets_cases_carry_its_labels_and_a_grid_has_one_group_a_prompt(dataset, tmp_path):
    assert main(["cases", "--data", str(dataset), "--count", "3", "--out", str(tmp_path / "a.jsonl")]) == 0
    rows = data.load_rows(dataset, "test")[:3]
    assert [line["emoedit"] for line in lines(tmp_path / "a.jsonl")] == [row.label for row in rows]
    main(["cases", "--count", "2", "--grid", "3", "--out", str(tmp_path / "grid.jsonl")])
    cases = load_cases(tmp_path / "grid.jsonl")
    assert len(cases) == 18 and len({case.group for case in cases}) == 2
    assert {(case.v, case.a) for case in cases[:9]} == {(v, a) for v in (1, 5, 9) for a in (1, 5, 9)}
    assert seeds_of(cases, 5) == [5] * 9 + [14] * 9
    assert seeds_of(held_out_cases(3), 5) == [5, 6, 7]


def test_test_cases_are_of_reserved_pairs_and_those_of_validation_of_the_others(monkeypatch):
    plain, made = scenes.random_scene, []
    monkeypatch.setattr(scenes, "random_scene", lambda *given, **more: made.append(plain(*given, **more)) or made[-1])
    held_out_cases(20)
    held_out_cases(20, split="validation")
    assert [scene.place in scenes.RESERVED.get(scene.subject, ()) for scene in made] == [True] * 20 + [False] * 20


def test_a_case_of_a_grid_is_named_after_its_target():
    cases = grid_of(held_out_cases(1), 3)
    assert len({case.id for case in cases}) == 9
    assert all(case.id == f"{case.group}_v{case.v:g}_a{case.a:g}" for case in cases)
