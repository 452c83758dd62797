"""The preset fits the model: a real one never gets the miniature's judge, size or learning rates."""

import json
import os

import pytest

import sample
import train_gen
import train_judge
from evaluation import run
from parts import presets
from parts.pipeline import PAPER, TINY

TARGET = ["--v", "7", "--a", "3"]
PROGRAMS = {"sample": (sample.parse_args, TARGET), "train_gen": (train_gen.parse_args, []),
            "train_judge": (train_judge.parse_args, []), "evaluation run": (run.parse_args, [])}


@pytest.fixture
def large(tmp_path):
    """A folder with a file as long as real weights, which is empty on the disk."""
    file = tmp_path / "large" / "transformer" / "model.safetensors"
    file.parent.mkdir(parents=True)
    file.touch()
    os.truncate(file, 2**30)
    return tmp_path / "large"


def adapter_of(base, folder):
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(base)}))
    return folder


def test_a_real_model_is_told_by_its_bytes_and_an_adapter_by_its_base(large, tmp_path):
    assert presets.is_real(large) and presets.is_real(large / "transformer" / "model.safetensors")
    assert presets.is_real("owner/name") and presets.is_real(adapter_of(large, tmp_path / "a"))
    for small in (TINY, TINY / "judge", adapter_of(TINY, tmp_path / "b"), "./missing/model", "missing"):
        assert not presets.is_real(small)


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_real_model_takes_the_papers_defaults_and_refuses_the_miniatures(program, large, capsys):
    parse, needed = PROGRAMS[program]
    assert parse(needed).preset == "tiny"
    assert parse([*needed, "--model", str(TINY)]).preset == "tiny" and capsys.readouterr().err == ""
    args = parse([*needed, "--model", str(large)])
    told = capsys.readouterr().err
    assert args.preset == "paper" and told.count("\n") == 1 and "defaults are those of --preset paper" in told
    # flags that are given stay
    assert parse([*needed, "--model", "owner/name", "--seed", "7"]).seed == 7
    capsys.readouterr()
    with pytest.raises(SystemExit):
        parse([*needed, "--preset", "tiny", "--model", str(large)])
    told = capsys.readouterr().err
    assert told.startswith("error: --preset tiny is for the miniature") and told.count("\n") == 1


def test_photographs_are_neither_drawn_at_the_miniatures_size_nor_read_by_its_judge():
    args = sample.parse_args([*TARGET, "--model", PAPER])
    assert (args.judge, args.size, args.adapter) == ("Qwen/Qwen2.5-VL-7B-Instruct", 512, None)
    args = train_gen.parse_args(["--model", PAPER])
    assert (args.judge, args.size, args.lr) == ("Qwen/Qwen2.5-VL-7B-Instruct", 512, 3e-4)
    assert train_judge.parse_args(["--model", "Qwen/Qwen2.5-VL-3B-Instruct", "--lora"]).lr == 1e-5
    args = run.parse_args(["--model", PAPER])
    assert args.size == 512 and args.clip == "openai/clip-vit-large-patch14"


def test_the_fast_preset_is_the_papers_but_for_what_it_changes(capsys):
    paper, fast = (vars(train_gen.parse_args(["--preset", name])) for name in ("paper", "fast"))
    assert {name: fast[name] for name in fast if fast[name] != paper[name]} == presets.FAST | {"preset": "fast"}
    assert train_gen.parse_args(["--preset", "fast", "--steps", "7", "--model", "owner/name"]).steps == 7
    with pytest.raises(SystemExit):
        train_judge.parse_args(["--preset", "fast"])
    assert "invalid choice: 'fast'" in capsys.readouterr().err
