"""torch.func: `vmap(grad)` over the clients' stacked trained parameters, the frozen ones shared.

Clients are sorted by their number of steps, and a step runs the clients that are still at work only: in eager torch a
shape that changes from step to step costs nothing.
"""

from __future__ import annotations

import driver
import numpy as np
import torch
import torch.nn.functional as F
import torch_models
import workloads
from torch import Tensor
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

CLIENTS_AT_ONCE = 16  # per call of vmap; larger stacks leave the caches of a CPU


def main() -> None:
    """Runs the rounds."""
    o = driver.options()
    w = workloads.find(o.workload, o.small)
    d = workloads.data(w)
    device = torch_models.device_of(o.platform)
    x, y = torch.from_numpy(d.x).to(device), torch.from_numpy(d.y).long().to(device)
    model = torch_models.model(w).to(device)
    names = list(torch_models.trained(model))
    server = {name: p.detach() for name, p in torch_models.trained(model).items()}
    frozen = {name: p.detach() for name, p in model.named_parameters() if name not in names}

    def loss(params: dict[str, Tensor], x: Tensor, y: Tensor, mask: Tensor) -> Tensor:
        each = F.cross_entropy(functional_call(model, (params, frozen), x), y, reduction="none")
        return (each * mask).sum() / mask.sum()

    gradient = vmap(grad(loss))

    def round(number: int) -> None:
        ids = workloads.cohort(w, number)
        ids = ids[np.argsort(-d.sizes[ids], kind="stable")]
        rows, mask = workloads.padded(w, d, number, ids)
        rows, mask = torch.from_numpy(rows).to(device), torch.from_numpy(mask).to(device)
        steps = -(-d.sizes[ids] // w.batch_size)
        weight = torch.from_numpy(d.sizes[ids] / d.sizes[ids].sum()).float().to(device)
        total = {name: torch.zeros_like(p) for name, p in server.items()}
        for at in range(0, len(ids), CLIENTS_AT_ONCE):
            part = slice(at, at + CLIENTS_AT_ONCE)
            stacked = {n: p.expand(len(ids[part]), *p.shape).clone() for n, p in server.items()}
            for t in range(int(steps[part].max())):
                active = int((steps[part] > t).sum())  # the first so many, as they are sorted
                these = rows[part, t][:active]
                now = {n: p[:active] for n, p in stacked.items()}
                step = gradient(now, x[these], y[these], mask[part, t][:active])
                for n, p in now.items():
                    p.sub_(step[n], alpha=w.lr)
            for n, p in stacked.items():
                total[n] += torch.tensordot(weight[part], p, dims=1)
        server.update(total)
        torch_models.wait(device)

    with sdpa_kernel(SDPBackend.MATH):  # vmap has a batching rule for this form of attention only
        driver.loop(o, round, lambda: torch_models.numpy(server), device=str(device))


if __name__ == "__main__":
    main()
