"""Arrays in memory and in .npz files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fedsim.config import nearest, require_known
from fedsim.data.dataset import NATURAL, SPLITS, Columns, Source, check, class_ids, natural_key

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

    try:
        with np.load(existing(file), allow_pickle=False) as archive:
            found = {name: archive[name] for name in archive.files}
    except Exception as error:  # zip, header and pickle problems each have their own type
        if isinstance(error, ValueError) and str(error).startswith("Expected"):
            raise
        raise ValueError(
            f"Expected {file} to be an .npz file of plain arrays ({error}); write it by np.savez."
        ) from error
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
    labels, names = _targets(np.asarray(y), classes, where)
    if len(inputs) != len(labels):
        raise ValueError(f"Expected as many rows in x as in y of {where}, got {len(inputs)} and {len(labels)}.")
    require_known(splits, SPLITS, "split")
    rows = {
        split: _row_numbers(np.asarray(splits[split]), split, len(labels), where) for split in SPLITS if split in splits
    }
    if rows and "train" not in rows:
        raise ValueError(f"Expected an array `train` beside {sorted(rows)} in {where}; add it or remove the others.")
    used = np.concatenate(list(rows.values())) if rows else np.arange(0)
    if len(np.unique(used)) < len(used):
        raise ValueError(f"Expected each row number once in train, validation and test of {where}; remove the doubles.")
    keys = {key: _key(np.asarray(values), key, len(labels), where) for key, values in natural.items()}
    return Source(name, inputs, labels, rows or {"train": np.arange(len(labels))}, names, kind, _LICENCE, natural=keys)


def _inputs(x: Any, where: str) -> tuple[np.ndarray | list[str], str]:
    if not isinstance(x, np.ndarray) and len(x) and isinstance(x[0], str):
        x = list(x)
        for row, text in enumerate(x):
            if not isinstance(text, str) or not text.strip():
                raise ValueError(f"Expected a text in row {row} of {where}, got {text!r}; remove or fill the row.")
        return x, "text"
    x = np.asarray(x)
    if x.ndim == 1 and x.dtype.kind == "U":
        return _inputs(x.tolist(), where)
    if x.ndim < 2:
        raise ValueError(f"Expected x of {where} to have 2 axes or more, got shape {x.shape}; the first is the rows.")
    if x.dtype == np.uint8 and x.ndim in (3, 4):
        return (x if x.ndim == 4 else x[..., None]), "image"
    if np.issubdtype(x.dtype, np.integer) and x.dtype != np.uint8 and x.ndim == 2:
        return x.astype(np.int32, copy=False), "text"
    if np.issubdtype(x.dtype, np.floating) or np.issubdtype(x.dtype, np.integer):
        return x.astype(np.float32, copy=False), "array"
    raise ValueError(f"Expected x of {where} to hold numbers, got {x.dtype}; give numbers, or a list of strings.")


def _targets(y: np.ndarray, names: Any, where: str) -> tuple[np.ndarray, tuple[str, ...]]:
    if y.ndim != 1 or not (np.issubdtype(y.dtype, np.integer) or y.dtype.kind == "U") or not len(y):
        raise ValueError(
            f"Expected y of {where} to be a list of whole numbers or words, got {y.dtype} of shape {y.shape}."
        )
    if y.dtype.kind == "U":
        return class_ids(y.tolist())
    if names is not None:
        return y.astype(np.int32), tuple(str(name) for name in names)
    return y.astype(np.int32), tuple(str(i) for i in range(int(y.max()) + 1))


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
