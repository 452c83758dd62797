"""How well a generator hits valence and arousal (EmoFeedback², section 4.2): V-Error, A-Error and rank correlation.

    python evaluate.py                 # the miniature, 200 held-out cases, about 3 minutes on 2 cores
    python evaluate.py --cases 40      # a quick look

Every case is a neutral prompt with a target V and A, drawn once with the target as numbers and once as words. The
pictures are measured by the analytic meter of the miniature world, which knows its landscapes and nothing else: the
figures of another model mean little. Left out here: judges, CLIP-Score, CLIP-IQA and the aesthetic score.
"""

import argparse
import sys
import time
from pathlib import Path

import numpy as np
from tqdm import tqdm

import data
import sample
import weights
from tiny import scenes

FORMS = {"numbers": data.with_numbers, "words": data.with_words}


def held_out_cases(count, seed=0):
    """[(neutral prompt, v, a)]: scenes drawn apart from the training rows, V and A uniform on 1..9."""
    rng = np.random.default_rng([seed, 4242])
    return [(scenes.neutral_caption(scenes.random_scene(rng)), *map(float, rng.uniform(1, 9, 2))) for _ in range(count)]


def ranks(x):
    """Ranks 0..n-1 of a sequence; equal values share their mean rank."""
    _, inverse, counts = np.unique(np.asarray(x, float), return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts + 1) / 2)[inverse]


def spearman(x, y):
    """Rank correlation in -1..1; NaN if one side has no spread."""
    x, y = ranks(x), ranks(y)
    spread = x.std() * y.std()
    return float(((x - x.mean()) * (y - y.mean())).mean() / spread) if spread else float("nan")


def scores(targets, measured):
    """Metrics of [(v, a)] measured against [(v, a)] wanted."""
    targets, measured = np.asarray(targets), np.asarray(measured)  # [n,2] each
    error = np.abs(measured - targets).mean(0)
    return {"v_error": float(error[0]), "a_error": float(error[1]),
            "v_spearman": spearman(targets[:, 0], measured[:, 0]), "a_spearman": spearman(targets[:, 1], measured[:, 1])}


def measure(draw, cases, form, batch, seed):
    """[(v, a)] that the meter reads in the pictures which `draw(prompts, seeds)` makes of the cases."""
    measured = []
    with tqdm(total=len(cases), desc=form, unit="picture") as bar:
        for start in range(0, len(cases), batch):
            part = cases[start:start + batch]
            pixels = draw([FORMS[form](*case) for case in part], [seed + start + i for i in range(len(part))])
            measured += [scenes.measure_va(image) for image in sample.to_images(pixels)]
            bar.update(len(part))
    return measured


def table(results):
    """The results as a Markdown table."""
    lines = ["| target given as | V-Error ↓ | A-Error ↓ | Spearman V ↑ | Spearman A ↑ | seconds per picture |",
             "| --- | --- | --- | --- | --- | --- |"]
    for form, r in results.items():
        lines.append(f"| {form} | {r['v_error']:.2f} | {r['a_error']:.2f} | {r['v_spearman']:.2f} | {r['a_spearman']:.2f} "
                     f"| {r['seconds_per_picture']:.2f} |")
    return "\n".join(lines)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=200, help="(prompt, V, A) cases (default: %(default)s)")
    parser.add_argument("--model", default=sample.TINY, help="folder or hub id of the generator (default: the miniature)")
    parser.add_argument("--batch", type=int, default=20, help="pictures drawn together (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=25, help="steps of the sampler (default: %(default)s)")
    parser.add_argument("--guidance", type=float, default=4.5, help="classifier-free guidance (default: %(default)s)")
    parser.add_argument("--size", type=int, default=128, help="side in pixels (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the cases and the noise (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for evaluate.json (default: %(default)s)")
    args = parser.parse_args(argv)
    if args.cases < 2 or args.batch < 1:
        parser.error("--cases must be at least 2 and --batch at least 1")
    return args


def main(argv=None):
    args = parse_args(argv)
    try:
        generator = sample.load_generator(args.model, args.device)
    except weights.CheckpointError as error:
        sample.say(f"error: {error}")
        return 2
    cases, results = held_out_cases(args.cases, args.seed), {}
    for form in FORMS:
        started = time.perf_counter()
        measured = measure(lambda prompts, seeds: generator.draw(prompts, seeds, args.size, args.steps, args.guidance),
                           cases, form, args.batch, args.seed)
        seconds = (time.perf_counter() - started) / len(cases)
        results[form] = {**scores([case[1:] for case in cases], measured), "seconds_per_picture": seconds}
    print(table(results))
    args.out.mkdir(parents=True, exist_ok=True)
    facts = {**vars(args), "model": generator.name, "out": str(args.out)}
    weights.write_json(args.out / "evaluate.json", {"arguments": facts, "results": results})
    return 0


if __name__ == "__main__":
    sys.exit(main())
