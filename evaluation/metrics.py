"""Scores of pictures: CLIP-Score, CLIP-IQA and LAION's aesthetic score (EmoFeedback², section 4.2)."""

import re
from itertools import pairwise
from pathlib import Path
from pickle import UnpicklingError

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file

from parts.cli import UserError
from parts.clip import cosines, embed_pictures, embed_prompts


def clip_score(model, images, prompts):
    """CLIP-Score (Hessel et al. 2021, with torchmetrics' factor) of pairs: 100·max(cosine, 0) -> [B] float32 in 0..100.

    Arguments and errors as for `pick_score`.
    """
    return 100 * cosines(model, images, prompts).clamp(min=0)


IQA_PROMPTS = ("Good photo.", "Bad photo.")


def clip_iqa(model, images, prompts=IQA_PROMPTS):
    """CLIP-IQA (Wang et al. 2023): the probability of the first prompt against the second, at temperature 1/100
    -> [B] float32 in 0..1.

    As torchmetrics computes it with a CLIP of transformers. The paper's own variant, a ResNet without position embeddings
    that keeps the picture's size, is another model; its figures differ. Arguments and errors as for `pick_score`.
    """
    logits = 100 * embed_pictures(model, images) @ embed_prompts(model, prompts).T  # [B,2]
    return logits.softmax(dim=-1)[:, 0]


def aesthetic_score(model, head, images):
    """LAION's aesthetic score: a linear map of the image embedding, of unit length -> [B] float32, about 1..10.

    model: CLIP-L/14 for the published heads. head: from `aesthetic_head`. images: as for `pick_score`. Raises ValueError if
    they do not fit.
    """
    x = embed_pictures(model, images)
    if head[0][0].shape[1] != x.shape[1]:
        raise ValueError(f"the aesthetic head reads {head[0][0].shape[1]} numbers and this CLIP makes {x.shape[1]}; the "
                         f"published heads belong to openai/clip-vit-large-patch14")
    for weight, bias in head:  # the published MLP has no activations: dropout alone separates its layers
        x = F.linear(x, weight.to(x.device), bias.to(x.device))
    return x[:, 0]


def aesthetic_head(path):
    """[(weight, bias)] float32, first layer first, of an aesthetic predictor as LAION publishes it: the linear one
    (`weight`, `bias`; sa_0_4_vit_l_14_linear.pth) or the MLP (`layers.0.weight`, …; sac+logos+ava1-l14-linearMSE.pth).

    A .pth file is read as plain tensors: no code in it is run. A .safetensors file with the same names is read too. Raises
    UserError.
    """
    path = Path(path).expanduser()
    try:
        state = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file; download LAION's sa_0_4_vit_l_14_linear.pth or "
                                      f"sac+logos+ava1-l14-linearMSE.pth and give its path") from error
    except (OSError, RuntimeError, EOFError, ValueError, UnpicklingError, SafetensorError) as error:
        reason = str(error).splitlines()[0][:100] if str(error) else type(error).__name__
        raise UserError(f"{path}: not a file of plain tensors ({reason}); download it again") from error
    layers = {}  # {number: {"weight": tensor, "bias": tensor}}
    for name, value in state.items() if isinstance(state, dict) else ():
        if match := re.fullmatch(r"(?:layers\.(\d+)\.)?(weight|bias)", str(name)):
            layers.setdefault(int(match[1] or 0), {})[match[2]] = value
    head = [(layer.get("weight"), layer.get("bias")) for _, layer in sorted(layers.items())]
    whole = head and sum(map(len, layers.values())) == len(state) and all(b is not None and w is not None for w, b in head)
    if not whole or len(head[-1][0]) != 1 or any(len(a[0]) != b[0].shape[1] for a, b in pairwise(head)):
        raise UserError(f"{path}: not the layers of an aesthetic predictor that ends in one number; expected "
                                      f"weight and bias, or layers.0.weight, layers.0.bias, …")
    return [(w.float(), b.float()) for w, b in head]
