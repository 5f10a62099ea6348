"""FLoRA (Wang et al., arXiv 2409.05976): the server stacks the clients' factors, and the product goes into the kernel.

A = [p_1 A_1, ..., p_K A_K] and B = [B_1; ...; B_K] give A B = sum_k p_k A_k B_k: exact, whatever the clients' ranks.
W becomes W + s A B, and every client starts the next round with factors of its own, A random and B zero. It draws A from
its own key, so that costs no bytes.

Up: r_k (in + out) numbers per matrix. Down: the stacks of all rounds since the client was there last, sum_k r_k
(in + out) each, or the whole kernel if that is cheaper. The simulator folds the products and never holds a stack.
"""

from __future__ import annotations

from collections.abc import Sequence

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
    check_ranks,
    cut,
    kernel_packets,
    means,
    nothing_written,
    others,
    overlaid,
    product,
    rank_of,
    ranks_of,
    trained_factors,
    wrote,
)
from fedsim.backbones.load import draw
from fedsim.core import Algorithm, Batch, Client, Cohort, Metrics, Params, Task, Tree
from fedsim.training.local import Fit, fit
from fedsim.wire import coded


def flora(task: Task, ranks: Sequence[int] = ()) -> Algorithm:
    """FLoRA (Wang et al., arXiv 2409.05976): stacked factors go into the kernel, exact for mixed ranks; needs peft=lora.

    Args:
        ranks: of the clients in turn, client i the one at i modulo their number; default: the model's for all.
    """
    factors = adapted(task, "flora", frozen=True)
    if not factors:  # the head alone: nothing to stack
        return fed_avg(task)
    ranks, rest = check_ranks(ranks, factors), others(task)
    sizes = {path: shape for f in factors for path, shape in ((f.a, (f.inputs, f.rank)), (f.b, (f.rank, f.outputs)))}
    shapes = {path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, shape in sizes.items()}
    plain = fit(
        task.loss,
        task.optimizer,
        task.lr,
        task.passes,
        view=overlaid(factors),
        start=lambda message, memory: {path: message[path] for path in (*rest, *sizes)},
        reply=trained_factors(factors, rest, ranks),
    )

    def start(held: Tree, message: Params, client: Client, batch: Batch) -> Fit:
        fresh = cut(draw(client.key, shapes), factors, rank_of(ranks, client.id))
        return plain.start(held, {**message, **fresh}, client, batch)

    local, fold = plain._replace(start=start), means(factors, task.weight)

    def init(key: Array, held: Params) -> WritingServer:
        params = task.init(key)
        kernels = {f.kernel: held[f.kernel] + f.scale * product(params[f.a], params[f.b]) for f in factors}
        params |= {f.b: jnp.zeros_like(params[f.b]) for f in factors}
        state = task.server_optimizer.init({path: params[path] for path in rest})
        return WritingServer(params, state, kernels, nothing_written(factors, min(ranks)))

    @jax.jit
    def encode(server: WritingServer, last: Array) -> Tree:
        return {
            **{path: coded(server.params[path], change=False) for path in rest},
            **kernel_packets(factors, server.kernels, server.written, last),
        }

    @jax.jit
    def update(server: WritingServer, reply: Means, ranks: Array, round: Array) -> WritingServer:
        before = Averaged({path: server.params[path] for path in rest}, server.optimizer)
        change = {path: reply.leaves[path] for path in rest}
        averaged = descend(task.server_optimizer, before, change, reply.weight.sum())
        kernels = {f.kernel: server.kernels[f.kernel] + f.scale * reply.products[f.kernel] for f in factors}
        stacked = jnp.where(reply.weight > 0, ranks, 0).sum()
        written = wrote(server.written, stacked, round)
        return WritingServer({**server.params, **averaged.params}, averaged.optimizer, kernels, written)

    def round(key: Array, held: Tree, server: WritingServer, cohort: Cohort) -> tuple[WritingServer, Metrics]:
        reply, info = cohort.exchange(encode(server, cohort.last), local, fold)
        return update(server, reply, ranks_of(ranks, cohort.ids), np.int32(cohort.round)), info.metrics

    def predict(held: Tree, server: WritingServer, memory: Tree, x: Tree) -> Array:
        return task.logits(held, {**server.params, **server.kernels}, x)

    return Algorithm(init, round, predict, params=lambda server: {**server.params, **server.kernels})
