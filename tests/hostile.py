"""Files as a stranger could make them, made by code, and what reads them.

Every format has a function that yields (name, content, expected). content: bytes, a text, or a function that fills a
folder. expected: a part of the one line that refuses it; READ if it is a little odd and must be read; EITHER if both are
right, as for what a file leaves out. What can be used after it was read is used (`use`): a configuration that is read and
then breaks the first picture is no better than one that breaks the reader.
"""

import io
import json
import os
import pickle
import struct
import zlib
from dataclasses import replace
from types import SimpleNamespace
from urllib.parse import urlencode

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import load_file, save_file

import data
import feedback
import grpo
import mmdit
import qwen_vl
from evaluation import rate
from parts import chat, checkpoints, clip, files, layouts, lora, page, text_encoders, vae, weights
from parts.files import open_picture, read_json, write_json
from parts.pipeline import TINY, load_generator
from parts.run import Processes, Run
from prepare import captions
from tests.test_lora import TARGETS, Pair, adapted
from tiny import publish

READ = None
REFUSED = ""  # with any reason
EITHER = ...
CLEAR = "\x1b[2J\x1b[31m"  # clears a terminal and makes it write in red
DEEP = 10_000  # of nesting
LONG = "9" * 4000  # digits of a number that no float holds


def nested(depth=DEEP):
    return "[" * depth + "]" * depth


# ---------------------------------------------------------------------------------------------------------------------
# Headers of safetensors


def packed(header, data=b""):
    header = header.encode() if isinstance(header, str) else header
    return struct.pack("<Q", len(header)) + header + data


def tensor(start, end, shape=(2,), dtype="F32"):
    return {"dtype": dtype, "shape": shape if isinstance(shape, (str, dict)) else list(shape), "data_offsets": [start, end]}


def headers():
    """Beside those of test_weights.py, which are wrong in one number."""
    unreadable = "truncated or not a readable safetensors file"
    for name, shape in {"a flag": [True, 2], "fractions": [1.0, 2], "null": [None], "a text": ["2"], "text": "2",
                        "an object": {},
                        "huge": [2**63], "huger": [10**30], "lists": [[2]]}.items():
        yield f"a shape with {name}", packed(json.dumps({"a": tensor(0, 8, shape)}), bytes(8)), unreadable
    for name, dtype in {"number": 7, "null": None, "list": ["F32"], "small": "f32", "clearing": CLEAR}.items():
        yield f"a dtype that is {name}", packed(json.dumps({"a": tensor(0, 8, dtype=dtype)}), bytes(8)), unreadable
    for name, offsets in {"three": [0, 8, 8], "texts": ["0", "8"], "none": [], "null": None, "huge": [0, 2**64],
                          "flags": [False, 8], "an object": {"0": 0}}.items():
        yield f"offsets that are {name}", packed(json.dumps({"a": tensor(0, 8) | {"data_offsets": offsets}}),
                                                 bytes(8)), unreadable
    for size in (1, 100, 10**8 + 1, 2**63, 2**64 - 1):
        yield f"a length of {size} with nothing behind", struct.pack("<Q", size), unreadable
    good = json.dumps({"a": tensor(0, 8)})
    for name, header in {
            "of nothing": "", "of zeros": bytes(8), "not UTF-8": good.encode().replace(b"a", b"\xff"),
            "UTF-16": good.encode("utf-16"),
            "with a mark of the byte order": b"\xef\xbb\xbf" + good.encode(), "nested": '{"a": ' + nested() + "}",
            "nested objects": '{"a":' * DEEP + "1" + "}" * DEEP, "half of a pair": '{"\\ud800": ' + good[6:],
            "text behind": good + "x", "a name of a megabyte": json.dumps({CLEAR * 2**17: tensor(0, 4)}),
            "metadata that is a tensor": json.dumps({"__metadata__": tensor(0, 8)}),
            "metadata with numbers": json.dumps({"__metadata__": {"a": 1}, "a": tensor(0, 8)}),
            "an entry with a key twice": good.replace('"dtype"', '"shape": [8], "dtype"')}.items():
        yield f"a header {name}", packed(header, bytes(8)), unreadable
    yield "zero bytes", b"", unreadable
    many = ",".join(f'"a{i}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}' for i in range(10_000))
    yield "ten thousand tensors", packed("{" + many + "}"), READ
    yield "a header of twenty megabytes", packed('{"__metadata__":{"x":"' + "x" * 2 * 10**7 + '"}}'), "header of 20,000,025 bytes"
    yield "spaces behind a header", packed(good + " " * 999, bytes(8)), READ
    yield "a name that clears the terminal", packed(json.dumps({CLEAR: tensor(0, 8)}), bytes(8)), READ
    yield "no name", packed(json.dumps({"": tensor(0, 8)}), bytes(8)), READ
    yield "a tensor of no dimension beside one of no rows", packed(json.dumps(
        {"a": tensor(0, 4, ()), "b": tensor(4, 4, (0, 2**40))}), bytes(4)), READ
    yield "metadata of any text", packed(json.dumps({"__metadata__": {CLEAR: "\0"}, "a": tensor(0, 8)}), bytes(8)), READ


def read_header(folder):
    """Read, load into memory, and compare with the bytes of the file."""
    file = folder / "x.safetensors"
    entries = weights.index(file)
    content = file.read_bytes()
    data_at = 8 + struct.unpack("<Q", content[:8])[0]
    claimed = json.loads(content[8:data_at])
    claimed.pop("__metadata__", None)
    assert entries.keys() == claimed.keys()
    for name, entry in list(entries.items())[:50]:
        start, end = claimed[name]["data_offsets"]
        assert list(entry.shape) == claimed[name]["shape"] and entry.start == data_at + start
        if max(entry.shape, default=0) > 2**30:  # of no bytes, for another side is 0; no model has it
            continue
        target = torch.empty(entry.shape, dtype=entry.dtype)
        weights.fill({name: [target]}, entries)
        assert target.reshape(-1).view(torch.uint8).numpy().tobytes() == content[data_at + start:data_at + end]


def indexes():
    def folder_of(index, also=lambda folder: None):
        def make(folder):
            for i, name in enumerate("ab", 1):
                save_file({name: torch.zeros(2)}, folder / f"{i}.safetensors")
            content = index if isinstance(index, str) else json.dumps(index)
            (folder / "m.safetensors.index.json").write_text(content, encoding="utf-8")
            also(folder)
        return make

    def mapped(**shards):
        return {"weight_map": {"a": "1.safetensors", "b": "2.safetensors"} | shards}

    whole = mapped()
    yield "two shards", folder_of(whole), READ
    yield "a path before a shard's name", folder_of(mapped(a="../elsewhere/1.safetensors", b="/etc/2.safetensors")), READ
    for name, shard in {"no name": "", "a dot": ".", "the folder above": "..", "a slash": "/", "a zero byte": "1\0",
                        "half of a pair": "\ud800", "a name too long": "x" * 300, "the index": "m.safetensors.index.json",
                        "clearing": CLEAR, "a device": "/dev/zero", "none that is there": "3.safetensors"}.items():
        yield f"a shard that is {name}", folder_of(mapped(a=shard)), "m.safetensors.index.json"
    for name, shard in {"a list": ["1.safetensors"], "a flag": True, "an object": {}, "a number": 1e400}.items():
        yield f"a shard that is {name}", folder_of(mapped(a=shard)), "m.safetensors.index.json"
    for name, content in {"nested": '{"weight_map": ' + nested() + "}", "a huge number": '{"weight_map": ' + LONG * 2 + "}",
                          "not JSON": "{", "null": {"weight_map": None}, "UTF-16": "\ufeff", "a list": []}.items():
        yield f"an index that is {name}", folder_of(content), "m.safetensors.index.json"
    yield "a tensor in the other shard", folder_of(mapped(a="2.safetensors",
                                                          b="1.safetensors")), "which its index says is in"
    yield "a shard that is a folder", folder_of(mapped(a="3"),
                                                lambda folder: (folder / "3").mkdir()), "m.safetensors.index.json"
    yield "an index that leads to a device", folder_of("{}", lambda folder: relink(
        folder / "m.safetensors.index.json", "/dev/zero")), "m.safetensors.index.json"
    yield "a shard that leads to itself", folder_of(whole, lambda folder: relink(folder / "1.safetensors",
                                                                                 "1.safetensors")), "1.safetensors"
    yield "a shard that leads to a device", folder_of(whole, lambda folder: relink(folder / "1.safetensors",
                                                                                   "/dev/zero")), "1.safetensors"


def relink(path, target):
    path.unlink(missing_ok=True)
    path.symlink_to(target)


def read_index(folder):
    entries = weights.index(folder)
    assert set(entries) == {"a", "b"}
    weights.load({name: [torch.ones(2)] for name in entries}, entries, folder)


# ---------------------------------------------------------------------------------------------------------------------
# Configurations of every model, in a pipeline of small ones

PARTS = ("transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer", "tokenizer_2", "scheduler")
WHOLE = {  # whole numbers of the files; "part.key" is one of an object in them
    "transformer/config.json": "num_layers num_attention_heads attention_head_dim in_channels patch_size joint_attention_dim "
    "pooled_projection_dim pos_embed_max_size sample_size",
    "vae/config.json": "layers_per_block latent_channels norm_num_groups",
    "text_encoder/config.json": "hidden_size num_hidden_layers num_attention_heads intermediate_size projection_dim vocab_size "
    "max_position_embeddings",
    "text_encoder_3/config.json": "d_model num_layers num_heads d_kv d_ff vocab_size relative_attention_num_buckets "
    "relative_attention_max_distance",
    "judge/config.json": "hidden_size num_hidden_layers num_attention_heads num_key_value_heads intermediate_size vocab_size "
    "vision_config.depth vision_config.hidden_size vision_config.intermediate_size vision_config.num_heads vision_config.patch_size "
    "vision_config.spatial_merge_size vision_config.temporal_patch_size vision_config.window_size",
    "judge/preprocessor_config.json": "patch_size temporal_patch_size merge_size min_pixels max_pixels",
    "clip/config.json": "projection_dim text_config.hidden_size text_config.num_hidden_layers text_config.num_attention_heads "
    "text_config.vocab_size text_config.max_position_embeddings vision_config.hidden_size vision_config.num_hidden_layers "
    "vision_config.num_attention_heads vision_config.image_size vision_config.patch_size",
    "clip/tokenizer_config.json": "model_max_length", "tokenizer/tokenizer_config.json": "model_max_length"}
INDICES = {  # whole numbers from 0 on
    "text_encoder/config.json": "eos_token_id", "judge/config.json": "image_token_id",
           "judge/generation_config.json": "eos_token_id",
    "clip/config.json": "text_config.eos_token_id", "model_index.json": "t5_tokens"}
REAL = {
    "vae/config.json": "scaling_factor shift_factor", "text_encoder/config.json": "layer_norm_eps",
    "text_encoder_3/config.json": "layer_norm_epsilon", "judge/config.json": "rms_norm_eps rope_theta", "clip/config.json":
    "text_config.layer_norm_eps vision_config.layer_norm_eps", "scheduler/scheduler_config.json": "shift"}
LISTS = {
    "vae/config.json": "block_out_channels", "transformer/config.json": "dual_attention_layers", "judge/config.json":
    "rope_scaling.mrope_section vision_config.fullatt_block_indexes",
    "judge/preprocessor_config.json": "image_mean image_std",
    "clip/preprocessor_config.json": "image_mean image_std"}
FAR_PADDING = {"strategy": {"Fixed": 10**9}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0,
               "pad_token": "!"}
CONFIGURED = ("transformer", "vae", "text_encoder", "text_encoder_3", "judge", "clip", "tokenizer")
MISSING = object()


def make_models(folder):
    """A pipeline, a judge and a CLIP of one layer each, with the tokenizers of the miniature."""
    torch.manual_seed(0)
    diffusion = mmdit.MMDiT(mmdit.MMDiTConfig(1, 2, 8, (0,), 4, 2, 32, 32, 8, True, 8))
    diffusion.save_pretrained(folder / "transformer")
    publish.save_vae(folder / "vae", vae.VAE(vae.VAEConfig((8, 8), 1, 4, 4)))
    text = clip.TextConfig(16, 1, 2, 32, "gelu", 16, 1045, 40, 1044)
    for name in ("text_encoder", "text_encoder_2"):
        publish.save_text_tower(folder / name, clip.TextTower(text))
    t5 = text_encoders.T5Config(32, 1, 2, 4, 16, 1045)
    write_json(folder / "text_encoder_3" / "config.json", {**vars(t5), "feed_forward_proj": "gated-gelu"})
    weights.save(folder / "text_encoder_3" / "model.safetensors", text_encoders.T5Encoder(t5).views())
    tiny_judge = qwen_vl.QwenVLConfig(**layouts.qwen_fields(TINY / "judge"))
    processor = qwen_vl.Processor.from_pretrained(TINY / "judge", tiny_judge)
    judge = qwen_vl.QwenVLConfig(32, 1, 2, 1, 32, tiny_judge.vocab, True, 1e-6, 1e4, (2, 3, 3), 16, 1, 2, 16, 16, 2, 2, 64, (0,),
                                 tiny_judge.image_token)
    qwen_vl.QwenVL(judge, processor).save_pretrained(folder / "judge")
    vision = clip.VisionConfig(16, 1, 2, 32, "gelu", 16, 64, 16)
    processor = clip.Processor.from_pretrained(TINY / "clip", text, vision)
    publish.save_clip(folder / "clip", clip.CLIP(text, vision, processor))
    publish.save_pipeline(folder)
    edit(folder / "model_index.json", text_encoder_3=["transformers", "T5EncoderModel"], t5_tokens=8)
    for name in ("tokenizer", "tokenizer_2"):
        link_all(TINY / name, folder / name)
    link_all(TINY / "tokenizer", folder / "tokenizer_3")
    return folder


def link_all(source, folder):
    """A folder whose files are links to those of another."""
    for path in source.rglob("*"):
        if path.is_file():
            target = folder / path.relative_to(source)
            target.parent.mkdir(parents=True, exist_ok=True)
            relink(target, path.resolve())


def edit(path, **changes):
    """Change a JSON file, or put one in place of a link to it; "part.key" is a key of the object "part", MISSING takes it
    away."""
    content = read_json(path)
    for name, value in changes.items():
        *parts, key = name.split(".")
        inner = content
        for part in parts:
            inner = inner[part]
        inner[key] = value
        if value is MISSING:
            del inner[key]
    path.unlink()
    path.write_text(json.dumps(content))


def each(table):
    return [(file, key) for file, keys in table.items() for key in keys.split()]


def configurations(models):
    """Every number of every configuration of a folder that `make_models` made: (name, (file, change of it), expected)."""
    def changed(file, **changes):
        return file, lambda path: edit(path, **changes)

    def replaced(file, text):
        return file, lambda path: (path.unlink(), path.write_bytes(text.encode("utf-8", "surrogatepass")))

    wrong = {"a fraction": 2.5, "a text": "7", "a flag": True, "a list": [1], "NaN": float("nan"), "a huge number": 10**400}
    absent = {"null": None, "missing": MISSING}
    for table, values in ((WHOLE, {"0": 0, "-1": -1, "1e9": 10**9, "one more": 1}), (INDICES, {"-1": -1, "1e9": 10**9}),
                          (REAL, {"Infinity": float("inf")})):
        for file, key in each(table):
            last = key.rpartition(".")[2]
            for name, value in (wrong | values).items():
                expected = last
                if name == "one more":  # which the file has no tensors for, or which changes none
                    value, expected = numbers_at(models / file, key) + 1, EITHER
                if table is REAL and name == "a fraction":
                    expected = EITHER
                if "generation_config" in file and name == "a list":
                    expected = EITHER
                if last == "model_max_length" and name in ("1e9", "a huge number"):  # published so for "any"
                    expected = EITHER
                yield f"{file}: {key} is {name}", changed(file, **{key: value}), expected
            for name, value in absent.items():
                yield f"{file}: {key} is {name}", changed(file, **{key: value}), EITHER
    for file, key in each(LISTS):
        last = key.rpartition(".")[2]
        for name, value in {"a number": 8, "a text": "88", "an object": {"8": 8}, "of texts": ["8", "8"],
                            "of fractions": [2.5, 2.5],
                            "of flags": [True, True], "negative": [-8, -8], "huge": [10**9] * 3, "NaN": [float("nan")] * 3,
                            "long": [8] * 10**4, "nested": [[8], [8]], "of null": [None] * 3}.items():
            fine = "image_" in key and name in ("of fractions", "negative", "huge")
            yield f"{file}: {key} is {name}", changed(file, **{key: value}), EITHER if fine else last
        for name, value in (absent | {"empty": []}).items():
            yield f"{file}: {key} is {name}", changed(file, **{key: value}), EITHER
    yield "judge/preprocessor_config.json: no deviation", changed("judge/preprocessor_config.json",
                                                                  image_std=[0, 0, 0]), "image_std"
    for file, key, value in (
            ("text_encoder/config.json", "hidden_act", ["gelu"]), ("text_encoder/config.json", "hidden_act", CLEAR),
            ("clip/config.json", "text_config", []), ("clip/config.json", "vision_config", 7),
            ("judge/config.json", "vision_config", "x"),
            ("judge/config.json", "rope_scaling", 3), ("judge/config.json", "rope_scaling", []),
            ("judge/config.json", "image_token_id", 1), ("judge/config.json", "tie_word_embeddings", "no"),
            ("judge/config.json", "model_type", [CLEAR]),
            ("transformer/config.json", "qk_norm", {"rms_norm": 1}), ("vae/config.json", "use_quant_conv", "x"),
            ("judge/preprocessor_config.json", "size", 7), ("judge/preprocessor_config.json", "image_processor", []),
            ("clip/preprocessor_config.json", "image_processor", 1), ("clip/preprocessor_config.json", "size", [[]]),
            ("judge/generation_config.json", "eos_token_id", ["x"]), ("judge/generation_config.json", "eos_token_id", {}),
            ("tokenizer/tokenizer_config.json", "pad_token", 7), ("tokenizer/tokenizer_config.json", "pad_token",
                                                                  {"content": []}),
            ("tokenizer/tokenizer_config.json", "pad_token", {}), ("tokenizer/tokenizer_config.json", "pad_token", CLEAR),
            ("tokenizer/tokenizer_config.json", "pad_token", "\ud800"),
            ("judge/tokenizer.json", "model.continuing_subword_prefix", "xxxxxxxxx"),
            ("judge/tokenizer.json", "model.vocab", {}),
            ("judge/tokenizer.json", "model.unk_token", "x"), ("judge/tokenizer.json", "padding", FAR_PADDING),
            ("tokenizer/vocab.json", "a", "x"), ("tokenizer/vocab.json", "a", -1), ("tokenizer/vocab.json", "a", 10**9),
            ("model_index.json", "text_encoder_3", 7), ("model_index.json", "text_encoder_3", {}),
            ("model_index.json", "text_encoder_3", "x")):
        expected = EITHER if key in ("size", "pad_token", "text_encoder_3", "padding",
                                     "model.unk_token") else file.rpartition("/")[0]
        yield f"{file}: {key} is {value!r}", changed(file, **{key: value}), expected
    for text in ("", "[]", "7", '"x"', "null", nested(), '{"a": ' + nested() + "}", '{"a": ' + LONG * 2 + "}", "\ud800",
                 "{}", "{'a': 1}"):
        for file in ("transformer/config.json", "judge/config.json", "judge/preprocessor_config.json", "clip/config.json",
                     "model_index.json"):
            yield f"{file} that is {text[:9]!r}", replaced(file, text), EITHER if text == "{}" else file.rpartition("/")[2]


def numbers_at(path, key):
    value = read_json(path)
    for part in key.split("."):
        value = value[part]
    return value if isinstance(value, int) else 0


@torch.no_grad()
def read_models(folder, file):
    """Load what a file belongs to, and use it."""
    part = file.partition("/")[0]
    if part == "judge":
        judge = qwen_vl.QwenVL.from_pretrained(folder / "judge")
        ((answer,),) = judge.generate([feedback.ask("class", Image.new("RGB", (40, 30)))], max_new_tokens=2)
        assert len(answer.tokens)
    elif part == "clip":
        scorer = clip.CLIP.from_pretrained(folder / "clip")
        assert clip.pick_score(scorer, [Image.new("RGB", (40, 30))], ["a lake"]).shape == (1,)
    elif part == "transformer":
        model = mmdit.MMDiT.from_pretrained(folder)
        c = model.config
        latents = torch.zeros(1, c.channels, 2 * c.patch, 2 * c.patch)
        assert model(latents, torch.ones(1), torch.zeros(1, 3, c.context_dim),
                     torch.zeros(1, c.pooled_dim)).shape == latents.shape
    elif part == "vae":
        model = vae.VAE.from_pretrained(folder)
        assert model.decode(torch.zeros(1, model.config.latent_channels, 2, 2)).isfinite().all()
    elif part.startswith("text_encoder"):
        kind = text_encoders.T5Encoder if part.endswith("3") else clip.TextTower
        assert kind.from_pretrained(folder / part)(torch.zeros(1, 9, dtype=torch.long))[0].isfinite().all()
    else:
        assert load_generator(folder).draw(["a lake"], [0], 8, steps=1).shape[:2] == (1, 3)


def single_files(models):
    """Stability's single file, whose names and shapes are its configuration: (name, bytes, expected)."""
    tensors = {f"model.diffusion_model.{name}": value for name,
               value in mmdit.MMDiT.from_pretrained(models).state_dict().items()}
    tensors |= {f"first_stage_model.{name}": value for name, value in vae.VAE.from_pretrained(models).state_dict().items()}

    def changed(drop=(), **new):
        def make(folder):
            kept = {name: value.clone() for name, value in tensors.items() if name not in drop}
            save_file(kept | {name.replace("__", "."): value for name, value in new.items()}, folder / "x.safetensors")
        return make

    block = "model__diffusion_model__joint_blocks__"
    level = "first_stage_model__encoder__down__"
    yield "as it is", changed(), EITHER  # this VAE has other groups than SD3's
    for number in ("1000000000", "99999999999999999999", "-1", "²", "x", "", "1_0"):
        for what, name in {"block": f"{block}{number}__x_block__attn__qkv__weight",
                           "level": f"{level}{number}__block__0__conv1__weight",
                           "part": f"{level}0__block__{number}__conv1__weight"}.items():
            yield f"a {what} of number {number!r}", changed(**{name: torch.zeros(2)}), "x.safetensors"
    yield "a block without a name", changed(**{block + "0": torch.zeros(2)}), "x.safetensors"
    yield "a level without a name", changed(**{level + "0": torch.zeros(2)}), "x.safetensors"
    for name in ("model.diffusion_model.x_embedder.proj.weight",
                 "model.diffusion_model.joint_blocks.0.x_block.attn.ln_q.weight",
                 "model.diffusion_model.context_embedder.weight", "model.diffusion_model.pos_embed",
                 "first_stage_model.decoder.conv_in.weight",
                 "first_stage_model.encoder.down.0.block.0.conv1.weight"):
        for shape in ((), (0,), (1, 0), (0, 0, 0, 0), (1, 1, 1, 1)):
            yield f"{name} of shape {shape}", changed(**{name.replace(".", "__"): torch.zeros(shape)}), "x.safetensors"
        yield f"{name} is missing", changed([name]), "x.safetensors"


def read_single_file(folder):
    file = folder / "x.safetensors"
    mmdit.MMDiT.from_pretrained(file)
    vae.VAE.from_pretrained(file)


# ---------------------------------------------------------------------------------------------------------------------
# Adapters


def write_adapter(folder, **changes):
    lora.save_lora(folder, adapted(), "owner/name")
    edit(folder / "adapter_config.json", **changes)


def adapters():
    """Beside those of test_lora.py."""
    def config(**changes):
        return lambda folder: write_adapter(folder, **changes)

    for key in ("r", "lora_alpha"):
        for name, value in {"1e400": 10**400, "Infinity": float("inf"), "NaN": float("nan"), "null": None, "a list": [2],
                            "an object": {},
                            "a flag": True, "clearing": CLEAR, "missing": MISSING, "a text": "2"}.items():
            yield f"{key} is {name}", config(**{key: value}), "no usable r and lora_alpha"
    for r in (-2, 2.0, 2.5):
        yield f"r is {r}", config(r=r), "no usable r and lora_alpha"
    for name, changes in {
            "DoRA": {"use_dora": True}, "rsLoRA": {"use_rslora": 1}, "patterns of ranks": {"rank_pattern": {"q": 1}},
            "no type": {"peft_type": None},
            "a list as its type": {"peft_type": ["LORA"]}, "transposed weights": {"fan_in_fan_out": True},
            "a type that clears": {"peft_type": CLEAR}}.items():
        yield f"an adapter with {name}", config(**changes), "no usable r and lora_alpha"
    for name, base in {"null": None, "a number": 7, "a list": ["x"], "nothing": "", "a zero byte": "a\0b",
                       "half of a pair": "a/\ud800", "of nobody": "~nobody-of-this-name/x", "too long": "x" * 5000 + "/y",
                       "clearing": CLEAR + "/" + CLEAR}.items():
        is_text = isinstance(base, str) and base != ""  # what cannot be a path is looked for on the hub, and refused there
        yield f"a base that is {name}", config(base_model_name_or_path=base), EITHER if is_text else "base_model_name_or_path"
    for name, text in {"nested": nested(), "a list": "[]", "half": "{", "empty": ""}.items():
        yield f"a configuration that is {name}", lambda folder, text=text: (
            write_adapter(folder), (folder / "adapter_config.json").write_text(text)), "adapter_config.json"

    def tensors(change, **changes):
        def make(folder):
            write_adapter(folder, **changes)
            file = folder / lora.ADAPTER_FILE
            loaded = load_file(file)
            change(loaded)
            save_file(loaded, file)
        return make

    a, b = "base_model.model.at.first.lora_A.weight", "base_model.model.at.first.lora_B.weight"
    adapter = {name: value.detach() for name, (value,) in lora.lora_views(adapted()).items()}
    for name, change in {
            "an A of other inputs": {a: torch.zeros(2, 5)}, "a B of other rows": {b: torch.zeros(4, 2)},
            "a B of another rank": {b: torch.zeros(3, 1)},
            "an A without dimensions": {a: torch.zeros(())}, "an A of three dimensions": {a: torch.zeros(2, 6, 1)},
            "an A of whole numbers": {a: torch.zeros(2, 6, dtype=torch.int32)},
            "an embedding": {"base_model.model.at.first.lora_embedding_A": torch.zeros(2, 6)},
            "a magnitude": {"base_model.model.at.first.lora_magnitude_vector": torch.zeros(3)},
            "a bias": {"base_model.model.at.first.lora_B.bias": torch.zeros(3)},
            "a name that clears": {CLEAR: torch.zeros(1)},
            "a layer of nobody": {a.replace("first", "nobody"): torch.zeros(2, 6)}}.items():
        yield name, tensors(lambda loaded, change=change: loaded.update(change)), REFUSED
    yield "half of a pair", tensors(lambda loaded: loaded.pop(b)), REFUSED
    empty = {name: value[:0].clone() if "lora_A" in name else value[:, :0].clone() for name, value in adapter.items()}
    yield "no rows at all", tensors(lambda loaded: loaded.update(empty), r=0), REFUSED
    yield "no tensors", tensors(lambda loaded: loaded.clear()), REFUSED
    yield "half precision", tensors(lambda loaded: loaded.update({name: value.half() for name,
                                                                  value in adapter.items()})), READ
    yield "keys that nobody knows", config(**{CLEAR: 1, "bias": "none"}), READ


def read_adapter(folder):
    """Merge an adapter and compare with what its file says."""
    lora.base_of(folder)
    torch.manual_seed(0)
    model = Pair()
    before = {name: model.get_parameter(name).clone() for name in ("fused.weight", "plain.weight")}
    lora.load_lora(folder, model, TARGETS)
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / lora.ADAPTER_FILE)
    for path, rows in TARGETS.items():
        pairs = [[tensors.get(f"base_model.model.{name}.lora_{letter}.weight") for letter in "BA"] for name in rows]
        changes = [torch.zeros(0) if B is None else B.float() @ A.float() for B, A in pairs]
        expected = before[f"{path}.weight"].clone()
        if all(len(change) for change in changes):
            expected += config["lora_alpha"] / config["r"] * torch.cat(changes)
        torch.testing.assert_close(model.get_submodule(path).weight.detach(), expected, equal_nan=True)


# ---------------------------------------------------------------------------------------------------------------------
# Rows of a dataset, and cases

ROW = {"id": "r1", "image": "images/1.png", "label": "awe", "v": 7.0, "a": 3.0, "neutral": "a lake",
       "emotional": "a still lake"}


def rows():
    """Lines of train.jsonl, beside those of test_data.py: (name, bytes, expected)."""
    def row(**changes):
        return json.dumps({key: value for key, value in (ROW | changes).items() if value is not MISSING}).encode()

    for key in ("v", "a"):
        for name, value in {"10 to the 400": 10**400, "Infinity": float("inf"), "NaN": float("nan"), "a flag": True,
                            "a list": [5],
                            "an object": {}, "clearing": CLEAR, "a text": "7 "}.items():
            yield f"{key} is {name}", row(**{key: value}), EITHER if name == "a text" else "line 1: "
    for name, value in {"absolute": "/etc/passwd", "above": "images/../../x.png", "a zero byte": "images/\0.png",
                        "nothing": "", "null": None,
                        "a list": ["images/1.png"], "half of a pair": "\ud800.png", "too long": "x" * 300,
                        "the folder": "images",
                        "clearing": CLEAR, "a device": "images/device.png", "a pipe": "images/pipe.png",
                        "missing": MISSING}.items():
        yield f"an image that is {name}", row(image=value), "line 1: "
    yield "an image by a link", row(image="images/link.png"), READ
    for name, value in {"a list": ["awe"], "an object": {}, "null": None, "clearing": CLEAR, "upper case": "AWE",
                        "missing": MISSING}.items():
        yield f"a label that is {name}", row(label=value), "line 1: "
    for key in ("neutral", "emotional"):
        for name, value in {"null": None, "an object": {}, "half of a pair": "a \ud800 lake", "clearing": f"a lake {CLEAR}",
                            "a zero byte": "a\0lake",
                            "a token": "a lake <|image_pad|>", "very long": "a lake " * 10**5, "spaces": " \n"}.items():
            yield f"{key} is {name}", row(**{key: value}), "line 1: "
        yield f"{key} is of two lines", row(**{key: "ein See,\nstill: 湖"}), READ
    for name, value in {"null": None, "a list": [], "a path": "../r1", "half of a pair": "\ud800", "clearing": CLEAR,
                        "a zero byte": "\0",
                        "nothing": "", "missing": MISSING, "too long": "x" * 300, "the folder": ".."}.items():
        yield f"an id that is {name}", row(id=value), "line 1: "
    yield "an id that is a number", row(id=7), READ
    yield "a key that nobody knows", row(**{CLEAR: nested(100)}), READ
    for name, line in {"nested": nested().encode(), "nested in a key": row()[:-1] + b', "x": ' + nested().encode() + b"}",
                       "nothing": b"",
                       "a huge number": b'{"v": ' + LONG.encode() * 2 + b"}", "two objects": row() + row(),
                       "a comment": b"// " + row(),
                       "UTF-16": row().decode().encode("utf-16"), "latin-1": '{"id": "ü"}'.encode("latin-1"),
                       "zero bytes": bytes(512),
                       "pairs": b'[["id", "r1"]]', "spaces": b"   "}.items():
        yield f"a line that is {name}", line + b"\n" + row() + b"\n", "line 1: "
    yield "a torn last line", row() + b"\n" + row()[:40], "line 2: "
    yield "a torn line of zero bytes", row() + b"\n" + bytes(100), "line 2: "
    yield "lines of Windows with a mark", b"\xef\xbb\xbf" + row() + b"\r\n" + row(id="r2") + b"\r\n", READ
    yield "a carriage return in a line", row().replace(b" ", b"\r", 3), READ
    yield "a key twice", row()[:-1] + b', "v": 5}', READ


def make_pictures(folder):
    """The pictures of `rows`."""
    images = folder / "images"
    images.mkdir()
    Image.new("RGB", (8, 8), "green").save(images / "1.png")
    Image.new("RGB", (8, 8), "blue").save(folder / "outside.png")
    relink(images / "link.png", folder / "outside.png")
    relink(images / "device.png", "/dev/zero")
    os.mkfifo(images / "pipe.png")


def read_rows(folder):
    for row in data.load_rows(folder, "train"):
        for form in data.FORMS:
            row.prompt(form).encode()
        assert open_picture(row.image).size == (8, 8) and 1 <= row.v <= 9 and 1 <= row.a <= 9


def cases():
    """Lines of a file of cases, beside those of test_cases.py."""
    def case(**changes):
        return json.dumps({key: value for key,
                           value in (ROW | {"group": "g"} | changes).items() if value is not MISSING}).encode()

    for name, changes in {
            "an id above": {"id": ".."}, "no id": {"id": ""}, "an id of half a pair": {"id": "\ud800"},
            "an id that clears": {"id": CLEAR},
            "no prompt": {"neutral": ""}, "null as prompt": {"neutral": None}, "a list as prompt": {"neutral": ["a lake"]},
            "half a pair": {"neutral": "\ud800"}, "a token": {"neutral": "<|image_pad|>"}, "a list as group": {"group": []},
            "an object as group": {"group": {}}, "10 to the 400": {"v": 10**400}, "a flag": {"a": True}}.items():
        yield f"a case with {name}", case(**changes), "line 1: "
    yield "nested", nested().encode(), "line 1: "
    yield "a case without a group", case(group=MISSING), READ
    yield "a case of no group", case(group=None), READ


# ---------------------------------------------------------------------------------------------------------------------
# Answers of the judge


def answers():
    """(name, answer, what the strict reading of a V-A answer gives). Beside those of test_feedback.py."""
    def said(answer, thought="fog"):
        return f"<think>{thought}</think><answer>{answer}</answer>"

    good = '{"valence": 2.5, "arousal": 3}'
    read = (2.5, 3.0)
    for depth in (100, 400, 900, 960, DEEP):
        yield f"{depth} lists", said('{"valence": ' + nested(depth) + ', "arousal": 3}'), None
        yield f"a class of {depth} lists", said('{"emotion_class": ' + nested(depth) + "}"), None
        yield f"{depth} objects", '{"a":' * depth + "1" + "}" * depth, None
    for name, value in {"of 4,000 digits": LONG, "of 19,000 digits": "9" * 19_000, "1e400": "1e400", "-0": "-0",
                        "1E1": "1E1", "0x5": "0x5",
                        "a text": '"5"', "true": "true", "of a comma": "5,0", "05": "05", "+5": "+5", "５": "５", ".5": ".5",
                        "5.": "5.",
                        "null": "null", "NaN": "NaN", "-Infinity": "-Infinity", "9.1": "9.1", "0.999": "0.999"}.items():
        yield f"a number {name}", said('{"valence": ' + value + ', "arousal": 3}'), None
    yield "a number 9.0000000000000000001", said('{"valence": 9.0000000000000000001, "arousal": 3}'), (9.0, 3.0)
    yield "a number 2.5e0", said('{"valence": 2.5e0, "arousal": 3}'), read
    yield "a key in escapes", said('{"val\\u0065nce": 2.5, "arousal": 3}'), read
    yield "a key twice, once in escapes", said('{"val\\u0065nce": 2.5, "valence": 9, "arousal": 3}'), None
    yield "a key of another alphabet", said('{"vаlence": 2.5, "arousal": 3}'), None
    yield "both tasks", said('{"valence": 2.5, "arousal": 3, "emotion_class": "awe"}'), None
    for name, text in {"two objects": good + good, "a list of it": f"[{good}]", "a comment": good + "// x",
                       "a comma": good[:-1] + ",}",
                       "a fence": f"```json{good}```", "a text of it": json.dumps(good), "no braces": good[1:-1],
                       "a zero byte": good + "\0",
                       "a tag in a text": good[:-1] + ', "x": "</answer>"}',
                       "single quotes": good.replace('"', "'")}.items():
        yield f"an answer of {name}", said(text), None
    for name, text in {"upper case": said(good).upper(), "a space in a tag": said(good).replace("<think>", "<think >"),
                       "twice": said(good) * 2,
                       "a second answer": said(good) + f"<answer>{good}</answer>",
                       "the answer first": f"<answer>{good}</answer><think></think>",
                       "one in the other": f"<think><answer>{good}</answer></think>", "not closed": said(good)[:-9],
                       "text behind": said(good) + ".",
                       "text before": "Sure: " + said(good), "a mark of the byte order": "\ufeff" + said(good),
                       "no width": said(good) + "\u200b",
                       "text between": said(good).replace("><", ">so<"), "tags alone": "<think></think><answer></answer>",
                       "a zero byte behind": said(good) + "\0", "a control character behind": said(good) + "\x07"}.items():
        yield f"tags with {name}", text, None
    yield "no thought and much space", f" \n<think></think>\u00a0\n<answer>\n{good}\t</answer>\u3000", read
    for name, thought in {"half of a pair": "\ud800", "special tokens": "<|im_end|><|image_pad|><|endoftext|>",
                          "clearing": CLEAR, "zero bytes": "\0" * 9,
                          "an answer": good, "other tags": "<b></b><answer ></ANSWER>"}.items():
        yield f"a thought of {name}", said(good, thought), read
    for name, text in {"tags": "<think>" * 9000, "openings": "<" * 60_000, "braces": "{" * 60_000,
                       "backslashes": said('{"' + "\\" * 19_000),
                       "quotes": "{" + '"' * 19_000, "thoughts": "</think>" * 7000, "spaces": said(" " * 19_000),
                       "long thoughts": said(good, "fog " * 10**5),
                       "tokens": "<|" * 30_000, "one token": "<|" + "a" * 60_000, "a fence": "`" * 60_000,
                       "quoted": "“" * 60_000, "stars": "*" * 60_000,
                       "names": "a " * 30_000 + "prompt", "keys": "{" + ",".join(f'"{i}":1' for i in range(2000)) + "}",
                       "no text": "",
                       "half of a pair": "\ud800", "a prompt that clears": json.dumps({"analysis": CLEAR,
                                                                                       "optimized_prompt": f"a lake {CLEAR}"}),
                       "a prompt of a token": json.dumps({"analysis": "", "optimized_prompt": "a lake <|image_pad|>"}),
                       "a prompt of half a pair": json.dumps({"analysis": "\ud800", "optimized_prompt": "a lake \ud800"}),
                       "a prompt of one word": json.dumps({"analysis": "", "optimized_prompt": "lake " * 390}),
                       "a prompt of two words": json.dumps({"analysis": "",
                                                            "optimized_prompt": "b a " * 498 + "lake"})}.items():
        yield f"an answer of many {name}", text, None


def read_answers(text):
    """Everything that reads an answer; what the strict reading of V and A gives."""
    for task in feedback.TASKS:
        feedback.read_answer(text, task, strict=False)
    read = feedback.read_answer(text, "regression", strict=True)
    emotion = feedback.read_answer(text, "class", strict=True)
    rewards = {grpo.va_reward(text, 2.5, 3.0, kind) for kind in ("step", "continuous")}
    assert (max(rewards) > 0) == (read is not None) and (grpo.class_reward(text, "awe") > 0) == (emotion == "awe")
    assert grpo.format_reward(text) or (read is None and emotion is None)  # nothing is earned outside of the form
    (judgement,) = feedback.judge_images(lambda questions: [text], [None])
    assert judgement.reasoning == "" or judgement.reasoning.isprintable()
    for reader in (lambda: feedback.read_rewrite(text, "a lake"), lambda: captions.read_caption(text)):
        try:
            prompt = reader()[-1]
            prompt.encode()
            chat.chat_text(feedback.ask_compare("a lake", prompt, 7, 3, (PICTURE, 5, 5), (PICTURE, 4, 4)))
            page.changes("a " * 996 + "lake", prompt)
        except feedback.Unusable as error:
            assert str(error).isprintable() and len(str(error)) < 500
    return read


PICTURE = Image.new("RGB", (8, 8))


# ---------------------------------------------------------------------------------------------------------------------
# Pictures


def as_bytes(image, kind="PNG", **options):
    content = io.BytesIO()
    image.save(content, kind, **options)
    return content.getvalue()


def chunk(name, content):
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png(*chunks, size=(8, 8), depth=8, colours=2, data=None):
    """A PNG with chunks before its pixels."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", *size, depth, colours, 0, 0, 0))
    rows = zlib.compress(bytes((size[0] * 3 + 1) * size[1])) if data is None else data
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(chunks) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def pictures():
    """Beside those of test_files.py: (name, bytes called x.png, expected)."""
    refused = "x.png: cannot be read as a picture"
    image = Image.fromarray(np.arange(192, dtype=np.uint8).reshape(8, 8, 3))
    plain = as_bytes(image)
    for name, content in {"nothing": b"", "one byte": plain[:1], "the signature": plain[:8], "a GIF": as_bytes(image, "GIF"),
                          "a TIFF": as_bytes(image, "TIFF"),
                          "an icon": as_bytes(image, "ICO"), "a BMP": as_bytes(image, "BMP"),
                          "an SVG": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
                          "a PDF": b"%PDF-1.4\n", "no rows": png(size=(8, 0)), "no columns": png(size=(0, 8)),
                          "a depth of 3": png(depth=3),
                          "colours of 5": png(colours=5), "negative sides": png(size=(2**32 - 1, 2**32 - 1), data=b""),
                          "pixels that are not packed": png(data=b"x" * 100),
                          "half of its rows": png(data=zlib.compress(bytes(60))),
                          "two thirds of a JPEG": as_bytes(image, "JPEG")[:-200],
                          "a WebP without its end": as_bytes(image, "WEBP")[:-30]}.items():
        yield name, content, refused
    for name, sides in {"81 million pixels": (9000, 9000), "160 million pixels": (20_000, 8000),
                        "179 million pixels": (13_380, 13_370)}.items():
        yield name, png(size=sides, depth=1, colours=0, data=zlib.compress(b"")), f"{sides[0]}×{sides[1]} pixels, more than"
    for name, sides in {"a line of 9,000": (9000, 1), "a column of 9,000": (8, 9000)}.items():
        yield name, as_bytes(Image.new("1", sides)), f"{sides[0]}×{sides[1]} pixels, more than 200 times"
    bomb = zlib.compress(bytes(2 * 10**7), 9)
    yield "a text of 20 megabytes", png(chunk(b"zTXt", b"a\0\0" + bomb)), refused
    yield "an international text of 20 megabytes", png(chunk(b"iTXt", b"a\0\1\0\0\0" + bomb)), refused
    yield "a profile of 20 megabytes", png(chunk(b"iCCP", b"a\0\0" + bomb)), EITHER
    yield "pixels of 20 megabytes", png(data=bomb), EITHER
    yield "a thousand texts", png(*[chunk(b"tEXt", b"k%d\0" % i + b"\x1b[2J" * 99) for i in range(1000)]), READ
    yield "a text that is torn", png(chunk(b"iTXt", b"prompt\0\1")), EITHER
    yield "a chunk of another sum", plain.replace(b"IEND", b"IENX"), EITHER
    yield "a transparent colour that is torn", png(chunk(b"tRNS", b"\0")), EITHER
    yield "an orientation of 9", png(chunk(b"eXIf", Image.Exif().tobytes() or b"II*\0" + bytes(99))), EITHER
    for name, exif in {"nothing": b"", "zero bytes": bytes(99),
                       "a loop": b"II*\0\x08\0\0\0\1\0\x69\x87\4\0\1\0\0\0\x08\0\0\0\x08\0\0\0",
                       "a count of four billion": b"II*\0\x08\0\0\0\1\0\x12\1\3\0\xff\xff\xff\xff\6\0\0\0\0\0\0\0",
                       "text": b"II*\0" + b"\xff" * 999}.items():
        yield f"EXIF that is {name}", png(chunk(b"eXIf", exif)), EITHER
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "green", "blue")]
    yield "an animated PNG", as_bytes(frames[0], save_all=True, append_images=frames[1:]), READ
    yield "an animated WebP", as_bytes(frames[0], "WEBP", save_all=True, append_images=frames[1:]), READ
    yield "several JPEGs in one", as_bytes(frames[0], "MPO", save_all=True, append_images=frames[1:]), READ
    wide = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000
    yield "grey of 16 bits", as_bytes(Image.fromarray(wide)), READ
    yield "colours of 16 bits", png(depth=16, data=zlib.compress(bytes((8 * 6 + 1) * 8))), READ
    yield "grey and alpha of 16 bits", png(depth=16, colours=4, data=zlib.compress(bytes((8 * 4 + 1) * 8))), READ
    yield "CMYK", as_bytes(Image.new("CMYK", (8, 8)), "JPEG"), READ
    info = PngInfo()
    info.add_itxt("prompt", f"<script>{CLEAR}</script>")
    yield "a text that clears", as_bytes(image, pnginfo=info), READ


def read_picture(folder):
    image = open_picture(folder / "x.png")
    assert image.mode == "RGB" and image.width * image.height <= 2**26
    sent = rate.pixels(folder / "x.png")  # what a rater's browser receives: pixels and nothing else
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(sent))), np.asarray(image))
    assert not {b"tEXt", b"zTXt", b"iTXt", b"eXIf", b"iCCP"} & {sent[at + 4:at + 8] for at in chunks_at(sent)}


def chunks_at(content):
    at = 8
    while at < len(content):
        yield at
        at += 12 + int.from_bytes(content[at:at + 4], "big")


# ---------------------------------------------------------------------------------------------------------------------
# Requests to the server of ratings, its file, and questions to the judge


class Wire:
    """A connection that has received a request and keeps what is answered."""

    def __init__(self, request):
        self.request = request
        self.answer = b""

    def makefile(self, *_):
        return io.BytesIO(self.request)

    def sendall(self, content):
        self.answer += bytes(content)

    def settimeout(self, seconds):
        pass


def ask_server(study, request):
    """(status or None, body) of the answer to a request's bytes."""
    wire = Wire(request)
    rate.Handler(wire, ("127.0.0.1", 1), SimpleNamespace(study=study, server_port=8000))
    head, _, body = wire.answer.partition(b"\r\n\r\n")
    status = head.split(b" ", 2)[1:2]
    return (int(status[0]) if head.startswith(b"HTTP/") else None), body


def make_study(folder):
    """A study of two cases and two methods."""
    with open(folder / "cases.jsonl", "w", encoding="utf-8") as file:
        for i in range(2):
            file.write(json.dumps({"id": f"c{i}", "neutral": "a lake & <b>castle</b>", "v": 7.0, "a": 2.5}) + "\n")
    for method in ("one", "two"):
        (folder / method).mkdir()
        for i in range(2):
            Image.new("RGB", (8, 8), "green").save(folder / method / f"c{i}.png")
    return rate.prepare(SimpleNamespace(cases=folder / "cases.jsonl", images=[f"{m}={folder / m}" for m in ("one", "two")],
                                        out=folder / "ratings.csv", seed=0))


def whole_form(study, rater="Anna"):
    token = next(iter(study.cases))
    marks = {f"{scale}{i}": "3" for scale in rate.SCALES for i in range(2)}
    return {"rater": rater, "case": token, "best": "1", "target": "1", **marks}


def post(form, path="/case", host="127.0.0.1:8000", **headers):
    body = form if isinstance(form, bytes) else urlencode(form).encode()
    lines = [f"POST {path} HTTP/1.1", f"Host: {host}", *(f"{name}: {value}" for name, value in headers.items())]
    if "Content-Length" not in headers:
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join(lines).encode("latin-1") + b"\r\nConnection: close\r\n\r\n" + body


def get(path, host="127.0.0.1:8000"):
    return f"GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode("latin-1")


def requests(study):
    """Beside those of test_rate.py: (name, bytes, status). Nothing of these may be written as a rating."""
    form = whole_form(study)
    token = form["case"]
    for name, rater in {"clearing": CLEAR, "half of a pair": b"\xed\xa0\x80", "a line": "Anna\r\nSet-Cookie: x=1",
                        "a formula": "=cmd|'/c calc'!A0",
                        "a comma": "Anna,Bo", "a quote": 'Anna"', "a zero byte": "Anna\0", "empty": "",
                        "very long": "A" * 90_000, "dots": ".." }.items():
        yield f"a name that is {name}", post(form | {"rater": rater}), 422
    for key, value in (("v0", "10"), ("v0", "0"), ("v0", "３"), ("v0", "3.5"), ("v0", " 3"), ("v0", "+3"), ("v0", ""),
                       ("v0", "9" * 5000), ("quality1", "6"),
                       ("a1", "nan"), ("best", "2"), ("best", "-1"), ("best", "٠"), ("best", CLEAR)):
        yield f"{key} is {value[:9]!r}", post(form | {key: value}), 422
    yield "the same key twice", post(urlencode(form).encode() + b"&v0=11"), 422
    yield "a form of many keys", post(b"&".join(b"k%d=1" % i for i in range(9000))), 422
    for name, body in {"nothing": b"", "zero bytes": bytes(1000), "bytes": bytes(range(256)), "per cent": b"%" * 1000,
                       "JSON": b'{"rater": "Anna"}'}.items():
        yield f"a form of {name}", post(body), 422
    yield "a form that ends early", post(b"rater=Anna", **{"Content-Length": 90_000}), 303
    for path, status in (("//", 200), ("/case/../picture", 404), ("/%00", 404), ("http://evil.example/case", 404),
                         ("/" + "a" * 60_000, 404), ("/?" + "&" * 9999, 200),
                         (f"/picture?case={token}&at=0&rater={'A' * 9999}", 200), (f"/picture?case={token}&at=00", 404),
                         (f"/picture?case={token}&at=-1", 404),
                         ("/picture?case=" + "%00" * 99, 404), ("/case?rater=%ED%A0%80", 422),
                         ("/case?rater=" + "%1b[2J", 422), ("*", 404)):
        yield f"the path {path[:40]!r}", get(path), status
    for name, request, status in (
            ("no version", b"GET /\r\n\r\n", None), ("a version of 9", b"GET / HTTP/9.9\r\n\r\n", None),
            ("no request", b"", None), ("zero bytes", bytes(99) + b"\r\n", None),
            ("a line without end", b"GET /" + b"a" * 70_000, 414), ("a thousand headers",
                                                                    b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 1000 + b"\r\n",
                                                                    431),
            ("a header of 70,000 bytes", b"GET / HTTP/1.1\r\nA: " + b"b" * 70_000 + b"\r\n\r\n", 431),
            ("a method that clears", CLEAR.encode() + b" / HTTP/1.1\r\n\r\n", 501),
            ("a folded host", b"GET / HTTP/1.1\r\nHost: 127.0.0.1:8000\r\n x\r\n\r\n", 403),
            ("no colon", b"GET / HTTP/1.1\r\nHost 127.0.0.1:8000\r\n\r\n", 403),
            ("bytes that are not ASCII", b"GET /\xff\xfe HTTP/1.1\r\nHost: 127.0.0.1:8000\r\n\r\n", 404)):
        yield name, request, status


def ratings():
    """A file of ratings, beside those of test_rate.py: (name, bytes, expected)."""
    head = ",".join(rate.COLUMNS) + "\n"
    good = "2026-01-02,Anna,c0,one,7,2,4,1\n"
    yield "a good line", (head + good).encode(), READ
    for name, line in {"clearing": good.replace("Anna", CLEAR), "half a pair": "\udcff",
                       "a zero byte": good.replace("Anna", "\0"), "10 to the 400": good.replace("7", "9" * 401),
                       "fullwidth": good.replace("7", "７,"), "a time of year 0": good.replace("2026", "0000"),
                       "a long cell": good.replace("Anna", "A" * 200_000),
                       "a negative quality": good.replace(",4,", ",-4,"), "infinite": good.replace(",7,", ",inf,")}.items():
        yield f"a line that is {name}", (head + line).encode("utf-8", "surrogateescape"), "x.csv, line "
    yield "a mark of the byte order", b"\xef\xbb\xbf" + (head + good).encode(), "x.csv, line 1"


def questions():
    """Files of --questions, beside those of test_prompts.py: (name, bytes, expected)."""
    for name, content in {"nested": nested().encode(), "deep in a key": b'{"system": ' + nested().encode() + b"}",
                          "a huge number": b'{"system": ' + LONG.encode() * 2 + b"}",
                          "UTF-16": '{"system": "x"}'.encode("utf-16"),
                          "a name that clears": json.dumps({CLEAR: "x"}).encode(),
                          "half of a pair": b'{"system": "\\ud800"}',
                          "a picture": b'{"regression": "<|image_pad|>"}',
                          "a value that clears": json.dumps({"system": f"${CLEAR}"}).encode()}.items():
        yield name, content, "x.json"
    yield "a long text", json.dumps({"system": "x" * 10**6}).encode(), EITHER


# ---------------------------------------------------------------------------------------------------------------------
# Folders of runs

STATE = {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor(7.0)}
ALONE = Processes(0, 1, torch.device("cpu"))


def make_run(folder):
    run = Run(folder, {"lr": 0.1}, ALONE)
    run.read_log(0)
    for step in (1, 2):
        run.log({"step": step, "loss": 0.5})
        run.save(step, STATE)
    files.LOCKED.pop().close()
    return folder / "checkpoint-00000002"


def runs():
    """Folders of runs, beside those of test_run.py and test_checkpoints.py: (name, change of the folder, expected)."""
    last = "checkpoint-00000002"

    def write(name, content):
        return lambda folder: (folder / name).write_bytes(content if isinstance(content,
                                                                                bytes) else json.dumps(content).encode())

    def digests(**changes):
        def make(folder):
            content = read_json(folder / last / "digests.json")
            write(f"{last}/digests.json", content | changes)(folder)
        return make

    for name in ("settings.json", f"{last}/digests.json"):
        for what, content in {"nested": nested().encode(), "a list": [], "not UTF-8": b"\xff",
                              "a huge number": b'{"a": ' + LONG.encode() * 2 + b"}", "empty": b""}.items():
            yield f"{name} that is {what}", write(name, content), name
        yield f"{name} that is a device", lambda folder, name=name: relink(folder / name, "/dev/zero"), name
    for what, value in {"a list": [], "clearing": CLEAR, "nested": json.loads(nested(300)), "a text": "0.1",
                        "10 to the 400": 10**400}.items():
        yield f"a setting that is {what}", write("settings.json", {"lr": value}), "holds a run with lr"
    for what, file in {"a device": "/dev/zero", "above": "../../x", "the folder": ".", "clearing": CLEAR,
                       "a zero byte": "\0", "half of a pair": "\ud800", "too long": "x" * 300}.items():
        yield f"a digest of {what}", digests(**{file: 1}), READ  # that checkpoint is damaged, and the one before is used
    for what, value in {"a text": "x", "a list": [], "null": None}.items():
        yield f"a digest that is {what}", digests(**{"__0_0.distcp": value}), READ
    for what, line in {"a list": b"[1]", "a number": b"7", "nested": nested().encode(), "not UTF-8": b"\xff\xfe",
                       "a step that is a text": b'{"step": "1"}',
                       "a step that is null": b'{"step": null}', "zero bytes": bytes(100),
                       "two at once": b'{"step": 1}{"step": 2}'}.items():
        yield f"a log whose first line is {what}", write("log.jsonl",
                                                         line + b'\n{"step": 1}\n{"step": 2}\n'), "log.jsonl, line 1"
        yield f"a log whose last line is {what}", write("log.jsonl", b'{"step": 1}\n' + line), EITHER
    yield "a log without steps", write("log.jsonl", b'{"loss": 1}\n'), EITHER
    yield "a log of a device", lambda folder: relink(folder / "log.jsonl", "/dev/zero"), READ

    def table(change):
        """A checkpoint whose table of what lies where has been changed, with its digest."""
        def make(folder):
            path = folder / last / ".metadata"
            content = checkpoints.MetadataUnpickler(io.BytesIO(path.read_bytes())).load()
            change(content)
            path.write_bytes(pickle.dumps(content))
            digests(**{".metadata": checkpoints.digest_of(path)})(folder)
        return make

    def entry(**changes):
        def change(content):
            key, info = next(iter(content.storage_data.items()))
            content.storage_data[key] = replace(info, **changes)
        return change

    for what, changes in {"a device": {"relative_path": "/dev/zero"}, "above": {"relative_path": "../../settings.json"},
                          "negative": {"offset": -1},
                          "far": {"offset": 10**15}, "long": {"length": 10**15}, "nothing": {"relative_path": None},
                          "a text": {"length": CLEAR}}.items():
        yield f"a tensor that lies {what}", table(entry(**changes)), f"{last}: damaged or incomplete"
    for what, change in {"no tensors": lambda content: content.state_dict_metadata.clear(),
                         "no places": lambda content: content.storage_data.clear(),
                         "another shape": lambda content: content.state_dict_metadata.update(
                             a=replace(content.state_dict_metadata["a"], size=torch.Size([10**9, 10**9])))}.items():
        yield f"a table with {what}", table(change), f"{last}: damaged or incomplete"

    def raw(content):
        def make(folder):
            (folder / last / ".metadata").write_bytes(content)
            digests(**{".metadata": checkpoints.digest_of(folder / last / ".metadata")})(folder)
        return make

    for what, content in {
            "a list": pickle.dumps([1]), "nothing": b"", "a protocol of 9": b"\x80\x09.",
            "a name of torch": b"ctorch\nload\n.", "a name in a name": b"ctorch\nos.system\n.",
            "hub": b"ctorch.hub\nload\n.", "builtins": b"cbuiltins\neval\n.",
            "four billion bytes": b"\x80\x04\x8e" + struct.pack("<Q", 2**62),
            "a memo far away": b"\x80\x04r\xff\xff\xff\x7f.", "marks": b"(" * 10**5,
            "lists in lists": b"(" + b"l(" * 10**4}.items():
        yield f"a table that is {what}", raw(content), f"{last}: damaged or incomplete"

    def data_of(change):
        def make(folder):
            path = folder / last / "__0_0.distcp"
            path.write_bytes(change(path.read_bytes()))
            digests(**{path.name: checkpoints.digest_of(path)})(folder)
        return make

    for what, change in {"cut": lambda content: content[:-100], "nothing": lambda content: b"",
                         "code": lambda content: pickle.dumps(print),
                         "zero bytes": lambda content: bytes(len(content))}.items():
        yield f"tensors that are {what}", data_of(change), f"{last}: damaged or incomplete"


def read_run(folder):
    run = Run(folder, {"lr": 0.1}, ALONE)
    try:
        state = {name: torch.zeros_like(value) for name, value in STATE.items()}
        step = run.load(state, 99)
        assert step in (1, 2) and all(torch.equal(state[name], STATE[name]) for name in STATE)
        run.read_log(step)
        run.log({"step": 3, "loss": 0.1})
    finally:
        files.LOCKED.pop().close()
