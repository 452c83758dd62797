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

import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from parts.cli import UserError

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
    """[parse(object)] of a file of JSON lines. Raises UserError at the first line that cannot be used, or if none is."""
    rows = []
    with open(path, encoding="utf-8") as f:
        for number, line in enumerate(f, 1):
            try:
                rows.append(parse(json.loads(line)))
            except (ValueError, KeyError, TypeError) as error:
                reason = f"no {error}" if isinstance(error, KeyError) else error
                raise UserError(f"{path}, line {number}: {reason}; mend or remove the line") from error
    if not rows:
        raise UserError(f"{path}: no rows")
    return rows


def load_rows(folder, split):
    """The rows of a dataset folder's `split` ("train" or "test"). Raises UserError at the first unusable row."""
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
        raise UserError(f"{path}: missing; give a dataset folder, or make the miniature's with "
                           f"`python data.py tiny --out {folder}`")
    return parse_lines(path, parse)
