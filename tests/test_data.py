"""Emotions, their draws, the graded words, and datasets."""

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import data
from parts.cli import UserError
from prepare import check
from tiny import scenes

scale = st.floats(1, 9)


def level_of(phrase: str, levels) -> int:
    return next(i for i, words in enumerate(levels) if phrase in words)


def test_the_eight_classes_have_lexicon_entries_on_the_scale():
    assert len(data.EMOTIONS) == 8 and set(data.EMOTIONS) == set(data.LEXICON)
    assert all(1 <= v <= 9 and 1 <= a <= 9 and sv > 0 and sa > 0 for v, sv, a, sa in data.LEXICON.values())


@pytest.mark.parametrize("label", data.EMOTIONS)
def test_draws_stay_on_the_scale_and_centre_on_the_lexicon(label):
    rng = np.random.default_rng(0)
    draws = np.array([data.draw_va(label, rng) for _ in range(2000)])
    assert draws.min() >= 1 and draws.max() <= 9
    v_mean, _, a_mean, _ = data.LEXICON[label]
    assert np.allclose(np.median(draws, 0), (v_mean, a_mean), atol=0.3)  # clipping leaves the median where it was


def test_draws_repeat_with_the_seed():
    first, second = (data.draw_va("awe", np.random.default_rng(7)) for _ in range(2))
    assert first == second


def test_the_nearest_emotion_is_the_likeliest_class():
    assert data.nearest_emotion(2.0, 1.5) == "sadness"
    assert data.nearest_emotion(8.5, 8.0) == "excitement"
    assert data.nearest_emotion(2.9, 8.0) in ("fear", "anger")

    def density(label, v, a):
        vm, vs, am, sa = data.LEXICON[label]
        return math.exp(-(((v - vm) / vs) ** 2) / 2) / vs * math.exp(-(((a - am) / sa) ** 2) / 2) / sa

    for v, a in np.random.default_rng(0).uniform(1, 9, (50, 2)):
        best = data.nearest_emotion(v, a)
        assert all(density(best, v, a) >= density(other, v, a) - 1e-12 for other in data.EMOTIONS)


@given(scale, scale, scale, scale, st.none() | st.integers(0, 999))
def test_word_levels_never_fall_as_valence_or_arousal_rises(v1, v2, a1, a2, seed):
    low, high = (min(v1, v2), min(a1, a2)), (max(v1, v2), max(a1, a2))
    phrases = []
    for v, a in (low, high):
        phrases.append(data.emotion_words(v, a, None if seed is None else np.random.default_rng(seed)).split(", "))
    for column, levels in ((0, data.VALENCE_WORDS), (1, data.AROUSAL_WORDS)):
        assert level_of(phrases[0][column], levels) <= level_of(phrases[1][column], levels)


def test_every_level_of_both_scales_is_reached():
    grid = np.linspace(1, 9, 81)
    assert len({data.emotion_words(v, 5).split(", ")[0] for v in grid}) == 7
    assert len({data.emotion_words(5, a).split(", ")[1] for a in grid}) == 7


def test_no_phrase_serves_two_levels():
    for levels in (data.VALENCE_WORDS, data.AROUSAL_WORDS):
        phrases = [phrase for words in levels for phrase in words]
        assert len(phrases) == len(set(phrases)) and all(len(words) >= 3 for words in levels)


@given(scale, scale, st.integers(0, 10**6))
def test_the_phrase_has_six_to_fourteen_words(v, a, seed):
    for words in (data.emotion_words(v, a), data.emotion_words(v, a, np.random.default_rng(seed))):
        assert 6 <= len(words.split()) <= 14


def test_without_a_generator_the_words_are_the_first_synonyms():
    assert data.emotion_words(9, 9) == "blissful, wildly intense, brilliant sun, vivid colours"
    assert data.emotion_words(1, 9).endswith("storm and lightning, harsh contrast")
    varied = {data.emotion_words(9, 9, np.random.default_rng(k)) for k in range(40)}
    assert len(varied) > 5


def test_prompts_carry_words_or_numbers():
    assert data.with_words("a lake", 9, 9) == "a lake, " + data.emotion_words(9, 9)
    assert data.with_numbers("a lake", 7, 3) == "a lake, valence 7.0, arousal 3.0"


@pytest.mark.parametrize("bad", [0.99, 9.01, float("nan"), float("inf"), "much", None])
def test_values_off_the_scale_are_refused(bad):
    for call in (data.check_va, data.emotion_words, data.nearest_emotion, lambda v, a: data.with_numbers("x", v, a)):
        with pytest.raises(ValueError, match="1..9"):
            call(bad, 5)
        with pytest.raises(ValueError, match="arousal"):
            call(5, bad)


def test_an_unknown_class_is_refused():
    with pytest.raises(ValueError, match="joy"):
        data.draw_va("joy", np.random.default_rng(0))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dataset")
    assert data.main(["tiny", "--out", str(folder), "--train", "12", "--test", "5"]) is None
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
    data.main(["tiny", "--out", str(tmp_path), "--train", "12", "--test", "5", "--labels", "drawn"])
    assert (tmp_path / "test.jsonl").read_text() == (dataset / "test.jsonl").read_text()
    true, drawn = (data.load_rows(folder, "train") for folder in (dataset, tmp_path))
    assert [row.label for row in true] == [row.label for row in drawn]
    assert np.mean([abs(t.v - d.v) + abs(t.a - d.a) for t, d in zip(true, drawn)]) > 1


@pytest.mark.parametrize("change, message", [
    ({"v": 12}, "valence must be a finite number in 1..9, got 12"), ({"label": "joy"}, "unknown label 'joy'"),
    ({"image": "images/none.png"}, "no picture"), ({"neutral": None}, "no 'neutral'")])
def test_an_unusable_row_is_named(dataset, tmp_path, change, message):
    rows = [json.loads(line) for line in (dataset / "test.jsonl").read_text().splitlines()]
    rows[2] = {k: v for k, v in (rows[2] | change).items() if v is not None}
    (tmp_path / "images").symlink_to(dataset / "images")
    (tmp_path / "test.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(UserError, match=r"test.jsonl, line 3: .*mend or remove") as caught:
        data.load_rows(tmp_path, "test")
    assert message in str(caught.value)


def test_a_missing_or_empty_dataset_says_what_to_do(tmp_path):
    with pytest.raises(UserError, match=r"data.py tiny --out"):
        data.load_rows(tmp_path, "train")
    (tmp_path / "train.jsonl").write_text("")
    with pytest.raises(UserError, match="no rows"):
        data.load_rows(tmp_path, "train")


# ---------------------------------------------------------------------------------------------------------------------
# Check


@pytest.fixture
def spoilt(dataset, tmp_path):
    """spoilt(split, number, change) puts a changed row, or any text, in place of a line; without, a copy of the dataset."""
    (tmp_path / "images").mkdir()
    for path in dataset.glob("images/*"):
        (tmp_path / "images" / path.name).hardlink_to(path)
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
    assert data.main(["check", str(spoilt.folder)]) == 0
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and "no problems; 12 train rows, 5 test rows" in said and "classes: " in said
    spoilt("train", 2, {"emotional": "absent"})  # may be absent
    assert check.check_dataset(spoilt.folder)[0] == []
    (spoilt.folder / "train.jsonl").unlink()
    assert data.main(["check", str(spoilt.folder)]) == 0 and "no problems; 5 test rows" in capsys.readouterr().out


@pytest.mark.parametrize("split, change, message", [
    ("test", b"{", "no JSON ("), ("test", b"\xff", "no JSON ("), ("test", b"", "no row; remove the line"),
    ("test", b"[1]", "no JSON object"), ("test", {"v": "absent", "neutral": "absent"}, "no 'v', 'neutral'; add"),
    ("test", {"v": 9.5}, "valence must be a finite number in 1..9, got 9.5; mend"),
    ("train", {"a": None}, "arousal must be a number in 1..9"), ("train", {"label": "joy"}, "unknown label 'joy'; give"),
    ("train", {"neutral": " "}, "'neutral' is ' ', expected a caption"), ("train", {"emotional": ""}, "'emotional' is ''"),
    ("test", {"emotional": "so sad"}, "a test row with an emotional caption"), ("test", {"id": "a/b"}, "cannot name a file"),
    ("test", {"id": "train_1000001"}, "the id 'train_1000001' is that of train.jsonl, line 2, too"),
    ("train", {"id": "train_1000001"}, "the id 'train_1000001' is that of train.jsonl, line 2, too"),
    ("test", {"image": "images/none.png"}, "images/none.png is missing; put it there"),
    ("test", {"image": "../x.png"}, "lies outside the folder"), ("test", {"image": 3}, "lies outside the folder"),
    ("test", {"image": "images"}, "images cannot be decoded"), ("test", {"image": "train.jsonl"}, "is no picture"),
    ("test", {"image": "images/train_1000004.png"}, "is that of train.jsonl, line 5 too; remove one")])
def test_every_problem_is_a_line_with_file_row_and_remedy(spoilt, capsys, split, change, message):
    spoilt(split, 3, change)
    assert data.main(["check", str(spoilt.folder)]) == 1
    problem, count = capsys.readouterr().out.splitlines()
    assert problem.startswith(f"{spoilt.folder / split}.jsonl, line 3: ") and message in problem and count == "problems: 1"


def test_all_problems_are_listed_in_the_order_of_the_rows(spoilt, capsys):
    spoilt("test", 4, {"v": 0, "label": "joy", "image": "images/none.png"})
    spoilt("train", 12, b"?")
    picture = spoilt.folder / "images" / "train_1000003.png"
    content = picture.read_bytes()
    picture.unlink()
    picture.write_bytes(content[:len(content) // 2])
    assert data.main(["check", str(spoilt.folder)]) == 1
    said = capsys.readouterr().out.splitlines()
    assert [line.partition(": ")[0].rpartition("/")[2] for line in said[:-1]] == [
        "train.jsonl, line 4", "train.jsonl, line 12", *["test.jsonl, line 4"] * 3]
    assert "cannot be decoded (" in said[0] and said[-1] == "problems: 5"


@pytest.mark.parametrize("argv", [["check", "nowhere"], ["check"], ["tiny", "--out", "x", "--train", "0"], ["mend"], []])
def test_what_is_no_dataset_or_command_ends_with_one_line(tmp_path, monkeypatch, capsys, argv):
    monkeypatch.chdir(tmp_path)
    try:
        code = data.main(argv)
    except SystemExit as stop:
        code = stop.code
    said = capsys.readouterr().err
    assert code == 2 and said.startswith("error: ") and said.count("\n") == 1
