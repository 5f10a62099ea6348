"""The one table of algorithms: name -> constructor, `(task, **options) -> Algorithm`; and users' own from their files."""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable
from pathlib import Path

from fedsim.algorithms.fed_avg import fed_avg, fed_prox
from fedsim.config import nearest, parse_call, require_known
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
        make = _from_file(Path(file).expanduser(), function)
    elif name in ALGORITHMS:
        make = ALGORITHMS[name]
    else:
        raise ValueError(
            f"Expected algorithm={name!r} to be one of {', '.join(ALGORITHMS)}, or file.py:function"
            f"{nearest(name, ALGORITHMS)}."
        )
    parameters = inspect.signature(make).parameters.values()
    if not any(p.kind is p.VAR_KEYWORD for p in parameters):
        require_known(options, [p.name for p in parameters][1:], f"option of {name}")
    return lambda task: make(task, **options)


def _from_file(file: Path, function: str) -> Callable[..., Algorithm]:
    if not file.is_file():
        raise ValueError(f"Expected algorithm file {str(file)!r} to exist; give its path, like my.py:fed_mine.")
    spec = importlib.util.spec_from_file_location(file.stem, file)
    if spec is None or spec.loader is None:
        raise ValueError(f"Expected algorithm file {str(file)!r} to be Python, ending in .py.")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    made = getattr(module, function, None)
    if not callable(made):
        known = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
        raise ValueError(f"Expected {file} to define a function {function!r}{nearest(function, known)}.")
    return made
