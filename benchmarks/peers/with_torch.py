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
    x, y = torch.from_numpy(d.x), torch.from_numpy(d.y).long()
    model = torch_models.model(w)
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

    driver.loop(o, round, lambda: torch_models.numpy(torch_models.trained(model)))


if __name__ == "__main__":
    main()
