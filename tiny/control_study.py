"""How finely do the pictures follow the wished valence and arousal?

    python -m tiny.control_study        # 16 prompts of the test cases, about 6 minutes on two cores

Each prompt is drawn from one noise over two fine sweeps, of eleven wishes a tenth apart: V from 6.0
to 7.0 at A 4.5, and A from 4.0 to 5.0 at V 6.5; and over a 5 × 5 grid of the whole plane. Counted
are how many of the eleven pictures differ, the rank correlation of the meter's reading with the
wish, and the share of neighbours in the grid of which the one that should be higher is. The rows
are the generators with and without the adapter, and the ways to say the target.

The figures go to docs/records, from where `python -m tiny.results` writes the page.
"""

import sys
from itertools import product

import numpy as np
from tqdm import tqdm

import data
from evaluation.cases import grid_of, held_out_cases
from evaluation.metrics import mean, neighbours_in_order, spearman
from parts import cli
from parts.pipeline import TINY, load_generator, to_images
from tiny import results, scenes
from tiny.judge_study import shown

TABLE = "control"
SIZE = 128
TENTHS = np.linspace(0, 1, 11)
SWEEPS = {  # axis: the eleven targets
    "v": [(round(6 + x, 1), 4.5) for x in TENTHS],
    "a": [(6.5, round(4 + x, 1)) for x in TENTHS],
}


def draw(generator, form, neutral, targets, seed, micro=32):
    """PIL images of one prompt with each target, all from one noise."""
    with_target = data.TARGET_FORMS[form]
    prompts = [with_target(neutral, v, a) for v, a in targets]
    images = []
    for start in range(0, len(prompts), micro):
        part = prompts[start:start + micro]
        images += to_images(generator.draw(part, [seed] * len(part), SIZE))
    return images


def figures_of(generator, form, case, seed):
    """{figure: number} of one prompt."""
    figures = {}
    for axis, targets in SWEEPS.items():
        images = draw(generator, form, case.neutral, targets, seed)
        number = "va".index(axis)
        read = [scenes.measure_va(image)[number] for image in images]
        figures[f"{axis}_pictures"] = len({image.tobytes() for image in images})
        figures[f"{axis}_spearman"] = spearman([target[number] for target in targets], read)
    grid = grid_of([case], 5)
    images = draw(generator, form, case.neutral, [(each.v, each.a) for each in grid], seed)
    records = [{"v": each.v, "a": each.a, "group": each.group,
                "read": {"meter": scenes.measure_va(image)}}
               for each, image in zip(grid, images, strict=True)]
    for number, axis in enumerate("va"):
        figures[f"{axis}_order"] = mean(neighbours_in_order(records, "meter", number))
    return figures


def study(args):
    adapters = {"base": None, "after reward feedback": args.adapter}
    cases = held_out_cases(args.prompts, seed=0)
    for (name, adapter), form in product(adapters.items(), data.TARGET_FORMS):
        generator = load_generator(TINY, adapter=adapter)
        row = f"{name}, {form}"
        bar = tqdm(cases, row)
        records = [{"id": case.id, **figures_of(generator, form, case, seed)}
                   for seed, case in enumerate(bar)]
        command = shown([None, "-m", "tiny.control_study", "--prompts", args.prompts, "--adapter",
                         args.adapter])
        results.add_figures(TABLE, row, {"form": form, "commands": [command]}, records)
    print(results.table_of(TABLE))


def main(argv=None):
    parser = cli.parser(__doc__)
    parser.add_argument("--prompts", type=cli.integer(2, 10**4), default=16,
                        help="test cases (default: %(default)s)")
    parser.add_argument("--adapter", default=str(TINY / "adapter"),
                        help="of the second generator (default: the miniature's)")
    args = parser.parse_args(argv)
    return cli.run_program(lambda: study(args))


if __name__ == "__main__":
    sys.exit(main())
