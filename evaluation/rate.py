"""A local page on which people rate pictures blind (EmoFeedback2: user study, section 4.3.3; human V and A, 4.4.3).

    python rate.py --cases tiny/cache/dataset/test.jsonl --images words=out/words --images numbers=out/numbers

Every rater sees the cases in an order of their own, and the methods' pictures of a case as A, B, C in an order of their
own. Each picture gets valence and arousal, 1..9, and quality, 1..5; with several methods one picture of a case is chosen as
the one that best conveys the target emotion. That question comes on a second page, the only one to tell prompt and target:
a rater who has read "very calm" would rate the wish and not the picture. It carries the ratings along, out of sight.

Nothing that a browser receives tells the method: a picture's address holds the rater, the case and the place on the page,
and its pixels are encoded anew, all as PNG, without the texts that our files carry. The page answers this machine only and
runs no script. All rows of a case are written at once, so that a session can be broken off and gone on with at any time.
"""

import argparse
import csv
import hashlib
import io
import os
import random
import re
import sys
import threading
from collections import Counter
from dataclasses import dataclass
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qsl, urlencode

from PIL import Image, ImageOps

import data
from evaluation.cases import load_cases, picture_of
from parts import cli
from parts.cli import UserError, say
from parts.page import STYLE, paragraph, plain

COLUMNS = ["time", "rater", "case", "method", "v", "a", "quality", "best"]
SCALES = {  # of each picture: the question's name, the highest value, and words for 1 and for the highest value
    "v": ("Valence", 9, "very unpleasant", "very pleasant"),
    "a": ("Arousal", 9, "very calm", "very excited"),
    "quality": ("Quality", 5, "poor", "excellent"),
}
NAME = re.compile(r"(?=.*\w)[\w .-]{1,40}")  # of a rater
LIMIT = 100_000  # bytes of a form
POLICY = "default-src 'none'; img-src 'self'; style-src 'unsafe-inline'; form-action 'self'"

# ---------------------------------------------------------------------------------------------------------------------
# The file of ratings


def lines(rows):
    """Rows as lines of CSV."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(
        [*(row[name] for name in COLUMNS[:4]), *(f"{row[name]:.15g}" for name in SCALES),
         "" if row["best"] is None else int(row["best"])] for row in rows)
    return text.getvalue()


def parse(content, path):
    """The rows in the bytes of a ratings file; `path` is named in errors."""
    rows, seen, line = [], set(), 1
    try:
        reader = csv.reader(io.StringIO(content.decode(), newline=""), strict=True)
        if next(reader, None) != COLUMNS:
            raise ValueError(f"expected the columns {','.join(COLUMNS)}")
        for cells in reader:
            line = reader.line_num
            if len(cells) != len(COLUMNS) or not all(cells[:-1]) or cells[-1] not in ("", "0", "1"):
                raise ValueError(f"expected {','.join(COLUMNS)}, with 0, 1 or nothing for best")
            if (key := tuple(cells[1:4])) in seen:
                raise ValueError("this rater, case and method a second time")
            seen.add(key)
            datetime.fromisoformat(cells[0])
            v, a = data.check_va(*cells[4:6])
            if not 1 <= float(cells[6]) <= 5:
                raise ValueError(f"quality must be a number in 1..5, got {cells[6]!r}")
            values = (v, a, float(cells[6]), cells[7] == "1" if cells[7] else None)
            rows.append(dict(zip(COLUMNS, (*cells[:4], *values))))
    except (ValueError, csv.Error) as error:
        raise UserError(f"{path}, line {line}: {error}; mend or remove the line, or give another file") from error
    return rows


def read_ratings(path):
    """The rows of a ratings file as dicts with the keys COLUMNS: v and a 1..9 and quality 1..5 as float; best True, False
    or, of a single method, None; time (ISO 8601), rater, case and method as text. Raises UserError, which names the
    line, for a file that is missing or cannot be used."""
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file; expected ratings that rate.py has written")
    content = Path(path).read_bytes()
    if content and not content.endswith(b"\n"):
        raise UserError(f"{path}, line {len(content.splitlines())}: broken off; start rate.py with this file once "
                                f"more, which removes what is incomplete")
    return parse(content, path)


def resume(path, pictures):
    """The {(rater, case)} in a ratings file, which is made if there is none; pictures: {(case, method): ...} to be rated.

    What a sudden end can leave, half a line or some rows of the last case, is removed, so that the case is asked again.
    Raises UserError for a file that rates other pictures."""
    content, count = path.read_bytes() if path.is_file() else b"", len({method for _, method in pictures})
    rows = parse(content[:content.rfind(b"\n") + 1], path) if content else []
    rated = Counter((row["rater"], row["case"]) for row in rows)
    last = (rows[-1]["rater"], rows[-1]["case"]) if rows else None
    others = [row for row in rows if (row["case"], row["method"]) not in pictures]
    others += [row for row in rows if last != (key := (row["rater"], row["case"])) and rated[key] < count]
    if others:
        raise UserError("{}: {rater} has rated case {case!r} of method {method!r} among other cases or methods than "
                                "are given now; give those, or another --out".format(path, **others[0]))
    if rows and rated[last] < count:
        say(f"{path}: the ratings of {last[0]} for case {last[1]!r} broke off; the case will be asked again")
        rows = [row for row in rows if (row["rater"], row["case"]) != last]
        del rated[last]
    whole = (",".join(COLUMNS) + "\n" + lines(rows)).encode()
    if whole != content:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_bytes(whole)
        os.replace(temporary, path)
    return set(rated)


def append(path, text):
    """Add lines to a file: all of them or, if that raises OSError, none."""
    end = os.path.getsize(path)
    try:
        with open(path, "ab") as f:
            f.write(text.encode())
            f.flush()
            os.fsync(f.fileno())
    except OSError:
        os.truncate(path, end)
        raise


# ---------------------------------------------------------------------------------------------------------------------
# What is asked


@dataclass(frozen=True)
class Study:
    cases: dict  # {token, by which browsers know a case: Case}
    pictures: dict  # {(case id, method): path}
    methods: list
    seed: int
    out: Path
    done: set  # {(rater, case id)} in the file
    lock: threading.Lock  # of `done` and the file


def methods_of(study, rater, case):
    """The methods whose pictures a rater sees as A, B, C... of a case."""
    return random.Random(repr((study.seed, rater, case.id))).sample(study.methods, len(study.methods))


def count_rated(study, rater):
    return sum((rater, case.id) in study.done for case in study.cases.values())


def save(study, rater, case, form):
    """Write the rows of a case, whose answers are complete, unless they are written already."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    rows = [{"time": now, "rater": rater, "case": case.id, "method": method,
             **{scale: int(form[f"{scale}{i}"]) for scale in SCALES},
             "best": form["best"] == str(i) if len(study.methods) > 1 else None}
            for i, method in enumerate(methods_of(study, rater, case))]
    with study.lock:
        if (rater, case.id) not in study.done:
            append(study.out, lines(rows))
            study.done.add((rater, case.id))
            say(f"{rater}: case {count_rated(study, rater)} of {len(study.cases)}")


def pixels(path):
    """A picture as a PNG that holds its pixels and nothing else."""
    with Image.open(path) as image:
        image = ImageOps.exif_transpose(image).convert("RGB")
    content = io.BytesIO()
    Image.frombytes("RGB", image.size, image.tobytes()).save(content, "PNG", compress_level=1)
    return content.getvalue()


# ---------------------------------------------------------------------------------------------------------------------
# Pages

LOOK = STYLE + """
.cards, .card:only-child { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(19rem, 100%), 1fr)) }
.cards { gap: 1.25rem } .card:not(:only-child) { max-width: 30rem }
.card > div, label.card span { display: block; padding: .8rem 1rem }
.card h2 { margin: 0 } fieldset { border: 0; margin: 0; padding: 0; min-width: 0 } .card fieldset { margin-top: .7rem }
legend, .alert { padding: 0; font-weight: 600 } .alert, .missing legend { color: var(--gone) } th { white-space: nowrap }
.choices { display: grid; grid-auto-flow: column; grid-auto-columns: 1fr; gap: 3px; margin: .2rem 0 }
.choices label { position: relative; text-align: center; font-variant-numeric: tabular-nums }
input[type=radio] { position: absolute; inset: 0; width: 100%; height: 100%; margin: 0; opacity: 0; cursor: pointer }
.choices span { display: block; padding: .35rem 0; border: 1px solid var(--rule); border-radius: 5px }
.missing .choices span { border-color: var(--gone) } .ends { display: flex; justify-content: space-between; margin: 0 }
input:hover + span { background: var(--new) } input:checked + span { background: #1c7a4a; color: #fff }
input:focus-visible + span { outline: 3px solid #5b8def; outline-offset: -1px }
button, input[name=rater] { font: inherit; padding: .6rem 1.5rem; border: 1px solid var(--soft); border-radius: 6px }
input[name=rater] { display: block; width: min(22rem, 100%); margin: .3rem 0 1rem; padding: .6rem; background: var(--card) }
button { background: #1c7a4a; color: #fff; font-weight: 600; cursor: pointer }
"""


def document(title, lead, body):
    """A page: its heading (plain text), and HTML for what stands below that and for the rest."""
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{plain(title)}</title>
<style>{LOOK}</style>
</head>
<body>
<header><h1 dir="auto">{plain(title)}</h1>
{lead}</header>
<main>
{body}</main>
</body>
</html>
"""


def start_page(study, rater="", said=""):
    """What will be asked, and the question for the rater's name."""
    several = len(study.methods) > 1
    rows = "".join(f'<tr><th scope="row">{name}</th><td>1 {low}</td><td>{highest} {high}</td></tr>\n'
                   for name, highest, low, high in SCALES.values())
    best = ("You are then told what the pictures were meant to convey, and choose the one that conveys it best."
            if several else "")
    return document("How do these pictures feel?", "", f"""\
<p>You will see {len(study.cases)} pages with {f"{len(study.methods)} pictures each" if several else "a picture each"}. Rate
how unpleasant or pleasant the feeling is that a picture conveys, how calm or excited, and how good the picture is:</p>
<table><tbody>
{rows}</tbody></table>
{paragraph(best)}<p>No answer is wrong: your first impression counts. A page is kept when you send it, and you can go on at
any time under the same name.</p>
<form action="/case" method="get">
{paragraph(said, "alert")}<label>Your name, or another that you will remember
<input name="rater" value="{plain(rater)}" maxlength="40" required></label>
<button>Start</button>
</form>
""")


def question(study, rater, token, title, lead, fields, button):
    """A page about a case: a form with fields (HTML), below the rater's progress."""
    progress = f"{count_rated(study, rater) + 1} of {len(study.cases)}"
    return document(title, paragraph(progress, "soft") + lead, f"""<form action="/case" method="post">
<input type="hidden" name="rater" value="{plain(rater)}"><input type="hidden" name="case" value="{token}">
{fields}<p><button>{button}</button></p>
</form>
""")


def picture(rater, token, i):
    address = urlencode({"rater": rater, "case": token, "at": i})
    return f'<img src="/picture?{plain(address)}" alt="picture {chr(65 + i)}">'


def scale(name, i, form, missing):
    """The radio buttons of one scale for picture i."""
    title, highest, low, high = SCALES[name]
    choices = "".join(f'<label><input type="radio" name="{name}{i}" value="{n}" required'
                      f'{" checked" if form.get(f"{name}{i}") == str(n) else ""}><span>{n}</span></label>\n'
                      for n in range(1, highest + 1))
    kind, ask = ("missing", ": please choose") if (i, name) in missing else ("", "")
    return (f'<fieldset class="{kind}" aria-describedby="{name}{i}"><legend>{title}{ask}</legend>\n<div class="choices">'
            f'{choices}</div>\n<p class="ends soft" id="{name}{i}"><span>1 {low}</span> <span>{highest} {high}</span></p>'
            f"</fieldset>\n")


def ratings_page(study, rater, token, form, missing=()):
    """The pictures of a case with their scales, and neither the prompt nor the target."""
    cards = "".join(f'<div class="card" role="group" aria-labelledby="picture{i}">{picture(rater, token, i)}<div>'
                    f'<h2 id="picture{i}">Picture {chr(65 + i)}</h2>\n{"".join(scale(s, i, form, missing) for s in SCALES)}'
                    f"</div></div>\n" for i in range(len(study.methods)))
    lost = ", ".join(f"{SCALES[name][0].lower()} of picture {chr(65 + i)}" for i, name in missing)
    return question(study, rater, token, "How does it feel?", paragraph(lost, "alert", "Please choose as well: "),
                    f'<div class="cards">{cards}</div>\n', "Next" if len(study.methods) > 1 else "Send")


def best_page(study, rater, token, form, said):
    """The pictures of a case again, now with the target; the ratings are carried along."""
    case, count = study.cases[token], len(study.methods)
    ratings = "".join(f'<input type="hidden" name="{name}{i}" value="{form[f"{name}{i}"]}">\n'
                      for i in range(count) for name in SCALES)
    cards = "".join(f'<label class="card">{picture(rater, token, i)}<input type="radio" name="best" value="{i}" required>'
                    f"<span>Picture {chr(65 + i)}</span></label>\n" for i in range(count))
    words = f"{data.emotion_words(case.v, case.a)} (valence {case.v:.1f}, arousal {case.a:.1f})"
    lead = (paragraph(words, "prompt", '<span class="soft">The emotion:</span> ')
            + paragraph(case.neutral, "prompt", '<span class="soft">The scene:</span> ') + paragraph(said, "alert"))
    return question(study, rater, token, "What the pictures were meant to convey", lead,
                    f'{ratings}<input type="hidden" name="target" value="shown"><fieldset><legend>Which picture best '
                    f'conveys this emotion?</legend>\n<div class="cards">{cards}</div></fieldset>\n', "Send")


def next_page(study, rater):
    """The first case that the rater has not rated, or thanks."""
    for token in random.Random(repr((study.seed, rater))).sample(list(study.cases), len(study.cases)):
        if (rater, study.cases[token].id) not in study.done:
            return ratings_page(study, rater, token, {})
    return document(f"Thank you, {rater}!", "", paragraph("All pages are rated and kept. You can close this window."))


# ---------------------------------------------------------------------------------------------------------------------
# The server


class Handler(BaseHTTPRequestHandler):
    """Answers a request about server.study."""
    timeout = 60  # seconds that a browser may take to send it

    def log_message(self, *_):
        return  # `save` says how far the raters are; not every request

    def do_GET(self):
        path, _, query = self.path.partition("?")
        self.answer(path, dict(parse_qsl(query)))

    def do_POST(self):
        length = self.headers.get("Content-Length", "")
        if re.fullmatch("[0-9]{1,9}", length) and int(length) <= LIMIT:
            self.answer(self.path, dict(parse_qsl(self.rfile.read(int(length)).decode("ascii", "replace"))))
        else:
            self.send(413, document("This is not a form of these pages", "", ""))

    def answer(self, path, form):
        study, rater, token, at = self.server.study, form.get("rater", "").strip(), form.get("case"), form.get("at")
        case, places = study.cases.get(token), [str(i) for i in range(len(study.methods))]
        following = "/case?" + urlencode({"rater": rater})
        missing = [(int(i), name) for i in places for name, (_, highest, *_) in SCALES.items()
                   if form.get(name + i) not in map(str, range(1, highest + 1))]
        if self.foreign():
            self.send(403, document("These pages are for this machine only", "", ""))
        elif path == "/":
            self.send(200, start_page(study))
        elif path == "/picture" and case and at in places:
            self.send(200, pixels(study.pictures[case.id, methods_of(study, rater, case)[int(at)]]), "image/png")
        elif path != "/case":
            self.send(404, document("There is no such page", "", '<p><a href="/">Start</a></p>\n'))
        elif not NAME.fullmatch(rater):
            self.send(422, start_page(study, rater, "Please give a name: 1 to 40 letters, digits, spaces, or any of - _ ."))
        elif self.command == "GET":
            self.send(200, next_page(study, rater))
        elif not case or (rater, case.id) in study.done:
            self.send(303, "", Location=following)
        elif missing:
            self.send(422, ratings_page(study, rater, token, form, missing))
        elif len(places) > 1 and form.get("best") not in places:
            status, said = (422, "Please choose a picture.") if "target" in form else (200, "")
            self.send(status, best_page(study, rater, token, form, said))
        else:
            try:
                save(study, rater, case, form)
            except OSError as error:
                say(f"error: {study.out}: ratings of {rater} cannot be written: {error.strerror}; they can be sent again")
                self.send(500, document("Your answers could not be kept. Please go back and send them again", "", ""))
            else:
                self.send(303, "", Location=following)

    def foreign(self):
        """Whether another site may stand behind the request: under a name that leads here, or with a form of its own."""
        port = self.server.server_port
        hosts = [f"{name}:{port}" for name in ("127.0.0.1", "localhost")] + ["127.0.0.1", "localhost"] * (port == 80)
        origin = self.headers.get("Origin") if self.command == "POST" else None
        return self.headers.get("Host") not in hosts or origin not in (None, *(f"http://{host}" for host in hosts))

    def send(self, status, content, kind="text/html; charset=utf-8", **headers):
        content = content if isinstance(content, bytes) else content.encode()
        self.send_response(status)
        for name, value in ({"Content-Type": kind, "Content-Length": str(len(content)), "Cache-Control": "no-store",
                             "Content-Security-Policy": POLICY, "X-Content-Type-Options": "nosniff"} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)


def prepare(args):
    """The Study of the arguments, with every picture looked at. Raises UserError or OSError."""
    folders, cases, pictures, lost = {}, load_cases(args.cases), {}, []
    for text in args.images:
        name, _, folder = text.partition("=")
        if not name or not folder or name in folders or len(folders) == 26:
            raise UserError(f"--images {text}: expected NAME=FOLDER, each name once and at most 26")
        folders[name] = folder
    for name in (*folders, *(case.id for case in cases)):
        if not name or not name.isprintable():
            raise UserError(f"{name!r}: expected printable characters in names of methods and cases; rename it")
    for case in cases:
        for method, folder in folders.items():
            try:
                pictures[case.id, method] = picture_of(folder, case)
                with Image.open(pictures[case.id, method]) as image:
                    image.load()
            except (UserError, OSError, SyntaxError):  # the last two from Pillow, for what is no whole picture
                lost.append(str(Path(folder) / case.id))
    if lost:
        raise UserError(f"{len(lost)} of {len(cases) * len(folders)} pictures are missing or cannot be read (.png, .jpg, "
                         f".jpeg or .webp); draw them first: {', '.join(lost)}")
    methods = sorted(folders)
    tokens = [hashlib.sha256(repr((args.seed, methods, case.id)).encode()).hexdigest()[:16] for case in cases]
    return Study(dict(zip(tokens, cases)), pictures, methods, args.seed, args.out, resume(args.out, pictures),
                 threading.Lock())


def serve(study, port):
    """The server of a study, on this machine only; its serve_forever answers. port: 0 takes any that is free."""
    try:
        server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    except (OSError, OverflowError) as error:
        raise UserError(f"--port {port}: {error}; give a free one in 1..65535, or 0 for any") from error
    server.study = study
    server.handle_error = lambda *_: say(f"error: a request broke off: {sys.exc_info()[1]}")
    return server


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = cli.stop_parsing
    parser.add_argument("--cases", required=True, help="JSON lines with id, neutral, v and a")
    parser.add_argument("--images", action="append", required=True, metavar="NAME=FOLDER",
                        help="a method and the folder of its pictures, each named by its case's id; once a method")
    parser.add_argument("--out", type=Path, default="ratings.csv", help="file of the ratings (default: %(default)s)")
    parser.add_argument("--port", type=int, default=8000, help="0 takes any that is free (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the orders (default: %(default)s)")
    args = parser.parse_args(argv)
    try:
        server = serve(prepare(args), args.port)
    except (UserError, OSError) as error:
        say(f"error: {error}")
        return 2
    try:
        print(f"http://127.0.0.1:{server.server_port}/", flush=True)
        server.serve_forever()
    except KeyboardInterrupt:
        server.study.lock.acquire()  # for good: what is being written is finished, and nothing more begun
        say(f"stopped; {len(server.study.done)} rated cases are in {args.out}; the same command goes on with them")
    return 0


if __name__ == "__main__":
    sys.exit(main())
