"""What the programs of this folder share: paths that take turns, rows of one table, what the machine can do at most.

Shapes do not matter here; times are in seconds, rates in 1/s.
"""

import dataclasses
import json
import math
import statistics
import sys
import time

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count
from tqdm import tqdm

from parts import cli

FLOP_OF_CPU_OPERATORS = {  # those that torch does not count: of the shapes of what goes in and out
    torch.ops.mkldnn._linear_pointwise: lambda x, *others, out_shape, **more: 2 * x[-1] * math.prod(out_shape),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *others, **more: sdpa_flop_count(q, k, v),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward:
        lambda gradient, q, k, v, *others, **more: 2 * sdpa_flop_count(q, k, v)}


@dataclasses.dataclass
class Row:
    """One work done by a peer and by us."""
    work: str  # with its size
    peer: str  # with its version
    theirs: float  # median seconds
    ours: float
    ratio: float  # median over the pairs of peer's seconds / ours
    share: str = ""  # that ours reaches of what the machine can do, and of what
    memory: float | None = None  # our peak beyond what was there before / the peer's
    asked: str = ""  # such as "ratio ≥ 1.05"; the row says whether it was reached


def in_turn(paths, repeats, quiet=False):
    """{name: [seconds]} of `repeats` calls of each function of {name: function}, one after the other. Progress on stderr."""
    seconds = {name: [] for name in paths}
    for name in tqdm(list(paths) * repeats, unit="run", disable=quiet):
        started = time.perf_counter()
        paths[name]()
        seconds[name].append(time.perf_counter() - started)
    return seconds


def row(work, peer, theirs, ours, **more):
    """Row of the paired seconds [repeats] of a peer and ours; more: the other fields."""
    ratio = statistics.median(a / b for a, b in zip(theirs, ours, strict=True))
    return Row(work, peer, statistics.median(theirs), statistics.median(ours), ratio, **more)


def share(work, seconds, rate, of):
    """What `work`, in FLOP or bytes, done in the median of so many seconds is of a rate, in words: Row.share."""
    return f"{work / statistics.median(seconds) / rate:.2f} of {of}"


def table(rows):
    """Markdown."""
    lines = [("work", "peer", "peer, s", "ours, s", "ratio", "share", "memory", "asked")]
    for r in rows:
        memory = "" if r.memory is None else f"{r.memory:.3g}"
        answer = "yes" if reached(r) else "missed"
        lines.append((r.work, r.peer, f"{r.theirs:.3g}", f"{r.ours:.3g}", f"{r.ratio:.2f}", r.share, memory,
                      r.asked and f"{r.asked}: {answer}"))
    return cli.markdown(lines)


def reached(r):
    """Whether every part of a row's `asked`, such as "ratio ≥ 1.0, memory ≤ 0.9", holds."""
    for part in filter(None, r.asked.split(", ")):
        field, sign, bound = part.split()
        value = getattr(r, field)
        value = float(value.split()[0]) if isinstance(value, str) else value
        if not (value >= float(bound) if sign == "≥" else value <= float(bound)):
            return False
    return True


def matmul_rate(rows=2048, width=4096, repeats=5):
    """FLOP/s of the best of some large F.linear calls: the machine's matmul peak in float32."""
    x, weight = torch.randn(rows, width), torch.randn(width, width)
    with torch.no_grad():
        return 2 * rows * width**2 / min(in_turn({"": lambda: F.linear(x, weight)}, 1 + repeats, quiet=True)[""])


def read_rate(size=2**29, repeats=5):
    """Bytes/s of the best of some passes that read `size` bytes: the memory's bandwidth."""
    x = torch.ones(size // 4)
    return size / min(in_turn({"": x.sum}, 1 + repeats, quiet=True)[""])


def flop_of(function):
    """Floating-point operations of the matrix products, convolutions and attention of one call; causal ones in full."""
    with FlopCounterMode(display=False, custom_mapping=FLOP_OF_CPU_OPERATORS) as counter:
        function()
    return counter.get_total_flops()


def profile(function, top=12):
    """Print where the time of a second call goes: the operators by what they take themselves. The exit status, 0."""
    function()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        function()
    found = sorted(profiler.key_averages(), key=lambda event: -event.self_cpu_time_total)
    total = sum(event.self_cpu_time_total for event in found)
    lines = [(f"operator, of {len(found)}", "calls", "its own CPU time, s", f"of {total / 1e6:.3g} s")]
    for event in found[:top]:
        own = event.self_cpu_time_total
        lines.append((event.key, f"{event.count:,}", f"{own / 1e6:.3g}", f"{own / total:.1%}"))
    print(cli.markdown(lines))
    return 0


def make_parser(doc, repeats=5):
    """ArgumentParser of a program with the flags that all have."""
    parser = cli.parser(doc)
    parser.add_argument("--repeats", type=int, default=repeats, help="times, in turn (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print the rows as JSON, as bench/run.py reads them")
    parser.add_argument("--profile", action="store_true", help="print where our time goes instead")
    return parser


def usual(parser, args):
    """Whether the sizes are those that are asked for, which are the defaults."""
    sizes = vars(args).keys() - {"repeats", "threads", "json", "profile"}
    return all(getattr(args, name) == parser.get_default(name) for name in sizes)


def show(rows, args, note, ok=True):
    """Print the rows of a program and what it found when it compared results; its exit status."""
    if args.json:
        print(json.dumps({"rows": [dataclasses.asdict(r) for r in rows], "note": note}))
    else:
        print(table(rows) + f"\n\n{note}")
    if not ok:
        print("the results of the two differ; their times cannot be compared", file=sys.stderr)
    return int(not ok)
