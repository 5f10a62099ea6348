"""The engine: packs a cohort into lanes, runs `Local` in all lanes at once, folds the replies, counts every byte.

The vmapped axis is a fixed number of LANES, not the clients: at a client's first step a lane's carry is `start(...)`, at
its last step `finish(...)` hands the reply to the fold and the memory to its slot, and the next client begins. A plan
(`plan.py`) runs as SEGMENTS of one compiled program - batches in, lane state in and out - so its length is data, not a
shape, and batches from the device's memory or from the host go through the same program.

Every mapped array has a leading device axis D, sharded over the mesh axis "clients"; `shard_map` (or `pmap`) gives each
device its own block, its own trip count, and no collective inside. The sums over devices happen once, in `end`.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from fedsim import plan as planning
from fedsim import wire
from fedsim.core import Batch, Client, Info, Local, Passes, Reduce, Tree

PREFETCH_BYTES = 256 * 2**20  # of batches that a segment may hold on a device at once


CPU_LANES, ACCELERATOR_LANES = 4, 256


class Slots(NamedTuple):
    """The cohort as a device holds it; S slots."""

    id: Array  # (S,), int32
    n: Array  # (S,), int32
    member: Array  # (S,), int32: place in the cohort; M where unused
    reports: Array  # (S,), bool: False for a client that drops out
    seen: Array  # (S,), bool: has a stored memory
    memory: Tree  # (S, ...): stored memory, where seen


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


def key_for(root: Array, purpose: str, *numbers: Array | int) -> Array:
    """A key for a named purpose and numbers, independent of lanes, devices and of every other purpose."""
    key = jax.random.fold_in(root, zlib.crc32(purpose.encode()))
    for number in numbers:
        key = jax.random.fold_in(key, number)
    return key


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


def message_bytes(message: Tree, members: int) -> dict[str, int]:
    """Bytes of sending a message to the whole cohort, by leaf: broadcast parts once per client, own parts as they are."""
    prices: dict[str, int] = {}
    for name, node in wire.parts(message):
        if isinstance(node, wire.PerClient):
            for leaf_name, leaf in wire.named_leaves(node.tree):
                nbytes = (
                    int(np.asarray(leaf.nbytes).sum(dtype=np.int64)) if wire.is_packet(leaf) else wire.array_bytes(leaf)
                )
                prices["/".join(filter(None, (name, leaf_name.removeprefix("message")))) or "message"] = nbytes
        else:
            prices[name or "message"] = members * sum(wire.price(node).values())
    return prices


class Programs(NamedTuple):
    """What `exchange` runs for one (local, reduce, structure of the message)."""

    begin: Callable[..., State]
    segment: Callable[..., State]
    end: Callable[..., Any]
    reply: Tree  # shapes of one reply, packets whole
    lanes: int  # a device
    steps: int  # of a segment


class Lanes:
    """Holds what stays on the devices - backbone, examples, partition - and runs cohorts over it.

    Args:
        held: frozen parameters, a pytree; replicated.
        x, y: the examples, leading axis n; replicated. `x` may be a pytree.
        rows, offsets: the partition: client i owns rows[offsets[i]:offsets[i + 1]].
        lanes: lanes a device, or "auto".
        devices: how many local devices; None for all.
        parallel: "shard_map" or "pmap".
        segment_steps: steps of the plan in one call, or "auto".
    """

    def __init__(
        self,
        held: Tree,
        x: Tree,
        y: np.ndarray,
        rows: np.ndarray,
        offsets: np.ndarray,
        *,
        seed: int = 0,
        lanes: int | str = "auto",
        devices: int | None = None,
        parallel: str = "shard_map",
        segment_steps: int | str = "auto",
    ) -> None:
        available = jax.local_devices()
        if devices is not None and devices > len(available):
            raise ValueError(f"Expected devices={devices} <= {len(available)}, the devices of this process; lower it.")
        self.devices = available[:devices]
        self.mesh = Mesh(np.array(self.devices), ("clients",), axis_types=(AxisType.Auto,))
        self.everywhere = NamedSharding(self.mesh, P())
        self.apart = NamedSharding(self.mesh, P("clients"))
        self.parallel = parallel
        self.lanes, self.segment_steps, self.seed = lanes, segment_steps, seed
        self.rows, self.offsets = np.asarray(rows), np.asarray(offsets)
        self.held, self.x, self.y, self.root = self.put((held, x, np.asarray(y, np.int32), jax.random.key(seed)))
        self.row_bytes = sum(wire.array_bytes(leaf) // max(leaf.shape[0], 1) for leaf in jax.tree.leaves(self.x))
        self._programs: dict[Any, Programs] = {}
        self._gather = self._spread(
            lambda x, y, rows: (jax.tree.map(lambda leaf: leaf[rows], x), y[rows]), (False, False, True)
        )

    def gather(self, rows: Array) -> tuple[Tree, Array]:
        """Batches of examples: rows (D, T, L, B) -> x (D, T, L, B, ...), y (D, T, L, B)."""
        return self._gather(self.x, self.y, rows)

    @property
    def population(self) -> int:
        """Number of clients N."""
        return len(self.offsets) - 1

    def put(self, tree: Tree) -> Tree:
        """Copies a tree to every device."""
        return jax.device_put(tree, self.everywhere)

    def _spread(self, fn: Callable[..., Any], mapped: Sequence[bool], donate: Sequence[int] = ()) -> Callable[..., Any]:
        """Runs `fn` on every device: mapped arguments lose their leading device axis, results gain one."""
        if self.parallel == "pmap":
            axes = tuple(0 if m else None for m in mapped)
            return jax.pmap(fn, "clients", in_axes=axes, devices=self.devices, donate_argnums=tuple(donate))

        def block(*args: Any) -> Any:
            own = [jax.tree.map(lambda a: a[0], arg) if m else arg for arg, m in zip(args, mapped, strict=True)]
            return jax.tree.map(lambda a: a[None], fn(*own))

        specs = tuple(P("clients") if m else P() for m in mapped)
        # check_vma: the gradient with respect to a replicated input would be summed over devices.
        program = jax.shard_map(block, mesh=self.mesh, in_specs=specs, out_specs=P("clients"), check_vma=False)
        return jax.jit(program, donate_argnums=tuple(donate))

    def programs(self, local: Local, reduce: Reduce, init_memory: Any, message: Tree, sizes: np.ndarray) -> Programs:
        """The programs of an exchange with a cohort of these sizes; made once per (local, reduce, cohort size)."""
        shapes = tuple((leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(message))
        known = (local, reduce, init_memory, jax.tree.structure(message), shapes, len(sizes))
        if known not in self._programs:
            lanes = self.resolve_lanes(sizes, local)
            steps = self.resolve_segment(lanes, local.passes.batch_size)
            self._programs[known] = make_programs(self, local, reduce, init_memory, message, len(sizes), lanes, steps)
        return self._programs[known]

    def reply_shapes(self, local: Local, init_memory: Any, message: Tree) -> tuple[Tree, list[str]]:
        """Shapes of one client's reply (packets whole) and names of all metrics; computes nothing."""
        shared, own, (treedef, own_part) = split_message(message)

        def shapes(held: Tree, shared: list[Any], own: list[Any], x: Tree, y: Array, root: Array) -> Any:
            own = [jax.tree.map(lambda a: a[0], o) for o in own]
            msg = treedef.unflatten([o if is_own else s for s, o, is_own in zip(shared, own, own_part, strict=True)])
            size, number = local.passes.batch_size, jnp.zeros((), jnp.int32)
            pick = jnp.zeros((size,), jnp.int32)
            client = Client(number, number, init_memory(root, held), root, number)
            batch = Batch(
                jax.tree.map(lambda a: a[pick], x), y[pick], jnp.ones((size,)), root, number, jnp.zeros((), bool)
            )
            carry, metrics = local.step(held, msg, local.start(held, msg, client, batch), batch)
            reply, _, final = local.finish(held, msg, carry, client)
            return reply, metrics, final

        reply, metrics, final = jax.eval_shape(shapes, self.held, shared, own, self.x, self.y, self.root)
        return reply, [*metrics, *final]

    def reuse(self, lanes: int | str, segment_steps: int | str) -> None:
        """Takes what "auto" chose in an earlier process, so that a resumed run sums in the same order."""
        self.lanes = lanes if self.lanes == "auto" else self.lanes
        self.segment_steps = segment_steps if self.segment_steps == "auto" else self.segment_steps

    def resolve_lanes(self, sizes: np.ndarray, local: Local) -> int:
        """What "auto" means for cohorts like this one; chosen once."""
        if self.lanes == "auto":
            self.lanes = choose_lanes(sizes, local.passes, len(self.devices), self.devices[0].platform)
        return int(self.lanes)

    def resolve_segment(self, lanes: int, batch_size: int) -> int:
        """Steps a segment: short where a step's batches are large, so that they fit beside the model."""
        if self.segment_steps == "auto":
            fit = PREFETCH_BYTES // max(lanes * batch_size * self.row_bytes, 1)
            self.segment_steps = int(np.clip(fit, 1, 32))
        return int(self.segment_steps)


def choose_lanes(sizes: np.ndarray, passes: Passes, devices: int, platform: str) -> int:
    """As many lanes a device as a cohort of these sizes (M,) keeps busy, within what the platform does well.

    Lanes beyond (total steps / steps of the longest client) stand idle at the end. On CPUs few lanes are best
    (`benchmarks/lanes.py`); on accelerators more lanes are better.
    """
    steps = np.maximum(planning.steps_of(sizes, passes), 1)
    busy = int(steps.sum() // (steps.max(initial=1) * devices))
    return max(1, min(busy, CPU_LANES if platform == "cpu" else ACCELERATOR_LANES))


def make_programs(
    engine: Lanes,
    local: Local,
    reduce: Reduce,
    init_memory: Any,
    message: Tree,
    members: int,
    lanes: int,
    steps: int,
) -> Programs:
    """Builds `begin`, `segment` and `end` for one `Local` and `Reduce`. Nothing is compiled before the first call."""
    _, _, (treedef, own_part) = split_message(message)
    one_reply, names = engine.reply_shapes(local, init_memory, message)
    axes = treedef.unflatten([0 if own else None for own in own_part])

    def join(shared: list[Any], own: list[Any], slot: Array) -> Tree:
        """The message as the lanes' clients see it: own parts gathered by slot."""
        parts = [
            jax.tree.map(lambda a: a[slot], o) if is_own else s
            for s, o, is_own in zip(shared, own, own_part, strict=True)
        ]
        return treedef.unflatten(parts)

    def client_at(slots: Slots, memory: Tree, slot: Array, root: Array, time_: Array) -> Client:
        """The clients in the lanes, (L,) each; idle lanes show slot S - 1, and nothing of them is used."""
        slot = jnp.minimum(slot, slots.id.shape[0] - 1)
        ids = slots.id[slot]
        keys = jax.vmap(lambda i: key_for(root, "local", time_[0], time_[1], i))(ids)
        own = jax.tree.map(lambda a: a[slot], memory)
        return Client(ids, slots.n[slot], own, keys, jnp.broadcast_to(time_[0], ids.shape))

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
        held: Tree, shared: Any, own: Any, slots: Slots, time_: Array, root: Array, x: Tree, y: Array, at: Any
    ) -> State:
        x, y, at = jax.tree.map(lambda a: a[0], (x, y, at))
        memory = first_memory(held, slots, root)
        clients = client_at(slots, memory, at["slot"], root, time_)
        msg = join(shared, own, jnp.minimum(at["slot"], slots.id.shape[0] - 1))
        batch = batch_at(x, y, at, clients.key)
        # The values do not matter, every client starts afresh at its first step; the shapes do.
        carry = mapped(local.start, held)(msg, clients, batch)
        _, metrics = jax.eval_shape(mapped(local.step, held), msg, carry, batch)
        per_slot = slots.id.shape
        return State(
            carry=carry,
            sums={name: jnp.zeros((lanes,), jnp.float32) for name in metrics},
            rows=jnp.zeros((lanes,), jnp.float32),
            total=reduce.zero(wire.unwrap(one_reply), members),
            weight=jnp.zeros((), jnp.float32),
            counted=jnp.zeros((2,), jnp.int32),
            memory=memory,
            metrics={name: jnp.full(per_slot, jnp.nan, jnp.float32) for name in names},
            seen_rows=jnp.zeros(per_slot, jnp.float32),
            nbytes={name: jnp.zeros(per_slot, jnp.uint32) for name, _ in packets(one_reply)},
        )

    def segment(
        held: Tree,
        shared: Any,
        own: Any,
        slots: Slots,
        time_: Array,
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
            clients = client_at(slots, state.memory, at["slot"], root, time_)
            msg = join(shared, own, jnp.minimum(at["slot"], unused - 1))
            batch = batch_at(jax.tree.map(lambda a: a[t], x), y[t], at, clients.key)

            def started() -> Tree:
                return where_lane(at["first"], mapped(local.start, held)(msg, clients, batch), state.carry)

            carry = lax.cond(at["first"].any(), started, lambda: state.carry)
            stepped, metrics = mapped(local.step, held)(msg, carry, batch)
            live = at["count"] > 0
            # An empty step changes nothing, momentum and decay included: the whole carry is selected.
            carry = where_lane(live, stepped, carry)
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
        return reduce.done(total, args, key), info, state.memory, state.nbytes

    spread = engine._spread
    broadcast = (False, False, True, True, False, False)  # held, shared, own, slots, time, root
    return Programs(
        begin=spread(begin, (*broadcast, True, True, True)),
        segment=spread(segment, (*broadcast, True, True, True, True, True), donate=(6,)),
        end=jax.jit(end, out_shardings=(engine.everywhere, engine.everywhere, engine.apart, engine.apart)),
        reply=one_reply,
        lanes=lanes,
        steps=steps,
    )


def packets(reply: Tree) -> list[tuple[str, wire.Packet]]:
    """The named packets of a reply."""
    return [(name, leaf) for name, leaf in wire.named_leaves(reply) if wire.is_packet(leaf)]
