"""Which client owns which rows: pure functions from rows, labels and a seed to index arrays."""

from __future__ import annotations

import heapq
from typing import NamedTuple

import numpy as np

from fedsim.config import Config
from fedsim.data.dataset import Dataset, stream


class Partition(NamedTuple):
    """Client i owns `rows[offsets[i]:offsets[i + 1]]`: 4 bytes an example and 8 bytes a client."""

    rows: np.ndarray  # (n,) int32 rows of the data set, each once, those of a client in random order
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


def make(config: Config, dataset: Dataset) -> Partition:
    """The partition of the training rows that the config asks for.

    More clients than examples are allowed with `min_size=0` only: some clients are then empty.
    """
    rows, clients = dataset.train, config.clients
    if config.partition == "dirichlet":
        labels = dataset.y[rows]
        return dirichlet(rows, labels, clients, config.alpha, config.min_size, config.seed)
    if config.partition == "domain" and "domain" not in dataset.natural:
        raise ValueError(
            f"Expected partition='domain' on a data set with the natural key `domain`, which {dataset.name} has not; "
            "choose dirichlet or iid, or a set with domains such as elpv."
        )
    if clients > len(rows) and config.min_size > 0:
        raise ValueError(
            f"Expected clients={clients} <= {len(rows)} training examples; lower it, or set min_size=0 to allow "
            "empty clients."
        )
    if config.partition == "domain":
        return domain(rows, dataset.natural["domain"][rows], clients, config.seed)
    return iid(rows, clients, config.seed)


def iid(rows: np.ndarray, clients: int, seed: int) -> Partition:
    """A random share of the rows (n,) for each client; sizes differ by one at most."""
    offsets = np.arange(clients + 1, dtype=np.int64) * len(rows) // clients
    return Partition(stream(seed, "partition iid").permutation(rows).astype(np.int32), offsets)


def domain(rows: np.ndarray, domains: np.ndarray, clients: int, seed: int) -> Partition:
    """Every client is in one domain: as many clients a domain as its examples call for, iid within.

    `domains` (n,) are those of `rows` (n,). One client after another goes to the domain that has most examples a client
    so far (Adams' apportionment), so each domain has at least one and the largest client is as small as it can be.
    Clients stand domain after domain, in the order of the domains' names.

    Raises:
        ValueError: fewer clients than domains.
    """
    names, member, counts = np.unique(domains, return_inverse=True, return_counts=True)
    if clients < len(names):
        raise ValueError(
            f"Expected clients={clients} >= {len(names)}, the number of domains ({', '.join(map(str, names))}); "
            "add clients."
        )
    # By (count so far / examples) a heap gives the domain of each next client; 0 for those that have none yet.
    queue = [(0.0, i) for i in range(len(names))]
    owned = [0] * len(names)
    for _ in range(clients):
        _, i = queue[0]
        owned[i] += 1
        heapq.heapreplace(queue, (owned[i] / int(counts[i]), i))
    parts = []
    for i, name in enumerate(names):
        mixed = stream(seed, f"partition domain {name}").permutation(np.asarray(rows)[member == i])
        parts.append((mixed, np.arange(1, owned[i] + 1, dtype=np.int64) * len(mixed) // owned[i]))
    starts = np.concatenate([[0], np.cumsum(counts)])
    offsets = np.concatenate([[0], *(start + ends for start, (_, ends) in zip(starts, parts, strict=False))])
    return Partition(np.concatenate([mixed for mixed, _ in parts]).astype(np.int32), offsets.astype(np.int64))


def dirichlet(rows: np.ndarray, labels: np.ndarray, clients: int, alpha: float, min_size: int, seed: int) -> Partition:
    """Each class is spread over the clients in proportions drawn from Dir(alpha * 1_N) (Yurochkin et al. 2019).

    `labels` (n,) are those of `rows` (n,). A client below `min_size` is filled up with random rows of the largest
    clients, which are all lowered to one common level.

    Raises:
        ValueError: `min_size` for every client is more than there are rows, or an alpha beyond floating point.
    """
    total = len(rows)
    if min_size * clients > total:
        raise ValueError(
            f"Expected min_size={min_size} x clients={clients} = {min_size * clients} <= {total} training examples; "
            "lower one of them (min_size=0 allows empty clients)."
        )
    rng = stream(seed, "partition dirichlet")
    labels = np.asarray(labels)
    order = rng.permutation(total)
    order = order[np.argsort(labels[order], kind="stable")]  # class after class, each in random order
    counts = np.bincount(labels).tolist() if total else []
    owner = np.concatenate([_owners(count, clients, alpha, rng) for count in counts] or [np.empty(0, np.int32)])
    # Mixed once more: what is chosen by position from here on is chosen at random, whatever the class.
    mix = rng.permutation(total)
    order, owner = order[mix], owner[mix]
    if min_size > 0:
        owner = _filled_up(owner, clients, min_size, rng)
    grouped = np.argsort(owner, kind="stable")
    offsets = np.concatenate([[0], np.cumsum(np.bincount(owner, minlength=clients))]).astype(np.int64)
    return Partition(np.asarray(rows)[order[grouped]].astype(np.int32), offsets)


def _owners(count: int, clients: int, alpha: float, rng: np.random.Generator) -> np.ndarray:
    """The owners (count,) of a class' rows: its rows are cut at the cumulative proportions of the clients."""
    shares = rng.dirichlet(np.full(clients, alpha))
    if not abs(shares.sum() - 1) < 1e-6:
        raise ValueError(
            f"Expected alpha={alpha} within floating point; use partition=iid for the limit of large alpha."
        )
    # Clients stand in an order of their own for every class: with fewer rows than clients, rounding would otherwise
    # favour the same ones each time.
    edges = np.rint(np.cumsum(shares) * count).astype(np.int64)
    edges[-1] = count
    sizes = np.diff(np.minimum(edges, count), prepend=0)
    return np.repeat(rng.permutation(clients).astype(np.int32), sizes)


def _filled_up(owner: np.ndarray, clients: int, min_size: int, rng: np.random.Generator) -> np.ndarray:
    """Owners (n,) after rows of the largest clients went to those below `min_size`."""
    sizes = np.bincount(owner, minlength=clients)
    wanted = np.maximum(min_size - sizes, 0)
    missing = int(wanted.sum())
    if missing == 0:
        return owner
    # The highest level to which the largest clients can be lowered to free enough rows, by bisection.
    low, high = min_size, int(sizes.max())
    while low < high:
        level = (low + high + 1) // 2
        low, high = (level, high) if np.maximum(sizes - level, 0).sum() >= missing else (low, level - 1)
    keep = np.minimum(sizes, low)
    donors = np.flatnonzero(sizes > low)
    spare = int((sizes - keep).sum()) - missing  # fewer than donors: the first of them keep one row more
    keep[donors[:spare]] += 1
    grouped = np.argsort(owner, kind="stable")
    within = np.arange(len(owner)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    moved = grouped[within >= np.repeat(keep, sizes)]
    out = owner.copy()
    out[rng.permutation(moved)] = np.repeat(np.arange(clients, dtype=owner.dtype), wanted)
    return out
