"""Rewards and metrics of baselines/: chosen by name, trained on and watched, measured, and never imported unasked."""

import re
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image

import train_gen
from baselines import image_reward as rewards
from evaluation import run, tables
from evaluation.cases import Case
from evaluation.run import Instruments
from parts import scorers
from parts.cli import ROOT
from parts.files import read_records
from tests.launch import log_of
from tests.test_baseline_image_reward import IMAGE, TEXT, preference, written  # noqa: F401, fixtures
from tiny.dataset import write_tiny


@pytest.fixture
def small(monkeypatch, written, preference):  # noqa: F811
    """Flags that name random models, which are then loaded in their small size."""
    text, vision = preference[3]
    monkeypatch.setattr(rewards, "load_image_reward", partial(rewards.load_image_reward, image=IMAGE, text=TEXT))
    monkeypatch.setattr(rewards, "load_hps", partial(rewards.load_hps, text=text, vision=vision))
    return [f"--scorer=imagereward={written[0]}", f"--scorer=hpsv2={preference[0]}"]


def test_names_with_and_without_a_source_and_weights_choose():
    assert scorers.named("hpsv2=a=b") == ("hpsv2", "a=b") and scorers.named("imagereward")[1] == "THUDM/ImageReward"
    assert scorers.chosen(None, {"emotion": 1.0}) is None and scorers.files_of(None) == scorers.load(None, "cpu") == []
    given = [("imagereward", "here")]
    assert scorers.chosen(given, {"hpsv2": 1.0, "imagereward": 2.0}) == {"hpsv2": "xswu/HPSv2", "imagereward": "here"}


def test_what_is_downloaded_is_asked_for_by_name_and_a_tokenizer_beside_the_file_is_taken(written):  # noqa: F811
    asked = scorers.files_of({"imagereward": "THUDM/ImageReward", "hpsv2": "xswu/HPSv2"})
    assert asked[0] == ("THUDM/ImageReward", ["ImageReward.pt"]) and asked[2] == ("xswu/HPSv2", ["HPS_v2.1_compressed.pt"])
    assert [source for source, _ in asked[1::2]] == ["google-bert/bert-base-uncased", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"]
    for source in (written[0], written[0] / "ImageReward.pt"):
        assert scorers.files_of({"imagereward": source})[1][0] == written[0]


@pytest.mark.parametrize("program", [train_gen.parse_args, run.parse_args])
def test_an_unknown_name_is_one_line(program, capsys):
    with pytest.raises(SystemExit):
        program(["--scorer", "beauty"])
    assert "--scorer: expected one of imagereward, hpsv2, or NAME=FOLDER, got beauty" in capsys.readouterr().err


def test_a_weighted_one_is_trained_on_and_one_without_weight_is_watched(small, tmp_path):
    write_tiny(tmp_path / "dataset", train=4, test=2, seed=8)
    flags = ["--data", tmp_path / "dataset", "--out", tmp_path / "run", "--batch", 2, "--group", 2, "--size", 64, "--sde-steps", 2,
             "--sample-steps", 2, "--window", 1, "--window-within", 1, "--eval-rows", 2, "--steps", 1, "--lora-rank", 4, "--judge",
             "none", "--pickscore", "none", "--reward-weights", "imagereward=2", "--device", "cpu", *small]
    assert train_gen.main([str(flag) for flag in flags]) == 0
    before, after = log_of(tmp_path / "run")
    assert after["reward"] == pytest.approx(2 * after["reward_imagereward"], rel=1e-5) and after["reward_std"] > 0
    assert -1 <= after["reward_hpsv2"] <= 1 and {"eval_imagereward", "eval_hpsv2"} <= before.keys()


def test_they_are_measured_beside_the_other_scores(small, tmp_path):
    args = run.parse_args([*small])
    others = scorers.load(scorers.chosen(args.scorer), "cpu")
    cases = [Case(str(i), text, 5, 5) for i, text in enumerate(("a lake", "the lone tree"))]
    pictures = [Image.new("RGB", (40, 30), (90 * i, 0, 80)) for i in range(2)]
    run.measure(lambda *_: pictures, cases, [0, 1], tmp_path / "images.jsonl", Instruments({}, others=others), 2)
    records = read_records(tmp_path / "images.jsonl")
    for name, score in others:
        expected = score(pictures, [case.neutral for case in cases])
        assert torch.allclose(torch.tensor([record[name] for record in records]), expected, atol=1e-5)
    assert [tables.SCORES[name] for name, _ in others] == ["ImageReward", "HPSv2.1"]


def test_no_program_imports_baselines_before_it_is_asked_to():
    files = [*ROOT.glob("*.py"), *(file for name in ("parts", "kernels", "evaluation") for file in Path(ROOT, name).glob("*.py"))]
    assert len(files) > 40
    for file in files:
        assert not re.search(r"^(from|import) baselines", file.read_text(), re.MULTILINE), file
