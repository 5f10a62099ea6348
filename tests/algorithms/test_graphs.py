"""Graphs by name and from files: who hears whom, rows that sum to one, spectral gaps in closed form, what is refused."""

import math

import numpy as np
import pytest

from fedsim.algorithms.graphs import check, heard_by, matrix, of_members, of_round, rule, spectral_gap
from fedsim.engine.peers import edges

NAMED = ("ring", "grid", "exponential", "full", "random")
RNG = np.random.default_rng


def made(name, members, seed=0, **options):
    return of_members(rule(name, **options), np.arange(members), RNG(seed))


@pytest.mark.parametrize("members", [1, 2, 3, 10, 12, 100])
@pytest.mark.parametrize("weights", ["uniform", "metropolis"])
@pytest.mark.parametrize("name", NAMED)
def test_rows_sum_to_one_and_metropolis_is_doubly_stochastic(name, weights, members):
    graph = made(name, members, weights=weights)
    edges(graph, np.arange(members))  # the engine takes it
    w = matrix(graph)
    np.testing.assert_allclose(w.sum(axis=1), 1, atol=1e-6)
    assert w.min() >= -1e-7 and (members == 1 or np.diag(w).min() > 0)
    if weights == "metropolis":
        np.testing.assert_allclose(w, w.T, atol=1e-7)
        np.testing.assert_allclose(w.sum(axis=0), 1, atol=1e-6)


def test_a_random_graph_of_ones_own_draws_does_not_keep_the_mean_and_metropolis_does():
    z = RNG(1).normal(size=(30, 4))

    def drift(weights):
        w = matrix(made("random", 30, weights=weights, neighbours=3))
        return np.abs((w @ z).mean(axis=0) - z.mean(axis=0)).max()

    assert drift("uniform") > 1e-2 and drift("metropolis") < 1e-6


@pytest.mark.parametrize(
    ("name", "members", "place", "heard"),
    [
        ("ring", 10, 0, [1, 9]),
        ("ring", 2, 0, [1]),
        ("grid", 100, 0, [1, 9, 10, 90]),  # a torus of 10 x 10
        ("grid", 100, 55, [45, 54, 56, 65]),
        ("grid", 6, 0, [1, 2, 3]),  # 2 x 3: up and down are the same
        ("grid", 7, 3, [2, 4]),  # no rectangle but the ring
        ("exponential", 100, 0, [1, 2, 4, 8, 16, 32, 64]),
        ("exponential", 8, 7, [0, 1, 3]),
        ("full", 4, 2, [0, 1, 3]),
    ],
)
def test_whom_a_member_hears(name, members, place, heard):
    assert heard_by(rule(name), np.arange(members))[place].tolist() == heard


def test_the_grid_of_the_authors_code_is_a_circulant_graph():
    """i +- 1 and i +- 9 of 100, which is no torus of 10 x 10."""
    code = rule("circulant", offsets=(1, -1, 9, -9))
    assert heard_by(code, np.arange(100))[0].tolist() == [1, 9, 91, 99]
    assert spectral_gap(of_members(code, np.arange(100))) != spectral_gap(made("grid", 100))


@pytest.mark.parametrize("members", [10, 20, 100])
def test_the_gap_of_a_ring_is_its_closed_form(members):
    """Of thirds lambda is (1 + 2 cos(2 pi / m)) / 3."""
    expected = (1 + 2 * math.cos(2 * math.pi / members)) / 3
    np.testing.assert_allclose(1 - spectral_gap(made("ring", members)), expected, atol=1e-6)


def test_the_gap_is_that_of_the_eigenvalues_where_the_weights_are_symmetric():
    w = made("random", 40, weights="metropolis", neighbours=3)
    values = np.sort(np.abs(np.linalg.eigvalsh(matrix(w))))
    np.testing.assert_allclose(1 - spectral_gap(w), values[-2], atol=1e-6)
    assert spectral_gap(made("full", 12)) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("name", NAMED)
def test_one_mixing_leaves_no_more_of_the_distance_than_lambda(name):
    graph = made(name, 24, neighbours=4)
    z = RNG(3).normal(size=(24, 5))
    mixed = matrix(graph) @ z
    apart = lambda rows: np.linalg.norm(rows - rows.mean(axis=0))  # noqa: E731 - one expression, named
    assert apart(mixed) <= (1 - spectral_gap(graph)) * apart(z) + 1e-9


def test_a_random_graph_is_another_in_every_round_and_the_others_are_not():
    ids = np.arange(20)
    for name, other in (("random", True), ("ring", False)):
        (a, _), (b, _), (c, _) = (of_round(rule(name, neighbours=3), ids, RNG(seed)) for seed in (0, 1, 0))
        assert (not np.array_equal(a.whom, b.whom)) == other
        np.testing.assert_array_equal(a.whom, c.whom)


def test_random_graphs_have_one_shape_whatever_they_draw():
    """Another would compile once more."""
    shapes = {made("random", 60, seed, weights="metropolis", neighbours=4).whom.shape for seed in range(30)}
    assert len(shapes) == 1
    lists = heard_by(rule("random", neighbours=4), np.arange(60), RNG(0))
    assert all(len(others) == 4 and own not in others for own, others in enumerate(lists))
    assert all(len(o) == 2 for o in heard_by(rule("random", neighbours=4), np.arange(3), RNG(0)))


def test_relabelled_members_get_a_relabelled_graph(tmp_path):
    """W becomes P W P'; of a file, whose edges are between clients and not places."""
    file = tmp_path / "edges.txt"
    file.write_text("0 1\n1 2\n2 3\n3 0\n0 2\n")
    order = np.array([2, 0, 3, 1])
    plain, moved = (matrix(of_members(rule(str(file)), ids)) for ids in (np.arange(4), order))
    np.testing.assert_allclose(moved, plain[np.ix_(order, order)], atol=1e-7)


def test_a_file_with_weights_and_one_of_whom_not_all_are_there(tmp_path):
    file = tmp_path / "edges.csv"
    file.write_text("# hearer, heard, weight\n0, 1, 0.25\n0, 0, 0.75\n1, 0, 0.5\n1, 2, 0.125\n2, 0, 1.0\n")
    found = rule(str(file))
    check(found, 3)
    w = matrix(of_members(found, np.arange(3)))
    np.testing.assert_allclose(w, [[0.75, 0.25, 0], [0.5, 0.375, 0.125], [1, 0, 0]], atol=1e-7)
    some = matrix(of_members(found, np.array([1, 0, -1])))  # what 1 would hear of 2 stays its own
    np.testing.assert_allclose(some, [[0.5, 0.5, 0], [0.25, 0.75, 0], [0, 0, 1]], atol=1e-7)


@pytest.mark.parametrize("name", NAMED)
def test_named_graphs_connect_everybody(name):
    for clients in (2, 7, 10, 1000):
        check(rule(name), clients)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("0 1\n1 0\n", r"to connect all 4 clients, but nothing of client 2 reaches client 0"),
        ("0 1\n1 2\n2 3\n", r"nothing of client 0 reaches client 1"),
        ("0 1\n1 2\n2 9\n", r"to name clients 0 to 3, not 9"),
        ("0 1 0.5\n0 0 0.6\n1 2 1\n2 3 1\n3 0 1\n", r"weights of client 0 in graph=.* to sum to 1, not 1\.1"),
        ("0 1 0.5\n0 0 0.4\n1 2 1\n2 3 1\n3 0 1\n", r"sum to 1, not 0\.9"),
        ("0 1 1.5\n1 2 1\n2 3 1\n3 0 1\n", r"sum to 1, not 1\.5"),
        ("0 1\n0 1\n", r"line 2 of .* to name another edge: 0 hears 1 already"),
        ("0 1\n1 0 0.5\n", r"all of them with a weight or none, not 1 of 2"),
        ("0 1\n1 x\n", r"line 2 of .*'1 x', to be `i j`"),
        ("0 1 -1\n", r"line 1 of .*weight >= 0"),
        ("0 1 nan\n", r"line 1 of .*weight >= 0"),
        ("0 1 2 3\n", r"line 1 of"),
        ("# nothing\n", r"to have edges"),
    ],
)
def test_files_that_are_no_graph_are_refused(tmp_path, text, says):
    file = tmp_path / "edges.txt"
    file.write_text(text)
    with pytest.raises(ValueError, match=says):
        check(rule(str(file)), 4)


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("star", {}, r"Expected graph='star' to be one of ring, grid"),
        ("nowhere.txt", {}, r"to be a file"),
        ("ring", {"weights": "equal"}, r"Expected weights='equal' to be one of uniform, metropolis"),
        ("random", {"neighbours": 0}, r"Expected neighbours=0 >= 1"),
        ("ring", {"offsets": (1,)}, r"Expected offsets=\(1,\) to go with graph='circulant'"),
        ("circulant", {}, r"Expected offsets=\(\) to go with graph='circulant'"),
    ],
)
def test_graphs_that_are_none_are_refused(name, options, says):
    with pytest.raises(ValueError, match=says):
        rule(name, **options)


def test_offsets_that_do_not_connect_are_refused():
    with pytest.raises(ValueError, match="to connect all 10 clients"):
        check(rule("circulant", offsets=(2, -2)), 10)
