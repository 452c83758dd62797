"""The calls of a training step of generator and judge, made on PyTorch's meta device and counted.

The real modules are built without weights, and the calls that train_gen.py and train_judge.py make
run on them within an `OperatorCounter`. `bench/plan.py` adds up what these parts cost; args are its
flags. In order: models without weights, the generator's step, the judge's, the optimizer.

n: pictures in one batch. P prompts or questions, G answers to each, C tokens of an answer.
"""

import functools
import math
from dataclasses import dataclass
from unittest import mock

import torch
from PIL import Image

import feedback
import flow_grpo
import grpo
import mmdit
import qwen_vl
from bench.counter import OperatorCounter, measure, size_of
from kernels import lora_forms
from parts import chat, clip, lora, ops, text_encoders, vae
from parts.pipeline import PAPER

QUESTION = 149  # tokens of feedback.ask("regression", …) by Qwen's tokenizer, without the picture
ANSWER = 150  # tokens of the judge's answer, assumed; the cache has room for ANSWER_LIMIT
# Seconds a layer that the host takes to launch the kernels of a step of the decode, measured with
# an H200 (docs/gpu.md): 38 ms for 28 layers. A CUDA graph is recorded by two such steps, one of
# which runs and one of which is only written down; replaying it launches nothing.
LAUNCHES = 0.038 / 28
RECORDING = 2 * LAUNCHES

GENERATORS = {
    PAPER: mmdit.SD35_MEDIUM,
    "stabilityai/stable-diffusion-3.5-large": mmdit.SD35_LARGE,
}
JUDGES = {
    "Qwen/Qwen2.5-VL-7B-Instruct": qwen_vl.QWEN25_VL_7B,
    "Qwen/Qwen2.5-VL-3B-Instruct": qwen_vl.QWEN25_VL_3B,
}
SCORERS = {"yuvalkirstain/PickScore_v1": (clip.PICKSCORE_TEXT, clip.PICKSCORE_VISION)}


@dataclass(frozen=True)
class Part:
    """A part of a step: a call and how often it is made."""
    times: float
    counter: OperatorCounter
    kind: str = "forward"  # or "backward", or "memory", where the bytes may take longest
    launches: float = 0.0  # seconds that the host takes for a call, however fast the GPU is


# --------------------------------------------------------------------------------------------------
# Models without weights


@dataclass
class Models:
    mmdit: mmdit.MMDiT  # with its adapter
    trained: list  # the adapter's parameters, which have gradients
    copies: list  # of the adapter in bfloat16, for the products
    vae: vae.VAE
    encoders: list  # CLIP-L, bigG and, with T5, T5
    encoding: list  # context and pooled vector of one prompt
    encoder: OperatorCounter  # of its encoding
    judge: qwen_vl.QwenVL | None
    scorer: clip.CLIP | None


def build(args):
    """The Models of the settings, in the types that weights.build and lora.add_lora give them."""
    generator = on_meta(mmdit.MMDiT, GENERATORS[args.model])
    trained, copies = add_adapter(generator, args.lora_rank)
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
    return Models(generator, trained, copies, on_meta(vae.VAE, vae.SD3_VAE), encoders, encoding,
                  encoder, judge, scorer)


@dataclass
class JudgeModels:
    policy: qwen_vl.QwenVL  # in the type that it computes in, with its adapter if there is one
    trained: list  # the float32 parameters of the optimizer, with gradients, whole
    copies: list  # of the adapter in bfloat16
    reference: qwen_vl.QwenVL  # the policy itself, if there is an adapter to leave out


def build_judge(args, dtype):
    """The JudgeModels of the settings; dtype: what the policy computes in."""
    config = JUDGES[args.model]
    policy = on_meta(qwen_vl.QwenVL, config, dtype=dtype)
    if args.lora:
        trained, copies = add_adapter(policy, args.lora_rank)
        return JudgeModels(policy, trained, copies, policy)
    # Gradients that are there already are added to, and so do not count as activations: FSDP2 has
    # those of one block at a time, which `JudgePlan.gathered` counts.
    trained = with_gradients(policy.requires_grad_(True).parameters())
    if dtype != torch.float32:
        trained = with_gradients(torch.empty_like(p, dtype=torch.float32) for p in trained)
    return JudgeModels(policy, trained, [], on_meta(qwen_vl.QwenVL, config))


def add_adapter(model, rank):
    """(its parameters, with gradients, and the copies that kernels/lora_forms.py makes of them)."""
    lora.add_lora(model, model.lora_targets(), rank, 2.0 * rank)
    copies = []
    for layer in lora.lora_layers(model).values():
        copies += lora_forms.narrow_copies(layer.A, list(layer.B), 2.0, layer.weight.dtype)
    return with_gradients(p for p in model.parameters() if p.requires_grad), copies


def with_gradients(parameters):
    parameters = list(parameters)
    for p in parameters:
        p.grad = torch.zeros_like(p)
    return parameters


def on_meta(make, *configs, dtype=torch.bfloat16):
    with torch.device("meta"):
        return make(*configs).to(dtype).eval().requires_grad_(False)


def padded_tokens(length, prompts, warn=True):
    """In place of a tokenizer: every prompt is padded to the length, whatever it says."""
    return torch.zeros(len(prompts), length, dtype=torch.long)


def empty(*shape, dtype=torch.long):
    return torch.empty(shape, dtype=dtype, device="meta")


# --------------------------------------------------------------------------------------------------
# The generator's step: the calls that train_gen.py makes


def latents_of(models, args, n):
    side = args.size // models.vae.factor
    return empty(n, models.mmdit.config.channels, side, side, dtype=torch.float32)


def texts_of(models, args, n):
    """[context, pooled] of n pictures; with guidance those of the empty prompt are in front."""
    rows = 2 * n if args.guidance > 1 else n
    return [z.repeat(rows, *[1] * (z.dim() - 1)) for z in models.encoding]


@torch.no_grad()
def drawing_parts(models, args, n):
    """{name: Part}: n pictures drawn in one batch, and decoded one by one."""
    latents = latents_of(models, args, n)
    texts = texts_of(models, args, n)
    settings = sde_settings(args)
    velocity = measure(lambda _: flow_grpo.guided_velocity(
        models.mmdit, latents, 0.5, *texts, settings.guidance, settings.detach))
    decoder = measure(lambda _: models.vae.decode(latents[:1].bfloat16()).float())
    steps = args.sde_steps
    if args.group_start == "shared":  # until the window begins, one picture stands for its group
        steps -= steps_before_window(args) * (1 - 1 / args.group)
    return {"sampling": Part(steps, velocity), "VAE decoder": Part(n, decoder)}


def steps_before_window(args):
    """The mean number of a trajectory's steps before the window, which may begin anywhere."""
    if not args.window:
        return 0.0
    return ((args.window_within or args.sde_steps - args.skip_last) - args.window) / 2


def judging_parts(models, args, n):
    """({name: Part}, bytes of keys and values): n pictures read in one generation."""
    if models.judge is None:
        return {}, 0
    prompts = [judge_prompt(models.judge, args.size**2)] * n
    parts, cache = answer_parts(models.judge, prompts, 1, 0, feedback.ANSWER_LIMIT, ANSWER)
    return {f"judge, {name}": part for name, part in parts.items()}, cache


@torch.no_grad()
def scoring_parts(models, args, n):
    """{name: Part}: n pictures and the prompts of their groups scored in one batch."""
    if models.scorer is None:
        return {}
    text_config, vision_config = SCORERS[args.pickscore]
    side = vision_config.image_size
    ids = empty(math.ceil(n / args.group), text_config.max_position_embeddings)
    pixels = empty(n, 3, side, side, dtype=torch.bfloat16)
    return {"PickScore": Part(1, measure(lambda _: (
        models.scorer.embed_text(ids), models.scorer.embed_images(pixels))))}


def update_parts(models, args, n, checkpointing):
    """{name: Part}: the gradients of the kept steps of n pictures."""
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

    times = len(trajectory.settings.trained)
    parts = {"update, reference": Part(times, measure(reference))} if args.beta else {}
    return parts | {"update, forward and backward": Part(times, measure(gradients), "backward")}


def sde_settings(args):
    """The SDESettings that train_gen.py makes of the flags; a window may lie anywhere."""
    stochastic = range(args.window or args.sde_steps)
    trained = range(args.window or args.sde_steps - args.skip_last)
    return flow_grpo.SDESettings(args.sde_steps, args.guidance, stochastic=stochastic,
                                 trained=trained, detach=args.guidance_gradient == "conditional")


def trajectory_size(models, args):
    """Bytes of one picture's kept steps: of a real trajectory, on the CPU, of no model at all."""
    noise = torch.zeros(latents_of(models, args, 1).shape)
    texts = torch.zeros(2, 1)
    trajectory = flow_grpo.sample_sde(lambda x, *_: x, noise, texts, texts, sde_settings(args))
    tensors = [trajectory.latents]
    for step in trajectory.steps:
        tensors += [step.before, step.after, step.log_prob]
    return size_of(tensors)


@torch.no_grad()
def adapter_counters(models, args, n):
    """OperatorCounters of a forward pass over n pictures, both halves of guidance in one batch:
    (without the adapter, with it, with its plain form)."""
    mmdit = models.mmdit
    texts = texts_of(models, args, n)
    rows = len(texts[0])
    latents = latents_of(models, args, rows).to(texts[0].dtype)
    timestep = empty(rows, dtype=torch.float32)

    def forward(_):
        mmdit(latents, timestep, *texts)

    with lora.lora_disabled(mmdit):
        without = measure(forward)
    fused = measure(forward)
    with mock.patch.object(ops, "FUSED", False):
        return without, fused, measure(forward)


# --------------------------------------------------------------------------------------------------
# The judge, asked and trained: the calls of QwenVL.generate and of train_judge.py


def judge_prompt(judge, pixels):
    """A question about a square picture of so many pixels, as qwen_vl's Prompt."""
    side = math.isqrt(pixels)
    patches, grid = chat.image_patches(
        Image.new("RGB", (side, side)), chat.ImageConfig(max_pixels=pixels))
    tokens = math.prod(grid) // judge.config.merge**2
    ids = torch.zeros(QUESTION + tokens, dtype=torch.long)
    ids[:tokens] = judge.config.image_token
    return chat.Prompt(ids, patches, (grid,))


@torch.no_grad()
def answer_parts(judge, prompts, group, temperature, limit, length):
    """({name: Part}, bytes of keys and values) of one QwenVL.generate: `group` answers to each
    prompt, the longest of them of `length` tokens, with room for `limit`."""
    rows = len(prompts) * group
    last = empty(rows)
    uniforms = empty(rows, dtype=torch.float32)
    lengths = [len(prompt.ids) for prompt in prompts]
    cache = qwen_vl.StaticCache(judge.config, lengths, group, limit, judge.head_weight)

    def prefill(_):
        inputs = qwen_vl.joined(prompts, judge.config, "meta")
        hidden = judge.trunk(cache.prefill, *inputs)[empty(len(prompts))]
        logits = ops.logits(hidden, judge.head_weight).repeat_interleave(group, dim=0)
        return qwen_vl.sample(logits, temperature, uniforms)

    def decode(_):
        cache.go_to(empty(1))
        hidden = judge.trunk(cache.decode, last, last.expand(3, -1))
        return qwen_vl.sample(ops.logits(hidden, judge.head_weight), temperature, uniforms)

    # A CUDA graph needs equal shapes in all steps, so each of them reads the whole room.
    first = measure(prefill)
    token = measure(decode)
    parts = {"prefill": Part(1, first),
             "recording": Part(1, token, "memory", RECORDING * judge.config.layers),
             "decode": Part(length - 1, token, "memory")}
    return parts, size_of([cache.prompts, cache.own])


def judge_answer_parts(models, args, questions):
    """`answer_parts` of G answers to each of so many questions."""
    judge = models.policy
    prompts = [judge_prompt(judge, args.max_pixels)] * questions
    return answer_parts(judge, prompts, args.group, 1, args.max_new_tokens, args.answer)


def judge_update_parts(models, args, n, length, checkpointing):
    """{name: Part}: log-probabilities and gradients of G answers of `length` tokens to each of n
    questions, in one pass."""
    prompts = [judge_prompt(models.policy, args.max_pixels)] * n
    tokens = empty(n, args.group, length)
    mask = empty(n * args.group, length, dtype=torch.bool)
    advantages = empty(n * args.group, dtype=torch.float32)
    models.policy.checkpointing = checkpointing

    def log_probs_of(model):
        hidden = model.completion_hidden(prompts, tokens)  # [P,G,C,D]
        of_tokens = grpo.token_log_probs(hidden.flatten(0, 2), model.head_weight, tokens.flatten())
        return of_tokens.view(mask.shape)

    def reference(_):
        with torch.no_grad(), lora.lora_disabled(models.reference):
            log_probs_of(models.reference)

    def gradients(counter):
        new = log_probs_of(models.policy)
        ref = new.detach() if args.beta else None
        loss, _ = grpo.grpo_loss(new, new.detach(), ref, advantages, mask, beta=args.beta)
        counter.kept = counter.live
        loss.backward()

    parts = {"update, reference": Part(1, measure(reference))} if args.beta else {}
    return parts | {"update, forward and backward": Part(1, measure(gradients), "backward")}


# --------------------------------------------------------------------------------------------------
# The optimizer of both


def optimizer_counter(trained, ema):
    """(counter of clipping, AdamW's step and, if wanted, the EMA; bytes of AdamW's moments)."""
    optimizer = torch.optim.AdamW(trained, foreach=True)  # as by default on a GPU
    averages = [p.detach().clone() for p in trained] if ema else []
    optimizer.step()  # makes the moments

    def work(_):
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        for average, p in zip(averages, trained):
            average.lerp_(p.detach(), 0.1)

    counter = measure(work)
    moments = [t for state in optimizer.state.values() for t in state.values() if t.is_meta]
    return counter, size_of(moments)
