"""Flags and their ranges, presets, exit codes and the one line that an error is."""

import argparse

import pytest
import torch

from parts import cli

SETTINGS = {
    "steps": (1000, 3, cli.integer(1, 10**6), "training steps"),
    "group": (8, 4, cli.integer(2, 64), "[--num-generations] pictures of a prompt"),
    "form": (("numbers",), ("numbers", "words"), cli.some_of(("numbers", "words")), "of the target"),
}


def parse(*argv):
    made = cli.parser("A program.\n    kept as it is")
    made.add_argument("--preset", choices=["tiny", "paper"], default="tiny")
    cli.add_settings(made, SETTINGS)
    return cli.parse_settings(made, SETTINGS, argv)


def test_what_is_not_given_has_its_presets_value():
    assert vars(parse()) == {"preset": "tiny", "steps": 3, "group": 4, "form": ("numbers", "words")}
    assert vars(parse("--preset", "paper", "--steps", "5")) == {
        "preset": "paper", "steps": 5, "group": 8, "form": ("numbers",)}


def test_a_setting_has_its_other_name_and_its_help(capsys):
    assert parse("--num-generations", "6").group == 6
    with pytest.raises(SystemExit) as stopped:
        parse("--help")
    text = " ".join(capsys.readouterr().out.split())
    assert stopped.value.code == 0 and "pictures of a prompt (paper: 8, tiny: 4)" in text
    assert "[--num-generations]" not in text and "(paper: numbers, tiny: numbers,words)" in text


@pytest.mark.parametrize("argv, message", [
    (("--steps", "0"), "expected a whole number in 1..1,000,000, got 0"), (("--steps", "2.5"), "got 2.5"),
    (("--steps", "nan"), "got nan"), (("--form", "numbers,verse"), "expected some of numbers, words, got numbers,verse"),
    (("--form", ""), "expected some of"), (("--unknown", "1"), "unrecognized"), (("--preset", "huge"), "invalid choice")])
def test_a_mistake_is_one_line_and_exit_2(capsys, argv, message):
    with pytest.raises(SystemExit) as stopped:
        parse(*argv)
    lines = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2 and len(lines) == 1
    assert lines[0].startswith("error: ") and message in lines[0] and lines[0].endswith("see --help")


@pytest.mark.parametrize("text", ["nan", "inf", "-inf", "1e999", "x", ""])
def test_a_number_is_finite(text):
    with pytest.raises(cli.argparse.ArgumentTypeError, match="expected a number in 0..9, got"):
        cli.number(0, 9)(text)
    assert cli.number(0, 9)("9.0") == 9.0 and cli.integer(0, 9)("9") == 9


@pytest.mark.parametrize("text, value", [("512", 512), ("500", None), ("0", None), ("4112", None), ("1e2", None)])
def test_the_side_of_a_picture_is_a_multiple_of_16(text, value):
    if value:
        assert cli.picture_side(text) == value
    else:
        with pytest.raises(cli.argparse.ArgumentTypeError, match="16..4,096"):
            cli.picture_side(text)


def test_a_device_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.device_of(None) == "cpu" and cli.device_of("cpu") == "cpu"
    with pytest.raises(cli.UserError, match="--device cuda:1: this torch sees no GPU"):
        cli.device_of("cuda:1")


@pytest.mark.parametrize("error, code, line", [
    (cli.UserError("a.json: missing"), 2, "error: a.json: missing"), (FileNotFoundError(2, "No such file", "a"), 2, "'a'"),
    (torch.OutOfMemoryError("CUDA out of memory.\nmore"), 2, "too little memory (CUDA out of memory.)"),
    (KeyboardInterrupt(), 130, "the same command goes on")])
def test_what_a_user_can_mend_is_one_line_and_an_exit_code(capsys, error, code, line):
    def work():
        raise error

    assert cli.run_program(work) == code
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and line in lines[0]


def test_an_error_is_one_line_without_what_a_terminal_obeys_and_keeps_both_ends():
    said = str(cli.UserError("a.json: " + "\x1b[2J\n" * 10**5 + "; download it again"))
    assert said.isprintable() and len(said) == cli.LONGEST_LINE + 3
    assert said.startswith("a.json: ") and said.endswith("; download it again")


def test_what_is_said_keeps_its_lines_and_nothing_else_that_a_terminal_obeys(capsys):
    cli.say("one \x1b[31m\ntwo\r")
    assert capsys.readouterr().err == "one  [31m\ntwo \n"


def test_success_is_0_and_what_is_no_users_mistake_is_raised():
    assert cli.run_program(lambda: None) == 0 and cli.run_program(lambda: 3) == 3
    with pytest.raises(ZeroDivisionError):
        cli.run_program(lambda: 1 / 0)


def test_a_table_has_its_head():
    assert cli.markdown([["a", "b"], [1, 2.5]]) == "| a | b |\n| --- | --- |\n| 1 | 2.5 |"


@pytest.mark.parametrize("given, plain", [
    ("a swan  on\nthe lake", "a swan on the lake"), ("red \x1b[31m\x07 swan", "red [31m swan"), ("a \ud800 b", "a b"),
    ("<|image_pad|> swan <|im_end|>", "swan"), ("<|image_<|x|>pad|>", "<|image_ pad|>"), ("湖上の白鳥 ≤ 7", "湖上の白鳥 ≤ 7"),
    ("a < b | c > d", "a < b | c > d")])
def test_plain_text_is_all_that_a_terminal_a_file_and_a_tokenizer_should_get(given, plain):
    assert cli.plain_text(given) == plain
    plain.encode()


@pytest.mark.parametrize("given", ["", "  ", "x" * 11, "a \x1b[2J", "<|vision_start|>", "a \udcff"])
def test_a_prompt_that_is_more_than_text_is_refused(given):
    with pytest.raises(argparse.ArgumentTypeError, match="expected 1 to 10 characters of UTF-8 text"):
        cli.text(10)(given)
    assert cli.text(10)(" a\nswan ") == " a\nswan "
