"""FedProto against training alone, a plain loop of one step, its bytes, and its answers."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedsim.algorithms import find
from fedsim.algorithms.fed_proto import fed_proto
from fedsim.algorithms.local_only import local_only
from fedsim.core import Passes
from fedsim.testing.contract import same
from fedsim.testing.tasks import CLASSES, tiny_head_task
from fedsim.testing.toys import COHORT, run, tiny_problem

pytestmark = pytest.mark.usefixtures("compile_once")

PROBLEM = tiny_problem()
START = tiny_head_task().init(jax.random.key(5))
TASK = tiny_head_task(init=lambda key: START)
WIDTH = 4


def kept(memory, id):
    return jax.tree.map(lambda leaf: leaf[0], memory.gather(np.array([id]))[0])


def rows_of(id):
    return PROBLEM.rows[PROBLEM.offsets[id] : PROBLEM.offsets[id + 1]]


def own_means(id):
    """Mean features by class and which there are, NumPy."""
    f, y = np.tanh(PROBLEM.x[rows_of(id)] @ np.asarray(START["hidden"])), PROBLEM.y[rows_of(id)]
    has = np.array([(y == c).any() for c in range(CLASSES)])
    return np.stack([f[y == c].mean(axis=0) if has[c] else np.zeros(WIDTH) for c in range(CLASSES)]), has


def mean_of(ids):
    sets, has = map(np.stack, zip(*map(own_means, ids), strict=True))
    return (sets * has[..., None]).sum(axis=0) / has.sum(axis=0)[:, None]


@pytest.mark.slow
def test_without_a_pull_it_is_training_alone():
    _, alone, _ = run(local_only, PROBLEM, (COHORT, COHORT), task=TASK)
    _, found, _ = run(lambda task: fed_proto(task, lam=0.0), PROBLEM, (COHORT, COHORT), task=TASK)
    same(kept(alone, 7), kept(found, 7).params, "lam = 0", rtol=1e-6)


def test_a_step_is_its_formula():
    """One step on all of client 7's examples; the mean is unweighted, over who has the class."""
    task = TASK._replace(
        optimizer=optax.sgd, passes=Passes(1, None, 40, shuffle=False), lr=lambda client, message: jnp.float32(0.2)
    )
    server, memory, _ = run(lambda task: fed_proto(task, lam=3.0), PROBLEM, (COHORT,), task=task)
    mean, rows = mean_of(COHORT), rows_of(7)
    np.testing.assert_allclose(server.mean, mean, rtol=1e-5, atol=1e-6)

    def value(w):
        f = jnp.tanh(PROBLEM.x[rows] @ w["hidden"])
        labels = PROBLEM.y[rows]
        entropy = optax.softmax_cross_entropy_with_integer_labels(f @ w["head/kernel"] + w["head/bias"], labels)
        return entropy.mean() + 3.0 * ((f - jnp.asarray(mean, jnp.float32)[labels]) ** 2).mean()

    expected = jax.tree.map(lambda w, g: w - 0.2 * g, START, jax.grad(value)(START))
    same(expected, kept(memory, 7).params, "a step", rtol=1e-4)


def test_it_answers_by_the_nearest_mean_of_its_own_classes_or_by_its_head():
    still = TASK._replace(lr=lambda client, message: jnp.float32(0))
    server, memory, _ = run(fed_proto, PROBLEM, (COHORT,), task=still)
    lacks = next(id for id in COHORT if not own_means(id)[1].all())
    for id in (7, lacks):
        f, (_, has) = np.tanh(PROBLEM.x[:80] @ np.asarray(START["hidden"])), own_means(id)
        far = ((f[:, None] - mean_of(COHORT)) ** 2).sum(axis=-1)
        expected = np.where(has, far, np.inf).argmin(axis=1)
        found = fed_proto(still).predict(PROBLEM.held, server, kept(memory, id), PROBLEM.x[:80])
        np.testing.assert_array_equal(np.asarray(found).argmax(axis=1), expected)
    by_head = fed_proto(still, answer="head").predict(PROBLEM.held, server, kept(memory, 7), PROBLEM.x[:80])
    same(still.logits(PROBLEM.held, START, PROBLEM.x[:80]), by_head, "its head", rtol=1e-6)


def test_bytes_are_prototypes_and_a_bit_for_each_class():
    _, _, (cohort,) = run(fed_proto, PROBLEM, (COHORT,), task=TASK)
    down, up = (sum(way.values()) for way in cohort.traffic())
    assert up == sum(4 * WIDTH * int(own_means(id)[1].sum()) + 1 for id in COHORT)
    assert down == len(COHORT) * (4 * WIDTH * CLASSES + 1)


@pytest.mark.parametrize(
    ("text", "says"),
    [("fed_proto(lam=-1)", r"Expected lam=-1\.0 >= 0"), ("fed_proto(answer='mean')", "one of prototypes, head")],
)
def test_what_is_refused(text, says):
    with pytest.raises(ValueError, match=says):
        find(text)(TASK)
