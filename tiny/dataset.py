"""The miniature's dataset.

    python -m tiny.dataset --out tiny/cache/dataset
"""

import argparse
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data import VA_MAX, VA_MIN, draw_va, nearest_emotion
from parts.cli import say, stop_parsing
from parts.files import write_rows


def tiny_row(out, split, labels, seed):
    """Draw one scene of the miniature world, V and A uniform on 1..9, into `out`; its row as a dict."""
    from tiny import scenes

    rng = np.random.default_rng([seed, 30])
    scene, (v, a) = scenes.random_scene(rng), map(float, rng.uniform(VA_MIN, VA_MAX, 2))
    label, name = nearest_emotion(v, a), f"images/{split}_{seed}.png"
    scenes.render(scene, v, a).save(out / name)
    row = {"id": f"{split}_{seed}", "image": name, "label": label, "v": round(v, 4), "a": round(a, 4),
           "neutral": scenes.neutral_caption(scene)}
    if split == "train":
        row["emotional"] = scenes.emotional_caption(scene, v, a, rng)
        if labels == "drawn":
            row["v"], row["a"] = (round(x, 4) for x in draw_va(label, rng))
    return row


def write_tiny(out, train, test, labels="true", seed=0):
    """The miniature's dataset: rendered scenes, labelled with the class nearest to the V and A they were drawn with.

    labels: v and a of the training rows; "true" those of the scene, "drawn" from the class's Gaussians as in section 4.1.
    Those of the test rows are always true.
    """
    (out / "images").mkdir(parents=True, exist_ok=True)
    for split, count, first in (("test", test, 0), ("train", train, 1_000_000)):
        seeds = range(seed * 10_000_000 + first, seed * 10_000_000 + first + count)
        with ProcessPoolExecutor(os.cpu_count()) as pool:
            rows = list(tqdm(pool.map(partial(tiny_row, out, split, labels), seeds, chunksize=16), total=count, desc=split))
        write_rows(out / f"{split}.jsonl", rows)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = stop_parsing
    parser.add_argument("--out", type=Path, required=True, help="folder of the dataset")
    parser.add_argument("--train", type=int, default=4000, help="training pictures (default: %(default)s)")
    parser.add_argument("--test", type=int, default=500, help="test pictures (default: %(default)s)")
    parser.add_argument("--labels", choices=["true", "drawn"], default="true",
                        help="V and A of the training rows: the scene's own, or drawn from its class as in the paper")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if min(args.train, args.test) < 1 or max(args.train, args.test) > 1_000_000:
        stop_parsing("--train and --test: expected 1..1,000,000")
    try:
        write_tiny(args.out, args.train, args.test, args.labels, args.seed)
    except OSError as error:
        say(f"error: {error}")
        return 2
    print(args.out)


if __name__ == "__main__":
    sys.exit(main())
