"""Published weights, straight from safetensors files into a model, and back.

A checkpoint is a hub id, a folder, or one file. Every model describes how a published layout maps onto its own
parameters as `views`: {tensor name in the file: [destination tensors]}. The destinations are (slices of) parameters
whose concatenation along dimension 0 is the tensor of the file. That one idea covers fused projections (a file's
`to_q` fills the first third of our `qkv`), swapped halves (scale before shift), plain renames, and writing:
`save` concatenates the same views.

Bytes are read from the file into the parameter's own memory, tensor by tensor, so the peak is the size of the model
plus one tensor. Left out: pickled checkpoints (they execute code) and quantised tensors.
"""

import fnmatch
import json
import math
import os
import re
import struct
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from parts.cli import UserError
from parts.files import read_json

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
          "I64": torch.int64, "I32": torch.int32, "U8": torch.uint8, "BOOL": torch.bool}


# ---------------------------------------------------------------------------------------------------------------------
# Find


def find(source, component=None):
    """Local path of a checkpoint, or of one component of it (`transformer`, `vae`, `text_encoder`, …).

    source: a file, a folder (of the whole pipeline or of the component itself), or a hub id "owner/name".
    Returns a file, or a folder that holds the component's files. Raises UserError.
    """
    path = root(source, f"{component}/*" if component else "*")
    if path.is_file() or component is None:
        return path
    if (path / component).is_dir():
        return path / component
    if any((path / name).exists() for name in ("config.json", "tokenizer.json", "vocab.json")):
        return path
    raise UserError(f"{path}: no folder {component}/ in it; the checkpoint is incomplete, download it again "
                          f"or point to a complete one")


def find_file(source, name):
    """Local path of one file (`model_index.json`, `scheduler/…`) of a folder or hub id. Raises UserError."""
    path = root(source, name)
    if path.is_file() or not (path / name).is_file():
        raise UserError(f"{path}: no {name} in it; give the folder of a whole pipeline in the diffusers layout")
    return path / name


def root(source, wanted):
    """Local path of a whole checkpoint; of a hub id the files that match the pattern `wanted` are downloaded."""
    path = Path(source).expanduser()
    if path.exists():
        return path
    name = str(source)
    if name.count("/") != 1 or name.startswith((".", "/", "~")) or name.endswith(".safetensors"):
        raise UserError(f"{name}: no such file or folder; give a folder, a .safetensors file or a hub id "
                              f"like stabilityai/stable-diffusion-3.5-medium")
    return download(name, wanted)


def download(hub_id, wanted):
    """Fetch the files of a hub repository that match a pattern into the local cache; returns the repository's folder."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    unwanted = ["*fp16*", "*.bin", "*.msgpack", "*.h5", "*.onnx*"]
    try:
        return Path(snapshot_download(hub_id, allow_patterns=[wanted], ignore_patterns=unwanted))
    except GatedRepoError as error:
        raise UserError(f"{hub_id}: access is gated; accept its licence at https://huggingface.co/{hub_id} and "
                              f"run `hf auth login`") from error
    except RepositoryNotFoundError as error:
        raise UserError(f"{hub_id}: neither a local path nor a hub repository you can read; check the spelling, "
                              f"or run `hf auth login`") from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
        raise UserError(f"{hub_id}: not on this machine and the hub cannot be reached ({reason}); connect to the "
                              f"network, or download it elsewhere and give its folder") from error


def read_merges(path):
    """[(left, right)] of a merges.txt, whose first line is a version."""
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise UserError(f"{path}: missing; download the tokenizer again") from error
    return [tuple(line.split()) for line in lines if line.strip() and not line.startswith("#version")]


def read_config(folder):
    """The content of a folder's config.json."""
    return read_json(Path(folder) / "config.json")


# ---------------------------------------------------------------------------------------------------------------------
# Check


@dataclass(frozen=True)
class Entry:
    """One tensor in a file: where its bytes lie."""
    file: Path
    dtype: torch.dtype
    shape: tuple
    start: int
    nbytes: int


def index(path, prefix=""):
    """All tensors of a checkpoint without reading their data: {name without prefix: Entry}.

    path: a .safetensors file, or a folder with one file or a sharded index. Only names that start with `prefix`
    are kept. Raises UserError for a missing, truncated or foreign file.
    """
    entries = {}
    for file in files_of(Path(path)):
        for name, entry in read_header(file).items():
            if name.startswith(prefix):
                entries[name[len(prefix):]] = entry
    return entries


def files_of(path):
    """The safetensors files of a checkpoint, shards in order; half-precision variants beside them are ignored."""
    if path.is_file():
        return [path]
    indexes = sorted(p for p in path.glob("*.safetensors.index.json"))
    if indexes:
        shards = sorted(set(read_json(indexes[0])["weight_map"].values()))
        for shard in shards:
            if not (path / shard).exists():
                raise UserError(f"{path / shard}: missing, but {indexes[0].name} lists it; download it again")
        return [path / shard for shard in shards]
    files = sorted(p for p in path.glob("*.safetensors") if not fnmatch.fnmatch(p.name, "*.fp16.safetensors"))
    if len(files) != 1:
        found = ", ".join(p.name for p in files) or "none"
        raise UserError(f"{path}: expected one .safetensors file or an index of shards, found {found}")
    return files


def read_header(file):
    """{tensor name: Entry} of one safetensors file: 8 bytes of length, a JSON header, then the data."""
    size = file.stat().st_size
    try:
        with open(file, "rb") as f:
            length = struct.unpack("<Q", f.read(8))[0]
            if length > size:
                raise ValueError("header longer than the file")
            header = json.loads(f.read(length))
        header.pop("__metadata__", None)
        entries = {}
        for name, info in header.items():
            start, end = info["data_offsets"]
            entries[name] = Entry(file, DTYPES[info["dtype"]], tuple(info["shape"]), 8 + length + start, end - start)
    except (OSError, ValueError, KeyError, TypeError, struct.error) as error:
        raise UserError(f"{file}: not a readable safetensors file ({type(error).__name__}: {error}); "
                              f"download it again") from error
    expected = max((e.start + e.nbytes for e in entries.values()), default=0)
    if size < expected:
        raise UserError(f"{file}: truncated, {size:,} bytes of {expected:,}; download it again")
    return entries


def shapes(views):
    """{tensor name: shape} of the file that `views` describe."""
    return {name: (sum(t.shape[0] for t in targets), *targets[0].shape[1:]) if targets[0].dim() else ()
            for name, targets in views.items()}


def check(views, entries, what, optional=()):
    """Compare what a model needs with what a checkpoint holds; every difference is named in one UserError.

    optional: patterns of tensors that a published file may carry although no model uses them.
    """
    problems = []
    for name, expected in shapes(views).items():
        if name not in entries:
            problems.append(f"missing {name} {list(expected)}")
        elif entries[name].shape != expected:
            problems.append(f"{name} is {list(entries[name].shape)}, expected {list(expected)}")
    for name in entries:
        if name not in views and not any(fnmatch.fnmatch(name, pattern) for pattern in optional):
            problems.append(f"unexpected {name} {list(entries[name].shape)}")
    if problems:
        shown = "; ".join(problems[:12]) + (f"; and {len(problems) - 12} more" if len(problems) > 12 else "")
        raise UserError(f"{what}: {len(problems)} tensors do not fit this model: {shown}. "
                              f"Is it a checkpoint of another model?")


# ---------------------------------------------------------------------------------------------------------------------
# Read and write


def build(make, views, entries, what, device="cpu", dtype=None, optional=()):
    """The model that `make()` returns, filled from a checkpoint: allocated once, in its final dtype, frozen.

    views: function of the model that gives its views. entries, what, optional: as for `load`.
    dtype None: float32 on a CPU (bfloat16 is emulated there), bfloat16 elsewhere.
    """
    device = torch.device(device)
    with torch.device("meta"):
        model = make()
    dtype = dtype or (torch.float32 if device.type == "cpu" else torch.bfloat16)
    model = model.to(dtype).to_empty(device=device).eval().requires_grad_(False)
    load(views(model), entries, what, optional)
    return model


@torch.no_grad()
def load(views, entries, what, optional=()):
    """Check, then fill every view from its file: `check` names all that is missing, unexpected or misshapen."""
    check(views, entries, what, optional)
    by_file = {}
    for name in views:
        by_file.setdefault(entries[name].file, []).append(name)
    for file, names in by_file.items():
        with open(file, "rb", buffering=0) as f:
            for name in sorted(names, key=lambda n: entries[n].start):
                f.seek(entries[name].start)
                for target in views[name]:
                    read_into(f, target, entries[name].dtype, name)


def read_into(f, target, dtype, name):
    """Fill `target` with the next bytes of `f`, stored as `dtype`: in place if it can be, else through a buffer."""
    direct = target.device.type == "cpu" and target.dtype == dtype and target.is_contiguous()
    buffer = target if direct else torch.empty(target.shape, dtype=dtype)
    if not buffer.numel():
        return
    memory = memoryview(buffer.reshape(-1).view(torch.uint8).numpy())
    done = 0
    while done < len(memory):
        count = f.readinto(memory[done:])
        if not count:
            raise UserError(f"{f.name}: ended inside {name}; download it again")
        done += count
    if not direct:
        target.copy_(buffer)


def save(path, views, dtype=None, metadata=None):
    """Write the tensors that `views` describe to one safetensors file, under a temporary name that is then renamed.

    dtype: of the floating-point tensors in the file; None keeps the model's.
    """
    tensors = {}
    for name, targets in views.items():
        tensor = torch.cat([t.detach().cpu() for t in targets]) if len(targets) > 1 else targets[0].detach().cpu()
        tensors[name] = tensor.to(dtype if dtype and tensor.is_floating_point() else tensor.dtype).contiguous().clone()
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    save_file(tensors, str(temporary), metadata={"format": "pt", **(metadata or {})})
    os.replace(temporary, path)


def projections(path, rows, fused):
    """{published path: rows} of what one linear layer of a model holds: itself, or projections fused in it.

    path, rows: of the layer, as in "layers.0.self_attn.qkv_proj", and its outputs.
    fused: {last part of a path: names of the projections in it, from the first row on}; the names
    are a tuple if all have as many rows, else {name: rows}, as for grouped-query attention:
    {"qkv_proj": {"q_proj": 3584, "k_proj": 512, "v_proj": 512}, "gate_up_proj": ("gate_proj", "up_proj")}
    """
    parent, dot, last = path.rpartition(".")
    names = fused.get(last, (last,))
    if not isinstance(names, dict):
        names = dict.fromkeys(names, rows // len(names))
    return {f"{parent}{dot}{name}": own for name, own in names.items()}


def named_views(module, fused=None, prefix=""):
    """Views of a module whose names are the published ones, but for the projections it fuses.

    fused: as for `projections`. Of a layer q_proj, k_proj, v_proj in the file become the rows of one
    qkv_proj, weight and bias alike. prefix: of the names in the file, e.g. "visual."
    """
    views = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        path, _, kind = name.rpartition(".")
        if path.rpartition(".")[2] not in (fused or {}):
            views[prefix + name] = [tensor]
            continue
        parts = projections(path, tensor.shape[0], fused)
        for part, rows in zip(parts, tensor.split(list(parts.values())), strict=True):
            views[f"{prefix}{part}.{kind}"] = [rows]
    return views


def renamed(views, table):
    """Views under other names: each (pattern, replacement) of the table is applied to all by re.sub."""
    for pattern, replacement in table:
        views = {re.sub(pattern, replacement, name): targets for name, targets in views.items()}
    return views


# The three below go when mmdit.py and qwen_vl.py use named_views.


def affine_views(name, module):
    """Views of a linear layer or norm that the file calls `name`."""
    return {f"{name}.weight": [module.weight], f"{name}.bias": [module.bias]}


def identity_views(module):
    """Views of a module whose names are the published ones."""
    return named_views(module)


def split_rows(tensor, parts):
    """`parts` equal slices of a fused projection along dimension 0, e.g. the q, k and v of a qkv weight [3D, D]."""
    return tensor.split(tensor.shape[0] // parts)


def count_parameters(module):
    """Number of trainable values (buffers, such as position tables, are not counted)."""
    return sum(math.prod(p.shape) for p in module.parameters())
