"""TensorFlow Datasets read through `tfds.data_source`: random access, and no TensorFlow."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
import math
import shlex
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from fedsim.config import nearest
from fedsim.data.dataset import SPLITS, Columns, Source
from fedsim.data.gate import class_names, labels, natural_key, require_memory, texts, utf8
from fedsim.data.pixels import require_bytes, require_one_size, resized

_BLOCK = 256  # decoded examples held beside the result: 50 MB of 256 x 256 images

Inputs = tuple[np.ndarray | list[str], str]


def read_tfds(name: str, data_dir: str | None, columns: Columns, side: int | None = None) -> Source:
    """A prepared TFDS set: its `image` feature, or else the text column, with the classes of the label column.

    The splits train, validation and test are read, as far as the set has them; all other features are left out.

    Args:
        name: as TFDS takes it: `NAME`, `NAME/CONFIG`, `NAME/CONFIG:VERSION`.
        data_dir: where TFDS looks for prepared sets; None is TFDS' own place.
        columns: names of features.
        side: resize images to this side while reading (`pixels.resized`); None leaves them as they are.

    Raises:
        ValueError: the set is not prepared in the array_record format, a feature is missing, images differ in size, a
            label is neither a whole number nor a word.
    """
    import tensorflow_datasets as tfds

    with _quiet():
        try:
            sources: Any = tfds.data_source(
                name, data_dir=data_dir, download=False, builder_kwargs={"file_format": "array_record"}
            )
        except Exception as error:  # unknown, unprepared and other formats each raise something else, KeyError included
            raise ValueError(_unprepared(name, data_dir, _reason(error))) from error
    if not sources:  # the code of the set is known, its files are not there
        raise ValueError(_unprepared(name, data_dir, "no files found"))
    info = next(iter(sources.values())).dataset_info
    features = info.features
    column = "image" if "image" in features else columns.text
    columns = columns.found(features, f"tfds:{name}", text=column)
    column = columns.text
    kept = [split for split in SPLITS if split in sources and len(sources[split])]
    if "train" not in kept:
        raise ValueError(f"Expected a split `train` in tfds:{name}, got {', '.join(sources)}; choose another set.")
    ends = np.cumsum([len(sources[split]) for split in kept])
    splits = {split: np.arange(end - len(sources[split]), end) for split, end in zip(kept, ends, strict=True)}

    def where(row: int) -> str:
        split = next(split for split in kept if row <= splits[split][-1])
        return f"row {row - splits[split][0]} of {split} of tfds:{name}"

    found: list[Any] = []
    natural: dict[str, list[Any]] = {key: [] for key in columns.natural}
    image = features[column] if type(features[column]).__name__ == "Image" else None
    if image is not None:
        for source in sources.values():
            source.decoders = {column: tfds.decode.SkipDecoding()}  # their depth is looked at first

    def inputs() -> Iterator[Any]:
        for split in kept:
            for example in _examples(sources[split], info, split):
                found.append(_label(example[columns.label], columns.label, where, len(found)))
                for key, feature in columns.natural.items():
                    natural[key].append(example[feature])
                yield example[column] if image is None else decoded(image, example[column], where(len(found) - 1))

    with _quiet():
        x, kind = stacked(inputs(), int(ends[-1]), where, side)
    named = getattr(features[columns.label], "names", None)
    y, classes = labels(found, where, class_names(named, f"tfds:{name}") if named else None, counted=True)
    keys = {key: natural_key(values, key, where) for key, values in natural.items()}
    licence = info.redistribution_info.license or "see the set's own page in TFDS"
    return Source(f"tfds:{name}", x, y, splits, classes, kind, licence, natural=keys)


def prepared(name: str, data_dir: str | None) -> Path | None:
    """The folder of a prepared set, as `read_tfds` finds it; None where there is none."""
    import tensorflow_datasets as tfds

    with _quiet():
        try:
            folder = Path(tfds.builder(name, data_dir=data_dir, file_format="array_record").data_path)
        except Exception:  # which `read_tfds` explains
            return None
    return folder if folder.is_dir() else None


def prepare(name: str, data_dir: str | None) -> Path:
    """Downloads a set and writes it in the array_record format, by TFDS and TensorFlow; gives the set's folder.

    What is prepared already is left alone.

    Raises:
        ValueError: TensorFlow is not installed, TFDS has no such set, or it cannot be downloaded; with the remedy.
    """
    if importlib.util.find_spec("tensorflow") is None:
        raise ValueError(
            f"Expected TensorFlow to be installed for preparing tfds:{name}; run pip install -e '.[tfds-prepare]' (a run "
            "itself needs no TensorFlow, so an environment of its own will do)."
        )
    import tensorflow_datasets as tfds

    try:
        builder = tfds.builder(name, data_dir=data_dir, file_format="array_record")
    except Exception as error:  # an unknown name, a bad config or version, another format: each raises its own
        known = tfds.list_builders(with_community_datasets=False)
        raise ValueError(
            f"Expected tfds:{name} to be a set that TFDS can write in the array_record format ({_reason(error)})"
            f"{nearest(name.partition('/')[0], known)}; where a copy in another format is in the way, prepare into another "
            "data_dir."
        ) from error
    try:
        builder.download_and_prepare()
    except Exception as error:  # of the network, of the disk, and of each set's own code
        raise ValueError(
            f"Expected TFDS to download and prepare tfds:{name} ({_reason(error)}). With a network: try again; sets that must "
            "be downloaded by hand say on their TFDS page where to put them."
        ) from error
    return Path(builder.data_dir)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps TFDS' warnings off the terminal: that OpenCV would decode faster, that a folder is incomplete."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _examples(source: Any, info: Any, split: str) -> Iterator[Any]:
    """The examples of a split, read in blocks: one call a block instead of one an example.

    Raises:
        ValueError: a damaged record; names the file.
    """
    for start in range(0, len(source), _BLOCK):
        end = min(start + _BLOCK, len(source))
        try:
            block = source.__getitems__(range(start, end))
        except Exception as error:  # of the record's reader, of the message in it, of each feature
            files = info.splits[split].filepaths
            ends = np.cumsum(info.splits[split].shard_lengths)
            first, last = np.searchsorted(ends, [start, end - 1], side="right")
            inside = [str(file) for file in files[first : last + 1]]
            raise ValueError(
                f"Expected rows {start} to {end - 1} of {split} to be readable in {', '.join(inside)} ({_reason(error)}); the "
                "file is damaged: delete the set's folder and prepare it again."
            ) from error
        yield from block


def decoded(feature: Any, encoded: bytes, where: str) -> np.ndarray:
    """An image as TFDS decodes it, after a look at its depth: TFDS cuts 16 bits to 8, or takes the lower 8 of them.

    Raises:
        ValueError: a damaged image, or one of more than 8 bits; `where` names its row.
    """
    from PIL import Image

    try:
        image = Image.open(io.BytesIO(encoded))
    except Exception as error:  # each of PIL's formats its own
        raise _damaged(where, error) from error
    if feature.np_dtype == np.uint8:
        require_bytes(image, where)
    try:
        return feature.decode_example_np(encoded)
    except Exception as error:  # of PIL or of OpenCV
        raise _damaged(where, error) from error


def _damaged(where: str, error: Exception) -> ValueError:
    return ValueError(f"Expected {where} to be an image ({_reason(error)}); prepare the set again.")


def _label(value: Any, feature: str, where: Callable[[int], str], row: int) -> int | str:
    if isinstance(value, (str, bytes)):
        return utf8(value, lambda: f"feature {feature!r} of {where(row)}") if isinstance(value, bytes) else value
    if np.ndim(value) == 0 and np.issubdtype(np.asarray(value).dtype, np.integer):
        return int(value)
    raise ValueError(
        f"Expected feature {feature!r} to be one class (a whole number or a word) in {where(row)}, got "
        f"{np.asarray(value).dtype} of shape {np.shape(value)}; set label_column to another feature."
    )


def stacked(inputs: Iterator[Any], count: int, where: Callable[[int], str], side: int | None) -> Inputs:
    """`count` inputs, texts as a list, images as (N, H, W, C) uint8, other arrays as float32; with their kind.

    Arrays are written into the result one by one, so that no second copy of the set is held.

    Raises:
        ValueError: inputs of different shapes; `where` names their rows.
    """
    first = next(inputs)
    if isinstance(first, (str, bytes)):
        read = [
            utf8(text, lambda row=row: where(row)) if isinstance(text, bytes) else text
            for row, text in enumerate(chain([first], inputs))
        ]
        return texts(read, where), "text"
    first = np.asarray(first)
    image = first.dtype == np.uint8 and first.ndim == 3
    shape = (side, side, first.shape[-1]) if image and side else first.shape
    require_memory(
        math.prod((count, *shape)) * (1 if image else 4),
        f"{count:,} inputs of shape {shape}",
        "take fewer, or image_store",
    )
    out = np.empty((count, *shape), np.uint8 if image else np.float32)
    for row, value in enumerate(chain([first], inputs)):
        if image and side:
            value = resized(value, side)
        if image:
            require_one_size(np.shape(value), shape, where(row), where(0))
        elif np.shape(value) != shape:
            raise ValueError(
                f"Expected inputs of one shape, got {shape} in {where(0)} and {np.shape(value)} in {where(row)}; "
                "choose another feature by text_column, or another config of the set."
            )
        out[row] = value
    return out, "image" if image else "array"


def _reason(error: Exception) -> str:
    """Type and first line of what a library raised."""
    return f"{type(error).__name__}: {(str(error).strip() or 'no reason given').splitlines()[0][:160]}"


def _unprepared(name: str, data_dir: str | None, reason: str) -> str:
    folder = Path(data_dir).expanduser() if data_dir else Path("~/tensorflow_datasets").expanduser()
    command = shlex.join(["fedsim", "data", "prepare", f"tfds:{name}", *(["--data-dir", data_dir] if data_dir else [])])
    return (
        f"Expected dataset='tfds:{name}' to be prepared under {folder} in the array_record format ({reason}). Prepare it "
        f"once: `{command}` (needs TensorFlow: pip install -e '.[tfds-prepare]'); where a copy in another format is in the "
        "way, prepare into another data_dir."
    )
