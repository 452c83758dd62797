"""The Triton kernels against the plain forms in float64, and their compilation for GPUs that need not be there.

With a CUDA device the kernels run on it. Without one they run in Triton's interpreter. That is chosen by TRITON_INTERPRET
when triton is imported, for all of triton, and a library imported before may have brought triton in already (diffusers
does). So `interpreted` imports a second triton with the variable set, and puts all back: the rest of the session has the
triton that it would have had.
"""

import importlib
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import flow_grpo
import grpo
import kernels
import mmdit
import qwen_vl
from flow_grpo import sde_step
from kernels import log_probs
from parts import ops

pytest.importorskip("triton")
FILES = ("triton_heads", "triton_norms", "triton_steps")
OPERATIONS = ("gate_residual", "joint_qkv", "modulate", "rms_norm", "scan_tile", "sde_draw", "sde_log_prob", "split_qkv",
              "split_rotate", "swiglu")
ROOT = Path(__file__).resolve().parent.parent
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ERRORS = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}  # of the greatest value: a few roundings
TYPES = [torch.float32, torch.bfloat16, torch.float16]


def operations():
    """The functions of all Triton files, by name."""
    found = {}
    for file in FILES:
        module = importlib.import_module(f"kernels.{file}")
        found |= {name: getattr(module, name) for name in OPERATIONS if hasattr(module, name)}
    assert found.keys() == set(OPERATIONS)
    return SimpleNamespace(**found)


def interpreted():
    """`operations` with a triton of their own that interprets."""
    def remove():
        names = [name for name in sys.modules if name.startswith(("triton.", "kernels.triton_")) or name == "triton"]
        for name in vars(kernels).keys() & {name.rpartition(".")[2] for name in names}:
            delattr(kernels, name)  # `from kernels import …` asks the package before sys.modules
        return {name: sys.modules.pop(name) for name in names if not name.startswith("triton._C")}  # C code loads once

    before = remove()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        found = operations()
    remove()
    sys.modules.update(before)
    return found


fused = interpreted() if DEVICE == "cpu" else operations()


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    """New memory is NaN, so that a value that is read before it is written shows. ops.py stands for the plain forms."""
    monkeypatch.setattr(ops, "FUSED", False)
    if DEVICE == "cpu":
        monkeypatch.setenv("TRITON_INTERPRET", "1")  # the interpreter asks for it now and then while it runs
    torch.use_deterministic_algorithms(True, warn_only=True)  # cuBLAS, here in the references, would ask for a variable
    assert torch.utils.deterministic.fill_uninitialized_memory and torch.empty(1).isnan()
    yield
    torch.use_deterministic_algorithms(False)


def tensor(*shape, dtype=torch.float32, scale=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return (torch.randn(shape, generator=generator) * scale).to(dtype).to(DEVICE)


def run(function, tensors, upstream=None):
    """(results, gradients) of function(*tensors) for gradients `upstream` of the results."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    results = function(*leaves)
    results = results if isinstance(results, tuple) else (results,)
    if upstream is None:
        upstream = [tensor(*r.shape, dtype=r.dtype, seed=i + 1) for i, r in enumerate(results)]
    return [r.detach() for r in results], torch.autograd.grad(results, leaves, upstream), upstream


def hold_together(function, reference, tensors):
    """function(*tensors) and its gradients equal the reference's in float64, in the types of the tensors and twice alike."""
    results, gradients, upstream = run(function, tensors)
    again, gradients_again, _ = run(function, tensors)
    assert all(torch.equal(a, b) for a, b in zip((*results, *gradients), (*again, *gradients_again), strict=True))
    exact, exact_gradients, _ = run(reference, [t.double() for t in tensors], [u.double() for u in upstream])
    assert [g.dtype for g in gradients] == [t.dtype for t in tensors]
    for ours, theirs in zip((*results, *gradients), (*exact, *exact_gradients), strict=True):
        assert ours.shape == theirs.shape
        bound = ERRORS[tensors[0].dtype] * theirs.abs().max().item()
        torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=bound)


def kl_of(mean, ref_mean, sigma_t):
    """(mean − ref_mean)²/(2σ_t²), averaged over the elements of each row."""
    return (mean - ref_mean).square().flatten(1).mean(1) / (2 * sigma_t**2)


def rms(x, weight, eps):
    """ops.rms_norm.plain without its own float32."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def chunks_of(B, D, count, dtype):
    """[B,D] vectors as adaLN gives them: parts of one tensor."""
    return tensor(B, count * D, dtype=dtype, scale=0.5).chunk(count, dim=-1)


@pytest.mark.parametrize("B, L, D", [(2, 3, 7), (1, 1, 1), (2, 17, 40), (1, 2, 1536), (1, 2, 3584)])
@pytest.mark.parametrize("dtype", TYPES)
def test_modulate(B, L, D, dtype):
    shift, scale, *_ = chunks_of(B, D, 6, dtype)
    x = tensor(B, L, D, dtype=dtype) + 3
    # one value has no deviation: the gradient in float64 is 0, and what rounding leaves must not be blown up by 1/√eps
    eps = 0.1 if D == 1 else 1e-6
    hold_together(lambda *t: fused.modulate(*t, eps), lambda *t: mmdit.modulate.plain(*t, eps), (x, shift, scale))


@pytest.mark.parametrize("B, L, D", [(2, 3, 7), (1, 1, 1), (2, 33, 130), (1, 2, 1536)])
@pytest.mark.parametrize("dtype", TYPES)
def test_gate_residual(B, L, D, dtype):
    x, branch, gate = tensor(B, L, D, dtype=dtype), tensor(B, L, D, dtype=dtype, seed=1), chunks_of(B, D, 6, dtype)[2]
    hold_together(fused.gate_residual, mmdit.gate_residual.plain, (x, branch, gate))


@pytest.mark.parametrize("shape", [(2, 3, 7), (1,), (17, 40), (2, 1536), (2, 3584)])
@pytest.mark.parametrize("dtype", TYPES)
def test_rms_norm(shape, dtype):
    x, weight = tensor(*shape, dtype=dtype, scale=4), tensor(shape[-1], dtype=dtype, seed=1)
    hold_together(lambda *t: fused.rms_norm(*t, 0.1), lambda *t: rms(*t, 0.1), (x, weight))


@pytest.mark.parametrize("B, L, H, E", [(2, 3, 3, 5), (1, 1, 1, 1), (2, 9, 5, 64), (1, 5, 2, 80)])
@pytest.mark.parametrize("dtype", TYPES)
def test_split_qkv(B, L, H, E, dtype):
    def reference(qkv, wq, wk):
        q, k, v = ops.split_qkv.plain(qkv, H)
        return rms(q, wq, 0.1), rms(k, wk, 0.1), v

    qkv, wq, wk = tensor(B, L, 3 * H * E, dtype=dtype), tensor(E, dtype=dtype), tensor(E, dtype=dtype, seed=1)
    hold_together(lambda *t: fused.split_qkv(t[0], H, *t[1:], 0.1), reference, (qkv, wq, wk))
    assert fused.split_qkv(qkv, H) is NotImplemented  # the plain form, which then only makes views
    assert fused.split_qkv(qkv, H, wq, wk)[2].data_ptr() == qkv[..., 2 * H * E:].data_ptr()


@pytest.mark.parametrize("B, L, N, H, E", [(2, 3, 4, 3, 5), (1, 1, 1, 1, 1), (2, 9, 2, 5, 64), (3, 1, 5, 2, 80)])
@pytest.mark.parametrize("dtype", TYPES)
def test_joint_qkv(B, L, N, H, E, dtype):
    def reference(context, x, *norms):
        streams = zip((context, x), (norms[:2], norms[2:]))
        split = [(ops.split_qkv.plain(t, H), own) for t, own in streams]
        return tuple(torch.cat(pair, 2) for pair in zip(*(
            (rms(q, wq, 0.1), rms(k, wk, 0.1), v) for (q, k, v), (wq, wk) in split)))

    streams = [tensor(B, n, 3 * H * E, dtype=dtype, seed=n) for n in (L, N)]
    norms = [tensor(E, dtype=dtype, seed=10 + i) for i in range(4)]
    hold_together(lambda c, x, *w: fused.joint_qkv(c, x, H, w[:2], w[2:], 0.1), reference, (*streams, *norms))
    values = fused.joint_qkv(*streams, H, norms[:2], norms[2:])[2]
    assert torch.equal(values, torch.cat([ops.split_qkv.plain(t, H)[2] for t in streams], dim=2))


@pytest.mark.parametrize("N, H, K, E", [(3, 4, 2, 6), (1, 1, 1, 2), (9, 7, 1, 128), (5, 2, 2, 80)])
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("wide_angles", [True, False])
def test_split_rotate(N, H, K, E, dtype, wide_angles):
    angle = tensor(N, 1, E // 2, scale=3)
    cos, sin = (torch.cat([t, t], -1).to(torch.float32 if wide_angles else dtype) for t in (angle.cos(), angle.sin()))

    def plain(qkv):
        return qwen_vl.split_rotate.plain(qkv, H, K, cos, sin)

    qkv = tensor(N, (H + 2 * K) * E, dtype=dtype)
    hold_together(lambda t: fused.split_rotate(t, H, K, cos, sin), plain, (qkv,))
    if DEVICE == "cuda" or dtype != torch.bfloat16:  # the interpreter cuts bfloat16 off and does not round it
        assert all(torch.equal(a, b) for a, b in zip(fused.split_rotate(qkv, H, K, cos, sin), plain(qkv), strict=True))


@pytest.mark.parametrize("shape", [(2, 3, 14), (2,), (3, 2 * 1030), (1, 2 * 3420)])
@pytest.mark.parametrize("dtype", TYPES)
def test_swiglu(shape, dtype):
    hold_together(fused.swiglu, qwen_vl.swiglu.plain, (tensor(*shape, dtype=dtype, scale=3),))


@settings(max_examples=6, deadline=None)
@given(st.integers(1, 3), st.integers(1, 20), st.integers(2, 70), st.sampled_from(TYPES))
def test_all_row_kernels_at_any_shape(B, L, D, dtype):
    shift, scale, gate = chunks_of(B, D, 3, dtype)
    x, branch = tensor(B, L, D, dtype=dtype), tensor(B, L, D, dtype=dtype, seed=1)
    hold_together(lambda *t: fused.modulate(*t, 0.1), lambda *t: mmdit.modulate.plain(*t, 0.1), (x, shift, scale))
    hold_together(fused.gate_residual, mmdit.gate_residual.plain, (x, branch, gate))
    hold_together(lambda *t: fused.rms_norm(*t, 0.1), lambda *t: rms(*t, 0.1), (x[:1], gate[0]))


def coefficients(sigma, sigma_next, noise_level=0.7):
    """a, b, std, sigma_t of flow_grpo.sde_step at σ below 1."""
    sigma_t, dt = noise_level * math.sqrt(sigma / (1 - sigma)), sigma_next - sigma
    pull = sigma_t**2 / (2 * sigma)
    return 1 + pull * dt, (1 + pull * (1 - sigma)) * dt, sigma_t * math.sqrt(-dt), sigma_t


@pytest.mark.parametrize("shape", [(2, 3, 5, 4), (1, 1, 1, 1), (2, 16, 12, 12)])
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("compare", [True, False])
def test_sde_log_prob(shape, dtype, compare):
    velocity, latents, after, ref = (tensor(*shape, dtype=dtype, seed=i) for i in range(4))
    a, b, std, sigma_t = coefficients(0.8, 0.7)

    def plain(v):
        mean, ref_mean = a * latents.double() + b * v, a * latents.double() + b * ref.double()
        z = (after.double() - mean) / std
        log_prob = (-z.square() / 2 - math.log(std) - math.log(2 * math.pi) / 2).flatten(1).mean(1)
        return (log_prob, kl_of(mean, ref_mean, sigma_t)) if compare else log_prob

    def ours(v):
        log_prob, kl = fused.sde_log_prob(v, latents, after, a, b, std, ref if compare else None, sigma_t)
        return (log_prob, kl) if compare else log_prob

    hold_together(ours, plain, (velocity,))


def test_sde_draw_takes_the_step_of_flow_grpo_and_its_log_prob_is_that_of_the_step_evaluated():
    velocity, latents, ref = (tensor(3, 4, 30, 20, seed=i) for i in range(3))
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(5)).to(DEVICE)
    a, b, std, sigma_t = coefficients(0.8, 0.7)
    after, log_prob = fused.sde_draw(velocity.requires_grad_(), latents, noise, a, b, std)
    step = sde_step(velocity, latents, 0.8, 0.7, 0.7, generator=torch.Generator().manual_seed(5))
    torch.testing.assert_close(after, step.next_latents)
    torch.testing.assert_close(log_prob, step.log_prob)
    assert not after.requires_grad
    for reference in (None, ref):  # an exact ratio of 1
        assert torch.equal(fused.sde_log_prob(velocity, latents, after, a, b, std, reference, sigma_t)[0], log_prob)
    kl = fused.sde_log_prob(velocity, latents, after, a, b, std, ref, sigma_t)[1]
    torch.testing.assert_close(kl, kl_of(step.mean, a * latents + b * ref, sigma_t))
    evaluated = fused.sde_log_prob(velocity, latents, after, a, b, std)[0]
    for ours in (log_prob, evaluated):
        torch.testing.assert_close(*(torch.autograd.grad(t.sum(), velocity, retain_graph=True)[0]
                                     for t in (ours, step.log_prob)))


@pytest.mark.parametrize("N, V, tile", [(3, 20, 7), (1, 1, 1), (2, 3000, 2048)])
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("scale", [1.0, 1.7])
def test_scan_tile_makes_the_log_softmax_as_the_tiles_pass(N, V, tile, dtype, scale):
    logits, targets = tensor(N, V, dtype=dtype, scale=4), torch.arange(N, device=DEVICE) * (V // N)
    exact = logits.double() * scale
    peak, total, picked = torch.full((N,), -math.inf, device=DEVICE), tensor(N) * 0, torch.empty(N, device=DEVICE)
    mass = torch.zeros(N, dtype=torch.double, device=DEVICE)  # Σ exp(logit − peak) of the values left in the tiles
    for start in range(0, V, tile):
        z = logits[:, start:start + tile].clone() if start else logits[:, :tile]  # contiguous, or a part of longer rows
        keep = fused.scan_tile(z, targets, start, peak, total, picked, scale)
        mass = mass * keep.double() + z.double().sum(1)
        torch.testing.assert_close(z.double(), (exact[:, start:start + tile] - peak[:, None].double()).exp(),
                                   rtol=0, atol=ERRORS[dtype])
    torch.testing.assert_close(peak.double(), exact.amax(1), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(picked - peak - total.log(), exact.log_softmax(1).gather(1, targets[:, None])[:, 0].float(),
                               rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(mass, total.double(), rtol=ERRORS[dtype], atol=0)


def test_inputs_of_any_layout_and_tensors_that_need_no_gradient():
    x, branch = tensor(5, 2, 6).transpose(0, 1), tensor(2, 6, 5).transpose(1, 2)  # [2,5,6]
    shift, scale, weight = tensor(6, 2).t(), tensor(1, 6).expand(2, 6), tensor(6)
    hold_together(fused.modulate, mmdit.modulate.plain, (x, shift, scale))
    hold_together(lambda t: fused.modulate(t, shift, scale),
                  lambda t: mmdit.modulate.plain(t, shift.to(t), scale.to(t)), (x,))
    hold_together(lambda t: fused.modulate(x, t, scale), lambda t: mmdit.modulate.plain(x.to(t), t, scale.to(t)), (shift,))
    hold_together(fused.gate_residual, mmdit.gate_residual.plain, (x, branch, scale))
    hold_together(lambda t: fused.gate_residual(t, branch, shift),
                  lambda t: mmdit.gate_residual.plain(t, branch.to(t), shift.to(t)), (x,))
    hold_together(lambda t: fused.gate_residual(x, t, shift),
                  lambda t: mmdit.gate_residual.plain(x.to(t), t, shift.to(t)), (branch,))
    hold_together(lambda t: fused.gate_residual(x, branch, t),
                  lambda t: mmdit.gate_residual.plain(x.to(t), branch.to(t), t), (shift,))
    hold_together(lambda t: fused.rms_norm(t, weight), lambda t: rms(t, weight.to(t), 1e-6), (x,))


def test_heads_through_attention():
    """Its gradients come in a layout of their own, and only the image's queries are asked, as in the last block."""
    weight, mine = tensor(4), tensor(2, 2, 3, 4)
    gradients = []
    for split in (fused.split_qkv, ops.split_qkv.plain):
        qkv = tensor(2, 5, 24).transpose(0, 1).requires_grad_()  # [5,2,24]
        q, k, v = split(qkv.transpose(0, 1), 2, weight, weight)
        out = ops.attention(torch.cat([q, mine], 2)[:, :, 2:], torch.cat([k, mine], 2), torch.cat([v, mine], 2))
        gradients.append(torch.autograd.grad(out, qkv, tensor(*out.shape))[0])
    torch.testing.assert_close(*gradients)


def test_a_type_for_each_tensor():
    """A float32 norm in a bfloat16 model: the result has the wider type, each gradient that of its tensor."""
    x, weight = tensor(3, 8, dtype=torch.bfloat16), tensor(8)
    assert fused.rms_norm(x, weight).dtype == ops.rms_norm.plain(x, weight).dtype == torch.float32
    hold_together(fused.rms_norm, lambda *t: rms(*t, 1e-6), (x, weight))
    shift, scale = tensor(1, 8), tensor(1, 8, seed=1)
    hold_together(fused.modulate, mmdit.modulate.plain, (x[None], shift, scale))
    hold_together(fused.gate_residual, mmdit.gate_residual.plain, (x[None], tensor(1, 3, 8), scale))


def test_no_rows_give_nothing_and_zero_sums():
    x, shift, weight = tensor(2, 0, 4).requires_grad_(), tensor(2, 4).requires_grad_(), tensor(4).requires_grad_()
    for out in (fused.modulate(x, shift, shift), fused.gate_residual(x, x, shift), fused.rms_norm(x, weight)):
        assert out.shape == x.shape
        out.sum().backward()
    assert not shift.grad.any() and not weight.grad.any()


def test_two_streams_without_norms_are_for_the_plain_form():
    assert fused.joint_qkv(tensor(1, 5, 6), tensor(1, 5, 6), 1, (None, None), (None, None)) is NotImplemented


def test_what_a_kernel_could_not_read_is_refused():
    x, vector = tensor(2, 3, 4), tensor(2, 4)
    for call, message in (
            (lambda: fused.modulate(x, vector[:1], vector), r"shift must have the shape \[2, 4\], got \[1, 4\]"),
            (lambda: fused.gate_residual(x, x[:, :2], vector), r"branch must have the shape \[2, 3, 4\]"),
            (lambda: fused.rms_norm(x, vector), r"weight must have the shape \[4\]"),
            (lambda: fused.split_qkv(x, 1, vector[0], vector[0]), r"qkv must have the shape \[2, 3, 3\]"),
            (lambda: fused.joint_qkv(tensor(2, 5, 6), tensor(1, 5, 6), 1, [vector[0]] * 2, [vector[0]] * 2), "context must"),
            (lambda: fused.swiglu(tensor(2, 3)), r"gate_up must have the shape \[2, 2\]"),
            (lambda: fused.sde_draw(x, x, vector, 1.0, 1.0, 1.0), r"noise must have the shape \[2, 3, 4\]"),
            (lambda: fused.rms_norm(tensor(1, 8193), tensor(8193)), "rows of at most 8192 values, got 8193")):
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(TypeError, match="float64 is for the plain forms"):
        fused.swiglu(x.double())


def test_kernel_table_compiles_every_kernel_without_a_spill_and_counts_bytes(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "bench.kernel_table", "--targets", "80", "90", "100", "--types", "bfloat16"]
    done = subprocess.run(command, cwd=ROOT, env={**environment, "TRITON_CACHE_DIR": str(tmp_path)}, capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in done.stdout.splitlines() if "|" in line]
    kernels_compiled = {row[0] for row in rows if len(row) == 6}
    text = "".join((ROOT / f"kernels/{file}.py").read_text() for file in FILES)
    assert kernels_compiled > set(re.findall(r"^def (\w+)_kernel\(", text, re.M))
    counts = {row[0]: [float(x) for x in row[3:]] for row in rows if len(row) == 8 and row[0] not in ("operation", "---")}
    assert len(counts) > 10
    for least, ours, plain, to_least, to_plain in counts.values():
        assert 0 < least <= ours < plain and to_least < 1.12 and to_plain > 1.3
    assert counts["modulate, frozen vectors"][3] == counts["split_rotate"][3] == counts["swiglu"][3] == 1
    # forward: read 2 and write 1, then the silu again; backward: silu's and the products', and the halves put together
    assert counts["swiglu"][2] == pytest.approx(18 / 8 * counts["swiglu"][0], rel=0.01)


# ---------------------------------------------------------------------------------------------------------------------
# Whole models on the kernels


def take_the_kernels(monkeypatch):
    monkeypatch.setattr(ops, "FUSED", True)
    for module in (flow_grpo, mmdit, ops, qwen_vl):
        for name, operation in vars(module).items():
            if hasattr(operation, "forms"):
                monkeypatch.setitem(operation.forms, DEVICE, getattr(fused, name, None))


def on_the_kernels(monkeypatch, run):
    """(results of run() on the plain forms, the same on the kernels)."""
    monkeypatch.setattr(ops, "FUSED", False)
    plain = run()
    take_the_kernels(monkeypatch)
    return plain, run()


def lively(model):
    torch.manual_seed(0)
    for p in model.parameters():
        p.data.copy_(torch.randn(p.shape) * (0.2 if p.dim() > 1 else 0.5) + (p.dim() == 1) * 0.3)
    return model.to(DEVICE)


def small_mmdit():
    """(model, inputs) with both kinds of blocks."""
    config = mmdit.MMDiTConfig(depth=2, heads=2, head_dim=8, dual_blocks=(0,), context_dim=12, pooled_dim=10, positions=4)
    model = lively(mmdit.MMDiT(config))
    model.pos_embed.normal_()
    return model, (tensor(2, 16, 4, 6), torch.tensor([300.0, 800.0], device=DEVICE), tensor(2, 5, 12), tensor(2, 10))


def small_qwen_vl():
    """(model, inputs) with a picture."""
    config = qwen_vl.QwenVLConfig(width=32, layers=2, heads=2, kv_heads=1, mlp=24, sections=(2, 3, 3), vocab=40,
                                  image_token=39, vision_width=16, vision_layers=2, vision_heads=2, vision_mlp=20,
                                  full_blocks=(1,))
    ids = torch.tensor([[1, 2, 39, 39, 39, 39, 3, 4]], device=DEVICE)
    pixels = tensor(16, 3 * config.frames * config.patch**2)
    return lively(qwen_vl.QwenVL(config)), (ids, pixels, torch.tensor([[1, 4, 4]]))


@pytest.mark.parametrize("make", [small_mmdit, small_qwen_vl])
def test_with_checkpointing_the_gradients_of_a_whole_model_on_the_kernels_are_the_same_bit_for_bit(monkeypatch, make):
    take_the_kernels(monkeypatch)
    model, inputs = make()
    gradients = []
    for model.checkpointing in (False, True):
        loss = model(*inputs).square().mean()
        gradients.append(torch.autograd.grad(loss, list(model.parameters()), allow_unused=True))
    kept, recomputed = gradients
    assert sum(g is not None for g in kept) > 30
    for ours, theirs in zip(kept, recomputed, strict=True):
        assert (ours is None and theirs is None) or torch.equal(ours, theirs)


def test_an_mmdit_and_its_gradients_are_the_same_on_the_kernels(monkeypatch):
    model, inputs = small_mmdit()

    def run():
        out = model(*inputs)
        return out.detach(), *torch.autograd.grad(out.square().mean(), list(model.parameters()), allow_unused=True)

    for plain, ours in zip(*on_the_kernels(monkeypatch, run), strict=True):
        if plain is not None:
            torch.testing.assert_close(ours, plain, rtol=1e-3, atol=1e-4 * plain.abs().max().item())


def test_a_qwen_vl_with_a_picture_is_the_same_on_the_kernels(monkeypatch):
    model, inputs = small_qwen_vl()

    def run():
        logits = model(*inputs)
        trained = [model.model.layers[0].self_attn.qkv_proj.weight, model.visual.blocks[0].attn.qkv.weight]
        return logits.detach(), *torch.autograd.grad(logits.square().mean(), trained)

    for plain, ours in zip(*on_the_kernels(monkeypatch, run), strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-3, atol=1e-4 * plain.abs().max().item())


@pytest.mark.parametrize("trained", [(True, False), (True, True), (False, True)], ids=["hidden", "both", "head"])
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_token_log_probs_and_their_gradients_are_the_same_on_the_kernels(monkeypatch, trained, dtype, temperature):
    hidden, weight = (tensor(*shape, dtype=dtype).requires_grad_(on) for shape, on in zip([(5, 8), (50, 8)], trained))
    targets = torch.tensor([0, 49, 7, 16, 17], device=DEVICE)

    def run(form=log_probs.token_log_probs, hidden=hidden, weight=weight):
        out = form(hidden, weight, targets, temperature)
        leaves = [x for x in (hidden, weight) if x.requires_grad]
        return [out.detach(), *torch.autograd.grad((out * torch.arange(1.0, 6, device=DEVICE)).sum(), leaves)]

    exact = run(grpo.token_log_probs.plain, hidden.detach().double().requires_grad_(trained[0]),
                weight.detach().double().requires_grad_(trained[1]))
    monkeypatch.setattr(log_probs, "CHUNK", 17)
    in_torch = run()
    monkeypatch.setattr(ops, "FUSED", True)
    monkeypatch.setitem(log_probs.scan_tile.forms, DEVICE, fused.scan_tile)
    for wanted, plain, ours in zip(exact, in_torch, run(), strict=True):
        assert ours.dtype == plain.dtype
        torch.testing.assert_close(ours.double(), wanted, rtol=0, atol=2 * ERRORS[dtype] * float(wanted.abs().max()))


def test_a_trajectory_its_ratio_and_the_gradient_of_its_loss_are_the_same_on_the_kernels(monkeypatch):
    weight = tensor(4, 4).requires_grad_()
    latents, texts = tensor(2, 4, 6, 6), (tensor(4, 1), tensor(4, 1))

    def model(x, timestep, context, pooled):
        return torch.einsum("bchw,cd->bdhw", x, weight) * (1 + context[:, :, None, None] / 9)

    def run():
        with torch.no_grad():
            reference = torch.einsum("bchw,cd->bdhw", latents, weight.roll(1, 0))
        seeds = [torch.Generator().manual_seed(i) for i in range(2)]
        trajectory = flow_grpo.sample_sde(model, latents, *texts, flow_grpo.SDESettings(4, trained=range(3)), generator=seeds)
        out = [trajectory.latents]
        for k, kept in enumerate(trajectory.steps):
            step = flow_grpo.evaluate_step(model, trajectory, k, *texts, reference)
            assert torch.equal(step.log_prob, kept.log_prob)  # the ratio is exactly 1
            loss, metrics = flow_grpo.flow_grpo_loss(step.log_prob, kept.log_prob, tensor(2), step.kl)
            out += [step.mean.detach(), step.log_prob.detach(), step.kl.detach(), loss.detach(),
                    torch.autograd.grad(loss, weight)[0]]
        return out

    for plain, ours in zip(*on_the_kernels(monkeypatch, run), strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5)
