"""What a method of baselines/ is asked to draw."""

from dataclasses import dataclass

from PIL import Image


@dataclass(frozen=True)
class Case:
    prompt: str  # what the picture shows, without its emotion
    v: float  # target valence and arousal, 1..9
    a: float
    emotion: str | None = None  # one of the eight classes of data.EMOTIONS
    source: Image.Image | None = None  # the picture to change, for editors
