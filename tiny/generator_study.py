"""Reward feedback in the miniature, beside all that might explain it without its rewards.

    python -m tiny.generator_study        # trains what is missing, measures, writes the records

Each row is a generator that draws the same 200 test cases, of pairs of subject and place that no
training has, with V and A as numbers in the prompt; ROWS says how it was trained. The meter reads
the mood of the pictures and the examiner their subject; neither is a reward, but for the row that
is called a ceiling. Of a training the adapter counts that was best on the validation rows: the
least error by the meter among those whose content is within 5 points of the base's.

Further flags go to train_gen.py. A killed study goes on where it was. The runs lie in
tiny/cache/generator_study; the cases go to docs/records, from where `python -m tiny.results` writes
the page, and the adapter of SHIPPED_ROW's first run to tiny/weights/adapter.
"""

if __name__ == "__main__":  # before torch, whose import takes seconds: Ctrl-C ends in one line
    from parts import interrupts
    interrupts.catch()

import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from parts import cli, lora
from parts.files import read_records, write_whole
from tiny import results
from tiny.judge_study import check_supervised, digest_of, make_dataset, run_missing, shown

HERE = Path(__file__).resolve().parent
DATASET = HERE / "cache" / "dataset"
SUPERVISED = HERE / "cache" / "judge"
DRAWN_JUDGE = HERE / "cache" / "study" / "drawn_seed0" / "judge"
STUDY = HERE / "cache" / "generator_study"
JUDGE = HERE / "weights" / "judge"
SHIPPED = HERE / "weights" / "adapter"
SHIPPED_ROW = "longer"  # whose first run's adapter that is
TABLE = "reward_feedback"
CONTENT = 0.05  # so much of the base's content a chosen adapter may lose
EVALUATED = Path("evaluation", "evaluate.json")
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
    """(folder, step) of a run's best adapter on the validation rows."""
    out = folder_of(row.folder, seed)
    log = watched(out)
    if not log:  # imitation is not watched
        return out / "adapter", None
    base = watched(folder_of(row.after or row.folder, seed))[0]
    enough = base["eval_content"] - CONTENT
    kept = [record for record in log[1:] if record["eval_content"] >= enough] or log[-1:]
    best = min(kept, key=lambda record: record["eval_meter_v_error"] + record["eval_meter_a_error"])
    return out / "adapters" / f"{best['step']:08d}", best["step"]


def watched(out):
    """A run's evaluations on the validation rows."""
    return [record for record in read_records(out / "log.jsonl") if "eval_content" in record]


def evaluation(row, seed, cases):
    """The command that measures a row's generator."""
    out = folder_of(row.folder, seed)
    command = [sys.executable, "-m", "evaluation", "run", "--cases", cases, "--judge", JUDGE,
               "--out", out / EVALUATED.parent]
    if row.program == "emotion_network":  # which has drawn the cases
        return [*command, "--images", out / "pictures"]
    command += ["--forms", row.form]
    return command if row.flags is None else [*command, "--adapter", chosen(row, seed)[0]]


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
    rows = {name: row for name, row in ROWS.items() if not args.rows or row.folder in args.rows}
    runs = [(name, row, seed) for name, row in rows.items() for seed in row.seeds]

    # 2. trainings, then evaluations
    for later in (False, True):  # rows that go on from others come last
        trainings = [(folder_of(row.folder, seed), product_of(row), [training(row, seed, extra)])
                     for _, row, seed in runs if row.flags is not None and bool(row.after) == later]
        run_missing(trainings, args.jobs, "generators")
    measured = [(folder_of(row.folder, seed), EVALUATED, [evaluation(row, seed, args.cases)])
                for _, row, seed in runs]
    run_missing(measured, args.jobs, "evaluations")

    # 3. records, and the adapter that sample.py draws with
    digest = digest_of(DATASET)
    for name, row, seed in runs:
        out = folder_of(row.folder, seed)
        commands = [evaluation(row, seed, args.cases)]
        if row.flags is not None:
            commands.insert(0, training(row, seed, extra))
            if row.program == "train_gen":
                print(f"{out.name}: step {chosen(row, seed)[1]}")
        lines = [shown(command) for command in commands]
        form = "images" if row.program == "emotion_network" else row.form
        results.add_run(TABLE, name, out.name, seed, out / EVALUATED.parent, form, lines, digest)
    for row in rows.values():
        if row.folder == SHIPPED_ROW:
            ship(chosen(row, 0)[0])
    print(results.table_of(TABLE))


def main(argv=None):
    parser = cli.parser(__doc__)
    folders = tuple(row.folder for row in ROWS.values())
    parser.add_argument("--rows", type=cli.some_of(folders), help=f"only {', '.join(folders)}")
    parser.add_argument("--jobs", type=cli.integer(1, 1000), default=2,
                        help="runs at a time (default: %(default)s)")
    parser.add_argument("--cases", type=cli.integer(2, 10**6), default=200,
                        help="test cases (default: %(default)s)")
    args, extra = parser.parse_known_args(argv)
    return cli.run_program(lambda: study(args, extra))


if __name__ == "__main__":
    sys.exit(main())
