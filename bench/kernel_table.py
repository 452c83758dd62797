"""What the Triton kernels need of a GPU and of its memory, told without one: compiled resources and bytes moved.

    python bench/kernel_table.py                                 # about a minute on one core
    python bench/kernel_table.py --targets 90 --types bfloat16   # seconds

Every operation runs forward and backward at a full width on tensors without memory (the meta device), with launches
noted in place of being made. The first table has each kernel so noted, compiled for each target as it would be on the
device: registers a thread and bytes of shared memory. A kernel that spills registers is marked and makes the exit status 1.
The second has the bytes that forward and backward move: the least that is possible (each large tensor that an operation
must read or write, once), the kernels' (all tensors given to them, and the torch operations beside them), and the plain
form's (what its torch operations read and write). Caches are left out of account, for all three.
"""

import argparse
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that `python bench/kernel_table.py` finds kernels
import flow_grpo
import mmdit
import qwen_vl
from kernels import log_probs
from kernels import triton_forms as fused
from parts import ops

TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.int64: "i64"}


@dataclass
class Launch:
    kernel: Any
    args: tuple
    warps: int
    constants: dict


@dataclass
class Case:
    name: str
    shape: str
    fused: Any  # function of the tensors
    plain: Any
    tensors: list  # those that are differentiated first
    trained: int  # how many are
    least: float  # bytes of forward and backward


def make(*shape, dtype):
    return torch.empty(shape, dtype=dtype, device="meta")


def make_cases(dtype, B=8, L=1024, side=64, rows=4096, make=make):
    """All operations at the widths of SD3.5-Medium and -Large and Qwen2.5-VL-7B, over B pictures of L tokens.

    side: of the latents; rows: of a tile of logits; make(*shape, dtype): gives the tensors, those of int64 in 0..2047. Both
    forms of a case return the same.
    """
    s, N, cases = dtype.itemsize, B * L, []

    def add(name, shape, fused, plain, tensors, trained, least):
        cases.append(Case(name, shape, fused, plain, tensors, trained, least))

    for D in (1536, 2432):
        x, y = make(B, L, D, dtype=dtype), make(B, L, D, dtype=dtype)
        shift, scale, gate = make(B, 6 * D, dtype=dtype).chunk(6, dim=-1)[:3]
        shape = f"{B}×{L}×{D}"
        add("modulate", shape, fused.modulate, mmdit.modulate.plain, [x, shift, scale], 3, 5 * s * N * D)
        add("modulate, frozen vectors", shape, fused.modulate, mmdit.modulate.plain, [x, shift, scale], 1, 5 * s * N * D)
        if D == 1536:  # its tiles are of one size, whatever the width
            pair = fused.gate_residual, mmdit.gate_residual.plain, [x, y, gate]
            add("gate_residual", shape, *pair, 3, 6 * s * N * D)
            add("gate_residual, frozen gate", shape, *pair, 2, 5 * s * N * D)
    for D in (1280, 3584, 8192):
        x, weight = make(N, D, dtype=dtype), make(D, dtype=dtype)
        add("rms_norm", f"{N}×{D}", fused.rms_norm, ops.rms_norm.plain, [x, weight], 2, 5 * s * N * D)
        add("rms_norm, frozen weight", f"{N}×{D}", fused.rms_norm, ops.rms_norm.plain, [x, weight], 1, 5 * s * N * D)
    H, E = 24, 64
    heads = [make(B, L, 3 * H * E, dtype=dtype), make(E, dtype=dtype), make(E, dtype=dtype)]
    for name, trained in (("split_qkv", 3), ("split_qkv, frozen weights", 1)):
        add(name, f"{B}×{L}×3·{H}×{E}", lambda qkv, *w, H=H: fused.split_qkv(qkv, H, *w),
            lambda qkv, *w, H=H: ops.split_qkv.plain(qkv, H, *w), heads, trained, (4 + 8) * s * N * H * E)
    text = max(1, L // 3)
    streams = [make(B, n, 3 * H * E, dtype=dtype) for n in (text, L)]
    for name, trained in (("joint_qkv", 6), ("joint_qkv, frozen weights", 2)):
        add(name, f"{B}×({text} + {L})×3·{H}×{E}", *(
            lambda c, x, *w, joint=joint, H=H: joint(c, x, H, w[:2], w[2:])
            for joint in (fused.joint_qkv, mmdit.joint_qkv.plain)),
            [*streams, *(make(E, dtype=dtype) for _ in range(4))], trained, (6 + 8) * s * B * (text + L) * H * E)
    for H, K, E, angle in ((28, 4, 128, dtype), (16, 16, 80, torch.float32)):
        halves = [make(N, 1, E // 2, dtype=angle) for _ in "cs"]  # each angle belongs to both halves of a head
        tensors = [make(N, (H + 2 * K) * E, dtype=dtype), *(torch.cat([t, t], dim=-1) for t in halves)]
        add("split_rotate", f"{N}×({H}+2·{K})×{E}", lambda qkv, *t, H=H, K=K: fused.split_rotate(qkv, H, K, *t),
            lambda qkv, *t, H=H, K=K: qwen_vl.split_rotate.plain(qkv, H, K, *t), tensors, 1,
            2 * s * N * (2 * H + 3 * K) * E + 2 * angle.itemsize * N * E)
    for M in (18_944, 3420):
        add("swiglu", f"{N}×2·{M}", fused.swiglu, qwen_vl.swiglu.plain, [make(N, 2 * M, dtype=dtype)], 1, 8 * s * N * M)
    v, x, after, ref = (make(B, 16, side, side, dtype=torch.float32) for _ in range(4))  # whatever the type of the model
    add("sde_log_prob and kl", f"{B}×16×{side}×{side}", *(lambda *t, score=score: score(*t[:3], .9, -.1, .3, t[3], .8)
        for score in (fused.sde_log_prob, flow_grpo.sde_log_prob.plain)), [v, x, after, ref], 1, 9 * v.nbytes)
    add("sde_draw", f"{B}×16×{side}×{side}", *(lambda *t, draw=draw: draw(*t, .9, -.1, .3)
        for draw in (fused.sde_draw, flow_grpo.sde_draw.plain)),
        [v, x, after], 0, 4 * v.nbytes)
    for V in (2048, 8192):
        state = [make(rows, dtype=t) for t in (torch.int64, *[torch.float32] * 3)]
        add("scan_tile", f"{rows}×{V}", scan_fused, scan_plain, [make(rows, V, dtype=dtype), *state], 0, 2 * s * rows * V)
    return cases


def scan_fused(logits, targets, *state):
    keep = fused.scan_tile(logits, targets, 16, *state)
    return logits, *state, keep


def scan_plain(logits, targets, *state):
    """With log_probs.scan_vocabulary's tile of float32, and the product's operand in the type of the logits."""
    z = logits.float()
    keep = log_probs.scan_tile(z, targets, 16, *state)
    return z.to(logits.dtype), *state, keep


# ---------------------------------------------------------------------------------------------------------------------
# Bytes


def tensor_bytes(x):
    """Of the memory that x covers: what it repeats by a step of 0 counts once."""
    return x.element_size() * torch.Size(n for n, step in zip(x.shape, x.stride(), strict=True) if step).numel()


class Count(TorchDispatchMode):
    """Adds up the inputs and outputs of all torch operations that touch memory: not views, and not new empty tensors."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        results = [t for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, torch.Tensor)]
        given = [t for t in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        changes = function._schema.is_mutable
        view = not changes and any(r.untyped_storage()._cdata == g.untyped_storage()._cdata for r in results for g in given)
        if not view and "empty" not in function._schema.name:
            self.bytes += sum(map(tensor_bytes, (*given, *results)))
        return out


def measure(function, case):
    """(bytes, launches) of function(*tensors) and its gradients."""
    tensors = [t.detach().requires_grad_(i < case.trained) for i, t in enumerate(case.tensors)]
    launches, count = [], Count()

    def note(kernel, grid, *args, num_warps=4, **constants):
        launches.append(Launch(kernel, args, num_warps, constants))
        count.bytes += sum(tensor_bytes(x) for x in args if isinstance(x, torch.Tensor))

    with mock.patch.object(fused, "launch", note), torch.enable_grad() if case.trained else torch.no_grad():
        with count:
            out = function(*tensors)
        if case.trained:
            out = [t for t in out if t is not None and t.requires_grad] if isinstance(out, tuple) else [out]
            upstream = [torch.empty_like(t) for t in out]
            with count:
                torch.autograd.grad(out, tensors[:case.trained], upstream)
    return count.bytes, launches


# ---------------------------------------------------------------------------------------------------------------------
# Resources


def compile_launch(launch, capability):
    """(registers a thread, bytes of shared memory, bytes spilled to the stack) for compute capability 80, 90, …"""
    signature, constants, attributes = {}, dict(launch.constants), {}
    for i, name in enumerate(launch.kernel.arg_names):
        value = launch.args[i] if i < len(launch.args) else None
        if name in launch.constants or (type(value) is int and value == 1):  # Triton makes a 1 a constant by itself
            signature[name] = "constexpr"
            constants.setdefault(name, value)
        elif isinstance(value, torch.Tensor):
            signature[name] = f"*{TYPES[value.dtype]}"
        else:
            signature[name] = "fp32" if isinstance(value, float) else "i32"
        if isinstance(value, torch.Tensor) or (type(value) is int and value % 16 == 0):
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(launch.kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32),
                              options={"num_warps": launch.warps, "enable_fp_fusion": False})
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        text = subprocess.run([tool, "--dump-resource-usage", file.name], check=True, capture_output=True, text=True).stdout
    registers, stack = (int(re.search(rf"{word}:(\d+)", text).group(1)) for word in ("REG", "STACK"))
    return registers, compiled.metadata.shared, stack


def describe(launch):
    """(kernel, type, constants) that tell one compiled kernel from another."""
    types = "/".join(dict.fromkeys(TYPES[x.dtype] for x in launch.args if isinstance(x, torch.Tensor)))
    constants = " ".join(f"{name}={value}" for name, value in launch.constants.items())
    return launch.kernel.__name__.removesuffix("_kernel"), types, f"{constants} warps={launch.warps}"


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", type=int, nargs="+", default=[80, 90, 100], help="compute capabilities, times ten")
    parser.add_argument("--types", nargs="+", default=["bfloat16", "float32"], choices=["bfloat16", "float16", "float32"],
                        help="of the model")
    args = parser.parse_args(argv)
    cases = [case for name in args.types for case in make_cases(getattr(torch, name))]
    cases = {(case.name, TYPES[case.tensors[0].dtype], case.shape): case for case in cases}
    measured = {key: (*measure(case.fused, case), measure(case.plain, case)[0]) for key, case in cases.items()}

    compiled = {describe(launch): launch for _, launches, _ in measured.values() for launch in launches}
    print(f"triton {triton.__version__}: registers a thread, bytes of shared memory\n")
    print("| kernel | types | constants |", *(f"sm_{t} |" for t in args.targets))
    print("|---|---|---|" + "---|" * len(args.targets))
    spilled = 0
    for key, launch in compiled.items():
        print("|", " | ".join(key), "|", end="", flush=True)
        for target in args.targets:
            registers, shared, stack = compile_launch(launch, target)
            spilled += stack > 0
            print(f" {registers}, {shared}{f', SPILLS {stack} bytes' if stack else ''} |", end="", flush=True)
        print()
    print(f"\n{len(compiled) * len(args.targets)} kernels compiled, {spilled} spill registers\n")

    print("| operation | type | shape | least, MB | kernels, MB | plain, MB | kernels/least | plain/kernels |")
    print("|---|---|---|---|---|---|---|---|")
    for key, (ours, _, plain) in measured.items():
        least = cases[key].least
        print("|", " | ".join(key), f"| {least / 1e6:.1f} | {ours / 1e6:.1f} | {plain / 1e6:.1f} | {ours / least:.2f} "
              f"| {plain / ours:.1f} |")
    return 1 if spilled else 0


if __name__ == "__main__":
    sys.exit(main())
