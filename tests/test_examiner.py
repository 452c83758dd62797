"""The examiner of content: it tells subjects and places apart, in pictures of any mood, also of pairs that no training has."""

import numpy as np
import pytest
import torch
from PIL import Image

from parts.cli import UserError
from tiny import examiner, scenes
from tiny.examiner import PLACES, SUBJECTS, Examiner


def rendered(count, reserved, seed=77):
    rng = np.random.default_rng(seed)
    rows = [scenes.random_scene(rng, reserved) for _ in range(count)]
    return rows, [scenes.render(scene, *rng.uniform(1, 9, 2)) for scene in rows]


@pytest.mark.parametrize("reserved", [False, True])
def test_it_recognises_subject_and_place_of_rendered_scenes(reserved):
    rows, images = rendered(120, reserved)
    found = Examiner.from_pretrained().recognise(images)
    right = np.mean([(s == row.subject, p == row.place) for row, (s, p) in zip(rows, found)], axis=0)
    assert right.min() > 0.9, right


def test_a_picture_without_a_subject_hardly_shows_any():
    rng = np.random.default_rng(0)
    rows, _ = rendered(60, False)
    prompts = [scenes.neutral_caption(row) for row in rows]
    plain = [Image.new("RGB", (128, 128), tuple(rng.integers(256, size=3).tolist())) for _ in rows]
    assert Examiner.from_pretrained().shows(plain, prompts).mean() < 0.3  # by chance a thirteenth of them


def test_shown_is_what_the_prompt_names():
    rows, images = rendered(20, False)
    model = Examiner.from_pretrained()
    found = [subject for subject, _ in model.recognise(images)]
    own = model.shows(images, [scenes.neutral_caption(row) for row in rows])
    assert own.tolist() == [float(subject == row.subject) for subject, row in zip(found, rows)]
    assert model.shows(images, ["a cat on a sofa"] * 20).tolist() == [0.0] * 20


@pytest.mark.parametrize("subject", SUBJECTS)
def test_a_subject_is_read_from_every_caption_of_it(subject):
    rng = np.random.default_rng(1)
    drawn = 0
    while drawn < 8:
        scene = scenes.random_scene(rng)
        if scene.subject == subject:
            drawn += 1
            assert examiner.subject_of(scenes.neutral_caption(scene)) == subject
            assert examiner.subject_of(scenes.emotional_caption(scene, 2, 8, rng)) == subject
    assert examiner.subject_of("a house") is None


def test_training_lowers_the_error_and_a_file_is_read_back(tmp_path, monkeypatch):
    monkeypatch.setattr(examiner.os, "cpu_count", lambda: 1)
    trained = examiner.train(128, 4, batch=32)
    subjects, places, pictures = examiner.draw_rows(0, 64)
    images = [Image.fromarray(picture) for picture in pictures]
    found = trained.recognise(images)
    assert np.mean([SUBJECTS[s] == subject for s, (subject, _) in zip(subjects, found)]) > 2 / 13
    examiner.weights.save(tmp_path / "e.safetensors", examiner.weights.named_views(trained))
    again = Examiner.from_pretrained(tmp_path / "e.safetensors")
    assert again.recognise(images) == found and {place for _, place in found} <= set(PLACES)
    with pytest.raises(UserError):
        Examiner.from_pretrained(tmp_path / "none.safetensors")


def test_its_scenes_are_of_all_pairs_and_of_seeds_of_its_own():
    rows = [examiner.draw_row(seed)[:2] for seed in range(150)]
    reserved = [place in scenes.RESERVED.get(subject, ()) for subject, place in rows]
    assert 0.1 < np.mean(reserved) < 0.4
    assert torch.is_tensor(examiner.to_pixels([Image.new("RGB", (30, 20))]))
