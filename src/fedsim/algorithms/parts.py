"""Which leaves of a model are personal and which are shared, by the patterns of their paths; what clients start from."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import NamedTuple

import jax

from fedsim.core import Params, Passes, Task

HEAD = ("head/*",)


class Parts(NamedTuple):
    """The trained leaves by who has them."""

    personal: tuple[str, ...]  # paths, in order
    shared: tuple[str, ...]


def matched(task: Task, patterns: Sequence[str], option: str, algorithm: str, none: str) -> tuple[str, ...]:
    """Paths of the trained leaves that match a pattern, in order.

    Args:
        option, algorithm: their names, and `none` what else can be given, for what is refused.

    Raises:
        ValueError: a pattern without a leaf.
    """
    for pattern in patterns:
        if not any(fnmatchcase(path, pattern) for path in task.trained):
            raise ValueError(
                f"Expected {option}={patterns!r} to match trained leaves of {algorithm}, but {pattern!r} matches none of "
                f"{', '.join(sorted(task.trained))}; mend it, or {none}."
            )
    return tuple(sorted(p for p in task.trained if any(fnmatchcase(p, pattern) for pattern in patterns)))


def divided(task: Task, personal: Sequence[str], algorithm: str) -> Parts:
    """The trained leaves, of which those that match a pattern like `head/*` stay with their client.

    Args:
        personal: patterns of paths; () for none, so that everything is shared.
        algorithm: its name, for what is refused.

    Raises:
        ValueError: a pattern without a leaf, or nothing left to share.
    """
    own = matched(task, personal, "personal", algorithm, "give personal=() to share everything")
    shared = tuple(sorted(task.trained - set(own)))
    if not shared:
        raise ValueError(
            f"Expected personal={personal!r} to leave {algorithm} something to share, but it covers all of {', '.join(own)}; "
            "train more than the head (--peft, --head-rounds 0), or take --algorithm local_only."
        )
    return Parts(own, shared)


def pick(params: Params, paths: Sequence[str]) -> Params:
    """These leaves."""
    return {path: params[path] for path in paths}


def start(task: Task) -> Params:
    """What every client starts from: the run's first parameters, which are the same whatever the key."""
    return task.init(jax.random.key(0))


def own_passes(task: Task, epochs: int | None, option: str = "personal_epochs") -> Passes:
    """How clients go over their data for the personal part: in batches of its own, so that the shared part's stay as they are.

    Args:
        epochs: whole passes; None: as the run's.
        option: its name, for what is refused.

    Raises:
        ValueError: no number of epochs.
    """
    passes = task.passes._replace(stream="personal")
    if epochs is None:
        return passes
    if epochs < 0:
        raise ValueError(f"Expected {option}={epochs} >= 0; leave it out for as many as the run's.")
    return passes._replace(epochs=epochs, steps=None)


def rate(name: str, value: float) -> float:
    """A factor of the run's learning rate.

    Raises:
        ValueError: it is no finite number >= 0.
    """
    if not 0 <= value < float("inf"):
        raise ValueError(
            f"Expected {name}={value} >= 0, a factor of the clients' learning rate; 1.0 leaves it as it is."
        )
    return value
