"""What the Triton kernels need of a GPU, told without one: compiled resources and bytes moved.

    python -m bench.kernel_table                                 # about a minute on one core
    python -m bench.kernel_table --targets 90 --types bfloat16   # seconds

Every operation runs forward and backward at a full width on tensors without memory (the meta
device), with launches noted in place of being made. The first table has each kernel so noted,
compiled for each target as it would be on the device: registers a thread and bytes of shared
memory. A kernel that spills registers is marked and makes the exit status 1. The second has the
bytes that forward and backward move: the least that is possible (each large tensor that an
operation must read or write, once), the kernels' (all tensors given to them, and the torch
operations beside them), and the plain form's (what its torch operations read and write). Caches are
left out of account, for all three.
"""

import contextlib
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import flow_grpo
import mmdit
import qwen_vl
from kernels import log_probs, triton_heads, triton_norms, triton_steps
from parts import cli, ops

TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.int64: "i64"}
MODULES = (triton_heads, triton_norms, triton_steps)


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
    fused: Any  # function of the tensors; `plain` returns the same
    plain: Any
    tensors: list  # those that are differentiated first
    trained: int  # how many are
    least: float  # bytes of forward and backward


# --------------------------------------------------------------------------------------------------
# Cases: all operations at the widths of SD3.5-Medium and -Large and of Qwen2.5-VL-7B


def make(*shape, dtype):
    return torch.empty(shape, dtype=dtype, device="meta")


def make_cases(dtype, B=8, L=1024, side=64, rows=4096, make=make):
    """All cases, over B pictures of L tokens, latents of a side, and tiles of rows of logits.

    make(*shape, dtype): gives the tensors, those of int64 in 0..2047.
    """
    return [*row_cases(dtype, B, L, make), *head_cases(dtype, B, L, make),
            *rotation_cases(dtype, B * L, make), *step_cases(dtype, B, side, rows, make)]


def row_cases(dtype, B, L, make):
    """adaLN, gated residual, RMSNorm, SwiGLU: operations of whole rows."""
    cases = []
    for D in (1536, 2432):
        x = make(B, L, D, dtype=dtype)
        shift, scale, gate = make(B, 6 * D, dtype=dtype).chunk(6, dim=-1)[:3]
        shape = f"{B}×{L}×{D}"
        pair = (triton_norms.modulate, mmdit.modulate.plain, [x, shift, scale])
        cases.append(Case("modulate", shape, *pair, 3, 5 * x.nbytes))
        cases.append(Case("modulate, frozen vectors", shape, *pair, 1, 5 * x.nbytes))
        if D == 1536:  # the tiles of gate_residual are of one size, whatever the width
            branch = make(B, L, D, dtype=dtype)
            pair = (triton_norms.gate_residual, mmdit.gate_residual.plain, [x, branch, gate])
            cases.append(Case("gate_residual", shape, *pair, 3, 6 * x.nbytes))
            cases.append(Case("gate_residual, frozen gate", shape, *pair, 2, 5 * x.nbytes))
    N = B * L
    for D in (1280, 3584, 8192):
        x = make(N, D, dtype=dtype)
        pair = (triton_norms.rms_norm, ops.rms_norm.plain, [x, make(D, dtype=dtype)])
        cases.append(Case("rms_norm", f"{N}×{D}", *pair, 2, 5 * x.nbytes))
        cases.append(Case("rms_norm, frozen weight", f"{N}×{D}", *pair, 1, 5 * x.nbytes))
    for M in (18_944, 3420):
        x = make(N, 2 * M, dtype=dtype)
        pair = (triton_steps.swiglu, qwen_vl.swiglu.plain, [x])
        cases.append(Case("swiglu", f"{N}×2·{M}", *pair, 1, 4 * x.nbytes))
    return cases


def split(form, H, qkv, *weights):
    return form(qkv, H, *weights)


def join(form, H, context, x, *weights):
    return form(context, x, H, weights[:2], weights[2:])


def head_cases(dtype, B, L, make, H=24, E=64):
    """Queries and keys of one stream and of two, normalised."""
    cases = []
    weights = [make(E, dtype=dtype) for _ in range(4)]
    text, image = (make(B, n, 3 * H * E, dtype=dtype) for n in (max(1, L // 3), L))
    pair = [partial(split, f, H) for f in (triton_heads.split_qkv, ops.split_qkv.plain)]
    shape = f"{B}×{L}×3·{H}×{E}"
    least = 4 * image.nbytes  # values are neither read nor written in the forward pass
    for name, trained in (("split_qkv", 3), ("split_qkv, frozen weights", 1)):
        cases.append(Case(name, shape, *pair, [image, *weights[:2]], trained, least))
    pair = [partial(join, f, H) for f in (triton_heads.joint_qkv, mmdit.joint_qkv.plain)]
    shape = f"{B}×({text.shape[1]} + {L})×3·{H}×{E}"
    least = (6 + 8) / 3 * (text.nbytes + image.nbytes)
    for name, trained in (("joint_qkv", 6), ("joint_qkv, frozen weights", 2)):
        cases.append(Case(name, shape, *pair, [text, image, *weights], trained, least))
    return cases


def rotate(form, H, K, qkv, cos, sin):
    return form(qkv, H, K, cos, sin)


def rotation_cases(dtype, N, make):
    """Queries and keys of the text in the model's type, of the vision tower with float32 angles."""
    cases = []
    for H, K, E, angle in ((28, 4, 128, dtype), (16, 16, 80, torch.float32)):
        forms = (triton_heads.split_rotate, qwen_vl.split_rotate.plain)
        pair = [partial(rotate, f, H, K) for f in forms]
        halves = [make(N, 1, E // 2, dtype=angle) for _ in range(2)]
        whole = [torch.cat([half, half], dim=-1) for half in halves]
        qkv = make(N, (H + 2 * K) * E, dtype=dtype)
        least = 2 * dtype.itemsize * N * (2 * H + 3 * K) * E + 2 * angle.itemsize * N * E
        shape = f"{N}×({H}+2·{K})×{E}"
        cases.append(Case("split_rotate", shape, *pair, [qkv, *whole], 1, least))
    return cases


def evaluate(form, velocity, latents, after, ref):
    return form(velocity, latents, after, 0.9, -0.1, 0.3, ref, 0.8)


def draw(form, velocity, latents, noise):
    return form(velocity, latents, noise, 0.9, -0.1, 0.3)


def step_cases(dtype, B, side, rows, make):
    """The step of the SDE, always in float32, and tiles of the log-softmax."""
    tensors = [make(B, 16, side, side, dtype=torch.float32) for _ in range(4)]
    size = tensors[0].nbytes
    shape = f"{B}×16×{side}×{side}"
    pair = [partial(evaluate, f) for f in (triton_steps.sde_log_prob, flow_grpo.sde_log_prob.plain)]
    cases = [Case("sde_log_prob and kl", shape, *pair, tensors, 1, 9 * size)]
    pair = [partial(draw, f) for f in (triton_steps.sde_draw, flow_grpo.sde_draw.plain)]
    cases.append(Case("sde_draw", shape, *pair, tensors[:3], 0, 4 * size))
    # The first is what token_log_probs has; the second the widest tile, in the model's type.
    for V, kind in ((log_probs.CHUNK, torch.float32), (8192, dtype)):
        logits = make(rows, V, dtype=kind)
        state = [make(rows, dtype=t) for t in (torch.int64, *[torch.float32] * 3)]
        pair = (scan_fused, scan_plain, [logits, *state])
        cases.append(Case("scan_tile", f"{rows}×{V}", *pair, 0, 2 * logits.nbytes))
    return cases


def scan_fused(logits, targets, *state):
    keep = triton_steps.scan_tile(logits, targets, 16, *state)
    return logits, *state, keep


def scan_plain(logits, targets, *state):
    z = logits.to(torch.promote_types(logits.dtype, torch.float32))
    keep = log_probs.scan_tile.plain(z, targets, 16, *state)
    return z.to(logits.dtype), *state, keep


# --------------------------------------------------------------------------------------------------
# Bytes


def tensor_bytes(x):
    """Of the memory that x covers: what it repeats by a step of 0 counts once."""
    sizes = [n for n, step in zip(x.shape, x.stride(), strict=True) if step]
    return x.element_size() * torch.Size(sizes).numel()


def tensors_in(tree):
    return [t for t in torch.utils._pytree.tree_leaves(tree) if isinstance(t, torch.Tensor)]


class Count(TorchDispatchMode):
    """Adds up the inputs and outputs of all torch operations that touch memory.

    Views do not, nor do new empty tensors.
    """

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        given = tensors_in((args, kwargs))
        results = tensors_in(out)
        memory = {t.untyped_storage()._cdata for t in given}
        shares = any(t.untyped_storage()._cdata in memory for t in results)
        is_view = shares and not function._schema.is_mutable
        if not is_view and "empty" not in function._schema.name:
            self.bytes += sum(map(tensor_bytes, (*given, *results)))
        return out


def measure(function, case):
    """(bytes, launches) of function(*tensors) and its gradients."""
    tensors = [t.detach().requires_grad_(i < case.trained) for i, t in enumerate(case.tensors)]
    launches = []
    count = Count()

    def note(kernel, grid, *args, num_warps=4, **constants):
        launches.append(Launch(kernel, args, num_warps, constants))
        count.bytes += sum(tensor_bytes(x) for x in args if isinstance(x, torch.Tensor))

    with contextlib.ExitStack() as stack:
        for module in MODULES:
            stack.enter_context(mock.patch.object(module, "launch", note))
        stack.enter_context(torch.set_grad_enabled(case.trained > 0))
        with count:
            out = function(*tensors)
        if case.trained:
            out = [t for t in tensors_in(out) if t.requires_grad]
            upstream = [torch.empty_like(t) for t in out]
            with count:
                torch.autograd.grad(out, tensors[:case.trained], upstream)
    return count.bytes, launches


# --------------------------------------------------------------------------------------------------
# Resources


def compile_launch(launch, capability):
    """(registers a thread, bytes of shared memory, bytes spilled to the stack), for sm_80, 90, …"""
    # 1. what Triton would see at the launch
    signature = {}
    constants = dict(launch.constants)
    attributes = {}
    for i, name in enumerate(launch.kernel.arg_names):
        value = launch.args[i] if i < len(launch.args) else None
        is_integer = type(value) is int
        if name in launch.constants or (is_integer and value == 1):
            signature[name] = "constexpr"  # Triton makes a 1 a constant by itself
            constants.setdefault(name, value)
        elif isinstance(value, torch.Tensor):
            signature[name] = f"*{TYPES[value.dtype]}"
        else:
            signature[name] = "fp32" if isinstance(value, float) else "i32"
        if isinstance(value, torch.Tensor) or (is_integer and value % 16 == 0):
            attributes[(i,)] = [["tt.divisibility", 16]]
    # 2. compile as launch() would
    source = ASTSource(launch.kernel, signature, constants, attributes)
    options = {"num_warps": launch.warps, "enable_fp_fusion": False}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    # 3. ask NVIDIA's own tool, which comes with Triton
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [tool, "--dump-resource-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    registers, stack = (int(re.search(rf"{word}:(\d+)", text)[1]) for word in ("REG", "STACK"))
    return registers, compiled.metadata.shared, stack


def describe(launch):
    """(kernel, type, constants) that tell one compiled kernel from another."""
    tensors = [x for x in launch.args if isinstance(x, torch.Tensor)]
    types = "/".join(dict.fromkeys(TYPES[x.dtype] for x in tensors))
    constants = " ".join(f"{name}={value}" for name, value in sorted(launch.constants.items()))
    name = launch.kernel.__name__.removesuffix("_kernel")
    return name, types, f"{constants} warps={launch.warps}"


def resource_rows(compiled, targets):
    """(rows of the first table, how many of them spill)."""
    rows = [("kernel", "types", "constants", *(f"sm_{target}" for target in targets))]
    spilled = 0
    for key, launch in compiled.items():
        cells = []
        for target in targets:
            registers, shared, stack = compile_launch(launch, target)
            spilled += stack > 0
            cells.append(f"{registers}, {shared}" + (f", SPILLS {stack} bytes" if stack else ""))
        rows.append((*key, *cells))
    return rows, spilled


def main(argv=None):
    parser = cli.parser(__doc__)
    parser.add_argument("--targets", type=int, nargs="+", default=[80, 90, 100],
                        help="compute capabilities, times ten")
    parser.add_argument("--types", nargs="+", default=["bfloat16", "float32"],
                        choices=["bfloat16", "float16", "float32"], help="of the model")
    args = parser.parse_args(argv)
    cases = [case for name in args.types for case in make_cases(getattr(torch, name))]
    cases = {(case.name, TYPES[case.tensors[0].dtype], case.shape): case for case in cases}
    compiled = {}
    byte_rows = [("operation", "type", "shape", "least, MB", "kernels, MB", "plain, MB",
                  "kernels/least", "plain/kernels")]
    for key, case in cases.items():
        ours, launches = measure(case.fused, case)
        plain, _ = measure(case.plain, case)
        compiled |= {describe(launch): launch for launch in launches}
        megabytes = [f"{size / 1e6:.1f}" for size in (case.least, ours, plain)]
        byte_rows.append((*key, *megabytes, f"{ours / case.least:.2f}", f"{plain / ours:.1f}"))
    print(f"triton {triton.__version__}: registers a thread, bytes of shared memory\n")
    rows, spilled = resource_rows(compiled, args.targets)
    print(cli.markdown(rows))
    print(f"\n{len(compiled) * len(args.targets)} kernels compiled, {spilled} spill registers\n")
    print(cli.markdown(byte_rows))
    return 1 if spilled else 0


if __name__ == "__main__":
    sys.exit(main())
