"""ImageReward against transformers' BLIP, HPSv2.1 against its CLIP under open_clip's names; files, flags, bad input."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    BertTokenizerFast,
    BlipTextConfig,
    BlipTextModel,
    BlipVisionConfig,
    BlipVisionModel,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from baselines import image_reward as rewards
from parts import clip, weights
from parts.cli import UserError
from tests.checkpoint import WORDS
from tests.test_clip import error, noise, random_clip

IMAGE = clip.VisionConfig(32, 2, 4, 64, "gelu", image_size=32, patch_size=8, layer_norm_eps=1e-6)
TEXT = clip.TextConfig(24, 2, 3, 48, vocab_size=60, max_position_embeddings=40)
PROMPTS = ["a lake at night", "", "the LONE tree, " * 40]


def lively(model, seed=0):
    """The module with random weights that hand on what they get: weak biases, strong embeddings and projections."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        scale = 0.1 if p.dim() == 1 else 1 if "embedding" in name or "token" in name else 1.5 * p[0].numel() ** -0.5
        p.data.copy_(torch.randn(p.shape, generator=generator) * scale)
        if p.dim() == 1 and name.endswith("weight"):  # of a LayerNorm
            p.data += 1
    return model.eval()


def blip(image=IMAGE, text=TEXT):
    """transformers' two encoders of the sizes of ours, and the published layers of the score."""
    vision = BlipVisionModel(BlipVisionConfig(
        hidden_size=image.hidden_size, num_hidden_layers=image.num_hidden_layers, hidden_act="gelu",
        num_attention_heads=image.num_attention_heads, intermediate_size=image.intermediate_size,
        image_size=image.image_size, patch_size=image.patch_size, layer_norm_eps=1e-6))
    words = BlipTextModel(BlipTextConfig(
        hidden_size=text.hidden_size, num_hidden_layers=text.num_hidden_layers, vocab_size=text.vocab_size,
        num_attention_heads=text.num_attention_heads, intermediate_size=text.intermediate_size,
        max_position_embeddings=text.max_position_embeddings, encoder_hidden_size=image.hidden_size), add_pooling_layer=False)
    head = torch.nn.Sequential()  # as the package image-reward has it
    for i, sides in zip((0, 2, 4, 6, 7), ((text.hidden_size, 1024), (1024, 128), (128, 64), (64, 16), (16, 1))):
        head.add_module(str(i), torch.nn.Linear(*sides))
    return vision, words, head


def published(vision, words, head):
    """The tensors of the three under the names of ImageReward.pt."""
    table = (("embeddings.class_embedding", "cls_token"), ("embeddings.position_embedding", "pos_embed"),
             ("embeddings.patch_embedding", "patch_embed.proj"), ("encoder.layers", "blocks"), ("layer_norm", "norm"),
             ("self_attn.projection", "attn.proj"), ("self_attn", "attn"), ("post_norm", "norm"), ("post_layernorm", "norm"))
    tensors = {}
    for name, tensor in vision.state_dict().items():
        for theirs, ours in table:
            name = name.replace(theirs, ours)
        tensors[f"blip.visual_encoder.{name}"] = tensor
    tensors |= {f"blip.text_encoder.{name}": tensor for name, tensor in words.state_dict().items()}
    return tensors | {f"mlp.layers.{name}": tensor for name, tensor in head.state_dict().items()}


def bert_tokenizer(folder):
    vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", ",", *sorted(set(WORDS))]
    tokenizer = Tokenizer(models.WordPiece({word: i for i, word in enumerate(vocab)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer.save(str(folder / "tokenizer.json"))
    return BertTokenizerFast(tokenizer_object=tokenizer)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """(folder with a random ImageReward.pt, transformers' parts of it, their tokenizer)."""
    folder = tmp_path_factory.mktemp("imagereward")
    parts = [lively(part, seed) for seed, part in enumerate(blip())]
    unused = {"blip.vision_proj.weight": torch.zeros(2, 32), "blip.text_proj.bias": torch.zeros(2),
              "blip.text_encoder.embeddings.position_ids": torch.arange(40)[None]}
    torch.save(published(*parts) | unused, folder / "ImageReward.pt")
    return folder, parts, bert_tokenizer(folder)


def some_images():
    return [noise(size) for size in ((50, 32), (32, 32), (40, 90))]


@torch.no_grad()
def their_rewards(written, images, prompts):
    _, (vision, words, head), tokenizer = written
    pixels = CLIPImageProcessorPil(size=32, crop_size=32)(images, return_tensors="pt")["pixel_values"]
    text = tokenizer(prompts, padding="max_length", truncation=True, max_length=35, return_tensors="pt")
    tokens = vision(pixels).last_hidden_state
    states = words(input_ids=text.input_ids, attention_mask=text.attention_mask, encoder_hidden_states=tokens,
                   encoder_attention_mask=torch.ones(tokens.shape[:2])).last_hidden_state
    return (head(states[:, 0])[:, 0] - 0.16717362830052426) / 1.0333394966054072


def test_image_reward_of_pairs_equals_blip_of_transformers(written):
    model = rewards.load_image_reward(written[0], image=IMAGE, text=TEXT)
    expected = their_rewards(written, some_images(), PROMPTS)
    scores = rewards.image_reward(model, some_images(), PROMPTS)
    assert scores.shape == (3,) and error(scores, expected) < 1e-4
    for images, prompts in ((some_images()[::-1], PROMPTS), (some_images(), PROMPTS[::-1])):
        assert error(rewards.image_reward(model, images, prompts), expected) > 0.1  # both count
    alone = torch.cat([rewards.image_reward(model, [image], [prompt]) for image, prompt in zip(some_images(), PROMPTS)])
    assert torch.allclose(alone, scores, atol=1e-4 * float(scores.abs().max()))
    with pytest.raises(ValueError, match="3 pictures, 'a lake'"):
        rewards.image_reward(model, some_images(), "a lake")


def test_a_converted_pickle_gives_the_same_rewards(written, tmp_path, capsys):
    assert rewards.main(["convert", str(written[0] / "ImageReward.pt"), str(tmp_path / "ImageReward.safetensors")]) == 0
    shutil.copy(written[0] / "tokenizer.json", tmp_path)
    before, after = (rewards.load_image_reward(folder, image=IMAGE, text=TEXT) for folder in (written[0], tmp_path))
    assert all(torch.equal(a, b) for a, b in zip(before.state_dict().values(), after.state_dict().values()))
    again = rewards.load_image_reward(tmp_path / "ImageReward.safetensors", image=IMAGE, text=TEXT)
    assert torch.equal(again.mlp[7].weight, after.mlp[7].weight)
    assert rewards.main(["convert", str(written[0] / "ImageReward.pt"), str(tmp_path / "x.pt")]) == 2
    assert "ends in .safetensors" in capsys.readouterr().err


def test_full_size_names_shapes_and_counts_are_those_of_the_published_models():
    with torch.device("meta"):
        ours, theirs = rewards.ImageReward(), blip(rewards.IMAGE, rewards.TEXT)
        hps = clip.CLIP(clip.PICKSCORE_TEXT, clip.PICKSCORE_VISION)
    expected = {name: tuple(tensor.shape) for name, tensor in published(*theirs).items()}
    assert weights.shapes(ours.views()) == expected
    assert weights.count_parameters(ours) == sum(map(weights.count_parameters, theirs))
    assert weights.count_parameters(hps) == sum(t.numel() for [t] in rewards.open_clip_views(hps).values()) == 986_109_441


# ---------------------------------------------------------------------------------------------------------------------
# HPSv2.1


def open_clip_tensors(model):
    """The tensors of transformers' CLIPModel as open_clip names, fuses and turns them."""
    state, tensors = model.state_dict(), {"logit_scale": model.logit_scale.data}
    for prefix, home in (("text_model", ""), ("vision_model", "visual.")):
        blocks = {name.split(".")[3] for name in state if name.startswith(f"{prefix}.encoder.layers")}
        for i in blocks:
            theirs, ours = f"{prefix}.encoder.layers.{i}", f"{home}transformer.resblocks.{i}"
            for kind in ("weight", "bias"):
                qkv = [state[f"{theirs}.self_attn.{part}_proj.{kind}"] for part in "qkv"]
                tensors[f"{ours}.attn.in_proj_{kind}"] = torch.cat(qkv)
                for old, new in (("self_attn.out_proj", "attn.out_proj"), ("layer_norm1", "ln_1"), ("layer_norm2", "ln_2"),
                                 ("mlp.fc1", "mlp.c_fc"), ("mlp.fc2", "mlp.c_proj")):
                    tensors[f"{ours}.{new}.{kind}"] = state[f"{theirs}.{old}.{kind}"]
    for old, new in (("text_model.embeddings.token_embedding.weight", "token_embedding.weight"),
                     ("text_model.embeddings.position_embedding.weight", "positional_embedding"),
                     ("vision_model.embeddings.class_embedding", "visual.class_embedding"),
                     ("vision_model.embeddings.position_embedding.weight", "visual.positional_embedding"),
                     ("vision_model.embeddings.patch_embedding.weight", "visual.conv1.weight"),
                     *((f"{old}.{kind}", f"{new}.{kind}") for kind in ("weight", "bias") for old, new in (
                         ("text_model.final_layer_norm", "ln_final"), ("vision_model.pre_layrnorm", "visual.ln_pre"),
                         ("vision_model.post_layernorm", "visual.ln_post")))):
        tensors[new] = state[old]
    tensors["text_projection"] = state["text_projection.weight"].T
    tensors["visual.proj"] = state["visual_projection.weight"].T
    return tensors


@pytest.fixture(scope="module")
def preference(tmp_path_factory):
    """(folder with a random HPS_v2.1_compressed.pt, its CLIPModel, its CLIPProcessor, sizes of text and picture)."""
    folder, model, processor = random_clip(tmp_path_factory.mktemp("hps"))
    torch.save({"epoch": 1, "state_dict": open_clip_tensors(model)}, folder / "HPS_v2.1_compressed.pt")
    raw = model.config.to_dict()
    sizes = (clip.tower_config(clip.TextConfig, raw["text_config"], folder),
             clip.tower_config(clip.VisionConfig, raw["vision_config"], folder))
    return folder, model, processor, sizes


@torch.no_grad()
def test_the_score_is_the_cosine_of_the_same_clip_under_transformers_names(preference):
    folder, theirs, processor, sizes = preference
    images, prompts = [noise((32, 32), seed=i) for i in range(3)], ["a lake", "storm horses", "dark morning"]
    ours = rewards.load_hps(folder, text=sizes[0], vision=sizes[1])
    inputs = processor(text=prompts, images=images, return_tensors="pt", padding=True)
    logits = theirs(**inputs).logits_per_image.diag()
    scores = rewards.hps_score(ours, images, prompts)
    assert error(scores, logits / theirs.logit_scale.exp()) < 1e-4 and float(scores.std()) > 0.01
    with pytest.raises(ValueError, match="3 pictures, 2"):
        rewards.hps_score(ours, images, prompts[:2])


@pytest.mark.parametrize("size", [(100, 40), (40, 100), (300, 1), (20, 17), (32, 31)], ids=str)
def test_a_picture_is_read_whole_between_black_bars(size):
    image = noise(size)
    pixels = rewards.letterbox([image], clip.ImageConfig(32, (0.0,) * 3, (1.0,) * 3))
    width, height = (max(1, round(side * 32 / max(size))) for side in size)
    left, top = (32 - width) // 2, (32 - height) // 2
    expected = np.zeros((3, 32, 32), np.float32)
    for band, own in zip(image.split(), expected):  # Pillow in float has the same bicubic kernel
        own[top:top + height, left:left + width] = band.convert("F").resize((width, height), Image.Resampling.BICUBIC)
    assert pixels.shape == (1, 3, 32, 32) and float((pixels[0] - torch.tensor(expected) / 255).abs().max()) < 1e-4


def test_both_models_are_read_from_a_single_file_of_another_name(preference, written, tmp_path):
    for folder, name in ((preference[0], "HPS_v2.1_compressed.pt"), (written[0], "ImageReward.pt")):
        shutil.copytree(folder, tmp_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.safetensors", name))
        shutil.copy(folder / name, tmp_path / f"my_{name}")
        if name.startswith("HPS"):
            ours = rewards.load_hps(tmp_path / f"my_{name}", text=preference[3][0], vision=preference[3][1])
            assert torch.equal(ours.vision.visual_projection.weight, preference[1].visual_projection.weight)
    ours = rewards.load_image_reward(tmp_path / "my_ImageReward.pt", image=IMAGE, text=TEXT)
    assert torch.equal(ours.visual_encoder.cls_token, written[1][0].embeddings.class_embedding)


# ---------------------------------------------------------------------------------------------------------------------
# Bad input


class Malice:
    def __reduce__(self):
        return print, ("run",)


@pytest.mark.parametrize("change, message", [
    ({"mlp.layers.7.bias": None}, "1 tensors do not fit this model: missing mlp.layers.7.bias"),
    ({"mlp.layers.0.weight": torch.zeros(2, 24)}, r"\[2, 24\], expected \[1024, 24\]"),
    ({"lora_A": torch.zeros(1)}, "unexpected 'lora_A'"), ({"odd": Malice()}, "not a file of plain tensors"),
    (None, "no ImageReward.pt in it")])
def test_files_that_are_not_image_reward_are_one_line(written, tmp_path, capsys, change, message):
    shutil.copy(written[0] / "tokenizer.json", tmp_path)
    if change is not None:
        tensors = torch.load(written[0] / "ImageReward.pt") | change
        torch.save({name: tensor for name, tensor in tensors.items() if tensor is not None}, tmp_path / "ImageReward.pt")
    with pytest.raises(UserError, match=message) as caught:
        rewards.load_image_reward(tmp_path, image=IMAGE, text=TEXT)
    assert "\n" not in str(caught.value) and "run" not in capsys.readouterr().out.split()


def test_another_clip_and_a_tokenizer_with_more_words_are_refused(preference, written, tmp_path):
    folder, model, _, sizes = preference
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    torch.save(model.state_dict(), tmp_path / "HPS_v2.1_compressed.pt")  # under transformers' names
    with pytest.raises(UserError, match="missing logit_scale|missing token_embedding.weight"):
        rewards.load_hps(tmp_path, text=sizes[0], vision=sizes[1])
    few = clip.TextConfig(24, 2, 3, 48, vocab_size=9, max_position_embeddings=40)
    with pytest.raises(UserError, match="the model only 9"):
        rewards.load_image_reward(written[0], image=IMAGE, text=few)
