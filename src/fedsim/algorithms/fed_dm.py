"""FedDM (Xiong et al., arXiv 2207.09653): clients send small synthetic data sets, and the server trains on their union.

A client k learns, from its round's model w, a few synthetic examples S_k of every class c that it has enough of, so that around w
they look to the model as its real ones D_k do:

    w~ = w + delta,  |delta| <= rho at random;   B_c a batch of real examples of class c, S_c its synthetic ones
    L = sum_c |mean h(B_c) - mean h(S_c)|^2 + |mean z(B_c) - mean z(S_c)|^2,   h features, z logits, both of w~
    S_k <- S_k - eta dL / dS_k,  T steps from real examples;   labels are fixed, and parameters do not move

The server goes on from w by SGD on all S_k. Bytes: P numbers down, as FedAvg's; up what the examples take, whatever P is.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from fedsim.algorithms.prototypes import bits, flags
from fedsim.algorithms.synthetic import chosen, cut, is_number, learnt, numbers, perturbed, radius, steps_of, whole
from fedsim.config import one_of, whole_number
from fedsim.core import Algorithm, Batch, Client, Cohort, Local, Metrics, Params, Passes, Task, Tree
from fedsim.engine.keys import key_for
from fedsim.folds import Stacked, stack, uniform
from fedsim.training.local import stepped
from fedsim.training.server import Run, trainer
from fedsim.wire import coded, kept

LEAST = 1e-9  # a batch of the server's whose weights sum to less has no example

Watch = Callable[[int, Any, np.ndarray, np.ndarray], None]  # (round, x (n, ...), y (n,), weights (n,))


class Recipe(NamedTuple):
    """What a client learns its examples by; `fed_dm` has the meanings."""

    per_class: int
    steps: int
    real: int
    rho: float | None
    init: str
    least: int
    uint8: bool
    weighted: bool
    clip: float | None
    noise: float


class Training(NamedTuple):
    """How the server trains."""

    epochs: int
    batch: int
    rate: float
    momentum: float
    decay: float


class Server(NamedTuple):
    """What the server keeps."""

    params: Params


class Learning(NamedTuple):
    """A client's examples while they are learnt."""

    examples: Tree  # (C, I, ...)
    has: Array  # (C,), bool
    optimizer: Tree
    lr: Array  # (), float32


def fed_dm(
    task: Task,
    per_class: int = 10,
    steps: int = 1000,
    real: int = 256,
    rho: float | None = None,
    init: str = "real",
    least: int = 10,
    uint8: bool = False,
    weighted: bool = False,
    server_epochs: int = 500,
    server_batch: int = 256,
    server_rate: float = 0.01,
    server_momentum: float = 0.9,
    server_decay: float = 5e-4,
    clip: float | None = None,
    noise: float = 0.0,
    watch: Watch | None = None,
) -> Algorithm:
    """FedDM (Xiong et al., arXiv 2207.09653): clients send small synthetic data sets, and the server trains on their union.

    The clients' optimizer and rate are those of the examples: `--optimizer "sgd(momentum=0.5)" --lr 1` for images.

    Args:
        per_class: synthetic examples of each class.
        steps, real: of a client in a round, and real examples of each class in each of them.
        rho: radius of the ball around the model from which each step draws another; 0: the model itself. Default: 5 from 320,010
            parameters on, as for the paper's network, and for each of fewer as much as there (`radius`).
        init: examples at the start, "real" ones or "noise".
        least: a client leaves out classes of which it has fewer examples.
        uint8: images go up as bytes, a fourth of what float32 takes.
        weighted: count a class by the client's number of examples of it, which then goes up too; else each pair alike.
        server_epochs, server_batch, server_rate, server_momentum, server_decay: the server's SGD, from rest in every round.
        clip, noise: cut each step's gradient to this length, and add Gaussian noise of this standard deviation over it.
        watch: called after every round with what the server trained on; from Python alone.

    Raises:
        ValueError: numbers out of range, options that do not go together, a model without classes or features.
    """
    whole_number(
        per_class=(per_class, 1), steps=(steps, 1), real=(real, 1), least=(least, 1), server_epochs=(server_epochs, 0),
        server_batch=(server_batch, 1),
    )  # fmt: skip
    floats = {"rho": rho or 0.0, "noise": noise, "server_rate": server_rate, "server_momentum": server_momentum}
    for name, value in {**floats, "server_decay": server_decay}.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
            raise ValueError(f"Expected {name}={value!r} >= 0; leave it out.")
    if server_momentum >= 1:
        raise ValueError(f"Expected server_momentum={server_momentum!r} < 1; leave it out for 0.9.")
    if real < per_class:
        raise ValueError(f"Expected real={real} >= per_class={per_class}, of which they begin; raise real.")
    one_of(("real", "noise"), init=init)
    if clip is None and noise:
        raise ValueError(f"Expected clip with noise={noise!r}, which is a multiple of it; give clip=1.0.")
    if clip is not None and not 0 < clip < math.inf:
        raise ValueError(f"Expected clip={clip!r} > 0, the length to which gradients are cut; leave it out.")
    if clip is not None and init == "real":
        raise ValueError(f"Expected init='noise' with clip={clip!r}: real examples would be sent; give init='noise'.")
    if watch is not None and not callable(watch):
        raise ValueError(f"Expected watch={watch!r} to be a function, which only Python can give; leave it out.")
    if not task.classes:
        raise ValueError(
            "Expected classes for algorithm='fed_dm', whose examples have labels; a language model has none."
        )
    if task.features is None:
        raise ValueError("Expected a model with features for algorithm='fed_dm'; its head must be called head.")
    recipe = Recipe(
        per_class, steps, real, None if rho is None else float(rho), init, least, uint8, weighted, clip, float(noise)
    )
    server = Training(server_epochs, server_batch, server_rate, server_momentum, server_decay)
    return Matching(task, recipe).algorithm(server, watch)


def apart(task: Task, held: Tree, params: Params, synthetic: Tree, real: Tree, mask: Array, has: Array) -> Array:
    """How far the means of features and logits of synthetic and real examples are apart, summed over the classes there are, ().

    Args:
        synthetic, real: (C, I, ...) and (C, R, ...).
        mask: (C, R), of the real ones.
        has: (C,).
    """

    def means(x: Tree, rows: Array) -> tuple[Array, Array]:
        flat = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), x)
        assert task.inputs is not None and task.features is not None
        flat = task.inputs(flat)
        outputs = task.features(held, params, flat), task.logits(held, params, flat)

        def mean(h: Array) -> Array:  # (C n, F) -> (C, F)
            h = h.reshape(*rows.shape, -1).astype(jnp.float32)
            h = jnp.where(rows[..., None] > 0, h, 0.0)  # whatever stands in holes
            return h.sum(axis=1) / jnp.maximum(rows.sum(axis=1), 1)[:, None]

        return mean(outputs[0]), mean(outputs[1])

    every = jnp.ones(jax.tree.leaves(synthetic)[0].shape[:2])
    gaps = [jnp.sum((a - b) ** 2, axis=1) for a, b in zip(means(real, mask), means(synthetic, every), strict=True)]
    return jnp.where(has, gaps[0] + gaps[1], 0.0).sum()


class Matching:
    """The parts of FedDM for one task, each a pure function."""

    def __init__(self, task: Task, recipe: Recipe) -> None:
        self.task, self.recipe = task, recipe

    def of_classes(self, x: Tree) -> Tree:
        """A batch's inputs by class, (C, R, ...)."""
        return jax.tree.map(lambda leaf: leaf.reshape(self.task.classes, self.recipe.real, *leaf.shape[1:]), x)

    def begin(self, held: Tree, message: Params, client: Client, batch: Batch) -> Learning:
        """Examples at the start: the first real ones of each class, or noise."""
        r, raw = self.recipe, self.of_classes(batch.x)
        bytes_ = any(leaf.dtype == jnp.uint8 for leaf in jax.tree.leaves(raw))
        if r.uint8 and not bytes_:
            raise ValueError(
                "Expected uint8=True to meet images of bytes; leave it out, or take --codec-up quantise(8)."
            )
        if bytes_ and self.task.inputs is None:
            raise ValueError(
                "Expected images of algorithm='fed_dm' to be read by one backbone of the table, whose scale of images is known; "
                "take one, give float images, or train what stands above a frozen part."
            )
        has = (batch.mask.reshape(self.task.classes, r.real) > 0).any(axis=1)
        real = jax.tree.map(lambda leaf: leaf[:, : r.per_class], numbers(raw))
        key = key_for(client.key, "synthetic examples")
        middle, spread = (0.5, 0.25) if bytes_ else (0.0, 1.0)

        def first(number: int, leaf: Array) -> Array:
            if r.init == "noise":
                drawn = middle + spread * jax.random.normal(jax.random.fold_in(key, number), leaf.shape)
                leaf = drawn if is_number(leaf) else jnp.ones_like(leaf)
            return jnp.where(has.reshape(-1, *[1] * (leaf.ndim - 1)), leaf, jnp.zeros((), leaf.dtype))

        leaves, structure = jax.tree.flatten(real)
        examples = structure.unflatten([first(number, leaf) for number, leaf in enumerate(leaves)])
        rate = self.task.lr(client, message)
        return Learning(examples, has, self.task.optimizer(rate).init(learnt(examples)), rate)

    def step(self, held: Tree, message: Params, carry: Learning, batch: Batch) -> tuple[Learning, Metrics]:
        """One step of the examples against a model nearby."""
        r, task = self.recipe, self.task
        near = perturbed(key_for(batch.key, "ball"), message, radius(message) if r.rho is None else r.rho)
        real, mask = numbers(self.of_classes(batch.x)), batch.mask.reshape(task.classes, r.real)

        def value(moving: Tree) -> Array:
            return apart(task, held, near, whole(moving, carry.examples), real, mask, carry.has)

        moving = learnt(carry.examples)
        found, grads = jax.value_and_grad(value)(moving)
        if r.clip is not None:
            grads = cut(grads, key_for(batch.key, "noise on a gradient"), r.clip, r.noise)
        moved, state = stepped(task.optimizer(carry.lr), grads, carry.optimizer, moving)
        return carry._replace(examples=whole(moved, carry.examples), optimizer=state), {"matching": found}

    def end(self, held: Tree, message: Params, carry: Learning, client: Client) -> tuple[Tree, Tree, Metrics]:
        """The reply: examples of the classes there are, and a bit for each class."""
        images = self.recipe.uint8

        def part(leaf: Array) -> Tree:
            if not is_number(leaf):
                leaf = leaf.astype(jnp.int8)  # a mask, as folds add
            elif images:
                leaf = jnp.round(jnp.clip(leaf, 0, 1) * 255).astype(jnp.uint8)
            marked = kept(leaf, jnp.broadcast_to(carry.has.reshape(-1, *[1] * (leaf.ndim - 1)), leaf.shape))
            return coded(marked, change=False) if is_number(leaf) else marked

        return {"x": jax.tree.map(part, carry.examples), "has": bits(carry.has)}, client.memory, {}

    def counting(self) -> Local:
        """A pass that counts a client's examples by class, and replies with those of which there are enough."""
        classes, least = self.task.classes, self.recipe.least

        def step(held: Tree, message: Tree, count: Array, batch: Batch) -> tuple[Array, Metrics]:
            return count + (jax.nn.one_hot(batch.y, classes) * batch.mask[:, None]).sum(axis=0), {}

        passes = Passes(epochs=1, batch_size=self.task.passes.batch_size, shuffle=False, stream="counts")
        return Local(
            lambda held, message, client, batch: jnp.zeros(classes), step,
            lambda held, message, count, client: (kept(count, count >= least), client.memory, {}), passes,
        )  # fmt: skip

    def pooled(self, stacked: Stacked, counts: Stacked | None) -> tuple[Tree, Array, Array]:
        """All examples (n, ...), their labels and weights (n,); n = M C I, of which those of weight 0 are none."""
        classes, each = self.task.classes, self.recipe.per_class
        flat = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[3:]), stacked.replies["x"])
        x = jax.tree.map(lambda leaf: leaf != 0 if leaf.dtype == jnp.int8 else leaf, flat)
        has = flags(stacked.replies["has"], classes) & (stacked.weight > 0)[:, None]  # (M, C)
        of = has.astype(jnp.float32) if counts is None else jnp.where(has, counts.replies / each, 0.0)
        y = jnp.tile(jnp.repeat(jnp.arange(classes, dtype=jnp.int32), each), len(has))
        return x, y, jnp.repeat(of.reshape(-1), each)

    def loss(self, held: Tree, params: Params, batch: Batch, args: Tree) -> tuple[Array, Metrics]:
        """The server's: the mean cross-entropy of the examples there are."""
        assert self.task.inputs is not None
        x, weight = batch.x["x"], batch.x["weight"]
        logits = self.task.logits(held, params, self.task.inputs(numbers(x)))
        each = optax.softmax_cross_entropy_with_integer_labels(logits, batch.y)
        value = (each * weight).sum() / jnp.maximum(weight.sum(), LEAST)
        return value, {"server_loss": value}

    def algorithm(self, server: Training, watch: Watch | None) -> Algorithm:
        """All together."""
        task, r = self.task, self.recipe
        passes = Passes(
            batch_size=task.classes * r.real, rows=chosen(task.classes, r.real, r.least),
            steps=steps_of(task.classes, r.steps, r.least),
        )  # fmt: skip
        local, fold = Local(self.begin, self.step, self.end, passes), stack(uniform)
        counting = self.counting() if r.weighted else None
        sgd = optax.sgd(server.rate, server.momentum or None)
        optimizer = optax.chain(optax.add_decayed_weights(server.decay), sgd)
        pooled = jax.jit(self.pooled)

        @functools.cache
        def training(rows: int) -> Run:  # a cohort of another size has another number of them, and compiles once
            batch = min(server.batch, rows)
            return trainer(self.loss, optimizer, batch, server.epochs * -(-rows // batch))

        @jax.jit
        def where_any(weight: Array, new: Params, old: Params) -> Params:
            return jax.tree.map(lambda n, o: jnp.where(weight.sum() > 0, n, o), new, old)

        def round(key: Array, held: Tree, state: Server, cohort: Cohort) -> tuple[Server, Metrics]:
            counts = cohort.exchange((), counting, fold)[0] if counting is not None else None
            stacked, info = cohort.exchange(coded(state.params, change=False), local, fold)
            x, y, weight = pooled(stacked, counts)
            examples = ({"x": x, "weight": weight}, y)
            params, _, metrics = training(len(y))(held, state.params, optimizer.init(state.params), examples, (), key)
            if watch is not None:
                watch(cohort.round, *cohort.fetch((x, y, weight)))
            told = {**info.metrics, **(metrics if server.epochs else {})}
            return Server(where_any(weight, params, state.params)), told

        return Algorithm(
            lambda key, held: Server(task.init(key)),
            round,
            lambda held, state, memory, x: task.logits(held, state.params, x),
            plain_steps=False,
        )
