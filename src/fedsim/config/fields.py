"""The one gate for types: a value against the annotation of its option, whichever door it came through.

The command line, Python, experiment files, resumed and loaded configs all make a `Config` or a `Speed`, whose fields pass
here; so do the options of algorithms, augmentations and laws, against their functions' annotations.
"""

from __future__ import annotations

import collections.abc
import dataclasses
import functools
import math
import os
import types
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

from fedsim.config.words import nearest, shown

SMALLEST, LARGEST = 1e-37, 3.4e38  # of float32: what is computed with must be neither zero nor infinite there
WHOLE = 2**63 - 1  # the largest whole number of any array


class Refused(NamedTuple):
    """Why a value is not of a type, and what to give instead."""

    rule: str
    remedy: str


def gate(options: Any) -> None:
    """Takes every field of a frozen dataclass as its annotation says; NumPy's scalars become Python's, lists tuples.

    Raises:
        ValueError: names option, value, rule and remedy.
    """
    for field in dataclasses.fields(options):
        value, hint = getattr(options, field.name), _hints(type(options))[field.name]
        taken = take(value, hint, field.name, default=field.default)
        if taken is not value:
            object.__setattr__(options, field.name, taken)  # frozen for others, and not yet made


def take_call(make: Callable[..., Any], values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Options of a call as the function's annotations say; what has none, or an unknown one, passes as it is.

    Args:
        where: the call, for messages: `algorithm='fed_prox(mu=1)'`.

    Raises:
        ValueError: names option, value, call, rule and remedy.
    """
    try:
        hints = get_type_hints(make)
    except (
        NameError,
        TypeError,
        AttributeError,
    ):  # of a user's own function, with names that are imported for types alone
        return dict(values)
    return {name: take(value, hints.get(name, Any), name, where=where) for name, value in values.items()}


def take(value: Any, hint: Any, name: str, *, default: Any = None, where: str = "") -> Any:
    """The value as a plain Python value of the annotated type.

    Args:
        default: of the option, as an example in the remedy.
        where: of what it is an option, where it is none of the config.

    Raises:
        ValueError: it is not of that type.
    """
    value = plain(value)
    kinds = get_args(hint) if get_origin(hint) in (types.UnionType, Union) else (hint,)
    reasons = []
    for kind in kinds:
        taken = _as(value, kind, default)
        if not isinstance(taken, Refused):
            return taken
        reasons.append(taken)
    fits = [r for r, kind in zip(reasons, kinds, strict=True) if kind is not type(None)]
    words = " or ".join(dict.fromkeys(r.rule for r in fits))
    of = f" of {where}" if where else ""
    raise ValueError(f"Expected {name}={shown(value)}{of} to be {words}; {fits[0].remedy}.")


def plain(value: Any) -> Any:
    """Python's own value of a scalar of NumPy or JAX; anything else as it is."""
    library = type(value).__module__.partition(".")[0]
    if library in ("numpy", "jax", "jaxlib") and getattr(value, "shape", None) == () and hasattr(value, "item"):
        return value.item()
    return value


def finite(value: Any) -> bool:
    """Whether all numbers of nested literals can be computed with: none infinite, NaN or too large."""
    if isinstance(value, (tuple, list)):
        return all(map(finite, value))
    if isinstance(value, dict):
        return all(map(finite, (*value, *value.values())))
    return abs(value) <= WHOLE if isinstance(value, int) else not isinstance(value, float) or _is_single(value)


def _is_single(value: float) -> bool:
    return value == 0 or SMALLEST <= abs(value) <= LARGEST


@functools.cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)


def _as(value: Any, kind: Any, default: Any) -> Any:
    """The value as this type, or why not."""
    if kind is type(None):
        return value if value is None else Refused("None", "leave it out")
    if kind is bool:
        return value if type(value) is bool else Refused("True or False", "give one of them")
    if kind is int:
        return _as_whole(value, default)
    if kind is float:
        return _as_number(value, default)
    if kind is str:
        return _as_text(value)
    origin = get_origin(kind)
    if origin is Literal:
        return value if isinstance(value, str) and value in get_args(kind) else _other(value, get_args(kind))
    if origin in (tuple, collections.abc.Sequence):
        return _as_several(value, get_args(kind)[0])
    return value


def _as_whole(value: Any, default: Any) -> Any:
    if type(value) is not int:
        example = default if type(default) is int else 3
        fraction = isinstance(value, float) and math.isfinite(value)
        return Refused("a whole number", "leave out the fraction" if fraction else f"give one, like {example}")
    return value if abs(value) <= WHOLE else Refused("a whole number that fits an array", "give a smaller one")


def _as_number(value: Any, default: Any) -> Any:
    example = default if type(default) is float else 0.1
    if type(value) not in (int, float):
        return Refused("a number", f"give one, like {example}")
    if not (abs(value) <= LARGEST and _is_single(value)):
        return Refused(f"0 or a finite number from {SMALLEST} to {LARGEST} in size", f"give one, like {example}")
    return float(value)


def _as_text(value: Any) -> Any:
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if not isinstance(value, str) or not value.strip():
        return Refused("a text that is not empty", "give one, or leave the option out")
    if "\0" in value or any("\ud800" <= letter <= "\udfff" for letter in value):
        return Refused("a text of Unicode without NUL", "correct it, or rename the file")
    return str.__str__(value)  # of a str, or the value of an enum of texts


def _as_several(value: Any, kind: Any) -> Any:
    if isinstance(value, str):
        return Refused("several, not one text", f"write ({shown(value)},)")
    if not isinstance(value, (tuple, list)):
        return Refused("several", "write them in brackets, like ('a', 'b') or (4, 8)")
    taken = tuple(_as(plain(one), kind, None) for one in value)
    wrong = next((one for one in taken if isinstance(one, Refused)), None)
    return taken if wrong is None else Refused(f"several, each {wrong.rule}", "correct them")


def _other(value: Any, allowed: tuple[str, ...]) -> Refused:
    if len(allowed) == 1:
        return Refused(f"{allowed[0]!r}", f"give {allowed[0]}")
    return Refused(f"one of {', '.join(allowed)}{nearest(value, allowed)}", "give one of them")
