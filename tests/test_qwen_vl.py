"""Qwen2.5-VL against transformers on random weights: pixels, positions, logits, greedy tokens; tokenization against tiktoken."""

import gzip
import importlib.metadata
import importlib.util
import json
import random
import string
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import tiktoken
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tokenizers import pre_tokenizers
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

import qwen_vl
import weights

SYSTEM = {"role": "system", "content": "You look at pictures."}


def small_tokenizer():
    """Bytes, a few merges, Qwen's special tokens."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ġ", "t"), ("h", "e"), ("Ġt", "he"), ("i", "n"), ("a", "n")]
    vocab = {t: i for i, t in enumerate([*letters, *map("".join, merges)])}
    return qwen_vl.byte_bpe(vocab, merges)


def random_reference(folder, tied=False, seed=0, **vision):
    """A small Qwen2.5-VL with lively random weights, written to `folder` by transformers."""
    tokenizer = small_tokenizer()
    ids = {f"{name}_token_id": tokenizer.token_to_id(f"<|{token}|>") for name, token in (
        ("image", "image_pad"), ("video", "video_pad"), ("vision_start", "vision_start"), ("vision_end", "vision_end"))}
    torch.manual_seed(seed)
    model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(
        text_config={"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
                     "intermediate_size": 96, "vocab_size": 320, "rms_norm_eps": 1e-6, "bos_token_id": None,
                     "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e6},
                     "eos_token_id": None},
        vision_config={"depth": 3, "hidden_size": 48, "intermediate_size": 76, "num_heads": 3, "out_hidden_size": 64,
                       "fullatt_block_indexes": [1], **vision},
        tie_word_embeddings=tied, **ids)).eval()
    for p in model.parameters():
        p.data = torch.randn(p.shape) * (p[0].numel() ** -0.5 if p.dim() > 1 else 0.2) + (p.dim() == 1) * 0.8
    if tied:
        model.tie_weights()
    model.save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    Qwen2VLImageProcessorPil(max_pixels=28 * 28 * 100).save_pretrained(folder)
    return model


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("qwen")
    return random_reference(folder), qwen_vl.QwenVL.from_pretrained(folder)


def picture(width, height, seed=0, mode="RGB"):
    rng = np.random.default_rng([seed, width, height])
    coarse = Image.fromarray(rng.integers(0, 256, (9, 9, 3), dtype=np.uint8))
    return coarse.resize((width, height), Image.Resampling.BICUBIC).convert(mode)


def ask(*parts, system=True):
    content = [{"type": "image", "image": p} if isinstance(p, Image.Image) else {"type": "text", "text": p} for p in parts]
    return [SYSTEM] * system + [{"role": "user", "content": content}]


CONVERSATIONS = {
    "no picture": ask("What is in the tin?"),
    "one picture": ask(picture(120, 90), "Rate it."),
    "small picture": ask(picture(20, 33), "And this?", system=False),
    "wide": ask(picture(1000, 56), "the end"),
    "tall": ask("Before", picture(56, 1000)),
    "odd": ask(picture(500, 333), "Why?"),
    "several pictures": ask(picture(100, 60), "against", picture(60, 180, 1), picture(84, 84, 2), "Which is better?"),
    "several messages": [*ask(picture(90, 90), "Hello the"), {"role": "assistant", "content": "An inn."},
                         *ask("And", picture(140, 70, 3), system=False), {"role": "assistant", "content": "Yes."},
                         *ask("then", system=False)],
}


# ---------------------------------------------------------------------------------------------------------------------
# Pictures


@pytest.mark.parametrize("width, height", [(56, 1000), (1000, 56), (500, 333), (28, 28), (13, 200), (301, 299), (1, 1)])
@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA"])
def test_pixels_and_grid_equal_the_reference_processor(width, height, mode):
    image = picture(width, height, mode=mode)
    expected = Qwen2VLImageProcessorPil(max_pixels=28 * 28 * 100)([image], return_tensors="pt")
    patches, grid = qwen_vl.image_patches(image, qwen_vl.ImageConfig(max_pixels=28 * 28 * 100))
    assert expected["image_grid_thw"].tolist() == [list(grid)]
    torch.testing.assert_close(patches, expected["pixel_values"], atol=1e-5, rtol=0)


@given(st.integers(1, 5000), st.integers(1, 5000))
def test_smart_resize_keeps_to_its_bounds(height, width):
    if max(height, width) > 200 * min(height, width):
        with pytest.raises(ValueError, match="200 times"):
            qwen_vl.smart_resize(height, width, 28, 56 * 56, 28 * 28 * 1280)
        return
    tall, wide = qwen_vl.smart_resize(height, width, 28, 56 * 56, 28 * 28 * 1280)
    assert tall % 28 == wide % 28 == 0 and tall * wide >= 56 * 56
    assert tall * wide <= 28 * 28 * 1280 or min(tall, wide) == 28


# ---------------------------------------------------------------------------------------------------------------------
# Positions, logits, tokens


def reference_inputs(model, prompts):
    """Right-padded ids, mask, token types and pictures as transformers wants them."""
    ids = torch.nn.utils.rnn.pad_sequence([p.ids for p in prompts], batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(p.ids) for p in prompts], batch_first=True)
    grids = [grid for p in prompts for grid in p.grids]
    inputs = {"input_ids": ids, "attention_mask": mask, "mm_token_type_ids": (ids == model.config.image_token_id).int()}
    if grids:
        inputs |= {"pixel_values": torch.cat([p.pixels for p in prompts]), "image_grid_thw": torch.tensor(grids)}
    return inputs


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_positions_equal_transformers(pair, name):
    theirs, ours = pair
    prompt = ours.processor(CONVERSATIONS[name])
    inputs = reference_inputs(theirs, [prompt])
    expected, _ = theirs.model.get_rope_index(inputs["input_ids"], inputs["mm_token_type_ids"],
                                              inputs.get("image_grid_thw"), attention_mask=inputs["attention_mask"])
    assert torch.equal(qwen_vl.position_ids(prompt.ids, prompt.grids, ours.config), expected[:, 0])


@torch.no_grad()
@pytest.mark.parametrize("name", CONVERSATIONS)
def test_logits_equal_transformers(pair, name):
    theirs, ours = pair
    inputs = reference_inputs(theirs, [ours.processor(CONVERSATIONS[name])])
    expected = theirs(**inputs).logits
    found = ours(inputs["input_ids"], inputs.get("pixel_values"), inputs.get("image_grid_thw"))
    assert float((found - expected).norm() / expected.norm()) < 1e-5
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_batch_of_unequal_lengths_gives_the_logits_of_its_rows(pair):
    theirs, ours = pair
    prompts = [ours.processor(conversation) for conversation in CONVERSATIONS.values()]
    inputs = reference_inputs(theirs, prompts)
    batch = ours(inputs["input_ids"], inputs["pixel_values"], inputs["image_grid_thw"], inputs["attention_mask"])
    expected = theirs(**inputs).logits
    kept = inputs["attention_mask"].bool()
    torch.testing.assert_close(batch[kept], expected[kept], atol=1e-4, rtol=1e-4)
    assert not batch[~kept].any()


def greedy(model, prompts, tokens):
    """transformers' greedy tokens of each prompt, one by one: [P] lists."""
    out = []
    for prompt in prompts:
        inputs = reference_inputs(model, [prompt])
        ids = model.generate(**inputs, max_new_tokens=tokens, do_sample=False, eos_token_id=None, pad_token_id=0)
        out.append(ids[0, len(prompt.ids):].tolist())
    return out


def test_greedy_tokens_equal_transformers_for_all_kinds_of_conversations_at_once(pair):
    theirs, ours = pair
    prompts = [ours.processor(conversation) for conversation in CONVERSATIONS.values()]
    expected = greedy(theirs, prompts, 24)
    ours.processor.stop, stop = (-1,), ours.processor.stop
    together = ours.generate(prompts, max_new_tokens=24, temperature=0)
    alone = [ours.generate([p], n=2, max_new_tokens=24, temperature=0)[0] for p in prompts]
    ours.processor.stop = stop
    assert [c[0].tokens.tolist() for c in together] == expected
    assert [c[1].tokens.tolist() for c in alone] == expected


def test_greedy_tokens_equal_transformers_with_a_tied_head_and_other_patches(tmp_path):
    theirs = random_reference(tmp_path, tied=True, seed=3, patch_size=16, window_size=64)
    Qwen2VLImageProcessorPil(patch_size=16, min_pixels=64 * 64, max_pixels=256 * 256).save_pretrained(tmp_path)
    ours = qwen_vl.QwenVL.from_pretrained(tmp_path)
    assert ours.head is None and ours.config.window == 64
    prompts = [ours.processor(ask(picture(128, 128), "the")), ours.processor(ask(picture(200, 128), "an inn"))]
    ours.processor.stop = (-1,)
    assert [c[0].tokens.tolist() for c in ours.generate(prompts, max_new_tokens=24, temperature=0)] == greedy(theirs, prompts, 24)
