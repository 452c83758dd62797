"""How much do the gradients of reward feedback say, and how much of them is noise?

    python -m tiny.gradient_study        # 8 runs by each loss, about 10 minutes on two cores

Each run of train_gen.py makes one step from the same model, with other prompts and other noise, so
what two runs' gradients have in common is what there is to learn. Counted is the mean cosine of a
run's gradient with those of the others by the same loss: 0 is noise alone. The gradient is read
from the checkpoint, where AdamW's first moment is a tenth of it after one step.

The runs lie in tiny/cache/gradient_study. The figures go to docs/records/gradients.jsonl, from
where `python -m tiny.results` writes the page.
"""

import sys

import torch

from parts import checkpoints, cli
from tiny import results
from tiny.dataset import write_tiny
from tiny.generator_study import DATASET, HERE, JUDGE
from tiny.judge_study import digest_of, run_missing, shown

STUDY = HERE / "cache" / "gradient_study"
TABLE = "gradients"
# One step of 64 pictures without a KL, and no more of an evaluation than must be
COMMON = ("--steps", "1", "--beta", "0", "--eval-every", "0", "--eval-rows", "2")
ROWS = {  # name: (folder, flags)
    "Flow-GRPO, each picture from its own start":
        ("own", ("--loss", "flow-grpo", "--group-start", "own")),
    "Flow-GRPO, a group from one start":
        ("shared", ("--loss", "flow-grpo", "--group-start", "shared")),
    "finite differences, a group from one start":
        ("difference", ("--loss", "difference", "--group-start", "shared")),
}


def training(row, seed, extra):
    """(folder, product, commands) of one run."""
    folder, flags = ROWS[row]
    out = STUDY / f"{folder}_seed{seed}"
    command = [sys.executable, HERE.parent / "train_gen.py", "--data", DATASET, "--judge", JUDGE,
               "--out", out, "--seed", seed, *COMMON, *flags, *extra]
    return out, "adapter/adapter_config.json", [command]


def gradient(folder):
    """A tenth of the gradient [·] of a run's only step, from its checkpoint."""
    sizes = checkpoints.Reader(folder).read_metadata().state_dict_metadata
    moments = {name: torch.empty(found.size) for name, found in sizes.items()
               if name.endswith(".exp_avg")}
    checkpoints.read(folder, moments)
    return torch.cat([moments[name].flatten() for name in sorted(moments)])


def agreement(gradients):
    """Each row's mean cosine with the others, [n] of [n,·]."""
    unit = gradients / gradients.norm(dim=1, keepdim=True)
    cosines = unit @ unit.t()
    return (cosines.sum(dim=1) - 1) / (len(unit) - 1)


def study(args, extra):
    if not (DATASET / "train.jsonl").exists():
        write_tiny(DATASET, 4000, 500)
    seeds = range(args.runs)
    run_missing([training(row, seed, extra) for row in ROWS for seed in seeds], args.jobs, "steps")
    for row in ROWS:
        runs = [training(row, seed, extra) for seed in seeds]
        found = torch.stack([gradient(out / "checkpoint-00000001") for out, *_ in runs])
        records = [{"id": seed, "agreement": each}
                   for seed, each in zip(seeds, agreement(found).tolist(), strict=True)]
        lines = [shown(command) for *_, (command,) in runs]
        results.add_figures(TABLE, row, {"data": digest_of(DATASET), "commands": lines}, records)
    print(results.table_of(TABLE))


def main(argv=None):
    parser = cli.parser(__doc__)
    parser.add_argument("--runs", type=cli.integer(2, 10**4), default=8,
                        help="by each loss (default: %(default)s)")
    parser.add_argument("--jobs", type=cli.integer(1, 1000), default=2,
                        help="at a time (default: %(default)s)")
    args, extra = parser.parse_known_args(argv)
    return cli.run_program(lambda: study(args, extra))


if __name__ == "__main__":
    sys.exit(main())
