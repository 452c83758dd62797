"""What every method of this folder is asked to draw."""

from dataclasses import dataclass

from PIL import Image


@dataclass(frozen=True)
class Case:
    prompt: str  # what the picture shows
    v: float  # valence that it should have, 1..9
    a: float  # arousal, 1..9
    emotion: str | None = None  # one of the eight classes, for methods that read no numbers
    source: Image.Image | None = None  # the picture that an editor changes
