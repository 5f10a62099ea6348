"""Options as older runs wrote them: read under today's names, and hashed as before where they say nothing new."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

RENAMED = {"target_accuracy": "target"}  # the name of before -> today's
ADDED: dict[str, Any] = {
    "task": "classification",
    "metric": None,
    "groups": (),
    "public_share": 0.0,
    "server_share": 0.0,
    "dp": "none",
    "epsilon": None,
    "delta": None,
    "noise_multiplier": None,
    "clip_norm": 1.0,
    "clip_quantile": None,
    "per_layer": False,
    "bands": 1,
    "sampling": "poisson",
    "relation": None,
    "accountant": None,
    "turns": "template",
    "loss_on": "answers",
    "too_long": "cut",
    "packing": False,
}  # options since then -> what a run without them did


def today(stored: Mapping[str, Any]) -> dict[str, Any]:
    """Stored options under today's names."""
    return {RENAMED.get(name, name): value for name, value in stored.items()}


def hashed(options: Mapping[str, Any]) -> dict[str, Any]:
    """What the hash of options is of: their first names, and none that was added since and says what was done without it.

    So a checkpoint of an older run knows its config again.
    """
    first = {new: old for old, new in RENAMED.items()}
    return {first.get(name, name): v for name, v in options.items() if name not in ADDED or v != ADDED[name]}
