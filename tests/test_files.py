"""Files that are whole or not there, JSON lines that a killed run left, pictures of any kind."""

import errno
import re

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from evaluation import rate
from parts import checkpoints, files, weights
from parts.cli import UserError
from tests.launch import full_disk, locked
from tiny import pretrain


@pytest.mark.parametrize("content", ["text …", b"bytes", lambda path: path.write_bytes(b"own")])
def test_a_file_is_written_whole_into_a_new_folder(tmp_path, content):
    path = files.write_whole(tmp_path / "new" / "a.txt", content)
    expected = {"text …": "text …".encode(), b"bytes": b"bytes"}.get(content, b"own")
    assert path.read_bytes() == expected and [p.name for p in path.parent.iterdir()] == ["a.txt"]


def test_an_interrupted_write_leaves_the_old_content(tmp_path):
    path = files.write_whole(tmp_path / "a.txt", "old")

    def fail(temporary):
        temporary.write_text("ne")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        files.write_whole(path, fail)
    assert path.read_text() == "old"
    files.write_whole(path, "new")
    assert path.read_text() == "new" and [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_json_is_read_back_and_what_is_no_object_is_named(tmp_path):
    files.write_json(tmp_path / "a.json", {"ä": [1, None, 0.1]})
    assert files.read_json(tmp_path / "a.json") == {"ä": [1, None, 0.1]}
    for content in ("[1]", "{", "\"text\"", ""):
        (tmp_path / "bad.json").write_text(content)
        with pytest.raises(UserError, match="bad.json: missing or not a JSON object"):
            files.read_json(tmp_path / "bad.json")
    with pytest.raises(UserError, match="none.json: missing"):
        files.read_json(tmp_path / "none.json")


@pytest.mark.parametrize("name, kind", [
    ("adapter_config.json", "an adapter"), ("model_index.json", "a whole generator"), ("train.jsonl", "a dataset"),
    ("run.json", "a run of sample.py"), ("log.jsonl", "a run of training"), ("judge/config.json", "give its folder judge/"),
    ("evaluate.json", "evaluation run"), ("notes.txt", "")])
def test_a_folder_is_known_by_what_lies_in_it(tmp_path, name, kind):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("{}")
    assert kind in files.kind_of(tmp_path) and bool(kind) == bool(files.kind_of(tmp_path))
    assert files.kind_of(tmp_path / "missing") == ""
    with pytest.raises(UserError, match=re.escape(kind or "download the checkpoint again")):
        files.read_json(tmp_path / "config.json")


def test_records_are_read_up_to_a_step_and_to_a_half_written_line(tmp_path):
    path = tmp_path / "log.jsonl"
    assert files.read_records(path) == files.whole_records(path) == []
    rows = [{"step": step} for step in range(4)] + [{"note": "no step"}]
    files.write_rows(path, rows)
    assert files.read_records(path) == rows
    assert files.read_records(path, until=1) == [{"step": 0}, {"step": 1}, {"note": "no step"}]
    with path.open("a") as log:
        log.write('{"step": 4, "lo')
    assert files.read_records(path) == rows
    assert files.whole_records(path) == rows  # and the half line is cut off, so that one can append
    with path.open("a") as log:
        log.write('{"step": 5}\n')
    assert files.read_records(path)[-1] == {"step": 5}


@pytest.mark.parametrize("mode", ["RGB", "L", "1", "P", "CMYK", "I;16"])
def test_opaque_pictures_become_rgb(mode):
    image = Image.new("RGB", (3, 2), (255, 255, 255)).convert("L" if mode == "I;16" else mode).convert(mode)
    assert files.to_rgb(image).mode == "RGB" and files.to_rgb(image).size == (3, 2)


def test_white_shows_through_transparency():
    image = Image.new("RGBA", (2, 1), (200, 0, 0, 255))
    image.putpixel((1, 0), (0, 0, 0, 0))
    assert list(files.to_rgb(image).tobytes()) == [200, 0, 0, 255, 255, 255]
    palette = Image.new("P", (1, 1), 7)
    palette.info["transparency"] = 7
    assert files.to_rgb(palette).getpixel((0, 0)) == (255, 255, 255)


def test_a_damaged_or_missing_picture_is_named(tmp_path):
    files.save_png(Image.new("RGB", (64, 64), "red"), tmp_path / "a.png")
    whole = (tmp_path / "a.png").read_bytes()
    for name, content in (("half.png", whole[:len(whole) // 2]), ("text.png", b"no picture")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=f"{name}: cannot be read as a picture"):
            files.open_picture(tmp_path / name)
    with pytest.raises(UserError, match="none.png: cannot be read"):
        files.open_picture(tmp_path / "none.png")


def test_a_png_carries_its_facts(tmp_path):
    files.save_png(Image.new("RGB", (2, 2)), tmp_path / "a.png", prompt="ein Baum, größer", seed=3)
    with Image.open(tmp_path / "a.png") as image:
        assert image.info == {"prompt": "ein Baum, größer", "seed": "3"}
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]


def test_grey_of_16_bits_keeps_its_shades(tmp_path):
    shades = np.array([[0, 257 * 100, 65535]], np.uint16)
    Image.fromarray(shades).save(tmp_path / "grey.png")
    assert np.asarray(files.open_picture(tmp_path / "grey.png"))[0, :, 0].tolist() == [0, 100, 255]


def test_a_photograph_is_turned_as_its_camera_was(tmp_path):
    image = Image.new("RGB", (30, 20), "red")
    exif = image.getexif()
    exif[0x0112] = 6  # orientation: the camera was on its side
    image.save(tmp_path / "a.jpg", exif=exif)
    assert files.open_picture(tmp_path / "a.jpg").size == (20, 30)


def test_only_formats_that_start_no_other_program_are_opened(tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr("subprocess.check_call", lambda *args, **kwargs: started.append(args))
    (tmp_path / "a.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EOF\n")
    with pytest.raises(UserError, match="a.png: cannot be read as a picture .* as PNG, JPEG or WebP"):
        files.open_picture(tmp_path / "a.png")
    Image.new("RGB", (4, 4)).save(tmp_path / "b.gif")
    with pytest.raises(UserError, match="b.gif"):
        files.open_picture(tmp_path / "b.gif")
    assert not started
    Image.new("RGB", (4, 4)).save(tmp_path / "c.webp")
    assert files.open_picture(tmp_path / "c.webp").size == (4, 4)


def test_a_picture_of_a_thousand_million_pixels_is_refused(tmp_path):
    path = tmp_path / "bomb.png"
    Image.new("1", (30_000, 30_000)).save(path)
    with pytest.raises(UserError, match="bomb.png: cannot be read as a picture"):
        files.open_picture(path)


def test_files_have_the_rights_that_new_files_have(tmp_path):
    (tmp_path / "new").write_text("")
    expected = (tmp_path / "new").stat().st_mode
    files.write_whole(tmp_path / "a.txt", "a")
    files.write_whole(tmp_path / "b.safetensors", lambda path: save_file({"x": torch.zeros(1)}, path))
    assert (tmp_path / "a.txt").stat().st_mode == (tmp_path / "b.safetensors").stat().st_mode == expected


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    order = []
    sync, replace = files.os.fsync, files.os.replace
    monkeypatch.setattr(files.os, "fsync", lambda handle: (order.append("sync"), sync(handle)))
    monkeypatch.setattr(files.os, "replace", lambda *names: (order.append("name"), replace(*names)))
    files.write_whole(tmp_path / "a.txt", "a")
    assert order == ["sync", "name", "sync"]


def test_facts_of_a_drawn_picture_stand_in_one_text_too_and_odd_values_in_quotes(tmp_path):
    facts = {"prompt": "a swan, dark: calm", "seed": 3, "steps": 25, "guidance": 4.5, "model": 'my, "own": model'}
    files.save_png(Image.new("RGB", (64, 48)), tmp_path / "a.png", **facts)
    prompt, said = Image.open(tmp_path / "a.png").text["parameters"].split("\n")
    assert prompt == facts["prompt"]
    assert said == ('Steps: 25, Sampler: Euler, CFG scale: 4.5, Seed: 3, Size: 64x48, Model: "my, \\"own\\": model"')
    files.save_png(Image.new("RGB", (64, 48)), tmp_path / "b.png", prompt="x", seed=3)
    assert "parameters" not in Image.open(tmp_path / "b.png").text


NOISE = torch.rand(200, 200, 3, generator=torch.Generator().manual_seed(0))
ROW = {"time": "2026-01-01", "rater": "Ada", "case": "x", "method": "y", "v": 1.0, "a": 1.0, "quality": 1.0, "best": None}
WRITERS = {  # of a file of more than 40,000 bytes, into whose place at most 20,000 go
    "text": lambda path: files.write_whole(path, "x" * 100_000),
    "bytes": lambda path: files.write_whole(path, b"x" * 100_000),
    "rows": lambda path: files.write_rows(path, [{"text": "x" * 100_000}]),
    "picture": lambda path: files.save_png(Image.fromarray((NOISE * 255).byte().numpy()), path),
    "weights or adapter": lambda path: weights.save(path, {"x": [NOISE]}),
    "state of pretraining": lambda path: pretrain.save_state(path, {"x": NOISE}),
    "array": lambda path: files.write_whole(path, lambda own: pretrain.write_array(own, np.uint8, (9, 9000), np.ones((9, 9000)))),
    "ratings": lambda path: rate.write_ratings(path, [ROW] * 2000),
}


@pytest.mark.parametrize("kind", WRITERS)
def test_what_a_full_disk_refuses_is_named_with_the_reason_and_the_old_file_stays(tmp_path, kind):
    path = tmp_path / "a.file"
    path.write_text("old")
    with full_disk(20_000), pytest.raises(OSError, match="File too large") as raised:
        WRITERS[kind](path)
    assert raised.value.errno == errno.EFBIG and raised.value.filename == str(path)
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["a.file"]
    WRITERS[kind](path)  # there is room again
    assert path.stat().st_size > 40_000


def test_a_checkpoint_and_a_log_that_a_full_disk_refuses_are_named(tmp_path):
    with full_disk(20_000), pytest.raises(OSError, match="File too large") as raised:
        checkpoints.write(tmp_path / "checkpoint", {"x": NOISE})
    assert raised.value.filename == str(tmp_path / "checkpoint")
    path = tmp_path / "log.jsonl"
    files.append_rows(path, [{"step": 1}])
    with full_disk(20_000), pytest.raises(OSError, match="File too large") as raised:
        files.append_rows(path, [{"step": 2, "text": "x" * 30_000}])
    assert raised.value.filename == str(path) and files.whole_records(path) == [{"step": 1}]
    files.append_rows(path, [{"step": 2}, {"step": 3}])
    assert files.read_records(path) == [{"step": 1}, {"step": 2}, {"step": 3}]


def test_of_a_file_that_is_written_while_another_is_the_name_is_told(tmp_path):
    with full_disk(20_000), pytest.raises(OSError, match="File too large: '.*inner'"):
        files.write_whole(tmp_path / "outer", lambda _: files.write_whole(tmp_path / "inner", "x" * 100_000))


def test_an_error_that_is_not_the_disks_stays_what_it_is(tmp_path):
    def fail(path):
        raise ZeroDivisionError from OSError(errno.ENOENT, "nothing there")

    with pytest.raises(ZeroDivisionError):
        files.write_whole(tmp_path / "a.txt", fail)


def test_a_disk_that_knows_no_locks_stops_nobody(tmp_path, monkeypatch):
    import fcntl
    for number, free in ((errno.ENOLCK, True), (errno.EOPNOTSUPP, True), (errno.EACCES, False), (errno.EAGAIN, False)):
        def refuse(*args, number=number):
            raise OSError(number, "")
        monkeypatch.setattr(fcntl, "lockf", refuse)
        assert files.lock(tmp_path / ".lock") is free


def test_a_file_is_locked_until_the_process_ends(tmp_path):
    with locked(tmp_path / ".lock"):
        assert not files.lock(tmp_path / ".lock")
    assert files.lock(tmp_path / ".lock") and files.lock(tmp_path / "new" / ".lock")
