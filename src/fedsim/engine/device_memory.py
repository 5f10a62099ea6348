"""How much memory a device has, how much of it is free, and what is said when a program needs more."""

from __future__ import annotations

import math
import resource
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol, TypeVar

import jax

from fedsim import host_memory
from fedsim.engine import processes
from fedsim.units import size

T = TypeVar("T")


class Need(NamedTuple):
    """Bytes that a program takes on each device, by the compiler's own analysis."""

    lanes: float
    """Activations, batches, clients' parameters and optimizers; infinite where the compiler only says that it is too much."""
    there: int
    """Backbone and examples, which lie on the device already."""


def device_memory(device: jax.Device) -> int:
    """Bytes of the device's memory; on a CPU those of the machine or the container, in which all its devices lie."""
    stats = device.memory_stats()
    if stats and "bytes_limit" in stats:
        return int(stats["bytes_limit"])
    return host_memory.total()


def free_memory(device: jax.Device, sharing: int) -> int:
    """Bytes of the device's memory that are still free; on a CPU, an equal share of what the machine has left.

    Args:
        sharing: devices in use, which share the memory if they are the host's.
    """
    stats = device.memory_stats()
    if stats and "bytes_limit" in stats:
        return int(stats["bytes_limit"]) - int(stats.get("bytes_in_use", 0))
    return host_memory.available() // sharing


def most_memory(device: jax.Device) -> int:
    """The most bytes of the device's memory that were in use so far; on a CPU of the machine's, by this process."""
    stats = device.memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return int(stats["peak_bytes_in_use"])
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def refuse_too_large(need: Need, free: int, lanes: int, batch_size: int, devices: int) -> None:
    """Refuses a program that does not fit beside what lies on the device already.

    Args:
        devices: that share the machine's memory; 1 for an accelerator, which has its own.

    Raises:
        ValueError: how much is needed, how much there is, and which settings to change.
    """
    if need.lanes <= free:
        return
    known = math.isfinite(need.lanes)
    fewer = int(free * lanes // need.lanes) if known else lanes // 2  # all of it grows with the lanes
    lower = f"lower --lanes to about {fewer}, or" if fewer > 0 else f"lower batch_size={batch_size}, or"
    needs = size(int(need.lanes)) if known else "more than its compiler accepts"
    shared = f", one of {devices} that share the machine" if devices > 1 else ""
    raise ValueError(
        f"Expected lanes={lanes} with batch_size={batch_size} to fit into the memory of a device{shared}; a segment "
        f"needs {needs} beside the {size(need.there)} of backbone and examples, and {size(max(free, 0))} are "
        f"free: {lower} take --remat blocks or --precision bfloat16."
    )


def exhausted(error: Exception) -> bool:
    """Whether a device's memory ran out, or would by its compiler's word."""
    return "RESOURCE_EXHAUSTED" in str(error)


class ExhaustedError(Exception):
    """The memory of a device ran out in one of several processes, and all of them know."""


def all_fit(compute: Callable[[], T]) -> T:
    """`compute()`, which has this process' devices compute and communicates nothing; of several processes, all learn here
    whether memory ran out in one, before any waits for the others in a sum.

    Raises:
        ExhaustedError: it did, in this process or in another.
    """
    if not processes.several():
        return compute()

    def tried() -> tuple[Any, str]:
        try:
            return jax.block_until_ready(compute()), ""
        except jax.errors.JaxRuntimeError as error:
            if not exhausted(error):
                raise
            traceback.clear_frames(error.__traceback__)  # they hold arrays, and the next try needs the memory
            return None, str(error).partition("\n")[0]

    result, why = processes.each(tried)
    if processes.any_true(bool(why)):
        raise ExhaustedError(why or "RESOURCE_EXHAUSTED in another process")
    return result


def all_know(error: Exception) -> bool:
    """Whether memory ran out and every process knows. Otherwise the others wait for this one already, which has to end."""
    return isinstance(error, ExhaustedError) or (exhausted(error) and not processes.several())


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
    except (jax.errors.JaxRuntimeError, ExhaustedError) as error:
        if not all_know(error) or engine.lanes == "auto":
            raise
        why = str(error).partition("\n")[0]
    if engine.lanes == 1:
        raise ValueError(
            f"Expected one lane with batch_size={batch_size} to fit into the device's memory in round {round} ({why}); "
            "lower batch_size, or take --remat blocks or --precision bfloat16."
        )
    raise OutOfMemoryError(round, int(engine.lanes))
