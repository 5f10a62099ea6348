"""Partitions by their laws, and their golden values."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedsim.config import Config
from fedsim.data import partition
from fedsim.data.dataset import Dataset
from fedsim.data.partition import Partition


def labelled(total: int, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows that are not 0..n-1, sorted by class as the files of many sets are."""
    rows = np.arange(total, dtype=np.int64) * 3 + 7
    return rows, np.sort(np.arange(total) % classes).astype(np.int32)


def holds(p: Partition, rows: np.ndarray, clients: int) -> None:
    """What is true of every partition."""
    assert p.rows.dtype == np.int32 and p.offsets.dtype == np.int64
    assert np.array_equal(np.sort(p.rows), rows), "every row exactly once"
    assert len(p.offsets) == clients + 1 and p.offsets[0] == 0 and p.offsets[-1] == len(rows)
    assert p.clients == clients and p.sizes.min() >= 0
    assert np.array_equal(np.concatenate([p.client(i) for i in range(clients)]), p.rows)


def shares(p: Partition, labels_of: dict[int, int], classes: int) -> np.ndarray:
    """Share of each class at each client, (clients, classes)."""
    table = np.array(
        [np.bincount([labels_of[r] for r in p.client(i).tolist()], minlength=classes) for i in range(p.clients)]
    )
    return table / np.maximum(table.sum(axis=1, keepdims=True), 1)


@given(total=st.integers(0, 300), clients=st.integers(1, 400), seed=st.integers(0, 9))
def test_iid_law(total: int, clients: int, seed: int) -> None:
    rows, _ = labelled(total, 3)
    p = partition.iid(rows, clients, seed)
    holds(p, rows, clients)
    assert p.sizes.max() - p.sizes.min() <= 1


@given(
    total=st.integers(1, 300),
    clients=st.integers(1, 60),
    classes=st.integers(1, 12),
    alpha=st.sampled_from([1e-3, 0.05, 0.3, 1.0, 50.0, 1e9]),
    fill=st.floats(0, 1),
    seed=st.integers(0, 9),
)
def test_dirichlet_law(total: int, clients: int, classes: int, alpha: float, fill: float, seed: int) -> None:
    rows, labels = labelled(total, classes)
    min_size = int(fill * (total // clients))  # up to the largest possible one
    p = partition.dirichlet(rows, labels, clients, alpha, min_size, seed)
    holds(p, rows, clients)
    assert p.sizes.min() >= min_size


@given(sizes=st.lists(st.integers(1, 60), min_size=1, max_size=6), more=st.integers(0, 80), seed=st.integers(0, 9))
def test_domain_law(sizes: list[int], more: int, seed: int) -> None:
    total, clients = sum(sizes), len(sizes) + more
    rows, _ = labelled(total, 3)
    domains = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(sizes)), sizes))
    p = partition.domain(rows, domains, clients, seed)
    holds(p, rows, clients)
    of = dict(zip(rows.tolist(), domains.tolist(), strict=True))
    # A client without examples is of the domain of its neighbour before it: a domain's first client has some.
    homes = [{of[row] for row in p.client(i).tolist()} for i in range(clients)]
    assert all(len(home) <= 1 for home in homes), "one domain a client"
    if clients <= total:
        assert p.sizes.min() >= 1
        owned = np.bincount([home.pop() for home in homes], minlength=len(sizes))
        assert owned.min() >= 1
        for i, size in enumerate(sizes):
            own = p.sizes[[j for j in range(clients) if of[int(p.client(j)[0])] == i]]
            assert np.ptp(own) <= 1, "iid within"
            # In proportion: taking a client from any domain would leave it clients larger than all there are.
            assert owned[i] == 1 or size / (owned[i] - 1) >= max(s / o for s, o in zip(sizes, owned, strict=True))


def test_golden_values() -> None:
    rows, labels = labelled(12, 3)
    assert partition.iid(rows, 3, 0).rows.tolist() == GOLDEN["iid"]
    of_domain = partition.domain(rows, np.array(["b", "a", "b"] * 4), 4, 0)
    assert of_domain.rows.tolist() == GOLDEN["domain"] and of_domain.offsets.tolist() == GOLDEN["domain offsets"]
    p = partition.dirichlet(rows, labels, 4, 0.5, 2, 0)
    assert p.rows.tolist() == GOLDEN["rows"]
    assert p.offsets.tolist() == GOLDEN["offsets"]


GOLDEN: dict[str, list[int]] = {
    "iid": [31, 7, 13, 19, 28, 37, 16, 40, 34, 22, 25, 10],
    "domain": [37, 28, 10, 19, 25, 31, 40, 22, 34, 13, 16, 7],
    "domain offsets": [0, 2, 4, 8, 12],
    "rows": [22, 40, 37, 16, 31, 13, 28, 34, 25, 7, 10, 19],
    "offsets": [0, 2, 4, 7, 12],
}


def test_a_seed_is_a_partition() -> None:
    rows, labels = labelled(500, 5)
    first, again, other = (partition.dirichlet(rows, labels, 20, 0.3, 4, seed) for seed in (1, 1, 2))
    assert np.array_equal(first.rows, again.rows) and np.array_equal(first.offsets, again.offsets)
    assert not np.array_equal(first.rows, other.rows)


def test_large_alpha_is_like_iid_and_small_alpha_is_skewed() -> None:
    rows, labels = labelled(4000, 4)
    of = dict(zip(rows.tolist(), labels.tolist(), strict=True))
    even = partition.dirichlet(rows, labels, 20, 1e6, 0, 0)
    assert np.ptp(even.sizes) <= 10, "200 each, but for rounding"
    assert np.abs(shares(even, of, 4) - 0.25).max() < 0.02
    skewed = partition.dirichlet(rows, labels, 20, 0.05, 0, 0)
    assert np.ptp(skewed.sizes) > 200
    largest = shares(skewed, of, 4)[skewed.sizes >= 20].max(axis=1)
    assert largest.mean() > 0.8, "most clients have one class"


def test_mean_share_follows_the_dirichlet_law() -> None:
    """Over many seeds, the variance of a client's share of a class is (1/N)(1 - 1/N) / (N alpha + 1)."""
    clients, alpha, rows, labels = 5, 0.4, np.arange(2000), np.zeros(2000, np.int32)
    found = np.array([partition.dirichlet(rows, labels, clients, alpha, 0, seed).sizes / 2000 for seed in range(800)])
    variance = (1 / clients) * (1 - 1 / clients) / (clients * alpha + 1)
    np.testing.assert_allclose(found.mean(axis=0), 1 / clients, atol=0.03)
    np.testing.assert_allclose(found.var(axis=0), variance, rtol=0.2)


def test_more_clients_than_rows_of_a_class_favours_nobody() -> None:
    """With fewer rows of a class than clients, rounding decides: it must not be the same clients for every class."""
    rows, labels = labelled(2000, 40)  # 50 rows a class
    sizes = partition.dirichlet(rows, labels, 100, 1e9, 0, 0).sizes
    assert sizes.mean() == 20 and 1.5 < sizes.std() < 5, "40 draws of one half: a deviation of 3.2"


def test_repair_takes_from_the_largest_only() -> None:
    rows, labels = labelled(600, 3)
    before = partition.dirichlet(rows, labels, 20, 0.1, 0, 0)
    after = partition.dirichlet(rows, labels, 20, 0.1, 15, 0)
    small, kept = before.sizes < 15, before.sizes.copy()
    assert small.sum() >= 3, "the repair has work to do"
    assert (after.sizes[small] == 15).all(), "filled up, not beyond"
    lowered = np.flatnonzero(after.sizes < kept)
    assert np.ptp(after.sizes[lowered]) <= 1, "lowered to one level"
    assert kept[~small & (after.sizes == kept)].max() <= after.sizes[lowered].max(), "no larger one was spared"
    for i in np.flatnonzero(~small):
        assert set(after.client(i)) <= set(before.client(i)), "who gives does not receive"


def test_repair_moves_rows_of_every_class() -> None:
    rows, labels = labelled(4000, 4)
    of = dict(zip(rows.tolist(), labels.tolist(), strict=True))
    drawn = ((seed, partition.dirichlet(rows, labels, 2, 1e-3, 0, seed).sizes) for seed in range(100))
    seed, receiver = next((seed, int(sizes.argmin())) for seed, sizes in drawn if sizes.min() == 0)
    after = partition.dirichlet(rows, labels, 2, 1e-3, 1500, seed)
    assert after.sizes[receiver] == 1500
    assert np.abs(shares(after, of, 4)[receiver] - 0.25).max() < 0.05, "a fair draw from the one who had all"


def test_rows_of_a_client_are_in_random_order() -> None:
    rows, labels = labelled(1000, 5)
    for p in (partition.dirichlet(rows, labels, 2, 100.0, 0, 0), partition.iid(rows, 2, 0)):
        assert np.abs(np.corrcoef(p.client(0), np.arange(p.sizes[0]))[0, 1]) < 0.2


def test_the_impossible_is_refused() -> None:
    rows, labels = labelled(100, 2)
    with pytest.raises(ValueError, match=r"min_size=11 x clients=10 = 110 <= 100 training examples; lower one"):
        partition.dirichlet(rows, labels, 10, 0.3, 11, 0)
    with pytest.raises(ValueError, match=r"clients=1 >= 2, the number of domains \(0, 1\); add clients"):
        partition.domain(rows, labels, 1, 0)
    with pytest.raises(ValueError, match="partition='domain' on a data set with the natural key `domain`, which toy"):
        partition.make(Config(partition="domain"), dataset(200))
    with pytest.raises(ValueError, match="alpha="):
        partition.dirichlet(rows, labels, 10, 1e308, 0, 0)


def dataset(total: int) -> Dataset:
    rows, labels = labelled(total, 2)
    y = np.zeros(rows.max() + 1, np.int32)
    y[rows] = labels
    empty = np.arange(0)
    return Dataset("toy", None, y, rows, empty, empty, ("a", "b"), "array", "none", {})


def test_make_reads_the_config() -> None:
    toy = dataset(200)
    iid = partition.make(Config(partition="iid", clients=20, seed=5), toy)
    assert np.array_equal(iid.rows, partition.iid(toy.train, 20, 5).rows)
    domains = np.array(["x", "y"])[np.arange(len(toy.y)) % 2]
    made = partition.make(Config(partition="domain", clients=20, seed=5), toy._replace(natural={"domain": domains}))
    assert np.array_equal(made.rows, partition.domain(toy.train, domains[toy.train], 20, 5).rows)
    config = Config(clients=20, alpha=0.2, min_size=3, seed=5)
    expected = partition.dirichlet(toy.train, toy.y[toy.train], 20, 0.2, 3, 5)
    assert np.array_equal(partition.make(config, toy).rows, expected.rows)


@pytest.mark.parametrize("law", ["iid", "dirichlet"])
def test_more_clients_than_examples_only_if_they_may_be_empty(law) -> None:
    config = Config(partition=law, clients=40, min_size=0)
    p = partition.make(config, dataset(20))
    assert p.sizes.sum() == 20 and (p.sizes == 0).sum() >= 20
    with pytest.raises(ValueError, match="clients=40"):
        partition.make(config.replace(min_size=1), dataset(20))


SHARES = st.sampled_from([0.0, 0.001, 0.1, 0.25, 0.49])


@given(total=st.integers(1, 300), public=SHARES, shard=SHARES, seed=st.integers(0, 9))
def test_what_the_server_holds_belongs_to_nobody_else(total: int, public: float, shard: float, seed: int) -> None:
    rows, _ = labelled(total, 3)
    config = Config(public_share=public, server_share=shard, seed=seed)
    counts = [max(1, round(share * total)) if share else 0 for share in (public, shard)]
    if sum(counts) and sum(counts) >= total:
        with pytest.raises(ValueError, match=r"to leave at least one of \d+ training examples to the clients"):
            partition.holders(config, rows)
        return
    found = partition.holders(config, rows)
    assert np.array_equal(np.sort(np.concatenate(found)), rows) and all((np.diff(part) > 0).all() for part in found)
    assert [len(found.public), len(found.shard)] == counts
    assert np.array_equal(found.public, partition.holders(config.replace(server_share=0.0), rows).public)
    assert np.array_equal(found.shard, partition.holders(config.replace(public_share=0.0), rows).shard)
    assert not (public or shard) or sum(counts) < 9 or not np.array_equal(found.clients, rows[: len(found.clients)])


def test_shares_of_the_server_that_leave_too_little_are_named() -> None:
    """Where the law would do without them, and only there."""
    config = Config(clients=5, clients_per_round=5, min_size=8, partition="iid", server_share=0.5)
    toy = dataset(100)
    assert np.array_equal(np.sort(partition.make(config, toy).rows), partition.holders(config, toy.train).clients)
    said = r"min_size=8 <= .* The server holds 30 of 60 .*lower public_share=0\.0 or server_share=0\.5"
    with pytest.raises(ValueError, match=said):
        partition.make(config, dataset(60))
    with pytest.raises(ValueError, match="min_size=8 <=") as caught:
        partition.make(config, dataset(30))
    assert "server" not in str(caught.value)


@pytest.mark.slow
def test_a_million_clients_cost_seconds_and_memory_by_examples() -> None:
    rows, labels = labelled(2_000_000, 10)
    start = time.perf_counter()
    p = partition.dirichlet(rows, labels, 1_000_000, 0.3, 1, 0)
    assert time.perf_counter() - start < 60
    assert p.rows.nbytes + p.offsets.nbytes == 4 * 2_000_000 + 8 * 1_000_001
    assert p.sizes.min() == 1 and p.sizes.sum() == 2_000_000
