"""The plan: its counts against published ones, other counters, formulas and a real run; flags; bad input."""

import base64
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiktoken
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

import feedback
import flow_grpo
import mmdit
import qwen_vl
from bench import plan
from parts import chat, clip, lora, ops
from parts.pipeline import PAPER
from tests.launch import ROOT
from tests.test_mmdit import reference

SMALL = mmdit.MMDiTConfig(depth=3, heads=4, head_dim=16, dual_blocks=(0, 1), positions=16)
JUDGE = qwen_vl.QwenVLConfig(width=64, layers=2, heads=4, kv_heads=2, mlp=96, vocab=640, sections=(2, 3, 3), vision_width=64,
                             vision_layers=2, vision_heads=2, vision_mlp=96, full_blocks=(1,))
MATRICES = "update, forward and backward"


def parse(*flags):
    return plan.parse_args([str(flag) for flag in flags])


@pytest.fixture
def small(monkeypatch):
    """Function that gives the Plan of flags, with small models under the published names."""
    monkeypatch.setitem(plan.GENERATORS, PAPER, SMALL)
    monkeypatch.setitem(plan.JUDGES, "Qwen/Qwen2.5-VL-7B-Instruct", JUDGE)
    monkeypatch.setitem(plan.SCORERS, "yuvalkirstain/PickScore_v1", (
        clip.TextConfig(64, 2, 2, 128), clip.VisionConfig(64, 2, 2, 128)))
    for name, projection in (("CLIP_L_TEXT", 768), ("BIG_G_TEXT", 1280)):
        monkeypatch.setattr(clip, name, clip.TextConfig(64, 1, 2, 128, projection_dim=projection))
    return lambda *flags: plan.Plan(parse("--no-t5", "--size", 128, *flags))


@pytest.fixture(scope="module")
def full():
    return plan.build(parse())


def frozen(model):
    return sum(p.numel() for p in model.parameters() if not p.requires_grad)


def test_full_size_parameters_are_the_published_ones(full):
    theirs = reference(mmdit.SD35_MEDIUM, "meta")
    assert frozen(full.mmdit) == sum(p.numel() for p in theirs.parameters()) == 2_243_171_520
    assert [frozen(m) for m in (full.vae, full.judge)] == [83_819_683, 8_292_166_656]
    assert [frozen(m) for m in full.encoders] == [123_650_304, 694_659_840, 4_762_310_656]
    rank, shapes = 32, {name: p.shape for name, p in theirs.named_parameters()}
    targets = [key for parts in full.mmdit.lora_targets().values() for key in parts]
    assert sum(p.numel() for p in full.trained) == sum(rank * sum(shapes[f"{key}.weight"]) for key in targets)


def test_flops_of_the_full_size_generator_are_those_of_its_matrices(full):
    N, L, D, c = 32 * 32, 77 + 256, 1536, mmdit.SD35_MEDIUM
    args, latents = parse(), torch.empty(1, 16, 64, 64, device="meta")

    def forward(_):
        with torch.no_grad(), lora.lora_disabled(full.mmdit):
            flow_grpo.guided_velocity(full.mmdit, latents, 0.5, *plan.texts_of(full, parse("--guidance", 1), 1), 1.0)
    counter = plan.measure(forward)
    both, last = c.depth - 1, 1  # blocks; the last one has no text MLP and no text output
    multiply_adds = (
        both * 12 * D * D * (N + L) + last * (12 * D * D * N + 3 * D * D * L)  # qkv 3, proj 1, mlp 8
        + len(c.dual_blocks) * (4 * D * D * N + 2 * N * N * D)  # the image's attention to itself
        + both * 2 * (N + L) ** 2 * D + last * 2 * N * (N + L) * D  # joint attention: scores and values
        + D * D * (both * 12 + last * 8 + len(c.dual_blocks) * 3 + 2)  # modulations, for one row
        + L * 4096 * D + N * 64 * D * 2 + (256 + 2048 + 2 * D) * D)  # context, patches in and out, timestep and pooled
    assert counter.flops == pytest.approx(2 * multiply_adds, rel=0.01)
    theirs = FlopCounterMode(display=False)
    with theirs:
        forward(None)
    assert counter.flops == theirs.get_total_flops()
    weights_and_more = plan.size_of(full.mmdit.parameters()) - plan.size_of(full.trained)
    assert weights_and_more < counter.traffic and args.guidance == 4.5


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 0.0005), (torch.bfloat16, 0.005)])
def test_activations_on_meta_are_what_autograd_keeps_in_a_real_run(small, dtype, tolerance, checkpointing, monkeypatch):
    """The same calls on the CPU, on the plain forms that the plan counts; every storage that autograd saves and that is no
    parameter or input, counted once.

    The tolerance is for what a CPU keeps otherwise: no seed of attention and, in bfloat16, statistics of half the size.
    """
    monkeypatch.setattr(ops, "FUSED", False)
    planned, n = small("--lora-rank", 4), 2
    if dtype == torch.float32:  # else as planned: bfloat16 around a float32 adapter
        planned.models.mmdit.float()
        planned.models.encoding = [t.float() for t in planned.models.encoding]
    meant = planned.update(n, checkpointing)[MATRICES][1]
    model = mmdit.MMDiT(SMALL).to(dtype)
    lora.add_lora(model, model.lora_targets(), 4, 64.0)
    model.checkpointing = checkpointing
    for p in [*model.parameters(), *model.buffers()]:
        p.data.normal_(std=0.1)
        p.grad = torch.zeros_like(p) if p.requires_grad else None
    texts = [torch.randn(t.shape).to(dtype) for t in plan.texts_of(planned.models, planned.args, n)]
    trajectory = flow_grpo.sample_sde(model, torch.randn(n, 16, 16, 16), *texts, flow_grpo.SDESettings())
    kept = trajectory.steps[3]
    mine = [*model.parameters(), *model.buffers(), kept.before, kept.after, kept.log_prob]
    own, saved = {t.untyped_storage()._cdata for t in mine}, {}

    def pack(t):
        if t.untyped_storage()._cdata not in own:
            saved[t.untyped_storage()._cdata] = t
        return t

    def forward():
        step = flow_grpo.evaluate_step(model, trajectory, 3, *texts, kept.before)
        return flow_grpo.flow_grpo_loss(step.log_prob, kept.log_prob, kept.log_prob, step.kl), step

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        (loss, _), step = forward()
    assert meant.kept == pytest.approx(plan.size_of(saved.values()) + step.terms[0].nbytes, rel=tolerance)
    with plan.OperatorCounter("cpu") as real:  # the peak: the same counter, over real tensors
        (loss, _), step = forward()
        loss.backward()
    assert meant.peak == pytest.approx(real.peak, rel=0.05)


def test_the_counter_knows_views_places_and_temporaries():
    x = torch.zeros(256, 256)
    with plan.OperatorCounter("cpu") as counter:
        y = x + 1
        assert counter.live == counter.peak == x.nbytes and counter.traffic == 2 * x.nbytes
        z = y.t()[3:]
        assert counter.live == x.nbytes and counter.traffic == 2 * x.nbytes  # views
        y.add_(x)
        assert counter.live == x.nbytes and counter.traffic == 5 * x.nbytes  # in place: read twice, written once
        del y
        assert counter.live == x.nbytes  # the view holds it
        del z
        assert counter.live == 0 and counter.peak == x.nbytes and counter.flops == 0
        x @ x
    assert counter.flops == 2 * 256**3 and counter.live == 0
    slow = max(2 * 256**3 / (67e12 * plan.ARITHMETIC), 3 * x.nbytes / (3.35e12 * plan.TRAFFIC))
    assert counter.seconds[plan.GPUS[0]] == pytest.approx(slow + 5 * x.nbytes / (3.35e12 * plan.TRAFFIC))


def test_checkpointing_keeps_less_and_computes_more(small):
    planned = small()
    plain, again = (planned.update(2, way)[MATRICES][1] for way in (False, True))
    assert again.kept < plain.kept / 3 and again.kept < again.peak < plain.peak
    assert 1.2 < again.flops / plain.flops < 1.5
    memory = planned.memory(64)
    encoders = next(size for name, size in memory.items() if name.startswith("text encoders"))
    assert memory["peak"] - memory["peak, encoders gone"] == encoders
    with_flag = small("--checkpointing").costs(64)
    assert with_flag["update, recomputation"][0] > 0 and "update, recomputation" not in planned.costs(64)


def test_twice_the_gpus_halve_the_work_of_each(small):
    planned = small()
    one, two, all_of_them = (planned.costs(gpus) for gpus in (1, 2, 128))
    assert one["a step"][0] == 2 * two["a step"][0] > 0
    assert one["sampling"][2] == pytest.approx(2 * two["sampling"][2])
    adapter = plan.size_of(planned.models.trained)
    assert [row["all-reduce"][1] for row in (one, two)] == [0, adapter]
    assert all_of_them["all-reduce"][2] == pytest.approx(2 * 127 / 128 * adapter / (plan.NETWORK * plan.TRAFFIC))


def test_the_settings_are_respected(small):
    base = small().costs(8)
    assert small("--sde-steps", 20, "--window", 10).costs(8)["sampling"][0] == 2 * base["sampling"][0]
    assert small("--window", 2).costs(8)[MATRICES][0] == base[MATRICES][0] / 5
    guided = small("--window", 2, "--guided-pictures", 4).costs(8)["sampling"][0]  # half of two kept steps once more
    assert guided == pytest.approx(base["sampling"][0] * 11 / 10)
    assert "update, reference" not in small("--beta", 0).costs(8)
    assert small("--guidance", 1).costs(8)["sampling"][0] == pytest.approx(base["sampling"][0] / 2)
    assert small("--group", 16).costs(8)["VAE decoder"][0] == 2 * base["VAE decoder"][0]
    assert not any("judge" in name for name in small("--judge", "none").costs(8))
    assert "text encoders, first epoch" not in small("--encoders", "leave").costs(8)
    odd = small("--micro", 3)  # 16 pictures as 5 × 3 + 1
    assert odd.costs(8)["VAE decoder"][0] == pytest.approx(base["VAE decoder"][0])
    assert odd.memory(8)["kept for backward: update"] < small().memory(8)["kept for backward: update"]
    adapters = [plan.size_of(small("--lora-rank", rank).models.trained) for rank in (8, 16)]
    assert adapters[1] == 2 * adapters[0]


def test_a_token_of_the_judge_reads_all_its_weights_and_the_cache(full):
    args, judge = parse(), full.judge
    first, token = plan.judge_counters(judge, args, 8)
    read = plan.size_of([*judge.model.layers.parameters(), *judge.model.norm.parameters(), judge.head_weight])
    cache, tokens, grid = plan.judge_cache(judge, args, 8)
    assert grid == (1, 36, 36) and tokens == plan.QUESTION + 18 * 18
    past = plan.size_of([cache.prompts, cache.own]) * (tokens + plan.ANSWER // 2) / (tokens + feedback.ANSWER_LIMIT)
    assert read + past < token.traffic < 1.05 * (read + past)
    assert token.seconds[plan.GPUS[0]] == pytest.approx(token.traffic / (3.35e12 * plan.TRAFFIC))
    assert first.flops == pytest.approx(2 * 8 * (
        frozen(judge.model.layers) * tokens + frozen(judge.visual.blocks) * 36 * 36 + frozen(judge.lm_head)), rel=0.08)


def test_the_judges_question_has_as_many_tokens_as_qwens_tokenizer_makes_of_it():
    folder = Path(importlib.util.find_spec("dashscope").submodule_search_locations[0])
    lines = (folder / "resources" / "qwen.tiktoken").read_bytes().splitlines()
    ranks = {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, lines)}
    special = {token: len(ranks) + i for i, token in enumerate(chat.SPECIAL)}
    tokenizer = tiktoken.Encoding("qwen", pat_str=chat.WORDS, mergeable_ranks=ranks, special_tokens=special)
    text = chat.chat_text(feedback.ask("regression", Image.new("RGB", (8, 8))))
    assert len(tokenizer.encode(text, allowed_special="all")) - 1 == plan.QUESTION


def test_the_program_prints_the_plan_without_network_weights_or_data(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "bench.plan", *"--preset paper --gpus 64".split()], cwd=tmp_path, capture_output=True,
        text=True, env={**os.environ, "HF_HUB_OFFLINE": "1", "HOME": str(tmp_path), "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0 and done.stderr == "", done.stderr
    rows = {cells[1]: cells[2:-1] for cells in ([c.strip() for c in line.split("|")] for line in done.stdout.splitlines())
            if len(cells) > 3}
    assert rows["generator, 2.24 B parameters"] == ["4.94"] and rows["fits with these settings (peak)"] == ["H100, H20"]
    peak, recomputed = (float(rows[name][0]) for name in ("peak", "peak, checkpointing"))
    assert float(rows["kept for backward: update"][0]) < peak and recomputed < peak - 5
    parts = [row for name, row in rows.items() if len(row) == 4 and name not in ("part", "a step", "---")]
    assert float(rows["a step"][2]) == pytest.approx(sum(float(row[2]) for row in parts if row[0]), rel=0.02)
    assert [path.name for path in tmp_path.rglob("*.json*")] == []


@pytest.mark.parametrize("flags, message", [
    (["--gpus", "3"], "--gpus 3: the 128 pictures"), (["--gpus", "0"], "--gpus: expected a whole number"),
    (["--group", "1"], "--group: expected"), (["--judge", "./mine"], "--judge: invalid choice: './mine'"),
    (["--preset", "tiny"], "--preset: invalid choice: 'tiny'"), (["--window", "11"], "--window 11: expected at most")])
def test_what_cannot_be_planned_is_one_line(capsys, flags, message):
    try:
        code = plan.main(flags)
    except SystemExit as stop:
        code = stop.code
    error = capsys.readouterr().err
    assert code == 2 and message in error and error.count("\n") == 1
