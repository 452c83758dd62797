"""What a run of train_gen.py needs of each GPU, before anything is loaded: memory, work and time.

    python -m bench.plan --gpus 1,8,64

The real modules are built on PyTorch's meta device, where tensors have shapes and no data, and the
calls of a training step run on them: an `OperatorCounter` counts what their operators do. Nothing
is derived from a formula of the architecture, so a change of the models changes the plan. The flags
are those of train_gen.py, with the paper's values. In order: GPUs and assumptions, the counter,
models without weights, the parts of a step, tables.

Left out: the CUDA context (about 0.5 GB), the allocator's waste, the launching of kernels,
evaluations, loading. All bytes are decimal: 1 GB = 10⁹ bytes. n: pictures in one batch.
"""

import functools
import math
import sys
import weakref
from dataclasses import dataclass
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

import data
import feedback
import flow_grpo
import mmdit
import qwen_vl
from parts import chat, cli, clip, lora, ops, text_encoders, vae
from parts.cli import UserError, integer, number
from parts.pipeline import PAPER

aten = torch.ops.aten


@dataclass(frozen=True)
class GPU:
    name: str
    bfloat16: float  # FLOP/s of dense matrix products, by NVIDIA's data sheet
    float32: float  # FLOP/s without tensor cores, torch's default, in which the adapter computes
    bandwidth: float  # bytes/s of its memory
    memory: float  # bytes, as sold


GPUS = (GPU("H100", 989e12, 67e12, 3.35e12, 80e9), GPU("H20", 148e12, 44e12, 4.0e12, 96e9))
ARITHMETIC = 0.4  # assumed share of those FLOP/s that a kernel reaches
TRAFFIC = 0.6  # and of the bytes/s, of links too
NODE = 8  # GPUs of a machine
NVLINK = 450e9  # bytes/s out of a GPU within a machine
NETWORK = 50e9  # and between machines
QUESTION = 149  # tokens of feedback.ask("regression", …) by Qwen's tokenizer, without the picture
ANSWER = 150  # tokens of the judge's answer, assumed; the cache has room for ANSWER_LIMIT
ROWS = 14_563  # training prompts of the paper

GENERATORS = {
    PAPER: mmdit.SD35_MEDIUM,
    "stabilityai/stable-diffusion-3.5-large": mmdit.SD35_LARGE,
}
JUDGES = {
    "Qwen/Qwen2.5-VL-7B-Instruct": qwen_vl.QWEN25_VL_7B,
    "Qwen/Qwen2.5-VL-3B-Instruct": qwen_vl.QWEN25_VL_3B,
}
SCORERS = {"yuvalkirstain/PickScore_v1": (clip.PICKSCORE_TEXT, clip.PICKSCORE_VISION)}


def gpu_counts(text):
    """An argparse type: "1,8,64" -> (1, 8, 64)."""
    return tuple(integer(1, 10**6)(part) for part in text.split(","))


SETTINGS = {  # flag of train_gen.py: (paper's value, type or words to choose from, help)
    "model": (PAPER, tuple(GENERATORS), "the generator"),
    "judge": ("Qwen/Qwen2.5-VL-7B-Instruct", (*JUDGES, "none"), "the judge"),
    "pickscore": ("yuvalkirstain/PickScore_v1", (*SCORERS, "none"), "PickScore"),
    "form": (("numbers",), cli.some_of(data.FORMS), "how the target enters the prompt"),
    "group": (8, integer(2, 1024), "pictures of each prompt, G"),
    "guided_pictures": (0, integer(0, 1024), "of these, drawn with the emotional prompt"),
    "batch": (16, integer(1, 4096), "prompts in a step, over all processes, P"),
    "steps": (1000, integer(1, 10**7), "training steps"),
    "sde_steps": (10, integer(1, 1000), "steps of the stochastic sampler, T"),
    "window": (0, integer(0, 1000), "stochastic and trained ones of the T steps; 0: all"),
    "guidance": (4.5, number(0, 100), "classifier-free guidance; above 1 it doubles the batch"),
    "size": (512, cli.picture_side, "side of the pictures in pixels"),
    "beta": (0.1, number(0, 1000), "weight of the KL; 0: no reference is computed"),
    "lora_rank": (32, integer(1, 4096), "of the adapter"),
    "micro": (8, integer(1, 4096), "pictures in one forward and backward pass of a process"),
    "encoders": ("gpu", ("gpu", "cpu", "leave"), "where the text encoders live"),
}


def parse_args(argv=None):
    parser = cli.parser(__doc__)
    parser.add_argument("--preset", choices=("paper",), default="paper",
                        help="whose values the defaults are; the miniature needs no plan")
    parser.add_argument("--gpus", type=gpu_counts, default=(1, 8, 64),
                        help="numbers of GPUs to plan for (default: 1,8,64)")
    for name, (value, kind, text) in SETTINGS.items():
        options = {"choices": kind} if isinstance(kind, tuple) else {"type": kind}
        parser.add_argument("--" + name.replace("_", "-"), default=value, **options,
                            help=f"{text} (default: {cli.shown(value)})")
    parser.add_argument("--no-t5", action="store_true", help="leave T5 out")
    parser.add_argument("--checkpointing", action="store_true", help="recompute activations")
    return parser.parse_args(argv)


# --------------------------------------------------------------------------------------------------
# The counter


class OperatorCounter(TorchDispatchMode):
    """Counts the operators that run inside it, forward and backward.

    flops: of matrix products, convolutions and attention, two for a multiply-add, by the formulas
    of PyTorch's flop counter. traffic: bytes of each operator's inputs and outputs, as kernels that
    are not fused move them. seconds: on each of GPUS, where an operator takes the longer of its
    arithmetic and its traffic, and they run one after another. live, peak: bytes of the tensors
    that were made inside and are still held, now and at most. kept: those between a forward and a
    backward pass. Only tensors on `device` count.
    """

    def __init__(self, device="meta"):
        super().__init__()
        self.device = device
        self.flops = 0
        self.traffic = 0
        self.seconds = dict.fromkeys(GPUS, 0.0)
        self.live = 0
        self.peak = 0
        self.kept = 0
        self.storages = set()  # those that are held

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = operator(*args, **kwargs)
        read = self.tensors((args, kwargs))
        made = self.tensors(out)
        old = {t.untyped_storage()._cdata for t in read}
        new = [t for t in made if t.untyped_storage()._cdata not in old]
        for tensor in new:
            self.hold(tensor.untyped_storage())
        # Without new memory an operator has written in place, or made a view and written nothing.
        if new or operator._schema.name.endswith("_"):
            if operator.overloadpacket in (aten.embedding, aten.index):
                read = made  # they read the rows they take, not the whole table
            formula = flop_registry.get(operator.overloadpacket)
            flops = formula(*args, **kwargs, out_val=out) if formula else 0
            self.count(flops, read, made)
        return out

    def tensors(self, tree):
        leaves = [x for x in tree_leaves(tree) if isinstance(x, torch.Tensor)]
        return [x for x in leaves if x.device.type == self.device]

    def count(self, flops, read, made):
        traffic = 0
        for t in (*read, *made):
            # an expanded tensor has more elements than memory
            traffic += min(t.numel() * t.element_size(), t.untyped_storage().nbytes())
        self.flops += flops
        self.traffic += traffic
        in_float32 = bool(made) and made[0].dtype == torch.float32
        for gpu in GPUS:
            rate = gpu.float32 if in_float32 else gpu.bfloat16
            self.seconds[gpu] += max(
                flops / (rate * ARITHMETIC), traffic / (gpu.bandwidth * TRAFFIC))

    def hold(self, storage):
        """Count a storage as live until it is freed."""
        key = storage._cdata
        if key not in self.storages:
            self.storages.add(key)
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self.release, key, storage.nbytes())

    def release(self, key, size):
        self.storages.discard(key)
        self.live -= size


def gpu_attention(q, k, v, attn_mask=None, is_causal=False, scale=None):
    """F.scaled_dot_product_attention by the operators that a GPU runs.

    They keep no [L,L] weights for the backward pass; the meta device, left to itself, takes the
    plain form, which does.
    """
    if attn_mask is None:
        return aten._scaled_dot_product_flash_attention(q, k, v, 0.0, is_causal, scale=scale)[0]
    mask = attn_mask.expand(*q.shape[:3], k.shape[2])
    return aten._scaled_dot_product_efficient_attention(
        q, k, v, mask, torch.is_grad_enabled(), scale=scale)[0]


def measure(work, device="meta"):
    """The OperatorCounter of work(counter)."""
    attention = mock.patch.object(F, "scaled_dot_product_attention", gpu_attention)
    with OperatorCounter(device) as counter, attention:
        work(counter)
    return counter


def size_of(tensors):
    """Bytes of the tensors' memory; what they share counts once."""
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


# --------------------------------------------------------------------------------------------------
# Models without weights


@dataclass
class Models:
    mmdit: mmdit.MMDiT  # with its adapter
    trained: list  # the adapter's parameters, which have gradients
    vae: vae.VAE
    encoders: list  # CLIP-L, bigG and, with T5, T5
    encoding: list  # context and pooled vector of one prompt
    encoder: OperatorCounter  # of its encoding
    judge: qwen_vl.QwenVL | None
    scorer: clip.CLIP | None


def build(args):
    """The Models of the settings, in the types that weights.build and lora.add_lora give them."""
    generator = on_meta(mmdit.MMDiT, GENERATORS[args.model])
    lora.add_lora(generator, generator.lora_targets(), args.lora_rank, 2.0 * args.lora_rank)
    trained = [p for p in generator.parameters() if p.requires_grad]
    for p in trained:
        p.grad = torch.zeros_like(p)
    clip_l = on_meta(clip.TextTower, clip.CLIP_L_TEXT)
    clip_g = on_meta(clip.TextTower, clip.BIG_G_TEXT)
    t5 = None if args.no_t5 else on_meta(text_encoders.T5Encoder, text_encoders.T5_XXL)
    lengths = (clip.CLIP_L_TEXT.max_position_embeddings, clip.BIG_G_TEXT.max_position_embeddings,
               text_encoders.T5_TOKENS)
    tokenizers = [functools.partial(padded_tokens, length) for length in lengths]
    together = text_encoders.TextEncoders(clip_l, clip_g, t5, tokenizers)
    encoding = []
    encoder = measure(lambda _: encoding.extend(together.encode(["a prompt"])))
    judge = None if args.judge == "none" else on_meta(qwen_vl.QwenVL, JUDGES[args.judge])
    scorer = None if args.pickscore == "none" else on_meta(clip.CLIP, *SCORERS[args.pickscore])
    encoders = [tower for tower in (clip_l, clip_g, t5) if tower is not None]
    return Models(generator, trained, on_meta(vae.VAE, vae.SD3_VAE), encoders, encoding, encoder,
                  judge, scorer)


def on_meta(make, *configs):
    with torch.device("meta"):
        return make(*configs).to(torch.bfloat16).eval().requires_grad_(False)


def padded_tokens(length, prompts, warn=True):
    """In place of a tokenizer: every prompt is padded to the length, whatever it says."""
    return torch.zeros(len(prompts), length, dtype=torch.long)


def empty(*shape, dtype=torch.long):
    return torch.empty(shape, dtype=dtype, device="meta")


# --------------------------------------------------------------------------------------------------
# The parts of a step: the calls that train_gen.py makes


def latents_of(models, args, n):
    side = args.size // models.vae.factor
    return empty(n, models.mmdit.config.channels, side, side, dtype=torch.float32)


def texts_of(models, args, n):
    """[context, pooled] of n pictures; with guidance those of the empty prompt are in front."""
    rows = 2 * n if args.guidance > 1 else n
    return [z.repeat(rows, *[1] * (z.dim() - 1)) for z in models.encoding]


@torch.no_grad()
def rollout_parts(models, args, n):
    """{part: (how often, counter)}: n pictures drawn, decoded one by one, judged and scored."""
    latents = latents_of(models, args, n)
    texts = texts_of(models, args, n)
    velocity = measure(lambda _: flow_grpo.guided_velocity(
        models.mmdit, latents, 0.5, *texts, args.guidance))
    # kept steps of guided pictures are evaluated once more, under the prompt to follow
    again = (args.window or args.sde_steps) * args.guided_pictures / args.group
    decoder = measure(lambda _: models.vae.decode(latents[:1].bfloat16()).float())
    parts = {"sampling": (args.sde_steps + again, velocity), "VAE decoder": (n, decoder)}
    if models.judge is not None:
        prefill, decode = judge_counters(models.judge, args, n)
        parts["judge, prefill"] = (1, prefill)
        parts["judge, decode"] = (ANSWER - 1, decode)
    if models.scorer is not None:
        text_config, vision_config = SCORERS[args.pickscore]
        prompts = math.ceil(n / args.group)
        side = vision_config.image_size
        ids = empty(prompts, text_config.max_position_embeddings)
        pixels = empty(n, 3, side, side, dtype=torch.bfloat16)
        parts["PickScore"] = (1, measure(lambda _: (
            models.scorer.embed_text(ids), models.scorer.embed_images(pixels))))
    return parts


def judge_cache(judge, args, n):
    """(cache of n answers, tokens of a prompt, (1, h, w): patches of its picture)."""
    picture = Image.new("RGB", (args.size, args.size))
    _, (_, h, w) = chat.image_patches(picture, chat.ImageConfig())
    tokens = QUESTION + h * w // judge.config.merge**2
    cache = qwen_vl.StaticCache(
        judge.config, [tokens] * n, 1, feedback.ANSWER_LIMIT, judge.head_weight)
    return cache, tokens, (1, h, w)


def judge_counters(judge, args, n):
    """Counters of the prefill of n prompts and of a token in the middle of their answers, as
    QwenVL.generate takes them."""
    cache, tokens, grid = judge_cache(judge, args, n)
    ids = empty(n * tokens)
    last = empty(n)
    values = judge.visual.patch_embed.proj.in_features  # of a patch
    pixels = empty(n * grid[1] * grid[2], values, dtype=torch.float32)

    def prefill(_):
        pictures = judge.visual(pixels, [grid] * n)  # held while the text is computed
        hidden = judge.trunk(cache.prefill, ids, ids.expand(3, -1))
        return pictures, qwen_vl.sample(ops.logits(hidden[last], judge.head_weight), 0, None)

    def decode(_):
        hidden = judge.trunk(cache.decode, last, last.expand(3, -1))
        return qwen_vl.sample(ops.logits(hidden, judge.head_weight), 0, None)

    first = measure(prefill)
    cache.room = ANSWER // 2 + 1  # attention grows evenly, so the middle is the mean
    cache.go_to(empty(1))
    return first, measure(decode)


def update_parts(models, args, n, checkpointing):
    """{part: (how often, counter)}: the gradients of the kept steps of n pictures."""
    latents = latents_of(models, args, n)
    texts = texts_of(models, args, n)
    rows = empty(n, dtype=torch.float32)
    kept = flow_grpo.KeptStep(0, latents, latents, rows)
    trajectory = flow_grpo.Trajectory(
        latents, [kept], flow_grpo.sigma_schedule(args.sde_steps), sde_settings(args))
    models.mmdit.checkpointing = checkpointing

    def reference(_):
        with torch.no_grad(), lora.lora_disabled(models.mmdit):
            flow_grpo.kept_velocity(models.mmdit, trajectory, 0, *texts)

    def gradients(counter):
        ref_velocity = latents if args.beta else None
        step = flow_grpo.evaluate_step(models.mmdit, trajectory, 0, *texts, ref_velocity)
        loss, _ = flow_grpo.flow_grpo_loss(step.log_prob, rows, rows, step.kl, beta=args.beta)
        counter.kept = counter.live
        loss.backward()

    times = args.window or args.sde_steps
    parts = {"update, reference": (times, measure(reference))} if args.beta else {}
    return parts | {"update, forward and backward": (times, measure(gradients))}


def sde_settings(args):
    window = (0, args.window) if args.window else None  # where it lies makes no difference
    return flow_grpo.SDESettings(args.sde_steps, args.guidance, window=window)


def optimizer_counter(models):
    """(counter of clipping, AdamW's step and the EMA, bytes of AdamW's moments)."""
    optimizer = torch.optim.AdamW(models.trained, foreach=True)  # as by default on a GPU
    averages = [p.detach().clone() for p in models.trained]
    optimizer.step()  # makes the moments

    def work(_):
        torch.nn.utils.clip_grad_norm_(models.trained, 1.0)
        optimizer.step()
        for average, p in zip(averages, models.trained, strict=True):
            average.lerp_(p.detach(), 0.1)

    counter = measure(work)
    moments = [t for state in optimizer.state.values() for t in state.values() if t.is_meta]
    return counter, size_of(moments)


def trajectory_size(models, args):
    """Bytes of one picture's kept steps: of a real trajectory, on the CPU, of no model at all."""
    noise = torch.zeros(latents_of(models, args, 1).shape)
    texts = torch.zeros(2, 1)
    trajectory = flow_grpo.sample_sde(lambda x, *_: x, noise, texts, texts, sde_settings(args))
    tensors = [trajectory.latents]
    for step in trajectory.steps:
        tensors += [step.before, step.after, step.log_prob]
    return size_of(tensors)


# --------------------------------------------------------------------------------------------------
# Memory and costs of a GPU


class Plan:
    """The measurements of the settings, each made once."""

    def __init__(self, args):
        self.args = args
        self.models = build(args)
        self.rollout = functools.cache(functools.partial(rollout_parts, self.models, args))
        self.update = functools.cache(functools.partial(update_parts, self.models, args))
        self.optimizer, self.moments = optimizer_counter(self.models)

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
            "kept trajectories": trajectory_size(models, args) * pictures,
            "their contexts": size_of(texts_of(models, args, pictures)),
        }

        # 2. the rollout: a chunk is judged beside the drawing of the next one
        cache = 0
        if models.judge is not None:
            keys_values, *_ = judge_cache(models.judge, args, n)
            cache = size_of([keys_values.prompts, keys_values.own])
        most = {name: counter.peak for name, (_, counter) in self.rollout(n).items()}
        drawing = max(most["sampling"], most["VAE decoder"])
        judging = [0]
        for name in most.keys() - {"sampling", "VAE decoder"}:
            judging.append(most[name] + (cache if name.startswith("judge") else 0))
        rollout = drawing + max(judging)
        rows = weights | held | {"judge's cache, while it answers": cache}
        rows |= {f"activations: {name}": size for name, size in most.items()}

        # 3. the update, and the peaks of all of it
        peaks = {}
        for checkpointing in (False, True):
            counters = [counter for _, counter in self.update(n, checkpointing).values()]
            update = max(counter.peak for counter in counters)
            name = "update, checkpointing" if checkpointing else "update"
            rows[f"kept for backward: {name}"] = counters[-1].kept
            rows[f"activations: {name}"] = update
            busiest = max(rollout, update, self.optimizer.peak, models.encoder.peak)
            always = sum(others) + sum(held.values())
            peaks[peak_name(False, checkpointing)] = encoders + always + busiest
            peaks[peak_name(True, checkpointing)] = always + busiest
        prompts = min(ROWS * len(set(args.form)), args.steps * math.ceil(args.batch / gpus))
        host = prompts * size_of(models.encoding)
        return rows | peaks | {"host memory of each process: encoded prompts": host}

    def costs(self, gpus):
        """{part: array of FLOP, bytes moved and seconds on each of GPUS}: a step's work of one of
        so many GPUs."""
        args = self.args
        rows = {}
        if args.encoders == "gpu":
            prompts = math.ceil(args.batch / gpus)
            rows["text encoders, first epoch"] = prompts * cost(self.models.encoder)
        full, rest = divmod(args.batch * args.group // gpus, args.micro)
        for n, chunks in ((args.micro, full), (rest, 1)):
            if not n * chunks:
                continue
            update = self.update(n, False)
            for name, (times, counter) in (self.rollout(n) | update).items():
                rows[name] = rows.get(name, 0) + chunks * times * cost(counter)
            if args.checkpointing:
                name = "update, recomputation"
                for part, (times, again) in self.update(n, True).items():
                    more = cost(again) - cost(update[part][1])
                    rows[name] = rows.get(name, 0) + chunks * times * more
        rows["optimizer"] = cost(self.optimizer)
        sent = 2 * (gpus - 1) / gpus * size_of(self.models.trained)  # in a ring
        link = NVLINK if gpus <= NODE else NETWORK
        rows["all-reduce"] = np.array([0, sent, *[sent / (link * TRAFFIC)] * len(GPUS)])
        return rows | {"a step": sum(rows.values())}


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


def cost(counter):
    return np.array([counter.flops, counter.traffic, *counter.seconds.values()])


def peak_name(without_encoders, checkpointing):
    name = "peak"
    if without_encoders:
        name += ", encoders gone"
    if checkpointing:
        name += ", checkpointing"
    return name


# --------------------------------------------------------------------------------------------------
# Tables


def show(args):
    """Print the plan as Markdown. Raises UserError unless a step's pictures are shared evenly."""
    pictures = args.batch * args.group
    for gpus in args.gpus:
        if pictures % gpus:
            raise UserError(f"--gpus {gpus}: the {pictures} pictures of a step (--batch "
                            f"{args.batch} × --group {args.group}) cannot be shared by {gpus}; "
                            f"choose a divisor")
    if args.guided_pictures > args.group or args.window > args.sde_steps:
        raise UserError(f"--guided-pictures {args.guided_pictures}, --window {args.window}: "
                        f"expected at most --group {args.group} and --sde-steps {args.sde_steps}")
    plan = Plan(args)

    # 1. memory
    columns = [plan.memory(gpus) for gpus in args.gpus]
    print(f"Memory of a GPU in GB; {args.batch} prompts × {args.group} pictures of {args.size} px "
          f"a step, at most {args.micro} in one pass:\n")
    rows = [["GPUs", *args.gpus]]
    for name in columns[0]:
        rows.append([name, *(figure(column[name] / 1e9) for column in columns)])
    chosen = peak_name(args.encoders != "gpu", args.checkpointing)
    fitting = [f"fits with these settings ({chosen})"]
    for column in columns:
        names = [gpu.name for gpu in GPUS if column[chosen] <= gpu.memory]
        fitting.append(", ".join(names) or "none")
    print(cli.markdown([*rows, fitting]))

    # 2. costs
    units = np.array([1e12, 1e9] + [1] * len(GPUS))
    for gpus in args.gpus:
        costs = plan.costs(gpus)
        rows = [["part", "TFLOP", "GB moved", *(f"{gpu.name}, s" for gpu in GPUS)]]
        for name, values in costs.items():
            rows.append([name, *map(figure, values / units)])
        hours = args.steps * costs["a step"][2:] / 3600
        rows.append([f"{args.steps:,} steps, hours", "", "", *map(figure, hours)])
        print(f"\nA step on {gpus} GPU{'s' * (gpus > 1)}, the work of each:\n")
        print(cli.markdown(rows))
    print("\n" + notes(plan.models))


def figure(x):
    return f"{x:,.0f}" if x >= 100 else f"{x:.3g}"


def notes(models):
    """What the tables rest on, in sentences."""
    sheets = []
    for gpu in GPUS:
        sheets.append(f"{gpu.name}: {gpu.bfloat16 / 1e12:.0f} TFLOP/s in bfloat16, "
                      f"{gpu.float32 / 1e12:.0f} in float32, {gpu.bandwidth / 1e12:.2f} TB/s, "
                      f"{gpu.memory / 1e9:.0f} GB")
    times = [f"{1000 * s:.0f} ms on {gpu.name}" for gpu, s in models.encoder.seconds.items()]
    weights = 2 * size_of([p for tower in models.encoders for p in tower.parameters()])
    return (
        f"Assumed: {ARITHMETIC:.0%} of the FLOP/s and {TRAFFIC:.0%} of the bandwidth "
        f"({'; '.join(sheets)}; links {NVLINK / 1e9:.0f} GB/s among {NODE} GPUs, "
        f"{NETWORK / 1e9:.0f} GB/s beyond), answers of {ANSWER} tokens, {ROWS:,} training prompts, "
        f"kernels that are not fused and run one after another. Nothing here was timed. On a GPU "
        f"train_gen.py judges beside drawing: in memory the plan counts both at once, in time one "
        f"after the other.\n"
        f"An encoded prompt takes {size_of(models.encoding) / 1e6:.2f} MB of host memory and "
        f"{', '.join(times)}, once. --encoders leave encodes all prompts of a process at the "
        f"start; gpu and cpu encode each when it comes; cpu needs {figure(weights / 1e9)} GB for "
        f"float32 weights in each process and computes {models.encoder.flops / 1e12:.1f} TFLOP a "
        f"prompt there.")


def main(argv=None):
    args = parse_args(argv)
    return cli.run_program(lambda: show(args))


if __name__ == "__main__":
    sys.exit(main())
