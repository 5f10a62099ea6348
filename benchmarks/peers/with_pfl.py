"""pfl-research: its FederatedAveraging over a SimulatedBackend, in one process or in several that share a round's clients.

pfl draws clients by a function of ours, the same cohorts as the others, and asks for a client's data whenever it draws it.
It does not shuffle within a client, so the data are given in the workload's order of that round. With several processes it
balances their load by the clients' sizes, one torch thread each. On a GPU they share it; by itself pfl gives
each a GPU of its own.
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


def other_processes(count: int) -> None:
    """Starts the others as torchrun would; all then find each other by these variables, which pfl reads."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    shared = {"TORCHELASTIC_RUN_ID": "peers", "WORLD_SIZE": str(count), "OMP_NUM_THREADS": "1"}
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_WORLD_SIZE": str(count)}
    os.environ |= shared | {"RANK": "0", "LOCAL_RANK": "0"}
    for rank in map(str, range(1, count)):
        other = os.environ | {"RANK": rank, "LOCAL_RANK": rank}
        subprocess.Popen([sys.executable, *sys.argv], env=other, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)


def share_gpu() -> None:
    """Has all processes use the first GPU, with gloo between them: NCCL refuses two on one. Before pfl is imported."""
    import torch

    os.environ |= {"LOCAL_RANK": "0", "PFL_PYTORCH_DEVICE": "cuda:0"}
    join = torch.distributed.init_process_group
    torch.distributed.init_process_group = lambda backend, **more: join(backend="gloo", **more)


def clients(w: Workload) -> Iterator[int]:
    """The cohorts' clients one after another, for ever."""
    number = 0
    while True:
        number += 1
        yield from map(int, workloads.cohort(w, number))


def main(o: argparse.Namespace) -> None:
    """Runs the rounds. pfl joins the processes when it is imported."""
    if o.platform == "gpu":
        share_gpu()
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
    d, device = workloads.data(w), torch_models.device_of(o.platform)
    module = torch_models.model(w).to(device)
    module.loss = lambda x, y: F.cross_entropy(module(x), y)
    module.metrics = lambda x, y: {"loss": Weighted(F.cross_entropy(module(x), y).item() * len(y), len(y))}
    parameters = torch_models.trained(module)
    model = PyTorchModel(module, torch.optim.SGD, torch.optim.SGD(parameters.values(), 1.0))

    number = 1  # the round that is being run, or comes next

    def dataset(client: int) -> PyTorchTensorDataset:
        rows = np.concatenate(workloads.batches(w, d, number, client))
        x, y = torch.from_numpy(d.x[rows]).to(device), torch.from_numpy(d.y[rows]).long().to(device)
        return PyTorchTensorDataset((x, y), user_id=str(client))

    cohorts = clients(w)
    sizes = dict(enumerate(d.sizes.tolist()))
    federated = FederatedDataset(dataset, lambda: next(cohorts), sizes if o.processes > 1 else None)
    backend = SimulatedBackend(federated, federated, [WeightByDatapoints()])
    watch = driver.Stopwatch(o)

    class Rounds(TrainingProcessCallback):
        """Leave before every round; without it the second process would begin while others are measured."""

        def wait(self) -> None:
            torch_models.wait(device)
            if rank == 0:
                watch.begin()
            if o.processes > 1:
                torch.distributed.barrier()

        def on_train_begin(self, *, model):
            if rank == 0:
                watch.ready(device=str(device))
            self.wait()
            return Metrics()

        def after_central_iteration(self, aggregate_metrics, model, *, central_iteration):
            nonlocal number
            number = central_iteration + 2  # iterations count from 0
            torch_models.wait(device)
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
    if given.processes < 1:
        raise SystemExit(f"Expected processes={given.processes} >= 1.")
    if given.processes > 1 and "RANK" not in os.environ:
        other_processes(given.processes)
    main(given)
