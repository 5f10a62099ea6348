"""What the chosen algorithm sends in a round of a phase, from shapes alone: no values of weights, no data, nothing run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedsim import algorithms, peft, wire
from fedsim.config import Config, groups_of, scored
from fedsim.core import Algorithm, Batch, Population, Tree, draw
from fedsim.engine.keys import key_for
from fedsim.engine.pricing import GroupedSketch, Sends, Setting, Sketch, Unknown, sends
from fedsim.simulation import build, groups, private, tasks
from fedsim.simulation.build import Phase
from fedsim.training.server import watched
from fedsim.units import exact_size

Models = peft.Model | dict[str, peft.Model]  # of several architectures by group


class Each(NamedTuple):
    """Bytes of a round, one way, over those who are in it."""

    mean: float
    least: int
    most: int
    together: int
    certainty: (
        str  # "exact"; "at most" where prices depend on values; "about" where they may follow from a run's numbers
    )
    first: int = 0  # bytes more in a phase's first round, whose message travels whole before its changes do

    def over(self, rounds: int) -> int:
        """Bytes of so many rounds of a phase."""
        return rounds * self.together + self.first

    def words(self) -> str:
        """For people: one client's bytes, and how they differ."""
        said = "" if self.certainty == "exact" else f"{self.certainty} "
        among = "" if self.least == self.most else f" on average ({self.least:,} to {self.most:,} B)"
        return f"{said}{exact_size(round(self.mean))}{among}"


class Prices(NamedTuple):
    """What a round of a phase sends."""

    cohorts: dict[str, np.ndarray]  # (M,) ids that were looked at, by group; "" where there is one architecture
    up: Each
    down: Each
    leaves: Sends
    setup: dict[str, int]  # bytes that a client is given once, by group

    @property
    def ids(self) -> np.ndarray:
        """(M,): the whole cohort, groups in a row."""
        return np.concatenate(list(self.cohorts.values()))


def of_phase(
    phase: Phase,
    model: Models,
    example: Any,
    sizes: np.ndarray | None = None,
    held: tuple[int | None, int | None] = (None, None),
) -> Prices:
    """What the phase's first cohort sends when it meets for the second time.

    In a first round there may be less to tell; who has missed some may be told more. Where messages are changes of what all
    clients hold, that round is looked at too, as its messages are whole.

    Args:
        model: of several architectures each group's by name.
        example: one input as a shape with its dtype, without the batch axis.
        sizes: (N,) examples of each client; default: a batch each.
        held: examples that the server holds without labels, and with; None where their number is unknown.

    Raises:
        ValueError: the algorithm's round reads values, so that it cannot be traced; groups that do not fit it.
    """
    config, size = phase.config, phase.config.batch_size
    own = np.full(config.clients, size) if sizes is None else np.asarray(sizes)
    algorithm = made(phase, model, {})
    build.refuse_groups(config, algorithm)
    build.refuse_missing(config, algorithm)
    chosen = cohorts(config, algorithm, phase.first, len(own))
    settings = {
        name: Setting(
            ids=ids,
            sizes=np.where(ids >= 0, own[ids], 0),
            population=len(own),
            batch=batch_of(example, size),
            average=tasks.average(config, algorithm.releases),
            up=private.up(config, algorithm.releases),
            down=wire.codec(config.codec_down, "codec_down"),
            seed=config.seed,
            public=held[0],
            shard=held[1],
        )
        for name, ids in chosen.items()
    }
    frozen: Any = model.frozen if isinstance(model, peft.Model) else {name: one.frozen for name, one in model.items()}
    trained: Any = (
        model.trained if isinstance(model, peft.Model) else {name: one.trained for name, one in model.items()}
    )
    unknown = Unknown(frozen, trained, key_shape(), jax.ShapeDtypeStruct((), jnp.float32))
    try:
        found = sends(
            lambda given: second_round(given, made(phase, model, given.start), settings, phase.first), unknown
        )
        once = {name: jax.eval_shape(lambda held, start: made(phase, model, start).setup(held),
                                     frozen[name] if name else frozen, trained) for name in settings}  # fmt: skip
    except jax.errors.JAXTypeError as error:
        raise ValueError(
            f"Expected algorithm={config.algorithm!r} to be priced by shapes, but its round reads values that only a run has "
            f"({str(error).partition(chr(10))[0]}); take them by cohort.fetch, or let a run of two rounds show its bytes."
        ) from None
    certainty = "about" if found.guessed else "exact"
    ids = np.concatenate(list(chosen.values()))
    up, down = (
        each(total, ids, "at most" if certainty == "exact" and found.bounded[way] else certainty)
        for way, total in (("up", found.total_up), ("down", found.total_down))
    )
    if wire.of_changes(wire.codec(config.codec_down)) is not None:
        begun = sends(
            lambda given: rounds_of(given, made(phase, model, given.start), settings, phase.first, 1), unknown
        )
        down = down._replace(first=int(begun.total_down.sum()) - down.together)
    return Prices(chosen, up, down, found, {name: sum(wire.price(given).values()) for name, given in once.items()})


def models_of(config: Config, make: Callable[[Config], peft.Model]) -> Models:
    """The config's model, or of several architectures each group's by name.

    Args:
        make: the model of a config without groups.
    """
    return {group.name: make(group.config) for group in groups_of(config)} or make(config)


def scored_of(config: Config, models: Models) -> peft.Model:
    """The model that is scored and exported."""
    return models if isinstance(models, peft.Model) else models[scored(config)]


def made(phase: Phase, model: Models, start: dict[str, Any]) -> Algorithm:
    """The phase's algorithm, whose server begins with the trained part `start`; of several groups with each one's by name."""
    config = phase.config
    if isinstance(model, peft.Model):
        whole, sides = tasks.task(config, model, start, cached=False, first=phase.first), {}
    else:
        sides = {
            group.name: tasks.task(
                group.config, model[group.name], start.get(group.name, {}), cached=False, first=phase.first
            )
            for group in groups_of(config)
        }
        whole = sides[scored(config)]
    return private.guarded(config, algorithms.find(config.algorithm)(whole._replace(groups=sides)))


def second_round(given: Unknown, algorithm: Algorithm, settings: dict[str, Setting], first: int) -> dict[str, Sketch]:
    """The cohort after its second round, of which `first` is the first; by group, "" where there is one architecture."""
    return rounds_of(given, algorithm, settings, first, 2)


def rounds_of(
    given: Unknown, algorithm: Algorithm, settings: dict[str, Setting], first: int, count: int
) -> dict[str, Sketch]:
    """As `second_round`, after so many rounds."""
    server = algorithm.init(key_for(given.key, "init"), given.held)
    sketches = {
        name: joining(given._replace(held=given.held[name]) if name else given, algorithm, one, first)
        for name, one in settings.items()
    }
    with watched(trains=False):
        for round in range(first, first + count):
            if round > first:
                sketches = {name: again(one, round) for name, one in sketches.items()}
            stand_in: Any = sketches.get("") or GroupedSketch(given.held, round, sketches)  # of a cohort
            server, _ = algorithm.round(key_for(given.key, "server", round), given.held, server, stand_in)
    return sketches


def joining(given: Unknown, algorithm: Algorithm, setting: Setting, round: int) -> Sketch:
    """A cohort that was never there before."""
    members = len(setting.ids)
    fresh = algorithm.memory(key_for(given.key, "memory"), given.held)
    memory: Tree = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (members, *jnp.shape(leaf))), fresh)
    return Sketch(given, setting, round, memory, setting.average.init(), np.zeros(members, np.int64))


def again(sketch: Sketch, round: int) -> Sketch:
    """The same cohort, in its next round."""
    last = np.where(sketch.present, sketch.round, 0)
    return Sketch(sketch.given, sketch.setting, round, sketch.memory, sketch.averaging, last, sketch.copies)


def cohorts(config: Config, algorithm: Algorithm, round: int, clients: int) -> dict[str, np.ndarray]:
    """Who is in a round to which everybody could come, (M,), by group; "" where there is one architecture."""
    if not config.groups:
        return {"": selected(config, algorithm, round, np.arange(clients))}
    found = groups.members(config, clients)
    return {
        name: selected(config, algorithm, round, found[name], name, share)
        for name, share in groups.shares(found).items()
    }


def selected(
    config: Config, algorithm: Algorithm, round: int, members: np.ndarray, group: str = "", share: float = 1.0
) -> np.ndarray:
    """Whom of `members` a round asks, (M,); drawn by lot where the choice is the server's by its state.

    Args:
        share: of the clients of a round that are this group's.
    """
    asked = groups.asked(config.clients_per_round, share)
    population = Population(len(members), min(asked, len(members)), round=round)
    try:
        places = np.asarray(algorithm.select(groups.chance(config.seed, round, group), None, population), np.int64)
    except (AttributeError, TypeError):
        places = draw(groups.chance(config.seed, round, group), None, population)
    return np.where(places >= 0, members[places], -1)


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


def mean_setup(config: Config, clients: int, setup: dict[str, int]) -> int:
    """What a client is given once, bytes by group, as the mean over all clients."""
    if "" in setup:
        return setup[""]
    found = groups.members(config, clients)
    return round(sum(len(found[name]) * nbytes for name, nbytes in setup.items()) / clients)
