"""Let people rate pictures blind, on a local page (user study 4.3.3; human V and A 4.4.3).

    python -m evaluation rate --cases cases.jsonl --images words=out/words --images FLUX=out/FLUX

Every rater sees the cases, and the methods' pictures of a case, in an order of their own. Each
picture gets valence and arousal, 1..9, and quality, 1..5; with several methods, one picture of a
case is chosen as the one that best conveys the target emotion. That is asked on a second page, the
only one to tell prompt and target: a rater who has read "very calm" would rate the wish and not the
picture. Nothing that a browser receives tells the method: a picture's address holds the rater, the
case and its index on the page, and its pixels are encoded anew, without the texts in our files.
The page answers this machine only and runs no script. The same command goes on where it was.
"""

import csv
import hashlib
import io
import random
import re
import string
import threading
from collections import Counter
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import parse_qsl, urlencode

from PIL import Image, ImageOps

import data
from evaluation.cases import load_cases, pictures_of
from parts import cli, page
from parts.cli import UserError, say
from parts.files import lock, open_picture, write_whole
from parts.page import paragraph, plain
from parts.server import FOREIGN, LocalHandler, add_port, address, listen

COLUMNS = ["time", "rater", "case", "method", "v", "a", "quality", "best"]
SCALES = {  # of each picture: the question's name, the highest value, and words for 1 and for that
    "v": ("Valence", 9, "very unpleasant", "very pleasant"),
    "a": ("Arousal", 9, "very calm", "very excited"),
    "quality": ("Quality", 5, "poor", "excellent"),
}
LETTERS = string.ascii_uppercase  # of the pictures of a case, and so of at most 26 methods
NAME = re.compile(r"(?=.*\w)[\w .-]{1,40}")  # of a rater


# The file of ratings: CSV with a row for each rater, case and method
def write_ratings(path, rows):
    """Write the rows of a ratings file: all of them, or none if that raises OSError."""
    def write(temporary):
        with open(temporary, "w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            for row in rows:
                numbers = {name: f"{row[name]:.15g}" for name in SCALES}
                best = "" if row["best"] is None else int(row["best"])
                writer.writerow(row | numbers | {"best": best})

    write_whole(path, write)


def read_ratings(path):
    """The rows of a ratings file, [{column: value}]. Raises UserError that names file and line.

    v and a 1..9 and quality 1..5 are floats; best is True, False or, of a single method, None.
    """
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file; expected ratings of `python -m evaluation rate`")
    rows = []
    seen = set()
    line = 1
    try:
        text = Path(path).read_bytes().decode()
        reader = csv.reader(io.StringIO(text, newline=""), strict=True)
        if next(reader, None) != COLUMNS:
            raise ValueError(f"expected the columns {','.join(COLUMNS)}")
        for cells in reader:
            line = reader.line_num
            printable = "".join(cells).isprintable()  # names go to terminals and tables
            whole = len(cells) == len(COLUMNS) and all(cells[:-1]) and printable
            if not whole or cells[-1] not in ("", "0", "1"):
                raise ValueError(f"expected {','.join(COLUMNS)}, with 0, 1 or nothing for best")
            if tuple(cells[1:4]) in seen:  # rater, case, method
                raise ValueError("this rater, case and method a second time")
            seen.add(tuple(cells[1:4]))
            datetime.fromisoformat(cells[0])  # raises ValueError
            v, a = data.check_va(*cells[4:6])
            quality = float(cells[6])
            if not 1 <= quality <= 5:
                raise ValueError(f"quality must be a number in 1..5, got {cells[6]!r}")
            best = cells[7] == "1" if cells[7] else None
            rows.append(dict(zip(COLUMNS, (*cells[:4], v, a, quality, best))))
    except (ValueError, csv.Error) as error:
        raise UserError(f"{path}, line {line}: {error}; mend or remove the line, or give another "
                        f"file") from error
    return rows


@dataclass(frozen=True)
class Study:
    cases: dict  # {token, by which browsers know a case: Case}
    pictures: dict  # {(case id, method): path}
    methods: list
    seed: int
    out: Path
    rows: list  # of the file
    done: set  # {(rater, case id)} in the file
    lock: threading.Lock  # of the file, `rows` and `done`


def methods_of(study, rater, case):
    """The methods whose pictures a rater sees as A, B, C... of a case."""
    rng = random.Random(repr((study.seed, rater, case.id)))
    return rng.sample(study.methods, len(study.methods))


def count_rated(study, rater):
    return sum((rater, case.id) in study.done for case in study.cases.values())


def save(study, rater, case, form):
    """Write the rows of a case, whose answers are complete, unless they are written already."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    rows = []
    for index, method in enumerate(methods_of(study, rater, case)):
        best = form["best"] == str(index) if len(study.methods) > 1 else None
        rows.append({"time": now, "rater": rater, "case": case.id, "method": method, "best": best,
                     **{scale: int(form[f"{scale}{index}"]) for scale in SCALES}})
    with study.lock:  # requests run in threads of their own
        if (rater, case.id) not in study.done:
            write_ratings(study.out, study.rows + rows)
            study.rows.extend(rows)
            study.done.add((rater, case.id))
            say(f"{rater}: case {count_rated(study, rater)} of {len(study.cases)}")


def pixels(path):
    """A picture as a PNG that holds its pixels and nothing else."""
    image = ImageOps.exif_transpose(open_picture(path))  # the turn, too, is in the texts
    content = io.BytesIO()
    Image.frombytes("RGB", image.size, image.tobytes()).save(content, "PNG", compress_level=1)
    return content.getvalue()


# Pages, as HTML
def fill(fragment, **values):
    """A fragment of rate.html with its $values, which must be HTML already (see `plain`)."""
    return page.fragments(Path(__file__).with_name("rate.html"))[fragment].substitute(values)


def document(title, lead, body):
    """A page: its heading (plain text), and HTML for what stands below that and for the rest."""
    style = page.style() + Path(__file__).with_name("rate.css").read_text(encoding="utf-8")
    return fill("page", title=plain(title), style=style, lead=lead, body=body)


def start_page(study, rater="", said=""):
    """What will be asked, and the question for the rater's name."""
    scales = "".join(fill("start_scale", title=title, highest=highest, low=low, high=high)
                     for title, highest, low, high in SCALES.values())
    methods = len(study.methods)
    body = fill("start", count=len(study.cases), scales=scales, rater=plain(rater),
                each="a picture each" if methods == 1 else f"{methods} pictures each",
                then="" if methods == 1 else fill("start_best"), said=paragraph(said, "alert"))
    return document("How do these pictures feel?", "", body)


def question(study, rater, token, title, lead, fields, button):
    """A page about a case: a form with fields (HTML), below the rater's progress."""
    progress = paragraph(f"{count_rated(study, rater) + 1} of {len(study.cases)}", "soft")
    form = fill("question", rater=plain(rater), token=token, fields=fields, button=button)
    return document(title, progress + lead, form)


def card(fragment, rater, token, index, **values):
    """One picture of a case, with what the fragment has below it."""
    query = plain(urlencode({"rater": rater, "case": token, "at": index}))
    return fill(fragment, query=query, index=index, letter=LETTERS[index], **values)


def scale(name, index, form, missing):
    """The radio buttons of one scale for one picture."""
    title, highest, low, high = SCALES[name]
    field = f"{name}{index}"
    choices = "".join(
        fill("choice", name=field, value=n, checked=" checked" if form.get(field) == str(n) else "")
        for n in range(1, highest + 1))
    kind, ask = ("missing", ": please choose") if (index, name) in missing else ("", "")
    return fill("scale", kind=kind, name=field, title=title + ask, choices=choices, low=low,
                highest=highest, high=high)


def ratings_page(study, rater, token, form, missing=()):
    """The pictures of a case with their scales, and neither the prompt nor the target."""
    cards = ""
    for index in range(len(study.methods)):
        scales = "".join(scale(name, index, form, missing) for name in SCALES)
        cards += card("rated_card", rater, token, index, scales=scales)
    lost = ", ".join(f"{SCALES[name][0].lower()} of picture {LETTERS[i]}" for i, name in missing)
    lead = paragraph(lost, "alert", "Please choose as well: ")
    return question(study, rater, token, "How does it feel?", lead, fill("ratings", cards=cards),
                    "Next" if len(study.methods) > 1 else "Send")


def best_page(study, rater, token, form, said):
    """The pictures of a case again, now with the target; the ratings are carried along unseen."""
    case = study.cases[token]
    words = f"{data.emotion_words(case.v, case.a)} (valence {case.v:.1f}, arousal {case.a:.1f})"
    lead = (paragraph(words, "prompt", '<span class="soft">The emotion:</span> ')
            + paragraph(case.neutral, "prompt", '<span class="soft">The scene:</span> ')
            + paragraph(said, "alert"))
    indices = range(len(study.methods))
    given = "".join(fill("given", name=f"{name}{index}", value=form[f"{name}{index}"])
                    for index in indices for name in SCALES)
    cards = "".join(card("best_card", rater, token, index) for index in indices)
    return question(study, rater, token, "What the pictures were meant to convey", lead,
                    fill("best", given=given, cards=cards), "Send")


def next_page(study, rater):
    """The first case that the rater has not rated, or thanks."""
    rng = random.Random(repr((study.seed, rater)))
    for token in rng.sample(list(study.cases), len(study.cases)):
        if (rater, study.cases[token].id) not in study.done:
            return ratings_page(study, rater, token, {})
    return document(f"Thank you, {rater}!", "",
                    paragraph("All pages are rated and kept. You can close this window."))


class Handler(LocalHandler):
    """Answers a request about server.study."""
    policy = "default-src 'none'; img-src 'self'; style-src 'unsafe-inline'; form-action 'self'"

    def refuse(self, status, why):
        self.send(status, document(why, "", ""))

    def do_GET(self):
        path, _, query = self.path.partition("?")
        self.answer(path, dict(parse_qsl(query)))

    def do_POST(self):
        content = self.read_body()
        if content is not None:
            self.answer(self.path, dict(parse_qsl(content.decode("ascii", "replace"))))

    def answer(self, path, form):
        """Send a page or a picture, or keep a form's answers; whatever is odd comes first."""
        study = self.server.study
        rater = form.get("rater", "").strip()
        case = study.cases.get(form.get("case"))
        indices = [str(index) for index in range(len(study.methods))]
        if self.foreign():
            return self.refuse(403, FOREIGN)
        if path == "/":
            return self.send(200, start_page(study))
        if path == "/picture" and case and form.get("at") in indices:
            method = methods_of(study, rater, case)[int(form["at"])]
            return self.send(200, pixels(study.pictures[case.id, method]), "image/png")
        if path != "/case":
            return self.send(404, document("There is no such page", "", fill("to_start")))
        if not NAME.fullmatch(rater):
            why = "Please give a name: 1 to 40 letters, digits, spaces, or any of - _ ."
            return self.send(422, start_page(study, rater, why))
        if self.command == "GET":
            return self.send(200, next_page(study, rater))
        if case and (rater, case.id) not in study.done:
            missing = [(int(index), name) for index in indices for name in SCALES
                       if form.get(name + index) not in map(str, range(1, SCALES[name][1] + 1))]
            if missing:
                return self.send(422, ratings_page(study, rater, form["case"], form, missing))
            if len(indices) > 1 and form.get("best") not in indices:
                # Only the second page's form, in which the choice is due, holds "target".
                status, said = (422, "Please choose a picture.") if "target" in form else (200, "")
                return self.send(status, best_page(study, rater, form["case"], form, said))
            try:
                save(study, rater, case, form)
            except OSError as error:
                say(f"error: {study.out}: ratings of {rater} cannot be written: {error.strerror}; "
                    f"they can be sent again")
                title = "Your answers could not be kept. Please go back and send them again"
                return self.send(500, document(title, "", ""))
        # A redirection, so that a page that is loaded anew does not send the form once more.
        return self.send(303, "", Location="/case?" + urlencode({"rater": rater}))


def prepare(args):
    """The Study of the arguments, with every picture looked at. Raises UserError or OSError."""
    # 1. cases and methods, by names that can stand in a line of CSV
    cases = load_cases(args.cases)
    folders = {}
    for text in args.images:
        name, _, folder = text.partition("=")
        if not name or not folder or name in folders or len(folders) == len(LETTERS):
            raise UserError(f"--images {text}: expected NAME=FOLDER, each name once and at most 26")
        folders[name] = folder
    for name in (*folders, *(case.id for case in cases)):
        if not name or not name.isprintable():
            raise UserError(f"{name!r}: expected printable characters in a method's or case's name")
    # 2. a picture of each case by each method, since a page without one could not be rated
    pictures = {}
    lost = []
    for case in cases:
        for method, folder in folders.items():
            pictures[case.id, method] = None
            try:
                [pictures[case.id, method]] = pictures_of(folder, [case])
                open_picture(pictures[case.id, method])
            except UserError:
                lost.append(str(Path(folder) / case.id))
    if lost:
        raise UserError(f"{len(lost)} of {len(pictures)} pictures are missing or cannot be read; "
                        f"draw them first, as .png, .jpg, .jpeg or .webp: {', '.join(lost)}")
    # 3. what is rated already, which must be of these pictures
    if not lock(args.out.with_name(f".{args.out.name}.lock")):
        raise UserError(f"{args.out}: another server writes there; stop it, or give another --out")
    methods = sorted(folders)  # so that the orders do not depend on that of the flags
    rows = read_ratings(args.out) if args.out.exists() else []
    rated = Counter((row["rater"], row["case"]) for row in rows)
    for row in rows:
        too_few = rated[row["rater"], row["case"]] < len(methods)
        if too_few or (row["case"], row["method"]) not in pictures:
            raise UserError("{}: {rater} has rated case {case!r} of method {method!r} among other "
                            "cases or methods than are given; give those, or another --out".format(
                                args.out, **row))
    write_ratings(args.out, rows)  # fails now, and not after the first rating
    # 4. names of the cases that tell a browser nothing, and are the same after a restart
    keys = [repr((args.seed, methods, case.id)).encode() for case in cases]
    tokens = [hashlib.sha256(key).hexdigest()[:16] for key in keys]
    return Study(dict(zip(tokens, cases)), pictures, methods, args.seed, args.out, rows, set(rated),
                 threading.Lock())


def serve(study, port):
    """The server of a study, on this machine only; its serve_forever answers."""
    server = listen(Handler, port)
    server.study = study
    return server


def rate(args):
    server = serve(prepare(args), args.port)
    try:
        print(address(server), flush=True)
        server.serve_forever()
    except KeyboardInterrupt:
        # Taken for good: what is being written is finished, and nothing more begun.
        server.study.lock.acquire()
        done = len(server.study.done)
        say(f"stopped; {done} rated cases are in {args.out}; the same command goes on with them")


def main(argv):
    parser = cli.parser(__doc__, prog="python -m evaluation rate")
    parser.add_argument("--cases", required=True, help="JSON lines with id, neutral, v and a")
    parser.add_argument("--images", action="append", required=True, metavar="NAME=FOLDER",
                        help="a method and the folder of its pictures, <id>.png each")
    parser.add_argument("--out", type=Path, default="ratings.csv",
                        help="file of the ratings (default: %(default)s)")
    add_port(parser)
    parser.add_argument("--seed", type=int, default=0, help="of the orders (default: %(default)s)")
    args = parser.parse_args(argv)
    return cli.run_program(lambda: rate(args))
