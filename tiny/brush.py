"""The brush that the miniature world is painted with: colours, shapes in local units, soft lights.

Lengths are fractions of the picture, x right and y down, except inside subjects: there y is up
and 1 is their height.
"""

from functools import lru_cache
from math import cos, pi, sin

import numpy as np
from PIL import Image, ImageDraw

Colour = tuple[float, float, float]  # 0..255
ACCENTS = ((222, 62, 52), (242, 142, 40), (232, 76, 132), (48, 112, 206), (126, 72, 190))
CIRCLE = np.array([(cos(2 * pi * i / 24), sin(2 * pi * i / 24)) for i in range(24)])  # [24, 2]
VISIBLE = 0.004  # an opacity below it rounds to 0 of 255


# --------------------------------------------------------------------------------------------------
# Colours


def mix(a: Colour, b: Colour, t: float) -> Colour:
    """From colour a (t = 0) to colour b (t = 1)."""
    return tuple(x + (y - x) * t for x, y in zip(a, b))


def shade(colour: Colour, f: float) -> Colour:
    """Darker (f < 1) or lighter (f > 1: towards white)."""
    return tuple(x * f for x in colour) if f <= 1 else mix(colour, (255, 255, 255), f - 1)


def clamp(x: float) -> float:
    return min(1.0, max(0.0, x))


def fade(x: float, low: float, high: float) -> float:
    """0 below low, 1 above high, smooth between: nothing in the world is switched on or off."""
    t = clamp((x - low) / (high - low))
    return t * t * (3 - 2 * t)


# --------------------------------------------------------------------------------------------------
# Shapes


class Brush:
    """Draws shapes in local units: origin at `at` in the picture, unit length `unit`.

    flip: 1 or -1, whether x points right or left. up: 1 or -1, whether y points up or down.
    bend: how far the wind bends what is upright. tilt: a rotation in radians. alpha: opacity of
    everything that is drawn.
    """

    def __init__(self, image, at=(0.0, 0.0), unit=1.0, flip=1, up=1, bend=0.0, tilt=0.0, alpha=1.0):
        self.image = image
        self.size = image.width
        self.draw = ImageDraw.Draw(image, "RGBA")
        self.unit = unit
        self.bend = bend
        self.alpha = alpha
        self.cos = cos(tilt)
        self.sin = sin(tilt)
        self.origin = np.array(at) * self.size  # pixels
        self.scale = np.array([flip, -up]) * unit * self.size  # pixels a local unit

    def place(self, points) -> list[float]:
        """Local points [n, 2] -> pixels, as x0, y0, x1, y1, ..."""
        points = np.asarray(points, float)
        if self.bend or self.sin:
            x, y = points.T
            x = x + self.bend * y * np.abs(y)
            turned = (x * self.cos + y * self.sin, y * self.cos - x * self.sin)
            points = np.stack(turned, 1)
        return (points * self.scale + self.origin).ravel().tolist()

    def pixels(self, length: float) -> int:
        """A local length in pixels, at least one."""
        return max(1, round(length * self.unit * self.size))

    def ink(self, colour: Colour, alpha: float) -> tuple[int, int, int, int]:
        r, g, b = (min(255, max(0, round(c))) for c in colour)
        return r, g, b, round(255 * clamp(alpha * self.alpha))

    def poly(self, points, colour, alpha=1.0):
        if alpha * self.alpha > VISIBLE:
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
        if alpha * self.alpha > VISIBLE:
            # Pillow draws round joints twice, which shows where the line is transparent
            joint = "curve" if alpha * self.alpha > 0.9 else None
            self.draw.line(self.place(points), self.ink(colour, alpha), self.pixels(width), joint)

    def glow(self, x, y, radius, colour, alpha=1.0):
        """A soft round light."""
        alpha = clamp(alpha * self.alpha)
        if alpha > VISIBLE:
            centre_x, centre_y = self.place([(x, y)])
            r = self.pixels(radius)
            mask = soft_disc(r).point([round(i * alpha) for i in range(256)])
            corner = (round(centre_x) - r, round(centre_y) - r)
            self.image.paste(self.ink(colour, 1)[:3], corner, mask)


def smooth(points, closed=False, steps=5) -> list[list[float]]:
    """Catmull-Rom interpolation through the points: `steps` points for each given one."""
    points = np.asarray(points, float)  # [n, 2]
    # every segment needs the points before and after it
    ends = (points[-1:], points, points[:2]) if closed else (points[:1], points, points[-1:])
    padded = np.concatenate(ends)
    a, b, c, d = (padded[k : len(padded) - 3 + k, None] for k in range(4))  # [segments, 1, 2]
    t = np.linspace(0, 1, steps, endpoint=False)[None, :, None]
    curve = 2 * b + (c - a) * t + (2 * a - 5 * b + 4 * c - d) * t * t
    curve = curve + (3 * b - a - 3 * c + d) * t**3
    curve = (0.5 * curve).reshape(-1, 2).tolist()  # [segments * steps, 2]
    return curve if closed else curve + [points[-1].tolist()]


@lru_cache(maxsize=256)
def soft_disc(radius: int) -> Image.Image:
    """Mask of a light that falls off smoothly from 255 in the middle to 0 at the radius."""
    y, x = np.mgrid[-1:1:48j, -1:1:48j]
    light = np.clip(1 - np.hypot(x, y), 0, 1) ** 1.8
    mask = Image.fromarray((255 * light).astype(np.uint8))
    return mask.resize((2 * radius, 2 * radius), Image.BILINEAR)


def veil(image, top, bottom, colour, alpha_top, alpha_bottom, alpha_middle=None):
    """A horizontal band of mist between two heights, with its opacity at both and between."""
    size = image.width
    y0 = round(top * size)
    y1 = round(bottom * size)
    if alpha_middle is None:
        alpha_middle = (alpha_top + alpha_bottom) / 2
    stops = (alpha_top, alpha_middle, alpha_bottom)
    ramp = np.interp(np.linspace(0, 1, y1 - y0), (0, 0.5, 1), stops)
    column = np.round(255 * np.clip(ramp, 0, 1)).astype(np.uint8)[:, None]  # [height, 1]
    mask = Image.fromarray(column).resize((size, y1 - y0))
    image.paste(tuple(round(c) for c in colour), (0, y0), mask)
