"""Processes; a run's folder: checkpoints that survive a kill, the log, curves, signals."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from parts import lora
from parts.cli import UserError
from parts.files import read_records, whole_records
from parts.run import (
    EMA,
    KEEP,
    Processes,
    Run,
    batch_indices,
    disk_parts,
    draw_curves,
    evaluation_due,
    in_bytes,
    linear,
    sizes,
    start_processes,
    steps_bar,
)
from tests.launch import locked

ALONE = Processes(0, 1, torch.device("cpu"))


def make(folder, **settings):
    return Run(folder, {"lr": 0.1, "seed": 0, **settings}, ALONE)


def test_a_checkpoint_comes_back_as_it_was_written(tmp_path):
    run = make(tmp_path)
    state = {"x": torch.zeros(4)}
    assert run.load(state, 99) == 0
    run.save(3, {"x": torch.arange(4.0)})
    assert make(tmp_path).load(state, 99) == 3 and state["x"].tolist() == [0, 1, 2, 3]
    with pytest.raises(UserError, match="--steps 2: .*checkpoint-00000003 is further already"):
        make(tmp_path).load(state, 2)


def test_only_the_last_two_checkpoints_are_kept(tmp_path):
    run = make(tmp_path)
    for step in (2, 9, 10, 11):
        run.save(step, {})
    assert [folder.name for folder in run.checkpoints()] == ["checkpoint-00000010", "checkpoint-00000011"]


def test_a_run_killed_while_it_removes_an_old_checkpoint_leaves_none_that_counts(tmp_path, monkeypatch):
    run = make(tmp_path)
    for step in (2, 4):
        run.save(step, {})
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda path: (Path(path) / ".metadata").unlink() or 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run.save(6, {})
    assert [folder.name[-8:] for folder in run.checkpoints()] == ["00000004", "00000006"]
    assert make(tmp_path).load({}, 99) == 6 and not list(tmp_path.glob("*.tmp"))


def test_adapters_without_figures_go_but_for_the_newest(tmp_path):
    run, model = make(tmp_path), torch.nn.ModuleDict({"layer": torch.nn.Linear(4, 3)})
    lora.add_lora(model, {"layer": {"layer": 3}}, 2, 2.0)
    ema = EMA(list(lora.lora_layers(model)["layer"].parameters()), 0.5)
    for step in range(8):
        run.log({"step": step, **({"eval_gap": 0.5} if step in (1, 3) else {})})
        run.save_adapter(model, "base", ema)
    assert sorted(int(folder.name) for folder in (tmp_path / "adapters").iterdir()) == [1, 3, 6, 7]


def test_a_half_written_checkpoint_is_ignored_and_removed(tmp_path):
    make(tmp_path).save(2, {})
    half = tmp_path / "checkpoint-00000004.tmp"
    half.mkdir()
    (half / "__0_0.distcp").write_bytes(b"PK\x03\x04 half")
    assert make(tmp_path).load({}, 99) == 2
    assert not half.exists()


def flip(path, at, bit=3):
    data = bytearray(path.read_bytes())
    data[at % len(data)] ^= 1 << bit
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata"])
def test_a_bit_that_flipped_anywhere_makes_a_run_go_on_from_the_checkpoint_before(tmp_path, capsys, name):
    run = make(tmp_path)
    for step in (2, 4):
        run.save(step, {"x": torch.full((1000,), float(step))})
    path, rng = tmp_path / "checkpoint-00000004" / name, np.random.default_rng(0)
    whole = path.read_bytes()
    for at in rng.integers(len(whole), size=25).tolist():
        flip(path, at)
        state = {"x": torch.zeros(1000)}
        assert run.load(state, 99) == 2 and state["x"].tolist() == [2.0] * 1000
        assert f"checkpoint-00000004: {name} damaged; the checkpoint before is used" in capsys.readouterr().err
        path.write_bytes(whole)
    assert run.load(state, 99) == 4
    path.write_bytes(whole[:-100])
    assert run.load(state, 99) == 2
    path.unlink()
    assert run.load(state, 99) == 2


def test_a_run_whose_checkpoints_are_all_damaged_says_so(tmp_path):
    run = make(tmp_path)
    run.save(2, {"x": torch.zeros(1000)})
    flip(tmp_path / "checkpoint-00000002" / "__0_0.distcp", 300)
    with pytest.raises(UserError, match="all of its checkpoints are damaged"):
        run.load({"x": torch.zeros(1000)}, 99)


def test_what_is_not_finite_is_never_saved(tmp_path):
    run = make(tmp_path)
    run.save(2, {"x": torch.ones(3)})
    for bad in (math.nan, math.inf):
        with pytest.raises(UserError, match="after step 4 .* is not finite and was not saved; .* has that of step 2"):
            run.save(4, {"x": torch.tensor([1.0, bad, 1.0])})
    assert [folder.name for folder in run.checkpoints()] == ["checkpoint-00000002"]


def test_steps_without_a_finite_gradient_are_counted_and_the_third_in_a_row_ends_the_run(tmp_path):
    run = make(tmp_path)
    found = [run.count_skipped(norm, [{"row": "r7", "seed": 3}]) for norm in (0.5, math.nan, math.inf, 1.0, math.nan, math.nan)]
    assert found == [0, 1, 1, 0, 1, 1]
    with pytest.raises(UserError, match="3 steps in a row had no finite gradient .* is in .*skipped.jsonl"):
        run.count_skipped(math.nan, [{"row": "r8", "seed": 4}])
    assert read_records(tmp_path / "skipped.jsonl") == [{"row": "r8", "seed": 4}]


def test_a_judge_that_answers_garbage_is_noticed_once(tmp_path, capsys):
    run = make(tmp_path)
    for share in (None, 0.1, 0.2, 0.35, 0.9):
        run.warn("cannot be read", share)
    assert capsys.readouterr().err == "35% of the judge's answers cannot be read; look at the judge before the rewards\n"


def test_a_second_run_in_the_same_folder_is_refused_while_the_first_goes_on(tmp_path):
    with locked(tmp_path / ".lock"), pytest.raises(UserError, match="another run is writing there"):
        make(tmp_path)
    make(tmp_path)  # the other has ended
    with pytest.raises(BlockingIOError), locked(tmp_path / ".lock"):
        pass


def test_a_start_that_fails_leaves_no_settings(tmp_path):
    make(tmp_path, lr=0.2)  # models are loaded next, and one is missing
    make(tmp_path).read_log(0)
    assert json.loads((tmp_path / "settings.json").read_text())["lr"] == 0.1


def test_a_folder_goes_on_with_the_same_settings_only(tmp_path):
    make(tmp_path).read_log(0)
    make(tmp_path, lr=0.3).read_log(0)  # nothing was done yet, so a start that failed binds nobody
    run = make(tmp_path)
    run.read_log(0)
    run.log({"step": 0})
    make(tmp_path, save_every=7)
    with pytest.raises(UserError, match=r"holds a run with lr 0.1, not 0.2; choose another --out"):
        make(tmp_path, lr=0.2)


def test_a_folder_goes_on_with_the_same_files_of_models_only(tmp_path, capsys):
    settings = {"judge": "some/judge", "init_adapter": "an/adapter"}
    run = make(tmp_path, **settings)
    run.read_log(0)
    run.log({"step": 2})
    run.save(2, {})
    before = {"judge": "12ab", "init_adapter": "34cd"}
    make(tmp_path, **settings, files=before).read_log(2)  # a run of an older version, which has kept none
    assert "does not say of which files its models were; those there are now are taken" in capsys.readouterr().err
    make(tmp_path, **settings, files=before)
    make(tmp_path, **settings, files={**before, "init_adapter": "now another"})  # the checkpoint has replaced it
    assert not capsys.readouterr().err
    with pytest.raises(UserError, match="holds a run with other files of --judge some/judge; put those back") as raised:
        make(tmp_path, **settings, files={**before, "judge": "56ef"})
    assert "\n" not in str(raised.value)
    shutil.rmtree(tmp_path / "checkpoint-00000002")
    with pytest.raises(UserError, match="other files of --init-adapter an/adapter;"):
        make(tmp_path, **settings, files={**before, "init_adapter": "now another"})


def test_a_run_says_what_it_takes_of_the_disk_and_whether_there_is_room(tmp_path, monkeypatch, capsys):
    run, args = make(tmp_path), Namespace(steps=1000, eval_every=60)
    state = {"x": torch.empty(10**6, device="meta"), "y": torch.empty(500, dtype=torch.bfloat16, device="meta")}
    assert disk_parts(state, 75e6, args, True) == {
        "checkpoints": (KEEP + 1, 4 * 10**6 + 1000 + 2 * 1800), "adapters": (17 + KEEP + 2, 75e6),
        "strips of pictures": (18, 2 * 6 * 128 * 128 * 3), "lines of the log": (1000, 2000), "sheet of curves": (1, 200_000)}
    assert disk_parts(state, 75e6, Namespace(steps=60, eval_every=0), False)["export"] == (1, 75e6)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10**9))
    run.say_disk(state, 75e6, args, on_the_way=True)
    said = capsys.readouterr().err
    assert said.startswith(f"disk: {tmp_path} takes at most 1.6 GB (3 checkpoints of 4.0 MB, 21 adapters of 75.0 MB, ")
    assert said.splitlines()[0].endswith("; 1.0 GB are free") and "warning: that is 600 MB more than there may be" in said
    (tmp_path / "held.bin").write_bytes(b"x" * 10**6)  # what the run has written already needs no more room
    run.say_disk(state, 75e6, args, on_the_way=True)
    assert "599 MB more" in capsys.readouterr().err
    run.say_disk(state, 1e6, args)
    assert "warning" not in capsys.readouterr().err
    assert [in_bytes(size) for size in (2_000, 1_910_000, 123.4e6, 16.6e9, 1.2e12)] == [
        "2.0 KB", "1.9 MB", "123 MB", "16.6 GB", "1,200 GB"]


def test_the_log_forgets_what_came_after_the_checkpoint(tmp_path):
    run = make(tmp_path)
    for step in range(6):
        run.log({"step": step, "loss": 1 / 3, "bad": math.nan})
    with open(run.log_path, "a") as f:
        f.write('{"step": 6, "lo')  # killed while writing
    again = make(tmp_path)
    assert again.read_log(3)["step"] == 3
    lines = [json.loads(line) for line in run.log_path.read_text().splitlines()]
    assert [r["step"] for r in lines] == [0, 1, 2, 3] == [r["step"] for r in again.records]
    again.log({**again.records[-1], "eval_gap": 0.5})  # the same step with its evaluation
    assert read_records(run.log_path)[2:] == again.records[2:] == [lines[2], {**lines[3], "eval_gap": 0.5}]
    again.log({"step": 4})
    assert read_records(run.log_path) == again.records and len(again.records) == 5
    assert lines[0] == {"step": 0, "loss": 0.3333333, "bad": None}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_asks_the_run_to_stop_and_the_old_handler_comes_back(tmp_path, number, capfd):
    before, run = signal.getsignal(number), make(tmp_path)
    with run:
        assert not run.stopped()
        os.kill(os.getpid(), number)
        assert run.stopped() and run.stop_code(7) == 128 + number
        asked, stopped = capfd.readouterr().err.strip().splitlines()
        assert asked.startswith("asked to stop: ") and stopped.startswith("stopped after step 7;")
        os.kill(os.getpid(), number)  # the same wish, sent twice at one time
        assert not capfd.readouterr().err
    assert signal.getsignal(number) == before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_at_once(tmp_path, monkeypatch, number):
    monkeypatch.setattr("parts.run.AGAIN", 0)
    with pytest.raises(KeyboardInterrupt), make(tmp_path):
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)


def test_work_is_broken_off_between_its_parts_but_one_is_done(tmp_path):
    with make(tmp_path) as run:
        assert list(run.until_asked(range(3))) == [0, 1, 2]
        os.kill(os.getpid(), signal.SIGTERM)
        assert list(run.until_asked(range(3))) == [0]


def test_a_checkpoint_is_due_by_steps_minutes_and_at_the_end(tmp_path):
    run, args = make(tmp_path), Namespace(steps=10, save_every=4, save_minutes=0.0)
    assert [step for step in range(1, 11) if run.save_due(step, args)] == [4, 8, 10]
    args.save_minutes = 5.0
    assert not run.save_due(3, args)
    run.saved_at -= 300
    assert run.save_due(3, args)
    run.save(3, {})
    assert run.saved == 3 and not run.save_due(5, args)


def test_an_evaluation_is_due_at_both_ends_and_in_between():
    args = Namespace(steps=5, eval_every=0)
    assert [step for step in range(6) if evaluation_due(step, args)] == [0, 5]
    args.eval_every = 2
    assert [step for step in range(6) if evaluation_due(step, args)] == [0, 2, 4, 5]


def test_curves_show_every_key_that_has_numbers():
    rng = np.random.default_rng(0)
    records = [{"step": i, "reward": i / 50 + rng.normal() / 5, "kl": None} for i in range(50)]
    records[-1]["eval"] = 0.5
    with_one, with_two = (np.asarray(draw_curves(records, keys, "t")) for keys in (["reward"], ["reward", "eval", "kl"]))
    blue = [int(((x == (30, 90, 200)).all(-1)).sum()) for x in (with_one, with_two)]
    assert blue[0] > 100 and blue[1] > blue[0]  # the line, then also a dot for the single value
    assert with_two.shape == (28 + 170, 900, 3)


def test_the_pictures_of_all_evaluations_lie_under_one_another(tmp_path):
    run = make(tmp_path)
    for step, grey in ((0, 10), (8, 200)):
        run.save_pictures(step, [Image.new("RGB", (16, 16), (grey + i,) * 3) for i in range(3)])
    sheet = np.asarray(Image.open(tmp_path / "strip.png"))
    assert sheet.shape == (32, 48, 3) and sheet[::16, ::16, 0].tolist() == [[10, 11, 12], [200, 201, 202]]


def test_a_run_may_go_on_with_more_watched_pictures(tmp_path):
    run = make(tmp_path)
    for step, count in ((0, 2), (8, 3)):
        run.save_pictures(step, [Image.new("RGB", (16, 16))] * count)
    sheet = np.asarray(Image.open(tmp_path / "strip.png"))
    assert sheet.shape == (32, 48, 3) and (sheet[:16, 32:] == 255).all() and (sheet[:16, :32] == 0).all()


def test_the_table_has_the_first_and_the_last_evaluation(tmp_path):
    run = make(tmp_path)
    for record in ({"step": 0, "eval_v_error": 1.0, "eval_gap": math.nan}, {"step": 1, "loss": 2.0},
                   {"step": 2, "eval_v_error": 0.5, "eval_gap": 0.25}, {"step": 3, "loss": 1.0}):
        run.log(record)
    assert run.evaluations().splitlines() == [
        "|  | v error | gap |", "| --- | --- | --- |", "| before | 1.000 | - |", "| after | 0.500 | 0.250 |"]


def test_the_average_stands_in_and_goes_away_again():
    p = torch.nn.Parameter(torch.zeros(3))
    ema = EMA([p], 0.5)
    p.data += 2
    ema.add(100)
    with ema:
        assert p.tolist() == [1, 1, 1]
    assert p.tolist() == [2, 2, 2] and ema.values[0].tolist() == [1, 1, 1]


def test_every_epoch_is_a_permutation_of_its_own():
    indices = [i for step in range(6) for i in batch_indices(step, 4, 8, seed=1)]
    epochs = [indices[start:start + 8] for start in (0, 8, 16)]
    assert all(sorted(epoch) == list(range(8)) for epoch in epochs) and epochs[0] != epochs[1] != epochs[2]
    assert batch_indices(0, 24, 8, seed=1) == indices  # also when a batch is longer than an epoch
    assert indices[:4] != batch_indices(0, 4, 8, seed=2)


def test_a_run_that_has_all_its_steps_says_that_nothing_is_trained(capsys):
    assert list(steps_bar("title", 2, 2, ALONE)) == []
    assert "has its 2 steps already, so nothing is trained" in capsys.readouterr().err


def test_the_learning_rate_goes_from_its_first_value_to_its_last():
    assert [linear(1.0, 0.5, step, 3) for step in range(3)] == [1.0, 0.75, 0.5]
    assert linear(1.0, 0.5, 0, 1) == 1.0


def test_shares_are_equal_and_cover_everything():
    parts = [Processes(r, 3, torch.device("cpu")).share(list(range(12))) for r in range(3)]
    assert [x for part in parts for x in part] == list(range(12)) and {len(p) for p in parts} == {4}
    with pytest.raises(UserError, match="cannot be shared by 3"):
        Processes(0, 3, torch.device("cpu")).share([1, 2])


def test_a_gpu_that_is_not_there_is_refused():
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="sees no GPU"):
            start_processes("cuda")


@pytest.mark.parametrize("half", [b"", b'{"id": "ha', b'{"id": 3}'], ids=["whole", "torn", "without its end of line"])
@pytest.mark.parametrize("lines", [b"", b'{"id": 1}\n{"id": 2}\n'], ids=["none before", "two before"])
def test_what_is_appended_after_a_half_written_line_can_be_read(tmp_path, lines, half):
    path = tmp_path / "records.jsonl"
    assert whole_records(path) == []
    path.write_bytes(lines + half)
    kept = whole_records(path)
    assert path.read_bytes() == lines and len(kept) == lines.count(b"\n")
    with open(path, "a") as f:
        f.write('{"id": 9}\n')
    assert read_records(path) == [*kept, {"id": 9}]


def test_a_run_says_how_much_is_trained_and_by_how_many_threads():
    model = torch.nn.Sequential(torch.nn.Linear(999, 1000), torch.nn.Linear(1000, 999).requires_grad_(False))
    said = sizes(model, ALONE)
    assert said == f"1.00 M trained of 2.0 M, on 1 × cpu, {torch.get_num_threads()} threads each"
    assert sizes(model, Processes(0, 8, torch.device("cuda"))) == "1.00 M trained of 2.0 M, on 8 × cuda"


class Board:
    """TensorBoard's writer, as far as it is used: {(name, step): values in the order written}."""

    def __init__(self, folder):
        self.folder, self.shown = folder, {}
        Path(folder).mkdir(parents=True)

    def add_scalar(self, name, value, step):
        self.shown.setdefault((name, step), []).append(value)

    def flush(self):
        pass


def test_tensorboard_shows_what_the_log_has_and_nothing_of_steps_that_are_undone(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=Board))
    run = make(tmp_path, tensorboard=True)
    run.read_log(0)
    for step in (1, 2, 3):
        run.log({"step": step, "loss": step / 2, "kl": math.nan})
    assert run.writer.folder == str(tmp_path / "tensorboard")
    assert run.writer.shown == {("loss", 1): [0.5], ("loss", 2): [1.0], ("loss", 3): [1.5]}
    again = make(tmp_path, tensorboard=True)  # goes on after step 1; the old files would still show 2 and 3
    again.read_log(1)
    again.log({"step": 2, "loss": 7.0})
    assert again.writer.shown == {("loss", 1): [0.5], ("loss", 2): [7.0]}
    assert make(tmp_path).writer is None  # the flag is no setting: without it the same run goes on


def test_tensorboard_where_it_is_not_installed_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UserError, match="--tensorboard: not installed here .*; pip install tensorboard, or leave it out"):
        make(tmp_path / "run", tensorboard=True)
    assert not (tmp_path / "run").exists()


READ_BY_TENSORBOARD = """
import sys, torch
from parts.run import Processes, Run
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
folder = sys.argv[1]
for done, first in ((0, 1), (1, 10)):
    run = Run(folder, {"tensorboard": True}, Processes(0, 1, torch.device("cpu")))
    run.read_log(done)
    for step in range(done + 1, 4):
        run.log({"step": step, "loss": float(first * step)})
events = EventAccumulator(f"{folder}/tensorboard").Reload()
print([(event.step, event.value) for event in events.Scalars("loss")])
"""


@pytest.mark.slow
def test_tensorboard_itself_reads_the_figures(tmp_path):
    """Needs tensorboard, in this Python or in the one of $OTHER_PYTHON."""
    python = os.environ.get("OTHER_PYTHON", sys.executable)
    read = subprocess.run([python, "-c", READ_BY_TENSORBOARD, str(tmp_path)], capture_output=True, text=True)
    assert read.stdout.strip() == "[(1, 1.0), (2, 20.0), (3, 30.0)]", read.stderr[-2000:]


def test_the_average_soon_forgets_its_first_steps_and_then_keeps_its_decay():
    p = torch.nn.Parameter(torch.zeros(1))
    ema, found = EMA([p], 0.9), []
    for step, value in ((0, 1.0), (8, 1.0), (1000, 0.0)):
        p.data.fill_(value)
        ema.add(step)
        found.append(ema.values[0].item())
    assert found == pytest.approx([0.9, 0.95, 0.855])  # decays of 1/10, 9/18 and 0.9


def test_the_epochs_of_one_seed_are_not_those_of_the_next():
    second = [i for step in (2, 3) for i in batch_indices(step, 4, 8, seed=0)]
    assert second != [i for step in (0, 1) for i in batch_indices(step, 4, 8, seed=1)]
