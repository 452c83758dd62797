"""The judge's last stage: feedback is learnt, and what is said of single pictures stays."""

import copy
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import qwen_vl
from parts.pipeline import TINY
from tiny import advice, lessons, pretrain, scenes


@pytest.fixture
def folders(tmp_path, monkeypatch):
    monkeypatch.setattr(pretrain, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(advice, "TRAINED", TINY / "judge")
    monkeypatch.setattr(advice, "SHIPPED", tmp_path / "judge")
    monkeypatch.setattr(advice, "EXAMINED", 4)
    monkeypatch.setattr(advice, "SCHEDULE", replace(advice.SCHEDULE, samples=64, batch=8))
    pretrain.main(["data", "--rows", "64"])
    return tmp_path


def test_a_stage_writes_a_judge_with_both_judges_figures_and_goes_on_where_it_was(folders, capsys):
    assert advice.main([]) == 0
    figures = json.loads((folders / "judge" / "figures.json").read_text())
    assert list(figures) == ["after GRPO", "with feedback"] and json.dumps(figures, indent=2) in capsys.readouterr().out
    for each in figures.values():
        assert 0 <= each["misses_right"] <= 1 and 0 < each["v_error"] < 3 and 0 < each["a_error"] < 3
        assert 0 < each["figures_off"] < 8
    saved = load_file(folders / "judge" / "model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.bfloat16}  # the miniature's weights have 24 MiB
    before = load_file(TINY / "judge" / "model.safetensors")
    assert saved.keys() == before.keys() and not all(torch.equal(saved[name], before[name]) for name in saved)
    weights = (folders / "judge" / "model.safetensors").read_bytes()
    assert advice.main([]) == 0  # its state says that it is done
    assert (folders / "judge" / "model.safetensors").read_bytes() == weights


def test_the_divergence_is_zero_for_the_judge_itself_and_pulls_another_back(folders):
    rows, pictures = pretrain.load_data()
    before = qwen_vl.QwenVL.from_pretrained(TINY / "judge", "cpu", torch.float32)
    material = pretrain.judge_material(before.processor, rows, pictures)
    prompts, _ = pretrain.lesson(material, "class", 4, np.random.default_rng(0))
    ids = advice.drawn_answers(before, list(prompts), torch.Generator().manual_seed(0))
    assert ids.shape[:2] == (2, advice.ANSWERS)
    assert float(advice.divergence(before, before, prompts, ids)) == pytest.approx(0, abs=1e-6)
    other = copy.deepcopy(before).requires_grad_()
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(1.01)
    losses = []
    for _ in range(3):
        loss = advice.divergence(other, before, prompts, ids)
        losses.append(float(loss.detach()))
        gradients = torch.autograd.grad(loss, list(other.parameters()))
        with torch.no_grad():
            for p, gradient in zip(other.parameters(), gradients):
                p.sub_(0.02 * gradient)
    assert losses[0] > losses[1] > losses[2] > 0


def test_without_a_judge_of_grpo_it_says_what_to_run(folders, monkeypatch, capsys):
    monkeypatch.setattr(advice, "TRAINED", folders / "nothing")
    assert advice.main([]) == 2
    assert "nothing: missing; run `python -m tiny.judge_study --rows step` first" in capsys.readouterr().err


def test_parts_of_an_answer_are_what_it_says_and_what_it_asks_for():
    rows = [(scenes.random_scene(np.random.default_rng(0)), 3.0, 4.0)] * 2
    said = lessons.comparison(*rows, np.random.default_rng(1))
    miss, asked = advice.parts_of(said.answer)
    assert miss.startswith("much too") and miss in said.answer and said.answer.endswith(f'valence {asked[0]}, arousal {asked[1]}"}}')
    assert advice.parts_of("no answer")[0] is None and np.isnan(advice.parts_of("no answer")[1]).all()
