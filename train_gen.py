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

if __name__ == "__main__":  # before torch, whose import takes seconds: Ctrl-C ends in one line
    from parts import interrupts
    interrupts.catch()

import math
import random
import sys
from dataclasses import dataclass

import torch
from tqdm import tqdm

import data
import feedback
import flow_grpo
import grpo
from evaluation.metrics import mean, spearman
from parts import checkpoints, cli, clip, hub, lora, own_reward, pipeline, presets, scorers, weights
from parts import run as training
from parts.cli import UserError, integer, number
from parts.pipeline import PAPER, TINY, Generator, PromptCache, load_generator, seeded, to_images

REWARDS = {"emotion": 1.0, "pickscore": 1.0}  # and their weights
# What a weight may be given to; the miniature's meter as a reward is the ceiling of all judges.
PARTS = (*REWARDS, "own", "meter", *scorers.SCORERS)
SETTINGS = {  # flag: (paper's value, the miniature's, type, help)
    "model": (PAPER, str(TINY), str, "folder or hub id of the generator"),
    "judge": ("Qwen/Qwen2.5-VL-7B-Instruct", str(TINY / "judge"), str, "or http://…/v1, or none"),
    "pickscore": ("yuvalkirstain/PickScore_v1", str(TINY / "clip"), str, "of PickScore, or none"),
    "reward_weights": (REWARDS, REWARDS, cli.weights_of(PARTS), "e.g. emotion=1,meter=0.5"),
    "questions": (None, None, feedback.QUESTIONS, "JSON file with other questions to the judge"),
    "readings": (1, 8, cli.readings, "mean of so many answers, or logits, or thought"),
    "form": (("numbers",), ("numbers",), cli.some_of(data.FORMS),
             f"the target in a prompt: {', '.join(data.FORMS)}; of several one is drawn"),
    "group": (8, 4, integer(2, 1024), "[--num-generations] pictures of each prompt, G"),
    "batch": (16, 16, integer(1, 4096), "prompts in a step, over all processes, P"),
    "steps": (1000, 100, integer(1, 10**7), cli.STEPS_HELP),
    "sde_steps": (10, 6, integer(1, 1000), "steps of the stochastic sampler, T"),
    "skip_last": (1, 1, integer(0, 999), "of the T steps so many at the end are not trained"),
    "window": (0, 4, integer(0, 1000), "so many steps are stochastic and trained; 0: all"),
    "window_within": (0, 4, integer(0, 1000), "and lie within the first so many; 0: anywhere"),
    "step_weights": ("equal", "noise", ("equal", "noise"), "of flow-grpo; noise: all levels count"),
    "group_start": ("own", "shared", ("own", "shared"),
                    "shared: a group is one picture up to the window"),
    "loss": ("flow-grpo", "difference", ("flow-grpo", "difference"),
             "the other: towards where a group gets better"),
    "noise_level": (0.7, 0.7, number(1e-6, 100), "scale of the noise a stochastic step adds"),
    "sample_steps": (25, 25, integer(1, 1000), "[--num-inference-steps] of evaluations' sampler"),
    "guidance": (4.5, 4.5, number(0, 100), "[--guidance-scale] classifier-free guidance"),
    "guidance_gradient": ("conditional", "conditional", ("conditional", "both"),
                          "halves of guidance that are differentiated"),
    "size": (512, 128, cli.picture_side, "side of the pictures in pixels"),
    "lr": (3e-4, 2e-3, number(0, 1), "[--learning-rate] learning rate at the start"),
    "lr_end": (3e-4, 2e-4, number(0, 1), "and at the end, linear in between"),
    "beta": (0.1, 2e-3, number(0, 1000), "weight of the KL to the base model"),
    "clip": (1e-4, 1e-4, number(0, 1), "range of the ratio, of flow-grpo"),
    "advantage_std": ("group", "global", ("group", "global"), "std that advantages are divided by"),
    "updates": (1, 1, integer(1, 100), "updates in a step, each by a share of its pictures"),
    "max_grad_norm": (1.0, 1.0, number(0, 1e9), "the gradient is scaled down to this norm"),
    "mismatch": (1e-2, 1e-2, number(0, 1e9), "most that a GPU's first ratio may be off by"),
    "lora_rank": (32, 32, integer(1, 4096), "of the adapter"),
    "lora_alpha": (64.0, 64.0, number(0, 1e6), "scale of the adapter"),
    "init_adapter": ("none", "none", str, "adapter to start from, or a run that has one, or none"),
    "ema": (0.9, 0.9, number(0, 1), "decay of the averaged adapter, which is written"),
    "ema_every": (1, 1, integer(1, 10**6), "steps between additions to the average"),
    "micro": (8, 64, integer(1, 4096), "pictures in one pass of a process"),
    "encoders": ("gpu", "gpu", pipeline.ENCODERS, pipeline.ENCODERS_HELP),
    "eval_every": (60, 10, integer(0, 10**9), "steps between evaluations; 0: only in the end"),
    "eval_rows": (200, 64, integer(2, 10**9), "held-out prompts in an evaluation"),
    "save_every": (50, 4, integer(1, 10**9), "steps between checkpoints"),
    "save_minutes": (20.0, 0.0, number(0, 1e6), "and minutes, whichever ends first; 0: no limit"),
    "seed": (0, 0, integer(0, 2**31), "of the prompts' order and of all noise"),
}
GROUPS = {  # of --help: first setting, title
    "model": "models and rewards", "form": "rollout", "lr": "update",
    "micro": "memory, evaluation, checkpoints"}
RARE = ("tensorboard", "questions", "clip", "skip_last", "window", "window_within", "step_weights",
        "group_start", "guidance_gradient", "advantage_std", "updates", "max_grad_norm", "mismatch",
        "lora_alpha", "init_adapter", "lr_end", "ema", "ema_every", "eval_rows",
        "save_every", "save_minutes")
ERRORS = ("judge_v_error", "judge_a_error", "meter_v_error", "meter_a_error")
CURVES = ("reward", *(f"reward_{name}" for name in PARTS), *ERRORS, "unreadable", "reward_std",
          "zero_spread", "kl", "clip_fraction", "grad_norm", *(f"eval_{name}" for name in ERRORS))

# --------------------------------------------------------------------------------------------------
# Rollout: pictures of prompts, and their rewards


@dataclass
class Models:
    generator: Generator
    judge: object | None  # of pipeline.load_judge
    scorer: clip.CLIP | None  # PickScore
    meter: object | None  # the miniature's function: image -> (v, a)
    examiner: object | None  # the miniature's, of content: does a picture show its subject?
    own: object | None = None  # the function of --reward
    others: list | tuple = ()  # (name, score) of scorers.load


@dataclass(frozen=True)
class Sample:
    """One picture to draw."""
    seed: int  # of all its noise
    row: data.Row
    prompt: str


@dataclass
class Chunk:
    """Pictures that are drawn, and later trained on, in one batch."""
    indices: list[int]  # among this process's n samples
    trajectory: flow_grpo.Trajectory
    texts: tuple  # (context, pooled) of the prompts


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
            samples.append(Sample(training.noise_seed(args.seed, step, p, g), rows[i], prompt))
    return samples


@torch.no_grad()
def roll_out(models, samples, args, run, step):
    """(chunks, rewards {part: [n]}) of this process's n samples; (chunks, {}) if the run is to
    stop."""
    settings = sde_settings(args, models.generator.shift, step)
    chunks = []
    images = [None] * len(samples)
    bar = tqdm(chunks_of(samples, args), "pictures", leave=False, delay=2,
               disable=not run.processes.first)
    for indices in run.until_asked(bar):
        drawn = [samples[i] for i in indices]
        chunk = Chunk(indices, *draw(models.generator, drawn, args.size, settings))
        chunks.append(chunk)
        pictures = to_images(models.generator.decode(chunk.trajectory.latents))
        for i, image in zip(indices, pictures, strict=True):
            images[i] = image
    if None in images:
        return chunks, {}
    rows = [sample.row for sample in samples]
    return chunks, rewards_of(images, rows, models, args.reward_weights, args.readings)


def sde_settings(args, shift, step):
    """How step `step` draws: all T steps are stochastic and all but the last trained, or a window
    of them, at another place in every step."""
    stochastic = range(args.sde_steps)
    trained = range(args.sde_steps - args.skip_last)
    if args.window:
        last_start = (args.window_within or len(trained)) - args.window
        start = random.Random(f"window {args.seed} {step}").randint(0, last_start)
        stochastic = trained = range(start, start + args.window)
    return flow_grpo.SDESettings(args.sde_steps, args.guidance, shift, args.noise_level, stochastic,
                                 trained, args.guidance_gradient == "conditional",
                                 branch_of(args))


def branch_of(args):
    """Pictures in turn, of one group and update, that share a start; 1: each has its own."""
    return args.group // args.updates if args.group_start == "shared" else 1


def chunks_of(samples, args):
    """[[index of a sample]]: at most args.micro in each, and all of one update."""
    chunks = []
    for turn in range(args.updates):
        indices = list(range(turn, len(samples), args.updates))
        starts = range(0, len(indices), args.micro)
        chunks += [indices[start:start + args.micro] for start in starts]
    return chunks


def draw(generator, samples, size, settings):
    """(Trajectory, (context, pooled)) of samples in one batch."""
    texts = generator.encode_prompts([sample.prompt for sample in samples], settings.guidance)
    # the noise of a picture's start and that of its steps come from one random generator, its own
    noises = seeded(sample.seed for sample in samples)
    start = generator.starting_noise(noises, size).to(generator.device)  # [N,C,h,w]
    return flow_grpo.sample_sde(generator.mmdit, start, *texts, settings, noises), texts


def rewards_of(images, rows, models, reward_weights, readings):
    """{part: [N] float64} of N PIL images and the rows they were drawn for.

    The rewards are PARTS and their weighted sum, total. The rest is only watched: |ΔV| and |ΔA| by
    judge and meter, the gap between these two, NaN for unreadable answers, and content.
    """
    targets = torch.tensor([(row.v, row.a) for row in rows], dtype=torch.float64)  # [N,2]
    parts = {}
    read = {}  # {reader: V̂, Â [N,2]}
    if models.judge is not None:
        judge = pipeline.judge_of(models.judge, progress=False)
        # read as strictly as in the judge's training
        seen = feedback.judge_images(judge, images, readings, strict=True)
        read["judge"] = torch.tensor([each.va for each in seen], dtype=torch.float64)
        parts["emotion"] = nearness(read["judge"], targets)
    if models.scorer is not None:
        scores = clip.pick_score(models.scorer, images, [row.neutral for row in rows])
        parts["pickscore"] = (scores / 26).double().cpu()  # as in Flow-GRPO: about 0..1
    if models.own is not None:
        parts["own"] = own_reward.rewards(models.own, images, rows)
    for name, score in models.others:
        parts[name] = score(images, [row.neutral for row in rows]).double().cpu()
    if models.meter is not None:
        measured = [models.meter(image) for image in images]
        read["meter"] = torch.tensor(measured, dtype=torch.float64)
        parts["meter"] = nearness(read["meter"], targets)
    if models.examiner is not None:
        parts["content"] = models.examiner.shows(images, [row.neutral for row in rows])
    for name in reward_weights:
        for i in parts[name].isfinite().logical_not().nonzero()[:1, 0].tolist():
            raise UserError(f"the reward {name} of a picture is {float(parts[name][i])}, of row "
                            f"{rows[i].id}, {rows[i].neutral!r}; is its model or the generator's "
                            f"broken?")
    parts["total"] = sum(weight * parts[name] for name, weight in reward_weights.items())
    for reader, pairs in read.items():
        parts[f"{reader}_v_error"], parts[f"{reader}_a_error"] = (pairs - targets).abs().T
    if len(read) == 2:
        parts["gap"] = (read["judge"] - read["meter"]).abs().sum(dim=1)
    return parts


def nearness(read, targets):
    """Emotion reward [N] of readings and targets [N,2]: 1 − (|V̂ − V| + |Â − A|)/16, from 0 to 1,
    and 0 for an answer that cannot be read. The paper gives no formula."""
    return (1 - (read - targets).abs().sum(dim=1) / 16).nan_to_num(0.0)


# --------------------------------------------------------------------------------------------------
# Update and evaluation


def update(model, chunks, advantages, optimizer, args, processes, check):
    """args.updates steps of the optimizer, each by the gradients of all trained steps of its share
    of the chunks.

    advantages [n]. check: see `training.check_ratio`. Returns ({metric: sum over this process's
    picture-steps}, greatest |ratio − 1| before the first update if there is one, mean norm of the
    gradients).
    """
    trained = optimizer.param_groups[0]["params"]
    sums = {"loss": 0.0, "picture_steps": 0}
    deviation = None
    norms = []
    for turn in range(args.updates):
        share = [chunk for chunk in chunks if chunk.indices[0] % args.updates == turn]
        pictures = sum(len(chunk.indices) for chunk in share)
        picture_steps = pictures * len(chunks[0].trajectory.steps)
        sums["picture_steps"] += picture_steps
        deviations = []
        optimizer.zero_grad(set_to_none=True)
        for chunk in share:
            for k in range(len(chunk.trajectory.steps)):
                # 1. a step's part of the loss; the parts add up to the mean over all
                loss, metrics = loss_of_step(model, chunk, k, advantages, args, picture_steps)
                loss.backward()
                # 2. metrics, still as tensors: reading a number would wait for the GPU
                sums["loss"] += loss.detach().double() / args.updates
                if "ratio_max_deviation" in metrics:  # finite differences have no ratio
                    deviations.append(metrics.pop("ratio_max_deviation"))
                for name, value in metrics.items():
                    sums[name] = sums.get(name, 0.0) + value.double() * len(chunk.indices)
        # 3. before the first update the ratio must be 1
        if turn == 0 and deviations:
            deviation = float(torch.stack(deviations).max())
            if check:
                training.check_ratio(deviation, args.mismatch, processes)
        # 4. step of the optimizer
        processes.average_gradients(trained)
        norms.append(float(torch.nn.utils.clip_grad_norm_(trained, args.max_grad_norm)))
        if math.isfinite(norms[-1]):  # else it is skipped, by all processes alike
            optimizer.step()
    sums = {name: float(value) for name, value in sums.items()}
    return sums, deviation, sum(norms) / len(norms)


def loss_of_step(model, chunk, k, advantages, args, picture_steps):
    """(loss, metrics) of the k-th trained step of a chunk; advantages [n] of all pictures."""
    kept_step = (model, chunk.trajectory, k, *chunk.texts)
    chunk_advantages = advantages[chunk.indices]
    reference = None
    if args.beta:  # the velocity of the model without its adapter, for the KL
        with torch.no_grad(), lora.lora_disabled(model):
            reference = flow_grpo.kept_velocity(*kept_step)
    if args.loss == "difference":
        direction = flow_grpo.towards_better(
            chunk.trajectory.latents, chunk_advantages, branch_of(args))
        velocity = flow_grpo.kept_velocity(*kept_step)
        return flow_grpo.difference_loss(velocity, direction, reference, args.beta, picture_steps)
    # the kept step under the model as it is now (equation 2)
    kept = chunk.trajectory.steps[k]
    again = flow_grpo.evaluate_step(*kept_step, reference)
    loss, metrics = flow_grpo.flow_grpo_loss(again.log_prob, kept.log_prob, chunk_advantages,
                                             again.kl, args.clip, args.beta, picture_steps)
    return loss * step_weight(again, chunk.trajectory, kept.index, args.step_weights), metrics


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
    # 1. pictures of this process's share of the rows
    processes = run.processes
    mine = range(processes.rank, len(rows), processes.world)
    images = []
    bar = tqdm(range(0, len(mine), args.micro), "evaluation", leave=False,
               disable=not processes.first)
    for start in run.until_asked(bar):
        indices = mine[start:start + args.micro]
        prompts = [rows[i].prompt(args.form[0]) for i in indices]
        seeds = [10_000 + i for i in indices]
        images += to_images(models.generator.draw(
            prompts, seeds, args.size, args.sample_steps, args.guidance))
    if run.stopped():
        return {}
    # 2. figures of all processes
    shown = [rows[i] for i in mine]
    parts = rewards_of(images, shown, models, args.reward_weights, args.readings)
    if models.meter:
        measured = torch.tensor([models.meter(image) for image in images]).view(-1, 2)
        for axis, name in enumerate(("v", "a")):
            parts[f"target_{name}"] = torch.tensor([getattr(row, name) for row in shown])
            parts[f"meter_{name}"] = measured[:, axis]
    gathered = {name: processes.gather(part.tolist()) for name, part in parts.items()}
    for name in ("v", "a") if models.meter else ():
        measured = gathered.pop(f"meter_{name}")
        gathered[f"meter_{name}_spearman"] = spearman(gathered.pop(f"target_{name}"), measured)
    # 3. the pictures of the first rows
    small = [(i, image.resize((128, 128))) for i, image in zip(mine, images) if i < 6]
    small = sorted(processes.gather(small), key=lambda pair: pair[0])
    run.save_pictures(step, [picture for _, picture in small])
    return {f"eval_{name}": mean(values) for name, values in gathered.items()}


# --------------------------------------------------------------------------------------------------
# The loop


def train(args, processes):
    """Train the adapter, from the last checkpoint on if there is one. Returns the exit code."""
    # rows, the run's folder, models with a new adapter
    training.check_shares(args.batch * args.group, "--batch × --group", processes)
    if branch_of(args) > 1:  # a group lies on one process
        training.check_shares(args.batch, "--group-start shared, --batch", processes)
    rows = data.load_rows(args.data, "train")
    held_out = data.load_rows(args.data, "validation")[:args.eval_rows]
    if len(held_out) < processes.world:
        raise UserError(f"--eval-rows: {len(held_out)} validation rows for {processes.world} "
                        f"processes, of which each evaluates one at least")
    hub.fetch(pipeline.files_of_generator(args.model, not args.no_t5, adapter=args.init_adapter),
              lora.files_with_base(args.judge), clip.files_of_pickscore(args.pickscore),
              scorers.files_of(args.scorer))
    settings = vars(args) | {
        "rows": data.digest(rows), "own": own_reward.digest(args.reward),
        "files": pipeline.fingerprints(args)}
    run = training.Run(args.out, settings, processes, CURVES, f"{args.model}, Flow-GRPO")
    models = load_models(args, processes.device)
    model = models.generator.mmdit
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=args.lr, weight_decay=1e-4)
    ema = training.EMA(trained, args.ema)
    state = checkpoints.state_of(optimizer, ema)
    done = run.load(state, args.steps)
    if processes.first:
        cli.say(f"{args.model}: {training.sizes(model, processes)}; {len(rows):,} prompts, "
                f"{args.steps:,} steps of {args.batch} × {args.group} pictures")
    # an adapter is written twice, for peft and for diffusers
    run.say_disk(state, 2 * lora.file_size(model), args, on_the_way=True)
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
            chunks, local = roll_out(models, samples, args, run, step)
            if run.stopped():
                break  # what there is of this step is dropped
            rewards = {name: torch.tensor(processes.gather(values.tolist())).view(-1, args.group)
                       for name, values in local.items()}  # [P,G]
            seconds_rollout = timer.lap()
            # 3. advantages (equation 1): each picture against its group
            advantages = grpo.group_advantages(
                rewards["total"], global_std=args.advantage_std == "global")  # [P,G]
            advantages = advantages.flatten().float()  # [P·G]
            advantages = processes.share(advantages.to(processes.device))  # [n]
            # 4. update
            lr = training.linear(args.lr, args.lr_end, step, args.steps)
            optimizer.param_groups[0]["lr"] = lr
            updated = update(model, chunks, advantages, optimizer, args, processes, step == start)
            # 5. average the adapter
            done = step + 1
            if done % args.ema_every == 0:
                ema.add(step)
            # 6. log
            record = {"step": done, **summary(rewards, *updated, processes), "lr": lr,
                      "seconds_rollout": seconds_rollout, "seconds_update": timer.lap(),
                      "memory_gib": training.peak_memory(processes.device)}
            record["skipped"] = run.count_skipped(record["grad_norm"], [
                {"row": s.row.id, "prompt": s.prompt, "seed": s.seed} for s in samples])
            run.warn("cannot be read", record.get("unreadable"))
            bar.set_postfix({name: f"{record[name]:.3f}" for name in ("reward", "kl")
                             if name in record})
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
            lora.save_lora(args.out / "adapter", model, models.generator.name, diffusers=True)
        print(run.evaluations())
        print(args.out / "adapter")
    processes.wait()
    return 0


def load_models(args, device):
    """Models, with a new adapter in the generator."""
    own = own_reward.load(args.reward)
    judge = None if args.judge == "none" else pipeline.load_judge(args.judge, device)
    others = scorers.load(args.scorer, device)
    scorer = meter = examiner = None
    if args.pickscore != "none":
        scorer = clip.load_pickscore(args.pickscore, device)
    if args.preset == "tiny":
        from tiny.examiner import Examiner
        from tiny.scenes import measure_va as meter
        examiner = Examiner.from_pretrained()
    generator = load_generator(args.model, device, use_t5=not args.no_t5,
                               encoders=args.encoders)
    generator.encoders = PromptCache(generator.encoders, generator.dtype)
    generator.mmdit.checkpointing = args.checkpointing
    torch.manual_seed(args.seed)
    targets = generator.mmdit.lora_targets()
    if args.init_adapter != "none":
        adapter = weights.find(lora.adapter_in(args.init_adapter))
        targets = lora.layers_in(adapter, generator.mmdit.lora_targets(dual=True))
    lora.add_lora(generator.mmdit, targets, args.lora_rank, args.lora_alpha)
    if args.init_adapter != "none":
        lora.fill_lora(adapter, generator.mmdit)
    return Models(generator, judge, scorer, meter, examiner, own, others)


def prompts_needed(start, rows, held_out, args, processes):
    """The prompts that this process needs from step `start` on, evaluations included, each once."""
    needed = [""]
    for step in range(start, args.steps):
        for sample in processes.share(samples_of(step, rows, args)):
            needed.append(sample.prompt)
    evaluated = held_out[processes.rank::processes.world]
    return list(dict.fromkeys(needed + [row.prompt(args.form[0]) for row in evaluated]))


def summary(rewards, sums, deviation, norm, processes):
    """The log's figures of a step. rewards {part: [P,G]}; sums, deviation: of this process."""
    names = {"total": "reward", **{name: f"reward_{name}" for name in PARTS}}
    means = {names.get(name, name): float(part.nanmean()) for name, part in rewards.items()}
    if "judge_v_error" in rewards:
        means["unreadable"] = float(rewards["judge_v_error"].isnan().double().mean())
    if deviation is not None:
        means["ratio_max_deviation"] = max(processes.gather([deviation]))
    spread = rewards["total"].std(dim=1)
    n = processes.total(sums)
    return {"loss": n["loss"] / processes.world, **means, "reward_std": float(spread.mean()),
            "zero_spread": float((spread < 1e-6).double().mean()),  # groups without advantages
            **{name: total / n["picture_steps"] for name, total in n.items()
               if name not in ("loss", "picture_steps")},  # ratio, clip_fraction, kl
            "grad_norm": norm}


def parse_args(argv=None):
    parser = cli.training_parser(
        __doc__, SETTINGS, "runs/gen", GROUPS, RARE, presets=(*cli.PRESETS, "fast"))
    parser.add_argument("--no-t5", action="store_true", help="leave T5 out")
    parser.add_argument("--reward", metavar="FILE:FUNCTION", help="a reward of your own, with a "
                        "weight: --reward-weights emotion=1,own=0.5")
    parser.add_argument("--scorer", type=scorers.named, action="append", help=scorers.HELP)
    args = presets.parse_settings(parser, SETTINGS, argv)
    args.scorer = scorers.chosen(args.scorer, args.reward_weights)
    branch = branch_of(args)
    if args.group_start == "shared" and args.group % args.updates:
        parser.error(f"--group-start shared: --group {args.group} must be a multiple of --updates "
                     f"{args.updates}")
    if args.group_start == "shared" and args.micro % branch:
        parser.error(f"--group-start shared: --micro {args.micro} must be a multiple of {branch}, "
                     f"a group's pictures in an update")
    if args.loss == "difference" and branch == 1:
        parser.error("--loss difference compares pictures of one start: give --group-start shared")
    trained = args.sde_steps - args.skip_last
    limits = {"skip_last": args.sde_steps - 1,
              "window_within": trained, "window": args.window_within or trained,
              "updates": args.batch * args.group}
    for name, most in limits.items():
        if getattr(args, name) > most:
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)}: at most {most}")
    if args.window_within and not args.window:
        parser.error(f"--window-within {args.window_within}: --window is 0, so all steps are "
                     f"trained; give --window, or --window-within 0")
    if "meter" in args.reward_weights and args.preset != "tiny":
        parser.error(f"--reward-weights meter: only the miniature has one, not --preset "
                     f"{args.preset}")
    for name, flag in (("emotion", "judge"), ("pickscore", "pickscore")):
        if name in args.reward_weights and getattr(args, flag) == "none":
            parser.error(f"--{flag} none, but --reward-weights has {name}: leave it out there")
    if (args.reward is None) == ("own" in args.reward_weights):
        parser.error("--reward FILE:FUNCTION and --reward-weights …,own=1: give both or neither")
    return args


def main(argv=None):
    args = parse_args(argv)
    feedback.PROMPTS.update(args.questions or {})
    return training.run_in_processes(train, args)


if __name__ == "__main__":
    sys.exit(main())
