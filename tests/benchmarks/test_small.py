"""Benchmarks run as a user runs them, small: they end well and write figures, with where and with what they were measured.

Left out are those that take long even so, as they compile much or start many processes (`accelerator.py`, `algorithms.py`,
`allocator.py`, `head_cache.py`, `batch_shapes.py`, `convolution.py`, `population.py`, `scaling.py`), `startup.py` (packaged
weights), `tpu_compile.py` (a TPU's compiler), and `compare.py` and `tables.py`, which measure nothing.
"""

from __future__ import annotations

import importlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["lanes", "layers", "length_buckets", "mechanisms", "scan_blocks", "sharing", "streaming"]
)
def test_a_small_run_writes_its_figures(
    name: str, tmp_path: Path, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """From a copy of the scripts, since results go beside them."""
    shutil.copytree(BENCHMARKS, tmp_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("results", "peers"))
    (script,) = tmp_path.glob(f"*/{name}.py")
    command = [sys.executable, str(script.relative_to(tmp_path)), "--small"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (file,) = (tmp_path / "results").iterdir()
    assert file.name == f"{name}-small.json"
    found = json.loads(file.read_text())
    assert found["benchmark"] == name and found["options"]["small"] and found["command"] == [script.name, "--small"]
    assert found["device"]["count"] >= 1 and found["cores"] >= 1 and found["processor"]
    assert found["versions"]["jax"] and "git" in found
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    assert importlib.import_module("compare").by_path(found), "figures, each with a path of its own"
