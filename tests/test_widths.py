"""Narrow steps: as many columns of a batch as the lanes need give what whole batches give."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedsim import augment, packing
from fedsim.algorithms import ALGORITHMS
from fedsim.core import Algorithm, Local, Passes, mean
from fedsim.testing import SIZES, run, same, tiny_problem, tiny_task

pytestmark = pytest.mark.usefixtures("compile_once")

COHORTS = ((0, 1, 2, 5, 7, 9), (3, 11, 10, 6, 5, 8))


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


def test_widths_are_chosen_by_the_population():
    """So every cohort finds them compiled, whatever its own sizes."""
    task = tiny_task(passes=Passes(1, None, 8))
    _, _, done = run(ALGORITHMS["fed_avg"], tiny_problem(), COHORTS, task=task)
    programs = list(done[0].engine._programs.values())
    assert [p.widths for p in programs] == [packing.choose_widths(np.array(SIZES), Passes(1, None, 8))]
    assert len(programs[0].widths) > 2


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


def test_random_changes_of_an_example_do_not_depend_on_the_width():
    """What is drawn for the first rows is the same, however many are drawn: of keys, numbers, images."""
    key = jax.random.key(3)
    images = jax.random.randint(key, (8, 12, 12, 3), 0, 256).astype(jnp.uint8)
    change = augment.make(("flip", "crop(padding=2)"))
    np.testing.assert_array_equal(change(key, images)[:3], change(key, images[:3]))
    for draw in (jax.random.split, lambda k, n: jax.random.normal(k, (n, 5)), lambda k, n: jax.random.uniform(k, (n,))):
        a, b = draw(key, 8)[:3], draw(key, 3)
        assert bool((a == b).all())


def test_momentum_does_not_move_on_a_step_without_rows():
    """A wave of empty clients computes nothing at all, and leaves no trace."""
    task = tiny_task(passes=Passes(1, None, 8))
    task = task._replace(optimizer=lambda lr: optax.sgd(0.1, momentum=0.9))
    with_empty = ((*COHORTS[0], 3),)
    a = run(ALGORITHMS["fed_avg"], tiny_problem(), COHORTS[:1], task=task)[0]
    b = run(ALGORITHMS["fed_avg"], tiny_problem(), with_empty, task=task, lanes=1)[0]
    same(a, b, "a client without examples", rtol=1e-5)
