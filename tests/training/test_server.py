"""The server's own training: against plain loops, on one device and on many, not rehearsed, stopped and gone on with."""

from __future__ import annotations

import dataclasses
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import export
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import fedsim
import serves
from fedsim import record
from fedsim.algorithms.fed_avg import fed_avg
from fedsim.config import Config, Speed
from fedsim.core import Batch
from fedsim.data import partition
from fedsim.engine.client_memory import Memory
from fedsim.engine.keys import key_for
from fedsim.simulation import build, trainers
from fedsim.simulation.rehearsal import rehearse
from fedsim.testing.contract import CHECKS, same
from fedsim.testing.tasks import tiny_task
from fedsim.testing.toys import COHORT, engine, one_client, run, tiny_problem
from fedsim.training import server
from remembers import TIMES

pytestmark = pytest.mark.usefixtures("compile_once")
SPEED = Speed(devices=1, lanes=2, compilation_cache=False)
MINE = Path(serves.__file__)
# Where sums come in another order, Adam would show it (docs/sharp_edges.md).
OPTIMIZER = optax.sgd(optax.linear_schedule(0.05, 0.0, 20), momentum=0.9)
TUNED = partial(serves.fed_tuned, optimizer=OPTIMIZER)


# --- batches


@pytest.mark.parametrize(("count", "batch", "steps"), [(20, 8, 10), (5, 8, 4), (7, 7, 3), (9, 2, 1)])
def test_every_epoch_sees_every_example_once(count: int, batch: int, steps: int) -> None:
    rows = np.asarray(server.order(jax.random.key(3), count, batch, steps))
    assert rows.shape == (steps, batch)
    flat = rows.reshape(-1)
    epochs = [flat[i : i + count] for i in range(0, len(flat), count)]
    for epoch in epochs:
        assert len(set(epoch.tolist())) == len(epoch), "without replacement"
    assert all(sorted(epoch.tolist()) == list(range(count)) for epoch in epochs[: len(flat) // count])
    assert len(epochs) == 1 or (epochs[0][: len(epochs[1])] != epochs[1][: len(epochs[0])]).any(), "other orders"
    assert np.array_equal(rows, server.order(jax.random.key(3), count, batch, steps))
    assert count == batch or not np.array_equal(rows, server.order(jax.random.key(4), count, batch, steps))


# --- oracles


def looped(loss: Any, optimizer: Any, batch: int, steps: int, held: Any, params: Any, state: Any, x: Any, y: Any, args: Any,
           key: Any) -> tuple[Any, Any, dict[str, float]]:  # fmt: skip
    """What a trainer does, a step at a time."""
    for_order, for_steps = jax.random.split(key)
    count, seen = len(jax.tree.leaves(x)[0]), []
    epochs = -(-steps * batch // count)
    orders = [jax.random.permutation(jax.random.fold_in(for_order, e), count) for e in range(epochs)]
    stream = np.concatenate([np.asarray(one) for one in orders])
    for step in range(steps):
        rows = stream[step * batch : (step + 1) * batch]
        taken = jax.tree.map(lambda a, rows=rows: jnp.asarray(np.asarray(a)[rows]), (x, y))
        mask, own = jnp.ones(batch), jax.random.fold_in(for_steps, step)
        drawn = Batch(*taken, mask=mask, key=own, step=jnp.int32(step), last=jnp.asarray(step == steps - 1))
        (_, metrics), grads = jax.value_and_grad(loss, argnums=1, has_aux=True)(held, params, drawn, args)
        with jax.numpy_dtype_promotion("standard"):
            updates, state = optimizer.update(grads, state, params)
            params = optax.apply_updates(params, updates)
        seen.append(metrics)
    return params, state, {name: float(np.mean([m[name] for m in seen])) for name in seen[0]}


def close(a: Any, b: Any) -> None:
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(np.asarray(x), np.asarray(y), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_a_run_is_a_loop_of_steps() -> None:
    """Keys, numbers and the last step reach the loss; a schedule counts on from run to run."""
    problem, task = tiny_problem(), tiny_task()

    def loss(held: Any, params: Any, batch: Batch, args: Any) -> Any:
        value, metrics = task.loss(held, params, batch)
        noise = jax.random.normal(batch.key, ()) * params["bias"].sum()
        pull = args * (params["kernel"] ** 2).sum() * batch.last.astype(jnp.float32)
        return value + noise + pull, {**metrics, "step": batch.step.astype(jnp.float32)}

    train = fedsim.trainer(loss, OPTIMIZER, batch=8, steps=6)
    params = task.init(jax.random.key(1))
    state = OPTIMIZER.init(params)
    x, y = jnp.asarray(problem.x[:20]), jnp.asarray(problem.y[:20])
    expected = params, state
    for round in (1, 2):
        args, key = jnp.float32(0.1 * round), jax.random.key(round)
        params, state, metrics = train(problem.held, params, state, (x, y), args, key)
        *expected, means = looped(loss, OPTIMIZER, 8, 6, problem.held, *expected, x, y, args, key)
        close((params, state, metrics), (*expected, means))
    assert float(metrics["step"]) == 2.5


def test_the_server_trains_after_fed_avg() -> None:
    """Two rounds of it are rounds of FedAvg, each with the loop behind it."""
    problem, task = tiny_problem(), tiny_task()
    lanes = engine(problem)
    x, y = jax.device_get(lanes.shard)
    found, _, cohorts = run(TUNED, problem, (COHORT, COHORT[:3]))
    begun, _, _ = run(fed_avg, problem, ())
    params, state = begun.params, OPTIMIZER.init(begun.params)
    for round, ids in enumerate((COHORT, COHORT[:3]), 1):
        mean = run(fed_avg, problem, (ids,), state=(begun._replace(params=params), fresh(problem)), first=round)[
            0
        ].params
        key = key_for(lanes.root, "server", round)
        params, state, _ = looped(
            lambda held, params, batch, args: task.loss(held, params, batch), OPTIMIZER, 8, 6, problem.held,
            jax.device_get(mean), state, x, y, (), key,
        )  # fmt: skip
    close(found, (params, state))
    assert cohorts[0].traffic() == run(fed_avg, problem)[2][0].traffic(), "nothing of it travels"


def fresh(problem: Any) -> Memory:
    """Clients that keep nothing."""
    return Memory(lambda key, held: (), problem.held)


@pytest.mark.slow
def test_the_server_is_taught_what_the_clients_answer() -> None:
    """One round of `fed_distilled` against NumPy: clients alone, their mean, and the gradient of softmax regression."""
    problem, task, steps, batch, lr = tiny_problem(), tiny_task(), 5, 8, 0.1
    sent: list[Any] = []
    found, _, _ = run(serves.fed_distilled, problem, sent=sent)
    local, begin = sent[0].local, task.init(key_for(jax.random.key(0), "init"))
    replies = [one_client(problem, local, begin, (), id, 1)[0].tree for id in COHORT]
    sizes = np.diff(problem.offsets)[list(COHORT)]
    shares = sizes / sizes.sum()
    weights = [{k: np.asarray(v, np.float64) for k, v in reply.items()} for reply in replies]
    w, b = (sum(s * one[k] for s, one in zip(shares, weights, strict=True)) for k in ("kernel", "bias"))

    def softmax(z: np.ndarray) -> np.ndarray:
        e = np.exp(z - z.max(axis=-1, keepdims=True))
        return e / e.sum(axis=-1, keepdims=True)

    x = problem.x[1:21].astype(np.float64)  # the toys' public examples
    hidden = np.tanh(x @ problem.held["frozen"])
    target = sum(s * softmax(hidden @ one["kernel"] + one["bias"]) for s, one in zip(shares, weights, strict=True))
    for_order, _ = jax.random.split(key_for(jax.random.key(0), "server", 1))
    for rows in np.asarray(server.order(for_order, 20, batch, steps)):
        gap = (softmax(hidden[rows] @ w + b) - target[rows]) / batch
        w, b = w - lr * hidden[rows].T @ gap, b - lr * gap.sum(axis=0)
    np.testing.assert_allclose(found.params["kernel"], w, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found.params["bias"], b, rtol=1e-4, atol=1e-5)


def test_steps_without_data_and_without_steps() -> None:
    """A synthetic set is trained towards a target that comes in `args`; no steps change nothing."""
    goal = jnp.arange(6.0).reshape(2, 3)

    def loss(held: Any, params: Any, batch: Batch, args: Any) -> Any:
        assert batch.x == () and batch.y == ()
        value = ((params["x"] - args) ** 2).sum()
        return value, {"loss": value}

    params, optimizer = {"x": jnp.zeros((2, 3))}, optax.sgd(0.25)
    state = optimizer.init(params)
    key = jax.random.key(0)
    made, _, metrics = fedsim.trainer(loss, optimizer, batch=1, steps=3)({}, params, state, (), goal, key)
    np.testing.assert_allclose(made["x"], goal * (1 - 0.5**3), rtol=1e-6)
    np.testing.assert_allclose(metrics["loss"], (goal**2).sum() * (1 + 0.25 + 0.0625) / 3, rtol=1e-6)
    same(fedsim.trainer(loss, optimizer, batch=1, steps=0)({}, params, state, (), goal, key)[0], params, "no steps")


# --- devices


@pytest.mark.parametrize("make", [TUNED, serves.fed_distilled])
def test_host_devices_leave_it_to_one(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """With 8 devices as with one, up to the order in which the clients are summed; what it gives lies on all of them."""
    problem, where = tiny_problem(), set()
    real = server.waited_for

    def looking(program: Any, inputs: Any, batch: int) -> Any:
        where.update(len(leaf.sharding.device_set) for leaf in jax.tree.leaves(inputs))
        return real(program, inputs, batch)

    monkeypatch.setattr(server, "waited_for", looking)
    one, _, _ = run(make, problem, (COHORT, COHORT))
    eight, _, cohorts = run(make, problem, (COHORT, COHORT), devices=8)
    close(one, eight)
    assert where == {1}, "no device repeats what another one computes"
    assert {len(leaf.sharding.device_set) for leaf in jax.tree.leaves(eight)} == {8}
    assert {len(leaf.sharding.device_set) for leaf in jax.tree.leaves(cohorts[0].shard)} == {8}
    same(problem.x[1:21], jax.device_get(cohorts[0].public), "what the server holds without labels")
    same((problem.x[21:33], problem.y[21:33]), jax.device_get(cohorts[0].shard), "what it holds with labels")


def test_accelerators_split_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The program that they get computes the same; here on two of the host's, though their number does not divide it."""
    problem, task, optimizer = tiny_problem(), tiny_task(), optax.sgd(0.1)
    train = fedsim.trainer(
        lambda held, params, batch, args: task.loss(held, params, batch), optimizer, batch=7, steps=2
    )
    params = task.init(jax.random.key(1))
    x, y = problem.x[:20], problem.y[:20]
    alone, _, _ = train(problem.held, params, optimizer.init(params), (x, y), (), jax.random.key(0))
    monkeypatch.setattr(server, "on_host", lambda mesh: False)
    lanes = engine(problem, devices=2)
    inputs = lanes.put((params, optimizer.init(params), (x, y), (), jax.random.key(0)))
    both, _, _ = train(lanes.held, *inputs)
    close(alone, both)
    assert {leaf.sharding.spec for leaf in both.values()} == {P()}


def test_a_reader_says_of_all_examples_what_its_function_says_of_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a number that no batch divides, in order; counted as the server's; accelerators split each batch."""
    problem = tiny_problem()
    ask = fedsim.reader(lambda held, scale, x: {"sum": x["a"].sum(axis=1) * scale + held, "a": x["a"]}, batch=8)
    x, held, scale = {"a": problem.x[:21]}, jnp.float32(1), jnp.float32(2)
    with server.watched() as watch:
        found = ask(held, scale, x)
    np.testing.assert_allclose(found["sum"], 2 * problem.x[:21].sum(axis=1) + 1, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(found["a"], problem.x[:21])
    assert watch.seconds > 0
    with server.watched(trains=False):
        assert (ask(held, scale, x)["sum"] == 1).all(), "a rehearsal reads nothing"
    on_eight = engine(problem, devices=None).put((held, scale, x))
    same(jax.device_get(ask(*on_eight)), jax.device_get(found), "one of the host's devices", rtol=1e-6)
    monkeypatch.setattr(server, "on_host", lambda mesh: False)
    split = fedsim.reader(lambda held, scale, x: x["a"].sum(axis=1) * scale + held, batch=8)
    both = split(*engine(problem, devices=2).put((held, scale, x)))
    same(jax.device_get(both), jax.device_get(found["sum"]), "two devices", rtol=1e-6)
    with pytest.raises(ValueError, match="Expected examples for the server's training, not None"):
        ask(held, scale, None)


def test_it_lowers_for_an_accelerator_with_split_batches() -> None:
    task, optimizer = tiny_task(), optax.sgd(0.1)
    split = NamedSharding(Mesh(np.array(jax.devices()[:4]), ("clients",), axis_types=(AxisType.Auto,)), P("clients"))
    fn = partial(
        server.trained, lambda held, params, batch, args: task.loss(held, params, batch), optimizer, 8, 3, split
    )
    problem, params = tiny_problem(), task.init(jax.random.key(1))
    program = jax.jit(fn, out_shardings=NamedSharding(split.mesh, P()))
    text = export.export(program, platforms=["tpu"])(
        problem.held, params, optimizer.init(params), (problem.x, problem.y), (), jax.random.key(0)
    ).mlir_module()  # fmt: skip
    assert "callback" not in text and "f64" not in text
    assert "sdy.sharding_constraint" in text or "@Sharding" in text


# --- the contract


@pytest.mark.parametrize("make", [TUNED, pytest.param(serves.fed_distilled, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "check",
    [
        "structure kept, nothing recompiles",
        "resumed equals uninterrupted",
        *(pytest.param(name, marks=pytest.mark.slow) for name in CHECKS if name.partition(" ")[0] not in ("structure", "resumed")),
    ],
)  # fmt: skip
def test_it_keeps_the_contract(make: Any, check: str) -> None:
    CHECKS[check](make)


# --- refusals


def test_what_cannot_be_trained_on_is_refused() -> None:
    train = fedsim.trainer(lambda held, params, batch, args: (0.0, {}), optax.sgd(0.1), batch=2, steps=1)

    def on(examples: Any) -> None:
        train({}, {}, (), examples, (), jax.random.key(0))

    with pytest.raises(
        ValueError, match=r"not None: this run holds none back for it; give public_share=0.1 .* server_share"
    ):
        on(None)
    with pytest.raises(ValueError, match=r"to be x or \(x, y\), not a tuple of 3; put several arrays of x into a dict"):
        on((np.zeros(3), np.zeros(3), np.zeros(3)))
    for examples in ((np.zeros((3, 2)), np.zeros(4)), np.zeros((0, 2)), {"a": np.zeros(3), "b": np.float32(1)}):
        with pytest.raises(ValueError, match="to have one leading axis n > 0, not the shapes"):
            on(examples)
    for name, value in (("batch", 0), ("batch", 2.5), ("batch", True), ("steps", -1)):
        with pytest.raises(ValueError, match=f"Expected {name}={value!r} >= "):
            fedsim.trainer(lambda *_: (0.0, {}), optax.sgd(0.1), **{"batch": 2, "steps": 1, name: value})


def test_memory_that_runs_out_is_said() -> None:
    def program(*_: Any) -> Any:
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 3 GB\nmore")

    with pytest.raises(ValueError, match=r"batch=64 of the server's training to fit .*\(RESOURCE_EXHAUSTED: 3 GB\)"):
        server.waited_for(program, (), 64)


# --- runs


@pytest.fixture
def config(blobs: Callable[..., Path], tmp_path: Path) -> Config:
    return Config(
        dataset=str(blobs(tmp_path)), backbone="mlp", peft="full", clients=8, clients_per_round=4, rounds=4, optimizer="sgd",
        lr=0.05, min_size=3, server_share=0.1, public_share=0.2,
    )  # fmt: skip


@pytest.mark.slow
def test_a_run_counts_it_apart(config: Config, tmp_path: Path) -> None:
    """Examples, seconds and FLOPs are in the record; nothing of it is a client's."""
    tuned = config.replace(algorithm=f"{MINE}:fed_tuned")
    run = fedsim.run(tuned, SPEED, out=tmp_path / "tuned", quiet=True)
    plain = fedsim.run(config, SPEED, out=tmp_path / "plain", quiet=True)
    problem = build.problem(config, SPEED)
    held = partition.holders(config, problem.dataset.train)
    assert run.about["server_examples"] == {"public": len(held.public), "shard": len(held.shard)}
    assert not set(problem.partition.rows.tolist()) & {*held.public.tolist(), *held.shard.tolist()}
    assert (
        len(problem.partition.rows)
        == len(held.clients)
        == len(problem.dataset.train) - len(held.public) - len(held.shard)
    )
    flops = trainers.example_flops(problem, trainers.trainer(problem, build.phases(config)[0])).total
    for a, b in zip(run.rounds, plain.rounds, strict=True):
        assert {k: a[k] for k in ("bytes_up", "bytes_down", "examples", "flops")} == {
            k: b[k] for k in ("bytes_up", "bytes_down", "examples", "flops")
        }
        assert a["server_flops"] == pytest.approx(6 * 8 * flops) and 0 < a["server_seconds"] < a["seconds"]
        assert (b["server_flops"], b["server_seconds"]) == (0, 0)
        steady = a["seconds"] - a["compile_seconds"] - a["server_seconds"]
        assert a["clients_per_second"] == pytest.approx(a["clients"] / steady)
    assert run.summary is not None
    assert run.summary["server_seconds"] == pytest.approx(sum(line["server_seconds"] for line in run.rounds))
    assert run.rounds[-1]["metrics"]["server_loss"] < run.rounds[0]["metrics"]["server_loss"]


@pytest.mark.slow
def test_shares_that_nobody_reads_are_said(config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fedsim.run(config.replace(algorithm=f"{MINE}:fed_tuned", rounds=1), SPEED, out=tmp_path / "run")
    said = capsys.readouterr().out
    assert "public_share=0.2 of the training examples lie with the server" in said and "server_share" not in said


def test_labels_of_public_examples_are_not_read(config: Config, tmp_path: Path) -> None:
    """Other labels there, and the run is the same bit for bit; of the examples with labels it is another."""
    distilled = config.replace(algorithm=f"{MINE}:fed_distilled", dataset="arrays", rounds=2)
    arrays = np.load(config.dataset)
    given = fedsim.arrays(arrays["x"], arrays["y"])
    problem = build.problem(distilled, SPEED, given)
    held = partition.holders(distilled, problem.dataset.train)

    def trained(name: str, rows: Any) -> bytes:
        y = problem.dataset.y.copy()
        y[rows] = (y[rows] + 1) % 3
        other = problem._replace(dataset=problem.dataset._replace(y=y))
        run = fedsim.run(distilled, SPEED, out=tmp_path / name, quiet=True, problem=other, data=given)
        return (run.directory / record.TRAINED).read_bytes()

    plain = trained("plain", held.public[:0])
    assert trained("public", held.public) == plain
    assert trained("clients", held.clients) != plain


def test_frozen_features_of_the_server_are_cached(config: Config) -> None:
    """What the server reads has passed the same frozen layers as what the clients read."""
    cached = config.replace(peft="head")
    problem = build.problem(cached, Speed(devices=1, lanes=2, cache="on"))
    trainer = trainers.trainer(problem, build.phases(cached)[0])
    held = partition.holders(cached, problem.dataset.train)
    assert trainer.cached
    x, y = jax.device_get(trainer.engine.shard)
    assert not np.array_equal(x.shape, problem.dataset.x[held.shard].shape)
    same(x, jax.device_get(trainer.engine.x)[held.shard], "the features of the shard")
    same(y, problem.dataset.y[held.shard], "its labels")
    same(jax.device_get(trainer.engine.public), jax.device_get(trainer.engine.x)[held.public], "of the others")


@pytest.mark.slow
def test_it_is_not_rehearsed(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rehearsal, and a dry run, trace the loss and run nothing; a round behind it trains."""
    from fedsim.cli.estimate import dry_run

    ran: list[int] = []
    traced: list[int] = []
    real = server.trained

    def counting(loss: Any, *args: Any) -> Any:
        def counted(held: Any, params: Any, batch: Batch, more: Any) -> Any:
            jax.debug.callback(lambda step: ran.append(int(step)), batch.step)
            traced.append(1)
            return loss(held, params, batch, more)

        return real(counted, *args)

    monkeypatch.setattr(server, "trained", counting)
    tuned = config.replace(algorithm=f"{MINE}:fed_tuned", rounds=1)
    problem = build.problem(tuned, SPEED)
    phase = build.phases(tuned)[0]
    found = rehearse(problem, phase, np.arange(4))
    dry_run(tuned, SPEED)
    jax.effects_barrier()
    assert traced and not ran
    assert server._watch.get() is None, "nothing of it stays behind"
    plain = rehearse(build.problem(config, SPEED), phase._replace(config=config), np.arange(4))
    assert (found.up, found.down) == (plain.up, plain.down)
    fedsim.run(tuned, SPEED, out=tmp_path / "run", quiet=True, problem=problem)
    jax.effects_barrier()
    assert sorted(ran) == list(range(6))


def test_its_examples_count_in_the_memory(config: Config) -> None:
    """They lie on the device beside all the others."""
    need = []
    for made in (config.replace(server_share=0.0, public_share=0.0), config):
        problem = build.problem(made, SPEED)
        need.append(rehearse(problem, build.phases(made)[0], np.arange(4)).need.there)
    held = partition.holders(config, problem.dataset.train)
    row = problem.dataset.x[0].nbytes
    assert need[1] - need[0] == len(held.public) * row + len(held.shard) * (row + 4)


def test_an_algorithm_that_finds_no_examples_is_refused(config: Config, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds none back for it; give public_share=0\.1"):
        fedsim.run(
            config.replace(algorithm=f"{MINE}:fed_tuned", server_share=0.0), SPEED, out=tmp_path / "run", quiet=True
        )


def test_clients_that_own_what_the_server_holds_are_refused(config: Config, tmp_path: Path) -> None:
    problem = build.problem(config.replace(server_share=0.0, public_share=0.0), SPEED)
    with pytest.raises(
        ValueError, match=r"Expected no client to own an example that the server holds by public_share=0.2"
    ):
        fedsim.run(config, SPEED, out=tmp_path / "run", quiet=True, problem=problem)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fed_tuned", "fed_distilled"])
def test_a_stopped_run_goes_on_bit_for_bit(config: Config, tmp_path: Path, name: str) -> None:
    """Adam's moments and its schedule are the server's state; 8 devices."""
    tuned = config.replace(algorithm=f"{MINE}:{name}", rounds=4)
    speed = Speed(devices=8, lanes=1, checkpoint_every=2, compilation_cache=False)
    whole = fedsim.run(tuned, speed, out=tmp_path / "whole", quiet=True)
    shutil.copytree(whole.directory, tmp_path / "cut")
    for file in (record.SUMMARY, record.TRAINED):
        (tmp_path / "cut" / file).unlink()
    shutil.rmtree(tmp_path / "cut" / record.CHECKPOINTS / "4")
    resumed = fedsim.run(resume=tmp_path / "cut", quiet=True)
    for a, b in zip(whole.rounds, resumed.rounds, strict=True):
        assert {k: v for k, v in a.items() if k not in TIMES} == {k: v for k, v in b.items() if k not in TIMES}
    assert (whole.directory / record.TRAINED).read_bytes() == (resumed.directory / record.TRAINED).read_bytes()


@pytest.mark.slow
def test_a_model_of_the_server_alone_learns_from_groups(config: Config, tmp_path: Path) -> None:
    """The server's model is never sent; public examples lie on the devices once, whatever the number of groups."""
    groups = tuple(f"{n}(backbone='mlp', peft='{p}'{s})" for n, p, s in (
        ("small", "head", ", share=0.5"), ("large", "full", ", share=0.5"), ("server", "full", "")
    ))  # fmt: skip
    several = config.replace(algorithm=f"{MINE}:fed_two_sizes", groups=groups, rounds=3, lr=0.1)
    problem = build.problem(several, SPEED)
    trainer = trainers.trainer(problem, build.phases(several)[0])
    assert {*trainer.engine.held} == {"small", "large", "server"}
    assert all(
        one.public is trainer.engine.public and one.shard is trainer.engine.shard for one in trainer.groups.values()
    )
    held = partition.holders(several, problem.dataset.train)
    same(jax.device_get(trainer.engine.public), problem.dataset.x[held.public], "the server's examples")
    run = fedsim.run(several, SPEED, out=tmp_path / "run", quiet=True)
    assert run.rounds[-1]["metrics"]["distilled"] < run.rounds[0]["metrics"]["distilled"]
    assert all(
        line["server_flops"] > 0 and not any("server" in leaf for leaf in line["bytes_up_leaves"])
        for line in run.rounds
    )


@pytest.mark.slow
def test_two_processes_train_alike(config: Config, tmp_path: Path, environment: dict[str, str]) -> None:
    """Each trains the server on its own first device; the record is that of one process."""
    shutil.copy(MINE, tmp_path)
    options = {**dataclasses.asdict(config), "dataset": "blobs.npz", "algorithm": "serves.py:fed_distilled"}
    (tmp_path / "options.py").write_text(f"import fedsim\n\nconfig = fedsim.Config(**{options})\n")
    kept = environment | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=1"}
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        at = f"127.0.0.1:{found.getsockname()[1]}"

    def start(name: str, *more: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "fedsim", "run", "options.py", "--no-head-baseline", "--out", name, *more]
        return subprocess.Popen(
            command, cwd=tmp_path, env=kept, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    pair = ["--distributed", "--coordinator", at, "--processes", "2", "--process-id"]
    running = [start("one", "--devices", "1"), *(start("two", *pair, str(i)) for i in range(2))]
    try:
        ended = [process.communicate(timeout=600) for process in running]
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [0, 0, 0], ended
    one, two = (record.load(tmp_path / name) for name in ("one", "two"))
    for a, b in zip(one.rounds, two.rounds, strict=True):
        assert a["server_flops"] == b["server_flops"] > 0
        assert a["metrics"]["distilled"] == pytest.approx(b["metrics"]["distilled"], rel=1e-5)
    close(one.parameters, two.parameters)
