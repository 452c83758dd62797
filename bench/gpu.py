"""On a GPU, in one call: are the Triton kernels right there, how fast are they and the models, and what memory do they need?

    python bench/gpu.py --out gpu.json          # full size, bfloat16, random weights; wants 80 GB
    python bench/gpu.py --only kernels,mmdit    # some of the parts kernels, mmdit, qwen, sampling
    python bench/gpu.py --device cpu --small    # tiny sizes, the kernels in Triton's interpreter: does it all run?

kernels: every operation of triton_kernels.py, forward and backward. It is right if its error is at most twice that of the
plain form in the same type, and a rounding. Its time is the device's alone, with empty caches; bytes are the least that an
operation can move. mmdit and qwen: SD3.5-Medium and Qwen2.5-VL-7B, with an adapter as the training programs make it, then
without; they are right, in the same sense, by what they give in float32. sampling: pictures with guidance 4.5.

A row that fails says so and the others still run; so does one not begun within `--minutes`. The exit status is then 1.
"""

import argparse
import copy
import functools
import gc
import os
import sys
import time
import types
from dataclasses import dataclass, replace
from pathlib import Path
from unittest import mock

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from parts.pipeline import Generator

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that `python bench/gpu.py` finds kernels
import flow_grpo
import grpo
import mmdit
import qwen_vl
from bench.measure import attempt, cell, measured, peak_rates, run_table, save
from parts import chat, lora, ops, vae

MODEL = torch.bfloat16  # the type of all models


@dataclass(frozen=True)
class Sizes:
    device: str = "cuda"
    generator: mmdit.MMDiTConfig = mmdit.SD35_MEDIUM
    autoencoder: vae.VAEConfig = vae.SD3_VAE
    judge: qwen_vl.QwenVLConfig = qwen_vl.QWEN25_VL_7B
    timed: tuple = (8, 1024, 64, 4096)  # of the kernels: pictures, tokens, side of latents, rows of logits
    checked: tuple = (8, 1021, 63, 4093)  # the same where errors are measured: they fill no tile
    copied: int = 2**30  # bytes of the copy whose speed others are shares of
    product: int = 8192  # rows and columns of the matrix product of that kind
    latent: int = 64  # side, an eighth of the picture's
    text: int = 333  # tokens the generator reads
    batch: int = 8  # pictures
    steps: int = 25  # of the sampler
    picture: int = 504  # side in pixels of what the judge sees
    group: int = 8  # its answers
    new_tokens: int = 64  # of each
    repeats: int = 5  # of a model's pass
    launches: int = 20  # of a kernel


SMALL = Sizes(
    "cpu", mmdit.MMDiTConfig(depth=3, heads=2, head_dim=16, dual_blocks=(0,), context_dim=24, pooled_dim=20, positions=8),
    vae.VAEConfig(channels=(16, 16, 16, 16), blocks=1, groups=8),
    qwen_vl.QwenVLConfig(width=32, layers=2, heads=2, kv_heads=1, mlp=24, sections=(2, 3, 3), vocab=40, image_token=39,
                         vision_width=16, vision_layers=2, vision_heads=2, vision_mlp=20, full_blocks=(1,)),
    timed=(1, 1, 8, 3), checked=(1, 2, 5, 2), copied=2**16, product=64, latent=8, text=5, batch=2, steps=2, picture=56,
    group=2, new_tokens=4, repeats=1, launches=1)
RANK, WORDS = 32, 170  # of the adapters; of the judge's question, in tokens


def forms(fused):
    """Within it ops.py takes the fused forms, or the plain ones as with KERNELS=plain."""
    return mock.patch.object(ops, "FUSED", fused)


def backend(s):
    return "inductor" if s.device == "cuda" else "aot_eager"  # which only traces: compiling for a CPU would tell nothing


# ---------------------------------------------------------------------------------------------------------------------
# Kernels


def kernels_part(report, s, copy_rate, _):
    """Errors of all operations in half and float32; times in half, and at one size each beside torch.compile's."""
    from bench import kernel_table  # it imports triton, which main has told whether to interpret

    half = MODEL if s.device == "cuda" else torch.float16  # the interpreter does not round to bfloat16
    cold = torch.empty(s.copied, dtype=torch.uint8, device=s.device)

    def make(*shape, dtype):
        if dtype == torch.int64:
            return torch.randint(2048, shape, device=s.device)
        return torch.randn(shape, dtype=dtype, device=s.device)

    def cases(dtype, sizes):
        return {f"{case.name}, {case.shape}, {kernel_table.TYPES[case.tensors[0].dtype]}": case
                for case in kernel_table.make_cases(dtype, *sizes, make=make)}

    with forms(False):
        run_table(report, "kernel against float64", {
            name: functools.partial(kernel_errors, case)
            for name, case in (cases(half, s.checked) | cases(torch.float32, s.checked)).items()})
        timed, firsts = cases(half, s.timed), {}
        run_table(report, "kernel, forward and backward", {
            name: functools.partial(kernel_times, case, s, copy_rate, cold) for name, case in timed.items()})
        for name, case in timed.items():
            firsts.setdefault(case.name.split(",")[0], name)
        run_table(report, "kernel beside torch.compile of the plain form", {
            name: functools.partial(kernel_times, timed[name], s, copy_rate, cold, True) for name in firsts.values()})


def results_of(function, tensors, trained, above=None):
    """(results and gradients of the first `trained` tensors, gradients from above that led to them, drawn if not given)."""
    leaves = [t.detach().requires_grad_(i < trained) for i, t in enumerate(tensors)]
    with torch.set_grad_enabled(trained > 0):
        results = function(*leaves)
    results = results if isinstance(results, tuple) else (results,)
    if not trained:
        return results, None
    above = above or [torch.randn_like(r) for r in results]
    return [r.detach() for r in results] + list(torch.autograd.grad(results, leaves[:trained], above)), above


def kernel_errors(case):
    """Greatest errors of a kernel and its plain form, as shares of the greatest value of each result and gradient."""
    def given():  # what works in place must not change the case
        return case.tensors if case.trained else [t.clone() for t in case.tensors]

    ours, above = results_of(case.fused, given(), case.trained)
    plain, _ = results_of(case.plain, given(), case.trained, above)
    wide = [t.double() if t.is_floating_point() else t for t in given()]
    stays_wide = mock.patch.object(torch.Tensor, "float", lambda x: x.to(torch.promote_types(x.dtype, torch.float32)))
    with stays_wide:  # where plain forms go over to float32
        exact, _ = results_of(case.plain, wide, case.trained, above and [g.double() for g in above])
    errors = torch.tensor([[float((x.double() - truth).abs().max() / truth.abs().max().clamp(min=1e-30)) for x in pair]
                           for *pair, truth in zip(ours, plain, exact, strict=True)])  # [tensors, 2]
    roundings = torch.tensor([max(torch.finfo(x.dtype).eps, 1e-6) for x in ours])
    greatest = errors.amax(0).tolist()
    return {"kernel's error": greatest[0], "plain error": greatest[1],
            "right": bool((errors[:, 0] <= 2 * errors[:, 1] + roundings).all())}


def kernel_times(case, s, copy_rate, cold, compiled=False):
    _, above = results_of(case.fused, case.tensors, case.trained)
    other = torch.compile(case.plain, dynamic=False, backend=backend(s)) if compiled else case.plain
    (ms, host, _), (theirs, *_) = (
        measured(functools.partial(results_of, f, case.tensors, case.trained, above), s.device, s.launches, cold)
        for f in (case.fused, other))
    rate, name = case.least / ms * 1e3, "compiled" if compiled else "plain"
    return {"ms": ms, f"{name}, ms": theirs, f"{name}/kernel": theirs / ms, "GB/s": rate / 1e9,
            "share of copy": rate / copy_rate, "host's ms to queue it": host}


# ---------------------------------------------------------------------------------------------------------------------
# Models


def random_model(make, config, device):
    """make(config) in bfloat16, frozen, its weights random and such that what passes a layer keeps its size."""
    with torch.device("meta"):
        model = make(config)
    model = model.to(MODEL).to_empty(device=device).eval().requires_grad_(False)
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


def model_errors(model, run):
    """Relative errors of the tensors run(model), with fused and plain forms, to those of the model in float32."""
    wide, outputs = copy.deepcopy(model).float(), {}
    for name, fused, of in (("float32", False, wide), ("fused", True, model), ("plain", False, model)):
        with forms(fused):
            outputs[name] = torch.cat([t.detach().float().flatten() for t in run(of)])

    def gap(a, b):
        return float((outputs[a] - outputs[b]).norm() / outputs[b].norm())

    ours, plain = gap("fused", "float32"), gap("plain", "float32")
    return {"fused, error": ours, "plain, error": plain, "fused to plain": gap("fused", "plain"),
            "right": ours <= 2 * plain + torch.finfo(MODEL).eps}


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
    return torch.autograd.grad(velocity(model, *inputs).float().square().mean(), trained(model))


def generator_flop(s):
    """(forward, forward and backward with an adapter) of a batch, counted on the meta device; attention is two products."""
    from torch.utils.flop_counter import FlopCounterMode  # it imports triton, for which main may set a variable first

    with torch.device("meta"):
        model, inputs = mmdit.MMDiT(s.generator), generator_inputs(s, s.batch, "meta")

    def flop_of(run):
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            run(model, *inputs)
        return counter.get_total_flops()

    forward = flop_of(torch.no_grad()(velocity))
    add_adapter(model)
    return forward, flop_of(velocity_gradients)


def mmdit_part(report, s, _, product_rate):
    """Errors at one picture; times and memory of a batch. What checkpointing computes twice counts once as FLOP."""
    forward_flop, step_flop = generator_flop(s)
    model, one, inputs = random_model(mmdit.MMDiT, s.generator, s.device), *(
        generator_inputs(s, n, s.device) for n in (1, s.batch))

    def speed(fused, function, flop, checkpointing=False):
        model.checkpointing = checkpointing
        with forms(fused):
            ms, _, peak = measured(lambda: function(model, *inputs), s.device, s.repeats)
        return {"ms": ms, "TFLOP/s": flop / ms / 1e9, "share of product": flop / ms * 1e3 / product_rate, "peak, GB": peak}

    def compiled():
        for block in model.joint_blocks:  # each kind of block once: all as one graph would take minutes
            block.forward = torch.compile(block.forward, dynamic=False, backend=backend(s))
        try:
            return forward(False)
        finally:
            for block in model.joint_blocks:
                del block.forward  # that of its class again

    forward = torch.no_grad()(functools.partial(speed, function=velocity, flop=forward_flop))
    step = functools.partial(speed, function=velocity_gradients, flop=step_flop)
    add_adapter(model)
    model.checkpointing = True
    run_table(report, "MMDiT against float32", {
        "velocity": lambda: model_errors(model, torch.no_grad()(lambda of: [velocity(of, *one)])),
        "adapter's gradients": lambda: model_errors(model, lambda of: velocity_gradients(of, *one))})
    run_table(report, f"MMDiT, adapter of rank {RANK}, forward and backward, batch {s.batch}", {
        "fused": lambda: step(True), "fused, checkpointing": lambda: step(True, checkpointing=True),
        "plain, checkpointing": lambda: step(False, checkpointing=True)})
    lora.merge_lora(model)
    run_table(report, f"MMDiT, forward, batch {s.batch}", {
        "plain": lambda: forward(False), "fused": lambda: forward(True), "plain, blocks compiled": compiled})


def judge_prompt(s):
    """A square picture, as noise, among random words."""
    c, side = s.judge, s.picture // s.judge.patch
    words, image = torch.randint(c.image_token, (WORDS,)), torch.full((side**2 // c.merge**2,), c.image_token)
    return chat.Prompt(torch.cat([words[:14], image, words[14:]]), torch.randn(side**2, 3 * c.frames * c.patch**2),
                          ((1, side, side),))


def qwen_part(report, s, copy_rate, _):
    """One picture and question: errors, training, generation, of whose decode every step reads the text's weights once."""
    model, prompt = random_model(qwen_vl.QwenVL, s.judge, s.device), judge_prompt(s)
    model.processor = types.SimpleNamespace(stop=(-1,), decode=lambda ids: "")  # no answer ends by itself
    answers = torch.randint(s.judge.vocab, (1, s.group, s.new_tokens), device=s.device)

    def hidden(of):
        return of.completion_hidden([prompt], answers).flatten(0, 2)  # [G·C,D]

    def gradients(of):
        loss = -grpo.token_log_probs(hidden(of), of.head_weight, answers.flatten()).mean()
        return torch.autograd.grad(loss, trained(of))

    def step(fused):
        with forms(fused):
            ms, _, peak = measured(lambda: gradients(model), s.device, s.repeats)
        return {"ms": ms, "tokens of answers/s": answers.numel() / ms * 1e3, "peak, GB": peak}

    def generate(fused):
        def run(new_tokens):
            model.generate([prompt], n=s.group, max_new_tokens=new_tokens, temperature=1.0,
                           generator=torch.Generator().manual_seed(0))

        with forms(fused):
            (prefill, *_), (whole, _, peak) = (
                measured(functools.partial(run, n), s.device, s.repeats) for n in (1, s.new_tokens))
        ms = (whole - prefill) / (s.new_tokens - 1)
        rate = (sum(p.nbytes for p in model.model.layers.parameters()) + model.head_weight.nbytes) / ms * 1e3
        return {"prefill, ms": prefill, "decode, ms a step": ms, "tokens/s": s.group / ms * 1e3, "weights, GB/s": rate / 1e9,
                "share of copy": rate / copy_rate, "peak, GB": peak}

    add_adapter(model)
    model.checkpointing, work = True, f"{len(prompt.ids)} tokens of prompt, {s.group} answers of {s.new_tokens}"
    run_table(report, "Qwen2.5-VL against float32", {
        "hidden states": lambda: model_errors(model, torch.no_grad()(lambda of: [hidden(of)])),
        "adapter's gradients": lambda: model_errors(model, gradients)})
    run_table(report, f"Qwen2.5-VL, adapter of rank {RANK}, checkpointing, forward and backward, {work}", {
        "fused": lambda: step(True), "plain": lambda: step(False)})
    lora.merge_lora(model)
    run_table(report, f"Qwen2.5-VL, generation, {work}", {
        "fused": lambda: generate(True), "plain": lambda: generate(False)})


def sampling_part(report, s, *_):
    """Whole pictures: the sampler's steps, then the autoencoder, as sample.py has them."""
    generator = Generator(*(random_model(make, config, s.device) for make, config in (
        (mmdit.MMDiT, s.generator), (vae.VAE, s.autoencoder))), encoders=None, shift=3.0, name="random")

    def draw(batch, fused):
        latents, _, *texts = generator_inputs(s, 2 * batch, s.device)
        noise = latents[:batch].float()
        with forms(fused):
            ms, _, peak = measured(lambda: flow_grpo.sample_ode(generator.mmdit, noise, *texts, s.steps, 4.5), s.device, 3)
            decode, _, decode_peak = measured(lambda: generator.decode(noise), s.device, s.repeats)
        return {"steps, ms": ms, "decode, ms": decode, "pictures/s": batch / (ms + decode) * 1e3, "steps, peak GB": peak,
                "decode, peak GB": decode_peak}

    run_table(report, f"pictures of {s.latent * generator.vae.factor} px, {s.steps} steps", {
        f"batch {batch}, {name}": functools.partial(draw, batch, name == "fused")
        for batch in (s.batch, 1) for name in ("fused", "plain")})


PARTS = {"kernels": kernels_part, "mmdit": mmdit_part, "qwen": qwen_part, "sampling": sampling_part}


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--small", action="store_true", help="tiny sizes, as always on a CPU")
    parser.add_argument("--only", default=",".join(PARTS), help="parts, with commas between (default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=7.5, help="after which no row is begun (default: %(default)s)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="the results as JSON, written anew after each table")
    args = parser.parse_args(argv)
    args.only = args.only.split(",")
    if not set(args.only) <= set(PARTS):
        parser.error(f"--only: the parts are {', '.join(PARTS)}")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this torch sees no GPU")
    return args


def main(argv=None):
    started, args = time.monotonic(), parse_args(argv)
    small = args.small or args.device == "cpu"
    s = replace(SMALL if small else Sizes(), device=args.device)
    if args.device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported
    torch.backends.cudnn.allow_tf32 = False  # float32 is what the models are measured by
    torch.manual_seed(0)
    copy_rate, product_rate = peak_rates(s.device, s.copied, s.product)
    report = {"device": torch.cuda.get_device_name() if args.device == "cuda" else "CPU", "torch": torch.__version__,
              "copy, GB/s": copy_rate / 1e9, "product, TFLOP/s": product_rate / 1e12, "tables": {}, "failures": [],
              "out": args.out, "deadline": started + 60 * args.minutes}
    print(", ".join(f"{name} {cell(report[name])}" for name in list(report)[:4])
          + ("; tiny sizes, which tell whether all runs, no speed" if small else ""), flush=True)
    for part in (part for part in PARTS if part in args.only):
        attempt(report, part, functools.partial(PARTS[part], report, s, copy_rate, product_rate))
        gc.collect()
    report["seconds"] = time.monotonic() - started
    save(report)
    print("\n- ".join([f"\n{report['seconds']:.0f} s, {len(report['failures'])} failures", *report["failures"]]))
    return 1 if report["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
