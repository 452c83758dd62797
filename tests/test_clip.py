"""Both CLIP towers against transformers, full-size names and counts, bad input."""

import pytest
import torch
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModelWithProjection

import clip
import weights

TEXT = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48,
        "max_position_embeddings": 20, "projection_dim": 24}
VISION = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 64, "image_size": 32,
          "patch_size": 8, "projection_dim": 24}


def shake(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.data.copy_(torch.randn(p.shape, generator=generator) * (0.2 if p.dim() > 1 else 0.5) + (p.dim() == 1) * 0.3)
    return model.eval()


def some_ids(end):
    ids = torch.randint(1, end, (3, 20), generator=torch.Generator().manual_seed(2))
    for row, length in zip(ids, (5, 12, 20)):
        row[length - 1:] = end  # CLIP-L pads with its end token
    ids[1, 12:] = 0  # bigG pads with another one
    return ids


def error(ours, theirs):
    return float((ours - theirs).norm() / theirs.norm())


@torch.no_grad()
@pytest.mark.parametrize("activation, end", [("quick_gelu", 2), ("gelu", 98), ("gelu", 50)])
def test_the_text_tower_equals_transformers(tmp_path, activation, end):
    theirs = shake(CLIPTextModelWithProjection(CLIPTextConfig(**TEXT, hidden_act=activation, eos_token_id=end)))
    theirs.save_pretrained(tmp_path / "text_encoder")
    ours = clip.TextTower.from_pretrained(tmp_path, component="text_encoder")
    ids = some_ids(98 if end == 2 else end)
    expected = theirs(ids, output_hidden_states=True)
    penultimate, pooled = ours(ids)
    assert error(penultimate, expected.hidden_states[-2]) < 1e-4
    assert error(pooled, expected.text_embeds) < 1e-4


@torch.no_grad()
def test_both_towers_and_their_logits_equal_transformers(tmp_path):
    theirs = shake(CLIPModel(CLIPConfig(text_config={**TEXT, "eos_token_id": 98}, vision_config=VISION, projection_dim=24)))
    theirs.save_pretrained(tmp_path)
    ours = clip.CLIP.from_pretrained(tmp_path)
    ids, pixels = some_ids(98), torch.randn(4, 3, 32, 32)
    expected = theirs(input_ids=ids, pixel_values=pixels)
    assert error(ours(ids, pixels), expected.logits_per_image) < 1e-4
    assert error(ours.embed_text(ids), expected.text_embeds) < 1e-4
    assert error(ours.embed_images(pixels), expected.image_embeds) < 1e-4


@torch.no_grad()
def test_saved_towers_are_read_by_transformers(tmp_path):
    text, vision = clip.TextConfig(32, 3, 4, 48, "gelu", 24, 99, 20, 98), clip.VisionConfig(48, 2, 3, 64, "gelu", 24, 32, 8)
    model = shake(clip.CLIP(text, vision))
    model.save_pretrained(tmp_path / "clip")
    model.text.save_pretrained(tmp_path / "text")
    ids, pixels = some_ids(98), torch.randn(2, 3, 32, 32)
    theirs = CLIPModel.from_pretrained(tmp_path / "clip")
    assert error(model(ids, pixels), theirs(input_ids=ids, pixel_values=pixels).logits_per_image) < 1e-4
    text = CLIPTextModelWithProjection.from_pretrained(tmp_path / "text")
    assert error(model.text(ids)[1], text(ids).text_embeds) < 1e-4


@pytest.mark.parametrize("config, count, theirs", [
    (clip.CLIP_L_TEXT, 123_650_304, CLIPTextConfig(
        hidden_size=768, num_attention_heads=12, intermediate_size=3072, projection_dim=768)),
    (clip.BIG_G_TEXT, 694_659_840, CLIPTextConfig(
        hidden_size=1280, num_hidden_layers=32, num_attention_heads=20, intermediate_size=5120, hidden_act="gelu",
        projection_dim=1280)),
], ids=["clip-l", "bigG"])
def test_full_size_names_shapes_and_counts_equal_the_published_models(config, count, theirs):
    with torch.device("meta"):
        ours, reference = clip.TextTower(config), CLIPTextModelWithProjection(theirs)
    assert weights.count_parameters(ours) == count
    found = weights.shapes(ours.views())
    assert found == {name: tuple(t.shape) for name, t in reference.state_dict().items()}


def test_an_unknown_activation_and_a_text_only_folder_are_refused(tmp_path):
    CLIPTextModelWithProjection(CLIPTextConfig(**TEXT, hidden_act="relu")).save_pretrained(tmp_path)
    with pytest.raises(weights.CheckpointError, match="relu"):
        clip.TextTower.from_pretrained(tmp_path)
    with pytest.raises(weights.CheckpointError, match="two towers"):
        clip.CLIP.from_pretrained(tmp_path)
