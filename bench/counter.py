"""What operators cost, counted on PyTorch's meta device, where tensors have shapes and no data.

    counter = measure(lambda _: model(x))
    counter.flops, counter.traffic, counter.peak

`bench/plan.py` runs the calls of a training step within it.
"""

import weakref
from collections import namedtuple
from unittest import mock

import torch
import torch.nn.functional as F
from torch.fx.experimental import _config as shape_config
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

import grpo
import qwen_vl
from kernels import log_probs, lora_forms, shared_attention
from parts import lora, ops

aten = torch.ops.aten
# {(operator, what is known of its arguments): its results' shapes, or None if they may depend on
# more}. On the meta device torch finds them out in Python, which takes most of the time here, and
# a model's blocks ask the same again and again.
known_results = {}


Shape = namedtuple("Shape", "size stride dtype device")


class OperatorCounter(TorchDispatchMode):
    """Counts the operators that run inside it, forward and backward.

    flops: of matrix products, convolutions and attention, two for a multiply-add, by the formulas
    of PyTorch's flop counter. traffic: bytes of each operator's inputs and outputs, as kernels that
    are not fused move them. launches: operators that write memory, for each of which the host
    launches one kernel or more. live, peak: bytes of the tensors that were made inside and are
    still held, now and at most. kept: those between a forward and a backward pass. Only tensors on
    `device` count.
    """

    def __init__(self, device="meta"):
        super().__init__()
        self.device = device
        self.flops = 0
        self.traffic = 0
        self.launches = 0
        self.live = 0
        self.peak = 0
        self.kept = 0
        self.storages = set()  # those that are held

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self.device == "meta":
            out = on_meta(operator, args, kwargs)
        else:
            out = operator(*args, **kwargs)
        read = self.tensors((args, kwargs))
        made = self.tensors(out)
        old = {t.untyped_storage()._cdata for t in read}
        new = [t for t in made if t.untyped_storage()._cdata not in old]
        for tensor in new:
            self.hold(tensor.untyped_storage())
        # Without new memory an operator has written in place, or made a view and written nothing.
        if new or operator._schema.is_mutable:
            if operator.overloadpacket in (aten.embedding, aten.index):
                read = made  # they read the rows they take, not the whole table
            elif operator.overloadpacket is aten.index_copy_:
                read = made = [args[-1]]  # nor is more written than the rows of the source
            # addmm_ has the FLOP of addmm
            name = operator.overloadpacket.__name__.removesuffix("_")
            formula = flop_registry.get(getattr(aten, name, None))
            self.flops += formula(*args, **kwargs, out_val=out) if formula else 0
            if read or made:
                self.launches += 1
            for t in (*read, *made):
                # an expanded tensor has more elements than memory
                self.traffic += min(t.numel() * t.element_size(), t.untyped_storage().nbytes())
        return out

    def tensors(self, tree):
        leaves = [x for x in tree_leaves(tree) if isinstance(x, torch.Tensor)]
        return [x for x in leaves if x.device.type == self.device]

    def hold(self, storage):
        """Count a storage as live until it is freed."""
        key = storage._cdata
        if key not in self.storages:
            self.storages.add(key)
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self.release, key, storage.nbytes())

    def release(self, key, size):
        self.storages.discard(key)
        self.live -= size


def on_meta(operator, args, kwargs):
    """operator(*args, **kwargs); new tensors that have the shapes of an earlier call come from
    `known_results`."""
    key = (operator, described(args), described(tuple(kwargs.items())))
    known = known_results.get(key)
    if known is not None:
        return rebuilt(known)
    out = operator(*args, **kwargs)
    if key not in known_results:
        known_results[key] = described(out) if is_new(out, (args, kwargs)) else None
    return out


def described(value):
    """What the shapes of results may depend on: of a tensor its own shape, layout and type."""
    if isinstance(value, torch.Tensor):
        return Shape(value.shape, value.stride(), value.dtype, value.device)
    if isinstance(value, (tuple, list)):
        return tuple(described(x) for x in value)
    return type(value), value  # 1 and 1.0 are equal, and give other types


def is_new(out, given):
    """Whether a result is a tensor on the meta device, or a tuple of them, each in memory of its
    own, and made of nothing but such tensors."""
    before = [x for x in tree_leaves(given) if isinstance(x, torch.Tensor)]
    made = out if isinstance(out, tuple) else (out,)
    if not all(isinstance(x, torch.Tensor) for x in made):
        return False
    if any(x.device.type != "meta" for x in (*before, *made)):
        return False
    storages = {x.untyped_storage()._cdata for x in before}
    for x in made:
        storage = x.untyped_storage()
        whole = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")
        if storage._cdata in storages or storage.nbytes() != whole.untyped_storage().nbytes():
            return False
        storages.add(storage._cdata)
    return True


def rebuilt(known):
    """New tensors of known shapes."""
    if isinstance(known, Shape):
        return torch.empty_strided(known.size, known.stride, dtype=known.dtype, device=known.device)
    return tuple(rebuilt(x) for x in known)


def gpu_attention(q, k, v, attn_mask=None, is_causal=False, scale=None):
    """F.scaled_dot_product_attention by the operators that a GPU runs.

    They keep no [L,L] weights for the backward pass; the meta device, left to itself, takes the
    plain form, which does.
    """
    if attn_mask is None:
        return aten._scaled_dot_product_flash_attention(q, k, v, 0.0, is_causal, scale=scale)[0]
    mask = attn_mask.expand(*q.shape[:3], k.shape[2])
    return aten._scaled_dot_product_efficient_attention(
        q, k, v, mask, torch.is_grad_enabled(), scale=scale)[0]


def gpu_logits(hidden, weight):
    """ops.logits by the product that a GPU takes: into float32, without wide copies of its factors.

    The meta device, left to itself, takes what a CPU does.
    """
    if hidden.dtype == torch.float32:
        return F.linear(hidden, weight)
    return torch.mm(hidden, weight.t(), out_dtype=torch.float32)


def tiled_log_probs(hidden, weight, targets, temperature=1.0):
    """kernels.log_probs.token_log_probs without its look at the targets, which have no values."""
    if torch.is_grad_enabled():
        return log_probs.TokenLogProbs.apply(hidden, weight, targets, temperature)
    return log_probs.scan_vocabulary(hidden, weight, targets, temperature, with_slope=False)[0]


def measure(work, device="meta"):
    """The OperatorCounter of work(counter): by plain forms, but for three forms of kernels/ that
    are themselves written in torch and save much memory or traffic."""
    with (
        OperatorCounter(device) as counter,
        mock.patch.object(F, "scaled_dot_product_attention", gpu_attention),
        mock.patch.object(ops, "logits", gpu_logits),
        mock.patch.dict(grpo.token_log_probs.forms, meta=tiled_log_probs),
        mock.patch.dict(lora.add_change.forms, meta=lora_forms.add_change),
        mock.patch.dict(qwen_vl.attend_shared.forms, meta=shared_attention.attend_shared),
        # where image tokens stand depends on values: without them, take as many as there are
        shape_config.patch(meta_nonzero_assume_all_nonzero=True),
    ):
        work(counter)
    return counter


def size_of(tensors):
    """Bytes of the tensors' memory; what they share counts once."""
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())
