"""Tests of models run on both forms of the operations; long files begin first."""

import os

# Each of several workers has a core of its own; more threads than cores only wait for each other.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"

import logging

import pytest

from parts import ops

logging.disable(logging.DEBUG)  # torch writes a record of every tensor in a checkpoint, and pytest would keep them

MODELS = {f"test_{name}.py" for name in ("mmdit", "vae", "text_encoders", "qwen_vl", "kernels")}


def pytest_configure(config):
    config.addinivalue_line("markers", "one_form: computes with no operation that has a fused form beside its plain one")


def pytest_generate_tests(metafunc):
    one = metafunc.definition.get_closest_marker("one_form")
    if metafunc.definition.path.name in MODELS and one is None:
        metafunc.parametrize("forms", ["fused", "plain"], indirect=True)


@pytest.fixture(autouse=True)  # pytest passes over parameters of a fixture that no test asks for
def forms(request, monkeypatch):
    """The forms that ops.py takes in a test of a model, as KERNELS=fused or KERNELS=plain would choose them."""
    chosen = getattr(request, "param", None)
    if chosen is not None:
        monkeypatch.setattr(ops, "FUSED", chosen == "fused")
    return chosen


# Files that take longest begin first, so that both workers end at about the same time.
LONGEST = ("test_train_gen", "test_train_judge", "test_triton_forms", "test_plan", "test_bench", "test_gpu",
           "test_pretrain", "test_generator_study", "test_sample", "test_evaluation", "test_feedback_study",
           "test_qwen_vl", "test_weights", "test_rate", "test_judge_study")


def pytest_collection_modifyitems(items):
    place = {name: i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))
