"""Write the cases that methods are compared on: JSON lines that any method can read.

    python -m evaluation cases --out cases.jsonl                     # 1,000 of the miniature
    python -m evaluation cases --data DATASET --out cases.jsonl      # all of a dataset's test rows
    python -m evaluation cases --count 8 --grid 5 --out grid.jsonl   # 8 prompts, 5 x 5 targets each

A case is a neutral prompt with a target V and A on 1..9. Its line says the target in the terms of
the methods that the paper compares with, too. Cases with a `group` are one prompt over a grid of
targets, drawn from one noise; they measure continuity (section 4.3.1).
"""

import hashlib
import os
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

import data
from parts import cli
from parts.cli import UserError
from parts.files import parse_lines, write_rows
from tiny import scenes


@dataclass(frozen=True)
class Case:
    """What to draw, and the V and A that the picture should have."""
    id: str
    neutral: str
    v: float
    a: float
    group: str | None = None  # shared by cases that differ in V and A only
    # what only some methods and metrics need; a run's digest of its cases does without them
    emotion: str | None = field(default=None, repr=False, compare=False)  # EmoSet's class
    source: Path | None = field(default=None, repr=False, compare=False)  # what an editor changes

    @property
    def label(self):
        """Its class, or the one nearest to V and A."""
        return self.emotion or data.nearest_emotion(self.v, self.a)


def load_cases(path):
    """The cases of a file of JSON lines with id, neutral, v, a and perhaps group, emoedit, source.

    Other keys, such as those of a dataset's test.jsonl, are passed over. Raises UserError.
    """
    seen = set()  # ids

    def parse(raw):
        v, a = data.check_va(raw["v"], raw["a"])
        data.check_caption("neutral", raw["neutral"])
        for key in ("group", "source"):
            if not isinstance(raw.get(key), str | None):
                raise ValueError(f"the {key} {raw[key]!r:.80} is no text")
        if raw.get("emoedit") not in (None, *data.EMOTIONS):
            raise ValueError(f"emoedit is {raw['emoedit']!r:.80}; expected one of "
                             f"{', '.join(data.EMOTIONS)}")
        source = raw.get("source") and Path(path).parent / raw["source"]
        case = Case(data.check_id(raw["id"]), raw["neutral"], v, a, raw.get("group"),
                    raw.get("emoedit"), source)
        if case.id in seen:
            raise ValueError(f"the id {case.id!r} a second time")
        seen.add(case.id)
        return case

    if not Path(path).is_file():
        raise UserError(f"{path}: no such file; expected JSON lines with id, neutral, v and a, "
                        f"like a dataset's test.jsonl")
    return parse_lines(path, parse)


def digest_of(items):
    """What tells a list from others, such as cases from those that had the same ids."""
    return hashlib.sha256(repr(items).encode()).hexdigest()[:16]


def held_out_cases(count, seed=0, split="test"):
    """Cases of the miniature, V and A uniform on 1..9.

    "test": of the pairs of subject and place that no training has. "validation", for choices: other
    scenes than in training, of its pairs.
    """
    rng = np.random.default_rng([seed, 4242, split == "test"])  # no dataset has such seeds
    cases = []
    for i in range(count):
        scene = scenes.random_scene(rng, reserved=split == "test")
        v, a = rng.uniform(data.VA_MIN, data.VA_MAX, 2).tolist()
        cases.append(Case(f"{split}{seed}_{i}", scenes.neutral_caption(scene), v, a))
    return cases


def grid_of(cases, side):
    """Each case's prompt over a side × side grid of V and A, as one group."""
    levels = np.linspace(data.VA_MIN, data.VA_MAX, side).tolist()  # 1, 5, 9 for a side of 3
    return [Case(f"{case.id}_v{v:g}_a{a:g}", case.neutral, v, a, case.id)
            for case in cases for a in levels for v in levels]


def seeds_of(cases, seed):
    """The seed of each case's noise: `seed` plus the index of the case, or of its group's first.

    All cases of a grid start from the same noise, so that only the target differs between them.
    """
    first = {}  # {group: index of its first case}
    return [seed + (first.setdefault(case.group, i) if case.group else i)
            for i, case in enumerate(cases)]


def pictures_of(folder, cases):
    """The path of each case's picture in a method's folder. Raises UserError for missing ones."""
    paths = []
    missing = []
    for case in cases:
        files = [Path(folder) / f"{case.id}.{end}" for end in ("png", "jpg", "jpeg", "webp")]
        found = [file for file in files if file.is_file()]
        paths += found[:1]
        missing += [] if found else [case.id]
    if missing:
        some = ", ".join(missing[:5]) + (", …" if len(missing) > 5 else "")
        raise UserError(f"{folder}: {len(missing)} of {len(cases)} pictures are missing: {some}; "
                        f"expected <id>.png, .jpg, .jpeg or .webp")
    return paths


def digest_of_files(paths):
    """What tells files from others of the same names, such as pictures that were drawn again: the
    size and time of each."""
    return digest_of([(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in paths])


def for_others(case, folder="."):
    """A case as a line of a file in `folder`, with the target in the terms of the methods of
    table 1."""
    row = {"id": case.id, "neutral": case.neutral, "v": case.v, "a": case.a}
    if case.group:
        row["group"] = case.group
    if case.source:
        row["source"] = os.path.relpath(case.source, folder)
    row["numbers"] = data.with_numbers(case.neutral, case.v, case.a)
    row["words"] = data.with_words(case.neutral, case.v, case.a)
    row["emoedit"] = case.label
    # EmotiCrafter takes V and A on -3..3.
    row["emoticrafter"] = [round((x - 5) * 3 / 4, 4) for x in (case.v, case.a)]
    return row


def write_cases(args):
    if args.data is None:
        cases = held_out_cases(args.count or 1000, args.seed)
    else:
        rows = data.load_rows(args.data, "test")[:args.count]
        cases = [Case(row.id, row.neutral, row.v, row.a, None, row.label, row.image)
                 for row in rows]
    if args.grid is not None:
        cases = grid_of(cases, args.grid)  # without labels: they say nothing of a grid's targets
    write_rows(args.out, [for_others(case, args.out.parent) for case in cases])
    print(f"{args.out}: {len(cases)} cases")


def main(argv):
    parser = cli.parser(__doc__, prog="python -m evaluation cases")
    parser.add_argument("--data", type=Path,
                        help="dataset whose test rows are the cases (default: made scenes)")
    parser.add_argument("--count", type=cli.integer(1, 1_000_000),
                        help="cases, or prompts with --grid (default: 1000, or all with --data)")
    parser.add_argument("--grid", type=cli.integer(2, 9), metavar="K",
                        help="each prompt on a K × K grid of V and A, for continuity")
    parser.add_argument("--seed", type=cli.integer(0, 2**31), default=0,
                        help="of made scenes (default: %(default)s)")
    parser.add_argument("--out", type=Path, required=True, help="file of JSON lines")
    args = parser.parse_args(argv)
    return cli.run_program(lambda: write_cases(args))
