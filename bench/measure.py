"""Time and memory on a GPU or a CPU, and tables of measurements of which some may fail while the others still run.

A report is a dict that becomes a JSON file: `tables` {title: rows}, `failures` [text], and what else its program puts in;
`deadline` (as time.monotonic counts) and `out` (the file, or None) stay out of it.
"""

import gc
import statistics
import sys
import time
import traceback

import torch
from tqdm import tqdm

from parts.files import write_json


def measured(run, device, repeats, cold=None):
    """Of run(), once warm: (median ms of the device, median ms of the host, greatest GB allocated, on a CPU None).

    device: "cuda" or "cpu". cold: a tensor, larger than the caches, that a GPU writes before each run. That empties them,
    and keeps the GPU busy until the host has queued the run, so that none of the host's time is in the device's.
    """
    on_gpu, ms, host = device == "cuda", [], []
    warm_up = 2 if on_gpu else 1
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for _ in range(warm_up + repeats):
        if on_gpu:
            torch.cuda.synchronize()
            for _ in range(0 if cold is None else 4):
                cold.zero_()
            begin.record()
        started = time.perf_counter()
        run()
        host.append(1e3 * (time.perf_counter() - started))
        if on_gpu:
            end.record()
            end.synchronize()
        ms.append(begin.elapsed_time(end) if on_gpu else host[-1])
    return (statistics.median(ms[warm_up:]), statistics.median(host[warm_up:]),
            torch.cuda.max_memory_allocated() / 1e9 if on_gpu else None)


def peak_rates(device, copied, side):
    """(bytes/s of a copy of so many bytes, read and written, FLOP/s of a product of two bfloat16 matrices of that side)."""
    a, b = (torch.zeros(copied, dtype=torch.uint8, device=device) for _ in "ab")
    x, y = (torch.randn(side, side, dtype=torch.bfloat16, device=device) for _ in "xy")
    return (2 * copied / measured(lambda: b.copy_(a), device, 20)[0] * 1e3,
            2 * side**3 / measured(lambda: x @ y, device, 20)[0] * 1e3)


def attempt(report, name, job):
    """job()'s result. If it raises, that is shown and noted as a failure, and the result is {"failed": why}."""
    try:
        if time.monotonic() > report["deadline"]:
            raise TimeoutError("no time left to begin")
        return job()
    except Exception as error:
        print(f"{name}: {traceback.format_exc()}", file=sys.stderr)
        report["failures"].append(name)
        failed = {"failed": f"{type(error).__name__}: {error}"[:120].replace("\n", " ").replace("|", "/")}
    gc.collect()  # what the traceback held
    return failed


def run_table(report, title, jobs):
    """Run {first cell of a row: function that returns {column: cell}}; print the table, add it to the report and its file.

    A cell "right" that is False is a failure.
    """
    rows = report["tables"][title] = []
    for name, job in tqdm(jobs.items(), desc=title, unit="row", leave=False):
        row = attempt(report, f"{title}: {name}", job)
        if row.get("right") is False:
            report["failures"].append(f"{title}: {name}: the error is too large")
        rows.append({title: name, **row})
    columns = list(dict.fromkeys(column for row in rows for column in row))
    print("\n| " + " | ".join(columns) + " |\n|" + " --- |" * len(columns))
    for row in rows:
        print("| " + " | ".join(cell(row.get(column)) for column in columns) + " |", flush=True)
    save(report)


def save(report):
    """Write the report to its file, under a temporary name that is then renamed."""
    if report["out"] is not None:
        write_json(report["out"], {key: value for key, value in report.items() if key not in ("deadline", "out")})


def cell(value):
    if isinstance(value, bool):
        return "yes" if value else "NO"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return "" if value is None else str(value)
