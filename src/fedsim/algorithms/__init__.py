"""The one table of algorithms: name -> constructor, `(task, **options) -> Algorithm`; and users' own from their files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from fedsim import own
from fedsim.algorithms.fed_avg import fed_avg, fed_prox
from fedsim.config import nearest, parse_call
from fedsim.core import Algorithm, Task

ALGORITHMS: dict[str, Callable[..., Algorithm]] = {
    "fed_avg": fed_avg,
    "fed_prox": fed_prox,
}


def find(text: str) -> Callable[[Task], Algorithm]:
    """The constructor that `"fed_prox(mu=0.1)"` or `"my.py:fed_mine(mu=0.1)"` names, its options bound.

    Raises:
        ValueError: an unknown name, file, function or option.
    """
    name, args, options = parse_call(text, "algorithm")
    if args:
        raise ValueError(f"Expected algorithm={text!r} to give its options by name, like fed_prox(mu=0.1).")
    file, colon, function = name.rpartition(":")
    if colon:
        make = own.find(Path(file).expanduser(), function, "algorithm")
        if not callable(make):
            raise ValueError(f"Expected {name!r} to be a function, task -> Algorithm, not {make!r}; give its name.")
    elif name in ALGORITHMS:
        make = ALGORITHMS[name]
    else:
        raise ValueError(
            f"Expected algorithm={name!r} to be one of {', '.join(ALGORITHMS)}, or file.py:function"
            f"{nearest(name, ALGORITHMS)}."
        )
    own.require_options(make, options, name, given=1)
    return lambda task: make(task, **options)
