"""The side-by-side programs run at a tiny size and print their tables."""

import pytest

from bench import judge_generate, mmdit_forward, mmdit_lora_step, sampling, timing


def test_judge_generate_compares_greedy_tokens_and_prints_a_table(capsys):
    size = "--width 64 --layers 2 --vocabulary 1000 --image 112 --text-tokens 30 --new-tokens 6 --group 2 --repeats 1"
    assert judge_generate.main([*size.split(), "--threads", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "112×112 pixels, 46 prompt tokens, 2 answers of 6 (torch " in lines[0] and "1 threads" in lines[0]
    rows = [line.strip("| ").split(" | ") for line in lines[2:5]]
    assert [row[0] for row in rows] == ["all", "prefill", "decode"]
    assert all(float(seconds) > 0 for row in rows[:2] for seconds in row[1:])
    assert lines[-1] == "Greedy tokens of the two are equal (6 of 6)."


@pytest.mark.parametrize("wrong", ["--width 100", "--image 100", "--new-tokens 1", "--group 0", "--vocabulary 50"])
def test_judge_generate_refuses_sizes_it_cannot_build(wrong, capsys):
    with pytest.raises(SystemExit):
        judge_generate.main(wrong.split())
    assert "must be" in capsys.readouterr().err


def test_mmdit_forward_compares_outputs_and_prints_a_table(capsys):
    assert mmdit_forward.main("--blocks 2 --heads 2 --latent 8 --text 5 --context 32 --repeats 1 --threads 1".split()) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "2 blocks of width 128, 64 px: 16 + 5 tokens, batch 2" in lines[2]
    rows = [[cell.strip() for cell in line.split("|")] for line in lines[2:4]]
    assert all(row[1].startswith("MMDiT forward") and min(map(float, row[3:6])) > 0 for row in rows)
    assert "Greatest difference to diffusers" in lines[-1]


def test_mmdit_lora_step_compares_gradients_and_prints_a_table(capsys):
    size = "--blocks 2 --heads 2 --latent 8 --text 5 --context 32 --rank 2 --repeats 1 --threads 1"
    assert mmdit_lora_step.main(size.split()) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "2 blocks of width 128, 64 px: 16 + 5 tokens, batch 2, rank 2" in lines[2]
    assert all(float(cell) > 0 for cell in lines[2].split("|")[3:6]) and "Loss and gradient norm" in lines[-1]


@pytest.mark.parametrize("program", [mmdit_forward, mmdit_lora_step])
@pytest.mark.parametrize("wrong", ["--blocks 1", "--latent 7", "--batch 0"])
def test_the_mmdit_programs_refuse_sizes_they_cannot_build(program, wrong, capsys):
    with pytest.raises(SystemExit):
        program.main(wrong.split())
    assert "must be at least 1" in capsys.readouterr().err


def test_sampling_draws_the_same_pictures_and_prints_a_table(capsys):
    assert sampling.main("--steps 2 --pictures 2 --size 64 --repeats 1 --threads 1".split()) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "2 pictures of 64 px, 2 steps" in lines[0]
    assert [line.split("|")[1].strip() for line in lines[2:4]] == ["diffusers", "ours"]
    with pytest.raises(SystemExit):
        sampling.main(["--size", "100"])
    assert "multiple of 16" in capsys.readouterr().err


def test_a_row_says_whether_what_was_asked_is_reached():
    row = timing.row("work", "peer", [2.0, 3.0, 9.0], [1.0, 1.0, 2.0], share="0.95 of something", memory=0.7)
    assert (row.theirs, row.ours, row.ratio) == (3.0, 1.0, 3.0)
    for asked, answer in (("ratio ≥ 3", "yes"), ("ratio ≥ 3.1", "missed"), ("memory ≤ 0.7, share ≥ 0.9", "yes"),
                          ("ratio ≥ 1, memory ≤ 0.6", "missed"), ("share ≥ 0.96", "missed")):
        row.asked = asked
        assert timing.table([row]).endswith(f"| 3.00 | 0.95 of something | 0.7 | {asked}: {answer} |")
