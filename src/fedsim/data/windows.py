"""Packing: texts one behind the other, cut into windows of equal length, so that no token of a batch is padding."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from fedsim.data.gate import LONGEST_TEXT, require_characters, require_memory

Piece = tuple[np.ndarray, np.ndarray]  # a text's token ids (n,) int32, and what of them is learned, (n,) float32


class Windows(NamedTuple):
    """Windows of a data set's splits, one split after the other."""

    ids: np.ndarray  # (M, T) int32
    loss: np.ndarray  # (M, T) float32: 1 where a token is learned
    first: np.ndarray  # (M,) int64: the row in the set of a window's first text
    splits: dict[str, np.ndarray]  # -> its windows, int64


def packed(
    pieces: Sequence[Piece], owners: Sequence[np.ndarray], splits: Mapping[str, np.ndarray], tokens: int, pad: int
) -> Windows:
    """All tokens of the splits' texts, each once, in windows of `tokens`; only the last one of an owner is padded.

    Texts of one split and one owner stand one behind the other in the set's order, cut wherever a window is full. So no
    window holds texts of two owners or two splits, and a text may begin in one window and end in the next.

    Args:
        pieces: of the N texts.
        owners: keys of the texts, (N,) each: label, client, domain. An owner is who has all of them alike.
        splits: -> int64 rows; rows of none are left out.
        pad: what stands behind the last text of an owner.

    Raises:
        ValueError: no memory for them.
    """
    _, owner = np.unique(
        np.stack([np.unique(key, return_inverse=True)[1] for key in owners]), axis=1, return_inverse=True
    )
    runs = [(name, rows) for name, found in splits.items() for rows in _by_owner(found, owner)]
    totals = [sum(len(pieces[row][0]) for row in rows) for _, rows in runs]
    counts = [-(-total // tokens) for total in totals]
    require_memory(8 * tokens * sum(counts), f"tokens={tokens} in {sum(counts):,} windows", "lower tokens")
    ids = np.full((sum(counts), tokens), pad, np.int32)
    loss = np.zeros((sum(counts), tokens), np.float32)
    first = np.empty(sum(counts), np.int64)
    of = np.repeat([list(splits).index(name) for name, _ in runs], counts)
    begin = np.cumsum([0, *counts]).tolist()
    for (_, rows), total, (start, stop) in zip(runs, totals, pairwise(begin), strict=True):
        ids[start:stop].reshape(-1)[:total] = np.concatenate([pieces[row][0] for row in rows])
        loss[start:stop].reshape(-1)[:total] = np.concatenate([pieces[row][1] for row in rows])
        ends = np.cumsum([len(pieces[row][0]) for row in rows])
        first[start:stop] = rows[np.searchsorted(ends, tokens * np.arange(stop - start), side="right")]
    return Windows(ids, loss, first, {name: np.flatnonzero(of == at) for at, name in enumerate(splits)})


def _by_owner(rows: np.ndarray, owner: np.ndarray) -> list[np.ndarray]:
    """The rows of each owner that has some, ascending."""
    rows = np.sort(rows)
    ordered = rows[np.argsort(owner[rows], kind="stable")]
    return [part for part in np.split(ordered, np.flatnonzero(np.diff(owner[ordered])) + 1) if len(part)]


def pieces_of(texts: Sequence[str], tokenizer: Any, end: int | None) -> Iterator[Piece]:
    """The tokens of whole texts, all of them learned.

    Args:
        tokenizer: of `tokenizers`; special tokens that it adds are among them.
        end: the id that stands behind each text; None where the tokenizer puts one there itself.

    Raises:
        ValueError: a text that is too long or no Unicode.
    """
    for row, text in enumerate(texts):
        require_characters(text, LONGEST_TEXT, lambda row=row: f"text {row}")
    tokenizer.no_truncation()
    tokenizer.no_padding()
    behind = [] if end is None else [end]
    for text in texts:
        ids = np.asarray(tokenizer.encode(text).ids + behind, np.int32)
        yield ids, np.ones(len(ids), np.float32)
