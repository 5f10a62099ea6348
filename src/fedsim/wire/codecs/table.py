"""The codecs by name, and how an option's text becomes one."""

from __future__ import annotations

from collections.abc import Callable

from fedsim.config.calls import parse_call
from fedsim.config.words import nearest
from fedsim.wire.codecs.casts import bfloat16, float8_e4m3fn, float8_e5m2, float16
from fedsim.wire.codecs.chains import chain
from fedsim.wire.codecs.form import Codec
from fedsim.wire.codecs.low_rank import low_rank, powersgd, sketch
from fedsim.wire.codecs.quantisers import nf4, nnadq, qsgd, quantise, sign, terngrad
from fedsim.wire.codecs.rotations import drive, eden, rotate
from fedsim.wire.codecs.sparse import blocks, randomk, topk

CALL = "none, or codecs with + between them, like bfloat16 or topk(0.01)+quantise(8)"

CODECS: dict[str, Callable[..., Codec]] = {
    "bfloat16": bfloat16,
    "float16": float16,
    "float8_e4m3fn": float8_e4m3fn,
    "float8_e5m2": float8_e5m2,
    "quantise": quantise,
    "qsgd": qsgd,
    "nf4": nf4,
    "nnadq": nnadq,
    "terngrad": terngrad,
    "sign": sign,
    "topk": topk,
    "randomk": randomk,
    "blocks": blocks,
    "rotate": rotate,
    "drive": drive,
    "eden": eden,
    "powersgd": powersgd,
    "low_rank": low_rank,
    "sketch": sketch,
}


def codec(text: str, option: str = "codec") -> Codec | None:
    """The codec of a config's `codec_up` or `codec_down`; None for "none".

    Raises:
        ValueError: an unknown codec, or arguments that it does not take.
    """
    if text == "none":
        return None
    made = []
    for call in text.split("+"):
        name, args, options = parse_call(call.strip(), option)
        if name not in CODECS:
            raise ValueError(f"Expected {option}={text!r} to be {CALL}{nearest(name, CODECS)}.")
        try:
            made.append(CODECS[name](*args, **options))
        except TypeError as error:
            raise ValueError(f"Expected {option}={text!r} to be a call that {name} takes; {error}.") from None
    return chain(*made)
