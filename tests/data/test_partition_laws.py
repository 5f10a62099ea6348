"""Partitions by label, by size and by key against their laws; local test sets; golden values."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_partition import dataset, holds, labelled

from fedsim.config import PARTITIONS, Config
from fedsim.data import partition
from fedsim.data.partition import labels as by_label
from fedsim.data.partition.sizes import apportioned, equal, proportional

SHAPES = {"total": st.integers(1, 300), "clients": st.integers(1, 60), "seed": st.integers(0, 9)}
ALPHAS = st.sampled_from([1e-3, 0.05, 0.3, 1.0, 50.0, 1e9])


def table(p: partition.Partition, rows: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Rows of each class at each client, (N, C)."""
    of = np.zeros(rows.max() + 1, np.int64)
    of[rows] = labels
    return np.array([np.bincount(of[p.client(i)], minlength=labels.max() + 1) for i in range(p.clients)])


# --- whole numbers in proportion


@given(total=st.integers(0, 300), parts=st.integers(1, 50))
def test_equal_parts(total: int, parts: int) -> None:
    sizes = equal(total, parts)
    assert sizes.sum() == total and len(sizes) == parts and np.ptp(sizes) <= 1


@given(
    weights=st.lists(st.floats(0, 1e6), min_size=1, max_size=20).filter(lambda w: max(w) > 1e-3),
    least=st.integers(0, 9),
    more=st.integers(0, 500),
)
def test_proportional_sizes(weights: list[float], least: int, more: int) -> None:
    """Within one of max(least, t w), with t found here by bisection."""
    w, total = np.array(weights), len(weights) * least + more
    sizes = proportional(w, total, least)
    assert sizes.sum() == total and sizes.min() >= least
    low, high = 0.0, 1e9
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if np.maximum(least, middle * w).sum() < total else (low, middle)
    assert np.abs(sizes - np.maximum(least, high * w)).max() <= 1 + 1e-6


@given(counts=st.lists(st.integers(1, 60), min_size=1, max_size=8), more=st.integers(0, 60))
def test_apportioned_one_seat_after_another(counts: list[int], more: int) -> None:
    """Adams: the next seat goes to the group with most examples a seat; ties to the first."""
    owned = [1] * len(counts)
    for _ in range(more):
        owned[min(range(len(counts)), key=lambda i: owned[i] / counts[i])] += 1
    assert apportioned(np.array(counts), len(counts) + more).tolist() == owned


# --- quantity skew


@given(law=st.sampled_from(["lognormal(sigma=0.5)", "lognormal(sigma=20)", "power(exponent=1.5)"]), **SHAPES)
def test_quantity_law(law: str, total: int, clients: int, seed: int) -> None:
    rows, _ = labelled(total, 3)
    least = total // clients // 2
    p = partition.quantity(rows, clients, law, least, seed)
    holds(p, rows, clients)
    assert p.sizes.min() >= least


def test_lognormal_sizes_have_their_deviation() -> None:
    for sigma in (0.5, 1.0):
        sizes = partition.quantity(np.arange(2_000_000), 4000, f"lognormal(sigma={sigma})", 0, 1).sizes
        np.testing.assert_allclose(np.log(sizes).std(), sigma, rtol=0.05)


def test_power_sizes_fall_with_the_rank() -> None:
    sizes = partition.quantity(np.arange(100_000), 50, "power(exponent=1.5)", 0, 0).sizes
    expected = np.arange(1, 51) ** -1.5
    np.testing.assert_allclose(np.sort(sizes)[::-1], 100_000 * expected / expected.sum(), atol=1)
    other = partition.quantity(np.arange(100_000), 50, "power(exponent=1.5)", 0, 1).sizes
    assert sizes.argmax() != other.argmax() and sorted(sizes) == sorted(other), "who is largest is drawn"


# --- label skew


@given(alpha=ALPHAS, classes=st.integers(1, 12), **SHAPES)
def test_dirichlet_balanced_law(alpha: float, classes: int, total: int, clients: int, seed: int) -> None:
    rows, labels = labelled(total, classes)
    p = partition.dirichlet_balanced(rows, labels + 2, clients, alpha, seed)  # classes 0 and 1 have no row
    holds(p, rows, clients)
    assert np.ptp(p.sizes) <= 1


def test_mixtures_follow_the_dirichlet_law() -> None:
    """Mean p, variance p (1 - p) / (alpha + 1), for small alpha too; a class of no rows has no share."""
    prior = np.array([0.5, 0.3, 0.0, 0.2])
    for alpha in (0.01, 0.5, 5.0):
        log_q = by_label._log_mixtures(prior, 20_000, alpha, np.random.default_rng(0)).astype(float)
        q = np.exp(log_q - log_q.max(axis=1, keepdims=True))
        q /= q.sum(axis=1, keepdims=True)
        np.testing.assert_allclose(q.mean(axis=0), prior, atol=0.01)
        np.testing.assert_allclose(q.var(axis=0), prior * (1 - prior) / (alpha + 1), rtol=0.05)


def test_dirichlet_balanced_between_one_class_and_iid() -> None:
    rows, labels = labelled(20_000, 4)
    even = table(partition.dirichlet_balanced(rows, labels, 20, 1e7, 0), rows, labels) / 1000
    noise = np.abs(even - 0.25).max(axis=1)
    assert np.sort(noise)[-4] < 0.05, "multinomial noise of 1000 draws, 0.014, but for who is served last"
    skewed = table(partition.dirichlet_balanced(rows, labels, 100, 1e-3, 0), rows, labels)
    assert ((skewed > 0).sum(axis=1) == 1).mean() > 0.8, "most clients have one class"


def test_a_class_that_runs_out_favours_no_client() -> None:
    """All want the first class, which has half of what is asked for: a random half of the clients gets it."""
    rows = np.arange(20_000)
    labels = np.repeat([0, 1], 10_000).astype(np.int32)
    log_q = np.log(np.tile([0.999, 0.001], (200, 1))).astype(np.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(by_label, "_log_mixtures", lambda *_: log_q)
        got = table(partition.dirichlet_balanced(rows, labels, 200, 1.0, 0), rows, labels)[:, 0]
    assert got.sum() == 10_000 and ((got > 95) | (got < 5)).mean() > 0.98, "all it wants, or nothing"
    assert abs(got[:100].mean() - got[100:].mean()) < 15, "50 clients of the first 100 are a random half's: 50 +- 3.5"


@given(alpha=ALPHAS, classes=st.integers(1, 12), **SHAPES)
def test_dirichlet_pfllib_law(alpha: float, classes: int, total: int, clients: int, seed: int) -> None:
    rows, labels = labelled(total, classes)
    p = partition.dirichlet_pfllib(rows, labels, clients, alpha, 0, seed)
    holds(p, rows, clients)
    assert p.sizes.max() < total / clients + np.bincount(labels).max(), "who has a fair share gets nothing more"


def recipe(counts: list[int], clients: int, alpha: float, rng: np.random.Generator) -> np.ndarray:
    """PFLlib's sizes (N,) as its recipe is told: draw for all, zero the full ones, renormalise, cut at cumulatives."""
    sizes = np.zeros(clients, np.int64)
    for count in counts:
        share = rng.dirichlet(np.full(clients, alpha)) * (sizes < sum(counts) / clients)
        cuts = (np.cumsum(share / share.sum()) * count).astype(int)[:-1]
        sizes += np.diff(cuts, prepend=0, append=count)
    return sizes


def test_dirichlet_pfllib_has_the_recipe_s_distribution() -> None:
    rows, labels = labelled(400, 8)
    counts = np.bincount(labels).tolist()
    rng = np.random.default_rng(0)
    told = np.sort([recipe(counts, 5, 0.5, rng) for _ in range(1000)], axis=1)
    made = np.sort([partition.dirichlet_pfllib(rows, labels, 5, 0.5, 0, s).sizes for s in range(1000)], axis=1)
    np.testing.assert_allclose(made.mean(axis=0), told.mean(axis=0), atol=4)
    np.testing.assert_allclose(made.std(axis=0), told.std(axis=0), rtol=0.15)
    enough = [partition.dirichlet_pfllib(rows, labels, 5, 0.5, 40, seed).sizes.min() for seed in range(20)]
    assert min(enough) >= 40 > made.min(), "drawn again until all have enough"


@given(classes=st.integers(1, 12), k=st.integers(1, 4), **SHAPES)
def test_shards_law(classes: int, k: int, total: int, clients: int, seed: int) -> None:
    rows, labels = labelled(total, classes)
    present = len(np.unique(labels))
    if clients * k < present:
        with pytest.raises(ValueError, match=f"classes_per_client={k} x clients={clients} = .* the number of classes"):
            partition.shards(rows, labels, clients, k, seed)
        return
    p = partition.shards(rows, labels, clients, k, seed)
    holds(p, rows, clients)
    assert (table(p, rows, labels) > 0).sum(axis=1).max() <= k


def test_shards_of_equal_classes_are_equal() -> None:
    """Where shards divide the classes, these are McMahan et al.'s: 2 of 20 equal shards for each of 10 clients."""
    rows, labels = labelled(1000, 10)
    p = partition.shards(rows, labels, 10, 2, 0)
    assert (p.sizes == 100).all()
    assert set(table(p, rows, labels).ravel().tolist()) <= {0, 50, 100}


# --- natural keys


@given(
    members=st.lists(st.sampled_from("abcdefg"), min_size=1, max_size=80),
    least=st.integers(0, 4),
    seed=st.integers(0, 9),
)
def test_natural_law(members: list[str], least: int, seed: int) -> None:
    rows, keys = np.arange(len(members)) * 2 + 1, np.array(members)
    groups = {name: set(rows[keys == name].tolist()) for name in "abcdefg"}
    enough = [name for name in "abcdefg" if len(groups[name]) >= max(least, 1)]
    with pytest.raises(ValueError, match=f"clients={len(enough) + 1} <= {len(enough)}, the values of the natural key"):
        partition.natural(rows, keys, len(enough) + 1, least, seed)
    for clients in range(1, len(enough) + 1):
        p = partition.natural(rows, keys, clients, least, seed)
        owned = [set(p.client(i).tolist()) for i in range(clients)]
        names = [next(n for n in enough if groups[n] & own) for own in owned]
        assert owned == [groups[n] for n in names], "all rows of one value, and no others"
        assert names == sorted(set(names)) and len(p.rows) == sum(map(len, owned))


def test_which_natural_clients_are_kept_is_drawn() -> None:
    keys = np.repeat(np.arange(30), 3)
    kept = [tuple(keys[partition.natural(np.arange(90), keys, 5, 1, seed).rows[::3]]) for seed in range(20)]
    assert len(set(kept)) > 15


# --- local test sets


@given(sizes=st.lists(st.integers(0, 40), min_size=1, max_size=12), share=st.floats(0.01, 0.99))
def test_local_split_law(sizes: list[int], share: float) -> None:
    whole = partition.iid(np.arange(sum(sizes)) * 3, 1, 0)._replace(offsets=np.cumsum([0, *sizes]))
    train, test = partition.split_local(whole, share)
    assert test is not None and train.clients == test.clients == whole.clients
    for i, n in enumerate(sizes):
        assert np.concatenate([train.client(i), test.client(i)]).tolist() == whole.client(i).tolist()
        held = test.sizes[i]
        assert held == (min(max(round(share * n), 1), n - 1) if n >= 2 else 0)
    for part in (train, test):
        assert part.rows.dtype == np.int32 and part.offsets.dtype == np.int64


def test_no_local_split() -> None:
    whole = partition.iid(np.arange(20), 4, 0)
    train, test = partition.split_local(whole, 0.0)
    assert train is whole and test is None


# --- all of them


def toy():
    plain = dataset(240)
    key = np.arange(len(plain.y)) % 7
    return plain._replace(natural={"client": key, "domain": key % 2})


def test_every_partition_through_the_config() -> None:
    """A seed is a partition, another seed another one; rows of a client are in random order."""
    for law in PARTITIONS:
        config = Config(partition=law, clients=6, clients_per_round=2, min_size=2, alpha=3.0, seed=3)
        first, again = (partition.make(config, toy()) for _ in range(2))
        assert np.array_equal(first.rows, again.rows) and np.array_equal(first.offsets, again.offsets), law
        assert first.clients == 6 and first.sizes.min() >= 2 and set(first.rows) <= set(toy().train), law
        other = partition.make(config.replace(seed=4), toy())
        assert not np.array_equal(first.rows, other.rows), law
        ordered = [np.all(np.diff(first.client(i)) > 0) for i in range(6) if first.sizes[i] > 4]
        assert not any(ordered), f"{law}: a client's rows are sorted"


@pytest.mark.parametrize("law", PARTITIONS)
def test_too_few_examples_are_refused_before_training(law) -> None:
    with pytest.raises(ValueError, match=r"(clients|min_size)=\d+ .*lower"):
        partition.make(Config(partition=law, clients=100, min_size=5), toy())


def test_the_impossible_is_refused_by_name() -> None:
    rows, labels = labelled(100, 2)
    with pytest.raises(ValueError, match=r"alpha=0.001 to give each of clients=20 min_size=5 .* client \d+ with 0\)"):
        partition.dirichlet_pfllib(rows, labels, 20, 1e-3, 5, 0)
    with pytest.raises(ValueError, match="alpha=1e-300 within floating point"):
        partition.dirichlet_balanced(rows, labels, 20, 1e-300, 0)
    with pytest.raises(
        ValueError, match=r"partition='natural' .* natural key `client`, which toy has not; .*client_column"
    ):
        partition.make(Config(partition="natural"), dataset(200))
    with pytest.raises(
        ValueError, match=r"min_size=9 <= 8, the examples of client 0 of partition=iid .*; lower min_size"
    ):
        partition.make(Config(partition="iid", clients=12, min_size=9), dataset(100))


@pytest.mark.parametrize("law", ["dirichlet_balanced", "dirichlet_pfllib", "shards", "quantity", "domain"])
def test_more_clients_than_examples_leave_some_empty(law) -> None:
    p = partition.make(Config(partition=law, clients=400, min_size=0), toy())
    assert p.clients == 400 and p.sizes.sum() == 240 and (p.sizes == 0).sum() >= 160


def test_golden_values() -> None:
    """What these laws gave when they were written: a change here changes everybody's runs."""
    rows, labels = labelled(12, 3)
    made = {
        "dirichlet_balanced": partition.dirichlet_balanced(rows, labels, 4, 0.5, 0),
        "dirichlet_pfllib": partition.dirichlet_pfllib(rows, labels, 4, 0.5, 2, 0),
        "shards": partition.shards(rows, labels, 4, 2, 0),
        "lognormal": partition.quantity(rows, 4, "lognormal(sigma=1.0)", 1, 0),
        "power": partition.quantity(rows, 4, "power(exponent=1.5)", 1, 0),
        "natural": partition.natural(rows, np.array(list("abcdefabcaba")), 3, 2, 0),
    }
    found = {name: [p.client(i).tolist() for i in range(p.clients)] for name, p in made.items()}
    assert found == GOLDEN


GOLDEN = {
    "dirichlet_balanced": [[13, 10, 16], [25, 28, 40], [19, 22, 7], [34, 31, 37]],
    "dirichlet_pfllib": [[40, 31, 37, 22], [7, 10], [34, 25], [19, 16, 13, 28]],
    "shards": [[19, 7, 10], [34, 40, 16], [22, 28, 25], [37, 31, 13]],
    "lognormal": [[31, 10, 22, 28, 7], [34], [13], [40, 16, 37, 19, 25]],
    "power": [[10, 22, 13], [34], [16], [28, 37, 19, 40, 7, 31, 25]],
    "natural": [[25, 7, 34, 40], [37, 10, 28], [31, 13]],
}
