"""The study of hacking: arms over steps by those who gave rewards and those who did not, and the picture of it."""

import numpy as np
from PIL import Image

import train_judge
from parts.files import open_picture
from tests.launch import run_command
from tiny import generator_study, hacking_study, judge_study, results
from tiny.dataset import write_tiny
from tiny.generator_study import Row

SMALL = ("--group 2 --batch 2 --micro 4 --sde-steps 2 --sample-steps 2 --readings 1 --eval-rows 4 --size 64 "
         "--window 1 --window-within 1 --jobs 1 --cases 2 --every 1").split()


def test_an_arm_is_measured_at_every_adapter_it_kept_and_drawn(tmp_path, monkeypatch, capsys):
    write_tiny(tmp_path / "dataset", 4, 4)
    length = ("--steps", "1")
    arms = {"one": (Row("one", length), (200, 0, 0)), "two": (Row("two", length), (0, 0, 200))}
    for module, name, value in (
            (generator_study, "DATASET", tmp_path / "dataset"), (generator_study, "STUDY", tmp_path / "study"),
            (hacking_study, "DATASET", tmp_path / "dataset"),
            (generator_study, "JUDGE", train_judge.TINY),
            (generator_study, "EVERY", 1), (hacking_study, "ARMS", arms), (hacking_study, "LONG", length),
            (hacking_study, "PICTURE", tmp_path / "hacking.png"), (results, "RECORDS", tmp_path)):
        monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(judge_study.subprocess, "run", run_command)
    assert hacking_study.main(SMALL) == 0
    rows = results.rows_of("hacking")
    assert list(rows) == ["base|0", "one|1", "two|1"]
    points = hacking_study.points_of(rows)
    assert points.keys() == {"one", "two"} and points["one"].keys() == {0, 1} and points["one"][0] == points["two"][0]
    picture = open_picture(tmp_path / "hacking.png")
    assert picture.width >= 900 and picture.height > 560  # the curves, and the strips below them
    assert str(tmp_path / "hacking.png") in capsys.readouterr().out


def test_curves_have_the_colour_of_their_arm(monkeypatch):
    monkeypatch.setattr(hacking_study, "ARMS", {"one": (None, (200, 40, 40)), "two": (None, (30, 90, 200))})
    panels = len(hacking_study.PANELS)
    drawn = np.asarray(hacking_study.draw_curves({"one": {0: [1.0] * panels, 10: [2.0] * panels},
                                                  "two": {0: [1.0] * panels, 10: [0.0] * panels}}))
    for colour in ((200, 40, 40), (30, 90, 200)):
        at = np.argwhere((drawn == colour).all(axis=2))
        assert len(at) > 4 * 300 and at[:, 1].max() > 800  # in all four panels, and in the right ones


def test_pictures_of_other_widths_are_stacked():
    sheet = hacking_study.stacked(Image.new("RGB", (4, 2), "red"), Image.new("RGB", (6, 3), "blue"))
    assert sheet.size == (6, 5) and sheet.getpixel((0, 0)) == (255, 0, 0) and sheet.getpixel((5, 4)) == (0, 0, 255)
