"""Qwen2.5-VL against transformers on random weights: pixels, positions, logits, tokens; tokenization against tiktoken."""

import base64
import contextlib
import copy
import importlib.util
import json
import random
import unicodedata
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import peft
import pytest
import tiktoken
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import pre_tokenizers
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoTokenizer, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

import qwen_vl
from parts import lora, ops, weights
from parts.cli import UserError
from parts.files import read_json, write_json

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
    found = ours.generate(prompts, max_new_tokens=24, temperature=0)
    assert [c[0].tokens.tolist() for c in found] == greedy(theirs, prompts, 24)


@torch.no_grad()
def test_a_pictures_features_do_not_depend_on_the_pictures_beside_it(pair):
    visual = pair[1].visual
    pictures = [qwen_vl.image_patches(picture(w, h), qwen_vl.ImageConfig())
                for w, h in ((300, 200), (60, 60), (112, 224), (60, 60), (333, 90))]
    together = visual(torch.cat([p for p, _ in pictures]), [grid for _, grid in pictures])
    alone = [visual(patches, [grid]) for patches, grid in pictures]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-5, rtol=1e-5)


def test_pictures_that_do_not_belong_to_the_tokens_are_refused(pair):
    _, ours = pair
    prompt = ours.processor(CONVERSATIONS["one picture"])
    positions = qwen_vl.position_ids(prompt.ids, prompt.grids, ours.config)
    patches, grid = qwen_vl.image_patches(picture(60, 60), ours.processor.image)
    with pytest.raises(ValueError, match="image tokens for pictures that need"):
        ours.trunk(prompt.ids, positions, qwen_vl.Sequences([len(prompt.ids)]), patches, (grid,))
    for grids in ((), (grid,)):  # fewer than the tokens ask for
        with pytest.raises(ValueError, match="do not belong"):
            ours(prompt.ids[None], patches, grids)
        with pytest.raises(ValueError, match="do not belong"):
            ours.generate([qwen_vl.Prompt(prompt.ids, patches, grids)], max_new_tokens=1)


# ---------------------------------------------------------------------------------------------------------------------
# Generation


def test_log_probabilities_of_an_answer_are_those_of_the_whole_sequence(pair):
    _, ours = pair
    prompts = [ours.processor(CONVERSATIONS[name]) for name in ("odd", "no picture", "several pictures")]
    for temperature, top_p in ((1.0, 1.0), (0.7, 1.0), (1.3, 0.6)):
        answers = ours.generate(prompts, n=2, max_new_tokens=10, temperature=temperature, top_p=top_p,
                                generator=torch.Generator().manual_seed(0))
        for prompt, group in zip(prompts, answers, strict=True):
            for answer in group:
                assert ours.config.image_token not in answer.tokens  # whole sequences would expect a picture
                with torch.no_grad():
                    logits = ours(torch.cat([prompt.ids, answer.tokens])[None], prompt.pixels, prompt.grids)[0]
                expected = (logits[len(prompt.ids) - 1:-1] / temperature).log_softmax(-1)
                expected = expected.gather(1, answer.tokens[:, None])[:, 0]
                torch.testing.assert_close(answer.log_probs, expected, atol=1e-4, rtol=0)


def sampled(ours, names, seeds, **settings):
    """Tokens of the answers to some of CONVERSATIONS: P lists of n lists."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    answers = ours.generate([CONVERSATIONS[name] for name in names], generator=generators, max_new_tokens=12, **settings)
    return [[answer.tokens.tolist() for answer in group] for group in answers]


def test_the_same_seed_gives_the_same_answers(pair):
    _, ours = pair
    first, second, other = (ours.generate([CONVERSATIONS["odd"], CONVERSATIONS["no picture"]], n=2, max_new_tokens=12,
                                          generator=torch.Generator().manual_seed(seed)) for seed in (5, 5, 6))
    tokens = [[a.tokens.tolist() for group in answers for a in group] for answers in (first, second, other)]
    assert tokens[0] == tokens[1] != tokens[2]
    assert [a.text for a in first[0]] == [a.text for a in second[0]]


def test_answers_do_not_depend_on_the_other_conversations(pair):
    _, ours = pair
    wide, text, several = sampled(ours, ["wide", "no picture", "several pictures"], [1, 2, 3], n=3)
    assert sampled(ours, ["several pictures", "wide"], [3, 1], n=3) == [several, wide]
    assert sampled(ours, ["no picture"], [2], n=3) == [text]


def test_answers_to_one_question_differ_and_the_first_do_not_depend_on_how_many_are_asked_for(pair):
    _, ours = pair
    answers = sampled(ours, ["one picture"], [4], n=5)[0]
    assert len({tuple(tokens) for tokens in answers}) == 5
    assert sampled(ours, ["one picture"], [4], n=2)[0] == answers[:2]


@pytest.mark.parametrize("conversations, count", [(2, 1), (2, 3), (1, 2)])
def test_a_list_of_generators_must_have_one_for_each_conversation(pair, conversations, count):
    with pytest.raises(ValueError, match="generator"):
        sampled(pair[1], ["no picture", "wide"][:conversations], range(count))


def test_answers_stop_independently_and_end_with_their_stop_token(pair, monkeypatch):
    _, ours = pair
    monkeypatch.setattr(ours.processor, "stop", (-1,))
    whole = sampled(ours, ["no picture", "one picture"], [0, 1], n=6)
    stop = tuple(range(60, 100))
    monkeypatch.setattr(ours.processor, "stop", stop)
    answers = ours.generate([CONVERSATIONS["no picture"], CONVERSATIONS["one picture"]], n=6, max_new_tokens=12,
                            generator=[torch.Generator().manual_seed(seed) for seed in (0, 1)])
    lengths = set()
    for tokens, answer in zip((t for group in whole for t in group), (a for group in answers for a in group), strict=True):
        end = next((i + 1 for i, token in enumerate(tokens) if token in stop), None)
        assert answer.finished == (end is not None)
        assert answer.tokens.tolist() == tokens[:end] and len(answer.log_probs) == len(answer.tokens)
        assert answer.text == ours.processor.decode(tokens[:12 if end is None else end - 1])
        lengths.add((len(answer.tokens), answer.finished))
    assert len(lengths) > 3 and (12, False) in lengths


def test_generation_ends_when_the_last_answer_has_ended(pair, monkeypatch):
    _, ours = pair
    monkeypatch.setattr(ours.processor, "stop", tuple(range(320)))
    steps = []
    ours.generate([CONVERSATIONS["no picture"]], n=2, max_new_tokens=9, progress=lambda r: (steps.append(i) or i for i in r))
    assert steps == [0]


class Recording(TorchDispatchMode):
    """A CUDA graph as a CPU can have it: the operations of one call, made again on the same tensors."""

    def __init__(self):
        super().__init__()
        self.operations = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.operations.append((function, args, kwargs or {}, out))
        return out

    def replay(self):
        with torch.no_grad():
            for function, args, kwargs, out in self.operations:
                new = function(*args, **kwargs)
                for mine, fresh in zip(*(x if isinstance(x, (tuple, list)) else (x,) for x in (out, new))):
                    if isinstance(mine, torch.Tensor) and mine.data_ptr() != fresh.data_ptr():
                        mine.copy_(fresh)


@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("names", [["one picture"], ["no picture", "one picture"]])
def test_generation_by_a_graph_gives_the_same_answers(pair, names, recorded, monkeypatch):
    _, ours = pair
    conversations = [CONVERSATIONS[name] for name in names]

    def answers():
        out = ours.generate(conversations, n=3, max_new_tokens=8, top_p=0.9, generator=torch.Generator().manual_seed(3))
        return [a for group in out for a in group]

    expected, recordings = answers(), []
    if recorded:
        monkeypatch.setattr(ops, "has_graphs", lambda x: True)
        stream = SimpleNamespace(wait_stream=lambda other: None)
        stand_ins = {"Stream": lambda: stream, "current_stream": lambda: stream, "CUDAGraph": Recording,
                     "stream": lambda stream: contextlib.nullcontext(), "graph": lambda recording: recording}
        for name, stand_in in stand_ins.items():
            monkeypatch.setattr(torch.cuda, name, stand_in)
        replay = Recording.replay
        monkeypatch.setattr(Recording, "replay", lambda self: recordings.append(self) or replay(self))
    monkeypatch.setattr(ours, "graphs", True)
    for a, b in zip(expected, answers(), strict=True):
        assert torch.equal(a.tokens, b.tokens) and a.text == b.text
        torch.testing.assert_close(a.log_probs, b.log_probs, rtol=1e-4, atol=1e-5)
    assert len(recordings) == (max(len(a.tokens) for a in expected) - 1 if recorded else 0)
    assert len({id(recording) for recording in recordings}) == recorded  # one recording for all steps


@pytest.mark.parametrize("wrong", [{"n": 0}, {"temperature": -0.1}, {"top_p": 0}, {"top_p": 1.1}, {"max_new_tokens": 0}])
def test_settings_out_of_range_are_refused(pair, wrong):
    with pytest.raises(ValueError, match="expected n >= 1"):
        pair[1].generate([CONVERSATIONS["no picture"]], **wrong)


LOGITS = torch.tensor([1.5, -2.0, 0.0, 1.0, 3.0, -0.5, 2.5])


@pytest.mark.parametrize("top_p", [1.0, 0.8])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_are_drawn_as_often_as_their_probability_says(temperature, top_p):
    luck = torch.rand(20_000, generator=torch.Generator().manual_seed(1))
    token, log_prob = qwen_vl.sample(LOGITS.expand(20_000, -1), temperature, top_p, luck)
    expected = (LOGITS.double() / temperature).softmax(-1)
    torch.testing.assert_close(log_prob, expected.log()[token].float(), atol=1e-5, rtol=0)
    if top_p < 1:
        likely, places = expected.sort(descending=True)
        count = int((likely.cumsum(0) < top_p).sum()) + 1  # the fewest that reach top_p
        expected = torch.zeros(7).double().scatter(0, places[:count], likely[:count] / likely[:count].sum())
        assert 1 <= count < 7
    frequency = token.bincount(minlength=7) / 20_000
    assert not frequency[expected == 0].any()
    assert bool(((frequency - expected).abs() <= 4 * (expected * (1 - expected) / 20_000).sqrt() + 1e-9).all())


def test_temperature_zero_takes_the_likeliest_token_whatever_the_luck():
    token, log_prob = qwen_vl.sample(LOGITS.expand(3, -1), 0, 1.0, torch.tensor([0.0, 0.5, 0.99999994]))
    assert token.tolist() == [4, 4, 4]
    torch.testing.assert_close(log_prob, LOGITS.log_softmax(-1)[4].expand(3))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=40).filter(any), st.integers(0, 2**10 - 1), st.integers(1, 9))
def test_the_place_of_a_share_is_that_of_the_whole_running_sum(mass, share, block):
    """Small integers and a share in 1024ths, whose sums and products are exact."""
    rows, luck = torch.tensor([mass, mass[::-1]], dtype=torch.float32), torch.tensor([[share], [share]]) / 2**10
    places = qwen_vl.place_of(rows, luck, block)
    for row, place in zip(rows, places[:, 0]):
        assert place == int((row.cumsum(0) > share / 2**10 * row.sum()).nonzero()[0]) and row[place] > 0


def test_a_token_without_probability_is_never_drawn_however_sums_are_rounded():
    mass = torch.rand(200, 1000, generator=torch.Generator().manual_seed(0)) ** 40
    mass[:, ::2] = 0
    mass[:, -300:] = 0
    for luck in (0.0, 0.3, 0.99999994):
        assert (mass.gather(1, qwen_vl.place_of(mass, torch.full((200, 1), luck), 7)) > 0).all()


@settings(max_examples=300, deadline=None)
@given(st.lists(st.one_of(st.integers(-40, 40).map(lambda i: i / 4), st.sampled_from([-1e9, -1e4, 1e4, -np.inf])),
                min_size=1, max_size=30).filter(lambda logits: max(logits) > -np.inf),
       st.sampled_from([0.25, 0.7, 1.0, 1.5]), st.one_of(st.just(1.0), st.floats(1e-3, 1.0)),
       st.one_of(st.sampled_from([0.0, 0.99999994]), st.floats(0, 1, exclude_max=True, width=32)))
def test_a_sampled_token_lies_in_the_nucleus(logits, temperature, top_p, luck):
    token, log_prob = qwen_vl.sample(torch.tensor([logits]), temperature, top_p, torch.tensor([luck]))
    scores = np.array(logits, np.float64) / temperature
    probs = np.exp(scores - scores.max())
    probs /= probs.sum()
    order = np.argsort(-probs, kind="stable")
    before = np.cumsum(probs[order]) - probs[order]  # the mass of all likelier ones
    nucleus = order[(before < top_p + 1e-5) & (probs[order] > 0)]  # a hair more: ours adds in float32
    assert int(token) in nucleus
    assert abs(float(log_prob) - np.log(probs[int(token)])) < 1e-3


# ---------------------------------------------------------------------------------------------------------------------
# Training


def group_hidden(model, prompts, completions):
    """Logits [P,G,C,V] by one pass over each prompt."""
    return F.linear(model.completion_hidden(prompts, completions), model.head_weight)


def group_plain(model, prompts, completions):
    """Logits [P,G,C,V] by one pass over each whole sequence."""
    C = completions.shape[2]
    return torch.stack([torch.stack([
        model(torch.cat([prompt.ids, completion])[None], prompt.pixels, prompt.grids)[0, -C - 1:-1]
        for completion in group]) for prompt, group in zip(prompts, completions, strict=True)])


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("C", [1, 2, 7])
def test_one_pass_over_a_prompt_gives_the_logits_and_gradients_of_whole_sequences(pair, C, checkpointing):
    model = copy.deepcopy(pair[1]).requires_grad_(True)
    names = ("no picture", "one picture", "one picture", "several pictures")
    prompts = [model.processor(CONVERSATIONS[name]) for name in names]
    generator = torch.Generator().manual_seed(C)
    completions = torch.randint(model.config.image_token, (4, 3, C), generator=generator)
    upstream = torch.randn(4, 3, C, model.config.vocab, generator=generator) / 50
    logits, grads = {}, {}
    for path in (group_plain, group_hidden):
        model.checkpointing = checkpointing and path is group_hidden
        model.zero_grad()
        out = path(model, prompts, completions)
        (out * upstream).sum().backward()
        logits[path], grads[path] = out.detach(), {name: p.grad for name, p in model.named_parameters()}
    torch.testing.assert_close(logits[group_hidden], logits[group_plain], atol=1e-4, rtol=1e-4)
    for name, expected in grads[group_plain].items():
        assert float((grads[group_hidden][name] - expected).norm()) < 1e-4 * float(expected.norm()), name


@torch.no_grad()
def test_an_answer_may_contain_an_image_token_that_is_no_picture(pair):
    _, ours = pair
    prompts = [ours.processor(CONVERSATIONS[name]) for name in ("one picture", "no picture")]
    completions = torch.randint(ours.config.image_token, (2, 2, 5), generator=torch.Generator().manual_seed(0))
    before = group_hidden(ours, prompts, completions)
    completions[0, 1, 2] = completions[1, 0, 3] = ours.config.image_token
    after = group_hidden(ours, prompts, completions)
    same = torch.ones(2, 2, 5, dtype=torch.bool)
    same[0, 1, 3:] = same[1, 0, 4:] = False  # what follows it
    torch.testing.assert_close(after[same], before[same], atol=1e-5, rtol=1e-5)
    assert bool(((after - before).abs().amax(-1)[~same] > 1e-3).all())


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizer


@pytest.fixture(scope="module")
def ranks():
    """{bytes: id} of Qwen's published vocabulary, as the Python package of its cloud service carries it."""
    folder = Path(importlib.util.find_spec("dashscope").submodule_search_locations[0])
    lines = (folder / "resources" / "qwen.tiktoken").read_bytes().splitlines()
    return {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, lines)}


def halves(token, ranks):
    """The two parts that byte-pair encoding joins last."""
    parts = [token[i:i + 1] for i in range(len(token))]
    while len(parts) > 2:
        at = min(range(len(parts) - 1), key=lambda i: ranks.get(parts[i] + parts[i + 1], len(ranks)))
        assert ranks[parts[at] + parts[at + 1]] < ranks[token]
        parts[at:at + 2] = [parts[at] + parts[at + 1]]
    return parts


@pytest.fixture(scope="module")
def files(ranks):
    """(vocab, merges) as in the published vocab.json and merges.txt."""
    alphabet = set(pre_tokenizers.ByteLevel.alphabet())
    own = {ord(c): c for c in alphabet if ord(c) < 256}  # a printable byte stands for itself
    letters = own | dict(zip(sorted(set(range(256)) - set(own)), sorted(alphabet - set(own.values())), strict=True))
    spell = {token: "".join(letters[b] for b in token) for token in ranks}
    merges = [tuple(spell[part] for part in halves(token, ranks)) for token in ranks if len(token) > 1]
    return {spell[token]: rank for token, rank in ranks.items()}, merges


@pytest.fixture(scope="module")
def published(files):
    return qwen_vl.byte_bpe(*files)


def strings():
    """2,466 strings of many kinds: scripts, code, emoji, marks, numbers, spacing, contractions, long and empty ones."""
    rng = random.Random(0)
    words = ("a picture of the old lighthouse, misty morning; it's vivid & bright! don't we'll I'd they've I'm you're "
             "IT'S DON'T WE'LL I'D THEY'VE I'M YOU'RE ''s 'tis 'ſ o'clock 3.14 1,000 20250101 0xFF 1e-5 x² ½ Ⅷ ١٢٣ HDR 4k "
             "(8k) café cafe\u0301 naïve Ångström A\u030angstro\u0308m façade Zürich Łódź İstanbul ΑΒΓΔ σοφός привет мир "
             "שָׁלוֹם سلامٌ नमस्ते สวัสดี ខ្មែរ 你好世界 這是圖片 こんにちは か\u3099 カタカナ 안녕하세요 \u1112\u1161\u11ab 🌄 🌧️ "
             "👨\u200d👩\u200d👧 👩🏽\u200d🚀 🏳\ufe0f\u200d🌈 ❤\ufe0f 🇯🇵 1\ufe0f⃣ → ∑ €5 #tag @user snake_case CamelCase "
             "http://x.org/?q=1 C++ f(x)={a} def\u00a0f(self): if(x!=y){return&z;} <b>&amp;</b> [0] ~ ^ | ` … – — “quoted” "
             "‘single’ ™ ® © ° %20 \\n $x_1^2$ z\u0351\u036b\u0343 <|im_end <im_end|> |>").split(" ")
    spaces = (" ", "", "  ", "\n", "\r\n", "\t", "\n\n", " \n", ", ", "   ", "\u3000", "\r")
    yield from ("", " ", "\n\t ", "a", "!", "'", "\r\n" * 5, "\t" * 9 + "x", " " * 200, "\n" * 40 + "x", "x" * 3000,
                "\u00a0x\u3000y", "\x00\x1f\x7f\x85\u2028", "\ufeffx", "\U0010ffff", "0123456789" * 30,
                "the quick brown fox " * 2000, "日本語" * 1000)
    yield from words
    for n in (1, 2, 3, 5, 8, 13, 40):
        for _ in range(120):
            yield "".join(rng.choice(words) + rng.choice(spaces) for _ in range(n))
    for _ in range(300):
        yield "".join(rng.choice(spaces) for _ in range(rng.randrange(1, 9))) + rng.choice(words) + rng.choice(spaces)
    ranges = ((0x20, 0x7F), (0xA1, 0x250), (0x300, 0x370), (0x370, 0x400), (0x400, 0x500), (0x5D0, 0x5EB), (0x620, 0x650),
              (0x900, 0x980), (0xE01, 0xE3B), (0x1100, 0x1200), (0x1E00, 0x1F00), (0x2000, 0x2070), (0x3041, 0x3097),
              (0x4E00, 0x5000), (0xAC00, 0xAD00), (0x1F300, 0x1F650), (0x2190, 0x2300), (0x20000, 0x20100))
    for low, high in ranges:
        for _ in range(60):
            yield "".join(chr(rng.randrange(low, high)) for _ in range(rng.randrange(1, 30)))
    for _ in range(120):
        yield " ".join(rng.choice((*qwen_vl.SPECIAL, *words[:20], "\n")) for _ in range(rng.randrange(1, 20)))


def test_tokenization_equals_tiktokens_on_the_published_vocabulary(ranks, published):
    special = {token: len(ranks) + i for i, token in enumerate(qwen_vl.SPECIAL)}
    theirs = tiktoken.Encoding("qwen", pat_str=qwen_vl.WORDS, mergeable_ranks=ranks, special_tokens=special)
    compared, different = 0, []
    for text in strings():
        compared += 1
        normal = unicodedata.normalize("NFC", text)  # Qwen's own code does so before it calls tiktoken
        ours, expected = published.encode(text).ids, theirs.encode(normal, allowed_special="all")
        if ours != expected or published.decode(ours, skip_special_tokens=False) != normal:
            different.append((text, ours, expected))
    assert compared == 2466
    assert not different, (len(different), different[:5])


def test_special_tokens_have_the_published_ids(ranks, published):
    assert len(ranks) == 151_643 and len(qwen_vl.SPECIAL) == 22 and published.get_vocab_size() == 151_665
    for token, number in (("<|endoftext|>", 151_643), ("<|im_start|>", 151_644), ("<|im_end|>", 151_645),
                          ("<|vision_start|>", 151_652), ("<|vision_end|>", 151_653), ("<|image_pad|>", 151_655),
                          ("<|video_pad|>", 151_656), ("</tool_call>", 151_658), ("<|file_sep|>", 151_664)):
        assert published.token_to_id(token) == number and published.encode(token).ids == [number]
    assert [published.token_to_id(token) for token in qwen_vl.SPECIAL] == list(range(151_643, 151_665))
    assert qwen_vl.QWEN25_VL_7B.image_token == 151_655


def test_an_answers_text_leaves_out_what_is_published_as_special_and_only_that(published):
    kept = published.decode(published.encode("".join(("a", *qwen_vl.SPECIAL, "b"))).ids, skip_special_tokens=True)
    assert kept == "".join(("a", *qwen_vl.SPECIAL[14:], "b"))  # tool calls and the marks of code files are ordinary


def test_vocabulary_and_merges_read_to_the_tokens_of_the_one_file_form(tmp_path, files, published):
    vocab, merges = files
    one, three = tmp_path / "one", tmp_path / "three"
    one.mkdir(), three.mkdir()
    published.save(str(one / "tokenizer.json"))
    added = {i: {"content": t, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False,
                 "special": i < 151_657} for i, t in enumerate(qwen_vl.SPECIAL, 151_643)}
    (three / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added}))
    (three / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False))
    (three / "merges.txt").write_text("\n".join(("#version: 0.2", *map(" ".join, merges))) + "\n")
    first, second = qwen_vl.read_tokenizer(one), qwen_vl.read_tokenizer(three)
    assert first.get_vocab() == second.get_vocab() == published.get_vocab()
    sample = list(strings())[::5]
    ids = [encoding.ids for encoding in published.encode_batch(sample)]
    assert [e.ids for e in first.encode_batch(sample)] == [e.ids for e in second.encode_batch(sample)] == ids
    assert first.decode_batch(ids) == second.decode_batch(ids) == published.decode_batch(ids)


# ---------------------------------------------------------------------------------------------------------------------
# Chat template


@pytest.mark.parametrize("messages, answer, expected", [
    ([{"role": "user", "content": "Hi"}], True,
     "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"),
    ([SYSTEM, {"role": "user", "content": "Hi"}], True,
     "<|im_start|>system\nYou look at pictures.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"),
    (ask("See ", picture(9, 9), " and", picture(9, 9), "?"), True,
     "<|im_start|>system\nYou look at pictures.<|im_end|>\n<|im_start|>user\nSee <|vision_start|><|image_pad|><|vision_end|>"
     " and<|vision_start|><|image_pad|><|vision_end|>?<|im_end|>\n<|im_start|>assistant\n"),
    ([SYSTEM, {"role": "user", "content": "Hi"}, {"role": "assistant", "content": [{"type": "text", "text": "Yes"}]}], False,
     "<|im_start|>system\nYou look at pictures.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
     "<|im_start|>assistant\nYes<|im_end|>\n"),
    ([], False, "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"),
], ids=["default system message", "own system message", "pictures", "whole conversation", "empty"])
def test_a_conversation_is_written_as_published(messages, answer, expected):
    assert qwen_vl.chat_text(messages, answer) == expected


@pytest.mark.parametrize("message", [
    {"role": "judge", "content": "Hi"}, {"content": "Hi"}, {"role": "user", "content": None}, {"role": "user"},
    {"role": "user", "content": "a <|image_pad|>"}, {"role": "user", "content": [{"type": "text", "text": "<|image_pad|>"}]},
    {"role": "user", "content": [{"type": "video", "video": "a.mp4"}]}, {"role": "user", "content": [{"type": "text"}]},
    {"role": "user", "content": [{"type": "text", "text": None}]}, {"role": "user", "content": ["Hi"]},
    {"role": "user", "content": [{"type": "image"}]}, {"role": "user", "content": [{"type": "image", "image": "a.png"}]}])
def test_malformed_messages_are_refused(pair, message):
    for read in (qwen_vl.chat_text, pair[1].processor):
        with pytest.raises(ValueError, match="message"):
            read([message])


def test_a_picture_becomes_as_many_tokens_as_it_has_merged_patches(pair):
    processor = pair[1].processor
    prompt = processor(CONVERSATIONS["several pictures"])
    assert int((prompt.ids == processor.image_token).sum()) == sum(h * w // 4 for _, h, w in prompt.grids)
    assert prompt.pixels.shape == (sum(h * w for _, h, w in prompt.grids), 3 * 2 * 14 * 14)
    marks = [processor.tokenizer.token_to_id(f"<|vision_{end}|>") for end in ("start", "end")]
    bare = [i for i in prompt.ids.tolist() if i != processor.image_token]
    assert bare == processor.tokenizer.encode(qwen_vl.chat_text(
        CONVERSATIONS["several pictures"]).replace("<|image_pad|>", "")).ids and bare.count(marks[0]) == 3


# ---------------------------------------------------------------------------------------------------------------------
# Loading


SIZES = {
    "7B": (qwen_vl.QWEN25_VL_7B, 8_292_166_656, 3584, 28, 28, 4, 18_944, 152_064, False),
    "3B": (qwen_vl.QWEN25_VL_3B, 3_754_622_976, 2048, 36, 16, 2, 11_008, 151_936, True),
}


@pytest.mark.parametrize("size", SIZES)
def test_full_size_models_have_the_published_names_shapes_and_counts(size):
    config, count, width, layers, heads, kv_heads, mlp, vocab, tied = SIZES[size]
    with torch.device("meta"):
        ours = qwen_vl.QwenVL(config)
        theirs = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(
            text_config={"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads,
                         "num_key_value_heads": kv_heads, "intermediate_size": mlp, "vocab_size": vocab},
            vision_config={"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "window_size": 112,
                           "fullatt_block_indexes": [7, 15, 23, 31], "out_hidden_size": width}, tie_word_embeddings=tied))
    assert weights.count_parameters(ours) == count
    expected = {qwen_vl.published_name(name): tuple(t.shape) for name, t in theirs.state_dict().items()}
    if tied:
        expected.pop("lm_head.weight")
    found = weights.shapes(ours.views())
    assert found == expected
    assert all(qwen_vl.published_name(name) == name for name in (*found, "lm_head.weight"))


@pytest.mark.parametrize("size", SIZES)
def test_the_published_configurations_are_read(tmp_path, size):
    config, _, width, layers, heads, kv_heads, mlp, vocab, tied = SIZES[size]
    (tmp_path / "config.json").write_text(json.dumps({
        "architectures": ["Qwen2_5_VLForConditionalGeneration"], "attention_dropout": 0.0, "bos_token_id": 151643,
        "eos_token_id": 151645, "vision_start_token_id": 151652, "vision_end_token_id": 151653, "vision_token_id": 151654,
        "image_token_id": 151655, "video_token_id": 151656, "hidden_act": "silu", "hidden_size": width,
        "initializer_range": 0.02, "intermediate_size": mlp, "max_position_embeddings": 128000, "max_window_layers": 28,
        "model_type": "qwen2_5_vl", "num_attention_heads": heads, "num_hidden_layers": layers,
        "num_key_value_heads": kv_heads, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "sliding_window": 32768,
        "tie_word_embeddings": tied, "torch_dtype": "bfloat16", "transformers_version": "4.41.2", "use_cache": True,
        "use_sliding_window": False, "vision_config": {
            "depth": 32, "hidden_act": "silu", "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16,
            "in_chans": 3, "out_hidden_size": width, "patch_size": 14, "spatial_merge_size": 2, "spatial_patch_size": 14,
            "window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31], "tokens_per_second": 2, "temporal_patch_size": 2},
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}, "vocab_size": vocab}))
    assert qwen_vl.read_config(tmp_path) == config


def same_weights(one, two):
    one, two = one.state_dict(), two.state_dict()
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_the_newer_naming_scheme_loads_to_the_same_weights(pair, tmp_path):
    _, ours = pair
    ours.save_pretrained(tmp_path)
    newer = {}
    for name, tensor in load_file(tmp_path / "model.safetensors").items():
        if name.startswith("visual."):
            name = f"model.{name}"
        elif name.startswith("model."):
            name = f"model.language_model.{name[6:]}"
        newer[name] = tensor
    assert set(newer) != set(ours.views())
    save_file(newer, tmp_path / "model.safetensors")
    assert same_weights(qwen_vl.QwenVL.from_pretrained(tmp_path), ours)


@torch.no_grad()
@pytest.mark.parametrize("tied", [False, True])
def test_what_we_save_is_read_back_by_us_and_by_transformers(tmp_path, tied):
    theirs, out = random_reference(tmp_path, tied=tied), tmp_path / "out"
    ours = qwen_vl.QwenVL.from_pretrained(tmp_path)
    ours.save_pretrained(out)
    again = qwen_vl.QwenVL.from_pretrained(out)
    assert same_weights(again, ours) and again.config == ours.config
    assert again.processor.image == ours.processor.image and again.processor.stop == ours.processor.stop
    for name in ("odd", "several messages"):
        prompts = [model.processor(CONVERSATIONS[name]) for model in (ours, again)]
        assert torch.equal(prompts[0].ids, prompts[1].ids) and torch.equal(prompts[0].pixels, prompts[1].pixels)
        inputs = reference_inputs(theirs, prompts[:1])
        reread = Qwen2_5_VLForConditionalGeneration.from_pretrained(out).eval()
        torch.testing.assert_close(reread(**inputs).logits, theirs(**inputs).logits, atol=1e-5, rtol=1e-5)
    their_tokenizer = AutoTokenizer.from_pretrained(out)
    for text in (qwen_vl.chat_text(CONVERSATIONS["several messages"]), "the inn's 42 cafe\u0301s\r\n\n  in  the 東京 🏳️‍🌈"):
        assert their_tokenizer(text)["input_ids"] == again.processor.tokenizer.encode(text).ids


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(folder, name, change):
    tensors = load_file(folder / "model.safetensors")
    tensor = change(tensors.pop(name))
    save_file(tensors if tensor is None else tensors | {name: tensor}, folder / "model.safetensors")


BROKEN = {
    "missing model.layers.1.mlp.up_proj.weight [96, 64]":
        lambda f: edit_tensors(f, "model.layers.1.mlp.up_proj.weight", lambda t: None),
    "visual.merger.ln_q.weight is [47], expected [48]":
        lambda f: edit_tensors(f, "visual.merger.ln_q.weight", lambda t: t[:-1].clone()),
    "not a Qwen2.5-VL configuration this file knows (model_type 'qwen2_vl')":
        lambda f: edit_json(f / "config.json", model_type="qwen2_vl"),
    "not a Qwen2.5-VL configuration this file knows ('hidden_size')":
        lambda f: (f / "config.json").write_text('{"model_type": "qwen2_5_vl"}'),
    "use_sliding_window is true": lambda f: edit_json(f / "config.json", use_sliding_window=True),
    "config.json: missing or not a JSON object": lambda f: (f / "config.json").unlink(),
    "its tokenizer cannot be read": lambda f: (f / "tokenizer.json").write_text('{"version": "1.0"}'),
    "vocab.json: missing": lambda f: (f / "tokenizer.json").unlink(),
    "preprocessor_config.json: missing": lambda f: (f / "preprocessor_config.json").unlink(),
    "expected '<|image_pad|>'": lambda f: edit_json(f / "config.json", image_token_id=5),
}


@pytest.mark.parametrize("message", BROKEN)
def test_a_broken_folder_is_refused_in_one_line_that_says_why(pair, tmp_path, message):
    pair[1].save_pretrained(tmp_path)
    BROKEN[message](tmp_path)
    with pytest.raises(UserError) as caught:
        qwen_vl.QwenVL.from_pretrained(tmp_path)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@torch.no_grad()
def test_our_adapter_is_read_by_peft_and_peft_s_by_us(pair, tmp_path):
    theirs, ours = pair[0], copy.deepcopy(pair[1])
    pair[1].save_pretrained(tmp_path / "base")
    lora.add_lora(ours, ours.lora_targets(), 4, 8)
    torch.manual_seed(1)
    for p in ours.parameters():
        if p.requires_grad:
            p.normal_(0, 0.1)
    lora.save_lora(tmp_path / "ours", ours, tmp_path / "base")
    inputs = reference_inputs(theirs, [ours.processor(CONVERSATIONS["odd"])])
    ids, pixels, grids = inputs["input_ids"], inputs["pixel_values"], inputs["image_grid_thw"]
    expected = ours(ids, pixels, grids)
    merged = qwen_vl.QwenVL.from_pretrained(tmp_path / "ours")
    torch.testing.assert_close(merged(ids, pixels, grids), expected, atol=1e-4, rtol=1e-4)
    with_peft = peft.PeftModel.from_pretrained(copy.deepcopy(theirs), tmp_path / "ours").eval()
    torch.testing.assert_close(with_peft(**inputs).logits, expected, atol=1e-4, rtol=1e-4)
    assert float((expected - pair[1](ids, pixels, grids)).abs().max()) > 0.1
    with_peft.save_pretrained(tmp_path / "theirs")
    write_json(tmp_path / "theirs" / "adapter_config.json", {
        **read_json(tmp_path / "theirs" / "adapter_config.json"), "base_model_name_or_path": str(tmp_path / "base")})
    back = qwen_vl.QwenVL.from_pretrained(tmp_path / "theirs")
    torch.testing.assert_close(back(ids, pixels, grids), expected, atol=1e-4, rtol=1e-4)
