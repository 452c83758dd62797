"""Train a linear head over CLIP that names the class of emotion of a picture, for Emo-A.

    python -m evaluation.emotion_head --emoset EMOSET --out emotion_head.safetensors
    python -m evaluation.emotion_head --data tiny/cache/dataset --clip tiny/weights/clip --out …
    python -m evaluation run … --emotion-head emotion_head.safetensors

Emo-A is the share of a method's pictures whose class is read as wanted. The head is a logistic
regression over the unit vectors of CLIP-L/14, by EmoSet-118K's own split: trained on train.json,
its weight decay chosen on val.json, its accuracy reported on test.json and kept in the file. The
vectors of each list stay in OUT.vectors, so that a stopped program goes on there; those of another
CLIP or of other pictures are refused.
"""

if __name__ == "__main__":  # before torch, whose import takes seconds: Ctrl-C ends in one line
    from parts import interrupts
    interrupts.catch()

import json
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tqdm import tqdm

import data
from evaluation.cases import digest_of_files
from evaluation.run import stamp
from parts import cli, clip
from parts.cli import UserError
from parts.files import claim, open_picture, write_json, write_whole
from prepare.emoset import read_emoset

CLIP = "openai/clip-vit-large-patch14"
DECAYS = (0.0, 1e-6, 1e-5, 1e-4, 1e-3)  # of which the best on the validation pictures is taken
SPLITS = ("train", "validation", "test")


def pictures_of(args):
    """{split: [(path, index of the class)]}."""
    if args.emoset:
        lists = dict(zip(SPLITS, ("train.json", "val.json", "test.json"), strict=True))
        found = {split: read_emoset(args.emoset, (name,)) for split, name in lists.items()}
        return {split: [(args.emoset / each["source"], data.EMOTIONS.index(each["label"]))
                        for each in candidates] for split, candidates in found.items()}
    rows = {split: data.load_rows(args.data, split) for split in ("train", "test")}
    half = len(rows["test"]) // 2  # a dataset of ours has no list of its own for choices
    rows = {"train": rows["train"], "validation": rows["test"][:half], "test": rows["test"][half:]}
    return {split: [(row.image, data.EMOTIONS.index(row.label)) for row in own]
            for split, own in rows.items()}


def vectors_of(model, pictures, file, title):
    """Unit vectors [n,P] of the pictures at [(path, class)], from `file` if they are there."""
    if file.exists():
        vectors = torch.from_numpy(np.load(file))
        if len(vectors) == len(pictures):  # else of a version that did not keep settings.json
            return vectors
    parts = []
    for start in tqdm(range(0, len(pictures), 64), title, unit_scale=64, unit="picture"):
        images = [open_picture(path) for path, _ in pictures[start:start + 64]]
        parts.append(clip.embed_pictures(model, images).float().cpu())
    vectors = torch.cat(parts)
    file.parent.mkdir(parents=True, exist_ok=True)

    def save(temporary):
        with open(temporary, "wb") as f:
            np.save(f, vectors.numpy())

    write_whole(file, save)
    return vectors


def fit(vectors, classes, decay):
    """(weight [8,P], bias [8]) of the logistic regression with this weight decay."""
    weight = torch.zeros(len(data.EMOTIONS), vectors.shape[1], requires_grad=True)
    bias = torch.zeros(len(data.EMOTIONS), requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=500, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        value = F.cross_entropy(vectors @ weight.T + bias, classes)
        value = value + decay * weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return weight.detach(), bias.detach()


def accuracy(head, vectors, classes):
    """Share of right classes, 0..1."""
    return float((F.linear(vectors, *head).argmax(1) == classes).double().mean())


def train(args):
    # 1. vectors of all pictures
    pictures = pictures_of(args)
    for split, own in pictures.items():
        if len({label for _, label in own}) < 2:
            raise UserError(f"the {split} pictures, {len(own)}, are of one class at most; expected "
                            f"several of {', '.join(data.EMOTIONS)}")
    model = clip.CLIP.from_pretrained(args.clip, cli.device_of(args.device))
    paths = [path for own in pictures.values() for path, _ in own]
    facts = {"clip": stamp(args.clip), "pictures": digest_of_files(paths)}
    folder = args.out.with_name(args.out.name + ".vectors")
    claim(folder / "settings.json", facts, "head's vectors")
    write_json(folder / "settings.json", facts)
    vectors = {split: vectors_of(model, own, folder / f"{split}.npy", split)
               for split, own in pictures.items()}
    classes = {split: torch.tensor([label for _, label in own])
               for split, own in pictures.items()}

    # 2. the head whose weight decay is best on the validation pictures
    best = None
    for decay in tqdm(DECAYS, "weight decays"):
        head = fit(vectors["train"], classes["train"], decay)
        right = accuracy(head, vectors["validation"], classes["validation"])
        if best is None or right > best[0]:
            best = (right, decay, head)
    right, decay, head = best
    tested = accuracy(head, vectors["test"], classes["test"])

    # 3. the file
    about = {"classes": list(data.EMOTIONS), "clip": args.clip, "weight_decay": decay,
             "validation_accuracy": right, "test_accuracy": tested}
    tensors = {"weight": head[0].contiguous(), "bias": head[1]}
    metadata = {"emotion_head": json.dumps(about)}
    write_whole(args.out, lambda temporary: save_file(tensors, temporary, metadata))
    print(f"{args.out}: {tested:.1%} of {len(classes['test']):,} test pictures, weight decay "
          f"{decay:g}")


def main(argv=None):
    parser = cli.parser(__doc__, prog="python -m evaluation.emotion_head")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--emoset", type=Path, help="folder of EmoSet-118K")
    source.add_argument("--data", type=Path, help="folder of a dataset of ours")
    parser.add_argument("--clip", default=CLIP, help="folder or hub id (default: %(default)s)")
    parser.add_argument("--device", help="cpu or cuda (default: cuda if there is one)")
    parser.add_argument("--out", type=Path, required=True, help="the .safetensors file")
    args = parser.parse_args(argv)
    return cli.run_program(lambda: train(args))


if __name__ == "__main__":
    sys.exit(main())
