"""How well a generator hits valence and arousal (EmoFeedback², section 4.2): V-Error, A-Error and rank correlation.

    python evaluate.py                 # the miniature, 200 held-out cases, about 3 minutes on 2 cores
    python evaluate.py --cases 40      # a quick look
    python evaluate.py --adapter runs/gen/adapter --judge tiny/weights/judge --forms numbers

Every case is a neutral prompt with a target V and A, drawn once with the target as numbers and once as words. The
pictures are measured by the analytic meter of the miniature world, which knows its landscapes and nothing else: the
figures of another model mean little. A judge is asked too if one is given, and CLIP-Score compares each picture with its
neutral prompt. Left out here: CLIP-IQA and the aesthetic score.
"""

import argparse
import math
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

import clip
import data
import feedback
import qwen_vl
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


def measure(draw, cases, form, batch, seed, judge=None, scorer=None):
    """{"meter": [(v, a)], "judge": [(v, a)], "clip": [score]} of the pictures which `draw(prompts, seeds)` makes of the
    cases; without a judge or a CLIP as scorer its entry is empty. NaN where the judge's answer cannot be read."""
    found = {"meter": [], "judge": [], "clip": []}
    ask = None if judge is None else feedback.judge_of(judge, batch, progress=partial(tqdm, disable=True))
    with tqdm(total=len(cases), desc=form, unit="picture") as bar:
        for start in range(0, len(cases), batch):
            part = cases[start:start + batch]
            pixels = draw([FORMS[form](*case) for case in part], [seed + start + i for i in range(len(part))])
            images = sample.to_images(pixels)
            found["meter"] += [scenes.measure_va(image) for image in images]
            if ask is not None:
                found["judge"] += [said.va for said in feedback.judge_images(ask, images, ("regression",))]
            if scorer is not None:
                found["clip"] += clip.clip_score(scorer, images, [case[0] for case in part]).tolist()
            bar.update(len(part))
    return found


COLUMNS = {"v_error": "V-Error ↓", "a_error": "A-Error ↓", "v_spearman": "Spearman V ↑", "a_spearman": "Spearman A ↑",
           "judge_v_error": "V-Error by judge ↓", "judge_a_error": "A-Error by judge ↓", "clip_score": "CLIP-Score ↑",
           "seconds_per_picture": "seconds per picture"}


def table(results):
    """The results, {form: {column: figure}}, as a Markdown table."""
    keys = [k for k in COLUMNS if all(k in r for r in results.values())]
    lines = ["| target given as | " + " | ".join(COLUMNS[k] for k in keys) + " |", "| --- " * (len(keys) + 1) + "|"]
    for form, r in results.items():
        lines.append(f"| {form} | " + " | ".join(f"{r[k]:.2f}" for k in keys) + " |")
    return "\n".join(lines)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=200, help="(prompt, V, A) cases (default: %(default)s)")
    parser.add_argument("--model", default=sample.TINY, help="folder or hub id of the generator (default: the miniature)")
    parser.add_argument("--adapter", help="folder or hub id of an adapter of it (default: none)")
    parser.add_argument("--judge", help="folder or hub id of a judge that is asked beside the meter (default: none)")
    parser.add_argument("--clip", default=sample.TINY / "clip", help="folder or hub id of the CLIP of CLIP-Score "
                        "(default: the miniature's)")
    parser.add_argument("--forms", default=",".join(FORMS), help="how the target is given (default: %(default)s)")
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
    args.forms = args.forms.split(",")
    if set(args.forms) - set(FORMS):
        parser.error(f"--forms: expected some of {', '.join(FORMS)}")
    return args


def main(argv=None):
    args = parse_args(argv)
    try:
        judge = None if args.judge is None else qwen_vl.QwenVL.from_pretrained(args.judge, args.device)
        scorer = clip.CLIP.from_pretrained(args.clip, args.device)
        generator = sample.load_generator(args.model, args.device, adapter=args.adapter)
    except weights.CheckpointError as error:
        sample.say(f"error: {error}")
        return 2
    cases, results = held_out_cases(args.cases, args.seed), {}
    draw = partial(generator.draw, size=args.size, steps=args.steps, guidance=args.guidance)
    for form in args.forms:
        started = time.perf_counter()
        found = measure(draw, cases, form, args.batch, args.seed, judge, scorer)
        seconds, targets = (time.perf_counter() - started) / len(cases), [case[1:] for case in cases]
        results[form] = {**scores(targets, found["meter"]), "clip_score": float(np.mean(found["clip"])),
                         "seconds_per_picture": seconds}
        if judge is not None:
            read = [i for i, (v, _) in enumerate(found["judge"]) if not math.isnan(v)]
            seen = scores([targets[i] for i in read], [found["judge"][i] for i in read])
            results[form] |= {"judge_v_error": seen["v_error"], "judge_a_error": seen["a_error"],
                              "judge_unreadable": 1 - len(read) / len(cases)}
    print(table(results))
    args.out.mkdir(parents=True, exist_ok=True)
    facts = {**vars(args), "model": generator.name, "out": str(args.out), "clip": sample.name_of(args.clip)}
    weights.write_json(args.out / "evaluate.json", {"arguments": facts, "results": results})
    return 0


if __name__ == "__main__":
    sys.exit(main())
