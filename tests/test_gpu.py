"""bench/gpu.py and bench/measure.py on a CPU: all parts at a tiny size, rows that fail, kernels that are wrong."""

import json
import math
import os
import subprocess
import sys
import time
from unittest import mock

import pytest
import torch

from bench import gpu, measure


def test_gpu_runs_every_part_at_a_tiny_size_and_writes_its_tables(tmp_path):
    pytest.importorskip("triton")
    out = tmp_path / "gpu.json"
    command = [sys.executable, gpu.__file__, "--device", "cpu", "--small", "--out", out]  # its Triton must interpret
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    assert "tiny sizes" in done.stdout.splitlines()[0]
    report = json.loads(out.read_text())
    errors, times, compiled, *models = report["tables"].values()
    operations = {"modulate", "gate_residual", "rms_norm", "split_qkv", "joint_qkv", "split_rotate", "swiglu",
                  "sde_log_prob and kl", "sde_draw", "scan_tile"}
    for rows in (errors, times, compiled):
        assert {next(iter(row.values())).split(",")[0] for row in rows} == operations
    assert all(row["right"] and 0 < row["kernel's error"] < 0.01 for row in errors)
    assert len(compiled) == len(operations) and all(row["compiled, ms"] > 0 for row in compiled)
    assert all(row["ms"] > 0 and row["plain, ms"] > 0 for row in times) and report["failures"] == []
    titles = ["MMDiT against", "MMDiT, adapter", "MMDiT, forward", "Qwen2.5-VL against", "Qwen2.5-VL, adapter",
              "Qwen2.5-VL, generation", "pictures of 64 px"]
    assert all(title.startswith(start) for title, start in zip(list(report["tables"])[3:], titles, strict=True))
    assert [len(rows) for rows in models] == [2, 3, 3, 2, 2, 2, 4]
    assert all(row["right"] and row["plain, error"] > 0 for rows in (models[0], models[3]) for row in rows)
    assert all(row["pictures/s"] > 0 for row in models[-1])


def test_a_row_that_fails_is_told_and_the_others_run(tmp_path, capsys):
    report = {"tables": {}, "failures": [], "deadline": math.inf, "out": tmp_path / "out.json"}

    def fails():
        raise torch.OutOfMemoryError("out of | memory\nmore")

    measure.run_table(report, "work", {"a": lambda: {"ms": 1234.5, "right": True}, "b": fails,
                                       "c": lambda: {"ms": 0.12345, "right": False}})
    printed = capsys.readouterr()
    assert printed.out.strip().splitlines() == [
        "| work | ms | right | failed |", "| --- | --- | --- | --- |", "| a | 1,234 | yes |  |",
        "| b |  |  | OutOfMemoryError: out of / memory more |", "| c | 0.123 | NO |  |"]
    assert "Traceback" in printed.err
    assert report["failures"] == ["work: b", "work: c: the error is too large"]
    assert json.loads((tmp_path / "out.json").read_text()) == {"tables": report["tables"], "failures": report["failures"]}
    report["deadline"] = time.monotonic() - 1
    assert "no time left" in measure.attempt(report, "late", lambda: {})["failed"]


def test_a_kernel_with_a_wrong_gradient_is_found(monkeypatch):
    kernel_table = pytest.importorskip("bench.kernel_table")
    monkeypatch.setattr(gpu.kernels, "FUSED", False)
    cases = kernel_table.make_cases(torch.float32, 1, 2, 4, 2, lambda *shape, dtype: torch.randn(shape).to(dtype))
    case = next(case for case in cases if case.name == "swiglu")
    case.fused = case.plain
    assert gpu.kernel_errors(case)["right"]
    case.fused = lambda x: case.plain(x) + 1e-4 * (x - x.detach()).sum()  # the same result
    assert not gpu.kernel_errors(case)["right"]


def test_gpu_refuses_parts_it_does_not_know(capsys):
    with pytest.raises(SystemExit):
        gpu.main(["--only", "kernels,vae"])
    assert "the parts are kernels, mmdit, qwen, sampling" in capsys.readouterr().err


def test_the_time_of_a_gpu_is_taken_between_events_after_the_caches_are_emptied():
    """With stand-ins for torch.cuda: the warm-up is left out, and each run follows four writes of the cold tensor."""
    log, cold = [], mock.Mock(zero_=lambda: log.append("cold"))
    event = mock.Mock(record=lambda: log.append("event"), elapsed_time=lambda end: float(log.count("run")))
    names = {"Event": lambda enable_timing: event, "synchronize": lambda: None, "reset_peak_memory_stats": lambda: None,
             "max_memory_allocated": lambda: 3e9}
    with mock.patch.multiple(torch.cuda, **names):
        ms, host, peak = measure.measured(lambda: log.append("run"), "cuda", 3, cold)
    assert log == [*["cold"] * 4, "event", "run", "event"] * 5
    assert (ms, peak) == (4.0, 3.0) and host >= 0
