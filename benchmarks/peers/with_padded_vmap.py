"""Plain JAX without a federated package: `vmap` over the round's clients, each padded to the largest client of all.

With `--devices` it does so on each of so many host devices with its part of the clients, by `shard_map`.
"""

from __future__ import annotations

from collections.abc import Callable

import driver
import jax
import jax.numpy as jnp
import jax_models
import numpy as np
import workloads
from jax.sharding import NamedSharding, PartitionSpec
from workloads import Workload


def prepare(
    w: Workload, d: workloads.Data, devices: int = 1
) -> tuple[Callable[[int], None], Callable[[], workloads.Arrays]]:
    """(a round by its number, the trained parameters under the workload's names)."""
    update = jax_models.client_update(w, jax_models.apply_of(w, jax_models.matmul_conv))

    def weighted_sum(trained, frozen, data_x, data_y, rows, mask, weight):
        x, y = data_x[rows], data_y[rows]  # (M, T, B, ...)
        stacked = jax.vmap(update, (None, None, 0, 0, 0))(trained, frozen, x, y, mask)
        return jax.tree.map(lambda p: jnp.tensordot(weight, p, axes=1), stacked)

    run, everywhere, by_client = jax.jit(weighted_sum), None, None
    if devices > 1:
        mesh = jax.make_mesh((devices,), ("clients",), devices=jax.local_devices()[:devices])
        run = jax.jit(
            jax.shard_map(
                lambda *args: jax.lax.psum(weighted_sum(*args), "clients"),
                mesh=mesh,
                in_specs=(PartitionSpec(),) * 4 + (PartitionSpec("clients"),) * 3,
                out_specs=PartitionSpec(),
                check_vma=False,  # the carry of a client's steps is the same everywhere only before the first
            )
        )
        everywhere, by_client = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec("clients"))
    data_x, data_y = jax.device_put((d.x, d.y), everywhere)
    trained, frozen = jax.device_put(jax_models.weights(w), everywhere)

    def round(number: int) -> None:
        nonlocal trained
        ids = workloads.cohort(w, number)
        rows, mask = workloads.padded(w, d, number, ids)
        weight = (d.sizes[ids] / d.sizes[ids].sum()).astype(np.float32)
        rows, mask, weight = jax.device_put((rows, mask, weight), by_client)
        trained = jax.block_until_ready(run(trained, frozen, data_x, data_y, rows, mask, weight))

    return round, lambda: jax_models.published(w, trained)


def main() -> None:
    """Runs the rounds."""
    o = driver.options()
    w = workloads.find(o.workload, o.small)
    jax_models.divide_cpu(o.devices)
    devices = o.devices or 1
    driver.loop(o, *prepare(w, workloads.data(w), devices), devices=devices)


if __name__ == "__main__":
    main()
