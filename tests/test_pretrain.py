"""The miniature's training, from drawing its data to a folder that sample.py draws from; and going on after a kill."""

import argparse
import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import data
import feedback
import grpo
import qwen_vl
from parts import clip
from parts.cli import UserError
from parts.pipeline import TINY, load_generator
from parts.prompts import lost_words
from tiny import lessons, pretrain, scenes

WEIGHT_FILES = ("vae/diffusion_pytorch_model", "text_encoder/model", "text_encoder_2/model", "clip/model",
                "transformer/diffusion_pytorch_model", "aesthetic")  # the judge's are written by judge_study.py


def stage(name, folder, monkeypatch, *arguments):
    monkeypatch.setattr(pretrain, "CACHE", folder / "cache")
    monkeypatch.setattr(pretrain, "WEIGHTS", folder / "weights")
    return pretrain.main([name, *map(str, arguments)])


def test_all_stages_from_nothing_give_a_checkpoint_that_draws(tmp_path, monkeypatch, capsys):
    for name, schedule in pretrain.SCHEDULES.items():  # enough steps for each task of the judge, but small ones
        monkeypatch.setitem(pretrain.SCHEDULES, name, replace(schedule, batch=schedule.batch // 4))
    assert stage("all", tmp_path, monkeypatch, "--rows", 160, "--samples", 64) == 0
    printed = capsys.readouterr().out
    assert "PSNR" in printed and "other_clip: a picture" in printed and "13 held-out pictures" in printed
    for name in WEIGHT_FILES:
        assert (tmp_path / "weights" / f"{name}.safetensors").exists()
    judge = qwen_vl.QwenVL.from_pretrained(tmp_path / "cache" / "judge")
    assert judge.config.tied and len(judge.processor(feedback.ask("class", Image.new("RGB", (128, 128)))).ids) < 200
    generator = load_generator(tmp_path / "weights")
    pictures = generator.draw(["a swan on the lake at noon"], [0], 64, steps=2)
    assert pictures.shape == (1, 3, 64, 64)
    # the data: drawn scenes with their V and A over the whole square, captions mostly of words
    rows, pixels = pretrain.load_data()
    assert len(rows) == 160 and pixels.shape == (160, 128, 128, 3)
    rng = np.random.default_rng(0)
    captions = [pretrain.caption(rows[i % 160], rng) for i in range(4000)]
    share = {"empty": np.mean([c == "" for c in captions]), "numbers": np.mean(["valence" in c for c in captions])}
    assert abs(share["empty"] - 0.10) < 0.02 and abs(share["numbers"] - 0.15) < 0.03


def numbers_said(va, count=2000, **settings):
    """[count,2] V and A in the captions of one scene that carry numbers."""
    rng = np.random.default_rng(0)
    row, said = (scenes.random_scene(rng), *va), []
    while len(said) < count:
        found = re.search(r"valence (\S+), arousal (\S+)$", pretrain.caption(row, rng, numbers=0.8, **settings))
        said += [tuple(map(float, found.groups()))] if found else []
    return np.array(said)


def test_numbers_in_captions_are_exact_or_drawn_from_the_gaussians_of_the_class():
    said = numbers_said((6.9, 3.8))
    label = data.nearest_emotion(6.9, 3.8)
    drawn = np.array([data.draw_va(label, np.random.default_rng(k)) for k in range(4000)])
    assert said.min() >= 1 and said.max() <= 9
    assert said.mean(0) == pytest.approx(drawn.mean(0), abs=0.15) and said.std(0) == pytest.approx(drawn.std(0), rel=0.1)
    assert np.array_equal(numbers_said((6.0, 4.0), 20, exact=True), [(6.0, 4.0)] * 20)


def test_few_captions_have_numbers_and_a_fifth_of_these_words_too():
    rng = np.random.default_rng(0)
    row = (scenes.random_scene(rng), 9.0, 9.0)
    captions = [pretrain.caption(row, rng) for _ in range(6000)]
    numbers = [text for text in captions if "valence" in text]
    words = [text for text in numbers if any(word in text for level in data.VALENCE_WORDS for word in level)]
    assert len(numbers) / 6000 == pytest.approx(0.15, abs=0.015)
    assert len(words) / len(numbers) == pytest.approx(pretrain.BOTH, abs=0.04)


def test_no_stage_sees_a_reserved_pair():
    rng = np.random.default_rng(0)
    pairs = {(scene.subject, scene.place) for scene in (pretrain.draw_row(seed)[0] for seed in range(120))}
    for _ in range(2000):
        scene = scenes.random_scene(rng)
        pairs |= {(each.subject, each.place) for each in (scene, scenes.with_other_words(scene, rng))}
    reserved = {(subject, place) for subject, places in scenes.RESERVED.items() for place in places}
    assert len(reserved) == 20 and len(pairs) == 72 and not pairs & reserved
    tested = {(scene.subject, scene.place) for scene in (scenes.random_scene(rng, reserved=True) for _ in range(2000))}
    assert tested == reserved


def tiny_run(tmp_path, monkeypatch, stop_at=None):
    """Train a small regression for 12 steps with pretrain.train, killed inside step `stop_at` if given."""
    monkeypatch.setattr(pretrain, "CACHE", tmp_path)
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 3)

    def loss_of(step, generator, rng, batch):
        if step == stop_at:
            raise KeyboardInterrupt
        x = torch.randn(batch, 4, generator=generator) * float(rng.uniform(0.5, 1))
        loss = (model(x) - x[:, :3]).pow(2).mean()
        return loss, {"loss": float(loss.detach())}

    args = argparse.Namespace(seed=0, save_every=0, samples=None, minutes=None)
    schedule = pretrain.Schedule(12 * 8, batch=8, lr=1e-2, weight_decay=0.0, ema=0.9)
    pretrain.train("small", [model], loss_of, args, schedule)
    return model


def test_a_killed_stage_goes_on_and_ends_where_it_would_have(tmp_path, monkeypatch):
    (tmp_path / "whole").mkdir()
    whole = tiny_run(tmp_path / "whole", monkeypatch)
    (tmp_path / "killed").mkdir()
    with pytest.raises(KeyboardInterrupt):
        tiny_run(tmp_path / "killed", monkeypatch, stop_at=7)
    again = tiny_run(tmp_path / "killed", monkeypatch)
    assert torch.equal(whole.weight, again.weight) and torch.equal(whole.bias, again.bias)
    steps = [json.loads(line)["step"] for line in (tmp_path / "killed" / "small.log").read_text().splitlines()]
    assert steps == list(range(1, 13))


def test_a_state_of_another_seed_or_of_other_inputs_is_refused(tmp_path, monkeypatch):
    tiny_run(tmp_path, monkeypatch)
    args = argparse.Namespace(seed=0, save_every=0, samples=None, minutes=None)
    model = torch.nn.Linear(4, 3)
    for seed, inputs in ((1, ""), (0, "another judge")):
        args.seed = seed
        with pytest.raises(UserError, match="began with another --seed or other inputs; delete it to start over"):
            pretrain.train("small", [model], None, args, pretrain.Schedule(96, batch=8, lr=1e-2, weight_decay=0.0, ema=0.9), inputs)


def test_latents_are_those_of_the_pictures_and_the_encoder_that_are_there(tmp_path, monkeypatch):
    monkeypatch.setattr(pretrain, "CACHE", tmp_path)
    first = np.zeros((3, 128, 128, 3), np.uint8)
    dark = np.array(pretrain.encode_latents(first))
    written = (tmp_path / "latents.npy").stat().st_mtime_ns
    assert np.array_equal(pretrain.encode_latents(first), dark) and (tmp_path / "latents.npy").stat().st_mtime_ns == written
    light = np.array(pretrain.encode_latents(first + 200))
    assert light.shape == dark.shape and not np.array_equal(light, dark)


def test_the_shipped_weights_fit_the_repository():
    files = [p for p in TINY.rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in files) <= 24 * 2**20
    assert {p.suffix for p in files} <= {".safetensors", ".json", ".txt", ".jinja"}


def test_lessons_are_answers_as_grpo_rewards_them_with_values_of_the_class():
    rng = np.random.default_rng(0)
    for _ in range(30):
        scene, (v, a) = scenes.random_scene(rng), rng.uniform(1, 9, 2)
        label = data.nearest_emotion(v, a)
        answers = [lessons.answer("regression", scene, v, a, rng) for _ in range(40)]
        told = [feedback.read_answer(answer, "regression") for answer in answers]
        moods = {word for level in (*data.VALENCE_WORDS, *data.AROUSAL_WORDS) for word in level}
        assert not any(mood in answer for mood in moods for answer in answers)  # no word is a level of mood
        mean, sd = np.mean(told, axis=0), np.std(told, axis=0)
        assert abs(mean[0] - data.LEXICON[label][0]) < 1.5 and sd[0] > 0.5  # noise around the class, not the scene's own
        assert grpo.class_reward(lessons.answer("class", scene, v, a, rng), label) == 1
        assert scenes.NAMES[scene.subject] in lessons.thought(scene, v, a)
        assert lessons.description(scene, v, a).startswith(lessons.thought(scene, v, a))
    bright = [lessons.description(scene, v, 5.0).split("brightness is ")[1][:2] for v in (1, 3, 5, 7, 9)]
    assert bright == sorted(bright)


def said_values(prompt):
    """V and A of a prompt's numbers, else the middles of the levels of its words, else None."""
    found = re.search(r"valence (\S+), arousal (\S+)$", prompt)
    if found:
        return [float(x) for x in found.groups()]
    levels = [next((i for i, words in enumerate(table) if any(word in prompt for word in words)), None)
              for table in (data.VALENCE_WORDS, data.AROUSAL_WORDS)]
    return None if None in levels else [1 + 8 * (level + 0.5) / 7 for level in levels]


def test_lessons_of_feedback_keep_the_subject_and_ask_for_as_much_more_as_the_better_picture_missed():
    rng, tokenize = np.random.default_rng(1), clip.PromptTokenizer(TINY / "tokenizer")
    kinds, told = set(), []
    for _ in range(300):
        scene = scenes.random_scene(rng)
        rows = [(scene, *map(float, rng.uniform(1, 9, 2))) for _ in range(2)]
        said = lessons.comparison(*rows, rng)
        better, worse = (np.abs(np.subtract(row[1:], said.wish)).sum() for row in rows[::said.order])
        assert better <= worse and said.prompt.startswith(said.request)
        told.append(said.request == scenes.neutral_caption(scene))
        analysis, prompt = feedback.read_rewrite(said.answer, said.request)
        assert feedback.read_rewrite(said.brief, said.request) == (analysis[analysis.rindex("The first"):], prompt)
        assert lost_words(said.request, prompt) == [] and len(tokenize.tokenizer.encode(prompt).ids) < pretrain.TEXT_LENGTH
        # the analysis agrees with the scores that the question gives, and the prompt with the analysis
        before, after = said_values(said.prompt), said_values(prompt)
        kinds.add("numbers" if "valence" in said.prompt else "words" if before is not None else "nothing")
        asked = before if "valence" in said.prompt else said.wish
        question = feedback.ask_compare(said.request, said.prompt, *said.wish, (None, *said.best), (None, *said.worst))
        for axis, name, low, high in ((0, "valence", "sad", "pleasant"), (1, "arousal", "calm", "excited")):
            off = round(said.best[axis] - said.wish[axis], 1)
            miss = f"{abs(off):.1f} too {'high' if off > 0 else 'low'}" if off else "right"
            assert f"{name} {said.best[axis]:.2f}, which is {miss}" in question[1]["content"][-1]["text"]
            assert lessons.amount(off, low, high) in analysis
            assert f"{name} {round(asked[axis], 1):.1f} " in analysis and f"for {after[axis]:.1f}" in analysis
            assert after[axis] == pytest.approx(min(max(round(asked[axis], 1) - off, 1), 9), abs=1e-6)
    assert kinds == {"numbers", "words", "nothing"} and 0.4 < np.mean(told) < 0.6  # the pictures show other things, else


@pytest.mark.parametrize("difference, words", [(0.0, "neither too sad nor too pleasant"), (-0.3, "barely too sad, by 0.3"), (
    0.4, "a little too pleasant, by 0.4"), (-1.2, "much too sad, by 1.2")])
def test_the_grade_of_a_miss_is_that_of_its_size(difference, words):
    assert lessons.amount(difference, "sad", "pleasant") == words


def test_a_rewrite_without_pictures_asks_for_the_wish_itself():
    scene = scenes.random_scene(np.random.default_rng(0))
    _, prompt = feedback.read_rewrite(lessons.rewrite(scene, (8, 2)), scenes.neutral_caption(scene))
    assert prompt == data.with_both(scenes.neutral_caption(scene), 8, 2)


def test_a_stage_without_data_says_what_to_run(tmp_path, monkeypatch, capsys):
    assert stage("vae", tmp_path, monkeypatch) == 2
    assert "run `python -m tiny.pretrain data` first" in capsys.readouterr().err
