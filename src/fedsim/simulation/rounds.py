"""One round in numbers: where a run stands, what a round did, and the line that the record keeps of it. All of it is pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from fedsim import network
from fedsim.config import Config, Data, Evaluation, is_better, is_reached, metric_of
from fedsim.engine.cohort import Cohort
from fedsim.engine.groups import GroupedCohort
from fedsim.evaluation.metrics import of_training


class Standing(NamedTuple):
    """Where a run stands after a round: with the server's state and the clients' memory, all that a checkpoint holds."""

    met: np.ndarray  # (N,), int32: the last round in which a client was in the cohort, 0 for never; written in place
    round: int = 0
    totals: Mapping[str, Any] = {"up": 0, "down": 0, "simulated_seconds": 0.0}  # bytes, and simulated time
    best: float | None = None  # value of the metric on validation so far
    stale: int = 0  # evaluations since then, in this phase
    start: dict[str, Any] | None = None  # scores before round 1
    stopped: str = "rounds"  # why the run ends: "rounds", "target", "patience", "epsilon", or "finished" where the algorithm says so
    elapsed: float = 0.0  # seconds that earlier processes took
    bitwise: bool = True  # equal to a run that was never disturbed, bit for bit


class Measured(NamedTuple):
    """What a round did, on the host."""

    up: dict[str, int]  # bytes of all clients together, by leaf
    down: dict[str, int]
    clients: int  # that got a message
    newcomers: Mapping[str, int]  # of these, those that were met for the first time, by group
    reported: int
    nonfinite: int  # replies that were left out
    examples: int
    flops: float  # of the clients' steps
    occupancy: tuple[float, float]  # of lanes, of rows computed
    peers: dict[str, int] | None  # what went from peer to peer, where anything did
    simulated: dict[str, Any]  # absence and simulated time, as `network.figures` gives them


class Cost(NamedTuple):
    """What a phase costs, whatever happens in it."""

    setup: Mapping[str, int]  # bytes that a client is given once, before its first round, by group
    peak: float | None  # published FLOP/s of all devices; None where none is known, as of a CPU


class Times(NamedTuple):
    """Wall time of a round."""

    seconds: float
    compiling: float  # of these
    server: float = 0.0  # of these, in the server's own training, without compiling

    @property
    def steady(self) -> float:
        """Seconds of the clients without compiling, above 0."""
        return max(self.seconds - self.compiling - self.server, 1e-9)


def measured(cohort: Cohort | GroupedCohort, simulated_before: float) -> Measured:
    """What a cohort's exchanges did.

    Args:
        simulated_before: simulated seconds of the rounds before.
    """
    down, up = cohort.traffic()
    done = cohort.done
    return Measured(
        up=up,
        down=down,
        clients=int(cohort.present.sum()),
        newcomers={
            name: int((each.last[each.present] == 0).sum()) for name, each in (cohort.groups or {"": cohort}).items()
        },
        reported=int(cohort.reports.sum()),
        nonfinite=int(sum(cohort.fetch([e.info.nonfinite for e in done]))),
        examples=sum(e.examples for e in done),
        flops=cohort.flops(),
        occupancy=(
            float(np.mean([e.occupancy[0] for e in done] or [0.0])),
            float(np.mean([e.occupancy[1] for e in done] or [0.0])),
        ),
        peers=cohort.peers(),
        simulated=network.figures(cohort.conditions, cohort.outcomes(), simulated_before),
    )


def unread(options: Data, cohort: Cohort | GroupedCohort) -> list[str]:
    """Shares of the server, as `server_share=0.1`, that the algorithm did not look at."""
    given = {name: getattr(options, name) for name in ("public_share", "server_share")}
    return [f"{name}={share}" for name, share in given.items() if share and name not in cohort.read]


def after(stand: Standing, did: Measured) -> Standing:
    """Where the run stands once a round's bytes and time are added."""
    totals = {
        "up": stand.totals["up"] + sum(did.up.values()),
        "down": stand.totals["down"] + sum(did.down.values()),
        "simulated_seconds": did.simulated["total_seconds"] or 0.0,
    }
    return stand._replace(totals=totals)


def is_evaluated(config: Evaluation, round: int, last: int) -> bool:
    """Whether a round ends with a look at the validation set; the `last` one of a phase does."""
    return round % config.eval_every == 0 or round == last


def judged(config: Config, stand: Standing, scores: Mapping[str, float], *, patient: bool) -> Standing:
    """Where the run stands after an evaluation: the best value of its metric so far, and whether that is a reason to stop.

    Args:
        patient: patience counts here; it does in the last phase only.
    """
    metric = metric_of(config)
    value = scores[metric]
    better = is_better(metric, value, stand.best)  # never where it is NaN, as of a model that has diverged
    stand = stand._replace(stale=0 if better else stand.stale + 1, best=value if better else stand.best)
    if config.target is not None and is_reached(metric, value, config.target):
        return stand._replace(stopped="target")
    if patient and config.patience is not None and stand.stale >= config.patience:
        return stand._replace(stopped="patience")
    return stand


def round_line(
    stand: Standing,
    did: Measured,
    took: Times,
    cost: Cost,
    *,
    phase: str,
    metrics: Mapping[str, Any],
    scores: Mapping[str, float] | None,
    each: Sequence[float | None],
    simulates: bool,
    most_memory: int,
    task: str = "classification",
    server_flops: float = 0.0,
    privacy: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The round's line of `rounds.jsonl`; `docs/record.md` has every field.

    Args:
        stand: after this round.
        metrics: of the algorithm's round; the task's scores stand apart.
        scores: on the validation set, where it was evaluated.
        each: the metric by client, where clients' own models were.
        simulates: clients may be absent or take time.
        most_memory: bytes of the device's memory that were in use at most so far.
        task: of the config.
        server_flops: of the server's own training.
        privacy: what is spent so far, and what that is of.
    """
    trained = of_training(task, metrics)
    rate = did.flops / took.steady
    return {
        "round": stand.round,
        "phase": phase,
        **trained,
        "metrics": {k: float(v) for k, v in metrics.items() if k not in trained},
        "validation": scores,
        "validation_clients": [*each] or None,
        "bytes_up": sum(did.up.values()),
        "bytes_down": sum(did.down.values()),
        "bytes_up_leaves": did.up,
        "bytes_down_leaves": did.down,
        "setup_bytes": sum(count * cost.setup[name] for name, count in did.newcomers.items()),
        "total_bytes_up": stand.totals["up"],
        "total_bytes_down": stand.totals["down"],
        "clients": did.clients,
        "reported": did.reported,
        "nonfinite": did.nonfinite,
        "examples": did.examples,
        "seconds": took.seconds,
        "compile_seconds": took.compiling,
        "server_seconds": took.server,
        "clients_per_second": did.clients / took.steady,
        "examples_per_second": did.examples / took.steady,
        "flops": did.flops,
        "server_flops": server_flops,
        "flops_per_second": rate,
        "mfu": None if cost.peak is None else rate / cost.peak,
        "lane_occupancy": did.occupancy[0],
        "row_occupancy": did.occupancy[1],
        "simulated": did.simulated if simulates else None,
        "peers": did.peers,
        "privacy": None if privacy is None else dict(privacy),
        "most_memory": most_memory,
        "bitwise": stand.bitwise,
    }
