"""The miniature judge before and after GRPO, three seeds, and the ablations of Tables 4 and 5.

    python -m tiny.judge_study        # trains what is missing (90 minutes on 2 cores), prints it

Every run starts from the supervised judge (`python -m tiny.pretrain judge`), sees the same 4,000
pictures and is judged on the same 500 held-out ones, whose V and A are those they were drawn with.
Further flags go to train_judge.py. A killed study goes on where it was. The runs lie in
tiny/cache/study; the judge of the first one is copied to tiny/weights/judge.
"""

if __name__ == "__main__":  # before torch, whose import takes seconds: Ctrl-C ends in one line
    from parts import interrupts
    interrupts.catch()

import os
import shutil
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

from parts import cli
from parts.cli import UserError
from parts.files import read_records
from tiny.dataset import write_tiny

HERE = Path(__file__).resolve().parent
DATASETS = HERE / "cache"
SUPERVISED = HERE / "cache" / "judge"
STUDY = HERE / "cache" / "study"
SHIPPED = HERE / "weights" / "judge"
SEEDS = (0, 1, 2)
FIGURES = {  # of an evaluation: (column of the table, factor, form)
    "format": ("format ↑", 100, "{:.1f} %"),
    "v_error": ("V-Error ↓", 1, "{:.2f}"),
    "a_error": ("A-Error ↓", 1, "{:.2f}"),
    "class_accuracy": ("class accuracy ↑", 100, "{:.1f} %"),
}
ABLATIONS = {  # row of the table: (folder, flags, dataset)
    "continuous reward (Table 4)": ("continuous", ["--reward", "continuous"], "dataset"),
    "regression only (Table 5)": ("regression", ["--tasks", "regression"], "dataset"),
    "classification only (Table 5)": ("class", ["--tasks", "class"], "dataset"),
    "V and A drawn from the class, as the paper labels": ("drawn", [], "dataset_drawn"),
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
        results = pool.map(run, *zip(*runs)) if runs else []
        list(tqdm(results, what, len(runs), unit="run"))  # raises what a run has raised


def run_missing(runs, jobs, what):
    """As `run_all`, of the [(folder, product within it, commands)] that have no product yet."""
    missing = [(folder, commands) for folder, product, commands in runs
               if not (folder / product).exists()]
    run_all(missing, jobs, what)


def check_supervised(folder):
    """UserError if the judge that the studies start from is missing."""
    if not (folder / "model.safetensors").exists():
        raise UserError(f"{folder}: missing; run `python -m tiny.pretrain judge` first")


# --------------------------------------------------------------------------------------------------
# This study


def run_of(folder, seed, flags, dataset, extra):
    """(folder, product, commands) of one judge's training."""
    out = STUDY / folder
    command = [sys.executable, HERE.parent / "train_judge.py", "--model", SUPERVISED, "--data",
               DATASETS / dataset, "--out", out, "--seed", seed, *flags, *extra]
    return out, "judge/tokenizer_config.json", [command]  # the file that is written last


def evaluations(folder):
    """The log's records of a run's first and last evaluation."""
    evaluated = [r for r in read_records(STUDY / folder / "log.jsonl") if "eval_format" in r]
    return evaluated[0], evaluated[-1]


def table_row(name, records):
    """A row of the table: mean ± standard deviation over the seeds."""
    cells = [name]
    for key, (_, factor, form) in FIGURES.items():
        figures = [record[f"eval_{key}"] for record in records]
        values = [figure * factor for figure in figures if figure is not None]
        cell = form.format(statistics.mean(values)) if values else "none readable"
        if len(values) > 1:
            cell += f" ± {statistics.stdev(values):.2g}"
        cells.append(cell)
    return cells


def study(args, extra):
    # 1. what the runs need
    check_supervised(SUPERVISED)
    runs = [(f"step_seed{seed}", seed, [], "dataset") for seed in SEEDS]
    if not args.no_ablations:
        runs += [(folder, 0, flags, dataset) for folder, flags, dataset in ABLATIONS.values()]
    for name in dict.fromkeys(dataset for *_, dataset in runs):
        if not (DATASETS / name / "train.jsonl").exists():
            labels = "drawn" if name == "dataset_drawn" else "true"
            write_tiny(DATASETS / name, 4000, 500, labels)

    # 2. the runs
    run_missing([run_of(*run, extra) for run in runs], args.jobs, "judges")
    # the judge that sample.py and train_gen.py ask
    shutil.copytree(STUDY / "step_seed0" / "judge", SHIPPED, dirs_exist_ok=True)

    # 3. the table
    pairs = [evaluations(f"step_seed{seed}") for seed in SEEDS]  # all have the same first one
    rows = [("judge", *(column for column, _, _ in FIGURES.values())),
            table_row("before GRPO", [first for first, _ in pairs[:1]]),
            table_row(f"after GRPO, {len(SEEDS)} seeds", [last for _, last in pairs])]
    if not args.no_ablations:
        for name, (folder, _, _) in ABLATIONS.items():
            rows.append(table_row(name, [evaluations(folder)[1]]))
    print(cli.markdown(rows))


def main(argv=None):
    parser = cli.parser(__doc__)
    parser.add_argument("--no-ablations", action="store_true", help="the three seeds only")
    parser.add_argument("--jobs", type=cli.integer(1, 1000), default=2,
                        help="runs at a time (default: %(default)s)")
    args, extra = parser.parse_known_args(argv)
    return cli.run_program(lambda: study(args, extra))


if __name__ == "__main__":
    sys.exit(main())
