"""Checkpoints: bit for bit, on other numbers of processes, damaged ones, and foreign code."""

import io
import os
import pickle
import shutil

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.checkpoint import metadata

from parts import checkpoints, sharding
from parts.cli import UserError
from parts.run import EMA, Processes, Run, batch_indices

STATE = {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor(7.0)}


def zeros():
    return {name: torch.zeros_like(tensor) for name, tensor in STATE.items()}


def test_optimizer_and_averages_are_restored_bit_for_bit(tmp_path):
    def steps(p, optimizer, ema, count):
        for i in range(count):
            p.grad = torch.full_like(p, 0.1 * (i + 1))
            optimizer.step()
            ema.add(i)

    def start():
        p = torch.nn.Parameter(torch.linspace(-1, 1, 5))
        return p, torch.optim.AdamW([p], lr=0.1), EMA([p], 0.5)

    p, *rest = start()
    steps(p, *rest, 3)
    checkpoints.write(tmp_path, checkpoints.state_of(*rest))
    steps(p, *rest, 2)
    q, *others = start()
    checkpoints.read(tmp_path, checkpoints.state_of(*others))
    steps(q, *others, 2)
    assert torch.equal(p, q) and torch.equal(rest[1].values[0], others[1].values[0])


def test_a_state_that_was_asked_for_before_the_first_step_changes_nothing():
    def end(ask):
        p = torch.nn.Parameter(torch.linspace(-1, 1, 5))
        optimizer = torch.optim.AdamW([p], lr=0.1)
        if ask:
            checkpoints.state_of(optimizer)
        for i in range(3):
            p.grad = torch.full_like(p, 0.1 * (i + 1))
            optimizer.step()
        return p, *optimizer.state[p].values()

    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(end(False), end(True), strict=True))


class Evil:
    def __reduce__(self):
        return os.system, ("touch harm",)


def remove_data(folder):
    (folder / "__0_0.distcp").unlink()


def cut_data(folder):
    path = folder / "__0_0.distcp"
    path.write_bytes(path.read_bytes()[:-100])


def remove_metadata(folder):
    (folder / ".metadata").unlink()


def cut_metadata(folder):
    path = folder / ".metadata"
    path.write_bytes(path.read_bytes()[:-100])


def bring_code(folder):
    (folder / ".metadata").write_bytes(pickle.dumps(Evil()))


@pytest.mark.parametrize("damage", [remove_data, cut_data, remove_metadata, cut_metadata, bring_code])
def test_a_damaged_or_foreign_checkpoint_is_named_in_one_line(tmp_path, monkeypatch, damage, capfd):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "checkpoint-00000002"
    checkpoints.write(folder, STATE)
    checkpoints.read(folder, zeros())
    damage(folder)
    with pytest.raises(UserError, match="checkpoint-00000002: damaged or incomplete .*; delete it") as raised:
        checkpoints.read(folder, zeros())
    assert "\n" not in str(raised.value) and not capfd.readouterr().err
    assert not (tmp_path / "harm").exists()


def attribute(of, name):
    """What getattr(of, name) is pickled as; Python 3.11.2 does so with a member of an enum."""
    class Pickled:
        def __reduce__(self):
            return getattr, (of, name)

    return io.BytesIO(pickle.dumps(Pickled()))


def test_a_table_may_have_members_of_enums_as_an_early_python_writes_them_and_no_other_attribute():
    kind = metadata._MEM_FORMAT_ENCODING
    for member in kind:
        assert checkpoints.MetadataUnpickler(attribute(kind, member.name)).load() is member
    for of, name in ((metadata.TensorProperties, "create_from_tensor"), (kind, "__init__")):
        with pytest.raises((ValueError, KeyError)):
            checkpoints.MetadataUnpickler(attribute(of, name)).load()


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    checkpoints.write(tmp_path, STATE)
    for state in ({"c": torch.zeros(1)}, {"a": torch.zeros(5, 3)}):
        with pytest.raises(UserError, match="damaged or incomplete"):
            checkpoints.read(tmp_path, state)


def test_a_full_disk_ends_with_its_own_error(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints.checkpoint.FileSystemWriter, "write_data", full)
    with pytest.raises(OSError, match="No space left"):
        checkpoints.write(tmp_path, STATE)


# ----------------------------------------------------------------------------------------------------------------------
# Other numbers of processes: a small model, sharded by FSDP2 or held by all, on gloo


ROWS = torch.randn(12, 5, generator=torch.Generator().manual_seed(1))


def train(rank, world, folder, out, sharded, first, last):
    """Steps first..last of a training in `folder`; writes which rows were seen, and the weights, into `out`."""
    torch.set_num_threads(1)
    if world > 1:
        dist.init_process_group("gloo", rank=rank, world_size=world, init_method=f"file://{out}.meeting")
    processes = Processes(rank, world, torch.device("cpu"))
    torch.manual_seed(rank)  # what is loaded replaces it
    model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Tanh(), torch.nn.Linear(7, 3))  # which 2 and 4 do not divide
    if first == 0:
        for p in model.parameters():
            torch.nn.init.constant_(p, 0.1)
            p.data += torch.linspace(0, 1, p.numel()).view(p.shape)
    if sharded and world > 1:
        sharding.shard(model, [model[0]], processes.device, ())
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    ema = None if sharded else EMA(parameters, 0.5)
    run = Run(folder, {}, processes)
    assert run.load(checkpoints.state_of(optimizer, ema), 99) == first
    seen = []
    for step in range(first, last):
        indices = batch_indices(step, 4, len(ROWS), seed=3)
        seen.append(processes.gather(processes.share(indices)))
        optimizer.zero_grad()
        model(ROWS[processes.share(indices)]).square().mean().backward()
        if not sharded:
            processes.average_gradients(parameters)
            ema.add(step)
        optimizer.step()
        run.save(step + 1, checkpoints.state_of(optimizer, ema))
    whole = [p.full_tensor() if sharded and world > 1 else p for p in (p.detach() for p in parameters)]
    if processes.first:
        torch.save({"seen": seen, "weights": whole + (ema.values if ema else [])}, out)
    processes.wait()
    if world > 1:
        dist.destroy_process_group()


def in_processes(world, *args):
    if world == 1:
        train(0, 1, *args)
    else:
        method = "spawn" if torch.cuda.is_available() else "fork"  # fork need not import torch anew, but CUDA forbids it
        mp.start_processes(train, (world, *args), nprocs=world, start_method=method)
    return torch.load(args[1])


@pytest.mark.parametrize("sharded", [True, False], ids=["sharded", "held by all"])
def test_a_run_goes_on_with_any_number_of_processes(tmp_path, sharded):
    in_processes(2, tmp_path / "two", tmp_path / "a", sharded, 0, 3)
    sizes = [path.stat().st_size for path in (tmp_path / "two" / "checkpoint-00000003").glob("*.distcp")]
    assert len(sizes) == 2  # each process wrote a part, and none the whole
    ends = {}
    for world in (1, 2, 4):
        folder = tmp_path / f"then {world}"
        shutil.copytree(tmp_path / "two", folder)
        ends[world] = in_processes(world, folder, tmp_path / f"end{world}", sharded, 3, 5)
    unbroken = in_processes(2, tmp_path / "unbroken", tmp_path / "b", sharded, 0, 5)
    assert all(torch.equal(a, b) for a, b in zip(ends[2]["weights"], unbroken["weights"], strict=True))
    for world in (1, 4):
        assert ends[world]["seen"] == ends[2]["seen"] == unbroken["seen"][3:]
        for a, b in zip(ends[world]["weights"], ends[2]["weights"], strict=True):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=0)
