"""A metric's direction, targets that can be reached, and options of runs that were recorded before there was a choice."""

from __future__ import annotations

import math

import pytest

from fedsim.config import Config, is_better, is_reached, metric_of, metric_of_clients, older


def test_a_task_has_a_metric_of_its_own() -> None:
    assert metric_of(Config()) == "accuracy" and metric_of(Config(task="language_model")) == "perplexity"
    assert metric_of(Config(metric="macro_f1")) == "macro_f1"
    assert [metric_of_clients(m) for m in ("macro_f1", "loss", "perplexity")] == ["accuracy", "loss", "perplexity"]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_the_better_value_is_on_the_metrics_side(bad: float) -> None:
    assert is_better("accuracy", 0.5, 0.4) and not is_better("accuracy", 0.5, 0.5)
    assert is_better("perplexity", 10.0, 11.0) and not is_better("loss", 0.5, 0.4)
    assert is_better("accuracy", 0.0, None) and is_better("loss", 9.0, None)
    assert is_reached("accuracy", 0.5, 0.5) and not is_reached("accuracy", 0.4, 0.5)
    assert is_reached("perplexity", 20.0, 20.0) and not is_reached("perplexity", 21.0, 20.0)
    for metric in ("accuracy", "perplexity"):
        assert not is_better(metric, bad, None) and not is_reached(metric, bad, 0.5)


def test_an_unknown_metric_is_refused_with_the_tasks_own_and_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"metric='perplexty' to be one of perplexity, loss, accuracy, the scores of "
                                         r"task=language_model \(did you mean perplexity\?\)"):  # fmt: skip
        Config(task="language_model", metric="perplexty")
    with pytest.raises(ValueError, match=r"metric='perplexity' to be one of accuracy, loss, .* task=classification"):
        Config(metric="perplexity")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": 62.0}, "0 < target=62.0 <= 1 of metric=accuracy; write 62 % as 0.62"),
        ({"target": 0.5, "task": "language_model"}, "target=0.5 > 1.0 of metric=perplexity"),
        ({"target": 0.0, "metric": "loss"}, "target=0.0 > 0.0 of metric=loss"),
    ],
)
def test_a_target_that_no_value_reaches_is_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Config(**options)
    assert Config(task="language_model", target=30.0).target == 30.0 and Config(metric="loss", target=2.0).target == 2.0


def test_hashes_of_older_configs_stay() -> None:
    """Checkpoints of before know their config by these."""
    assert Config().hash() == "487ee08c100d" and Config(target=0.7).hash() == "178c80efc70e"
    others = {Config(metric="loss").hash(), Config(task="language_model").hash(), Config(target=0.8).hash()}
    assert len(others | {"487ee08c100d", "178c80efc70e"}) == 5


def test_options_are_read_by_their_old_names() -> None:
    assert older.today({"target_accuracy": 0.7, "rank": 4}) == {"target": 0.7, "rank": 4}
    assert older.hashed({"target": 0.7, "metric": None, "task": "language_model"}) == {
        "target_accuracy": 0.7,
        "task": "language_model",
    }
