"""What a data set is, before (`Source`) and after (`Dataset`) its texts are tokenised and its splits are drawn."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from fedsim.config import nearest
from fedsim.randomness import stream

TEST_SHARE = 0.2  # of all rows, where a set has no test split of its own

SPLITS = ("train", "validation", "test")
SPLIT_WORDS = {"train": "train", "training": "train", "validation": "validation", "valid": "validation"}
SPLIT_WORDS |= {"val": "validation", "dev": "validation", "test": "test"}  # what sets call their splits
NATURAL = ("client", "domain")  # natural keys that a reader may find, by `client_column` and `domain_column`


class Columns(NamedTuple):
    """Which columns, features or arrays of a set to read."""

    text: str = "text"
    label: str = "label"
    client: str | None = None
    domain: str | None = None

    @property
    def natural(self) -> dict[str, str]:
        """The natural keys asked for -> their columns."""
        return {key: column for key in NATURAL if (column := getattr(self, key)) is not None}

    def require(self, known: Iterable[str], where: str, *, text: str | None = None) -> None:
        """Raises `ValueError` for the first wanted column that is not known; `text` stands for another input."""
        known = list(known)
        for option in ("text", "label", *self.natural):
            wanted = text if option == "text" and text else getattr(self, option)
            if wanted not in known:
                raise ValueError(
                    f"Expected {option}_column={wanted!r} to be a column in {where}, among "
                    f"{', '.join(map(repr, known))}{nearest(wanted, known)}; set {option}_column."
                )


class Source(NamedTuple):
    """A set as it was read: rows of all splits one after another, texts not yet tokenised."""

    name: str
    x: np.ndarray | list[str]  # arrays (N, ...), or N texts
    y: np.ndarray  # (N,) int32 class of each row
    splits: Mapping[str, np.ndarray]  # "train", and "validation" and "test" where the set has them -> int64 rows
    classes: tuple[str, ...]
    kind: str  # "text", "image" or "array"
    licence: str
    key: str | None = None  # a hash of the content, where tokens may be kept in the cache
    natural: Mapping[str, np.ndarray] = {}  # natural keys of rows (author, domain ...), each (N,)


class Dataset(NamedTuple):
    """A set that is ready to train on; the three splits are disjoint rows of `x` and `y`."""

    name: str
    x: Any  # a pytree of arrays with leading axis N; texts (N, T) int32 token ids, images (N, H, W, C) uint8
    y: np.ndarray  # (N,) int32
    train: np.ndarray  # int64 rows, ascending
    validation: np.ndarray  # int64 rows, ascending
    test: np.ndarray  # int64 rows, ascending
    classes: tuple[str, ...]
    kind: str  # "text", "image" or "array"
    licence: str
    natural: dict[str, np.ndarray]  # natural keys of rows (author, domain ...), each (N,); may be empty


def divide(
    splits: Mapping[str, np.ndarray], *, validation: float, examples: int | None, seed: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows of train, validation and test: own splits are kept, missing ones are drawn from train by seed.

    First test (a fifth of the rows) where there is none, then validation (the share `validation` of what is left of
    train), last the `examples` that are kept of train; so a smaller `examples` changes neither of the other two.

    Raises:
        ValueError: a split that would be empty, or `examples` beyond what there is.
    """
    train = np.asarray(splits["train"], np.int64)
    held = {name: np.asarray(splits[name], np.int64) for name in SPLITS[1:] if name in splits}
    for name, share in (("test", TEST_SHARE), ("validation", validation)):
        if name not in held:
            count = round(share * len(train))
            order = stream(seed, name).permutation(train)
            held[name], train = order[:count], order[count:]
        if not len(held[name]) or not len(train):
            raise ValueError(
                f"Expected at least one row of train and of {name}, got {len(train)} and {len(held[name])}; "
                "use more data or another share of validation."
            )
    if examples is not None:
        if examples > len(train):
            raise ValueError(f"Expected examples={examples} <= {len(train)} training rows; lower it or leave it out.")
        train = stream(seed, "examples").permutation(np.sort(train))[:examples]
    return np.sort(train), np.sort(held["validation"]), np.sort(held["test"])


def class_ids(labels: Sequence[str]) -> tuple[np.ndarray, tuple[str, ...]]:
    """Maps labels to (N,) int32 ids and their sorted classes; labels that are all whole numbers sort as numbers."""
    names, ids = np.unique(np.asarray(labels, dtype=np.str_), return_inverse=True)
    try:
        order = np.argsort([int(name) for name in names], kind="stable")
    except ValueError:
        order = np.arange(len(names))
    rank = np.empty(len(names), np.int32)
    rank[order] = np.arange(len(names), dtype=np.int32)
    return rank[ids].astype(np.int32), tuple(str(names[i]) for i in order)


def natural_key(values: Sequence[Any], key: str, where: Callable[[int], str]) -> np.ndarray:
    """A natural key of N rows as an array (N,) of whole numbers, where all are, or else of words.

    Raises:
        ValueError: a value that is missing, empty, or neither a whole number nor a word; `where` names its row.
    """
    for row, value in enumerate(values):
        plain = isinstance(value, (int, np.integer)) or (isinstance(value, (str, bytes)) and value.strip())
        if not plain or isinstance(value, bool):
            raise ValueError(
                f"Expected a {key} (a word or a whole number) in {where(row)}, got {value!r}; remove or fill the row."
            )
    if all(isinstance(value, (int, np.integer)) for value in values):
        return np.asarray(values, np.int64)
    return np.asarray(
        [v.decode("utf-8", "replace") if isinstance(v, bytes) else str(v).strip() for v in values], np.str_
    )


def unheld(y: np.ndarray, rows: np.ndarray, classes: int) -> np.ndarray:
    """Numbers of the classes that none of the rows has: they keep their place in the head, and nobody can learn them."""
    return np.flatnonzero(np.bincount(y[rows], minlength=classes) == 0)


def check(source: Source) -> None:
    """Refuses what no training could use.

    Raises:
        ValueError: lengths that differ, fewer than two classes, a class named twice, a label out of range, a value that
            is not finite.
    """
    rows, classes = len(source.y), len(source.classes)
    if len(source.x) != rows:
        raise ValueError(f"Expected as many inputs as labels in {source.name}, got {len(source.x)} and {rows}.")
    if classes < 2:
        raise ValueError(f"Expected at least 2 classes in {source.name}, got {list(source.classes)}; check the labels.")
    if len(set(source.classes)) < classes:
        double = next(name for name in source.classes if source.classes.count(name) > 1)
        raise ValueError(f"Expected each class of {source.name} once, got {double!r} twice; give it another name.")
    for key, values in source.natural.items():
        if len(values) != rows:
            raise ValueError(f"Expected as many values of {key} as labels in {source.name}, got {len(values)}, {rows}.")
    outside = np.flatnonzero((source.y < 0) | (source.y >= classes))
    if len(outside):
        row = int(outside[0])
        raise ValueError(
            f"Expected 0 <= label={source.y[row]} < {classes} in row {row} of {source.name} "
            f"({len(outside)} such rows); correct the labels."
        )
    if isinstance(source.x, np.ndarray) and np.issubdtype(source.x.dtype, np.floating):
        bad = np.flatnonzero(~np.isfinite(source.x).reshape(rows, -1).all(axis=1))
        if len(bad):
            raise ValueError(
                f"Expected finite values in row {bad[0]} of {source.name} ({len(bad)} such rows hold NaN or infinity); "
                "remove or correct them."
            )
