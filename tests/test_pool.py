"""Many seeds on all cores: order, and processes that end with the program."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.launch import ROOT
from tiny.pool import interrupted_once, on_all_cores


def double(x):
    return 2 * x


def test_results_come_in_the_order_of_the_items():
    assert list(on_all_cores(double, range(100), "numbers")) == list(range(0, 200, 2))


WAITING = """
import os, time
from tiny.pool import on_all_cores
def wait(_):
    os.write(1, b"%d\\n" % os.getpid())  # at once: two prints might mix
    time.sleep(60)
list(on_all_cores(wait, range(64), ""))
"""


def runs(pid):
    """Whether a process is there, and not only kept in mind until somebody asks how it ended."""
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z"


def test_no_process_outlives_a_program_that_was_killed():
    program = subprocess.Popen([sys.executable, "-c", WAITING], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    pids = [int(program.stdout.readline()) for _ in range(2)]
    assert all(map(runs, pids))
    program.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 60
    while any(map(runs, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(runs, pids))


def test_only_the_first_ctrl_c_raises_until_all_is_tidied():
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), interrupted_once():
        try:
            os.kill(os.getpid(), signal.SIGINT)
        finally:
            os.kill(os.getpid(), signal.SIGINT)  # would raise anew, in the middle of the tidying
            tidied = True
    assert tidied and signal.getsignal(signal.SIGINT) is before


def ignores_ctrl_c(_):
    return signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_ctrl_c_is_for_the_program_that_owns_the_pool():
    assert all(on_all_cores(ignores_ctrl_c, range(4), "processes"))


def test_ctrl_c_twice_ends_a_program_and_its_processes():
    code = WAITING.replace("time.sleep(60)", "time.sleep(0.05)").replace("range(64)", "range(10_000)")
    program = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                               text=True, start_new_session=True)
    pids = {int(program.stdout.readline()) for _ in range(8)}
    for _ in range(2):
        os.killpg(program.pid, signal.SIGINT)  # as a terminal does
    program.communicate(timeout=60)
    deadline = time.monotonic() + 60
    while any(map(runs, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert program.returncode != 0 and not any(map(runs, pids))
