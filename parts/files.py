"""Files: written whole or not at all; JSON, JSON lines and pictures, with errors that name them."""

import base64
import errno
import io
import json
import math
import os
import re
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo

from parts.cli import FULL, UserError

UMASK = os.umask(0o022)  # what new files leave out of their rights; asking for it sets it
os.umask(UMASK)
LOCKED = []  # open files, see `lock`


def write_whole(path, content):
    """Write text, bytes, or what content(temporary path) writes, and only then give it its name.

    Whoever reads `path`, also after a crash, finds the old content or the new, never a part.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with naming(path):
            fill(temporary, content)
    except Exception:
        temporary.unlink(missing_ok=True)  # a full disk gets its room back
        raise
    # Renaming within a folder is one step of the file system: there is no moment in between.
    os.replace(temporary, path)
    sync_folder(path.parent)
    return path


def fill(path, content):
    """Write text, bytes, or what content(path) writes, down to the disk."""
    if callable(content):
        content(path)
    elif isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(content, encoding="utf-8")
    os.chmod(path, 0o666 & ~UMASK)  # safetensors lets nobody else read its files
    # On the disk before it has its name: after a power cut a file could else be there, and empty.
    with open(path, "rb+") as file:  # Windows lets only a file be flushed that one may write to
        os.fsync(file.fileno())


def check_writable(folder):
    """Raise UserError unless a file can be written into the folder of --out."""
    try:  # Permissions alone do not tell: a disk may be full or mounted for reading only.
        write_whole(Path(folder) / ".probe", "").unlink()
    except OSError as error:
        raise UserError(f"--out {folder}: cannot write there ({error.strerror}); choose another "
                        f"folder") from error


def sync_folder(folder):
    """Let a folder's names, too, be on the disk when this returns."""
    if os.name == "posix":  # Windows does not open folders
        handle = os.open(folder, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)


@contextmanager
def naming(path):
    """Within it a disk's refusal to write is an OSError that names `path`.

    Python leaves the name out; safetensors and torch tell the reason in errors of their own kinds.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        number = refusal(error)
        if number is None or getattr(error, "filename", None):  # another file is named already
            raise
        raise OSError(number, os.strerror(number), str(path)) from error


def refusal(error):
    """The system's number of a full or failing disk, from an error or what led to it, or None."""
    while error is not None:
        told = re.search(r"\(os error (\d+)\)", str(error))  # as safetensors quotes it
        number = int(told[1]) if told else getattr(error, "errno", None)
        if number in (*FULL, errno.EIO):
            return number
        error = error.__cause__ or error.__context__
    return None


def lock(path):
    """Whether this process now has a file for itself, until it ends, however it ends.

    Where the system or its disk knows no such locks, as Windows, that is always taken to be so.
    """
    try:
        import fcntl
    except ImportError:
        return True
    path.parent.mkdir(parents=True, exist_ok=True)
    file = open(path, "w")
    LOCKED.append(file)  # closing it would give the lock up
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.EACCES, errno.EAGAIN)  # which say: another process has it
    return True


def claim(file, facts, what):
    """Make a folder this program's: lock it, and compare a run's facts with those in its JSON file.

    Gives what the file holds, or the facts if it is missing; the command may differ. what: of which
    no two may be mixed, such as "evaluation". Raises UserError if another one has the folder.
    """
    folder = file.parent
    if not lock(folder / ".lock"):
        raise UserError(f"{folder}: another {what} is writing there; wait for its end, or give "
                        f"another --out")
    return compared(file, facts, what)


def compared(file, facts, what):
    """As `claim` without the lock: for a folder that a process of this one's will take. A fact that
    an older version did not know is no difference."""
    before = read_json(file) if file.exists() else facts
    changed = [key for key in facts
               if before.get(key, facts[key]) != facts[key] and key != "command"]
    if changed:
        raise UserError(f"{file.parent} holds another {what} ({', '.join(changed)} changed); "
                        f"remove it or give another --out")
    return before


LARGEST = 10**8  # bytes of what is read whole; the longest that we write has about half of that


def endless_refused(path):
    """The path. Raises OSError if what lies there cannot be read whole: a device or a pipe, to
    which a stranger's link may lead, or more than LARGEST bytes."""
    path = Path(path)
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise OSError("it leads to a device or a pipe")
    if path.is_file() and path.stat().st_size > LARGEST:
        raise OSError(f"it has more than {LARGEST:,} bytes")
    return path


# --------------------------------------------------------------------------------------------------
# JSON


def parse_json(text):
    """The value of a JSON text without NaN, Infinity, and keys that come twice in an object; else
    ValueError, or RecursionError for one that is nested too deep."""
    def unique(pairs):
        if len(dict(pairs)) < len(pairs):
            raise ValueError("a key comes twice")
        return dict(pairs)

    # parse_constant is called with "NaN" or "Infinity", for which int raises ValueError.
    return json.loads(text, object_pairs_hook=unique, parse_constant=int)


def read_json(path):
    """The object in a JSON file, as a dict. Raises UserError that names the file."""
    try:
        return parse_object(endless_refused(path).read_bytes())
    except (OSError, ValueError) as error:
        advice = "download the checkpoint again"
        if not Path(path).exists():
            advice = kind_of(Path(path).parent) or advice
        raise UserError(f"{path}: missing or not a JSON object; {advice}") from error


def parse_object(content):
    """The JSON object in bytes of UTF-8, as a dict. Raises ValueError for anything else."""
    try:
        value = json.loads(content.decode("utf-8-sig"))
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if not isinstance(value, dict):
        raise ValueError(f"expected a JSON object, got {type(value).__name__}")
    return value


KINDS = (  # of folders: (a pattern of what only they hold, what they are and where they belong)
    ("adapter_config.json", "it is an adapter, as --adapter takes it"),
    ("model_index.json", "it is a whole generator, as sample.py --model takes it"),
    ("train.jsonl", "it is a dataset, as --data takes it"),
    ("test.jsonl", "it is a dataset, as --data takes it"),
    ("judge/config.json", "it holds a judge: give its folder judge/"),
    ("judge/adapter_config.json", "it holds a judge: give its folder judge/"),
    ("log.jsonl", "it is a run of training, as --adapter takes it if it trained a generator"),
    ("run.json", "it is a run of sample.py"),
    ("evaluate.json", "it is a run of `python -m evaluation run`"),
    ("*.safetensors.index.json", ""), ("*.safetensors", ""))  # told by their config.json


def kind_of(path):
    """What a folder or a weights file is, for who gave it where something else was wanted; "" if
    nothing is known of it."""
    path = Path(path)
    if path.is_file() and path.suffix != ".safetensors":
        return "it is a file that is no .safetensors"
    if path.is_file() and path.suffix == ".safetensors":
        lora = b".lora_A." in path.open("rb").read(10**6)  # of the header's names
        return "it is an adapter, as --adapter takes it" if lora else ""
    found = [kind for pattern, kind in KINDS if any(path.glob(pattern))]
    if found and not found[0] and (path / "config.json").exists():
        config = read_json(path / "config.json")
        if "_class_name" in config:
            return f"it is part of a generator ({config['_class_name']}): give the folder above it"
        kind = config.get("model_type")
        return "it is a judge, as --judge takes it" if kind == "qwen2_5_vl" else f"it is a {kind!r}"
    return found[0] if found else ""


def as_json(value):
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def write_json(path, value):
    write_whole(path, as_json(value))


def write_rows(path, rows):
    """Write a file of JSON lines."""
    write_whole(path, "".join(json.dumps(row) + "\n" for row in rows))


def append_rows(path, rows):
    """Write JSON lines at the end of a file, in one piece."""
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    with naming(path), open(path, "a", encoding="utf-8") as file:
        file.write(lines)


def lines_of(path):
    """The lines of a file as bytes; within JSON a carriage return is a space, so it ends none."""
    with open(path, "rb") as file:
        return list(file)


def parse_lines(path, parse):
    """[parse(object)] of a file of JSON lines.

    Raises UserError at the first line that cannot be used, and if there is none that can.
    """
    rows = []
    for number, line in enumerate(lines_of(path), 1):
        try:
            rows.append(parse(parse_object(line)))
        except (OSError, ValueError, KeyError, TypeError) as error:
            # a KeyError's text is the bare name of the key
            reason = f"no {error}" if isinstance(error, KeyError) else error
            where = f"{path}, line {number}"
            raise UserError(f"{where}: {reason}; mend or remove the line") from error
    if not rows:
        raise UserError(f"{path}: no rows")
    return rows


def read_records(path, until=math.inf):
    """The records of a file of JSON lines whose `step`, if they have one, is at most `until`.

    A last line that is half written is passed over. A file that does not exist has no records.
    Raises UserError for any other line that is no record.
    """
    lines = lines_of(path) if Path(path).is_file() else []
    records = []
    for number, line in enumerate(lines, 1):
        try:
            record = parse_object(line)
            if record.get("step", 0) <= until:
                records.append(record)
        except (ValueError, TypeError) as error:
            # A program that was killed while it wrote leaves half a line, but only as the last.
            if number < len(lines):
                raise UserError(f"{path}, line {number}: {error}; mend or remove it") from error
    return records


def whole_records(path):
    """As `read_records`, and cut a half-written last line off the file, so that one can append."""
    content = Path(path).read_bytes() if Path(path).exists() else b""
    if content and not content.endswith(b"\n"):
        # The next line would otherwise be joined to the broken one, and both be lost.
        os.truncate(path, content.rfind(b"\n") + 1)
    return read_records(path)


# --------------------------------------------------------------------------------------------------
# Pictures

MOST_PIXELS = 2**26  # of a picture: a few bytes can say a side of any length, and fill the memory
LONGEST_SHAPE = 200  # times as long as wide, which is what Qwen2.5-VL takes


def to_rgb(image):
    """A PIL image in RGB; white shows through where it is transparent."""
    if image.mode.startswith("I"):  # 16 bits of grey, which Pillow would cut off at 255
        image = Image.fromarray((np.asarray(image) // 257).clip(0, 255).astype(np.uint8))
    # A palette image has no band for it but may name one of its colours as transparent.
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def open_picture(path):
    """The picture in a file as an RGB PIL image, decoded whole, upright as its EXIF says. Raises
    UserError that names it."""
    try:
        return decode_picture(endless_refused(path))
    except Exception as error:  # Pillow raises many kinds for a damaged file
        reason = error if isinstance(error, OSError) else type(error).__name__
        raise UserError(f"{path}: cannot be read as a picture ({reason}); make it again, as PNG, "
                        f"JPEG or WebP") from error


def decode_picture(file):
    """As `open_picture`, of a path or an open file, with whatever errors Pillow raises."""
    # Only formats that Pillow reads itself: for others it may start foreign programs.
    with Image.open(file, formats=("PNG", "JPEG", "WEBP")) as image:
        width, height = image.size
        if width * height > MOST_PIXELS:
            raise OSError(f"{width}×{height} pixels, more than {MOST_PIXELS:,} in all")
        if max(width, height) > LONGEST_SHAPE * min(width, height):
            raise OSError(f"{width}×{height} pixels, more than {LONGEST_SHAPE} times as long as "
                          f"wide")
        return to_rgb(ImageOps.exif_transpose(image))


def png(image, **facts):
    """The bytes of a PNG of a PIL image, with its facts as text chunks; of a drawn picture also as
    one text `parameters`, where image browsers and web interfaces of Stable Diffusion look."""
    info = PngInfo()
    if {"prompt", "seed", "steps", "guidance", "model"} <= facts.keys():
        facts = facts | {"parameters": parameters_of(image, facts)}
    for key, value in facts.items():
        info.add_itxt(key, str(value))
    content = io.BytesIO()
    image.save(content, "PNG", pnginfo=info)
    return content.getvalue()


def data_url(content, kind="png"):
    """An address that holds a picture's bytes itself, for pages and requests."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def save_png(image, path, **facts):
    """Write a PNG with its facts as text chunks."""
    return write_whole(path, png(image, **facts))


def parameters_of(image, facts):
    """The facts of a drawn picture as AUTOMATIC1111's web interface writes them: a line with the
    prompt, then one of names and values."""
    told = {
        "Steps": facts["steps"], "Sampler": "Euler", "CFG scale": facts["guidance"],
        "Seed": facts["seed"], "Size": f"{image.width}x{image.height}", "Model": facts["model"]}
    for name in ("valence", "arousal"):
        if name in facts:
            told[name.capitalize()] = facts[name]
    shown = []
    for name, value in told.items():
        value = str(value)
        # a mark that divides names and values is read as part of a value only in quotes
        quoted = json.dumps(value, ensure_ascii=False) if set(",:\n") & set(value) else value
        shown.append(f"{name}: {quoted}")
    return facts["prompt"] + "\n" + ", ".join(shown)
