"""`experiments/fed_et/architectures.py`: its architectures share a head and are as large as it says; its small form runs."""

from __future__ import annotations

import math
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from fedsim import own
from fedsim.config import groups_of
from fedsim.data import assets
from fedsim.simulation.build import split_model

FILE = Path(__file__).parents[2] / "experiments" / "fed_et" / "architectures.py"


@pytest.fixture(scope="module")
def experiment() -> ModuleType:
    return own.execute(FILE, "experiment", beside=True)


def test_its_architectures_are_those_that_it_says(experiment: ModuleType) -> None:
    """The numbers of trained parameters; the largest is the server's; heads of one shape, nobody's share but the server's missing."""
    images: Any = SimpleNamespace(x=np.zeros((1, 28, 28), np.uint8), classes=range(10))
    groups = groups_of(experiment.BASE.replace(**experiment.METHODS["Fed-ET"]))
    models = {group.name: split_model(group.config, images) for group in groups}
    counts = {name: sum(math.prod(leaf.shape) for leaf in model.trained.values()) for name, model in models.items()}
    assert counts == {"mlp": 113_546, "lora": 20_362, "linear": 50_890, "server": 276_554}
    assert all(f"({count:,}" in (experiment.__doc__ or "") for count in counts.values())
    assert {model.trained["head/kernel"].shape for model in models.values()} == {(64, 10)}
    assert [group.name for group in groups if group.share is None] == ["server"]


@pytest.mark.slow
def test_its_small_form_runs(experiment: ModuleType, tmp_path: Path) -> None:
    if not assets.is_fetched("fashion_mnist"):
        pytest.skip("Fashion-MNIST is not in the cache: fedsim data fetch fashion_mnist")
    rows = {row["method"]: row for row in experiment.main(tmp_path, small=True)["rows"]}
    assert list(rows) == list(experiment.FEW)
    assert rows["local only, smallest"]["bytes"] == 0
    assert all(0.1 < row["scores"][0] <= 1 for row in rows.values())
