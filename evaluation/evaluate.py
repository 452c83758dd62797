"""How well a method hits valence and arousal, keeps to its prompt and looks (EmoFeedback², section 4.2).

    python evaluate.py                                   # the miniature, 200 held-out cases, about 2 minutes on 2 cores
    python evaluate.py --adapter runs/gen/adapter --forms numbers,words --judge tiny/weights/judge
    python evaluate.py --preset paper --cases DATASET/test.jsonl --judge runs/judge/judge --judge other=FOLDER_OR_ID
    python evaluate.py --preset paper --cases cases.jsonl --judge FOLDER_OR_ID --images FLUX_pictures   # any method's
    python evaluate.py cases --data DATASET --out cases.jsonl           # what other methods should draw, with their scales
    python evaluate.py table out/evaluate/FLUX out/evaluate/ours --form 1               # the paper's tables (tables.py)
    python evaluate.py rate --cases cases.jsonl --images ours=DIR --images FLUX=DIR     # people rate, in a browser (rate.py)

A case is a neutral prompt with a target V and A. A generator of ours draws it with the target as numbers, as words, or by
textual feedback; another method's pictures are read from a folder, `<id>.png` each. Who reads V and A of a picture is named
in every column: judges, and for the miniature the analytic meter, which knows its landscapes and nothing else. A generator
trained by one judge should not be graded by it alone: give `--judge` twice. CLIP-Score compares a picture with its neutral
prompt; CLIP-IQA and the aesthetic score look at the picture alone. Cases with a `group` are one scene over a grid of V and
A, drawn from one noise: their order over grid neighbours is the continuity of section 4.3.1.

Every finished batch is a few lines in the run's folder: the same command goes on where it was stopped.
"""

import argparse
import hashlib
import json
import re
import shlex
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

import data
import feedback
from evaluation import metrics, tables
from evaluation.cases import held_out_cases, load_cases, picture_of, pictures_of, seeds_of, write_cases
from parts import cli, clip, files, weights
from parts.cli import UserError
from parts.files import read_json, whole_records, write_json
from parts.pipeline import PAPER, TINY, load_generator, load_judge, name_of, to_images
from tiny import scenes

FORMS = {"numbers": data.with_numbers, "words": data.with_words, "feedback": None}  # how a generator gets the target
PRESETS = {  # model, CLIP, aesthetic head, side in pixels, meter
    "tiny": (TINY, TINY / "clip", TINY / "aesthetic.safetensors", 128, True),
    "paper": (PAPER, "openai/clip-vit-large-patch14", None, 512, False),
}


# ---------------------------------------------------------------------------------------------------------------------
# Pictures and their figures


def drawer(generator, form, args, ask):
    """draw(cases, seeds) -> PIL images, by a generator of ours that gets the target in one of FORMS."""
    draw = partial(generator.draw, size=args.size, steps=args.steps, guidance=args.guidance)
    if form != "feedback":
        return lambda cases, seeds: to_images(draw([FORMS[form](c.neutral, c.v, c.a) for c in cases], seeds))

    def best(case, seed):  # of all rounds, by the judge that rewrites
        rounds = feedback.refine(case.neutral, case.v, case.a, lambda prompt, seeds: to_images(
            draw([prompt] * len(seeds), seeds)), ask, args.rounds, args.n, seed=seed * args.rounds * args.n)
        r, i = feedback.best_of(rounds)
        return rounds[r].pictures[i].image

    return lambda cases, seeds: [best(case, seed) for case, seed in zip(cases, seeds, strict=True)]


def opener(folder):
    """draw(cases, seeds) -> PIL images, read from another method's folder. Raises UserError."""
    def read(case):
        path = picture_of(folder, case)
        try:
            with Image.open(path) as image:
                return files.to_rgb(image)
        except (OSError, SyntaxError) as error:
            raise UserError(f"{path}: cannot be read as a picture ({error}); make it again") from error

    return lambda cases, seeds: [read(case) for case in cases]


def readers_of(judges, meter, batch):
    """{name: read(images) -> [(V, A)]}, NaN where an answer cannot be read. judges: {name: judge of feedback.judge_of}."""
    def asking(judge):
        return lambda images: [said.va for said in feedback.judge_images(judge, images, ("regression",))]

    return ({"meter": lambda images: [scenes.measure_va(image) for image in images]} if meter else {}) | {
        name: asking(judge) for name, judge in judges.items()}


def measure(draw, cases, seeds, path, batch, readers, scorer=None, head=None, name=""):
    """Append the records of the cases that the file `path` does not hold yet, a batch at a time; memory does not grow.

    A record: id, v, a, group, "read" {reader: [V, A] or None}, clip_score (100 · cosine), clip_iqa, aesthetic, seconds to
    draw. draw(cases, seeds) -> PIL images. scorer: a clip.CLIP; head: of metrics.aesthetic_head.
    """
    done = {record["id"] for record in whole_records(path)}
    left = [(case, seed) for case, seed in zip(cases, seeds, strict=True) if case.id not in done]
    with tqdm(total=len(cases), initial=len(cases) - len(left), desc=name, unit="picture") as bar:
        for start in range(0, len(left), batch):
            part, part_seeds = zip(*left[start:start + batch])
            started = time.perf_counter()
            images = draw(part, part_seeds)
            seconds = (time.perf_counter() - started) / len(part)
            figures = {}
            if scorer is not None:
                embedded = clip.embed_pictures(scorer, images)
                figures["clip_score"] = 100 * clip.cosines(scorer, embedded, [case.neutral for case in part])
                figures["clip_iqa"] = metrics.clip_iqa(scorer, embedded)
            if head is not None:
                figures["aesthetic"] = metrics.aesthetic_score(scorer, head, embedded)
            said = {reader: read(images) for reader, read in readers.items()}
            records = [{"id": case.id, "v": case.v, "a": case.a, "group": case.group,
                        "read": {reader: None if np.isnan(va[i][0]) else list(va[i]) for reader, va in said.items()},
                        **{key: float(values[i]) for key, values in figures.items()}, "seconds": seconds}
                       for i, case in enumerate(part)]
            with open(path, "a", encoding="utf-8") as f:
                f.write("".join(json.dumps(record) + "\n" for record in records))
            bar.update(len(part))


# ---------------------------------------------------------------------------------------------------------------------
# The program


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = cli.stop_parsing
    parser.add_argument("--preset", choices=PRESETS, default="tiny", help="defaults for the miniature, or for photographs")
    parser.add_argument("--cases", default="200", help="a file of cases, or how many of the miniature's (default: 200)")
    parser.add_argument("--images", type=Path, help="folder of another method's pictures, <id>.png each")
    parser.add_argument("--name", help="of the method in tables (default: that of the generator or the folder)")
    parser.add_argument("--model", help="folder or hub id of a generator (default: the preset's)")
    parser.add_argument("--adapter", help="folder or hub id of an adapter of it (default: none)")
    parser.add_argument("--forms", default="numbers,words", help="how the target is given, of " + ", ".join(FORMS)
                        + " (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of --forms feedback (default: %(default)s)")
    parser.add_argument("--n", type=int, default=8, help="pictures a round of --forms feedback (default: %(default)s)")
    parser.add_argument("--judge", action="append", default=[], metavar="[NAME=]SOURCE", help="folder or hub id of a judge, "
                        "once for each; the first one also gives the feedback (default: none)")
    parser.add_argument("--clip", help="folder or hub id of the CLIP of the scores, or none (default: the preset's)")
    parser.add_argument("--aesthetic", help="file of LAION's aesthetic head for that CLIP, or none (default: the preset's)")
    parser.add_argument("--batch", type=int, default=20, help="pictures drawn together (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=25, help="steps of the sampler (default: %(default)s)")
    parser.add_argument("--guidance", type=float, default=4.5, help="classifier-free guidance (default: %(default)s)")
    parser.add_argument("--size", type=int, help="side in pixels (default: the preset's)")
    parser.add_argument("--seed", type=int, default=0, help="of the miniature's cases and the noise (default: %(default)s)")
    parser.add_argument("--seconds", type=float, help="per picture, of a method whose pictures are read (for table 7)")
    parser.add_argument("--parameters", type=float, help="of a method whose pictures are read, in billions (for table 7)")
    parser.add_argument("--device", help="cpu or cuda (default: cuda if there is one)")
    parser.add_argument("--out", type=Path, help="folder of the run (default: out/evaluate and the name)")
    return parser.parse_args(argv)


def check(args):
    """Fill in the defaults and refuse what cannot work before anything is loaded -> the cases. Raises UserError,
    UserError."""
    model, scorer, head, size, meter = PRESETS[args.preset]
    args.model, args.size = args.model or model, args.size or size
    args.clip = {None: scorer, "none": None}.get(args.clip, args.clip)
    args.aesthetic = {None: head if args.clip == scorer else None, "none": None}.get(args.aesthetic, args.aesthetic)
    args.meter = meter
    args.forms = ["images"] if args.images else args.forms.split(",")
    judges = [text.rpartition("=") for text in args.judge]
    args.judge = {name or f"judge{i or ''}": source for i, (name, _, source) in enumerate(judges)}
    if len(args.judge) < len(judges) or set(args.judge) & {"meter", ""}:
        raise UserError("--judge: every judge needs a name of its own, as in --judge other=FOLDER_OR_ID")
    if not args.images and set(args.forms) - set(FORMS):
        raise UserError(f"--forms {','.join(args.forms)}: expected some of {', '.join(FORMS)}")
    if "feedback" in args.forms and not args.judge:
        raise UserError("--forms feedback: needs a --judge that rewrites the prompts")
    if args.aesthetic and not args.clip:
        raise UserError("--aesthetic: needs the CLIP that its head belongs to, --clip")
    for name, low in (("batch", 1), ("steps", 1), ("rounds", 1), ("n", 2), ("seed", 0)):
        if getattr(args, name) < low:
            raise UserError(f"--{name} {getattr(args, name)}: expected at least {low}")
    args.device = cli.device_of(args.device)
    if args.clip and not args.aesthetic:
        cli.say("no --aesthetic: the Aes-Score is left out")
    if args.cases.isdecimal():
        if int(args.cases) < 2:
            raise UserError(f"--cases {args.cases}: expected at least 2, or a file of cases")
        cases = held_out_cases(int(args.cases), args.seed)
    else:
        cases = load_cases(args.cases)
    if args.images:
        pictures_of(args.images, cases)
    return cases


def open_run(args, facts):
    """The folder of the run. Raises UserError if it holds another run, so that no two are mixed."""
    out = args.out or Path("out/evaluate") / re.sub(r"[^\w.-]+", "_", facts["name"])
    facts = json.loads(json.dumps(facts))
    if (out / "settings.json").exists():
        before = read_json(out / "settings.json")
        changed = [key for key in facts if before.get(key) != facts[key] and key != "command"]
        if changed:
            raise UserError(f"{out} holds another evaluation ({', '.join(changed)} changed); remove it or give "
                                    f"another --out")
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "settings.json", facts)
    return out


def stamp(source):
    """Name of a checkpoint with the time and size of its files: trained again, it is another one."""
    if source is None or not Path(source).exists():
        return None if source is None else str(source)
    path = Path(source)
    files = sorted(path.rglob("*.safetensors")) if path.is_dir() else [path]
    return [name_of(source), *[[f.name, f.stat().st_size, f.stat().st_mtime_ns] for f in files]]


def run(args):
    cases = check(args)
    device = args.device
    longest = feedback.REWRITE_LIMIT if "feedback" in args.forms else feedback.ANSWER_LIMIT
    judges = {name: feedback.judge_of(load_judge(source, device, args.size), args.batch, longest,
                                      partial(tqdm, disable=True)) for name, source in args.judge.items()}
    scorer = None if args.clip is None else clip.CLIP.from_pretrained(args.clip, device)
    head = None if args.aesthetic is None else metrics.aesthetic_head(args.aesthetic)
    generator = None if args.images else load_generator(args.model, device, adapter=args.adapter)
    name = args.name or (args.images.resolve().name if args.images else generator.name)
    billions = args.parameters if args.images else weights.count_parameters(generator.mmdit) / 1e9
    digest = hashlib.sha256(repr(cases).encode()).hexdigest()[:16]
    facts = {"name": name, "command": "python " + shlex.join(sys.argv), "cases": [args.cases, digest], "count": len(cases),
             "seed": args.seed, "images": args.images and str(args.images),
             "model": None if args.images else stamp(args.model),
             "adapter": stamp(args.adapter), "judges": {k: stamp(v) for k, v in args.judge.items()},
             "clip": stamp(args.clip), "aesthetic": stamp(args.aesthetic), "billions": billions,
             "seconds_given": args.seconds, "device": device}
    if not args.images:
        facts |= {key: getattr(args, key) for key in ("size", "steps", "guidance", "rounds", "n", "batch")}
    out = open_run(args, facts)
    readers = readers_of(judges, args.meter, args.batch)
    for form in args.forms:
        draw = opener(args.images) if args.images else drawer(generator, form, args, next(iter(judges.values()), None))
        measure(draw, cases, seeds_of(cases, args.seed), out / f"{form}.jsonl", args.batch, readers, scorer, head, form)
    methods = tables.read_run(out)
    print(tables.overview(methods))
    write_json(out / "evaluate.json", {"settings": facts, "results": {m.form: tables.figures(m) for m in methods}})
    return 0


def main(argv=None):
    argv = sys.argv[1:] if argv is None else list(argv)
    argv = argv[1:] if argv[:1] == ["run"] else argv
    try:
        if argv[:1] == ["rate"]:
            from evaluation import rate
            return rate.main(argv[1:])
        if argv[:1] in (["cases"], ["table"]):
            return {"cases": write_cases, "table": tables.main}[argv[0]](argv[1:])
        return run(parse_args(argv))
    except (UserError, ValueError, OSError) as error:
        cli.say(f"error: {error}")
        return 2
    except KeyboardInterrupt:
        cli.say("stopped; the same command goes on where it was")
        return 130


if __name__ == "__main__":
    sys.exit(main())
