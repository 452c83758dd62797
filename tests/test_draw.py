"""Drawing cases by any method: resumed, shared by processes, told from other runs, refused before gigabytes are read."""

import json
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from PIL import Image

from evaluation import draw
from evaluation.__main__ import main
from evaluation.cases import grid_of, held_out_cases, seeds_of
from parts.files import append_rows, write_rows
from parts.pipeline import TINY, load_generator, to_images
from parts.run import Processes

QUICK = ["--sample-steps", "1", "--size", "64"]


def cases_file(tmp_path, cases, **more):
    path = tmp_path / "cases.jsonl"
    write_rows(path, [{"id": c.id, "neutral": c.neutral, "v": c.v, "a": c.a, **({"group": c.group} if c.group else {}),
                       **more} for c in cases])
    return path


@dataclass
class Recorder:
    """A method that draws a plain colour and remembers what it was given."""
    given: list

    def draw(self, cases, seeds, size=None, steps=None, guidance=None, progress=iter):
        self.given += list(zip(cases, seeds, strict=True))
        return torch.stack([torch.full((3, 64, 64), seed % 256, dtype=torch.uint8) for seed in seeds])

    network = torch.nn.Linear(2, 1, device="meta")


@pytest.fixture
def recorder(monkeypatch):
    model = Recorder([])
    for name, method in draw.METHODS.items():
        monkeypatch.setitem(draw.METHODS, name, replace(method, load=lambda args, device: model))
    return model


def pixels(path):
    return np.array(Image.open(path))


def test_our_generator_draws_what_the_pipeline_draws(tmp_path):
    cases = held_out_cases(2)
    path = cases_file(tmp_path, cases)
    assert main(["draw", "--method", "ours", "--model", str(TINY), "--form", "neutral", "--cases", str(path), "--out",
                 str(tmp_path / "out"), *QUICK]) == 0
    expected = load_generator(TINY).draw([cases[1].neutral], [1], 64, steps=1)
    assert (pixels(tmp_path / "out" / f"{cases[1].id}.png") == np.array(to_images(expected)[0])).all()


def test_a_stopped_run_goes_on_and_says_what_a_picture_took(tmp_path, recorder, capsys):
    cases = grid_of(held_out_cases(2), 2)
    path = cases_file(tmp_path, cases)
    command = ["draw", "--method", "flux", "--cases", str(path), "--out", str(tmp_path / "out"), "--micro", "3"]
    assert main(command) == 0
    assert [seed for _, seed in recorder.given] == seeds_of(cases, 0) == [0] * 4 + [4] * 4
    (tmp_path / "out" / f"{cases[2].id}.png").unlink()
    recorder.given.clear()
    assert main(command) == 0 and len(recorder.given) == 1
    facts = json.loads((tmp_path / "out" / "draw.json").read_text())
    assert facts["billions"] == 3e-9 and facts["seconds"] >= 0 and facts["form"] == "words"
    assert "8 pictures" in capsys.readouterr().out
    assert main([*command, "--seed", "1"]) == 2 and "(seed changed)" in capsys.readouterr().err


def test_pictures_of_other_cases_with_the_same_ids_are_not_kept(tmp_path, recorder, capsys):
    cases = held_out_cases(2)
    command = ["draw", "--method", "sdxl", "--cases", str(cases_file(tmp_path, cases)), "--out", str(tmp_path / "out")]
    assert main(command) == 0
    cases_file(tmp_path, [replace(case, v=1.0) for case in cases])
    assert main(command) == 2 and "(cases_digest changed)" in capsys.readouterr().err


def test_pictures_edited_from_other_sources_are_not_kept(tmp_path, recorder, capsys):
    cases = held_out_cases(2)
    sources = tmp_path / "sources"
    sources.mkdir()
    for case in cases:
        Image.new("RGB", (64, 64), "red").save(sources / f"{case.id}.png")
    command = ["draw", "--method", "emoedit", "--weights", str(tmp_path / "w"), "--sources", str(sources),
               "--cases", str(cases_file(tmp_path, cases)), "--out", str(tmp_path / "out")]
    assert main(command) == 0
    assert main([*command, "--clip", "another"]) == 2 and "(clip changed)" in capsys.readouterr().err
    Image.new("RGB", (96, 64), "blue").save(sources / f"{cases[0].id}.png")
    assert main(command) == 2 and "(pictures changed)" in capsys.readouterr().err


def test_the_size_of_the_model_is_kept_by_a_run_that_is_killed_after_its_last_picture(tmp_path, recorder, monkeypatch):
    command = ["draw", "--method", "flux", "--cases", str(cases_file(tmp_path, held_out_cases(2))), "--out", str(tmp_path / "out")]

    def killed(path):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(draw, "read_records", killed)  # of the seconds, when all is drawn
        main(command)
    recorder.given.clear()
    assert main(command) == 0 and not recorder.given
    assert json.loads((tmp_path / "out" / "draw.json").read_text())["billions"] == 3e-9


def test_two_processes_share_what_is_missing(tmp_path, recorder):
    cases = held_out_cases(5)
    path = cases_file(tmp_path, cases)
    args = draw.parse_args(["--method", "sdxl", "--cases", str(path), "--out", str(tmp_path / "out")])

    class Second(Processes):
        def wait(self):
            pass

    draw.draw(args, Second(1, 2, torch.device("cpu")), "command")
    assert [case.v for case, _ in recorder.given] == [cases[1].v, cases[3].v]
    draw.draw(args, Second(0, 2, torch.device("cpu")), "command")
    assert [case.v for case, _ in recorder.given[2:]] == [cases[0].v, cases[2].v, cases[4].v]
    assert len(list((tmp_path / "out").glob("*.png"))) == 5
    assert json.loads((tmp_path / "out" / "draw.json").read_text())["billions"] == 3e-9


def test_each_method_gets_its_own_form_of_the_target(tmp_path, recorder):
    (case,) = held_out_cases(1)
    for method, extra in (("flux", []), ("ours", []), ("emoticrafter", ["--weights", "w.pth"])):
        path = cases_file(tmp_path, [case], emoedit="awe")
        assert main(["draw", "--method", method, "--cases", str(path), "--out", str(tmp_path / method), *extra]) == 0
    (words, _), (numbers, _), (neutral, _) = recorder.given
    assert neutral.prompt == case.neutral and (neutral.v, neutral.a) == (case.v, case.a)
    assert f"{case.v:.2f}"[:3] in numbers.prompt and words.prompt not in (numbers.prompt, neutral.prompt)
    assert neutral.emotion == "awe"


def test_an_editor_gets_the_dataset_s_picture_or_one_of_a_folder(tmp_path, recorder):
    (case,) = held_out_cases(1)
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (64, 64), "red").save(tmp_path / "pictures" / "source.png")
    Image.new("RGB", (64, 64), "blue").save(tmp_path / "pictures" / f"{case.id}.png")
    path = cases_file(tmp_path, [case], source="pictures/source.png")
    command = ["draw", "--method", "emoedit", "--weights", "w.safetensors", "--cases", str(path), "--out"]
    assert main([*command, str(tmp_path / "a")]) == main(
        [*command, str(tmp_path / "b"), "--sources", str(tmp_path / "pictures")]) == 0
    assert [given.source.getpixel((0, 0)) for given, _ in recorder.given] == [(255, 0, 0), (0, 0, 255)]
    told = [json.loads((tmp_path / name / "draw.json").read_text())["sources"] for name in "ab"]
    assert told == ["the dataset's own pictures", str(tmp_path / "pictures")]


@pytest.mark.parametrize("flags, message", [
    (["--method", "emoticrafter"], "--method emoticrafter: needs --weights FILE"),
    (["--method", "flux", "--adapter", "x"], "--adapter: --method flux has no use for it"),
    (["--method", "sdxl", "--sources", "x"], "--sources: --method sdxl has no use for it"),
    (["--method", "emoedit", "--weights", "w"], "2 of 2 cases have no source, such as"),
    (["--method", "sdxl", "--encoders", "leave"], "--encoders: --method sdxl has no use for it"),
    (["--method", "sd35", "--offload"], "--offload: --method sd35 has no use for it"),
    (["--method", "flux", "--cases", "missing.jsonl"], "missing.jsonl: no such file"),
])
def test_what_cannot_work_is_refused_before_a_model_is_loaded(tmp_path, recorder, flags, message, capsys):
    path = cases_file(tmp_path, held_out_cases(2))
    assert main(["draw", "--cases", str(path), "--out", str(tmp_path / "out"), *flags]) == 2
    assert message in capsys.readouterr().err and recorder.given == []


def test_a_wrong_class_or_source_in_the_cases_names_its_line(tmp_path, recorder, capsys):
    path = cases_file(tmp_path, held_out_cases(1))
    for extra, message in (({"emoedit": "joy"}, "emoedit is 'joy'; expected one of"), ({"source": 3}, "is no text")):
        append_rows(path, [{"id": "x", "neutral": "a tree", "v": 3, "a": 3, **extra}])
        assert main(["draw", "--method", "flux", "--cases", str(path), "--out", str(tmp_path / "out")]) == 2
        assert message in capsys.readouterr().err
        path = cases_file(tmp_path, held_out_cases(1))
