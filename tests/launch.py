"""Programs in processes of their own, for the tests of resume, of signals and of several processes.

`started` starts a training program as users do. The other ways fork this process, which has imported torch already:
importing it anew takes longer than most tests. On a machine with a GPU they start new ones, as CUDA forbids to fork.
"""

import importlib
import json
import multiprocessing
import os
import pkgutil
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
ONE_THREAD = {"OMP_NUM_THREADS": "1"}


def command(program, dataset, out, *flags, processes=1):
    launcher = [sys.executable] if processes == 1 else [
        sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return [*launcher, str(ROOT / program), "--data", str(dataset), "--out", str(out), *map(str, flags)]


def started(*args, **kwargs):
    """The output of a `command`, which must end well."""
    done = subprocess.run(command(*args, **kwargs), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                          env={**os.environ, **ONE_THREAD}, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:]
    return done.stdout


def fork(work, *args, output=None, environment=()):
    """A process that calls work(*args) and ends with the code it returns; it writes into the file `output`."""
    if output is None:
        handle, output = tempfile.mkstemp()
        os.close(handle)
    context = multiprocessing.get_context("spawn" if torch.cuda.is_available() else "fork")
    process = context.Process(target=begin, args=(output, dict(environment), work, args))
    process.start()
    process.output = Path(output)
    return process


def begin(output, environment, work, args):
    """Make a forked process what a new one would be, and let it work."""
    file = os.open(output, os.O_WRONLY | os.O_APPEND)
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(file, number)
        setattr(sys, name, open(number, "w", buffering=1, encoding="utf-8", closefd=False))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    tqdm.set_lock(threading.RLock())  # a process that is killed would leave the common one taken
    # threads are not forked, and who waits for them would wait for ever
    os.environ.update({**ONE_THREAD, "TOKENIZERS_PARALLELISM": "false", **environment})
    torch.set_num_threads(1)
    code = 1
    try:
        code = work(*args) or 0
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    os._exit(code)  # at its end Python would wait for the threads of the process that was forked


def finish(process, code=0):
    """The output of a process of `fork`, which must end with that exit code."""
    process.join(300)
    output = process.output.read_text(encoding="utf-8")
    process.output.unlink()
    assert process.exitcode == code, f"exit code {process.exitcode}\n{output[-3000:]}"
    return output


def start(module, *flags, before=None):
    """A process that runs a program's main; before() is called first."""
    return fork(run_main, module, list(map(str, flags)), before)


def run_main(module, flags, before=None):
    if before is not None:
        before()
    return importlib.import_module(module).main(flags)


def signal_at(call, target, number):
    """For `start(before=…)`: the process gets a signal in the so manyth call of "module.function"; it tells every call."""
    owner, _, name = target.rpartition(".")
    owner = pkgutil.resolve_name(owner)
    plain, calls = getattr(owner, name), []

    def watched(*args, **options):
        calls.append(1)
        print(f"call {len(calls)} of {target}")
        if len(calls) == call:
            os.kill(os.getpid(), number)
        return plain(*args, **options)

    setattr(owner, name, watched)


def stop_inside(call, target, number=signal.SIGTERM):
    return partial(signal_at, call, target, number)


# while it writes its second checkpoint
kill_inside_second_checkpoint = partial(signal_at, 2, "torch.distributed.checkpoint.FileSystemWriter.finish", signal.SIGKILL)


def together(processes, module, *flags):
    """Run a program in several processes, which `torchrun` would start; the output of the first."""
    with tempfile.TemporaryDirectory() as folder:
        ranks = [fork(run_main, module, list(map(str, flags)), partial(join, rank, processes, folder),
                      environment={"RANK": str(rank)}) for rank in range(processes)]
        first, *_ = [finish(rank) for rank in ranks]
        return first


def join(rank, world, folder):
    """Let a process meet the others by a file, which needs no free port."""
    dist.init_process_group = partial(dist.init_process_group, rank=rank, world_size=world,
                                      init_method=f"file://{folder}/meeting")


def run_command(command, stdout, stderr, env, before=None):
    """In place of subprocess.run: a command `python -m module …` or `python program.py …` in a process of `fork`."""
    assert command[0] == sys.executable and stdout == stderr
    name, *flags = command[1:] if command[1] != "-m" else command[2:]
    name = Path(name).stem if name.endswith(".py") else name
    if (ROOT / name.replace(".", "/") / "__main__.py").exists():
        name += ".__main__"
    process = fork(run_main, name, flags, before, output=stdout.name, environment=env)
    process.join()
    return subprocess.CompletedProcess(command, process.exitcode)


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


def checkpoint_of(folder):
    """{name: whole tensor} of a checkpoint, however many processes have written it."""
    with tempfile.TemporaryDirectory() as temporary:
        dcp_to_torch_save(folder, Path(temporary) / "whole.pt")
        return torch.load(Path(temporary) / "whole.pt", weights_only=True)
