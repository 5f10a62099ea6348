"""FedAvg (McMahan et al., arXiv 1602.05629, algorithm 1) with any server optimizer (Reddi et al., arXiv 2003.00295).

The server sends the trained part w; every client of the cohort trains it on its own data and replies with its change;
the server takes the weighted mean of the changes as a pseudo-gradient. With the server's default, SGD of rate 1, the new
w is the weighted mean of the clients' parameters. FedPEFT (arXiv 2210.01708) is this algorithm on a small trained part.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from fedsim.core import Algorithm, Cohort, Local, Metrics, Params, Task, Tree
from fedsim.training.local import Penalty, fit, proximal, stepped
from fedsim.wire import coded


class Server(NamedTuple):
    """What the server keeps."""

    params: Params
    optimizer: Tree


def fed_avg(task: Task, penalty: Penalty | None = None) -> Algorithm:
    """FedAvg on `task`; `penalty` turns it into a relative such as FedProx."""
    if penalty is not None and not callable(penalty):
        raise ValueError(
            f"Expected penalty={penalty!r} to be a function (params, message, memory) -> scalar, which only Python can "
            "give; take fed_prox(mu=0.1), or write a constructor in a file of your own."
        )
    return averaging(task, fit(task.loss, task.optimizer, task.lr, task.passes, penalty=penalty))


def averaging(task: Task, local: Local) -> Algorithm:
    """FedAvg of what clients do: `local` gets the server's parameters, and replies with their change."""

    def init(key: Array, held: Tree) -> Server:
        params = task.init(key)
        return Server(params, task.server_optimizer.init(params))

    update = jax.jit(partial(descend, task.server_optimizer))

    def round(key: Array, held: Tree, server: Server, cohort: Cohort) -> tuple[Server, Metrics]:
        change, info = cohort.exchange(coded(server.params, change=False), local)
        return update(server, change, info.weight), info.metrics

    return Algorithm(init, round, lambda held, server, memory, x: task.logits(held, server.params, x))


def descend(optimizer: optax.GradientTransformation, server: Server, change: Params, weight: Array) -> Server:
    """One step of the server's optimizer along the mean change; a total weight of zero changes nothing, momentum included."""
    params, state = stepped(optimizer, jax.tree.map(jnp.negative, change), server.optimizer, server.params)
    return jax.tree.map(lambda n, o: jnp.where(weight > 0, n, o), Server(params, state), server)


def fed_prox(task: Task, mu: float = 0.1) -> Algorithm:
    """FedProx (Li et al., arXiv 1812.06127): FedAvg with mu/2 |w - w0|^2 added to every client's loss."""
    if isinstance(mu, bool) or not isinstance(mu, (int, float)) or not 0 <= mu < float("inf"):
        raise ValueError(f"Expected mu={mu!r} >= 0; 0 is FedAvg.")
    return fed_avg(task, penalty=proximal(mu))
