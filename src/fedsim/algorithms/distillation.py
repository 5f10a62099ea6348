"""Learning on the server from what clients' models say of public examples: the models side by side, their answers, a student.

Clients come in architectures, each with a name and a `Task`; one architecture is called "". A client replies with its change
as in FedAvg, and all replies are kept, as it is each model's own answers that count. Labels of public examples are never here:
`cohort.public` has none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from fedsim.config import whole_number
from fedsim.core import Batch, Cohort, Info, Metrics, Params, Task, Tree
from fedsim.folds import Stacked, stack, weighted_sum
from fedsim.training.local import fit
from fedsim.training.optimizers import optimizer
from fedsim.training.server import Run, reader, trainer
from fedsim.wire import coded

By = Mapping[str, Params]  # of each architecture
TINY = 1e-30  # below which a probability is as good as none


class Returned(NamedTuple):
    """What came back of one architecture in a round."""

    models: Params  # (M, ...)
    mean: Params  # their weighted mean; what was sent where nobody replied
    weight: Array  # (M,), float32: 0 for who did not reply


class Lesson(NamedTuple):
    """What a student is to say of public examples, of which there are Q."""

    target: Array  # (Q, C), probabilities
    other: Array  # (Q, C), probabilities of a second teacher
    split: Array  # (Q,), float32: 1 where there is a second one


Exchange = Callable[[By, Mapping[str, Cohort]], tuple[dict[str, Returned], dict[str, Info]]]
Ask = Callable[[Mapping[str, Tree], Mapping[str, Returned], Mapping[str, Tree]], Array]


def exchanging(tasks: Mapping[str, Task]) -> Exchange:
    """A function (parameters, cohorts) -> what came back, what is said of it: FedAvg's clients, whose replies are kept apart.

    A group of which nobody is asked is left out. Folds weigh as the run does (`--weighting`).
    """
    locals_ = {name: fit(task.loss, task.optimizer, task.lr, task.passes) for name, task in tasks.items()}
    folds = {name: stack(task.weight) for name, task in tasks.items()}

    @jax.jit
    def returned(params: Params, stacked: Stacked) -> Returned:
        total = stacked.weight.sum()
        shares = jnp.where(total > 0, stacked.weight / jnp.where(total > 0, total, 1.0), 0.0)
        models = jax.tree.map(jnp.add, params, stacked.replies)
        mean = jax.tree.map(lambda p, c: p + weighted_sum(shares, c), params, stacked.replies)
        return Returned(models, mean, stacked.weight)

    def exchange(params: By, cohorts: Mapping[str, Cohort]) -> tuple[dict[str, Returned], dict[str, Info]]:
        found, infos = {}, {}
        for name, cohort in cohorts.items():
            if len(cohort.ids):
                message = coded(params[name], change=False)
                stacked, infos[name] = cohort.exchange(message, locals_[name], folds[name])
                found[name] = returned(params[name], stacked)
        return found, infos

    return exchange


def asking(tasks: Mapping[str, Task]) -> Ask:
    """A function (held, returned, public x), all by architecture -> logits (Q, M, C) of all clients' models.

    Clients lie architecture by architecture, these by name: a jitted function gets a dict in that order, whatever it was.
    """

    def answers(task: Task) -> Callable[[Tree, Tree, Tree], Array]:
        def read(held: Tree, models: Tree, x: Tree) -> Array:
            of = jax.vmap(lambda one: task.logits(held, one, x), out_axes=1)(models)  # (B, M, C)
            return of.astype(jnp.float32)

        return reader(read)

    ask = {name: answers(task) for name, task in tasks.items()}
    joined = jax.jit(lambda each: jnp.concatenate(each, axis=1))

    def all_of(held: Mapping[str, Tree], returned: Mapping[str, Returned], x: Mapping[str, Tree]) -> Array:
        return joined([ask[name](held[name], returned[name].models, x[name]) for name in sorted(returned)])

    return all_of


def studying(task: Task, optimizer: optax.GradientTransformation, batch: int, steps: int, lam: float = 0.0) -> Run:
    """A trainer of one model on {"x": public examples, "lesson": `Lesson`}: cross-entropy to the target, + lam KL(other || model).

    The divergence counts where there is another teacher, and is of it from the model: the teacher stands first.
    """

    def loss(held: Tree, params: Params, batch: Batch, args: Tree) -> tuple[Array, Metrics]:
        lesson = batch.x["lesson"]
        said = jax.nn.log_softmax(task.logits(held, params, batch.x["x"]).astype(jnp.float32))
        taught = -(lesson.target * said).sum(axis=-1)
        known = jnp.where(lesson.other > 0, jnp.log(jnp.maximum(lesson.other, TINY)), 0.0)
        apart = (lesson.other * (known - said)).sum(axis=-1)
        value = (taught + lam * jnp.where(lesson.split > 0, apart, 0.0)).mean()
        return value, {"server_loss": value}

    return trainer(loss, optimizer, batch, steps)


def present(returned: Mapping[str, Returned]) -> Array:
    """Who replied, (M,), bool, in the order of `asking`'s logits."""
    return jnp.concatenate([returned[name].weight for name in sorted(returned)]) > 0


def told(infos: Mapping[str, Info]) -> Metrics:
    """Metrics of all architectures' clients as one: means, weighted as their replies are."""
    total = sum((info.weight for info in infos.values()), start=jnp.float32(0))

    def mean(name: str) -> Array:
        sums = [jnp.where(info.weight > 0, info.weight * info.metrics[name], 0.0) for info in infos.values()]
        return sum(sums, start=jnp.float32(0)) / jnp.maximum(total, TINY)

    return {name: mean(name) for name in next(iter(infos.values())).metrics} if infos else {}


def refuse_without_public(x: Tree, algorithm: str) -> None:
    """Raises `ValueError` where the server holds no public examples, before a client trains."""
    if x is None:
        raise ValueError(
            f"Expected public_share > 0 for algorithm={algorithm!r}, whose server learns from public examples; give "
            "--public-share 0.1, whose labels nobody reads."
        )


def students(
    task: Task, algorithm: str, steps: int, batch: int, rate: float, transform: str
) -> Callable[[Any], optax.GradientTransformation]:
    """Rate -> the optimizer of a server that learns from its clients.

    Raises:
        ValueError: numbers out of range, an unknown optimizer, a language model.
    """
    whole_number(server_steps=(steps, 0), server_batch=(batch, 1))
    if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not 0 <= rate < float("inf"):
        raise ValueError(f"Expected server_rate={rate!r} >= 0; leave it out.")
    if not all(one.classes for one in (task, *task.groups.values())):
        raise ValueError(
            f"Expected classes for algorithm={algorithm!r}, whose clients answer for public examples; a language model has none."
        )
    return optimizer(transform, "server_optimizer")
