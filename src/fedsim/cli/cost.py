"""`fedsim cost`: parameters and bytes of a setting, from shapes alone. Reads no weights and no data, allocates nothing.

Of a checkpoint that is given it reads names and shapes: a vision transformer's positions have a grid of their own.

The prices are those of a run: the same model, split by the same rules, and the algorithm's own round, traced on these
shapes (`simulation.prices`). They are of a cohort that meets for the second time.
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from rich import box
from rich.console import Console
from rich.table import Table

from fedsim import peft, wire
from fedsim.config import OF_PEFT, Config, answering, groups_of, one_of
from fedsim.simulation import build, groups, prices
from fedsim.units import mebibytes, times

DType = Literal["float32", "bfloat16", "float16"]


class LeafCost(NamedTuple):
    """One leaf and the rule that took it: "head", a PEFT kind, or "frozen"."""

    path: str
    rule: str
    shape: tuple[int, ...]
    parameters: int


class Cost(NamedTuple):
    """What one setting trains and sends. Bytes are payloads; up is from the clients to the server."""

    backbone: str
    peft: str
    algorithm: str
    classes: int
    options: dict[str, Any]
    """Options of the backbone and the PEFT kind that are not the default."""
    dtype: str
    codec_up: str
    codec_down: str
    trainable_parameters: int
    """Backbone's, attached and head's, each if trained."""
    total_parameters: int
    """Backbone and head, what full fine-tuning trains; what PEFT attaches and batch norm's statistics do not count."""
    share: float
    """trainable_parameters / total_parameters."""
    bytes_up: int
    """One client, one round, the mean over the cohort."""
    bytes_up_range: tuple[int, int]
    """Of the client with the least and of the one with the most."""
    bytes_up_are: str
    """"exact"; "at most", where prices depend on values; "about", where they may follow from numbers that only a run has."""
    bytes_down: int
    bytes_down_range: tuple[int, int]
    bytes_down_are: str
    setup_bytes: int
    """What one client is given once: the frozen part, statistics and frozen attached leaves included."""
    full_bytes: int
    """One client, one way, one round of full fine-tuning without a codec."""
    full_ratio: float | None
    """Full fine-tuning's bytes of a round, both ways, over this one's; None where nothing is sent."""
    clients: int
    clients_per_round: int
    members: int
    """Of the cohort that was looked at, which an algorithm may choose otherwise."""
    rounds: int
    head_rounds: int
    round_bytes_up: int
    """All clients of one round."""
    round_bytes_down: int
    run_bytes_up: int
    """All rounds, the head's rounds with the head's messages."""
    run_bytes_down: int
    run_setup_bytes: int
    """At most: all clients that can have been met by the end, each met in the first phase."""
    groups: tuple[str, ...] = ()
    """Of several architectures: what each is. Parameters and full fine-tuning are then of the one that is scored, backbone and
    PEFT kind too; bytes of a client are means over the cohort, of the set-up over all clients."""


def cost(config: Config, classes: int, *, input_shape: tuple[int, ...] | None = None, dtype: str = "float32") -> Cost:
    """Prices a config for a data set of that many classes.

    Args:
        input_shape: of one example; only backbones without a fixed input need it.
        dtype: of all parameters; a run has float32.

    Raises:
        ValueError: an unknown name or an option that does not fit the backbone, as `peft.build`; weights that do not fit it,
            or are not here, as nothing is downloaded; an algorithm that does not fit, or cannot be priced by shapes.
    """
    one_of(get_args(DType), dtype=dtype)
    phases = build.phases(config)
    models = [
        prices.models_of(phase.config, lambda one: typed(split(one, classes, input_shape), dtype)) for phase in phases
    ]
    priced = [
        prices.of_phase(phase, each, example(config, input_shape)) for phase, each in zip(phases, models, strict=True)
    ]
    rounds, sent = [phase.last - phase.first + 1 for phase in phases], priced[-1]
    model, whose = prices.scored_of(config, models[-1]), answering(config)
    met = most_met(config, priced)
    trainable, whole = count(model.trained), count(peft.parameters(model))
    full = total(wire.price(peft.parameters(model)))
    members = [int((one.ids >= 0).sum()) for one in priced]
    return Cost(
        backbone=whose.backbone,
        peft=whose.peft,
        algorithm=config.algorithm,
        classes=model.classes,
        options=chosen(model.options),
        dtype=dtype,
        codec_up=config.codec_up,
        codec_down=config.codec_down,
        trainable_parameters=trainable,
        total_parameters=whole,
        share=trainable / whole,
        bytes_up=round(sent.up.mean),
        bytes_up_range=(sent.up.least, sent.up.most),
        bytes_up_are=sent.up.certainty,
        bytes_down=round(sent.down.mean),
        bytes_down_range=(sent.down.least, sent.down.most),
        bytes_down_are=sent.down.certainty,
        setup_bytes=prices.mean_setup(config, config.clients, priced[0].setup),
        full_bytes=full,
        full_ratio=2 * full / each if (each := sent.up.mean + sent.down.mean) else None,
        clients=config.clients,
        clients_per_round=config.clients_per_round,
        members=members[-1],
        rounds=config.rounds,
        head_rounds=sum(rounds[:-1]),
        round_bytes_up=sent.up.together,
        round_bytes_down=sent.down.together,
        run_bytes_up=sum(one.up.over(n) for n, one in zip(rounds, priced, strict=True)),
        run_bytes_down=sum(one.down.over(n) for n, one in zip(rounds, priced, strict=True)),
        run_setup_bytes=sum(priced[0].setup[name] * count for name, count in met.items()),
        groups=config.groups,
    )


def most_met(config: Config, priced: Sequence[prices.Prices]) -> dict[str, int]:
    """How many clients can have been met by the end, by group."""
    sizes = {name: len(ids) for name, ids in groups.members(config, config.clients).items()} if config.groups else {}
    return {
        name: min(
            sizes.get(name, config.clients), config.rounds * max(int((one.cohorts[name] >= 0).sum()) for one in priced)
        )
        for name in priced[0].cohorts
    }


def example(config: Config, input_shape: tuple[int, ...] | None) -> jax.ShapeDtypeStruct:
    """One input of the kind that the backbone reads; images of any size are resized on the device."""
    shapes = {"text": ((config.tokens,), jnp.int32), "image": ((224, 224, 3), jnp.uint8)}
    shape, dtype = shapes.get(build.kind(config), ((1,), jnp.float32))
    return jax.ShapeDtypeStruct(input_shape or shape, dtype)


def split(config: Config, classes: int, input_shape: tuple[int, ...] | None) -> peft.Model:
    """The model whose leaves a run would train, send and hold."""
    return peft.fitted_to(peft.from_config(config, classes, input_shape), config.weights)


def chosen(options: peft.Options) -> dict[str, Any]:
    """Options that are not the default and that the backbone or the PEFT kind reads."""
    parts = peft.parse(options.peft)
    others = {name for name, kinds in OF_PEFT.items() if not {*kinds} & {*parts}}
    apart = {"backbone", "peft", "weights", "head_rounds"}  # fields of their own, or nothing to do with bytes
    return {
        f.name: value
        for f in dataclasses.fields(options)
        if f.name not in others | apart and (value := getattr(options, f.name)) != f.default
    }


def rules(config: Config, classes: int, *, input_shape: tuple[int, ...] | None = None) -> list[LeafCost]:
    """Every leaf and the one rule that took it, trained ones first; of the last phase.

    Raises:
        ValueError: as `cost`.
    """
    last = build.phases(config)[-1].config
    found = []
    for at, one in {f"{group.name}/": group.config for group in groups_of(last)}.items() or [("", last)]:
        model = split(one, classes, input_shape)
        leaves = {**model.trained, **model.frozen}
        found += [
            LeafCost(f"{at}{path}", model.rules[path], leaf.shape, math.prod(leaf.shape))
            for path, leaf in leaves.items()
        ]
    return found


def typed(model: peft.Model, dtype: str) -> peft.Model:
    """The model with leaves of another dtype."""

    def of(shapes: peft.Shapes) -> peft.Shapes:
        return {path: jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(dtype)) for path, leaf in shapes.items()}

    return model._replace(trained=of(model.trained), frozen=of(model.frozen))


def count(shapes: peft.Shapes) -> int:
    """Numbers in all leaves."""
    return sum(math.prod(leaf.shape) for leaf in shapes.values())


def total(prices: dict[str, int]) -> int:
    """Bytes of a whole message."""
    return sum(prices.values())


# --- for people and programs


def print_costs(costs: Sequence[Cost], leaves: Sequence[list[LeafCost]] = (), *, as_json: bool = False) -> None:
    """Prints one row per setting, as JSON or as a table; with `leaves` of each the rules too."""
    if as_json:
        extra = [{"rules": [leaf._asdict() for leaf in each]} for each in leaves] or [{}] * len(costs)
        print(json.dumps([c._asdict() | more for c, more in zip(costs, extra, strict=True)], indent=1))
        return
    # Not to a terminal (a file, a pipe) there is no width to keep to.
    out = Console(highlight=False, markup=False, emoji=False, width=None if sys.stdout.isatty() else 140)
    out.print(table(costs))
    for c, each in zip(costs, leaves, strict=False):
        out.print(rules_table(c, each))


def table(costs: Sequence[Cost]) -> Table:
    """The settings one below the other: exact bytes and MiB, up above down."""
    made = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_lines=True)
    made.add_column("setting", overflow="fold")
    for name in ("trained", "one client\na round", "the cohort\na round", "the cohort\nall rounds", "once a client"):
        made.add_column(name, justify="right")
    made.add_column("less\nthan full", justify="right")
    for c in costs:
        said = [f"{k}={' '.join(v) if isinstance(v, tuple) else v}" for k, v in c.options.items()]
        outputs = "tokens" if c.options.get("task") == "language_model" else "classes"
        codecs = [f"{way} {c}" for way, c in (("up", c.codec_up), ("down", c.codec_down)) if c != "none"]
        algorithm = [c.algorithm] * (c.algorithm != Config.algorithm)
        one = [
            way(name, n, are, "" if least == most else f"\n{least:,}\nto {most:,} B")
            for name, n, are, (least, most) in (
                ("up", c.bytes_up, c.bytes_up_are, c.bytes_up_range),
                ("down", c.bytes_down, c.bytes_down_are, c.bytes_down_range),
            )
        ]
        of_round = way("up", c.round_bytes_up, c.bytes_up_are), way("down", c.round_bytes_down, c.bytes_down_are)
        of_run = way("up", c.run_bytes_up, c.bytes_up_are), way("down", c.run_bytes_down, c.bytes_down_are)
        made.add_row(
            "\n".join(
                [*(c.groups or (c.backbone, c.peft)), *algorithm, *said, f"{c.classes} {outputs}", c.dtype, *codecs]
            ),
            f"{c.trainable_parameters:,}\n{c.share:.3%} of\n{c.total_parameters:,}",
            "\n".join(one),
            "\n".join([*of_round, f"{c.members} clients"]),
            "\n".join([*of_run, f"{c.rounds} rounds"]),
            exact(c.setup_bytes),
            times(c.full_ratio),
        )
    return made


def rules_table(setting: Cost, leaves: Sequence[LeafCost]) -> Table:
    """Which rule took which leaf; leaves of one rule stand together."""
    title = f"{setting.backbone}, {setting.peft}"
    made = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=title, title_justify="left", title_style="bold")
    for name in ("rule", "leaf", "shape"):
        made.add_column(name, overflow="fold")
    made.add_column("parameters", justify="right")
    for leaf in sorted(leaves, key=lambda leaf: leaf.rule == "frozen"):
        made.add_row(leaf.rule, leaf.path, "x".join(map(str, leaf.shape)), f"{leaf.parameters:,}")
    return made


def way(name: str, n: int, are: str, more: str = "") -> str:
    """Bytes in one direction, marked where they are not exact."""
    return f"{name} {'' if are == 'exact' else f'{are} '}{exact(n)}{more}"


def exact(n: int) -> str:
    """Bytes, and MiB to three digits, from 1 GiB on GiB, on a line of its own."""
    return f"{n:,} B\n{mebibytes(n, 3)}"
