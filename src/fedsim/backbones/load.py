"""Published checkpoints as they are: names and layouts mapped to ours, nothing missing, left over or misshapen.

Every name and shape is compared before the first array is read. The layouts are in `formats`, the files in `sources`.
"""

from __future__ import annotations

import fnmatch
import math
import os
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from fedsim.backbones import Backbone, Row, backbone
from fedsim.backbones import row as table_row
from fedsim.backbones.formats import FORMATS
from fedsim.backbones.json_files import read_object
from fedsim.backbones.layers import initial
from fedsim.backbones.layouts import Format, Place
from fedsim.backbones.sources import FLOATS, Source, hub, is_hub_name, open_source

Shapes = Mapping[str, jax.ShapeDtypeStruct]
Weights = str | os.PathLike[str] | None
POSITION = "embeddings/position"  # of a vision transformer: the one leaf whose shape depends on the image size
# What training wrappers put in front of every name: DataParallel, Lightning and others, torch.compile.
WRAPPERS = ("", "module.", "model.", "module.model.", "model.module.", "_orig_mod.", "module._orig_mod.")


class Match(NamedTuple):
    """A checkpoint that fits a backbone leaf by leaf."""

    source: Source
    layout: Format
    before: tuple[str, ...]
    """What stands in front of names of the file: nothing, a wrapper's prefix, the format's after it."""
    places: dict[str, Place]
    """Our path -> where the leaf lies, its name as it is in the file."""

    def is_unused(self, name: str, why: str = "") -> bool:
        """Whether the format lets a leaf of that name be left behind, for a reason with these words in it."""
        patterns = [pattern for pattern, reason in self.layout.unused.items() if why in reason]
        return any(fnmatch.fnmatchcase(name, front + q) for q in patterns for front in self.before)


def load(name: str, weights: Weights, shapes: Shapes, seed: int = 0) -> dict[str, np.ndarray]:
    """Every published leaf of a backbone, float32.

    Args:
        name: of the backbone.
        weights: file, directory or hub name of a checkpoint; "random" for initial values drawn from `seed` and the
            leaf's path; None for the packaged weights.
            Positions that a vision transformer learned at another image size keep their grid, whatever `shapes` says:
            the forward pass resamples them, once, to that of the image.
        shapes: the published leaves, by our paths.

    Raises:
        ValueError: leaves are missing, left over or misshapen (all are listed), of a type that is no weight's, not finite,
            or there is no checkpoint to read.
    """
    own = backbone(name)
    if isinstance(own, Backbone):
        refuse_weights(name, weights)
        return {path: value for path, value in own.values().items() if path in shapes}
    if weights is not None and os.fspath(weights) == "random":
        return random(shapes, seed)
    if own.encoders:
        return fused(own, shapes, seed)
    found = find(name, weights, shapes)
    refuse_untied(found, table_row(name))
    return {path: _read(found.source, place, shapes[path].shape) for path, place in found.places.items()}


def refuse_untied(found: Match, row: Row) -> None:
    """Raises `ValueError` for a leaf that would be left behind as a copy of another, and is none."""
    for theirs, path in found.layout.tied(row.config).items():
        for name in {front + theirs for front in found.before} & found.source.shapes.keys():
            place = found.places[path]
            if not np.array_equal(found.source.read(name), found.source.read(place.name)):
                raise ValueError(
                    f"Expected {name!r} of weights={str(found.source.file)!r} to be a copy of {place.name!r}, as in all models of "
                    "this backbone; it has other values: choose a backbone whose output is a matrix of its own."
                )


def stored_shapes(name: str, weights: Weights, shapes: Shapes) -> dict[str, jax.ShapeDtypeStruct]:
    """The published leaves with the shapes that `load` would give them: a given checkpoint's positions keep their grid.

    Reads the names and shapes of a file, a folder or a hub model that was downloaded before, no values. Random and packaged
    weights have the table's shapes.

    Raises:
        ValueError: as `load`.
    """
    own = backbone(name)
    if isinstance(own, Backbone):
        refuse_weights(name, weights)
    elif own.encoders:
        found = {
            p: s for e in divided(own, shapes) for p, s in e.under(stored_shapes(e.name, e.weights, e.shapes)).items()
        }
        return {**shapes, **found}
    elif weights is not None and os.fspath(weights) != "random":
        found = find(name, weights, shapes, fetch=False)
        if POSITION in shapes:
            grid = found.source.shapes[found.places[POSITION].name][1:]  # without the axis of one example
            return {**shapes, POSITION: jax.ShapeDtypeStruct(grid, shapes[POSITION].dtype)}
    return dict(shapes)


class Part(NamedTuple):
    """An encoder of a fused backbone, by the names that its leaves would have alone."""

    name: str
    weights: str | None
    """"random" where it has no published checkpoint and none is given."""
    front: str
    shapes: dict[str, jax.ShapeDtypeStruct]

    def under(self, leaves: Mapping[str, Any]) -> dict[str, Any]:
        """Leaves of the encoder by their names in the fused backbone."""
        return {self.front + path: leaf for path, leaf in leaves.items()}


def divided(row: Row, shapes: Shapes) -> list[Part]:
    """The encoders of a fused backbone with their leaves."""
    parts = []
    for number, encoder in enumerate(row.encoders):
        front = f"encoders/{number}/"
        own = {path.removeprefix(front): leaf for path, leaf in shapes.items() if path.startswith(front)}
        unpublished = encoder.weights is None and not encoder.row.formats
        parts.append(Part(encoder.name, "random" if unpublished else encoder.weights, front, own))
    return parts


def fused(row: Row, shapes: Shapes, seed: int) -> dict[str, np.ndarray]:
    """Every leaf of a fused backbone: its encoders' from their checkpoints, the others at random."""
    values = random(shapes, seed)  # two random encoders of one name differ, as their paths do
    for part in divided(row, shapes):
        if part.weights != "random":
            values |= part.under(load(part.name, part.weights, part.shapes, seed))
    return values


def refuse_weights(name: str, weights: Weights) -> None:
    """Raises `ValueError` for weights beside those that a user's own backbone brings."""
    if weights is not None:
        raise ValueError(
            f"Expected weights={os.fspath(weights)!r} to be unset for backbone={name!r}; it brings its params itself."
        )


def random(shapes: Shapes, seed: int = 0) -> dict[str, np.ndarray]:
    """Initial values for leaves by their roles; a leaf's value depends on the seed and its path only."""
    return {path: np.asarray(value) for path, value in draw(jax.random.key(seed), shapes).items()}


def draw(key: jax.Array, shapes: Shapes) -> dict[str, jax.Array]:
    """Initial values from a key; can be traced."""
    # crc32 of the path: a fixed number for every leaf, the same in every process and model.
    return {
        path: initial(path, jax.random.fold_in(key, zlib.crc32(path.encode())), leaf.shape)
        for path, leaf in shapes.items()
    }


def find(name: str, weights: Weights, shapes: Shapes, *, fetch: bool = True) -> Match:
    """The checkpoint, compared with the backbone's config and leaves; no array is read.

    Args:
        fetch: whether a hub model may be downloaded.

    Raises:
        ValueError: as `load`.
    """
    row = table_row(name)
    if not row.formats:
        given = None if weights is None else os.fspath(weights)
        raise ValueError(f"Expected weights={given!r} of backbone={name!r} to be 'random'; it has no checkpoint.")
    return match(open_source(locate(name, weights, fetch=fetch)), row, shapes)


def locate(name: str, weights: Weights, *, fetch: bool = True) -> Path:
    """File or folder of a backbone's weights: as given, of the hub, or packaged.

    Raises:
        ValueError: none are packaged, or the hub cannot be reached; without `fetch`, the model was not downloaded before.
    """
    if weights is None:
        return packaged(name, backbone(name).asset)
    weights = os.fspath(weights)
    return hub(weights, fetch=fetch) if is_hub_name(weights) else Path(weights).expanduser()


def check_config(file: Path, layout: Format, config: Any) -> None:
    """Compares `config.json` beside the weights, where there is one, with the backbone.

    Raises:
        ValueError: the checkpoint is of another model; every difference is listed. It is no such config.
    """
    beside = file.parent / "config.json"
    if not beside.is_file():
        return
    remedy = "take the one that came with the weights, or remove it"
    expected = layout.config(config)
    said = layout.said(read_object(beside, remedy), str(beside), config)
    if expected and not expected.keys() & said.keys():
        raise ValueError(f"Expected {beside} to say model_type and more of a model, as the hub's do; {remedy}.")
    both = [(name, said[name], value) for name, value in expected.items() if name in said]
    for name, theirs, ours in both:
        if theirs is not None and _kind(theirs) != _kind(ours):
            raise ValueError(f"Expected {name}={theirs!r} of {beside} to be a {_kind(ours)}; {remedy}.")
    wrong = [f"{name}={theirs!r}, not {ours!r}" for name, theirs, ours in both if theirs != ours]
    if wrong:
        raise ValueError(
            f"Expected weights={str(file)!r} to be of this backbone; its config.json says {'; '.join(wrong)}: "
            "choose the backbone that it is of."
        )


def _kind(value: Any) -> str:
    """Kind of a JSON value, for people."""
    named = ((bool, "flag (true or false)"), ((int, float), "number"), (str, "text"), (list, "list"))
    return next((name for types, name in named if isinstance(value, types)), "table")


def match(source: Source, row: Row, shapes: Shapes) -> Match:
    """Where every leaf lies, after comparing all names, shapes and types.

    Raises:
        ValueError: the file is of another model, or lists every missing, left over and misshapen leaf; a leaf is of a
            type that is no weight's.
    """
    spellings = {layout: {FORMATS[layout].spelling(n): n for n in source.shapes} for layout in row.formats}
    wanted = {layout: {path: FORMATS[layout].place(path, row.config) for path in shapes} for layout in row.formats}
    fronts = [
        (name, wrapper, prefix)
        for name in row.formats
        for wrapper in WRAPPERS
        for prefix in FORMATS[name].prefixes
        if not wrapper or FORMATS[name].separator == "."
    ]
    # The layout, wrapper and prefix under which most leaves are found; the first of equals.
    name, wrapper, prefix = max(
        fronts, key=lambda k: sum(k[1] + k[2] + place.name in spellings[k[0]] for place in wanted[k[0]].values())
    )
    layout, named = FORMATS[name], spellings[name]
    check_config(source.file, layout, row.config)
    places = {path: place._replace(name=wrapper + prefix + place.name) for path, place in wanted[name].items()}
    found = Match(source, layout, ("", wrapper, wrapper + prefix), places)
    _compare(found, named, row, shapes)
    found = found._replace(places={path: p._replace(name=named[p.name]) for path, p in places.items()})
    check_kinds(source, [place.name for place in found.places.values()])
    return found


def _compare(found: Match, named: Mapping[str, str], row: Row, shapes: Shapes) -> None:
    """Compares names and shapes.

    Args:
        named: names as published files spell them -> as they are in the file.

    Raises:
        ValueError: lists every missing, left over, misshapen leaf, and every leaf that is there in two spellings.
    """
    source, places = found.source, found.places
    missing = {place.name: path for path, place in places.items() if place.name not in named}
    misshapen = {
        place.name: f"{place.name}: {source.shapes[named[place.name]]}, not {shape}"
        for path, place in places.items()
        if place.name in named
        and source.shapes[named[place.name]] != (shape := _stored_shape(place, shapes[path].shape, row.config))
        and not (path == POSITION and _is_grid(source.shapes[named[place.name]], shape))
    }
    names = {place.name for place in places.values()}
    extra = [n for n in sorted(named.keys() - names) if not found.is_unused(n)]
    twice = [n for n in sorted(source.shapes.keys() - set(named.values())) if found.layout.spelling(n) in names]
    lists = (
        ("missing", [f"{n} (our {p})" for n, p in missing.items()]),
        ("left over", extra),
        ("misshapen", list(misshapen.values())),
        ("there in two spellings", twice),
    )
    problems = [f"{len(names)} {what}: {', '.join(_first(names))}" for what, names in lists if names]
    remedy = "choose the backbone that the file is of"
    if missing and not (extra or misshapen or twice) and all(path.startswith("pooler/") for path in missing.values()):
        remedy = "take pool='cls' or pool='mean', as this checkpoint has no pooler"
    elif extra and not (missing or misshapen or twice):
        remedy += ", or where they are only the head of a task, save the file without them"
    if problems:
        raise ValueError(
            f"Expected weights={str(source.file)!r} to fit the backbone leaf by leaf; {'; '.join(problems)}: {remedy}."
        )


def check_kinds(source: Source, names: Iterable[str]) -> None:
    """Raises `ValueError` if one of these leaves is no float: whole numbers and eight bits mean nothing without a scale."""
    wrong = [f"{name} ({source.kinds[name]})" for name in names if source.kinds[name] not in FLOATS]
    if wrong:
        raise ValueError(
            f"Expected tensors of {source.file} to be {', '.join(FLOATS[:-1])} or {FLOATS[-1]}, not "
            f"{', '.join(_first(wrong, 5))}; take the file from before it was quantised, or convert it where it was made."
        )


def check_finite(source: Source, name: str, leaf: np.ndarray) -> None:
    """Raises `ValueError` for a leaf of the file with a value that is no float32, or none at all."""
    wrong = leaf.size - int(np.count_nonzero(np.isfinite(leaf)))
    if wrong:
        raise ValueError(
            f"Expected tensor {name!r} of {source.file} to hold finite float32 values, but {wrong:,} of {leaf.size:,} are "
            "NaN or infinite; fetch the file again, or take one from before its training diverged."
        )


def _stored_shape(place: Place, shape: tuple[int, ...], config: Any) -> tuple[int, ...]:
    theirs = place.layout.shape(shape, config)
    return tuple(n * place.parts if axis == place.axis else n for axis, n in enumerate(theirs))


def _read(source: Source, place: Place, shape: tuple[int, ...]) -> np.ndarray:
    """The leaf in our layout, float32 and contiguous."""
    stored = source.read(place.name)
    part = np.split(stored, place.parts, axis=place.axis)[place.part]
    shape = (-1, *shape[1:])  # positions may be of another grid
    with np.errstate(over="ignore"):  # of float64: refused below
        leaf = np.ascontiguousarray(place.layout.ours(part, shape), dtype=np.float32)
    check_finite(source, place.name, leaf)
    return leaf


def _is_grid(stored: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    """Whether both are positions (1, 1 + n^2, D) of a class token and a square of patches, for any n."""
    square = [len(s) == 3 and math.isqrt(max(s[1] - 1, 0)) ** 2 == s[1] - 1 > 0 for s in (stored, shape)]
    return all(square) and stored[-1] == shape[-1]


def _first(names: Iterable[str], most: int = 20) -> list[str]:
    names = list(names)
    return names if len(names) <= most else [*names[:most], f"and {len(names) - most} more"]


def packaged(name: str, asset: str | None) -> Path:
    """Directory of a backbone's packaged weights.

    Raises:
        ValueError: none are packaged.
    """
    if asset is None:
        raise ValueError(
            f"Expected weights of backbone={name!r} to be given, as none are packaged; name a file, a directory or a "
            "hub model by --weights, or take 'random' ones (--weights random)."
        )
    from fedsim.data import assets  # late: nothing else here needs the cache

    return assets.path(asset)
