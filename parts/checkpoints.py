"""The state of a training in a folder, which any number of processes can write and read.

    write(folder, state_of(optimizer, ema))
    read(folder, state_of(optimizer, ema))  # perhaps by more processes, or fewer

torch.distributed.checkpoint does it: a tensor that all processes hold is written once, and of one
that FSDP2 has divided (a DTensor) each process writes its own part, and later reads what of all
parts belongs to the part that it then has. Nothing is ever gathered.
"""

import os
import pickle
import warnings
import zlib
from contextlib import contextmanager
from enum import Enum

import torch
from torch.distributed import checkpoint

from parts.cli import UserError
from parts.files import naming

METADATA = {"Metadata", "TensorStorageMetadata", "ChunkStorageMetadata", "TensorProperties",
            "MetadataIndex", "StorageMeta", "_StorageInfo", "_MEM_FORMAT_ENCODING", "_get_layout",
            "Size", "PosixPath", "WindowsPath"}


def state_of(optimizer, ema=None):
    """{name: tensor} of the state of a training: parameters, AdamW's moments, averages of an EMA.

    They are the tensors in use, so filling them sets that state.
    """
    state = {}
    for i, parameter in enumerate(optimizer.param_groups[0]["params"]):
        moments = optimizer.state[parameter]
        if not moments:  # as AdamW makes them in its first step
            moments["step"] = torch.tensor(0.0)
            moments["exp_avg"] = torch.zeros_like(parameter)
            moments["exp_avg_sq"] = torch.zeros_like(parameter)
        state[f"{i}.parameter"] = parameter.detach()
        state |= {f"{i}.{name}": tensor for name, tensor in moments.items()}
        if ema:
            state[f"{i}.average"] = ema.values[i]
    return state


def write(folder, state):
    """Write this process's part; when it returns, all processes' are on the disk."""
    # Copying ahead would use a GPU that is there also where --device is cpu.
    writer = Writer(folder, per_thread_copy_ahead=0)
    with failures_raised():
        checkpoint.save(state, storage_writer=writer)


def digests(folder, rank):
    """[(name, digest)] of the files of a checkpoint that process `rank` has written; the table of
    what lies where is the first one's."""
    files = sorted(folder.glob(f"__{rank}_*.distcp"))
    if rank == 0:
        files.append(folder / ".metadata")
    return [(file.name, digest_of(file)) for file in files]


def digest_of(file):
    """CRC-32 of a file, which tells a flipped bit and reads as fast as a disk; None without it."""
    if not os.path.isfile(file):  # a stranger's name may be too long for a path
        return None
    digest = 0
    with open(file, "rb") as opened:
        while part := opened.read(2**24):
            digest = zlib.crc32(part, digest)
    return digest


def read(folder, state):
    """Fill the tensors of a state. Raises UserError if the folder is damaged."""
    reader = Reader(folder)
    try:
        reader.read_metadata()  # before torch does, which shows a traceback of what it cannot read
        with failures_raised():
            checkpoint.load(state, storage_reader=reader)
    except Exception as error:  # torch raises many kinds for a damaged file
        reason = str(error).partition("\n")[0][:120]
        raise UserError(f"{folder}: damaged or incomplete ({type(error).__name__}: {reason}); "
                        f"delete it to go on from the one before") from error


@contextmanager
def failures_raised():
    """Raise what failed in torch.distributed.checkpoint as it was, without its wrapping."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that one process alone has no process group
            yield
    except checkpoint.CheckpointException as error:
        # {rank: (error, traceback)} of the processes where it failed, which all processes get
        raise next(iter(error.failures.values()))[0] from None


class Writer(checkpoint.FileSystemWriter):
    """Writes a checkpoint's folder; unlike torch's own, it tells a full disk from other failures.

    It must be told here: what failed is sent to the other processes without what led to it.
    """

    def write_data(self, *args):
        with naming(self.path):
            return super().write_data(*args)

    def finish(self, **options):
        with naming(self.path):
            return super().finish(**options)


class Reader(checkpoint.FileSystemReader):
    """Reads a checkpoint's folder; unlike torch's own, it runs no code that a file may contain."""

    def read_metadata(self):
        with open(self.path / ".metadata", "rb") as file:
            return MetadataUnpickler(file).load()


def member_of(kind, name):
    """The member of an enum, and nothing else that an object may have."""
    if not (isinstance(kind, type) and issubclass(kind, Enum)):
        raise ValueError(f"an attribute of {kind!r:.80} has no place in it")
    return kind[name]


class MetadataUnpickler(pickle.Unpickler):
    """What lies where is a pickled table; only what such tables are made of is let through."""

    def find_class(self, module, name):
        if (module, name) == ("builtins", "getattr"):  # an enum, by Python 3.11.2
            return member_of
        known = name in METADATA or isinstance(getattr(torch, name, None), torch.dtype)
        if not known or module.partition(".")[0] not in ("torch", "pathlib"):
            raise ValueError(f"{module}.{name} has no place in it")
        return super().find_class(module, name)
