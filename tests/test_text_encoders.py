"""T5 against transformers, the joined encoders against diffusers, CLIP's tokenization against OpenAI's own."""

import gzip
import importlib.metadata
import importlib.util
import random
import warnings

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from transformers import T5Config, T5EncoderModel

from parts import clip, text_encoders, weights
from parts.cli import UserError
from tests.checkpoint import T5, make_pipeline
from tiny.pretrain import byte_alphabet


@torch.no_grad()
@pytest.mark.parametrize("length", [5, 40, 300])
def test_t5_equals_transformers(tmp_path, length):
    torch.manual_seed(0)
    theirs = T5EncoderModel(T5Config(**T5)).eval()
    theirs.save_pretrained(tmp_path)
    ours = text_encoders.T5Encoder.from_pretrained(tmp_path)
    ids = torch.randint(0, T5["vocab_size"], (2, length))
    expected = theirs(ids).last_hidden_state
    assert float((ours(ids) - expected).norm() / expected.norm()) < 1e-4


@pytest.mark.one_form
def test_full_size_t5_has_the_published_names_shapes_and_count():
    with torch.device("meta"):
        ours = text_encoders.T5Encoder(text_encoders.T5_XXL)
        theirs = T5EncoderModel(T5Config(d_model=4096, num_layers=24, num_heads=64, d_kv=64, d_ff=10240,
                                         vocab_size=32128, feed_forward_proj="gated-gelu"))
    assert weights.count_parameters(ours) == 4_762_310_656
    found = weights.shapes(ours.views())
    expected = {name: tuple(t.shape) for name, t in theirs.state_dict().items()}
    expected.pop("encoder.embed_tokens.weight")  # tied to shared.weight
    assert found == expected


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sd3")
    make_pipeline().save_pretrained(folder)
    return folder


PROMPTS = ["a lake", "", "A LONE tree — café, 42 horses!", "storm " * 90]


@torch.no_grad()
@pytest.mark.parametrize("use_t5", [True, False])
def test_context_and_pooled_equal_diffusers(folder, use_t5):
    parts = {} if use_t5 else {"text_encoder_3": None, "tokenizer_3": None}
    theirs = StableDiffusion3Pipeline.from_pretrained(folder, **parts)
    ours = text_encoders.TextEncoders.from_pretrained(folder, use_t5=use_t5)
    context, _, pooled, _ = theirs.encode_prompt(PROMPTS, None, None, do_classifier_free_guidance=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        our_context, our_pooled = ours.encode(PROMPTS)
    assert our_context.shape == context.shape == (4, 77 + 256, 96)
    assert float((our_context - context).norm() / context.norm()) < 1e-4
    assert float((our_pooled - pooled).norm() / pooled.norm()) < 1e-4


@pytest.mark.one_form
def test_a_long_prompt_is_cut_with_a_warning_that_shows_what_is_lost(folder):
    encoders = text_encoders.TextEncoders.from_pretrained(folder, use_t5=False)
    tokenizer = encoders.tokenizers[0]
    words = [f"storm{'s' * (i % 2)}" for i in range(200)]
    kept = next(n for n in range(200) if len(tokenizer.tokenizer.encode(" ".join(words[:n + 1])).ids) > 77)
    with pytest.warns(UserWarning, match="77 tokens") as caught:
        ids = tokenizer([" ".join(words)])
    assert ids.shape == (1, 77) and ids[0, -1] == tokenizer.tokenizer.token_to_id("<|endoftext|>")
    assert len(caught) == 1 and " ".join(words[kept + 1:]) in str(caught[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tokenizer([" ".join(words[:kept])])


@pytest.mark.one_form
def test_a_folder_without_its_vocabulary_is_refused(folder, tmp_path):
    (tmp_path / "tokenizer_config.json").write_text('{"model_max_length": 77}')
    with pytest.raises(UserError, match="vocab.json"):
        clip.PromptTokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="cannot be read"):
        clip.PromptTokenizer(tmp_path)


# ---------------------------------------------------------------------------------------------------------------------
# CLIP's tokenization


@pytest.fixture(scope="module")
def openai():
    """OpenAI's simple_tokenizer.py, loaded by file: its package imports torchvision."""
    path = next(f.locate() for f in importlib.metadata.files("openai-clip") if f.name == "simple_tokenizer.py")
    spec = importlib.util.spec_from_file_location("simple_tokenizer", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def published(openai):
    """Our tokenizer over CLIP's real vocabulary, written the way the published vocab.json and merges.txt are."""
    lines = gzip.open(openai.default_bpe()).read().decode("utf-8").split("\n")[1:49152 - 256 - 2 + 1]
    merges = [tuple(line.split()) for line in lines]
    return clip.clip_tokenizer(openai.SimpleTokenizer().encoder, merges)


def strings():
    """1,648 strings of many kinds: prompts, scripts, emoji, code, punctuation, spacing, long and empty ones."""
    rng = random.Random(0)
    words = ("a painting of the old lighthouse, misty morning; it's vivid & bright! don't we'll I'd they've 3.14 1,000 x² "
             "HDR 4k (8k) café naïve Ångström façade señor Zürich über smørrebrød Łódź İstanbul ΑΒΓΔ σοφός привет мир "
             "שלום سلام नमस्ते สวัสดี 你好世界 こんにちは 안녕하세요 🌄 🌧️ 👨‍👩‍👧 🏳️‍🌈 ❤️ 🇯🇵 → ∑ ½ €5 #tag @user snake_case "
             "CamelCase http://x.org/?q=1 C++ f(x)={a} \n <b> [0] ~ ^ | ` … – — “quoted” ‘single’ ™ ® © °").split()
    yield from ("", " ", "\n\t ", "a", "!", "'", "''", "'s", "it's", "<|startoftext|>", "a <|endoftext|> b",
                "\u00a0x\u3000y")
    yield from words
    for n in (1, 2, 3, 5, 8, 13, 40):
        for _ in range(120):
            yield rng.choice((" ", "", "  ", ", ")).join(rng.choice(words) for _ in range(n))
    ranges = ((0x20, 0x7F), (0xA1, 0x250), (0x370, 0x400), (0x400, 0x500), (0x5D0, 0x5EB), (0x620, 0x650), (0x900, 0x980),
              (0x3041, 0x3097), (0x4E00, 0x5000), (0xAC00, 0xAD00), (0x1F300, 0x1F650), (0x2190, 0x2300))
    for low, high in ranges:
        for _ in range(60):
            yield "".join(chr(rng.randrange(low, high)) for _ in range(rng.randrange(1, 30)))
    yield "the quick brown fox " * 2000


@pytest.mark.one_form
def test_clip_tokenization_equals_openais_on_their_vocabulary(openai, published):
    theirs, compared, different = openai.SimpleTokenizer(), 0, []
    for text in strings():
        # Two known differences, both also of the tokenizers published with SD3.5: they leave out the repair of broken
        # encodings and HTML, and lower-case letter by letter, which knows no Greek final sigma
        text = openai.basic_clean(text).replace("Σ", "σ")
        compared += 1
        ours = published.encode(text).ids
        expected = [49406, *theirs.encode(text), 49407]
        if ours != expected:
            different.append((text, ours, expected))
    assert compared == 1648
    assert not different, (len(different), different[:5])


@pytest.mark.one_form
def test_the_byte_alphabet_is_clips(openai):
    assert byte_alphabet() == list(openai.bytes_to_unicode().values())
