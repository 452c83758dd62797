"""Train the judge by GRPO: it answers, its answers are scored, better ones become likelier (EmoFeedback², section 3.1).

    python train_judge.py --data tiny/cache/dataset --out runs/judge                       # the miniature, on a CPU
    python train_judge.py --preset paper --lora --data DATASET --out runs/judge            # Qwen2.5-VL-7B, one GPU
    torchrun --nproc-per-node 8 train_judge.py --preset paper --data DATASET --out runs/judge   # all weights, FSDP2
    python train_judge.py --evaluate --model runs/judge/judge --data DATASET               # held-out figures only

One sample is one picture and one question: how much valence and arousal, or which of eight emotions. A step asks a batch
of questions, samples a group of answers to each, rewards each answer for its form and for being right, and compares it
with the rest of its group. `--reward continuous` and `--tasks regression` or `class` are the ablations of Tables 4 and 5.

A run started again with the same command goes on after its last checkpoint and ends with the same weights. The order of
this file: settings, rollout, update, evaluation, the run.
"""

import argparse
import json
import math
import sys
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from tqdm import tqdm

import data
import feedback
import grpo
import qwen_vl
from parts import cli, lora
from parts import run as training
from parts.cli import UserError

TINY = Path(__file__).resolve().parent / "tiny" / "weights" / "judge"
SETTINGS = {  # flag: (paper's value, the miniature's, help)
    "model": ("Qwen/Qwen2.5-VL-7B-Instruct", str(TINY), "folder or hub id to start from"),
    "group": (8, 8, "answers to each question, G"),
    "batch": (16, 16, "questions in a step, over all processes"),
    "epochs": (5.0, 0.75, "passes over the training pictures"),
    "lr": (1e-6, 3e-4, "learning rate at the start"),
    "lr_end": (1e-9, 1e-5, "and at the end, linear in between"),
    "beta": (1e-3, 1e-3, "weight of the KL to the reference (k3)"),
    "clip": (0.2, 0.2, "range of the ratio"),
    "epsilon": (0.70, 0.70, "an answer this near is right (step reward)"),
    "alpha": ((0.25, 0.75), (0.25, 0.75), "weights of valence and arousal, e.g. 0.25,0.75"),
    "tasks": (feedback.TASKS, feedback.TASKS, "questions asked: regression,class or one of them (Table 5)"),
    "reward": ("step", "step", "V-A reward: step or continuous (Table 4)"),
    "temperature": (1.0, 1.0, "of the sampled answers"),
    "max_new_tokens": (512, 96, "longest answer"),
    "updates": (1, 1, "updates from each set of answers"),
    "micro": (1, 8, "questions (with their answers) in one forward and backward pass of a process"),
    "max_grad_norm": (1.0, 1.0, "the gradient is scaled down to this norm"),
    "max_pixels": (512 * 512, 128 * 128, "larger pictures are shrunk to this many pixels"),
    "rank": (64, 16, "of the adapter (--lora)"),
    "lora_alpha": (128.0, 32.0, "scale of the adapter (--lora)"),
    "eval_every": (200, 0, "steps between evaluations; 0: only in the end"),
    "eval_rows": (1000, 500, "test pictures in an evaluation"),
    "save_every": (100, 50, "steps between checkpoints"),
    "seed": (0, 0, "of the order of questions and of all samples"),
}
FREE = {"eval_every", "eval_rows", "save_every", "micro", "cuda_graphs"}  # may change when a run goes on
CURVES = ("reward", "reward_format", "reward_va", "reward_class", "length", "kl", "clip_fraction", "zero_spread",
          "grad_norm", "eval_v_error", "eval_a_error", "eval_class_accuracy", "tokens_per_second")


# ---------------------------------------------------------------------------------------------------------------------
# Rollout: questions, answers, rewards


@dataclass(frozen=True)
class Question:
    """One sample: a picture, a task, and what is known of the picture."""
    number: int  # within the step, over all processes: seeds its answers
    task: str
    row: data.Row


@dataclass
class Rollout:
    """Answers to P questions of this process, padded to C tokens."""
    prompts: list
    tokens: torch.Tensor  # [P,G,C]
    mask: torch.Tensor  # [P,G,C], True at tokens of the answer
    sampled: torch.Tensor  # [P,G,C], log-probabilities as sampling gave them
    rewards: torch.Tensor  # [P,G]
    parts: dict  # sums over the answers, for the log


def questions_of(step, rows, args):
    """The batch of step `step`: every epoch is its own permutation of all pictures and tasks."""
    out = []
    for number, place in enumerate(training.batch_places(step, args.batch, len(rows) * len(args.tasks), args.seed)):
        row, task = divmod(place, len(args.tasks))
        out.append(Question(number, args.tasks[task], rows[row]))
    return out


def rewards_of(text, question, args):
    """{part: reward} of one answer; their sum is what GRPO sees."""
    parts = {"format": grpo.format_reward(text)}
    if question.task == "regression":
        parts["va"] = grpo.va_reward(text, question.row.v, question.row.a, args.reward, args.epsilon, args.alpha)
    else:
        parts["class"] = grpo.class_reward(text, question.row.label)
    return parts


def roll_out(model, questions, args, step, processes):
    """Sample args.group answers to each question and reward them. Answers depend on the seed, the step and the question's
    number only, not on which process asks."""
    prompts = [model.processor(feedback.ask(q.task, Image.open(q.row.image))) for q in questions]
    seeds = [torch.Generator().manual_seed((args.seed * 1_000_003 + step) * 4096 + q.number) for q in questions]
    with generating(model):
        groups = model.generate(prompts, args.group, args.max_new_tokens, args.temperature, generator=seeds,
                                progress=partial(tqdm, desc="answers", leave=False, delay=2, disable=not processes.first))
    names = ("format", "va", "class")
    parts, rewards = dict.fromkeys((*names, *(f"{n}_count" for n in names), "cut"), 0.0), []
    for question, group in zip(questions, groups, strict=True):
        scores = [rewards_of(c.text, question, args) for c in group]
        rewards.append([sum(s.values()) for s in scores])
        for score, completion in zip(scores, group, strict=True):
            for name, value in score.items():
                parts[name] += value
                parts[f"{name}_count"] += 1
            parts["cut"] += not completion.finished
    flat = [c for group in groups for c in group]
    parts["length"] = sum(len(c.tokens) for c in flat)
    shape = len(questions), args.group, max(len(c.tokens) for c in flat)
    pad = partial(torch.nn.utils.rnn.pad_sequence, batch_first=True)
    tokens, sampled = pad([c.tokens for c in flat]), pad([c.log_probs for c in flat])
    mask = pad([torch.ones_like(c.tokens, dtype=torch.bool) for c in flat])
    answers = (t.view(shape).to(processes.device) for t in (tokens, mask, sampled))
    return Rollout(prompts, *answers, torch.tensor(rewards), parts)


@contextmanager
def generating(model):
    """With FSDP: the blocks' weights are gathered once for a whole generation and not again at every token."""
    sharded = [m for m in model.modules() if isinstance(m, FSDPModule)]
    for module in sharded[1:]:  # the first is the model itself, which keeps its own weights anyway
        module.set_reshard_after_forward(False, recurse=False)
    try:
        yield
    finally:
        for module in sharded[1:]:
            module.set_reshard_after_forward(True, recurse=False)
        for module in sharded:
            module.reshard()


# ---------------------------------------------------------------------------------------------------------------------
# Update


def log_probs_of(model, rollout, part, temperature):
    """Log-probabilities [p·G,C] of the answers' tokens under the model, for the questions in the slice `part`."""
    tokens = rollout.tokens[part]
    hidden = model.completion_hidden(rollout.prompts[part], tokens)
    log_probs = grpo.token_log_probs(hidden.flatten(0, 2), model.head_weight, tokens.flatten(), temperature=temperature)
    return log_probs.view(-1, tokens.shape[-1])


@torch.no_grad()
def reference_log_probs(model, reference, rollout, parts, args):
    """As `log_probs_of`, for each part, under the frozen copy or, if there is none, the model without its adapter."""
    with lora.lora_disabled(model) if reference is None else nullcontext():
        return [log_probs_of(reference or model, rollout, part, args.temperature) for part in parts]


def check_on_policy(sampled, computed, mask, limit):
    """Stop the run unless training sees the probabilities that sampling saw: before an update the two are the same.

    sampled, computed, mask [B,C]. limit: of |ratio − 1|, whose greatest value is returned. Raises UserError with the
    likely cause.
    """
    off = torch.where(mask, (computed - sampled).exp() - 1, 0.0).abs()
    worst = float(off.max())
    if worst <= limit:
        return worst
    place, share = int(off.amax(0).argmax()), float((off > limit).sum() / mask.sum())
    if bool((off[:, 0] > limit).any()):
        cause = "first tokens differ, so the prompt, its pictures, the temperature or the adapter is not the same in the two"
    elif share > 0.5:
        cause = "most tokens differ after the first, so positions or the key-value cache are not the same in the two"
    else:
        cause = "few tokens differ, so padding or mask of the answers is likely wrong, or one of the two rounds more"
    raise UserError(f"before the first update, the ratio of training to sampling is off by {worst:.2g} at token "
                            f"{place} (allowed: {limit:.0e}); {cause}")


def update(model, reference, rollout, optimizer, args, processes, mismatch_limit):
    """Gradients over micro-batches, then a step of the optimizer, `args.updates` times. mismatch_limit: between training and
    sampling, see `check_on_policy`. Returns {metric: sum over this process's tokens, or greatest}."""
    P = len(rollout.prompts)
    parts = [slice(i, i + args.micro) for i in range(0, P, args.micro)]
    advantages = grpo.group_advantages(rollout.rewards).to(rollout.tokens.device)
    reference = reference_log_probs(model, reference, rollout, parts, args) if args.beta else [None] * len(parts)
    old, sums = [None] * len(parts), dict.fromkeys(("loss", "ratio", "clip_fraction", "kl"), 0.0)
    worst, mismatch, trained = 0.0, 0.0, optimizer.param_groups[0]["params"]
    for turn in range(args.updates):
        optimizer.zero_grad(set_to_none=True)
        for i, part in enumerate(parts):
            new, mask = log_probs_of(model, rollout, part, args.temperature), rollout.mask[part].flatten(0, 1)
            if old[i] is None:  # the same function before any update: a ratio of exactly 1
                old[i] = new.detach()
                sampled = rollout.sampled[part].flatten(0, 1)
                mismatch = max(mismatch, check_on_policy(sampled, old[i], mask, mismatch_limit))
            # gradients are averaged over processes, so each divides by its own number of answers
            loss, metrics = grpo.grpo_loss(new, old[i], reference[i], advantages[part].flatten(), mask, args.clip, args.beta,
                                           normalizer=P * args.group)
            loss.backward()
            sums["loss"] += float(loss.detach()) / processes.world / args.updates
            for key in ("ratio", "clip_fraction", "kl"):
                sums[key] += float(metrics.get(key, 0.0)) * int(mask.sum()) / args.updates
            worst = max(worst, float(metrics["ratio_max_deviation"])) if turn == 0 else worst
        if args.lora:
            processes.average_gradients(trained)
        norm = torch.nn.utils.clip_grad_norm_(trained, args.max_grad_norm)
        optimizer.step()
    norm = float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
    return {**sums, "ratio_max_deviation": worst, "sampling_mismatch": mismatch, "grad_norm": norm}


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation


def evaluate(model, rows, args, processes, batch=64):
    """Held-out figures of the likeliest answers: share of well-formed ones, mean |ΔV| and |ΔA| over the answers that can be
    read, and share of right classes over all."""
    mine = rows[processes.rank::processes.world]
    padded = mine + rows[:1] * (math.ceil(len(rows) / processes.world) - len(mine))  # all processes ask as often
    sums = dict.fromkeys(("answers", "format", "read", "v", "a", "right"), 0.0)
    for task in feedback.TASKS:
        for start in tqdm(range(0, len(padded), batch), desc=f"evaluation ({task})", leave=False,
                          disable=not processes.first):
            asked = padded[start:start + batch]
            with generating(model):
                answers = model.generate([feedback.ask(task, Image.open(row.image)) for row in asked],
                                         max_new_tokens=args.max_new_tokens, temperature=0)
            for row, answer in zip(mine[start:start + batch], answers):
                parsed = grpo.parse_answer(answer[0].text)
                sums["answers"] += 1
                sums["format"] += parsed is not None
                if task == "class":
                    sums["right"] += grpo.read_emotion(parsed) == row.label
                elif (told := grpo.read_va(parsed)) is not None:
                    sums["read"] += 1
                    sums["v"] += abs(told[0] - row.v)
                    sums["a"] += abs(told[1] - row.a)
    n = processes.total(sums)
    return {"format": n["format"] / n["answers"], "v_error": n["v"] / n["read"] if n["read"] else math.nan,
            "a_error": n["a"] / n["read"] if n["read"] else math.nan, "class_accuracy": n["right"] / len(rows)}


def table(figures):
    """Markdown of what `evaluate` gives."""
    return ("| format | V-Error | A-Error | class accuracy |\n| --- | --- | --- | --- |\n"
            f"| {figures['format']:.1%} | {figures['v_error']:.3f} | {figures['a_error']:.3f} "
            f"| {figures['class_accuracy']:.1%} |")


# ---------------------------------------------------------------------------------------------------------------------
# The run


def load_judge(args, processes):
    """(model, frozen copy or None, trained parameters). With --lora the reference is the model without its adapter."""
    if args.cuda_graphs and (processes.device.type != "cuda" or (processes.world > 1 and not args.lora)):
        raise UserError("--cuda-graphs: needs a GPU that holds the whole model; leave it out, or add --lora")

    def load(dtype, place):
        model = qwen_vl.QwenVL.from_pretrained(args.model, place, dtype)
        model.processor.image = replace(model.processor.image, max_pixels=args.max_pixels)
        return model

    if args.lora:
        model, reference = load(None, processes.device), None
        torch.manual_seed(args.seed)
        lora.add_lora(model, model.lora_targets(), args.rank, args.lora_alpha)
    else:
        place = "cpu" if processes.world > 1 else processes.device  # FSDP moves one block after the other
        model = load(torch.float32, place).requires_grad_(True)
        model.visual.requires_grad_(not args.freeze_vision)
        if processes.world > 1:
            shard(model, processes.device)
        reference = load(torch.bfloat16 if processes.device.type == "cuda" else torch.float32, place) if args.beta else None
        if reference is not None and processes.world > 1:
            shard(reference, processes.device)
    model.checkpointing, model.graphs = args.checkpointing, args.cuda_graphs
    return model, reference, [p for p in model.parameters() if p.requires_grad]


def shard(model, device):
    """FSDP2: every block is a unit, the rest is the root. On GPUs the weights are float32 and compute in bfloat16."""
    policy = MixedPrecisionPolicy(cast_forward_inputs=False)  # angles stay float32
    if device.type == "cuda":
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    for block in [*model.visual.blocks, *model.blocks]:
        fully_shard(block, mp_policy=policy)
    fully_shard(model, mp_policy=policy)
    for name in ("completion_hidden", "generate"):
        register_fsdp_forward_method(model, name)


def export(model, folder, args, processes):
    """Write the trained judge: a whole folder in bfloat16, as published, or the adapter."""
    if args.lora:
        if processes.first:
            lora.save_lora(folder, model, model.lora_targets(), args.rank, args.lora_alpha, args.model)
    elif processes.world == 1:
        model.save_pretrained(folder, torch.bfloat16)
    else:
        whole = {name: p.full_tensor().cpu() for name, p in model.named_parameters()}  # every process takes part
        if processes.first:
            with torch.device("meta"):
                plain = qwen_vl.QwenVL(model.config, model.processor)
            plain.load_state_dict(whole, assign=True)
            plain.save_pretrained(folder, torch.bfloat16)
    processes.wait()


def train(args, processes):
    rows, held_out = data.load_rows(args.data, "train"), data.load_rows(args.data, "test")[:args.eval_rows]
    total = args.steps or math.ceil(args.epochs * len(rows) * len(args.tasks) / args.batch)
    unsaved = ("out", "evaluate", "device")
    settings = {k: v for k, v in vars(args).items() if k not in unsaved} | {"data": str(args.data), "steps": total}
    run = training.Run(args.out, settings, processes, fixed=[k for k in settings if k not in FREE])
    state = run.load()
    model, reference, trained = load_judge(args, processes)
    limit = 1e-4 if model.norm.weight.dtype == torch.float32 and processes.device.type == "cpu" else 0.5  # bfloat16 rounds
    optimizer = torch.optim.AdamW(trained, lr=args.lr, weight_decay=0.0)
    start = 0
    if state:
        training.restore_state(state, trained, optimizer)
        start = state["step"]
        run.read_log(start)
    if processes.first:
        counts = (sum(p.numel() for p in which) / 1e6 for which in (model.parameters(), trained))
        cli.say("{}: {:,.1f} M parameters, {:,.1f} M trained, on {} × {}; ".format(
            args.model, *counts, processes.world, processes.device.type)
            + f"{len(rows):,} pictures, {', '.join(args.tasks)}, {total:,} steps of {args.batch} × {args.group} answers"
            + (f"; goes on after step {start:,}" if start else ""))

    def take_step(step):
        share = step / max(1, total - 1)
        optimizer.param_groups[0]["lr"] = lr = args.lr + (args.lr_end - args.lr) * share
        timer = training.Timer()
        rollout = roll_out(model, processes.share(questions_of(step, rows, args)), args, step, processes)
        rolled = timer.lap()
        metrics = update(model, reference, rollout, optimizer, args, processes, limit if step == start else math.inf)
        record = {**summary(rollout, metrics, processes), "lr": lr, "seconds_rollout": rolled,
                  "seconds_update": timer.lap(), "memory_gib": training.peak_memory(processes.device)}
        record["tokens_per_second"] = record["tokens"] / (record["seconds_rollout"] + record["seconds_update"])
        forms = {"reward": ".2f", "parses": ".0%", "kl": ".3f"}
        return record, {name: f"{record[name]:{form}}" for name, form in forms.items()}

    stopped = run.train("GRPO", start, total, args, take_step, lambda _: evaluate(model, held_out, args, processes),
                        lambda: training.state_of(trained, optimizer), CURVES)
    if stopped:
        return stopped
    export(model, args.out / "judge", args, processes)
    if processes.first:
        first, last = (next((r for r in order if "eval_format" in r), {}) for order in (run.records, run.records[::-1]))
        for name, record in (("before", first), ("after", last)):
            print(f"{name} GRPO, {len(held_out)} held-out pictures:")
            print(table({k.removeprefix("eval_"): math.nan if v is None else v for k, v in record.items()}))
        print(args.out / "judge")
    return 0


def summary(rollout, metrics, processes):
    """The log's figures of a step, over all processes."""
    greatest = {k: metrics.pop(k) for k in ("ratio_max_deviation", "sampling_mismatch")}
    norm = metrics.pop("grad_norm")
    G = rollout.rewards.shape[1]
    spread = rollout.rewards.std(dim=1) if G > 1 else torch.zeros(len(rollout.rewards))
    own = {**rollout.parts, **metrics, "answers": rollout.rewards.numel(), "reward": float(rollout.rewards.sum()),
           "groups": len(spread), "flat": int((spread < 1e-6).sum()), "spread": float(spread.sum()),
           "tokens": int(rollout.mask.sum())}
    n = processes.total(own)

    def mean(value, count):
        return n[value] / n[count] if n[count] else None

    return {"loss": n["loss"], "reward": mean("reward", "answers"), "reward_format": mean("format", "answers"),
            "reward_va": mean("va", "va_count"), "reward_class": mean("class", "class_count"),
            "parses": mean("format", "answers"), "reward_std": mean("spread", "groups"),
            "zero_spread": mean("flat", "groups"),
            "length": mean("length", "answers"), "cut": mean("cut", "answers"), "ratio": mean("ratio", "tokens"),
            **{k: max(processes.gather([v])) for k, v in greatest.items()}, "clip_fraction": mean("clip_fraction", "tokens"),
            "kl": mean("kl", "tokens"), "grad_norm": norm, "tokens": n["tokens"]}


def parse_args(argv=None):
    def numbers(text):
        return tuple(float(x) for x in text.split(","))

    def words(text):
        return tuple(text.split(","))

    parser = cli.make_parser(__doc__, SETTINGS, "runs/judge", {"tasks": words, "alpha": numbers})
    parser.add_argument("--steps", type=int, help="stop after so many steps in place of --epochs")
    parser.add_argument("--lora", action="store_true", help="train an adapter of the language model, the rest frozen")
    parser.add_argument("--freeze-vision", action="store_true", help="train the language model only")
    parser.add_argument("--checkpointing", action="store_true", help="recompute activations: less memory, a third slower")
    parser.add_argument("--cuda-graphs", action="store_true", help="each step of the answers as one CUDA graph")
    parser.add_argument("--evaluate", action="store_true", help="no training: held-out figures of --model")
    return cli.parse(parser, SETTINGS, argv)


def check(args):
    """Refuse senseless settings before anything is loaded. Raises UserError."""
    bounds = {"group": (2, 1024), "batch": (1, 4096), "epochs": (0, 1e6), "lr": (0, 1), "lr_end": (0, 1), "beta": (0, 100),
              "clip": (0, 1), "epsilon": (0, 8), "temperature": (1e-3, 100), "max_new_tokens": (1, 100_000),
              "updates": (1, 100), "micro": (1, 4096), "max_grad_norm": (0, 1e9), "rank": (1, 4096), "eval_rows": (1, 10**9),
              "eval_every": (0, 10**9), "save_every": (1, 10**9), "seed": (0, 2**31), "max_pixels": (28 * 28, 10**9)}
    cli.check_bounds(args, bounds)
    if not args.tasks or any(task not in feedback.TASKS for task in args.tasks):
        raise UserError(f"--tasks {','.join(args.tasks)}: expected {','.join(feedback.TASKS)} or one of them")
    cli.check_choices(args, {"reward": ("step", "continuous")})
    if len(args.alpha) != 2 or min(args.alpha) < 0:
        raise UserError(f"--alpha {args.alpha}: expected two weights, e.g. 0.25,0.75")
    if args.steps is not None and args.steps < 1:
        raise UserError(f"--steps {args.steps}: expected at least 1")


def report(args, processes):
    """Print the held-out figures of --model."""
    rows = data.load_rows(args.data, "test")[:args.eval_rows]
    model, _, _ = load_judge(argparse.Namespace(**{**vars(args), "beta": 0.0}), processes)  # no reference is needed
    figures = evaluate(model, rows, args, processes)
    if processes.first:
        print(table(figures))
        print(json.dumps({"model": args.model, "pictures": len(rows), **figures}))
    return 0


def main(argv=None):
    args = parse_args(argv)
    return training.run_program(args, check, report if args.evaluate else train)


if __name__ == "__main__":
    sys.exit(main())
