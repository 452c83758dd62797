"""Forward and backward pass of a LoRA of the MMDiT against diffusers with peft: seconds, and memory beyond the weights.

    python -m bench.mmdit_lora_step  # three minutes on 2 idle cores, 8 GB
    python -m bench.mmdit_lora_step --blocks 2 --heads 2 --latent 8 --text 5 --context 32  # some seconds

Model and weights are those of bench/mmdit_forward.py, the adapter is train_gen.py's, of all attention projections; peft
reads it from the file that we write. The loss is the mean square of the velocity. Losses and gradients are compared first;
then the two take turns in one process. Memory is measured in a process of its own for each: the resident peak of two steps
less what was resident before the first, as Linux counts it. The share is of the rate of one large matrix product, measured
in the same run, by the FLOP of both passes. float32, on the CPU, which must be idle.
"""

import argparse
import sys
import tempfile

import diffusers
import peft
import torch

from bench import memory, mmdit_forward, timing
from parts import lora


def with_adapters(args):
    """(ours, diffusers' in peft's wrapper): frozen, with the same adapter, whose B is not 0."""
    ours, theirs = mmdit_forward.make_models(args)
    ours.requires_grad_(False)
    targets = ours.lora_targets()
    lora.add_lora(ours, targets, args.rank, 2.0 * args.rank)
    for p in trained(ours):
        p.data.normal_(0, 0.02)
    with tempfile.TemporaryDirectory() as folder:
        lora.save_lora(folder, ours, "random")
        theirs = peft.PeftModel.from_pretrained(theirs, folder, is_trainable=True)
    return ours, theirs


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


def steps_of(args):
    """({name: step() -> loss}, our model, theirs)."""
    ours, theirs = with_adapters(args)
    latents, timestep, context, pooled = mmdit_forward.make_inputs(args, ours.config)

    def step(velocity):
        loss = velocity().square().mean()
        loss.backward()
        return float(loss.detach())

    steps = {"theirs": lambda: step(lambda: theirs(latents, context, pooled, timestep, return_dict=False)[0]),
             "ours": lambda: step(lambda: ours(latents, timestep, context, pooled))}
    return steps, ours, theirs


def adapter_gap(ours, theirs):
    """Distance of the two adapters, relative to theirs."""
    views = lora.lora_views(ours)
    state = peft.get_peft_model_state_dict(theirs, save_embedding_layers=False)
    if views.keys() != state.keys():
        raise ValueError(f"the adapters differ in {sorted(views.keys() ^ state.keys())[:4]}")
    a, b = (torch.cat([x.detach().flatten() for x in values])
            for values in ([part for parts in views.values() for part in parts], [state[name] for name in views]))
    return float((a - b).norm() / b.norm())


def gradient_gap(ours, theirs):
    """Distance of the gradients of the two adapters, relative to theirs, after as many steps of both."""
    def swap():
        for p in (*trained(ours), *trained(theirs)):
            p.data, p.grad = p.grad, p.data

    swap()  # now the adapters hold their gradients
    gap = adapter_gap(ours, theirs)
    swap()
    return gap


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    parser = timing.make_parser(__doc__)
    mmdit_forward.add_arguments(parser, text=205)
    parser.add_argument("--rank", type=int, default=32, help="of the adapter (default: %(default)s)")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    args = mmdit_forward.checked(parser, argv)
    steps, ours, theirs = steps_of(args)
    if args.memory_of:
        step = steps[args.memory_of]
        del steps, ours, theirs
        print(memory.peak(step, times=2))
        return 0
    if args.profile:
        return timing.profile(steps["ours"])
    losses = {name: step() for name, step in steps.items()}
    apart = gradient_gap(ours, theirs)
    seconds = timing.in_turn(steps, args.repeats)
    used = {name: memory.in_fresh_process(__file__, argv, name) for name in steps}
    flop, rate = timing.flop_of(steps["ours"]), timing.matmul_rate()
    row = timing.row(f"LoRA step, forward and backward, {mmdit_forward.work(args)}, rank {args.rank}",
                     f"diffusers {diffusers.__version__}, peft {peft.__version__}", *seconds.values(),
                     memory=used["ours"] / used["theirs"],
                     share=timing.share(flop, seconds["ours"], rate, "the matmul rate"))
    if timing.usual(parser, args):
        row.asked = "ratio ≥ 1.0, memory ≤ 0.9"
    off = abs(losses["ours"] / losses["theirs"] - 1)
    note = (f"{flop / 1e9:,.0f} GFLOP; matmul rate {rate / 1e9:,.0f} GFLOP/s. Memory beyond the weights: "
            f"{used['theirs']:,.0f} and {used['ours']:,.0f} MB. Losses {losses['theirs']:.6g} and {losses['ours']:.6g}; gradients "
            f"{apart:.1g} apart.")
    return timing.show([row], args, note, max(off, apart) < 1e-4)


if __name__ == "__main__":
    sys.exit(main())
