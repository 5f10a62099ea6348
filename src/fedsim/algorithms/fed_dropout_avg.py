"""FedDropoutAvg (Gunesli et al., arXiv 2111.13230): every client sends some entries of its model, drawn by lot.

Each entry is averaged over the clients that sent it, and one that nobody sent stays as it is:

    w_i += sum_k n_k m_ki (w_ki - w_i) / sum_k n_k m_ki,     m_ki = 1 with chance 1 - rate

In the paper clients send all parameters and the server drops some of each; here the client drops them, which gives the same
w and saves their bytes: otherwise it would be no rival in bytes. Which entries they are follows from a seed of 8 bytes that
goes with them. Down goes w as it is; the paper's dropout of clients is --clients-per-round.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from fedsim.algorithms.fed_avg import Server, descend
from fedsim.core import Algorithm, Client, Cohort, Metrics, Params, Reduce, Task, Tree
from fedsim.folds import weighted_sum
from fedsim.training.local import Fit, fit
from fedsim.wire import coded, kept


def fed_dropout_avg(task: Task, rate: float = 0.3) -> Algorithm:
    """FedDropoutAvg (Gunesli et al., arXiv 2111.13230): entries drawn by lot, each averaged over those who sent it.

    Args:
        rate: an entry's chance of being left out.

    Raises:
        ValueError: a rate out of range.
    """
    if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not 0 <= rate < 1:
        raise ValueError(f"Expected 0 <= rate={rate!r} < 1, an entry's chance of being left out; give rate=0.3.")

    def reply(carry: Fit, message: Params, client: Client) -> tuple[Tree, Tree]:
        seed = jax.random.key_data(jax.random.fold_in(client.key, 1))
        sent, change = masks(seed, message, rate), jax.tree.map(jnp.subtract, carry.params, message)
        part = {path: kept(leaf, sent[path]) for path, leaf in change.items()}
        return {"change": coded(part), "seed": seed}, client.memory

    local = fit(task.loss, task.optimizer, task.lr, task.passes, reply=reply)
    fold = mean_of_sent(task, rate)

    @jax.jit
    def update(server: Server, sums: Params, sent: Params, weight: Array) -> Server:
        change = {
            path: jnp.where(sent[path] > 0, total / jnp.maximum(sent[path], 1e-30), 0.0) for path, total in sums.items()
        }
        return descend(task.server_optimizer, server, change, weight)

    def init(key: Array, held: Tree) -> Server:
        params = task.init(key)
        return Server(params, task.server_optimizer.init(params))

    def round(key: Array, held: Tree, server: Server, cohort: Cohort) -> tuple[Server, Metrics]:
        (sums, sent), info = cohort.exchange(coded(server.params, change=False), local, fold)
        return update(server, sums, sent, info.weight), info.metrics

    return Algorithm(init, round, lambda held, server, memory, x: task.logits(held, server.params, x))


def masks(seed: Array, shapes: Mapping[str, Any], rate: float) -> dict[str, Array]:
    """Which entries are sent, by leaf, bool, of a seed (2,) uint32."""
    key = jax.random.wrap_key_data(seed)
    return {
        path: jax.random.bernoulli(jax.random.fold_in(key, number), 1 - rate, shapes[path].shape)
        for number, path in enumerate(sorted(shapes))
    }


def mean_of_sent(task: Task, rate: float) -> Reduce:
    """A fold of (sums of weighted changes, sums of the weights of those who sent an entry), by leaf."""

    def zero(reply: Tree, clients: int) -> Tree:
        blank = {path: jnp.zeros(leaf.shape, leaf.dtype) for path, leaf in reply["change"].items()}
        return blank, blank

    def add(total: Tree, replies: Tree, weights: Array, slots: Array, args: Tree) -> Tree:
        sent = jax.vmap(lambda seed: masks(seed, total[0], rate))(replies["seed"])
        sums = {path: total[0][path] + weighted_sum(weights, leaf) for path, leaf in replies["change"].items()}
        whole = {path: total[1][path] + weighted_sum(weights, mask.astype(jnp.float32)) for path, mask in sent.items()}
        return sums, whole

    return Reduce(zero, add, lambda total, args, key: total, task.weight)
