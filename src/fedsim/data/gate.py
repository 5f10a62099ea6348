"""The one gate that every source passes: labels before any cast, words, keys, texts, finite values, sizes in memory.

A reader hands over what it found, and says where each row lies; what cannot be used is refused here, by the same rules
for files, folders, TFDS, Hugging Face, arrays in memory and packaged sets.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from fedsim import host_memory
from fedsim.config import nearest
from fedsim.data.dataset import Dataset, Source
from fedsim.units import size

LONGEST_TEXT = 10**7  # characters: a library of books is in the wrong column, and no tokenizer holds it
LONGEST_WORD = 1000  # characters of a label or of a natural key
MOST_CLASSES = 100_000

Where = Callable[[int], str]

_HALF = re.compile("[\ud800-\udfff]")  # of a surrogate pair: no character, and not to be written as UTF-8


def texts(values: Sequence[Any], where: Where) -> list[str]:
    """The texts themselves, N of them.

    Raises:
        ValueError: one that is missing, blank, too long or no Unicode; `where` names its row.
    """
    for row, value in enumerate(values):
        if not isinstance(value, str) or not value.strip():
            raise ValueError(f"Expected a text in {where(row)}, got {value!r:.80}; remove or fill the row.")
        require_characters(value, LONGEST_TEXT, lambda row=row: where(row))
    return list(values)


def require_characters(value: str, most: int, where: Callable[[], str]) -> None:
    """Raises `ValueError` for a word or a text of more than `most` characters, or with half of a surrogate pair."""
    if len(value) > most:
        raise ValueError(
            f"Expected at most {most:,} characters in {where()}, got {len(value):,}; shorten or remove it."
        )
    if not value.isascii() and (half := _HALF.search(value)):
        raise ValueError(
            f"Expected Unicode text in {where()}, got half of a surrogate pair, {half.group()!a}, at character "
            f"{half.start()}; write the whole character, or remove the row."
        )


def labels(
    values: Any, where: Where, classes: Sequence[str] | None = None, *, counted: bool = False
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Ids (N,) int32 of N labels as they were read, and the classes; every check comes before the cast.

    A label is a word (blanks around it do not count; True and False are words) or a whole number. With `classes`,
    words are looked up among them and numbers count them from 0. Without, the classes are the labels that occur,
    sorted (`class_ids`), or, where labels are `counted` and all whole numbers, 0 to the largest.

    Raises:
        ValueError: a label that is missing, blank, a fraction, out of range or none of the classes; `where` names its row.
    """
    if isinstance(values, np.ndarray) and values.dtype.kind in "iu":
        return _counted(values, where, classes)
    values = values.tolist() if isinstance(values, np.ndarray) else values
    words = [_label(value, where, row) for row, value in enumerate(values)]
    numbers = all(isinstance(value, (int, np.integer)) and not isinstance(value, bool) for value in values)
    if numbers and (counted or classes is not None):
        return _counted(np.asarray(values, object), where, classes)  # object: Python's numbers of any size
    if classes is None:
        return class_ids(words)
    place = {name: i for i, name in enumerate(classes)}
    for row, word in enumerate(words):
        if word not in place:
            raise ValueError(
                f"Expected label={word!r} in {where(row)} to be one of the classes{nearest(word, classes)}; correct the "
                "label, or add it to classes."
            )
    return np.array([place[word] for word in words], np.int32), tuple(classes)


def _label(value: Any, where: Where, row: int) -> str:
    if not isinstance(value, (str, int, np.integer, np.bool_)) or not (word := str(value).strip()):
        raise ValueError(
            f"Expected a label (a word or a whole number) in {where(row)}, got {value!r:.80}; remove or fill the row."
        )
    require_characters(word, LONGEST_WORD, lambda: f"the label of {where(row)}")
    return word


def _counted(y: np.ndarray, where: Where, classes: Sequence[str] | None) -> tuple[np.ndarray, tuple[str, ...]]:
    """Whole numbers as ids of the classes, by default 0 to the largest number."""
    count = len(classes) if classes is not None else min(int(y.max(initial=-1)) + 1, MOST_CLASSES)
    outside = np.flatnonzero((y < 0) | (y >= count))
    if len(outside):
        row = int(outside[0])
        remedy = "correct the labels" if count < MOST_CLASSES else "number the classes 0, 1, 2 ..., or give words"
        raise ValueError(
            f"Expected 0 <= label={y[row]} < {count} in {where(row)} ({len(outside)} such rows); {remedy}."
        )
    return y.astype(np.int32), tuple(classes) if classes is not None else tuple(map(str, range(count)))


def class_names(names: Any, name: str) -> tuple[str, ...]:
    """Names of the classes that a set brings with it, without the blanks around them.

    Raises:
        ValueError: no list of words; a name that is blank, too long or no Unicode.
    """
    if isinstance(names, str) or np.ndim(names) != 1:
        raise ValueError(f"Expected classes of {name} to be a list of words, got {names!r:.80}; write ('no', 'yes').")
    words = tuple(str(word).strip() for word in names)
    for i, word in enumerate(words):
        if not word:
            raise ValueError(f"Expected a word as class {i} of {name}, got {str(names[i])!r}; give it a name.")
        require_characters(word, LONGEST_WORD, lambda i=i: f"the name of class {i} of {name}")
    return words


def class_ids(labels: Sequence[str]) -> tuple[np.ndarray, tuple[str, ...]]:
    """Maps labels to (N,) int32 ids and their sorted classes; labels that are all whole numbers sort as numbers."""
    names = sorted(set(labels))  # no array of words, whose memory is the longest word's times all rows
    try:
        names.sort(key=int)
    except ValueError:
        names.sort()
    place = {name: i for i, name in enumerate(names)}
    return np.array([place[label] for label in labels], np.int32), tuple(names)


def natural_key(values: Sequence[Any], key: str, where: Where) -> np.ndarray:
    """A natural key of N rows as an array (N,) of whole numbers, where all are, or else of words.

    Raises:
        ValueError: a value that is missing, empty, or neither a whole number nor a word; `where` names its row.
    """
    words: list[str] = []
    for row, value in enumerate(values):
        word = utf8(value, lambda row=row: f"the {key} of {where(row)}") if isinstance(value, bytes) else value
        number = isinstance(word, (int, np.integer)) and not isinstance(word, bool) and abs(int(word)) < 2**63
        if not number and not (isinstance(word, str) and word.strip()):
            raise ValueError(
                f"Expected a {key} (a word or a whole number) in {where(row)}, got {value!r:.80}; remove or fill the row."
            )
        words.append(str(word).strip())
        require_characters(words[-1], LONGEST_WORD, lambda row=row: f"the {key} of {where(row)}")
    if all(isinstance(value, (int, np.integer)) for value in values):
        return np.asarray(values, np.int64)
    longest = max(map(len, words), default=0)
    require_memory(
        4 * longest * len(words), f"{len(words):,} words of {key} as long as the longest, {longest:,}", "shorten them"
    )
    return np.asarray(words, np.str_)


def utf8(value: bytes, where: Callable[[], str]) -> str:
    """The bytes as text; raises `ValueError` where they are not UTF-8."""
    try:
        return value.decode()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"Expected UTF-8 in {where()}, got {error.object[error.start]:#x} at byte {error.start}; convert it."
        ) from None


def printable(word: str) -> str:
    """The word for a terminal or a picture: control characters, which could steer either, as their escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in word)


def require_memory(nbytes: int, what: str, remedy: str) -> None:
    """Raises `ValueError` where an array would be larger than the memory that this process can have, before it is allocated."""
    most = host_memory.total()
    if nbytes > most:
        raise ValueError(
            f"Expected {what} to need less memory than there is, not {size(nbytes)} of {size(most)}; {remedy}."
        )


def require_vocabulary(dataset: Dataset, vocabulary: int | None) -> None:
    """Raises `ValueError` for token ids that a backbone of so many tokens has not; None: unknown, or it takes any."""
    if vocabulary is None or dataset.kind != "text":
        return
    ids = dataset.x["ids"] if isinstance(dataset.x, dict) else dataset.x
    outside = np.flatnonzero((ids >= vocabulary).any(axis=1))
    if len(outside):
        row = int(outside[0])
        raise ValueError(
            f"Expected token ids below {vocabulary}, the vocabulary of the backbone, got {ids[row].max()} in row {row} "
            f"of {dataset.name} ({len(outside)} such rows); choose the backbone that the ids, or the tokenizer, are of."
        )


def check(source: Source) -> None:
    """Refuses what no training could use, whatever reader it came from.

    Raises:
        ValueError: lengths that differ, fewer than two classes or too many, a class named twice, a label out of range, inputs
            without values, a value that is not finite.
    """
    rows, classes = len(source.y), len(source.classes)
    if len(source.x) != rows:
        raise ValueError(f"Expected as many inputs as labels in {source.name}, got {len(source.x)} and {rows}.")
    if not (1 if source.turns else 2) <= classes <= MOST_CLASSES:
        told = list(source.classes) if classes < 2 else f"{classes:,}"
        raise ValueError(
            f"Expected at least 2 classes in {source.name}, and at most {MOST_CLASSES:,}, got {told}; check the labels."
        )
    if len(set(source.classes)) < classes:
        double = next(name for name in source.classes if source.classes.count(name) > 1)
        raise ValueError(f"Expected each class of {source.name} once, got {double!r} twice; give it another name.")
    for key, values in source.natural.items():
        if len(values) != rows:
            raise ValueError(f"Expected as many values of {key} as labels in {source.name}, got {len(values)}, {rows}.")
    _counted(source.y, lambda row: f"row {row} of {source.name}", source.classes)
    if not isinstance(source.x, np.ndarray):
        return
    if not source.x[:1].size:
        raise ValueError(
            f"Expected values in the rows of {source.name}, got inputs of shape {source.x.shape}; add some."
        )
    if np.issubdtype(source.x.dtype, np.floating):
        bad = np.flatnonzero(~np.isfinite(source.x).reshape(rows, -1).all(axis=1))
        if len(bad):
            raise ValueError(
                f"Expected finite values in row {bad[0]} of {source.name} ({len(bad)} such rows hold NaN or infinity); "
                "remove or correct them."
            )
