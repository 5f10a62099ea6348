"""Parameter-efficient fine-tuning: which leaves of a backbone are trained and travel, and which stay frozen.

`build` attaches the kind's extra leaves (LoRA's factors, prompts, ...) to an abstract backbone, nothing allocated, and
gives every leaf to exactly one rule: `head`, one of the kind's parts, or `frozen`. The result is a `Model`: shapes, the
rules, and pure functions over flat dicts "blocks/0/attention/query/kernel" -> array. The frozen dict is an argument,
never closed over; under `vmap(apply, (0, None, 0))` over clients it stays one copy and its matmuls one shared matmul.
`kinds` says what each kind attaches and takes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from fedsim.backbones import Backbone, Module, Row, Shape, backbone, own
from fedsim.backbones.layers import STATISTICS, NoRngs, Skeleton
from fedsim.backbones.load import Weights, draw, load, stored_shapes
from fedsim.config import Model as Options
from fedsim.config import check_model, positive, require_known
from fedsim.core import Factors
from fedsim.peft.kinds import KINDS, Leaf, choose_targets, is_fresh, lora_scale, parse, rules

__all__ = [
    "KINDS",
    "Leaves",
    "Model",
    "Options",
    "Shapes",
    "build",
    "factors",
    "fitted",
    "fitted_to",
    "from_config",
    "parameters",
    "parse",
    "published",
    "start",
]

Leaves = dict[str, jax.Array]
Shapes = dict[str, jax.ShapeDtypeStruct]


class Model(NamedTuple):
    """A backbone split into what is trained and what is frozen. Every dict is flat, path -> leaf."""

    name: str
    classes: int
    """Outputs: classes, or tokens of a language model's vocabulary."""
    trained: Shapes
    frozen: Shapes
    rules: dict[str, str]
    """Every leaf -> the rule that took it: "head", a PEFT kind, or "frozen"."""
    fresh: frozenset[str]
    """Leaves that no checkpoint holds: the head and what PEFT attached; the others start from the checkpoint."""
    init: Callable[[jax.Array], Leaves]
    """Key -> the fresh leaves; a leaf's value depends on the key and its path only (DoRA's lengths: see `start`)."""
    apply: Callable[[Mapping[str, Any], Mapping[str, Any], Any], jax.Array]
    """(trained, frozen, x (B, ...)) -> logits (B, classes); equals suffix after prefix."""
    cut: int
    """Number of stages below the first trained leaf: those that `prefix` runs."""
    stages: int
    """Number of stages of the backbone, the head included."""
    prefix: Callable[[Mapping[str, Any], Any], Any]
    """(frozen, x) -> what enters the first trained stage, examples on axis 0 of every array; x itself if cut is 0."""
    suffix: Callable[[Mapping[str, Any], Mapping[str, Any], Any], jax.Array]
    """(trained, frozen, output of prefix) -> logits (B, classes)."""
    run: Callable[[Mapping[str, Any], Any, int, int], Any]
    """(leaves, h, start, stop) -> h after the stages start..stop - 1; leaves of other stages may be absent."""
    below: frozenset[str]
    """Names of the leaves that only `prefix` reads: a run over cached features need not hold them."""
    options: Options = Options()
    """With which it was built."""
    blocks: Mapping[str, int] = {}
    """Leaf -> its block, from 0; what stands before the blocks counts as the first's, what stands behind them as the last's."""


def build(backbone_name: str, classes: int, *, input_shape: Shape | None = None, **options: Any) -> Model:
    """Splits a backbone by PEFT kind; only shapes are made.

    Args:
        backbone_name: key of `backbones.BACKBONES`, or `file.py:name` of a user's own.
        classes: outputs of the head; of a language model they are the backbone's vocabulary, whatever is said here.
        input_shape: of one example without the batch axis; backbones of fixed input size do not need it.
        options: those of `config.Model`: `peft="lora+bias"`, `rank=4`, ...

    Raises:
        ValueError: an unknown name, a part that takes no leaf or whose leaves another part took, a target that matches
            nothing, a rank above that of a matrix, an input that the backbone cannot read.
    """
    require_known(options, [f.name for f in dataclasses.fields(Options)], "option")
    return from_config(Options(backbone=backbone_name, **options), classes, input_shape)


def from_config(config: Options, classes: int, input_shape: Shape | None = None, input_dtype: Any = None) -> Model:
    """`build` with the options of a config's model.

    Args:
        input_dtype: of the inputs, for a user's own backbone (default: int32 for texts, float32 else).
    """
    options = Options(**{f.name: getattr(config, f.name) for f in dataclasses.fields(Options)})
    check_model(options)
    positive(classes=classes)
    found = backbone(
        options.backbone,
        pool=options.pool,
        image_size=options.image_size,
        interpolation=options.interpolation,
        task=options.task,
    )
    if options.task == "language_model" and isinstance(found, Row):  # a user's own is refused
        classes = found.config.vocabulary
    parts = parse(options.peft)
    shapes, stages, run, again = (
        ours(found, parts, options, classes, input_shape)
        if isinstance(found, Row)
        else theirs(found, parts, options, classes, input_shape, input_dtype)
    )
    stage_of = locate(list(shapes), stages)
    located = leaves(stage_of, stages)
    taken = rules(located, parts, options)
    trained = {path: leaf for path, leaf in shapes.items() if taken[path] != "frozen"}
    frozen = {path: leaf for path, leaf in shapes.items() if taken[path] == "frozen"}
    fresh = {path: leaf for path, leaf in shapes.items() if is_fresh(path)}
    if not trained:
        raise ValueError(
            f"Expected peft={options.peft!r} of backbone={options.backbone!r} to have a head to train; a language model brings "
            "its outputs, frozen, from its checkpoint: take lora, last_k, full, ... (and head_rounds=0)."
        )
    cut = min(stage_of[path] for path in trained)

    def prefix(frozen: Mapping[str, Any], x: Any) -> Any:
        return run(frozen, x, 0, cut)

    def suffix(trained: Mapping[str, Any], frozen: Mapping[str, Any], h: Any) -> jax.Array:
        return run({**frozen, **trained}, h, cut, len(stages))

    def apply(trained: Mapping[str, Any], frozen: Mapping[str, Any], x: Any) -> jax.Array:
        return suffix(trained, frozen, prefix(frozen, x))

    return Model(
        name=options.backbone,
        classes=classes,
        trained=trained,
        frozen=frozen,
        rules=taken,
        fresh=frozenset(fresh),
        init=lambda key: draw(key, fresh),
        apply=apply,
        cut=cut,
        stages=len(stages),
        prefix=prefix,
        suffix=suffix,
        run=run,
        below=frozenset(path for path, stage in stage_of.items() if stage < cut and path not in again),
        options=options,
        blocks={leaf.path: max(leaf.blocks - leaf.above - 1, 0) for leaf in located},
    )


def ours(row: Row, parts: Sequence[str], options: Options, classes: int, input_shape: Shape | None) -> Skeleton:
    """A backbone of the table, with what the kinds attach to its layers."""

    def make() -> Module:
        module = row.make(classes, input_shape, NoRngs())  # values come from `start`
        for part in parts:
            KINDS[part].attach(module, options)
        return module

    module = nnx.eval_shape(make)
    graph, state = nnx.split(module)
    flat, structure = jax.tree.flatten_with_path(state)
    paths = [jax.tree_util.keystr(keys[:-1], simple=True, separator="/") for keys, _ in flat]  # [-1] is Param's value
    shapes: Shapes = {path: leaf for path, (_, leaf) in zip(paths, flat, strict=True)}

    def run(leaves: Mapping[str, Any], x: Any, start: int, stop: int) -> Any:
        # Leaves that these stages do not read may be absent: their shapes hold the place.
        values = [leaves.get(path, shapes[path]) for path in paths]
        merged = nnx.merge(graph, jax.tree.unflatten(structure, values))
        for stage in merged.stages()[start:stop]:
            x = stage.run(x)
        return x

    return Skeleton(shapes, [stage.path for stage in module.stages()], run, frozenset(getattr(module, "again", ())))


def theirs(
    given: Backbone, parts: Sequence[str], options: Options, classes: int, input_shape: Shape | None, input_dtype: Any
) -> Skeleton:
    """A user's own backbone; LoRA replaces the kernels that its `apply` gets.

    Raises:
        ValueError: a kind that needs layers or blocks which only the table's backbones have.
    """
    alone = ("full", "head", "bias", "norm", "lora", "ffa_lora", "last_k")
    for part in parts:
        if part not in alone:
            raise ValueError(
                f"Expected peft={part!r} of an own backbone to be one of {', '.join(alone)}; {part} is attached inside "
                "transformer layers that only fedsim's backbones have: take one of these."
            )
    if "last_k" in parts and callable(given.apply):
        raise ValueError("Expected peft='last_k' to meet blocks; give apply and params as lists, a function a block.")
    with_lora = "lora" in parts or "ffa_lora" in parts
    layers = choose_targets(own.kernels(given), options) if with_lora else []
    if input_shape is None and given.kind == "text":
        input_shape = (8,)  # any length shows the width
    dtype = input_dtype or ("int32" if given.kind == "text" else "float32")
    x = None if input_shape is None else jax.ShapeDtypeStruct((1, *input_shape), dtype)
    return own.skeleton(given, classes, layers, options.rank, lora_scale(options), options.dora, x)


def published(model: Model) -> Shapes:
    """The leaves that a checkpoint of the backbone must hold: all but the fresh ones."""
    return {p: leaf for p, leaf in {**model.frozen, **model.trained}.items() if p not in model.fresh}


def parameters(model: Model) -> Shapes:
    """What full fine-tuning trains: backbone and head, without what PEFT attached and without batch norm's statistics."""
    leaves = {**model.frozen, **model.trained}
    attached = {path for path in model.fresh if not path.startswith("head/")}
    return {
        path: leaf
        for path, leaf in leaves.items()
        if path not in attached and path.rpartition("/")[2] not in STATISTICS
    }


def factors(model: Model) -> tuple[Factors, ...]:
    """The matrices that LoRA adapts, by path; trained or not."""
    shapes, found = {**model.frozen, **model.trained}, []
    for path in sorted(model.fresh):
        layer, _, role = path.rpartition("/")
        if role == "lora_a":
            (inputs, rank), outputs = shapes[path].shape, shapes[f"{layer}/lora_b"].shape[1]
            kernel, scale = own.kernel_of(layer, shapes), lora_scale(model.options)
            found.append(Factors(kernel, path, f"{layer}/lora_b", scale, inputs, rank, outputs))
    return tuple(found)


def start(model: Model, weights: Weights, seed: int) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """(trained, frozen) on the host at the start of a run: checkpoint values, and fresh leaves drawn from `seed`.

    DoRA's lengths are those of the checkpoint's columns, so that the output is unchanged at the start. Positions of a vision
    transformer have the checkpoint's grid, which may be another than the model's (see `fitted`).

    Raises:
        ValueError: the checkpoint does not fit; see `backbones.load.load`.
    """
    values = load(model.name, weights, published(model), seed)
    values |= {path: np.asarray(value) for path, value in model.init(jax.random.key(seed)).items()}
    for path in model.fresh:
        if path.endswith("/magnitude"):
            values[path] = np.linalg.norm(values[own.kernel_of(path.removesuffix("/magnitude"), values)], axis=0)
    return {path: values[path] for path in model.trained}, {path: values[path] for path in model.frozen}


def fitted(model: Model, trained: Mapping[str, Any], frozen: Mapping[str, Any]) -> Model:
    """The model with the shapes of these leaves: those of `start` may have positions of the checkpoint's own grid."""

    def shapes(said: Shapes, leaves: Mapping[str, Any]) -> Shapes:
        return {path: jax.ShapeDtypeStruct(leaves[path].shape, leaf.dtype) for path, leaf in said.items()}

    return model._replace(trained=shapes(model.trained, trained), frozen=shapes(model.frozen, frozen))


def fitted_to(model: Model, weights: Weights) -> Model:
    """`fitted` to what `start` would give, of which no value is read or made; see `backbones.load.stored_shapes`.

    Raises:
        ValueError: the checkpoint does not fit, or is not here.
    """
    leaves = {**model.trained, **model.frozen, **stored_shapes(model.name, weights, published(model))}
    return fitted(model, leaves, leaves)


def locate(paths: list[str], stages: list[str]) -> dict[str, int]:
    """Leaf path -> index of its stage.

    Raises:
        ValueError: the backbone's stages do not cover each leaf exactly once.
    """
    found = {path: [i for i, stage in enumerate(stages) if path.startswith(stage + "/")] for path in paths}
    wrong = [path for path, indices in found.items() if len(indices) != 1]
    if wrong:
        raise ValueError(f"Expected stages={stages} to hold each leaf once; {', '.join(wrong)}: mend the backbone.")
    return {path: indices[0] for path, indices in found.items()}


def leaves(stage_of: Mapping[str, int], stages: list[str]) -> list[Leaf]:
    """Every leaf with the number of blocks above its stage; a block is a stage with a number, `blocks/3`."""
    blocks = [i for i, stage in enumerate(stages) if stage.rpartition("/")[2].isdigit()]
    return [Leaf(path, sum(block > stage for block in blocks), len(blocks)) for path, stage in stage_of.items()]
