"""The paper's dataset from EmoSet-118K: labels, with V and A drawn from the lexicon (§4.1).

    python -m prepare.emoset --emoset EMOSET --out DATASET                          # 14,563 + 1,000
    torchrun --nproc-per-node 8 -m prepare.emoset --emoset EMOSET --out DATASET     # on eight GPUs

The seed orders the pictures, which EmoSet sorts by class: the first usable ones are for training,
the next for the test. A stopped run goes on where it was (build.py), with any number of processes.
"""

if __name__ == "__main__":  # before torch, whose import takes seconds: Ctrl-C ends in one line
    from parts import interrupts
    interrupts.catch()

import json
import sys
from functools import partial
from pathlib import Path

import numpy as np

import data
from parts import cli
from parts.cli import UserError
from parts.files import parse_object
from parts.run import run_in_processes
from prepare import build
from prepare.check import check_lexicon, look_at


def read_emoset(folder, lists=("train.json", "val.json", "test.json")):
    """The pictures of its lists in the order of their paths, as dicts.

    Keys: id, source (the picture's path in the folder), annotation (its file's path), label.
    UserError for lists that are not EmoSet-118K's as published.
    """
    candidates = []
    for name in lists:
        try:
            for entry in json.loads((folder / name).read_text(encoding="utf-8")):
                # some of the published entries have an id after the label, others have none
                label, *_, source, annotation = entry
                candidates.append({"id": Path(source).stem, "source": source,
                                   "annotation": annotation, "label": label})
        except (OSError, ValueError, TypeError, RecursionError) as error:
            raise UserError(f"{folder / name}: {error}; expected a list of [emotion, id, picture, "
                            f"annotation], as in EmoSet-118K's folder") from error
    return sorted(candidates, key=lambda candidate: candidate["source"])


def look_at_emoset(folder, candidate):
    """As `look_at`; the class in the list, in the annotation and in the path must be one."""
    label = candidate["label"]
    try:
        path = folder / candidate["annotation"]
        said = parse_object(path.read_bytes())["emotion"]
    except (OSError, ValueError, KeyError, TypeError):  # missing, no JSON, or another form
        return None, f"has no readable annotation {candidate['annotation']}"
    if not label == said == Path(candidate["source"]).parent.name or said not in data.EMOTIONS:
        return None, f"is of class {label!r} in the list and {said!r} in its annotation"
    return look_at(folder / candidate["source"])


def choose_rows(args):
    """A build.Choice with split, V and A; of too few pictures the splits keep their proportion."""
    if args.lexicon is not None:
        check_lexicon(args.lexicon)
    candidates = read_emoset(args.emoset)
    order = np.random.default_rng([args.seed, len(candidates)]).permutation(len(candidates))
    wanted = args.train + args.test
    candidates = [candidates[i] for i in order]
    choice = build.choose(args.emoset, candidates, wanted, look_at_emoset, least=2)
    count = len(choice.rows)
    train = args.train
    if count < wanted:  # a part of EmoSet, for a trial
        train = min(count - 1, max(1, round(count * args.train / wanted)))
        cli.say(f"{count:,} usable pictures of {wanted:,} asked for: {train:,} for training, "
                f"{count - train:,} for the test")
    for number, row in enumerate(choice.rows):
        # every row has its own generator: its V and A do not depend on how many rows there are
        v, a = data.draw_va(row["label"], np.random.default_rng([args.seed, number]))
        split = "train" if number < train else "test"
        row |= {"split": split, "v": round(v, 4), "a": round(a, 4), "seed": args.seed}
    return choice


def parse_args(argv=None):
    parser = cli.parser(__doc__)
    parser.set_defaults(what="build")  # in selection.json, so that older runs go on
    add = parser.add_argument
    add("--emoset", type=Path, required=True, help="folder of EmoSet-118K as published")
    add("--train", type=cli.integer(1, 10**6), default=14_563,
        help="training pictures (default: %(default)s, the paper's)")
    add("--test", type=cli.integer(1, 10**6), default=1000,
        help="test pictures (default: %(default)s, the paper's)")
    add("--lexicon", type=Path,
        help="Warriner's BRM-emot-submit.csv: check the constants of data.py against it")
    add("--seed", type=cli.integer(0, 2**31), default=0,
        help="of the choice of pictures, the split, and V and A")
    build.add_flags(parser)
    return parser.parse_args(argv)


def main(argv=None):
    return run_in_processes(partial(build.build, choose_rows=choose_rows), parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
