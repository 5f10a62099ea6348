"""FedEx-LoRA (Singhal et al., arXiv 2410.09432): FedIT's means, and what they miss goes into the kernel.

With the means A and B of the factors, the residual sum_k p_k A_k B_k - A B is added to W, so W + s A B is exact for the
weights p_k that were used. In the changes of a round the residual is their covariance,
sum_k p_k dA_k dB_k - (sum_k p_k dA_k)(sum_k p_k dB_k), and with sum_k p_k (dA_k - mean) = 0 it is
sum_{k<K} p_k (dA_k - mean)(dB_k - dB_K): of rank (K - 1) r for K replies.

Up: r (in + out) numbers per matrix. Down: the same, and the residuals of all rounds since the client was there last,
(K - 1) r (in + out) each, or the whole kernel if that is cheaper.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from fedsim.algorithms.fed_avg import Server as Averaged
from fedsim.algorithms.fed_avg import descend, fed_avg
from fedsim.algorithms.lora.factors import (
    Means,
    WritingServer,
    adapted,
    kernel_packets,
    means,
    nothing_written,
    others,
    overlaid,
    product,
    wrote,
)
from fedsim.core import Algorithm, Cohort, Metrics, Params, Task, Tree
from fedsim.training.local import fit
from fedsim.wire import coded


def fed_ex_lora(task: Task) -> Algorithm:
    """FedEx-LoRA (Singhal et al., arXiv 2410.09432): FedIT, and the residual goes into the kernel; needs peft=lora."""
    factors = adapted(task, "fed_ex_lora", frozen=True)
    if not factors:  # the head alone: no product, no residual
        return fed_avg(task)
    rest = others(task)
    local = fit(
        task.loss,
        task.optimizer,
        task.lr,
        task.passes,
        view=overlaid(factors),
        start=lambda message, memory: {path: message[path] for path in task.trained},
    )

    fold = means(factors, task.weight)

    def init(key: Array, held: Params) -> WritingServer:
        params, kernels = task.init(key), {f.kernel: jnp.array(held[f.kernel]) for f in factors}
        state = task.server_optimizer.init({path: params[path] for path in rest})
        return WritingServer(params, state, kernels, nothing_written(factors, factors[0].rank))

    @jax.jit
    def encode(server: WritingServer, last: Array) -> Tree:
        packets = kernel_packets(factors, server.kernels, server.written, last)
        return {path: coded(leaf, change=False) for path, leaf in server.params.items()} | packets

    @jax.jit
    def update(server: WritingServer, reply: Means, round: Array) -> WritingServer:
        before = Averaged({path: server.params[path] for path in rest}, server.optimizer)
        change = reply.leaves
        averaged = descend(task.server_optimizer, before, {path: change[path] for path in rest}, reply.weight.sum())
        params = {path: server.params[path] + change[path] for f in factors for path in (f.a, f.b)}
        kernels = {}
        for f in factors:
            residual = reply.products[f.kernel] - product(change[f.a], change[f.b])
            kernels[f.kernel] = server.kernels[f.kernel] + f.scale * residual
        counted = (reply.weight > 0).sum(dtype=jnp.int32)
        written = wrote(server.written, jnp.maximum(counted - 1, 0) * factors[0].rank, round)
        return WritingServer({**params, **averaged.params}, averaged.optimizer, kernels, written)

    def round(key: Array, held: Tree, server: WritingServer, cohort: Cohort) -> tuple[WritingServer, Metrics]:
        reply, info = cohort.exchange(encode(server, cohort.last), local, fold)
        return update(server, reply, np.int32(cohort.round)), info.metrics

    def predict(held: Tree, server: WritingServer, memory: Tree, x: Tree) -> Array:
        return task.logits(held, {**server.params, **server.kernels}, x)

    return Algorithm(init, round, predict, params=lambda server: {**server.params, **server.kernels})
