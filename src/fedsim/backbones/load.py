"""Published checkpoints as they are: names and layouts mapped to ours, nothing missing, left over or misshapen.

One row of `FORMATS` per published layout. A map is written once, from our module paths to theirs; the layout of a leaf
follows from its role (`kernel`, `scale`, ...). Every name and shape is compared before the first array is read.
"""

from __future__ import annotations

import fnmatch
import json
import re
import zlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from safetensors import safe_open

from fedsim.backbones import Shape, backbone, bert
from fedsim.backbones.layers import initial

Shapes = Mapping[str, jax.ShapeDtypeStruct]


class Source(NamedTuple):
    """An open checkpoint: the shapes of its leaves by their published names, and how to read one."""

    file: Path
    shapes: dict[str, Shape]
    read: Callable[[str], np.ndarray]


class Format(NamedTuple):
    """A published layout."""

    modules: Mapping[str, str]
    """Our module (or leaf) path -> theirs; `{i}` stands for the same number on both sides."""
    prefixes: tuple[str, ...]
    """What may stand in front of all their names, the likeliest first."""
    unused: Mapping[str, str]
    """Patterns of leaves that this architecture may leave behind -> why."""
    config: Callable[[Any], dict[str, Any]]
    """The backbone's config -> what `config.json` beside the weights must say where it says anything."""


FORMATS: dict[str, Format] = {
    "bert": Format(
        modules=bert.HUGGING_FACE,
        prefixes=("", "bert."),
        unused={
            "cls.*": "heads of the pre-training tasks",
            "classifier.*": "head of the checkpoint's own task; ours is new",
            "embeddings.position_ids": "the constants 0, 1, 2, ...",
            "pooler.dense.*": "dense layer on the first token; mean and cls features do not pass it",
        },
        config=bert.hugging_face_config,
    ),
}


def load(name: str, weights: str | None, shapes: Shapes, seed: int = 0) -> dict[str, np.ndarray]:
    """Every published leaf of a backbone, float32.

    Args:
        name: of the backbone.
        weights: file or directory of a checkpoint; "random" for initial values drawn from `seed` and the leaf's path;
            None for the packaged weights.
        shapes: the published leaves, by our paths.

    Raises:
        ValueError: leaves are missing, left over or misshapen (all are listed), or there is no checkpoint to read.
    """
    if weights == "random":
        return random(shapes, seed)
    row = backbone(name)
    if row.checkpoint is None:
        raise ValueError(f"Expected weights={weights!r} of backbone={name!r} to be 'random'; it has no checkpoint.")
    layout = FORMATS[row.checkpoint]
    source = open_source(packaged(name, row.asset) if weights is None else Path(weights).expanduser())
    check_config(source.file, layout.config(row.config))
    names = match(source, layout, shapes)
    return {path: from_published(path, source.read(theirs)) for path, theirs in names.items()}


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


def open_source(path: Path) -> Source:
    """Opens a `.safetensors` file, or the `model.safetensors` of a directory; reads names and shapes only.

    Raises:
        ValueError: there is no such file, or it is not in this form.
    """
    file = path / "model.safetensors" if path.is_dir() else path
    if not file.is_file():
        raise ValueError(
            f"Expected weights={str(path)!r} to be a file or a directory with model.safetensors; give one."
        )
    try:
        with safe_open(file, framework="np") as handle:
            shapes = {name: tuple(handle.get_slice(name).get_shape()) for name in handle.keys()}  # noqa: SIM118 (no mapping)
    except Exception as error:  # safetensors raises its own class, OSError, or RuntimeError by version
        raise ValueError(f"Expected weights={str(file)!r} to be a readable safetensors file ({error}).") from error

    def read(name: str) -> np.ndarray:
        with safe_open(file, framework="np") as handle:
            return handle.get_tensor(name)

    return Source(file, shapes, read)


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
            f"Expected weights={str(file)!r} to be of this backbone; its config.json says {'; '.join(wrong)}."
        )


def match(source: Source, layout: Format, shapes: Shapes) -> dict[str, str]:
    """Our paths -> the published names, after comparing all names and shapes.

    Raises:
        ValueError: lists every missing, left over and misshapen leaf.
    """
    theirs = {path: published_name(path, layout.modules) for path in shapes}
    # The names' spelling of LayerNorm leaves in the oldest checkpoints (from TensorFlow).
    old = {
        re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", n)): n
        for n in source.shapes
    }
    prefix = max(layout.prefixes, key=lambda p: sum(p + n in old for n in theirs.values()))
    wanted = {path: prefix + name for path, name in theirs.items()}
    missing = [f"{n} (our {p})" for p, n in wanted.items() if n not in old]
    misshapen = [
        f"{n}: {source.shapes[old[n]]}, not {published_shape(p, shapes[p].shape)}"
        for p, n in wanted.items()
        if n in old and source.shapes[old[n]] != published_shape(p, shapes[p].shape)
    ]
    extra = [
        n
        for n in sorted(old.keys() - set(wanted.values()))
        if not any(fnmatch.fnmatchcase(n, q) or fnmatch.fnmatchcase(n, prefix + q) for q in layout.unused)
    ]
    problems = [
        f"{len(names)} {what}: {', '.join(_first(names))}"
        for what, names in (("missing", missing), ("left over", extra), ("misshapen", misshapen))
        if names
    ]
    if problems:
        raise ValueError(
            f"Expected weights={str(source.file)!r} to fit the backbone leaf by leaf; {'; '.join(problems)}."
        )
    return {path: old[name] for path, name in wanted.items()}


def published_name(path: str, modules: Mapping[str, str]) -> str:
    """Our leaf path -> the published name without prefix: `blocks/3/norm1/scale` -> `...layer.3...LayerNorm.weight`."""
    module, _, role = path.rpartition("/")
    leaf = {"kernel": "weight", "scale": "weight", "embedding": "weight"}.get(role, role)
    number = re.search(r"/(\d+)/", path)
    generic = module if number is None else module.replace(number[0], "/{i}/", 1)
    return modules[generic].replace("{i}", number[1] if number else "") + "." + leaf


def published_shape(path: str, shape: Shape) -> Shape:
    """Shape of our leaf in the published layout (PyTorch's: Linear (out, in))."""
    return shape[::-1] if path.endswith("/kernel") else shape


def from_published(path: str, value: np.ndarray) -> np.ndarray:
    """The published array as our leaf: kernels transposed, everything float32 and contiguous."""
    return np.ascontiguousarray(value.T if path.endswith("/kernel") else value, dtype=np.float32)


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
            f"Expected weights of backbone={name!r} to be given, as none are packaged; name a file or directory, "
            "or take 'random'."
        )
    from fedsim.data import assets  # late: nothing else here needs the cache

    return assets.path(asset)
