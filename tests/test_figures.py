"""Figures: methods side by side, and values of people beside those of the lexicon."""

import numpy as np
import pytest
from PIL import Image

from evaluation import figures, rate
from evaluation.__main__ import main
from evaluation.cases import grid_of, held_out_cases
from parts.files import write_rows

COLOURS = {"ours": (200, 40, 40), "FLUX": (40, 40, 200)}


@pytest.fixture
def folder(tmp_path):
    cases = grid_of(held_out_cases(2), 3)
    write_rows(tmp_path / "cases.jsonl", [{"id": c.id, "neutral": c.neutral, "v": c.v, "a": c.a, "group": c.group}
                                          for c in cases])
    for name, colour in COLOURS.items():
        (tmp_path / name).mkdir()
        for case in cases:
            Image.new("RGB", (64, 64), colour).save(tmp_path / name / f"{case.id}.png")
    return tmp_path


def sheet(folder, *flags):
    images = [f"--images={name}={folder / name}" for name in COLOURS]
    code = main(["sheet", "--cases", str(folder / "cases.jsonl"), "--out", str(folder / "sheet.png"), "--side", "64",
                 *images, *flags])
    return code, np.array(Image.open(folder / "sheet.png")) if code == 0 else None


def test_a_sheet_has_a_row_for_each_method_and_a_column_for_each_case(folder):
    first = held_out_cases(1)[0].id
    code, drawn = sheet(folder, "--ids", f"{first}_*_a5")
    assert code == 0
    for colour in COLOURS.values():
        own = (drawn == colour).all(2)
        assert own.sum() == 3 * 64 * 64 and own.any(1).sum() == 64  # three columns in one row
    above = drawn[:, :, 0][(drawn == COLOURS["ours"]).all(2).any(1).argmax() - 8]
    assert above.min() < 128  # the targets stand over it


def test_a_sheet_names_what_it_cannot_show(folder, capsys):
    assert sheet(folder, "--ids", "nothing*")[0] == 2
    assert "no case has an id like --ids 'nothing*'" in capsys.readouterr().err
    (folder / "FLUX" / f"{held_out_cases(1)[0].id}_v1_a1.png").unlink()
    assert sheet(folder)[0] == 2
    assert "1 of 18 pictures are missing" in capsys.readouterr().err
    assert main(["sheet", "--cases", str(folder / "cases.jsonl"), "--out", str(folder / "x.png"),
                 f"--images={folder / 'ours'}", f"--images={folder / 'ours'}"]) == 2
    assert "two methods are called ours" in capsys.readouterr().err


def ratings(folder, cases, off):
    rows = [{"time": "2026-01-01T00:00:00+00:00", "rater": "ann", "case": c.id, "method": "data", "v": min(9, c.v + off), "a": c.a, "quality": 3.0,
             "best": None} for c in cases]
    rate.write_ratings(folder / "ratings.csv", rows)
    return folder / "ratings.csv"


def test_values_of_people_and_lexicon_are_compared_sorted_and_one_by_one(folder, capsys):
    cases = grid_of(held_out_cases(2), 3)
    path = ratings(folder, cases[:9], 0.5)
    command = ["values", "--cases", str(folder / "cases.jsonl"), "--human", str(path), "--out", str(folder / "6.png")]
    assert main(command) == 0
    valence, arousal, _ = capsys.readouterr().out.splitlines()
    assert valence == "valence: sorted curves 0.33 apart on average; picture by picture 0.33, Spearman 1.00"
    assert arousal == "arousal: sorted curves 0.00 apart on average; picture by picture 0.00, Spearman 1.00"
    drawn = np.array(Image.open(folder / "6.png"))
    assert (drawn == (30, 90, 200)).all(2).any() and (drawn == (200, 90, 30)).all(2).any()
    assert len(figures.load_cases(folder / "cases.jsonl")) == 18
    ratings(folder, cases[:1], 0)
    assert main(command) == 2 and "rates 1 of the cases" in capsys.readouterr().err
