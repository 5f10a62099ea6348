"""What the models of a task are judged by: the names of its scores, and which way each is better."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from fedsim.config.words import nearest, shown

if TYPE_CHECKING:
    from fedsim.config.options import Config

# Task -> its scores on a split; the first one judges a run whose `metric` is not set.
TASKS: dict[str, tuple[str, ...]] = {
    "classification": ("accuracy", "loss", "balanced_accuracy", "macro_f1", "top5", "auroc"),
    "language_model": ("perplexity", "loss", "accuracy"),
}
# Task -> those that the batches of training have too.
TRAINED: dict[str, tuple[str, ...]] = {
    "classification": ("loss", "accuracy"),
    "language_model": ("loss", "accuracy", "perplexity"),
}
SCORES = tuple(dict.fromkeys(name for names in TASKS.values() for name in names))
SMALLER = frozenset({"loss", "perplexity"})  # better where smaller; all others are shares, from 0 to 1
USUAL = TASKS["classification"][0]  # the metric of runs that were recorded before there was a choice


def metric_of(config: Config) -> str:
    """The score that judges a run: patience, target and the best round go by it."""
    return config.metric or TASKS[config.task][0]


def metric_of_clients(metric: str) -> str:
    """The score by which clients' own tests are summed up: the run's, where a client's few rows give it, else the usual one."""
    return metric if any(metric in names for names in TRAINED.values()) else USUAL


def is_better(metric: str, value: float, than: float | None) -> bool:
    """Whether a value is better than the best so far; None: there is none yet. Never one that is no finite number."""
    if not math.isfinite(value):
        return False
    return than is None or (value < than if metric in SMALLER else value > than)


def is_reached(metric: str, value: float, target: float) -> bool:
    """Whether a value is at the target or beyond, from the metric's own side."""
    return math.isfinite(value) and (value <= target if metric in SMALLER else value >= target)


def check_scores(config: Config) -> None:
    """Refuses a metric that the task has not, and a target that no value of it can be.

    Raises:
        ValueError: names option, value, rule and remedy.
    """
    names, metric, target = TASKS[config.task], metric_of(config), config.target
    if metric not in names:
        raise ValueError(
            f"Expected metric={shown(metric)} to be one of {', '.join(names)}, the scores of task={config.task}"
            f"{nearest(metric, names)}."
        )
    if target is None:
        return
    if metric not in SMALLER and not 0 < target <= 1:
        raise ValueError(f"Expected 0 < target={target} <= 1 of metric={metric}; write 62 % as 0.62.")
    lowest = 1.0 if metric == "perplexity" else 0.0
    if metric in SMALLER and not target > lowest:
        raise ValueError(f"Expected target={target} > {lowest} of metric={metric}; give a larger one.")
