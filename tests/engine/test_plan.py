"""The plan's laws: every row as often as it should be, no lane twice at once, never longer than LPT promises."""

from __future__ import annotations

import collections
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsim import randomness
from fedsim.core import Algorithm, Passes, Population
from fedsim.engine import plan
from fedsim.randomness import stream

SIZES = st.lists(st.integers(0, 40), min_size=1, max_size=25)
LANES = st.integers(1, 9)
DEVICES = st.integers(1, 5)
PASSES = st.builds(
    Passes,
    epochs=st.integers(1, 3),
    steps=st.one_of(st.none(), st.integers(1, 6)),
    batch_size=st.integers(1, 9),
    shuffle=st.booleans(),
)
LAW = settings(max_examples=60)


def population(sizes: list[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """ids in a scrambled order, and a partition in which client i owns rows 1000 i, 1000 i + 1, ..."""
    rng = np.random.default_rng(len(sizes))
    rows = np.concatenate([1000 * i + np.arange(n) for i, n in enumerate(sizes)]).astype(np.int32)
    offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    return rng.permutation(len(sizes)), rows, offsets


def make(
    sizes: list[int],
    passes: Passes,
    devices: int = 1,
    lanes: int = 3,
    seed: int = 0,
    round: int = 16,
    widths: tuple[int, ...] | None = None,
) -> plan.Plan:
    ids, rows, offsets = population(sizes)
    return plan.make(ids, rows, offsets, passes, seed, round, devices, lanes, widths=widths)


def all_widths(passes: Passes) -> tuple[int, ...]:
    return tuple(range(passes.batch_size + 1))


def by_member(made: plan.Plan) -> dict[int, list[list[int]]]:
    """member -> its batches, in the order of its own steps; an empty list for an empty step."""
    found: dict[int, dict[int, list[int]]] = collections.defaultdict(dict)
    devices, length, lanes = made.slot.shape
    for d in range(devices):
        for t in range(length):
            for lane in range(lanes):
                slot = made.slot[d, t, lane]
                if slot == made.member.shape[1]:
                    assert made.count[d, t, lane] == 0 and not made.first[d, t, lane] and not made.last[d, t, lane]
                    continue
                assert t < made.length[d], "nothing lies beyond what the device runs"
                member, step = int(made.member[d, slot]), int(made.step[d, t, lane])
                assert step not in found[member], "a step of a client stands in one place only"
                found[member][step] = made.rows[d, t, lane, : made.count[d, t, lane]].tolist()
    return {member: [steps[k] for k in range(len(steps))] for member, steps in found.items()}


@given(SIZES, PASSES, DEVICES, LANES, st.booleans())
@LAW
def test_every_row_is_visited_exactly_as_often_as_asked(
    sizes: list[int], passes: Passes, devices: int, lanes: int, narrow: bool
) -> None:
    ids, _, _ = population(sizes)
    batches = by_member(make(sizes, passes, devices, lanes, widths=all_widths(passes) if narrow else None))
    assert set(batches) == set(range(len(ids))), "every member is there, with or without examples"
    for member, client in enumerate(ids):
        n, own = sizes[client], batches[member]
        visits = collections.Counter(row for batch in own for row in batch)
        assert set(visits) <= set(range(1000 * client, 1000 * client + n)), "only rows of its own"
        if n == 0:
            assert own == [[]], "one empty place, to start and finish in"
        elif passes.steps is None:
            assert len(own) == -(-n // passes.batch_size) * passes.epochs
            assert set(visits.values()) == {passes.epochs} and len(visits) == n
            per_epoch = len(own) // passes.epochs
            for e in range(passes.epochs):
                epoch = [row for batch in own[e * per_epoch : (e + 1) * per_epoch] for row in batch]
                assert len(epoch) == len(set(epoch)) == n, "an epoch holds each row once"
        else:
            assert [len(batch) for batch in own] == [passes.batch_size] * passes.steps
            flat = [row for batch in own for row in batch]
            for start in range(0, len(flat) - n + 1, n):
                assert len(set(flat[start : start + n])) == n, "epochs follow one another without a seam"
            assert max(visits.values()) - min(visits[1000 * client + k] for k in range(n)) <= 1


@given(SIZES, PASSES, DEVICES, LANES, st.booleans())
@LAW
def test_each_member_starts_once_ends_once_and_owns_a_slot(
    sizes: list[int], passes: Passes, devices: int, lanes: int, narrow: bool
) -> None:
    made = make(sizes, passes, devices, lanes, widths=all_widths(passes) if narrow else None)
    slots = -(-len(sizes) // devices)
    assert made.member.shape == (devices, slots)
    used = made.member[made.member < len(sizes)]
    assert sorted(used.tolist()) == list(range(len(sizes))), "slots are unique"
    assert int(made.first.sum()) == int(made.last.sum()) == len(sizes)
    for d in range(devices):
        for lane in range(lanes):
            running = None
            for t in range(made.slot.shape[1]):
                slot = int(made.slot[d, t, lane])
                if made.first[d, t, lane]:
                    assert running is None and made.step[d, t, lane] == 0
                    running = slot
                if slot < slots:
                    assert running == slot, "a client keeps its lane, without a gap, from its first step to its last"
                else:
                    assert running is None
                if made.last[d, t, lane]:
                    running = None
            assert running is None


@given(SIZES, PASSES, LANES)
@LAW
def test_longest_first_is_never_longer_than_mean_plus_longest(sizes: list[int], passes: Passes, lanes: int) -> None:
    steps = np.maximum(plan.steps_of(np.array(sizes), passes), 1)
    made = make(sizes, passes, 1, lanes)
    assert made.length[0] <= -(-int(steps.sum()) // lanes) + int(steps.max())
    assert made.length[0] >= max(int(steps.max()), -(-int(steps.sum()) // lanes))


@given(SIZES, PASSES, st.integers(0, 5), st.integers(1, 400))
@LAW
def test_the_order_does_not_depend_on_lanes_or_devices(sizes: list[int], passes: Passes, seed: int, round: int) -> None:
    one = by_member(make(sizes, passes, 1, 1, seed, round))
    assert by_member(make(sizes, passes, 1, 7, seed, round)) == one
    assert by_member(make(sizes, passes, 4, 2, seed, round)) == one
    assert by_member(make(sizes, passes, 2, 3, seed, round, all_widths(passes))) == one


def test_the_order_does_not_depend_on_the_rest_of_the_cohort() -> None:
    passes = Passes(epochs=2, batch_size=4)
    _, rows, offsets = population([7, 12, 30, 5])
    alone = by_member(plan.make(np.array([2]), rows, offsets, passes, 3, 16, 1, 2))[0]
    among = by_member(plan.make(np.array([3, 2, 0]), rows, offsets, passes, 3, 16, 1, 2))[1]
    assert alone == among


def test_seed_round_client_and_epoch_give_other_orders() -> None:
    sizes, passes = [30, 30], Passes(epochs=2, batch_size=30)
    ids, rows, offsets = np.arange(2), *population(sizes)[1:]

    def orders(seed: int, round: int) -> list[tuple[int, ...]]:
        batches = by_member(plan.make(ids, rows, offsets, passes, seed, round, 1, 1))
        return [tuple(r % 1000 for r in batch) for m in range(2) for batch in batches[m]]

    seen = orders(0, 16) + orders(1, 16) + orders(0, 32)
    assert len(set(seen)) == len(seen) == 12


@LAW
@given(SIZES, st.integers(1, 3), st.integers(0, 9))
def test_an_epoch_is_ordered_by_the_hash(sizes: list[int], epochs: int, round: int) -> None:
    ids, counts = population(sizes)[0], np.array(sizes)
    member, _, _, example = plan.batches(ids, counts[ids], Passes(epochs, batch_size=7), 5, round, exchange=2)
    found = iter(zip(member.tolist(), example.tolist(), strict=True))
    for place, client in enumerate(ids.tolist()):
        for epoch in range(epochs):
            chance = [int(randomness.mix(5, round, 2, client, epoch, i)) for i in range(sizes[client])]
            for i in np.argsort(np.array(chance, np.uint64)).tolist():
                assert next(found) == (place, i)
    assert next(found, None) is None


def test_without_shuffling_rows_come_in_their_order() -> None:
    made = make([5], Passes(epochs=2, batch_size=2, shuffle=False), lanes=1)
    assert by_member(made)[0] == [[0, 1], [2, 3], [4], [0, 1], [2, 3], [4]]
    made = make([3], Passes(steps=4, batch_size=2, shuffle=False), lanes=1)
    assert by_member(made)[0] == [[0, 1], [2, 0], [1, 2], [0, 1]]


def test_mix_is_splitmix64() -> None:
    """Word 0 alone is splitmix64's first output from seed 0 (its public test vector); the rest pins our chaining."""
    assert int(randomness.mix(0)) == 0xE220A8397B1DCDAF
    assert [int(randomness.mix(*w)) for w in ((1,), (0, 0), (1, 2), (2, 1), (1, 2, 3, 4, 5))] == [
        0x910A2DEC89025CC1,
        0xA706DD2F4D197E6F,
        0xBCD9DBB49673066B,
        0xE06DD043328BD285,
        0x90BB69B7166551DE,
    ]


def test_mix_equals_plain_integers() -> None:
    """The same arithmetic in Python's integers, by Steele, Lea, Flood: Fast splittable pseudorandom number generators."""

    def plain(*words: int) -> int:
        state, whole = 0, 2**64 - 1
        for word in words:
            state = ((state ^ (word & whole)) + 0x9E3779B97F4A7C15) & whole
            state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & whole
            state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & whole
            state ^= state >> 31
        return state

    words = np.random.default_rng(0).integers(-(2**62), 2**62, (50, 3))
    assert [int(v) for v in randomness.mix(*words.T)] == [plain(*map(int, w)) for w in words]
    assert randomness.mix(np.arange(6).reshape(2, 3), 4).shape == (2, 3)


def test_orders_are_fair() -> None:
    """Over many clients every place of an epoch holds every example equally often (chi-squared, 99.99 % bound)."""
    n, clients = 5, 4000
    _, _, _, example = plan.batches(np.arange(clients), np.full(clients, n), Passes(batch_size=n), 0, 1)
    table = np.stack([np.bincount(example.reshape(clients, n)[:, k], minlength=n) for k in range(n)])
    chi = ((table - clients / n) ** 2 / (clients / n)).sum()
    assert chi < 45, "16 degrees of freedom"


def test_the_cost_is_in_the_cohort_not_in_the_population() -> None:
    """1,000 of a million clients: only their entries of `offsets` and `rows` are read, whatever the rest holds."""
    clients, cohort = 1_000_000, 1_000
    ids = np.random.default_rng(0).choice(clients, cohort, replace=False)

    class Watched:
        """An array that counts the entries that are read of it, and can only be indexed."""

        def __init__(self, values: np.ndarray) -> None:
            self.values, self.read = values, 0

        def __getitem__(self, index: np.ndarray) -> np.ndarray:
            found = self.values[index]
            self.read += found.size
            return found

    size = 6
    offsets = Watched(np.arange(clients + 1, dtype=np.int64) * size)
    rows = Watched(np.arange(clients * size, dtype=np.int32))
    made = plan.make(ids, rows, offsets, Passes(batch_size=4), 0, 16, 1, 16)
    assert offsets.read == 2 * cohort and rows.read == size * cohort
    assert all(a.size <= 4 * 2 * (cohort + 16) for a in made), "nothing of the population's size was made"


def test_occupancy() -> None:
    made = make([8, 8, 8, 8], Passes(batch_size=4), lanes=4)
    assert made.occupancy == (1.0, 1.0)
    made = make([8, 4], Passes(batch_size=4), lanes=2)
    assert made.occupancy == (0.75, 0.75), "the row of an idle lane is computed, too"
    made = make([3], Passes(batch_size=4), lanes=2)
    assert made.occupancy == (0.5, 0.375)


@pytest.mark.parametrize("devices", [1, 3])
def test_a_cohort_of_empty_clients(devices: int) -> None:
    made = make([0, 0, 0], Passes(batch_size=4), devices, 2)
    assert made.count.sum() == 0 and made.first.sum() == made.last.sum() == 3
    assert sorted(made.member[made.member < 3].tolist()) == [0, 1, 2]


def test_steps_of() -> None:
    sizes = np.array([0, 1, 8, 9])
    assert plan.steps_of(sizes, Passes(epochs=2, batch_size=8)).tolist() == [0, 2, 2, 4]
    assert plan.steps_of(sizes, Passes(steps=3)).tolist() == [0, 3, 3, 3]


class Looked:
    """An index array that counts how many of its entries are looked at, and cannot be read as a whole."""

    def __init__(self, values: np.ndarray) -> None:
        self.values, self.count = values, 0

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, where: np.ndarray) -> np.ndarray:
        self.count += np.size(where)
        return self.values[where]

    def __array__(self, *_: object) -> np.ndarray:
        raise AssertionError("read as a whole")


def test_a_round_looks_at_its_cohort_only() -> None:
    """Sampling and planning 100 of a million clients: entries looked at, and memory far below that of the index."""
    clients, members, each = 10**6, 100, 3
    rows, offsets = Looked(np.arange(clients * each, dtype=np.int32)), Looked(np.arange(0, clients * each + 1, each))
    held = rows.values.nbytes + offsets.values.nbytes
    select = Algorithm._field_defaults["select"]
    tracemalloc.start()
    ids = select(stream(0, "sample 1"), (), Population(clients, members))
    plan.make(ids, rows, offsets, Passes(batch_size=2), 0, 1, 2, 4)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(set(ids.tolist())) == members
    assert offsets.count == 2 * members and rows.count == each * members
    assert peak < held / 50
