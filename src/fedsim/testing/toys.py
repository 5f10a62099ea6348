"""A tiny federated task for the contract: softmax regression over a frozen linear map, with LoRA on it where it is needed.

Its clients have very different sizes, one of them no examples.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from fedsim import wire
from fedsim.core import Algorithm, Average, Batch, Client, Local, Passes, Peers, Reduce, Task, Tree
from fedsim.engine import plan
from fedsim.engine.client_memory import Memory
from fedsim.engine.cohort import Cohort
from fedsim.engine.groups import GroupedCohort
from fedsim.engine.keys import key_for
from fedsim.engine.lanes import Lanes
from fedsim.engine.state import named
from fedsim.folds import plain
from fedsim.testing.tasks import BLOCKS, CLASSES, FEATURES, GROUPS, LORA, Make, suited
from fedsim.wire import Codec

SIZES = (7, 1, 23, 0, 12, 5, 9, 40, 3, 16, 8, 2)  # examples of each client
COHORT = (2, 0, 7, 4, 9, 1)


class Problem(NamedTuple):
    """A tiny federated data set. Row 0 belongs to nobody: it is what padding points at."""

    held: Tree
    x: np.ndarray
    y: np.ndarray
    rows: np.ndarray
    offsets: np.ndarray


def tiny_problem(seed: int = 0) -> Problem:
    """Twelve clients of 0 to 40 examples of three classes."""
    rng = np.random.default_rng(seed)
    n = sum(SIZES) + 1
    x = rng.normal(size=(n, FEATURES)).astype(np.float32)
    y = (x @ rng.normal(size=(FEATURES, CLASSES))).argmax(axis=1).astype(np.int32)
    rows = (1 + rng.permutation(n - 1)).astype(np.int32)
    held = {"frozen": rng.normal(size=(FEATURES, FEATURES)).astype(np.float32)}
    held["lora_a"] = rng.normal(size=(FEATURES, LORA.rank)).astype(np.float32)  # for tasks that do not train it
    held |= {f"blocks/{b}/kernel": rng.normal(size=(FEATURES, FEATURES)).astype(np.float32) for b in range(BLOCKS)}
    return Problem(held, x, y, rows, np.concatenate([[0], np.cumsum(SIZES)]).astype(np.int64))


def engine(problem: Problem, **options: Any) -> Lanes:
    """An engine over the problem; two lanes on one device unless said otherwise. The server holds a few examples too."""
    chosen: dict[str, Any] = {"lanes": 2, "devices": 1, "segment_steps": 5}
    chosen |= {"public": np.arange(1, 21), "shard": np.arange(21, 33)}  # of clients, for want of others
    return Lanes(*problem, **{**chosen, **options})


class Bench(NamedTuple):
    """The engines of a tiny problem: one, or of several architectures one a group beside the one that stands for all."""

    whole: Lanes
    groups: Mapping[str, Lanes] = {}

    def memory(self, algorithm: Algorithm) -> Memory:
        """Of clients that have not been met, as a run makes it: of groups each has a store of its own."""
        if not self.groups:
            return Memory(algorithm.memory, self.whole.held)
        memory = Memory(lambda key, held: (), self.whole.held)
        for name, lanes in self.groups.items():
            memory.store(name, algorithm.memory, lanes.held)
        return memory

    def averaging(self, average: Average) -> Tree:
        """The average's first state, by group if any."""
        state = average.init()
        return self.whole.put(dict.fromkeys(self.groups, state) if self.groups else state)

    def cohort(
        self, ids: tuple[int, ...], round: int, memory: Memory, algorithm: Algorithm, averaging: Tree, **options: Any
    ) -> Any:
        """The clients of a round; of groups an even id is in the first, an odd one in the second, nobody in the first."""
        options["releases"] = algorithm.releases
        if not self.groups:
            return Cohort(self.whole, np.array(ids, np.int64), round, memory, averaging=averaging, **options)
        parts = {
            name: Cohort(
                lanes, np.array([i for i in ids if max(i, 0) % 2 == place], np.int64), round, memory.beside[name],
                averaging=averaging[name], stores=memory, **options,
            )
            for place, (name, lanes) in enumerate(self.groups.items())
        }  # fmt: skip
        return GroupedCohort(self.whole, round, parts)


def bench(problem: Problem, task: Task, **options: Any) -> Bench:
    """The engines that an algorithm of this task needs; options as of `engine`."""
    if not task.groups:
        return Bench(engine(problem, **options))
    groups = {name: engine(problem, **options, group=name) for name in task.groups if name != GROUPS[-1]}
    return Bench(engine(problem._replace(held=dict.fromkeys(task.groups, problem.held)), **options), groups)


class Sent(NamedTuple):
    """An exchange as it was asked for, and by which cohort."""

    message: Tree
    local: Local
    link: Peers | None = None
    cohort: Any = None


def run(
    make: Make,
    problem: Problem,
    cohorts: tuple[tuple[int, ...], ...] = (COHORT,),
    *,
    task: Task | None = None,
    state: tuple[Tree, Memory] | None = None,
    first: int = 1,
    met: np.ndarray | None = None,
    sent: list[Sent] | None = None,
    **options: Any,
) -> tuple[Tree, Memory, list[Cohort]]:
    """Rounds `first`, `first + 1`, ... with the given cohorts: the server's state, clients' memory, the cohorts.

    Args:
        state, met: of the rounds before `first`; `met` (N,) is the last round in which a client was in the cohort.
    """
    task = task or suited(make)
    return rounds(bench(problem, task, **options), make(task), plain(task.weight), cohorts, state, first, met, sent)


def rounds(
    bench: Bench,
    algorithm: Algorithm,
    average: Average,
    cohorts: tuple[tuple[int, ...], ...],
    state: tuple[Tree, Memory] | None = None,
    first: int = 1,
    met: np.ndarray | None = None,
    sent: list[Sent] | None = None,
) -> tuple[Tree, Memory, list[Cohort]]:
    """As `run`, of an algorithm and engines that are there."""
    lanes = bench.whole
    met = np.zeros(lanes.population, np.int32) if met is None else met.copy()
    averaging, copies = bench.averaging(average), {}
    server, memory = state or (algorithm.init(key_for(lanes.root, "init"), lanes.held), bench.memory(algorithm))
    server = lanes.put(server)
    done = []
    for round, ids in enumerate(cohorts, first):
        cohort = bench.cohort(ids, round, memory, algorithm, averaging, met=met, average=average, copies=copies)
        met[cohort.ids[cohort.present]] = round
        if sent is not None:
            for one in cohort.groups.values() or (cohort,):
                listen(one, sent)
        server, _ = algorithm.round(key_for(lanes.root, "server", round), lanes.held, server, cohort)
        averaging, copies = cohort.averaging, cohort.copies
        cohort.settle()
        done.append(cohort)
    return server, memory, done


def listen(cohort: Cohort, sent: list[Sent]) -> None:
    """Notes every message of the cohort's exchanges."""
    exchange = cohort.exchange

    def listening(
        message: Tree, local: Local, reduce: Reduce | None = None, args: Tree = (), link: Peers | None = None
    ) -> Any:
        sent.append(Sent(message, local, link, cohort))
        return exchange(message, local, reduce, args, link)

    cohort.exchange = listening  # type: ignore[method-assign]  # on this one instance, for the test


@functools.cache
def compiled(local: Local) -> Local:
    """The same functions, each compiled by itself."""
    return local._replace(start=jax.jit(local.start), step=jax.jit(local.step), finish=jax.jit(local.finish))


def visits(problem: Problem, passes: Passes, id: int, round: int, seed: int = 0, exchange: int = 0) -> np.ndarray:
    """Rows of the data set that a client visits, (steps, B), -1 for none."""
    own = np.append(problem.rows[problem.offsets[id] : problem.offsets[id + 1]], -1)  # no example, -1, finds the last
    labels = problem.y[own[:-1]]
    steps = int(plan.steps_of(np.array([len(labels)]), passes, lambda place: labels)[0])
    found = np.full((steps, passes.batch_size), -1)
    if passes.rows is not None:
        for step, block in enumerate(plan.own_steps(id, labels, steps, passes, seed, round, exchange)):
            found[step] = block
    else:
        _, step, column, example = plan.batches(np.array([id]), np.array([len(labels)]), passes, seed, round, exchange)
        found[step, column] = example
    return own[found]


def channel(group: str, local: Local) -> str:
    """What the randomness of an exchange is named by, as `Lanes.name`."""
    return "/".join(filter(None, (group, local.passes.stream)))


class Coding(NamedTuple):
    """What the codec of a client's first reply is given."""

    key: Array
    common: Array
    state: Tree


def coding(
    reply: Tree, local: Local, codec: Codec | None, id: int, round: int, seed: int = 0, exchange: int = 0,
    group: str = "",
) -> Coding:  # fmt: skip
    """Keys and fresh state of the codec for this client's marked reply."""
    root, name = jax.random.key(seed), channel(group, local)
    shapes = {name: sent.value for name, sent in wire.changes(reply).items()}
    return Coding(
        key_for(key_for(root, named("local", name), round, exchange, id), "codec"),
        key_for(root, named("codec", name), round, exchange),
        codec.init(key_for(root, "coding", id), shapes) if codec and shapes else (),
    )


def one_client(
    problem: Problem,
    local: Local,
    message: Tree,
    memory: Tree,
    id: int,
    round: int,
    seed: int = 0,
    exchange: int = 0,
    codec: Codec | None = None,
    group: str = "",
) -> tuple[Tree, Tree]:
    """What client `id` replies, marked, and keeps, computed alone, batch by batch, without lanes: the engine's oracle.

    Args:
        message: what this client reads: own parts are already its own, marks and packets gone.
        exchange: which of its stream in this round.
        codec: of the replies, with which the client has not replied before.
        group: the client's, where there are several.
    """
    made, rows = compiled(local), visits(problem, local.passes, id, round, seed, exchange)
    size, steps = problem.offsets[id + 1] - problem.offsets[id], len(rows)
    key = key_for(jax.random.key(seed), named("local", channel(group, local)), round, exchange, id)
    client = Client(jnp.int32(id), jnp.int32(size), memory, key, jnp.int32(round), jnp.float32(0.0), jnp.int32(steps))
    carry: Tree = None
    for s, row in enumerate(rows if steps else np.full((1, local.passes.batch_size), -1)):
        batch = Batch(
            jnp.asarray(problem.x[np.maximum(row, 0)]),
            jnp.asarray(problem.y[np.maximum(row, 0)]),
            jnp.asarray(row >= 0, jnp.float32),
            jax.random.fold_in(key, s),
            jnp.int32(s),
            jnp.asarray(s == max(steps, 1) - 1),
        )
        carry = made.start(problem.held, message, client, batch) if s == 0 else carry
        if steps:
            carry, _ = made.step(problem.held, message, carry, batch)
    reply, memory, _ = made.finish(problem.held, message, carry, client)
    if local.sent is not None:
        read, _ = wire.arrive(reply, codec, *coding(reply, local, codec, id, round, seed, exchange, group))
        memory = local.sent(memory, wire.unwrap(read), client)
    return reply, memory
