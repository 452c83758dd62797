"""Finding, checking, reading and writing safetensors."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import errors
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import mmdit
from parts import lora, weights
from parts.cli import UserError
from parts.files import write_json


def refused(match):
    return pytest.raises(UserError, match=match)


def test_every_difference_is_named(tmp_path):
    save_file({"a": torch.zeros(2), "b": torch.zeros(3, 2), "extra": torch.zeros(1), "old.position_ids": torch.zeros(1)},
              tmp_path / "x.safetensors")
    views = {"a": [torch.zeros(2)], "b": [torch.zeros(3, 3)], "c": [torch.zeros(4)]}
    with refused("3 tensors") as caught:
        weights.load(views, weights.index(tmp_path), "x", optional=["*position_ids"])
    for text in ("missing c [4]", "b is [3, 2], expected [3, 3]", "unexpected extra [1]"):
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


def test_a_missing_shard_is_named(tmp_path):
    save_file({"a": torch.zeros(1)}, tmp_path / "m-00001-of-00002.safetensors")
    (tmp_path / "m.safetensors.index.json").write_text(json.dumps(
        {"weight_map": {"a": "m-00001-of-00002.safetensors", "b": "m-00002-of-00002.safetensors"}}))
    with refused("m-00002-of-00002.safetensors: missing"):
        weights.index(tmp_path)


def test_half_precision_variants_beside_the_weights_are_ignored(tmp_path):
    for name, value in (("model.safetensors", 1.0), ("model.fp16.safetensors", 2.0)):
        save_file({"a": torch.full((1,), value)}, tmp_path / name)
    target = torch.zeros(1)
    weights.load({"a": [target]}, weights.index(tmp_path), tmp_path)
    assert target == 1


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
    ("LocalEntryNotFoundError", "cannot be reached"), ("HfHubHTTPError", "cannot be reached")])
def test_hub_errors_say_what_to_do(monkeypatch, kind, advice):
    def fail(*_, **__):
        raise hub_error(kind)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with refused(advice) as caught:
        weights.find("owner/name", "vae")
    assert "\n" not in str(caught.value)


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
from parts import lora
from parts.cli import UserError
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


# ---------------------------------------------------------------------------------------------------------------------
# LoRA


class Pair(torch.nn.Module):
    """A fused layer of two projections (3 and 5 rows), then a plain one."""

    def __init__(self):
        super().__init__()
        self.fused, self.plain = torch.nn.Linear(6, 8), torch.nn.Linear(8, 4, bias=False)

    def forward(self, x):
        return self.plain(self.fused(x))


TARGETS = {"fused": {"at.first": 3, "at.second": 5}, "plain": {"at.last": 4}}


def adapted(seed=0, rank=2, alpha=6):
    torch.manual_seed(seed)
    model = Pair()
    lora.add_lora(model, TARGETS, rank, alpha)
    for p in model.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p)
    return model


def test_a_new_adapter_changes_nothing_and_only_it_is_trained():
    torch.manual_seed(0)
    model, x = Pair(), torch.randn(7, 6)
    before = model(x)
    lora.add_lora(model, TARGETS, 2, 4)
    assert torch.equal(model(x), before)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        "fused.A", "fused.B.0", "fused.B.1", "plain.A", "plain.B.0"}


def test_each_fused_projection_has_an_adapter_of_its_own():
    model, x = adapted(), torch.randn(7, 6)
    layer = model.fused
    first = 3.0 * layer.B[0] @ layer.A[:2] + layer.weight[:3]
    second = 3.0 * layer.B[1] @ layer.A[2:] + layer.weight[3:]
    torch.testing.assert_close(layer(x), x @ torch.cat([first, second]).T + layer.bias)


def test_switched_off_the_model_is_what_it_was_and_merged_it_gives_the_same():
    model, x = adapted(), torch.randn(7, 6)
    on = model(x)
    with lora.lora_disabled(model):
        torch.testing.assert_close(model(x), model.plain.linear(model.fused.linear(x)))
    assert torch.equal(model(x), on)
    lora.merge_lora(model)
    assert type(model.fused) is torch.nn.Linear
    torch.testing.assert_close(model(x), on)


def test_an_adapter_is_on_again_after_an_error():
    model, x = adapted(), torch.randn(7, 6)
    on = model(x)
    with pytest.raises(ZeroDivisionError), lora.lora_disabled(model):
        1 / 0  # noqa: B018
    assert torch.equal(model(x), on)


def test_a_saved_adapter_is_read_back(tmp_path):
    model, x = adapted(), torch.randn(7, 6)
    lora.save_lora(tmp_path, model, TARGETS, 2, 6, "owner/name")
    again = Pair()
    for path in ("fused", "plain"):
        again.get_submodule(path).load_state_dict(model.get_submodule(path).linear.state_dict())
    lora.load_lora(tmp_path, again, TARGETS)
    torch.testing.assert_close(again(x), model(x))
    with refused("no usable r"):
        write_json(tmp_path / "adapter_config.json", {"r": None})
        lora.load_lora(tmp_path, Pair(), TARGETS)
