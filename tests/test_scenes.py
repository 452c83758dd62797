"""The miniature world: pictures, captions and the meter."""

import re
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageFilter

import data
from tiny import scenes

CORNERS = {"gloomy": (2, 2), "threatening": (2, 8), "serene": (8, 2), "joyful": (8, 8)}


def some_scenes(count, seed=0):
    rng = np.random.default_rng(seed)
    return [scenes.random_scene(rng) for _ in range(count)]


def pixels(image):
    return np.asarray(image, float)


def words(text):
    return re.findall(r"[a-z][a-z-]*", text.lower())


def test_the_same_scene_and_mood_give_the_same_bytes():
    for scene in some_scenes(5):
        assert scenes.render(scene, 3.3, 6.1).tobytes() == scenes.render(scene, 3.3, 6.1).tobytes()
    assert some_scenes(5) == some_scenes(5)


@pytest.mark.parametrize("subject", scenes.SUBJECTS)
def test_every_subject_can_be_drawn_in_each_of_its_places_at_any_size(subject):
    base = replace(some_scenes(1)[0], subject=subject)
    for k, place in enumerate(scenes.WATERS if subject in scenes.AFLOAT else scenes.PLACES):
        size = (32, 48, 64)[k % 3]
        image = scenes.render(replace(base, place=place, time=list(scenes.TIMES)[k % 4]), 6, 4, size)
        assert image.mode == "RGB" and image.size == (size, size)


def test_the_picture_is_the_same_at_another_size():
    for scene in some_scenes(3):
        large = scenes.render(scene, 6, 5, 256).resize((64, 64), Image.BOX)
        assert np.abs(pixels(large) - pixels(scenes.render(scene, 6, 5, 64))).mean() < 8


def test_a_small_change_of_mood_is_a_small_change_of_the_picture():
    for scene in some_scenes(4, seed=3):
        for v, a in [(v, a) for v in (1, 3, 5, 7) for a in (1, 3, 5, 7)]:
            here = pixels(scenes.render(scene, v, a, 64))
            for dv, da in ((0.1, 0), (0, 0.1)):
                change = np.abs(pixels(scenes.render(scene, v + dv, a + da, 64)) - here)
                assert change.mean() < 4  # of 255


def test_a_great_change_of_mood_is_a_great_change_of_the_picture():
    for scene in some_scenes(6):
        corners = [pixels(scenes.render(scene, v, a, 64)) for v, a in CORNERS.values()]
        for i in range(4):
            for j in range(i):
                assert np.abs(corners[i] - corners[j]).mean() > 15


def test_mean_brightness_and_saturation_follow_valdez_and_mehrabian():
    for scene in some_scenes(8):
        for v, a in ((2, 2), (2, 8), (5, 5), (8, 2), (8, 8)):
            brightness, saturation = scenes.statistics(scenes.render(scene, v, a))[:2]
            assert np.allclose((brightness, saturation), scenes.targets(v, a), atol=0.02)


def test_targets_invert_the_published_equations():
    (b0, half_b), (s0, half_s) = scenes.BRIGHTNESS_RANGE, scenes.SATURATION_RANGE
    pleasure, arousal = [], []
    for v, a in ((5, 5), (7, 5), (9, 5), (5, 7), (5, 9)):
        b, s = scenes.targets(v, a)
        scale = np.abs(np.linalg.inv([[0.69, 0.22], [-0.31, 0.60]])).sum(1)
        b, s = (b - b0) / half_b * scale[0], (s - s0) / half_s * scale[1]
        pleasure.append(0.69 * b + 0.22 * s)
        arousal.append(-0.31 * b + 0.60 * s)
    assert np.allclose(pleasure, (0, 0.5, 1, 0, 0)) and np.allclose(arousal, (0, 0, 0, 0.5, 1))


def test_the_meter_orders_the_four_corners():
    for scene in some_scenes(10, seed=5):
        read = {name: scenes.measure_va(scenes.render(scene, v, a)) for name, (v, a) in CORNERS.items()}
        assert min(read["serene"][0], read["joyful"][0]) > max(read["gloomy"][0], read["threatening"][0]) + 3
        assert min(read["threatening"][1], read["joyful"][1]) > max(read["gloomy"][1], read["serene"][1]) + 3


def test_the_meter_reads_held_out_scenes_also_when_blurred_or_noisy():
    noise, errors = np.random.default_rng(0), {"clean": [], "blurred": [], "noisy": []}
    rng = np.random.default_rng(424242)
    for scene in some_scenes(150, seed=424242):
        v, a = rng.uniform(1, 9, 2)
        image = scenes.render(scene, v, a)
        copies = (image, image.filter(ImageFilter.GaussianBlur(1)), scenes.add_noise(image, noise))
        for kind, copy in zip(errors, copies):
            errors[kind].append(np.abs(np.subtract(scenes.measure_va(copy), (v, a))))
    assert np.mean(errors["clean"], 0).max() <= 0.5
    assert np.mean(errors["blurred"], 0).max() <= 0.6
    assert np.mean(errors["noisy"], 0).max() <= 0.6


def test_the_meter_takes_any_size_and_stays_on_the_scale():
    scene = some_scenes(1)[0]
    readings = [scenes.measure_va(scenes.render(scene, 7, 3, size)) for size in (64, 128, 200)]
    assert np.ptp(readings, axis=0).max() < 0.5
    for colour in ("black", "white", "red", "lime"):
        for size in ((1, 1), (30, 50), (300, 200)):
            assert all(1 <= x <= 9 for x in scenes.measure_va(Image.new("RGB", size, colour)))


@pytest.mark.parametrize("bad", [Image.new("L", (64, 64)), Image.new("RGBA", (64, 64)), np.zeros((64, 64, 3)), "x.png"])
def test_the_meter_refuses_what_is_no_rgb_picture(bad):
    with pytest.raises(ValueError, match="RGB"):
        scenes.measure_va(bad)


def test_neutral_captions_are_short_and_free_of_mood():
    moods = {w for levels in (data.VALENCE_WORDS, data.AROUSAL_WORDS) for ws in levels for p in ws for w in words(p)}
    for scene in some_scenes(500):
        caption = scenes.neutral_caption(scene)
        assert 5 <= len(caption.split()) <= 12
        assert not moods & set(words(caption)) and not set(data.EMOTIONS) & set(words(caption))
        assert all(part in caption for part in scenes.content_words(scene))


def test_emotional_captions_keep_the_content_and_stay_short_in_a_small_vocabulary():
    rng, vocabulary = np.random.default_rng(0), set()
    for scene in some_scenes(1500):
        v, a = rng.uniform(1, 9, 2)
        caption = scenes.emotional_caption(scene, v, a, rng)
        assert caption.startswith(scenes.neutral_caption(scene)) and len(caption.split()) <= 28
        vocabulary |= set(words(caption))
    assert len(vocabulary) < 600


def test_captions_hold_no_word_that_was_never_learned_and_other_words_are_named():
    rng = np.random.default_rng(1)
    for scene in some_scenes(100):
        assert scenes.remark_on(scenes.emotional_caption(scene, *rng.uniform(1, 9, 2), rng)) == ""
    assert scenes.remark_on(data.with_numbers("Two castles near the lake", 7, 3)).startswith("the miniature never learned 'two';")
    remark = scenes.remark_on("a cat, a cat and a 猫")
    assert "learned 'cat', '猫'; it draws a lone tree" in remark and "sunflower, each by or over lake, sea" in remark


def test_without_a_generator_the_emotional_caption_is_fixed():
    scene = some_scenes(1)[0]
    assert scenes.emotional_caption(scene, 8, 2) == scenes.emotional_caption(scene, 8, 2)
    assert scenes.emotional_caption(scene, 8, 2).endswith(data.emotion_words(8, 2))
    varied = {scenes.emotional_caption(scene, 8, 2, np.random.default_rng(k)) for k in range(30)}
    assert len(varied) > 10


def test_facts_name_what_is_in_the_picture():
    scene = replace(some_scenes(1)[0], subject="tree", place="snow", time="night")
    seen = scenes.facts(scene, 2, 8)
    assert set(seen) == {"subject", "place", "time", "weather", "light", "colour", "motion"}
    assert "tree" in seen["subject"] and "snow" in seen["place"] and "storm" in seen["weather"]
    assert all(scenes.facts(scene, 8, 8)[key] != seen[key] for key in ("weather", "light", "colour"))


def test_random_scenes_cover_the_world_and_boats_stay_on_water():
    drawn = some_scenes(600)
    assert {s.subject for s in drawn} == set(scenes.SUBJECTS) and {s.place for s in drawn} == set(scenes.PLACES)
    assert {s.time for s in drawn} == set(scenes.TIMES)
    assert all(s.place in scenes.WATERS for s in drawn if s.subject in scenes.AFLOAT)


@pytest.mark.parametrize("v, a, size", [(0, 5, 64), (5, 9.5, 64), (float("nan"), 5, 64), (5, 5, 0), (5, 5, 12.5)])
def test_moods_off_the_scale_and_senseless_sizes_are_refused(v, a, size):
    with pytest.raises(ValueError):
        scenes.render(some_scenes(1)[0], v, a, size)


def test_the_contact_sheet_shows_five_moods_of_each_scene():
    sheet = scenes.contact_sheet(columns=2, size=32)
    assert sheet.mode == "RGB" and sheet.size == (2 * 36, 5 * 36)
