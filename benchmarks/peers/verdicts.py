"""From measured rounds to a table and to what the targets say: pure functions of the records that `run.py` keeps.

A record is one start of one system on one workload: `workload`, `system`, `startup` (s), `first` and `warm` (s, rounds 1
and 2), `repeats` (lists of the seconds of its steady rounds), `others` (the share of the CPU that other processes took in
each), `pss` (MB), `loss` (of the probe examples after the judged round), `error` (None where it ran). Later ones
also have `compiling` (s of `first` in which JAX compiled, None without JAX), `batch` (which measurement it belongs to),
`commit`, `changed`, `versions`, `together` (all started at once) and `alone` (each ended before the next one ran).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import median
from typing import Any, NamedTuple

# Of how much the loss has fallen: cohorts are equal, the order within clients is not everywhere, and FedJAX fills last
# batches with repeated examples (W1: 6 %). docs/peers.md has the spread from which it was set.
TOLERANCE = 0.1
BASE = "fedsim"
OWN = (BASE, "fedsim-1")  # by itself, and with the host as one device

Record = Mapping[str, Any]


class Row(NamedTuple):
    """A system on a workload, all its starts together."""

    system: str
    repeats: list[float]
    """Median seconds a round in each repeat, in order."""
    median: float
    """Of those."""
    low: float
    high: float
    startup: float
    first: float
    pss: float
    others: float
    """Largest share of the CPU that other processes took in a steady round."""
    loss: float
    void: str
    """Why this row does not count, or empty."""
    compiling: float | None = None
    """Seconds of `first`, where JAX is used and it is known."""
    commit: str = ""
    """Short."""
    batches: frozenset[str | None] = frozenset()
    apart: bool = False
    """It was not measured together with fedsim's row, and cannot be compared: the machine's speed drifts."""
    beside: bool = False
    """It started beside others."""


class Verdict(NamedTuple):
    """A target and whether it was met."""

    workload: str
    target: str
    found: str
    verdict: str


def rows(records: Iterable[Record], workload: str, start_loss: float) -> list[Row]:
    """The rows of a workload, fastest first, then those measured apart, then the void: failed, or learned something else.

    Args:
        start_loss: loss of the probe examples before the first round.
    """
    by_system: dict[str, list[Record]] = {}
    for record in records:
        if record["workload"] == workload:
            by_system.setdefault(record["system"], []).append(record)
    losses = [r["loss"] for group in by_system.values() for r in group if not r["error"] and r["loss"] is not None]
    common = median(losses) if losses else start_loss
    made = [row(system, group, common, start_loss) for system, group in by_system.items()]
    together = next((r.batches for r in made if r.system == BASE), None)
    made = [r._replace(apart=together is not None and not r.batches <= together) for r in made]
    return sorted(made, key=lambda r: (bool(r.void), r.apart, r.median))


def row(system: str, records: Sequence[Record], common: float, start_loss: float) -> Row:
    """One system's starts as a row; `common` is the loss that systems have in the median."""
    good = [r for r in records if not r["error"] and r["repeats"]]
    errors = [r["error"] for r in records if r["error"]]
    if not good:
        nothing = float("nan")
        void = errors[0] if errors else "no steady round"
        return Row(system, [], *(nothing,) * 8, void, batches=batches_of(records), commit=commits_of(records))
    repeats = [median(seconds) for r in good for seconds in r["repeats"]]
    compiling = [r["compiling"] for r in good if r.get("compiling") is not None]
    losses = [r["loss"] for r in good if r["loss"] is not None]
    worst = max(losses, key=lambda loss: abs(loss - common), default=float("nan"))
    void = errors[0] if errors else ""
    if not abs(worst - common) <= TOLERANCE * (start_loss - common):  # NaN included
        void = f"loss {worst:.4f}, others {common:.4f}"
    return Row(
        system,
        repeats,
        median(repeats),
        min(repeats),
        max(repeats),
        median(r["startup"] for r in good),
        median(r["first"] for r in good),
        max(r["pss"] for r in good),
        max(share for r in good for repeat in r["others"] for share in repeat),
        worst,
        void,
        median(compiling) if compiling else None,
        commits_of(records),
        batches_of(records),
        beside=any(r.get("together") for r in good),
    )


def batches_of(records: Sequence[Record]) -> frozenset[str | None]:
    """The measurements that they belong to; None is that of records from before it was noted."""
    return frozenset(r.get("batch") for r in records)


def commits_of(records: Sequence[Record]) -> str:
    """Short commits, with a plus where fedsim's source had been changed since."""
    found = {r["commit"][:7] + "+" * bool(r.get("changed")) for r in records if r.get("commit")}
    return ", ".join(sorted(found))


def fastest(base: Row, others: Sequence[Row]) -> tuple[str, float, list[float]]:
    """(name, ratio of medians) of the fastest that counts, and in each repeat the ratio to the fastest of all that ran in it."""
    best = min(others, key=lambda r: r.median)
    shared = min(len(base.repeats), max(len(o.repeats) for o in others))
    each = [min(o.repeats[i] for o in others if i < len(o.repeats)) / base.repeats[i] for i in range(shared)]
    return best.system, best.median / base.median, each


def against(workload: str, base: Row, others: Sequence[Row], names: Sequence[str], least: float) -> Verdict:
    """fedsim at least `least` times as fast as the fastest of `names`."""
    label = " and ".join(names)
    target = f"at least {least:.3g}x of {label}"
    chosen = [r for r in others if r.system in names]
    if not chosen:
        return Verdict(workload, target, f"no counting row of {label}", "not measured")
    name, ratio, each = fastest(base, chosen)
    found = f"{ratio:.2f}x of {name}, {min(each):.2f}-{max(each):.2f} in each repeat"
    return Verdict(workload, target, found, "met" if ratio >= least else "missed")


LEAST = {"G-B": 1.2, "G-Ti": 2.0, "G-L": 2.0}
"""Workload -> least ratio to the fastest peer, where it is not 1.3."""


def ahead(workload: str, base: Row, others: Sequence[Row], *, least_each: float) -> Verdict:
    """At least 1.3x (`LEAST`) the fastest peer in the ratio of medians and `least_each` in every repeat; else a tie, or behind."""
    name, ratio, each = fastest(base, others)
    least = next((v for start, v in LEAST.items() if workload.startswith(start)), 1.3)
    target = f"at least {least:.2g}x the fastest" + (f", {least_each}x in each repeat" if least_each else "")
    found = f"{ratio:.2f}x of {name}, {min(each):.2f}-{max(each):.2f} in each repeat"
    if ratio >= least and min(each) >= least_each:
        return Verdict(workload, target, found, "met")
    behind = ratio <= 1 / 1.3 and max(each) <= 1 / 1.15
    return Verdict(workload, target, found, "missed, behind" if behind else "missed, a tie")


def verdicts(workload: str, table: Sequence[Row]) -> list[Verdict]:
    """What the targets say of a workload's rows, for each of fedsim's own."""
    counting = {r.system: r for r in table if not r.void and not r.apart}
    own = {name: counting.pop(name) for name in OWN if name in counting}
    if BASE not in own or not counting:
        return [Verdict(workload, "all", "fedsim's row or all others are void, apart or missing", "not measured")]
    found = []
    for name, base in own.items():
        label = "" if name == BASE else f"{name}: "
        found += [v._replace(target=label + v.target) for v in targets(workload, base, list(counting.values()))]
    return found


def targets(workload: str, base: Row, others: list[Row]) -> list[Verdict]:
    """The targets of a workload for one of fedsim's rows."""
    if workload == "W1":
        return [
            against(workload, base, others, ["fedjax"], 1.0),
            against(workload, base, others, ["pfl", "pfl-2"], 1 / 1.5),
        ]
    found = [ahead(workload, base, others, least_each=1.15 if workload == "W2" else 0.0)]
    if workload.startswith("W3"):
        found.append(against(workload, base, others, ["padded-vmap"], 3.0))
    return [*found, against(workload, base, others, ["torch"], 1.0)]


RESULT = (
    "work",
    "system",
    "s/round (min-max of repeats)",
    "repeats",
    "times fedsim's",
    "start-up s",
    "first round s",
    "of which compiling",
    "peak PSS MB",
    "other CPU, at most",
    "probe loss",
    "commit",
)


def line(cells: Iterable[object]) -> str:
    """One line of a table in Markdown."""
    return f"| {' | '.join(map(str, cells))} |"


def head(names: Sequence[str]) -> list[str]:
    """The first two lines of a table."""
    return [line(names), "|" + "---|" * len(names)]


def markdown(tables: Mapping[str, Sequence[Row]]) -> str:
    """The rows of all workloads as one table."""
    lines = head(RESULT)
    for workload, table in tables.items():
        base = next((r for r in table if r.system == BASE and not r.void), None)
        for r in table:
            apart = " (measured apart)" if r.apart else ""
            if not r.repeats:
                empty = [""] * (len(RESULT) - 4)
                lines.append(line([workload, r.system + apart, f"void: {r.void}", *empty, r.commit]))
                continue
            note = apart + (f" void: {r.void}" if r.void else "")
            times = f"{r.median / base.median:.2f}" if base and not r.apart else ""
            rounds = f"{r.median:.2f} ({r.low:.2f}-{r.high:.2f})"
            compiling = "" if r.compiling is None else f"{r.compiling:.1f}"
            startup = f"{r.startup:.1f}{'*' * r.beside}"
            cells = [workload, r.system + note, rounds, len(r.repeats), times, startup, f"{r.first:.1f}", compiling]
            lines.append(line([*cells, f"{r.pss:.0f}", f"{r.others:.0%}", f"{r.loss:.4f}", r.commit]))
    return "\n".join(lines)


def verdicts_markdown(tables: Mapping[str, Sequence[Row]]) -> str:
    """What the targets say of all workloads as one table."""
    found = [v for workload, table in tables.items() for v in verdicts(workload, table)]
    return "\n".join(head(("work", "target", "found", "verdict")) + [line(v) for v in found])
