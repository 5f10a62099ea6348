"""The sentences of refusals that many places share, and how a value is written in them."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from typing import Any


def shown(value: Any) -> str:
    """A value for a message, cut where it is long."""
    try:
        text = repr(value)
    except ValueError:  # an integer of more than 4,300 digits, which Python does not write out
        return f"a number of {value.bit_length()} bits" if isinstance(value, int) else f"a {type(value).__name__}"
    return text if len(text) <= 100 else f"{text[:97]}..."


def positive(**values: Any) -> None:
    """Raises `ValueError` unless every value is above zero; `None` and "auto" mean "not set" and pass."""
    for name, value in values.items():
        if value is None or value == "auto":
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0 or value == float("inf"):
            raise ValueError(f"Expected {name}={shown(value)} > 0; give a positive number.")


def whole_number(**values: tuple[Any, int]) -> None:
    """Raises `ValueError` for what is no whole number, or less than the least one; by name (value, least)."""
    for name, (value, least) in values.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"Expected {name}={shown(value)} >= {least}, a whole number; leave it out, or give one.")


def one_of(allowed: Sequence[str], **values: Any) -> None:
    """Raises `ValueError` unless every value is one of `allowed`, naming the nearest."""
    for name, value in values.items():
        if value not in allowed:
            raise ValueError(
                f"Expected {name}={shown(value)} to be one of {', '.join(allowed)}{nearest(value, allowed)}."
            )


def nearest(word: object, among: Iterable[str]) -> str:
    """` (did you mean ...?)` for a misspelt word, or nothing: in brackets, so that the sentence can go on or end behind it."""
    close = difflib.get_close_matches(word[:100], list(among), n=3, cutoff=0.5) if isinstance(word, str) else []
    return f" (did you mean {' or '.join(close)}?)" if close else ""


def require_known(names: Iterable[str], known: Sequence[str], what: str) -> None:
    """Raises `ValueError` for the first name that is not among the known ones."""
    for name in names:
        if name not in known:
            raise ValueError(f"Expected {what} {shown(name)} to be a known one{nearest(name, known)}.")
