"""Every fused operation of the project, each with the plain torch form that defines it.

Shapes: B batch, L tokens, H heads, E channels of one head, D = H·E width. The fused forms come later and stand beside
these; a model calls only this file, so an operation has one home.
"""

import contextlib
import os
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

FUSED = os.environ.get("KERNELS", "fused") != "plain"  # KERNELS=plain: the plain forms only


def modulate(x, shift, scale, eps=1e-6):
    """LayerNorm without its own affine part, then adaLN: norm(x)·(1 + scale) + shift. x [B,L,D], shift, scale [B,D]."""
    return F.layer_norm(x, x.shape[-1:], eps=eps) * (1 + scale[:, None]) + shift[:, None]


def gate_residual(x, branch, gate):
    """x + gate·branch. x, branch [B,L,D], gate [B,D]."""
    return x + gate[:, None] * branch


def rms_norm(x, weight, eps=1e-6):
    """x / sqrt(mean(x²) + eps) · weight over the last dimension, the mean in float32."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype) * weight


class RMSNorm(nn.Module):
    """`rms_norm` with its learned scale [D]."""

    def __init__(self, width, eps=1e-6):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x):
        return rms_norm(x, self.weight, self.eps)


def split_qkv(qkv, num_heads, q_weight=None, k_weight=None, eps=1e-6):
    """Packed projection [B,L,3D] -> q, k, v [B,H,L,E]; q and k RMS-normalised per head if weights [E] are given."""
    B, L, width = qkv.shape
    q, k, v = qkv.view(B, L, 3, num_heads, width // (3 * num_heads)).unbind(2)  # each [B,L,H,E]
    if q_weight is not None:
        q, k = rms_norm(q, q_weight, eps), rms_norm(k, k_weight, eps)
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


def rotate(x, cos, sin):
    """Rotary position embedding: the two halves of a head are the parts of complex numbers, turned by an angle.

    x [..., H, E], cos, sin [..., 1, E] (each angle twice, once per half).
    """
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def swiglu(gate_up):
    """silu(gate)·up of a packed projection [..., 2M] -> [..., M]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def attention(q, k, v, mask=None, causal=False, scale=None):
    """softmax(q·kᵀ·scale)·v over q [B,H,L,E], k, v [B,H,S,E]; heads joined: [B,L,D].

    mask: added to the scores, or boolean (True: may attend).
    """
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=scale)
    return out.transpose(1, 2).flatten(2)


# ---------------------------------------------------------------------------------------------------------------------
# Few rows on a CPU


def linear_for(rows, weight, bias=None):
    """A function x [rows,D] -> x·Wᵀ + bias of a frozen W [V,D], for many calls with few rows.

    With few rows a product is as fast as its weights can be read. F.linear reads them on a CPU at a fraction of the memory's
    speed; a copy in blocks, as oneDNN lays it out, is read at all of it. The copy is as large as W.
    """
    if not FUSED or weight.device.type != "cpu" or weight.dtype != torch.float32 or not torch.backends.mkldnn.is_available():
        return partial(F.linear, weight=weight, bias=bias)
    blocks = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), rows)
    return lambda x: torch.ops.mkldnn._linear_pointwise(x, blocks, bias, "none", [], "")


@contextlib.contextmanager
def laid_out_for(rows, module):
    """Within it every nn.Linear of a module is computed by `linear_for`. The weights must not change meanwhile."""
    layers = [layer for layer in module.modules() if type(layer) is nn.Linear]
    for layer in layers:
        layer.forward = linear_for(rows, layer.weight, layer.bias)  # of this object, before that of its class
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward
