"""Where a run stands and what a round's line says, by hand-made numbers: no data, no device."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from fedsim import record
from fedsim.config import Config
from fedsim.simulation.rounds import Cost, Measured, Standing, Times, after, is_evaluated, judged, round_line

DID = Measured(
    up={"head/bias": 24, "head/kernel": 1000},
    down={"head/bias": 30, "head/kernel": 1250},
    clients=5,
    newcomers={"small": 1, "large": 1},
    reported=4,
    nonfinite=1,
    examples=64,
    flops=64 * 35.0,
    occupancy=(0.75, 0.5),
    peers={"transmissions": 7, "broadcast_bytes": 300},
    simulated={"unavailable": 1, "dropped": 1, "late": 0, "surplus": 0, "seconds": 3.0, "total_seconds": 13.0},
)
COST = Cost(setup={"small": 50, "large": 150}, peak=1e4)


def standing(**changes: Any) -> Standing:
    return Standing(np.zeros(8, np.int32))._replace(**changes)


def line(**changes: Any) -> dict[str, Any]:
    options: dict[str, Any] = {
        "phase": "peft",
        "metrics": {"loss": np.float32(0.5), "accuracy": np.float32(0.25), "distance": np.float32(2.0)},
        "scores": {"loss": 0.4, "accuracy": 0.5},
        "each": [0.25, None],
        "simulates": True,
        "most_memory": 2**30,
    }
    stand = after(standing(round=3, totals={"up": 76, "down": 20, "simulated_seconds": 10.0}), DID)
    took = changes.pop("took", Times(2.0, 0.4))
    return round_line(stand, DID, took, changes.pop("cost", COST), **{**options, **changes})


def test_a_line_says_what_was_measured() -> None:
    found = line()
    assert (found["round"], found["phase"], found["loss"], found["accuracy"]) == (3, "peft", 0.5, 0.25)
    assert found["metrics"] == {"distance": 2.0} and found["validation"] == {"loss": 0.4, "accuracy": 0.5}
    assert (found["bytes_up"], found["bytes_down"], found["setup_bytes"]) == (1024, 1280, 200)
    assert (found["total_bytes_up"], found["total_bytes_down"]) == (1100, 1300)
    assert found["validation_clients"] == [0.25, None] and line(each=())["validation_clients"] is None
    assert found["peers"] == {"transmissions": 7, "broadcast_bytes": 300}
    assert (found["clients"], found["reported"], found["nonfinite"], found["examples"]) == (5, 4, 1, 64)
    assert (found["lane_occupancy"], found["row_occupancy"]) == (0.75, 0.5)
    assert found["simulated"]["total_seconds"] == 13.0 and found["bitwise"] and found["most_memory"] == 2**30


def test_rates_leave_compiling_out() -> None:
    found = line()
    assert (found["seconds"], found["compile_seconds"]) == (2.0, 0.4)
    assert found["clients_per_second"] == pytest.approx(5 / 1.6)
    assert found["examples_per_second"] == pytest.approx(64 / 1.6)
    assert found["flops"] == 64 * 35 and found["flops_per_second"] == pytest.approx(64 * 35 / 1.6)
    assert found["mfu"] == pytest.approx(64 * 35 / 1.6 / 1e4)
    assert line(cost=COST._replace(peak=None))["mfu"] is None
    assert math.isfinite(line(took=Times(0.4, 0.4))["clients_per_second"]), "a round that only compiled"


def test_a_line_is_one_that_the_record_takes() -> None:
    record.check_line(line())
    nobody = line(metrics={}, scores=None, simulates=False)
    assert math.isnan(nobody["loss"]) and math.isnan(nobody["accuracy"])
    assert nobody["metrics"] == {} and nobody["validation"] is None and nobody["simulated"] is None
    record.check_line(nobody)


def test_totals_are_whole_numbers_and_nothing_is_changed_in_place() -> None:
    before = standing()
    once = after(before, DID._replace(up={"w": 2**62}))
    twice = after(once, DID._replace(up={"w": 2**62}, simulated={"total_seconds": None}))
    assert before.totals == {"up": 0, "down": 0, "simulated_seconds": 0.0}
    assert twice.totals == {"up": 2**63, "down": 2560, "simulated_seconds": 0.0}


def test_evaluations_fall_on_every_kth_round_and_the_last() -> None:
    config = Config(eval_every=3)
    assert [r for r in range(1, 9) if is_evaluated(config, r, 8)] == [3, 6, 8]


def test_patience_counts_evaluations_without_a_better_one() -> None:
    config, stand = Config(patience=2), standing()
    seen = [(0.5, 0, "rounds"), (0.5, 1, "rounds"), (0.6, 0, "rounds"), (0.1, 1, "rounds"), (0.6, 2, "patience")]
    for accuracy, stale, stopped in seen:
        stand = judged(config, stand, {"accuracy": accuracy}, patient=True)
        assert (stand.stale, stand.stopped) == (stale, stopped)
    assert stand.best == 0.6
    assert judged(config, standing(stale=5, best=0.9), {"accuracy": 0.5}, patient=False).stopped == "rounds"


def test_a_target_ends_the_run_before_patience_does() -> None:
    config = Config(patience=1, target=0.6)
    assert judged(config, standing(best=0.7), {"accuracy": 0.6}, patient=True).stopped == "target"
    assert judged(config, standing(best=0.7), {"accuracy": 0.59}, patient=True).stopped == "patience"


def test_scores_that_are_no_numbers_are_never_better_and_reach_no_target() -> None:
    config = Config(target=0.1, patience=2)
    stand = judged(config, standing(best=0.05, stale=0), {"accuracy": math.nan}, patient=True)
    assert (stand.best, stand.stale, stand.stopped) == (0.05, 1, "rounds")
    stand = judged(config, stand, {"accuracy": math.nan}, patient=True)
    assert (stand.best, stand.stale, stand.stopped) == (0.05, 2, "patience")
    first = judged(config, standing(), {"accuracy": math.nan}, patient=True)
    assert first.best == standing().best
