"""The miniature judge before and after GRPO, three seeds, and the ablations of Tables 4 and 5, as one table.

    python tiny/judge_study.py            # trains what is missing (about 90 minutes on 2 cores), then prints the table

Every run starts from the supervised judge (`python tiny/pretrain.py judge`), sees the same 4,000 pictures and is judged on
the same 500 held-out ones, whose V and A are those they were drawn with. A killed study goes on where it was. The runs lie
in tiny/cache/study; the judge of the first one is copied to tiny/weights/judge.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

from parts.files import read_records
from tiny.dataset import write_tiny

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that `python tiny/judge_study.py` finds data.py
from parts.cli import UserError

HERE = Path(__file__).resolve().parent
SUPERVISED, STUDY, DATASETS = HERE / "cache" / "judge", HERE / "cache" / "study", HERE / "cache"
SHIPPED = HERE / "weights" / "judge"
SEEDS = (0, 1, 2)
FIGURES = ("format", "v_error", "a_error", "class_accuracy")
ABLATIONS = {  # row of the table: (folder, flags, dataset)
    "continuous reward (Table 4)": ("continuous", ["--reward", "continuous"], "dataset"),
    "regression only (Table 5)": ("regression", ["--tasks", "regression"], "dataset"),
    "classification only (Table 5)": ("class", ["--tasks", "class"], "dataset"),
    "V and A drawn from the class, as the paper labels": ("drawn", [], "dataset_drawn"),
}


def run_missing(runs, jobs, what):
    """Make the products that are not there yet: `run_all` of [(folder, product within it, commands)]."""
    run_all([(folder, commands) for folder, product, commands in runs if not (folder / product).exists()], jobs, what)


def run_all(runs, jobs, what):
    """Run [(folder, commands)], `jobs` at a time and each with its share of the cores: so small a model gains little from a
    second thread. What the commands say goes to the folder's output.txt."""
    threads = max(1, (os.cpu_count() or 1) // jobs)

    def one(run):
        folder, commands = run
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / "output.txt", "a") as output:
            for command in commands:
                done = subprocess.run(list(map(str, command)), stdout=output, stderr=output,
                                      env={**os.environ, "OMP_NUM_THREADS": str(threads)})
                if done.returncode:
                    raise UserError(f"the run {folder.name} ended with code {done.returncode}; see "
                                            f"{folder}/output.txt")

    with ThreadPoolExecutor(jobs) as pool:
        list(tqdm(pool.map(one, runs), total=len(runs), desc=what, unit="run"))


def run_of(folder, seed, flags, dataset, extra):
    """(folder, product, commands) of one judge's training."""
    out = STUDY / folder
    return out, "judge/tokenizer_config.json", [[  # the file that is written last
        sys.executable, HERE.parent / "train_judge.py", "--model", SUPERVISED, "--data", DATASETS / dataset, "--out", out,
        "--seed", seed, *flags, *extra]]


def evaluations(folder):
    """The log's records of a run's first and last evaluation."""
    evaluated = [r for r in read_records(STUDY / folder / "log.jsonl") if "eval_format" in r]
    return evaluated[0], evaluated[-1]


def line(name, records):
    """One row of the table: mean ± standard deviation over the seeds."""
    cells = []
    for key, scale, form in zip(FIGURES, (100, 1, 1, 100), ("{:.1f} %", "{:.2f}", "{:.2f}", "{:.1f} %")):
        values = [r[f"eval_{key}"] * scale for r in records if r[f"eval_{key}"] is not None]
        spread = f" ± {statistics.stdev(values):.2g}" if len(values) > 1 else ""
        cells.append(form.format(statistics.mean(values)) + spread if values else "none readable")
    return f"| {name} | {' | '.join(cells)} |"


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--no-ablations", action="store_true", help="the three seeds only")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time (default: %(default)s)")
    args, extra = parser.parse_known_args(argv)  # the rest goes to train_judge.py
    if not (SUPERVISED / "model.safetensors").exists():
        sys.exit("tiny/cache/judge is missing; run `python tiny/pretrain.py judge` first")
    runs = [(f"step_seed{seed}", seed, [], "dataset") for seed in SEEDS]
    if not args.no_ablations:
        runs += [(folder, 0, flags, dataset) for folder, flags, dataset in ABLATIONS.values()]
    for name in dict.fromkeys(dataset for *_, dataset in runs):
        if not (DATASETS / name / "train.jsonl").exists():
            write_tiny(DATASETS / name, 4000, 500, "drawn" if name == "dataset_drawn" else "true")
    try:
        run_missing([run_of(*run, extra) for run in runs], args.jobs, "judges")
    except UserError as error:
        sys.exit(f"error: {error}")
    pairs = [evaluations(f"step_seed{seed}") for seed in SEEDS]
    rows = ["| judge | format ↑ | V-Error ↓ | A-Error ↓ | class accuracy ↑ |", "| --- | --- | --- | --- | --- |",
            line("before GRPO", [first for first, _ in pairs[:1]]),
            line(f"after GRPO, {len(SEEDS)} seeds", [last for _, last in pairs])]
    shutil.copytree(STUDY / "step_seed0" / "judge", SHIPPED, dirs_exist_ok=True)
    if not args.no_ablations:
        rows += [line(name, [evaluations(folder)[1]]) for name, (folder, _, _) in ABLATIONS.items()]
    print("\n".join(rows))


if __name__ == "__main__":
    main()
