"""The miniature's dataset: pictures, labels and the program."""

import json
import shutil

import datasets
import numpy as np
import pytest
from PIL import Image

import data
from parts.cli import UserError
from tiny import dataset as program
from tiny import scenes
from tiny.dataset import write_tiny


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dataset")
    assert program.main(["--out", str(folder), "--train", "12", "--test", "5"]) == 0
    return folder


def test_the_miniatures_dataset_has_pictures_of_the_valence_and_arousal_it_says(dataset):
    train, test = (data.load_rows(dataset, split) for split in ("train", "test"))
    assert len(train) == 12 and len(test) == 5 and len({row.id for row in train + test}) == 17
    assert all(row.emotional.startswith(row.neutral) for row in train) and all(row.emotional is None for row in test)
    for row in train + test:
        measured = scenes.measure_va(Image.open(row.image))
        assert abs(measured[0] - row.v) < 1 and abs(measured[1] - row.a) < 1.5
        assert row.label == data.nearest_emotion(row.v, row.a)


def test_drawn_labels_are_those_of_the_class_and_the_test_rows_stay_true(tmp_path, dataset):
    write_tiny(tmp_path, 12, 5, labels="drawn")
    assert (tmp_path / "test.jsonl").read_text() == (dataset / "test.jsonl").read_text()
    true, drawn = (data.load_rows(folder, "train") for folder in (dataset, tmp_path))
    assert [row.label for row in true] == [row.label for row in drawn]
    assert np.mean([abs(t.v - d.v) + abs(t.a - d.a) for t, d in zip(true, drawn)]) > 1


def test_labels_of_a_family_are_near_its_mean_and_a_fifth_of_the_outliers_are_anywhere(tmp_path, dataset):
    write_tiny(tmp_path / "family", 40, 1, labels="family")
    write_tiny(tmp_path / "outliers", 40, 1, labels="outliers")
    for row in data.load_rows(tmp_path / "family", "train"):
        v_mean, v_sd, a_mean, a_sd = data.FAMILIES[row.label]
        assert row.labels == "family" and abs(row.v - v_mean) < 5 * v_sd and abs(row.a - a_mean) < 5 * a_sd
    rows = data.load_rows(tmp_path / "outliers", "train")
    true = data.load_rows(dataset, "train")
    assert [(row.v, row.a) == (other.v, other.a) for row, other in zip(rows, true)].count(False) in range(1, 6)
    moved = [row for row in rows if data.nearest_emotion(row.v, row.a) != row.label]  # most outliers, and no other row
    assert 2 <= len(moved) <= 14 and {row.labels for row in rows} == {"true"}


@pytest.mark.parametrize("argv", [["--out", "x", "--train", "0"], ["--out", "x", "--labels", "none"], ["mend"], []])
def test_senseless_settings_end_with_one_line(tmp_path, monkeypatch, capsys, argv):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        program.main(argv)
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.startswith("error: ") and said.count("\n") == 1


def test_a_dataset_is_not_overwritten(tmp_path, capsys):
    args = ["--out", str(tmp_path), "--train", "2", "--test", "1"]
    assert program.main(args) == 0
    before = (tmp_path / "train.jsonl").read_bytes()
    assert program.main([*args, "--seed", "3"]) == 2
    assert "holds a dataset already" in capsys.readouterr().err and (tmp_path / "train.jsonl").read_bytes() == before


# --------------------------------------------------------------------------------------------------
# Hugging Face's imagefolder


def test_load_dataset_reads_the_rows_and_pictures_of_both_splits(dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()
    theirs = datasets.load_dataset("imagefolder", data_dir=str(dataset), cache_dir=str(tmp_path))
    for split in ("train", "test"):
        rows = data.load_rows(dataset, split)
        assert len(theirs[split]) == len(rows)
        for row, example in zip(rows, theirs[split], strict=True):
            assert (row.id, row.label, row.v, row.a, row.neutral) == tuple(example[key] for key in ("id", "label", "v", "a", "neutral"))
            assert (row.emotional or "") == example["emotional"] and example["image"].tobytes() == Image.open(row.image).tobytes()


def test_a_folder_with_metadata_only_gives_the_same_rows(dataset, tmp_path):
    shutil.copytree(dataset / "images", tmp_path / "images")
    shutil.copytree(dataset / "images" / "test", tmp_path / "other" / "test")
    for split in ("train", "test"):
        assert data.digest(data.load_rows(tmp_path, split)) == data.digest(data.load_rows(dataset, split))
    row = data.load_rows(tmp_path / "other", "test")[0]
    assert row.image.parent == tmp_path / "other" / "test" and row.emotional is None
    with pytest.raises(UserError, match="train.jsonl: missing"):
        data.load_rows(tmp_path / "other", "train")


@pytest.mark.parametrize("change, message", [
    ({"file_name": None}, "no 'file_name'"), ({"file_name": "/etc/a.png"}, "not in the subpath"), ({"file_name": "../../a.png"}, "lies outside of the folder"),
    ({"neutral": None}, "'neutral' is None"), ({"neutral": None, "text": "a lake"}, None), ({"id": None}, None)])
def test_lines_of_others_are_read_or_named(dataset, tmp_path, change, message):
    shutil.copytree(dataset / "images" / "test", tmp_path / "test")
    file = tmp_path / "test" / "metadata.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    rows[1] = {key: value for key, value in (rows[1] | change).items() if value is not None}
    file.write_text("\n".join(map(json.dumps, rows)))
    if message is None:
        row = data.load_rows(tmp_path, "test")[1]
        assert row.id == row.image.stem and row.neutral == change.get("text", row.neutral)
        return
    with pytest.raises(UserError, match=f"metadata.jsonl, line 2: .*{message}"):
        data.load_rows(tmp_path, "test")
