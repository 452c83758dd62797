"""Linear layers on a CPU from weights that lie as oneDNN reads them fastest.

oneDNN multiplies faster by a copy of W that lies in blocks: a tenth with many rows, two to four
times with few, where all that counts is how fast W can be read. The copy of a frozen W is kept
until W changes or is gone, so that the next answers or pictures need not make it again.
"""

import contextlib

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.weak import WeakTensorKeyDictionary

from parts import ops

COPIES = WeakTensorKeyDictionary()  # {W: (what it was made from and for, the copy)}


def fast_linear(weight, bias=None, copy=True):
    """A function x [...,D] -> x·Wᵀ + bias of a frozen W [V,D].

    With copy it multiplies by a copy as large as W. Without one oneDNN is still faster than torch's
    own product of a few hundred rows. gelu=True: GELU (tanh form) while the result is in the cache.
    """
    on_cpu = weight.device.type == "cpu" and weight.dtype == torch.float32
    if not (on_cpu and torch.backends.mkldnn.is_available()):
        return lambda x, gelu=False: plain_linear(x, weight, bias, gelu)
    ready = []  # W as it is multiplied by

    def product(x, gelu=False):
        # The best layout depends on the number of rows, which the first call shows.
        if not ready:
            ready.append(copy_of(weight, x.numel() // x.shape[-1]) if copy else weight.detach())
        # oneDNN's name for what it applies to a result before it is written.
        after = ("gelu", [], "tanh") if gelu else ("none", [], "")
        return torch.ops.mkldnn._linear_pointwise(x, ready[0], bias, *after)

    return product


def copy_of(weight, rows):
    """The copy of W for products of `rows` rows: the kept one if W still is what it was made from.

    torch counts a tensor's changes in place, but for those by AdamW(fused=True) and through p.data,
    which weights in training may see; a new p.data lies elsewhere.
    """
    made_for = weight._version, weight.data_ptr(), rows
    kept_for, copy = COPIES.get(weight, (None, None))
    if kept_for != made_for:
        copy = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), rows)
        if not weight.requires_grad:
            COPIES[weight] = made_for, copy
    return copy


def plain_linear(x, weight, bias, gelu=False):
    y = F.linear(x, weight, bias)
    return F.gelu(y, approximate="tanh") if gelu else y


def is_compiled(module):
    """Whether nn.Module.compile was called on a part of a module."""
    return any(part._compiled_call_impl is not None for part in module.modules())


@contextlib.contextmanager
def fast_linears(module, copy=True):
    """Within this context every nn.Linear of a module is computed by `fast_linear`.

    Left alone is what FSDP2 shards, whose weights come and go, and what torch.compile has taken.
    """
    layers = []
    if not (ops.is_sharded(module) or is_compiled(module)):
        layers = [layer for layer in module.modules() if type(layer) is nn.Linear]
    for layer in layers:
        # The instance attribute hides nn.Linear.forward.
        layer.forward = fast_linear(layer.weight, layer.bias, copy)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward
