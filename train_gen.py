"""Train the generator by Flow-GRPO on the judge's scores (EmoFeedback², section 3.2): reward feedback.

    python train_gen.py --data tiny/cache/dataset --out runs/gen                              # the miniature, on a CPU
    python train_gen.py --preset paper --plan --gpus 1,8,64                                   # memory and time it will need
    torchrun --nproc-per-node 8 train_gen.py --preset paper --data DATASET --out runs/gen     # SD3.5-Medium

A step draws a group of pictures for each of a batch of prompts with a stochastic sampler, has the judge read valence and
arousal in them and PickScore compare them with the neutral prompt, and compares each picture with the rest of its group.
Then it makes the noise of good pictures likelier, by an adapter (LoRA) of the attention projections; the reference of the
KL term is the same network without it. The analytic meter of the miniature world is never a reward: it is logged beside
the judge, so that a generator that learns to please the judge alone is seen.

A run started again with the same command goes on after its last checkpoint and ends with the same weights. The order of
this file: settings, rollout, update, evaluation, the run.
"""

import functools
import math
import random
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

import data
import feedback
import flow_grpo
import grpo
import qwen_vl
from bench import plan
from evaluation import tables
from parts import cli, clip, lora, weights
from parts import run as training
from parts.cli import UserError
from parts.pipeline import PAPER, TINY, Generator, load_generator, name_of, to_images

SETTINGS = {  # flag: (paper's value, the miniature's, help)
    "model": (PAPER, str(TINY), "folder or hub id of the generator"),
    "judge": ("Qwen/Qwen2.5-VL-7B-Instruct", str(TINY / "judge"), "folder or hub id of the judge, or none"),
    "pickscore": ("yuvalkirstain/PickScore_v1", str(TINY / "clip"), "folder or hub id of PickScore, or none"),
    "reward_weights": ("emotion=1,pickscore=1", "emotion=1,pickscore=1", "of the two rewards"),
    "prompts": (("numbers",), ("numbers", "numbers", "words"), "how the target enters the prompt: numbers, words, emotional "
                "(the row's own words) or neutral; several with commas are drawn from, one given twice twice as often, and "
                "the first is evaluated"),
    "group": (8, 4, "pictures of each prompt, G"),
    "guided": (0, 2, "of these, drawn with the row's emotional prompt, which only training has"),
    "batch": (16, 16, "prompts in a step, over all processes"),
    "steps": (1000, 36, "training steps"),
    "sample_steps": (10, 6, "steps of the stochastic sampler, T"),
    "eval_steps": (25, 25, "steps of the deterministic sampler in evaluations"),
    "window": (0, 2, "how many of the T steps are stochastic and trained; 0: all"),
    "window_within": (0, 4, "the window lies within the first so many of the T steps; 0: anywhere"),
    "step_weights": ("equal", "noise", "of the trained steps: equal, or noise, so that all noise levels have a say"),
    "group_noise": ("own", "own", "starting noise: own for each picture, or shared by its group"),
    "size": (512, 128, "side of the pictures in pixels"),
    "guidance": (4.5, 4.5, "classifier-free guidance while training"),
    "eval_guidance": (4.5, 4.5, "classifier-free guidance in evaluations"),
    "noise_level": (0.7, 0.1, "of the stochastic sampler"),
    "lr": (3e-4, 1.5e-3, "learning rate at the start"),
    "lr_end": (3e-4, 1e-4, "and at the end, linear in between"),
    "beta": (0.1, 0.1, "weight of the KL to the model without the adapter"),
    "clip": (1e-4, 1e-4, "range of the ratio"),
    "rank": (32, 32, "of the adapter"),
    "alpha": (64.0, 64.0, "scale of the adapter"),
    "ema": (0.9, 0.97, "decay of the averaged adapter, which is evaluated and written"),
    "micro": (8, 64, "pictures in one forward and backward pass of a process"),
    "encoders": ("gpu", "gpu", "where the text encoders live: gpu, with the generator; cpu; or leave: all prompts of the "
                 "run are encoded at its start, and the encoders are freed"),
    "max_grad_norm": (1.0, 1.0, "the gradient is scaled down to this norm"),
    "eval_every": (60, 4, "steps between evaluations; 0: only in the end"),
    "eval_rows": (200, 64, "held-out prompts in an evaluation"),
    "save_every": (50, 4, "steps between checkpoints"),
    "seed": (0, 0, "of the prompts' order and of all noise"),
}
FREE = {"eval_every", "eval_rows", "save_every", "micro", "encoders", "checkpointing"}  # may change on the way
CURVES = ("reward", "reward_emotion", "reward_pickscore", "judge_v_error", "judge_a_error", "meter_v_error", "meter_a_error",
          "reward_std", "zero_spread", "kl", "clip_fraction", "grad_norm", "eval_judge_v_error", "eval_judge_a_error",
          "eval_meter_v_error", "eval_meter_a_error", "eval_pickscore")
FORMS = ("numbers", "words", "emotional", "neutral")  # of a target in a prompt
MEANS = ("ratio", "clip_fraction", "kl")  # of a step's metrics, over its rows
STRIP = 6  # pictures of fixed prompts and seeds that every evaluation draws


# ---------------------------------------------------------------------------------------------------------------------
# Rollout: prompts, pictures, rewards


@dataclass
class Models:
    generator: Generator
    judge: qwen_vl.QwenVL | None
    scorer: object | None  # PickScore
    meter: object | None  # the miniature world's, or None


def prompt_of(row, form):
    """The prompt of a dataset row, with its target in one of FORMS. Rows without an emotional caption: in words."""
    if form == "numbers":
        return data.with_numbers(row.neutral, row.v, row.a)
    if form == "neutral":
        return row.neutral
    return (form == "emotional" and row.emotional) or data.with_words(row.neutral, row.v, row.a)


@dataclass(frozen=True)
class Wish:
    """One picture to draw: the g-th of the group of prompt `number` of the step, over all processes."""
    number: int
    g: int
    row: data.Row
    prompt: str  # that the model is trained to follow
    drawn: str  # that it is drawn with

    @property
    def guided(self):
        return self.drawn != self.prompt


def wishes_of(step, rows, args):
    """The batch × group pictures of step `step`, group by group: every epoch is its own permutation of the rows."""
    out = []
    for number, place in enumerate(training.batch_places(step, args.batch, len(rows), args.seed)):
        prompt = prompt_of(rows[place], random.Random(f"form {args.seed} {step} {number}").choice(args.prompts))
        guide = prompt_of(rows[place], "emotional")
        out += [Wish(number, g, rows[place], prompt, guide if g < args.guided else prompt) for g in range(args.group)]
    return out


def rewards_of(images, rows, models, reward_weights):
    """{part: [N]} of N PIL images and the rows they were drawn for: the rewards, their weighted sum `total`, and what is
    only watched: the errors of judge and meter and the gap between the two (NaN where an answer cannot be read)."""
    parts = {}
    if models.judge is not None:
        judge = feedback.judge_of(models.judge, 64, progress=partial(tqdm, disable=True))
        seen = feedback.judge_images(judge, images, ("regression",))
        parts["emotion"] = [1 - j.distance(row.v, row.a) / 16 for j, row in zip(seen, rows)]  # unreadable: 0
        told = [j.va for j in seen]
        parts["judge_v_error"], parts["judge_a_error"] = errors(told, rows)
    if models.scorer is not None:
        parts["pickscore"] = (clip.pick_score(models.scorer, images, [row.neutral for row in rows]) / 26).tolist()
    if models.meter is not None:
        measured = [models.meter(image) for image in images]
        parts["meter_v_error"], parts["meter_a_error"] = errors(measured, rows)
        if models.judge is not None:
            parts["gap"] = [abs(t[0] - m[0]) + abs(t[1] - m[1]) for t, m in zip(told, measured)]
    parts = {name: torch.tensor(values, dtype=torch.float64) for name, values in parts.items()}
    return parts | {"total": sum(weight * parts[name] for name, weight in reward_weights.items())}


def errors(values, rows):
    """([|ΔV|], [|ΔA|]) of (v, a) pairs against those of their rows."""
    return [abs(v - row.v) for (v, _), row in zip(values, rows)], [abs(a - row.a) for (_, a), row in zip(values, rows)]


class Contexts:
    """Text-encoder outputs, each prompt encoded once and kept in host memory."""

    def __init__(self, generator):
        self.generator, self.known = generator, {}

    def encode(self, text):
        if text not in self.known:  # one by one: in a batch the rounding would depend on the others
            dtype = self.generator.mmdit.pos_embed.dtype
            self.known[text] = [z[0].to(dtype).cpu() for z in self.generator.encoders.encode([text])]
        return self.known[text]

    def encode_all(self, prompts, progress):
        """Encode every prompt, after which the encoders are not needed, and free their memory."""
        for text in tqdm(prompts, desc="prompts", leave=False, disable=not progress):
            self.encode(text)
        self.generator.encoders = None
        if self.generator.device.type == "cuda":
            torch.cuda.empty_cache()

    def __call__(self, prompts, guidance):
        """(context, pooled) of the prompts, with as many rows of the empty prompt in front if guidance > 1."""
        texts = [""] * len(prompts) * (guidance > 1) + list(prompts)
        pairs = [self.encode(text) for text in texts]
        return tuple(torch.stack(z).to(self.generator.device) for z in zip(*pairs))


@dataclass
class Chunk:
    """Pictures that are drawn, and later evaluated, in one batch."""
    trajectory: flow_grpo.Trajectory
    context: torch.Tensor  # of the prompts that the model is trained to follow
    pooled: torch.Tensor
    places: list[int]  # of this process's pictures


@torch.no_grad()
def roll_out(models, contexts, wishes, args, step, overlap):
    """(chunks, rewards {part: [n]}) of this process's n wishes. A picture depends on the seed, the step, its prompt's number
    and its place in the group only. overlap: judge a chunk's pictures while the next chunk is drawn."""
    generator = models.generator
    window = flow_grpo.window_of(step, args.window_within or args.sample_steps, args.window or None, args.seed)
    chunks, scored = [], []
    with ThreadPoolExecutor(1) as pool:
        for places in chunks_of(wishes, args.micro):
            part = [wishes[i] for i in places]
            trajectory, context, pooled = draw(generator, contexts, part, args, step, window)
            chunks.append(Chunk(trajectory, context, pooled, places))
            images = to_images(generator.decode(trajectory.latents))
            scored.append(pool.submit(score_beside, generator.device, images, [w.row for w in part], models, args.rewards))
            if not overlap:
                scored[-1].result()
        parts = [each.result() for each in scored]
    order = torch.tensor([i for chunk in chunks for i in chunk.places]).argsort()
    return chunks, {name: torch.cat([p[name] for p in parts])[order] for name in parts[0]}


def chunks_of(wishes, micro):
    """[[place of a wish]] with at most `micro` in each: first the guided ones, then the others."""
    kinds = [[i for i, w in enumerate(wishes) if w.guided == guided] for guided in (True, False)]
    return [kind[start:start + micro] for kind in kinds for start in range(0, len(kind), micro)]


def draw(generator, contexts, wishes, args, step, window):
    """(Trajectory of the wishes in one batch, context and pooled vectors of the prompts to follow). All guided, or none.

    Guided pictures are drawn from their emotional prompts by the model without its adapter, so that what guides does not
    move with what is trained. Their steps then count with the probability that the model to be trained, given its own
    prompt, has of taking them.
    """
    def of(texts):
        seeds = [torch.Generator().manual_seed(seed_of(args.seed, step, w.number, w.g)) for w in wishes]
        starts = seeds if args.group_noise == "own" else [
            torch.Generator().manual_seed(seed_of(args.seed, step, w.number, 1023)) for w in wishes]
        return flow_grpo.sample_sde(
            generator.mmdit, noise_for(generator, args.size, starts), *texts, args.sample_steps, args.guidance,
            generator.shift, args.noise_level, window, seeds)

    context, pooled = contexts([w.prompt for w in wishes], args.guidance)
    if not wishes[0].guided:
        return of((context, pooled)), context, pooled
    with lora.lora_disabled(generator.mmdit):
        trajectory = of(contexts([w.drawn for w in wishes], args.guidance))
    for k, kept in enumerate(trajectory.steps):
        kept.log_prob = flow_grpo.evaluate_step(generator.mmdit, trajectory, k, context, pooled).log_prob
    return trajectory, context, pooled


def seed_of(seed, step, number, g):
    return ((seed * 1_000_003 + step) * 4096 + number) * 1024 + g


@torch.no_grad()  # which every thread must say for itself
def score_beside(device, *args):
    """`rewards_of`, on a GPU in a stream of its own, so that it runs beside what the main thread does there."""
    if device.type != "cuda":
        return rewards_of(*args)
    with torch.cuda.stream(side_stream(device)):
        return rewards_of(*args)


@functools.cache  # one for the run: the memory that a stream has used stays its own
def side_stream(device):
    return torch.cuda.Stream(device)


def noise_for(generator, size, seeds):
    """Starting noise [N,C,h,w], each picture's from its own generator."""
    cells = size // generator.vae.factor
    shape = 1, generator.mmdit.config.channels, cells, cells
    return torch.cat([torch.randn(shape, generator=seed) for seed in seeds]).to(generator.device)


# ---------------------------------------------------------------------------------------------------------------------
# Update


def without_flight(advantages, wishes):
    """The advantages [n] of n wishes, those of guided pictures at least 0. A guided picture that is better than its group is
    an example to follow. Away from a worse one there is no end: its steps lie the less likely the further the model goes,
    and the gradient grows."""
    guided = torch.tensor([w.guided for w in wishes], device=advantages.device)
    return torch.where(guided, advantages.clamp(min=0), advantages)


def update(models, chunks, advantages, trained, optimizer, args, processes, check):
    """Gradients over all stochastic steps of all chunks, then one step of the optimizer. advantages [n]: of this process's
    pictures. check: before the first update the ratio must be 1. Returns sums over this process's picture-steps."""
    model = models.generator.mmdit
    count = len(advantages) * len(chunks[0].trajectory.steps)
    sums, worst = dict.fromkeys(("loss", *MEANS), 0.0), []  # of tensors: nothing waits for a GPU
    optimizer.zero_grad(set_to_none=True)
    for chunk in chunks:
        for k, kept in enumerate(chunk.trajectory.steps):
            of, reference = (model, chunk.trajectory, k, chunk.context, chunk.pooled), None
            if args.beta:
                with torch.no_grad(), lora.lora_disabled(model):
                    reference = flow_grpo.kept_velocity(*of)
            step = flow_grpo.evaluate_step(*of, reference)
            loss, metrics = flow_grpo.step_loss(step.log_prob, kept.log_prob, advantages[chunk.places], step.kl, args.clip,
                                                args.beta, normalizer=count)
            loss = loss * step_weight(step, chunk.trajectory, kept.index, args.step_weights)
            loss.backward()
            sums["loss"] += loss.detach().double()
            for key in MEANS:
                sums[key] += metrics[key].double() * len(kept.log_prob) if key in metrics else 0.0
            worst.append(metrics["ratio_max_deviation"])
    sums, worst = {key: float(value) for key, value in sums.items()}, float(torch.stack(worst).max())
    if check and not worst <= (0 if models.generator.device.type == "cpu" else args.clip / 10):
        raise UserError(f"before the first update the ratio is off by {worst:.2g}; drawing and evaluating a step no "
                                f"longer agree: is the adapter on in one only, or the batch another?")
    processes.average_gradients(trained)
    norm = float(torch.nn.utils.clip_grad_norm_(trained, args.max_grad_norm))
    optimizer.step()
    return {**sums, "picture_steps": count}, {"ratio_max_deviation": worst, "grad_norm": norm}


def step_weight(step, trajectory, index, kind):
    """Weight of a trained step's loss. The gradient of a log-probability by the velocity is proportional to √−dt/σ_t, many
    times as large at the end of a trajectory as at its start, where a picture's mood is settled. "noise" takes that factor
    away, in units of the noise level."""
    if kind == "equal":
        return 1.0
    dt = float(trajectory.sigmas[index] - trajectory.sigmas[index + 1])
    return step.sigma_t / math.sqrt(dt) / trajectory.noise_level


class Average:
    """Running average (EMA) of the adapter. As a context it stands in the model's place."""

    def __init__(self, parameters, decay):
        self.parameters, self.decay = parameters, decay
        self.values = [p.detach().clone() for p in parameters]

    @torch.no_grad()
    def add(self, step):
        decay = min(self.decay, (1 + step) / (10 + step))  # follows quickly at first
        for value, p in zip(self.values, self.parameters, strict=True):
            value.lerp_(p, 1 - decay)

    @torch.no_grad()
    def swap(self):
        for value, p in zip(self.values, self.parameters, strict=True):
            held = p.clone()
            p.copy_(value)
            value.copy_(held)

    def __enter__(self):
        self.swap()

    def __exit__(self, *error):
        self.swap()


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation


@torch.no_grad()
def evaluate(models, contexts, rows, args, processes, strip=None):
    """Held-out figures of pictures drawn by the deterministic sampler, one for each row with a seed of its own: mean errors
    of judge and meter, rank correlations of meter and target, mean PickScore. strip: file for the first STRIP pictures."""
    generator, mine = models.generator, list(range(processes.rank, len(rows), processes.world))
    records = []
    for start in tqdm(range(0, len(mine), args.micro), desc="evaluation", leave=False, disable=not processes.first):
        places = mine[start:start + args.micro]
        own = [rows[i] for i in places]
        context, pooled = contexts([prompt_of(row, args.prompts[0]) for row in own], args.eval_guidance)
        noise = noise_for(generator, args.size, [torch.Generator().manual_seed(10_000 + i) for i in places])
        images = to_images(generator.decode(flow_grpo.sample_ode(
            generator.mmdit, noise, context, pooled, args.eval_steps, args.eval_guidance, generator.shift)))
        parts = rewards_of(images, own, models, args.rewards)
        measured = [models.meter(image) if models.meter else (math.nan, math.nan) for image in images]
        for n, i in enumerate(places):
            small = images[n].resize((128, 128)) if i < STRIP else None
            records.append((i, {name: float(values[n]) for name, values in parts.items()}, measured[n], small))
    records = sorted(processes.gather(records), key=lambda r: r[0])
    if strip is not None and processes.first:
        save_strip([small for *_, small in records if small is not None], strip)
    figures = {name: float(np.nanmean([r[1][name] for r in records])) for name in records[0][1]}
    if models.meter:
        for axis, name in ((0, "v"), (1, "a")):
            wanted = [getattr(row, name) for row in rows]
            figures[f"meter_{name}_spearman"] = tables.spearman(wanted, [r[2][axis] for r in records])
    return figures


def save_strip(pictures, path):
    """Write one evaluation's pictures side by side, and strip.png beside it: all evaluations so far, one a row."""
    path.parent.mkdir(exist_ok=True)
    row = Image.new("RGB", (128 * len(pictures), 128))
    for i, picture in enumerate(pictures):
        row.paste(picture, (128 * i, 0))
    row.save(path)
    rows = [Image.open(p) for p in sorted(path.parent.glob("*.png"))]
    sheet = Image.new("RGB", (row.width, 128 * len(rows)))
    for i, each in enumerate(rows):
        sheet.paste(each, (0, 128 * i))
    sheet.save(path.parent.parent / "strip.png")


# ---------------------------------------------------------------------------------------------------------------------
# The run


def load_models(args, processes):
    """Models, with a new adapter around the generator's attention projections, and the trained parameters."""
    device = processes.device
    judge = None if args.judge == "none" else qwen_vl.QwenVL.from_pretrained(args.judge, device)
    scorer = None
    if args.pickscore != "none":
        own = (Path(args.pickscore) / "preprocessor_config.json").exists()
        scorer = clip.CLIP.from_pretrained(args.pickscore, device, processor=None if own else clip.PICKSCORE_PROCESSOR)
    generator = load_generator(args.model, device, use_t5=not args.no_t5,
                                      encoders_device="cpu" if args.encoders == "cpu" else None)
    generator.mmdit.checkpointing = args.checkpointing
    torch.manual_seed(args.seed)
    lora.add_lora(generator.mmdit, generator.mmdit.lora_targets(), args.rank, args.alpha)
    trained = [p for p in generator.mmdit.parameters() if p.requires_grad]
    meter = None
    if args.preset == "tiny":
        from tiny import scenes
        meter = scenes.measure_va
    return Models(generator, judge, scorer, meter), trained


def train(args, processes):
    rows, held_out = data.load_rows(args.data, "train"), data.load_rows(args.data, "test")[:args.eval_rows]
    unsaved = ("out", "device", "rewards", "plan", "gpus")
    settings = {k: v for k, v in vars(args).items() if k not in unsaved} | {"data": str(args.data)}
    run = training.Run(args.out, settings, processes, fixed=[k for k in settings if k not in FREE])
    state = run.load()
    models, trained = load_models(args, processes)
    contexts, average = Contexts(models.generator), Average(trained, args.ema)
    optimizer = torch.optim.AdamW(trained, lr=args.lr, weight_decay=1e-4)
    start = 0
    if state:
        training.restore_state(state, trained, optimizer)
        for value, saved in zip(average.values, state["average"], strict=True):
            value.copy_(saved)
        start = state["step"]
        run.read_log(start)
    if processes.first:
        cli.say(f"{args.model}: {sum(p.numel() for p in trained) / 1e6:,.2f} M trained of "
                     f"{weights.count_parameters(models.generator.mmdit) / 1e6:,.1f} M, on {processes.world} × "
                     f"{processes.device.type}; {len(rows):,} prompts, {args.steps:,} steps of {args.batch} × {args.group} "
                     f"pictures" + (f"; goes on after step {start:,}" if start else ""))
    if args.encoders == "leave":
        contexts.encode_all(own_prompts(start, rows, held_out, args, processes), processes.first)

    def take_step(step):
        share = step / max(1, args.steps - 1)
        optimizer.param_groups[0]["lr"] = lr = args.lr + (args.lr_end - args.lr) * share
        timer = training.Timer()
        wishes = processes.share(wishes_of(step, rows, args))  # a group may lie on several processes
        chunks, own = roll_out(models, contexts, wishes, args, step, overlap=processes.device.type == "cuda")
        rewards = {k: torch.tensor(processes.gather(v.tolist())).view(-1, args.group) for k, v in own.items()}
        rolled = timer.lap()
        advantages = processes.share(grpo.group_advantages(rewards["total"]).flatten().float().to(processes.device))
        advantages = without_flight(advantages, wishes)
        sums, greatest = update(models, chunks, advantages, trained, optimizer, args, processes, check=step == start)
        average.add(step)
        record = {**summary(rewards, sums, greatest, processes), "lr": lr, "seconds_rollout": rolled,
                  "seconds_update": timer.lap(), "memory_gib": training.peak_memory(processes.device)}
        return record, {k: f"{record[k]:.3f}" for k in ("reward", "kl") if record.get(k) is not None}

    def figures(step):
        with average:
            return evaluate(models, contexts, held_out, args, processes, args.out / "strips" / f"{step:08d}.png")

    stopped = run.train("Flow-GRPO", start, args.steps, args, take_step, figures,
                        lambda: training.state_of(trained, optimizer) | {"average": average.values}, CURVES)
    if stopped:
        return stopped
    if processes.first:
        mmdit = models.generator.mmdit
        with average:
            lora.save_lora(args.out / "adapter", mmdit, mmdit.lora_targets(), args.rank, args.alpha,
                              name_of(args.model))
        print(table(run.records))
        print(args.out / "adapter")
    processes.wait()
    return 0


def own_prompts(start, rows, held_out, args, processes):
    """Every prompt that this process still needs: those of its share of all steps from `start` on, its held-out ones, and
    the empty one."""
    trained = (prompt for step in range(start, args.steps) for w in processes.share(wishes_of(step, rows, args))
               for prompt in (w.prompt, w.drawn))
    tested = (prompt_of(row, args.prompts[0]) for row in held_out[processes.rank::processes.world])
    return list(dict.fromkeys(["", *trained, *tested]))


def table(records):
    """Markdown of the first and the last evaluation, with a warning if judge and meter have drifted apart."""
    first, last = (next((r for r in order if "eval_total" in r), {}) for order in (records, records[::-1]))
    keys = [k for k in first if k.startswith("eval_")]
    lines = ["| | " + " | ".join(k.removeprefix("eval_").replace("_", " ") for k in keys) + " |",
             "| --- " * (len(keys) + 1) + "|"]
    for name, record in (("before", first), ("after", last)):
        lines.append(f"| {name} | " + " | ".join("-" if record.get(k) is None else f"{record[k]:.3f}" for k in keys) + " |")
    if first.get("eval_gap") and last.get("eval_gap") and last["eval_gap"] > 1.25 * first["eval_gap"]:
        lines.append(f"\nThe gap between judge and meter grew from {first['eval_gap']:.2f} to {last['eval_gap']:.2f}: part "
                     "of the reward may be the judge's mistakes.")
    return "\n".join(lines)


def summary(rewards, sums, greatest, processes):
    """The log's figures of a step. rewards {part: [P,G]} of all processes; sums, greatest: of this one."""
    spread = rewards["total"].std(dim=1)
    named = {"total": "reward", "emotion": "reward_emotion", "pickscore": "reward_pickscore"}
    parts = {named.get(k, k): float(v.nanmean()) if v.isfinite().any() else None for k, v in rewards.items()}
    if "judge_v_error" in rewards:
        parts["unreadable"] = float(rewards["judge_v_error"].isnan().double().mean())
    n = processes.total(sums)
    steps = n["picture_steps"]
    return {"loss": n["loss"] / processes.world, **parts, "reward_std": float(spread.mean()),
            "zero_spread": float((spread < 1e-6).double().mean()), "ratio": n["ratio"] / steps,
            "clip_fraction": n["clip_fraction"] / steps, "kl": n["kl"] / steps,
            "ratio_max_deviation": max(processes.gather([greatest["ratio_max_deviation"]])),
            "grad_norm": greatest["grad_norm"]}


def parse_args(argv=None):
    parser = cli.make_parser(__doc__, SETTINGS, "runs/gen", {"prompts": lambda text: tuple(text.split(","))})
    parser.add_argument("--pickscore-only", action="store_true", help="the same as --reward-weights pickscore=1")
    parser.add_argument("--no-t5", action="store_true", help="leave T5 out")
    parser.add_argument("--checkpointing", action="store_true", help="recompute activations: less memory, slower")
    parser.add_argument("--plan", action="store_true", help="no training: print what these settings need on GPUs, from "
                        "the models' configurations alone")
    parser.add_argument("--gpus", type=plan.counts, default=(1, 8, 64), help="with --plan: numbers of GPUs "
                        "(default: 1,8,64)")
    args = cli.parse(parser, SETTINGS, argv)
    if args.pickscore_only:
        args.reward_weights = "pickscore=1"
    return args


def check(args):
    """Refuse senseless settings before anything is loaded; reads the reward weights. Raises UserError."""
    bounds = {"group": (2, 1024), "guided": (0, args.group), "batch": (1, 4096), "steps": (1, 10**7),
              "sample_steps": (1, 1000), "eval_steps": (1, 1000), "window": (0, args.window_within or args.sample_steps),
              "window_within": (0, args.sample_steps), "size": (16, 4096), "guidance": (0, 100), "eval_guidance": (0, 100),
              "noise_level": (1e-6, 100), "lr": (0, 1), "lr_end": (0, 1), "beta": (0, 1000), "clip": (0, 1),
              "rank": (1, 4096), "ema": (0, 1), "micro": (1, 4096), "max_grad_norm": (0, 1e9),
              "eval_every": (0, 10**9), "eval_rows": (2, 10**9), "save_every": (1, 10**9), "seed": (0, 2**31)}
    cli.check_bounds(args, bounds)
    if args.size % 16:
        raise UserError(f"--size {args.size}: expected a multiple of 16")
    if not args.prompts or set(args.prompts) - set(FORMS):
        raise UserError(f"--prompts {','.join(args.prompts)}: expected some of {', '.join(FORMS)}")
    cli.check_choices(args, {"group_noise": ("own", "shared"), "step_weights": ("equal", "noise"),
                                  "encoders": ("gpu", "cpu", "leave")})
    try:
        args.rewards = {name.strip(): float(weight) for name, weight in
                        (part.split("=") for part in args.reward_weights.split(","))}
        unknown = set(args.rewards) - {"emotion", "pickscore"}
        if unknown or not args.rewards:
            raise ValueError(f"unknown {', '.join(unknown)}")
    except ValueError as error:
        raise UserError(f"--reward-weights {args.reward_weights}: expected e.g. emotion=1,pickscore=1 "
                                f"({error})") from error
    for name, flag in (("emotion", "judge"), ("pickscore", "pickscore")):
        if name in args.rewards and getattr(args, flag) == "none":
            raise UserError(f"--{flag} none, but --reward-weights asks for {name}; give its weight no place there")


def main(argv=None):
    args = parse_args(argv)
    if args.plan:
        args.device = "cpu"  # whatever the run will use
    return training.run_program(args, check, plan.show if args.plan else train)


if __name__ == "__main__":
    sys.exit(main())
