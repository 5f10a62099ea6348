"""Small algorithms that need what FedAvg does not: two streams, peers, models of clients, a server that stops.

Each is one of the systems to come, or a part of it, as short as it can be; `test_toys.py` has their oracles.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from fedsim.algorithms.fed_avg import Server, descend, fed_avg
from fedsim.core import Algorithm, Batch, Client, Cohort, Graph, Metrics, Params, Peers, Population, Task, Tree
from fedsim.folds import mean, uniform
from fedsim.training.local import Fit, fit
from fedsim.wire import again, coded


def fed_res(task: Task, local_rate: float = 1.0) -> Algorithm:
    """Federated residual learning (Agarwal et al., arXiv 2003.12880), FedResAvg I: logits f(x; w) + g(x; beta_i).

    beta_i is trained first, then w, each with the other fixed; beta_i stays with its client. Both are models of the task's
    form; the residual begins at zero.
    """

    def joint(held: Tree, moving: Params, batch: Batch) -> tuple[Array, Metrics]:
        held, fixed = held
        return task.criterion(task.logits(held, moving, batch.x) + task.logits(held, fixed, batch.x), batch)

    def keep(carry: Fit, message: Params, client: Client) -> tuple[Tree, Params]:
        return (), carry.params

    residual = fit(
        joint, task.optimizer, lambda client, message: local_rate * task.lr(client, message),
        task.passes._replace(stream="residual"), view=lambda held, w, beta: (held, w), start=lambda w, beta: beta,
        reply=keep,
    )  # fmt: skip
    shared = fit(joint, task.optimizer, task.lr, task.passes, view=lambda held, w, beta: (held, beta))

    def init(key: Array, held: Tree) -> Server:
        params = task.init(key)
        return Server(params, task.server_optimizer.init(params))

    update = jax.jit(partial(descend, task.server_optimizer))

    def round(key: Array, held: Tree, server: Server, cohort: Cohort) -> tuple[Server, Metrics]:
        cohort.exchange(coded(server.params, change=False), residual)
        change, info = cohort.exchange(again(server.params), shared)
        return update(server, change, info.weight), info.metrics

    def predict(held: Tree, server: Server, beta: Tree, x: Tree) -> Array:
        logits = task.logits(held, server.params, x)
        return logits + task.logits(held, beta, x) if beta else logits

    def memory(key: Array, held: Tree) -> Params:
        return jax.tree.map(jnp.zeros_like, task.init(key))

    return Algorithm(init, round, predict, memory, answers="client")


class Nothing(NamedTuple):
    """A server that only looks: the mean of what members heard."""

    params: Params


def ring(members: int) -> Graph:
    """Each hears both neighbours; thirds."""
    i = np.arange(members)
    third = np.full((members, 2), 1 / 3, np.float32)
    return Graph(np.stack([(i - 1) % members, (i + 1) % members], axis=1), third, np.full(members, 1 / 3, np.float32))


def complete(members: int) -> Graph:
    """Everybody hears everybody."""
    whom = np.tile(np.arange(members), (members, 1))
    weight = np.full((members, members), 1 / members, np.float32)
    np.fill_diagonal(weight, 0)
    return Graph(whom, weight, np.full(members, 1 / members, np.float32))


def alone(members: int) -> Graph:
    """Nobody hears anybody."""
    nobody = np.zeros((members, 1))
    return Graph(nobody.astype(int), nobody.astype(np.float32), np.ones(members, np.float32))


def dfed_alt(task: Task, personal: tuple[str, ...] = ("bias",), graph: Callable[[int], Graph] = ring) -> Algorithm:
    """DFedAlt (Shi et al., arXiv 2305.15157): the personal part, then the shared one, which goes from peer to peer."""
    shared = [path for path in task.trained if path not in personal]
    of_own: dict[str, Any] = {"start": lambda message, memory: memory}
    head = fit(
        task.loss, task.optimizer, task.lr, task.passes._replace(stream="personal"), trains=personal,
        reply=lambda carry, message, client: ((), carry.params), **of_own,
    )  # fmt: skip
    body = fit(
        task.loss, task.optimizer, task.lr, task.passes, trains=shared,
        reply=lambda carry, message, client: (
            coded({path: carry.params[path] for path in shared}, change=False), carry.params,
        ), **of_own,
    )  # fmt: skip
    look = mean(uniform)

    def into(memory: Params, heard: Params, client: Client) -> Params:
        return {**memory, **heard}

    def round(key: Array, held: Tree, server: Nothing, cohort: Cohort) -> tuple[Nothing, Metrics]:
        if personal:
            cohort.exchange((), head)
        mixed, info = cohort.exchange((), body, look, link=Peers(graph(len(cohort.ids)), into))
        seen = jax.tree.map(lambda n, o: jnp.where(info.weight > 0, n, o), mixed, server.params)
        return Nothing(seen), info.metrics

    def predict(held: Tree, server: Nothing, memory: Tree, x: Tree) -> Array:
        return task.logits(held, {**task.init(jax.random.key(0)), **server.params, **(memory or {})}, x)

    def everybody(rng: np.random.Generator, server: Tree, population: Population) -> np.ndarray:
        return np.arange(population.size)

    return Algorithm(
        init=lambda key, held: Nothing({path: leaf for path, leaf in task.init(key).items() if path in shared}),
        round=round,
        predict=predict,
        memory=lambda key, held: task.init(jax.random.key(0)),
        select=everybody,
        answers="client",
    )


def in_stages(task: Task, rounds: int = 2) -> Algorithm:
    """FedAvg that ends by itself after some rounds, and counts them in its state."""
    plain = fed_avg(task)

    def round(key: Array, held: Tree, server: Tree, cohort: Cohort) -> tuple[Tree, Metrics]:
        new, metrics = plain.round(key, held, server[0], cohort)
        return (new, server[1] + 1), metrics

    return plain._replace(
        init=lambda key, held: (plain.init(key, held), jnp.int32(0)),
        round=round,
        predict=lambda held, server, memory, x: plain.predict(held, server[0], memory, x),
        params=lambda server: server[0].params,
        finished=lambda server: int(server[1]) >= rounds,
    )


def by_group(task: Task) -> Algorithm:
    """FedAvg in each group by itself: several architectures, nothing of which is mixed."""
    parts = {name: fed_avg(one) for name, one in task.groups.items()}

    def init(key: Array, held: Tree) -> dict[str, Server]:
        return {name: part.init(key, held[name]) for name, part in parts.items()}

    def round(key: Array, held: Tree, server: dict[str, Server], cohort: Cohort) -> tuple[dict[str, Server], Metrics]:
        new, seen = dict(server), {}
        for name, members in cohort.groups.items():
            new[name], metrics = parts[name].round(key, held[name], server[name], members)
            seen |= {f"{name} {metric}": value for metric, value in metrics.items()}
        return new, seen

    def answering(by_name: dict[str, Any]) -> str:
        return "server" if "server" in by_name else next(iter(by_name))

    def predict(held: Tree, server: dict[str, Server], memory: Tree, x: Tree) -> Array:
        name = answering(parts)
        return parts[name].predict(held[name], server[name], (), x)

    return Algorithm(init, round, predict, params=lambda server: server[answering(parts)].params, groups=True)
