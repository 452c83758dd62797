"""The counter of operators: views, places and temporaries; the forms that it runs in place of plain ones."""

import pytest
import torch
from torch.nn import functional as F

import grpo
import mmdit
from bench import counter
from parts import lora, ops


def test_the_counter_knows_views_places_and_temporaries():
    x = torch.zeros(256, 256)
    with counter.OperatorCounter("cpu") as counted:
        y = x + 1
        assert counted.live == counted.peak == x.nbytes and counted.traffic == 2 * x.nbytes and counted.launches == 1
        z = y.t()[3:]
        assert counted.live == x.nbytes and counted.traffic == 2 * x.nbytes and counted.launches == 1  # views
        y.add_(x)
        # in place: read twice, written once
        assert counted.live == x.nbytes and counted.traffic == 5 * x.nbytes and counted.launches == 2
        del y
        assert counted.live == x.nbytes  # the view holds it
        del z
        assert counted.live == 0 and counted.peak == x.nbytes and counted.flops == 0
        x @ x
    assert counted.flops == 2 * 256**3 and counted.live == 0 and counted.launches == 3


@pytest.mark.parametrize("checkpointing", [False, True])
def test_results_whose_shapes_are_known_are_counted_as_those_that_torch_makes(monkeypatch, checkpointing):
    with torch.device("meta"):
        model = mmdit.MMDiT(mmdit.MMDiTConfig(depth=3, heads=2, head_dim=8, dual_blocks=(0, 1), positions=16))
    model.checkpointing = checkpointing
    inputs = [torch.empty(shape, device="meta") for shape in ((2, 16, 4, 4), (2,), (2, 5, 4096), (2, 2048))]

    def counts():
        model.zero_grad()
        counted = counter.measure(lambda _: model(*inputs).square().mean().backward())
        return counted.flops, counted.traffic, counted.launches, counted.peak, counted.live

    monkeypatch.setattr(counter, "known_results", {})
    found = [counts(), counts()]
    assert sum(known is not None for known in counter.known_results.values()) > 30
    monkeypatch.setattr(counter, "on_meta", lambda operator, args, kwargs: operator(*args, **kwargs))
    assert found == [counts()] * 2


def test_rows_that_are_taken_or_written_are_not_the_whole_table():
    table, rows, index = torch.zeros(1000, 8), torch.zeros(3, 8), torch.tensor([4, 5, 6])
    with counter.OperatorCounter("cpu") as counted:
        F.embedding(index, table)
        assert counted.traffic == 2 * rows.nbytes
        table.index_copy_(0, index, rows)
    assert counted.traffic == 4 * rows.nbytes


def test_log_probabilities_hold_one_tile_of_the_logits_and_take_the_products_of_the_fused_form():
    N, D, V = 64, 32, 20_000
    hidden, head = (torch.empty(n, D, device="meta", requires_grad=True) for n in (N, V))
    targets = torch.empty(N, dtype=torch.long, device="meta")
    frozen = counter.measure(lambda _: grpo.token_log_probs(hidden.detach(), head.detach(), targets))
    assert frozen.flops == 2 * N * D * V and frozen.peak < N * V * 4 / 2  # never all logits at once
    trained = counter.measure(lambda _: grpo.token_log_probs(hidden, head, targets).sum().backward())
    assert trained.flops == 4 * 2 * N * D * V


def test_an_adapter_computes_in_the_type_of_its_model(monkeypatch):
    y, x = (torch.empty(7, n, dtype=torch.bfloat16, device="meta") for n in (12, 5))
    A, B = torch.empty(4, 5, device="meta"), [torch.empty(6, 2, device="meta") for _ in range(2)]
    fused = counter.measure(lambda _: lora.add_change(y, x, A, B, 1.0))
    assert fused.flops == 2 * 7 * (5 * 4 + 4 * 12)  # B of both projections on the diagonal of one matrix
    monkeypatch.setattr(ops, "FUSED", False)
    assert counter.measure(lambda _: lora.add_change(y, x, A, B, 1.0)).flops == 2 * 7 * (5 * 4 + 2 * 2 * 6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_logits_are_one_product_into_float32(dtype):
    N, D, V = 8, 32, 5000
    hidden, head = (torch.empty(n, D, dtype=dtype, device="meta") for n in (N, V))
    counted = counter.measure(lambda _: ops.logits(hidden, head))
    assert counted.traffic == hidden.nbytes + head.nbytes + N * V * 4
    assert counted.launches == 1 and counted.flops == 2 * N * D * V


def test_attention_is_that_of_a_gpu_which_keeps_no_weights():
    q = torch.empty(1, 2, 700, 8, dtype=torch.bfloat16, device="meta", requires_grad=True)
    attention = counter.measure(lambda _: F.scaled_dot_product_attention(q, q, q))
    assert attention.flops == 4 * 2 * 700 * 700 * 8 and attention.peak < 2 * 700 * 700 * 2 / 4
