"""What the federated LoRA rules share: their checks, sums of products as a fold, ranks as data, and the price of ranks.

An adapted matrix is W + s A B with A (inputs, r) and B (r, outputs), the inputs from the left: the papers' B A,
transposed. With weights p_k that sum to one, what a rule should reach is the mean of the clients' products,
sum_k p_k A_k B_k; the product of the means of A and B is not that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from fedsim.core import Client, Factors, Params, Reduce, Task, Tree
from fedsim.folds import weighted_sum
from fedsim.training.local import Fit
from fedsim.wire import Packet, coded, kept

HIGHEST = jax.lax.Precision.HIGHEST


def adapted(
    task: Task, rule: str, *, trains_a: bool = True, dora: bool = False, frozen: bool = False
) -> tuple[Factors, ...]:
    """The matrices that LoRA adapts; none where the task trains the head alone, as in `head_rounds`.

    Args:
        rule: the algorithm's name, for what is refused.
        trains_a: whether the rule needs A to be trained, or needs it not to be.
        dora: whether the rule still says something true where DoRA gives every output a length of its own.
        frozen: whether the rule writes into the kernels, which then must not be trained themselves.

    Raises:
        ValueError: the task does not train what the rule combines.
    """
    if task.trained and all(path.startswith("head/") for path in task.trained):
        return ()
    kind = "lora" if trains_a else "ffa_lora"
    if not task.factors or any(f.b not in task.trained for f in task.factors):
        raise ValueError(f"Expected peft to train LoRA's factors for algorithm={rule!r}; give --peft {kind}.")
    if any((f.a in task.trained) != trains_a for f in task.factors):
        raise ValueError(
            f"Expected LoRA's A to be {'trained' if trains_a else 'frozen'} for {rule!r}; give --peft {kind}."
        )
    if not dora and any(path.rpartition("/")[2] == "magnitude" for path in task.trained):
        raise ValueError(f"Expected dora=False for algorithm={rule!r}, as lengths are no sum of products; drop --dora.")
    both = [f.kernel for f in task.factors if f.kernel in task.trained]
    if frozen and both:
        raise ValueError(
            f"Expected the adapted kernels to be frozen for algorithm={rule!r}, which writes into them; {both[0]} is "
            "trained: adapt others by --targets, or drop that part of --peft."
        )
    return task.factors


def others(task: Task) -> list[str]:
    """Paths of what is trained beside the factors: the head, biases, ..., averaged as in FedAvg."""
    return sorted(task.trained - {path for f in task.factors for path in (f.a, f.b)})


def product(a: Array, b: Array) -> Array:
    """A B in full precision; (in, r), (r, out) -> (in, out)."""
    return jnp.matmul(a, b, precision=HIGHEST)


def square_norm(a: Array, b: Array) -> Array:
    """||A B||_F^2 through r x r matrices; ()."""
    return jnp.maximum(jnp.sum(product(a.T, a) * product(b, b.T)), 0.0)


# --- ranks that differ by client: data, never shapes


def check_ranks(ranks: Sequence[int], factors: tuple[Factors, ...]) -> tuple[int, ...]:
    """The ranks that clients take in turn, client i the one at i modulo their number; () is the model's for all.

    Raises:
        ValueError: they are no ranks, or their largest is not the model's.
    """
    largest = factors[0].rank
    given = tuple(ranks) if isinstance(ranks, Sequence) else (ranks,)
    if not all(isinstance(r, int) and not isinstance(r, bool) and r > 0 for r in given):
        raise ValueError(f"Expected ranks={ranks} to be numbers >= 1; give them like ranks=(4, 8, 16).")
    if given and max(given) != largest:
        raise ValueError(f"Expected the largest of ranks={ranks} to be rank={largest}; give --rank {max(given)}.")
    return given or (largest,)


def rank_of(ranks: tuple[int, ...], id: Array) -> Array:
    """A client's rank; (), int32."""
    return jnp.asarray(ranks, jnp.int32)[id % len(ranks)]


def ranks_of(ranks: tuple[int, ...], ids: np.ndarray) -> np.ndarray:
    """The ranks of a cohort; (M,), int32."""
    return np.asarray(ranks, np.int32)[ids % len(ranks)]


def cut(params: Params, factors: tuple[Factors, ...], rank: Array) -> Params:
    """Factors with zeros from `rank` on. They stay zero: each one's gradient is a multiple of the other's zeros."""
    kept = dict(params)
    for f in factors:
        inside = jnp.arange(f.rank) < rank
        kept[f.a], kept[f.b] = jnp.where(inside, params[f.a], 0.0), jnp.where(inside[:, None], params[f.b], 0.0)
    return kept


def by_rank(params: Params, factors: tuple[Factors, ...], rank: Array | np.ndarray) -> Tree:
    """A message whose factors cost r (in + out) numbers: rank () of one client, or (M,) of all to whom it is broadcast."""
    own = {path: kept(params[path], rank, axis) for f in factors for path, axis in ((f.a, 1), (f.b, 0))}
    return {**params, **own}


def trained_factors(
    factors: tuple[Factors, ...], rest: list[str], ranks: tuple[int, ...]
) -> Callable[[Fit, Params, Client], tuple[Tree, Tree]]:
    """`fit`'s reply of clients with these ranks: factors as they are, and what changed of all else."""
    return lambda carry, message, client: (
        factors_and_changes(carry.params, message, factors, rest, rank_of(ranks, client.id)),
        client.memory,
    )


def factors_and_changes(
    params: Params, message: Params, factors: tuple[Factors, ...], rest: list[str], rank: Array
) -> Tree:
    """A reply: factors of this rank as they are, which are values, and what changed of all else."""
    own = by_rank({path: params[path] for f in factors for path in (f.a, f.b)}, factors, rank)
    values = {path: coded(leaf, change=False) for path, leaf in own.items()}
    return {**values, **{path: coded(params[path] - message[path]) for path in rest}}


# --- the mean of products


class Means(NamedTuple):
    """What the fold gives: weighted means over the replies that counted."""

    leaves: Params  # of every leaf of the reply
    products: Params  # kernel's path -> sum_k p_k A_k B_k (in, out), without LoRA's scale
    weight: Array  # (M,), float32: by client in the cohort's order, 0 where a reply did not count


def means(factors: tuple[Factors, ...], weight: Callable[[Client, Tree], Array]) -> Reduce:
    """Means of leaves and of products of factors. One total, whatever the cohort; replies are flat dicts by path."""

    def zero(reply: Params, clients: int) -> Means:
        leaves = {path: jnp.zeros(leaf.shape, leaf.dtype) for path, leaf in reply.items()}
        products = {f.kernel: jnp.zeros((f.inputs, f.outputs), jnp.float32) for f in factors}
        return Means(leaves, products, jnp.zeros((clients,), jnp.float32))

    def add(total: Means, replies: Params, weights: Array, slots: Array, args: Tree) -> Means:
        products = {}
        for f in factors:  # all lanes' factors side by side are one product: sum_l w_l A_l B_l
            weighted = weights[:, None, None] * replies[f.a]
            both = jnp.tensordot(weighted, replies[f.b], axes=((0, 2), (0, 1)), precision=HIGHEST)
            products[f.kernel] = total.products[f.kernel] + both
        leaves = {path: total.leaves[path] + weighted_sum(weights, leaf) for path, leaf in replies.items()}
        return Means(leaves, products, total.weight.at[slots].add(weights, mode="drop"))

    def done(total: Means, args: Tree, key: Array) -> Means:
        weight = total.weight.sum()
        scale = jnp.where(weight > 0, 1 / jnp.where(weight > 0, weight, 1.0), 0.0)
        leaves, products = jax.tree.map(lambda s: s * scale, (total.leaves, total.products))
        return Means(leaves, products, total.weight)

    return Reduce(zero, add, done, weight)


# --- kernels that the server writes into


class WritingServer(NamedTuple):
    """What a server keeps that writes into the adapted kernels."""

    params: Params  # all that is trained
    optimizer: Tree  # of what is averaged as in FedAvg
    kernels: Params  # the adapted kernels as they are now
    written: Written


class Written(NamedTuple):
    """Ranks that the last rounds added to every kernel, the newest last; rounds that added nothing are left out.

    As many as it takes to reach the price of a whole kernel: a client that missed more is sent that.
    """

    ranks: Array  # (H,), int32
    rounds: Array  # (H,), int32; 0 where there is nothing yet


def nothing_written(factors: tuple[Factors, ...], least: int) -> Written:
    """The start; `least` is the smallest rank that a round adds, if it adds any."""
    length = max(-(-f.inputs * f.outputs // ((f.inputs + f.outputs) * least)) for f in factors)
    return Written(jnp.zeros((length,), jnp.int32), jnp.zeros((length,), jnp.int32))


def wrote(written: Written, ranks: Array, round: Array) -> Written:
    """The same after a round that added so many ranks."""
    new = Written(jnp.append(written.ranks[1:], ranks), jnp.append(written.rounds[1:], round))
    return jax.tree.map(lambda n, o: jnp.where(ranks > 0, n, o), new, written)


def kernel_packets(factors: tuple[Factors, ...], kernels: Params, written: Written, last: Array) -> dict[str, Packet]:
    """The kernels as clients get them: what was added since round `last` (M,), as factors, or whole if that is cheaper.

    A client that was in round `last` holds what had been added before that round; one that never was (0) holds W0.
    """
    missed = written.rounds >= last.astype(jnp.int32)[:, None]
    ranks = jnp.where(missed, written.ranks, 0).sum(axis=1)  # (M,)
    packets = {}
    for f in factors:
        one, whole = 4 * (f.inputs + f.outputs), 4 * f.inputs * f.outputs
        # Compared as ranks: the bytes of many missed rounds would not fit into 32 bits.
        nbytes = jnp.where(ranks <= whole // one, ranks * one, whole).astype(jnp.uint32)
        packets[f.kernel] = Packet(kernels[f.kernel], nbytes)
    return packets


def overlaid(factors: tuple[Factors, ...]) -> Callable[[Params, Params, Tree], Params]:
    """`fit`'s view of a client that was sent the kernels: (held, message, memory) -> the frozen part as it is now."""
    return lambda held, message, memory: {**held, **{f.kernel: message[f.kernel] for f in factors}}
