"""Random weights for an MMDiT that is trained from nothing."""

import torch
from torch import nn

from parts import ops


@torch.no_grad()
def initialise(model):
    """Fill a new mmdit.MMDiT; with adaLN-zero, every block starts as the identity. Returns it."""
    c = model.config
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            nn.init.xavier_uniform_(module.weight.flatten(1))  # a patch is one long input
            nn.init.zeros_(module.bias)
        if "adaLN_modulation" in name and isinstance(module, nn.Linear):
            nn.init.zeros_(module.weight)
        if isinstance(module, ops.RMSNorm):
            nn.init.ones_(module.weight)
    nn.init.zeros_(model.final_layer.linear.weight)
    model.pos_embed.copy_(position_table(c.width, c.positions, c.sample_size // c.patch))
    return model


def position_table(width, side, base):
    """The sinusoidal table [1, side², D] a new model starts with; a step is base/side of a cell.

    The first half of the channels encodes the column, the second the row; sines before cosines.
    """
    quarter = width // 4
    frequencies = 1.0 / 10_000 ** (torch.arange(quarter, dtype=torch.float64) / quarter)
    steps = torch.arange(side, dtype=torch.float64) * base / side
    angles = torch.outer(steps, frequencies)  # [side, D/4]
    wave = torch.cat([angles.sin(), angles.cos()], dim=-1).float()  # [side, D/2]
    column = wave[None].expand(side, -1, -1)
    row = wave[:, None].expand(-1, side, -1)
    return torch.cat([column, row], dim=-1).reshape(1, side * side, width)
