"""docs/symptoms.md names only fields that a log has and flags that a program has."""

import ast
import re
from pathlib import Path

import pytest

import sample
import train_gen
import train_judge
from bench import plan
from evaluation import run
from parts import cli

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "docs" / "symptoms.md").read_text(encoding="utf-8")
CODE = re.findall(r"`([^`]+)`", TEXT)


@pytest.fixture(scope="module")
def flags():
    """All flags of the programs that the page names, as their parsers know them."""
    made = []
    keep = cli.Parser.parse_args

    def caught(self, *_, **__):
        made.append(self)
        raise SystemExit

    cli.Parser.parse_args = caught
    try:
        for parse in (sample.parse_args, train_gen.parse_args, train_judge.parse_args, run.parse_args, plan.parse_args):
            with pytest.raises(SystemExit):
                parse([])
    finally:
        cli.Parser.parse_args = keep
    return {flag for parser in made for flag in parser._option_string_actions} | {"--help-all"}


def log_fields():
    """Names of a log's record: the texts in the functions and tables of the two programs that write it."""
    names = {"eval_" + name.removeprefix("eval_") for name in (*train_gen.CURVES, *train_judge.CURVES, "gap")}
    for program in (train_gen, train_judge):
        tree = ast.parse(Path(program.__file__).read_text(encoding="utf-8"))
        written = [node for node in tree.body if getattr(node, "name", None) in (
            "train", "summary", "update", "rewards_of", "roll_out")]
        names |= {node.value for function in written for node in ast.walk(function)
                  if isinstance(node, ast.Constant) and isinstance(node.value, str)}
        names |= set(program.CURVES)
    return names | {f"mismatch_{name}" for name in ("mean", "share", "max")}


def test_every_flag_exists(flags):
    named = {flag for code in CODE for flag in re.findall(r"--[a-z][a-z0-9-]*", code)}
    assert len(named) > 25 and named <= flags, named - flags


def test_every_field_is_one_of_a_log():
    rows = [line.split(" | ") for line in TEXT.splitlines() if line.startswith("| ") and line.count(" | ") == 2]
    named = {name for row in rows if row[1] not in ("fields", "---") for name in re.findall(r"`([a-z_]+)`", row[1])}
    assert len(named) > 20 and named <= log_fields(), named - log_fields()


def test_every_link_and_command_leads_somewhere():
    for target in re.findall(r"\]\(([\w./-]+)\)", TEXT):
        assert (ROOT / "docs" / target).exists()
    for module in re.findall(r"python -m ([\w.]+)", TEXT):
        assert (ROOT / module.replace(".", "/")).with_suffix(".py").exists() or (ROOT / module / "__main__.py").exists()


def test_every_symptom_that_readers_ask_about_has_a_line():
    asked = ("ratio_max_deviation", "clip_fraction", "zero_spread", "reward up, pictures worse", "black or noise",
             "worse than an evaluation's", "choosing β", "format reward is stuck", "rewards stalls", "out of memory",
             "1 and on 8 GPUs", "GPU-hours", "low resolution", "Flow-GRPO", "TRL", "Q-Insight", "paper-map.md")
    assert all(words in TEXT for words in asked)
