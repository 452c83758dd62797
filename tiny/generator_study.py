"""Reward feedback in the miniature: the generator before and after it, three seeds, and two ablations, as one table.

    python tiny/generator_study.py        # trains what is missing, draws and measures, prints the table

The rows are the base, reward feedback by judge and PickScore, by the judge alone (appendix E.1.1: what a generator learns
that only has to please the judge), and with the judge as it was before its own GRPO (table 10). Each adapter draws the same
200 held-out cases with V and A as numbers in the prompt. The meter and the trained judge read the pictures, whichever judge
gave the rewards, and CLIP-Score compares them with the neutral prompt. A killed study goes on where it was. The runs lie in
tiny/cache/generator_study; the adapter of the first one is copied to tiny/weights/adapter.
"""

import argparse
import shutil
import statistics
import sys
from pathlib import Path

from parts.files import read_json
from tiny.dataset import write_tiny

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that `python tiny/generator_study.py` finds data.py
from parts.cli import UserError
from tiny.judge_study import run_missing

HERE = Path(__file__).resolve().parent
STUDY, DATASET, SUPERVISED = HERE / "cache" / "generator_study", HERE / "cache" / "dataset", HERE / "cache" / "judge"
JUDGE, SHIPPED = HERE / "weights" / "judge", HERE / "weights" / "adapter"
SEEDS = (0, 1, 2)
ROWS = {  # row of the table: (folder, flags of train_gen.py, or None for the base)
    "base": ("base", None),
    "judge and PickScore": ("both", []),
    "judge only (appendix E.1.1)": ("judge_only", ["--reward-weights", "emotion=1"]),
    "judge before GRPO, and PickScore (table 10)": ("general", ["--judge", str(SUPERVISED)]),
}
FIGURES = {"meter_v_error": "V-Error ↓", "meter_a_error": "A-Error ↓", "meter_v_spearman": "Spearman V ↑",
           "meter_a_spearman": "Spearman A ↑", "judge_v_error": "V-Error by judge ↓", "judge_a_error": "A-Error by judge ↓",
           "clip_score": "CLIP-Score ↑"}
RESULT = Path("evaluation", "evaluate.json")


def run_of(folder, flags, seed, cases, extra):
    """(folder, product, commands) of one run: train unless it is the base, then draw and measure."""
    out = STUDY / f"{folder}_seed{seed}"
    train = [sys.executable, HERE.parent / "train_gen.py", "--data", DATASET, "--out", out, "--judge", JUDGE, "--seed", seed,
             "--eval-every", 0, *(flags or []), *extra]
    measure = [sys.executable, "-m", "evaluation", "run", "--cases", cases, "--seed", seed, "--forms", "numbers",
               "--judge", JUDGE, "--out", out / RESULT.parent]
    return out, RESULT, [measure] if flags is None else [train, [*measure, "--adapter", out / "adapter"]]


def line(name, results):
    """One row of the table: mean ± standard deviation over the seeds."""
    cells = []
    for key in FIGURES:
        values = [r[key] for r in results]
        cells.append(f"{statistics.mean(values):.2f}" + (f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""))
    return f"| {name} | {' | '.join(cells)} |"


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time (default: %(default)s)")
    parser.add_argument("--cases", type=int, default=200, help="held-out cases (default: %(default)s)")
    args, extra = parser.parse_known_args(argv)  # the rest goes to train_gen.py
    if not (SUPERVISED / "model.safetensors").exists():
        sys.exit("tiny/cache/judge is missing; run `python tiny/pretrain.py judge` first")
    if not (DATASET / "train.jsonl").exists():
        write_tiny(DATASET, 4000, 500)
    runs = [run_of(folder, flags, seed, args.cases, extra) for seed in SEEDS for folder, flags in ROWS.values()]
    try:
        run_missing(runs, args.jobs, "generators")
    except UserError as error:
        sys.exit(f"error: {error}")
    shutil.copytree(STUDY / f"both_seed{SEEDS[0]}" / "adapter", SHIPPED, dirs_exist_ok=True)
    print("| rewards | " + " | ".join(FIGURES.values()) + " |\n" + "| --- " * (len(FIGURES) + 1) + "|")
    for name, (folder, _) in ROWS.items():
        files = [STUDY / f"{folder}_seed{seed}" / RESULT for seed in SEEDS]
        print(line(name, [read_json(file)["results"]["numbers"] for file in files]))


if __name__ == "__main__":
    main()
