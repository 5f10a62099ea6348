"""FedAvg against a NumPy loop, FedProx against FedAvg, optimizers and schedules of server and clients."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedsim import wire
from fedsim.algorithms import ALGORITHMS, find
from fedsim.algorithms.fed_avg import fed_avg, fed_prox
from fedsim.core import Passes
from fedsim.engine.plan import batches
from fedsim.folds import uniform
from fedsim.testing.contract import same
from fedsim.testing.tasks import tiny_task
from fedsim.testing.toys import COHORT, run, tiny_problem

pytestmark = pytest.mark.usefixtures("compile_once")


def numpy_fed_avg(problem, start, cohorts, rate, passes):
    """FedAvg with plain SGD in float64; softmax regression's gradient written out."""
    w = {k: np.asarray(v, np.float64) for k, v in start.items()}
    for round, ids in enumerate(cohorts, 1):
        total, weight = {k: np.zeros_like(v) for k, v in w.items()}, 0
        for id in ids:
            own = problem.rows[problem.offsets[id] : problem.offsets[id + 1]]
            mine = {k: v.copy() for k, v in w.items()}
            _, step, _, example = batches(np.array([id]), np.array([len(own)]), passes, 0, round)
            for s in range(step.max(initial=-1) + 1):
                rows = own[example[step == s]]
                x = np.tanh(problem.x[rows].astype(np.float64) @ problem.held["frozen"])
                z = x @ mine["kernel"] + mine["bias"]
                p = np.exp(z - z.max(1, keepdims=True))
                p /= p.sum(1, keepdims=True)
                g = (p - np.eye(p.shape[1])[problem.y[rows]]) / len(rows)
                mine["kernel"] -= rate * x.T @ g
                mine["bias"] -= rate * g.sum(0)
            for k in total:
                total[k] += len(own) * (mine[k] - w[k])
            weight += len(own)
        w = {k: v + total[k] / max(weight, 1) for k, v in w.items()}
    return w


@pytest.mark.parametrize("passes", [Passes(2, None, 4), Passes(1, 5, 4)])
def test_numpy_loop_gives_the_same_parameters(passes):
    problem, cohorts = tiny_problem(), (COHORT, (3, 11, 10, 6, 5, 8), (7, 8))
    start = tiny_task().init(jax.random.key(5))
    task = tiny_task(
        init=lambda key: start, optimizer=optax.sgd, lr=lambda client, message: jnp.float32(0.3), passes=passes
    )
    server, _, _ = run(fed_avg, problem, cohorts, task=task)
    for name, leaf in numpy_fed_avg(problem, start, cohorts, 0.3, passes).items():
        np.testing.assert_allclose(server.params[name], leaf, rtol=2e-5, atol=1e-6)


def test_fed_prox_without_pull_is_fed_avg():
    problem = tiny_problem()
    same(run(fed_avg, problem)[0], run(lambda t: fed_prox(t, mu=0.0), problem)[0], "mu = 0", rtol=1e-6)


def test_fed_prox_pulls_to_the_start():
    """The stronger the pull, the less the server moves; a very strong one (with a rate it bears) hardly at all."""
    problem = tiny_problem()
    task = tiny_task(optimizer=optax.sgd, lr=lambda client, message: jnp.float32(0.01))
    start = task.init(jax.random.key(0))
    task = task._replace(init=lambda key: start)

    def moved(mu):
        server, _, _ = run(lambda t: fed_prox(t, mu=mu), problem, task=task)
        return float(optax.tree.norm(jax.tree.map(jnp.subtract, server.params, start)))

    assert moved(0.0) > moved(10.0) > moved(90.0)


def test_one_client_is_plain_training():
    """With one client, FedAvg of two rounds of plain SGD is SGD for two epochs."""
    problem = tiny_problem()
    task = tiny_task(optimizer=optax.sgd, passes=Passes(1, None, 64), lr=lambda client, message: jnp.float32(0.5))
    server, _, _ = run(fed_avg, problem, ((7,), (7,)), task=task)
    # One batch holds all 40 examples, so their order does not matter and two epochs are one client's two steps.
    twice, _, _ = run(fed_avg, problem, ((7,),), task=task._replace(passes=Passes(2, None, 64)))
    same(server, twice, "two rounds of one epoch", rtol=1e-5)


def test_server_optimizer_sees_the_mean_change_as_gradient():
    problem = tiny_problem()
    plain, _, _ = run(fed_avg, problem)
    start = tiny_task().init
    half = tiny_task(server_optimizer=optax.sgd(0.5))
    slow, _, _ = run(fed_avg, problem, task=half)
    from fedsim.engine.keys import key_for

    begin = start(key_for(jax.random.key(0), "init"))
    for name in begin:
        np.testing.assert_allclose(slow.params[name] - begin[name], 0.5 * (plain.params[name] - begin[name]), atol=1e-6)


def test_server_schedule_counts_rounds():
    problem = tiny_problem()
    stops = tiny_task(server_optimizer=optax.sgd(lambda count: jnp.where(count < 1, 1.0, 0.0)))
    one, _, _ = run(fed_avg, problem, (COHORT,), task=stops)
    three, _, _ = run(fed_avg, problem, (COHORT, COHORT, COHORT), task=stops)
    same(one.params, three.params, "a rate of zero after round one")


def test_client_schedule_is_data():
    """The learning rate follows the round without a recompilation (`check_structure` runs with lr = 0.1 / round)."""
    problem = tiny_problem()
    task = tiny_task(lr=lambda client, message: jnp.where(client.round == 1, 0.1, 0.0).astype(jnp.float32))
    one, _, _ = run(fed_avg, problem, (COHORT,), task=task)
    two, _, _ = run(fed_avg, problem, (COHORT, COHORT), task=task)
    same(one.params, two.params, "a rate of zero in round two", rtol=1e-7)


@pytest.mark.parametrize("optimizer", [optax.adam, optax.adamw, optax.yogi, optax.lion, optax.adagrad, optax.rmsprop])
def test_any_optax_optimizer_under_strict_promotion(optimizer):
    server, _, _ = run(fed_avg, tiny_problem(), task=tiny_task(optimizer=optimizer, server_optimizer=optimizer(0.01)))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(server.params))


def test_codecs_halve_the_bytes_and_change_the_values():
    problem, codec = tiny_problem(), wire.cast("bfloat16")
    plain, _, (before,) = run(fed_avg, problem)
    coded, _, (after,) = run(fed_avg, problem, up=codec, down=codec)
    for a, b in zip(before.traffic(), after.traffic(), strict=True):
        assert {k: v // 2 for k, v in a.items()} == b
    assert not np.array_equal(plain.params["kernel"], coded.params["kernel"])
    np.testing.assert_allclose(plain.params["kernel"], coded.params["kernel"], atol=0.02)


@pytest.mark.slow
def test_uniform_weighting_is_the_plain_mean():
    problem = tiny_problem()
    task = tiny_task(weight=uniform)
    both, _, _ = run(fed_avg, problem, ((0, 7),), task=task)
    first, _, _ = run(fed_avg, problem, ((0,),), task=task)
    second, _, _ = run(fed_avg, problem, ((7,),), task=task)
    for name in both.params:
        np.testing.assert_allclose(both.params[name], (first.params[name] + second.params[name]) / 2, atol=1e-6)


def test_options_of_algorithms_are_checked(tmp_path):
    assert find("fed_prox(mu=0.5)")(tiny_task()).round
    with pytest.raises(ValueError, match=r"did you mean fed_avg"):
        find("fedavg")
    with pytest.raises(ValueError, match=r"option of fed_prox 'nu'"):
        find("fed_prox(nu=1)")
    with pytest.raises(ValueError, match=r"by name"):
        find("fed_prox(1)")
    (tmp_path / "mine.py").write_text("def fed_mine(task):\n    return task\n")
    assert find(f"{tmp_path}/mine.py:fed_mine")(3) == 3
    with pytest.raises(ValueError, match=r"to define 'fed_min' \(did you mean fed_mine"):
        find(f"{tmp_path}/mine.py:fed_min")
    with pytest.raises(ValueError, match=r"to exist"):
        find("nowhere.py:f")
    assert set(ALGORITHMS) >= {"fed_avg", "fed_prox"}


def test_a_penalty_is_a_function():
    with pytest.raises(ValueError, match=r"Expected penalty=0\.1 to be a function"):
        fed_avg(tiny_task(), penalty=0.1)  # pyrefly: ignore[bad-argument-type] - what a command line can give
