"""EmoEdit (Yang et al., CVPR 2025): changes a picture so that it evokes a given class of emotion.

    method = EmoEdit.from_pretrained("Q-Former.pth", "cuda")
    pixels = method.draw([Case("a lake", v=7, a=3, emotion="awe", source=picture)], seeds=[0])

An adapter stands in the place of the text encoder of InstructPix2Pix (baselines/unet.py). It is
BLIP-2's Q-Former (Li et al. 2023): 76 learned queries and CLIP's embedding of the emotion's word
attend to one another and to CLIP's embedding of the source picture, and become the 77 vectors that
the editor reads as a prompt. It knows the eight classes of EmoSet, and neither V, A nor the neutral
prompt. Its file Q-Former.pth is linked from github.com/JingyuanYY/EmoEdit, whose scripts/model.py
and test.py give the sizes, names and settings here. Left out: its training.

Shapes: B pictures, L = 77 vectors of width D = 768, P dimension of CLIP's shared space (768).
"""

import functools
from dataclasses import dataclass

import torch
from torch import nn

import data
from baselines import bert
from baselines.unet import InstructPix2Pix
from parts import clip, weights
from parts.cli import UserError
from parts.files import to_rgb

FILE = "Q-Former.pth"
CLIP_L = "openai/clip-vit-large-patch14"
EDITOR = "timbrooks/instruct-pix2pix"


@dataclass(frozen=True)
class QFormerConfig:
    width: int = 768
    layers: int = 12
    heads: int = 12
    mlp: int = 3072
    queries: int = 76
    image_width: int = 768  # of CLIP-L's embeddings
    cross_every: int = 2  # blocks 0, 2, … see the picture


class QFormer(nn.Module):
    def __init__(self, config=QFormerConfig()):
        super().__init__()
        c = self.config = config
        self.query_tokens = nn.Parameter(torch.zeros(1, c.queries, c.width))
        self.layernorm = nn.LayerNorm(c.width, eps=bert.EPS)  # of what comes in
        seeing = [c.image_width if i % c.cross_every == 0 else None for i in range(c.layers)]
        self.layer = nn.ModuleList(bert.Block(c.width, c.heads, c.mlp, width) for width in seeing)
        self.layer_norm = nn.LayerNorm(c.width, eps=bert.EPS)  # of what goes out

    def forward(self, image, word):
        """Unit vectors of picture and word, both [B,P] -> the editor's context [B,L,D]."""
        queries = self.query_tokens.expand(len(word), -1, -1)
        x = self.layernorm(torch.cat([queries, word[:, None]], dim=1))  # [B,L,D]
        for block in self.layer:
            # The picture is a single token, so all vectors of a block get the same from it.
            x = block(x, image[:, None])
        return self.layer_norm(x)

    def views(self):
        """The published names, which are those of transformers' Blip2QFormerModel."""
        table = (
            *bert.names("attention", mlp="_query"),
            (r"^layernorm\.", "model.layernorm."),
            (r"^layer\.", "model.encoder.layer."))
        return weights.renamed(weights.named_views(self), table)

    @classmethod
    def from_pretrained(cls, source, device="cpu", config=QFormerConfig()):
        """Q-Former.pth or .safetensors, or the folder of one of them. Raises UserError."""
        path, entries = weights.find_tensors(source, FILE)
        make = functools.partial(cls, config)
        return weights.build(make, cls.views, entries, path, device, torch.float32)


@dataclass
class EmoEdit:
    adapter: QFormer
    encoder: clip.CLIP
    editor: InstructPix2Pix

    steps = 100
    guidance = 7.5  # towards the emotion
    image_guidance = 1.5  # towards the source
    size = 512

    @classmethod
    def from_pretrained(cls, source=FILE, device="cpu", dtype=None, editor=EDITOR, encoder=CLIP_L):
        """source: of the adapter. editor, encoder: folders or hub ids of InstructPix2Pix and CLIP.

        dtype: of the editor; the others are small and float32, as published. Raises UserError.
        """
        adapter = QFormer.from_pretrained(source, device)
        encoder = clip.CLIP.from_pretrained(encoder, device, torch.float32)
        return cls(adapter, encoder, InstructPix2Pix.from_pretrained(editor, device, dtype))

    def __post_init__(self):
        """Raises UserError for another CLIP than that the adapter was trained with."""
        given = self.encoder.text.config.projection_dim
        c = self.adapter.config
        if (given, given) != (c.width, c.image_width):
            raise UserError(f"EmoEdit: its adapter reads embeddings of {c.width} numbers and this "
                            f"CLIP makes {given}; give {CLIP_L}")

    def draw(self, cases, seeds, size=None, steps=None, guidance=None, noise=None, progress=iter):
        """Pictures [B,3,H,W] uint8, on the CPU: each case's source, changed.

        The shorter of H and W is `size`, the other as in the sources, which must be of one form. A
        case without an emotion is drawn with the class nearest to its V and A. noise
        [B,4,H/8,W/8]: in place of the seeds' first. progress: wraps the steps. Raises UserError.
        """
        size = size or self.size
        guidance = (self.guidance if guidance is None else guidance, self.image_guidance)
        words = [word_of(case) for case in cases]
        if any(case.source is None for case in cases):
            raise UserError("EmoEdit changes pictures: give every case a source picture")
        sources = [to_rgb(case.source) for case in cases]
        contexts = (self.encode(sources, words), self.editor.encode([""] * len(cases)))
        return self.editor.draw_embedded(
            contexts, sources, seeds, size, steps or self.steps, guidance, noise, progress)

    @property
    def network(self):
        """What draws."""
        return self.editor.network

    @torch.no_grad()
    def encode(self, sources, words):
        """B PIL images and B words -> the editor's context [B,L,D]."""
        return self.adapter(clip.embed_pictures(self.encoder, sources),
                            clip.embed_prompts(self.encoder, words))


def word_of(case):
    """The word that EmoEdit was trained with for a case's emotion. Raises UserError."""
    word = case.emotion or data.nearest_emotion(case.v, case.a)
    if word not in data.EMOTIONS:
        raise UserError(f"EmoEdit knows {', '.join(data.EMOTIONS)}, not {word!r:.80}")
    return word
