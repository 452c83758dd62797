"""`grpo.token_log_probs` in tiles against the plain form over all logits: values, gradients, memory."""

from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import grpo
from kernels import log_probs
from kernels.log_probs import token_log_probs

plain = grpo.token_log_probs.plain


@contextmanager
def tiles(chunk=None, rows=None):
    """Within this context tiles have so many vocabulary entries and tokens."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(log_probs, "CHUNK", chunk or log_probs.CHUNK)
        patch.setattr(log_probs, "ROWS", rows or log_probs.ROWS)
        yield


def inputs(N, D, V, dtype=torch.float64, scale=3.0, seed=0):
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(N, D, generator=g, dtype=torch.float64).mul(scale).to(dtype)
    weight = torch.randn(V, D, generator=g, dtype=torch.float64).mul(D ** -0.5).to(dtype)
    return hidden, weight, torch.randint(V, (N,), generator=g), torch.randn(N, generator=g, dtype=torch.float64).to(dtype)


def with_gradients(function, hidden, weight, upstream, trained):
    """function(hidden, weight) and the gradients of (hidden, weight) that are trained, None for the others."""
    hidden, weight = hidden.detach().requires_grad_(trained[0]), weight.detach().requires_grad_(trained[1])
    out = function(hidden, weight)
    out.backward(upstream.to(out.dtype))
    return out.detach(), hidden.grad, weight.grad


def both(hidden, weight, targets, upstream, trained=(True, True), chunk=None, temperature=1.0):
    """`with_gradients` of the tiled path and of the plain one."""
    with tiles(chunk):
        tiled = with_gradients(lambda h, w: token_log_probs(h, w, targets, temperature), hidden, weight, upstream, trained)
    return tiled, with_gradients(lambda h, w: plain(h, w, targets, temperature), hidden, weight, upstream, trained)


def relative(ours, reference):
    """Greatest difference, relative to the greatest entry of the reference; 0 if neither exists."""
    if ours is None and reference is None:
        return 0.0
    return ((ours.double() - reference.double()).abs().max() / reference.double().abs().max()).item()


TRAINED = [(True, False), (False, True), (True, True)]


@pytest.mark.parametrize("trained", TRAINED)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_values_and_gradients_equal_those_of_all_logits(dtype, tolerance, temperature, trained):
    ours, reference = both(*inputs(37, 48, 5003, dtype), trained, 512, temperature)
    assert ours[0].dtype == dtype
    for x, y in zip(ours, reference):
        assert relative(x, y) < tolerance


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_near_to_the_truth_as_the_plain_path(dtype):
    hidden, weight, targets, upstream = inputs(65, 64, 700, dtype, scale=1.0)
    _, truth = both(hidden.double(), weight.double(), targets, upstream.double())
    ours, theirs = both(hidden, weight, targets, upstream, chunk=128)
    assert ours[0].dtype == torch.float32 and ours[1].dtype == ours[2].dtype == dtype
    for x, y, z in zip(ours, theirs, truth):
        assert relative(x, z) < max(2 * relative(y, z), 4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("trained", TRAINED)
def test_gradients_pass_gradcheck(trained):
    hidden, weight, targets, _ = inputs(4, 3, 7)
    hidden.requires_grad_(trained[0])
    weight.requires_grad_(trained[1])
    with tiles(3):
        assert torch.autograd.gradcheck(lambda h, w: token_log_probs(h, w, targets, 0.8), (hidden, weight))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 12), st.integers(1, 40), st.integers(1, 5), st.integers(1, 45), st.sampled_from(TRAINED))
def test_every_tiling_gives_the_same(N, V, rows, chunk, trained):
    with tiles(rows=rows):
        ours, reference = both(*inputs(N, 3, V, seed=N + V), trained, chunk)
    for x, y in zip(ours, reference):
        assert (x is None and y is None) or torch.allclose(x, y, rtol=1e-10, atol=1e-12)


def test_extreme_logits_stay_finite():
    ours, reference = both(*inputs(20, 8, 300, torch.float32, scale=1e4), chunk=7)
    for x, y in zip(ours, reference):
        assert x.isfinite().all() and relative(x, y) < 1e-4


class LargestTensor(TorchDispatchMode):
    """Remembers how many elements the largest tensor had that any operation gave back."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else [out]:
            if isinstance(x, torch.Tensor):
                self.numel = max(self.numel, x.numel())
        return out


@pytest.mark.parametrize("trained", TRAINED)
def test_no_tensor_of_all_logits_is_ever_made(trained):
    N, D, V, chunk = 96, 8, 1000, 40
    hidden, weight, targets, upstream = inputs(N, D, V, torch.float32)
    with tiles(chunk), LargestTensor() as tiled:
        with_gradients(lambda h, w: token_log_probs(h, w, targets), hidden, weight, upstream, trained)
    with LargestTensor() as full:
        with_gradients(lambda h, w: plain(h, w, targets), hidden, weight, upstream, trained)
    assert full.numel == N * V
    assert tiled.numel == max(V * D, N * chunk)  # the weight or its gradient, and the tile


@pytest.mark.parametrize("trained, expected", [((True, False), 30 * 4), ((True, True), 2 * 30 * 4 + 500 * 4 + 2 * 30)])
def test_what_waits_for_the_backward_pass_is_small(trained, expected):
    hidden, weight, targets, _ = inputs(30, 4, 500)
    hidden.requires_grad_(trained[0])
    weight.requires_grad_(trained[1])
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x):
        token_log_probs(hidden, weight, targets)
    assert sum(saved) == expected


def test_without_gradients_the_values_are_the_same():
    hidden, weight, targets, _ = inputs(33, 16, 900, torch.float32)
    expected = token_log_probs(hidden, weight, targets)
    trained = hidden.clone().requires_grad_()
    assert torch.equal(token_log_probs(trained, weight, targets), expected)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            out = token_log_probs(trained, weight, targets)
        assert torch.equal(out, expected) and not out.requires_grad


@pytest.mark.parametrize("trained", TRAINED)
def test_no_tokens_give_no_values_and_zero_gradients(trained):
    (out, hidden_grad, weight_grad), _ = both(*inputs(0, 4, 9, torch.float32), trained)
    assert out.shape == (0,) and out.dtype == torch.float32
    assert hidden_grad is None or hidden_grad.shape == (0, 4)
    assert weight_grad is None or torch.equal(weight_grad, torch.zeros(9, 4))


def test_strided_inputs_give_the_same():
    hidden, weight, targets, upstream = inputs(20, 12, 50)
    transposed = hidden.t().contiguous().t(), weight.t().contiguous().t(), targets.int()
    stepped = hidden.repeat_interleave(2, 1)[:, ::2], weight.repeat_interleave(3, 0)[::3], targets.repeat_interleave(2)[::2]
    reference = both(hidden, weight, targets, upstream)[1]
    for h, w, t in (transposed, stepped):
        assert not h.is_contiguous() and not w.is_contiguous()
        with tiles(8):
            ours = with_gradients(lambda x, y, t=t: token_log_probs(x, y, t), h, w, upstream, (True, True))
        for x, y in zip(ours, reference):
            assert relative(x, y) < 1e-10


def test_a_tied_embedding_gets_both_its_gradients():
    _, weight, targets, upstream = inputs(15, 6, 30)
    tokens, grads = torch.arange(15), []
    for function in (token_log_probs, plain):
        table = torch.nn.Embedding(30, 6, dtype=torch.float64)
        table.weight.data = weight.clone()
        function(table(tokens).tanh(), table.weight, targets).backward(upstream)
        grads.append(table.weight.grad)
    assert relative(*grads) < 1e-10


def test_the_backward_pass_can_run_twice_when_the_graph_is_kept():
    hidden, weight, targets, upstream = inputs(9, 4, 20)
    hidden.requires_grad_()
    weight.requires_grad_()
    with tiles(6):
        out = token_log_probs(hidden, weight, targets)
        first = torch.autograd.grad(out, (hidden, weight), upstream, retain_graph=True)
        second = torch.autograd.grad(out, (hidden, weight), upstream)
    for x, y in zip(first, second):
        assert torch.equal(x, y)


@pytest.mark.parametrize("hidden, targets, match", [
    (torch.zeros(2, 3, 4), [0, 0], r"must be \[N,4\]"), (torch.zeros(3, 5), [0, 0, 0], r"\[3, 5\]"),
    (torch.zeros(3, 4).double(), [0, 0, 0], "float64"), (torch.zeros(3, 4), [0, 0], "3 integers"),
    (torch.zeros(3, 4), [0, -100, 1], r"0\.\.6"), (torch.zeros(3, 4), [0, 7, 1], r"0\.\.6")])
def test_inputs_that_do_not_fit_are_refused(hidden, targets, match):
    with pytest.raises(ValueError, match=match):
        token_log_probs(hidden, torch.zeros(7, 4), torch.tensor(targets))


def test_it_is_what_training_computes_by():
    hidden, weight, targets, _ = inputs(9, 4, 20, torch.float32)
    with tiles(6), LargestTensor() as largest:
        grpo.token_log_probs(hidden, weight, targets)
    assert largest.numel < 9 * 20
