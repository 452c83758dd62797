"""Published weights, straight from safetensors files into a model, and back.

A checkpoint is a hub id, a folder, or one file. Every model describes how a published layout maps
onto its own parameters as `views`: {tensor name in the file: [destination tensors]}. The
destinations are (slices of) parameters whose concatenation along dimension 0 is the tensor of the
file. That one idea covers fused projections (a file's q_proj fills the first third of our
qkv_proj), swapped halves (scale before shift), plain renames, and writing: `save` concatenates the
same views.

Bytes are read from the file into the parameter's own memory, tensor by tensor, so the peak is the
size of the model plus one tensor. Of a pickled checkpoint, which could execute code, only plain
tensors are read (`find_tensors`). Left out: quantised tensors.
"""

import fnmatch
import hashlib
import math
import os
import re
from dataclasses import dataclass, fields
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from parts import hub
from parts.cli import UserError
from parts.files import kind_of, read_json, write_whole

DTYPES = {  # without 8-bit floats: those are quantised, and mean nothing without their scales
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "U8": torch.uint8, "BOOL": torch.bool}
SAMPLES = 64  # places of a file whose values are part of its fingerprint, 1,024 bytes each

LARGEST_HEADER = 10**7  # bytes; of SD3.5-Large in one file it has 260,000


# --------------------------------------------------------------------------------------------------
# Find


def find(source, component=None):
    """Local path of a checkpoint, or of one component of it (`transformer`, `vae`, …).

    source: a file, a folder (of the whole pipeline or of the component itself), or a hub id
    "owner/name". Returns a file, or a folder that holds the component's files. Raises UserError.
    """
    # Of a hub id only the component's files are downloaded, not the tens of GB beside them.
    path = root(source, f"{component}/*" if component else "*")
    if path.is_file() or component is None:
        return path
    if (path / component).is_dir():
        return path / component
    own_files = ("config.json", "tokenizer.json", "vocab.json")
    if any((path / name).exists() for name in own_files):  # it is the component's own folder
        return path
    advice = "the checkpoint is incomplete, download it again or point to a complete one"
    raise UserError(f"{path}: no folder {component}/ in it; {kind_of(path) or advice}")


def find_file(source, name):
    """Local path of one file (`model_index.json`, …) of a folder or hub id. Raises UserError."""
    path = root(source, name)
    if path.is_file() or not (path / name).is_file():
        advice = "give the folder of a whole pipeline in the diffusers layout"
        raise UserError(f"{path}: no {name} in it; {kind_of(path) or advice}")
    return path / name


def find_tensors(source, name):
    """(local path, {tensor name: Entry, or the tensor of a pickle}) of one file of tensors.

    source: the file; or a folder or hub id that holds it as `name`, a folder perhaps as
    .safetensors instead. Raises UserError.
    """
    path = root(source, name)
    if not path.is_file():
        converted = path / Path(name).with_suffix(".safetensors")
        path = converted if converted.is_file() else path / name
    if not path.is_file():
        raise UserError(f"{path.parent}: no {name} in it; give the file, or a folder that has it")
    return path, tensors_of(path)


def tensors_of(path):
    """{name: Entry} of a checkpoint as `index` gives it, or {name: tensor} of a pickle's file."""
    return read_tensors(path) if is_pickle(path) else index(path)


def is_pickle(path):
    """Whether a path is one file of torch.save, not a checkpoint's folder or file."""
    return path.is_file() and path.suffix != ".safetensors"


def read_tensors(path):
    """{name: tensor} of a .safetensors file, or of one of torch.save, without what else that holds.

    No code in it is run. Raises UserError.
    """
    try:
        is_pickle = path.suffix != ".safetensors"
        state = torch.load(path, "cpu", weights_only=True) if is_pickle else load_file(path)
    except (OSError, RuntimeError, EOFError, ValueError, UnpicklingError, SafetensorError) as error:
        reason = str(error).splitlines()[0][:100] if str(error) else type(error).__name__
        raise UserError(
            f"{path}: not a file of plain tensors ({reason}); download it again") from error
    if isinstance(state, dict):
        state = state.get("state_dict", state)  # beside it training programs keep their own
    items = state.items() if isinstance(state, dict) else ()
    return {str(name): value for name, value in items if isinstance(value, torch.Tensor)}


def root(source, wanted):
    """Local path of a whole checkpoint.

    Of a hub id the files that match the pattern `wanted` are downloaded. Raises UserError.
    """
    # os.path says no to what can be no path, such as 5,000 letters; Path would raise.
    path = Path(os.path.expanduser(source))
    if os.path.exists(path):
        return path
    # Only what can be a hub id is asked of the hub, so that a misspelt path fails at once.
    if not hub.is_hub_id(source):
        raise UserError(
            f"{source}: no such file or folder; give a folder, a .safetensors file or a hub id "
            f"like stabilityai/stable-diffusion-3.5-medium")
    name = str(source)
    return hub.FOLDERS.get(name) or hub.download(name, [wanted])


# What a configuration may say: the least and the greatest number that a model could have. Whole
# numbers first, as 10⁹ layers would never end, then the others.
WHOLE = {
    "num_layers": (1, 1000), "num_hidden_layers": (1, 1000), "depth": (1, 1000),
    "num_single_layers": (1, 1000),
    "layers_per_block": (1, 100), "num_attention_heads": (1, 4096),
    "num_key_value_heads": (1, 4096), "num_heads": (1, 4096), "attention_head_dim": (1, 4096),
    "d_kv": (1, 4096), "hidden_size": (1, 10**6), "d_model": (1, 10**6),
    "intermediate_size": (1, 10**7), "d_ff": (1, 10**7), "projection_dim": (1, 10**6),
    "joint_attention_dim": (1, 10**6), "pooled_projection_dim": (1, 10**6),
    "in_channels": (1, 10**4), "latent_channels": (1, 10**4), "block_out_channels": (1, 10**5),
    "norm_num_groups": (1, 10**4), "dual_attention_layers": (0, 1000), "out_channels": (1, 10**4),
    "cross_attention_dim": (1, 10**6), "transformer_layers_per_block": (1, 1000),
    "addition_time_embed_dim": (2, 10**6), "projection_class_embeddings_input_dim": (1, 10**6),
    "num_train_timesteps": (1, 10**5), "steps_offset": (0, 10**5),
    "fullatt_block_indexes": (0, 1000), "mrope_section": (0, 4096), "patch_size": (1, 4096),
    "temporal_patch_size": (1, 16), "spatial_merge_size": (1, 16), "merge_size": (1, 16),
    "window_size": (1, 10**5), "image_size": (1, 10**5), "sample_size": (1, 10**4),
    "min_pixels": (1, 2**22), "max_pixels": (1, 10**9), "shortest_edge": (1, 2**22),
    "longest_edge": (1, 10**9), "pos_embed_max_size": (1, 10**4),
    "max_position_embeddings": (1, 10**7), "relative_attention_num_buckets": (4, 10**4),
    "relative_attention_max_distance": (2, 10**6), "vocab_size": (1, 10**7),
    "image_token_id": (0, 10**7), "t5_tokens": (0, 1024), "axes_dims_rope": (0, 4096),
    "base_image_seq_len": (1, 10**6), "max_image_seq_len": (1, 10**6),
    "model_max_length": (2, 10**31)}  # transformers writes 10³⁰ for a tokenizer without a limit
REAL = {
    "scaling_factor": (1e-6, 1e6), "shift_factor": (-1e6, 1e6), "shift": (1e-3, 1e3),
    "base_shift": (-10, 10), "max_shift": (-10, 10),
    "layer_norm_eps": (0, 1), "layer_norm_epsilon": (0, 1), "rms_norm_eps": (0, 1),
    "beta_start": (1e-9, 0.5), "beta_end": (1e-9, 0.5),
    "rope_theta": (1, 1e12), "image_mean": (-1e6, 1e6), "image_std": (1e-6, 1e6)}
LISTS = {"block_out_channels", "dual_attention_layers", "fullatt_block_indexes", "mrope_section",
         "axes_dims_rope", "image_mean", "image_std"}
LAYERS = {"num_layers", "num_single_layers", "num_hidden_layers", "depth"}
OBJECTS = {"text_config", "vision_config", "rope_scaling", "rope_parameters", "image_processor"}


def read_config(path, tensors=math.inf, per_level=()):
    """A JSON file of numbers, such as config.json, without its nulls, which leave a value to the
    model. Raises UserError for values that no model has.

    tensors: how many the model's files hold; no model has more layers. per_level: keys whose value
    may be one number or a list of them.
    """
    raw = read_json(path)
    objects = [raw]
    for part in objects:  # those inside it are appended
        for name, value in list(part.items()):
            if value is None:
                del part[name]
            elif expected := expectation(name, value, tensors, name in per_level):
                raise UserError(f"{path}: {name} is {value!r:.80}, expected {expected}; download "
                                f"it again")
            elif isinstance(value, dict):
                objects.append(value)
    return raw


def expectation(name, value, tensors, per_level=False):
    """What the value of a configuration's key should be, or None if a model could have it."""
    if name in OBJECTS:
        return None if isinstance(value, dict) else "an object"
    if name not in WHOLE and name not in REAL:
        return None
    low, high = WHOLE.get(name) or REAL[name]
    if name in LAYERS:
        high = min(high, tensors)
    kinds = (int,) if name in WHOLE else (int, float)
    what = f"{'a whole number' if name in WHOLE else 'a number'} in {low:,}..{high:,}"
    numbers = [value]
    if name in LISTS or (per_level and isinstance(value, list)):
        what = f"a list, each {what}"
        numbers = value if isinstance(value, list) and len(value) <= 1000 else [None]
    fits = all(type(number) in kinds and low <= number <= high for number in numbers)
    return None if fits else what


def fields_of(kind, raw):
    """A dataclass whose fields are keys of a config.json; what that leaves out has its default."""
    return kind(**{field.name: raw[field.name] for field in fields(kind) if field.name in raw})


def image_file(folder):
    """The file of a folder that has the settings of pictures; newer ones have a new name."""
    newer = folder / "processor_config.json"
    older = folder / "preprocessor_config.json"
    return newer if newer.exists() and not older.exists() else older


def read_tokenizer(folder, assemble):
    """A folder's tokenizer: of tokenizer.json, or assemble(vocab, merges) of two older files.

    vocab {token: id}, merges [(left, right)]. Raises UserError.
    """
    file = folder / "tokenizer.json"
    try:
        if file.exists():
            tokenizer = Tokenizer.from_file(str(file))
        else:
            vocab = read_json(folder / "vocab.json")
            lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
            pairs = [line.split() for line in lines if not line.startswith("#version")]
            tokenizer = assemble(vocab, [tuple(pair) for pair in pairs if pair])
        # A tokenizer.json may pad and cut by itself; we pad, and say what is cut.
        tokenizer.no_padding()
        tokenizer.no_truncation()
        tokenizer.encode("water, 水")  # some faults show only in use
        return tokenizer
    except (UserError, KeyboardInterrupt):
        raise
    except BaseException as error:  # for a malformed file the library raises Exception, or panics
        raise UserError(
            f"{folder}: its tokenizer cannot be read ({str(error)!r}); download it again"
        ) from error


def check_vocabulary(tokenizer, rows, folder):
    """UserError if a tokenizer has tokens beyond the rows of the model's table of embeddings."""
    last = max(tokenizer.get_vocab().values(), default=0)
    if last >= rows:
        raise UserError(f"{folder}: its tokenizer has token {last:,}, the model only {rows:,}; "
                        f"give a model and a tokenizer of one checkpoint")


# --------------------------------------------------------------------------------------------------
# Check


@dataclass(frozen=True)
class Entry:
    """One tensor in a file, and where its bytes lie."""
    file: Path
    dtype: torch.dtype
    shape: tuple
    start: int


def index(path, prefix=""):
    """All tensors of a checkpoint without reading their data: {name without prefix: Entry}.

    path: a .safetensors file, or a folder with one file or a sharded index. Only names that start
    with `prefix` are kept. Raises UserError for a missing, truncated or foreign file.
    """
    entries = {}
    files, shard_of = files_of(Path(path))
    for file in files:
        for name, entry in read_header(file).items():
            if shard_of.get(name, file.name) != file.name:
                raise UserError(f"{file}: has {name!r}, which its index says is in "
                                f"{shard_of[name]!r}; download both again")
            if not name.startswith(prefix):
                continue
            name = name.removeprefix(prefix)
            if name in entries:
                raise UserError(f"{path}: {name!r} is in two files; download it again")
            entries[name] = entry
    return entries


def files_of(path):
    """(the safetensors files of a checkpoint, {tensor: name of the shard that should have it});
    half-precision copies beside them are ignored."""
    if path.is_file():
        return [path], {}
    indexes = sorted(path.glob("*.safetensors.index.json"))
    if indexes:
        try:
            # A shard lies in this folder, whatever path a stranger's index names.
            shard_of = {name: Path(shard).name
                        for name, shard in read_json(indexes[0])["weight_map"].items()}
            files = [path / shard for shard in sorted(set(shard_of.values()))]
        except (KeyError, AttributeError, TypeError) as error:
            raise UserError(f"{indexes[0]}: no index of shards; download it again") from error
        missing = [file.name for file in files if not os.path.isfile(file)]
        if missing:
            raise UserError(f"{indexes[0]}: missing shards {missing}; download them again")
        return files, shard_of
    half = sorted(path.glob("*.fp16.safetensors"))
    files = [file for file in path.glob("*.safetensors") if file not in half]
    if half and not files:
        raise UserError(f"{path}: only {half[0].name}, a half-precision copy; download the files "
                        f"without fp16 in their names")
    if len(files) != 1:
        found = ", ".join(repr(file.name) for file in sorted(files)) or "none"
        raise UserError(f"{path}: expected one .safetensors file or an index of shards, found "
                        f"{found}; {kind_of(path) or 'give a folder of weights'}")
    return files, {}


def check_header_size(file):
    """OSError for what is no file, and for a safetensors header that would take seconds to read."""
    if not file.is_file():
        raise OSError("no file, but a folder or a device")
    with open(file, "rb") as opened:
        size = int.from_bytes(opened.read(8), "little")
    if size > LARGEST_HEADER:
        raise OSError(f"no safetensors file, or damaged: a header of {size:,} bytes")


def read_header(file):
    """{tensor name: Entry} of one safetensors file.

    The library refuses a malformed header, and tensors that do not fill the rest of the file one
    behind the other, without gap or overlap, each as long as its shape and dtype say. So the last
    one ends where the file ends, and their sizes say where each starts.
    """
    try:
        check_header_size(file)
        with safe_open(file, "numpy") as opened:
            # Only names, types and shapes are asked of the library: it would map a file's data
            # into memory beside the model.
            slices = {name: opened.get_slice(name) for name in opened.offset_keys()}
        described = {name: (part.get_dtype(), part.get_shape()) for name, part in slices.items()}
    except (OSError, SafetensorError) as error:
        # repr, because the message may quote a stranger's names, line breaks and all.
        raise UserError(
            f"{file}: truncated or not a readable safetensors file ({str(error)!r}); "
            f"download it again") from error
    entries = {}
    start = file.stat().st_size  # from the last tensor, which ends here, to the first
    for name, (kind, shape) in reversed(described.items()):
        if kind not in DTYPES:
            raise UserError(
                f"{file}: {name!r} is stored as {kind}; give a checkpoint in float32, float16 or "
                f"bfloat16")
        start -= DTYPES[kind].itemsize * math.prod(shape)
        entries[name] = Entry(file, DTYPES[kind], tuple(shape), start)
    return entries


def read_metadata(file):
    """{name: text} that a safetensors file says of itself beside its tensors."""
    with safe_open(file, "numpy") as opened:
        return opened.metadata() or {}


def fingerprint(paths):
    """What tells the checkpoints at local paths from others, wherever they lie.

    It is of their configurations, and of each file's header and some of its values: the header of a
    model that was trained further is the same. Reading them takes no time to speak of.
    """
    digest = hashlib.sha256()
    for path in map(Path, paths):
        for config in sorted(path.glob("*config.json")):
            digest.update(config.read_bytes())
        for file in files_of(path)[0]:
            tensors = [(name, str(entry.dtype), entry.shape, entry.start)
                       for name, entry in read_header(file).items()]
            digest.update(repr(sorted(tensors)).encode())
            size = file.stat().st_size
            with open(file, "rb", buffering=0) as opened:
                for i in range(SAMPLES):
                    opened.seek(size * i // SAMPLES)
                    digest.update(opened.read(1024))
    return digest.hexdigest()[:16]


def shapes(views):
    """{tensor name: shape} of the file that `views` describe."""
    return {
        name: (sum(map(len, targets)), *targets[0].shape[1:]) if targets[0].dim() else ()
        for name, targets in views.items()}


def check(views, entries, what, optional=()):
    """Compare what a model needs with what a checkpoint holds; one UserError names all differences.

    optional: patterns of tensors that a published file may carry although no model uses them.
    """
    problems = []
    for name, expected in shapes(views).items():
        if name not in entries:
            problems.append(f"missing {name} {list(expected)}")
        elif entries[name].shape != expected:
            problems.append(f"{name} is {list(entries[name].shape)}, expected {list(expected)}")
        elif entries[name].dtype.is_floating_point != views[name][0].dtype.is_floating_point:
            problems.append(f"{name} is {entries[name].dtype}, expected {views[name][0].dtype}")
    for name in entries:
        if name not in views and not any(fnmatch.fnmatch(name, pattern) for pattern in optional):
            # repr shows control characters; the names above are the model's own and have none.
            problems.append(f"unexpected {name!r} {list(entries[name].shape)}")
    if problems:
        shown = "; ".join(problems[:12])
        more = f"; and {len(problems) - 12} more" if len(problems) > 12 else ""
        raise UserError(
            f"{what}: {len(problems)} tensors do not fit this model: {shown}{more}. Is it a "
            f"checkpoint of another model?")


# --------------------------------------------------------------------------------------------------
# Views


def projections(path, rows, fused):
    """{published path: rows} of what one linear layer holds: itself, or projections fused in it.

    path, rows: of the layer, as in "layers.0.self_attn.qkv_proj", and its outputs.
    fused: {last part of a path: names of the projections in it, from the first row on}. The names
    are a tuple if all have as many rows, else {name: rows}, as for grouped-query attention:
    {"qkv_proj": {"q_proj": 3584, "k_proj": 512, "v_proj": 512},
     "gate_up_proj": ("gate_proj", "up_proj")}
    """
    parent, dot, last = path.rpartition(".")
    names = fused.get(last, (last,))  # what is not listed is one projection of its own name
    if not isinstance(names, dict):
        names = dict.fromkeys(names, rows // len(names))
    return {f"{parent}{dot}{name}": own for name, own in names.items()}


def named_views(module, fused=None):
    """Views of a module whose names are the published ones, but for the projections it fuses.

    fused: as for `projections`. Of a layer q_proj, k_proj, v_proj in the file become the rows of
    one qkv_proj, weight and bias alike.
    """
    views = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        path, _, kind = name.rpartition(".")  # kind: "weight" or "bias"
        if path.rpartition(".")[2] not in (fused or {}):
            views[name] = [tensor]
            continue
        parts = projections(path, len(tensor), fused)
        for part, rows in zip(parts, tensor.split(list(parts.values())), strict=True):
            views[f"{part}.{kind}"] = [rows]
    return views


def renamed(views, table):
    """Views under other names: each (pattern, replacement) of the table in turn, as re.sub does."""
    for pattern, replacement in table:
        views = {re.sub(pattern, replacement, name): targets for name, targets in views.items()}
    return views


# --------------------------------------------------------------------------------------------------
# Read and write


def build(make, views, entries, what, device="cpu", dtype=None, optional=()):
    """The model that `make()` returns, filled from a checkpoint: frozen, memory allocated once.

    views: function of the model that gives its views. entries, what, optional: as for `check`.
    dtype None: float32 on a CPU (bfloat16 is emulated there), bfloat16 elsewhere.
    """
    model = without_memory(make, what, device, dtype)
    check(views(model), entries, what, optional)  # before memory is asked for
    # Memory is allocated here, in its final type, and filled in place: no second copy ever is.
    model = model.to_empty(device=device)
    fill(views(model), entries)
    return model


def without_memory(make, what, device, dtype):
    """The model that `make()` returns, frozen, on the meta device; the rest is as for `build`."""
    try:
        with torch.device("meta"):  # shapes alone: no memory, and no random numbers drawn
            model = make()
    except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
        # Each number may be fine by itself, and yet 32 groups not divide 48 channels.
        raise UserError(f"{what}: the sizes of its configuration do not fit one another ({error}); "
                        f"download it again") from error
    on_cpu = torch.device(device).type == "cpu"
    dtype = dtype or (torch.float32 if on_cpu else torch.bfloat16)
    return model.to(dtype).eval().requires_grad_(False)


def load(views, entries, what, optional=()):
    """Check, then fill every view from its file."""
    check(views, entries, what, optional)
    fill(views, entries)


@torch.no_grad()
def fill(views, entries):
    """Fill every view from its file; the two fit, as `check` has found."""
    by_file = {}
    for name, targets in views.items():
        entry = entries[name]
        if isinstance(entry, Entry):
            by_file.setdefault(entry.file, []).append(name)
            continue
        rows = [entry] if len(targets) == 1 else entry.split([len(target) for target in targets])
        for target, own in zip(targets, rows, strict=True):  # of a pickle, read already
            target.copy_(own)
    for file, names in by_file.items():
        with open(file, "rb", buffering=0) as opened:
            # In the order of their bytes, because disks and networks read forward fastest.
            for name in sorted(names, key=lambda name: entries[name].start):
                opened.seek(entries[name].start)
                for target in views[name]:
                    read_into(opened, target, entries[name].dtype, name)


def read_into(file, target, dtype, name):
    """Fill `target` with the next bytes of an open file, stored as `dtype`.

    They go into the tensor's own memory where they fit it as they are, else through a buffer.
    """
    direct = target.device.type == "cpu" and target.dtype == dtype and target.is_contiguous()
    buffer = target if direct else torch.empty(target.shape, dtype=dtype)
    if not buffer.numel():  # an empty tensor has no memory to read into
        return
    memory = memoryview(buffer.reshape(-1).view(torch.uint8).numpy())
    done = 0
    while done < len(memory):  # one call reads at most 2 GB
        count = file.readinto(memory[done:])
        if not count:
            raise UserError(f"{file.name}: ended inside {name}; download it again")
        done += count
    if not direct:
        target.copy_(buffer)


def own_rows(tensor):
    """(the rows of a tensor that this process holds, the number of rows before them): all and 0,
    unless FSDP2 has divided it."""
    if not hasattr(tensor, "to_local"):  # a DTensor, known by its method: few programs import it
        return tensor, 0
    # FSDP2 divides as torch.chunk does: so many rows for each, the last ones get fewer or none.
    each = math.ceil(tensor.shape[0] / tensor.device_mesh.size())
    before = each * tensor.device_mesh.get_local_rank()
    return tensor.to_local(), min(before, tensor.shape[0])


def save(path, views, dtype=None, metadata=None):
    """Write the tensors that `views` describe to one safetensors file, whole or not at all.

    dtype: of the floating-point tensors in the file; None keeps the model's.
    metadata: {name: text}, of one name, that the file then says of itself.
    """
    tensors = {}
    for name, targets in views.items():
        parts = [target.detach().cpu() for target in targets]
        tensor = torch.cat(parts) if len(parts) > 1 else parts[0]
        kind = dtype if dtype and tensor.is_floating_point() else tensor.dtype
        # Copies, because safetensors refuses tensors that share memory, as slices do.
        tensors[name] = tensor.to(kind, copy=True, memory_format=torch.contiguous_format)
    # One name only: of several the library changes the order from run to run, and so the file.
    metadata = metadata or {"format": "pt"}
    write_whole(path, lambda temporary: save_file(tensors, temporary, metadata=metadata))


def count_parameters(module):
    """Number of trainable values (buffers, such as position tables, are not counted)."""
    return sum(math.prod(p.shape) for p in module.parameters())
