"""FedPTR (Chen et al., arXiv 2312.14380): clients are pulled to where the server's model is going, not to where it is.

From a few synthetic examples D and a rate a one learns a short training that takes the last global model to the present one,
and takes the same training on from there. With phi_S(w; D, a) for S steps w <- w - a grad l(w; D):

    D, a = argmin |phi_S(w_{t-1}; D, a) - w_t|^2 / |w_{t-1} - w_t|^2,      v = phi_S'(w_t; D, a)
    client:  F_i(w) + lam / 2 |w - v|^2;      server: FedAvg's;      in the first round nothing is known, and it is FedAvg's

The server learns D once a round and sends v, 2 P numbers down in all, or D; or every client learns a D of its own from w_t and
w_{t-1}, again 2 P down. Up go P numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax
from optax.tree_utils import tree_norm, tree_sub

from fedsim.algorithms.fed_avg import Server as Averaged
from fedsim.algorithms.fed_avg import descend
from fedsim.config import one_of, whole_number
from fedsim.core import Algorithm, Batch, Client, Cohort, Local, Metrics, Params, Task, Tree
from fedsim.training.local import fit, stepped
from fedsim.training.server import trainer
from fedsim.wire import coded, kept

HEAD = frozenset({"head/kernel", "head/bias"})
EPSILON = 1e-20  # below this squared distance of two models there is no direction to go on in
NOTHING = -100.0  # log of a rate with which no float32 moves

Own = Callable[[Tree, Params, Tree], Array]  # (held, w, synthetic examples) -> mean loss


class Recipe(NamedTuple):
    """How a point is projected; `fed_ptr` has the meanings."""

    per_class: int
    unroll: int
    onward: int
    iterations: int
    data_rate: float
    first_rate: float


class Server(NamedTuple):
    """What the server keeps."""

    params: Params
    optimizer: Tree
    before: Params  # the global model of the round before
    rounds: Any  # (), int32: rounds done, counted on the host


def fed_ptr(
    task: Task,
    lam: float = 0.1,
    where: str = "server",
    send: str = "point",
    space: str = "auto",
    per_class: int = 5,
    unroll: int = 10,
    onward: int | None = None,
    iterations: int = 100,
    data_rate: float = 0.05,
    first_rate: float = 0.04,
    init: str = "noise",
) -> Algorithm:
    """FedPTR (Chen et al., arXiv 2312.14380): clients are pulled to a projected point of the server's trajectory.

    Args:
        lam: strength of the pull; 0 is FedAvg.
        where: who learns the synthetic examples, "server" or "client".
        send: what the server sends of them, the "point" that they lead to, or the "set", from which clients compute it.
        space: "features", what the head reads, "inputs", or "auto": features where the head alone is trained. The server learns
            the form of an input from its public examples.
        per_class: synthetic examples of each class.
        unroll, onward: steps S that take the last model to this one, and S' on from here; default: as many.
        iterations, data_rate: steps of Adam on the examples and log a, and their rate.
        first_rate: a at the start.
        init: examples at the start, "noise", the same for all by round, or a client's first "batch".

    Raises:
        ValueError: numbers out of range, words that are none, a space that the task does not have.
    """
    onward = unroll if onward is None else onward
    whole_number(per_class=(per_class, 1), unroll=(unroll, 1), onward=(onward, 0), iterations=(iterations, 0))
    for name, value, open_ in (("lam", lam, False), ("data_rate", data_rate, True), ("first_rate", first_rate, True)):
        if (
            isinstance(value, bool)
            or not isinstance(value, (int, float))
            or not 0 <= value < math.inf
            or (open_ and not value)
        ):
            raise ValueError(f"Expected {name}={value!r} {'>' if open_ else '>='} 0; leave it out.")
    one_of(("server", "client"), where=where)
    one_of(("point", "set"), send=send)
    one_of(("auto", "features", "inputs"), space=space)
    one_of(("noise", "batch"), init=init)
    if where == "client" and send == "set":
        raise ValueError("Expected send='point' with where='client', which sends two models; leave send out.")
    if where == "server" and init == "batch":
        raise ValueError(
            "Expected init='noise' with where='server', which has no batch; leave init out, or take where='client'."
        )
    if not task.classes:
        raise ValueError(
            "Expected classes for algorithm='fed_ptr', whose synthetic examples have labels; a language model has none."
        )
    head = bool(task.trained) and task.trained <= HEAD
    if space == "features" and not head:
        raise ValueError(
            "Expected the head alone to be trained for space='features'; give --peft head, or leave space out."
        )
    features = head and space != "inputs"
    recipe = Recipe(per_class, unroll, onward, iterations, data_rate, first_rate)
    return Projected(task, recipe, lam, features).algorithm(where, send, init)


def distance(a: Params, b: Params) -> Array:
    """|a - b|_2^2 over all leaves, ()."""
    return jnp.asarray(tree_norm(tree_sub(a, b), squared=True))


def of_numbers(x: Tree) -> tuple[int, ...]:
    """The shape of one of these inputs.

    Raises:
        ValueError: they are no array that can be learnt, such as texts.
    """
    if not hasattr(x, "dtype") or not (jnp.issubdtype(x.dtype, jnp.floating) or x.dtype == jnp.uint8):
        raise ValueError("Expected inputs of algorithm='fed_ptr' to be images or numbers; give --peft head for texts.")
    return tuple(x.shape[1:])


def phi(loss: Own, held: Tree, w: Params, data: Tree, steps: int) -> Params:
    """w after so many steps w <- w - a grad l(w; D), a = exp(log_a); each step is computed again on the way back."""

    @jax.checkpoint
    def step(w: Params, _: None) -> tuple[Params, None]:
        grads = jax.grad(lambda w: loss(held, w, data))(w)
        rate = jnp.exp(data["log_a"])
        return jax.tree.map(lambda leaf, g: leaf - rate * g, w, grads), None

    return lax.scan(step, w, None, steps)[0]


class Projected:
    """The parts of FedPTR for one task, each a pure function.

    Args:
        features: examples lie where the head reads, not where the backbone does.
    """

    def __init__(self, task: Task, recipe: Recipe, lam: float, features: bool) -> None:
        self.task, self.recipe, self.lam, self.features = task, recipe, lam, features
        self.labels = np.arange(recipe.per_class * task.classes) % task.classes

    # --- synthetic examples

    def own_loss(self, held: Tree, w: Params, data: Tree) -> Array:
        """Mean cross-entropy on the synthetic examples, whose labels lie in `data` or are those of all classes in turn."""
        labels = data["y"] if "y" in data else jnp.asarray(self.labels)
        logits = data["x"] @ w["head/kernel"] if self.features else self.task.logits(held, w, data["x"])
        if self.features and "head/bias" in w:
            logits = logits + w["head/bias"]
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return (losses * data["mask"]).sum() / jnp.maximum(data["mask"].sum(), 1) if "mask" in data else losses.mean()

    def noise(self, round: Any, shape: tuple[int, ...]) -> Tree:
        """Examples of this shape and log a, as all begin in a round."""
        key = jax.random.fold_in(jax.random.key(0), round)
        drawn = jax.random.normal(key, (len(self.labels), *shape))
        return {"x": drawn, "log_a": jnp.log(jnp.float32(self.recipe.first_rate))}

    def match(self, held: Tree, moving: Tree, fixed: Tree, before: Params, now: Params) -> Array:
        """|phi(before) - now|^2 / |before - now|^2, (): 1 for examples that do nothing, 0 for those that lead here."""
        reached = phi(self.own_loss, held, before, {**fixed, **moving}, self.recipe.unroll)
        return distance(reached, now) / jnp.maximum(distance(before, now), EPSILON)

    def to_match(self, held: Tree, moving: Tree, batch: Batch, args: tuple[Params, Params]) -> tuple[Array, Metrics]:
        """`match` as the server's trainer has it."""
        return self.match(held, moving, {}, *args), {}

    def project(self, held: Tree, data: Tree, now: Params) -> Params:
        """v = phi_S'(now; D, a); `now` itself where that is not finite."""
        point = phi(self.own_loss, held, now, data, self.recipe.onward)
        finite = jnp.isfinite(distance(point, now))
        return jax.tree.map(lambda v, w: jnp.where(finite, v, w), point, now)

    def resting(self, data: Tree, before: Params, now: Params) -> Tree:
        """The data, with a rate of nothing where the model has not moved: v is then `now`."""
        moved = distance(before, now) > EPSILON
        return {**data, "log_a": jnp.where(moved, data["log_a"], NOTHING)}

    # --- where they are learnt

    def on_client(self, init: str, held: Tree, message: Tree, client: Client, batch: Batch) -> Params:
        """A client's own projected point."""
        before, now = message["before"], message["params"]
        width = now["head/kernel"].shape[:1] if self.features else of_numbers(batch.x)
        moving, fixed = self.noise(client.round, width), {}
        if init == "batch":
            seen = self.task.features(held, now, batch.x) if self.features and self.task.features else batch.x
            moving["x"] = seen.astype(jnp.float32)
            fixed = {"y": batch.y, "mask": batch.mask}
        adam = optax.adam(self.recipe.data_rate)

        def step(carry: Tree, _: None) -> tuple[Tree, None]:
            moving, state = carry
            grads = jax.grad(self.match, argnums=1)(held, moving, fixed, before, now)
            return stepped(adam, grads, state, moving), None

        (moving, _), _ = lax.scan(step, (moving, adam.init(moving)), None, self.recipe.iterations)
        return self.project(held, self.resting({**fixed, **moving}, before, now), now)

    def form(self, server: Server, cohort: Cohort) -> tuple[int, ...]:
        """The shape of a synthetic example.

        Raises:
            ValueError: the server has no example to learn it from, or one that is no array of numbers.
        """
        if self.features:
            return server.params["head/kernel"].shape[:1]
        public = cohort.public
        if public is None:
            raise ValueError(
                "Expected public_share > 0 for algorithm='fed_ptr' where more than the head is trained: the server learns from "
                "these examples what an input looks like; give --public-share 0.01, or where='client'."
            )
        return of_numbers(public)

    # --- the algorithm

    def clients(self, news: str, target: Callable[[Tree, Tree, Client, Batch], Params]) -> Local:
        """FedAvg's clients with a pull to a point, which is computed once, when a client begins.

        Args:
            news: the part of the message that follows from the round before; none came where it is all zeros.
        """
        task, lam = self.task, self.lam

        def pull(w: Params, message: Tree, towards: tuple[Array, Params]) -> Array:
            return lam / 2 * towards[0] * distance(w, towards[1])

        plain = fit(
            task.loss, task.optimizer, task.lr, task.passes, penalty=pull, start=lambda message, _: message["params"]
        )

        def start(held: Tree, message: Tree, client: Client, batch: Batch) -> Any:
            came = jnp.stack([(leaf != 0).any() for leaf in jax.tree.leaves(message[news])]).any()
            point = jax.tree.map(
                lambda v, w: jnp.where(came, v, w), target(held, message, client, batch), message["params"]
            )
            return plain.start(held, message, client, batch)._replace(memory=(came.astype(jnp.float32), point))

        return plain._replace(start=start)

    def algorithm(self, where: str, send: str, init: str, projector: Callable[..., Params] | None = None) -> Algorithm:
        """All together; `projector` (before, now) -> v stands in for what is learnt."""
        task, recipe = self.task, self.recipe
        if where == "client":
            local = self.clients("before", partial(self.on_client, init))
        elif send == "set":
            local = self.clients("set", lambda held, message, *_: self.project(held, message["set"], message["params"]))
        else:
            local = self.clients("point", lambda held, message, *_: message["point"])
        adam = optax.adam(recipe.data_rate)
        train = trainer(self.to_match, adam, batch=1, steps=recipe.iterations)
        update = jax.jit(partial(descend, task.server_optimizer))

        @jax.jit
        def judged(held: Tree, data: Tree, before: Params, now: Params) -> tuple[Tree, Params, Metrics]:
            data = self.resting(data, before, now)
            point = projector(before, now) if projector else self.project(held, data, now)
            far, moved = jnp.sqrt(distance(point, now)), jnp.sqrt(distance(before, now))
            told = {
                "matching": self.match(held, data, {}, before, now),
                "projection": far / jnp.maximum(moved, EPSILON),
            }
            return data, point, told

        def begin(key: Array, held: Tree) -> Server:
            params = task.init(key)
            return Server(params, task.server_optimizer.init(params), jax.tree.map(jnp.copy, params), np.int32(0))

        def round(key: Array, held: Tree, server: Server, cohort: Cohort) -> tuple[Server, Metrics]:
            rounds, told = int(cohort.fetch(server.rounds)), {}
            if where == "client":
                news: Tree = {"before": server.before}
            else:
                data = self.noise(np.int32(cohort.round), self.form(server, cohort))
                if projector is None:
                    data, _, _ = train(held, data, adam.init(data), (), (server.before, server.params), key)
                data, point, told = judged(held, data, server.before, server.params)
                news = {"set": data} if send == "set" else {"point": point}
            # In the first round the same programs run, so that the second one compiles nothing; what they find is not sent.
            news = jax.tree.map(lambda leaf: kept(leaf, np.full(leaf.shape, rounds > 0)), news)
            change, info = cohort.exchange(coded({"params": server.params, **news}, change=False), local)
            new = update(Averaged(server.params, server.optimizer), change, info.weight)
            return Server(new.params, new.optimizer, server.params, np.int32(rounds + 1)), {**info.metrics, **told}

        # Synthetic examples that begin as a client's own batch carry more of it than its gradients do.
        return Algorithm(
            begin,
            round,
            lambda held, server, memory, x: task.logits(held, server.params, x),
            plain_steps=init != "batch",
        )
