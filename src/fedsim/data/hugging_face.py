"""Sets of the Hugging Face hub, or written by `save_to_disk`, read by `datasets` where it is installed."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fedsim.data.dataset import SPLIT_WORDS, SPLITS, Columns, Source
from fedsim.data.gate import Where, class_names, labels, natural_key, texts
from fedsim.data.pixels import stacked

if TYPE_CHECKING:
    from PIL import Image


SAVED = ("dataset_dict.json", "state.json")  # of which `save_to_disk` writes one
_fingerprints: dict[str, str] = {}  # of sets that this process has read, by name


def read_hugging_face(name: str, columns: Columns, side: int | None = None) -> Source:
    """A set of `datasets`: its `image` column, or else the text column, with the classes of the label column.

    Args:
        name: a folder that `save_to_disk` wrote or that `load_dataset` reads, or a hub name, `OWNER/NAME` or
            `OWNER/NAME:CONFIG`.
        columns: names of columns; a `text` column of images is decoded as well.
        side: resize images to this side while reading (`pixels.resized`); None leaves them as they are.

    Raises:
        ValueError: `datasets` is not installed or cannot load the set, or a column, text or label cannot be used.
    """
    parts = _loaded(name)
    features = parts["train"].features
    column = "image" if "image" in features and type(features["image"]).__name__ == "Image" else columns.text
    columns = columns.found(features, f"hf:{name}", text=column)
    column = columns.text
    ends = np.cumsum([len(part) for part in parts.values()])
    splits = {split: np.arange(end - len(part), end) for (split, part), end in zip(parts.items(), ends, strict=True)}

    def where(row: int) -> str:
        split = next(split for split in parts if row <= splits[split][-1])
        return f"row {row - splits[split][0]} of {split} of hf:{name}"

    def whole(wanted: str) -> list[Any]:
        try:
            return [value for part in parts.values() for value in part[wanted][:]]
        except Exception as error:  # of a damaged file, each format its own
            raise ValueError(
                f"Expected column {wanted!r} of hf:{name} to be readable ({error}); load the set again."
            ) from error

    def place(wanted: str) -> Where:
        return lambda row: f"column {wanted!r} of {where(row)}"

    named = getattr(features[columns.label], "names", None)
    named = class_names(named, f"hf:{name}") if named else None
    y, classes = labels(whole(columns.label), place(columns.label), named)
    if type(features[column]).__name__ == "Image":
        x, kind = _images(parts, splits, column, where, side), "image"
    else:
        x, kind = texts(whole(column), place(column)), "text"
    natural = {key: natural_key(whole(wanted), key, where) for key, wanted in columns.natural.items()}
    licence = parts["train"].info.license or "see the set's own card on the hub"
    return Source(f"hf:{name}", x, y, splits, classes, kind, licence, natural=natural)


def fingerprint(name: str) -> str | None:
    """The fingerprints that `datasets` gives to the parts of a set of the hub; None where it gives none."""
    if name not in _fingerprints:
        _loaded(name)
    return _fingerprints.get(name)


def _loaded(name: str) -> dict[str, Any]:
    """The parts train, validation and test of the set, as far as it has them; one part without a name is train."""
    try:
        import datasets  # pyrefly: ignore[missing-import] - of the extra `hf`
    except ImportError:
        raise ValueError(
            f"Expected `datasets` to be installed for dataset='hf:{name}'; run pip install -e '.[hf]'."
        ) from None
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    folder = Path(name).expanduser()
    try:
        if folder.is_dir() and any((folder / name).is_file() for name in SAVED):
            found: Any = datasets.load_from_disk(str(folder))
        elif folder.is_dir():  # tables or images, by the layouts that `datasets` knows
            found = datasets.load_dataset(str(folder.resolve()))
        else:
            repository, _, config = name.partition(":")
            found = datasets.load_dataset(repository, config or None)
    except Exception as error:  # of the network, of the hub, and of each set's own code
        cause = error.__cause__ or error  # where `datasets` only says that it failed
        reason = (str(cause).strip() or type(cause).__name__).splitlines()[0][:200]
        raise ValueError(
            f"Expected dataset='hf:{name}' to be a folder that save_to_disk wrote, or a set that datasets.load_dataset "
            f"reads ({type(cause).__name__}: {reason}); check name, config (hf:OWNER/NAME:CONFIG) and network."
        ) from error
    parts = {"train": found} if not hasattr(found, "keys") else {SPLIT_WORDS.get(k): found[k] for k in found}
    kept = {split: parts[split] for split in SPLITS if split in parts and len(parts[split])}
    if "train" not in kept:
        raise ValueError(f"Expected a split `train` in hf:{name}, got {', '.join(found)}; choose another set.")
    marks = [getattr(part, "_fingerprint", None) for part in kept.values()]
    if all(marks):
        _fingerprints[name] = ", ".join(f"{split} {mark}" for split, mark in zip(kept, marks, strict=True))
    return kept


def _images(
    parts: dict[str, Any], splits: dict[str, np.ndarray], column: str, where: Any, side: int | None
) -> np.ndarray:
    import datasets  # pyrefly: ignore[missing-import] - of the extra `hf`
    from PIL import Image

    encoded = {split: part.cast_column(column, datasets.Image(decode=False)) for split, part in parts.items()}
    starts = [(split, int(rows[0])) for split, rows in splits.items()]

    def opened(row: int) -> Image.Image:
        split, start = next((s, first) for s, first in reversed(starts) if row >= first)
        value = encoded[split][row - start][column]
        if value is None:
            raise ValueError("there is none")
        return Image.open(io.BytesIO(value["bytes"]) if value["bytes"] is not None else value["path"])

    return stacked(sum(map(len, parts.values())), opened, where, side)
