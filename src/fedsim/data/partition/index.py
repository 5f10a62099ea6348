"""What a partition is: two index arrays, made from who owns which row, and cut into what is trained on and held out."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Partition(NamedTuple):
    """Client i owns `rows[offsets[i]:offsets[i + 1]]`: 4 bytes an example and 8 bytes a client."""

    rows: np.ndarray  # (n,) int32 rows of the data set, each at most once, those of a client in random order
    offsets: np.ndarray  # (N + 1,) int64

    @property
    def clients(self) -> int:
        """Number of clients N."""
        return len(self.offsets) - 1

    @property
    def sizes(self) -> np.ndarray:
        """Examples of each client, (N,) int64."""
        return np.diff(self.offsets)

    def client(self, i: int) -> np.ndarray:
        """Rows of client i, (n_i,) int32."""
        return self.rows[self.offsets[i] : self.offsets[i + 1]]


def by_size(rows: np.ndarray, sizes: np.ndarray) -> Partition:
    """Client i gets the next sizes[i] of `rows`, which are in random order already; sizes sum to n."""
    return Partition(np.asarray(rows).astype(np.int32), np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64))


def by_owner(rows: np.ndarray, owner: np.ndarray, clients: int) -> Partition:
    """rows[j] goes to client owner[j]; a client's rows keep the order that they have, so mix them before."""
    sizes = np.bincount(owner, minlength=clients)
    return by_size(np.asarray(rows)[np.argsort(owner, kind="stable")], sizes)


def split_local(partition: Partition, share: float) -> tuple[Partition, Partition | None]:
    """Cuts each client's examples into those it trains on and its own test set; both partitions have all N clients.

    The last round(share * n_i) rows are held out, at least one and at most n_i - 1 of them; a client with one example
    or none holds out nothing. They are a random draw, since a client's rows are in random order.

    Returns:
        What is trained on, and what is held out; None for share 0.
    """
    if share == 0:
        return partition, None
    sizes = partition.sizes
    held = np.clip(np.rint(share * sizes).astype(np.int64), np.minimum(1, sizes), np.maximum(sizes - 1, 0))
    place = np.arange(len(partition.rows)) - np.repeat(partition.offsets[:-1], sizes)
    kept = place < np.repeat(sizes - held, sizes)
    return by_size(partition.rows[kept], sizes - held), by_size(partition.rows[~kept], held)
