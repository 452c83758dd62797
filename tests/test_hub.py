"""Downloads, from a hub on this machine that serves the files of the published repositories, decoys and all."""

import json
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from huggingface_hub import constants

from parts import clip, hub, lora, pipeline, weights
from parts.cli import UserError

SHA = "0123456789abcdef0123456789abcdef01234567"
PARTS = ("text_encoder", "text_encoder_2")
SHARDS = [f"{i:05d}-of-00002.safetensors" for i in (1, 2)]
GENERATOR = [
    "model_index.json", "scheduler/scheduler_config.json", "tokenizer/vocab.json", "tokenizer_2/vocab.json",
    *(f"{part}/{name}" for part in ("transformer", "vae") for name in ("config.json", "diffusion_pytorch_model.safetensors")),
    *(f"{part}/{name}" for part in PARTS for name in ("config.json", "model.safetensors"))]
T5 = ["tokenizer_3/tokenizer.json", "text_encoder_3/config.json", "text_encoder_3/model.safetensors.index.json",
      *(f"text_encoder_3/model-{shard}" for shard in SHARDS)]
JUDGE = ["config.json", "tokenizer.json", "preprocessor_config.json", "model.safetensors.index.json",
         *(f"model-{shard}" for shard in SHARDS)]
CLIP = ["config.json", "model.safetensors", "vocab.json", "merges.txt", "preprocessor_config.json"]
# What is published beside them and must not come: other formats, half precision, the same weights in one file.
DECOYS = {
    pipeline.PAPER: ["sd3.5_medium.safetensors", "text_encoders/t5xxl_fp16.safetensors", "mmdit-x.png", "README.md",
                     *(f"{part}/model.fp16.safetensors" for part in PARTS),
                     "text_encoder_3/model.safetensors.index.fp16.json", *(f"text_encoder_3/model.fp16-{s}" for s in SHARDS)],
    "openai/clip-vit-large-patch14": ["pytorch_model.bin", "tf_model.h5", "flax_model.msgpack", "onnx/model.onnx"],
    "yuvalkirstain/PickScore_v1": ["pytorch_model.bin"],
    clip.PICKSCORE_PROCESSOR: ["open_clip_pytorch_model.bin", "open_clip_model.safetensors", "model.safetensors"],
    "Qwen/Qwen2.5-VL-7B-Instruct": []}
WANTED = {
    pipeline.PAPER: GENERATOR + T5, "Qwen/Qwen2.5-VL-7B-Instruct": JUDGE, "openai/clip-vit-large-patch14": CLIP,
    "yuvalkirstain/PickScore_v1": ["config.json", "model.safetensors"],
    clip.PICKSCORE_PROCESSOR: ["vocab.json", "merges.txt", "preprocessor_config.json"]}
FILE = 50_000  # bytes of each


class Hub(ThreadingHTTPServer):
    """Serves the repositories; keeps what was downloaded."""
    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Answers)
        self.gated, self.absent, self.cut = set(), set(), set()
        self.downloaded = []  # (repository, file)


class Answers(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def say(self, status, content=b"", length=None, **headers):
        self.send_response(status)
        headers |= {"Content-Length": str(len(content) if length is None else length), "Connection": "close"}
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def do_GET(self):
        if match := re.match(r"/api/models/([^/]+/[^/]+)(/tree)?", self.path):
            return self.list_files(match[1], tree=match[2])
        repository, name = re.match(r"/([^/]+/[^/]+)/resolve/[^/]+/(.*)", self.path).groups()
        if repository in self.server.gated:
            return self.say(403, b"{}", X_Error_Code="GatedRepo", X_Error_Message="Access is restricted")
        headers = {"X_Repo_Commit": SHA, "ETag": f'"{abs(hash((repository, name))):x}"'}
        content = b"x" * FILE
        if self.command == "GET":
            self.server.downloaded.append((repository, name))
            start = int(re.search(r"\d+", self.headers.get("Range", "0"))[0])
            if (repository, name) in self.server.cut:
                return self.say(206 if start else 200, content[start:start + 10_000], FILE - start, **headers)
            content = content[start:]
            return self.say(206 if start else 200, content, **headers)
        return self.say(200, content, **headers)

    do_HEAD = do_GET

    def list_files(self, repository, tree):
        if repository in self.server.absent or repository not in WANTED:
            return self.say(404, b"{}", X_Error_Code="RepoNotFound", X_Error_Message="Repository not found")
        names = WANTED[repository] + DECOYS[repository]
        answer = {"id": repository, "sha": SHA, "siblings": [{"rfilename": name} for name in names]}
        if tree:
            answer = [{"type": "file", "oid": "0" * 40, "size": FILE, "path": name} for name in names]
        return self.say(200, json.dumps(answer).encode(), Content_Type="application/json")


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A hub as HF_ENDPOINT would name it, and an empty cache."""
    server = Hub()
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(hub, "FOLDERS", {})
    sleep = time.sleep
    monkeypatch.setattr(time, "sleep", lambda seconds: sleep(min(seconds, 0.01)))  # between tries of the hub's library
    yield server
    server.shutdown()
    server.server_close()


def fetch_all():
    """What train_gen.py --preset paper fetches, and CLIP as an evaluation does."""
    hub.fetch(pipeline.files_of_generator(pipeline.PAPER), lora.files_with_base("Qwen/Qwen2.5-VL-7B-Instruct"),
              clip.files_of_pickscore("yuvalkirstain/PickScore_v1"), [("openai/clip-vit-large-patch14", ["*"])])


def test_each_file_that_is_needed_comes_once_under_one_bar_and_no_other(server, capsys):
    fetch_all()
    assert sorted(server.downloaded) == sorted((repository, name) for repository, names in WANTED.items() for name in names)
    told = capsys.readouterr().err
    count = len(server.downloaded)
    assert f"downloading {count} files: 100%" in told and f"{count * FILE / 1e6:.2f}M" in told and "Fetching" not in told
    # from here on everything is found without asking
    server.shutdown()
    folder = weights.find(pipeline.PAPER, "text_encoder_3")
    assert sorted(file.name for file in folder.iterdir()) == sorted(name.split("/")[1] for name in T5[1:])
    assert weights.find_file(pipeline.PAPER, "model_index.json").stat().st_size == FILE


def test_t5_stays_away_if_it_is_not_used_and_texts_may_come_from_elsewhere(server):
    hub.fetch(pipeline.files_of_generator("./local.safetensors", use_t5=False, encoders_from=pipeline.PAPER))
    names = {name for _, name in server.downloaded}
    assert names == {name for name in GENERATOR if not name.startswith("vae/") and "transformer/diff" not in name}


@pytest.mark.parametrize("kind, repository, message", [
    ("gated", pipeline.PAPER, "access is gated; accept its licence at https://huggingface.co/stabilityai"),
    ("gated", "Qwen/Qwen2.5-VL-7B-Instruct", "access is gated"), ("absent", clip.PICKSCORE_PROCESSOR, "check the spelling"),
    ("absent", "Qwen/Qwen2.5-VL-7B-Instruct", "neither a local path nor a hub repository")])
def test_one_that_is_refused_is_told_before_anything_is_downloaded(server, kind, repository, message):
    getattr(server, kind).add(repository)
    with pytest.raises(UserError, match=message) as refused:
        fetch_all()
    assert str(refused.value).startswith(repository) and "\n" not in str(refused.value) and server.downloaded == []


def test_a_repository_of_another_kind_is_told_before_anything_is_downloaded(server):
    with pytest.raises(UserError, match=r"Qwen/Qwen2.5-VL-7B-Instruct: no .* in it; is it another kind of model"):
        hub.fetch(lora.files_with_base(pipeline.PAPER), pipeline.files_of_generator("Qwen/Qwen2.5-VL-7B-Instruct"))
    assert server.downloaded == []


def test_a_download_that_breaks_off_is_one_line_and_goes_on_where_it_was(server, monkeypatch):
    # a large file, of which the hub's library would try again as long as some bytes come
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", FILE)
    server.cut.add(("Qwen/Qwen2.5-VL-7B-Instruct", "model-00002-of-00002.safetensors"))
    with pytest.raises(UserError, match="Qwen/Qwen2.5-VL-7B-Instruct: the download broke off .*goes on where it was"):
        hub.fetch([("Qwen/Qwen2.5-VL-7B-Instruct", ["*"])])
    server.cut.clear()
    server.downloaded.clear()
    hub.fetch([("Qwen/Qwen2.5-VL-7B-Instruct", ["*"])])
    assert [name for _, name in server.downloaded] == ["model-00002-of-00002.safetensors"]


@pytest.mark.parametrize("how", ["offline", "no network"])
def test_without_a_network_the_cache_is_used_and_what_is_not_there_is_told(server, how, monkeypatch):
    hub.fetch([("yuvalkirstain/PickScore_v1", ["*"])])
    hub.FOLDERS.clear()
    server.downloaded.clear()
    server.shutdown()
    server.server_close()
    if how == "offline":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.fetch([("yuvalkirstain/PickScore_v1", ["*"])])
    assert (weights.find("yuvalkirstain/PickScore_v1") / "model.safetensors").stat().st_size == FILE
    with pytest.raises(UserError, match="Qwen/Qwen2.5-VL-7B-Instruct: not on this machine and the hub cannot be reached"):
        hub.fetch([("yuvalkirstain/PickScore_v1", ["*"]), ("Qwen/Qwen2.5-VL-7B-Instruct", ["*"])])


def test_paths_and_what_is_left_out_are_not_asked_for(server, tmp_path):
    hub.fetch([(tmp_path, ["*"]), (None, ["*"]), ("./missing", ["*"]), ("missing.safetensors", ["*"])])
    assert hub.FOLDERS == {}
