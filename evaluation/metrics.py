"""The figures that methods are compared by (EmoFeedback², section 4.2).

Of a picture: CLIP-Score against its neutral prompt, CLIP-IQA, LAION's aesthetic score, and whether
it shows the wanted class of emotion (Emo-A, which EmoCtrl reports). Over cases: errors of V and A
as a reader (a judge, or the miniature's meter) saw them, their rank correlation with the target,
and the order of neighbours in a grid, for continuity (section 4.3.1).

Letters: B pictures, P dimension of CLIP's shared space, n records, one for each case.
"""

import math
import re
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import data
from parts import weights
from parts.cli import UserError
from parts.clip import cosines, embed_pictures, embed_prompts

# Of a picture. Model, images and prompts are those of clip.pick_score.


def clip_score(model, images, prompts):
    """CLIP-Score of pairs: 100 · max(cosine, 0) -> [B] float32 in 0..100.

    Hessel et al. 2021, with torchmetrics' factor 100 in place of 2.5.
    """
    return 100 * cosines(model, images, prompts).clamp(min=0)


def clip_iqa(model, images, prompts=("Good photo.", "Bad photo.")):
    """CLIP-IQA: the probability of the first prompt against the second -> [B] float32 in 0..1.

    Wang et al. 2023, as torchmetrics computes it with a CLIP of transformers, temperature 1/100.
    Their own ResNet, without position embeddings and at a picture's own size, gives other figures.
    """
    logits = 100 * embed_pictures(model, images) @ embed_prompts(model, prompts).T  # [B,2]
    return logits.softmax(dim=-1)[:, 0]


def aesthetic_score(model, head, images):
    """LAION's aesthetic score -> [B] float32, about 1..10. head: from `aesthetic_head`.

    model: CLIP-L/14 for the published heads. Raises ValueError if head and model do not fit.
    """
    return through(head, model, images, "aesthetic",
                   "the published heads belong to openai/clip-vit-large-patch14")[:, 0]


def emotion_hits(model, head, images, labels):
    """1 where the head reads the label in a picture, else 0, [B]; their mean is Emo-A.

    model: the CLIP that the head was trained on. Raises ValueError if they do not fit.
    """
    x = through(head, model, images, "emotion", "give the CLIP that it was trained on")
    wanted = torch.tensor([data.EMOTIONS.index(label) for label in labels], device=x.device)
    return (x.argmax(1) == wanted).float()


def through(head, model, images, kind, advice):
    """What the layers of a head make of pictures [B,outputs]. ValueError unless it fits the CLIP.

    kind, advice: for the error's text.
    """
    x = embed_pictures(model, images)  # [B,P], of unit length as the heads were trained on
    width = head[0][0].shape[1]
    if width != x.shape[1]:
        raise ValueError(f"the {kind} head reads {width} numbers and this CLIP makes {x.shape[1]}; "
                         f"{advice}")
    # LAION's MLP has no activations: in training dropout alone stood between its layers.
    for weight, bias in head:
        x = F.linear(x, weight.to(x.device), bias.to(x.device))
    return x


def aesthetic_head(path):
    """The layers [(weight, bias)], float32, of an aesthetic predictor as LAION publishes it.

    Its linear one has `weight` and `bias`, its MLP `layers.0.weight`, …; a .safetensors file may
    hold the same names. Raises UserError.
    """
    state = read_state(path, "download LAION's sa_0_4_vit_l_14_linear.pth or "
                             "sac+logos+ava1-l14-linearMSE.pth and give its path")
    return layers_of(state, path, 1, "an aesthetic predictor that ends in one number")


def emotion_head(path):
    """The layer [(weight [8,P], bias [8])] that evaluation.emotion_head wrote. Raises UserError."""
    state = read_state(path, "train it by `python -m evaluation.emotion_head`")
    return layers_of(state, path, len(data.EMOTIONS), "a head for the eight classes of emotion")


def read_state(path, advice):
    """{name: tensor} of a file of torch or safetensors. UserError, with advice if it is missing."""
    path = Path(path).expanduser()
    if not path.is_file():
        raise UserError(f"{path}: no such file; {advice}")
    return weights.read_tensors(path)


def layers_of(state, path, outputs, what):
    """The layers [(weight, bias)], float32, of a file's tensors. UserError unless they fit."""
    layers = {}  # {number in the file: {"weight": [out,in], "bias": [out]}}
    for name, value in state.items():
        if match := re.fullmatch(r"(?:layers\.(\d+)\.)?(weight|bias)", name):
            layers.setdefault(int(match[1] or 0), {})[match[2]] = value
    # Anything beside whole layers means that this is another model's file.
    whole = layers and sum(map(len, layers.values())) == len(state) == 2 * len(layers)
    ordered = [layers[number] for number in sorted(layers)] if whole else []
    head = [(layer["weight"], layer["bias"]) for layer in ordered]
    chained = all(len(weight) == after.shape[1] for (weight, _), (after, _) in pairwise(head))
    if not head or not chained or len(head[-1][0]) != outputs:
        raise UserError(f"{path}: not the layers of {what}; expected weight and bias, or "
                        f"layers.0.weight, layers.0.bias, …")
    return [(weight.float(), bias.float()) for weight, bias in head]


# Of a dataset's labels.


def label_floor(rows):
    """(V, A): the mean error that the best reader of data.Rows must make, 0 where labels are true.

    If V and A were drawn from the Gaussians of a row's class, nothing in its picture tells the
    draw. Best is then to say the median of the class, which is its mean, as that is not clipped.
    """
    errors = []
    for row in rows:
        if row.labels == "true":
            errors.append((0.0, 0.0))
            continue
        v_mean, v_sd, a_mean, a_sd = data.LABELS[row.labels][row.label]
        errors.append((mean_deviation(v_mean, v_sd), mean_deviation(a_mean, a_sd)))
    return tuple(np.mean(errors, axis=0).tolist())


def mean_deviation(mean, sd):
    """E|x − mean| of a Gaussian x clipped to 1..9."""
    total = 0.0
    for reach in (mean - data.VA_MIN, data.VA_MAX - mean):
        z = reach / sd
        within = sd / math.sqrt(2 * math.pi) * (1 - math.exp(-z * z / 2))
        clipped = reach * math.erfc(z / math.sqrt(2)) / 2  # all that lies beyond counts as `reach`
        total += within + clipped
    return total


# Over cases. A record is a line that run.measure wrote; axis 0 is V, axis 1 is A. NaN stands where
# a reader's answer could not be read, and every statistic leaves it out.


def targets_and_readings(records, reader, axis):
    """(target, what the reader saw) of each record, [n,2]."""
    return np.array([(r["va"[axis]], r["read"][reader][axis] if r["read"][reader] else math.nan)
                     for r in records])


def errors(records, reader, axis):
    """V-Error or A-Error of each record, |V̂ − V| or |Â − A|, [n]."""
    target, reading = targets_and_readings(records, reader, axis).T  # [n] each
    return abs(reading - target)


def neighbours_in_order(records, reader, axis):
    """1 where the next higher target in a record's grid was read as higher, 0 where not, [n].

    NaN also at the upper border and outside of grids, where there is no next one.
    """
    lines = {}  # {(group, the other coordinate): {coordinate on this axis: index of the record}}
    for index, record in enumerate(records):
        if record.get("group"):
            target = (record["v"], record["a"])
            line = lines.setdefault((record["group"], target[1 - axis]), {})
            line[target[axis]] = index
    found = np.full(len(records), math.nan)
    readings = targets_and_readings(records, reader, axis)[:, 1]
    for line in lines.values():
        for (_, low), (_, high) in pairwise(sorted(line.items())):
            if not np.isnan(readings[[low, high]]).any():
                found[low] = readings[high] > readings[low]
    return found


def mean(values):
    """Mean of [n] without the NaN; NaN if nothing is left."""
    return float(np.nanmean(values)) if not np.isnan(values).all() else math.nan


def ranks(x):
    """Ranks 0..n-1 of a sequence; equal values share their mean rank."""
    _, inverse, counts = np.unique(np.asarray(x, float), return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts + 1) / 2)[inverse]


def spearman(x, y):
    """Rank correlation in -1..1; NaN if one side has no spread."""
    x = ranks(x)
    y = ranks(y)
    spread = x.std() * y.std()  # 0 if all values of a side are equal
    covariance = ((x - x.mean()) * (y - y.mean())).mean()
    return float(covariance / spread) if spread else math.nan


def correlation(pairs):
    """Spearman of [n,2] without the rows that hold a NaN; NaN if fewer than two are left."""
    pairs = pairs[~np.isnan(pairs).any(axis=1)]
    return spearman(*pairs.T) if len(pairs) > 1 else math.nan
