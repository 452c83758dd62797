"""Emotions, their draws, the graded words, and datasets."""

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import data
from parts.cli import UserError
from tiny.dataset import write_tiny

scale = st.floats(1, 9)


def step_of(phrase: str, levels, leanings) -> int:
    """Which of the 21 steps of a scale a phrase stands for."""
    for i, words in enumerate(levels):
        for j, leaning in enumerate(leanings):
            if phrase in [f"{word} {leaning}".strip() for word in words]:
                return 3 * i + j
    raise AssertionError(phrase)


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
    for column, *words in ((0, data.VALENCE_WORDS, data.VALENCE_LEANINGS), (1, data.AROUSAL_WORDS, data.AROUSAL_LEANINGS)):
        assert step_of(phrases[0][column], *words) <= step_of(phrases[1][column], *words)


def test_every_level_of_both_scales_is_reached():
    grid = np.linspace(1, 9, 161)
    assert len({data.emotion_words(v, 5).split(", ")[0] for v in grid}) == 21
    assert len({data.emotion_words(5, a).split(", ")[1] for a in grid}) == 21


def test_no_phrase_serves_two_levels():
    for levels in (data.VALENCE_WORDS, data.AROUSAL_WORDS):
        phrases = [phrase for words in levels for phrase in words]
        assert len(phrases) == len(set(phrases)) and all(len(words) >= 3 for words in levels)


@given(scale, scale, st.integers(0, 10**6))
def test_the_phrase_has_six_to_eighteen_words(v, a, seed):
    for words in (data.emotion_words(v, a), data.emotion_words(v, a, np.random.default_rng(seed))):
        assert 6 <= len(words.split()) <= 18


def test_without_a_generator_the_words_are_the_first_synonyms():
    assert data.emotion_words(9, 9) == (
        "blissful leaning happier, wildly intense leaning livelier, brilliant sun, vivid colours")
    assert data.emotion_words(5, 5) == "neutral, steady, scattered clouds, plain daylight"
    assert data.emotion_words(1, 9).endswith("storm and lightning, harsh contrast")
    varied = {data.emotion_words(9, 9, np.random.default_rng(k)) for k in range(40)}
    assert len(varied) > 5


def test_prompts_carry_words_or_numbers():
    assert data.with_words("a lake", 9, 9) == "a lake, " + data.emotion_words(9, 9)
    assert data.with_numbers("a lake", 7, 3) == "a lake, valence 7.0, arousal 3.0"
    assert data.with_both("a lake", 7, 3) == data.with_words("a lake", 7, 3) + ", valence 7.0, arousal 3.0"
    numbers = {data.with_numbers("a lake", v / 10, 5) for v in range(60, 71)}
    assert len(numbers) == 11  # a step of 0.1 is another prompt


def test_the_full_form_has_both_captions_and_the_numbers():
    row = data.Row("0", None, "awe", 7, 3, "a lake", "a lake in golden light")
    assert row.prompt("full") == "a lake in golden light, valence 7.0, arousal 3.0"  # which has the neutral one in it
    other = data.Row("0", None, "awe", 7, 3, "a lake", "golden water")
    assert other.prompt("full") == "a lake, golden water, valence 7.0, arousal 3.0"
    assert data.Row("0", None, "awe", 7, 3, "a lake").prompt("full") == data.with_both("a lake", 7, 3)  # a test row


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
    write_tiny(folder, train=12, test=5)
    return folder


@pytest.mark.parametrize("change, message", [
    ({"v": 12}, "valence must be a finite number in 1..9, got 12"), ({"label": "joy"}, "unknown label 'joy'"),
    ({"labels": "guessed"}, "unknown labels 'guessed'"),
    ({"image": "images/none.png"}, "no picture"), ({"neutral": None}, "no 'neutral'")])
def test_an_unusable_row_is_named(dataset, tmp_path, change, message):
    rows = [json.loads(line) for line in (dataset / "test.jsonl").read_text().splitlines()]
    rows[2] = {k: v for k, v in (rows[2] | change).items() if v is not None}
    (tmp_path / "images").symlink_to(dataset / "images")
    (tmp_path / "test.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(UserError, match=r"test.jsonl, line 3: .*mend or remove") as caught:
        data.load_rows(tmp_path, "test")
    assert message in str(caught.value)


@pytest.mark.parametrize("change, message", [
    ({"image": "../a.png"}, "lies outside of the folder"), ({"neutral": ""}, "'neutral' is '', expected a caption"),
    ({"neutral": 7}, "'neutral' is 7"), ({"emotional": ["sad"]}, r"'emotional' is ['sad']"), ({"v": 1e400}, "finite number"),
    ({"v": None}, "must be a number"), ({"image": 3}, "")])
def test_training_reads_rows_by_the_rules_of_the_check(dataset, tmp_path, change, message):
    rows = [json.loads(line) for line in (dataset / "train.jsonl").read_text().splitlines()]
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "images").symlink_to(dataset / "images")
    (tmp_path / "a.png").write_bytes((dataset / rows[0]["image"]).read_bytes())
    rows[3] |= change
    (tmp_path / "data" / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(UserError, match=r"train.jsonl, line 4: .*mend or remove") as caught:
        data.load_rows(tmp_path / "data", "train")
    assert message in str(caught.value)


@pytest.mark.parametrize("line", [b"\xff\xfe{", b"[" * 100_000, b"[]", b"7", b'"text"', b"null"])
def test_a_line_that_is_no_row_is_named(tmp_path, line):
    (tmp_path / "train.jsonl").write_bytes(line + b"\n")
    with pytest.raises(UserError, match=r"train.jsonl, line 1: "):
        data.load_rows(tmp_path, "train")


def test_a_mark_of_the_byte_order_is_no_difficulty(dataset, tmp_path):
    (tmp_path / "images").symlink_to(dataset / "images")
    (tmp_path / "test.jsonl").write_bytes(b"\xef\xbb\xbf" + (dataset / "test.jsonl").read_bytes())
    rows = data.load_rows(tmp_path, "test")
    assert data.digest(rows) == data.digest(data.load_rows(dataset, "test"))
    assert data.digest(rows[:-1]) != data.digest(rows)


def test_a_missing_or_empty_dataset_says_what_to_do(tmp_path):
    with pytest.raises(UserError, match=r"python -m tiny.dataset --out"):
        data.load_rows(tmp_path, "train")
    (tmp_path / "train.jsonl").write_text("")
    with pytest.raises(UserError, match="no rows"):
        data.load_rows(tmp_path, "train")


def test_the_target_enters_a_rows_prompt_in_the_forms_asked_for():
    row = data.Row("1", "1.png", "awe", 7.25, 3.0, "a lake", "a still lake at dawn")
    assert row.prompt("neutral") == "a lake" and row.prompt("emotional") == "a still lake at dawn"
    assert row.prompt("numbers") == data.with_numbers("a lake", 7.25, 3.0)
    assert row.prompt("words") == data.with_words("a lake", 7.25, 3.0)
    without = data.Row("1", "1.png", "awe", 7.25, 3.0, "a lake")
    assert without.prompt("emotional") == row.prompt("words")


def test_no_figure_of_the_lexicon_and_of_the_families_has_been_changed_by_mistake():
    for table, sums in ((data.LEXICON, (39.24, 13.65, 39.34, 21.05)), (data.FAMILIES, (39.89, 4.10, 40.60, 5.99))):
        assert np.sum(list(table.values()), axis=0) == pytest.approx(sums, abs=1e-9)
