"""Which form of a function is computed, and how wide: what `kernels.py`, `gpu.py` and `attention.py` all ask."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

GPU_FORMS = {"attention", "bias", "norm"}
"""What is computed in a form of its own on an NVIDIA GPU (`attention.py`, `gpu.py`); fewer of them to measure without."""


def takes(form: str) -> bool:
    """Whether this process computes that in its form for NVIDIA GPUs of Ampere or later."""
    return form in GPU_FORMS and has_cuda()


@functools.cache
def has_cuda() -> bool:
    """Whether JAX's first device is such a GPU."""
    device = jax.devices()[0]
    if device.platform != "gpu" or "cuda" not in device.client.platform_version:
        return False
    return tuple(map(int, device.compute_capability.split("."))) >= (8, 0)


def wide(x: jax.Array) -> jax.Array:
    """x in float32 where its own dtype is narrower."""
    return x.astype(jnp.float32) if jnp.finfo(x.dtype).bits < 32 else x
