"""DFedAlt and DFedSalt: oracles (a) to (g), what mixing keeps, bytes, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from by_hand import close, doubles, gradient, kept, mean, sgd_task, start_of, trained

from brief import brief
from fedsim.algorithms import find
from fedsim.algorithms.dfed_salt import dfed_alt, dfed_salt, everybody, gossip, sharpness_aware
from fedsim.algorithms.fed_avg import fed_avg
from fedsim.algorithms.fed_rep import fed_rep
from fedsim.algorithms.graphs import matrix, of_members, rule
from fedsim.algorithms.local_only import local_only
from fedsim.algorithms.parts import Parts
from fedsim.core import Graph, Passes, Population
from fedsim.testing.contract import same
from fedsim.testing.tasks import tiny_head_task
from fedsim.testing.toys import SIZES, one_client, run, tiny_problem

pytestmark = pytest.mark.usefixtures("compile_once")

PROBLEM = tiny_problem()
BOTH = tuple(i for i, size in enumerate(SIZES) if size)  # a client without examples counts in a mean over peers
HEAD, BODY = ("bias",), ("kernel",)  # of the tiny task


def alt(**options):
    return lambda task: dfed_alt(task, **{"personal": HEAD, **options})


def alone(cohort):
    """Nobody hears anybody: W = I."""
    members = len(cohort.ids)
    nobody = np.zeros((members, 1))
    return Graph(nobody.astype(int), nobody.astype(np.float32), np.ones(members, np.float32)), 0.0


def apart(parts):
    return lambda task: gossip(task, parts, alone, everybody(rule("full")))


@pytest.mark.slow
def test_oracle_a_salt_without_a_radius_is_alt():
    """And with a small one it is near, and with a large one not."""
    task, rounds = sgd_task(), (BOTH,) * 2
    plain, memory, _ = run(alt(), PROBLEM, rounds, task=task)
    for rho, near in ((0.0, True), (1e-4, True), (2.0, False)):
        salt, other, _ = run(lambda t, rho=rho: dfed_salt(t, rho=rho, personal=HEAD), PROBLEM, rounds, task=task)
        if rho == 0:
            same(plain, salt, "the mean")
            same(memory.state(), other.state(), "what clients keep")
        assert np.allclose(plain.params["kernel"], salt.params["kernel"], atol=1e-3) == near


@pytest.mark.parametrize("devices", brief([8, 1, 2]))
def test_oracle_b_a_full_graph_that_shares_all_is_fed_avg(devices):
    """With the same shuffled batches: full participation, uniform weights, one copy for all."""
    task, rounds = sgd_task(), (BOTH,) * 2
    mixed, memory, _ = run(alt(personal=(), graph="full"), PROBLEM, rounds, task=task, devices=devices)
    plain, _, _ = run(fed_avg, PROBLEM, rounds, task=task)
    same(plain.params, mixed.params, "the mean", rtol=1e-5)
    for path, leaf in plain.params.items():
        rows = memory.state()[0][path]
        np.testing.assert_allclose(rows, np.broadcast_to(leaf, rows.shape), atol=1e-6)


def test_oracle_c_personal_heads_on_a_full_graph_are_fed_rep():
    task, rounds = sgd_task(), (BOTH,) * 2
    options = {"personal_epochs": 2, "personal_rate": 0.5}
    mixed, memory, _ = run(alt(graph="full", **options), PROBLEM, rounds, task=task)
    rep, heads, _ = run(lambda t: fed_rep(t, personal=HEAD, **options), PROBLEM, rounds, task=task)
    same(rep.params, mixed.params, "the body", rtol=1e-5)
    np.testing.assert_allclose(heads.state()[0]["bias"], memory.state()[0]["bias"], atol=1e-6)


@pytest.mark.slow
def test_oracle_d_nobody_hears_anybody_is_local_training():
    """No byte, and every client as if it was alone."""
    rounds = ((2, 0, 7, 4), (7, 2, 5, 1))
    _, memory, cohorts = run(apart(Parts((), ("bias", "kernel"))), PROBLEM, rounds, task=sgd_task())
    _, local, _ = run(local_only, PROBLEM, rounds, task=sgd_task())
    same(local.state(), memory.state(), "what clients keep", rtol=1e-6)
    assert all(sum(way.values()) == 0 for cohort in cohorts for way in cohort.traffic())


@pytest.mark.slow
def test_oracle_e_nothing_shared_is_local_training():
    """In batches of the personal part."""
    rounds, task = ((2, 0, 7, 4),) * 2, sgd_task(passes=Passes(1, None, 4))
    _, memory, _ = run(apart(Parts(("bias", "kernel"), ())), PROBLEM, rounds, task=task)
    _, local, _ = run(local_only, PROBLEM, rounds, task=task._replace(passes=task.passes._replace(stream="personal")))
    same(local.state(), memory.state(), "what clients keep", rtol=1e-6)


@pytest.mark.parametrize("passes", [Passes(1, None, 64), Passes(3, None, 8)])
@pytest.mark.parametrize("graph", ["ring", "exponential"])
def test_oracle_f_all_shared_is_decentralised_sgd(graph, passes):
    """Adapt, then combine: U <- W (U - rate G); with more steps DFedAvg. Against NumPy with W as a matrix."""
    task, rounds = sgd_task(passes=passes), 2
    w = matrix(of_members(rule(graph), np.array(BOTH)))
    u = [start_of(task) for _ in BOTH]
    for round in range(1, rounds + 1):
        z = [trained(PROBLEM, u[k], id, round, passes) for k, id in enumerate(BOTH)]
        u = [{path: np.tensordot(row, [one[path] for one in z], 1) for path in z[0]} for row in w]
    mixed, memory, cohorts = run(alt(graph=graph, personal=()), PROBLEM, (BOTH,) * rounds, task=task)
    for k, id in enumerate(BOTH):
        close(kept(memory, id), u[k], rtol=1e-4, atol=1e-5)
    close(mixed.params, mean(u), rtol=1e-4, atol=1e-5)
    assert sum(cohorts[0].traffic()[0].values()) == 0


def test_oracle_g_the_sharpness_aware_gradient_of_a_quadratic_is_its_closed_form():
    """F = u'Au / 2: the gradient is A (u + rho Au / ||Au||), with one norm over both leaves; a leaf that stays is in none."""
    rng = np.random.default_rng(0)
    a, rho = rng.normal(size=(5, 5)), 0.3
    a = (a @ a.T).astype(np.float32)
    u = rng.normal(size=5).astype(np.float32)

    def loss(held, params, batch):
        whole = jnp.concatenate([params["first"], params["second"]])
        value = 0.5 * whole @ a @ whole + jnp.sum(params["other"] ** 2)
        return value, {"loss": value}

    params = {"first": u[:2], "second": u[2:], "other": jnp.full((3,), 100.0)}
    adverse = sharpness_aware(loss, rho, ("first", "second"))
    shared = {path: params[path] for path in ("first", "second")}
    grads, metrics = jax.grad(lambda s: adverse((), {**params, **s}, None), has_aux=True)(shared)
    g = a @ u
    expected = a @ (u + rho * g / np.linalg.norm(g))
    np.testing.assert_allclose(np.concatenate([grads["first"], grads["second"]]), expected, rtol=1e-5)
    np.testing.assert_allclose(metrics["loss"], 0.5 * u @ a @ u + 3e4, rtol=1e-6)  # at u, not where it is worst
    flat = jax.grad(lambda s: adverse((), {**params, **s}, None)[0])({path: 0 * leaf for path, leaf in shared.items()})
    np.testing.assert_array_equal(np.concatenate([flat["first"], flat["second"]]), np.zeros(5))


def test_salt_is_its_numpy_loop():
    """The sharpness-aware step goes by the shared leaves alone, on the same batch."""
    task, rho, cohort = sgd_task(), 0.4, BOTH[:6]

    def slope(rows, w):
        g = {"kernel": gradient(PROBLEM, rows, w)["kernel"]}
        worst = {**w, "kernel": w["kernel"] + rho * g["kernel"] / np.linalg.norm(g["kernel"])}
        return gradient(PROBLEM, rows, worst)

    z, apart_ = [], task.passes._replace(stream="personal", epochs=1)
    for id in cohort:
        head = trained(PROBLEM, start_of(task), id, 1, apart_, moves=HEAD)
        z.append(trained(PROBLEM, head, id, 1, slope=slope, moves=BODY))
    w = matrix(of_members(rule("ring"), np.array(cohort)))
    _, memory, _ = run(lambda t: dfed_salt(t, rho=rho, personal=HEAD), PROBLEM, (cohort,), task=task)
    for k, id in enumerate(cohort):
        expected = {"kernel": np.tensordot(w[k], [one["kernel"] for one in z], 1), "bias": z[k]["bias"]}
        close(kept(memory, id), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_what_does_not_move_stays_bit_for_bit():
    """The phase of the head leaves the body alone, and the other way round; mixing leaves the head."""
    sent: list = []
    _, memory, _ = run(alt(), PROBLEM, ((2, 7),), task=sgd_task(), sent=sent)
    start = sgd_task().init(jax.random.key(0))
    _, head = one_client(PROBLEM, sent[0].local, (), start, 7, 1)
    np.testing.assert_array_equal(head["kernel"], start["kernel"])
    assert float(jnp.abs(head["bias"]).max()) > 0
    _, body = one_client(PROBLEM, sent[1].local, (), head, 7, 1)
    np.testing.assert_array_equal(body["bias"], head["bias"])
    np.testing.assert_allclose(kept(memory, 7)["bias"], head["bias"], atol=1e-6)


def test_what_an_observer_sees_is_the_mean_and_the_distance_of_what_clients_hold():
    """In float64 from the clients' rows; a small distance is not lost beside large parameters."""
    start = sgd_task().init(jax.random.key(0))
    far = {path: leaf + 100.0 for path, leaf in start.items()}
    task = sgd_task(1e-3, init=lambda key: far)
    seen: list = []

    def watched(task):
        algorithm = alt(personal=())(task)

        def round(key, held, server, cohort):
            new, metrics = algorithm.round(key, held, server, cohort)
            seen.append(metrics)
            return new, metrics

        return algorithm._replace(round=round)

    mixed, memory, _ = run(watched, PROBLEM, (BOTH,) * 2, task=task)
    rows = doubles(memory.state()[0])
    middle = {path: leaf.mean(axis=0) for path, leaf in rows.items()}
    close(mixed.params, middle, rtol=1e-6)
    distance = np.sqrt(sum(((rows[p] - middle[p]) ** 2).sum() for p in rows) / len(BOTH))
    np.testing.assert_allclose(seen[-1]["consensus_distance"], distance, rtol=0.02)
    expected = 1 - np.linalg.norm(matrix(of_members(rule("ring"), np.array(BOTH))) - 1 / len(BOTH), 2)
    np.testing.assert_allclose(seen[-1]["spectral_gap"], expected, atol=1e-6)


@pytest.mark.parametrize(("graph", "keeps"), [("ring", True), ("exponential", True), ("random", False)])
def test_doubly_stochastic_weights_keep_the_mean(graph, keeps):
    """The mean of what members heard is the mean of what they sent; a random graph of one's own draws does not keep it."""
    options = {"graph": graph, "personal": (), "neighbours": 2}
    mixed, _, _ = run(alt(**options), PROBLEM, (BOTH,), task=sgd_task())
    z = mean([trained(PROBLEM, start_of(sgd_task()), id, 1) for id in BOTH])
    gap = max(np.abs(mixed.params[path] - z[path]).max() for path in z)
    assert (gap < 1e-5) == keeps
    if graph == "random":
        mixed, _, _ = run(alt(**options, weights="metropolis"), PROBLEM, (BOTH,), task=sgd_task())
        close(mixed.params, z, rtol=1e-4, atol=1e-5)


def test_identical_clients_stay_at_distance_zero():
    """The same rows, one batch of all, a regular graph: bit for bit the same u_i for ever."""
    rows = np.tile(PROBLEM.rows[:12], 5)
    problem = PROBLEM._replace(rows=rows, offsets=np.arange(0, 61, 12).astype(np.int64))
    make = lambda t: dfed_salt(t, personal=(), graph="ring")  # noqa: E731 - one expression, named
    task, options = sgd_task(passes=Passes(2, None, 12)), {"public": None, "shard": None, "devices": 1, "lanes": 5}
    task = task._replace(passes=task.passes._replace(shuffle=False))
    _, memory, _ = run(make, problem, (tuple(range(5)),) * 3, task=task, **options)
    for path, leaf in memory.state()[0].items():
        np.testing.assert_array_equal(leaf, np.broadcast_to(leaf[0], leaf.shape), err_msg=path)


@pytest.mark.parametrize(("graph", "heard"), [("ring", 2), ("exponential", 3), ("full", 4), ("random", 3)])
def test_a_round_costs_its_transmissions(graph, heard):
    """Point to point for each that hears, and what a broadcast would cost; nothing of the head, nothing down."""
    _, _, (done,) = run(alt(graph=graph, neighbours=3), PROBLEM, ((2, 0, 7, 4, 9),), task=sgd_task())
    down, up = done.traffic()
    assert sum(down.values()) == 0
    assert up == {"kernel": 5 * heard * 72}
    spoke = done.peers()
    assert spoke["transmissions"] == 5 * heard
    assert spoke["broadcast_bytes"] == 5 * 72 or graph == "random"  # in which somebody may be heard by nobody


def test_everybody_is_a_peer_and_a_graph_that_does_not_fit_is_refused(tmp_path):
    file = tmp_path / "edges.txt"
    file.write_text("0 1\n1 0\n")
    algorithm = dfed_alt(tiny_head_task(), graph=str(file))
    rng = np.random.default_rng(0)
    assert algorithm.select(rng, (), Population(2, 1)).tolist() == [0, 1]
    with pytest.raises(ValueError, match="to connect all 3 clients"):
        algorithm.select(rng, (), Population(3, 1))
    with pytest.raises(ValueError, match="to name clients 0 to 0"):
        algorithm.select(rng, (), Population(1, 1))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("dfed_salt(rho=-1)", r"Expected rho=-1\.0 >= 0"),
        ("dfed_salt(graph='star')", r"Expected graph='star' to be one of ring"),
        ("dfed_alt(personal=('*',))", r"to leave dfed_alt something to share"),
        ("dfed_alt(personal=('nose',))", r"'nose' matches none of"),
        ("dfed_alt(personal_epochs=-1)", r"Expected personal_epochs=-1 >= 0"),
    ],
)
def test_what_is_refused(text, says):
    with pytest.raises(ValueError, match=says):
        find(text)(tiny_head_task())
