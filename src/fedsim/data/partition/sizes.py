"""Quantity skew: examples at random, in numbers that are equal or follow a law; and whole numbers in proportion."""

from __future__ import annotations

import heapq

import numpy as np

from fedsim.config import size_law
from fedsim.data.partition.index import Partition, by_size
from fedsim.randomness import stream


def iid(rows: np.ndarray, clients: int, seed: int) -> Partition:
    """A random share of the rows (n,) for each client; sizes differ by one at most."""
    return by_size(stream(seed, "partition iid").permutation(rows), equal(len(rows), clients))


def quantity(rows: np.ndarray, clients: int, law: str, min_size: int, seed: int) -> Partition:
    """Random rows, in numbers proportional to weights w that follow a law; every client at least `min_size`.

    Args:
        law: `"lognormal(sigma=1.0)"`: log w ~ Normal(0, sigma^2), drawn for each client; or
            `"power(exponent=1.5)"`: the r-th largest client has w = r^-exponent (Zipf), and which client is the r-th is drawn.

    Raises:
        ValueError: an unknown law, or `min_size` for every client is more than there are rows.
    """
    require_rows(len(rows), clients, min_size)
    name, value = size_law(law)
    rng = stream(seed, "partition quantity")
    if name == "lognormal":
        log_weights = value * rng.standard_normal(clients)
    else:
        log_weights = -value * np.log(rng.permutation(clients) + 1.0)
    sizes = proportional(np.exp(log_weights - log_weights.max()), len(rows), min_size)
    return by_size(rng.permutation(rows), sizes)


def require_rows(total: int, clients: int, min_size: int) -> None:
    """Raises `ValueError` where `min_size` examples for every client are more than the `total` there is."""
    if min_size * clients > total:
        raise ValueError(
            f"Expected min_size={min_size} x clients={clients} = {min_size * clients} <= {total} training examples; "
            "lower one of them (min_size=0 allows empty clients)."
        )


def equal(total: int, parts: int) -> np.ndarray:
    """`parts` whole numbers that sum to `total` and differ by one at most, (parts,) int64."""
    return np.diff(np.arange(parts + 1, dtype=np.int64) * total // parts)


def proportional(weights: np.ndarray, total: int, least: int = 0) -> np.ndarray:
    """Whole numbers max(least, t * weight) with the one t at which they sum to `total`; (N,) int64.

    Fractions go by largest remainder, ties to the first. Expects len(weights) * least <= total and a positive weight.
    """
    ascending = np.sort(weights)
    rest = np.cumsum(ascending[::-1])[::-1]  # (N,): sum of the weights from here on
    scales = (total - least * np.arange(len(weights))) / rest
    # The k smallest are lifted to `least`: the first k at which the next one needs no lifting (but for rounding).
    lifted = int(np.argmax(scales * ascending >= least * (1 - 1e-12)))
    exact = np.maximum(scales[lifted] * weights, least)
    sizes = np.floor(exact).astype(np.int64)
    sizes[np.argsort(sizes - exact, kind="stable")[: total - int(sizes.sum())]] += 1
    return sizes


def apportioned(counts: np.ndarray, seats: int) -> np.ndarray:
    """Seats for groups of these numbers of examples, as even as they can be (Adams' apportionment); (G,) int64.

    One seat after another goes to the group that has most examples a seat so far, so each group of a positive count
    has at least one and the largest share of a seat is as small as it can be. Expects at least one seat a group.
    """
    total, groups = int(counts.sum()), len(counts)
    # All but at most one seat a group at once: ceil(count / d), where Adams stands at divisor d = total / (seats - groups).
    owned = [max(1, -(-int(count) * (seats - groups) // total)) for count in counts]
    queue = [(own / int(count), i) for i, (own, count) in enumerate(zip(owned, counts, strict=True))]
    heapq.heapify(queue)
    for _ in range(seats - sum(owned)):
        _, i = queue[0]
        owned[i] += 1
        heapq.heapreplace(queue, (owned[i] / int(counts[i]), i))
    return np.array(owned, np.int64)
