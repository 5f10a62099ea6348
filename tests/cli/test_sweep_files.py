"""`fedsim sweep FILE:NAME`: other sweeps of a file, which may import the files beside it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from fedsim import own
from fedsim.cli.sweeping import read
from fedsim.sweeps.cells import cells

CODE = """import fedsim
import beside_it

sweep = fedsim.Sweep(base=beside_it.base, seeds=2)
full = fedsim.Sweep(base=beside_it.base.replace(rounds=7), seeds=3)
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "beside_it.py").write_text(
        'import fedsim\nbase = fedsim.Config(backbone="mlp", peft="full", rounds=2)\n'
    )
    (tmp_path / "my.py").write_text(CODE)
    return tmp_path / "my.py"


def test_a_name_of_the_file(file: Path) -> None:
    before = list(sys.path)
    for word, rounds, folder in ((str(file), [2] * 2, "my"), (f"{file}:full", [7] * 3, "my-full")):
        _, sweep, where = read([word])
        assert [c.config.rounds for c in cells(sweep)] == rounds
        assert where == Path("runs") / folder
    assert {c.config.rounds for c in cells(read([f"{file}:full", "--rounds", "5"])[1])} == {5}
    assert sys.path == before


def test_an_unknown_name_is_refused_with_those_there_are(file: Path) -> None:
    with pytest.raises(
        ValueError, match=r"define ful = fedsim.Sweep\(.*it has sweep, full: name one, like .*my.py:sweep"
    ):
        read([f"{file}:ful"])


def test_code_that_a_run_keeps_is_one_file(file: Path) -> None:
    sys.modules.pop("beside_it", None)
    with pytest.raises(ModuleNotFoundError, match="beside_it"):
        own.execute(file, "algorithm")
