"""The side-by-side programs run at a tiny size and print their tables."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import kernels
from bench import judge_generate, mmdit_forward, mmdit_lora_step, sampling, timing


@pytest.fixture(autouse=True)
def rates(monkeypatch):
    """Measured on tensors that are as large as a cache demands, which takes seconds."""
    monkeypatch.setattr(timing, "matmul_rate", lambda: 1e11)
    monkeypatch.setattr(timing, "read_rate", lambda: 1e10)


def cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_judge_generate_compares_greedy_tokens_and_prints_a_table(capsys):
    size = "--width 64 --layers 2 --vocabulary 1000 --image 112 --text-tokens 30 --new-tokens 6 --group 2 --repeats 1"
    assert judge_generate.main([*size.split(), "--threads", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [cells(line) for line in lines[2:5]]
    for row, part in zip(rows, ("group of 2 answers", "prefill for 2 answers", "decode of 2 answers")):
        assert row[0].startswith(f"{part}, 6 tokens each, 112×112 pixels, 46 prompt tokens, ")
    assert all(float(number) > 0 for row in rows[:2] for number in row[2:5])
    assert rows[1][5].endswith("of the matmul rate") and rows[2][5].endswith("of memory bandwidth")
    assert lines[-1].startswith("Greedy tokens of the two are equal (6 of 6).")


def test_the_decode_is_what_is_left_of_each_pair_of_runs(tmp_path):
    judge_generate.write_model(tmp_path, 64, 2, 1000)
    model = judge_generate.qwen_vl.QwenVL.from_pretrained(tmp_path)
    prompt = judge_generate.make_prompt(model.config, 56, 30)
    args = SimpleNamespace(new_tokens=5, group=2, image=56)
    seconds = {("transformers", 1): [1.0, 2.0, 1.0], ("transformers", 5): [9.0, 8.0, 5.0],
               ("ours", 1): [0.5, 0.5, 0.5], ("ours", 5): [2.5, 2.5, 2.5]}
    rows, _ = judge_generate.make_rows(model, prompt, args, seconds)
    assert [(row.theirs, row.ours, row.ratio) for row in rows] == [(8.0, 2.5, 3.2), (1.0, 0.5, 2.0), (6.0, 2.0, 3.0)]
    read = 4 * sum(p.numel() for p in (*model.blocks.parameters(), model.head.weight))
    assert judge_generate.weight_bytes(model) == read
    assert float(rows[2].share.split()[0]) == pytest.approx(read * 4 / 2.0 / 1e10, abs=0.005)


@pytest.mark.parametrize("wrong", ["--width 100", "--image 100", "--new-tokens 1", "--group 0", "--vocabulary 50"])
def test_judge_generate_refuses_sizes_it_cannot_build(wrong, capsys):
    with pytest.raises(SystemExit):
        judge_generate.main(wrong.split())
    assert "must be" in capsys.readouterr().err


def test_mmdit_forward_compares_outputs_and_prints_a_table(capsys):
    assert mmdit_forward.main("--blocks 2 --heads 2 --latent 8 --text 5 --context 32 --repeats 1 --threads 1".split()) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "2 blocks of width 128, 64 px: 16 + 5 tokens, batch 2" in lines[2]
    rows = [cells(line) for line in lines[2:4]]
    assert all(row[0].startswith("MMDiT forward") and min(map(float, row[2:5])) > 0 for row in rows)
    assert "Greatest difference to diffusers" in lines[-1]


def test_mmdit_lora_step_compares_gradients_and_prints_a_table(capsys):
    size = "--blocks 2 --heads 2 --latent 8 --text 5 --context 32 --rank 2 --repeats 1 --threads 1"
    assert mmdit_lora_step.main(size.split()) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "2 blocks of width 128, 64 px: 16 + 5 tokens, batch 2, rank 2" in lines[2]
    row = cells(lines[2])
    assert all(float(number) > 0 for number in row[2:5]) and row[5].endswith("of the matmul rate")
    assert "Loss and gradient norm" in lines[-1]


@pytest.mark.parametrize("program", [mmdit_forward, mmdit_lora_step])
@pytest.mark.parametrize("wrong", ["--blocks 1", "--latent 7", "--batch 0"])
def test_the_mmdit_programs_refuse_sizes_they_cannot_build(program, wrong, capsys):
    with pytest.raises(SystemExit):
        program.main(wrong.split())
    assert "must be at least 1" in capsys.readouterr().err


def test_sampling_draws_the_same_pictures_and_prints_a_table(capsys):
    assert sampling.main("--steps 2 --pictures 2 --size 64 --repeats 1 --threads 1".split()) == 0
    lines = capsys.readouterr().out.splitlines()
    row = cells(lines[2])
    assert row[0].startswith("2 pictures of 64 px, 2 steps") and row[1].startswith("diffusers ")
    assert all(float(number) > 0 for number in row[2:5]) and row[5].endswith("of the matmul rate")
    assert "Greatest difference of a pixel" in lines[-1]
    with pytest.raises(SystemExit):
        sampling.main(["--size", "100"])
    assert "multiple of 16" in capsys.readouterr().err


def test_flop_are_counted_in_every_form_of_a_product_and_of_attention():
    layer, x, q = torch.nn.Linear(8, 16), torch.randn(2, 3, 8), torch.randn(1, 2, 5, 4, requires_grad=True)
    with torch.no_grad():
        assert timing.flop_of(lambda: layer(x)) == 2 * 6 * 8 * 16
        with kernels.all_laid_out(layer):
            assert timing.flop_of(lambda: layer(x)) == 2 * 6 * 8 * 16
    both = timing.flop_of(lambda: F.scaled_dot_product_attention(q, q, q).sum().backward())
    assert both == 3 * (2 * 2 * 2 * 5 * 5 * 4)  # q·kᵀ and times v in 2 heads; the backward pass has two for each


def test_a_row_says_whether_what_was_asked_is_reached():
    row = timing.row("work", "peer", [2.0, 3.0, 9.0], [1.0, 1.0, 2.0], share="0.95 of something", memory=0.7)
    assert (row.theirs, row.ours, row.ratio) == (3.0, 1.0, 3.0)
    for asked, answer in (("ratio ≥ 3", "yes"), ("ratio ≥ 3.1", "missed"), ("memory ≤ 0.7, share ≥ 0.9", "yes"),
                          ("ratio ≥ 1, memory ≤ 0.6", "missed"), ("share ≥ 0.96", "missed")):
        row.asked = asked
        assert timing.table([row]).endswith(f"| 3.00 | 0.95 of something | 0.7 | {asked}: {answer} |")
