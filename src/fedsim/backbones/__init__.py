"""The backbones that can be trained, in one plain table; one file per architecture.

A backbone is a `flax.nnx` module with a last layer `head` and a method `stages()` (see `layers.Stage`). A new one is a
file here, its row in `BACKBONES`, and, where published weights exist, a row in `load.FORMATS`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple, Protocol

from flax import nnx

from fedsim.backbones.bert import Bert, BertConfig
from fedsim.backbones.layers import Stage
from fedsim.backbones.mlp import Mlp, MlpConfig
from fedsim.config import one_of

Shape = tuple[int, ...]


class Module(Protocol):
    """What PEFT needs of a backbone, which is an `nnx.Module` too."""

    def stages(self) -> list[Stage]: ...


class Backbone(NamedTuple):
    """One row of the table."""

    kind: Literal["text", "image", "array"]
    make: Callable[[int, Shape | None, nnx.Rngs], Module]
    """(classes, shape of one example or None, random streams) -> the module, all leaves at random."""
    config: BertConfig | MlpConfig
    pad: int | None = None
    """Token id of padding (text only)."""
    tokens: int | None = None
    """Longest text it reads, in tokens (text only)."""
    asset: str | None = None
    """Packaged weights, and for text the tokenizer beside them (`fedsim data list`)."""
    checkpoint: str | None = None
    """Format of its published checkpoints: a key of `load.FORMATS`; None if there are none."""


def bert_row(config: BertConfig, asset: str | None = None) -> Backbone:
    """The row of any BERT."""
    return Backbone(
        kind="text",
        make=lambda classes, input_shape, rngs: Bert(config, classes, rngs=rngs),
        config=config,
        pad=config.pad,
        tokens=config.positions,
        asset=asset,
        checkpoint="bert",
    )


def mlp_row(config: MlpConfig) -> Backbone:
    """The row of any perceptron."""

    def make(classes: int, input_shape: Shape | None, rngs: nnx.Rngs) -> Module:
        if input_shape is None:
            raise ValueError("Expected input_shape of backbone='mlp' to be given; it is the shape of one example.")
        return Mlp(config, classes, input_shape, rngs=rngs)

    return Backbone(kind="array", make=make, config=config)


BACKBONES: dict[str, Backbone] = {
    "minilm_l6": bert_row(BertConfig(width=384, depth=6, hidden=1536, pool="mean"), asset="minilm_l6"),
    "bert_base": bert_row(BertConfig()),
    "bert_tiny": bert_row(
        BertConfig(vocabulary=512, width=32, depth=2, heads=2, hidden=64, positions=128, pool="mean", fold=True)
    ),
    "mlp": mlp_row(MlpConfig()),
}


def backbone(name: str) -> Backbone:
    """The row of the table.

    Raises:
        ValueError: an unknown name; the nearest ones are given.
    """
    one_of(tuple(BACKBONES), backbone=name)
    return BACKBONES[name]
