"""Training on a client: plain minibatch descent, from which most algorithms differ by one penalty."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from fedsim import wire
from fedsim.core import Batch, Client, Local, Metrics, Params, Passes, Tree

Penalty = Callable[[Params, Tree, Tree], Array]  # (params, message, memory) -> (), added to every batch's loss


class Fit(NamedTuple):
    """A client in training."""

    params: Params
    optimizer: Tree
    lr: Array  # (), float32
    memory: Tree


def fit(
    loss: Callable[[Tree, Params, Batch], tuple[Array, Metrics]],
    optimizer: Callable[[Array], optax.GradientTransformation],
    lr: Callable[[Client, Tree], Array],
    passes: Passes,
    *,
    penalty: Penalty | None = None,
    view: Callable[[Tree, Tree, Tree], Tree] = lambda held, message, memory: held,
    start: Callable[[Tree, Tree], Params] = lambda message, memory: message,
    reply: Callable[[Fit, Tree, Client], tuple[Tree, Tree]] | None = None,
    state: Callable[[Tree, Tree], Tree] | None = None,
    trains: Collection[str] | None = None,
) -> Local:
    """A `Local` that minimises `loss` (+ `penalty`) by minibatch steps and replies with what changed.

    Args:
        optimizer: learning rate -> optax transformation; the rate is data, so a schedule recompiles nothing.
        lr: (client, message) -> its learning rate in this exchange; a stage's own travels in the message.
        penalty: a differentiable scalar of (params, message, memory); FedProx is `proximal(mu)`.
        view: (held, message, memory) -> the frozen part to train over, where message or memory have values of some of it.
        start: (message, memory) -> the parameters to start from; default: the message is the parameters.
        reply: (the client after its last step, message, client) -> reply, memory; default: params - start, marked as a
            change (`wire.coded`), and the memory as it was.
        state: (the optimizer's fresh state, memory) -> the one to begin with, for clients whose optimizer goes on.
        trains: paths of what moves; all else stays bit for bit, and no gradient of it is computed. Default: everything.
    """

    def moving(params: Params) -> Params:
        return params if trains is None else {path: leaf for path, leaf in params.items() if path in trains}

    def total(
        moves: Params, params: Params, held: Tree, message: Tree, memory: Tree, batch: Batch
    ) -> tuple[Array, Metrics]:
        params = {**params, **moves}
        value, metrics = loss(view(held, message, memory), params, batch)
        return (value if penalty is None else value + penalty(params, message, memory)), metrics

    def start_(held: Tree, message: Tree, client: Client, batch: Batch) -> Fit:
        rate = lr(client, message)
        params = start(message, client.memory)
        fresh = optimizer(rate).init(moving(params))
        return Fit(params, fresh if state is None else state(fresh, client.memory), rate, client.memory)

    def step(held: Tree, message: Tree, carry: Fit, batch: Batch) -> tuple[Fit, Metrics]:
        moves = moving(carry.params)
        grads, metrics = jax.grad(total, has_aux=True)(moves, carry.params, held, message, carry.memory, batch)
        moved, after = stepped(optimizer(carry.lr), grads, carry.optimizer, moves)
        return carry._replace(params={**carry.params, **moved}, optimizer=after), metrics

    def finish(held: Tree, message: Tree, carry: Fit, client: Client) -> tuple[Tree, Tree, Metrics]:
        if reply is not None:
            return *reply(carry, message, client), {}
        change = jax.tree.map(jnp.subtract, carry.params, start(message, client.memory))
        return wire.coded(change), client.memory, {}

    return Local(start_, step, finish, passes)


def stepped(optimizer: optax.GradientTransformation, grads: Params, state: Tree, params: Params) -> tuple[Params, Tree]:
    """Parameters and state after one step of an optimizer."""
    with jax.numpy_dtype_promotion("standard"):  # optax mixes Python scalars and float32 in ways strict mode refuses
        updates, state = optimizer.update(grads, state, params)
        moved: Any = optax.apply_updates(params, updates)
    return moved, state


def proximal(mu: float) -> Penalty:
    """FedProx' pull to the start of the round, mu/2 |w - w0|^2 (Li et al., arXiv 1812.06127, eq. 2)."""

    def penalty(params: Params, message: Tree, memory: Tree) -> Array:
        squares = jax.tree.map(lambda w, w0: jnp.sum((w - w0) ** 2), params, message)
        return 0.5 * mu * jax.tree.reduce(jnp.add, squares)

    return penalty
