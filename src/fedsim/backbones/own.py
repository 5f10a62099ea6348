"""A user's own model as a backbone: any `apply(params, x)` that gives features (B, width); fedsim adds the head.

A config names it by its file, `backbone="my_model.py:make"`, so that a run can be resumed and used in another process.
What happens inside `apply` is unknown here. So the kinds of PEFT that choose leaves work by the leaves' names, and LoRA
is a re-parametrisation: in the place of a kernel W, `apply` gets W + s A B (docs/own_model.md says what that costs).
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fedsim import own
from fedsim.backbones.layers import ADDED, Shape, Skeleton, column_norms, per_length
from fedsim.config import parse_call

Apply = Callable[[Any, Any], Any]


class Part(NamedTuple):
    """One stage of an own backbone."""

    path: str  # prefix of its leaves
    apply: Apply
    names: list[str]  # paths of its leaves, in the order of the tree
    leaves: list[Any]
    structure: Any  # of the user's tree

    def tree(self, leaves: Mapping[str, Any]) -> Any:
        """The user's tree from flat leaves."""
        return jax.tree.unflatten(self.structure, [leaves[name] for name in self.names])


@dataclass(frozen=True, eq=False)
class Backbone:
    """`apply(params, x)` -> features (B, width) of inputs x (B, ...), with the parameters that it starts from.

    Args:
        apply: a pure function; or several, one after another, the first reads the inputs and each the output of the one
            before (an array or a dict of arrays, examples on axis 0): frozen ones at the bottom then run once per example.
        params: a tree of float arrays; of several functions, one tree for each.
        width: number of features; where it is left out it is found from the shape of an input.
        tokenizer: a tokenizer.json, for a model that reads token ids (B, T) int32 of texts. Without it x is as in the data
            set: float32 arrays, or uint8 images.

    Raises:
        ValueError: params that are no tree of float arrays, a leaf's name that LoRA needs, no such tokenizer.
    """

    apply: Apply | Sequence[Apply]
    params: Any
    width: int | None = None
    tokenizer: str | Path | None = None

    formats: ClassVar[tuple[str, ...]] = ()  # what the table's backbones have and this one does not
    asset: ClassVar[str | None] = None

    def __post_init__(self) -> None:
        if self.width is not None and (
            isinstance(self.width, bool) or not isinstance(self.width, int) or self.width < 1
        ):
            raise ValueError(f"Expected width={self.width!r} > 0; give the number of features.")
        if self.tokenizer is not None and not Path(self.tokenizer).expanduser().is_file():
            raise ValueError(f"Expected tokenizer={str(self.tokenizer)!r} to be a file; give a tokenizer.json.")
        check(self.parts)

    @property
    def kind(self) -> Literal["text", "array"]:
        """What it reads."""
        return "array" if self.tokenizer is None else "text"

    @functools.cached_property
    def parts(self) -> list[Part]:
        """Its stages: `model`, or `stages/0`, `stages/1`, ..."""
        if callable(self.apply):
            return [part("model", self.apply, self.params)]
        functions = list(self.apply)
        trees = list(self.params) if isinstance(self.params, (list, tuple)) else []
        if not functions or len(trees) != len(functions) or not all(callable(f) for f in functions):
            raise ValueError(
                f"Expected apply to be a function, or {len(functions)} functions with as many trees in params, not "
                f"{len(trees)}; give params as a list."
            )
        return [part(f"stages/{i}", f, tree) for i, (f, tree) in enumerate(zip(functions, trees, strict=True))]

    def values(self) -> dict[str, np.ndarray]:
        """Every leaf by its path, float32, on the host.

        Raises:
            ValueError: a leaf is not finite in float32.
        """
        with np.errstate(over="ignore"):  # of float64: refused below
            found = {
                n: np.asarray(leaf, np.float32) for p in self.parts for n, leaf in zip(p.names, p.leaves, strict=True)
            }
        wrong = next((name for name, leaf in found.items() if not np.isfinite(leaf).all()), None)
        if wrong is not None:
            raise ValueError(
                f"Expected leaf {wrong!r} of the own backbone's params to hold finite float32 values; give params from before "
                "their training diverged."
            )
        return found

    def restore(self, leaves: Mapping[str, Any]) -> Any:
        """`params` as they were given, with the values of flat leaves, such as those of `export.merge`."""
        trees = [part.tree(leaves) for part in self.parts]
        return trees[0] if callable(self.apply) else trees


def part(path: str, apply: Apply, params: Any) -> Part:
    """A stage with its leaves named by their place in the tree, an `nnx.Variable` by its own."""
    named, _ = jax.tree.flatten_with_path(params, is_leaf=lambda node: isinstance(node, nnx.Variable))
    leaves, structure = jax.tree.flatten(params)
    names = [f"{path}/{jax.tree_util.keystr(keys, simple=True, separator='/') or 'params'}" for keys, _ in named]
    return Part(path, apply, names, leaves, structure)


def check(parts: Sequence[Part]) -> None:
    """Refuses leaves that cannot be trained or named.

    Raises:
        ValueError: a leaf is no float array, its name is taken, or there is none.
    """
    names = [name for p in parts for name in p.names]
    if not names:
        raise ValueError("Expected params to hold at least one float array; give the model's parameters.")
    for p in parts:
        if len(p.names) != len(p.leaves):
            raise ValueError("Expected params to hold one array in each variable; give nnx.split's state.")
        for name, leaf in zip(p.names, p.leaves, strict=True):
            where = name.removeprefix(p.path + "/")
            dtype = getattr(leaf, "dtype", None)
            if dtype is None or not hasattr(leaf, "shape") or not jnp.issubdtype(dtype, jnp.floating):
                raise ValueError(
                    f"Expected leaf {where!r} of params to be a float array, not {dtype or type(leaf).__name__}; close "
                    "apply over what is not trained (nnx.split(module, nnx.Param, ...) parts counters and keys)."
                )
            if where.rpartition("/")[2] in ADDED:
                raise ValueError(f"Expected leaf {where!r} of params not to have a name of PEFT's own; rename it.")
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"Expected each leaf of params to have a name of its own; {', '.join(twice)}: rename one.")


def find(text: str) -> Backbone:
    """The backbone that `"my_model.py:make(depth=2)"` names: a value, or what a function gives. Kept until the file changes.

    Raises:
        ValueError: an unknown file, name or option, or what it gives is no `fedsim.Backbone`.
    """
    file = file_of(text)
    stat = file.stat() if file.is_file() else None
    return _find(text, str(file.resolve()), (stat.st_mtime_ns, stat.st_size) if stat else None)


@functools.lru_cache(maxsize=1)  # a run asks for it many times, and it may hold much
def _find(text: str, file: str, stamp: tuple[int, int] | None) -> Backbone:
    name, args, options = parse_call(text, "backbone")
    if args:
        raise ValueError(f"Expected backbone={text!r} to give its options by name, like my_model.py:make(depth=2).")
    made = own.find(file_of(text), name.rpartition(":")[2], "backbone")
    if callable(made):
        own.require_options(made, options, name)
        made = made(**options)
    elif options:
        raise ValueError(f"Expected {name!r} to be a function to take options; it is a value: leave them out.")
    if not isinstance(made, Backbone):
        raise ValueError(
            f"Expected backbone={text!r} to give a fedsim.Backbone, not {type(made).__name__}; return one."
        )
    return made


def file_of(text: str) -> Path:
    """The file of `my_model.py:make`."""
    return Path(text.partition("(")[0].rpartition(":")[0]).expanduser()


def identity(text: str) -> str | None:
    """A hash of an own backbone's parameters, None of the table's: a run predicts only with those that it started from."""
    if ":" not in text:
        return None
    digest = hashlib.sha256()
    for name, leaf in find(text).values().items():
        digest.update(f"{name} {leaf.shape}".encode())
        digest.update(np.ascontiguousarray(leaf).data)
    return digest.hexdigest()[:16]


def skeleton(
    backbone: Backbone,
    classes: int,
    layers: Sequence[str],
    rank: int,
    scale: float,
    dora: bool,
    x: jax.ShapeDtypeStruct | None,
) -> Skeleton:
    """Shapes and forward pass with the head, and LoRA's factors beside the chosen layers.

    Args:
        layers: those that LoRA adapts, by their paths in `kernels`.
        x: one input (1, ...), to find the width or to compare it.

    Raises:
        ValueError: `apply` does not give (B, width).
    """
    parts = backbone.parts
    shapes = {
        name: jax.ShapeDtypeStruct(leaf.shape, jnp.float32)
        for p in parts
        for name, leaf in zip(p.names, p.leaves, strict=True)
    }
    width = features(backbone, shapes, x)
    chosen = {kernel_of(layer, shapes): layer for layer in layers}
    added: dict[str, Shape] = {"head/kernel": (width, classes), "head/bias": (classes,)}
    for kernel, layer in chosen.items():
        inputs, outputs = shapes[kernel].shape
        added |= {f"{layer}/lora_a": (inputs, rank), f"{layer}/lora_b": (rank, outputs)}
        added |= {f"{layer}/magnitude": (outputs,)} if dora else {}

    def effective(leaves: Mapping[str, Any], name: str) -> Any:
        """What `apply` gets in a leaf's place."""
        if name not in chosen:
            return leaves[name]
        kernel, a, b = leaves[name], leaves[f"{chosen[name]}/lora_a"], leaves[f"{chosen[name]}/lora_b"]
        merged = kernel + scale * a @ b
        if not dora:
            return merged
        length = column_norms(kernel, a, b, scale)
        return merged * per_length(leaves[f"{chosen[name]}/magnitude"], jax.lax.stop_gradient(length))

    def run(leaves: Mapping[str, Any], x: Any, start: int, stop: int) -> Any:
        for p in parts[start:stop]:
            x = p.apply(p.tree({name: effective(leaves, name) for name in p.names}), x)
        if stop > len(parts):
            x = x.astype(leaves["head/kernel"].dtype) @ leaves["head/kernel"] + leaves["head/bias"]
        return x

    more = {path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, shape in added.items()}
    return Skeleton({**shapes, **more}, [*(p.path for p in parts), "head"], run)


def features(backbone: Backbone, shapes: Mapping[str, Any], x: jax.ShapeDtypeStruct | None) -> int:
    """The width of the features; nothing is computed.

    Raises:
        ValueError: `apply` fails, or gives something else than (B, width).
    """
    if x is None:
        if backbone.width is None:
            raise ValueError(
                "Expected width of the own backbone to be known; give Backbone(..., width=) or --input-shape."
            )
        return backbone.width
    batch = jax.ShapeDtypeStruct((3, *x.shape[1:]), x.dtype)

    def forward(leaves: Mapping[str, Any], h: Any) -> Any:
        for p in backbone.parts:
            h = p.apply(p.tree(leaves), h)
        return h

    try:
        found = jax.eval_shape(forward, dict(shapes), batch)
    except Exception as error:
        raise ValueError(
            f"Expected apply to take inputs {batch.dtype}{list(batch.shape)} ({type(error).__name__}: {error}); mend it, or "
            "give other data."
        ) from error
    width = backbone.width
    shape = getattr(found, "shape", None)
    if shape is None or len(shape) != 2 or shape[0] != 3 or not jnp.issubdtype(found.dtype, jnp.floating):
        raise ValueError(
            f"Expected apply to give float features (B, width) of inputs (B, ...) with B=3, not {found}; pool or flatten them."
        )
    if width is not None and shape[1] != width:
        raise ValueError(f"Expected width={width} of the own backbone to be {shape[1]}, as apply gives; correct it.")
    return shape[1]


def kernels(backbone: Backbone) -> dict[str, Shape]:
    """Matrices that LoRA can adapt: path of the layer (of the leaf, where that is not called kernel) -> shape."""
    found = {n: tuple(leaf.shape) for p in backbone.parts for n, leaf in zip(p.names, p.leaves, strict=True)}
    return {
        name.removesuffix("/kernel"): shape for name, shape in found.items() if len(shape) == 2 and math.prod(shape)
    }


def kernel_of(layer: str, leaves: Mapping[str, Any]) -> str:
    """The leaf that LoRA's factors beside `layer` belong to."""
    return f"{layer}/kernel" if f"{layer}/kernel" in leaves else layer
