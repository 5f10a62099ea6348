"""Several encoders side by side, and a layer that fuses what they say of an input (FedPCL, arXiv 2209.10083).

    r(x) = the encoders' features, one behind the other;  z(x) = relu(W r(x) + c), (B, width);  the head reads z

`--peft last_k` trains W, c and the head: the encoders are one stage below, whose output is computed once for every example. They
read the same inputs, so that they must agree on what an input is. Of one encoder it is a projection.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from fedsim.backbones.layers import Linear, Shape, Stage
from fedsim.config import parse_call

NAME = "fused"


class Encoder(NamedTuple):
    """One of the encoders."""

    name: str
    """Of a backbone of the table."""
    row: Any
    """Its row, pooled as asked."""
    weights: str | None
    """As the option of a run: file, directory, hub name, "random", None for the packaged ones."""


@dataclass(frozen=True)
class FusedConfig:
    """The encoders, the width of the layer that fuses them, and of texts what all encoders read."""

    encoders: tuple[Encoder, ...]
    width: int = 256
    vocabulary: int = 0
    pad: int | None = None
    fold: bool = False


class Features(nnx.Module):
    """In a head's place: features as they are."""

    def __call__(self, x: jax.Array) -> jax.Array:
        return x


class Fused(nnx.Module):
    """Inputs as the encoders read them -> logits (B, classes)."""

    def __init__(self, c: FusedConfig, classes: int, input_shape: Shape | None = None, *, rngs: nnx.Rngs) -> None:
        encoders = [encoder.row.make(1, input_shape, rngs) for encoder in c.encoders]
        widths = [encoder.head.kernel.shape[0] for encoder in encoders]
        for encoder in encoders:
            encoder.head = Features()
        self.encoders = nnx.List(encoders)
        self.fusion = nnx.List([Linear(sum(widths), c.width, rngs=rngs)])
        self.head = Linear(c.width, classes, rngs=rngs)

    def encode(self, x: Any) -> dict[str, jax.Array]:
        """(B, ...) -> features of each encoder, (B, its width)."""
        found = {}
        for number, encoder in enumerate(self.encoders):
            h = x
            for stage in encoder.stages():
                h = stage.run(h)
            found[str(number)] = h
        return found

    def join(self, found: dict[str, jax.Array]) -> jax.Array:
        """Features of all encoders, (B, sum of their widths)."""
        return jnp.concatenate([found[str(number)] for number in range(len(self.encoders))], axis=-1)

    def fuse(self, r: jax.Array) -> jax.Array:
        """(B, sum of widths) -> (B, width)."""
        return jax.nn.relu(self.fusion[0](r))

    def stages(self) -> list[Stage]:
        """The forward pass in order; see `layers.Stage`."""
        fusion = [Stage("fusion/0", self.fuse), Stage("head", self.head)]
        return [Stage("encoders", self.encode), Stage("joined", self.join), *fusion]


def is_fused(name: str) -> bool:
    """Whether a backbone's name is a call of `fused`."""
    return name.partition("(")[0].strip() == NAME


def parse(name: str) -> tuple[list[tuple[str, str | None]], int, list[str | None]]:
    """(name and pooling of each encoder, width, weights of each) of `"fused('vit_s14', 'vit_s14 mean', width=256)"`.

    Raises:
        ValueError: no such call.
    """
    _, given, options = parse_call(name, "backbone")
    width, weights = options.pop("width", 256), options.pop("weights", None)
    if options:
        raise ValueError(f"Expected {next(iter(options))} of backbone={name!r} to be width or weights; leave it out.")
    if not given or not all(isinstance(text, str) and 1 <= len(text.split()) <= 2 for text in given):
        raise ValueError(
            f"Expected backbone={name!r} to name encoders, each with its pooling behind it if it is not its own; give "
            "fused('vit_s14', 'vit_s14 mean')."
        )
    if isinstance(width, bool) or not isinstance(width, int) or not 1 <= width <= 65_536:
        raise ValueError(f"Expected 1 <= width={width!r} <= 65536 of backbone={name!r}; leave it out for 256.")
    each: list[str | None] = (
        [None] * len(given) if weights is None else list(weights) if isinstance(weights, (tuple, list)) else []
    )
    if len(each) != len(given) or not all(one is None or (isinstance(one, str) and one) for one in each):
        raise ValueError(
            f"Expected weights={weights!r} of backbone={name!r} to have an entry for each of {len(given)} encoders: a file, a "
            "directory, a hub name, 'random', or None for the packaged ones."
        )
    split = [text.split() for text in given]
    return [(words[0], words[1] if len(words) > 1 else None) for words in split], width, each


Kind = Literal["text", "image", "array"]


def agreed(name: str, encoders: tuple[Encoder, ...]) -> tuple[Kind, FusedConfig, int | None, str | None]:
    """(kind, config, most tokens, asset with the tokenizer) that all encoders share; images may also be read as arrays.

    Raises:
        ValueError: they read different things, or other token ids.
    """
    rows = [encoder.row for encoder in encoders]
    kinds = {row.kind for row in rows}
    if "text" in kinds and len(kinds) > 1:
        said = ", ".join(f"{encoder.name}: {encoder.row.kind}" for encoder in encoders)
        raise ValueError(
            f"Expected encoders of backbone={name!r} to read the same inputs, not {said}; choose encoders of one kind."
        )
    if kinds != {"text"}:
        kind: Kind = "image" if "image" in kinds else "array"
        return kind, FusedConfig(encoders), None, None
    # One that takes ids modulo its vocabulary reads anybody's tokens.
    strict = [encoder for encoder in encoders if not getattr(encoder.row.config, "fold", False)] or list(encoders)
    tokens = {(encoder.row.asset, encoder.row.config.vocabulary) for encoder in strict}
    pads = {row.pad for row in rows}
    if len(tokens) > 1 or len(pads) > 1:
        said = ", ".join(f"{e.name}: {e.row.config.vocabulary:,} tokens, padding {e.row.pad}" for e in encoders)
        raise ValueError(
            f"Expected encoders of backbone={name!r} to read the same token ids, but each text is cut by one tokenizer ({said}); "
            "choose encoders of one tokenizer, or two poolings of one."
        )
    first = strict[0].row
    config = FusedConfig(encoders, 256, first.config.vocabulary, first.pad, getattr(first.config, "fold", False))
    return "text", config, min(row.tokens for row in rows), first.asset
