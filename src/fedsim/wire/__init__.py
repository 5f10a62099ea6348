"""What a message costs: the price of every leaf in bytes, the codecs that lower it, and real packers as their oracle.

Begin with `prices.py`, then `marks.py`: what a reply says about itself. `copies.py` has messages as changes of what all
clients hold. Who sends what, and when, is no business of this room: `engine/cohort.py` asks it for prices.
"""

from __future__ import annotations

from fedsim.wire.codecs import CODECS, Codec, Sent, cast, chain, codec, entropy_bound, entropy_coded, quantise, topk
from fedsim.wire.copies import Copy, as_changes, of_changes
from fedsim.wire.marks import (
    Again,
    Coded,
    Kept,
    Most,
    again,
    arrive,
    brings,
    changes,
    coded,
    depart,
    is_coded,
    is_mark,
    kept,
    most,
    named,
    news,
    thins,
    unmarked,
    unmarked_leaves,
    whole,
)
from fedsim.wire.packers import pack, serialise, to_bytes, unpack
from fedsim.wire.prices import (
    Packet,
    PerClient,
    array_bytes,
    for_client,
    is_packet,
    message_bytes,
    named_leaves,
    part_bytes,
    parts,
    price,
    unwrap,
)
