"""Messages as they would really be sent: the oracle of every claimed price."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from fedsim.wire.prices import Tree, is_packet, named_leaves

if TYPE_CHECKING:
    from fedsim.wire.codecs import Codec


def to_bytes(leaf: Any) -> bytes:
    """The little-endian payload of one array."""
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    array = np.ascontiguousarray(np.asarray(leaf))
    return array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes()


def serialise(tree: Tree, codec: Codec | None = None) -> bytes:
    """The payload of one message as it would really be sent; the tests compare its length with `price`."""
    pack = to_bytes if codec is None else lambda leaf: codec.pack(np.asarray(leaf))
    return b"".join(pack(leaf.value) if is_packet(leaf) else to_bytes(leaf) for _, leaf in named_leaves(tree))
