"""Reward feedback in the miniature: the generator before and after it, three seeds, two ablations.

    python -m tiny.generator_study        # trains what is missing, measures, prints a table

The rows are the base, reward feedback by judge and PickScore, by the judge alone (appendix E.1.1:
what a generator learns that only has to please the judge), and with the judge as it was before its
own GRPO (table 10). Each adapter draws the same 200 held-out cases with V and A as numbers in the
prompt. The meter and the trained judge read the pictures, whichever judge gave the rewards, and
CLIP-Score compares them with the neutral prompt. Further flags go to train_gen.py. A killed study
goes on where it was. The runs lie in tiny/cache/generator_study; the adapter of the first one is
copied to tiny/weights/adapter.
"""

if __name__ == "__main__":  # before torch, whose import takes seconds: Ctrl-C ends in one line
    from parts import interrupts
    interrupts.catch()

import shutil
import statistics
import sys
from pathlib import Path

from parts import cli, lora
from parts.files import read_json
from tiny.dataset import write_tiny
from tiny.judge_study import check_supervised, run_missing

HERE = Path(__file__).resolve().parent
DATASET = HERE / "cache" / "dataset"
SUPERVISED = HERE / "cache" / "judge"
STUDY = HERE / "cache" / "generator_study"
JUDGE = HERE / "weights" / "judge"
SHIPPED = HERE / "weights" / "adapter"
SEEDS = (0, 1, 2)
ROWS = {  # row of the table: (folder, flags of train_gen.py, or None for the base)
    "base": ("base", None),
    "judge and PickScore": ("both", []),
    "judge only (appendix E.1.1)": ("judge_only", ["--reward-weights", "emotion=1"]),
    "judge before GRPO, and PickScore (table 10)": ("general", ["--judge", str(SUPERVISED)]),
}
FIGURES = {  # of an evaluation: column of the table
    "meter_v_error": "V-Error ↓", "meter_a_error": "A-Error ↓",
    "meter_v_spearman": "Spearman V ↑", "meter_a_spearman": "Spearman A ↑",
    "judge_v_error": "V-Error by judge ↓", "judge_a_error": "A-Error by judge ↓",
    "clip_score": "CLIP-Score ↑",
}
RESULT = Path("evaluation", "evaluate.json")


def run_of(folder, flags, seed, cases, extra):
    """(folder, product, commands) of one run: training, unless it is the base, and evaluation."""
    out = STUDY / f"{folder}_seed{seed}"
    measure = [sys.executable, "-m", "evaluation", "run", "--cases", cases, "--seed", seed,
               "--forms", "numbers", "--judge", JUDGE, "--out", out / RESULT.parent]
    if flags is None:  # the base has nothing to train
        return out, RESULT, [measure]
    train = [sys.executable, HERE.parent / "train_gen.py", "--data", DATASET, "--out", out,
             "--judge", JUDGE, "--seed", seed, "--eval-every", 0, *flags, *extra]
    return out, RESULT, [train, [*measure, "--adapter", out / "adapter"]]


def table_row(name, results):
    """A row of the table: mean ± standard deviation over the seeds."""
    cells = [name]
    for key in FIGURES:
        values = [result[key] for result in results]
        cell = f"{statistics.mean(values):.2f}"
        if len(values) > 1:
            cell += f" ± {statistics.stdev(values):.2f}"
        cells.append(cell)
    return cells


def study(args, extra):
    # 1. what the runs need
    check_supervised(SUPERVISED)
    if not (DATASET / "train.jsonl").exists():
        write_tiny(DATASET, 4000, 500)

    # 2. the runs
    runs = []  # seed by seed, so that a study that is stopped has whole rows
    for seed in SEEDS:
        for folder, flags in ROWS.values():
            runs.append(run_of(folder, flags, seed, args.cases, extra))
    run_missing(runs, args.jobs, "generators")
    # the adapter that sample.py draws with; once, as the miniature's weights may have 24 MiB
    shutil.copytree(STUDY / f"both_seed{SEEDS[0]}" / "adapter", SHIPPED, dirs_exist_ok=True,
                    ignore=shutil.ignore_patterns(lora.DIFFUSERS_FILE))

    # 3. the table
    rows = [("rewards", *FIGURES.values())]
    for name, (folder, _) in ROWS.items():
        files = [STUDY / f"{folder}_seed{seed}" / RESULT for seed in SEEDS]
        rows.append(table_row(name, [read_json(file)["results"]["numbers"] for file in files]))
    print(cli.markdown(rows))


def main(argv=None):
    parser = cli.parser(__doc__)
    parser.add_argument("--jobs", type=cli.integer(1, 1000), default=2,
                        help="runs at a time (default: %(default)s)")
    parser.add_argument("--cases", type=cli.integer(2, 10**6), default=200,
                        help="held-out cases (default: %(default)s)")
    args, extra = parser.parse_known_args(argv)
    return cli.run_program(lambda: study(args, extra))


if __name__ == "__main__":
    sys.exit(main())
