"""Every problem of a dataset; and the lexicon against the published one.

    python -m prepare.check DATASET
"""

if __name__ == "__main__":  # before torch, whose import takes seconds: Ctrl-C ends in one line
    from parts import interrupts
    interrupts.catch()

import csv
import hashlib
import io
import math
import os
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data import EMOTIONS, FAMILIES, LABELS, LEXICON, check_caption, check_id, check_va
from parts import cli, imagefolder
from parts.cli import UserError
from parts.files import decode_picture, endless_refused, lines_of, parse_object

LEXICON_COLUMNS = ("V.Mean.Sum", "V.SD.Sum", "A.Mean.Sum", "A.SD.Sum")
# The words of each class that data.FAMILIES was computed from: forms and near synonyms, our choice.
WORDS = {
    "amusement": "amusement amused amusing fun funny humor laughter playful",
    "awe": "awe awesome wonder marvel amazement admiration reverence majestic",
    "anger": "anger angry rage fury wrath outrage hostility irritation",
    "contentment": "contentment content satisfaction serenity peaceful calm comfort relaxed",
    "disgust": "disgust disgusted disgusting repulsive revolting nausea loathing filthy",
    "fear": "fear fearful afraid scared terror fright horror panic",
    "excitement": "excitement excited exciting thrill enthusiasm eager adventure ecstasy",
    "sadness": "sadness sad sorrow grief misery unhappy gloom melancholy",
}


def check_lexicon(path):
    """Raise UserError with every difference of data.LEXICON and data.FAMILIES to Warriner's
    BRM-emot-submit.csv."""
    with open(path, encoding="utf-8-sig", errors="replace", newline="") as f:
        found = {str(row.get("Word")).strip().lower(): row for row in csv.DictReader(f)}

    def entry(word, column):
        """(text, number) of a word; "missing" without the word or its column, NaN for no number."""
        said = found.get(word, {}).get(column) or "missing"
        return said, float(said) if re.fullmatch(r"\d+(\.\d+)?", said) else math.nan

    wrong = []
    for label in EMOTIONS:
        for column, value in zip(LEXICON_COLUMNS, LEXICON[label]):
            said, number = entry(label, column)
            if not abs(number - value) <= 0.005 + 1e-9:  # NaN is a difference, too
                wrong.append(f"{label} {column} is {said}, here {value:.2f}")
        for axis, *values in zip("VA", FAMILIES[label][::2], FAMILIES[label][1::2]):
            means = [entry(word, f"{axis}.Mean.Sum")[1] for word in WORDS[label].split()]
            own = np.array([np.mean(means), np.std(means, ddof=1)])
            if not (abs(own - values) <= 0.005 + 1e-9).all():
                wrong.append(f"the words of {label} have {axis} {own.round(2)}, here {values}")
    if wrong:
        raise UserError(f"{path}: {'; '.join(wrong)}; give the published BRM-emot-submit.csv")


def look_at(path):
    """(SHA-256 of a picture file's bytes, None), or (None, why) if the file is of no use."""
    try:
        content = endless_refused(path).read_bytes()
        decode_picture(io.BytesIO(content))
    except Exception as error:  # Pillow raises many kinds for a damaged file
        reason = error if type(error) is OSError else type(error).__name__
        return None, f"cannot be read ({reason})"
    return hashlib.sha256(content).hexdigest(), None


def problems_of(raw, split):
    """What is wrong with a row by itself, and what to do, as texts. Its picture is not opened."""
    if not raw:
        return ["no JSON object; mend or remove the line"]
    missing = [key for key in ("id", "image", "label", "v", "a", "neutral") if key not in raw]
    if missing:  # what follows reads these keys
        return [f"no {', '.join(map(repr, missing))}; add it or remove the line"]
    found = []
    checks = [(check_va, raw["v"], raw["a"]), (check_id, raw["id"])]
    checks += [(check_caption, key, raw[key]) for key in ("neutral", "emotional") if key in raw]
    for check, *values in checks:
        try:
            check(*values)
        except ValueError as error:
            found.append(f"{error}; mend it or remove the line")
    if raw["label"] not in EMOTIONS:
        found.append(f"unknown label {raw['label']!r}; give one of {', '.join(EMOTIONS)}")
    labels = raw.get("labels", "true")
    if not isinstance(labels, str) or labels not in LABELS:
        found.append(f"unknown labels {labels!r}; give one of {', '.join(LABELS)}")
    if split == "test" and "emotional" in raw:
        found.append("a test row with an emotional caption (§4.1); remove the caption")
    return found


def look_at_row(folder, raw):
    """As `look_at`, of a row's picture."""
    image = raw.get("image")
    if not isinstance(image, str) or Path(image).is_absolute() or ".." in Path(image).parts:
        return None, "lies outside the folder"
    return look_at(folder / image)


def read_rows(folder):
    """[(split, "file, line number", row)] of a dataset; the row is {} if it is no JSON object.

    train.jsonl or test.jsonl may be absent: EMOTIC has test rows only. Raises UserError without
    both. validation.jsonl is a split that only some datasets have.
    """
    rows = []
    for split in ("train", "validation", "test"):
        path = imagefolder.file_of(folder, split)
        # an empty file counts as one bad line, an absent one as none
        lines = lines_of(path) or [b""] if path.is_file() else []
        for number, line in enumerate(lines, 1):
            try:
                raw = imagefolder.own_row(parse_object(line), folder, path)
            except (ValueError, TypeError, KeyError):
                raw = {}
            rows.append((split, f"{path}, line {number}", raw))
    if not rows:
        raise UserError(f"{folder}: neither train.jsonl nor test.jsonl; give a dataset's folder")
    return rows


def check_rows(folder, rows):
    """Every problem of rows from `read_rows`, a line each: where, what is wrong, what to do."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # Pillow decodes outside the interpreter lock
        looks = pool.map(partial(look_at_row, folder), [raw for *_, raw in rows])
        looks = list(tqdm(looks, "pictures", len(rows)))
    problems = []
    first = {}  # an id, or the hash of a picture: where it came first
    for (split, where, raw), (digest, why) in zip(rows, looks, strict=True):
        found = problems_of(raw, split)
        if "id" in raw:
            _, earlier = first.setdefault(str(raw["id"]), (split, where))
            if earlier != where:
                found.append(f"the id {raw['id']!r} is that of {earlier}, too; give it another")
        if "image" in raw:
            # no test picture may have been trained on, whatever it is called
            before, earlier = first.setdefault(digest, (split, where))
            if why is None and before != split:
                why = f"is that of {earlier}, too"
            if why is not None:
                found.append(f"the picture {raw['image']!r} {why}; give another or remove the line")
        problems += [f"{where}: {text}" for text in found]
    return problems


def main(argv=None):
    """Print every problem and their number. Exit code: 1 with problems."""
    parser = cli.parser(__doc__)
    parser.add_argument("folder", type=Path, help="folder of the dataset")
    folder = parser.parse_args(argv).folder

    def check():
        rows = read_rows(folder)
        problems = check_rows(folder, rows)
        print(*problems, f"{folder}: {len(rows):,} rows, {len(problems):,} problems", sep="\n")
        return 1 if problems else 0

    return cli.run_program(check)


if __name__ == "__main__":
    sys.exit(main())
