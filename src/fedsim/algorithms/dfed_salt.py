"""DFedAlt and DFedSalt (Shi et al., arXiv 2305.15157, later DFedMDC and DFedSMDC): no server, personal heads, gossip.

Every client has a copy u_i of the shared part and a personal part v_i. In a round it trains v_i with u_i fixed, then u_i
with v_i fixed, which gives z_i, and hears its neighbours:

    u_i <- sum_j W_ij z_j        W: a graph's weights, rows that sum to one (`graphs.py`)

DFedSalt takes the gradient of the shared part where the loss is highest nearby (SAM): at u + rho g / ||g||, with one norm
over all shared leaves. v_i stays. Bytes: |u| numbers for each neighbour that hears, up; no server, so none down.
docs/algorithms/dfed_salt.md has the graphs, the options, and where this departs from the authors' code.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from optax.tree_utils import tree_norm

from fedsim.algorithms.graphs import Rule, check, of_round, rule
from fedsim.algorithms.parts import HEAD, Parts, divided, own_passes, pick, rate, start
from fedsim.core import Algorithm, Batch, Client, Cohort, Graph, Metrics, Params, Peers, Population, Reduce, Task, Tree
from fedsim.folds import uniform, weighted_sum
from fedsim.training.local import Fit, fit
from fedsim.wire import coded

TINY = 1e-12  # beside a norm that may be zero

Loss = Callable[[Tree, Params, Batch], tuple[Array, Metrics]]


class Looked(NamedTuple):
    """There is no server; this is what an observer sees of the peers."""

    params: Params  # the mean of the u_i


class Spread(NamedTuple):
    """What members heard, taken together."""

    mean: Params
    distance: Array  # (), float32: sqrt of the mean of ||u_i - mean||^2


def dfed_alt(
    task: Task, graph: str = "ring", weights: str = "uniform", neighbours: int = 10, offsets: Sequence[int] = (),
    personal: Sequence[str] = HEAD, personal_epochs: int = 1, personal_rate: float = 1.0,
) -> Algorithm:  # fmt: skip
    """DFedAlt (Shi et al., arXiv 2305.15157): no server; heads stay, bodies go from peer to peer on a graph.

    Args: as of `dfed_salt`.
    """
    parts = divided(task, personal, "dfed_alt")
    hears = rule(graph, weights, neighbours, offsets)
    return gossip(task, parts, over(hears), everybody(hears), 0.0, personal_epochs, personal_rate)


def dfed_salt(
    task: Task, rho: float = 0.05, graph: str = "ring", weights: str = "uniform", neighbours: int = 10,
    offsets: Sequence[int] = (), personal: Sequence[str] = HEAD, personal_epochs: int = 1, personal_rate: float = 1.0,
) -> Algorithm:  # fmt: skip
    """DFedSalt (Shi et al., arXiv 2305.15157): DFedAlt whose shared part is trained by sharpness-aware steps.

    Args:
        rho: how far the gradient is taken from where a client is; 0 is DFedAlt.
        graph: who hears whom: ring, grid, exponential, full, random, circulant, or a file of edges.
        weights: uniform, or metropolis, which makes the graph symmetric and its weights doubly stochastic.
        neighbours: of a random graph, whom each client draws in every round.
        offsets: of a circulant graph, so that i hears i + o for each of them.
        personal: patterns of the paths that stay with a client; () shares everything.
        personal_epochs: passes over its data for these.
        personal_rate: their learning rate, as a factor of the clients'.
    """
    if not 0 <= rho < float("inf"):
        raise ValueError(f"Expected rho={rho} >= 0, a distance; 0 is dfed_alt.")
    parts = divided(task, personal, "dfed_salt")
    hears = rule(graph, weights, neighbours, offsets)
    return gossip(task, parts, over(hears), everybody(hears), rho, personal_epochs, personal_rate)


def over(hears: Rule) -> Callable[[Cohort], tuple[Graph, float]]:
    """The graph of a round and its spectral gap, by its cohort."""
    return lambda cohort: of_round(hears, cohort.ids, cohort.rng("graph"))


def everybody(hears: Rule) -> Callable[[np.random.Generator, Tree, Population], np.ndarray]:
    """A `select` of all clients, who are peers on this graph; refuses one that does not fit them."""

    def select(rng: np.random.Generator, server: Tree, population: Population) -> np.ndarray:
        check(hears, population.size)
        return np.arange(population.size)

    return select


def gossip(
    task: Task,
    parts: Parts,
    hears: Callable[[Cohort], tuple[Graph, float]],
    select: Callable[[np.random.Generator, Tree, Population], np.ndarray],
    rho: float = 0.0,
    personal_epochs: int = 1,
    personal_rate: float = 1.0,
) -> Algorithm:
    """Peers that train their personal part, then the shared one, and mix the latter."""
    factor, passes = rate("personal_rate", personal_rate), own_passes(task, personal_epochs)

    def own(message: Tree, memory: Params) -> Params:
        return memory

    def keep(carry: Fit, message: Tree, client: Client) -> tuple[Tree, Params]:
        return (), carry.params

    def send(carry: Fit, message: Tree, client: Client) -> tuple[Tree, Params]:
        return coded(pick(carry.params, parts.shared), change=False), carry.params

    head = fit(
        task.loss, task.optimizer, lambda client, message: factor * task.lr(client, message), passes, start=own,
        trains=parts.personal, reply=keep,
    )  # fmt: skip
    loss = sharpness_aware(task.loss, rho, parts.shared)
    body = fit(loss, task.optimizer, task.lr, task.passes, start=own, trains=parts.shared, reply=send)
    look = spread()

    def into(memory: Params, heard: Params, client: Client) -> Params:
        return {**memory, **heard}

    def round(key: Array, held: Tree, server: Looked, cohort: Cohort) -> tuple[Looked, Metrics]:
        if parts.personal and personal_epochs:
            cohort.exchange((), head)
        graph, gap = hears(cohort)
        seen, info = cohort.exchange((), body, look, server.params, link=Peers(graph, into))
        mean = jax.tree.map(lambda n, o: jnp.where(info.weight > 0, n, o), seen.mean, server.params)
        looked: Metrics = {"consensus_distance": seen.distance, "spectral_gap": jnp.float32(gap)}
        return Looked(mean), {**info.metrics, **looked}

    def whole(server: Looked) -> Params:
        return {**start(task), **server.params}

    return Algorithm(
        init=lambda key, held: Looked(pick(task.init(key), parts.shared)),
        round=round,
        predict=lambda held, server, memory, x: task.logits(held, memory or whole(server), x),
        memory=lambda key, held: start(task),
        select=select,
        setup=lambda held: (held, start(task)),
        params=whole,
        answers="client",
    )


def sharpness_aware(loss: Loss, rho: float, paths: Sequence[str]) -> Loss:
    """A loss whose gradient by these leaves is the loss's at u + rho g / ||g||, g its gradient at u on the same batch (SAM,
    Foret et al., arXiv 2010.01412). Its metrics are those at u. One norm over all these leaves; a norm of 0 moves nothing.
    """
    if rho == 0:
        return loss

    def adverse(held: Tree, params: Params, batch: Batch) -> tuple[Array, Metrics]:
        here = jax.lax.stop_gradient(params)
        slope = jax.grad(lambda u: loss(held, {**here, **u}, batch), has_aux=True)
        grads, metrics = slope(pick(here, paths))
        scale = rho / (jnp.asarray(tree_norm(grads)) + TINY)
        worst = {path: params[path] + jax.lax.stop_gradient(scale * g) for path, g in grads.items()}
        return loss(held, {**params, **worst}, batch)[0], metrics

    return adverse


def spread() -> Reduce:
    """The mean of what members heard and their distance from it, as sums of differences from `args`, a point nearby: squares
    of the parameters themselves would drown the distance in rounding. Only one total is ever held.
    """

    def zero(reply: Params, members: int) -> tuple[Params, Array, Array]:
        nothing = jnp.zeros((), jnp.float32)
        return {path: jnp.zeros(leaf.shape, leaf.dtype) for path, leaf in reply.items()}, nothing, nothing

    def add(
        total: tuple[Params, Array, Array], replies: Params, weights: Array, slots: Array, args: Params
    ) -> tuple[Params, Array, Array]:
        sums, squares, weight = total
        moved = {path: leaf - args[path] for path, leaf in replies.items()}
        sums = {path: sums[path] + weighted_sum(weights, leaf) for path, leaf in moved.items()}
        each = [weighted_sum(weights, jnp.square(leaf).reshape(leaf.shape[0], -1)).sum() for leaf in moved.values()]
        return sums, squares + sum(each, jnp.zeros((), jnp.float32)), weight + weights.sum()

    def done(total: tuple[Params, Array, Array], args: Params, key: Array) -> Spread:
        sums, squares, weight = total
        scale = jnp.where(weight > 0, 1 / jnp.where(weight > 0, weight, 1.0), 0.0)
        moved = jax.tree.map(lambda s: s * scale, sums)
        length = jnp.asarray(tree_norm(moved, squared=True)) if moved else jnp.zeros(())
        mean = {path: args[path] + leaf for path, leaf in moved.items()}
        return Spread(mean, jnp.sqrt(jnp.maximum(squares * scale - length, 0.0)))

    return Reduce(zero, add, done, uniform)
