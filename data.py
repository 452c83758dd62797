"""Emotions, their places in the valence-arousal plane, and words for them (EmoFeedback2, §4.1).

Valence V (unpleasant to pleasant) and arousal A (calm to excited) lie on the scales 1..9 of
Warriner et al. (2013). The paper draws V and A of each picture from the lexicon's Gaussians of its
emotion label; `draw_va` does that. A target enters a prompt as numbers (`with_numbers`), in plain
graded English (`with_words`) or as both, in training, sampling and evaluation alike.

A dataset is a folder with train.jsonl, test.jsonl and, if choices are to be made, validation.jsonl,
one row a picture: id, image (path within the folder), label, v, a, neutral, in training rows only
emotional and, if V and A were drawn, labels: from what. `load_rows` reads it.
Datasets are made, and looked through, by

    python -m tiny.dataset --out tiny/cache/dataset          # rendered scenes, for the miniature
    python -m prepare.emoset --emoset EMOSET --out DATASET   # photographs of EmoSet-118K
    python -m prepare.emotic --annotations FILE --images EMOTIC --out DATASET
    python -m prepare.check DATASET
"""

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from parts import imagefolder
from parts.cli import UserError, is_plain
from parts.files import kind_of, parse_lines
from parts.prompts import LONGEST_PROMPT

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
# The same over eight words of each class (prepare/check.py has them): the mean of the words' means
# and their standard deviation, which is narrower: between words, not between people who rate one.
FAMILIES = {
    "amusement": (7.63, 0.46, 5.29, 0.63),
    "awe": (6.92, 0.70, 4.78, 1.09),
    "anger": (2.84, 0.33, 6.20, 0.41),
    "contentment": (7.20, 0.48, 3.15, 0.96),
    "disgust": (2.53, 0.61, 5.10, 0.61),
    "fear": (2.82, 0.37, 5.84, 0.56),
    "excitement": (7.39, 0.54, 6.15, 0.92),
    "sadness": (2.56, 0.61, 4.09, 0.81),
}
# Where V and A of a row come from: its picture, or a draw from the Gaussians of its class.
LABELS = {"true": None, "drawn": LEXICON, "family": FAMILIES}
EMOTIONS = tuple(LEXICON)
VA_MIN = 1.0
VA_MAX = 9.0


# --------------------------------------------------------------------------------------------------
# Valence and arousal


def check_va(v, a) -> tuple[float, float]:
    """V and A as floats; ValueError unless both are finite numbers in 1..9."""
    for name, value in (("valence", v), ("arousal", a)):
        try:
            number = math.nan if isinstance(value, bool) else float(value)
        except (TypeError, ValueError, OverflowError):
            raise ValueError(f"{name} must be a number in 1..9, got {value!r}") from None
        if not math.isfinite(number) or not VA_MIN <= number <= VA_MAX:
            raise ValueError(f"{name} must be a finite number in 1..9, got {value!r}")
    return float(v), float(a)


def draw_va(label: str, rng: np.random.Generator, lexicon=LEXICON) -> tuple[float, float]:
    """(V, A) of a class: independent Gaussians of its entry, clipped to 1..9 (§4.1)."""
    if label not in LEXICON:
        raise ValueError(f"unknown emotion {label!r}; the classes are {', '.join(EMOTIONS)}")
    v_mean, v_sd, a_mean, a_sd = lexicon[label]
    v, a = np.clip(rng.normal((v_mean, a_mean), (v_sd, a_sd)), VA_MIN, VA_MAX)
    return float(v), float(a)


def nearest_emotion(v: float, a: float) -> str:
    """The class whose lexicon Gaussians (independent, not clipped) are densest at (v, a)."""
    v, a = check_va(v, a)

    def log_density(label):
        # the log of the two Gaussians' product, without the constant that all classes share
        v_mean, v_sd, a_mean, a_sd = LEXICON[label]
        distance = ((v - v_mean) / v_sd) ** 2 + ((a - a_mean) / a_sd) ** 2
        return -math.log(v_sd * a_sd) - distance / 2

    return max(EMOTIONS, key=log_density)


# --------------------------------------------------------------------------------------------------
# Words and numbers of a target

# Seven levels from 1 to 9, each with synonyms and, in its lower and its upper third, a leaning: 21
# steps a scale. A phrase belongs to one of them only, so that it can be read back from a prompt.
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
VALENCE_LEANINGS = ("leaning sadder", "", "leaning happier")
AROUSAL_LEANINGS = ("leaning calmer", "", "leaning livelier")
# Light, weather and colour: SCENERY_WORDS[third of V][third of A] are the synonyms.
SCENERY_WORDS = (
    (  # unpleasant: calm, moderate, excited
        ("grey fog, muted colours", "dim light, heavy mist", "dull grey sky, faded colours"),
        ("dark clouds, cold light", "grey rain, cold colours", "overcast sky, sombre shadows"),
        ("storm and lightning, harsh contrast", "wild wind, dark thunderclouds",
         "thunderstorm, long jagged shadows"),
    ),
    (  # neither pleasant nor unpleasant
        ("thin haze, soft colours", "pale sky, gentle light", "veiled light, subdued colours"),
        ("scattered clouds, plain daylight", "mild light, natural colours",
         "changing sky, balanced colours"),
        ("strong wind, bold contrast", "racing clouds, deep colours",
         "gusty weather, strong colours"),
    ),
    (  # pleasant
        ("soft warm light, pastel colours", "golden haze, pale warm tones",
         "clear soft sky, delicate pastel colours"),
        ("warm sunlight, clear sky", "gentle sunshine, fresh colours", "bright air, warm colours"),
        ("brilliant sun, vivid colours", "dazzling light, sparkling colours",
         "radiant sky, vivid saturated colours"),
    ),
)


def level(x: float, levels: int) -> int:
    """Index 0..levels-1 of a value when 1..9 is cut into equal parts; it never falls as x rises."""
    return min(levels - 1, int((x - VA_MIN) / (VA_MAX - VA_MIN) * levels))


def emotion_words(v: float, a: float, rng: np.random.Generator | None = None) -> str:
    """6 to 18 words for (v, a): valence, arousal, then light and colour, with commas between.

    Without `rng` these are the first synonyms of each level, with it random ones.
    """
    v, a = check_va(v, a)
    groups = (
        (VALENCE_WORDS[level(v, 7)], VALENCE_LEANINGS[level(v, 21) % 3]),
        (AROUSAL_WORDS[level(a, 7)], AROUSAL_LEANINGS[level(a, 21) % 3]),
        (SCENERY_WORDS[level(v, 3)][level(a, 3)], ""),
    )
    phrases = []
    for synonyms, leaning in groups:
        word = synonyms[0 if rng is None else int(rng.integers(len(synonyms)))]
        phrases.append(f"{word} {leaning}".strip())
    return ", ".join(phrases)


def with_words(prompt: str, v: float, a: float) -> str:
    """The prompt followed by the graded words of (v, a)."""
    return f"{prompt}, {emotion_words(v, a)}"


def with_numbers(prompt: str, v: float, a: float) -> str:
    """The prompt followed by the figures of (v, a), one decimal each."""
    v, a = check_va(v, a)
    return f"{prompt}, valence {v:.1f}, arousal {a:.1f}"


def with_both(prompt: str, v: float, a: float) -> str:
    """The prompt followed by the graded words, then the figures of (v, a)."""
    return with_numbers(with_words(prompt, v, a), v, a)


# --------------------------------------------------------------------------------------------------
# Rows of a dataset

# How a target enters a prompt: the prompt for (neutral prompt, V, A).
TARGET_FORMS = {"numbers": with_numbers, "words": with_words, "both": with_both}
FORMS = (*TARGET_FORMS, "emotional", "neutral", "full")  # of a row's prompt


@dataclass(frozen=True)
class Row:
    id: str
    image: Path  # with the dataset's folder
    label: str  # one of EMOTIONS
    v: float  # 1..9
    a: float  # 1..9
    neutral: str  # caption without emotion
    emotional: str | None = None  # caption with it: the paper gives test rows none
    labels: str = "true"  # where v and a come from, of LABELS

    def prompt(self, form: str) -> str:
        """A prompt with the target in one of FORMS; without an emotional caption: in words.

        "full" has all that figure 1 gives the generator in training: both captions and numbers.
        """
        if form == "neutral":
            return self.neutral
        if form == "emotional":
            return self.emotional or with_words(self.neutral, self.v, self.a)
        if form == "full":
            emotional = self.prompt("emotional")
            repeats = emotional.startswith(self.neutral)
            text = emotional if repeats else f"{self.neutral}, {emotional}"
            return with_numbers(text, self.v, self.a)
        return TARGET_FORMS[form](self.neutral, self.v, self.a)


def check_caption(key, text):
    """ValueError unless the value of a row's key is a text that models and terminals can take."""
    if not is_plain(text, LONGEST_PROMPT):
        raise ValueError(f"{key!r} is {text!r:.80}, expected a caption: at most {LONGEST_PROMPT:,} "
                         f"characters, without control characters and <|tokens|>")


def check_id(value):
    """The id of a row or case as a text; ValueError unless a picture can be named after it."""
    name = str(value)
    fits = isinstance(value, (str, int)) and is_plain(name, 200) and Path(name).name == name
    if not fits or not name.strip("."):
        raise ValueError(f"the id {value!r:.80} cannot name a file")
    return name


def digest(rows):
    """What tells rows from others, wherever their dataset lies."""
    told = [(row.id, row.label, row.v, row.a, row.neutral, row.emotional) for row in rows]
    return hashlib.sha256(repr(told).encode()).hexdigest()[:16]


def load_rows(folder, split):
    """The rows of a dataset folder's `split`, "train", "validation" or "test", as the dataset
    programs write it or in the layout of parts/imagefolder.py. Raises UserError.

    Without validation rows training evaluates on the test rows.
    """
    def parse(raw):
        raw = imagefolder.own_row(raw, folder, path)
        v, a = check_va(raw["v"], raw["a"])
        labels = raw.get("labels", "true")
        for name, value, known in (("label", raw["label"], LEXICON), ("labels", labels, LABELS)):
            if not isinstance(value, str) or value not in known:
                raise ValueError(f"unknown {name} {value!r:.80}")
        image = Path(raw["image"])
        if image.is_absolute() or ".." in image.parts:
            raise ValueError(f"the picture {raw['image']!r:.80} lies outside of the folder")
        # a missing picture is found now, not in the middle of a training run
        if not (folder / image).is_file():
            raise ValueError(f"no picture {raw['image']!r:.80}")
        check_caption("neutral", raw["neutral"])
        if "emotional" in raw:
            check_caption("emotional", raw["emotional"])
        captions = raw["neutral"], raw.get("emotional")
        return Row(check_id(raw["id"]), folder / image, raw["label"], v, a, *captions, labels)

    folder = Path(folder)
    path = imagefolder.file_of(folder, split)
    if split == "validation" and not path.is_file():
        path = imagefolder.file_of(folder, "test")
    if not path.is_file():
        advice = f"make the miniature's with `python -m tiny.dataset --out {folder}`"
        raise UserError(f"{path}: missing; {kind_of(folder) or advice}; give a dataset folder")
    return parse_lines(path, parse)
