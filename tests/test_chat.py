"""What Qwen2.5-VL reads, against transformers' pixels, tiktoken's tokens and the published template."""

import base64
import dataclasses
import importlib.util
import json
import random
import unicodedata
from pathlib import Path
from types import SimpleNamespace

import jinja2
import numpy as np
import pytest
import tiktoken
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tokenizers import pre_tokenizers
from transformers import AutoProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.processing_utils import ProcessorMixin

import qwen_vl
from parts import chat, layouts

SYSTEM = {"role": "system", "content": "You look at pictures."}


def small_tokenizer():
    """Bytes, a few merges, Qwen's special tokens."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ġ", "t"), ("h", "e"), ("Ġt", "he"), ("i", "n"), ("a", "n")]
    vocab = {t: i for i, t in enumerate([*letters, *map("".join, merges)])}
    return chat.byte_bpe(vocab, merges)


@pytest.fixture
def processor():
    tokenizer = small_tokenizer()
    image = chat.ImageConfig(max_pixels=28 * 28 * 100)
    return chat.Processor(tokenizer, image, tokenizer.token_to_id("<|image_pad|>"))


def config_of(folder):
    return qwen_vl.QwenVLConfig(**layouts.qwen_fields(folder))


def config_for(processor):
    return qwen_vl.QwenVLConfig(image_token=processor.image_token)


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


# --------------------------------------------------------------------------------------------------
# Pictures


@pytest.mark.parametrize("width, height", [(56, 1000), (1000, 56), (500, 333), (28, 28), (13, 200), (301, 299), (1, 1)])
@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA"])
def test_pixels_and_grid_equal_the_reference_processor(width, height, mode):
    image = picture(width, height, mode=mode)
    expected = Qwen2VLImageProcessorPil(max_pixels=28 * 28 * 100)([image], return_tensors="pt")
    patches, grid = chat.image_patches(image, chat.ImageConfig(max_pixels=28 * 28 * 100))
    assert expected["image_grid_thw"].tolist() == [list(grid)]
    torch.testing.assert_close(patches, expected["pixel_values"], atol=1e-5, rtol=0)


@given(st.integers(1, 5000), st.integers(1, 5000))
def test_smart_resize_keeps_to_its_bounds(height, width):
    if max(height, width) > 200 * min(height, width):
        with pytest.raises(ValueError, match="200 times"):
            chat.smart_resize(height, width, 28, 56 * 56, 28 * 28 * 1280)
        return
    tall, wide = chat.smart_resize(height, width, 28, 56 * 56, 28 * 28 * 1280)
    assert tall % 28 == wide % 28 == 0 and tall * wide >= 56 * 56
    assert tall * wide <= 28 * 28 * 1280 or min(tall, wide) == 28


# --------------------------------------------------------------------------------------------------
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
    return chat.byte_bpe(*files)


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
        yield " ".join(rng.choice((*chat.SPECIAL, *words[:20], "\n")) for _ in range(rng.randrange(1, 20)))


def test_tokenization_equals_tiktokens_on_the_published_vocabulary(ranks, published):
    special = {token: len(ranks) + i for i, token in enumerate(chat.SPECIAL)}
    theirs = tiktoken.Encoding("qwen", pat_str=chat.WORDS, mergeable_ranks=ranks, special_tokens=special)
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
    assert len(ranks) == 151_643 and len(chat.SPECIAL) == 22 and published.get_vocab_size() == 151_665
    for token, number in (("<|endoftext|>", 151_643), ("<|im_start|>", 151_644), ("<|im_end|>", 151_645),
                          ("<|vision_start|>", 151_652), ("<|vision_end|>", 151_653), ("<|image_pad|>", 151_655),
                          ("<|video_pad|>", 151_656), ("</tool_call>", 151_658), ("<|file_sep|>", 151_664)):
        assert published.token_to_id(token) == number and published.encode(token).ids == [number]
    assert [published.token_to_id(token) for token in chat.SPECIAL] == list(range(151_643, 151_665))
    assert chat.IMAGE_TOKEN == 151_655


def test_an_answers_text_leaves_out_what_is_published_as_special_and_only_that(published):
    kept = published.decode(published.encode("".join(("a", *chat.SPECIAL, "b"))).ids, skip_special_tokens=True)
    assert kept == "".join(("a", *chat.SPECIAL[14:], "b"))  # tool calls and the marks of code files are ordinary


def test_vocabulary_and_merges_read_to_the_tokens_of_the_one_file_form(tmp_path, files, published):
    vocab, merges = files
    one, three = tmp_path / "one", tmp_path / "three"
    one.mkdir(), three.mkdir()
    published.save(str(one / "tokenizer.json"))
    added = {i: {"content": t, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False,
                 "special": i < 151_657} for i, t in enumerate(chat.SPECIAL, 151_643)}
    (three / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added}))
    (three / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False))
    (three / "merges.txt").write_text("\n".join(("#version: 0.2", *map(" ".join, merges))) + "\n")
    first, second = chat.read_tokenizer(one), chat.read_tokenizer(three)
    assert first.get_vocab() == second.get_vocab() == published.get_vocab()
    sample = list(strings())[::5]
    ids = [encoding.ids for encoding in published.encode_batch(sample)]
    assert [e.ids for e in first.encode_batch(sample)] == [e.ids for e in second.encode_batch(sample)] == ids
    assert first.decode_batch(ids) == second.decode_batch(ids) == published.decode_batch(ids)


# --------------------------------------------------------------------------------------------------
# Chat template


@pytest.mark.parametrize("messages, expected", [
    ([{"role": "user", "content": "Hi"}],
     "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"),
    ([SYSTEM, {"role": "user", "content": "Hi"}],
     "<|im_start|>system\nYou look at pictures.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"),
    (ask("See ", picture(9, 9), " and", picture(9, 9), "?"),
     "<|im_start|>system\nYou look at pictures.<|im_end|>\n<|im_start|>user\nSee <|vision_start|><|image_pad|><|vision_end|>"
     " and<|vision_start|><|image_pad|><|vision_end|>?<|im_end|>\n<|im_start|>assistant\n"),
    ([SYSTEM, {"role": "user", "content": "Hi"}, {"role": "assistant", "content": [{"type": "text", "text": "Yes"}]}],
     "<|im_start|>system\nYou look at pictures.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
     "<|im_start|>assistant\nYes<|im_end|>\n<|im_start|>assistant\n"),
    ([], "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>assistant\n"),
], ids=["default system message", "own system message", "pictures", "earlier answers", "empty"])
def test_a_conversation_is_written_as_published(messages, expected):
    assert chat.chat_text(messages) == expected


@pytest.mark.parametrize("message", [
    {"role": "judge", "content": "Hi"}, {"content": "Hi"}, {"role": "user", "content": None}, {"role": "user"},
    {"role": "user", "content": "a <|image_pad|>"}, {"role": "user", "content": [{"type": "text", "text": "<|image_pad|>"}]},
    {"role": "user", "content": [{"type": "video", "video": "a.mp4"}]}, {"role": "user", "content": [{"type": "text"}]},
    {"role": "user", "content": [{"type": "text", "text": None}]}, {"role": "user", "content": ["Hi"]},
    {"role": "user", "content": [{"type": "image"}]}, {"role": "user", "content": [{"type": "image", "image": "a.png"}]}])
def test_malformed_messages_are_refused(processor, message):
    for read in (chat.chat_text, processor):
        with pytest.raises(ValueError, match="message"):
            read([message])


def test_a_picture_becomes_as_many_tokens_as_it_has_merged_patches(processor):
    prompt = processor(CONVERSATIONS["several pictures"])
    assert int((prompt.ids == processor.image_token).sum()) == sum(h * w // 4 for _, h, w in prompt.grids)
    assert prompt.pixels.shape == (sum(h * w for _, h, w in prompt.grids), 3 * 2 * 14 * 14)
    marks = [processor.tokenizer.token_to_id(f"<|vision_{end}|>") for end in ("start", "end")]
    bare = [i for i in prompt.ids.tolist() if i != processor.image_token]
    assert bare == processor.tokenizer.encode(chat.chat_text(
        CONVERSATIONS["several pictures"]).replace("<|image_pad|>", "")).ids and bare.count(marks[0]) == 3


# --------------------------------------------------------------------------------------------------
# Folders that other programs read

JUDGE = Path("tiny/weights/judge")


@pytest.fixture
def no_films(monkeypatch):
    """AutoProcessor without its processor of films, which alone wants torchvision; a judge sees none."""
    whole = ProcessorMixin.check_argument_for_proper_class
    monkeypatch.setattr("transformers.models.auto.video_processing_auto.AutoVideoProcessor",
                        SimpleNamespace(from_pretrained=lambda *_, **__: None))
    monkeypatch.setattr(ProcessorMixin, "check_argument_for_proper_class",
                        lambda self, name, value: name == "video_processor" or whole(self, name, value))


def same_for_transformers(folder, processor, messages):
    theirs = AutoProcessor.from_pretrained(folder)
    text = theirs.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert text == chat.chat_text(messages)
    assert chat.chat_text(messages) == theirs.apply_chat_template(messages, tokenize=False) + "<|im_start|>assistant\n"
    inputs = theirs.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True,
                                        return_tensors="pt")
    prompt = processor(messages)
    assert inputs["input_ids"].tolist() == [prompt.ids.tolist()]
    assert [tuple(grid) for grid in inputs.get("image_grid_thw", torch.empty(0, 3)).tolist()] == list(prompt.grids)
    if prompt.grids:
        torch.testing.assert_close(inputs["pixel_values"], prompt.pixels, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_transformers_reads_the_miniature_judges_conversations_as_we_do(no_films, name):
    same_for_transformers(JUDGE, chat.Processor.from_pretrained(JUDGE, config_of(JUDGE)), CONVERSATIONS[name])


def test_a_processor_made_here_is_written_for_transformers_too(no_films, processor, tmp_path):
    processor.save_pretrained(tmp_path)
    same_for_transformers(tmp_path, processor, CONVERSATIONS["several messages"])


@pytest.mark.parametrize("newer", [False, True])
def test_the_files_of_its_folder_are_carried_over_but_for_the_settings_of_pictures(processor, tmp_path, newer):
    source, out = tmp_path / "source", tmp_path / "out"
    processor.save_pretrained(source)
    own = {"chat_template.jinja": "{{ messages[0].content }}", "merges.txt": "#version: 0.2",
           "video_preprocessor_config.json": "{}", "generation_config.json": '{"eos_token_id": 3, "top_k": 5}',
           "tokenizer_config.json": '{"model_max_length": 9}'}
    for name, text in own.items():
        (source / name).write_text(text)
    raw = {"size": {"shortest_edge": 3136, "longest_edge": 78400}, "patch_size": 14, "resample": 3}
    (source / "preprocessor_config.json").unlink()
    file = "processor_config.json" if newer else "preprocessor_config.json"
    (source / file).write_text(json.dumps({"image_processor": raw} if newer else raw))
    read = chat.Processor.from_pretrained(source, config_for(processor))
    read.image = dataclasses.replace(read.image, max_pixels=50_000)
    read.save_pretrained(out)
    assert {path.name for path in out.iterdir()} == {*own, file, "tokenizer.json"}
    assert all((out / name).read_text() == text for name, text in own.items())
    written = json.loads((out / file).read_text())
    written = written["image_processor"] if newer else written
    assert written["resample"] == 3 and written["max_pixels"] == 50_000 and "size" not in written
    again = chat.Processor.from_pretrained(out, config_for(processor))
    assert again.image == read.image and again.stop == (3,)


def test_a_template_in_the_tokenizers_configuration_is_not_doubled(processor, tmp_path):
    processor.save_pretrained(tmp_path / "source")
    (tmp_path / "source" / "chat_template.jinja").unlink()
    (tmp_path / "source" / "tokenizer_config.json").write_text('{"chat_template": "x"}')
    chat.Processor.from_pretrained(tmp_path / "source", config_for(processor)).save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out" / "chat_template.jinja").exists()


def test_the_template_refuses_what_is_neither_text_nor_picture(no_films):
    with pytest.raises(jinja2.TemplateError, match="a text or an image"):
        AutoProcessor.from_pretrained(JUDGE).apply_chat_template(
            [{"role": "user", "content": [{"type": "film", "film": "a.mp4"}]}], tokenize=False)
