"""A run of sample.py as one page to look at, and as lines for the screen.

    page.write(run, folder)        # run.json, contact.png and index.html beside the run's pictures

`run` is what run.json holds: the settings, and for every target (a cell) its rounds with their
pictures, prompts and analyses. The page is one HTML file that needs no network and runs no script:
style, diagram and pictures are inside, and all text is escaped. page.html is its frame, with the
valence-arousal plane, and page.css its style. Rounds count from 0, as in Algorithm 1.
"""

import difflib
import functools
import io
import re
import time
from html import escape
from pathlib import Path
from string import Template

from PIL import Image

from parts import sheets
from parts.cli import UserError
from parts.files import check_writable, data_url, read_json, save_png, write_json, write_whole
from parts.ranking import rank

SMALL = 256  # pixels: PNGs up to this side enter the page as they are
MEDIUM = 512  # pixels: side of a round's picture in the page; the best one and a grid keep theirs
LOSS = "A picture's loss is |ΔV| + |ΔA|, how far off the judge sees it, 0 to 16."
PARTS = {"draw": "drawing", "judge": "judging", "rewrite": "rewriting", "total": "in all"}
# HTML has no characters for these, not even escaped.
FORBIDDEN = re.compile("[\0-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]")
MARKS = ",.;:!?、。"
KANA_HAN = "぀-ヿ㐀-鿿"  # scripts without spaces: every character counts as a word
WORD = re.compile(rf"[{KANA_HAN}]\s*|[^\s{MARKS}{KANA_HAN}]+\s*|[{MARKS}]\s*|\s+")


def write(run, folder, started=None):
    """Write run.json, contact.png and index.html into the folder of a run's pictures.

    started: when the run began (time.perf_counter), to sum up its seconds. Returns the path of
    index.html. Raises OSError for a picture that is missing or cannot be read, before anything is
    written.
    """
    folder = Path(folder)
    if started is not None:
        rounds = [round["seconds"] for cell in run["cells"] for round in cell["rounds"]]
        parts = ("draw", "judge", "rewrite")
        run["seconds"] = {part: sum(seconds[part] for seconds in rounds) for part in parts}
        run["seconds"]["total"] = time.perf_counter() - started
    text = html(run, folder)
    sheet = sheets.contact_sheet(run, folder)
    write_json(folder / "run.json", run)
    save_png(sheet, folder / "contact.png")
    return write_whole(folder / "index.html", text)


def check_folder(folder, prompt):
    """Raise UserError for a folder with pictures of another prompt, or that cannot be written."""
    file = folder / "run.json"
    if file.exists() and (before := read_json(file).get("prompt")) != prompt:
        raise UserError(f"{folder} holds pictures of {before!r}; give another --out")
    check_writable(folder)


@functools.cache
def style():
    """The style sheet, also for other pages that should look like this one."""
    return Path(__file__).with_name("page.css").read_text(encoding="utf-8")


@functools.cache
def fragments(path):
    """{name: Template} of an HTML file, where a line <!-- name --> begins each."""
    text = path.read_text(encoding="utf-8")
    parts = re.split(r"<!-- (\w+) -->\n", text)  # ["", name, fragment, name, fragment, ...]
    return dict(zip(parts[1::2], map(Template, parts[2::2]), strict=True))


def fill(fragment, **values):
    """A fragment of page.html with its $values, which must be HTML already (see `plain`)."""
    return fragments(Path(__file__).with_name("page.html"))[fragment].substitute(values)


# --------------------------------------------------------------------------------------------------
# What is kept of a feedback.Round and its judgements


def round_entry(finished, files, judge):
    """A feedback.Round as run.json holds it, with `files` in the place of its pictures.

    judge: None, if there was none to find the best and the worst.
    """
    images = []
    for picture, file in zip(finished.pictures, files, strict=True):
        said = picture.judgement
        loss = None if said.v is None else picture.loss
        images.append({"file": file, "seed": picture.seed, **vars(said), "loss": loss})
    entry = {"prompt": finished.prompt, "images": images, **vars(finished)}
    del entry["pictures"]
    if judge is None:
        entry["best"] = None
    if judge is None or len(images) == 1:
        entry["worst"] = None
    return entry


def judgement_facts(judge, said):
    """What the PNG of a picture tells of its feedback.Judgement, if there is one, and who judged.

    judge: the name of its checkpoint, or None.
    """
    if judge is None or said is None:
        return {}
    return {"judge": judge, "judged_valence": said.v, "judged_arousal": said.a,
            "judged_emotion": said.emotion, "reasoning": said.reasoning}


# --------------------------------------------------------------------------------------------------
# The page


def html(run, folder):
    """The page of a run (a dict as in run.json) as the text of one HTML document.

    A run that goes on has a page too: rounds, cells and the grid may be missing, but every cell has
    a round. folder: where the run's pictures lie. Raises OSError for one that cannot be read.
    """
    folder = Path(folder)
    cells = run["cells"]
    explained = LOSS if run["judge"] else ""
    if run["grid"] or len(cells) > 1:
        wanted = f"{len(cells)} targets of valence and arousal, each 1 to 9"
        losses = [best_of(cell)[2]["loss"] for cell in cells if best_of(cell)]
        if losses:
            mean = sum(losses) / len(losses)
            explained += f" That of the targets' best pictures is {mean:.2f} on average."
        lead = ""
        if run["grid"]:
            what = "the best picture of each target, valence to the right and arousal upwards"
            alt = f"{short(run['prompt'])}: {what}"
            lead = f"<figure>{picture(folder / run['grid'], alt)}</figure>\n"
        body = fill("cells", cells="".join(folded_cell(run, cell, folder) for cell in cells))
    else:
        wanted = f"Wanted: {target(cells[0])}, each 1 to 9"
        lead = best_picture(run, folder)
        body = round_sections(run, cells[0], folder, 2)
    # Everything that comes from people or models goes through `plain` or `paragraph`.
    names = ("prompt", "model", "steps", "size", "seed")
    settings = {name: plain(str(run[name])) for name in names}
    return fill(
        "page", title=plain(short(run["prompt"])), style=style(), wanted=wanted, lead=lead,
        explained=paragraph(explained, "soft"), body=body, judge=plain(run["judge"] or "none"),
        guidance=f"{run['guidance']:g}", seconds=times(run["seconds"]), **settings, **plane(cells))


def folded_cell(run, cell, folder):
    """One target of a grid."""
    best = best_of(cell)
    loss = f' <span class="soft">loss {best[2]["loss"]:.2f}</span>' if best else ""
    return fill("cell", v=f"{cell['v']:g}", a=f"{cell['a']:g}", loss=loss, id=anchor(cell),
                rounds=round_sections(run, cell, folder, 4))


def anchor(cell):
    """The name of a target's place in the page; a browser unfolds what a link leads into."""
    return f"v{cell['v']:g}-a{cell['a']:g}"


def best_picture(run, folder):
    """The result, the best picture of all rounds or of the last, with what the judge saw.

    Without judgements it is the first.
    """
    cell = run["cells"][0]
    best = best_of(cell)
    r, _, image = best or (0, 0, cell["rounds"][0]["images"][0])
    prompt = cell["rounds"][r]["prompt"]
    among = cell["rounds"][r:] if run.get("result") == "last" else cell["rounds"]
    count = sum(len(round["images"]) for round in among)
    head = "The picture" if count == 1 else f"The {'best' if best else 'first'} of {count} pictures"
    if best:
        said = fill("judged", v=f"{cell['v']:.2f}", a=f"{cell['a']:.2f}",
                    judged_v=f"{image['v']:.2f}", judged_a=f"{image['a']:.2f}")
    elif run["judge"]:
        said = paragraph("No answer of the judge could be read.")
    else:
        said = paragraph("There was no judge.")
    return fill("best", picture=picture(folder / image["file"], alt_text(prompt, image)), head=head,
                said=said, round=r, numbers=numbers(image), prompt=plain(prompt))


def round_sections(run, cell, folder, level):
    """The rounds of a target: each prompt against the one before, the pictures, the analysis."""
    out = ""
    last = cell["rounds"][-1]
    before = cell["rounds"][0]["prompt"]
    # Each prompt is shown against the one before, so that one sees what the judge changed.
    for r, round in enumerate(cell["rounds"]):
        best = None if round["best"] is None else round["images"][round["best"]]["loss"]
        cards = [card(run, round, i, folder) for i in range(len(round["images"]))]
        unseen = round["next_prompt"] if round is last else None
        out += fill(
            "round", level=level, shade=colour(r, rounds_of(run["cells"])), round=r,
            loss="" if best is None else f" · best loss {best:.2f}",
            prompt=changes(before, round["prompt"]), cards="".join(cards),
            analysis=paragraph(round["analysis"], before="<b>Analysis.</b> "),
            unseen=paragraph(unseen, "prompt", "The next prompt, not drawn yet: "),
            note=paragraph(round["note"], "soft"),
            seconds=paragraph(times(round["seconds"]), "soft"))
        before = round["prompt"]
    return out


def card(run, round, index, folder):
    """One picture of a round with its caption."""
    image = round["images"][index]
    mark = ""
    if index == round["best"] and image["loss"] is not None:
        mark = "best"
    elif index == round["worst"] != round["best"]:
        mark = "worst"
    # A line may break between the figures, but not within one.
    said = numbers(image, "not readable" if run["judge"] else "")
    said = said.replace(" ", "\xa0").replace("\xa0·\xa0", " · ")
    why = paragraph(image["reasoning"])
    alt = alt_text(round["prompt"], image) + (f", {mark} of its round" if mark else "")
    return fill(
        "card", mark=mark, picture=picture(folder / image["file"], alt, MEDIUM), said=said,
        tag=f"<strong>{mark}</strong>" if mark else "",
        emotion=f"<br>{plain(image['emotion'])}" if image["emotion"] else "",
        why=f"<details><summary>why</summary>{why}</details>" if why else "")


# --------------------------------------------------------------------------------------------------
# The valence-arousal plane of page.html; its unit is 1/40 of a point of the scale

CROSS = '<g class="line"><circle r="8"/><path d="M-14 0H14M0-14V14"/></g>'  # the only target
CIRCLE = '<g class="line"><circle r="5"/></g>'  # one target of several
RING = '<circle class="line" r="13"/>'  # around the result


def plane(cells):
    """What is drawn into the plane: {axes, marks, keys, label, role}.

    One cell: its target and all judged pictures, the best ones of the rounds joined by a line.
    Several: each target joined to its best picture, and both lead to the target's pictures.
    """
    one = len(cells) == 1
    rounds = rounds_of(cells)
    lines, dots, targets, heads, top = [], [], [], [], []
    for cell in cells:
        chosen = best_of(cell)
        points = [] if one else [at(cell["v"], cell["a"])]
        to = None if one else anchor(cell)
        targets.append(put(cell, CROSS if one else CIRCLE, f"target: {target(cell)}", to))
        for r, round in enumerate(cell["rounds"]):
            for i, image in enumerate(round["images"]):
                best = chosen is not None and chosen[:2] == (r, i)
                if image["v"] is None or not (one or best):
                    continue
                head = best or i == round["best"]
                mark = dot(colour(r, rounds), str(r) if head and one else "")
                title = f"round {r}: {numbers(image)}"
                if best:
                    title += ", the result"
                    mark += RING if one else ""
                (top if best else heads if head else dots).append(put(image, mark, title, to))
                if head:
                    points.append(at(image["v"], image["a"]))
        points = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        lines.append(f'<polyline class="way" points="{points}"/>\n')
    keys = [(CROSS if one else CIRCLE, "target")]
    if top:
        numbered = [str(r) if one else "" for r in range(rounds)]
        keys += [(dot(colour(r, rounds), numbered[r]), f"round {r}") for r in range(rounds)]
        keys += [(RING, "result")] if one else []
    keys = "".join(fill("key", mark=mark, text=name) for mark, name in keys)
    label = f"{len(cells)} targets and their best pictures"
    if one:
        label = f"target {target(cells[0])} and the judged pictures"
    # What is drawn later hides what lies under it, so the result comes last.
    marks = "".join(lines + dots + targets + heads + top)
    # what is inside of an img cannot be reached by keys
    role = "img" if one else "group"
    return {"axes": fill("axes"), "label": label, "keys": keys, "marks": marks, "role": role}


def at(v, a):
    """(x, y) in page.html's plane."""
    return 4 + 40 * v, 376 - 40 * a


def put(where, mark, title, to=None):
    """A mark at the V and A of a cell or an image; to: the place in the page that it leads to."""
    x, y = at(where["v"], where["a"])
    mark = fill("mark", x=f"{x:.1f}", y=f"{y:.1f}", title=title, mark=mark)
    return mark if to is None else fill("link", to=to, title=title, mark=mark)


def colour(r, rounds):
    """Of round r: from blue over purple to orange, all about as far from white as from black."""
    return f"oklch(0.6 0.16 {(265 + 150 * r / max(1, rounds - 1)) % 360:.0f})"


def dot(colour, text=""):
    """A picture; with a text, its round's number, if it is the best of its round."""
    inside = f'<text class="on" y="4">{text}</text>' if text else ""
    return f'<circle r="{9 if text else 4.5}" fill="{colour}"/>{inside}'


# --------------------------------------------------------------------------------------------------
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
    return " · ".join(
        f"{word} {seconds[part]:.1f} s" for part, word in PARTS.items() if part in seconds)


def numbers(image, lost=""):
    """Of one picture: "V 6.20 A 3.10 · loss 0.90 · seed 0"; without a judgement `lost` · seed."""
    seen = lost if image["v"] is None else f"V {image['v']:.2f} A {image['a']:.2f}"
    loss = "" if image["loss"] is None else f"loss {image['loss']:.2f}"
    return " · ".join(filter(None, (seen, loss, f"seed {image['seed']}")))


def alt_text(prompt, image):
    seen = "not judged"
    if image["v"] is not None:
        seen = f"judged valence {image['v']:.2f}, arousal {image['a']:.2f}"
    return f"{short(prompt)}: {seen}"


def changes(old, new):
    """A prompt as HTML: words that are new stand in <ins>, those that only the old had in <del>."""
    # Whole words are compared: letters would be found again in words that have nothing in common.
    old, new = (WORD.findall(FORBIDDEN.sub("\ufffd", text)) for text in (old, new))
    # Of 200 words and more, those that come again and again are not looked for (autojunk): all
    # their pairs would take minutes.
    match = difflib.SequenceMatcher(
        None, [word.strip() for word in old], [word.strip() for word in new])
    out = ""
    for kind, i, j, k, m in match.get_opcodes():
        gone = "".join(old[i:j]).strip()
        now = "".join(new[k:m])
        if kind == "equal":
            out += plain(now)
            continue
        if gone:
            # Words keep the space behind them; one that is left out may need one before it.
            space = "" if not out or out[-1].isspace() or gone[0] in MARKS else " "
            out += f"{space}<del>{plain(gone)}</del> "
        word = now.rstrip()
        out += f"<ins>{plain(word)}</ins>{now[len(word):]}" if word else now
    return out


# --------------------------------------------------------------------------------------------------
# Lines for the screen


def round_line(finished, r, least):
    """How near a feedback.Round came, the loss of the result so far (of round r), the analysis."""
    loss = finished.pictures[finished.best].loss
    lines = [f"loss {loss:.2f}, result so far {least:.2f} (round {r})", finished.note,
             finished.analysis]
    return "\n".join(f"    {line}" for line in lines if line)


def latency(run):
    """What appendix C measures, of this run, in a line."""
    if len(run["cells"]) > 1:
        return f"{len(run['cells'])} targets: {times(run['seconds'])} with loading"
    rounds = [round["seconds"] for round in run["cells"][0]["rounds"]]
    text = f"{rounds[0]['draw']:.1f} s for the first {run['images_per_round']} pictures"
    if run["judge"] is not None:
        judging = rounds[0]["judge"] + rounds[0]["rewrite"]
        text += f", {judging:.1f} s to judge them"
        if rounds[0]["rewrite"] or len(rounds) > 1:
            text += " and rewrite the prompt"
    if len(rounds) > 1:
        total = sum(sum(seconds.values()) for seconds in rounds)
        text += f", {total:.1f} s for {len(rounds)} rounds"
    return f"{text}; {run['seconds']['total']:.1f} s in all with loading"


def summary(run, folder):
    """The files of a run: the result first, then the others, the nearest to the target first."""
    if run["grid"]:
        return f"{folder / run['grid']}\n{folder / 'index.html'}"
    ranked = [(rank(image["loss"], r, i), image)
               for r, round in enumerate(run["cells"][0]["rounds"])
               for i, image in enumerate(round["images"])]
    images = [image for _, image in sorted(ranked, key=lambda pair: pair[0])]
    if run["judge"] is None:  # in the order they were drawn
        images.sort(key=lambda image: image["seed"])
    if result := best_of(run["cells"][0]):
        images.sort(key=lambda image: image is not result[2])
    lines = []
    for image in images:
        line = str(folder / image["file"])
        if image["v"] is not None:
            line += f"  V {image['v']:.2f}  A {image['a']:.2f}"
        elif run["judge"] is not None:
            line += "  its V-A answer cannot be read"
        lines.append(line + (f"  {image['emotion']}" if image["emotion"] else ""))
    if images[0]["reasoning"]:
        lines.insert(1, f"    {images[0]['reasoning']}")
    return "\n".join([*lines, str(folder / "index.html")])


# --------------------------------------------------------------------------------------------------
# Pictures


def best_of(cell):
    """(round, index, image) of a cell's result; None if no answer of a judge was readable."""
    if cell["best"] is None:
        return None
    r = cell["best"]["round"]
    i = cell["best"]["image"]
    image = cell["rounds"][r]["images"][i]
    return None if image["loss"] is None else (r, i, image)


def rounds_of(cells):
    return max(len(cell["rounds"]) for cell in cells)


def picture(path, alt, side=None):
    """An <img> that holds a file's picture: a small PNG as it is, any other as a JPEG.

    side: to which it is shrunk, in pixels.
    """
    with Image.open(path) as image:
        kind = "png"
        content = Path(path).read_bytes()
        # A large JPEG takes a fraction of the PNG; in a small picture its losses would show.
        if max(image.size) > SMALL or image.format != "PNG":
            kind = "jpeg"
            image = image.convert("RGB")
            image.thumbnail((side or image.width, side or image.height))
            buffer = io.BytesIO()
            image.save(buffer, "JPEG", quality=90)
            content = buffer.getvalue()
        width, height = image.size
    # Inside the page, so that it can be sent as one file and opened without a network.
    return (f'<img src="{data_url(content, kind)}" width="{width}" height="{height}" '
            f'alt="{plain(alt)}">')
