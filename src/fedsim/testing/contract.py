"""The contract tests as functions: for the project's own algorithms and for users' (`fedsim check my.py:fed_mine`).

They run on a tiny task, softmax regression over a frozen linear map - with LoRA on that map where the algorithm needs
one - and with clients of very different sizes, one of them without examples. Every check raises `AssertionError` with
what differs.
"""

from __future__ import annotations

import copy
import functools
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fedsim import algorithms, wire
from fedsim.core import Population, Tree
from fedsim.engine.client_memory import Memory
from fedsim.engine.cohort import Cohort
from fedsim.engine.keys import key_for
from fedsim.engine.lanes import Lanes
from fedsim.engine.messages import Outbox
from fedsim.engine.peers import edges
from fedsim.engine.state import named
from fedsim.folds import plain
from fedsim.record.checkpoint import Checkpoints
from fedsim.testing.packing import clipped, packed, packed_for_all
from fedsim.testing.tasks import CLASSES, Make, suited
from fedsim.testing.toys import (
    COHORT,
    SIZES,
    Bench,
    Sent,
    bench,
    channel,
    coding,
    one_client,
    rounds,
    run,
    tiny_problem,
)

SECOND = (3, 11, 10, 6, 5, 8)  # another cohort of the same size
FEW = (7, 2, 9)
EMPTY = 3  # has no examples


class Trial:
    """One algorithm on the tiny task: its engines and compiled programs, shared by all checks."""

    def __init__(self, make: Make) -> None:
        self.make, self.problem, self.task = make, tiny_problem(), suited(make)
        self.algorithm, self.average = make(self.task), plain(self.task.weight)
        self.benches: dict[tuple[tuple[str, Any], ...], Bench] = {}

    def bench(self, **options: Any) -> Bench:
        """Engines with these options, made once."""
        key = tuple(sorted(options.items()))
        if key not in self.benches:
            self.benches[key] = bench(self.problem, self.task, **options)
        return self.benches[key]

    def run(self, cohorts: tuple[tuple[int, ...], ...] = (COHORT,), *, state: Any = None, first: int = 1, met: Any = None,
            sent: Any = None, **options: Any) -> tuple[Tree, Memory, list[Cohort]]:  # fmt: skip
        """As `toys.run`, with what was compiled before."""
        return rounds(self.bench(**options), self.algorithm, self.average, cohorts, state, first, met, sent)


trial = functools.lru_cache(maxsize=2)(Trial)

# --- the contract


def check_structure(make: Make) -> None:
    """Three rounds keep structure, shapes and dtypes of the server's state; after round one nothing compiles."""
    t = trial(make)
    lanes, algorithm = t.bench().whole, t.algorithm
    server = lanes.put(algorithm.init(key_for(lanes.root, "init"), lanes.held))
    before = jax.tree.map(lambda a: (a.shape, a.dtype), server)
    memory, averaging = t.bench().memory(algorithm), t.bench().averaging(t.average)
    compiled: list[str] = []

    def note(event: str, duration_secs: float, **_: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(note)
    for round, ids in enumerate((COHORT, SECOND, (0, 1, 2, 3, 4, 5)), 1):
        cohort = t.bench().cohort(ids, round, memory, algorithm, averaging, average=t.average)
        server, metrics = algorithm.round(key_for(lanes.root, "server", round), lanes.held, server, cohort)
        cohort.fetch((server, metrics))
        cohort.settle()
        cohort.traffic()
        if round > 1:
            assert not compiled, (
                f"round {round} compiled {len(compiled)} programs; values that change belong in the message"
            )
        compiled.clear()
    after = jax.tree.map(lambda a: (a.shape, a.dtype), server)
    assert before == after, f"the server's state changed its structure: {before} became {after}"
    broken = not_finite(algorithm.params(server))
    assert not broken, f"the parameters are not finite in {', '.join(broken)}"


def not_finite(tree: Tree) -> list[str]:
    """Names of the floating-point leaves that hold a NaN or an infinity, which every comparison would call equal."""
    leaves = [(name, leaf) for name, leaf in wire.named_leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    return [name for name, leaf in leaves if not np.isfinite(np.asarray(leaf)).all()]


def check_bytes(make: Make, up: wire.Codec | None = None, down: wire.Codec | None = None) -> None:
    """Bytes up and down equal the length of the really packed messages, of all clients, in Python integers."""
    t = trial(make)
    problem, sent = t.problem, list[Sent]()
    _, _, cohorts = t.run(sent=sent, up=up, down=down)
    claimed = cohorts[0].traffic()
    assert all(type(n) is int for side in claimed for n in side.values()), "bytes must be Python integers"
    root, outboxes, turns = jax.random.key(0), defaultdict(Outbox), Counter()
    kept = {id: t.algorithm.memory(key_for(root, "memory", id), problem.held) for id in COHORT}
    packed_down = packed_up = 0
    for message, local, link, cohort in sent:
        group, ids = cohort.engine.group, cohort.ids.tolist()
        stream = channel(group, local)
        turn, key = turns[stream], key_for(root, named("down", stream), 1, turns[stream])
        turns[stream] += 1
        packed_down += packed_for_all(wire.news(message), down, key, len(ids))
        read, _ = outboxes[group].sent(message, partial(wire.depart, down), key, len(ids))
        times = edges(link.graph, cohort.ids).hearers(np.ones(len(ids), bool)) if link else np.ones(len(ids), int)
        for place, id in enumerate(ids):
            own, told = wire.for_client(read, place), {"exchange": turn, "group": group}
            reply, kept[id] = one_client(problem, local, own, kept[id], id, 1, codec=up, **told)
            packed_up += int(times[place]) * packed(reply, up, coding(reply, local, up, id, 1, **told))
    for way, each, real in zip(("down", "up"), claimed, (packed_down, packed_up), strict=True):
        assert sum(each.values()) == real, f"{way}: {sum(each.values())} bytes claimed, {real} packed"


def check_codecs(make: Make) -> None:
    """As `check_bytes`, with a codec both ways; an algorithm that marks nothing for one refuses the option."""
    t = trial(make)
    sent: list[Sent] = []
    t.run(sent=sent)
    marks = {"down": any(wire.is_coded(one.message) for one in sent), "up": False}
    for one in sent:
        read = wire.for_client(wire.unmarked(one.message), 0)
        id, group = int(one.cohort.ids[0]), one.cohort.engine.group
        kept = t.algorithm.memory(key_for(jax.random.key(0), "memory", id), t.problem.held)
        marks["up"] |= wire.is_coded(one_client(t.problem, one.local, read, kept, id, 1, group=group)[0])
    if any(marks.values()):
        check_bytes(make, **{way: wire.quantise(8) for way, marked in marks.items() if marked})


def check_padding(make: Make) -> None:
    """Padding, and a client without examples, change nothing, whatever stands in the padded rows.

    Where clients are peers, one without examples mixes what it hears and passes it on, which nobody does not.
    """
    t = trial(make)
    sent: list[Sent] = []
    plain, _, _ = t.run(sent=sent)
    other = t.problem.x.copy()
    other[0] = 1e3
    whole, groups = t.bench()
    changed = Bench(with_examples(whole, other), {name: with_examples(lanes, other) for name, lanes in groups.items()})
    same(plain, rounds(changed, t.algorithm, t.average, (COHORT,))[0], "another padding row")
    if not any(one.link for one in sent):
        nobody, empty = (t.run(((*COHORT[:5], last),))[0] for last in (-1, EMPTY))
        same(nobody, empty, "a client without examples", rtol=1e-5)


def with_examples(lanes: Lanes, x: np.ndarray) -> Lanes:
    """The same engine over other examples."""
    changed = copy.copy(lanes)
    changed.x = lanes.keep(x)
    return changed


def check_sizes(make: Make) -> None:
    """A cohort of another size, and one of nobody, which leaves the server as it was unless `runs_empty`."""
    t = trial(make)
    server, memory, _ = t.run((FEW,))
    broken = not_finite(server)
    assert not broken, f"a cohort of {len(FEW)} leaves what is not finite in {', '.join(broken)}"
    met = np.isin(np.arange(len(SIZES)), FEW).astype(np.int32)
    after, _, _ = t.run(((-1, -1, -1),), state=(server, memory), first=2, met=met)
    if t.algorithm.runs_empty:
        broken = not_finite(after)
        assert not broken, f"a cohort of nobody leaves what is not finite in {', '.join(broken)}"
    else:
        same(t.algorithm.params(server), t.algorithm.params(after), "the parameters after a cohort of nobody")


def check_lanes(make: Make) -> None:
    """One lane step by step, more lanes than clients, and all devices agree to float tolerance."""
    t = trial(make)
    plain, _, _ = t.run()
    variants: tuple[dict[str, Any], ...] = (
        {"lanes": 1, "segment_steps": 1},
        {"lanes": 16},
        {"devices": None},
        {"devices": None, "parallel": "pmap"},
    )
    for options in variants:
        same(plain, t.run(**options)[0], f"{options}", rtol=1e-5)


def check_frozen(make: Make) -> None:
    """The frozen backbone is bit-identical after a round."""
    t = trial(make)
    t.run()
    for lanes in t.bench().groups.values() or (t.bench().whole,):
        same(t.problem.held, jax.device_get(lanes.held), "the frozen backbone")


def check_resume(make: Make) -> None:
    """A round after a checkpoint, by an algorithm made anew, equals the same round without one, bit for bit."""
    t = trial(make)
    cohorts = (COHORT, (7, 5, 3, 2, 8, 10))
    whole, kept, done = t.run(cohorts)
    server, memory, _ = t.run(cohorts[:1])
    state = {"server": server, "memory": rows_of(memory)}
    with tempfile.TemporaryDirectory() as folder:
        with Checkpoints(Path(folder)) as checkpoints:
            checkpoints.save(1, state, {})
        with Checkpoints(Path(folder)) as checkpoints:
            found = checkpoints.restore(state, {})
    assert found is not None
    fresh = t.bench().memory(t.algorithm)
    for name, (rows, ids) in found[1]["memory"].items():
        (fresh.beside[name] if name else fresh).scatter(ids, rows)
    met = np.isin(np.arange(len(SIZES)), cohorts[0]).astype(np.int32)
    resumed, fresh, more = run(make, t.problem, cohorts[1:], state=(found[1]["server"], fresh), first=2, met=met)
    assert done[1].traffic() == more[0].traffic(), "the bytes of the round after resuming differ"
    same(whole, resumed, "the server's state after resuming")
    same(rows_of(kept), rows_of(fresh), "clients' memory after resuming")


def rows_of(memory: Memory) -> dict[str, tuple[Tree, np.ndarray]]:
    """What clients keep: rows and ids by group, "" where there is one architecture."""
    return {name: store.state() for name, store in {"": memory, **memory.beside}.items()}


def check_memory(make: Make) -> None:
    """Memory of a client that was not in the cohort is untouched; structure and dtypes stay."""
    t = trial(make)
    _, memory, _ = t.run(((0, 1, 2), (4, 5, 6)))
    _, once, _ = t.run(((0, 1, 2),))
    after = rows_of(memory)
    for name, (first, first_ids) in rows_of(once).items():
        rows, ids = after[name]
        take = partial(np.take, indices=[list(ids).index(i) for i in first_ids], axis=0)
        same(jax.tree.map(take, rows), first, "memory of absent clients")


def check_average(make: Make) -> None:
    """Under an average that is no plain mean the algorithm runs and stays finite, or is refused by name."""
    t = trial(make)
    try:
        server, _, _ = rounds(t.bench(), t.algorithm, clipped(), (COHORT, SECOND))
    except ValueError as error:
        assert "average='clipped'" in str(error), f"refused for another reason: {error}"
        return
    broken = not_finite(t.algorithm.params(server))
    assert not broken, f"the parameters are not finite in {', '.join(broken)}"


def same(a: Tree, b: Tree, what: str, rtol: float = 0.0) -> None:
    """Raises `AssertionError` unless two trees are equal: bit for bit, or relative to their largest entry."""
    assert jax.tree.structure(a) == jax.tree.structure(b), f"{what}: the structures differ"
    for (path, x), (_, y) in zip(wire.named_leaves(a), wire.named_leaves(b), strict=True):
        if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        x, y = np.asarray(x), np.asarray(y)
        if rtol == 0 or x.dtype == bool:
            assert x.dtype == y.dtype and np.array_equal(x, y, equal_nan=True), f"{what}: {path} differs"
        else:
            gap, scale = np.abs(x - y).max(initial=0.0), np.abs(x).max(initial=0.0)
            assert gap <= rtol * scale + 1e-8, f"{what}: {path} differs by {gap:.2e} of {scale:.2e}"


def check_functions(make: Make) -> None:
    """`select`, `observe`, `finished`, `setup`, `predict` and `params` work on what `init` and `round` give."""
    t = trial(make)
    problem, algorithm = t.problem, t.algorithm
    server, memory, cohorts = t.run()
    held, clients = cohorts[0].engine.held, len(SIZES)
    ids = algorithm.select(np.random.default_rng(0), server, Population(clients, 5))
    real = [i for i in ids.tolist() if i != -1]
    assert len(set(real)) == len(real) and all(0 <= i < clients for i in real), f"select gave {ids}"
    assert isinstance(algorithm.finished(server), bool), f"finished gave {algorithm.finished(server)!r}, no bool"
    after = algorithm.observe(server, {"loss": 1.0, "accuracy": 0.5})
    assert jax.tree.structure(after) == jax.tree.structure(server), "observe changed the server's structure"
    for each in t.bench().groups.values() or (t.bench().whole,):
        wire.price(jax.eval_shape(algorithm.setup, each.held))
    kept = jax.tree.map(lambda rows: rows[0], memory.state()[0])
    logits = algorithm.predict(held, server, kept, jnp.asarray(problem.x[:4]))
    assert logits.shape == (4, CLASSES), f"predict gave shape {logits.shape}, not (4, {CLASSES})"
    assert np.isfinite(logits).all(), "predict gave outputs that are not finite"
    assert algorithm.params(server), "params gave no parameters to export"


CHECKS: dict[str, Callable[[Make], None]] = {
    "structure kept, nothing recompiles": check_structure,
    "bytes equal the packed messages": check_bytes,
    "the same under a codec": check_codecs,
    "padding and empty clients change nothing": check_padding,
    "another cohort size, nobody": check_sizes,
    "lanes and devices agree": check_lanes,
    "frozen backbone untouched": check_frozen,
    "resumed equals uninterrupted": check_resume,
    "absent clients keep their memory": check_memory,
    "an average that is no mean, or refused": check_average,
    "select, observe, setup, predict, params": check_functions,
}


def check_algorithm(make: Make) -> None:
    """Runs every contract test on a constructor `task -> Algorithm`.

    Raises:
        AssertionError: names the check and what differs.
    """
    for name, check in CHECKS.items():
        try:
            check(make)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error


def print_checks(algorithm: str) -> bool:
    """Runs the contract tests on an algorithm by name or `file.py:function`, a line each; True if all passed."""
    make = algorithms.find(algorithm)
    passed, began = 0, time.perf_counter()
    for name, check in CHECKS.items():
        start = time.perf_counter()
        print(f"{name:42} ", end="", flush=True)
        try:
            check(make)
            passed, said = passed + 1, "ok"
        except Exception as error:
            said = f"FAILED: {type(error).__name__}: {error}"
        print(f"{time.perf_counter() - start:5.1f} s  {said}", flush=True)
    print(f"{passed} of {len(CHECKS)} checks passed for {algorithm}, in {time.perf_counter() - began:.0f} s.")
    return passed == len(CHECKS)
