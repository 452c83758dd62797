"""The miniature's own EmotiCrafter: prompt embeddings changed by valence and arousal, without RL.

    python -m tiny.emotion_network --out runs/emotion_network     # trains and draws, in minutes

It answers what reward feedback must be compared with: what do pictures gain if a network simply
puts V and A into the text vectors? EmotiCrafter's (Dang et al. 2025; baselines/emoticrafter.py),
here with 4 blocks of width 96, reads the vectors of a neutral caption and is trained to change them
into those of the scene's emotional caption, on the same rows as reward feedback. The generator is
not trained, and no judge is asked.

It draws the test cases into OUT/pictures, <id>.png each, as `python -m evaluation run --images
OUT/pictures` reads them. A killed run starts again.
"""

if __name__ == "__main__":  # before torch, whose import takes seconds: Ctrl-C ends in one line
    from parts import interrupts
    interrupts.catch()

import sys
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import data
import flow_grpo
from baselines.emoticrafter import Network, NetworkConfig, rescaled
from evaluation.cases import held_out_cases
from parts import cli, weights
from parts.files import save_png
from parts.pipeline import TINY, PromptCache, load_generator, seeded, to_images

SIZE = 128
STEPS = 25
GUIDANCE = 4.5
CONFIG = NetworkConfig(
    layers=4, width=96, context_dim=160, positions=128, hidden=64, tokens=4, heads=4)


def train(generator, rows, args):
    """The Network, after args.steps batches of rows."""
    torch.manual_seed(args.seed)
    network = Network(CONFIG)
    optimizer = torch.optim.AdamW(network.parameters(), lr=args.lr, weight_decay=0.01)
    rng = np.random.default_rng(args.seed)
    bar = tqdm(range(args.steps), "emotion network")
    shown = None
    for step in bar:
        picks = [rows[i] for i in rng.integers(len(rows), size=args.batch)]
        neutral, _ = generator.encoders.encode([row.neutral for row in picks])
        emotional, _ = generator.encoders.encode([row.emotional for row in picks])
        changed = network(neutral.float(), *rescaled(picks))
        loss = (changed - emotional.float()).square().mean()
        warm_up = min(1, (step + 1) / 50)
        optimizer.param_groups[0]["lr"] = args.lr * warm_up * (1 - step / args.steps)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        shown = loss.item() if shown is None else 0.98 * shown + 0.02 * loss.item()
        bar.set_postfix(loss=f"{shown:.4f}", refresh=False)
    return network


@torch.no_grad()
def draw(generator, network, cases, seeds):
    """PIL images of cases, whose prompts stay neutral."""
    context, pooled = generator.encode_prompts([case.neutral for case in cases], GUIDANCE)
    empty, neutral = context.chunk(2)
    changed = network(neutral.float(), *rescaled(cases)).to(context)
    start = generator.starting_noise(seeded(seeds), SIZE)
    latents = flow_grpo.sample_ode(generator.mmdit, start, torch.cat([empty, changed]), pooled,
                                   STEPS, GUIDANCE, generator.shift)
    return to_images(generator.decode(latents))


def run(args):
    rows = data.load_rows(args.data, "train")
    generator = load_generator(TINY)
    generator.encoders = PromptCache(generator.encoders, generator.dtype, limit=3 * len(rows))
    network = train(generator, rows, args)
    weights.save(args.out / "network.safetensors", network.views())
    cases = held_out_cases(args.cases, seed=0)
    for start in tqdm(range(0, len(cases), 20), "pictures", unit_scale=20):
        part = cases[start:start + 20]
        # the seeds of `python -m evaluation run`: the same noise as all other generators
        images = draw(generator, network, part, range(start, start + len(part)))
        for case, image in zip(part, images, strict=True):
            save_png(image, args.out / "pictures" / f"{case.id}.png")
    print(args.out / "pictures")


def main(argv=None):
    parser = cli.parser(__doc__)
    add = parser.add_argument
    add("--data", type=Path, default=Path("tiny/cache/dataset"), help="(default: %(default)s)")
    add("--out", type=Path, required=True, help="folder of the run")
    add("--cases", type=cli.integer(1, 10**6), default=200,
        help="test cases to draw (default: %(default)s)")
    add("--steps", type=cli.integer(1, 10**6), default=1500, help="(default: %(default)s)")
    add("--batch", type=cli.integer(1, 4096), default=32, help="rows (default: %(default)s)")
    add("--lr", type=cli.number(0, 1), default=1e-3, help="(default: %(default)s)")
    add("--seed", type=cli.integer(0, 2**31), default=0, help="(default: %(default)s)")
    args = parser.parse_args(argv)
    return cli.run_program(lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
