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
