"""Does the generator learn to please the judge only? The miniature's appendix E.1.1.

    python -m tiny.hacking_study        # trains what is missing, measures, draws docs/hacking.png

Each arm is a training that is much longer than it need be, by the judge's score alone or with a
share of PickScore, with and without a KL to the base. Every 20 steps its averaged adapter draws 32
validation cases. The judge, who gave the rewards, is asked how near they are, and those who gave
none are asked too: the meter, the examiner of content and a CLIP of another seed. Hacking is when
the first goes on rising and the others fall.

The first two arms are rows of tiny.generator_study, and all runs lie in its folder. Further flags
go to train_gen.py. A killed study goes on where it was; the cases go to docs/records/hacking.jsonl.
"""

import sys
from dataclasses import replace

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from parts import cli
from parts.files import open_picture, save_png
from parts.sheets import stacked
from tiny import generator_study, results
from tiny.generator_study import DATASET, LONG, ROWS, Cases, Row, folder_of, product_of, training
from tiny.judge_study import digest_of, run_missing, shown

PICTURE = results.DOCS / "hacking.png"
TABLE = "hacking"
ARMS = {  # name: (row as in the generator's study, colour in the plot)
    "emotion, β 0": (ROWS["emotion only"], (200, 40, 40)),
    "emotion + PickScore, β 0.002": (ROWS["emotion and PickScore"], (30, 90, 200)),
    "emotion, β 0.02": (
        Row("emotion_kl", (*LONG, "--reward-weights", "emotion=1", "--beta", "0.02")),
        (230, 140, 40)),
    "emotion + 3 PickScore, β 0.002": (
        Row("more_pickscore", (*LONG, "--reward-weights", "emotion=1,pickscore=3")),
        (40, 150, 160)),
    "emotion + PickScore, β 0.02": (Row("more_kl", (*LONG, "--beta", "0.02")), (90, 60, 160)),
}
PANELS = {  # title: figure of a case's record
    "V-Error + A-Error by the judge":
        lambda r: sum(results.error_by_judge(r, axis) for axis in (0, 1)),
    "V-Error + A-Error by the meter":
        lambda r: sum(abs(r["meter"][axis] - r["va"[axis]]) for axis in (0, 1)),
    "content, %": lambda r: r["content"],
    "CLIP-Score of another seed": lambda r: r["other_clip_score"],
}
SHOWN = 4  # watched prompts in the picture of strips


def run_of(arm, seed):
    """A run's folder."""
    return folder_of(ARMS[arm][0].folder, seed)


def adapter_of(arm, seed, step):
    return run_of(arm, seed) / "adapters" / f"{step:08d}"


def evaluation(arm, seed, step, cases):
    """(folder, command) of how Cases are measured of a run after `step`; 0: of the base."""
    row = ARMS[arm][0]
    row = replace(row, step=step) if step else replace(row, flags=None)
    return generator_study.evaluation(row, seed, cases)


def study(args, extra):
    # 1. trainings, then evaluations; all arms start from one base
    runs = [(arm, seed) for arm, (row, _) in ARMS.items() for seed in row.seeds]
    trainings = {(arm, seed): training(ARMS[arm][0], seed, extra) for arm, seed in runs}
    run_missing([(run_of(arm, seed), product_of(ARMS[arm][0]), [command])
                 for (arm, seed), command in trainings.items()], args.jobs, "generators")
    steps = range(args.every, int(LONG[1]) + 1, args.every)
    kept = [(*run, step) for run in runs for step in steps if adapter_of(*run, step).exists()]
    points = [(*runs[0], 0), *kept]
    cases = Cases({}, args.cases, 0, "evaluation_hacking", "validation")
    measured = [evaluation(*point, cases) for point in points]
    run_missing([(out, "evaluate.json", [command]) for out, command in measured], args.jobs, TABLE)

    # 2. records
    for (arm, seed, step), (out, command) in zip(points, measured, strict=True):
        lines = [shown(trainings[arm, seed]), shown(command)]
        name = f"{run_of(arm, seed).name}_step{step}"
        results.add_run(TABLE, f"{arm}|{step}" if step else "base|0", name, seed, out, "numbers",
                        lines, digest_of(DATASET))

    # 3. the picture: curves, and what the watched prompts look like
    curves = draw_curves(points_of(results.rows_of(TABLE)))
    firsts = [(arm, row.seeds[0]) for arm, (row, _) in list(ARMS.items())[:2]]
    save_png(stacked(curves, draw_strips(firsts)), PICTURE)
    print(PICTURE)


def points_of(rows):
    """{arm: {step: [a mean for each panel]}} of the records' rows, the base in every arm."""
    arms = {}
    for row, runs in rows.items():
        arm, step = row.rsplit("|", 1)
        cases = [record for records in runs.values() for record in records]
        means = [float(np.nanmean([figure(case) for case in cases])) for figure in PANELS.values()]
        arms.setdefault(arm, {})[int(step)] = means
    base = arms.pop("base")
    return {arm: base | points for arm, points in arms.items()}


def draw_curves(arms):
    """Four panels over the steps, a line for each arm, and a legend."""
    sheet = Image.new("RGB", (900, 560), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(12)
    for number, title in enumerate(PANELS):
        # 1. the panel's frame and scale
        left = 60 + 450 * (number % 2)
        top = 30 + 220 * (number // 2)
        right = left + 360
        bottom = top + 170
        values = [points[step][number] for points in arms.values() for step in points]
        low = min(values)
        high = max(values)
        last = max(step for points in arms.values() for step in points)
        draw.rectangle((left, top, right, bottom), outline=(190, 190, 190))
        draw.text((left, top - 17), title, "black", font)
        # 2. a line for each arm
        for arm, points in arms.items():
            line = []
            for step in sorted(points):
                share = (points[step][number] - low) / ((high - low) or 1)
                line.append((left + step / last * 360, bottom - share * 170))
            draw.line(line, ARMS[arm][1], 2)
        # 3. the ends of both axes
        draw.text((left - 5, top), f"{high:.3g}", (90, 90, 90), font, anchor="rt")
        draw.text((left - 5, bottom), f"{low:.3g}", (90, 90, 90), font, anchor="rb")
        draw.text((right, bottom + 3), f"{last} steps", (90, 90, 90), font, anchor="rt")
    for number, arm in enumerate(arms):
        at = (60 + 290 * (number % 3), 475 + 22 * (number // 3))
        draw.line((*at, at[0] + 20, at[1]), ARMS[arm][1], 3)
        draw.text((at[0] + 26, at[1]), readable(arm), "black", font, anchor="lm")
    return sheet


def draw_strips(runs):
    """The watched prompts of two runs over the steps: a row for each prompt, a column a step."""
    font = ImageFont.load_default(12)
    parts = []
    for arm, seed in runs:
        files = sorted((run_of(arm, seed) / "strips").glob("*.png"))
        files = files[::max(1, (len(files) - 1) // 5)]
        strips = [np.asarray(open_picture(file)) for file in files]  # each [128, 6·128, 3]
        columns = [np.vstack([strip[:, 128 * i:128 * (i + 1)] for i in range(SHOWN)])
                   for strip in strips]
        sheet = Image.new("RGB", (128 * len(columns), 128 * SHOWN + 40), "white")
        sheet.paste(Image.fromarray(np.hstack(columns)), (0, 40))
        draw = ImageDraw.Draw(sheet)
        draw.text((4, 4), readable(arm), "black", font)
        for i, file in enumerate(files):
            draw.text((128 * i + 4, 22), f"step {int(file.stem)}", (90, 90, 90), font)
        parts.append(sheet)
    return stacked(*parts)


def readable(arm):
    """An arm's name without the letter that Pillow's own font lacks."""
    return arm.replace("β", "beta")


def main(argv=None):
    parser = cli.parser(__doc__)
    add = parser.add_argument
    add("--every", type=cli.integer(1, 10**6), default=20,
        help="steps between evaluations (default: %(default)s)")
    add("--cases", type=cli.integer(2, 10**6), default=32,
        help="validation cases (default: %(default)s)")
    add("--jobs", type=cli.integer(1, 1000), default=2, help="at a time (default: %(default)s)")
    args, extra = parser.parse_known_args(argv)
    return cli.run_program(lambda: study(args, extra))


if __name__ == "__main__":
    sys.exit(main())
