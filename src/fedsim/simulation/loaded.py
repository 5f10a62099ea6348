"""A run from its folder, with what takes its model: `fedsim.load(folder).predict(texts)`."""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import Any, Literal

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

    def plots(self, folder: str | PathLike[str] | None = None) -> list[Path]:
        """Draws the run's pictures into a folder (default: its own) and gives their files.

        Raises:
            ValueError: no round was evaluated.
        """
        from fedsim.report import plots

        return plots.save([self], self.directory if folder is None else folder)

    def export(self, kind: Literal["peft", "merged"], folder: str | PathLike[str]) -> Path:
        """Writes the final model for others, and gives its file: a LoRA as Hugging Face `peft` saves one, or one backbone.

        Args:
            kind: "peft", or "merged": all that was trained folded into the backbone, our head beside it.

        Raises:
            ValueError: the run is not over, or its model has no such form.
        """
        from fedsim.simulation.predict import export

        return export(self, kind, Path(folder))


def load(directory: str | Path, *, trust_code: bool = False) -> Run:
    """Reads a run's folder; one that is still running, or was stopped, has `summary=None` and no parameters.

    Args:
        trust_code: Python files that its config names may run, also where they are not those that the run is recorded
            with; loading itself runs none.

    Raises:
        ValueError: the folder holds no run, or a damaged one, files of another run, or one of a newer fedsim.
    """
    return Run(*record.load(directory)._replace(trust_code=trust_code))
