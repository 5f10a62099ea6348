"""What an exchange runs: `begin`, `segment` and `end`, compiled from one `Local` and one `Reduce`.

At a client's first step a lane's carry is `start(...)`, at its last step `finish(...)` hands the reply to the codec, what
that decodes to the fold, and the memory to its slot; then the next client begins. Every mapped array has a leading
device axis D, which `lanes.Lanes` takes away and puts back; nothing here communicates between devices but `end`, which
sums over them once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import NamedSharding

from fedsim import wire
from fedsim.core import Averaged, Batch, Client, Info, Metrics, Reduce, Tree
from fedsim.engine.keys import key_for
from fedsim.engine.replies import Reply, packets
from fedsim.engine.state import (
    Clock,
    Given,
    Parts,
    Slots,
    State,
    batch_at,
    finite_lanes,
    first_coding,
    first_memory,
    in_lanes,
    mapped,
    named,
    where_lane,
)

FINISHING: int = 8  # lanes whose clients finish together, at least; and an eighth of all, see `folded`


class Spread(Protocol):
    """Runs a function on every device: mapped arguments lose their leading device axis, results gain one."""

    def __call__(
        self, fn: Callable[..., Any], mapped: Sequence[bool], donate: Sequence[int] = ...
    ) -> Callable[..., Any]: ...


class Programs(NamedTuple):
    """What `exchange` runs for one (local, reduce, structure of the message)."""

    begin: Callable[..., State]
    segment: Any  # the same, jitted or compiled: has `lower` as long as it is not
    end: Callable[..., Any]
    reply: Reply
    hear: Callable[..., Any] | None  # between them, where replies go from peer to peer
    lanes: int  # a device
    steps: int  # of a segment
    widths: tuple[int, ...]  # columns of a batch that a step may compute, ascending


def make_programs(
    spread: Spread, everywhere: NamedSharding, parts: Parts, steps: int, link: Any = None, fold: Reduce | None = None
) -> Programs:
    """Builds `begin`, `segment` and `end` for one `Local` and `Reduce`. Nothing is compiled before the first call.

    Args:
        everywhere: the sharding of what every device holds whole.
        steps: a segment's.
        link, fold: `Peers.into`, and what folds the mixed replies, where peers hear one another.
    """
    given = (False, False, True, True, False, False, False)  # which of `Given`'s fields differ by device
    looked = parts._replace(reduce=fold) if fold else parts
    return Programs(
        begin=spread(partial(begin, parts), (*given, True, True, True)),
        segment=spread(partial(segment, parts), (*given, True, True, True, True, True), donate=(7,)),
        end=jax.jit(partial(end, looked), out_shardings=everywhere),
        hear=spread(partial(hear, looked, link), (*given, True, True)) if link else None,
        reply=parts.reply,
        lanes=parts.lanes,
        steps=steps,
        widths=parts.widths,
    )


# --- the three programs, as one device of L lanes and S slots sees them


def begin(
    parts: Parts,
    held: Tree,
    shared: list[Any],
    own: list[Any],
    slots: Slots,
    clock: Clock,
    root: Array,
    args: Tree,
    x: Tree,
    y: Array,
    at: dict[str, Array],
) -> State:
    """The state before the first step; of the first segment's batches and plan the shapes matter."""
    given = Given(held, shared, own, slots, clock, root, args)
    x, y, at = jax.tree.map(lambda a: a[0], (x, y, at))
    memory = first_memory(parts, given)
    clients, message = in_lanes(parts, given, memory, at["slot"])
    # The values do not matter, every client starts afresh at its first step; the shapes do.
    carry = mapped(parts, parts.local.start, held)(message, clients, batch_at(x, y, at, clients.key))
    per_slot = slots.id.shape
    return State(
        carry=carry,
        sums={name: jnp.zeros((parts.lanes,), jnp.float32) for name in parts.reply.of_step if name != "weight"},
        rows=jnp.zeros((parts.lanes,), jnp.float32),
        total=parts.reduce.zero(parts.reply.values, per_slot[0] if parts.reduce.rows else parts.members),
        weight=jnp.zeros((), jnp.float32),
        counted=jnp.zeros((2,), jnp.int32),
        memory=memory,
        coding=first_coding(parts, given),
        metrics={name: jnp.full(per_slot, jnp.nan, jnp.float32) for name in parts.reply.metrics},
        seen_rows=jnp.zeros(per_slot, jnp.float32),
        nbytes={name: jnp.zeros(per_slot, jnp.uint32) for name, _ in packets(parts.reply.sent)},
    )


def segment(
    parts: Parts,
    held: Tree,
    shared: list[Any],
    own: list[Any],
    slots: Slots,
    clock: Clock,
    root: Array,
    args: Tree,
    state: State,
    x: Tree,
    y: Array,
    plan: dict[str, Array],
    trip: Array,
) -> State:
    """The first `trip` steps of a stretch of the plan, one after the other, in all lanes at once."""
    given = Given(held, shared, own, slots, clock, root, args)

    def body(t: Array, state: State) -> State:
        at = {name: a[t] for name, a in plan.items()}
        clients, message = in_lanes(parts, given, state.memory, at["slot"])
        batch = batch_at(jax.tree.map(lambda a: a[t], x), y[t], at, clients.key)
        state = advanced(parts, given, state, message, clients, batch, at)
        return lax.cond(
            at["last"].any(), lambda: folded(parts, given, state, at), lambda: state
        )  # fmt: skip

    return lax.fori_loop(0, trip, body, state)


def hear(
    parts: Parts,
    into: Callable[[Tree, Tree, Client], Tree],
    held: Tree,
    shared: list[Any],
    own: list[Any],
    slots: Slots,
    clock: Clock,
    root: Array,
    args: Tree,
    state: State,
    mixed: Tree,
) -> State:
    """The state after every client has heard its peers; mixed (S, ...). The fold is that of what they heard."""
    given = Given(held, shared, own, slots, clock, root, args)
    clients, _ = in_lanes(parts, given, state.memory, jnp.arange(slots.id.shape[0]))
    spoke = state.total.weight > 0  # whose reply counted; the others keep what they had
    memory = where_lane(spoke, jax.vmap(into)(state.memory, mixed, clients), state.memory)
    total = parts.reduce.zero(parts.reply.values, slots.id.shape[0] if parts.reduce.rows else parts.members)
    mixed = where_lane(spoke, mixed, jax.tree.map(jnp.zeros_like, mixed))
    weights = jnp.where(spoke, jax.vmap(parts.reduce.weight)(clients, mixed), 0.0)
    place = jnp.arange(slots.id.shape[0]) if parts.reduce.rows else slots.member
    place = jnp.where(spoke, place, max(slots.id.shape[0], parts.members))
    total = parts.reduce.add(total, mixed, weights, place, args)
    return state._replace(memory=memory, total=total, weight=weights.sum())


def end(parts: Parts, state: State, member: Array, args: Tree, key: Array) -> tuple[Tree, Info, Tree]:
    """Sums over devices, finishes the fold, puts per-client values into the cohort's order."""
    members = parts.members

    def in_order(rows: Array) -> Array:  # (D, S, ...) -> (M, ...)
        return jnp.zeros((members, *rows.shape[2:]), rows.dtype).at[member].set(rows, mode="drop")

    over_devices = in_order if parts.reduce.rows else lambda a: a.sum(axis=0).astype(a.dtype)
    total = jax.tree.map(over_devices, state.total)
    ordered = {name: jnp.full((members,), jnp.nan).at[member].set(m, mode="drop") for name, m in state.metrics.items()}
    rows = in_order(state.seen_rows)
    metrics = {}
    for name, m in ordered.items():
        of_step = name in state.sums
        share = jnp.where(jnp.isfinite(m), rows if of_step else 1.0, 0.0)
        mean = (jnp.where(share > 0, m, 0.0) * share).sum() / jnp.maximum(share.sum(), 1.0)
        metrics[name] = jnp.where(share.sum() > 0, mean, jnp.nan)  # where nothing counted, there is no mean
    counted = state.counted.sum(axis=0)
    result, seen, weight, reported = parts.reduce.done(total, args, key), (), state.weight.sum(), counted[0]
    if parts.averages:
        found: Averaged = result
        result, seen, weight = found.value, found.seen, found.weight
        reported = counted[0] if found.reported is None else found.reported
    return result, Info(metrics, ordered, weight, reported, counted[1]), seen


# --- one step of all lanes


def advanced(
    parts: Parts, given: Given, state: State, message: Tree, clients: Client, batch: Batch, at: dict[str, Array]
) -> State:
    """The state after the lanes' clients have started, where it is their first step, and taken a step."""
    start, step = (mapped(parts, fn, given.held) for fn in (parts.local.start, parts.local.step))

    def started() -> Tree:
        return where_lane(at["first"], start(message, clients, batch), state.carry)

    carry = lax.cond(at["first"].any(), started, lambda: state.carry)
    live = at["live"] if "live" in at else at["count"] > 0
    of_step = parts.reply.of_step

    def stepped(width: int) -> tuple[Tree, Metrics]:
        if width == 0:
            return carry, {name: jnp.zeros((parts.lanes, *m.shape), m.dtype) for name, m in of_step.items()}
        x, y, mask = jax.tree.map(lambda a: a[:, :width], (batch.x, batch.y, batch.mask))
        new, metrics = step(message, carry, batch._replace(x=x, y=y, mask=mask))
        # An empty step changes nothing, momentum and decay included: the whole carry is selected.
        return where_lane(live, new, carry), metrics

    # The width is one for all lanes of the device, so one branch runs.
    carry, metrics = lax.switch(at["width"], [partial(stepped, width) for width in parts.widths])
    rows = jnp.where(live, metrics.pop("weight", batch.mask.sum(axis=1)), 0.0)
    fresh = lambda a: jnp.where(at["first"], 0.0, a)  # noqa: E731 - one expression, used twice
    sums = {name: fresh(state.sums[name]) + jnp.where(live, m * rows, 0.0) for name, m in metrics.items()}
    return state._replace(carry=carry, sums=sums, rows=fresh(state.rows) + rows)


def folded(parts: Parts, given: Given, state: State, at: dict[str, Array]) -> State:
    """The state after the clients that end here have replied, some at a time: few end in a step where clients differ, and
    `finish`, a codec and the fold may cost more than a step."""
    lanes, some = parts.lanes, max(FINISHING, -(-parts.lanes // 8))
    if lanes <= some:
        return replied(parts, given, state, jnp.arange(lanes), at["slot"], at["last"])
    order = jnp.argsort(~at["last"], stable=True)  # the lanes that end, first
    order = jnp.pad(order, (0, -lanes % some))
    ending = at["last"].sum()

    def body(turn: Array, state: State) -> State:
        here = lax.dynamic_slice(order, (turn * some,), (some,))
        return replied(parts, given, state, here, at["slot"][here], turn * some + jnp.arange(some) < ending)

    return lax.fori_loop(0, (ending + some - 1) // some, body, state)


def replied(parts: Parts, given: Given, state: State, lane: Array, slot: Array, ends: Array) -> State:
    """The state after the clients of these lanes (K,), where they end: replies in the fold, what is kept in their slots."""
    reduce, slots, unused = parts.reduce, given.slots, given.slots.id.shape[0]
    whole = lane.shape[0] == parts.lanes  # all lanes, in order
    carry, sums, rows = jax.tree.map(lambda a: a if whole else a[lane], (state.carry, state.sums, state.rows))
    clients, message = in_lanes(parts, given, state.memory, slot)
    safe = jnp.minimum(slot, unused - 1)
    marked, memory, final = mapped(parts, parts.local.finish, given.held)(message, carry, clients)
    reply, coding = decoded(parts, given, marked, clients, jax.tree.map(lambda a: a[safe], state.coding))
    values = wire.unwrap(reply)
    if parts.local.sent is not None:
        memory = jax.vmap(parts.local.sent)(memory, values, clients)
    ends &= slots.reports[safe]  # a client that drops out returns nothing and keeps its old memory
    finite = finite_lanes(values, ends.shape[0])
    take = ends & finite
    weights = jnp.where(take, jax.vmap(reduce.weight)(clients, values), 0.0)
    values = where_lane(take, values, jax.tree.map(jnp.zeros_like, values))  # 0 * NaN is NaN: select
    place = jnp.where(take, slot if reduce.rows else slots.member[safe], max(unused, parts.members))
    total = reduce.add(state.total, values, weights, place, given.args)
    means = {name: jnp.where(rows > 0, s / jnp.where(rows > 0, rows, 1.0), jnp.nan) for name, s in sums.items()}
    ended, counted = jnp.where(ends, slot, unused), jnp.where(take, slot, unused)

    def put(kept: Array, new: Array) -> Array:
        return kept.at[ended].set(new, mode="drop")

    def keep(kept: Array, new: Array) -> Array:  # a client that diverged keeps what it had
        return kept.at[counted].set(new, mode="drop")

    return state._replace(
        total=total,
        weight=state.weight + weights.sum(),
        counted=state.counted + jnp.stack([take.sum(), (ends & ~finite).sum()]).astype(jnp.int32),
        memory=jax.tree.map(keep, state.memory, memory),
        coding=jax.tree.map(keep, state.coding, coding),
        metrics={name: put(state.metrics[name], m) for name, m in {**means, **final}.items()},
        seen_rows=put(state.seen_rows, rows),
        nbytes={name: put(state.nbytes[name], p.nbytes) for name, p in packets(reply)},
    )


def decoded(parts: Parts, given: Given, reply: Tree, clients: Client, coding: Tree) -> tuple[Tree, Tree]:
    """The replies as the server decodes them, (K, ...), and what the codec keeps."""
    common = key_for(given.root, named("codec", parts.name), given.clock.round, given.clock.exchange)
    keys = jax.vmap(lambda key: key_for(key, "codec"))(clients.key)
    return jax.vmap(lambda reply, key, state: wire.arrive(reply, parts.codec, key, common, state))(reply, keys, coding)
