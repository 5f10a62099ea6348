"""Who runs the cells: this process, several processes of this machine, or a cluster. All share nothing but the folder.

Whoever is started only takes cells that nobody has and runs them (`work`), until none is left; it may die at any moment.
"""

from __future__ import annotations

from fedsim.config import one_of
from fedsim.data.dataset import Source
from fedsim.sweeps.work import Work, work_here

LAUNCHERS = ("local",)


def find(name: str, jobs: int, data: Source | None = None) -> Work:
    """The work of a launcher by its name.

    Raises:
        ValueError: an unknown one, one that is not installed, or arrays in memory for other processes.
    """
    one_of(LAUNCHERS, launcher=name)
    return work_here(data)
