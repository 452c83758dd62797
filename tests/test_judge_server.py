"""A judge behind OpenAI's protocol: against a made-up server, and against `transformers serve`."""

import base64
import contextlib
import hashlib
import io
import json
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from PIL import Image

import feedback
import sample
import train_gen
from parts import judge_server, pipeline
from parts.cli import UserError
from parts.files import read_json
from parts.judge_server import JudgeServer
from parts.pipeline import TINY
from tests.launch import log_of
from tiny.dataset import write_tiny

COLOURS = [(10 * i, 255 - 10 * i, 7 * i) for i in range(20)]
PICTURES = [Image.new("RGB", (40, 32), colour) for colour in COLOURS]
ASKED = [feedback.ask("regression", picture) for picture in PICTURES]


def said(text, finish="stop"):
    return 200, {"choices": [{"message": {"role": "assistant", "content": text}, "finish_reason": finish}]}


def picture_in(body):
    """The picture of a request's last message."""
    (url,) = [part["image_url"]["url"] for part in body["messages"][-1]["content"] if part["type"] == "image_url"]
    return Image.open(io.BytesIO(base64.b64decode(url.removeprefix("data:image/png;base64,"))))


def judged(body):
    """An answer whose valence and arousal only depend on the picture."""
    v, a = (1 + byte % 8 for byte in hashlib.sha256(picture_in(body).tobytes()).digest()[:2])
    return said(f'<think>I see it.</think><answer>{{"valence": {v}, "arousal": {a}}}</answer>')


class Mock(ThreadingHTTPServer):
    """A server on loopback whose `answer(body)` gives (status, reply); bytes are sent as they are."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, answer, models=("mock",)):
        super().__init__(("127.0.0.1", 0), Handler)
        self.answer, self.models, self.bodies, self.keys = answer, models, [], []
        self.lock, self.open, self.peak = threading.Lock(), 0, 0
        self.url = f"http://127.0.0.1:{self.server_port}/v1"

    def handle_error(self, request, address):
        pass  # a client that did not wait


class Handler(BaseHTTPRequestHandler):
    def reply(self, status, content):
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def do_GET(self):
        assert self.path == "/v1/models"
        self.reply(200, {"object": "list", "data": [{"id": name} for name in self.server.models]})

    def do_POST(self):
        assert self.path == "/v1/chat/completions"
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        mock = self.server
        with mock.lock:
            mock.bodies.append(body)
            mock.keys.append(self.headers["Authorization"])
            mock.open += 1
            mock.peak = max(mock.peak, mock.open)
        try:
            status, content = mock.answer(body)
        finally:
            with mock.lock:
                mock.open -= 1
        if status is None:  # the connection breaks
            self.connection.shutdown(socket.SHUT_RDWR)
        else:
            self.reply(status, content)

    def log_message(self, *args):
        pass


@contextlib.contextmanager
def serving(answer, **options):
    with Mock(answer, **options) as mock:
        thread = threading.Thread(target=mock.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield mock
        finally:
            mock.shutdown()
            thread.join()


@pytest.fixture(autouse=True)
def hurry(monkeypatch):
    monkeypatch.setattr(judge_server, "WAIT", 0.01)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def closed_url():
    """An address where nobody listens."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{listener.getsockname()[1]}/v1"


def test_answers_come_in_the_order_of_the_pictures_whichever_is_ready_first():
    def late_if_dark(body):
        colour = picture_in(body).getpixel((0, 0))
        time.sleep(0.05 if colour[0] < 50 else 0)
        return said(str(colour))

    with serving(late_if_dark) as mock:
        judge = pipeline.judge_of(pipeline.load_judge(mock.url, "cpu", 64), progress=False)
        assert judge(ASKED) == [str(colour) for colour in COLOURS]
        assert 1 < mock.peak <= judge_server.AT_ONCE
        assert judge(ASKED[:2], 1, 3) == [str(colour) for colour in COLOURS[:2] for _ in range(3)]


def test_a_request_has_what_a_judge_of_this_process_is_asked_with():
    with serving(lambda body: said("x")) as mock:
        server = JudgeServer(mock.url)
        pipeline.judge_of(server, max_new_tokens=77, progress=False)(ASKED[:1])
        pipeline.judge_of(server, progress=False)(ASKED[:1], 2, 3)
    greedy, *drawn = mock.bodies
    assert greedy.keys() == {"model", "messages", "max_tokens", "temperature", "top_p"}
    assert (greedy["model"], greedy["max_tokens"], greedy["temperature"], greedy["top_p"]) == ("mock", 77, 0, 1)
    assert [m["role"] for m in greedy["messages"]] == ["system", "user"]
    assert greedy["messages"][0]["content"] == [{"type": "text", "text": feedback.PROMPTS["system"]}]
    assert greedy["messages"][1]["content"][1] == {"type": "text", "text": feedback.PROMPTS["regression"]}
    assert picture_in(greedy).tobytes() == PICTURES[0].tobytes()
    assert {body["temperature"] for body in drawn} == {0.7} and sorted(b["seed"] for b in drawn) == [20_000, 20_001, 20_002]


@pytest.mark.parametrize("failure", [
    (500, {"error": "out of memory"}), (429, {}), (503, b""), (200, b"<html>"), (200, b""), (200, []), (200, {"choices": []}),
    (200, {"choices": [{"message": None}]}), (None, None)], ids=str)
def test_what_may_pass_is_asked_again(failure):
    left = [failure] * (judge_server.TRIES - 1)
    with serving(lambda body: left.pop() if left else said("at last")) as mock:
        (answer,), = JudgeServer(mock.url).generate(ASKED[:1], temperature=0)
    assert answer.text == "at last" and len(mock.bodies) == judge_server.TRIES


@pytest.mark.parametrize("failure, reason", [
    ((500, {"error": "out of memory"}), "500 Internal Server Error: .*out of memory"), ((200, b"{"), "its reply is not in the form"),
    ((None, None), "closed connection|reset")])
def test_what_does_not_pass_ends_in_one_line(failure, reason):
    with serving(lambda body: failure) as mock, pytest.raises(UserError, match=reason) as caught:
        JudgeServer(mock.url).generate(ASKED)
    line = str(caught.value)
    assert line.startswith(f"{mock.url} does not answer (") and line.endswith("): start it, then the same command goes on")
    assert "\n" not in line and len(mock.bodies) <= judge_server.AT_ONCE * judge_server.TRIES


def test_a_request_that_is_refused_is_not_made_again():
    refusal = {"detail": "Server is pinned to\n'other'"}
    with serving(lambda body: (400, refusal)) as mock, pytest.raises(UserError, match="refuses /chat/completions for model 'mock'") as caught:
        JudgeServer(mock.url).generate(ASKED[:1])
    assert len(mock.bodies) == 1 and "pinned to" in str(caught.value) and "\n" not in str(caught.value)


def test_a_server_that_is_not_there_is_told_at_the_start_and_later():
    with pytest.raises(UserError, match=r"does not answer \(.*refused\): start it, then the same command goes on"):
        JudgeServer(closed_url())
    with serving(lambda body: said("x")) as mock:
        server = JudgeServer(mock.url)
    with pytest.raises(UserError, match="does not answer"):
        server.generate(ASKED)


def test_a_server_that_does_not_say_anything_has_a_time_limit(monkeypatch):
    monkeypatch.setattr(judge_server, "PATIENCE", 0.1)
    monkeypatch.setattr(judge_server, "TRIES", 2)
    with serving(lambda body: time.sleep(0.4) or said("late")) as mock, pytest.raises(UserError, match=r"does not answer \(timed out\)"):
        JudgeServer(mock.url).generate(ASKED[:1])


def test_after_ctrl_c_no_request_is_made_again(monkeypatch):
    monkeypatch.setattr(judge_server, "WAIT", 0.01)
    with serving(lambda body: time.sleep(0.2) or (503, {})) as mock:
        server = JudgeServer(mock.url)
        asked = []
        request = server.request

        def count(path, content):
            asked.append(path)
            return request(path, content)

        def interrupt(futures):
            time.sleep(0.05)  # the first requests are under way
            raise KeyboardInterrupt

        monkeypatch.setattr(server, "request", count)
        with pytest.raises(KeyboardInterrupt):
            server.generate(ASKED[:2], progress=interrupt)
        assert len(asked) == 2


def test_an_answer_that_is_cut_or_no_text_is_unreadable():
    answers = [said(None), said(7), said([{"type": "text", "text": "x"}]), said('<think>I see</think><answer>{"valence": 4, "a', "length"),
               (200, {"choices": [{"message": {}}]}), said('<think></think><answer>{"valence": 4, "arousal": 5}</answer>')]
    with serving(lambda body: answers[COLOURS.index(picture_in(body).getpixel((0, 0)))]) as mock:
        judge = pipeline.judge_of(JudgeServer(mock.url), progress=False)
        readings = feedback.judge_images(judge, PICTURES[:len(answers)], strict=True)
    assert [reading.v for reading in readings] == [None] * 5 + [4.0] and len(mock.bodies) == len(answers)


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning"])
def test_a_thought_that_the_server_has_taken_out_of_the_answer_is_put_back(name):
    message = {"content": '<answer>{"valence": 4, "arousal": 5}</answer>', name: "I see it."}
    with serving(lambda body: (200, {"choices": [{"message": message}]})) as mock:
        reading, = feedback.judge_images(pipeline.judge_of(JudgeServer(mock.url), progress=False), PICTURES[:1], strict=True)
    assert (reading.v, reading.a, reading.reasoning) == (4.0, 5.0, "I see it.")


def test_the_model_is_the_one_behind_the_mark_or_the_first_listed(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    with serving(lambda body: said("x"), models=("one", "two")) as mock:
        for address in (mock.url, f"{mock.url}/", f"{mock.url}#two", f"{mock.url}#a/b=c"):
            JudgeServer(address).generate(ASKED[:1])
    assert [body["model"] for body in mock.bodies] == ["one", "one", "two", "a/b=c"] and set(mock.keys) == {"Bearer secret"}
    with serving(lambda body: said("x"), models=()) as mock, pytest.raises(UserError, match="lists no model; give the name of one, as in http"):
        JudgeServer(mock.url)


def test_a_reading_of_probabilities_is_refused_in_one_line():
    with pytest.raises(UserError, match="gives answers but no probabilities"):
        JudgeServer("http://127.0.0.1:1/v1#m").processor  # noqa: B018


def test_sample_and_its_feedback_ask_a_server(tmp_path, capsys):
    def answer(body):
        if len(body["messages"][-1]["content"]) < 3:
            return judged(body)
        return said('{"analysis": "darker", "optimized_prompt": "a swan on the lake at dusk, dark water"}')

    with serving(answer) as mock:
        assert sample.main(["--v", "2", "--a", "7", "--prompt", "a swan on the lake", "--rounds", "2", "--n", "2", "--sample-steps", "1",
                            "--size", "64", "--judge", mock.url, "--device", "cpu", "--out", str(tmp_path)]) == 0
    record = read_json(tmp_path / "run.json")
    assert record["judge"] == mock.url and record["cells"][0]["rounds"][1]["prompt"].endswith("dark water")
    assert all(image["v"] for each in record["cells"][0]["rounds"] for image in each["images"])
    assert sample.main(["--v", "2", "--a", "7", "--judge", closed_url(), "--out", str(tmp_path / "other")]) == 2
    assert "start it, then the same command goes on" in capsys.readouterr().err


def test_a_training_whose_server_dies_goes_on_where_it_was(tmp_path, capsys):
    write_tiny(tmp_path / "dataset", train=4, test=2, seed=8)
    flags = ["--data", tmp_path / "dataset", "--out", tmp_path / "run", "--batch", 2, "--group", 2, "--size", 64, "--sde-steps", 2,
             "--sample-steps", 2, "--window", 1, "--window-within", 1, "--eval-rows", 2, "--save-every", 1, "--steps", 2,
             "--pickscore", "none", "--reward-weights", "emotion=1", "--readings", 1, "--lora-rank", 4, "--device", "cpu"]
    alive = True

    def answer(body):
        return judged(body) if alive or len(mock.bodies) <= 2 + 4 else (503, {})  # an evaluation and a step

    with serving(answer) as mock:
        alive = False
        flags = [str(flag) for flag in (*flags, "--judge", mock.url)]
        assert train_gen.main(flags) == 2
        assert "does not answer (503 Service Unavailable: {}): start it" in capsys.readouterr().err
        first = log_of(tmp_path / "run")
        alive = True
        assert train_gen.main(flags) == 0
    log = log_of(tmp_path / "run")
    assert [record["step"] for record in log] == [0, 1, 2] and log[:2] == first and log[2]["unreadable"] == 0


# --------------------------------------------------------------------------------------------------
# The real other side


@contextlib.contextmanager
def transformers_serving(model, folder):
    """The address of a `transformers serve` of a model, by the Python that $OTHER_PYTHON names, or this one."""
    url = closed_url()
    port = url.removesuffix("/v1").rpartition(":")[2]
    python = os.environ.get("OTHER_PYTHON", sys.executable)
    with open(folder / "log", "w") as log:
        server = subprocess.Popen([python, "-m", "transformers.cli.transformers", "serve", str(model), "--host", "127.0.0.1",
                                   "--port", port, "--device", "cpu", "--dtype", "float32"], stdout=log, stderr=log)
    try:
        for _ in range(600):
            assert server.poll() is None, (folder / "log").read_text()[-2000:]
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).read()
                break
            time.sleep(0.5)
        yield f"{url}#{model}"
    finally:
        server.kill()
        server.wait()


@pytest.mark.slow
def test_transformers_serve_gives_the_miniature_judge_s_own_answers(tmp_path):
    """Needs torchvision, fastapi, uvicorn and openai beside transformers, in a Python of its own: see $OTHER_PYTHON."""
    folder = Path(TINY / "judge").resolve()
    generator = pipeline.load_generator(TINY)
    pictures = pipeline.to_images(generator.draw(["a swan on the lake at noon", "a castle in the hills at night"], [0, 1], 128, 8))
    questions = [feedback.ask(task, picture) for picture in pictures for task in feedback.TASKS]
    local = pipeline.judge_of(pipeline.load_judge(folder, "cpu", 128), progress=False)
    with transformers_serving(folder, tmp_path) as address, torch.no_grad():
        remote = pipeline.judge_of(pipeline.load_judge(address, "cpu", 128), progress=False)
        assert remote(questions) == local(questions)
        assert all(said.v is not None for said in feedback.judge_images(remote, pictures, readings=3, strict=True))
