"""A run from its folder, with what takes its model: `fedsim.load(folder).predict(texts)`."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any, Literal, get_args, overload

from fedsim import record
from fedsim.config import one_of

Kind = Literal["peft", "merged", "memories"]


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

    @overload
    def generate(
        self,
        texts: str,
        *,
        tokens: int = 64,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        chat: bool = False,
    ) -> str: ...

    @overload
    def generate(
        self, texts: Sequence[str], *, tokens: int = 64, temperature: float = 0.0, top_p: float = 1.0, seed: int = 0,
        chat: bool = False,
    ) -> list[str]: ...  # fmt: skip

    def generate(
        self, texts: str | Sequence[str], *, tokens: int = 64, temperature: float = 0.0, top_p: float = 1.0, seed: int = 0,
        chat: bool = False,
    ) -> str | list[str]:  # fmt: skip
        """What the run's final language model says behind a text, or behind each of several.

        Args:
            tokens: at most so many; a mark of the end ends it before.
            temperature: 0 for the likeliest token each time; above it tokens are drawn, and the odds are sharper below 1.
            top_p: draw among the fewest likeliest tokens that have this share of the odds together.
            seed: of the draws.
            chat: a text is a user's turn, written by the model's chat template, and what follows is the answer.

        Raises:
            ValueError: the run is not over, or no language model; a text without a token, or that does not fit into the model's
                context with what is to follow; no chat template.
        """
        from fedsim.simulation.generate import generate

        alone = isinstance(texts, str)
        said = generate(
            self, [texts] if isinstance(texts, str) else list(texts), tokens=tokens, temperature=temperature, top_p=top_p,
            seed=seed, chat=chat,
        )  # fmt: skip
        return said[0] if alone else said

    def choose(
        self, text: str, answers: Sequence[str], *, by: Literal["sum", "mean"] = "sum", chat: bool = False
    ) -> str:
        """The answer that the run's final language model holds likeliest behind a text: multiple choice by likelihood.

        Args:
            by: log-likelihoods of an answer's tokens are summed, or their mean is taken, by which a long one is not put back.
            chat: the text is a user's turn, and the answers are the assistant's.

        Raises:
            ValueError: as `generate`, or there are fewer than two answers.
        """
        from fedsim.simulation.choose import likelihoods

        one_of(("sum", "mean"), by=by)
        found = likelihoods(self, text, answers, chat=chat)
        return answers[max(range(len(answers)), key=lambda at: getattr(found[at], by))]

    def plots(self, folder: str | PathLike[str] | None = None) -> list[Path]:
        """Draws the run's pictures into a folder (default: its own) and gives their files.

        Raises:
            ValueError: no round was evaluated.
        """
        from fedsim.report import plots

        return plots.save([self], self.directory if folder is None else folder)

    def export(self, kind: Kind, folder: str | PathLike[str], *, shard_bytes: int | None = None) -> Path:
        """Writes the final model for others, or what its clients keep, and gives the file.

        Args:
            kind: "peft": a LoRA as Hugging Face `peft` saves one; "merged": all that was trained folded into the backbone,
                our head beside it; "memories": what each client keeps between rounds, as shards and an index of them.
            shard_bytes: of memories: bytes that the arrays of a shard have at most; default 1 GiB.

        Raises:
            ValueError: an unknown kind, the run is not over, or it has no such form; the folder cannot be used.
        """
        one_of(get_args(Kind), kind=kind)
        if kind == "memories":
            from fedsim.simulation import memories

            return memories.export(self, Path(folder), memories.SHARD if shard_bytes is None else shard_bytes)
        from fedsim.simulation.predict import export

        if shard_bytes is not None:
            raise ValueError(
                f"Expected no shard_bytes={shard_bytes} for kind={kind!r}, which is one file; leave it out."
            )
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


def export(
    run: Run | str | PathLike[str], kind: Kind, folder: str | PathLike[str], *, shard_bytes: int | None = None
) -> Path:
    """`Run.export` of a run, or of the run in a folder."""
    return (run if isinstance(run, Run) else load(Path(run))).export(kind, folder, shard_bytes=shard_bytes)
