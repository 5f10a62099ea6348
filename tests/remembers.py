"""What tests of stopped runs share: an algorithm whose clients remember, and the fields of a line that tell time."""

from __future__ import annotations

TIMES = {"seconds", "compile_seconds", "clients_per_second", "examples_per_second", "flops_per_second", "mfu"}
TIMES |= {"most_memory", "server_seconds"}

# Every client counts its visits and keeps its last change, which pulls at its next reply: a lost or doubled visit shows.
REMEMBERS = """
import jax
import jax.numpy as jnp

import fedsim
from fedsim import wire
from fedsim.algorithms.fed_avg import Server


def fed_remembers(task):
    plain = fedsim.fit(task.loss, task.optimizer, task.lr, task.passes)

    def finish(held, message, carry, client):
        marked, _, metrics = plain.finish(held, message, carry, client)
        change = wire.unmarked(marked)
        last, visits = client.memory["last"], client.memory["visits"] + 1
        reply = jax.tree.map(lambda c, m: c + 0.1 * m, change, last)
        return wire.coded(reply), {"last": change, "visits": visits}, {**metrics, "visits": visits.astype(jnp.float32)}

    local, reduce = plain._replace(finish=finish), fedsim.mean(task.weight)
    add = jax.jit(lambda a, b: jax.tree.map(jnp.add, a, b))

    def init(key, held):
        return Server(task.init(key), ())

    def memory(key, held):
        return {"last": jax.tree.map(jnp.zeros_like, task.init(key)), "visits": jnp.zeros((), jnp.int32)}

    def round(key, held, server, cohort):
        change, info = cohort.exchange(server.params, local, reduce)
        return Server(add(server.params, change), ()), info.metrics

    def predict(held, server, memory, x):
        return task.logits(held, server.params, x)

    return fedsim.Algorithm(init, round, predict, memory=memory)
"""
