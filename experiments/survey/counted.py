"""Everything in fedsim on the survey's axes, as far as it can be counted: no training, no weights, no data.

Command:  python benchmarks/tables.py survey --table counted                (--json for programs)
Model:    vit_s14 at 28 pixels with ten classes; codecs and algorithms on LoRA in its two upper blocks, as in `front.py`.
Counts:   bytes of a client and round each way (`fedsim cost`: exact, or at most where prices depend on values) and what it is given
          once; of the kinds of PEFT FLOPs of a local step of eight images from what enters the first trained stage, and memory.
Time:     half a minute of one core; 2 cores of a shared AMD EPYC, 2026-11-30.

What an algorithm computes beyond FedAvg's steps stands in the algorithms' own tables (docs/algorithms/README.md): seconds and memory
of a round of a hundred clients, of each.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

sys.path[:0] = [str(Path(__file__).parent)]
import axes
import front

from fedsim.algorithms import ALGORITHMS
from fedsim.cli import cost
from fedsim.config import Config
from fedsim.peft.flops import training_flops
from fedsim.peft.kinds import KINDS
from fedsim.units import size, times

CLASSES = 10
CODECS = (
    "none", "bfloat16", "quantise(8)", "qsgd(4)", "nf4", "eden(2)", "sign", "topk(0.1)", "topk(0.01)+quantise(8)", "randomk(0.1)",
    "powersgd(2)", "sketch(2)",
)  # fmt: skip
NEEDS: dict[str, dict[str, Any]] = {  # options without which an algorithm is refused
    "scaffold": {"weighting": "uniform", "optimizer": "sgd"},
    "fed_dyn": {"weighting": "uniform"},
    "ffa_lora": {"peft": "ffa_lora"},
    "fed_kseed": {"optimizer": "sgd"},
}


def rows() -> list[dict[str, Any]]:
    """A row for each kind of PEFT, each codec and each algorithm."""
    plain = Config(
        **{name: getattr(front.base, name) for name in ("backbone", "image_size", "batch_size", "optimizer")}
    )
    lora = plain.replace(**front.LORA)
    kinds = [row("kind", kind, plain.replace(peft=kind)) | computed(plain.replace(peft=kind)) for kind in KINDS]
    codecs = [row("codec", codec, lora.replace(codec_up=codec)) for codec in CODECS]
    return kinds + codecs + [row("algorithm", a, lora.replace(algorithm=a, **NEEDS.get(a, {}))) for a in ALGORITHMS]


def row(part: str, name: str, config: Config) -> dict[str, Any]:
    """What a setting sends; of one that another task is needed for, why it is refused."""
    try:
        one = cost.cost(config, CLASSES)
    except ValueError as error:
        return {"part": part, "name": name, "refused": str(error)}
    return {
        "part": part, "name": name, "trained": one.trainable_parameters, "share": one.share, "up": one.bytes_up,
        "up_are": one.bytes_up_are, "down": one.bytes_down, "down_are": one.bytes_down_are, "setup": one.setup_bytes,
        "less": one.full_ratio,
    }  # fmt: skip


def computed(config: Config) -> dict[str, Any]:
    """FLOPs of a local step, and memory."""
    model, like = cost.split(config, CLASSES, None), cost.example(config, None)
    found = training_flops(model, like.shape, like.dtype, cached=model.cut > 0)
    return {"flops": config.batch_size * found.total, "memory": axes.memory(config, CLASSES)._asdict()}


def tables(rows: Sequence[dict[str, Any]]) -> list[Any]:
    """The parts one below the other."""
    names = {
        "kind": "kinds of PEFT, FedAvg",
        "codec": "codecs up, LoRA in two blocks",
        "algorithm": "algorithms, the same",
    }
    return [part_table(title, [one for one in rows if one["part"] == part]) for part, title in names.items()]


def part_table(title: str, rows: Sequence[dict[str, Any]]) -> Table:
    """One part as a table for people."""
    made = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=title, title_justify="left", title_style="bold")
    made.add_column(rows[0]["part"])
    counted = "flops" in rows[0]
    for name in (
        "trained",
        "share",
        "up",
        "down",
        "once",
        "less than full",
        *(("GFLOP a step", "memory") if counted else ()),
    ):
        made.add_column(name, justify="right")
    for one in rows:
        if "refused" in one:
            made.add_row(one["name"], "not on this task")
            continue
        cells = [f"{one['trained']:,}", f"{one['share']:.3%}", sent(one, "up"), sent(one, "down"), size(one["setup"])]
        more = [f"{one['flops'] / 1e9:.3g}", size(sum(one["memory"].values()))] if counted else []
        made.add_row(one["name"], *cells, times(one["less"]), *more)
    return made


def sent(row: dict[str, Any], way: str) -> str:
    """Bytes one way, marked where they are a bound or a guess."""
    mark = {"exact": "", "at most": "<= ", "about": "~ "}[row[f"{way}_are"]]
    return mark + size(row[way])
