"""Oracles of the toys: reductions to FedAvg with shuffled batches, local training, W @ Z."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys

from fedsim.algorithms.fed_avg import fed_avg
from fedsim.folds import uniform
from fedsim.testing.toys import SIZES, run, tiny_problem, tiny_task

EVERYBODY = (tuple(range(len(SIZES))),)


def close(a, b, atol=1e-6):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, atol=atol)


def test_fed_res_whose_residual_does_not_learn_is_fed_avg_with_the_same_shuffled_batches():
    """Oracle (a) of the spec, exact though a phase comes first: it draws from a stream of its own."""
    cohorts = ((2, 0, 7, 4, 9, 1), (7, 5, 3, 2, 8, 10))
    plain, _, _ = run(fed_avg, tiny_problem(), cohorts)
    residual, _, _ = run(lambda task: toys.fed_res(task, local_rate=0.0), tiny_problem(), cohorts)
    for x, y in zip(jax.tree.leaves(plain), jax.tree.leaves(residual), strict=True):
        np.testing.assert_array_equal(x, y)
    other, _, _ = run(toys.fed_res, tiny_problem(), cohorts)
    assert not np.array_equal(other.params["kernel"], plain.params["kernel"])


def test_fed_res_pays_for_the_parameters_once():
    _, _, (cohort,) = run(toys.fed_res, tiny_problem())
    down, up = cohort.traffic()
    assert sum(down.values()) == sum(up.values()) == 6 * 84


@pytest.mark.parametrize("devices", [1, 2, 8])
def test_a_complete_graph_that_shares_all_is_fed_avg_with_the_same_shuffled_batches(devices):
    """Oracle (b) of DFedAlt: full participation, uniform weights, one copy for all."""
    make = lambda task: toys.dfed_alt(task, personal=(), graph=toys.complete)  # noqa: E731 - one expression, named
    cohort = tuple(i for i, size in enumerate(SIZES) if size)  # a client without examples counts in a mean over peers
    everybody = (cohort, cohort)
    start = tiny_task(weight=uniform, init=lambda key: tiny_task().init(jax.random.key(0)))
    mixed, memory, _ = run(make, tiny_problem(), everybody, task=start, devices=devices)
    plain, _, _ = run(fed_avg, tiny_problem(), everybody, task=start)
    close(mixed.params, plain.params)
    rows, _ = memory.state()
    for path, leaf in plain.params.items():
        np.testing.assert_allclose(rows[path], np.broadcast_to(leaf, rows[path].shape), atol=1e-6)


def test_personal_heads_on_a_complete_graph_are_fed_rep():
    """Oracle (c): against a loop, client by client - the head, then the body, then the mean of bodies."""
    cohort = tuple(i for i, size in enumerate(SIZES) if size)
    make = lambda task: toys.dfed_alt(task, graph=toys.complete)  # noqa: E731 - one expression, named
    sent: list = []
    mixed, memory, _ = run(make, tiny_problem(), (cohort,), sent=sent)
    from fedsim.testing.toys import one_client

    start = tiny_task().init(jax.random.key(0))
    heads, bodies = [], []
    for id in cohort:
        own = start
        for one in sent:
            _, own = one_client(tiny_problem(), one.local, (), own, id, 1)
        heads.append(own["bias"])
        bodies.append(own["kernel"])
    close(mixed.params["kernel"], np.mean(bodies, axis=0))
    rows, ids = memory.state()
    order = [list(ids).index(i) for i in cohort]
    close(rows["bias"][order], np.stack(heads))


def test_nobody_hears_anybody_is_local_training():
    """Oracle (d): no byte, and every client as if it was alone."""
    cohort = (2, 0, 7, 4)
    _, memory, (done,) = run(lambda task: toys.dfed_alt(task, personal=(), graph=toys.alone), tiny_problem(), (cohort,))
    down, up = done.traffic()
    assert sum(down.values()) == sum(up.values()) == 0
    rows, ids = memory.state()
    for id in cohort:
        make = lambda task: toys.dfed_alt(task, personal=(), graph=toys.alone)  # noqa: E731 - one expression, named
        _, alone, _ = run(make, tiny_problem(), ((id,),))
        place, (own, _) = list(ids).index(id), alone.state()
        for path, leaf in rows.items():
            close(leaf[place], own[path][0])


def test_a_gossip_round_costs_its_transmissions():
    cohort = (2, 0, 7, 4, 9)
    _, _, (done,) = run(toys.dfed_alt, tiny_problem(), (cohort,))
    down, up = done.traffic()
    assert sum(down.values()) == 0
    assert up == {"kernel": 5 * 2 * 72}
    assert done.peers() == {"transmissions": 10, "broadcast_bytes": 5 * 72}


def test_what_does_not_move_stays_bit_for_bit():
    """The phase of the head leaves the body alone, and the other way round."""
    sent: list = []
    run(toys.dfed_alt, tiny_problem(), ((2, 7),), sent=sent)
    from fedsim.testing.toys import one_client

    start = tiny_task().init(jax.random.key(0))
    _, head = one_client(tiny_problem(), sent[0].local, (), start, 7, 1)
    np.testing.assert_array_equal(head["kernel"], start["kernel"])
    assert float(jnp.abs(head["bias"]).max()) > 0
    _, body = one_client(tiny_problem(), sent[1].local, (), head, 7, 1)
    np.testing.assert_array_equal(body["bias"], head["bias"])
