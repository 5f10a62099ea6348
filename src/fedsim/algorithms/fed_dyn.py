"""FedDyn (Acar et al., arXiv 2111.04263): clients' losses are shifted so that their optima are the server's.

A client keeps g_k, the gradient of its loss where it came to rest, and minimises

    F_k(w) - <g_k, w> + alpha/2 |w - w_t|^2,     then     g_k <- g_k - alpha (w_k - w_t)

The server keeps h, which is the mean of all N g_k:  h <- h - alpha/N sum_S (w_k - w_t),  w_t+1 = mean_S w_k - h / alpha.
The means are uniform (`--weighting uniform`). Bytes: those of FedAvg, as g_k and h follow from what travels anyway.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from optax.tree_utils import tree_vdot, tree_zeros_like

from fedsim.algorithms.fed_avg import Server as Averaged
from fedsim.algorithms.fed_avg import descend
from fedsim.algorithms.scaffold import require_uniform
from fedsim.core import Algorithm, Client, Cohort, Metrics, Params, Task, Tree
from fedsim.training.local import fit, proximal
from fedsim.wire import coded


class Server(NamedTuple):
    """What the server keeps."""

    params: Params
    gradient: Params  # h, the mean of the clients' g_k
    optimizer: Tree


def fed_dyn(task: Task, alpha: float = 0.01) -> Algorithm:
    """FedDyn (Acar et al., arXiv 2111.04263): each client's loss is shifted by what it has learned; needs --weighting uniform.

    Args:
        alpha: strength of the pull to the server's model; a smaller one takes longer steps.
    """
    require_uniform(task, "fed_dyn")
    if not 0 < alpha < float("inf"):
        raise ValueError(f"Expected alpha={alpha} > 0, the pull to the server's model; for none take fed_avg.")
    pull = proximal(alpha)

    def shifted(params: Params, message: Params, own: Params) -> Array:
        return pull(params, message, own) - jnp.asarray(tree_vdot(own, params))

    def sent(own: Params, change: Params, client: Client) -> Params:
        return jax.tree.map(
            lambda g, d: g - alpha * d, own, change
        )  # as the server decoded it, which keeps h their mean

    local = fit(task.loss, task.optimizer, task.lr, task.passes, penalty=shifted)._replace(sent=sent)

    @jax.jit
    def update(server: Server, change: Params, weight: Array, share: Array) -> Server:
        gradient = jax.tree.map(lambda h, d: h - alpha * share * d, server.gradient, change)
        step = jax.tree.map(lambda d, h: d - h / alpha, change, gradient)
        params, optimizer = descend(task.server_optimizer, Averaged(server.params, server.optimizer), step, weight)
        return Server(params, gradient, optimizer)

    def round(key: Array, held: Tree, server: Server, cohort: Cohort) -> tuple[Server, Metrics]:
        change, info = cohort.exchange(coded(server.params, change=False), local)
        return update(server, change, info.weight, info.weight / cohort.population), info.metrics

    def memory(key: Array, held: Tree) -> Params:
        return tree_zeros_like(task.init(key))

    def init(key: Array, held: Tree) -> Server:
        params = task.init(key)
        return Server(params, tree_zeros_like(params), task.server_optimizer.init(params))

    return Algorithm(init, round, lambda held, server, memory, x: task.logits(held, server.params, x), memory)
