"""Arrays in memory and in .npz files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fedsim.config import nearest, require_known
from fedsim.data.dataset import NATURAL, SPLITS, Columns, Source
from fedsim.data.gate import check, class_names, labels, natural_key, texts

_LICENCE = "your own"
_FIXED = ("x", "y", "classes", *SPLITS)  # names of arrays that are no natural key


def arrays(
    x: Any,
    y: Any,
    *,
    splits: Mapping[str, Any] | None = None,
    classes: Sequence[str] | None = None,
    client: Any = None,
    domain: Any = None,
    name: str = "arrays",
) -> Source:
    """A data set from arrays in memory, for `fedsim.run(Config(dataset="arrays"), data=fedsim.arrays(x, y))`.

    uint8 `x` of 3 or 4 axes are images (a channel axis is added to three), other whole numbers of 2 axes are token ids,
    everything else becomes float32; strings are texts. An array of the right dtype is not copied.

    Args:
        x: inputs (N, ...), or N strings.
        y: labels (N,): whole numbers 0..C-1, or strings.
        splits: `train`, and `validation` and `test` where there are, as row numbers; default: drawn by seed.
        classes: names of the whole numbers, (C,).
        client: who has the example, (N,) whole numbers or strings: the natural key of a partition by clients.
        domain: of which domain it is, (N,) whole numbers or strings.
        name: in messages and records.

    Raises:
        ValueError: what cannot be used, with the row: lengths that differ, labels out of range, NaN or infinity.
    """
    natural = {key: values for key, values in (("client", client), ("domain", domain)) if values is not None}
    source = _source(x, y, splits or {}, classes, natural, name, name)
    check(source)
    return source


def read_arrays(file: Path, columns: Columns | None = None) -> Source:
    """Arrays `x` (N, ...) and `y` (N,) of an .npz file, as `arrays` takes them.

    `classes`, `train`, `validation`, `test`, `client` and `domain` are used where they are there; `columns` may name
    other arrays for the last two.

    Raises:
        ValueError: a missing array, a dtype that cannot be used, or row numbers that overlap or do not exist.
    """
    from fedsim.data.tables import existing

    existing(file)
    try:
        with np.load(file, allow_pickle=False) as archive:
            found = {name: archive[name] for name in archive.files}
            double = len(archive.files) - len(found)
    except Exception as error:  # zip, header and pickle problems each have their own type
        raise ValueError(
            f"Expected {file} to be an .npz file of plain arrays ({error}); write it by np.savez."
        ) from error
    if double:
        raise ValueError(f"Expected each array of {file} once, got {double} names twice; write it by np.savez.")
    for name in ("x", "y"):
        if name not in found:
            raise ValueError(
                f"Expected an array `{name}` in {file}, got {sorted(found)}; write np.savez(file, x=x, y=y)."
            )
    if found["x"].dtype.kind == "U":
        raise ValueError(
            f"Expected x of {file} to hold numbers, got {found['x'].dtype}; write texts as .csv or .jsonl."
        )
    asked = columns.natural if columns else {}
    for key, column in asked.items():
        others = [name for name in found if name not in _FIXED]
        if column not in others:
            raise ValueError(
                f"Expected {key}_column={column!r} to be an array of {file}, among {', '.join(map(repr, others)) or 'none'}"
                f"{nearest(column, others)}; set {key}_column, or add the array."
            )
    natural = {key: found[column] for key in NATURAL if (column := asked.get(key, key)) in found}
    splits = {name: found[name] for name in SPLITS if name in found}
    return _source(found["x"], found["y"], splits, found.get("classes"), natural, file.name, str(file))


def _source(
    x: Any, y: Any, splits: Mapping[str, Any], classes: Any, natural: Mapping[str, Any], name: str, where: str
) -> Source:
    inputs, kind = _inputs(x, where)
    ids, names = _targets(_plain(y, "y", where), classes, where)
    if len(inputs) != len(ids):
        raise ValueError(f"Expected as many rows in x as in y of {where}, got {len(inputs)} and {len(ids)}.")
    require_known(splits, SPLITS, "split")
    rows = {
        split: _row_numbers(_plain(splits[split], split, where), split, len(ids), where)
        for split in SPLITS
        if split in splits
    }
    if rows and "train" not in rows:
        raise ValueError(f"Expected an array `train` beside {sorted(rows)} in {where}; add it or remove the others.")
    used = np.concatenate(list(rows.values())) if rows else np.arange(0)
    if len(np.unique(used)) < len(used):
        raise ValueError(f"Expected each row number once in train, validation and test of {where}; remove the doubles.")
    keys = {key: _key(_plain(values, key, where), key, len(ids), where) for key, values in natural.items()}
    return Source(name, inputs, ids, rows or {"train": np.arange(len(ids))}, names, kind, _LICENCE, natural=keys)


def _plain(values: Any, what: str, where: str) -> np.ndarray:
    """What NumPy makes of lists, data frames, series and tensors: rows count from the first, whatever their index says.

    Words stay Python's strings in an object array, as an array of fixed width is as wide as the longest of them.
    """
    if isinstance(values, np.ma.MaskedArray):
        masked = np.ma.getmaskarray(values)
        rows = np.flatnonzero(masked.reshape(len(masked), -1).any(axis=1)) if masked.ndim else [0] * int(masked)
        if len(rows):
            raise ValueError(
                f"Expected no masked values in {what} of {where}, got some in row {rows[0]} ({len(rows)} such rows); remove or "
                "fill them."
            )
    try:
        words = isinstance(values, Sequence) and len(values) and isinstance(values[0], str)
        return np.array(values, object) if words else np.asarray(values)
    except Exception as error:  # rows of different lengths, tensors on a device: each its own
        raise ValueError(f"Expected {what} of {where} to be an array ({error}); give one that NumPy takes.") from error


def _inputs(x: Any, where: str) -> tuple[np.ndarray | list[str], str]:
    x = _plain(x, "x", where)
    if x.ndim == 1 and (x.dtype.kind == "U" or (x.dtype == object and any(isinstance(text, str) for text in x))):
        return texts(x.tolist(), lambda row: f"row {row} of {where}"), "text"
    if x.dtype == object and x.ndim > 1:
        x = _numbers(x, where)
    if x.ndim < 2:
        raise ValueError(f"Expected x of {where} to have 2 axes or more, got shape {x.shape}; the first is the rows.")
    if x.dtype == np.uint8 and x.ndim in (3, 4):
        return (x if x.ndim == 4 else x[..., None]), "image"
    if np.issubdtype(x.dtype, np.integer) and x.dtype != np.uint8 and x.ndim == 2:
        outside = np.flatnonzero(((x < 0) | (x > np.iinfo(np.int32).max)).any(axis=1))
        if len(outside):
            row = int(outside[0])
            worst = x[row].min() if x[row].min() < 0 else x[row].max()
            raise ValueError(
                f"Expected token ids from 0 to 2**31 - 1 in row {row} of {where}, got {worst} ({len(outside)} such rows); "
                "correct them (whole numbers of 2 axes are token ids: give others as floats)."
            )
        return x.astype(np.int32, copy=False), "text"
    if np.issubdtype(x.dtype, np.floating) or np.issubdtype(x.dtype, np.integer):
        with np.errstate(over="ignore"):  # what is too large for float32 is refused as infinite
            return x.astype(np.float32, copy=False), "array"
    raise ValueError(f"Expected x of {where} to hold numbers, got {x.dtype}; give numbers, or a list of strings.")


def _numbers(x: np.ndarray, where: str) -> np.ndarray:
    """An object array, as of a data frame with columns of several types, as numbers."""
    for row, values in enumerate(x):
        if not all(isinstance(value, (int, float, np.number)) for value in values.flat):
            wrong = next(value for value in values.flat if not isinstance(value, (int, float, np.number)))
            raise ValueError(
                f"Expected numbers in row {row} of {where}, got {wrong!r:.40}; remove, fill or encode them."
            )
    return np.asarray(x.tolist())


def _targets(y: np.ndarray, names: Any, where: str) -> tuple[np.ndarray, tuple[str, ...]]:
    if y.ndim != 1 or y.dtype.kind not in "iuUbO" or not len(y):
        bad = np.flatnonzero(~np.isfinite(y)) if y.ndim == 1 and y.dtype.kind == "f" else []
        raise ValueError(
            f"Expected y of {where} to be a list of whole numbers or words, got {y.dtype} of shape {y.shape}"
            f"{f', {y[bad[0]]} in row {bad[0]}' if len(bad) else ''}; number the classes 0, 1, 2 ..., or name them."
        )
    classes = None if names is None else class_names(names, where)
    return labels(y, lambda row: f"row {row} of {where}", classes, counted=True)


def _row_numbers(rows: np.ndarray, name: str, total: int, where: str) -> np.ndarray:
    if rows.ndim != 1 or not np.issubdtype(rows.dtype, np.integer) or not len(rows):
        raise ValueError(f"Expected {name} of {where} to be a list of row numbers, got {rows.dtype} {rows.shape}.")
    if rows.min() < 0 or rows.max() >= total:
        raise ValueError(f"Expected 0 <= rows of {name} < {total} in {where}, got {rows.min()} to {rows.max()}.")
    return rows.astype(np.int64)


def _key(values: np.ndarray, key: str, rows: int, where: str) -> np.ndarray:
    if values.shape != (rows,):
        raise ValueError(f"Expected {key} of {where} to have a value a row, got shape {values.shape}, {rows} rows.")
    if np.issubdtype(values.dtype, np.integer):
        return values
    return natural_key(values.tolist(), key, lambda row: f"row {row} of {where}")
