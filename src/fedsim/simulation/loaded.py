"""A run from its folder, with what takes its model: `fedsim.load(folder).predict(texts)`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fedsim import record


class Run(record.Run):
    """A run as its folder tells it, which answers for new inputs."""

    __slots__ = ()

    def predict(self, inputs: Any) -> list[str]:
        """Classes of new inputs, texts (a list of strings) or arrays (N, ...), by the run's final model.

        Raises:
            ValueError: the run is not over, or the inputs do not fit its backbone.
        """
        from fedsim.simulation.predict import predict  # JAX and the backbones, for those who ask

        return predict(self, inputs)


def load(directory: str | Path, *, trust_code: bool = False) -> Run:
    """Reads a run's folder; one that is still running, or was stopped, has `summary=None` and no parameters.

    Args:
        trust_code: Python files that its config names may run, also where they are not those that the run is recorded
            with; loading itself runs none.

    Raises:
        ValueError: the folder holds no run, or a damaged one, files of another run, or one of a newer fedsim.
    """
    return Run(*record.load(directory)._replace(trust_code=trust_code))
