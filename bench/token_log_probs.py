"""`grpo.token_log_probs` and the GRPO loss on it against torch, TRL and Liger: time of forward and backward, peak memory.

    python -m bench.token_log_probs  # about a quarter of an hour on 2 idle cores, 12 GB
    python -m bench.token_log_probs --rows 512 --no-compile  # about two minutes
    python -m bench.token_log_probs --rows 64 --width 32 --vocabulary 1000 --no-compile  # a minute, most of it imports

Random hidden states and a random head, frozen or trained, float32, on the CPU. TRL and the plain way give log-probabilities,
as ours does; Liger's kernel gives the loss alone, so there ours is `grpo.grpo_loss` on top. Results and gradients of all are
compared first, which also compiles what is compiled. Then the paths of a work take turns in one process; memory is measured
in a process of its own for each. A longer completion has more --rows. The machine must be idle.
"""

import argparse
import math
import sys
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version

import torch
import torch.nn.functional as F
from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss
from tqdm import tqdm
from trl.trainer import utils as trl_utils

import grpo
from bench import memory, timing

CLIP, BETA = 0.2, 1e-3
HEADS = {"head frozen": False, "head trained": True}  # whether the head's weight needs a gradient


@dataclass
class Case:
    """What every path is given: B completions of L tokens, N = B·L."""
    hidden: torch.Tensor  # [N,D]
    weight: torch.Tensor  # [V,D]
    targets: torch.Tensor  # [N]
    upstream: torch.Tensor  # [N]: gradient that reaches the log-probabilities where there is no loss
    old: torch.Tensor  # [B,L]: log-probabilities under the model that sampled
    ref: torch.Tensor  # [B,L]: and the reference
    advantages: torch.Tensor  # [B]
    mask: torch.Tensor  # [B,L]


def make_case(rows, width, vocabulary, completions, head_trained):
    """Made in place where it is large: no spares that a later peak could hide in."""
    generator = torch.Generator().manual_seed(0)
    shape = completions, rows // completions
    hidden = torch.empty(rows, width).normal_(generator=generator)
    weight = torch.empty(vocabulary, width).normal_(0, 2 * width**-0.5, generator=generator)
    targets = torch.randint(vocabulary, (rows,), generator=generator)
    # the logits of a row are near normal with standard deviation 2, so their logsumexp is near log V + 2²/2
    near = ((hidden * weight[targets]).sum(1) - math.log(vocabulary) - 2).view(shape)
    old, ref = (near + 0.1 * torch.randn(shape, generator=generator) for _ in range(2))
    lengths = torch.randint(1, shape[1] + 1, (completions, 1), generator=generator)
    upstream, advantages = (torch.randn(n, generator=generator) for n in (rows, completions))
    return Case(hidden.requires_grad_(), weight.requires_grad_(head_trained), targets, upstream, old, ref, advantages,
                torch.arange(shape[1]) < lengths)


# ---------------------------------------------------------------------------------------------------------------------
# The paths: each takes a Case and gives log-probabilities [N], or the loss


def all_logits(c):
    return F.log_softmax(F.linear(c.hidden, c.weight), -1).gather(1, c.targets[:, None])[:, 0]


def trl_selective(c):
    return trl_utils.selective_log_softmax(F.linear(c.hidden, c.weight), c.targets)


def trl_fused(c):
    """What `add_fused_lm_head` gives a model of GRPOTrainer. On a CPU it folds its tiles in torch, on a GPU in Triton. The
    entropy, which the trainer logs too, is left out."""
    bias, temperature, softcap, scale, more = None, 1.0, None, 1.0, ()
    return trl_utils._ChunkedLogProbFunction.apply(c.hidden, c.weight, bias, c.targets, temperature,
                                                   trl_utils._CHUNKED_LOGPROB_CHUNK_SIZE, softcap, scale, more)[0]


def our_log_probs(c):
    return grpo.token_log_probs(c.hidden, c.weight, c.targets)


def liger_loss(c, compiled=False):
    """Averaged within a completion, then over completions, as ours. compiled (their default): the loss, not the logits."""
    loss = LigerFusedLinearGRPOLoss(beta=BETA, compiled=compiled, epsilon_low=CLIP, epsilon_high=CLIP, loss_type="grpo")
    hidden, targets = c.hidden.view(*c.mask.shape, -1), c.targets.view_as(c.mask)
    return loss(hidden, c.weight, targets, c.mask, c.advantages, ref_per_token_logps=c.ref, old_per_token_logps=c.old)[0]


def our_loss(c):
    return grpo.grpo_loss(our_log_probs(c).view_as(c.mask), c.old, c.ref, c.advantages, c.mask, CLIP, BETA)[0]


TRL, LIGER = f"trl {version('trl')}", f"liger {version('liger_kernel')}"
WORKS = {
    "log-probabilities": {f"torch {torch.__version__}, all logits": all_logits,
                          f"{TRL}, selective_log_softmax": trl_selective,
                          f"{TRL}, fused head": trl_fused,
                          "ours": our_log_probs},
    "GRPO loss": {LIGER: liger_loss,
                  f"{LIGER}, compiled": partial(liger_loss, compiled=True),
                  "ours": our_loss}}


# ---------------------------------------------------------------------------------------------------------------------
# Measurements


def forward_backward(path, case):
    """(what the path gives, gradients of hidden and weight or None)."""
    case.hidden.grad = case.weight.grad = None
    out = path(case)
    out.backward(case.upstream if out.dim() else None)
    return out.detach(), case.hidden.grad, case.weight.grad


def greatest_gap(paths, case):
    """Greatest difference of results and gradients to those of the first path, relative to their greatest entry; of losses,
    whose terms are near 1 and may cancel, as it is."""
    first, *others = paths.values()
    expected, gap = forward_backward(first, case), 0.0
    for path in others:
        for x, y in zip(expected, forward_backward(path, case), strict=True):
            gap = gap if x is None else max(gap, float((x - y).abs().max() / (x.abs().max() if x.dim() else 1)))
    return gap


def peak_of(path, args, head):
    forward_backward(path, make_case(8, 8, 8, 8, True))  # threads and workspaces of torch
    case = make_case(args.rows, args.width, args.vocabulary, args.completions, HEADS[head])
    return memory.peak(lambda: forward_backward(path, case))


def parse_args(argv):
    parser = timing.make_parser(__doc__, repeats=3)
    for name, default, about in (("rows", 2048, "tokens N, of all completions"), ("width", 1024, "D"),
                                 ("vocabulary", 152_064, "V, by default Qwen2.5's"), ("completions", 8, "B, of N/B tokens")):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{about} (default: %(default)s)")
    parser.add_argument("--frozen-only", action="store_true", help="without the works where the head is trained")
    parser.add_argument("--no-compile", action="store_true", help="without Liger's compiled loss, which needs a compiler")
    parser.add_argument("--memory-of", nargs=3, help=argparse.SUPPRESS)  # work, head, peer
    args = parser.parse_args(argv)
    if min(args.rows, args.width, args.vocabulary, args.completions, args.repeats, args.threads) < 1:
        parser.error("every size must be at least 1")
    if args.rows % args.completions:
        parser.error(f"--rows must be a multiple of --completions, {args.completions}")
    return args, timing.usual(parser, args)


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    args, usual = parse_args(argv)
    torch.set_num_threads(args.threads)
    if args.memory_of:
        work, head, peer = args.memory_of
        print(peak_of(WORKS[work][peer], args, head))
        return 0
    if args.profile:
        case = make_case(args.rows, args.width, args.vocabulary, args.completions, HEADS["head frozen"])
        return timing.profile(lambda: forward_backward(our_log_probs, case))
    size = f"N {args.rows:,} in {args.completions} completions, D {args.width:,}, V {args.vocabulary:,}"
    matmul = timing.matmul_rate()
    rows, gaps, megabytes = [], [], []
    for head in list(HEADS)[:1 if args.frozen_only else 2]:
        case = make_case(args.rows, args.width, args.vocabulary, args.completions, HEADS[head])
        for work, paths in WORKS.items():
            paths = {name: path for name, path in paths.items() if not (args.no_compile and name.endswith("compiled"))}
            gaps.append(greatest_gap(paths, case))
            seconds = timing.in_turn({name: partial(forward_backward, path, case) for name, path in paths.items()},
                                     args.repeats)
            # none for the compiled loss: the compiler's own memory would count
            measured = [name for name in paths if not name.endswith("compiled")]
            used = {name: memory.in_fresh_process(__file__, argv, work, head, name)
                    for name in tqdm(measured, desc="memory", unit="run")}
            flop = 2 * args.rows * args.width * args.vocabulary * (4 if HEADS[head] else 2)  # ours: so many products
            share = timing.share(flop, seconds["ours"], matmul, "the matmul rate")
            for name in list(paths)[:-1]:
                ratio = used["ours"] / max(1, used[name]) if name in used else None
                rows.append(timing.row(f"{work}, {head}, {size}", name, seconds[name], seconds["ours"], memory=ratio,
                                       share=share))
            megabytes.append(f"{work}, {head}: " + "; ".join(f"{name}: {mb:,.0f}" for name, mb in used.items()))
    if usual:
        rows[0].asked = "ratio ≥ 0.95, memory ≤ 0.1"
    note = "\n".join(["Peak memory beyond the inputs, MB:", *(f"- {line}" for line in megabytes),
                      f"\nResults and gradients differ by at most {max(gaps):.1e} of their greatest entry."])
    return timing.show(rows, args, note, max(gaps) < 1e-4)


if __name__ == "__main__":
    sys.exit(main())
