"""FedPCL (Tan et al., arXiv 2209.10083): clients fuse frozen encoders, and only class prototypes travel.

r(x) are the outputs of frozen encoders, one behind the other; z(x) = relu(W r(x) + c) / |.|. Every client i trains its own
(W_i, c_i), which never leave it; C_i^j is the mean of z over its examples of class j. A round:

    1. clients send C_i;  server: Cbar^j = mean of C_i^j over the clients that have class j
    2. server sends all C_p and Cbar; with s(a, b) = a.b / tau clients minimise L_g + L_p,
           L_g = -log( exp s(z, Cbar^y) / sum_y' exp s(z, Cbar^y') ),    L_p = mean_p of the same with C_p
    3. clients compute C_i anew, from what they have trained; they answer by the nearest of these

C_p^j of a class that p has not got is Cbar^j. The authors' code has another loss (`code_loss`). A backbone that fuses encoders is
`fused('vit_s14', 'vit_s14 mean')`, with `--peft last_k`; any other whose trained part is more than its head will do.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from fedsim.algorithms.fed_avg import Server as Averaged
from fedsim.algorithms.fed_avg import descend
from fedsim.algorithms.parts import pick
from fedsim.algorithms.prototypes import (
    Own,
    block,
    collecting,
    first,
    flags,
    means,
    nearest,
    nothing,
    sent,
    side_by_side,
    unit,
    unpacked,
    width,
)
from fedsim.config import one_of
from fedsim.core import Algorithm, Batch, Client, Cohort, Local, Metrics, Params, Task, Tree
from fedsim.training.local import Fit, fit
from fedsim.wire import coded

NEVER = -1e9  # the score of a class that does not compete
TOGETHER = 8  # clients' sets whose terms of the code's loss are computed at once


class Bank(NamedTuple):
    """The prototypes that a client trains against."""

    sets: Array  # (m, C, d), by client; m = 0 for none
    has: Array  # (m, C), bool
    mean: Array  # (C, d)
    known: Array  # (C,), bool: whether anybody has the class


class Server(NamedTuple):
    """What the server keeps. Its parameters are the first ones, which clients start from, but under loss="ce"."""

    params: Params
    optimizer: Tree
    mean: Array  # (C, d)
    known: Array  # (C,), bool


def fed_pcl(
    task: Task,
    tau: float = 0.07,
    loss: str = "paper",
    bank: str = "all",
    include_positive: bool = True,
    most: int | None = None,
) -> Algorithm:
    """FedPCL (Tan et al., arXiv 2209.10083): clients fuse frozen encoders, and only class prototypes travel.

    Args:
        tau: temperature of the similarities.
        loss: the "paper" form, that of the authors' "code", or "ce": cross-entropy, and parameters in the place of prototypes,
            which is FedAvg of the same trained part.
        bank: what goes down, "all" clients' prototypes with their mean, or the mean alone, "global_only".
        include_positive: whether the paper's denominators have the own class in them.
        most: clients whose sets go down, drawn anew in every round; default: all.

    Raises:
        ValueError: numbers out of range, words that are none, options that do not go together, a model without features.
    """
    one_of(("paper", "code", "ce"), loss=loss)
    one_of(("all", "global_only"), bank=bank)
    if isinstance(tau, bool) or not isinstance(tau, (int, float)) or not 0 < tau < math.inf:
        raise ValueError(f"Expected tau={tau!r} > 0, a temperature; leave it out.")
    if most is not None and (isinstance(most, bool) or not isinstance(most, int) or most < 1):
        raise ValueError(f"Expected most={most!r} >= 1, a number of clients; leave it out for all.")
    if most is not None and bank == "global_only":
        raise ValueError(
            f"Expected most={most} to be unset with bank={bank!r}, which sends no client's set; leave it out."
        )
    if not include_positive and loss != "paper":
        raise ValueError(f"Expected include_positive=True with loss={loss!r}; only loss='paper' has it as an option.")
    return Contrastive(task, tau, loss, bank, include_positive, most).algorithm()


def entropy(scores: Array, y: Array, known: Array, positive: bool) -> Array:
    """-log( exp s_y / sum_y' exp s_y' ) over the known classes, (B,); 0 where no class competes with y.

    Args:
        scores: (B, C).
        y: (B,).
        positive: whether the sum has y in it.
    """
    own = jnp.arange(scores.shape[-1]) == y[:, None]  # (B, C)
    rivals = known & ~own
    below = jax.nn.logsumexp(jnp.where(known if positive else rivals, scores, NEVER), axis=-1)
    value = below - jnp.sum(jnp.where(own, scores, 0.0), axis=-1)
    return jnp.where(rivals.any(axis=-1), value, 0.0)


def counting(y: Array, mask: Array, known: Array) -> Array:
    """Which rows of a batch count, (B,): real ones whose class anybody has."""
    return jnp.where(known[y], mask, 0.0)


def complete(bank: Bank) -> Array:
    """All clients' prototypes (m, C, d), the mean's where a client has none of a class."""
    return jnp.where(bank.has[..., None], bank.sets, bank.mean)


def paper_loss(z: Array, y: Array, mask: Array, bank: Bank, tau: float, include_positive: bool) -> Array:
    """L_g + L_p of a batch, (); L_p is 0 without sets, and a client of which nothing came does not count.

    Args:
        z: (B, d).
        y, mask: (B,).
    """
    rows = counting(y, mask, bank.known)

    def of(prototypes: Array) -> Array:  # (C, d) -> ()
        each = entropy(similar(z, prototypes) / tau, y, bank.known, include_positive)
        return (each * rows).sum() / jnp.maximum(rows.sum(), 1)

    there = bank.has.any(axis=1).astype(jnp.float32)  # (m,)
    local = (jax.vmap(of)(complete(bank)) * there).sum() if len(bank.sets) else jnp.float32(0)
    return of(bank.mean) + local / jnp.maximum(there.sum(), 1)


def code_loss(views: Array, y: Array, mask: Array, bank: Bank, tau: float) -> Array:
    """The loss of the authors' code, (): a supervised contrast of the batch's views, summed over the clients.

    In each client's term the anchor of a row is the client's prototype of the row's class. Positives are the other rows of that
    class, of all views; a row without any is left out. Without sets the mean is the only client's.

    Args:
        views: (V, B, d), features of V views of the same rows.
        y, mask: (B,).
    """
    z = views.reshape(-1, views.shape[-1])  # (V B, d)
    y, rows = (jnp.tile(leaf, len(views)) for leaf in (y, counting(y, mask, bank.known)))
    real = rows > 0
    others = real & ~jnp.eye(len(y), dtype=bool)  # (A, Q): q is not a, and counts
    positives = others & (y[:, None] == y)
    number = positives.sum(axis=1).astype(jnp.float32)
    anchors = (real & (number > 0)).astype(jnp.float32)

    def of(prototypes: Array) -> Array:  # (C, d) -> ()
        scores = similar(prototypes, z)[y] / tau  # (A, Q)
        below = jax.nn.logsumexp(jnp.where(others, scores, NEVER), axis=1)
        pull = jnp.where(positives, scores, 0.0).sum(axis=1) / jnp.maximum(number, 1)
        return ((below - pull) * anchors).sum() / jnp.maximum(anchors.sum(), 1)

    if not len(bank.sets):
        return of(bank.mean)
    there = bank.has.any(axis=1).astype(jnp.float32)
    return (jax.lax.map(of, complete(bank), batch_size=TOGETHER) * there).sum()


def similar(a: Array, b: Array) -> Array:
    """Inner products of rows, (A, B), in full precision: tau would enlarge what accelerators round away."""
    return jnp.matmul(a, b.T, precision=jax.lax.Precision.HIGHEST)


class Contrastive:
    """The parts of FedPCL for one task, each a pure function; arguments are those of `fed_pcl`."""

    def __init__(self, task: Task, tau: float, loss: str, bank: str, include_positive: bool, most: int | None) -> None:
        self.task, self.tau, self.form, self.bank = task, tau, loss, bank
        self.positive, self.most = include_positive, most
        self.paths = block(task, "fed_pcl")

    def features(self, held: Tree, params: Params, x: Tree) -> Array:
        """z(x), (B, d)."""
        assert self.task.features is not None
        return unit(self.task.features(held, params, x))

    def loss(self, both: tuple[Tree, Bank], params: Params, batch: Batch) -> tuple[Array, Metrics]:
        """Of a batch, against a bank that came beside the frozen part."""
        held, bank = both
        keys = (batch.key, jax.random.fold_in(batch.key, 1))[: 2 if self.form == "code" else 1]
        views = jnp.stack([self.features(held, params, self.task.augment(key, batch.x)) for key in keys])
        if self.form == "code":
            value = code_loss(views, batch.y, batch.mask, bank, self.tau)
        else:
            value = paper_loss(views[0], batch.y, batch.mask, bank, self.tau, self.positive)
        return value, {"loss": value}

    def read(self, message: Tree) -> Bank:
        """The bank as a client reads it."""
        classes, mean = self.task.classes, message["mean"]
        sets = message.get("sets", {"prototypes": jnp.zeros((0, classes, width(self.task))), "has": None})
        has = jnp.zeros((0, classes), bool) if sets["has"] is None else flags(sets["has"], classes)
        return Bank(sets["prototypes"], has, mean["prototypes"], flags(mean["has"], classes))

    def contrasting(self) -> Local:
        """A client's training against the bank. Where nothing came no optimizer's decay moves it either."""
        task = self.task

        def keep(carry: Fit, message: Tree, client: Client) -> tuple[Tree, Own]:
            return (), client.memory._replace(params=carry.params)

        plain = fit(
            self.loss, task.optimizer, task.lr, task.passes, view=lambda held, message, memory: (held, self.read(message)),
            start=lambda message, memory: memory.params, reply=keep,
        )  # fmt: skip

        def step(held: Tree, message: Tree, carry: Fit, batch: Batch) -> tuple[Fit, Metrics]:
            moved, metrics = plain.step(held, message, carry, batch)
            came = (message["mean"]["has"] != 0).any()
            return jax.tree.map(lambda new, old: jnp.where(came, new, old), moved, carry), metrics

        return plain._replace(step=step)

    def probing(self) -> Local:
        """FedAvg's client, which keeps the trained block for its prototypes."""
        task, paths = self.task, self.paths

        def reply(carry: Fit, message: Tree, client: Client) -> tuple[Tree, Own]:
            change = jax.tree.map(jnp.subtract, carry.params, message["params"])
            return coded(change), client.memory._replace(params=pick(carry.params, paths))

        return fit(
            task.loss,
            task.optimizer,
            task.lr,
            task.passes,
            start=lambda message, memory: message["params"],
            reply=reply,
        )

    def algorithm(self) -> Algorithm:
        """All together."""
        task, paths, averages = self.task, self.paths, self.form == "ce"
        gather = collecting(task, self.features, lambda prototypes, has, own: (sent(prototypes, has), own))
        keep = collecting(
            task, self.features, lambda prototypes, has, own: ((), own._replace(prototypes=prototypes, has=has))
        )
        train = self.probing() if averages else self.contrasting()
        fold = side_by_side()
        update = jax.jit(partial(descend, task.server_optimizer))

        @jax.jit
        def taken(stacked: Tree, server: Server) -> tuple[Bank, Server]:
            sets, has = unpacked(stacked, task.classes)
            mean, known = means(sets, has)
            came = jax.tree.map(lambda n, o: jnp.where(known.any(), n, o), (mean, known), (server.mean, server.known))
            return Bank(sets, has, mean, known), server._replace(mean=came[0], known=came[1])

        def begin(key: Array, held: Tree) -> Server:
            params, own = task.init(key), nothing(task, {})
            return Server(params, task.server_optimizer.init(params), own.prototypes, own.has)

        def news(bank: Bank, cohort: Cohort) -> Tree:
            message = {"mean": sent(bank.mean, bank.known)}
            if self.bank == "all":
                members = len(cohort.ids)
                drawn = np.arange(members)
                if self.most is not None and self.most < members:
                    drawn = np.sort(cohort.rng("prototype sets").choice(members, self.most, replace=False))
                message["sets"] = sent(bank.sets[drawn], bank.has[drawn])
            return message

        def round(key: Array, held: Tree, server: Server, cohort: Cohort) -> tuple[Server, Metrics]:
            if averages:
                message = {"params": coded(server.params, change=False)}
                change, info = cohort.exchange(message, train)
                moved = update(Averaged(server.params, server.optimizer), change, info.weight)
                cohort.exchange((), keep, fold)
                return server._replace(params=moved.params, optimizer=moved.optimizer), info.metrics
            stacked, _ = cohort.exchange((), gather, fold)
            bank, server = taken(stacked, server)
            _, info = cohort.exchange(news(bank, cohort), train, fold)
            cohort.exchange((), keep, fold)
            return server, {**info.metrics, "sets": bank.has.any(axis=1).sum().astype(jnp.float32)}

        def predict(held: Tree, server: Server, memory: Any, x: Tree) -> Array:
            own = memory or Own(pick(server.params, paths), server.mean, server.known)
            return nearest(self.features(held, own.params, x), own.prototypes, own.has, self.tau)

        def whole(server: Server) -> Params:
            return server.params

        return Algorithm(
            begin,
            round,
            predict,
            memory=lambda key, held: nothing(task, first(task, paths)),
            setup=lambda held: (held, {} if averages else first(task, paths)),
            params=whole,
            answers="client",
            plain_steps=False,
        )
