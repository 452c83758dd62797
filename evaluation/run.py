"""Draw and measure one method: V-Error, A-Error, CLIP-Score, CLIP-IQA, Aes-Score (section 4.2).

    python -m evaluation run        # the miniature, 200 held-out cases, about 2 minutes on 2 cores
    python -m evaluation run --adapter runs/gen/adapter --judge tiny/weights/judge
    python -m evaluation run --preset paper --cases DATASET/test.jsonl --judge ID --judge other=ID
    python -m evaluation run --preset paper --cases cases.jsonl --judge ID --images FLUX_PICTURES

A generator of ours draws each case with the target as numbers, as words, or by textual feedback;
another method's pictures are read from a folder, `<id>.png` each. Who reads V and A of a picture is
named in every column: judges, and for the miniature the analytic meter, which knows its landscapes
and nothing else. A generator trained by one judge should not be graded by it alone: give --judge
twice. Every finished batch is a few lines in the run's folder: the same command goes on from there.
"""

import re
import shlex
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

import data
import feedback
from evaluation import metrics, tables
from evaluation.cases import (
    digest_of,
    digest_of_files,
    held_out_cases,
    load_cases,
    pictures_of,
    seeds_of,
)
from parts import cli, clip, hub, lora, pipeline, presets, scorers, weights
from parts.cli import UserError, integer, number
from parts.files import (
    append_rows,
    claim,
    open_picture,
    read_json,
    save_png,
    whole_records,
    write_json,
)
from parts.pipeline import PAPER, TINY, judge_of, load_generator, load_judge, name_of, to_images
from tiny import scenes
from tiny.examiner import Examiner

FORMS = (*data.TARGET_FORMS, "feedback")  # how a generator gets the target
SETTINGS = {  # flag: (for photographs, the miniature's, type, help)
    "model": (PAPER, str(TINY), str, "folder or hub id of a generator"),
    "clip": ("openai/clip-vit-large-patch14", str(TINY / "clip"), str, "the scores' CLIP, or none"),
    "other_clip": ("none", str(TINY / "other_clip"), str, "one that gave no rewards, or none"),
    "aesthetic": ("none", str(TINY / "aesthetic.safetensors"), str, "LAION's head for it, or none"),
    "emotion_head": ("none", "none", str, "Emo-A's, of evaluation.emotion_head, or none"),
    "size": (512, 128, cli.picture_side, "side in pixels"),
    "sample_steps": (25, 25, integer(1, 1000), "[--num-inference-steps] steps of the sampler"),
    "guidance": (4.5, 4.5, number(0, 100), "[--guidance-scale] classifier-free guidance"),
    "forms": (("numbers",), ("numbers", "words"), cli.some_of(FORMS),
              f"how the target is given: {', '.join(FORMS)}, or several of them"),
    "rounds": (3, 3, integer(1, 1000), "rounds of --forms feedback"),
    "n": (8, 8, integer(2, 1000), "pictures a round of --forms feedback"),
    "result": ("best", "best", ("best", "last"), "its best picture of all rounds, or of the last"),
    "readings": (1, 8, cli.readings, "of --forms feedback: mean of so many answers, or logits, or "
                 "thought"),
    "questions": (None, None, feedback.QUESTIONS, "JSON file with other questions to the judges"),
    "micro": (20, 20, integer(1, 10_000), "pictures or questions in one forward pass"),
    "seed": (0, 0, integer(0, 2**31), "of the miniature's cases and the noise"),
}


def draw_with(generator, form, args, judge, cases, seeds):
    """PIL images of cases by a generator of ours, which gets the target in one of FORMS.

    args: size, sample_steps, guidance; for feedback rounds, n, result, readings. judge: of
    pipeline.judge_of.
    """
    def generate(prompts, seeds):
        pixels = generator.draw(prompts, seeds, args.size, args.sample_steps, args.guidance)
        return to_images(pixels)

    if form != "feedback":
        with_target = data.TARGET_FORMS[form]
        return generate([with_target(case.neutral, case.v, case.a) for case in cases], seeds)
    images = []
    for case, seed in zip(cases, seeds, strict=True):
        rounds = feedback.refine(
            case.neutral, case.v, case.a,
            lambda prompt, seeds: generate([prompt] * len(seeds), seeds), judge,
            rounds=args.rounds, images_per_round=args.n, readings=args.readings,
            seed=seed * args.rounds * args.n)  # so that no two cases share a picture's seed
        r, i = feedback.best_of(rounds, args.result)  # by the judge that rewrites
        images.append(rounds[r].pictures[i].image)
    return images


def draw_and_keep(draw, folder, cases, seeds):
    """draw(cases, seeds), whose pictures are also written as <id>.png, as --images reads them."""
    images = draw(cases, seeds)
    for image, case, seed in zip(images, cases, seeds, strict=True):
        save_png(image, folder / f"{case.id}.png", neutral=case.neutral, valence=case.v,
                 arousal=case.a, seed=seed)
    return images


def read_pictures(folder, cases, seeds):
    """PIL images of cases by another method, whose pictures are there already. Raises UserError."""
    return [open_picture(path) for path in pictures_of(folder, cases)]


@dataclass(frozen=True)
class Instruments:
    readers: dict  # {name: read(images) -> [(V, A)]}, as of readers_of
    scorer: clip.CLIP | None = None  # of CLIP-Score and CLIP-IQA
    other: clip.CLIP | None = None  # of a second CLIP-Score: the first may have given rewards
    examiner: Examiner | None = None  # of the miniature: does a picture show its subject?
    head: list | None = None  # of the aesthetic score, from metrics.aesthetic_head; needs a scorer
    emotions: list | None = None  # of Emo-A, from metrics.emotion_head; needs a scorer
    others: list | tuple = ()  # (name, score) of scorers.load


def readers_of(judges, meter):
    """{name: read(images) -> [(V, A)]}, NaN where an answer cannot be read.

    judges: {name: judge of pipeline.judge_of}. meter: whether the analytic meter reads, too.
    """
    def ask(judge, images):
        return [said.va for said in feedback.judge_images(judge, images)]

    readers = {"meter": lambda images: list(map(scenes.measure_va, images))} if meter else {}
    return readers | {name: partial(ask, judge) for name, judge in judges.items()}


def scores_of(instruments, images, cases):
    """{name: [B]} of the scores that there are instruments for. CLIP sees each picture once."""
    scores = {}
    scorer = instruments.scorer
    if scorer is not None:
        embedded = clip.embed_pictures(scorer, images)  # [B,P]
        cosines = clip.cosines(scorer, embedded, [case.neutral for case in cases])
        scores["clip_score"] = 100 * cosines  # torchmetrics cuts off at 0 their mean, not each
        scores["clip_iqa"] = metrics.clip_iqa(scorer, embedded)
    if instruments.other is not None:
        cosines = clip.cosines(instruments.other, clip.embed_pictures(instruments.other, images),
                               [case.neutral for case in cases])
        scores["other_clip_score"] = 100 * cosines
    if instruments.examiner is not None:
        scores["content"] = 100 * instruments.examiner.shows(
            images, [case.neutral for case in cases])
    if instruments.emotions is not None:
        labels = [case.label for case in cases]
        hits = metrics.emotion_hits(scorer, instruments.emotions, embedded, labels)
        scores["emo_a"] = 100 * hits
    if instruments.head is not None:
        scores["aesthetic"] = metrics.aesthetic_score(scorer, instruments.head, embedded)
    for name, score in instruments.others:
        scores[name] = score(images, [case.neutral for case in cases])
    return scores


def measure(draw, cases, seeds, path, instruments, batch, name=""):
    """Append the records of the cases that the file `path` does not hold yet, a batch at a time.

    A record: id, v, a, group, "read" {reader: [V, A], or None if its answer could not be read},
    clip_score (100 · cosine), clip_iqa, aesthetic, seconds. draw(cases, seeds) -> PIL images.
    """
    done = {record["id"] for record in whole_records(path)}
    left = [pair for pair in zip(cases, seeds, strict=True) if pair[0].id not in done]
    bar = tqdm(total=len(cases), initial=len(cases) - len(left), desc=name, unit="picture")
    with bar:
        for start in range(0, len(left), batch):
            part, part_seeds = zip(*left[start:start + batch])
            began = time.perf_counter()
            images = draw(part, part_seeds)
            seconds = (time.perf_counter() - began) / len(part)  # of drawing alone
            scores = scores_of(instruments, images, part)
            said = {reader: read(images) for reader, read in instruments.readers.items()}
            records = []
            for i, case in enumerate(part):
                record = {"id": case.id, "v": case.v, "a": case.a, "group": case.group, "read": {}}
                for reader, va in said.items():
                    record["read"][reader] = None if np.isnan(va[i][0]) else list(va[i])
                record |= {key: float(values[i]) for key, values in scores.items()}
                record["seconds"] = seconds
                records.append(record)
            append_rows(path, records)  # the batch is safe from here on
            bar.update(len(part))


def stamp(source):
    """What tells a checkpoint from others: its name, and size and time of its files.

    A folder that is trained again keeps its name but not its time, and must not go on an old run.
    """
    if source is None or not Path(source).exists():
        return source
    path = Path(source)
    found = sorted(path.rglob("*.safetensors")) if path.is_dir() else [path]
    return [name_of(source), *[[f.name, f.stat().st_size, f.stat().st_mtime_ns] for f in found]]


def open_run(args, command, cases, generator):
    """(folder, facts) of the run; the facts are in its settings.json, too.

    Raises UserError if the folder holds another run, so that no two are mixed.
    """
    facts = {
        "name": args.name, "command": command, "cases": [args.cases, digest_of(cases)],
        "count": len(cases), "size": args.size, "emotion_head": stamp(args.emotion_head),
        "seed": args.seed, "images": args.images and str(args.images), "model": None,
        "adapter": stamp(lora.adapter_in(args.adapter)),
        "judges": {name: stamp(source) for name, source in args.judge.items()},
        "clip": stamp(args.clip), "other_clip": stamp(args.other_clip),
        "aesthetic": stamp(args.aesthetic), "scorer": args.scorer,
        "keep_pictures": args.keep_pictures or None,  # all or none of a run's
        "billions": args.parameters, "seconds_given": args.seconds, "device": args.device,
        "questions": args.questions}
    if args.images:
        facts["pictures"] = digest_of_files(pictures_of(args.images, cases))
    if args.images and (args.images / "draw.json").exists():  # of `python -m evaluation draw`
        drawn = read_json(args.images / "draw.json")
        facts["sources"] = drawn.get("sources")  # of an editor's pictures
        facts["billions"] = args.parameters or drawn.get("billions")
        facts["seconds_given"] = args.seconds or drawn.get("seconds")
    if generator is not None:
        facts["name"] = args.name or generator.name
        facts["model"] = stamp(args.model)
        facts["billions"] = weights.count_parameters(generator.mmdit) / 1e9
        for key in ("sample_steps", "guidance", "rounds", "n", "result", "readings", "micro"):
            facts[key] = getattr(args, key)
    out = args.out or Path("out/evaluate") / re.sub(r"[^\w.-]+", "_", facts["name"])
    claim(out / "settings.json", facts, "evaluation")
    write_json(out / "settings.json", facts)
    return out, facts


def parse_args(argv):
    parser = cli.parser(__doc__, prog="python -m evaluation run")
    add = parser.add_argument
    add("--preset", choices=cli.PRESETS, help=cli.PRESET_HELP)
    add("--cases", default="200",
        help="a file of cases, or how many of the miniature's (default: %(default)s)")
    add("--split", choices=["test", "validation"], default="test",
        help="of the miniature's cases; choices are made by the second (default: %(default)s)")
    add("--adapter", help="folder or hub id of an adapter of --model (default: none)")
    add("--judge", action="append", default=[], metavar="[NAME=]SOURCE",
        help="folder, hub id or http://…/v1 of a judge, each; the first also gives the feedback")
    add("--scorer", type=scorers.named, action="append", help=scorers.HELP)
    add("--images", type=Path, help="folder of another method's pictures, <id>.png each")
    add("--seconds", type=number(0, 1e6), help="per picture of --images, for table 7")
    add("--parameters", type=number(0, 1e6), help="of --images' model, in billions, for table 7")
    add("--name", help="of the method in tables (default: that of the generator or the folder)")
    add("--keep-pictures", action="store_true",
        help="write each as <form>/<id>.png, for `rate` and `--images`")
    add("--device", help="cpu or cuda (default: cuda if there is one)")
    add("--out", type=Path, help="folder of the run (default: out/evaluate and the name)")
    cli.add_settings(parser, SETTINGS)
    return presets.parse_settings(parser, SETTINGS, argv)


def complete(args):
    """Read what flags mean together, and refuse what cannot work. Raises UserError."""
    args.device = cli.device_of(args.device)
    judges = {}
    for i, text in enumerate(args.judge):
        name, source = re.fullmatch(r"(?:([^=/]*)=)?(.*)", text).groups()  # [NAME=]SOURCE
        judges[name or f"judge{i or ''}"] = source
    if len(judges) < len(args.judge) or "meter" in judges:
        raise UserError("--judge: every judge needs a name of its own, as in --judge other=FOLDER")
    args.judge = judges
    args.scorer = scorers.chosen(args.scorer)
    if args.images:
        args.forms = ("images",)
        args.name = args.name or args.images.resolve().name
    if "feedback" in args.forms and not judges:
        raise UserError("--forms feedback: needs a --judge that rewrites the prompts")
    _, own_clip, *_ = SETTINGS["clip"]
    _, own_head, *_ = SETTINGS["aesthetic"]
    if args.aesthetic == own_head and args.clip != own_clip:
        args.aesthetic = "none"  # the miniature's head reads the embeddings of its own CLIP only
    for flag in ("clip", "other_clip", "aesthetic", "emotion_head"):
        if getattr(args, flag) == "none":
            setattr(args, flag, None)
    for name in ("aesthetic", "emotion_head"):
        if getattr(args, name) and not args.clip:
            raise UserError(f"--{name.replace('_', '-')}: needs the CLIP that its head belongs to, "
                            f"--clip")
    if args.clip and not args.aesthetic:
        cli.say("no --aesthetic: the Aes-Score is left out")


def evaluate(args, command):
    # 1. refuse what cannot work before gigabytes are read
    complete(args)
    feedback.PROMPTS.update(args.questions or {})
    if not args.cases.isdecimal():
        cases = load_cases(args.cases)
    elif int(args.cases) >= 2:
        cases = held_out_cases(int(args.cases), args.seed, args.split)
    else:
        raise UserError(f"--cases {args.cases}: expected at least 2, or a file of cases")
    if args.images:
        pictures_of(args.images, cases)
    # 2. load: the judges, what scores, and last the generator
    limit = feedback.REWRITE_LIMIT if "feedback" in args.forms else feedback.ANSWER_LIMIT
    hub.fetch([(args.clip, ["*"])], *map(lora.files_with_base, args.judge.values()),
              scorers.files_of(args.scorer),
              [] if args.images else pipeline.files_of_generator(args.model, adapter=args.adapter))
    judges = {}
    for name, source in args.judge.items():
        model = load_judge(source, args.device, args.size)
        judges[name] = judge_of(model, args.micro, limit, progress=False)
    clips = {name: source and clip.CLIP.from_pretrained(source, args.device)
             for name, source in (("scorer", args.clip), ("other", args.other_clip))}
    instruments = Instruments(
        readers_of(judges, meter=args.preset == "tiny"), **clips,
        examiner=Examiner.from_pretrained() if args.preset == "tiny" else None,
        head=metrics.aesthetic_head(args.aesthetic) if args.aesthetic else None,
        emotions=metrics.emotion_head(args.emotion_head) if args.emotion_head else None,
        others=scorers.load(args.scorer, args.device))
    generator = None
    if not args.images:
        generator = load_generator(args.model, args.device, adapter=args.adapter)
    # 3. the folder, unless it holds another run
    out, facts = open_run(args, command, cases, generator)
    # 4. draw, read and score, once for each form of the target
    seeds = seeds_of(cases, args.seed)  # the same noise for every form
    first_judge = next(iter(judges.values()), None)
    for form in args.forms:
        draw = partial(draw_with, generator, form, args, first_judge)
        if args.images:
            draw = partial(read_pictures, args.images)
        elif args.keep_pictures:
            draw = partial(draw_and_keep, draw, out / form)
        measure(draw, cases, seeds, out / f"{form}.jsonl", instruments, args.micro, form)
    # 5. all figures, as a table and as JSON
    methods = tables.read_run(out)
    print(tables.overview(methods))
    results = {method.form: tables.figures(method) for method in methods}
    write_json(out / "evaluate.json", {"settings": facts, "results": results})


def main(argv):
    args = parse_args(argv)
    command = f"python -m evaluation run {shlex.join(argv)}"
    return cli.run_program(lambda: evaluate(args, command))
