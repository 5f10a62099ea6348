"""FedPAQ and FedDropoutAvg: reductions to FedAvg, loops in NumPy, bytes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedsim import wire
from fedsim.algorithms import find
from fedsim.algorithms.fed_avg import fed_avg
from fedsim.algorithms.fed_dropout_avg import fed_dropout_avg, masks
from fedsim.algorithms.fed_paq import fed_paq
from fedsim.testing.contract import same
from fedsim.testing.tasks import tiny_wide_task
from fedsim.testing.toys import COHORT, SIZES, one_client, run, tiny_problem

pytestmark = pytest.mark.usefixtures("compile_once")

PROBLEM = tiny_problem()
COHORTS = (COHORT, (3, 11, 10, 6, 5, 8))
START = tiny_wide_task().init(jax.random.key(5))
WIDE = tiny_wide_task(init=lambda key: START)


@pytest.mark.slow
def test_fed_paq_is_fed_avg_under_the_runs_qsgd_bit_for_bit():
    paq, _, (cohort, _) = run(fed_paq, PROBLEM, COHORTS, task=WIDE)
    coded, _, (other, _) = run(fed_avg, PROBLEM, COHORTS, task=WIDE, up=wire.codec("qsgd(9, 0)"))
    same(coded.params, paq.params, "255 levels")
    assert cohort.traffic() == other.traffic()
    down, up = cohort.traffic()
    assert sum(down.values()) == 6 * 4 * 39  # as it is
    assert sum(up.values()) == 6 * sum(-(-n * 9 // 8) + 4 for n in (24, 12, 3))


@pytest.mark.slow
def test_fed_paq_with_many_levels_is_fed_avg():
    plain, _, _ = run(fed_avg, PROBLEM, COHORTS, task=WIDE)
    fine, _, _ = run(lambda task: fed_paq(task, bits=16), PROBLEM, COHORTS, task=WIDE)
    same(plain.params, fine.params, "16 bits", rtol=1e-3)


@pytest.mark.slow
def test_what_fed_paq_sends_is_a_level_beside_the_value():
    """|v|_2 l / s with l one of the two whole numbers around s |v_i| / |v|_2, and the sign of v."""
    sent = []
    run(lambda task: fed_paq(task, bits=4), PROBLEM, ((7,),), task=WIDE, sent=sent)
    marked, _ = one_client(PROBLEM, sent[0].local, START, (), 7, 1)
    reply = wire.unwrap(wire.arrive(marked, None, jax.random.key(3), jax.random.key(4))[0])
    for path, leaf in wire.unmarked(marked).items():
        v, s = np.asarray(leaf, np.float64), 7
        exact = s * v / np.linalg.norm(v)
        level = np.asarray(reply[path], np.float64) * s / np.linalg.norm(v)
        np.testing.assert_allclose(level, np.round(level), atol=1e-4)
        assert (np.abs(level - exact) < 1 + 1e-4).all()


@pytest.mark.slow
def test_fed_dropout_avg_that_drops_nothing_is_fed_avg():
    plain, _, _ = run(fed_avg, PROBLEM, COHORTS, task=WIDE)
    found, _, _ = run(lambda task: fed_dropout_avg(task, rate=0.0), PROBLEM, COHORTS, task=WIDE)
    same(plain.params, found.params, "rate = 0", rtol=1e-5)


def test_fed_dropout_avg_is_its_numpy_loop():
    """Each entry over the weight of those who sent it; what nobody sent stays. Bytes are those of what was sent, and a seed."""
    rate, sent = 0.6, []
    found, _, (cohort,) = run(lambda task: fed_dropout_avg(task, rate), PROBLEM, task=WIDE, sent=sent)
    sums, weights = ({path: np.zeros(leaf.shape) for path, leaf in START.items()} for _ in range(2))
    nbytes = 0
    for id in COHORT:
        reply, _ = one_client(PROBLEM, sent[0].local, START, (), id, 1)
        mask = masks(reply["seed"], START, rate)
        for path, marked in reply["change"].tree.items():
            m = np.asarray(mask[path])
            sums[path] += SIZES[id] * m * np.asarray(marked.leaf)
            weights[path] += SIZES[id] * m
            nbytes += 4 * int(m.sum())
    assert sum(cohort.traffic()[1].values()) == nbytes + 8 * len(COHORT)
    for path, leaf in START.items():
        moved = np.divide(sums[path], weights[path], out=np.zeros_like(sums[path]), where=weights[path] > 0)
        np.testing.assert_allclose(found.params[path], leaf + moved, rtol=1e-5, atol=1e-6)


def test_what_nobody_sent_stays_as_it_is():
    found, _, _ = run(lambda task: fed_dropout_avg(task, 0.9), PROBLEM, ((7,),), task=WIDE)
    unmoved = [np.asarray(found.params[path] == leaf).mean() for path, leaf in START.items()]
    assert 0.6 < float(np.mean(unmoved)) <= 1.0


def test_masks_keep_their_share_and_differ_by_client():
    shapes = {"w": jnp.zeros((100, 100))}
    one, other = (masks(jnp.array([0, seed], jnp.uint32), shapes, 0.3)["w"] for seed in (1, 2))
    assert abs(float(one.mean()) - 0.7) < 0.02
    assert not np.array_equal(one, other)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("fed_paq(bits=1)", r"Expected 2 <= bits=1"),
        ("fed_dropout_avg(rate=1)", r"Expected 0 <= rate=1\.0 < 1"),
        ("fed_dropout_avg(rate=-0.1)", r"Expected 0 <= rate=-0\.1"),
    ],
)
def test_what_is_refused(text, says):
    with pytest.raises(ValueError, match=says):
        find(text)(WIDE)
