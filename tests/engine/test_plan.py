"""The plan's laws: every row as often as it should be, no lane twice at once, never longer than LPT promises."""

from __future__ import annotations

import collections
import itertools
import tracemalloc
from collections.abc import Callable, Iterator

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
    rows=st.none(),
    stream=st.sampled_from(["", "second"]),
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
                    assert not made.live[d, t, lane] and (made.rows[d, t, lane] == -1).all()
                    continue
                assert t < made.length[d], "nothing lies beyond what the device runs"
                member, step = int(made.member[d, slot]), int(made.step[d, t, lane])
                assert step not in found[member], "a step of a client stands in one place only"
                batch, count = made.rows[d, t, lane].tolist(), int(made.count[d, t, lane])
                assert set(batch[count:]) <= {-1} and made.live[d, t, lane] == (count > 0)
                found[member][step] = batch[:count]
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
    assert all(a.size <= 4 * 2 * (cohort + 16) for a in made if a is not None), (
        "nothing of the population's size was made"
    )


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
    labels = lambda place: np.zeros(sizes[place], np.int32)  # noqa: E731 - one expression, named
    assert plan.steps_of(sizes, Passes(steps=3, rows=scattered(8)), labels).tolist() == [3, 3, 3, 3]
    by_labels = Passes(steps=lambda labels: len(labels) // 4, rows=scattered(8))
    assert plan.steps_of(sizes, by_labels, labels).tolist() == [0, 0, 2, 2]


@pytest.mark.parametrize(
    ("passes", "words"),
    [
        (Passes(rows=lambda labels, rng: iter(())), "steps=None.*give steps=10"),
        (Passes(steps=len), "without rows.*built-in function len.*give a number"),
        (Passes(steps=lambda labels: 2.0, rows=lambda labels, rng: iter(())), "client 17.*>= 0, got 2.0; give an int"),
        (Passes(steps=lambda labels: -1, rows=lambda labels, rng: iter(())), "client 17.*>= 0, got -1"),
        (Passes(steps=lambda labels: True, rows=lambda labels, rng: iter(())), "client 17.*got True"),
        (Passes(steps=-2, rows=lambda labels, rng: iter(())), "every client.*got -2"),
    ],
)
def test_rows_and_steps_that_do_not_fit_together_are_refused(passes: Passes, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        plan.steps_of(np.array([5]), passes, lambda place: np.zeros(5, np.int32), np.array([17]))


def test_labels_are_needed_for_own_rows_only() -> None:
    _, rows, offsets = population([5, 3])
    made = plan.make(np.arange(2), rows, offsets, Passes(batch_size=2), 0, 1, 1, 1, labels=refuse)
    assert made.examples == 8 and not made.holes
    with pytest.raises(ValueError, match="Expected the clients' labels"):
        plan.make(np.arange(2), rows, offsets, Passes(steps=len, rows=scattered(8)), 0, 1, 1, 1)
    with pytest.raises(ValueError, match="Expected 3 labels, one an example, of client 1, got 5"):
        passes = Passes(steps=2, rows=scattered(8))
        plan.make(np.arange(2), rows, offsets, passes, 0, 1, 1, 1, labels=lambda i: np.zeros(5)).segment(0, 9)


def refuse(place: int) -> np.ndarray:
    raise AssertionError("looked at")


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


# --- streams


def batches_of_old(
    ids: np.ndarray, sizes: np.ndarray, passes: Passes, seed: int, round: int, exchange: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """`plan.batches` before streams had names, word for word."""
    size = passes.batch_size
    if passes.steps is None:
        epochs = np.full(len(ids), passes.epochs)
    else:
        epochs = -(-passes.steps * size // np.maximum(sizes, 1))
    member = np.repeat(np.arange(len(ids)), sizes * epochs)
    start = np.cumsum(sizes * epochs) - sizes * epochs
    place = np.arange(len(member)) - start[member]
    epoch, example = np.divmod(place, np.maximum(sizes, 1)[member])
    if passes.shuffle:
        group = epoch + (np.cumsum(epochs) - epochs)[member]
        bits = np.uint64(int(epochs.sum()).bit_length())
        chance = randomness.mix(seed, round, exchange, ids[member], epoch, example)
        example = example[np.argsort(group.astype(np.uint64) << (np.uint64(64) - bits) | chance >> bits, kind="stable")]
    if passes.steps is not None:
        step, column = np.divmod(place, size)
        keep = step < passes.steps
        return member[keep], step[keep], column[keep], example[keep]
    per_epoch = -(-sizes // size)
    step, column = np.divmod(place - epoch * sizes[member], size)
    return member, step + epoch * per_epoch[member], column, example


@given(SIZES, PASSES, st.integers(0, 2**40), st.integers(1, 400), st.integers(0, 9))
@LAW
def test_without_a_name_the_batches_are_those_of_old(
    sizes: list[int], passes: Passes, seed: int, round: int, exchange: int
) -> None:
    ids = population(sizes)[0]
    counts = np.array(sizes)[ids]
    old = batches_of_old(ids, counts, passes, seed, round, exchange)
    for drawn in (
        plan.batches(ids, counts, passes._replace(stream=""), seed, round, exchange),
        plan.batches(ids, counts, passes, seed, round, exchange, stream=""),
    ):
        assert [a.tolist() for a in drawn] == [a.tolist() for a in old]


def test_a_stream_names_the_batches() -> None:
    """Another stream draws others, whoever says it; the same one draws the same, whatever the passes' own says."""
    ids, rows, offsets = np.arange(2), *population([30, 30])[1:]

    def order(said: str | None, own: str = "", exchange: int = 0) -> list[int]:
        passes = Passes(batch_size=30, stream=own)
        made = plan.make(ids, rows, offsets, passes, 3, 16, 1, 2, exchange, stream=said)
        return made.segment(0, 1).ravel().tolist()

    assert order(None, "a") == order("a") == order("a", "b")
    assert order("") == order(None) == order("", "a")
    orders = [tuple(order(name, exchange=n)) for name in ("", "a", "b", "ab") for n in (0, 1)]
    assert len(set(orders)) == len(orders)


# --- members who are nobody


@given(SIZES, PASSES, DEVICES, LANES, st.data())
@LAW
def test_nobody_has_no_slot(sizes: list[int], passes: Passes, devices: int, lanes: int, data: st.DataObject) -> None:
    """Members' places skip those of nobody, slots are as many as the whole cohort needs; the rest is as without them."""
    ids, rows, offsets = population(sizes)
    members = len(ids) + data.draw(st.integers(0, 9))
    places = np.sort(np.random.default_rng(members).permutation(members)[: len(ids)])
    common = (ids, rows, offsets, passes, 0, 1, devices, lanes)
    alone, among = plan.make(*common), plan.make(*common, members=members, places=places)
    assert among.member.shape == (devices, -(-members // devices))
    used = among.slot < among.member.shape[1]
    assert (used == (alone.slot < alone.member.shape[1])).all() and (among.slot[used] == alone.slot[used]).all()
    translated = np.append(places, members)[np.where(alone.member < len(ids), alone.member, len(ids))]
    slots = alone.member.shape[1]
    assert (among.member[:, :slots] == translated).all() and (among.member[:, slots:] == members).all()
    for name in ("rows", "count", "live", "step", "first", "last", "width", "length"):
        assert (getattr(among, name) == getattr(alone, name)).all(), name


@pytest.mark.parametrize("passes", [Passes(batch_size=4), Passes(steps=3), Passes(steps=len, rows=lambda *_: iter(()))])
@pytest.mark.parametrize(("devices", "members", "slots"), [(1, 5, 5), (3, 5, 2), (2, 0, 1)])
def test_a_cohort_of_nobody(passes: Passes, devices: int, members: int, slots: int) -> None:
    nobody, (_, rows, offsets) = np.zeros(0, np.int64), population([3, 4])
    widths = (0, 1, passes.batch_size)
    made = plan.make(
        nobody, rows, offsets, passes, 0, 1, devices, 2, limit=nobody, widths=widths, members=members, places=nobody
    )  # fmt: skip
    assert made.slot.shape == (devices, 1, 2) and made.length.tolist() == [0] * devices
    assert made.member.shape == (devices, slots) and (made.member == members).all()
    assert (made.slot == slots).all() and not made.live.any() and not made.first.any() and not made.width.any()
    assert (made.segment(0, 4) == -1).all() and made.examples == 0 and made.occupancy == (0.0, 0.0)


# --- rows that clients choose


def scattered(size: int) -> Callable[[np.ndarray, np.random.Generator], Iterator[np.ndarray]]:
    """Blocks of one to three steps, forever, with holes anywhere; of holes only where there are no examples."""

    def rows(labels: np.ndarray, rng: np.random.Generator) -> Iterator[np.ndarray]:
        while True:
            yield rng.integers(-1, len(labels), (rng.integers(1, 4), size))

    return rows


def by_segments(made: plan.Plan, steps: int) -> np.ndarray:
    """(D, T, L, B), made segment by segment."""
    length = made.slot.shape[1]
    parts = [made.segment(start, steps) for start in range(0, length, steps)]
    whole = np.concatenate(parts, axis=1)
    assert all(part.shape[1] == steps and part.dtype == np.int32 for part in parts)
    assert (whole[:, length:] == -1).all(), "nothing lies beyond the plan"
    return whole[:, :length]


@given(SIZES, PASSES, DEVICES, LANES, st.integers(1, 9))
@LAW
def test_segments_of_ordinary_passes_are_the_grid(
    sizes: list[int], passes: Passes, devices: int, lanes: int, steps: int
) -> None:
    made = make(sizes, passes, devices, lanes)
    assert (by_segments(made, steps) == made.rows).all()
    assert (made.count == (made.rows >= 0).sum(axis=3)).all() and (made.live == (made.count > 0)).all()
    assert made.examples == (made.rows >= 0).sum() and not made.holes
    assert (made.segment(made.slot.shape[1] + 2, 3) == -1).all()


@given(SIZES, DEVICES, LANES, st.integers(1, 9), st.integers(1, 9), st.data())
@LAW
def test_own_rows_are_laid_out_as_by_a_loop(
    sizes: list[int], devices: int, lanes: int, size: int, steps: int, data: st.DataObject
) -> None:
    """Each client's blocks one after the other, in plain Python, with a limit and without; whatever the segments."""
    ids, rows, offsets = population(sizes)
    labels = [np.full(sizes[client], client, np.int32) for client in ids]
    passes = Passes(steps=lambda own: len(own) % 5, batch_size=size, rows=scattered(size), stream="own")
    limit = np.array(data.draw(st.lists(st.integers(0, 4), min_size=len(ids), max_size=len(ids))))
    limit = data.draw(st.sampled_from([None, limit]))
    made = plan.make(
        ids, rows, offsets, passes, 7, 16, devices, lanes, 2, limit, stream="s", labels=labels.__getitem__
    )  # fmt: skip
    assert made.holes and made.rows.shape == (*made.slot.shape, size)
    grid = by_segments(made, steps)
    wanted = np.full_like(grid, -1)
    live = np.zeros_like(made.live)
    for place, client in enumerate(ids.tolist()):
        number = sizes[client] % 5 if limit is None else min(sizes[client] % 5, int(limit[place]))
        rng = stream(7, f"rows s 16 2 {client}")
        visits = (visit for block in scattered(size)(labels[place], rng) for visit in block.tolist())
        (d,), (slot,) = np.nonzero(made.member == place)
        held = np.argwhere(made.slot[d] == slot)  # (t, lane), in the order of time
        assert len(held) == max(number, 1)
        for (t, lane), visit in zip(held[:number].tolist(), visits, strict=False):
            wanted[d, t, lane] = [-1 if example < 0 else 1000 * client + example for example in visit]
            live[d, t, lane] = True
    assert (grid == wanted).all() and (made.live == live).all()
    assert (made.count == (wanted >= 0).sum(axis=3)).all() and made.examples == (wanted >= 0).sum()
    assert (made.width[live.any(axis=2)] == size).all(), "a step with a hole somewhere has all columns"
    assert made.occupancy[1] == pytest.approx(made.examples / max(lanes * made.width.sum(), 1))
    assert (by_segments(made, 3) == grid).all(), "from the beginning again"


def test_own_rows_do_not_depend_on_the_cohort_and_have_a_generator_of_their_own() -> None:
    _, rows, offsets = population([30, 30, 9])
    passes = Passes(steps=4, batch_size=30, rows=scattered(30))

    def visits(ids: list[int], seed: int = 0, round: int = 1, exchange: int = 0, **named: str) -> list[tuple[int, ...]]:
        """Of each client its rows, as its own examples."""
        labels = lambda place: np.zeros([30, 30, 9][ids[place]], np.int32)  # noqa: E731 - one expression, named
        made = plan.make(np.array(ids), rows, offsets, passes, seed, round, 1, 3, exchange, labels=labels, **named)
        grid = by_segments(made, 3)[0]
        slots = [int(np.flatnonzero(made.member[0] == place)[0]) for place in range(len(ids))]
        return [tuple((grid[made.slot[0] == slot] % 1000).ravel().tolist()) for slot in slots]

    assert visits([2, 0, 1])[1] == visits([0])[0] == visits([0], stream="")[0]
    others = [visits([0, 1], **o) for o in ({}, {"seed": 1}, {"round": 2}, {"exchange": 1}, {"stream": "a"})]
    assert len({one for both in others for one in both}) == 10


def test_class_balanced_batches() -> None:
    """Two examples of each class in every batch, each class in a new order when it has run out."""
    classes, size = 3, 6

    def balanced(labels: np.ndarray, rng: np.random.Generator) -> Iterator[np.ndarray]:
        def endless(of: np.ndarray) -> Iterator[int]:
            while True:
                yield from rng.permutation(of).tolist()

        kinds = [endless(np.flatnonzero(labels == kind)) for kind in range(classes)]
        while True:
            yield np.array([[next(kind) for kind in kinds for _ in range(size // classes)]])

    labels = np.array([0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2], np.int32)
    passes = Passes(steps=lambda labels: 2 * len(labels) // size, batch_size=size, rows=balanced)
    made = plan.make(np.arange(1), np.arange(12), np.array([0, 12]), passes, 0, 1, 1, 1, labels=lambda place: labels)
    batches = by_segments(made, 3)[0, :, 0]
    assert batches.shape == (4, size)
    assert labels[batches].tolist() == [[0, 0, 1, 1, 2, 2]] * 4
    for kind, visits in ((0, [4, 4]), (1, [2, 2, 2, 2])):
        drawn = batches[labels[batches] == kind]
        assert np.unique(drawn, return_counts=True)[1].tolist() == visits


def test_holes_stay_where_they_are() -> None:
    block = np.array([[-1, 2, -1, 0], [1, -1, -1, 1]])
    passes = Passes(steps=3, batch_size=4, rows=lambda labels, rng: itertools.repeat(block))
    made = plan.make(
        np.array([1]), np.arange(10, 20), np.array([0, 5, 8]), passes, 0, 1, 1, 1, labels=lambda place: np.zeros(3)
    )
    expected = [[-1, 17, -1, 15], [16, -1, -1, 16], [-1, 17, -1, 15]]
    assert by_segments(made, 2)[0, :, 0].tolist() == expected
    assert made.count[0, :, 0].tolist() == [2, 2, 2] and made.occupancy == (1.0, 0.5)


def test_steps_without_data() -> None:
    """The last client of the partition has no examples; its three steps are steps, of whole batches of holes."""
    _, rows, offsets = population([4, 0])
    passes = Passes(steps=lambda labels: 3 - len(labels) // 4, batch_size=2, rows=scattered(2))
    made = plan.make(
        np.array([1, 0]), rows, offsets, passes, 0, 1, 1, 1, labels=lambda place: np.zeros([0, 4][place], np.int32)
    )  # fmt: skip
    grid = by_segments(made, 2)[0, :, 0]
    empty = made.slot[0, :, 0] == 0
    assert made.length.tolist() == [5] and empty.sum() == 3 and made.live.all()
    assert (grid[empty] == -1).all() and (made.count[0, empty] == 0).all() and (made.width == 2).all()
    ordinary = plan.make(np.array([1]), rows, offsets, Passes(steps=3), 0, 1, 1, 1)
    assert not ordinary.live.any() and ordinary.length.tolist() == [1], "without own rows no examples are no steps"


def test_a_long_pass_is_never_planned_whole() -> None:
    """Eight clients, a thousand steps of 2,560 rows: blocks are read as segments need them, memory is a segment's."""
    clients, length, size, steps = 8, 1000, 2560, 4
    read = [0]

    def rows(labels: np.ndarray, rng: np.random.Generator) -> Iterator[np.ndarray]:
        while True:
            read[0] += 1
            yield rng.integers(0, len(labels), (1, size))

    passes = Passes(steps=length, batch_size=size, rows=rows)
    _, owned, offsets = population([50] * clients)
    tracemalloc.start()
    made = plan.make(
        np.arange(clients), owned, offsets, passes, 0, 1, 1, clients, labels=lambda i: np.zeros(50, np.int32)
    )
    assert read[0] == 0
    for start in range(0, length, steps):
        assert (made.segment(start, steps) >= 0).all()
        assert read[0] == clients * (start + steps)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    segment, whole = (4 * clients * size * n for n in (steps, length))
    assert peak < 6 * segment < whole / 40
    assert made.own is not None and not made.own.running, "who has ended is forgotten"
    assert made.examples == clients * length * size and made.occupancy == (1.0, 1.0)


def test_blocks_may_be_written_over() -> None:
    """An iterator may give the same array again and again, with other numbers in it."""

    def rows(labels: np.ndarray, rng: np.random.Generator) -> Iterator[np.ndarray]:
        block = np.zeros((1, 2), np.int64)
        for step in range(4):
            block[:] = step
            yield block

    visits = plan.own_steps(0, np.zeros(4, np.int32), 4, Passes(steps=4, batch_size=2, rows=rows), 0, 1)
    assert [visit.tolist() for visit in list(visits)] == [[0, 0], [1, 1], [2, 2], [3, 3]]


def test_a_block_may_hold_more_steps_than_are_left() -> None:
    passes = Passes(steps=3, batch_size=2, rows=lambda labels, rng: itertools.repeat([[0, 1], [1, -1]]))
    visits = plan.own_steps(0, np.zeros(2, np.int32), 3, passes, 0, 1)
    assert [visit.tolist() for visit in visits] == [[0, 1], [1, -1], [0, 1]]


GOOD = np.array([[0, 1], [2, -1]])


@pytest.mark.parametrize(
    ("blocks", "words"),
    [
        ([GOOD], "client 1 to give at least 6 steps, .*got 2; yield further blocks"),
        (
            [GOOD, [[0, 1]], [[0, 3]]],
            r"client 1 to give 0 to 2 for its 3 examples, .*got 3 at step 3, column 1; indices",
        ),
        ([GOOD, [[0, 1], [-2, 0]]], "client 1 .*got -2 at step 3, column 0"),
        ([np.array([[2**63, 0]], np.uint64)], "got 9223372036854775808 at step 0"),
        (
            [GOOD, np.zeros((2, 3), int)],
            r"client 1 to give blocks of integers \(k, 2\), .*int64 \(2, 3\) at step 2; yield",
        ),
        ([GOOD, np.zeros((2, 2))], r"client 1 .*float64 \(2, 2\) at step 2"),
        ([np.ones((2, 2), bool)], r"client 1 .*bool \(2, 2\) at step 0"),
        ([np.zeros((0, 2), int)], r"client 1 .*int64 \(0, 2\) at step 0"),
        ([np.zeros(2, int)], r"client 1 .*int64 \(2,\) at step 0"),
        ([[[0, 1], [2]]], "client 1 .*rows of different lengths at step 0"),
        ([None], r"client 1 .*object \(\) at step 0"),
    ],
)
def test_own_rows_that_are_wrong_are_refused_when_their_segment_is_made(blocks: list, words: str) -> None:
    _, rows, offsets = population([2, 3])
    passes = Passes(steps=6, batch_size=2, rows=lambda labels, rng: iter(blocks))
    made = plan.make(np.array([1]), rows, offsets, passes, 0, 1, 1, 1, labels=lambda place: np.zeros(3, np.int32))
    if blocks[0] is GOOD:
        assert made.segment(0, 2)[0, :, 0].tolist() == [[1000, 1001], [1002, -1]], "what is wrong comes later"
        with pytest.raises(ValueError, match=words):
            made.segment(2, 2)
    else:
        with pytest.raises(ValueError, match=words):
            made.segment(0, 2)


def test_what_is_no_iterator_of_blocks_is_refused() -> None:
    _, rows, offsets = population([2, 0])
    for found, words in ((GOOD, "client 0 to give an iterator .* got ndarray; yield"), (None, "got NoneType")):
        passes = Passes(steps=1, batch_size=2, rows=lambda labels, rng, found=found: found)
        with pytest.raises(ValueError, match=words):
            plan.make(np.arange(1), rows, offsets, passes, 0, 1, 1, 1, labels=lambda place: np.zeros(2)).segment(0, 1)
    passes = Passes(steps=1, batch_size=2, rows=lambda labels, rng: iter([[[0, -1]]]))
    with pytest.raises(ValueError, match=r"client 1 to give no index, as it has no examples, or -1 .* got 0"):
        plan.make(np.array([1]), rows, offsets, passes, 0, 1, 1, 1, labels=lambda place: np.zeros(0)).segment(0, 1)
    with pytest.raises(ValueError, match="without rows of their own"):
        plan.batches(np.arange(1), np.array([2]), passes, 0, 1)


def test_segments_of_own_rows_follow_one_another() -> None:
    _, rows, offsets = population([5])
    passes = Passes(steps=9, batch_size=2, rows=scattered(2))
    made = plan.make(np.arange(1), rows, offsets, passes, 0, 1, 1, 1, labels=lambda place: np.zeros(5, np.int32))
    made.segment(0, 4)
    with pytest.raises(ValueError, match="from step 4 on, or 0, not 8"):
        made.segment(8, 4)
    made.segment(4, 4)
