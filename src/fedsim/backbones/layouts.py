"""What a published layout of checkpoints is: where each of our leaves lies in a file, and in which shape. `formats` has them all."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from fedsim.backbones.layers import Shape


class Layout(NamedTuple):
    """How one leaf is stored."""

    shape: Callable[[Shape, Any], Shape]
    """(our shape, the backbone's config) -> the stored shape."""
    axes: tuple[int, ...] | None = None
    """Axes of the stored array in our order; None if both lie in the same order in memory."""

    def ours(self, stored: np.ndarray, shape: Shape) -> np.ndarray:
        """The stored array in our shape."""
        return (stored if self.axes is None else stored.transpose(self.axes)).reshape(shape)

    def theirs(self, leaf: np.ndarray, config: Any) -> np.ndarray:
        """Our leaf as it is stored."""
        shape = self.shape(leaf.shape, config)
        if self.axes is None:
            return leaf.reshape(shape)
        return leaf.reshape([shape[axis] for axis in self.axes]).transpose(np.argsort(self.axes))


SAME = Layout(lambda shape, c: shape)
LINEAR = Layout(lambda shape, c: shape[::-1], (1, 0))  # torch: (out, in)
CONV = Layout(lambda shape, c: (shape[3], shape[2], shape[0], shape[1]), (2, 3, 1, 0))  # torch: (out, in, h, w)

BY_ROLE = {"kernel": LINEAR}
TORCH = {
    "kernel": "weight",
    "scale": "weight",
    "embedding": "weight",
    "mean": "running_mean",
    "variance": "running_var",
}


class Place(NamedTuple):
    """Where a leaf lies: a stored array, or the part-th of `parts` equal parts of one of its axes."""

    name: str
    layout: Layout
    part: int = 0
    parts: int = 1
    axis: int = 0
    """Of the stored array, which is divided."""


class Format(NamedTuple):
    """A published layout."""

    places: Callable[[Any], Mapping[str, str | Place]]
    """The backbone's config -> our module path -> theirs, or our leaf path -> its place."""
    prefixes: tuple[str, ...] = ("",)
    """What may stand in front of all their names, the likeliest first."""
    unused: Mapping[str, str] = {}
    """Patterns of leaves that the architecture may leave behind -> why."""
    config: Callable[[Any], dict[str, Any]] = lambda c: {}
    """The backbone's config -> what `config.json` beside the weights must say where it says anything."""
    said: Callable[[dict[str, Any], str, Any], dict[str, Any]] = lambda said, file, c: said
    """What `config.json` says -> the same by the names of `config`, with its library's defaults; raises `ValueError` for what we
    do not compute."""
    tied: Callable[[Any], Mapping[str, str]] = lambda c: {}
    """The backbone's config -> names of leaves that may be left behind only as they are copies of a leaf of ours."""
    roles: Mapping[str, str] = TORCH
    """Our role -> theirs where it is another."""
    layouts: Mapping[str, Layout] = BY_ROLE
    """Our role -> layout where it is not `SAME`."""
    separator: str = "."
    renamed: tuple[tuple[str, str], ...] = ()
    """Parts of names as published files spell them, and as files or modules of other versions do."""
    causal: str = ""
    """What stands in front of all their names in their model for next tokens."""
    task: tuple[str, str, str] | None = None
    """Prefix and head of their model for classification, and our pooling with which it computes the same."""

    def spelling(self, name: str) -> str:
        """A name as published files spell it."""
        for published, otherwise in self.renamed:
            name = name.replace(otherwise, published)
        return name

    def place(self, path: str, config: Any) -> Place:
        """Where our leaf lies, without prefix."""
        places = self.places(config)
        found = places.get(path)
        if isinstance(found, Place):
            return found
        module, _, role = path.rpartition("/")
        theirs = places[module]
        assert isinstance(theirs, str), f"{module} is a module"
        layout = self.layouts.get(role, SAME)
        return Place(theirs + self.separator + self.roles.get(role, role), layout)
