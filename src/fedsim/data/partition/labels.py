"""Label skew: classes are spread unevenly over the clients."""

from __future__ import annotations

import numpy as np

from fedsim.data.partition.index import Partition, by_owner
from fedsim.data.partition.sizes import apportioned, equal, require_rows
from fedsim.randomness import stream

CLIENTS_AT_ONCE = 2**16  # bounds what a draw for all clients holds in memory


def dirichlet(rows: np.ndarray, labels: np.ndarray, clients: int, alpha: float, min_size: int, seed: int) -> Partition:
    """Each class is spread over the clients in proportions drawn from Dir(alpha * 1_N) (Yurochkin et al. 2019).

    `labels` (n,) are those of `rows` (n,). A client below `min_size` is filled up with random rows of the largest
    clients, which are all lowered to one common level.

    Raises:
        ValueError: `min_size` for every client is more than there are rows, or an alpha beyond floating point.
    """
    total = len(rows)
    require_rows(total, clients, min_size)
    rng = stream(seed, "partition dirichlet")
    labels = np.asarray(labels)
    order = _class_after_class(labels, rng)
    counts = np.bincount(labels).tolist() if total else []
    owner = np.concatenate([_owners(count, clients, alpha, rng) for count in counts] or [np.empty(0, np.int32)])
    # Mixed once more: what is chosen by position from here on is chosen at random, whatever the class.
    mix = rng.permutation(total)
    order, owner = order[mix], owner[mix]
    if min_size > 0:
        owner = _filled_up(owner, clients, min_size, rng)
    return by_owner(np.asarray(rows)[order], owner, clients)


def _owners(count: int, clients: int, alpha: float, rng: np.random.Generator) -> np.ndarray:
    """The owners (count,) of a class' rows: its rows are cut at the cumulative proportions of the clients."""
    shares = _shares(clients, alpha, rng)
    # Clients stand in an order of their own for every class: with fewer rows than clients, rounding would otherwise
    # favour the same ones each time.
    edges = np.rint(np.cumsum(shares) * count).astype(np.int64)
    edges[-1] = count
    sizes = np.diff(np.minimum(edges, count), prepend=0)
    return np.repeat(rng.permutation(clients).astype(np.int32), sizes)


def _class_after_class(labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Places of the rows sorted by label, those of a class in random order; (n,) int64."""
    order = rng.permutation(len(labels))
    return order[np.argsort(labels[order], kind="stable")]


def _shares(clients: int, alpha: float, rng: np.random.Generator) -> np.ndarray:
    """A draw of Dir(alpha * 1_N), (N,)."""
    shares = rng.dirichlet(np.full(clients, alpha))
    if not abs(shares.sum() - 1) < 1e-6:
        raise ValueError(
            f"Expected alpha={alpha} within floating point; use partition=iid for the limit of large alpha."
        )
    return shares


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


def dirichlet_balanced(rows: np.ndarray, labels: np.ndarray, clients: int, alpha: float, seed: int) -> Partition:
    """Equal sizes; each client's mixture of classes is q ~ Dir(alpha * p), p the set's own shares (Hsu et al. 2019).

    `labels` (n,) are those of `rows` (n,); sizes differ by one at most. Each client asks for its examples' classes by q.
    A class that is asked for more often than it has rows serves one client after another, in an order drawn once; what
    is not met is asked for again by q over the classes that have rows left, renormalised. So most clients have their
    mixture, and a few what is left. The mixtures are Hsu et al.'s (arXiv 1909.06335), the order is fedsim's.

    Raises:
        ValueError: an alpha beyond floating point.
    """
    labels = np.asarray(labels)
    rng = stream(seed, "partition dirichlet_balanced")
    order = _class_after_class(labels, rng)
    left = np.bincount(labels)  # rows that a class has left
    taken = np.cumsum(left) - left  # place in `order` of the next row of each class
    log_q = _log_mixtures(left / max(len(rows), 1), clients, alpha, rng)
    owner = np.empty(len(rows), np.int64)
    need = equal(len(rows), clients)
    turn = rng.permutation(clients)
    while need.any():  # every pass but the last uses up a class
        client, wanted = _asked(log_q, need, left, rng)
        served = np.lexsort((turn[client], wanted))
        client, wanted = client[served], wanted[served]
        asked = np.bincount(wanted, minlength=len(left))
        place = np.arange(len(wanted)) - (np.cumsum(asked) - asked)[wanted]
        met = place < left[wanted]
        owner[(taken[wanted] + place)[met]] = client[met]
        need -= np.bincount(client[met], minlength=clients)
        got = np.minimum(asked, left)
        left, taken = left - got, taken + got
    mix = rng.permutation(len(rows))
    return by_owner(np.asarray(rows)[order[mix]], owner[mix], clients)


def _log_mixtures(prior: np.ndarray, clients: int, alpha: float, rng: np.random.Generator) -> np.ndarray:
    """Logarithms of unnormalised draws of Dir(alpha * prior), (N, C) float32; -inf for a class without rows.

    A Gamma(a) variate is one of Gamma(a + 1) times U^(1/a); in logarithms it does not underflow for small a.
    """
    shape = alpha * prior
    log_q = np.full((clients, len(prior)), -np.inf, np.float32)
    present = np.flatnonzero(prior > 0)
    limit = float(np.finfo(np.float32).max)
    for start in range(0, clients, CLIENTS_AT_ONCE):
        count = min(CLIENTS_AT_ONCE, clients - start)
        with np.errstate(over="ignore", divide="ignore"):
            gamma = np.log(rng.standard_gamma(shape[present] + 1, (count, len(present))))
            drawn = gamma - rng.standard_exponential((count, len(present))) / shape[present]
        if not (np.abs(drawn) < limit).all():
            raise ValueError(
                f"Expected alpha={alpha} within floating point; use partition=iid for the limit of large alpha."
            )
        log_q[start : start + count, present] = drawn
    return log_q


def _asked(
    log_q: np.ndarray, need: np.ndarray, left: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """(client, class) of need[i] draws of each client i from its mixture over the classes with rows left."""
    found = []
    some = np.flatnonzero(left)
    for who in np.array_split(np.flatnonzero(need), -(-np.count_nonzero(need) // CLIENTS_AT_ONCE)):
        q = log_q[np.ix_(who, some)].astype(np.float64)
        q = np.exp(q - q.max(axis=1, keepdims=True))
        counts = rng.multinomial(need[who], q / q.sum(axis=1, keepdims=True)).ravel()
        found.append((np.repeat(np.repeat(who, len(some)), counts), np.repeat(np.tile(some, len(who)), counts)))
    client, wanted = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return client, wanted


def dirichlet_pfllib(
    rows: np.ndarray, labels: np.ndarray, clients: int, alpha: float, min_size: int, seed: int
) -> Partition:
    """The recipe of PFLlib (arXiv 2312.04992), after NIID-Bench (Li et al. 2022, arXiv 2102.02079): draws until all have enough.

    Class after class, proportions ~ Dir(alpha * 1_N) are set to zero for clients that hold n / N rows or more already and
    renormalised, and the class' rows (n_c of them, in random order) are cut at floor(n_c * cumulative proportions). The
    whole is repeated until the smallest client has `min_size` rows. `labels` (n,) are those of `rows` (n,).

    Raises:
        ValueError: `min_size` for every client is more than there are rows; no draw was good enough; an alpha beyond
            floating point.
    """
    total = len(rows)
    require_rows(total, clients, min_size)
    labels = np.asarray(labels)
    rng = stream(seed, "partition dirichlet_pfllib")
    order = _class_after_class(labels, rng)
    counts = [count for count in np.bincount(labels).tolist() if count] if total else []
    tries = max(10, min(1000, 10**7 // clients))
    best, smallest = -1, 0
    for _ in range(tries):
        sizes = np.zeros(clients, np.int64)
        cuts = []
        for count in counts:
            # Dir(alpha * 1_N) with some entries zeroed and the others renormalised is a Dirichlet over the others.
            still = np.flatnonzero(sizes * clients < total)
            edges = np.floor(np.cumsum(_shares(len(still), alpha, rng))[:-1] * count).astype(np.int64)
            given = np.diff(edges, prepend=0, append=count)
            sizes[still] += given
            cuts.append((still, given))
        if sizes.min() > best:
            best, smallest = int(sizes.min()), int(sizes.argmin())
        if best >= min_size:
            break
    else:
        raise ValueError(
            f"Expected alpha={alpha} to give each of clients={clients} min_size={min_size} examples in one of {tries} draws "
            f"(the best left client {smallest} with {best}); raise alpha, lower min_size or clients, or choose "
            "partition=dirichlet, which fills clients up."
        )
    owner = np.concatenate([np.repeat(who, given) for who, given in cuts] or [np.empty(0, np.int64)])
    mix = rng.permutation(total)
    return by_owner(np.asarray(rows)[order[mix]], owner[mix], clients)


def shards(rows: np.ndarray, labels: np.ndarray, clients: int, classes_per_client: int, seed: int) -> Partition:
    """Sorted by label and cut into N * k shards, of which every client gets k at random (McMahan et al. 2017).

    `labels` (n,) are those of `rows` (n,), k is `classes_per_client`. McMahan et al. cut the sorted list into equal
    pieces, so that a shard may straddle two classes. Here every shard lies in one class, so a client has at most k of them:
    shards are apportioned to classes (`sizes.apportioned`) and are equal within a class but for one row.

    Raises:
        ValueError: fewer shards than classes.
    """
    classes, member, counts = np.unique(labels, return_inverse=True, return_counts=True)
    total = clients * classes_per_client
    if total < len(classes):
        raise ValueError(
            f"Expected classes_per_client={classes_per_client} x clients={clients} = {total} >= {len(classes)}, the number "
            "of classes; raise one of them."
        )
    rng = stream(seed, "partition shards")
    order = _class_after_class(member, rng)
    lengths = [equal(int(n), own) for n, own in zip(counts, apportioned(counts, total).tolist(), strict=True)]
    client_of_shard = rng.permutation(total) // classes_per_client
    owner = np.repeat(client_of_shard, np.concatenate(lengths))
    mix = rng.permutation(len(rows))
    return by_owner(np.asarray(rows)[order[mix]], owner[mix], clients)
