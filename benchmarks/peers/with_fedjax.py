"""FedJAX: its own FedAvg, `fedjax.algorithms.fed_avg`, on the jit backend (clients one after another, no Python per step).

FedJAX has no frozen part: the backbone is a constant of the gradient function. Its last batch of a client is filled up
with examples of the next epoch, which is what its shuffled, repeated batches are.
"""

from __future__ import annotations

import os

# By hand it runs on the CPU; run.py says where else.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import driver
import fedjax
import jax
import jax_models
import workloads


def main() -> None:
    """Runs the rounds."""
    o = driver.options()
    w = workloads.find(o.workload, o.small)
    d = workloads.data(w)
    trained, frozen = jax.device_put(jax_models.weights(w))
    apply = jax_models.apply_of(w, jax_models.matmul_conv)

    def loss(params, batch):
        return jax_models.cross_entropy(apply(params, frozen, batch["x"]), batch["y"]).mean()

    algorithm = fedjax.algorithms.fed_avg.federated_averaging(
        lambda params, batch, rng: jax.grad(loss)(params, batch),
        client_optimizer=fedjax.optimizers.sgd(w.lr),
        server_optimizer=fedjax.optimizers.sgd(1.0),
        client_batch_hparams=fedjax.ShuffleRepeatBatchHParams(w.batch_size, num_epochs=1, seed=workloads.SEED),
    )
    clients = [dict(zip("xy", d.client(i), strict=True)) for i in range(w.clients)]
    datasets = [fedjax.ClientDataset(examples) for examples in clients]
    state = algorithm.init(trained)

    def round(number: int) -> None:
        nonlocal state
        ids = workloads.cohort(w, number)
        keys = jax.random.split(jax.random.PRNGKey(number), len(ids))
        state, _ = algorithm.apply(state, [(int(i), datasets[i], key) for i, key in zip(ids, keys, strict=True)])
        jax.block_until_ready(state.params)

    fedjax.set_for_each_client_backend("jit")
    driver.loop(o, round, lambda: jax_models.published(w, state.params), devices=1)


if __name__ == "__main__":
    main()
