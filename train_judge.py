"""Train the judge by GRPO (EmoFeedback², section 3.1): better answers of its own become likelier.

    python train_judge.py --data tiny/cache/dataset --out runs/judge       # the miniature, on a CPU
    python train_judge.py --preset paper --lora --data DATASET --out runs/judge       # 7B, one GPU
    torchrun --nproc-per-node 8 train_judge.py --preset paper --data DATASET --out runs/judge
    python train_judge.py --evaluate --model runs/judge/judge --data DATASET    # held-out figures

One sample is one picture and one question: how much valence and arousal, or which of eight
emotions. A step asks a batch of questions, samples a group of answers to each, rewards each answer
for its form and for being right, and compares it with the rest of its group. Without `--lora` all
weights are trained, on GPUs sharded by FSDP2. A run started again with the same command
goes on after its last checkpoint.

The order of this file: settings, rollout, update, evaluation, models, the loop (`train`). Shapes: P
questions of this process in a step, p of them in one pass, G answers to each, of at most C tokens.
"""

if __name__ == "__main__":  # before torch, whose import takes seconds: Ctrl-C ends in one line
    from parts import interrupts
    interrupts.catch()

import json
import math
import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

import data
import feedback
import grpo
import qwen_vl
from evaluation.metrics import label_floor
from parts import checkpoints, cli, hub, lora, presets, sharding, weights
from parts import run as training
from parts.cli import integer, number
from parts.files import MOST_PIXELS, open_picture

TINY = Path(__file__).resolve().parent / "tiny" / "weights" / "judge"
VA_WEIGHTS = {"valence": 0.25, "arousal": 0.75}  # α₁ and α₂ of the V-A reward
TASK_WEIGHTS = {"regression": 1.0, "class": 1.0}
LORA_LR = 1e-5  # an adapter starts from nothing and needs larger steps than the weights
# Methods that training calls in place of forward, so FSDP2 must gather the weights for them, too.
USED = ("completion_hidden", "generate")
MISMATCH = {"mean": 0.1, "share": 0.01}  # in bfloat16; an H200 gave 0.012 and 0
SETTINGS = {  # flag: (paper's value, the miniature's, type, help)
    "model": ("Qwen/Qwen2.5-VL-7B-Instruct", str(TINY), str, "folder or hub id to start from"),
    "group": (8, 8, integer(2, 1024), "[--num-generations] answers to each question, G"),
    "batch": (16, 16, integer(1, 4096), "questions in a step, over all processes"),
    "epochs": (5.0, 0.75, number(0, 1e6), "passes over the training pictures"),
    "lr": (1e-6, 3e-4, number(0, 1), "[--learning-rate] learning rate at the start; paper with "
           f"--lora: {LORA_LR:g}"),
    "lr_end": (1e-9, 1e-5, number(0, 1), "and at the end, linear in between"),
    "beta": (1e-3, 1e-3, number(0, 100), "weight of the KL to the reference (k3)"),
    "clip": (0.2, 0.2, number(0, 1), "range of the ratio"),
    "epsilon": (0.70, 0.70, number(0, 8), "an answer this near is right (step and nested reward)"),
    "va_weights": (VA_WEIGHTS, VA_WEIGHTS, cli.weights_of(VA_WEIGHTS), "of the V-A reward's parts"),
    "tasks": (feedback.TASKS, feedback.TASKS, cli.some_of(feedback.TASKS), "questions (Table 5)"),
    "task_weights": (TASK_WEIGHTS, TASK_WEIGHTS, cli.weights_of(TASK_WEIGHTS),
                     "of their rewards beside that of the form"),
    "reward": ("step", "step", ("step", "nested", "continuous"), "V-A reward (Table 4)"),
    "temperature": (1.0, 1.0, number(1e-3, 100), "of the sampled answers"),
    "max_new_tokens": (feedback.ANSWER_LIMIT, feedback.ANSWER_LIMIT, integer(1, 100_000),
                       "longest answer"),
    "iterations": (1, 1, integer(1, 100), "[--num-iterations] updates by each set of answers"),
    "micro": (1, 8, integer(1, 4096), "questions in one forward and backward pass of a process"),
    "max_grad_norm": (1.0, 1.0, number(0, 1e9), "the gradient is scaled down to this norm"),
    "mismatch": (MISMATCH, MISMATCH, cli.weights_of(MISMATCH),
                 "most that sampling and training may differ: |Δ log p|, share of far tokens"),
    "max_pixels": (512 * 512, 128 * 128, integer(28 * 28, MOST_PIXELS),
                   "larger pictures are shrunk"),
    "lora_rank": (64, 16, integer(1, 4096), "of the adapter (--lora)"),
    "lora_alpha": (128.0, 32.0, number(0, 1e6), "scale of the adapter (--lora)"),
    "eval_every": (200, 0, integer(0, 10**9), "steps between evaluations; 0: only in the end"),
    "eval_rows": (1000, 500, integer(1, 10**9), "test pictures in an evaluation"),
    "save_every": (100, 50, integer(1, 10**9), "steps between checkpoints"),
    "save_minutes": (20.0, 0.0, number(0, 1e6), "and minutes, whichever ends first; 0: no limit"),
    "questions": (None, None, feedback.QUESTIONS, "JSON file with other questions to the judge"),
    "seed": (0, 0, integer(0, 2**31), "of the order of questions and of all answers"),
}
GROUPS = {  # of --help: first setting, title
    "model": "rollout", "lr": "update", "epsilon": "reward", "temperature": "answers",
    "micro": "memory", "lora_rank": "adapter", "eval_every": "evaluation, checkpoints"}
RARE = ("tensorboard", "questions", "iterations", "max_grad_norm", "mismatch", "lora_alpha",
        "eval_rows", "save_minutes")
CURVES = ("reward", "reward_format", "reward_va", "reward_class", "parses", "length", "kl",
          "clip_fraction", "zero_spread", "grad_norm", "eval_v_error", "eval_a_error",
          "eval_class_accuracy", "tokens_per_second")

# --------------------------------------------------------------------------------------------------
# Rollout: questions, answers, rewards


@dataclass(frozen=True)
class Question:
    """One sample: a picture, a task, and what is known of the picture."""
    seed: int  # of its answers
    task: str
    row: data.Row


@dataclass
class Rollout:
    """The answers to this process's questions, padded on the right."""
    prompts: list  # P of qwen_vl's Prompt
    tokens: torch.Tensor  # [P,G,C]
    mask: torch.Tensor  # [P,G,C], True at tokens of an answer
    log_probs: torch.Tensor  # [P,G,C], as sampling gave them
    rewards: torch.Tensor  # [P,G]
    sums: dict  # over the answers, for the log


def questions_of(step, rows, args):
    """The questions of a step; every epoch is its own permutation of all pictures and tasks."""
    questions = []
    indices = training.batch_indices(step, args.batch, len(rows) * len(args.tasks), args.seed)
    for i, index in enumerate(indices):
        row, task = divmod(index, len(args.tasks))
        # Of the step and the index in it, so that it does not matter which process asks.
        seed = (args.seed * 1_000_003 + step) * 4096 + i
        questions.append(Question(seed, args.tasks[task], rows[row]))
    return questions


def rewards_of(text, question, args):
    """{part: reward} of one answer; their sum is what GRPO sees."""
    row = question.row
    form = {"format": grpo.format_reward(text)}
    weight = args.task_weights.get(question.task, 0.0)
    if question.task == "class":
        return form | {"class": weight * grpo.class_reward(text, row.label)}
    weights = [weight * args.va_weights.get(part, 0.0) for part in VA_WEIGHTS]
    return form | {"va": grpo.va_reward(text, row.v, row.a, args.reward, args.epsilon, weights)}


def roll_out(model, questions, args, run):
    """The Rollout of G sampled answers to each question; cut short if the run is to stop."""
    # 1. answers
    prompts = [model.processor(feedback.ask(q.task, open_picture(q.row.image))) for q in questions]
    generators = [torch.Generator().manual_seed(q.seed) for q in questions]
    bar = partial(tqdm, desc="answers", leave=False, delay=2, disable=not run.processes.first)
    with sharding.weights_gathered(model):
        groups = model.generate(prompts, args.group, args.max_new_tokens, args.temperature,
                                generators, lambda steps: run.until_asked(bar(steps)))
    # 2. rewards
    sums = dict.fromkeys(("reward_format", "reward_va", "reward_class", "asked_format", "asked_va",
                          "asked_class", "cut"), 0.0)
    totals = []
    for question, group in zip(questions, groups, strict=True):
        for answer in group:
            parts = rewards_of(answer.text, question, args)
            totals.append(sum(parts.values()))
            for part, reward in parts.items():
                sums[f"reward_{part}"] += reward
                sums[f"asked_{part}"] += 1
            sums["cut"] += not answer.finished
    rewards = torch.tensor(totals).view(len(questions), args.group)
    # 3. padding
    answers = [answer for group in groups for answer in group]
    tokens = pad_sequence([answer.tokens for answer in answers], True, -1)  # [P·G,C]
    tokens = tokens.view(*rewards.shape, -1).to(run.processes.device)  # [P,G,C]
    log_probs = pad_sequence([answer.log_probs for answer in answers], True)
    log_probs = log_probs.view(tokens.shape).to(run.processes.device)
    return Rollout(prompts, tokens.clamp(min=0), tokens >= 0, log_probs, rewards, sums)


# --------------------------------------------------------------------------------------------------
# Update


def log_probs_of(model, rollout, part, args):
    """Log-probabilities [p·G,C] of the answers' tokens under the model; part: a slice of P."""
    tokens = rollout.tokens[part]
    hidden = model.completion_hidden(rollout.prompts[part], tokens)  # [p,G,C,D]
    log_probs = grpo.token_log_probs(
        hidden.flatten(0, 2), model.head_weight, tokens.flatten(), args.temperature)  # [p·G·C]
    return log_probs.view(-1, tokens.shape[-1])


def update(model, reference, rollout, advantages, optimizer, args, processes, check):
    """args.iterations steps of the optimizer, each by the gradients of all micro-batches.

    reference: see `load_reference`. advantages [P,G]. check: see `check_on_policy`. Returns
    ({metric: sum over this process's tokens}, {metric: values whose greatest counts}, norm).
    """
    trained = optimizer.param_groups[0]["params"]
    P = len(rollout.prompts)
    parts = [slice(start, start + args.micro) for start in range(0, P, args.micro)]
    references = [None] * len(parts)
    if reference is not None:
        with torch.no_grad(), lora.lora_disabled(reference):
            references = [log_probs_of(reference, rollout, part, args) for part in parts]
    sums = dict.fromkeys(("loss", "ratio", "clip_fraction", "kl"), 0.0)
    greatest = {"ratio_max_deviation": []}
    olds = []
    norms = []
    for turn in range(args.iterations):
        optimizer.zero_grad(set_to_none=True)
        for i, part in enumerate(parts):
            # 1. log-probabilities; before any update the same function gives the old ones, so that
            #    the ratio is exactly 1
            new = log_probs_of(model, rollout, part, args)  # [p·G,C]
            mask = rollout.mask[part].flatten(0, 1)
            if turn == 0:
                olds.append(new.detach())
            # 2. loss; gradients are averaged over processes, so each divides by its own answers
            loss, metrics = grpo.grpo_loss(
                new, olds[i], references[i], advantages[part].flatten(), mask, args.clip, args.beta,
                normalizer=P * args.group)
            loss.backward()
            # 3. metrics, means over the tokens, become sums
            sums["loss"] += float(loss.detach()) / processes.world / args.iterations
            for name in ("ratio", "clip_fraction", "kl"):
                sums[name] += float(metrics.get(name, 0.0)) * int(mask.sum()) / args.iterations
            if turn == 0:
                greatest["ratio_max_deviation"].append(float(metrics["ratio_max_deviation"]))
        # 4. what sampling gave may only differ by rounding
        if turn == 0:
            figures = grpo.check_on_policy(
                rollout.log_probs.flatten(0, 1), torch.cat(olds), rollout.mask.flatten(0, 1),
                args.mismatch if check else {}, 1e-3 if processes.device.type == "cpu" else 1.0)
            greatest |= {f"mismatch_{name}": [figure] for name, figure in figures.items()}
        # 5. step of the optimizer; FSDP2 has averaged its gradients in the backward pass
        if args.lora:
            processes.average_gradients(trained)
        norms.append(sharding.clip_grad_norm(trained, args.max_grad_norm))
        if math.isfinite(norms[-1]):  # else it is skipped, by all processes alike
            optimizer.step()
    return sums, greatest, sum(norms) / len(norms)


# --------------------------------------------------------------------------------------------------
# Evaluation


def evaluate(model, rows, args, processes, run=None, batch=64):
    """{eval_…: figure} of the likeliest answers about held-out rows: the share of well-formed ones,
    mean |ΔV| and |ΔA| over the answers that can be read, the least that these could be for labels
    that were drawn, the share of right classes over all. Empty if `run` is to stop."""
    mine = rows[processes.rank::processes.world]
    # All processes must have as many batches, so some ask about the first row once more.
    padded = mine + rows[:1] * (math.ceil(len(rows) / processes.world) - len(mine))
    sums = dict.fromkeys(("format", "read", "v", "a", "right"), 0.0)
    for task in feedback.TASKS:
        starts = range(0, len(padded), batch)
        for start in tqdm(starts, f"evaluation ({task})", leave=False, disable=not processes.first):
            asked = padded[start:start + batch]
            questions = [feedback.ask(task, open_picture(row.image)) for row in asked]
            with sharding.weights_gathered(model):
                groups = model.generate(questions, 1, args.max_new_tokens, temperature=0,
                                        progress=run.until_asked if run else iter)
            if run and run.stopped():  # all processes leave after the same batch
                return {}
            for row, (answer,) in zip(mine[start:start + batch], groups):
                said = feedback.read_answer(answer.text, task, strict=True)
                sums["format"] += grpo.format_reward(answer.text)
                if task == "class":
                    sums["right"] += said == row.label
                elif said is not None:
                    sums["read"] += 1
                    sums["v"] += abs(said[0] - row.v)
                    sums["a"] += abs(said[1] - row.a)
    total = processes.total(sums)
    read = total["read"] or math.nan
    answers = len(rows) * len(feedback.TASKS)
    v_floor, a_floor = label_floor(rows)
    return {"eval_format": total["format"] / answers, "eval_v_error": total["v"] / read,
            "eval_a_error": total["a"] / read, "eval_v_floor": v_floor, "eval_a_floor": a_floor,
            "eval_class_accuracy": total["right"] / len(rows)}


def show_figures(args, processes):
    """Print the held-out figures of --model: a table, and a line of JSON for scripts."""
    rows = data.load_rows(args.data, "test")[:args.eval_rows]
    hub.fetch(lora.files_with_base(args.model))
    figures = evaluate(load_judge(args, processes), rows, args, processes)
    if processes.first:
        figures = {name.removeprefix("eval_"): figure for name, figure in figures.items()}
        print(cli.markdown([figures, [f"{figure:.3f}" for figure in figures.values()]]))
        print("V {v_error:.2f}, A {a_error:.2f}; the labels allow at best V {v_floor:.2f}, "
              "A {a_floor:.2f}".format(**figures))
        # JSON has no NaN, which an error is if no answer could be read
        plain = {name: None if math.isnan(figure) else figure for name, figure in figures.items()}
        print(json.dumps({"model": args.model, "pictures": len(rows), **plain}))


# --------------------------------------------------------------------------------------------------
# Models


def load_judge(args, processes):
    """The judge with its trained parameters: all, in float32, an adapter, or none (--evaluate)."""
    if args.lora or args.evaluate:  # on a GPU in bfloat16, which float32 weights are cast to, too
        model = qwen_vl.QwenVL.from_pretrained(args.model, processes.device)
    else:
        model = sharding.load(qwen_vl.QwenVL, args.model, processes, USED, torch.float32)
        model.requires_grad_(True)
    if args.lora and not args.evaluate:
        torch.manual_seed(args.seed)
        lora.add_lora(model, model.lora_targets(), args.lora_rank, args.lora_alpha)
    limits = model.processor.image
    model.processor.image = replace(limits, max_pixels=args.max_pixels,
                                    min_pixels=min(limits.min_pixels, args.max_pixels))
    model.checkpointing = args.checkpointing
    return model


def load_reference(model, args, processes):
    """What the KL is to: a frozen copy, or the model, which is then asked without its adapter."""
    if not args.beta:
        return None
    if args.lora:
        return model
    return sharding.load(qwen_vl.QwenVL, args.model, processes, USED)


def export(model, folder, args, processes):
    """Write the trained judge: a whole folder in bfloat16, as published, or the adapter."""
    if args.lora:
        if processes.first:
            lora.save_lora(folder, model, args.model)
            model.processor.save_pretrained(folder)
    else:
        make = partial(qwen_vl.QwenVL, model.config, model.processor)
        plain = sharding.whole(model, make, torch.bfloat16, processes.first)
        if processes.first:
            plain.save_pretrained(folder)
    processes.wait()


# --------------------------------------------------------------------------------------------------
# The loop


def train(args, processes):
    """Train the judge, from the last checkpoint on if there is one. Returns the exit code."""
    # rows, the run's folder, the model and its reference
    training.check_shares(args.batch, "--batch", processes)
    rows = data.load_rows(args.data, "train")
    held_out = data.load_rows(args.data, "validation")[:args.eval_rows]
    args.steps = args.steps or math.ceil(args.epochs * len(rows) * len(args.tasks) / args.batch)
    hub.fetch(lora.files_with_base(args.model))
    files = {"model": weights.fingerprint(lora.with_base(args.model))}
    settings = vars(args) | {"rows": data.digest(rows), "files": files}
    run = training.Run(args.out, settings, processes, CURVES, f"{args.model}, GRPO")
    model = load_judge(args, processes)
    reference = load_reference(model, args, processes)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=args.lr, weight_decay=0.0)
    state = checkpoints.state_of(optimizer)
    done = run.load(state, args.steps)
    if processes.first:
        cli.say(f"{args.model}: {training.sizes(model, processes)}; {len(rows):,} pictures, "
                f"{args.steps:,} steps of {args.batch} × {args.group} answers")
    run.say_disk(state, lora.file_size(model) if args.lora else 2 * weights.count_parameters(model),
                 args)
    record = run.read_log(done)
    # a new run, or one that was stopped in an evaluation
    if training.evaluation_due(done, args) and not training.figures_of(record):
        run.log(record | evaluate(model, held_out, args, processes, run))

    start = done
    bar = training.steps_bar("GRPO", start, args.steps, processes)
    with run:
        for step in bar:
            timer = training.Timer()
            # 1. questions
            questions = processes.share(questions_of(step, rows, args))
            # 2. rollout: answers and rewards
            rollout = roll_out(model, questions, args, run)
            if run.stopped():
                break  # what there is of this step is dropped
            seconds_rollout = timer.lap()
            # 3. advantages: each answer against its group
            advantages = grpo.group_advantages(rollout.rewards).to(processes.device)  # [P,G]
            # 4. update
            lr = training.linear(args.lr, args.lr_end, step, args.steps)
            optimizer.param_groups[0]["lr"] = lr
            updated = update(model, reference, rollout, advantages, optimizer, args, processes,
                             check=step == start)
            seconds_update = timer.lap()
            done = step + 1
            # 5. log
            record = {"step": done, **summary(rollout, *updated, processes), "lr": lr,
                      "seconds_rollout": seconds_rollout, "seconds_update": seconds_update,
                      "memory_gib": training.peak_memory(processes.device)}
            record["tokens_per_second"] = record["tokens"] / (seconds_rollout + seconds_update)
            record["skipped"] = run.count_skipped(record["grad_norm"], [
                {"row": q.row.id, "task": q.task, "seed": q.seed} for q in questions])
            run.warn("do not have the form that was asked for", 1 - record["parses"])
            bar.set_postfix({name: f"{record[name]:.3f}" for name in ("reward", "parses", "kl")})
            # 6. evaluate
            if training.evaluation_due(done, args):
                record |= evaluate(model, held_out, args, processes, run)
            run.log(record)
            # 7. save
            if run.save_due(done, args):
                run.save(done, checkpoints.state_of(optimizer))
            if run.stopped():
                break
        if done > run.saved:
            run.save(done, checkpoints.state_of(optimizer))
    bar.close()
    if not training.figures_of(run.records[-1]) or done < args.steps:
        return run.stop_code(done)

    export(model, args.out / "judge", args, processes)
    if processes.first:
        print(f"{len(held_out)} held-out pictures:\n{run.evaluations()}\n{args.out / 'judge'}")
    return 0


def summary(rollout, sums, greatest, norm, processes):
    """The log's figures of a step, over all processes; None for a mean over nothing."""
    spread = rollout.rewards.std(dim=1)  # [P]
    total = processes.total({
        **rollout.sums, **sums, "answers": rollout.rewards.numel(), "groups": len(spread),
        "reward": float(rollout.rewards.sum()), "reward_std": float(spread.sum()),
        "zero_spread": int((spread < 1e-6).sum()), "tokens": int(rollout.mask.sum())})
    counts = {
        "reward": "answers", "reward_format": "answers", "cut": "answers",
        "reward_va": "asked_va", "reward_class": "asked_class", "reward_std": "groups",
        "zero_spread": "groups", "ratio": "tokens", "clip_fraction": "tokens", "kl": "tokens"}
    means = {name: total[name] / total[count] if total[count] else None
             for name, count in counts.items()}
    greatest = {name: max(processes.gather(values)) for name, values in greatest.items()}
    return {"loss": total["loss"], **means, "parses": means["reward_format"], **greatest,
            "length": total["tokens"] / total["answers"], "grad_norm": norm,
            "tokens": total["tokens"]}


def parse_args(argv=None):
    parser = cli.training_parser(__doc__, SETTINGS, "runs/judge", GROUPS, RARE)
    add = parser.add_argument
    add("--steps", type=integer(1, 10**7), help=f"in place of --epochs: {cli.STEPS_HELP}")
    add("--lora", action="store_true", help="train an adapter of the language model only")
    add("--evaluate", action="store_true", help="no training: held-out figures of --model")
    args = parser.parse_args(argv)
    presets.choose(args, parser.error)
    if args.lora and args.lr is None and args.preset == "paper":
        args.lr = LORA_LR
    return presets.fill_settings(args, SETTINGS)


def main(argv=None):
    args = parse_args(argv)
    feedback.PROMPTS.update(args.questions or {})
    return training.run_in_processes(show_figures if args.evaluate else train, args)


if __name__ == "__main__":
    sys.exit(main())
