"""Messages as they would really be sent: the oracle of every claimed price."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from fedsim.wire import codecs
from fedsim.wire.codecs import Codec, Sent
from fedsim.wire.prices import Tree, is_packet, named_leaves


def to_bytes(leaf: Any) -> bytes:
    """The little-endian payload of one array."""
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    array = np.ascontiguousarray(np.asarray(leaf))
    return array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes()


def serialise(tree: Tree) -> bytes:
    """The payload of one message without packets as it would really be sent; the tests compare its length with `price`."""
    if any(is_packet(leaf) for _, leaf in named_leaves(tree)):
        raise ValueError("Expected a message without packets; pack what a codec acts on by wire.pack.")
    return b"".join(to_bytes(leaf) for _, leaf in named_leaves(tree))


def pack(coded: dict[str, Sent], codec: Codec | None) -> bytes:
    """The marked leaves of one message, by name, as `codec.encode` gave them."""
    coded = jax.device_get(dict(sorted(coded.items())))
    return codec.pack(coded, codecs.write) if codec else codecs.write(coded)


def unpack(data: bytes, like: dict[str, Sent], codec: Codec | None) -> dict[str, np.ndarray]:
    """What the receiver decodes.

    Args:
        like: the leaves before the codec; their masks are what the receiver knows by itself, their values are not read.
    """
    like = dict(sorted(like.items()))  # the order in which `pack` writes them
    zeros: Any = {name: np.zeros_like(np.asarray(sent.value)) for name, sent in like.items()}
    blank = {name: sent._replace(value=zeros[name]) for name, sent in like.items()}
    return codec.unpack(data, blank, codecs.read) if codec else codecs.read(data, blank)
