"""Codecs, which make leaves cost less: `encode` inside jit, `pack` and `unpack` for real on one leaf."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedsim.wire.packers import to_bytes
from fedsim.wire.prices import Packet, Tree, is_packet, price


class Codec(NamedTuple):
    """`encode` maps a tree of arrays to a tree of packets inside jit; `pack`/`unpack` do it for real, on one leaf."""

    encode: Callable[[Tree], Tree]
    pack: Callable[[np.ndarray], bytes]
    unpack: Callable[[bytes, tuple[int, ...]], np.ndarray]


def price_shapes(shapes: Tree, codec: Codec | None = None) -> dict[str, int]:
    """What `price` gives for a message of these shapes after `codec`, before there is one: no array is made.

    Raises:
        ValueError: a packet's price depends on the values.
    """
    if codec is None:
        return price(shapes)
    prices: dict[str, int] = {}

    def trace(tree: Tree) -> None:
        # A price that follows from shapes is a number here; one that follows from values stays a tracer, and is refused.
        with jax.ensure_compile_time_eval():
            prices.update(price(codec.encode(tree)))

    jax.eval_shape(trace, shapes)
    return prices


def cast(dtype: str) -> Codec:
    """Sends floating-point leaves as `dtype` ("bfloat16", "float16"); the receiver decodes them back.

    Guarantees: relative error at most half a unit in the last place of `dtype`, in its range.
    """
    wire = jnp.dtype(dtype)

    def encode_leaf(leaf: Any) -> Any:
        if is_packet(leaf) or not jnp.issubdtype(leaf.dtype, jnp.floating):
            return leaf
        return Packet(leaf.astype(wire).astype(leaf.dtype), jnp.uint32(leaf.size * wire.itemsize))

    def encode(tree: Tree) -> Tree:
        return jax.tree.map(encode_leaf, tree, is_leaf=is_packet)

    def pack(leaf: np.ndarray) -> bytes:
        return to_bytes(leaf.astype(wire))

    def unpack(data: bytes, shape: tuple[int, ...]) -> np.ndarray:
        return np.frombuffer(data, wire).reshape(shape).astype(np.float32)

    return Codec(encode, pack, unpack)


def codec(name: str) -> Codec | None:
    """The codec of a config's `codec_up` or `codec_down`; None for "none"."""
    return None if name == "none" else cast(name)
