"""An algorithm of one's own: FedAvg whose server keeps momentum (FedAvgM, Hsu et al., arXiv 1909.06335).

Command:  fedsim check experiments/own_algorithm.py:fed_mine
          fedsim run --algorithm "experiments/own_algorithm.py:fed_mine(beta=0.5)"
It asks for nothing but `Task`; what it does not use of it (here: server_optimizer) has no effect."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from fedsim.core import Algorithm, Cohort, Metrics, Params, Task, Tree
from fedsim.training.local import fit
from fedsim.wire import coded


class Server(NamedTuple):
    params: Params
    velocity: Params


def fed_mine(task: Task, beta: float = 0.5) -> Algorithm:
    local = fit(task.loss, task.optimizer, task.lr, task.passes)

    @jax.jit
    def update(server: Server, change: Params, weight: Array) -> Server:
        velocity = jax.tree.map(lambda v, c: beta * v + c, server.velocity, change)
        new = Server(jax.tree.map(jnp.add, server.params, velocity), velocity)
        return jax.tree.map(lambda n, o: jnp.where(weight > 0, n, o), new, server)  # nobody reported: nothing moves

    def round(key: Array, held: Tree, server: Server, cohort: Cohort) -> tuple[Server, Metrics]:
        change, info = cohort.exchange(coded(server.params, change=False), local)
        return update(server, change, info.weight), info.metrics

    def init(key: Array, held: Tree) -> Server:
        return Server(task.init(key), jax.tree.map(jnp.zeros_like, task.init(key)))

    return Algorithm(init, round, lambda held, server, memory, x: task.logits(held, server.params, x))
