"""Small algorithms that need what FedAvg does not: a server that stops, several architectures.

Each is as short as it can be.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import Array

from fedsim.algorithms.fed_avg import Server, fed_avg
from fedsim.core import Algorithm, Cohort, Metrics, Task, Tree


def in_stages(task: Task, rounds: int = 2) -> Algorithm:
    """FedAvg that ends by itself after some rounds, and counts them in its state."""
    plain = fed_avg(task)

    def round(key: Array, held: Tree, server: Tree, cohort: Cohort) -> tuple[Tree, Metrics]:
        new, metrics = plain.round(key, held, server[0], cohort)
        return (new, server[1] + 1), metrics

    return plain._replace(
        init=lambda key, held: (plain.init(key, held), jnp.int32(0)),
        round=round,
        predict=lambda held, server, memory, x: plain.predict(held, server[0], memory, x),
        params=lambda server: server[0].params,
        finished=lambda server: int(server[1]) >= rounds,
    )


def by_group(task: Task) -> Algorithm:
    """FedAvg in each group by itself: several architectures, nothing of which is mixed."""
    parts = {name: fed_avg(one) for name, one in task.groups.items()}

    def init(key: Array, held: Tree) -> dict[str, Server]:
        return {name: part.init(key, held[name]) for name, part in parts.items()}

    def round(key: Array, held: Tree, server: dict[str, Server], cohort: Cohort) -> tuple[dict[str, Server], Metrics]:
        new, seen = dict(server), {}
        for name, members in cohort.groups.items():
            new[name], metrics = parts[name].round(key, held[name], server[name], members)
            seen |= {f"{name} {metric}": value for metric, value in metrics.items()}
        return new, seen

    def answering(by_name: dict[str, Any]) -> str:
        return "server" if "server" in by_name else next(iter(by_name))

    def predict(held: Tree, server: dict[str, Server], memory: Tree, x: Tree) -> Array:
        name = answering(parts)
        return parts[name].predict(held[name], server[name], (), x)

    return Algorithm(init, round, predict, params=lambda server: server[answering(parts)].params, groups=True)
