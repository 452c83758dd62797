"""The controls of reward feedback: imitation of pictures that were drawn from an emotional prompt.

    python -m tiny.imitation --out runs/imitation               # without a judge
    python -m tiny.imitation --out runs/rewarded --rewarded     # and with one, as it once was

Guided pictures are drawn from a row's emotional caption by the model without its adapter, which
follows words better than numbers. Their steps are then made likelier under the prompt with numbers:
imitation, for which no judge is needed, since every guided picture has the advantage 1. Reward
feedback once drew half of each group like this (--rewarded): the judge's scores then decided which
of them counted, and negative advantages became 0, as a guided picture was not drawn by the policy.
Its gradient was nearly that of imitation, so that it was no evidence for the judge.

The loss is Flow-GRPO's, as in train_gen.py. A run is short and is not resumed.
"""

import math
import random
import sys
from pathlib import Path

import torch
from tqdm import tqdm

import data
import feedback
import flow_grpo
import grpo
from parts import cli, clip, lora
from parts.pipeline import (
    TINY,
    PromptCache,
    judge_of,
    load_generator,
    load_judge,
    seeded,
    to_images,
)
from parts.run import EMA, batch_indices, linear, noise_seed

SIZE = 128
RANK = 32
ALPHA = 64.0
PROMPTS = 16  # in a step
GUIDANCE = 4.5
BETA = 0.02


def draw(generator, prompts, drawn_from, seeds, settings):
    """(Trajectory, texts of the prompts): pictures drawn from other prompts without the adapter, or
    from their own with it, where the two are the same."""
    model = generator.mmdit
    texts = generator.encode_prompts(prompts, GUIDANCE)
    noises = seeded(seeds)
    start = generator.starting_noise(noises, SIZE)
    if prompts == drawn_from:
        return flow_grpo.sample_sde(model, start, *texts, settings, noises), texts
    emotional = generator.encode_prompts(drawn_from, GUIDANCE)
    with torch.no_grad(), lora.lora_disabled(model):
        trajectory = flow_grpo.sample_sde(model, start, *emotional, settings, noises)
    with torch.no_grad():  # what the policy, given its own prompt, would have thought of the steps
        for k, kept in enumerate(trajectory.steps):
            kept.log_prob = flow_grpo.evaluate_step(model, trajectory, k, *texts).log_prob
    return trajectory, texts


def rewards_of(judge, scorer, images, rows):
    """[N] of N pictures: the judge's nearness to the target and PickScore, as in train_gen.py."""
    seen = torch.tensor([said.va for said in feedback.judge_images(judge, images, strict=True)])
    targets = torch.tensor([(row.v, row.a) for row in rows])
    emotion = (1 - (seen - targets).abs().sum(dim=1) / 16).nan_to_num(0.0)
    return emotion + clip.pick_score(scorer, images, [row.neutral for row in rows]) / 26


def update(model, trajectory, texts, advantages, picture_steps):
    """Add the gradients of a batch of kept steps; returns its part of the loss."""
    total = 0.0
    for k, kept in enumerate(trajectory.steps):
        kept_step = (model, trajectory, k, *texts)
        with torch.no_grad(), lora.lora_disabled(model):
            reference = flow_grpo.kept_velocity(*kept_step)
        step = flow_grpo.evaluate_step(*kept_step, reference)
        loss, _ = flow_grpo.flow_grpo_loss(
            step.log_prob, kept.log_prob, advantages, step.kl, beta=BETA, normalizer=picture_steps)
        # all noise levels have a say, as with train_gen.py's --step-weights noise
        dt = trajectory.sigmas[kept.index] - trajectory.sigmas[kept.index + 1]
        loss = loss * step.sigma_t / math.sqrt(dt) / trajectory.settings.noise_level
        loss.backward()
        total += float(loss.detach())
    return total


def train(args):
    # 1. rows and models
    rows = data.load_rows(args.data, "train")
    generator = load_generator(TINY)
    generator.encoders = PromptCache(generator.encoders, generator.dtype)
    model = generator.mmdit
    judge = scorer = None
    if args.rewarded:
        judge = judge_of(load_judge(TINY / "judge", "cpu", SIZE), progress=False)
        scorer = clip.load_pickscore(TINY / "clip", "cpu")
    torch.manual_seed(args.seed)
    lora.add_lora(model, model.lora_targets(), RANK, ALPHA)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=args.lr, weight_decay=1e-4)
    ema = EMA(trained, 0.97)
    bar = tqdm(range(args.steps), "imitation")
    for step in bar:
        # two of the first four steps are stochastic and trained, at another place in every step
        start = random.Random(f"window {args.seed} {step}").randint(0, 2)
        window = range(start, start + 2)
        settings = flow_grpo.SDESettings(
            6, GUIDANCE, generator.shift, args.noise_level, stochastic=window, trained=window)
        # 2. pictures: guided ones and, to compare with, the policy's own
        own = [rows[i] for i in batch_indices(step, PROMPTS, len(rows), args.seed)]
        own = [row for row in own for _ in range(args.group // 2)]
        prompts = [row.prompt("numbers") for row in own]
        guides = [row.prompt("emotional") for row in own]
        seeds = [noise_seed(args.seed, step, i) for i in range(2 * len(own))]
        batches = [draw(generator, prompts, guides, seeds[:len(own)], settings)]
        if args.rewarded:
            batches.append(draw(generator, prompts, prompts, seeds[len(own):], settings))
        # 3. advantages: 1, or by rewards within the group of guided and other pictures
        advantages = [torch.ones(len(own))]
        if args.rewarded:
            rewards = [rewards_of(judge, scorer, to_images(generator.decode(each.latents)), own)
                       for each, _ in batches]  # of the guided, of the others: [P·G/2] each
            groups = torch.stack([each.view(PROMPTS, -1) for each in rewards], dim=1).flatten(1)
            compared = grpo.group_advantages(groups).view(PROMPTS, 2, -1)  # [P,2,G/2]
            advantages = [compared[:, 0].flatten().clamp(min=0), compared[:, 1].flatten()]
        # 4. update
        optimizer.param_groups[0]["lr"] = linear(args.lr, args.lr / 10, step, args.steps)
        optimizer.zero_grad(set_to_none=True)
        picture_steps = sum(map(len, advantages)) * len(settings.trained)
        loss = sum(update(model, *batch, values, picture_steps)
                   for batch, values in zip(batches, advantages, strict=True))
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        ema.add(step)
        bar.set_postfix(loss=f"{loss:.4f}")
    with ema:
        lora.save_lora(args.out / "adapter", model, generator.name)
    print(args.out / "adapter")


def main(argv=None):
    parser = cli.parser(__doc__)
    add = parser.add_argument
    add("--data", type=Path, default=Path("tiny/cache/dataset"), help="(default: %(default)s)")
    add("--out", type=Path, required=True, help="folder of the run")
    add("--rewarded", action="store_true", help="half of a group guided, and scored by the judge")
    add("--group", type=cli.integer(2, 64), default=8, help="pictures (default: %(default)s)")
    add("--steps", type=cli.integer(1, 10**6), default=40, help="(default: %(default)s)")
    add("--noise-level", type=cli.number(1e-6, 100), default=0.7, help="(default: %(default)s)")
    add("--lr", type=cli.number(0, 1), default=1.5e-3, help="(default: %(default)s)")
    add("--seed", type=cli.integer(0, 2**31), default=0, help="(default: %(default)s)")
    args = parser.parse_args(argv)
    return cli.run_program(lambda: train(args))


if __name__ == "__main__":
    sys.exit(main())
