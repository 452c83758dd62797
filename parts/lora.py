"""LoRA: a frozen model with a small trained change (Hu et al. 2021), in peft's file layout."""

import math
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from parts.cli import UserError
from parts.files import read_json, write_json
from parts.weights import index, load, save


class LoRA(nn.Module):
    """A linear layer W and, for each of the projections fused in it, a trained change: y = W·x + alpha/rank · B·A·x.

    rows: outputs of each projection, e.g. those of q, k and v. Each has its own A [rank, in] and B [rows, rank], as if the
    projections were separate layers; B starts at 0. A and B are float32 whatever W is.
    """

    def __init__(self, linear, rows, rank, alpha):
        super().__init__()
        device = linear.weight.device
        self.linear, self.rank, self.scale, self.enabled = linear, rank, alpha / rank, True
        self.A = nn.Parameter(torch.empty(len(rows) * rank, linear.in_features, device=device))
        self.B = nn.ParameterList(torch.zeros(n, rank, device=device) for n in rows)
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))

    @property
    def weight(self):
        return self.linear.weight

    @property
    def bias(self):
        return self.linear.bias

    def forward(self, x):
        y = self.linear(x)
        if not self.enabled:
            return y
        low = F.linear(x.to(self.A.dtype), self.A).split(self.rank, dim=-1)
        change = torch.cat([F.linear(z, B) for z, B in zip(low, self.B, strict=True)], dim=-1)
        return y + (self.scale * change).to(y.dtype)


def add_lora(model, targets, rank, alpha):
    """Freeze a model and put a LoRA around the linear layers of `targets`, {module path: {peft's name: rows}}."""
    model.requires_grad_(False)
    for path, parts in targets.items():
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, LoRA(model.get_submodule(path), parts.values(), rank, alpha))


@contextmanager
def lora_disabled(model):
    """Within this context the model is the one it was before `add_lora`: the reference of the KL terms."""
    layers = [m for m in model.modules() if isinstance(m, LoRA)]
    for layer in layers:
        layer.enabled = False
    try:
        yield
    finally:
        for layer in layers:
            layer.enabled = True


def lora_views(model, targets):
    """Views of the adapter alone, under peft's names."""
    views = {}
    for path, parts in targets.items():
        layer = model.get_submodule(path)
        for name, A, B in zip(parts, layer.A.split(layer.rank), layer.B, strict=True):
            views |= {f"base_model.model.{name}.lora_A.weight": [A], f"base_model.model.{name}.lora_B.weight": [B]}
    return views


def save_lora(folder, model, targets, rank, alpha, base):
    """Write an adapter as peft does. base: folder or hub id of the model it belongs to."""
    save(Path(folder) / "adapter_model.safetensors", lora_views(model, targets))
    write_json(Path(folder) / "adapter_config.json", {
        "peft_type": "LORA", "base_model_name_or_path": str(base), "r": rank, "lora_alpha": alpha, "lora_dropout": 0.0,
        "bias": "none", "target_modules": sorted({name for parts in targets.values() for name in parts})})


def load_lora(folder, model, targets):
    """Read an adapter that `save_lora` or peft wrote for these targets, and merge it into the weights of the model."""
    config = read_json(Path(folder) / "adapter_config.json")
    try:
        rank, alpha = int(config["r"]), float(config["lora_alpha"])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{folder}/adapter_config.json: no usable r and lora_alpha ({error})") from error
    add_lora(model, targets, rank, alpha)
    load(lora_views(model, targets), index(Path(folder) / "adapter_model.safetensors"), folder)
    merge_lora(model)


@torch.no_grad()
def merge_lora(model):
    """Add every LoRA's change to its weight and take the LoRA away."""
    for path, layer in [(p, m) for p, m in model.named_modules() if isinstance(m, LoRA)]:
        change = torch.cat([B @ A for B, A in zip(layer.B, layer.A.split(layer.rank), strict=True)])
        layer.weight.add_((layer.scale * change).to(layer.weight.dtype))
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, layer.linear)
