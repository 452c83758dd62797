"""Operations against torch's own modules and the formulas written out, on fused and plain forms, and how a form is found."""

import importlib
import os
import shutil
import subprocess
import sys

import pytest
import torch
from torch import nn

import mmdit
import qwen_vl
from kernels import FORMS, linears
from parts import ops
from tests.launch import ROOT


@pytest.mark.parametrize("length, width", [(5, 7), (5, 64), (2**11, 64)])
def test_modulate_is_layer_norm_with_a_shift_and_scale_for_each_picture(length, width):
    x, shift, scale = torch.randn(3, length, width), torch.randn(3, width), torch.randn(3, width)
    normed = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)(x)
    expected = torch.stack([normed[i] * (1 + scale[i]) + shift[i] for i in range(3)])
    assert torch.allclose(mmdit.modulate(x, shift, scale), expected, atol=1e-5)


def test_gate_residual_gates_each_picture():
    x, branch, gate = torch.randn(2, 3, 4), torch.randn(2, 3, 4), torch.randn(2, 4)
    expected = torch.stack([x[i] + gate[i] * branch[i] for i in range(2)])
    assert torch.allclose(mmdit.gate_residual(x, branch, gate), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm_equals_torchs_and_takes_the_mean_in_float32(dtype):
    x, weight = (torch.randn(2, 3, 48) * 10).to(dtype), torch.randn(48).to(dtype)
    module = ops.RMSNorm(48, eps=1e-5)
    module.weight.data = weight
    reference = nn.functional.rms_norm(x.double(), (48,), weight.double(), 1e-5)
    ours = module(x)
    assert ours.dtype == dtype
    assert torch.allclose(ours.double(), reference, rtol=1e-5 if dtype == torch.float32 else 2e-2, atol=1e-5)


def test_split_qkv_unpacks_heads_and_normalises_queries_and_keys_only():
    B, L, H, E = 2, 5, 3, 4
    qkv, wq, wk = torch.randn(B, L, 3 * H * E), torch.randn(E), torch.randn(E)
    for weights in ((None, None), (wq, wk)):
        parts = ops.split_qkv(qkv, H, *weights)
        for j, (part, weight) in enumerate(zip(parts, (*weights, None))):
            for h in range(H):
                expected = qkv[:, :, (j * H + h) * E:(j * H + h + 1) * E]
                if weight is not None:
                    expected = ops.rms_norm(expected, weight)
                assert torch.equal(part[:, h], expected)


def test_joint_qkv_is_both_streams_one_behind_the_other():
    H, streams, norms = 3, [torch.randn(2, n, 36) for n in (5, 7)], [torch.randn(4) for _ in range(4)]
    for first, second in (((None, None), (None, None)), (norms[:2], norms[2:])):
        whole = mmdit.joint_qkv(*streams, H, first, second)
        parts = ops.split_qkv(streams[0], H, *first), ops.split_qkv(streams[1], H, *second)
        for joint, a, b in zip(whole, *parts, strict=True):
            assert torch.equal(joint[:, :, :5], a) and torch.equal(joint[:, :, 5:], b)


@pytest.mark.parametrize("causal, biased, scale", [(False, False, None), (True, False, None), (False, True, 1.0)])
def test_attention_is_softmax_of_scores_times_values_heads_joined(causal, biased, scale):
    q, k, v = torch.randn(3, 2, 4, 6, 8).unbind(0)  # each [B,H,L,E]
    bias = torch.randn(1, 4, 6, 6) if biased else None
    scores = q.double() @ k.double().transpose(-1, -2) * (8 ** -0.5 if scale is None else scale)
    if biased:
        scores = scores + bias
    if causal:
        scores = scores.masked_fill(torch.ones(6, 6).triu(1).bool(), float("-inf"))
    out = scores.softmax(-1) @ v.double()  # [B,H,L,E]
    expected = torch.cat(list(out.unbind(1)), dim=-1)
    assert torch.allclose(ops.attention(q, k, v, bias, causal, scale).double(), expected, atol=1e-5)


@pytest.mark.parametrize("shape", [(5, 3, 8), (2, 4, 3, 6)])
def test_rotate_turns_the_two_halves_of_a_head_as_complex_numbers(shape):
    x, angle = torch.randn(shape), torch.randn(*shape[:-2], 1, shape[-1] // 2)
    first, second = x.chunk(2, dim=-1)
    expected = torch.complex(first, second) * torch.polar(torch.ones_like(angle), angle)
    turned = qwen_vl.rotate(x, *(torch.cat([t, t], dim=-1) for t in (angle.cos(), angle.sin())))
    torch.testing.assert_close(turned, torch.cat([expected.real, expected.imag], dim=-1))
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))


def test_swiglu_gates_the_second_half_by_the_first():
    packed = torch.randn(3, 10)
    gate, up = packed[:, :5], packed[:, 5:]
    torch.testing.assert_close(qwen_vl.swiglu(packed), gate * torch.sigmoid(gate) * up)


@pytest.mark.parametrize("rows", [1, 3, 8, 40])
@pytest.mark.parametrize("biased", [False, True])
@torch.no_grad()
def test_a_layer_laid_out_in_blocks_gives_the_same_product(rows, biased):
    layer, x = nn.Linear(33, 70, bias=biased), torch.randn(rows, 33)
    product = linears.fast_linear(layer.weight, layer.bias)
    for own in (x, torch.randn(2, 1, 33), x[:1]):  # also for other numbers of rows than it was laid out for
        torch.testing.assert_close(product(own), layer(own), rtol=1e-5, atol=1e-5)
        expected = nn.functional.gelu(layer(own), approximate="tanh")
        torch.testing.assert_close(product(own, gelu=True), expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_layers_are_laid_out_within_the_context_only_also_when_it_breaks_off(monkeypatch):
    model, x, used = nn.Sequential(nn.Linear(8, 8), nn.ModuleList([nn.Linear(8, 8)])), torch.randn(2, 8), []
    plain = model[0](x)
    monkeypatch.setattr(linears, "fast_linear", lambda weight, *_: used.append(weight) or (lambda x: x + 1))
    with pytest.raises(KeyboardInterrupt), ops.fast_linears(model):
        assert torch.equal(model[0](x), x + 1) and torch.equal(model[1][0](x), x + 1)
        raise KeyboardInterrupt
    assert len(used) == 2 and torch.equal(model[0](x), plain) and "forward" not in vars(model[1][0])


@torch.no_grad()
def test_changed_weights_are_seen_by_the_next_context():
    layer, x = nn.Linear(8, 8), torch.randn(2, 8)
    for _ in range(2):
        layer.weight.normal_()
        expected = nn.functional.linear(x, layer.weight, layer.bias)
        with ops.fast_linears(layer):
            torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("P, n, K, G, L, t", [(1, 8, 2, 4, 30, 5), (3, 2, 1, 2, 7, 1), (2, 1, 2, 1, 1, 3)])
@pytest.mark.parametrize("masked", [False, True])
def test_rows_that_share_a_prompt_attend_as_if_each_had_its_own(P, n, K, G, L, t, masked):
    q, prompt, own = torch.randn(P * n, K * G, 8), torch.randn(2, P, K, L, 8), torch.randn(2, P * n, K, t, 8)
    hidden = (torch.rand(P, L + t) < 0.4) if masked else None
    if masked:
        hidden[:, -1] = False  # the new token itself
    whole = torch.cat([prompt.repeat_interleave(n, 1), own], dim=3).repeat_interleave(G, 2).double()  # [2,P·n,H,L+t,E]
    mask = None if hidden is None else ~hidden.repeat_interleave(n, 0)[:, None, None]
    expected = nn.functional.scaled_dot_product_attention(q[:, :, None].double(), *whole, attn_mask=mask)
    for dtype, error in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        out = qwen_vl.attend_shared(*(x.to(dtype) for x in (q, *prompt, *own)), hidden)
        assert out.dtype == dtype
        torch.testing.assert_close(out.double(), expected.flatten(1), rtol=error, atol=error)


def test_a_sharded_module_is_left_as_it_is():
    model = nn.Sequential(nn.Linear(4, 4))
    model[0].reshard = lambda: None  # as FSDP2 gives it
    with ops.fast_linears(model):
        assert "forward" not in vars(model[0])


def test_channels_last_changes_the_layout_and_nothing_else():
    x = torch.randn(2, 3, 4, 5)
    assert torch.equal(ops.channels_last(x), x)
    assert ops.channels_last(x).is_contiguous(memory_format=torch.channels_last) == ops.FUSED


# ---------------------------------------------------------------------------------------------------------------------
# How a faster form is found, and when it stands aside


@pytest.mark.parametrize("name", FORMS)
def test_every_form_was_written_for_the_definition_that_stands_in_its_file_and_takes_the_same_arguments(name):
    module, _, function = name.rpartition(".")
    plain = getattr(importlib.import_module(module), function).plain
    assert ops.definition(plain) == FORMS[name].definition, f"forms of {name} are for another definition: python -m kernels"


def test_a_definition_is_its_code_and_not_its_comments():
    def code(function):
        return ops.code_of(function, set())[1:]  # without "def" and the name

    assert code(first)[1:] == code(renamed_apart)[1:]
    assert ops.definition(first) != ops.definition(third)
    assert "FIVE=5" in code(first)  # a constant of a function that it calls


def first(x, y=2):
    """A docstring."""
    return x * y + helper(x)  # a comment


def helper(x):
    return x + FIVE


FIVE = 5


def third(x, y=2):
    return x * y - helper(x)


def renamed_apart(x, y=2):
    return x * y + helper(x)


def tree(tmp_path, *left_out):
    """A copy of the code without some folders; weights are linked."""
    shutil.copytree(ROOT, tmp_path / "tree", ignore=shutil.ignore_patterns(
        ".*", "__pycache__", "out", "weights", "cache", "bench", "docs", *left_out))
    (tmp_path / "tree" / "tiny" / "weights").symlink_to(ROOT / "tiny" / "weights")
    return tmp_path / "tree"


PROBE = """
import torch, mmdit
x, vector = torch.full((1, 2, 3), 2.0), torch.ones(1, 3)
print(mmdit.gate_residual(x, x, vector).flatten()[0].item())
"""


def probe(folder, **environment):
    done = subprocess.run([sys.executable, "-c", PROBE], cwd=folder, capture_output=True, text=True,
                          env={**os.environ, **environment})
    assert done.returncode == 0, done.stderr
    return float(done.stdout), done.stderr


def test_an_edited_plain_form_runs_and_one_line_says_so(tmp_path):
    folder = tree(tmp_path)
    assert probe(folder) == (4.0, "")
    text = (folder / "mmdit.py").read_text()
    whole = "    return x + gate[:, None] * branch\n"
    assert text.count(whole) == 1
    (folder / "mmdit.py").write_text(text.replace(whole, "    return x - gate[:, None] * branch  # edited\n"))
    value, said = probe(folder)
    assert value == 0.0 and said.count("\n") == 1 and "mmdit.gate_residual was edited: its plain form runs" in said
    assert probe(folder, KERNELS="plain") == (0.0, "")
    (folder / "mmdit.py").write_text(text.replace(whole, "    # A comment changes nothing.\n" + whole))
    assert probe(folder) == (4.0, "")


def test_an_edit_of_what_a_plain_form_calls_counts_too(tmp_path):
    folder = tree(tmp_path)
    text = (folder / "flow_grpo.py").read_text()
    script = "import flow_grpo; from parts import ops; print(ops.definition(flow_grpo.sde_draw))"

    def digest():
        return subprocess.run([sys.executable, "-c", script], cwd=folder, capture_output=True, text=True, check=True).stdout

    before = digest()
    assert "z.square()" in text
    (folder / "flow_grpo.py").write_text(text.replace("z.square()", "z.abs()"))
    assert digest() != before


def test_without_the_folder_of_kernels_pictures_are_drawn_and_judged(tmp_path):
    folder = tree(tmp_path, "kernels")
    assert not (folder / "kernels").exists()
    done = subprocess.run([sys.executable, "sample.py", "--v", "7", "--a", "3", "--sample-steps", "2", "--out", "run"],
                          cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(list((folder / "run").glob("round0_*.png"))) == 1
