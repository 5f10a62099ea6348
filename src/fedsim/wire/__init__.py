"""What a message costs: the price of every leaf in bytes, the codecs that lower it, and real packers as their oracle.

Begin with `prices.py`. Who sends what, and when, is no business of this room: `engine/cohort.py` asks it for prices.
"""

from __future__ import annotations

from fedsim.wire.codecs import Codec, cast, codec, price_shapes
from fedsim.wire.packers import serialise, to_bytes
from fedsim.wire.prices import (
    Packet,
    PerClient,
    array_bytes,
    for_client,
    for_each,
    is_packet,
    message_bytes,
    named_leaves,
    parts,
    price,
    ranked,
    unwrap,
)
