"""What an exchange runs: `begin`, `segment` and `end`, compiled from one `Local` and one `Reduce`.

At a client's first step a lane's carry is `start(...)`, at its last step `finish(...)` hands the reply to the fold and the
memory to its slot, and the next client begins. Every mapped array has a leading device axis D, which `lanes.Lanes` takes
away and puts back; nothing here communicates between devices but `end`, which sums over them once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import NamedSharding

from fedsim import wire
from fedsim.core import Batch, Client, Info, Local, Metrics, Reduce, Tree
from fedsim.engine.keys import key_for


class Slots(NamedTuple):
    """The cohort as a device holds it; S slots."""

    id: Array  # (S,), int32
    n: Array  # (S,), int32
    member: Array  # (S,), int32: place in the cohort; M where unused
    reports: Array  # (S,), bool: False for a client that drops out
    seen: Array  # (S,), bool: has a stored memory
    memory: Tree  # (S, ...): stored memory, where seen


class Clock(NamedTuple):
    """When an exchange happens, and the scalars that change with it."""

    round: Array  # (), int32, from 1
    exchange: Array  # (), int32: which of the round's, from 0
    lr: Array  # (), float32: the clients' learning rate


class State(NamedTuple):
    """What one segment hands to the next, on one device of L lanes and S slots."""

    carry: Tree  # (L, ...): the clients now in the lanes
    sums: Tree  # (L,) each: their metrics, summed over rows
    rows: Array  # (L,): rows they have seen
    total: Tree  # the fold
    weight: Array  # (): total weight folded
    counted: Array  # (2,), int32: replies that counted, replies left out as non-finite
    memory: Tree  # (S, ...)
    metrics: dict[str, Array]  # (S,) each
    seen_rows: Array  # (S,)
    nbytes: dict[str, Array]  # (S,) each, uint32: price of every packet in the reply


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


def split_message(message: Tree) -> tuple[list[Any], list[Any], Any]:
    """A message's broadcast part, its per-client part, and what `join_message` needs; holes are ()."""
    nodes, treedef = jax.tree.flatten(wire.unwrap(message), is_leaf=lambda n: isinstance(n, wire.PerClient))
    own = [n.tree if isinstance(n, wire.PerClient) else () for n in nodes]
    shared = [() if isinstance(n, wire.PerClient) else n for n in nodes]
    return shared, own, (treedef, [isinstance(n, wire.PerClient) for n in nodes])


class Programs(NamedTuple):
    """What `exchange` runs for one (local, reduce, structure of the message)."""

    begin: Callable[..., State]
    segment: Any  # the same, jitted or compiled: has `lower` as long as it is not
    end: Callable[..., Any]
    reply: Tree  # shapes of one reply, packets whole
    lanes: int  # a device
    steps: int  # of a segment
    widths: tuple[int, ...]  # columns of a batch that a step may compute, ascending


def first_step(local: Local, init_memory: Any, message: Tree, rows: int) -> Callable[..., Any]:
    """A function of (held, shared, own, x, y, root), to be traced: a client's first step, on a batch of so many rows.

    It returns the message and the client, the carry before and after, and the metrics.
    """
    _, _, (treedef, own_part) = split_message(message)

    def traced(held: Tree, shared: list[Any], own: list[Any], x: Tree, y: Array, root: Array) -> Any:
        own = [jax.tree.map(lambda a: a[0], o) for o in own]
        msg = treedef.unflatten([o if is_own else s for s, o, is_own in zip(shared, own, own_part, strict=True)])
        number = jnp.zeros((), jnp.int32)
        client = Client(number, number, init_memory(root, held), root, number, jnp.zeros((), jnp.float32))

        def batch(rows: int) -> Batch:
            pick = jnp.zeros((rows,), jnp.int32)
            some = jax.tree.map(lambda a: a[pick], x)
            return Batch(some, y[pick], jnp.ones((rows,)), root, number, jnp.zeros((), bool))

        carry = local.start(held, msg, client, batch(local.passes.batch_size))
        return msg, client, carry, *local.step(held, msg, carry, batch(rows))

    return traced


def one_client(local: Local, init_memory: Any, message: Tree, finishing: Any) -> Callable[..., Any]:
    """A function of (held, shared, own, x, y, root), to be traced: what one client replies, and its metrics.

    Args:
        finishing: makes a context to trace `local.finish` in.
    """
    step = first_step(local, init_memory, message, local.passes.batch_size)

    def traced(held: Tree, *args: Any) -> Any:
        msg, client, _, carry, metrics = step(held, *args)
        with finishing():
            reply, _, final = local.finish(held, msg, carry, client)
        return reply, metrics, final

    return traced


def takes_rows(
    rows: int, local: Local, init_memory: Any, message: Tree, held: Tree, x: Tree, y: Array, root: Array
) -> bool:
    """Whether a step on so many rows keeps the shapes of its carry; computes nothing."""
    shared, own, _ = split_message(message)
    step = first_step(local, init_memory, message, rows)
    _, _, before, after, _ = jax.eval_shape(step, held, shared, own, x, y, root)
    shapes = [jax.tree.map(lambda a: (a.shape, a.dtype), carry) for carry in (before, after)]
    return shapes[0] == shapes[1]


def reply_shapes(
    local: Local, init_memory: Any, message: Tree, held: Tree, x: Tree, y: Array, root: Array
) -> tuple[Tree, Metrics, list[str]]:
    """Shapes of one client's reply (packets whole) and of a step's metrics, names of those of `finish`; computes nothing."""
    shared, own, _ = split_message(message)
    traced = one_client(local, init_memory, message, nullcontext)
    reply, metrics, final = jax.eval_shape(traced, held, shared, own, x, y, root)
    return reply, metrics, list(final)


def reply_bytes(local: Local, init_memory: Any, message: Tree, held: Tree, x: Tree, y: Array, root: Array) -> int:
    """Bytes of one client's reply before there is one; a packet whose price depends on values counts as not encoded."""
    shared, own, _ = split_message(message)
    # A packet's price that follows from shapes is a number in this context, and stays a tracer otherwise.
    traced = one_client(local, init_memory, message, jax.ensure_compile_time_eval)
    prices: list[int] = []

    def priced(*args: Any) -> None:
        for _, leaf in wire.named_leaves(traced(*args)[0]):
            known = wire.is_packet(leaf) and not isinstance(leaf.nbytes, jax.core.Tracer)
            prices.append(int(leaf.nbytes) if known else wire.array_bytes(wire.unwrap(leaf)))

    jax.eval_shape(priced, held, shared, own, x, y, root)
    return sum(prices)


class Spread(Protocol):
    """Runs a function on every device: mapped arguments lose their leading device axis, results gain one."""

    def __call__(
        self, fn: Callable[..., Any], mapped: Sequence[bool], donate: Sequence[int] = ...
    ) -> Callable[..., Any]: ...


def make_programs(
    spread: Spread,
    everywhere: NamedSharding,
    local: Local,
    reduce: Reduce,
    init_memory: Any,
    message: Tree,
    one_reply: Tree,
    of_step: Metrics,
    of_finish: Sequence[str],
    members: int,
    lanes: int,
    steps: int,
    widths: tuple[int, ...],
) -> Programs:
    """Builds `begin`, `segment` and `end` for one `Local` and `Reduce`. Nothing is compiled before the first call.

    Args:
        everywhere: the sharding of what every device holds whole.
        one_reply, of_step, of_finish: of `reply_shapes`.
        members: cohort size M.
        lanes, steps: a device's lanes, a segment's steps.
        widths: columns of a batch that a step may compute, ascending; a step of width 0 computes nothing.
    """
    _, _, (treedef, own_part) = split_message(message)
    axes = treedef.unflatten([0 if own else None for own in own_part])

    def join(shared: list[Any], own: list[Any], slot: Array) -> Tree:
        """The message as the lanes' clients see it: own parts gathered by slot."""
        parts = [
            jax.tree.map(lambda a: a[slot], o) if is_own else s
            for s, o, is_own in zip(shared, own, own_part, strict=True)
        ]
        return treedef.unflatten(parts)

    def client_at(slots: Slots, memory: Tree, slot: Array, root: Array, clock: Clock) -> Client:
        """The clients in the lanes, (L,) each; idle lanes show slot S - 1, and nothing of them is used."""
        slot = jnp.minimum(slot, slots.id.shape[0] - 1)
        ids = slots.id[slot]
        keys = jax.vmap(lambda i: key_for(root, "local", clock.round, clock.exchange, i))(ids)
        own = jax.tree.map(lambda a: a[slot], memory)
        round, lr = (jnp.broadcast_to(value, ids.shape) for value in (clock.round, clock.lr))
        return Client(ids, slots.n[slot], own, keys, round, lr)

    def batch_at(x: Tree, y: Array, at: dict[str, Array], keys: Array) -> Batch:
        """The lanes' batches, (L, B, ...)."""
        mask = (jnp.arange(y.shape[1])[None] < at["count"][:, None]).astype(jnp.float32)
        return Batch(x, y, mask, jax.vmap(jax.random.fold_in)(keys, at["step"]), at["step"], at["last"])

    def mapped(fn: Callable[..., Any], held: Tree) -> Callable[..., Any]:
        """`fn(held, message, *per lane)` over lanes; the backbone and the broadcast message are never copied."""
        return lambda message, *lane: jax.vmap(partial(fn, held), in_axes=(axes, *(0 for _ in lane)))(message, *lane)

    def first_memory(held: Tree, slots: Slots, root: Array) -> Tree:
        """Stored memory where there is one, else what a new client keeps."""
        fresh = jax.vmap(lambda i: init_memory(key_for(root, "memory", i), held))(slots.id)
        return where_lane(slots.seen, slots.memory, fresh)

    def begin(
        held: Tree, shared: Any, own: Any, slots: Slots, clock: Clock, root: Array, x: Tree, y: Array, at: Any
    ) -> State:
        x, y, at = jax.tree.map(lambda a: a[0], (x, y, at))
        memory = first_memory(held, slots, root)
        clients = client_at(slots, memory, at["slot"], root, clock)
        msg = join(shared, own, jnp.minimum(at["slot"], slots.id.shape[0] - 1))
        batch = batch_at(x, y, at, clients.key)
        # The values do not matter, every client starts afresh at its first step; the shapes do.
        carry = mapped(local.start, held)(msg, clients, batch)
        per_slot = slots.id.shape
        return State(
            carry=carry,
            sums={name: jnp.zeros((lanes,), jnp.float32) for name in of_step},
            rows=jnp.zeros((lanes,), jnp.float32),
            total=reduce.zero(wire.unwrap(one_reply), members),
            weight=jnp.zeros((), jnp.float32),
            counted=jnp.zeros((2,), jnp.int32),
            memory=memory,
            metrics={name: jnp.full(per_slot, jnp.nan, jnp.float32) for name in (*of_step, *of_finish)},
            seen_rows=jnp.zeros(per_slot, jnp.float32),
            nbytes={name: jnp.zeros(per_slot, jnp.uint32) for name, _ in packets(one_reply)},
        )

    def segment(
        held: Tree,
        shared: Any,
        own: Any,
        slots: Slots,
        clock: Clock,
        root: Array,
        state: State,
        x: Tree,
        y: Array,
        plan: dict[str, Array],
        trip: Array,
    ) -> State:
        unused = slots.id.shape[0]

        def body(t: Array, state: State) -> State:
            at = {name: a[t] for name, a in plan.items()}
            clients = client_at(slots, state.memory, at["slot"], root, clock)
            msg = join(shared, own, jnp.minimum(at["slot"], unused - 1))
            batch = batch_at(jax.tree.map(lambda a: a[t], x), y[t], at, clients.key)

            def started() -> Tree:
                return where_lane(at["first"], mapped(local.start, held)(msg, clients, batch), state.carry)

            carry = lax.cond(at["first"].any(), started, lambda: state.carry)
            live = at["count"] > 0

            def stepped(width: int) -> tuple[Tree, Metrics]:
                if width == 0:
                    return carry, {name: jnp.zeros((lanes, *m.shape), m.dtype) for name, m in of_step.items()}
                x, y, mask = jax.tree.map(lambda a: a[:, :width], (batch.x, batch.y, batch.mask))
                new, metrics = mapped(local.step, held)(msg, carry, batch._replace(x=x, y=y, mask=mask))
                # An empty step changes nothing, momentum and decay included: the whole carry is selected.
                return where_lane(live, new, carry), metrics

            # The width is one for all lanes of the device, so one branch runs.
            carry, metrics = lax.switch(at["width"], [partial(stepped, width) for width in widths])
            rows = at["count"].astype(jnp.float32)
            fresh = lambda a: jnp.where(at["first"], 0.0, a)  # noqa: E731 - one expression, used twice
            sums = {name: fresh(state.sums[name]) + jnp.where(live, m * rows, 0.0) for name, m in metrics.items()}
            state = state._replace(carry=carry, sums=sums, rows=fresh(state.rows) + rows)
            return lax.cond(at["last"].any(), lambda: folded(state, msg, clients, at), lambda: state)

        def folded(state: State, msg: Tree, clients: Client, at: dict[str, Array]) -> State:
            reply, memory, final = mapped(local.finish, held)(msg, state.carry, clients)
            safe = jnp.minimum(at["slot"], unused - 1)
            ends = at["last"] & slots.reports[safe]  # a client that drops out returns nothing and keeps its old memory
            values = wire.unwrap(reply)
            finite = finite_lanes(values, ends.shape[0])
            take = ends & finite
            weights = jnp.where(take, jax.vmap(reduce.weight)(clients, values), 0.0)
            values = where_lane(take, values, jax.tree.map(jnp.zeros_like, values))  # 0 * NaN is NaN: select
            total = reduce.add(state.total, values, weights, jnp.where(take, slots.member[safe], members))
            means = {name: s / jnp.where(state.rows > 0, state.rows, 1.0) for name, s in state.sums.items()}
            means = {name: jnp.where(state.rows > 0, m, jnp.nan) for name, m in means.items()}
            place, counted = jnp.where(ends, at["slot"], unused), jnp.where(take, at["slot"], unused)

            def put(kept: Array, new: Array) -> Array:
                return kept.at[place].set(new, mode="drop")

            def keep(kept: Array, new: Array) -> Array:  # a client that diverged keeps what it had
                return kept.at[counted].set(new, mode="drop")

            return state._replace(
                total=total,
                weight=state.weight + weights.sum(),
                counted=state.counted + jnp.stack([take.sum(), (ends & ~finite).sum()]).astype(jnp.int32),
                memory=jax.tree.map(keep, state.memory, memory),
                metrics={name: put(state.metrics[name], m) for name, m in {**means, **final}.items()},
                seen_rows=put(state.seen_rows, state.rows),
                nbytes={name: put(state.nbytes[name], p.nbytes) for name, p in packets(reply)},
            )

        return lax.fori_loop(0, trip, body, state)

    def end(state: State, member: Array, args: Tree, key: Array) -> Any:
        """Sums over devices, finishes the fold, puts per-client values into the cohort's order."""
        total = jax.tree.map(lambda a: a.sum(axis=0).astype(a.dtype), state.total)
        ordered = {
            name: jnp.full((members,), jnp.nan).at[member].set(m, mode="drop") for name, m in state.metrics.items()
        }
        rows = jnp.zeros((members,)).at[member].set(state.seen_rows, mode="drop")
        metrics = {}
        for name, m in ordered.items():
            of_step = name in state.sums
            share = jnp.where(jnp.isfinite(m), rows if of_step else 1.0, 0.0)
            metrics[name] = (jnp.where(share > 0, m, 0.0) * share).sum() / jnp.maximum(share.sum(), 1.0)
        counted = state.counted.sum(axis=0)
        info = Info(metrics, ordered, state.weight.sum(), counted[0], counted[1])
        return reduce.done(total, args, key), info

    broadcast = (False, False, True, True, False, False)  # held, shared, own, slots, clock, root
    return Programs(
        begin=spread(begin, (*broadcast, True, True, True)),
        segment=spread(segment, (*broadcast, True, True, True, True, True), donate=(6,)),
        end=jax.jit(end, out_shardings=everywhere),
        reply=one_reply,
        lanes=lanes,
        steps=steps,
        widths=widths,
    )


def packets(reply: Tree) -> list[tuple[str, wire.Packet]]:
    """The named packets of a reply."""
    return [(name, leaf) for name, leaf in wire.named_leaves(reply) if wire.is_packet(leaf)]
