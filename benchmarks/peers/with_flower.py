"""Flower: a ServerApp with FedAvg and a ClientApp in the simulation runtime, one core an actor (two actors on two cores).

On a GPU an actor also takes `--gpu-share` of it, so that there are 1 / share of them.

Its sampler draws nodes unseeded, so FedAvg is told here which client each message is for: the same cohorts as the others.
An actor keeps its model between clients, which Flower's examples do not: they build it anew for every message.
"""

from __future__ import annotations

import functools
import os

os.environ |= {"FLWR_TELEMETRY_ENABLED": "0", "RAY_USAGE_STATS_ENABLED": "0"}

import driver
import torch
import torch.nn.functional as F
import torch_models
import workloads
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation
from torch.utils.data import DataLoader, TensorDataset
from workloads import Workload


@functools.cache
def actor(w: Workload, platform: str) -> tuple[torch.nn.Module, torch.device, workloads.Data, TensorDataset]:
    """What an actor keeps: the model, its device, and the examples as a torch data set."""
    torch.set_num_threads(1)
    d, device = workloads.data(w), torch_models.device_of(platform)
    return (
        torch_models.model(w).to(device),
        device,
        d,
        TensorDataset(torch.from_numpy(d.x), torch.from_numpy(d.y).long()),
    )


def client_app(w: Workload, platform: str) -> ClientApp:
    """Trains one client for an epoch."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        model, device, d, dataset = actor(w, platform)
        model.load_state_dict(message.content["arrays"].to_torch_state_dict(), strict=False)
        client, number = message.content["config"]["client"], message.content["config"]["server-round"]
        optimizer = torch.optim.SGD(torch_models.trained(model).values(), w.lr)
        for x, y in DataLoader(dataset, batch_sampler=workloads.batches(w, d, number, client)):
            optimizer.zero_grad()
            F.cross_entropy(model(x.to(device)), y.to(device)).backward()
            optimizer.step()
        metrics = MetricRecord({"num-examples": int(d.sizes[client])})
        arrays = ArrayRecord({name: p.detach().cpu() for name, p in torch_models.trained(model).items()})
        return Message(content=RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)

    return app


class TimedFedAvg(FedAvg):
    """FedAvg on the workload's cohorts, timed from choosing clients to having the mean."""

    def __init__(self, w: Workload, watch: driver.Stopwatch) -> None:
        super().__init__(fraction_train=w.cohort / w.clients, fraction_evaluate=0.0)
        self.workload, self.watch = w, watch

    def configure_train(self, server_round, arrays, config, grid):
        """Messages to as many nodes as the cohort has clients."""
        if server_round == 1:
            self.watch.ready()
        self.watch.begin()
        messages = list(super().configure_train(server_round, arrays, config, grid))
        for message, client in zip(messages, workloads.cohort(self.workload, server_round), strict=True):
            own = ConfigRecord({**config, "client": int(client)})
            message.content = RecordDict({"arrays": arrays, "config": own})
        return messages

    def aggregate_train(self, server_round, replies):
        """The weighted mean."""
        replies = list(replies)
        errors = [reply.error.reason for reply in replies if reply.has_error()]
        if errors or len(replies) != self.workload.cohort:
            raise RuntimeError(f"Expected {self.workload.cohort} replies, not {len(replies)} with errors {errors}.")
        arrays, metrics = super().aggregate_train(server_round, replies)
        self.watch.end(lambda: torch_models.numpy(arrays.to_torch_state_dict()))
        return arrays, metrics


def main() -> None:
    """Runs the rounds."""
    o = driver.options()
    w = workloads.find(o.workload, o.small)
    watch = driver.Stopwatch(o)
    server_app = ServerApp()

    @server_app.main()
    def serve(grid: Grid, context: Context) -> None:
        start = {name: torch.from_numpy(value) for name, value in workloads.weights(w)[0].items()}
        strategy = TimedFedAvg(w, watch)
        strategy.start(grid=grid, initial_arrays=ArrayRecord(start), num_rounds=o.rounds)

    gpus = int(o.platform == "gpu")  # said to Ray, which finds a GPU only where it can ask the driver's library for it
    backend = {"client_resources": {"num_cpus": 1, "num_gpus": o.gpu_share * gpus}, "init_args": {"num_gpus": gpus}}
    run_simulation(server_app, client_app(w, o.platform), num_supernodes=w.clients, backend_config=backend)


if __name__ == "__main__":
    import with_flower  # Ray's actors find `actor`, whose cache cannot be pickled, in a module of a name only

    with_flower.main()
