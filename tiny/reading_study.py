"""How should the judge be read for a reward? Four ways, on pictures of the generator.

    python -m tiny.reading_study        # 64 groups of 4 pictures, about 4 minutes on two cores

A reward compares the pictures of a group, so a reading must tell them apart, and be right. Each
group is drawn from one prompt of a validation case, with the target as numbers, as train_gen.py
draws the miniature's: from one start, by four stochastic steps of six. The meter says what valence
and arousal each picture really has.

- answer: the likeliest answer, thought and all
- mean of 8: the mean of that answer and seven that are drawn at random
- logits: the expected value over the number's digits, in one forward pass without a thought
- thought, then logits: the same after the thought of the likeliest answer

The groups' figures go to docs/records/reading.jsonl.
"""

import sys
import time
from dataclasses import replace

import numpy as np
import torch
from tqdm import tqdm

import data
import feedback
import flow_grpo
from evaluation.cases import held_out_cases
from evaluation.metrics import spearman
from parts import cli
from parts.pipeline import TINY, judge_of, load_generator, load_judge, seeded, to_images
from tiny import results, scenes
from tiny.judge_study import shown

SIZE = 128
TABLE = "reading"
WAYS = {"answer": 1, "mean of 8": 8, "logits": "logits", "thought, then logits": "thought"}
GROUP = 4
DRAWING = flow_grpo.SDESettings(  # as train_gen.py draws the miniature's pictures
    num_steps=6, noise_level=0.7, stochastic=range(4), trained=range(0))


@torch.no_grad()
def draw_group(generator, case, group, seed):
    """PIL images of one prompt, from one start."""
    prompt = data.with_numbers(case.neutral, case.v, case.a)
    texts = generator.encode_prompts([prompt] * group, DRAWING.guidance)
    noises = seeded(range(seed, seed + group))
    start = generator.starting_noise(noises, SIZE)
    settings = replace(DRAWING, branch=group, shift=generator.shift)
    trajectory = flow_grpo.sample_sde(generator.mmdit, start, *texts, settings, noises)
    return to_images(generator.decode(trajectory.latents))


def figures_of(readings, truths, target, seconds):
    """{figure: number} of a group's readings and truths [G,2] and its target (V, A)."""
    rewards = -np.abs(readings - target).sum(-1)  # [G], but for a constant
    best = -np.abs(truths - target).sum(-1)
    off = np.abs(readings - truths)
    return {"v_off": float(np.nanmean(off[:, 0])), "a_off": float(np.nanmean(off[:, 1])),
            "ties": 1 - len(set(rewards.round(6).tolist())) / len(rewards),
            "order": spearman(rewards, best), "seconds": seconds / len(rewards)}


def study(args):
    generator = load_generator(TINY, adapter=args.adapter)
    judge = judge_of(load_judge(args.judge, "cpu", SIZE), progress=False)
    cases = held_out_cases(args.groups, seed=0, split="validation")
    groups = [draw_group(generator, case, args.group, i * args.group)
              for i, case in enumerate(tqdm(cases, "drawing"))]
    adapter = ["--adapter", args.adapter] if args.adapter else []
    command = shown([None, "-m", "tiny.reading_study", "--groups", args.groups, "--group",
                     args.group, "--judge", args.judge, *adapter])
    for name, ways in WAYS.items():
        records = []
        for case, images in zip(cases, tqdm(groups, name), strict=True):
            began = time.perf_counter()
            seen = feedback.judge_images(judge, images, ways, strict=True)
            seconds = time.perf_counter() - began
            truths = np.array([scenes.measure_va(image) for image in images])
            readings = np.array([each.va for each in seen])
            records.append({"id": case.id,
                            **figures_of(readings, truths, (case.v, case.a), seconds)})
        results.add_figures(TABLE, name, {"commands": [command]}, records)
    print(results.table_of(TABLE))


def main(argv=None):
    parser = cli.parser(__doc__)
    add = parser.add_argument
    add("--groups", type=cli.integer(1, 10**5), default=64, help="(default: %(default)s)")
    add("--group", type=cli.integer(2, 1024), default=GROUP, help="pictures (default: %(default)s)")
    add("--judge", default=str(TINY / "judge"), help="folder of the judge (default: %(default)s)")
    add("--adapter", help="of the generator (default: none)")
    args = parser.parse_args(argv)
    return cli.run_program(lambda: study(args))


if __name__ == "__main__":
    sys.exit(main())
