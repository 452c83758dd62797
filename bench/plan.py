"""What training needs of each GPU, before anything is loaded: memory, work and time.

    python -m bench.plan                               # train_gen.py, on 1, 8 and 64 GPUs
    python -m bench.plan --what judge                  # train_judge.py, all weights under FSDP2
    python -m bench.plan --what judge --lora --gpus 1  # an adapter

The real modules are built on PyTorch's meta device, where tensors have shapes and no data, and the
calls of a training step run on them (`bench/step_parts.py`) while their operators are counted
(`bench/counter.py`). Nothing is derived from a formula of the architecture, so a change of the
models changes the plan. The flags are those of the training program, with the paper's values. In
order: GPUs and assumptions, flags, time, what the generator needs, what the judge needs, tables.

Left out: the CUDA context (about 0.5 GB), the allocator's waste, evaluations, loading, saving. All
bytes are decimal: 1 GB = 10⁹ bytes. n: pictures or questions in one batch.
"""

if __name__ == "__main__":  # before torch, whose import takes seconds: Ctrl-C ends in one line
    from parts import interrupts
    interrupts.catch()

import argparse
import functools
import math
import sys
from dataclasses import dataclass

import numpy as np
import torch

import data
import feedback
from bench import step_parts
from bench.counter import size_of
from bench.step_parts import ANSWER, GENERATORS, JUDGES, SCORERS, Part
from parts import cli
from parts.cli import UserError, integer, number
from parts.pipeline import PAPER, PROMPTS_KEPT, READ_AT_ONCE
from parts.presets import FAST
from parts.run import KEEP


@dataclass(frozen=True)
class GPU:
    name: str
    bfloat16: float  # FLOP/s of dense matrix products, by NVIDIA's data sheet
    bandwidth: float  # bytes/s of its memory
    memory: float  # bytes, as sold


H100 = GPU("H100", 989e12, 3.35e12, 80e9)  # an H200 computes as fast
GPUS = (H100, GPU("H20", 148e12, 4.0e12, 96e9))
# Measured on an H200 (docs/gpu.md), as shares of its data sheet's 989 TFLOP/s and 4.8 TB/s.
PRODUCT = 0.79  # 781 TFLOP/s: the best that a large matrix product reaches
FORWARD = 0.43  # 422 TFLOP/s: the generator's forward pass, launches included
BACKWARD = 0.25  # 244 TFLOP/s: forward and backward pass with an adapter
TRAFFIC = 0.45  # 38 to 50 %: bytes/s of the judge's decode
LINKS = 0.6  # assumed share of the bytes/s of links
NODE = 8  # GPUs of a machine
NVLINK = 450e9  # bytes/s out of a GPU within a machine
NETWORK = 50e9  # and between machines
ROWS = 14_563  # training prompts and pictures of the paper

PUBLISHED = (  # others' training of SD3.5-Medium: project, GPUs, what, GPU-hours, TFLOP/s of a GPU
    ("radixark/miles_diffusion", "2 × H200",
     "Flow-GRPO, OCR: 600 rollouts of 128 pictures, 110 s each", "37", "173"),
    ("NVlabs/finite-difference-flow-optimization", "4 × H200",
     "PickScore and a VLM's reward: 100 epochs in 12 h", "48", ""),
    ("yifan123/flow_grpo (issue 96)", "24 of the H series",
     "Flow-GRPO, OCR: 1,000 steps in 8 h", "192", "206"),
)

def gpu_counts(text):
    """An argparse type: "1,8,64" -> (1, 8, 64)."""
    return tuple(integer(1, 10**6)(part) for part in text.split(","))


SETTINGS = {  # flag of train_gen.py: (paper's value, type or words to choose from, help)
    "model": (PAPER, tuple(GENERATORS), "the generator"),
    "judge": ("Qwen/Qwen2.5-VL-7B-Instruct", (*JUDGES, "none"), "the judge"),
    "pickscore": ("yuvalkirstain/PickScore_v1", (*SCORERS, "none"), "PickScore"),
    "form": (("numbers",), cli.some_of(data.FORMS), "how the target enters the prompt"),
    "group": (8, integer(2, 1024), "pictures of each prompt, G"),
    "group_start": ("own", ("own", "shared"), "shared: a group is one picture up to the window"),
    "batch": (16, integer(1, 4096), "prompts in a step, over all processes, P"),
    "steps": (1000, integer(1, 10**7), "training steps"),
    "sde_steps": (10, integer(1, 1000), "steps of the stochastic sampler, T"),
    "skip_last": (1, integer(0, 999), "of the T steps so many at the end are not trained"),
    "window": (0, integer(0, 1000), "so many steps are stochastic and trained; 0: all"),
    "window_within": (0, integer(0, 1000), "and lie within the first so many; 0: anywhere"),
    "guidance": (4.5, number(0, 100), "classifier-free guidance; above 1 a step has two halves"),
    "guidance_gradient": ("conditional", ("conditional", "both"), "halves that are differentiated"),
    "size": (512, cli.picture_side, "side of the pictures in pixels"),
    "beta": (0.1, number(0, 1000), "weight of the KL; 0: no reference is computed"),
    "lora_rank": (32, integer(1, 4096), "of the adapter"),
    "micro": (8, integer(1, 4096), "pictures in one forward and backward pass of a process"),
    "encoders": ("gpu", ("gpu", "cpu", "leave"), "where the text encoders live"),
}
JUDGE_SETTINGS = {  # the same of train_judge.py
    "model": ("Qwen/Qwen2.5-VL-7B-Instruct", tuple(JUDGES), "the judge"),
    "group": (8, integer(2, 1024), "answers to each question, G"),
    "batch": (16, integer(1, 4096), "questions in a step, over all processes, P; at least --gpus"),
    "epochs": (5.0, number(0, 1e6), "passes over the training pictures"),
    "tasks": (feedback.TASKS, cli.some_of(feedback.TASKS), "questions about each picture"),
    "beta": (1e-3, number(0, 100), "weight of the KL; 0: no reference is computed"),
    "max_new_tokens": (512, integer(2, 100_000), "longest answer, for which memory must do"),
    "answer": (ANSWER, integer(2, 100_000), "tokens of a step's longest answer, assumed for time"),
    "micro": (1, integer(1, 4096), "questions in one forward and backward pass of a process"),
    "max_pixels": (512 * 512, integer(28 * 28, 10**9), "of a picture, all taken as that large"),
    "lora_rank": (64, integer(1, 4096), "of the adapter (--lora)"),
}


def parse_args(argv=None):
    # The two trainings share flags with different meanings, so the program is asked for first.
    what = cli.parser(None, add_help=False)
    what.add_argument("--what", choices=("generator", "judge"), default="generator",
                      help="whose training to plan (default: generator)")
    what.add_argument("--preset", choices=("paper", "fast"), default="paper",
                      help="whose values the defaults are; the miniature needs no plan")
    asked, _ = what.parse_known_args(argv)
    of_judge = asked.what == "judge"
    changed = FAST if asked.preset == "fast" else {}
    parser = cli.parser(__doc__, parents=[what])
    if of_judge and changed:
        parser.error("--preset fast: only the generator's training has one")
    counts = (1, 8, 32) if changed else (1, 8, 64)
    parser.add_argument("--gpus", type=gpu_counts, default=counts,
                        help=f"numbers of GPUs to plan for (default: {cli.shown(counts)})")
    parser.add_argument("--efficiency", type=number(0.01, PRODUCT), default=0.2,
                        help="share of an H100's data sheet FLOP/s that a whole training step "
                             "reaches; 0.18 to 0.2 by what others publish (default: 0.2)")
    parser.add_argument("--checkpointing", action=argparse.BooleanOptionalAction, default=of_judge,
                        help="recompute activations (default: only for the judge)")
    for name, (value, kind, text) in (JUDGE_SETTINGS if of_judge else SETTINGS).items():
        options = {"choices": kind} if isinstance(kind, tuple) else {"type": kind}
        value = changed.get(name, value)
        parser.add_argument("--" + name.replace("_", "-"), default=value, **options,
                            help=f"{text} (default: {cli.shown(value)})")
    if of_judge:
        parser.add_argument("--lora", action="store_true",
                            help="train an adapter of the language model only")
    else:
        parser.add_argument("--no-t5", action="store_true", help="leave T5 out")
    return parser.parse_args(argv)


# --------------------------------------------------------------------------------------------------
# Time


@dataclass(frozen=True)
class Speed:
    """How fast a GPU is taken to be: a column of seconds in the tables."""
    name: str
    gpu: GPU
    forward: float  # share of an H100's FLOP/s that passes without gradients reach, all told
    backward: float  # and passes with them


def speeds(efficiency):
    own = Speed("H100 at our rates", H100, FORWARD, BACKWARD)
    return [*(Speed(gpu.name, gpu, efficiency, efficiency) for gpu in GPUS), own]


def cost(part, speeds):
    """Array of a Part's FLOP, bytes moved and seconds at each of `speeds`."""
    work = part.counter
    return part.times * np.array(
        [work.flops, work.traffic, *(seconds_of(part, speed) for speed in speeds)])


def seconds_of(part, speed):
    """Seconds of one call."""
    # A step computes products for a part of its time. For the rest it moves memory and launches
    # kernels, which takes all GPUs of the list as long: their memories are about as fast.
    share = speed.backward if part.kind == "backward" else speed.forward
    rest = 1 / share - 1 / PRODUCT
    flops = part.counter.flops
    arithmetic = flops / (PRODUCT * speed.gpu.bfloat16) + flops * rest / H100.bfloat16
    if part.kind != "memory":
        return arithmetic
    moving = part.counter.traffic / (speed.gpu.bandwidth * TRAFFIC)
    return max(arithmetic, moving, part.launches)


def sending(size, gpus, speeds):
    """Like `cost`: a GPU sends so many bytes to the others of so many."""
    link = NVLINK if gpus <= NODE else NETWORK
    return np.array([0, size, *[size / (link * LINKS)] * len(speeds)])


# --------------------------------------------------------------------------------------------------
# What the generator's training needs


class GeneratorPlan:
    """The measurements of the settings, each made once."""

    def __init__(self, args):
        self.args = args
        self.speeds = speeds(args.efficiency)
        self.models = models = step_parts.build(args)
        self.drawing = functools.cache(functools.partial(step_parts.drawing_parts, models, args))
        self.judging = functools.cache(functools.partial(step_parts.judging_parts, models, args))
        self.scoring = functools.cache(functools.partial(step_parts.scoring_parts, models, args))
        self.update = functools.cache(functools.partial(step_parts.update_parts, models, args))
        self.optimizer, self.moments = step_parts.optimizer_counter(models.trained, ema=True)
        self.chosen = peak_name(args.encoders != "gpu", args.checkpointing)  # of the peaks
        self.title = (f"{args.batch} prompts × {args.group} pictures of {args.size} px a step, at "
                      f"most {args.micro} in one pass")

    @staticmethod
    def check(args):
        """Raises UserError for settings that do not fit together."""
        pictures = args.batch * args.group
        for gpus in args.gpus:
            if pictures % gpus:
                raise UserError(f"--gpus {gpus}: the {pictures} pictures of a step (--batch "
                                f"{args.batch} × --group {args.group}) cannot be shared by "
                                f"{gpus}; choose a divisor")
            if args.group_start == "shared" and args.batch % gpus:
                raise UserError(f"--gpus {gpus}: with --group-start shared a group lies on one of "
                                f"them, so --batch {args.batch} must be a multiple")
        if args.group_start == "shared" and args.micro % args.group:
            raise UserError(f"--micro {args.micro}: with --group-start shared expected a multiple "
                            f"of --group {args.group}")
        trained = args.sde_steps - args.skip_last
        limits = {"skip_last": args.sde_steps - 1, "window_within": trained,
                  "window": args.window_within or trained}  # as in train_gen.py
        for name, most in limits.items():
            if getattr(args, name) > most:
                raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)}: expected at "
                                f"most {most}")
        if args.window_within and not args.window:
            raise UserError(f"--window-within {args.window_within}: --window is 0, so all steps "
                            f"are trained; give --window, or --window-within 0")

    def steps(self, gpus):
        return self.args.steps

    def memory(self, gpus):
        """{what: bytes} of one of so many GPUs."""
        args = self.args
        models = self.models
        pictures = args.batch * args.group // gpus
        n = min(args.micro, pictures)

        # 1. what is held all the time
        weights = frozen_weights(models)
        encoders, *others = weights.values()
        adapter = size_of(models.trained)
        parameters = sum(p.numel() for p in models.trained) / 1e9
        held = {
            f"adapter, {parameters:.3f} B parameters in float32": adapter,
            "its gradients": size_of([p.grad for p in models.trained]),
            "AdamW's moments": self.moments,
            "its EMA": adapter,
            "its copies in bfloat16": size_of(models.copies),
            "kept trajectories": step_parts.trajectory_size(models, args) * pictures,
            "their contexts": size_of(step_parts.texts_of(models, args, pictures)),
        }

        # 2. the rollout: all pictures are drawn, then read by the judge, then scored
        judging, cache = self.judging(min(pictures, READ_AT_ONCE))
        parts = self.drawing(n) | judging | self.scoring(pictures)
        most = {name: part.counter.peak for name, part in parts.items()}
        rollout = max(size + (cache if name in judging else 0) for name, size in most.items())
        rows = weights | held | {"judge's cache, while it answers": cache}
        rows |= {f"activations: {name}": size for name, size in most.items()}

        # 3. the update, and the peaks of all of it
        peaks = {}
        for checkpointing in (False, True):
            counters = [part.counter for part in self.update(n, checkpointing).values()]
            update = max(counter.peak for counter in counters)
            name = "update, checkpointing" if checkpointing else "update"
            rows[f"kept for backward: {name}"] = counters[-1].kept
            rows[f"activations: {name}"] = update
            busiest = max(rollout, update, self.optimizer.peak, models.encoder.peak)
            always = sum(others) + sum(held.values())
            peaks[peak_name(False, checkpointing)] = encoders + always + busiest
            peaks[peak_name(True, checkpointing)] = always + busiest
        prompts = min(ROWS * len(set(args.form)), args.steps * math.ceil(args.batch / gpus))
        if args.encoders != "leave":
            prompts = min(prompts, PROMPTS_KEPT)
        host = prompts * size_of(models.encoding)
        return rows | peaks | {"host memory of each process: encoded prompts": host}

    def costs(self, gpus):
        """{part: array of FLOP, bytes moved and seconds at each of `speeds`}: a step's work of one
        of so many GPUs."""
        args = self.args
        rows = {}
        if args.encoders == "gpu":
            encoders = Part(math.ceil(args.batch / gpus), self.models.encoder)
            rows["text encoders"] = cost(encoders, self.speeds)
        pictures = args.batch * args.group // gpus
        for n, chunks in shares(pictures, args.micro):
            add_costs(rows, chunks, self.drawing(n), self.speeds)
        for n, generations in shares(pictures, READ_AT_ONCE):
            add_costs(rows, generations, self.judging(n)[0], self.speeds)
        add_costs(rows, 1, self.scoring(pictures), self.speeds)
        for n, chunks in shares(pictures, args.micro):
            again = self.update(n, True) if args.checkpointing else None
            add_update_costs(rows, chunks, self.update(n, False), again, self.speeds)
        rows["optimizer"] = cost(Part(1, self.optimizer, "memory"), self.speeds)
        sent = 2 * (gpus - 1) / gpus * size_of(self.models.trained)  # in a ring
        rows["all-reduce"] = sending(sent, gpus, self.speeds)
        return rows | {"a step": sum(rows.values())}

    def notes(self):
        """What is true of the generator's training alone."""
        models = self.models
        encoder = Part(1, models.encoder)
        times = [f"{1000 * seconds_of(encoder, speed):.0f} ms on {speed.name}"
                 for speed in self.speeds[:len(GPUS)]]
        weights = 2 * size_of([p for tower in models.encoders for p in tower.parameters()])
        context = step_parts.texts_of(models, self.args, self.args.micro)[0]
        side = self.args.size // models.vae.factor // models.mmdit.config.patch
        without, fused, plain = step_parts.adapter_counters(models, self.args, self.args.micro)
        return (
            f"A forward pass over {len(context)} × {side**2 + context.shape[1]:,} tokens moves "
            f"{figure(without.traffic / 1e9)} GB by {without.launches:,} launches; the adapter "
            f"adds {added(fused, without)}, and in its plain form {added(plain, without)}.\n"
            f"An encoded prompt takes {size_of(models.encoding) / 1e6:.2f} MB of host memory and "
            f"{', '.join(times)}. --encoders leave encodes all prompts of a process at the start; "
            f"gpu and cpu encode each when it comes, and keep {PROMPTS_KEPT:,}; "
            f"cpu needs {figure(weights / 1e9)} GB for float32 weights in each process and "
            f"computes {models.encoder.flops / 1e12:.1f} TFLOP a prompt there.")


def shares(count, size):
    """[(n, times)]: batches of `size` that make up a count, and one of what is left of it."""
    full, rest = divmod(count, size)
    return [(n, times) for n, times in ((size, full), (rest, 1)) if n * times]


def added(counter, other):
    """What one OperatorCounter has more than another, in words."""
    more = counter.traffic - other.traffic
    return f"{figure(more / 1e9)} GB and {counter.launches - other.launches:,} launches"


def add_costs(rows, times, parts, speeds):
    """Add {name: Part} so many times to {name: array of costs}."""
    for name, part in parts.items():
        rows[name] = rows.get(name, 0) + times * cost(part, speeds)


def add_update_costs(rows, times, update, again, speeds):
    """The same of an update; again: of its parts with checkpointing, or None without it."""
    add_costs(rows, times, update, speeds)
    if again is not None:
        name = "update, recomputation"
        more = sum(cost(again[part], speeds) - cost(update[part], speeds) for part in update)
        rows[name] = rows.get(name, 0) + times * more


def frozen_weights(models):
    """{model with its size: bytes}, the text encoders first."""
    rows = {}
    for name, modules in (("text encoders", models.encoders), ("generator", [models.mmdit]),
                          ("VAE", [models.vae]), ("judge", [models.judge]),
                          ("PickScore", [models.scorer])):
        parameters = []
        buffers = []
        for module in modules:
            if module is not None:
                parameters += [p for p in module.parameters() if not p.requires_grad]
                buffers += module.buffers()
        count = sum(p.numel() for p in parameters)
        rows[f"{name}, {count / 1e9:.2f} B parameters"] = size_of(parameters + buffers)
    return rows


def peak_name(without_encoders, checkpointing):
    name = "peak"
    if without_encoders:
        name += ", encoders gone"
    if checkpointing:
        name += ", checkpointing"
    return name


# --------------------------------------------------------------------------------------------------
# What the judge's training needs


class JudgePlan:
    """The measurements of the settings, each made once.

    All weights are sharded by FSDP2, which also serves one GPU: float32 masters, products in
    bfloat16. With --lora every GPU holds the frozen model in bfloat16.
    """

    def __init__(self, args):
        self.args = args
        self.speeds = speeds(args.efficiency)
        self.models = models = step_parts.build_judge(args, torch.bfloat16)
        self.answers = functools.cache(
            functools.partial(step_parts.judge_answer_parts, models, args))
        self.update = functools.cache(
            functools.partial(step_parts.judge_update_parts, models, args))
        self.optimizer, self.moments = step_parts.optimizer_counter(models.trained, ema=False)
        self.chosen = peak_name(False, args.checkpointing)
        self.title = (f"{args.batch} questions × {args.group} answers a step, pictures of "
                      f"{args.max_pixels:,} pixels, answers of at most {args.max_new_tokens} "
                      f"tokens, at most {args.micro} questions in one pass")

    @staticmethod
    def check(args):
        """Raises UserError for settings that do not fit together."""
        for gpus in args.gpus:
            if max(args.batch, gpus) % gpus:
                raise UserError(f"--gpus {gpus}: the {args.batch} questions of a step (--batch) "
                                f"cannot be shared by {gpus}; choose a divisor")
        if args.answer > args.max_new_tokens:
            raise UserError(f"--answer {args.answer}: expected at most --max-new-tokens "
                            f"{args.max_new_tokens}")

    def batch(self, gpus):
        """Questions of a step: a GPU has one at least, so that more GPUs make fewer steps."""
        return max(self.args.batch, gpus)

    def steps(self, gpus):
        args = self.args
        return math.ceil(args.epochs * ROWS * len(args.tasks) / self.batch(gpus))

    def gathered(self):
        """(bytes of bfloat16 weights that FSDP2 gathers while answers are sampled, those of weights
        and gradients while it trains, those that the reference keeps)."""
        if self.args.lora:
            return 0, 0, 0
        policy = self.models.policy
        whole = size_of(policy.parameters())
        blocks = [size_of(block.parameters())
                  for block in (*policy.visual.blocks, *policy.model.layers)]
        root = whole - sum(blocks)  # embedding, head and merger: gathered from first to last
        # The root has weights and gradients. Of the blocks there are the weights of one, those of
        # the next one and the buffer in which they come, and the gradients of one, in bfloat16 and,
        # on their way to the others, in float32.
        training = 2 * root + (3 + 1 + 2) * max(blocks)
        return whole, training, root if self.args.beta else 0

    def memory(self, gpus):
        """{what: bytes} of one of so many GPUs, and of the disk."""
        args = self.args
        models = self.models
        questions = self.batch(gpus) // gpus
        n = min(args.micro, questions)
        shards = 1 if args.lora else gpus

        # 1. what is held all the time
        whole, training, kept_gathered = self.gathered()
        count = sum(p.numel() for p in models.trained) / 1e9
        held = {
            f"{count:.2f} B trained parameters in float32": size_of(models.trained) / shards,
            "their gradients": size_of([p.grad for p in models.trained]) / shards,
            "AdamW's moments": self.moments / shards,
        }
        if args.lora:
            frozen = [p for p in models.policy.parameters() if not p.requires_grad]
            held["the frozen judge in bfloat16"] = size_of(frozen)
            held["copies of the adapter in bfloat16"] = size_of(models.copies)
        elif args.beta:
            held["reference in bfloat16"] = size_of(models.reference.parameters()) / shards
            held["its embedding and head, gathered"] = kept_gathered

        # 2. the answers
        parts, cache = self.answers(questions)
        most = {name: part.counter.peak for name, part in parts.items()}
        rows = held | {"gathered weights, answers": whole, "keys and values of the answers": cache}
        rows |= {f"activations: {name}": size for name, size in most.items()}
        answers = whole + cache + max(most.values())

        # 3. the update, for answers as long as they may be, and the peaks of all of it
        rows["gathered weights and gradients, update"] = training
        peaks = {}
        for checkpointing in (False, True):
            update = self.update(n, args.max_new_tokens, checkpointing)
            counters = [part.counter for part in update.values()]
            most = max(counter.peak for counter in counters)
            name = "update, checkpointing" if checkpointing else "update"
            rows[f"kept for backward: {name}"] = counters[-1].kept
            rows[f"activations: {name}"] = most
            busiest = max(answers, training + most, self.optimizer.peak / shards)
            peaks[peak_name(False, checkpointing)] = sum(held.values()) + busiest

        # 4. host and disk: float32 parameters and two moments; a whole judge goes in bfloat16
        trained = size_of(models.trained)
        checkpoint = 3 * trained
        return rows | peaks | {
            # a whole judge in bfloat16, and the copy of it that is written
            "host memory of the first process, exporting": 0 if args.lora else trained,
            "disk: a checkpoint": checkpoint,
            f"disk: {KEEP} checkpoints and one being written": (KEEP + 1) * checkpoint,
            "disk: the exported judge": trained if args.lora else trained / 2,
        }

    def costs(self, gpus):
        """{part: array of FLOP, bytes moved and seconds at each of `speeds`}: a step's work of one
        of so many GPUs."""
        args = self.args
        questions = self.batch(gpus) // gpus
        rows = {}
        parts, _ = self.answers(questions)
        add_costs(rows, 1, parts, self.speeds)
        for n, chunks in shares(questions, args.micro):
            update = self.update(n, args.answer, False)
            again = self.update(n, args.answer, True) if args.checkpointing else None
            add_update_costs(rows, chunks, update, again, self.speeds)
        optimizer = cost(Part(1, self.optimizer, "memory"), self.speeds)
        if not args.lora:
            # Each process gets all weights in bfloat16 for the answers, and for every pass of the
            # reference, forward and backward; gradients are summed in float32.
            passes = math.ceil(questions / args.micro) * (2 + bool(args.beta))
            weights = size_of(self.models.policy.parameters())
            sent = (1 + passes) * weights + math.ceil(questions / args.micro) * 2 * weights
            rows["optimizer"] = optimizer / gpus
            name = "gathering weights, summing gradients"
            rows[name] = sending((gpus - 1) / gpus * sent, gpus, self.speeds)
        else:
            sent = 2 * (gpus - 1) / gpus * size_of(self.models.trained)
            rows["optimizer"] = optimizer
            rows["all-reduce"] = sending(sent, gpus, self.speeds)
        return rows | {"a step": sum(rows.values())}

    def notes(self):
        """What is true of the judge's training alone."""
        args = self.args
        recording = step_parts.RECORDING * JUDGES[args.model].layers
        return (
            f"Time is for answers of {args.answer} tokens, padding included: a step's longest "
            f"answer decides (--answer). A step of the decode reads the language model's weights "
            f"once, whatever the number of answers, and is one launch: a CUDA graph, which the "
            f"host takes {1000 * recording:.0f} ms to record in each generation. Each GPU has a "
            f"question at least: above {args.batch} of them --batch grows with their number, and "
            f"the steps of the same epochs become fewer.")


# --------------------------------------------------------------------------------------------------
# Tables


def show(args):
    """Print the plan as Markdown. Raises UserError for settings that do not fit together."""
    kind = JudgePlan if args.what == "judge" else GeneratorPlan
    kind.check(args)
    plan = kind(args)

    # 1. memory
    columns = [plan.memory(gpus) for gpus in args.gpus]
    print(f"Memory of a GPU in GB; {plan.title}:\n")
    rows = [["GPUs", *args.gpus]]
    for name in columns[0]:
        rows.append([name, *(figure(column.get(name, 0) / 1e9) for column in columns)])
    fits = []
    for column in columns:
        fits.append([gpu.name for gpu in GPUS if column[plan.chosen] <= gpu.memory])
    names = [", ".join(fitting) or "none" for fitting in fits]
    print(cli.markdown([*rows, [f"fits with these settings ({plan.chosen})", *names]]))

    # 2. costs
    for gpus, fitting in zip(args.gpus, fits, strict=True):
        if not fitting:
            print(f"\nNo step on {gpus} GPU{'s' * (gpus > 1)}: it fits none of the list.")
            continue
        print(f"\nA step on {gpus} GPU{'s' * (gpus > 1)}, the work of each:\n")
        print(cli.markdown(cost_rows(plan, gpus)))

    # 3. what others and we have measured, and what all this rests on
    head = ["training of SD3.5-Medium by others", "GPUs", "what", "GPU-hours", "TFLOP/s of a GPU"]
    print("\nPublished, for comparison:\n")
    print(cli.markdown([head, *PUBLISHED]))
    print("\n" + assumptions(args) + "\n" + plan.notes())


def cost_rows(plan, gpus):
    """The rows of a table of a step's costs on one of so many GPUs, and of the run's hours."""
    rows = [["part", "TFLOP", "GB moved", *(f"{speed.name}, s" for speed in plan.speeds)]]
    costs = plan.costs(gpus)
    units = np.array([1e12, 1e9] + [1] * len(plan.speeds))
    for name, values in costs.items():
        rows.append([name, *map(figure, values / units)])
    hours = plan.steps(gpus) * costs["a step"][2:] / 3600
    rows.append([f"{plan.steps(gpus):,} steps, hours", "", "", *map(figure, hours)])
    rows.append(["GPU-hours of all", "", "", *map(figure, gpus * hours)])
    return rows


def figure(x):
    return f"{x:,.0f}" if x >= 100 else f"{x:.3g}"


def assumptions(args):
    """What the tables of both trainings rest on, in sentences."""
    sheets = []
    for gpu in GPUS:
        sheets.append(f"{gpu.name}: {gpu.bfloat16 / 1e12:.0f} TFLOP/s in bfloat16, "
                      f"{gpu.bandwidth / 1e12:.2f} TB/s, {gpu.memory / 1e9:.0f} GB")
    return (
        f"Assumed: a whole step reaches {args.efficiency:.0%} of an H100's FLOP/s "
        f"({'; '.join(sheets)}; links {NVLINK / 1e9:.0f} GB/s among {NODE} GPUs, "
        f"{NETWORK / 1e9:.0f} GB/s beyond). Its products run at {PRODUCT:.0%}, and what is left of "
        f"its time, memory and launches, takes an H20 as long. Decode and optimizer move memory at "
        f"{TRAFFIC:.0%} of the bandwidth, links reach {LINKS:.0%}. \"Our rates\" were measured on "
        f"an H200: {FORWARD:.0%} forward, {BACKWARD:.0%} with gradients (docs/gpu.md). {ROWS:,} "
        f"training rows; answers of {ANSWER} tokens. Parts run one after another; bytes moved are "
        f"those of kernels that are not fused. No training was timed on this scale.")


def main(argv=None):
    args = parse_args(argv)
    return cli.run_program(lambda: show(args))


if __name__ == "__main__":
    sys.exit(main())
