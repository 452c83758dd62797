"""Every problem of a dataset.

    python -m prepare.check DATASET
"""

import argparse
import csv
import hashlib
import io
import json
import math
import os
import re
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

from data import EMOTIONS, LEXICON, check_va
from parts.cli import UserError, say, stop_parsing


def check_lexicon(path):
    """Compare LEXICON with the published ratings, BRM-emot-submit.csv of Warriner et al. (2013), to 0.005. Raises
    UserError that lists everything missing or different."""
    columns, found = ("V.Mean.Sum", "V.SD.Sum", "A.Mean.Sum", "A.SD.Sum"), {}
    try:
        with open(path, encoding="utf-8-sig", errors="replace", newline="") as f:
            reader = csv.DictReader(f)
            wrong = [f"no column {name}" for name in ("Word", *columns) if name not in (reader.fieldnames or ())]
            if not wrong:
                found = {str(row["Word"]).strip().lower(): row for row in reader}
                wrong = [f"no word {label}" for label in EMOTIONS if label not in found]
    except (OSError, csv.Error) as error:
        wrong = [f"cannot be read ({error})"]
    for label in (label for label in EMOTIONS if label in found):
        for name, own in zip(columns, LEXICON[label]):
            said = found[label][name] or "empty"
            number = float(said) if re.fullmatch(r"\d+(\.\d+)?", said) else math.nan
            if not abs(number - own) <= 0.005 + 1e-9:
                wrong.append(f"{label} {name} is {said}, here {own:.2f}")
    if wrong:
        raise UserError(f"{path}: {'; '.join(wrong)}; give the published BRM-emot-submit.csv")


# ---------------------------------------------------------------------------------------------------------------------
# Check


def look_at(path):
    """(SHA-256 of a picture file's bytes, None), or (None, why) if it cannot be decoded whole, or is more than 200 times as
    long as wide, which Qwen2.5-VL refuses."""
    try:
        content = Path(path).read_bytes()
        with Image.open(io.BytesIO(content)) as image:
            image.load()
            if max(image.size) > 200 * min(image.size):
                return None, f"is more than 200 times as long as wide ({image.width}×{image.height} pixels)"
    except UnidentifiedImageError:  # its own text names an object in memory
        return None, "is no picture"
    except FileNotFoundError:
        return None, "is missing"
    except Exception as error:  # Pillow raises many kinds for a damaged file
        return None, f"cannot be decoded ({error or type(error).__name__})"
    return hashlib.sha256(content).hexdigest(), None


def problems_of(raw, split):
    """What is wrong with one row of a dataset by itself, and what to do: texts. Its picture is not opened."""
    if not isinstance(raw, dict):
        return ["no JSON object; mend or remove the line"]
    if missing := [key for key in ("id", "image", "label", "v", "a", "neutral") if key not in raw]:
        return [f"no {', '.join(map(repr, missing))}; add it or remove the line"]
    found = []
    try:
        check_va(raw["v"], raw["a"])
    except ValueError as error:
        found.append(f"{error}; mend it or remove the line")
    if raw["label"] not in EMOTIONS:
        found.append(f"unknown label {raw['label']!r}; give one of {', '.join(EMOTIONS)}")
    for key in ("neutral", "emotional"):
        text = raw.get(key, "absent")
        if not (isinstance(text, str) and text.strip()):
            found.append(f"{key!r} is {text!r}, expected a caption; mend it or remove the line")
    if split == "test" and "emotional" in raw:
        found.append("a test row with an emotional caption, which only training may see (section 4.1); remove 'emotional'")
    if Path(str(raw["id"])).name != str(raw["id"]):
        found.append(f"the id {raw['id']!r} cannot name a file; give it another")
    if not is_within(raw["image"]):
        found.append(f"the picture {raw['image']!r} lies outside the folder; give a path within it")
    return found


def is_within(image):
    """Whether a row's `image` is a path that stays in the dataset's folder."""
    return isinstance(image, str) and not Path(image).is_absolute() and ".." not in Path(image).parts


def check_dataset(folder):
    """([problem], {split: [label of each row]}) of a dataset folder; a problem is one line: file, line, what, what to do.

    train.jsonl or test.jsonl may be absent (EMOTIC has no training rows here), and so may the emotional captions of training
    rows. Raises UserError if the folder holds neither file.
    """
    files = {split: path for split in ("train", "test") if (path := Path(folder) / f"{split}.jsonl").is_file()}
    if not files:
        raise UserError(f"{folder}: neither train.jsonl nor test.jsonl; give the folder of a dataset")
    found, pictures, ids, labels = [], [], {}, {split: [] for split in files}  # found: (split, line number, text)
    for split, path in files.items():
        lines = path.read_bytes().splitlines() or [b""]
        for number, line in enumerate(lines, 1):
            try:
                raw = json.loads(line)
            except ValueError as error:
                found.append((split, number, f"no JSON ({error}); mend or remove the line" if line else "no row; remove the "
                              "line, or the file if it has no other"))
                continue
            found += [(split, number, text) for text in problems_of(raw, split)]
            raw = raw if isinstance(raw, dict) else {}
            labels[split].append(raw.get("label"))
            if "id" in raw:
                before = ids.setdefault(str(raw["id"]), (path.name, number))
                if before != (path.name, number):
                    found.append((split, number, f"the id {raw['id']!r} is that of {before[0]}, line {before[1]}, too; give "
                                                 f"it another"))
            if is_within(raw.get("image")):
                pictures.append((split, number, raw["image"]))
    first = {}  # hash: place of the first row with it
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        looks = pool.map(look_at, [Path(folder) / image for *_, image in pictures], chunksize=16)
        for (split, number, image), (digest, why) in zip(pictures, tqdm(looks, "pictures", len(pictures)), strict=True):
            if why is not None:
                found.append((split, number, f"the picture {image} {why}; put it there or remove the line"))
            elif first.setdefault(digest, (split, number))[0] != split:
                found.append((split, number, f"the picture {image} is that of train.jsonl, line {first[digest][1]} too; "
                                             f"remove one of the two"))
    found.sort(key=lambda problem: (problem[0] == "test", problem[1]))
    return [f"{files[split]}, line {number}: {text}" for split, number, text in found], labels


def check(folder):
    """Print every problem of a dataset, or a line about it. Exit code: 1 with problems, 0 without."""
    problems, labels = check_dataset(folder)
    if problems:
        print("\n".join([*problems, f"problems: {len(problems):,}"]))
        return 1
    classes = {label for split in labels.values() for label in split}
    print(f"{folder}: no problems; " + ", ".join(f"{len(rows):,} {split} rows" for split, rows in labels.items())
          + f", {len(classes)} classes: {', '.join(sorted(classes))}")
    return 0


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = stop_parsing
    parser.add_argument("folder", type=Path, help="folder of the dataset")
    args = parser.parse_args(argv)
    try:
        return check(args.folder)
    except (UserError, OSError) as error:
        say(f"error: {error}")
        return 2


if __name__ == "__main__":
    sys.exit(main())
