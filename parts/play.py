"""The page of `sample.py --play`: choose a target in the valence-arousal plane, see its picture.

    server = open_page(8000)
    serve(server, studio)    # until Ctrl-C

play.html, play.css and play.js are the page. It sends a wish as JSON by POST /draw. The answer is
lines of JSON, each sent when it is known: the {"prompt"} that is drawn, {"step", "steps"} of the
sampler, {"drawn"} pictures, their judged {"round"}, and in the end {"done"} or {"error"}. Every
request has a thread of its own, but only the thread that called `serve` draws and judges, one wish
after another. A tab that wishes anew gives up its last wish. No file is written: the lines hold the
pictures, as PNGs with the texts that sample.py writes into its own.
"""

import json
import queue
import threading
from argparse import ArgumentTypeError
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from parts import cli, page
from parts.cli import plain_text, say
from parts.files import data_url, png
from parts.server import FOREIGN, LocalHandler, address, listen

START = (7, 3)  # V and A of the first picture, if the flags give none
STRIP = 9  # targets of a wish at most
LAST_SEED = 2**53 - 1  # the greatest whole number that JavaScript is sure to keep
OUR_FOLDER = Path(__file__).parent


@dataclass
class Studio:
    """What sample.py draws, judges and improves prompts with."""
    args: object  # its flags: v, a, prompt and seed to begin with; rounds and n of feedback
    facts: dict  # that every PNG tells: model, steps, guidance, size
    judge: str | None  # the name of its checkpoint
    longest: int  # characters of a prompt
    draw: Callable  # draw(prompts, seeds, progress) -> PIL images
    refine: Callable  # feedback.refine_rounds, with a judge
    name_emotion: Callable  # name_emotion(image) -> class or None
    options: object  # feedback.RefineOptions
    last: dict = field(default_factory=dict)  # {(prompt, seeds): images}, of the last drawing


# --------------------------------------------------------------------------------------------------
# Wishes


@dataclass(frozen=True)
class Wish:
    tab: str  # a name that the browser's tab has given itself
    prompt: str  # the request, without emotion
    seed: int  # of each target's first picture
    targets: list  # of (v, a), each 1..9
    improve: str | None  # the prompt that feedback goes on from; None: no feedback


def read_wish(content, longest, has_judge):
    """The Wish in a request's bytes. Raises ValueError, whose text is one line."""
    try:
        raw = json.loads(content)
    except (ValueError, RecursionError):
        raise ValueError("expected JSON") from None
    names = list(Wish.__annotations__)
    if not isinstance(raw, dict) or sorted(raw) != sorted(names):
        raise ValueError(f"expected a JSON object with {', '.join(names)}")
    if not isinstance(raw["targets"], list) or not 1 <= len(raw["targets"]) <= STRIP:
        raise ValueError(f"targets: expected a list of 1 to {STRIP} targets")
    targets = []
    for target in raw["targets"]:
        if not isinstance(target, list) or len(target) != 2:
            raise ValueError("targets: expected [valence, arousal] of each")
        v = check("valence", target[0], (int, float), cli.number(1, 9))
        a = check("arousal", target[1], (int, float), cli.number(1, 9))
        targets.append((v, a))
    check("tab", raw["tab"], (str,), cli.text(40))
    check("prompt", raw["prompt"], (str,), cli.text(longest))
    check("seed", raw["seed"], (int,), cli.integer(0, LAST_SEED))
    if raw["improve"] is not None:
        check("improve", raw["improve"], (str,), cli.text(longest))
        if not has_judge or len(targets) > 1:
            raise ValueError("improve: feedback needs a judge, and one target")
    return Wish(**raw | {"targets": targets})


def check(name, value, kinds, read):
    """read(value), of a value of one of the kinds and an argparse type. Raises ValueError."""
    if type(value) not in kinds:  # isinstance would let true in, which is an integer to Python
        expected = "a text" if str in kinds else "a number" if float in kinds else "a whole number"
        raise ValueError(f"{name}: expected {expected}, got {json.dumps(value)[:40]}")
    try:
        return read(value)
    except ArgumentTypeError as error:
        raise ValueError(f"{name}: {plain_text(str(error))}") from error


class Dropped(Exception):
    """Nobody waits for a job any more."""


class Job:
    """A wish, and the lines of its answer on their way to the thread that sends them."""

    def __init__(self, wish):
        self.wish = wish
        self.lines = queue.SimpleQueue()  # None is the end
        self.dropped = False

    def drop(self):
        self.dropped = True
        self.lines.put(None)

    def tell(self, **line):
        """Send a line of the answer. Raises Dropped."""
        if self.dropped:
            raise Dropped
        self.lines.put(line)

    def steps(self, steps):
        """The sampler's steps, told one by one."""
        for step in steps:
            self.tell(step=step + 1, steps=len(steps))
            yield step


# --------------------------------------------------------------------------------------------------
# Drawing


def work(job, studio):
    """Fulfil a job. Whatever goes wrong ends this job only."""
    try:
        draw_rounds(job, studio)
        job.tell(done=True)
    except Dropped:
        return  # its lines have ended
    except Exception as error:
        why = plain_text(f"{type(error).__name__}: {error}")[:300]
        say(f"error: {why}")
        job.lines.put({"error": why})
    job.lines.put(None)


def draw_rounds(job, studio):
    """Draw and judge a job's targets one by one; with `improve`, by rounds of feedback."""
    wish = job.wish
    options = replace(studio.options, seed=wish.seed)
    rounds = count = 1
    if wish.improve is not None:
        options = replace(options, start=wish.improve, rewrite=False)
        rounds = max(2, studio.args.rounds)
        count = studio.args.n

    def generate(prompt, seeds):
        job.tell(prompt=prompt)
        # Further feedback begins with the pictures that the last one has ended with.
        key = (prompt, *seeds)
        if key not in studio.last:
            images = []
            for at in range(0, len(seeds), studio.args.micro):
                batch = seeds[at:at + studio.args.micro]
                images += studio.draw([prompt] * len(batch), batch, job.steps)
            studio.last = {key: images}
        job.tell(drawn=[data_url(png(image)) for image in studio.last[key]])  # not judged yet
        return studio.last[key]

    for v, a in wish.targets:
        before = wish.improve
        for finished in studio.refine(wish.prompt, v, a, generate, rounds=rounds,
                                      images_per_round=count, options=options):
            if studio.judge and rounds == len(wish.targets) == 1:
                finished = with_emotion(finished, studio.name_emotion)
            changes = page.changes(before or finished.prompt, finished.prompt)
            job.tell(round=entry_of(finished, v, a, studio) | {"changes": changes})
            before = finished.prompt


def entry_of(finished, v, a, studio):
    """A feedback.Round as in run.json, with its target, and with whole PNGs for their names."""
    files = []
    for picture in finished.pictures:
        said = page.judgement_facts(studio.judge, picture.judgement)
        files.append(data_url(png(
            picture.image, prompt=finished.prompt, seed=picture.seed, valence=v, arousal=a,
            **studio.facts, **said)))
    return {"v": v, "a": a, **page.round_entry(finished, files, studio.judge)}


def with_emotion(finished, name_emotion):
    """A feedback.Round of one picture, with the emotion class in its judgement."""
    [picture] = finished.pictures
    judgement = replace(picture.judgement, emotion=name_emotion(picture.image))
    return replace(finished, pictures=[replace(picture, judgement=judgement)])


# --------------------------------------------------------------------------------------------------
# The server


class Handler(LocalHandler):
    """Answers with the page, and with what comes of its wishes."""
    policy = ("default-src 'none'; script-src 'self'; style-src 'self'; img-src data:; "
              "connect-src 'self'; form-action 'none'")

    def refuse(self, status, why, **headers):
        self.send(status, json.dumps({"error": why}) + "\n", "application/json", **headers)

    def do_GET(self):
        path = self.path.partition("?")[0]
        expected = "POST" if path == "/draw" else "GET"
        if self.foreign():
            self.refuse(403, FOREIGN)
        elif path != "/draw" and path not in self.server.files:
            self.refuse(404, "There is no such page")
        elif self.command != expected:
            self.refuse(405, f"{path} is for {expected} only", Allow=expected)
        elif path == "/draw":
            self.draw()
        else:
            self.send(200, *self.server.files[path])

    do_POST = do_GET

    def draw(self):
        """Send the lines of a wish's job until there are no more, or nobody to read them."""
        content = self.read_body()
        if content is None:
            return
        studio = self.server.studio
        try:
            wish = read_wish(content, studio.longest, studio.judge is not None)
        except ValueError as error:
            self.refuse(400, str(error))
            return
        job = Job(wish)
        with self.server.lock:
            before = self.server.newest.get(wish.tab)
            self.server.newest[wish.tab] = job
        if before is not None:
            before.drop()
        self.server.jobs.put(job)
        try:
            self.send_head(200, "application/x-ndjson")
            for line in iter(job.lines.get, None):
                self.wfile.write(json.dumps(line).encode() + b"\n")
        except OSError:  # the tab has been closed, or has asked anew
            job.drop()
        with self.server.lock:
            if self.server.newest.get(wish.tab) is job:
                del self.server.newest[wish.tab]


def open_page(port):
    """The page's server, which `serve` lets answer. Raises UserError."""
    server = listen(Handler, port)
    server.jobs = queue.SimpleQueue()
    server.newest = {}  # the job of each tab
    server.lock = threading.Lock()  # of `newest`
    return server


def files_of(studio, port):
    """{path: (content, its type)} of the page."""
    args = studio.args
    start = {"v": args.v or START[0], "a": args.a or START[1], "seed": args.seed,
             "command": "python sample.py --play" + (f" --port {port}" if port != 8000 else "")}
    # Everything that comes from people goes through `plain`.
    html = page.fragments(OUR_FOLDER / "play.html")["page"].substitute(
        start=page.plain(json.dumps(start)), prompt=page.plain(args.prompt), longest=studio.longest,
        axes=page.fill("axes"), last_seed=LAST_SEED, model=page.plain(studio.facts["model"]),
        judge=page.plain(studio.judge or "none"), hidden="" if studio.judge else "hidden")
    style = page.style() + (OUR_FOLDER / "play.css").read_text(encoding="utf-8")
    script = (OUR_FOLDER / "play.js").read_text(encoding="utf-8")
    return {"/": (html, "text/html; charset=utf-8"),
            "/play.css": (style, "text/css; charset=utf-8"),
            "/play.js": (script, "text/javascript; charset=utf-8")}


def serve(server, studio):
    """Print the page's address, and answer until Ctrl-C raises KeyboardInterrupt."""
    server.studio = studio
    server.files = files_of(studio, server.server_port)
    # The requests' threads end with the program; the models stay with the thread they are in.
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(address(server), flush=True)
    try:
        while True:
            work(server.jobs.get(), studio)
    finally:
        server.shutdown()
        server.server_close()
