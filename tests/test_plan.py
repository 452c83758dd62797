"""The plans of both trainings: counts against published ones, other counters, formulas and real runs; flags; bad input."""

import base64
import importlib.util
import socket
from functools import partial
from pathlib import Path

import pytest
import tiktoken
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

import feedback
import flow_grpo
import grpo
import mmdit
import qwen_vl
from bench import counter, plan, step_parts
from bench.counter import size_of
from parts import chat, clip, lora, ops
from parts.cli import UserError
from parts.pipeline import PAPER
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
    return lambda *flags: plan.GeneratorPlan(parse("--no-t5", "--size", 128, *flags))


@pytest.fixture(scope="module")
def full():
    return step_parts.build(parse())


def frozen(model):
    return sum(p.numel() for p in model.parameters() if not p.requires_grad)


def test_full_size_parameters_are_the_published_ones(full):
    theirs = reference(mmdit.SD35_MEDIUM, "meta")
    assert frozen(full.mmdit) == sum(p.numel() for p in theirs.parameters()) == 2_243_171_520
    assert [frozen(m) for m in (full.vae, full.judge)] == [83_819_683, 8_292_166_656]
    assert [frozen(m) for m in full.encoders] == [123_650_304, 694_659_840, 4_762_310_656]
    rank, shapes = 32, {name: p.shape for name, p in theirs.named_parameters()}
    targets = [key for parts in full.mmdit.lora_targets().values() for key in parts]
    # q, k, v and the output of both streams in 24 blocks, but for the output of the last block's text, which is not written
    assert sum(p.numel() for p in full.trained) == (24 * 8 - 1) * rank * (1536 + 1536)
    assert sum(p.numel() for p in full.trained) == sum(rank * sum(shapes[f"{key}.weight"]) for key in targets)


def test_flops_of_the_full_size_generator_are_those_of_its_matrices(full):
    N, L, D, c = 32 * 32, 77 + 256, 1536, mmdit.SD35_MEDIUM
    args, latents = parse(), torch.empty(1, 16, 64, 64, device="meta")

    def forward(_):
        with torch.no_grad(), lora.lora_disabled(full.mmdit):
            flow_grpo.guided_velocity(full.mmdit, latents, 0.5, *step_parts.texts_of(full, parse("--guidance", 1), 1), 1.0)
    counted = counter.measure(forward)
    both, last = c.depth - 1, 1  # blocks; the last one has no text MLP and no text output
    multiply_adds = (
        both * 12 * D * D * (N + L) + last * (12 * D * D * N + 3 * D * D * L)  # qkv 3, proj 1, mlp 8
        + len(c.dual_blocks) * (4 * D * D * N + 2 * N * N * D)  # the image's attention to itself
        + both * 2 * (N + L) ** 2 * D + last * 2 * N * (N + L) * D  # joint attention: scores and values
        + D * D * (both * 12 + last * 8 + len(c.dual_blocks) * 3 + 2)  # modulations, for one row
        + L * 4096 * D + N * 64 * D * 2 + (256 + 2048 + 2 * D) * D)  # context, patches in and out, timestep and pooled
    assert counted.flops == pytest.approx(2 * multiply_adds, rel=0.01)
    theirs = FlopCounterMode(display=False)
    with theirs:
        forward(None)
    assert counted.flops == theirs.get_total_flops()
    weights_and_more = size_of(full.mmdit.parameters()) - size_of(full.trained)
    assert weights_and_more < counted.traffic and args.guidance == 4.5


@pytest.fixture(scope="module")
def adapter_counters(full):
    return step_parts.adapter_counters(full, parse(), 8)


def test_what_the_adapter_adds_to_a_forward_pass_is_its_products_and_little_more(adapter_counters):
    without, fused, plain = adapter_counters
    D, rank, rows = 1536, 32, 2 * 8
    expected = 0
    for tokens, layers in ((32 * 32, {"qkv": 24, "proj": 24}), (77 + 256, {"qkv": 24, "proj": 23})):
        for name, count in layers.items():
            projections = 3 if name == "qkv" else 1
            N, outputs, R = rows * tokens, projections * D, projections * rank
            low = N * D + R * D + N * R  # x and A are read, A·x is written
            change = N * R + outputs * R + 2 * N * outputs  # A·x and B are read, y is read and written
            expected += count * 2 * (low + change)
    more = fused.traffic - without.traffic
    assert expected <= more < 1.25 * expected < 30e9  # beyond it: inputs that must be made contiguous
    assert 2 * 95 <= fused.launches - without.launches < 3 * 95  # two products in each of 95 layers
    assert plain.traffic - without.traffic > 5 * more and plain.launches > fused.launches


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("halves", ["conditional", "both"])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 0.0005), (torch.bfloat16, 0.005)])
def test_activations_on_meta_are_what_autograd_keeps_in_a_real_run(
        small, dtype, tolerance, halves, checkpointing, monkeypatch):
    """The same calls on the CPU, on the plain forms that the plan counts; every storage that autograd saves and that is no
    parameter or input, counted once.

    The tolerance is for what a CPU keeps otherwise: no seed of attention and, in bfloat16, statistics of half the size.
    """
    monkeypatch.setattr(ops, "FUSED", False)
    planned, n = small("--lora-rank", 4, "--guidance-gradient", halves), 2
    if dtype == torch.float32:  # else as planned: bfloat16 around a float32 adapter
        planned.models.mmdit.float()
        planned.models.encoding = [t.float() for t in planned.models.encoding]
    meant = planned.update(n, checkpointing)[MATRICES].counter
    model = mmdit.MMDiT(SMALL).to(dtype)
    lora.add_lora(model, model.lora_targets(), 4, 64.0)
    model.checkpointing = checkpointing
    for p in [*model.parameters(), *model.buffers()]:
        p.data.normal_(std=0.1)
        p.grad = torch.zeros_like(p) if p.requires_grad else None
    texts = [torch.randn(t.shape).to(dtype) for t in step_parts.texts_of(planned.models, planned.args, n)]
    trajectory = flow_grpo.sample_sde(model, torch.randn(n, 16, 16, 16), *texts, step_parts.sde_settings(planned.args))
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
    assert meant.kept == pytest.approx(size_of(saved.values()) + step.terms[0].nbytes, rel=tolerance)
    with counter.OperatorCounter("cpu") as real:  # the peak: the same counter, over real tensors
        (loss, _), step = forward()
        loss.backward()
    assert meant.peak == pytest.approx(real.peak, rel=0.05)


def test_checkpointing_keeps_less_and_computes_more(small):
    planned = small()
    plain, again = (planned.update(2, way)[MATRICES].counter for way in (False, True))
    assert again.kept < plain.kept / 3 and again.kept < again.peak < plain.peak
    assert 1.2 < again.flops / plain.flops < 1.5
    memory = planned.memory(64)
    encoders = next(size for name, size in memory.items() if name.startswith("text encoders"))
    assert memory["peak"] - memory["peak, encoders gone"] == encoders
    with_flag = small("--checkpointing").costs(64)
    assert with_flag["update, recomputation"][0] > 0 and "update, recomputation" not in planned.costs(64)


def test_the_half_without_a_gradient_keeps_nothing_and_is_computed_once(small):
    one, both = (small("--guidance-gradient", halves) for halves in ("conditional", "both"))
    conditional, whole = (planned.update(4, False)[MATRICES].counter for planned in (one, both))
    forward = one.drawing(4)["sampling"].counter.flops  # of both halves
    assert forward == both.drawing(4)["sampling"].counter.flops
    # of the unconditional half the forward pass is left, half of one; of the conditional half all is, half of all
    assert conditional.flops == (forward + whole.flops) / 2
    assert conditional.kept == pytest.approx(whole.kept / 2, rel=0.02)
    alone = small("--guidance", 1).update(4, False)[MATRICES].counter
    assert conditional.flops == alone.flops + forward / 2 and conditional.kept == pytest.approx(alone.kept, rel=0.02)
    settings = step_parts.sde_settings(one.args)
    assert settings.detach and len(settings.stochastic) == 10 and list(settings.trained) == [*range(9)]


def test_all_pictures_are_drawn_then_read_at_once_then_scored(small):
    planned = small("--batch", 8)
    rows = planned.memory(1)  # of 64 pictures
    prompt = step_parts.judge_prompt(planned.models.judge, 128**2)
    cache = 2 * JUDGE.layers * JUDGE.kv_heads * JUDGE.head_dim * 2 * 64 * (len(prompt.ids) + feedback.ANSWER_LIMIT)
    assert rows["judge's cache, while it answers"] == cache
    # all their patches are there, in float32 and, for the first product, in bfloat16
    assert rows["activations: judge, prefill"] > 64 * prompt.pixels.nbytes * 1.5
    names = list(rows)
    held = sum(rows[name] for name in names[:names.index("judge's cache, while it answers")])
    busy = {name: size for name, size in rows.items() if name.startswith("activations") and "checkpointing" not in name}
    in_turn = {name: size + cache * name.startswith("activations: judge") for name, size in busy.items()}
    in_turn |= {"optimizer": planned.optimizer.peak, "encoder": planned.models.encoder.peak}
    assert rows["peak"] == held + max(in_turn.values()) and max(in_turn, key=in_turn.get) == "activations: judge, prefill"
    # twice as many pictures are read by a generation after the other, and scored at once
    twice = small("--batch", 16)
    more = twice.memory(1)
    assert more["judge's cache, while it answers"] == cache
    assert more["activations: judge, prefill"] == rows["activations: judge, prefill"]
    assert more["activations: PickScore"] == pytest.approx(2 * rows["activations: PickScore"], rel=0.01)
    once, again = (each.costs(1) for each in (planned, twice))
    for name in ("judge, prefill", "judge, recording", "judge, decode"):
        assert again[name] == pytest.approx(2 * once[name])
    # a process of few pictures reads them at once, too, whatever --micro is
    assert small("--batch", 8, "--micro", 3).costs(8)["judge, decode"] == pytest.approx(planned.costs(8)["judge, decode"])
    assert once["judge, recording"][2] == pytest.approx(2 * 0.038 * JUDGE.layers / 28)


def test_twice_the_gpus_halve_the_work_of_each(small):
    planned = small()
    one, two, all_of_them = (planned.costs(gpus) for gpus in (1, 2, 128))
    assert one["a step"][0] == 2 * two["a step"][0] > 0
    assert one["sampling"][2] == pytest.approx(2 * two["sampling"][2])
    adapter = size_of(planned.models.trained)
    assert [row["all-reduce"][1] for row in (one, two)] == [0, adapter]
    assert all_of_them["all-reduce"][2] == pytest.approx(2 * 127 / 128 * adapter / (plan.NETWORK * plan.LINKS))


def test_the_settings_are_respected(small):
    lean = partial(small, "--judge", "none", "--pickscore", "none")  # whose work the settings below do not change
    plain = lean()
    base = plain.costs(8)
    assert not any("judge" in name or "PickScore" in name for name in base)
    assert lean("--sde-steps", 20, "--window", 10).costs(8)["sampling"][0] == 2 * base["sampling"][0]
    assert lean("--window", 2).costs(8)[MATRICES][0] == pytest.approx(base[MATRICES][0] * 2 / 9)
    whole = lean("--skip-last", 0).costs(8)
    assert whole["sampling"][0] == base["sampling"][0]
    for name in (MATRICES, "update, reference"):
        assert whole[name] == pytest.approx(base[name] * 10 / 9)
    assert "update, reference" not in lean("--beta", 0).costs(8)
    assert lean("--guidance", 1).costs(8)["sampling"][0] == pytest.approx(base["sampling"][0] / 2)
    assert lean("--group", 16).costs(8)["VAE decoder"][0] == 2 * base["VAE decoder"][0]
    assert "text encoders" in base and "text encoders" not in lean("--encoders", "leave").costs(8)
    assert not any("judge" in name for name in lean("--judge", "none").costs(8))
    odd = lean("--micro", 3)  # 16 pictures as 5 × 3 + 1
    assert odd.costs(8)["VAE decoder"][0] == pytest.approx(base["VAE decoder"][0])
    assert odd.memory(8)["kept for backward: update"] < plain.memory(8)["kept for backward: update"]
    adapters = [size_of(lean("--lora-rank", rank).models.trained) for rank in (8, 16)]
    assert adapters[1] == 2 * adapters[0]


def test_seconds_follow_from_the_share_of_a_step_that_computes():
    x = torch.zeros(64, 64)
    with counter.OperatorCounter("cpu") as work:
        x @ x
    h100, h20, ours = plan.speeds(0.2)
    forward, backward = (plan.Part(3, work, kind) for kind in ("forward", "backward"))
    assert plan.seconds_of(forward, h100) == plan.seconds_of(backward, h100) == pytest.approx(work.flops / (0.2 * 989e12))
    # the same step takes an H20 longer by what its products take longer
    longer = work.flops / plan.PRODUCT * (1 / 148e12 - 1 / 989e12)
    assert plan.seconds_of(forward, h20) == pytest.approx(plan.seconds_of(forward, h100) + longer)
    assert plan.seconds_of(forward, ours) == pytest.approx(work.flops / (plan.FORWARD * 989e12))
    assert plan.seconds_of(backward, ours) == pytest.approx(work.flops / (plan.BACKWARD * 989e12))
    moving = plan.seconds_of(plan.Part(1, work, "memory"), h100)
    assert moving == pytest.approx(3 * x.nbytes / (3.35e12 * plan.TRAFFIC))
    assert plan.seconds_of(plan.Part(1, work, "memory", 0.038), h100) == 0.038
    assert plan.cost(forward, [h100])[:2].tolist() == [3 * work.flops, 9 * x.nbytes]


# ---------------------------------------------------------------------------------------------------------------------
# The judge


def parse_judge(*flags):
    return parse("--what", "judge", *flags)


@pytest.fixture
def small_judge(monkeypatch):
    """Function that gives the JudgePlan of flags, for a small judge under the published name."""
    monkeypatch.setitem(plan.JUDGES, "Qwen/Qwen2.5-VL-7B-Instruct", JUDGE)
    return lambda *flags: plan.JudgePlan(parse_judge("--max-pixels", 112 * 112, "--max-new-tokens", 20, "--answer", 12, *flags))


@pytest.fixture(scope="module")
def full_judge():
    return {way: plan.JudgePlan(parse_judge(*way)) for way in ((), ("--lora",))}


P_JUDGE = 8_292_166_656  # parameters of Qwen2.5-VL-7B


def test_float32_masters_are_shared_and_the_answers_need_a_whole_copy(full_judge):
    planned = full_judge[()]
    for gpus in (1, 8, 64):
        whole, training, kept = planned.gathered()
        rows = planned.memory(gpus)
        assert rows["8.29 B trained parameters in float32"] == rows["their gradients"] == 4 * P_JUDGE / gpus
        assert rows["AdamW's moments"] == 8 * P_JUDGE / gpus
        assert rows["reference in bfloat16"] == 2 * P_JUDGE / gpus
        assert rows["gathered weights, answers"] == whole == 2 * P_JUDGE
        # embedding and head of 152,064 × 3,584, and what lies between the towers
        assert kept == pytest.approx(2 * (2 * 152_064 * 3584 + 5120 * (5120 + 3584)), rel=0.01)
        block = 3584 * (3584 + 2 * 512) + 3584**2 + 3 * 3584 * 18_944
        assert training == pytest.approx(2 * kept + 6 * 2 * block, rel=0.01)
        held = 18 * P_JUDGE / gpus + kept
        # one at least of answers and update is the peak
        update = training + rows["activations: update, checkpointing"]
        answers = whole + rows["keys and values of the answers"] + rows["activations: prefill"]
        assert rows["peak, checkpointing"] >= held + max(update, answers) * (1 - 1e-9)
        questions = max(16, gpus) // gpus  # and 8 answers of 512 tokens to each; a token has 4 × 128 keys and as many values
        assert rows["keys and values of the answers"] == 28 * 4 * 128 * 2 * 2 * questions * (473 + 8 * 512)


def test_a_checkpoint_has_float32_weights_and_two_moments_and_the_export_is_bfloat16(full_judge):
    rows = full_judge[()].memory(8)
    assert rows["disk: a checkpoint"] == 12 * P_JUDGE  # 99.5 GB
    assert rows["disk: 2 checkpoints and one being written"] == 36 * P_JUDGE
    assert rows["disk: the exported judge"] == 2 * P_JUDGE
    assert rows["host memory of the first process, exporting"] == 4 * P_JUDGE


def test_an_adapter_leaves_the_judge_in_bfloat16(full_judge):
    rank, width, mlp, kv = 64, 3584, 18_944, 512
    sides = (width + width) + 2 * (width + kv) + (width + width) + 3 * (width + mlp)  # q; k, v; o; gate, up, down
    parameters = 28 * rank * sides
    for gpus in (1, 8):
        rows = full_judge["--lora",].memory(gpus)
        assert rows["0.16 B trained parameters in float32"] == 4 * parameters
        assert rows["the frozen judge in bfloat16"] == 2 * P_JUDGE
        assert rows["disk: a checkpoint"] == 12 * parameters
        assert rows["disk: the exported judge"] == 4 * parameters and rows["gathered weights, answers"] == 0


def judge_flops(C, **passes):
    """FLOP of passes over a question and 8 answers of C tokens at full size, of matrices and attention alone; passes: how
    often each of "text", "down" (of the text's MLPs), "attention", "vision", "vision_down" (of its MLPs), "windows" (the
    tower's attention), "merger", "patches" and "head" is computed; once, if nothing is said."""
    L, G, D, M = 473, 8, 3584, 18_944
    rows = G * (C - 1)  # the last token of an answer predicts nothing
    patches, E = 36 * 36, 1280
    windows = 16 * 64**2 + 8 * 32**2 + 16**2  # 18 × 18 merged tokens of 4 patches, in windows of 4 × 4
    merger = 2 * (patches // 4) * 4 * E * (4 * E + D)
    parts = {
        "text": 28 * 2 * (L + rows) * (D * (D + 2 * 512) + D * D + 2 * D * M), "down": 28 * 2 * (L + rows) * D * M,
        "attention": 28 * 4 * D * (L * L + rows * (L + C - 1)), "head": 2 * G * C * D * 152_064,
        "vision": 32 * 2 * patches * (4 * E * E + 2 * E * 3420), "vision_down": 32 * 2 * patches * E * 3420,
        "merger": merger, "patches": 2 * patches * 1176 * E,
        "windows": 4 * E * (4 * patches**2 + 28 * windows)}
    return sum(passes.get(name, 1) * flops for name, flops in parts.items())


def test_flops_of_the_full_size_judge_are_those_of_its_matrices(full_judge):
    whole, adapter = (full_judge[way].update(1, 150, False) for way in ((), ("--lora",)))
    for parts in (whole, adapter):
        assert parts["update, reference"].counter.flops == judge_flops(150)
    # Two more products for each of the forward pass, five for the two of attention. The patches need no gradient; the head's
    # logits are made once more for its own, and that of its input is formed in the forward pass.
    trained = judge_flops(150, text=3, down=3, attention=3.5, vision=3, vision_down=3, windows=3.5, merger=3, patches=2, head=4)
    assert whole[MATRICES].counter.flops == trained
    # frozen weights have no gradients, and the tower is passed forward only; the adapter adds a few products
    frozen = judge_flops(150, text=2, down=2, attention=3.5, head=2)
    assert frozen < adapter[MATRICES].counter.flops < 1.1 * frozen
    # of a block all is made again but its last product, whose output nobody needs
    again = full_judge[()].update(1, 150, True)[MATRICES].counter
    assert again.flops - trained == judge_flops(150, down=0, vision_down=0, merger=0, patches=0, head=0)
    assert again.kept < whole[MATRICES].counter.kept / 4


def test_a_step_of_the_decode_reads_the_weights_once_whatever_the_number_of_answers(full_judge):
    planned = full_judge["--lora",]
    policy = planned.models.policy
    frozen = [p for p in (*policy.model.layers.parameters(), policy.head_weight) if not p.requires_grad]
    read = size_of(frozen) + size_of(planned.models.copies)
    one, sixteen = (planned.answers(questions) for questions in (1, 16))
    for (parts, cache), others in ((one, 1.05), (sixteen, 1.6)):
        decode = parts["decode"]
        assert decode.times == 149 and decode.launches == 0
        assert read + cache < decode.counter.traffic < others * (read + cache)
    assert sixteen[0]["decode"].counter.flops == 16 * one[0]["decode"].counter.flops


def test_sharded_weights_decode_by_a_graph_and_are_sent_for_every_pass(full_judge):
    planned = full_judge[()]
    costs = planned.costs(8)
    assert costs["recording"][2] == pytest.approx(2 * 0.038)  # the host launches the kernels, to run and to record
    decode = planned.answers(2)[0]["decode"]
    assert costs["decode"][2] == pytest.approx(149 * decode.counter.traffic / (3.35e12 * plan.TRAFFIC))
    name = "gathering weights, summing gradients"
    # bfloat16 for the answers and, for each of two questions, for reference, forward and backward; gradients in float32
    sent = 7 / 8 * P_JUDGE * (2 + 2 * (3 * 2 + 4))
    assert costs[name][1] == pytest.approx(sent)
    assert costs[name][2] == pytest.approx(sent / (plan.NVLINK * plan.LINKS))
    assert planned.costs(64)[name][2] == pytest.approx(63 / 64 * P_JUDGE * 12 / (plan.NETWORK * plan.LINKS))


def test_the_judges_settings_are_respected(small_judge):
    planned = small_judge()
    assert [planned.steps(gpus) for gpus in (1, 16, 64)] == [9102, 9102, 2276]
    assert small_judge("--tasks", "class", "--epochs", 1).steps(8) == 911
    base = planned.costs(8)
    assert base["update, recomputation"][0] > 0
    assert "update, recomputation" not in small_judge("--no-checkpointing").costs(8)
    assert "update, reference" not in small_judge("--beta", 0).costs(8)
    assert small_judge("--beta", 0).memory(8).keys().isdisjoint({"reference in bfloat16", "its embedding and head, gathered"})
    assert small_judge("--batch", 32).costs(8)[MATRICES][0] == 2 * base[MATRICES][0]
    assert small_judge("--micro", 2).costs(8)[MATRICES][0] == pytest.approx(base[MATRICES][0])
    assert small_judge("--group", 16).costs(8)["decode"][0] == 2 * base["decode"][0]
    assert planned.costs(8)["optimizer"][2] == pytest.approx(2 * planned.costs(16)["optimizer"][2])
    slower = small_judge("--efficiency", 0.1).costs(8)
    assert slower[MATRICES][2] == pytest.approx(2 * base[MATRICES][2]) and slower[MATRICES][4] == base[MATRICES][4]
    # memory must do for the longest answer, time is for the assumed one
    longer = small_judge("--max-new-tokens", 40)
    assert longer.costs(8)[MATRICES][0] == base[MATRICES][0]
    assert longer.memory(8)["activations: update"] > planned.memory(8)["activations: update"]
    adapters = [small_judge("--lora", "--lora-rank", rank).costs(8)["all-reduce"][1] for rank in (4, 8)]
    assert adapters[1] == 2 * adapters[0] > 0


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("flags", [("--lora", "--lora-rank", 4), ()])
def test_the_judges_activations_on_meta_are_those_of_a_real_update(small_judge, flags, checkpointing, monkeypatch):
    """The same calls on the CPU, on the plain forms, in float32, by the same counter."""
    monkeypatch.setattr(ops, "FUSED", False)
    planned = small_judge(*flags)
    models = step_parts.build_judge(planned.args, torch.float32)
    meant = step_parts.judge_update_parts(models, planned.args, 2, 12, checkpointing)[MATRICES].counter
    model = qwen_vl.QwenVL(JUDGE).requires_grad_(True)
    if flags:
        lora.add_lora(model, model.lora_targets(), 4, 8.0)
    model.checkpointing = checkpointing
    for p in model.parameters():
        p.grad = torch.zeros_like(p) if p.requires_grad else None
    prompt = step_parts.judge_prompt(model, planned.args.max_pixels)
    prompt.ids[prompt.ids == JUDGE.image_token] = 639
    config = qwen_vl.QwenVLConfig(**{**vars(JUDGE), "image_token": 639})
    model.config = model.visual.config = config
    tokens = torch.zeros(2, 8, 12, dtype=torch.long)
    with counter.OperatorCounter("cpu") as real:
        hidden = model.completion_hidden([prompt] * 2, tokens)
        new = grpo.token_log_probs(hidden.flatten(0, 2), model.head_weight, tokens.flatten()).view(16, 12)
        loss, _ = grpo.grpo_loss(new, new.detach(), new.detach(), torch.ones(16), torch.ones(16, 12, dtype=torch.bool))
        real.kept = real.live
        loss.backward()
    assert meant.kept == pytest.approx(real.kept, rel=0.05)
    assert meant.peak == pytest.approx(real.peak, rel=0.05)


def test_the_program_prints_the_judges_plan(small_judge, capsys):
    small_judge()  # a small judge under the published name
    assert plan.main(["--what", "judge", "--max-pixels", "12544"]) == 0
    out = capsys.readouterr().out
    assert "| GPUs | 1 | 8 | 64 |" in out and "| 9,102 steps, hours |" in out and "| 2,276 steps, hours |" in out
    assert "NVlabs/finite-difference-flow-optimization" in out and "reaches 20% of an H100's FLOP/s" in out


def test_a_token_of_the_judge_reads_all_its_weights_and_the_cache(full):
    args, judge = parse(), full.judge
    prompts = [step_parts.judge_prompt(judge, args.size**2)] * 8
    parts, cache = step_parts.judging_parts(full, args, 8)
    first, token = (parts[f"judge, {name}"].counter for name in ("prefill", "decode"))
    read = size_of([*judge.model.layers.parameters(), *judge.model.norm.parameters(), judge.head_weight])
    tokens = len(prompts[0].ids)
    assert prompts[0].grids == ((1, 36, 36),) and tokens == step_parts.QUESTION + 18 * 18
    # a token has 4 × 128 keys and as many values in each of 28 layers, and a graph reads those that are to come, too
    assert cache == 8 * 28 * 2 * 4 * 128 * 2 * (tokens + feedback.ANSWER_LIMIT)
    assert read + cache < token.traffic < 1.05 * (read + cache)
    seconds = plan.seconds_of(parts["judge, decode"], plan.speeds(0.2)[0])  # nothing is launched
    assert seconds == pytest.approx(token.traffic / (3.35e12 * plan.TRAFFIC))
    assert first.flops == pytest.approx(2 * 8 * (
        frozen(judge.model.layers) * tokens + frozen(judge.visual.blocks) * 36 * 36 + frozen(judge.lm_head)), rel=0.08)


def test_the_judges_question_has_as_many_tokens_as_qwens_tokenizer_makes_of_it():
    folder = Path(importlib.util.find_spec("dashscope").submodule_search_locations[0])
    lines = (folder / "resources" / "qwen.tiktoken").read_bytes().splitlines()
    ranks = {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, lines)}
    special = {token: len(ranks) + i for i, token in enumerate(chat.SPECIAL)}
    tokenizer = tiktoken.Encoding("qwen", pat_str=chat.WORDS, mergeable_ranks=ranks, special_tokens=special)
    tokens = {}
    for task in feedback.TASKS:
        text = chat.chat_text(feedback.ask(task, Image.new("RGB", (8, 8))))
        tokens[task] = len(tokenizer.encode(text, allowed_special="all")) - 1
    assert tokens["regression"] == step_parts.QUESTION and tokens["regression"] - 25 < tokens["class"] < tokens["regression"]


def test_the_program_prints_the_plan_without_network_weights_or_data(full, adapter_counters, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(socket.socket, "connect", None)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(step_parts, "build", lambda args: full)  # the same settings: built and counted before
    monkeypatch.setattr(step_parts, "adapter_counters", lambda models, args, n: adapter_counters if n == 8 else None)
    assert plan.main("--preset paper --gpus 64".split()) == 0
    out, err = capsys.readouterr()
    assert err == ""
    rows = {cells[1]: cells[2:-1] for cells in ([c.strip() for c in line.split("|")] for line in out.splitlines())
            if len(cells) > 3}
    assert rows["generator, 2.24 B parameters"] == ["4.94"] and rows["fits with these settings (peak)"] == ["H100, H20"]
    assert "over 16 × 1,357 tokens" in out
    peak, recomputed = (float(rows[name][0]) for name in ("peak", "peak, checkpointing"))
    assert float(rows["kept for backward: update"][0]) < peak and recomputed < peak - 3
    parts = [row for name, row in rows.items() if len(row) == 5 and name not in ("part", "a step", "---")]
    parts = [row for row in parts if row[0].replace(".", "").isdigit()]
    assert float(rows["a step"][2]) == pytest.approx(sum(float(row[2]) for row in parts), rel=0.02)
    assert rows["radixark/miles_diffusion"][-2:] == ["37", "173"]
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("flags, message", [
    (["--preset", "fast", "--gpus", "64"], "--gpus 64: with --group-start shared a group lies on one of them"),
    (["--preset", "fast", "--micro", "6"], "--micro 6: with --group-start shared expected a multiple of --group 4"),
    (["--window-within", "4"], "--window-within 4: --window is 0"),
    (["--gpus", "3"], "--gpus 3: the 128 pictures"), (["--gpus", "0"], "--gpus: expected a whole number"),
    (["--group", "1"], "--group: expected"), (["--judge", "./mine"], "--judge: invalid choice: './mine'"),
    (["--preset", "tiny"], "--preset: invalid choice: 'tiny'"), (["--window", "10"], "--window 10: expected at most 9"),
    (["--skip-last", "10"], "--skip-last 10: expected at most 9"),
    (["--what", "painter"], "--what: invalid choice: 'painter'"), (["--efficiency", "0.9"], "--efficiency: expected"),
    (["--what", "judge", "--gpus", "3"], "--gpus 3: the 16 questions"),
    (["--what", "judge", "--answer", "600"], "--answer 600: expected at most --max-new-tokens 512"),
    (["--tasks", "class"], "unrecognized argument --tasks")])
def test_what_cannot_be_planned_is_one_line(capsys, flags, message):
    try:
        code = plan.main(flags)
    except SystemExit as stop:
        code = stop.code
    error = capsys.readouterr().err
    assert code == 2 and message in error and error.count("\n") == 1


def test_each_preset_plans_by_default_for_what_it_can_be_shared_by():
    assert parse().gpus == (1, 8, 64) and parse("--preset", "fast").gpus == (1, 8, 32)


def test_a_process_keeps_no_more_prompts_than_training_does(small):
    held = {name: small("--encoders", name).memory(1)["host memory of each process: encoded prompts"] for name in ("gpu", "leave")}
    prompts = small().args.steps * small().args.batch
    assert held["gpu"] / held["leave"] == pytest.approx(plan.PROMPTS_KEPT / min(plan.ROWS, prompts))


def test_the_fast_preset_trains_fewer_steps_of_the_sampler_and_draws_a_groups_beginning_once(small):
    fast = parse("--preset", "fast")
    assert (fast.steps, fast.group, fast.batch, fast.window) == (300, 4, 32, 4) and parse("--preset", "fast", "--steps", 9).steps == 9
    plans = {name: small("--gpus", 1, *flags) for name, flags in {
        "own": ("--window", 2, "--window-within", 6), "shared": ("--window", 2, "--window-within", 6, "--group-start", "shared"),
        "all": ("--group-start", "shared")}.items()}
    costs = {name: plan.costs(1) for name, plan in plans.items()}
    # of 10 steps the window begins after 2 on average, and those are drawn for one picture of 8
    assert costs["shared"]["sampling"][0] == pytest.approx(costs["own"]["sampling"][0] * (10 - 2 * 7 / 8) / 10)
    assert costs["shared"][MATRICES].tolist() == costs["own"][MATRICES].tolist()
    assert costs["all"]["sampling"].tolist() == costs["own"]["sampling"].tolist()


@pytest.mark.parametrize("flags, message", [
    (("--window-within", 10), "--window-within 10: expected at most 9"),
    (("--window", 4, "--window-within", 2), "--window 4: expected at most 2")])
def test_a_window_that_train_gen_would_refuse_is_not_planned(flags, message):
    with pytest.raises(UserError, match=message):
        plan.GeneratorPlan.check(parse(*flags))


def test_the_judges_training_has_no_fast_preset(capsys):
    with pytest.raises(SystemExit):
        parse("--what", "judge", "--preset", "fast")
    assert "--preset fast: only the generator's training has one" in capsys.readouterr().err


def test_hours_are_those_of_all_steps_and_gpu_hours_those_of_all_gpus(small):
    planned = small("--judge", "none", "--pickscore", "none")
    *_, hours, whole = plan.cost_rows(planned, 2)
    seconds = 1000 * planned.costs(2)["a step"][2:]
    assert hours == ["1,000 steps, hours", "", "", *(plan.figure(s / 3600) for s in seconds)]
    assert whole == ["GPU-hours of all", "", "", *(plan.figure(2 * s / 3600) for s in seconds)]
