"""LoRA: a frozen model with a small trained change (Hu et al. 2021), in peft's file layout.

    targets = {"layers.0.qkv": {"layers.0.q": 64, "layers.0.k": 64, "layers.0.v": 64}}
    add_lora(model, targets, rank=32, alpha=64)
    save_lora("adapter", model, base="owner/name")

`targets` are {path of a linear layer: {peft's name of a projection in it: its rows}}, as
`weights.projections` gives them. peft puts a change of its own on each published projection, so a
fused layer here gets one change for each projection that it fuses.
"""

import os
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from parts import ops
from parts.cli import UserError
from parts.files import read_json, write_json
from parts.weights import index, load, own_rows, save

ADAPTER_FILE = "adapter_model.safetensors"
MOST_ALPHA = 10**6


@ops.fusable
def add_change(y, x, A, B, scale):
    """y + scale·B·A·x [...,rows]: x [...,in], A [projections·rank,in], B: [rows,rank] of each."""
    # All A in one product, as they read the same x; then each projection's own B.
    low = F.linear(x.to(A.dtype), A)  # [...,projections·rank]
    low = low.split(len(A) // len(B), dim=-1)
    change = torch.cat([F.linear(z, own) for z, own in zip(low, B, strict=True)], dim=-1)
    return y + (scale * change).to(y.dtype)


class LoRA(nn.Module):
    """y = W·x + alpha/rank · B·A·x around a linear layer W, with a B·A for each projection in it.

    rows: {peft's name: outputs} of the projections. Each has its own A [rank,in] and B [rows,rank],
    as if the projections were separate layers. A and B are float32 whatever W is: a step of the
    optimizer is smaller than what bfloat16 can tell apart.
    """

    def __init__(self, linear, rows, rank, alpha):
        super().__init__()
        device = linear.weight.device
        self.linear = linear
        self.names = tuple(rows)  # for the files
        self.rank = rank
        self.alpha = alpha
        self.enabled = True
        self.A = nn.Parameter(torch.empty(len(rows) * rank, linear.in_features, device=device))
        self.B = nn.ParameterList(torch.zeros(n, rank, device=device) for n in rows.values())
        nn.init.normal_(self.A, std=1 / rank)  # B = 0, so at first nothing is changed

    # What reads a layer's weights without calling it finds them where nn.Linear has them.
    @property
    def weight(self):
        return self.linear.weight

    @property
    def bias(self):
        return self.linear.bias

    def forward(self, x):
        if not self.enabled:
            return self.linear(x)
        x = x.contiguous()  # or both the layer and its change would make a copy of a slice
        y = self.linear(x)
        return add_change(y, x, self.A, list(self.B), self.alpha / self.rank)

    def pairs(self):
        """[(peft's name, A [rank,in], B [rows,rank])] of the projections."""
        return list(zip(self.names, self.A.split(self.rank), self.B, strict=True))


def add_lora(model, targets, rank, alpha):
    """Freeze a model and put a LoRA around each linear layer of `targets`."""
    model.requires_grad_(False)  # before the new parameters, which are trained
    for path, rows in targets.items():
        model.set_submodule(path, LoRA(model.get_submodule(path), rows, rank, alpha))


def lora_layers(model):
    """{path: LoRA} of a model."""
    return {path: layer for path, layer in model.named_modules() if isinstance(layer, LoRA)}


@contextmanager
def lora_disabled(model):
    """Within it the model is what it was before `add_lora`: the reference of the KL terms."""
    layers = lora_layers(model).values()
    for layer in layers:
        layer.enabled = False
    try:
        yield
    finally:  # also after an error, or training would go on without the adapter
        for layer in layers:
            layer.enabled = True


@torch.no_grad()
def merge_lora(model):
    """Add every LoRA's change to its weight and take the LoRA away."""
    for path, layer in lora_layers(model).items():
        change = torch.cat([B @ A for _, A, B in layer.pairs()])  # [rows,in]
        change = (layer.alpha / layer.rank * change).to(layer.weight.dtype)
        rows, before = own_rows(layer.weight)  # of sharded weights each process changes its own
        rows.add_(change[before:before + len(rows)])
        model.set_submodule(path, layer.linear)


# --------------------------------------------------------------------------------------------------
# Files


def lora_views(model):
    """Views of the adapter alone, under peft's names."""
    views = {}
    for layer in lora_layers(model).values():
        for name, A, B in layer.pairs():
            views[f"base_model.model.{name}.lora_A.weight"] = [A]
            views[f"base_model.model.{name}.lora_B.weight"] = [B]
    return views


def save_lora(folder, model, base):
    """Write a model's adapter as peft does. base: folder or hub id of the model it belongs to."""
    layers = lora_layers(model).values()
    first = next(iter(layers))
    save(Path(folder) / ADAPTER_FILE, lora_views(model))
    write_json(Path(folder) / "adapter_config.json", {
        "peft_type": "LORA", "base_model_name_or_path": str(base), "r": first.rank,
        "lora_alpha": first.alpha, "lora_dropout": 0.0, "bias": "none",
        "target_modules": sorted({name for layer in layers for name in layer.names})})


def config_in(source):
    """The adapter_config.json of a folder; None if there is none, as for a hub id."""
    # os.path says no to what can be no path, such as 5,000 letters; Path would raise.
    file = Path(os.path.expanduser(source)) / "adapter_config.json"
    return file if os.path.isfile(file) else None


def base_of(folder):
    """The model that the adapter in a folder belongs to, or None if none is there."""
    file = Path(folder) / "adapter_config.json"
    if not file.exists():
        return None
    base = read_json(file).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise UserError(f"{file}: no base_model_name_or_path; add the folder or hub id of the "
                        f"model this adapter belongs to")
    # The base may be an adapter itself, trained further, but not one that leads back to this one.
    seen = {Path(folder).resolve()}
    following = base
    while (path := config_in(following)) is not None:
        if path.parent.resolve() in seen:
            raise UserError(f"{file}: base_model_name_or_path {base!r} leads back to an adapter; "
                            f"give the model that it belongs to")
        seen.add(path.parent.resolve())
        following = str(read_json(path).get("base_model_name_or_path"))
    return base


def adapter_in(source):
    """The adapter of a run, if `source` is the folder of one of train_gen.py; else `source`.

    It is the final one, or the newest of those in adapters/. Raises UserError if there is none.
    """
    run = Path(source or "").expanduser()
    if source is None or not (run / "log.jsonl").exists():
        return source
    folders = [run / "adapter", *sorted(run.glob("adapters/*"), reverse=True)]
    # The config is written last, so an adapter that has one is whole.
    whole = [folder for folder in folders if (folder / "adapter_config.json").exists()]
    if not whole:
        raise UserError(f"{source}: this run has written no adapter yet; wait for its first "
                        f"checkpoint")
    return whole[0]


def rank_and_alpha(folder):
    """Of the adapter in a folder. Raises UserError if its change is not alpha/rank · B·A."""
    file = Path(folder) / "adapter_config.json"
    config = read_json(file)
    try:
        rank = config["r"]
        alpha = config["lora_alpha"]
        if type(rank) is not int or rank < 1 or type(alpha) not in (int, float):
            raise ValueError(f"r is {rank!r:.80} and lora_alpha {alpha!r:.80}")
        if config.get("peft_type", "LORA") != "LORA":
            raise ValueError(f"peft_type is {config['peft_type']!r:.80}")
        # These change the formula without changing any tensor, so nothing else would notice them.
        for option in ("use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "fan_in_fan_out"):
            if config.get(option):
                raise ValueError(f"{option} is not supported")
        ranks = {entry.shape[0] for name, entry in index(Path(folder) / ADAPTER_FILE).items()
                 if ".lora_A." in name and entry.shape}
        if {rank} != ranks or not abs(alpha) <= MOST_ALPHA:  # NaN is no alpha, either
            raise ValueError(f"r is {rank} and lora_alpha {alpha!r:.80}, the file's ranks are "
                             f"{sorted(ranks)}")
    except (KeyError, ValueError) as error:
        raise UserError(
            f"{file}: no usable r and lora_alpha ({error}); give an adapter of plain LoRA"
        ) from error
    return rank, float(alpha)


def layers_in(folder, targets):
    """Those of `targets` that the adapter in a folder changes; all, if it changes none of them."""
    rank_and_alpha(folder)  # refuses a folder that holds no adapter
    in_file = {name.partition(".lora_")[0] for name in index(Path(folder) / ADAPTER_FILE)}
    changed = {path: rows for path, rows in targets.items()
               if any(f"base_model.model.{name}" in in_file for name in rows)}
    return changed or targets  # for none of them `fill_lora` says what is wrong


def fill_lora(folder, model):
    """Give a model's LoRA layers the values of an adapter that `save_lora` or peft wrote.

    Raises UserError for an adapter of other layers, or of another rank or alpha.
    """
    rank, alpha = rank_and_alpha(folder)
    first = next(iter(lora_layers(model).values()))
    if (rank, alpha) != (first.rank, first.alpha):
        raise UserError(f"{folder}: an adapter of rank {rank} and alpha {alpha:g}, not "
                        f"{first.rank} and {first.alpha:g}; give --lora-rank {rank} "
                        f"--lora-alpha {alpha:g}")
    load(lora_views(model), index(Path(folder) / ADAPTER_FILE), folder)


def load_lora(folder, model, targets):
    """Merge an adapter that `save_lora` or peft wrote into the weights of a model.

    targets: the layers that it may change. Raises UserError.
    """
    # An adapter that is on and one that is merged give one sum, but a merged one costs no time.
    add_lora(model, layers_in(folder, targets), *rank_and_alpha(folder))
    fill_lora(folder, model)
    merge_lora(model)
