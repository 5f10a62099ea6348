"""TensorFlow Datasets read through `tfds.data_source`: random access, and no TensorFlow."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fedsim.config import nearest
from fedsim.data.dataset import SPLITS, Source


def read_tfds(name: str, data_dir: str | None, text_column: str, label_column: str) -> Source:
    """A prepared TFDS set: its `image` feature, or else `text_column`, with the classes of `label_column`.

    Raises:
        ValueError: the set is not prepared in the array_record format, a feature is missing, images differ in size.
    """
    import tensorflow_datasets as tfds

    with _quiet():
        try:
            sources: Any = tfds.data_source(
                name, data_dir=data_dir, download=False, builder_kwargs={"file_format": "array_record"}
            )
        except Exception as error:  # unknown, unprepared and other formats each raise something else, KeyError included
            reason = (str(error).strip() or type(error).__name__).splitlines()[0][:160]
            raise ValueError(_unprepared(name, data_dir, f"{type(error).__name__}: {reason}")) from error
    if not sources:  # the code of the set is known, its files are not there
        raise ValueError(_unprepared(name, data_dir, "no files found"))
    info = next(iter(sources.values())).dataset_info
    features = info.features
    column = "image" if "image" in features else text_column
    for option, wanted in (("text_column", column), ("label_column", label_column)):
        if wanted not in features:
            raise ValueError(
                f"Expected {option}={wanted!r} to be a feature of tfds:{name}, among {', '.join(features)}"
                f"{nearest(wanted, features)}; set {option}."
            )
    kept = [split for split in SPLITS if split in sources and len(sources[split])]
    if "train" not in kept:
        raise ValueError(f"Expected a split `train` in tfds:{name}, got {', '.join(sources)}; choose another set.")
    inputs: list[Any] = []
    labels: list[int] = []
    splits = {}
    for split in kept:
        splits[split] = np.arange(len(labels), len(labels) + len(sources[split]))
        with _quiet():
            for example in _examples(sources[split]):
                inputs.append(example[column])
                labels.append(int(example[label_column]))
    names = getattr(features[label_column], "names", None) or [str(i) for i in range(max(labels) + 1)]
    x, kind = _stacked(inputs, f"tfds:{name}")
    licence = info.redistribution_info.license or "see the set's own page in TFDS"
    return Source(f"tfds:{name}", x, np.asarray(labels, np.int32), splits, tuple(names), kind, licence)


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


def _examples(source: Any) -> Any:
    """The examples of a split, read in blocks: one call a block instead of one an example."""
    for start in range(0, len(source), 1024):
        yield from source.__getitems__(range(start, min(start + 1024, len(source))))


def _stacked(inputs: Sequence[Any], name: str) -> tuple[np.ndarray | list[str], str]:
    """Texts as a list, images as (N, H, W, C) uint8, other arrays as float32 or int32; with their kind."""
    first = inputs[0]
    if isinstance(first, (str, bytes)):
        texts = [text.decode("utf-8", "replace") if isinstance(text, bytes) else text for text in inputs]
        return texts, "text"
    first = np.asarray(first)
    for row, value in enumerate(inputs):
        if np.shape(value) != first.shape:
            raise ValueError(
                f"Expected inputs of one size in {name}, got {first.shape} and, in row {row}, {np.shape(value)}; "
                "resize them to one size (another config of the set may have them so)."
            )
    if first.dtype == np.uint8 and first.ndim == 3:
        return np.stack(inputs), "image"
    return np.stack(inputs).astype(np.float32), "array"


def _unprepared(name: str, data_dir: str | None, reason: str) -> str:
    folder = Path(data_dir).expanduser() if data_dir else Path("~/tensorflow_datasets").expanduser()
    call = f"tfds.builder({name!r}, data_dir={str(folder)!r}, file_format='array_record').download_and_prepare()"
    return (
        f"Expected dataset='tfds:{name}' to be prepared under {folder} in the array_record format "
        f"({reason}). Prepare it once where TensorFlow is installed (`pip install tensorflow-cpu tensorflow-datasets`, "
        f'in an environment of its own): `python -c "import tensorflow_datasets as tfds; {call}"`; '
        "where a copy in another format is in the way, prepare into another data_dir."
    )
