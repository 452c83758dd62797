"""Problems of a dataset: each is a line with file, row and remedy."""

import json

import pytest

from prepare import check
from tiny.dataset import write_tiny


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dataset")
    write_tiny(folder, train=12, test=5)
    return folder


@pytest.fixture
def spoilt(dataset, tmp_path):
    """spoilt(split, number, change) puts a changed row, or any text, in place of a line; without, a copy of the dataset."""
    for split in ("train", "test"):
        (tmp_path / "images" / split).mkdir(parents=True)
        for path in dataset.glob(f"images/{split}/*.png"):
            (tmp_path / path.relative_to(dataset)).hardlink_to(path)
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_bytes((dataset / f"{split}.jsonl").read_bytes())

    def spoil(split, number, change):
        path = tmp_path / f"{split}.jsonl"
        lines = path.read_bytes().splitlines()
        if isinstance(change, dict):
            row = json.loads(lines[number - 1]) | change
            change = json.dumps({k: v for k, v in row.items() if v != "absent"}).encode()
        path.write_bytes(b"\n".join([*lines[:number - 1], change, *lines[number:]]) + b"\n")

    spoil.folder = tmp_path
    return spoil


def test_a_sound_dataset_is_one_line(spoilt, capsys):
    assert check.main([str(spoilt.folder)]) == 0
    said = capsys.readouterr().out
    assert said == f"{spoilt.folder}: 17 rows, 0 problems\n"
    spoilt("train", 2, {"emotional": "absent"})  # may be absent
    assert check.check_rows(spoilt.folder, check.read_rows(spoilt.folder)) == []
    (spoilt.folder / "train.jsonl").unlink()
    assert check.main([str(spoilt.folder)]) == 0 and "5 rows, 0 problems" in capsys.readouterr().out


def test_validation_rows_are_checked_where_there_are_some(spoilt):
    row = json.loads((spoilt.folder / "train.jsonl").read_bytes().splitlines()[0])
    lines = [json.dumps(row | {"id": "watched", "v": 42}), "broken"]
    (spoilt.folder / "validation.jsonl").write_text("\n".join(lines) + "\n")
    found = check.check_rows(spoilt.folder, check.read_rows(spoilt.folder))
    assert len(found) == 3 and all("validation.jsonl, line" in problem for problem in found)
    assert "got 42" in found[0] and "train.jsonl, line 1, too" in found[1] and "no JSON object" in found[2]


def test_a_dataset_in_the_layout_of_imagefolder_is_checked_too(spoilt, dataset, capsys):
    for split in ("train", "test"):
        (spoilt.folder / f"{split}.jsonl").unlink()
        lines = (dataset / "images" / split / "metadata.jsonl").read_text().replace("cottage", "house")
        (spoilt.folder / "images" / split / "metadata.jsonl").write_text(lines + '{"file_name": "none.png"}\n')
    assert check.main([str(spoilt.folder)]) == 1
    said = capsys.readouterr().out
    assert "images/train/metadata.jsonl, line 13: no 'label', 'v', 'a'" in said and "19 rows" in said


@pytest.mark.parametrize("split, change, message", [
    ("test", b"{", "no JSON object"), ("test", b"\xff", "no JSON object"), ("test", b"", "no JSON object"),
    ("test", b"[1]", "no JSON object"), ("test", {"v": "absent", "neutral": "absent"}, "no 'v', 'neutral'; add"),
    ("test", {"v": 9.5}, "valence must be a finite number in 1..9, got 9.5; mend"),
    ("train", {"a": None}, "arousal must be a number in 1..9"), ("train", {"label": "joy"}, "unknown label 'joy'; give"),
    ("train", {"labels": "guessed"}, "unknown labels 'guessed'; give one of true, drawn, family"),
    ("train", {"labels": ["true"]}, "unknown labels ['true']; give one of true, drawn, family"),
    ("train", {"neutral": " "}, "'neutral' is ' ', expected a caption"), ("train", {"emotional": ""}, "'emotional' is ''"),
    ("test", {"emotional": "so sad"}, "a test row with an emotional caption"), ("test", {"id": "a/b"}, "cannot name a file"),
    ("test", {"id": "train_1000001"}, "the id 'train_1000001' is that of {folder}/train.jsonl, line 2, too"),
    ("train", {"id": "train_1000001"}, "the id 'train_1000001' is that of {folder}/train.jsonl, line 2, too"),
    ("test", {"image": "images/none.png"}, "'images/none.png' cannot be read (FileNotFoundError)"),
    ("test", {"image": "../x.png"}, "lies outside the folder"), ("test", {"image": 3}, "lies outside the folder"),
    ("test", {"image": "images"}, "'images' cannot be read (IsADirectoryError)"),
    ("test", {"image": "train.jsonl"}, "'train.jsonl' cannot be read (UnidentifiedImageError)"),
    ("test", {"image": "images/train/train_1000004.png"}, "is that of {folder}/train.jsonl, line 5, too; give another")])
def test_every_problem_is_a_line_with_file_row_and_remedy(spoilt, capsys, split, change, message):
    spoilt(split, 3, change)
    assert check.main([str(spoilt.folder)]) == 1
    problem, count = capsys.readouterr().out.splitlines()
    message = message.format(folder=spoilt.folder) if "{folder}" in message else message
    assert problem.startswith(f"{spoilt.folder / split}.jsonl, line 3: ") and message in problem
    assert count.endswith("rows, 1 problems")


def test_all_problems_are_listed_in_the_order_of_the_rows(spoilt, capsys):
    spoilt("test", 4, {"v": 0, "label": "joy", "image": "images/none.png"})
    spoilt("train", 12, b"?")
    picture = spoilt.folder / "images" / "train" / "train_1000003.png"
    content = picture.read_bytes()
    picture.unlink()
    picture.write_bytes(content[:len(content) // 2])
    assert check.main([str(spoilt.folder)]) == 1
    said = capsys.readouterr().out.splitlines()
    assert [line.partition(": ")[0].rpartition("/")[2] for line in said[:-1]] == [
        "train.jsonl, line 4", "train.jsonl, line 12", *["test.jsonl, line 4"] * 3]
    assert "cannot be read (" in said[0] and said[-1].endswith("17 rows, 5 problems")


@pytest.mark.parametrize("argv", [["nowhere"], []])
def test_what_is_no_dataset_ends_with_one_line(tmp_path, monkeypatch, capsys, argv):
    monkeypatch.chdir(tmp_path)
    try:
        code = check.main(argv)
    except SystemExit as stop:
        code = stop.code
    said = capsys.readouterr().err
    assert code == 2 and said.startswith("error: ") and said.count("\n") == 1
