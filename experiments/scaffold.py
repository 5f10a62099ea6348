"""SCAFFOLD (Karimireddy et al., arXiv 1910.06378), option II: clients correct their drift by control variates.

Command:  fedsim check experiments/scaffold.py:scaffold
          fedsim run --algorithm experiments/scaffold.py:scaffold --weighting uniform --optimizer sgd
The paper's means are uniform, and its clients take plain SGD steps: with another optimizer (x - y) / (K lr) is no gradient.
docs/own_algorithm.md explains it line by line. fedsim's own `scaffold` is this with a server optimizer.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from optax.tree_utils import tree_add, tree_sub, tree_vdot, tree_zeros_like

from fedsim.core import Algorithm, Client, Cohort, Metrics, Params, Task, Tree
from fedsim.training.local import Fit, fit
from fedsim.wire import coded


class Server(NamedTuple):
    params: Params  # x
    control: Params  # c, the mean of the clients' controls c_i


def scaffold(task: Task) -> Algorithm:
    def start(message: Server, own: Params) -> Params:
        return message.params

    def correction(params: Params, message: Server, own: Params) -> Array:
        return jnp.asarray(tree_vdot(tree_sub(message.control, own), params))  # its gradient is c - c_i

    def reply(carry: Fit, message: Server, client: Client) -> tuple[Tree, Params]:
        change = tree_sub(carry.params, message.params)
        distance = jnp.maximum(client.steps, 1).astype(jnp.float32) * carry.lr
        control = jax.tree.map(lambda c, d: -c - d / distance, message.control, change)  # c_i+ - c_i
        return coded((change, control)), carry.memory

    def sent(own: Params, reply: tuple[Params, Params], client: Client) -> Params:
        return tree_add(own, reply[1])  # as the server decoded it

    local = fit(task.loss, task.optimizer, task.lr, task.passes, penalty=correction, start=start, reply=reply)
    local = local._replace(sent=sent)

    @jax.jit
    def update(server: Server, change: tuple[Params, Params], share: Array) -> Server:
        control = jax.tree.map(lambda c, d: c + share * d, server.control, change[1])
        return Server(tree_add(server.params, change[0]), control)

    def round(key: Array, held: Tree, server: Server, cohort: Cohort) -> tuple[Server, Metrics]:
        change, info = cohort.exchange(coded(server, change=False), local)
        trained = (cohort.sizes[cohort.reports] > 0).sum()
        return update(server, change, np.float32(trained / cohort.population)), info.metrics

    def memory(key: Array, held: Tree) -> Params:
        return tree_zeros_like(task.init(key))

    def init(key: Array, held: Tree) -> Server:
        return Server(task.init(key), memory(key, held))

    return Algorithm(init, round, lambda held, server, memory, x: task.logits(held, server.params, x), memory)
