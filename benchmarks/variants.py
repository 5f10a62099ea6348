"""Rounds of runs that differ in some options, in turn: seconds of each round, and what lies on a device."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping
from typing import Any

import report
from fedsim import Config
from fedsim.profiling import rounds
from fedsim.simulation import build, needs
from fedsim.simulation.current import Current, prepare


def prepared(config: Config, lanes: int) -> Current:
    """The run's only phase, before its first round."""
    needs.fetch_missing(config)
    problem = build.problem(config, dataclasses.replace(report.speed(), lanes=lanes))
    return prepare(problem, build.phases(config)[0], None)


def bytes_on_device(now: Current) -> dict[str, int]:
    """What lies on a device during a round, by what it is; temporaries by the compiled program's own analysis."""
    with rounds.stopwatch(now.trainer.engine) as seen:
        rounds.run_round(now)
    whole = seen._replace(segment=seen.segment[0], shapes=seen.segment[1])
    return {name: size for name, size in rounds.memory(now, whole).items() if not name.startswith("host")}


def measured(configs: Mapping[str, Config], lanes: int, repeats: int) -> list[dict[str, Any]]:
    """A row for each: seconds of its first round, run `repeats` times after one that compiles, and bytes on a device.

    One round of all, then the next, so that a disturbance hits all.
    """
    made = {name: prepared(config, lanes) for name, config in configs.items()}
    held = {name: bytes_on_device(now) for name, now in made.items()}
    seconds = report.interleaved(
        {name: lambda now=now: rounds.run_round(now)[1:] for name, now in made.items()}, repeats
    )
    return [{"name": name, "seconds": seconds[name], "bytes": held[name]} for name in made]


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: medians, and ratios to the first row."""
    lines = ["| | seconds a round | ratio | MB on a device | ratio |", "|---|---:|---:|---:|---:|"]
    first, base = statistics.median(rows[0]["seconds"]), sum(rows[0]["bytes"].values())
    for row in rows:
        median, size = statistics.median(row["seconds"]), sum(row["bytes"].values())
        lines.append(f"| {row['name']} | {median:.2f} | {median / first:.2f} | {size / 1e6:,.0f} | {size / base:.2f} |")
    return "\n".join(lines)
