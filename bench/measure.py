"""Time and memory on a GPU or a CPU, and rows of which some may fail while the others still run.

A row is one JSON object on a line of its own: its part, its table, its name and its cells. It is
written as soon as it is known, so that a program that is killed has lost only the row it was at.
"""

import gc
import json
import os
import statistics
import time
import traceback
from pathlib import Path

import torch

from parts import cli


def measured(run, device, repeats, cold=None, warm_up=2):
    """Of run(), once warm: (median ms of the device, of the host, greatest GB allocated or None).

    device: "cuda" or "cpu". cold: a tensor, larger than the caches, that a GPU writes before each
    run. That empties them, and keeps the GPU busy until the host has queued the run, so that none
    of the host's time is in the device's.
    """
    on_gpu = device == "cuda"
    warm_up = warm_up if on_gpu else 1
    ms = []
    host = []
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for _ in range(warm_up + repeats):
        if on_gpu:
            torch.cuda.synchronize()
            # Four writes last longer than the host needs to queue a kernel's launch.
            for _ in range(0 if cold is None else 4):
                cold.zero_()
            begin.record()
        started = time.perf_counter()
        run()
        host.append(1e3 * (time.perf_counter() - started))
        if on_gpu:
            end.record()
            end.synchronize()
        ms.append(begin.elapsed_time(end) if on_gpu else host[-1])  # of the GPU's own clock
    peak = torch.cuda.max_memory_allocated() / 1e9 if on_gpu else None
    return statistics.median(ms[warm_up:]), statistics.median(host[warm_up:]), peak


def peak_rates(device, copied, side):
    """(bytes/s of a copy of so many bytes, read and written, FLOP/s of a bfloat16 product).

    side: rows and columns of the product's two matrices.
    """
    a, b = (torch.zeros(copied, dtype=torch.uint8, device=device) for _ in "ab")
    x, y = (torch.randn(side, side, dtype=torch.bfloat16, device=device) for _ in "xy")
    return (2 * copied / measured(lambda: b.copy_(a), device, 20)[0] * 1e3,
            2 * side**3 / measured(lambda: x @ y, device, 20)[0] * 1e3)


def profiled(run):
    """{name of a GPU operation: (ms, calls)} of run(), which must be warm."""
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        run()
        torch.cuda.synchronize()
    totals = {}
    for event in seen.key_averages():
        spent = event.self_device_time_total / 1e3  # from microseconds
        if spent:
            name = event.key[:100]  # those of templates are very long
            ms, calls = totals.get(name, (0.0, 0))
            totals[name] = ms + spent, calls + event.count
    return totals


class Skipped(Exception):
    """A row cannot be had here; the message says why."""


class Rows:
    """The rows of one part, appended to DIR/rows.jsonl; tracebacks go to DIR/<part>.log."""

    def __init__(self, folder, part):
        self.folder = Path(folder)
        self.part = part

    def add(self, table, name, **cells):
        """Append one row, as a single write, which is whole even if other processes write too."""
        row = {"part": self.part, "table": table, "row": name, **cells}
        line = json.dumps(row, ensure_ascii=False) + "\n"
        path = self.folder / "rows.jsonl"
        # O_APPEND places each write at the end as it is then, whoever wrote before.
        handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(handle, line.encode())
        finally:
            os.close(handle)

    def note(self, text):
        with open(self.folder / f"{self.part}.log", "a", encoding="utf-8") as file:
            file.write(text + "\n")

    def run(self, table, name, job):
        """Append the cells that job() gives, or why it has none; either way the next can run."""
        started = time.perf_counter()
        try:
            cells = job()
        except Skipped as why:
            cells = {"skipped": str(why)}
        except Exception as error:
            self.note(f"{table}: {name}\n{traceback.format_exc()}")
            last = traceback.format_exception_only(error)[-1].strip().splitlines()
            cells = {"failed": (last[0] if last else type(error).__name__)[:300]}
        self.add(table, name, **cells, seconds=round(time.perf_counter() - started, 2))
        free()  # so that the next row's peak of memory is its own


def free():
    """Give back what a failed or finished row held."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def markdown(folder):
    """All rows of a folder as tables, in the order in which their first rows came."""
    tables = {}
    path = Path(folder) / "rows.jsonl"
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        row = json.loads(line)
        tables.setdefault((row.pop("part"), row.pop("table")), []).append(row)
    text = []
    for (part, table), rows in tables.items():
        columns = list(dict.fromkeys(column for row in rows for column in row))
        # The name comes first and the seconds last; the sort keeps the order of the others.
        columns.sort(key=lambda column: (column != "row", column == "seconds"))
        text.append(f"\n### {part}: {table}\n")
        lines = [[cell(row.get(column)) for column in columns] for row in rows]
        text.append(cli.markdown([list(map(cell, columns)), *lines]))
    return "\n".join(text) + "\n"


def cell(value):
    if isinstance(value, bool):
        return "yes" if value else "NO"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    # A bar that looks the same, as those of |ratio − 1|, so that the text is readable as it is.
    return "" if value is None else str(value).replace("\n", " ").replace("|", "∣")
