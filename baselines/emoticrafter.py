"""EmotiCrafter (Dang et al. 2025): SDXL, its prompt embeddings changed by valence and arousal.

    method = EmotiCrafter.from_pretrained("emoticrafter.safetensors", "cuda")
    pixels = method.draw([Case("a swan on the lake", v=7, a=3)], seeds=[0])  # [1,3,1024,1024] uint8

The weights are published as a pickle, which is read as it is, too. This makes of it a file that
other programs can read without pickle:
    python -m baselines.emoticrafter convert PICKLE OUT.safetensors

Twelve blocks like GPT-2's read the embeddings of the neutral prompt. Each attends to the prompt,
then to 16 tokens made of arousal, then to 16 made of valence; what comes out is added to the
embeddings. SDXL's pooled vector, and the empty prompt of its guidance, stay as they are.

Names, shapes, steps, guidance and size are those of the authors' program (github.com/idvxlab/
EmotiCrafter), heads, epsilon and GELU those of its config.json, GPT-2's own. Two things there are
easily taken for mistakes here: the cross-attentions add to the normalised stream, and no attention
is causal. Left out: training.

Shapes: B prompts, L tokens (77), S tokens attended to, D width (768), H heads.
"""

if __name__ == "__main__":  # before torch, whose import takes seconds: Ctrl-C ends in one line
    from parts import interrupts
    interrupts.catch()

import functools
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from baselines.unet import SDXL
from mmdit import Mlp
from parts import cli, ops, weights
from parts.cli import UserError

UNUSED = ("wte.weight",)  # GPT-2's table of words: the network reads embeddings


@dataclass(frozen=True)
class NetworkConfig:
    layers: int = 12
    width: int = 768
    context_dim: int = 2048  # of SDXL's embeddings
    positions: int = 1024
    hidden: int = 256  # of the small networks that make tokens of a number
    tokens: int = 16  # that each of them makes
    heads: int = 12


# --------------------------------------------------------------------------------------------------
# The network


class Attention(nn.Module):
    """From x to the tokens z, which may be x itself."""

    def __init__(self, c):
        super().__init__()
        self.heads = c.heads
        self.c_attn = nn.Linear(c.width, 3 * c.width)  # only its first third, the queries, is used
        self.c_z = nn.Linear(c.width, 2 * c.width)
        self.c_proj = nn.Linear(c.width, c.width)

    def forward(self, x, z):  # [B,L,D], [B,S,D] -> [B,L,D]
        D = x.shape[-1]
        q = F.linear(x, self.c_attn.weight[:D], self.c_attn.bias[:D])
        projected = (q, *self.c_z(z).chunk(2, dim=-1))
        q, k, v = (ops.in_heads(y, self.heads) for y in projected)
        return self.c_proj(ops.attention(q, k, v))


class Block(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.ln_1 = nn.LayerNorm(c.width)
        self.attn = Attention(c)
        self.ln_a = nn.LayerNorm(c.width)
        self.attn_a = Attention(c)
        self.ln_v = nn.LayerNorm(c.width)
        self.attn_v = Attention(c)
        self.ln_2 = nn.LayerNorm(c.width)
        self.mlp = Mlp(c.width)

    def forward(self, x, arousal, valence):  # [B,L,D], [B,16,D], [B,16,D] -> [B,L,D]
        normed = self.ln_1(x)
        x = x + self.attn(normed, normed)
        x = self.ln_a(x)  # not a copy for the attention: the stream itself
        x = x + self.attn_a(x, arousal)
        x = self.ln_v(x)
        x = x + self.attn_v(x, valence)
        return x + self.mlp(self.ln_2(x))


def tokens_of_number(c):
    return nn.Sequential(
        nn.Linear(1, c.hidden), nn.ReLU(), nn.Linear(c.hidden, c.tokens * c.width))


class Network(nn.Module):
    def __init__(self, config=NetworkConfig()):
        super().__init__()
        c = self.config = config
        self.xl_feature2gpt_feature = nn.Linear(c.context_dim, c.width, bias=False)
        self.wpe = nn.Embedding(c.positions, c.width)
        self.a_f = tokens_of_number(c)
        self.v_f = tokens_of_number(c)
        self.attn_proj = nn.Linear(c.width, c.width, bias=False)
        self.h = nn.ModuleList(Block(c) for _ in range(c.layers))
        self.ln_f = nn.LayerNorm(c.width)
        self.gpt_feature2xl_feature = nn.Linear(c.width, c.context_dim, bias=False)
        self.ln_xl_feature = nn.LayerNorm(c.context_dim)

    def forward(self, context, valence, arousal):
        """context [B,L,2048] of neutral prompts, V and A [B] in -3..3 -> context [B,L,2048]."""
        B, L, _ = context.shape
        shape = (B, self.config.tokens, self.config.width)
        arousal = self.attn_proj(self.a_f(arousal[:, None]).view(shape))  # [B,16,D]
        valence = self.attn_proj(self.v_f(valence[:, None]).view(shape))
        x = self.xl_feature2gpt_feature(context) + self.wpe.weight[:L]  # [B,L,D]
        for block in self.h:
            x = block(x, arousal, valence)
        return context + self.ln_xl_feature(self.gpt_feature2xl_feature(self.ln_f(x)))

    def views(self):
        """The authors' names. GPT-2 keeps the transpose of a linear layer's weight."""
        table = ((r"\.mlp\.fc1\.", ".mlp.c_fc."), (r"\.mlp\.fc2\.", ".mlp.c_proj."))
        views = weights.renamed(weights.named_views(self), table)
        for name, (tensor,) in views.items():
            if name.endswith(("c_attn.weight", "c_z.weight", "c_proj.weight", "c_fc.weight")):
                views[name] = [tensor.T]
        return views


# --------------------------------------------------------------------------------------------------
# Its file


def load_network(path, device="cpu"):
    """The Network, in float32 as the authors run it, of their pickle or of what `convert` makes.

    Raises UserError.
    """
    path = weights.find(path)
    tensors = weights.tensors_of(path)
    tensors = weights.renamed(tensors, [(r"^module\.", "")])  # which DataParallel writes before all
    make = functools.partial(Network, config_of(tensors, path))
    return weights.build(make, Network.views, tensors, path, device, torch.float32, UNUSED)


def config_of(tensors, path):
    """The NetworkConfig that shapes tell; they do not tell the number of heads."""
    try:
        width, context_dim = tensors["xl_feature2gpt_feature.weight"].shape
        layers = {name.split(".")[1] for name in tensors if name.startswith("h.")}
        if len(layers) > 1000 or width % NetworkConfig.heads:
            raise ValueError(f"{len(layers)} layers of {width}")
        return NetworkConfig(
            len(layers), width, context_dim, tensors["wpe.weight"].shape[0],
            tensors["a_f.0.weight"].shape[0], tensors["a_f.2.weight"].shape[0] // width)
    except (KeyError, ValueError, IndexError, ZeroDivisionError) as error:
        raise UserError(f"{path}: not EmotiCrafter's network (looking for {error}); give its "
                        f"published weights, or what `convert` made of them") from error


def convert(pickle, out):
    """Write the published pickle as a safetensors file, without GPT-2's table of words."""
    if out.suffix != ".safetensors":
        raise UserError(f"{out}: expected a name that ends in .safetensors")
    weights.save(out, load_network(pickle).views())
    print(out)


# --------------------------------------------------------------------------------------------------
# The method


def rescaled(cases, device="cpu"):
    """(valence, arousal) [B] each, on -3..3, of cases whose V and A are on 1..9."""
    targets = torch.tensor([(case.v, case.a) for case in cases], dtype=torch.float32, device=device)
    return ((targets - 5) * 3 / 4).unbind(1)


@dataclass
class EmotiCrafter:
    embedder: Network  # which changes the prompt's embeddings
    sdxl: SDXL

    steps = 25
    guidance = 7.5
    size = 1024

    @classmethod
    def from_pretrained(cls, source, device="cpu", dtype=None,
                        sdxl="stabilityai/stable-diffusion-xl-base-1.0"):
        """source: the network's file. sdxl: folder or hub id; dtype is of its weights."""
        network = load_network(source, device)
        pipeline = SDXL.from_pretrained(sdxl, device, dtype)
        widths = (network.config.context_dim, pipeline.model.unet.config.context_dim)
        if widths[0] != widths[1]:
            raise UserError(f"{source}: it changes embeddings of {widths[0]} numbers, those of "
                            f"{sdxl} have {widths[1]}; give SDXL base 1.0")
        if weights.is_pickle(weights.find(source)):
            cli.say(f"{source}: a pickle, read without running what code it may hold; `python -m "
                    f"baselines.emoticrafter convert {source} OUT.safetensors` makes a plain file "
                    f"of it")
        return cls(network, pipeline)

    @property
    def network(self):
        """What draws."""
        return self.sdxl.network

    @torch.no_grad()
    def draw(self, cases, seeds, size=None, steps=None, guidance=None, noise=None, progress=iter):
        """Pictures [B,3,size,size] uint8, on the CPU: each case's neutral prompt at its V and A.

        noise [B,4,size/8,size/8]: in place of that of the seeds. progress: wraps the steps.
        """
        context, pooled = self.sdxl.encode([case.prompt for case in cases])
        context = self.embedder(context.float(), *rescaled(cases, context.device))
        return self.sdxl.draw_embedded(
            context, pooled, seeds, size or self.size, steps or self.steps,
            self.guidance if guidance is None else guidance, noise, progress)


def main(argv):
    parser = cli.parser(__doc__, prog="python -m baselines.emoticrafter")
    parser.add_argument("program", choices=["convert"], metavar="convert")
    parser.add_argument("pickle", type=Path, help="EmotiCrafter's weights as published")
    parser.add_argument("out", type=Path, help="the safetensors file to write")
    args = parser.parse_args(argv)
    return cli.run_program(lambda: convert(args.pickle, args.out))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
