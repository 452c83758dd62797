"""Which preset fills in the settings that a command leaves out: the one that fits its model.

    args = presets.parse_settings(parser, SETTINGS, argv)

The miniature's defaults (its judge, 128 px, large learning rates) mean nothing for a real model, so
a real --model takes the paper's, and `--preset tiny` with one is refused.
"""

import os
from pathlib import Path

from parts import hub, lora
from parts.cli import UserError, say

# What --preset fast changes in the paper's training of the generator. With this the miniature gets
# as far in a third of the steps, each of them cheaper: docs/results.md, "Fewer steps".
FAST = {
    "loss": "difference", "group_start": "shared", "group": 4, "batch": 32, "window": 4,
    "window_within": 5, "advantage_std": "global", "beta": 2e-3, "steps": 300,
}
REAL = 2**29  # bytes of weights: all of the miniature have a twentieth of that, SD3.5 has tenfold


def is_real(source):
    """Whether a checkpoint is no miniature: a hub id, or a path with REAL bytes of weights.

    An adapter is what its base is. A path that is not there is none; loading it says so.
    """
    path = Path(source).expanduser()
    if not path.exists():
        return hub.is_hub_id(source)
    base = lora.base_of(path)
    if base is not None:
        return is_real(base)
    files = [path] if path.is_file() else path.rglob("*.safetensors")
    return sum(file.stat().st_size for file in files) >= REAL


def choose(args, refuse):
    """Set args.preset, unless it was given; refuse(message) the miniature's for a real model."""
    try:
        real = args.model is not None and is_real(args.model)
    except UserError as error:  # of an adapter without a base
        refuse(str(error))
    if real and args.preset == "tiny":
        refuse(f"--preset tiny is for the miniature, and --model {args.model} is none; leave "
               f"--preset out, or give --preset paper")
    if real and args.preset is None and os.environ.get("RANK", "0") == "0":
        say(f"{args.model} is no miniature, so defaults are those of --preset paper")
    args.preset = args.preset or ("paper" if real else "tiny")


def fill_settings(args, settings):
    """Give the arguments that are None their preset's values."""
    for name, (paper, tiny, *_) in settings.items():
        if getattr(args, name) is None:
            values = {"paper": paper, "tiny": tiny, "fast": FAST.get(name, paper)}
            setattr(args, name, values[args.preset])
    return args


def parse_settings(made, settings, argv=None):
    """The arguments of a parser that has --preset and --model; what was not given has the value
    of the preset that was given or chosen."""
    args = made.parse_args(argv)
    choose(args, made.error)
    return fill_settings(args, settings)
