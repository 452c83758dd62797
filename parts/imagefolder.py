"""Rows of a dataset in the layout of Hugging Face's imagefolder, beside our own.

    datasets.load_dataset("imagefolder", data_dir=folder)  # reads what `write_split` writes

The pictures of a split lie in a folder named after it, and beside them metadata.jsonl, with a line
for each picture: `file_name` and the row. Our own <split>.jsonl has the same rows.
"""

from pathlib import Path

from parts.files import write_rows

KEYS = ("id", "label", "v", "a", "neutral", "emotional", "labels")  # of a row, as data.Row has them


def place_of(split, name, suffix):
    """Where the picture of a row of a split lies within a dataset's folder."""
    return f"images/{split}/{name}{suffix.lower()}"


def write_split(folder, split, rows):
    """Write the rows of a split, dicts whose pictures are where `place_of` says, in both forms."""
    metadata = []
    for row in rows:
        # all lines have the same keys, with values of one type: load_dataset asks for that
        told = {key: row.get(key, "") for key in KEYS}
        metadata.append({"file_name": Path(row["image"]).name, **told})
    write_rows(Path(folder) / "images" / split / "metadata.jsonl", metadata)
    write_rows(Path(folder) / f"{split}.jsonl", rows)


def file_of(folder, split):
    """The file with the rows of a split: <split>.jsonl, or in its place a metadata.jsonl."""
    own = Path(folder) / f"{split}.jsonl"
    others = [Path(folder) / place / "metadata.jsonl" for place in (f"images/{split}", split)]
    return next((path for path in (own, *others) if path.is_file()), own)


def own_row(raw, folder, path):
    """A line of `path` as one of <split>.jsonl would be. Raises KeyError, TypeError, ValueError."""
    if path.name != "metadata.jsonl":
        return raw
    image = (path.parent / raw["file_name"]).relative_to(folder)  # ValueError for what is absolute
    row = {"id": image.stem, **raw, "image": image.as_posix()}
    for key in ("emotional", "labels"):  # what not every row has
        if row.get(key) in ("", None):
            row.pop(key, None)
    row.setdefault("neutral", row.get("text"))  # as captions are often called
    return row
