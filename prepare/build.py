"""Datasets of photographs: the paper's from EmoSet-118K, and EMOTIC's pictures for the test out of its domain (section 4.1).

    python -m prepare.emoset --emoset EMOSET --out DATASET                             # 14,563 + 1,000 rows
    torchrun --nproc-per-node 8 -m prepare.emoset --emoset EMOSET --out DATASET             # captions on eight GPUs
    python -m prepare.emotic --annotations Annotations.mat --images EMOTIC --out DATASET   # test rows only

In order: pictures are chosen and looked at, linked into the dataset, captioned by a vision-language model (neutral captions
for all; emotional ones for training rows only, as in the paper), and written as rows. EmoSet has labels and no valence and
arousal: they are drawn from the label's lexicon Gaussians. EMOTIC has both on 1..10, brought to 1..9 by 1 + (x − 1)·8/9.

The choice is kept in selection.json and every finished batch of captions in captions-<rank>.jsonl, so that a run that was
stopped or killed goes on without looking at a picture or asking for a caption a second time, with any number of processes.
All of them must see the folder of the dataset.
"""

import argparse
import csv
import json
import math
import os
import re
import shutil
import signal
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

import data
import feedback
import qwen_vl
from parts import cli, weights
from parts import run as training
from parts.cli import UserError
from parts.files import read_json, read_records, whole_records, write_json, write_rows
from prepare.check import check_lexicon, look_at

VERSION = "build.py 1"  # this program and the number of its procedure: raised when the same command would give other rows
CAPTIONER = "Qwen/Qwen2.5-VL-7B-Instruct"
PIXELS = 512 * 512  # larger pictures are shrunk to so many before they are captioned
KEYS = ("id", "image", "label", "v", "a", "neutral", "emotional", "seed")  # of a row, beside its version
QUESTIONS = ("caption_system", "caption", "emotional_caption")
FREE = {"out", "batch", "device", "dtype", "emoset", "lexicon", "annotations", "images", "prompts"}  # may change in between


# ---------------------------------------------------------------------------------------------------------------------
# EmoSet-118K: class labels


def read_emoset(folder):
    """[{"id", "source", "annotation", "label"}] of train.json, val.json and test.json together, in the order of source, the
    picture's path; paths lie within the folder. UserError for anything that is not EmoSet-118K as published."""
    def read(name):
        try:
            return json.loads((folder / name).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"{folder / name}: missing or no JSON ({error}); give EmoSet-118K's folder, which has "
                                    f"info.json, train.json, val.json, test.json, image/ and annotation/") from error

    try:
        classes = set(read("info.json")["emotion"]["label2idx"])
    except (KeyError, TypeError):
        classes = set()
    if classes != set(data.EMOTIONS):
        raise UserError(f"{folder}/info.json: expected {', '.join(sorted(data.EMOTIONS))} in emotion, label2idx; "
                                f"found {', '.join(sorted(classes)) or 'none'}; download EmoSet-118K again")
    out = []
    for name in ("train.json", "val.json", "test.json"):
        for number, entry in enumerate(read(name)):
            if not isinstance(entry, list) or len(entry) < 3 or not all(isinstance(x, str) for x in (entry[0], *entry[-2:])):
                raise UserError(f"{folder / name}, entry {number}: expected [emotion, id, picture, annotation], got "
                                        f"{str(entry)[:80]}; download EmoSet-118K again")
            out.append({"id": Path(entry[-2]).stem, "source": entry[-2], "annotation": entry[-1], "label": entry[0]})
    if not out:
        raise UserError(f"{folder}: its three lists are empty; download EmoSet-118K again")
    return sorted(out, key=lambda candidate: candidate["source"])


def look_at_emoset(folder, candidate):
    """As `look_at`; the class in the list, in the annotation and in the path must be one."""
    try:
        said = json.loads((folder / candidate["annotation"]).read_text(encoding="utf-8"))["emotion"]
    except (OSError, ValueError, KeyError, TypeError):
        return None, f"has no readable annotation {candidate['annotation']}"
    if not candidate["label"] == said == Path(candidate["source"]).parent.name or said not in data.EMOTIONS:
        return None, f"is of class {candidate['label']!r} in the list and {said!r} in its annotation"
    return look_at(folder / candidate["source"])


def emoset_rows(candidates, args):
    """(rows, broken, repeats), see `choose`: pictures in an order drawn by the seed, the first args.train for training.

    V and A of row i are drawn from its class's Gaussians by a generator of its own, [seed, i]. With too few pictures the two
    splits keep their proportion; without any there are no rows. UserError for a single one.
    """
    order = np.random.default_rng([args.seed, len(candidates)]).permutation(len(candidates))
    wanted = args.train + args.test
    chosen, broken, repeats = choose([candidates[i] for i in order], wanted, partial(look_at_emoset, args.emoset))
    n = len(chosen)
    if n == 1:
        raise UserError(f"{args.emoset}: one usable picture of {len(candidates):,}; two splits need at least two")
    train = args.train if n == wanted else min(n - 1, max(1, round(n * args.train / wanted)))
    if 0 < n < wanted:
        cli.say(f"{n:,} usable pictures of {wanted:,} asked for: {train:,} for training, {n - train:,} for the test")
    rows = []
    for number, picture in enumerate(chosen):
        v, a = data.draw_va(picture["label"], np.random.default_rng([args.seed, number]))
        rows.append({**picture, "split": "train" if number < train else "test", "v": round(v, 4), "a": round(a, 4),
                     "seed": args.seed})
    return rows, broken, repeats


# ---------------------------------------------------------------------------------------------------------------------
# EMOTIC: valence and arousal of persons, 1..10


def persons_of_csv(path):
    """[("Folder/Filename", v, a)], a line a person, of a CSV of EMOTIC with columns Folder, Filename, Valence, Arousal or
    Folder, Filename, Continuous_Labels ("[valence, arousal, dominance]"). NaN for what is no number. UserError."""
    persons = []
    try:
        with open(path, encoding="utf-8-sig", errors="replace", newline="") as f:
            reader = csv.DictReader(f)
            names = {str(name).strip().lower().replace(" ", "_"): name for name in reader.fieldnames or ()}
            apart = {"valence", "arousal"} <= set(names)
            if not {"folder", "filename"} <= set(names) or not (apart or "continuous_labels" in names):
                raise UserError(f"{path}: expected columns Folder, Filename and either Valence, Arousal or "
                                        f"Continuous_Labels, found {', '.join(names) or 'none'}; give EMOTIC's CSV or .mat")
            for row in reader:
                row = {name: row[column] or "" for name, column in names.items()}
                values = ([row["valence"], row["arousal"]] if apart
                          else [*re.findall(r"[-+.\w]+", row["continuous_labels"]), "", ""][:2])
                persons.append((f"{row['folder']}/{row['filename']}", *map(mean_of, values)))
    except csv.Error as error:
        raise UserError(f"{path}: no CSV ({error}); give EMOTIC's CSV or .mat") from error
    return persons


def persons_of_mat(path, split):
    """As `persons_of_csv`, of a split of EMOTIC's MAT file: the combined V and A of a person, or else the mean over its
    annotators. UserError."""
    try:
        from scipy.io import loadmat
    except ImportError as error:
        raise UserError(f"{path}: reading a .mat file needs scipy; pip install scipy, or give the CSV") from error
    cli.say(f"reading {path}")  # tens of seconds, of which the library tells nothing
    try:
        content = loadmat(path, squeeze_me=True, struct_as_record=False)
    except Exception as error:  # scipy raises many kinds for a damaged file
        raise UserError(f"{path}: no readable MAT file ({error}); download it again, or give the CSV") from error
    if split not in content:
        found = ", ".join(name for name in content if not name.startswith("_"))
        raise UserError(f"{path}: no --split {split} in it; found {found or 'none'}")
    persons = []
    try:
        for image in np.atleast_1d(content[split]):
            for person in np.atleast_1d(image.person):
                for key in ("combined_continuous", "annotations_continuous"):
                    marks = np.atleast_1d(getattr(person, key, []))
                    v, a = (mean_of([mean_of(getattr(m, name, None)) for m in marks]) for name in ("valence", "arousal"))
                    if math.isfinite(v + a):
                        break
                persons.append((f"{image.folder}/{image.filename}", v, a))
    except AttributeError as error:
        raise UserError(f"{path}: {error}; expected EMOTIC's images with filename, folder and person") from error
    return persons


def mean_of(values):
    """The mean of the finite ones of a number or text, or of an array of them; NaN if there is none."""
    try:
        values = np.ravel(np.asarray(values, dtype=float))
    except (TypeError, ValueError):
        return math.nan
    values = values[np.isfinite(values)]
    return float(values.mean()) if len(values) else math.nan


def read_emotic(path, split):
    """[{"id", "source", "label", "split", "v", "a"}], one a picture: the mean V and A of its persons, those outside 1..10
    left out, brought to 1..9, and the class nearest to it. V, A and label are None if no person remains."""
    pictures = {}
    for source, v, a in persons_of_mat(path, split) if path.suffix.lower() == ".mat" else persons_of_csv(path):
        pictures.setdefault(source, []).extend([(v, a)] if 1 <= v <= 10 and 1 <= a <= 10 else [])
    if not pictures:
        raise UserError(f"{path}: no persons in it; download EMOTIC's annotations again")
    out = []
    for source, rated in pictures.items():
        v, a = (round(1 + (sum(x) / len(x) - 1) * 8 / 9, 4) for x in zip(*rated)) if rated else (None, None)
        out.append({"id": re.sub(r"[^\w-]+", "_", str(Path(source).with_suffix(""))), "source": source, "split": "test",
                    "label": data.nearest_emotion(v, a) if rated else None, "v": v, "a": a})
    return out


def look_at_emotic(folder, candidate):
    """As `look_at`, of a picture that must have V and A."""
    if candidate["label"] is None:
        return None, "has no person with V and A in 1..10"
    return look_at(folder / candidate["source"])


# ---------------------------------------------------------------------------------------------------------------------
# The choice of pictures, kept in the dataset's folder


def choose(candidates, wanted, look):
    """The first `wanted` usable candidates -> (chosen, [(source, why)] of the unusable ones before them, number of repeats).

    look(candidate) -> (hash, None) or (None, why), in a process pool. A file whose bytes came before is a repeat, passed
    over whatever it is called. The answer depends on the order of the candidates only.
    """
    chosen, broken, hashes, ids, repeats, at = [], [], set(), set(), 0, 0
    with (ProcessPoolExecutor(os.cpu_count(), initializer=leave_signals) as pool,
          tqdm(total=min(wanted, len(candidates)), desc="pictures") as bar):
        while len(chosen) < wanted and at < len(candidates):
            block = candidates[at:at + min(256, wanted - len(chosen))]
            at += len(block)
            for candidate, (digest, why) in zip(block, pool.map(look, block, chunksize=4), strict=True):
                if why is None and digest in hashes:
                    repeats += 1
                    continue
                if why is None and candidate["id"] in ids:
                    why = "has the name of another picture"
                if why is not None:
                    broken.append((candidate["source"], why))
                    tqdm.write(f"{candidate['source']} {why}; passed over", file=sys.stderr)
                    continue
                hashes.add(digest)
                ids.add(candidate["id"])
                chosen.append(candidate)
                bar.update()
    return chosen, broken, repeats


def leave_signals():
    """In a worker: Ctrl-C is its parent's business, and SIGTERM ends it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def select(args):
    """Write selection.json, {"settings", "rows", "broken", "repeats"}, once the pictures lie in images/; or make sure that
    the one there is of the same command, and cut off half-written lines of captions. UserError."""
    settings = {k: v for k, v in vars(args).items() if k not in FREE}
    settings |= {"version": VERSION, "questions": {name: feedback.PROMPTS[name] for name in QUESTIONS}}
    path = args.out / "selection.json"
    if path.is_file():
        before = read_json(path)["settings"]
        if changed := [key for key in settings | before if settings.get(key) != before.get(key)]:
            raise UserError(f"{args.out} holds a dataset built with other settings ({', '.join(changed)}); repeat "
                                    f"them to go on, or choose another --out")
        for file in args.out.glob("captions-*.jsonl"):
            whole_records(file)
        return
    if found := next(args.out.glob("*.jsonl"), None):
        raise UserError(f"{found}: there is another dataset; choose another --out")
    folder = args.emoset if args.what == "build" else args.images
    candidates = read_emoset(folder) if args.what == "build" else read_emotic(args.annotations, args.split)
    weights.index(weights.find(args.captioner))  # an error now, not after all pictures
    rows, broken, repeats = (emoset_rows(candidates, args) if args.what == "build" else
                             choose(candidates, len(candidates), partial(look_at_emotic, folder)))
    if not rows:
        raise UserError(f"{folder}: none of {len(candidates):,} pictures is usable; expected them at "
                                f"{candidates[0]['source']} and so on")
    (args.out / "images").mkdir(exist_ok=True)
    for row in tqdm(rows, "links"):
        row["image"] = f"images/{row['id']}{Path(row['source']).suffix.lower()}"
        link(folder / row["source"], args.out / row["image"])
    write_json(path, {"settings": settings, "rows": rows, "broken": broken, "repeats": repeats})


def link(source, target):
    """A hard link, or a copy where there can be none."""
    target.unlink(missing_ok=True)
    try:
        os.link(source.resolve(), target)  # resolved: a symbolic link may be relative
    except OSError:
        shutil.copyfile(source, target)


# ---------------------------------------------------------------------------------------------------------------------
# Captions


def load_captioner(args, processes):
    """answer(conversations) -> texts: greedy answers of a Qwen2.5-VL."""
    model = qwen_vl.QwenVL.from_pretrained(args.captioner, processes.device, args.dtype and getattr(torch, args.dtype))
    image = model.processor.image
    model.processor.image = replace(image, max_pixels=max(image.min_pixels, min(image.max_pixels, PIXELS)))
    return feedback.judge_of(model, args.batch, args.max_new_tokens, partial(tqdm, disable=True))


def read_answers(out):
    """{(id, "neutral" | "emotional"): answer} of the files of all processes, whatever their number was."""
    records = [record for path in sorted(out.glob("captions-*.jsonl")) for record in read_records(path)]
    return {(record["id"], record["kind"]): record["text"] for record in records}


def write_answers(asked, answer, args, processes):
    """Ask for captions, [(row, kind)], a batch at a time; each batch is appended to this process's file before the next."""
    def question(row, kind):
        image = Image.open(args.out / row["image"])
        if kind == "neutral":
            return feedback.ask_caption(image)
        return feedback.ask_emotional_caption(image, row["label"], row["v"], row["a"])

    with (open(args.out / f"captions-{processes.rank}.jsonl", "a", encoding="utf-8") as f,
          tqdm(total=len(asked), desc="captions", disable=not processes.first, dynamic_ncols=True) as bar):
        for start in range(0, len(asked), args.batch):
            batch = asked[start:start + args.batch]
            texts = answer([question(*each) for each in batch])
            f.write("".join(json.dumps({"id": row["id"], "kind": kind, "text": text}) + "\n"
                            for (row, kind), text in zip(batch, texts, strict=True)))
            f.flush()
            bar.update(len(batch))


def kinds_of(row):
    """The captions that a row has: an emotional one only for training (section 4.1)."""
    return ("neutral", "emotional") if row["split"] == "train" else ("neutral",)


# ---------------------------------------------------------------------------------------------------------------------
# The dataset


def finish(args, selection, answers):
    """Write train.jsonl, test.jsonl, dataset.json and va.png, and print the counts.

    A row is left out, reported, and listed in dataset.json if an answer to one of its questions holds no caption. UserError
    if none of a split remains.
    """
    rows, without, counts = [], [], {}
    for row in selection["rows"]:
        try:
            rows.append(row | {kind: feedback.read_caption(answers[row["id"], kind]) for kind in kinds_of(row)})
        except feedback.Unusable as error:
            without.append((row["source"], str(error)))
            cli.say(f"{row['source']}: an answer cannot be used: {error}; its row is left out")
    for split in dict.fromkeys(row["split"] for row in selection["rows"]):
        own = [row for row in rows if row["split"] == split]
        if not own:
            raise UserError(f"{args.captioner}: none of its captions of {split} rows can be used; choose another "
                                    f"--captioner or other --prompts, and another --out")
        write_rows(args.out / f"{split}.jsonl", [{k: row[k] for k in KEYS if k in row} | {"version": VERSION}
                                                      for row in own])
        counts[split] = {label: sum(row["label"] == label for row in own) for label in data.EMOTIONS}
    write_json(args.out / "dataset.json", {
        "version": VERSION, "arguments": {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()},
        "captioner": args.captioner, "questions": selection["settings"]["questions"], "counts": counts,
        "broken": selection["broken"], "repeats": selection["repeats"], "without_caption": without})
    va_chart(rows).save(args.out / "va.png")
    print(f"{'':12}" + "".join(f"{split:>8}" for split in counts))
    for label in data.EMOTIONS:
        print(f"{label:12}" + "".join(f"{n[label]:8,}" for n in counts.values()))
    print(f"{'all':12}" + "".join(f"{sum(n.values()):8,}" for n in counts.values()))
    print(f"{len(selection['broken'])} pictures unusable, {selection['repeats']} repeats, {len(without)} without a caption\n"
          f"{args.out}")


def va_chart(rows, side=220, scale=2):
    """PIL image: for each class its rows in the plane of V (right) and A (up), both 1..9, with the lexicon's mean and its
    ellipse of one standard deviation."""
    W, H, grey, red = side + 50, side + 62, (90, 90, 90), (205, 60, 30)
    sheet = Image.new("RGB", (4 * W * scale, 2 * H * scale), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(12 * scale)
    for k, (label, (v_mean, v_sd, a_mean, a_sd)) in enumerate(data.LEXICON.items()):
        def at(v, a, x0=k % 4 * W + 34, y0=k // 4 * H + 26):
            return (x0 + (v - 1) / 8 * side) * scale, (y0 + (9 - a) / 8 * side) * scale

        def disc(v, a, radius, fill, at=at):
            draw.ellipse((*at(v - radius, a + radius), *at(v + radius, a - radius)), fill)

        own = [row for row in rows if row["label"] == label]
        draw.text(at(1, 9.7), f"{label}, {len(own):,} pictures", "black", font)
        for tick in (1, 3, 5, 7, 9):
            draw.line((*at(tick, 1), *at(tick, 9)), (232, 232, 232), scale)
            draw.line((*at(1, tick), *at(9, tick)), (232, 232, 232), scale)
            draw.text(at(tick, 0.85), str(tick), grey, font, anchor="mt")
            draw.text(at(0.8, tick), str(tick), grey, font, anchor="rm")
        draw.text(at(6, 0.85), "V", grey, font, anchor="mt")
        draw.text(at(0.8, 6), "A", grey, font, anchor="rm")
        for row in own:
            disc(row["v"], row["a"], 0.05, (30, 90, 200))
        turn = np.linspace(0, 2 * np.pi, 90)
        ring = zip(np.clip(v_mean + v_sd * np.cos(turn), 1, 9), np.clip(a_mean + a_sd * np.sin(turn), 1, 9))
        draw.line([at(*point) for point in ring], red, 2 * scale, joint="curve")
        disc(v_mean, a_mean, 0.15, red)
    return sheet.resize((sheet.width // scale, sheet.height // scale), Image.Resampling.LANCZOS)


def run(args, processes, load=load_captioner):
    """The whole of it, on every process; the first one chooses the pictures and writes the dataset. load(args, processes):
    gives answer(conversations) -> texts; called only if captions are missing."""
    # barriers of a group of their own: the default one gives up while the first process looks at pictures
    group = dist.new_group(backend="gloo", timeout=timedelta(days=30)) if processes.world > 1 else None

    def wait():
        if group is not None:
            barrier = dist.barrier(group, async_op=True)
            while not barrier.is_completed():
                time.sleep(0.05)  # here, not in the library, where no signal is heard
            try:
                barrier.wait()
            except RuntimeError as error:  # its connection is lost
                raise UserError("another process has ended; its own message says why") from error

    if processes.first:
        select(args)
    wait()
    selection = read_json(args.out / "selection.json")
    answers = read_answers(args.out)
    missing = [(row, kind) for row in selection["rows"] for kind in kinds_of(row) if (row["id"], kind) not in answers]
    wait()  # until all have read what is there
    if processes.first and answers:
        cli.say(f"{len(answers):,} captions are there, {len(missing):,} are missing")
    mine = missing[processes.rank::processes.world]
    if mine:
        write_answers(mine, load(args, processes), args, processes)
    wait()
    if processes.first:
        finish(args, selection, read_answers(args.out))
    return 0


# ---------------------------------------------------------------------------------------------------------------------
# The program


def parse_args(argv):
    what = argv[0]
    parser = argparse.ArgumentParser(prog=f"python -m prepare.{'emoset' if what == 'build' else what}", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = cli.stop_parsing
    add = parser.add_argument
    if what == "build":
        add("--emoset", type=Path, required=True, help="folder of EmoSet-118K as published")
        add("--train", type=int, default=14_563, help="training pictures (default: %(default)s, the paper's)")
        add("--test", type=int, default=1000, help="test pictures (default: %(default)s, the paper's)")
        add("--lexicon", type=Path, help="Warriner's BRM-emot-submit.csv: check the constants of data.py against it")
        add("--seed", type=int, default=0, help="of the choice of pictures, the split, and V and A")
    else:
        add("--annotations", type=Path, required=True, help="EMOTIC's Annotations.mat, or a CSV of one split")
        add("--images", type=Path, required=True, help="folder with EMOTIC's mscoco/, framesdb/, …")
        add("--split", default="test", help="of a MAT file (default: %(default)s)")
    add("--out", type=Path, required=True, help="folder of the dataset")
    add("--captioner", default=CAPTIONER, help="folder or hub id of a Qwen2.5-VL (default: %(default)s)")
    add("--batch", type=int, default=8, help="pictures captioned together (default: %(default)s)")
    add("--max-new-tokens", type=int, default=160, help="longest caption (default: %(default)s)")
    add("--device", help="cpu or cuda (default: cuda if there is one)")
    add("--dtype", choices=["float32", "bfloat16", "float16"], help="default: float32 on a CPU, bfloat16 on a GPU")
    add("--prompts", type=Path, metavar="FILE", help=f"JSON file with other texts for {', '.join(QUESTIONS)}")
    args = parser.parse_args(argv[1:])
    args.what = what
    return args


def check(args):
    """Refuse senseless settings before anything is read. Raises UserError."""
    bounds = {"batch": (1, 4096), "max_new_tokens": (1, 100_000)}
    if args.what == "build":
        bounds |= {"train": (1, 10**6), "test": (1, 10**6), "seed": (0, 2**31)}
    cli.check_bounds(args, bounds)
    if args.prompts is not None:
        try:
            feedback.load_prompts(args.prompts)
        except UserError as error:
            raise UserError(str(error)) from error
    if args.what == "build" and args.lexicon is not None:
        check_lexicon(args.lexicon)
    if args.what == "emotic" and not (args.annotations.is_file() and args.images.is_dir()):
        raise UserError(f"--annotations {args.annotations}, --images {args.images}: expected a file and a folder; "
                                f"give EMOTIC's .mat or CSV, and the folder of its pictures")
    args.out.mkdir(parents=True, exist_ok=True)


def run_until_stopped(args, processes):
    """`run`; Ctrl-C and SIGTERM end it with a line that says how to go on, and exit code 130 or 143."""
    def stop(number, frame):
        raise KeyboardInterrupt(number)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        return run(args, processes)
    except KeyboardInterrupt as error:
        if processes.first:
            cli.say(f"stopped; the same command goes on from what is kept in {args.out}")
        return 128 + error.args[0]
    except torch.OutOfMemoryError as error:
        raise UserError(f"--batch {args.batch}: the GPU has too little memory; choose a smaller one") from error
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def main(argv):
    args = parse_args(argv)
    return training.run_program(args, check, run_until_stopped)
