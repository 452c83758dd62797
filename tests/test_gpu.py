"""bench/gpu.py and bench/measure.py on a CPU: parts at a tiny size, rows that fail, kernels that are wrong."""

import json
import subprocess
import sys
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from bench import gpu, measure
from parts import ops
from tests import launch


def rows_in(folder):
    return [json.loads(line) for line in (folder / "rows.jsonl").read_text(encoding="utf-8").splitlines()]


def test_parts_run_at_a_tiny_size_and_write_their_tables(tmp_path):
    pytest.importorskip("triton")
    parts = "errors-float32,judge-policy,generator,judge"
    printed = launch.finish(launch.start("bench.gpu", "--device", "cpu", "--parts", parts, "--out", tmp_path))
    rows = rows_in(tmp_path)
    assert not [row for row in rows if "failed" in row or row.get("right") is False]
    errors = [row["row"].split(",")[0] for row in rows if row["table"] == "kernel against float64"]
    assert sorted(errors) == ["gate_residual", "joint_qkv", "modulate", "rms_norm", "scan_tile", "sde_draw",
                              "sde_log_prob and kl", "split_qkv", "split_rotate", "swiglu"]
    compared = [row for row in rows if "fused, error" in row]
    assert len(compared) == 5 and all(row["right"] and row["plain, error"] > 0 for row in compared)
    sampled = [row for row in rows if row["table"].startswith("sampled against trained")]
    assert len(sampled) == 6 and all(row["mean |Δ log p|"] < 0.05 for row in sampled if "mean |Δ log p|" in row)
    timed = [row for row in rows if "host's ms" in row]
    assert len(timed) == 10 and all(row["ms"] > 0 for row in timed)
    skipped = [row for row in rows if "skipped" in row]
    assert skipped and all(row["skipped"] == "needs CUDA" for row in skipped)
    assert {row["part"] for row in rows} == {"call", *parts.split(",")}
    assert (tmp_path / "report.md").read_text(encoding="utf-8").strip() in printed


def test_a_row_that_fails_is_told_and_the_others_run(tmp_path):
    def fails():
        raise torch.OutOfMemoryError("out of | memory\nmore")

    def cannot():
        raise measure.Skipped("needs wings")

    rows = measure.Rows(tmp_path, "part")
    rows.run("table", "fails", fails)
    rows.run("table", "skipped", cannot)
    rows.run("table", "good", lambda: {"ms": 1234.5, "right": False})
    failed, skipped, good = rows_in(tmp_path)
    assert failed["failed"].endswith("out of | memory") and skipped["skipped"] == "needs wings" and good["ms"] == 1234.5
    assert "OutOfMemoryError" in (tmp_path / "part.log").read_text(encoding="utf-8")
    text = measure.markdown(tmp_path)
    assert "### part: table" in text and "| good |  |  | 1,234 | NO |" in text and "out of ∣ memory" in text


def test_a_part_that_hangs_is_stopped_at_its_limit_and_costs_only_itself(tmp_path, monkeypatch):
    monkeypatch.setitem(gpu.PARTS, "judge", (None, 1.0))
    real = subprocess.Popen
    monkeypatch.setattr(gpu.subprocess, "Popen",
                        lambda command, **kwargs: real([sys.executable, "-c", "import time; time.sleep(60)"], **kwargs))
    args = SimpleNamespace(out=tmp_path, device="cuda", small=False)
    part = gpu.Part("judge", args, deadline=float("inf"))
    assert not part.wait()
    assert rows_in(tmp_path)[0]["failed"] == "stopped at its time limit"
    assert part.process.returncode < 0


def test_a_kernel_with_a_wrong_gradient_is_found(monkeypatch):
    kernel_table = pytest.importorskip("bench.kernel_table")
    monkeypatch.setattr(ops, "FUSED", False)
    cases = kernel_table.make_cases(torch.float32, 1, 2, 4, 2, lambda *shape, dtype: torch.randn(shape).to(dtype))
    case = next(case for case in cases if case.name == "swiglu")
    case.fused = case.plain
    assert gpu.kernel_errors(case)["right"]
    case.fused = lambda x: case.plain(x) + 1e-4 * (x - x.detach()).sum()  # the same result
    assert not gpu.kernel_errors(case)["right"]


@pytest.mark.parametrize("argv, message", [
    (["--out", "x", "--parts", "kernels,vae"], "the parts are generator-policy"), ([], "--out DIR")])
def test_gpu_refuses_what_it_cannot_do(argv, message, capsys):
    with pytest.raises(SystemExit):
        gpu.main(argv)
    assert message in capsys.readouterr().err


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
