"""Local Superior Soups by the letters of its oracles: FedAvg, FedProx, half a server's rate, closed forms."""

import sys
from math import factorial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from brief import brief
from fedsim import wire
from fedsim.algorithms import find
from fedsim.algorithms.fed_avg import fed_avg, fed_prox
from fedsim.algorithms.superior_soups import Recipe, flat, pull, soup, squared_volume, superior_soups
from fedsim.core import Passes
from fedsim.testing.contract import same
from fedsim.testing.tasks import tiny_task
from fedsim.testing.toys import COHORT, one_client, run, tiny_problem, visits

pytestmark = pytest.mark.usefixtures("compile_once")

PROBLEM = tiny_problem()
COHORTS = (COHORT, (3, 11, 10, 6, 5, 8))
START = tiny_task().init(jax.random.key(5))
TASK = tiny_task(init=lambda key: START, lr=lambda client, message: jnp.float32(0.1))


def soups(**options):
    return lambda task: superior_soups(task, **options)


def own_alone(key, active, own):
    """All weight on the model that is trained."""
    return (jnp.arange(active.shape[0]) == own).astype(jnp.float32)


def test_a_the_codes_form_with_one_model_is_fed_avg():
    plain, _, _ = run(fed_avg, PROBLEM, COHORTS, task=TASK)
    found, _, _ = run(soups(form="code", models=1, lambda_a=0.0, samples=1), PROBLEM, COHORTS, task=TASK)
    same(plain.params, found.params, "one model", rtol=1e-6)


@pytest.mark.slow
def test_b_the_codes_form_with_one_model_and_affinity_is_fed_prox():
    mu = 0.6
    plain, _, _ = run(lambda task: fed_prox(task, mu), PROBLEM, COHORTS, task=TASK)
    found, _, _ = run(soups(form="code", models=1, lambda_a=mu / 2), PROBLEM, COHORTS, task=TASK)
    same(plain.params, found.params, "affinity", rtol=1e-5)


@pytest.mark.slow
def test_c_the_papers_form_with_one_model_that_is_alone_is_fed_avg():
    plain, _, _ = run(fed_avg, PROBLEM, COHORTS, task=TASK)
    found, _, _ = run(soups(models=1, anchor=False, lambda_a=0.0, lambda_d=0.0), PROBLEM, COHORTS, task=TASK)
    same(plain.params, found.params, "one model", rtol=1e-6)


@pytest.mark.slow
def test_d_what_the_server_sent_in_the_pool_is_half_a_servers_rate():
    half, _, _ = run(fed_avg, PROBLEM, COHORTS, task=TASK._replace(server_optimizer=optax.sgd(0.5)))
    recipe = Recipe("paper", 1, 0.0, 0.0, anchor=True, samples=1)
    found, _, _ = run(lambda task: soup(task, recipe, own_alone), PROBLEM, COHORTS, task=TASK)
    same(half.params, found.params, "mean with what was sent", rtol=1e-5)


@pytest.mark.parametrize("form", ["paper", "code"])
def test_e_a_rate_of_zero_sends_what_came(form):
    still = TASK._replace(lr=lambda client, message: jnp.float32(0))
    found, _, _ = run(soups(form=form, models=3), PROBLEM, task=still)
    same(START, found.params, "nothing moves", rtol=1e-6)


@pytest.mark.parametrize(("form", "anchor"), [("paper", True), ("paper", False), ("code", False)])
def test_f_constant_gradients_have_a_closed_form(form, anchor):
    """f_j = mean of the pool - lr sum_t alpha_j^t g, with the alphas that were drawn; the reply is the pool's mean."""
    g = {path: np.asarray(jax.random.normal(jax.random.key(9), leaf.shape)) for path, leaf in START.items()}
    rate, models, passes = 0.1, 3, Passes(8, None, 8)

    def loss(held, params, batch):
        return sum((g[p] * params[p]).sum() for p in g), {"loss": jnp.zeros(())}

    task = TASK._replace(loss=loss, optimizer=optax.sgd, passes=passes)
    recipe, sent = Recipe(form, models, 0.0, 0.0, anchor, samples=1), []
    run(lambda task: soup(task, recipe), PROBLEM, ((7,),), task=task, sent=sent)
    reply, _ = one_client(PROBLEM, sent[0].local, START, (), 7, 1)
    first, later = 8 * 5, (8 if form == "paper" else 1) * 5  # batches of 8 of 40 examples
    assert len(visits(PROBLEM, sent[0].local.passes, 7, 1)) == first + (models - 1) * later
    from fedsim.engine.keys import key_for

    key, t = key_for(jax.random.key(0), "local", 1, 0, 7), 0
    places = jnp.arange(models + 1)
    pool = {0: {p: np.asarray(leaf, np.float64) for p, leaf in START.items()}}
    for j in range(1, models + 1):
        members = [k for k in pool if k or anchor or j == 1]
        own = {p: np.mean([pool[k][p] for k in members], axis=0) for p in START}
        active = (places <= j) & ((places > 0) | anchor)
        for _ in range(first if j == 1 else later):
            alpha = flat(jax.random.fold_in(jax.random.fold_in(key, t), 0), active, j)
            own = {p: own[p] - rate * float(alpha[j]) * g[p] for p in own}
            t += 1
        pool[j] = own
    members = [k for k in pool if k or anchor]
    for p, leaf in wire.unmarked(reply).items():
        np.testing.assert_allclose(
            leaf, np.mean([pool[k][p] for k in members], axis=0) - START[p], rtol=1e-4, atol=1e-5
        )


def said(own, older, points, batch, task, form):
    """A step's loss as the equations have it, of a list of older models; with weights 0.5 and 0.4."""
    vector = lambda w: jnp.concatenate([w[p].reshape(-1) for p in sorted(w)])  # noqa: E731 - one expression, named
    safe = lambda d: jnp.where((d**2).sum() > 0, jnp.sqrt(jnp.maximum((d**2).sum(), 1e-30)), 0.0)  # noqa: E731 - one expression, named
    pool, value = [*older, own], 0.0
    for point in points:
        mixed = {p: sum(a * member[p] for a, member in zip(point, pool, strict=True)) for p in own}
        value = value + task.loss(PROBLEM.held, mixed, batch)[0] / len(points)
    away = vector(own) - vector(START)
    if form == "paper":
        return value + 0.5 * safe(away) - 0.4 * sum(safe(vector(own) - vector(one)) for one in older) / len(pool)
    edges = [vector(one) - vector(pool[0]) for one in pool[1:]]
    volume = jnp.linalg.det(jnp.stack(edges) @ jnp.stack(edges).T) / factorial(len(edges)) ** 2 if edges else 0.0
    return value + 0.5 * (away**2).sum() - 0.4 * volume


@pytest.mark.parametrize("form", brief(["paper", "code"]))
def test_a_client_is_its_loop_over_a_list_of_models(form):
    """With interpolation, affinity and diversity: a loop with a list as pool, and gradients of what the equations say."""
    recipe, sent = Recipe(form, 3, 0.5, 0.4, form == "paper", 2), []
    task = TASK._replace(optimizer=optax.adam, passes=Passes(1, 4, 8))
    run(lambda task: soup(task, recipe), PROBLEM, ((7,),), task=task, sent=sent)
    reply, _ = one_client(PROBLEM, sent[0].local, START, (), 7, 1)
    from fedsim.core import Batch
    from fedsim.engine.keys import key_for

    key = key_for(jax.random.key(0), "local", 1, 0, 7)
    rows = iter(enumerate(visits(PROBLEM, sent[0].local.passes, 7, 1)))
    older = [START] if form == "paper" else []
    for j in range(1, 4):
        own = jax.tree.map(lambda *each: sum(each) / len(each), *(older or [START]))
        adam = optax.adam(0.1)
        state = adam.init(own)
        for _ in range(4 if form == "paper" or j == 1 else 1):
            t, row = next(rows)
            b = Batch(
                jnp.asarray(PROBLEM.x[row]),
                jnp.asarray(PROBLEM.y[row]),
                jnp.ones(8),
                key,
                jnp.int32(t),
                jnp.bool_(False),
            )
            places = jnp.arange(4)
            active = (places <= j) & ((places > 0) | (form == "paper"))
            draws = [flat(jax.random.fold_in(jax.random.fold_in(key, t), s), active, j) for s in range(2)]

            points = [alpha[form == "code" : j + 1] for alpha in draws]
            with jax.numpy_dtype_promotion("standard"):
                updates, state = adam.update(jax.grad(said)(own, older, points, b, task, form), state, own)
                own = optax.apply_updates(own, updates)
        older = [*older, own]
    for p, leaf in wire.unmarked(reply).items():
        expected = sum(np.asarray(m[p]) for m in older) / len(older) - START[p]
        np.testing.assert_allclose(leaf, expected, rtol=2e-3, atol=2e-4)


# --- parts


def test_alphas_are_points_of_the_simplex_with_equal_means():
    active = jnp.array([True, False, True, True])
    drawn = jax.vmap(lambda key: flat(key, active, 3))(jax.random.split(jax.random.key(0), 4000))
    assert (drawn >= 0).all() and not drawn[:, 1].any()
    np.testing.assert_allclose(drawn.sum(axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(drawn.mean(axis=0), [1 / 3, 0, 1 / 3, 1 / 3], atol=0.02)
    np.testing.assert_allclose(drawn[:, 0].var(), 2 / 9 / 4, rtol=0.1)  # of Dirichlet(1, 1, 1)


def cayley_menger(points):
    """|det [[D, 1], [1', 0]]| / (((n - 1)!)^2 2^(n - 1)) of n points, as the authors' code."""
    points = np.asarray(points, np.float64)
    n = len(points)
    d = ((points[:, None] - points[None]) ** 2).sum(-1)
    whole = np.block([[d, np.ones((n, 1))], [np.ones((1, n)), np.zeros((1, 1))]])
    return abs(np.linalg.det(whole)) / (factorial(n - 1) ** 2 * 2 ** (n - 1))


@pytest.mark.parametrize(
    ("points", "volume"),
    [
        ([[0, 0], [3, 4]], 25),
        ([[0, 0], [3, 0], [0, 4]], 36),
        ([[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]], 1 / 36),
        ([[1, 2]], 1),
        ([[0, 0], [1, 1], [2, 2]], 0),
    ],
)
def test_the_squared_volume_of_known_simplices(points, volume):
    points = jnp.asarray(points, jnp.float32)
    np.testing.assert_allclose(squared_volume({"w": points}, jnp.ones(len(points), bool)), volume, rtol=1e-5, atol=1e-6)


def test_the_squared_volume_is_cayley_and_mengers_whatever_the_order_and_place():
    rng = np.random.default_rng(0)
    for n in (2, 3, 4, 5):
        points = rng.normal(size=(n, 7)).astype(np.float32)
        told = jnp.asarray(
            np.concatenate([points, rng.normal(size=(2, 7))]), jnp.float32
        )  # two that are not in the pool
        active = jnp.arange(n + 2) < n
        parts = lambda p: {"a": p[:, :3], "b": p[:, 3:].reshape(len(p), 2, 2)}  # noqa: E731 - one expression, named
        expected = cayley_menger(points)
        for moved in (told, told.at[:n].set(told[:n][::-1]), told + 3):
            np.testing.assert_allclose(squared_volume(parts(moved), active), expected, rtol=2e-3)


@pytest.mark.parametrize("form", ["paper", "code"])
def test_gradients_are_finite_where_models_lie_on_one_another(form):
    pool = {"w": jnp.ones((4, 3))}
    recipe, active = Recipe(form, 3, 3.0, 3.0, True, 1), jnp.ones(4, bool)
    grad = jax.grad(lambda w: pull(recipe, {"w": w}, {"w": jnp.ones(3)}, {"w": pool["w"].at[3].set(w)}, active))
    np.testing.assert_array_equal(grad(jnp.ones(3)), 0)


def test_affinity_and_diversity_pull_as_their_equations_say():
    """lambda_a u(f - f_p) - lambda_d / |M| sum_k u(f - f_k), u of length one; f itself counts in |M| and adds nothing."""
    rng = np.random.default_rng(1)
    members, own = rng.normal(size=(4, 5)).astype(np.float32), rng.normal(size=5).astype(np.float32)
    members[2] = own
    active, recipe = jnp.array([True, True, True, False]), Recipe("paper", 3, 2.0, 1.5, True, 1)

    def told(w):
        pool = {"w": jnp.asarray(members).at[2].set(w)}
        return pull(recipe, {"w": w}, {"w": jnp.asarray(members[0])}, pool, active)

    unit = lambda d: d / np.linalg.norm(d)  # noqa: E731 - one expression, named
    expected = 2.0 * unit(own - members[0]) - 1.5 / 3 * (unit(own - members[0]) + unit(own - members[1]))
    np.testing.assert_allclose(jax.grad(told)(jnp.asarray(own)), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_without_a_bound_models_run_away_and_it_is_said():
    """lambda_d above lambda_a: the farther the better."""
    with pytest.warns(UserWarning, match=r"lambda_d=30 is above lambda_a=0: .*give lambda_d <= lambda_a"):
        wild = superior_soups(TASK, lambda_a=0.0, lambda_d=30.0)
    assert wild.round
    tame, far = (run(lambda task, d=d: soup(task, Recipe("paper", 3, 1.0, d, True, 1)), PROBLEM, ((7,),), task=TASK)[0]
                 for d in (1.0, 30.0))  # fmt: skip
    norm = lambda server: float(optax.tree.norm(jax.tree.map(jnp.subtract, server.params, START)))  # noqa: E731 - one expression, named
    assert norm(far) > 2 * norm(tame)


@pytest.mark.slow
def test_the_pool_never_leaves_the_client():
    """FedAvg's bytes, whatever the number of models."""
    for models in (1, 4):
        _, _, (cohort,) = run(soups(models=models), PROBLEM, task=TASK)
        assert [sum(way.values()) for way in cohort.traffic()] == [6 * 84, 6 * 84]


def test_a_pool_that_does_not_fit_is_refused(monkeypatch):
    monkeypatch.setattr(sys.modules[superior_soups.__module__], "device_memory", lambda device: 4 * 21 * 5 - 1)
    algorithm = superior_soups(TASK, models=4)
    with pytest.raises(ValueError, match=r"Expected models=4 of 21 parameters .*train fewer models"):
        algorithm.init(jax.random.key(0), PROBLEM.held)
    superior_soups(TASK, models=3).init(jax.random.key(0), PROBLEM.held)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("superior_soups(form='book')", r"form='book' to be 'paper' or 'code'"),
        ("superior_soups(models=0)", r"1 <= models=0 <= 64"),
        ("superior_soups(samples=0)", r"1 <= samples=0 <= 64"),
        ("superior_soups(lambda_a=-1)", r"Expected lambda_a=-1\.0 >= 0"),
    ],
)
def test_what_is_refused(text, says):
    with pytest.raises(ValueError, match=says):
        find(text)(TASK)
