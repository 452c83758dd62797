"""All side-by-side programs of this folder: one table, how it grows, and a profile of ours where a requirement is missed.

    python -m bench.run                                             # 50 minutes on 2 idle cores, 12 GB
    python -m bench.run --only sampling,judge_generate --no-growth  # two minutes
    python -m bench.run --quick                                     # a minute: whether all run; these times mean nothing

Each program runs by itself in a fresh process, one after the other; in it the peer and ours take turns. A row of the table
appears when its program has ended. The second table has one line for each work that grows. After every program --out is
written: machine, versions, and each program's command, seconds, rows, note and profile. A program that fails is reported at
the end, and the others go on; then, but not for a missed requirement, the exit status is 1. The machine must be idle.
"""

import contextlib
import importlib.metadata
import itertools
import json
import os
import platform
import re
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from tqdm import tqdm

from bench import timing
from parts import cli
from parts.files import write_json

ROOT = Path(__file__).resolve().parent.parent
STANDARD = {  # program: flags; a program's own sizes are those of which something is asked
    "mmdit_forward": "", "mmdit_lora_step": "", "sampling": "", "judge_generate": "", "token_log_probs": "--repeats 2",
    "flow_grpo_step": "", "first_picture": ""}
GROWTH = (  # program, what grows, {size: flags}
    ("mmdit_forward", "pixels", {
        256: "--blocks 2 --batch 1 --latent 32 --repeats 2", 512: "--blocks 2 --batch 1 --latent 64 --repeats 2",
        1024: "--blocks 2 --batch 1 --latent 128 --repeats 2"}),
    ("mmdit_forward", "pictures", {n: f"--blocks 2 --batch {n} --latent 32 --repeats 2" for n in (1, 2, 4, 8)}),
    ("judge_generate", "tokens of an answer", {
        64: STANDARD["judge_generate"], 128: "--new-tokens 128 --repeats 1", 256: "--new-tokens 256 --repeats 1",
        512: "--new-tokens 512 --repeats 1"}),
    ("judge_generate", "answers", {
        1: "--group 1 --repeats 1", 4: "--group 4 --repeats 1", 8: STANDARD["judge_generate"],
        16: "--group 16 --repeats 1"}),
    ("token_log_probs", "tokens of 8 answers", {
        64: "--rows 512 --frozen-only --no-compile --repeats 1", 256: "--frozen-only --no-compile --repeats 1",
        512: "--rows 4096 --frozen-only --no-compile --repeats 1"}))
QUICK = {
    "mmdit_forward": "--blocks 2 --heads 2 --latent 8 --text 5 --context 32 --repeats 1",
    "mmdit_lora_step": "--blocks 2 --heads 2 --latent 8 --text 5 --context 32 --rank 2 --repeats 1",
    "sampling": "--steps 2 --pictures 2 --size 64 --repeats 1",
    "judge_generate": "--width 64 --layers 2 --vocabulary 1000 --image 112 --new-tokens 6 --group 2 --repeats 1",
    "token_log_probs": "--rows 64 --width 32 --vocabulary 1000 --no-compile --repeats 1",
    "flow_grpo_step": "--blocks 2 --heads 2 --latent 8 --text 5 --context 32 --steps 2 --rank 2 --repeats 1",
    "first_picture": "--steps 1 --size 64 --repeats 1"}
PEERS = ("diffusers", "transformers", "peft", "trl", "liger-kernel")


# ---------------------------------------------------------------------------------------------------------------------
# One program


def call(program, flags):
    """Run a program. (command as one types it, exit status, standard output, last lines of standard error, seconds)."""
    tail, started = b"", time.perf_counter()
    here = Path(__file__).resolve().parent
    command = [sys.executable, str(here / f"{program}.py"), *flags]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with tempfile.TemporaryFile() as out, subprocess.Popen(
            command, stdout=out, stderr=subprocess.PIPE, env=environment) as process:
        try:
            while chunk := process.stderr.read1():  # passed on as it comes: progress
                sys.stderr.buffer.write(chunk)
                sys.stderr.flush()
                tail = (tail + chunk)[-10_000:]
            status = process.wait()
        finally:
            process.kill()  # if it still runs, we were interrupted
        out.seek(0)
        output = out.read().decode()
    lines = [line for line in re.split(r"[\r\n]+", tail.decode(errors="replace")) if line.strip()]
    return shlex.join(["python", "-m", f"bench.{program}", *flags]), status, output, lines[-8:], time.perf_counter() - started


def measure(program, flags, threads):
    """What a program found: {"program", "command", "seconds", "rows", "note", "failed": why, or ""}."""
    command, status, output, last, seconds = call(program, [*shlex.split(flags), "--threads", str(threads), "--json"])
    work = {"program": program, "command": command, "seconds": seconds, "rows": [], "note": "", "failed": ""}
    if status:
        work["failed"] = "\n".join([f"exit status {status}", *last])
        return work
    try:
        found = json.loads(output)
        work["rows"], work["note"] = [timing.Row(**fields) for fields in found["rows"]], found["note"]
    except (ValueError, KeyError, TypeError) as error:
        work["failed"] = f"its output is not rows as JSON ({error!r}): {output[-200:]!r}"
    return work


def profile(program, flags, threads):
    """(command, the table that it prints, why it failed or "")."""
    command, status, output, last, _ = call(program, [*shlex.split(flags), "--threads", str(threads), "--profile"])
    return command, output.rstrip(), "\n".join([f"exit status {status}", *last]) if status else ""


# ---------------------------------------------------------------------------------------------------------------------
# Tables


def growth_table(series, works):
    """Markdown, a line for each row of a program, with its numbers at all sizes. works: {(program, flags): work}."""
    lines = [("work", "what grows", "sizes", "peer, s", "ours, s", "ratio", "share", "memory")]
    for program, what, sizes in series:
        done = {size: works[program, flags]["rows"] for size, flags in sizes.items() if works[program, flags]["rows"]}
        for rows in zip(*done.values(), strict=True):
            words = itertools.takewhile(lambda word: len(set(word)) == 1, zip(*(r.work.split() for r in rows)))
            same = " ".join(word for word, *_ in words).rstrip(",:")  # until the size that grows
            shares, of = [r.share.partition(" ")[0] for r in rows], rows[0].share.partition(" ")[2]
            cells = [f"{same} …", what, joined(done, "{:,}"), joined([r.theirs for r in rows], "{:.3g}"),
                     joined([r.ours for r in rows], "{:.3g}"), joined([r.ratio for r in rows], "{:.2f}"),
                     f"{joined(shares)} {of}" if of else "",
                     joined([r.memory for r in rows], "{:.3g}") if rows[0].memory is not None else ""]
            lines.append(cells)
    return cli.markdown(lines)


def joined(values, form="{}"):
    return " · ".join(form.format(value) for value in values)


def found(row):
    """What a row has of what was asked of it, such as "ratio 1.02"."""
    values = {part.split()[0]: getattr(row, part.split()[0]) for part in row.asked.split(", ")}
    return ", ".join(f"{name} {value if isinstance(value, str) else format(value, '.3g')}" for name, value in values.items())


# ---------------------------------------------------------------------------------------------------------------------
# The program


def machine(threads):
    cpuinfo = Path("/proc/cpuinfo")  # Linux
    names = re.findall(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else []
    return {"cpu": [*names, platform.processor() or platform.machine()][0], "cores": os.cpu_count(), "threads": threads,
            "matmul_rate": timing.matmul_rate(), "read_rate": timing.read_rate()}


def versions():
    """{package: version} of Python, torch and those peers that are installed."""
    installed = {d.name.lower().replace("_", "-"): d.version for d in importlib.metadata.distributions()}
    return {"python": platform.python_version(), "torch": torch.__version__} | {
        name: installed[name] for name in PEERS if name in installed}


def write(path, facts, works):
    """The record, as far as it has come, under a temporary name that is then renamed."""
    plain = [work | {"rows": [vars(row) | {"reached": timing.reached(row)} for row in work["rows"]]} for work in works]
    write_json(path, facts | {"works": plain})


def parse_args(argv=None):
    parser = cli.parser(__doc__)
    parser.add_argument("--only", help=f"these programs, with commas between (default: {','.join(STANDARD)})")
    parser.add_argument("--no-growth", action="store_true", help="the standard sizes only")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, no growth: whether all run; times mean nothing")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="JSON file (default: out/bench.json, or out/bench_quick.json)")
    args = parser.parse_args(argv)
    args.only = list(STANDARD) if args.only is None else [name.strip() for name in args.only.split(",")]
    for name in args.only:
        if name not in STANDARD:
            parser.error(f"--only {name!r}: expected some of {', '.join(STANDARD)}")
    if args.threads < 1:
        parser.error("--threads must be at least 1")
    args.out = args.out or Path("out") / ("bench_quick.json" if args.quick else "bench.json")
    if args.out.is_dir():
        parser.error(f"--out {args.out} is a folder; name a file in it")
    probe = args.out.with_name(args.out.name + ".tmp")
    try:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        parser.error(f"--out {args.out}: cannot write there ({error.strerror}); choose another file")
    return args


def main(argv=None):
    args, started = parse_args(argv), time.perf_counter()
    torch.set_num_threads(args.threads)
    standard = [(name, (QUICK if args.quick else STANDARD)[name]) for name in STANDARD if name in args.only]
    series = [] if args.quick or args.no_growth else [entry for entry in GROWTH if entry[0] in args.only]
    grown = [(name, flags) for name, _, sizes in series for flags in sizes.values()]
    facts = {"machine": machine(args.threads), "versions": versions(), "quick": args.quick}
    m = facts["machine"]
    print(f"{m['cpu']}, {m['threads']} of {m['cores']} cores, torch {torch.__version__}, float32: "
          f"{m['matmul_rate'] / 1e9:,.0f} GFLOP/s in large matrix products, {m['read_rate'] / 1e9:.1f} GB/s from memory.\n")
    if args.quick:
        print("--quick: tiny sizes. These times mean nothing.\n")
    print(timing.table([]), flush=True)
    works = {}  # {(program, flags): what measure found}
    with contextlib.closing(tqdm(list(dict.fromkeys(standard + grown)), unit="program")) as bar:
        for name, flags in bar:
            bar.write(f"bench/{name}.py {flags}", file=sys.stderr)
            work = works[name, flags] = measure(name, flags, args.threads)
            write(args.out, facts, works.values())
            if (name, flags) in standard and work["rows"]:
                bar.write("\n".join(timing.table(work["rows"]).splitlines()[2:]), file=sys.stdout)
                sys.stdout.flush()
    print("".join(f"\n{name}: {works[name, flags]['note']}\n" for name, flags in standard if works[name, flags]["note"]))
    if series:
        print(f"How it grows:\n\n{growth_table(series, works)}\n")
    failed = {work["command"]: work["failed"] for work in works.values() if work["failed"]}
    for name, flags in standard:
        missed = [row for row in works[name, flags]["rows"] if not timing.reached(row)]
        if missed:
            print("".join(f"Missed: {row.work}: {row.asked} was asked, found {found(row)}.\n" for row in missed))
            command, printed, why = profile(name, flags, args.threads)
            print(f"`{command}`:\n\n{printed}\n", flush=True)
            works[name, flags]["profile"] = printed
            failed |= {command: why} if why else {}
    write(args.out, facts, works.values())
    for command, why in failed.items():
        print(f"Failed: `{command}`: {why}\n")
    print(f"{len(works)} programs, {(time.perf_counter() - started) / 60:.1f} minutes; also in {args.out}.")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
