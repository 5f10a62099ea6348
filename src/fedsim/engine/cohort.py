"""The clients of one round: the only channel of an algorithm to them, the bytes it used."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from fedsim import network, wire
from fedsim.core import Average, Info, Local, Peers, Reduce, Tree
from fedsim.engine import peers, processes, traffic
from fedsim.engine import plan as planning
from fedsim.engine.client_memory import Memory
from fedsim.engine.device_memory import all_fit
from fedsim.engine.downlink import copy_name, refuse_missing
from fedsim.engine.keys import key_for
from fedsim.engine.lanes import Lanes, Request
from fedsim.engine.messages import Outbox
from fedsim.engine.programs import Programs
from fedsim.engine.replies import allow, split_message
from fedsim.engine.state import Clock, Slots, State, named
from fedsim.engine.traffic import Exchanged
from fedsim.folds import plain
from fedsim.randomness import stream

MEAN = plain()


class Cohort:
    """M clients in round `round` (from 1); what an algorithm's `round` gets.

    Args:
        ids: (M,), -1 for nobody: no client, no slot, no bytes, no memory. A cohort may be empty.
        conditions: who is absent, drops out or is slow; default: everybody is there, reports, and takes no time.
        met: (N,) the last round before this one in which a client was in the cohort, 0 for never; None: nobody was.
        lr: the clients' learning rate in this round, `Client.lr`.
        average: the run's fold, and `averaging` its state.
        releases: exchanges that the average may fold where it is no plain mean; `Algorithm.releases`.
        stores: where codecs keep their state beside it; default: `memory`.
        copies: what all clients hold of earlier messages, where the codec of messages sends changes of it; by `copy_name`.
    """

    groups: Mapping[str, Cohort] = {}

    def __init__(
        self,
        engine: Lanes,
        ids: np.ndarray,
        round: int,
        memory: Memory,
        conditions: network.Conditions | None = None,
        met: np.ndarray | None = None,
        lr: float = 0.0,
        average: Average = MEAN,
        averaging: Tree = (),
        releases: int = 1,
        stores: Memory | None = None,
        copies: Mapping[str, wire.Copy] | None = None,
    ) -> None:
        self.engine, self.round, self.memory, self.lr = engine, round, memory, lr
        self.average, self.averaging, self.releases = average, averaging, releases
        self.ids = np.asarray(ids, np.int64)
        real = self.ids[self.ids != -1]
        wrong = real[(real < 0) | (real >= engine.population)].tolist()
        if self.ids.ndim != 1 or wrong or len(np.unique(real)) < len(real):
            raise ValueError(
                f"Expected the selected clients (M,) to be of 0 to {engine.population - 1}, each once, or -1 for nobody, got "
                f"{wrong[:5] or self.ids[:20].tolist()}; mend the algorithm's select."
            )
        self.places = np.flatnonzero(self.ids >= 0)  # (K,), of the members who are somebody
        self.sizes = np.zeros(len(self.ids), np.int64)
        self.sizes[self.places] = engine.offsets[real + 1] - engine.offsets[real]
        self.conditions = conditions or network.reliable(self.ids)
        self.present = self.conditions.present
        self.reports = self.present  # (M,) bool: still in the round; who does not report in an exchange is out of it
        self.last = np.zeros(len(self.ids), np.int64)
        if met is not None:
            self.last[self.places] = met[real]
        self.done: list[Exchanged] = []
        self.read: set[str] = set()  # options whose examples of the server the algorithm has read
        self.stores, self.copies = stores or memory, dict(copies or {})
        self.outbox, self.coded_up, self.averages = Outbox(), False, 0
        self._rows: tuple[np.ndarray, Tree] | None = None  # members by slot, and their memory on the devices

    @property
    def population(self) -> int:
        """Number of clients N."""
        return self.engine.population

    @property
    def public(self) -> Tree:
        """x (n, ...) of the examples that the server holds without labels, whole on every device; None for none."""
        self.read.add("public_share")
        return self.engine.public

    @property
    def shard(self) -> Any:
        """(x, y) of the examples that the server holds with labels, whole on every device; None for none."""
        self.read.add("server_share")
        return self.engine.shard

    def rng(self, purpose: str) -> np.random.Generator:
        """A generator on the host, of (seed, round, purpose)."""
        return stream(self.engine.seed, f"round {self.round} {purpose}")

    def fetch(self, tree: Tree) -> Tree:
        """Device values as NumPy, the same in every process."""
        return processes.fetch(tree)

    def exchange(
        self, message: Tree, local: Local, reduce: Reduce | None = None, args: Tree = (), link: Peers | None = None
    ) -> tuple[Tree, Info]:
        """Sends `message` to every client still in the round, runs `local` there, folds the replies.

        Args:
            message: a pytree; broadcast, or per client where marked by `wire.PerClient`; priced leaf by leaf.
            reduce: the algorithm's own fold; default: the run's average.
            args: handed to `reduce`; never leaves the server.
            link: replies go from peer to peer; the fold gets what each one hears, and no byte comes to the server.

        Returns:
            The fold's result and the exchange's `Info`, both on the device.

        Raises:
            ValueError: a fold or a reply that the run's average forbids, a graph that is none; see `messages.Outbox`.
        """
        engine, members = self.engine, len(self.ids)
        turn = sum(one.stream == local.passes.stream for one in self.done)
        # Half a millisecond of the host, which only a codec has a use for.
        key = engine.root
        if engine.down is not None or wire.brings(message):
            key = key_for(engine.root, named("down", engine.name(local)), self.round, turn)
        depart = partial(self._depart, copy_name(engine.name(local), turn), link is not None)
        decoded, down = self.outbox.sent(message, depart, key, members)
        averages = reduce is None
        if averages:
            reduce, args = self.average.reduce, self.average.args(self.averaging, members)
        args = engine.put(args)
        request = Request(local, reduce, averages, self.memory.init, decoded, args, link.into if link else None)
        reply = engine.reply(request)
        self.averages += allow(self.average, None if averages else reduce, reply, linked=link is not None)
        if self.averages > self.releases:
            raise ValueError(
                f"Expected average={self.average.name!r} to fold {self.releases} exchanges a round, the algorithm's `releases`, "
                f"not {self.averages}; name their number there."
            )
        self.coded_up |= reply.coded
        programs = engine.programs(request, members, self.sizes[self.places], self._labels)
        edges = peers.edges(link.graph, self.ids) if link else None
        outcome = self._outcome(down, request, edges)
        plan = self._plan(programs, local, outcome, turn)
        given = self._given(programs, plan, request, outcome, turn)
        state = self._trained(programs, plan, given)
        times = np.ones(plan.member.shape, np.int64)
        if edges is not None:
            state = peers.heard(engine, programs, plan, given, state, edges)
            times = np.append(edges.hearers(outcome.reports), 0)[np.minimum(plan.member, members)]
        result, info, seen = self._folded(programs, plan, state, args, request, turn)
        if averages:
            self.averaging = self.average.next(self.averaging, seen)
        self._keep(plan, state, programs, local, turn)
        replies = edges.hearers(outcome.reports) if edges is not None else outcome.reports
        plain = {n: wire.array_bytes(leaf) for n, leaf in wire.named_leaves(reply.sent) if not wire.is_packet(leaf)}
        self.done.append(
            Exchanged(
                request=request,
                down={name: int(each[self.reports].sum()) for name, each in down.items()},
                up={name: int(replies.sum()) * nbytes for name, nbytes in plain.items()},
                up_packets=state.nbytes,
                times=times,
                linked=edges is not None,
                once=int((replies > 0).sum()) * sum(plain.values()),
                outcome=outcome,
                steps=int(plan.length.max()),
                occupancy=plan.occupancy,
                examples=plan.examples,
                live=int(plan.live.sum()),
                info=info,
            )
        )
        self.reports = outcome.reports
        return result, info

    def _depart(self, name: str, linked: bool, nodes: list[Tree], key: Array) -> list[Tree]:
        """A message, node by node, as its receivers decode it; the copy of that name is renewed where the codec acts on changes."""
        downlink = self.engine.downlink
        if downlink.changes is None or not wire.is_coded(nodes):
            return downlink.depart(nodes, key)
        refuse_missing(len(self.places) == self.population and bool(self.reports.all()), linked)
        sent, self.copies[name] = downlink.renewed(nodes, key, self.copies.get(name))
        return sent

    def _plan(self, programs: Programs, local: Local, outcome: network.Outcome, turn: int) -> planning.Plan:
        """Who runs where, at which step, on which rows."""
        engine = self.engine
        return planning.make(
            self.ids[self.places],
            engine.rows,
            engine.offsets,
            local.passes,
            engine.seed,
            self.round,
            len(engine.devices),
            programs.lanes,
            exchange=turn,
            stream=engine.name(local),
            limit=outcome.steps[self.places],
            widths=programs.widths,
            members=len(self.ids),
            places=self.places,
            labels=self._labels,
        )

    def _labels(self, place: int) -> np.ndarray:
        """Labels of the client that stands there among those who are somebody."""
        id, engine = self.ids[self.places[place]], self.engine
        return engine.labels[engine.rows[engine.offsets[id] : engine.offsets[id + 1]]]

    def _given(
        self, programs: Programs, plan: planning.Plan, request: Request, outcome: network.Outcome, turn: int
    ) -> tuple[Any, ...]:
        """What the programs are given for the whole exchange, as `programs.Given` has it."""
        engine = self.engine
        slots = self._slots(plan, outcome, programs, request.local, turn)
        now: tuple[Any, ...] = np.int32(self.round), np.int32(turn), np.float32(self.lr)
        shared, own, _ = split_message(request.message)
        own = jax.tree.map(lambda a: self._by_slot(plan, jnp.asarray(a)), own)
        clock, shared = engine.put((Clock(*now), shared))
        return engine.held, shared, engine.split(own), slots, clock, engine.root, request.args

    def _trained(self, programs: Programs, plan: planning.Plan, given: tuple[Any, ...]) -> State:
        """The state of the lanes after the plan's last step: segment after segment, batches sent ahead of their use."""

        def trained() -> State:
            state: Any = None
            ends: list[Array] = []  # of each segment a number that the next one does not take away
            for start in range(0, plan.slot.shape[1], programs.steps):
                jax.block_until_ready(ends[-2:-1])  # so that batches of two segments at most lie on the devices
                x, y, at, trip = self._segment(plan, start, programs)  # while the devices run the one before
                if state is None:
                    state = programs.begin(*given, x, y, at)
                state = programs.segment(*given, state, x, y, at, trip)
                ends.append(jnp.copy(state.weight))
            return state

        return all_fit(trained)

    def _folded(
        self, programs: Programs, plan: planning.Plan, state: State, args: Tree, request: Request, turn: int
    ) -> tuple[Tree, Info, Tree]:
        """The fold over all devices, what the exchange says about itself, and what the average's state follows from."""
        engine = self.engine
        key = key_for(engine.root, named("reduce", engine.name(request.local)), self.round, turn)
        little = state._replace(carry=(), memory=(), coding=(), nbytes={})
        whole, member = engine.together((little, engine.split(plan.member)))
        return programs.end(whole, member, args, key)

    def _outcome(
        self, down: dict[str, np.ndarray], request: Request, edges: peers.Edges | None = None
    ) -> network.Outcome:
        """Who of those still in the round reports, and when: known before anything is trained."""
        members = len(self.ids)
        # Where nothing takes time, the size of a reply does not matter.
        up = self.engine.reply_bytes(request) if self.conditions.timed else 0
        sent = np.sum(list(down.values()) or [np.zeros(members)], axis=0)
        steps = np.zeros(members, np.int64)
        steps[self.places] = planning.steps_of(self.sizes[self.places], request.local.passes, self._labels)
        return network.outcome(
            self.conditions,
            self.reports,
            sent if edges is None else sent + up * edges.heard(self.reports),
            np.full(members, up) if edges is None else up * edges.hearers(self.reports),
            steps,
            self.conditions.deadline - sum(e.outcome.seconds for e in self.done),
        )

    def settle(self) -> None:
        """Ends the round: what clients keep goes to the host.

        Raises:
            ValueError: a codec of the run found nothing to act on, so that it would have been ignored.
        """
        self.memory.settle()
        for option, codec, used in (
            ("codec_up", self.engine.up, self.coded_up),
            ("codec_down", self.engine.down, self.outbox.coded),
        ):
            if codec is not None and self.done and not used:
                raise ValueError(
                    f"Expected the algorithm to mark by wire.coded what {option}={codec.name!r} acts on; it marks nothing: "
                    f"choose {option}=none, or mark it."
                )

    def traffic(self) -> tuple[dict[str, int], dict[str, int]]:
        """Bytes (down, up) of the round so far, all clients together, by leaf; Python integers."""
        return traffic.traffic(self.done, self.fetch)

    def outcomes(self) -> list[network.Outcome]:
        """Who reported in each exchange, and when."""
        return [one.outcome for one in self.done]

    def peers(self) -> dict[str, int] | None:
        """What went from peer to peer in the round so far; None for nothing."""
        return traffic.between_peers(self.done, self.fetch)

    def flops(self) -> float:
        """FLOPs of the clients' steps in the round so far."""
        return traffic.flops(self.done, self.engine)

    def _slots(
        self, plan: planning.Plan, outcome: network.Outcome, programs: Programs, local: Local, turn: int
    ) -> Slots:
        def by_slot(each: np.ndarray) -> np.ndarray:  # an unused slot is nobody's
            return np.append(each, np.zeros(1, each.dtype))[plan.member]

        ids = np.append(self.ids, -1)[plan.member]
        if self._rows is not None and np.array_equal(self._rows[0], plan.member):
            memory, seen = self._rows[1], np.ones(plan.member.shape, bool)  # as the exchange before has left it
        else:
            memory, seen = self.memory.gather(ids)
        store = self._coding(programs, local, turn)
        coding, coding_seen = store.gather(ids) if store else ((), ())
        now = ids.astype(np.int32), by_slot(self.sizes).astype(np.int32), by_slot(outcome.steps).astype(np.int32)
        host = (*now, plan.member, by_slot(outcome.reports), seen, memory, coding_seen, coding)
        return Slots(*self.engine.split(host))

    def _coding(self, programs: Programs, local: Local, turn: int) -> Memory | None:
        """Where clients keep the codec's state for exchanges like this one."""
        engine, codec = self.engine, self.engine.up
        if codec is None or not jax.tree.leaves(engine.coding_shapes(programs.reply)):
            return None
        changes = programs.reply.changes
        name = "-".join(filter(None, ("codec", engine.name(local).replace("/", "-"), str(turn))))
        return self.stores.store(name, lambda key, held: codec.init(key, changes), ())

    def _by_slot(self, plan: planning.Plan, leaf: Any) -> Any:
        return leaf[np.minimum(plan.member, max(len(self.ids) - 1, 0))]

    def _segment(
        self, plan: planning.Plan, start: int, programs: Programs
    ) -> tuple[Tree, Array, dict[str, Array], Array]:
        """The batches and plan of a segment from step `start` on the devices, padded to its length."""
        engine, steps = self.engine, programs.steps

        def cut(a: np.ndarray, fill: int = 0) -> np.ndarray:
            part = a[:, start : start + steps]
            return np.pad(part, [(0, 0), (0, steps - part.shape[1])] + [(0, 0)] * (a.ndim - 2), constant_values=fill)

        at = {name: cut(getattr(plan, name)) for name in ("step", "first", "last")}
        at["slot"] = cut(plan.slot, plan.member.shape[1])
        at["width"] = np.searchsorted(programs.widths, cut(plan.width)).astype(np.int32)  # which of the widths
        rows = plan.segment(start, steps)
        at["count"] = cut(plan.count)
        if plan.holes:
            at |= {"live": cut(plan.live), "mask": rows >= 0}
        trip = np.clip(plan.length - start, 0, steps).astype(np.int32)
        at, trip = engine.split((at, trip))
        x, y = engine.gather(np.maximum(rows, 0))
        return x, y, at, trip

    def _keep(self, plan: planning.Plan, state: State, programs: Programs, local: Local, turn: int) -> None:
        """Has what clients keep written to the host: at the round's end, or when another exchange needs it elsewhere."""
        used = plan.member < len(self.ids)
        ids = self.ids[plan.member[used]]

        def bring(store: Memory, rows: Tree) -> None:
            store.scatter(ids, jax.tree.map(lambda r: r[used], self.fetch(rows)))

        store = self._coding(programs, local, turn)
        if store:
            bring(store, state.coding)
        if self.memory.empty:
            return
        self._rows = plan.member, state.memory
        self.memory.later(lambda: bring(self.memory, state.memory))
