"""FedKSeed against loops in float64 NumPy: steps, rebuilding, bytes. Directions are the algorithm's own, in single precision."""

import by_hand
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from by_hand import doubles, outputs, sgd_task, start_of

from fedsim import wire
from fedsim.algorithms import find
from fedsim.algorithms.fed_kseed import direction, fed_kseed, rebuilt
from fedsim.core import Batch, Client, Passes
from fedsim.engine.keys import key_for
from fedsim.folds import by_examples
from fedsim.testing.contract import CHECKS, same
from fedsim.testing.tasks import tiny_task
from fedsim.testing.toys import SIZES, one_client, run, tiny_problem

pytestmark = pytest.mark.usefixtures("compile_once")

PROBLEM = tiny_problem()
COHORTS = ((2, 0, 7, 4), (7, 5, 2, 8))
RATE, EPSILON = 0.3, 0.25  # far enough that rounding of the loss, over 2 epsilon, is small; NumPy goes as far


def task_of(**changes):
    return sgd_task(RATE, weight=by_examples, **changes)


def directions(seeds, pool=0):
    """z of every seed in float64."""
    return [doubles(direction(jnp.int32(j), tiny_task().init(jax.random.key(0)), pool)) for j in range(seeds)]


def moved(w, far, z):
    return {path: leaf + far * z[path] for path, leaf in w.items()}


def loss(rows, w):
    """Mean cross-entropy over these rows."""
    _, logits = outputs(PROBLEM, rows, w)
    logits = logits - logits.max(1, keepdims=True)
    picked = logits[np.arange(len(rows)), PROBLEM.y[rows]]
    return np.mean(np.log(np.exp(logits).sum(1)) - picked)


def drawn(id, round, step, seeds):
    """The seed that a client draws in this step."""
    key = key_for(jax.random.key(0), "local", round, 0, id)
    return int(jax.random.randint(key_for(jax.random.fold_in(key, step), "seed"), (), 0, seeds))


def walked(w, id, round, zs, passes):
    """What a client moved along each direction."""
    found = np.zeros(len(zs))
    for step, rows in enumerate(by_hand.batches(PROBLEM, passes, id, round)):
        seed = drawn(id, round, step, len(zs))
        slope = (loss(rows, moved(w, EPSILON, zs[seed])) - loss(rows, moved(w, -EPSILON, zs[seed]))) / (2 * EPSILON)
        found[seed] -= RATE * slope
        w = moved(w, -RATE * slope, zs[seed])
    return found


def built(w, numbers, zs):
    for number, z in zip(numbers, zs, strict=True):
        w = moved(w, number, z)
    return w


def make(seeds, **options):
    return lambda task: fed_kseed(task, seeds=seeds, epsilon=EPSILON, **options)


def test_one_seed_and_one_step_are_the_closed_form():
    """a = - lr sum_k p_k (l_k(w + eps z) - l_k(w - eps z)) / (2 eps), and w = w_0 + a z."""
    task = task_of(passes=Passes(1, 1, 4))
    (z,), w, ids = directions(1), start_of(task), (2, 7)
    server, _, _ = run(make(1), PROBLEM, (ids,), task=task)
    slopes = []
    for id in ids:
        (rows,) = by_hand.batches(PROBLEM, task.passes, id, 1)
        slopes.append((loss(rows, moved(w, EPSILON, z)) - loss(rows, moved(w, -EPSILON, z))) / (2 * EPSILON))
    number = -RATE * np.average(slopes, weights=[SIZES[id] for id in ids])
    np.testing.assert_allclose(server.numbers.params["numbers"], [number], rtol=1e-5)
    by_hand.close(server.params, moved(w, number, z))


@pytest.mark.slow
def test_rounds_are_their_numpy_loop():
    """Two rounds of some clients, several passes, eight seeds of a pool of its own."""
    task, zs = task_of(), directions(8, pool=3)
    start, numbers = start_of(task), np.zeros(8)
    for round, ids in enumerate(COHORTS, 1):
        w = built(start, numbers, zs)
        each = [walked(w, id, round, zs, task.passes) for id in ids]
        numbers = numbers + np.average(each, axis=0, weights=[SIZES[id] for id in ids])
    server, _, _ = run(make(8, pool=3), PROBLEM, COHORTS, task=task)
    np.testing.assert_allclose(server.numbers.params["numbers"], numbers, rtol=1e-4, atol=1e-5)
    by_hand.close(server.params, built(start, numbers, zs), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("epsilon", [0.01, pytest.param(1.0, marks=pytest.mark.slow)])
def test_on_a_quadratic_the_two_point_slope_is_the_directional_derivative(epsilon):
    """Whatever epsilon: the second-order terms of both evaluations are the same. g = <grad, z>."""
    curve, centre = {"kernel": 2.0, "bias": 0.5}, {"kernel": 0.3, "bias": -1.0}

    def loss(held, params, batch):
        values = [0.5 * curve[path] * jnp.sum((leaf - centre[path]) ** 2) for path, leaf in params.items()]
        return sum(values), {}

    task, sent = task_of(loss=loss, passes=Passes(1, 1, 4)), []
    run(lambda task: fed_kseed(task, seeds=5, epsilon=epsilon), PROBLEM, ((2,),), task=task, sent=sent)
    reply, _ = one_client(PROBLEM, sent[0].local, wire.unwrap(wire.unmarked(sent[0].message)), (), 2, 1)
    found, seed, w = wire.unmarked(reply)["numbers"], drawn(2, 1, 0, 5), start_of(task)
    z = directions(5)[seed]
    derivative = sum(np.sum(curve[path] * (w[path] - centre[path]) * z[path]) for path in w)
    np.testing.assert_allclose(found[seed], -RATE * derivative, rtol=1e-3)
    assert np.count_nonzero(found) == 1


@pytest.mark.slow
def test_rebuilt_parameters_are_the_servers_bit_for_bit():
    """By a client alone, by clients in lanes, and from the numbers in plain calls."""
    sent = []
    server, _, _ = run(make(16), PROBLEM, (*COHORTS, (0,)), task=task_of(), sent=sent)
    before, _, _ = run(make(16), PROBLEM, COHORTS, task=task_of())
    message = wire.unwrap(wire.unmarked(sent[-1].message))
    client = Client(jnp.int32(0), jnp.int32(7), (), jax.random.key(1), jnp.int32(3), jnp.float32(0.1), jnp.int32(4))
    rows = jnp.zeros(4, jnp.int32)
    batch = Batch(PROBLEM.x[:4], rows, rows.astype(jnp.float32), jax.random.key(2), jnp.int32(0), jnp.asarray(False))
    start = sent[-1].local.start
    alone = jax.jit(start)({}, message, client, batch).params
    three = jax.jit(jax.vmap(lambda n: start({}, message, client._replace(n=n), batch).params))(jnp.arange(3))
    same(before.params, alone, "a client's")
    for place in range(3):
        same(before.params, {path: leaf[place] for path, leaf in three.items()}, "in lanes")
    same(before.params, rebuilt(message["start"], message["numbers"], 0), "in plain calls")
    same(before.start, message["start"], "w_0")
    assert not np.array_equal(before.params["kernel"], server.params["kernel"])


@pytest.mark.slow
def test_bytes_are_those_of_the_pairs_and_of_k_numbers():
    """Down 4 K; up 8 for each seed that was drawn, at most 8 a step; each as long as what is really serialised."""
    seeds, sent = 50, []
    _, _, (cohort,) = run(make(seeds), PROBLEM, COHORTS[:1], task=task_of(), sent=sent)
    down, up = cohort.traffic()
    assert {name: n for name, n in down.items() if n} == {"numbers": len(COHORTS[0]) * 4 * seeds}
    message, pairs = wire.unwrap(wire.unmarked(sent[0].message)), 0
    assert len(wire.serialise(message["numbers"])) == 4 * seeds
    for id in COHORTS[0]:
        reply, _ = one_client(PROBLEM, sent[0].local, message, (), id, 1)
        bare, steps = wire.unmarked(reply), sum(1 for _ in by_hand.batches(PROBLEM, task_of().passes, id, 1))
        which = np.flatnonzero(reply["seeds"].entries)
        assert set(which) == {drawn(id, 1, step, seeds) for step in range(steps)}
        sold = {"seeds": bare["seeds"][which], "numbers": bare["numbers"][which]}
        assert sold["seeds"].dtype == jnp.uint32 and sold["numbers"].dtype == jnp.float32
        assert len(wire.serialise(sold)) == 8 * len(which) <= 8 * steps
        pairs += len(which)
    assert up == {"numbers": 4 * pairs, "seeds": 4 * pairs}


@pytest.mark.slow
def test_sums_are_the_same_rounds_at_another_price():
    pairs, _, _ = run(make(20), PROBLEM, COHORTS, task=task_of())
    sums, _, (cohort, _) = run(make(20, sends="sums"), PROBLEM, COHORTS, task=task_of())
    same(pairs.params, sums.params, "sums", rtol=1e-6)
    assert cohort.traffic()[1] == {"numbers": len(COHORTS[0]) * 4 * 20}


@pytest.mark.slow
def test_the_servers_optimizer_moves_the_numbers():
    """FedAvgM's first two rounds: a_2 = a_1 + (beta a_1 + c_2)."""
    plain, heavy = (task_of(server_optimizer=optax.sgd(1.0, momentum=beta)) for beta in (0.0, 0.5))
    one, first, second = (
        run(make(4), PROBLEM, ((2,),) * n, task=task)[0].numbers.params["numbers"]
        for n, task in ((1, plain), (1, heavy), (2, heavy))
    )
    same(one, first, "the first round")
    again, _, _ = run(make(4), PROBLEM, ((2,), (2,)), task=plain)
    assert not np.allclose(second, again.numbers.params["numbers"], rtol=1e-3)


def test_directions_are_normal_and_differ_by_seed_leaf_and_pool():
    shapes = {"a": jnp.zeros((40, 50)), "b": jnp.zeros(2000)}
    one, other, pooled = (direction(jnp.int32(j), shapes, pool) for j, pool in ((3, 0), (4, 0), (3, 1)))
    drawn = [np.ravel(z[path]) for z in (one, other, pooled) for path in shapes]
    for z in drawn:
        assert abs(z.mean()) < 0.1 and abs(z.std() - 1) < 0.1
    close = np.corrcoef(drawn) - np.eye(len(drawn))
    assert np.abs(close).max() < 0.1


@pytest.mark.slow
def test_the_loss_falls():
    task = task_of(passes=Passes(1, 20, 4))
    rows = np.arange(1, len(PROBLEM.y))
    server, _, _ = run(make(64), PROBLEM, ((2, 7, 4, 9),) * 5, task=task)
    assert loss(rows, doubles(server.params)) < 0.8 * loss(rows, start_of(task))


@pytest.mark.slow
def test_under_an_average_that_is_no_mean_sums_run_and_pairs_are_refused():
    CHECKS["an average that is no mean, or refused"](make(20, sends="sums"))
    CHECKS["an average that is no mean, or refused"](make(20))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("fed_kseed(seeds=0)", r"Expected 1 <= seeds=0"),
        ("fed_kseed(epsilon=0)", r"Expected epsilon=0(\.0)? > 0"),
        ("fed_kseed(pool=-1)", r"Expected 0 <= pool=-1"),
        ("fed_kseed(sends='all')", r"sends='all'"),
    ],
)
def test_what_is_refused(text, says):
    with pytest.raises(ValueError, match=says):
        find(text)(task_of())


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda rate: optax.sgd(rate, momentum=0.9),
        optax.adam,
        lambda rate: optax.chain(optax.add_decayed_weights(0.1), optax.sgd(rate)),
        lambda rate: optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(rate)),
    ],
)
def test_steps_that_are_not_plain_are_refused(optimizer):
    with pytest.raises(ValueError, match=r"plain SGD steps for algorithm='fed_kseed'.*--optimizer sgd"):
        fed_kseed(task_of(optimizer=optimizer))
