"""What experiments that set methods beside each other share: rows over seeds, their table, and how both are kept.

    python experiments/methods.py runs/communication --target 0.9              (the table of a sweep's folder)
    python experiments/methods.py runs/communication --target 0.9 --keep experiments/results/fed_obd_communication_small.json

A tuned sweep chooses rates on validation by itself. Where clients answer by models of their own, their own tests are all that
validates a run, so `measured` chooses rates in a first study on other data than those of the table.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tyro

import fedsim
from fedsim import Config, Speed, Sweep, load_sweep, record
from fedsim.record import Run
from fedsim.sweeps.study import Setting, Study
from fedsim.units import size

METHOD = "method"
FIRST = "FedAvg"  # whose bytes and seconds are 1
ABOUT = ("versions", "python", "processor", "cores", "device")


def answering(run: Run) -> float:
    """The mean over the clients of their own tests, where these are asked; else the score on the test examples.

    Of the server's model where it has one, or of the clients' own where these answer.
    """
    assert run.summary is not None
    final = run.summary["final"]
    if found := final.get("clients"):
        return found["global" if "global" in found else "memory"]["mean"]
    return final["test"][run.summary["metric"]]


def result(
    study: Study, target: float | None = None, rates: Sequence[float] = (), setup: bool = False
) -> dict[str, Any]:
    """A row for each setting of a sweep over its seeds, and what it was run on.

    Args:
        target: score on validation, for the bytes until it is reached.
        rates: learning rates that were tried (default: those of the sweep's own search).
        setup: what all clients are given once, too, where methods differ in it.
    """
    tried = list(rates) or [cell.config.lr for cell in study.tuning]
    runs = {run.directory: run for run in study.runs()}
    settings = [setting for setting in study.settings() if setting.rows]
    found = [row_of(study, setting, runs, target, tried) for setting in settings]
    if setup:
        for row, setting in zip(found, settings, strict=True):
            row["setup"] = statistics.mean(one["setup_bytes"] for one in setting.rows)
    abouts = [run.about for run in runs.values()]
    commits = dict.fromkeys(
        about["git"]["commit"][:7] + "+" * about["git"]["changed"] for about in abouts if about["git"]
    )
    first = {name: abouts[0][name] for name in ABOUT}
    return {"rows": found, "target": target, "git": list(commits), "date": abouts[0]["started"][:10], **first}


def row_of(
    study: Study, setting: Setting, runs: Mapping[Any, Run], target: float | None, tried: Sequence[float]
) -> dict[str, Any]:
    """What `table` prints of a setting."""
    own = [runs[study.places[cell.key]] for cell in setting.cells if study.places[cell.key] in runs]
    rate = own[0].config.lr
    reached, seeds = study.bytes_to(setting, target)
    validation = setting.over_seeds("validation")
    return {
        METHOD: study.name_of(setting, [name for name in study.shown() if name != "lr"]),
        "seeds": len(own),
        "scores": [answering(run) for run in own],
        "validation": validation and validation[0],
        "rate": rate,
        "at_the_edge": len(set(tried)) > 1 and rate in (min(tried), max(tried)),
        "bytes": statistics.mean(row["bytes"] for row in setting.rows),
        "bytes_to_target": reached,
        "seeds_at_target": seeds,
        "seconds": statistics.median(seconds for run in own for seconds in last_phase(run.rounds)),
        "parameters": setting.rows[0]["parameters"],
    }


def last_phase(rounds: Sequence[Mapping[str, Any]]) -> list[float]:
    """Seconds of each round without compiling; of the last phase, as a head that is trained first takes next to none."""
    return [r["seconds"] - r["compile_seconds"] for r in rounds if r["phase"] == rounds[-1]["phase"]]


def measured(
    choosing: Config, final: Config, methods: Mapping[str, dict[str, Any]], rates: Sequence[float], out: Path, *,
    seeds: int = 3, keep: Path | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Runs both studies, or what is missing of them: the first chooses each method's rate, the second is the result.

    Args:
        choosing, final: on data that have nothing to do with each other.
        rates: the grid, of every method.
        seeds: of the second study.
        keep: file of the result as JSON.
    """
    speed = Speed(checkpoint_every=1000)
    grid = {METHOD: dict(methods), "lr": list(rates)}
    first = fedsim.sweep(Sweep(base=choosing, grid=grid, seeds=[100], speed=speed), out=out / "rates")
    runs: dict[str, list[Run]] = {}
    for row, run in zip((row for row in first.rows() if row["state"] == "done"), first.runs(), strict=True):
        runs.setdefault(row[METHOD], []).append(run)
    best = {name: max(each, key=answering).config.lr for name, each in runs.items()}
    chosen = {name: {**options, "lr": best[name]} for name, options in methods.items()}
    study = fedsim.sweep(Sweep(base=final, grid={METHOD: chosen}, seeds=seeds, speed=speed), out=out / "table")
    found = result(study, rates=rates)
    if keep is not None:
        write(found, keep)
    return found


def spread(values: Sequence[float]) -> str:
    """`0.735 ± 0.010`; `0.735` of one seed."""
    mean = f"{statistics.mean(values):.3f}"
    return mean + (f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else "")


def table(found: Mapping[str, Any]) -> str:
    """A result as Markdown. Bytes are both ways, of all clients and rounds; those of peers count once."""
    rows = found["rows"]
    base = next((row for row in rows if row[METHOD].startswith(FIRST)), rows[0])
    target = found["target"]
    columns = ["method", "score", "rate", "bytes", f"/ {base[METHOD]}", *([f"bytes to {target:g}"] if target else [])]
    setup = any("setup" in row for row in rows)
    columns += [*(["set-up"] if setup else []), "seconds a round", f"/ {base[METHOD]}"]
    lines = [f"| {' | '.join(columns)} |", "|---" + "|---:" * (len(columns) - 1) + "|"]
    for row in rows:
        cells = [row[METHOD], spread(row["scores"]), f"{row['rate']:g}{' (edge)' if row['at_the_edge'] else ''}"]
        cells += [size(round(row["bytes"])), ratio(row["bytes"], base["bytes"])]
        if target:
            reached = "–" if row["bytes_to_target"] is None else size(row["bytes_to_target"])
            some = 0 < row["seeds_at_target"] < row["seeds"]
            cells.append(reached + (f" ({row['seeds_at_target']} of {row['seeds']})" if some else ""))
        cells += [size(round(row["setup"]))] if setup else []
        cells += [f"{row['seconds']:.2f}", ratio(row["seconds"], base["seconds"])]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def ratio(value: float, base: float) -> str:
    """As a multiple of the base; empty where that is 0."""
    return f"{value / base:.2f}" if base else ""


def write(found: Mapping[str, Any], file: Path) -> None:
    """Writes a result."""
    file.write_text(json.dumps(record.plain(found), indent=1) + "\n", encoding="utf-8")


def main(directory: tyro.conf.Positional[Path], target: float | None = None, keep: Path | None = None) -> None:
    """Prints the table of a sweep's folder.

    Args:
        directory: where the sweep is.
        target: score on validation, for the bytes until it is reached.
        keep: file of the result as JSON.
    """
    found = result(load_sweep(directory), target)
    if keep is not None:
        write(found, keep)
    print(table(found))


if __name__ == "__main__":
    tyro.cli(main)
