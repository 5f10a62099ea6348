"""Users' own code in Python files: experiments, and the `file.py:name` of an option. No JAX here."""

from __future__ import annotations

import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any

from fedsim.config import nearest, require_known


def require_options(make: Callable[..., Any], options: Mapping[str, Any], name: str, *, given: int = 0) -> None:
    """Raises `ValueError` for an option that `make` does not take; its first `given` parameters are none."""
    parameters = inspect.signature(make).parameters.values()
    if not any(p.kind is p.VAR_KEYWORD for p in parameters):
        require_known(options, [p.name for p in parameters][given:], f"option of {name}")


def execute(file: Path, what: str, *, beside: bool = False) -> ModuleType:
    """Runs a Python file, each time anew, and gives its module.

    Args:
        what: what the file is, for messages.
        beside: it may import the files beside it, as a script may. Not for code that a run keeps a copy of, which is one file.

    Raises:
        ValueError: no such file, or it is not Python.
    """
    if not file.is_file():
        raise ValueError(f"Expected {what} file {str(file)!r} to exist; give its path, like my.py.")
    # Under its path: a name of its own for dataclasses and flax, which look their module up, and no other module's.
    spec = importlib.util.spec_from_file_location(str(file.resolve()), file)
    if spec is None or spec.loader is None:
        raise ValueError(f"Expected {what} file {str(file)!r} to be Python, ending in .py.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    with importable(file.resolve().parent) if beside else nullcontext():
        spec.loader.exec_module(module)
    return module


@contextmanager
def importable(folder: Path) -> Iterator[None]:
    """The folder's files can be imported, before others of the same name."""
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))


def find(file: Path, name: str, what: str) -> Any:
    """The value of a name in a file.

    Raises:
        ValueError: as `execute`, or the file does not define it; the nearest names are given.
    """
    module = execute(file, what)
    if not hasattr(module, name):
        known = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
        raise ValueError(f"Expected {file} to define {name!r}{nearest(name, known)}; mend the {what}'s name.")
    return getattr(module, name)
