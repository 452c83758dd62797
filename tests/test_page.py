"""The page of a run: valid, complete, safe with any text, and pleasant in a browser."""

import base64
import copy
import io
import json
import re
import shutil
import subprocess
from html import escape
from html.parser import HTMLParser
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from parts import page
from tests.browser import FLAGS, program

BLUE, GREY = (0, 120, 255), (90, 90, 90)
PROMPTS = ["a swan on the lake, calm", "a swan on the lake, soft light, calm", "a swan on the still lake, soft light"]
VOID = {"meta", "link", "img", "br"}
BLOCKS = set("p div figure figcaption section header main table ul li details h1 h2 h3 h4 summary".split())
INLINE_INSIDE = set("p h1 h2 h3 h4 span strong b ins del title".split())  # no blocks in these
CHILDREN = {"ul": {"li"}, "table": {"thead", "tbody"}, "thead": {"tr"}, "tbody": {"tr"}, "tr": {"td", "th"}}


class Parsed(HTMLParser):
    """A strict reading of a page: fails for wrong nesting; keeps tags with their attributes, and text with its tags."""

    def __init__(self, source):
        super().__init__()
        self.open, self.tags, self.texts = [], [], []
        self.feed(source)
        self.close()
        assert not self.open

    def handle_decl(self, decl):
        assert decl == "DOCTYPE html" and not self.tags

    def handle_starttag(self, tag, attrs):
        assert len(dict(attrs)) == len(attrs), f"an attribute twice in {tag}"
        assert tag not in BLOCKS or not INLINE_INSIDE & set(self.open), f"{tag} within {self.open}"
        assert not self.open or tag in CHILDREN.get(self.open[-1], {tag}), f"{tag} within {self.open}"
        assert tag != "summary" or self.open[-1] == "details"
        assert tag != "figcaption" or self.open[-1] == "figure"
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        assert "svg" in self.open, f"{tag} closes itself outside of SVG"
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        self.texts.append((text, tuple(self.open)))

    def all(self, tag):
        return [attrs for name, attrs in self.tags if name == tag]

    def text(self, *within, without=()):
        return "".join(text for text, tags in self.texts if set(within) <= set(tags) and not set(without) & set(tags))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    for name, colour, side in (("blue", BLUE, 32), ("grey", GREY, 32), ("large", BLUE, 600), ("grid5", GREY, 300)):
        Image.new("RGB", (side, side), colour).save(folder / f"{name}.png")
    return folder


def an_image(seed, v, a, target, file="grey.png"):
    loss = None if v is None else abs(v - target[0]) + abs(a - target[1])
    return {"file": file, "seed": seed, "v": v, "a": a, "emotion": "awe" if seed % 2 else None, "loss": loss,
            "reasoning": f"Still water {seed}."}


def a_cell(v, a, rounds, images):
    out, best = [], None
    for r in range(rounds):
        seen = [an_image(r * images + i, min(9, v + (i + 1) / (r + 1)), max(1, a - i / 2), (v, a)) for i in range(images)]
        out.append({"prompt": PROMPTS[r % 3], "images": seen, "best": 0, "worst": images - 1, "note": "",
                    "next_prompt": None, "analysis": f"Analysis {r}: too lively." if r + 1 < rounds else None,
                    "seconds": {"draw": 1.5, "judge": 0.5, "rewrite": 0.25}})
        if best is None or seen[0]["loss"] < out[best["round"]]["images"][0]["loss"]:
            best = {"round": r, "image": 0}
    out[best["round"]]["images"][0]["file"] = "blue.png"
    return {"v": v, "a": a, "rounds": out, "best": best}


def a_run(cells, **other):
    return {"model": "the miniature", "judge": "tiny/weights/judge", "prompt": "a swan on the lake", "steps": 25, "size": 32,
            "guidance": 4.5, "seed": 0, "grid": None, "cells": cells,
            "seconds": {"draw": 4.5, "judge": 1.5, "rewrite": 0.75, "total": 6.8}, **other}


def unjudged(run, judge):
    for cell in run["cells"]:
        cell["best"] = judge and {"round": 0, "image": 0}
        for round in cell["rounds"]:
            round |= {"best": judge and 0, "worst": judge and 0, "analysis": None}
            for image in round["images"]:
                image |= {"v": None, "a": None, "loss": None, "emotion": None, "reasoning": ""}
    return {**run, "judge": judge}


def half_read():
    run = a_run([a_cell(7.0, 3.0, 2, 3)])
    run["cells"][0]["rounds"][1]["images"][2] |= {"v": None, "a": None, "loss": None}
    run["cells"][0]["rounds"][1] |= {"note": "the prompt is kept", "next_prompt": "a swan at dawn"}
    return run


def running():
    """A grid that goes on: cells and the picture of it are missing, and one cell needed no second round."""
    run = a_run([a_cell(v, a, 2, 3) for v, a in GRID[:7]])
    run["cells"][3] = a_cell(7.0, 9.0, 1, 3)
    return run


GRID = [(v, a) for a in (9.0, 7.0, 5.0, 3.0, 1.0) for v in (1.0, 3.0, 5.0, 7.0, 9.0)]
RUNS = {
    "three rounds": a_run([a_cell(7.0, 3.0, 3, 4)]),
    "one picture": a_run([a_cell(7.0, 3.0, 1, 1)]),
    "no judge": unjudged(a_run([a_cell(7.0, 3.0, 1, 3)]), None),
    "nothing readable": unjudged(a_run([a_cell(7.0, 3.0, 2, 3)]), "a judge"),
    "some not readable": half_read(),
    "grid": a_run([a_cell(v, a, 2, 2) for v, a in GRID], grid="grid5.png"),
    "grid that goes on": running(),
    "grid of one picture each": a_run([a_cell(v, a, 1, 1) for v, a in GRID], grid="grid5.png"),
    "grid without judge": unjudged(a_run([a_cell(v, a, 1, 1) for v, a in GRID], grid="grid5.png"), None),
}


@pytest.mark.parametrize("name", RUNS)
def test_the_page_is_valid_html_that_loads_nothing_and_describes_every_picture(name, folder):
    source = page.html(RUNS[name], folder)
    parsed = Parsed(source)
    assert source.startswith("<!DOCTYPE html>\n") and parsed.all("html") == [{"lang": "en"}]
    assert any(meta.get("name") == "viewport" for meta in parsed.all("meta")) and parsed.text("title", without=["svg"])
    ids = [attrs["id"] for _, attrs in parsed.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    markup = re.sub(r"<style>.*?</style>", "", source, flags=re.DOTALL)
    assert not re.search(r"&(?!(amp|lt|gt|quot|#x27);)", markup)
    assert "http:" not in source and "https:" not in source and "url(" not in source and "@import" not in source
    for tag, attrs in parsed.tags:
        assert tag not in ("script", "iframe", "object", "embed") and not any(key.startswith("on") for key in attrs)
        links = [attrs[key] for key in ("src", "href") if key in attrs]
        assert all(to.startswith("data:") or to.removeprefix("#") in ids for to in links)
    images = sum(len(round["images"]) for cell in RUNS[name]["cells"] for round in cell["rounds"])
    assert len(parsed.all("img")) == images + (name != "grid that goes on")
    assert all("a swan on the" in img["alt"] and int(img["width"]) == int(img["height"]) > 0 for img in parsed.all("img"))
    levels = [int(tag[1]) for tag, _ in parsed.tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1 and levels.count(1) == 1 and all(b <= a + 1 for a, b in pairwise(levels))
    plane = [svg for svg in parsed.all("svg") if "aria-hidden" not in svg]
    assert len(plane) == 1 and plane[0]["role"] == ("group" if "grid" in name else "img") and "alence" in plane[0]["aria-label"]
    for text in ("the miniature", "25", "4.5", "32 px", "in all 6.8 s", RUNS[name]["judge"] or "none"):
        assert text in parsed.text("table")


def test_every_round_shows_its_prompt_numbers_marks_and_analysis(folder):
    parsed = Parsed(page.html(RUNS["three rounds"], folder))
    cards = parsed.text("figcaption", without=["ul", "details"]).replace("\xa0", " ")
    assert cards.startswith("bestV 8.00 A 3.00 · loss 1.00 · seed 0V 9.00 A 2.50 · loss 2.50 · seed 1aweV 9.00")
    assert "worstV 9.00 A 1.50 · loss 3.50 · seed 3awe" in cards
    assert parsed.text("h2").startswith("The best of 12 picturesRound 0 · best loss 1.00Round 1 · best loss 0.50Round 2")
    assert parsed.text("strong") == "bestworst" * 3 and "Still water 3." in parsed.text("details")
    assert "Analysis 0: too lively" in parsed.text("p") and "drawing 1.5 s · judging 0.5 s" in parsed.text("p")
    assert parsed.text("tbody", "td").startswith("7.007.333.003.00")  # the best picture: wanted, judged
    assert parsed.all("img")[0]["alt"] == f"{PROMPTS[2]}: judged valence 7.33, arousal 3.00"
    assert parsed.all("img")[1]["alt"] == f"{PROMPTS[0]}: judged valence 8.00, arousal 3.00, best of its round"


def test_what_was_not_judged_is_said(folder):
    texts = {name: Parsed(page.html(RUNS[name], folder)).text("main").replace("\xa0", " ") for name in RUNS}
    assert "There was no judge." in texts["no judge"] and "loss" not in texts["no judge"]
    assert "No answer of the judge could be read." in texts["nothing readable"]
    assert "best" not in texts["nothing readable"] and "worst" not in texts["nothing readable"]
    assert "not readable · seed 5" in texts["some not readable"]
    assert "the prompt is kept" in texts["some not readable"]
    assert "The next prompt, not drawn yet: a swan at dawn" in texts["some not readable"]
    assert "The picture\n" in texts["one picture"] and "worst" not in texts["one picture"]


def test_the_plane_has_every_judged_picture_and_target_at_its_place(folder):
    run = RUNS["some not readable"]
    svg = re.search(r'<svg viewBox="0 0 380 384".*?</svg>', page.html(run, folder), re.DOTALL)[0]
    places = [(float(x), float(y)) for x, y in re.findall(r'<g transform="translate\(([\d.]+) ([\d.]+)\)"><title>', svg)]
    seen = [(image["v"], image["a"]) for round in run["cells"][0]["rounds"] for image in round["images"] if image["v"]]
    expected = [(4 + 40 * v, 376 - 40 * a) for v, a in [(7, 3), *seen]]
    assert np.allclose(sorted(places), sorted(expected), atol=0.05) and len(seen) == 5
    assert "target: valence 7, arousal 3" in svg and svg.count(", the result") == 1
    assert "valence</text>" in svg and "arousal</text>" in svg
    svg = re.search(r'<svg viewBox="0 0 380 384".*?</svg>', page.html(RUNS["grid"], folder), re.DOTALL)[0]
    assert svg.count("<title>target: ") == svg.count("the result</title>") == svg.count("<polyline") == 25


def test_the_plane_of_a_grid_leads_to_each_targets_pictures(folder):
    source = page.html(RUNS["grid"], folder)
    links = re.findall(r'<a href="#([^"]+)" aria-label="(target: [^"]+)?', source)
    assert len(links) == 50 and ("v1-a9", "target: valence 1, arousal 9") in links
    for to, _ in links:
        cell = source.split(f'<div id="{to}">')[1].split("</details>")[0]
        head = source.split(f'<div id="{to}">')[0].rsplit("<h3>", 1)[1]
        v, a = re.fullmatch(r"v(.+)-a(.+)", to).groups()
        assert head.startswith(f"V {v} A {a}") and "Round 0" in cell
    assert "<a " not in page.html(RUNS["three rounds"], folder)


# ---------------------------------------------------------------------------------------------------------------------
# Text


HOSTILE = ["<script>alert(1)</script>", '" onload="alert(1)', "' & &amp; &lt;b&gt;", "</style></title></svg>", "x" * 500,
           "湖の上の白鳥、穏やか", "بجعة على البحيرة", "हंस"]


def bare(text):
    """A text without spaces, and with what an HTML page shows in place of control characters."""
    return "".join(page.FORBIDDEN.sub("\ufffd", text).split())


@given(prompt=st.sampled_from(HOSTILE) | st.text(min_size=1), other=st.sampled_from(HOSTILE) | st.text(min_size=1))
@settings(max_examples=50, deadline=None)
def test_any_text_comes_out_as_text(folder, prompt, other):
    run = copy.deepcopy(RUNS["one picture"])
    run |= {"prompt": prompt, "model": other, "judge": other}
    round = run["cells"][0]["rounds"][0]
    round |= {"prompt": prompt, "analysis": other, "note": other, "next_prompt": other}
    round["images"][0] |= {"emotion": other, "reasoning": other}
    parsed = Parsed(page.html(run, folder))
    prompt, other = bare(prompt), bare(other)
    for expected in (f"prompt{prompt}model{other}judge{other}steps", f"seed0{other}why{other}", f"Analysis.{other}",
                     f"notdrawnyet:{other}{other}drawing", prompt + "bestV8.00"):
        assert expected in bare(parsed.text(without=["h1"]))
    assert prompt[:50] in bare(parsed.all("img")[0]["alt"])
    assert not parsed.all("script") and all(set(img) == {"src", "width", "height", "alt"} for img in parsed.all("img"))


def test_lone_surrogates_and_control_characters_do_not_break_the_file(folder):
    run = copy.deepcopy(RUNS["one picture"])
    run["cells"][0]["rounds"][0]["prompt"] = "a swan on the\0lake\udcff\x1b[0m"
    Parsed(page.html(run, folder).encode().decode())


def test_changed_words_are_marked_and_others_are_not():
    html = page.changes("a swan on the lake, pleasant and calm", "a white swan on the lake, soft light")
    assert html == "a <ins>white</ins> swan on the lake, <del>pleasant and calm</del> <ins>soft light</ins>"
    assert page.changes("a swan, calm", "a swan, calm") == "a swan, calm"
    assert page.changes("the sky with clouds", "the sky, flowers") == "the sky <del>with clouds</del> <ins>, flowers</ins>"
    assert page.changes("白い鳥", "白い花鳥") == "白い<ins>花</ins>鳥"
    assert "<ins>" not in page.changes("a swan  on\nthe lake", "a swan on the lake")


words = st.lists(st.sampled_from("a swan lake light , <b> & 湖 湖上".split() + ["\n"]), max_size=12).map(" ".join)


@given(words | st.text(), words | st.text())
def test_without_the_marked_words_both_prompts_are_left(old, new):
    parsed = Parsed(f"<div>{page.changes(old, new)}</div>")
    for prompt, tag in ((new, "del"), (old, "ins")):
        assert bare(parsed.text(without=[tag])) == bare(prompt)


# ---------------------------------------------------------------------------------------------------------------------
# Pictures and files


def test_small_pictures_are_held_as_they_are_and_large_ones_as_jpeg(folder):
    small = page.picture(folder / "blue.png", "blue")
    assert base64.b64encode((folder / "blue.png").read_bytes()).decode() in small
    for side, expected in ((None, 600), (512, 512)):
        tag = page.picture(folder / "large.png", '"large"', side)
        assert f'width="{expected}" height="{expected}" alt="&quot;large&quot;"' in tag
        image = Image.open(io.BytesIO(base64.b64decode(re.search("data:image/jpeg;base64,([^\"]+)", tag)[1])))
        assert image.size == (expected, expected) and np.abs(np.array(image, int) - BLUE).max() < 6


def test_write_leaves_three_files_and_run_json_loads_back(folder, tmp_path):
    for picture in folder.glob("*.png"):
        shutil.copy(picture, tmp_path)
    before = {path.name for path in tmp_path.iterdir()}
    assert page.write(RUNS["grid"], tmp_path) == tmp_path / "index.html"
    assert {path.name for path in tmp_path.iterdir()} - before == {"run.json", "contact.png", "index.html"}
    assert json.loads((tmp_path / "run.json").read_text(encoding="utf-8")) == RUNS["grid"]
    assert (tmp_path / "index.html").read_text(encoding="utf-8") == page.html(RUNS["grid"], tmp_path)
    assert Image.open(tmp_path / "contact.png").format == "PNG"


def test_a_missing_picture_is_an_error_before_anything_is_written(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"blue\.png"):
        page.write(RUNS["one picture"], tmp_path)
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------------------------------------------------
# In a browser


def chromium(tmp_path, *arguments):
    """What Chromium writes to its output, run without a window in an empty profile."""
    return subprocess.run([program(), *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", *arguments], check=True, timeout=120,
                          stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True).stdout


MEASURE = """<script>onload = () => { document.body.innerHTML = [...document.querySelectorAll("iframe")].map(frame => {
  const page = frame.contentDocument;
  page.querySelectorAll("details").forEach(details => details.open = true);
  const loaded = [...page.images].filter(image => image.naturalWidth > 0).length;
  return `${frame.width} ${page.documentElement.scrollWidth} ${loaded} ${page.images.length}`;
}).join("\\n") }</script>"""


def test_in_a_browser_it_fits_desktop_and_phone_in_light_and_dark(folder, tmp_path):
    run = copy.deepcopy(RUNS["three rounds"])
    run |= {"prompt": "swan" * 100, "model": "folder/" * 40}
    run["cells"][0]["rounds"][1] |= {"prompt": "swan" * 100 + ' <script>document.body.remove()</script>', "note": "n" * 300}
    (tmp_path / "index.html").write_text(page.html(run, folder), encoding="utf-8")
    frames = [(page.html(one, folder), width) for one in (run, RUNS["grid"]) for width in (1280, 768, 390, 320)]
    frames = "".join(f'<iframe width="{width}" height="800" srcdoc="{escape(text)}"></iframe>' for text, width in frames)
    (tmp_path / "frames.html").write_text(f"<!DOCTYPE html><meta charset=utf-8><body>{frames}{MEASURE}", encoding="utf-8")
    said = chromium(tmp_path, "--virtual-time-budget=5000", "--dump-dom", f"file://{tmp_path}/frames.html")
    sizes = re.findall(r"(\d+) (\d+) (\d+) (\d+)", said)
    assert len(sizes) == 8, said[-2000:]
    for width, content, loaded, images in ((int(x) for x in size) for size in sizes):
        assert content <= width and loaded == images > 0

    for scheme, (width, height) in ((s, size) for s in ("light", "dark") for size in ((1280, 900), (390, 844))):
        shot = tmp_path / f"{scheme}{width}.png"
        chromium(tmp_path, f"--blink-settings=preferredColorScheme={int(scheme == 'light')}",
                 f"--window-size={width},{height}", f"--screenshot={shot}", f"file://{tmp_path}/index.html")
        pixels = np.array(Image.open(shot).convert("RGB")).astype(int)
        assert pixels.shape == (height, width, 3)
        light = pixels.mean(2)
        assert (light[:, 0] > 230).all() if scheme == "light" else (light[:, 0] < 50).all()  # the page's edge
        header = light[:150, 16:-16]
        assert np.ptp(header) > 150  # its text
        blue = (np.abs(pixels - BLUE).max(2) < 8)  # the best picture, large
        across = blue.sum(1).max()
        assert 330 < across <= 390 - 2 * 16 if width == 390 else 400 < across < 640
        assert blue.sum() > 0.5 * across**2
        if width == 1280:  # the plane beside it: dots of the rounds' colours
            right = pixels[:, 700:]
            assert 50 < ((np.ptp(right, axis=2) > 90) & ~blue[:, 700:]).sum() < 20_000
