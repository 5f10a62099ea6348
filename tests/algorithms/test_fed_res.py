"""Federated residual learning: oracles (a) to (g) of its equations, NumPy loops of the four schemes, quadratics, concept shift."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from by_hand import Leaves, batches, close, doubles, gradient, kept, mean, outputs, sgd_task, start_of, trained

from fedsim import wire
from fedsim.algorithms import find
from fedsim.algorithms.fed_avg import fed_avg
from fedsim.algorithms.fed_res import SCHEMES, fed_res
from fedsim.algorithms.scaffold import scaffold
from fedsim.core import Passes
from fedsim.engine.client_memory import Memory
from fedsim.testing.contract import same
from fedsim.testing.tasks import tiny_head_task, tiny_task
from fedsim.testing.toys import SIZES, run, tiny_problem

pytestmark = pytest.mark.usefixtures("compile_once")

PROBLEM = tiny_problem()
COHORTS = ((2, 0, 7, 4), (7, 5, 2, 8), (0, 7, 10, 1))
RATE = 0.3


def res(scheme="avg", **options):
    return lambda task: fed_res(task, scheme, **options)


def plus(a: Leaves, b: Leaves, scale: float = 1.0) -> Leaves:
    return {path: a[path] + scale * b[path] for path in a}


def zeros(w: Leaves) -> Leaves:
    return {path: np.zeros_like(leaf) for path, leaf in w.items()}


def client(scheme, task, w, beta, c, own, id, round, factor):
    """One client's part of a round in NumPy: its w_i, beta_i and c_i."""
    if scheme == "naive":
        doubled, y = task.passes._replace(epochs=2 * task.passes.epochs), w
        for number, rows in enumerate(batches(PROBLEM, doubled, id, round)):
            if number % 2 == 0:
                beta = plus(beta, gradient(PROBLEM, rows, beta, y), -factor * RATE)
            else:
                y = plus(y, gradient(PROBLEM, rows, y, beta), -RATE)
        return y, beta, own
    apart = task.passes._replace(stream="personal")
    beta = trained(PROBLEM, beta, id, round, apart, factor * RATE, lambda rows, b: gradient(PROBLEM, rows, b, w))
    y, seen = w, []
    for rows in batches(PROBLEM, task.passes, id, round):
        seen.append((len(rows), gradient(PROBLEM, rows, y, beta)))
        if scheme == "avg":
            y = plus(y, seen[-1][1], -RATE)
        elif scheme == "avg_ii":
            y = plus(y, plus(plus(seen[-1][1], own, -1), c), -RATE)
    if scheme == "sgd":
        examples = sum(n for n, _ in seen)
        y = plus(w, {path: sum(n * g[path] for n, g in seen) / examples for path in w}, -RATE)
    return y, beta, mean([g for _, g in seen])


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_scheme_is_its_numpy_loop(scheme):
    """Three rounds with a part of the clients; beta_i is what the residual has moved since it began at zero outputs."""
    task, factor = sgd_task(RATE), 0.5
    start = start_of(task)
    w, c, betas, controls = start, zeros(start), {}, {}
    for round, ids in enumerate(COHORTS, 1):
        ys, new = [], {}
        for id in ids:
            beta, own = betas.get(id, zeros(w)), controls.get(id, zeros(w))
            y, betas[id], new[id] = client(scheme, task, w, beta, c, own, id, round, factor)
            ys.append(y)
        change = mean([plus(new[id], controls.get(id, zeros(w)), -1) for id in ids])
        c, controls, w = plus(c, change, len(ids) / len(SIZES)), controls | new, mean(ys)
    server, memory, _ = run(res(scheme, residual_rate=factor), PROBLEM, COHORTS, task=task)
    close(server.params, w, rtol=1e-4, atol=1e-5)
    for id, beta in betas.items():
        close(kept(memory, id).residual, plus(beta, start), rtol=1e-4, atol=1e-5)
        if scheme == "avg_ii":
            close(kept(memory, id).control, controls[id], rtol=1e-4, atol=1e-5)
    if scheme == "avg_ii":
        close(server.control, c, rtol=1e-4, atol=1e-5)


def test_oracle_a_a_residual_that_does_not_learn_leaves_fed_avg_with_the_same_shuffled_batches():
    """Though a phase comes first: it draws from a stream of its own."""
    plain, _, _ = run(fed_avg, PROBLEM, COHORTS, task=sgd_task())
    still, _, _ = run(res(residual_rate=0.0), PROBLEM, COHORTS, task=sgd_task())
    same(plain.params, still.params, "the server", rtol=1e-6)
    other, _, _ = run(res(), PROBLEM, COHORTS, task=sgd_task())
    assert not np.allclose(plain.params["kernel"], other.params["kernel"], rtol=1e-2)


def test_oracle_a_and_then_the_corrected_scheme_is_scaffold():
    plain, memory, _ = run(scaffold, PROBLEM, COHORTS, task=sgd_task())
    still, own, _ = run(res("avg_ii", residual_rate=0.0), PROBLEM, COHORTS, task=sgd_task())
    same(plain.params, still.params, "the server", rtol=1e-4)
    same(plain.control, still.control, "its control", rtol=1e-4)
    same(memory.state()[0], own.state()[0].control, "the clients' controls", rtol=1e-4)


@pytest.mark.slow
def test_oracle_a_and_then_the_scheme_of_one_step_is_fed_sgd():
    """One step on the gradient over all that the steps see, which is FedAvg with one batch."""
    task = sgd_task(passes=Passes(1, None, 4))
    whole = sgd_task(passes=Passes(1, None, 64))
    still, _, _ = run(res("sgd", residual_rate=0.0), PROBLEM, COHORTS, task=task)
    same(run(fed_avg, PROBLEM, COHORTS, task=whole)[0].params, still.params, "the server", rtol=1e-5)


def test_oracle_b_a_server_that_does_not_move_leaves_local_training_of_residuals():
    task = sgd_task(server_optimizer=optax.sgd(0.0))
    w, betas = start_of(task), {}
    passes = task.passes._replace(stream="personal")
    for round, ids in enumerate(COHORTS, 1):
        for id in ids:
            slope = lambda rows, b: gradient(PROBLEM, rows, b, w)  # noqa: E731 - one expression, named
            betas[id] = trained(PROBLEM, betas.get(id, zeros(w)), id, round, passes, RATE, slope)
    server, memory, _ = run(res(), PROBLEM, COHORTS, task=task)
    close(server.params, w)
    for id, beta in betas.items():
        close(kept(memory, id).residual, plus(beta, w), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scheme", ["avg", "avg_ii", "sgd"])
def test_oracle_c_no_steps_of_the_residual_are_as_good_as_a_rate_of_zero(scheme):
    none, memory, _ = run(res(scheme, residual_epochs=0), PROBLEM, COHORTS, task=sgd_task())
    still, other, _ = run(res(scheme, residual_rate=0.0), PROBLEM, COHORTS, task=sgd_task())
    same(none.params, still.params, "the server", rtol=1e-6)
    same(memory.state()[0].residual, other.state()[0].residual, "the residuals")


@pytest.mark.slow
def test_oracle_d_identical_clients_agree_and_need_no_correction():
    """All of them hold the same rows, and one batch holds all."""
    rows = np.tile(PROBLEM.rows[:12], 3)
    problem = PROBLEM._replace(rows=rows, offsets=np.array([0, 12, 24, 36], np.int64))
    task, everybody = sgd_task(passes=Passes(3, None, 16)), ((0, 1, 2),) * 3
    options = {"public": None, "shard": None}
    one, _, _ = run(res("avg"), problem, everybody, task=task, **options)
    two, memory, _ = run(res("avg_ii"), problem, everybody, task=task, **options)
    alone, _, _ = run(res("avg"), problem, ((1,),) * 3, task=task, **options)
    same(one.params, two.params, "I and II", rtol=1e-5)
    same(one.params, alone.params, "the mean and any of them", rtol=1e-5)
    for id in range(3):
        close(kept(memory, id).control, doubles(two.control), rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", [optax.sgd, optax.adam])
def test_oracle_e_with_one_step_the_mean_of_steps_is_a_step_on_the_mean(optimizer):
    """Of plain SGD anyhow, of Adam where each client takes the step, as the authors have it; one Adam at the server differs."""
    task = sgd_task(0.05, passes=Passes(1, None, 64), optimizer=optimizer)
    avg, sgd = (run(res(scheme), PROBLEM, COHORTS, task=task)[0] for scheme in ("avg", "sgd"))
    same(avg.params, sgd.params, "I and one step", rtol=1e-5)
    at_server = task._replace(server_optimizer=optimizer(0.05))
    server, _, _ = run(res("sgd", server_step=True), PROBLEM, COHORTS, task=at_server)
    assert np.allclose(avg.params["kernel"], server.params["kernel"], rtol=1e-4) == (optimizer is optax.sgd)


@pytest.mark.slow
def test_oracle_f_in_the_first_round_the_two_averages_agree():
    one, two, three = (run(res(s), PROBLEM, COHORTS[:1], task=sgd_task())[0] for s in ("avg", "avg_ii", "naive"))
    same(one.params, two.params, "I and II", rtol=1e-6)
    assert not np.allclose(one.params["kernel"], three.params["kernel"], rtol=1e-3)
    one, two = (run(res(s), PROBLEM, COHORTS[:2], task=sgd_task())[0] for s in ("avg", "avg_ii"))
    assert not np.allclose(one.params["kernel"], two.params["kernel"], rtol=1e-3)


def test_oracle_g_one_client_is_block_coordinate_descent():
    """Turn by turn the residual, then the shared part, each to the minimum of what the other leaves."""
    task, rounds = sgd_task(), ((7,),) * 3
    w, beta = start_of(task), zeros(start_of(task))
    passes = task.passes._replace(stream="personal")
    for round in (1, 2, 3):
        beta = trained(PROBLEM, beta, 7, round, passes, RATE, lambda rows, b, w=w: gradient(PROBLEM, rows, b, w))
        w = trained(PROBLEM, w, 7, round, task.passes, RATE, lambda rows, v, b=beta: gradient(PROBLEM, rows, v, b))
    server, memory, _ = run(res(), PROBLEM, rounds, task=task)
    close(server.params, w, rtol=1e-4, atol=1e-5)
    close(kept(memory, 7).residual, plus(beta, start_of(task)), rtol=1e-4, atol=1e-5)


def targets(values, rate=0.1, steps=7):
    """Clients whose loss is (w + b_i - t_i)^2 / 2 in one number."""
    n = len(values)
    problem = PROBLEM._replace(
        x=np.array([0.0, *values], np.float32)[:, None],
        y=np.zeros(n + 1, np.int32),
        rows=np.arange(1, n + 1, dtype=np.int32),
        offsets=np.arange(n + 1, dtype=np.int64),
    )

    def criterion(outputs, batch):
        error = batch.mask * 0.5 * (outputs[:, 0] - batch.x[:, 0]) ** 2
        value = error.sum() / jnp.maximum(batch.mask.sum(), 1)
        return value, {"loss": value}

    logits = lambda held, params, x: jnp.broadcast_to(params["w"], x.shape)  # noqa: E731 - one expression, named
    task = sgd_task(
        rate,
        Passes(steps, None, 1),
        init=lambda key: {"w": jnp.float32(0.5)},
        criterion=criterion,
        logits=logits,
        loss=lambda held, params, batch: criterion(logits(held, params, batch.x), batch),
        trained=frozenset({"w"}),
    )
    return problem, task, {"public": None, "shard": None}


@pytest.mark.slow
def test_quadratics_have_a_closed_form():
    """K steps leave (1 - rate)^K of the distance to what the other part leaves over."""
    wanted, rounds, left = np.array([3.0, -5.0]), 6, 0.9**7
    problem, task, options = targets(wanted)
    w, b = 0.5, np.zeros(2)
    for _ in range(rounds):
        b = (wanted - w) + left * (b - (wanted - w))
        w = ((wanted - b) + left * (w - (wanted - b))).mean()
    server, memory, _ = run(res(), problem, ((0, 1),) * rounds, task=task, **options)
    np.testing.assert_allclose(server.params["w"], w, rtol=1e-5, atol=1e-6)
    found = [float(kept(memory, id).residual["w"]) - 0.5 for id in (0, 1)]
    np.testing.assert_allclose(found, b, rtol=1e-5, atol=1e-6)
    assert np.abs(w + b - wanted).max() < 0.1  # what no single model can: FedAvg's best is 4 away from both
    plain, _, _ = run(fed_avg, problem, ((0, 1),) * rounds, task=task, **options)
    assert abs(float(plain.params["w"]) - wanted).min() > 3.5


@pytest.mark.slow
def test_where_labels_mean_different_things_one_model_stays_at_chance_and_residuals_do_not():
    """Concept shift: half of the clients call class 0 what the others call class 1."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(481, 6)).astype(np.float32)
    y = (x[:, 0] > 0).astype(np.int32)
    rows, offsets = np.arange(1, 481, dtype=np.int32), np.arange(0, 481, 40).astype(np.int64)
    flipped = np.repeat(np.arange(12) % 2, 40)
    y[1:] ^= flipped.astype(np.int32)
    held = {**PROBLEM.held, "frozen": np.eye(6, dtype=np.float32)}
    problem = PROBLEM._replace(x=x, y=y, rows=rows, offsets=offsets, held=held)
    task = sgd_task(0.5, Passes(2, None, 10))
    everybody = (tuple(range(12)),) * 6
    plain, _, _ = run(fed_avg, problem, everybody, task=task)
    server, memory, _ = run(res(), problem, everybody, task=task)
    right: dict[str, list[float]] = {"plain": [], "res": []}
    for id in range(12):
        own = rows[offsets[id] : offsets[id + 1]]
        right["plain"].append(np.mean(outputs(problem, own, doubles(plain.params))[1].argmax(1) == y[own]))
        answer = fed_res(task).predict(held, server, kept(memory, id), jnp.asarray(x[own]))
        right["res"].append(np.mean(np.asarray(answer).argmax(1) == y[own]))
    assert 0.4 < np.mean(right["plain"]) < 0.6
    assert np.mean(right["res"]) > 0.97


@pytest.mark.slow
def test_bytes_are_those_of_the_shared_part_whatever_the_residual_has():
    """2 P more with controls, nothing else; of a head alone as residual no less."""
    for scheme, factor in (("avg", 1), ("sgd", 1), ("naive", 1), ("avg_ii", 2)):
        _, _, (cohort,) = run(res(scheme), PROBLEM)
        assert [sum(way.values()) for way in cohort.traffic()] == [6 * 84 * factor] * 2
    task = tiny_head_task()
    whole = sum(4 * leaf.size for leaf in task.init(jax.random.key(0)).values())
    for residual in (("*",), ("head/*",)):
        _, memory, (cohort,) = run(res(residual=residual), PROBLEM, task=task)
        assert [sum(way.values()) for way in cohort.traffic()] == [6 * whole] * 2
        assert ("hidden" in memory.state()[0].residual) == (residual == ("*",))


def changed(memory: Memory, id: int) -> Memory:
    """A copy in which this client's residual is another one."""
    rows, ids = memory.state()
    mark = np.asarray(ids) == id
    residual = {
        p: np.where(mark.reshape(-1, *[1] * (leaf.ndim - 1)), leaf + 1, leaf) for p, leaf in rows.residual.items()
    }
    copy = Memory(memory.init, PROBLEM.held)
    copy.scatter(np.asarray(ids), rows._replace(residual=residual))
    return copy


@pytest.mark.slow
def test_a_residual_never_leaves_its_client():
    """Another one at client 7 changes what the others keep in no bit of this round."""
    first, memory, _ = run(res(), PROBLEM, COHORTS[:1], task=sgd_task())
    met = np.isin(np.arange(len(SIZES)), COHORTS[0]).astype(np.int32)
    again = [
        run(res(), PROBLEM, COHORTS[1:2], task=sgd_task(), state=(first, one), first=2, met=met)
        for one in (changed(memory, 99), changed(memory, 7))
    ]
    for id in COHORTS[1]:
        a, b = (kept(one[1], id) for one in again)
        if id == 7:
            assert not np.array_equal(a.residual["bias"], b.residual["bias"])
        else:
            same(a, b, f"client {id}")


def test_what_is_moved_from_one_part_to_the_other_leaves_the_prediction_as_it_is():
    server, memory, _ = run(res(), PROBLEM, COHORTS, task=sgd_task())
    algorithm, own, x = fed_res(sgd_task()), kept(memory, 7), jnp.asarray(PROBLEM.x[:5])
    t = np.array([0.5, -1.0, 2.0], np.float32)
    moved = server._replace(params={**server.params, "bias": server.params["bias"] + t})
    beta = own._replace(residual={**own.residual, "bias": own.residual["bias"] - t})
    a = algorithm.predict(PROBLEM.held, server, own, x)
    np.testing.assert_allclose(a, algorithm.predict(PROBLEM.held, moved, beta, x), atol=1e-5)
    alone = algorithm.predict(PROBLEM.held, server, (), x)
    np.testing.assert_array_equal(alone, sgd_task().logits(PROBLEM.held, server.params, x))


@pytest.mark.parametrize("codec", [None, "quantise(8)"])
def test_corrections_cancel_over_all_clients(codec):
    """The sum of c_i - c_bar is zero where all take part, under a codec too."""
    everybody = (tuple(i for i, n in enumerate(SIZES) if n),) * 2
    up = codec and wire.codec(codec)
    server, memory, _ = run(res("avg_ii"), PROBLEM, everybody, task=sgd_task(), up=up)
    total = {p: np.sum(leaf, axis=0) / len(SIZES) for p, leaf in memory.state()[0].control.items()}
    close(server.control, doubles(total), rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_a_residual_begins_at_zero_outputs_and_learns():
    """With a head by zeroing it; every leaf gets a gradient then, which an all-zero model would not give."""
    task = tiny_head_task()
    algorithm = fed_res(task)
    own = algorithm.memory(jax.random.key(1), PROBLEM.held)
    server = algorithm.init(jax.random.key(0), PROBLEM.held)
    x = jnp.asarray(PROBLEM.x[:5])
    both = algorithm.predict(PROBLEM.held, server, own, x)
    np.testing.assert_array_equal(both, task.logits(PROBLEM.held, server.params, x))
    _, memory, _ = run(fed_res, PROBLEM, (COHORTS[0],) * 2, task=task)
    for path, leaf in kept(memory, 7).residual.items():
        assert np.abs(leaf - own.residual[path]).max() > 1e-4, path


@pytest.mark.parametrize("keeps", ["none", "residual", "both"])
def test_moments_are_kept_where_it_is_asked_for(keeps):
    """Two rounds of one batch are then two steps of one Adam, against Adam written out."""
    wanted = np.array([3.0])
    problem, task, options = targets(wanted, steps=1)
    task = task._replace(optimizer=optax.adam)
    server, memory, _ = run(res(moments=keeps), problem, ((0,), (0,)), task=task, **options)
    w, b, state = 0.5, 0.0, {"w": (0.0, 0.0, 0), "b": (0.0, 0.0, 0)}

    def step(name, value, slope):
        m, v, n = state[name]
        m, v, n = 0.9 * m + 0.1 * slope, 0.999 * v + 0.001 * slope**2, n + 1
        stays = keeps == "both" or (keeps == "residual" and name == "b")
        state[name] = (m, v, n) if stays else (0.0, 0.0, 0)
        return value - 0.1 * (m / (1 - 0.9**n)) / (np.sqrt(v / (1 - 0.999**n)) + 1e-8)

    for _ in range(2):
        b = step("b", b, w + b - 3.0)
        w = step("w", w, w + b - 3.0)
    np.testing.assert_allclose(server.params["w"], w, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(kept(memory, 0).residual["w"] - 0.5, b, rtol=1e-4)


@pytest.mark.slow
def test_training_changes_its_inputs_where_the_run_does():
    """The joint loss augments once for both parts, as the task's own loss does."""
    task = sgd_task(augment=lambda key, x: 0.0 * x)  # nothing is left but the biases' gradient
    server, memory, _ = run(res(), PROBLEM, COHORTS[:1], task=task)
    same(server.params["kernel"], task.init(jax.random.key(0))["kernel"], "the kernel")
    assert np.abs(kept(memory, 7).residual["bias"]).max() > 0


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("fed_res(scheme='svrg')", r"Expected scheme='svrg' to be one of sgd, avg, avg_ii, naive"),
        ("fed_res(moments='all')", r"Expected moments='all' to be one of none, residual, both"),
        ("fed_res(residual=('nose',))", r"'nose' matches none of"),
        ("fed_res(residual=('hidden',))", r"to cover the head"),
        ("fed_res(residual_epochs=-1)", r"Expected residual_epochs=-1 >= 0"),
        ("fed_res(scheme='naive', residual_epochs=2)", r"Expected no residual_epochs=2 for scheme='naive'"),
        ("fed_res(server_step=True)", r"Expected no server_step=True for scheme='avg'"),
        ("fed_res(residual_rate=-0.5)", r"Expected residual_rate=-0\.5 >= 0"),
    ],
)
def test_what_is_refused(text, says):
    with pytest.raises(ValueError, match=says):
        find(text)(tiny_head_task())


def test_by_its_own_task_too():
    assert fed_res(tiny_task()).answers == "client"
