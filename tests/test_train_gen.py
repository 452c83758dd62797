"""Reward feedback: the log, exact resume after a kill, two processes against one, rewards, bad input."""

import math
import shutil
import signal
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import data
import feedback
import flow_grpo
import grpo
import mmdit
import train_gen
from parts import checkpoints, lora, pipeline
from parts.files import read_json, read_records, write_json
from parts.pipeline import to_images
from parts.run import EMA, Processes, check_ratio, disk_parts, in_bytes
from tests import launch
from tests.launch import finish, log_of, stop_inside, without_times
from tiny.dataset import write_tiny

SMALL = ("--group 2 --batch 2 --micro 2 --size 64 --sde-steps 4 --window 2 --window-within 3 --sample-steps 3 "
         "--eval-rows 3 --eval-every 0 --save-every 2 --lr 1e-3 --lr-end 1e-4 --device cpu "
         "--loss flow-grpo --group-start own --advantage-std group --beta 0.02").split()


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dataset")
    write_tiny(folder, train=8, test=4, seed=8)
    return folder


def flags(dataset, out, *more):
    return ["--data", str(dataset), "--out", str(out), *SMALL, *map(str, more)]


def start(*args, before=None):
    return launch.start("train_gen", *flags(*args), before=before)


@pytest.fixture(scope="module")
def unbroken(dataset, tmp_path_factory):
    out = tmp_path_factory.mktemp("unbroken") / "run"
    return out, launch.started("train_gen.py", dataset, out, *SMALL, "--steps", 5)


def test_a_run_leaves_log_curves_pictures_figures_and_an_adapter(unbroken):
    out, output = unbroken
    log = without_times(log_of(out))
    assert [r["step"] for r in log] == list(range(6))
    for key in ("reward", "reward_emotion", "reward_pickscore", "judge_v_error", "meter_a_error", "gap", "reward_std",
                "zero_spread", "ratio", "clip_fraction", "kl", "grad_norm", "unreadable"):
        assert all(isinstance(r[key], (int, float)) for r in log[1:]), key
    assert [r["lr"] for r in log[1:]] == pytest.approx([1e-3, 7.75e-4, 5.5e-4, 3.25e-4, 1e-4])
    assert Image.open(out / "curves.png").size[0] == 900
    assert Image.open(out / "strip.png").size == (3 * 128, 2 * 128)  # three rows of the test split, before and after
    assert "| before |" in output and "| after |" in output
    config = read_json(out / "adapter" / "adapter_config.json")
    assert config["base_model_name_or_path"] == "tiny/weights"  # not where it lies on this machine
    assert config["r"] == 32 and "transformer_blocks.0.attn.to_q" in config["target_modules"]
    tensors = load_file(out / "adapter" / "adapter_model.safetensors")
    assert any(t.abs().sum() > 0 for name, t in tensors.items() if "lora_B" in name)
    for_diffusers = load_file(out / "adapter" / "pytorch_lora_weights.safetensors")
    assert all(torch.equal(for_diffusers[name.replace("base_model.model", "transformer")], t) for name, t in tensors.items())


def test_every_checkpoint_and_evaluation_leaves_the_averaged_adapter(unbroken):
    out = unbroken[0]
    folders = sorted((out / "adapters").iterdir())
    assert [folder.name for folder in folders] == ["00000002", "00000004", "00000005"]
    figures = [read_json(folder / "figures.json") for folder in folders]
    assert figures[0] == {"step": 2} and figures[2]["step"] == 5
    assert {name: figures[2][name] for name in log_of(out)[-1] if name.startswith("eval_")} == {
        name: value for name, value in log_of(out)[-1].items() if name.startswith("eval_")} != {}
    files = [(folder / "adapter_model.safetensors").read_bytes() for folder in (*folders, out / "adapter")]
    assert files[0] != files[1] != files[2] == files[3]


def test_a_run_may_go_on_for_more_steps_and_the_learning_rate_follows(dataset, unbroken, tmp_path, capsys):
    out = tmp_path / "run"
    shutil.copytree(unbroken[0], out)
    finish(start(dataset, out, "--steps", 6, "--checkpointing", "--micro", 4))
    log = log_of(out)
    assert [r["step"] for r in log] == list(range(7)) and log[:6] == log_of(unbroken[0])
    assert log[6]["lr"] == pytest.approx(1e-4) and "eval_total" in log[6]
    assert train_gen.main(flags(dataset, out, "--steps", 3)) == 2
    assert "00000006 is further already" in capsys.readouterr().err


def test_without_a_kl_a_run_does_not_say_it(dataset, tmp_path):
    for loss in ((), ("--loss", "difference", "--group-start", "shared")):
        out = tmp_path / f"run{len(loss)}"
        assert train_gen.main(flags(dataset, out, "--beta", 0, "--steps", 1, *loss)) == 0
        assert "kl" not in log_of(out)[1] and "grad_norm" in log_of(out)[1]


def test_training_may_start_from_an_adapter(dataset, unbroken, tmp_path, capsys):
    args = flags(dataset, tmp_path, "--init-adapter", unbroken[0])
    model = train_gen.load_models(train_gen.parse_args(args), torch.device("cpu")).generator.mmdit
    ours, theirs = lora.lora_views(model), load_file(unbroken[0] / "adapter" / "adapter_model.safetensors")
    assert ours.keys() == theirs.keys() and all(torch.equal(*ours[name], theirs[name]) for name in theirs)
    assert all(p.requires_grad for layer in lora.lora_layers(model).values() for p in (layer.A, *layer.B))
    assert train_gen.main([*args, "--lora-rank", "8"]) == 2
    assert "rank 32 and alpha 64, not 8 and 64; give --lora-rank 32" in capsys.readouterr().err


def test_the_average_takes_up_every_so_many_steps(dataset, tmp_path):
    assert train_gen.main(flags(dataset, tmp_path, "--steps", 1, "--ema-every", 2)) == 0
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert all(not t.any() for name, t in tensors.items() if "lora_B" in name)  # as it was before the first step


def test_before_an_update_the_ratio_is_exactly_one(unbroken):
    assert all(r["ratio_max_deviation"] == 0 and r["ratio"] == 1 for r in without_times(log_of(unbroken[0]))[1:])


def same_end(out, unbroken):
    ours, theirs = (load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (out, unbroken))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert without_times(log_of(out)) == without_times(log_of(unbroken))


def broken_losses(monkeypatch, steps):
    """Make the losses of some steps NaN: of the calls of `update`, counted from 0."""
    plain, calls = train_gen.update, []

    def update(*args):
        bad = len(calls) in steps
        calls.append(1)
        with monkeypatch.context() as patch:
            if bad:
                patch.setattr(train_gen, "step_weight", lambda *_: float("nan"))
            return plain(*args)

    monkeypatch.setattr(train_gen, "update", update)


def test_a_step_without_a_finite_gradient_is_skipped_and_counted(dataset, tmp_path, monkeypatch):
    broken_losses(monkeypatch, {1})
    assert train_gen.main(flags(dataset, tmp_path, "--steps", 3)) == 0
    assert [r.get("skipped") for r in log_of(tmp_path)] == [None, 0, 1, 0] and log_of(tmp_path)[2]["grad_norm"] is None
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert all(t.isfinite().all() for t in tensors.values())
    assert [row["row"] for row in read_records(tmp_path / "skipped.jsonl")]


def test_a_run_whose_gradients_stay_broken_ends_and_keeps_what_it_had(dataset, tmp_path, monkeypatch, capsys):
    broken_losses(monkeypatch, {2, 3, 4})
    assert train_gen.main(flags(dataset, tmp_path, "--steps", 9)) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "3 steps in a row had no finite gradient" in error and "the checkpoint of step 4" in error
    assert (tmp_path / "checkpoint-00000004").exists() and not (tmp_path / "adapter").exists()
    batch = read_records(tmp_path / "skipped.jsonl")
    assert len(batch) == 4 and set(batch[0]) == {"row", "prompt", "seed"}


def test_a_reward_that_is_no_number_is_named_with_its_picture(dataset, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train_gen.clip, "pick_score", lambda model, images, prompts: torch.full((len(images),), float("nan")))
    assert train_gen.main(flags(dataset, tmp_path, "--steps", 1)) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "the reward pickscore of a picture is nan, of row validation_" in error


def test_other_rows_on_resume_are_noticed(dataset, unbroken, tmp_path, capsys):
    shutil.copytree(unbroken[0], tmp_path / "run")
    shutil.copytree(dataset, tmp_path / "dataset")
    path = tmp_path / "dataset" / "train.jsonl"
    path.write_text("\n".join(path.read_text().splitlines()[:-1]) + "\n")
    settings = tmp_path / "run" / "settings.json"
    settings.write_text(settings.read_text().replace(str(dataset), str(tmp_path / "dataset")))  # the same path, other rows
    assert train_gen.main(flags(tmp_path / "dataset", tmp_path / "run", "--steps", 6)) == 2
    assert "holds a run with another dataset of --data; put that back" in capsys.readouterr().err


def test_another_judge_in_the_same_folder_is_noticed_and_a_run_of_an_older_version_goes_on(dataset, unbroken, tmp_path, capsys):
    out = tmp_path / "run"
    shutil.copytree(unbroken[0], out)
    settings = read_json(out / "settings.json")
    assert settings["files"].keys() == {"model", "judge", "pickscore"}
    write_json(out / "settings.json", settings | {"files": settings["files"] | {"judge": "of another"}})
    args = ["--data", str(dataset), "--out", str(out), *SMALL, "--steps", "5"]
    assert train_gen.main(args) == 2
    error = capsys.readouterr().err
    assert f"holds a run with other files of --judge {settings['judge']}; put those back" in error and error.count("\n") == 1
    write_json(out / "settings.json", {name: value for name, value in settings.items() if name != "files"})
    assert train_gen.main(args) == 0 and "does not say of which files its models were" in capsys.readouterr().err
    assert read_json(out / "settings.json") == settings  # so that it is said once


def test_a_run_takes_as_much_of_the_disk_as_it_says(unbroken):
    out, output = unbroken
    args = train_gen.parse_args([*SMALL, "--steps", "5"])
    state = launch.checkpoint_of(out / "checkpoint-00000005")
    adapter = load_file(out / "adapter" / "adapter_model.safetensors")
    parts = disk_parts(state, 2 * sum(4 * t.numel() + lora.PER_TENSOR for t in adapter.values()), args, True)
    assert f"takes at most {in_bytes(sum(count * size for count, size in parts.values()))} (3 checkpoints of" in output
    assert launch.size_of(out / "checkpoint-00000005") == pytest.approx(parts["checkpoints"][1], rel=0.02)
    assert launch.size_of(out / "adapters" / "00000002") == pytest.approx(parts["adapters"][1], rel=0.02)
    assert len(list(out.glob("adapters/*"))) == parts["adapters"][0] - 2  # less the final one and one that is being written
    assert launch.size_of(out / "strips") + (out / "strip.png").stat().st_size < math.prod(parts["strips of pictures"])
    assert (out / "log.jsonl").stat().st_size < math.prod(parts["lines of the log"])
    assert (out / "curves.png").stat().st_size < math.prod(parts["sheet of curves"])
    assert launch.size_of(out) < sum(map(math.prod, parts.values()))


def test_what_the_papers_run_takes_of_the_disk_is_counted_without_its_weights():
    args = train_gen.parse_args(["--preset", "paper"])
    with torch.device("meta"):
        model = mmdit.MMDiT(mmdit.SD35_MEDIUM)
        lora.add_lora(model, model.lora_targets(), args.lora_rank, args.lora_alpha)
    trained = [p for p in model.parameters() if p.requires_grad]
    state = checkpoints.state_of(torch.optim.AdamW(trained), EMA(trained, args.ema))
    values = sum(p.numel() for p in trained)
    assert lora.file_size(model) == pytest.approx(4 * values, rel=0.001)
    parts = disk_parts(state, lora.file_size(model), args, True)
    assert parts["checkpoints"][1] == pytest.approx(4 * 4 * values, rel=0.01)  # parameters, two moments, averages
    assert parts["adapters"][0] == 17 + 4 and 1e9 < sum(map(math.prod, parts.values())) < 5e9


def test_a_run_killed_inside_a_checkpoint_goes_on_with_the_encoders_elsewhere_and_ends_with_the_same_adapter(
        dataset, unbroken, tmp_path):
    out = tmp_path / "run"
    finish(start(dataset, out, "--steps", 5, before=launch.kill_inside_second_checkpoint), -signal.SIGKILL)
    assert (out / "checkpoint-00000004.tmp").exists()
    output = finish(start(dataset, out, "--steps", 5, "--encoders", "leave", "--checkpointing"))
    assert "goes on after step 2" in output
    same_end(out, unbroken[0])


def test_an_update_is_finished_a_rollout_and_an_evaluation_are_broken_off_and_nothing_is_lost(dataset, unbroken, tmp_path):
    out, long = tmp_path / "run", ("--steps", 5, "--save-every", 1000)
    output = finish(start(dataset, out, *long, before=stop_inside(2, "train_gen.update")), 143)
    assert "asked to stop: " in output and "stopped after step 2; the same command goes on from there" in output
    assert [r["step"] for r in log_of(out)] == [0, 1, 2] and (out / "checkpoint-00000002").exists()
    # in the first of the two chunks of the fourth step
    output = finish(start(dataset, out, *long, before=stop_inside(3, "flow_grpo.sample_sde")), 143)
    assert "stopped after step 3; " in output and output.count("call ") == 3
    assert [r["step"] for r in log_of(out)] == [0, 1, 2, 3] and (out / "checkpoint-00000003").exists()
    # in the first of the two batches of the last evaluation
    output = finish(start(dataset, out, *long, before=stop_inside(1, "flow_grpo.sample_ode")), 143)
    assert "stopped after step 5; " in output and output.count("call ") == 1 and not (out / "adapter").exists()
    assert (out / "checkpoint-00000005").exists() and "eval_total" not in log_of(out)[-1]
    finish(start(dataset, out, *long))
    same_end(out, unbroken[0])
    assert "eval_total" in read_json(out / "adapters" / "00000005" / "figures.json")


def test_checkpoints_are_written_by_the_clock_too(dataset, tmp_path):
    assert train_gen.main(flags(dataset, tmp_path, "--steps", 2, "--save-every", 1000, "--save-minutes", 1e-6)) == 0
    assert [folder.name for folder in sorted(tmp_path.glob("checkpoint-*"))] == ["checkpoint-00000001", "checkpoint-00000002"]


def test_two_processes_give_the_curve_of_one(dataset, unbroken, tmp_path):
    launch.started("train_gen.py", dataset, tmp_path, *SMALL, "--steps", 5, processes=2)
    for a, b in zip(without_times(log_of(unbroken[0])), without_times(log_of(tmp_path)), strict=True):
        for key in a:
            if "clip_fraction" in key or a[key] is None:
                continue
            # a batch of other size rounds differently, which each update carries on
            assert a[key] == pytest.approx(b[key], abs=1e-4, rel=1e-3), (a["step"], key)


def test_a_group_may_lie_on_two_processes(dataset, tmp_path):
    for name, processes in (("one", 1), ("two", 2)):
        launch.together(processes, "train_gen", *flags(dataset, tmp_path / name, "--steps", 2, "--batch", 1))
    for a, b in zip(without_times(log_of(tmp_path / "one")), without_times(log_of(tmp_path / "two")), strict=True):
        for key in ({"reward", "reward_std", "kl", "grad_norm", "eval_total"} & set(a)):
            assert a.get(key) == pytest.approx(b.get(key), abs=1e-4, rel=1e-4), (a["step"], key)


RUN = Namespace(until_asked=iter, processes=Processes(0, 1, torch.device("cpu")))  # one that is not asked to stop


@pytest.fixture(scope="module")
def ready(dataset):
    """(models, rows, settings) to roll out with."""
    args = train_gen.parse_args(["--data", str(dataset), *SMALL])
    return train_gen.load_models(args, torch.device("cpu")), data.load_rows(dataset, "train"), args


def roll_out(models, rows, args, **settings):
    args = Namespace(**vars(args) | settings)
    return train_gen.roll_out(models, train_gen.samples_of(0, rows, args), args, RUN, 0)


def test_the_judge_reads_all_pictures_of_a_step_in_one_generation(ready, monkeypatch):
    plain, asked = type(ready[0].judge).generate, []
    monkeypatch.setattr(type(ready[0].judge), "generate", lambda self, prompts, *args, **kwargs: (
        asked.append(len(prompts)), plain(self, prompts, *args, **kwargs))[1])
    roll_out(*ready, batch=4, readings=1)
    assert asked == [8]


def changes(models, rows, args, **settings):
    """The change of an adapter's parameters by the first update of a step, and the sums of its metrics."""
    args = Namespace(**vars(args) | {"window": 0, "lr": 1.0} | settings)
    chunks, rewards = train_gen.roll_out(models, train_gen.samples_of(0, rows, args), args, RUN, 0)
    model = models.generator.mmdit
    trained = [p for p in model.parameters() if p.requires_grad]
    before = [p.detach().clone() for p in trained]
    optimizer = torch.optim.SGD(trained, lr=1.0)
    advantages = torch.tensor([1.0, -1.0, 0.5, -0.5])
    one = Processes(0, 1, torch.device("cpu"))
    sums, deviation, _ = train_gen.update(model, chunks, advantages, optimizer, args, one, check=True)
    assert deviation == (None if args.loss == "difference" else 0)
    change = [p.detach() - old for p, old in zip(trained, before)]
    for p, old in zip(trained, before):
        p.data.copy_(old)
    return torch.cat([c.flatten() for c in change]), sums, chunks


def test_the_last_step_is_drawn_with_noise_and_not_trained(ready):
    change, sums, chunks = changes(*ready)
    everything, all_sums, all_chunks = changes(*ready, skip_last=0)
    assert [kept.index for kept in chunks[0].trajectory.steps] == [0, 1, 2] and sums["picture_steps"] == 4 * 3
    assert [kept.index for kept in all_chunks[0].trajectory.steps] == [0, 1, 2, 3] and all_sums["picture_steps"] == 4 * 4
    assert torch.equal(chunks[0].trajectory.latents, all_chunks[0].trajectory.latents)
    assert torch.cosine_similarity(change, everything, dim=0) < 0.999


def test_the_unconditional_half_has_no_gradient_unless_asked_for(ready):
    detached, both = (changes(*ready, guidance_gradient=kind)[0] for kind in ("conditional", "both"))
    assert detached.norm() > 0 and 0.1 < torch.cosine_similarity(detached, both, dim=0) < 0.9999


def test_two_updates_share_the_pictures_of_a_step(ready):
    _, sums, chunks = changes(*ready, updates=2, micro=64)
    assert [chunk.indices for chunk in chunks] == [[0, 2], [1, 3]] and sums["picture_steps"] == 4 * 3
    assert sums["ratio"] / sums["picture_steps"] != 1  # the second sees a model that the first has changed


def test_the_difference_loss_moves_the_adapter_and_says_the_kl(ready):
    shared = {"group_start": "shared", "loss": "difference", "micro": 4}
    change, sums, chunks = changes(*ready, **shared)
    other, _, _ = changes(*ready, micro=4)
    assert change.norm() > 0 and set(sums) == {"loss", "picture_steps", "kl"}
    first = chunks[0].trajectory.steps[0].before
    assert torch.equal(first[0], first[1]) and not torch.equal(first[0], first[2])
    assert torch.cosine_similarity(change, other, dim=0) > 0.05  # both go uphill


@pytest.mark.parametrize("wrong, said", [
    ("--loss difference --group-start own", "give --group-start shared"), ("--group-start shared --updates 3 --group 4", "multiple of --updates"),
    ("--group-start shared --group 4 --micro 6", "--micro 6 must be a multiple of 4")])
def test_groups_that_would_be_torn_apart_are_refused(wrong, said, capsys):
    with pytest.raises(SystemExit):
        train_gen.parse_args(["--data", "x", "--out", "y", *wrong.split()])
    assert said in capsys.readouterr().err


def test_a_group_on_two_processes_is_refused_before_anything_is_loaded(tmp_path):
    args = train_gen.parse_args(["--data", "nowhere", "--out", str(tmp_path), "--group-start", "shared", "--batch", "3"])
    with pytest.raises(train_gen.UserError, match="--group-start shared, --batch: 3 cannot be shared by 2 processes"):
        train_gen.train(args, Processes(0, 2, torch.device("cpu")))


def test_pictures_and_rows_that_the_processes_cannot_share_are_refused_before_anything_is_loaded(dataset, tmp_path):
    for wrong, world, message in ((["--batch", "2", "--group", "2"], 3, "--batch × --group: 4 cannot be shared by 3 processes"),
                                  (["--eval-rows", "2"], 4, "--eval-rows: 2 validation rows for 4 processes")):
        args = train_gen.parse_args(["--data", str(dataset), "--out", str(tmp_path / "run"), *wrong])
        with pytest.raises(train_gen.UserError, match=message):
            train_gen.train(args, Processes(0, world, torch.device("cpu")))
    assert not (tmp_path / "run").exists()


def test_a_gpu_may_round_but_no_more():
    cpu, gpu = (Processes(0, 1, torch.device(kind)) for kind in ("cpu", "cuda"))
    check_ratio(0.0, 1e-2, cpu)
    check_ratio(5e-3, 1e-2, gpu)
    for deviation, processes in ((1e-7, cpu), (2e-2, gpu), (float("nan"), gpu)):
        with pytest.raises(train_gen.UserError, match="before the first update the ratio is off by"):
            check_ratio(deviation, 1e-2, processes)


def test_a_gpu_that_rounds_is_told(capsys):
    check_ratio(5e-3, 1e-2, Processes(0, 1, torch.device("cuda")))
    assert "off by 0.005" in capsys.readouterr().err
    check_ratio(1e-6, 1e-2, Processes(0, 1, torch.device("cuda")))
    assert capsys.readouterr().err == ""


def test_the_pictures_of_a_group_start_from_different_noise(ready):
    chunks, _ = roll_out(*ready, window=1, window_within=1)
    for chunk in chunks:  # a chunk of two is a group here
        assert [kept.index for kept in chunk.trajectory.steps] == [0]
        kept = chunk.trajectory.steps[0]
        assert not torch.equal(kept.before[0], kept.before[1])
        assert not torch.equal(kept.after[0], kept.after[1])


def test_windows_lie_where_they_are_asked_for_and_resumed_runs_get_the_same(ready):
    models, rows, args = ready
    args = Namespace(**vars(args) | {"window": 2, "window_within": 4, "sde_steps": 6})
    windows = [train_gen.sde_settings(args, models.generator.shift, step).trained for step in range(12)]
    assert {len(window) for window in windows} == {2} and {window[0] for window in windows} == {0, 1, 2}
    for step in range(2):
        chunks, _ = train_gen.roll_out(models, train_gen.samples_of(step, rows, args)[:1], args, RUN, step)
        assert [kept.index for kept in chunks[0].trajectory.steps] == list(windows[step])


def test_rewards_are_in_the_order_of_the_samples(ready):
    models, rows, args = ready
    samples = train_gen.samples_of(0, rows, args)
    chunks, rewards = roll_out(*ready, updates=2)
    assert [chunk.indices for chunk in chunks] == [[0, 2], [1, 3]]
    for chunk in chunks:
        own = [samples[i] for i in chunk.indices]
        images = to_images(models.generator.decode(chunk.trajectory.latents))
        again = train_gen.rewards_of(images, [s.row for s in own], models, args.reward_weights, args.readings)
        for name in again:
            torch.testing.assert_close(rewards[name][chunk.indices], again[name], rtol=1e-5, atol=1e-5, equal_nan=True)
        followed = models.generator.encode_prompts([s.prompt for s in own], args.guidance)
        assert torch.equal(chunk.texts[1], followed[1])


def test_every_seed_that_is_allowed_can_be_drawn_from(ready):
    _, rows, args = ready
    for seed in (0, 7, 4_300_000, 2**31):
        args = Namespace(**vars(args) | {"seed": seed, "batch": 4096, "group": 2})
        seeds = [sample.seed for sample in train_gen.samples_of(10**7 - 1, rows, args)]
        assert len(set(seeds)) == len(seeds) and len(pipeline.seeded(seeds)) == 8192


def test_no_step_repeats_the_noise_of_another(ready):
    _, rows, args = ready
    seeds = [s.seed for step in range(0, 3 * 1024, 256) for s in train_gen.samples_of(step, rows, args)]
    firsts = {float(torch.randn(1, generator=each)) for each in pipeline.seeded(seeds)}
    assert len(firsts) == len(seeds) == 12 * 4  # torch takes up 32 bits of a seed: step + 1024 once gave the same noise


def test_the_form_of_the_target_is_drawn_for_each_group(ready):
    _, rows, args = ready
    args = Namespace(**vars(args) | {"form": ("numbers", "words")})
    samples = [s for step in range(8) for s in train_gen.samples_of(step, rows, args)]
    forms = [next(f for f in ("numbers", "words") if s.prompt == s.row.prompt(f)) for s in samples]
    assert 2 < forms.count("words") / args.group < 14
    assert all(a == b for a, b in zip(forms[::2], forms[1::2]))  # a group shares its prompt


def test_rewards_are_those_of_judge_and_pickscore_and_the_meter_is_only_watched(monkeypatch):
    rows = [data.Row(str(i), Path(), "awe", v, a, "a lake") for i, (v, a) in enumerate([(5, 5), (3, 7), (2, 2)])]
    seen = [feedback.Judgement(5.0, 6.0, None, ""), feedback.Judgement(7.0, 7.0, None, ""),
            feedback.Judgement(None, None, None, "")]
    monkeypatch.setattr(feedback, "judge_images", lambda *_, strict: seen if strict else None)
    monkeypatch.setattr(train_gen.clip, "pick_score", lambda *_: torch.tensor([13.0, 26.0, 20.8]))
    models = train_gen.Models(None, object(), object(), lambda image: (4.0, 4.0), None)
    parts = train_gen.rewards_of([None] * 3, rows, models, {"emotion": 2.0, "pickscore": 0.5}, 1)
    assert parts["emotion"].tolist() == [1 - 1 / 16, 1 - 4 / 16, 0.0]
    assert parts["total"].tolist() == pytest.approx([2 * 15 / 16 + 0.25, 1.5 + 0.5, 0.4])
    assert parts["meter_v_error"].tolist() == [1, 1, 2] and parts["judge_v_error"][:2].tolist() == [0, 4]
    assert parts["gap"][:2].tolist() == [1 + 2, 3 + 3] and parts["gap"][2].isnan() and parts["judge_a_error"][2].isnan()


@pytest.mark.parametrize("more", [["--encoders", "cpu"], ["--encoders", "leave", "--checkpointing"]])
def test_where_the_encoders_live_and_recomputing_change_nothing(dataset, unbroken, tmp_path, more):
    finish(start(dataset, tmp_path, "--steps", 5, *more, before=stop_inside(2, "train_gen.update")), 143)
    ours, theirs = (load_file(out / "adapters" / "00000002" / "adapter_model.safetensors") for out in (tmp_path, unbroken[0]))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert without_times(log_of(tmp_path)) == without_times(log_of(unbroken[0]))[:3]


def test_a_process_needs_the_prompts_of_its_own_share(dataset):
    args = train_gen.parse_args(["--batch", "4", "--steps", "3", "--form", "words,numbers"])
    train, test = (data.load_rows(dataset, split) for split in ("train", "test"))
    shares = [train_gen.prompts_needed(0, train, test, args, Processes(rank, 2, torch.device("cpu")))
              for rank in range(2)]
    drawn = {s.prompt for step in range(3) for s in train_gen.samples_of(step, train, args)}
    assert set().union(*shares) == {"", *drawn, *(row.prompt("words") for row in test)}
    assert all(len(own) == len(set(own)) <= 1 + 3 * 2 * 2 + 2 for own in shares)


def test_the_papers_settings_are_the_defaults_of_its_preset():
    args = train_gen.parse_args(["--preset", "paper"])
    assert (args.group, args.batch, args.steps, args.sde_steps, args.sample_steps, args.size) == (8, 16, 1000, 10, 25, 512)
    assert (args.beta, args.noise_level, args.guidance, args.lora_rank, args.lora_alpha, args.lr, args.clip) == (
        0.1, 0.7, 4.5, 32, 64, 3e-4, 1e-4)


@pytest.mark.parametrize("flag, name, value", [
    ("--num-generations", "group", 2), ("--learning-rate", "lr", 0.25), ("--guidance-scale", "guidance", 3.0),
    ("--num-inference-steps", "sample_steps", 7)])
def test_flags_have_the_names_of_other_programs_too(flag, name, value):
    assert getattr(train_gen.parse_args([flag, str(value)]), name) == value


def test_the_weight_of_a_reward_may_be_left_out():
    assert train_gen.parse_args(["--reward-weights", "pickscore=0.5"]).reward_weights == {"pickscore": 0.5}


@pytest.mark.parametrize("wrong, message", [
    (["--group", "1"], "--group/--num-generations: expected a whole number in 2"),
    (["--window", "5"], "--window 5: at most 3"), (["--form", "verse"], "--form: expected some of numbers, words"),
    (["--skip-last", "4"], "--skip-last 4: at most 3"),
    (["--updates", "5"], "--updates 5: at most 4"), (["--advantage-std", "row"], "--advantage-std: invalid choice: 'row'"),
    (["--window", "0"], "--window-within 3: --window is 0, so all steps are trained"),
    (["--preset", "paper", "--reward-weights", "meter=1"], "--reward-weights meter: only the miniature has one"),
    (["--window-within", "1"], "--window 2: at most 1"), (["--encoders", "moon"], "--encoders: invalid choice: 'moon'"),
    (["--size", "72"], "--size: expected a multiple of 16"),
    (["--reward-weights", "joy=1"], "--reward-weights: expected e.g. emotion=1,pickscore=1,own=1,meter=1,imagereward=1,hpsv2=1, got joy=1"),
    (["--reward-weights", "emotion"], "--reward-weights: expected a number"), (["--judge", "none"], "--judge none"),
    (["--data", "nowhere"], "nowhere/train.jsonl: missing"), (["--judge", "./nobody"], "no such file or folder"),
    (["--model", "./nothing"], "no such file or folder")])
def test_senseless_settings_end_with_one_line(dataset, tmp_path, capsys, wrong, message):
    try:
        code = train_gen.main(flags(dataset, tmp_path / "run", *wrong))
    except SystemExit as stop:
        code = stop.code
    error = capsys.readouterr().err
    assert code == 2 and message in error and error.count("\n") <= 2 and "Traceback" not in error


def test_another_seed_draws_other_noise_windows_and_forms(ready):
    _, rows, args = ready
    args = Namespace(**vars(args) | {"form": ("numbers", "words")})
    other = Namespace(**vars(args) | {"seed": args.seed + 1})
    one, two = ([s.seed for step in range(3) for s in train_gen.samples_of(step, rows, each)] for each in (args, other))
    assert set(one).isdisjoint(two)
    one, two = ([train_gen.sde_settings(each, 3.0, step).trained for step in range(20)] for each in (args, other))
    assert one != two


def test_an_update_of_half_a_group_shares_starts_within_the_group_only(ready):
    chunks, _ = roll_out(*ready, group=4, updates=2, micro=64, group_start="shared", readings=1)
    assert [chunk.indices for chunk in chunks] == [[0, 2, 4, 6], [1, 3, 5, 7]]
    for chunk in chunks:
        before = chunk.trajectory.steps[0].before
        assert torch.equal(before[0], before[1]) and torch.equal(before[2], before[3]) and not torch.equal(before[0], before[2])


def test_a_window_lies_anywhere_among_the_steps_that_are_trained(ready):
    args = Namespace(**vars(ready[2]) | {"window": 2, "window_within": 0, "sde_steps": 6, "skip_last": 2})
    assert {train_gen.sde_settings(args, 3.0, step).trained for step in range(60)} == {range(i, i + 2) for i in range(3)}


@pytest.mark.parametrize("name, more", [("flow_grpo_loss", {"updates": 2}), ("difference_loss", {
    "loss": "difference", "group_start": "shared"})])
def test_each_picture_is_trained_by_its_own_advantage_and_by_the_weights_of_the_settings(ready, monkeypatch, name, more):
    plain, asked = getattr(flow_grpo, name), []
    monkeypatch.setattr(flow_grpo, name, lambda *given, **named: asked.append((given, named)) or plain(*given, **named))
    directions = []
    towards = flow_grpo.towards_better
    monkeypatch.setattr(flow_grpo, "towards_better", lambda latents, advantages, group: directions.append(advantages.tolist()) or towards(
        latents, advantages, group))
    changes(*ready, micro=2, beta=0.03, clip=0.002, **more)
    if name == "flow_grpo_loss":
        assert [given[2].tolist() for given, _ in asked] == [[1, 0.5]] * 3 + [[-1, -0.5]] * 3
        assert all(given[4:] == (0.002, 0.03, 2 * 3) and not named for given, named in asked)
    else:
        assert directions == [[1, -1]] * 3 + [[0.5, -0.5]] * 3
        assert all(given[3:] == (0.03, 4 * 3) and not named for given, named in asked)


def test_the_kl_is_to_the_model_without_its_adapter(unbroken):
    kl = [r["kl"] for r in log_of(unbroken[0])[1:]]
    assert kl[0] == 0 and min(kl[1:]) > 0  # a new adapter changes nothing, a trained one does


def test_by_their_noise_steps_weigh_so_that_all_levels_count():
    sigmas, x = flow_grpo.sigma_schedule(6), torch.zeros(1, 1, 2, 2)
    trajectory = Namespace(sigmas=sigmas, settings=Namespace(noise_level=0.5))
    for k in range(5):
        velocity = torch.zeros_like(x).requires_grad_()
        step = flow_grpo.sde_step(velocity, x, sigmas[k], sigmas[k + 1], 0.5, x + 1)
        weight = train_gen.step_weight(step, trajectory, k, "noise")
        assert weight == pytest.approx(step.sigma_t**2 / step.std / 0.5) and train_gen.step_weight(step, trajectory, k, "equal") == 1


def test_the_averaged_adapter_is_evaluated(dataset, tmp_path):
    assert train_gen.main(flags(dataset, tmp_path, "--steps", 1, "--ema-every", 2)) == 0
    before, after = ({name: x for name, x in r.items() if name.startswith("eval_")} for r in log_of(tmp_path))
    assert before == after  # for it has not taken up the first step


def test_each_update_has_its_learning_rate_and_the_std_that_was_asked_for(dataset, tmp_path, monkeypatch):
    update, advantages, seen = train_gen.update, grpo.group_advantages, []

    def remember(*given):
        seen.append((given[3].param_groups[0]["lr"], given[3].param_groups[0]["weight_decay"]))
        return update(*given)

    monkeypatch.setattr(train_gen, "update", remember)
    monkeypatch.setattr(grpo, "group_advantages", lambda rewards, global_std: seen.append(global_std) or advantages(
        rewards, global_std=global_std))
    assert train_gen.main(flags(dataset, tmp_path, "--steps", 3)) == 0
    assert seen[::2] == [False] * 3 and [wd for _, wd in seen[1::2]] == [1e-4] * 3
    assert [lr for lr, _ in seen[1::2]] == pytest.approx([1e-3, 5.5e-4, 1e-4])


def test_an_evaluation_draws_the_first_form_and_correlates_each_target_with_its_own_reading(ready, monkeypatch):
    models, rows, args = ready
    read, asked = iter([(row.v, 10 - row.a) for row in rows] * 2), []
    monkeypatch.setattr(type(models.generator), "draw", lambda self, prompts, seeds, *rest: asked.append((prompts, seeds)) or torch.zeros(
        len(prompts), 3, 128, 128, dtype=torch.uint8))
    models = replace(models, judge=None, scorer=None, examiner=None, meter=lambda image: next(read))
    args = Namespace(**vars(args) | {"form": ("words", "numbers"), "reward_weights": {"meter": 1.0}})
    run = Namespace(**vars(RUN), stopped=lambda: False, save_pictures=lambda *_: None)
    found = train_gen.evaluate(models, rows, args, run, 0)
    assert (found["eval_meter_v_spearman"], found["eval_meter_a_spearman"]) == pytest.approx((1, -1))
    assert [prompt for prompts, _ in asked for prompt in prompts] == [row.prompt("words") for row in rows]
    assert [seed for _, seeds in asked for seed in seeds] == [10_000 + i for i in range(len(rows))]
