"""What the training programs share: processes, and a run's folder with log, curves and checkpoints.

    with run:                    # Ctrl-C and SIGTERM now only set a flag
        for step in range(start, total):
            ...                  # the steps stand in train_judge.py and train_gen.py
            run.log(record)
            if run.save_due(step + 1, args): run.save(...)
            if run.stopped(): break

A run's folder has `settings.json`, `log.jsonl` (a line a step), `curves.png`, and
`checkpoint-<step>/` of torch.distributed.checkpoint. A checkpoint is written under a temporary name
and renamed when it is complete, so a killed run goes on from the last whole one, on any number of
processes. No state of a random generator is stored: every step derives its seeds from the run's
seed and its own number.
"""

import hashlib
import json
import math
import os
import shutil
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

try:
    import fcntl
    import resource
except ImportError:  # Windows has neither: no lock of the folder there, and no figure of memory
    fcntl = resource = None

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from parts import checkpoints, cli, lora
from parts.cli import UserError
from parts.files import (
    append_rows,
    lock,
    open_picture,
    read_json,
    read_records,
    save_png,
    sync_folder,
    write_json,
    write_rows,
)
from parts.sheets import stacked
from parts.weights import own_rows

KEEP = 2  # checkpoints
DIGESTS = "digests.json"  # of a checkpoint's files
NO_SETTINGS = {"out", "device", "evaluate", "tensorboard"}  # flags that say nothing of the training
MAY_CHANGE = {  # settings that have no influence on what a step computes
    "steps", "epochs", "eval_every", "eval_rows", "save_every", "save_minutes", "micro",
    "checkpointing", "encoders", "mismatch"}
DIGESTED = {"rows": "dataset of --data", "own": "function of --reward"}  # of which digests are kept
START_ONLY = {"init_adapter"}  # models that a run with a checkpoint has no more need of
# Bytes that bound what lies beside the values of tensors: in a checkpoint for each tensor, of the
# log for each step, of the pictures of an evaluation (their own file, and a row of strip.png).
PER_TENSOR = 1_800
PER_STEP = 2_000
PER_EVALUATION = 2 * 6 * 128 * 128 * 3
SKIPS = 3  # steps in a row without a finite gradient that end a run
AGAIN = 1.0  # seconds: launchers may send a signal twice, so only a later one is a second wish


# --------------------------------------------------------------------------------------------------
# Processes


@dataclass(frozen=True)
class Processes:
    """The processes of a run as one of them sees them: `torchrun` starts one for each GPU."""
    rank: int
    world: int  # how many there are
    device: torch.device

    @property
    def first(self):
        return self.rank == 0

    def share(self, items):
        """This process's part of a list or tensor: a contiguous one, of equal length for all.

        Raises UserError if it cannot be divided.
        """
        check_shares(len(items), "the items of a step", self)
        each = len(items) // self.world
        # contiguous, so that `gather` puts the parts back in the order of the whole
        return items[self.rank * each:(self.rank + 1) * each]

    def total(self, values):
        """Sum over the processes of each value of a dict of numbers."""
        if self.world == 1:
            return dict(values)
        numbers = [float(value) for value in values.values()]
        # in float64 sums of counts stay exact
        sums = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        dist.all_reduce(sums)
        return dict(zip(values, sums.tolist(), strict=True))

    def gather(self, items):
        """Every process's list of plain objects, concatenated in the order of ranks, on all."""
        if self.world == 1:
            return list(items)
        parts = [None] * self.world
        dist.all_gather_object(parts, list(items))
        return [item for part in parts for item in part]

    def average_gradients(self, parameters):
        """Give every process the mean over processes of each gradient."""
        if self.world > 1:
            for parameter in parameters:
                dist.all_reduce(parameter.grad)  # the sum
                parameter.grad /= self.world

    def wait(self):
        if self.world > 1:
            dist.barrier()


def check_shares(items, flags, processes):
    """UserError, before anything is loaded, unless a step's items can be shared by the processes.

    flags: whose value or product the items are."""
    if items % processes.world:
        raise UserError(f"{flags}: {items} cannot be shared by {processes.world} processes; choose "
                        f"a multiple")


def start_processes(device=None):
    """The Processes that `torchrun` started, or one. device: cpu or cuda; None: a GPU if any."""
    device = cli.device_of(device)
    # torchrun tells a process its number and its GPU by environment variables
    if "RANK" not in os.environ:
        return Processes(0, 1, torch.device(device))
    if device == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    return Processes(dist.get_rank(), dist.get_world_size(), torch.device(device))


def run_in_processes(work, args):
    """The exit code of work(args, processes), with mistakes of the user told in one line."""
    def work_and_leave():
        processes = start_processes(args.device)
        try:
            return work(args, processes)
        finally:
            # also with one process, if torchrun started it or parts/sharding.py made it a group
            if dist.is_initialized():
                dist.destroy_process_group()

    return cli.run_program(
        work_and_leave, "stopped; the same command goes on after the last checkpoint")


# --------------------------------------------------------------------------------------------------
# Small parts of a training loop


def batch_indices(step, batch, count, seed):
    """Which of `count` items make the batch of step `step`; every epoch has its own permutation."""
    indices = []
    for number in range(batch):
        # counted over the whole run, whose epochs follow one another without a gap
        epoch, index = divmod(step * batch + number, count)
        if number == 0 or index == 0:
            generator = torch.Generator().manual_seed(seed * 1000 + epoch)
            order = torch.randperm(count, generator=generator).tolist()
        indices.append(order[index])
    return indices


def noise_seed(*numbers):
    """A seed in 0..2³² − 1; torch's generator of a CPU takes up no more bits than that."""
    digest = hashlib.sha256(repr(numbers).encode()).digest()
    return int.from_bytes(digest[:4], "big")


def figures_of(record):
    """{eval_…: figure} of a log's record; empty without an evaluation."""
    return {name: value for name, value in record.items() if name.startswith("eval_")}


def evaluation_due(step, args):
    """Whether the model is evaluated after `step`: at both ends, and every so many steps."""
    return step in (0, args.steps) or (args.eval_every > 0 and step % args.eval_every == 0)


def linear(first, last, step, total):
    """The learning rate of step 0..total − 1, on a line from `first` to `last`."""
    return first + (last - first) * (step / max(1, total - 1))


def steps_bar(title, start, steps, processes):
    """The numbers of the steps from `start` on, shown as a progress bar by the first process."""
    if start >= steps and processes.first:
        cli.say(f"this run has its {steps:,} steps already, so nothing is trained; give more "
                f"--steps, or, after a change of the code, another --out")
    return tqdm(range(start, steps), title, steps, initial=start, disable=not processes.first,
                dynamic_ncols=True)


def sizes(model, processes):
    """What is trained, and where: "1.23 M trained of 45.6 M, on 2 × cpu, 4 threads each"."""
    total = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    # Sums are rounded otherwise by another number of threads, so the same bits need the same one.
    threads = f", {torch.get_num_threads()} threads each" if processes.device.type == "cpu" else ""
    return (f"{trained / 1e6:,.2f} M trained of {total / 1e6:,.1f} M, on {processes.world} × "
            f"{processes.device.type}{threads}")


def check_ratio(deviation, limit, processes):
    """Raise UserError unless the ratio before the first update is 1: exactly on a CPU, where
    drawing and training share their arithmetic; on a GPU within `limit`, for its kernels may round
    differently from call to call, with a warning where the clip would already notice it."""
    if not deviation <= (0 if processes.device.type == "cpu" else limit):  # true for NaN, too
        raise UserError(f"before the first update the ratio is off by {deviation:.2g}; is the "
                        f"adapter on only in drawing, or only here, or the batch another?")
    if deviation > 1e-5 and processes.first:
        cli.say(f"before the first update the ratio is off by {deviation:.2g}, where it should be "
                f"exactly 1: drawing and training round differently (--mismatch sets the limit)")


class Timer:
    """Seconds since the last lap."""

    def __init__(self):
        self.last = time.perf_counter()

    def lap(self):
        now = time.perf_counter()
        seconds = now - self.last
        self.last = now
        return seconds


def peak_memory(device):
    """GiB: the most the GPU had allocated, or on a CPU the most that was resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    if resource is None:
        return math.nan
    # ru_maxrss is in KiB, but on macOS in bytes
    bytes_per_unit = 1 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * bytes_per_unit / 2**30


class EMA:
    """Exponential moving average of parameters. Within `with ema:` the model has its values."""

    def __init__(self, parameters, decay):
        self.parameters = parameters
        self.decay = decay
        self.values = [p.detach().clone() for p in parameters]

    @torch.no_grad()
    def add(self, step):
        """Take up the parameters after step 0, 1, …; the first steps are soon forgotten."""
        decay = min(self.decay, (1 + step) / (10 + step))
        for value, parameter in zip(self.values, self.parameters, strict=True):
            value.lerp_(parameter, 1 - decay)

    @torch.no_grad()
    def swap(self, *error):
        """Exchange the model's values and the averages; two calls change nothing."""
        for value, parameter in zip(self.values, self.parameters, strict=True):
            held = parameter.clone()
            parameter.copy_(value)
            value.copy_(held)

    __enter__ = __exit__ = swap


# --------------------------------------------------------------------------------------------------
# The folder


class Run:
    """A run's folder. Within `with run:` SIGTERM and Ctrl-C set a flag, so that the program can
    save the last whole step before it ends; a second one ends it at once.

    settings: written to settings.json, by `read_log`, when all that can fail at the start has been
    done. A run that goes on must have the same values, but for those of MAY_CHANGE; else UserError,
    as if another run is writing into the folder. One of them may be files, {flag of a model:
    weights.fingerprint}. curves: keys of the log. title: above the curves.
    """

    def __init__(self, folder, settings, processes, curves=(), title=""):
        self.folder = Path(folder)
        self.curves = curves
        self.title = title
        self.log_path = self.folder / "log.jsonl"
        self.processes = processes
        self.signal = None  # that asked this process to stop
        self.asked = 0.0  # when it came
        self.saved = 0  # steps of the newest checkpoint
        self.saved_at = time.monotonic()
        self.records = []  # the log's lines
        self.skipped = 0  # steps in a row whose gradient was not finite
        self.warned = set()  # of what has been warned already
        self.writer = None  # TensorBoard's
        self.open_writer = summary_writer() if settings.get("tensorboard") else None
        self.lock()
        settings = {name: value for name, value in settings.items() if name not in NO_SETTINGS}
        self.settings = json.loads(json.dumps(settings, default=str))  # as the file will have them
        path = self.folder / "settings.json"
        # a start that failed, such as by a mistake in one's own reward, binds nobody
        begun = self.checkpoints() or (self.log_path.exists() and self.log_path.stat().st_size)
        if path.exists() and begun:
            self.compare(read_json(path))

    def lock(self):
        """Make this run the only one that writes into its folder, until its process ends."""
        held = self.processes.first and not lock(self.folder / ".lock")
        if self.processes.total({"held": held})["held"]:
            raise UserError(f"{self.folder}: another run is writing there; wait for its end, or "
                            f"choose another --out")

    def compare(self, before):
        """Raise UserError unless the settings of the run in the folder, `before`, are this run's,
        and so are the files of its models, as far as it still reads them."""
        # 1. settings
        changed = [name for name in sorted(self.settings.keys() - MAY_CHANGE - {"files"})
                   if before.get(name) != self.settings[name]]
        for name, what in DIGESTED.items():
            if name in changed:
                raise UserError(f"{self.folder} holds a run with another {what}; put that back "
                                f"to go on, or choose another --out")
        if changed:
            held = ", ".join(f"{name} {before.get(name)!r}" for name in changed)
            given = ", ".join(repr(self.settings[name]) for name in changed)
            raise UserError(f"{self.folder} holds a run with {held}, not {given}; choose another "
                            f"--out, or repeat its settings to go on")
        # 2. files
        files = self.settings.get("files", {})
        if "files" not in before:  # of a run before their fingerprints were kept
            if files and self.processes.first:
                cli.say(f"{self.folder}: does not say of which files its models were; those there "
                        f"are now are taken, and kept in mind")
            return
        read = files.keys() - (START_ONLY if self.checkpoints() else set())
        changed = [name for name in sorted(read) if before["files"].get(name) != files[name]]
        if changed:
            named = ", ".join(f"--{name.replace('_', '-')} {self.settings[name]}"
                              for name in changed)
            raise UserError(f"{self.folder} holds a run with other files of {named}; put those "
                            f"back, or choose another --out")

    def __enter__(self):
        # those that stood before come back when the block ends, so that Ctrl-C works as usual then
        self.handlers = {number: signal.signal(number, self.ask_to_stop)
                         for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *error):
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def ask_to_stop(self, number, frame):
        now = time.monotonic()
        if self.signal is None:
            self.signal = number
            self.asked = now
            if self.processes.first:
                # print() may not be called within itself, where the signal may have come
                os.write(2, b"\nasked to stop: finishes an update, but no rollout or evaluation, "
                            b"then saves the last whole step; again: ends at once\n")
        elif now - self.asked >= AGAIN:
            raise KeyboardInterrupt

    def until_asked(self, items):
        """The items, no more of them once this process was asked to stop, but at least one."""
        for item in items:
            yield item
            if self.signal is not None:
                return

    def stopped(self):
        """Whether any process was asked to stop; the same answer on all."""
        # a signal may reach one process only, and all must leave the loop after the same step
        return self.processes.total({"stop": self.signal is not None})["stop"] > 0

    def stop_code(self, step):
        """Say that the run has stopped after `step`; the exit code: 130 for Ctrl-C, else 143."""
        if self.processes.first:
            cli.say(f"stopped after step {step:,}; the same command goes on from there")
        return 130 if self.signal == signal.SIGINT else 143

    # ----------------------------------------------------------------------------------------------
    # Log and curves

    def log(self, record):
        """Append a line, or replace the last one if it is of the same step; numbers rounded to 7
        digits, NaN as null."""
        rounded = {}
        for name, value in record.items():
            if isinstance(value, float):
                value = float(f"{value:.7g}") if math.isfinite(value) else None
            rounded[name] = value
        self.show([rounded])
        again = bool(self.records) and self.records[-1]["step"] == rounded["step"]
        self.records[len(self.records) - again:] = [rounded]
        if self.processes.first and again:
            write_rows(self.log_path, self.records)
        elif self.processes.first:
            append_rows(self.log_path, [rounded])

    def read_log(self, step):
        """Take up the log of a run that goes on after `step`, and return that step's record; lines
        of later steps, which a killed run wrote after its last checkpoint, go."""
        self.records = read_records(self.log_path, step)
        if not all(type(record.get("step")) is int for record in self.records):
            raise UserError(f"{self.log_path}: a line without its step; mend or remove it")
        if self.processes.first:
            write_json(self.folder / "settings.json", self.settings)
            if step:
                cli.say(f"goes on after step {step:,}")
            write_rows(self.log_path, self.records)
        if self.open_writer and self.processes.first:
            # written anew, so that it has what the log has, and nothing of steps that are undone
            folder = self.folder / "tensorboard"
            shutil.rmtree(folder, ignore_errors=True)
            self.writer = self.open_writer(str(folder))
            self.show(self.records)
        self.processes.wait()
        return self.records[-1] if self.records else {"step": step}

    def show(self, records):
        """Give the figures of records to TensorBoard, if it was asked for."""
        if self.writer is None:
            return
        for record in records:
            for name in record.keys() - {"step"}:
                if record[name] is not None:
                    self.writer.add_scalar(name, record[name], record["step"])
        self.writer.flush()

    def count_skipped(self, norm, batch):
        """1 if a step was skipped because the norm of its gradient is not finite, else 0.

        batch: what it was of, as a list of dicts, which is then kept in skipped.jsonl. Raises
        UserError after SKIPS of them in a row; all processes see the same norm.
        """
        if math.isfinite(norm):
            self.skipped = 0
            return 0
        self.skipped += 1
        path = self.folder / "skipped.jsonl"
        whole = self.processes.gather(batch)
        if self.processes.first:
            write_rows(path, whole)
        if self.skipped == SKIPS:
            raise UserError(f"{SKIPS} steps in a row had no finite gradient and were skipped; what "
                            f"the last was of is in {path}; try a lower --lr, or go on from the "
                            f"checkpoint of step {self.saved:,} with other data")
        return 1

    def warn(self, what, share, limit=0.2):
        """Say once if a share of the answers is above the limit."""
        if share is not None and share > limit and what not in self.warned:
            self.warned.add(what)
            if self.processes.first:
                cli.say(f"{share:.0%} of the judge's answers {what}; look at the judge before the "
                        f"rewards")

    def evaluations(self):
        """Markdown of the first and the last record that has figures of an evaluation, eval_…"""
        evaluated = [record for record in self.records if figures_of(record)]
        names = list(figures_of(evaluated[0]))
        rows = [["", *(name.removeprefix("eval_").replace("_", " ") for name in names)]]
        for title, record in (("before", evaluated[0]), ("after", evaluated[-1])):
            figures = [record.get(name) for name in names]
            rows.append([title, *("-" if x is None else f"{x:.3f}" for x in figures)])
        return cli.markdown(rows)

    def save_adapter(self, model, base, ema):
        """Write the averages as an adapter of the generator `base` into adapters/, in a folder
        named after the step that was logged last, with the figures of its evaluation, if any. Of
        those without figures the last KEEP stay."""
        record = self.records[-1]
        if self.processes.first and record["step"]:  # none before the first step
            folder = self.folder / "adapters" / f"{record['step']:08d}"
            write_json(folder / "figures.json", {"step": record["step"], **figures_of(record)})
            with ema:
                lora.save_lora(folder, model, base, diffusers=True)
            evaluated = {each["step"] for each in self.records if figures_of(each)}
            folders = sorted((self.folder / "adapters").glob("[0-9]" * 8))
            for old in [each for each in folders if int(each.name) not in evaluated][:-KEEP]:
                shutil.rmtree(old)

    def save_pictures(self, step, pictures):
        """Write PIL images of one size side by side, and strip.png: a row for each step so far."""
        if self.processes.first:
            folder = self.folder / "strips"
            strip = np.hstack([np.asarray(picture) for picture in pictures])
            save_png(Image.fromarray(strip), folder / f"{step:08d}.png")
            strips = [open_picture(path) for path in sorted(folder.glob("*.png"))]
            save_png(stacked(*strips), self.folder / "strip.png")

    # ----------------------------------------------------------------------------------------------
    # Checkpoints

    def say_disk(self, state, export, args, on_the_way=False):
        """Say how much the run will write at most, and whether the disk has room for it.

        state: as for `save`. export: bytes of what is exported in the end. on_the_way: whether it
        is also exported on the way, by `save_adapter`.
        """
        if not self.processes.first:
            return
        parts = disk_parts(state, export, args, on_the_way)
        most = sum(count * size for count, size in parts.values())
        held = sum(file.stat().st_size for file in self.folder.rglob("*") if file.is_file())
        free = shutil.disk_usage(self.folder).free
        told = ", ".join(f"{count:,} {what} of {in_bytes(size)}"
                         for what, (count, size) in parts.items())
        cli.say(f"disk: {self.folder} takes at most {in_bytes(most)} ({told}); {in_bytes(free)} "
                f"are free")
        if most - held > free:
            cli.say(f"warning: that is {in_bytes(most - held - free)} more than there may be; make "
                    f"room on the disk of {self.folder}, or choose another --out")

    def checkpoints(self):
        """The folders of the complete ones, oldest first."""
        return sorted(self.folder.glob("checkpoint-" + "[0-9]" * 8))

    def save_due(self, step, args):
        """Whether a checkpoint is due after `step`; the same answer on all processes."""
        if step == args.steps or step % args.save_every == 0:
            return True
        # by the first process's clock, as others' may be a moment before or behind
        late = time.monotonic() - self.saved_at >= 60 * args.save_minutes > 0
        return self.processes.total({"late": self.processes.first and late})["late"] > 0

    def save(self, step, state):
        """Write the state after `step` steps, see parts/checkpoints.py, and curves.png of the log.

        The folder gets its final name, and so counts, when all processes have written their part.
        """
        broken = sum(not bool(own_rows(tensor)[0].isfinite().all()) for tensor in state.values())
        if self.processes.total({"broken": broken})["broken"]:
            raise UserError(f"after step {step:,} the state of the training is not finite and was "
                            f"not saved; {self.folder} has that of step {self.saved:,}")
        # eight digits, so that the order of names is that of steps
        final = self.folder / f"checkpoint-{step:08d}"
        temporary = final.with_suffix(".tmp")
        checkpoints.write(temporary, state)
        digests = dict(self.processes.gather(checkpoints.digests(temporary, self.processes.rank)))
        if self.processes.first:
            write_json(temporary / DIGESTS, digests)
            if final.exists():
                shutil.rmtree(final)
            os.replace(temporary, final)
            sync_folder(self.folder)
            for old in self.checkpoints()[:-KEEP]:
                os.replace(old, old.with_suffix(".tmp"))  # half of it must not count as whole
                shutil.rmtree(old.with_suffix(".tmp"))
            title = f"{self.title}, step {step:,}"
            save_png(draw_curves(self.records, self.curves, title), self.folder / "curves.png")
        self.processes.wait()
        self.saved = step
        self.saved_at = time.monotonic()

    def load(self, state, steps):
        """Fill a state from the last complete checkpoint; returns its step, or 0 without one.

        Any number of processes may have written it. One whose bytes have changed is passed over for
        the one before. Raises UserError if it has more than `steps` steps, or none can be read.
        """
        # what a killed run left half written
        if self.processes.first:
            for half in self.folder.glob("checkpoint-*.tmp"):
                shutil.rmtree(half)
        self.processes.wait()
        found = self.checkpoints()
        if not found:
            return 0
        # from the newest on, and no further than need be: a checkpoint may have 100 GB
        folder = next((each for each in reversed(found) if not self.damaged(each)), None)
        if folder is None:
            raise UserError(f"{self.folder}: all of its checkpoints are damaged; choose another "
                            f"--out, or delete them to start over")
        self.saved = int(folder.name[-8:])
        if self.saved > steps:
            raise UserError(f"--steps {steps}: {folder} is further already; give as many or more, "
                            f"or choose another --out")
        checkpoints.read(folder, state)
        return self.saved

    def damaged(self, folder):
        """Whether a file of a checkpoint has other bytes than were written; says which. Each
        process looks at its share of the files."""
        path = folder / DIGESTS
        if not path.exists():  # of a run before checkpoints had digests
            return False
        # in this folder, whatever path a name leads along
        digests = {Path(name).name: digest for name, digest in read_json(path).items()}
        names = sorted(digests)[self.processes.rank::self.processes.world]
        changed = [name for name in names if checkpoints.digest_of(folder / name) != digests[name]]
        changed = self.processes.gather(changed)
        if changed and self.processes.first:
            cli.say(f"{folder}: {', '.join(changed)} damaged; the checkpoint before is used")
        return bool(changed)


def summary_writer():
    """TensorBoard's class of writers. Raises UserError where it is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UserError(f"--tensorboard: not installed here ({error}); pip install tensorboard, or "
                        f"leave it out: log.jsonl and curves.png have the same") from error
    return SummaryWriter


def disk_parts(state, export, args, on_the_way):
    """{what: (how many at most, bytes of each)} of the files of a run; as for `Run.say_disk`."""
    values = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
    evaluations = 1 + ((args.steps - 1) // args.eval_every if args.eval_every else 0)
    parts = {"checkpoints": (KEEP + 1, values + PER_TENSOR * len(state))}  # one is being written
    if on_the_way:
        parts["adapters"] = (evaluations + KEEP + 2, export)  # with the final one, and a new one
        parts["strips of pictures"] = (evaluations + 1, PER_EVALUATION)
    else:
        parts["export"] = (1, export)
    return parts | {"lines of the log": (args.steps, PER_STEP), "sheet of curves": (1, 200_000)}


def in_bytes(size):
    """A number of bytes in words, as in "1.9 MB"."""
    for unit, name in ((1e9, "GB"), (1e6, "MB")):
        if size >= unit:
            return f"{size / unit:,.{0 if size >= 100 * unit else 1}f} {name}"
    return f"{size / 1e3:.1f} KB"


def draw_curves(records, keys, title):
    """A picture of panels, three in a row, one for each key of the records that has numbers: every
    value in grey over the steps, their running mean in blue."""
    keys = [key for key in keys if any(record.get(key) is not None for record in records)]
    sheet = Image.new("RGB", (900, 28 + 170 * max(1, math.ceil(len(keys) / 3))), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(12)
    draw.text((10, 8), title, "black", font)
    for number, key in enumerate(keys):
        # 1. the panel's frame
        left = 300 * (number % 3) + 52
        right = left + 234
        top = 170 * (number // 3) + 52
        bottom = top + 122  # y grows downwards
        draw.rectangle((left, top, right, bottom), outline=(190, 190, 190))
        draw.text((left, top - 17), key, "black", font)
        # 2. steps and values in pixels
        points = np.array([(r["step"], r[key]) for r in records if r.get(key) is not None])  # [N,2]
        low = points.min(axis=0)
        high = points.max(axis=0)
        share = (points - low) / np.where(high > low, high - low, 1)
        dots = (left, bottom) + share * (right - left, top - bottom)
        # 3. their running mean, over 20 values, fewer in a short run
        smooth = dots.copy()
        weight = 1 / max(1, min(20, len(dots) / 10))
        for i in range(1, len(dots)):
            smooth[i, 1] = (1 - weight) * smooth[i - 1, 1] + weight * dots[i, 1]
        draw.line(dots.flatten().tolist(), (205, 205, 205))
        draw.line(smooth.flatten().tolist(), (30, 90, 200), 2)
        draw.circle(smooth[-1].tolist(), 2, (30, 90, 200))
        # 4. the ends of both axes
        draw.text((left - 5, top), f"{high[1]:.3g}", (90, 90, 90), font, anchor="rt")
        draw.text((left - 5, bottom), f"{low[1]:.3g}", (90, 90, 90), font, anchor="rb")
        draw.text((left, bottom + 3), f"{low[0]:.0f}", (90, 90, 90), font)
        draw.text((right, bottom + 3), f"{high[0]:.0f}", (90, 90, 90), font, anchor="rt")
    return sheet
