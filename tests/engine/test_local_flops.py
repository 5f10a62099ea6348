"""FLOPs of what a client does: of its own `step`, whatever it computes. Nothing is compiled for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from brief import brief
from fedsim import wire
from fedsim.algorithms.fed_avg import fed_avg
from fedsim.config import Config, Speed
from fedsim.core import Algorithm, Batch, Local, Passes, Task
from fedsim.engine.lanes import Request
from fedsim.folds import mean
from fedsim.simulation import build, trainers
from fedsim.testing.tasks import tiny_task
from fedsim.testing.toys import engine, run, tiny_problem

FORWARD = 2 * 6 * 6 + 2 * 6 * 3  # of the tiny task: a frozen map, the kernel
GRADIENT = 2 * 6 * 3  # of the kernel; nothing lies below
SIZE = 4  # of a batch


class AskedError(Exception):
    """An exchange as it was asked for."""


def first_exchange(engine: Any, algorithm: Any) -> Request:
    """What the algorithm asks for first; nothing runs."""

    def exchange(message: Any, local: Local, *more: Any, **options: Any) -> Any:
        raise AskedError(message, local)

    cohort: Any = SimpleNamespace(exchange=exchange, ids=np.arange(2), last=np.zeros(2, int))
    server = jax.eval_shape(algorithm.init, engine.root, engine.held)
    with pytest.raises(AskedError) as asked:
        algorithm.round(engine.root, engine.held, server, cohort)
    message, local = asked.value.args
    return Request(local, mean(), True, algorithm.memory, wire.unwrap(wire.unmarked(message)))


def of(step: Callable[..., Any], passes: Passes = Passes(batch_size=SIZE)) -> float:  # noqa: B008 - a value
    local = Local(lambda held, message, client, batch: message, step, lambda *args: ((), (), {}), passes)
    request = Request(local, mean(), True, lambda key, held: (), jnp.zeros((6, 5)))
    return engine(tiny_problem()).flops(request)


@pytest.fixture
def compiled() -> Iterator[list[str]]:
    """Names of what XLA compiles."""
    from jax._src import monitoring

    seen: list[str] = []
    listen = lambda event, seconds, **more: seen.append(event) if "backend_compile" in event else None  # noqa: E731 - one expression, named
    monitoring.register_event_duration_secs_listener(listen)
    yield seen
    monitoring.unregister_event_duration_listener(listen)


@pytest.mark.parametrize("algorithm", brief(["fed_prox(mu=0.1)", "fed_avg"]))
@pytest.mark.parametrize(
    ("backbone", "kind", "speed"),
    [
        ("vit_tiny", "full", {}),
        ("vit_tiny", "full", {"remat": "blocks"}),
        ("vit_tiny", "lora+bias", {"remat": "dots"}),
        ("vit_tiny", "head", {"cache": "off"}),
        ("vit_tiny", "head", {"cache": "on"}),
        ("cnn", "full", {}),
    ],
)
def test_fed_avg_and_fed_prox_cost_what_the_model_costs(
    backbone: str, kind: str, speed: dict[str, Any], algorithm: str, tmp_path: Path, compiled: list[str]
) -> None:
    """Exactly: the penalty has no product of examples, and what is computed again to save memory is no work."""
    x = np.random.default_rng(0).integers(0, 255, (40, 28, 28, 1 if backbone == "cnn" else 3)).astype(np.uint8)
    np.savez(tmp_path / "images.npz", x=x, y=np.arange(40) % 2)
    config = Config(
        dataset=str(tmp_path / "images.npz"), backbone=backbone, weights="random", peft=kind, head_rounds=0, clients=4,
        clients_per_round=2, min_size=1, algorithm=algorithm,
    )  # fmt: skip
    asked = Speed(devices=1, compilation_cache=False, **speed)
    problem = build.problem(config, asked)
    trainer = trainers.trainer(problem, build.phases(config)[0])
    plain = trainers.example_flops(problem._replace(speed=Speed(devices=1)), trainer._replace(
        model=build.split_model(config, problem.dataset)
    )).total  # fmt: skip
    request = first_exchange(trainer.engine, trainer.algorithm)
    compiled.clear()
    assert trainer.engine.flops(request) == plain > 0
    assert compiled == []


def with_teacher() -> Task:
    """Two models look at every example, and one of them learns."""
    task = tiny_task()

    def loss(held: Any, params: Any, batch: Batch) -> Any:
        teacher = {path: jax.lax.stop_gradient(2 * leaf) for path, leaf in params.items()}
        return task.criterion(task.logits(held, params, batch.x) - task.logits(held, teacher, batch.x), batch)

    return tiny_task(loss=loss)


def test_what_is_counted_is_what_the_local_does() -> None:
    lanes = engine(tiny_problem())
    once = lanes.flops(first_exchange(lanes, fed_avg(tiny_task())))
    assert once == FORWARD + GRADIENT
    assert lanes.flops(first_exchange(lanes, fed_avg(with_teacher()))) == 2 * FORWARD + GRADIENT
    cold = tiny_task(loss=lambda held, params, batch: (jnp.sum(params["bias"]) * batch.mask.sum(), {}))
    assert lanes.flops(first_exchange(lanes, fed_avg(cold))) == 0


def test_products_of_examples_with_one_another_count_for_the_batch() -> None:
    def pairs(held: Any, message: Any, carry: Any, batch: Any) -> Any:
        h = batch.x @ carry
        others = 1 - np.eye(len(batch.y), dtype=np.float32)  # on the host: as many numbers as there are pairs
        return carry + ((h @ h.T) * others).sum(), {}

    assert of(pairs) == 2 * 6 * 5 + 2 * SIZE * 5


def test_what_is_computed_once_a_batch_is_left_out() -> None:
    def penalised(held: Any, message: Any, carry: Any, batch: Any) -> Any:
        return carry + (batch.x @ carry).sum() + (carry.T @ carry).sum(), {}

    assert of(penalised) == 2 * 6 * 5


def test_a_step_made_for_its_batch_size_is_counted_on_that() -> None:
    def halves(held: Any, message: Any, carry: Any, batch: Any) -> Any:
        left, right = batch.x.reshape(2, SIZE // 2, 6)
        return carry + (left @ right.T).sum(), {}

    assert of(halves) == 2 * (SIZE // 2) ** 2 * 6 / SIZE


def test_steps_without_data_count_whole() -> None:
    """A generator's, say: rows of the client's own choice may be holes, and the step computes all the same."""

    def dreams(held: Any, message: Any, carry: Any, batch: Any) -> Any:
        return carry + (jax.random.normal(batch.key, (7, 6)) @ carry).sum(), {}

    holes = Passes(steps=3, batch_size=SIZE, rows=lambda labels, rng: iter([np.full((3, SIZE), -1)]))
    assert of(dreams, holes) == 2 * 7 * 6 * 5 and of(dreams) == 0


@pytest.mark.slow
def test_a_round_adds_its_exchanges_up() -> None:
    """Examples times their price; where rows are one's own, steps times that."""

    def both(task: Task) -> Algorithm:
        first, second = fed_avg(with_teacher()), fed_avg(task)

        def round(key: Any, held: Any, server: Any, cohort: Any) -> Any:
            first.round(key, held, server, cohort)
            return second.round(key, held, server, cohort)

        return second._replace(round=round)

    _, _, (cohort,) = run(both, tiny_problem())
    seen = 2 * int(cohort.sizes.sum())  # two epochs
    assert [one.examples for one in cohort.done] == [seen, seen]
    assert cohort.flops() == seen * (3 * FORWARD + 2 * GRADIENT)

    def rows(labels: np.ndarray, rng: np.random.Generator) -> Iterator[np.ndarray]:
        yield np.full((3, SIZE), -1)

    own = tiny_task(passes=Passes(steps=3, batch_size=SIZE, rows=rows))
    _, _, (cohort,) = run(fed_avg, tiny_problem(), task=own)
    assert [(one.examples, one.live) for one in cohort.done] == [(0, 3 * 6)]
    assert cohort.flops() == 3 * 6 * SIZE * (FORWARD + GRADIENT)
