"""EMOTIC's pictures as test rows, outside the domain of training (Table 2).

    python -m prepare.emotic --annotations Annotations.mat --images EMOTIC --out DATASET

EMOTIC rates every person in a picture on 1..10. A picture has the mean V and A of its persons,
brought to 1..9 by 1 + (x − 1)·8/9, and the class nearest to them.
"""

if __name__ == "__main__":  # before torch, whose import takes seconds: Ctrl-C ends in one line
    from parts import interrupts
    interrupts.catch()

import csv
import math
import re
import sys
from functools import partial
from pathlib import Path

import numpy as np

import data
from parts import cli
from parts.cli import UserError
from parts.run import run_in_processes
from prepare import build
from prepare.check import look_at


def mean_of(values):
    """The mean of the finite ones of a number, a text or an array; NaN if there is none."""
    try:
        values = np.ravel(np.asarray(values, dtype=float))
    except (TypeError, ValueError):
        return math.nan
    values = values[np.isfinite(values)]  # an annotator may have left a scale out
    return float(values.mean()) if len(values) else math.nan


def persons_of_csv(path):
    """[("Folder/Filename", v, a)], a line a person; NaN for what is no number. Raises UserError."""
    persons = []
    try:
        with open(path, encoding="utf-8-sig", errors="replace", newline="") as f:
            for line in csv.DictReader(f):
                row = {str(key).strip().lower(): value for key, value in line.items()}
                if "valence" in row:
                    values = (row["valence"], row["arousal"])
                else:  # "[valence, arousal, dominance]"
                    said = re.findall(r"[-+.\w]+", row["continuous_labels"] or "")
                    values = (*said, "", "")[:2]
                persons.append((f"{row['folder']}/{row['filename']}", *map(mean_of, values)))
    except (csv.Error, KeyError) as error:
        raise UserError(f"{path}: no CSV with columns Folder, Filename and either Valence, Arousal "
                        f"or Continuous_Labels ({error}); give EMOTIC's CSV or .mat") from error
    return persons


def persons_of_mat(path, split):
    """As `persons_of_csv`, of one split of EMOTIC's MAT file. Raises UserError."""
    cli.say(f"reading {path}")  # tens of seconds, of which the library tells nothing
    persons = []
    try:
        from scipy.io import loadmat  # needed for this file only
        content = loadmat(path, squeeze_me=True, struct_as_record=False)
        for image in np.atleast_1d(content[split]):  # squeezing makes one image a scalar
            source = f"{image.folder}/{image.filename}"
            persons += [(source, *va_of(person)) for person in np.atleast_1d(image.person)]
    except Exception as error:  # scipy raises many kinds for a damaged file
        raise UserError(f"{path}: {error!r}; expected EMOTIC's Annotations.mat with a split "
                        f"{split}, and scipy to read it; or give a CSV") from error
    return persons


def va_of(person):
    """(V, A) as EMOTIC combined them, else their means over the annotators, else NaN."""
    for field in ("combined_continuous", "annotations_continuous"):
        marks = np.atleast_1d(getattr(person, field, []))
        v = mean_of([mean_of(getattr(mark, "valence", None)) for mark in marks])
        a = mean_of([mean_of(getattr(mark, "arousal", None)) for mark in marks])
        if math.isfinite(v + a):  # both scales of one kind, never one of each
            break
    return v, a


def read_emotic(path, split):
    """The pictures as dicts with id, source, split and, from persons in 1..10, label, v and a."""
    is_mat = path.suffix.lower() == ".mat"
    rated = {}
    for source, v, a in persons_of_mat(path, split) if is_mat else persons_of_csv(path):
        values = rated.setdefault(source, [])
        if 1 <= v <= 10 and 1 <= a <= 10:  # not NaN
            values.append((v, a))
    pictures = []
    for source, values in rated.items():
        name = re.sub(r"[^\w-]+", "_", str(Path(source).with_suffix("")))  # it names files
        pictures.append({"id": name, "source": source, "split": "test"})
        if values:
            v, a = (round(1 + (sum(x) / len(x) - 1) * 8 / 9, 4) for x in zip(*values))
            pictures[-1] |= {"label": data.nearest_emotion(v, a), "v": v, "a": a}
    return pictures


def look_at_emotic(folder, candidate):
    """As `look_at`, of a picture that must have V and A."""
    if "label" not in candidate:
        return None, "has no person with V and A in 1..10"
    return look_at(folder / candidate["source"])


def choose_rows(args):
    """A build.Choice of all usable pictures."""
    if not args.images.is_dir():
        raise UserError(f"--images {args.images}: no such folder; give that of EMOTIC's pictures")
    candidates = read_emotic(args.annotations, args.split)
    return build.choose(args.images, candidates, len(candidates), look_at_emotic)


def parse_args(argv=None):
    parser = cli.parser(__doc__)
    parser.set_defaults(what="emotic")  # in selection.json, so that older runs go on
    add = parser.add_argument
    add("--annotations", type=Path, required=True, help="Annotations.mat, or a CSV of one split")
    add("--images", type=Path, required=True, help="folder with EMOTIC's mscoco/, framesdb/, …")
    add("--split", default="test", help="of a MAT file (default: %(default)s)")
    build.add_flags(parser)
    return parser.parse_args(argv)


def main(argv=None):
    return run_in_processes(partial(build.build, choose_rows=choose_rows), parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
