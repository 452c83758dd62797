"""The sweeps of the control study, and their records."""

import json

import numpy as np
import pytest
from PIL import Image

from evaluation.cases import held_out_cases
from tests.test_results import folder  # noqa: F401
from tiny import control_study, results, scenes


def test_the_sweeps_are_eleven_wishes_a_tenth_apart():
    for axis, targets in control_study.SWEEPS.items():
        moving, still = zip(*targets) if axis == "v" else zip(*[target[::-1] for target in targets])
        assert len(set(still)) == 1 and len(moving) == 11
        assert np.allclose(np.diff(moving), 0.1)


class Painter:
    """Draws grey that follows V, in steps of a half if `coarse`, and ignores A."""

    def __init__(self, coarse=False):
        self.coarse = coarse

    def draw(self, prompts, seeds, size):
        import torch
        values = [float(prompt.split("valence ")[1].split(",")[0]) for prompt in prompts]
        grey = [round(v * 2) / 2 if self.coarse else v for v in values]
        return torch.stack([torch.full((3, size, size), int(g * 25), dtype=torch.uint8) for g in grey])


@pytest.fixture
def grey_meter(monkeypatch):
    monkeypatch.setattr(scenes, "measure_va", lambda image: (float(np.asarray(Image.Image.convert(image, "L")).mean()), 5.0))


def test_figures_tell_fine_control_from_coarse_and_from_none(grey_meter):
    case = held_out_cases(1)[0]
    fine = control_study.figures_of(Painter(), "numbers", case, 0)
    coarse = control_study.figures_of(Painter(coarse=True), "numbers", case, 0)
    assert fine["v_pictures"] == 11 and fine["v_spearman"] == pytest.approx(1)
    assert coarse["v_pictures"] == 3 and coarse["v_spearman"] < 0.97
    assert fine["a_pictures"] == 1 and np.isnan(fine["a_spearman"])
    assert fine["v_order"] == 1 and fine["a_order"] == 0


def test_rows_are_written_as_records_and_read_back_as_a_table(folder, monkeypatch, grey_meter, capsys):  # noqa: F811
    monkeypatch.setattr(control_study, "load_generator", lambda source, adapter: Painter(coarse=adapter is None))
    monkeypatch.setattr(control_study.data, "TARGET_FORMS", {"numbers": control_study.data.with_numbers})
    for _ in range(2):  # a second run takes the first one's place
        assert control_study.main(["--prompts", "2", "--adapter", "x"]) == 0
    heads = [json.loads(line) for line in (folder / "records" / "control.jsonl").read_text().splitlines()]
    assert len(heads) == 2 * (1 + 2)
    assert heads[0]["commands"] == ["python -m tiny.control_study --prompts 2 --adapter x"]
    base, adapted = results.table_of("control").splitlines()[2:]
    assert base.startswith("| base, numbers | 1 | 3.0 [3.0, 3.0] |")
    assert adapted.startswith("| after reward feedback, numbers | 1 | 11.0 [11.0, 11.0] | 1.00 [1.00, 1.00] |")
