"""FedProto (Tan et al., arXiv 2105.00243): clients train models of their own, and pull features to the mean prototypes.

C_i^j is the mean feature f of client i's examples of class j. A round:

    1. clients send C_i;  server: Cbar^j = mean of C_i^j over the clients that have class j
    2. server sends Cbar; clients minimise l(w; x, y) + lam |f(x) - Cbar^y|^2 / d over all of their model, head included

A client answers by the nearest Cbar^j of the classes that it has, as the authors' code does, or by its head. Bytes: 4 d a class, each
way, and a bit for each class.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from fedsim.algorithms.parts import start
from fedsim.algorithms.prototypes import (
    block,
    collecting,
    flags,
    means,
    nearest,
    sent,
    side_by_side,
    unpacked,
    width,
)
from fedsim.config import one_of
from fedsim.core import Algorithm, Batch, Client, Cohort, Metrics, Params, Task, Tree
from fedsim.training.local import Fit, fit


class Own(NamedTuple):
    """What a client keeps."""

    params: Params
    mean: Array  # (C, d): the prototypes that it was sent
    known: Array  # (C,), bool: of which classes
    has: Array  # (C,), bool: classes of its own


class Server(NamedTuple):
    """What the server keeps; the parameters are the first ones, which clients start from."""

    params: Params
    mean: Array  # (C, d)
    known: Array  # (C,), bool


def fed_proto(task: Task, lam: float = 1.0, answer: str = "prototypes") -> Algorithm:
    """FedProto (Tan et al., arXiv 2105.00243): clients train models of their own, and pull features to the mean prototypes.

    Args:
        lam: strength of the pull; 0 is training alone.
        answer: by the nearest of the "prototypes" that a client was sent, or by its own "head".

    Raises:
        ValueError: options out of range, a model without features.
    """
    if isinstance(lam, bool) or not isinstance(lam, (int, float)) or not 0 <= lam < math.inf:
        raise ValueError(f"Expected lam={lam!r} >= 0; 0 is training alone.")
    one_of(("prototypes", "head"), answer=answer)
    block(task, "fed_proto")  # refuses
    features = task.features
    assert features is not None

    def empty() -> tuple[Array, Array]:
        return jnp.zeros((task.classes, width(task))), jnp.zeros(task.classes, bool)

    def loss(both: tuple[Tree, Tree], params: Params, batch: Batch) -> tuple[Array, Metrics]:
        held, heard = both
        value, metrics = task.loss(held, params, batch)
        f = features(held, params, task.augment(batch.key, batch.x))  # (B, d), those of the loss
        apart = jnp.mean((f - heard["prototypes"][batch.y]) ** 2, axis=1)
        rows = jnp.where(flags(heard["has"], task.classes)[batch.y], batch.mask, 0.0)
        return value + lam * (apart * rows).sum() / jnp.maximum(batch.mask.sum(), 1), metrics

    def keep(carry: Fit, message: Tree, client: Client) -> tuple[Tree, Own]:
        known = flags(message["has"], task.classes)
        return (), client.memory._replace(params=carry.params, mean=message["prototypes"], known=known)

    gather = collecting(task, features, lambda prototypes, has, own: (sent(prototypes, has), own._replace(has=has)))
    train = fit(
        loss, task.optimizer, task.lr, task.passes, view=lambda held, message, memory: (held, message),
        start=lambda message, memory: memory.params, reply=keep,
    )  # fmt: skip
    fold = side_by_side()

    @jax.jit
    def taken(stacked: Tree, server: Server) -> Server:
        mean, known = means(*unpacked(stacked, task.classes))
        return jax.tree.map(lambda n, o: jnp.where(known.any(), n, o), Server(server.params, mean, known), server)

    def round(key: Array, held: Tree, server: Server, cohort: Cohort) -> tuple[Server, Metrics]:
        stacked, _ = cohort.exchange((), gather, fold)
        server = taken(stacked, server)
        _, info = cohort.exchange(sent(server.mean, server.known), train, fold)
        return server, info.metrics

    def predict(held: Tree, server: Server, memory: Any, x: Tree) -> Array:
        params, mean, known, has = memory or Own(server.params, server.mean, server.known, server.known)
        if answer == "head":
            return task.logits(held, params, x)
        return nearest(features(held, params, x), mean, known & has, 0.5 * width(task))

    return Algorithm(
        init=lambda key, held: Server(task.init(key), *empty()),
        round=round,
        predict=predict,
        memory=lambda key, held: Own(start(task), *empty(), empty()[1]),
        setup=lambda held: (held, start(task)),
        answers="client",
        plain_steps=False,
    )
