"""The fused change of a LoRA layer against its plain form in float64, in the type of the model."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from kernels import lora_forms
from parts import lora

ERRORS = {torch.float32: 1e-5, torch.bfloat16: 2e-2}  # of the greatest value


def case(dtype, rows, rank=4, width=24):
    torch.manual_seed(0)
    x = torch.randn(2, 5, width).to(dtype)
    y = torch.randn(2, 5, sum(rows)).to(dtype)
    A = torch.randn(len(rows) * rank, width)
    B = [torch.randn(n, rank) for n in rows]
    return y, x, A, B


def results(form, y, x, A, B, remade=False):
    """Output and gradients of y, x, A and every B."""
    leaves = [t.detach().clone().requires_grad_() for t in (y, x, A, *B)]

    def run(y, x, A, *B):
        return form(y * 1, x, A, list(B), 0.7)  # the product is a new tensor, which may be changed in place

    out = checkpoint(run, *leaves, use_reentrant=False) if remade else run(*leaves)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream)]


@pytest.mark.parametrize("rows", [(16, 16, 16), (24,), (32, 8, 8)], ids=str)
@pytest.mark.parametrize("dtype", ERRORS)
@pytest.mark.parametrize("remade", [False, True], ids=["kept", "checkpointed"])
def test_output_and_gradients_equal_the_plain_form(rows, dtype, remade):
    tensors = case(dtype, rows)
    ours = results(lora_forms.add_change, *tensors, remade)
    wide = [t.double() for t in (*tensors[:3], *tensors[3])]
    exact = results(lora.add_change.plain, *wide[:3], wide[3:])
    for mine, wanted in zip(ours, exact, strict=True):
        bound = ERRORS[dtype] * float(wanted.abs().max())
        torch.testing.assert_close(mine.double(), wanted, rtol=0, atol=bound)
    assert [g.dtype for g in ours[:4]] == [dtype, dtype, dtype, torch.float32]


def test_narrow_copies_follow_their_masters_in_the_same_memory():
    y, x, A, B = case(torch.bfloat16, (16, 8))
    A, B = torch.nn.Parameter(A), [torch.nn.Parameter(b) for b in B]
    before = lora_forms.narrow_copies(A, B, 0.5, torch.bfloat16)
    assert lora_forms.narrow_copies(A, B, 0.5, torch.bfloat16)[0] is before[0]
    optimizer = torch.optim.AdamW([A, *B], lr=0.1)
    for p in (A, *B):
        p.grad = torch.ones_like(p)
    optimizer.step()
    after = lora_forms.narrow_copies(A, B, 0.5, torch.bfloat16)
    assert all(a.data_ptr() == b.data_ptr() for a, b in zip(before, after, strict=True))
    assert torch.equal(after[0], A.bfloat16())
    assert torch.equal(after[1], torch.block_diag(*B).mul(0.5).bfloat16())


def test_an_output_that_is_no_plain_matrix_is_left_to_the_plain_form():
    y, x, A, B = case(torch.float32, (16,))
    assert lora_forms.add_change(y.transpose(0, 1), x.transpose(0, 1), A, B, 1.0) is NotImplemented
