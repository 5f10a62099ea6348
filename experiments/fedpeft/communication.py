"""What FedPEFT's methods send (Sun et al., arXiv 2210.01708): parameters and bytes, ViT-B/16, three data sets.

Command:  python benchmarks/tables.py fedpeft --table communication          (--json for programs)
Needs:    no weights, no data; the counts follow from the architectures and are those of a run (`fedsim cost`).
Time:     7 s of one core; 2 cores of a shared AMD EPYC, 23 GiB, 2026-11-23.
Result:   docs/cost.md has the tables as printed. One client, one way, 100 classes: full 343,502,224 B (327.589 MiB), bias
          719,248 B (0.686 MiB), bias without the patch embedding's 716,176 B (0.683 MiB), prompt 676,240 B (0.645 MiB).

The counts are exact for the architectures as stated here; they were not read in the paper. `source` of a row says where
its setting comes from: "paper" (its method, nothing else to choose), "computed" (chosen so that it fits a figure of the
paper), "ours" (a place or value of our own choice). Cohort and rounds are ours too. Accuracy is no matter of this table.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich import box
from rich.table import Table

from fedsim.cli import cost
from fedsim.config import Config

CLASSES = {"CIFAR-100": 100, "Resisc45": 45, "PCam": 2}
COHORT: dict[str, Any] = {"clients": 64, "clients_per_round": 8, "rounds": 50}

# Method -> backbone and options, source, what there is to choose.
METHODS: dict[str, tuple[dict[str, Any], str, str]] = {
    "full": ({"backbone": "vit_b16", "peft": "full"}, "paper", ""),
    "head": ({"backbone": "vit_b16", "peft": "head"}, "paper", ""),
    "bias": ({"backbone": "vit_b16", "peft": "bias"}, "computed", "the patch embedding's bias included"),
    "bias, patch bias frozen": (
        {"backbone": "vit_b16", "peft": "bias", "bias_patch": False},
        "computed",
        "the patch embedding's bias left out",
    ),
    "adapter, width 8": (
        {"backbone": "vit_b16", "peft": "adapter", "adapter_width": 8},
        "ours",
        "one per block, after the MLP, before its residual sum",
    ),
    "prompt, deep, 10 tokens": (
        {"backbone": "vit_b16", "peft": "prompt", "prompt_tokens": 10, "prompt_depth": "deep"},
        "computed",
        "10 tokens in each of the 12 layers",
    ),
    "LoRA, query and value, r = 4": (
        {"backbone": "vit_b16", "peft": "lora", "rank": 4, "targets": ("query", "value")},
        "ours",
        "not a method of the paper; rank and targets",
    ),
    "ShuffleNet V2 0.5x, full": (
        {"backbone": "shufflenet_v2_x0_5", "peft": "full"},
        "ours",
        "whether the paper uses this baseline is not verified",
    ),
}

NOTES = """\
The counts are exact for the architectures as stated. The paper's figures known to us are 328MB and 0.68MB, each one client
one way. 327.589 MiB (full, 100 classes) rounds to the first. The second fits bias without the patch embedding's bias (0.683
MiB), bias with it only when truncated (0.686 MiB), and the prompt in decimal units (0.676 MB): undecided. Source: paper = a
method of the paper with nothing else to choose; computed = chosen so that it fits a figure; ours = our own choice, as are 8
clients and 50 rounds. Bytes are payloads without names, framing or encryption; once, a client is given the frozen part."""


def rows() -> list[dict[str, Any]]:
    """Every method on every data set; the fields of `cost.Cost`, sizes in MiB, and where the setting comes from."""
    found = []
    for method, (options, source, choice) in METHODS.items():
        for dataset, classes in CLASSES.items():
            row = cost.cost(Config(**options, **COHORT), classes)._asdict()
            mib = {
                name.replace("bytes", "mib"): n / 2**20
                for name, n in row.items()
                if "bytes" in name and isinstance(n, int)
            }
            found.append(
                {"method": method, "dataset": dataset, "source": source, "choice": choice, "paper": None} | row | mib
            )
            if (method, dataset) == ("full", "CIFAR-100"):
                found[-1]["paper"] = "328MB"  # the paper's other figure fits several rows, see NOTES
    return found


def tables(rows: Sequence[dict[str, Any]]) -> list[Table | str]:
    """One client a round, the cohort a round, the whole run, both ways each; and what to know about them."""
    scopes = {
        "one client, one round": ("bytes_up", "bytes_down"),
        f"{COHORT['clients_per_round']} clients, one round": ("round_bytes_up", "round_bytes_down"),
        f"{COHORT['clients_per_round']} clients a round, {COHORT['rounds']} rounds": (
            "run_bytes_up",
            "run_bytes_down",
        ),
    }
    found: list[Table | str] = []
    for title, (up, down) in scopes.items():
        made = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
        for name in ("method", "data set"):
            made.add_column(name)
        for name in ("parameters", "up, bytes", "MiB", "down, bytes", "MiB"):
            made.add_column(name, justify="right")
        made.add_column("source")
        for row in rows:
            sizes = [text for n in (row[up], row[down]) for text in (f"{n:,}", f"{n / 2**20:,.3f}")]
            made.add_row(row["method"], row["dataset"], f"{row['trainable_parameters']:,}", *sizes, row["source"])
        found.append(made)
    return [*found, NOTES]
