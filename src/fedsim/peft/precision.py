"""How the forward and backward pass is computed: in which precision, and what of it is computed twice to save memory.

The model stays the same function over the same leaves. Trained leaves arrive in float32 and are cast where they are
used, so that their gradients, the optimizer's state and every message are float32; frozen leaves are cast once, on
their way to the device (`held`). Logits leave as float32, and the loss is computed from those.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fedsim.peft.split import Model

POLICIES: dict[str, Callable[..., Any]] = {
    # What is kept for the backward pass beside every stage's input; the rest is computed again there.
    "blocks": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,  # products with weights, not attention's scores
}


def computed(model: Model, precision: str = "float32", remat: str = "none") -> Model:
    """The model, computed in "float32" or "bfloat16", its stages rematerialised by "blocks" or "dots", or not ("none")."""
    if precision == "float32" and remat == "none":
        return model
    dtype = jnp.dtype(precision)

    def run(leaves: Mapping[str, Any], h: Any, start: int, stop: int) -> Any:
        leaves, h = cast(leaves, dtype), cast(h, dtype)
        if remat == "none":
            h = model.run(leaves, h, start, stop)
        else:
            for stage in range(start, stop):  # each keeps its input; the head is cheaper than what it would save
                last = stage == model.stages - 1
                again = jax.checkpoint(model.run, policy=POLICIES[remat], static_argnums=(2, 3))
                h = (model.run if last else again)(leaves, h, stage, stage + 1)
        return h.astype(jnp.float32) if stop == model.stages else h

    def prefix(frozen: Mapping[str, Any], x: Any) -> Any:
        return run(frozen, x, 0, model.cut)

    def suffix(trained: Mapping[str, Any], frozen: Mapping[str, Any], h: Any) -> jax.Array:
        return run({**frozen, **trained}, h, model.cut, model.stages)

    def apply(trained: Mapping[str, Any], frozen: Mapping[str, Any], x: Any) -> jax.Array:
        return run({**frozen, **trained}, x, 0, model.stages)

    return model._replace(apply=apply, prefix=prefix, suffix=suffix, run=run)


def cast(tree: Any, dtype: Any) -> Any:
    """Floating-point leaves of a tree in that type; integers and flags as they are."""

    def one(a: Any) -> Any:
        return a.astype(dtype) if jnp.issubdtype(a.dtype, jnp.floating) and a.dtype != dtype else a

    return jax.tree.map(one, tree)


def held(frozen: Mapping[str, np.ndarray], precision: str, written: Collection[str] = ()) -> dict[str, np.ndarray]:
    """The frozen leaves as the devices hold them: half the memory in bfloat16; those that an algorithm writes stay."""
    return {path: leaf if path in written else cast(leaf, jnp.dtype(precision)) for path, leaf in frozen.items()}
