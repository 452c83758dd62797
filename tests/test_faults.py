"""Faults while real programs run: kills at random moments, a dead process, a full disk, a download that is cut off.

    nice pytest -n0 -s -m slow tests/test_faults.py                       # 13 minutes on one core
    FAULTS_KILLS=200 FAULTS_SEED=1 FAULTS_RECORD=kills.jsonl pytest -n0 -s -m slow tests/test_faults.py -k kill

Every program is first run undisturbed. Then the same command is killed, or its disk refuses to grow a file, and it is given
again until it ends well; what lies in its folder must then be the same, and what had been kept must not have been done again.
"""

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from parts.files import append_rows, read_records
from tests import launch, smallest
from tests.test_prepare import write_emoset
from tiny.dataset import write_tiny

pytestmark = pytest.mark.slow
KILLS = int(os.environ.get("FAULTS_KILLS", 20))  # over all programs
SEED = int(os.environ.get("FAULTS_SEED", 0))
RECORD = os.environ.get("FAULTS_RECORD")  # a file of JSON lines that the kills are added to
TICKS = os.sysconf("SC_CLK_TCK")
PRETRAIN = """
import sys
from pathlib import Path
from tiny import pretrain
pretrain.CACHE, pretrain.WEIGHTS = Path(sys.argv[1]) / "cache", Path(sys.argv[1]) / "weights"
sys.exit(pretrain.main(sys.argv[2:]))
"""


@dataclass
class Program:
    command: Callable  # (its folder) -> the command line
    end: Callable  # (its folder) -> {name: what must be the same}
    kept: Callable = lambda out: []  # (its folder) -> records that are never made again, in order
    units: Callable = lambda out: (None, None)  # (its folder) -> (what it has logged, what it has saved), counted
    most_lost: int = 0  # of these units
    before: Callable = lambda out: None  # makes what the folder holds at the start


# ----------------------------------------------------------------------------------------------------------------------
# The programs


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A folder with a dataset, a part of EmoSet, the smallest models, and the data that pretraining reads."""
    folder = tmp_path_factory.mktemp("shared")
    write_tiny(folder / "dataset", train=8, test=4, seed=8)
    write_emoset(folder / "emoset")
    smallest.write_generator(folder / "generator")
    smallest.write_judge(folder / "judge")
    subprocess.run([sys.executable, "-c", PRETRAIN, folder, "data", "--rows", "64"], cwd=launch.ROOT, check=True, stderr=subprocess.DEVNULL)
    return folder


def files(out, *patterns):
    """{path: content} of the files that match, without the names of the folders in their texts."""
    found = [path for pattern in patterns for path in sorted(out.glob(pattern)) if path.is_file()]
    return {str(path.relative_to(out)): path.read_bytes().replace(str(out).encode(), b"OUT") for path in found}


def log_without_times(out):
    log = launch.without_times(launch.log_of(out))
    assert [record["step"] for record in log] == list(range(len(log)))  # each step once, in order
    return log


def state_of(out):
    """{name: bytes} of the newest checkpoint."""
    newest = sorted(out.glob("checkpoint-" + "[0-9]" * 8))[-1]
    return {name: tensor.numpy().tobytes() for name, tensor in launch.checkpoint_of(newest).items()}


def saved_step(out):
    return max((int(folder.name[-8:]) for folder in out.glob("checkpoint-" + "[0-9]" * 8)), default=0)


def training(program, flags, patterns, processes=1):
    """Either training; shared: the folder of the fixture."""
    def command(out, shared):
        models = {"train_gen.py": ["--model", shared / "generator", "--judge", shared / "judge"],
                  "train_judge.py": ["--model", shared / "judge"]}[program]
        return launch.command(program, shared / "dataset", out, *models, *flags, "--device", "cpu", processes=processes)

    return lambda shared: Program(
        partial(command, shared=shared),
        end=lambda out: {"log": log_without_times(out), **files(out, *patterns), **state_of(out)},
        # with the seconds that a step took, which tell a step from the same one made again
        kept=lambda out: read_records(out / "log.jsonl", until=saved_step(out)) if saved_step(out) else [],
        units=lambda out: (max((r["step"] for r in read_records(out / "log.jsonl")), default=0), saved_step(out)),
        most_lost=4)


def lines_of(path):
    """The whole lines of a file, as records."""
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]] if path.exists() else []


def evaluation(shared):
    flags = "--cases 16 --micro 2 --sample-steps 2 --size 64 --device cpu".split()
    kept = lambda out: [*lines_of(out / "numbers.jsonl"), *lines_of(out / "words.jsonl")]  # noqa: E731
    return Program(
        lambda out: [sys.executable, "-m", "evaluation", "run", *flags, "--judge", str(shared / "judge"), "--out", str(out)],
        end=lambda out: {"records": [{k: v for k, v in r.items() if k != "seconds"} for r in kept(out)],
                         "figures": (out / "evaluate.json").exists()},
        kept=kept, units=lambda out: (len(kept(out)),) * 2)


def captioning(shared):
    flags = "--train 8 --test 4 --micro 2 --max-new-tokens 24 --device cpu".split()
    kept = lambda out: lines_of(out / "captions-0.jsonl")  # noqa: E731
    return Program(
        lambda out: [sys.executable, "-m", "prepare.emoset", "--emoset", str(shared / "emoset"), "--out", str(out),
                     "--captioner", str(launch.ROOT / "tiny" / "weights" / "judge"), *flags],
        end=lambda out: files(out, "*.jsonl", "*.json", "images/*"), kept=kept, units=lambda out: (len(kept(out)),) * 2)


def scenes(shared):
    return Program(
        lambda out: [sys.executable, "-m", "tiny.dataset", "--out", str(out), "--train", "60", "--test", "20"],
        end=lambda out: files(out, "*.jsonl", "images/*"), most_lost=80,
        units=lambda out: (len(list(out.glob("images/*"))), 80 * (out / "train.jsonl").exists()))


def pretraining_data(shared):
    return Program(lambda out: [sys.executable, "-c", PRETRAIN, str(out), "data", "--rows", "64"],
                   end=lambda out: files(out, "cache/*"))


def pretraining_vae(shared):
    return Program(
        lambda out: [sys.executable, "-c", PRETRAIN, str(out), "vae", "--samples", "320", "--save-every", "0.2"],
        before=lambda out: shutil.copytree(shared / "cache", out / "cache"),
        # which steps the log tells of depends on the clock
        end=lambda out: {**files(out, "weights/**/*"), "last": lines_of(out / "cache" / "vae.log")[-1]["step"],
                         "order": [r["step"] for r in lines_of(out / "cache" / "vae.log")] == sorted(
                             {r["step"] for r in lines_of(out / "cache" / "vae.log")})},
        kept=lambda out: lines_of(out / "cache" / "vae.log"),
        # a line tells of a state that was saved just before
        units=lambda out: (max((r["step"] for r in lines_of(out / "cache" / "vae.log")), default=0),) * 2)


GENERATOR = training(
    "train_gen.py", "--group 2 --batch 2 --micro 2 --size 32 --sde-steps 4 --window 2 --window-within 3 "
    "--sample-steps 2 --eval-rows 3 --eval-every 10 --save-every 4 --lora-rank 16 --steps 24".split(),
    ("adapter/*", "adapters/*/*", "strip*", "strips/*"))
JUDGE = training("train_judge.py", "--group 2 --batch 2 --micro 1 --eval-rows 2 --eval-every 10 --save-every 4 --max-new-tokens 40 "
                 "--steps 40".split(), ("judge/*",))
PROGRAMS = {
    "train_gen.py": GENERATOR, "train_judge.py": JUDGE, "evaluation run": evaluation, "tiny.dataset": scenes,
    "prepare.emoset": captioning, "tiny.pretrain data": pretraining_data, "tiny.pretrain vae": pretraining_vae}


# ----------------------------------------------------------------------------------------------------------------------
# Processes


def begin(program, out, limit=None):
    """The program as a process in its folder; limit: bytes beyond which none of its files can grow."""
    def restrict():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))

    if not out.exists():
        out.mkdir()
        program.before(out)
    with open(out.with_name(out.name + ".output"), "w") as file:
        sink = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=file)  # what it says is not limited
    process = subprocess.Popen(program.command(out), cwd=launch.ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"},
                               stdout=sink.stdin, stderr=sink.stdin, preexec_fn=None if limit is None else restrict)
    sink.stdin.close()
    process.sink = sink
    return process


def finish(program, out, code=0, limit=None):
    """The output of the program, which must end by itself with that code."""
    return end_of(begin(program, out, limit), out, code)


def end_of(process, out, code=0):
    returned = process.wait()
    process.sink.wait()
    output = out.with_name(out.name + ".output").read_text()
    assert returned == code, output[-3000:]
    return output


def family(pid):
    """The numbers of a process and of all that it has started."""
    try:
        children = [int(child) for task in Path(f"/proc/{pid}/task").iterdir() for child in (task / "children").read_text().split()]
    except (FileNotFoundError, ProcessLookupError):
        return []
    return [pid, *(each for child in children for each in family(child))]


def cpu_seconds(pids):
    """What the processes have computed. A clock that does not depend on what else the machine does."""
    total = 0
    for pid in pids:
        try:
            # its own time, in programs and in the system, and that of its processes that have ended
            total += sum(map(int, stat_of(pid)[11:15])) / TICKS
        except (FileNotFoundError, ProcessLookupError):
            continue
    return total


def stat_of(pid):
    """The fields of /proc/PID/stat from the state on."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def runs(pid):
    try:
        return stat_of(pid)[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def gone(pids, seconds=60):
    """Whether all processes end within so many seconds."""
    deadline = time.monotonic() + seconds
    while any(map(runs, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not any(map(runs, pids))


@pytest.fixture(scope="module")
def whole(shared, tmp_path_factory):
    """whole(make) -> (program, its folder after an undisturbed run, the seconds that took); each is run once."""
    known = {}

    def run(make):
        if make not in known:
            program, out = make(shared), tmp_path_factory.mktemp("whole") / "out"
            process, seconds = begin(program, out), 0.0
            while process.poll() is None:
                seconds = max(seconds, cpu_seconds(family(process.pid)))
                time.sleep(0.02)
            end_of(process, out)
            known[make] = program, out, seconds
        return known[make]

    return run


def same(program, out, other):
    """Whether two folders hold the same; prints what does not."""
    ours, theirs = program.end(out), program.end(other)
    different = [name for name in ours | theirs if name not in ours or name not in theirs or ours[name] != theirs[name]]
    print("different:", different) if different else None
    return not different


# ----------------------------------------------------------------------------------------------------------------------
# Kills


def kill_after(process, seconds):
    """Kill a process when it has computed for so many seconds; the processes that it had, or None if it ended before."""
    while process.poll() is None:
        pids = family(process.pid)
        if cpu_seconds(pids) >= seconds:
            process.send_signal(signal.SIGKILL)
            process.wait()
            return pids if process.returncode == -signal.SIGKILL else None
        time.sleep(0.01)
    return None


def record(row):
    print(json.dumps(row))
    if RECORD:
        append_rows(RECORD, [row])


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_that_is_killed_again_and_again_ends_as_an_undisturbed_one(name, whole, tmp_path):
    number = list(PROGRAMS).index(name)
    kills = KILLS // len(PROGRAMS) + (number < KILLS % len(PROGRAMS))
    program, undisturbed, seconds = whole(PROGRAMS[name])
    rng = random.Random(f"{SEED} {name}")
    done, rounds, equal = 0, 0, True
    while done < kills:  # a round ends when the program does, and the next begins with an empty folder
        out = tmp_path / f"round{rounds}"
        rounds += 1
        kept = []
        while True:
            moment = rng.uniform(0.3, 1) * seconds  # it computes little before its models are loaded
            process = begin(program, out)
            pids = kill_after(process, moment if done < kills else float("inf"))
            assert program.kept(out)[:len(kept)] == kept  # what had been kept was not made again
            if pids is None:
                end_of(process, out)
                break
            done += 1
            assert gone(pids)
            kept, (logged, saved) = program.kept(out), program.units(out)
            assert logged is None or logged - saved <= program.most_lost
            record({"program": name, "kill": done, "round": rounds, "cpu_seconds": round(moment, 2), "of": round(seconds, 2),
                    "logged": logged, "saved": saved, "lost": None if logged is None else logged - saved})
        equal &= same(program, out, undisturbed)
    record({"program": name, "seed": SEED, "kills": done, "rounds": rounds, "equal": equal})
    assert equal and done == kills


@pytest.mark.parametrize("name", ["train_gen.py", "train_judge.py"])
def test_a_dead_rank_ends_the_run_and_the_same_command_goes_on(name, shared, tmp_path):
    flags = {"train_gen.py": "--group 2 --batch 2 --micro 2 --size 32 --sde-steps 2 --window 1 --window-within 1 "
                             "--sample-steps 2 --eval-rows 2 --eval-every 0 --save-every 4 --lora-rank 4 --steps 12",
             "train_judge.py": "--group 2 --batch 2 --micro 1 --eval-rows 2 --save-every 4 --max-new-tokens 40 --steps 12"}[name].split()
    program = training(name, flags, ("adapter/*", "judge/*"), processes=2)(shared)
    finish(program, tmp_path / "whole")
    out = tmp_path / "out"
    process = begin(program, out)
    while len(read_records(out / "log.jsonl")) < 7 and process.poll() is None:
        time.sleep(0.05)
    pids = family(process.pid)
    ranks = {pid: Path(f"/proc/{pid}/environ").read_bytes().split(b"\0") for pid in pids}
    [last] = [pid for pid, environment in ranks.items() if b"RANK=1" in environment]
    os.kill(last, signal.SIGKILL)
    began = time.monotonic()
    assert process.wait(timeout=300) != 0 and gone(pids)
    record({"program": f"torchrun {name}", "killed": "rank 1 of 2", "ended after seconds": round(time.monotonic() - began, 1)})
    logged, saved = program.units(out)
    assert saved >= 4 and logged - saved <= 4
    finish(program, out)
    assert same(program, out, tmp_path / "whole")


# ----------------------------------------------------------------------------------------------------------------------
# A full disk


def fresh(whole, out):
    return None


def exporting(folder):
    """A start at which nothing but the export is left to do."""
    def start(whole, out):
        shutil.copytree(whole, out)
        shutil.rmtree(out / folder)
    return start


def size(name, less=1):
    return lambda whole: (whole / name).stat().st_size - less


FULL = [  # the program, what its folder holds at the start, the most bytes of a file, the file that is then refused
    (GENERATOR, fresh, size("checkpoint-00000024/__0_0.distcp"), "checkpoint-00000004.tmp"),
    (GENERATOR, fresh, size("strips/00000000.png"), "strips/00000000.png"),
    (GENERATOR, exporting("adapter"), size("adapter/adapter_model.safetensors"), "adapter/adapter_model.safetensors"),
    (JUDGE, fresh, size("checkpoint-00000040/__0_0.distcp"), "checkpoint-00000004.tmp"),
    (JUDGE, exporting("judge"), size("judge/model.safetensors"), "judge/model.safetensors"),
    (evaluation, fresh, size("numbers.jsonl", less=500), "numbers.jsonl"),
    (scenes, fresh, lambda whole: 3000, "images/test_"),
    (captioning, fresh, lambda whole: 500, "selection.json"),
    (pretraining_data, fresh, size("cache/pictures.npy"), "cache/pictures.npy"),
    (pretraining_vae, fresh, lambda whole: 1_000_000, "cache/vae.pt"),
]


@pytest.mark.parametrize("make, start, limit, refused", FULL, ids=[refused for *_, refused in FULL])
def test_a_full_disk_is_one_line_and_the_same_command_goes_on(make, start, limit, refused, whole, tmp_path):
    program, undisturbed, _ = whole(make)
    out = tmp_path / "out"
    start(undisturbed, out)
    output = finish(program, out, code=1, limit=limit(undisturbed))
    said = [line for line in output.split("\n") if "error: " in line]
    assert len(said) == 1 and "Traceback" not in output
    assert f"error: {out}/{refused}" in said[0] and "cannot be written (File too large); make room there" in said[0]
    assert not [path for path in out.rglob("*.tmp") if path.is_file()]
    kept = program.kept(out)
    finish(program, out)
    assert program.kept(out)[:len(kept)] == kept and same(program, out, undisturbed)


@pytest.mark.parametrize("make", [GENERATOR, JUDGE], ids=["train_gen.py", "train_judge.py"])
def test_a_disk_that_fills_in_the_middle_of_a_run_is_told_with_its_log(make, whole, tmp_path):
    program, undisturbed, _ = whole(make)
    out = tmp_path / "out"
    process = begin(program, out)
    while len(read_records(out / "log.jsonl")) < 6 and process.poll() is None:
        time.sleep(0.01)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
    output = end_of(process, out, code=1)
    assert output.count("error: ") == 1 and "cannot be written (File too large); make room there" in output
    finish(program, out)
    assert same(program, out, undisturbed)


# ----------------------------------------------------------------------------------------------------------------------
# A download


CONTENT = os.urandom(200_000)
DOWNLOAD = """
import sys
from parts import cli, weights
sys.exit(cli.run_program(lambda: print(weights.find("owner/name", "vae"))))
"""


class Hub(BaseHTTPRequestHandler):
    """As much of a hub as a download of one file needs; it breaks the file off while server.cuts is true."""

    def log_message(self, *_):
        return

    def do_HEAD(self):
        self.answer(b"")

    def do_GET(self):
        if "/tree/" in self.path:
            self.answer(json.dumps([{"type": "file", "path": "vae/model.safetensors", "size": len(CONTENT), "oid": "b" * 40}]).encode())
        elif self.path.startswith("/api/"):
            self.answer(json.dumps({"id": "owner/name", "sha": "a" * 40, "siblings": [{"rfilename": "vae/model.safetensors"}]}).encode())
        else:
            self.answer(CONTENT[:50_000] if self.server.cuts else CONTENT, len(CONTENT))

    def answer(self, content, length=None):
        self.send_response(200)
        headers = {"Content-Type": "application/json", "Content-Length": length or len(content) or len(CONTENT), "ETag": '"c"',
                   "X-Repo-Commit": "a" * 40}
        for header, value in headers.items():
            self.send_header(header, str(value))
        self.end_headers()
        self.wfile.write(content)
        self.close_connection = True


def test_a_download_that_is_cut_off_is_one_line_and_the_same_command_goes_on(tmp_path):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    environment = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    environment |= {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(tmp_path), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    ends = []
    for server.cuts in (True, False):
        with tempfile.TemporaryFile("w+") as output:
            code = subprocess.run([sys.executable, "-c", DOWNLOAD], cwd=launch.ROOT, env=environment, stdout=output, stderr=output).returncode
            output.seek(0)
            ends.append((code, output.read().splitlines()))
    server.shutdown()
    (first, said), (second, printed) = ends
    assert first == 2 and "Traceback" not in "\n".join(said)
    assert said[-1].startswith("error: owner/name: the hub cannot be reached, or broke off (peer closed connection")
    assert "the same command goes on with the rest" in said[-1]
    assert second == 0 and (Path(printed[-1]) / "model.safetensors").read_bytes() == CONTENT
