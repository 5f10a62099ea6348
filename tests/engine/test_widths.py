"""Narrow steps: as many columns of a batch as the lanes need give what whole batches give."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedsim.algorithms import ALGORITHMS
from fedsim.core import Algorithm, Local, Passes
from fedsim.engine import packing
from fedsim.engine.lane_count import choose_lanes
from fedsim.engine.lanes import Lanes, Request
from fedsim.folds import mean
from fedsim.testing.contract import same
from fedsim.testing.tasks import tiny_task
from fedsim.testing.toys import SIZES, run, tiny_problem
from fedsim.training import augment
from fedsim.training.local import fit

pytestmark = pytest.mark.usefixtures("compile_once")

COHORTS = ((0, 1, 2, 5, 7, 9), (3, 11, 10, 6, 5, 8))


@pytest.mark.slow
def test_narrow_steps_give_what_whole_batches_give():
    """Plain SGD over two rounds, on one device and on three, to the order of summation; less is computed."""
    task = tiny_task(passes=Passes(2, None, 8))
    whole, _, done = run(ALGORITHMS["fed_avg"], tiny_problem(), COHORTS, task=task, widths=(8,))
    for options in ({}, {"widths": tuple(range(9))}, {"devices": 3}):
        narrow, _, narrowed = run(ALGORITHMS["fed_avg"], tiny_problem(), COHORTS, task=task, **options)
        same(whole, narrow, f"{options}", rtol=1e-5)
        for a, b in zip(done, narrowed, strict=True):
            assert a.done[0].examples == b.done[0].examples
            losses = (c.done[0].info.clients["loss"] for c in (a, b))
            np.testing.assert_allclose(*losses, rtol=1e-5, equal_nan=True)
            if "devices" not in options:
                assert b.done[0].occupancy[1] > a.done[0].occupancy[1] + 0.05


@pytest.mark.slow
def test_widths_are_chosen_by_the_population():
    """So every cohort finds them compiled, whatever its own sizes."""
    task = tiny_task(passes=Passes(1, None, 8))
    _, _, done = run(ALGORITHMS["fed_avg"], tiny_problem(), COHORTS, task=task)
    programs = list(done[0].engine._programs.values())
    assert [p.widths for p in programs] == [packing.choose_widths(np.array(SIZES), Passes(1, None, 8))]
    assert len(programs[0].widths) > 2


def test_few_clients_of_an_accelerator_fill_tiles():
    """Narrow steps of two or three lanes, at widths that an accelerator would pad otherwise; a CPU keeps its own."""
    sizes, passes = np.array([9, 12, 17]), Passes(1, None, 8)
    rows, offsets = np.arange(38, dtype=np.int32), np.concatenate([[0], np.cumsum(sizes)])
    local = fit(tiny_task().loss, optax.sgd, lambda client, message: client.lr, passes)
    params = {"kernel": jnp.zeros((6, 3)), "bias": jnp.zeros(3)}
    problem = tiny_problem()
    engine = Lanes(problem.held, problem.x[:38], problem.y[:38], rows, offsets, devices=1)

    def widths() -> tuple[int, ...]:
        return engine._widths_for(Request(local, mean(), False, lambda key, held: (), params))

    assert widths() == packing.choose_widths(sizes, passes) == (0, 1, 4, 8)
    engine.devices = [SimpleNamespace(platform="tpu")]
    assert widths() == packing.choose_widths(sizes, passes, 4) == (0, 4, 8)
    assert choose_lanes(sizes, passes, 1, "tpu", widths()) == 2


@pytest.mark.parametrize("batch", [1, 3, 4, 8, 12, 16])
@pytest.mark.parametrize("clients", [3, 12, 40, 100, 192])
def test_lanes_of_an_accelerator_fill_tiles_where_that_costs_no_rows(clients, batch):
    """No lanes that may be taken cost less, padding included; of about the same cost those that need none are taken."""
    rng = np.random.default_rng(clients)
    sizes = np.clip(np.round(9 * np.exp(0.9 * rng.normal(size=clients))), 2, 60).astype(int)
    passes = Passes(1, None, batch)
    widths = packing.choose_widths(sizes, passes, packing.width_multiple(clients, 1, "tpu"))
    work = packing.work_of(sizes, packing.steps_of(sizes, passes), passes)

    def cost(lanes: int) -> float:
        return packing.cost(packing.pack(work, 1, lanes, widths)[1], lanes, packing.TILE)

    found = choose_lanes(sizes, passes, 1, "tpu", widths)
    most = int(work.spans.sum() // work.spans.max())
    assert -(-most // 2) <= found <= most
    for lanes in {-(-most * k // 8) for k in range(4, 9)}:
        assert cost(found) <= 1.02 * cost(lanes)
        if not any(lanes * width % 8 for width in widths) and cost(lanes) <= cost(found):
            assert not any(found * width % 8 for width in widths), f"{lanes} lanes cost no more and fill tiles"


def test_whole_batches_where_the_carry_depends_on_the_rows():
    """A step that keeps its batch cannot be narrowed; it runs as before."""
    task = tiny_task(passes=Passes(1, None, 8))

    def keeping(task):
        def start(held, message, client, batch):
            return message, jnp.zeros_like(batch.mask)

        def step(held, message, carry, batch):
            grads, metrics = jax.grad(lambda p: task.loss(held, p, batch), has_aux=True)(carry[0])
            return (jax.tree.map(lambda p, g: p - 0.1 * g, carry[0], grads), batch.mask), metrics

        def finish(held, message, carry, client):
            return jax.tree.map(jnp.subtract, carry[0], message), client.memory, {"rows": carry[1].sum()}

        local, reduce = Local(start, step, finish, task.passes), mean(task.weight)

        def round(key, held, server, cohort):
            change, info = cohort.exchange(server, local, reduce)
            return jax.tree.map(jnp.add, server, change), info.metrics

        return Algorithm(
            lambda key, held: task.init(key),
            round,
            lambda held, server, memory, x: task.logits(held, server, x),
            params=lambda server: server,
        )

    kept, _, done = run(keeping, tiny_problem(), COHORTS, task=task)
    assert [p.widths for p in done[0].engine._programs.values()] == [(8,)]
    same(kept, run(keeping, tiny_problem(), COHORTS, task=task, widths=(8,))[0], "whole batches")


@pytest.mark.slow
def test_random_changes_of_an_example_do_not_depend_on_the_width():
    """What is drawn for the first rows is the same, however many are drawn: of keys, numbers, images."""
    key = jax.random.key(3)
    images = jax.random.randint(key, (8, 12, 12, 3), 0, 256).astype(jnp.uint8)
    change = augment.make(("flip", "crop(padding=2)"))
    np.testing.assert_array_equal(change(key, images)[:3], change(key, images[:3]))
    for draw in (jax.random.split, lambda k, n: jax.random.normal(k, (n, 5)), lambda k, n: jax.random.uniform(k, (n,))):
        a, b = draw(key, 8)[:3], draw(key, 3)
        assert bool((a == b).all())


def every_width_tried(sizes: np.ndarray, passes: Passes, multiple: int) -> tuple[int, ...]:
    """`packing.choose_widths` with all (B + 1)^2 pairs of widths compared: what it was before it became linear."""
    size, sizes = passes.batch_size, sizes[sizes > 0]
    if not len(sizes):
        return (size,)
    full, short = np.divmod(sizes, size)
    often = np.bincount(short[short > 0], minlength=size + 1)
    often[size] = full.sum()
    top = min(-(-int(np.flatnonzero(often)[-1]) // multiple) * multiple, size)
    upto, each = np.concatenate([[0], np.cumsum(often)]), np.arange(size + 1)
    best, chosen = each * upto[1:], [(int(w),) for w in each]
    found = (int(best[top]), (top,))
    for _ in range(packing.MOST_WIDTHS - 1):
        cost = best[:, None] + each[None] * (upto[1:][None] - upto[1:][:, None])
        narrower = (each % multiple == 0)[:, None] & (each[:, None] < each[None])
        before = np.where(narrower, cost, np.iinfo(np.int64).max)[1:].argmin(axis=0) + 1
        before[: multiple + 1] = 0
        chosen = [(*chosen[before[w]], int(w)) if w > multiple else (int(w),) for w in each]
        best = np.where(each > multiple, cost[before, each], best)
        if found[0] - best[top] < packing.WORTH * found[0]:
            break
        found = (int(best[top]), chosen[top])
    return (size,) if found[1] == (size,) else (0, *found[1])


def test_widths_are_those_of_all_pairs_compared():
    rng = np.random.default_rng(0)
    for _ in range(600):
        batch, multiple, clients = int(rng.integers(1, 200)), int(rng.choice([1, 2, 4, 8])), int(rng.integers(1, 80))
        for sizes in (
            rng.integers(0, 3 * batch + 2, clients),
            rng.integers(0, 5, clients) * max(batch // 2, 1),
            np.minimum(rng.geometric(0.05, clients), 10**4),
        ):
            passes = Passes(1, None, batch)
            assert packing.choose_widths(sizes, passes, multiple) == every_width_tried(sizes, passes, multiple)


def test_the_widths_of_a_huge_batch_are_found_at_once():
    sizes = np.random.default_rng(0).integers(0, 2 * 10**5, 10**4)
    widths = packing.choose_widths(sizes, Passes(1, None, 2**16))
    assert len(widths) == 1 + packing.MOST_WIDTHS and widths[-1] == 2**16
