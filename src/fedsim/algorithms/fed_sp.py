"""FedSP (Dong et al., arXiv 2311.06805): soft prompts are all that travels between a server's large model and clients' small ones.

The server has a decoder G of L blocks that it gives to nobody. Clients have an auxiliary model A: G's embeddings, last norm and
outputs, and its first c blocks, repeated L / c times with the same weights. Prompts E, keys and values before the text in every
attention, fit both.

    once:  A = argmin mean |h_A(x) - h_G(x)|^2 on the server's shard, h what the outputs are made of, without prompts; A is sent
    client i, from E:  A_i by K steps on l(A_i, E), E fixed;  then E_i by K steps on l(A_i, E_i), A_i fixed;  E_i is sent
    server:  E = sum_i w_i E_i, then steps on l(G, E) over its shard, G fixed

A_i stays with its client, and no average of them is made. Bytes: E's, either way, whatever the size of G and A; A once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from fedsim.algorithms.fed_avg import Server as Averaged
from fedsim.algorithms.fed_avg import descend
from fedsim.algorithms.parts import rate
from fedsim.algorithms.tied import Shape, shape_of, thinned, tied, tiled, uniques
from fedsim.backbones.load import draw
from fedsim.config import one_of, whole_number
from fedsim.core import Algorithm, Batch, Client, Cohort, Local, Metrics, Params, Task, Tree
from fedsim.training.local import Fit, fit
from fedsim.training.server import trainer
from fedsim.wire import again, coded, kept

DECAY = 0.01  # of the server's AdamW, in its own training and in distillation


class Server(NamedTuple):
    """What the server keeps beside G."""

    params: Params  # the prompts, or what makes them
    optimizer: Tree  # of the average
    training: Tree  # of its own steps
    auxiliary: Params  # A's leaves that are trained, as they were sent
    ready: Any  # (), int32, counted on the host: whether they are distilled


class Kept(NamedTuple):
    """A value that a client keeps, once it has one."""

    value: Tree
    there: Array  # (), bool


class Own(NamedTuple):
    """What a client keeps."""

    auxiliary: Kept  # the leaves of its A_i that are trained
    states: tuple[Kept, Kept]  # of the optimizers of A_i and of the prompts


def fed_sp(
    task: Task,
    unique: int = 1,
    depth: int | None = None,
    trains: Sequence[str] = ("*",),
    freeze_aux: bool = False,
    aux_rate: float = 1.0,
    distil_steps: int = 5000,
    distil_rate: float = 5e-4,
    distil_batch: int = 16,
    distil: str = "hidden",
    server_steps: int = 10,
    server_rate: float = 5e-4,
    server_batch: int = 16,
    keep_optimizers: bool = True,
    reparam: int = 0,
) -> Algorithm:
    """FedSP (Dong et al., arXiv 2311.06805): soft prompts are all that travels between a large model and clients' small ones.

    It trains the prefix of a decoder: `--task language_model --peft prefix --server-share 0.1`. Both of a client's stages take
    the run's steps, optimizer and rate.

    Args:
        unique: c, blocks of the auxiliary model with weights of their own, G's first ones.
        depth: its blocks, c of them again and again; default: as many as G has. Fewer take the mean of the prompts of the
            blocks that they stand for.
        trains: patterns of its leaves that are trained, in distillation and by clients.
        freeze_aux: clients leave it as it was sent.
        aux_rate: the rate of its training by clients, as a factor of the run's.
        distil_steps, distil_rate, distil_batch: of the distillation, in the first round; 0 steps: A has G's weights.
        distil: what it minimises: "hidden", or "mixed", half the loss on texts and half of hidden states and soft targets.
        server_steps, server_rate, server_batch: of the server's own training in each round; 0 steps: E is the average.
        keep_optimizers: clients' optimizers go on from round to round.
        reparam: h > 0: what travels is a table and a two-layer map of h hidden units that makes the prompts.

    Raises:
        ValueError: numbers out of range, options that do not go together, a model that trains anything but its prefix.
    """
    whole_number(
        distil_steps=(distil_steps, 0), server_steps=(server_steps, 0), reparam=(reparam, 0), unique=(unique, 1),
        distil_batch=(distil_batch, 1), server_batch=(server_batch, 1),
    )  # fmt: skip
    for name, step in (("distil_rate", distil_rate), ("server_rate", server_rate)):
        if isinstance(step, bool) or not isinstance(step, (int, float)) or not 0 <= step < math.inf:
            raise ValueError(f"Expected {name}={step!r} >= 0; leave it out for 5e-4.")
    one_of(("hidden", "mixed"), distil=distil)
    factors = (rate("aux_rate", aux_rate), 1.0)
    shape = shape_of(task, unique, depth)
    if reparam and shape.depth < shape.layers:
        raise ValueError(f"Expected no depth={depth} with reparam={reparam}, which makes all prompts; leave one out.")
    patterns = (trains,) if isinstance(trains, str) else tuple(trains)
    parts = SoftPrompts(
        task, shape, patterns, bool(freeze_aux), distil == "mixed", bool(keep_optimizers), reparam, factors
    )
    return parts.algorithm(
        (distil_steps, float(distil_rate), distil_batch), (server_steps, float(server_rate), server_batch)
    )


class SoftPrompts:
    """The parts of FedSP for one task, each a pure function.

    Args:
        factors: of the run's rate, for the auxiliary model and the prompts.
    """

    def __init__(
        self, task: Task, shape: Shape, trains: tuple[str, ...], frozen: bool, mixed: bool, keep: bool, reparam: int,
        factors: tuple[float, float] = (1.0, 1.0),
    ) -> None:  # fmt: skip
        self.task, self.shape, self.trains, self.factors = task, shape, trains, factors
        self.frozen, self.mixed, self.keep, self.reparam = frozen, mixed, keep, reparam
        self.fewer = shape.depth < shape.layers

    # --- the models

    def moving(self, held: Tree) -> Params:
        """The leaves of A that are trained, as G has them, in float32.

        Raises:
            ValueError: the server's blocks differ; a pattern without a leaf.
        """
        paths = uniques(held, self.shape)
        for pattern in self.trains:
            if not any(fnmatchcase(path, pattern) for path in paths):
                raise ValueError(
                    f"Expected trains={self.trains!r} to match leaves of the auxiliary model, but {pattern!r} matches none of "
                    f"{', '.join(sorted(paths)[:8])}, ...; mend it, or leave it out."
                )
        chosen = [path for path in paths if any(fnmatchcase(path, pattern) for pattern in self.trains)]
        return {path: jnp.asarray(held[path], jnp.float32) for path in chosen}

    def setup(self, held: Tree) -> Params:
        """What a client is given once: A's unique leaves."""
        return {**{path: held[path] for path in uniques(held, self.shape)}, **self.moving(held)}

    def messenger(self, key: Array) -> Params:
        """E at the start: the run's first prompts, the same for all; or what makes them."""
        first = self.task.init(key)
        if not self.reparam:
            return first
        tokens, width = next(iter(first.values())).shape
        shapes = {
            "reparam/embedding": (tokens, width),
            "reparam/inner/kernel": (width, self.reparam),
            "reparam/inner/bias": (self.reparam,),
            "reparam/outer/kernel": (self.reparam, 2 * self.shape.layers * width),
            "reparam/outer/bias": (2 * self.shape.layers * width,),
        }
        return draw(key, {path: jax.ShapeDtypeStruct(size, jnp.float32) for path, size in shapes.items()})

    def prompts(self, messenger: Params) -> Params:
        """The prompts that a messenger is, or makes."""
        if not self.reparam:
            return messenger
        hidden = jnp.tanh(
            messenger["reparam/embedding"] @ messenger["reparam/inner/kernel"] + messenger["reparam/inner/bias"]
        )
        made = hidden @ messenger["reparam/outer/kernel"] + messenger["reparam/outer/bias"]  # (p, 2 L d)
        paths = sorted(self.task.trained)
        return dict(zip(paths, jnp.split(made, len(paths), axis=1), strict=True))

    def on_client(self, messenger: Params) -> Params:
        """The prompts as A reads them: zeros in blocks behind its depth, which do nothing."""
        prompts = self.prompts(messenger)
        behind = {path: leaf for path, leaf in tiled(prompts, self.shape).items() if path not in prompts}
        return {**prompts, **jax.tree.map(jnp.zeros_like, behind)}

    def loss_of(self, held: Tree, auxiliary: Params, messenger: Params, batch: Batch) -> tuple[Array, Metrics]:
        """l(A_i, E)."""
        return self.task.loss(tied(held, auxiliary, self.shape), self.on_client(messenger), batch)

    # --- clients

    def own(self, message: Tree, memory: Own) -> Params:
        """A_i's trained leaves: its own, or at first those that were sent."""
        return message["auxiliary"] if self.frozen else chosen(memory.auxiliary, message["auxiliary"])

    def memory(self, key: Array, held: Tree) -> Own:
        """What a client keeps before its first round: nothing, at its size."""
        init, no = self.task.optimizer(0.0).init, jnp.zeros((), bool)
        auxiliary = {} if self.frozen else jax.tree.map(jnp.zeros_like, self.moving(held))
        prompts = self.sent(self.messenger(key)) if self.keep else {}
        states = [Kept(init(leaves) if self.keep else (), no) for leaves in (auxiliary, prompts)]
        return Own(Kept(auxiliary, no), (states[0], states[1]))

    def stage(self, place: int, reply: Any, start: Any, view: Any, loss: Any, stream: str) -> Local:
        """K steps on one of both, its optimizer going on from where the client left it.

        Args:
            place: of its state in `Own.states`, and of its rate in `factors`.
        """
        task = self.task

        def ended(carry: Fit, message: Tree, client: Client) -> tuple[Tree, Own]:
            states = list(carry.memory.states)
            if self.keep:
                states[place] = Kept(carry.optimizer, jnp.ones((), bool))
            return reply(carry, message, carry.memory._replace(states=tuple(states)))

        state = (lambda fresh, memory: chosen(memory.states[place], fresh)) if self.keep else None
        passes = task.passes._replace(stream=stream)
        lr = (
            (lambda client, message: self.factors[place] * task.lr(client, message))
            if self.factors[place] != 1
            else task.lr
        )
        return fit(loss, task.optimizer, lr, passes, start=start, view=view, reply=ended, state=state)

    def aligning(self) -> Local:
        """Stage A: the auxiliary model learns with the prompts as they are; nothing is sent."""
        return self.stage(
            0,
            lambda carry, message, memory: ((), memory._replace(auxiliary=Kept(carry.params, jnp.ones((), bool)))),
            start=self.own,
            view=lambda held, message, memory: (held, message["prompts"]),
            loss=lambda both, auxiliary, batch: self.loss_of(both[0], auxiliary, both[1], batch),
            stream="auxiliary",
        )

    def prompting(self) -> Local:
        """Stage B: the prompts learn with the auxiliary model as it is, and are sent."""

        def reply(carry: Fit, message: Tree, memory: Own) -> tuple[Tree, Own]:
            return coded(jax.tree.map(jnp.subtract, carry.params, message["prompts"])), memory

        return self.stage(
            1,
            reply,
            start=lambda message, memory: message["prompts"],
            view=lambda held, message, memory: (held, self.own(message, memory)),
            loss=lambda both, prompts, batch: self.loss_of(both[0], both[1], prompts, batch),
            stream="",
        )

    # --- the server

    def sent(self, messenger: Params) -> Params:
        """What goes down of E."""
        return thinned(messenger, self.shape) if self.fewer else messenger

    def change(self, messenger: Params, mean: Params) -> Params:
        """The clients' mean change as one of the server's E."""
        if not self.fewer:
            return mean
        new = tiled(jax.tree.map(jnp.add, self.sent(messenger), mean), self.shape)
        return jax.tree.map(jnp.subtract, new, messenger)

    def apart(self, held: Tree, auxiliary: Params, batch: Batch, prompts: Params) -> tuple[Array, Metrics]:
        """The distillation's loss: how far the last hidden states of A and G are apart, as the server's trainer has it.

        Args:
            prompts: whose shapes are those of no prompt, but for their length.
        """
        task, none = self.task, {path: leaf[:0] for path, leaf in prompts.items()}
        own, shown = tied(held, auxiliary, self.shape), batch.mask
        assert task.features is not None
        h, g = (task.features(leaves, none, batch.x).astype(jnp.float32) for leaves in (own, held))
        if task.real is not None:
            shown = jnp.where(task.real(batch.x), shown[:, None], 0.0)

        def mean(each: Array) -> Array:
            return (each * shown).sum() / jnp.maximum(shown.sum(), 1)

        gap = mean(((h - g) ** 2).mean(axis=-1))
        if not self.mixed:
            return gap, {"distillation": gap}
        ours, theirs = (task.logits(leaves, none, batch.x) for leaves in (own, held))
        soft = mean(optax.softmax_cross_entropy(ours, jax.nn.softmax(theirs)))
        value = 0.5 * task.criterion(ours, batch)[0] + 0.5 * (gap + soft)
        return value, {"distillation": value}

    def on_server(self, held: Tree, messenger: Params, batch: Batch, args: Tree) -> tuple[Array, Metrics]:
        """l(G, E), as the server's trainer has it."""
        value, _ = self.task.loss(held, self.prompts(messenger), batch)
        return value, {"server_loss": value}

    def algorithm(self, distillation: tuple[int, float, int], training: tuple[int, float, int]) -> Algorithm:
        """All together; steps, rate and batch of the server's two trainings."""
        task = self.task
        adam = {"distil": adamw(distillation[1]), "server": adamw(training[1])}
        distils = trainer(self.apart, adam["distil"], batch=distillation[2], steps=distillation[0])
        improves = trainer(self.on_server, adam["server"], batch=training[2], steps=training[0])
        aligning, prompting = None if self.frozen else self.aligning(), self.prompting()
        down, prompts = jax.jit(self.sent), jax.jit(self.prompts)

        @jax.jit
        def averaged(before: Averaged, mean: Params, weight: Array) -> Averaged:
            return descend(task.server_optimizer, before, self.change(before.params, mean), weight)

        @jax.jit
        def where_any(weight: Array, new: Tree, old: Tree) -> Tree:
            return jax.tree.map(lambda n, o: jnp.where(weight > 0, n, o), new, old)

        def begin(key: Array, held: Tree) -> Server:
            first = self.messenger(key)
            states = task.server_optimizer.init(first), adam["server"].init(first)
            return Server(first, *states, self.moving(held), np.int32(0))

        def prepared(key: Array, held: Tree, server: Server, cohort: Cohort) -> tuple[Params, Metrics]:
            """A as it is sent: distilled once, in the first round."""
            if not distillation[0] or int(cohort.fetch(server.ready)):
                return server.auxiliary, {}
            state = adam["distil"].init(server.auxiliary)
            trained, _, told = distils(held, server.auxiliary, state, shard_of(cohort), prompts(server.params), key)
            return trained, told

        def round(key: Array, held: Tree, server: Server, cohort: Cohort) -> tuple[Server, Metrics]:
            for_distillation, for_training = jax.random.split(key)
            auxiliary, told = prepared(for_distillation, held, server, cohort)
            message = {"prompts": down(server.params) if self.fewer else server.params, "auxiliary": auxiliary}
            # A was charged as set-up, and does not change: of it nothing travels.
            nothing = kept(auxiliary, np.zeros(len(cohort.ids), np.int32), axis=0)
            first = {"prompts": coded(message["prompts"], change=False), "auxiliary": nothing}
            if aligning is not None:
                _, info = cohort.exchange(first, aligning)
                told = {**told, **{f"auxiliary_{name}": value for name, value in info.metrics.items()}}
                first = again(message)
            mean, info = cohort.exchange(first, prompting)
            new = averaged(Averaged(server.params, server.optimizer), mean, info.weight)
            params, state = new.params, server.training
            if training[0]:
                params, state, said = improves(held, params, state, shard_of(cohort), (), for_training)
                params, state = where_any(info.weight, (params, state), (server.params, server.training))
                told = {**told, **said}
            return Server(params, new.optimizer, state, auxiliary, np.int32(1)), {**info.metrics, **told}

        return Algorithm(
            begin,
            round,
            lambda held, server, memory, x: task.logits(held, self.prompts(server.params), x),
            memory=self.memory,
            setup=self.setup,
            params=lambda server: self.prompts(server.params),
            plain_steps=False,
        )


def chosen(kept: Kept, else_: Tree) -> Tree:
    """What is kept, or the other where nothing is."""
    return jax.tree.map(lambda own, other: jnp.where(kept.there, own, other), kept.value, else_)


def adamw(rate: float) -> optax.GradientTransformation:
    """The server's optimizer, as in the authors' scripts."""
    return optax.adamw(rate, weight_decay=DECAY)


def shard_of(cohort: Cohort) -> Tree:
    """The server's own examples.

    Raises:
        ValueError: it has none.
    """
    if cohort.shard is None:
        raise ValueError(
            "Expected server_share > 0 for algorithm='fed_sp', whose server distils the auxiliary model and trains the prompts on "
            "examples of its own; give --server-share 0.1, or fed_sp(distil_steps=0, server_steps=0)."
        )
    return cohort.shard
