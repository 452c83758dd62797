"""A run of sample.py as one page to look at: each round's pictures, what the judge said, and how the prompt changed.

    page.write(run, folder)        # run.json, contact.png and index.html beside the run's pictures

`run` is what run.json holds: the settings, and for every target (a cell) its rounds with their pictures, prompts and
analyses. The page is one HTML file that needs no network and runs no script: style, diagram and pictures are inside, and all
text is escaped. Rounds count from 0, as in Algorithm 1 and in the names of the files.
"""

import base64
import difflib
import io
import math
import os
import re
from html import escape
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from parts.files import write_json

SMALL = 256  # pixels: PNGs up to this side enter the page as they are; no picture of the contact sheet is larger
MEDIUM = 512  # pixels: side of a round's picture in the page; the best picture and a grid keep theirs
COLUMNS, SHEET = 12, 40e6  # of a contact sheet: pictures in a row, and pixels (very many pictures are shown smaller)
DOING = {"draw": "drawing", "judge": "judging", "rewrite": "rewriting", "total": "in all"}
FORBIDDEN = re.compile("[\0-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]")  # in HTML
MARKS = ",.;:!?、。"
WORD = re.compile(rf"[぀-ヿ㐀-鿿]\s*|[^\s{MARKS}぀-ヿ㐀-鿿]+\s*|[{MARKS}]\s*|\s+")  # a character where there are no spaces

STYLE = """
:root { color-scheme: light dark; --page: #faf9f6; --card: #fff; --text: #22242a; --soft: #62656f; --rule: #deddd7;
  --good: #1c7a4a; --new: #dff3e4; --gone: #8c3a3a }
@media (prefers-color-scheme: dark) { :root { --page: #16181c; --card: #1f2228; --text: #e7e6e2; --soft: #a2a5ae;
  --rule: #363a43; --good: #2f9d66; --new: #1d3f2d; --gone: #e09a94 } }
* { box-sizing: border-box }
body { margin: 0; background: var(--page); color: var(--text); font: 1rem/1.55 system-ui, sans-serif;
  overflow-wrap: anywhere }
header, main { max-width: 70rem; margin: 0 auto; padding: 1.25rem clamp(1rem, 4vw, 2rem) }
header { padding-top: clamp(1.5rem, 5vw, 3rem); padding-bottom: 0 }
h1, .prompt { font-family: Georgia, serif }
h1 { font-size: clamp(1.5rem, 4.5vw, 2.2rem); font-weight: 500; line-height: 1.2; margin: 0 0 .6rem; text-wrap: balance }
h2 { font-size: 1.2rem; line-height: 1.3; margin: 0 0 .5rem } h3, h4 { font-size: 1rem; margin: 0 }
p { margin: .6rem 0; max-width: 46rem } .prompt { font-size: 1.06rem }
figure { margin: 0; min-width: 0 } img { display: block; width: 100%; height: auto; border-radius: 5px }
.soft, figcaption, .facts th { color: var(--soft) } .soft, figcaption { font-size: .875rem; font-weight: 400 }
section { border-top: 1px solid var(--rule); padding: 1.5rem 0 0; margin-top: 1.75rem }
.lead { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(21rem, 100%), 1fr)); gap: 2rem }
.lead > * { min-width: 0 } .lead h2 { margin: 1rem 0 .3rem }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(clamp(9.4rem, 22%, 15rem), 1fr)); gap: .9rem;
  margin: 1rem 0 }
.card { position: relative; background: var(--card); border: 1px solid var(--rule); border-radius: 6px; overflow: hidden }
.card img { border-radius: 0 } .card p { margin: .3rem 0 0 } summary { cursor: pointer }
.card figcaption { padding: .5rem .65rem .6rem; font-variant-numeric: tabular-nums }
.card strong { position: absolute; top: .5rem; left: .5rem; padding: 0 .55rem; border-radius: 4px; color: #fff;
  background: #454852 }
.card.best { border: 3px solid var(--good) } .card.best strong { background: #1c7a4a }
.card.worst { border: 3px dashed var(--soft) }
ins { background: var(--new); text-decoration: underline; text-decoration-thickness: 2px; text-underline-offset: 3px }
del { color: var(--gone); text-decoration: line-through }
.key { display: inline-block; width: .7em; height: .7em; border-radius: 50%; margin-right: .5em }
.cells { display: grid; grid-template-columns: repeat(auto-fill, minmax(12.5rem, 1fr)); gap: .6rem }
.cell { border: 1px solid var(--rule); border-radius: 6px; background: var(--card); padding: .6rem .8rem; min-width: 0 }
.cell[open] { grid-column: 1 / -1 } .cell h3 { display: inline; white-space: nowrap }
.cell section { margin-top: 1rem; padding-top: 1rem }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
td, th { padding: .2rem 1.2rem .2rem 0; font-weight: 400; text-align: left; vertical-align: top }
thead th { color: var(--soft) }
.plane > svg { display: block; width: 100%; max-width: 34rem; margin: 0 auto }
.plane text { fill: var(--soft); font-size: 11px; text-anchor: middle } .plane .on { fill: #fff; font-weight: 600 }
.plane .axis { fill: var(--text); font-size: 12.5px } .plane .start { text-anchor: start } .plane .end { text-anchor: end }
.thin, .line, .way { fill: none; stroke: var(--rule); stroke-width: .7 } .way { stroke: var(--soft); stroke-width: 1.2 }
.line { stroke: var(--text); stroke-width: 1.5 } .middle { stroke: var(--soft) }
.plane ul { display: flex; flex-wrap: wrap; justify-content: center; gap: .2rem 1.1rem; list-style: none; margin: .3rem 0 0;
  padding: 0 } .plane li { display: flex; align-items: center; gap: .35rem } .plane li svg { width: 26px; height: 26px }
"""

# ---------------------------------------------------------------------------------------------------------------------
# Text


def plain(text):
    """Any text as HTML, also within attributes."""
    return escape(FORBIDDEN.sub("\ufffd", text))


def paragraph(text, kind="", before=""):
    return f'<p class="{kind}" dir="auto">{before}{plain(text)}</p>\n' if text else ""


def short(text, length=110):
    return text if len(text) <= length else text[:length].rstrip() + "…"


def target(cell):
    return f"valence {cell['v']:g}, arousal {cell['a']:g}"


def times(seconds):
    return " · ".join(f"{word} {seconds[name]:.1f} s" for name, word in DOING.items() if name in seconds)


def numbers(image, lost=""):
    """Of one picture: "V 6.20 A 3.10 · loss 0.90 · seed 0"; `lost` stands for V and A that there are not."""
    seen = lost if image["v"] is None else f"V {image['v']:.2f} A {image['a']:.2f}"
    loss = "" if image["loss"] is None else f"loss {image['loss']:.2f}"
    return " · ".join(filter(None, (seen, loss, f"seed {image['seed']}")))


def changes(old, new):
    """A prompt as HTML: words that the old prompt did not have stand in <ins>, those that only it had in <del>."""
    old, new = (WORD.findall(FORBIDDEN.sub("\ufffd", text)) for text in (old, new))
    match = difflib.SequenceMatcher(None, [w.strip() for w in old], [w.strip() for w in new], autojunk=False)
    out = ""
    for kind, i, j, k, m in match.get_opcodes():
        gone, now = "".join(old[i:j]).strip(), "".join(new[k:m])
        if kind == "equal":
            out += plain(now)
            continue
        if gone:
            out += ("" if not out or out[-1].isspace() or gone[0] in MARKS else " ") + f"<del>{plain(gone)}</del> "
        out += f"<ins>{plain(now.rstrip())}</ins>" + now[len(now.rstrip()):] if now.strip() else now
    return out


# ---------------------------------------------------------------------------------------------------------------------
# Pictures


def best_of(cell):
    """(round, place, image) of a cell's best picture; None if no answer of a judge could be read."""
    if cell["best"] is None:
        return None
    r, i = cell["best"]["round"], cell["best"]["image"]
    image = cell["rounds"][r]["images"][i]
    return None if image["loss"] is None else (r, i, image)


def rounds_of(cells):
    return max(len(cell["rounds"]) for cell in cells)


def picture(path, alt, side=None):
    """An <img> that holds the picture of a file: a small PNG as it is, any other as a JPEG, shrunk to `side` pixels."""
    with Image.open(path) as image:
        kind, content = "png", Path(path).read_bytes()
        if max(image.size) > SMALL or image.format != "PNG":
            image, kind, buffer = image.convert("RGB"), "jpeg", io.BytesIO()
            image.thumbnail((side or image.width, side or image.height))
            image.save(buffer, "JPEG", quality=90)
            content = buffer.getvalue()
        width, height = image.size
    data = base64.b64encode(content).decode()
    return f'<img src="data:image/{kind};base64,{data}" width="{width}" height="{height}" alt="{plain(alt)}">'


def alt_text(prompt, image):
    seen = "not judged" if image["v"] is None else f"judged valence {image['v']:.2f}, arousal {image['a']:.2f}"
    return f"{short(prompt)}: {seen}"


def card(image, round, place, judged, folder):
    """One picture of a round with its caption."""
    best = place == round["best"] and image["loss"] is not None
    mark = "best" if best else "worst" if place == round["worst"] != round["best"] else ""
    said = numbers(image, "not readable" if judged else "").replace(" ", "\xa0").replace("\xa0·\xa0", " · ")
    tag = f"<strong>{mark}</strong>" if mark else ""
    emotion = f"<br>{plain(image['emotion'])}" if image["emotion"] else ""
    why = f"<details><summary>why</summary>{paragraph(image['reasoning'])}</details>" if image["reasoning"] else ""
    alt = alt_text(round["prompt"], image) + (f", {mark} of its round" if mark else "")
    return (f'<figure class="card {mark}">{picture(folder / image["file"], alt, MEDIUM)}'
            f"<figcaption>{tag}{said}{emotion}{why}</figcaption></figure>\n")


# ---------------------------------------------------------------------------------------------------------------------
# The valence-arousal plane; its unit is 1/40 of a point of the scale


def at(v, a):
    return 4 + 40 * v, 376 - 40 * a


def colour(r, rounds):
    """Of round r: from blue over purple to orange, all about as far from white as from black."""
    return f"oklch(0.6 0.16 {(265 + 150 * r / max(1, rounds - 1)) % 360:.0f})"


def dot(colour, text=""):
    """A picture; with a text, its round's number, if it is the best of its round."""
    inside = f'<text class="on" y="4">{text}</text>' if text else ""
    return f'<circle r="{9 if text else 4.5}" fill="{colour}"/>{inside}'


def cross(large):
    """A target."""
    return '<g class="line">' + ('<circle r="8"/><path d="M-14 0H14M0-14V14"/>' if large else '<circle r="5"/>') + "</g>"


def put(v, a, mark, title):
    x, y = at(v, a)
    return f'<g transform="translate({x:.1f} {y:.1f})"><title>{title}</title>{mark}</g>'


def plane(cells):
    """A figure of the plane. One cell: its target and all judged pictures, the best ones of the rounds joined by a line.
    Several: each target joined to its best picture."""
    one, rounds, ring = len(cells) == 1, rounds_of(cells), '<circle class="line" r="13"/>'
    lines, dots, targets, heads, top = [], [], [], [], []  # drawn in this order: the best of all is never hidden
    for cell in cells:
        targets.append(put(cell["v"], cell["a"], cross(one), f"target: {target(cell)}"))
        way, chosen = [] if one else [at(cell["v"], cell["a"])], best_of(cell)
        for r, round in enumerate(cell["rounds"]):
            for i, image in enumerate(round["images"]):
                best = chosen is not None and chosen[:2] == (r, i)
                head = best or (one and i == round["best"])
                if image["v"] is not None and (one or best):
                    mark = dot(colour(r, rounds), str(r) if head and one else "") + (ring if best and one else "")
                    title = f"round {r}: {numbers(image)}" + (", the best of all" if best else "")
                    (top if best else heads if head else dots).append(put(image["v"], image["a"], mark, title))
                    way += [at(image["v"], image["a"])] if head else []
        lines.append(f'<polyline class="way" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in way)}"/>')
    scale = "".join(f'<path class="thin {"middle" if n == 5 else ""}" d="M{x} 16V336M44 {y}H364"/>'
                    f'<text x="{x}" y="354">{n}</text><text x="32" y="{y + 4}">{n}</text>'
                    for n in range(1, 10) for x, y in [at(n, n)])
    axes = ('<text class="axis" x="204" y="376">valence</text><text class="start" x="38" y="376">unpleasant</text>'
            '<text class="end" x="370" y="376">pleasant</text><g transform="translate(13 0) rotate(-90)"><text class="axis" '
            'x="-176">arousal</text><text class="start" x="-342">calm</text><text class="end" x="-10">excited</text></g>')
    keys = [(cross(one), "target")]
    if top:
        keys += [(dot(colour(r, rounds), str(r) if one else ""), f"round {r}") for r in range(rounds)]
        keys += [(ring, "best of all")] if one else []
    keys = "".join(f'<li><svg viewBox="-15 -15 30 30" aria-hidden="true">{mark}</svg>{name}</li>' for mark, name in keys)
    label = f"target {target(cells[0])} and the judged pictures" if one else f"{len(cells)} targets and their best pictures"
    marks = "".join(lines + dots + targets + heads + top)
    return (f'<figure class="plane"><svg viewBox="0 0 380 384" role="img" aria-label="Valence-arousal plane: {label}">'
            f"{scale}{axes}{marks}</svg><figcaption><ul>{keys}</ul></figcaption></figure>\n")


# ---------------------------------------------------------------------------------------------------------------------
# The page


def best_picture(cell, judged, folder):
    """The best picture of all rounds, large, with what was wanted and what the judge saw; without judgements the first."""
    best = best_of(cell)
    r, _, image = best or (0, 0, cell["rounds"][0]["images"][0])
    round = cell["rounds"][r]
    count = sum(len(round["images"]) for round in cell["rounds"])
    head = "The picture" if count == 1 else f"The {'best' if best else 'first'} of {count} pictures"
    if best:
        rows = "".join(f'<tr><th scope="row">{name}</th><td>{cell[name[0]]:.2f}</td><td>{image[name[0]]:.2f}</td></tr>'
                       for name in ("valence", "arousal"))
        said = ('<table><thead><tr><td></td><th scope="col">wanted</th><th scope="col">judged</th></tr></thead>'
                f"<tbody>{rows}</tbody></table>\n")
    else:
        said = paragraph("No answer of the judge could be read." if judged else "There was no judge.")
    return (f"<div><figure>{picture(folder / image['file'], alt_text(round['prompt'], image))}</figure><h2>{head}</h2>\n"
            f"{said}{paragraph(f'round {r} · {numbers(image)}', 'soft')}{paragraph(round['prompt'], 'prompt')}</div>\n")


def round_section(run, cell, r, folder, level):
    """One round: its prompt against the round before, its pictures, and what the judge made of them."""
    round, judged, shade = cell["rounds"][r], run["judge"] is not None, colour(r, rounds_of(run["cells"]))
    loss = None if round["best"] is None else round["images"][round["best"]]["loss"]
    head = f"Round {r}" + ("" if loss is None else f" · best loss {loss:.2f}")
    prompt = changes(cell["rounds"][r - 1]["prompt"] if r else round["prompt"], round["prompt"])
    cards = "".join(card(image, round, i, judged, folder) for i, image in enumerate(round["images"]))
    unseen = round["next_prompt"] if r + 1 == len(cell["rounds"]) else None
    return (f'<section><h{level}><span class="key" style="background: {shade}"></span>{head}</h{level}>\n'
            f'<p class="prompt" dir="auto">{prompt}</p>\n<div class="cards">{cards}</div>\n'
            + paragraph(round["analysis"], before="<b>Analysis.</b> ")
            + paragraph(unseen, "prompt", "The next prompt, not drawn yet: ")
            + paragraph(round["note"], "soft") + paragraph(times(round["seconds"]), "soft") + "</section>\n")


def facts(run):
    rows = {"prompt": run["prompt"], "model": run["model"], "judge": run["judge"] or "none", "steps": run["steps"],
            "guidance": f"{run['guidance']:g}", "size": f"{run['size']} px", "seed": run["seed"],
            "time": times(run["seconds"])}
    rows = "".join(f'<tr><th scope="row">{name}</th><td dir="auto">{plain(str(x))}</td></tr>\n' for name, x in rows.items())
    return f'<section><h2>How it was made</h2>\n<table class="facts"><tbody>\n{rows}</tbody></table></section>\n'


def html(run, folder):
    """The page of a run (a dict as in run.json) as the text of one HTML document.

    A run that goes on has a page too: rounds, cells and the grid may be missing, but every cell has a round.
    folder: where the run's pictures lie. Raises OSError for a picture that is missing or cannot be read.
    """
    cells, judged, folder = run["cells"], run["judge"] is not None, Path(folder)
    loss = "A picture's loss is |ΔV| + |ΔA|, how far off the judge sees it, 0 to 16." if judged else ""
    if run["grid"] or len(cells) > 1:
        losses = [best_of(cell)[2]["loss"] for cell in cells if best_of(cell)]
        wanted = f"{len(cells)} targets of valence and arousal, each 1 to 9"
        loss += f" That of the targets' best pictures is {sum(losses) / len(losses):.2f} on average." if losses else ""
        alt = f"{short(run['prompt'])}: the best picture of each target, valence to the right and arousal upwards"
        lead = f"<figure>{picture(folder / run['grid'], alt)}</figure>\n" if run["grid"] else ""
        body = '<section><h2>Every target</h2>\n<div class="cells">'
        for cell in cells:
            best = f' <span class="soft">loss {best_of(cell)[2]["loss"]:.2f}</span>' if best_of(cell) else ""
            inner = "".join(round_section(run, cell, r, folder, 4) for r in range(len(cell["rounds"])))
            body += (f'<details class="cell"><summary><h3>V {cell["v"]:g} A {cell["a"]:g}{best}</h3></summary>\n'
                     f"{inner}</details>\n")
        body += "</div></section>\n"
    else:
        wanted = f"Wanted: {target(cells[0])}, each 1 to 9"
        lead = best_picture(cells[0], judged, folder)
        body = "".join(round_section(run, cells[0], r, folder, 2) for r in range(len(cells[0]["rounds"])))
    title = plain(short(run["prompt"]))
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title>
<link rel="icon" href="data:,">
<style>{STYLE}</style>
</head>
<body>
<header><h1 dir="auto">{title}</h1><p>{wanted}.</p>{paragraph(loss, "soft")}</header>
<main>
<div class="lead">{lead}{plane(cells)}</div>
{body}{facts(run)}</main>
</body>
</html>
"""


# ---------------------------------------------------------------------------------------------------------------------
# Files


def sheet_rows(run):
    """[(text at the left, pictures, the one to frame)] of the contact sheet."""
    cells, rows = run["cells"], []
    for cell in cells:
        if len(cells) == 1:
            rows += [(str(r), round["images"]) for r, round in enumerate(cell["rounds"])]
        else:
            images = cell["rounds"][0]["images"]
            if rounds_of(cells) > 1:
                images = [round["images"][round["best"] or 0] for round in cell["rounds"]]
            rows.append((f"V {cell['v']:g}\nA {cell['a']:g}", images))
    if len(cells) > 1 and all(len(images) == 1 for _, images in rows):
        side = math.isqrt(len(cells))
        return [("", [images[0] for _, images in rows[i:i + side]], None) for i in range(0, len(rows), side)]
    return [("" if i else label, images[i:i + COLUMNS],
             min((image for image in images if image["loss"] is not None), key=lambda image: image["loss"], default=None))
            for label, images in rows for i in range(0, len(images), COLUMNS)]


def contact_sheet(run, folder):
    """The pictures small, with the judged V and A under each, as a PIL image (RGB).

    One target: a row for each round, its number at the left. A grid: a row for each target, with the best picture of each
    round or, with one round, all pictures; if there is one picture a target, they stand as in the grid. A frame marks the
    best of a row. No picture is larger than 256 pixels. Raises OSError for one that is missing or cannot be read.
    """
    rows = sheet_rows(run)
    labels = [numbers(image, "V ? A ?" if run["judge"] else "").split(" · ")[0] for _, images, _ in rows for image in images]
    font, gap, line = ImageFont.load_default(13), 8, 22
    margin = gap + max(int(font.getlength(part)) for text, _, _ in rows for part in text.split("\n"))
    side = min(SMALL, run["size"], int((SHEET / len(labels)) ** 0.5))
    width, columns = max(side, *(int(font.getlength(text)) for text in labels)), max(len(images) for _, images, _ in rows)
    sheet = Image.new("RGB", (margin + gap + columns * (width + gap), gap + len(rows) * (side + line)), "white")
    draw, labels = ImageDraw.Draw(sheet), iter(labels)
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
                draw.rectangle((left - 4, y - 4, left + small.width + 3, y + small.height + 3), fill="#1c7a4a")
            sheet.paste(small, (left, y))
            draw.text((x + width / 2, y + side + line / 2), next(labels), "black", font, anchor="mm")
    return sheet


def write(run, folder):
    """Write run.json, contact.png and index.html into the folder of a run's pictures, each under a temporary name that is
    then renamed; returns the path of index.html. Raises OSError for a picture that is missing or cannot be read, before
    anything is written."""
    folder = Path(folder)
    text, sheet = html(run, folder), contact_sheet(run, folder)
    write_json(folder / "run.json", run)
    for name, save in (("contact.png", lambda path: sheet.save(path, "PNG")),
                       ("index.html", lambda path: path.write_text(text, encoding="utf-8"))):
        temporary = folder / (name + ".tmp")
        save(temporary)
        os.replace(temporary, folder / name)
    return folder / "index.html"
