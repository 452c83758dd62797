"""Training the judge: the log, exact resume after a kill, two processes against one, adapters, bad input."""

import json
import shutil
import signal
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import data
import feedback
import grpo
import qwen_vl
import train_gen
import train_judge
from parts import chat, checkpoints, lora, sharding, weights
from parts import run as training
from parts.cli import UserError
from parts.files import read_records
from tests import launch
from tests.launch import finish, log_of, stop_inside, without_times
from tiny.dataset import write_tiny

SMALL = "--group 4 --batch 4 --micro 2 --eval-rows 4 --save-every 2 --max-new-tokens 80 --device cpu".split()


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dataset")
    write_tiny(folder, train=12, test=6, seed=9)
    (folder / "validation.jsonl").unlink()  # so that training is watched by the rows of --evaluate
    return folder


def flags(dataset, out, *more):
    return ["--data", str(dataset), "--out", str(out), *SMALL, *map(str, more)]


def start(*args, before=None):
    return launch.start("train_judge", *flags(*args), before=before)


@pytest.fixture(scope="module")
def unbroken(dataset, tmp_path_factory):
    out = tmp_path_factory.mktemp("unbroken") / "run"
    return out, launch.started("train_judge.py", dataset, out, *SMALL, "--steps", 5)


def test_a_run_leaves_log_curves_figures_and_a_judge(unbroken):
    out, output = unbroken
    log = log_of(out)
    assert [r["step"] for r in log] == list(range(6))
    for key in ("reward", "reward_format", "reward_va", "reward_class", "kl", "clip_fraction", "ratio", "length", "parses",
                "tokens_per_second", "memory_gib", "zero_spread", "reward_std", "grad_norm", "lr"):
        assert all(isinstance(r[key], (int, float)) or key in ("reward_va", "reward_class") for r in log[1:]), key
    assert Image.open(out / "curves.png").size[0] == 900
    assert "4 held-out pictures" in output and "| format | v error | a error | v floor | a floor | class accuracy |" in output
    judge = qwen_vl.QwenVL.from_pretrained(out / "judge")
    start_weights = qwen_vl.QwenVL.from_pretrained(train_judge.TINY)
    assert any(not torch.equal(p, q) for p, q in zip(judge.parameters(), start_weights.parameters()))


def test_before_an_update_the_ratio_is_exactly_one(unbroken):
    for record in log_of(unbroken[0])[1:]:
        assert record["ratio_max_deviation"] == 0 and record["ratio"] == 1
        # the cache and the padding of sampling round differently
        assert 0 < record["mismatch_mean"] < record["mismatch_max"] < 1e-4 and record["mismatch_share"] == 0


def same_end(out, unbroken):
    ours, theirs = (load_file(folder / "judge" / "model.safetensors") for folder in (out, unbroken))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    ours, theirs = (launch.checkpoint_of(folder / "checkpoint-00000005") for folder in (out, unbroken))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert without_times(log_of(out)) == without_times(log_of(unbroken))


def test_a_run_takes_as_much_of_the_disk_as_it_says(unbroken):
    out, output = unbroken
    state, args = launch.checkpoint_of(out / "checkpoint-00000005"), train_judge.parse_args([*SMALL, "--steps", "5"])
    parameters = weights.count_parameters(qwen_vl.QwenVL.from_pretrained(out / "judge"))
    parts = training.disk_parts(state, 2 * parameters, args, False)
    most = sum(count * size for count, size in parts.values())
    assert f"takes at most {training.in_bytes(most)} (3 checkpoints of" in output and launch.size_of(out) < most
    assert launch.size_of(out / "checkpoint-00000005") == pytest.approx(parts["checkpoints"][1], rel=0.02)
    assert launch.size_of(out / "judge") == pytest.approx(parts["export"][1], rel=0.02)


def test_what_the_papers_run_takes_of_the_disk_is_what_the_plan_counts():
    with torch.device("meta"):
        model = qwen_vl.QwenVL(qwen_vl.QWEN25_VL_7B)
    trained, args = list(model.parameters()), train_judge.parse_args(["--preset", "paper", "--steps", "9"])
    parts = training.disk_parts(checkpoints.state_of(torch.optim.AdamW(trained)), 2 * weights.count_parameters(model), args, False)
    assert parts["checkpoints"] == (3, pytest.approx(3 * 4 * 8_292_166_656, rel=0.001))
    assert parts["export"] == (1, 2 * 8_292_166_656)


def test_another_model_in_the_same_folder_is_noticed(dataset, unbroken, tmp_path, capsys):
    out = tmp_path / "run"
    shutil.copytree(unbroken[0], out, ignore=shutil.ignore_patterns("checkpoint-*"))
    settings = json.loads((out / "settings.json").read_text())
    (out / "settings.json").write_text(json.dumps(settings | {"files": {"model": "of another"}}))
    assert train_judge.main(["--data", str(dataset), "--out", str(out), *SMALL, "--steps", "5"]) == 2
    assert f"holds a run with other files of --model {train_judge.TINY}; put those back" in capsys.readouterr().err


def test_a_run_killed_inside_a_checkpoint_ends_with_the_same_weights(dataset, unbroken, tmp_path):
    finish(start(dataset, tmp_path, "--steps", 5, before=launch.kill_inside_second_checkpoint), -signal.SIGKILL)
    assert (tmp_path / "checkpoint-00000004.tmp").exists() and [r["step"] for r in log_of(tmp_path)] == [0, 1, 2, 3, 4]
    assert "goes on after step 2" in finish(start(dataset, tmp_path, "--steps", 5))
    same_end(tmp_path, unbroken[0])


def test_an_update_is_finished_a_rollout_and_an_evaluation_are_broken_off_and_nothing_is_lost(dataset, unbroken, tmp_path):
    long = ("--steps", 5, "--save-every", 1000)
    output = finish(start(dataset, tmp_path, *long, before=stop_inside(2, "train_judge.update", signal.SIGINT)), 130)
    assert "asked to stop: " in output and "stopped after step 2; the same command goes on from there" in output
    assert [r["step"] for r in log_of(tmp_path)] == [0, 1, 2] and (tmp_path / "checkpoint-00000002").exists()
    output = finish(start(dataset, tmp_path, *long, before=stop_inside(2, "train_judge.roll_out")), 143)
    assert "asked to stop: " in output and "stopped after step 3; " in output
    assert [r["step"] for r in log_of(tmp_path)] == [0, 1, 2, 3] and (tmp_path / "checkpoint-00000003").exists()
    output = finish(start(dataset, tmp_path, *long, before=stop_inside(1, "train_judge.evaluate")), 143)
    assert "stopped after step 5; " in output and not (tmp_path / "judge").exists()
    assert (tmp_path / "checkpoint-00000005").exists() and "eval_format" not in log_of(tmp_path)[-1]
    finish(start(dataset, tmp_path, *long))
    same_end(tmp_path, unbroken[0])


def test_a_run_of_one_process_goes_on_with_four(dataset, unbroken, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(unbroken[0], out)
    shutil.rmtree(out / "checkpoint-00000005")
    assert "goes on after step 4" in launch.together(4, "train_judge", *flags(dataset, out, "--steps", 5))
    for a, b in zip(log_of(unbroken[0]), log_of(out), strict=True):
        for key in ("reward", "length", "kl", "grad_norm", "lr"):
            assert a["step"] == 0 or a[key] == pytest.approx(b[key], abs=1e-5, rel=1e-5), (a["step"], key)
    ours, theirs = (launch.checkpoint_of(folder / "checkpoint-00000005") for folder in (out, unbroken[0]))
    assert ours.keys() == theirs.keys() and len(list((out / "checkpoint-00000005").glob("*.distcp"))) == 4
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], atol=1e-6, rtol=0)


def same_curve(one, two, name):
    """The logs and the results of one process and of two."""
    for a, b in zip(log_of(one), log_of(two), strict=True):
        for key in ("loss", "reward", "reward_format", "reward_va", "reward_class", "kl", "length", "grad_norm", "lr"):
            if a.get(key) is None:
                assert b.get(key) is None
            else:
                assert a[key] == pytest.approx(b[key], abs=1e-4, rel=1e-4), (a["step"], key)
    ours, theirs = load_file(one / name), load_file(two / name)
    for key in theirs:
        torch.testing.assert_close(ours[key].float(), theirs[key].float(), atol=2e-2, rtol=2e-2)  # one is in bfloat16


def test_two_processes_give_the_curve_of_one(dataset, unbroken, tmp_path):
    launch.together(2, "train_judge", *flags(dataset, tmp_path, "--steps", 5))
    same_curve(unbroken[0], tmp_path, "judge/model.safetensors")


def test_an_adapter_is_trained_by_two_processes_as_by_one_and_read_as_a_judge(dataset, tmp_path):
    for name, processes in (("one", 1), ("two", 2)):
        launch.together(processes, "train_judge", *flags(dataset, tmp_path / name, "--steps", 3, "--lora", "--lr", "1e-2"))
    same_curve(tmp_path / "one", tmp_path / "two", "judge/adapter_model.safetensors")
    out = tmp_path / "two" / "judge"
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(train_judge.TINY) and config["r"] == 16
    for name in ("chat_template.jinja", "tokenizer.json", "tokenizer_config.json"):  # for servers of models
        assert (out / name).read_bytes() == (train_judge.TINY / name).read_bytes()
    judge, base = (qwen_vl.QwenVL.from_pretrained(folder) for folder in (out, train_judge.TINY))
    qkv, before = (each.model.layers[0].self_attn.qkv_proj.weight for each in (judge, base))
    assert not torch.equal(qkv, before)
    assert torch.equal(judge.visual.patch_embed.proj.weight, base.visual.patch_embed.proj.weight)


def test_answers_that_are_rewarded_become_likelier(dataset, tmp_path, monkeypatch):
    def calm(text, question, args):  # any property of the answers will do
        return {"format": float("5}" not in text)}  # arousal's last digit, which is nearly always a 5 or a 6

    monkeypatch.setattr(train_judge, "rewards_of", calm)
    args = train_judge.parse_args(flags(dataset, tmp_path, "--group", 8, "--steps", 8, "--lr", 1e-3, "--tasks", "regression"))
    assert train_judge.train(args, training.Processes(0, 1, torch.device("cpu"))) == 0
    rewards = [r["reward"] for r in log_of(tmp_path)[1:]]
    assert sum(rewards[-3:]) > sum(rewards[:3]) + 0.5, rewards


def test_training_stops_if_it_does_not_see_the_probabilities_of_sampling(dataset, tmp_path, monkeypatch, capsys):
    plain = qwen_vl.QwenVL.completion_hidden
    monkeypatch.setattr(qwen_vl.QwenVL, "completion_hidden", lambda self, *a: plain(self, *a) * 1.01)
    assert train_judge.main(flags(dataset, tmp_path, "--steps", 2)) == 2
    assert "training's log-probabilities differ from sampling's by mean " in capsys.readouterr().err
    assert train_judge.main(flags(dataset, tmp_path, "--steps", 1, "--mismatch", "mean=1000")) == 0


def test_a_step_without_a_finite_gradient_is_skipped_and_counted(dataset, tmp_path, monkeypatch):
    plain, calls = train_judge.update, []

    def update(model, reference, rollout, advantages, *rest, **named):
        calls.append(1)
        return plain(model, reference, rollout, advantages * (float("nan") if len(calls) == 1 else 1), *rest, **named)

    monkeypatch.setattr(train_judge, "update", update)
    assert train_judge.main(flags(dataset, tmp_path, "--steps", 2)) == 0
    assert [r.get("skipped") for r in log_of(tmp_path)] == [None, 1, 0]
    judge = qwen_vl.QwenVL.from_pretrained(tmp_path / "judge")
    assert all(p.isfinite().all() for p in judge.parameters())
    assert {"row", "task", "seed"} == set(read_records(tmp_path / "skipped.jsonl")[0])


def test_every_epoch_asks_every_question_once():
    args = train_judge.parse_args(["--batch", "4"])
    rows = [data.Row(str(i), Path(), "awe", 5, 5, "") for i in range(10)]
    asked = [(q.row.id, q.task) for step in range(10) for q in train_judge.questions_of(step, rows, args)]
    assert len(set(asked[:20])) == 20 and len(set(asked[20:])) == 20 and asked[:20] != asked[20:]
    one = train_judge.parse_args(["--batch", "4", "--tasks", "class"])
    assert {q.task for q in train_judge.questions_of(0, rows, one)} == {"class"}


def test_every_seed_that_is_allowed_can_be_sampled_from():
    args = train_judge.parse_args(["--batch", "4096", "--seed", str(2**31)])
    rows = [data.Row(str(i), Path(), "awe", 5, 5, "") for i in range(10)]
    seeds = [q.seed for q in train_judge.questions_of(10**7 - 1, rows, args)]
    assert len(set(seeds)) == 4096
    torch.Generator().manual_seed(max(seeds))


def test_rewards_follow_the_task_and_the_flags():
    row = data.Row("0", Path(), "awe", 5.0, 5.0, "")
    near = '<think>x</think><answer>{"valence": 5.5, "arousal": 7}</answer>'
    asked = train_judge.Question(0, "regression", row)
    assert train_judge.rewards_of(near, asked, train_judge.parse_args([])) == {"format": 1.0, "va": 0.25}
    args = train_judge.parse_args(["--reward", "continuous", "--va-weights", "valence=0.5,arousal=0.5"])
    soft = train_judge.rewards_of(near, asked, args)
    assert soft["va"] == pytest.approx(1 - (0.5 + 2) / 16)
    named = '<think>x</think><answer>{"emotion_class": "awe"}</answer>'
    assert train_judge.rewards_of(named, train_judge.Question(0, "class", row), train_judge.parse_args([])) == {
        "format": 1.0, "class": 1.0}


def test_nested_rewards_and_weights_of_tasks_give_the_paper_s_other_readings():
    row = data.Row("0", Path(), "awe", 5.0, 5.0, "")
    asked = train_judge.Question(0, "regression", row)

    def reward(v, a, *flags):
        text = f'<think>x</think><answer>{{"valence": {v}, "arousal": {a}}}</answer>'
        return train_judge.rewards_of(text, asked, train_judge.parse_args(["--reward", "nested", *flags]))["va"]

    assert [reward(*va) for va in ((5, 5), (5, 7), (7, 5), (7, 7))] == [1.0, 0.25, 0.0, 0.0]
    assert reward(5, 5.3, "--epsilon", "0.2") == 0.25 and reward(5.3, 5.3, "--epsilon", "0.35") == 1.0
    # one reward for both scales, weighed against that of the class
    tasks = ("--va-weights", "valence=0,arousal=1", "--task-weights", "class=0.25,regression=0.75")
    assert [reward(*va, *tasks) for va in ((5, 5), (5, 7), (7, 5))] == [0.75, 0.0, 0.0]
    named = '<think>x</think><answer>{"emotion_class": "awe"}</answer>'
    args = train_judge.parse_args(list(tasks))
    assert train_judge.rewards_of(named, train_judge.Question(0, "class", row), args) == {"format": 1.0, "class": 0.25}


def test_the_papers_settings_are_the_defaults_of_its_preset():
    args = train_judge.parse_args(["--preset", "paper"])
    assert (args.model, args.group, args.batch, args.epochs) == ("Qwen/Qwen2.5-VL-7B-Instruct", 8, 16, 5)
    assert (args.beta, args.lr, args.lr_end, args.epsilon) == (1e-3, 1e-6, 1e-9, 0.70)
    assert args.va_weights == {"valence": 0.25, "arousal": 0.75}
    assert args.tasks == ("regression", "class") and args.reward == "step"
    assert train_judge.parse_args(["--preset", "paper", "--group", "4"]).group == 4
    assert train_judge.parse_args(["--preset", "paper", "--lora"]).lr == 1e-5
    assert train_judge.parse_args(["--preset", "paper", "--lora", "--lr", "1e-6"]).lr == 1e-6
    assert train_judge.parse_args(["--lora"]).lr == 3e-4
    assert train_judge.parse_args(["--preset", "paper"]).max_new_tokens == feedback.ANSWER_LIMIT == 512


def test_other_questions_are_asked_and_are_among_the_settings(tmp_path, monkeypatch):
    own = {"class": "Give the emotion_class."}
    (tmp_path / "own.json").write_text(json.dumps(own))
    monkeypatch.setitem(feedback.PROMPTS, "class", feedback.PROMPTS["class"])  # to be put back
    monkeypatch.setattr(training, "run_in_processes", lambda work, args: (
        vars(args)["questions"], feedback.ask("class", None)[1]["content"][-1]["text"]))
    for program in (train_judge, train_gen):
        assert program.main([])[0] is None
        assert program.main(["--questions", str(tmp_path / "own.json")]) == (own, own["class"])


@pytest.mark.parametrize("wrong, message", [
    (["--questions", "none.json"], "--questions: none.json"),
    (["--group", "1"], "--group/--num-generations: expected a whole number in 2..1,024, got 1"),
    (["--tasks", "regression,mood"], "--tasks: expected some of regression, class"),
    (["--reward", "soft"], "--reward: invalid"),
    (["--va-weights", "1"], "--va-weights: expected e.g. valence=1,arousal=1"), (["--steps", "0"], "--steps: expected"),
    (["--temperature", "0"], "--temperature: expected"), (["--data", "nowhere"], "nowhere/train.jsonl: missing"),
    (["--model", "no/such/folder"], "no such file or folder"), (["--device", "cuda"], "sees no GPU"),
    (["--mismatch", "0.1"], "--mismatch: expected e.g. mean=1,share=1, got 0.1")])
def test_senseless_settings_end_with_one_line(dataset, tmp_path, capsys, wrong, message):
    if wrong[0] == "--device" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    try:
        code = train_judge.main(flags(dataset, tmp_path / "run", *wrong))
    except SystemExit as stopped:
        code = stopped.code
    assert code == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") <= 2 and "Traceback" not in error


def test_evaluate_prints_a_table_and_the_same_figures_on_one_process_and_on_two(dataset, tmp_path, capsys):
    outputs, first = [], None
    for more in ((), ("--lora",)):
        assert train_judge.main(flags(dataset, tmp_path, "--evaluate", *more)) == 0
        outputs.append(capsys.readouterr().out)
    outputs.append(launch.together(2, "train_judge", *flags(dataset, tmp_path, "--evaluate")))
    for output in outputs:
        *_, head, _, row, floor, line = output.splitlines()
        assert head == "| format | v_error | a_error | v_floor | a_floor | class_accuracy |"
        assert "; the labels allow at best V " in floor
        figures = json.loads(line)
        assert figures["model"] == str(train_judge.TINY) and figures["pictures"] == 4 and 0 < figures["v_error"] < 3
        assert row == "| " + " | ".join(f"{figures[name.strip()]:.3f}" for name in head.strip("|").split("|")) + " |"
        first = first or figures  # a training itself is watched on the validation pictures
        for name in first.keys() - {"model"}:
            assert figures[name] == pytest.approx(first[name], rel=1e-5), name
    assert not any(tmp_path.iterdir())


def test_with_evaluate_the_judge_is_frozen_and_whole_but_sees_small_pictures(dataset):
    for world in (1, 2):
        args = train_judge.parse_args([*SMALL, "--evaluate", "--lora", "--max-pixels", "1000"])
        model = train_judge.load_judge(args, training.Processes(0, world, torch.device("cpu")))
        assert not any(p.requires_grad for p in model.parameters()) and not lora.lora_layers(model)
        assert model.processor.image.max_pixels == model.processor.image.min_pixels == 1000


@pytest.mark.parametrize("lora", [[], ["--lora"]])
def test_an_exported_judge_sees_pictures_as_small_as_it_was_trained_on(tmp_path, lora):
    args = train_judge.parse_args([*SMALL, *lora, "--max-pixels", "1000"])
    one = training.Processes(0, 1, torch.device("cpu"))
    model = train_judge.load_judge(args, one)
    train_judge.export(model, tmp_path, args, one)
    assert qwen_vl.QwenVL.from_pretrained(tmp_path).processor.image == model.processor.image


def test_questions_that_the_processes_cannot_share_are_refused_before_anything_is_loaded(tmp_path):
    args = train_judge.parse_args([*SMALL, "--data", "nowhere", "--batch", "2", "--out", str(tmp_path / "run")])
    with pytest.raises(UserError, match="--batch: 2 cannot be shared by 3 processes"):
        train_judge.train(args, training.Processes(0, 3, torch.device("cpu")))
    assert not (tmp_path / "run").exists()


def test_one_sharded_process_trains_as_one_that_is_not_sharded(dataset, tmp_path, monkeypatch):
    """What a GPU does; on a CPU both compute in float32."""
    for name in ("plain", "sharded"):
        assert train_judge.main(flags(dataset, tmp_path / name, "--steps", 1, "--checkpointing")) == 0
        assert not torch.distributed.is_initialized()
        monkeypatch.setattr(weights, "build", partial(sharding.build, methods=("completion_hidden", "generate")))
    plain, sharded = (log_of(tmp_path / name)[1] for name in ("plain", "sharded"))
    for key in ("loss", "reward", "kl", "length", "grad_norm"):
        assert plain[key] == pytest.approx(sharded[key], abs=1e-6, rel=1e-6), key
    plain, sharded = (launch.checkpoint_of(tmp_path / name / "checkpoint-00000001") for name in ("plain", "sharded"))
    assert plain.keys() == sharded.keys()
    for name in plain:
        torch.testing.assert_close(plain[name], sharded[name], atol=1e-6, rtol=0)
    plain, sharded = (load_file(tmp_path / name / "judge" / "model.safetensors") for name in ("plain", "sharded"))
    assert all(torch.equal(plain[name], sharded[name]) for name in plain)


def test_the_form_the_prompts_ask_for_is_the_form_that_is_rewarded():
    for task, result in (("regression", '{"valence": 1, "arousal": 9}'), ("class", '{"emotion_class": "fear"}')):
        conversation = feedback.ask(task, Image.new("RGB", (64, 64)))
        text = chat.chat_text(conversation)
        assert all(tag in text for tag in feedback.TAGS) and all(key in text for key in json.loads(result))
        assert grpo.format_reward(f"<think>fog</think><answer>{result}</answer>") == 1


def test_answers_of_another_temperature_are_trained_at_it_and_a_second_update_sees_the_first(dataset, tmp_path):
    more = ("--steps", 1, "--temperature", 0.6, "--iterations", 2, "--lr", "1e-3")
    assert train_judge.main(flags(dataset, tmp_path, *more)) == 0  # else --mismatch would end it
    record = log_of(tmp_path)[1]
    assert record["ratio_max_deviation"] == 0 and record["ratio"] != 1


def test_the_kl_is_to_the_judge_before_training(unbroken):
    kl = [r["kl"] for r in log_of(unbroken[0])[1:]]
    assert abs(kl[0]) < 1e-9 and min(kl[1:]) > 1e-9


def test_the_kl_of_an_adapter_is_to_the_judge_without_it(dataset, tmp_path):
    assert train_judge.main(flags(dataset, tmp_path, "--steps", 2, "--lora", "--lr", "1e-2")) == 0
    kl = [r["kl"] for r in log_of(tmp_path)[1:]]
    assert abs(kl[0]) < 1e-9 and kl[1] > 1e-9


def test_each_update_has_the_learning_rate_clip_and_beta_of_the_settings(dataset, tmp_path, monkeypatch):
    update, loss, rates, asked = train_judge.update, grpo.grpo_loss, [], set()
    monkeypatch.setattr(train_judge, "update", lambda model, reference, rollout, advantages, optimizer, *rest, **named: (
        rates.append(optimizer.param_groups[0]["lr"]), update(model, reference, rollout, advantages, optimizer, *rest, **named))[1])
    monkeypatch.setattr(grpo, "grpo_loss", lambda *given, **named: (asked.add((given[5:], named["normalizer"])), loss(*given, **named))[1])
    more = ("--steps", 3, "--lr", "1e-3", "--lr-end", "1e-4", "--clip", 0.3, "--beta", 0.01)
    assert train_judge.main(flags(dataset, tmp_path, *more)) == 0
    assert rates == pytest.approx([1e-3, 5.5e-4, 1e-4]) and asked == {((0.3, 0.01), 4 * 4)}


def test_an_evaluation_holds_each_answer_against_its_own_row(monkeypatch):
    rows = [data.Row(str(i), Path(), label, v, a, "") for i, (label, v, a) in enumerate([("awe", 2.0, 6.0), ("fear", 4.0, 5.0)])]
    said = {"regression": '{"valence": 3, "arousal": 3}', "class": '{"emotion_class": "awe"}'}

    def generate(questions, *given, **named):
        return [[SimpleNamespace(text=f"<think>x</think><answer>{said[task]}</answer>")] for task in questions]

    monkeypatch.setattr(train_judge, "open_picture", lambda path: None)
    monkeypatch.setattr(train_judge.feedback, "ask", lambda task, image: task)
    args = train_judge.parse_args([])
    model = torch.nn.Module()
    model.generate = generate
    found = train_judge.evaluate(model, rows, args, training.Processes(0, 1, torch.device("cpu")))
    assert (found["eval_v_error"], found["eval_a_error"], found["eval_class_accuracy"]) == (1, 2.5, 0.5)


def test_another_seed_asks_for_other_answers():
    rows = [data.Row(str(i), Path(), "awe", 5, 5, "") for i in range(10)]
    seeds = [{q.seed for step in range(3) for q in train_judge.questions_of(step, rows, train_judge.parse_args(["--seed", seed]))}
             for seed in ("0", "1")]
    assert seeds[0].isdisjoint(seeds[1])


def test_the_adapter_has_the_rank_and_the_alpha_of_the_settings():
    args = train_judge.parse_args([*SMALL, "--lora", "--lora-rank", "8", "--lora-alpha", "24"])
    model = train_judge.load_judge(args, training.Processes(0, 1, torch.device("cpu")))
    from parts import lora
    assert {(layer.rank, layer.alpha) for layer in lora.lora_layers(model).values()} == {(8, 24.0)}


def test_the_spread_of_rewards_is_that_within_each_group():
    rollout = SimpleNamespace(rewards=torch.tensor([[0.0, 0.0], [1.0, 3.0], [5.0, 5.0]]), mask=torch.ones(3, 2, 1), sums={
        "reward_format": 6, "cut": 0, "reward_va": 6, "reward_class": 0, "asked_va": 6, "asked_class": 0})
    sums = {"loss": 0.0, "ratio": 6.0, "clip_fraction": 0.0, "kl": 0.0}
    found = train_judge.summary(rollout, sums, {}, 1.0, training.Processes(0, 1, torch.device("cpu")))
    assert found["zero_spread"] == pytest.approx(2 / 3) and found["reward_std"] == pytest.approx(2**0.5 / 3)
