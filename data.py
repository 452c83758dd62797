"""Emotions, their places in the valence-arousal plane, and words for them (EmoFeedback2, section 4.1).

Valence V (unpleasant to pleasant) and arousal A (calm to excited) lie on the scales 1..9 of Warriner et al. (2013).
The paper draws V and A for each picture from the lexicon's Gaussians of the picture's emotion label; `draw_va` does
that. `emotion_words` says a V-A pair in plain graded English, for the miniature captions and for prompts of the real
model alike.

A dataset is a folder with train.jsonl and test.jsonl, one row a picture: id, image (path within the folder), label, v, a,
neutral and, in the training rows, emotional. `load_rows` reads it. Datasets are made, and looked through, by

    python data.py tiny --out tiny/cache/dataset                              # the miniature's
    python data.py build --emoset EMOSET --out DATASET                        # EmoSet-118K's (build.py)
    python data.py emotic --annotations FILE --images EMOTIC --out DATASET    # EMOTIC's test pictures (build.py)
    python data.py check DATASET
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
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

# Warriner et al. 2013, ratings of the eight EmoSet class names: (V mean, V sd, A mean, A sd)
LEXICON = {
    "amusement": (7.00, 1.56, 4.82, 2.70),
    "awe": (6.85, 1.79, 3.83, 2.85),
    "anger": (2.50, 1.36, 5.93, 2.77),
    "contentment": (6.62, 2.27, 4.60, 2.87),
    "disgust": (3.32, 2.40, 5.00, 2.35),
    "fear": (2.93, 1.79, 6.14, 2.76),
    "excitement": (7.62, 1.38, 6.21, 2.50),
    "sadness": (2.40, 1.10, 2.81, 2.25),
}
EMOTIONS = tuple(LEXICON)
VA_MIN, VA_MAX = 1.0, 9.0


def check_va(v, a) -> tuple[float, float]:
    """V and A as floats; ValueError unless both are finite numbers in 1..9."""
    for name, value in (("valence", v), ("arousal", a)):
        try:
            number = float(value)
        except (TypeError, ValueError):
            raise ValueError(f"{name} must be a number in 1..9, got {value!r}") from None
        if not math.isfinite(number) or not VA_MIN <= number <= VA_MAX:
            raise ValueError(f"{name} must be a finite number in 1..9, got {value!r}")
    return float(v), float(a)


def draw_va(label: str, rng: np.random.Generator) -> tuple[float, float]:
    """One V-A pair of the class: independent Gaussians of its lexicon entry, clipped to 1..9 (section 4.1)."""
    if label not in LEXICON:
        raise ValueError(f"unknown emotion {label!r}; the classes are {', '.join(EMOTIONS)}")
    v_mean, v_sd, a_mean, a_sd = LEXICON[label]
    v, a = np.clip(rng.normal((v_mean, a_mean), (v_sd, a_sd)), VA_MIN, VA_MAX)
    return float(v), float(a)


def nearest_emotion(v: float, a: float) -> str:
    """The class under whose (unclipped, independent) lexicon Gaussians the point (v, a) has the greatest density."""
    v, a = check_va(v, a)

    def log_density(label: str) -> float:  # up to a constant shared by all classes
        v_mean, v_sd, a_mean, a_sd = LEXICON[label]
        return -math.log(v_sd * a_sd) - ((v - v_mean) / v_sd) ** 2 / 2 - ((a - a_mean) / a_sd) ** 2 / 2

    return max(EMOTIONS, key=log_density)


# Seven levels each, from 1 to 9. Every phrase belongs to exactly one level, so that words can be read back.
VALENCE_WORDS = (
    ("miserable", "despairing", "tragic"),
    ("sorrowful", "bleak", "unhappy"),
    ("melancholy", "downcast", "cheerless"),
    ("neutral", "ordinary", "even-tempered"),
    ("pleasant", "hopeful", "content"),
    ("cheerful", "happy", "delightful"),
    ("blissful", "overjoyed", "wonderful"),
)
AROUSAL_WORDS = (
    ("utterly still", "motionless", "sleepy"),
    ("very calm", "hushed", "tranquil"),
    ("quiet", "slow", "relaxed"),
    ("steady", "awake", "moderate"),
    ("lively", "stirring", "alert"),
    ("intense", "energetic", "agitated"),
    ("wildly intense", "explosive", "frantic"),
)
# Light, weather and colour of each third of V (rows, low to high) and of A (columns, low to high)
SCENERY_WORDS = (
    (
        ("grey fog, muted colours", "dim light, heavy mist", "dull grey sky, faded colours"),
        ("dark clouds, cold light", "grey rain, cold colours", "overcast sky, sombre shadows"),
        ("storm and lightning, harsh contrast", "wild wind, dark thunderclouds", "thunderstorm, long jagged shadows"),
    ),
    (
        ("thin haze, soft colours", "pale sky, gentle light", "veiled light, subdued colours"),
        ("scattered clouds, plain daylight", "mild light, natural colours", "changing sky, balanced colours"),
        ("strong wind, bold contrast", "racing clouds, deep colours", "gusty weather, strong colours"),
    ),
    (
        ("soft warm light, pastel colours", "golden haze, pale warm tones", "clear soft sky, delicate pastel colours"),
        ("warm sunlight, clear sky", "gentle sunshine, fresh colours", "bright air, warm colours"),
        ("brilliant sun, vivid colours", "dazzling light, sparkling colours", "radiant sky, vivid saturated colours"),
    ),
)


def level(x: float, levels: int) -> int:
    """Index 0..levels-1 of a value on the 1..9 scale cut into equal parts; never falls as x rises."""
    return min(levels - 1, int((x - VA_MIN) / (VA_MAX - VA_MIN) * levels))


def emotion_words(v: float, a: float, rng: np.random.Generator | None = None) -> str:
    """6 to 14 words for (v, a): valence, arousal, then the light and colour of such a mood, split by commas.

    Without `rng` the first synonym of each level; with it a random one."""
    v, a = check_va(v, a)
    groups = (VALENCE_WORDS[level(v, 7)], AROUSAL_WORDS[level(a, 7)], SCENERY_WORDS[level(v, 3)][level(a, 3)])
    return ", ".join(group[0 if rng is None else int(rng.integers(len(group)))] for group in groups)


def with_words(prompt: str, v: float, a: float, rng: np.random.Generator | None = None) -> str:
    """The prompt followed by the graded words of (v, a)."""
    return f"{prompt}, {emotion_words(v, a, rng)}"


def with_numbers(prompt: str, v: float, a: float) -> str:
    """The prompt followed by the figures of (v, a), one decimal each."""
    v, a = check_va(v, a)
    return f"{prompt}, valence {v:.1f}, arousal {a:.1f}"


# ---------------------------------------------------------------------------------------------------------------------
# Datasets


class DatasetError(Exception):
    """A dataset cannot be used; the message is one line that names the file and row and says what to do."""


def check_lexicon(path):
    """Compare LEXICON with the published ratings, BRM-emot-submit.csv of Warriner et al. (2013), to 0.005. Raises
    DatasetError that lists everything missing or different."""
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
        raise DatasetError(f"{path}: {'; '.join(wrong)}; give the published BRM-emot-submit.csv")


@dataclass(frozen=True)
class Row:
    id: str
    image: Path
    label: str
    v: float
    a: float
    neutral: str
    emotional: str | None = None


def parse_lines(path, parse):
    """[parse(object)] of a file of JSON lines. Raises DatasetError at the first line that cannot be used, or if none is."""
    rows = []
    with open(path, encoding="utf-8") as f:
        for number, line in enumerate(f, 1):
            try:
                rows.append(parse(json.loads(line)))
            except (ValueError, KeyError, TypeError) as error:
                reason = f"no {error}" if isinstance(error, KeyError) else error
                raise DatasetError(f"{path}, line {number}: {reason}; mend or remove the line") from error
    if not rows:
        raise DatasetError(f"{path}: no rows")
    return rows


def load_rows(folder, split):
    """The rows of a dataset folder's `split` ("train" or "test"). Raises DatasetError at the first unusable row."""
    def parse(raw):
        v, a = check_va(raw["v"], raw["a"])
        row = Row(str(raw["id"]), Path(folder) / raw["image"], raw["label"], v, a, raw["neutral"], raw.get("emotional"))
        if row.label not in LEXICON:
            raise ValueError(f"unknown label {row.label!r}")
        if not row.image.is_file():
            raise ValueError(f"no picture {row.image}")
        return row

    path = Path(folder) / f"{split}.jsonl"
    if not path.is_file():
        raise DatasetError(f"{path}: missing; give a dataset folder, or make the miniature's with "
                           f"`python data.py tiny --out {folder}`")
    return parse_lines(path, parse)


@dataclass(frozen=True)
class Case:
    """A picture that is wished for: what to draw, and the V and A it should have."""
    id: str
    neutral: str
    v: float
    a: float
    group: str | None = None  # of cases that differ in V and A only


def load_cases(path):
    """The cases of a file of JSON lines with id, neutral, v, a and perhaps group, such as a dataset's test.jsonl (other keys
    are passed over). Raises DatasetError at the first unusable line."""
    seen = set()

    def parse(raw):
        case = Case(str(raw["id"]), str(raw["neutral"]), *check_va(raw["v"], raw["a"]), raw.get("group"))
        if Path(case.id).name != case.id or case.id in seen:  # it names the case's picture
            raise ValueError(f"the id {case.id!r} {'a second time' if case.id in seen else 'cannot name a file'}")
        seen.add(case.id)
        return case

    if not Path(path).is_file():
        raise DatasetError(f"{path}: no such file; expected JSON lines with id, neutral, v and a, like a dataset's "
                           f"test.jsonl")
    return parse_lines(path, parse)


def pictures_of(folder, cases):
    """The picture that a method made of each case: `<id>.png`, .jpg, .jpeg or .webp in its folder. Raises DatasetError that
    names the missing ones."""
    def find(case):
        paths = (Path(folder) / f"{case.id}.{ending}" for ending in ("png", "jpg", "jpeg", "webp"))
        return next((path for path in paths if path.is_file()), None)

    paths = list(map(find, cases))
    lost = [case.id for case, path in zip(cases, paths, strict=True) if path is None]
    if lost:
        raise DatasetError(f"{folder}: {len(lost)} of {len(cases)} pictures are missing: {', '.join(lost[:5])}"
                           f"{', …' if len(lost) > 5 else ''}; expected <id>.png, .jpg, .jpeg or .webp")
    return paths


def picture_of(folder, case):
    return pictures_of(folder, [case])[0]


def tiny_row(out, split, labels, seed):
    """Draw one scene of the miniature world, V and A uniform on 1..9, into `out`; its row as a dict."""
    from tiny import scenes

    rng = np.random.default_rng([seed, 30])
    scene, (v, a) = scenes.random_scene(rng), map(float, rng.uniform(VA_MIN, VA_MAX, 2))
    label, name = nearest_emotion(v, a), f"images/{split}_{seed}.png"
    scenes.render(scene, v, a).save(out / name)
    row = {"id": f"{split}_{seed}", "image": name, "label": label, "v": round(v, 4), "a": round(a, 4),
           "neutral": scenes.neutral_caption(scene)}
    if split == "train":
        row["emotional"] = scenes.emotional_caption(scene, v, a, rng)
        if labels == "drawn":
            row["v"], row["a"] = (round(x, 4) for x in draw_va(label, rng))
    return row


def write_rows(path, rows):
    """Write JSON lines under a temporary name, then rename."""
    temporary = Path(path).with_suffix(".tmp")
    temporary.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    os.replace(temporary, path)


def write_tiny(out, train, test, labels="true", seed=0):
    """The miniature's dataset: rendered scenes, labelled with the class nearest to the V and A they were drawn with.

    labels: v and a of the training rows; "true" those of the scene, "drawn" from the class's Gaussians as in section 4.1.
    Those of the test rows are always true.
    """
    (out / "images").mkdir(parents=True, exist_ok=True)
    for split, count, first in (("test", test, 0), ("train", train, 1_000_000)):
        seeds = range(seed * 10_000_000 + first, seed * 10_000_000 + first + count)
        with ProcessPoolExecutor(os.cpu_count()) as pool:
            rows = list(tqdm(pool.map(partial(tiny_row, out, split, labels), seeds, chunksize=16), total=count, desc=split))
        write_rows(out / f"{split}.jsonl", rows)


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
    rows. Raises DatasetError if the folder holds neither file.
    """
    files = {split: path for split in ("train", "test") if (path := Path(folder) / f"{split}.jsonl").is_file()}
    if not files:
        raise DatasetError(f"{folder}: neither train.jsonl nor test.jsonl; give the folder of a dataset")
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


# ---------------------------------------------------------------------------------------------------------------------
# The program


def stop_parsing(message):
    """In place of argparse's own `error`: one line, no usage."""
    sys.exit(print(f"error: {message}; see --help", file=sys.stderr) or 2)


def main(argv=None):
    argv = sys.argv[1:] if argv is None else list(argv)
    if argv[:1] in (["build"], ["emotic"]):
        import build  # it imports torch and the model
        return build.main(argv)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="what", required=True)
    tiny = commands.add_parser("tiny", help="render the miniature's dataset")
    tiny.add_argument("--out", type=Path, required=True, help="folder of the dataset")
    tiny.add_argument("--train", type=int, default=4000, help="training pictures (default: %(default)s)")
    tiny.add_argument("--test", type=int, default=500, help="test pictures (default: %(default)s)")
    tiny.add_argument("--labels", choices=["true", "drawn"], default="true",
                      help="V and A of the training rows: the scene's own, or drawn from its class as in the paper")
    tiny.add_argument("--seed", type=int, default=0)
    commands.add_parser("build", add_help=False, help="build the paper's dataset from EmoSet-118K; see build --help")
    commands.add_parser("emotic", add_help=False, help="the test pictures of EMOTIC; see emotic --help")
    looking = commands.add_parser("check", help="print every problem of a dataset")
    looking.add_argument("folder", type=Path, help="folder of the dataset")
    parser.error = tiny.error = looking.error = stop_parsing
    args = parser.parse_args(argv)
    try:
        if args.what == "check":
            return check(args.folder)
        if min(args.train, args.test) < 1 or max(args.train, args.test) > 1_000_000:
            stop_parsing("--train and --test: expected 1..1,000,000")
        write_tiny(args.out, args.train, args.test, args.labels, args.seed)
    except (DatasetError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(args.out)


if __name__ == "__main__":
    sys.exit(main())
