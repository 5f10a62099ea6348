"""What is refused without touching data, weights or JAX: each message names the option, its value, the rule and the remedy."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal, get_args

from fedsim.config.calls import parse_call
from fedsim.config.fields import gate
from fedsim.config.groups import check_groups
from fedsim.config.limits import in_range, plan_fits
from fedsim.config.privacy import check_beside, check_privacy
from fedsim.config.scores import check_scores
from fedsim.config.words import nearest, one_of, shown

if TYPE_CHECKING:
    from fedsim.config.options import Config, Model

PartitionLaw = Literal[
    "dirichlet", "dirichlet_balanced", "dirichlet_pfllib", "shards", "quantity", "natural", "domain", "iid"
]
PARTITIONS: tuple[str, ...] = get_args(PartitionLaw)
SHARDS = 2**27  # 8 bytes each
SIZE_LAWS = {"lognormal": "sigma", "power": "exponent"}  # of `quantity`: law -> its parameter


def check(config: Config) -> None:
    """Refuses what can be refused without touching data or weights.

    Raises:
        ValueError: names the option, its value, the rule and the remedy.
    """
    c = config
    gate(c)  # types first: what follows computes with the values
    in_range(c)
    if c.personal_epochs < 0 or (c.personal_epochs and not c.local_test):
        raise ValueError(
            f"Expected personal_epochs={c.personal_epochs} >= 0, and with local_test={c.local_test} > 0 where it is above 0: "
            "the tuned models are judged by local tests; give local_test=0.2."
        )
    if not 0 < c.validation < 1:
        raise ValueError(f"Expected 0 < validation={c.validation} < 1; it is the share held out, e.g. 0.1.")
    check_shares(c)
    check_scores(c)
    check_groups(c)
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
    if c.partition == "shards" and c.clients * c.classes_per_client > SHARDS:
        raise ValueError(
            f"Expected classes_per_client={c.classes_per_client} x clients={c.clients} <= {SHARDS} shards; lower one of them."
        )
    size_law(c.size_law)
    if not 0 <= c.local_test < 1:
        raise ValueError(f"Expected 0 <= local_test={c.local_test} < 1; it is the share held out, e.g. 0.2.")
    check_network(c)
    check_privacy(c)
    check_beside(c)
    plan_fits(invited(c), c.steps or c.epochs, c.batch_size, "steps" if c.steps else "epochs")
    for name in ("codec_up", "codec_down"):
        check_codec(getattr(c, name), name)
    for name in ("algorithm", "optimizer", "lr_schedule", "server_optimizer", "server_lr_schedule"):
        parse_call(getattr(c, name), name)


def check_shares(c: Config) -> None:
    """Refuses shares of the server that are none, or that leave nothing to the clients.

    Raises:
        ValueError: as `check`.
    """
    for name in ("public_share", "server_share"):
        if not 0 <= getattr(c, name) < 1:
            raise ValueError(
                f"Expected 0 <= {name}={getattr(c, name)} < 1; it is the share of the training examples that the server holds, "
                "e.g. 0.1."
            )
    if c.public_share + c.server_share >= 1:
        raise ValueError(
            f"Expected public_share={c.public_share} + server_share={c.server_share} < 1; the rest is the clients': lower them."
        )


CODECS = (  # that `wire.codecs` has
    "bfloat16", "float16", "float8_e4m3fn", "float8_e5m2", "quantise", "qsgd", "nf4", "nnadq", "terngrad", "sign", "topk", "randomk",
    "blocks", "rotate", "drive", "eden", "powersgd", "low_rank", "sketch",
)  # fmt: skip


def check_codec(text: str, option: str) -> None:
    """Refuses an unknown codec; what its arguments mean is looked at where it is made.

    Raises:
        ValueError: names the option and the nearest codecs.
    """
    for call in text.split("+") if text != "none" else ():
        name, _, _ = parse_call(call.strip(), option)
        if name not in CODECS:
            raise ValueError(
                f"Expected {option}={shown(text)} to be none, or of {', '.join(CODECS)} with + between them"
                f"{nearest(name, CODECS)}; like topk(0.01)+quantise(8)."
            )


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


def check_model(options: Model) -> None:
    """Refuses options of a model that came without a config: types and sizes.

    Raises:
        ValueError: as `check`.
    """
    gate(options)
    in_range(options)
