"""What an algorithm's round sends, from shapes: the round is traced and not run, and each message of it is priced.

A `Sketch` stands where a cohort does. Its clients start and finish and take no step between; what comes of steps, like all
parameters and keys, is unknown. A price that depends on nothing unknown is computed at the end, so that ranks, masks and
what earlier rounds have stacked are exact; one that depends on values is a bound. Nothing of a model's size is made.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.extend import core

from fedsim import wire
from fedsim.core import Average, Batch, Client, Info, Local, Passes, Peers, Reduce, Tree
from fedsim.engine import peers
from fedsim.engine.downlink import Downlink, copy_name, refuse_missing
from fedsim.engine.groups import refused
from fedsim.engine.keys import key_for
from fedsim.engine.messages import Outbox
from fedsim.engine.replies import Reply, allow, of_rows, split_message
from fedsim.randomness import stream

CALLS = ("jit", "pjit", "closed_call", "core_call", "checkpoint", "remat2", "custom_jvp_call", "custom_vjp_call")


class Unknown(NamedTuple):
    """What nothing is known of but shapes: arguments of the traced program."""

    held: Tree
    start: Tree  # the trained part before the first round
    key: Any
    number: Any  # (), float32


class Price(NamedTuple):
    """What one leaf costs each member, () or (M,): found in a traced program, which may not know it."""

    exact: Any
    bounds: tuple[tuple[Any, ...], ...] = ()  # sums that it is at most, the best first; the last one is known


class Sending(NamedTuple):
    """One exchange of M members."""

    down: dict[str, Price]
    up: dict[str, Price]
    sparse: dict[
        str, dict[str, int]
    ]  # by way: leaves of which a codec leaves entries out -> bytes of what it leaves in
    reads: np.ndarray  # (M,), bool: who gets the message
    times: np.ndarray  # (M,), int64: how often each reply travels


class Sends(NamedTuple):
    """What a round sends, by member: bytes."""

    down: dict[str, np.ndarray]  # leaf -> (M,), int64
    up: dict[str, np.ndarray]  # every time that a reply travels
    total_down: np.ndarray  # (M,), int64
    total_up: np.ndarray  # less than the sum of bounds, where a codec sends a share of all leaves together
    bounded: dict[str, list[str]]  # "down", "up" -> leaves whose prices depend on values, so that they are bounds
    guessed: bool  # the algorithm was shown numbers that only a run has; what it sends may follow from them


class Setting(NamedTuple):
    """What clients and messages of a round have to do with beside the algorithm."""

    ids: np.ndarray  # (M,), int64; -1 for nobody
    sizes: np.ndarray  # (M,), int64: examples
    population: int
    batch: Batch  # a client's first, as shapes
    average: Average
    up: wire.Codec | None
    down: wire.Codec | None
    seed: int
    public: int | None = None  # examples that the server holds without labels, and with; None: unknown
    shard: int | None = None


class AnyMetric(dict[str, Array]):
    """Metrics of steps that nobody takes: whichever is asked for is there."""

    def __init__(self, value: Array) -> None:
        self.value = value

    def __missing__(self, name: str) -> Array:
        return self.value


class Sketch:
    """A cohort of which ids and sizes are known; stands for `cohort.Cohort` in a program that is traced and not run.

    Args:
        memory: (M, ...) what the clients keep.
        last: (M,) the round before this one in which each was there, 0 for never.
        copies: what all clients hold of the messages before.
    """

    def __init__(
        self,
        given: Unknown,
        setting: Setting,
        round: int,
        memory: Tree,
        averaging: Tree,
        last: np.ndarray,
        copies: Mapping[str, wire.Copy] = MappingProxyType({}),
    ) -> None:
        self.given, self.setting, self.round = given, setting, round
        self.memory, self.averaging, self.last = memory, averaging, last
        self.ids, self.sizes, self.population = setting.ids, setting.sizes, setting.population
        self.present = self.reports = setting.ids >= 0
        self.done: list[Sending] = []
        self.guessed = False
        self.unknowns: dict[Any, Array] = {}  # by shape and dtype
        self.outbox, self.turns = Outbox(wire.part_bytes), Counter[str]()
        self.downlink, self.copies = Downlink(setting.down), dict(copies)

    @property
    def public(self) -> Tree:
        """As of a cohort."""
        return self._held(self.setting.public, self.setting.batch.x)

    @property
    def shard(self) -> Any:
        """As of a cohort."""
        return self._held(self.setting.shard, (self.setting.batch.x, self.setting.batch.y))

    def _held(self, rows: int | None, batch: Tree) -> Tree:
        """So many examples of the server's; where their number is unknown, as many as in a batch, and a guess."""
        if rows == 0:
            return None
        self.guessed |= rows is None
        shape = lambda leaf: jax.ShapeDtypeStruct((rows or leaf.shape[0], *leaf.shape[1:]), leaf.dtype)  # noqa: E731 - one expression, named
        return jax.tree.map(lambda leaf: self.unknown(shape(leaf)), batch)

    def rng(self, purpose: str) -> np.random.Generator:
        """As of a cohort."""
        return stream(self.setting.seed, f"round {self.round} {purpose}")

    def fetch(self, tree: Tree) -> Tree:
        """Ones in place of numbers that only a run has."""

        def value(leaf: Any) -> Any:
            if not isinstance(leaf, jax.core.Tracer):
                return np.asarray(leaf)
            self.guessed = True
            return np.ones(leaf.shape, leaf.dtype)

        return jax.tree.map(value, tree)

    def exchange(
        self, message: Tree, local: Local, reduce: Reduce | None = None, args: Tree = (), link: Peers | None = None
    ) -> tuple[Tree, Info]:
        """As of a cohort: a result of the right shapes. What is sent is noted in `done`."""
        members, turn = len(self.ids), self.turns[local.passes.stream]
        self.turns[local.passes.stream] += 1
        key = key_for(self.given.key, f"down {local.passes.stream}", self.round, turn)
        if self.downlink.changes is not None and wire.is_coded(message):
            refuse_missing(members == self.population and bool(self.reports.all()), link is not None)
        decoded, down, less = self._sent(message, key, copy_name(local.passes.stream, turn))
        average, averages = self.setting.average, reduce is None
        if reduce is None:
            reduce, args = average.reduce, average.args(self.averaging, members)
        values, weights, up, sparse = self._replies(local, decoded, reduce, turn, averages, link is not None)
        times = self.reports.astype(np.int64)
        if link is not None:
            times = peers.edges(link.graph, self.ids).hearers(self.reports)
            values = jax.tree.map(self.unknown, values)  # mixed
            self.memory = jax.vmap(link.into)(self.memory, values, self._clients(local.passes))
        self.done.append(Sending(down, up, {"down": less, "up": sparse}, self.reports, times))
        total = reduce.zero(jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype), values), members)
        total = reduce.add(total, values, weights, jnp.arange(members), args)
        result: Any = reduce.done(total, args, key_for(self.given.key, "reduce", self.round, turn))
        weight = weights.sum()
        if averages:
            self.averaging = average.next(self.averaging, result.seen)
            result, weight = result.value, result.weight
        each, reported = jnp.broadcast_to(self.given.number, members), jnp.asarray(self.reports.sum(), jnp.int32)
        return result, Info(AnyMetric(self.given.number), AnyMetric(each), weight, reported, jnp.zeros((), jnp.int32))

    def unknown(self, leaf: Any) -> Array:
        """Something of that shape and type of which nothing is known."""
        kind = leaf.shape, leaf.dtype
        if kind not in self.unknowns:
            is_key = jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
            some = self.given.key if is_key else self.given.number.astype(leaf.dtype)
            self.unknowns[kind] = jnp.broadcast_to(some, leaf.shape)
        return self.unknowns[kind]

    def _sent(self, message: Tree, key: Array, name: str) -> tuple[Tree, dict[str, Price], dict[str, int]]:
        """The message as its receivers decode it, what it costs each, and `Sending.sparse` of it.

        Args:
            name: of the copy that all hold of it, where what has changed is sent.
        """
        members, news, codec = len(self.ids), wire.news(message), self.downlink.changes
        differs = codec is not None and wire.is_coded(news)

        def depart(message: Any, key: Array) -> Any:
            if not differs:
                return wire.depart(self.downlink.values, message, key)
            sent, self.copies[name] = self.downlink.renewed(message, key, self.copies.get(name))
            return sent

        decoded, exact = self.outbox.sent(message, depart, key, members)
        if not any(isinstance(each, jax.core.Tracer) for each in exact.values()):
            return decoded, {name: Price(each) for name, each in exact.items()}, {}
        plain = wire.part_bytes(wire.unwrap(wire.unmarked(news)), members)
        if not differs:
            whole = wire.part_bytes(depart(wire.whole(news), key), members)
            return decoded, {name: Price(each, ((whole[name],), (plain[name],))) for name, each in exact.items()}, {}
        most = wire.most(wire.as_changes(news), codec, key, key)
        bounds = {each: ((most.entries[each], side), (most.entries[each],)) for each, side in most.side.items()}
        return decoded, {n: Price(each, bounds.get(n, ((plain[n],),))) for n, each in exact.items()}, most.sparse

    def _clients(self, passes: Passes) -> Client:
        """The members, (M,) each."""
        members, sizes, given = len(self.ids), self.sizes, passes.steps
        steps = -(-sizes // passes.batch_size) * passes.epochs if given is None else np.full(members, 1)
        if isinstance(given, int):
            steps = np.where(sizes > 0, given, 0)
        numbers = (np.where(self.reports, self.ids, 0), sizes, np.full(members, self.round), steps)
        ids, n, round, steps = (jnp.asarray(each, jnp.int32) for each in numbers)
        keys, lr = (jnp.broadcast_to(one, members) for one in (self.given.key, self.given.number))
        return Client(ids, n, self.memory, keys, round, lr, steps)

    def _replies(
        self, local: Local, message: Tree, reduce: Reduce, turn: int, averages: bool, linked: bool
    ) -> tuple[Tree, Array, dict[str, Price], dict[str, int]]:
        """Replies (M, ...) as the server decodes them, their weights (M,), their prices, and `Sending.sparse`."""
        shared, own, (treedef, apart) = split_message(message)
        held, root, codec = self.given.held, self.given.key, self.setting.up
        common = key_for(root, "codec", self.round, turn)
        noted: list[wire.Most] = []
        batch = of_rows(self.setting.batch, local.passes.batch_size)

        def one(own: list[Any], client: Client) -> Any:
            nodes = [o if differs else s for s, o, differs in zip(shared, own, apart, strict=True)]
            msg = treedef.unflatten(nodes)
            carry = jax.tree.map(self.unknown, jax.eval_shape(local.start, held, msg, client, batch))
            marked, memory, final = local.finish(held, msg, carry, client)
            changes = {name: sent.value for name, sent in wire.changes(marked).items()}
            state = codec.init(root, changes) if codec and changes else ()
            reply, _ = wire.arrive(marked, codec, client.key, common, state)
            said = Reply(reply, changes, wire.unmarked_leaves(marked), wire.is_coded(marked), {}, list(final))
            allow(self.setting.average, None if averages else reduce, said, linked=linked)
            most = wire.most(marked, codec, client.key, common, state)
            noted.append(most)
            values = wire.unwrap(reply)
            if local.sent is not None:
                memory = local.sent(memory, values, client)
            beside = {name: jnp.asarray(each, jnp.uint32) for name, each in most.side.items()}
            return reply, memory, reduce.weight(client, values), beside

        reply, self.memory, weights, beside = jax.vmap(one)(own, self._clients(local.passes))
        most, up = noted[0], {}
        for name, leaf in wire.named_leaves(reply):
            if wire.is_packet(leaf):
                up[name] = Price(leaf.nbytes, ((most.entries[name], beside.get(name, 0)), (most.entries[name],)))
            else:
                up[name] = Price(wire.array_bytes(leaf) // len(self.ids))
        return wire.unwrap(reply), jnp.where(self.reports, weights, 0.0), up, most.sparse


class GroupedSketch:
    """A cohort of several groups, as `groups.GroupedCohort`, of sketches.

    Args:
        held: frozen parts by name, of a model that the server alone has too.
        groups: name -> the group's sketch.
    """

    def __init__(self, held: Mapping[str, Tree], round: int, groups: Mapping[str, Sketch]) -> None:
        self.held, self.round, self.groups = held, round, groups
        self.one = next(iter(groups.values()))  # which answers for what all share
        self.population, self.rng, self.fetch = self.one.population, self.one.rng, self.one.fetch
        self.ids, self.sizes, self.last, self.present, self.reports = (
            np.concatenate([getattr(sketch, name) for sketch in groups.values()])
            for name in ("ids", "sizes", "last", "present", "reports")
        )

    @property
    def public(self) -> dict[str, Tree] | None:
        """As of a grouped cohort."""
        x = self.one.public
        return None if x is None else dict.fromkeys(self.held, x)

    @property
    def shard(self) -> dict[str, Any] | None:
        """As of a grouped cohort."""
        pair = self.one.shard
        return None if pair is None else dict.fromkeys(self.held, pair)

    def exchange(self, *args: Any, **options: Any) -> Any:
        """Refused, as of a grouped cohort."""
        raise refused(self.groups)


def sends(rounds: Callable[[Unknown], dict[str, Sketch]], shapes: Unknown) -> Sends:
    """What the last of some rounds sends; nothing is run. Of groups, leaves are called GROUP/LEAF, and members are in a row.

    Args:
        rounds: what the algorithm does, up to and with that round, traced once; gives the sketches by group, "" for one.
    """
    found: list[Any] = []

    def traced(given: Unknown) -> list[Array]:
        sketches = rounds(given)
        found[:] = jax.tree.flatten([(name, s.done, s.guessed, len(s.ids)) for name, s in sketches.items()])
        return [leaf for leaf in found[0] if isinstance(leaf, jax.core.Tracer)]

    known = iter(evaluated(jax.make_jaxpr(traced)(shapes)))
    leaves = [next(known) if isinstance(leaf, jax.core.Tracer) else leaf for leaf in found[0]]
    each = {name: added_up(*sent) for name, *sent in jax.tree.unflatten(found[1], leaves)}
    return each.get("") or side_by_side(each)


def side_by_side(groups: Mapping[str, Sends]) -> Sends:
    """What several groups send, members in a row: leaves of the others are nothing to them."""
    ends = np.cumsum([len(sent.total_up) for sent in groups.values()])
    ways: dict[str, dict[str, np.ndarray]] = {"down": {}, "up": {}}
    bounded: dict[str, list[str]] = {"down": [], "up": []}
    for end, (group, sent) in zip(ends, groups.items(), strict=True):
        for way, leaves in (("down", sent.down), ("up", sent.up)):
            for name, each in leaves.items():
                ways[way][f"{group}/{name}"] = np.pad(each, (end - len(each), ends[-1] - end))
            bounded[way] += [f"{group}/{name}" for name in sent.bounded[way]]
    down, up = (np.concatenate([getattr(s, f"total_{way}") for s in groups.values()]) for way in ("down", "up"))
    return Sends(ways["down"], ways["up"], down, up, bounded, any(sent.guessed for sent in groups.values()))


def added_up(done: Sequence[Sending], guessed: bool, members: int) -> Sends:
    """The exchanges of a round together; prices that stayed unknown are None."""
    nothing = np.zeros(members, np.int64)
    found: dict[str, dict[str, np.ndarray]] = {"down": {}, "up": {}}
    bounded: dict[str, list[str]] = {"down": [], "up": []}
    saved = {"down": nothing, "up": nothing}
    for one in done:
        for way, prices, times in (("down", one.down, one.reads), ("up", one.up, one.times)):
            for name, price in prices.items():
                found[way][name] = found[way].get(name, nothing) + known_bytes(price) * times
                bounded[way] += [name] if price.exact is None else []
            at_most = {name: price.bounds[0] for name, price in prices.items() if price.exact is None}
            thinned = [parts[0] for name, parts in at_most.items() if name in one.sparse[way]]
            if thinned:
                saved[way] = saved[way] + max(sum(thinned) - max(one.sparse[way].values()), 0) * times
    down, up = (sum(found[way].values(), nothing) - saved[way] for way in ("down", "up"))
    return Sends(found["down"], found["up"], down, up, bounded, guessed)


def known_bytes(price: Price) -> np.ndarray:
    """The exact price, or the best bound that is known, () or (M,) int64."""
    sums = ((price.exact,), *price.bounds)
    found = next(parts for parts in sums if all(part is not None for part in parts))
    return np.asarray(sum(np.asarray(part).astype(np.int64) for part in found))


def evaluated(program: core.ClosedJaxpr) -> list[np.ndarray | None]:
    """The program's results as far as they depend on none of its arguments; None for the others. Compiles what they take."""
    found: list[Any] = []

    def known() -> list[Array]:
        found[:] = known_results(program.jaxpr, program.consts, [None] * len(program.jaxpr.invars))
        return [value for value in found if value is not None]

    values = iter(jax.device_get(jax.jit(known)())) if program.jaxpr.outvars else iter(())
    return [None if value is None else next(values) for value in found]


def known_results(jaxpr: core.Jaxpr, consts: Sequence[Any], args: Sequence[Any]) -> list[Any]:
    """The results of a program of which some arguments are None, unknown: None where they depend on one of those."""
    values: dict[Any, Any] = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *args), strict=True))

    def read(variable: Any) -> Any:
        return variable.val if isinstance(variable, core.Literal) else values[variable]

    for eqn in jaxpr.eqns:
        ins = [read(variable) for variable in eqn.invars]
        inner = next((eqn.params[name] for name in ("jaxpr", "call_jaxpr") if name in eqn.params), None)
        if eqn.primitive.name in CALLS and inner is not None:
            whole = inner if isinstance(inner, core.ClosedJaxpr) else core.ClosedJaxpr(inner, ())
            outs = known_results(whole.jaxpr, whole.consts, ins)
        elif any(value is None for value in ins):
            outs = [None] * len(eqn.outvars)
        else:
            out = eqn.primitive.bind(*ins, **eqn.params)
            outs = out if eqn.primitive.multiple_results else [out]
        values |= dict(zip(eqn.outvars, outs, strict=True))
    return [read(variable) for variable in jaxpr.outvars]
