"""FedSA-LoRA (Guo et al., arXiv 2410.01463): clients train A and B, share A, and keep their B.

B stays in the client's memory and never travels; A and what else is trained are averaged as in FedAvg. Bytes: r in
numbers per matrix, each way.

Who answers at test time is a client, with its own B. Evaluation does not go through clients' memories yet: what `fedsim
run` reports, and what it exports, is the model of a client that has just joined, whose B is zero - the backbone with the
averaged head.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from fedsim.algorithms.fed_avg import Server, descend, fed_avg
from fedsim.algorithms.lora.factors import adapted
from fedsim.core import Algorithm, Cohort, Metrics, Params, Task, Tree
from fedsim.training.local import fit
from fedsim.wire import coded


def fed_sa_lora(task: Task) -> Algorithm:
    """FedSA-LoRA (Guo et al., arXiv 2410.01463): A is shared and averaged, B stays with its client; needs peft=lora."""
    factors = adapted(task, "fed_sa_lora")
    if not factors:  # the head alone: nothing is kept back
        return fed_avg(task)
    own = {f.b: (f.rank, f.outputs) for f in factors}
    local = fit(
        task.loss,
        task.optimizer,
        task.lr,
        task.passes,
        start=lambda message, memory: {**message, **memory},
        reply=lambda carry, message, client: (
            coded({path: carry.params[path] - message[path] for path in message}),
            {path: carry.params[path] for path in own},
        ),
    )
    update = jax.jit(partial(descend, task.server_optimizer))

    def new() -> Params:
        """The B of a client that joins, as LoRA starts it."""
        return {path: jnp.zeros(shape) for path, shape in own.items()}

    def init(key: Array, held: Tree) -> Server:
        shared = {path: leaf for path, leaf in task.init(key).items() if path not in own}
        return Server(shared, task.server_optimizer.init(shared))

    def round(key: Array, held: Tree, server: Server, cohort: Cohort) -> tuple[Server, Metrics]:
        change, info = cohort.exchange(coded(server.params, change=False), local)
        return update(server, change, info.weight), info.metrics

    def predict(held: Tree, server: Server, memory: Tree, x: Tree) -> Array:
        return task.logits(held, {**server.params, **(memory or new())}, x)

    return Algorithm(
        init, round, predict, memory=lambda key, held: new(), params=lambda server: {**server.params, **new()}
    )
