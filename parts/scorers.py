"""Models of what people prefer, as further rewards and metrics, looked up by name when asked.

    python train_gen.py --reward-weights emotion=1,imagereward=0.2
    python train_gen.py --scorer hpsv2=FOLDER               # watched only: it has no weight
    python -m evaluation run --scorer imagereward --scorer hpsv2=FOLDER

The models themselves are in baselines/; no program imports one that it was not asked for.
"""

import argparse
import importlib
from dataclasses import dataclass
from functools import partial


@dataclass(frozen=True)
class Scorer:
    title: str  # in tables
    source: str  # hub id
    module: str  # whose functions the others are
    load: str
    score: str  # (model, images, prompts) -> [B] float32
    files: str  # what `load` reads, for hub.fetch


SCORERS = {  # {name in flags, logs and records: Scorer}
    "imagereward": Scorer("ImageReward", "THUDM/ImageReward", "baselines.image_reward",
                          "load_image_reward", "image_reward", "files_of_image_reward"),
    "hpsv2": Scorer("HPSv2.1", "xswu/HPSv2", "baselines.image_reward",
                    "load_hps", "hps_score", "files_of_hps"),
}
TITLES = {name: scorer.title for name, scorer in SCORERS.items()}
HELP = f"{' or '.join(SCORERS)}, as NAME=FOLDER if it is not to come from the hub; repeatable"


def named(text):
    """An argparse type: NAME or NAME=SOURCE of one of SCORERS, as (name, source)."""
    name, _, source = text.partition("=")
    if name not in SCORERS:
        raise argparse.ArgumentTypeError(f"expected one of {', '.join(SCORERS)}, or NAME=FOLDER, "
                                         f"got {text}")
    return name, source or SCORERS[name].source


def chosen(given, weighted=()):
    """{name: source} of those that --scorer named, a list of pairs or None, or that have a weight
    among the names `weighted`; None for none."""
    known = {name: SCORERS[name].source for name in weighted if name in SCORERS}
    return known | dict(given or ()) or None


def files_of(sources):
    """What `load` reads, for hub.fetch."""
    return [wish for name, source in (sources or {}).items()
            for wish in function(name, "files")(source)]


def load(sources, device):
    """[(name, score(images, prompts) -> [B] float32)] of what `chosen` gave."""
    return [(name, partial(function(name, "score"), function(name, "load")(source, device)))
            for name, source in (sources or {}).items()]


def function(name, kind):
    """The function that a Scorer names as its `load`, `score` or `files`."""
    scorer = SCORERS[name]
    return getattr(importlib.import_module(scorer.module), getattr(scorer, kind))
