"""A dataset of photographs from its source (§4.1): what prepare/emoset.py and emotic.py share.

In order: pictures are chosen and linked into the dataset, captioned by a vision-language model
(captions.py) and written as rows. The choice is kept in selection.json and every batch of captions
in captions-<rank>.jsonl, so that a run that was stopped or killed goes on without looking at a
picture or asking for a caption again. Several processes share no more than the dataset's folder.
"""

import os
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path

from tqdm import tqdm

import data
from feedback import Unusable
from parts import cli, imagefolder, weights
from parts.cli import UserError
from parts.files import read_json, write_json
from parts.judge_server import is_address
from parts.prompts import load_prompts
from prepare import captions

VERSION = "build.py 2"  # this file, and a number that rises when the same command gives other rows
ROW_KEYS = ("id", "image", "label", "v", "a", "neutral", "emotional", "labels", "seed")
# Flags that change no row: a run may go on with other values.
FREE = ("out", "micro", "device", "questions", "emoset", "lexicon", "annotations", "images")


def add_flags(parser):
    """The flags that both programs share."""
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder of the dataset")
    add("--captioner", default="Qwen/Qwen2.5-VL-7B-Instruct",
        help="folder or hub id of a Qwen2.5-VL (default: %(default)s)")
    add("--micro", type=cli.integer(1, 4096), default=8,
        help="pictures captioned together (default: %(default)s)")
    add("--max-new-tokens", type=cli.integer(1, 100_000), default=160,
        help="longest caption (default: %(default)s)")
    add("--device", help="cpu or cuda (default: cuda if there is one)")
    add("--questions", type=Path, metavar="FILE",
        help=f"JSON file with other texts for {', '.join(captions.PROMPTS)}")


def build(args, processes, choose_rows, load=captions.load_captioner):
    """Choose pictures, caption them, write the dataset.

    choose_rows(args) -> Choice. load(args, processes) -> captioner(conversations) -> texts, called
    if captions are missing.
    """
    # 1. the first process chooses the pictures, the others wait for its choice
    prompts = dict(captions.PROMPTS)
    if args.questions is not None:
        prompts |= load_prompts(args.questions, prompts, captions.VALUES, captions.NEEDED)
    selection = selection_of(args, processes, prompts, choose_rows)

    # 2. each process asks every world-th question, but for those that an earlier run has asked
    needed = [(row, kind) for row in selection["rows"] for kind in captions.kinds_of(row)]
    answers = captions.read_answers(args.out)
    mine = needed[processes.rank::processes.world]
    missing = [(row, kind) for row, kind in mine if (row["id"], kind) not in answers]
    if processes.first and answers:
        cli.say(f"{len(answers):,} of {len(needed):,} captions are there")
    if missing:
        captions.write_answers(missing, load(args, processes), prompts, args, processes)

    # 3. the first process waits for all answers and writes the dataset
    if processes.first:
        while len(answers := captions.read_answers(args.out)) < len(needed):
            time.sleep(0.5)
        finish(args, selection, answers)


# --------------------------------------------------------------------------------------------------
# The choice of pictures, kept in the dataset's folder


@dataclass
class Choice:
    folder: Path  # of the pictures
    rows: list = field(default_factory=list)  # the usable candidates
    broken: list = field(default_factory=list)  # [(source, why)] of the unusable ones before them
    repeats: int = 0  # pictures that came before under another name


def choose(folder, candidates, wanted, look, least=1):
    """The first `wanted` usable candidates, as a Choice; UserError if there are less than `least`.

    candidates: dicts with "id" and "source", the picture's path within the folder. look(folder,
    candidate) -> (hash, None) or (None, why). A file whose bytes came before is a repeat.
    """
    choice = Choice(folder)
    hashes = set()
    ids = set()
    left = iter(candidates)
    bar = tqdm(total=min(wanted, len(candidates)), desc="pictures")
    # threads suffice: Pillow and hashlib work outside the interpreter lock
    with ThreadPoolExecutor(os.cpu_count()) as pool, bar:
        # in blocks, so that hardly more pictures are opened than are needed
        while block := list(islice(left, min(256, wanted - len(choice.rows)))):
            looks = pool.map(partial(look, folder), block)
            for candidate, (digest, why) in zip(block, looks, strict=True):
                if digest in hashes:
                    choice.repeats += 1
                    continue
                if why is None and candidate["id"] in ids:
                    why = "has the name of another picture"
                if why is not None:
                    choice.broken.append((candidate["source"], why))
                    tqdm.write(f"{candidate['source']} {why}; passed over", file=sys.stderr)
                    continue
                hashes.add(digest)
                ids.add(candidate["id"])
                choice.rows.append(candidate)
                bar.update()
    if len(choice.rows) < least:
        raise UserError(f"{folder}: {len(choice.rows)} of {len(candidates):,} pictures usable, "
                        f"expected at least {least}; download them again")
    return choice


def selection_of(args, processes, prompts, choose_rows):
    """The content of selection.json, {"settings", "rows", "broken", "repeats"}.

    The first process makes it if it is not there. UserError if it is of another command, or if
    the folder holds another dataset.
    """
    settings = {key: value for key, value in vars(args).items() if key not in FREE}
    settings |= {"version": VERSION, "questions": prompts}
    path = args.out / "selection.json"
    if processes.first and not path.exists():
        if found := next(args.out.glob("*.jsonl"), None):
            raise UserError(f"{found}: there is another dataset; choose another --out")
        if not is_address(args.captioner):  # a bad one fails before pictures are opened
            weights.index(weights.find(args.captioner))
        choice = choose_rows(args)
        for row in tqdm(choice.rows, "links"):
            suffix = Path(row["source"]).suffix
            row["image"] = imagefolder.place_of(row["split"], row["id"], suffix)
            link(choice.folder / row["source"], args.out / row["image"])
        # written last: whoever finds this file finds the pictures, too
        write_json(path, {"settings": settings, "rows": choice.rows, "broken": choice.broken,
                          "repeats": choice.repeats})
    while not path.exists():
        time.sleep(0.5)
    selection = read_json(path)
    before = selection["settings"]
    changed = [key for key in settings | before if settings.get(key) != before.get(key)]
    if changed:
        raise UserError(f"{args.out} holds a dataset built with other settings "
                        f"({', '.join(changed)}); repeat them to go on, or choose another --out")
    return selection


def link(source, target):
    """A hard link, or a copy where there can be none."""
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    try:
        os.link(source.resolve(), target)  # resolved, because a symbolic link may be relative
    except OSError:
        shutil.copyfile(source, target)


# --------------------------------------------------------------------------------------------------
# The dataset


def finish(args, selection, answers):
    """Write train.jsonl, test.jsonl and dataset.json, and print the counts.

    A row is left out, and listed in dataset.json, if one of its answers holds no caption.
    UserError if none of a split remains.
    """
    # 1. read the captions
    rows = []
    without = []
    for row in selection["rows"]:
        try:
            kinds = captions.kinds_of(row)
            said = {kind: captions.read_caption(answers[row["id"], kind]) for kind in kinds}
            rows.append(row | said)
        except Unusable as error:
            without.append((row["source"], str(error)))
            cli.say(f"{row['source']}: an answer cannot be used: {error}; its row is left out")

    # 2. write each split
    counts = {}
    for split in dict.fromkeys(row["split"] for row in selection["rows"]):
        own = [row for row in rows if row["split"] == split]
        if not own:
            raise UserError(f"{args.captioner}: none of its captions of {split} rows can be used; "
                            f"choose another --captioner or other --questions, and another --out")
        kept = [{key: row[key] for key in ROW_KEYS if key in row} for row in own]
        imagefolder.write_split(args.out, split, [row | {"version": VERSION} for row in kept])
        labels = [row["label"] for row in own]
        counts[split] = {label: labels.count(label) for label in data.EMOTIONS}

    # 3. say how they were made, and how many there are
    arguments = {key: str(x) if isinstance(x, Path) else x for key, x in vars(args).items()}
    write_json(args.out / "dataset.json", {
        "version": VERSION, "arguments": arguments, "captioner": args.captioner,
        "questions": selection["settings"]["questions"], "counts": counts,
        "broken": selection["broken"], "repeats": selection["repeats"], "without_caption": without})
    table = [("", *counts)]
    table += [(label, *(count[label] for count in counts.values())) for label in data.EMOTIONS]
    table.append(("all", *(sum(count.values()) for count in counts.values())))
    print(cli.markdown(table))
    print(f"{len(selection['broken'])} pictures unusable, {selection['repeats']} repeats, "
          f"{len(without)} without a caption\n{args.out}")
