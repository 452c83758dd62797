"""Cases: what methods are compared on."""

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import data
from data import check_va, parse_lines
from parts import cli
from parts.cli import UserError
from parts.files import write_rows
from tiny import scenes


@dataclass(frozen=True)
class Case:
    """A picture that is wished for: what to draw, and the V and A it should have."""
    id: str
    neutral: str
    v: float
    a: float
    group: str | None = None  # of cases that differ in V and A only


def load_cases(path):
    """The cases of a file of JSON lines with id, neutral, v, a and perhaps group, such as a dataset's test.jsonl (other keys
    are passed over). Raises UserError at the first unusable line."""
    seen = set()

    def parse(raw):
        case = Case(str(raw["id"]), str(raw["neutral"]), *check_va(raw["v"], raw["a"]), raw.get("group"))
        if Path(case.id).name != case.id or case.id in seen:  # it names the case's picture
            raise ValueError(f"the id {case.id!r} {'a second time' if case.id in seen else 'cannot name a file'}")
        seen.add(case.id)
        return case

    if not Path(path).is_file():
        raise UserError(f"{path}: no such file; expected JSON lines with id, neutral, v and a, like a dataset's "
                           f"test.jsonl")
    return parse_lines(path, parse)


def pictures_of(folder, cases):
    """The picture that a method made of each case: `<id>.png`, .jpg, .jpeg or .webp in its folder. Raises UserError that
    names the missing ones."""
    def find(case):
        paths = (Path(folder) / f"{case.id}.{ending}" for ending in ("png", "jpg", "jpeg", "webp"))
        return next((path for path in paths if path.is_file()), None)

    paths = list(map(find, cases))
    lost = [case.id for case, path in zip(cases, paths, strict=True) if path is None]
    if lost:
        raise UserError(f"{folder}: {len(lost)} of {len(cases)} pictures are missing: {', '.join(lost[:5])}"
                           f"{', …' if len(lost) > 5 else ''}; expected <id>.png, .jpg, .jpeg or .webp")
    return paths


def picture_of(folder, case):
    return pictures_of(folder, [case])[0]


def held_out_cases(count, seed=0):
    """Cases of the miniature: scenes drawn apart from the training rows, V and A uniform on 1..9."""
    rng = np.random.default_rng([seed, 4242])
    return [Case(f"scene{seed}_{i}", scenes.neutral_caption(scenes.random_scene(rng)),
                      *map(float, rng.uniform(data.VA_MIN, data.VA_MAX, 2))) for i in range(count)]


def grid_of(cases, side):
    """Each case's prompt over a side × side grid of V and A, as one group."""
    levels = np.linspace(data.VA_MIN, data.VA_MAX, side).tolist()
    return [Case(f"{case.id}_v{v:g}_a{a:g}", case.neutral, v, a, case.id)
            for case in cases for a in levels for v in levels]


def for_others(case, label=None):
    """A case as a line of a file for other methods, which the paper compares with: prompts that say the target, EmoEdit's
    class word (the picture's own label, else the nearest class), and EmotiCrafter's V and A, on -3..3."""
    row = {"id": case.id, "neutral": case.neutral, "v": case.v, "a": case.a} | ({"group": case.group} if case.group else {})
    return row | {"numbers": data.with_numbers(case.neutral, case.v, case.a),
                  "words": data.with_words(case.neutral, case.v, case.a),
                  "emoedit": label or data.nearest_emotion(case.v, case.a),
                  "emoticrafter": [round((x - 5) * 3 / 4, 4) for x in (case.v, case.a)]}


def write_cases(argv):
    """`evaluate.py cases`: a file of cases for any method."""
    parser = argparse.ArgumentParser(prog="evaluate.py cases", description="Write the cases that methods are compared on.")
    parser.error = cli.stop_parsing
    parser.add_argument("--data", type=Path, help="dataset whose test rows are the cases (default: scenes of the miniature)")
    parser.add_argument("--count", type=int, default=1000, help="cases, or prompts with --grid (default: %(default)s)")
    parser.add_argument("--grid", type=int, metavar="K", help="each prompt on a K × K grid of V and A, for continuity")
    parser.add_argument("--seed", type=int, default=0, help="of the miniature's scenes")
    parser.add_argument("--out", type=Path, required=True, help="file of JSON lines")
    args = parser.parse_args(argv)
    if args.count < 1 or (args.grid is not None and not 2 <= args.grid <= 9):
        cli.stop_parsing("--count: expected at least 1; --grid: expected 2..9")
    rows = [] if args.data is None else data.load_rows(args.data, "test")[:args.count]
    cases = [Case(r.id, r.neutral, r.v, r.a) for r in rows] if args.data else held_out_cases(args.count, args.seed)
    labels = {row.id: row.label for row in rows} if args.grid is None else {}
    cases = cases if args.grid is None else grid_of(cases, args.grid)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_rows(args.out, [for_others(case, labels.get(case.id)) for case in cases])
    print(f"{args.out}: {len(cases)} cases")
    return 0


def seeds_of(cases, seed):
    """The seed of each case's noise: its place, counted from `seed`; all cases of a group share that of their first."""
    first = {}
    return [seed + (first.setdefault(case.group, i) if case.group else i) for i, case in enumerate(cases)]
