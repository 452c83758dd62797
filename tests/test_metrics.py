"""Scores of pictures against torchmetrics and LAION's heads; figures over cases; bad input."""

import math
import os
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

import data
from evaluation import metrics
from parts import clip
from parts.cli import UserError
from parts.pipeline import TINY
from tests.test_clip import PROMPTS, error, quietly, random_clip, some_pictures, their_scores


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """(folder, CLIPModel, CLIPProcessor): a random CLIP of transformers."""
    return random_clip(tmp_path_factory.mktemp("scorer"))


@pytest.fixture(scope="module")
def miniature():
    return clip.CLIP.from_pretrained(TINY / "clip")


def test_clip_score_is_the_cosine_cut_off_at_zero(reference):
    model, images = clip.CLIP.from_pretrained(reference[0]), some_pictures()
    cosine = their_scores(reference, images, PROMPTS) / reference[1].logit_scale.detach().exp()
    assert error(quietly(metrics.clip_score, model, images, PROMPTS), 100 * cosine.clamp(min=0)) < 1e-4
    model.vision.visual_projection.weight.data.neg_()  # and every cosine changes its sign
    assert torch.allclose(quietly(metrics.clip_score, model, images, PROMPTS), 100 * (-cosine).clamp(min=0), atol=1e-3)


def test_clip_score_and_pick_score_of_a_pair_differ_by_the_temperature(miniature):
    pictures, captions = some_pictures()[:3], ["a lake", "a castle at night", "a road"]
    expected = clip.pick_score(miniature, pictures, captions) * 100 / miniature.logit_scale.detach().exp()
    assert torch.allclose(metrics.clip_score(miniature, pictures, captions), expected.clamp(min=0), atol=1e-3)


def test_pictures_without_their_prompts_are_refused(miniature):
    with pytest.raises(ValueError, match="6 pictures, one string"):
        metrics.clip_score(miniature, some_pictures(), "a lake")
    with pytest.raises(ValueError, match="6 pictures, 1 as prompts"):
        metrics.clip_score(miniature, some_pictures(), ["a lake"])


class OfTensors:
    """A CLIPModel whose features are plain tensors, as torchmetrics expects them of every transformers."""

    def __init__(self, model):
        self.model, self.config = model, model.config

    def to(self, device):
        return self

    def get_image_features(self, pixels):
        return self.model.get_image_features(pixels).pooler_output

    def get_text_features(self, ids, mask):
        return self.model.get_text_features(ids, mask).pooler_output


@pytest.fixture
def torchmetrics(reference, monkeypatch):
    """torchmetrics' functions of pictures and prompts, with the random CLIP."""
    from torchmetrics.functional.multimodal import clip_image_quality_assessment, clip_score
    _, model, processor = reference
    pair = OfTensors(model.requires_grad_(False)), processor
    monkeypatch.setitem(clip_image_quality_assessment.__globals__, "_get_clip_iqa_model_and_processor", lambda name: pair)

    def pixels(images):  # the processor scales 0..255 to 0..1 itself
        return [torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in images]

    return SimpleNamespace(
        clip_score=lambda images, prompts: clip_score(pixels(images), prompts, lambda: pair),
        clip_iqa=lambda images, prompts: clip_image_quality_assessment(
            torch.stack(pixels(images)), model_name_or_path="given", data_range=1.0, prompts=prompts))


def test_clip_score_equals_torchmetrics(reference, torchmetrics):
    model, images, prompts = clip.CLIP.from_pretrained(reference[0]), some_pictures(), [p for p in PROMPTS if len(p) < 99]
    pairs = [(image, prompt) for image in images for prompt in prompts]
    theirs = torch.stack([torchmetrics.clip_score([image], [prompt]) for image, prompt in pairs])
    assert error(metrics.clip_score(model, *zip(*pairs)), theirs) < 1e-4 and float(theirs.std()) > 1
    mean = torchmetrics.clip_score([image for image, _ in pairs], [prompt for _, prompt in pairs])
    assert error(100 * clip.cosines(model, *zip(*pairs)).mean().clamp(min=0), mean) < 1e-4


@pytest.mark.parametrize("name, prompts", [
    ("quality", ("Good photo.", "Bad photo.")), (("a lake at night", "a lake"),) * 2])
def test_clip_iqa_equals_torchmetrics(reference, torchmetrics, name, prompts):
    model, images = clip.CLIP.from_pretrained(reference[0]), [image.resize((50, 40)) for image in some_pictures()]
    ours, theirs = metrics.clip_iqa(model, images, prompts), torchmetrics.clip_iqa(images, (name,))
    assert ours.shape == (6,) and torch.allclose(ours, theirs, atol=1e-4) and torch.allclose(ours, theirs, rtol=1e-3, atol=0)
    assert len(set(theirs.tolist())) == 6 and 0 <= float(ours.min()) <= float(ours.max()) <= 1


def aesthetic_file(folder, sides, seed=0):
    """A predictor in LAION's layout with random weights: (file, the module that made it)."""
    torch.manual_seed(seed)
    if len(sides) == 2:
        module = nn.Linear(*sides)
    else:  # dropout between the layers, but none before the last
        layers = [nn.Linear(*pair) for pair in pairwise(sides)]
        module = nn.Module()
        module.layers = nn.Sequential(*[x for layer in layers[:-2] for x in (layer, nn.Dropout(0.2))], *layers[-2:])
    torch.save(module.state_dict(), folder / "head.pth")
    return folder / "head.pth", module.eval()


@pytest.mark.parametrize("sides", [(24, 1), (24, 1024, 128, 64, 16, 1)], ids=["linear", "MLP"])
@pytest.mark.parametrize("ending", ["pth", "safetensors"])
@torch.no_grad()
def test_an_aesthetic_head_of_the_published_layout_scores_the_unit_embeddings(reference, tmp_path, sides, ending):
    file, module = aesthetic_file(tmp_path, sides)
    if len(sides) > 2:
        assert sorted(module.state_dict()) == sorted(f"layers.{i}.{k}" for i in (0, 2, 4, 6, 7) for k in ("weight", "bias"))
    if ending == "safetensors":
        save_file(module.state_dict(), tmp_path / "head.safetensors")
        file = tmp_path / "head.safetensors"
    model, images = clip.CLIP.from_pretrained(reference[0]), some_pictures()
    features = reference[1].get_image_features(
        reference[2](images=images, return_tensors="pt")["pixel_values"]).pooler_output
    features = features / features.norm(dim=-1, keepdim=True)
    expected = (module(features) if len(sides) == 2 else module.layers(features))[:, 0]
    scores = metrics.aesthetic_score(model, metrics.aesthetic_head(file), images)
    assert scores.shape == (6,) and float((scores - expected).abs().max()) < 1e-4 and float(expected.std()) > 1e-3


def test_embeddings_stand_for_their_pictures_in_every_score(reference, tmp_path):
    model, images = clip.CLIP.from_pretrained(reference[0]), some_pictures()
    embedded, head = clip.embed_pictures(model, images), metrics.aesthetic_head(aesthetic_file(tmp_path, (24, 1))[0])
    prompts = PROMPTS[:3] * 2
    assert embedded.shape == (6, 24) and torch.equal(metrics.clip_iqa(model, embedded), metrics.clip_iqa(model, images))
    assert torch.equal(metrics.clip_score(model, embedded, prompts), metrics.clip_score(model, images, prompts))
    assert torch.equal(metrics.aesthetic_score(model, head, embedded), metrics.aesthetic_score(model, head, images))


class Malice:
    def __reduce__(self):
        return os.system, ("touch malice",)


@pytest.mark.parametrize("content, message", [
    (Malice(), "not a file of plain tensors"), (b"not a file of torch", "not a file of plain tensors"),
    ({"fc.weight": torch.zeros(1, 24)}, "not the layers"), ({}, "not the layers"),
    (torch.zeros(3), "not the layers"), ({"weight": torch.zeros(2, 24), "bias": torch.zeros(2)}, "ends in one number"),
    ({"layers.0.weight": torch.zeros(8, 24), "layers.0.bias": torch.zeros(8), "layers.2.weight": torch.zeros(1, 9),
      "layers.2.bias": torch.zeros(1)}, "not the layers"), (None, "no such file; download LAION's")])
def test_a_file_that_is_no_aesthetic_head_is_refused_and_no_code_in_it_runs(tmp_path, monkeypatch, content, message):
    monkeypatch.chdir(tmp_path)
    if isinstance(content, bytes):
        Path("head.pth").write_bytes(content)
    elif content is not None:
        torch.save(content, "head.pth")
    with pytest.raises(UserError, match=message) as caught:
        metrics.aesthetic_head("head.pth")
    assert "\n" not in str(caught.value) and not Path("malice").exists()


def test_a_head_of_another_width_is_refused(miniature, tmp_path):
    head = metrics.aesthetic_head(aesthetic_file(tmp_path, (24, 1))[0])
    with pytest.raises(ValueError, match="reads 24 numbers and this CLIP makes .*clip-vit-large-patch14"):
        metrics.aesthetic_score(miniature, head, some_pictures())


# ---------------------------------------------------------------------------------------------------------------------
# Over cases


@given(st.lists(st.tuples(st.integers(-5, 5), st.integers(-5, 5)), min_size=2, max_size=30))
def test_spearman_is_the_correlation_of_average_ranks(pairs):
    x, y = np.array(pairs, float).T

    def average_ranks(values):  # by counting, element by element
        return [sum(v < u for v in values) + (sum(v == u for v in values) - 1) / 2 for u in values]

    assert metrics.ranks(x).tolist() == average_ranks(x)
    value = metrics.spearman(x, y)
    if len(set(x)) == 1 or len(set(y)) == 1:
        assert np.isnan(value)
    else:
        assert value == pytest.approx(np.corrcoef(average_ranks(x), average_ranks(y))[0, 1], abs=1e-9)


def test_statistics_leave_out_what_could_not_be_read():
    assert metrics.mean([1, math.nan, 3]) == 2 and math.isnan(metrics.mean([math.nan]))
    pairs = np.array([[1, 2], [2, math.nan], [3, 1]])
    assert metrics.correlation(pairs) == -1 and math.isnan(metrics.correlation(pairs[:2]))


def records(va, group="scene", read=lambda v, a: [v, a]):
    return [{"v": v, "a": a, "group": group, "read": {"judge": read(v, a)}} for v, a in va]


GRID = [(v, a) for a in (1.0, 5.0, 9.0) for v in (1.0, 5.0, 9.0)]


def test_errors_are_absolute_and_nan_where_nothing_could_be_read():
    found = metrics.errors(records(GRID, read=lambda v, a: None if v == 5 else [v - 1, a + 2]), "judge", 0)
    assert np.array_equal(found, [1, math.nan, 1] * 3, equal_nan=True)
    assert (metrics.errors(records(GRID, read=lambda v, a: [v - 1, a + 2]), "judge", 1) == 2).all()


def test_neighbours_are_those_of_one_group_along_one_axis():
    def order(axis, **kwargs):
        return metrics.neighbours_in_order(records(GRID, **kwargs), "judge", axis)

    assert np.array_equal(order(0), [1, 1, math.nan] * 3, equal_nan=True)
    assert np.array_equal(order(1), [1] * 6 + [math.nan] * 3, equal_nan=True)
    assert np.nanmean(order(0, read=lambda v, a: [10 - v, a])) == 0
    assert np.isnan(order(0, group=None)).all()
    half = order(0, read=lambda v, a: None if v == 9 else [v, a])
    assert np.array_equal(half, [1, math.nan, math.nan] * 3, equal_nan=True)
    two = records(GRID[:1], "one") + records(GRID[1:2], "two")
    assert np.isnan(metrics.neighbours_in_order(two, "judge", 0)).all()


def rows_of(labels):
    return [data.Row("", Path(), label, 5.0, 5.0, "", labels=labels) for label in data.EMOTIONS]


def test_drawn_labels_have_a_floor_and_true_ones_have_none():
    assert metrics.label_floor(rows_of("drawn")) == pytest.approx((1.24, 1.89), abs=0.005)
    assert metrics.label_floor(rows_of("family")) == pytest.approx((0.41, 0.60), abs=0.005)
    assert metrics.label_floor(rows_of("true")) == (0, 0)
    half = metrics.label_floor(rows_of("true") + rows_of("drawn"))
    assert half == pytest.approx([x / 2 for x in metrics.label_floor(rows_of("drawn"))])


@pytest.mark.parametrize("label", ["awe", "sadness"])
def test_no_constant_comes_nearer_to_drawn_labels_than_the_floor(label):
    rng = np.random.default_rng(0)
    drawn = np.array([data.draw_va(label, rng) for _ in range(20_000)])
    floor = metrics.label_floor([data.Row("", Path(), label, 5.0, 5.0, "", labels="drawn")])
    for axis in (0, 1):
        constants = np.linspace(1, 9, 81)
        least = min(abs(drawn[:, axis] - constant).mean() for constant in constants)
        assert least == pytest.approx(floor[axis], abs=0.03)
