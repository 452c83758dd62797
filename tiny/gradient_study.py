"""How much do the gradients of reward feedback say, and how much of them is noise?

    python -m tiny.gradient_study        # 8 steps by each loss, about 12 minutes on two cores

A step of train_gen.py draws other prompts and other noise than the one before, from one model here,
so what two steps' gradients have in common is what there is to learn. For each loss the gradient of
several steps is taken at the base model, and its cosine with those of the other steps: 0 is noise
alone. The adapter's parameters in the text's stream and in the image's stream count apart.

Figures of every step go to docs/records/gradients.jsonl, from where `python -m tiny.results` writes
the page.
"""

import sys
from argparse import Namespace

import torch
from tqdm import tqdm

import data
import grpo
import train_gen
from parts import cli
from parts.run import Processes
from tiny import results
from tiny.dataset import write_tiny
from tiny.generator_study import DATASET

TABLE = "gradients"
COMMON = ("--lora-streams", "both", "--beta", "0")
ROWS = {
    "Flow-GRPO, each picture from its own start":
        ("--loss", "flow-grpo", "--group-start", "own"),
    "Flow-GRPO, a group from one start":
        ("--loss", "flow-grpo", "--group-start", "shared"),
    "finite differences, a group from one start":
        ("--loss", "difference", "--group-start", "shared"),
}
ALONE = Namespace(until_asked=iter, processes=Processes(0, 1, torch.device("cpu")))


def gradient(models, rows, args, step):
    """{stream: gradient [·]} of a step of train_gen.py."""
    model = models.generator.mmdit
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad(set_to_none=True)
    samples = train_gen.samples_of(step, rows, args)
    chunks, rewards = train_gen.roll_out(models, samples, args, ALONE, step)
    grouped = rewards["total"].view(-1, args.group)
    advantages = grpo.group_advantages(grouped, global_std=args.advantage_std == "global")
    for chunk in chunks:
        for k in range(len(chunk.trajectory.steps)):
            loss, _ = train_gen.loss_of_step(
                model, chunk, k, advantages.flatten().float(), args, len(samples))
            loss.backward()
    parts = {"text": [], "image": []}
    for name, p in trained.items():
        if p.grad is not None:
            parts["text" if ".context_block." in name else "image"].append(p.grad.flatten())
    return {stream: torch.cat(own) for stream, own in parts.items()}


def agreement(gradients):
    """Each row's mean cosine with the others, [n] of [n,·]."""
    unit = gradients / gradients.norm(dim=1, keepdim=True)
    cosines = unit @ unit.t()
    return (cosines.sum(dim=1) - 1) / (len(unit) - 1)


def study(args):
    if not (DATASET / "train.jsonl").exists():
        write_tiny(DATASET, 4000, 500)
    rows = data.load_rows(DATASET, "train")
    models = None
    for row, flags in ROWS.items():
        settings = train_gen.parse_args(["--data", str(DATASET), *COMMON, *flags])
        models = models or train_gen.load_models(settings, torch.device("cpu"))
        found = [gradient(models, rows, settings, step) for step in tqdm(range(args.steps), row)]
        streams = {name: agreement(torch.stack([each[name] for each in found])).tolist()
                   for name in found[0]}
        records = [{"id": step, **{name: values[step] for name, values in streams.items()}}
                   for step in range(args.steps)]
        command = f"python -m tiny.gradient_study --steps {args.steps}"
        results.add_figures(TABLE, row, {"data": data.digest(rows), "commands": [command]}, records)
    print(results.table_of(TABLE))


def main(argv=None):
    parser = cli.parser(__doc__)
    parser.add_argument("--steps", type=cli.integer(2, 10**4), default=8,
                        help="by each loss (default: %(default)s)")
    args = parser.parse_args(argv)
    return cli.run_program(lambda: study(args))


if __name__ == "__main__":
    sys.exit(main())
