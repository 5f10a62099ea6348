"""Every client's own test: how good the global model is there, the client's personal model, the model tuned on its data.

All of it runs in the lanes of the engine, as training does: an exchange whose clients score their own test rows and
whose fold keeps every client's sums. It reads what the clients hold already, so no byte is counted for it, and it leaves
no trace. It happens after the last round, and during the run where an algorithm answers by its clients' models.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from fedsim.config import SMALLER, Config, metric_of, metric_of_clients
from fedsim.core import Batch, Client, Local, Metrics, Params, Passes, Tree
from fedsim.data.partition import Partition
from fedsim.engine.client_memory import Memory
from fedsim.engine.cohort import Cohort
from fedsim.engine.lanes import Lanes
from fedsim.evaluation import metrics
from fedsim.evaluation.evaluate import Score
from fedsim.folds import stack
from fedsim.randomness import stream
from fedsim.simulation.build import Problem
from fedsim.simulation.trainers import Trainer

KINDS = ("global", "memory", "tuned")
SUMS = stack(lambda client, reply: jnp.ones(client.n.shape))


class Scores(NamedTuple):
    """Clients' own tests; K clients."""

    ids: np.ndarray  # (K,) int64, ascending
    train: np.ndarray  # (K,) int64 examples that each trains on
    test: np.ndarray  # (K,) int64 examples of its own test
    scores: dict[str, dict[str, np.ndarray]]  # name -> kind -> (K,), NaN without test examples, or finite outputs
    metric: str  # the score that `summary` is about

    def summary(self) -> dict[str, Any]:
        """What `summary.json` says: how the metric is spread over the clients, for each kind."""
        larger = self.metric not in SMALLER
        return {kind: metrics.spread(v, self.test, larger=larger) for kind, v in self.scores[self.metric].items()}

    def rows(self) -> list[dict[str, Any]]:
        """A row for each client, for `clients.json`."""
        return [
            {
                "client": int(self.ids[k]),
                "train": int(self.train[k]),
                "test": int(self.test[k]),
                **{
                    name: {kind: float(v[k]) if self.test[k] else None for kind, v in of_kinds.items()}
                    for name, of_kinds in self.scores.items()
                },
            }
            for k in range(len(self.ids))
        ]


Tally = dict[str, Any]  # sums of `Task.score` over a client's test rows: () each, of many clients (K,); float32


def tested(config: Config, clients: int) -> np.ndarray:
    """The clients whose own tests are read, ascending: all, or `eval_clients` of them drawn by seed."""
    if config.eval_clients >= clients:
        return np.arange(clients)
    return np.sort(stream(config.seed, "eval clients").choice(clients, config.eval_clients, replace=False))


def predicting(trainer: Trainer, *, with_memory: bool) -> Local:
    """Clients that answer for their own test rows, by the algorithm's `predict`."""
    algorithm, batch = trainer.algorithm, Passes(batch_size=trainer.config.batch_size, shuffle=False)

    def outputs(held: Tree, message: Tree, client: Client, x: Tree) -> Array:
        return algorithm.predict(held, message, client.memory if with_memory else (), x)

    return scoring(outputs, trainer.task.score, batch)


def local_scores(problem: Problem, trainer: Trainer, server: Tree, memory: Memory) -> Scores | None:
    """The tests of all clients, or of `eval_clients` of them drawn by seed; None where nothing is held out for them."""
    config, held_out = trainer.config, problem.local_test
    if held_out is None:
        return None
    ids = tested(config, held_out.clients)
    empty = Memory(lambda key, held: (), trainer.engine.held)
    found = {}
    if trainer.algorithm.answers == "server":
        found["global"] = run(trainer, held_out, ids, empty, server, predicting(trainer, with_memory=False))
    if not memory.empty:
        own = predicting(trainer, with_memory=True)
        found["memory"] = run(trainer, held_out, ids, of(memory, ids, trainer), server, own)
    if config.personal_epochs:
        found["tuned"] = tuned(problem, trainer, held_out, ids, empty, server)
    means = {kind: metrics.from_sums(tally, language=trainer.task.classes == 0) for kind, tally in found.items()}
    scores = {name: {kind: each[name] for kind, each in means.items()} for name in next(iter(means.values()))}
    metric = metric_of_clients(metric_of(config))
    return Scores(ids, problem.partition.sizes[ids], held_out.sizes[ids], scores, metric)


class Answers(NamedTuple):
    """What the clients' own models score on their own test rows."""

    scores: dict[str, float]  # means over the clients, each counted once
    each: list[float | None]  # the run's metric by client, in the order of `tested`


class Answering:
    """The clients' models during a run: one engine and one program, made with the trainer."""

    def __init__(self, problem: Problem, trainer: Trainer) -> None:
        held_out = problem.local_test
        assert held_out is not None  # `build.problem` refuses an algorithm whose clients have nothing to answer for
        self.trainer, self.held_out = trainer, held_out
        self.ids = tested(trainer.config, held_out.clients)
        self.engine = over(trainer, held_out)
        self.local = predicting(trainer, with_memory=True)

    def __call__(self, server: Tree, memory: Memory) -> Answers:
        copy = of(memory, self.ids, self.trainer)
        sums = answered(self.engine, self.ids, copy, server, self.local)
        means = metrics.from_sums(sums, language=self.trainer.task.classes == 0)
        asked = self.held_out.sizes[self.ids] > 0
        scores = {name: float(np.mean(values[asked])) if asked.any() else math.nan for name, values in means.items()}
        own = means[metric_of_clients(metric_of(self.trainer.config))]
        return Answers(scores, [float(v) if known else None for v, known in zip(own, asked, strict=True)])


def over(trainer: Trainer, owned: Partition, x: Tree = None) -> Lanes:
    """An engine over rows that clients own in `owned`; `x` are other inputs than the trainer's."""
    e = trainer.engine
    return Lanes(
        e.held, e.x if x is None else x, e.y, owned.rows, owned.offsets, seed=e.seed, devices=len(e.own), parallel=e.parallel,
        resident="on" if e.resident else "off", may_refuse=False,
    )  # fmt: skip  # no refusal: what was trained would be lost


def run(
    trainer: Trainer, owned: Partition, ids: np.ndarray, memory: Memory, message: Tree, local: Local, x: Tree = None
) -> Tally:
    """Sums (K,) of these clients over the rows that they own in `owned`; see `over`."""
    return answered(over(trainer, owned, x), ids, memory, message, local)


def answered(engine: Lanes, ids: np.ndarray, memory: Memory, message: Tree, local: Local) -> Tally:
    """Sums (K,) of what these clients answer."""
    cohort = Cohort(engine, ids, 1, memory)
    replies, _ = cohort.exchange(message, local, SUMS)
    found = cohort.fetch(replies)
    # A reply that is not finite arrives as zeros of weight 0: such a model answers nothing, so it has no score.
    return {name: np.where(found.weight > 0, sums, np.nan) for name, sums in found.replies.items()}


def of(memory: Memory, ids: np.ndarray, trainer: Trainer) -> Memory:
    """A copy of what these clients keep, so that a test leaves no trace."""
    rows, seen = memory.gather(ids)
    copy = Memory(memory.init, trainer.engine.held)
    copy.scatter(ids[seen], jax.tree.map(lambda a: a[seen], rows))
    return copy


def scoring(outputs: Callable[[Tree, Tree, Client, Tree], Array], score: Score, passes: Passes) -> Local:
    """A `Local` that answers for its own rows, and replies with the sums."""

    def scored(held: Tree, message: Tree, client: Client, batch: Batch) -> Tally:
        return score(outputs(held, message, client, batch.x), batch)

    def start(held: Tree, message: Tree, client: Client, batch: Batch) -> tuple[Client, Tally]:
        return client, nothing(jax.eval_shape(scored, held, message, client, batch))

    def step(held: Tree, message: Tree, carry: tuple[Client, Tally], batch: Batch) -> tuple[Any, Metrics]:
        client, tally = carry
        return (client, jax.tree.map(jnp.add, tally, scored(held, message, client, batch))), {}

    def finish(held: Tree, message: Tree, carry: tuple[Client, Tally], client: Client) -> tuple[Tree, Tree, Metrics]:
        return carry[1], client.memory, {}

    return Local(start, step, finish, passes)


def nothing(shapes: Tally) -> Tally:
    """Sums over no rows."""
    return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)


def tuned(
    problem: Problem, trainer: Trainer, held_out: Partition, ids: np.ndarray, memory: Memory, server: Tree
) -> Tally:
    """Each client trains the global model on its own rows for `personal_epochs`, then answers for its test rows.

    A client visits its training rows, epoch after epoch, then its test rows; a batch's training rows make a step first,
    its test rows are scored with what comes out.
    """
    config, task = trainer.config, trainer.task
    mine = [
        np.concatenate([np.tile(problem.partition.client(i), config.personal_epochs), held_out.client(i)]) for i in ids
    ]
    sizes = np.zeros(held_out.clients, np.int64)
    sizes[ids] = [len(rows) for rows in mine]
    both = Partition(np.concatenate(mine).astype(np.int32), np.concatenate([[0], np.cumsum(sizes)]))
    is_test = np.zeros(len(trainer.engine.y), np.float32)
    is_test[held_out.rows] = 1.0
    x = {"x": trainer.engine.x, "test": is_test}
    rate = jnp.float32(config.personal_lr or config.lr)

    def split_rows(batch: Batch) -> tuple[Batch, Batch]:
        """The batch with its training rows alone, and with its test rows alone."""
        plain, test = batch._replace(x=batch.x["x"]), batch.x["test"]
        return plain._replace(mask=batch.mask * (1 - test)), plain._replace(mask=batch.mask * test)

    def scored(held: Tree, params: Tree, batch: Batch) -> Tally:
        return task.score(task.logits(held, params, batch.x), batch)

    def start(held: Tree, message: Tree, client: Client, batch: Batch) -> tuple[Params, Tree, Tally]:
        params = {path: message[path] for path in trainer.start if path in message}
        tally = nothing(jax.eval_shape(scored, held, {**message, **params}, split_rows(batch)[1]))
        return params, task.optimizer(rate).init(params), tally

    def step(held: Tree, message: Tree, carry: Any, batch: Batch) -> tuple[Any, Metrics]:
        params, state, tally = carry
        own, test = split_rows(batch)
        grads = jax.grad(lambda p: task.loss(held, {**message, **p}, own)[0])(params)
        with jax.numpy_dtype_promotion("standard"):  # as in `local.fit`
            updates, new_state = task.optimizer(rate).update(grads, state, params)
            new: Any = optax.apply_updates(params, updates)
        live = own.mask.sum() > 0  # a batch of test rows alone moves nothing, momentum and decay included
        params, state = jax.tree.map(lambda n, o: jnp.where(live, n, o), (new, new_state), (params, state))
        return (params, state, jax.tree.map(jnp.add, tally, scored(held, {**message, **params}, test))), {}

    def finish(held: Tree, message: Tree, carry: Any, client: Client) -> tuple[Tree, Tree, Metrics]:
        return carry[2], client.memory, {}

    local = Local(start, step, finish, Passes(batch_size=config.batch_size, shuffle=False))
    return run(trainer, both, ids, memory, trainer.algorithm.params(server), local, x)
