"""The side-by-side programs run at a tiny size and print their tables."""

import json
import os
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from bench import (
    first_picture,
    flow_grpo_step,
    judge_generate,
    memory,
    mmdit_forward,
    mmdit_lora_step,
    run,
    sampling,
    timing,
    token_log_probs,
)
from parts import ops


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)  # the programs set their own


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
    read = 4 * sum(p.numel() for p in (*model.model.layers.parameters(), model.head_weight))
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


LORA = "--blocks 2 --heads 2 --latent 8 --text 5 --context 32 --rank 2 --repeats 1 --threads 1".split()
FLOW = [*LORA, "--steps", "3"]


@pytest.mark.parametrize("program, size, work, compared", [
    (mmdit_lora_step, LORA, "2 blocks of width 128, 64 px: 16 + 5 tokens, batch 2, rank 2", "gradients "),
    (flow_grpo_step, FLOW, "64 px: 16 + 5 tokens, batch 4, 3 steps, guidance 4.5, rank 2", "of the gradient norm")])
def test_a_training_step_is_compared_and_its_table_printed(program, size, work, compared, capsys, monkeypatch):
    monkeypatch.setattr(memory, "in_fresh_process", lambda *_: 10.0)
    assert program.main(size) == 0
    lines = capsys.readouterr().out.splitlines()
    assert work in lines[2] and compared in lines[-1]
    row = cells(lines[2])
    assert all(float(number) > 0 for number in row[2:5]) and row[5].endswith("of the matmul rate")


@pytest.mark.parametrize("program", [mmdit_forward, mmdit_lora_step, flow_grpo_step])
@pytest.mark.parametrize("wrong", ["--blocks 1", "--latent 7", "--batch 0"])
def test_the_mmdit_programs_refuse_sizes_they_cannot_build(program, wrong, capsys):
    with pytest.raises(SystemExit):
        program.main(wrong.split())
    assert "must be at least 1" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["theirs", "ours"])
def test_a_step_prints_the_memory_of_one_alone(name, capsys):
    for program, size in ((flow_grpo_step, FLOW), (mmdit_lora_step, LORA)):
        assert program.main([*size, "--memory-of", name]) == 0
        assert 0 <= float(capsys.readouterr().out) < 2000


def test_the_peak_of_a_step_is_what_it_held_at_most():
    assert memory.peak(lambda: bytearray(os.urandom(64 * 2**20)), times=3) > 60
    assert 0 <= memory.peak(lambda: None) < 5


def test_flow_grpo_step_says_when_the_two_differ(capsys, monkeypatch):
    monkeypatch.setattr(memory, "in_fresh_process", lambda *_: 1.0)
    monkeypatch.setattr(flow_grpo_step, "ADVANTAGE_CLIP", 0.1)  # which only the peer reads here
    assert flow_grpo_step.main(FLOW) == 1
    assert "cannot be compared" in capsys.readouterr().err


SMALL = "--rows 48 --width 32 --vocabulary 500 --completions 4 --repeats 1 --threads 1 --no-compile".split()


def test_token_log_probs_compares_all_paths_and_prints_a_table(capsys, monkeypatch):
    monkeypatch.setattr(memory, "in_fresh_process", lambda *_: 10.0)
    assert token_log_probs.main(SMALL) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [[cell.strip() for cell in line.split("|")] for line in lines[2:10]]
    assert all("N 48 in 4 completions, D 32, V 500" in row[1] and float(row[7]) == 1 for row in rows)
    assert rows[3][1].startswith("GRPO loss, head frozen") and rows[4][1].startswith("log-probabilities, head trained")
    assert [row[2].split()[0] for row in rows] == ["torch", "trl", "trl", "liger"] * 2
    assert "Results and gradients differ" in lines[-1]


def test_token_log_probs_measures_memory_in_a_fresh_process():
    size = "--rows 512 --width 8 --vocabulary 8000 --threads 1".split()
    path = next(iter(token_log_probs.WORKS["log-probabilities"]))
    used = memory.in_fresh_process(token_log_probs.__file__, size, "log-probabilities", "head frozen", path)
    assert 2 * 512 * 8000 * 4 <= used * 2**20 <= 5 * 512 * 8000 * 4  # logits and log-probabilities, then their gradients


def test_token_log_probs_says_when_a_path_differs(capsys, monkeypatch):
    monkeypatch.setattr(memory, "in_fresh_process", lambda *_: 10.0)
    monkeypatch.setattr(token_log_probs, "our_log_probs", lambda c: 1.001 * token_log_probs.all_logits(c))
    assert token_log_probs.main(SMALL) == 1  # the loss calls it by its name
    assert "cannot be compared" in capsys.readouterr().err


@pytest.mark.parametrize(("wrong", "said"), [("--rows 0", "at least 1"), ("--rows 30 --completions 8", "a multiple of")])
def test_token_log_probs_refuses_sizes_it_cannot_build(wrong, said, capsys):
    with pytest.raises(SystemExit):
        token_log_probs.main(wrong.split())
    assert said in capsys.readouterr().err


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


def test_first_picture_splits_the_seconds_of_ours_beside_diffusers(capsys):
    assert first_picture.main("--steps 1 --size 64 --repeats 1 --threads 1".split()) == 0
    lines = capsys.readouterr().out.splitlines()
    assert cells(lines[2])[0].startswith("from the command to one picture of 64 px, 1 steps")
    parts = dict(part.split()[:2] for part in lines[-1].removeprefix("Ours: ").split(", "))
    assert list(parts) == list(first_picture.PARTS) and all(float(seconds) > 0 for seconds in parts.values())


@pytest.mark.parametrize("wrong", ["--steps 0", "--size 100", "--size 256"])
def test_first_picture_refuses_sizes_it_cannot_draw(wrong, capsys):
    with pytest.raises(SystemExit):
        first_picture.main(wrong.split())
    assert "must be at least 1" in capsys.readouterr().err


def test_flop_are_counted_in_every_form_of_a_product_and_of_attention():
    layer, x, q = torch.nn.Linear(8, 16), torch.randn(2, 3, 8), torch.randn(1, 2, 5, 4, requires_grad=True)
    with torch.no_grad():
        assert timing.flop_of(lambda: layer(x)) == 2 * 6 * 8 * 16
        with ops.fast_linears(layer):
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


@pytest.mark.parametrize("program", [mmdit_forward, mmdit_lora_step, judge_generate, token_log_probs, flow_grpo_step])
def test_a_profile_names_the_operators_that_take_the_time(program, capsys):
    name = program.__name__.removeprefix("bench.")
    assert program.main([*run.QUICK[name].split(), "--threads", "1", "--profile"]) == 0
    header, _, *rows = capsys.readouterr().out.splitlines()
    assert header.startswith("| operator") and 5 < len(rows) <= 12
    assert any(cells(row)[0].startswith(("aten::addmm", "mkldnn::_linear_pointwise")) for row in rows)
    seconds = [float(cells(row)[2]) for row in rows]
    assert seconds == sorted(seconds, reverse=True)


def test_run_prints_one_table_and_writes_what_it_holds(tmp_path, capfd):
    out = tmp_path / "new" / "bench.json"
    assert run.main(["--quick", "--only", "mmdit_forward", "--threads", "1", "--out", str(out)]) == 0
    printed = capfd.readouterr().out
    lines = printed.splitlines()
    assert "1 of " in lines[0] and "100 GFLOP/s in large matrix products, 10.0 GB/s" in lines[0]
    assert "These times mean nothing" in printed and "mmdit_forward: " in printed and "Missed" not in printed
    rows = [cells(line)[0] for line in lines[lines.index("| --- " * 8 + "|") + 1:][:2]]
    assert [row.split(",")[0] for row in rows] == ["MMDiT forward", "MMDiT forward"]
    record = json.loads(out.read_text())
    assert [row["work"] for work in record["works"] for row in work["rows"]] == rows
    assert record["works"][0]["command"].startswith("python -m bench.mmdit_forward --blocks 2 ")
    assert min(work["seconds"] for work in record["works"]) > 0 and record["versions"]["torch"] == torch.__version__
    assert [path.name for path in out.parent.iterdir()] == ["bench.json"]


GROWS = '''
import json, sys
size = int(sys.argv[sys.argv.index("--size") + 1]) if "--size" in sys.argv else 2
row = {"work": f"work of size {size}", "peer": "peer 1.0", "theirs": size, "ours": 0.5, "ratio": 2.0 * size,
       "share": "0.5 of all", "memory": 0.25, "asked": "ratio ≥ 5, memory ≤ 0.9" if size == 2 else ""}
print("| operator |" if "--profile" in sys.argv else json.dumps({"rows": [row], "note": "A note."}))
'''


@pytest.fixture
def fakes(tmp_path, monkeypatch):
    """run.py with two programs: one whose sizes grow, one that fails."""
    (tmp_path / "grows.py").write_text(GROWS)
    (tmp_path / "fails.py").write_text("import sys\nprint('no such luck', file=sys.stderr)\nsys.exit(3)\n")
    (tmp_path / "talks.py").write_text("print('hello')\n")
    grows, fails, talks = (str(tmp_path / name) for name in ("grows", "fails", "talks"))
    monkeypatch.setattr(run, "STANDARD", {fails: "", talks: "", grows: ""})
    monkeypatch.setattr(run, "GROWTH", ((grows, "size", {2: "", 3: "--size 3", 40: "--size 40"}),))
    return grows


def test_a_program_that_fails_is_reported_and_the_others_go_on(fakes, tmp_path, capfd):
    assert run.main(["--no-growth", "--out", str(tmp_path / "bench.json")]) == 1
    out, err = capfd.readouterr()
    assert "| work of size 2 | peer 1.0 | 2 | 0.5 | 4.00 | 0.5 of all | 0.25 | ratio ≥ 5, memory ≤ 0.9: missed |" in out
    assert "fails --threads" in out and "exit status 3\nno such luck" in out and "no such luck" in err
    assert "talks --threads" in out and "not rows as JSON" in out and "hello" in out
    failed = [work["failed"] for work in json.loads((tmp_path / "bench.json").read_text())["works"]]
    assert failed[0] == "exit status 3\nno such luck" and failed[1] and not failed[2]


def test_what_grows_has_one_line_and_what_is_missed_a_profile(fakes, tmp_path, capfd):
    assert run.main(["--only", fakes, "--out", str(tmp_path / "bench.json")]) == 0
    out = capfd.readouterr().out
    assert "| work of size … | size | 2 · 3 · 40 | 2 · 3 · 40 | 0.5 · 0.5 · 0.5 | 4.00 · 6.00 · 80.00 |" \
           " 0.5 · 0.5 · 0.5 of all | 0.25 · 0.25 · 0.25 |" in out
    assert "Missed: work of size 2: ratio ≥ 5, memory ≤ 0.9 was asked, found ratio 4, memory 0.25." in out
    works = json.loads((tmp_path / "bench.json").read_text())["works"]
    assert len(works) == 3 and works[0]["profile"] == "| operator |"
    assert "--profile`:\n\n| operator |\n" in out and "A note." in out


@pytest.mark.parametrize("wrong, why", [("--only sampling,nothing", "expected some of mmdit_forward, mmdit_lora_step"),
                                        ("--threads 0", "at least 1"), ("--out /proc/none/bench.json", "cannot write"),
                                        ("--out /", "is a folder")])
def test_run_refuses_wrong_flags_before_it_measures(wrong, why, monkeypatch, capsys):
    monkeypatch.setattr(run, "machine", None)
    with pytest.raises(SystemExit):
        run.main(wrong.split())
    assert why in capsys.readouterr().err
