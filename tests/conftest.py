"""Every test of a model runs on both forms of the operations."""

import os

# Each of several workers has a core of its own; more threads than cores only wait for each other.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"

import pytest

from parts import ops

MODELS = {f"test_{name}.py" for name in ("mmdit", "vae", "clip", "text_encoders", "qwen_vl", "kernels")}


def pytest_generate_tests(metafunc):
    if metafunc.definition.path.name in MODELS:
        metafunc.fixturenames.insert(0, "forms")
        metafunc.parametrize("forms", ["fused", "plain"], indirect=True)


@pytest.fixture
def forms(request, monkeypatch):
    """The forms that ops.py takes: as KERNELS=fused or KERNELS=plain would choose them."""
    monkeypatch.setattr(ops, "FUSED", request.param == "fused")


# Files that take longest begin first, so that both workers end at about the same time.
LONGEST = ("test_train_gen", "test_train_judge", "test_bench", "test_triton_forms", "test_gpu", "test_generator_study",
           "test_judge_study", "test_feedback_study", "test_pretrain", "test_sharding", "test_evaluation", "test_plan",
           "test_qwen_vl", "test_sample", "test_prepare", "test_checkpoints")


def pytest_collection_modifyitems(items):
    place = {name: i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))
