"""A plain torch loop: one model, client after client, the weighted sum kept as it goes."""

from __future__ import annotations

import driver
import torch
import torch.nn.functional as F
import torch_models
import workloads


def main() -> None:
    """Runs the rounds."""
    o = driver.options()
    w = workloads.find(o.workload, o.small)
    d = workloads.data(w)
    device = torch_models.device_of(o.platform)
    x, y = torch.from_numpy(d.x).to(device), torch.from_numpy(d.y).long().to(device)
    model = torch_models.model(w).to(device)
    parameters = list(torch_models.trained(model).values())
    optimizer = torch.optim.SGD(parameters, w.lr)

    def round(number: int) -> None:
        start = [p.detach().clone() for p in parameters]
        total = [torch.zeros_like(p) for p in start]
        ids = workloads.cohort(w, number)
        examples = int(d.sizes[ids].sum())
        for client in ids:
            with torch.no_grad():
                torch._foreach_copy_(parameters, start)
            for rows in workloads.batches(w, d, number, int(client)):
                optimizer.zero_grad()
                F.cross_entropy(model(x[rows]), y[rows]).backward()
                optimizer.step()
            with torch.no_grad():
                torch._foreach_add_(total, parameters, alpha=int(d.sizes[client]) / examples)
        with torch.no_grad():
            torch._foreach_copy_(parameters, total)
        torch_models.wait(device)

    driver.loop(o, round, lambda: torch_models.numpy(torch_models.trained(model)), device=str(device))


if __name__ == "__main__":
    main()
