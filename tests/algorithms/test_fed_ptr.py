"""FedPTR by the letters of its oracles: FedAvg, FedProx, closed forms, the server's projection against the clients'."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedsim.algorithms import find
from fedsim.algorithms.fed_avg import fed_avg, fed_prox
from fedsim.algorithms.fed_ptr import Projected, Recipe, distance, fed_ptr, phi
from fedsim.core import Passes
from fedsim.testing.contract import same
from fedsim.testing.tasks import tiny_task
from fedsim.testing.toys import COHORT, run, tiny_problem

pytestmark = pytest.mark.usefixtures("compile_once")

PROBLEM = tiny_problem()
COHORTS = (COHORT, (3, 11, 10, 6, 5, 8), (7, 5, 3, 2, 8, 10))
START = tiny_task().init(jax.random.key(5))
TASK = tiny_task(init=lambda key: START)
QUICK = {"iterations": 5, "unroll": 3, "per_class": 2}


def renamed(task):
    """The task whose two leaves are a head by name, as where a head alone is trained; features are what it reads."""
    names = {"head/kernel": "kernel", "head/bias": "bias"}
    plain = lambda params: {names[path]: leaf for path, leaf in params.items()}  # noqa: E731 - one expression, named
    return task._replace(
        init=lambda key: {path: START[name] for path, name in names.items()},
        loss=lambda held, params, batch: task.loss(held, plain(params), batch),
        logits=lambda held, params, x: task.logits(held, plain(params), x),
        features=lambda held, params, x: jnp.tanh(x @ held["frozen"]),
        trained=frozenset(names),
    )


HEAD = renamed(TASK)


def ptr(**options):
    return lambda task: fed_ptr(task, **{**QUICK, **options})


@pytest.mark.slow
def test_a_no_pull_is_fed_avg_whatever_the_projector():
    plain, _, _ = run(fed_avg, PROBLEM, COHORTS, task=TASK)
    for options in ({}, {"where": "client"}, {"send": "set"}):
        found, _, _ = run(ptr(lam=0.0, **options), PROBLEM, COHORTS, task=TASK)
        same(plain.params, found.params, f"lam = 0, {options}", rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("task", [TASK, HEAD], ids=["inputs", "features"])
@pytest.mark.parametrize("options", [{}, {"send": "set"}, {"where": "client"}], ids=str)
def test_b_no_step_onward_is_fed_prox_from_the_second_round_on(options, task):
    lam = 0.5
    state, _, _ = run(fed_avg, PROBLEM, COHORTS[:1], task=task)
    met = np.isin(np.arange(12), COHORT).astype(np.int32)
    from fedsim.engine.client_memory import Memory

    memory = Memory(lambda key, held: (), PROBLEM.held)
    prox, _, _ = run(
        lambda t: fed_prox(t, lam), PROBLEM, COHORTS[1:], task=task, state=(state, memory), first=2, met=met
    )
    found, _, _ = run(ptr(lam=lam, onward=0, **options), PROBLEM, COHORTS, task=task)
    same(prox.params, found.params, "S' = 0", rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("task", [TASK, HEAD], ids=["inputs", "features"])
def test_c_clients_that_begin_alike_project_as_the_server_does(task):
    server, _, _ = run(ptr(lam=2.0, iterations=20), PROBLEM, COHORTS, task=task)
    for options in ({"send": "set"}, {"where": "client"}):
        other, _, _ = run(ptr(lam=2.0, iterations=20, **options), PROBLEM, COHORTS, task=task)
        same(server.params, other.params, str(options), rtol=1e-3)
    without, _, _ = run(ptr(lam=2.0, onward=0), PROBLEM, COHORTS, task=task)
    assert (
        max(float(jnp.abs(a - b).max()) for a, b in zip(server.params.values(), without.params.values(), strict=True))
        > 1e-3
    )


def test_d_a_linear_projector_on_quadratics_has_a_closed_form():
    """w_i* = (H_i + lam I)^-1 (H_i c_i + lam v) with v = w_t + beta (w_t - w_t-1), and their mean."""
    lam, beta, rng = 0.7, 0.8, np.random.default_rng(0)
    h, c = rng.uniform(0.5, 2, size=(2, 3)), rng.normal(size=(2, 3))
    own = jnp.asarray(h, jnp.float32), jnp.asarray(c, jnp.float32)

    def loss(held, params, batch):
        mine = batch.y[0] == 1
        hessian, center = (jnp.where(mine, both[1], both[0]) for both in own)
        return 0.5 * (hessian * (params["w"] - center) ** 2).sum(), {}

    problem = PROBLEM._replace(y=PROBLEM.y.copy())
    for id in (2, 7):
        problem.y[problem.rows[problem.offsets[id] : problem.offsets[id + 1]]] = int(id == 7)
    task = TASK._replace(
        init=lambda key: {"w": jnp.zeros(3)}, loss=loss, trained=frozenset({"w"}), optimizer=optax.sgd, passes=Passes(1, 200, 4),
        lr=lambda client, message: jnp.float32(0.2), weight=lambda client, reply: jnp.float32(1),
        logits=lambda held, params, x: jnp.zeros((len(x), 3)) + params["w"],
    )  # fmt: skip
    parts = Projected(task, Recipe(1, 1, 1, 0, 0.05, 0.04), lam, False)
    ahead = lambda before, now: jax.tree.map(lambda b, n: n + beta * (n - b), before, now)  # noqa: E731 - one expression, named
    found, _, _ = run(lambda t: parts.algorithm("server", "point", "noise", ahead), problem, ((2, 7),) * 3, task=task)
    w = [np.zeros(3), c.mean(axis=0)]  # each client comes to rest in its own centre
    for _ in range(2):
        v = w[-1] + beta * (w[-1] - w[-2])
        w.append(((h * c + lam * v) / (h + lam)).mean(axis=0))
    np.testing.assert_allclose(found.params["w"], w[-1], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found.before["w"], w[-2], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_e_the_first_round_is_fed_avgs_bytes_included():
    plain, _, (before,) = run(fed_avg, PROBLEM, COHORTS[:1], task=TASK)
    found, _, (cohort,) = run(ptr(), PROBLEM, COHORTS[:1], task=TASK)
    same(plain.params, found.params, "the first round", rtol=1e-7)
    assert [sum(way.values()) for way in before.traffic()] == [sum(way.values()) for way in cohort.traffic()]


def test_f_one_step_of_square_loss_is_its_formula():
    """phi_1(w; (X, y), a) = w - 2 a / n X' (X w - y)."""
    rng = np.random.default_rng(0)
    x, y, w, a = rng.normal(size=(6, 3)), rng.normal(size=6), rng.normal(size=3), 0.3
    loss = lambda held, w, data: ((data["x"] @ w["w"] - data["y"]) ** 2).mean()  # noqa: E731 - one expression, named
    told = {name: jnp.asarray(leaf, jnp.float32) for name, leaf in (("x", x), ("y", y), ("log_a", np.log(a)))}
    found = phi(loss, (), {"w": jnp.asarray(w, jnp.float32)}, told, 1)
    np.testing.assert_allclose(found["w"], w - a * 2 / 6 * x.T @ (x @ w - y), rtol=1e-5)


# --- properties


def parts(task=TASK, **changes):
    return Projected(task, Recipe(3, 4, 4, 60, 0.05, 0.04)._replace(**changes), 0.1, features=task is HEAD)


@pytest.mark.parametrize("task", [TASK, HEAD], ids=["inputs", "features"])
def test_the_matching_loss_is_one_where_nothing_moves_and_nothing_where_it_arrives(task):
    one, held = parts(task), PROBLEM.held
    before = task.init(None)
    data = one.noise(2, (6,))
    now = phi(one.own_loss, held, before, data, 4)
    still = {**data, "log_a": jnp.float32(-100)}
    np.testing.assert_allclose(one.match(held, still, {}, before, now), 1, rtol=1e-6)
    np.testing.assert_allclose(one.match(held, data, {}, before, now), 0, atol=1e-9)
    same(one.project(held, still, now), now, "a rate of nothing")


@pytest.mark.parametrize("task", [TASK, HEAD], ids=["inputs", "features"])
def test_examples_learn_to_lead_from_one_model_to_the_next(task):
    """The loss ends far below one, and the projected point lies ahead, at a distance of a like size."""
    server, _, _ = run(fed_avg, PROBLEM, COHORTS, task=task)
    begun = task.init(None)
    from fedsim.training.server import trainer

    one = parts(task)
    data = one.noise(2, (6,))
    losses = [float(one.match(PROBLEM.held, data, {}, begun, server.params))]
    adam, state = optax.adam(0.05), optax.adam(0.05).init(data)
    train = trainer(one.to_match, adam, 1, 60)
    for _ in range(3):
        data, state, _ = train(PROBLEM.held, data, state, (), (begun, server.params), jax.random.key(0))
        losses.append(float(one.match(PROBLEM.held, data, {}, begun, server.params)))
    assert losses == sorted(losses, reverse=True) and losses[-1] < 0.3
    point = one.project(PROBLEM.held, data, server.params)
    assert 0.1 < float(jnp.sqrt(distance(point, server.params) / distance(begun, server.params))) < 3


def test_a_model_that_rests_is_its_own_projection():
    """w_t = w_t-1: no 0 / 0, and the pull is FedProx'."""
    one, now = parts(), START
    data = one.resting(one.noise(2, (6,)), now, now)
    assert np.isfinite(one.match(PROBLEM.held, data, {}, now, now))
    same(one.project(PROBLEM.held, data, now), now, "at rest")
    still = TASK._replace(lr=lambda client, message: jnp.float32(0))
    found, _, _ = run(ptr(), PROBLEM, COHORTS, task=still)
    same(START, found.params, "a rate of zero", rtol=1e-7)


def test_bytes_are_two_models_down_or_one_and_the_set():
    each = {}
    for name, options in {"point": {}, "client": {"where": "client"}, "set": {"send": "set"}}.items():
        _, _, cohorts = run(ptr(**options), PROBLEM, COHORTS, task=TASK)
        each[name] = [sum(way.values()) // 6 for way in cohorts[1].traffic()]
    assert each["point"] == each["client"] == [2 * 84, 84]
    assert each["set"] == [84 + 4 * (6 * 6 + 1), 84]  # two examples of each of three classes, and a rate


@pytest.mark.slow
def test_a_clients_own_batch_may_begin():
    found, _, _ = run(ptr(where="client", init="batch", lam=2.0), PROBLEM, COHORTS, task=HEAD)
    noise, _, _ = run(ptr(where="client", lam=2.0), PROBLEM, COHORTS, task=HEAD)
    assert all(np.isfinite(leaf).all() for leaf in found.params.values())
    assert float(jnp.abs(found.params["head/kernel"] - noise.params["head/kernel"]).max()) > 1e-4


def test_without_public_examples_the_server_does_not_know_an_input():
    with pytest.raises(ValueError, match=r"Expected public_share > 0 .*--public-share 0\.01"):
        run(ptr(), PROBLEM, COHORTS[:1], task=TASK, public=None)
    run(ptr(), PROBLEM, COHORTS[:1], task=HEAD, public=None)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("fed_ptr(lam=-1)", r"Expected lam=-1\.0 >= 0"),
        ("fed_ptr(data_rate=0)", r"Expected data_rate=0\.0 > 0"),
        ("fed_ptr(unroll=0)", r"Expected unroll=0 >= 1"),
        ("fed_ptr(where='cloud')", r"where='cloud' to be one of server, client"),
        ("fed_ptr(where='client', send='set')", r"Expected send='point' with where='client'"),
        ("fed_ptr(init='batch')", r"Expected init='noise' with where='server'"),
        ("fed_ptr(space='features')", r"Expected the head alone to be trained"),
    ],
)
def test_what_is_refused(text, says):
    with pytest.raises(ValueError, match=says):
        find(text)(TASK)


def test_a_language_model_has_no_classes():
    with pytest.raises(ValueError, match="a language model has none"):
        fed_ptr(TASK._replace(classes=0))
