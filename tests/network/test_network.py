"""Clients that are absent, drop out or are slow: closed forms, bytes by hand, and runs that nothing of it changes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fedsim
from fedsim import core, network, randomness, record, wire
from fedsim.algorithms import ALGORITHMS
from fedsim.config import RELIABLE, Config, Speed
from fedsim.core import Algorithm, Passes, Population, Task
from fedsim.engine import plan
from fedsim.engine.client_memory import Memory
from fedsim.engine.cohort import Cohort
from fedsim.engine.keys import key_for
from fedsim.folds import plain
from fedsim.record import Run
from fedsim.simulation import build, simulate
from fedsim.testing.contract import same
from fedsim.testing.tasks import tiny_task
from fedsim.testing.toys import COHORT, SIZES, engine, one_client, tiny_problem
from fedsim.training.local import fit

pytestmark = pytest.mark.usefixtures("compile_once")

MANY = np.arange(200_000)
SPEED = Speed(devices=1, lanes=2, compilation_cache=False)
TIMES = {"seconds", "compile_seconds", "clients_per_second", "examples_per_second", "flops_per_second", "mfu"}
TIMES |= {"most_memory", "server_seconds"}


def settled(**options: Any) -> network.Conditions:
    """Conditions of clients with these arrays; the rest is free."""
    members = len(next(v for v in options.values() if np.ndim(v)))
    given = {k: np.asarray(v) if np.ndim(v) else v for k, v in options.items()}
    return network.reliable(np.arange(members))._replace(**given)


def met(conditions: network.Conditions, steps: Any, down: int = 0, up: int = 0, left: float | None = None) -> Any:
    members = len(conditions.present)
    limit = conditions.deadline if left is None else left
    return network.outcome(
        conditions, conditions.present, np.full(members, down), np.full(members, up), np.asarray(steps), limit
    )


# --- laws


@pytest.mark.parametrize(
    ("text", "cdf"),
    [
        ("uniform(5, 50)", lambda x: (x - 5) / 45),
        ("lognormal(median=20, sigma=0.5)", lambda x: 0.5 * (1 + math.erf(math.log(x / 20) / 0.5 / math.sqrt(2)))),
    ],
)
def test_a_law_has_its_distribution(text: str, cdf: Callable[[float], float]) -> None:
    """Kolmogorov's distance of 200,000 clients' values: above 2 / sqrt(n) by a chance of 0.0007, and the seed is fixed."""
    values = np.sort(network.law(text, "download", 0)(MANY))
    expected = np.array([cdf(x) for x in values[::100]])
    assert np.abs(expected - np.arange(0, len(MANY), 100) / len(MANY)).max() < 2 / math.sqrt(len(MANY))


def test_constants_and_choices() -> None:
    assert network.law("20", "download", 0)(MANY[:3]).tolist() == [20.0, 20.0, 20.0]
    values, counts = np.unique(network.law("choice(5, 20, 100)", "download", 0)(MANY), return_counts=True)
    assert values.tolist() == [5, 20, 100] and np.abs(counts / len(MANY) - 1 / 3).max() < 0.005


def test_a_client_keeps_its_value_whoever_is_beside_it_and_options_do_not_share_numbers() -> None:
    law = network.law("uniform(1, 2)", "download", 7)
    assert law(np.array([5, 3])).tolist() == law(np.array([3, 9, 5]))[[2, 0]].tolist()
    other = network.law("uniform(1, 2)", "upload", 7)
    assert abs(np.corrcoef(law(MANY), other(MANY))[0, 1]) < 0.01
    assert (network.law("uniform(1, 2)", "download", 8)(MANY) != law(MANY)).all()


@settings(max_examples=30)
@given(st.integers(0, 2**32 - 1), st.integers(1, 10_000), st.floats(0.05, 0.95))
def test_bernoulli_availability_and_dropout_have_their_shares(seed: int, round: int, p: float) -> None:
    fleet = build.fleet(Config(availability=f"bernoulli(p={p})", dropout=p, seed=seed))
    found = network.conditions(fleet, MANY[:20_000], round)
    band = 6 * math.sqrt(p * (1 - p) / 20_000)
    assert abs(found.present.mean() - p) < band and not (found.drops & ~found.present).any()
    assert abs(found.drops[found.present].mean() - p) < band / math.sqrt(p)


def test_the_diurnal_wave_has_its_peak_and_its_low_and_a_phase_for_each_client() -> None:
    fleet = build.fleet(Config(availability="diurnal(period=10, peak=0.9, low=0.1)"))
    there = np.array([fleet.available(MANY[:20_000], round) for round in range(1, 41)])
    assert np.abs(there.mean(axis=1) - 0.5).max() < 0.02, "phases are spread over the period"
    phase = randomness.chance(0, "phase", MANY[:20_000])
    at = (np.arange(1, 41)[:, None] / 10 - phase) % 1
    for lower in np.arange(0, 1, 0.1):  # by the clients' own time of day
        here = (at >= lower) & (at < lower + 0.1)
        assert there[here].mean() == pytest.approx(0.5 + 0.4 * math.cos(2 * math.pi * (lower + 0.05)), abs=0.02)


# --- who is asked


def test_everybody_available_is_the_draw_of_before() -> None:
    rng = lambda: np.random.default_rng(3)  # noqa: E731 - twice the same stream
    assert core.draw(rng(), (), Population(50, 7)).tolist() == rng().choice(50, 7, replace=False).tolist()


def test_a_cohort_is_drawn_evenly_from_who_is_there() -> None:
    available = lambda ids: ids % 3 == 0  # noqa: E731 - one expression, used twice
    rng, counts = np.random.default_rng(0), np.zeros(30)
    for _ in range(4000):
        ids = core.draw(rng, (), Population(30, 4, available))
        assert len(set(ids.tolist())) == 4 and available(ids).all()
        counts[ids] += 1
    np.testing.assert_allclose(counts[::3], 1600, atol=5 * 40)
    assert counts.sum() == counts[::3].sum()


def test_absent_clients_fill_a_cohort_and_a_large_population_is_not_looked_through() -> None:
    ids = core.draw(np.random.default_rng(0), (), Population(20, 6, lambda ids: ids < 2))
    assert len(set(ids.tolist())) == 6 and sorted(ids[:2].tolist()) == [0, 1]
    looked = []
    available = lambda ids: looked.append(len(ids)) or ids % 2 == 0  # noqa: E731 - one expression
    assert len(core.draw(np.random.default_rng(0), (), Population(10**9, 10, available))) == 10
    assert sum(looked) <= 10 * 2 * 7


# --- one exchange in closed form


def test_time_is_two_latencies_two_messages_and_the_steps() -> None:
    c = settled(download=[8e6, 16e6], upload=[4e6, 8e6], latency=[0.05, 0.1], compute=[2.0, 5.0], timed=True)
    found = met(c, [6, 10], down=10**6, up=2 * 10**6)
    np.testing.assert_allclose(found.communication, [0.1 + 1 + 4, 0.2 + 0.5 + 2])
    np.testing.assert_allclose(found.computation, [3.0, 2.0])
    assert found.seconds == pytest.approx(8.1) and found.reports.all() and found.steps.tolist() == [6, 10]
    line = network.figures(c, [found], total=10.0)
    assert line["seconds"] == pytest.approx(8.1) and line["total_seconds"] == pytest.approx(18.1)
    assert line["communication_seconds"] == pytest.approx((5.1 + 2.7) / 2) and line["computation_seconds"] == 2.5
    assert line["granularity"] == pytest.approx(5 / 7.8) and line["stragglers"] == 0


def test_late_clients_are_left_out_or_report_what_fits() -> None:
    c = settled(compute=[1.0, 1.0, 1.0, 1.0], latency=[0.5, 0.5, 0.5, 3.0], deadline=5.0, timed=True)
    found = met(c, [4, 5, 100, 1])
    assert found.reports.tolist() == [True, False, False, False] and found.steps.tolist() == [4, 0, 0, 0]
    assert found.late.tolist() == [False, True, True, True] and found.seconds == 5.0
    found = met(c._replace(partial=True), [4, 5, 100, 1])
    assert found.steps.tolist() == [4, 4, 4, 0] and found.reports.tolist() == [True, True, True, False]
    assert found.late.tolist() == [False, True, True, True]
    assert network.figures(c, [found], 0.0)["stragglers"] == 0.75


def test_the_first_to_report_count_and_ties_go_by_place() -> None:
    c = settled(compute=[1.0, 4.0, 2.0, 4.0, 1.0], wanted=3, timed=True)
    found = met(c, [4] * 5)
    assert found.reports.tolist() == [False, True, True, True, False] and found.seconds == 2.0
    assert found.surplus.tolist() == [True, False, False, False, True]
    found = met(c._replace(drops=np.array([False, True, False, False, False])), [4] * 5)
    assert found.reports.tolist() == [True, False, True, True, False] and found.seconds == 4.0
    untimed = network.reliable(np.arange(4))._replace(wanted=3)
    assert met(untimed, [1] * 4).reports.tolist() == [True, True, True, False]


def test_a_drop_out_is_noticed_when_the_message_is_there_or_at_the_deadline() -> None:
    c = settled(drops=[True, False], download=[8e6, 8e6], compute=[1.0, 10.0], latency=[4.0, 0.0], timed=True)
    assert met(c, [10, 10], down=10**6).seconds == 5.0
    assert met(c._replace(deadline=30.0), [10, 10], down=10**6).seconds == 30.0
    nobody = met(c._replace(drops=np.array([True, True])), [10, 10], down=10**6)
    assert not nobody.reports.any() and nobody.seconds == 5.0
    line = network.figures(c, [nobody], 0.0)
    assert line["communication_seconds"] is None and line["granularity"] is None


@settings(max_examples=100)
@given(st.data())
def test_outcomes_keep_their_rules(data: st.DataObject) -> None:
    """Every invited client is in exactly one place, nobody reports late work in full, and no round passes its deadline."""
    members = data.draw(st.integers(1, 6))
    rows = lambda what: np.array(data.draw(st.lists(what, min_size=members, max_size=members)))  # noqa: E731 - a word
    number = st.one_of(st.just(math.inf), st.floats(0.01, 100))
    c = network.Conditions(
        present := rows(st.booleans()), present & rows(st.booleans()), rows(number), rows(number),
        rows(st.floats(0, 2)), rows(number), data.draw(st.integers(1, members)), data.draw(number),
        data.draw(st.booleans()), True, int((~present).sum()),
    )  # fmt: skip
    steps = rows(st.integers(0, 20))
    found = met(c, steps, down=data.draw(st.integers(0, 100)), up=data.draw(st.integers(0, 100)))
    out = c.drops | found.surplus | (found.late & ~found.reports)
    assert (out.astype(int) + found.reports == present).all()
    assert found.reports.sum() <= c.wanted and (found.steps <= steps).all() and 0 <= found.seconds <= c.deadline
    whole = found.reports & ~found.late
    assert (found.steps[~found.reports] == 0).all() and (found.steps[whole] == steps[whole]).all()
    took = found.communication + found.steps / c.compute
    assert (took[found.reports] <= c.deadline * (1 + 1e-12) + 1e-12).all()


# --- training


def exchange(
    conditions: network.Conditions, make: Callable[[Task], Algorithm] = ALGORITHMS["fed_avg"], **options: Any
) -> Any:
    """One round of the tiny problem from a memory of ones."""
    lanes, algorithm = engine(tiny_problem(), **options), make(tiny_task(passes=Passes(2, None, 4)))
    memory = Memory(algorithm.memory, lanes.held)
    server = lanes.put(algorithm.init(key_for(lanes.root, "init"), lanes.held))
    cohort = Cohort(lanes, np.array(COHORT), 1, memory, conditions)
    after, metrics = algorithm.round(key_for(lanes.root, "server", 1), lanes.held, server, cohort)
    return server, after, cohort, jax.device_get(metrics)


def counter(task: Task) -> Algorithm:
    """FedAvg whose clients count their visits."""
    local = fit(
        task.loss,
        task.optimizer,
        task.lr,
        task.passes,
        reply=lambda carry, message, client: (carry.params, client.memory + 1),
    )

    def round(key: Any, held: Any, server: Any, cohort: Any) -> Any:
        result, info = cohort.exchange(server, local)
        return result, info.metrics

    return Algorithm(
        lambda key, held: task.init(key),
        round,
        lambda *a: task.logits(a[0], a[1], a[3]),
        lambda key, held: jnp.zeros(()),
    )


def test_bytes_and_memory_of_absent_and_dropped_clients() -> None:
    """By hand: the absent one is sent nothing; the one that drops out is sent the message and keeps its memory."""
    present, drops = np.ones(6, bool), np.zeros(6, bool)
    present[1], drops[4] = False, True
    server, _, cohort, _ = exchange(settled(present=present, drops=drops), counter)
    one = sum(wire.price(server).values())
    down, up = cohort.traffic()
    assert sum(down.values()) == 5 * one and sum(up.values()) == 4 * one
    assert cohort.reports.tolist() == [True, False, True, True, False, True]
    rows, seen = cohort.memory.gather(np.array(COHORT))
    assert rows[seen].tolist() == [1, 0, 1, 1, 0, 1] and seen.all()
    assert cohort.done[0].examples == sum(2 * SIZES[COHORT[i]] for i in (0, 2, 3, 5)), "nobody else trains"


def test_own_parts_are_paid_for_who_is_there() -> None:
    message = {
        "w": wire.PerClient(jnp.ones((6, 3))),
        "b": wire.Packet(jnp.zeros(2), jnp.arange(1, 7, dtype=jnp.uint32)),
    }
    local = core.Local(
        lambda held, message, client, batch: message["w"].sum(),
        lambda held, message, carry, batch: (carry, {}),
        lambda held, message, carry, client: (carry, (), {}),
        Passes(1, None, 4),
    )
    lanes = engine(tiny_problem())
    there = settled(present=np.array([True, False, True, True, True, False]))
    cohort = Cohort(lanes, np.array(COHORT), 1, Memory(lambda key, held: (), lanes.held), there)
    cohort.exchange(message, local)
    assert cohort.traffic()[0] == {"w": 4 * 12, "b": 1 + 3 + 4 + 5}


def test_who_left_in_the_first_exchange_is_not_sent_the_second() -> None:
    local = core.Local(
        lambda held, message, client, batch: jnp.zeros(()),
        lambda held, message, carry, batch: (carry, {}),
        lambda held, message, carry, client: (carry, (), {}),
        Passes(1, None, 4),
    )
    lanes = engine(tiny_problem())
    slow = settled(compute=[1.0, 1.0, 9.0, 9.0, 9.0, 9.0], deadline=2.0, timed=True)._replace(
        drops=np.array([False, False, False, False, False, True])
    )
    cohort = Cohort(lanes, np.array(COHORT), 1, Memory(lambda key, held: (), lanes.held), slow)
    cohort.exchange({"w": jnp.zeros(5)}, local)
    reported = int(cohort.reports.sum())
    steps = plan.steps_of(np.array([SIZES[i] for i in COHORT]), local.passes)
    assert cohort.reports.tolist() == [
        bool(s <= 2 * v) and i != 5 for i, (s, v) in enumerate(zip(steps, slow.compute, strict=True))
    ]
    assert 0 < reported < 5
    cohort.exchange({"w": jnp.zeros(5)}, local)  # the first one lasted until the deadline
    assert not cohort.reports.any() and cohort.traffic() == ({"w": 20 * (6 + reported)}, {"message": 4 * reported})


@pytest.mark.slow
def test_partial_work_equals_a_loop_with_fewer_steps() -> None:
    """Each reply alone, batch by batch, over the steps that fit; weights stay the numbers of examples."""
    speeds = np.array([3.0, 1.0, 2.0, 50.0, 1.0, 0.1])
    server, after, cohort, _ = exchange(settled(compute=speeds, deadline=1.0, partial=True, timed=True), lanes=3)
    full = plan.steps_of(np.array([SIZES[i] for i in COHORT]), Passes(2, None, 4))
    expected = np.minimum(full, speeds.astype(int))
    assert cohort.done[0].outcome.steps.tolist() == expected.tolist() and not cohort.reports[-1]
    assert 0 < expected[1] < full[1], "or nothing is partial here"
    task, problem = tiny_task(passes=Passes(2, None, 4)), tiny_problem()
    replies, weights = [], []
    for id, steps in zip(COHORT, expected, strict=True):
        if steps == 0:
            continue
        own = fit(task.loss, task.optimizer, task.lr, task.passes)
        stop = int(steps)
        local = own._replace(
            step=lambda held, message, carry, batch, own=own, stop=stop: jax.tree.map(
                lambda new, old: jnp.where(batch.step < stop, new, old),
                own.step(held, message, carry, batch),
                (carry, own.step(held, message, carry, batch)[1]),
            )
        )
        replies.append(wire.unmarked(one_client(problem, local, server.params, (), id, 1)[0]))
        weights.append(SIZES[id])
    change = jax.tree.map(lambda *r: sum(w * x for w, x in zip(weights, r, strict=True)) / sum(weights), *replies)
    same(after.params, jax.tree.map(jnp.add, server.params, change), "partial work", rtol=1e-5)


def test_after_round_one_nothing_compiles_whoever_is_there(compiles: list[str]) -> None:
    lanes, task = engine(tiny_problem()), tiny_task()
    algorithm = ALGORITHMS["fed_avg"](task)
    memory = Memory(algorithm.memory, lanes.held)
    server = lanes.put(algorithm.init(key_for(lanes.root, "init"), lanes.held))
    config = Config(
        clients=12, clients_per_round=4, over_selection=1.5, availability="bernoulli(p=0.4)", dropout=0.3,
        compute="lognormal(1, 1)", deadline=1.5, late="partial", download="10",
    )  # fmt: skip
    fleet = build.fleet(config)
    seen = set()
    for round in range(1, 7):
        population = Population(12, 6, network.reachable(fleet, round))
        ids = core.draw(np.random.default_rng(round), server, population)
        cohort = Cohort(lanes, ids, round, memory, network.conditions(fleet, ids, round))
        server, metrics = algorithm.round(key_for(lanes.root, "server", round), lanes.held, server, cohort)
        cohort.fetch((server, metrics))
        cohort.traffic()
        seen.add((int(cohort.present.sum()), int(cohort.reports.sum())))
        if round > 1:
            assert not compiles, f"round {round} compiled"
        compiles.clear()
    assert len(seen) > 2, "or the rounds are too alike to show anything"


@pytest.fixture
def compiles() -> Iterator[list[str]]:
    """Programs compiled while the test runs."""
    events: list[str] = []
    active = True

    def note(event: str, duration_secs: float, **_: Any) -> None:
        if active and event == "/jax/core/compile/backend_compile_duration":
            events.append(event)

    jax.monitoring.register_event_duration_secs_listener(note)
    yield events
    active = False


# --- whole runs


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, blobs: Callable[..., Path]) -> Config:
    return Config(
        dataset=str(blobs(tmp_path_factory.mktemp("data"))), backbone="mlp", peft="head", clients=8,
        clients_per_round=4, rounds=4, optimizer="sgd", lr=0.05, min_size=3, server_optimizer="sgd(momentum=0.9)",
    )  # fmt: skip


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., Run]:
    count = iter(range(99))
    return lambda config, **more: fedsim.run(config, SPEED, out=tmp_path / f"run-{next(count)}", quiet=True, **more)


def without_times(run: Run) -> list[dict[str, Any]]:
    return [{k: v for k, v in line.items() if k not in TIMES} for line in run.rounds]


def test_a_network_without_faults_changes_no_bit(config: Config, run: Callable[..., Run]) -> None:
    """Times and a deadline that nobody misses: the same bits, and simulated seconds beside them."""
    plain = run(config)
    assert all(line["simulated"] is None for line in plain.rounds) and plain.summary["simulated"] is None
    other = run(config.replace(download="20", upload="5", compute="10", latency="30", deadline=1e3, late="partial"))
    assert [line | {"simulated": None} for line in without_times(other)] == without_times(plain)
    assert all(other.parameters[k].tobytes() == v.tobytes() for k, v in plain.parameters.items())
    for line in other.rounds:
        each_down, each_up = line["bytes_down"] / 4, line["bytes_up"] / 4
        assert line["simulated"]["communication_seconds"] == pytest.approx(
            0.06 + 8 * each_down / 20e6 + 8 * each_up / 5e6
        )
    total = sum(line["simulated"]["seconds"] for line in other.rounds)
    assert other.summary["simulated"]["seconds"] == pytest.approx(total) and total > 0
    assert (other.directory / "accuracy_time.png").exists() and not (plain.directory / "accuracy_time.png").exists()


@pytest.mark.slow
def test_a_round_without_a_reply_leaves_the_server_as_it_was(
    config: Config, run: Callable[..., Run], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nobody is there in round 3: its parameters are those of round 2, momentum does not move, and the run goes on."""
    rows = "".join(f"{i},1,2\n{i},4,4\n" for i in range(8))
    absent = config.replace(availability=table(tmp_path, "client,start,end\n" + rows))
    long = fedsim.run(absent, SPEED, out=tmp_path / "long")
    two, three = run(absent.replace(rounds=2)), run(absent.replace(rounds=3))
    assert "round 3: nobody reported; the server stays as it was" in capsys.readouterr().out
    line = long.rounds[2]
    assert line["clients"] == line["reported"] == line["bytes_down"] == line["bytes_up"] == line["setup_bytes"] == 0
    assert line["loss"] is None and line["simulated"]["unavailable"] == 4
    assert all(three.parameters[k].tobytes() == v.tobytes() for k, v in two.parameters.items())
    assert long.rounds[3]["reported"] == 4 and long.rounds[3]["validation"] != line["validation"]


def adding(task: Task) -> Algorithm:
    """A server that moves without a reply, as one that adds noise does."""
    local = fit(task.loss, task.optimizer, task.lr, task.passes)

    def round(key: Any, held: Any, server: Any, cohort: Any) -> Any:
        cohort.exchange(task.init(key), local)
        return server + 1, {"loss": jnp.zeros(())}

    return Algorithm(lambda key, held: jnp.zeros(()), round, lambda *a: a[3])


@pytest.mark.parametrize("says", ["algorithm", "average"])
@pytest.mark.parametrize("there", [True, False], ids=["all drop out", "nobody there"])
def test_only_an_algorithm_or_average_that_says_so_goes_on_without_a_reply(there: bool, says: str) -> None:
    lanes, algorithm = engine(tiny_problem()), adding(tiny_task())
    memory, everybody = Memory(algorithm.memory, lanes.held), np.ones(6, bool)
    nobody = settled(present=everybody & there, drops=everybody & there)
    server = lanes.put(jnp.zeros(()))
    for runs_empty in (False, True):
        made: dict[str, Any] = {"algorithm": algorithm, "average": plain(), "config": Config()}
        made[says] = made[says]._replace(runs_empty=runs_empty)
        cohort = Cohort(lanes, np.array(COHORT), 1, memory, nobody, average=made["average"])
        trainer: Any = SimpleNamespace(**made)
        after, averaging, metrics = simulate.exchange_round(key_for(lanes.root, "server", 1), trainer, server, cohort)
        assert float(after) == runs_empty and (after is server) != runs_empty
        assert bool(metrics) == runs_empty, "a loss over nothing is no loss"
        assert averaging == ()
        assert (sum(cohort.traffic()[0].values()) > 0) == there


@pytest.mark.slow
def test_a_resumed_run_meets_the_same_clients(config: Config, run: Callable[..., Run], tmp_path: Path) -> None:
    unsure = config.replace(
        availability="diurnal(period=3, peak=0.9, low=0.2)", dropout=0.2, over_selection=1.5, compute="lognormal(10, 1)",
        upload="uniform(1, 9)", deadline=2.0, late="partial",
    )  # fmt: skip
    whole, out = run(unsure), tmp_path / "stopped"
    speed = dataclasses.replace(SPEED, checkpoint_every=1)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(OSError, match="power"):
        append = record.append

        def fail(directory: Path, line: Any) -> None:
            if line["round"] == 3:
                raise OSError("power cut")
            append(directory, line)

        patch.setattr(record, "append", fail)
        fedsim.run(unsure, speed, out=out, quiet=True)
    resumed = fedsim.run(resume=out, quiet=True)
    assert without_times(resumed) == without_times(whole)
    assert all(resumed.parameters[k].tobytes() == v.tobytes() for k, v in whole.parameters.items())
    assert {"unavailable", "dropped", "late", "surplus"} <= set(whole.rounds[0]["simulated"])


# --- what is refused


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"dropout": 1.0}, "dropout=1.0 < 1"),
        ({"over_selection": 0.5}, "over_selection=0.5 >= 1"),
        ({"over_selection": 20.0}, "at most clients=100, not 200"),
        ({"deadline": 0.0, "compute": "1"}, "deadline=0.0 > 0"),
        ({"deadline": 3.0}, "deadline=3.0 with clients that take time"),
        ({"late": "partial"}, "late='partial' with a deadline"),
        ({"late": "keep"}, "late='keep' to be one of discard, partial"),
        ({"availability": "bernouli(0.5)"}, "did you mean bernoulli"),
        ({"availability": "bernoulli(1.5)"}, "0 < p=1.5 <= 1"),
        ({"availability": "diurnal(low=0.9, peak=0.2)"}, "low=0.9 <= peak=0.2"),
        ({"download": "lognorm(20, 1)"}, "did you mean lognormal"),
        ({"download": "lognormal(20)"}, "a call that lognormal takes"),
        ({"upload": "uniform(5, 1)"}, "low is above high"),
        ({"latency": "-3"}, "> 0, not -3.0"),
        ({"compute": "choice()"}, "no value to choose from"),
        ({"compute": "choice(1, 'fast')"}, "not 'fast'"),
        ({"availability": "no.csv"}, "'no.csv' to be a file"),
    ],
    ids=lambda o: str(o)[:40],
)
def test_impossible_networks_are_refused_before_any_work(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=r"^Expected ") as caught:
        build.check(Config(backbone="mlp", peft="head", **options))
    assert said in str(caught.value) and len(str(caught.value)) < 300


def table(folder: Path, text: str) -> str:
    file = folder / "table.csv"
    file.write_text(text)
    return str(file)


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ("0,1,5\n1,1,5\n", "row for client 2 in FILE; give it a row"),
        ("0,1,5\n1,1,2\n1,2,5\n2,1,5\n", "client 1 to have no overlapping stretches, as in lines 3 and 4 of FILE"),
        ("0,1,4\n1,1,2\n2,,\n", "FILE to reach round 5, the last of the run; it ends with round 4"),
        ("0,1,5\n1,,5\n2,1,5\n", "start='' in line 3 of FILE"),
        ("0,1,5\n1,4,3\n2,1,5\n", "1 <= start=4 <= end=3 in line 3 of FILE"),
        ("0,0,5\n1,1,5\n2,1,5\n", "1 <= start=0 <= end=5 in line 2 of FILE"),
        ("0,1,5\n1,1,5\n7,1,5\n", "client=7 < clients=3 in line 4 of FILE"),
        ("0,1,5\n1,1,5,9\n2,1,5\n", "3 cells in line 3 of FILE"),
    ],
)
def test_a_trace_with_holes_is_refused_by_line_or_client(rows: str, said: str, tmp_path: Path) -> None:
    file = table(tmp_path, "client,start,end\n" + rows)
    with pytest.raises(ValueError, match=r"^Expected ") as caught:
        build.fleet(Config(clients=3, clients_per_round=1, rounds=5, availability=file))
    assert said.replace("FILE", file) in str(caught.value)


def test_a_trace_is_read_as_it_stands(tmp_path: Path) -> None:
    """Rows in any order, ends included, a client that is never there."""
    file = table(tmp_path, "client, start, end\n2,,\n0,4,5\n1,1,1\n0,1,2\n1,3,9\n")
    fleet = build.fleet(Config(clients=3, clients_per_round=1, rounds=5, availability=file))
    there = [fleet.available(np.array([2, 1, 0]), round).tolist() for round in range(1, 6)]
    assert [row[2] for row in there] == [True, True, False, True, True]
    assert [row[1] for row in there] == [True, False, True, True, True] and not any(row[0] for row in there)


@pytest.mark.parametrize(
    ("text", "options", "said"),
    [
        ("client,compute\n0,1\n2,1\n", {}, "row for client 1 in FILE"),
        ("client,compute\n0,1\n1,\n2,1\n", {}, "compute='' of client 1 in line 3 of FILE"),
        ("client,compute\n0,1\n1,nan\n2,1\n", {}, "compute='nan' of client 1 in line 3 of FILE"),
        ("client,compute\n0,1\n0,2\n", {}, "one row for client 0, found another in line 3 of FILE"),
        ("client,comput\n0,1\n", {}, "did you mean compute"),
        ("id,compute\n0,1\n", {}, "a column 'client' in FILE"),
        ("client\n0\n", {}, "one of the columns download, upload, latency, compute in FILE"),
        ("client,compute\n0,1\n1,1\n2,1\n", {"compute": "3"}, "or a column compute in FILE, not both"),
    ],
)
def test_a_table_of_devices_with_holes_is_refused(
    text: str, options: dict[str, Any], said: str, tmp_path: Path
) -> None:
    file = table(tmp_path, text)
    with pytest.raises(ValueError, match=r"^Expected ") as caught:
        build.fleet(Config(clients=3, clients_per_round=1, device_table=file, **options))
    assert said.replace("FILE", file) in str(caught.value)


def test_a_table_of_devices_has_the_options_units(tmp_path: Path) -> None:
    file = table(tmp_path, "client,latency,download\n1,20,3\n0,0,1.5\n")
    fleet = build.fleet(Config(clients=2, clients_per_round=1, device_table=file, compute="7"))
    found = network.conditions(fleet, np.array([1, 0]), 1)
    assert found.latency.tolist() == [0.02, 0] and found.download.tolist() == [3e6, 1.5e6]
    assert found.compute.tolist() == [7, 7] and np.isinf(found.upload).all() and found.timed


def test_the_baseline_of_one_client_has_no_network() -> None:
    config = Config(over_selection=2.0, dropout=0.5, compute="3", deadline=1.0, late="partial")
    assert config.replace(clients=1, clients_per_round=1, **RELIABLE).reliable and not config.reliable


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"client,upload,upload\n0,5,1\n1,10,1\n2,20,1\n", "column 'upload' once in FILE, not 2 times"),
        (
            b"client;upload\n0;5\n1;10\n",
            "column 'client' in FILE, which seems to be separated by ';'; write it with commas",
        ),
        (b"client,upload\n0,\xff\n", "FILE to be a .csv in UTF-8"),
        (b'client,upload\n0,"' + b"5" * 200_000 + b'"\n', "line 2 of FILE to be of a .csv (field larger than"),
    ],
    ids=["twice", "semicolons", "not UTF-8", "a huge cell"],
)
def test_an_odd_table_of_devices_is_refused_by_name(tmp_path: Path, content: bytes, said: str) -> None:
    file = tmp_path / "table.csv"
    file.write_bytes(content)
    with pytest.raises(ValueError) as caught:
        build.fleet(Config(clients=3, clients_per_round=1, device_table=str(file)))
    assert said.replace("FILE", str(file)) in str(caught.value)
