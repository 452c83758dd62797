"""From small published-layout files to pictures, figures and tables of every method, by the commands of docs/paper.md."""

import json
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from baselines import emoedit
from evaluation.__main__ import main
from evaluation.cases import held_out_cases
from parts.files import write_rows
from parts.pipeline import TINY
from tests.test_baseline_emoedit import Published, lively
from tests.test_baseline_emoticrafter import CONTEXT, POSITIONS, WIDTH, Reference, shake
from tests.test_baseline_flux import make_flux
from tests.test_baseline_unet import make_pipeline, source_picture
from tests.test_clip import random_clip

SMALL = emoedit.QFormerConfig(width=32, layers=2, heads=4, mlp=40, queries=76, image_width=32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Models of all methods, a file of cases, and the pictures that an editor changes."""
    folder = tmp_path_factory.mktemp("methods")
    make_flux(True).save_pretrained(folder / "flux")
    make_flux(False).save_pretrained(folder / "schnell")
    make_pipeline("sdxl").save_pretrained(folder / "sdxl")
    make_pipeline("pix2pix").save_pretrained(folder / "editor")
    with torch.no_grad():
        network = Reference(2, WIDTH, CONTEXT, POSITIONS)
        shake(network, torch.Generator().manual_seed(4))
        torch.save(network.published(), folder / "emoticrafter.pth")
        torch.save(lively(Published(SMALL)).state_dict(), folder / "Q-Former.pth")
    random_clip(folder / "clip", projection=32)
    cases = held_out_cases(2)
    source_picture().save(folder / "source.png")
    write_rows(folder / "cases.jsonl", [{"id": c.id, "neutral": c.neutral, "v": c.v, "a": c.a, "source": "source.png"}
                                        for c in cases])
    return folder


METHODS = {  # name: flags
    "flux": ["--model", "{}/flux"],
    "flux-schnell": ["--model", "{}/schnell", "--encoders", "leave"],
    "sdxl": ["--model", "{}/sdxl"],
    "emoticrafter": ["--model", "{}/sdxl", "--weights", "{}/emoticrafter.pth"],
    "emoedit": ["--model", "{}/editor", "--weights", "{}/Q-Former.pth", "--clip", "{}/clip"],
    "sd35": ["--model", str(TINY), "--encoders", "leave"],
    "ours": ["--model", str(TINY), "--adapter", str(TINY / "adapter")],
}


@pytest.fixture(scope="module")
def drawn(folder):
    """The methods' folders of pictures, drawn by the command."""
    with pytest.MonkeyPatch.context() as patch:
        # the published adapter has one size, which its file does not tell
        patch.setattr(emoedit.QFormer, "from_pretrained", partial(emoedit.QFormer.from_pretrained, config=SMALL))
        for method, flags in METHODS.items():
            flags = [flag.replace("{}", str(folder)) for flag in flags]
            assert main(["draw", "--method", method, *flags, "--cases", str(folder / "cases.jsonl"), "--size", "64",
                         "--sample-steps", "2", "--device", "cpu", "--out", str(folder / "pictures" / method)]) == 0
    return folder / "pictures"


def test_every_method_draws_every_case_by_one_command(drawn):
    seen = {}
    for method in METHODS:
        for case in held_out_cases(2):
            picture = np.array(Image.open(drawn / method / f"{case.id}.png"))
            assert picture.shape == (64, 64, 3) and picture.std() > 0
            seen[method, case.id] = picture.tobytes()
    assert len(set(seen.values())) == len(seen)  # no two are the same


def test_tables_and_figures_are_made_of_the_drawn_pictures(drawn, folder, capsys):
    runs = []
    for method in ("flux", "emoticrafter", "emoedit"):
        out = folder / "runs" / method
        assert main(["run", "--cases", str(folder / "cases.jsonl"), "--images", str(drawn / method), "--out", str(out),
                     "--preset", "tiny"]) == 0
        runs.append(str(out))
    capsys.readouterr()
    assert main(["table", *runs, "--form", "1", "--out", str(folder / "table")]) == 0
    assert "| emoticrafter | " in capsys.readouterr().out
    assert "sources the dataset's own pictures" in (folder / "table.md").read_text()
    assert main(["table", *runs, "--form", "7"]) == 0
    latency = capsys.readouterr().out.splitlines()
    assert all(float(cell) > 0 for cell in latency[2].split("|")[2:-1])  # taken from draw.json
    facts = json.loads((drawn / "emoticrafter" / "draw.json").read_text())
    assert facts["form"] == "neutral" and facts["billions"] == json.loads(
        (drawn / "sdxl" / "draw.json").read_text())["billions"]
    images = [f"--images={method}={drawn / method}" for method in METHODS]
    assert main(["sheet", "--cases", str(folder / "cases.jsonl"), *images, "--out", str(folder / "3.png")]) == 0
    assert Image.open(folder / "3.png").height > 7 * 64
