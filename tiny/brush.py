"""The brush that the miniature world is painted with: colours, shapes in local units, soft lights and mist.

Lengths are fractions of the picture, x right and y down, except inside subjects: there y is up and 1 is their height.
"""

from functools import lru_cache
from math import cos, pi, sin

import numpy as np
from PIL import Image, ImageDraw

Colour = tuple[float, float, float]  # 0..255
ACCENTS = ((222, 62, 52), (242, 142, 40), (232, 76, 132), (48, 112, 206), (126, 72, 190))


def mix(a: Colour, b: Colour, t: float) -> Colour:
    """From colour a (t = 0) to colour b (t = 1)."""
    return tuple(x + (y - x) * t for x, y in zip(a, b))


def shade(colour: Colour, f: float) -> Colour:
    """Darker (f < 1) or lighter (f > 1: towards white)."""
    return tuple(x * f for x in colour) if f <= 1 else mix(colour, (255, 255, 255), f - 1)


def fade(x: float, low: float, high: float) -> float:
    """0 below low, 1 above high, smooth between."""
    t = min(1.0, max(0.0, (x - low) / (high - low)))
    return t * t * (3 - 2 * t)


class Brush:
    """Draws shapes in local units: origin at (x, y) of the picture, y up, unit length `unit`, bent by the wind."""

    def __init__(self, image, x=0.0, y=0.0, unit=1.0, flip=1, up=1, bend=0.0, tilt=0.0, alpha=1.0):
        self.image, self.size = image, image.width
        self.draw = ImageDraw.Draw(image, "RGBA")
        self.unit, self.bend, self.alpha, self.cos, self.sin = unit, bend, alpha, cos(tilt), sin(tilt)
        self.origin = np.array([x, y]) * self.size  # pixels
        self.scale = np.array([flip, -up]) * unit * self.size  # pixels a local unit

    def place(self, points) -> list[float]:
        """Local points -> pixels, as x0, y0, x1, y1, ..."""
        points = np.asarray(points, float)
        if self.bend or self.sin:
            x, y = points.T
            x = x + self.bend * y * np.abs(y)
            points = np.stack([x * self.cos + y * self.sin, y * self.cos - x * self.sin], 1)
        return (points * self.scale + self.origin).ravel().tolist()

    def ink(self, colour: Colour, alpha: float) -> tuple[int, int, int, int]:
        r, g, b = (min(255, max(0, round(c))) for c in colour)
        return r, g, b, round(255 * min(1.0, max(0.0, alpha * self.alpha)))

    def poly(self, points, colour, alpha=1.0):
        if alpha * self.alpha > 0.004:
            self.draw.polygon(self.place(points), fill=self.ink(colour, alpha))

    def curve(self, points, colour, alpha=1.0):
        """The smooth closed outline through the points (Catmull-Rom)."""
        self.poly(smooth(points, closed=True), colour, alpha)

    def oval(self, x, y, rx, ry, colour, alpha=1.0):
        if rx * ry > 0:
            self.poly(CIRCLE * (rx, ry) + (x, y), colour, alpha)

    def box(self, left, bottom, right, top, colour, alpha=1.0):
        self.poly([(left, bottom), (right, bottom), (right, top), (left, top)], colour, alpha)

    def line(self, points, width, colour, alpha=1.0):
        pixels, thick = self.place(points), max(1, round(width * self.unit * self.size))
        if alpha * self.alpha > 0.004:
            joint = "curve" if alpha * self.alpha > 0.9 else None
            self.draw.line(pixels, fill=self.ink(colour, alpha), width=thick, joint=joint)

    def glow(self, x, y, radius, colour, alpha=1.0):
        """A soft round light."""
        (cx, cy), r = self.place([(x, y)]), max(1, round(radius * self.unit * self.size))
        alpha = min(1.0, max(0.0, alpha * self.alpha))
        if alpha > 0.004:
            mask = soft_disc(r).point([round(i * alpha) for i in range(256)])
            self.image.paste(self.ink(colour, 1)[:3], (round(cx) - r, round(cy) - r), mask)


CIRCLE = np.array([(cos(2 * pi * i / 24), sin(2 * pi * i / 24)) for i in range(24)])


def smooth(points, closed=False, steps=5) -> list[list[float]]:
    """Catmull-Rom interpolation through the points: `steps` points for each given one."""
    points = np.asarray(points, float)  # [n, 2]
    padded = np.concatenate([points[-1:], points, points[:2]] if closed else [points[:1], points, points[-1:]])
    a, b, c, d = (padded[k : len(padded) - 3 + k, None] for k in range(4))  # [segments, 1, 2]
    t = np.linspace(0, 1, steps, endpoint=False)[None, :, None]
    curve = 2 * b + (c - a) * t + (2 * a - 5 * b + 4 * c - d) * t * t + (3 * b - a - 3 * c + d) * t**3
    curve = (0.5 * curve).reshape(-1, 2).tolist()
    return curve if closed else curve + [points[-1].tolist()]


@lru_cache(maxsize=256)
def soft_disc(radius: int) -> Image.Image:
    """Mask of a light that falls off smoothly from 255 in the middle to 0 at the radius."""
    y, x = np.mgrid[-1:1:48j, -1:1:48j]
    fall = np.clip(1 - np.hypot(x, y), 0, 1) ** 1.8
    return Image.fromarray((255 * fall).astype(np.uint8)).resize((2 * radius, 2 * radius), Image.BILINEAR)


def veil(image, top, bottom, colour, alpha_top, alpha_bottom, alpha_mid=None):
    """A horizontal band of mist between two heights; its opacity runs from top over the middle to the bottom."""
    size = image.width
    y0, y1 = round(top * size), round(bottom * size)
    stops = (alpha_top, (alpha_top + alpha_bottom) / 2 if alpha_mid is None else alpha_mid, alpha_bottom)
    ramp = np.interp(np.linspace(0, 1, y1 - y0), (0, 0.5, 1), stops)
    mask = Image.fromarray(np.round(255 * np.clip(ramp, 0, 1)).astype(np.uint8)[:, None]).resize((size, y1 - y0))
    image.paste(tuple(round(c) for c in colour), (0, y0), mask)
