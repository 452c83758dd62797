"""The LoRA module, and adapters in peft's layout."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from parts import lora
from parts.cli import UserError
from parts.files import read_json, write_json


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
    torch.testing.assert_close(model(x), on, rtol=1e-5, atol=1e-4)


def test_an_adapter_is_on_again_after_an_error():
    model, x = adapted(), torch.randn(7, 6)
    on = model(x)
    with pytest.raises(ZeroDivisionError), lora.lora_disabled(model):
        1 / 0  # noqa: B018
    assert torch.equal(model(x), on)


def test_an_adapter_that_is_written_again_has_the_same_bytes(tmp_path):
    files = [lora.ADAPTER_FILE, lora.DIFFUSERS_FILE, "adapter_config.json"]
    written = set()
    for _ in range(10):
        lora.save_lora(tmp_path, adapted(), "owner/name", diffusers=True)
        written.add(b"".join((tmp_path / name).read_bytes() for name in files))
    assert len(written) == 1


def test_a_saved_adapter_is_read_back(tmp_path):
    model, x = adapted(), torch.randn(7, 6)
    lora.save_lora(tmp_path, model, "owner/name")
    again = Pair()
    for path in ("fused", "plain"):
        again.get_submodule(path).load_state_dict(model.get_submodule(path).linear.state_dict())
    lora.load_lora(tmp_path, again, TARGETS)
    torch.testing.assert_close(again(x), model(x), rtol=1e-5, atol=1e-4)


def test_an_adapter_may_change_some_of_the_layers_only(tmp_path):
    part = Pair()
    lora.add_lora(part, {"fused": TARGETS["fused"]}, 2, 4.0)
    lora.save_lora(tmp_path, part, "owner/name")
    assert list(lora.layers_in(tmp_path, TARGETS)) == ["fused"]
    whole = Pair()
    before = whole.plain.weight.clone()
    lora.load_lora(tmp_path, whole, TARGETS)
    assert torch.equal(whole.plain.weight, before)


def test_an_adapter_may_change_some_of_the_projections_that_a_layer_fuses(tmp_path):
    lora.save_lora(tmp_path, adapted(), "owner/name")
    file = tmp_path / lora.ADAPTER_FILE
    tensors = {name: t for name, t in load_file(file).items() if "at.first" not in name}
    save_file(tensors, file)
    model, plain = adapted(seed=1), Pair()
    lora.fill_lora(tmp_path, model)
    assert not model.fused.B[0].any() and torch.equal(model.fused.B[1], adapted().fused.B[1])
    before = plain.fused.weight.clone()
    lora.load_lora(tmp_path, plain, TARGETS)
    assert torch.equal(plain.fused.weight[:3], before[:3]) and not torch.equal(plain.fused.weight[3:], before[3:])
    save_file({name: t for name, t in tensors.items() if "at.second.lora_A" not in name}, file)
    with pytest.raises(UserError, match="missing base_model.model.at.second.lora_A.weight"):
        lora.load_lora(tmp_path, Pair(), TARGETS)


def test_a_file_of_diffusers_says_rank_and_alpha_or_alpha_is_the_rank(tmp_path):
    lora.save_lora(tmp_path / "both", adapted(), "owner/name", diffusers=True)
    file = tmp_path / lora.DIFFUSERS_FILE
    tensors = load_file(tmp_path / "both" / lora.DIFFUSERS_FILE)
    for said, alpha in (({"r": 2, "lora_alpha": 6}, 6), (None, 2)):
        config = {f"transformer.{key}": value for key, value in said.items()} if said else None
        save_file(tensors, file, said and {"lora_adapter_metadata": json.dumps(config)})
        adapter = lora.read_adapter(file)
        assert (adapter.rank, adapter.alpha) == (2, alpha)
    for text, message in (("[1]", "no usable r"), ("{", "no usable r"), ('{"transformer.r": 3, "transformer.lora_alpha": 3}', "r is 3"),
                          ('{"transformer.r": 2, "transformer.lora_alpha": 3, "transformer.use_dora": true}', "use_dora")):
        save_file(tensors, file, {"lora_adapter_metadata": text})
        with pytest.raises(UserError, match=f"pytorch_lora_weights.safetensors: .*{message}"):
            lora.read_adapter(tmp_path)
    save_file({"x": torch.ones(2)}, file)
    with pytest.raises(UserError, match="no tensor named"):
        lora.read_adapter(file)


def test_peft_s_file_alone_stands_for_its_folder(tmp_path):
    lora.save_lora(tmp_path, adapted(), "owner/name")
    assert lora.read_adapter(tmp_path / lora.ADAPTER_FILE) == lora.read_adapter(tmp_path)


def test_a_new_adapter_changes_nothing_and_its_a_is_gaussian():
    model = torch.nn.Sequential(torch.nn.Linear(400, 30))
    x = torch.randn(5, 400)
    before = model(x)
    lora.add_lora(model, {"0": {"0": 30}}, 20, 40.0)
    assert torch.equal(model(x), before)
    assert float(model[0].A.detach().std()) == pytest.approx(1 / 20, rel=0.05) and float(model[0].A.detach().abs().max()) > 2.5 / 20


def test_the_adapter_of_a_run_is_its_final_one_else_its_newest(tmp_path):
    run = tmp_path / "run"
    assert lora.adapter_in(None) is None and lora.adapter_in("owner/name") == "owner/name"
    assert lora.adapter_in(run) == run
    run.mkdir()
    (run / "log.jsonl").write_text("")
    with pytest.raises(UserError, match="has written no adapter yet"):
        lora.adapter_in(run)
    for step in (2, 10):
        lora.save_lora(run / "adapters" / f"{step:08d}", adapted(), "owner/name")
    (run / "adapters" / "00000011").mkdir()  # not written to its end
    assert lora.adapter_in(str(run)) == run / "adapters" / "00000010"
    assert lora.adapter_in(run / "adapters" / "00000002") == run / "adapters" / "00000002"
    lora.save_lora(run / "adapter", adapted(), "owner/name")
    assert lora.adapter_in(run) == run / "adapter"


def test_an_adapter_fills_layers_of_its_own_rank_and_alpha_only(tmp_path):
    lora.save_lora(tmp_path, adapted(), "owner/name")
    model = adapted(seed=1)
    lora.fill_lora(tmp_path, model)
    assert torch.equal(model.fused.A, adapted().fused.A) and model.fused.A.requires_grad
    with pytest.raises(UserError, match="rank 2 and alpha 6, not 2 and 4; give --lora-rank 2 --lora-alpha 6"):
        lora.fill_lora(tmp_path, adapted(alpha=4))


@pytest.mark.parametrize("change, message", [
    ({"r": None}, "no usable r"), ({"r": 0}, "r is 0"), ({"lora_alpha": "much"}, "no usable r"),
    ({"use_rslora": True}, "use_rslora is not supported"), ({"alpha_pattern": {"q": 4}}, "alpha_pattern")])
def test_an_adapter_that_would_be_read_wrongly_is_refused(tmp_path, change, message):
    lora.save_lora(tmp_path, adapted(), "owner/name")
    write_json(tmp_path / "adapter_config.json", read_json(tmp_path / "adapter_config.json") | change)
    with pytest.raises(UserError, match=message):
        lora.load_lora(tmp_path, Pair(), TARGETS)


@pytest.mark.parametrize("begun", [True, False, "gaussian", "orthogonal"])
def test_an_adapter_may_begin_in_any_way_that_leaves_the_base_as_it_is(tmp_path, begun):
    lora.save_lora(tmp_path, adapted(), "owner/name")
    write_json(tmp_path / "adapter_config.json", read_json(tmp_path / "adapter_config.json") | {"init_lora_weights": begun})
    lora.load_lora(tmp_path, Pair(), TARGETS)


def test_an_adapter_of_other_layers_is_refused(tmp_path):
    lora.save_lora(tmp_path, adapted(), "owner/name")
    with pytest.raises(UserError, match="unexpected 'base_model.model.at.last.lora_A.weight'"):
        lora.load_lora(tmp_path, Pair(), {"fused": TARGETS["fused"]})


@pytest.mark.parametrize("change, message", [
    ({"r": 10**9}, "r is 1000000000"), ({"r": 3}, "the file's ranks are .2."), ({"r": 0}, "r is 0"), ({"lora_alpha": float("nan")}, "lora_alpha nan"),
    ({"peft_type": "LOHA"}, "peft_type is 'LOHA'"), ({"use_rslora": True}, "use_rslora"), ({"alpha_pattern": {"x": 2}}, "alpha_pattern"),
    ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights 'pissa_niter_4' changes the base model"),
    ({"init_lora_weights": "olora"}, "changes the base model")])
def test_an_adapter_that_would_be_merged_at_the_wrong_strength_is_refused(tmp_path, change, message):
    lora.save_lora(tmp_path, adapted(), "owner/name")
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=message):
        lora.load_lora(tmp_path, Pair(), TARGETS)


def test_adapters_may_stand_on_adapters_but_not_on_themselves(tmp_path):
    for name, base in (("first", "owner/name"), ("second", tmp_path / "first"), ("own", tmp_path / "own"),
                       ("a", tmp_path / "b"), ("b", tmp_path / "a")):
        lora.save_lora(tmp_path / name, adapted(), base)
    assert lora.base_of(tmp_path / "second") == str(tmp_path / "first") and lora.base_of(tmp_path / "first") == "owner/name"
    for name in ("own", "a", "b"):
        with pytest.raises(UserError, match="leads back to an adapter"):
            lora.base_of(tmp_path / name)
