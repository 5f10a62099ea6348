"""What one client replies, found by tracing: shapes, metrics' names and bytes before there is a reply. Computes nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from fedsim import wire
from fedsim.core import Average, Batch, Client, Local, Metrics, Reduce, Tree


class Reply(NamedTuple):
    """What one client replies, as shapes."""

    sent: Tree  # packets whole
    changes: Mapping[str, Any]  # the leaves marked as changes, by name
    others: list[str]  # names of the parts that are not
    coded: bool  # a part is marked for the codecs
    of_step: Metrics  # a step's metrics
    of_finish: list[str]  # names of the metrics of `finish`

    @property
    def values(self) -> Tree:
        """As the fold gets it."""
        return wire.unwrap(self.sent)

    @property
    def metrics(self) -> list[str]:
        """Names of all metrics; "weight" only says how much a step's others count."""
        return [*(name for name in self.of_step if name != "weight"), *self.of_finish]


def split_message(message: Tree) -> tuple[list[Any], list[Any], Any]:
    """A message's broadcast part, its per-client part, and what `join_message` needs; holes are ()."""
    nodes, treedef = jax.tree.flatten(wire.unwrap(message), is_leaf=lambda n: isinstance(n, wire.PerClient))
    own = [n.tree if isinstance(n, wire.PerClient) else () for n in nodes]
    shared = [() if isinstance(n, wire.PerClient) else n for n in nodes]
    return shared, own, (treedef, [isinstance(n, wire.PerClient) for n in nodes])


def beginning(local: Local, init_memory: Any, message: Tree) -> Callable[..., Any]:
    """A function of (held, shared, own, x, y, root), to be traced: the message, a client, its first batch, its carry."""
    _, _, (treedef, own_part) = split_message(message)

    def traced(held: Tree, shared: list[Any], own: list[Any], x: Tree, y: Array, root: Array) -> Any:
        own = [jax.tree.map(lambda a: a[0], o) for o in own]
        msg = treedef.unflatten([o if is_own else s for s, o, is_own in zip(shared, own, own_part, strict=True)])
        number = jnp.zeros((), jnp.int32)
        client = Client(number, number, init_memory(root, held), root, number, jnp.zeros((), jnp.float32), number)
        batch = some_batch(x, y, root, local.passes.batch_size)
        return msg, client, batch, local.start(held, msg, client, batch)

    return traced


def some_batch(x: Tree, y: Array, root: Array, rows: int) -> Batch:
    """A batch of so many rows, the same each."""
    pick = jnp.zeros((rows,), jnp.int32)
    some = jax.tree.map(lambda a: a[pick], x)
    return Batch(some, y[pick], jnp.ones((rows,)), root, jnp.zeros((), jnp.int32), jnp.zeros((), bool))


def first_step(local: Local, init_memory: Any, message: Tree, rows: int) -> Callable[..., Any]:
    """A function of (held, shared, own, x, y, root), to be traced: a client's first step, on a batch of so many rows.

    It returns the message and the client, the carry before and after, and the metrics.
    """
    begin = beginning(local, init_memory, message)

    def traced(held: Tree, shared: list[Any], own: list[Any], x: Tree, y: Array, root: Array) -> Any:
        msg, client, _, carry = begin(held, shared, own, x, y, root)
        return msg, client, carry, *local.step(held, msg, carry, some_batch(x, y, root, rows))

    return traced


def one_client(
    local: Local, init_memory: Any, message: Tree, codec: wire.Codec | None, finishing: Any
) -> Callable[..., Any]:
    """A function of (held, shared, own, x, y, root), to be traced: what one client replies, marked and as it is sent, and
    its metrics.

    Args:
        finishing: makes a context to trace `local.finish` and the codec in.
    """
    step = first_step(local, init_memory, message, local.passes.batch_size)

    def traced(held: Tree, shared: list[Any], own: list[Any], x: Tree, y: Array, root: Array) -> Any:
        msg, client, _, carry, metrics = step(held, shared, own, x, y, root)
        with finishing():
            marked, _, final = local.finish(held, msg, carry, client)
            changes = wire.changes(marked)
            state = codec.init(root, {name: sent.value for name, sent in changes.items()}) if codec and changes else ()
            sent, _ = wire.arrive(marked, codec, root, root, state)
        return marked, sent, metrics, final

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
    local: Local, init_memory: Any, message: Tree, codec: wire.Codec | None, held: Tree, x: Tree, y: Array, root: Array
) -> Reply:
    """What one client replies, before there is a reply; computes nothing."""
    shared, own, _ = split_message(message)
    traced = one_client(local, init_memory, message, codec, nullcontext)
    marked, sent, metrics, final = jax.eval_shape(traced, held, shared, own, x, y, root)
    changes = jax.eval_shape(lambda reply: {name: one.value for name, one in wire.changes(reply).items()}, marked)
    return Reply(sent, changes, wire.unmarked_leaves(marked), wire.is_coded(marked), metrics, list(final))


def reply_bytes(
    local: Local, init_memory: Any, message: Tree, codec: wire.Codec | None, held: Tree, x: Tree, y: Array, root: Array
) -> int:
    """Bytes of one client's reply before there is one; a packet whose price depends on values counts as not encoded."""
    shared, own, _ = split_message(message)
    # A packet's price that follows from shapes is a number in this context, and stays a tracer otherwise.
    traced = one_client(local, init_memory, message, codec, jax.ensure_compile_time_eval)
    prices: list[int] = []

    def priced(*args: Any) -> None:
        for _, leaf in wire.named_leaves(traced(*args)[1]):
            known = wire.is_packet(leaf) and not isinstance(leaf.nbytes, jax.core.Tracer)
            prices.append(int(leaf.nbytes) if known else wire.array_bytes(wire.unwrap(leaf)))

    jax.eval_shape(priced, held, shared, own, x, y, root)
    return sum(prices)


def packets(reply: Tree) -> list[tuple[str, wire.Packet]]:
    """The named packets of a reply."""
    return [(name, leaf) for name, leaf in wire.named_leaves(reply) if wire.is_packet(leaf)]


def allow(average: Average, own: Reduce | None, reply: Reply, *, linked: bool) -> int:
    """Whether the average counts this exchange, 0 or 1; refuses what one that is no plain mean cannot honour, so that
    nothing is ignored.

    Args:
        own: the fold that the algorithm brings; None for the average.
        linked: replies go from peer to peer.

    Raises:
        ValueError: another fold, peers, or a reply with a part that is no change.
    """
    if average.plain or not jax.tree.leaves(reply.sent):
        return 0
    if linked or own is not None:
        what = "replies that go from peer to peer" if own is None or linked else f"the fold {_name(own)}"
        raise ValueError(
            f"Expected average={average.name!r} to fold all replies, but this algorithm brings {what}; choose dp=none, or "
            "an algorithm that leaves the fold to the run."
        )
    if reply.others:
        raise ValueError(
            f"Expected every part of a reply to be a change for average={average.name!r}, but {reply.others[0]!r} is not marked "
            "by wire.coded(..., change=True); mark it, or choose dp=none."
        )
    return 1


def _name(fold: Reduce) -> str:
    return fold.done.__qualname__.partition(".")[0]


def of_rows(batch: Batch, rows: int) -> Batch:
    """A batch's shapes with another number of rows."""

    def sized(leaf: Any) -> Any:
        return jax.ShapeDtypeStruct((rows, *leaf.shape[1:]), leaf.dtype)

    return batch._replace(x=jax.tree.map(sized, batch.x), y=sized(batch.y), mask=sized(batch.mask))
