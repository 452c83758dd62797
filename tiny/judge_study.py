"""The miniature judge before and after GRPO, and what its reward and its labels change.

    python -m tiny.judge_study                # trains what is missing, 20 minutes a run and core
    python -m tiny.judge_study --rows step    # three seeds; tiny.advice goes on from the first

Every run starts from the supervised judge (`python -m tiny.pretrain judge`) and sees the same 4,000
pictures. ROWS says by which reward and labels, see `tiny.dataset`. All are asked about the same 500
test pictures, of pairs of subject and place that no training has, whose V and A are those they were
drawn with. The supervised judge says no word that stands for a level of mood, so there is no row in
which its words are looked up in place of its numbers.

Further flags go to train_judge.py. A killed study goes on where it was. The runs lie in
tiny/cache/study, and the cases go to docs/records/judge.jsonl, from where `python -m tiny.results`
writes the page.
"""

if __name__ == "__main__":  # before torch, whose import takes seconds: Ctrl-C ends in one line
    from parts import interrupts
    interrupts.catch()

import hashlib
import os
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

import data
import feedback
import grpo
from parts import cli
from parts.cli import UserError
from parts.files import open_picture, read_records, write_rows
from parts.pipeline import judge_of, load_judge
from tiny import results
from tiny.dataset import write_tiny

HERE = Path(__file__).resolve().parent
DATASETS = HERE / "cache"
SUPERVISED = HERE / "cache" / "judge"
STUDY = HERE / "cache" / "study"
TABLE = "judge"
SIZE = 128


@dataclass(frozen=True)
class Row:
    """A row of the table: how its judges were trained, and with which seeds."""
    folder: str
    flags: tuple = ()  # of train_judge.py
    labels: str = "true"  # of tiny.dataset
    seeds: tuple = (0,)


CONTINUOUS = ("--reward", "continuous")
NESTED = ("--reward", "nested")
BY_TASK = (*NESTED, "--va-weights", "valence=0,arousal=1",
           "--task-weights", "class=0.25,regression=0.75")
ROWS = {
    "step reward, ε 0.7": Row("step", seeds=(0, 1, 2)),
    "step reward, ε 0.2": Row("step_0.2", ("--epsilon", "0.2")),
    "step reward, ε 0.35": Row("step_0.35", ("--epsilon", "0.35")),
    "step reward, ε 1.5": Row("step_1.5", ("--epsilon", "1.5")),
    "nested reward, ε 0.2": Row("nested_0.2", (*NESTED, "--epsilon", "0.2")),
    "nested reward, ε 0.35": Row("nested_0.35", (*NESTED, "--epsilon", "0.35")),
    "nested reward, ε 0.7": Row("nested", NESTED, seeds=(0, 1, 2)),
    "nested reward, ε 1.5": Row("nested_1.5", (*NESTED, "--epsilon", "1.5")),
    "continuous reward (Table 4)": Row("continuous", CONTINUOUS, seeds=(0, 1, 2)),
    "α₁ and α₂ weigh the tasks": Row("by_task", BY_TASK),
    "regression only (Table 5)": Row("regression", ("--tasks", "regression")),
    "classification only (Table 5)": Row("class", ("--tasks", "class")),
    "drawn labels, step": Row("drawn", labels="drawn"),
    "drawn labels, continuous": Row("drawn_continuous", CONTINUOUS, "drawn"),
    "family labels, step": Row("family", labels="family"),
    "family labels, continuous": Row("family_continuous", CONTINUOUS, "family"),
    "a fifth are outliers, step": Row("outliers", labels="outliers", seeds=(0, 1, 2)),
    "a fifth are outliers, continuous": Row(
        "outliers_continuous", CONTINUOUS, "outliers", (0, 1, 2)),
}


# --------------------------------------------------------------------------------------------------
# Runs of other programs, which the other studies use, too


def run_all(runs, jobs, what):
    """Run [(folder, commands)], `jobs` at a time; their output goes to the folder's output.txt.

    Each has its share of the cores: so small a model gains little from a second thread. Raises
    UserError if one fails.
    """
    threads = max(1, (os.cpu_count() or 1) // jobs)
    # PYTHONPATH, so that `-m evaluation` is found from any folder
    # Threads that share a core wait for each other, so a smaller number that is set is kept.
    environment = {"OMP_NUM_THREADS": str(threads), **os.environ, "PYTHONPATH": str(HERE.parent)}

    def run(folder, commands):
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / "output.txt", "a", encoding="utf-8") as output:
            for command in commands:
                command = list(map(str, command))
                done = subprocess.run(command, stdout=output, stderr=output, env=environment)
                if done.returncode:
                    raise UserError(f"the run {folder.name} ended with code {done.returncode}; see "
                                    f"{folder}/output.txt")

    with ThreadPoolExecutor(jobs) as pool:
        ended = pool.map(run, *zip(*runs)) if runs else []
        list(tqdm(ended, what, len(runs), unit="run"))  # raises what a run has raised


def run_missing(runs, jobs, what):
    """As `run_all`, of the [(folder, product within it, commands)] that have no product yet."""
    missing = [(folder, commands) for folder, product, commands in runs
               if not (folder / product).exists()]
    run_all(missing, jobs, what)


def check_supervised(folder):
    """UserError if the judge that the studies start from is missing."""
    if not (folder / "model.safetensors").exists():
        raise UserError(f"{folder}: missing; run `python -m tiny.pretrain judge` first")


def make_dataset(folder, labels="true"):
    """Write the scenes that the studies train on, if they are missing."""
    if not (folder / "train.jsonl").exists():
        write_tiny(folder, 4000, 500, labels)


def digest_of(dataset):
    """What tells the training rows of a dataset from others."""
    return hashlib.sha256((dataset / "train.jsonl").read_bytes()).hexdigest()[:16]


def shown(command):
    """A command as one would type it in the project's root."""
    text = shlex.join(["python", *map(str, command[1:])])
    return text.replace(f"{HERE.parent}/", "")


# --------------------------------------------------------------------------------------------------
# This study


def dataset_of(row):
    return DATASETS / ("dataset" if row.labels == "true" else f"dataset_{row.labels}")


def training(row, seed, extra):
    """The command that trains a row's judge."""
    return [sys.executable, HERE.parent / "train_judge.py", "--model", SUPERVISED, "--data",
            dataset_of(row), "--out", STUDY / f"{row.folder}_seed{seed}", "--seed", seed,
            *row.flags, *extra]


def cases_of(judge, rows, path):
    """A record for each data.Row of what the judge in a folder says of its picture; in the file
    `path`, if they were asked for before and the judge is still the same."""
    if path.exists() and path.stat().st_mtime > (judge / "model.safetensors").stat().st_mtime:
        records = read_records(path)
        if [record["id"] for record in records] == [row.id for row in rows]:
            return records
    ask = judge_of(load_judge(judge, "cpu", SIZE), progress=False)
    images = [open_picture(row.image) for row in rows]
    texts = [ask([feedback.ask(task, image) for image in images]) for task in feedback.TASKS]
    records = []
    for row, about_va, about_class in zip(rows, *texts, strict=True):
        va = feedback.read_answer(about_va, "regression")
        records.append({
            "id": row.id, "v": row.v, "a": row.a, "judge": va and list(va),
            "class": int(feedback.read_answer(about_class, "class") == row.label),
            "format": (grpo.format_reward(about_va) + grpo.format_reward(about_class)) / 2})
    write_rows(path, records)
    return records


def study(args, extra):
    # 1. what the runs need
    check_supervised(SUPERVISED)
    rows = {name: row for name, row in ROWS.items() if not args.rows or row.folder in args.rows}
    for labels, folder in {row.labels: dataset_of(row) for row in rows.values()}.items():
        make_dataset(folder, labels)

    # 2. the runs
    runs = [(name, row, seed) for name, row in rows.items() for seed in row.seeds]
    last = Path("judge", "tokenizer_config.json")  # the file that is written last
    run_missing([(STUDY / f"{row.folder}_seed{seed}", last, [training(row, seed, extra)])
                 for _, row, seed in runs], args.jobs, "judges")

    # 3. their answers about the test pictures, which no row's labels have changed
    first = dataset_of(next(iter(rows.values())))
    cases = data.load_rows(first, "test")[:args.cases]
    (STUDY / "before").mkdir(parents=True, exist_ok=True)
    records = cases_of(SUPERVISED, cases, STUDY / "before" / "cases.jsonl")
    head = {"commands": ["python -m tiny.pretrain judge"]}
    results.add_figures(TABLE, "before GRPO", head, records)
    for name, row, seed in tqdm(runs, "test pictures", unit="judge"):
        out = STUDY / f"{row.folder}_seed{seed}"
        records = cases_of(out / "judge", cases, out / "cases.jsonl")
        head = {"seed": seed, "commands": [shown(training(row, seed, extra))],
                "data": digest_of(dataset_of(row))}
        results.add_figures(TABLE, name, head, records, out.name)
    print(results.table_of(TABLE))


def main(argv=None):
    parser = cli.parser(__doc__)
    folders = tuple(row.folder for row in ROWS.values())
    parser.add_argument("--rows", type=cli.some_of(folders), help=f"only {', '.join(folders)}")
    parser.add_argument("--jobs", type=cli.integer(1, 1000), default=2,
                        help="runs at a time (default: %(default)s)")
    parser.add_argument("--cases", type=cli.integer(2, 10**6), default=500,
                        help="test pictures (default: %(default)s)")
    args, extra = parser.parse_known_args(argv)
    return cli.run_program(lambda: study(args, extra))


if __name__ == "__main__":
    sys.exit(main())
