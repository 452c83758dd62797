"""Memory that a step needs beyond what was there before it, in a process of its own: shared by programs of this folder.

A program that is started with `--memory-of NAME` prints `peak` of that path and nothing else. Sizes are in MB, as Linux
counts resident pages.
"""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def resident(key):
    """MB of this process: "VmRSS" now, "VmHWM" at most since the last reset."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status[key].split()[0]) / 1024


def peak(step, times=1):
    """MB beyond those held now that calls of `step` need. Only true in a process that did little else before.

    The system counts pages in batches: a step that needs less than some tenths of a MB reads as 0.
    """
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = resident("VmRSS")
    for _ in range(times):
        step()
    return max(0.0, resident("VmHWM") - before)


def in_fresh_process(program, argv, *name):
    """What `program`, started again with the same arguments, says of the path `name`."""
    module = f"bench.{Path(program).stem}"
    command = [sys.executable, "-m", module, *argv, "--memory-of", *name]
    return float(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT).stdout)
