"""What a data set is, before (`Source`) and after (`Dataset`) its texts are tokenised and its splits are drawn."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Mapping, Sequence
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

    def found(self, known: Iterable[str], where: str, *, text: str | None = None) -> Columns:
        """These columns as the set spells them: as they were typed, or else with other blanks around the name.

        Args:
            known: the names of the set's columns; a name may be there twice.
            text: stands for another input.

        Raises:
            ValueError: a wanted column that is not there, or more than once.
        """
        known = list(known)
        wanted = {**self._asdict(), "text": text or self.text}
        return Columns(**{option: name and spelt(name, option, known, where) for option, name in wanted.items()})


def spelt(wanted: str, option: str, known: Sequence[str], where: str) -> str:
    """The one name among the known ones that is the wanted one, but for blanks around it; `option`_column asks for it."""
    same = [name for name in known if name == wanted] or [name for name in known if plain(name) == plain(wanted)]
    if not same:
        raise ValueError(
            f"Expected {option}_column={wanted!r} to be a column in {where}, among "
            f"{', '.join(map(repr, known))}{nearest(wanted, known)}; set {option}_column."
        )
    if len(same) > 1:
        raise ValueError(
            f"Expected one column {wanted!r} in {where}, got {len(same)} of that name ({', '.join(map(repr, known))}); rename "
            "all but one."
        )
    return same[0]


def plain(name: str) -> str:
    """A column's name without blanks and byte order marks around it, its accents in one form."""
    return unicodedata.normalize("NFC", name).strip(" \t\r\n\v\f\xa0\ufeff")


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
    turns: Sequence[tuple[Any, ...]] | None = (
        None  # N conversations (`chat.Conversation`), of which `x` is the plain text
    )


class Dataset(NamedTuple):
    """A set that is ready to train on; the three splits are disjoint rows of `x` and `y`."""

    name: str
    x: Any  # a pytree of arrays with leading axis N; texts (N, T) int32 token ids, alone or beside "loss", images (N, H, W, C) uint8
    y: np.ndarray  # (N,) int32
    train: np.ndarray  # int64 rows, ascending
    validation: np.ndarray  # int64 rows, ascending
    test: np.ndarray  # int64 rows, ascending
    classes: tuple[str, ...]
    kind: str  # "text", "image" or "array"
    licence: str
    natural: dict[str, np.ndarray]  # natural keys of rows (author, domain ...), each (N,); may be empty
    tokenizer: str | None = None  # the tokenizer.json that was trained on these texts, where the backbone brings none


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


def unheld(y: np.ndarray, rows: np.ndarray, classes: int) -> np.ndarray:
    """Numbers of the classes that none of the rows has: they keep their place in the head, and nobody can learn them."""
    return np.flatnonzero(np.bincount(y[rows], minlength=classes) == 0)
