"""Weights from the hub: all that a command needs is asked for before any of it is downloaded.

    hub.fetch(pipeline.files_of_generator(args.model), [(args.judge, ["*"])])

So a licence that was not accepted, or a name that is misspelt, is told at once and not after 17 GB
of other weights, and one bar shows the bytes of all files together. They go into the hub's own
cache, where other programs find them, too.
"""

import fnmatch
import os
import threading
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm

from parts.cli import FULL, UserError

UNWANTED = (  # the same weights in other formats and in half precision
    "*fp16*", "*.bin", "*.msgpack", "*.h5", "*.onnx*")
OPTIONAL = ("text_encoder_3/*", "tokenizer_3/*")  # not every pipeline has T5
FOLDERS = {}  # {hub id: its folder here}, of what `fetch` has brought


class Silent(tqdm):
    """For bars of the hub's library, which has one for each repository."""

    def __init__(self, *args, **options):
        options.pop("name", None)  # which its own class has and tqdm has not
        super().__init__(*args, **options | {"disable": True})


def is_hub_id(source):
    """Whether a source that is no path here has the form of a hub id, "owner/name"."""
    name = str(source)
    is_path = name.startswith((".", "/", "~")) or name.endswith(".safetensors")
    return not is_path and name.count("/") == 1


def fetch(*wishes):
    """Download what is not here yet of all hub ids among the wishes; nothing, if one is refused.

    wishes: lists of (source, patterns of its files). Sources that are None, "none" or no hub
    ids are passed over; who loads them tells what is wrong. Raises UserError.
    """
    patterns = {}  # {hub id: all that is wanted of it}
    for source, wanted in (wish for each in wishes for wish in each):
        if source is not None and not Path(source).expanduser().exists() and is_hub_id(source):
            patterns[str(source)] = [*patterns.get(str(source), ()), *wanted]
    files = [file for hub_id, wanted in patterns.items() for file in plan(hub_id, wanted)]
    with bytes_bar([file for file in files if file.will_download]):
        for hub_id, wanted in patterns.items():
            FOLDERS[hub_id] = download(hub_id, wanted)


def plan(hub_id, patterns):
    """The files that a download would need, as the hub's DryRunFileInfo; reads their headers only.

    Raises UserError for a repository that cannot be read or lacks what a pattern asks for.
    """
    from huggingface_hub import errors, snapshot_download

    with told(hub_id, BEFORE):
        try:
            files = snapshot_download(hub_id, allow_patterns=patterns, dry_run=True,
                                      ignore_patterns=list(UNWANTED), tqdm_class=Silent)
        except errors.DryRunError:  # no access, or no network: is it in the cache, and else why?
            download(hub_id, patterns)
            return []
    names = [file.filename for file in files]
    for pattern in set(patterns) - set(OPTIONAL):
        if not fnmatch.filter(names, pattern):
            raise UserError(f"{hub_id}: no {pattern} in it; is it another kind of model?")
    return files


def download(hub_id, patterns):
    """The local folder of a hub repository, with the files that match a pattern. Raises
    UserError."""
    # Imported here, because it takes long and most runs read local files.
    from huggingface_hub import snapshot_download

    with told(hub_id, DURING):
        return Path(snapshot_download(hub_id, allow_patterns=patterns, tqdm_class=Silent,
                                      ignore_patterns=list(UNWANTED)))


# --------------------------------------------------------------------------------------------------
# What the user sees

BEFORE = ("not on this machine and the hub cannot be reached ({}); connect to the network, or "
          "download it elsewhere and give its folder")
DURING = "the download broke off ({}); the same command goes on where it was"


@contextmanager
def told(hub_id, otherwise):
    """Tell errors of the hub's library in one line. otherwise: of those that have none below."""
    from huggingface_hub import constants, errors

    try:
        yield
    except UserError:
        raise
    except errors.GatedRepoError as error:
        raise UserError(
            f"{hub_id}: access is gated; accept its licence at https://huggingface.co/{hub_id} and "
            f"run `hf auth login`") from error
    except errors.RepositoryNotFoundError as error:
        raise UserError(
            f"{hub_id}: neither a local path nor a hub repository you can read; check the "
            f"spelling, or run `hf auth login`") from error
    except Exception as error:  # of the hub, the network or the disk: each library has its own
        if isinstance(error, OSError) and error.errno in FULL:
            raise OSError(error.errno, error.strerror, constants.HF_HUB_CACHE) from error
        if isinstance(error, errors.LocalEntryNotFoundError):
            otherwise = BEFORE
        reason = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
        raise UserError(f"{hub_id}: {otherwise.format(reason)}") from error


@contextmanager
def bytes_bar(files):
    """Within it one bar shows how many bytes of all files (DryRunFileInfo) have come.

    It looks at the cache and so holds for every way in which the hub's library may download.
    """
    total = sum(file.file_size or 0 for file in files)
    if not total or os.environ.get("RANK", "0") != "0":  # torchrun's other processes only wait
        yield
        return
    marker = f"{os.sep}snapshots{os.sep}"
    caches = {Path(str(file.local_path).split(marker)[0]) / "blobs" for file in files}
    before = bytes_in(caches)
    ended = threading.Event()
    bar = tqdm(total=total, desc=f"downloading {len(files)} files", unit="B", unit_scale=True)

    def watch():
        while not ended.wait(0.3):
            bar.update(min(total, bytes_in(caches) - before) - bar.n)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
        ended.set()
        watcher.join()
        bar.update(total - bar.n)  # also what an earlier, broken download had brought
    finally:
        ended.set()
        watcher.join()
        bar.close()


def bytes_in(folders):
    """The bytes of all files in some folders, parts of files included."""
    found = 0
    for folder in folders:
        for file in folder.glob("*"):
            try:
                found += file.stat().st_size
            except OSError:  # it was renamed since it was listed: its download has ended
                continue
    return found
