"""Train the generator by Flow-GRPO on the judge's scores (EmoFeedback², section 3.2).

    python train_gen.py --data tiny/cache/dataset --out runs/gen           # the miniature, on a CPU
    torchrun --nproc-per-node 8 train_gen.py --preset paper --data DATASET --out runs/gen

A step draws G pictures for each of P prompts. The judge reads valence and arousal in them,
PickScore compares them with the neutral prompt, and each picture is compared with its group; the
sampler's steps towards the better ones then become likelier. What is trained is an adapter (LoRA);
the reference of the KL term is the same network without it. The miniature has an analytic meter of
valence and arousal. It is never a reward: its errors are logged beside the judge's, so that one
sees a generator that pleases only the judge.

In order: settings, rollout, update, evaluation, the loop (`train`). A run started again goes on
after its last checkpoint. Of the P·G pictures of a step n lie on this process, N in one batch.
"""

import math
import random
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from tqdm import tqdm

import data
import feedback
import flow_grpo
import grpo
import qwen_vl
from evaluation.metrics import spearman
from parts import checkpoints, cli, clip, lora, pipeline, weights
from parts import run as training
from parts.cli import UserError, integer, number
from parts.pipeline import PAPER, TINY, Generator, PromptCache, load_generator, seeded, to_images

REWARDS = {"emotion": 1.0, "pickscore": 1.0}  # and their weights
SETTINGS = {  # flag: (paper's value, the miniature's, type, help)
    "model": (PAPER, str(TINY), str, "folder or hub id of the generator"),
    "judge": ("Qwen/Qwen2.5-VL-7B-Instruct", str(TINY / "judge"), str, "of the judge, or none"),
    "pickscore": ("yuvalkirstain/PickScore_v1", str(TINY / "clip"), str, "of PickScore, or none"),
    "reward_weights": (REWARDS, REWARDS, cli.weights_of(REWARDS), "e.g. emotion=1,pickscore=0.5"),
    "form": (("numbers",), ("numbers", "numbers", "words"), cli.some_of(data.FORMS),
             f"the target in a prompt: {', '.join(data.FORMS)}; of several one is drawn"),
    "group": (8, 4, integer(2, 1024), "[--num-generations] pictures of each prompt, G"),
    "guided_pictures": (0, 2, integer(0, 1024), "of these, drawn with the row's emotional prompt"),
    "batch": (16, 16, integer(1, 4096), "prompts in a step, over all processes, P"),
    "steps": (1000, 36, integer(1, 10**7), cli.STEPS_HELP),
    "sde_steps": (10, 6, integer(1, 1000), "steps of the stochastic sampler, T"),
    "window": (0, 2, integer(0, 1000), "so many of the T steps are stochastic and trained; 0: all"),
    "window_within": (0, 4, integer(0, 1000), "and lie within the first so many; 0: anywhere"),
    "step_weights": ("equal", "noise", ("equal", "noise"), "noise: all noise levels have a say"),
    "noise_level": (0.7, 0.1, number(1e-6, 100), "of the stochastic sampler"),
    "sample_steps": (25, 25, integer(1, 1000), "[--num-inference-steps] of evaluations' sampler"),
    "guidance": (4.5, 4.5, number(0, 100), "[--guidance-scale] classifier-free guidance"),
    "size": (512, 128, cli.picture_side, "side of the pictures in pixels"),
    "lr": (3e-4, 1.5e-3, number(0, 1), "[--learning-rate] learning rate at the start"),
    "lr_end": (3e-4, 1e-4, number(0, 1), "and at the end, linear in between"),
    "beta": (0.1, 0.1, number(0, 1000), "weight of the KL to the model without the adapter"),
    "clip": (1e-4, 1e-4, number(0, 1), "range of the ratio"),
    "max_grad_norm": (1.0, 1.0, number(0, 1e9), "the gradient is scaled down to this norm"),
    "lora_rank": (32, 32, integer(1, 4096), "of the adapter"),
    "lora_alpha": (64.0, 64.0, number(0, 1e6), "scale of the adapter"),
    "init_adapter": ("none", "none", str, "adapter to start from, or a run that has one, or none"),
    "ema": (0.9, 0.97, number(0, 1), "decay of the averaged adapter, which is written in the end"),
    "micro": (8, 64, integer(1, 4096), "pictures in one forward and backward pass of a process"),
    "encoders": ("gpu", "gpu", ("gpu", "cpu", "leave"),
                 "where the text encoders live; leave: encode all prompts first, then free them"),
    "eval_every": (60, 4, integer(0, 10**9), "steps between evaluations; 0: only in the end"),
    "eval_rows": (200, 64, integer(2, 10**9), "held-out prompts in an evaluation"),
    "save_every": (50, 4, integer(1, 10**9), "steps between checkpoints"),
    "save_minutes": (20.0, 0.0, number(0, 1e6), "and minutes, whichever ends first; 0: no limit"),
    "seed": (0, 0, integer(0, 2**31), "of the prompts' order and of all noise"),
}
ERRORS = ("judge_v_error", "judge_a_error", "meter_v_error", "meter_a_error")
CURVES = ("reward", "reward_emotion", "reward_pickscore", *ERRORS, "reward_std", "zero_spread",
          "kl", "clip_fraction", "grad_norm", *(f"eval_{name}" for name in ERRORS))

# --------------------------------------------------------------------------------------------------
# Rollout: pictures of prompts, and their rewards


@dataclass
class Models:
    generator: Generator
    judge: qwen_vl.QwenVL | None
    scorer: clip.CLIP | None  # PickScore
    meter: object | None  # the miniature's function: image -> (v, a)
    side_stream: torch.cuda.Stream | None  # of a GPU, for judging beside the drawing


@dataclass(frozen=True)
class Sample:
    """One picture to draw."""
    seed: int  # of all its noise
    row: data.Row
    prompt: str  # that the model is trained to follow
    drawn: str  # that the picture is drawn with
    guided: bool  # whether the two differ


@dataclass
class Chunk:
    """Pictures that are drawn, and later trained on, in one batch."""
    indices: list[int]  # among this process's n samples
    trajectory: flow_grpo.Trajectory
    texts: tuple  # (context, pooled) of the prompts that the model is trained to follow


def samples_of(step, rows, args):
    """The P·G Samples of a step, group by group; every epoch is its own permutation of the rows.

    A seed depends on the step, the prompt's number p and the picture's index g in its group only,
    so it does not matter which process draws the picture.
    """
    samples = []
    for p, i in enumerate(training.batch_indices(step, args.batch, len(rows), args.seed)):
        form = random.Random(f"form {args.seed} {step} {p}").choice(args.form)
        prompt = rows[i].prompt(form)
        for g in range(args.group):
            seed = ((args.seed * 1_000_003 + step) * 4096 + p) * 1024 + g
            seed %= 2**64  # torch takes no more, and a --seed above 4 million goes beyond
            drawn = rows[i].prompt("emotional") if g < args.guided_pictures else prompt
            samples.append(Sample(seed, rows[i], prompt, drawn, drawn != prompt))
    return samples


@torch.no_grad()
def roll_out(models, samples, args, run, step):
    """(chunks, rewards {part: [n]}) of this process's n samples; fewer if the run is to stop. On a
    GPU the pictures of a chunk are judged while the next chunk is drawn."""
    window = None  # all T steps are stochastic
    if args.window:
        last_start = (args.window_within or args.sde_steps) - args.window
        start = random.Random(f"window {args.seed} {step}").randint(0, last_start)
        window = (start, args.window)
    settings = flow_grpo.SDESettings(
        args.sde_steps, args.guidance, models.generator.shift, args.noise_level, window)
    chunks = []
    scored = []
    pool = ThreadPoolExecutor(
        1, initializer=training.enter_stream, initargs=(models.side_stream,))
    with pool:
        for indices in run.until_asked(chunks_of(samples, args.micro)):
            own = [samples[i] for i in indices]
            chunk = Chunk(indices, *draw(models.generator, own, args.size, settings))
            chunks.append(chunk)
            images = to_images(models.generator.decode(chunk.trajectory.latents))
            rows = [sample.row for sample in own]
            scored.append(pool.submit(rewards_of, images, rows, models, args.reward_weights))
            if models.side_stream is None:
                scored[-1].result()
    # the rewards lie chunk by chunk; bring them back into the order of the samples
    parts = [each.result() for each in scored]
    order = torch.tensor([i for chunk in chunks for i in chunk.indices]).argsort()
    return chunks, {name: torch.cat([part[name] for part in parts])[order] for name in parts[0]}


def chunks_of(samples, micro):
    """[[index of a sample]] with at most `micro` in each; guided ones lie apart from the others."""
    chunks = []
    for guided in (True, False):
        indices = [i for i, sample in enumerate(samples) if sample.guided == guided]
        chunks += [indices[start:start + micro] for start in range(0, len(indices), micro)]
    return chunks


def draw(generator, samples, size, settings):
    """(Trajectory, (context, pooled)) of samples in one batch: all of them guided, or none.

    Guided pictures are drawn from their emotional prompts by the model without its adapter, so that
    what guides does not move with what is trained. Their steps then count with the probability that
    the model to be trained, given its own prompt, has of taking them.
    """
    model = generator.mmdit
    texts = generator.encode_prompts([s.prompt for s in samples], settings.guidance)
    # the noise of a picture's start and that of its steps come from one random generator, its own
    noises = seeded(sample.seed for sample in samples)
    start = generator.starting_noise(noises, size).to(generator.device)  # [N,C,h,w]
    if not samples[0].guided:
        return flow_grpo.sample_sde(model, start, *texts, settings, noises), texts
    emotional = generator.encode_prompts([s.drawn for s in samples], settings.guidance)
    with lora.lora_disabled(model):
        trajectory = flow_grpo.sample_sde(model, start, *emotional, settings, noises)
    for k, kept in enumerate(trajectory.steps):
        kept.log_prob = flow_grpo.evaluate_step(model, trajectory, k, *texts).log_prob
    return trajectory, texts


@torch.no_grad()  # no_grad holds for one thread only, and this runs in a second one
def rewards_of(images, rows, models, reward_weights):
    """{part: [N] float64} of N PIL images and the rows they were drawn for.

    emotion, pickscore and their weighted sum, total, are the rewards. The rest is only watched:
    |ΔV| and |ΔA| by judge and meter and the gap between these two, NaN for unreadable answers.
    """
    targets = torch.tensor([(row.v, row.a) for row in rows], dtype=torch.float64)  # [N,2]
    parts = {}
    readings = {}  # {reader: V̂, Â [N,2]}
    if models.judge is not None:
        judge = pipeline.judge_of(models.judge, 64, progress=False)
        # Read as strictly as in the judge's training. The paper gives no formula; ours is
        # 1 − (|V̂ − V| + |Â − A|)/16, from 0 to 1, and 0 for an answer that cannot be read.
        seen = feedback.judge_images(judge, images, strict=True)
        readings["judge"] = torch.tensor([each.va for each in seen], dtype=torch.float64)
        distance = (readings["judge"] - targets).abs().sum(dim=1)
        parts["emotion"] = (1 - distance / 16).nan_to_num(0.0)
    if models.scorer is not None:
        scores = clip.pick_score(models.scorer, images, [row.neutral for row in rows])
        parts["pickscore"] = (scores / 26).double().cpu()  # as in Flow-GRPO: about 0..1
    if models.meter is not None:
        measured = [models.meter(image) for image in images]
        readings["meter"] = torch.tensor(measured, dtype=torch.float64)
    parts["total"] = sum(weight * parts[name] for name, weight in reward_weights.items())
    for reader, pairs in readings.items():
        parts[f"{reader}_v_error"], parts[f"{reader}_a_error"] = (pairs - targets).abs().T
    if len(readings) == 2:
        parts["gap"] = (readings["judge"] - readings["meter"]).abs().sum(dim=1)
    return parts


# --------------------------------------------------------------------------------------------------
# Update and evaluation


def update(model, chunks, advantages, optimizer, args, processes, check):
    """One step of the optimizer by the gradients of all stochastic steps of all chunks.

    advantages [n]. check: raise UserError unless the ratio is 1, as before the first update.
    Returns ({metric: sum over this process's picture-steps}, greatest |ratio − 1|, gradient norm).
    """
    trained = optimizer.param_groups[0]["params"]
    picture_steps = len(advantages) * len(chunks[0].trajectory.steps)
    sums = dict.fromkeys(("loss", "ratio", "clip_fraction", "kl"), 0.0)
    deviations = []
    optimizer.zero_grad(set_to_none=True)
    for chunk in chunks:
        for k, kept in enumerate(chunk.trajectory.steps):
            # 1. the kept step under the model as it is now, and under the reference for the KL
            kept_step = (model, chunk.trajectory, k, *chunk.texts)
            reference = None
            if args.beta:
                with torch.no_grad(), lora.lora_disabled(model):
                    reference = flow_grpo.kept_velocity(*kept_step)
            step = flow_grpo.evaluate_step(*kept_step, reference)
            # 2. its part of the loss (equation 2); the parts add up to the mean over all steps
            loss, metrics = flow_grpo.flow_grpo_loss(
                step.log_prob, kept.log_prob, advantages[chunk.indices], step.kl, args.clip,
                args.beta, normalizer=picture_steps)
            loss = loss * step_weight(step, chunk.trajectory, kept.index, args.step_weights)
            loss.backward()
            # 3. metrics, still as tensors: reading a number would wait for the GPU
            sums["loss"] += loss.detach().double()
            for name in metrics.keys() & sums.keys():
                sums[name] += metrics[name].double() * len(kept.log_prob)
            deviations.append(metrics["ratio_max_deviation"])
    # 4. drawing and this loop share their arithmetic, on a CPU to the last bit
    deviation = float(torch.stack(deviations).max())
    if check and not deviation <= (0 if advantages.device.type == "cpu" else args.clip / 10):
        raise UserError(f"before the first update the ratio is off by {deviation:.2g}; is the "
                        f"adapter on only in drawing, or only here, or the batch another?")
    # 5. step of the optimizer
    processes.average_gradients(trained)
    norm = float(torch.nn.utils.clip_grad_norm_(trained, args.max_grad_norm))
    optimizer.step()
    sums = {name: float(value) for name, value in sums.items()}
    return sums | {"picture_steps": picture_steps}, deviation, norm


def step_weight(step, trajectory, index, kind):
    """Weight of a trained step's loss.

    The gradient of a log-probability by the velocity goes with √−dt/σ_t, which is far larger at the
    end of a trajectory than at its start, where a picture's mood is settled. "noise" takes that
    factor away, in units of the noise level.
    """
    if kind == "equal":
        return 1.0
    dt = float(trajectory.sigmas[index + 1] - trajectory.sigmas[index])
    return step.sigma_t / math.sqrt(-dt) / trajectory.settings.noise_level


@torch.no_grad()
def evaluate(models, rows, args, run, step):
    """{eval_…: figure} of a picture for each held-out row, from seeds of their own, by the
    deterministic sampler: means of rewards and errors, rank correlations of meter and target.
    Empty if the run is to stop."""
    generator = models.generator
    processes = run.processes
    mine = list(range(processes.rank, len(rows), processes.world))
    starts = range(0, len(mine), args.micro)
    records = []
    bar = tqdm(starts, desc="evaluation", leave=False, disable=not processes.first)
    for start in run.until_asked(bar):
        indices = mine[start:start + args.micro]
        own = [rows[i] for i in indices]
        texts = generator.encode_prompts([row.prompt(args.form[0]) for row in own], args.guidance)
        noise = generator.starting_noise(seeded(10_000 + i for i in indices), args.size)
        latents = flow_grpo.sample_ode(generator.mmdit, noise.to(generator.device), *texts,
                                       args.sample_steps, args.guidance, generator.shift)
        images = to_images(generator.decode(latents))
        parts = rewards_of(images, own, models, args.reward_weights)
        for i, image, *values in zip(indices, images, *parts.values()):
            figures = dict(zip(parts, map(float, values)))
            measured = models.meter(image) if models.meter else None
            records.append((i, figures, measured, image.resize((128, 128)) if i < 6 else None))
    if run.stopped():
        return {}
    records = sorted(processes.gather(records), key=lambda record: record[0])
    run.save_pictures(step, [small for *_, small in records[:6]])
    means = {name: np.nanmean([record[1][name] for record in records]) for name in records[0][1]}
    if models.meter:
        for axis, name in enumerate(("v", "a")):
            measured = [record[2][axis] for record in records]
            targets = [getattr(row, name) for row in rows]
            means[f"meter_{name}_spearman"] = spearman(targets, measured)
    return {f"eval_{name}": float(mean) for name, mean in means.items()}


# --------------------------------------------------------------------------------------------------
# The loop


def train(args, processes):
    """Train the adapter, from the last checkpoint on if there is one. Returns the exit code."""
    # rows, the run's folder, models with a new adapter
    rows = data.load_rows(args.data, "train")
    held_out = data.load_rows(args.data, "test")[:args.eval_rows]
    run = training.Run(args.out, vars(args), processes, CURVES, f"{args.model}, Flow-GRPO")
    models = load_models(args, processes.device)
    model = models.generator.mmdit
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=args.lr, weight_decay=1e-4)
    ema = training.EMA(trained, args.ema)
    done = run.load(checkpoints.state_of(optimizer, ema), args.steps)
    if processes.first:
        cli.say(f"{args.model}: {training.sizes(model, processes)}; {len(rows):,} prompts, "
                f"{args.steps:,} steps of {args.batch} × {args.group} pictures")
    if args.encoders == "leave":
        needed = prompts_needed(done, rows, held_out, args, processes)
        models.generator.encoders.encode_and_free(needed, progress=processes.first)
    record = run.read_log(done)
    # a new run, or one that was stopped in an evaluation
    if training.evaluation_due(done, args) and not training.figures_of(record):
        with ema:
            run.log(record | evaluate(models, held_out, args, run, done))
        run.save_adapter(model, models.generator.name, ema)

    start = done
    bar = training.steps_bar("Flow-GRPO", start, args.steps, processes)
    with run:
        for step in bar:
            timer = training.Timer()
            # 1. prompts
            samples = processes.share(samples_of(step, rows, args))
            # 2. rollout: pictures and rewards; a group may lie on two processes
            chunks, own = roll_out(models, samples, args, run, step)
            if run.stopped():
                break  # what there is of this step is dropped
            rewards = {name: torch.tensor(processes.gather(values.tolist())).view(-1, args.group)
                       for name, values in own.items()}  # [P,G]
            seconds_rollout = timer.lap()
            # 3. advantages (equation 1): each picture against its group
            advantages = grpo.group_advantages(rewards["total"]).flatten().float()  # [P·G]
            advantages = processes.share(advantages.to(processes.device))  # [n]
            advantages = grpo.clamp_guided(advantages, [sample.guided for sample in samples])
            # 4. update
            lr = training.linear(args.lr, args.lr_end, step, args.steps)
            optimizer.param_groups[0]["lr"] = lr
            updated = update(model, chunks, advantages, optimizer, args, processes, step == start)
            # 5. average the adapter
            ema.add(step)
            done = step + 1
            # 6. log
            record = {"step": done, **summary(rewards, *updated, processes), "lr": lr,
                      "seconds_rollout": seconds_rollout, "seconds_update": timer.lap(),
                      "memory_gib": training.peak_memory(processes.device)}
            bar.set_postfix({name: f"{record[name]:.3f}" for name in ("reward", "kl")})
            # 7. evaluate the averaged adapter, which is the one that is written in the end
            if training.evaluation_due(done, args):
                with ema:
                    record |= evaluate(models, held_out, args, run, done)
            run.log(record)
            # 8. save
            due = run.save_due(done, args)
            if due or training.figures_of(record):
                run.save_adapter(model, models.generator.name, ema)
            if due:
                run.save(done, checkpoints.state_of(optimizer, ema))
            if run.stopped():
                break
        if done > run.saved:
            run.save_adapter(model, models.generator.name, ema)
            run.save(done, checkpoints.state_of(optimizer, ema))
    bar.close()
    if not training.figures_of(run.records[-1]) or done < args.steps:
        return run.stop_code(done)

    if processes.first:
        with ema:
            lora.save_lora(args.out / "adapter", model, models.generator.name)
        print(run.evaluations())
        gaps = [record["eval_gap"] for record in run.records if record.get("eval_gap")]
        if gaps and gaps[-1] > 1.25 * gaps[0]:
            print(f"\nThe gap between judge and meter grew from {gaps[0]:.2f} to {gaps[-1]:.2f}: "
                  f"part of the reward may be the judge's mistakes.")
        print(args.out / "adapter")
    processes.wait()
    return 0


def load_models(args, device):
    """Models, with a new adapter in the generator."""
    judge = None if args.judge == "none" else qwen_vl.QwenVL.from_pretrained(args.judge, device)
    scorer = meter = None
    if args.pickscore != "none":
        scorer = clip.load_pickscore(args.pickscore, device)
    if args.preset == "tiny":
        from tiny.scenes import measure_va as meter
    generator = load_generator(args.model, device, use_t5=not args.no_t5,
                               encoders_device="cpu" if args.encoders == "cpu" else None)
    generator.encoders = PromptCache(generator.encoders, generator.dtype)
    generator.mmdit.checkpointing = args.checkpointing
    torch.manual_seed(args.seed)
    lora.add_lora(generator.mmdit, generator.mmdit.lora_targets(), args.lora_rank, args.lora_alpha)
    if args.init_adapter != "none":
        lora.fill_lora(weights.find(lora.adapter_in(args.init_adapter)), generator.mmdit)
    side_stream = torch.cuda.Stream(device) if device.type == "cuda" else None
    return Models(generator, judge, scorer, meter, side_stream)


def prompts_needed(start, rows, held_out, args, processes):
    """The prompts that this process needs from step `start` on, evaluations included, each once."""
    needed = [""]
    for step in range(start, args.steps):
        for sample in processes.share(samples_of(step, rows, args)):
            needed += [sample.prompt, sample.drawn]
    own = held_out[processes.rank::processes.world]
    return list(dict.fromkeys(needed + [row.prompt(args.form[0]) for row in own]))


def summary(rewards, sums, deviation, norm, processes):
    """The log's figures of a step. rewards {part: [P,G]}; sums, deviation: of this process."""
    names = {"total": "reward", "emotion": "reward_emotion", "pickscore": "reward_pickscore"}
    means = {names.get(name, name): float(part.nanmean()) for name, part in rewards.items()}
    if "judge_v_error" in rewards:
        means["unreadable"] = float(rewards["judge_v_error"].isnan().double().mean())
    spread = rewards["total"].std(dim=1)
    n = processes.total(sums)
    return {"loss": n["loss"] / processes.world, **means, "reward_std": float(spread.mean()),
            "zero_spread": float((spread < 1e-6).double().mean()),  # groups without advantages
            **{name: n[name] / n["picture_steps"] for name in ("ratio", "clip_fraction", "kl")},
            "ratio_max_deviation": max(processes.gather([deviation])), "grad_norm": norm}


def parse_args(argv=None):
    parser = cli.training_parser(__doc__, SETTINGS, "runs/gen")
    parser.add_argument("--no-t5", action="store_true", help="leave T5 out")
    args = cli.parse_settings(parser, SETTINGS, argv)
    limits = {"guided_pictures": args.group, "window_within": args.sde_steps,
              "window": args.window_within or args.sde_steps}
    for name, most in limits.items():
        if getattr(args, name) > most:
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)}: at most {most}")
    for name, flag in (("emotion", "judge"), ("pickscore", "pickscore")):
        if name in args.reward_weights and getattr(args, flag) == "none":
            parser.error(f"--{flag} none, but --reward-weights has {name}: leave it out there")
    return args


def main(argv=None):
    return training.run_in_processes(train, parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
