"""The leaves of a pytree as a checkpoint stores them: taken apart, described, and put back in their places."""

from __future__ import annotations

import hashlib
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import keystr, tree_flatten_with_path

Leaf = dict[str, Any]  # path, kind; shape, dtype, weak, sha256 of an array; key, impl of a key; value of a scalar


class Packed(NamedTuple):
    """A pytree taken apart: `arrays` by running number, one `Leaf` for each leaf, and the hash of the containers."""

    arrays: dict[str, np.ndarray]
    leaves: list[Leaf]
    structure: str


def pack(tree: Any) -> Packed:
    """Takes a pytree apart; every array is a fresh copy on the host.

    Raises:
        ValueError: names the leaf that cannot be stored.
    """
    found, structure = tree_flatten_with_path(tree)
    arrays: dict[str, np.ndarray] = {}
    leaves: list[Leaf] = []
    for i, (path, x) in enumerate(found):
        leaf = {"path": keystr(path), **describe(x, keystr(path))}
        if leaf["kind"] in ("array", "key"):
            if isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated):
                raise ValueError(f"Expected leaf {leaf['path']} to be held by one process; gather it before saving.")
            # A copy: on a CPU a view would share the buffer of an array that the next round donates.
            data = np.array(jax.random.key_data(x) if leaf["kind"] == "key" else x, copy=True)
            if leaf["kind"] == "key":
                leaf["impl"] = str(jax.random.key_impl(x))
            if data.size:  # Orbax refuses arrays of no elements
                arrays[str(i)] = data
                leaf["sha256"] = digest_array(data)
        else:
            leaf["value"] = x
        leaves.append(leaf)
    return Packed(arrays, leaves, structure_hash(structure))


def describe(x: Any, path: str) -> Leaf:
    """Kind of a leaf, with shape, dtype and weak type of an array and the implementation of a typed key.

    Raises:
        ValueError: names the leaf that cannot be stored.
    """
    if isinstance(x, (bool, int, float, str)) and not isinstance(x, np.generic):
        return {"kind": type(x).__name__}
    if not hasattr(x, "dtype") or x.dtype == object:
        raise ValueError(f"Expected leaf {path} to be an array, a number or a string, not {type(x).__name__}.")
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        inner = jax.eval_shape(jax.random.key_data, x)
        return {"kind": "key", "shape": list(inner.shape), "dtype": str(inner.dtype), "key": str(x.dtype)}
    weak = bool(getattr(x, "weak_type", False))
    return {"kind": "array", "shape": list(x.shape), "dtype": str(x.dtype), "weak": weak}


def place(x: Any, template: Any) -> Any:
    """A restored leaf as the template has it: NumPy or JAX, weak type, devices."""
    if isinstance(x, (bool, int, float, str)) or isinstance(template, np.ndarray):
        return x
    if isinstance(template, np.generic):
        return x[()]
    if getattr(template, "weak_type", False) and jax.lax.full((), jnp.zeros((), x.dtype).item()).dtype == x.dtype:
        # a strong type in its place would compile again, and promote differently
        return jax.lax.full(x.shape, jnp.zeros((), x.dtype).item()).at[...].set(x)
    value = x if isinstance(x, jax.Array) else jnp.array(x)  # a copy: asarray may share memory that gets donated
    pinned = template.committed if isinstance(template, jax.Array) else template.sharding is not None
    return jax.device_put(value, template.sharding) if pinned else value


def shown(leaf: Leaf) -> str:
    """A leaf for messages and for comparing: `float32(3, 4)`, `key<fry>(2)` with the shape of its words, `int`."""
    if "shape" not in leaf:
        return leaf["kind"]
    return leaf.get("key", leaf["dtype"]) + "(" + ", ".join(map(str, leaf["shape"])) + ")"


def structure_hash(structure: Any) -> str:
    """SHA-256 of the containers of a pytree; memory addresses in their names do not count."""
    return hashlib.sha256(re.sub(r" at 0x[0-9a-f]+", "", str(structure)).encode()).hexdigest()


def digest_array(x: np.ndarray) -> str:
    """SHA-256 of an array's bytes in C order."""
    return hashlib.sha256(np.ascontiguousarray(x).tobytes()).hexdigest()
