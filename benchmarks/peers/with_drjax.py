"""DrJAX: a program with the placement `clients`: broadcast, `map_fn` over the clients' epochs, `reduce_weighted_mean`.

DrJAX maps arrays, so clients are padded to the largest client of all, as in `with_padded_vmap.py`; the model is the same.
"""

from __future__ import annotations

import driver
import drjax
import jax
import jax_models
import numpy as np
import workloads


def main() -> None:
    """Runs the rounds."""
    o = driver.options()
    w = workloads.find(o.workload, o.small)
    d = workloads.data(w)
    data_x, data_y = jax.device_put((d.x, d.y))
    update = jax_models.client_update(w, jax_models.apply_of(w, jax_models.matmul_conv))

    @jax.jit
    @drjax.program(placements={"clients": w.cohort})
    def run(server, frozen, data_x, data_y, rows, mask, examples):
        def client(start, rows, mask):
            return update(start, frozen, data_x[rows], data_y[rows], mask)

        trained = drjax.map_fn(client, (drjax.broadcast(server), rows, mask))
        return jax.tree.map(lambda leaf: drjax.reduce_weighted_mean(leaf, examples), trained)

    server, frozen = jax.device_put(jax_models.weights(w))

    def round(number: int) -> None:
        nonlocal server
        ids = workloads.cohort(w, number)
        rows, mask = workloads.padded(w, d, number, ids)
        examples = d.sizes[ids].astype(np.float32)
        server = jax.block_until_ready(run(server, frozen, data_x, data_y, rows, mask, examples))

    driver.loop(o, round, lambda: jax_models.published(w, server))


if __name__ == "__main__":
    main()
