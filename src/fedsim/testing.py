"""The contract tests as functions: for the project's own algorithms and for users' (`fedsim check my.py:fed_mine`).

They run on a tiny task, softmax regression over a frozen linear map - with LoRA on that map where the algorithm needs
one - and with clients of very different sizes, one of them without examples. Every check raises `AssertionError` with
what differs.
"""

from __future__ import annotations

import functools
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from fedsim import algorithms, plan, wire
from fedsim.checkpoint import Checkpoints
from fedsim.cohort import Cohort
from fedsim.core import Algorithm, Batch, Client, Factors, Local, Params, Passes, Population, Task, Tree, by_examples
from fedsim.evaluate import classification_loss
from fedsim.lanes import Lanes
from fedsim.memory import Memory
from fedsim.programs import key_for

Make = Callable[[Task], Algorithm]

SIZES = (7, 1, 23, 0, 12, 5, 9, 40, 3, 16, 8, 2)  # examples of each client
FEATURES, CLASSES = 6, 3
LORA = Factors("frozen", "lora_a", "lora_b", scale=1.5, inputs=FEATURES, rank=2, outputs=FEATURES)
COHORT = (2, 0, 7, 4, 9, 1)


class Problem(NamedTuple):
    """A tiny federated data set. Row 0 belongs to nobody: it is what padding points at."""

    held: Tree
    x: np.ndarray
    y: np.ndarray
    rows: np.ndarray
    offsets: np.ndarray


def tiny_problem(seed: int = 0) -> Problem:
    """Twelve clients of 0 to 40 examples of three classes."""
    rng = np.random.default_rng(seed)
    n = sum(SIZES) + 1
    x = rng.normal(size=(n, FEATURES)).astype(np.float32)
    y = (x @ rng.normal(size=(FEATURES, CLASSES))).argmax(axis=1).astype(np.int32)
    rows = (1 + rng.permutation(n - 1)).astype(np.int32)
    held = {"frozen": rng.normal(size=(FEATURES, FEATURES)).astype(np.float32)}
    held["lora_a"] = rng.normal(size=(FEATURES, LORA.rank)).astype(np.float32)  # for tasks that do not train it
    return Problem(held, x, y, rows, np.concatenate([[0], np.cumsum(SIZES)]).astype(np.int64))


def tiny_task(**changes: Any) -> Task:
    """Softmax regression on frozen features, trained by SGD; `changes` replaces fields of the `Task`."""

    def apply(params: Params, held: Params, x: Array) -> Array:
        return jnp.tanh(x @ held["frozen"]) @ params["kernel"] + params["bias"]

    def init(key: Array) -> Params:
        return {"kernel": 0.1 * jax.random.normal(key, (FEATURES, CLASSES)), "bias": jnp.zeros((CLASSES,))}

    task = Task(
        init=init,
        loss=classification_loss(apply),
        logits=lambda held, params, x: apply(params, held, x),
        optimizer=lambda rate: optax.sgd(rate, momentum=0.9),
        lr=lambda client: 0.1 / client.round.astype(jnp.float32),
        server_optimizer=optax.sgd(1.0),
        passes=Passes(epochs=2, batch_size=4),
        weight=by_examples,
        encode_up=lambda tree: tree,
        encode_down=lambda tree: tree,
        trained=frozenset({"kernel", "bias"}),
    )
    return task._replace(**changes)


def tiny_lora_task(trains_a: bool = True, **changes: Any) -> Task:
    """`tiny_task` with LoRA on its frozen map, A trained or held as FFA-LoRA has it."""
    plain = tiny_task()

    def apply(params: Params, held: Params, x: Array) -> Array:
        leaves = {**held, **params}
        h = x @ leaves["frozen"] + ((x @ leaves["lora_a"]) * LORA.scale) @ leaves["lora_b"]
        return jnp.tanh(h) @ leaves["kernel"] + leaves["bias"]

    def init(key: Array) -> Params:
        params = {**plain.init(key), "lora_b": jnp.zeros((LORA.rank, FEATURES))}
        return {**params, "lora_a": jax.random.normal(key, (FEATURES, LORA.rank))} if trains_a else params

    task = plain._replace(
        init=init,
        loss=classification_loss(apply),
        logits=lambda held, params, x: apply(params, held, x),
        trained=frozenset({"kernel", "bias", "lora_b", *(["lora_a"] if trains_a else [])}),
        factors=(LORA,),
    )
    return task._replace(**changes)


def suited(make: Make) -> Task:
    """The first of the tiny tasks that the constructor does not refuse.

    Raises:
        ValueError: it refuses all of them; what it says of the last one with LoRA.
    """
    tasks = (tiny_task(), tiny_lora_task(trains_a=False), tiny_lora_task())
    for task in tasks[:-1]:
        try:
            make(task)
        except ValueError:
            continue
        return task
    make(tasks[-1])
    return tasks[-1]


def engine(problem: Problem, **options: Any) -> Lanes:
    """An engine over the problem; two lanes on one device unless said otherwise."""
    chosen: dict[str, Any] = {"lanes": 2, "devices": 1, "segment_steps": 5}
    return Lanes(*problem, **{**chosen, **options})


class Sent(NamedTuple):
    """An exchange as it was asked for."""

    message: Tree
    local: Local


def run(
    make: Make,
    problem: Problem,
    cohorts: tuple[tuple[int, ...], ...] = (COHORT,),
    *,
    task: Task | None = None,
    state: tuple[Tree, Memory] | None = None,
    first: int = 1,
    met: np.ndarray | None = None,
    sent: list[Sent] | None = None,
    **options: Any,
) -> tuple[Tree, Memory, list[Cohort]]:
    """Rounds `first`, `first + 1`, ... with the given cohorts: the server's state, clients' memory, the cohorts.

    Args:
        state, met: of the rounds before `first`; `met` (N,) is the last round in which a client was in the cohort.
    """
    lanes = engine(problem, **options)
    met = np.zeros(lanes.population, np.int32) if met is None else met.copy()
    algorithm = make(task or suited(make))
    server, memory = state or (
        algorithm.init(key_for(lanes.root, "init"), lanes.held),
        Memory(algorithm.memory, lanes.held),
    )
    server = lanes.put(server)
    done = []
    for round, ids in enumerate(cohorts, first):
        cohort = Cohort(lanes, np.array(ids), round, memory, met=met)
        met[list(ids)] = round
        if sent is not None:
            listen(cohort, sent)
        server, _ = algorithm.round(key_for(lanes.root, "server", round), lanes.held, server, cohort)
        done.append(cohort)
    return server, memory, done


def listen(cohort: Cohort, sent: list[Sent]) -> None:
    """Notes every message of the cohort's exchanges."""
    exchange = cohort.exchange

    def listening(message: Tree, local: Local, *args: Any, **options: Any) -> Any:
        sent.append(Sent(message, local))
        return exchange(message, local, *args, **options)

    cohort.exchange = listening  # type: ignore[method-assign]  # on this one instance, for the test


@functools.cache
def compiled(local: Local) -> Local:
    """The same functions, each compiled by itself."""
    return Local(jax.jit(local.start), jax.jit(local.step), jax.jit(local.finish), local.passes)


def one_client(
    problem: Problem, local: Local, message: Tree, memory: Tree, id: int, round: int, seed: int = 0, exchange: int = 0
) -> tuple[Tree, Tree]:
    """What client `id` replies and keeps, computed alone, batch by batch, without lanes: the oracle of the engine.

    `message` is what this client gets: own parts are already its own.
    """
    local = compiled(local)
    size = problem.offsets[id + 1] - problem.offsets[id]
    own = problem.rows[problem.offsets[id] : problem.offsets[id + 1]]
    root = jax.random.key(seed)
    key = key_for(root, "local", round, exchange, id)
    client = Client(jnp.int32(id), jnp.int32(size), memory, key, jnp.int32(round), jnp.float32(0.0))
    _, step, column, example = plan.batches(np.array([id]), np.array([size]), local.passes, seed, round, exchange)
    steps = max(int(plan.steps_of(np.array([size]), local.passes)[0]), 1)
    carry: Tree = None
    for s in range(steps):
        here = step == s
        rows = np.zeros(local.passes.batch_size, np.int32)
        rows[column[here]] = own[example[here]]
        mask = (np.arange(len(rows)) < here.sum()).astype(np.float32)
        batch = Batch(
            jnp.asarray(problem.x[rows]),
            jnp.asarray(problem.y[rows]),
            jnp.asarray(mask),
            jax.random.fold_in(key, s),
            jnp.int32(s),
            jnp.asarray(s == steps - 1),
        )
        carry = local.start(problem.held, message, client, batch) if s == 0 else carry
        if here.any():
            carry, _ = local.step(problem.held, message, carry, batch)
    reply, memory, _ = local.finish(problem.held, message, carry, client)
    return reply, memory


# --- the contract


def check_structure(make: Make) -> None:
    """Two rounds keep structure, shapes and dtypes of the server's state; after round one nothing compiles."""
    problem = tiny_problem()
    lanes, algorithm = engine(problem), make(suited(make))
    server = lanes.put(algorithm.init(key_for(lanes.root, "init"), lanes.held))
    before = jax.tree.map(lambda a: (a.shape, a.dtype), server)
    memory = Memory(algorithm.memory, lanes.held)
    compiled: list[str] = []

    def note(event: str, duration_secs: float, **_: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(note)
    for round, ids in enumerate((COHORT, (3, 11, 10, 6, 5, 8), (0, 1, 2, 3, 4, 5)), 1):
        cohort = Cohort(lanes, np.array(ids), round, memory)
        server, metrics = algorithm.round(key_for(lanes.root, "server", round), lanes.held, server, cohort)
        cohort.fetch((server, metrics))
        cohort.traffic()
        if round > 1:
            assert not compiled, (
                f"round {round} compiled {len(compiled)} programs; values that change belong in the message"
            )
        compiled.clear()
    after = jax.tree.map(lambda a: (a.shape, a.dtype), server)
    assert before == after, f"the server's state changed its structure: {before} became {after}"


def packed(name: str, packet: wire.Packet) -> int:
    """Length of an array from which the packet's value really comes back, and which has as many bytes as it claims.

    That is what `wire.cast` and `wire.ranked` send: the array in 32 or 16 bits, whole or its first entries along an axis
    where the others are zero. A packet of another codec is refused.
    """
    value, claim = np.asarray(packet.value), int(packet.nbytes)
    for dtype in (value.dtype, jnp.bfloat16, jnp.float16):
        sent = value.astype(dtype)
        for axis in range(value.ndim):
            count, odd = divmod(claim, max(sent.nbytes // max(value.shape[axis], 1), 1))
            if odd or count > value.shape[axis]:
                continue
            back = np.zeros_like(value)
            first = (slice(None),) * axis + (slice(count),)
            back[first] = sent[first].astype(value.dtype)
            if np.array_equal(back, value):
                return len(wire.to_bytes(sent[first]))
    raise AssertionError(f"packet {name!r} claims {claim} bytes, from which its value does not come back")


def check_bytes(make: Make) -> None:
    """Bytes up and down equal the length of the really packed messages, of all clients, in Python integers.

    Of a broadcast leaf with a price per client only its sum and its bound, the whole leaf, can be checked here: what a
    client holds already is known to the algorithm alone, and to its own tests.
    """
    problem, sent = tiny_problem(), []
    _, memory, cohorts = run(make, problem, sent=sent)
    down, up = cohorts[0].traffic()
    members = len(COHORT)
    assert all(type(n) is int for n in (*down.values(), *up.values())), "bytes must be Python integers"
    packed_down = packed_up = 0
    for index, (message, local) in enumerate(sent):
        for name, node in wire.parts(message):
            own = isinstance(node, wire.PerClient)
            for leaf_name, leaf in wire.named_leaves(node.tree if own else node):
                where = f"{name}/{leaf_name}"
                if not wire.is_packet(leaf):
                    packed_down += len(wire.to_bytes(leaf)) * (1 if own else members)
                elif own:
                    each = [jax.tree.map(lambda a, m=m: a[m], leaf) for m in range(members)]
                    packed_down += sum(packed(where, one) for one in each)
                elif np.ndim(leaf.nbytes):
                    whole = wire.array_bytes(leaf.value)
                    assert all(0 <= int(n) <= whole for n in leaf.nbytes), f"{where} costs more than its {whole} bytes"
                    packed_down += sum(int(n) for n in leaf.nbytes)
                else:
                    packed_down += members * packed(where, leaf)
        for place, id in enumerate(COHORT):
            fresh = memory.init(key_for(jax.random.key(0), "memory", id), problem.held)
            reply, _ = one_client(problem, local, wire.for_client(message, place), fresh, id, 1, exchange=index)
            for name, leaf in wire.named_leaves(reply):
                packed_up += packed(name, leaf) if wire.is_packet(leaf) else len(wire.to_bytes(leaf))
    assert sum(down.values()) == packed_down, f"down: {sum(down.values())} bytes claimed, {packed_down} packed"
    assert sum(up.values()) == packed_up, f"up: {sum(up.values())} bytes claimed, {packed_up} packed"


def check_padding(make: Make) -> None:
    """Padding, empty steps and a client without examples change nothing, whatever stands in the padded rows."""
    problem = tiny_problem()
    plain, _, _ = run(make, problem)
    other = problem.x.copy()
    other[0] = 1e3
    same(plain, run(make, problem._replace(x=other))[0], "another padding row")
    with_empty = run(make, problem, ((*COHORT, 3),))[0]
    same(plain, with_empty, "a client without examples", rtol=1e-5)


def check_lanes(make: Make) -> None:
    """One lane, three, more than clients, and all devices agree to float tolerance."""
    problem = tiny_problem()
    plain, _, _ = run(make, problem, lanes=1)
    variants: tuple[dict[str, Any], ...] = (
        {"lanes": 3},
        {"lanes": 16},
        {"lanes": 2, "devices": None},
        {"lanes": 2, "segment_steps": 1},
        {"lanes": 2, "devices": None, "parallel": "pmap"},
    )
    for options in variants:
        same(plain, run(make, problem, **options)[0], f"{options}", rtol=1e-5)


def check_frozen(make: Make) -> None:
    """The frozen backbone is bit-identical after a round."""
    problem = tiny_problem()
    _, _, cohorts = run(make, problem)
    same(problem.held, jax.device_get(cohorts[0].engine.held), "the frozen backbone")


def check_resume(make: Make) -> None:
    """A round after a checkpoint equals the same round without one, bit for bit."""
    problem = tiny_problem()
    cohorts = (COHORT, (7, 5, 3, 2, 8, 10))
    whole, kept, done = run(make, problem, cohorts)
    server, memory, _ = run(make, problem, cohorts[:1])
    with tempfile.TemporaryDirectory() as folder:
        rows, ids = memory.state()
        with Checkpoints(Path(folder)) as checkpoints:
            checkpoints.save(1, {"server": server, "memory": rows, "ids": ids}, {})
        with Checkpoints(Path(folder)) as checkpoints:
            found = checkpoints.restore({"server": server, "memory": rows, "ids": ids}, {})
    assert found is not None
    fresh = Memory(memory.init, problem.held)
    fresh.scatter(found[1]["ids"], found[1]["memory"])
    met = np.isin(np.arange(len(SIZES)), cohorts[0]).astype(np.int32)
    resumed, fresh, more = run(make, problem, cohorts[1:], state=(found[1]["server"], fresh), first=2, met=met)
    assert done[1].traffic() == more[0].traffic(), "the bytes of the round after resuming differ"
    same(whole, resumed, "the server's state after resuming")
    same(kept.state(), fresh.state(), "clients' memory after resuming")


def check_memory(make: Make) -> None:
    """Memory of a client that was not in the cohort is untouched; structure and dtypes stay."""
    problem = tiny_problem()
    _, memory, _ = run(make, problem, ((0, 1, 2), (4, 5, 6)))
    _, once, _ = run(make, problem, ((0, 1, 2),))
    (rows, ids), (first, first_ids) = memory.state(), once.state()
    places = [list(ids).index(i) for i in first_ids]
    same(jax.tree.map(lambda r: r[places], rows), first, "memory of absent clients")


def same(a: Tree, b: Tree, what: str, rtol: float = 0.0) -> None:
    """Raises `AssertionError` unless two trees are equal: bit for bit, or relative to their largest entry."""
    assert jax.tree.structure(a) == jax.tree.structure(b), f"{what}: the structures differ"
    for (path, x), (_, y) in zip(wire.named_leaves(a), wire.named_leaves(b), strict=True):
        if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        x, y = np.asarray(x), np.asarray(y)
        if rtol == 0:
            assert x.dtype == y.dtype and np.array_equal(x, y, equal_nan=True), f"{what}: {path} differs"
        else:
            gap, scale = np.abs(x - y).max(initial=0.0), np.abs(x).max(initial=0.0)
            assert gap <= rtol * scale + 1e-8, f"{what}: {path} differs by {gap:.2e} of {scale:.2e}"


def check_functions(make: Make) -> None:
    """`select`, `observe`, `setup`, `predict` and `params` work on what `init` and `round` give."""
    problem, algorithm = tiny_problem(), make(suited(make))
    server, memory, cohorts = run(make, problem)
    held, clients = cohorts[0].engine.held, len(SIZES)
    ids = algorithm.select(np.random.default_rng(0), server, Population(clients, 5))
    assert len(set(ids.tolist())) == len(ids) and all(0 <= i < clients for i in ids), f"select gave {ids}"
    after = algorithm.observe(server, {"loss": 1.0, "accuracy": 0.5})
    assert jax.tree.structure(after) == jax.tree.structure(server), "observe changed the server's structure"
    wire.price(jax.eval_shape(algorithm.setup, held))
    kept = jax.tree.map(lambda rows: rows[0], memory.state()[0])
    logits = algorithm.predict(held, server, kept, jnp.asarray(problem.x[:4]))
    assert logits.shape == (4, CLASSES), f"predict gave shape {logits.shape}, not (4, {CLASSES})"
    assert algorithm.params(server), "params gave no parameters to export"


CHECKS: dict[str, Callable[[Make], None]] = {
    "structure kept, nothing recompiles": check_structure,
    "bytes equal the packed messages": check_bytes,
    "padding and empty clients change nothing": check_padding,
    "lanes and devices agree": check_lanes,
    "frozen backbone untouched": check_frozen,
    "resumed equals uninterrupted": check_resume,
    "absent clients keep their memory": check_memory,
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
    passed = 0
    for name, check in CHECKS.items():
        start = time.perf_counter()
        try:
            check(make)
            passed, said = passed + 1, "ok"
        except Exception as error:
            said = f"FAILED: {type(error).__name__}: {error}"
        print(f"{name:42} {time.perf_counter() - start:5.1f} s  {said}", flush=True)
    print(f"{passed} of {len(CHECKS)} checks passed for {algorithm}.")
    return passed == len(CHECKS)
