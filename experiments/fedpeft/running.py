"""Runs of an experiment's cells: the search for a learning rate, data that runs share, and every run in a folder.

A run lies in a folder named by its options: a stopped command goes on where it stopped, and a cell of two axes is
run once. vision.py shares the search and the folders.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rows import rows

import fedsim
from fedsim import record
from fedsim.config import Config, Data, Speed
from fedsim.data import partition
from fedsim.data.dataset import Dataset
from fedsim.engine.host import tune_host
from fedsim.randomness import stream
from fedsim.simulation import build, current, needs
from fedsim.simulation.build import Problem
from fedsim.units import share


class Experiment(NamedTuple):
    """What one command runs."""

    axis: str
    default: Config
    """The cell in which rates are chosen."""
    cells: dict[str, dict[str, Any]]
    """Name -> options in which the cell differs from the default one."""
    methods: dict[str, dict[str, Any]]
    """Name -> options of the method; they win over the default cell's."""
    seeds: tuple[int, ...]
    grid: tuple[float, ...]
    """Learning rates, ascending."""
    targets: dict[str, float]
    """Data set -> validation accuracy for the bytes to a target."""
    test_examples: int | None
    """Test examples that are read, drawn once (None: all)."""
    speed: Speed


def search(score: Callable[[float], float], grid: Sequence[float]) -> tuple[dict[float, float], float]:
    """Scores of the rates tried, and the best rate: the middle of the grid, and outwards while the best is at its end."""
    middle = len(grid) // 2
    tried = {rate: score(rate) for rate in grid[max(middle - 1, 0) : middle + 2]}
    while True:
        best = max(tried, key=lambda rate: tried[rate])
        at = grid.index(best)
        ahead = [rate for rate in grid[max(at - 1, 0) : at + 2] if rate not in tried]
        if not ahead:
            return dict(sorted(tried.items())), best
        tried |= {rate: score(rate) for rate in ahead}


def upwards(score: Callable[[float], float], grid: Sequence[float], chance: float) -> dict[float, float]:
    """Scores of the rates from the smallest on, up to one that diverges: at chance, after a smaller one was above it.

    From the smallest, since in a skewed cell a walk from the middle ends on noise, far from the small rates of full
    fine-tuning.
    """
    tried: dict[float, float] = {}
    for rate in grid:
        tried[rate] = score(rate)
        if tried[rate] <= chance < max(tried.values()):
            break
    return tried


def finished(config: Config, speed: Speed, folder: Path, problem: Problem) -> record.Run:
    """The run in that folder: as it is, gone on with, or made."""
    if not (folder / record.CONFIG).is_file():
        return fedsim.run(config, speed, out=folder, quiet=True, problem=problem)
    found = record.load(folder)
    if found.config != config:
        raise ValueError(f"Expected {folder} to hold a run of the same config; remove it, or choose another --runs.")
    return found if found.summary else fedsim.run(resume=folder, quiet=True, problem=problem)


def changed(config: Config) -> dict[str, Any]:
    """The options that are not the default; a later option of fedsim changes neither them nor a run's folder."""
    return {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if getattr(config, f.name) != f.default}


def name_of(config: Config) -> str:
    """A run's folder: 12 hex digits of a hash of its changed options."""
    return hashlib.sha256(json.dumps(changed(config), sort_keys=True).encode()).hexdigest()[:12]


def thinned(data: Dataset, count: int | None) -> Dataset:
    """The set with only `count` of its test rows, the same ones for every seed where the set has a test split."""
    if count is None or count >= len(data.test):
        return data
    test = np.sort(stream(0, "test rows of an experiment").permutation(data.test)[:count])
    kept = np.sort(np.concatenate([data.train, data.validation, test]))
    train, validation, test = (np.searchsorted(kept, rows) for rows in (data.train, data.validation, test))
    natural = {key: values[kept] for key, values in data.natural.items()}
    return data._replace(x=data.x[kept], y=data.y[kept], train=train, validation=validation, test=test, natural=natural)


def problem_of(config: Config, speed: Speed, test_examples: int | None) -> Problem:
    """Data, partition and cached features, shared by all runs that differ in nothing which these depend on."""
    shared = {f.name: getattr(config, f.name) for f in dataclasses.fields(Data)}
    shared |= {name: getattr(config, name) for name in ("backbone", "weights", "pool", "image_size", "seed")}
    return _problem(Config(**shared, peft="head", clients_per_round=1), speed, test_examples)


@functools.lru_cache(maxsize=3)
def _problem(config: Config, speed: Speed, test_examples: int | None) -> Problem:
    needs.fetch_missing(config)
    problem = build.problem(config, speed)
    data = thinned(problem.dataset, test_examples)
    # Cells that differ in the clients of a round share their programs.
    return problem._replace(dataset=data, partition=partition.make(config, data), texts=None, trainers={})


def blind(problem: Problem) -> Problem:
    """The problem without its test rows, with programs of its own, which all rates share."""
    return problem._replace(dataset=problem.dataset._replace(test=problem.dataset.validation), trainers={})


def tested(run: record.Run, problem: Problem) -> float:
    """Test accuracy of a finished run that did not see the test rows."""
    now = current.prepare(problem, build.phases(run.config)[-1], run.parameters)
    return now.trainer.test(now.server)["accuracy"]


def choose_rates(experiment: Experiment, runs: Path) -> dict[str, dict[str, Any]]:
    """For each method the best rate of the grid in the default cell: by validation, with seed 0, without test rows."""
    found: dict[str, dict[str, Any]] = {}
    for name in sorted(experiment.methods, key=lambda name: name != "head"):
        found[name] = choose_rate(experiment, name, method_config(experiment, name, {}, found), runs / "rates")
    return {name: found[name] for name in experiment.methods}


def choose_rate(experiment: Experiment, method: str, config: Config, folder: Path) -> dict[str, Any]:
    """The search for one method: the rate, whether it is at the grid's edge, and what every rate tried gave and took."""
    e = experiment
    unseen = blind(problem_of(config, e.speed, e.test_examples))
    seconds: dict[str, float] = {}

    def score(rate: float) -> float:
        tried = config.replace(lr=rate)
        summary = finished(tried, e.speed, folder / name_of(tried), unseen).summary or {}
        seconds[f"{rate:g}"] = round(summary["seconds"], 1)
        accuracy = summary["final"]["validation"]["accuracy"]
        print(f"{config.dataset}, {method}, rate {rate:g}: validation {share(accuracy)}", flush=True)
        return -math.inf if accuracy is None else accuracy  # a model that diverged is worse than any other

    rows = unseen.dataset.validation
    tried = upwards(score, e.grid, float(np.bincount(unseen.dataset.y[rows]).max() / len(rows)))
    best = max(tried, key=lambda rate: tried[rate])
    return {
        "rate": best,
        "at_the_edge": best in (e.grid[0], e.grid[-1]),
        "validation_by_rate": {f"{rate:g}": accuracy for rate, accuracy in tried.items()},
        "seconds_by_rate": seconds,
    }


def method_config(
    experiment: Experiment, method: str, cell: dict[str, Any], rates: dict[str, dict[str, Any]]
) -> Config:
    """The default cell with the options of a cell and a method; rounds of the head alone take the head's own rate."""
    head = {"head_lr": rates["head"]["rate"]} if "head" in rates and method != "head" else {}
    return experiment.default.replace(**{**head, **cell, **experiment.methods[method]})


def run_config(experiment: Experiment, cell: str, method: str, seed: int, rates: dict[str, dict[str, Any]]) -> Config:
    """The config of one run, at the method's rate."""
    config = method_config(experiment, method, experiment.cells[cell], rates)
    return config.replace(lr=rates[method]["rate"], seed=seed)


def run(experiment: Experiment, runs: Path, out: Path, more: dict[str, Any] | None = None) -> dict[str, Any]:
    """Runs what is missing, seed after seed, and writes the JSON file after each run.

    Args:
        runs: folder of the runs; they hold trained weights.
        out: the JSON file.
        more: further facts for it.
    """
    e = experiment
    tune_host(e.speed)
    rates = choose_rates(e, runs)
    measured: dict[str, dict[str, dict[str, Any]]] = {cell: {name: {} for name in e.methods} for cell in e.cells}
    sets: dict[str, dict[str, Any]] = {}
    result: dict[str, Any] = {}
    for seed in e.seeds:
        for cell in e.cells:
            for name in e.methods:
                config = run_config(e, cell, name, seed, rates)
                problem = problem_of(config, e.speed, e.test_examples)
                sought = runs / "rates" / name_of(config)
                if sought.is_dir():  # the default cell at the best rate: trained already
                    done = finished(config, e.speed, sought, blind(problem))
                    measured[cell][name][str(seed)] = measure(done, tested(done, problem))
                else:
                    done = finished(config, e.speed, runs / "cells" / name_of(config), problem)
                    measured[cell][name][str(seed)] = measure(done)
                sets[cell] = facts(problem.dataset) | {"target": e.targets.get(config.dataset)}
                print(f"{cell}, {name}, seed {seed}: test {measured[cell][name][str(seed)]['test']:.3f}", flush=True)
                result = {
                    "axis": e.axis,
                    "seeds": sorted({int(s) for of_cell in measured.values() for of in of_cell.values() for s in of}),
                    "grid": e.grid,
                    "rates": rates,
                    "default": changed(e.default),
                    "sets": sets,
                    "cells": {
                        c: {m: s for m, s in of_cell.items() if s} for c, of_cell in measured.items() if any(of_cell.values())
                    },
                    **{key: value for key, value in record.machine().items() if key != "platform"},  # the kernel
                    **(more or {}),
                }  # fmt: skip
                result["rows"] = rows(result)
                record.write_json(out, result)
    return json.loads(out.read_text())


def facts(data: Dataset) -> dict[str, Any]:
    """Sizes of the splits, classes, share of the largest class, licence."""
    sizes = {split: len(getattr(data, split)) for split in ("train", "validation", "test")}
    largest = float(np.bincount(data.y[data.test]).max() / len(data.test))
    return {**sizes, "classes": len(data.classes), "largest_class": largest, "licence": data.licence}


def measure(run: record.Run, test: float | None = None) -> dict[str, Any]:
    """What is kept of a run: its accuracies, its bytes, and validation accuracy against bytes sent both ways.

    Args:
        test: test accuracy of a run that did not see the test rows.
    """
    last, summary = run.rounds[-1], run.summary or {}
    seen = [line for line in run.rounds if line["validation"]]
    return {
        "options": changed(run.config),
        "validation": summary["final"]["validation"]["accuracy"],
        "test": summary["final"]["test"]["accuracy"] if test is None else test,
        "parameters": summary["parameters"]["trained"],
        "client_up": last["bytes_up"] // last["clients"],
        "client_down": last["bytes_down"] // last["clients"],
        "total": sent(last),
        "setup": sum(line["setup_bytes"] for line in run.rounds),
        "curve": [[line["round"], sent(line), line["validation"]["accuracy"]] for line in seen],
        "seconds": round(summary["seconds"], 1),
        "git": run.about["git"],
    }


def sent(line: record.Round) -> int:
    """Bytes both ways up to and with this round, without the one-off set-up."""
    return line["total_bytes_up"] + line["total_bytes_down"]
