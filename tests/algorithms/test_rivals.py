"""SCAFFOLD, FedDyn, FedRep, Ditto and local training against NumPy loops, and what each becomes FedAvg by."""

import by_hand
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from by_hand import close, doubles, gradient, kept, mean, sgd_task, start_of, trained

from fedsim import wire
from fedsim.algorithms import find
from fedsim.algorithms.ditto import ditto
from fedsim.algorithms.fed_avg import fed_avg
from fedsim.algorithms.fed_dyn import fed_dyn
from fedsim.algorithms.fed_rep import fed_rep
from fedsim.algorithms.local_only import local_only
from fedsim.algorithms.scaffold import scaffold
from fedsim.core import Passes
from fedsim.folds import uniform
from fedsim.testing.contract import same
from fedsim.testing.tasks import tiny_head_task
from fedsim.testing.toys import SIZES, run, tiny_problem

pytestmark = pytest.mark.usefixtures("compile_once")

PROBLEM = tiny_problem()
COHORTS = ((2, 0, 7, 4), (7, 5, 2, 8), (0, 7, 10, 1))
HEAD = ("bias",)  # of the tiny task, whose other leaf is then the body


def zeros(w):
    return {path: np.zeros_like(leaf) for path, leaf in w.items()}


def plus(a, b, scale=1.0):
    return {path: a[path] + scale * b[path] for path in a}


def test_scaffold_is_its_numpy_loop():
    """Equations 3 to 5 of the paper, option II, with a part of the clients in a round."""
    task = sgd_task()
    x, c, own = start_of(task), zeros(start_of(task)), {}
    for round, ids in enumerate(COHORTS, 1):
        ys, new = [], {}
        for id in ids:
            mine = own.get(id, zeros(x))
            y = trained(
                PROBLEM,
                x,
                id,
                round,
                slope=lambda rows, w, c=c, mine=mine: plus(plus(gradient(PROBLEM, rows, w), c), mine, -1),
            )
            steps = len(list(by_hand.batches(PROBLEM, task.passes, id, round)))
            new[id] = plus(plus(mine, c, -1), plus(x, y, -1), 1 / (steps * 0.3))
            ys.append(y)
        c = plus(c, mean([plus(new[id], own.get(id, zeros(x)), -1) for id in ids]), len(ids) / len(SIZES))
        x, own = mean(ys), own | new
    server, memory, _ = run(scaffold, PROBLEM, COHORTS, task=task)
    close(server.params, x, rtol=1e-4, atol=1e-5)
    close(server.control, c, rtol=1e-4, atol=1e-5)
    for id, mine in own.items():
        close(kept(memory, id), mine, rtol=1e-4, atol=1e-5)


def test_scaffolds_first_round_is_fed_avg_and_its_second_is_not():
    """Controls begin at zero."""
    task = sgd_task()
    once, twice = (run(scaffold, PROBLEM, COHORTS[:n], task=task)[0].params for n in (1, 2))
    same(run(fed_avg, PROBLEM, COHORTS[:1], task=task)[0].params, once, "the first round", rtol=1e-6)
    plain = run(fed_avg, PROBLEM, COHORTS[:2], task=task)[0].params
    assert not np.allclose(plain["kernel"], twice["kernel"], rtol=1e-3)


@pytest.mark.parametrize("codec", [None, "quantise(8)"])
@pytest.mark.parametrize(("make", "of"), [(scaffold, "control"), (fed_dyn, "gradient")])
def test_what_the_server_keeps_is_the_mean_of_what_clients_keep(make, of, codec):
    """Of all N clients, those that never came at zero, and under a codec too: both go by what was received."""
    server, memory, _ = run(make, PROBLEM, COHORTS, task=sgd_task(), up=codec and wire.codec(codec))
    rows, _ = memory.state()
    total = {path: np.sum(leaf, axis=0) / len(SIZES) for path, leaf in rows.items()}
    close(getattr(server, of), doubles(total), rtol=1e-4, atol=1e-6)


def test_fed_dyn_is_its_numpy_loop():
    """Algorithm 1 of the paper, with a part of the clients in a round."""
    task, alpha = sgd_task(), 0.2
    x, h, own = start_of(task), zeros(start_of(task)), {}
    for round, ids in enumerate(COHORTS, 1):
        ys = []
        for id in ids:
            mine = own.get(id, zeros(x))

            def slope(rows, w, x=x, mine=mine):
                return plus(plus(gradient(PROBLEM, rows, w), mine, -1), plus(w, x, -1), alpha)

            y = trained(PROBLEM, x, id, round, slope=slope)
            own[id] = plus(mine, plus(y, x, -1), -alpha)
            ys.append(y)
        total = {path: sum(y[path] - x[path] for y in ys) for path in x}
        h = plus(h, total, -alpha / len(SIZES))
        x = plus(mean(ys), h, -1 / alpha)
    server, memory, _ = run(lambda t: fed_dyn(t, alpha), PROBLEM, COHORTS, task=task)
    close(server.params, x, rtol=1e-4, atol=2e-5)
    close(server.gradient, h, rtol=1e-4, atol=1e-5)
    for id, mine in own.items():
        close(kept(memory, id), mine, rtol=1e-4, atol=1e-5)


def quadratics(alpha_rows):
    """Clients whose loss is (w - b_i)^2 a_i / 2 in one number: x holds a and b."""

    def loss(held, params, batch):
        a, b = batch.x[:, 0], batch.x[:, 1]
        value = (batch.mask * 0.5 * a * (params["w"] - b) ** 2).sum() / jnp.maximum(batch.mask.sum(), 1)
        return value, {"loss": value}

    sizes = np.ones(len(alpha_rows), int)
    problem = PROBLEM._replace(
        x=np.concatenate([[[0, 0]], alpha_rows]).astype(np.float32),
        y=np.zeros(len(alpha_rows) + 1, np.int32),
        rows=np.arange(1, len(alpha_rows) + 1, dtype=np.int32),
        offsets=np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64),
    )
    return problem, loss


@pytest.mark.parametrize("make", [scaffold, fed_dyn])
def test_drifting_clients_reach_the_optimum_that_fed_avg_misses(make):
    """Two quadratics with curvatures 0.2 and 2: FedAvg's fixed point is a mean weighted by how far each client comes."""
    rows = np.array([[0.2, 4.0], [2.0, -1.0]])
    problem, loss = quadratics(rows)
    optimum = (rows[:, 0] * rows[:, 1]).sum() / rows[:, 0].sum()
    task = sgd_task(0.2, Passes(20, None, 1), init=lambda key: {"w": jnp.float32(3.0)}, loss=loss)
    task = task._replace(trained=frozenset({"w"}), logits=lambda held, params, x: x)
    everybody, options = ((0, 1),) * 40, {"public": None, "shard": None}
    plain, _, _ = run(fed_avg, problem, everybody, task=task, **options)
    better, _, _ = run(
        lambda t: fed_dyn(t, 0.5) if make is fed_dyn else scaffold(t), problem, everybody, task=task, **options
    )
    assert abs(float(plain.params["w"]) - optimum) > 0.5
    np.testing.assert_allclose(better.params["w"], optimum, atol=0.01)


def test_fed_rep_is_its_numpy_loop():
    """A head of one's own, then the body with it fixed, then the mean of the bodies."""
    task = sgd_task()
    x = start_of(task)
    heads, start = {}, x["bias"]
    passes = task.passes._replace(stream="personal")
    for round, ids in enumerate(COHORTS, 1):
        bodies = []
        for id in ids:
            w = {"kernel": x["kernel"], "bias": heads.get(id, start)}
            w = trained(PROBLEM, w, id, round, passes, 0.15, moves=HEAD)
            heads[id] = w["bias"]
            bodies.append(trained(PROBLEM, w, id, round, moves=("kernel",)))
        x = {"kernel": np.mean([b["kernel"] for b in bodies], axis=0)}
    make = lambda t: fed_rep(t, personal=HEAD, personal_rate=0.5)  # noqa: E731 - one expression, named
    server, memory, cohorts = run(make, PROBLEM, COHORTS, task=task)
    close(server.params, x, rtol=1e-4, atol=1e-5)
    for id, head in heads.items():
        close(kept(memory, id), {"bias": head}, rtol=1e-4, atol=1e-5)
    assert [sum(way.values()) for way in cohorts[0].traffic()] == [4 * 72, 4 * 72]  # the body alone


@pytest.mark.slow
def test_fed_rep_whose_heads_stay_is_fed_avg_of_the_body():
    """The head is then a frozen part of the model, and the batches are those that FedAvg draws."""
    task = tiny_head_task(weight=sgd_task().weight)
    first = task.init(jax.random.key(3))
    head = {path: leaf for path, leaf in first.items() if path.startswith("head/")}
    task = task._replace(init=lambda key: first)
    frozen = task._replace(
        init=lambda key: {"hidden": first["hidden"]},
        loss=lambda held, params, batch: task.loss(held, {**head, **params}, batch),
        logits=lambda held, params, x: task.logits(held, {**head, **params}, x),
        trained=frozenset({"hidden"}),
    )
    rep, _, _ = run(lambda t: fed_rep(t, personal_epochs=0), PROBLEM, COHORTS, task=task)
    plain, _, _ = run(fed_avg, PROBLEM, COHORTS, task=frozen)
    same(plain.params, rep.params, "the body", rtol=1e-5)


def test_ditto_is_its_numpy_loop_beside_fed_avg():
    """Equation 4 of the paper: the pull is to what the server sent in this round."""
    task, lam = sgd_task(), 0.7
    x, own = start_of(task), {}
    passes = task.passes._replace(stream="personal")
    for round, ids in enumerate(COHORTS, 1):
        for id in ids:
            slope = lambda rows, v, x=x: plus(gradient(PROBLEM, rows, v), plus(v, x, -1), lam)  # noqa: E731 - one expression, named
            own[id] = trained(PROBLEM, own.get(id, start_of(task)), id, round, passes, slope=slope)
        x = mean([trained(PROBLEM, x, id, round) for id in ids])
    server, memory, cohorts = run(lambda t: ditto(t, lam), PROBLEM, COHORTS, task=task)
    same(run(fed_avg, PROBLEM, COHORTS, task=task)[0], server, "the server")
    for id, v in own.items():
        close(kept(memory, id), v, rtol=1e-4, atol=1e-5)
    assert [sum(way.values()) for way in cohorts[0].traffic()] == [4 * 84, 4 * 84]  # FedAvg's


def test_ditto_without_pull_is_local_training_and_a_strong_pull_follows_the_server():
    task = sgd_task(rate=0.05)
    _, alone, _ = run(local_only, PROBLEM, COHORTS, task=task._replace(passes=task.passes._replace(stream="personal")))
    _, free, _ = run(lambda t: ditto(t, 0.0), PROBLEM, COHORTS, task=task)
    same(alone.state(), free.state(), "lam = 0", rtol=1e-6)
    _, pulled, _ = run(lambda t: ditto(t, 19.0), PROBLEM, COHORTS, task=task)
    before, _, _ = run(fed_avg, PROBLEM, COHORTS[:-1], task=task)
    distance = lambda memory: np.abs(kept(memory, 7)["kernel"] - before.params["kernel"]).max()  # noqa: E731 - one expression, named
    assert distance(pulled) < 0.1 * distance(free)


def test_local_training_is_its_numpy_loop_and_sends_nothing():
    task = sgd_task()
    own = {}
    for round, ids in enumerate(COHORTS, 1):
        own |= {id: trained(PROBLEM, own.get(id, start_of(task)), id, round) for id in ids}
    _, memory, cohorts = run(local_only, PROBLEM, COHORTS, task=task)
    for id, w in own.items():
        close(kept(memory, id), w, rtol=1e-4, atol=1e-5)
    assert all(sum(way.values()) == 0 for cohort in cohorts for way in cohort.traffic())


@pytest.mark.slow
def test_a_client_answers_with_what_it_keeps():
    """And one that never came with what all began from."""
    task = sgd_task()
    x = jnp.asarray(PROBLEM.x[:5])
    for make in (local_only, ditto, lambda t: fed_rep(t, personal=HEAD)):
        server, memory, _ = run(make, PROBLEM, COHORTS, task=task)
        algorithm = make(task)
        params = {**algorithm.params(server), **kept(memory, 7)}
        found = algorithm.predict(PROBLEM.held, server, kept(memory, 7), x)
        np.testing.assert_array_equal(found, task.logits(PROBLEM.held, params, x))
        never = algorithm.predict(PROBLEM.held, server, (), x)
        np.testing.assert_array_equal(never, task.logits(PROBLEM.held, algorithm.params(server), x))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("scaffold", r"Expected weighting='examples' to be uniform for scaffold"),
        ("fed_dyn", r"Expected weighting='examples' to be uniform for fed_dyn"),
        ("fed_res(scheme='avg_ii')", r"Expected weighting='examples' to be uniform for fed_res\(scheme='avg_ii'\)"),
        ("fed_dyn(alpha=0)", r"Expected alpha=0\.0 > 0"),
        ("ditto(lam=-1)", r"Expected lam=-1\.0 >= 0"),
        ("ditto(personal_rate=-1)", r"Expected personal_rate=-1\.0 >= 0"),
        ("fed_rep(personal=('nose/*',))", r"'nose/\*' matches none of head/bias, head/kernel, hidden"),
        ("fed_rep(personal=('*',))", r"to leave fed_rep something to share"),
        ("fed_rep(personal_epochs=-1)", r"Expected personal_epochs=-1 >= 0"),
    ],
)
def test_what_is_refused(text, says):
    with pytest.raises(ValueError, match=says):
        find(text)(tiny_head_task(**({"weight": uniform} if "=" in text and "avg_ii" not in text else {})))


@pytest.mark.slow
def test_rounds_of_nobody_change_nothing_of_what_is_kept():
    for make, of in ((scaffold, "control"), (fed_dyn, "gradient")):
        before, _, _ = run(make, PROBLEM, COHORTS[:1], task=sgd_task())
        after, _, _ = run(make, PROBLEM, (*COHORTS[:1], (-1, -1, -1, -1)), task=sgd_task())
        same(getattr(before, of), getattr(after, of), of)
