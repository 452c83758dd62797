"""Qwen2.5-VL against transformers on random weights: positions, logits, tokens, files."""

import contextlib
import copy
import json
from types import SimpleNamespace

import numpy as np
import peft
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoTokenizer, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

import qwen_vl
from kernels import graphs
from kernels.inverse_cdf import inverse_cdf
from parts import chat, layouts, lora, ops, weights
from parts.cli import UserError
from parts.files import read_json, write_json
from tests.test_chat import CONVERSATIONS, ask, picture, small_tokenizer


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


# --------------------------------------------------------------------------------------------------
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


@pytest.mark.one_form
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
    assert ours.lm_head is None and ours.config.window == 64
    prompts = [ours.processor(ask(picture(128, 128), "the")), ours.processor(ask(picture(200, 128), "an inn"))]
    ours.processor.stop = (-1,)
    found = ours.generate(prompts, max_new_tokens=24, temperature=0)
    assert [c[0].tokens.tolist() for c in found] == greedy(theirs, prompts, 24)


@torch.no_grad()
def test_a_pictures_features_do_not_depend_on_the_pictures_beside_it(pair):
    visual = pair[1].visual
    pictures = [chat.image_patches(picture(w, h), chat.ImageConfig())
                for w, h in ((300, 200), (60, 60), (112, 224), (60, 60), (333, 90))]
    together = visual(torch.cat([p for p, _ in pictures]), [grid for _, grid in pictures])
    alone = [visual(patches, [grid]) for patches, grid in pictures]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-5, rtol=1e-5)


@pytest.mark.one_form
def test_pictures_that_do_not_belong_to_the_tokens_are_refused(pair):
    _, ours = pair
    prompt = ours.processor(CONVERSATIONS["one picture"])
    positions = qwen_vl.position_ids(prompt.ids, prompt.grids, ours.config)
    patches, grid = chat.image_patches(picture(60, 60), ours.processor.image)
    many, grids = chat.image_patches(picture(600, 600), chat.ImageConfig())
    with pytest.raises(ValueError, match="image tokens for pictures that need"):
        ours.trunk(qwen_vl.Sequences([len(prompt.ids)]), prompt.ids, positions, many, (grids,))
    for grids in ((), (grid,)):  # fewer than the tokens ask for
        with pytest.raises(ValueError, match="do not belong"):
            ours(prompt.ids[None], patches, grids)
        with pytest.raises(ValueError, match="do not belong"):
            ours.generate([chat.Prompt(prompt.ids, patches, grids)], max_new_tokens=1)


# --------------------------------------------------------------------------------------------------
# Generation


def test_log_probabilities_of_an_answer_are_those_of_the_whole_sequence(pair):
    _, ours = pair
    prompts = [ours.processor(CONVERSATIONS[name]) for name in ("odd", "no picture", "several pictures")]
    for temperature in (1.0, 0.7, 1.3):
        answers = ours.generate(prompts, n=2, max_new_tokens=10, temperature=temperature,
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


@pytest.mark.one_form
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
        out = ours.generate(conversations, n=3, max_new_tokens=8, generator=torch.Generator().manual_seed(3))
        return [a for group in out for a in group]

    expected, recordings = answers(), []
    if recorded:
        monkeypatch.setattr(ops, "can_record", lambda module: ops.FUSED)  # CPU tensors, too
        monkeypatch.setattr(graphs, "as_graph", graphs.record)
        stream = SimpleNamespace(wait_stream=lambda other: None)
        stand_ins = {"Stream": lambda: stream, "current_stream": lambda: stream, "CUDAGraph": Recording,
                     "stream": lambda stream: contextlib.nullcontext(), "graph": lambda recording: recording}
        for name, stand_in in stand_ins.items():
            monkeypatch.setattr(torch.cuda, name, stand_in)
        replay = Recording.replay
        monkeypatch.setattr(Recording, "replay", lambda self: recordings.append(self) or replay(self))
    for a, b in zip(expected, answers(), strict=True):
        assert torch.equal(a.tokens, b.tokens) and a.text == b.text
        torch.testing.assert_close(a.log_probs, b.log_probs, rtol=1e-4, atol=1e-5)
    recorded = recorded and ops.FUSED
    assert len(recordings) == (max(len(a.tokens) for a in expected) - 1 if recorded else 0)
    assert len({id(recording) for recording in recordings}) == recorded  # one for all steps


@pytest.mark.one_form
@pytest.mark.parametrize("wrong", [{"n": 0}, {"temperature": -0.1}, {"max_new_tokens": 0}])
def test_settings_out_of_range_are_refused(pair, wrong):
    with pytest.raises(ValueError, match="expected n >= 1"):
        pair[1].generate([CONVERSATIONS["no picture"]], **wrong)


LOGITS = torch.tensor([1.5, -2.0, 0.0, 1.0, 3.0, -0.5, 2.5])


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_are_drawn_as_often_as_their_probability_says(temperature):
    uniforms = torch.rand(20_000, generator=torch.Generator().manual_seed(1))
    token, log_prob = qwen_vl.sample(LOGITS.expand(20_000, -1), temperature, uniforms)
    expected = (LOGITS.double() / temperature).softmax(-1)
    torch.testing.assert_close(log_prob, expected.log()[token].float(), atol=1e-5, rtol=0)
    frequency = token.bincount(minlength=7) / 20_000
    deviation = (expected * (1 - expected) / 20_000).sqrt()
    assert bool(((frequency - expected).abs() <= 4 * deviation).all())


def test_temperature_zero_takes_the_likeliest_token_whatever_the_uniform_number():
    uniforms = torch.tensor([0.0, 0.5, 0.99999994])
    token, log_prob = qwen_vl.sample(LOGITS.expand(3, -1), 0, uniforms)
    assert token.tolist() == [4, 4, 4]
    torch.testing.assert_close(log_prob, LOGITS.log_softmax(-1)[4].expand(3))


@pytest.mark.one_form
@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=40).filter(any), st.integers(0, 2**10 - 1), st.integers(1, 9))
def test_the_index_of_a_share_is_where_the_running_sum_exceeds_it(mass, share, block):
    """Small integers and a share in 1024ths, whose sums and products are exact."""
    rows = torch.tensor([mass, mass[::-1]], dtype=torch.float32)
    uniforms = torch.tensor([share, share]) / 2**10
    for found in (qwen_vl.inverse_cdf.plain(rows, uniforms), inverse_cdf(rows, uniforms, block)):
        for row, index in zip(rows, found, strict=True):
            exceeded = row.cumsum(0) > share / 2**10 * row.sum()
            assert index == int(exceeded.nonzero()[0]) and row[index] > 0


@pytest.mark.one_form
def test_a_token_without_probability_is_never_drawn_however_sums_are_rounded():
    mass = torch.rand(200, 1000, generator=torch.Generator().manual_seed(0)) ** 40
    mass[:, ::2] = 0
    mass[:, -300:] = 0
    for uniform in (0.0, 0.3, 0.99999994):
        uniforms = torch.full((200,), uniform)
        for found in (qwen_vl.inverse_cdf.plain(mass, uniforms), inverse_cdf(mass, uniforms, 7)):
            assert (mass.gather(1, found[:, None]) > 0).all()


@settings(max_examples=300, deadline=None)
@given(st.lists(st.one_of(st.integers(-40, 40).map(lambda i: i / 4), st.sampled_from([-1e9, -1e4, 1e4, -np.inf])),
                min_size=1, max_size=30).filter(lambda logits: max(logits) > -np.inf),
       st.sampled_from([0.25, 0.7, 1.0, 1.5]),
       st.one_of(st.sampled_from([0.0, 0.99999994]), st.floats(0, 1 - 2**-24, width=32)))
def test_a_sampled_token_has_a_probability_above_zero(logits, temperature, uniform):
    token, log_prob = qwen_vl.sample(torch.tensor([logits]), temperature, torch.tensor([uniform]))
    scores = np.array(logits, np.float64) / temperature
    probs = np.exp(scores - scores.max())
    probs /= probs.sum()
    assert probs[int(token)] > 0 and np.isfinite(float(log_prob))
    assert abs(float(log_prob) - np.log(probs[int(token)])) < 1e-3


# --------------------------------------------------------------------------------------------------
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


@pytest.mark.parametrize("trained", ["all", "language"])
def test_checkpointing_recomputes_what_is_trained_and_changes_no_bit_of_a_gradient(pair, trained, monkeypatch):
    model = copy.deepcopy(pair[1]).requires_grad_(True)
    model.visual.requires_grad_(trained == "all")
    prompts = [model.processor(CONVERSATIONS[name]) for name in ("one picture", "several pictures")]
    completions = torch.randint(model.config.image_token, (2, 2, 5), generator=torch.Generator().manual_seed(0))
    recomputed, plain = [], qwen_vl.checkpoint
    monkeypatch.setattr(qwen_vl, "checkpoint",
                        lambda block, *args, **options: recomputed.append(block) or plain(block, *args, **options))
    gradients = []
    for checkpointing in (False, True):
        model.checkpointing = checkpointing
        model.zero_grad()
        model.completion_hidden(prompts, completions).square().mean().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert recomputed == [*(model.visual.blocks if trained == "all" else ()), *model.model.layers]
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.equal(gradient, gradients[1][name]) for name, gradient in gradients[0].items())


def test_with_checkpointing_the_vision_tower_keeps_little_for_its_backward_pass(pair):
    model = copy.deepcopy(pair[1]).requires_grad_(True)
    prompt = model.processor(CONVERSATIONS["several pictures"])
    own = {p.data_ptr() for p in model.parameters()}

    def kept(checkpointing):
        sizes = {}  # {address: bytes}, as a tensor may be kept twice

        def pack(tensor):
            sizes[tensor.data_ptr()] = tensor.numel() * tensor.itemsize
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            features = model.visual(prompt.pixels, prompt.grids, checkpointing)
        assert features.requires_grad
        return sum(size for address, size in sizes.items() if address not in own)

    assert 0 < kept(True) < kept(False) / 2


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


# --------------------------------------------------------------------------------------------------
# Loading


SIZES = {
    "7B": (qwen_vl.QWEN25_VL_7B, 8_292_166_656, 3584, 28, 28, 4, 18_944, 152_064, False),
    "3B": (qwen_vl.QWEN25_VL_3B, 3_754_622_976, 2048, 36, 16, 2, 11_008, 151_936, True),
}


@pytest.mark.one_form
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
    expected = weights.renamed(theirs.state_dict(), layouts.QWEN_NEWER)
    expected = {name: tuple(t.shape) for name, t in expected.items()}
    if tied:
        expected.pop("lm_head.weight")
    views = layouts.qwen_views(ours)
    assert weights.shapes(views) == expected
    assert list(weights.renamed(views, layouts.QWEN_NEWER)) == list(views)


@pytest.mark.one_form
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
    assert qwen_vl.QwenVLConfig(**layouts.qwen_fields(tmp_path)) == config


def same_weights(one, two):
    one, two = one.state_dict(), two.state_dict()
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.one_form
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
    assert set(newer) != set(layouts.qwen_views(ours))
    save_file(newer, tmp_path / "model.safetensors")
    assert same_weights(qwen_vl.QwenVL.from_pretrained(tmp_path), ours)


@pytest.mark.one_form
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
    for text in (chat.chat_text(CONVERSATIONS["several messages"]), "the inn's 42 cafe\u0301s\r\n\n  in  the 東京 🏳️‍🌈"):
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
    "rope scaling 'yarn' is not supported": lambda f: edit_json(
        f / "config.json", rope_scaling={"type": "yarn", "factor": 4.0, "mrope_section": [2, 3, 3]}, rope_parameters=None),
    "config.json: missing or not a JSON object": lambda f: (f / "config.json").unlink(),
    "its tokenizer cannot be read": lambda f: (f / "tokenizer.json").write_text('{"version": "1.0"}'),
    "vocab.json: missing": lambda f: (f / "tokenizer.json").unlink(),
    "preprocessor_config.json: missing": lambda f: (f / "preprocessor_config.json").unlink(),
    "has no eos_token_id, and its tokenizer no <|im_end|>": lambda f: (
        (f / "generation_config.json").unlink(),
        (f / "tokenizer.json").write_text((f / "tokenizer.json").read_text().replace("<|im_end|>", "<|other|>"))),
    "expected '<|image_pad|>'": lambda f: edit_json(f / "config.json", image_token_id=5),
}


@pytest.mark.one_form
@pytest.mark.parametrize("message", BROKEN)
def test_a_broken_folder_is_refused_in_one_line_that_says_why(pair, tmp_path, message):
    pair[1].save_pretrained(tmp_path)
    BROKEN[message](tmp_path)
    with pytest.raises(UserError) as caught:
        qwen_vl.QwenVL.from_pretrained(tmp_path)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.one_form
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
