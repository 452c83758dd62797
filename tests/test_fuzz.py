"""Every reader of strangers' files against valid ones that have been changed at random, for a minute each.

    FUZZ_SECONDS=60 FUZZ_RECORD=docs/records/fuzz.jsonl pytest -n0 -s -m slow tests/test_fuzz.py

A change is of bytes (flips, cuts, repeats) or, where there is JSON inside, of a value of it. What is read must be what the
file says; what is refused must be refused in one line that names the file; both within two seconds. Else the test fails and
says where the input lies. Seconds are those of a processor. A line of JSON is printed for each reader, and added to the file
FUZZ_RECORD. FUZZ_SEED gives other changes.
"""

import copy
import json
import os
import random
import resource
import struct
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

import grpo
from evaluation import rate
from parts import checkpoints, cli, lora, weights
from parts.cli import UserError
from parts.files import LOCKED, open_picture, save_png
from prepare import check
from tests import hostile
from tests.test_hostile import watched

pytestmark = pytest.mark.slow
SECONDS = float(os.environ.get("FUZZ_SECONDS", "60"))
SEED = int(os.environ.get("FUZZ_SEED", "0"))
ODD = [None, True, False, 0, 1, -1, 2, 7, 2**31, 2**63, 2**64, 10**9, 10**30, 10**400, 0.5, -0.0, 1e-300, 1e308,
       float("nan"), float("inf"), "", "7", "x", "x" * 300, "\0", "\ud800", "\x1b[2J", "../x", "/dev/zero", "<|image_pad|>",
       "<|im_end|>", "{}", [], {}, [0], [[]], {"": {}}, [None], [1, 2, 3], [0.5] * 3, json.loads("[" * 60 + "]" * 60)]


# ---------------------------------------------------------------------------------------------------------------------
# Changes


def change_bytes(rng, content):
    """Bytes with one to four of: a bit flipped, a byte replaced, a part taken out, repeated or moved, an odd piece put in."""
    content = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        start = rng.randrange(len(content) + 1)
        end = min(len(content), start + rng.choice((1, 1, 2, 4, 8, 60, 1000)))
        kind = rng.randrange(7)
        if kind == 0 and start < len(content):
            content[start] ^= 1 << rng.randrange(8)
        elif kind == 1 and start < len(content):
            content[start] = rng.choice((0, 1, 9, 10, 13, 27, 34, 45, 48, 57, 92, 123, 127, 128, 237, 255))
        elif kind == 2:
            del content[start:end]
        elif kind == 3:
            content[start:start] = content[start:end] * rng.choice((1, 2, 20))
        elif kind == 4:
            to = rng.randrange(len(content) + 1)
            content[to:to] = content[start:end]
        elif kind == 5:
            content[start:start] = rng.choice((b"\0", b"\xff", b"\x1b[2J", b"\r\n", b"-", b"0" * 30, b'"', b"{", b"[" * 2000,
                                               b"\xed\xa0\x80", b"1e999"))
        elif rng.random() < 0.2:
            del content[start:]
    return bytes(content)


def places(value, found):
    """Every (object or list, key or index) inside a value."""
    for key in value if isinstance(value, dict) else range(len(value)):
        found.append((value, key))
        if isinstance(value[key], (dict, list)):
            places(value[key], found)
    return found


def change_json(rng, value):
    """The text of a JSON value of which a few inner ones have been replaced, taken away, doubled or moved."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        found = places(value, [])
        if not found:
            break
        inner, key = rng.choice(found)
        kind = rng.randrange(8)
        if kind == 0:
            del inner[key]
        elif kind == 1 and isinstance(inner, dict):
            inner[rng.choice(("", "\x1b[2J", "\ud800", f"{key}x", "__metadata__"))] = inner.pop(key)
        elif kind == 2:
            other, at = rng.choice(found)
            if at in other if isinstance(other, dict) else at < len(other):
                inner[key] = copy.deepcopy(other[at])
        elif kind == 3 and type(inner[key]) in (int, float) and abs(inner[key]) < 1e300:
            number = inner[key]
            inner[key] = rng.choice((number + 1, number - 1, -number, number * 2, number / 2, float(number), str(number)))
        else:
            inner[key] = copy.deepcopy(rng.choice(ODD))
    text = json.dumps(value, ensure_ascii=rng.random() < 0.5)
    if rng.random() < 0.1 and '":' in text:  # a key twice
        at = text.index('":') + 2
        text = text[:at] + " 1, " + text[text.rindex("{", 0, at) + 1:at] + text[at:]
    return text.encode("utf-8", "surrogatepass")


# ---------------------------------------------------------------------------------------------------------------------
# The loop


def fuzz(name, tmp_path, put, read, kept):
    """Change and read for SECONDS of a processor; what is wrong fails the test, and its input is kept in the folder `kept`.

    put(rng) makes the next input and returns its bytes; read() reads it.
    """
    rng = random.Random(f"{name} {SEED}")
    counts = {"reader": name, "seed": SEED, "tries": 0, "refused": 0, "accepted": 0, "slowest": 0.0}
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    # Whoever asks for too much memory gets an error, and the machine lives on.
    resource.setrlimit(resource.RLIMIT_AS, (mapped + 4 * 2**30, hard))
    stop = time.process_time() + SECONDS
    try:
        while time.process_time() < stop:
            content = put(rng)
            started = time.process_time()
            try:
                with watched():
                    read()
                counts["accepted"] += 1
            except UserError as error:
                said = str(error)
                assert said.isprintable() and len(said) <= 3003 and str(tmp_path) in said, said[:300]
                counts["refused"] += 1
            counts["tries"] += 1
            counts["slowest"] = max(counts["slowest"], time.process_time() - started)
    except BaseException:
        (kept / f"fuzz_{name}").write_bytes(content)
        print(f"the input of try {counts['tries']:,} with FUZZ_SEED={SEED} lies in {kept / f'fuzz_{name}'}")
        raise
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    counts |= {"seconds": SECONDS, "slowest": round(counts["slowest"], 3)}
    print(json.dumps(counts))
    if "FUZZ_RECORD" in os.environ:
        with open(os.environ["FUZZ_RECORD"], "a", encoding="utf-8") as file:
            file.write(json.dumps(counts) + "\n")
    assert counts["refused"] and counts["accepted"]  # else it was no test of both


def either(rng, content, value, of_json=0.6):
    """Changed bytes of one of both: the file as it is, or its JSON."""
    return change_json(rng, value) if rng.random() < of_json else change_bytes(rng, content)


@pytest.fixture
def kept(tmp_path_factory):
    return tmp_path_factory.getbasetemp()


# ---------------------------------------------------------------------------------------------------------------------
# The readers


def test_safetensors_headers(tmp_path, kept):
    header = {"__metadata__": {"format": "pt"}, "a": hostile.tensor(0, 8), "b.weight": hostile.tensor(8, 20, (2, 3), "BF16"),
              "c": hostile.tensor(20, 20, (0, 4)), "d": hostile.tensor(20, 24, (), "I32")}
    good = hostile.packed(json.dumps(header), bytes(range(24)))

    def put(rng):
        content = hostile.packed(change_json(rng, header), bytes(range(24))) if rng.random() < 0.6 else change_bytes(rng,
                                                                                                                     good)
        (tmp_path / "x.safetensors").write_bytes(content)
        return content

    fuzz("safetensors header", tmp_path, put, lambda: hostile.read_header(tmp_path), kept)


def test_indexes(tmp_path, kept):
    folder = tmp_path / "index"
    folder.mkdir()
    make = next(make for name, make, _ in hostile.indexes() if name == "two shards")
    make(folder)
    path = folder / "m.safetensors.index.json"
    good = path.read_bytes()

    def put(rng):
        path.write_bytes(content := either(rng, good, json.loads(good)))
        return content

    def read():
        entries = weights.index(folder)
        assert all(entry.shape == (2,) and entry.file.parent == folder for entry in entries.values())

    fuzz("index", tmp_path, put, read, kept)


def test_configurations(tmp_path, kept):
    models = hostile.make_models(tmp_path / "models")
    folder = tmp_path / "changed"
    hostile.link_all(models, folder)
    files = ["transformer/config.json", "vae/config.json", "text_encoder/config.json", "text_encoder_3/config.json",
             "judge/config.json", "clip/config.json",
             "judge/preprocessor_config.json", "judge/generation_config.json", "judge/tokenizer_config.json",
             "judge/tokenizer.json",
             "clip/preprocessor_config.json",
             "clip/tokenizer_config.json", "tokenizer/tokenizer_config.json", "model_index.json",
             "scheduler/scheduler_config.json"]
    last = [files[0]]

    def put(rng):
        hostile.relink(folder / last[0], models / last[0])
        last[0] = rng.choice(files)
        good = (models / last[0]).read_bytes()
        (folder / last[0]).unlink()
        (folder / last[0]).write_bytes(content := either(rng, good, json.loads(good), 0.85))
        return last[0].encode() + b"\n" + content

    fuzz("configuration", tmp_path, put, lambda: hostile.read_models(folder, last[0]), kept)


def test_adapters(tmp_path, kept):
    folder = tmp_path / "adapter"
    hostile.write_adapter(folder)
    files = [folder / "adapter_config.json", folder / lora.ADAPTER_FILE]
    goods = [file.read_bytes() for file in files]
    size = 8 + struct.unpack("<Q", goods[1][:8])[0]
    header = json.loads(goods[1][8:size])

    def put(rng):
        for file, good in zip(files, goods):
            file.write_bytes(good)
        if rng.random() < 0.5:
            files[0].write_bytes(content := either(rng, goods[0], json.loads(goods[0]), 0.8))
        elif rng.random() < 0.5:
            files[1].write_bytes(content := hostile.packed(change_json(rng, header), goods[1][size:]))
        else:
            files[1].write_bytes(content := change_bytes(rng, goods[1]))
        return content

    fuzz("adapter", tmp_path, put, lambda: hostile.read_adapter(folder), kept)


def test_dataset_rows(tmp_path, kept, monkeypatch):
    monkeypatch.setattr(check, "tqdm", lambda items, *_: items)
    hostile.make_pictures(tmp_path)
    rows = [hostile.ROW | {"id": f"r{i}"} for i in range(3)]

    def put(rng):
        lines = [json.dumps(row).encode() for row in rows]
        if rng.random() < 0.7:
            i = rng.randrange(3)
            lines[i] = change_json(rng, rows[i])
        content = b"\n".join(lines) + b"\n"
        if rng.random() < 0.4:
            content = change_bytes(rng, content)
        (tmp_path / "train.jsonl").write_bytes(content)
        return content

    def read():
        found = check.check_rows(tmp_path, check.read_rows(tmp_path))
        assert all(line.isprintable() for line in found)
        hostile.read_rows(tmp_path)  # what the check finds nothing wrong with, it reads
        refused = [line for line in found if "the id" not in line]
        assert not refused, refused

    fuzz("dataset rows", tmp_path, put, read, kept)


def strictly_valid(text):
    """(v, a) of an answer in the form that is rewarded, else None, told without feedback.py."""
    if len(text) > 20_000 or any(text.count(tag) != 1 for tag in ("<think>", "</think>", "<answer>", "</answer>")):
        return None
    before, _, rest = text.partition("<think>")
    _, _, rest = rest.partition("</think>")
    between, _, rest = rest.partition("<answer>")
    inside, _, after = rest.partition("</answer>")
    if before.strip() or between.strip() or after.strip():
        return None
    pairs = []

    def constant(name):
        raise ValueError(name)

    try:
        value = json.loads(inside, object_pairs_hook=lambda found: pairs.append(found) or dict(found),
                           parse_constant=constant)
    except (ValueError, RecursionError):
        return None
    if not isinstance(value, dict) or any(len({key for key, _ in found}) < len(found) for found in pairs):
        return None
    if sorted(value) != ["arousal", "valence"] or any(type(x) not in (int,
                                                                      float) or not 1 <= x <= 9 for x in value.values()):
        return None
    return value["valence"], value["arousal"]


def test_answers_of_the_judge(tmp_path, kept):
    answers = [answer for _, answer, _ in hostile.answers() if len(answer) < 3000]
    answers += ['<think>fog</think><answer>{"valence": 2.5, "arousal": 3}</answer>'] * len(answers)
    last = []

    def put(rng):
        text = rng.choice(answers)
        if rng.random() < 0.4:
            said = {"valence": 2.5, "arousal": 3.0}
            text = f"<think>fog</think><answer>{change_json(rng, said).decode('utf-8', 'surrogatepass')}</answer>"
        content = text.encode("utf-8", "surrogatepass")
        if rng.random() < 0.7:
            content = change_bytes(rng, content)
        last[:] = [content.decode("utf-8", rng.choice(("replace", "surrogateescape", "ignore")))]
        return content

    def read():
        found = hostile.read_answers(last[0])
        expected = strictly_valid(last[0])
        rewards = [grpo.va_reward(last[0], v, a, kind) for v, a in ((2.5, 3), (9, 9)) for kind in ("step", "continuous")]
        assert found == expected and (expected is not None or not any(rewards))
        if found is None:
            raise UserError(f"{tmp_path}: no reward")

    fuzz("answers of the judge", tmp_path, put, read, kept)


def test_pictures_and_their_texts(tmp_path, kept):
    said = {"prompt": "a lake <b>", "seed": 0, "reasoning": "fog \x1b"}
    path = save_png(Image.effect_noise((24, 16), 50).convert("RGB"), tmp_path / "good.png", **said)
    goods = [path.read_bytes()] * 3
    for name in ("an animated PNG", "colours of 16 bits", "a text that clears", "CMYK", "an animated WebP",
                 "several JPEGs in one"):
        goods += [content for found, content, _ in hostile.pictures() if found == name]

    def put(rng):
        content = change_bytes(rng, rng.choice(goods))
        if rng.random() < 0.5 and content[:4] == b"\x89PNG":  # else nearly all end at a wrong sum
            content = with_sums(content)
        (tmp_path / "x.png").write_bytes(content)
        return content

    def read():
        hostile.read_picture(tmp_path)
        open_picture(tmp_path / "x.png").load()
        check.look_at(tmp_path / "x.png")

    fuzz("pictures and PNG text", tmp_path, put, read, kept)


def with_sums(content):
    """A PNG with the right sum behind each of its chunks."""
    out = content[:8]
    at = 8
    while at + 12 <= len(content):
        length = int.from_bytes(content[at:at + 4], "big")
        if at + 12 + length > len(content):
            break
        out += hostile.chunk(content[at + 4:at + 8], content[at + 8:at + 8 + length])
        at += 12 + length
    return out + content[at:]


def test_requests_for_ratings(tmp_path, kept, monkeypatch):
    monkeypatch.setattr(rate, "say", lambda text: None)
    study = hostile.make_study(tmp_path)
    form = hostile.whole_form(study)
    token = form["case"]
    goods = [hostile.post(form), hostile.post(form), hostile.get("/"), hostile.get("/case?rater=Anna"),
             hostile.get(f"/picture?case={token}&at=0&rater=Anna")]
    last = []

    def put(rng):
        kind = rng.random()
        if kind < 0.4:
            changed = {key: rng.choice(("", "0", "10", "3 ", "x", "\x1b",
                                        "\ud800")) if rng.random() < 0.1 else value for key, value in form.items()}
            last[:] = [hostile.post({key: value.encode("utf-8", "surrogatepass") for key, value in changed.items()})]
        else:
            last[:] = [change_bytes(rng, rng.choice(goods))]
        study.rows.clear()
        study.done.clear()
        return last[0]

    def read():
        status, body = hostile.ask_server(study, last[0])
        assert status is None or status in (200, 303, 400, 403, 404, 405, 411, 413, 414, 422, 431, 501, 505), status
        assert status is None or b"\x1b" not in body or body[:4] == b"\x89PNG"
        for row in study.rows:  # only a whole form is written
            assert rate.NAME.fullmatch(row["rater"]) and row["rater"].isprintable()
            assert all(1 <= row[scale] <= highest for scale, (_, highest, *_) in rate.SCALES.items())
        if study.rows:
            assert len(rate.read_ratings(study.out)) == len(study.rows) == 2
        if status not in (200, 303):
            raise UserError(f"{tmp_path}: {status}")

    fuzz("requests for ratings", tmp_path, put, read, kept)


def test_folders_of_runs(tmp_path, kept, monkeypatch):
    monkeypatch.setattr(cli, "say", lambda text: None)
    folder = tmp_path / "run"
    hostile.make_run(folder)
    last = folder / "checkpoint-00000002"
    files = [folder / "settings.json", folder / "log.jsonl", last / "digests.json", last / ".metadata",
             last / "__0_0.distcp"]
    goods = {file: file.read_bytes() for file in files}
    digests = json.loads(goods[files[2]])

    def put(rng):
        for file, good in goods.items():
            file.write_bytes(good)
        file = rng.choice(files)
        content = change_bytes(rng, goods[file])
        if file.suffix == ".json" and rng.random() < 0.6:
            content = change_json(rng, json.loads(goods[file]))
        file.write_bytes(content)
        if file.name in digests and rng.random() < 0.7:  # as if it had been written so
            files[2].write_text(json.dumps(digests | {file.name: checkpoints.digest_of(file)}))
        return file.name.encode() + b"\n" + content

    def read():
        try:
            run = hostile.Run(folder, {"lr": 0.1}, hostile.ALONE)
            state = {name: torch.zeros_like(value) for name, value in hostile.STATE.items()}
            run.read_log(run.load(state, 99))
        finally:
            while LOCKED:
                LOCKED.pop().close()

    fuzz("folders of runs", tmp_path, put, read, kept)
