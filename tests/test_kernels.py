"""Operations against torch's own modules and the formulas written out, on fused and plain forms."""

import pytest
import torch
from torch import nn

import mmdit
import qwen_vl
from kernels import linears
from parts import ops


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


@pytest.mark.one_form
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


@pytest.mark.one_form
@torch.no_grad()
def test_layers_are_laid_out_within_the_context_only_also_when_it_breaks_off(monkeypatch):
    model, x, used = nn.Sequential(nn.Linear(8, 8), nn.ModuleList([nn.Linear(8, 8)])), torch.randn(2, 8), []
    plain = model[0](x)
    monkeypatch.setattr(linears, "fast_linear", lambda weight, *_: used.append(weight) or (lambda x: x + 1))
    with pytest.raises(KeyboardInterrupt), ops.fast_linears(model):
        assert torch.equal(model[0](x), x + 1) and torch.equal(model[1][0](x), x + 1)
        raise KeyboardInterrupt
    assert len(used) == 2 and torch.equal(model[0](x), plain) and "forward" not in vars(model[1][0])


@pytest.mark.one_form
@torch.no_grad()
def test_a_copy_is_kept_until_its_weights_change_or_are_gone(monkeypatch):
    layer, x = nn.Linear(8, 8).requires_grad_(False), torch.randn(2, 8)
    monkeypatch.setattr(linears, "COPIES", type(linears.COPIES)())

    def copy_after_use():
        with ops.fast_linears(layer):
            torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.weight, layer.bias))
        return linears.COPIES[layer.weight][1]

    first = copy_after_use()
    assert copy_after_use() is first
    layer.weight.normal_()  # in place, as an optimizer does
    second = copy_after_use()
    layer.weight.data = torch.randn(8, 8)  # another tensor, as `load_state_dict(assign=True)` and offloading do
    third = copy_after_use()
    assert first is not second is not third and copy_after_use() is third
    del layer.weight
    assert len(linears.COPIES) == 0


@pytest.mark.one_form
@pytest.mark.parametrize("fused", [None, True])
def test_a_step_of_the_optimizer_is_seen_by_the_next_context(fused):
    layer, x = nn.Linear(8, 8), torch.randn(2, 8)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, fused=fused)
    for _ in range(3):
        with ops.fast_linears(layer), torch.no_grad():
            torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.weight, layer.bias))
        layer(x).square().sum().backward()
        optimizer.step()


@pytest.mark.parametrize("P, n, K, G, L, t", [(1, 8, 2, 4, 30, 5), (3, 2, 1, 2, 7, 1), (2, 1, 2, 1, 1, 3)])
@pytest.mark.parametrize("masked", [False, True])
def test_rows_that_share_a_prompt_attend_as_if_each_had_its_own(P, n, K, G, L, t, masked):
    q, prompt, own = torch.randn(P * n, K * G, 8), torch.randn(2, P, K, L, 8), torch.randn(2, P * n, K, t, 8)
    hidden = torch.rand(P, L + t) < (0.4 if masked else 0)
    hidden[:, -1] = False  # the new token itself
    whole = torch.cat([prompt.repeat_interleave(n, 1), own], dim=3).repeat_interleave(G, 2).double()  # [2,P·n,H,L+t,E]
    mask = ~hidden.repeat_interleave(n, 0)[:, None, None]
    expected = nn.functional.scaled_dot_product_attention(q[:, :, None].double(), *whole, attn_mask=mask)
    for dtype, error in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        out = qwen_vl.attend_shared(*(x.to(dtype) for x in (q, *prompt, *own)), hidden)
        assert out.dtype == dtype
        torch.testing.assert_close(out.double(), expected.flatten(1), rtol=error, atol=error)


@pytest.mark.one_form
def test_a_sharded_module_is_left_as_it_is():
    model = nn.Sequential(nn.Linear(4, 4))
    model[0].reshard = lambda: None  # as FSDP2 gives it
    with ops.fast_linears(model):
        assert "forward" not in vars(model[0])


def test_channels_last_changes_the_layout_and_nothing_else(forms):
    x = torch.randn(2, 3, 4, 5)
    assert torch.equal(ops.channels_last(x), x)
    assert ops.channels_last(x).is_contiguous(memory_format=torch.channels_last) == (forms == "fused")
