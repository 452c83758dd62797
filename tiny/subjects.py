"""The subjects of the miniature world: thirteen things that bend and colour with the mood.

Each draws in a brush `b` whose origin is the middle of the subject's foot, y up, 1 = its height,
facing +x; `m` is the scene's Mood (tiny/scenes.py). A new subject is a function here and a line in
each table at the end.
"""

from math import cos, pi, sin

import numpy as np

from tiny.brush import ACCENTS, Brush, fade, mix, shade, smooth


def draw_tree(b: Brush, m, scene):
    """Bare where V is low, then in leaf, then in blossom."""
    bark = m.lit((104, 72, 56))
    trunk = [(-0.1, 0), (0.1, 0), (0.055, 0.2), (0.04, 0.62), (-0.04, 0.62), (-0.055, 0.2)]
    b.poly(trunk, bark)
    branches = (
        [(0, 0.3), (-0.2, 0.5), (-0.34, 0.7)],
        [(0, 0.36), (0.2, 0.54), (0.36, 0.72)],
        [(0, 0.5), (-0.1, 0.72), (-0.16, 0.94)],
        [(0, 0.5), (0.1, 0.72), (0.15, 0.98)],
        [(-0.2, 0.5), (-0.32, 0.54), (-0.44, 0.56)],
        [(0.2, 0.54), (0.32, 0.56), (0.45, 0.54)],
    )
    for branch in branches:
        b.line(branch, 0.045, bark)
    # the crown: ovals of leaves, the front ones lighter
    leaf = fade(m.p, 0.08, 0.6)
    green = mix((120, 118, 70), (72, 160, 62), fade(m.p, 0.3, 0.7))
    crown = (
        (-0.26, 0.56, 0.2, 0.8), (0.26, 0.56, 0.2, 0.72), (0, 0.6, 0.26, 0.8),
        (-0.2, 0.72, 0.2, 1.0), (0.2, 0.73, 0.2, 0.9), (0, 0.84, 0.22, 1.08),
        (-0.08, 0.68, 0.14, 1.15),
    )
    for x, y, r, light in crown:
        r = r * leaf**0.5
        b.oval(x, y, r, r, m.lit(shade(green, light)), min(1.0, 1.6 * leaf))
    # blossoms, spread over the crown by the golden angle
    for k in range(9):
        spread = (k / 9) ** 0.5
        x = 0.36 * cos(2.4 * k) * spread
        y = 0.68 + 0.28 * sin(2.4 * k) * spread
        b.oval(x, y, 0.045, 0.045, shade(m.accent, 1.25), fade(m.p, 0.55, 0.9))


def window(b: Brush, m, x, y, w, h):
    """Dark where V is low, lit where it is high."""
    lit = fade(m.p, 0.2, 0.75)
    glass = mix(m.lit((52, 56, 74)), (255, 226, 128), lit)
    b.glow(x, y + h / 2, 1.8 * h, (255, 220, 120), 0.5 * lit * (0.4 + 0.6 * m.night))
    b.box(x - w / 2, y, x + w / 2, y + h, glass)


def draw_cottage(b: Brush, m, scene):
    wall = m.lit((246, 232, 206))
    roof = m.lit(m.accent)
    b.box(0.2, 0.6, 0.32, 0.98, m.lit((150, 104, 92)))  # the chimney
    for k in range(3):  # smoke, blown sideways
        x = 0.28 + 0.06 * k + 0.25 * m.wind * k
        pale = mix(m.haze, (255, 255, 255), 0.5)
        b.oval(x, 1.03 + 0.08 * k, 0.06 + 0.03 * k, 0.05 + 0.02 * k, pale, 0.55 - 0.13 * k)
    b.box(-0.5, 0, 0.5, 0.48, wall)
    b.box(0.18, 0, 0.5, 0.48, shade(wall, 0.84))  # the side in shadow
    # the roof, and its side in shadow
    b.poly([(-0.62, 0.44), (0.62, 0.44), (0.36, 0.88), (-0.36, 0.88)], roof)
    b.poly([(0.12, 0.44), (0.62, 0.44), (0.36, 0.88), (0.12, 0.88)], shade(roof, 0.82))
    b.box(-0.1, 0, 0.12, 0.32, m.lit((122, 78, 54)))  # the door
    window(b, m, -0.3, 0.14, 0.2, 0.2)
    window(b, m, 0.33, 0.14, 0.2, 0.2)


def draw_sailboat(b: Brush, m, scene):
    """Its sails fill as A rises."""
    sail = m.lit((252, 248, 238))
    hull = m.lit(m.accent)
    b.box(-0.015, 0.1, 0.015, 0.98, m.lit((96, 70, 58)))  # the mast
    belly = 0.05 + 0.16 * m.e
    front = smooth([(0.03, 0.96), (0.24 + belly, 0.5), (0.42 + 0.3 * belly, 0.2)])
    shadow = smooth([(0.03, 0.96), (0.14 + belly, 0.5), (0.2 + 0.3 * belly, 0.2)])
    back = smooth([(-0.03, 0.9), (-0.14, 0.5), (-0.34, 0.2)])
    b.poly(front + [(0.03, 0.2)], sail)
    b.poly(shadow + [(0.03, 0.2)], shade(sail, 0.9))
    b.poly(back + [(-0.03, 0.2)], mix(sail, hull, 0.75))
    # the hull, its bright edge and its side in shadow
    b.poly([(-0.44, 0.13), (0.5, 0.13), (0.34, -0.06), (-0.3, -0.06)], hull)
    b.poly([(-0.44, 0.13), (0.5, 0.13), (0.465, 0.085), (-0.41, 0.085)], shade(hull, 1.55))
    b.poly([(0.0, -0.06), (0.34, -0.06), (0.465, 0.085), (0.1, 0.085)], shade(hull, 0.8))


def draw_lighthouse(b: Brush, m, scene):
    """Its light grows with V."""
    white = m.lit((250, 246, 240))
    red = m.lit(m.accent)
    beam = 0.2 + 0.45 * fade(m.p, 0.2, 0.9) * (0.5 + 0.5 * m.night)
    for side in (-1, 1):  # a beam to either side
        b.poly([(0, 0.86), (side * 1.2, 1.0), (side * 1.2, 0.74)], (255, 240, 170), beam * 0.7)
    rock = [(-0.34, -0.02), (-0.26, 0.1), (-0.05, 0.13), (0.2, 0.12), (0.34, -0.02)]
    b.curve(rock, m.lit((112, 104, 108)))

    def width(y):
        return 0.17 - 0.075 * y

    for k in range(5):  # the tower's stripes
        y0 = 0.08 + 0.14 * k
        y1 = 0.08 + 0.14 * (k + 1)
        colour = red if k % 2 else white
        b.poly([(-width(y0), y0), (width(y0), y0), (width(y1), y1), (-width(y1), y1)], colour)
        b.poly([(0.03, y0), (width(y0), y0), (width(y1), y1), (0.03, y1)], shade(colour, 0.84))
    # gallery, lamp and roof
    b.box(-0.16, 0.77, 0.16, 0.805, m.lit((70, 66, 80)))
    b.glow(0, 0.86, 0.3, (255, 236, 150), beam)
    lamp = mix(m.lit((80, 84, 100)), (255, 240, 170), fade(m.p, 0.0, 0.6))
    b.box(-0.085, 0.805, 0.085, 0.91, lamp)
    b.poly([(-0.12, 0.91), (0.12, 0.91), (0.0, 1.02)], red)


def draw_windmill(b: Brush, m, scene):
    wall = m.lit((244, 230, 208))
    cap = smooth([(-0.19, 0.6), (-0.13, 0.74), (0, 0.8), (0.13, 0.74), (0.19, 0.6)])
    b.poly([(-0.24, 0), (0.24, 0), (0.14, 0.62), (-0.14, 0.62)], wall)
    b.poly([(0.05, 0), (0.24, 0), (0.14, 0.62), (0.05, 0.62)], shade(wall, 0.84))
    b.poly(cap, m.lit(m.accent))
    b.box(-0.07, 0, 0.07, 0.18, m.lit((116, 76, 56)))
    window(b, m, 0, 0.32, 0.11, 0.13)
    for k in range(4):  # the blades, turned further by A
        t = pi / 4 + pi / 2 * k + 0.5 * m.e
        c = cos(t)
        s = sin(t)
        shape = ((0.1, 0.0), (0.46, 0.0), (0.46, 0.12), (0.1, 0.09))
        blade = [(r * c - q * s, 0.66 + r * s + q * c) for r, q in shape]
        b.poly(blade, m.lit((252, 246, 236)))
        b.line([(0, 0.66), blade[1]], 0.03, m.lit((96, 68, 54)))
    b.oval(0, 0.66, 0.045, 0.045, m.lit((80, 60, 54)))


COATS = ((150, 88, 52), (196, 140, 84), (92, 66, 60), (238, 230, 220), (70, 60, 72))


def draw_horse(b: Brush, m, scene):
    """Its stride and tail go out with A, its head comes up with V."""
    coat = m.lit(COATS[scene.accent])
    mane = shade(coat, 0.5)
    stride = 0.02 + 0.11 * m.e
    far = shade(coat, 0.74)
    # the legs of the far side are darker and drawn first
    legs = ((0.2, stride, far), (-0.24, -stride, far),
            (0.26, -0.6 * stride, coat), (-0.3, 0.7 * stride, coat))
    for x, dx, colour in legs:
        b.poly([(x - 0.06, 0.5), (x + 0.06, 0.5), (x + 0.03 + dx * 0.4, 0.24),
                (x + 0.035 + dx, 0.0), (x - 0.04 + dx, 0.0), (x - 0.03 + dx * 0.4, 0.24)], colour)
    lift = 0.4 * m.e
    tail = [
        (-0.36, 0.62), (-0.45 - 0.1 * lift, 0.62 + 0.2 * lift),
        (-0.52 - 0.3 * lift, 0.4 + 0.4 * lift), (-0.49 - 0.3 * lift, 0.2 + 0.5 * lift),
        (-0.43 - 0.2 * lift, 0.36 + 0.4 * lift),
    ]
    b.curve(tail, mane)
    b.curve([(-0.38, 0.6), (-0.26, 0.69), (0.0, 0.64), (0.22, 0.69), (0.34, 0.6), (0.3, 0.42),
             (0.05, 0.37), (-0.2, 0.4), (-0.37, 0.44)], coat)
    t = -0.95 + 1.15 * fade(m.p, 0.0, 0.8) + 0.1 * m.e  # the neck's angle: bowed to raised

    def turn(points):
        return [(0.24 + x * cos(t) - y * sin(t), 0.58 + x * sin(t) + y * cos(t)) for x, y in points]

    neck = [(-0.16, 0.04), (-0.06, 0.24), (0.05, 0.42), (0.14, 0.44), (0.17, 0.34), (0.12, 0.1),
            (0.08, -0.14)]
    head = [(0.03, 0.44), (0.12, 0.47), (0.26, 0.34), (0.35, 0.24), (0.33, 0.17), (0.25, 0.18),
            (0.1, 0.3)]
    b.curve(turn(neck), coat)
    b.curve(turn([(-0.17, 0.06), (-0.1, 0.3), (0.04, 0.46), (0.06, 0.4), (-0.02, 0.22)]), mane)
    b.curve(turn(head), coat)
    b.poly(turn([(0.04, 0.43), (0.06, 0.54), (0.11, 0.45)]), coat)  # the ear


def draw_person(b: Brush, m, scene):
    """Bowed under the umbrella where V is low."""
    coat = m.lit(ACCENTS[(scene.accent + 3) % 5])
    bow = 0.09 * (1 - fade(m.p, 0.0, 0.7))
    for x in (-0.07, 0.06):  # legs and shoes
        b.box(x - 0.035, 0, x + 0.035, 0.24, m.lit((58, 54, 74)))
        b.box(x - 0.035, 0, x + 0.07, 0.04, m.lit((50, 40, 44)))
    body = [(-0.17, 0.2), (-0.14, 0.42), (-0.09 + bow, 0.6), (0.0 + bow, 0.63 - 0.3 * bow),
            (0.09 + bow, 0.6), (0.14, 0.42), (0.17, 0.2)]
    back = [(0.03, 0.2), (0.17, 0.2), (0.14, 0.42), (0.09 + bow, 0.58), (0.03 + bow, 0.58)]
    b.poly(smooth(body), coat)
    b.poly(back, shade(coat, 0.82))
    # the head and its hair
    x = 0.01 + 1.5 * bow
    y = 0.69 - 0.6 * bow
    hair = [(x - 0.1, y - 0.05), (x - 0.1, y + 0.07), (x, y + 0.11), (x + 0.09, y + 0.06),
            (x - 0.03, y + 0.03)]
    b.oval(x, y, 0.085, 0.09, m.lit((244, 200, 170)))
    b.poly(smooth(hair), m.lit((92, 60, 44)))
    # the umbrella: stick, arm and three panels
    b.line([(0.15, 0.42), (0.15, 0.9)], 0.025, m.lit((70, 60, 66)))
    b.line([(0.07, 0.54), (0.15, 0.46)], 0.07, shade(coat, 0.9))
    top = 0.93 - 0.5 * bow
    for left, right, light in ((-0.3, -0.02, 1.0), (-0.02, 0.24, 1.25), (0.24, 0.48, 0.82)):
        panel = [(left, top - 0.17), (left * 0.72 + 0.03, top), (0.09, top + 0.1),
                 (right * 0.72 + 0.03, top), (right, top - 0.17), ((left + right) / 2, top - 0.12)]
        b.poly(smooth(panel), m.lit(shade(m.accent, light)))


def draw_swan(b: Brush, m, scene):
    """Its wings lift with A, its neck rises with V."""
    white = m.lit((254, 254, 252))
    bow = 1 - fade(m.p, 0.05, 0.8)
    lift = 0.16 * m.e
    # body, far wing, near wing
    b.curve([(-0.52, 0.3 + lift), (-0.3, 0.4), (0.1, 0.36), (0.33, 0.22), (0.36, 0.04),
             (0.2, -0.06), (-0.2, -0.06), (-0.42, 0.06)], white)
    b.curve([(-0.54, 0.34 + 1.3 * lift), (-0.32, 0.48 + 1.8 * lift), (0.0, 0.38), (0.1, 0.2),
             (-0.1, 0.1), (-0.34, 0.16)], shade(white, 0.86))
    b.curve([(-0.5, 0.38 + 1.6 * lift), (-0.3, 0.52 + 2.2 * lift), (0.04, 0.36), (-0.08, 0.22),
             (-0.32, 0.28)], white)
    # neck, head, beak and eye
    x = 0.42 + 0.12 * bow
    y = 0.9 - 0.42 * bow
    neck = [(0.24, 0.12), (0.36, 0.3), (0.28, 0.5 - 0.08 * bow), (0.26, 0.7 - 0.24 * bow),
            (0.34, y + 0.02), (x, y)]
    b.line(smooth(neck), 0.105, white)
    b.oval(x, y, 0.085, 0.07, white)
    beak = [(x + 0.05, y + 0.03), (x + 0.21, y - 0.06), (x + 0.05, y - 0.05)]
    b.poly(beak, m.lit((244, 140, 40)))
    b.oval(x + 0.03, y + 0.015, 0.016, 0.016, m.lit((30, 30, 40)))


def draw_castle(b: Brush, m, scene):
    """Its flags stream as A rises."""
    stone = m.lit((206, 196, 190))
    roof = m.lit(m.accent)
    for x, half, top in ((0, 0.14, 0.66), (-0.36, 0.1, 0.52), (0.36, 0.1, 0.52)):  # towers
        b.box(x - half, 0, x + half, top, stone)
        b.box(x + 0.2 * half, 0, x + half, top, shade(stone, 0.84))
        peak = (x, top + 2.3 * half)
        b.poly([(x - 1.3 * half, top), (x + 1.3 * half, top), peak], roof)
        b.poly([(x + 0.1 * half, top), (x + 1.3 * half, top), peak], shade(roof, 0.8))
        mast = top + 2.2 * half
        flag = 0.03 + 0.12 * m.e
        tip = (x + flag, mast + 0.075 - 0.05 * (1 - m.e))
        b.line([(x, mast), (x, mast + 0.1)], 0.015, m.lit((80, 70, 80)))
        b.poly([(x, mast + 0.1), tip, (x, mast + 0.04)], shade(roof, 1.2))
        window(b, m, x, top - 0.2, 0.07, 0.12)
    b.box(-0.36, 0, 0.36, 0.34, shade(stone, 0.94))  # the wall, its battlements and the gate
    for k in range(6):
        b.box(-0.35 + 0.12 * k, 0.33, -0.28 + 0.12 * k, 0.39, shade(stone, 0.94))
    gate = [(-0.09, 0), (-0.09, 0.14), (0, 0.22), (0.09, 0.14), (0.09, 0)]
    b.curve(gate, m.lit((86, 60, 52)))


def draw_balloon(b: Brush, m, scene):
    def seam(share):
        """A line of the cloth from the top down, at a share of the half width."""
        half = ((0, 1.0), (0.22, 0.97), (0.34, 0.8), (0.33, 0.62), (0.22, 0.42), (0.08, 0.24))
        return smooth([(share * x, y) for x, y in half])

    stripe = m.lit((255, 236, 190))
    b.poly(seam(1) + seam(-1)[::-1], m.lit(m.accent))
    b.poly(seam(0.8) + seam(0.42)[::-1], stripe)
    b.poly(seam(-0.42) + seam(-0.8)[::-1], stripe)
    b.poly(seam(1) + seam(0.55)[::-1], (20, 10, 40), 0.16)  # the side in shadow
    for x in (-0.06, 0.06):
        b.line([(x, 0.25), (x, 0.1)], 0.012, m.lit((90, 70, 60)))
    b.glow(0, 0.22, 0.2, (255, 200, 90), 0.9 * fade(m.p, 0.2, 0.9))  # the flame
    basket = [(-0.085, 0.12), (0.085, 0.12), (0.065, 0), (-0.065, 0)]
    b.poly(basket, m.lit((150, 100, 60)))


def draw_tent(b: Brush, m, scene):
    """Its campfire grows with V, and with A."""
    cloth = m.lit(m.accent)
    inside = mix(m.lit((52, 44, 56)), (255, 214, 120), fade(m.p, 0.1, 0.8))
    b.poly([(-0.72, 0), (0.3, 0), (-0.2, 0.8)], cloth)
    b.poly([(-0.2, 0.8), (0.3, 0), (0.52, 0.08), (0.02, 0.8)], shade(cloth, 0.75))
    b.poly([(-0.46, 0), (0.02, 0), (-0.2, 0.58)], inside)
    b.poly([(-0.2, 0.58), (0.02, 0), (0.12, 0)], shade(cloth, 1.2))
    # the campfire: light, logs, flames
    b.glow(0.62, 0.12, 0.65, (255, 180, 80), 0.7 * fade(m.p, 0.05, 0.9))
    for x in (0.54, 0.7):
        b.line([(x - 0.1, 0.0), (x + 0.1, 0.05)], 0.05, m.lit((96, 62, 44)))
    fire = 0.12 + 0.3 * fade(m.p, 0.05, 0.9) + 0.12 * m.e
    for scale, colour in ((1.0, (244, 96, 40)), (0.62, (255, 206, 84))):
        r = fire * scale
        flame = [(0.62 - 0.4 * r, 0.03), (0.62 - 0.32 * r, 0.4 * r), (0.62, r + 0.04),
                 (0.62 + 0.34 * r, 0.42 * r), (0.62 + 0.4 * r, 0.03)]
        b.curve(flame, mix(m.lit(colour), colour, 0.6))


def draw_bridge(b: Brush, m, scene):
    stone = m.lit((196, 182, 168))
    water = [(-0.78, -0.04), (-0.4, 0.1), (0.4, 0.1), (0.78, -0.04), (0.5, -0.22), (-0.5, -0.22)]
    b.curve(water, mix(m.lit((60, 130, 180)), m.haze, 0.35))
    arch = [(0.62 * cos(t), -0.02 + 0.4 * sin(t)) for t in np.linspace(0, pi, 17)]
    deck = smooth([(-1.1, 0.2), (-0.5, 0.5), (0, 0.62), (0.5, 0.5), (1.1, 0.2)])
    b.poly(deck + [(1.1, -0.04)] + arch + [(-1.1, -0.04)], stone)
    inner = [(x, y - 0.02) for x, y in arch]
    outer = [(x * 1.14, y * 1.16) for x, y in reversed(arch)]
    b.poly(inner + outer, shade(stone, 0.78))
    b.line([(x, y + 0.02) for x, y in deck], 0.07, shade(stone, 1.25))  # the parapet
    for x in (-0.72, 0.72):  # lamps
        y = 0.46
        b.line([(x, 0.34), (x, y + 0.34)], 0.035, m.lit((70, 64, 76)))
        b.glow(x, y + 0.36, 0.24, (255, 226, 140), fade(m.p, 0.1, 0.8))
        lamp = mix(m.lit((80, 80, 92)), (255, 236, 170), fade(m.p, 0.1, 0.7))
        b.oval(x, y + 0.36, 0.06, 0.07, lamp)


def draw_sunflower(b: Brush, m, scene):
    """It droops where V is low."""
    droop = 1 - fade(m.p, 0.05, 0.65)
    green = m.lit((78, 148, 66))
    head_x = 0.26 * droop
    head_y = 0.74 - 0.3 * droop
    stem = [(0, 0), (-0.02, 0.3), (0.0, 0.6 - 0.04 * droop), (0.16 * droop, 0.72 - 0.1 * droop),
            (head_x, head_y)]
    b.line(smooth(stem), 0.055, green)
    for side, y in ((-1, 0.24), (1, 0.36)):  # two leaves
        sag = 0.1 * droop
        b.curve([(0, y), (side * 0.14, y + 0.12 - sag), (side * 0.34, y + 0.14 - 3 * sag),
                 (side * 0.16, y - 0.02 - sag)], green)
    # two layers of petals, the front one turned by half a petal
    wide = 0.26 - 0.07 * droop
    for layer, count, colour in ((1.0, 12, (236, 150, 28)), (0.9, 12, (255, 206, 46))):
        for k in range(count):
            t = 2 * pi * (k + 0.5 * (layer < 1)) / count
            c = cos(t) * wide * layer
            s = sin(t) * wide * layer
            petal = [
                (head_x + 0.3 * c, head_y + 0.3 * s),
                (head_x + 0.75 * c - 0.2 * s, head_y + 0.75 * s + 0.2 * c),
                (head_x + c, head_y + s),
                (head_x + 0.75 * c + 0.2 * s, head_y + 0.75 * s - 0.2 * c),
            ]
            b.curve(petal, m.lit(colour))
    b.oval(head_x, head_y, 0.5 * wide, 0.5 * wide, m.lit((104, 62, 36)))
    b.oval(head_x - 0.01, head_y + 0.01, 0.34 * wide, 0.34 * wide, m.lit((136, 86, 46)))


# --------------------------------------------------------------------------------------------------
# Tables, by name

SUBJECTS = {
    "tree": draw_tree, "cottage": draw_cottage, "sailboat": draw_sailboat,
    "lighthouse": draw_lighthouse, "windmill": draw_windmill, "horse": draw_horse,
    "person": draw_person, "swan": draw_swan, "castle": draw_castle, "balloon": draw_balloon,
    "tent": draw_tent, "bridge": draw_bridge, "sunflower": draw_sunflower,
}
NAMES = {
    "tree": "a lone tree", "cottage": "a cottage", "sailboat": "a sailboat",
    "lighthouse": "a lighthouse", "windmill": "a windmill", "horse": "a horse",
    "person": "a person with an umbrella", "swan": "a swan", "castle": "a castle",
    "balloon": "a hot-air balloon", "tent": "a tent with a campfire", "bridge": "a stone bridge",
    "sunflower": "a sunflower",
}
# Heights relative to the scene's, where they are not 1.
UNIT = {"tent": 0.8, "bridge": 0.72, "cottage": 0.95, "castle": 1.05, "swan": 0.82, "horse": 0.95,
        "balloon": 1.1, "sunflower": 1.12}
# Shares of the wind's bend, where they are not 0.06.
SWAY = {"tree": 1.0, "sunflower": 0.9, "person": 0.35, "balloon": 0.3, "tent": 0.25, "horse": 0.0}
