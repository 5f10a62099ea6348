"""The contract on one page: an algorithm is a value, and a message is its only channel to the clients.

An `Algorithm` holds pure functions. Its `round` is plain Python on the host and reaches clients through
`cohort.exchange(message, local)` alone, so every byte that travels is seen and priced (`wire/`). What happens on a
client is a `Local`: three pure functions of one client, which the engine (`engine/`) maps over many. Replies are folded
by the run's `Average`, or by a `Reduce` of the algorithm's own (`folds.py`). All of these are made once, when the
algorithm is constructed: values that change travel in the message or in `args`, so nothing recompiles. `held` is the
frozen backbone: the same for all, never sent again, never changed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, NamedTuple, Protocol

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
    key: Array  # (), typed PRNG key of (seed, round, stream, exchange, id)
    round: Array  # (), int32, from 1
    lr: Array  # (), float32: learning rate of this round; data, so another rate recompiles nothing
    steps: Array  # (), int32: local steps that it takes in this exchange


class Batch(NamedTuple):
    """One local step's examples; rows with mask 0 are padding, or holes that `Passes.rows` left.

    B is the batch size, or less where no lane has so many rows: nothing may depend on how much padding there is.
    """

    x: Tree  # (B, ...)
    y: Array  # (B,), int32
    mask: Array  # (B,), float32: 1 for a real example
    key: Array  # (), typed PRNG key of the client's and `step`
    step: Array  # (), int32: number of this local step, from 0
    last: Array  # (), bool: no step follows


class Passes(NamedTuple):
    """How a client goes over its data: whole epochs, an exact number of full batches, or blocks of its own choice.

    `rows` is pure NumPy: (labels (n,), generator) -> blocks (k, B) of the client's examples 0..n - 1, -1 for a hole
    anywhere; `steps` is then a function of the labels. A step whose block is all holes is a step without data.
    """

    epochs: int = 1
    steps: int | Callable[[np.ndarray], int] | None = None
    batch_size: int = 8
    shuffle: bool = True
    rows: Callable[[np.ndarray, np.random.Generator], Iterator[np.ndarray]] | None = None
    stream: str = ""  # names the randomness: a round's n-th exchange of a stream draws the same whatever others do


class Local(NamedTuple):
    """What happens on a client. Pure functions of one client; the engine maps and masks them.

    A step's metrics are weighted by the batch's rows, or by an entry "weight" among them (a language model's tokens).
    """

    start: Callable[[Tree, Tree, Client, Batch], Tree]  # (held, message, client, first batch) -> carry
    step: Callable[[Tree, Tree, Tree, Batch], tuple[Tree, Metrics]]  # (held, message, carry, batch) -> carry, metrics
    finish: Callable[[Tree, Tree, Tree, Client], tuple[Tree, Tree, Metrics]]  # -> reply, memory, metrics
    passes: Passes
    sent: Callable[[Tree, Tree, Client], Tree] | None = (
        None  # (memory, reply as the server decodes it, client) -> memory
    )


class Reduce(NamedTuple):
    """A fold of the replies. `add` gets many at once; a reply that does not count arrives as zeros of weight 0.

    Totals of lanes and devices are summed, so `add` must be additive in what it adds - but where `rows` is set: there
    `slots` are the device's own, a total's leaves are (slots, ...), and they come to `done` in the cohort's order.
    """

    zero: Callable[[Tree, int], Tree]  # (one reply's shapes, cohort size M, or a device's slots) -> total
    add: Callable[[Tree, Tree, Array, Array, Tree], Tree]  # (total, replies (L, ...), weights (L,), slots (L,), args)
    done: Callable[[Tree, Tree, Array], Tree]  # (total, args, key) -> result; once, after the sum over devices
    weight: Callable[[Client, Tree], Array]  # (client, reply) -> (), float32
    rows: bool = False


class Averaged(NamedTuple):
    """What the `done` of an average gives."""

    value: Tree  # shaped like one reply
    weight: Array  # (), float32: what it divided by; zero only where nothing may change
    seen: Tree = ()  # for `Average.next`
    reported: Array | None = None  # (), int32: in place of the replies counted, where that number is private


class Average(NamedTuple):
    """The run's fold, which the config chooses; its `reduce.done` gives an `Averaged`. State is () for the mean."""

    name: str
    reduce: Reduce
    init: Callable[[], Tree] = tuple  # -> state; lies with the loop and in checkpoints
    args: Callable[[Tree, int], Tree] = lambda state, members: ()  # (state, cohort size) -> the fold's `args`
    next: Callable[[Tree, Tree], Tree] = lambda state, seen: state  # (state, seen) -> state, after every exchange
    runs_empty: bool = False  # a round without a reply changes the server, as noise does
    plain: bool = False  # a mean, for which another fold may stand; else an algorithm's own folds are refused


class Info(NamedTuple):
    """What an exchange says about itself; logged, never fed back by the engine. Device values until fetched."""

    metrics: Metrics  # means of `step`'s metrics over all examples seen, of `finish`'s over clients
    clients: Metrics  # the same per client, (M,), in the cohort's order; NaN for a client without examples
    weight: Array  # (), float32: what the fold divided by; zero only where nothing may change
    reported: Array  # (), int32: replies that counted
    nonfinite: Array  # (), int32: replies left out because of a NaN or infinity


class Graph(NamedTuple):
    """Who hears whom among a cohort of M: mixed_i = own_i z_i + sum_k weight_ik z_whom_ik. Host values, data."""

    whom: np.ndarray  # (M, k), int: places in the cohort; k = M is dense
    weight: np.ndarray  # (M, k), float32; with `own` a row sums to 1; 0 for no edge
    own: np.ndarray  # (M,), float32


class Peers(NamedTuple):
    """Replies go from member to member, and `into` puts what a member hears into its memory."""

    graph: Graph
    into: Callable[[Tree, Tree, Client], Tree]  # (memory, mixed, client) -> memory; made once, like a `Local`


class Exchange(Protocol):
    """Sends `message` to the cohort's members, runs `local` there, folds the replies: by the run's average, or `reduce`."""

    def __call__(
        self, message: Tree, local: Local, reduce: Reduce | None = ..., args: Tree = ..., link: Peers | None = ...
    ) -> tuple[Tree, Info]: ...


class Cohort(Protocol):
    """The clients of one round. Host values; see `engine.cohort.Cohort`."""

    @property
    def population(self) -> int: ...  # clients there are, N
    @property
    def ids(self) -> np.ndarray: ...  # (M,), int64; -1 for nobody
    @property
    def sizes(self) -> np.ndarray: ...  # (M,), int64: examples per client
    @property
    def groups(self) -> Mapping[str, Cohort]: ...  # of several architectures each one's clients; {} of one
    @property
    def round(self) -> int: ...  # from 1
    @property
    def last(self) -> np.ndarray: ...  # (M,), int64: round in which each was in the cohort before; 0 for never
    @property
    def present(self) -> np.ndarray: ...  # (M,), bool: False for one that cannot be reached: no bytes, no reply
    @property
    def reports(self) -> np.ndarray: ...  # (M,), bool: still in the round; who does not report in an exchange is out
    @property
    def public(self) -> Tree: ...  # x (n, ...) that the server holds without labels, by group if any; None for none
    @property
    def shard(self) -> Any: ...  # (x, y) that it holds with labels, likewise; both whole on every device
    @property
    def exchange(self) -> Exchange: ...
    @property
    def fetch(self) -> Callable[[Tree], Tree]: ...  # device values -> NumPy, the same in every process
    def rng(self, purpose: str) -> np.random.Generator: ...  # of (seed, round, purpose), for choices on the host


class Population(NamedTuple):
    """What `select` may know: how many clients there are, how many this round asks for, who can be reached, which round it is."""

    size: int
    cohort: int
    available: Callable[[np.ndarray], np.ndarray] | None = None  # ids (K,) -> (K,) bool; None: everybody
    round: int = 1


def draw(rng: np.random.Generator, server: Tree, population: Population) -> np.ndarray:
    """A cohort without replacement from the available clients; absent ones fill it up where too few are there, (M,).

    The cohort's size is a compiled shape, so it stays; the engine leaves absent members alone. Looks at a few times
    M candidates, whatever the population, unless most clients are absent.
    """
    size, wanted, available, _ = population
    if available is None:
        return rng.choice(size, wanted, replace=False)
    looked = wanted
    while True:  # a fresh draw each time: no candidate is preferred for having been looked at before
        looked = min(size, 2 * looked)
        candidates = rng.choice(size, looked, replace=False)
        there = available(candidates)
        if there.sum() >= wanted or looked == size:
            return np.concatenate([candidates[there], candidates[~there]])[:wanted]


def places(size: int, chance: float) -> int:
    """Members that fewer than one Poisson sample in a million exceeds."""
    mean = size * chance
    return min(size, math.ceil(mean + 5 * math.sqrt(mean * (1 - chance)) + 5))


def poisson(rate: float | None = None) -> Callable[[np.random.Generator, Tree, Population], np.ndarray]:
    """A `select` that takes every client with chance `rate`, independently (default: the cohort's share of all).

    The cohort is filled up with nobody (-1) to a size that one round in a million exceeds; such a round is a multiple of
    it, which compiles once more. Nobody who was drawn is left out: privacy counts on it.
    """
    if rate is not None and not 0 < rate <= 1:
        raise ValueError(f"Expected 0 < rate={rate} <= 1, a client's chance of being in a round; give poisson(0.1).")

    def select(rng: np.random.Generator, server: Tree, population: Population) -> np.ndarray:
        chance = population.cohort / population.size if rate is None else rate
        cap = places(population.size, chance)
        drawn = rng.choice(population.size, rng.binomial(population.size, chance), replace=False)
        return np.pad(drawn, (0, -len(drawn) % cap if len(drawn) else cap), constant_values=-1)

    return select


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
    lr: Callable[[Client, Tree], Array]  # (client, message) -> its learning rate in this exchange
    server_optimizer: optax.GradientTransformation
    passes: Passes
    weight: Callable[[Client, Tree], Array]  # weight of a reply in the run's average, for folds of one's own
    trained: frozenset[str] = frozenset()  # paths of `init`'s leaves, for rules that treat some apart
    factors: tuple[Factors, ...] = ()  # the matrices that LoRA adapts
    features: Callable[[Tree, Params, Tree], Array] | None = None  # (held, params, x) -> (B, F): what the head reads
    blocks: Callable[[str], int] = lambda path: 0  # which of the backbone's blocks a leaf lies in, from 0
    classes: int = 0  # 0 for language models, whose `y` is no target but the partition's label
    metric: str = "accuracy"  # what a run is judged by
    larger: bool = True  # whether a larger value of it is better
    augment: Callable[[Array, Tree], Tree] = lambda key, x: x  # (a batch's key, x) -> x, as `loss` trains on it
    inputs: Callable[[Tree], Tree] | None = lambda x: x  # (x, images in 0..1) -> as it reads bytes; None: unknown
    real: Callable[[Tree], Array] | None = None  # x -> (B, T) bool, where features are a token's; None: one a text
    groups: Mapping[str, Task] = {}  # of several architectures each one's; this one is then the answering group's


class Algorithm(NamedTuple):
    """A federated algorithm. `init`, `round` and `predict` are required."""

    init: Callable[[Array, Tree], Tree]  # (key, held) -> server: all that the server keeps
    round: Callable[[Array, Tree, Tree, Cohort], tuple[Tree, Metrics]]  # (key, held, server, cohort) -> server, metrics
    predict: Callable[[Tree, Tree, Tree, Tree], Array]  # (held, server, memory, x) -> logits (B, classes)
    memory: Callable[[Array, Tree], Tree] = lambda key, held: ()  # what ONE client keeps; private, never sent
    select: Callable[[np.random.Generator, Tree, Population], np.ndarray] = draw  # ids (M,), -1 for nobody; any M
    observe: Callable[[Tree, dict[str, float]], Tree] = lambda server, metrics: server  # after an evaluation
    setup: Callable[[Tree], Tree] = lambda held: held  # what a client is given once: charged once, reported apart
    params: Callable[[Tree], Params] = lambda server: server.params  # the trained part to export
    finished: Callable[[Tree], bool] = lambda server: False  # after a round: whether the run is over
    answers: Literal["server", "client"] = "server"  # whose model is validated: "client" reads clients' memories
    groups: bool = False  # trains several architectures: `held` is by group, and so are exchanges
    releases: int = 1  # exchanges a round that privacy accounts for; one more is refused
    runs_empty: bool = False  # whether a round without a reply changes the server
    plain_steps: bool = True  # clients take the run's steps, one gradient each: what example-level privacy counts
