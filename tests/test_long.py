"""Two thousand steps of both trainings: memory and descriptors stay what they are, the disk within what was said.

    nice pytest -n0 -s -m slow tests/test_long.py                # 10 minutes on one core
    LONG_STEPS=20000 LONG_RECORD=long.jsonl pytest -n0 -s -m slow tests/test_long.py
"""

import json
import os
import re
import statistics
import subprocess
import time
from pathlib import Path

import pytest

from parts.files import append_rows
from tests import launch, smallest
from tiny.dataset import write_tiny

pytestmark = pytest.mark.slow
STEPS = int(os.environ.get("LONG_STEPS", 2000))
RECORD = os.environ.get("LONG_RECORD")
PROGRAMS = {
    "train_gen.py": "--group 2 --batch 1 --micro 2 --size 16 --sde-steps 2 --window 1 --window-within 1 "
                    "--sample-steps 2 --guidance 1 --eval-rows 2 --lora-rank 1",
    "train_judge.py": "--group 2 --batch 1 --micro 1 --eval-rows 2 --lora --lora-rank 1 --max-new-tokens 40 --max-pixels 1000",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("long")
    write_tiny(folder / "dataset", train=8, test=4, seed=8)
    smallest.write_generator(folder / "generator")
    smallest.write_judge(folder / "judge")
    return folder


def sample(pid, out):
    """Resident memory and open files of a process, and the bytes of its folder."""
    status = Path(f"/proc/{pid}/status").read_text()
    # the least of several: at any moment a file may be open for writing
    descriptors = min(len(list(Path(f"/proc/{pid}/fd").iterdir())) for _ in range(20) if time.sleep(0.01) is None)
    return {"memory_mib": int(re.search(r"VmRSS:\s+(\d+)", status)[1]) / 1024, "descriptors": descriptors, "disk": launch.size_of(out)}


def drift(values):
    """Change from the first fifth of the values to the last, relative to the first."""
    part = max(1, len(values) // 5)
    first, last = statistics.median(values[:part]), statistics.median(values[-part:])
    return last / first - 1


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_long_run_takes_no_more_memory_descriptors_and_disk(program, folder, tmp_path):
    models = {"train_gen.py": ["--model", folder / "generator", "--judge", folder / "judge"],
              "train_judge.py": ["--model", folder / "judge"]}[program]
    flags = [*PROGRAMS[program].split(), "--steps", STEPS, "--eval-every", STEPS // 4, "--save-every", STEPS // 20, "--device", "cpu"]
    out = tmp_path / "out"
    with open(tmp_path / "output", "w") as output:
        process = subprocess.Popen(launch.command(program, folder / "dataset", out, *models, *flags), stdout=output, stderr=output,
                                   env={**os.environ, "OMP_NUM_THREADS": "1"})
        samples, due = [], STEPS // 20
        while process.poll() is None:
            time.sleep(0.1)
            steps = (out / "log.jsonl").read_bytes().count(b"\n") - 1 if (out / "log.jsonl").exists() else 0
            if steps >= due:
                try:
                    samples.append({"step": steps, **sample(process.pid, out)})
                except FileNotFoundError:  # the process has ended, or a checkpoint was removed just now
                    continue
                due += STEPS // 20
    said = (tmp_path / "output").read_text()
    assert process.returncode == 0, said[-3000:]
    warm = [each for each in samples if each["step"] >= STEPS // 10]  # not the first tenth
    most, unit = re.search(r"takes at most ([\d.]+) (KB|MB)", said).groups()
    row = {"program": program, "steps": STEPS, "flags": PROGRAMS[program], "samples": len(warm),
           "memory_mib": [round(each["memory_mib"], 1) for each in samples], "drift": round(drift([each["memory_mib"] for each in warm]), 4),
           "descriptors": sorted({each["descriptors"] for each in warm}), "disk": [each["disk"] for each in samples],
           "disk_said": round(float(most) * {"KB": 1e3, "MB": 1e6}[unit])}
    print(json.dumps(row))
    if RECORD:
        append_rows(RECORD, [row])
    assert [record["step"] for record in launch.log_of(out)] == list(range(STEPS + 1)) and len(warm) >= 5
    assert abs(row["drift"]) <= 0.02 and len(row["descriptors"]) == 1
    assert max(row["disk"]) <= row["disk_said"]
