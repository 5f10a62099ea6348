"""Messages as changes of what all clients hold, against loops in NumPy: EF21-P, packed bytes, what is not the same for all."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from brief import brief
from fedsim import network, wire
from fedsim.algorithms import find
from fedsim.algorithms.fed_avg import fed_avg
from fedsim.core import Client, Graph, Local, Passes, Peers, Task, Tree
from fedsim.engine.client_memory import Memory
from fedsim.engine.cohort import Cohort
from fedsim.engine.keys import key_for
from fedsim.engine.lanes import Lanes
from fedsim.folds import plain, stack, uniform
from fedsim.testing.tasks import tiny_lora_task, tiny_task
from fedsim.testing.toys import SIZES, engine, run, tiny_problem
from fedsim.wire.codecs import Sent

pytestmark = pytest.mark.usefixtures("compile_once")

N = len(SIZES)
EVERYBODY = tuple(range(N))
GOALS = np.random.default_rng(3).normal(size=(N, 7)).astype(np.float32)  # where each client's quadratic is least
ONE = Passes(1, None, 4)
LEAVES = {"a": jnp.linspace(-1.0, 1.0, 12).reshape(4, 3), "b": jnp.arange(2.0)}


def saying(reply: Callable[[Tree, Client], Tree], passes: Passes = ONE) -> Local:
    """A `Local` that trains nothing: (message, client) -> what it replies."""
    return Local(
        lambda held, message, client, batch: jnp.zeros(()),
        lambda held, message, carry, batch: (carry, {"rows": batch.mask.sum()}),
        lambda held, message, carry, client: (reply(message, client), (), {}),
        passes,
    )


ECHO = saying(lambda message, client: message)


def nothing(key: Any, held: Tree) -> Tree:
    return ()


def cohort_of(lanes: Lanes, round: int, copies: Any = None, **options: Any) -> Cohort:
    options = {"ids": EVERYBODY, **options}
    ids = np.array(options.pop("ids"), np.int64)
    return Cohort(lanes, ids, round, Memory(nothing, lanes.held), copies=copies, **options)


def read(cohort: Cohort, message: Tree, local: Local = ECHO) -> Tree:
    """The message as a client has read it, the same for all of them."""
    result, _ = cohort.exchange(message, local, stack())
    replies = jax.tree.map(np.asarray, result.replies)
    for leaf in jax.tree.leaves(replies):
        np.testing.assert_array_equal(leaf, np.broadcast_to(leaf[:1], leaf.shape))
    return jax.tree.map(lambda leaf: leaf[0], replies)


def moved(round: int) -> Tree:
    """What the server has in a round."""
    shift = np.random.default_rng(round).normal(size=14).astype(np.float32)
    return {"a": LEAVES["a"] + jnp.asarray(shift[:12].reshape(4, 3)), "b": LEAVES["b"] + jnp.asarray(shift[12:])}


# --- the algorithm


@pytest.mark.slow
@pytest.mark.parametrize(("lanes", "devices"), [(2, 1), (3, 8)])
def test_messages_and_parameters_are_those_of_ef21_p(lanes: int, devices: int) -> None:
    """EF21-P (arXiv 2209.15218, algorithm 1) in NumPy: w += C(x - w), and x goes by the mean gradient at w.

    for t: send C(x - w); w = w + C(x - w); x = x - step * mean_i (w - goal_i)
    """
    e = engine(tiny_problem(), lanes=lanes, devices=devices, down=wire.codec("topk(0.3)"))
    goals, step = jnp.asarray(GOALS), 0.5
    local = saying(lambda message, client: wire.coded(-step * (message["x"] - goals[client.id])))
    x, copies = jnp.zeros(7), None
    goal = GOALS[np.array(SIZES) > 0].mean(axis=0)  # who has no examples does not count
    real_x, w = np.zeros(7, np.float32), np.zeros(7, np.float32)
    for round in range(1, 9):
        cohort = cohort_of(e, round, copies, average=plain(uniform))
        change, _ = cohort.exchange({"x": wire.coded(x, change=False)}, local)
        x, copies = x + change, cohort.copies
        if round == 1:
            w = real_x.copy()
        else:
            difference, sent = real_x - w, np.zeros(7, np.float32)
            largest = np.argsort(-np.abs(difference), kind="stable")[: math.ceil(0.3 * 7)]
            sent[largest] = difference[largest]
            w = w + sent
        real_x = real_x - np.float32(step) * (w - goal)
        np.testing.assert_allclose(copies["0"].values["0"], w, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(x, real_x, rtol=1e-5, atol=1e-6)
        whole, thin = 7 * 4, 3 * 4 + math.ceil(3 * 3 / 8)  # three entries, three bits for each place
        assert sum(cohort.traffic()[0].values()) == N * (whole if round == 1 else thin)
    assert np.abs(np.asarray(x) - w).max() > 1e-3, "something is still to be sent"


@pytest.mark.slow
def test_what_did_not_arrive_is_sent_in_the_end() -> None:
    """A server that stands still is reached: each difference has what the one before left, and nothing twice."""
    e = engine(tiny_problem(), down=wire.codec("topk(0.3)"))
    copies, found = None, None
    for round, message in enumerate([LEAVES, *[moved(2)] * 4], 1):
        cohort = cohort_of(e, round, copies)
        found, copies = read(cohort, wire.coded(message, change=False)), cohort.copies
    for name, leaf in moved(2).items():
        np.testing.assert_allclose(found[name], leaf, rtol=1e-6, atol=1e-6)


CODECS = (
    "topk(0.3)",
    "topk(0.5)+quantise(4)",
    "blocks(0.5, 4)",
    "randomk(0.4, feedback=True)",
    "sign(feedback=True)",
    "powersgd(1)",
    "powersgd(1)+quantise(8)",
    "low_rank(1)",
    "sketch(1, feedback=True)",
)


@pytest.mark.parametrize("name", brief(CODECS, 3))
def test_bytes_are_those_of_packed_messages_which_unpack_to_what_clients_read(name: str) -> None:
    """A receiver in NumPy: it unpacks what was really packed, adds it to its copy, and has what the clients have, bit for bit."""
    e = engine(tiny_problem(), down=wire.codec(name))
    codec = wire.of_changes(wire.codec(name))
    assert codec is not None
    encode = jax.jit(codec.encode)
    copies, state, mine = None, (), {}
    for round in range(1, 6):
        cohort, leaves = cohort_of(e, round, copies), moved(round)
        found, copies = read(cohort, wire.coded(leaves, change=False)), cohort.copies
        key = key_for(e.root, "down", round, 0)
        claimed = sum(cohort.traffic()[0].values())
        if round == 1:
            state, mine = (
                codec.init(key, {f"0/{n}": leaf for n, leaf in leaves.items()}),
                jax.tree.map(np.asarray, leaves),
            )
            assert claimed == N * 14 * 4
        else:
            given = {f"0/{n}": Sent(leaf - mine[n]) for n, leaf in leaves.items()}
            sent, state = encode(given, key, key, state)
            data = wire.pack(sent, codec)
            back = wire.unpack(data, given, codec)
            mine = {n: mine[n] + back[f"0/{n}"] for n in leaves}
            assert claimed == N * len(data)
        for n in leaves:
            np.testing.assert_array_equal(found[n], mine[n], f"round {round}")


@pytest.mark.slow
def test_powersgd_starts_from_its_last_factors() -> None:
    """The warm start is kept, and nothing else: no rest, which the next difference has by itself."""
    codec = wire.of_changes(wire.codec("powersgd(1)"))
    assert codec is not None
    state = codec.init(jax.random.key(0), {"w": jnp.zeros((4, 3))})
    assert {name: leaf.shape for name, leaf in state.items()} == {"w": (3, 1)}
    matrix = jnp.asarray(np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32))
    errors = []
    for _ in range(30):  # of the same matrix: the factors become its first singular vectors
        sent, state = codec.encode({"w": Sent(matrix)}, jax.random.key(1), jax.random.key(1), state)
        errors.append(float(jnp.linalg.norm(matrix - sent["w"].value)))
    best = np.sqrt((np.linalg.svd(np.asarray(matrix), compute_uv=False)[1:] ** 2).sum())
    assert errors[0] > best + 0.01 and abs(errors[-1] - best) < 1e-4


@pytest.mark.parametrize(
    "name",
    [
        "topk(0.1)",
        "topk(0.1)+quantise(8)",
        "randomk(0.1, feedback=True)",
        "sign(feedback=True)",
        "low_rank(1, feedback=True)",
    ],
)
def test_a_codecs_own_feedback_is_left_out(name: str) -> None:
    codec = wire.of_changes(wire.codec(name))
    assert codec is not None and not codec.remembers
    assert codec.init(jax.random.key(0), LEAVES) == ()


def named_task(name: str) -> tuple[Any, Task]:
    tasks = {"scaffold": tiny_task(weight=uniform), "fed_it": tiny_lora_task(), "flora": tiny_lora_task()}
    return find(name), tasks.get(name, tiny_task())


@pytest.mark.parametrize("name", brief(["fed_avg", "scaffold", "fed_it", "flora", "fed_res"], 2))
def test_a_codec_that_loses_nothing_is_as_none(name: str) -> None:
    make, task = named_task(name)
    plain_, coded = (
        run(make, tiny_problem(), (EVERYBODY,) * 4, task=task, down=codec)[0]
        for codec in (None, wire.codec("topk(1.0)"))
    )
    for a, b in zip(jax.tree.leaves(plain_), jax.tree.leaves(coded), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


# --- which messages


@pytest.mark.slow
def test_every_message_of_a_round_has_a_copy_of_its_own() -> None:
    """By what the exchange's randomness is named, and which of these it is; `wire.again` reads what was decoded."""
    e = engine(tiny_problem(), down=wire.codec("topk(0.3)"))
    other = saying(lambda message, client: message, ONE._replace(stream="b"))
    copies = None
    held = {"0": np.zeros(14), "1": np.zeros(14), "b-0": np.zeros(14)}
    for round in range(1, 5):
        cohort = cohort_of(e, round, copies)
        for factor, (name, local) in enumerate((("0", ECHO), ("1", ECHO), ("b-0", other)), 1):
            leaves = jax.tree.map(lambda leaf, f=factor: f * leaf, moved(round))
            found = np.concatenate(
                [leaf.reshape(-1) for leaf in read(cohort, wire.coded(leaves, change=False), local).values()]
            )
            flat = np.concatenate([np.asarray(leaf).reshape(-1) for leaf in leaves.values()])
            difference = flat - held[name]
            sent = np.where(
                np.argsort(np.argsort(-np.abs(difference), kind="stable")) < math.ceil(0.3 * 14), difference, 0
            )
            held[name] = flat if round == 1 else held[name] + sent
            np.testing.assert_allclose(found, held[name], rtol=1e-5, atol=1e-5)
            again = saying(lambda message, client: message, ONE._replace(stream=f"again {name}"))
            once_more = read(cohort, {"m": wire.again(leaves)}, again)["m"]
            np.testing.assert_array_equal(found, np.concatenate([leaf.reshape(-1) for leaf in once_more.values()]))
        copies = cohort.copies
    assert copies is not None and set(copies) == set(held)


@pytest.mark.slow
def test_a_message_with_other_leaves_travels_whole() -> None:
    e = engine(tiny_problem(), down=wire.codec("topk(0.3)"))
    copies, bytes_down = None, []
    for round, shape in enumerate([7, 7, 9, 9], 1):
        cohort = cohort_of(e, round, copies)
        read(cohort, wire.coded(jnp.full(shape, float(round)), change=False))
        copies = cohort.copies
        bytes_down.append(sum(cohort.traffic()[0].values()) // N)
    assert bytes_down == [28, 14, 36, 14]


def test_a_message_that_is_not_finite_is_not_kept() -> None:
    """Who reads it finds that it is not finite, and the next one is a change of the one before."""
    e = engine(tiny_problem(), down=wire.codec("powersgd(1)"))
    copies: Any = None
    for round, factor in ((1, 1.0), (2, 1.0), (3, jnp.nan), (4, 1.0)):
        cohort, before = cohort_of(e, round, copies), copies
        local = saying(lambda message, client: {"finite": jnp.isfinite(message["a"]).all().astype(jnp.float32)})
        message = jax.tree.map(lambda leaf, f=factor: f * leaf, moved(round))
        assert read(cohort, wire.coded(message, change=False), local)["finite"] == (round != 3)
        copies = cohort.copies
        if round == 3:
            for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(copies), strict=True):
                np.testing.assert_array_equal(a, b)


def test_parts_without_a_mark_and_with_a_codec_of_their_own_travel_as_without_it() -> None:
    e = engine(tiny_problem(), down=wire.codec("topk(0.3)"))
    copies, own = None, wire.codec("quantise(8)")
    for round in (1, 2):
        cohort = cohort_of(e, round, copies)
        x = jnp.linspace(0.0, round, 7)
        message = {"x": wire.coded(x, change=False), "plain": x, "own": wire.coded(x, change=False, by=own)}
        found, copies = read(cohort, message), cohort.copies
        np.testing.assert_array_equal(found["plain"], x)
        np.testing.assert_allclose(found["own"], x, atol=round / 255)
        assert cohort.traffic()[0] == {"x": N * (28 if round == 1 else 14), "plain": N * 28, "own": N * 15}
    assert copies is not None and set(copies["0"].values) == {"2"}, "x alone, the third of the message's parts"


@pytest.mark.parametrize("devices", [1, 8])
def test_nothing_compiles_from_the_third_round_on(devices: int) -> None:
    """The first message is one program, the first difference another."""
    lanes = engine(tiny_problem(), devices=devices, down=wire.codec("powersgd(1)+quantise(8)"))
    algorithm = fed_avg(tiny_task())
    server, copies, compiled = lanes.put(algorithm.init(jax.random.key(0), lanes.held)), None, []

    def note(event: str, duration_secs: float, **_: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(note)
    try:
        for round in range(1, 6):
            cohort = cohort_of(lanes, round, copies)
            server, _ = algorithm.round(key_for(lanes.root, "server", round), lanes.held, server, cohort)
            cohort.settle()
            cohort.traffic()
            copies = cohort.copies
            assert not compiled or round < 3, f"round {round} compiled {len(compiled)} programs"
            compiled.clear()
    finally:
        jax.monitoring.unregister_event_duration_listener(note)


# --- what is refused


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"ids": EVERYBODY[1:]}, "every client in every exchange"),
        ({"ids": (*EVERYBODY[1:], -1)}, "every client in every exchange"),
        ({"conditions": "absent"}, "every client in every exchange"),
    ],
)
def test_a_client_that_misses_a_message_is_refused(options: dict[str, Any], words: str) -> None:
    e = engine(tiny_problem(), down=wire.codec("topk(0.3)"))
    if "conditions" in options:
        sure = network.reliable(np.array(EVERYBODY))
        options = {"conditions": sure._replace(present=sure.present & (np.array(EVERYBODY) != 3))}
    with pytest.raises(ValueError, match=rf"Expected {words} for a codec_down .* bfloat16, quantise\(8\), eden\(4\)"):
        cohort_of(e, 1, **options).exchange(wire.coded(jnp.ones(7), change=False), ECHO)


def test_peers_are_refused() -> None:
    e = engine(tiny_problem(), down=wire.codec("topk(0.3)"))
    ring = Graph(
        np.array([[(i + 1) % N] for i in range(N)]), np.full((N, 1), 0.5, np.float32), np.full(N, 0.5, np.float32)
    )
    link = Peers(ring, lambda memory, mixed, client: memory)
    with pytest.raises(ValueError, match="no exchange whose replies go from peer to peer for a codec_down"):
        cohort_of(e, 1).exchange(wire.coded(jnp.ones(7), change=False), ECHO, stack(), (), link)


@pytest.mark.parametrize(
    "part",
    [
        wire.PerClient(wire.coded(jnp.ones((N, 7)), change=False)),
        wire.coded(wire.kept(jnp.ones(7), jnp.arange(7) < 3), change=False),
        wire.coded(wire.kept(jnp.ones((7, 2)), jnp.ones(N, jnp.int32), axis=1), change=False),
    ],
)
def test_parts_that_are_not_the_same_for_all_are_refused(part: Any) -> None:
    e = engine(tiny_problem(), down=wire.codec("topk(0.3)"))
    with pytest.raises(
        ValueError, match=r"not marked by wire.PerClient or wire.kept; choose a codec that acts on values"
    ):
        cohort_of(e, 1).exchange({"x": part}, ECHO)


def test_leaves_that_are_no_numbers_are_refused() -> None:
    e = engine(tiny_problem(), down=wire.codec("topk(0.3)"))
    with pytest.raises(ValueError, match="to hold floating-point numbers for codec topk"):
        cohort_of(e, 1).exchange({"x": wire.coded(jnp.arange(7), change=False)}, ECHO)


@pytest.mark.parametrize("name", ["randomk(0.3)", "sketch(1)", "terngrad", "topk(0.3)+qsgd(4)", "topk(0.3)+qsgd(8, 0)"])
def test_codecs_that_err_by_more_than_they_are_given_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"to err by less than what it is given.*randomk\(0.1, feedback=True\)"):
        engine(tiny_problem(), down=wire.codec(name))


def test_what_errs_by_more_would_run_away() -> None:
    """Why: with an unbiased codec the difference grows, with its projection it shrinks."""
    sizes = {}
    for feedback in (False, True):
        codec = wire.codec(f"randomk(0.2, feedback={feedback})")
        assert codec is not None
        codec = codec.link
        assert codec is not None and codec.overshoots == (not feedback)
        rest = jnp.ones(50)
        for key in jax.random.split(jax.random.key(0), 30):
            sent, _ = codec.encode({"x": Sent(rest)}, key, key, ())
            rest = rest - sent["x"].value
        sizes[feedback] = float(jnp.linalg.norm(rest))
    assert sizes[False] > 1e3 and sizes[True] < 1.0
