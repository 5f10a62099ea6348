"""FedOBD (Chen et al., arXiv 2208.05174): only the blocks that changed most go up, quantised, in two stages.

A block b is what is trained of one of the backbone's layers, and its importance |w_b - w_b^sent|_2 / |b|. A client visits its
blocks from the most important on and sends each that still fits into (1 - lam) P entries, passing over one that does not.
The server divides by the weight of all who reported, so a block that few sent moves little:

    w_b += sum_k p_k 1[k sent b] (w_kb - w_b^sent)

What goes either way is quantised by NNADQ. After `stage1` rounds of a drawn cohort and the run's epochs come `stage2` rounds
of all clients, one epoch each, in which every block is sent; then the run ends.

Bytes of a tensor t of which b_t bits an entry are enough: ceil(|t| (b_t + 1) / 8) + 12; down all tensors, up those of the
blocks that were kept and 4 for each of these, which is its number.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from fractions import Fraction
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from fedsim import wire
from fedsim.algorithms.fed_avg import Server as Averaged
from fedsim.algorithms.fed_avg import descend
from fedsim.config import whole_number
from fedsim.core import Algorithm, Batch, Client, Cohort, Metrics, Params, Population, Task, Tree, draw
from fedsim.training.local import Fit, fit
from fedsim.wire import Codec, Sent, coded, kept
from fedsim.wire.codecs.quantisers import nnadq

Finish = Callable[[Tree, Params, Fit, Client], tuple[Tree, Tree, Metrics]]
GAIN = 0.001  # of the score, below which an evaluation counts as none (the authors' code)


class Server(NamedTuple):
    """What the server keeps. Rounds are counted on the host."""

    params: Params
    optimizer: Tree
    rounds: Any  # (), int32: rounds done
    turn: Any  # (), int32: rounds of the first stage
    best: Any  # (), float32: the best score so far, the larger the better
    stale: Any  # (), int32: evaluations since


def fed_obd(
    task: Task,
    lam: float = 0.3,
    beta: float | None = 0.001,
    stage1: int = 100,
    stage2: int = 10,
    blocks: Sequence[str] = (),
    reference: str = "server",
    patience: int | None = None,
    keep_optimizer: bool = False,
) -> Algorithm:
    """FedOBD (Chen et al., arXiv 2208.05174): the most-changed blocks, quantised; needs rounds >= stage1 + stage2.

    Args:
        lam: share of the entries that clients leave out in the first stage.
        beta: of NNADQ both ways, the price of a bit: larger is coarser; None leaves it to --codec-up and --codec-down.
        stage1, stage2: rounds of a drawn cohort, and of all clients with one epoch each.
        blocks: patterns of paths, each a block, which together cover every leaf once; default: the backbone's layers.
        reference: what changes are added to: "server", what it holds, as the authors' code, or "broadcast", what it sent.
        patience: evaluations without a gain of more than 0.001 after which the second stage begins early; default: never.
        keep_optimizer: in the second stage clients keep the state of their optimizer from round to round.

    Raises:
        ValueError: numbers out of range, or blocks that are no partition.
    """
    check(lam, beta, stage1, stage2, reference, patience)
    codec = None if beta is None else nnadq(beta)
    by_block = of_block(sorted(task.trained), blocks)
    first = fit(task.loss, task.optimizer, task.lr, task.passes)._replace(finish=chosen(by_block, lam, codec))
    once = task.passes._replace(epochs=1, steps=None)  # an aggregation after every epoch
    second = fit(task.loss, task.optimizer, task.lr, once)._replace(finish=everything(codec, keep_optimizer))
    if keep_optimizer:
        second = second._replace(start=partial(resumed, second.start))

    def init(key: Array, held: Tree) -> Server:
        params = task.init(key)
        zero = np.int32(0)
        return Server(
            params, task.server_optimizer.init(params), zero, np.int32(stage1), np.finfo(np.float32).min, zero
        )

    @jax.jit
    def prepare(params: Params, key: Array) -> tuple[Params, Array]:
        """What changes are added to, and the share of a float32 that an entry takes as the paper counts."""
        if codec is None:
            return params, jnp.float32(1)
        sent = wire.unwrap(wire.depart(None, coded(params, change=False, by=codec), key))
        return sent if reference == "broadcast" else params, ratio(codec, params)

    @jax.jit
    def update(server: Averaged, base: Params, change: Params, weight: Array) -> Averaged:
        moved = descend(task.server_optimizer, Averaged(base, server.optimizer), change, weight)
        return jax.tree.map(lambda n, o: jnp.where(weight > 0, n, o), moved, server)

    def round(key: Array, held: Tree, server: Server, cohort: Cohort) -> tuple[Server, Metrics]:
        rounds, turn = (int(cohort.fetch(one)) for one in (server.rounds, server.turn))
        base, share = prepare(server.params, key)
        message = coded(server.params, change=False, by=codec)
        reply, info = cohort.exchange(message, first if rounds < turn else second)
        new = update(Averaged(server.params, server.optimizer), base, reply["change"], info.weight)
        told = {} if codec is None else {"paper_bytes_down": 4 * size(server.params) * share}
        return server._replace(params=new.params, optimizer=new.optimizer, rounds=np.int32(rounds + 1)), {
            **info.metrics, **told, "stage": jnp.float32(1 + (rounds >= turn)),
        }  # fmt: skip

    def select(rng: np.random.Generator, server: Server, population: Population) -> np.ndarray:
        last = int(server.rounds) >= int(server.turn)
        return np.arange(population.size) if last else draw(rng, server, population)

    def observe(server: Server, scores: dict[str, float]) -> Server:
        if patience is None or int(server.rounds) >= int(server.turn):
            return server
        score = scores[task.metric] if task.larger else -scores[task.metric]
        better = score > float(server.best) + GAIN
        stale = 0 if better else int(server.stale) + 1
        best = np.float32(score) if better else server.best
        turn = server.rounds if stale >= patience else server.turn
        return server._replace(best=best, stale=np.int32(stale), turn=turn)

    def memory(key: Array, held: Tree) -> Tree:
        return task.optimizer(0.0).init(task.init(key)) if keep_optimizer else ()

    return Algorithm(
        init,
        round,
        predict=lambda held, server, memory, x: task.logits(held, server.params, x),
        memory=memory,
        select=select,
        observe=observe,
        finished=lambda server: bool(int(server.rounds) >= int(server.turn) + stage2),
    )


def check(lam: float, beta: float | None, stage1: int, stage2: int, reference: str, patience: int | None) -> None:
    """Raises `ValueError` for options out of range; `nnadq` refuses a beta."""
    if isinstance(lam, bool) or not isinstance(lam, (int, float)) or not 0 <= lam <= 1:
        raise ValueError(f"Expected 0 <= lam={lam!r} <= 1, the share of entries that clients leave out; give lam=0.3.")
    whole_number(stage1=(stage1, 0), stage2=(stage2, 0))
    if patience is not None:
        whole_number(patience=(patience, 1))
    if stage1 + stage2 == 0:
        raise ValueError(f"Expected stage1={stage1} + stage2={stage2} > 0, rounds; give stage1=100.")
    if reference not in ("server", "broadcast"):
        raise ValueError(f"Expected reference={reference!r} to be 'server' or 'broadcast'; leave it out for 'server'.")
    if reference == "broadcast" and beta is None:
        raise ValueError(
            "Expected a beta for reference='broadcast', as the server does not know what a codec of the run's makes of its "
            "message; give beta=0.001, or leave the reference out."
        )


# --- blocks


def of_block(paths: Sequence[str], patterns: Sequence[str] = ()) -> dict[str, int]:
    """The number of every leaf's block, from 0 in the order of the names.

    A block is a layer of the backbone, which a path begins with: `blocks/3`, `layers/0`, `head`.

    Raises:
        ValueError: patterns that are no partition: a leaf in none or in several, or a pattern without a leaf.
    """
    if isinstance(patterns, str) or not all(isinstance(one, str) for one in patterns):
        raise ValueError(f"Expected blocks={patterns!r} to be patterns of paths; give blocks=('blocks/*', 'head/*').")
    if not patterns:
        names = {path: layer(path) for path in paths}
        order = {name: number for number, name in enumerate(sorted(set(names.values())))}
        return {path: order[name] for path, name in names.items()}
    found = {path: [i for i, one in enumerate(patterns) if fnmatchcase(path, one)] for path in paths}
    wrong = {path: len(of) for path, of in found.items() if len(of) != 1}
    empty = [one for i, one in enumerate(patterns) if not any(i in of for of in found.values())]
    if wrong or empty:
        said = ", ".join(f"{path} in {count}" for path, count in wrong.items()) or f"{empty[0]!r} matches none"
        raise ValueError(
            f"Expected blocks={tuple(patterns)} to hold every trained leaf once, but {said}; the leaves are {', '.join(paths)}."
        )
    return {path: of[0] for path, of in found.items()}


def layer(path: str) -> str:
    """The layer of the backbone in which a leaf lies: the path's first part, with its number if it has one."""
    first, *rest = path.split("/")
    return "/".join([first, *(rest[:1] if rest and rest[0].isdigit() else [])])


def size(params: Mapping[str, Any]) -> int:
    """Entries of all leaves."""
    return sum(leaf.size for leaf in params.values())


def first_fit(change: Params, by_block: Mapping[str, int], lam: float) -> Array:
    """Which blocks are sent, (blocks,) bool: from the largest |change_b|_2 / |b| on, each that fits into (1 - lam) P.

    Of equal ones the first goes first. What is not finite counts as most important.
    """
    count = max(by_block.values()) + 1
    squares, sizes = [jnp.zeros(())] * count, [0] * count
    for path, leaf in change.items():
        squares[by_block[path]] += jnp.sum(leaf * leaf)
        sizes[by_block[path]] += leaf.size
    entries = np.array(sizes, np.int32)
    importance = jnp.sqrt(jnp.stack(squares)) / entries.astype(np.float32)
    importance = jnp.where(jnp.isfinite(importance), importance, jnp.inf)
    budget = int((1 - Fraction(str(lam))) * size(change))  # 0.3 as it is written, not the nearest binary number

    def visit(used: Array, block: Array) -> tuple[Array, Array]:
        after = used + jnp.asarray(entries)[block]
        return jnp.where(after <= budget, after, used), after <= budget

    order = jnp.argsort(-importance, stable=True)
    _, fits = lax.scan(visit, jnp.int32(0), order)
    return jnp.zeros(count, bool).at[order].set(fits)


# --- what a client replies


def chosen(by_block: Mapping[str, int], lam: float, codec: Codec | None) -> Finish:
    """`Local.finish` in the first stage: the blocks that fit, and their numbers."""

    def finish(held: Tree, message: Params, carry: Fit, client: Client) -> tuple[Tree, Tree, Metrics]:
        change = finite_or_none(jax.tree.map(jnp.subtract, carry.params, message))
        sent = first_fit(change, by_block, lam)
        masks = {path: jnp.broadcast_to(sent[by_block[path]], leaf.shape) for path, leaf in change.items()}
        part = {path: kept(leaf, masks[path]) for path, leaf in change.items()}
        numbers = jnp.argsort(~sent, stable=True).astype(jnp.int32)
        ids = kept(numbers, sent.sum(dtype=jnp.int32), 0)
        entries = sum((mask.sum(dtype=jnp.float32) for mask in masks.values()), jnp.zeros(()))
        metrics = {"kept": entries / size(change)}
        if codec is not None:
            metrics["paper_bytes_up"] = (1 - lam) * 4 * size(change) * ratio(codec, change, masks)
        return {"change": coded(part, by=codec), "blocks": ids}, client.memory, metrics

    return finish


def everything(codec: Codec | None, keep_optimizer: bool) -> Finish:
    """`Local.finish` in the second stage: all of the change, and the optimizer's state where clients keep it."""

    def finish(held: Tree, message: Params, carry: Fit, client: Client) -> tuple[Tree, Tree, Metrics]:
        change = jax.tree.map(jnp.subtract, carry.params, message)
        metrics = {"kept": jnp.float32(1)}
        if codec is not None:
            metrics["paper_bytes_up"] = 4 * size(change) * ratio(codec, change)
        return {"change": coded(change, by=codec)}, carry.optimizer if keep_optimizer else client.memory, metrics

    return finish


def resumed(start: Any, held: Tree, message: Tree, client: Client, batch: Batch) -> Fit:
    """A client that takes up its optimizer's state."""
    return start(held, message, client, batch)._replace(optimizer=client.memory)


def finite_or_none(change: Params) -> Params:
    """The change, or nothing but NaN where an entry is not finite: else a block that is not sent would hide it."""
    finite = jnp.stack([jnp.isfinite(leaf).all() for leaf in change.values()]).all()
    return jax.tree.map(lambda leaf: jnp.where(finite, leaf, jnp.nan), change)


# --- the paper's count


def ratio(codec: Codec, leaves: Mapping[str, Array], sent: Mapping[str, Array] | None = None) -> Array:
    """Mean over the entries that travel of b_t / 32, (): bits without the sign, and no scales, as the paper counts."""
    told = {path: Sent(leaf, None if sent is None else sent[path]) for path, leaf in leaves.items()}
    found, _ = codec.encode(told, jax.random.key(0), jax.random.key(0), ())
    bits, entries = jnp.zeros(()), jnp.zeros(())
    for one in found.values():
        count = jnp.float32(one.value.size) if one.mask is None else one.mask.sum(dtype=jnp.float32)
        bits += count * jnp.maximum(jnp.asarray(one.bits).astype(jnp.float32) - 1, 0)
        entries += count
    return bits / jnp.maximum(entries, 1) / 32
