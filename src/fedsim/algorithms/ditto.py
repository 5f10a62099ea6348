"""Ditto (Li et al., arXiv 2012.04221): FedAvg, and beside it a personal model for every client, pulled towards it.

In a round a client trains w from what the server sent, as in FedAvg, and its own v_k on F_k(v) + lam/2 |v - w_t|^2, where
w_t is what the server sent. v_k never travels, so the bytes are FedAvg's.
"""

from __future__ import annotations

from jax import Array

from fedsim.algorithms.fed_avg import Server, fed_avg
from fedsim.algorithms.parts import own_passes, rate, start
from fedsim.core import Algorithm, Client, Cohort, Metrics, Params, Task, Tree
from fedsim.training.local import Fit, fit, proximal
from fedsim.wire import again


def ditto(task: Task, lam: float = 1.0, personal_epochs: int | None = None, personal_rate: float = 1.0) -> Algorithm:
    """Ditto (Li et al., arXiv 2012.04221): FedAvg with a model of its own for every client, pulled towards the server's.

    Args:
        lam: strength of the pull; 0: clients' models are as if they were alone.
        personal_epochs: passes over its data for its own model; default: as the run's.
        personal_rate: its learning rate, as a factor of the clients'.
    """
    if not 0 <= lam < float("inf"):
        raise ValueError(f"Expected lam={lam} >= 0, the pull towards the server's model; 0 is training alone.")
    factor, plain = rate("personal_rate", personal_rate), fed_avg(task)

    def keep(carry: Fit, message: Params, client: Client) -> tuple[Tree, Params]:
        return (), carry.params

    personal = fit(
        task.loss, task.optimizer, lambda client, message: factor * task.lr(client, message),
        own_passes(task, personal_epochs), start=lambda message, memory: memory, reply=keep, penalty=proximal(lam),
    )  # fmt: skip

    def round(key: Array, held: Tree, server: Server, cohort: Cohort) -> tuple[Server, Metrics]:
        new, metrics = plain.round(key, held, server, cohort)
        if personal_epochs != 0:
            cohort.exchange(again(server.params), personal)
        return new, metrics

    def predict(held: Tree, server: Server, memory: Params, x: Tree) -> Array:
        return task.logits(held, memory or server.params, x)

    return plain._replace(
        round=round,
        predict=predict,
        memory=lambda key, held: start(task),
        setup=lambda held: (held, start(task)),
        answers="client",
    )
