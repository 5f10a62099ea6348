"""fedsim: federated parameter-efficient fine-tuning, many clients at once on one accelerator, every byte counted.

The public names are imported on first use (PEP 562), so that `import fedsim` and `fedsim --help` do not wait for JAX.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedsim.backbones.own import Backbone as Backbone
    from fedsim.config import Config as Config
    from fedsim.config import Speed as Speed
    from fedsim.config import main_job as main_job
    from fedsim.core import Algorithm as Algorithm
    from fedsim.core import Average as Average
    from fedsim.core import Batch as Batch
    from fedsim.core import Client as Client
    from fedsim.core import Graph as Graph
    from fedsim.core import Info as Info
    from fedsim.core import Local as Local
    from fedsim.core import Passes as Passes
    from fedsim.core import Peers as Peers
    from fedsim.core import Reduce as Reduce
    from fedsim.core import Task as Task
    from fedsim.core import poisson as poisson
    from fedsim.data.arrays import arrays as arrays
    from fedsim.engine.cohort import Cohort as Cohort
    from fedsim.engine.processes import distributed as distributed
    from fedsim.folds import both as both
    from fedsim.folds import mean as mean
    from fedsim.folds import stack as stack
    from fedsim.report.tables import compare as compare
    from fedsim.simulation.loaded import export as export
    from fedsim.simulation.loaded import load as load
    from fedsim.simulation.simulate import run as run
    from fedsim.sweeps.cells import Sweep as Sweep
    from fedsim.sweeps.study import load_sweep as load_sweep
    from fedsim.sweeps.sweep import sweep as sweep
    from fedsim.testing.contract import check_algorithm as check_algorithm
    from fedsim.training.local import fit as fit
    from fedsim.training.server import reader as reader
    from fedsim.training.server import trainer as trainer
    from fedsim.wire import Packet as Packet
    from fedsim.wire import PerClient as PerClient
    from fedsim.wire import again as again
    from fedsim.wire import coded as coded
    from fedsim.wire import kept as kept

_HOME = {
    "fedsim.backbones.own": ("Backbone",),
    "fedsim.engine.cohort": ("Cohort",),
    "fedsim.config": ("Config", "Speed", "main_job"),
    "fedsim.core": (
        "Algorithm",
        "Average",
        "Batch",
        "Client",
        "Graph",
        "Info",
        "Local",
        "Passes",
        "Peers",
        "Reduce",
        "Task",
        "poisson",
    ),
    "fedsim.folds": ("both", "mean", "stack"),
    "fedsim.data.arrays": ("arrays",),
    "fedsim.training.local": ("fit",),
    "fedsim.training.server": ("reader", "trainer"),
    "fedsim.engine.processes": ("distributed",),
    "fedsim.simulation.loaded": ("export", "load"),
    "fedsim.report.tables": ("compare",),
    "fedsim.simulation.simulate": ("run",),
    "fedsim.sweeps.cells": ("Sweep",),
    "fedsim.sweeps.study": ("load_sweep",),
    "fedsim.sweeps.sweep": ("sweep",),
    "fedsim.testing.contract": ("check_algorithm",),
    "fedsim.wire": ("Packet", "PerClient", "again", "coded", "kept"),
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}
__all__ = sorted(_MODULE_OF)


def _refuse_namesake() -> None:
    """An unrelated PyTorch simulator has the same import name; with both installed, either may be the one imported."""
    # A look at the folders: importlib.metadata takes 0.05 s to import.
    names = ("fedsim-[0-9]*-info", "fedsim.egg-info")
    found = [info for folder in sys.path for name in names for info in Path(folder).glob(name)]
    if not found:
        return
    other = found[0].stem.replace("-", " ")
    raise ImportError(
        f"Expected this environment not to hold the distribution {other}: it is an unrelated project with the same "
        "import name as fedsim-jax. Remove it (pip uninstall fedsim, then pip install --force-reinstall --no-deps "
        "fedsim-jax or pip install -e . again), or use another environment."
    )


_refuse_namesake()


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version  # here, since it takes 0.05 s

        return version("fedsim-jax")
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'fedsim' has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULE_OF[name]), name)


def __dir__() -> list[str]:
    return __all__
