"""Laws of the packing: widths hold every batch, the packing taken costs no more than any other, widths are worth it."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsim.core import Passes
from fedsim.engine import packing, plan
from fedsim.engine.lane_count import choose_lanes

SIZES = st.lists(st.integers(0, 40), min_size=1, max_size=25)
PASSES = st.builds(
    Passes,
    epochs=st.integers(1, 3),
    steps=st.one_of(st.none(), st.integers(1, 6)),
    batch_size=st.integers(1, 9),
    rows=st.none(),
)
LAW = settings(max_examples=60)


def work(sizes: np.ndarray, passes: Passes) -> packing.Work:
    return packing.work_of(sizes, packing.steps_of(sizes, passes), passes)


@pytest.mark.slow
@given(SIZES, PASSES, st.integers(0, 4))
@LAW
def test_work_counts_what_batches_visit(sizes: list[int], passes: Passes, limit: int) -> None:
    """The counts, worked out by themselves, are those of the rows that `plan.batches` lists."""
    n = np.array(sizes)
    steps = np.minimum(packing.steps_of(n, passes), limit)
    made = packing.work_of(n, steps, passes)
    member, step, _, _ = plan.batches(np.arange(len(n)), n, passes, 0, 1)
    visited = np.zeros((len(n), 200), int)
    np.add.at(visited, (member, step), step < steps[member])
    np.testing.assert_array_equal(made.count, visited[made.who, made.step])
    assert made.count.sum() == visited.sum()
    np.testing.assert_array_equal(np.bincount(made.who, minlength=len(n)), made.spans)


@pytest.mark.slow
@given(SIZES, PASSES, st.integers(1, 4), st.integers(1, 9), st.sets(st.integers(0, 8)))
@LAW
def test_the_width_is_the_narrowest_that_holds_every_lane(
    sizes: list[int], passes: Passes, devices: int, lanes: int, some: set[int]
) -> None:
    widths = (*sorted(w for w in some if w < passes.batch_size), passes.batch_size)
    rows, offsets = np.arange(sum(sizes), dtype=np.int32), np.concatenate([[0], np.cumsum(sizes)])
    made = plan.make(np.arange(len(sizes)), rows, offsets, passes, 0, 1, devices, lanes, widths=widths)
    real = made.count.max(axis=2)
    for d, length in enumerate(made.length):
        for t, width in enumerate(made.width[d].tolist()):
            if t >= length:
                assert width == 0, "what does not run computes nothing"
            else:
                assert width == next(w for w in widths if w >= real[d, t])
    assert made.occupancy[1] == pytest.approx(made.count.sum() / max(lanes * made.width.sum(), 1))


@given(SIZES, PASSES, st.integers(1, 3), st.integers(1, 9))
@LAW
def test_the_packing_costs_no_more_than_either(sizes: list[int], passes: Passes, devices: int, lanes: int) -> None:
    made, widths = work(np.array(sizes), passes), tuple(range(passes.batch_size + 1))
    order = np.lexsort((-np.bincount(made.who, made.count), -made.spans))
    slots = -(-len(sizes) // devices)
    ends = made.count[np.cumsum(made.spans) - 1]
    lpt = packing.longest_first(made.spans, order, devices, lanes, slots)
    waves = packing.waves(made.spans, ends, order, devices, lanes)
    costs = [packing.cost(packing.width_of(places, made, devices, widths), lanes) for places in (lpt, waves)]
    assert packing.cost(packing.pack(made, devices, lanes, widths)[1], lanes) == min(costs)
    assert np.bincount(waves.device, minlength=devices).max() <= slots
    again = packing.pack(made, devices, lanes, widths)
    for one, other in zip(packing.pack(made, devices, lanes, widths)[0], again[0], strict=True):
        np.testing.assert_array_equal(one, other)


def rows_computed(sizes: np.ndarray, passes: Passes, widths: tuple[int, ...]) -> int:
    """Each client by itself, in one lane."""
    return int(packing.pack(work(sizes, passes), 1, 1, widths)[1].sum())


@given(SIZES.filter(any), st.integers(1, 9))
@LAW
def test_no_other_widths_of_that_number_compute_fewer_rows(sizes: list[int], batch: int) -> None:
    n, passes = np.array([s for s in sizes if s]), Passes(batch_size=batch)
    found = packing.choose_widths(n, passes)
    top = min(batch, int(n.max()))
    assert found == (batch,) or (found[0] == 0 and found[-1] == top)
    if found == (batch,):
        return
    best = [
        min(rows_computed(n, passes, (0, *some, top)) for some in itertools.combinations(range(1, top), k))
        for k in range(min(packing.MOST_WIDTHS, top))
    ]
    k = len(found) - 2
    assert rows_computed(n, passes, found) == best[k]
    for narrower, wider in itertools.pairwise(best[: k + 1]):
        assert narrower - wider >= packing.WORTH * narrower, "a width that is not worth its compilation"
    if k + 1 < len(best):
        assert best[k] - best[k + 1] < packing.WORTH * best[k], "a further one would have been worth it"


@given(SIZES.filter(any), st.integers(1, 12), st.sampled_from([2, 4, 8]))
@LAW
def test_widths_that_are_multiples_compute_the_fewest_rows_of_their_kind(
    sizes: list[int], batch: int, multiple: int
) -> None:
    """Every width but the whole batch is a multiple; no others of that kind and number compute fewer rows."""
    n, passes = np.array([s for s in sizes if s]), Passes(batch_size=batch)
    found = packing.choose_widths(n, passes, multiple)
    assert all(width % multiple == 0 or width == batch for width in found)
    assert found[-1] >= min(batch, int(n.max()))
    narrow = range(multiple, found[-1], multiple)
    others = itertools.combinations(narrow, max(len(found) - 2, 0))
    assert rows_computed(n, passes, found) == min(rows_computed(n, passes, (0, *some, found[-1])) for some in others)


@pytest.mark.parametrize(
    ("clients", "devices", "multiple"),
    [(100, 1, 1), (100, 8, 1), (8, 1, 1), (7, 1, 2), (4, 1, 2), (3, 1, 4), (1, 1, 8), (0, 1, 8), (20, 8, 4)],
)
def test_few_clients_of_an_accelerator_have_widths_that_fill_tiles(clients: int, devices: int, multiple: int) -> None:
    for platform in ("tpu", "gpu"):
        assert packing.width_multiple(clients, devices, platform) == multiple
    assert packing.width_multiple(clients, devices, "cpu") == 1


def test_rows_that_are_padded_cost_what_is_computed() -> None:
    width = np.array([[3, 8, 0], [5, 5, 5]])  # two devices, three steps
    assert packing.cost(width, 3) == 45 + 3 * packing.STEP_ROWS
    assert packing.cost(width, 3, tile=8) == 48 + 3 * packing.STEP_ROWS
    assert packing.cost(width, 8, tile=8) == packing.cost(width, 8)


@pytest.mark.parametrize(
    ("sizes", "passes", "widths"),
    [
        ([32] * 100, Passes(batch_size=16), (16,)),  # nothing is short
        ([0, 16, 32, 64], Passes(batch_size=16), (16,)),
        ([5, 9, 30], Passes(steps=3, batch_size=8), (8,)),  # steps are always full
        ([5] * 10, Passes(batch_size=8), (0, 5)),  # no batch is ever full
        ([], Passes(batch_size=8), (8,)),
        ([0, 0], Passes(batch_size=8), (8,)),
        ([9] * 10, Passes(batch_size=8), (0, 1, 8)),
    ],
)
def test_widths(sizes: list[int], passes: Passes, widths: tuple[int, ...]) -> None:
    assert packing.choose_widths(np.array(sizes, int), passes) == widths


@pytest.mark.parametrize(("batch", "lanes", "least"), [(4, 4, 0.92), (8, 4, 0.88), (8, 8, 0.86), (16, 8, 0.82)])
def test_rows_of_many_small_clients_are_real(batch: int, lanes: int, least: float) -> None:
    """Log-normal sizes as of phones: most clients have little more than a batch, and a short last one."""
    rng = np.random.default_rng(0)
    sizes = np.clip(np.round(9 * np.exp(0.9 * rng.normal(size=2000))), 2, 60).astype(int)
    passes = Passes(batch_size=batch)
    cohort = sizes[:192]
    _, width = packing.pack(work(cohort, passes), 1, lanes, packing.choose_widths(sizes, passes))
    _, whole = packing.pack(work(cohort, passes), 1, lanes, (batch,))
    occupancy = cohort.sum() / (lanes * width.sum())
    assert occupancy > least
    assert cohort.sum() / (lanes * whole.sum()) < occupancy - 0.03


def test_devices_get_the_larger_client_in_turn() -> None:
    """Dealt there and back: with sizes that fall steadily all devices have the same rows."""
    rows = np.arange(12, 0, -1)
    places = packing.waves(np.ones(12, np.int64), rows, np.arange(12), 3, 2)
    assert places.device.tolist() == [0, 1, 2, 2, 1, 0] * 2
    assert np.bincount(places.device, rows).tolist() == [26, 26, 26]


def test_own_rows_fill_whole_batches_and_lanes() -> None:
    """Every step of theirs counts as a full batch, and lanes are chosen by the steps that the labels ask for."""
    sizes = np.array([0, 3, 9, 30])
    passes = Passes(steps=lambda labels: 2 + len(labels) // 10, batch_size=8, rows=lambda labels, rng: iter(()))
    steps = packing.steps_of(sizes, passes, lambda place: np.zeros(sizes[place], np.int32))
    made = packing.work_of(sizes, steps, passes)
    assert steps.tolist() == made.spans.tolist() == [2, 2, 2, 5] and (made.count == 8).all()
    assert packing.choose_widths(sizes, passes) == (8,)
    for platform in ("cpu", "tpu"):  # four clients of three full steps keep as many lanes busy, whoever says it
        ordinary = choose_lanes(np.full(4, 5), Passes(steps=3), 1, platform)
        own = Passes(steps=lambda labels: 3, rows=passes.rows)
        assert choose_lanes(sizes, own, 1, platform, labels=lambda place: np.zeros(sizes[place])) == ordinary == 4
        assert choose_lanes(sizes[:0], own, 2, platform) == 1, "nobody is there"
