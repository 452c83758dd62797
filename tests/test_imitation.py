"""The controls of reward feedback: imitation raises the probability of guided pictures, with no judge or with one."""

import pytest
import torch
from safetensors.torch import load_file

import flow_grpo
from parts import lora
from parts.files import read_json
from parts.pipeline import TINY, load_generator
from tiny import imitation
from tiny.dataset import write_tiny

SMALL = "--steps 2 --group 2".split()


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dataset")
    write_tiny(folder, train=16, test=2, seed=8)
    return folder


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(imitation, "SIZE", 64)
    monkeypatch.setattr(imitation, "PROMPTS", 4)


@pytest.mark.parametrize("flags", [[], ["--rewarded"]])
def test_a_run_leaves_an_adapter_that_differs_from_none(dataset, tmp_path, flags):
    assert imitation.main(["--data", str(dataset), "--out", str(tmp_path), *SMALL, *flags]) == 0
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert any(t.any() for name, t in tensors.items() if "lora_B" in name)
    assert read_json(tmp_path / "adapter" / "adapter_config.json")["base_model_name_or_path"] == "tiny/weights"


def test_guided_steps_become_likelier_and_the_policys_own_keep_the_ratio_of_one():
    generator = load_generator(TINY)
    model = generator.mmdit
    torch.manual_seed(0)
    lora.add_lora(model, model.lora_targets(), 4, 8.0)
    settings = flow_grpo.SDESettings(4, 4.5, generator.shift, 0.7, stochastic=range(4), trained=range(3))
    prompts, guides = ["a swan on the lake, valence 2.0, arousal 8.0"] * 2, ["a swan on the lake, tragic, storm"] * 2
    trajectory, texts = imitation.draw(generator, prompts, guides, [1, 2], settings)
    before = torch.stack([kept.log_prob for kept in trajectory.steps])
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.02)
    imitation.update(model, trajectory, texts, torch.ones(2), 6)
    optimizer.step()
    after = torch.stack([flow_grpo.evaluate_step(model, trajectory, k, *texts).log_prob.detach() for k in range(3)])
    assert after.mean() > before.mean()
    own, texts = imitation.draw(generator, prompts, prompts, [1, 2], settings)
    assert all(torch.equal(kept.log_prob, flow_grpo.evaluate_step(model, own, k, *texts).log_prob.detach())
               for k, kept in enumerate(own.steps))
