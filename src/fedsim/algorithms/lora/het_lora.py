"""HetLoRA (Cho et al., arXiv 2401.06432): factors of different ranks, padded with zeros, averaged by their norm.

A client of rank r_k gets the first r_k columns of A and rows of B, trains them, and replies; the server pads with zeros
and takes the means of A and B with weights ||A_k B_k||_F. With `gamma` < 1 clients prune themselves: `penalty` times
||A_tail|| ||B_tail|| is added to the loss, the tail being the ranks from gamma r_k on; where training has made that
product smaller, the client's rank falls to gamma r_k for good.

Bytes: r_k (in + out) numbers per matrix, each way. A server cannot read its clients' memory, so with pruning each client
first tells its rank, 4 bytes up.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import optax
from jax import Array

from fedsim.algorithms.fed_avg import Server, descend, fed_avg
from fedsim.algorithms.lora.factors import (
    adapted,
    by_rank,
    check_ranks,
    cut,
    factors_and_changes,
    others,
    rank_of,
    ranks_of,
    square_norm,
)
from fedsim.core import Algorithm, Batch, Client, Cohort, Local, Metrics, Params, Passes, Task, Tree
from fedsim.folds import mean, stack, uniform
from fedsim.training.local import Fit, fit
from fedsim.wire import coded


def het_lora(task: Task, ranks: Sequence[int] = (), gamma: float = 1.0, penalty: float = 0.0) -> Algorithm:
    """HetLoRA (Cho et al., arXiv 2401.06432): padded factors of mixed ranks, weighted by their norm; needs peft=lora.

    Args:
        ranks: of the clients in turn, client i the one at i modulo their number; default: the model's for all.
        gamma: share of a client's rank that pruning keeps; 1 prunes nothing.
        penalty: weight of the tail's norm in the clients' loss.
    """
    factors = adapted(task, "het_lora")
    if not 0 < gamma <= 1 or not 0 <= penalty < float("inf") or (penalty > 0 and gamma == 1):
        raise ValueError(
            f"Expected 0 < gamma={gamma} <= 1 and penalty={penalty} >= 0, zero without pruning; like gamma=0.5, penalty=0.01."
        )
    if not factors:  # the head alone: no norm
        return fed_avg(task)
    ranks, rest, prunes = check_ranks(ranks, factors), others(task), gamma < 1

    def own_rank(client: Client) -> Array:
        """(), int32: what pruning has left, or the client's first rank."""
        first = rank_of(ranks, client.id)
        return jnp.where(client.memory > 0, client.memory, first) if prunes else first

    def pruned(rank: Array) -> Array:
        return jnp.maximum(jnp.floor(gamma * rank.astype(jnp.float32)).astype(jnp.int32), 1)

    def tail(params: Params, rank: Array) -> Array:
        """sum over matrices of ||A_tail||_F ||B_tail||_F; ()."""
        total = jnp.zeros(())
        for f in factors:
            outer = jnp.arange(f.rank) >= pruned(rank)
            a, b = jnp.where(outer, params[f.a], 0.0), jnp.where(outer[:, None], params[f.b], 0.0)
            total += optax.safe_norm(a, 0.0) * optax.safe_norm(b, 0.0)  # B is zero at the start
        return total

    def pull(params: Params, message: Tree, rank: Array) -> Array:
        return penalty * tail(params, rank)

    plain = fit(task.loss, task.optimizer, task.lr, task.passes, penalty=pull if penalty > 0 else None)

    def start(held: Tree, message: Params, client: Client, batch: Batch) -> Fit:
        rank = own_rank(client)
        return plain.start(held, cut(message, factors, rank), client._replace(memory=rank), batch)

    def finish(held: Tree, message: Params, carry: Fit, client: Client) -> tuple[Tree, Tree, Metrics]:
        rank, memory = own_rank(client), client.memory
        if prunes:
            smaller = tail(cut(carry.params, factors, rank), rank) < tail(cut(message, factors, rank), rank)
            rank = memory = jnp.where(smaller, pruned(rank), rank)
        reply = factors_and_changes(carry.params, message, factors, rest, rank)
        return reply, memory, {"rank": rank.astype(jnp.float32)}

    def weight(client: Client, reply: Params) -> Array:
        norm = jnp.sqrt(sum((square_norm(reply[f.a], reply[f.b]) for f in factors), jnp.zeros(())))
        return jnp.where(client.n > 0, norm, 0.0)

    local, fold = plain._replace(start=start, finish=finish), mean(weight)
    # What a client says about itself before the server knows how much to send: no examples, no training.
    asked = Local(
        start=lambda held, message, client, batch: (),
        step=lambda held, message, carry, batch: (carry, {}),
        finish=lambda held, message, carry, client: ({"rank": own_rank(client)}, client.memory, {}),
        passes=Passes(epochs=0, batch_size=1),
    )
    answers = stack(uniform)

    def init(key: Array, held: Tree) -> Server:
        params = task.init(key)
        return Server(params, task.server_optimizer.init(params))

    @jax.jit
    def update(server: Server, reply: Params, total: Array) -> Server:
        change = {f.a: reply[f.a] - server.params[f.a] for f in factors}
        change |= {f.b: reply[f.b] - server.params[f.b] for f in factors}
        return descend(task.server_optimizer, server, {**change, **{path: reply[path] for path in rest}}, total)

    def round(key: Array, held: Tree, server: Server, cohort: Cohort) -> tuple[Server, Metrics]:
        now = cohort.exchange((), asked, answers)[0].replies["rank"] if prunes else ranks_of(ranks, cohort.ids)
        message = coded(by_rank(server.params, factors, now), change=False)
        reply, info = cohort.exchange(message, local, fold)
        return update(server, reply, info.weight), info.metrics

    def predict(held: Tree, server: Server, memory: Tree, x: Tree) -> Array:
        return task.logits(held, server.params, x)

    def memory(key: Array, held: Tree) -> Tree:
        return jnp.zeros((), jnp.int32) if prunes else ()

    return Algorithm(init, round, predict, memory=memory)
