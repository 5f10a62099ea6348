"""Who hears whom among peers: ring, grid, exponential, full and random graphs, or a file's; their weights and spectral gap.

A graph's matrix W has W_ij, the weight with which member i hears member j; its rows sum to one. NumPy alone.

`uniform` weights are 1 / (number heard + 1), the member itself included. On a graph that is not symmetric, such as a
random one of which each member draws whom it hears, they make W row-stochastic only: mixing does not keep the mean.
`metropolis` weights, 1 / (1 + max(d_i, d_j)) and the rest for oneself, make W symmetric and doubly stochastic; whoever is
heard then hears back.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fedsim.core import Graph

NAMES = ("ring", "grid", "exponential", "full", "random", "circulant")
WEIGHTS = ("uniform", "metropolis")
SLACK = 1e-4  # that a row of weights in a file may be off by
LARGEST = 2000  # members up to which the spectral gap is computed: a matrix of as many rows


class Rule(NamedTuple):
    """A graph before its members are known."""

    name: str  # one of `NAMES`, or a file's path
    weights: str = "uniform"
    neighbours: int = 10  # of a random graph, whom each member draws in every round
    offsets: tuple[int, ...] = ()  # of a circulant graph: i hears i + o for each of them
    edges: Edges | None = None  # of a file

    @property
    def changes(self) -> bool:
        """Whether it is another graph in every round."""
        return self.name == "random"


class Edges(NamedTuple):
    """What a file says: hearer, heard, and the weight or -1, by line."""

    hearer: tuple[int, ...]
    heard: tuple[int, ...]
    weight: tuple[float, ...] | None


def rule(name: str, weights: str = "uniform", neighbours: int = 10, offsets: Sequence[int] = ()) -> Rule:
    """A graph by name or from a file, looked at as far as that goes without its members.

    Raises:
        ValueError: an unknown name, options that are none or that the graph does not read, a file that is no graph.
    """
    is_file = name not in NAMES and bool(Path(name).suffix)
    if name not in NAMES and not is_file:
        raise ValueError(f"Expected graph={name!r} to be one of {', '.join(NAMES)}, or a file such as edges.txt.")
    if weights not in WEIGHTS:
        raise ValueError(f"Expected weights={weights!r} to be one of {', '.join(WEIGHTS)}.")
    if neighbours < 1:
        raise ValueError(f"Expected neighbours={neighbours} >= 1, whom each member of a random graph hears.")
    if (name == "circulant") != bool(offsets):
        raise ValueError(
            f"Expected offsets={tuple(offsets)} to go with graph='circulant', and that with them, not graph={name!r}; give "
            "graph='circulant', offsets=(1, -1, 9, -9)."
        )
    edges = read(Path(name).expanduser()) if is_file else None
    if edges is not None and edges.weight is not None and weights != "uniform":
        raise ValueError(
            f"Expected no weights={weights!r} for graph={name!r}, which has weights of its own; leave it out."
        )
    return Rule(name, weights, neighbours, tuple(offsets), edges)


def read(file: Path) -> Edges:
    """The edges of a text file: a line `i j` or `i j weight` for each j that client i hears, numbers from 0.

    Raises:
        ValueError: no such file, or a line that is no edge, or an edge that is there twice.
    """
    if not file.is_file():
        raise ValueError(f"Expected graph={str(file)!r} to be a file; give its path, or a name: {', '.join(NAMES)}.")
    found: dict[tuple[int, int], float | None] = {}
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        words = line.partition("#")[0].replace(",", " ").split()
        if not words:
            continue
        where = f"line {number} of {file}"
        try:
            i, j = (int(word) for word in words[:2])
            weight = float(words[2]) if len(words) == 3 else None
        except ValueError:
            i, j, weight, words = -1, -1, None, []
        if len(words) not in (2, 3) or min(i, j) < 0 or (weight is not None and not 0 <= weight < math.inf):
            raise ValueError(
                f"Expected {where}, {line[:60]!r}, to be `i j` or `i j weight`: two clients from 0, weight >= 0."
            )
        if (i, j) in found:
            raise ValueError(f"Expected {where} to name another edge: {i} hears {j} already; remove one of the lines.")
        found[i, j] = weight
    given = [weight for weight in found.values() if weight is not None]
    if not found or len(given) not in (0, len(found)):
        raise ValueError(
            f"Expected {file} to have edges, all of them with a weight or none, not {len(given)} of {len(found)}; add or remove."
        )
    hearer, heard = zip(*found, strict=True)
    return Edges(hearer, heard, tuple(given) or None)


@functools.lru_cache(maxsize=8)
def check(rule: Rule, clients: int) -> None:
    """Raises `ValueError` for a graph that does not fit a federation of so many clients, or does not connect them."""
    if rule.edges is not None:
        unknown = [i for i in (*rule.edges.hearer, *rule.edges.heard) if i >= clients]
        if unknown:
            raise ValueError(
                f"Expected graph={rule.name!r} to name clients 0 to {clients - 1}, not {unknown[0]}; mend the file, or give "
                "--clients."
            )
        if rule.edges.weight is not None:
            check_rows(rule, clients)
    if rule.changes or clients < 2:
        return
    apart = unreached(heard_by(rule, np.arange(clients)))
    if apart is not None:
        raise ValueError(
            f"Expected graph={rule.name!r} to connect all {clients} clients, but nothing of client {apart[0]} reaches client "
            f"{apart[1]}; add edges, or choose {', '.join(NAMES[:4])}."
        )


def check_rows(rule: Rule, clients: int) -> None:
    """Raises `ValueError` where the weights of a file make no row-stochastic matrix."""
    edges = rule.edges
    assert edges is not None and edges.weight is not None
    hearer, heard = np.array(edges.hearer), np.array(edges.heard)
    sums = np.bincount(hearer, np.array(edges.weight), clients)
    own = np.bincount(hearer[hearer == heard], minlength=clients) > 0  # whose own weight is said
    wrong = np.flatnonzero(np.where(own, np.abs(sums - 1) > SLACK, sums > 1 + SLACK))
    if len(wrong):
        raise ValueError(
            f"Expected the weights of client {wrong[0]} in graph={rule.name!r} to sum to 1, not {sums[wrong[0]]:.6g}; mend them, "
            "or leave its own weight out, which is then the rest."
        )


def heard_by(rule: Rule, ids: np.ndarray, rng: np.random.Generator | None = None) -> list[np.ndarray]:
    """Whom each of these members hears but itself: ascending places among them; of a file the edges between them."""
    members, i = len(ids), np.arange(len(ids))
    if rule.edges is not None:
        place = {int(id): p for p, id in enumerate(ids) if id >= 0}
        lists: list[set[int]] = [set() for _ in i]
        for hearer, heard in zip(rule.edges.hearer, rule.edges.heard, strict=True):
            if hearer in place and heard in place:
                lists[place[hearer]].add(place[heard])
    elif rule.name == "full":
        lists = [set(range(members)) for _ in i]
    elif rule.name == "random":
        assert rng is not None
        lists = [draw(rng, members, own, rule.neighbours) for own in range(members)]
    elif rule.name == "grid":
        rows = max(r for r in range(1, math.isqrt(max(members, 1)) + 1) if members % r == 0)
        columns = max(members // rows, 1)
        r, c = i // columns, i % columns
        near = [r * columns + (c + d) % columns for d in (-1, 1)] + [(r + d) % rows * columns + c for d in (-1, 1)]
        lists = [{int(one[own]) for one in near} for own in range(members)]
    else:
        powers = tuple(2**k for k in range(max(members - 1, 0).bit_length()))
        offsets = {"ring": (1, -1), "exponential": powers}.get(rule.name, rule.offsets)
        lists = [{(own + o) % members for o in offsets} for own in range(members)]
    if rule.weights == "metropolis":
        hears = [set(own) for own in lists]
        for own, others in enumerate(hears):
            for other in others:
                lists[other].add(own)
    return [np.array(sorted(others - {own}), np.int64) for own, others in enumerate(lists)]


def draw(rng: np.random.Generator, members: int, own: int, neighbours: int) -> set[int]:
    """So many other members, or all of them."""
    others = rng.choice(members - 1, min(neighbours, members - 1), replace=False) if members > 1 else np.zeros(0, int)
    return {int(other) + (other >= own) for other in others}


def of_members(rule: Rule, ids: np.ndarray, rng: np.random.Generator | None = None) -> Graph:
    """The graph over these members, in their order.

    Args:
        ids: (M,), -1 for nobody.
        rng: of this round, which a random graph draws by.
    """
    lists = heard_by(rule, ids, rng)
    members, degrees = len(ids), np.array([len(others) for others in lists], np.int64)
    width = wide(rule, members, int(degrees.max(initial=1)))
    whom = np.zeros((members, width), np.int64)
    weight = np.zeros((members, width), np.float32)
    said = said_weights(rule, ids)
    for own, others in enumerate(lists):
        whom[own, : len(others)] = others
        if said is not None:
            weight[own, : len(others)] = [said[own, int(other)] for other in others]
        elif rule.weights == "metropolis":
            weight[own, : len(others)] = 1 / (1 + np.maximum(degrees[own], degrees[others]))
        else:
            weight[own, : len(others)] = 1 / (1 + len(others))
    return Graph(whom, weight, (1 - weight.sum(axis=1, dtype=np.float64)).astype(np.float32))


def wide(rule: Rule, members: int, most: int) -> int:
    """Columns of a graph whose members hear `most` at most: the same in every round, so that nothing recompiles.

    Where draws are made symmetric, n neighbours come on top of n of one's own, and more than n + 6 sqrt(n) + 6 hardly ever.
    """
    if not (rule.changes and rule.weights == "metropolis"):
        return max(most, 1)
    n = min(rule.neighbours, max(members - 1, 1))
    step = min(2 * n + math.ceil(6 * math.sqrt(n)) + 6, max(members - 1, 1))
    return -(-most // step) * step


def said_weights(rule: Rule, ids: np.ndarray) -> dict[tuple[int, int], float] | None:
    """A file's weights by places; None where it has none. What a member would hear of one who is not there stays its own."""
    if rule.edges is None or rule.edges.weight is None:
        return None
    place = {int(id): p for p, id in enumerate(ids) if id >= 0}
    triples = zip(rule.edges.hearer, rule.edges.heard, rule.edges.weight, strict=True)
    return {(place[i], place[j]): w for i, j, w in triples if i in place and j in place}


def unreached(lists: Sequence[np.ndarray]) -> tuple[int, int] | None:
    """Two members, nothing of the first of whom ever reaches the second; None where the graph is strongly connected."""
    from scipy.sparse import csgraph, csr_matrix  # which JAX brings

    heard = np.concatenate([np.zeros(0, np.int64), *lists])
    hears = csr_matrix((np.ones(len(heard), np.int8), heard, np.cumsum([0, *map(len, lists)])), (len(lists),) * 2)
    for graph, swap in ((hears, False), (hears.T, True)):  # whom member 0 hears at last, then who hears it
        seen = csgraph.breadth_first_order(graph, 0, return_predecessors=False)
        missing = np.setdiff1d(np.arange(len(lists)), seen)
        if len(missing):
            return (0, int(missing[0])) if swap else (int(missing[0]), 0)
    return None


def matrix(graph: Graph) -> np.ndarray:
    """W (M, M), float64."""
    members = len(graph.own)
    dense = np.zeros((members, members))
    np.add.at(dense, (np.arange(members)[:, None], graph.whom), graph.weight.astype(np.float64))
    dense[np.arange(members), np.arange(members)] += graph.own
    return dense


def spectral_gap(graph: Graph) -> float:
    """1 - lambda, where lambda is the most that one mixing leaves of the members' distance from their mean.

    lambda = ||(I - 11'/M) W||_2. Of a symmetric doubly stochastic W it is the second largest modulus of an eigenvalue, as
    in the papers; of one that is only row-stochastic it may exceed 1. NaN for more than `LARGEST` members.
    """
    if not 0 < len(graph.own) <= LARGEST:
        return math.nan
    w = matrix(graph)
    apart = w - w.mean(axis=0)
    return float(1 - math.sqrt(max(np.linalg.eigvalsh(apart.T @ apart)[-1], 0.0)))


@functools.lru_cache(maxsize=8)
def fixed(rule: Rule, ids: bytes) -> tuple[Graph, float]:
    """A graph that is the same in every round, and its spectral gap; `ids` are the bytes of (M,) int64."""
    graph = of_members(rule, np.frombuffer(ids, np.int64))
    return graph, spectral_gap(graph)


def of_round(rule: Rule, ids: np.ndarray, rng: np.random.Generator) -> tuple[Graph, float]:
    """The graph of a round over its members, and its spectral gap."""
    if not rule.changes:
        return fixed(rule, np.ascontiguousarray(ids, np.int64).tobytes())
    graph = of_members(rule, ids, rng)
    return graph, spectral_gap(graph)
