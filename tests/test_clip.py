"""Pictures, towers and PickScore against transformers; full-size names and counts; the miniature's CLIP; bad input."""

import json
import shutil
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from parts import clip, weights
from parts.cli import UserError
from parts.files import write_json
from parts.pipeline import TINY
from tests.checkpoint import WORDS
from tiny import publish, scenes
from tiny.pretrain import learn_bpe

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


def logits(model, ids, pixels):
    return model.logit_scale.exp() * model.embed_images(pixels) @ model.embed_text(ids).T


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
def test_a_text_tower_without_projection_is_read_under_old_and_new_names(tmp_path):
    theirs = shake(CLIPTextModel(CLIPTextConfig(**TEXT, eos_token_id=2)))
    theirs.save_pretrained(tmp_path)
    ids = some_ids(98)
    expected = theirs(ids).pooler_output
    assert error(clip.TextTower.from_pretrained(tmp_path, project=False)(ids)[1], expected) < 1e-4
    file = tmp_path / "model.safetensors"
    older = {f"text_model.{name}": t for name, t in load_file(file).items()}  # as FLUX and SDXL are published
    save_file({**older, "text_model.embeddings.position_ids": torch.arange(20)[None]}, file)
    assert error(clip.TextTower.from_pretrained(tmp_path, project=False)(ids)[1], expected) < 1e-4
    with pytest.raises(UserError, match="missing text_projection.weight"):
        clip.TextTower.from_pretrained(tmp_path)


@torch.no_grad()
def test_both_towers_and_their_logits_equal_transformers(tmp_path):
    theirs = shake(CLIPModel(CLIPConfig(text_config={**TEXT, "eos_token_id": 98}, vision_config=VISION, projection_dim=24)))
    theirs.save_pretrained(tmp_path)
    ours = clip.CLIP.from_pretrained(tmp_path)
    ids, pixels = some_ids(98), torch.randn(4, 3, 32, 32)
    expected = theirs(input_ids=ids, pixel_values=pixels)
    assert error(logits(ours, ids, pixels), expected.logits_per_image) < 1e-4
    assert error(ours.embed_text(ids), expected.text_embeds) < 1e-4
    assert error(ours.embed_images(pixels), expected.image_embeds) < 1e-4


@torch.no_grad()
def test_saved_towers_are_read_by_transformers(tmp_path):
    text, vision = clip.TextConfig(32, 3, 4, 48, "gelu", 24, 99, 20, 98), clip.VisionConfig(48, 2, 3, 64, "gelu", 24, 32, 8)
    model = shake(clip.CLIP(text, vision))
    publish.save_clip(tmp_path / "clip", model)
    publish.save_text_tower(tmp_path / "text", model.text)
    ids, pixels = some_ids(98), torch.randn(2, 3, 32, 32)
    theirs = CLIPModel.from_pretrained(tmp_path / "clip")
    assert error(logits(model, ids, pixels), theirs(input_ids=ids, pixel_values=pixels).logits_per_image) < 1e-4
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
    with torch.device("meta"):
        unprojected = clip.TextTower(config, project=False)
    assert found.keys() - weights.shapes(unprojected.views()).keys() == {"text_projection.weight"}


def test_an_unknown_activation_and_a_text_only_folder_are_refused(tmp_path):
    CLIPTextModelWithProjection(CLIPTextConfig(**TEXT, hidden_act="relu")).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="relu"):
        clip.TextTower.from_pretrained(tmp_path)
    with pytest.raises(UserError, match="two towers"):
        clip.CLIP.from_pretrained(tmp_path)


# ---------------------------------------------------------------------------------------------------------------------
# Pictures


SIZES = [(56, 1000), (1000, 56), (500, 333), (225, 224), (224, 224), (1, 300), (13, 17), (223, 640), (1, 1)]  # width, height


def noise(size, mode="RGB", seed=0):
    """A random picture with something coarse in it: bicubic overshoots at both."""
    rng = np.random.default_rng([seed, *size])
    values = rng.integers(0, 256, (size[1], size[0], 4), dtype=np.uint8)
    values[: size[1] // 2, : size[0] // 2] //= 4
    image = Image.fromarray(values, "RGBA")
    return image if mode == "RGBA" else image.convert("RGB").convert(mode)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_pictures_of_any_shape_become_what_transformers_makes_of_them(size):
    image = noise(size)
    expected = CLIPImageProcessorPil()(image, return_tensors="pt")["pixel_values"]
    pixels = clip.preprocess([image])
    assert pixels.dtype == torch.float32 and pixels.shape == (1, 3, 224, 224)
    assert float((pixels - expected).abs().max()) < 1e-5


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "LA", "1", "CMYK", "P with a transparent colour"])
@pytest.mark.parametrize("side, square", [(32, False), (31, False), (32, True)])
def test_modes_sides_and_squares_equal_transformers(mode, side, square):
    mean, std = (0.5, 0.4, 0.3), (0.5, 0.25, 0.3)
    theirs = CLIPImageProcessorPil(size={"height": side, "width": side} if square else side, crop_size=side,
                                   image_mean=mean, image_std=std)
    images = [noise(size, mode.split()[0]) for size in ((40, 75), (31, 20), (64, 64))]
    if "transparent" in mode:
        for image in images:
            image.info["transparency"] = image.getpixel((0, 0))
    expected = theirs(images, return_tensors="pt")["pixel_values"]
    assert float((clip.preprocess(images, clip.ImageConfig(side, mean, std, square)) - expected).abs().max()) < 1e-5


def test_uint8_tensors_are_the_same_pictures():
    images = [noise((50, 40), seed=i) for i in range(3)]
    pixels = torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in images])
    small = clip.ImageConfig(32)
    assert torch.equal(clip.preprocess(pixels, small), clip.preprocess(images, small))


# ---------------------------------------------------------------------------------------------------------------------
# Scores


PROMPTS = ["a lake at night", "", "A LONE tree — café, 42 horses!", "storm horses " * 60, "a lake at night", "dark morning"]


def random_clip(folder, projection=24):
    """(folder, CLIPModel, CLIPProcessor): a random CLIP with its own tokenizer and image settings, of transformers."""
    vocab, merges = learn_bpe([" ".join(WORDS)] * 3, 700)
    text = {**TEXT, "vocab_size": len(vocab), "max_position_embeddings": 77, "eos_token_id": len(vocab) - 1,
            "projection_dim": projection}
    torch.manual_seed(0)
    vision = {**VISION, "projection_dim": projection}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=projection)).eval()
    for name, p in model.named_parameters():  # lively, with weak biases: pictures and prompts must not look alike
        p.data = torch.randn(p.shape) * (1 if "embedding" in name else 0.2) + ("norm.weight" in name or "norm1" in name)
    model.logit_scale.data.fill_(4.6052)
    processor = CLIPProcessor(CLIPImageProcessorPil(size=32, crop_size=32, image_mean=(0.4, 0.5, 0.6)),
                              CLIPTokenizer(vocab, merges, model_max_length=77))
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder, model, processor


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    return random_clip(tmp_path_factory.mktemp("scorer"))


def some_pictures():
    """Six odd shapes, each in a colour of its own."""
    tints = ((255, 0, 0), (0, 255, 0), (0, 0, 255), (0, 0, 0), (255, 255, 255), (255, 255, 0))
    sizes = ((56, 100), (33, 31), (32, 32), (300, 41), (13, 17), (90, 90))
    return [Image.blend(noise(size), Image.new("RGB", size, tint), 0.7) for size, tint in zip(sizes, tints)]


def quietly(score, *args):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the prompt that is cut
        return score(*args)


@torch.no_grad()
def their_scores(reference, images, prompts):
    """exp(logit_scale) · cosine of pairs, by transformers' own way from pictures and prompts to logits."""
    _, model, processor = reference
    inputs = processor(text=prompts, images=images, return_tensors="pt", padding=True, truncation=True, max_length=77)
    return model(**inputs).logits_per_image.diag()


def test_scores_of_pairs_equal_transformers_and_long_prompts_are_cut(reference):
    model, images = clip.CLIP.from_pretrained(reference[0]).requires_grad_(True), some_pictures()
    expected = their_scores(reference, images, PROMPTS)
    with pytest.warns(UserWarning, match="77 tokens"):
        scores = clip.pick_score(model, images, PROMPTS)
    assert scores.shape == (6,) and scores.dtype == torch.float32 and not scores.requires_grad
    assert error(scores, expected) < 1e-4 and float(expected.std()) > 1  # and the pairs do differ
    backwards = PROMPTS[::-1]
    assert error(quietly(clip.pick_score, model, images, backwards), their_scores(reference, images, backwards)) < 1e-4


def test_a_pair_scores_the_same_alone_and_among_others(reference):
    model, images = clip.CLIP.from_pretrained(reference[0]), some_pictures()
    together = quietly(clip.pick_score, model, images, PROMPTS)
    alone = [quietly(clip.pick_score, model, [image], [prompt]) for image, prompt in zip(images, PROMPTS)]
    assert torch.allclose(together, torch.cat(alone), atol=1e-4)
    group = clip.pick_score(model, images[:3] * 2, ["a lake"] * 3 + ["a tree"] * 3)
    apart = torch.cat([clip.pick_score(model, images[:3], [prompt] * 3) for prompt in ("a lake", "a tree")])
    assert torch.allclose(group, apart, atol=1e-4)


@pytest.mark.parametrize("files", ["vocab.json and merges.txt", "int sizes"])
def test_older_layouts_of_the_processor_give_the_same_scores(reference, tmp_path, files):
    """vocab.json with merges.txt instead of tokenizer.json; preprocessor_config.json with plain numbers as sizes."""
    folder, _, processor = reference
    for name in ("config.json", "model.safetensors", "tokenizer_config.json"):
        shutil.copy(folder / name, tmp_path / name)
    if files == "int sizes":
        shutil.copy(folder / "tokenizer.json", tmp_path)
    else:
        model = json.loads((folder / "tokenizer.json").read_text())["model"]
        write_json(tmp_path / "vocab.json", model["vocab"])
        (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, model["merges"])]))
    sizes = {"size": 32, "crop_size": 32} if files == "int sizes" else {
        "size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    write_json(tmp_path / "preprocessor_config.json", {
        "feature_extractor_type": "CLIPFeatureExtractor", "image_mean": [0.4, 0.5, 0.6], "do_resize": True, **sizes})
    model = clip.CLIP.from_pretrained(tmp_path)
    expected = their_scores(reference, some_pictures(), PROMPTS)
    assert error(quietly(clip.pick_score, model, some_pictures(), PROMPTS), expected) < 1e-4


def test_sizes_with_height_and_width_squeeze_and_an_endless_tokenizer_is_cut_to_the_tower(reference, tmp_path):
    folder, theirs, processor = reference
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    settings = {**json.loads((folder / "tokenizer_config.json").read_text()), "model_max_length": 10**30}
    write_json(tmp_path / "tokenizer_config.json", settings)
    write_json(tmp_path / "preprocessor_config.json", {"size": {"height": 32, "width": 32}, "crop_size": 32})
    model = clip.CLIP.from_pretrained(tmp_path)
    squeezing = CLIPProcessor(CLIPImageProcessorPil(size={"height": 32, "width": 32}, crop_size=32), processor.tokenizer)
    expected = their_scores((tmp_path, theirs, squeezing), some_pictures(), PROMPTS)
    assert error(quietly(clip.pick_score, model, some_pictures(), PROMPTS), expected) < 1e-4
    publish.save_clip(tmp_path / "again", model)
    assert clip.CLIP.from_pretrained(tmp_path / "again").processor.image == model.processor.image


def test_a_model_without_a_tokenizer_takes_that_of_another_folder(reference, tmp_path):
    folder, theirs, _ = reference
    theirs.save_pretrained(tmp_path)
    alone = clip.CLIP.from_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"processor=.*laion/CLIP-ViT-H-14"):
        clip.pick_score(alone, some_pictures(), PROMPTS)
    ours = clip.CLIP.from_pretrained(tmp_path, processor=folder)
    expected = their_scores(reference, some_pictures(), PROMPTS)
    assert error(quietly(clip.pick_score, ours, some_pictures(), PROMPTS), expected) < 1e-4


def test_a_saved_scorer_is_read_by_transformers_and_by_itself(reference, tmp_path):
    ours = clip.CLIP.from_pretrained(reference[0])
    publish.save_clip(tmp_path, ours)
    again = clip.CLIP.from_pretrained(tmp_path)
    assert again.processor.image == ours.processor.image == clip.ImageConfig(32, mean=(0.4, 0.5, 0.6))
    assert torch.equal(again.processor.tokenizer(PROMPTS, warn=False), ours.processor.tokenizer(PROMPTS, warn=False))
    theirs = (tmp_path, CLIPModel.from_pretrained(tmp_path).eval(), CLIPProcessor.from_pretrained(tmp_path, backend="pil"))
    expected = their_scores(theirs, some_pictures(), PROMPTS)
    assert error(quietly(clip.pick_score, again, some_pictures(), PROMPTS), expected) < 1e-4


def test_in_bfloat16_the_temperature_stays_exact(reference):
    half = clip.CLIP.from_pretrained(reference[0], dtype=torch.bfloat16)
    whole = clip.CLIP.from_pretrained(reference[0])
    assert torch.equal(half.logit_scale, whole.logit_scale) and half.logit_scale.dtype == torch.float32
    assert half.text.token_embedding.weight.dtype == torch.bfloat16
    difference = (quietly(clip.pick_score, half, some_pictures(), PROMPTS)
                  - quietly(clip.pick_score, whole, some_pictures(), PROMPTS))
    assert float(difference.abs().max()) < 3  # of 100


def test_full_size_pickscore_has_the_published_names_shapes_and_count():
    text = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096,
            "hidden_act": "gelu"}
    vision = {"hidden_size": 1280, "num_hidden_layers": 32, "num_attention_heads": 16, "intermediate_size": 5120,
              "hidden_act": "gelu", "patch_size": 14}
    with torch.device("meta"):
        ours = clip.CLIP(clip.PICKSCORE_TEXT, clip.PICKSCORE_VISION)
        theirs = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=1024))
    assert weights.count_parameters(ours) == weights.count_parameters(theirs) == 986_109_441
    assert weights.shapes(ours.views()) == {name: tuple(t.shape) for name, t in theirs.state_dict().items()}


# ---------------------------------------------------------------------------------------------------------------------
# The miniature


@pytest.fixture(scope="module")
def miniature():
    return clip.CLIP.from_pretrained(TINY / "clip")


@pytest.fixture(scope="module")
def held_out():
    """([(scene, v, a)], pictures, emotional captions) of 48 scenes drawn apart from the training rows."""
    rng = np.random.default_rng([9001, 77])
    rows = [(scenes.random_scene(rng), *map(float, rng.uniform(1, 9, 2))) for _ in range(48)]
    captions = [scenes.emotional_caption(*row, np.random.default_rng(i)) for i, row in enumerate(rows)]
    return rows, [scenes.render(*row, 128) for row in rows], captions


def test_a_scene_scores_higher_with_its_own_caption_than_with_anothers(miniature, held_out):
    _, pictures, captions = held_out
    own, other = (clip.pick_score(miniature, pictures, texts) for texts in (captions, captions[1:] + captions[:1]))
    scale = float(miniature.logit_scale.exp())
    assert float((own - other).mean()) > 0.5 * scale  # measured: 0.92
    assert float((own > other).float().mean()) > 0.95


def test_the_published_preprocessing_finds_captions_as_well_as_the_pooling_it_was_trained_with(miniature, held_out):
    _, pictures, captions = held_out
    pixels = torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in pictures])
    c = miniature.processor.image
    with torch.no_grad():
        texts = miniature.embed_text(miniature.processor.tokenizer(captions))
        found = [float((miniature.embed_images(x) @ texts.T).argmax(1).eq(torch.arange(len(texts))).float().mean())
                 for x in (F.avg_pool2d(pixels / 127.5 - 1, 2), clip.preprocess(pixels, c))]
    assert found[1] >= found[0] - 1 / len(texts) and found[1] > 0.9, found


def test_transformers_reads_the_miniature_and_scores_alike(miniature, held_out):
    folder = TINY / "clip"
    theirs = (folder, CLIPModel.from_pretrained(folder, dtype=torch.float32).eval(),
              CLIPProcessor.from_pretrained(folder, backend="pil"))
    _, pictures, captions = held_out
    inputs = theirs[2](text=captions[:8], images=pictures[:8], return_tensors="pt", padding=True)
    with torch.no_grad():
        expected = theirs[1](**inputs).logits_per_image.diag()
    assert error(clip.pick_score(miniature, pictures[:8], captions[:8]), expected) < 1e-4


# ---------------------------------------------------------------------------------------------------------------------
# Bad input


@pytest.mark.parametrize("images, prompts, message", [
    (Image.new("RGB", (8, 8)), ["a lake"], "list of PIL images"),
    ([], [], "list of PIL images"),
    ([np.zeros((8, 8, 3), np.uint8)], ["a lake"], "list of PIL images"),
    (torch.rand(1, 3, 8, 8), ["a lake"], "float32"),
    (torch.zeros(1, 8, 8, 3, dtype=torch.uint8), ["a lake"], r"\[1, 8, 8, 3\]"),
    ([Image.new("RGB", (8, 8))] * 2, ["a lake"], "2 pictures, 1 as prompts"),
    ([Image.new("RGB", (8, 8))] * 6, "a lake", "6 pictures, one string"),
], ids=["one picture", "none", "arrays", "float", "channels last", "prompts missing", "one string"])
def test_what_is_no_list_of_pairs_is_refused_in_one_line(miniature, images, prompts, message):
    with pytest.raises(ValueError, match=message) as caught:
        clip.pick_score(miniature, images, prompts)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name, content, message", [
    ("preprocessor_config.json", {"size": 48}, r"size 48; .*64 px"),
    ("preprocessor_config.json", {"size": {"shortest_edge": 64}, "crop_size": {"height": 64, "width": 32}}, "crop_size"),
    ("preprocessor_config.json", {"size": [64, 64]}, "size"),
    ("preprocessor_config.json", {"resample": 2}, "resample 2"),
    ("preprocessor_config.json", {"do_center_crop": False}, "do_center_crop False"),
    ("preprocessor_config.json", {"image_mean": [0.5]}, "normalised by 3 means"),
    ("preprocessor_config.json", {"image_std": []}, "normalised by 3 means"),
    ("preprocessor_config.json", None, "preprocessor_config.json"),
    ("tokenizer_config.json", None, "tokenizer_config.json"),
    ("tokenizer.json", {}, "cannot be read"),
])
def test_a_processor_that_does_not_fit_is_refused_in_one_line(tmp_path, name, content, message):
    folder = shutil.copytree(TINY / "clip", tmp_path / "clip")
    (folder / name).write_text("{" if content is None else json.dumps(content))
    with pytest.raises(UserError, match=message) as caught:
        clip.CLIP.from_pretrained(folder)
    assert "\n" not in str(caught.value)


def test_a_processor_of_another_model_or_without_files_is_refused(reference, tmp_path):
    with pytest.raises(UserError, match=r"<\|endoftext\|>"):
        clip.CLIP.from_pretrained(TINY / "clip", processor=reference[0])
    with pytest.raises(UserError, match="tokenizer_config.json"):
        clip.CLIP.from_pretrained(TINY / "clip", processor=tmp_path)
    with pytest.raises(UserError, match="no such file or folder"):
        clip.CLIP.from_pretrained(TINY / "clip", processor=tmp_path / "nowhere")
