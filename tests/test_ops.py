"""How a faster form of an operation is found, and when it stands aside."""

import importlib
import os
import shutil
import sys

import pytest
import torch

from kernels import FORMS
from parts import ops
from tests.launch import ROOT, finish, fork


@pytest.mark.parametrize("name", FORMS)
def test_every_form_was_written_for_the_definition_that_stands_in_its_file_and_takes_the_same_arguments(name):
    module, _, function = name.rpartition(".")
    plain = getattr(importlib.import_module(module), function).plain
    assert ops.definition(plain) == FORMS[name].definition, f"forms of {name} are for another definition: python -m kernels"


def test_a_definition_is_its_code_and_not_its_comments():
    def code(function):
        return ops.code_of(function, set())[1:]  # without "def" and the name

    assert code(first)[1:] == code(renamed_apart)[1:]
    assert ops.definition(first) != ops.definition(third)
    assert "FIVE=5" in code(first)  # a constant of a function that it calls


def first(x, y=2):
    """A docstring."""
    return x * y + helper(x)  # a comment


def helper(x):
    return x + FIVE


FIVE = 5


def third(x, y=2):
    return x * y - helper(x)


def renamed_apart(x, y=2):
    return x * y + helper(x)


def tree(tmp_path, *left_out):
    """A copy of the code without some folders; weights are linked."""
    shutil.copytree(ROOT, tmp_path / "tree", ignore=shutil.ignore_patterns(
        ".*", "__pycache__", "out", "weights", "cache", "bench", "docs", *left_out))
    (tmp_path / "tree" / "tiny" / "weights").symlink_to(ROOT / "tiny" / "weights")
    return tmp_path / "tree"


def within(folder, work, **environment):
    """The output of work(), called in a process that imports the project's code from a folder."""
    return finish(fork(work_within, str(folder), work, environment=environment))


def work_within(folder, work):
    os.chdir(folder)
    sys.path[:] = [folder, *(path for path in sys.path if os.path.realpath(path) != str(ROOT))]
    own = {path.stem for path in ROOT.iterdir()}
    for name in [name for name in sys.modules if name.partition(".")[0] in own]:
        del sys.modules[name]
    importlib.invalidate_caches()
    return work()


def probe():
    import mmdit

    x, vector = torch.full((1, 2, 3), 2.0), torch.ones(1, 3)
    print(mmdit.gate_residual(x, x, vector).flatten()[0].item())


def test_an_edited_plain_form_runs_and_one_line_says_so(tmp_path):
    folder = tree(tmp_path)
    assert within(folder, probe) == "4.0\n"
    text = (folder / "mmdit.py").read_text()
    whole = "    return x + gate[:, None] * branch\n"
    assert text.count(whole) == 1
    (folder / "mmdit.py").write_text(text.replace(whole, "    return x - gate[:, None] * branch  # edited\n"))
    said, value = within(folder, probe).splitlines()
    assert value == "0.0" and "mmdit.gate_residual was edited: its plain form runs" in said
    assert within(folder, probe, KERNELS="plain") == "0.0\n"
    (folder / "mmdit.py").write_text(text.replace(whole, "    # A comment changes nothing.\n" + whole))
    assert within(folder, probe) == "4.0\n"


def digest():
    import flow_grpo
    from parts import ops

    print(ops.definition(flow_grpo.sde_draw))


def test_an_edit_of_what_a_plain_form_calls_counts_too(tmp_path):
    folder = tree(tmp_path)
    text = (folder / "flow_grpo.py").read_text()
    before = within(folder, digest)
    assert "z.square()" in text
    (folder / "flow_grpo.py").write_text(text.replace("z.square()", "z.abs()"))
    assert within(folder, digest) != before


def draw():
    import sample
    from parts import ops

    print("kernels are there:", ops.has_kernels())
    return sample.main("--v 7 --a 3 --sample-steps 2 --out run".split())


def test_without_the_folder_of_kernels_pictures_are_drawn_and_judged(tmp_path):
    folder = tree(tmp_path, "kernels")
    assert not (folder / "kernels").exists()
    assert "kernels are there: False" in within(folder, draw)
    assert len(list((folder / "run").glob("round0_*.png"))) == 1
