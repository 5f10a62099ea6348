"""Parameter-efficient fine-tuning: which leaves of a backbone are trained and travel, and which stay frozen.

`build` attaches the kind's extra leaves (LoRA's factors) to an abstract backbone, nothing allocated, and gives every
leaf to exactly one rule: `head`, one of the kind's parts, or `frozen`. The result is a `Model`: shapes, the rules, and
pure functions over flat dicts "blocks/0/attention/query/kernel" -> array. The frozen dict is an argument, never closed
over; under `vmap(apply, (0, None, 0))` over clients it stays one copy and its matmuls one shared matmul.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from fedsim.backbones import Module, Shape, backbone
from fedsim.backbones.layers import Linear
from fedsim.backbones.load import draw, load
from fedsim.config import Config, nearest, one_of, positive

Leaves = dict[str, jax.Array]
Shapes = dict[str, jax.ShapeDtypeStruct]

LORA_LEAVES = ("lora_a", "lora_b")

# Name -> which leaves outside the head it trains, by path. `full` and `head` are the two ends.
KINDS: dict[str, Callable[[str], bool]] = {
    "full": lambda path: True,
    "head": lambda path: False,
    "bias": lambda path: path.endswith("/bias"),  # LayerNorm biases included, scales not (FedPEFT-Bias)
    "lora": lambda path: path.rpartition("/")[2] in LORA_LEAVES,
}


class Model(NamedTuple):
    """A backbone split into what is trained and what is frozen. Every dict is flat, path -> leaf."""

    name: str
    classes: int
    trained: Shapes
    frozen: Shapes
    rules: dict[str, str]
    """Every leaf -> the rule that took it: "head", a PEFT kind, or "frozen"."""
    fresh: frozenset[str]
    """Trained leaves that no checkpoint holds (head, LoRA); the other trained leaves start from the checkpoint."""
    init: Callable[[jax.Array], Leaves]
    """Key -> the fresh leaves; a leaf's value depends on the key and its path only."""
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


def from_config(config: Config, classes: int, input_shape: Shape | None = None) -> Model:
    """`build` with the options of a config."""
    return build(
        config.backbone,
        classes,
        peft=config.peft,
        rank=config.rank,
        lora_alpha=config.lora_alpha,
        targets=config.targets,
        input_shape=input_shape,
    )


def build(
    backbone_name: str,
    classes: int,
    *,
    peft: str = "lora",
    rank: int = 8,
    lora_alpha: float = 16.0,
    targets: tuple[str, ...] = ("query", "value"),
    input_shape: Shape | None = None,
) -> Model:
    """Splits a backbone by PEFT kind; only shapes are made.

    Args:
        backbone_name: key of `backbones.BACKBONES`.
        classes: outputs of the head.
        peft: key of `KINDS`, or several joined by "+" (`lora+bias`); the head is trained in any case.
        rank: of LoRA's factors.
        lora_alpha: LoRA's product is scaled by lora_alpha / rank.
        targets: LoRA's linear layers: patterns for the end of their path, `*` and `[01]` allowed.
        input_shape: of one example without the batch axis; backbones of fixed input size do not need it.

    Raises:
        ValueError: an unknown name, parts that claim the same leaf, a target that matches nothing, a rank above that of
            a matrix, an input that the backbone cannot read.
    """
    row = backbone(backbone_name)
    positive(classes=classes, rank=rank, lora_alpha=lora_alpha)
    parts = parse(peft)
    if row.tokens is not None and input_shape and input_shape[-1] > row.tokens:
        raise ValueError(
            f"Expected tokens={input_shape[-1]} <= {row.tokens}, the positions of backbone={backbone_name!r}; "
            "cut the texts shorter."
        )

    def make() -> Module:
        module = row.make(classes, input_shape, nnx.Rngs(0))
        if "lora" in parts:
            attach_lora(module, targets, rank, lora_alpha / rank)
        return module

    module = nnx.eval_shape(make)
    graph, state = nnx.split(module)
    flat, structure = jax.tree.flatten_with_path(state)
    paths = [jax.tree_util.keystr(keys[:-1], simple=True, separator="/") for keys, _ in flat]  # [-1] is Param's value
    shapes: Shapes = {path: leaf for path, (_, leaf) in zip(paths, flat, strict=True)}
    stage_of = locate(paths, [stage.path for stage in module.stages()])
    rules = {path: rule(path, parts, peft) for path in paths}
    trained = {path: leaf for path, leaf in shapes.items() if rules[path] != "frozen"}
    frozen = {path: leaf for path, leaf in shapes.items() if rules[path] == "frozen"}
    fresh = {path: leaf for path, leaf in trained.items() if is_fresh(path)}
    stages = len(module.stages())
    cut = min(stage_of[path] for path in trained)

    def run(leaves: Mapping[str, Any], x: Any, start: int, stop: int) -> Any:
        # Leaves that these stages do not read may be absent: their shapes hold the place.
        values = [leaves.get(path, shapes[path]) for path in paths]
        merged = nnx.merge(graph, jax.tree.unflatten(structure, values))
        for stage in merged.stages()[start:stop]:
            x = stage.run(x)
        return x

    def prefix(frozen: Mapping[str, Any], x: Any) -> Any:
        return run(frozen, x, 0, cut)

    def suffix(trained: Mapping[str, Any], frozen: Mapping[str, Any], h: Any) -> jax.Array:
        return run({**frozen, **trained}, h, cut, stages)

    def apply(trained: Mapping[str, Any], frozen: Mapping[str, Any], x: Any) -> jax.Array:
        return suffix(trained, frozen, prefix(frozen, x))

    return Model(
        name=backbone_name,
        classes=classes,
        trained=trained,
        frozen=frozen,
        rules=rules,
        fresh=frozenset(fresh),
        init=lambda key: draw(key, fresh),
        apply=apply,
        cut=cut,
        stages=stages,
        prefix=prefix,
        suffix=suffix,
    )


def published(model: Model) -> Shapes:
    """The leaves that a checkpoint of the backbone must hold: all but the fresh ones."""
    return {p: leaf for p, leaf in {**model.frozen, **model.trained}.items() if p not in model.fresh}


def start(model: Model, weights: str | None, seed: int) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """(trained, frozen) on the host at the start of a run: checkpoint values, and fresh leaves drawn from `seed`.

    Raises:
        ValueError: the checkpoint does not fit; see `backbones.load.load`.
    """
    values = load(model.name, weights, published(model), seed)
    values |= {path: np.asarray(value) for path, value in model.init(jax.random.key(seed)).items()}
    return {path: values[path] for path in model.trained}, {path: values[path] for path in model.frozen}


def parse(peft: str) -> tuple[str, ...]:
    """The parts of a PEFT option, `lora+bias` -> ("lora", "bias").

    Raises:
        ValueError: an unknown or repeated part.
    """
    parts = tuple(part.strip() for part in peft.split("+"))
    for part in parts:
        one_of(tuple(KINDS), peft=part)
    if len(set(parts)) < len(parts):
        raise ValueError(f"Expected peft={peft!r} to name each part once; drop the repetition.")
    return parts


def rule(path: str, parts: tuple[str, ...], peft: str) -> str:
    """The one rule that takes the leaf.

    Raises:
        ValueError: two parts claim it.
    """
    if path.startswith("head/"):
        return "head"
    claims = [part for part in parts if KINDS[part](path)]
    if len(claims) > 1:
        raise ValueError(
            f"Expected the parts of peft={peft!r} to take different leaves; {' and '.join(claims)} both take {path}: "
            "drop one."
        )
    return claims[0] if claims else "frozen"


def is_fresh(path: str) -> bool:
    """Whether no checkpoint holds this leaf: the head, and what PEFT attached."""
    return path.startswith("head/") or path.rpartition("/")[2] in LORA_LEAVES


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


def attach_lora(module: Module, targets: tuple[str, ...], rank: int, scale: float) -> None:
    """Gives LoRA factors to every linear layer outside the head whose path ends in one of the target patterns.

    Raises:
        ValueError: a pattern matches nothing, or the rank is above that of a matched matrix.
    """
    layers = {
        "/".join(map(str, path)): layer
        for path, layer in nnx.iter_graph(module)
        if isinstance(layer, Linear) and path[0] != "head"
    }
    chosen: set[str] = set()
    for pattern in targets:
        hits = {path for path in layers if matches(path, pattern)}
        if not hits:
            ends = sorted({path.rpartition("/")[2] for path in layers} | {_generic(path) for path in layers})
            raise ValueError(
                f"Expected targets={pattern!r} to match a linear layer{nearest(pattern, ends)}; "
                f"there are {', '.join(sorted({_generic(path) for path in layers}))}."
            )
        chosen |= hits
    if not chosen:
        raise ValueError("Expected targets=() to name a linear layer for LoRA; give a pattern, or take peft=head.")
    for path in sorted(chosen):
        full = min(layers[path].kernel.shape)
        if rank > full:
            raise ValueError(f"Expected rank={rank} <= {full}, the rank of {path}; lower it, or leave that layer out.")
        layers[path].attach_lora(rank, scale, nnx.Rngs(0))


def matches(path: str, pattern: str) -> bool:
    """Whether the whole path or its end, from some "/" on, fits the pattern."""
    return fnmatch.fnmatchcase("/" + path, "*/" + pattern)


def _generic(path: str) -> str:
    """`blocks/3/attention/query` -> `blocks/*/attention/query`."""
    return "/".join("*" if part.isdigit() else part for part in path.split("/"))
