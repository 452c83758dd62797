"""Files: written whole or not at all; JSON, JSON lines and pictures, with errors that name them."""

import json
import math
import os
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo

from parts.cli import UserError

UMASK = os.umask(0o022)  # what new files leave out of their rights; asking for it sets it
os.umask(UMASK)


def write_whole(path, content):
    """Write text, bytes, or what content(temporary path) writes, and only then give it its name.

    Whoever reads `path`, also after a crash, finds the old content or the new, never a part.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    if callable(content):
        content(temporary)
    elif isinstance(content, bytes):
        temporary.write_bytes(content)
    else:
        temporary.write_text(content, encoding="utf-8")
    os.chmod(temporary, 0o666 & ~UMASK)  # safetensors lets nobody else read its files
    # On the disk before it has its name: after a power cut a file could else be there, and empty.
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())
    # Renaming within a folder is one step of the file system: there is no moment in between.
    os.replace(temporary, path)
    sync_folder(path.parent)
    return path


def sync_folder(folder):
    """Let a folder's names, too, be on the disk when this returns."""
    if os.name == "posix":  # Windows does not open folders
        handle = os.open(folder, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)


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


def read_json(path):
    """The object in a JSON file, as a dict. Raises UserError that names the file."""
    try:
        return parse_object(endless_refused(path).read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path}: missing or not a JSON object; download the checkpoint again") from error


def parse_object(content):
    """The JSON object in bytes of UTF-8, as a dict. Raises ValueError for anything else."""
    try:
        value = json.loads(content.decode("utf-8-sig"))
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if not isinstance(value, dict):
        raise ValueError(f"expected a JSON object, got {type(value).__name__}")
    return value


def write_json(path, value):
    write_whole(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_rows(path, rows):
    """Write JSON lines."""
    write_whole(path, "".join(json.dumps(row) + "\n" for row in rows))


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


def save_png(image, path, **facts):
    """Write a PNG with its facts as text chunks."""
    info = PngInfo()
    for key, value in facts.items():
        info.add_itxt(key, str(value))
    return write_whole(path, lambda temporary: image.save(temporary, "PNG", pnginfo=info))
