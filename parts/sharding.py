"""FSDP2: a model whose weights are divided among processes, and gathered a block at a time.

    shard(model, model.blocks, device, ("generate",))
    with weights_gathered(model):
        model.generate(...)
    whole(model, make).save_pretrained(...)
"""

from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch.distributed import fsdp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor


def shard(model, blocks, device, methods):
    """Divide a model's weights over all processes; every block is a unit, the rest is the root.

    On GPUs the weights stay float32 and compute in bfloat16. methods: names of those that, like
    forward, need the root's weights.
    """
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


def whole(model, make):
    """make(), on the CPU, with the weights of a model, sharded or not; all processes must call."""
    weights = {}
    for name, weight in model.named_parameters():
        weight = weight.detach()
        if isinstance(weight, DTensor):
            weight = weight.full_tensor()  # the processes give each other their parts
        weights[name] = weight.cpu()
    with torch.device("meta"):
        copy = make()
    copy.load_state_dict(weights, assign=True)
    return copy


def clip_grad_norm(parameters, limit):
    """Scale gradients, sharded or not, down to a norm; returns the norm they had, a number."""
    norm = torch.nn.utils.clip_grad_norm_(parameters, limit)
    return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
