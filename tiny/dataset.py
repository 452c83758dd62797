"""The miniature's dataset: rendered scenes with known V and A, labelled with the nearest class.

    python -m tiny.dataset --out tiny/cache/dataset         # 4,000 + 500 + 500 scenes
    python -m tiny.dataset --out tiny/cache/drawn --labels drawn    # labelled as in the paper

The training rows' V and A are those of the scene (true), drawn from the Gaussians of its class, as
the paper labels its pictures (§4.1), by one word's (drawn) or those of a family of words (family),
or true but for a fifth of the rows, which have any (outliers). Those of other rows are always true.

The test rows are of the pairs of subject and place that no training has (`tiny.scenes.RESERVED`).
Choices are made by the validation rows, which are new scenes of the other pairs.
"""

if __name__ == "__main__":  # before torch, whose import takes seconds: Ctrl-C ends in one line
    from parts import interrupts
    interrupts.catch()

import sys
from functools import partial
from pathlib import Path

import numpy as np

from data import LABELS, VA_MAX, VA_MIN, draw_va, nearest_emotion
from parts import cli, imagefolder
from parts.cli import UserError
from parts.files import naming
from tiny import scenes
from tiny.pool import on_all_cores

OUTLIERS = 0.2  # share of the training rows with any V and A


def tiny_row(out, split, labels, seed):
    """Draw one scene, V and A uniform on 1..9, into the folder `out`; its row as a dict."""
    rng = np.random.default_rng([seed, 30])  # other scenes than in pretraining
    scene = scenes.random_scene(rng, reserved=split == "test")
    v, a = map(float, rng.uniform(VA_MIN, VA_MAX, 2))
    row = {
        "id": f"{split}_{seed}",
        "image": imagefolder.place_of(split, f"{split}_{seed}", ".png"),
        "label": nearest_emotion(v, a),
        "v": round(v, 4),
        "a": round(a, 4),
        "neutral": scenes.neutral_caption(scene),
    }
    with naming(out / row["image"]):
        scenes.render(scene, v, a).save(out / row["image"])  # at the V and A before rounding
    # only training rows have an emotional caption, and only their labels can be those of a class
    if split == "train":
        row["emotional"] = scenes.emotional_caption(scene, v, a, rng)
        if labels in ("drawn", "family"):
            v, a = draw_va(row["label"], rng, LABELS[labels])
            row["labels"] = labels
        elif labels == "outliers" and rng.random() < OUTLIERS:
            v, a = map(float, rng.uniform(VA_MIN, VA_MAX, 2))
        row |= {"v": round(v, 4), "a": round(a, 4)}
    return row


def write_tiny(out, train, test, labels="true", seed=0):
    """Write the dataset into the folder `out`: `train` training rows, `test` rows of either other
    split."""
    first = seed * 10_000_000  # no two datasets share a scene, nor do their splits
    for split, start, count in (("test", first, test), ("train", first + 1_000_000, train),
                                ("validation", first + 2_000_000, test)):
        (out / "images" / split).mkdir(parents=True, exist_ok=True)
        draw = partial(tiny_row, out, split, labels)
        rows = list(on_all_cores(draw, range(start, start + count), split))
        imagefolder.write_split(out, split, rows)


def main(argv=None):
    parser = cli.parser(__doc__)
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder of the dataset")
    add("--train", type=cli.integer(1, 10**6), default=4000,
        help="training pictures (default: %(default)s)")
    add("--test", type=cli.integer(1, 10**6), default=500,
        help="test pictures, and validation pictures (default: %(default)s)")
    add("--labels", choices=(*LABELS, "outliers"), default="true",
        help="V and A of training rows (default: %(default)s)")
    add("--seed", type=cli.integer(0, 2**31), default=0,
        help="of the scenes (default: %(default)s)")
    args = parser.parse_args(argv)

    def write():
        if (args.out / "train.jsonl").exists():
            raise UserError(f"{args.out}: holds a dataset already; remove it, or give another "
                            f"--out")
        write_tiny(args.out, args.train, args.test, args.labels, args.seed)
        print(args.out)

    return cli.run_program(write, "stopped; the same command starts over")


if __name__ == "__main__":
    sys.exit(main())
