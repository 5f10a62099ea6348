"""Where a cohort's clients run: lane, first step, and how many columns of a batch each step computes. NumPy only.

Lanes run side by side, and one step of all of them costs about lanes x width rows, its width being the largest number of
real rows in any lane. So a short batch is cheap only where all lanes have a short one. Two packings are tried, and the
cheaper one is taken: longest-first (LPT), which keeps every lane busy, and waves, in which clients of similar size start
together, so that their short batches coincide.
"""

from __future__ import annotations

import bisect
import heapq
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from fedsim.core import Passes

STEP_ROWS = 2.0  # what a step costs beside its rows, in rows; from processor time on a CPU, docs/lanes.md
WORTH = 0.02  # of all rows that a further width must save: it costs the compilation of another step, kept on disk
MOST_WIDTHS = 4
TILE = 8  # rows that an accelerator's matrix unit takes at a time (TPU: 8 x 128 numbers); what is beyond is padded

Labels = Callable[[int], np.ndarray]  # a client's place among those that are planned -> its examples' labels (n,)


class Places(NamedTuple):
    """Where M clients run."""

    device: np.ndarray  # (M,), int64
    lane: np.ndarray  # (M,), int64
    begin: np.ndarray  # (M,), int64: step of the plan at which the client starts


class Work(NamedTuple):
    """What M clients have to do: K places in lanes, each a step of a client; those of a client stand together."""

    spans: np.ndarray  # (M,), int64: places; at least one, so that a client without steps can start and finish
    who: np.ndarray  # (K,), int64: the client
    step: np.ndarray  # (K,), int64: its own step number
    count: np.ndarray  # (K,), int64: real rows of the step's batch


def steps_of(
    sizes: np.ndarray, passes: Passes, labels: Labels | None = None, ids: np.ndarray | None = None
) -> np.ndarray:
    """Local steps of clients with these numbers of examples; (M,) int64.

    A client without examples takes none, but where `passes.rows` is set: a step of holes only is a step.

    Args:
        labels: looked at only where `passes.steps` is a function of them.
        ids: (M,) what errors call the clients; None for their places.

    Raises:
        ValueError: `rows` and `steps` do not fit together, or a client's steps are no whole number.
    """
    check(passes)
    steps = passes.steps
    if steps is None:
        return -(-sizes // passes.batch_size) * passes.epochs
    if passes.rows is None:
        return np.where(sizes > 0, np.asarray(steps, np.int64), 0)
    if not callable(steps):
        return np.full(len(sizes), _whole(steps, "every client"), np.int64)
    look, names = labels or no_labels, range(len(sizes)) if ids is None else ids.tolist()
    return np.array([_whole(steps(look(i)), f"client {name}") for i, name in enumerate(names)], np.int64)


def no_labels(place: int) -> np.ndarray:
    """What is looked at where no labels were handed on."""
    raise ValueError("Expected the clients' labels, as Passes.rows chooses by them; hand on `labels`.")


def check(passes: Passes) -> None:
    """Raises `ValueError` unless `rows` and `steps` fit together: own rows say how many steps they are for."""
    if passes.rows is not None and passes.steps is None:
        raise ValueError(
            "Expected Passes with rows to say its local steps, got steps=None: rows of one's own have no epochs; give "
            "steps=10, or a function of the labels such as steps=lambda labels: len(labels) // 8."
        )
    if passes.rows is None and callable(passes.steps):
        raise ValueError(
            f"Expected Passes.steps without rows to be a number or None, got the function {passes.steps!r}; give a "
            "number, or the rows, too."
        )


def _whole(steps: Any, whose: str) -> int:
    if isinstance(steps, bool | np.bool_) or not isinstance(steps, int | np.integer) or steps < 0:
        raise ValueError(
            f"Expected the local steps of {whose}, by Passes.steps, to be a whole number >= 0, got {steps!r}; "
            "give an int, such as max(len(labels) // 8, 1)."
        )
    return int(steps)


def work_of(sizes: np.ndarray, steps: np.ndarray, passes: Passes) -> Work:
    """The places of clients with these numbers of examples and of steps, (M,) each."""
    spans = np.maximum(steps, 1)
    who = np.repeat(np.arange(len(sizes)), spans)
    step = np.arange(len(who)) - (np.cumsum(spans) - spans)[who]
    if passes.steps is not None:
        count = np.full(len(who), passes.batch_size)
    else:
        per_epoch = np.maximum(-(-sizes // passes.batch_size), 1)
        count = np.minimum(sizes[who] - step % per_epoch[who] * passes.batch_size, passes.batch_size)
    return Work(spans, who, step, np.where(steps[who] > 0, count, 0))


def row_tile(platform: str) -> int:
    """The rows, of all lanes together, that a step is padded to on this platform: 1 on a CPU, where none are."""
    return 1 if platform == "cpu" else TILE


def width_multiple(clients: int, devices: int, platform: str) -> int:
    """Of what the widths should be multiples, so that the rows of the lanes' steps fill tiles.

    1 on a CPU, and where eight lanes of a device can be busy: `lane_count.choose_lanes` then takes a multiple of eight, with
    which any width does. Of fewer clients the largest power of two that may be lanes is what divides the tile.
    """
    most = -(-clients // devices)
    power = max(lanes for lanes in (1, 2, 4, TILE) if lanes <= max(most, 1))
    return max(row_tile(platform) // power, 1)


def choose_widths(sizes: np.ndarray, passes: Passes, multiple: int = 1) -> tuple[int, ...]:
    """Numbers of columns that a step may compute, ascending: for clients of these sizes, the ones that save most rows.

    (B,) where every batch is full, or clients choose their rows. Else 0, for steps without any row, up to B, or less
    where no client fills a batch; each further width saves at least `WORTH` of the rows, were each client computed by
    itself.

    Args:
        multiple: of which every width but the whole batch is one.
    """
    size, sizes = passes.batch_size, sizes[sizes > 0]
    if passes.steps is not None or not len(sizes):
        return (size,)
    full, short = np.divmod(sizes, size)
    often = np.bincount(short[short > 0], minlength=size + 1)  # (B + 1,): batches of that many rows
    often[size] = full.sum()
    rows = np.flatnonzero(often)
    top = min(-(-int(rows[-1]) // multiple) * multiple, size)
    # Only what some batch rounds up to can be a width that saves rows; the narrowest one is tried first.
    widths = np.unique([multiple, *np.minimum(-(-rows // multiple) * multiple, size), top]).tolist()
    widths = [w for w in widths if w <= top]
    upto = np.cumsum(often)[widths].tolist()  # batches of at most so many rows
    # best[i]: fewest rows to compute all batches of up to w = widths[i] rows, if w is a width and k narrower ones are.
    best = [w * n for w, n in zip(widths, upto, strict=True)]
    chosen = [(w,) for w in widths]
    found = (best[-1], (top,))
    for _ in range(MOST_WIDTHS - 1):
        before = _narrower(widths, upto, best, multiple)
        best = [
            old if at is None else best[at] + w * (n - upto[at])
            for old, at, w, n in zip(best, before, widths, upto, strict=True)
        ]
        chosen = [(w,) if at is None else (*chosen[at], w) for at, w in zip(before, widths, strict=True)]
        if found[0] - best[-1] < WORTH * found[0]:
            break
        found = (best[-1], chosen[-1])
    return (size,) if found[1] == (size,) else (0, *found[1])


def _narrower(widths: list[int], upto: list[int], best: list[int], multiple: int) -> list[int | None]:
    """For each width the next narrower one, as an index, with which batches up to it cost fewest rows; the first of equals.

    Width w after n costs best[n] + w (upto[w] - upto[n]): over w a line for each n, the later the steeper down, so that the
    lower envelope of the lines is walked once from left to right (the convex hull trick), in time linear in the widths.
    """
    lines: list[int] = []  # the envelope so far, from `at` on
    found: list[int | None] = []
    at = 0

    def height(i: int, w: int) -> int:
        return best[i] - w * upto[i]

    def needless(a: int, b: int, c: int) -> bool:
        """Whether b is nowhere below both: c falls below it before it falls below a."""
        return (best[c] - best[b]) * (upto[b] - upto[a]) <= (best[b] - best[a]) * (upto[c] - upto[b])

    for i, w in enumerate(widths):
        while at + 1 < len(lines) and height(lines[at + 1], w) < height(lines[at], w):
            at += 1
        found.append(lines[at] if w > multiple and lines else None)
        if w % multiple:
            continue
        while len(lines) > at + 1 and needless(lines[-2], lines[-1], i):
            lines.pop()
        lines.append(i)
    return found


def longest_first(steps: np.ndarray, order: np.ndarray, devices: int, lanes: int, slots: int) -> Places:
    """Each client in turn goes to the lane that is free first (LPT).

    Args:
        steps: (M,) places that each client takes, at least 1.
        order: (M,) clients, those with most steps first.
        slots: clients that fit on one device.
    """
    places = [(0, 0, 0)] * len(steps)  # lists: the loop reads and writes single numbers, which is slow in arrays
    used = [0] * devices
    # Ties go to the device whose turn it is, so that equal clients spread over devices before they fill lanes.
    heap = [(0, place, d) for place in range(lanes) for d in range(devices)]
    for member, span in zip(order.tolist(), steps[order].tolist(), strict=True):
        while used[heap[0][2]] == slots:  # a full device takes no more clients; its lanes leave the heap
            heapq.heappop(heap)
        load, place, d = heap[0]
        places[member] = d, place, load
        used[d] += 1
        heapq.heapreplace(heap, (load + span, place, d))
    return _places(places)


def waves(steps: np.ndarray, last: np.ndarray, order: np.ndarray, devices: int, lanes: int) -> Places:
    """Clients of similar size start together, a wave after the other; who ends early is followed by a smaller one.

    Args:
        steps: (M,) places that each client takes, at least 1.
        last: (M,) rows of each client's last batch.
        order: (M,) clients, those with most steps first, of these those with most rows.
    """
    places = [(0, 0, 0)] * len(steps)
    spans, ends = steps.tolist(), last.tolist()
    # Dealt out there and back, so that no device always gets the larger one.
    turn, dealt = np.divmod(np.arange(len(order)), devices)
    dealt = np.where(turn % 2, devices - 1 - dealt, dealt)
    for d in range(devices):
        own = order[dealt == d]
        left: dict[int, list[tuple[int, int]]] = {}  # steps -> (rows of the last batch, client), fewest rows first
        for member in own[::-1].tolist():
            left.setdefault(spans[member], []).append((ends[member], member))
        counts = sorted(left)
        start = 0
        while counts:
            span, widest = counts[-1], left[counts[-1]][-1][0]
            for place in range(lanes):
                free = span
                while free and counts:
                    at = bisect.bisect_right(counts, free) - 1
                    if at < 0:
                        break
                    group = left[counts[at]]
                    # What ends with the wave must not widen its last step.
                    fits = len(group) if counts[at] < free else bisect.bisect_right(group, (widest, len(steps)))
                    if not fits:
                        break
                    member = group.pop(fits - 1)[1]
                    places[member] = d, place, start + span - free
                    free -= counts[at]
                    if not group:
                        del left[counts.pop(at)]
            start += span
    return _places(places)


def _places(found: list[tuple[int, int, int]]) -> Places:
    """From (device, lane, begin) of each client."""
    return Places(*np.array(found, np.int64).reshape(-1, 3).T)


def pack(work: Work, devices: int, lanes: int, widths: Sequence[int]) -> tuple[Places, np.ndarray]:
    """The cheaper packing, and the columns that each step computes: the narrowest of `widths` that holds its rows.

    Returns:
        Places, and (D, T) int32; beyond a device's last step 0.
    """
    rows = np.bincount(work.who, work.count, minlength=len(work.spans))
    order = np.lexsort((-rows, -work.spans))
    slots = -(-max(len(order), 1) // devices)
    tried = [longest_first(work.spans, order, devices, lanes, slots)]
    if len(widths) > 1:
        ends = work.count[np.cumsum(work.spans) - 1]
        tried.append(waves(work.spans, ends, order, devices, lanes))
    return min(
        ((places, width_of(places, work, devices, widths)) for places in tried), key=lambda made: cost(made[1], lanes)
    )


def width_of(places: Places, work: Work, devices: int, widths: Sequence[int]) -> np.ndarray:
    """The narrowest of `widths` that holds the real rows of all lanes, by device and step; (D, T), int32."""
    at = places.device[work.who], places.begin[work.who] + work.step
    rows = np.full((devices, int(at[1].max(initial=0)) + 1), -1, np.int64)
    np.maximum.at(rows, at, work.count)
    return np.where(rows < 0, 0, np.asarray(widths)[np.searchsorted(widths, rows)]).astype(np.int32)


def cost(width: np.ndarray, lanes: int, tile: int = 1) -> float:
    """What a plan costs on its slowest device, in rows, those of a step padded to a multiple of `tile`; width (D, T)."""
    rows = -(-lanes * width // tile) * tile
    return float((rows + STEP_ROWS).sum(axis=1).max(initial=0.0))
