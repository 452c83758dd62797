"""Rewards from a file: loading, numbers, mistakes, and a training by the one in the docs."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

import train_gen
from parts import own_reward
from parts.cli import UserError
from tests.launch import log_of
from tiny.dataset import write_tiny

ROWS = [SimpleNamespace(neutral=f"prompt {i}", v=float(i)) for i in range(3)]
PICTURES = [Image.new("RGB", (4, 4), (100 * i, 0, 90)) for i in range(3)]


def written(folder, body):
    file = folder / "mine.py"
    file.write_text(f"import torch\ndef score(pictures, prompts, rows):\n    return {body}\n")
    return f"{file}:score"


@pytest.mark.parametrize("body, expected", [
    ("[picture.getpixel((0, 0))[0] for picture in pictures]", [0, 100, 200]), ("[len(prompts)] * 3", [3, 3, 3]),
    ("torch.tensor([row.v for row in rows], requires_grad=True)", [0, 1, 2]), ("torch.ones(3, dtype=torch.bfloat16)", [1, 1, 1])])
def test_a_function_gets_pictures_prompts_and_rows_and_gives_a_number_for_each(tmp_path, body, expected):
    given = own_reward.rewards(own_reward.load(written(tmp_path, body)), PICTURES, ROWS)
    assert given.dtype == torch.float64 and given.tolist() == expected and not given.requires_grad


@pytest.mark.parametrize("body, message", [
    ("[1.0]", r"score gave numbers of shape \[1\], expected \[3\]"), ("1.0", r"shape \[\]"), ("torch.ones(3, 1)", r"shape \[3, 1\]"),
    ("None", "gave no numbers but 'None'"), ("['a'] * 3", "gave no numbers"), ("[None] * 3", "gave no numbers")])
def test_what_is_no_number_for_each_picture_is_refused(tmp_path, body, message):
    with pytest.raises(UserError, match=message):
        own_reward.rewards(own_reward.load(written(tmp_path, body)), PICTURES, ROWS)


def test_a_file_or_function_that_is_not_there_is_told(tmp_path):
    good = written(tmp_path, "[0] * 3")
    for source in ("mine.py", ":score", f"{tmp_path}/nothing.py:score", f"{tmp_path}:score"):
        with pytest.raises(UserError, match="no such file; give FILE:FUNCTION"):
            own_reward.load(source)
    with pytest.raises(UserError, match="has no function 'other'"):
        own_reward.load(good.replace(":score", ":other"))
    for text, message in (("def score(:", "SyntaxError"), ("import nothing_here", "ModuleNotFoundError: No module named")):
        (tmp_path / "mine.py").write_text(text)
        with pytest.raises(UserError, match=f"mine.py: cannot be imported .{message}"):
            own_reward.load(good)


def test_flag_and_weight_belong_together(capsys):
    for flags in (["--reward", "mine.py:score"], ["--reward-weights", "emotion=1,own=1"]):
        with pytest.raises(SystemExit):
            train_gen.parse_args(flags)
        assert "give both or neither" in capsys.readouterr().err


def test_the_reward_of_the_docs_trains_alone_and_a_changed_file_is_noticed(tmp_path, capsys):
    (code,) = re.findall(r"```python\n(.*?)```", Path("docs/commands.md").read_text(), re.DOTALL)
    file = tmp_path / "my_reward.py"
    file.write_text(code)
    write_tiny(tmp_path / "dataset", train=4, test=2, seed=8)
    flags = ["--data", tmp_path / "dataset", "--out", tmp_path / "run", "--batch", 2, "--group", 2, "--size", 64, "--sde-steps", 2,
             "--sample-steps", 2, "--window", 1, "--window-within", 1, "--eval-rows", 2, "--steps", 1, "--lora-rank", 4, "--judge", "none",
             "--pickscore", "none", "--reward", f"{file}:score", "--reward-weights", "own=2", "--device", "cpu"]
    flags = [str(flag) for flag in flags]
    assert train_gen.main(flags) == 0
    before, after = log_of(tmp_path / "run")
    assert 0 < after["reward_own"] < 1 and after["reward"] == pytest.approx(2 * after["reward_own"]) and "eval_own" in before
    file.write_text(code + "\n\n# other\n")
    assert train_gen.main(flags) == 2
    assert "holds a run with another function of --reward; put that back" in capsys.readouterr().err
    file.write_text("def score(pictures, prompts, rows):\n    return [float('nan')] * len(pictures)\n")
    assert train_gen.main([*flags, "--out", str(tmp_path / "other")]) == 2
    assert "the reward own of a picture is nan, of row" in capsys.readouterr().err
