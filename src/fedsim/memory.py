"""What clients keep between rounds: private rows, held by the engine on the host, never seen by the server."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from fedsim.core import Tree


class Memory:
    """What clients keep between rounds, on the host: rows for clients ever seen, whatever the population.

    Args:
        init: `(key, held) -> what one client keeps`, as in `Algorithm.memory`.
        held: the frozen parameters, for the shapes.
    """

    def __init__(self, init: Any, held: Tree) -> None:
        self.init = init
        shapes = jax.eval_shape(init, jax.random.key(0), held)
        self.rows = jax.tree.map(lambda s: np.zeros((0, *s.shape), s.dtype), shapes)
        self.place: dict[int, int] = {}
        self.empty = not jax.tree.leaves(shapes)

    def gather(self, ids: np.ndarray) -> tuple[Tree, np.ndarray]:
        """Stored rows of these clients, zeros where there are none, and which ones were seen; (M, ...), (M,) bool."""
        places = np.array([self.place.get(int(i), -1) for i in ids], np.int64)
        seen = places >= 0

        def take(kept: np.ndarray) -> np.ndarray:
            out = np.zeros((len(ids), *kept.shape[1:]), kept.dtype)
            out[seen] = kept[places[seen]]
            return out

        return jax.tree.map(take, self.rows), seen

    def scatter(self, ids: np.ndarray, new: Tree) -> None:
        """Keeps the rows of these clients; (M, ...)."""
        for i in ids:
            self.place.setdefault(int(i), len(self.place))
        places = np.array([self.place[int(i)] for i in ids], np.int64)

        def put(kept: np.ndarray, rows: np.ndarray) -> np.ndarray:
            if len(self.place) > len(kept):  # doubling: a client's first visit costs its own row, amortised
                grown = np.zeros((max(2 * len(kept), len(self.place)), *kept.shape[1:]), kept.dtype)
                grown[: len(kept)] = kept
                kept = grown
            kept[places] = rows
            return kept

        self.rows = jax.tree.map(put, self.rows, new)

    def state(self) -> tuple[Tree, np.ndarray]:
        """Rows and client ids of all clients seen, for a checkpoint."""
        count = len(self.place)
        return jax.tree.map(lambda r: r[:count], self.rows), np.fromiter(self.place, np.int64, count)

    def restore(self, rows: Tree, ids: np.ndarray) -> None:
        """The inverse of `state`."""
        self.rows = jax.tree.map(lambda r: np.array(r), rows)
        self.place = {int(i): k for k, i in enumerate(ids)}
