"""FlexLoRA (Bai et al., arXiv 2402.11505): the server averages the full products and cuts them by SVD to each one's rank.

U S V^T = sum_k p_k A_k B_k; of the leading r directions A is U and B is S V^T, the best approximation of rank r. A has
orthonormal columns, so a direction of singular value zero starts like a fresh LoRA, B zero and A not. A client of rank
r_k reads the first r_k directions. Bytes: r_k (in + out) numbers per matrix, each way.

Written from the method's idea, not from its code: that A gets U and B the singular values is ours.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array

from fedsim.algorithms.fed_avg import Server, descend, fed_avg
from fedsim.algorithms.lora.factors import (
    Means,
    adapted,
    by_rank,
    check_ranks,
    cut,
    means,
    others,
    rank_of,
    ranks_of,
    trained_factors,
)
from fedsim.core import Algorithm, Batch, Client, Cohort, Metrics, Params, Task, Tree
from fedsim.training.local import Fit, fit
from fedsim.wire import coded


def flex_lora(task: Task, ranks: Sequence[int] = ()) -> Algorithm:
    """FlexLoRA (Bai et al., arXiv 2402.11505): mean of products, cut by SVD to each client's rank; needs peft=lora.

    Args:
        ranks: of the clients in turn, client i the one at i modulo their number; default: the model's for all.
    """
    factors = adapted(task, "flex_lora")
    if not factors:  # the head alone: no product
        return fed_avg(task)
    ranks, rest = check_ranks(ranks, factors), others(task)
    reply = trained_factors(factors, rest, ranks)
    plain = fit(task.loss, task.optimizer, task.lr, task.passes, reply=reply)

    def start(held: Tree, message: Params, client: Client, batch: Batch) -> Fit:
        return plain.start(held, cut(message, factors, rank_of(ranks, client.id)), client, batch)

    local, fold = plain._replace(start=start), means(factors, task.weight)

    def init(key: Array, held: Tree) -> Server:
        params = task.init(key)
        return Server(params, task.server_optimizer.init({path: params[path] for path in rest}))

    @jax.jit
    def update(server: Server, reply: Means) -> Server:
        weight = reply.weight.sum()
        before = Server({path: server.params[path] for path in rest}, server.optimizer)
        averaged = descend(task.server_optimizer, before, {path: reply.leaves[path] for path in rest}, weight)
        params = dict(averaged.params)
        for f in factors:
            a, b = leading(reply.products[f.kernel], f.rank)
            params[f.a] = jnp.where(weight > 0, a, server.params[f.a])
            params[f.b] = jnp.where(weight > 0, b, server.params[f.b])
        return Server(params, averaged.optimizer)

    def round(key: Array, held: Tree, server: Server, cohort: Cohort) -> tuple[Server, Metrics]:
        message = by_rank(server.params, factors, ranks_of(ranks, cohort.ids))
        reply, info = cohort.exchange(coded(message, change=False), local, fold)
        return update(server, reply), info.metrics

    def predict(held: Tree, server: Server, memory: Tree, x: Tree) -> Array:
        return task.logits(held, server.params, x)

    return Algorithm(init, round, predict)


def leading(whole: Array, rank: int) -> tuple[Array, Array]:
    """The best approximation A B of rank r of a matrix (in, out): A (in, r) orthonormal, B (r, out) by falling length."""
    u, s, vt = jnp.linalg.svd(whole, full_matrices=False)
    largest = jnp.take_along_axis(u, jnp.abs(u).argmax(axis=0)[None], axis=0)[0]
    sign = jnp.where(largest < 0, -1.0, 1.0)  # an SVD's signs are free: fixed, so that machines agree
    return (u * sign)[:, :rank], ((s * sign)[:, None] * vt)[:rank]
