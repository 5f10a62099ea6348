"""A finished run answers: the frozen backbone from its weights, the trained part from the run's folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from fedsim import peft
from fedsim.backbones.own import identity
from fedsim.config import Config, answering
from fedsim.simulation import build, needs
from fedsim.simulation.inputs import located

if TYPE_CHECKING:
    from fedsim.record import Run

BATCH = 64


def refuse_other_backbone(run: Run, config: Config) -> None:
    """Raises `ValueError` if a user's own backbone gives other parameters than the run started from."""
    before, now = run.about.get("backbone_hash"), identity(answering(config).backbone)
    if before != now:
        raise ValueError(
            f"Expected backbone={answering(run.config).backbone!r} to give the params of {run.directory}, hash {before}, not {now}; "
            "draw them from a fixed seed or load them from a file."
        )


def predict(run: Run, inputs: Any) -> list[str]:
    """The class of every input, by the model that the run ended with.

    Args:
        inputs: texts, or arrays (N, ...) of the shape that the run was trained on.

    Raises:
        ValueError: the run has no final parameters yet, it is a language model, the inputs do not fit its backbone, or what
            it was given (weights, tokenizer, code) is not what it was.
    """
    if run.config.task != "classification":
        raise ValueError(
            f"Expected task='classification' of {run.directory} to answer with classes, not {run.config.task!r}; its trained "
            "part is in .parameters."
        )
    classes = run.about.get("classes")
    if run.summary is None or not run.parameters or not classes:
        raise ValueError(f"Expected {run.directory} to hold a finished run; go on with it by --resume.")
    config = located(run)
    refuse_other_backbone(run, config)
    file = needs.tokenizer(config, run.directory)
    if file is not None:
        from fedsim.data.text import tokenize

        if isinstance(inputs, str) or not all(isinstance(text, str) for text in inputs):
            raise ValueError("Expected inputs to be a list of texts, as the run's backbone reads text; wrap it in [].")
        x = tokenize(list(inputs), file, config.tokens, needs.outside(config))
    else:
        x = np.asarray(inputs)
        if x.shape[1:] != tuple(run.about["input_shape"]):
            raise ValueError(f"Expected inputs of shape (N, *{run.about['input_shape']}), got {x.shape}.")
        limit = needs.vocabulary(config) or np.iinfo(np.int32).max
        if needs.backbone(config.backbone).kind == "text" and len(x) and not 0 <= x.min() <= x.max() < limit:
            raise ValueError(f"Expected token ids from 0 to {limit - 1}, got {x.min()} to {x.max()}; correct them.")
    if len(x) == 0:
        return []
    model, frozen = final_model(run, config, x.shape[1:], x.dtype)
    apply = jax.jit(model.apply)
    trained, frozen = jax.device_put((run.parameters, frozen))
    answers = []
    for first in range(0, len(x), BATCH):
        rows = np.minimum(np.arange(first, first + BATCH), len(x) - 1)  # one shape: the last batch repeats a row
        logits = np.asarray(apply(trained, frozen, x[rows]))
        if not np.isfinite(logits).all():
            raise ValueError(
                f"Expected the outputs of the model of {run.directory} to be finite; it has diverged, or the inputs are not "
                "finite: lower --lr and run anew, or look at the inputs."
            )
        answers.append(logits.argmax(axis=1))
    return [classes[i] for i in np.concatenate(answers)[: len(x)]]


def final_model(
    run: Run, config: Config, shape: tuple[int, ...], dtype: Any = None
) -> tuple[peft.Model, dict[str, np.ndarray]]:
    """The model that the run ended with, and its frozen part, for inputs of a shape."""
    # A target may be reached while the head still trains alone.
    ended = next(p for p in build.phases(config) if p.first <= len(run.rounds) <= p.last)
    config = answering(ended.config)
    model = peft.from_config(config, len(run.about["classes"]), shape, dtype)
    return model, peft.start(model, needs.weights(config), config.seed)[1]


def export(run: Run, kind: str, folder: Path) -> Path:
    """Writes the final model for others; see `Run.export`.

    Raises:
        ValueError: a run that is not over, or a model that has no such form.
    """
    from fedsim.peft.export import export_backbone, export_lora

    if not run.parameters:
        raise ValueError(f"Expected {run.directory} to hold a finished run; go on with it by --resume.")
    config = located(run)
    refuse_other_backbone(run, config)
    model, frozen = final_model(run, config, tuple(run.about["input_shape"]))
    if kind == "peft":
        return export_lora(folder, model, run.parameters, frozen, base=config.weights)
    return export_backbone(folder, model, run.parameters, frozen, needs.weights(config))
