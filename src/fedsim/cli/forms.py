"""The form of a command line, before its values are read: which options are there, how often, with how many values."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, get_args, get_origin, get_type_hints


def values_of(flag: str, argv: Sequence[str]) -> list[str]:
    """The values that stand behind an option, up to the next one."""
    found: list[str] = []
    for place, word in enumerate(argv):
        name, equals, value = word.partition("=")
        if name.replace("_", "-") == flag:
            found += [value] if equals else []
            found += itertools.takewhile(lambda w: not w.startswith("--"), argv[place + 1 :])
    return found


def arities(kind: type[Any]) -> dict[str, int | None]:
    """How many values each option takes, by its flag: 0, 1, or None for any number."""
    found: dict[str, int | None] = {}
    hints = get_type_hints(kind)
    for option in dataclasses.fields(kind):
        group, hint = option.default_factory, hints[option.name]
        if isinstance(group, type) and dataclasses.is_dataclass(group):
            found |= arities(group)
            continue
        several = any(get_origin(h) is tuple for h in (hint, *get_args(hint)))
        found["--" + option.name.replace("_", "-")] = 0 if hint is bool else None if several else 1
    return found


def check_form(argv: Sequence[str], arity: Mapping[str, int | None]) -> None:
    """Refuses an option that is given twice, of which the last would win, and more values than it has.

    Raises:
        ValueError: names the option, and what to write instead.
    """
    words = [word.partition("=")[0].replace("_", "-") for word in argv if word.startswith("--")]
    flags = ["--" + f[5:] if f.startswith("--no-") and f not in arity else f for f in words]
    for flag in flags:
        if flags.count(flag) > 1:
            several = arity.get(flag, 1) is None
            remedy = f"put all its values behind it, as in {flag} A B" if several else "leave out all but one"
            raise ValueError(f"Expected {flag} once; {remedy}.")
    for flag in flags:
        values = values_of(flag, argv)
        if arity.get(flag) == 0 and values:
            raise ValueError(
                f"Expected {flag} without a value, not {' '.join(values)}; write {flag} or --no-{flag[2:]} alone."
            )
        if arity.get(flag) == 1 and len(values) > 1:
            raise ValueError(
                f"Expected {flag} with one value, not {' '.join(values)}; start the command once for each of them."
            )
