"""Training programs started as users start them, for the tests of resume and of several processes."""

import json
import os
import resource
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

ROOT = Path(__file__).resolve().parent.parent


def command(program, dataset, out, *flags, processes=1):
    launcher = [sys.executable] if processes == 1 else [
        sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return [*launcher, str(ROOT / program), "--data", str(dataset), "--out", str(out), *map(str, flags)]


def start(*args, **kwargs):
    return subprocess.Popen(command(*args, **kwargs), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                            env={**os.environ, "OMP_NUM_THREADS": "1"})


def finish(process, code=0):
    output = process.communicate(timeout=300)[0]
    assert process.returncode == code, output[-3000:]
    return output


@contextmanager
def full_disk(size):
    """Within it no file of this process can grow beyond so many bytes; the system refuses it as it does on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))  # Python ignores the signal that comes with it
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextmanager
def locked(path):
    """Within it another process has locked the file; BlockingIOError if this one has it already."""
    code = ("import fcntl, sys\n"
            "try: fcntl.lockf(file := open(sys.argv[1], 'w'), fcntl.LOCK_EX | fcntl.LOCK_NB)\n"
            "except OSError: sys.exit()\n"
            "print('locked', flush=True); sys.stdin.read()\n")
    with subprocess.Popen([sys.executable, "-c", code, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        if other.stdout.readline() != "locked\n":
            raise BlockingIOError(path)
        yield
        other.kill()  # which gives the lock up


def size_of(folder):
    """Bytes of all files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def log_of(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def without_times(records):
    return [{k: v for k, v in r.items() if not k.startswith(("seconds", "tokens_per", "memory"))} for r in records]


def stop_inside(target, call, module, *args):
    """Run a program that gets SIGTERM at the so manyth call of a function, "module.name"; its output. It must end with 143."""
    stopper = (f"import os, signal, sys, {module}, {target.split('.')[0]}\n"
               f"plain, calls = {target}, []\n"
               "def stopping(*args, **options):\n"
               "    calls.append(1)\n"
               f"    if len(calls) == {call}: os.kill(os.getpid(), signal.SIGTERM)\n"
               "    return plain(*args, **options)\n"
               f"{target} = stopping\n"
               f"code = {module}.main(sys.argv[1:])\n"
               "print('calls', len(calls))\n"
               "sys.exit(code)\n")
    return finish(subprocess.Popen([sys.executable, "-c", stopper, *command(f"{module}.py", *args)[2:]], cwd=ROOT,
                                   stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                                   env={**os.environ, "OMP_NUM_THREADS": "1"}), 143)


def checkpoint_of(folder):
    """{name: whole tensor} of a checkpoint, however many processes have written it."""
    with tempfile.TemporaryDirectory() as temporary:
        dcp_to_torch_save(folder, Path(temporary) / "whole.pt")
        return torch.load(Path(temporary) / "whole.pt", weights_only=True)


def kill_inside_second_checkpoint(module, *args):
    """Run a program that kills itself while it writes its second checkpoint; the finished process."""
    killer = (f"import os, signal, sys, torch, {module}\n"
              "from torch.distributed.checkpoint import FileSystemWriter\n"
              "finish, calls = FileSystemWriter.finish, []\n"
              "def killing(*args, **options):\n"
              "    calls.append(1)\n"
              "    if len(calls) == 2:\n"
              "        os.kill(os.getpid(), signal.SIGKILL)\n"
              "    finish(*args, **options)\n"
              "FileSystemWriter.finish = killing\n"
              f"{module}.main(sys.argv[1:])\n")
    return subprocess.run([sys.executable, "-c", killer, *command(f"{module}.py", *args)[2:]], cwd=ROOT,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
