"""The cached outputs of a model's frozen stages: what a client would compute anew in every step is computed once."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from fedsim import peft, wire
from fedsim.config import Speed, Training
from fedsim.engine import processes
from fedsim.engine.host import aligned, went, zeros
from fedsim.training import lengths
from fedsim.training.lengths import Lengths

CACHE_LIMIT = 2 * 2**30  # bytes of cached features that `cache="auto"` accepts
FEATURE_BATCH = 64


def run_stages(
    model: peft.Model,
    frozen: dict[str, np.ndarray],
    x: Any,
    start: int,
    stop: int,
    texts: Lengths | None = None,
    devices: Sequence[jax.Device] | None = None,
) -> Any:
    """Stages start..stop - 1 on every example of x (N, ...), in batches; host arrays, zero (of ids, padding) where a text has ended.

    Args:
        devices: over which a batch is split; default: this process' first. Those of several processes are called by all of
            them: each computes its share of the examples, and gets the others'.
    """
    run, everywhere, split = program(model, start, stop, devices or jax.local_devices()[:1])
    held = processes.put(jax.tree.map(aligned, frozen), everywhere)
    texts = lengths.entering(texts, model, start)
    if texts is not None:
        x = texts.cut(x, texts.longest)
    count = jax.tree.leaves(x)[0].shape[0]
    many = len(split.device_set)
    size = -(-FEATURE_BATCH // len(split.addressable_devices)) * many
    one = jax.tree.map(lambda a: jax.ShapeDtypeStruct((many, *a.shape[1:]), a.dtype), x)
    out = jax.tree.map(lambda a: zeros((count, *a.shape[1:]), a.dtype), jax.eval_shape(run, held, one))
    for leaf in jax.tree.leaves(out):
        if texts is not None and texts.pad and np.issubdtype(leaf.dtype, np.integer):
            leaf[...] = texts.pad  # ids that go along: no token, where a text has ended
    received = 0
    waiting: deque[tuple[np.ndarray, Any]] = deque()  # so that the host fetches one batch while the next is computed,
    ahead = 1 if split.is_fully_addressable else 0  # but where processes gather it, which waits for all devices

    def receive() -> None:
        nonlocal received
        rows, part = waiting.popleft()
        jax.block_until_ready(part)  # gathering, host devices may block threads that another one still needs
        for whole, new in zip(jax.tree.leaves(out), jax.tree.leaves(processes.fetch(part)), strict=True):
            whole[(rows, *(slice(n) for n in new.shape[1:]))] = new[: len(rows)]
        received += len(rows)
        went("computing the frozen features of each example once", received, count)

    for rows, length in lengths.batches(np.arange(count), size, texts):
        batch = np.pad(rows, (0, size - len(rows)), mode="edge")  # one shape: the last batch repeats a row
        part = jax.tree.map(lambda a, batch=batch: a[batch], x)
        if texts is not None and length is not None:
            part = texts.cut(part, length)
        waiting.append((rows, run(held, processes.put(part, split))))
        if len(waiting) > ahead:
            receive()
    while waiting:
        receive()
    return out


def program(
    model: peft.Model, start: int, stop: int, devices: Sequence[jax.Device]
) -> tuple[Any, NamedSharding, NamedSharding]:
    """The jitted stages start..stop - 1, (held, x) -> their output, and how both arguments lie on the devices."""
    mesh = Mesh(np.array(devices), ("batch",))
    specs = P(), P("batch")
    run = jax.shard_map(
        lambda held, x: model.run(held, x, start, stop), mesh=mesh, in_specs=specs, out_specs=specs[1], check_vma=False
    )
    return jax.jit(run), NamedSharding(mesh, specs[0]), NamedSharding(mesh, specs[1])


def use_cache(speed: Speed, model: peft.Model, x: Any, training: Training | None = None) -> bool:
    """Whether the frozen prefix is worth keeping: it holds at least one block, or all but the head, and its output fits.

    Never where images change from step to step.
    """
    if speed.cache == "off" or model.cut == 0 or (training is not None and training.augment):
        return False
    if speed.cache == "on":
        return True
    one = jax.tree.map(lambda a: jax.ShapeDtypeStruct((1, *a.shape[1:]), a.dtype), x)
    count = jax.tree.leaves(x)[0].shape[0]
    output = jax.eval_shape(model.prefix, model.frozen, one)
    worth = model.cut > 1 or model.cut == model.stages - 1
    return worth and count * sum(wire.array_bytes(a) for a in jax.tree.leaves(output)) <= CACHE_LIMIT
