"""`grpo.token_log_probs` against log_softmax over all logits: time of forward and backward, and peak extra memory.

    python bench/token_log_probs.py                                            # about 8 minutes on 2 idle cores, 10 GB
    python bench/token_log_probs.py --rows 64 --width 32 --vocabulary 1000     # seconds

Both paths take turns in one process for the time (median of the repeats); for the memory each runs alone in a fresh
process, whose peak resident size is compared with its size just before the call. float32, on the CPU.
"""

import argparse
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that `python bench/token_log_probs.py` finds grpo
import grpo

WORKS = {"head frozen": False, "head trained": True}  # whether the head's weight needs a gradient


def plain(hidden, weight, targets):
    """All logits [N,V] at once."""
    return F.log_softmax(F.linear(hidden, weight), -1).gather(1, targets[:, None])[:, 0]


PATHS = {"plain": plain, "tiled": grpo.token_log_probs}


def make_inputs(rows, width, vocabulary, head_trained):
    """hidden [N,D], weight [V,D], targets [N] and the gradient [N] that comes from above. Made in place: no large spares."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.empty(rows, width).normal_(generator=generator).requires_grad_()
    weight = torch.empty(vocabulary, width).normal_(0, 2 * width ** -0.5, generator=generator).requires_grad_(head_trained)
    targets = torch.randint(vocabulary, (rows,), generator=generator)
    return hidden, weight, targets, torch.randn(rows, generator=generator)


def forward_backward(path, hidden, weight, targets, upstream):
    """One forward and backward pass; seconds, log-probabilities and the gradients of hidden and weight (or None)."""
    hidden.grad = weight.grad = None
    started = time.perf_counter()
    log_probs = PATHS[path](hidden, weight, targets)
    log_probs.backward(upstream)
    return time.perf_counter() - started, (log_probs.detach(), hidden.grad, weight.grad)


def peak_extra_bytes(path, inputs):
    """Greatest resident size during one call, less the size before it. Only true in a process that did little else."""
    forward_backward(path, *make_inputs(8, 8, 8, True))  # threads and workspaces of torch
    with open("/proc/self/statm") as file:
        before = int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    forward_backward(path, *inputs)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before


def memory_in_fresh_process(path, work, args):
    command = [sys.executable, str(Path(__file__).resolve()), "--memory-of", path, work]
    for name in ("rows", "width", "vocabulary", "threads"):
        command += [f"--{name}", str(getattr(args, name))]
    return int(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def measure_times(head_trained, args, bar):
    """{path: median seconds}, and the greatest difference of results and gradients relative to their largest entry."""
    inputs, seconds, difference = make_inputs(args.rows, args.width, args.vocabulary, head_trained), {}, 0.0
    for _ in range(args.repeats):
        results = {}
        for path in PATHS:
            taken, results[path] = forward_backward(path, *inputs)
            seconds.setdefault(path, []).append(taken)
            bar.update()
        for x, y in zip(results["plain"], results["tiled"]):
            difference = max(difference, 0.0 if x is None else ((x - y).abs().max() / x.abs().max()).item())
    return {path: statistics.median(all_seconds) for path, all_seconds in seconds.items()}, difference


def table(args, seconds, memory):
    """Markdown; seconds and memory (bytes): {(work, path): value}."""
    size = f"N {args.rows:,}, D {args.width:,}, V {args.vocabulary:,}, torch {torch.__version__}, {args.threads} threads"
    lines = [f"| work ({size}) | path | seconds | ratio | peak extra memory, MB | ratio |",
             "| --- | --- | --- | --- | --- | --- |"]
    for work in WORKS:
        for path in PATHS:
            time_ratio = seconds[work, path] / seconds[work, "plain"]
            memory_ratio = memory[work, path] / max(1, memory[work, "plain"])
            lines.append(f"| {work} | {path} | {seconds[work, path]:.3g} | {time_ratio:.3f} "
                         f"| {memory[work, path] / 1e6:,.0f} | {memory_ratio:.3f} |")
    return "\n".join(lines)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4096, help="tokens N (default: %(default)s)")
    parser.add_argument("--width", type=int, default=1024, help="width D (default: %(default)s)")
    parser.add_argument("--vocabulary", type=int, default=152_064, help="vocabulary V (default: %(default)s, Qwen2.5's)")
    parser.add_argument("--repeats", type=int, default=3, help="timed runs of each path (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch (default: %(default)s)")
    parser.add_argument("--memory-of", nargs=2, metavar=("PATH", "WORK"), help=argparse.SUPPRESS)  # the fresh process
    args = parser.parse_args(argv)
    if min(args.rows, args.width, args.vocabulary, args.repeats, args.threads) < 1:
        parser.error("every size must be at least 1")
    return args


def main(argv=None):
    args = parse_args(argv)
    torch.set_num_threads(args.threads)
    if args.memory_of:
        path, work = args.memory_of
        print(peak_extra_bytes(path, make_inputs(args.rows, args.width, args.vocabulary, WORKS[work])))
        return 0
    seconds, memory, differences = {}, {}, []
    with tqdm(total=len(WORKS) * len(PATHS) * (1 + args.repeats), unit="run") as bar:
        for work in WORKS:  # first, while this process is small: a child's peak can start at its parent's
            for path in PATHS:
                memory[work, path] = memory_in_fresh_process(path, work, args)
                bar.update()
        for work, head_trained in WORKS.items():
            medians, difference = measure_times(head_trained, args, bar)
            seconds.update({(work, path): value for path, value in medians.items()})
            differences.append(difference)
    print(table(args, seconds, memory))
    print(f"\nLog-probabilities and gradients of the two differ by at most {max(differences):.1e} of their largest entry.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
