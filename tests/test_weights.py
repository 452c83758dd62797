"""Finding, checking, reading and writing safetensors."""

import json
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import httpx2
import pytest
import torch
from huggingface_hub import errors
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import mmdit
from parts import weights
from parts.cli import UserError


def refused(match):
    return pytest.raises(UserError, match=match)


def test_every_difference_is_named(tmp_path):
    save_file({"a": torch.zeros(2), "b": torch.zeros(3, 2), "extra": torch.zeros(1), "old.position_ids": torch.zeros(1)},
              tmp_path / "x.safetensors")
    views = {"a": [torch.zeros(2)], "b": [torch.zeros(3, 3)], "c": [torch.zeros(4)]}
    with refused("3 tensors") as caught:
        weights.load(views, weights.index(tmp_path), "x", optional=["*position_ids"])
    for text in ("missing c [4]", "b is [3, 2], expected [3, 3]", "unexpected 'extra' [1]"):
        assert text in str(caught.value)
    assert "position_ids" not in str(caught.value)


def test_nothing_is_changed_by_a_refused_checkpoint(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "x.safetensors")
    target = torch.zeros(2)
    with refused("missing b"):
        weights.load({"a": [target], "b": [torch.zeros(1)]}, weights.index(tmp_path), "x")
    assert target.sum() == 0


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=4), st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
       st.sampled_from([torch.float32, torch.bfloat16]))
def test_views_read_back_what_they_wrote(tmp_path_factory, rows, file_dtype, model_dtype):
    path = tmp_path_factory.mktemp("views") / "x.safetensors"
    written = [torch.randn(n, 3).to(file_dtype) for n in rows]
    save_file({"fused": torch.cat(written), "scalar": torch.tensor(2.5), "flags": torch.tensor([True, False])}, path)
    whole = torch.zeros(sum(rows), 3, dtype=model_dtype)
    scalar, flags = torch.zeros(()), torch.zeros(2, dtype=torch.bool)
    views = {"fused": list(whole.split(rows)), "scalar": [scalar], "flags": [flags]}
    weights.load(views, weights.index(path), path)
    assert torch.equal(whole, torch.cat(written).to(model_dtype)) and scalar == 2.5 and flags.tolist() == [True, False]
    weights.save(path, views, torch.float32)
    again = load_file(path)
    assert torch.equal(again["fused"], whole.float()) and again["flags"].dtype == torch.bool


def test_truncated_foreign_and_missing_files_are_told_apart(tmp_path):
    file = tmp_path / "x.safetensors"
    save_file({"a": torch.zeros(1000)}, file)
    whole = file.read_bytes()
    for size in (0, 5, 50, len(whole) - 1):
        file.write_bytes(whole[:size])
        with refused("truncated|not a readable safetensors"):
            weights.index(file)
    file.write_bytes(b"PK\x03\x04" * 100)
    with refused("not a readable safetensors"):
        weights.index(file)
    file.unlink()
    with refused("found none"):
        weights.index(tmp_path)


def tensor(start, end, shape=(2,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


def as_text(**tensors):
    return json.dumps(tensors)


A = json.dumps(tensor(0, 8))


@pytest.mark.parametrize("header, size", [
    (as_text(a=tensor(-8, 0)), 8), (as_text(a=tensor(8, 0)), 8), (as_text(a=tensor(0, 8), b=tensor(4, 12)), 12),
    (as_text(a=tensor(0, 8), b=tensor(12, 20)), 20), (as_text(a=tensor(0, 4)), 4), (as_text(a=tensor(0, 12)), 12),
    (as_text(a=tensor(0, 8)), 7), (as_text(a=tensor(0, 8)), 9), (as_text(a=tensor(0, 8, (-1, -2))), 8),
    (as_text(a=tensor(0, 8, (2**62, 8))), 8), (as_text(a=tensor(0, 8, dtype="F31")), 8),
    (as_text(a={"dtype": "F32"}), 8), (as_text(a=tensor(0.5, 8.5)), 9), ("[]", 0), ("{", 0), ("\xff", 0),
    (f'{{"a": {A}, "a": {json.dumps(tensor(8, 16))}}}', 16),
    (json.dumps({"a": tensor(0, 8), "b\n\x1b[31m": tensor(4, 12)}), 12),
], ids=["negative", "backwards", "overlap", "gap", "too short for its shape", "too long for its shape", "file too short",
        "file too long", "negative shape", "huge shape", "unknown dtype", "no shape", "fractions", "list", "half a header",
        "no JSON", "twice", "odd name"])
def test_a_malformed_header_is_refused_in_one_line(tmp_path, header, size):
    text = header.encode("latin-1")
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(size))
    with refused("x.safetensors: truncated or not a readable safetensors file .*download it again") as caught:
        weights.index(tmp_path)
    assert str(caught.value).isprintable()


def test_offsets_of_a_header_in_any_order_are_right(tmp_path):
    text = as_text(z=tensor(0, 8), empty=tensor(8, 8, (0, 3)), a=tensor(12, 20), scalar=tensor(8, 12, ())).encode()
    (tmp_path / "x.safetensors").write_bytes(
        struct.pack("<Q", len(text)) + text + torch.arange(5, dtype=torch.float32).numpy().tobytes())
    targets = {"z": torch.zeros(2), "empty": torch.zeros(0, 3), "a": torch.zeros(2), "scalar": torch.zeros(())}
    weights.load({name: [target] for name, target in targets.items()}, weights.index(tmp_path), tmp_path)
    assert [targets[n].tolist() for n in ("z", "scalar", "a")] == [[0, 1], 2, [3, 4]]


def test_quantised_tensors_are_refused(tmp_path):
    save_file({"a\n": torch.zeros(2).to(torch.float8_e4m3fn)}, tmp_path / "x.safetensors")
    with refused(r"'a\\n' is stored as F8_E4M3; give a checkpoint in float32") as caught:
        weights.index(tmp_path)
    assert str(caught.value).isprintable()
    save_file({"a": torch.zeros(2, dtype=torch.uint8), "b\n": torch.zeros(1)}, tmp_path / "x.safetensors")
    with refused(r"a is torch.uint8, expected torch.float32; unexpected 'b\\n' \[1\]"):
        weights.load({"a": [torch.zeros(2)]}, weights.index(tmp_path), tmp_path)


@pytest.mark.parametrize("content", [
    {}, {"weight_map": ["a"]}, {"weight_map": {"a": 1}}, {"weight_map": {"a": None, "b": "c"}}])
def test_an_index_without_shards_is_refused(tmp_path, content):
    (tmp_path / "m.safetensors.index.json").write_text(json.dumps(content))
    with refused("m.safetensors.index.json: no index of shards"):
        weights.index(tmp_path)


def test_a_tensor_in_two_shards_is_refused(tmp_path):
    for name in ("1.safetensors", "2.safetensors"):
        save_file({"a": torch.zeros(1)}, tmp_path / name)
    (tmp_path / "m.safetensors.index.json").write_text(json.dumps(
        {"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}))
    with refused("2.safetensors: has 'a', which its index says is in '1.safetensors'"):
        weights.index(tmp_path)


def test_a_missing_shard_is_named(tmp_path):
    save_file({"a": torch.zeros(1)}, tmp_path / "m-00001-of-00002.safetensors")
    (tmp_path / "m.safetensors.index.json").write_text(json.dumps(
        {"weight_map": {"a": "m-00001-of-00002.safetensors", "b": "m-00002-of-00002.safetensors"}}))
    with refused("missing shards .*m-00002-of-00002.safetensors"):
        weights.index(tmp_path)


def test_half_precision_variants_beside_the_weights_are_ignored(tmp_path):
    for name, value in (("model.safetensors", 1.0), ("model.fp16.safetensors", 2.0)):
        save_file({"a": torch.full((1,), value)}, tmp_path / name)
    target = torch.zeros(1)
    weights.load({"a": [target]}, weights.index(tmp_path), tmp_path)
    assert target == 1
    (tmp_path / "model.safetensors").unlink()
    with refused("only model.fp16.safetensors, a half-precision copy; download the files without fp16"):
        weights.index(tmp_path)


class Grouped(torch.nn.Module):
    """Grouped-query attention as in Qwen2.5: q has more rows than k and v."""

    def __init__(self):
        super().__init__()
        self.qkv_proj, self.o_proj = torch.nn.Linear(4, 8), torch.nn.Linear(4, 4, bias=False)
        self.gate_up_proj, self.norm = torch.nn.Linear(4, 6), torch.nn.LayerNorm(4)


FUSED = {"qkv_proj": {"q_proj": 4, "k_proj": 2, "v_proj": 2}, "gate_up_proj": ("gate_proj", "up_proj")}


def test_fused_projections_are_split_into_their_published_names():
    layers = torch.nn.ModuleList([Grouped()])
    views = weights.named_views(layers, FUSED)
    assert {name.removeprefix("0."): shape for name, shape in weights.shapes(views).items()} == {
        "q_proj.weight": (4, 4), "k_proj.weight": (2, 4), "v_proj.weight": (2, 4), "q_proj.bias": (4,), "k_proj.bias": (2,),
        "v_proj.bias": (2,), "o_proj.weight": (4, 4), "gate_proj.weight": (3, 4), "up_proj.weight": (3, 4),
        "gate_proj.bias": (3,), "up_proj.bias": (3,), "norm.weight": (4,), "norm.bias": (4,)}
    assert torch.equal(views["0.v_proj.weight"][0], layers[0].qkv_proj.weight[6:])
    assert weights.projections("model.layers.0.gate_up_proj", 6, FUSED) == {
        "model.layers.0.gate_proj": 3, "model.layers.0.up_proj": 3}
    assert weights.projections("qkv_proj", 8, FUSED) == FUSED["qkv_proj"]
    assert weights.projections("a.o_proj", 4, FUSED) == {"a.o_proj": 4}


class Code:
    def __reduce__(self):
        return print, ("it runs",)


def test_a_pickle_gives_its_tensors_alone_to_fused_layers_and_runs_no_code(tmp_path, capsys):
    model = torch.nn.Module()
    model.qkv = torch.nn.Linear(4, 6)
    tensors = {f"{name}.{kind}": torch.randn(2, *rest) for name in "qkv" for kind, rest in (("weight", [4]), ("bias", []))}
    torch.save({"epoch": 3, "state_dict": tensors | {"step": 7}}, tmp_path / "model.pt")
    path, entries = weights.find_tensors(tmp_path, "model.pt")
    assert path == tmp_path / "model.pt" and entries.keys() == tensors.keys()
    weights.load(weights.named_views(model, {"qkv": ("q", "k", "v")}), entries, path)
    for kind in ("weight", "bias"):
        assert torch.equal(getattr(model.qkv, kind), torch.cat([tensors[f"{name}.{kind}"] for name in "qkv"]))
    save_file(tensors, tmp_path / "model.safetensors")  # once converted, that is read
    assert weights.find_tensors(tmp_path, "model.pt")[0].name == "model.safetensors"
    for content, message in ((Code(), "not a file of plain tensors"), (None, "no other.pt in it; give the file")):
        if content is not None:
            torch.save(content, tmp_path / "other.pt")
        with pytest.raises(UserError, match=message):
            weights.find_tensors(tmp_path, "other.pt")
        (tmp_path / "other.pt").unlink(missing_ok=True)
    assert "it runs" not in capsys.readouterr().out


def test_names_are_rewritten_by_a_table():
    views = weights.renamed({"blocks.3.q.weight": [], "norm.weight": []},
                            [(r"^blocks\.(\d+)\.", r"encoder.\1."), (r"^norm\.", "final."), (r"\.q\.", ".to_q.")])
    assert list(views) == ["encoder.3.to_q.weight", "final.weight"]


@pytest.mark.parametrize("source", ["./nowhere", "/nowhere/at/all", "nowhere.safetensors", "a/b/c", "plain"])
def test_a_path_that_is_no_hub_id_is_not_asked_of_the_hub(source):
    with refused("no such file or folder"):
        weights.find(source, "vae")


def hub_error(kind):
    """An error as huggingface_hub raises it, built without the network response that its constructor wants."""
    error = getattr(errors, kind).__new__(getattr(errors, kind))
    Exception.__init__(error, "refused")
    return error


@pytest.mark.parametrize("kind, advice", [
    ("GatedRepoError", "accept its licence"), ("RepositoryNotFoundError", "spelling"),
    ("LocalEntryNotFoundError", "cannot be reached"), ("HfHubHTTPError", "broke off")])
def test_hub_errors_say_what_to_do(monkeypatch, kind, advice):
    def fail(*_, **__):
        raise hub_error(kind)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with refused(advice) as caught:
        weights.find("owner/name", "vae")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("error", [
    httpx2.RemoteProtocolError("peer closed connection without sending complete message body (received 5 bytes, expected 9)"),
    httpx2.ReadTimeout("The read operation timed out"), RuntimeError("Data processing error: CAS service error"),
    OSError("Consistency check failed: file should be of size 9 but has size 5")])
def test_a_download_that_breaks_off_is_one_line_that_says_how_to_go_on(monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with refused("broke off .*the same command goes on where it was") as caught:
        weights.find("owner/name", "vae")
    assert "\n" not in str(caught.value) and str(error)[:30] in str(caught.value)


def test_a_disk_that_a_download_has_filled_is_no_matter_of_the_hub(monkeypatch):
    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(OSError, match="No space left on device: '.+hub'"):
        weights.find("owner/name", "vae")


def test_a_fingerprint_tells_models_by_header_values_and_configuration_and_not_by_place_and_time(tmp_path):
    def write(name, config="{}", dtype=torch.float32, **change):
        folder = tmp_path / name
        values = torch.arange(500_000.0)  # 64 samples of 1,024 bytes lie 31 KB apart
        weights.save(folder / "model.safetensors", {"x": [values + change.get("add", 0)], change.get("second", "y"): [torch.ones(3)]}, dtype)
        (folder / "config.json").write_text(config)
        return weights.fingerprint([folder])

    first = write("a")
    shutil.copytree(tmp_path / "a", tmp_path / "copy")
    assert weights.fingerprint([tmp_path / "copy"]) == write("again") == first
    others = [write("b", config='{"depth": 2}'), write("c", add=1), write("d", second="z"), write("e", dtype=torch.float16)]
    others.append(weights.fingerprint([tmp_path / "a", tmp_path / "a"]))
    assert len({first, *others}) == 6


def test_the_hub_is_asked_for_one_component_without_half_precision_copies(monkeypatch, tmp_path):
    (tmp_path / "vae").mkdir()
    asked = {}
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **options: asked.update(options) or str(tmp_path))
    assert weights.find("owner/name", "vae") == tmp_path / "vae"
    assert asked["allow_patterns"] == ["vae/*"] and "*fp16*" in asked["ignore_patterns"]


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "x.safetensors"
    weights.save(path, {"a": [torch.ones(3)]})

    def fail(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(weights, "save_file", fail)
    with pytest.raises(KeyboardInterrupt):
        weights.save(path, {"a": [torch.zeros(3)]})
    assert load_file(path)["a"].sum() == 3


LOAD = """
import sys, torch, mmdit
def kilobytes(key):
    return int(next(line for line in open("/proc/self/status") if line.startswith(key)).split()[1])
before = kilobytes("VmRSS")
model = mmdit.MMDiT.from_pretrained(sys.argv[1])
size = sum(t.numel() * t.element_size() for t in model.state_dict().values())
print((kilobytes("VmHWM") - before) * 1024 / size)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
@pytest.mark.parametrize("file_dtype", [torch.float32, torch.bfloat16])
def test_loading_needs_little_more_memory_than_the_model(tmp_path, file_dtype):
    config = mmdit.MMDiTConfig(depth=12, heads=10, head_dim=64, context_dim=256, pooled_dim=128, positions=32)
    model = mmdit.MMDiT(config)
    assert sum(t.numel() for t in model.state_dict().values()) * 4 > 500e6
    model.save_pretrained(tmp_path / "transformer", file_dtype)
    del model
    done = subprocess.run([sys.executable, "-c", LOAD, str(tmp_path)], cwd=Path(mmdit.__file__).parent,
                          capture_output=True, text=True, check=True)
    assert float(done.stdout) <= 1.15


@pytest.mark.parametrize("config, message", [
    ({"num_single_layers": 10**9}, "num_single_layers is 1000000000, expected a whole number in 1..1,000"),
    ({"num_layers": 10**9}, "num_layers is 1000000000, expected a whole number in 1..1,000"),
    ({"num_attention_heads": 0}, "num_attention_heads is 0"), ({"vision_config": {"depth": 2.5}}, "depth is 2.5"),
    ({"text_config": {"hidden_size": "wide"}}, "hidden_size is 'wide'"), ({"vocab_size": True}, "vocab_size is True")])
def test_sizes_that_no_model_has_are_refused_before_anything_is_built(tmp_path, config, message):
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=message):
        weights.read_config(tmp_path / "config.json")


def test_a_model_that_does_not_fit_its_file_is_refused_before_memory_is_asked_for(tmp_path, monkeypatch):
    save_file({"weight": torch.zeros(2, 3), "bias": torch.zeros(2)}, tmp_path / "model.safetensors")
    monkeypatch.setattr(torch.nn.Module, "to_empty", None)
    with pytest.raises(UserError, match=r"weight is \[2, 3\], expected \[100000000, 100000000\]"):
        weights.build(lambda: torch.nn.Linear(10**8, 10**8), weights.named_views, weights.index(tmp_path), tmp_path)
