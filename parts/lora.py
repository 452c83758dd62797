"""LoRA: a frozen model with a small trained change (Hu et al. 2021); files of peft and diffusers.

    targets = {"layers.0.qkv": {"layers.0.q": 64, "layers.0.k": 64, "layers.0.v": 64}}
    add_lora(model, targets, rank=32, alpha=64)
    save_lora("adapter", model, base="owner/name")

`targets` are {path of a linear layer: {peft's name of a projection in it: its rows}}, as
`weights.projections` gives them. peft puts a change of its own on each published projection, so a
fused layer here gets one change for each projection that it fuses.
"""

import json
import os
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from parts import ops
from parts.cli import UserError
from parts.files import kind_of, read_json, write_json
from parts.weights import find, index, load, own_rows, read_metadata, save

ADAPTER_FILE = "adapter_model.safetensors"  # peft's
ADAPTER_PREFIX = "base_model.model."  # of its tensors' names
DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"  # that its `load_lora_weights` looks for
DIFFUSERS_PREFIX = "transformer."  # the component of a pipeline that an adapter changes
DIFFUSERS_CONFIG = "lora_adapter_metadata"  # peft's configuration, in the file's own metadata
PER_TENSOR = 150  # bytes of its name, type and place in the files of an adapter
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


def lora_views(model, prefix=ADAPTER_PREFIX):
    """Views of the adapter alone, under peft's names, or diffusers' by another prefix."""
    views = {}
    for layer in lora_layers(model).values():
        for name, A, B in layer.pairs():
            views[f"{prefix}{name}.lora_A.weight"] = [A]
            views[f"{prefix}{name}.lora_B.weight"] = [B]
    return views


def file_size(model):
    """Bytes of a model's adapter in its folder, to a few for each tensor."""
    views = lora_views(model).values()
    values = sum(part.numel() * part.element_size() for parts in views for part in parts)
    return values + PER_TENSOR * len(views)


def save_lora(folder, model, base, diffusers=False):
    """Write a model's adapter as peft does. base: folder or hub id of the model it belongs to.

    diffusers: the model is the transformer of a pipeline, so also write the file that
    `StableDiffusion3Pipeline.load_lora_weights(folder)` reads.
    """
    folder = Path(folder)
    layers = lora_layers(model).values()
    first = next(iter(layers))
    config = {
        "peft_type": "LORA", "base_model_name_or_path": str(base), "r": first.rank,
        "lora_alpha": first.alpha, "lora_dropout": 0.0, "bias": "none",
        "target_modules": sorted({name for layer in layers for name in layer.names})}
    save(folder / ADAPTER_FILE, lora_views(model))
    if diffusers:
        # Without this diffusers would take alpha for equal to the rank.
        said = json.dumps({DIFFUSERS_PREFIX + name: value for name, value in config.items()})
        views = lora_views(model, DIFFUSERS_PREFIX)
        save(folder / DIFFUSERS_FILE, views, metadata={DIFFUSERS_CONFIG: said})
    write_json(folder / "adapter_config.json", config)  # the last one, see `adapter_in`


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


def files_with_base(source):
    """What loading a model, or an adapter with the model it belongs to, reads, for hub.fetch."""
    base = None if source is None else base_of(Path(source).expanduser())
    return [(source, ["*"]), *([] if base is None else files_with_base(base))]


def with_base(source):
    """[local paths] of a model, or of an adapter and the models that it leads to."""
    paths = [find(source)]
    while (base := base_of(paths[-1])) is not None:
        paths.append(find(base))
    return paths


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


@dataclass(frozen=True)
class Adapter:
    """An adapter in a file, of which only the header has been read."""
    file: Path
    entries: dict  # {name of a tensor: weights.Entry}
    prefix: str  # of these names; what follows is diffusers' or Qwen's name of a projection
    rank: int
    alpha: float


def read_adapter(source):
    """The Adapter in a folder that peft or diffusers has written, or in diffusers' file.

    Raises UserError if its change is not alpha/rank · B·A.
    """
    # 1. whose it is; a folder with both files has the same adapter twice
    source = Path(source)
    if source.name == ADAPTER_FILE:
        source = source.parent  # peft's configuration lies beside it
    file = source if source.is_file() else source / DIFFUSERS_FILE
    if file.is_file() and not (source / "adapter_config.json").exists():
        said_in = file
        prefix = DIFFUSERS_PREFIX
        entries = index(file)
        said = read_metadata(file).get(DIFFUSERS_CONFIG, "{}")
    else:
        said_in = source / "adapter_config.json"
        if source.is_dir() and not said_in.exists():
            raise UserError(f"{source}: no adapter in this folder; "
                            f"{kind_of(source) or 'give a run of train_gen.py or its adapter/'}")
        prefix = ADAPTER_PREFIX
        said = json.dumps(read_json(said_in))
        file = source / ADAPTER_FILE
        entries = index(file)

    # 2. its rank and alpha
    ranks = sorted({entry.shape[0] for name, entry in entries.items()
                    if ".lora_A." in name and entry.shape})
    try:
        if not ranks:
            raise ValueError("the file has no tensor named …lora_A…")
        config = {key.removeprefix(prefix): value for key, value in json.loads(said).items()}
        if said_in == file and not config:  # diffusers then multiplies B·A by 1
            config = {"r": ranks[0], "lora_alpha": ranks[0]}
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
        # Other ways to begin, such as pissa, take the first B·A out of the base model's weights.
        begun = config.get("init_lora_weights")
        if isinstance(begun, str) and begun not in ("gaussian", "orthogonal", "eva", "mica"):
            raise ValueError(f"init_lora_weights {begun!r:.80} changes the base model and is not "
                             f"supported")
        if [rank] != ranks or not abs(alpha) <= MOST_ALPHA:  # NaN is no alpha, either
            raise ValueError(f"r is {rank} and lora_alpha {alpha!r:.80}, the file's ranks are "
                             f"{ranks}")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{said_in}: no usable r and lora_alpha ({error}); give an adapter of plain LoRA"
        ) from error
    return Adapter(file, entries, prefix, rank, float(alpha))


def layers_in(source, targets):
    """Those of `targets` that an adapter changes; all, if it changes none of them."""
    adapter = read_adapter(source)
    in_file = {name.partition(".lora_")[0] for name in adapter.entries}
    changed = {path: rows for path, rows in targets.items()
               if any(adapter.prefix + name in in_file for name in rows)}
    return changed or targets  # for none of them `fill_lora` says what is wrong


def fill_lora(source, model):
    """Give a model's LoRA layers the values of an adapter that `read_adapter` reads.

    Raises UserError for an adapter of other layers, or of another rank or alpha.
    """
    adapter = read_adapter(source)
    layers = lora_layers(model).values()
    first = next(iter(layers))
    if (adapter.rank, adapter.alpha) != (first.rank, first.alpha):
        raise UserError(f"{source}: an adapter of rank {adapter.rank} and alpha {adapter.alpha:g}, "
                        f"not {first.rank} and {first.alpha:g}; give --lora-rank {adapter.rank} "
                        f"--lora-alpha {adapter.alpha:g}")
    views = lora_views(model, adapter.prefix)
    for layer in layers:
        for name, _, B in layer.pairs():
            names = [f"{adapter.prefix}{name}.lora_{part}.weight" for part in "AB"]
            # Of the projections that a layer fuses an adapter may change only some, say q and v.
            if adapter.entries.keys().isdisjoint(names):
                nn.init.zeros_(B)
                for each in names:
                    del views[each]
    load(views, adapter.entries, source)


def load_lora(source, model, targets):
    """Merge an adapter that `read_adapter` reads into the weights of a model.

    targets: the layers that it may change. Raises UserError.
    """
    adapter = read_adapter(source)
    # An adapter that is on and one that is merged give one sum, but a merged one costs no time.
    add_lora(model, layers_in(source, targets), adapter.rank, adapter.alpha)
    fill_lora(source, model)
    merge_lora(model)
