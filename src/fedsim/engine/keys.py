"""Keys of the compiled programs: derived from a named purpose and numbers, never from lane or device."""

from __future__ import annotations

import zlib
from functools import partial

import jax
import numpy as np
from jax import Array


def key_for(root: Array, purpose: str, *numbers: Array | int) -> Array:
    """A key for a named purpose and numbers, independent of lanes, devices and of every other purpose."""
    return folded_in(root, np.uint32(zlib.crc32(purpose.encode())), *numbers)


@partial(jax.jit, inline=True)  # from the host one call, not several for each number
def folded_in(key: Array, *numbers: Array | int) -> Array:
    """The key with every number folded in, one after the other."""
    for number in numbers:
        key = jax.random.fold_in(key, number)
    return key
