"""The miniature's emotion network learns to put V and A into the vectors of a prompt, and draws its cases."""

from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image

from baselines.emoticrafter import rescaled
from evaluation.cases import held_out_cases
from tiny import emotion_network
from tiny.dataset import write_tiny


def row(v, a):
    return SimpleNamespace(v=float(v), a=float(a), neutral="5 5", emotional=f"{v} {a}")


class Encoders:
    """Vectors that hold the two numbers of a caption."""

    def encode(self, captions):
        context = torch.zeros(len(captions), 4, 160)
        context[:, :, :2] = torch.tensor([list(map(float, caption.split())) for caption in captions])[:, None] / 9
        return context, None


def test_it_learns_what_v_and_a_change():
    rows = [row(v, a) for v in range(1, 10) for a in range(1, 10)]
    network = emotion_network.train(
        SimpleNamespace(encoders=Encoders()), rows, SimpleNamespace(seed=0, steps=150, batch=32, lr=3e-3))
    neutral, _ = Encoders().encode(["5 5", "5 5"])
    with torch.no_grad():
        low, high = network(neutral, *rescaled([row(1, 5), row(9, 5)])).mean(1)
    assert high[0] - low[0] > 0.5 and abs(high[1] - low[1]) < 0.2


def test_the_program_trains_and_draws_every_case(tmp_path):
    write_tiny(tmp_path / "data", 6, 2)
    assert emotion_network.main(["--data", str(tmp_path / "data"), "--out", str(tmp_path / "run"), "--cases", "2", "--steps",
                                 "2", "--batch", "3"]) == 0
    pictures = [np.array(Image.open(tmp_path / "run" / "pictures" / f"{case.id}.png")) for case in held_out_cases(2)]
    assert all(picture.shape == (128, 128, 3) and picture.std() > 0 for picture in pictures)
    assert (tmp_path / "run" / "network.safetensors").exists()
