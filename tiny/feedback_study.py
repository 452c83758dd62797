"""Reward and textual feedback in the miniature, alone and together (figure 5 as numbers), and error by round.

    python tiny/feedback_study.py                 # 100 held-out cases, 3 seeds; runs what is missing, prints the tables
    python tiny/feedback_study.py --cases 10 --seeds 0     # a quick look

A case is a neutral request with a target V and A, given as numbers in the first prompt. For each generator, the base and the
one after reward feedback (RF), it is drawn

- once,
- by textual feedback (TF, feedback.refine): rounds 0..3 of `--n` pictures, the best of all by the judge,
- and as TF's control: best of as many pictures by the judge, of the unchanged prompt. Round 0 is the same pictures.

The meter, which takes no part, and the judge, which chose, read V and A of the chosen picture; CLIP-Score compares it with
the request. A killed study goes on with the next case; the cases lie in tiny/cache/feedback_study.
"""

import argparse
import json
import math
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from evaluation.cases import held_out_cases
from parts.files import read_records, whole_records
from parts.pipeline import TINY, judge_of, load_generator, to_images

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that `python tiny/feedback_study.py` finds data.py
import data
import feedback
import qwen_vl
from evaluation import metrics
from parts import clip
from tiny import scenes
from tiny.judge_study import run_all

STUDY = Path(__file__).resolve().parent / "cache" / "feedback_study"
GENERATORS = ("base", "RF")
ROUNDS = 4
COLUMNS = {"v": "V-Error ↓", "a": "A-Error ↓", "judge_v": "V-Error by judge", "judge_a": "A-Error by judge",
           "clip": "CLIP-Score ↑", "pictures": "pictures", "seconds": "seconds"}


# ---------------------------------------------------------------------------------------------------------------------
# One case


def figures(picture, target, request, scorer, count):
    """What meter, judge and CLIP say of the picture chosen among `count`; NaN where the judge's answer could not be read."""
    said = {"": scenes.measure_va(picture.image), "judge_": picture.judgement.va}
    return {f"{who}{axis}": abs(x - wish) for who, va in said.items() for axis, x, wish in zip("va", va, target)} | {
        "loss": picture.loss, "clip": float(metrics.clip_score(scorer, [picture.image], [request])[0]), "pictures": count}


def run_case(case, seed, draw, judge, scorer, n, readings):
    """The record of one case: figures of one picture, and by round of TF and of its control."""
    request, target = case.neutral, (case.v, case.a)
    start = data.with_numbers(request, *target)

    def generate(prompt, seeds):
        return to_images(draw([prompt] * len(seeds), seeds))

    started = time.perf_counter()
    rounds = feedback.refine(request, *target, generate, judge, ROUNDS, n, seed=seed, start=start, readings=readings)
    took = time.perf_counter() - started
    control = rounds[:1]
    for number in range(1, len(rounds)):  # the same seeds, the first prompt
        control += feedback.refine(request, *target, generate, judge, 1, n, seed=seed + number * n, start=start,
                                   readings=readings)

    def best(of):
        r, i = feedback.best_of(of)
        return figures(of[r].pictures[i], target, request, scorer, n * len(of))

    first = figures(rounds[0].pictures[0], target, request, scorer, 1)
    done = range(1, len(rounds) + 1)
    return {"case": [request, *target], "seed": seed, "prompts": [r.prompt for r in rounds],
            "notes": [r.note for r in rounds], "one": first | {"seconds": rounds[0].seconds["draw"] / n},
            "words": [best(rounds[:k]) | {"seconds": took} for k in done], "control": [best(control[:k]) for k in done],
            "words_round": [mean_errors(r.pictures, target) for r in rounds],
            "seconds": [r.seconds for r in rounds]}


def mean_errors(pictures, target):
    """{"v": , "a": } by the meter of all pictures of a round, chosen or not."""
    errors = np.abs(np.subtract([scenes.measure_va(picture.image) for picture in pictures], target)).mean(0)
    return dict(zip("va", errors.tolist()))


def run_cases(args):
    """One generator and seed: append the missing cases to its file."""
    model = qwen_vl.QwenVL.from_pretrained(args.judge)
    judge = judge_of(model, max_new_tokens=feedback.REWRITE_LIMIT, progress=False)
    generator = load_generator(TINY, adapter=args.adapter if args.only == "RF" else None)
    scorer = clip.CLIP.from_pretrained(TINY / "clip")
    draw = partial(generator.draw, size=128, steps=args.steps)
    path = file_of(args, args.only, args.seeds[0])
    path.parent.mkdir(parents=True, exist_ok=True)
    records = whole_records(path)
    cases = held_out_cases(args.cases, seed=5)
    for i in tqdm(range(len(records), args.cases), f"{args.only} {args.seeds[0]}", args.cases, initial=len(records)):
        seed = (args.seeds[0] * args.cases + i) * 10_000
        record = run_case(cases[i], seed, draw, judge, scorer, args.n, args.readings)
        with open(path, "a", encoding="utf-8") as f:
            f.write(json.dumps(record) + "\n")


def file_of(args, generator, seed):
    return args.out / f"{generator}_seed{seed}" / "cases.jsonl"


# ---------------------------------------------------------------------------------------------------------------------
# Tables


def over_seeds(records, get):
    """Mean over the cases, then "mean ± standard deviation" over the seeds. records: one list a seed. What could not be read
    (NaN) is left out."""
    means = [np.mean([x for x in map(get, cases) if not math.isnan(x)] or math.nan) for cases in records]
    return f"{np.mean(means):.2f}" + (f" ± {np.std(means, ddof=1):.2f}" if len(means) > 1 else "")


def tables(results):
    """Two Markdown tables of {generator: [records of a seed]}: the four methods with TF's control, and error by round."""
    lines = ["| method | " + " | ".join(COLUMNS.values()) + " |", "| --- " * (len(COLUMNS) + 1) + "|"]
    for name, records in results.items():
        for method, get in ((name, lambda r: r["one"]), (f"{name}, best of as many as TF", lambda r: r["control"][-1]),
                            ("TF" if name == "base" else f"{name} + TF", lambda r: r["words"][-1])):
            cells = ["" if key not in get(records[0][0]) else over_seeds(records, lambda r, k=key, g=get: g(r)[k])
                     for key in COLUMNS]
            lines.append(f"| {method} | {' | '.join(cells)} |")
    lines += ["", "| V-Error + A-Error by the meter | " + " | ".join(f"round {r}" for r in range(ROUNDS)) + " |",
              "| --- " * (ROUNDS + 1) + "|"]
    for name, records in results.items():
        for kind, key in (("TF, best so far", "words"), ("control: best of as many", "control"),
                          ("TF, mean of the round's pictures", "words_round")):
            cells = [over_seeds(records, lambda r, k=key, n=n: r[k][n]["v"] + r[k][n]["a"]) for n in range(ROUNDS)]
            lines.append(f"| {name}: {kind} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=100, help="held-out cases (default: %(default)s)")
    parser.add_argument("--seeds", type=lambda text: [int(s) for s in text.split(",")], default=[0, 1, 2],
                        help="of the pictures (default: 0,1,2)")
    parser.add_argument("--n", type=int, default=4, help="pictures a round (default: %(default)s)")
    parser.add_argument("--readings", type=int, default=8, help="answers of the judge a picture (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=12, help="steps of the sampler (default: %(default)s)")
    parser.add_argument("--judge", type=Path, default=TINY / "judge", help="folder of the judge")
    parser.add_argument("--adapter", type=Path, default=TINY / "adapter", help="folder of the adapter of RF")
    parser.add_argument("--out", type=Path, default=STUDY, help="folder of the study (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time (default: %(default)s)")
    parser.add_argument("--only", choices=GENERATORS, help="run the cases of one generator and the first seed, no table")
    args = parser.parse_args(argv)
    if args.only:
        return run_cases(args)
    flags = [f"--{name}={getattr(args, name)}" for name in ("cases", "n", "readings", "steps", "judge", "adapter", "out")]
    runs = []
    for seed in args.seeds:
        for name in GENERATORS:
            if not finished(folder := file_of(args, name, seed).parent, args.cases):
                runs.append((folder, [[sys.executable, __file__, "--only", name, "--seeds", seed, *flags]]))
    run_all(runs, args.jobs, "feedback")
    print(tables({name: [read_records(file_of(args, name, seed))[:args.cases] for seed in args.seeds]
                  for name in GENERATORS}))
    return 0


def finished(folder, cases):
    return len(read_records(folder / "cases.jsonl")) >= cases


if __name__ == "__main__":
    sys.exit(main())
