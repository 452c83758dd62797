"""What the training programs share: processes, a run's folder, its log and curves, checkpoints, and how it is stopped.

A run is a folder: `settings.json`, `log.jsonl` (a line a step), `curves.png`, and `checkpoint-<step>/` with one file per
process. A checkpoint is written under a temporary name that is renamed when it is complete, so a killed run goes on from
the last whole one. Nothing random is stored: every step derives its seeds from the run's seed and its own number.
"""

import json
import math
import os
import re
import resource
import shutil
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageFont
from torch.distributed.tensor import DTensor
from tqdm import tqdm

from parts.cli import UserError, say
from parts.files import read_json, read_records, write_json

KEEP = 2  # checkpoints


# ---------------------------------------------------------------------------------------------------------------------
# Processes


@dataclass(frozen=True)
class Processes:
    rank: int
    world: int
    device: torch.device

    @property
    def first(self):
        return self.rank == 0

    def share(self, items):
        """This process's part of a list: a contiguous one, of equal length for all. UserError if it cannot be divided."""
        if len(items) % self.world:
            raise UserError(f"{len(items)} items cannot be shared by {self.world} processes; choose a multiple")
        each = len(items) // self.world
        return items[self.rank * each:(self.rank + 1) * each]

    def total(self, values):
        """Sum over the processes of each value of a dict of numbers."""
        if self.world == 1:
            return dict(values)
        sums = torch.tensor([float(v) for v in values.values()], dtype=torch.float64, device=self.device)
        dist.all_reduce(sums)
        return dict(zip(values, sums.tolist(), strict=True))

    def gather(self, items):
        """The concatenation of every process's list of plain objects, in the order of ranks, on every process."""
        if self.world == 1:
            return list(items)
        parts = [None] * self.world
        dist.all_gather_object(parts, list(items))
        return [item for part in parts for item in part]

    def average_gradients(self, parameters):
        """Give every process the mean over processes of each gradient."""
        if self.world > 1:
            for p in parameters:
                dist.all_reduce(p.grad)
                p.grad /= self.world

    def wait(self):
        if self.world > 1:
            dist.barrier()


def start_processes(device=None):
    """Processes of this run: those `torchrun` started, or one. device: cpu or cuda; default cuda if there is one."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"--device {device}: this torch sees no GPU; use --device cpu")
    if "RANK" not in os.environ:
        return Processes(0, 1, torch.device(device))
    if device == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    return Processes(dist.get_rank(), dist.get_world_size(), torch.device(device))


def run_program(args, check, work):
    """Exit code of check(args), then work(args, processes); what the user can mend is one line on standard error."""
    try:
        check(args)
        processes = start_processes(args.device)
        try:
            return work(args, processes)
        finally:
            if processes.world > 1:
                dist.destroy_process_group()
    except (UserError, OSError) as error:
        say(f"error: {error}")
        return 2
    except KeyboardInterrupt:
        say("stopped; the same command goes on after the last checkpoint")
        return 130


def batch_places(step, batch, count, seed):
    """Which of `count` items make the batch of step `step`: every epoch is a permutation of its own."""
    out = []
    for number in range(batch):
        epoch, place = divmod(step * batch + number, count)
        if number == 0 or place == 0:
            order = torch.randperm(count, generator=torch.Generator().manual_seed(seed * 1000 + epoch)).tolist()
        out.append(order[place])
    return out


# ---------------------------------------------------------------------------------------------------------------------
# State of sharded and of whole tensors


def local(tensor):
    """The part of a tensor that lies on this process."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def like(part, tensor):
    """A local part as a tensor sharded as `tensor` is."""
    if not isinstance(tensor, DTensor):
        return part
    return DTensor.from_local(part, tensor.device_mesh, tensor.placements, shape=tensor.shape, stride=tensor.stride())


def state_of(parameters, optimizer):
    """This process's part of the parameters and of AdamW's state."""
    return {"parameters": [local(p.detach()) for p in parameters],
            "optimizer": [{k: local(v) for k, v in optimizer.state[p].items()} for p in parameters]}


def restore_state(state, parameters, optimizer):
    with torch.no_grad():
        for p, saved in zip(parameters, state["parameters"], strict=True):
            local(p).copy_(saved)
            optimizer.state.pop(p, None)
    for p, saved in zip(parameters, state["optimizer"], strict=True):
        if saved:  # none before the first step
            optimizer.state[p] = {k: v if k == "step" else like(v.to(local(p).device), p) for k, v in saved.items()}


# ---------------------------------------------------------------------------------------------------------------------
# The folder


class Run:
    """A run's folder. Use as a context: SIGTERM and Ctrl-C then set `stop` in place of ending the program at once."""

    def __init__(self, folder, settings, processes, fixed=()):
        """settings: written to settings.json. A run that goes on must have the same value of those named in `fixed`."""
        self.folder, self.processes, self.stop, self.records = Path(folder), processes, None, []
        path = self.folder / "settings.json"
        if path.exists():
            before = read_json(path)
            changed = [k for k in fixed if before.get(k) != json.loads(json.dumps(settings.get(k)))]
            if changed:
                raise UserError(f"{folder} holds a run with " + ", ".join(f"{k} {before.get(k)!r}" for k in changed)
                               + f", not {', '.join(repr(settings.get(k)) for k in changed)}; choose another --out, or "
                               f"repeat its settings to go on")
        if processes.first:
            write_json(path, settings)
        processes.wait()

    def __enter__(self):
        def ask_to_stop(number, frame):
            if self.stop == signal.SIGINT == number:
                raise KeyboardInterrupt  # the second Ctrl-C
            self.stop = number
        self.before = {s: signal.signal(s, ask_to_stop) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *error):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def stopped(self):
        """Whether any process was asked to stop; the same answer on all."""
        return self.processes.total({"stop": self.stop is not None})["stop"] > 0

    def train(self, name, start, total, args, take_step, figures, state, curves):
        """Take the steps `start`..total − 1, each with a line in the log; evaluate before the first of all and when it is
        time, save and draw curves. Returns the exit code of a run that was asked to stop, else None.

        take_step(step): ({figure: value} for the log, {name: text} for the progress bar). figures(step): an evaluation's
        {figure: value} after so many steps. state(): what a checkpoint holds. curves: names of the curves.
        """
        def evaluation(step):
            return {f"eval_{k}": v for k, v in figures(step).items()}

        if not start:
            self.log({"step": 0, **evaluation(0)})
        bar = tqdm(total=total, initial=start, desc=name, disable=not self.processes.first, dynamic_ncols=True)
        with self, bar:
            for step in range(start + 1, total + 1):
                record, shown = take_step(step - 1)
                done, stop = step == total, self.stopped()
                if done or (args.eval_every and step % args.eval_every == 0):
                    record = record | evaluation(step)
                self.log({"step": step, **record})
                bar.update()
                bar.set_postfix(shown)
                if done or stop or step % args.save_every == 0:
                    self.save(step, state())
                    self.draw(curves, f"{args.model}, {name}, step {step:,} of {total:,}")
                if stop and not done:
                    bar.close()
                    if self.processes.first:
                        say(f"stopped after step {step:,}; the same command goes on from there")
                    return 130 if self.stop == signal.SIGINT else 143
        return None

    # -----------------------------------------------------------------------------------------------------------------
    # Log

    @property
    def log_path(self):
        return self.folder / "log.jsonl"

    def log(self, record):
        """Append a line; numbers rounded to 7 digits, NaN as null."""
        record = {k: v if not isinstance(v, float) else float(f"{v:.7g}") if math.isfinite(v) else None
                  for k, v in record.items()}
        self.records.append(record)
        if self.processes.first:
            with open(self.log_path, "a", encoding="utf-8") as f:
                f.write(json.dumps(record) + "\n")

    def read_log(self, step):
        """Take up the log of a run that goes on after `step`; what a killed run wrote after its checkpoint goes."""
        self.records = read_records(self.log_path, step)
        if self.processes.first:
            temporary = self.log_path.with_suffix(".tmp")
            temporary.write_text("".join(json.dumps(r) + "\n" for r in self.records), encoding="utf-8")
            os.replace(temporary, self.log_path)
        self.processes.wait()

    def draw(self, keys, title):
        """Write curves.png: one panel for each key that the log has."""
        if self.processes.first and self.records:
            temporary = self.folder / "curves.tmp"
            curves(self.records, keys, title).save(temporary, "PNG")
            os.replace(temporary, self.folder / "curves.png")

    # -----------------------------------------------------------------------------------------------------------------
    # Checkpoints

    def checkpoints(self):
        """[(step, folder)] of the complete ones, oldest first."""
        names = ((re.fullmatch(r"checkpoint-(\d+)", p.name), p) for p in self.folder.glob("checkpoint-*"))
        return sorted((int(match[1]), p) for match, p in names if match)

    def save(self, step, state):
        """Write this process's state; the checkpoint counts once every process has written its own."""
        final = self.folder / f"checkpoint-{step:08d}"
        temporary = self.folder / f"checkpoint-{step:08d}.tmp"
        temporary.mkdir(exist_ok=True)
        path = temporary / f"rank{self.processes.rank}of{self.processes.world}.pt"
        with open(path, "wb") as f:
            torch.save({"step": step, **state}, f)
            f.flush()
            os.fsync(f.fileno())
        self.processes.wait()
        if self.processes.first:
            if final.exists():
                shutil.rmtree(final)
            os.replace(temporary, final)
            for _, old in self.checkpoints()[:-KEEP]:
                shutil.rmtree(old)
        self.processes.wait()

    def load(self):
        """This process's state of the last complete checkpoint, or None. UserError if it cannot be used."""
        if self.processes.first:
            for half in self.folder.glob("checkpoint-*.tmp"):
                shutil.rmtree(half)
        self.processes.wait()
        found = self.checkpoints()
        if not found:
            return None
        folder, p = found[-1][1], self.processes
        path = folder / f"rank{p.rank}of{p.world}.pt"
        if not path.exists():
            written = next((q.stem.partition("of")[2] for q in folder.glob("rank0of*.pt")), "no")
            raise UserError(f"{folder} was written by {written} processes and this run has {p.world}; start as many, or "
                           f"choose another --out")
        try:
            return torch.load(path, map_location=p.device, weights_only=True)
        except Exception as error:  # torch raises many kinds for a damaged file
            raise UserError(f"{path}: damaged ({type(error).__name__}); delete {folder} to go on from the one "
                           f"before") from error


def peak_memory(device):
    """GiB: the most the GPU had allocated, or on a CPU the most that was resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)


class Timer:
    """Seconds since the last lap."""

    def __init__(self):
        self.last = time.perf_counter()

    def lap(self):
        now = time.perf_counter()
        seconds, self.last = now - self.last, now
        return seconds


# ---------------------------------------------------------------------------------------------------------------------
# Curves


def curves(records, keys, title, columns=3, panel=(300, 170)):
    """A picture of small panels, one for each key: every value in grey, their running mean in blue, over the steps."""
    keys = [k for k in keys if any(isinstance(r.get(k), (int, float)) for r in records)]
    (W, H), top, font = panel, 28, ImageFont.load_default(12)
    rows = max(1, math.ceil(len(keys) / columns))
    sheet = Image.new("RGB", (columns * W, top + rows * H), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((10, 8), title, "black", font)
    for k, key in enumerate(keys):
        x0, y0 = k % columns * W + 52, top + k // columns * H + 24
        w, h = W - 66, H - 48
        points = [(r["step"], float(r[key])) for r in records if isinstance(r.get(key), (int, float))]
        steps, values = zip(*points)
        low, high = min(values), max(values)
        spread, span = (high - low) or 1.0, (steps[-1] - steps[0]) or 1

        def place(step, value, x0=x0, y0=y0, w=w, h=h, low=low, spread=spread, first=steps[0], span=span):
            return x0 + w * (step - first) / span, y0 + h * (1 - (value - low) / spread)

        draw.rectangle((x0, y0, x0 + w, y0 + h), outline=(190, 190, 190))
        draw.text((x0, y0 - 17), key, "black", font)
        draw.text((x0 - 5, y0), f"{high:.3g}", (90, 90, 90), font, anchor="rt")
        draw.text((x0 - 5, y0 + h), f"{low:.3g}", (90, 90, 90), font, anchor="rb")
        draw.text((x0, y0 + h + 3), f"{steps[0]}", (90, 90, 90), font)
        draw.text((x0 + w, y0 + h + 3), f"{steps[-1]}", (90, 90, 90), font, anchor="rt")
        mean, smooth, keep = values[0], [], 1 - 1 / max(1, min(20, len(values) / 10))
        for step, value in points:
            mean = keep * mean + (1 - keep) * value
            smooth.append(place(step, mean))
        dots = [place(*point) for point in points]
        if len(dots) > 1:
            draw.line(dots, (205, 205, 205))
            draw.line(smooth, (30, 90, 200), 2)
        else:
            draw.ellipse((dots[0][0] - 2, dots[0][1] - 2, dots[0][0] + 2, dots[0][1] + 2), (30, 90, 200))
    return sheet
