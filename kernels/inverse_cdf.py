"""Inverse transform sampling in two levels: a running sum over a whole vocabulary is slow.

First the block of tokens is found in which the sum exceeds the share, then the token in it.
"""

import torch
import torch.nn.functional as F


def inverse_cdf(mass, uniforms, block=256):
    V = mass.shape[1]
    padded = F.pad(mass, (0, -V % block)) if V % block else mass
    blocks = padded.view(len(mass), -1, block)
    sums = blocks.sum(-1)
    reached = sums.cumsum(-1)
    wanted = uniforms[:, None] * reached[:, -1:]
    number = first_above(reached, wanted)  # [B,1]
    inside = blocks.gather(1, number[..., None].expand(-1, -1, block))[:, 0].cumsum(-1)
    before = reached.gather(1, number) - sums.gather(1, number)
    return (number * block + first_above(inside, wanted - before))[:, 0]


def first_above(reached, wanted):
    """First index [B,1] where the running sum [B,n] is above `wanted` [B,1].

    However `wanted` was rounded, it is taken as below the last sum, so that an index exists and
    its own mass is above 0.
    """
    below_all = torch.nextafter(reached[:, -1:], torch.zeros_like(wanted))
    return torch.searchsorted(reached, torch.minimum(wanted.clamp(min=0), below_all), right=True)
