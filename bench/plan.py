"""What a run of train_gen.py will need, before anything is loaded: memory, arithmetic and time of each GPU.

    python train_gen.py --preset paper --plan --gpus 1,8,64

The real modules are built on PyTorch's meta device, where tensors have shapes and no data, and the calls of a training
step run on them: `Meter` counts what their operators do. Nothing is derived from a formula of the architecture, so a
change of the models changes the plan. In order: GPUs and assumptions, the meter, models without weights, the parts of a
step, tables. Left out: the CUDA context (about 0.5 GB), the allocator's waste, the launching of kernels, evaluations,
loading. All bytes are decimal: 1 GB = 10⁹ bytes.
"""

import functools
import math
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

import feedback
import flow_grpo
import mmdit
import qwen_vl
from parts import chat, clip, lora, text_encoders, vae
from parts.cli import UserError
from parts.pipeline import PAPER

aten = torch.ops.aten


@dataclass(frozen=True)
class GPU:
    name: str
    bfloat16: float  # FLOP/s of dense matrix products, by NVIDIA's data sheet
    float32: float  # FLOP/s without tensor cores: torch's default for float32, in which the adapter computes
    bandwidth: float  # bytes/s of its memory
    memory: float  # bytes, as sold


GPUS = GPU("H100", 989e12, 67e12, 3.35e12, 80e9), GPU("H20", 148e12, 44e12, 4.0e12, 96e9)
ARITHMETIC, TRAFFIC = 0.4, 0.6  # assumed shares of those FLOP/s and bytes/s that a kernel reaches; of links TRAFFIC too
NODE, NVLINK, NETWORK = 8, 450e9, 50e9  # GPUs of a machine; bytes/s out of a GPU within it, and between machines
QUESTION = 149  # tokens of feedback.ask("regression", …) by Qwen's tokenizer, without the picture's
ANSWER = 150  # tokens of the judge's answer, assumed; the cache has room for feedback.ANSWER_LIMIT
ROWS = 14_563  # training prompts of the paper

GENERATORS = {PAPER: mmdit.SD35_MEDIUM, "stabilityai/stable-diffusion-3.5-large": mmdit.SD35_LARGE}
JUDGES = {"Qwen/Qwen2.5-VL-7B-Instruct": qwen_vl.QWEN25_VL_7B, "Qwen/Qwen2.5-VL-3B-Instruct": qwen_vl.QWEN25_VL_3B}
SCORERS = {"yuvalkirstain/PickScore_v1": (clip.PICKSCORE_TEXT, clip.PICKSCORE_VISION)}


def counts(text):
    """"1,8,64" -> (1, 8, 64)."""
    return tuple(int(part) for part in text.split(","))


# ---------------------------------------------------------------------------------------------------------------------
# The meter


class Meter(TorchDispatchMode):
    """Counts the operators that run inside it, forward and backward.

    flops: of matrix products, convolutions and attention, two for a multiply-add, by the formulas of PyTorch's flop
    counter. traffic: bytes of each operator's inputs and outputs, as kernels that are not fused move them. seconds: on
    each of GPUS, where an operator takes the longer of its arithmetic and its traffic, and they run one after another.
    live, peak: bytes of the tensors that were made inside and are still held, now and at most. kept: those between a forward
    and a backward pass. Only tensors on `device` count.
    """

    def __init__(self, device="meta"):
        super().__init__()
        self.device, self.flops, self.traffic, self.live, self.peak, self.kept = device, 0, 0, 0, 0, 0
        self.seconds, self.known = dict.fromkeys(GPUS, 0.0), set()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = operator(*args, **kwargs)
        read, made = self.tensors((args, kwargs)), self.tensors(out)
        old = {t.untyped_storage()._cdata for t in read}
        new = [t for t in made if t.untyped_storage()._cdata not in old]
        for tensor in new:
            self.hold(tensor.untyped_storage())
        if new or operator._schema.name.endswith("_"):  # else nothing is written: a view
            self.count(operator.overloadpacket, args, kwargs, out, read, made)
        return out

    def tensors(self, tree):
        return [t for t in tree_leaves(tree) if isinstance(t, torch.Tensor) and t.device.type == self.device]

    def count(self, operator, args, kwargs, out, read, made):
        formula = flop_registry.get(operator)
        flops = formula(*args, **kwargs, out_val=out) if formula else 0
        if operator in (aten.embedding, aten.index):  # they read the rows they take, not the table
            read = made
        traffic = sum(min(t.numel() * t.element_size(), t.untyped_storage().nbytes()) for t in [*read, *made])
        self.flops, self.traffic = self.flops + flops, self.traffic + traffic
        for gpu in GPUS:
            rate = gpu.float32 if made and made[0].dtype == torch.float32 else gpu.bfloat16
            self.seconds[gpu] += max(flops / (rate * ARITHMETIC), traffic / (gpu.bandwidth * TRAFFIC))

    def hold(self, storage):
        place, size = storage._cdata, storage.nbytes()
        if place not in self.known:
            self.known.add(place)
            self.live += size
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self.release, place, size)

    def release(self, place, size):
        self.known.discard(place)
        self.live -= size


def gpu_attention(q, k, v, attn_mask=None, is_causal=False, scale=None):
    """F.scaled_dot_product_attention by the operators that a GPU runs, which keep no [L,L] weights for the backward pass.
    Left to itself, the meta device takes the plain form, which does."""
    if attn_mask is None:
        return aten._scaled_dot_product_flash_attention(q, k, v, 0.0, is_causal, scale=scale)[0]
    mask = attn_mask.expand(*q.shape[:3], k.shape[2])
    return aten._scaled_dot_product_efficient_attention(q, k, v, mask, torch.is_grad_enabled(), scale=scale)[0]


def measure(work, device="meta"):
    """The Meter of work(meter)."""
    with Meter(device) as meter, mock.patch.object(F, "scaled_dot_product_attention", gpu_attention):
        work(meter)
    return meter


def size_of(tensors):
    """Bytes of the tensors' memory; what they share counts once."""
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())


# ---------------------------------------------------------------------------------------------------------------------
# Models without weights


@dataclass
class Models:
    mmdit: mmdit.MMDiT  # with its adapter
    trained: list  # the adapter's parameters, which have gradients
    vae: vae.VAE
    encoders: list  # CLIP-L, bigG and, with T5, T5
    encoding: list  # context and pooled vector of one prompt
    encoder: Meter  # of its encoding
    judge: qwen_vl.QwenVL | None
    scorer: clip.CLIP | None


def build(args):
    """The Models of train_gen's settings, in the types that they have on a GPU (weights.build, lora.add_lora)."""
    for flag, known in (("model", [*GENERATORS]), ("judge", [*JUDGES, "none"]), ("pickscore", [*SCORERS, "none"])):
        if getattr(args, flag) not in known:
            raise UserError(f"--{flag} with --plan: it reads no files and knows {', '.join(known)}; add "
                                    f"--preset paper or give one of these")
    generator = on_meta(mmdit.MMDiT, GENERATORS[args.model])
    lora.add_lora(generator, generator.lora_targets(), args.rank, args.alpha)
    trained = [p for p in generator.parameters() if p.requires_grad]
    for p in trained:
        p.grad = torch.zeros_like(p)
    texts = [on_meta(clip.TextTower, clip.CLIP_L_TEXT), on_meta(clip.TextTower, clip.BIG_G_TEXT),
             None if args.no_t5 else on_meta(text_encoders.T5Encoder, text_encoders.T5_XXL)]
    tokenizers = [lambda prompts, warn=True, length=length: torch.zeros(len(prompts), length, dtype=torch.long)
                  for length in (clip.CLIP_L_TEXT.max_position_embeddings, clip.BIG_G_TEXT.max_position_embeddings,
                                 text_encoders.T5_TOKENS)]
    encoding, together = [], text_encoders.TextEncoders(*texts, tokenizers)
    encoder = measure(lambda _: encoding.extend(together.encode(["a prompt"])))
    return Models(generator, trained, on_meta(vae.VAE, vae.SD3_VAE), [m for m in texts if m is not None], encoding, encoder,
                  None if args.judge == "none" else on_meta(qwen_vl.QwenVL, JUDGES[args.judge]),
                  None if args.pickscore == "none" else on_meta(clip.CLIP, *SCORERS[args.pickscore]))


def on_meta(make, *configs):
    with torch.device("meta"):
        return make(*configs).to(torch.bfloat16).eval().requires_grad_(False)


def empty(*shape, dtype=torch.long):
    return torch.empty(shape, dtype=dtype, device="meta")


# ---------------------------------------------------------------------------------------------------------------------
# The parts of a step: the calls that train_gen.py makes, of n pictures in one batch


def latents_of(models, args, n):
    cells = args.size // models.vae.factor
    return empty(n, models.mmdit.config.channels, cells, cells, dtype=torch.float32)


def texts_of(models, args, n):
    """[context, pooled] of n pictures, with those of the empty prompt in front if there is guidance."""
    return [z.repeat(n * (1 + (args.guidance > 1)), *[1] * (z.dim() - 1)) for z in models.encoding]


@torch.no_grad()
def rollout_parts(models, args, n):
    """{part: (how often, Meter)}: n pictures drawn, decoded one by one, judged and scored."""
    latents, texts = latents_of(models, args, n), texts_of(models, args, n)
    again = (args.window or args.sample_steps) * args.guided / args.group  # kept steps, under the prompt to follow
    parts = {"sampling": (args.sample_steps + again, measure(
                 lambda _: flow_grpo.guided_velocity(models.mmdit, latents, 0.5, *texts, args.guidance))),
             "VAE decoder": (n, measure(lambda _: models.vae.decode(latents[:1].bfloat16()).float()))}
    if models.judge is not None:
        prefill, decode = judge_meters(models.judge, args, n)
        parts |= {"judge, prefill": (1, prefill), "judge, decode": (ANSWER - 1, decode)}
    if models.scorer is not None:
        towers = models.scorer.text, models.scorer.vision
        ids = empty(math.ceil(n / args.group), towers[0].config.positions)
        pixels = empty(n, 3, towers[1].config.image, towers[1].config.image, dtype=torch.bfloat16)
        parts["PickScore"] = 1, measure(lambda _: (models.scorer.embed_text(ids), models.scorer.embed_images(pixels)))
    return parts


def judge_cache(judge, args, n):
    """(cache of n answers, tokens of a prompt, (1, h, w): patches of its picture)."""
    _, (_, h, w) = chat.image_patches(Image.new("RGB", (args.size, args.size)), chat.ImageConfig())
    tokens = QUESTION + h * w // judge.config.merge**2
    cache = qwen_vl.StaticCache(judge.config, [tokens] * n, 1, feedback.ANSWER_LIMIT, judge.head_weight)
    return cache, tokens, (1, h, w)


def judge_meters(judge, args, n):
    """Meters of the prefill of n prompts and of a token in the middle of their answers, as QwenVL.generate takes them."""
    cache, tokens, grid = judge_cache(judge, args, n)
    ids, last = empty(n * tokens), empty(n)
    pixels = empty(n * grid[1] * grid[2], judge.visual.patch_embed.proj.in_features, dtype=torch.float32)

    def prefill(_):
        pictures = judge.visual(pixels, [grid] * n)  # held; to the trunk it is all one what the tokens stand for
        hidden = judge.trunk(cache.prefill, ids, ids.expand(3, -1))
        return pictures, qwen_vl.sample(judge.logits(hidden[last]), 0, None)

    def decode(_):
        hidden = judge.trunk(cache.decode, last, last.expand(3, -1))
        return qwen_vl.sample(judge.logits(hidden), 0, None)

    first = measure(prefill)
    cache.room = ANSWER // 2 + 1  # attention grows evenly, so the middle is the mean
    cache.go_to(empty(1))
    return first, measure(decode)


def update_parts(models, args, n, checkpointing):
    """{part: (how often, Meter)}: the gradients of the kept steps of n pictures."""
    latents, texts, rows = latents_of(models, args, n), texts_of(models, args, n), empty(n, dtype=torch.float32)
    trajectory = flow_grpo.Trajectory(latents, [flow_grpo.KeptStep(0, latents, latents, rows)],
                                      flow_grpo.sigma_schedule(args.sample_steps), args.guidance, args.noise_level)
    models.mmdit.checkpointing = checkpointing

    def reference(_):
        with torch.no_grad(), lora.lora_disabled(models.mmdit):
            flow_grpo.kept_velocity(models.mmdit, trajectory, 0, *texts)

    def gradients(meter):
        step = flow_grpo.evaluate_step(models.mmdit, trajectory, 0, *texts, latents if args.beta else None)
        loss, _ = flow_grpo.step_loss(step.log_prob, rows, rows, step.kl, args.clip, args.beta)
        meter.kept = meter.live
        loss.backward()

    parts = {"update, reference": reference} if args.beta else {}
    parts["update, forward and backward"] = gradients
    return {name: (args.window or args.sample_steps, measure(work)) for name, work in parts.items()}


def optimizer_meter(models, args):
    """(Meter of clipping, AdamW's step and the average, bytes of AdamW's moments)."""
    optimizer = torch.optim.AdamW(models.trained, lr=args.lr, foreach=True)  # as by default on a GPU
    average = [p.detach().clone() for p in models.trained]
    optimizer.step()  # makes the moments

    def work(_):
        torch.nn.utils.clip_grad_norm_(models.trained, args.max_grad_norm)
        optimizer.step()
        for value, p in zip(average, models.trained, strict=True):
            value.lerp_(p.detach(), 1 - args.ema)
    return measure(work), size_of([t for s in optimizer.state.values() for t in s.values() if t.is_meta])


def trajectory_size(models, args):
    """Bytes of one picture's kept steps: of a real trajectory, on the CPU, under a model that does nothing."""
    nothing, noise = torch.zeros(2, 1), torch.zeros(latents_of(models, args, 1).shape)
    window = flow_grpo.window_of(0, args.window_within or args.sample_steps, args.window or None, args.seed)
    trajectory = flow_grpo.sample_sde(lambda x, *_: x, noise, nothing, nothing, args.sample_steps, args.guidance, 3.0,
                                      args.noise_level, window)
    return size_of([trajectory.latents, *(t for s in trajectory.steps for t in (s.before, s.after, s.log_prob))])


# ---------------------------------------------------------------------------------------------------------------------
# Tables


DRAWING = "sampling", "VAE decoder"


class Plan:
    """The measurements of train_gen's settings, each made once."""

    def __init__(self, args):
        self.args, self.models = args, build(args)
        self.rollout = functools.cache(functools.partial(rollout_parts, self.models, args))
        self.update = functools.cache(functools.partial(update_parts, self.models, args))
        self.optimizer, self.moments = optimizer_meter(self.models, args)

    def memory(self, gpus):
        """{what: bytes} of one of so many GPUs."""
        models, args = self.models, self.args
        pictures, prompts = args.batch * args.group // gpus, math.ceil(args.batch / gpus)
        n, adapter, rows = min(args.micro, pictures), size_of(models.trained), {}
        for name, modules in (("text encoders", models.encoders), ("generator", [models.mmdit]), ("VAE", [models.vae]),
                              ("judge", [models.judge]), ("PickScore", [models.scorer])):
            frozen = [p for m in modules if m is not None for p in m.parameters() if not p.requires_grad]
            size = size_of([*frozen, *(t for m in modules if m is not None for t in m.buffers())])
            rows[f"{name}, {sum(p.numel() for p in frozen) / 1e9:.2f} B parameters"] = size
        encoders, *others = rows.values()
        held = {f"adapter, {sum(p.numel() for p in models.trained) / 1e9:.3f} B parameters in float32": adapter,
                "its gradients": size_of([p.grad for p in models.trained]), "AdamW's moments": self.moments,
                "its average": adapter, "kept trajectories": trajectory_size(models, args) * pictures,
                "their contexts": size_of(texts_of(models, args, pictures))}
        most, cache = {name: meter.peak for name, (_, meter) in self.rollout(n).items()}, 0
        if models.judge is not None:
            keys_values = judge_cache(models.judge, args, n)[0]
            cache = size_of([keys_values.k, keys_values.v])
        rows |= held | {"judge's cache, while it answers": cache} | {f"activations: {k}": size for k, size in most.items()}
        judging = [size + cache * name.startswith("judge") for name, size in most.items() if name not in DRAWING]
        rollout = max(most[name] for name in DRAWING) + max(judging, default=0)  # one chunk is judged beside the next one's
        peaks = {}
        for way in (False, True):
            meters, name = [meter for _, meter in self.update(n, way).values()], "update" + ", checkpointing" * way
            update = max(meter.peak for meter in meters)
            rows |= {f"kept for backward: {name}": meters[-1].kept, f"activations: {name}": update}
            for gone in (False, True):
                peaks[peak_name(gone, way)] = (encoders * (not gone) + sum(others) + sum(held.values())
                                               + max(rollout, update, self.optimizer.peak, models.encoder.peak))
        cached = min(ROWS * len(set(args.prompts)), args.steps * prompts) * size_of(models.encoding)
        return rows | peaks | {"host memory of each process: encoded prompts": cached}

    def costs(self, gpus):
        """{part: array of FLOP, bytes moved and seconds on each of GPUS}: the work of one of so many GPUs in a step."""
        args, rows = self.args, {}
        if args.encoders == "gpu":
            rows["text encoders, first epoch"] = math.ceil(args.batch / gpus) * cost(self.models.encoder)
        full, rest = divmod(args.batch * args.group // gpus, args.micro)
        for n, chunks in ((args.micro, full), (rest, 1)):
            if n * chunks:
                plain = self.update(n, False)
                for name, (times, meter) in (self.rollout(n) | plain).items():
                    rows[name] = rows.get(name, 0) + chunks * times * cost(meter)
                if args.checkpointing:
                    name, again = "update, recomputation", self.update(n, True)
                    for part, (times, meter) in again.items():
                        rows[name] = rows.get(name, 0) + chunks * times * (cost(meter) - cost(plain[part][1]))
        rows["optimizer"] = cost(self.optimizer)
        sent = 2 * (gpus - 1) / gpus * size_of(self.models.trained)  # in a ring
        rows["all-reduce"] = np.array([0, sent, *[sent / (NVLINK if gpus <= NODE else NETWORK) / TRAFFIC] * len(GPUS)])
        return rows | {"a step": sum(rows.values())}


def cost(meter):
    return np.array([meter.flops, meter.traffic, *meter.seconds.values()])


def peak_name(gone, checkpointing):
    return "peak" + ", encoders gone" * gone + ", checkpointing" * checkpointing


def show(args, processes):
    """Print the plan as Markdown. Raises UserError if the pictures of a step cannot be shared evenly."""
    pictures = args.batch * args.group
    for gpus in args.gpus:
        if gpus < 1 or pictures % gpus:
            raise UserError(f"--gpus {gpus}: the {pictures} pictures of a step (--batch {args.batch} × --group "
                                    f"{args.group}) cannot be shared by {gpus}; choose a divisor")
    if not processes.first:
        return 0
    plan = Plan(args)
    columns = [plan.memory(gpus) for gpus in args.gpus]
    print(f"Memory of a GPU in GB; {args.batch} prompts × {args.group} pictures of {args.size} px a step, at most "
          f"{args.micro} in one pass:\n")
    print_table(["GPUs", *args.gpus], {name: [number(c[name] / 1e9) for c in columns] for name in columns[0]})
    chosen = peak_name(args.encoders != "gpu", args.checkpointing)
    fit = [[gpu.name for gpu in GPUS if c[chosen] <= gpu.memory] or ["none"] for c in columns]
    print_row(f"fits with these settings ({chosen})", [", ".join(names) for names in fit])
    for gpus in args.gpus:
        rows = plan.costs(gpus)
        print(f"\nA step on {gpus} GPU{'s' * (gpus > 1)}, the work of each:\n")
        print_table(["part", "TFLOP", "GB moved", *(f"{gpu.name}, s" for gpu in GPUS)],
                    {name: map(number, row / ([1e12, 1e9] + [1] * len(GPUS))) for name, row in rows.items()})
        print_row(f"{args.steps:,} steps, hours", ["", "", *map(number, args.steps * rows["a step"][2:] / 3600)])
    print("\n" + notes(plan.models))
    return 0


def print_table(head, rows):
    print_row(head[0], head[1:])
    print("| --- |" + " ---: |" * (len(head) - 1))
    for name, values in rows.items():
        print_row(name, values)


def print_row(name, values):
    print(f"| {name} | " + " | ".join(map(str, values)) + " |")


def number(x):
    return f"{x:,.0f}" if x >= 100 else f"{x:.3g}"


def notes(models):
    """What the tables rest on, in sentences."""
    sheets = "; ".join(f"{g.name}: {g.bfloat16 / 1e12:.0f} TFLOP/s in bfloat16, {g.float32 / 1e12:.0f} in float32, "
                       f"{g.bandwidth / 1e12:.2f} TB/s, {g.memory / 1e9:.0f} GB" for g in GPUS)
    each = ", ".join(f"{1000 * s:.0f} ms on {g.name}" for g, s in models.encoder.seconds.items())
    return (f"Assumed: {ARITHMETIC:.0%} of the FLOP/s and {TRAFFIC:.0%} of the bandwidth ({sheets}; links "
            f"{NVLINK / 1e9:.0f} GB/s among {NODE} GPUs, {NETWORK / 1e9:.0f} GB/s beyond), answers of {ANSWER} tokens, "
            f"{ROWS:,} training prompts, kernels that are not fused and run one after another. Nothing here was timed. On a "
            f"GPU train_gen.py judges beside drawing: in memory the plan counts both at once, in time one after the other.\n"
            f"An encoded prompt takes {size_of(models.encoding) / 1e6:.2f} MB of host memory and {each}, once. --encoders "
            f"leave encodes all prompts of a process at the start; gpu and cpu encode each when it comes; cpu needs "
            f"{number(2 * size_of([p for m in models.encoders for p in m.parameters()]) / 1e9)} GB for float32 weights in "
            f"each process and computes {models.encoder.flops / 1e12:.1f} TFLOP a prompt there.")
