"""A small decoder out of a large one: its first blocks, again and again with the same weights, and prompts that fit both.

What FedSP's auxiliary model is made of; paths are those of `backbones/`, `blocks/3/mlp/up/kernel`.
"""

from __future__ import annotations

import re
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from fedsim.core import Params, Task, Tree

PROMPT = re.compile(r"blocks/(\d+)/(?:.+/)?prefix_(?:key|value)")
BLOCK = re.compile(r"blocks/(\d+)/(.+)")


class Shape(NamedTuple):
    """How the models hang together."""

    layers: int  # L, G's blocks
    unique: int  # c, blocks of A with weights of their own
    depth: int  # L_c, A's blocks


def shape_of(task: Task, unique: int, depth: int | None) -> Shape:
    """The blocks of both models.

    Raises:
        ValueError: a model that trains anything but the prefix of every block, or numbers of blocks that do not divide.
    """
    others = sorted(path for path in task.trained if not PROMPT.fullmatch(path))
    if others or not task.trained or task.features is None:
        raise ValueError(
            "Expected the prefix of every block to be all that algorithm='fed_sp' trains, as prompts are its messengers, not "
            f"{', '.join(others[:3]) or 'nothing'}; give --task language_model --peft prefix."
        )
    layers = len({block_of(path) for path in task.trained})
    depth = layers if depth is None else depth
    for name, part, whole, of in (
        ("depth", depth, layers, "the blocks of the server's model"),
        ("unique", unique, depth, "the blocks of the auxiliary model"),
    ):
        if isinstance(part, bool) or not isinstance(part, int) or part < 1 or whole % part:
            raise ValueError(f"Expected {name}={part!r} to divide {whole}, {of}; give one that does, or leave it out.")
    return Shape(layers, unique, depth)


def block_of(path: str) -> int | None:
    """Number of the block that a leaf lies in; None outside the blocks."""
    found = BLOCK.fullmatch(path)
    return int(found[1]) if found else None


def in_block(path: str, block: int) -> str:
    """The path of the same leaf in another block."""
    return BLOCK.sub(rf"blocks/{block}/\2", path)


def uniques(held: Tree, shape: Shape) -> list[str]:
    """Paths of the leaves that the auxiliary model has: all but those of later blocks.

    Raises:
        ValueError: the server's blocks differ, so that one cannot stand for another.
    """
    for path, leaf in held.items():
        block = block_of(path)
        source = path if block is None else in_block(path, block % shape.unique)
        if source not in held or held[source].shape != leaf.shape:
            raise ValueError(
                f"Expected {path} of the server's model to be shaped as {source}, as algorithm='fed_sp' repeats its first "
                f"{shape.unique} blocks; take a decoder of equal blocks, or unique={shape.layers}."
            )
    blocks = {path: block_of(path) for path in held}
    return [path for path, block in blocks.items() if block is None or block < shape.unique]


def tied(held: Tree, auxiliary: Params, shape: Shape) -> Params:
    """A as the model reads it: every leaf of G's, taken from A's unique ones; blocks behind its depth do nothing.

    Args:
        held: G; of it A's unique leaves are read and no others.
        auxiliary: those of A's unique leaves that differ from G's.
    """

    def leaf(path: str, block: int | None) -> Array:
        source = path if block is None else in_block(path, block % shape.unique)
        value = auxiliary[source] if source in auxiliary else held[source]
        return value if block is None or block < shape.depth else jnp.zeros_like(value)

    return {path: leaf(path, block_of(path)) for path in held}


def thinned(prompts: Params, shape: Shape) -> Params:
    """Prompts of G for the blocks of A: each gets the mean of those that it stands for, depth apart."""
    groups = [range(first, shape.layers, shape.depth) for first in range(shape.depth)]
    return {
        path: jnp.mean(jnp.stack([prompts[in_block(path, b)] for b in groups[block]]), axis=0)
        for path in prompts
        if (block := block_of(path)) is not None and block < shape.depth
    }


def tiled(prompts: Params, shape: Shape) -> Params:
    """Prompts of A for the blocks of G, again and again."""
    return {
        in_block(path, later): leaf
        for path, leaf in prompts.items()
        for later in range(block_of(path) or 0, shape.layers, shape.depth)
    }
