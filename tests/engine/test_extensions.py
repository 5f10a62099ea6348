"""What algorithms, averages and codecs may ask of the engine, each against a loop in NumPy over the clients."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array

from brief import brief
from fedsim import network, wire
from fedsim.core import Average, Averaged, Batch, Client, Graph, Local, Passes, Peers, Population, Reduce, Tree, poisson
from fedsim.engine.client_memory import Memory
from fedsim.engine.cohort import Cohort
from fedsim.engine.keys import key_for
from fedsim.engine.lanes import Lanes
from fedsim.folds import both, by_examples, mean, plain, stack, uniform
from fedsim.testing.contract import same
from fedsim.testing.tasks import tiny_task
from fedsim.testing.toys import COHORT, SIZES, engine, one_client, tiny_problem, visits
from fedsim.training.local import fit

pytestmark = pytest.mark.usefixtures("compile_once")

N = len(SIZES)
TABLE = np.random.default_rng(5).normal(size=(N, 7)).astype(np.float32)  # what each client has to say
GRIDS = [(1, 1), (3, 8), (16, 1), (1, 2)]  # lanes of a device, devices
SOME = [GRIDS[1], GRIDS[2]]
ONE = Passes(1, None, 4)


def said(client: Client) -> Array:
    """A client's row of the table, times the round; (7,)."""
    return jnp.asarray(TABLE)[client.id] * client.round.astype(jnp.float32)


def saying(
    reply: Callable[[Tree, Client], Tree] = lambda message, client: wire.coded(said(client)),
    memory: Callable[[Tree, Client], Tree] = lambda message, client: client.memory,
    passes: Passes = ONE,
    **more: Any,
) -> Local:
    """A `Local` that trains nothing: (message, client) -> what it replies and keeps."""
    return Local(
        lambda held, message, client, batch: jnp.zeros(()),
        lambda held, message, carry, batch: (carry, {"rows": batch.mask.sum()}),
        lambda held, message, carry, client: (reply(message, client), memory(message, client), {}),
        passes,
        **more,
    )


def nothing(key: Array, held: Tree) -> Tree:
    return ()


def cohort_of(
    lanes: Lanes,
    ids: Sequence[int] = COHORT,
    round: int = 1,
    memory: Memory | None = None,
    drops: Sequence[int] = (),
    absent: Sequence[int] = (),
    **options: Any,
) -> Cohort:
    """A cohort of which some clients drop out, and some cannot be reached."""
    given = np.array(ids, np.int64)
    conditions = network.reliable(given)
    conditions = conditions._replace(present=conditions.present & ~np.isin(given, absent), drops=np.isin(given, drops))
    return Cohort(lanes, given, round, memory or Memory(nothing, lanes.held), conditions, **options)


def weights_of(ids: Sequence[int]) -> np.ndarray:
    """Numbers of examples, float64; 0 for nobody."""
    return np.array([SIZES[i] if i >= 0 else 0 for i in ids], np.float64)


def kept(memory: Memory) -> dict[int, Any]:
    """What every client keeps that was ever seen."""
    rows, ids = memory.state()
    return {int(i): jax.tree.map(lambda r, p=place: np.asarray(r[p]), rows) for place, i in enumerate(ids)}


def by_grid(*grids: tuple[int, int]) -> Any:
    return pytest.mark.parametrize(("lanes", "devices"), brief(grids, 2))


# --- nobody, and cohorts of nobody


def trained(ids: Sequence[int], lanes: int, devices: int) -> tuple[Any, Cohort, Memory]:
    """One exchange of real training with own parts; clients keep how often they were there."""
    e = engine(tiny_problem(), lanes=lanes, devices=devices)
    task = tiny_task(lr=lambda client, message: jnp.float32(0.1))
    local = fit(
        task.loss, task.optimizer, task.lr, task.passes,
        start=lambda message, memory: message["w"],
        reply=lambda carry, message, client: (
            wire.coded({k: carry.params[k] - message["w"][k] + 0 * message["own"][0] for k in carry.params}),
            client.memory + 1.0,
        ),
    )  # fmt: skip
    memory = Memory(lambda key, held: jnp.zeros(()), e.held)
    cohort = cohort_of(e, ids, memory=memory)
    own = wire.PerClient(jnp.asarray(np.resize(TABLE, (len(ids), 7))))
    result, info = cohort.exchange({"w": task.init(jax.random.key(1)), "own": own}, local)
    cohort.settle()
    return jax.device_get((result, info)), cohort, memory


@by_grid(*GRIDS)
def test_nobody_leaves_no_trace(lanes: int, devices: int) -> None:
    """Result, bytes, metrics and memory are those of the cohort without the members who are nobody."""
    ids = (2, -1, 0, 7, -1, 4)
    real = [place for place, i in enumerate(ids) if i >= 0]
    (with_, info), cohort, memory = trained(ids, lanes, devices)
    (without, plain_info), other, other_memory = trained([ids[p] for p in real], lanes, devices)
    same(with_, without, "the mean", rtol=1e-5)
    assert cohort.traffic() == other.traffic()
    assert cohort.traffic()[0]["own"] == 4 * 7 * len(real)
    assert cohort.done[0].examples == other.done[0].examples
    assert (info.reported, info.weight, info.nonfinite) == (4, plain_info.weight, 0)
    for name, value in plain_info.metrics.items():
        np.testing.assert_allclose(info.metrics[name], value, rtol=1e-5)
        np.testing.assert_allclose(info.clients[name][real], plain_info.clients[name], rtol=1e-5)
        assert np.isnan(np.delete(info.clients[name], real)).all()
    assert kept(memory) == kept(other_memory) == dict.fromkeys((2, 0, 7, 4), 1.0)
    assert cohort.sizes.tolist() == weights_of(ids).tolist()
    assert cohort.present.tolist() == [i >= 0 for i in ids]


def noisy() -> Average:
    """A sum with noise on it, which moves a server that nobody answers."""

    def done(total: Array, args: Tree, key: Array) -> Averaged:
        return Averaged(total + jax.random.normal(key, total.shape), jnp.ones(()), reported=jnp.int32(77))

    fold = Reduce(
        lambda reply, clients: jnp.zeros(reply.shape),
        lambda total, replies, weights, slots, args: total + weights @ replies,
        done,
        lambda client, reply: jnp.ones(()),
    )
    return Average("noisy", fold, runs_empty=True)


@pytest.mark.parametrize("ids", [(-1, -1, -1), (), COHORT], ids=["nobody", "no member", "some"])
@by_grid((1, 1), (2, 8))
def test_an_average_that_runs_empty_does(ids: tuple[int, ...], lanes: int, devices: int) -> None:
    e = engine(tiny_problem(), lanes=lanes, devices=devices)
    memory = Memory(lambda key, held: jnp.zeros(()), e.held)
    cohort = cohort_of(e, ids, round=3, memory=memory, average=noisy())
    result, info = cohort.exchange({"w": jnp.zeros(5)}, saying())
    cohort.settle()
    noise = np.asarray(jax.random.normal(key_for(e.root, "reduce", 3, 0), (7,)))
    expected = noise + (3 * TABLE[list(ids)].sum(axis=0) if -1 not in ids and ids else 0)
    np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-5)
    there = len(ids) if ids == COHORT else 0
    assert cohort.traffic() == ({"w": 20 * there}, {"message": 28 * there})
    assert int(info.reported) == 77 and float(info.weight) == 1.0, "as the average says"
    assert memory.count == there
    assert np.isnan(info.metrics["rows"]) == (there == 0)


def test_wrong_cohorts_are_refused() -> None:
    e = engine(tiny_problem())
    for ids in ((2, 2), (0, N), (0, -2), ((0, 1),)):
        with pytest.raises(
            ValueError, match=r"Expected the selected clients \(M,\) to be of 0 to 11, each once, or -1"
        ):
            Cohort(e, np.array(ids), 1, Memory(nothing, e.held))


def test_poisson_takes_each_client_by_itself() -> None:
    """Size and members as of independent coins, in a cohort of one size; over many rounds to five standard errors."""
    select, rng, rounds = poisson(0.3), np.random.default_rng(0), 4000
    population = Population(40, 10)
    drawn = [select(rng, (), population) for _ in range(rounds)]
    assert len({len(ids) for ids in drawn}) == 1
    taken = np.array([np.isin(np.arange(40), ids) for ids in drawn])
    assert all(np.sum(ids >= 0) == n for ids, n in zip(drawn, taken.sum(axis=1), strict=True)), "each once"
    error = 5 * math.sqrt(0.3 * 0.7 / rounds)
    assert np.abs(taken.mean(axis=0) - 0.3).max() < error
    pairs = np.corrcoef(taken.T)[np.triu_indices(40, 1)]
    assert np.abs(pairs).max() < 5 / math.sqrt(rounds)
    assert abs(taken.sum(axis=1).var() / (40 * 0.3 * 0.7) - 1) < 0.15
    share = np.mean([np.sum(poisson()(rng, (), population) >= 0) for _ in range(400)])
    assert abs(share - 10) < 5 * math.sqrt(40 * 0.25 * 0.75 / 400), "by default the cohort's share of all"
    with pytest.raises(ValueError, match=r"Expected 0 < rate=0 <= 1"):
        poisson(0)


# --- averages


def adaptive(target: float, rate: float, first: float) -> Average:
    """The mean of changes clipped to a norm that follows a quantile of the norms (Andrew et al., arXiv 1905.03871)."""

    def zero(reply: Tree, clients: int) -> Any:
        return jax.tree.map(lambda r: jnp.zeros(r.shape), reply), jnp.zeros(()), jnp.zeros(())

    def add(total: Any, replies: Tree, weights: Array, slots: Array, clip: Array) -> Any:
        square = sum((jnp.square(r).sum(axis=range(1, r.ndim)) for r in jax.tree.leaves(replies)), jnp.zeros(()))
        norm = jnp.sqrt(square)
        scale = weights * jnp.minimum(1.0, clip / jnp.maximum(norm, 1e-12))
        sums = jax.tree.map(lambda t, r: t + jnp.tensordot(scale, r, axes=1), total[0], replies)
        return sums, total[1] + weights.sum(), total[2] + jnp.where(norm <= clip, weights, 0.0).sum()

    def done(total: Any, clip: Array, key: Array) -> Averaged:
        sums, count, below = total
        return Averaged(jax.tree.map(lambda s: s / count, sums), count, seen=below / count)

    return Average(
        "adaptive",
        Reduce(zero, add, done, lambda client, reply: jnp.ones(())),
        init=lambda: jnp.float32(first),
        args=lambda clip, members: clip,
        next=lambda clip, share: clip * jnp.exp(-rate * (share - target)),
    )


@by_grid(*GRIDS)
def test_an_average_that_adapts_equals_a_loop(lanes: int, devices: int) -> None:
    average, e = adaptive(0.5, 0.4, 1.0), engine(tiny_problem(), lanes=lanes, devices=devices)
    local = saying(lambda message, client: wire.coded({"a": said(client)[:3], "b": said(client)[3:].reshape(2, 2)}))
    state, clip = average.init(), 1.0
    for round, ids in enumerate((COHORT, (1, 2, 4), (0, 11, 10, 8)), 1):
        cohort = cohort_of(e, ids, round, average=average, averaging=state, drops=(4,))
        result, info = cohort.exchange((), local)
        state = cohort.averaging
        rows = [round * TABLE[i].astype(np.float64) for i in ids if i != 4]
        norms = [np.linalg.norm(row) for row in rows]
        expected = np.mean([row * min(1, clip / norm) for row, norm in zip(rows, norms, strict=True)], axis=0)
        found = np.concatenate([np.asarray(result["a"]), np.asarray(result["b"]).reshape(-1)])
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
        clip *= math.exp(-0.4 * (np.mean([norm <= clip for norm in norms]) - 0.5))
        assert float(state) == pytest.approx(clip, rel=1e-5)
        assert (float(info.weight), int(info.reported)) == (len(rows), len(rows))


@pytest.mark.slow
def test_what_an_average_cannot_honour_is_refused() -> None:
    """Own folds, replies that are no changes, peers, one exchange too many; for a plain mean all of it is allowed."""
    e = engine(tiny_problem())
    line = Graph(np.zeros((6, 1), int), np.full((6, 1), 0.5, np.float32), np.full(6, 0.5, np.float32))
    peers = Peers(line, lambda memory, mixed, client: memory)
    value = saying(lambda message, client: {"c": wire.coded(said(client)), "v": wire.coded(said(client), change=False)})
    bare = saying(lambda message, client: {"c": wire.coded(said(client)), "v": said(client)})
    asked: list[tuple[str, dict[str, Any]]] = [
        (r"average='noisy' to fold all replies, but this algorithm brings the fold mean", {"reduce": mean()}),
        (r"brings the fold stack; choose dp=none", {"reduce": stack()}),
        (r"brings replies that go from peer to peer", {"link": peers}),
        (r"'v' is not marked by wire.coded\(..., change=True\)", {"local": value}),
        (r"'v' is not marked by wire.coded\(..., change=True\)", {"local": bare}),
    ]
    for words, options in asked:
        with pytest.raises(ValueError, match=words):
            cohort_of(e, average=noisy()).exchange(**{"message": (), "local": saying(), **options})
        cohort_of(e).exchange(**{"message": (), "local": saying(), **options})
    local = saying()
    for releases in (1, 2):
        cohort = cohort_of(e, average=noisy(), releases=releases)
        for _ in range(releases):
            cohort.exchange((), local)
        with pytest.raises(ValueError, match=rf"to fold {releases} exchanges a round, the algorithm's `releases`, not"):
            cohort.exchange((), local)


def test_a_question_without_an_answer_is_no_release() -> None:
    """An exchange whose clients reply nothing gives nothing away, whatever folds it."""
    e = engine(tiny_problem())
    cohort = cohort_of(e, average=noisy())
    asked = saying(lambda message, client: ())
    for _ in range(3):
        cohort.exchange({"w": jnp.zeros(2)}, asked, stack())
    cohort.exchange((), saying())
    assert cohort.traffic() == ({"w": 3 * 8 * 6}, {"message": 28 * 6})


# --- what was sent before


@by_grid(*SOME)
@pytest.mark.parametrize("name", ["none", "quantise(3)"])
def test_what_was_sent_before_costs_nothing_and_is_read_as_it_was_decoded(name: str, lanes: int, devices: int) -> None:
    codec = wire.codec(name)
    e = engine(tiny_problem(), lanes=lanes, devices=devices, down=codec)
    cohort = cohort_of(e)
    w, own = jnp.asarray(TABLE[0]), jnp.asarray(TABLE[:6])
    read = saying(lambda message, client: {"w": message["w"], "own": message["own"], "new": message["new"]})
    first = {"w": wire.coded(w, change=False), "own": wire.PerClient(wire.coded(own, change=False)), "new": jnp.ones(3)}
    one, _ = cohort.exchange(first, read, stack())
    before = cohort.traffic()[0]
    whole = 28 if codec is None else 3 + 8  # of a row
    assert before == {"w": 6 * whole, "own": 6 * whole, "new": 6 * 12}
    again = {"w": wire.again(w), "own": wire.again(wire.PerClient(own)), "new": jnp.zeros(2)}
    two, _ = cohort.exchange(again, read, stack())
    assert cohort.traffic()[0] == {**before, "new": before["new"] + 6 * 8}
    for part in ("w", "own"):
        np.testing.assert_array_equal(two.replies[part], one.replies[part])
    assert np.array_equal(np.asarray(two.replies["w"][0]), np.asarray(w)) == (codec is None)
    assert np.array_equal(np.asarray(two.replies["own"]), np.asarray(own)) == (codec is None)


def test_what_was_not_sent_is_refused() -> None:
    """Equal values are not enough: only the same object is known to have been sent, and only in this round."""
    e, local = engine(tiny_problem()), saying()
    w = jnp.arange(3.0)
    cohort = cohort_of(e)
    with pytest.raises(ValueError, match=r"array of wire.again to be one that this round has sent, .* of shape \(3,\)"):
        cohort.exchange({"w": wire.again(w)}, local)
    cohort.exchange({"w": w}, local)
    cohort.exchange({"w": wire.again(w)}, local)
    for other in (cohort, cohort_of(e)):
        with pytest.raises(ValueError, match=r"send it without wire\.again"):
            other.exchange({"w": wire.again(jnp.arange(3.0) if other is cohort else w)}, local)
    assert cohort.traffic()[0] == {"w": 6 * 12}


# --- codecs that keep something


def sparse(value: np.ndarray, share: float) -> np.ndarray:
    """The largest entries by absolute value, equal ones in order."""
    out = np.zeros_like(value)
    largest = np.argsort(-np.abs(value), kind="stable")[: math.ceil(share * value.size)]
    out[largest] = value[largest]
    return out


@by_grid(*GRIDS)
def test_error_feedback_of_changing_cohorts_equals_a_loop(lanes: int, devices: int) -> None:
    """Every client has a residual of its own; who drops out or is absent keeps it, and a reply that is lost is lost."""
    e = engine(tiny_problem(), lanes=lanes, devices=devices, up=wire.codec("topk(0.3)"))
    memory = Memory(nothing, e.held)
    local = saying(lambda message, client: wire.coded({"a": said(client)[:3], "b": said(client)[3:].reshape(2, 2)}))
    residual = {i: np.zeros(7, np.float32) for i in range(N)}
    for round, (ids, drops, absent) in enumerate(
        [(COHORT, (), ()), ((0, 2, 5, 8), (2,), ()), ((7, 2, 0, 8, 11), (8,), (0,)), ((2, 0, 8), (), ())], 1
    ):
        cohort = cohort_of(e, ids, round, memory, drops, absent)
        result, _ = cohort.exchange((), local)
        cohort.settle()
        total, weight, there = np.zeros(7), 0, [i for i in ids if i not in (*drops, *absent)]
        for i in there:
            whole = residual[i] + TABLE[i] * np.float32(round)
            sent = sparse(whole, 0.3)
            residual[i] = whole - sent
            total, weight = total + SIZES[i] * sent.astype(np.float64), weight + SIZES[i]
        found = np.concatenate([np.asarray(result["a"]), np.asarray(result["b"]).reshape(-1)])
        np.testing.assert_allclose(found, total / weight, rtol=1e-5, atol=1e-6)
        up = cohort.traffic()[1]
        assert sum(up.values()) == len(there) * (3 * 4 + math.ceil(3 * 3 / 8)), (
            "three entries, three bits for each place"
        )
        (store,) = memory.beside.values()
        for i, rows in kept(store).items():
            np.testing.assert_array_equal(
                np.concatenate([rows["a"], rows["b"].reshape(-1)]), residual[i], f"client {i}"
            )
    assert memory.count == 0 and set(kept(store)) == set(COHORT) | {5, 8, 11}


@pytest.mark.slow
def test_every_exchange_of_a_round_has_a_residual_of_its_own() -> None:
    """Two exchanges send different things; mixed up, one's rest would be added to the other's change."""
    e = engine(tiny_problem(), up=wire.codec("topk(0.3)"))
    memory, ids = Memory(nothing, e.held), (0, 7)
    first, second = (
        saying(),
        saying(lambda message, client: wire.coded(-2 * said(client)), passes=ONE._replace(stream="b")),
    )
    residual = {(i, turn): np.zeros(7, np.float32) for i in ids for turn in range(3)}
    for round in (1, 2):
        cohort = cohort_of(e, ids, round, memory)
        for turn, (local, factor) in enumerate(((first, 1), (first, 1), (second, -2))):
            result, _ = cohort.exchange((), local, stack())
            for place, i in enumerate(ids):
                whole = residual[i, turn] + np.float32(factor * round) * TABLE[i]
                np.testing.assert_array_equal(result.replies[place], sparse(whole, 0.3))
                residual[i, turn] = whole - sparse(whole, 0.3)
    assert len(memory.beside) == 3


def test_a_client_that_diverges_keeps_its_residual() -> None:
    e = engine(tiny_problem(), up=wire.codec("topk(0.3)"))
    memory, rest = Memory(nothing, e.held), {}
    broken = saying(lambda message, client: wire.coded(said(client) * jnp.where(client.id == 7, message, 1.0)))
    for round, factor in ((1, 1.0), (2, jnp.nan)):
        cohort = cohort_of(e, (0, 7), round, memory)
        cohort.exchange(jnp.float32(factor), broken)
        (store,) = memory.beside.values()
        rest[round] = {i: row[""] for i, row in kept(store).items()}
    np.testing.assert_array_equal(rest[2][7], rest[1][7])
    assert np.abs(rest[2][0] - rest[1][0]).max() > 0 and np.isfinite(rest[2][7]).all()


@pytest.mark.slow
def test_a_codec_draws_for_every_client_round_and_exchange_by_itself() -> None:
    """Errors of one draw for all would not cancel. The draws follow from the seed, not from lanes or devices."""
    local = saying(lambda message, client: wire.coded(jnp.ones(200)))
    found = {}
    for lanes, devices in ((1, 1), (3, 8)):
        e = engine(tiny_problem(), lanes=lanes, devices=devices, up=wire.codec("randomk(0.1)"))
        for round in (1, 2):
            cohort = cohort_of(e, (0, 7, 2), round)
            for turn in range(2):
                replies = np.asarray(cohort.exchange((), local, stack())[0].replies)
                for place, row in enumerate(replies != 0):
                    assert row.sum() == 20
                    np.testing.assert_array_equal(found.setdefault((round, turn, place), row), row)
    assert len({row.tobytes() for row in found.values()}) == len(found) == 12


def test_a_codec_that_finds_nothing_is_not_ignored() -> None:
    for option in ("up", "down"):
        e = engine(tiny_problem(), **{option: wire.codec("bfloat16")})
        cohort = cohort_of(e)
        cohort.exchange({"w": jnp.ones(2)}, saying(lambda message, client: said(client)))
        with pytest.raises(ValueError, match=rf"what codec_{option}='bfloat16' acts on; it marks nothing"):
            cohort.settle()


@by_grid(*SOME)
@pytest.mark.parametrize("name", ["none", "bfloat16", "topk(0.3)"])
def test_a_client_learns_what_the_server_decoded(name: str, lanes: int, devices: int) -> None:
    """`Local.sent` gets what `finish` kept and the decoded reply; who drops out learns nothing."""
    codec = wire.codec(name)
    e = engine(tiny_problem(), lanes=lanes, devices=devices, up=codec)
    memory = Memory(lambda key, held: (jnp.zeros(7), jnp.zeros(())), e.held)
    local = saying(
        memory=lambda message, client: (client.memory[0], client.memory[1] + 1),
        sent=lambda memory, reply, client: (reply, memory[1] + 10 * client.id.astype(jnp.float32)),
    )
    cohort = cohort_of(e, (0, 7, 4), memory=memory, drops=(4,))
    result, _ = cohort.exchange((), local, stack())
    cohort.settle()
    decode = {
        "none": lambda row: row,
        "bfloat16": lambda row: row.astype(jnp.bfloat16).astype(np.float32),
        "topk(0.3)": lambda row: sparse(row, 0.3),
    }[name]
    for place, i in enumerate((0, 7)):
        np.testing.assert_array_equal(result.replies[place], decode(TABLE[i]))
        np.testing.assert_array_equal(kept(memory)[i][0], decode(TABLE[i]))
        assert kept(memory)[i][1] == 1 + 10 * i
    assert not kept(memory)[4][0].any() and kept(memory)[4][1] == 0


# --- from peer to peer


def ring(members: int) -> Graph:
    at = np.arange(members)
    return Graph(
        np.stack([(at - 1) % members, (at + 1) % members], 1),
        np.full((members, 2), 0.25, np.float32),
        np.full(members, 0.5, np.float32),
    )


def dense(members: int) -> Graph:
    rng = np.random.default_rng(2)
    weight = rng.random((members, members)).astype(np.float32)
    weight /= 2 * weight.sum(axis=1, keepdims=True)
    return Graph(np.tile(np.arange(members), (members, 1)), weight, np.full(members, 0.5, np.float32))


def irregular(members: int) -> Graph:
    """From nobody to three, one of them twice and one itself; unused places have weight 0, and one weight is negative."""
    rng = np.random.default_rng(3)
    whom, weight = rng.integers(0, members, (members, 3)), rng.random((members, 3)).astype(np.float32)
    weight[rng.random((members, 3)) < 0.4] = 0
    weight[0], whom[0] = (0.3, 0.2, -0.1), (1, 1, 0)
    weight[1] = 0
    return Graph(whom, weight, (1 - weight.sum(axis=1, dtype=np.float64)).astype(np.float32))


def mixing(graph: Graph, there: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """W (M, M) among those who are there, and how often each one's reply travels; float64."""
    members = len(graph.own)
    w, travels = np.diag(graph.own.astype(np.float64)), np.zeros(members, int)
    for i in range(members):
        for k, whom in enumerate(graph.whom[i]):
            w[i, whom if there[whom] else i] += graph.weight[i, k]
            travels[whom] += there[i] and there[whom] and whom != i and graph.weight[i, k] != 0
    return w, travels


GRAPHS = {"ring": ring, "dense": dense, "irregular": irregular}
PEERS = (2, 0, 7, 4, 9, 1, 6, 5, 10, 11)


@pytest.mark.parametrize("devices", brief([1, 8, 2], 2))
@pytest.mark.parametrize("lanes", brief([16, 1]))
@pytest.mark.parametrize("name", GRAPHS)
def test_peers_hear_the_mixture(name: str, lanes: int, devices: int) -> None:
    """W Z in NumPy; the absent member 7 and member 9, who drops out, are heard by nobody and keep what they had."""
    graph = GRAPHS[name](len(PEERS))
    e = engine(tiny_problem(), lanes=lanes, devices=devices)
    memory = Memory(lambda key, held: (jnp.full((7,), -5.0), jnp.zeros(())), e.held)
    local = saying(
        lambda message, client: {"z": said(client), "two": said(client)[:4].reshape(2, 2)},
        lambda message, client: (client.memory[0], client.memory[1] + 1),
    )
    link = Peers(graph, lambda memory, mixed, client: (mixed["z"], memory[1] + 10 * client.id.astype(jnp.float32)))
    cohort = cohort_of(e, PEERS, memory=memory, absent=(7,), drops=(9,))
    rows, info = cohort.exchange({"w": jnp.zeros(3)}, local, stack(uniform), link=link)
    cohort.settle()
    there = ~np.isin(PEERS, (7, 9))
    w, travels = mixing(graph, there)
    mixed = w @ TABLE[list(PEERS)].astype(np.float64)
    for place, i in enumerate(PEERS):
        if there[place]:
            np.testing.assert_allclose(kept(memory)[i][0], mixed[place], rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(rows.replies["two"][place], mixed[place][:4].reshape(2, 2), rtol=1e-5, atol=1e-6)
            assert kept(memory)[i][1] == 1 + 10 * i
        else:
            assert (kept(memory)[i][0] == -5).all() and kept(memory)[i][1] == 0
            assert not np.asarray(rows.replies["z"][place]).any()
    assert np.asarray(rows.weight).tolist() == there.tolist()
    assert int(info.reported) == there.sum()
    down, up = cohort.traffic()
    assert down == {"w": 12 * (len(PEERS) - 1)}, "who drops out was sent the message"
    assert up == {"z": 28 * travels.sum(), "two": 16 * travels.sum()}
    assert cohort.peers() == {"transmissions": travels.sum(), "broadcast_bytes": 44 * (travels > 0).sum()}


@by_grid(*SOME)
def test_peers_pay_the_codec_for_each_that_hears(lanes: int, devices: int) -> None:
    """Ranks differ by client, so a reply's price does: each is paid as often as it travels."""
    graph = irregular(len(PEERS))
    e = engine(tiny_problem(), lanes=lanes, devices=devices, up=wire.codec("quantise(8)"))
    memory = Memory(lambda key, held: jnp.zeros(7), e.held)
    local = saying(lambda message, client: wire.kept(wire.coded(said(client)), client.id % 4, axis=0))
    cohort = cohort_of(e, PEERS, memory=memory)
    cohort.exchange((), local, link=Peers(graph, lambda memory, mixed, client: mixed))
    cohort.settle()
    w, travels = mixing(graph, np.ones(len(PEERS), bool))
    prices = np.array([i % 4 + 8 * (i % 4 > 0) for i in PEERS])  # nothing, and no scales, of rank 0
    assert cohort.traffic()[1] == {"message": prices @ travels}
    assert cohort.peers() == {"transmissions": travels.sum(), "broadcast_bytes": prices[travels > 0].sum()}
    values = np.stack([decoded_by(e, np.where(np.arange(7) < i % 4, TABLE[i], 0), i % 4) for i in PEERS])
    for place, i in enumerate(PEERS):
        np.testing.assert_allclose(kept(memory)[i], (w @ values)[place], rtol=1e-4, atol=1e-5)


def decoded_by(e: Lanes, row: np.ndarray, rank: int) -> np.ndarray:
    """What the engine's codec makes of the first entries of a row."""
    key = jax.random.key(0)
    tree = wire.coded(wire.kept(jnp.asarray(row), jnp.int32(rank), axis=0))
    return np.asarray(wire.unwrap(wire.arrive(tree, e.up, key, key)[0]))


@by_grid(*SOME)
def test_the_run_folds_what_peers_hear_as_it_folds_replies(lanes: int, devices: int) -> None:
    """Weights by examples, those of a fold of one's own, and a member without examples, who is heard all the same."""
    ids = (2, 0, 3, 4, 9, 1)  # 3 has no example
    graph, there = ring(6), np.ones(6, bool)
    e = engine(tiny_problem(), lanes=lanes, devices=devices)
    mixed = mixing(graph, there)[0] @ TABLE[list(ids)].astype(np.float64)
    local, link = saying(lambda message, client: said(client)), Peers(graph, lambda memory, mixed, client: memory)
    own = mean(lambda client, reply: jnp.square(reply[0]))
    for average, reduce, weights in (
        (plain(by_examples), None, weights_of(ids)),
        (plain(uniform), None, weights_of(ids) > 0),
        (plain(), own, np.square(mixed[:, 0])),
    ):
        result, info = cohort_of(e, ids, average=average).exchange((), local, reduce, link=link)
        np.testing.assert_allclose(result, np.average(mixed, axis=0, weights=weights), rtol=1e-5, atol=1e-6)
        assert float(info.weight) == pytest.approx(weights.sum(), rel=1e-5)
        assert int(info.reported) == 6


def test_a_reply_that_is_not_finite_is_heard_by_nobody() -> None:
    ids, graph = (2, 0, 7, 4), ring(4)
    e = engine(tiny_problem(), devices=2)
    memory = Memory(lambda key, held: jnp.full((7,), -5.0), e.held)
    local = saying(lambda message, client: jnp.where(client.id == 0, jnp.nan, said(client)))
    cohort = cohort_of(e, ids, memory=memory)
    _, info = cohort.exchange((), local, link=Peers(graph, lambda memory, mixed, client: mixed))
    cohort.settle()
    mixed = mixing(graph, np.array(ids) != 0)[0] @ TABLE[list(ids)].astype(np.float64)
    for place, i in enumerate(ids):
        np.testing.assert_allclose(kept(memory)[i], np.full(7, -5) if i == 0 else mixed[place], rtol=1e-5, atol=1e-6)
    assert (int(info.reported), int(info.nonfinite)) == (3, 1)


def test_the_time_of_a_member_is_that_of_what_it_hears_and_is_heard_by() -> None:
    graph, rng = irregular(len(PEERS)), np.random.default_rng(4)
    e = engine(tiny_problem())
    c = network.reliable(np.array(PEERS))
    links = {n: rng.uniform(1e3, 1e4, len(PEERS)) for n in ("download", "upload")}
    c = c._replace(**links, latency=rng.random(len(PEERS)), timed=True, present=np.array(PEERS) != 7)
    cohort = Cohort(e, np.array(PEERS), 1, Memory(nothing, e.held), c)
    cohort.exchange({"w": jnp.zeros(3)}, saying(), link=Peers(graph, lambda memory, mixed, client: memory))
    travels = mixing(graph, c.present)[1]
    hears = [
        sum(
            w != 0 and c.present[j] and c.present[i] and i != j
            for w, j in zip(graph.weight[i], graph.whom[i], strict=True)
        )
        for i in range(len(PEERS))
    ]
    expected = 2 * c.latency + 8 * (12 + 28 * np.array(hears)) / c.download + 8 * 28 * travels / c.upload
    found = cohort.done[0].outcome
    np.testing.assert_allclose(found.communication[c.present], expected[c.present])
    assert found.seconds == pytest.approx(expected[c.present].max())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"own": np.full(6, 0.4)}, r"own and weight of member 0 to sum to 1, not 0.9"),
        ({"own": np.full(6, np.nan)}, r"own and weight of member 0 to sum to 1, not nan"),
        ({"whom": np.full((6, 2), 6)}, r"places in the cohort, 0 to 5, got 6 for member 0; give places, not ids"),
        ({"whom": np.full((6, 2), -1)}, r"got -1 for member 0"),
        ({"whom": np.zeros((6, 2))}, r"places in the cohort"),
        (
            {"whom": np.zeros((6, 3), int)},
            r"whom and weight \(M, k\) and own \(M,\), got \(6, 3\), \(6, 2\) and \(6,\)",
        ),
        ({"own": np.full(5, 0.5)}, r"got \(6, 2\), \(6, 2\) and \(5,\); give a row for each member"),
    ],
)
def test_wrong_graphs_are_refused(change: dict[str, Any], words: str) -> None:
    e = engine(tiny_problem())
    link = Peers(ring(6)._replace(**change), lambda memory, mixed, client: memory)
    with pytest.raises(ValueError, match=words):
        cohort_of(e).exchange((), saying(), link=link)


# --- folds of rows


def median() -> Reduce:
    """The median of the replies that counted, entry by entry: needs all of them."""
    rows = stack(uniform)

    def done(total: Any, args: Tree, key: Array) -> Array:
        return jnp.nanmedian(jnp.where(total.weight[:, None] > 0, total.replies, jnp.nan), axis=0) + args

    return rows._replace(done=done)


@pytest.mark.parametrize("devices", brief([8, 1, 2]))
@pytest.mark.parametrize("lanes", [1, 16])
def test_rows_come_in_the_cohorts_order(lanes: int, devices: int) -> None:
    e = engine(tiny_problem(), lanes=lanes, devices=devices)
    ids = (*PEERS, -1, 3)
    local = saying(lambda message, client: said(client))
    counted = [i for i in ids if i not in (-1, 3, 9)]
    found, _ = cohort_of(e, ids, drops=(9,)).exchange((), local, median(), args=jnp.float32(100))
    np.testing.assert_allclose(found, 100 + np.median(TABLE[counted], axis=0), rtol=1e-6)
    pair, info = cohort_of(e, ids, drops=(9,)).exchange((), local, both(median(), stack()), args=(jnp.float32(1), ()))
    np.testing.assert_allclose(pair[0], 1 + np.median(TABLE[counted], axis=0), rtol=1e-5)
    expected = np.where(np.isin(ids, counted)[:, None], TABLE[list(ids)], 0)
    np.testing.assert_array_equal(pair[1].replies[np.array(ids) != 3], expected[np.array(ids) != 3])
    assert np.asarray(pair[1].weight).tolist() == [float(i in counted) for i in ids], "weighted as the first one weighs"
    assert float(info.weight) == len(counted)


@by_grid(*GRIDS)
def test_two_folds_of_one_reply(lanes: int, devices: int) -> None:
    """Each as alone, at one price; where their weights differ the first one's count."""
    e = engine(tiny_problem(), lanes=lanes, devices=devices)
    square = mean(by_examples)
    square = square._replace(
        add=lambda total, replies, weights, slots, args: mean().add(total, replies**2 + args, weights, slots, ())
    )
    local = saying(lambda message, client: said(client))
    cohort = cohort_of(e)
    (first, second), _ = cohort.exchange((), local, both(mean(uniform), square), args=((), jnp.float32(1)))
    rows = TABLE[list(COHORT)].astype(np.float64)
    np.testing.assert_allclose(first, rows.mean(axis=0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(second, (rows**2 + 1).mean(axis=0), rtol=1e-5)
    assert cohort.traffic()[1] == {"message": 6 * 28}
    assert cohort.peers() is None


def test_rows_and_sums_do_not_go_together() -> None:
    with pytest.raises(ValueError, match="Expected both folds to keep rows, or none; take stack"):
        both(stack(), mean())


# --- several exchanges


@by_grid(*GRIDS)
@pytest.mark.parametrize("steps", [None, 3], ids=["same places", "other places"])
def test_memory_between_exchanges_is_the_same_on_the_device_and_through_the_host(
    steps: int | None, lanes: int, devices: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the second exchange has every member in the place of the first, its memory is not fetched and sent again."""
    gathered: list[int] = []
    gather = Memory.gather
    monkeypatch.setattr(Memory, "gather", lambda store, ids: gathered.append(1) or gather(store, ids))
    e = engine(tiny_problem(), lanes=lanes, devices=devices)
    first = saying(memory=lambda message, client: client.memory * 2 + said(client))
    second = saying(
        lambda message, client: wire.coded(client.memory),
        lambda message, client: client.memory + message,
        ONE if steps is None else Passes(1, steps, 4),
    )
    found = []
    for through_host in (False, True):
        memory = Memory(lambda key, held: jnp.full((7,), 3.0), e.held)
        for round, ids in enumerate((COHORT, (0, 7, 5, 8, 11, 2)), 1):
            cohort = cohort_of(e, ids, round, memory, drops=(7,))
            cohort.exchange((), first)
            if through_host:
                cohort._rows = None
            gathered.clear()
            before = cohort.done[0].outcome.reports.copy()
            result, _ = cohort.exchange(jnp.float32(round), second)
            if not through_host and steps is None and lanes * devices >= len(ids):
                assert not gathered, "all members stay where they are"
            assert cohort.reports.tolist() == before.tolist()
            cohort.settle()
        found.append((np.asarray(result), kept(memory)))
    jax.tree.map(np.testing.assert_array_equal, *found)
    rows = {i: np.full(7, 3.0) for i in range(N)}
    for round, ids in enumerate((COHORT, (0, 7, 5, 8, 11, 2)), 1):
        there = [i for i in ids if i != 7]
        for i in there:
            rows[i] = rows[i] * 2 + round * TABLE[i]
        mean_ = np.average([rows[i] for i in there], axis=0, weights=weights_of(there))
        for i in there:
            rows[i] = rows[i] + round
    np.testing.assert_allclose(found[0][0], mean_, rtol=1e-5)
    for i, row in found[0][1].items():
        np.testing.assert_allclose(row, rows[i], rtol=1e-5, err_msg=f"client {i}")


def drawing(passes: Passes) -> Local:
    """Replies with the client's own draw and the order in which it saw its rows; (2,)."""
    return Local(
        lambda held, message, client, batch: jnp.zeros(()),
        lambda held, message, carry, batch: (3 * carry + (batch.x[:, 0] * batch.mask).sum(), {}),
        lambda held, message, carry, client: (jnp.stack([jax.random.uniform(client.key), carry]), (), {}),
        passes,
    )


@by_grid(*SOME)
def test_a_stream_draws_the_same_whatever_others_do(lanes: int, devices: int) -> None:
    """Keys and orders of rows follow from the stream and its own count of exchanges."""
    e = engine(tiny_problem(), lanes=lanes, devices=devices)
    one, other = (drawing(Passes(1, None, 4, stream=name)) for name in ("", "b"))
    again = drawing(Passes(1, None, 4, stream="b"))

    def drawn(*locals_: Local) -> list[np.ndarray]:
        cohort = cohort_of(e, ids=(2, 0, 7, 4))
        return [np.asarray(cohort.exchange((), local, stack())[0].replies) for local in locals_]

    alone, next_ = drawn(other, again)
    first, behind, last = drawn(one, other, again)
    np.testing.assert_array_equal(behind, alone)
    np.testing.assert_array_equal(last, next_)
    np.testing.assert_array_equal(drawn(other, one)[1], first)
    for a, b in ((first, behind), (behind, last)):
        assert not (a == b).any(), "another stream or turn draws other numbers"


@pytest.mark.slow
def test_groups_do_not_draw_the_same() -> None:
    """Several engines of one cohort: what they draw differs by the group's name."""
    found = []
    for group in ("", "a", "b", "a"):
        e = engine(tiny_problem(), group=group)
        replies = cohort_of(e, ids=(2, 0, 7, 4)).exchange((), drawing(ONE), stack())[0].replies  # of several rows each
        found.append(np.asarray(replies))
    np.testing.assert_array_equal(found[1], found[3])
    assert not (found[0] == found[1]).any() and not (found[1] == found[2]).any()


# --- rows of one's own


def chosen(labels: np.ndarray, rng: np.random.Generator) -> Any:
    """Blocks of four rows: at random, one class at a time, with holes anywhere; and a block of holes."""
    for label in np.unique(labels):
        rows = rng.permutation(np.flatnonzero(labels == label))[:7]
        block = np.full((2, 4), -1)
        block.reshape(-1)[rng.choice(8, len(rows), replace=False)] = rows
        yield block
    while True:
        yield np.full((1, 4), -1)


@by_grid(*GRIDS)
@pytest.mark.parametrize("resident", ["on", "off"])
def test_clients_that_choose_their_rows_equal_a_loop(resident: str, lanes: int, devices: int) -> None:
    """Holes, steps without a row, a client without examples, and one that takes no step."""
    problem, ids = tiny_problem(), (2, 0, 7, 3, 1, 9)
    passes = Passes(steps=lambda labels: len(labels) // 3, batch_size=4, rows=chosen, stream="mine")
    task = tiny_task(lr=lambda client, message: jnp.float32(0.1))

    def loss(held: Tree, params: Any, batch: Batch) -> Any:
        value, metrics = task.loss(held, params, batch)
        return value, {**metrics, "steps": jnp.ones(())}

    base = fit(loss, task.optimizer, task.lr, passes)

    def finish(held: Tree, message: Tree, carry: Any, client: Client) -> Any:
        reply, _, _ = base.finish(held, message, carry, client)
        return {"c": wire.unmarked(reply), "key": jax.random.uniform(client.key)}, client.steps, {}

    local, params = base._replace(finish=finish), task.init(jax.random.key(1))
    e = engine(problem, lanes=lanes, devices=devices, segment_steps=3, resident=resident)
    memory = Memory(lambda key, held: jnp.zeros((), jnp.int32), e.held)
    cohort = cohort_of(e, ids, 2, memory)
    for turn in range(2):
        found, _ = cohort.exchange(params, local, stack(lambda client, reply: jnp.ones(())))
        rows = [visits(problem, passes, i, 2, exchange=turn) for i in ids]
        for place, i in enumerate(ids):
            reply, steps = one_client(problem, local, params, jnp.int32(0), i, 2, exchange=turn)
            assert int(steps) == SIZES[i] // 3 == len(rows[place])
            same(jax.tree.map(lambda r, p=place: r[p], found.replies), reply, f"client {i}", rtol=1e-5)
        assert cohort.done[turn].examples == sum(int((r >= 0).sum()) for r in rows)
    cohort.settle()
    assert kept(memory) == {i: SIZES[i] // 3 for i in ids}
    assert any((r < 0).all(axis=1).any() for r in rows) and not len(rows[3]) and not len(rows[4]), "or nothing is shown"


# --- finishing


@pytest.mark.slow
@pytest.mark.parametrize("name", ["none", "topk(0.2)"])
def test_lanes_that_end_together_or_apart_reply_the_same(name: str) -> None:
    """Twelve clients of 0 to 40 examples: in 16 lanes few end at a time, in one lane one does; two rounds, real training."""
    task = tiny_task(passes=Passes(2, None, 4), lr=lambda client, message: jnp.float32(0.1))
    base = fit(task.loss, task.optimizer, task.lr, task.passes)

    def finish(held: Tree, message: Tree, carry: Any, client: Client) -> Any:
        reply, _, _ = base.finish(held, message, carry, client)
        return reply, client.memory + 1.0, {"visits": client.memory + 1.0}

    local, found = base._replace(finish=finish), []
    for lanes, devices in ((1, 1), (16, 1), (12, 2)):
        e = engine(tiny_problem(), lanes=lanes, devices=devices, up=wire.codec(name))
        memory, params = Memory(lambda key, held: jnp.zeros(()), e.held), task.init(jax.random.key(1))
        for round in (1, 2):
            cohort = cohort_of(e, range(N), round, memory, drops=(5,))
            change, info = cohort.exchange(params, local)
            cohort.settle()
            params = jax.tree.map(jnp.add, params, change)
        rows = {f"{at}": r for at, r in kept(memory).items()}
        rests = {f"{at}": r for store in memory.beside.values() for at, r in kept(store).items()}
        metrics = {n: np.nan_to_num(np.asarray(m)) for n, m in info.clients.items()}
        found.append(((params, rows, rests, metrics), cohort.traffic(), int(info.reported)))
    for other in found[1:]:
        same(found[0][0], other[0], "lanes", rtol=1e-5)
        assert other[1:] == found[0][1:]
    assert found[0][2] == N - 1
