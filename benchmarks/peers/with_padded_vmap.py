"""Plain JAX without a federated package: `vmap` over the round's clients, each padded to the largest client of all."""

from __future__ import annotations

from collections.abc import Callable

import driver
import jax
import jax.numpy as jnp
import jax_models
import numpy as np
import workloads
from workloads import Workload


def prepare(w: Workload, d: workloads.Data) -> tuple[Callable[[int], None], Callable[[], workloads.Arrays]]:
    """(a round by its number, the trained parameters under the workload's names)."""
    data_x, data_y = jax.device_put((d.x, d.y))
    update = jax_models.client_update(w, jax_models.apply_of(w, jax_models.matmul_conv))

    @jax.jit
    def run(trained, frozen, data_x, data_y, rows, mask, weight):
        x, y = data_x[rows], data_y[rows]  # (M, T, B, ...)
        stacked = jax.vmap(update, (None, None, 0, 0, 0))(trained, frozen, x, y, mask)
        return jax.tree.map(lambda p: jnp.tensordot(weight, p, axes=1), stacked)

    trained, frozen = jax.device_put(jax_models.weights(w))

    def round(number: int) -> None:
        nonlocal trained
        ids = workloads.cohort(w, number)
        rows, mask = workloads.padded(w, d, number, ids)
        weight = (d.sizes[ids] / d.sizes[ids].sum()).astype(np.float32)
        trained = jax.block_until_ready(run(trained, frozen, data_x, data_y, rows, mask, weight))

    return round, lambda: jax_models.published(w, trained)


def main() -> None:
    """Runs the rounds."""
    o = driver.options()
    w = workloads.find(o.workload, o.small)
    driver.loop(o, *prepare(w, workloads.data(w)))


if __name__ == "__main__":
    main()
