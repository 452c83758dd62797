"""How much do the gradients of reward feedback say, and how much of them is noise?

    python -m tiny.gradient_study        # 8 runs by each loss, about 10 minutes on two cores

Each run of train_gen.py makes one step from the same model, with other prompts and other noise, so
what two runs' gradients have in common is what there is to learn. Counted is the mean cosine of a
run's gradient with those of the others by the same loss: 0 is noise alone. The gradient is read
from the checkpoint, where AdamW's first moment is a tenth of it after one step.

The runs lie in the folder of tiny.generator_study. The figures go to docs/records/gradients.jsonl,
from where `python -m tiny.results` writes the page.
"""

import sys

import torch

from parts import checkpoints, cli
from tiny import results
from tiny.generator_study import DATASET, Row, folder_of, product_of, training
from tiny.judge_study import digest_of, make_dataset, run_missing, shown

TABLE = "gradients"
# One step of 64 pictures without a KL, and no more of an evaluation than must be
COMMON = ("--steps", "1", "--beta", "0", "--eval-every", "0", "--eval-rows", "2")
ROWS = {
    "Flow-GRPO, each picture from its own start":
        Row("gradient_own", (*COMMON, "--loss", "flow-grpo", "--group-start", "own")),
    "Flow-GRPO, a group from one start":
        Row("gradient_shared", (*COMMON, "--loss", "flow-grpo", "--group-start", "shared")),
    "finite differences, a group from one start":
        Row("gradient_difference", (*COMMON, "--loss", "difference", "--group-start", "shared")),
}


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
    make_dataset(DATASET)
    seeds = range(args.runs)
    runs = {name: [(folder_of(row.folder, seed), product_of(row), [training(row, seed, extra)])
                   for seed in seeds] for name, row in ROWS.items()}
    run_missing([run for own in runs.values() for run in own], args.jobs, "steps")
    for name, own in runs.items():
        found = torch.stack([gradient(out / "checkpoint-00000001") for out, *_ in own])
        records = [{"id": seed, "agreement": each}
                   for seed, each in zip(seeds, agreement(found).tolist(), strict=True)]
        lines = [shown(command) for *_, (command,) in own]
        results.add_figures(TABLE, name, {"data": digest_of(DATASET), "commands": lines}, records)
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
