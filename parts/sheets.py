"""The pictures of a run of sample.py side by side: a contact sheet, and the grid of its targets.

`run` and `folder` are as in page.py: what run.json holds, and where the pictures lie.
"""

import math
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

SMALL = 256  # pixels: no picture of a contact sheet has a longer side
COLUMNS = 12  # pictures in a row of a contact sheet
SHEET = 40e6  # pixels of a contact sheet at most: very many pictures are shown smaller
GRID = 80e6  # and of a grid: Pillow refuses to open a picture of 179 million


def contact_sheet(run, folder):
    """The pictures small, with the judged V and A under each, as a PIL image (RGB).

    One target: a row for each round, its number at the left. A grid: a row for each target, with
    the best picture of each round or, with one round, all pictures; if there is one picture a
    target, they stand as in the grid. A frame marks the best of a row. No picture is larger than
    256 pixels. Raises OSError for one that is missing or cannot be read.
    """
    # 1. measure: a column is as wide as its pictures and as the text under them
    rows = sheet_rows(run)
    said = [[text_below(image, run["judge"]) for image in images] for _, images, _ in rows]
    font = ImageFont.load_default(13)
    gap = 8
    line = 22
    labels = [part for label, _, _ in rows for part in label.split("\n")]
    margin = gap + max(int(font.getlength(label)) for label in labels)
    side = min(SMALL, run["size"], int((SHEET / sum(map(len, said))) ** 0.5))
    width = max(side, *(int(font.getlength(text)) for texts in said for text in texts))
    columns = max(map(len, said))
    size = (margin + gap + columns * (width + gap), gap + len(rows) * (side + line))

    # 2. draw
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for row, (label, images, best) in enumerate(rows):
        y = gap + row * (side + line)
        draw.text(((margin + gap) / 2, y + side / 2), label, "black", font, anchor="mm")
        for column, image in enumerate(images):
            x = margin + gap + column * (width + gap)
            with Image.open(Path(folder) / image["file"]) as file:
                small = file.convert("RGB")
            small.thumbnail((side, side))
            left = x + (width - small.width) // 2
            if image is best:
                frame = (left - 4, y - 4, left + small.width + 3, y + small.height + 3)
                draw.rectangle(frame, fill="#1c7a4a")
            sheet.paste(small, (left, y))
            below = (x + width / 2, y + side + line / 2)
            draw.text(below, said[row][column], "black", font, anchor="mm")
    return sheet


def sheet_rows(run):
    """[(text at the left, pictures, the one to frame)] of the contact sheet."""
    cells = run["cells"]
    rows = []
    for cell in cells:
        if len(cells) == 1:
            rows += [(str(r), round["images"], judged(round["images"], round["best"]))
                     for r, round in enumerate(cell["rounds"])]
            continue
        images = cell["rounds"][0]["images"]
        if any(len(each["rounds"]) > 1 for each in cells):
            images = [round["images"][round["best"] or 0] for round in cell["rounds"]]
        best = cell["best"] or {"round": 0, "image": None}
        best = judged(cell["rounds"][best["round"]]["images"], best["image"])
        rows.append((f"V {cell['v']:g}\nA {cell['a']:g}", images, best))
    # One picture a target: the rows are those of the grid, whose side is the root of its cells.
    if len(cells) > 1 and all(len(images) == 1 for _, images, _ in rows):
        side = math.isqrt(len(cells))
        flat = [images[0] for _, images, _ in rows]
        return [("", flat[i:i + side], None) for i in range(0, len(flat), side)]
    # Else long rows go on in the next line, without the text at the left.
    return [("" if i else label, images[i:i + COLUMNS], best) for label, images, best in rows
            for i in range(0, len(images), COLUMNS)]


def judged(images, index):
    """The image at an index, which run.json has of the best; None without a readable judgement."""
    return None if index is None or images[index]["loss"] is None else images[index]


def text_below(image, judge):
    if image["v"] is not None:
        return f"V {image['v']:.2f} A {image['a']:.2f}"
    return "V ? A ?" if judge else f"seed {image['seed']}"


def va_grid(run, folder):
    """The best picture of each target of a grid, or the first, as one with both axes labelled."""
    cells = run["cells"]
    n = math.isqrt(len(cells))
    size = min(run["size"], int(GRID**0.5 / (n + 1)))
    margin = max(28, size // 4)
    gap = max(2, size // 32)
    font = ImageFont.load_default(max(12, size // 9))
    side = n * size + (n - 1) * gap
    grid = Image.new("RGB", (margin + side + gap, side + margin + gap), "white")
    draw = ImageDraw.Draw(grid)
    for k, cell in enumerate(cells):
        row, column = divmod(k, n)
        best = cell["best"] or {"round": 0, "image": 0}
        image = cell["rounds"][best["round"]]["images"][best["image"]]
        with Image.open(Path(folder) / image["file"]) as picture:
            picture.thumbnail((size, size))
            grid.paste(picture, (margin + column * (size + gap), gap + row * (size + gap)))
    for i in range(n):
        centre = i * (size + gap) + size / 2
        across = (margin + centre, side + gap + margin / 2)
        draw.text(across, f"V {cells[i]['v']:g}", "black", font, anchor="mm")
        down = (margin / 2, gap + centre)
        label = f"A\n{cells[i * n]['a']:g}"
        draw.text(down, label, "black", font, anchor="mm", align="center")
    return grid


def stacked(*images):
    """Pictures one below the other, on white."""
    sheet = Image.new("RGB", (max(i.width for i in images), sum(i.height for i in images)), "white")
    y = 0
    for image in images:
        sheet.paste(image, (0, y))
        y += image.height
    return sheet
