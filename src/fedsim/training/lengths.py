"""Length buckets: texts run in batches of similar length, each cut to a length for which a program is compiled.

Padding is masked in attention and left out of the features, so cutting it changes no result beyond float summation order.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedsim.peft import Model

MULTIPLE = 8  # lengths are multiples of it, as wide registers and matrix units like them
WORTH = 0.1  # share of the tokens that must be saved, or one program runs all: each further one costs its compilation


class Lengths(NamedTuple):
    """How long the texts are, and to which lengths batches of them are cut."""

    of: np.ndarray  # (N,) int64: tokens of each text, the padding behind it left out
    buckets: tuple[int, ...]  # ascending; the last one holds every text
    cut: Callable[[Any, int], Any] = lambda x, length: jax.tree.map(
        lambda a: a[:, :length], x
    )  # (inputs, length) -> without the rest
    pad: int = 0  # what stands behind a text in token ids
    masked: bool = False  # inputs are ids and, beside them, which tokens a loss is about

    @property
    def longest(self) -> int:
        """Length to which all texts can be cut."""
        return self.buckets[-1]


def measure(x: np.ndarray | dict[str, np.ndarray], pad: int, count: int) -> Lengths:
    """Lengths of padded texts, and at most `count` buckets at equal distances up to the longest.

    Args:
        x: (N, T) token ids, alone or as "ids" beside "loss".
    """
    ids = x["ids"] if isinstance(x, dict) else x
    real = ids != pad
    tokens = ids.shape[1]
    # A text of padding alone attends to all of it: it keeps its length.
    of = np.where(real.any(axis=1), tokens - np.argmax(real[:, ::-1], axis=1), tokens)
    longest = int(of.max(initial=1))
    fractions = (-(-longest * part // count) for part in range(1, count + 1))
    buckets = sorted({min(-(-length // MULTIPLE) * MULTIPLE, tokens) for length in fractions})
    return Lengths(of, tuple(buckets), pad=pad, masked=isinstance(x, dict))


def entering(lengths: Lengths | None, model: Model, stage: int) -> Lengths | None:
    """The same lengths for what enters a stage of the model, whose shapes say where the tokens are."""
    if lengths is None:
        return None

    @cache  # every batch is cut: a trace each would take longer than the batch
    def shapes(length: int) -> Any:
        ids = jax.ShapeDtypeStruct((1, length), jnp.int32)
        x = {"ids": ids, "loss": jax.ShapeDtypeStruct((1, length), jnp.float32)} if lengths.masked else ids
        return jax.eval_shape(lambda held, x: model.run(held, x, 0, stage), model.frozen, x)

    def cut(h: Any, length: int) -> Any:
        return jax.tree.map(lambda a, s: a[(slice(None), *(slice(n) for n in s.shape[1:]))], h, shapes(length))

    return lengths._replace(cut=cut)


def batches(rows: np.ndarray, size: int, lengths: Lengths | None) -> list[tuple[np.ndarray, int | None]]:
    """Rows in batches of `size`, the last one shorter, each with its bucket: short texts first, where that is worth it.

    Without lengths the rows keep their order, and there is no bucket.
    """

    def parts(rows: np.ndarray) -> list[np.ndarray]:
        return [rows[first : first + size] for first in range(0, len(rows), size)]

    if lengths is None:
        return [(part, None) for part in parts(rows)]
    ordered = parts(rows[np.argsort(lengths.of[rows], kind="stable")])
    found = [lengths.buckets[np.searchsorted(lengths.buckets, lengths.of[part].max())] for part in ordered]
    if sum(found) > (1 - WORTH) * lengths.longest * len(found):
        return [(part, lengths.longest) for part in parts(rows)]
    return list(zip(ordered, found, strict=True))
