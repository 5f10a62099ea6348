"""pfl-research: its FederatedAveraging over a SimulatedBackend, in one process or in two that share a round's clients.

pfl draws clients by a function of ours, the same cohorts as the others, and asks for a client's data whenever it draws it.
It does not shuffle within a client, so the data are given in the workload's order of that round. With two processes it
balances their load by the clients' sizes, one torch thread each.
"""

from __future__ import annotations

import argparse
import os
import socket
import subprocess
import sys
from collections.abc import Iterator

import driver
import numpy as np
import workloads
from workloads import Workload


def second_process() -> None:
    """Starts the other process as torchrun would; both then find each other by these variables, which pfl reads."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    shared = {"TORCHELASTIC_RUN_ID": "peers", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= shared | {"RANK": "0", "LOCAL_RANK": "0"}
    second = os.environ | {"RANK": "1", "LOCAL_RANK": "1"}
    subprocess.Popen([sys.executable, *sys.argv], env=second, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)


def clients(w: Workload) -> Iterator[int]:
    """The cohorts' clients one after another, for ever."""
    number = 0
    while True:
        number += 1
        yield from map(int, workloads.cohort(w, number))


def main(o: argparse.Namespace) -> None:
    """Runs the rounds. pfl joins the processes when it is imported."""
    import torch
    import torch.nn.functional as F
    import torch_models
    from pfl.aggregate.simulate import SimulatedBackend
    from pfl.aggregate.weighting import WeightByDatapoints
    from pfl.algorithm.base import NNAlgorithmParams
    from pfl.algorithm.federated_averaging import FederatedAveraging
    from pfl.callback.base import TrainingProcessCallback
    from pfl.data.federated_dataset import FederatedDataset
    from pfl.data.pytorch import PyTorchTensorDataset
    from pfl.hyperparam.base import NNEvalHyperParams, NNTrainHyperParams
    from pfl.metrics import Metrics, Weighted
    from pfl.model.pytorch import PyTorchModel

    rank = int(os.environ.get("RANK", 0))
    if o.processes > 1:
        torch.set_num_threads(1)
    w = workloads.find(o.workload, o.small)
    d = workloads.data(w)
    module = torch_models.model(w)
    module.loss = lambda x, y: F.cross_entropy(module(x), y)
    module.metrics = lambda x, y: {"loss": Weighted(F.cross_entropy(module(x), y).item() * len(y), len(y))}
    parameters = torch_models.trained(module)
    model = PyTorchModel(module, torch.optim.SGD, torch.optim.SGD(parameters.values(), 1.0))

    number = 1  # the round that is being run, or comes next

    def dataset(client: int) -> PyTorchTensorDataset:
        rows = np.concatenate(workloads.batches(w, d, number, client))
        return PyTorchTensorDataset(
            (torch.from_numpy(d.x[rows]), torch.from_numpy(d.y[rows]).long()), user_id=str(client)
        )

    cohorts = clients(w)
    sizes = dict(enumerate(d.sizes.tolist()))
    federated = FederatedDataset(dataset, lambda: next(cohorts), sizes if o.processes > 1 else None)
    backend = SimulatedBackend(federated, federated, [WeightByDatapoints()])
    watch = driver.Stopwatch(o)

    class Rounds(TrainingProcessCallback):
        """Leave before every round; without it the second process would begin while others are measured."""

        def wait(self) -> None:
            if rank == 0:
                watch.begin()
            if o.processes > 1:
                torch.distributed.barrier()

        def on_train_begin(self, *, model):
            if rank == 0:
                watch.ready()
            self.wait()
            return Metrics()

        def after_central_iteration(self, aggregate_metrics, model, *, central_iteration):
            nonlocal number
            number = central_iteration + 2  # iterations count from 0
            if rank == 0:
                watch.end(lambda: torch_models.numpy(parameters))
            if central_iteration + 1 < o.rounds:
                self.wait()
            return False, Metrics()

    FederatedAveraging().run(
        # It evaluates in round 1 whatever the frequency; that is a warm-up round.
        NNAlgorithmParams(o.rounds, evaluation_frequency=10**9, train_cohort_size=w.cohort, val_cohort_size=0),
        backend,
        model,
        NNTrainHyperParams(local_batch_size=w.batch_size, local_num_epochs=1, local_learning_rate=w.lr),
        NNEvalHyperParams(local_batch_size=w.batch_size),
        callbacks=[Rounds()],
    )


if __name__ == "__main__":
    given = driver.options()
    if given.processes not in (1, 2):
        raise SystemExit(f"Expected processes={given.processes} to be 1 or 2.")
    if given.processes == 2 and "RANK" not in os.environ:
        second_process()
    main(given)
