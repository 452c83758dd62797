"""Reward and textual feedback in the miniature, alone and together (figure 5), and error by round.

    python -m tiny.feedback_study                          # 100 held-out cases, 3 seeds, two tables
    python -m tiny.feedback_study --cases 10 --seeds 0     # a quick look

A case is a neutral request with a target V and A, given as numbers in the first prompt. For each
generator, the base and the one after reward feedback (RF), it is drawn

- once,
- by textual feedback (TF, feedback.refine): rounds 0..3 of `--n` pictures, the best of all by the
  judge,
- and as TF's control: best of as many pictures by the judge, of the unchanged prompt. Round 0 is
  the same pictures.

The meter, which takes no part, and the judge, which chose, read V and A of the chosen picture;
CLIP-Score compares it with the request. A killed study goes on with the next case; the cases lie in
tiny/cache/feedback_study.
"""

if __name__ == "__main__":  # before torch, whose import takes seconds: Ctrl-C ends in one line
    from parts import interrupts
    interrupts.catch()

import math
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

import data
import feedback
import qwen_vl
from evaluation import metrics
from evaluation.cases import held_out_cases
from parts import cli, clip
from parts.files import append_rows, read_records, whole_records
from parts.pipeline import TINY, judge_of, load_generator, to_images
from tiny import scenes
from tiny.judge_study import run_all

STUDY = Path(__file__).resolve().parent / "cache" / "feedback_study"
GENERATORS = ("base", "RF")
ROUNDS = 4
COLUMNS = {"v": "V-Error ↓", "a": "A-Error ↓", "judge_v": "V-Error by judge",
           "judge_a": "A-Error by judge", "clip": "CLIP-Score ↑", "pictures": "pictures",
           "seconds": "seconds"}


# --------------------------------------------------------------------------------------------------
# One case


@dataclass
class Tools:
    """What draws and reads the pictures of every case."""
    draw: object  # (prompts, seeds) -> pictures
    judge: object  # of pipeline.judge_of
    scorer: clip.CLIP
    n: int  # pictures a round
    readings: int  # answers of the judge for each picture


def figures(picture, case, scorer, count):
    """What meter, judge and CLIP say of the picture chosen among `count`.

    NaN where the judge's answer could not be read.
    """
    v, a = scenes.measure_va(picture.image)
    judge_v, judge_a = picture.judgement.va
    # against the request, not the rewritten prompt: did the picture keep what was asked for?
    score = metrics.clip_score(scorer, [picture.image], [case.neutral])
    return {
        "v": abs(v - case.v), "a": abs(a - case.a),
        "judge_v": abs(judge_v - case.v), "judge_a": abs(judge_a - case.a),
        "loss": picture.loss, "clip": float(score[0]), "pictures": count,
    }


def mean_errors(pictures, case):
    """{"v": , "a": } by the meter of all pictures of a round, chosen or not."""
    measured = [scenes.measure_va(picture.image) for picture in pictures]
    errors = np.abs(np.subtract(measured, (case.v, case.a))).mean(0)
    return dict(zip("va", errors.tolist()))


def run_case(case, seed, tools):
    """The record of one case: figures of one picture, and by round of TF and of its control."""
    def generate(prompt, seeds):
        return to_images(tools.draw([prompt] * len(seeds), seeds))

    start = data.with_numbers(case.neutral, case.v, case.a)
    refine = partial(feedback.refine, case.neutral, case.v, case.a, generate, tools.judge,
                     images_per_round=tools.n, start=start, readings=tools.readings)

    # 1. textual feedback
    began = time.perf_counter()
    rounds = refine(rounds=ROUNDS, seed=seed)
    seconds = time.perf_counter() - began  # drawing, judging and rewriting

    # 2. its control: the same seeds, the first prompt
    control = rounds[:1]
    for number in range(1, len(rounds)):
        control += refine(rounds=1, seed=seed + number * tools.n)

    # 3. the best picture after each round
    def best(of):
        r, i = feedback.best_of(of)  # chosen by the judge, never by the meter
        return figures(of[r].pictures[i], case, tools.scorer, tools.n * len(of))

    one = figures(rounds[0].pictures[0], case, tools.scorer, 1)
    done = range(1, len(rounds) + 1)
    return {
        "case": [case.neutral, case.v, case.a],
        "seed": seed,
        "prompts": [r.prompt for r in rounds],
        "notes": [r.note for r in rounds],
        "one": one | {"seconds": rounds[0].seconds["draw"] / tools.n},
        "words": [best(rounds[:k]) | {"seconds": seconds} for k in done],
        "control": [best(control[:k]) for k in done],
        "words_round": [mean_errors(r.pictures, case) for r in rounds],
        "seconds": [r.seconds for r in rounds],
    }


def run_cases(args):
    """One generator and seed: append the missing cases to its file."""
    model = qwen_vl.QwenVL.from_pretrained(args.judge)
    generator = load_generator(TINY, adapter=args.adapter if args.only == "RF" else None)
    tools = Tools(
        draw=partial(generator.draw, size=128, steps=args.sample_steps),
        judge=judge_of(model, max_new_tokens=feedback.REWRITE_LIMIT, progress=False),
        scorer=clip.CLIP.from_pretrained(TINY / "clip"),
        n=args.n,
        readings=args.readings,
    )
    path = file_of(args, args.only, args.seeds[0])
    path.parent.mkdir(parents=True, exist_ok=True)
    done = len(whole_records(path))  # without the line that a kill cut short
    cases = held_out_cases(args.cases, seed=5)
    name = f"{args.only} {args.seeds[0]}"
    for i in tqdm(range(done, args.cases), name, args.cases, initial=done):
        seed = (args.seeds[0] * args.cases + i) * 10_000  # no two cases share a picture's seed
        append_rows(path, [run_case(cases[i], seed, tools)])


def file_of(args, generator, seed):
    return args.out / f"{generator}_seed{seed}" / "cases.jsonl"


# --------------------------------------------------------------------------------------------------
# Tables


def over_seeds(values):
    """Mean over the cases, then "mean ± standard deviation" over the seeds.

    values: for each seed those of all cases. What could not be read (NaN) is left out.
    """
    means = []
    for own in values:
        # a seed without any readable answer stays NaN
        means.append(np.mean([value for value in own if not math.isnan(value)] or math.nan))
    spread = f" ± {np.std(means, ddof=1):.2f}" if len(means) > 1 else ""
    return f"{np.mean(means):.2f}{spread}"


def methods_of(name, record):
    """{row of the first table: its figures} of one generator's record of a case."""
    return {
        name: record["one"],
        f"{name}, best of as many as TF": record["control"][-1],
        "TF" if name == "base" else f"{name} + TF": record["words"][-1],
    }


def method_figures(cases, name, method, key):
    return [methods_of(name, record)[method][key] for record in cases]


def round_errors(cases, kind, number):
    """V-Error + A-Error of each case after a round."""
    return [record[kind][number]["v"] + record[kind][number]["a"] for record in cases]


def tables(results):
    """Two Markdown tables of {generator: [records of a seed]}.

    The methods with TF's control, and error by round.
    """
    rows = [("method", *COLUMNS.values())]
    for name, records in results.items():
        # every record has the same methods, and a method the same figures
        for method, known in methods_of(name, records[0][0]).items():
            cells = [method]
            for key in COLUMNS:
                if key not in known:
                    cells.append("")
                    continue
                values = [method_figures(cases, name, method, key) for cases in records]
                cells.append(over_seeds(values))
            rows.append(cells)
    by_round = [("V-Error + A-Error by the meter", *(f"round {r}" for r in range(ROUNDS)))]
    kinds = {"words": "TF, best so far", "control": "control: best of as many",
             "words_round": "TF, mean of the round's pictures"}
    for name, records in results.items():
        for kind, title in kinds.items():
            cells = [f"{name}: {title}"]
            for number in range(ROUNDS):
                values = [round_errors(cases, kind, number) for cases in records]
                cells.append(over_seeds(values))
            by_round.append(cells)
    return f"{cli.markdown(rows)}\n\n{cli.markdown(by_round)}"


# --------------------------------------------------------------------------------------------------
# The program


def parse_args(argv=None):
    parser = cli.parser(__doc__)
    add = parser.add_argument
    add("--cases", type=cli.integer(1, 10**6), default=100,
        help="held-out cases (default: %(default)s)")
    add("--seeds", type=lambda text: [cli.integer(0, 10**6)(seed) for seed in text.split(",")],
        default=[0, 1, 2], help="of the pictures (default: 0,1,2)")
    add("--n", type=cli.integer(2, 1000), default=4,
        help="pictures a round (default: %(default)s)")
    add("--readings", type=cli.readings, default=8,
        help="answers of the judge a picture (default: %(default)s)")
    add("--sample-steps", type=cli.integer(1, 1000), default=12,
        help="steps of the sampler (default: %(default)s)")
    add("--judge", type=Path, default=TINY / "judge", help="folder of the judge")
    add("--adapter", type=Path, default=TINY / "adapter", help="folder of the adapter of RF")
    add("--out", type=Path, default=STUDY, help="folder of the study (default: %(default)s)")
    add("--jobs", type=cli.integer(1, 1000), default=2,
        help="runs at a time (default: %(default)s)")
    add("--only", choices=GENERATORS,
        help="run the cases of one generator and the first seed, no table")
    return parser.parse_args(argv)


def study(args):
    if args.only:
        return run_cases(args)
    # a process for each generator and seed whose cases are not complete
    flags = [f"--{name.replace('_', '-')}={getattr(args, name)}" for name in
             ("cases", "n", "readings", "sample_steps", "judge", "adapter", "out")]
    runs = []
    for seed in args.seeds:
        for name in GENERATORS:
            path = file_of(args, name, seed)
            if len(read_records(path)) < args.cases:  # else it was finished before
                command = [sys.executable, "-m", "tiny.feedback_study", "--only", name,
                           "--seeds", seed, *flags]
                runs.append((path.parent, [command]))
    run_all(runs, args.jobs, "feedback")
    results = {}
    for name in GENERATORS:
        records = [read_records(file_of(args, name, seed)) for seed in args.seeds]
        results[name] = [cases[:args.cases] for cases in records]
    print(tables(results))


def main(argv=None):
    args = parse_args(argv)
    return cli.run_program(lambda: study(args))


if __name__ == "__main__":
    sys.exit(main())
