"""The miniature world: landscapes drawn as a continuous function of valence V and arousal A, and a meter of both.

Every picture is one `Scene` (what and where) under one V-A pair (how it feels). Nothing is switched: weather, light,
water, wind and the subject's bearing fade, grow or bend with V and A. At the end the whole picture is graded to the
mean brightness and saturation that Valdez & Mehrabian (1994) tie to emotion:
    pleasure = 0.69 brightness + 0.22 saturation,   arousal = -0.31 brightness + 0.60 saturation.
`measure_va` reads V and A back from picture statistics alone. It examines generators; it is never a reward.

    python -m tiny.scenes                      # the meter's error on 1,000 held-out scenes
    python -m tiny.scenes --sheet sheet.png    # and a contact sheet
    python -m tiny.scenes --calibrate          # refit the meter's constants

Order of the file: scene and captions, mood, brush, then what is drawn from first (sky) to last (colour grade), meter.
Lengths are fractions of the picture, x right and y down, except inside subjects: there y is up and 1 is their height.
"""

import argparse
import sys
from dataclasses import dataclass
from functools import lru_cache
from math import cos, pi, sin
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that `python tiny/scenes.py` finds data.py
from data import check_va, emotion_words

OVERSAMPLE = 3  # drawn at 3x, then box-filtered: Pillow's shapes have hard edges

# ---------------------------------------------------------------------------------------------- scene and captions

TIMES = {"morning": "in the morning", "noon": "at noon", "evening": "in the evening", "night": "at night"}
PLACES = {  # place -> (words for a subject that stands in it, words for one above it)
    "lake": ("by the lake", "over the lake"),
    "sea": ("on the sea coast", "over the sea"),
    "hills": ("in the hills", "over the hills"),
    "mountains": ("in the mountains", "over the mountains"),
    "desert": ("in the desert", "over the desert"),
    "forest": ("by the forest", "over the forest"),
    "snow": ("in a snowy field", "over a snowy field"),
    "meadow": ("in a meadow", "over a meadow"),
}
AFLOAT = ("sailboat", "swan")  # subjects that need water under them
WATERS = ("lake", "sea")


@dataclass(frozen=True)
class Scene:
    """What is in a picture and where; nothing of how it feels."""

    subject: str
    place: str
    time: str
    accent: int  # index into ACCENTS: the colour of roofs, sails, coats, flowers
    x: float  # centre of the subject, 0.36..0.64
    height: float  # of the subject, about 0.42
    flip: int  # 1 or -1: which way the subject faces; the wind blows the same way
    horizon: float  # y of the horizon, about 0.6
    light_x: float  # x of the sun or moon
    phase: float  # shifts the ridges and waves, 0..2 pi
    seed: int  # scatters clouds, flowers, rain
    template: int  # form of the caption's sentence


def random_scene(rng: np.random.Generator) -> Scene:
    """A scene drawn uniformly over subjects, then over the places where the subject can be."""
    subject = str(rng.choice(list(SUBJECTS)))
    place = str(rng.choice(WATERS if subject in AFLOAT else list(PLACES)))
    x = float(rng.uniform(0.38, 0.62))
    side = 1 if x < 0.5 else -1  # the light stands on the emptier side
    return Scene(
        subject=subject,
        place=place,
        time=str(rng.choice(list(TIMES))),
        accent=int(rng.integers(len(ACCENTS))),
        x=x,
        height=float(rng.uniform(0.42, 0.5)),
        flip=int(rng.choice((-1, 1))),
        horizon=float(rng.uniform(0.58, 0.63)),
        light_x=0.5 + side * float(rng.uniform(0.2, 0.3)),
        phase=float(rng.uniform(0, 2 * pi)),
        seed=int(rng.integers(1 << 16)),
        template=int(rng.integers(4)),
    )


def content_words(scene: Scene) -> tuple[str, str, str]:
    """(subject with its article, place phrase, time phrase)."""
    above = scene.subject == "balloon"
    place = PLACES[scene.place][above]
    if scene.subject in AFLOAT:
        place = {"lake": "on the lake", "sea": "on the sea"}[scene.place]
    return NAMES[scene.subject], place, TIMES[scene.time]


def neutral_caption(scene: Scene) -> str:
    """5 to 12 words naming subject, place and time of day, and no mood."""
    subject, place, time = content_words(scene)
    return (
        f"{subject} {place} {time}",
        f"{time}, {subject} {place}",
        f"{place}, {subject} {time}",
        f"{subject} {time}, {place}",
    )[scene.template]


def emotional_caption(scene: Scene, v: float, a: float, rng: np.random.Generator | None = None) -> str:
    """The neutral caption, the graded words of (v, a) and, at random, one thing that the mood puts in the picture."""
    parts = [neutral_caption(scene), emotion_words(v, a, rng)]
    seen = facts(scene, v, a)
    if rng is not None and rng.random() < 0.6:
        parts.append(seen[str(rng.choice(("weather", "light", "colour", "motion")))])
    return ", ".join(parts)


def facts(scene: Scene, v: float, a: float) -> dict[str, str]:
    """What is in the picture, in words: subject, place, time, weather, light, colour, motion."""
    v, a = check_va(v, a)
    row, column = min(2, int((v - 1) * 3 / 8)), min(2, int((a - 1) * 3 / 8))
    snowy = scene.place == "snow"
    storm = "a snowstorm" if snowy else "a thunderstorm with lightning"
    rain = "falling snow" if snowy else "rain"
    weather = (("fog and low clouds", f"dark clouds and {rain}", storm),
               ("thin haze", "scattered clouds", "windy clouds"),
               ("clear and hazy air", "clear sky with small clouds", "clear sky with sparkles"))[row][column]
    light = (("dim light", "gloomy light", "dark light with flashes"),
             ("pale light", "plain light", "hard light"),
             ("soft glowing light", "warm bright light", "radiant light"))[row][column]
    colour = (("grey faded colours", "cold dark colours", "dark purple and blue colours"),
              ("soft dull colours", "natural colours", "deep strong colours"),
              ("pastel colours", "fresh warm colours", "vivid saturated colours"))[row][column]
    water = scene.place in WATERS
    motion = (("water like a mirror", "gentle ripples on the water", "big waves") if water else
              ("everything still", "a light breeze", "strong wind bending everything"))[column]
    subject, place, time = content_words(scene)
    return {"subject": subject, "place": place, "time": time, "weather": weather, "light": light, "colour": colour,
            "motion": motion}


# ------------------------------------------------------------------------------------------------------------- mood

Colour = tuple[float, float, float]  # 0..255

# time -> corner of the V-A square -> (top of the sky, horizon)
SKIES = {
    "morning": {"gloom": ((110, 120, 138), (184, 184, 190)), "storm": ((38, 44, 82), (128, 108, 138)),
                "serene": ((164, 204, 240), (255, 222, 206)), "joy": ((48, 146, 244), (255, 206, 120))},
    "noon": {"gloom": ((116, 128, 140), (184, 190, 194)), "storm": ((28, 42, 72), (104, 120, 148)),
             "serene": ((142, 206, 240), (246, 244, 226)), "joy": ((14, 126, 240), (140, 222, 250))},
    "evening": {"gloom": ((94, 96, 118), (158, 148, 160)), "storm": ((42, 28, 68), (150, 88, 90)),
                "serene": ((164, 158, 216), (255, 198, 164)), "joy": ((112, 60, 190), (255, 142, 56))},
    "night": {"gloom": ((58, 66, 92), (118, 126, 146)), "storm": ((16, 14, 52), (64, 52, 124)),
              "serene": ((88, 108, 186), (186, 190, 232)), "joy": ((44, 44, 168), (140, 110, 240))},
}
TINTS = {"morning": (255, 238, 224), "noon": (255, 255, 250), "evening": (255, 222, 208), "night": (168, 178, 232)}
GROUNDS = {  # place -> (near ground, far ground)
    "lake": ((104, 156, 84), (96, 140, 110)), "sea": ((226, 200, 152), (120, 140, 160)),
    "hills": ((112, 168, 76), (96, 146, 92)), "mountains": ((104, 148, 88), (124, 130, 158)),
    "desert": ((236, 188, 112), (222, 160, 104)), "forest": ((84, 136, 70), (54, 104, 76)),
    "snow": ((238, 242, 250), (190, 206, 230)), "meadow": ((138, 186, 76), (120, 164, 84)),
}
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


@dataclass(frozen=True)
class Mood:
    """A scene's V-A pair as the numbers that the drawing functions use; all in 0..1 unless said."""

    p: float  # pleasantness: V scaled
    e: float  # energy: A scaled
    gloom: float  # the four bilinear corner weights, sum 1
    storm: float
    serene: float
    joy: float
    night: float
    wind: float  # sideways bend of upright things
    sky: Colour  # top of the sky
    haze: Colour  # horizon; distant things fade to it
    tint: Colour  # colour of the light
    accent: Colour

    def lit(self, colour: Colour, far: float = 0.0) -> Colour:
        """A surface of this colour under the scene's light, faded by the air at distance far in 0..1."""
        colour = tuple(c * t / 255 for c, t in zip(colour, self.tint))
        colour = mix(colour, shade(mix(self.sky, self.haze, 0.4), 0.62), 0.4 * (1 - self.p) ** 1.3)
        colour = mix(colour, (255, 250, 236), 0.22 * self.serene)
        return mix(colour, self.haze, far)


def mood_of(scene: Scene, v: float, a: float) -> Mood:
    p, e = (v - 1) / 8, (a - 1) / 8
    corner = {"gloom": (1 - p) * (1 - e), "storm": (1 - p) * e, "serene": p * (1 - e), "joy": p * e}
    sky = SKIES[scene.time]
    top, low = (tuple(sum(w * sky[c][i][k] for c, w in corner.items()) for k in range(3)) for i in range(2))
    tint = mix(mix((196, 212, 240), TINTS[scene.time], fade(p, 0, 0.6)), (255, 248, 228), 0.4 * p)
    return Mood(p, e, **corner, night=float(scene.time == "night"), wind=0.02 + 0.4 * e**1.5 * (1 - 0.5 * p),
                sky=top, haze=low, tint=tint, accent=ACCENTS[scene.accent])


# ------------------------------------------------------------------------------------------------------------ brush


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


# -------------------------------------------------------------------------------------------------------------- sky


def paint_sky(size: int, scene: Scene, mood: Mood) -> Image.Image:
    """Gradient from the top of the sky to the horizon."""
    t = np.clip(np.linspace(0, 1, size) / scene.horizon, 0, 1)[:, None] ** 1.15
    column = np.array(mood.sky) * (1 - t) + np.array(mood.haze) * t  # [size, 3]
    return Image.fromarray(np.round(column).astype(np.uint8)[:, None]).resize((size, size))


def paint_light(image, scene: Scene, mood: Mood):
    """Stars, sun or moon with its glow, rays, rainbow or northern lights."""
    sky = Brush(image, up=-1)
    x, y = scene.light_x, scene.horizon - {"morning": 0.2, "noon": 0.42, "evening": 0.09, "night": 0.4}[scene.time]
    clear = fade(mood.p, 0.05, 0.7)
    rng = np.random.default_rng(scene.seed)
    for sx, sy, r in rng.uniform((0, 0, 0.005), (1, 0.42, 0.010), (16, 3)) if mood.night else ():
        spark(sky, sx, sy, r * (1 + mood.joy), (255, 250, 225), clear * (0.5 + 0.5 * mood.e))
    if mood.night:
        northern_lights(sky, scene, mood)
    else:
        rainbow(sky, scene, mood)
    warm = mix((255, 250, 214), (255, 176, 84), {"morning": 0.35, "noon": 0.0, "evening": 0.85, "night": 0}[scene.time])
    for k in range(12):  # rays
        angle = 2 * pi * k / 12 + scene.phase
        points = [(x, y)] + [(x + 0.8 * cos(angle + d), y + 0.8 * sin(angle + d)) for d in (-0.09, 0.09)]
        sky.poly(points, warm, (0.34 - 0.16 * mood.night) * fade(mood.joy, 0.12, 0.75))
    sky.glow(x, y, 0.26 + 0.2 * mood.p, warm, 0.15 + 0.7 * clear)
    radius = 0.058 + 0.02 * mood.p
    disc = mix(mood.haze, shade(warm, 1.4), 0.25 + 0.75 * clear)
    if mood.night:  # a crescent
        arc = [(x + radius * sin(t), y - radius * cos(t)) for t in np.linspace(0, pi, 13)]
        arc += [(x + 0.35 * radius * sin(t), y - radius * cos(t)) for t in np.linspace(pi, 0, 13)]
        tipped = [(x + (px - x) * 1.15 - (py - y) * 0.3, py + (px - x) * 0.3) for px, py in arc]
        sky.poly(tipped, disc, 0.4 + 0.6 * clear)
    else:
        sky.oval(x, y, radius, radius, disc, 0.35 + 0.65 * clear)


def spark(brush, x, y, r, colour, alpha):
    """A four-pointed star."""
    radii = (r, 0.35 * r) * 4
    brush.poly([(x + q * cos(pi * k / 4), y + q * sin(pi * k / 4)) for k, q in enumerate(radii)], colour, alpha)


def rainbow(sky, scene: Scene, mood: Mood):
    alpha = 0.5 * fade(mood.p, 0.6, 1.0) * (0.35 + 0.65 * mood.e)
    centre = 1 - scene.light_x
    for k, colour in enumerate(((240, 80, 80), (250, 170, 60), (250, 230, 90), (90, 200, 120), (90, 140, 240))):
        r, w = 0.50 - 0.022 * k, 0.022
        ring = [(centre + (r - d) * cos(t), scene.horizon + 0.06 - (r - d) * sin(t))
                for d, ts in ((0, np.linspace(0, pi, 25)), (w, np.linspace(pi, 0, 25))) for t in ts]
        sky.poly(ring, colour, alpha)


def northern_lights(sky, scene: Scene, mood: Mood):
    for k, colour in enumerate(((90, 240, 190), (150, 120, 255), (250, 120, 220))):
        xs = np.linspace(-0.05, 1.05, 15)
        low = 0.34 - 0.08 * k + 0.05 * np.sin(xs * 5 + scene.phase + 0.7 * k)
        tall = 0.10 + 0.1 * mood.e
        sky.poly([*zip(xs, low), *zip(xs[::-1], low[::-1] - tall)], colour, 0.42 * fade(mood.joy, 0.1, 0.8))


def paint_clouds(image, scene: Scene, mood: Mood):
    """A dark bank that sinks from the top as V falls, and single clouds: small and white, or large and grey."""
    sky = Brush(image, up=-1)
    rng = np.random.default_rng(scene.seed + 1)
    grey = shade(mix(mood.sky, mood.haze, 0.25), 0.94 - 0.42 * mood.storm)
    white = mix(mood.haze, (255, 255, 255), 0.75)
    body = mix(grey, white, fade(mood.p, 0.15, 0.75))
    drift = 0.05 * mood.e * scene.flip
    for cx, cy, r in rng.uniform((0.0, 0.08, 0.05), (1.0, 0.36, 0.075), (4, 3)):
        r = r * (1.75 - 0.9 * mood.p)
        for dx, dy, k in ((-1.2, 0.15, 0.7), (-0.4, -0.3, 1.0), (0.6, -0.1, 0.85), (1.4, 0.25, 0.6)):
            stretch = 1.35 - 0.35 * mood.e  # calm clouds are flat
            sky.oval(cx + drift + dx * r * stretch, cy + dy * r, k * r * stretch, k * r * 0.62 / stretch, body, 0.85)
    sink = 0.30 * fade(1 - mood.p, 0.42, 1.0)
    for row, depth in ((0, 1.0), (1, 0.62)):
        colour = shade(grey, 1 - (0.12 + 0.2 * mood.e) * row)
        bumps = [(-0.05, -0.1)]
        for x in np.linspace(-0.05, 1.05, 45):
            wave = abs(sin(x * (7 + 2 * row) + scene.phase + row)) + 0.5 * abs(sin(x * 17 + scene.phase))
            bumps.append((x, (sink * depth - 0.02) * (0.62 + 0.38 * wave) - 0.06 * (1 - fade(1 - mood.p, 0.45, 0.75))))
        sky.poly(bumps + [(1.05, -0.1)], colour, 0.92)


# ------------------------------------------------------------------------------------------------------------- land


def ridge(image, base, height, scene: Scene, shift, jag, colour, waves=1.0, bottom=1.0):
    """One layer of hills down to `bottom`: rolling where jag = 0, peaked where jag = 1."""
    xs = np.linspace(-0.02, 1.02, 61)
    t = xs * 2 * pi * waves + scene.phase + shift
    roll = 0.5 + 0.34 * np.sin(t) + 0.16 * np.sin(2.3 * t + shift)
    peak = (0.75 * np.abs(np.arcsin(np.sin(1.4 * t + shift))) + 0.25 * np.abs(np.arcsin(np.sin(3.1 * t)))) / (pi / 2)
    y = base - height * (roll * (1 - jag) + peak * jag)
    Brush(image, up=-1).poly([*zip(xs, y), (1.02, bottom), (-0.02, bottom)], colour)
    return xs, y


def paint_land(image, scene: Scene, mood: Mood):
    """Distant ridges, mist between them, and the ground up to the subject."""
    near, far = (mix(ground, (92, 102, 124), 0.45 * (1 - mood.p)) for ground in GROUNDS[scene.place])
    h, jag = scene.horizon, 0.75 * mood.e**1.3
    if scene.place == "mountains":
        xs, y = ridge(image, h + 0.02, 0.38, scene, 0.0, 0.6 + 0.4 * mood.e, mood.lit(shade(far, 0.7), 0.12), 1.1)
        snow_caps(image, xs, y, h - 0.2, mood)
        veil(image, h - 0.1, h + 0.04, mood.haze, 0, 0.5)
        ridge(image, h + 0.04, 0.16, scene, 2.0, jag, mood.lit(mix(far, near, 0.4), 0.25), 1.3)
    elif scene.place == "sea":
        ridge(image, h + 0.01, 0.07, scene, 1.0, jag, mood.lit(far, 0.55), 0.7)
    elif scene.place == "desert":
        ridge(image, h, 0.12, scene, 0.5, jag * 0.7, mood.lit(far, 0.5), 0.8)
        ridge(image, h + 0.07, 0.12, scene, 2.4, jag * 0.6, mood.lit(shade(far, 0.9), 0.18), 0.9)
    else:
        ridge(image, h + 0.01, 0.17, scene, 0.0, jag, mood.lit(mix(far, (110, 130, 190), 0.5), 0.5), 0.8)
        veil(image, h - 0.12, h + 0.03, mood.haze, 0, 0.45)
        ridge(image, h + 0.05, 0.13, scene, 2.2, jag, mood.lit(far, 0.22), 1.1)
    if scene.place == "forest":
        conifers(image, scene, mood, h + 0.06, 11, 0.26, 0.16)
    if scene.place in ("snow", "meadow"):
        conifers(image, scene, mood, h + 0.05, 5, 0.12, 0.3)
    mist = 0.8 * fade(mood.gloom, 0.1, 0.85) + 0.35 * fade(mood.serene, 0.2, 0.9)
    veil(image, h - 0.16, h + 0.10, mix(mood.haze, (255, 255, 255), 0.25), 0, 0, mist)
    if scene.place in WATERS:
        paint_water(image, scene, mood)
    else:
        ridge(image, h + 0.12, 0.09, scene, 4.0, 0.35 * jag, mood.lit(mix(near, far, 0.3), 0.06), 0.7)
        ridge(image, 0.86, 0.09, scene, 5.2, 0.25 * jag, mood.lit(near), 0.5)
        ridge(image, 1.0, 0.08, scene, 1.2, 0.25 * jag, mood.lit(shade(near, 0.86)), 0.6)


def snow_caps(image, xs, y, line, mood: Mood):
    """White where a mountain rises above the line."""
    white, brush = mood.lit((250, 252, 255), 0.15), Brush(image, up=-1)
    edge = np.maximum(y, np.minimum(line, y + 0.05 + 0.02 * np.abs(np.sin(xs * 40))))
    brush.poly([*zip(xs, y), *zip(xs[::-1], edge[::-1])], white)


def conifers(image, scene: Scene, mood: Mood, base, count, height, far):
    """A row of fir trees; they lean with the wind."""
    rng = np.random.default_rng(scene.seed + 2)
    white = scene.place == "snow"
    for k in range(count):
        x = (k + 0.5 + rng.uniform(-0.3, 0.3)) / count
        unit = height * rng.uniform(0.75, 1.1)
        fir = Brush(image, x, base + 0.01, unit, scene.flip, bend=0.6 * mood.wind)
        green = mood.lit(mix((44, 92, 70), (226, 236, 246), 0.25 * white), far + 0.12 * (k % 2))
        fir.box(-0.03, 0, 0.03, 0.2, shade(green, 0.6))
        for low, top, half in ((0.1, 0.55, 0.27), (0.34, 0.78, 0.21), (0.58, 1.0, 0.15)):
            fir.poly([(-half, low), (half, low), (0, top)], green)
            fir.poly([(0, low), (half, low), (0, top)], shade(green, 0.84))
            if white:
                fir.poly([(-half * 0.45, (low + top * 1.2) / 2.2), (half * 0.45, (low + top * 1.2) / 2.2), (0, top)],
                         mood.lit((246, 250, 255), far))


def paint_water(image, scene: Scene, mood: Mood):
    """A mirror of the sky and land, broken by layered waves that rise with A."""
    size, h = image.width, scene.horizon + (0.0 if scene.place == "sea" else 0.03)
    top = round(h * size)
    deep = mood.lit(mix((40, 120, 170), (24, 70, 150), mood.e))
    water = image.crop((0, max(0, 2 * top - size), size, top)).transpose(Image.FLIP_TOP_BOTTOM)
    water = Image.blend(water, Image.new("RGB", water.size, tuple(round(c) for c in deep)), 0.25 + 0.45 * mood.e)
    image.paste(water, (0, top))
    brush = Brush(image, up=-1)
    light = mix(mood.haze, (255, 255, 255), 0.3)
    for k in range(6):  # the light's path
        y = h + 0.02 + 0.055 * k
        brush.oval(scene.light_x, y, 0.03 + 0.016 * k, 0.006 + 0.003 * mood.e, light, 0.7 * fade(mood.p, 0.1, 0.8))
    for k in range(5):  # wave layers, far to near
        depth = k / 4
        y0, amplitude = h + 0.035 + 0.085 * k, (0.002 + 0.055 * mood.e**1.4) * (0.35 + depth)
        xs = np.linspace(-0.02, 1.02, 81)
        t = np.abs(np.sin(xs * (15 - 8 * depth) + scene.phase * (k + 1) + k))
        y = y0 - amplitude * (1 - t) ** (1 + 0.5 * mood.e) * 1.6
        colour = mix(mix(deep, mood.haze, 0.45 - 0.4 * depth), (255, 255, 255), 0.06 * (k % 2))
        brush.poly([*zip(xs, y), (1.02, 1.0), (-0.02, 1.0)], colour, 0.10 + 0.8 * fade(mood.e, 0.05, 0.7))
        brush.line(list(zip(xs, y)), 0.006 + 0.006 * mood.e, mix(mood.haze, (255, 255, 255), 0.7), 0.12 + 0.5 * mood.e)


def on_bank(scene: Scene) -> bool:
    return scene.place in WATERS and scene.subject not in (*AFLOAT, "balloon")


def paint_bank(image, scene: Scene, mood: Mood):
    """The shore on which a subject stands at a lake or the sea."""
    near = mix(GROUNDS[scene.place][0], (92, 102, 124), 0.45 * (1 - mood.p))
    xs = np.linspace(-0.02, 1.02, 41)
    for rise, colour in ((0.0, mood.lit(shade(near, 1.12))), (0.035, mood.lit(shade(near, 0.9)))):
        y = 0.96 + rise - 0.15 * np.exp(-(((xs - scene.x) / 0.36) ** 4)) - 0.02 * np.sin(xs * 5 + scene.phase)
        Brush(image, up=-1).poly([*zip(xs, y), (1.02, 1.01), (-0.02, 1.01)], colour)


# --------------------------------------------------------------------------------------------------------- subjects
# Each draws in a brush whose origin is the middle of the subject's foot, y up, 1 = its height, facing +x.


def draw_tree(b: Brush, m: Mood, scene: Scene):
    bark, leaf = m.lit((104, 72, 56)), fade(m.p, 0.08, 0.6)
    b.poly([(-0.1, 0), (0.1, 0), (0.055, 0.2), (0.04, 0.62), (-0.04, 0.62), (-0.055, 0.2)], bark)
    for x0, y0, x1, y1, x2, y2 in ((0, 0.3, -0.2, 0.5, -0.34, 0.7), (0, 0.36, 0.2, 0.54, 0.36, 0.72),
                                   (0, 0.5, -0.1, 0.72, -0.16, 0.94), (0, 0.5, 0.1, 0.72, 0.15, 0.98),
                                   (-0.2, 0.5, -0.32, 0.54, -0.44, 0.56), (0.2, 0.54, 0.32, 0.56, 0.45, 0.54)):
        b.line([(x0, y0), (x1, y1), (x2, y2)], 0.045, bark)
    green = mix((120, 118, 70), (72, 160, 62), fade(m.p, 0.3, 0.7))
    for x, y, r, f in ((-0.26, 0.56, 0.2, 0.8), (0.26, 0.56, 0.2, 0.72), (0, 0.6, 0.26, 0.8), (-0.2, 0.72, 0.2, 1.0),
                       (0.2, 0.73, 0.2, 0.9), (0, 0.84, 0.22, 1.08), (-0.08, 0.68, 0.14, 1.15)):
        b.oval(x, y, r * leaf**0.5, r * leaf**0.5, m.lit(shade(green, f)), min(1.0, 1.6 * leaf))
    for k in range(9):
        x, y = 0.36 * cos(2.4 * k) * (k / 9) ** 0.5, 0.68 + 0.28 * sin(2.4 * k) * (k / 9) ** 0.5
        b.oval(x, y, 0.045, 0.045, shade(m.accent, 1.25), fade(m.p, 0.55, 0.9))


def window(b: Brush, m: Mood, x, y, w, h):
    """Dark where V is low, lit where it is high."""
    lit = fade(m.p, 0.2, 0.75)
    glass = mix(m.lit((52, 56, 74)), (255, 226, 128), lit)
    b.glow(x, y + h / 2, 1.8 * h, (255, 220, 120), 0.5 * lit * (0.4 + 0.6 * m.night))
    b.box(x - w / 2, y, x + w / 2, y + h, glass)


def draw_cottage(b: Brush, m: Mood, scene: Scene):
    wall, roof = m.lit((246, 232, 206)), m.lit(m.accent)
    b.box(0.2, 0.6, 0.32, 0.98, m.lit((150, 104, 92)))
    for k in range(3):  # smoke
        b.oval(0.28 + 0.06 * k + 0.25 * m.wind * k, 1.03 + 0.08 * k, 0.06 + 0.03 * k, 0.05 + 0.02 * k,
               mix(m.haze, (255, 255, 255), 0.5), 0.55 - 0.13 * k)
    b.box(-0.5, 0, 0.5, 0.48, wall)
    b.box(0.18, 0, 0.5, 0.48, shade(wall, 0.84))
    b.poly([(-0.62, 0.44), (0.62, 0.44), (0.36, 0.88), (-0.36, 0.88)], roof)
    b.poly([(0.12, 0.44), (0.62, 0.44), (0.36, 0.88), (0.12, 0.88)], shade(roof, 0.82))
    b.box(-0.1, 0, 0.12, 0.32, m.lit((122, 78, 54)))
    window(b, m, -0.3, 0.14, 0.2, 0.2)
    window(b, m, 0.33, 0.14, 0.2, 0.2)


def draw_sailboat(b: Brush, m: Mood, scene: Scene):
    sail, hull = m.lit((252, 248, 238)), m.lit(m.accent)
    b.box(-0.015, 0.1, 0.015, 0.98, m.lit((96, 70, 58)))
    belly = 0.05 + 0.16 * m.e
    b.poly(smooth([(0.03, 0.96), (0.24 + belly, 0.5), (0.42 + 0.3 * belly, 0.2)]) + [(0.03, 0.2)], sail)
    b.poly(smooth([(0.03, 0.96), (0.14 + belly, 0.5), (0.2 + 0.3 * belly, 0.2)]) + [(0.03, 0.2)], shade(sail, 0.9))
    b.poly(smooth([(-0.03, 0.9), (-0.14, 0.5), (-0.34, 0.2)]) + [(-0.03, 0.2)], mix(sail, hull, 0.75))
    b.poly([(-0.44, 0.13), (0.5, 0.13), (0.34, -0.06), (-0.3, -0.06)], hull)
    b.poly([(-0.44, 0.13), (0.5, 0.13), (0.465, 0.085), (-0.41, 0.085)], shade(hull, 1.55))
    b.poly([(0.0, -0.06), (0.34, -0.06), (0.465, 0.085), (0.1, 0.085)], shade(hull, 0.8))


def draw_lighthouse(b: Brush, m: Mood, scene: Scene):
    white, red = m.lit((250, 246, 240)), m.lit(m.accent)
    beam = 0.2 + 0.45 * fade(m.p, 0.2, 0.9) * (0.5 + 0.5 * m.night)
    for side in (-1, 1):
        b.poly([(0, 0.86), (side * 1.2, 1.0), (side * 1.2, 0.74)], (255, 240, 170), beam * 0.7)
    b.curve([(-0.34, -0.02), (-0.26, 0.1), (-0.05, 0.13), (0.2, 0.12), (0.34, -0.02)], m.lit((112, 104, 108)))

    def width(y):
        return 0.17 - 0.075 * y

    for k in range(5):
        y0, y1 = 0.08 + 0.14 * k, 0.08 + 0.14 * (k + 1)
        colour = red if k % 2 else white
        b.poly([(-width(y0), y0), (width(y0), y0), (width(y1), y1), (-width(y1), y1)], colour)
        b.poly([(0.03, y0), (width(y0), y0), (width(y1), y1), (0.03, y1)], shade(colour, 0.84))
    b.box(-0.16, 0.77, 0.16, 0.805, m.lit((70, 66, 80)))
    b.glow(0, 0.86, 0.3, (255, 236, 150), beam)
    b.box(-0.085, 0.805, 0.085, 0.91, mix(m.lit((80, 84, 100)), (255, 240, 170), fade(m.p, 0.0, 0.6)))
    b.poly([(-0.12, 0.91), (0.12, 0.91), (0.0, 1.02)], red)


def draw_windmill(b: Brush, m: Mood, scene: Scene):
    wall, cap = m.lit((244, 230, 208)), m.lit(m.accent)
    b.poly([(-0.24, 0), (0.24, 0), (0.14, 0.62), (-0.14, 0.62)], wall)
    b.poly([(0.05, 0), (0.24, 0), (0.14, 0.62), (0.05, 0.62)], shade(wall, 0.84))
    b.poly(smooth([(-0.19, 0.6), (-0.13, 0.74), (0, 0.8), (0.13, 0.74), (0.19, 0.6)]), cap)
    b.box(-0.07, 0, 0.07, 0.18, m.lit((116, 76, 56)))
    window(b, m, 0, 0.32, 0.11, 0.13)
    for k in range(4):
        t = pi / 4 + pi / 2 * k + 0.5 * m.e
        c, s = cos(t), sin(t)
        blade = [(r * c - q * s, 0.66 + r * s + q * c) for r, q in ((0.1, 0.0), (0.46, 0.0), (0.46, 0.12), (0.1, 0.09))]
        b.poly(blade, m.lit((252, 246, 236)))
        b.line([(0, 0.66), blade[1]], 0.03, m.lit((96, 68, 54)))
    b.oval(0, 0.66, 0.045, 0.045, m.lit((80, 60, 54)))


def draw_horse(b: Brush, m: Mood, scene: Scene):
    coat = m.lit(((150, 88, 52), (196, 140, 84), (92, 66, 60), (238, 230, 220), (70, 60, 72))[scene.accent])
    dark, mane = shade(coat, 0.74), shade(coat, 0.5)
    stride = 0.02 + 0.11 * m.e
    legs = ((0.2, stride, dark), (-0.24, -stride, dark), (0.26, -0.6 * stride, coat), (-0.3, 0.7 * stride, coat))
    for x, dx, c in legs:
        b.poly([(x - 0.06, 0.5), (x + 0.06, 0.5), (x + 0.03 + dx * 0.4, 0.24), (x + 0.035 + dx, 0.0),
                (x - 0.04 + dx, 0.0), (x - 0.03 + dx * 0.4, 0.24)], c)
    lift = 0.4 * m.e
    b.curve([(-0.36, 0.62), (-0.45 - 0.1 * lift, 0.62 + 0.2 * lift), (-0.52 - 0.3 * lift, 0.4 + 0.4 * lift),
             (-0.49 - 0.3 * lift, 0.2 + 0.5 * lift), (-0.43 - 0.2 * lift, 0.36 + 0.4 * lift)], mane)
    b.curve([(-0.38, 0.6), (-0.26, 0.69), (0.0, 0.64), (0.22, 0.69), (0.34, 0.6), (0.3, 0.42), (0.05, 0.37),
             (-0.2, 0.4), (-0.37, 0.44)], coat)
    t = -0.95 + 1.15 * fade(m.p, 0.0, 0.8) + 0.1 * m.e  # the neck's angle: bowed to raised

    def turn(points):
        return [(0.24 + x * cos(t) - y * sin(t), 0.58 + x * sin(t) + y * cos(t)) for x, y in points]

    neck = [(-0.16, 0.04), (-0.06, 0.24), (0.05, 0.42), (0.14, 0.44), (0.17, 0.34), (0.12, 0.1), (0.08, -0.14)]
    head = [(0.03, 0.44), (0.12, 0.47), (0.26, 0.34), (0.35, 0.24), (0.33, 0.17), (0.25, 0.18), (0.1, 0.3)]
    b.curve(turn(neck), coat)
    b.curve(turn([(-0.17, 0.06), (-0.1, 0.3), (0.04, 0.46), (0.06, 0.4), (-0.02, 0.22)]), mane)
    b.curve(turn(head), coat)
    b.poly(turn([(0.04, 0.43), (0.06, 0.54), (0.11, 0.45)]), coat)


def draw_person(b: Brush, m: Mood, scene: Scene):
    coat, skin = m.lit(ACCENTS[(scene.accent + 3) % 5]), m.lit((244, 200, 170))
    bow = 0.09 * (1 - fade(m.p, 0.0, 0.7))
    for x in (-0.07, 0.06):
        b.box(x - 0.035, 0, x + 0.035, 0.24, m.lit((58, 54, 74)))
        b.box(x - 0.035, 0, x + 0.07, 0.04, m.lit((50, 40, 44)))
    b.poly(smooth([(-0.17, 0.2), (-0.14, 0.42), (-0.09 + bow, 0.6), (0.0 + bow, 0.63 - 0.3 * bow), (0.09 + bow, 0.6),
                   (0.14, 0.42), (0.17, 0.2)]), coat)
    b.poly([(0.03, 0.2), (0.17, 0.2), (0.14, 0.42), (0.09 + bow, 0.58), (0.03 + bow, 0.58)], shade(coat, 0.82))
    hx, hy = 0.01 + 1.5 * bow, 0.69 - 0.6 * bow  # the head
    b.oval(hx, hy, 0.085, 0.09, skin)
    b.poly(smooth([(hx - 0.1, hy - 0.05), (hx - 0.1, hy + 0.07), (hx, hy + 0.11), (hx + 0.09, hy + 0.06),
                   (hx - 0.03, hy + 0.03)]), m.lit((92, 60, 44)))
    b.line([(0.15, 0.42), (0.15, 0.9)], 0.025, m.lit((70, 60, 66)))
    b.line([(0.07, 0.54), (0.15, 0.46)], 0.07, shade(coat, 0.9))
    top = 0.93 - 0.5 * bow
    for left, right, f in ((-0.3, -0.02, 1.0), (-0.02, 0.24, 1.25), (0.24, 0.48, 0.82)):
        b.poly(smooth([(left, top - 0.17), (left * 0.72 + 0.03, top), (0.09, top + 0.1), (right * 0.72 + 0.03, top),
                       (right, top - 0.17), ((left + right) / 2, top - 0.12)]), m.lit(shade(m.accent, f)))


def draw_swan(b: Brush, m: Mood, scene: Scene):
    white = m.lit((254, 254, 252))
    grey, bow = shade(white, 0.86), 1 - fade(m.p, 0.05, 0.8)
    lift = 0.16 * m.e
    b.curve([(-0.52, 0.3 + lift), (-0.3, 0.4), (0.1, 0.36), (0.33, 0.22), (0.36, 0.04), (0.2, -0.06), (-0.2, -0.06),
             (-0.42, 0.06)], white)
    b.curve([(-0.54, 0.34 + 1.3 * lift), (-0.32, 0.48 + 1.8 * lift), (0.0, 0.38), (0.1, 0.2), (-0.1, 0.1),
             (-0.34, 0.16)], grey)
    b.curve([(-0.5, 0.38 + 1.6 * lift), (-0.3, 0.52 + 2.2 * lift), (0.04, 0.36), (-0.08, 0.22), (-0.32, 0.28)], white)
    hx, hy = 0.42 + 0.12 * bow, 0.9 - 0.42 * bow
    neck = [(0.24, 0.12), (0.36, 0.3), (0.28, 0.5 - 0.08 * bow), (0.26, 0.7 - 0.24 * bow), (0.34, hy + 0.02), (hx, hy)]
    b.line(smooth(neck), 0.105, white)
    b.oval(hx, hy, 0.085, 0.07, white)
    b.poly([(hx + 0.05, hy + 0.03), (hx + 0.21, hy - 0.06), (hx + 0.05, hy - 0.05)], m.lit((244, 140, 40)))
    b.oval(hx + 0.03, hy + 0.015, 0.016, 0.016, m.lit((30, 30, 40)))


def draw_castle(b: Brush, m: Mood, scene: Scene):
    stone, roof = m.lit((206, 196, 190)), m.lit(m.accent)
    for x, half, top in ((0, 0.14, 0.66), (-0.36, 0.1, 0.52), (0.36, 0.1, 0.52)):
        b.box(x - half, 0, x + half, top, stone)
        b.box(x + 0.2 * half, 0, x + half, top, shade(stone, 0.84))
        b.poly([(x - 1.3 * half, top), (x + 1.3 * half, top), (x, top + 2.3 * half)], roof)
        b.poly([(x + 0.1 * half, top), (x + 1.3 * half, top), (x, top + 2.3 * half)], shade(roof, 0.8))
        flag = 0.03 + 0.12 * m.e
        b.line([(x, top + 2.2 * half), (x, top + 2.2 * half + 0.1)], 0.015, m.lit((80, 70, 80)))
        b.poly([(x, top + 2.2 * half + 0.1), (x + flag, top + 2.2 * half + 0.075 - 0.05 * (1 - m.e)),
                (x, top + 2.2 * half + 0.04)], shade(roof, 1.2))
        window(b, m, x, top - 0.2, 0.07, 0.12)
    b.box(-0.36, 0, 0.36, 0.34, shade(stone, 0.94))
    for k in range(6):
        b.box(-0.35 + 0.12 * k, 0.33, -0.28 + 0.12 * k, 0.39, shade(stone, 0.94))
    b.curve([(-0.09, 0), (-0.09, 0.14), (0, 0.22), (0.09, 0.14), (0.09, 0)], m.lit((86, 60, 52)))


def draw_balloon(b: Brush, m: Mood, scene: Scene):
    cloth = m.lit(m.accent)

    def shape(f):  # a seam from the top down, at share f of the half width
        half = ((0, 1.0), (0.22, 0.97), (0.34, 0.8), (0.33, 0.62), (0.22, 0.42), (0.08, 0.24))
        return smooth([(f * x, y) for x, y in half])

    b.poly(shape(1) + shape(-1)[::-1], cloth)
    for outer, inner, colour in ((0.8, 0.42, m.lit((255, 236, 190))), (-0.42, -0.8, m.lit((255, 236, 190)))):
        b.poly(shape(outer) + shape(inner)[::-1], colour)
    b.poly(shape(1) + shape(0.55)[::-1], (20, 10, 40), 0.16)
    for x in (-0.06, 0.06):
        b.line([(x, 0.25), (x, 0.1)], 0.012, m.lit((90, 70, 60)))
    b.glow(0, 0.22, 0.2, (255, 200, 90), 0.9 * fade(m.p, 0.2, 0.9))
    b.poly([(-0.085, 0.12), (0.085, 0.12), (0.065, 0), (-0.065, 0)], m.lit((150, 100, 60)))


def draw_tent(b: Brush, m: Mood, scene: Scene):
    cloth, fire = m.lit(m.accent), 0.12 + 0.3 * fade(m.p, 0.05, 0.9) + 0.12 * m.e
    b.poly([(-0.72, 0), (0.3, 0), (-0.2, 0.8)], cloth)
    b.poly([(-0.2, 0.8), (0.3, 0), (0.52, 0.08), (0.02, 0.8)], shade(cloth, 0.75))
    b.poly([(-0.46, 0), (0.02, 0), (-0.2, 0.58)], mix(m.lit((52, 44, 56)), (255, 214, 120), fade(m.p, 0.1, 0.8)))
    b.poly([(-0.2, 0.58), (0.02, 0), (0.12, 0)], shade(cloth, 1.2))
    b.glow(0.62, 0.12, 0.65, (255, 180, 80), 0.7 * fade(m.p, 0.05, 0.9))
    for x in (0.54, 0.7):
        b.line([(x - 0.1, 0.0), (x + 0.1, 0.05)], 0.05, m.lit((96, 62, 44)))
    for scale, colour in ((1.0, (244, 96, 40)), (0.62, (255, 206, 84))):
        r = fire * scale
        b.curve([(0.62 - 0.4 * r, 0.03), (0.62 - 0.32 * r, 0.4 * r), (0.62, r + 0.04), (0.62 + 0.34 * r, 0.42 * r),
                 (0.62 + 0.4 * r, 0.03)], mix(m.lit(colour), colour, 0.6))


def draw_bridge(b: Brush, m: Mood, scene: Scene):
    stone, water = m.lit((196, 182, 168)), mix(m.lit((60, 130, 180)), m.haze, 0.35)
    b.curve([(-0.78, -0.04), (-0.4, 0.1), (0.4, 0.1), (0.78, -0.04), (0.5, -0.22), (-0.5, -0.22)], water)
    arch = [(0.62 * cos(t), -0.02 + 0.4 * sin(t)) for t in np.linspace(0, pi, 17)]
    deck = smooth([(-1.1, 0.2), (-0.5, 0.5), (0, 0.62), (0.5, 0.5), (1.1, 0.2)])
    b.poly(deck + [(1.1, -0.04)] + arch + [(-1.1, -0.04)], stone)
    b.poly([(x, y - 0.02) for x, y in arch] + [(x * 1.14, y * 1.16) for x, y in reversed(arch)], shade(stone, 0.78))
    b.line([(x, y + 0.02) for x, y in deck], 0.07, shade(stone, 1.25))
    for x in (-0.72, 0.72):
        y = 0.46
        b.line([(x, 0.34), (x, y + 0.34)], 0.035, m.lit((70, 64, 76)))
        b.glow(x, y + 0.36, 0.24, (255, 226, 140), fade(m.p, 0.1, 0.8))
        b.oval(x, y + 0.36, 0.06, 0.07, mix(m.lit((80, 80, 92)), (255, 236, 170), fade(m.p, 0.1, 0.7)))


def draw_sunflower(b: Brush, m: Mood, scene: Scene):
    droop, green = 1 - fade(m.p, 0.05, 0.65), m.lit((78, 148, 66))
    hx, hy = 0.26 * droop, 0.74 - 0.3 * droop
    stem = [(0, 0), (-0.02, 0.3), (0.0, 0.6 - 0.04 * droop), (0.16 * droop, 0.72 - 0.1 * droop), (hx, hy)]
    b.line(smooth(stem), 0.055, green)
    for side, y in ((-1, 0.24), (1, 0.36)):
        sag = 0.1 * droop
        b.curve([(0, y), (side * 0.14, y + 0.12 - sag), (side * 0.34, y + 0.14 - 3 * sag),
                 (side * 0.16, y - 0.02 - sag)], green)
    wide = 0.26 - 0.07 * droop
    for layer, count, colour in ((1.0, 12, (236, 150, 28)), (0.9, 12, (255, 206, 46))):
        for k in range(count):
            t = 2 * pi * (k + 0.5 * (layer < 1)) / count
            c, s = cos(t) * wide * layer, sin(t) * wide * layer
            b.curve([(hx + 0.3 * c, hy + 0.3 * s), (hx + 0.75 * c - 0.2 * s, hy + 0.75 * s + 0.2 * c), (hx + c, hy + s),
                     (hx + 0.75 * c + 0.2 * s, hy + 0.75 * s - 0.2 * c)], m.lit(colour))
    b.oval(hx, hy, 0.5 * wide, 0.5 * wide, m.lit((104, 62, 36)))
    b.oval(hx - 0.01, hy + 0.01, 0.34 * wide, 0.34 * wide, m.lit((136, 86, 46)))


SUBJECTS = {
    "tree": draw_tree, "cottage": draw_cottage, "sailboat": draw_sailboat, "lighthouse": draw_lighthouse,
    "windmill": draw_windmill, "horse": draw_horse, "person": draw_person, "swan": draw_swan, "castle": draw_castle,
    "balloon": draw_balloon, "tent": draw_tent, "bridge": draw_bridge, "sunflower": draw_sunflower,
}
NAMES = {
    "tree": "a lone tree", "cottage": "a cottage", "sailboat": "a sailboat", "lighthouse": "a lighthouse",
    "windmill": "a windmill", "horse": "a horse", "person": "a person with an umbrella", "swan": "a swan",
    "castle": "a castle", "balloon": "a hot-air balloon", "tent": "a tent with a campfire", "bridge": "a stone bridge",
    "sunflower": "a sunflower",
}
# Relative heights, and shares of the wind's bend, where not 1 and not 0.06
UNIT = {"tent": 0.8, "bridge": 0.72, "cottage": 0.95, "castle": 1.05, "swan": 0.82, "horse": 0.95, "balloon": 1.1,
        "sunflower": 1.12}
SWAY = {"tree": 1.0, "sunflower": 0.9, "person": 0.35, "balloon": 0.3, "tent": 0.25, "horse": 0.0}


def paint_subject(image, scene: Scene, mood: Mood):
    """The subject, its shadow on land or its mirror image on water."""
    name, unit = scene.subject, scene.height * UNIT.get(scene.subject, 1.0)
    bend, tilt, y = mood.wind * SWAY.get(name, 0.06), 0.0, 0.87
    if name in AFLOAT:
        y, tilt = 0.85, 0.45 * mood.wind if name == "sailboat" else 0.0
        clear = 0.32 * (1 - mood.e) ** 1.5
        mirror = Brush(image, scene.x, y - 0.01, 0.8 * unit, scene.flip, up=-1, tilt=tilt, alpha=clear)
        SUBJECTS[name](mirror, mood, scene)
    elif name == "balloon":
        y, tilt = 0.72 - 0.1 * mood.p, 0.5 * mood.wind
    else:
        Brush(image, up=-1).oval(scene.x, y, 0.5 * unit, 0.022, (20, 20, 50), 0.22)
    SUBJECTS[name](Brush(image, scene.x, y, unit, scene.flip, bend=bend, tilt=tilt), mood, scene)
    if name in AFLOAT:  # one wave in front of it
        xs = np.linspace(-0.02, 1.02, 61)
        crest = y + 0.012 - (0.002 + 0.035 * mood.e) * (1 - np.abs(np.sin(xs * 8 + scene.phase * 2)))
        deep = mood.lit(mix((40, 120, 170), (24, 70, 150), mood.e))
        wave = Brush(image, up=-1)
        wave.poly([*zip(xs, crest), *zip(xs[::-1], crest[::-1] * 0 + y + 0.16)], deep, 0.15 + 0.75 * mood.e)


# ------------------------------------------------------------------------------------------------ weather and grade


def paint_front(image, scene: Scene, mood: Mood):
    """Flowers, low mist, rain or snow, lightning, birds and sparkles."""
    rng = np.random.default_rng(scene.seed + 3)
    front = Brush(image, up=-1)
    if scene.place not in ("snow", "sea") and (scene.place != "lake" or on_bank(scene)):
        for k, (x, y) in enumerate(rng.uniform((0.02, 0.9), (0.98, 0.99), (14, 2))):
            flower(front, x, y, 0.022 * fade(mood.p, 0.45, 0.95), mood.lit(shade(ACCENTS[(k + scene.accent) % 5], 1.2)))
    pale = mix(mood.haze, (255, 255, 255), 0.35)
    veil(image, 0.62, 0.98, pale, 0, 0, 0.45 * fade(mood.gloom, 0.15, 0.9) + 0.15 * fade(mood.serene, 0.3, 1.0))
    wet = fade(1 - mood.p, 0.35, 0.95)
    slant = scene.flip * (0.02 + 0.1 * mood.e)
    for x, y, k in rng.uniform((-0.05, 0.0, 0.7), (1.05, 0.9, 1.2), (18, 3)):
        if scene.place == "snow":
            front.oval(x, y, 0.011 * k, 0.011 * k, (255, 255, 255), wet * 0.9)
        else:
            drop = mix(pale, (210, 225, 255), 0.5)
            front.line([(x, y), (x + slant * k, y + 0.13 * k)], 0.009, drop, wet * (0.2 + 0.4 * mood.e))
    lightning(front, scene, mood, fade(mood.storm, 0.3, 0.75) * fade(1 - mood.p, 0.45, 0.85))
    if mood.joy > 0:
        birds_and_sparkles(front, scene, mood, rng)


def flower(brush, x, y, r, colour):
    for k in range(5):
        brush.oval(x + 0.7 * r * cos(1.257 * k), y + 0.7 * r * sin(1.257 * k), 0.55 * r, 0.55 * r, colour)
    brush.oval(x, y, 0.45 * r, 0.45 * r, (255, 226, 110))


def lightning(brush, scene: Scene, mood: Mood, alpha):
    x, h = scene.light_x, scene.horizon
    brush.glow(x, 0.26, 0.34, (190, 180, 255), 0.6 * alpha)
    w, spine = 0.017, [(x - 0.02, 0.1), (x + 0.05, 0.24), (x - 0.01, 0.27), (x + 0.055, 0.42), (x + 0.005, 0.44),
                       (x + 0.04, h + 0.02)]
    bolt = [(px - w * (1 - k / 6), py) for k, (px, py) in enumerate(spine)]
    bolt += [(px + w * (1 - k / 6), py) for k, (px, py) in reversed(list(enumerate(spine)))]
    brush.poly(bolt, (255, 250, 220), alpha)


def birds_and_sparkles(brush, scene: Scene, mood: Mood, rng):
    joy = fade(mood.joy, 0.15, 0.75)
    for x, y, k in rng.uniform((0.08, 0.1, 0.8), (0.92, 0.36, 1.2), (4, 3)):
        w = 0.042 * k
        wings = smooth([(x + dx * w, y - dy * w) for dx, dy in ((-1, 0.4), (-0.4, 0.5), (0, 0), (0.4, 0.5), (1, 0.4))])
        brush.line(wings, 0.010, mood.lit((60, 50, 90)), 0.85 * joy)
    for k, (x, y, r) in enumerate(rng.uniform((0.04, 0.12, 0.7), (0.96, 0.95, 1.2), (11, 3))):
        spark(brush, x, y, 0.026 * r * joy, ((255, 244, 170), (255, 255, 255), (255, 190, 220))[k % 3], 0.9 * joy)


LUMA = np.array([0.299, 0.587, 0.114], np.float32)
BRIGHTNESS_RANGE = (0.50, 0.23)  # mean luma: middle, half range
SATURATION_RANGE = (0.28, 0.19)  # mean of max(R,G,B) - min(R,G,B): middle, half range


def chroma(rgb):
    """max(R, G, B) - min(R, G, B) of each pixel: [..., 3] -> [...]."""
    r, g, b = rgb[..., 0], rgb[..., 1], rgb[..., 2]
    return np.maximum(np.maximum(r, g), b) - np.minimum(np.minimum(r, g), b)


def targets(v: float, a: float) -> tuple[float, float]:
    """Mean brightness and saturation for (v, a): the two Valdez-Mehrabian equations solved for both, then scaled.

    The solution's largest values on the square |pleasure|, |arousal| <= 1 become the ends of the ranges above."""
    matrix = np.array([[0.69, 0.22], [-0.31, 0.60]])
    inverse = np.linalg.inv(matrix)
    brightness, saturation = inverse @ ((v - 5) / 4, (a - 5) / 4) / np.abs(inverse).sum(1)
    (b_mid, b_half), (s_mid, s_half) = BRIGHTNESS_RANGE, SATURATION_RANGE
    return b_mid + b_half * brightness, s_mid + s_half * saturation


def grade(image, v: float, a: float) -> Image.Image:
    """Contrast by A, then the gamma and the saturation gain that bring the picture's means to their targets."""
    rgb = np.asarray(image, np.float32) / 255  # [n, n, 3]
    mean = rgb.mean((0, 1))
    contrast = 0.84 + 0.36 * (a - 1) / 8
    rgb = np.clip(mean + (rgb - mean) * contrast, 0.004, 1)
    small = np.asarray(image.resize((32, 32), Image.BOX), np.float32) / 255
    small = np.clip(mean + (small - mean) * contrast, 0.004, 1)
    brightness, saturation = targets(v, a)
    gamma, gain = 1.0, 1.0
    for _ in range(5):  # fixed point on a thumbnail
        x = develop(small, gamma, gain)
        gamma *= np.log(brightness) / np.log((x @ LUMA).mean())
        gain *= (saturation / (chroma(x).mean() + 1e-4)) ** 0.9
        gamma, gain = min(2.6, max(0.35, gamma)), min(4.0, max(0.2, gain))
    return Image.fromarray(np.round(develop(rgb, gamma, gain) * 255).astype(np.uint8))


def develop(rgb, gamma, gain):
    """[n, n, 3] in 0..1: gamma first, then each pixel's colour pulled from its own grey by the gain."""
    rgb = rgb**np.float32(gamma)
    grey = (rgb @ LUMA)[..., None]
    return np.clip(grey + np.float32(gain) * (rgb - grey), 0, 1)


def render(scene: Scene, v: float, a: float, size: int = 128) -> Image.Image:
    """The scene at valence v and arousal a (1..9) as an RGB picture of size x size pixels. Deterministic."""
    v, a = check_va(v, a)
    if not isinstance(size, int) or not 16 <= size <= 2048:
        raise ValueError(f"size must be a whole number of pixels in 16..2048, got {size!r}")
    mood = mood_of(scene, v, a)
    image = paint_sky(size * OVERSAMPLE, scene, mood)
    paint_light(image, scene, mood)
    paint_clouds(image, scene, mood)
    paint_land(image, scene, mood)
    if on_bank(scene):
        paint_bank(image, scene, mood)
    paint_subject(image, scene, mood)
    paint_front(image, scene, mood)
    return grade(image.reduce(OVERSAMPLE), v, a)


# ------------------------------------------------------------------------------------------------------------ meter


def statistics(image) -> np.ndarray:
    """Six numbers of an RGB picture at 64 x 64, each about 0..1: the meter sees nothing else."""
    rgb = np.asarray(image.resize((64, 64), Image.BOX if min(image.size) >= 64 else Image.BICUBIC), np.float32) / 255
    luma = rgb @ LUMA
    r, g, b = rgb[..., 0], rgb[..., 1], rgb[..., 2]
    rg, yb = r - g, (r + g) / 2 - b
    blocks = luma.reshape(16, 4, 16, 4).mean((1, 3))
    return np.array([
        luma.mean(),  # brightness
        chroma(rgb).mean(),  # saturation
        luma.std() * 2,  # contrast
        np.hypot(rg.std(), yb.std()) + 0.3 * np.hypot(rg.mean(), yb.mean()),  # colourfulness (Hasler & Suesstrunk 2003)
        0.5 + (r - b).mean(),  # warm against cool
        3 * (np.abs(np.diff(blocks, axis=0)).mean() + np.abs(np.diff(blocks, axis=1)).mean()),  # coarse edges
    ])


def terms(x) -> np.ndarray:
    """The polynomial's terms for statistics x [..., 6]: constant, linear, and the quadratic ones of the first three."""
    products = [x[..., i] * x[..., j] for i in range(3) for j in range(i, 3)]
    return np.stack([np.ones_like(x[..., 0]), *np.moveaxis(x, -1, 0), *products], axis=-1)


# Fitted on 3,000 rendered scenes by `--calibrate`; one row of 13 constants each for V and A.
METER = np.array([
    [-7.3660, 19.1847, 7.2679, 0.0857, 1.8373, -0.0455, 1.0622, 0.3658, 1.0270, -2.2640, 0.7615, -7.0740, 5.9614],
    [1.1824, -5.4803, 18.7442, 6.3351, 4.7659, -0.6705, 1.0060, -2.3276, 3.1855, -9.3610, 2.8118, -15.5888, 8.8086],
])


def measure_va(image: Image.Image) -> tuple[float, float]:
    """Valence and arousal (1..9) that the statistics of an RGB picture of any size speak for."""
    if not isinstance(image, Image.Image) or image.mode != "RGB" or min(image.size) < 1:
        raise ValueError(f"the meter measures RGB PIL pictures, got {getattr(image, 'mode', type(image).__name__)}")
    v, a = np.clip(METER @ terms(statistics(image)), 1, 9)
    return float(v), float(a)


def rendered(count: int, seed: int, size: int = 128):
    """Yields (picture, v, a) of random scenes with V and A uniform in 1..9."""
    rng = np.random.default_rng(seed)
    for _ in tqdm(range(count), unit="scene"):
        scene, (v, a) = random_scene(rng), rng.uniform(1, 9, 2)
        yield render(scene, v, a, size), v, a


def calibrate(count: int = 3000, seed: int = 1, spread: float = 0.02) -> np.ndarray:
    """The meter's constants [2, 13], by least squares over rendered scenes.

    The grade ties brightness and saturation so closely to V and A that a plain fit would trust them alone, to the
    third digit. Each scene therefore enters ten times with its statistics shaken by `spread`: the fit then leans on
    contrast, colourfulness, warmth and edges too, and a small slip of one of them moves the answer little."""
    rng, x, y = np.random.default_rng(seed), [], []
    for image, v, a in rendered(count, seed):
        x.append(terms(statistics(image) + rng.normal(0, spread, (10, 6))))
        y.append(np.full((10, 2), (v, a)))
    return np.linalg.lstsq(np.concatenate(x), np.concatenate(y), rcond=None)[0].T


def add_noise(image, rng, sd: float = 4.0) -> Image.Image:
    """The picture with Gaussian noise of sd grey levels."""
    noisy = np.asarray(image, np.float32) + rng.normal(0, sd, (*image.size[::-1], 3))
    return Image.fromarray(np.clip(np.round(noisy), 0, 255).astype(np.uint8))


def meter_errors(count: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Mean absolute (V, A) errors on held-out scenes, of the clean, the blurred and the noisy pictures."""
    noise, errors = np.random.default_rng(seed), {"clean": [], "blurred": [], "noisy": []}
    for image, v, a in rendered(count, seed + 1_000_000):
        copies = (image, image.filter(ImageFilter.GaussianBlur(1)), add_noise(image, noise))
        for kind, copy in zip(errors, copies):
            errors[kind].append(np.abs(np.subtract(measure_va(copy), (v, a))))
    return {kind: np.mean(e, axis=0) for kind, e in errors.items()}


def contact_sheet(columns: int = 6, size: int = 128, seed: int = 0) -> Image.Image:
    """Random scenes, one a column: rows (V, A) = gloomy, threatening, neutral, serene, joyful."""
    rng, moods = np.random.default_rng(seed), ((2, 2), (2, 8), (5, 5), (8, 2), (8, 8))
    sheet = Image.new("RGB", (columns * (size + 4), len(moods) * (size + 4)), "white")
    for k in range(columns):
        scene = random_scene(rng)
        for j, (v, a) in enumerate(moods):
            sheet.paste(render(scene, v, a, size), (k * (size + 4) + 2, j * (size + 4) + 2))
    return sheet


def main():
    parser = argparse.ArgumentParser(description="The miniature world: its meter's error and a contact sheet.")
    parser.add_argument("--scenes", type=int, default=1000, help="held-out scenes to measure")
    parser.add_argument("--sheet", help="write a contact sheet of random scenes to this file")
    parser.add_argument("--calibrate", action="store_true", help="refit the meter's constants and print them")
    args = parser.parse_args()
    if args.sheet:
        contact_sheet().save(args.sheet)
    if args.calibrate:
        print(np.array2string(calibrate(), precision=4, separator=", ", max_line_width=110, suppress_small=True))
        return
    for kind, (v, a) in meter_errors(args.scenes).items():
        print(f"{kind:8s} mean absolute error: V {v:.3f}  A {a:.3f}")


if __name__ == "__main__":
    main()
