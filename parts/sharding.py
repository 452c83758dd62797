"""FSDP2: a model whose weights are divided among processes, and gathered a block at a time.

    shard(model, model.blocks, device, ("generate",))    # or build(...), of a checkpoint
    with weights_gathered(model):
        model.generate(...)
    copy = whole(model, make, torch.bfloat16, processes.first)
"""

from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import torch
import torch.distributed as dist
from torch.distributed import fsdp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from parts import weights


def shard(model, blocks, device, methods):
    """Divide a model's weights over all processes; every block is a unit, the rest is the root.

    On GPUs the weights stay float32 and compute in bfloat16. methods: names of those that, like
    forward, need the root's weights.
    """
    if not dist.is_initialized():  # one process that nobody started as one of several
        if device.type == "cuda":
            torch.cuda.set_device(device.index or 0)  # FSDP2 takes the current GPU
        # A group of one. It meets nobody, so its store is a table in memory and needs no port.
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    policy = fsdp.MixedPrecisionPolicy(cast_forward_inputs=False)  # angles stay float32
    if device.type == "cuda":
        policy = fsdp.MixedPrecisionPolicy(
            torch.bfloat16, torch.float32, cast_forward_inputs=False)
    # Without a mesh FSDP2 takes the GPUs of a machine that has some, also for --device cpu.
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    # A unit is gathered as a whole, so the units are what a GPU holds at a time: one block.
    for block in blocks:
        fsdp.fully_shard(block, mesh=mesh, mp_policy=policy)
    fsdp.fully_shard(model, mesh=mesh, mp_policy=policy)
    for name in methods:
        fsdp.register_fsdp_forward_method(model, name)


def load(kind, source, processes, methods, dtype=None):
    """A model of the class `kind`, sharded except in one process on a CPU. methods: see `shard`."""
    builder = weights.build
    # FSDP2 is also what lets one GPU keep float32 weights and compute in bfloat16.
    if processes.world > 1 or processes.device.type == "cuda":
        builder = partial(build, methods=methods)
    return kind.from_pretrained(source, processes.device, dtype, builder)


def build(make, views, entries, what, device, dtype, optional, methods):
    """The model that weights.build would return, sharded: each process reads only its own rows.

    A unit is each part of a ModuleList. methods: as for `shard`.
    """
    # 1. The whole model has shapes only, which say what must be in the file and where it belongs.
    model = weights.without_memory(make, what, device, dtype)
    targets_of = views(model)
    weights.check(targets_of, entries, what, optional)
    names = {tensor: name for name, tensor in model.state_dict(keep_vars=True).items()}
    # 2. Memory is allocated for this process's part alone.
    lists = [module for module in model.modules() if isinstance(module, torch.nn.ModuleList)]
    blocks = [block for each in lists for block in each]
    shard(model, blocks, torch.device(device), methods)
    model.to_empty(device=device)
    # 3. What lies in it of each target is read as if it were a tensor of its own in the file.
    parts = model.state_dict(keep_vars=True)
    own_views = {}
    own_entries = {}
    for name, targets in targets_of.items():
        entry = entries[name]
        row = 0  # of the file's tensor, where the target begins
        for target in targets:
            owner = target if target._base is None else target._base  # of which it is some rows
            part, before = weights.own_rows(parts[names[owner]])
            width = owner[0].numel()
            first = target.storage_offset() // width
            # rows of the owner that lie in the target and in this process's part
            begin = max(first, before)
            end = min(first + len(target), before + len(part))
            if begin < end:
                rows = part[begin - before:end - before]
                at = row + begin - first
                start = entry.start + at * width * entry.dtype.itemsize
                own_views[f"{name} from row {at} on"] = [rows]
                own_entries[f"{name} from row {at} on"] = replace(entry, start=start)
            row += len(target)
    weights.fill(own_views, own_entries)
    return model


@contextmanager
def weights_gathered(model):
    """Within it a block's weights are gathered once and stay, for a generation of many tokens."""
    sharded = [module for module in model.modules() if isinstance(module, fsdp.FSDPModule)]
    blocks = sharded[1:]  # the first is the model itself, which keeps its own weights anyway
    for module in blocks:
        module.set_reshard_after_forward(False, recurse=False)
    try:
        yield
    finally:
        for module in blocks:
            module.set_reshard_after_forward(True, recurse=False)
        for module in sharded:
            module.reshard()


def whole(model, make, dtype, keep):
    """make(), on the CPU, with the weights of a model, sharded or not, as `dtype`.

    All processes must call it; those that do not keep the weights get None.
    """
    kept = {}
    for name, weight in model.named_parameters():
        weight = weight.detach().to(dtype)  # before it is sent, so that half as much is sent
        if isinstance(weight, DTensor):
            weight = weight.full_tensor()  # the processes give each other their parts
        if keep:
            kept[name] = weight.cpu()
    if not keep:
        return None
    with torch.device("meta"):
        copy = make()
    copy.load_state_dict(kept, assign=True)
    return copy


def clip_grad_norm(parameters, limit):
    """Scale gradients, sharded or not, down to a norm; returns the norm they had, a number."""
    norm = torch.nn.utils.clip_grad_norm_(parameters, limit)
    return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
