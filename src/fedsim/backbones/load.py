"""Published checkpoints as they are: names and layouts mapped to ours, nothing missing, left over or misshapen.

Every name and shape is compared before the first array is read. The layouts are in `formats`, the files in `sources`.
"""

from __future__ import annotations

import fnmatch
import json
import math
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedsim.backbones import Backbone, Row, backbone
from fedsim.backbones import row as table_row
from fedsim.backbones.formats import FORMATS, Format, Place
from fedsim.backbones.layers import initial
from fedsim.backbones.sources import Source, hub, is_hub_name, open_source
from fedsim.backbones.vit import resampled

Shapes = Mapping[str, jax.ShapeDtypeStruct]
POSITION = "embeddings/position"  # of a vision transformer: the one leaf whose shape depends on the image size


class Match(NamedTuple):
    """A checkpoint that fits a backbone leaf by leaf."""

    source: Source
    layout: Format
    prefix: str
    """In front of all published names."""
    places: dict[str, Place]
    """Our path -> where the leaf lies, its name as it is in the file."""


def load(name: str, weights: str | None, shapes: Shapes, seed: int = 0) -> dict[str, np.ndarray]:
    """Every published leaf of a backbone, float32.

    Args:
        name: of the backbone.
        weights: file, directory or hub name of a checkpoint; "random" for initial values drawn from `seed` and the
            leaf's path; None for the packaged weights.
            Positions that a vision transformer learned at another image size are resampled (bicubic).
        shapes: the published leaves, by our paths.

    Raises:
        ValueError: leaves are missing, left over or misshapen (all are listed), or there is no checkpoint to read.
    """
    own = backbone(name)
    if isinstance(own, Backbone):
        refuse_weights(name, weights)
        return {path: value for path, value in own.values().items() if path in shapes}
    if weights == "random":
        return random(shapes, seed)
    found = find(name, weights, shapes)
    values = {path: _read(found.source, place, shapes[path].shape) for path, place in found.places.items()}
    if POSITION in values and values[POSITION].shape != shapes[POSITION].shape:  # learned at another image size
        side = math.isqrt(shapes[POSITION].shape[0] - 1)
        values[POSITION] = np.asarray(resampled(jnp.asarray(values[POSITION]), (side, side)))
    return values


def refuse_weights(name: str, weights: str | None) -> None:
    """Raises `ValueError` for weights beside those that a user's own backbone brings."""
    if weights is not None:
        raise ValueError(
            f"Expected weights={weights!r} to be unset for backbone={name!r}; it brings its params itself."
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


def find(name: str, weights: str | None, shapes: Shapes) -> Match:
    """The checkpoint, compared with the backbone's config and leaves; no array is read.

    Raises:
        ValueError: as `load`.
    """
    row = table_row(name)
    if not row.formats:
        raise ValueError(f"Expected weights={weights!r} of backbone={name!r} to be 'random'; it has no checkpoint.")
    return match(open_source(locate(name, weights)), row, shapes)


def locate(name: str, weights: str | None) -> Path:
    """File or folder of a backbone's weights: as given, of the hub, or packaged.

    Raises:
        ValueError: none are packaged, or the hub cannot be reached.
    """
    if weights is None:
        return packaged(name, backbone(name).asset)
    return hub(weights) if is_hub_name(weights) else Path(weights).expanduser()


def check_config(file: Path, expected: Mapping[str, Any]) -> None:
    """Compares `config.json` beside the weights, where there is one, with the backbone.

    Raises:
        ValueError: the checkpoint is of another model; every difference is listed.
    """
    beside = file.parent / "config.json"
    if not beside.is_file():
        return
    said = json.loads(beside.read_text())
    wrong = [f"{k}={said[k]!r}, not {v!r}" for k, v in expected.items() if k in said and said[k] != v]
    if wrong:
        raise ValueError(
            f"Expected weights={str(file)!r} to be of this backbone; its config.json says {'; '.join(wrong)}: "
            "choose the backbone that it is of."
        )


def match(source: Source, row: Row, shapes: Shapes) -> Match:
    """Where every leaf lies, after comparing all names and shapes.

    Raises:
        ValueError: the file is of another model, or lists every missing, left over and misshapen leaf.
    """
    spellings = {layout: {FORMATS[layout].spelling(n): n for n in source.shapes} for layout in row.formats}
    wanted = {
        (layout, prefix): {path: FORMATS[layout].place(path, row.config) for path in shapes}
        for layout in row.formats
        for prefix in FORMATS[layout].prefixes
    }
    # The layout and prefix under which most leaves are found; the first of equals.
    key = max(wanted, key=lambda k: sum(k[1] + place.name in spellings[k[0]] for place in wanted[k].values()))
    layout, prefix = FORMATS[key[0]], key[1]
    check_config(source.file, layout.config(row.config))
    named = spellings[key[0]]
    places = {path: place._replace(name=prefix + place.name) for path, place in wanted[key].items()}
    missing = {place.name: path for path, place in places.items() if place.name not in named}
    misshapen = {
        place.name: f"{place.name}: {source.shapes[named[place.name]]}, not {shape}"
        for path, place in places.items()
        if place.name in named
        and source.shapes[named[place.name]] != (shape := _stored_shape(place, shapes[path].shape, row.config))
        and not (path == POSITION and _is_grid(source.shapes[named[place.name]], shape))
    }
    extra = [
        n
        for n in sorted(named.keys() - {place.name for place in places.values()})
        if not any(fnmatch.fnmatchcase(n, q) or fnmatch.fnmatchcase(n, prefix + q) for q in layout.unused)
    ]
    lists = (
        ("missing", [f"{n} (our {p})" for n, p in missing.items()]),
        ("left over", extra),
        ("misshapen", list(misshapen.values())),
    )
    problems = [f"{len(names)} {what}: {', '.join(_first(names))}" for what, names in lists if names]
    if problems:
        raise ValueError(
            f"Expected weights={str(source.file)!r} to fit the backbone leaf by leaf; {'; '.join(problems)}: "
            "choose the backbone that the file is of."
        )
    return Match(source, layout, prefix, {path: p._replace(name=named[p.name]) for path, p in places.items()})


def _stored_shape(place: Place, shape: tuple[int, ...], config: Any) -> tuple[int, ...]:
    theirs = place.layout.shape(shape, config)
    return (theirs[0] * place.parts, *theirs[1:])


def _read(source: Source, place: Place, shape: tuple[int, ...]) -> np.ndarray:
    """The leaf in our layout, float32 and contiguous."""
    stored = source.read(place.name)
    rows = stored.shape[0] // place.parts
    part = stored[place.part * rows : (place.part + 1) * rows]
    shape = (-1, *shape[1:])  # positions may be of another grid
    return np.ascontiguousarray(place.layout.ours(part, shape), dtype=np.float32)


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
