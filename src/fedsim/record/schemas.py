"""What the JSON files of a run's folder hold, and what of a value is not so. `docs/record.md` documents every field."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedsim.config import SCORES as NAMES

Shape = (
    Any  # a type; (shape, ...): any of them, None for null; [shape]: a list; {name: shape}: an object, "name?" may lack
)
WORDS = {
    str: "a text",
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    dict: "an object",
    None: "null",
}
HUGE = 10**300  # beyond it a whole number is no float

MAYBE = (None, float)
SCORES = {"loss": MAYBE, **{f"{name}?": MAYBE for name in NAMES if name != "loss"}}
BYTES = dict.fromkeys(("up", "down", "total", "setup", "with_setup"), int)
SIMULATED = {
    **dict.fromkeys(("unavailable", "dropped", "late", "surplus"), int),
    **dict.fromkeys(("seconds", "total_seconds"), MAYBE),
}

PRIVACY = {"epsilon": MAYBE, "delta": float, **dict.fromkeys(("unit?", "relation?", "accountant?", "sampling?"), str)}

FILE = {"path?": str, "sha256?": str}
ABOUT: Shape = {
    "schema": int,
    "config": dict,
    "speed": dict,
    "classes?": [str],
    "input_shape?": [int],
    "backbone_hash?": str,
    "identity?": str,
    "data_hash?": str,
    "files?": {str: FILE},
    "versions?": {str: str},
    "git?": (None, {"commit": str}),
    "server_examples?": {"public": int, "shard": int},
    "device?": {"platform": str, "kind": str, "count": int},
    **dict.fromkeys(("config_hash?", "started?", "python?", "platform?"), str),
}

INTEGERS = ("round", "bytes_up", "bytes_down", "setup_bytes", "total_bytes_up", "total_bytes_down")
INTEGERS += ("clients", "reported", "nonfinite", "examples")
NUMBERS = ("loss", "seconds", "compile_seconds", "clients_per_second", "examples_per_second")
NUMBERS += ("lane_occupancy", "row_occupancy")
NULLABLE = ("loss", "clients_per_second", "examples_per_second")  # where nobody reported, or all compiled
LEAVES = ("bytes_up_leaves", "bytes_down_leaves")
LINE: Shape = {
    "schema": int,
    "phase": str,
    **dict.fromkeys(INTEGERS, int),
    **{name: MAYBE if name in NULLABLE else float for name in NUMBERS},
    **{name: {str: int} for name in LEAVES},
    **{name: shape for name, shape in SCORES.items() if name != "loss"},
    "validation": (None, SCORES),
    "validation_clients?": (None, [MAYBE]),
    "peers?": (None, {"transmissions": int, "broadcast_bytes": int}),
    "simulated?": (None, SIMULATED),
    "metrics?": {str: MAYBE},
    "bitwise?": bool,
    "server_seconds?": float,
    "server_flops?": float,
    "privacy?": (None, PRIVACY),
}

TESTED = {
    "clients": int,
    **dict.fromkeys(("mean?", "weighted_mean?", "worst?", "best?"), MAYBE),
    "deciles?": (None, [MAYBE]),
}
CLIENT_ROWS: Shape = {
    "schema": int,
    "clients": [
        {
            **dict.fromkeys(("client", "train", "test"), int),
            **{name: {str: MAYBE} for name in SCORES},
            "curve?": [[MAYBE]],
        },
    ],
}

END = {"validation": (None, SCORES), "test": (None, SCORES)}
SUMMARY_SHAPE: Shape = {
    "schema": int,
    "rounds": int,
    "stopped": str,
    "start": END,
    "final": {**END, "clients?": (None, {str: (None, TESTED)})},
    "best?": (None, {"round": int, **{f"{name}?": MAYBE for name in NAMES}}),
    "metric?": str,
    "bytes": BYTES,
    "full_fine_tuning_bytes": BYTES,
    **dict.fromkeys(("ratio", "ratio_with_setup"), MAYBE),
    "parameters?": {"trained": int, "frozen": int},
    **dict.fromkeys(("clients", "examples", "nonfinite"), int),
    "simulated?": (None, dict),
    **dict.fromkeys(("seconds", "seconds_in_rounds", "compile_seconds"), float),
    "privacy?": (None, PRIVACY),
    "identity?": str,
    "sha256?": {str: str},
}


def fault(value: Any, shape: Shape, at: str = "") -> str:
    """What of a decoded JSON value is not of a shape, as `"config to be an object, not 3"`; empty for nothing."""
    if isinstance(shape, tuple):
        wrong = [fault(value, one, at) for one in shape]
        return wrong[-1] if all(wrong) else ""
    if isinstance(shape, list):
        if not isinstance(value, list):
            return f"{at} to be a list, not {_short(value)}"
        return next((w for i, x in enumerate(value) if (w := fault(x, shape[0], f"{at}[{i}]"))), "")
    if isinstance(shape, Mapping):
        return _object_fault(value, shape, at)
    return "" if _is(value, shape) else f"{at} to be {WORDS[shape]}, not {_short(value)}"


def _object_fault(value: Any, shape: Mapping[Any, Shape], at: str) -> str:
    if not isinstance(value, dict):
        return f"{at} to be an object, not {_short(value)}"
    if str in shape:  # any names
        pairs = [(name, shape[str]) for name in value]
    else:
        lacking = [name for name in shape if not name.endswith("?") and name not in value]
        if lacking:
            return f"{'.'.join(filter(None, (at, lacking[0])))} to be there"
        pairs = [(name.removesuffix("?"), of) for name, of in shape.items() if name.removesuffix("?") in value]
    return next((w for name, of in pairs if (w := fault(value[name], of, f"{at}.{name}" if at else name))), "")


def _is(value: Any, kind: Any) -> bool:
    if kind is None:
        return value is None
    if kind in (int, float):
        kinds = int if kind is int else (int, float)
        return isinstance(value, kinds) and not isinstance(value, bool) and -HUGE < value < HUGE
    if kind is str:
        return isinstance(value, str) and not any("\ud800" <= c <= "\udfff" for c in value)  # halves cannot be printed
    return isinstance(value, kind)


def _short(value: Any) -> str:
    text = repr(value) if not isinstance(value, int) or abs(value) < HUGE else "a number of hundreds of digits"
    return text if len(text) <= 40 else text[:37] + "..."
