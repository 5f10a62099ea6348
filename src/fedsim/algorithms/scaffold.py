"""SCAFFOLD (Karimireddy et al., arXiv 1910.06378), option II: clients correct their drift by control variates.

A client keeps a control c_i, the server their mean c. Each gradient is corrected by c - c_i, and after K steps

    c_i+ = c_i - c + (x - y_i) / (K lr),     x += mean(y_i - x),     c += |S| / N mean(c_i+ - c_i)

The means of the paper are uniform (`--weighting uniform`), and its clients take plain SGD steps (`--optimizer sgd`): with
another optimizer (x - y_i) / (K lr) is no gradient. Bytes: 2 P numbers, each way. docs/own_algorithm.md explains this file.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from optax.tree_utils import tree_add, tree_sub, tree_vdot, tree_zeros_like

from fedsim.algorithms.fed_avg import Server as Averaged
from fedsim.algorithms.fed_avg import descend
from fedsim.core import Algorithm, Client, Cohort, Metrics, Params, Task, Tree
from fedsim.folds import uniform
from fedsim.training.local import Fit, fit
from fedsim.wire import coded


class Sent(NamedTuple):
    """What the server sends, marked, and what a client reads: parameters by path."""

    params: Tree  # x
    control: Tree  # c


class Server(NamedTuple):
    """What the server keeps."""

    params: Params  # x
    control: Params  # c, the mean of the clients' controls c_i
    optimizer: Tree


def correction(params: Params, message: Sent, own: Params) -> Array:
    """A penalty whose gradient is c - c_i."""
    return jnp.asarray(tree_vdot(tree_sub(message.control, own), params))


def require_uniform(task: Task, algorithm: str) -> None:
    """Raises `ValueError` where the run's average weighs clients: the server's control is then no mean of theirs."""
    if task.weight is not uniform:
        raise ValueError(
            f"Expected weighting='examples' to be uniform for {algorithm}, whose server keeps the mean over all clients; give "
            "--weighting uniform."
        )


def scaffold(task: Task) -> Algorithm:
    """SCAFFOLD (Karimireddy et al., arXiv 1910.06378), option II; needs --weighting uniform, and --optimizer sgd to be right."""
    require_uniform(task, "scaffold")

    def reply(carry: Fit, message: Sent, client: Client) -> tuple[Tree, Params]:
        change = tree_sub(carry.params, message.params)
        distance = jnp.maximum(client.steps, 1).astype(jnp.float32) * carry.lr
        control = jax.tree.map(lambda c, d: -c - d / distance, message.control, change)  # c_i+ - c_i
        return coded((change, control)), carry.memory

    def sent(own: Params, reply: tuple[Params, Params], client: Client) -> Params:
        return tree_add(own, reply[1])  # as the server decoded it: else the sum of the c_i would drift away from c

    local = fit(
        task.loss, task.optimizer, task.lr, task.passes, penalty=correction,
        start=lambda message, own: message.params, reply=reply,
    )._replace(sent=sent)  # fmt: skip

    @jax.jit
    def update(server: Server, change: tuple[Params, Params], weight: Array, share: Array) -> Server:
        params, optimizer = descend(task.server_optimizer, Averaged(server.params, server.optimizer), change[0], weight)
        return Server(params, jax.tree.map(lambda c, d: c + share * d, server.control, change[1]), optimizer)

    def round(key: Array, held: Tree, server: Server, cohort: Cohort) -> tuple[Server, Metrics]:
        change, info = cohort.exchange(coded(Sent(server.params, server.control), change=False), local)
        return update(server, change, info.weight, info.weight / cohort.population), info.metrics

    def memory(key: Array, held: Tree) -> Params:
        return tree_zeros_like(task.init(key))

    def init(key: Array, held: Tree) -> Server:
        params = task.init(key)
        return Server(params, tree_zeros_like(params), task.server_optimizer.init(params))

    return Algorithm(init, round, lambda held, server, memory, x: task.logits(held, server.params, x), memory)
