"""The process that a run lives in: its CPU as devices, allocator, compilation cache, clock of compilation, how far."""

from __future__ import annotations

import ctypes
import functools
import gc
import math
import os
import platform
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np

from fedsim.config import Speed
from fedsim.data.assets import cache_dir

CPU_DEVICES = 2  # measured on two cores (docs/lanes.md); they share backbone and examples
ALIGNMENT, LARGE = 64, 2**16  # bytes
COLLECT = 50_000, 20, 10  # thresholds of the garbage collector, with which tracing takes a tenth less time
PYTHONS = 2000  # the most that a Python has for the first of them by itself; more was chosen by somebody
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


def tune_host(speed: Speed) -> None:
    """A divided CPU, the persistent compilation cache, an allocator that keeps large buffers instead of returning each.

    Tracing makes hundreds of thousands of small objects, which live on; Python would look through them again and again.

    XLA on a CPU allocates its temporaries at every call; glibc maps and unmaps those above 32 MiB each time, and the
    page faults cost a part of every forward pass (`benchmarks/engine/allocator.py` measures it). What a thread of XLA's own
    allocates beyond 64 MiB is mapped each time all the same, once for a segment (docs/kernels.md).
    """
    divide_cpu(speed.devices)
    if 0 < gc.get_threshold()[0] <= PYTHONS:
        gc.set_threshold(*COLLECT)
    if speed.compilation_cache:
        jax.config.update("jax_compilation_cache_dir", str(cache_dir() / "compiled"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.02)
    if jax.default_backend() == "cpu" and platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_THRESHOLD, 2**30)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def cpu_devices() -> int:
    """As how many devices JAX shows the CPU if nothing else is said: two, where there are two cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(CPU_DEVICES, cores)


def divide_cpu(devices: int | None) -> bool:
    """Has JAX show the CPU as several devices, each with lanes of its own, if JAX has not started yet.

    A program on one device waits for all cores at the end of every operation; two devices wait for each other once a
    round. Nothing is done where the user has divided the CPU already.

    Args:
        devices: how many; None for `cpu_devices`.

    Returns:
        Whether it was done.
    """
    divided = "--xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    if divided or jax.config.values["jax_num_cpu_devices"] != -1:
        return False
    try:
        jax.config.update("jax_num_cpu_devices", devices or cpu_devices())
    except RuntimeError:  # JAX has started
        return False
    return True


def keep_to_cpu() -> None:
    """Has JAX leave accelerators, and their memory, to other processes; nothing is done where it has started already."""
    jax.config.update("jax_platforms", "cpu")


def zeros(shape: Sequence[int], dtype: Any) -> np.ndarray:
    """Zeros from an address that XLA takes as it is: a CPU's devices then share this memory instead of copying it."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    room = np.zeros(size + ALIGNMENT, np.uint8)
    start = -room.ctypes.data % ALIGNMENT
    return room[start : start + size].view(dtype).reshape(shape)


def aligned(array: Any) -> Any:
    """A host array as `zeros` has it, copied where it lies elsewhere; small ones and arrays of JAX as they are."""
    if not isinstance(array, np.ndarray) or array.nbytes < LARGE:
        return array
    if array.flags.c_contiguous and array.ctypes.data % ALIGNMENT == 0:
        return array
    found = zeros(array.shape, array.dtype)
    found[...] = array
    return found


class CompileClock:
    """Seconds that JAX has spent compiling in this process since this clock was made; see `compile_clock`.

    Tracing a function traces the compiled functions that it calls, and JAX reports both: what lies within a longer span
    counts once.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self._spans: list[tuple[float, float]] = []  # (start, seconds), apart, ascending
        jax.monitoring.register_event_duration_secs_listener(self._listen)

    def _listen(self, event: str, duration_secs: float, **_: Any) -> None:
        if not event.startswith("/jax/core/compile/"):
            return
        start = time.perf_counter() - duration_secs
        while (
            self._spans and sum(self._spans[-1]) - self._spans[-1][1] / 2 > start
        ):  # its middle: clocks differ a little
            self.seconds -= self._spans.pop()[1]
        self._spans.append((start, duration_secs))
        self.seconds += duration_secs


@functools.cache  # JAX keeps every listener for good: one for all runs of a process
def compile_clock() -> CompileClock:
    """The process's clock of compilation."""
    return CompileClock()


# --- how far something long is

Far = Callable[[str, int, int], None]  # (what is done, how many of it, of how many)
_watchers: list[Far] = []  # of this process; a display watches while it is shown


def went(what: str, done: int, of: int) -> None:
    """Tells whoever watches how far something long is; costs nothing where nobody does."""
    for watcher in _watchers:
        watcher(what, done, of)


@contextmanager
def watched(by: Far) -> Iterator[None]:
    """While it is open, `by` is told what `went` is told."""
    _watchers.append(by)
    try:
        yield
    finally:
        _watchers.remove(by)


def warn_idle_accelerator() -> None:
    """Says once how to install JAX for an accelerator that this machine has and JAX does not see."""
    if jax.default_backend() != "cpu" or os.environ.get("JAX_PLATFORMS") == "cpu":
        return
    for device, extra in (("/dev/nvidia0", "cuda13"), ("/dev/accel0", "tpu")):
        if Path(device).exists():
            warnings.warn(
                f"This machine has {device}, but JAX runs on the CPU; pip install -e '.[{extra}]' "
                f"{'(cuda12 for an older driver) ' if extra.startswith('cuda') else ''}brings the right JAX.",
                stacklevel=2,
            )
            return
