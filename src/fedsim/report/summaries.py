"""How a run ended, in numbers: what `summary.json` holds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from fedsim.config import SMALLER, USUAL
from fedsim.record import SCHEMA, Round, plain


def summary(
    lines: Sequence[Round],
    *,
    start: Mapping[str, Any],
    final: Mapping[str, Any],
    full: Mapping[str, int],
    parameters: Mapping[str, int],
    seconds: float,
    stopped: str,
    metric: str = USUAL,
    privacy: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """How a run ended, and what full fine-tuning would have sent in the same rounds to and from the same clients.

    Args:
        lines: all rounds.
        start: `validation` and `test`, each the scores by name or None, before the first round.
        final: the same of the final parameters, and `clients`, how their own tests ended, where they have any.
        full: `bytes_down`, `bytes_up` of one client in one round of full fine-tuning; `setup_bytes`, what all clients
            would be given once besides, is 0 if left out: there the first message brings the backbone.
        parameters: numbers of `trained` and `frozen` parameters.
        seconds: wall time of the whole run, loading and compiling included.
        stopped: why it ended: "rounds", "target", "patience", "epsilon" or "interrupted".
        metric: the score that judges the run.
        privacy: what it has spent, and what that is of; None without privacy.
    """
    sent = totals(_sum(lines, "bytes_up"), _sum(lines, "bytes_down"), _sum(lines, "setup_bytes"))
    whole = totals(
        full["bytes_up"] * _sum(lines, "reported"),
        full["bytes_down"] * _sum(lines, "clients"),
        full.get("setup_bytes", 0),
    )
    best = best_of(lines, metric)
    steady = clients_seconds(lines)
    return plain(
        {
            "schema": SCHEMA,
            "rounds": len(lines),
            "stopped": stopped,
            "start": {"validation": start.get("validation"), "test": start.get("test")},
            "final": {name: final.get(name) for name in ("validation", "test", "clients")},
            "metric": metric,
            "best": best and {"round": best["round"], metric: best["validation"][metric]},
            "bytes": sent,
            "full_fine_tuning_bytes": whole,
            "ratio": whole["total"] / sent["total"] if sent["total"] else None,
            "ratio_with_setup": whole["with_setup"] / sent["with_setup"] if sent["with_setup"] else None,
            "parameters": dict(parameters),
            "clients": _sum(lines, "clients"),
            "examples": _sum(lines, "examples"),
            "nonfinite": _sum(lines, "nonfinite"),
            "simulated": simulated(lines),
            "privacy": None if privacy is None else dict(privacy),
            "seconds": seconds,
            "seconds_in_rounds": _sum(lines, "seconds"),
            "compile_seconds": _sum(lines, "compile_seconds"),
            **{name: _of_server(lines, name) for name in ("server_seconds", "server_flops")},
            "clients_per_second": _sum(lines, "clients") / steady if steady > 0 else None,
            "examples_per_second": _sum(lines, "examples") / steady if steady > 0 else None,
        }
    )


def scored(lines: Sequence[Round], metric: str) -> list[Round]:
    """The rounds with that score on validation: evaluated, by a model whose outputs were finite."""
    return [line for line in lines if line["validation"] and is_number(line["validation"].get(metric))]


def best_of(lines: Sequence[Round], metric: str) -> Round | None:
    """The round with the best of that score, the first of equals; None where none has one."""
    seen, among = scored(lines, metric), min if metric in SMALLER else max
    return among(seen, key=lambda line: line["validation"][metric]) if seen else None


def judge(result: Mapping[str, Any]) -> str:
    """The score that judges a run, by its summary; those of older runs name none."""
    return result.get("metric", USUAL)


def has_diverged(scores: Mapping[str, Any] | None) -> bool:
    """Whether a model was asked and has no score, as its outputs were not finite."""
    return bool(scores) and all(value is None for value in scores.values())


def is_number(x: float | None) -> bool:
    """Whether a score is one: neither None, as the record has what was no number, nor NaN."""
    return x is not None and math.isfinite(x)


def simulated(lines: Sequence[Round]) -> dict[str, Any] | None:
    """Absence and simulated time of a whole run; None where every client took part and nothing took time."""
    seen = [line["simulated"] for line in lines if line.get("simulated")]
    if not seen:
        return None
    counts = {name: _sum(seen, name) for name in ("unavailable", "dropped", "late", "surplus")}
    empty = sum(not line["reported"] for line in lines)
    return {**counts, "empty_rounds": empty, "seconds": seen[-1]["total_seconds"]}


def clients_seconds(lines: Sequence[Round]) -> float:
    """Seconds of the rounds without compiling and without the server's own training."""
    return _sum(lines, "seconds") - _sum(lines, "compile_seconds") - _of_server(lines, "server_seconds")


def totals(up: int, down: int, setup: int) -> dict[str, int]:
    """Bytes of a run: both ways, their sum, the one-off set-up, and the sum with it."""
    return {"up": up, "down": down, "total": up + down, "setup": setup, "with_setup": up + down + setup}


def _sum(lines: Sequence[Round], name: str) -> Any:
    return sum(line[name] for line in lines)


def _of_server(lines: Sequence[Round], name: str) -> float:
    return sum(line.get(name, 0.0) for line in lines)  # earlier versions wrote none
