"""A reward of one's own, from a file: `train_gen.py --reward my_reward.py:score`.

    def score(pictures, prompts, rows):  # in my_reward.py
        return [a number for each picture, more for a better one]

pictures: N PIL images. prompts: what each shows, without its emotion. rows: a data.Row for each,
whose v and a are the target. The numbers may be a list or a tensor [N].
"""

import hashlib
import importlib.util
import sys
from pathlib import Path

import torch

from parts.cli import UserError


def file_of(source):
    """(path, name of the function) of FILE:FUNCTION. Raises UserError."""
    path, _, name = source.rpartition(":")
    if not path or not Path(path).is_file():
        raise UserError(f"--reward {source}: no such file; give FILE:FUNCTION, as in "
                        f"my_reward.py:score")
    return Path(path), name


def digest(source):
    """What tells the file's content from another, or None without a reward of one's own."""
    if source is None:
        return None
    return hashlib.sha256(file_of(source)[0].read_bytes()).hexdigest()[:16]


def load(source):
    """The function that FILE:FUNCTION names; None for None. Raises UserError."""
    if source is None:
        return None
    path, name = file_of(source)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(path.stem, module)  # where a dataclass in the file looks its types up
    try:
        spec.loader.exec_module(module)
    except (SyntaxError, ImportError) as error:
        raise UserError(f"{path}: cannot be imported ({type(error).__name__}: {error})") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise UserError(f"{path}: has no function {name!r}; define it, or name another as "
                        f"--reward {path}:FUNCTION")
    return function


def rewards(function, images, rows):
    """[N] float64, what the function gives to N pictures. Raises UserError if it is not that."""
    given = function(images, [row.neutral for row in rows], rows)
    name = getattr(function, "__name__", "the function")
    try:
        numbers = torch.as_tensor(given, dtype=torch.float64).detach().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"--reward: {name} gave no numbers but {str(given)[:60]!r}; expected one "
                        f"for each of {len(images)} pictures") from error
    if numbers.shape != (len(images),):
        raise UserError(f"--reward: {name} gave numbers of shape {list(numbers.shape)}, expected "
                        f"[{len(images)}], one for each picture")
    return numbers
