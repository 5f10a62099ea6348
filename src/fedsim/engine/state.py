"""What a device holds while it runs an exchange: its clients in slots, its lanes, and the views that the programs take.

`programs.py` has the programs themselves.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from fedsim import wire
from fedsim.core import Batch, Client, Local, Reduce, Tree
from fedsim.engine.keys import key_for
from fedsim.engine.replies import Reply


class Slots(NamedTuple):
    """The cohort as a device holds it; S slots."""

    id: Array  # (S,), int32
    n: Array  # (S,), int32
    steps: Array  # (S,), int32: that the client takes
    member: Array  # (S,), int32: place in the cohort; M where unused
    reports: Array  # (S,), bool: False for a client that drops out
    seen: Array  # (S,), bool: has a stored memory
    memory: Tree  # (S, ...): stored memory, where seen
    coding_seen: Tree  # (S,), bool: the same of what the codec keeps; () where it keeps nothing
    coding: Tree  # (S, ...)


class Clock(NamedTuple):
    """When an exchange happens, and the scalars that change with it."""

    round: Array  # (), int32, from 1
    exchange: Array  # (), int32: which of its stream in this round, from 0
    lr: Array  # (), float32: the clients' learning rate


class State(NamedTuple):
    """What one segment hands to the next, on one device of L lanes and S slots."""

    carry: Tree  # (L, ...): the clients now in the lanes
    sums: Tree  # (L,) each: their metrics, summed over rows, or over what the task weighs by
    rows: Array  # (L,): rows they have seen, or that weight
    total: Tree  # the fold
    weight: Array  # (): total weight folded
    counted: Array  # (2,), int32: replies that counted, replies left out as non-finite
    memory: Tree  # (S, ...)
    coding: Tree  # (S, ...): the codec's state
    metrics: dict[str, Array]  # (S,) each
    seen_rows: Array  # (S,)
    nbytes: dict[str, Array]  # (S,) each, uint32: price of every packet in the reply


class Parts(NamedTuple):
    """What the programs of an exchange are made of; all of it is known before they are traced."""

    local: Local
    reduce: Reduce  # where peers hear one another it keeps rows, which `hear` folds by the algorithm's own
    averages: bool  # `reduce.done` gives an `Averaged`
    init_memory: Any  # (key, held) -> what a new client keeps
    codec: wire.Codec | None  # of the replies
    name: str  # of the exchange's randomness: group and stream; "" for one of each
    message: Any  # structure of the message
    own: list[bool]  # which of its nodes differ by client
    reply: Reply
    members: int  # cohort size M
    lanes: int  # of a device, L
    widths: tuple[int, ...]  # columns of a batch that a step may compute, ascending; at width 0 it computes nothing


class Given(NamedTuple):
    """What a device is given for a whole exchange."""

    held: Tree  # the frozen backbone
    shared: list[Any]  # the message's broadcast nodes, () elsewhere
    own: list[Any]  # its own nodes, (S, ...), () elsewhere
    slots: Slots
    clock: Clock
    root: Array  # the run's key
    args: Tree  # of the fold


# --- what the lanes hold


def in_lanes(parts: Parts, given: Given, memory: Tree, slot: Array) -> tuple[Client, Tree]:
    """The clients in the lanes, (L,) each, and the message as they see it; idle lanes show slot S - 1, and nothing of them
    is used."""
    slots, clock = given.slots, given.clock
    slot = jnp.minimum(slot, slots.id.shape[0] - 1)
    ids = slots.id[slot]
    keys = jax.vmap(lambda i: key_for(given.root, named("local", parts.name), clock.round, clock.exchange, i))(ids)
    kept = jax.tree.map(lambda a: a[slot], memory)
    round, lr = (jnp.broadcast_to(value, ids.shape) for value in (clock.round, clock.lr))
    nodes = [
        jax.tree.map(lambda a: a[slot], own) if differs else shared
        for shared, own, differs in zip(given.shared, given.own, parts.own, strict=True)
    ]
    return Client(ids, slots.n[slot], kept, keys, round, lr, slots.steps[slot]), parts.message.unflatten(nodes)


def batch_at(x: Tree, y: Array, at: dict[str, Array], keys: Array) -> Batch:
    """The lanes' batches, (L, B, ...)."""
    real = at["mask"] if "mask" in at else jnp.arange(y.shape[1])[None] < at["count"][:, None]
    mask = real.astype(jnp.float32)
    return Batch(x, y, mask, jax.vmap(jax.random.fold_in)(keys, at["step"]), at["step"], at["last"])


def mapped(parts: Parts, fn: Callable[..., Any], held: Tree) -> Callable[..., Any]:
    """`fn(held, message, *per lane)` over lanes; the backbone and the broadcast message are never copied."""
    axes = parts.message.unflatten([0 if own else None for own in parts.own])
    return lambda message, *lane: jax.vmap(partial(fn, held), in_axes=(axes, *(0 for _ in lane)))(message, *lane)


def first_memory(parts: Parts, given: Given) -> Tree:
    """Stored memory where there is one, else what a new client keeps."""
    slots = given.slots
    fresh = jax.vmap(lambda i: parts.init_memory(key_for(given.root, "memory", i), given.held))(slots.id)
    return where_lane(slots.seen, slots.memory, fresh)


def first_coding(parts: Parts, given: Given) -> Tree:
    """What the codec keeps, stored or new; () where it keeps nothing."""
    slots, codec = given.slots, parts.codec
    if codec is None or not jax.tree.leaves(slots.coding):
        return slots.coding
    fresh = jax.vmap(lambda i: codec.init(key_for(given.root, "coding", i), parts.reply.changes))(slots.id)
    return where_lane(slots.coding_seen, slots.coding, fresh)


def named(purpose: str, name: str) -> str:
    """A purpose of randomness for the exchanges of a group and stream."""
    return f"{purpose} {name}" if name else purpose


def where_lane(mask: Array, yes: Tree, no: Tree) -> Tree:
    """Selects whole lanes: (L,) mask over trees of (L, ...) leaves. A select, so NaN on the other side is harmless."""

    def pick(a: Array, b: Array) -> Array:
        return jnp.where(mask.reshape(mask.shape + (1,) * (a.ndim - 1)), a, b)

    return jax.tree.map(pick, yes, no)


def finite_lanes(replies: Tree, lanes: int) -> Array:
    """(L,) bool: every floating-point entry of the lane's reply is finite."""
    ok = jnp.ones((lanes,), bool)
    for leaf in jax.tree.leaves(replies):
        if jnp.issubdtype(leaf.dtype, jnp.inexact):
            ok &= jnp.isfinite(leaf).reshape(lanes, -1).all(axis=1)
    return ok
