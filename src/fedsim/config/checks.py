"""What is refused without touching data, weights or JAX: each message names the option, its value, the rule and the remedy."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args

from fedsim.config.calls import parse_call

if TYPE_CHECKING:
    from fedsim.config.options import Config, Model

PartitionLaw = Literal[
    "dirichlet", "dirichlet_balanced", "dirichlet_pfllib", "shards", "quantity", "natural", "domain", "iid"
]
PARTITIONS: tuple[str, ...] = get_args(PartitionLaw)
SIZE_LAWS = {"lognormal": "sigma", "power": "exponent"}  # of `quantity`: law -> its parameter


def check(config: Config) -> None:
    """Refuses what can be refused without touching data or weights.

    Raises:
        ValueError: names the option, its value, the rule and the remedy.
    """
    c = config
    check_model(c)
    positive(tokens=c.tokens, clients=c.clients, alpha=c.alpha)
    positive(rounds=c.rounds, clients_per_round=c.clients_per_round, epochs=c.epochs, steps=c.steps)
    positive(batch_size=c.batch_size, eval_every=c.eval_every, patience=c.patience, examples=c.examples)
    positive(image_store=c.image_store)
    positive(lr=c.lr, head_lr=c.head_lr, server_lr=c.server_lr, personal_lr=c.personal_lr, eval_clients=c.eval_clients)
    if c.personal_epochs < 0 or (c.personal_epochs and not c.local_test):
        raise ValueError(
            f"Expected personal_epochs={c.personal_epochs} >= 0, and with local_test={c.local_test} > 0 where it is above 0: "
            "the tuned models are judged by local tests; give local_test=0.2."
        )
    if not 0 < c.validation < 1:
        raise ValueError(f"Expected 0 < validation={c.validation} < 1; it is the share held out, e.g. 0.1.")
    if c.target_accuracy is not None and not 0 < c.target_accuracy <= 1:
        raise ValueError(f"Expected 0 < target_accuracy={c.target_accuracy} <= 1; write 62 % as 0.62.")
    for f in dataclasses.fields(c):
        value = getattr(c, f.name)
        if str(f.type) in ("int", "int | None") and value is not None and type(value) is not int:
            raise ValueError(f"Expected {f.name}={value!r} to be a whole number; leave out the fraction.")
    if isinstance(c.targets, str):
        raise ValueError(f"Expected targets={c.targets!r} to be several patterns; write ({c.targets!r},).")
    if isinstance(c.augment, str):
        raise ValueError(f"Expected augment={c.augment!r} to be several calls; write ({c.augment!r},).")
    for call in c.augment:
        parse_call(call, "augment")
    if not 0 <= c.seed < 2**32:
        raise ValueError(f"Expected 0 <= seed={c.seed} < 2**32; give a smaller natural number.")
    if c.min_size < 0:
        raise ValueError(f"Expected min_size={c.min_size} >= 0; 0 allows empty clients.")
    if not 0 <= c.head_rounds < c.rounds and c.peft != "head":
        raise ValueError(
            f"Expected 0 <= head_rounds={c.head_rounds} < rounds={c.rounds}; lower --head-rounds (0 trains both from the "
            "start) or raise --rounds."
        )
    if c.clients_per_round > c.clients:
        raise ValueError(
            f"Expected clients_per_round={c.clients_per_round} <= clients={c.clients}; lower it or add clients."
        )
    one_of(PARTITIONS, partition=c.partition)
    positive(classes_per_client=c.classes_per_client)
    size_law(c.size_law)
    if not 0 <= c.local_test < 1:
        raise ValueError(f"Expected 0 <= local_test={c.local_test} < 1; it is the share held out, e.g. 0.2.")
    check_network(c)
    one_of(("examples", "uniform"), weighting=c.weighting)
    one_of(("none", "bfloat16", "float16"), codec_up=c.codec_up, codec_down=c.codec_down)
    for name in ("algorithm", "optimizer", "lr_schedule", "server_optimizer", "server_lr_schedule"):
        parse_call(getattr(c, name), name)


def size_law(text: str) -> tuple[str, float]:
    """Name and parameter of the law of clients' sizes: `"power(exponent=1.5)"` gives ("power", 1.5).

    Raises:
        ValueError: an unknown law, or a parameter that is missing or out of range.
    """
    name, args, options = parse_call(text, "size_law")
    one_of(tuple(SIZE_LAWS), size_law=name)
    parameter = SIZE_LAWS[name]
    value = options.get(parameter)
    if (
        args
        or len(options) != 1
        or isinstance(value, bool)
        or not isinstance(value, (int, float))
        or not 0 < value <= 100
    ):
        raise ValueError(
            f"Expected size_law={text!r} to have the one parameter 0 < {parameter} <= 100; write {name}({parameter}=1.0)."
        )
    return name, float(value)


def invited(config: Config) -> int:
    """Clients that a round invites: clients_per_round times over_selection, rounded up."""
    return math.ceil(config.clients_per_round * config.over_selection - 1e-9)  # 10 * 1.1 is a bit more than 11


def check_network(c: Config) -> None:
    """Refuses impossible options of the network that show without reading its files.

    Raises:
        ValueError: as `check`.
    """
    positive(deadline=c.deadline)
    one_of(("discard", "partial"), late=c.late)
    if not 0 <= c.dropout < 1:
        raise ValueError(f"Expected 0 <= dropout={c.dropout} < 1; it is a probability, write 10 % as 0.1.")
    if not 1 <= c.over_selection < math.inf:
        raise ValueError(
            f"Expected over_selection={c.over_selection} >= 1; it is a factor, write 30 % more clients as 1.3."
        )
    if invited(c) > c.clients:
        raise ValueError(
            f"Expected over_selection={c.over_selection} to invite at most clients={c.clients}, not {invited(c)}; lower it "
            "or clients_per_round."
        )
    if c.deadline is not None and not c.timed:
        raise ValueError(
            f"Expected deadline={c.deadline} with clients that take time; give one of download, upload, latency, compute, "
            "device_table."
        )
    if c.late == "partial" and (c.deadline is None or not (c.compute or c.device_table)):
        raise ValueError(
            "Expected late='partial' with a deadline and with compute (or a device_table); without them no work is partial."
        )
    for name in ("availability", "download", "upload", "latency", "compute"):
        if getattr(c, name) is not None and not getattr(c, name).lower().endswith(".csv"):
            parse_call(getattr(c, name), name)


def check_model(m: Model) -> None:
    """Refuses impossible options of the model that show without building it.

    Raises:
        ValueError: as `check`.
    """
    positive(rank=m.rank, lora_alpha=m.lora_alpha, adapter_width=m.adapter_width, image_size=m.image_size)
    positive(prompt_tokens=m.prompt_tokens, prefix_tokens=m.prefix_tokens, last_blocks=m.last_blocks)
    one_of(("single", "houlsby", "parallel"), adapter=m.adapter)
    one_of(("deep", "shallow"), prompt_depth=m.prompt_depth)
    one_of(("bilinear", "bicubic"), interpolation=m.interpolation)
    if m.pool is not None:
        one_of(("mean", "cls", "pooler"), pool=m.pool)


def positive(**values: Any) -> None:
    """Raises `ValueError` unless every value is above zero; `None` and "auto" mean "not set" and pass."""
    for name, value in values.items():
        if value is None or value == "auto":
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0 or value == float("inf"):
            raise ValueError(f"Expected {name}={value!r} > 0; give a positive number.")


def one_of(allowed: Sequence[str], **values: Any) -> None:
    """Raises `ValueError` unless every value is one of `allowed`, naming the nearest."""
    for name, value in values.items():
        if value not in allowed:
            raise ValueError(f"Expected {name}={value!r} to be one of {', '.join(allowed)}{nearest(value, allowed)}.")


def nearest(word: object, among: Iterable[str]) -> str:
    """`; did you mean ...?` for a misspelt word, or nothing."""
    close = difflib.get_close_matches(str(word), list(among), n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(close)}?" if close else ""


def require_known(names: Iterable[str], known: Sequence[str], what: str) -> None:
    """Raises `ValueError` for the first name that is not among the known ones."""
    for name in names:
        if name not in known:
            raise ValueError(f"Expected {what} {name!r} to be a known one{nearest(name, known)}.")
