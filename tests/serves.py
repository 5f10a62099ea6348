"""Algorithms whose server trains after the clients: on examples with labels, and on others towards what the clients say."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import fedsim


class Server(NamedTuple):
    """What both keep."""

    params: Any
    optimizer: Any


@jax.jit
def where_any(weight: Any, new: Server, old: Server) -> Server:
    """The new state where a reply counted, else the old one."""
    return jax.tree.map(lambda n, o: jnp.where(weight > 0, n, o), new, old)


def fed_tuned(task: Any, steps: int = 6, batch: int = 8, optimizer: Any = None) -> fedsim.Algorithm:
    """FedAvg whose server then takes steps on its own examples, with one optimizer for all rounds; Adam unless said otherwise."""
    optimizer = optimizer or optax.adam(optax.linear_schedule(0.05, 0.0, 100))
    run = fedsim.trainer(lambda held, params, batch, args: task.loss(held, params, batch), optimizer, batch, steps)
    local = fedsim.fit(task.loss, task.optimizer, task.lr, task.passes)
    add = jax.jit(lambda a, b: jax.tree.map(jnp.add, a, b))

    def init(key: Any, held: Any) -> Server:
        params = task.init(key)
        return Server(params, optimizer.init(params))

    def round(key: Any, held: Any, server: Server, cohort: Any) -> Any:
        change, info = cohort.exchange(fedsim.coded(server.params, change=False), local)
        params = add(server.params, change)
        params, state, metrics = run(held, params, server.optimizer, cohort.shard, (), key)
        new = where_any(info.weight, Server(params, state), server)
        return new, {**info.metrics, "server_loss": metrics["loss"]}

    def predict(held: Any, server: Server, memory: Any, x: Any) -> Any:
        return task.logits(held, server.params, x)

    return fedsim.Algorithm(init, round, predict)


def fed_distilled(task: Any, steps: int = 5, batch: int = 8, lr: float = 0.1) -> fedsim.Algorithm:
    """The mean of the clients, taught on examples without labels what the clients answer together."""
    optimizer, teachers = optax.sgd(lr), fedsim.stack(task.weight)

    def loss(held: Any, params: Any, batch: Any, teachers: Any) -> Any:
        assert batch.y == ()  # nobody knows the labels
        answers = jax.vmap(lambda one: jax.nn.softmax(task.logits(held, one, batch.x)))(teachers.replies)
        shares = teachers.weight / teachers.weight.sum()
        target = jnp.tensordot(shares, answers, axes=1)
        value = -(target * jax.nn.log_softmax(task.logits(held, params, batch.x))).sum(axis=-1).mean()
        return value, {"distilled": value}

    run = fedsim.trainer(loss, optimizer, batch, steps)
    local = fedsim.fit(
        task.loss, task.optimizer, task.lr, task.passes,
        reply=lambda fit, message, client: (fedsim.coded(fit.params, change=False), client.memory),
    )  # fmt: skip
    mean = jax.jit(
        lambda all: jax.tree.map(lambda r: jnp.tensordot(all.weight / all.weight.sum(), r, axes=1), all.replies)
    )

    def init(key: Any, held: Any) -> Server:
        return Server(task.init(key), ())

    def round(key: Any, held: Any, server: Server, cohort: Any) -> Any:
        found, info = cohort.exchange(fedsim.coded(server.params, change=False), local, teachers)
        params = mean(found)
        params, _, metrics = run(held, params, optimizer.init(params), cohort.public, found, key)
        return where_any(info.weight, Server(params, ()), server), {**info.metrics, **metrics}

    def predict(held: Any, server: Server, memory: Any, x: Any) -> Any:
        return task.logits(held, server.params, x)

    return fedsim.Algorithm(init, round, predict)


def fed_two_sizes(task: Any, steps: int = 4, batch: int = 8, lr: float = 0.1) -> fedsim.Algorithm:
    """FedAvg of each group by itself; the server's own model learns what the groups answer together on public examples."""
    names = [name for name in task.groups if name != "server"]
    locals_ = {n: fedsim.fit(t.loss, t.optimizer, t.lr, t.passes) for n, t in task.groups.items() if n in names}
    optimizer = optax.sgd(lr)
    add = jax.jit(lambda a, b: jax.tree.map(jnp.add, a, b))

    def loss(held: Any, params: Any, batch: Any, teachers: Any) -> Any:
        answers = [jax.nn.softmax(task.groups[n].logits(held[n], teachers[n], batch.x)) for n in names]
        target = sum(answers[1:], start=answers[0]) / len(names)
        value = -(target * jax.nn.log_softmax(task.logits(held["server"], params, batch.x))).sum(axis=-1).mean()
        return value, {"distilled": value}

    run = fedsim.trainer(loss, optimizer, batch, steps)

    def init(key: Any, held: Any) -> Server:
        return Server({n: t.init(key) for n, t in task.groups.items()}, ())

    def round(key: Any, held: Any, server: Server, cohort: Any) -> Any:
        params, weight = dict(server.params), 0.0
        for name in names:
            change, info = cohort.groups[name].exchange(fedsim.coded(params[name], change=False), locals_[name])
            params[name], weight = add(params[name], change), weight + info.weight
        teachers = {n: params[n] for n in names}
        state = optimizer.init(params["server"])
        params["server"], _, metrics = run(held, params["server"], state, cohort.public["server"], teachers, key)
        return where_any(weight, Server(params, ()), server), {**info.metrics, **metrics}

    def predict(held: Any, server: Server, memory: Any, x: Any) -> Any:
        return task.logits(held["server"], server.params["server"], x)

    return fedsim.Algorithm(init, round, predict, params=lambda server: server.params["server"], groups=True)
