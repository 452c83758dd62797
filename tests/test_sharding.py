"""Weights divided among processes: on the device that was asked for, read and written a part at a time."""

from argparse import Namespace
from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor

import qwen_vl
import train_judge
from parts import chat, lora, ops, sharding, weights
from parts.cli import UserError
from parts.run import Processes

CPU = torch.device("cpu")
SHARDED = partial(sharding.build, methods=("completion_hidden", "generate"))
# Sizes that neither 2 nor 5 processes divide, and 4 rows of most of the vision tower for 5 processes.
ODD = {"width": 24, "layers": 2, "heads": 2, "kv_heads": 1, "mlp": 33, "sections": (2, 2, 2), "vision_width": 4,
       "vision_layers": 2, "vision_heads": 1, "vision_mlp": 7, "patch": 16, "full_blocks": (1,)}


@pytest.fixture
def group(tmp_path):
    dist.init_process_group("gloo", rank=0, world_size=1, init_method=f"file://{tmp_path}/meeting")
    yield
    dist.destroy_process_group()


def test_weights_lie_on_the_device_that_was_asked_for_also_beside_a_gpu(group, monkeypatch):
    plain, meshes = sharding.fsdp.fully_shard, []

    def watched(module, **options):
        meshes.append(options["mesh"])  # without one FSDP2 looks for a GPU itself
        return plain(module, **options)

    monkeypatch.setattr(sharding.fsdp, "fully_shard", watched)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    sharding.shard(model, [model[0]], CPU, ())
    assert [mesh.device_type for mesh in meshes] == ["cpu", "cpu"]
    assert all(p.device_mesh.device_type == "cpu" for p in model.parameters())
    assert model(torch.ones(1, 3)).shape == (1, 2)


def test_one_process_that_nobody_started_as_one_of_several_makes_a_group_of_its_own():
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    x = torch.rand(5, 3)
    expected = model(x)
    try:
        sharding.shard(model, [model[0]], CPU, ())
        assert dist.get_world_size() == 1
        assert all(isinstance(p, DTensor) for p in model.parameters())
        assert torch.equal(model(x), expected)
    finally:
        dist.destroy_process_group()


def test_answers_may_be_recorded_as_a_graph_only_while_weights_are_kept_gathered(group, tmp_path, monkeypatch):
    write_judge(tmp_path)
    model = qwen_vl.QwenVL.from_pretrained(tmp_path, CPU, None, SHARDED)
    seen = []
    monkeypatch.setattr(ops, "can_record", lambda layers: seen.append(ops.is_whole(layers)))
    question = [{"role": "user", "content": [{"type": "text", "text": "how?"}]}]
    model.generate([question], max_new_tokens=2)
    with sharding.weights_gathered(model):
        model.generate([question], max_new_tokens=2)
        assert ops.is_whole(model.model.layers)
    assert seen == [False, True] and not ops.is_whole(model.model.layers)


# --------------------------------------------------------------------------------------------------
# Checkpoints


def write_judge(folder, **changes):
    """A judge with random weights and the tokenizer of the miniature's; returns it."""
    config = qwen_vl.QwenVLConfig(**qwen_vl.layouts.qwen_fields(train_judge.TINY))
    processor = chat.Processor.from_pretrained(train_judge.TINY, config)
    torch.manual_seed(0)
    config = qwen_vl.QwenVLConfig(**ODD, vocab=config.vocab + 2, image_token=config.image_token, **changes)
    model = qwen_vl.QwenVL(config, processor)
    for p in model.parameters():
        torch.nn.init.normal_(p)
    model.save_pretrained(folder)
    return model


def in_processes(world, work, folder, *args):
    """What work(processes, *args) returns in each of `world` processes on gloo, a list."""
    method = "spawn" if torch.cuda.is_available() else "fork"  # fork need not import torch anew, but CUDA forbids it
    mp.start_processes(in_process, (world, work, folder, args), nprocs=world, start_method=method)
    return [torch.load(folder / f"result-{rank}") for rank in range(world)]


def in_process(rank, world, work, folder, args):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world, init_method=f"file://{folder}/meeting")
    result = work(Processes(rank, world, CPU), *args)
    torch.save(result, folder / f"result-{rank}")
    dist.destroy_process_group()


def read(processes, folder, dtype):
    """(whole weights, bytes that this process read, bytes of its own part, what is trained or in training mode)."""
    counts = []
    plain = weights.read_into

    def counting(file, target, kind, name):
        counts.append(target.numel() * kind.itemsize)
        plain(file, target, kind, name)

    weights.read_into = counting
    try:
        model = qwen_vl.QwenVL.from_pretrained(folder, "cpu", dtype, SHARDED)
    except UserError as error:
        return str(error), sum(counts)
    finally:
        weights.read_into = plain
    whole = {name: p.full_tensor() for name, p in model.named_parameters()}
    own = sum(p.to_local().numel() * p.itemsize for p in model.parameters())
    loose = [name for name, p in model.named_parameters() if p.requires_grad]
    loose += [name for name, module in model.named_modules() if module.training]
    return whole, sum(counts), own, loose


def same(ours, theirs):
    return ours.keys() == theirs.keys() and all(
        ours[name].dtype == theirs[name].dtype and torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("world, tied, newer, dtype", [
    (2, False, False, None), (2, True, True, torch.bfloat16), (5, True, False, None), (5, False, True, torch.bfloat16)])
def test_processes_read_their_own_rows_of_the_weights_that_one_would_read(tmp_path, world, tied, newer, dtype):
    write_judge(tmp_path, tied=tied)
    file = tmp_path / "model.safetensors"
    if newer:
        save_file({f"model.{name}" if name.startswith("visual.") else name.replace("model.", "model.language_model."): tensor
                   for name, tensor in load_file(file).items()}, file)
    expected = qwen_vl.QwenVL.from_pretrained(tmp_path, "cpu", dtype)
    assert any(len(p) % world for p in expected.parameters())
    results = in_processes(world, read, tmp_path, tmp_path, dtype)
    for whole, count, own, loose in results:
        assert same(whole, expected.state_dict()) and not loose
        assert count == own * (2 if dtype else 1)  # each value of the file, in float32, once
        assert count < 1.2 / world * file.stat().st_size
    assert sum(count for _, count, *_ in results) == sum(t.numel() * 4 for t in load_file(file).values())


def swapped_views(model):
    shift, scale = model[0].weight.split([2, 3])
    return {"swapped": [scale, shift], "bias": [model[0].bias]}


def read_swapped(processes, folder):
    model = sharding.build(lambda: torch.nn.Sequential(torch.nn.Linear(3, 5)), swapped_views, weights.index(folder), folder,
                           "cpu", None, (), ())
    return model[0].weight.full_tensor(), model[0].bias.full_tensor()


def test_a_file_may_list_the_parts_of_a_tensor_in_another_order(tmp_path):
    """As SD3.5's shift and scale, which diffusers stores the other way around."""
    saved = {"swapped": torch.randn(5, 3), "bias": torch.randn(5)}
    save_file(saved, tmp_path / "x.safetensors")
    for weight, bias in in_processes(2, read_swapped, tmp_path, tmp_path):
        assert torch.equal(weight, saved["swapped"].roll(2, 0)) and torch.equal(bias, saved["bias"])


def test_a_checkpoint_that_does_not_fit_is_refused_as_by_one_process_before_anything_is_read(tmp_path):
    write_judge(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["extra"] = tensors.pop("model.norm.weight")
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="2 tensors do not fit .*missing model.norm.weight .*unexpected 'extra'") as raised:
        qwen_vl.QwenVL.from_pretrained(tmp_path)
    assert in_processes(2, read, tmp_path, tmp_path, None) == [(str(raised.value), 0)] * 2


@pytest.mark.parametrize("world", [2, 5])
def test_an_adapter_is_merged_into_divided_weights(tmp_path, world):
    model = write_judge(tmp_path / "base")
    base = {name: p.clone() for name, p in model.named_parameters()}
    lora.add_lora(model, model.lora_targets(), 3, 6)
    for p in model.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p)
    lora.save_lora(tmp_path / "adapter", model, tmp_path / "base")
    expected = qwen_vl.QwenVL.from_pretrained(tmp_path / "adapter").state_dict()
    assert not same(expected, base)
    for whole, *_, loose in in_processes(world, read, tmp_path, tmp_path / "adapter", None):
        assert same(whole, expected) and not loose


def export(processes, folder, out):
    model = qwen_vl.QwenVL.from_pretrained(folder, "cpu", None, SHARDED)
    kept = []
    plain = sharding.whole
    train_judge.sharding.whole = lambda *args: kept.append(plain(*args)) or kept[0]
    train_judge.export(model, out, Namespace(lora=False), processes)
    return kept[0] is not None


def test_two_processes_write_the_file_that_one_writes_and_only_the_first_has_all_of_it(tmp_path):
    write_judge(tmp_path)
    model = qwen_vl.QwenVL.from_pretrained(tmp_path)
    train_judge.export(model, tmp_path / "one", Namespace(lora=False), Processes(0, 1, CPU))
    assert in_processes(2, export, tmp_path, tmp_path, tmp_path / "two") == [True, False]
    one, two = (sorted(path for path in (tmp_path / name).rglob("*") if path.is_file()) for name in ("one", "two"))
    assert [path.name for path in one] == [path.name for path in two] and len(one) > 3
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(one, two, strict=True))
    assert load_file(one[0].parent / "model.safetensors")["model.norm.weight"].dtype == torch.bfloat16
