"""Flags and their ranges, presets, exit codes and the one line that an error is."""

import argparse
import importlib
import io
import os
import subprocess
import sys

import pytest
import torch

from parts import cli, presets

SETTINGS = {
    "steps": (1000, 3, cli.integer(1, 10**6), "training steps"),
    "group": (8, 4, cli.integer(2, 64), "[--num-generations] pictures of a prompt"),
    "form": (("numbers",), ("numbers", "words"), cli.some_of(("numbers", "words")), "of the target"),
}


def parse(*argv):
    made = cli.parser("A program.\n    kept as it is")
    made.add_argument("--preset", choices=["tiny", "paper"], default="tiny")
    cli.add_settings(made, SETTINGS)
    return presets.fill_settings(made.parse_args(argv), SETTINGS)


def test_what_is_not_given_has_its_presets_value():
    assert vars(parse()) == {"preset": "tiny", "steps": 3, "group": 4, "form": ("numbers", "words")}
    assert vars(parse("--preset", "paper", "--steps", "5")) == {
        "preset": "paper", "steps": 5, "group": 8, "form": ("numbers",)}


def test_a_setting_has_its_other_name_and_its_help(capsys):
    assert parse("--num-generations", "6").group == 6
    with pytest.raises(SystemExit) as stopped:
        parse("--help")
    text = " ".join(capsys.readouterr().out.split())
    assert stopped.value.code == 0 and "--group X pictures of a prompt (paper: 8, tiny: 4)" in text
    assert "[--num-generations]" not in text and "(paper: numbers, tiny: numbers,words)" in text


@pytest.mark.parametrize("argv, message", [
    (("--steps", "0"), "expected a whole number in 1..1,000,000, got 0"), (("--steps", "2.5"), "got 2.5"),
    (("--steps", "nan"), "got nan"), (("--form", "numbers,verse"), "expected some of numbers, words, got numbers,verse"),
    (("--form", ""), "expected some of"), (("--unknown", "1"), "unrecognized argument --unknown; see"),
    (("--preset", "huge"), "invalid choice"), (("--preset", "papr"), "did you mean paper?"), (("7",), "unrecognized arguments: 7"),
    (("--step", "x"), "got x"), (("--stpes=3",), "unrecognized argument --stpes, did you mean --steps?")])
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
    for name in ("mps", "cuda:x", "xpu", "nonsense"):
        with pytest.raises(cli.UserError, match=f"--device {name}: expected cpu, or cuda"):
            cli.device_of(name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert cli.device_of("gpu") == "cuda" and cli.device_of("gpu:1") == "cuda:1"
    with pytest.raises(cli.UserError, match="--device cuda:2: this machine has 2 GPUs"):
        cli.device_of("cuda:2")


@pytest.mark.parametrize("error, code, line", [
    (cli.UserError("a.json: missing"), 2, "error: a.json: missing"), (FileNotFoundError(2, "No such file", "a"), 2, "'a'"),
    (OSError(28, "No space left", "log.jsonl"), 1, "error: log.jsonl: cannot be written (No space left); make room there"),
    (OSError(27, "File too large", "from", None, "to"), 1, "error: to: cannot be written (File too large)"),
    (MemoryError(), 2, "error: this machine has too little memory; "),
    (RuntimeError("[alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"), 2, "this machine has too little memory"),
    (torch.OutOfMemoryError("CUDA out of memory.\nmore"), 2, "too little memory (CUDA out of memory.)"),
    (torch.OutOfMemoryError("x"), 2, "--offload, --encoders leave or cpu, --no-t5, --judge Qwen/Qwen2.5-VL-3B-Instruct"),
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
    with pytest.raises(RuntimeError, match="shape"):
        cli.run_program(lambda: torch.zeros(2).view(3))
    assert cli.run_program(lambda: torch.empty(2**60)) == 2  # as torch itself says it


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


def test_a_flag_that_is_misspelt_is_named_before_one_that_is_missing(capsys):
    made = cli.parser("A program.")
    made.add_argument("--out", required=True)
    with pytest.raises(SystemExit):
        made.parse_args(["--uot", "x"])
    assert "unrecognized argument --uot, did you mean --out?" in capsys.readouterr().err
    assert made.parse_args(["--out", "--a text with spaces"]).out == "--a text with spaces"


def test_rare_flags_are_listed_by_help_and_explained_by_help_all(capsys):
    made = cli.parser("A program.")
    cli.add_settings(made, SETTINGS, {"group": "pictures"})
    made.fold(["form"])
    shown = {}
    for flag in ("--help", "--help-all"):
        with pytest.raises(SystemExit):
            made.parse_args([flag])
        shown[flag] = capsys.readouterr().out
    assert "of the target" not in shown["--help"] and "explains these too: --form" in shown["--help"]
    assert "of the target" in shown["--help-all"] and "pictures:\n" in shown["--help"]
    assert made.parse_args(["--form", "words"]).form == ("words",)


PROGRAMS = ("sample", "train_judge", "train_gen", "prepare.check", "prepare.emoset", "prepare.emotic", "tiny.dataset",
            "tiny.scenes", "tiny.pretrain", "tiny.judge_study", "tiny.generator_study", "tiny.feedback_study", "bench.plan",
            "evaluation.__main__")
COMMANDS = [(name, ()) for name in PROGRAMS] + [("evaluation.__main__", (name,)) for name in ("cases", "run", "table", "rate")]


@pytest.mark.parametrize("program, command", COMMANDS)
@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
def test_help_fits_a_screen_and_any_encoding(program, command, encoding, monkeypatch):
    stdout = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", stdout)
    monkeypatch.delenv("COLUMNS", raising=False)
    with pytest.raises(SystemExit) as stopped:
        importlib.import_module(program).main([*command, "--help"])
    stdout.flush()
    text = stdout.buffer.getvalue().decode(encoding)
    assert stopped.value.code == 0 and text.startswith("usage: ") and len(text.splitlines()) < 60


def test_a_letter_that_an_encoding_lacks_has_a_plain_form():
    assert "|ΔV| − 1 ≤ 猫".encode("ascii", "plain letters") == b"|dV| - 1 <= ?"
    assert "2 × é".encode("cp1252", "plain letters") == b"2 \xd7 \xe9"


# Stands for torch where its import takes long, and for Ctrl-C in the middle of it.
SLOW = "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(60)\n"


@pytest.mark.parametrize("command", [
    ["sample.py"], ["train_gen.py"], ["train_judge.py"], ["-m", "evaluation"], ["-m", "prepare.emoset"], ["-m", "prepare.emotic"],
    ["-m", "prepare.check"], ["-m", "tiny.scenes"], ["-m", "tiny.dataset"], ["-m", "tiny.pretrain"], ["-m", "bench.plan"]])
def test_an_interruption_of_an_import_is_one_line(command, tmp_path):
    (tmp_path / "torch.py").write_text(SLOW)
    done = subprocess.run([sys.executable, *command], cwd=cli.ROOT, capture_output=True, text=True, timeout=50,
                          env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert (done.returncode, done.stderr) == (130, "stopped\n")


# What Windows lacks, and what a pipe there is like.
WINDOWS = """
import os, signal, sys
sys.modules["fcntl"] = sys.modules["resource"] = None
for name in dir(signal):
    if name.startswith("SIG") and name not in ("SIGINT", "SIGTERM", "SIGABRT", "SIGFPE", "SIGILL", "SIGSEGV", "SIG_DFL", "SIG_IGN"):
        delattr(signal, name)
del os.killpg
sync = os.fsync
def fsync(handle):  # there only a file can be flushed that one may write to
    os.write(handle, b"") if os.path.isfile(f"/proc/self/fd/{handle}") else None
    sync(handle)
os.fsync = fsync
import sample, evaluation.__main__
code = sample.main(["--v", "7", "--a", "3", "--prompt", "\\u732b", "--sample-steps", "1", "--size", "64", "--out", sys.argv[1]])
sys.exit(code or evaluation.__main__.main(["cases", "--count", "2", "--out", sys.argv[1] + "/cases.jsonl"]))
"""


def test_programs_run_without_what_windows_lacks(tmp_path):
    done = subprocess.run([sys.executable, "-c", WINDOWS, str(tmp_path)], cwd=cli.ROOT, capture_output=True,
                          env={**os.environ, "PYTHONIOENCODING": "cp1252", "PYTHONUTF8": "0", "LC_ALL": "C"})
    assert done.returncode == 0, done.stderr
    assert b"never learned '?'" in done.stderr and b"round 0: ?, " in done.stderr and (tmp_path / "index.html").exists()


def test_a_file_where_a_folder_is_needed_is_named(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "folder"):
        assert cli.run_program(lambda path=path: path.mkdir()) == 2
        assert capsys.readouterr().err == f"error: {tmp_path}/file: a file stands where a folder is needed; give another\n"
    (tmp_path / "folder").mkdir()
    assert cli.run_program((tmp_path / "folder").mkdir) == 2 and "File exists" in capsys.readouterr().err
