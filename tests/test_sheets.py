"""A run's pictures side by side: each at its place, the best framed, the axes labelled."""

import numpy as np
import pytest
from PIL import Image

from parts import sheets
from tests.test_page import BLUE, GREY, RUNS, a_cell, a_run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    for name, colour, side in (("blue", BLUE, 32), ("grey", GREY, 32), ("large", BLUE, 600)):
        Image.new("RGB", (side, side), colour).save(folder / f"{name}.png")
    return folder


@pytest.mark.parametrize(("name", "rows", "columns"), [
    ("three rounds", 3, 4), ("one picture", 1, 1), ("no judge", 1, 3), ("nothing readable", 2, 3),
    ("some not readable", 2, 3), ("grid", 25, 2),
    ("grid that goes on", 7, 2), ("grid of one picture each", 5, 5), ("grid without judge", 5, 5)])
def test_the_contact_sheet_has_a_row_for_each_round_or_target(name, rows, columns, folder):
    sheet = np.array(sheets.contact_sheet(RUNS[name], folder))
    blue, grey = ((sheet == colour).all(2) for colour in (BLUE, GREY))
    pictures = blue | grey
    ends = np.diff(np.pad(pictures[:, pictures.any(0)].any(1).astype(int), 1))
    assert (ends == 1).sum() == rows
    row = pictures[np.flatnonzero(pictures.any(1))[0]]
    assert (np.diff(np.pad(row.astype(int), 1)) == 1).sum() == columns and row.sum() == 32 * columns
    framed = ((sheet == (0x1c, 0x7a, 0x4a)).all(2)).any()
    assert framed == (name not in ("no judge", "nothing readable", "grid of one picture each", "grid without judge"))


def test_the_contact_sheet_shrinks_large_pictures_and_wraps_long_rows(folder, monkeypatch):
    run = a_run([a_cell(7.0, 3.0, 1, 14)], size=600)
    for image in run["cells"][0]["rounds"][0]["images"]:
        image["file"] = "large.png"
    sheet = sheets.contact_sheet(run, folder)
    assert 12 * 256 < sheet.width < 13 * 256 + 12 * 8 and 2 * 256 < sheet.height < 2 * 300
    monkeypatch.setattr(sheets, "SHEET", 14 * 100**2)
    assert sheets.contact_sheet(run, folder).width < 12 * 120


def test_the_grid_has_valence_to_the_right_and_arousal_upwards(tmp_path):
    moods = [(v, a) for a in (9.0, 5.0, 1.0) for v in (1.0, 5.0, 9.0)]
    cells = [a_cell(v, a, 1, 1) for v, a in moods]
    for i, cell in enumerate(cells):
        cell["rounds"][0]["images"][0]["file"] = f"{i}.png"
        Image.new("RGB", (32, 32), (0, 20 * i, 255)).save(tmp_path / f"{i}.png")
    grid = np.array(sheets.va_grid(a_run(cells, grid="grid3.png"), tmp_path))
    for i in range(9):
        place = np.argwhere((grid == (0, 20 * i, 255)).all(2))
        assert len(place) == 32 * 32
        row, column = divmod(i, 3)
        assert tuple(place[0]) == (2 + 34 * row, 28 + 34 * column)


def test_a_grid_of_large_pictures_is_shrunk_to_what_can_be_opened(tmp_path, monkeypatch):
    monkeypatch.setattr(sheets, "GRID", 90.0**2)
    Image.new("RGB", (32, 32), BLUE).save(tmp_path / "blue.png")
    cells = [a_cell(v, a, 1, 1) for a in (9.0, 5.0, 1.0) for v in (1.0, 5.0, 9.0)]
    for cell in cells:
        cell["rounds"][0]["images"][0]["file"] = "blue.png"
    grid = np.array(sheets.va_grid(a_run(cells, grid="grid3.png"), tmp_path))
    assert (grid == BLUE).all(2).sum() == 9 * 22 * 22  # 90 pixels for three pictures and a margin


def test_the_grid_shows_the_best_picture_of_each_target(tmp_path):
    cells = [a_cell(v, a, 2, 2) for a in (9.0, 1.0) for v in (1.0, 9.0)]  # "blue.png" is the best
    for name, colour in (("blue", BLUE), ("grey", GREY)):
        Image.new("RGB", (32, 32), colour).save(tmp_path / f"{name}.png")
    grid = np.array(sheets.va_grid(a_run(cells, grid="grid2.png"), tmp_path))
    assert (grid == BLUE).all(2).sum() == 4 * 32 * 32
