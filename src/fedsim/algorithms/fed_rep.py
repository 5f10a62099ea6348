"""FedRep (Collins et al., arXiv 2102.07078): a shared representation, and a head of its own for every client.

In a round a client first trains its head v_i with the representation u fixed, then u with v_i fixed, and replies with
what changed of u; the server averages that. v_i never travels. Bytes: |u| numbers, each way.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import jax
from jax import Array

from fedsim.algorithms.fed_avg import Server, descend
from fedsim.algorithms.parts import HEAD, divided, own_passes, pick, rate, start
from fedsim.core import Algorithm, Client, Cohort, Metrics, Params, Task, Tree
from fedsim.training.local import Fit, fit
from fedsim.wire import again, coded


def fed_rep(
    task: Task, personal: Sequence[str] = HEAD, personal_epochs: int | None = None, personal_rate: float = 1.0
) -> Algorithm:
    """FedRep (Collins et al., arXiv 2102.07078): the body is shared and averaged, a head stays with its client.

    Args:
        personal: patterns of the paths that stay with a client.
        personal_epochs: passes over its data for these; default: as the run's. The paper takes many, and one for the rest.
        personal_rate: their learning rate, as a factor of the clients'.
    """
    parts, factor = divided(task, personal, "fed_rep"), rate("personal_rate", personal_rate)

    def both(message: Params, memory: Params) -> Params:
        return {**message, **memory}

    def keep(carry: Fit, message: Params, client: Client) -> tuple[Tree, Params]:
        return (), pick(carry.params, parts.personal)

    def changed(carry: Fit, message: Params, client: Client) -> tuple[Tree, Params]:
        return coded({path: carry.params[path] - message[path] for path in parts.shared}), client.memory

    passes = own_passes(task, personal_epochs)
    head = fit(
        task.loss, task.optimizer, lambda client, message: factor * task.lr(client, message), passes, start=both,
        trains=parts.personal, reply=keep,
    )  # fmt: skip
    body = fit(
        task.loss, task.optimizer, task.lr, task.passes, start=both, trains=parts.shared, reply=changed
    )  # fmt: skip
    update = jax.jit(partial(descend, task.server_optimizer))

    def init(key: Array, held: Tree) -> Server:
        shared = pick(task.init(key), parts.shared)
        return Server(shared, task.server_optimizer.init(shared))

    def round(key: Array, held: Tree, server: Server, cohort: Cohort) -> tuple[Server, Metrics]:
        message = coded(server.params, change=False)
        if parts.personal and personal_epochs != 0:
            cohort.exchange(message, head)
            message = again(server.params)
        change, info = cohort.exchange(message, body)
        return update(server, change, info.weight), info.metrics

    def whole(server: Server) -> Params:
        return {**start(task), **server.params}

    return Algorithm(
        init,
        round,
        predict=lambda held, server, memory, x: task.logits(held, {**whole(server), **(memory or {})}, x),
        memory=lambda key, held: pick(start(task), parts.personal),
        setup=lambda held: (held, pick(start(task), parts.personal)),
        params=whole,
        answers="client",
    )
