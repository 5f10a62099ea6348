"""The cached outputs of a model's frozen stages: what a client would compute anew in every step is computed once."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from fedsim import lengths, peft, wire
from fedsim.config import Config, Speed
from fedsim.lengths import Lengths

CACHE_LIMIT = 2 * 2**30  # bytes of cached features that `cache="auto"` accepts
FEATURE_BATCH = 64


def run_stages(
    model: peft.Model, frozen: dict[str, np.ndarray], x: Any, start: int, stop: int, texts: Lengths | None = None
) -> Any:
    """Stages start..stop - 1 on every example of x (N, ...), in batches; host arrays, zero where a text has ended."""
    held = jax.device_put(frozen)
    run = jax.jit(lambda held, x: model.run(held, x, start, stop))
    texts = lengths.entering(texts, model, start)
    if texts is not None:
        x = texts.cut(x, texts.longest)
    count = jax.tree.leaves(x)[0].shape[0]
    one = jax.tree.map(lambda a: jax.ShapeDtypeStruct((1, *a.shape[1:]), a.dtype), x)
    out = jax.tree.map(lambda a: np.zeros((count, *a.shape[1:]), a.dtype), jax.eval_shape(run, held, one))
    for rows, length in lengths.batches(np.arange(count), FEATURE_BATCH, texts):
        batch = np.pad(rows, (0, FEATURE_BATCH - len(rows)), mode="edge")  # one shape: the last batch repeats a row
        part = jax.tree.map(lambda a, batch=batch: a[batch], x)
        if texts is not None and length is not None:
            part = texts.cut(part, length)
        part = jax.device_get(run(held, part))
        for whole, new in zip(jax.tree.leaves(out), jax.tree.leaves(part), strict=True):
            whole[(rows, *(slice(n) for n in new.shape[1:]))] = new[: len(rows)]
    return out


def use_cache(speed: Speed, model: peft.Model, x: Any, config: Config | None = None) -> bool:
    """Whether the frozen prefix is worth keeping: it holds at least one block, or all but the head, and its output fits.

    Never where images change from step to step.
    """
    if speed.cache == "off" or model.cut == 0 or (config is not None and config.augment):
        return False
    if speed.cache == "on":
        return True
    one = jax.tree.map(lambda a: jax.ShapeDtypeStruct((1, *a.shape[1:]), a.dtype), x)
    count = jax.tree.leaves(x)[0].shape[0]
    output = jax.eval_shape(model.prefix, model.frozen, one)
    worth = model.cut > 1 or model.cut == model.stages - 1
    return worth and count * sum(wire.array_bytes(a) for a in jax.tree.leaves(output)) <= CACHE_LIMIT
