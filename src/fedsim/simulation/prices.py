"""What the chosen algorithm sends in a round of a phase, from shapes alone: no values of weights, no data, nothing run."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedsim import algorithms, peft, wire
from fedsim.config import Config
from fedsim.core import Algorithm, Batch, Population, Tree, draw
from fedsim.engine.keys import key_for
from fedsim.engine.pricing import Sends, Setting, Sketch, Unknown, sends
from fedsim.randomness import stream
from fedsim.simulation import private, tasks
from fedsim.simulation.build import Phase
from fedsim.training.server import watched
from fedsim.units import exact_size


class Each(NamedTuple):
    """Bytes of a round, one way, over those who are in it."""

    mean: float
    least: int
    most: int
    together: int
    certainty: (
        str  # "exact"; "at most" where prices depend on values; "about" where they may follow from a run's numbers
    )

    def words(self) -> str:
        """For people: one client's bytes, and how they differ."""
        said = "" if self.certainty == "exact" else f"{self.certainty} "
        among = "" if self.least == self.most else f" on average ({self.least:,} to {self.most:,} B)"
        return f"{said}{exact_size(round(self.mean))}{among}"


class Prices(NamedTuple):
    """What a round of a phase sends."""

    ids: np.ndarray  # (M,): the cohort that was looked at
    up: Each
    down: Each
    leaves: Sends
    setup: int  # bytes that a client is given once


def of_phase(
    phase: Phase,
    model: peft.Model,
    example: Any,
    sizes: np.ndarray | None = None,
    held: tuple[int | None, int | None] = (None, None),
) -> Prices:
    """What the phase's first cohort sends when it meets for the second time.

    In a first round there may be less to tell; who has missed some may be told more.

    Args:
        example: one input as a shape with its dtype, without the batch axis.
        sizes: (N,) examples of each client; default: a batch each.
        held: examples that the server holds without labels, and with; None where their number is unknown.

    Raises:
        ValueError: the algorithm's round reads values, so that it cannot be traced.
    """
    config, size = phase.config, phase.config.batch_size
    own = np.full(config.clients, size) if sizes is None else np.asarray(sizes)
    ids = selected(config, made(phase, model, {}), phase.first, len(own))
    setting = Setting(
        ids=ids,
        sizes=np.where(ids >= 0, own[ids], 0),
        population=len(own),
        batch=batch_of(example, size),
        average=tasks.average(config),
        up=wire.codec(config.codec_up, "codec_up"),
        down=wire.codec(config.codec_down, "codec_down"),
        seed=config.seed,
        public=held[0],
        shard=held[1],
    )
    unknown = Unknown(model.frozen, model.trained, key_shape(), jax.ShapeDtypeStruct((), jnp.float32))
    try:
        found = sends(lambda given: second_round(given, made(phase, model, given.start), setting, phase.first), unknown)
        given_once = jax.eval_shape(made(phase, model, {}).setup, model.frozen)
    except jax.errors.JAXTypeError as error:
        raise ValueError(
            f"Expected algorithm={config.algorithm!r} to be priced by shapes, but its round reads values that only a run has "
            f"({str(error).partition(chr(10))[0]}); take them by cohort.fetch, or let a run of two rounds show its bytes."
        ) from None
    certainty = "about" if found.guessed else "exact"
    up, down = (
        each(total, ids, "at most" if certainty == "exact" and found.bounded[way] else certainty)
        for way, total in (("up", found.total_up), ("down", found.total_down))
    )
    return Prices(ids, up, down, found, sum(wire.price(given_once).values()))


def made(phase: Phase, model: peft.Model, start: dict[str, Any]) -> Algorithm:
    """The phase's algorithm, whose server begins with the trained part `start`."""
    task = tasks.task(phase.config, model, start, cached=False, first=phase.first)
    return private.guarded(phase.config, algorithms.find(phase.config.algorithm)(task))


def second_round(given: Unknown, algorithm: Algorithm, setting: Setting, first: int) -> Sketch:
    """The cohort after its second round, of which `first` is the first."""
    key, members = given.key, len(setting.ids)
    server, averaging = algorithm.init(key_for(key, "init"), given.held), setting.average.init()
    fresh = algorithm.memory(key_for(key, "memory"), given.held)
    memory: Tree = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (members, *jnp.shape(leaf))), fresh)
    last, cohort = np.zeros(members, np.int64), Sketch(given, setting, first, memory, averaging, np.zeros(members))
    with watched(trains=False):
        for round in (first, first + 1):
            cohort = Sketch(given, setting, round, memory, averaging, last)
            stand_in: Any = cohort  # of `engine.cohort.Cohort`
            server, _ = algorithm.round(key_for(key, "server", round), given.held, server, stand_in)
            memory, averaging, last = cohort.memory, cohort.averaging, np.where(cohort.present, round, 0)
    return cohort


def selected(config: Config, algorithm: Algorithm, round: int, clients: int) -> np.ndarray:
    """Who is in a round to which everybody could come, (M,); drawn by lot where the choice is the server's by its state."""
    population, chance = Population(clients, config.clients_per_round), f"sample {round}"
    try:
        return np.asarray(algorithm.select(stream(config.seed, chance), None, population), np.int64)
    except (AttributeError, TypeError):
        return draw(stream(config.seed, chance), None, population)


def each(total: np.ndarray, ids: np.ndarray, certainty: str = "exact") -> Each:
    """Bytes (M,) of a cohort over those who are somebody."""
    real = np.asarray(total)[ids >= 0]
    if not len(real):
        return Each(0.0, 0, 0, 0, certainty)
    return Each(float(real.mean()), int(real.min()), int(real.max()), int(real.sum()), certainty)


def batch_of(example: Any, size: int) -> Batch:
    """The shapes of a batch."""

    def shape(dtype: Any, *axes: int) -> Any:
        return jax.ShapeDtypeStruct(axes, dtype)

    x = jax.tree.map(lambda one: shape(one.dtype, size, *one.shape), example)
    return Batch(x, shape(jnp.int32, size), shape(jnp.float32, size), key_shape(), shape(jnp.int32), shape(jnp.bool_))


def key_shape() -> Any:
    """A random key's."""
    return jax.eval_shape(jax.random.key, 0)
