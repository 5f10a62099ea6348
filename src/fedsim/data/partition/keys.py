"""Partitions by what examples come with: a client column (author, writer, episode), or a domain."""

from __future__ import annotations

import numpy as np

from fedsim.data.partition.index import Partition, by_owner, by_size
from fedsim.data.partition.sizes import apportioned, equal
from fedsim.randomness import stream


def natural(rows: np.ndarray, keys: np.ndarray, clients: int, min_size: int, seed: int) -> Partition:
    """One client for each value of the key that has at least `min_size` rows (and one in any case).

    `keys` (n,) are those of `rows` (n,). Where there are more such values than `clients`, that many of them are drawn,
    and the rows of the others belong to nobody. Clients stand in the order of their values.

    Raises:
        ValueError: fewer such values than `clients`.
    """
    _, member, counts = np.unique(keys, return_inverse=True, return_counts=True)
    found = np.flatnonzero(counts >= max(min_size, 1))
    if clients > len(found):
        raise ValueError(
            f"Expected clients={clients} <= {len(found)}, the values of the natural key with at least min_size={min_size} "
            f"training examples (of {len(counts)} values in all); lower clients or min_size."
        )
    rng = stream(seed, "partition natural")
    kept = np.sort(rng.choice(found, clients, replace=False))
    client_of = np.full(len(counts), clients, np.int64)
    client_of[kept] = np.arange(clients)
    order = rng.permutation(len(rows))
    order = order[client_of[member[order]] < clients]
    return by_owner(np.asarray(rows)[order], client_of[member[order]], clients)


def domain(rows: np.ndarray, domains: np.ndarray, clients: int, seed: int) -> Partition:
    """Every client is in one domain: as many clients a domain as its examples call for, iid within.

    `domains` (n,) are those of `rows` (n,). Clients are apportioned to domains by Adams' rule (`sizes.apportioned`), so
    each domain has at least one and the largest client is as small as it can be. Clients stand domain after domain, in
    the order of the domains' names.

    Raises:
        ValueError: fewer clients than domains.
    """
    names, member, counts = np.unique(domains, return_inverse=True, return_counts=True)
    if clients < len(names):
        raise ValueError(
            f"Expected clients={clients} >= {len(names)}, the number of domains ({', '.join(map(str, names[:8]))}"
            f"{', ...' if len(names) > 8 else ''}); add clients."
        )
    by_domain = np.split(np.asarray(rows)[np.argsort(member, kind="stable")], np.cumsum(counts)[:-1])
    mixed = [
        stream(seed, f"partition domain {name}").permutation(own) for name, own in zip(names, by_domain, strict=True)
    ]
    sizes = [equal(len(own), n) for own, n in zip(mixed, apportioned(counts, clients).tolist(), strict=True)]
    return by_size(np.concatenate(mixed), np.concatenate(sizes))
