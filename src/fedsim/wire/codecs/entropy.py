"""What entropy coding would make of a message: an extra figure, which no price and no record counts."""

from __future__ import annotations

import math
import zlib

import jax
import numpy as np

from fedsim.wire.codecs.form import Codec, Coded, Sent, travelling, write
from fedsim.wire.codecs.levels import Levels


def entropy_coded(coded: Coded, codec: Codec | None) -> int:
    """Bytes of the packed message after a real coder (Huffman codes, and repeats, of zlib), never more than as it is packed.

    Levels are coded as a byte or two each, as bits that cross bytes hide what is frequent; scales, indices and the rest as they
    are packed. It is the size of a buffer from which all of it comes back.
    """
    coded = jax.device_get(dict(sorted(coded.items())))
    data = codec.pack(coded, write) if codec else write(coded)
    levels = [(one, own) for one, own in all_levels(coded) if own.level.size]
    if not levels:
        return min(len(data), len(zlib.compress(data, 9)))
    streams = [stream(travelling(one, own.level), int(own.bits)) for one, own in levels]
    bare = len(data) - sum(packed_length(one, own) for one, own in levels)
    return min(len(data), bare + len(zlib.compress(b"".join(streams), 9)))


def entropy_bound(coded: Coded) -> float:
    """Bytes of the levels of all leaves at the entropy of how often each occurs in its leaf: what no coder of single levels
    goes below. Scales, indices and the counts themselves are not in it."""
    coded = jax.device_get(dict(sorted(coded.items())))
    bits = 0.0
    for one, own in all_levels(coded):
        level = travelling(one, own.level)
        if level.size:
            _, counts = np.unique(level, return_counts=True)
            bits += float(-(counts * np.log2(counts / level.size)).sum())
    return bits / 8


def all_levels(coded: Coded) -> list[tuple[Sent, Levels]]:
    """Leaves that travel as levels, in place of others, too: what says which entries there are, and the levels."""
    found = []
    for one in coded.values():
        for own in dict(one.aux).values():
            if isinstance(own, Levels):
                found.append((one, own))
            elif isinstance(own, Sent):
                found += all_levels({"": own})
            elif isinstance(own, dict):
                found += all_levels(own)
    return found


def stream(level: np.ndarray, bits: int) -> bytes:
    """Levels as bytes: one each, or all low and then all high ones."""
    return b"".join((level >> shift).astype(np.uint8).tobytes() for shift in range(0, bits, 8))


def packed_length(one: Sent, own: Levels) -> int:
    """Bytes of a leaf's levels as they are packed."""
    return math.ceil(travelling(one, own.level).size * int(own.bits) / 8)
