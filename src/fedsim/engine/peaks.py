"""What devices can do at most: FLOP/s of dense matrix products and bytes/s of their memory, from the vendors' documents.

Figures are for one chip as JAX shows it, without sparsity (NVIDIA's tables give BF16 and TF32 with it: half of those). `float32`
is what a float32 product reaches under XLA's default precision: TF32 on NVIDIA's GPUs, one pass in bfloat16 on TPUs. A device
that the table does not know, such as a CPU, is measured.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence
from typing import Any, NamedTuple


class Peak(NamedTuple):
    """The limits of one device."""

    name: str
    bfloat16: float  # FLOP/s
    float32: float  # FLOP/s
    bandwidth: float  # bytes/s
    source: str  # "measured" where it is not from a document

    def flops(self, precision: str = "float32") -> float:
        """FLOP/s of matrix products whose inputs have this type."""
        return self.bfloat16 if precision == "bfloat16" else self.float32


TPU = "docs.cloud.google.com/tpu/docs/"
NVIDIA = "NVIDIA, data sheet of the "

# (words of `device_kind`, all of which must be there; limits). The first row that fits is taken. Checked in November 2026: the
# pages of v5e, v5p and v6e themselves; v4 and the GPUs in tables of others that cite the vendors' documents named here.
TABLE: tuple[tuple[tuple[str, ...], Peak | None], ...] = (
    (("tpu", "v6"), Peak("TPU v6e", 918e12, 918e12, 1638e9, TPU + "v6e")),
    (("tpu", "v5", "lite"), Peak("TPU v5e", 197e12, 197e12, 819e9, TPU + "v5e")),
    (("tpu", "v5e"), Peak("TPU v5e", 197e12, 197e12, 819e9, TPU + "v5e")),
    (("tpu", "v5"), Peak("TPU v5p", 459e12, 459e12, 2765e9, TPU + "v5p")),
    (("tpu", "v4", "lite"), None),  # v4i, of which nothing published was found
    (("tpu", "v4"), Peak("TPU v4", 275e12, 275e12, 1200e9, TPU + "v4 (not seen itself)")),
    (("gh200",), None),  # a Grace beside it: other memory, other clocks
    (("gb200",), None),
    (("b200",), Peak("B200", 2250e12, 1100e12, 8000e9, NVIDIA + "HGX B200 (not seen itself)")),
    (("h200",), Peak("H200", 989.4e12, 494.7e12, 4800e9, NVIDIA + "H200 SXM (not seen itself)")),
    (("h100", "pcie"), Peak("H100 PCIe", 756e12, 378e12, 2000e9, NVIDIA + "H100 PCIe (not verified)")),
    (("h100", "nvl"), None),
    (("h100",), Peak("H100 SXM", 989.4e12, 494.7e12, 3350e9, NVIDIA + "H100 SXM (not seen itself)")),
    (("a100", "80gb", "pcie"), Peak("A100 PCIe 80 GB", 312e12, 156e12, 1935e9, NVIDIA + "A100 80GB (not verified)")),
    (("a100", "80gb"), Peak("A100 SXM 80 GB", 312e12, 156e12, 2039e9, NVIDIA + "A100 80GB (not seen itself)")),
    (("a100",), Peak("A100 40 GB", 312e12, 156e12, 1555e9, NVIDIA + "A100 (not seen itself)")),
)


def known(kind: str) -> Peak | None:
    """The published limits of a device by JAX's name for it (`device_kind`); None where the table has none."""
    words = kind.lower()
    return next((peak for needed, peak in TABLE if all(word in words for word in needed)), None)


def of(device: Any) -> Peak:
    """The published limits of a device, or those that it shows in a second of measuring."""
    return known(device.device_kind) or measured(device)


def share(devices: Sequence[Any]) -> Peak:
    """Of each of these devices while all work: those of a CPU share what it can reach."""
    one, count = of(devices[0]), len(devices)
    if devices[0].platform != "cpu" or count == 1:
        return one
    limits = {name: getattr(one, name) / count for name in ("bfloat16", "float32", "bandwidth")}
    return one._replace(name=f"{one.name}, one of {count} that share it", **limits)


PASSES = 16


@functools.cache
def measured(device: Any) -> Peak:
    """The best of a few matrix products of 1024 x 1024 (of an accelerator, 8192), and of passes over 64 MiB (read and written)."""
    import jax
    import jax.numpy as jnp

    def best(run: Any, *args: Any) -> float:
        jax.block_until_ready(run(*args))
        seconds = []
        for _ in range(5):
            start = time.perf_counter()
            jax.block_until_ready(run(*args))
            seconds.append(time.perf_counter() - start)
        return min(seconds)

    def copies(count: int, a: jax.Array) -> jax.Array:
        """Passes over an array in its place: a program's new result has pages that a CPU first has to map."""
        return jax.lax.fori_loop(0, count, lambda _, a: -a, a)

    product, copy = jax.jit(jnp.matmul), jax.jit(copies)
    size = 1024 if device.platform == "cpu" else 8192  # smaller ones are over before an accelerator is busy
    with jax.default_device(device):
        rates = {t: 2 * size**3 / best(product, *[jnp.ones((size, size), t)] * 2) for t in (jnp.bfloat16, jnp.float32)}
        moved = PASSES * 2 * 64 * 2**20 / best(copy, PASSES, jnp.ones((64 * 2**18,), jnp.float32))
    return Peak(f"{device.device_kind} here", rates[jnp.bfloat16], rates[jnp.float32], moved, "measured")
