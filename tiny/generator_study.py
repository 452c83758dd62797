"""Reward feedback in the miniature, beside all that might explain it without its rewards.

    python -m tiny.generator_study        # trains what is missing, measures, writes the records

Each row is a generator that draws the same test cases, of pairs of subject and place that no
training has, with V and A as numbers in the prompt; ROWS says how it was trained. The meter reads
the mood of the pictures and the examiner their subject; neither is a reward, but for the row that
is called a ceiling. Of a training the adapter counts that was best on the validation rows: the
least error by the meter among those whose content is within 5 points of the base's.

There are two sets of test cases. The first was read while the recipe was still being found, so its
table compares recipes. NEW was read once, when all was chosen: it says what the last recipe wins.
Which of its trainings is shipped is decided on validation cases again.

Further flags go to train_gen.py. A killed study goes on where it was. The runs lie in
tiny/cache/generator_study; the cases go to docs/records, from where `python -m tiny.results` writes
the page, and the best adapter of SHIPPED_ROW to tiny/weights/adapter.
"""

if __name__ == "__main__":  # before torch, whose import takes seconds: Ctrl-C ends in one line
    from parts import interrupts
    interrupts.catch()

import shutil
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from parts import cli, lora
from parts.files import read_json, read_records, write_whole
from tiny import results
from tiny.judge_study import check_supervised, digest_of, make_dataset, run_missing, shown

HERE = Path(__file__).resolve().parent
DATASET = HERE / "cache" / "dataset"
SUPERVISED = HERE / "cache" / "judge"
DRAWN_JUDGE = HERE / "cache" / "study" / "drawn_seed0" / "judge"
STUDY = HERE / "cache" / "generator_study"
JUDGE = HERE / "weights" / "judge"
SHIPPED = HERE / "weights" / "adapter"
CONTENT = 0.05  # so much of the base's content a chosen adapter may lose
EVERY = 10  # steps between evaluations on the validation rows


@dataclass(frozen=True)
class Row:
    """A row of the table: how its generators were trained, and with which seeds."""
    folder: str
    flags: tuple | None  # of its program; None: it is not trained
    seeds: tuple = (0,)
    program: str = "train_gen"  # or the name of a program in tiny/
    form: str = "numbers"
    after: str = ""  # folder of the row whose adapters it goes on from, by other prompts and noise
    step: int | None = None  # whose adapter counts; None: that of the best one on validation

    @property
    def suffix(self):
        """What tells its evaluations and records from those of the same run's best adapter."""
        return f"_{self.step}" if self.step else ""


@dataclass(frozen=True)
class Cases:
    """Test cases, and the rows that are measured on them."""
    rows: dict  # {name: Row}
    count: int
    seed: int  # of the cases
    folder: str  # of a run's evaluation
    split: str = "test"


LONG = ("--steps", "100")  # for the rows of tiny.hacking_study, too
SHORT = ("--steps", "60")
# As the paper trains: all steps of the sampler but the last, and its loss. The learning rate and β
# are the miniature's own, found for this loss.
PAPER = ("--loss", "flow-grpo", "--group-start", "own", "--group", "8", "--batch", "8",
         "--sde-steps", "10", "--window", "0", "--window-within", "0", "--step-weights", "equal",
         "--advantage-std", "group", "--lr", "1.5e-3", "--lr-end", "1.5e-3", "--beta", "0.02",
         "--ema", "0.97")
ROWS = {
    "base": Row("base", None),
    "base, given words": Row("base_words", None, form="words"),
    "emotion and PickScore": Row("both", LONG, (0, 1, 2)),
    "the same, 60 steps more": Row("longer", (*SHORT, "--lr", "1e-3", "--lr-end", "1e-4"),
                                   (0, 1), after="both"),
    "emotion only": Row(
        "emotion", (*LONG, "--reward-weights", "emotion=1", "--beta", "0"), (0, 1, 2)),
    "emotion and PickScore, as the paper trains": Row("paper", (*SHORT, *PAPER), (0, 1, 2)),
    "guided imitation, no judge": Row("imitation", (), (0, 1, 2), "imitation"),
    "PickScore only": Row("pickscore", (*SHORT, "--reward-weights", "pickscore=1")),
    "judge before GRPO": Row("general", (*SHORT, "--judge", str(SUPERVISED))),
    "judge trained on drawn labels": Row("drawn", (*SHORT, "--judge", str(DRAWN_JUDGE))),
    "guided and rewarded, as it was": Row("guided", ("--rewarded",), program="imitation"),
    "an emotion network, no RL": Row("emotion_network", (), program="emotion_network"),
    "the meter as reward (a ceiling)": Row(
        "meter", (*SHORT, "--reward-weights", "meter=1,pickscore=1")),
}
BOTH = ROWS["emotion and PickScore"]
SHIPPED_ROW = "then 60 steps of twice the prompts"  # one of its adapters is the miniature's
NEW = {
    "base": ROWS["base"],
    "as the paper trains, 60 steps": replace(
        ROWS["emotion and PickScore, as the paper trains"], step=60),
    "Flow-GRPO's loss, else as below": Row("flow", (*LONG, "--loss", "flow-grpo"), (0, 1, 2)),
    "emotion and PickScore, 20 steps": replace(BOTH, step=20),
    "emotion and PickScore": BOTH,
    SHIPPED_ROW: Row(
        "wide", (*SHORT, "--batch", "32", "--lr-end", "1e-4"), (0, 1, 2), after="both"),
}
CANDIDATES = {name: NEW[name] for name in ("base", SHIPPED_ROW)}
VALIDATION = "reward_feedback_validation"
TABLES = {
    "reward_feedback": Cases(ROWS, 200, 0, "evaluation"),
    "reward_feedback_new": Cases(NEW, 400, 1, "evaluation_new"),
    VALIDATION: Cases(CANDIDATES, 200, 1, "evaluation_validation", "validation"),
}


def folder_of(folder, seed):
    """Where a row's run lies. folder: the row's own, or that of the one it goes on from."""
    return STUDY / f"{folder}_seed{seed}"


def training(row, seed, extra):
    """The command that trains a row's generator."""
    out = folder_of(row.folder, seed)
    if row.after:
        before = folder_of(row.after, seed) / "adapter"
        extra = ["--init-adapter", before, *extra]
        seed += 10
    common = ["--data", DATASET, "--out", out, "--seed", seed, *row.flags]
    if row.program != "train_gen":
        return [sys.executable, "-m", f"tiny.{row.program}", *common]
    judge = [] if "--judge" in row.flags else ["--judge", JUDGE]
    return [sys.executable, HERE.parent / "train_gen.py", "--eval-every", EVERY, *common, *judge,
            *extra]


def product_of(row):
    """What a finished training has in its folder."""
    if row.program == "emotion_network":
        return Path("network.safetensors")
    return Path("adapter/adapter_config.json")


def chosen(row, seed):
    """(folder, step) of a run's adapter that counts."""
    out = folder_of(row.folder, seed)
    if row.step is None and not watched(out):  # imitation is not watched
        return out / "adapter", None
    step = row.step or min(ranking(row, seed))[-1]
    return out / "adapters" / f"{step:08d}", step


def ranking(row, seed):
    """[(whether it has lost the base's content, its error, step)] of a run's adapters, by the
    validation rows; the least is the best."""
    base = watched(folder_of(row.after or row.folder, seed))[0]
    enough = base["eval_content"] - CONTENT
    return [(record["eval_content"] < enough,
             record["eval_meter_v_error"] + record["eval_meter_a_error"], record["step"])
            for record in watched(folder_of(row.folder, seed))[1:]]


def watched(out):
    """A run's evaluations on the validation rows."""
    return [record for record in read_records(out / "log.jsonl") if "eval_content" in record]


def evaluation(row, seed, cases):
    """(folder, command) of how a row's generator is measured on Cases."""
    run = folder_of(row.folder, seed)
    out = run / f"{cases.folder}{row.suffix}_of_{cases.count}"  # fewer, in a trial, lie beside
    command = [sys.executable, "-m", "evaluation", "run", "--cases", cases.count, "--seed",
               cases.seed, "--split", cases.split, "--judge", JUDGE, "--out", out]
    if row.program == "emotion_network":  # which has drawn the cases
        return out, [*command, "--images", run / "pictures"]
    command += ["--forms", row.form]
    return out, command if row.flags is None else [*command, "--adapter", chosen(row, seed)[0]]


def best_seed(cases):
    """The seed of SHIPPED_ROW that errs least on Cases, if it keeps the base's content."""
    def figures(row, seed):
        folder, _ = evaluation(row, seed, cases)
        return read_json(folder / "evaluate.json")["results"][row.form]

    row = CANDIDATES[SHIPPED_ROW]
    enough = figures(CANDIDATES["base"], 0)["content"] - 100 * CONTENT

    def rank(seed):
        found = figures(row, seed)
        return found["content"] < enough, found["meter_v_error"] + found["meter_a_error"]

    return min(row.seeds, key=rank)


def ship(adapter):
    """Copy an adapter into the miniature, in bfloat16, and once: its weights may have 24 MiB."""
    shutil.copytree(adapter, SHIPPED, dirs_exist_ok=True,
                    ignore=shutil.ignore_patterns(lora.DIFFUSERS_FILE))
    file = SHIPPED / "adapter_model.safetensors"
    tensors = {name: tensor.to(torch.bfloat16) for name, tensor in load_file(file).items()}
    write_whole(file, lambda temporary: save_file(tensors, temporary, metadata={"format": "pt"}))


def study(args, extra):
    # 1. what the runs need
    check_supervised(SUPERVISED)
    make_dataset(DATASET)
    tables = {}
    for name, cases in TABLES.items():
        rows = {title: row for title, row in cases.rows.items()
                if not args.rows or row.folder in args.rows}
        tables[name] = replace(cases, rows=rows, count=args.cases or cases.count)

    # 2. trainings, a run of several tables once; rows that go on from others come last
    runs = {folder_of(row.folder, seed): (row, seed) for cases in tables.values()
            for row in cases.rows.values() for seed in row.seeds}
    for later in (False, True):
        trainings = [(folder, product_of(row), [training(row, seed, extra)])
                     for folder, (row, seed) in runs.items()
                     if row.flags is not None and bool(row.after) == later]
        run_missing(trainings, args.jobs, "generators")

    # 3. evaluations, and the adapter that sample.py draws with
    for name, cases in tables.items():
        measure(name, cases, args.jobs, extra)
    if tables[VALIDATION].rows == CANDIDATES:
        seed = best_seed(tables[VALIDATION])
        print(f"shipped: seed {seed}")
        ship(chosen(CANDIDATES[SHIPPED_ROW], seed)[0])


def measure(table, cases, jobs, extra):
    """Evaluate the rows of a table and put their cases into its records."""
    runs = [(name, row, seed) for name, row in cases.rows.items() for seed in row.seeds]
    measured = [evaluation(row, seed, cases) for _, row, seed in runs]
    run_missing([(out.parent, Path(out.name, "evaluate.json"), [command])
                 for out, command in measured], jobs, table)
    digest = digest_of(DATASET)
    for (name, row, seed), (out, command) in zip(runs, measured, strict=True):
        lines = [shown(command)]
        run = out.parent.name + row.suffix
        if row.flags is not None:
            lines.insert(0, shown(training(row, seed, extra)))
            if row.program == "train_gen":
                print(f"{run}: step {chosen(row, seed)[1]}")
        form = "images" if row.program == "emotion_network" else row.form
        results.add_run(table, name, run, seed, out, form, lines, digest)
    if runs:
        print(results.table_of(table))


def main(argv=None):
    parser = cli.parser(__doc__)
    folders = tuple(dict.fromkeys(row.folder for cases in TABLES.values()
                                  for row in cases.rows.values()))
    parser.add_argument("--rows", type=cli.some_of(folders), help=f"only {', '.join(folders)}")
    parser.add_argument("--jobs", type=cli.integer(1, 1000), default=2,
                        help="runs at a time (default: %(default)s)")
    parser.add_argument("--cases", type=cli.integer(2, 10**6),
                        help="of each table (default: 200 and 400 test cases, 200 of validation)")
    args, extra = parser.parse_known_args(argv)
    return cli.run_program(lambda: study(args, extra))


if __name__ == "__main__":
    sys.exit(main())
