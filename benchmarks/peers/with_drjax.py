"""DrJAX: a program with the placement `clients`: broadcast, `map_fn` over the clients' epochs, `reduce_weighted_mean`.

With `--devices` the placement is an axis of a mesh of so many host devices, over which DrJAX spreads the clients.

DrJAX maps arrays, so clients are padded to the largest client of all, as in `with_padded_vmap.py`; the model is the same.
"""

from __future__ import annotations

import contextlib

import driver
import drjax
import jax
import jax_models
import numpy as np
import workloads
from jax.sharding import AxisType, NamedSharding, PartitionSpec


def main() -> None:
    """Runs the rounds."""
    o = driver.options()
    w = workloads.find(o.workload, o.small)
    d = workloads.data(w)
    jax_models.divide_cpu(o.devices)
    mesh, everywhere, by_client = None, None, None
    if o.devices:
        mesh = jax.make_mesh((o.devices,), ("clients",), axis_types=(AxisType.Auto,))
        everywhere, by_client = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec("clients"))
    data_x, data_y = jax.device_put((d.x, d.y), everywhere)
    update = jax_models.client_update(w, jax_models.apply_of(w, jax_models.matmul_conv))

    @jax.jit
    @drjax.program(placements={"clients": w.cohort})
    def run(server, frozen, data_x, data_y, rows, mask, examples):
        def client(start, rows, mask):
            return update(start, frozen, data_x[rows], data_y[rows], mask)

        trained = drjax.map_fn(client, (drjax.broadcast(server), rows, mask))
        return jax.tree.map(lambda leaf: drjax.reduce_weighted_mean(leaf, examples), trained)

    server, frozen = jax.device_put(jax_models.weights(w), everywhere)

    def round(number: int) -> None:
        nonlocal server
        ids = workloads.cohort(w, number)
        rows, mask = workloads.padded(w, d, number, ids)
        rows, mask, examples = jax.device_put((rows, mask, d.sizes[ids].astype(np.float32)), by_client)
        server = jax.block_until_ready(run(server, frozen, data_x, data_y, rows, mask, examples))

    with jax.set_mesh(mesh) if mesh else contextlib.nullcontext():  # there DrJAX looks for the placement's axis
        driver.loop(o, round, lambda: jax_models.published(w, server), devices=o.devices or 1)


if __name__ == "__main__":
    main()
