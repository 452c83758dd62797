"""The linear head behind Emo-A: learnt from pictures, kept vectors, its file, and the metric."""

import json
import os

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

import data
from evaluation import emotion_head, metrics, run
from evaluation.cases import Case
from parts import clip, imagefolder
from parts.cli import UserError
from parts.pipeline import TINY

COLOURS = {"awe": (30, 60, 200), "anger": (200, 30, 30), "contentment": (60, 180, 60)}


def picture(label, rng):
    pixels = np.array(COLOURS[label]) + rng.integers(-25, 26, (64, 64, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Plain colours as pictures of three emotions, as a dataset of ours."""
    folder = tmp_path_factory.mktemp("dataset")
    rng = np.random.default_rng(0)
    for split, count in (("train", 30), ("test", 24)):
        rows = []
        for i in range(count):
            label = list(COLOURS)[i % 3]
            place = imagefolder.place_of(split, f"{split}_{i}", ".png")
            (folder / place).parent.mkdir(parents=True, exist_ok=True)
            picture(label, rng).save(folder / place)
            rows.append({"id": f"{split}_{i}", "image": place, "label": label, "v": 5.0, "a": 5.0, "neutral": "a tree",
                         **({"emotional": "a tree in spring"} if split == "train" else {})})
        imagefolder.write_split(folder, split, rows)
    return folder


@pytest.fixture(scope="module")
def head(dataset):
    path = dataset / "head.safetensors"
    assert emotion_head.main(["--data", str(dataset), "--clip", str(TINY / "clip"), "--out", str(path), "--device", "cpu"]) == 0
    return path


def test_a_head_learns_classes_and_keeps_what_it_was_made_of(head):
    with safe_open(head, "pt") as file:
        facts = json.loads(file.metadata()["emotion_head"])
        assert file.get_tensor("weight").shape[0] == len(data.EMOTIONS) == len(facts["classes"])
    assert facts["test_accuracy"] > 0.9 and facts["clip"] == str(TINY / "clip")
    assert {path.name for path in (head.parent / "head.safetensors.vectors").glob("*.npy")} == {
        f"{split}.npy" for split in emotion_head.SPLITS}


def test_vectors_that_are_there_are_not_made_again(head, dataset, monkeypatch, capsys):
    monkeypatch.setattr(clip, "embed_pictures", None)  # would raise
    assert emotion_head.main(["--data", str(dataset), "--clip", str(TINY / "clip"), "--out", str(head), "--device", "cpu"]) == 0
    assert "of 12 test pictures, weight decay" in capsys.readouterr().out


def test_vectors_of_another_clip_or_of_other_pictures_are_refused(head, dataset, capsys):
    flags = ["--data", str(dataset), "--out", str(head), "--device", "cpu"]
    assert emotion_head.main([*flags, "--clip", str(TINY / "other_clip")]) == 2
    assert "holds another head's vectors (clip changed); remove it or give another --out" in capsys.readouterr().err
    path = dataset / imagefolder.place_of("train", "train_0", ".png")
    before = path.read_bytes(), path.stat().st_mtime_ns
    path.write_bytes(before[0] + b"another")
    assert emotion_head.main([*flags, "--clip", str(TINY / "clip")]) == 2
    assert "(pictures changed)" in capsys.readouterr().err
    path.write_bytes(before[0])
    os.utime(path, ns=(before[1], before[1]))


def test_emo_a_is_the_share_of_pictures_of_the_wanted_class(head):
    rng = np.random.default_rng(1)
    instruments = run.Instruments({}, scorer=clip.CLIP.from_pretrained(TINY / "clip"), emotions=metrics.emotion_head(head))
    images = [picture(label, rng) for label in COLOURS]
    cases = [Case(label, "a tree", 5, 5, emotion=label) for label in COLOURS]
    assert run.scores_of(instruments, images, cases)["emo_a"].tolist() == [100.0] * 3
    wrong = [Case("x", "a tree", 5, 5, emotion="sadness")] * 3
    assert run.scores_of(instruments, images, wrong)["emo_a"].tolist() == [0.0] * 3
    assert Case("x", "a tree", 2.5, 6.0).label == data.nearest_emotion(2.5, 6.0)


def test_a_head_of_another_size_or_kind_is_refused(tmp_path, head):
    save_file({"weight": torch.zeros(1, 8), "bias": torch.zeros(1)}, tmp_path / "one.safetensors")
    with pytest.raises(UserError, match="not the layers of a head for the eight classes"):
        metrics.emotion_head(tmp_path / "one.safetensors")
    with pytest.raises(UserError, match="train it by `python -m evaluation.emotion_head`"):
        metrics.emotion_head(tmp_path / "missing.safetensors")
    small = [(torch.zeros(8, 4), torch.zeros(8))]
    with pytest.raises(ValueError, match="reads 4 numbers and this CLIP makes"):
        metrics.emotion_hits(clip.CLIP.from_pretrained(TINY / "clip"), small, [Image.new("RGB", (64, 64))], ["awe"])


def test_pictures_of_one_class_teach_nothing(dataset, tmp_path, capsys, monkeypatch):
    only = {split: [(dataset / "x.png", 0)] for split in emotion_head.SPLITS}
    monkeypatch.setattr(emotion_head, "pictures_of", lambda args: only)
    assert emotion_head.main(["--data", str(dataset), "--out", str(tmp_path / "h.safetensors")]) == 2
    assert "are of one class at most; expected several" in capsys.readouterr().err
