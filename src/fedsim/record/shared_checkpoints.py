"""The checkpoints of one run, for one process or several: process 0 writes and reads them, every process gets them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from fedsim.core import Tree
from fedsim.engine import processes
from fedsim.record.checkpoint import KEEP, Checkpoints, place

Template = Callable[[int, dict[str, Any]], Tree]
Expect = Callable[[int, dict[str, Any]], Mapping[str, Any]]


class SharedCheckpoints:
    """`checkpoint.Checkpoints` of which only process 0 has the folder. All its methods are called by all processes.

    With one process it is that class and nothing more.
    """

    def __init__(self, directory: Path, keep: int | None = None) -> None:
        self._own: Checkpoints | None = None
        processes.by_first(lambda: self._open(directory, keep or KEEP))

    def _open(self, directory: Path, keep: int) -> None:
        self._own = Checkpoints(directory, keep)

    def __enter__(self) -> SharedCheckpoints:
        return self

    def __exit__(self, *raised: Any) -> None:
        if self._own is not None:  # alone: where a process fails, the others may be gone
            self._own.__exit__(*raised)

    def clear(self, keep: Callable[[], Collection[str]] = tuple) -> None:
        """Removes all checkpoints, and the rows of clients' memory that lie beside them: of a run that is over.

        Args:
            keep: names the rows that stay; asked in process 0.
        """
        processes.by_first(lambda: self.own.clear(keep()))

    def save(self, round: int, arrays: Tree, extra: Mapping[str, Any]) -> bool:
        """As `Checkpoints.save`; arrays on the devices are replicated ones."""
        arrays = processes.local(arrays)
        return processes.by_first(lambda: self.own.save(round, arrays, extra))

    def wait(self) -> None:
        """As `Checkpoints.wait`."""
        processes.by_first(lambda: self.own.wait())

    def restore(
        self, template: Template, expect: Expect, damage: Callable[[Tree], str | None] = lambda arrays: None
    ) -> tuple[int, Tree, dict[str, Any]] | None:
        """As `Checkpoints.restore`; with several processes, arrays come back as values of the host.

        Building a template may take all processes: process 0 tells the others which checkpoint it tries.
        """
        if not processes.several():
            return self.own.restore(template, expect, damage)
        if not processes.is_first():
            return follow(template)

        def tried(round: int, extra: dict[str, Any]) -> Tree:
            processes.share(("try", (round, extra)))
            return jax.tree.map(shape_of, template(round, extra))

        try:
            found = self.own.restore(tried, expect, damage)
        except Exception as error:
            processes.share(("failed", processes.outcome_of(error)))
            raise
        processes.share(("found", None if found is None else (found[0], sendable(found[1]), found[2])))
        return found

    @property
    def own(self) -> Checkpoints:
        """The folder; of process 0."""
        if self._own is None:
            raise ValueError("Expected process 0: only it reads and writes the run's folder.")
        return self._own


def follow(template: Template) -> tuple[int, Tree, dict[str, Any]] | None:
    """What process 0 restores; the template is built for each checkpoint that it tries."""
    like: Tree = None
    while True:
        said: tuple[str, Any] = ("", None)  # of process 0
        what, value = processes.share(said)
        if what == "try":
            like = jax.tree.map(shape_of, template(*value))
        elif what == "failed":
            raise (OSError if value[0] == "OSError" else ValueError)(value[1])
        elif value is None:
            return None
        else:
            round, leaves, extra = value
            shapes, structure = jax.tree.flatten(like)
            placed = [place(received(leaf), shape) for leaf, shape in zip(leaves, shapes, strict=True)]
            return round, jax.tree.unflatten(structure, placed), extra


def sendable(tree: Tree) -> list[Any]:
    """The leaves of a restored tree as `pickle` has them."""
    return [
        (str(jax.random.key_impl(leaf)), np.asarray(jax.random.key_data(leaf)))
        if processes.is_key(leaf)
        else jax.device_get(leaf)
        for leaf in jax.tree.leaves(tree)
    ]


def received(leaf: Any) -> Any:
    """The inverse of `sendable`, of one leaf."""
    return jax.random.wrap_key_data(leaf[1], impl=leaf[0]) if isinstance(leaf, tuple) else leaf


def shape_of(leaf: Any) -> Any:
    """A leaf of a template without its place, which would take all processes."""
    if not isinstance(leaf, jax.Array):
        return leaf
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, weak_type=not processes.is_key(leaf) and leaf.weak_type)
