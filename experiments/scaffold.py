"""SCAFFOLD (Karimireddy et al., arXiv 1910.06378), option II: clients correct their drift by control variates.

Command:  fedsim check experiments/scaffold.py:scaffold
          fedsim run --algorithm experiments/scaffold.py:scaffold --weighting uniform --optimizer sgd
The paper's means are uniform, and its clients take plain SGD steps: with another optimizer (x - y) / (K lr) is no gradient.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from fedsim.core import Algorithm, Client, Cohort, Metrics, Params, Task, Tree
from fedsim.training.local import Fit, fit
from fedsim.wire import coded


class Server(NamedTuple):
    params: Params
    control: Params  # c, the mean of the clients' controls c_i


def scaffold(task: Task) -> Algorithm:
    def correction(params: Params, message: Server, own: Params) -> Array:  # its gradient is c - c_i
        return sum((jnp.vdot(message.control[k] - own[k], params[k]) for k in params), jnp.zeros(()))

    def reply(carry: Fit, message: Server, client: Client) -> tuple[Tree, Tree]:
        change = jax.tree.map(jnp.subtract, carry.params, message.params)
        scale = 1 / (jnp.maximum(client.steps, 1).astype(jnp.float32) * carry.lr)  # c_i+ - c_i = -c - change / (K lr)
        return coded((change, jax.tree.map(lambda c, d: -c - d * scale, message.control, change))), client.memory

    local = fit(
        task.loss,
        task.optimizer,
        task.lr,
        task.passes,
        penalty=correction,
        start=lambda message, _: message.params,
        reply=reply,
    )
    local = local._replace(
        sent=lambda own, reply, client: jax.tree.map(jnp.add, own, reply[1])
    )  # as the server decodes it

    @jax.jit
    def update(server: Server, change: tuple[Params, Params], share: Array) -> Server:
        return Server(
            *(
                jax.tree.map(lambda o, d, s=s: o + s * d, o, c)
                for o, c, s in zip(server, change, (1.0, share), strict=True)
            )
        )

    def round(key: Array, held: Tree, server: Server, cohort: Cohort) -> tuple[Server, Metrics]:
        change, info = cohort.exchange(coded(server, change=False), local)
        trained = (cohort.sizes[cohort.reports] > 0).sum()
        return update(server, change, np.float32(trained / cohort.population)), info.metrics

    zeros = lambda key, held=(): jax.tree.map(jnp.zeros_like, task.init(key))  # noqa: E731 - one expression, named
    return Algorithm(
        init=lambda key, held: Server(task.init(key), zeros(key)),
        round=round,
        predict=lambda held, server, memory, x: task.logits(held, server.params, x),
        memory=zeros,
    )
