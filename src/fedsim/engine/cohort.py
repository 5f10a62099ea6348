"""The clients of one round: the only channel of an algorithm to them, the bytes it used."""

from __future__ import annotations

from collections import Counter
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from fedsim import network, wire
from fedsim.core import Info, Local, Reduce, Tree, mean
from fedsim.engine import plan as planning
from fedsim.engine import processes
from fedsim.engine.client_memory import Memory
from fedsim.engine.device_memory import all_fit
from fedsim.engine.keys import key_for
from fedsim.engine.lanes import Lanes
from fedsim.engine.programs import Clock, Programs, Slots, State
from fedsim.engine.replies import split_message
from fedsim.wire import message_bytes


class Exchanged(NamedTuple):
    """What the record needs of one exchange; device values until `Cohort.traffic` is asked."""

    down: dict[str, int]  # bytes, all clients together, by leaf
    up: dict[str, int]
    up_packets: dict[str, Array]  # (D, S) each, uint32: packets' prices, by client; 0 where none replied
    outcome: network.Outcome  # who reported, and when
    steps: int  # of the plan
    occupancy: tuple[float, float]  # of lanes, of rows computed
    examples: int
    info: Info


class Cohort:
    """M clients in round `round` (from 1); what an algorithm's `round` gets.

    Args:
        conditions: who is absent, drops out or is slow; default: everybody is there, reports, and takes no time.
        met: (N,) the last round before this one in which a client was in the cohort, 0 for never; None: nobody was.
        lr: the clients' learning rate in this round, `Client.lr`.
    """

    def __init__(
        self,
        engine: Lanes,
        ids: np.ndarray,
        round: int,
        memory: Memory,
        conditions: network.Conditions | None = None,
        met: np.ndarray | None = None,
        lr: float = 0.0,
    ) -> None:
        self.engine, self.round, self.memory, self.lr = engine, round, memory, lr
        self.ids = np.asarray(ids, np.int64)
        wrong = self.ids[(self.ids < 0) | (self.ids >= engine.population)].tolist()
        if wrong or len(self.ids) == 0 or len(np.unique(self.ids)) < len(self.ids):
            raise ValueError(
                f"Expected the selected clients to be at least one, each once, of 0 to {engine.population - 1}, got "
                f"{wrong[:5] or self.ids[:20].tolist()}; mend the algorithm's select."
            )
        self.sizes = np.asarray(engine.offsets[self.ids + 1] - engine.offsets[self.ids], np.int64)
        self.conditions = conditions or network.reliable(len(self.ids))
        self.present = self.conditions.present
        self.reports = (
            self.present
        )  # (M,) bool: still in the round; whoever does not report in an exchange is out of it
        self.last = np.zeros(len(self.ids), np.int64) if met is None else met[self.ids].astype(np.int64)
        self.done: list[Exchanged] = []

    def fetch(self, tree: Tree) -> Tree:
        """Device values as NumPy, the same in every process."""
        return processes.fetch(tree)

    def exchange(self, message: Tree, local: Local, reduce: Reduce | None = None, args: Tree = ()) -> tuple[Tree, Info]:
        """Sends `message` to every client still in the round, runs `local` there, folds the replies (default: mean by examples).

        Args:
            message: a pytree; broadcast, or per client where marked by `wire.PerClient`; priced leaf by leaf.
            args: handed to `reduce.done`; never leaves the server.

        Returns:
            The fold's result and the exchange's `Info`, both on the device.
        """
        reduce = reduce or MEAN
        self._check_rows(message)
        programs = self.engine.programs(local, reduce, self.memory.init, message, self.sizes)
        down = message_bytes(message, len(self.ids))
        turn = self._outcome(down, local, message)
        plan = self._plan(programs, local, turn)
        state = self._trained(programs, plan, message, turn.reports)
        result, info = self._folded(programs, plan, state, args)
        self._keep(plan, state.memory)
        up = {
            name: int(turn.reports.sum()) * wire.array_bytes(leaf)
            for name, leaf in wire.named_leaves(programs.reply)
            if not wire.is_packet(leaf)
        }
        done = Exchanged(
            down={name: int(each[self.reports].sum()) for name, each in down.items()},
            up=up,
            up_packets=state.nbytes,
            outcome=turn,
            steps=int(plan.length.max()),
            occupancy=plan.occupancy,
            examples=int(plan.count.sum()),
            info=info,
        )
        self.done.append(done)
        self.reports = turn.reports
        return result, info

    def _check_rows(self, message: Tree) -> None:
        """Raises `ValueError` unless every per-client part of the message has a row for each member."""
        members = len(self.ids)
        for name, node in wire.parts(message):
            own = node.tree if isinstance(node, wire.PerClient) else ()
            if wire.is_packet(node) and np.ndim(node.nbytes):
                own = node.nbytes
            rows = {leaf.shape[0] for leaf in jax.tree.leaves(own)} or {members}
            if rows != {members}:
                raise ValueError(
                    f"Expected the leading axis of per-client part {name!r} to be {members}, the cohort, not {rows}; "
                    "order it like cohort.ids."
                )

    def _plan(self, programs: Programs, local: Local, turn: network.Outcome) -> planning.Plan:
        """Who runs where, at which step, on which rows."""
        engine = self.engine
        return planning.make(
            self.ids,
            engine.rows,
            engine.offsets,
            local.passes,
            engine.seed,
            self.round,
            len(engine.devices),
            programs.lanes,
            exchange=len(self.done),
            limit=turn.steps,
            widths=programs.widths,
        )

    def _trained(self, programs: Programs, plan: planning.Plan, message: Tree, reports: np.ndarray) -> State:
        """The state of the lanes after the plan's last step: segment after segment, batches sent ahead of their use."""
        engine = self.engine
        slots = self._slots(plan, reports)
        now: tuple[Any, ...] = np.int32(self.round), np.int32(len(self.done)), np.float32(self.lr)
        clock = engine.put(Clock(*now))
        shared, own, _ = split_message(message)
        shared = engine.put(shared)
        own = engine.split(jax.tree.map(lambda a: self._by_slot(plan, jnp.asarray(a)), own))
        given = (engine.held, shared, own, slots, clock, engine.root)

        def trained() -> State:
            state: Any = None
            ends: list[Array] = []  # of each segment a number that the next one does not take away
            for start in range(0, plan.rows.shape[1], programs.steps):
                jax.block_until_ready(ends[-2:-1])  # so that batches of two segments at most lie on the devices
                x, y, at, trip = self._segment(plan, start, programs)  # while the devices run the one before
                if state is None:
                    state = programs.begin(*given, x, y, at)
                state = programs.segment(*given, state, x, y, at, trip)
                ends.append(jnp.copy(state.weight))
            return state

        return all_fit(trained)

    def _folded(self, programs: Programs, plan: planning.Plan, state: State, args: Tree) -> tuple[Tree, Info]:
        """The fold over all devices, and what the exchange says about itself."""
        engine = self.engine
        key = key_for(engine.root, "reduce", self.round, len(self.done))
        whole, member = engine.together((state._replace(carry=(), memory=(), nbytes={}), engine.split(plan.member)))
        return programs.end(whole, member, engine.put(args), key)

    def _outcome(self, down: dict[str, np.ndarray], local: Local, message: Tree) -> network.Outcome:
        """Who of those still in the round reports, and when: known before anything is trained."""
        members = len(self.ids)
        # Where nothing takes time, the size of a reply does not matter.
        up = self.engine.reply_bytes(local, self.memory.init, message) if self.conditions.timed else 0
        return network.outcome(
            self.conditions,
            self.reports,
            np.sum(list(down.values()) or [np.zeros(members)], axis=0),
            np.full(members, up),
            planning.steps_of(self.sizes, local.passes),
            self.conditions.deadline - sum(e.outcome.seconds for e in self.done),
        )

    def traffic(self) -> tuple[dict[str, int], dict[str, int]]:
        """Bytes (down, up) of the round so far, all clients together, by leaf; Python integers."""
        down: Counter[str] = Counter()
        up: Counter[str] = Counter()
        for one in self.done:
            down.update(one.down)
            up.update(one.up)
            up.update({n: int(np.sum(v, dtype=np.uint64)) for n, v in self.fetch(one.up_packets).items()})
        return dict(down), dict(up)

    def _slots(self, plan: planning.Plan, reports: np.ndarray) -> Slots:
        used = plan.member < len(self.ids)
        place = np.minimum(plan.member, max(len(self.ids) - 1, 0))
        stored, seen = self.memory.gather(self.ids[place])  # an unused slot shows the last client's, and drops it
        host = (
            self.ids[place].astype(np.int32),
            np.where(used, self.sizes[place], 0).astype(np.int32),
            plan.member,
            used & reports[place],
            seen,
            stored,
        )
        return Slots(*self.engine.split(host))

    def _by_slot(self, plan: planning.Plan, leaf: Any) -> Any:
        return leaf[np.minimum(plan.member, len(self.ids) - 1)]

    def _segment(
        self, plan: planning.Plan, start: int, programs: Programs
    ) -> tuple[Tree, Array, dict[str, Array], Array]:
        """The batches and plan of a segment from step `start` on the devices, padded to its length."""
        engine, steps = self.engine, programs.steps

        def cut(a: np.ndarray, fill: int = 0) -> np.ndarray:
            part = a[:, start : start + steps]
            return np.pad(part, [(0, 0), (0, steps - part.shape[1])] + [(0, 0)] * (a.ndim - 2), constant_values=fill)

        at = {name: cut(getattr(plan, name)) for name in ("count", "step", "first", "last")}
        at["slot"] = cut(plan.slot, plan.member.shape[1])
        at["width"] = np.searchsorted(programs.widths, cut(plan.width)).astype(np.int32)  # which of the widths
        trip = np.clip(plan.length - start, 0, steps).astype(np.int32)
        at, trip = engine.split((at, trip))
        x, y = engine.gather(cut(plan.rows))
        return x, y, at, trip

    def _keep(self, plan: planning.Plan, rows: Tree) -> None:
        if self.memory.empty:
            return
        used = plan.member < len(self.ids)
        self.memory.scatter(self.ids[plan.member[used]], jax.tree.map(lambda r: r[used], self.fetch(rows)))


MEAN = mean()
