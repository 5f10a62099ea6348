"""The contract on one page: an algorithm is a value, and a message is its only channel to the clients.

An `Algorithm` holds pure functions. Its `round` is plain Python on the host and reaches clients through
`cohort.exchange(message, local, reduce)` alone, so every byte that travels is seen and priced (`wire/`). What happens
on a client is a `Local`: three pure functions of one client, which the engine (`engine/`) maps over many. `Local` and
`Reduce` values are made once, when the algorithm is constructed: values that change travel in the message or in `args`,
so nothing recompiles. `held` is the frozen backbone: the same for all, never sent again, never changed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

Tree = Any  # a pytree of arrays; the alias marks the role
Params = dict[str, Array]  # flat: path -> leaf, all float32
Metrics = dict[str, Array]  # name -> scalar, float32


class Client(NamedTuple):
    """One member of the cohort, as `Local` sees it."""

    id: Array  # (), int32
    n: Array  # (), int32: number of its training examples
    memory: Tree  # what it kept from its last participation
    key: Array  # (), typed PRNG key of (seed, round, id)
    round: Array  # (), int32, from 1
    lr: Array  # (), float32: learning rate of this round; data, so another rate recompiles nothing


class Batch(NamedTuple):
    """One local step's examples; rows beyond the client's data are padding with mask 0.

    B is the batch size, or less where no lane has so many rows: nothing may depend on how much padding there is.
    """

    x: Tree  # (B, ...)
    y: Array  # (B,), int32
    mask: Array  # (B,), float32: 1 for a real example
    key: Array  # (), typed PRNG key of (seed, round, id, step)
    step: Array  # (), int32: number of this local step, from 0
    last: Array  # (), bool: no step follows


class Passes(NamedTuple):
    """How often a client goes over its data: whole epochs, or an exact number of full batches."""

    epochs: int = 1
    steps: int | None = None
    batch_size: int = 8
    shuffle: bool = True


class Local(NamedTuple):
    """What happens on a client. Pure functions of one client; the engine maps and masks them."""

    start: Callable[[Tree, Tree, Client, Batch], Tree]  # (held, message, client, first batch) -> carry
    step: Callable[[Tree, Tree, Tree, Batch], tuple[Tree, Metrics]]  # (held, message, carry, batch) -> carry, metrics
    finish: Callable[[Tree, Tree, Tree, Client], tuple[Tree, Tree, Metrics]]  # -> reply, memory, metrics
    passes: Passes


class Reduce(NamedTuple):
    """A fold of the replies. `add` gets all lanes at once; a reply that does not count arrives as zeros of weight 0.

    Totals of lanes and devices are summed, so `add` must be additive in what it adds.
    """

    zero: Callable[[Tree, int], Tree]  # (one reply's shapes, cohort size) -> total
    add: Callable[[Tree, Tree, Array, Array], Tree]  # (total, replies (L, ...), weights (L,), slots (L,)) -> total
    done: Callable[[Tree, Tree, Array], Tree]  # (total, args, key) -> result; once, after the sum over devices
    weight: Callable[[Client, Tree], Array]  # (client, reply) -> (), float32


class Info(NamedTuple):
    """What an exchange says about itself; logged, never fed back by the engine. Device values until fetched."""

    metrics: Metrics  # means of `step`'s metrics over all examples seen, of `finish`'s over clients
    clients: Metrics  # the same per client, (M,), in the cohort's order; NaN for a client without examples
    weight: Array  # (), float32: total weight of the replies that counted
    reported: Array  # (), int32: replies that counted
    nonfinite: Array  # (), int32: replies left out because of a NaN or infinity


class Exchange(Protocol):
    """Sends `message` to every member of the cohort, runs `local` there, folds the replies with `reduce`."""

    def __call__(self, message: Tree, local: Local, reduce: Reduce = ..., args: Tree = ...) -> tuple[Tree, Info]: ...


class Cohort(Protocol):
    """The clients of one round. Host values; see `lanes.Lanes.cohort`."""

    @property
    def ids(self) -> np.ndarray: ...  # (M,), int64
    @property
    def sizes(self) -> np.ndarray: ...  # (M,), int64: examples per client
    @property
    def round(self) -> int: ...  # from 1
    @property
    def last(self) -> np.ndarray: ...  # (M,), int64: round in which each was in the cohort before; 0 for never
    @property
    def present(self) -> np.ndarray: ...  # (M,), bool: False for one that cannot be reached: no bytes, no reply
    @property
    def exchange(self) -> Exchange: ...
    @property
    def fetch(self) -> Callable[[Tree], Tree]: ...  # device values -> NumPy, the same in every process


class Population(NamedTuple):
    """What `select` may know: how many clients there are, how many this round asks for, and who can be reached."""

    size: int
    cohort: int
    available: Callable[[np.ndarray], np.ndarray] | None = None  # ids (K,) -> (K,) bool; None: everybody


def draw(rng: np.random.Generator, server: Tree, population: Population) -> np.ndarray:
    """A cohort without replacement from the available clients; absent ones fill it up where too few are there, (M,).

    The cohort's size is a compiled shape, so it stays; the engine leaves absent members alone. Looks at a few times
    M candidates, whatever the population, unless most clients are absent.
    """
    size, wanted, available = population
    if available is None:
        return rng.choice(size, wanted, replace=False)
    looked = wanted
    while True:  # a fresh draw each time: no candidate is preferred for having been looked at before
        looked = min(size, 2 * looked)
        candidates = rng.choice(size, looked, replace=False)
        there = available(candidates)
        if there.sum() >= wanted or looked == size:
            return np.concatenate([candidates[there], candidates[~there]])[:wanted]


class Factors(NamedTuple):
    """One matrix that LoRA adapts, W + scale * A B on inputs from the left: where its leaves lie, and their sizes."""

    kernel: str  # path of W (inputs, outputs)
    a: str  # path of A (inputs, rank), random at the start
    b: str  # path of B (rank, outputs), zero at the start
    scale: float
    inputs: int
    rank: int
    outputs: int


class Task(NamedTuple):
    """What an algorithm is made for: the model's pure functions and the training that the config asks for."""

    init: Callable[[Array], Params]  # key -> the trained part
    loss: Callable[[Tree, Params, Batch], tuple[Array, Metrics]]  # (held, params, batch) -> mean loss, metrics
    logits: Callable[[Tree, Params, Tree], Array]  # (held, params, x) -> (B, classes), or (B, T, vocabulary)
    criterion: Callable[[Array, Batch], tuple[Array, Metrics]]  # (outputs, batch) -> mean loss, metrics
    score: Callable[[Array, Batch], Metrics]  # (outputs, batch) -> sums over what counts: "loss", "weight", others
    optimizer: Callable[[Array | float], optax.GradientTransformation]  # learning rate -> the clients' optimizer
    lr: Callable[[Client], Array]  # its learning rate in this round
    server_optimizer: optax.GradientTransformation
    passes: Passes
    weight: Callable[[Client, Tree], Array]  # weight of a reply in the mean
    encode_up: Callable[[Tree], Tree]  # codec of the clients' replies
    encode_down: Callable[[Tree], Tree]  # codec of the server's message
    trained: frozenset[str] = frozenset()  # paths of `init`'s leaves, for rules that treat some apart
    factors: tuple[Factors, ...] = ()  # the matrices that LoRA adapts
    features: Callable[[Tree, Params, Tree], Array] | None = None  # (held, params, x) -> (B, F): what the head reads
    blocks: Callable[[str], int] = lambda path: 0  # which of the backbone's blocks a leaf lies in, from 0
    classes: int = 0  # 0 for language models, whose `y` is no target but the partition's label
    metric: str = "accuracy"  # what a run is judged by
    larger: bool = True  # whether a larger value of it is better


class Algorithm(NamedTuple):
    """A federated algorithm. Only `init` and `round` are required."""

    init: Callable[[Array, Tree], Tree]  # (key, held) -> server: all that the server keeps
    round: Callable[[Array, Tree, Tree, Cohort], tuple[Tree, Metrics]]  # (key, held, server, cohort) -> server, metrics
    predict: Callable[[Tree, Tree, Tree, Tree], Array]  # (held, server, memory, x) -> logits (B, classes)
    memory: Callable[[Array, Tree], Tree] = lambda key, held: ()  # what ONE client keeps; private, never sent
    select: Callable[[np.random.Generator, Tree, Population], np.ndarray] = draw  # who is absent is left out after it
    observe: Callable[[Tree, dict[str, float]], Tree] = lambda server, metrics: server  # after an evaluation
    setup: Callable[[Tree], Tree] = lambda held: held  # what a client is given once: charged once, reported apart
    params: Callable[[Tree], Params] = lambda server: server.params  # the trained part to export
    runs_empty: bool = False  # whether a round without a reply changes the server, as differential privacy needs


def by_examples(client: Client, reply: Tree) -> Array:
    """Weight of a reply: the client's number of examples."""
    return client.n.astype(jnp.float32)


def uniform(client: Client, reply: Tree) -> Array:
    """Weight of a reply: one for every client that has examples."""
    return (client.n > 0).astype(jnp.float32)


def weighted_sum(weights: Array, values: Array) -> Array:
    """sum_l weights[l] values[l], in full precision: accelerators would otherwise round a product's inputs."""
    return jnp.tensordot(weights.astype(values.dtype), values, axes=1, precision=jax.lax.Precision.HIGHEST)


def mean(weight: Callable[[Client, Tree], Array] = by_examples) -> Reduce:
    """The weighted mean of the replies; zeros where the total weight is zero. Never holds more than one total."""

    def zero(reply: Tree, clients: int) -> Tree:
        return jax.tree.map(lambda r: jnp.zeros(r.shape, r.dtype), reply), jnp.zeros((), jnp.float32)

    def add(total: Tree, replies: Tree, weights: Array, slots: Array) -> Tree:
        sums = jax.tree.map(lambda t, r: t + weighted_sum(weights, r), total[0], replies)
        return sums, total[1] + weights.sum()

    def done(total: Tree, args: Tree, key: Array) -> Tree:
        sums, weight = total
        scale = jnp.where(weight > 0, 1 / jnp.where(weight > 0, weight, 1.0), 0.0)
        return jax.tree.map(lambda s: s * scale.astype(s.dtype), sums)

    return Reduce(zero, add, done, weight)


class Stacked(NamedTuple):
    """All replies side by side, in the cohort's order; `weight` 0 marks one that did not count."""

    replies: Tree  # (M, ...)
    weight: Array  # (M,), float32


def stack(weight: Callable[[Client, Tree], Array] = by_examples) -> Reduce:
    """Keeps every reply: for rules that are no mean (medians, stacking of LoRA factors). Memory grows with M."""

    def zero(reply: Tree, clients: int) -> Stacked:
        rows = jax.tree.map(lambda r: jnp.zeros((clients, *r.shape), r.dtype), reply)
        return Stacked(rows, jnp.zeros((clients,), jnp.float32))

    def add(total: Stacked, replies: Tree, weights: Array, slots: Array) -> Stacked:
        rows = jax.tree.map(lambda t, r: t.at[slots].add(r, mode="drop"), total.replies, replies)
        return Stacked(rows, total.weight.at[slots].add(weights, mode="drop"))

    return Reduce(zero, add, lambda total, args, key: total, weight)
