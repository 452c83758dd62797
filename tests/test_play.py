"""The page of sample.py --play, over HTTP and in a browser: what is asked is drawn, judged and told, and nothing else."""

import base64
import http.client
import io
import json
import re
import threading
import time
from contextlib import contextmanager
from functools import partial

import pytest
from PIL import Image

import data
import feedback
import sample
from parts import play
from tests.browser import Browser
from tests.test_sample import run

PROMPT = "a swan on the lake"
QUICK = ["--sample-steps", "2", "--size", "64", "--prompt", PROMPT]


def prompt_at(v, a):
    return data.with_numbers(PROMPT, v, a)  # the form of a target that RefineOptions has by itself


def a_wish(**changes):
    return {"tab": "one", "prompt": PROMPT, "seed": 4, "targets": [[7, 3]], "improve": None} | changes


def request(address, method, path, body=None, **headers):
    """(status, text) of a request."""
    connection = http.client.HTTPConnection(address, timeout=120)
    connection.request(method, path, body, headers)
    answer = connection.getresponse()
    return answer.status, answer.read().decode()


def begin(address, **changes):
    """The answer to a wish, which waits for its turn or is fulfilled."""
    connection = http.client.HTTPConnection(address, timeout=120)
    connection.request("POST", "/draw", json.dumps(a_wish(**changes)))
    return connection.getresponse()


def lines_of(answer):
    """All lines of an answer, once it has ended."""
    return [json.loads(line) for line in answer.read().splitlines()]


def ask(address, **changes):
    """The lines of the answer to a wish."""
    answer = begin(address, **changes)
    assert answer.status == 200, answer.read()
    return lines_of(answer)


def rounds(lines):
    return [line["round"] for line in lines if "round" in line]


def png(image):
    return base64.b64decode(image["file"].removeprefix("data:image/png;base64,"))


class Studio:
    """Draws plain pictures and judges them without a model; `begun` and `go` hold a drawing up."""

    def __init__(self, *flags):
        self.drawn, self.begun, self.go, self.stop = [], threading.Semaphore(0), threading.Semaphore(0), False
        self.hold, self.count = False, 3  # of the sampler's steps
        self.studio = play.Studio(
            sample.parse_args(["--play", "--n", "2", "--prompt", PROMPT, *flags]), {"model": "<a model>"}, "a judge", 2000,
            self.draw, partial(feedback.refine_rounds, judge=self.judge), lambda image: "awe", feedback.RefineOptions())

    def draw(self, prompts, seeds, progress):
        if self.stop:
            raise KeyboardInterrupt
        if "broken" in prompts[0]:
            raise RuntimeError("out of\nwit")
        for step in progress(range(self.count)):
            time.sleep(0.002)
            if self.hold and step == 1:
                self.begun.release()
                assert self.go.acquire(timeout=60)
        self.drawn.append((prompts[0], seeds))
        return [Image.new("RGB", (16, 16), (30 * seed % 256, 90, 200)) for seed in seeds]

    def judge(self, conversations, attempt=0):
        texts = [messages[1]["content"][-1]["text"] for messages in conversations]
        if "optimized_prompt" in texts[0]:
            return [json.dumps({"analysis": "<dull>", "optimized_prompt": f"{PROMPT}, golden{'!' * len(self.drawn)}"})]
        return [f'<think>a <b></think>{{"valence": {6 + i}, "arousal": 5}}' for i in range(len(texts))]


@contextmanager
def serving(studio, port=0):
    """(address, studio) of a page whose models a Studio stands for; ends as by Ctrl-C."""
    server = play.open_page(port)

    def serve():
        with pytest.raises(KeyboardInterrupt):
            play.serve(server, studio.studio)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    address = f"127.0.0.1:{server.server_port}"
    try:
        yield address
    finally:
        studio.stop, studio.hold = True, False
        studio.studio.last = {}
        for _ in range(9):
            studio.go.release()
        last = begin(address, tab="stop")
        thread.join(60)
        last.close()
        assert not thread.is_alive()
        studio.stop = False


# ---------------------------------------------------------------------------------------------------------------------
# The miniature, as the command starts it


def test_the_command_draws_what_sample_py_draws_with_progress_and_ends_by_ctrl_c(tmp_path, capfd, monkeypatch):
    assert run("--v", 7, "--a", 3, "--seed", 4, *QUICK, "--out", tmp_path) == 0
    capfd.readouterr()
    opened, codes = [], []
    open_page, draw = play.open_page, sample.draw

    def stoppable(generator, args, prompts, seeds, progress):
        if "stop" in prompts[0]:
            raise KeyboardInterrupt
        return draw(generator, args, prompts, seeds, progress)

    monkeypatch.setattr(play, "open_page", lambda port: opened.append(open_page(port)) or opened[0])
    monkeypatch.setattr(sample, "draw", stoppable)
    thread = threading.Thread(target=lambda: codes.append(run("--play", "--port", 0, *QUICK, "--n", 2)), daemon=True)
    thread.start()
    while not opened and thread.is_alive():
        thread.join(0.1)
    address = f"127.0.0.1:{opened[0].server_port}"

    lines = ask(address)
    assert [line["step"] / line["steps"] for line in lines if "step" in line] == [0.5, 1]
    assert list(lines[0]) == ["prompt"] and lines[-1] == {"done": True}
    [drawn] = rounds(lines)
    assert png(drawn["images"][0]) == (tmp_path / "round0_seed4.png").read_bytes()
    entry = json.loads((tmp_path / "run.json").read_text())["cells"][0]["rounds"][0]
    assert drawn["images"][0] | {"file": "round0_seed4.png"} == entry["images"][0] and drawn["prompt"] == entry["prompt"]

    first, second = rounds(ask(address, improve=drawn["prompt"]))
    assert [image["seed"] for image in first["images"] + second["images"]] == [4, 5, 6, 7]
    assert first["changes"] == first["prompt"] == drawn["prompt"] and "<ins>" in second["changes"]
    assert first["next_prompt"] == second["prompt"] and first["analysis"].startswith("The first has")

    assert ask(address, prompt="zyzzyva qua qua")[-1] == {"done": True}  # words it has never learnt
    last = begin(address, prompt="stop")
    thread.join(60)
    last.close()
    out, err = capfd.readouterr()
    assert codes == [130] and out == f"http://{address}/\n" and err.endswith("\nstopped\n") and "Traceback" not in err


@pytest.mark.parametrize(("flags", "said"), [
    (("--grid", 3), "leave out --grid, --out and --json"), (("--out", "x"), "leave out"), (("--json",), "leave out"),
    (("--n", 1), "--n 1: expected 2 or more"), (("--port", 70000), "--port"), (("--judge", "none", "--rewrite"), "need a judge")])
def test_flags_that_do_not_go_together_are_one_line(flags, said, capsys):
    assert run("--play", *flags) == 2
    out, err = capsys.readouterr()
    assert not out and err.startswith("error: ") and said in err and err.count("\n") == 1


def test_a_taken_port_is_refused_before_models_are_loaded(capsys, monkeypatch):
    monkeypatch.setattr(sample, "load", None)
    with serving(Studio()) as address:
        assert run("--play", "--port", address.split(":")[1]) == 2
    assert "give a free one, or 0 for any" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------------
# Wishes


def test_a_strip_has_a_judged_picture_for_each_target_from_the_same_noise():
    with serving(Studio()) as address:
        targets = [[1, 9], [2.5, 5], [9, 1.25]]
        found = rounds(ask(address, targets=targets))
    assert [[round["v"], round["a"]] for round in found] == targets
    assert [round["images"][0]["seed"] for round in found] == [4, 4, 4]
    assert all(round["best"] == 0 and round["worst"] is None for round in found)
    facts = Image.open(io.BytesIO(png(found[2]["images"][0]))).text
    assert facts == {"prompt": found[2]["prompt"], "seed": "4", "valence": "9.0", "arousal": "1.25", "model": "<a model>",
                     "judge": "a judge", "judged_valence": "6.0", "judged_arousal": "5.0", "judged_emotion": "None",
                     "reasoning": "a <b>"}


def test_feedback_goes_on_from_the_last_pictures_without_drawing_them_again():
    studio = Studio()
    with serving(studio) as address:
        first, second = rounds(ask(address, improve=f"{PROMPT}, calm"))
        assert second["changes"] == f"{PROMPT}, <del>calm</del> <ins>golden!</ins>"
        again, third = rounds(ask(address, improve=second["prompt"], seed=6))
        assert again["images"] == second["images"] and third["prompt"].endswith("golden!!")
        assert [seeds for _, seeds in studio.drawn] == [[4, 5], [6, 7], [8, 9]]
    assert (first["best"], first["worst"]) == (1, 0) and first["analysis"] == "<dull>"


def test_without_a_judge_there_are_pictures_and_no_feedback():
    studio = Studio()
    studio.studio.judge, studio.studio.refine = None, partial(feedback.refine_rounds, judge=None)
    with serving(studio) as address:
        [drawn] = rounds(ask(address))
        assert drawn["images"][0]["v"] is None and drawn["best"] is None
        assert request(address, "POST", "/draw", json.dumps(a_wish(improve="x")))[0] == 400
        assert '<button id="improve" type="button" hidden>' in request(address, "GET", "/")[1]


def test_an_error_is_told_in_one_line_and_the_next_wish_is_fulfilled(capfd):
    with serving(Studio()) as address:
        assert ask(address, prompt="broken")[-1] == {"error": "RuntimeError: out of wit"}
        assert ask(address)[-1] == {"done": True}
    assert "error: RuntimeError: out of wit\n" in capfd.readouterr().err


def test_wishes_wait_for_one_another_and_a_tab_that_asks_anew_gives_up_its_last():
    studio = Studio()
    with serving(studio) as address:
        studio.hold = True
        first = begin(address, seed=1)
        assert studio.begun.acquire(timeout=60)
        other = begin(address, tab="two", seed=2)
        waiting, third = (begin(address, tab="three", seed=seed) for seed in (3, 4))
        assert lines_of(waiting) == []
        anew = begin(address, seed=5)
        assert not rounds(lines_of(first))  # it ends although its drawing is held up
        studio.hold = False
        studio.go.release()
        for answer in (other, third, anew):
            assert lines_of(answer)[-1] == {"done": True}
    assert [seeds for _, seeds in studio.drawn] == [[2], [4], [5]]  # what was given up was not drawn to its end


def test_a_closed_tab_ends_its_drawing():
    studio = Studio()
    with serving(studio) as address:
        studio.hold, studio.count = True, 1000
        answer = begin(address)
        assert studio.begun.acquire(timeout=60)
        answer.close()
        studio.hold = False
        studio.go.release()
        assert ask(address, tab="two", seed=9)[-1] == {"done": True}
    assert [seeds for _, seeds in studio.drawn] == [[9]]


# ---------------------------------------------------------------------------------------------------------------------
# Requests that the page does not make

BAD = {
    "no JSON": ("{", "expected JSON"), "no UTF-8": (b"\xff\xfe\xff", "expected JSON"), "a list": ("[]", "expected a JSON object with tab, "),
    "deep": ("[" * 90_000, "expected JSON"), "a field less": (json.dumps({"tab": "one"}), "expected a JSON object with"),
    "a field more": (a_wish(more=1), "expected a JSON object with"), "V 12": (a_wish(targets=[[12, 3]]), "valence: expected a number in 1..9, got 12"),
    "V a text": (a_wish(targets=[["7", 3]]), 'valence: expected a number, got "7"'),
    "V true": (a_wish(targets=[[True, 3]]), "valence: expected a number, got true"),
    "A nothing": (a_wish(targets=[[7, None]]), "arousal: expected a number, got null"),
    "A NaN": (a_wish(targets=[[7, float("nan")]]), "arousal: expected a number in 1..9"),
    "no target": (a_wish(targets=[]), "1 to 9 targets"), "ten targets": (a_wish(targets=[[5, 5]] * 10), "1 to 9 targets"),
    "half a target": (a_wish(targets=[[5]]), "[valence, arousal]"), "a target less": (a_wish(targets=5), "a list"),
    "seed 1.5": (a_wish(seed=1.5), "seed: expected a whole number, got 1.5"), "seed -1": (a_wish(seed=-1), "seed: expected a whole number in 0.."),
    "no prompt": (a_wish(prompt=" "), "prompt: expected 1 to 2,000 characters"), "a long prompt": (a_wish(prompt="x" * 2001), "got 2,001 characters"),
    "half a letter": (a_wish(prompt="\ud800"), "UTF-8 text"), "prompt 5": (a_wish(prompt=5), "prompt: expected a text, got 5"),
    "tab": (a_wish(tab="x" * 41), "tab: expected 1 to 40"), "improve 1": (a_wish(improve=1), "improve: expected a text"),
    "a strip to improve": (a_wish(improve="x", targets=[[5, 5], [6, 6]]), "one target"),
}


@pytest.fixture(scope="module")
def address():
    with serving(Studio()) as address:
        yield address


def error_of(text):
    """The message of an answer that must be JSON of one line."""
    assert text.endswith("}\n") and text.count("\n") == 1 and list(json.loads(text)) == ["error"]
    return json.loads(text)["error"]


@pytest.mark.parametrize("case", BAD)
def test_a_bad_wish_is_refused_in_one_line(case, address):
    body, said = BAD[case]
    status, text = request(address, "POST", "/draw", body if isinstance(body, str | bytes) else json.dumps(body))
    assert status == 400 and said in error_of(text)


def test_other_paths_methods_names_and_lengths_are_refused(address):
    port = address.split(":")[1]
    wish = json.dumps(a_wish())
    for expected, method, path, body, headers in (
            (404, "GET", "/index.html", None, {}), (404, "POST", "/nowhere", wish, {}), (404, "GET", "/../sample.py", None, {}),
            (405, "GET", "/draw", None, {}), (405, "POST", "/", wish, {}), (501, "PUT", "/draw", wish, {}),
            (501, "DELETE", "/", None, {}), (413, "POST", "/draw", "x" * 3_000_000, {}),
            (411, "POST", "/draw", None, {"Content-Length": "x"}), (403, "GET", "/", None, {"Host": "evil.example"}),
            (403, "GET", "/", None, {"Host": f"evil.example:{port}"}), (403, "POST", "/draw", wish, {"Host": "localhost:1"}),
            (403, "POST", "/draw", wish, {"Origin": "http://evil.example"}), (403, "POST", "/draw", wish, {"Origin": "null"})):
        status, text = request(address, method, path, body, **headers)
        assert status == expected and error_of(text), (method, path, headers)
    assert request(address, "GET", "/", Host=f"localhost:{port}")[0] == 200
    assert request(address, "POST", "/draw", wish, Origin=f"http://{address}")[0] == 200


def test_the_page_loads_nothing_from_elsewhere_and_holds_what_it_begins_with_as_text():
    studio = Studio("--v", "2.5", "--prompt", 'a "swan" </textarea><script>alert(1)</script>')
    with serving(studio) as address:
        html = request(address, "GET", "/")[1]
        for path in ("/play.js", "/play.css"):
            assert "http" not in request(address, "GET", path)[1].replace("http://www.w3.org", "")
    assert "alert(1)" in html and "<script>" not in html and "<a model>" not in html
    assert re.findall('(?:src|href)="(.*?)"', html) == ["data:,", "/play.css", "/play.js"]
    start = json.loads(re.search('data-start="(.*?)"', html)[1].replace("&quot;", '"'))
    assert start["v"] == 2.5 and start["a"] == 3 and start["command"].startswith("python sample.py --play --port ")


# ---------------------------------------------------------------------------------------------------------------------
# In a browser

PLACE = """(([v, a]) => { const p = new DOMPoint(4 + 40 * v, 376 - 40 * a)
  .matrixTransform(document.getElementById("plane").getScreenCTM()); return [p.x, p.y] })"""
IDLE = "!document.getElementById('said').inert && document.getElementById('status').textContent === ''"


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


def opened(browser, address, **size):
    tab = browser.open(f"http://{address}/", **size)
    tab.wait(f"document.getElementById('judged_v')?.textContent && {IDLE}")
    return tab


def place(tab, *target):
    """A target's point in the window."""
    return tab.value(f"{PLACE}({list(target)})")


def text(tab, name):
    return tab.value(f"document.getElementById('{name}').innerText")


def cards(tab, section):
    return tab.value(f"[...document.querySelectorAll('#{section} .card .numbers')].map(e => e.innerText)")


def test_clicks_keys_and_arrows_draw_and_feedback_marks_what_it_changes(browser):
    studio = Studio()
    with serving(studio) as address:
        tab = opened(browser, address)
        assert studio.drawn == [(prompt_at(7, 3), [0])]  # the first picture needs no click

        tab.drag(place(tab, 2, 8))
        tab.wait(f"document.getElementById('wanted_v').innerText === '2.00' && {IDLE}")
        assert studio.drawn[-1] == (text(tab, "prompt"), [0]) == (prompt_at(2, 8), [0])
        assert [text(tab, name) for name in ("emotion", "wanted_a", "judged_v", "judged_a", "reasoning")] == [
            "Awe", "8.00", "6.00", "5.00", "a <b>"]
        dot = tab.value("(c => [c.cx.baseVal.value, c.cy.baseVal.value])(document.querySelector('#marks circle[fill]'))")
        assert dot == [4 + 40 * 6, 376 - 40 * 5]
        link = tab.value("(a => [a.download, a.href])(document.getElementById('save'))")
        facts = Image.open(io.BytesIO(png({"file": link[1]}))).text
        assert link[0] == "v2_a8_seed0.png" and facts["valence"] == "2.0" and facts["judged_emotion"] == "awe"

        for name, modifiers in (("ArrowRight", 0), ("ArrowUp", 8), ("ArrowUp", 8), ("Enter", 0)):
            tab.key(name, modifiers)
        tab.wait(f"document.getElementById('wanted_v').innerText === '2.10' && {IDLE}")
        assert studio.drawn[-1][0] == prompt_at(2.1, 9) and text(tab, "wanted_a") == "9.00"

        tab.drag(place(tab, 1, 1), place(tab, 3, 3), place(tab, 9, 5))
        tab.wait(f"document.querySelectorAll('#strip .card').length === 5 && {IDLE}")
        along = [(1, 1), (3, 2), (5, 3), (7, 4), (9, 5)]
        assert studio.drawn[-5:] == [(prompt_at(*target), [0]) for target in along]
        assert cards(tab, "strip") == ["V 6.00 A 5.00"] * 5 and text(tab, "wanted_v") == "9.00"
        tab.value("document.querySelectorAll('#strip .look')[1].click()")
        assert text(tab, "wanted_v") == "3.00"

        tab.value("document.getElementById('improve').click()")
        tab.wait(f"document.querySelectorAll('#feedback article').length === 2 && {IDLE}")
        assert cards(tab, "feedback") == ["V 6.00 A 5.00", "V 7.00 A 5.00"] * 2 and not cards(tab, "strip")
        golden = f"golden{'!' * (len(studio.drawn) - 1)}"
        assert tab.value("document.querySelector('#feedback ins').innerText") == golden
        assert tab.value("document.querySelector('#feedback del').innerText") == prompt_at(3, 2).removeprefix(f"{PROMPT}, ")
        tab.value("document.getElementById('improve').click()")
        tab.wait(f"document.querySelectorAll('#feedback article').length === 3 && {IDLE}")
        assert [seeds for _, seeds in studio.drawn[-3:]] == [[0, 1], [2, 3], [4, 5]]

        tab.drag(place(tab, 3, 6), modifiers=8)  # Shift: from the last target, 3 and 2
        tab.wait(f"document.querySelectorAll('#strip .card').length === 5 && {IDLE}")
        assert studio.drawn[-4:] == [(prompt_at(3, a), [0]) for a in (3, 4, 5, 6)]


def test_two_tabs_are_answered_a_bad_wish_is_told_and_a_lost_server_is_waited_for(browser):
    studio = Studio()
    with serving(studio) as address:
        tabs = [opened(browser, address) for _ in range(2)]
        for tab, v in zip(tabs, (2, 3)):
            tab.drag(place(tab, v, 5))
        for tab, v in zip(tabs, (2, 3)):
            tab.wait(f"document.getElementById('wanted_v').innerText === '{v}.00' && {IDLE}")

        tab = tabs[0]
        tab.value("document.forms.form.v.value = 12, document.querySelector('#form button').click()")
        tab.wait("document.querySelector('#status.alert') !== null")
        assert text(tab, "status") == "valence: expected a number in 1..9, got 12" and text(tab, "wanted_v") == "2.00"
    tab.drag(place(tab, 4, 4))
    tab.wait("document.getElementById('status').innerText.includes('does not answer')")
    port = address.split(":")[1]
    assert text(tab, "status") == f"The server does not answer. Start `python sample.py --play --port {port}` again; this page then goes on."
    with serving(studio, int(port)):
        tab.wait(f"document.getElementById('wanted_v').innerText === '4.00' && {IDLE}")


def test_it_fits_desktop_and_phone_in_light_and_dark(browser):
    studio = Studio("--prompt", "swan" * 100)
    with serving(studio) as address:
        tab = opened(browser, address, width=390, height=844)
        tab.call("Emulation.setTouchEmulationEnabled", enabled=True)
        x, y = place(tab, 3, 3)
        for kind, points in (("touchStart", [{"x": x, "y": y}]), ("touchMove", [{"x": x + 90, "y": y - 90}]), ("touchEnd", [])):
            tab.call("Input.dispatchTouchEvent", type=kind, touchPoints=points)
        tab.wait(f"document.querySelectorAll('#strip .card').length === 5 && {IDLE}")
        for after in ("", "document.getElementById('improve').click()"):
            if after:
                tab.value(after)
                tab.wait(f"document.querySelectorAll('#feedback article').length === 2 && {IDLE}")
            for width in (1280, 768, 390, 320):
                tab.resize(width, 844)
                assert tab.value("document.documentElement.scrollWidth") <= width
        for scheme, light in (("light", True), ("dark", False)):
            tab.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
            red = tab.value("parseInt(getComputedStyle(document.body).backgroundColor.match(/\\d+/)[0])")
            assert red > 230 if light else red < 50
