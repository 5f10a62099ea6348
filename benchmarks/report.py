"""What the benchmarks share: interleaved timing, and a JSON file that says where and with what it was measured."""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax

from fedsim import record
from fedsim.config import Speed

RESULTS = Path(__file__).parent / "results"


def speed() -> Speed:
    """The host's settings of a run, without the cache of compiled programs."""
    return Speed(compilation_cache=False)


def interleaved(variants: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Seconds of every repeat of every variant; one repeat of all, then the next, so that a disturbance hits all."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(repeats):
        for name, run in variants.items():
            start = time.perf_counter()
            jax.block_until_ready(run())
            seconds[name].append(time.perf_counter() - start)
    return seconds


def place(name: str, options: Any) -> Path:
    """`results/NAME.json`, or `NAME-small.json` of a small run."""
    small = "-small" if getattr(options, "small", False) else ""
    return RESULTS / f"{name}{small}.json"


def write(
    name: str,
    options: Any,
    results: Any,
    more: Mapping[str, Any] | None = None,
    machine: Mapping[str, Any] | None = None,
) -> Path:
    """Writes `place(name, options)` with machine, versions, commit and load.

    Args:
        more: further entries beside `results`, in the place of none of these.
        machine: `record.machine()` of the process that measured; default: of this one, which then opens its devices.
    """
    file = place(name, options)
    content = {
        **(more or {}),
        "benchmark": name,
        "time": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "options": dataclasses.asdict(options),
        **(machine or record.machine()),
        "load": os.getloadavg(),
        "results": results,
    }
    RESULTS.mkdir(exist_ok=True)
    file.write_text(json.dumps(record.plain(content), indent=1) + "\n")
    print(f"written: {file}")
    return file
