"""FedKSeed (Qin et al., arXiv 2312.06353): clients and server exchange numbers for K random directions, never parameters.

    w = w_0 + sum_j a_j z_j,     z_j normal, drawn from seed j of K that both sides know

A client rebuilds w from a (K,), and descends one direction a step, by two evaluations of the loss and no gradient:

    g = (l(w + eps z_j) - l(w - eps z_j)) / (2 eps),     w -= lr g z_j,     c_j -= lr g,     j drawn from K
    a += sum_k p_k c_k

As w is linear in a, the new w is the weighted mean of the clients' parameters, as in FedAvg. Bytes: 4 K down; up 8 for each
seed that was drawn (its number and its c), or 4 K. w_0 is part of the setup.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from fedsim.algorithms.fed_avg import Server as Averaged
from fedsim.algorithms.fed_avg import descend
from fedsim.algorithms.parts import start
from fedsim.config import one_of
from fedsim.core import Algorithm, Batch, Client, Cohort, Local, Metrics, Params, Reduce, Task, Tree
from fedsim.engine.keys import key_for
from fedsim.folds import mean
from fedsim.training.local import stepped
from fedsim.wire import Packet, coded, kept


class Server(NamedTuple):
    """What the server keeps."""

    params: Params  # w, rebuilt once a round
    start: Params  # w_0
    numbers: Averaged  # a (K,), and the state of the server's optimizer, which moves it


class Walk(NamedTuple):
    """A client on its way."""

    params: Params
    moved: Array  # c (K,), float32
    drawn: Array  # (K,), bool
    lr: Array  # (), float32


def fed_kseed(task: Task, seeds: int = 4096, epsilon: float = 1e-3, sends: str = "pairs", pool: int = 0) -> Algorithm:
    """FedKSeed (Qin et al., arXiv 2312.06353): zeroth-order steps along K random directions, whose numbers alone travel.

    Args:
        seeds: K; rebuilding w draws as many times the parameters, at the server and at every client, once a round.
        epsilon: how far from w the loss is evaluated, in both directions.
        sends: "pairs" of 4 + 4 bytes for the seeds that a client drew, or the "sums" of all K, which privacy needs.
        pool: what the K seeds are made from; a run of another pool walks along others.

    Raises:
        ValueError: options out of range, an optimizer of the clients' other than plain SGD.
    """
    check(task, seeds, epsilon, pool)
    one_of(("pairs", "sums"), sends=sends)

    def loss(held: Tree, walk: Walk, z: Params, far: float, batch: Batch) -> tuple[Array, Metrics]:
        return task.loss(held, along(walk.params, jnp.float32(far), z), batch)

    def begin(held: Tree, message: Tree, client: Client, batch: Batch) -> Walk:
        params = rebuilt(message["start"], message["numbers"], pool)
        return Walk(params, jnp.zeros(seeds), jnp.zeros(seeds, bool), task.lr(client, message))

    def step(held: Tree, message: Tree, walk: Walk, batch: Batch) -> tuple[Walk, Metrics]:
        seed = jax.random.randint(key_for(batch.key, "seed"), (), 0, seeds)
        z = direction(seed, walk.params, pool)
        (ahead, metrics), (behind, others) = (loss(held, walk, z, far, batch) for far in (epsilon, -epsilon))
        move = -walk.lr * (ahead - behind) / (2 * epsilon)
        params, moved = along(walk.params, move, z), walk.moved.at[seed].add(move)
        metrics = jax.tree.map(lambda a, b: (a + b) / 2, metrics, others)
        return Walk(params, moved, walk.drawn.at[seed].set(True), walk.lr), metrics

    def finish(held: Tree, message: Tree, walk: Walk, client: Client) -> tuple[Tree, Tree, Metrics]:
        if sends == "sums":
            return coded({"numbers": walk.moved}), client.memory, {}
        which = kept(jnp.arange(seeds, dtype=jnp.uint32), walk.drawn)
        return {"numbers": coded(kept(walk.moved, walk.drawn)), "seeds": which}, client.memory, {}

    local = Local(begin, step, finish, task.passes)
    fold = of_pairs(task) if sends == "pairs" else None

    @jax.jit
    def update(server: Server, change: Params, weight: Array) -> Server:
        numbers = descend(task.server_optimizer, server.numbers, change, weight)
        return Server(rebuilt(server.start, numbers.params["numbers"], pool), server.start, numbers)

    def init(key: Array, held: Tree) -> Server:
        first, numbers = task.init(key), {"numbers": jnp.zeros(seeds)}
        return Server(first, first, Averaged(numbers, task.server_optimizer.init(numbers)))

    def round(key: Array, held: Tree, server: Server, cohort: Cohort) -> tuple[Server, Metrics]:
        nothing = jnp.zeros(len(cohort.ids), jnp.uint32)  # w_0 lies with the clients since the setup
        known = {path: Packet(leaf, nothing) for path, leaf in server.start.items()}
        message = {"numbers": coded(server.numbers.params["numbers"], change=False), "start": known}
        change, info = cohort.exchange(message, local, fold)
        return update(server, change, info.weight), info.metrics

    return Algorithm(
        init=init,
        round=round,
        predict=lambda held, server, memory, x: task.logits(held, server.params, x),
        setup=lambda held: (held, start(task)),
        plain_steps=False,
    )


def check(task: Task, seeds: int, epsilon: float, pool: int) -> None:
    """Raises `ValueError` for options out of range, and where a step of the clients' optimizer is not - lr times a gradient."""
    if isinstance(seeds, bool) or not isinstance(seeds, int) or not 1 <= seeds <= 2**31 - 1:
        raise ValueError(f"Expected 1 <= seeds={seeds!r} <= 2**31 - 1, the number of directions; give seeds=4096.")
    if isinstance(pool, bool) or not isinstance(pool, int) or not 0 <= pool <= 2**31 - 1:
        raise ValueError(f"Expected 0 <= pool={pool!r} <= 2**31 - 1, what the seeds are made from; give pool=0.")
    if isinstance(epsilon, bool) or not isinstance(epsilon, (int, float)) or not 0 < epsilon < math.inf:
        raise ValueError(f"Expected epsilon={epsilon!r} > 0, a length in parameters; give epsilon=1e-3.")
    if not plain(task.optimizer):
        raise ValueError(
            "Expected clients to take plain SGD steps for algorithm='fed_kseed', as only one direction's number changes in a "
            "step; give --optimizer sgd, without momentum, decay or clipping."
        )


def plain(rule: Callable[[Array], optax.GradientTransformation]) -> bool:
    """Whether two steps of an optimizer are - lr times the gradient each, whatever it is."""
    with jax.ensure_compile_time_eval():  # an algorithm may be made in a traced program, which prices it
        w, slope = {"w": jnp.asarray([2.0, -1.0])}, {"w": jnp.asarray([30.0, 0.5])}
        optimizer = rule(jnp.float32(0.5))
        once, state = stepped(optimizer, slope, optimizer.init(w), w)
        twice, _ = stepped(optimizer, slope, state, once)
        ends = [np.allclose(found["w"], w["w"] - n * 0.5 * slope["w"]) for n, found in ((1, once), (2, twice))]
    return all(ends)


def direction(seed: Array, shapes: Params, pool: int) -> Params:
    """z of a seed: standard normal numbers, shaped as these leaves."""
    key = jax.random.fold_in(jax.random.key(pool), seed)
    return {
        path: jax.random.normal(jax.random.fold_in(key, number), shapes[path].shape)
        for number, path in enumerate(sorted(shapes))
    }


def along(params: Params, far: Array, z: Params) -> Params:
    """w + far z."""
    return {path: leaf + far * z[path] for path, leaf in params.items()}


def rebuilt(first: Params, numbers: Array, pool: int) -> Params:
    """w = w_0 + sum_j a_j z_j, in the order of j; directions whose number is zero are not drawn."""
    where = jnp.nonzero(numbers, size=numbers.shape[0], fill_value=0)[0]

    def add(place: Array, params: Params) -> Params:
        seed = where[place]
        return along(params, numbers[seed], direction(seed, params, pool))

    return jax.lax.fori_loop(0, jnp.count_nonzero(numbers), add, first)


def of_pairs(task: Task) -> Reduce:
    """The weighted mean of what was sent for each seed, zero by those who did not draw it; a fold of the numbers alone."""
    fold = mean(task.weight)

    def picked(reply: Tree) -> Tree:
        return {"numbers": reply["numbers"]}

    return Reduce(
        zero=lambda reply, clients: fold.zero(picked(reply), clients),
        add=lambda total, replies, *rest: fold.add(total, picked(replies), *rest),
        done=lambda *given: fold.done(*given),
        weight=fold.weight,
    )
