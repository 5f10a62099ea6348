"""Clients' own tests against loops over the clients: the global model, what a client keeps, and the tuned model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fedsim
from brief import brief
from fedsim.cli import job
from fedsim.config import Config, Speed
from fedsim.engine.cohort import Cohort
from fedsim.simulation import build, current, personal

pytestmark = pytest.mark.usefixtures("compile_once")
SPEED = Speed(devices=1, lanes=2, compilation_cache=False)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, blobs: Callable[..., Path]) -> Config:
    return Config(
        dataset=str(blobs(tmp_path_factory.mktemp("data"), noise=2.0)), backbone="mlp", peft="bias", clients=7, rounds=2,
        clients_per_round=3, optimizer="sgd(momentum=0.9)", lr=0.05, alpha=0.5, min_size=4, batch_size=4,
        local_test=0.3, personal_epochs=2,
    )  # fmt: skip


def ready(config: Config, speed: Speed = SPEED) -> tuple[build.Problem, current.Current]:
    problem = build.problem(config, speed)
    return problem, current.prepare(problem, build.phases(config)[-1], None)


def correct(logits: jax.Array, y: np.ndarray) -> float:
    return float((np.asarray(logits).argmax(axis=1) == y).mean())


@pytest.mark.parametrize("devices", brief([4, 1]))
def test_scores_equal_a_loop_over_clients(config: Config, devices: int) -> None:
    """Tuned: two epochs of SGD with momentum over the client's rows in their order, written out."""
    problem, now = ready(config, Speed(devices=devices, lanes=2, compilation_cache=False))
    found = personal.local_scores(problem, now.trainer, now.server, now.memory)
    assert (
        found is not None
        and found.ids.tolist() == list(range(7))
        and set(found.scores["accuracy"]) == {"global", "tuned"}
    )
    model, held = now.trainer.model, jax.device_get(now.trainer.engine.held)
    apply = model.suffix if now.trainer.cached else model.apply
    x, y, start = jax.device_get(now.trainer.engine.x), problem.dataset.y, now.parameters()

    @jax.jit
    def gradient(params: dict, x: jax.Array, y: jax.Array) -> dict:
        def loss(p: dict) -> jax.Array:
            return -jnp.take_along_axis(jax.nn.log_softmax(apply(p, held, x)), y[:, None], axis=1).mean()

        return jax.grad(loss)(params)

    for client in range(7):
        mine, test = problem.partition.client(client), problem.local_test.client(client)
        assert not set(mine) & set(test) and len(test)
        assert found.scores["accuracy"]["global"][client] == pytest.approx(
            correct(apply(start, held, x[test]), y[test])
        )
        params, velocity = dict(start), {k: np.zeros_like(v) for k, v in start.items()}
        visits = np.tile(mine, 2)  # an epoch ends where it ends: the second one goes on in the same batch
        for first in range(0, len(visits), 4):
            rows = visits[first : first + 4]
            step = gradient(params, x[rows], y[rows])
            velocity = {k: 0.9 * velocity[k] + step[k] for k in params}
            params = {k: params[k] - 0.05 * velocity[k] for k in params}
        assert found.scores["accuracy"]["tuned"][client] == pytest.approx(
            correct(apply(params, held, x[test]), y[test])
        )
        losses = -np.asarray(jax.nn.log_softmax(apply(params, held, x[test])))[np.arange(len(test)), y[test]]
        np.testing.assert_allclose(found.scores["loss"]["tuned"][client], losses.mean(), rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_what_a_client_keeps_is_tested_and_left_alone(config: Config, tmp_path: Path) -> None:
    """FedSA-LoRA: a client met by the run answers with its own B, a new one as the global model; nothing is written."""
    kept = config.replace(
        peft="lora", rank=2, targets=("layers/*",), algorithm="fed_sa_lora", optimizer="sgd", lr=0.02, personal_epochs=0
    )
    problem, now = ready(kept)
    ids = np.array([1, 4, 6])
    cohort = Cohort(now.trainer.engine, ids, 1, now.memory, lr=0.02)
    server, _ = now.trainer.algorithm.round(jax.random.key(0), now.trainer.engine.held, now.server, cohort)
    before, order = now.memory.state()
    before = {k: v.copy() for k, v in before.items()}
    found = personal.local_scores(problem, now.trainer, server, now.memory)
    assert found is not None and set(found.scores["loss"]) == {"global", "memory"}
    after, same_order = now.memory.state()
    assert order.tolist() == same_order.tolist() == [1, 4, 6]
    jax.tree.map(np.testing.assert_array_equal, before, after)
    x, y, held = now.trainer.engine.x, problem.dataset.y, now.trainer.engine.held
    for client in range(7):
        rows = problem.local_test.client(client)
        memory = () if client not in ids else {k: v[order.tolist().index(client)] for k, v in before.items()}
        logits = np.asarray(now.trainer.algorithm.predict(held, server, memory, x[rows]), np.float64)
        losses = np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(len(rows)), y[rows]]
        np.testing.assert_allclose(found.scores["loss"]["memory"][client], losses.mean(), rtol=1e-4, atol=1e-6)
    differ = np.abs(found.scores["loss"]["memory"] - found.scores["loss"]["global"]) > 1e-6
    assert np.flatnonzero(differ).tolist() == [1, 4, 6]


def test_a_client_that_diverges_has_no_scores(config: Config) -> None:
    """Neither accuracy nor loss, instead of the zeros of an empty reply; the summary counts such clients."""
    problem, now = ready(config.replace(optimizer="sgd", personal_lr=1e30))
    found = personal.local_scores(problem, now.trainer, now.server, now.memory)
    assert found is not None and np.isfinite(found.scores["loss"]["global"]).all()
    assert np.isnan(found.scores["loss"]["tuned"]).all() and np.isnan(found.scores["accuracy"]["tuned"]).all()
    assert found.summary()["tuned"] == {"clients": 0, "nonfinite": 7}


@pytest.mark.parametrize(("steps", "expected"), [(None, 34), (4, 40)])
def test_centralised_sees_as_many_examples_a_round(steps: int | None, expected: int) -> None:
    """10 of 100 clients with 2,700 examples: 270 an epoch, 33.75 batches of 8; or 10 times 4 steps."""
    central = job.centralised(Config(steps=steps, clients=100, clients_per_round=10, batch_size=8), 2700)
    assert (central.clients, central.clients_per_round, central.steps) == (1, 1, expected)


def test_a_run_tells_how_its_clients_fare(config: Config, tmp_path: Path) -> None:
    run = fedsim.run(config.replace(eval_clients=5), SPEED, out=tmp_path / "run", quiet=True)
    summary, rows = (run.summary or {})["final"]["clients"], run.clients()
    assert set(summary) == {"global", "tuned"} and summary["global"]["clients"] == len(rows) == 5
    ids = [row["client"] for row in rows]
    assert ids == sorted(set(ids)) and set(ids) <= set(range(7))
    means = [np.mean([row["accuracy"][kind] for row in rows]) for kind in ("global", "tuned")]
    assert means == pytest.approx([summary[kind]["mean"] for kind in ("global", "tuned")])
    assert min(row["accuracy"]["tuned"] for row in rows) == summary["tuned"]["worst"]
    assert all(row["test"] > 0 and row["train"] > 0 for row in rows)
    assert (run.directory / "accuracy_clients.png").stat().st_size > 5000
    assert sum(line["bytes_up"] for line in run.rounds) == (run.summary or {})["bytes"]["up"], "tests cost no bytes"


@pytest.mark.slow
def test_without_local_tests_nothing_is_said_of_clients(config: Config, tmp_path: Path) -> None:
    run = fedsim.run(config.replace(local_test=0.0, personal_epochs=0), SPEED, out=tmp_path / "run", quiet=True)
    assert (run.summary or {})["final"]["clients"] is None and run.clients() == []


def test_tuning_needs_local_tests(config: Config) -> None:
    with pytest.raises(ValueError, match="personal_epochs=2 >= 0, and with local_test=0"):
        config.replace(local_test=0.0)
