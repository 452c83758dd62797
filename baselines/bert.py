"""The blocks of BERT (Devlin et al. 2019), as BLIP reads texts and BLIP-2's Q-Former asks pictures.

A block attends to itself; it may attend to a second sequence, the picture's tokens; an MLP follows.
Unlike in CLIP, the sum of stream and branch is what is normalised.

Shapes: B batch, L tokens, S tokens of the second sequence, D width, H heads, E = D/H.
"""

import torch.nn.functional as F
from torch import nn

from parts import ops

EPS = 1e-12  # of every LayerNorm


class Attention(nn.Module):
    def __init__(self, width, heads, source_width=None):
        """source_width: of the sequence attended to, if it is another one."""
        super().__init__()
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(source_width or width, width)
        self.value = nn.Linear(source_width or width, width)
        self.dense = nn.Linear(width, width)
        self.LayerNorm = nn.LayerNorm(width, eps=EPS)
        self.heads = heads

    def forward(self, x, source, mask=None):
        """x [B,L,D] attends to source [B,S,·] -> [B,L,D]. mask [B,1,1,S]: True may be seen."""
        projected = (self.query(x), self.key(source), self.value(source))  # [B,L or S,D]
        q, k, v = (ops.in_heads(y, self.heads) for y in projected)
        return self.LayerNorm(x + self.dense(ops.attention(q, k, v, mask)))


class Mlp(nn.Module):
    def __init__(self, width, inner):
        super().__init__()
        self.fc1 = nn.Linear(width, inner)
        self.fc2 = nn.Linear(inner, width)
        self.LayerNorm = nn.LayerNorm(width, eps=EPS)

    def forward(self, x):
        return self.LayerNorm(x + self.fc2(F.gelu(self.fc1(x))))


class Block(nn.Module):
    def __init__(self, width, heads, inner, source_width=None):
        """source_width: of the second sequence; None for a block that does not see it."""
        super().__init__()
        self.attention = Attention(width, heads)
        if source_width is not None:
            self.crossattention = Attention(width, heads, source_width)
        self.mlp = Mlp(width, inner)

    def forward(self, x, source, mask=None):
        """x [B,L,D], source [B,S,·] -> [B,L,D]. mask [B,1,1,L]: True where x has a token."""
        x = self.attention(x, x, mask)
        if hasattr(self, "crossattention"):
            x = self.crossattention(x, source)
        return self.mlp(x)


def names(projections, mlp=""):
    """(ours, published) of a block's tensors, for weights.renamed.

    projections: what groups query, key and value; mlp: what the MLP's parts end in.
    """
    return (
        (r"(attention)\.(query|key|value)\.", rf"\1.{projections}.\2."),
        (r"(attention)\.(dense|LayerNorm)\.", r"\1.output.\2."),
        (r"\.mlp\.fc1\.", f".intermediate{mlp}.dense."),
        (r"\.mlp\.fc2\.", f".output{mlp}.dense."),
        (r"\.mlp\.LayerNorm\.", f".output{mlp}.LayerNorm."))
