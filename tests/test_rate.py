"""The rating page, over HTTP as a browser uses it: blind, in orders that repeat, and safe against a sudden end."""

import http.client
import io
import json
import re
import shutil
import signal
import subprocess
import sys
import threading
import urllib.error
import urllib.parse
import urllib.request
from contextlib import contextmanager
from html import escape
from itertools import chain, pairwise
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from evaluation import rate
from evaluation.__main__ import main
from evaluation.cases import Case
from parts.cli import UserError
from tests.launch import ROOT, locked
from tests.test_page import MEASURE, Parsed, chromium

METHODS = {"sparrow": 40, "magpie": 120, "heron": 200}  # each the red of its pictures
PROMPTS = ["a lake & <script>alert(1)</script>", "a castle", "a road in the evening"]


class Form(Parsed):
    """The strict reading of test_page.py, for pages with inputs."""

    def handle_starttag(self, tag, attrs):
        super().handle_starttag(tag, attrs)
        if tag == "input":
            self.open.pop()


@pytest.fixture
def folder(tmp_path):
    """Three cases, and pictures of three methods that tell their method in every way a file can."""
    with open(tmp_path / "cases.jsonl", "w", encoding="utf-8") as f:
        for i, prompt in enumerate(PROMPTS):
            f.write(json.dumps({"id": f"c{i}", "neutral": prompt, "v": 7.0, "a": 2.5}) + "\n")
    for method, red in METHODS.items():
        (tmp_path / f"nest_{method}").mkdir()
        for i in range(len(PROMPTS)):
            image, path = Image.new("RGB", (24, 24), (red, 60 * i, 90)), tmp_path / f"nest_{method}" / f"c{i}"
            if method == "heron":
                exif = Image.Exif()
                exif[0x010E] = "heron"
                image.save(path.with_suffix(".jpg"), exif=exif, comment=b"heron", quality=100)
            else:
                text = PngInfo()
                text.add_text("model", method)
                image.save(path.with_suffix(".png"), pnginfo=text, icc_profile=method.encode())
    return tmp_path


def wishes(folder, methods=METHODS, seed=0):
    return SimpleNamespace(cases=folder / "cases.jsonl", images=[f"{m}={folder / f'nest_{m}'}" for m in methods],
                           out=folder / "ratings.csv", seed=seed)


@contextmanager
def serving(folder, *args):
    """The address of a running server."""
    server = rate.serve(rate.prepare(wishes(folder, *args)), 0)
    threading.Thread(target=server.serve_forever, args=[0.01]).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def ask(address, form=None, **headers):
    """(status, address after redirects, headers, body) of a request; a POST if there is a form."""
    sent = None if form is None else urllib.parse.urlencode(form).encode()
    try:
        answer = urllib.request.urlopen(urllib.request.Request(address, sent, headers), timeout=20)
    except urllib.error.HTTPError as error:
        answer = error
    return answer.status, answer.url, str(answer.headers), answer.read()


def read(address, form=None, status=200):
    """A page of that status, checked strictly; (parsed, source)."""
    found, _, headers, body = ask(address, form)
    assert found == status and "no-store" in headers and f"Content-Security-Policy: {rate.Handler.policy}" in headers
    parsed = Form(body.decode())
    for fieldset in re.findall("<fieldset.*?</fieldset>", body.decode(), re.DOTALL):
        assert re.match("<fieldset[^>]*><legend>", fieldset)
    levels = [int(tag[1]) for tag, _ in parsed.tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1 and all(b <= a + 1 for a, b in pairwise(levels))
    ids = [attrs["id"] for _, attrs in parsed.tags if "id" in attrs]
    assert len(ids) == len(set(ids)) and not parsed.all("script") and parsed.all("html") == [{"lang": "en"}]
    return parsed, body.decode()


def first(address, rater):
    return f"{address}/case?{urllib.parse.urlencode({'rater': rater})}"


def hidden(parsed):
    return {i["name"]: i["value"] for i in parsed.all("input") if i["type"] == "hidden"}


def pictures(address, parsed):
    """[(method, case id)] of a page's pictures, told by their pixels."""
    out = []
    for img in parsed.all("img"):
        body = ask(address + img["src"])[3]
        red, green, _ = np.array(Image.open(io.BytesIO(body)))[5, 5].astype(int)
        out.append((min(METHODS, key=lambda m: abs(METHODS[m] - red)), f"c{round(green / 60)}"))
    return out


def ratings(count, v=7):
    return {f"{scale}{i}": value for i in range(count) for scale, value in (("v", v), ("a", i + 1), ("quality", i + 2))}


def rate_one(address, rater, best=0):
    """Rate the next case; [(method, case id)] in the order shown, None if there was none."""
    page, _ = read(first(address, rater))
    if not page.all("form"):
        return None
    shown = pictures(address, page)
    page, _ = read(f"{address}/case", hidden(page) | ratings(len(shown)))
    if len(shown) > 1:
        assert pictures(address, page) == shown
        read(f"{address}/case", hidden(page) | {"best": best})
    return shown


def rows(folder):
    return rate.read_ratings(folder / "ratings.csv")


def test_two_raters_rate_everything_in_orders_of_their_own(folder, capfd):
    with serving(folder) as address:
        start, _ = read(address)
        assert "3 pages with 3 pictures" in start.text("main").replace("\n", " ") and "very excited" in start.text("table")
        orders = {}
        for rater in ("Anna", "Bérénice 2"):
            orders[rater] = [rate_one(address, rater, best=1) for _ in range(3)]
            thanks, _ = read(first(address, rater))
            assert f"Thank you, {rater}!" in thanks.text("h1") and rate_one(address, rater) is None
    assert "Anna: case 3 of 3" in capfd.readouterr().err
    assert orders["Anna"] != orders["Bérénice 2"]
    expected = [{"rater": rater, "case": case, "method": method, "v": 7.0, "a": i + 1.0, "quality": i + 2.0, "best": i == 1}
                for rater in orders for shown in orders[rater] for i, (method, case) in enumerate(shown)]
    assert [{k: v for k, v in row.items() if k != "time"} for row in rows(folder)] == expected
    assert all(row["time"].endswith("+00:00") for row in rows(folder))
    for rater in orders:
        assert sorted(chain(*orders[rater])) == sorted((m, f"c{i}") for m in METHODS for i in range(3))


def test_orders_repeat_for_a_rater_and_change_with_the_seed(folder):
    study = {seed: rate.prepare(wishes(folder, seed=seed)) for seed in (0, 1)}
    case = Case("c0", "", 5, 5)
    raters = [f"rater {i}" for i in range(600)]
    orders = {seed: [tuple(rate.methods_of(study[seed], rater, case)) for rater in raters] for seed in study}
    assert orders[0] == [tuple(rate.methods_of(study[0], rater, case)) for rater in raters] != orders[1]
    counts = [orders[0].count(order) for order in set(orders[0])]
    assert len(counts) == 6 and min(counts) > 60  # of 600 raters, 100 expected for each order
    with serving(folder) as address:
        once, again = (read(first(address, "Anna"))[1] for _ in range(2))
    with serving(folder, reversed(METHODS)) as address:
        assert once == again == read(first(address, "Anna"))[1]


def chunks(png):
    """The kinds of chunk in a PNG."""
    kinds, at = set(), 8
    while at < len(png):
        kinds.add(png[at + 4:at + 8])
        at += 12 + int.from_bytes(png[at:at + 4])
    return kinds


def test_nothing_a_browser_receives_tells_the_method_or_early_the_target(folder):
    with serving(folder) as address:
        got = []
        for _ in range(3):
            page, source = read(first(address, "Anna"))
            assert "castle" not in source and "lake" not in source and "quiet" not in source and "7.0" not in source
            best, more = read(f"{address}/case", hidden(page) | ratings(3))
            assert "cheerful leaning sadder, very calm" in best.text("header") and "valence 7.0, arousal 2.5" in best.text("header")
            read(f"{address}/case", hidden(best) | {"best": 2})
            got += [source.encode(), more.encode()]
            assert [img["alt"] for img in page.all("img")] == ["picture A", "picture B", "picture C"]
            for img in page.all("img"):
                status, url, headers, body = ask(address + img["src"])
                assert status == 200 and "image/png" in headers and not Image.open(io.BytesIO(body)).info
                assert chunks(body) == {b"IHDR", b"IDAT", b"IEND"}
                got += [url.encode(), headers.encode(), body]
        got += [ask(address + path)[3] for path in ("/", "/nowhere", "/case?rater=Anna")]
    for word in (*METHODS, "nest_", str(folder)):
        assert not any(word.encode() in one for one in got), word


def test_what_is_missing_is_asked_for_and_the_answers_given_are_kept(folder):
    with serving(folder) as address:
        page, _ = read(first(address, "Anna"))
        given = hidden(page) | ratings(3)
        del given["a1"]
        for wrong in ({}, {"a1": "0"}, {"a1": "10"}, {"a1": "5.5"}, {"a1": "٣"}, {"a1": " 3"}):
            page, source = read(f"{address}/case", given | wrong, 422)
            assert "Please choose as well: arousal of picture B" in page.text("header")
            assert source.count('class="missing"') == 1 and page.text("legend").count("Arousal: please choose") == 1
            checked = {i["name"]: int(i["value"]) for i in page.all("input") if "checked" in i}
            assert checked == {k: v for k, v in ratings(3).items() if k != "a1"}
        page, _ = read(f"{address}/case", hidden(page), 422)
        assert page.text("header").count(" of picture ") == 9
        page, _ = read(f"{address}/case", given | {"a1": 5})
        assert "Which picture best conveys" in page.text("legend")
        for wrong in ({}, {"best": "3"}, {"best": "-1"}, {"best": "A"}):
            again, _ = read(f"{address}/case", hidden(page) | wrong, 422)
            assert "Please choose a picture" in again.text("header") and hidden(again) == hidden(page)
        read(f"{address}/case", hidden(page) | {"v0": "99", "best": 1}, 422)
        assert not rows(folder)


def test_a_case_sent_twice_is_written_once(folder):
    with serving(folder) as address:
        page, _ = read(first(address, "Anna"))
        given = hidden(page) | ratings(3) | {"best": 0}
        answers = []
        threads = [threading.Thread(target=lambda: answers.append(ask(f"{address}/case", given))) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [(a[0], a[1]) for a in answers] == [(200, first(address, "Anna"))] * 6 and len(rows(folder)) == 3
        status, url, _, body = ask(f"{address}/case", given | {"v0": 1})
        assert (status, url) == (200, first(address, "Anna")) and b"2 of 3" in body and rows(folder)[0]["v"] == 7
        ask(f"{address}/case", given | {"case": "0" * 16})  # of a page from before other cases were given
        assert len(rows(folder)) == 3
    study = rate.prepare(wishes(folder))
    for _ in range(2):  # both asked for before either was written
        rate.save(study, "Bo", study.cases[given["case"]], ratings(3) | {"best": "0"})
    assert len(rows(folder)) == 6


def test_one_method_has_no_question_for_the_best(folder):
    with serving(folder, ["heron"]) as address:
        start, _ = read(address)
        assert "3 pages with a picture each" in start.text("main").replace("\n", " ") and "choose" not in start.text("main")
        page, source = read(first(address, "Anna"))
        assert len(page.all("img")) == 1 and "Send" in page.text("button")
        assert [len(rate_one(address, "Anna")) for _ in range(3)] == [1, 1, 1]
    assert [(row["method"], row["best"]) for row in rows(folder)] == [("heron", None)] * 3
    assert (folder / "ratings.csv").read_text().splitlines()[1].endswith(",7,1,2,")


def test_raters_names_are_checked_and_shown_as_text(folder):
    with serving(folder) as address:
        for name in ("<script>alert(1)</script>", "", " ", "...", "x" * 41, "a/b", 'a"b', "a\nb"):
            page, _ = read(first(address, name), status=422)
            assert "1 to 40 letters" in page.text("form") and page.all("input")[0]["value"] == name.strip()
            assert ask(f"{address}/case", {"rater": name, "case": "x"})[0] == 422
        for name in ("Jörg-Peter_2.b", "x" * 40, " Anna ", "李"):
            assert hidden(read(first(address, name))[0])["rater"] == name.strip()


# ---------------------------------------------------------------------------------------------------------------------
# Requests that no page of ours makes


def raw(address, method, path, headers, body=None):
    connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=20)
    connection.putrequest(method, path, skip_host="Host" in headers)
    for name, value in headers.items():
        connection.putheader(name, value)
    connection.endheaders(body)
    return connection.getresponse().status


def test_foreign_names_and_forms_are_refused(folder):
    with serving(folder) as address:
        port = address.rpartition(":")[2]
        page, _ = read(first(address, "Anna"))
        given = hidden(page) | ratings(3) | {"best": 0}
        for host in ("evil.example", f"evil.example:{port}", "localhost", "127.0.0.1:1", f"localhost:{port}.example", ""):
            for path in ("/", "/case?rater=Anna", page.all("img")[0]["src"]):
                assert raw(address, "GET", path, {"Host": host}) == 403
            assert ask(f"{address}/case", given, Host=host)[0] == 403
        for origin in ("http://evil.example", "null", f"https://localhost:{port}", "http://localhost", ""):
            assert ask(f"{address}/case", given, Origin=origin)[0] == 403
        assert not rows(folder)
        assert raw(address, "GET", "/", {"Host": f"localhost:{port}"}) == 200
        assert ask(f"{address}/case", given, Origin=f"http://localhost:{port}", Host=f"localhost:{port}")[0] == 200
        assert len(rows(folder)) == 3


def test_other_paths_and_bodies_are_refused(folder):
    with serving(folder) as address:
        token = hidden(read(first(address, "Anna"))[0])["case"]
        for path in ("/cases.jsonl", "/../cases.jsonl", "/%2e%2e/cases.jsonl", "/[", "/picture", "/favicon.ico",
                     "/picture?case=c0&at=0", f"/picture?case={token}&at=3", f"/picture?case={token}&at=../0", "/case/"):
            assert raw(address, "GET", path, {}) == 404, path
        assert ask(f"{address}/nowhere", {})[0] == 404
        for length in ("100001", "9" * 5000):
            assert raw(address, "POST", "/case", {"Content-Length": length}) == 413
        assert ask(f"{address}/case", {"rater": "x" * 3_000_000})[0] == 413  # and it is heard by one who still sends
        for length in ("-1", "x", ""):
            assert raw(address, "POST", "/case", {"Content-Length": length}) == 411
        assert raw(address, "POST", "/case", {"Transfer-Encoding": "chunked"}) == 411
        assert raw(address, "POST", "/case", {"Content-Length": "4"}, b"\xff&=%") == 422
        assert raw(address, "PUT", "/case", {}) == raw(address, "DELETE", "/case", {}) == 501
        read(address)


# ---------------------------------------------------------------------------------------------------------------------
# The file of ratings


def test_a_session_goes_on_after_a_restart(folder):
    with serving(folder) as address:
        shown = [rate_one(address, "Zoë") for _ in range(2)]
    path = folder / "ratings.csv"
    whole = path.read_bytes()
    with serving(folder) as address:
        assert path.read_bytes() == whole and rate_one(address, "Zoë")[0][1] not in (shown[0][0][1], shown[1][0][1])
    assert path.read_bytes().startswith(whole) and len(rows(folder)) == 9


def test_a_broken_line_is_named_and_without_it_and_its_case_the_session_goes_on(folder):
    with serving(folder) as address:
        shown = [rate_one(address, "Zoë") for _ in range(2)]
    path = folder / "ratings.csv"
    whole = path.read_bytes()
    path.write_bytes(whole[:-5])
    with pytest.raises(UserError, match=r"line 7: .*mend or remove the line"):
        rate.prepare(wishes(folder))
    path.write_bytes(b"".join(whole.splitlines(True)[:4]))
    with serving(folder) as address:
        assert rate_one(address, "Zoë") == shown[1]


def test_a_file_of_other_pictures_is_refused_and_left_as_it_is(folder):
    with serving(folder) as address:
        for rater in ("Anna", "Bo"):
            rate_one(address, rater)
    path = folder / "ratings.csv"
    before = path.read_bytes()
    with pytest.raises(UserError, match="Anna has rated case 'c.' of method '(heron|magpie)' among other"):
        rate.prepare(wishes(folder, ["sparrow"]))
    cases = folder / "cases.jsonl"
    cases.write_text(cases.read_text().replace('"c', '"d'))
    for picture in folder.glob("nest_*/c*"):
        picture.rename(picture.with_name(picture.name.replace("c", "d")))
    with pytest.raises(UserError, match="has rated case 'c"):
        rate.prepare(wishes(folder))
    cases.write_text(cases.read_text().replace('"d', '"c'))
    for picture in folder.glob("nest_*/d*"):
        picture.rename(picture.with_name(picture.name.replace("d", "c")))
    rate.prepare(wishes(folder))
    shutil.copytree(folder / "nest_heron", folder / "nest_wren")
    with pytest.raises(UserError, match="Anna has rated case 'c"):  # a method has come to them
        rate.prepare(wishes(folder, [*METHODS, "wren"]))
    assert path.read_bytes() == before
    path.write_text("time,rater\n")
    with pytest.raises(UserError, match=r"line 1: expected the columns time,rater,case"):
        rate.prepare(wishes(folder))


def test_a_second_server_on_one_file_is_refused_while_the_first_runs(folder):
    with locked(folder / ".ratings.csv.lock"), pytest.raises(UserError, match="another server writes there; stop it"):
        rate.prepare(wishes(folder))
    rate.prepare(wishes(folder))
    with pytest.raises(BlockingIOError), locked(folder / ".ratings.csv.lock"):
        pass


def test_ratings_that_cannot_be_written_are_not_lost_silently(folder, monkeypatch, capsys):
    def full(_):
        raise OSError(28, "No space left on device")

    with serving(folder) as address:
        rate_one(address, "Anna")
        before = (folder / "ratings.csv").read_bytes()
        given = hidden(read(first(address, "Anna"))[0]) | ratings(3) | {"best": 0}
        with monkeypatch.context() as patch:
            patch.setattr("os.fsync", full)
            page, _ = read(f"{address}/case", given, 500)
        assert "go back and send them again" in page.text("h1") and "No space left" in capsys.readouterr().err
        assert (folder / "ratings.csv").read_bytes() == before
        ask(f"{address}/case", given)
    assert len(rows(folder)) == 6


def test_a_picture_that_is_gone_is_said_in_a_line(folder, capsys):
    with serving(folder, ["sparrow"]) as address:
        page, _ = read(first(address, "Anna"))
        for path in folder.glob("nest_sparrow/*"):
            path.unlink()
        with pytest.raises(http.client.RemoteDisconnected):
            ask(address + page.all("img")[0]["src"])
        read(first(address, "Anna"))
    assert re.fullmatch("error: a request broke off: .*No such file.*png.*\n", capsys.readouterr().err)


GOOD = {"time": "2026-01-02T03:04:05+00:00", "rater": "Anna", "case": "c0", "method": "heron", "v": 7.0, "a": 2.5,
        "quality": 4.0, "best": True}


@pytest.mark.parametrize(("line", "said"), [
    ("yesterday,Anna,c0,magpie,7,2,4,1", "yesterday"), ("2026-01-02,,c0,magpie,7,2,4,1", "expected time,rater"),
    ("2026-01-02,Anna,c0,magpie,7,2,4", "expected time,rater"), ("2026-01-02,Anna,c0,magpie,7,2,4,1,1", "expected time"),
    ("2026-01-02,Anna,c0,magpie,9.5,2,4,1", "valence must be"), ("2026-01-02,Anna,c0,magpie,7,nan,4,1", "arousal must be"),
    ("2026-01-02,Anna,c0,magpie,7,2,6,1", "quality must be"), ("2026-01-02,Anna,c0,magpie,7,2,nan,1", "quality must be"),
    ("2026-01-02,Anna,c0,magpie,7,2,four,1", "four"), ("2026-01-02,Anna,c0,magpie,7,2,4,yes", "0, 1 or nothing for best"),
    ("2026-01-02,Anna,c0,heron,7,2,4,0", "a second time"),
    ('2026-01-02,"Anna,c0,magpie,7,2,4,0', "unexpected end"), ("", "expected time")])
def test_bad_rows_are_named_with_file_and_line(line, said, tmp_path):
    path = tmp_path / "r.csv"
    rate.write_ratings(path, [GOOD])
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(UserError, match=rf"r\.csv, line [23]: .*{said}.*; mend or remove the line"):
        rate.read_ratings(path)


def test_files_that_hold_no_ratings(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        rate.read_ratings(tmp_path / "none.csv")
    for content in (b"", b"a,b\n", b"\xff\n", b"time,rat"):
        (tmp_path / "r.csv").write_bytes(content)
        with pytest.raises(UserError, match=r"r\.csv, line 1: "):
            rate.read_ratings(tmp_path / "r.csv")


texts = st.text(st.characters(exclude_categories=["C", "Z"], include_characters=" "), min_size=1)
numbers = st.floats(1, 9) | st.integers(1, 9)


@given(st.lists(st.fixed_dictionaries({
    "time": st.datetimes().map(lambda t: t.isoformat()), "rater": texts, "case": texts, "method": texts, "v": numbers,
    "a": numbers, "quality": st.floats(1, 5), "best": st.sampled_from([True, False, None])}),
    unique_by=lambda row: (row["rater"], row["case"], row["method"]), max_size=4))
def test_any_rows_are_read_as_they_were_written(tmp_path_factory, written):
    path = tmp_path_factory.getbasetemp() / "any_rows.csv"
    rate.write_ratings(path, written)
    for row, back in zip(written, rate.read_ratings(path), strict=True):
        assert all(isinstance(back[k], float) and abs(back[k] - row[k]) < 1e-13 for k in rate.SCALES)
        assert back | {k: row[k] for k in rate.SCALES} == row


# ---------------------------------------------------------------------------------------------------------------------
# The program


def flags(folder, *more):
    return ["rate", "--cases", str(folder / "cases.jsonl"), "--out", str(folder / "ratings.csv"), *more]


def test_wrong_arguments_are_one_line(folder, capsys):
    heron, sparrow = ("--images", f"heron={folder}/nest_heron"), f"{folder}/nest_sparrow"
    (folder / "nest_heron" / "c0.jpg").rename(folder / "nest_heron" / "moved.jpg")
    half = folder / "nest_sparrow" / "c1.png"
    half.write_bytes(half.read_bytes()[:70])
    for more, said in (
            (("--images", "heron"), "--images heron: expected NAME=FOLDER"), (("--images", "=x"), "expected NAME=FOLDER"),
            ((*heron, *heron), "each name once"), (("--images", "a\nb=x"), "printable"),
            ((*heron, "--images", f"sparrow={sparrow}"), f"2 of 6 pictures are missing or cannot be read; draw "
             f"them first, as .png, .jpg, .jpeg or .webp: {folder}/nest_heron/c0, {sparrow}/c1"),
            (("--images", "a=x", "--cases", "none.jsonl"), "none.jsonl: no such file")):
        assert main(flags(folder, *more)) == 2
        out, err = capsys.readouterr()
        assert not out and err.count("\n") == 1 and err.startswith("error: ") and said in err
    assert not (folder / "ratings.csv").exists()
    with pytest.raises(SystemExit, match="2"):
        main(["rate"])


def test_a_taken_port_is_one_line(folder, capsys):
    images = ("--images", f"heron={folder}/nest_heron")
    with serving(folder) as address:
        port = address.rpartition(":")[2]
        (folder / "ratings.csv").unlink()
        assert main(flags(folder, *images, "--port", port)) == 2
        assert re.fullmatch(rf"error: --port {port}: .*; give a free one, or 0 for any\n", capsys.readouterr().err)
        with pytest.raises(SystemExit):
            main(flags(folder, *images, "--port", "70000"))
        assert "--port: expected a whole number in 0..65,535, got 70000" in capsys.readouterr().err


def test_ctrl_c_says_where_the_ratings_are_and_kill_loses_none(folder):
    images = [x for m in METHODS for x in ("--images", f"{m}={folder}/nest_{m}")]
    for number, code, expected in ((signal.SIGKILL, -9, 3), (signal.SIGINT, 0, 6)):
        process = subprocess.Popen([sys.executable, "-m", "evaluation", *flags(folder, *images, "--port", "0")],
                                   cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                   preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))
        try:
            address = process.stdout.readline().strip().removesuffix("/")
            assert re.fullmatch(r"http://127\.0\.0\.1:\d+", address)
            rate_one(address, "Anna")
            process.send_signal(number)
            err = process.communicate(timeout=30)[1]
        finally:
            process.kill()
        assert process.returncode == code and len(rows(folder)) == expected
    assert err == (f"Anna: case 2 of 3\nstopped; 2 rated cases are in {folder}/ratings.csv; the same command goes on with "
                   f"them\n")


# ---------------------------------------------------------------------------------------------------------------------
# In a browser


def test_in_a_browser_it_fits_desktop_and_phone_in_light_and_dark(folder, tmp_path):
    cases = folder / "cases.jsonl"
    cases.write_text(re.sub("castle|lake|road", "swan" * 60, cases.read_text()))
    with serving(folder) as address:
        page, source = read(first(address, "x" * 40))
        lost = read(f"{address}/case", hidden(page), 422)[1]
        best = read(f"{address}/case", hidden(page) | ratings(3))[1]
        frames = ""
        for text in (read(address)[1], source, lost, best):
            for img in page.all("img"):
                path = folder / "nest_sparrow" / "c0.png"
                text = text.replace(f'src="{escape(img["src"])}"', f'src="{path.as_uri()}"')
            frames += "".join(f'<iframe width="{width}" height="800" srcdoc="{escape(text)}"></iframe>'
                              for width in (1280, 768, 390, 320))
        (tmp_path / "frames.html").write_text(f"<!DOCTYPE html><meta charset=utf-8><body>{frames}{MEASURE}", "utf-8")
        said = chromium(tmp_path, "--virtual-time-budget=5000", "--dump-dom", f"file://{tmp_path}/frames.html")
        sizes = re.findall(r"(\d+) (\d+) (\d+) (\d+)", said)
        assert len(sizes) == 16, said[-2000:]
        for i, (width, content, loaded, images) in enumerate(map(int, size) for size in sizes):
            assert content <= width and loaded == images == (3 if i >= 4 else 0)

        for scheme, (width, height) in ((s, size) for s in ("light", "dark") for size in ((1280, 900), (390, 844))):
            shot = tmp_path / f"{scheme}{width}.png"
            chromium(tmp_path, f"--blink-settings=preferredColorScheme={int(scheme == 'light')}",
                     f"--window-size={width},{height}", f"--screenshot={shot}", first(address, "Anna"))
            pixels = np.array(Image.open(shot).convert("RGB")).astype(int)
            light = pixels.mean(2)
            assert (light[:, 0] > 230).all() if scheme == "light" else (light[:, 0] < 50).all()  # the page's edge
            assert np.ptp(light[:150, 16:-16]) > 150  # the heading
            reds = [((np.abs(pixels[..., 0] - red) < 4) & (np.abs(pixels[..., 2] - 90) < 4)) for red in METHODS.values()]
            seen = sum(picture.sum() > 200 * 200 for picture in reds)
            assert seen == (3 if width == 1280 else 1)  # all pictures beside one another, or below


def test_a_browser_can_send_everything(folder, tmp_path, monkeypatch):
    clicks = """<script>onload = () => {
      document.querySelectorAll("input[name=rater]:not([type=hidden])").forEach(name => name.value = "Anna");
      document.querySelectorAll("input[type=radio][value='2']").forEach(choice => choice.click());
      document.querySelectorAll("button").forEach(button => button.click());
    }</script></body>"""
    document = rate.document
    monkeypatch.setattr(rate.Handler, "policy", f"{rate.Handler.policy}; script-src 'unsafe-inline'")
    monkeypatch.setattr(rate, "document", lambda *parts: document(*parts).replace("</body>", clicks))
    with serving(folder) as address:
        said = chromium(tmp_path, "--virtual-time-budget=20000", "--dump-dom", address)
    assert "Thank you, Anna!" in said and [row["quality"] for row in rows(folder)] == [2.0] * 9
