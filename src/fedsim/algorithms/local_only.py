"""Every client by itself: it trains its own model and sends nothing. What a federation has to beat.

A client goes on from its own parameters in every round that it is in. All begin with the run's first parameters, which
are charged once as part of the setup.
"""

from __future__ import annotations

from jax import Array

from fedsim.algorithms.parts import start
from fedsim.core import Algorithm, Client, Cohort, Metrics, Params, Task, Tree
from fedsim.training.local import Fit, fit


def local_only(task: Task) -> Algorithm:
    """Every client trains a model of its own, and sends nothing; its own test is what counts (--local-test)."""

    def keep(carry: Fit, message: Tree, client: Client) -> tuple[Tree, Params]:
        return (), carry.params

    local = fit(
        task.loss, task.optimizer, task.lr, task.passes, start=lambda message, memory: memory, reply=keep
    )  # fmt: skip

    def round(key: Array, held: Tree, server: Params, cohort: Cohort) -> tuple[Params, Metrics]:
        _, info = cohort.exchange((), local)
        return server, info.metrics

    def predict(held: Tree, server: Params, memory: Params, x: Tree) -> Array:
        return task.logits(held, memory or server, x)

    return Algorithm(
        init=lambda key, held: task.init(key),
        round=round,
        predict=predict,
        memory=lambda key, held: start(task),
        setup=lambda held: (held, start(task)),
        params=lambda server: server,
        answers="client",
    )
