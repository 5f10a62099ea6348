"""Casts: entries in floating-point types of fewer bits."""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from fedsim.wire.codecs.form import Codec, Coded, Read, Sent, Write, filled, travelling
from fedsim.wire.codecs.levels import by_levels, power_above, table
from fedsim.wire.prices import Tree


def bfloat16() -> Codec:
    """Cast to 16 bits, 8 of them mantissa, with the range of float32."""
    return cast("bfloat16")


def float16() -> Codec:
    """Cast to 16 bits, 11 of them mantissa; beyond 65504 nothing is finite, and the reply is left out."""
    return cast("float16")


def float8_e4m3fn(scale: bool = True) -> Codec:
    """Cast to 8 bits, 4 of them mantissa, scaled by leaf, or as they are and cut off at +-448."""
    return float8("float8_e4m3fn", scale)


def float8_e5m2(scale: bool = True) -> Codec:
    """Cast to 8 bits, 3 of them mantissa, scaled by leaf, or as they are and cut off at +-57344."""
    return float8("float8_e5m2", scale)


def cast(dtype: str) -> Codec:
    """Sends floating-point leaves as `dtype` ("bfloat16", "float16"); the receiver decodes them back.

    Guarantees: relative error at most half a unit in the last place of `dtype`, in its range.
    """
    wire = jnp.dtype(dtype)

    def encode(coded: Coded, key: Array, common: Array, state: Tree) -> tuple[dict[str, Sent], Tree]:
        def one(sent: Sent) -> Sent:
            return sent._replace(value=sent.value.astype(wire).astype(sent.value.dtype), bits=8 * wire.itemsize)

        return {name: one(sent) for name, sent in coded.items()}, state

    def pack(coded: Coded, write: Write) -> bytes:
        return b"".join(travelling(sent).astype(wire).tobytes() for sent in coded.values())

    def unpack(data: bytes, like: Coded, read: Read) -> dict[str, np.ndarray]:
        found, at = {}, 0
        for name, sent in like.items():
            entries = np.frombuffer(data, wire, len(travelling(sent)), at)
            found[name], at = filled(entries.astype(np.asarray(sent.value).dtype), sent), at + entries.nbytes
        return found

    return Codec(dtype, encode, pack, unpack, on_values=True, last=True, bits=8 * wire.itemsize)


def float8(dtype: str, scale: bool = True) -> Codec:
    """Sends entries as `dtype` ("float8_e4m3fn", "float8_e5m2") times a power of two of the leaf's, which is float32.

    Micikevicius et al., arXiv 2209.05433. Without a scale, finite entries beyond the type's range arrive as its largest,
    and those below a half of its smallest as zero.

    Guarantees: an error of at most half a unit in the last place, for entries from 2^-14 of the leaf's largest on.
    """
    if not isinstance(scale, bool):
        raise ValueError(f"Expected scale={scale} to be True or False; give {dtype}(scale=False).")
    narrow = jnp.dtype(dtype)
    top = float(jnp.finfo(narrow).max)
    values = np.arange(256, dtype=np.uint8).view(narrow).astype(np.float32)

    def choose(rows: Array, live: Array, key: Array) -> tuple[tuple[Array, ...], Array]:
        if scale:
            largest = jnp.max(jnp.abs(rows), axis=1, keepdims=True, initial=0.0, where=live)
            unit = power_above(largest / top)
            rows = rows / unit
            scales = (unit,)
        else:
            scales = ()
        inside = jnp.where(jnp.isfinite(rows), jnp.clip(rows, -top, top), jnp.nan).astype(narrow)
        return scales, lax.bitcast_convert_type(inside, jnp.uint8)

    def decode(xp: Any, level: Any, *unit: Any) -> Any:
        return math.prod(unit, start=table(xp, values, level))

    name = dtype if scale else f"{dtype}(scale=False)"
    return by_levels(name, 8, choose, decode, scales=int(scale))
