"""`fedsim cost`: parameters and bytes of a setting, from shapes alone. Reads no weights and no data, allocates nothing.

Of a checkpoint that is given it reads names and shapes: a vision transformer's positions have a grid of their own.

The prices are those of a run: the same model, split by the same rules, priced by `wire`. They hold for algorithms that
send the trained part each way (FedAvg, FedProx); what others send besides is counted when they run.
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from rich import box
from rich.console import Console
from rich.table import Table

from fedsim import peft, wire
from fedsim.config import OF_PEFT, Config, one_of
from fedsim.simulation import build
from fedsim.units import mebibytes, times

DType = Literal["float32", "bfloat16", "float16"]
Send = Callable[[Any, Any], Any]  # (what is sent, key) -> the message with packets


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
    """One client, one round."""
    bytes_down: int
    setup_bytes: int
    """What one client is given once: the frozen part, statistics and frozen attached leaves included."""
    full_bytes: int
    """One client, one way, one round of full fine-tuning without a codec."""
    full_ratio: float
    """Full fine-tuning's bytes of a round, both ways, over this one's."""
    clients: int
    clients_per_round: int
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


def cost(config: Config, classes: int, *, input_shape: tuple[int, ...] | None = None, dtype: str = "float32") -> Cost:
    """Prices a config for a data set of that many classes.

    Args:
        input_shape: of one example; only backbones without a fixed input need it.
        dtype: of all parameters; a run has float32.

    Raises:
        ValueError: an unknown name or an option that does not fit the backbone, as `peft.build`; weights that do not fit it,
            or are not here, as nothing is downloaded.
    """
    one_of(get_args(DType), dtype=dtype)
    models = [(phase, split(phase.config, classes, input_shape)) for phase in build.phases(config)]
    up, down = wire.codec(config.codec_up, "codec_up"), wire.codec(config.codec_down, "codec_down")
    ways: dict[str, Send] = {
        "up": lambda tree, key: wire.arrive(wire.coded(tree), up, key, key)[0],
        "down": lambda tree, key: wire.depart(down, wire.coded(tree, change=False), key),
    }
    rounds = [phase.last - phase.first + 1 for phase, _ in models]
    sent = {way: [sent_bytes(typed(model.trained, dtype), send) for _, model in models] for way, send in ways.items()}
    run = {
        way: config.clients_per_round * sum(n * b for n, b in zip(rounds, each, strict=True))
        for way, each in sent.items()
    }
    first, model = models[0][1], models[-1][1]
    bytes_up, bytes_down = sent["up"][-1], sent["down"][-1]
    trainable, whole = count(model.trained), count(peft.parameters(model))
    full = total(wire.price(typed(peft.parameters(model), dtype)))
    setup = total(wire.price(typed(first.frozen, dtype)))
    return Cost(
        backbone=config.backbone,
        peft=config.peft,
        classes=model.classes,
        options=chosen(model.options),
        dtype=dtype,
        codec_up=config.codec_up,
        codec_down=config.codec_down,
        trainable_parameters=trainable,
        total_parameters=whole,
        share=trainable / whole,
        bytes_up=bytes_up,
        bytes_down=bytes_down,
        setup_bytes=setup,
        full_bytes=full,
        full_ratio=2 * full / (bytes_up + bytes_down),
        clients=config.clients,
        clients_per_round=config.clients_per_round,
        rounds=config.rounds,
        head_rounds=sum(rounds[:-1]),
        round_bytes_up=config.clients_per_round * bytes_up,
        round_bytes_down=config.clients_per_round * bytes_down,
        run_bytes_up=run["up"],
        run_bytes_down=run["down"],
        run_setup_bytes=setup * min(config.clients, config.rounds * config.clients_per_round),
    )


def sent_bytes(shapes: peft.Shapes, send: Send) -> int:
    """Bytes of one message; a leaf whose price depends on values counts as not encoded. Allocates nothing."""
    prices: list[int] = []

    def priced(tree: Any, key: Any) -> None:
        with jax.ensure_compile_time_eval():  # a price that follows from shapes is a number here, else a tracer
            message = send(tree, key)
        for _, leaf in wire.named_leaves(message):
            known = wire.is_packet(leaf) and not isinstance(leaf.nbytes, jax.core.Tracer)
            prices.append(int(leaf.nbytes) if known else wire.array_bytes(wire.unwrap(leaf)))

    jax.eval_shape(priced, shapes, jax.eval_shape(jax.random.key, 0))
    return sum(prices)


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
    model = split(build.phases(config)[-1].config, classes, input_shape)
    leaves = {**model.trained, **model.frozen}
    return [LeafCost(path, model.rules[path], leaf.shape, math.prod(leaf.shape)) for path, leaf in leaves.items()]


def typed(shapes: peft.Shapes, dtype: str) -> peft.Shapes:
    """The same shapes in another dtype."""
    return {path: jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(dtype)) for path, leaf in shapes.items()}


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
        made.add_row(
            "\n".join([c.backbone, c.peft, *said, f"{c.classes} {outputs}", c.dtype, *codecs]),
            f"{c.trainable_parameters:,}\n{c.share:.3%} of\n{c.total_parameters:,}",
            both(c.bytes_up, c.bytes_down),
            f"{both(c.round_bytes_up, c.round_bytes_down)}\n{c.clients_per_round} clients",
            f"{both(c.run_bytes_up, c.run_bytes_down)}\n{c.rounds} rounds",
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


def both(up: int, down: int) -> str:
    """Both directions, one above the other."""
    return f"up {exact(up)}\ndown {exact(down)}"


def exact(n: int) -> str:
    """Bytes, and MiB to three digits, from 1 GiB on GiB, on a line of its own."""
    return f"{n:,} B\n{mebibytes(n, 3)}"
