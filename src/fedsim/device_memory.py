"""How much memory a device has, how much of it is free, and what is said when a program needs more."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, Protocol

import jax

from fedsim.report import size

GROUP = Path("/sys/fs/cgroup")  # where Linux says what a container may use
MEMORY = Path("/proc/meminfo")


class Need(NamedTuple):
    """Bytes that a program takes on each device, by the compiler's own analysis."""

    lanes: int
    """Activations, batches, clients' parameters and optimizers."""
    there: int
    """Backbone and examples, which lie on the device already."""


def device_memory(device: jax.Device) -> int:
    """Bytes of the device's memory; on a CPU, all devices share the machine's."""
    stats = device.memory_stats()
    if stats and "bytes_limit" in stats:
        return int(stats["bytes_limit"])
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // jax.local_device_count()


def free_memory(device: jax.Device, sharing: int) -> int:
    """Bytes of the device's memory that are still free; on a CPU, an equal share of what the machine has left.

    Args:
        sharing: devices in use, which share the memory if they are the host's.
    """
    stats = device.memory_stats()
    if stats and "bytes_limit" in stats:
        return int(stats["bytes_limit"]) - int(stats.get("bytes_in_use", 0))
    return available_memory() // sharing


def available_memory() -> int:
    """Bytes that this process can still get without another one losing any, within its container's limit."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        lines = dict(line.split(":", 1) for line in MEMORY.read_text().splitlines())
        free = int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):  # not Linux
        return total
    try:
        limit, used = (int((GROUP / name).read_text()) for name in ("memory.max", "memory.current"))
        stat = dict(line.split() for line in (GROUP / "memory.stat").read_text().splitlines())
        free = min(free, limit - used + int(stat["inactive_file"]))  # cached files give way
    except (OSError, KeyError, ValueError):  # no container, or one without a limit ("max")
        pass
    return free


def refuse_too_large(need: Need, free: int, lanes: int, batch_size: int, devices: int) -> None:
    """Refuses a program that does not fit beside what lies on the device already.

    Raises:
        ValueError: how much is needed, how much there is, and which settings to change.
    """
    if need.lanes <= free:
        return
    fewer = free * lanes // need.lanes  # all of it grows with the lanes
    lower = f"lower --lanes to about {fewer}, or" if fewer else f"lower batch_size={batch_size}, or"
    shared = f", one of {devices} that share the machine" if devices > 1 else ""
    raise ValueError(
        f"Expected lanes={lanes} with batch_size={batch_size} to fit into the memory of a device{shared}; a segment "
        f"needs {size(need.lanes)} beside the {size(need.there)} of backbone and examples, and {size(max(free, 0))} are "
        f"free: {lower} take --remat blocks or --precision bfloat16."
    )


class OutOfMemoryError(Exception):
    """A round did not fit into the device's memory; `lanes` were running."""

    def __init__(self, round: int, lanes: int) -> None:
        super().__init__(f"round {round} ran out of the device's memory with lanes={lanes}")
        self.lanes = lanes


class Engine(Protocol):
    """What is asked of an engine here."""

    lanes: int | str


@contextmanager
def out_of_memory(round: int, engine: Engine, batch_size: int) -> Iterator[None]:
    """Says which lanes ran out of memory; inputs were donated, so nothing of the round can be used again.

    Raises:
        OutOfMemoryError: more than one lane did.
        ValueError: a single one did.
    """
    try:
        yield
        return
    except jax.errors.JaxRuntimeError as error:
        # Of several processes, the others would wait for this one.
        if "RESOURCE_EXHAUSTED" not in str(error) or engine.lanes == "auto" or jax.process_count() > 1:
            raise
        why = str(error).partition("\n")[0]
    if engine.lanes == 1:
        raise ValueError(
            f"Expected one lane with batch_size={batch_size} to fit into the device's memory in round {round} ({why}); "
            "lower batch_size, or take --remat blocks or --precision bfloat16."
        )
    raise OutOfMemoryError(round, int(engine.lanes))
