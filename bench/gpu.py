"""On a GPU, in one call: is everything right there, how fast is it, what memory does it need?

    python -m bench.gpu --out DIR                            # full size, random weights; 80 GB
    python -m bench.gpu --out DIR --parts generator,judge    # some of the parts
    python -m bench.gpu --out DIR --device cpu               # tiny sizes: does the script run?
    python -m bench.gpu --report DIR                         # the tables of an earlier call

Every part is a process of its own with a time limit, so that one that hangs or dies costs only
itself. The parts of the first stage tell what is right and run side by side; those after it
measure, one at a time. Every row is appended to DIR/rows.jsonl as soon as it is known, tracebacks
go to DIR/<part>.log, and in the end all tables are printed and written to DIR/report.md.

A kernel is right if its error is at most twice that of the plain form in the same type, and a
rounding; a model in the same sense, by what it gives in float32. Times of kernels are the
device's alone, with empty caches; bytes are the least that an operation can move. "GPU busy" is
the profiler's sum over all operations of a pass: where it is far below the wall's milliseconds, the
GPU waits for the host, which queues so many launches.
"""

import argparse
import contextlib
import copy
import functools
import importlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import types
from dataclasses import dataclass, replace
from pathlib import Path
from unittest import mock

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import flow_grpo
import grpo
import mmdit
import qwen_vl
from bench.counter import size_of
from bench.measure import Rows, Skipped, free, markdown, measured, peak_rates, profiled
from kernels import FORMS
from parts import cli, layouts, lora, ops, pipeline, sharding, vae

ROOT = Path(__file__).resolve().parent.parent
MODEL = torch.bfloat16  # the type of all models
RANK = 32  # of the adapters
WORDS = 170  # of the judge's question, in tokens
TOP = 15  # operations in a profile
PROGRAM = 70  # seconds that a training program may take on a GPU


# Four blocks at full width, for the comparison with a copy in float32.
SHALLOW_JUDGE = replace(qwen_vl.QWEN25_VL_7B, layers=4, vision_layers=4, full_blocks=(3,))
# What FSDP2 shards, all of it trained in float32.
SHARDED_JUDGE = replace(
    qwen_vl.QWEN25_VL_7B, width=1024, layers=4, heads=8, kv_heads=2, mlp=2816, vocab=32_000,
    image_token=31_990, vision_width=640, vision_heads=8, vision_mlp=1708, vision_layers=4,
    full_blocks=(3,))


@dataclass(frozen=True)
class Sizes:
    device: str = "cuda"
    generator: mmdit.MMDiTConfig = mmdit.SD35_MEDIUM
    autoencoder: vae.VAEConfig = vae.SD3_VAE
    judge: qwen_vl.QwenVLConfig = qwen_vl.QWEN25_VL_7B
    shallow: qwen_vl.QwenVLConfig = SHALLOW_JUDGE
    sharded: qwen_vl.QwenVLConfig = SHARDED_JUDGE
    timed: tuple = (8, 1024, 64, 4096)  # pictures, tokens, side of latents, rows of logits
    checked: tuple = (2, 1021, 63, 4093)  # the same where errors are measured: they fill no tile
    copied: int = 2**30  # bytes of the copy whose speed others are shares of
    product: int = 8192  # rows and columns of the matrix product of that kind
    keys: int = 704  # of attention with a mask
    heads: tuple = (28, 128)  # of that attention, and their channels
    latent: int = 64  # side, an eighth of the picture's
    text: int = 333  # tokens the generator reads
    batch: int = 8  # pictures
    few: int = 2  # pictures of a step beside other parts, that keeps all activations
    drawn: tuple = (4, 2)  # steps of the stochastic sampler, and how many of them are evaluated
    steps: int = 10  # of the sampler
    picture: int = 504  # side in pixels of what the judge sees
    group: int = 8  # its answers
    new_tokens: int = 64  # of each
    repeats: int = 3  # of a model's pass
    launches: int = 10  # of a kernel


TINY_JUDGE = qwen_vl.QwenVLConfig(
    width=32, layers=2, heads=2, kv_heads=1, mlp=24, sections=(2, 3, 3), vocab=60, image_token=50,
    vision_width=16, vision_layers=2, vision_heads=2, vision_mlp=20, full_blocks=(1,))
SMALL = Sizes(
    "cpu",
    mmdit.MMDiTConfig(depth=2, heads=1, head_dim=16, dual_blocks=(0,), context_dim=24,
                      pooled_dim=20, positions=8),
    vae.VAEConfig(channels=(16, 16, 16, 16), blocks=1, groups=8),
    TINY_JUDGE, TINY_JUDGE, TINY_JUDGE, timed=(1, 1, 8, 3), checked=(1, 2, 5, 2), copied=2**16,
    product=64, keys=70, heads=(2, 8), latent=4, text=3, batch=2, few=1, drawn=(2, 1), steps=2,
    picture=56, group=2, new_tokens=4, repeats=1, launches=1)


def on_cuda(s):
    return s.device == "cuda"


def needs_cuda(s):
    if not on_cuda(s):
        raise Skipped("needs CUDA")


def forms(fused):
    """Within it operations take their fused forms, or the plain ones as with KERNELS=plain."""
    return mock.patch.object(ops, "FUSED", fused)


@contextlib.contextmanager
def cudnn(allowed):
    """Within it torch may choose cuDNN's attention, which parts/ops.py switches off."""
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(allowed)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


@contextlib.contextmanager
def on_the_kernels(s):
    """Within it the forms for CUDA run also on a CPU, where Triton interprets its kernels."""
    with contextlib.ExitStack() as stack:
        for name, form in FORMS.items():
            if form.cuda is not None and not on_cuda(s):
                module, _, operation = name.rpartition(".")
                plain = getattr(importlib.import_module(module), operation)
                fused = getattr(importlib.import_module(f"kernels.{form.cuda}"), operation)
                stack.enter_context(mock.patch.dict(plain.forms, cpu=fused))
        yield


def backend(s):
    """Of torch.compile: on a CPU one that only traces; to compile there would tell nothing."""
    return "inductor" if on_cuda(s) else "aot_eager"


@functools.cache
def rates(s):
    """(bytes/s of a copy, FLOP/s of a product) of this device."""
    return peak_rates(s.device, s.copied, s.product)


# --------------------------------------------------------------------------------------------------
# Kernels


def cases_of(s, dtype, sizes):
    """{name: case} of all operations that Triton kernels compute."""
    from bench import kernel_table  # it imports triton, which may have to interpret

    def make(*shape, dtype):
        if dtype == torch.int64:
            return torch.randint(2048, shape, device=s.device)
        return torch.randn(shape, dtype=dtype, device=s.device)

    cases = kernel_table.make_cases(dtype, *sizes, make=make)
    return {f"{case.name}, {case.shape}, {kernel_table.TYPES[case.tensors[0].dtype]}": case
            for case in cases}


def half_type(s):
    return MODEL if on_cuda(s) else torch.float16  # the interpreter does not round to bfloat16


def errors_in_half(rows, s):
    """Errors of all operations in half; then their compilation at the sizes that are timed."""
    operation_errors(rows, s, half_type(s))
    if on_cuda(s):
        with forms(False):
            for case in cases_of(s, half_type(s), s.timed).values():
                with contextlib.suppress(Exception):  # the row that times it will tell
                    results_of(case.fused, case.tensors, case.trained)


def errors_in_float32(rows, s):
    """Of each operation at one size; in half they are computed at all."""
    operation_errors(rows, s, torch.float32, one_each=True)


def operation_errors(rows, s, dtype, one_each=False):
    cases = cases_of(s, dtype, s.checked)
    if one_each:
        cases = {name: cases[name] for name in firsts_of(cases)}
    with forms(False):
        for name, case in cases.items():
            rows.run("kernel against float64", name, functools.partial(kernel_errors, case))


def firsts_of(cases):
    """The name of the first case of each operation."""
    firsts = {}
    for name, case in cases.items():
        firsts.setdefault(case.name.split(",")[0], name)
    return list(firsts.values())


def kernel_speed(rows, s):
    """Times in half, and at one size each beside torch.compile's."""
    cold = torch.empty(s.copied, dtype=torch.uint8, device=s.device)
    timed = cases_of(s, half_type(s), s.timed)
    with forms(False):
        for name, case in timed.items():
            rows.run("kernel, forward and backward", name,
                     functools.partial(kernel_times, case, s, cold))
        for name in firsts_of(timed):
            rows.run("kernel beside torch.compile of the plain form", name,
                     functools.partial(kernel_times, timed[name], s, cold, True))


def results_of(function, tensors, trained, above=None):
    """(results and gradients of the first `trained` tensors, the gradients from above).

    above: gradients of the results; drawn if not given.
    """
    leaves = [t.detach().requires_grad_(i < trained) for i, t in enumerate(tensors)]
    with torch.set_grad_enabled(trained > 0):
        results = function(*leaves)
    results = results if isinstance(results, tuple) else (results,)
    if not trained:
        return results, None
    above = above or [torch.randn_like(r) for r in results]
    gradients = torch.autograd.grad(results, leaves[:trained], above)
    return [r.detach() for r in results] + list(gradients), above


def kernel_errors(case):
    """Greatest errors of a kernel and its plain form, as shares of each result's greatest value."""
    def given():  # what works in place must not change the case
        return case.tensors if case.trained else [t.clone() for t in case.tensors]

    ours, above = results_of(case.fused, given(), case.trained)
    plain, _ = results_of(case.plain, given(), case.trained, above)
    wide = [t.double() if t.is_floating_point() else t for t in given()]
    # Where plain forms go over to float32, these tensors stay as wide as they are.
    stays_wide = mock.patch.object(
        torch.Tensor, "float", lambda x: x.to(torch.promote_types(x.dtype, torch.float32)))
    with stays_wide:
        exact, _ = results_of(case.plain, wide, case.trained, above and [g.double() for g in above])

    def error(x, truth):
        return float((x.double() - truth).abs().max() / truth.abs().max().clamp(min=1e-30))

    errors = torch.tensor([[error(x, truth) for x in pair]
                           for *pair, truth in zip(ours, plain, exact, strict=True)])
    roundings = torch.tensor([max(torch.finfo(x.dtype).eps, 1e-6) for x in ours])
    kernel, form = errors.amax(0).tolist()
    right = bool((errors[:, 0] <= 2 * errors[:, 1] + roundings).all())
    return {"kernel's error": kernel, "plain error": form, "right": right}


def kernel_times(case, s, cold, compiled=False):
    _, above = results_of(case.fused, case.tensors, case.trained)
    other = case.plain
    if compiled:
        torch._dynamo.reset()
        other = torch.compile(case.plain, dynamic=False, backend=backend(s))
    (ms, host, _), (theirs, *_) = (
        measured(functools.partial(results_of, f, case.tensors, case.trained, above), s.device,
                 s.launches, cold)
        for f in (case.fused, other))
    rate = case.least / ms * 1e3
    name = "compiled" if compiled else "plain"
    return {"ms": ms, f"{name}, ms": theirs, f"{name}/kernel": theirs / ms, "GB/s": rate / 1e9,
            "share of copy": rate / rates(s)[0], "host's ms to queue it": host}


# --------------------------------------------------------------------------------------------------
# Attention with a mask


def masked_attention(s, with_cudnn):
    """Forward and backward of a group's answers over their prompt, as in training of the judge."""
    needs_cuda(s)
    H, E = s.heads
    keys = s.keys
    C = min(64, keys)
    q, k, v = (torch.randn(s.group, H, n, E, device=s.device, dtype=MODEL, requires_grad=True)
               for n in (C, keys, keys))
    mask = torch.ones(C, keys, dtype=torch.bool, device=s.device).tril(keys - C)
    above = torch.randn(s.group, C, H * E, device=s.device, dtype=MODEL)

    def of(q, k, v, above):
        out = ops.attention(q, k, v, mask)
        return [out.detach(), *torch.autograd.grad(out, (q, k, v), above)]

    wide = [t.detach().float().requires_grad_() for t in (q, k, v)]
    with sdpa_kernel(SDPBackend.MATH):
        exact = of(*wide, above.float())
    with cudnn(with_cudnn):
        chosen = SDPBackend(torch._fused_sdp_choice(q, k, v, mask)).name
        ours = of(q, k, v, above)
    names = "output", "dq", "dk", "dv"
    bad = [name for name, x in zip(names, ours, strict=True) if not bool(x.isfinite().all())]
    gaps = [float((x.float() - y).norm() / y.norm()) for x, y in zip(ours, exact, strict=True)]
    return {"computed by": chosen, "finite": not bad, "not finite": ", ".join(bad) or None,
            "greatest relative error": max(gaps)}


# --------------------------------------------------------------------------------------------------
# Random models


def random_model(make, config, device, dtype=MODEL):
    """make(config), frozen, its weights random and such that what passes a layer keeps its size."""
    with torch.device("meta"):
        model = make(config)
    model = model.to(dtype).to_empty(device=device).eval().requires_grad_(False)
    for p in model.parameters():
        p.normal_(0, p[0].numel() ** -0.5) if p.dim() > 1 else p.normal_(0.5, 0.1)
    for b in model.buffers():
        b.normal_()
    return model


def add_adapter(model):
    """A LoRA that changes something, as a new one does not."""
    lora.add_lora(model, model.lora_targets(), RANK, 2.0 * RANK)
    for p in trained(model):
        p.data.normal_(0, 0.02)


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


def relative(x, truth):
    return float((x.float() - truth.float()).norm() / truth.float().norm())


def model_errors(model, run):
    """Relative errors of run(model), with fused and plain forms, to the model in float32."""
    wide = copy.deepcopy(model).float()
    outputs = {}
    for name, fused, of in (("float32", False, wide), ("fused", True, model),
                            ("plain", False, model)):
        with forms(fused):
            outputs[name] = torch.cat([t.detach().float().flatten() for t in run(of)])
    ours, plain = (relative(outputs[name], outputs["float32"]) for name in ("fused", "plain"))
    return {"fused, error": ours, "plain, error": plain,
            "fused to plain": relative(outputs["fused"], outputs["plain"]),
            "right": ours <= 2 * plain + torch.finfo(MODEL).eps}


# --------------------------------------------------------------------------------------------------
# The generator


def generator_inputs(s, batch, device):
    """(latents, timestep, context, pooled) as MMDiT.forward takes them."""
    c = s.generator
    shapes = (c.channels, s.latent, s.latent), (s.text, c.context_dim), (c.pooled_dim,)
    latents, *texts = (torch.randn(batch, *shape, dtype=MODEL, device=device) for shape in shapes)
    return latents, torch.full((batch,), 500.0, device=device), *texts


def velocity(model, latents, timestep, context, pooled):
    dtype = model.pos_embed.dtype
    return model(latents.to(dtype), timestep, context.to(dtype), pooled.to(dtype))


def velocity_gradients(model, *inputs):
    """Of the adapter, for a loss that is the mean square of the velocity."""
    loss = velocity(model, *inputs).float().square().mean()
    return torch.autograd.grad(loss, trained(model))


def generator_policy(rows, s):
    """Is the log-probability of a step that was drawn that of the same step evaluated?"""
    for name, allowed in (("ops.attention", False), ("cuDNN allowed", True)):
        rows.run("attention with a mask, backward", f"{s.keys} keys, {name}",
                 functools.partial(masked_attention, s, allowed))
    model = random_model(mmdit.MMDiT, s.generator, s.device)
    add_adapter(model)
    table = "a drawn step evaluated, guidance 4.5"
    run = functools.partial(drawn_and_evaluated, model, s)
    rows.run(table, f"{s.few} pictures", lambda: run(s.few, False))
    rows.run(table, f"{s.few} pictures, checkpointing", lambda: run(s.few, True))
    rows.run(table, f"{s.few} pictures, cuDNN", lambda: run(s.few, False, with_cudnn=True))
    rows.run(table, f"{s.batch} pictures, checkpointing", lambda: run(s.batch, True))
    rows.run(table, f"{s.few} pictures, plain forms", lambda: run(s.few, False, fused=False))


def drawn_and_evaluated(model, s, batch, checkpointing, fused=True, with_cudnn=False):
    """The ratio is exactly 1 if drawing and evaluation compute alike."""
    inputs = generator_inputs(s, 2 * batch, s.device)
    noise, texts = inputs[0][:batch].float(), inputs[2:]
    seeds = [torch.Generator().manual_seed(i) for i in range(batch)]
    model.checkpointing = checkpointing
    gaps = []
    norms = []
    with contextlib.ExitStack() as stack:
        stack.enter_context(forms(fused))
        if fused:
            stack.enter_context(on_the_kernels(s))
        stack.enter_context(cudnn(with_cudnn))
        settings = flow_grpo.SDESettings(s.drawn[0], trained=range(s.drawn[1]))
        trajectory = flow_grpo.sample_sde(model, noise, *texts, settings, seeds)
        for k, kept in enumerate(trajectory.steps):
            with torch.no_grad(), lora.lora_disabled(model):
                reference = flow_grpo.kept_velocity(model, trajectory, k, *texts)
            step = flow_grpo.evaluate_step(model, trajectory, k, *texts, reference)
            gaps.append((step.log_prob.detach() - kept.log_prob).abs())
            ones = torch.ones_like(step.log_prob)
            loss, _ = flow_grpo.flow_grpo_loss(step.log_prob, kept.log_prob, ones, step.kl)
            gradients = torch.autograd.grad(loss, trained(model))
            norms.append(float(torch.stack([g.norm() for g in gradients]).norm()))
    gap = torch.cat(gaps)
    return {"log p equal in every bit": bool((gap == 0).all()),
            "greatest |Δ log p|": float(gap.max()),
            "greatest |ratio − 1|": float(gap.exp().sub(1).max()),
            "log p": float(trajectory.steps[0].log_prob.mean()),
            "gradient norm": max(norms),
            "finite": bool(torch.tensor(norms).isfinite().all())}


def generator_flop(s):
    """(forward, forward and backward with an adapter) of a batch, counted on the meta device."""
    from torch.utils.flop_counter import FlopCounterMode  # it imports triton: see kernel_table

    with torch.device("meta"):
        model, inputs = mmdit.MMDiT(s.generator), generator_inputs(s, s.batch, "meta")

    def flop_of(run):  # attention is counted as its two products
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            run(model, *inputs)
        return counter.get_total_flops()

    forward = flop_of(torch.no_grad()(velocity))
    add_adapter(model)
    return forward, flop_of(velocity_gradients)


def generator_speed(rows, s):
    """Errors at one picture; times and memory. What checkpointing computes twice counts once."""
    model = random_model(mmdit.MMDiT, s.generator, s.device)
    one, inputs = (generator_inputs(s, n, s.device) for n in (1, s.batch))
    forward_flop, step_flop = generator_flop(s)
    rows.add("device", "rates", **{"copy, GB/s": rates(s)[0] / 1e9,
                                   "product, TFLOP/s": rates(s)[1] / 1e12})

    def speed(function, flop, fused, checkpointing=False, with_cudnn=False):
        model.checkpointing = checkpointing
        with forms(fused), cudnn(with_cudnn):
            ms, host, peak = measured(lambda: function(model, *inputs), s.device, s.repeats)
            busy = busy_cells(s, lambda: function(model, *inputs))
        return {"ms": ms, **busy, "host's ms": host, "TFLOP/s": flop / ms / 1e9,
                "share of product": flop / ms * 1e3 / rates(s)[1], "peak, GB": peak}

    step = functools.partial(speed, velocity_gradients, step_flop)
    forward = torch.no_grad()(functools.partial(speed, velocity, forward_flop))
    add_adapter(model)
    pixels = s.latent * 8
    table = f"LoRA step, rank {RANK}, batch {s.batch}, {pixels} px"
    rows.run(table, "fused", lambda: step(True))
    rows.run(table, "fused, checkpointing", lambda: step(True, True))
    rows.run(table, "plain", lambda: step(False))
    rows.run(table, "fused, cuDNN", lambda: step(True, with_cudnn=True))
    profile_rows(rows, s, "LoRA step, its GPU operations",
                 lambda: velocity_gradients(model, *inputs))
    model.checkpointing = True
    rows.run("against float32", "velocity", lambda: model_errors(
        model, torch.no_grad()(lambda of: [velocity(of, *one)])))
    rows.run("against float32", "adapter's gradients",
             lambda: model_errors(model, lambda of: velocity_gradients(of, *one)))
    model.checkpointing = False
    rows.run("LoRA layer, forward and backward", f"{s.generator.width} to 3·{s.generator.width}",
             lambda: lora_layer(s))
    lora.merge_lora(model)
    table = f"forward, batch {s.batch}, {pixels} px"
    rows.run(table, "fused", lambda: forward(True))
    rows.run(table, "plain", lambda: forward(False))
    rows.run(table, "fused, cuDNN", lambda: forward(True, with_cudnn=True))
    picture_rows(rows, s, model)


def busy_cells(s, run):
    """GPU-busy milliseconds and launches of run(), which must be warm; nothing on a CPU."""
    if not on_cuda(s):
        return {}
    seen = profiled(run).values()
    return {"GPU busy, ms": sum(ms for ms, _ in seen), "launches": sum(calls for _, calls in seen)}


def lora_layer(s):
    """One projection with an adapter: its time, and its gradients by both forms."""
    D = s.generator.width
    linear = random_model(lambda _: torch.nn.Linear(D, 3 * D), None, s.device)
    layer = lora.LoRA(linear, dict.fromkeys("qkv", D), RANK, 2.0 * RANK)
    for p in trained(layer):
        p.data.normal_(0, 0.02)
    x = torch.randn(s.batch, s.latent**2 // 4 + s.text, D, dtype=MODEL, device=s.device)
    x.requires_grad_()
    above = torch.randn(*x.shape[:-1], 3 * D, dtype=MODEL, device=s.device)

    def run(of):
        own = x.to(of.weight.dtype)
        return torch.autograd.grad(of(own), (own, *trained(of)), above.to(own.dtype))

    cells = {}
    for name, fused in (("fused", True), ("plain", False)):
        with forms(fused):
            cells[f"{name}, ms"] = measured(lambda: run(layer), s.device, s.repeats)[0]
            busy = busy_cells(s, lambda: run(layer))
            cells |= {f"{name}, {key}": value for key, value in busy.items()}
    return {**cells, **model_errors(layer, run)}


def picture_rows(rows, s, model):
    """Whole pictures: the sampler's steps, then the autoencoder, as sample.py has them."""
    decoder = random_model(vae.VAE, s.autoencoder, s.device)
    generator = pipeline.Generator(model, decoder, encoders=None, shift=3.0, name="random")

    def draw(batch):
        latents, _, *texts = generator_inputs(s, 2 * batch, s.device)
        noise = latents[:batch].float()
        ms, _, peak = measured(
            lambda: flow_grpo.sample_ode(model, noise, *texts, s.steps, 4.5), s.device, 1,
            warm_up=1)
        decode, _, decode_peak = measured(
            lambda: generator.decode(noise), s.device, 1, warm_up=1)
        at_once, _, at_once_peak = measured(
            torch.no_grad()(lambda: decoder.decode(noise.to(MODEL))), s.device, 1, warm_up=1)
        return {"ms a step": ms / s.steps, "steps, peak GB": peak, "decode one by one, ms": decode,
                "its peak, GB": decode_peak, "decode all at once, ms": at_once,
                "peak of that, GB": at_once_peak}

    for batch in (s.batch, 1):
        rows.run(f"pictures of {s.latent * 8} px, {s.steps} steps, guidance 4.5",
                 f"batch {batch}", functools.partial(draw, batch))


def profile_rows(rows, s, table, run, less=None, by=1):
    """The operations that take longest in run(), less those of less(), both divided by `by`."""
    spent = {}

    def totals():
        needs_cuda(s)
        seen = profiled(run)
        before = profiled(less) if less else {}
        for name, (ms, calls) in seen.items():
            other = before.get(name, (0.0, 0))
            spent[name] = (ms - other[0]) / by, (calls - other[1]) / by
        return {"ms": sum(ms for ms, _ in spent.values()),
                "calls": sum(calls for _, calls in spent.values())}

    rows.run(table, "all", totals)
    whole = sum(ms for ms, _ in spent.values())
    for name, (ms, calls) in sorted(spent.items(), key=lambda item: -item[1][0])[:TOP]:
        rows.add(table, name, ms=ms, calls=calls, share=ms / whole)


# --------------------------------------------------------------------------------------------------
# The judge


def judge_prompt(s, config):
    """A square picture, as noise, among random words."""
    side = s.picture // config.patch
    ids = torch.randint(config.image_token - 10, (WORDS,))
    ids[13], ids[14] = config.image_token - 3, config.image_token - 2  # start and end of a picture
    image = torch.full((side**2 // config.merge**2,), config.image_token)
    pixels = torch.randn(side**2, 3 * config.frames * config.patch**2)
    return qwen_vl.Prompt(torch.cat([ids[:14], image, ids[14:]]), pixels, ((1, side, side),))


def random_judge(config, device, dtype=MODEL):
    model = random_model(qwen_vl.QwenVL, config, device, dtype)
    # No answer ends by itself, so that all have the same length.
    model.processor = types.SimpleNamespace(stop=(-1,), decode=lambda ids: "")
    return model


def answers_of(model, prompt, s, graph=False, new_tokens=None, temperature=1.0):
    """(tokens, log-probabilities) [G,C] of a group of answers, on the CPU, always of one seed."""
    model.graphs = graph
    out = model.generate([prompt], s.group, new_tokens or s.new_tokens, temperature,
                         generator=torch.Generator().manual_seed(0))[0]
    model.graphs = False
    return torch.stack([a.tokens for a in out]), torch.stack([a.log_probs for a in out])


def answer_gradients(model, prompt, answers):
    hidden = model.completion_hidden([prompt], answers).flatten(0, 2)
    log_probs = grpo.token_log_probs(hidden, model.head_weight, answers.flatten())
    return torch.autograd.grad(-log_probs.mean(), trained(model))


def judge_policy(rows, s):
    whole_judge(rows, s)
    free()  # before the next model
    shallow_judge(rows, s)


def whole_judge(rows, s):
    """Does training see the probabilities that sampling saw; do graphs change an answer?"""
    model = random_judge(s.judge, s.device)
    prompt = judge_prompt(s, s.judge)
    add_adapter(model)
    table = f"sampled against trained, {s.judge.layers} layers, adapter, {s.group}×{s.new_tokens}"
    for scale in (1.0, 8.0):  # 8: logits as far apart as those of a trained model
        model.head_weight.data.mul_(scale)
        name = f"deviation of logits about {scale / 2:g}"
        rows.run(table, name, lambda: sampled_and_trained(model, prompt, s))
        rows.run(table, f"{name}, graph", lambda: sampled_and_trained(model, prompt, s, True))
        rows.run(table, f"{name}, plain forms",
                 lambda: sampled_and_trained(model, prompt, s, fused=False))
    # Of the likeliest tokens only. A graph has the whole room for an answer in every step, so its
    # sums round otherwise; a sampled token near the edge of two then differs, and all after it.
    table = f"likeliest tokens by a graph against those without, {s.group}×{s.new_tokens}"
    rows.run(table, "adapter", lambda: graph_and_eager(model, prompt, s))
    lora.merge_lora(model)
    rows.run(table, "merged", lambda: graph_and_eager(model, prompt, s))


def shallow_judge(rows, s):
    """Hidden states and gradients of a few layers against float32."""
    shallow = random_judge(s.shallow, s.device)
    prompt = judge_prompt(s, s.shallow)
    answers = torch.randint(s.shallow.image_token - 10, (1, s.group, s.new_tokens),
                            device=s.device)
    add_adapter(shallow)
    shallow.checkpointing = True

    @torch.no_grad()
    def hidden(of):
        return [of.completion_hidden([prompt], answers)]

    table = f"{s.shallow.layers} layers against float32, checkpointing"
    rows.run(table, "hidden states", lambda: model_errors(shallow, hidden))
    rows.run(table, "adapter's gradients", lambda: model_errors(
        shallow, lambda of: answer_gradients(of, prompt, answers)))


def sampled_and_trained(model, prompt, s, graph=False, fused=True):
    if graph:
        needs_cuda(s)
    with forms(fused):
        tokens, sampled = answers_of(model, prompt, s, graph)
        tokens = tokens[None].to(s.device)
        model.checkpointing = True
        hidden = model.completion_hidden([prompt], tokens).flatten(0, 2)
        computed = grpo.token_log_probs(hidden, model.head_weight, tokens.flatten())
    gap = computed.detach().cpu().view_as(sampled) - sampled
    off = gap.exp().sub(1).abs()
    first = float(off[:, 0].max())
    return {"mean log p": float(sampled.mean()), "mean |Δ log p|": float(gap.abs().mean()),
            "mean ratio": float(gap.exp().mean()), "greatest |ratio − 1|": float(off.max()),
            "at the first token": first, "share beyond 0.1": float((off > 0.1).double().mean()),
            "share beyond 0.5": float((off > 0.5).double().mean())}


def graph_and_eager(model, prompt, s):
    needs_cuda(s)
    (a, p), (b, q) = (answers_of(model, prompt, s, on, temperature=0.0) for on in (False, True))
    same = (a == b).cumprod(1).bool()  # up to the first difference of each answer
    return {"tokens equal": bool(torch.equal(a, b)), "log p equal": bool(torch.equal(p, q)),
            "share before a difference": float(same.double().mean()),
            "greatest |Δ log p| there": float((p - q)[same].abs().max())}


def judge_speed(rows, s):
    """One picture and question: training; generation, whose every step reads all weights once."""
    model = random_judge(s.judge, s.device)
    prompt = judge_prompt(s, s.judge)
    answers = torch.randint(s.judge.image_token - 10, (1, s.group, s.new_tokens), device=s.device)
    work = f"{len(prompt.ids)} tokens of prompt, {s.group} answers of {s.new_tokens}"

    def generate(fused, graph=False):
        if graph:
            needs_cuda(s)
        # A step without a graph takes the host's time of some 400 launches, so few steps tell.
        most = s.new_tokens if graph else max(2, s.new_tokens // 4)
        half = most // 2

        def run(new_tokens):
            answers_of(model, prompt, s, graph, new_tokens)

        with forms(fused):
            (prefill, *_), (shorter, *_), (longer, _, peak) = (
                measured(functools.partial(run, n), s.device, 2, warm_up=1)
                for n in (1, half, most))
        ms = (longer - shorter) / (most - half)
        read = sum(p.nbytes for p in model.model.layers.parameters()) + model.head_weight.nbytes
        rate = read / ms * 1e3
        return {"prefill, ms": prefill, "decode, ms a step": ms, "of tokens": most,
                "whole, ms": longer, "tokens/s": s.group / ms * 1e3, "weights, GB/s": rate / 1e9,
                "share of copy": rate / rates(s)[0], "peak, GB": peak}

    def step(fused, checkpointing):
        model.checkpointing = checkpointing
        with forms(fused):
            ms, host, peak = measured(
                lambda: answer_gradients(model, prompt, answers), s.device, s.repeats)
            busy = busy_cells(s, lambda: answer_gradients(model, prompt, answers))
        return {"ms": ms, **busy, "host's ms": host,
                "tokens of answers/s": answers.numel() / ms * 1e3, "peak, GB": peak}

    add_adapter(model)
    table = f"generation, {work}"
    rows.run(table, "adapter, graph", lambda: generate(True, True))
    training = f"LoRA step, rank {RANK}, {work}"
    rows.run(training, "fused, checkpointing", lambda: step(True, True))
    rows.run(training, "plain, checkpointing", lambda: step(False, True))
    rows.run(training, "fused", lambda: step(True, False))
    lora.merge_lora(model)
    rows.run(table, "merged, graph", lambda: generate(True, True))
    rows.run(table, "merged", lambda: generate(True))
    rows.run(table, "merged, plain forms", lambda: generate(False))
    # Last, because a profiler that fails while a graph is recorded would take the rest with it.
    profile_decode(rows, s, model, prompt, "merged")
    add_adapter(model)
    profile_decode(rows, s, model, prompt, "adapter")


def profile_decode(rows, s, model, prompt, name):
    """The GPU operations of a decode step by a graph.

    Both calls have the prefill and the recording, so that their difference is the replays'.
    """
    profile_rows(rows, s, f"a decode step by a graph, {name}, its GPU operations",
                 lambda: answers_of(model, prompt, s, True, 24),
                 lambda: answers_of(model, prompt, s, True, 8), 16)


# --------------------------------------------------------------------------------------------------
# The programs, and FSDP2


def programs(rows, s):
    """Each training program on the miniature, side by side: two steps with --checkpointing."""
    if not (ROOT / "tiny" / "weights" / "judge").exists():
        rows.add("programs", "all", skipped="no tiny/weights")
        return
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        dataset = folder / "dataset"
        command = [sys.executable, "-m", "tiny.dataset", "--train", "16", "--test", "4",
                   "--out", str(dataset)]
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
        common = ["--data", str(dataset), "--device", s.device, "--steps", "2", "--batch", "2",
                  "--eval-rows", "2", "--checkpointing"]
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone",
                    "--nproc-per-node", "1"]
        short = [] if on_cuda(s) else ["--max-new-tokens", "16", "--group", "2"]
        drawing = [] if on_cuda(s) else ["--size", "32", "--sde-steps", "3",
                                         "--window-within", "2", "--group", "2"]
        commands = {
            "train_gen.py": [sys.executable, "train_gen.py", *common, "--sample-steps", "4",
                             *drawing],
            "train_judge.py --lora": [
                sys.executable, "train_judge.py", *common, *short, "--lora"],
            "torchrun train_judge.py": [*torchrun, "train_judge.py", *common, *short],
        }
        running = {}
        for i, (name, command) in enumerate(commands.items()):
            log = open(folder / f"{i}.log", "wb")
            started = time.perf_counter()
            process = subprocess.Popen([*command, "--out", str(folder / str(i))], cwd=ROOT,
                                       stdout=log, stderr=subprocess.STDOUT)
            running[name] = process, folder / str(i), folder / f"{i}.log", started
        while running:
            for name, (process, *place) in list(running.items()):
                if process.poll() is not None:
                    rows.run("programs", name, functools.partial(
                        program_cells, rows, name, process.returncode, *place))
                    del running[name]
                elif on_cuda(s) and time.perf_counter() - place[-1] > PROGRAM:
                    process.terminate()  # torchrun then ends its own processes
            time.sleep(0.2)


def program_cells(rows, name, code, out, log, started):
    """A finished program's exit code, and what its log says of the last step."""
    text = log.read_text(encoding="utf-8", errors="replace")
    lines = [line for line in text.replace("\r", "\n").splitlines() if line.strip()]
    rows.note(f"{name}: exit code {code}\n" + "\n".join(lines[-60:]))
    cells = {"exit code": code, "right": code == 0,
             "wall, s": round(time.perf_counter() - started, 1)}
    if code and lines:
        cells["last line"] = lines[-1][:300]
    path = out / "log.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    steps = [r for r in records if "reward" in r]
    if steps:
        cells["steps"] = len(steps)
        cells["first step's greatest |ratio − 1|"] = steps[0].get("ratio_max_deviation")
        cells["its sampling mismatch"] = steps[0].get("mismatch_mean")
        for key in ("reward", "ratio", "kl", "grad_norm", "seconds_rollout", "seconds_update"):
            cells[key] = steps[-1].get(key)
    return cells


def sharded(rows, s):
    """FSDP2 with one process: answers, a step of training, and the whole weights again."""
    import torch.distributed as dist

    with tempfile.TemporaryDirectory() as folder:
        if on_cuda(s):
            torch.cuda.set_device(0)
        dist.init_process_group("nccl" if on_cuda(s) else "gloo", rank=0, world_size=1,
                                init_method=f"file://{folder}/meeting")
        try:
            rows.run("FSDP2, one process", f"{s.sharded.layers} layers, checkpointing",
                     lambda: sharded_step(s))
        finally:
            dist.destroy_process_group()


def sharded_step(s):
    model = random_judge(s.sharded, s.device, torch.float32).requires_grad_(True)
    model.checkpointing = True
    prompt = judge_prompt(s, s.sharded)
    blocks = [*model.visual.blocks, *model.model.layers]
    sharding.shard(model, blocks, torch.device(s.device), ("completion_hidden", "generate"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    with sharding.weights_gathered(model):
        tokens, sampled = answers_of(model, prompt, s)
        by_graph, _ = answers_of(model, prompt, s, graph=True)
    answers = tokens[None].to(s.device)
    losses = []
    for _ in range(2):
        optimizer.zero_grad(set_to_none=True)
        hidden = model.completion_hidden([prompt], answers).flatten(0, 2)
        log_probs = grpo.token_log_probs(hidden, model.head_weight, answers.flatten())
        loss = -log_probs.mean()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(list(model.parameters()), 1.0)
        optimizer.step()
        losses.append(float(loss.detach()))
        if len(losses) == 1:
            first = log_probs.detach().cpu().view_as(sampled)
    off = (first - sampled).exp().sub(1).abs()
    whole = sum(p.full_tensor().numel() for p in model.parameters())
    return {"loss": losses[0], "after a step": losses[1], "falls": losses[1] < losses[0],
            "gradient norm": float(norm.full_tensor()), "values": whole,
            "tokens equal by a CUDA graph": float((tokens == by_graph).float().mean()),
            "greatest |ratio − 1| to sampling": float(off.max()),
            "mean": float(off.mean())}


# --------------------------------------------------------------------------------------------------
# Peers


def diffusers_model(model, s):
    """diffusers' transformer with the weights of `model`."""
    import diffusers

    c = model.config
    before = torch.get_default_dtype()
    torch.set_default_dtype(MODEL)
    try:
        with torch.device(s.device):
            theirs = diffusers.SD3Transformer2DModel(
                sample_size=c.sample_size, patch_size=c.patch, in_channels=c.channels,
                num_layers=c.depth, attention_head_dim=c.head_dim, num_attention_heads=c.heads,
                joint_attention_dim=c.context_dim, caption_projection_dim=c.width,
                pooled_projection_dim=c.pooled_dim, out_channels=c.channels,
                pos_embed_max_size=c.positions, dual_attention_layers=c.dual_blocks,
                qk_norm="rms_norm")
    finally:
        torch.set_default_dtype(before)
    theirs = theirs.to(s.device, MODEL).eval().requires_grad_(False)
    copy_weights(theirs, layouts.mmdit_views(model))
    return theirs


@torch.no_grad()
def copy_weights(theirs, views, newer=()):
    """Fill a peer's tensors from our views, {published name: parts}.

    newer: (pattern, replacement) from the peer's names to those of the views.
    """
    for name, tensor in theirs.state_dict().items():
        for pattern, published in newer:
            name = re.sub(pattern, published, name)
        parts = views[name]
        tensor.copy_(torch.cat(list(parts)) if len(parts) > 1 else parts[0])


def both(ours, theirs, s, repeats, models):
    """Cells of two functions that do the same work, timed in turn in one process.

    models: (ours, theirs), which lie there both. A peak is without the other one's parameters.
    """
    our_size, their_size = (size_of(model.parameters()) / 1e9 for model in models)
    theirs_ms, _, theirs_peak = measured(theirs, s.device, repeats)
    ours_ms, _, ours_peak = measured(ours, s.device, repeats)
    return {"ours, ms": ours_ms, "theirs, ms": theirs_ms, "theirs/ours": theirs_ms / ours_ms,
            "ours, peak GB": ours_peak - their_size, "theirs, peak GB": theirs_peak - our_size}


def generator_peer(rows, s):
    """diffusers' forward pass, and its LoRA step with peft."""
    import diffusers

    model = random_model(mmdit.MMDiT, s.generator, s.device)
    theirs = diffusers_model(model, s)
    latents, timestep, context, pooled = generator_inputs(s, s.batch, s.device)

    def their_velocity(of=theirs):
        return of(latents, context, pooled, timestep, return_dict=False)[0]

    def our_velocity():
        return model(latents, timestep, context, pooled)

    @torch.no_grad()
    def forward():
        apart = relative(our_velocity(), their_velocity())
        return {**both(our_velocity, their_velocity, s, s.repeats, (model, theirs)),
                "apart": apart}

    def step():
        import peft

        add_adapter(model)
        with tempfile.TemporaryDirectory() as folder:
            lora.save_lora(folder, model, "random")
            # in the model's type, as ours computes; by default peft's products are in float32
            wrapped = peft.PeftModel.from_pretrained(theirs, folder, is_trainable=True,
                                                     autocast_adapter_dtype=False)

        def gradients(of, velocity):
            return torch.autograd.grad(velocity().float().square().mean(), trained(of))

        def norm_of(gradients):
            return float(torch.stack([g.float().norm() for g in gradients]).norm())

        pair = (lambda: gradients(model, our_velocity),
                lambda: gradients(wrapped, lambda: their_velocity(wrapped)))
        norms = [norm_of(f()) for f in pair]
        apart = abs(norms[0] / norms[1] - 1)
        return {**both(*pair, s, s.repeats, (model, wrapped)), "apart": apart,
                "peft": peft.__version__}

    name = f"diffusers {diffusers.__version__}"
    rows.run(f"beside {name}", f"forward, batch {s.batch}, bfloat16", forward)
    rows.run(f"beside {name}", f"LoRA step, batch {s.batch}, bfloat16", step)


def transformers_judge(model, s):
    """transformers' Qwen2.5-VL with the weights of `model`."""
    import transformers

    c = model.config
    special = {"image_token_id": c.image_token, "video_token_id": c.image_token + 1,
               "vision_start_token_id": c.image_token - 3, "vision_end_token_id": c.image_token - 2}
    rope = {"rope_type": "default", "mrope_section": list(c.sections), "rope_theta": c.theta}
    config = transformers.Qwen2_5_VLConfig(
        text_config={
            "hidden_size": c.width, "num_hidden_layers": c.layers, "num_attention_heads": c.heads,
            "num_key_value_heads": c.kv_heads, "intermediate_size": c.mlp, "vocab_size": c.vocab,
            "rms_norm_eps": c.eps, "bos_token_id": None, "eos_token_id": None,
            "rope_parameters": rope},
        vision_config={
            "depth": c.vision_layers, "hidden_size": c.vision_width,
            "intermediate_size": c.vision_mlp, "num_heads": c.vision_heads,
            "out_hidden_size": c.width, "fullatt_block_indexes": list(c.full_blocks),
            "window_size": c.window, "patch_size": c.patch},
        tie_word_embeddings=False, **special)
    with torch.device(s.device):
        theirs = transformers.Qwen2_5_VLForConditionalGeneration._from_config(
            config, attn_implementation="sdpa", dtype=MODEL)
    theirs = theirs.to(s.device).eval().requires_grad_(False)
    copy_weights(theirs, layouts.qwen_views(model), layouts.QWEN_NEWER)
    return theirs


def judge_peer(rows, s):
    """transformers' generation of the same group of answers."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    model = random_judge(s.judge, s.device)
    prompt = judge_prompt(s, s.judge)
    theirs = transformers_judge(model, s)
    ids = prompt.ids[None].to(s.device)
    kinds = (ids == s.judge.image_token).int()  # 1 at the picture's tokens
    pixels = prompt.pixels.to(s.device)
    grid = torch.tensor(prompt.grids, device=s.device)

    def their_answers(new_tokens, n=s.group, **settings):
        out = theirs.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=pixels,
            image_grid_thw=grid, mm_token_type_ids=kinds, num_return_sequences=n,
            max_new_tokens=new_tokens, min_new_tokens=new_tokens, eos_token_id=None,
            pad_token_id=0, **settings)
        return out[:, ids.shape[1]:]

    sampling = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}

    def likeliest():
        ours = answers_of(model, prompt, s, temperature=0.0)[0][0]
        other = their_answers(s.new_tokens, 1, do_sample=False)[0].cpu()
        same = (ours == other).cumprod(0)
        return {"tokens equal from the start": int(same.sum()), "of": s.new_tokens}

    def generation(graph):
        if graph:
            needs_cuda(s)

        def time_of(run):
            prefill, whole = (measured(functools.partial(run, n), s.device, 1, warm_up=1)[0]
                              for n in (1, s.new_tokens))
            return prefill, whole

        ours = time_of(lambda n: answers_of(model, prompt, s, graph, n))
        other = known.setdefault("theirs", time_of(lambda n: their_answers(n, **sampling))
                                 if "theirs" not in known else None)
        decode = [(whole - prefill) / (s.new_tokens - 1) for prefill, whole in (ours, other)]
        return {"ours, ms": ours[1], "theirs, ms": other[1], "theirs/ours": other[1] / ours[1],
                "ours, prefill": ours[0], "theirs, prefill": other[0],
                "ours, ms a step": decode[0], "theirs, ms a step": decode[1]}

    known = {}  # the times of transformers, which are taken once
    table = f"beside transformers {transformers.__version__}"
    work = f"{s.group} answers of {s.new_tokens} tokens"
    rows.run(table, f"{work}, graph", lambda: generation(True))
    rows.run(table, work, lambda: generation(False))
    rows.run(table, "likeliest tokens", likeliest)


def compiling(rows, s):
    """Only the first call of compiled blocks, so that the compiler's cache is filled for later."""
    if on_cuda(s):
        compiled_rows(rows, s, "torch.compile, first call", 0)
    else:
        rows.add("torch.compile, first call", "all", skipped="needs CUDA")


def compiled_speed(rows, s):
    compiled_rows(rows, s, "torch.compile of each block", s.repeats)


@torch.no_grad()
def compiled_rows(rows, s, table, repeats):
    """The forward pass with compiled blocks: ours, and diffusers' where it is installed."""
    model = random_model(mmdit.MMDiT, s.generator, s.device)
    latents, timestep, context, pooled = generator_inputs(s, s.batch, s.device)
    passes = {}

    def ours():
        for block in model.joint_blocks:
            block.compile(backend=backend(s), dynamic=False)
        return lambda: model(latents, timestep, context, pooled)

    def theirs():
        other = diffusers_model(model, s)
        for block in other.transformer_blocks:
            block.compile(backend=backend(s), dynamic=False)
        return lambda: other(latents, context, pooled, timestep, return_dict=False)[0]

    def cells(name, make):
        eager = measured(lambda: model(latents, timestep, context, pooled), s.device, 2)[0]
        torch._dynamo.reset()
        run = passes[name] = make()
        started = time.perf_counter()
        run()
        if on_cuda(s):
            torch.cuda.synchronize()
        first = time.perf_counter() - started
        if not repeats:
            return {"s": first}
        ms, _, peak = measured(run, s.device, repeats)
        return {"first call, s": first, "ms": ms, "peak, GB": peak, "kernels, ms": eager,
                "compiled/kernels": ms / eager}

    # Theirs comes first, because our blocks then stay compiled and eager passes are over.
    rows.run(table, "diffusers", lambda: cells("diffusers", theirs))
    rows.run(table, "ours, plain forms", lambda: cells("ours", ours))


# --------------------------------------------------------------------------------------------------
# The call


PARTS = {  # name: (function, seconds it may take)
    "generator-policy": (generator_policy, 80),
    "judge-policy": (judge_policy, 85),
    "programs": (programs, 85),
    "fsdp": (sharded, 60),
    "errors-half": (errors_in_half, 85),
    "errors-float32": (errors_in_float32, 85),
    "compiling": (compiling, 85),
    "generator": (generator_speed, 50),
    "judge": (judge_speed, 50),
    "judge-peer": (judge_peer, 50),
    "generator-peer": (generator_peer, 40),
    "compiled": (compiled_speed, 50),
    "kernels": (kernel_speed, 75),
}
BESIDE = 7  # the first so many tell what is right, not how fast, and run side by side


def parse_args(argv=None):
    parser = cli.parser(__doc__)
    cuda = torch.cuda.is_available()
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of the results")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if cuda else "cpu")
    parser.add_argument("--small", action="store_true", help="tiny sizes, as always on a CPU")
    parser.add_argument("--parts", default=",".join(PARTS), help="default: %(default)s")
    parser.add_argument("--minutes", type=float,
                        help="after which all parts are stopped (default: 4.5, on a CPU 20)")
    parser.add_argument("--report", type=Path, metavar="DIR", help="only print the tables of DIR")
    parser.add_argument("--child", help=argparse.SUPPRESS)  # the part that this process is
    args = parser.parse_args(argv)
    args.out = args.out and args.out.resolve()
    args.parts = args.parts.split(",")
    args.minutes = args.minutes or (4.5 if args.device == "cuda" else 20)
    if not set(args.parts) <= set(PARTS):
        parser.error(f"--parts: the parts are {', '.join(PARTS)}")
    if args.report is None and args.out is None:
        parser.error("--out DIR: where shall the results go?")
    if args.report is None and args.device == "cuda" and not cuda:
        parser.error("--device cuda: this torch sees no GPU")
    return args


def child(args):
    """One part, in its own process."""
    s = replace(SMALL if args.small or args.device == "cpu" else Sizes(), device=args.device)
    # Without TF32 float32 is what the models are measured by.
    torch.backends.cudnn.allow_tf32 = False
    torch.manual_seed(0)
    rows = Rows(args.out, args.child)
    started = time.perf_counter()
    rows.run("part", "whole", lambda: PARTS[args.child][0](rows, s) or {})
    rows.note(f"{time.perf_counter() - started:.1f} s")
    return 0


class Part:
    """A running child and the time it may take."""

    def __init__(self, name, args, deadline):
        environment = dict(os.environ)
        if args.device == "cpu":
            environment["TRITON_INTERPRET"] = "1"  # read when triton is imported
        if args.device == "cpu" or name in list(PARTS)[:BESIDE]:
            environment["OMP_NUM_THREADS"] = "1"  # threads that wait for a core slow all parts
        command = [sys.executable, "-m", "bench.gpu", "--child", name, "--out", str(args.out),
                   "--device", args.device, *(["--small"] if args.small else [])]
        self.name = name
        self.rows = Rows(args.out, name)
        self.started = time.monotonic()
        limit = PARTS[name][1] * (1 if args.device == "cuda" else 4)
        self.limit = min(self.started + limit, deadline)
        self.log = open(args.out / f"{name}.log", "ab")
        # A session of its own, so that its children can be ended with it.
        self.process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=self.log,
                                        stderr=subprocess.STDOUT, start_new_session=True)

    def wait(self):
        """Whether it ended by itself and well; it is killed at its limit."""
        try:
            code = self.process.wait(timeout=max(0.1, self.limit - time.monotonic()))
            why = None if code == 0 else f"exit code {code}, see {self.name}.log"
        except subprocess.TimeoutExpired:
            why = "stopped at its time limit"
        self.stop()
        self.log.close()
        spent = time.monotonic() - self.started
        if why:
            self.rows.add("part", "whole", failed=why, seconds=round(spent, 2))
        print(f"{self.name}: {spent:.0f} s, {why or 'done'}", flush=True)
        return why is None

    def stop(self):
        """End it and what it has started, if they still run."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def device_row(args):
    """What the numbers were measured on."""
    cuda = args.device == "cuda"
    name = torch.cuda.get_device_name() if cuda else "CPU"
    capability = ".".join(map(str, torch.cuda.get_device_capability())) if cuda else None
    cudnn = torch.backends.cudnn.version() if cuda else None
    Rows(args.out, "call").add("device", name, torch=torch.__version__, capability=capability,
                               cuDNN=cudnn, sizes="small" if args.small or not cuda else "full")


def main(argv=None):
    args = parse_args(argv)
    if args.report is not None:
        print(markdown(args.report))
        return 0
    if args.child:
        return child(args)
    # Stopped from outside, this process must stop the parts, each of which is a session of its own.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "rows.jsonl").unlink(missing_ok=True)
    started = time.monotonic()
    deadline = started + 60 * args.minutes
    device_row(args)
    names = list(PARTS)
    beside = [name for name in names[:BESIDE] if name in args.parts]
    after = [name for name in names[BESIDE:] if name in args.parts]
    # On a CPU the parts would only take each other's cores.
    stages = [beside] if args.device == "cuda" else [[name] for name in beside]
    good = True
    for stage in [*stages, *([name] for name in after)]:
        if time.monotonic() > deadline - 5:
            for name in stage:
                Rows(args.out, name).add("part", "whole", failed="no time left to begin")
            good = False
            continue
        parts = [Part(name, args, deadline) for name in stage]
        try:
            ends = [part.wait() for part in parts]  # of all, whether or not one failed
        finally:
            for part in parts:
                part.stop()
        good = all(ends) and good
    text = markdown(args.out)
    (args.out / "report.md").write_text(text, encoding="utf-8")
    print(text)
    print(f"{time.monotonic() - started:.0f} s")
    return 0 if good and "failed" not in text and "| NO |" not in text else 1


if __name__ == "__main__":
    sys.exit(main())
