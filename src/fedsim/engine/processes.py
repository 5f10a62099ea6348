"""Several processes that simulate together, by `jax.distributed`: each runs the same program over the devices of all.

Every process plans the same cohort and keeps the same host state; of what is split over devices it copies its own
devices' blocks only. What only one may do - read and write the run's folder - process 0 does, and tells the others
(`by_first`). With one process all of this is a plain call. docs/distributed.md says how to start them.

Whatever communicates here must be called by all processes, in the same order.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import os
import pickle
import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, TypeVar

import jax
import numpy as np
from jax import Array
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from fedsim.core import Tree

T = TypeVar("T")

GRACE = 2.0  # seconds
SHORT = 1024  # bytes that a message between processes takes in one turn; longer ones take a second
REMEDY = "give --coordinator HOST:PORT, --processes N and --process-id I to each process"
LOOPBACK = ("127.0.0.1", "localhost", "[::1]")


def distributed(
    coordinator: str | None = None, processes: int | None = None, process_id: int | None = None, timeout: int = 300
) -> None:
    """Makes this process one of several that simulate together; before anything else that computes with JAX.

    Args:
        coordinator: "host:port" of process 0, the same in all; None to take it from the cluster or JAX's environment.
        processes: how many there are; None as above.
        process_id: this one's number, from 0; None as above.
        timeout: seconds to wait for the others.

    Raises:
        ValueError: impossible numbers, no cluster to take them from, or processes with different numbers of devices.
        OSError: the others did not come in time, or the port is taken.
    """
    if processes is not None and processes < 1:
        raise ValueError(f"Expected processes={processes} >= 1; give the number of processes that you start.")
    if process_id is not None and (process_id < 0 or process_id >= (processes or process_id + 1)):
        raise ValueError(f"Expected process_id={process_id} to be from 0 to processes - 1 = {(processes or 1) - 1}.")
    host, _, port = (coordinator or "").rpartition(":")
    if coordinator is not None and not (host and port.isdigit()):
        raise ValueError(f"Expected coordinator={coordinator!r} to be HOST:PORT, as in 10.0.0.1:9876.")
    if getattr(jax.config, "jax_cpu_collectives_implementation", None) is None:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_enable_preemption_service", False)  # it would swallow SIGTERM
    try:
        jax.distributed.initialize(
            coordinator,
            processes,
            process_id,
            initialization_timeout=timeout,
            # Nobody outside the machine needs to reach a coordinator on its loopback address.
            coordinator_bind_address=coordinator if host in LOOPBACK else None,
        )
    except ValueError as error:
        raise ValueError(f"Expected a cluster that JAX knows, or all options ({error}); {REMEDY}.") from None
    except RuntimeError as error:  # JAX' own errors of communication are of this type, too
        if "must be called before" in str(error) or "only be called once" in str(error):
            raise ValueError(f"Expected fedsim.distributed to be called once, and first ({error}).") from None
        raise OSError(
            f"Expected {processes or 'all'} processes to meet at {coordinator or 'the coordinator'} within {timeout} s "
            f"({first_line(error)}); start all of them, with a port that is free and reachable."
        ) from None
    sys.excepthook = uncaught
    counts = [sum(d.process_index == i for d in jax.devices()) for i in range(jax.process_count())]
    if len(set(counts)) > 1 or counts[0] == 0:
        raise ValueError(
            f"Expected every process to have the same number of devices >= 1, not {counts}; give each its own, by "
            "JAX_LOCAL_DEVICE_IDS on accelerators, XLA_FLAGS=--xla_force_host_platform_device_count=N on CPUs."
        )
    agree(
        "the versions of fedsim and JAX", [importlib.metadata.version(name) for name in ("fedsim-jax", "jax", "jaxlib")]
    )


def several() -> bool:
    """Whether there is more than one process."""
    return jax.distributed.is_initialized() and jax.process_count() > 1  # the first does not start JAX


def is_first() -> bool:
    """Whether this is process 0, which reads and writes the run's folder and shows it."""
    return not several() or jax.process_index() == 0


def devices(count: int | None) -> list[jax.Device]:
    """The devices of all processes, `count` of each (default: all), process by process.

    Raises:
        ValueError: a process has fewer.
    """
    available = jax.local_device_count()
    if count is not None and count > available:
        raise ValueError(f"Expected devices={count} <= {available}, the devices of this process; lower it.")
    own = [[d for d in jax.devices() if d.process_index == i] for i in range(jax.process_count())]
    return [device for each in own for device in each[:count]]


# --- device values


def put(tree: Tree, sharding: NamedSharding) -> Tree:
    """Host values, the same in all processes, on the devices; a process copies its own devices' blocks only.

    Nothing is communicated, and nothing compared: that the values are the same is the caller's promise.
    """
    if sharding.is_fully_addressable:
        return jax.device_put(tree, sharding)

    def one(leaf: Any) -> Array:
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            return jax.device_put(leaf, sharding)
        if isinstance(leaf, jax.Array) and (is_key(leaf) or leaf.weak_type):
            return copier(sharding)(leaf)  # what a NumPy array cannot say
        host = np.asarray(leaf)
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

    return jax.tree.map(one, tree)


def put_rows(tree: Tree, rows: np.ndarray, sharding: NamedSharding) -> Tree:
    """Rows (D, ...) of host arrays (n, ...) as arrays (D, ..., ...) split over the devices; a process reads its own only."""
    if sharding.is_fully_addressable:
        return jax.device_put(jax.tree.map(lambda leaf: leaf[rows], tree), sharding)

    def one(leaf: np.ndarray) -> Array:
        def block(index: Any) -> np.ndarray:
            return leaf[rows[index[0]]]

        return jax.make_array_from_callback(rows.shape + leaf.shape[1:], sharding, block)

    return jax.tree.map(one, tree)


def fetch(tree: Tree) -> Tree:
    """Device values as NumPy arrays, the same in every process; what is split over processes is gathered."""
    leaves, structure = jax.tree.flatten(tree)
    split = [i for i, leaf in enumerate(leaves) if isinstance(leaf, jax.Array) and not readable(leaf)]
    if split:
        whole = NamedSharding(leaves[split[0]].sharding.mesh, P())
        for i, leaf in zip(split, copier(whole)([leaves[i] for i in split]), strict=True):
            leaves[i] = leaf
    return jax.tree.unflatten(structure, jax.device_get(leaves))


def local(tree: Tree) -> Tree:
    """Replicated values as this process' own arrays: computing with them involves no other process."""

    def one(leaf: Any) -> Any:
        return leaf if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable else leaf.addressable_data(0)

    return jax.tree.map(one, tree)


def is_key(leaf: Any) -> bool:
    """Whether a leaf is a typed random key."""
    return isinstance(leaf, jax.Array) and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def readable(leaf: Array) -> bool:
    """Whether this process holds all of an array."""
    return leaf.is_fully_addressable or leaf.is_fully_replicated


@functools.cache
def copier(sharding: NamedSharding) -> Callable[[Tree], Tree]:
    """A compiled copy of any tree to this sharding."""
    return jax.jit(lambda tree: tree, out_shardings=sharding)


# --- agreements


def all_true(flag: bool) -> bool:
    """Whether it is true in every process."""
    return bool(flag) if not several() else bool(multihost_utils.process_allgather(np.array(flag)).all())


def any_true(flag: bool) -> bool:
    """Whether it is true in any process."""
    return not all_true(not flag)


def agree(what: str, value: Any) -> None:
    """Refuses values whose `repr` differs between processes.

    Raises:
        ValueError: in all processes; names those that differ from process 0.
    """
    if not several():
        return
    digest = np.frombuffer(hashlib.sha256(repr(value).encode()).digest(), np.uint8)
    found = multihost_utils.process_allgather(digest)
    other = [i for i in range(len(found)) if (found[i] != found[0]).any()]
    if other:
        raise ValueError(
            f"Expected {what} to be the same in all processes, but process {', '.join(map(str, other))} of "
            f"{len(found)} has another one than process 0; start all with the same options, files and versions."
        )


def by_first(action: Callable[[], T]) -> T:
    """What `action()` gives in process 0, in every process; the others do not run it.

    Raises:
        ValueError, OSError: of the action, in every process.
    """
    if not several():
        return action()
    outcome: tuple[str, Any] = ("", None)  # of process 0
    raised: Exception | None = None
    if is_first():
        try:
            outcome = ("value", action())
        except Exception as error:
            raised, outcome = error, outcome_of(error)
    told: tuple[str, Any] = share(outcome)
    kind, value = told
    if raised is not None:
        raise raised
    if kind == "value":
        return value
    raise (OSError if kind == "OSError" else ValueError)(value)


def each(action: Callable[[], T]) -> T:
    """`action()`, which every process runs without communicating; where one fails, all do.

    Raises:
        ValueError, OSError: its own, or that another process failed, and why.
    """
    if not several():
        return action()
    raised: Exception | None = None
    result: Any = None
    text = b""
    try:
        result = action()
    except Exception as error:
        raised, text = error, (outcome_of(error)[1] or "no message").encode()[:SHORT]
    said = np.zeros(SHORT, np.uint8)
    said[: len(text)] = np.frombuffer(text, np.uint8)
    found = multihost_utils.process_allgather(said)
    if raised is not None:
        raise raised
    for i, other in enumerate(found):
        if other.any():
            why = other.tobytes().rstrip(bytes(1)).decode(errors="replace")
            raise ValueError(f"process {i} failed: {why}")
    return result


def outcome_of(error: Exception) -> tuple[str, str]:
    """An error as another process can raise it: its kind and its text."""
    kind = "OSError" if isinstance(error, OSError) else "ValueError"
    return kind, str(error) if isinstance(error, (OSError, ValueError)) else f"{type(error).__name__}: {error}"


def share(value: T) -> T:
    """Process 0's value in every process; what `pickle` can hold, JAX arrays excepted."""
    data = pickle.dumps(value) if is_first() else b""
    head = np.zeros(SHORT, np.uint8)
    head[:8] = np.frombuffer(np.uint64(len(data)).tobytes(), np.uint8)
    start = data[: SHORT - 8]
    head[8 : 8 + len(start)] = np.frombuffer(start, np.uint8)
    head = multihost_utils.broadcast_one_to_all(head)
    length = int(np.frombuffer(head[:8].tobytes(), np.uint64)[0])
    rest = length - (SHORT - 8)
    if rest <= 0:
        return value if is_first() else pickle.loads(head[8 : 8 + length].tobytes())
    tail = np.zeros(1 << (rest - 1).bit_length(), np.uint8)  # powers of two: few shapes are compiled
    if is_first():
        tail[:rest] = np.frombuffer(data[SHORT - 8 :], np.uint8)
    tail = multihost_utils.broadcast_one_to_all(tail)
    return value if is_first() else pickle.loads(head[8:].tobytes() + tail[:rest].tobytes())


# --- the end


def failed(status: int) -> int:
    """Ends a process that failed at once: at an orderly end it waits for the others, which wait for it. Alone, returns.

    Process 0 leaves a little later: with it goes the service without which JAX kills the others in mid-sentence.
    """
    if jax.distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        time.sleep(GRACE if is_first() else 0.0)
        os._exit(status)
    return status


def uncaught(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """`sys.excepthook` of one of several processes."""
    sys.__excepthook__(kind, error, trace)
    failed(1)


def lost(error: Exception) -> bool:
    """Whether an error says that another process has gone."""
    return jax.distributed.is_initialized() and any(word in str(error) for word in ("Gloo", "oordination service"))


def first_line(error: Exception) -> str:
    """The first line of an error."""
    return (str(error).strip().splitlines() or ["no message"])[0]
