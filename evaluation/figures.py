"""The paper's figures: methods side by side (3, 4, 8 to 13), people's values and the lexicon's (6).

    python -m evaluation sheet --cases cases.jsonl --images ours=DIR --images FLUX=DIR --out 3.png
    python -m evaluation sheet --cases grid.jsonl --ids 'test0_0_*_a5' --images ours=DIR --out 4.png
    python -m evaluation values --cases cases.jsonl --human ratings.csv --out 6.png

A sheet has a row for each method and a column for each case, with its prompt and target above.
"""

import textwrap
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from evaluation import rate
from evaluation.cases import load_cases, pictures_of
from evaluation.metrics import spearman
from evaluation.tables import people
from parts import cli
from parts.cli import UserError
from parts.files import open_picture, save_png

LINE = 16  # pixels of a line of text
GAP = 6
MOST = 24  # columns of a sheet


# --------------------------------------------------------------------------------------------------
# Methods side by side


def sheet(methods, cases, side):
    """A PIL image: a row for each method of {name: paths of its pictures}, a column for each case.
    """
    # 1. measure: the names at the left, prompts and targets above
    font = ImageFont.load_default(12)
    margin = GAP + max(int(font.getlength(name)) for name in methods) + GAP
    prompts = [textwrap.wrap(case.neutral, max(8, side // 7)) for case in cases]
    shared = len({case.neutral for case in cases}) == 1
    if shared:  # one prompt for all columns is said once
        prompts = [[cases[0].neutral]] + [[""]] * (len(cases) - 1)
    top = GAP + LINE * (max(map(len, prompts)) + 1)
    width = margin + len(cases) * (side + GAP)
    page = Image.new("RGB", (width, top + len(methods) * (side + GAP)), "white")
    draw = ImageDraw.Draw(page)

    # 2. draw
    for column, (case, lines) in enumerate(zip(cases, prompts, strict=True)):
        x = margin + column * (side + GAP)
        target = f"V {case.v:.1f}  A {case.a:.1f}"
        for number, text in enumerate([*lines, target]):
            draw.text((x, GAP + number * LINE), text, "black", font)
    for row, (name, paths) in enumerate(methods.items()):
        y = top + row * (side + GAP)
        draw.text((GAP, y + side / 2), name, "black", font, anchor="lm")
        for column, path in enumerate(paths):
            small = open_picture(path)
            small.thumbnail((side, side))
            page.paste(small, (margin + column * (side + GAP), y))
    return page


def draw_sheet(args):
    cases = [case for case in load_cases(args.cases) if fnmatchcase(case.id, args.ids)]
    if not cases:
        raise UserError(f"{args.cases}: no case has an id like --ids {args.ids!r}")
    if len(cases) > MOST:
        cli.say(f"{len(cases)} cases: the first {MOST} are shown; --ids chooses others")
    cases = cases[:MOST]
    methods = {}
    for text in args.images:
        name, _, folder = text.rpartition("=")  # [NAME=]DIR
        name = name or Path(folder).resolve().name
        if name in methods:
            raise UserError(f"--images: two methods are called {name}; give one another NAME=DIR")
        methods[name] = pictures_of(folder, cases)
    save_png(sheet(methods, cases, args.side), args.out)
    print(args.out)


def sheet_main(argv):
    parser = cli.parser(__doc__, prog="python -m evaluation sheet")
    add = parser.add_argument
    add("--cases", type=Path, required=True, help="a file of `python -m evaluation cases`")
    add("--images", action="append", required=True, metavar="[NAME=]DIR",
        help="folder of a method's pictures, <id>.png each; a row for each")
    add("--ids", default="*", metavar="PATTERN", help="cases to show, such as 'test0_0_*_a5'")
    add("--side", type=cli.integer(32, 1024), default=160,
        help="of a picture in pixels (default: %(default)s)")
    add("--out", type=Path, required=True, help="the PNG")
    args = parser.parse_args(argv)
    return cli.run_program(lambda: draw_sheet(args))


# --------------------------------------------------------------------------------------------------
# Values of people and of the lexicon


def panel(draw, at, title, curves):
    """Sorted values, 1..9, of {name: (values, colour)}, as lines in a frame from `at` on."""
    font = ImageFont.load_default(12)
    x, y = at
    width = 400
    height = 240
    draw.rectangle((x, y, x + width, y + height), outline=(190, 190, 190))
    draw.text((x, y - 18), title, "black", font)
    for level in (1, 5, 9):
        line = y + height - (level - 1) / 8 * height
        draw.text((x - 6, line), str(level), (90, 90, 90), font, anchor="rm")
    for number, (name, (values, colour)) in enumerate(curves.items()):
        places = np.linspace(x, x + width, len(values))
        heights = y + height - (np.sort(values) - 1) / 8 * height
        draw.line(list(zip(places.tolist(), heights.tolist(), strict=True)), colour, 2)
        draw.text((x + 8, y + 6 + LINE * number), name, colour, font)


def draw_values(args):
    cases = {case.id: case for case in load_cases(args.cases)}
    path, _, method = args.human.partition(":")  # FILE[:METHOD]
    human = people(rate.read_ratings(path), method or None)
    rated = [name for name in human if name in cases]
    if len(rated) < 2:
        raise UserError(f"{path}: rates {len(rated)} of the cases of {args.cases}; expected at "
                        f"least 2")
    image = Image.new("RGB", (920, 300), "white")
    draw = ImageDraw.Draw(image)
    for axis, (letter, title) in enumerate((("v", "valence"), ("a", "arousal"))):
        said = np.array([human[name][axis] for name in rated])
        lexicon = np.array([getattr(cases[name], letter) for name in rated])
        panel(draw, (30 + 460 * axis, 40), f"{title}, {len(rated)} pictures, sorted",
              {"people": (said, (30, 90, 200)), "lexicon": (lexicon, (200, 90, 30))})
        apart = np.abs(np.sort(said) - np.sort(lexicon)).mean()
        print(f"{title}: sorted curves {apart:.2f} apart on average; picture by picture "
              f"{np.abs(said - lexicon).mean():.2f}, Spearman {spearman(said, lexicon):.2f}")
    save_png(image, args.out)
    print(args.out)


def values_main(argv):
    parser = cli.parser(__doc__, prog="python -m evaluation values")
    add = parser.add_argument
    add("--cases", type=Path, required=True,
        help="cases whose V and A are the dataset's, of `evaluation cases --data`")
    add("--human", required=True, metavar="FILE[:METHOD]",
        help="ratings of `python -m evaluation rate` of the dataset's pictures")
    add("--out", type=Path, required=True, help="the PNG")
    args = parser.parse_args(argv)
    return cli.run_program(lambda: draw_values(args))
