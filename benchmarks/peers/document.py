"""The tables of docs/peers.md, written between markers from the kept records.

A table stands between `<!-- table NAME -->` and `<!-- end of NAME -->`; the rest of the document is written by hand.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import verdicts
import workloads

DOCUMENT = Path(__file__).parents[2] / "docs" / "peers.md"
RESULTS = Path(__file__).parents[1] / "results"
FILES = {"cpu": RESULTS / "peers.json", "gpu": RESULTS / "peers-gpu.json"}
WORK = {"cpu": workloads.WORKLOADS, "gpu": workloads.GPU_WORKLOADS}


def kept(platform: str) -> dict[str, Any] | None:
    """The content of the file of results, None where nothing has been measured yet."""
    file = FILES[platform]
    return json.loads(file.read_text()) if file.exists() else None


def tables_of(content: Mapping[str, Any], platform: str = "cpu") -> dict[str, list[verdicts.Row]]:
    """Workload -> rows; of the platform's workloads all, of others those that have records."""
    measured = {r["workload"] for r in content["results"]}
    names = [name for name in workloads.ALL if name in WORK[platform] or name in measured]
    start = content["start_loss"]
    return {name: verdicts.rows(content["results"], name, start.get(name, float("nan"))) for name in names}


def rendered(platform: str, content: Mapping[str, Any] | None) -> dict[str, str]:
    """Marker -> what stands there."""
    if content is None:
        return {f"{platform} result": "Not run yet.", f"{platform} verdicts": "Not run yet."}
    tables = tables_of(content, platform)
    return {
        f"{platform} result": verdicts.markdown(tables),
        f"{platform} verdicts": verdicts.verdicts_markdown(tables),
    }


def inserted(text: str, tables: Mapping[str, str]) -> str:
    """The document with these tables between their markers.

    Raises:
        ValueError: the document lacks a marker.
    """
    for name, table in tables.items():
        begin, end = f"<!-- table {name} -->", f"<!-- end of {name} -->"
        if begin not in text or end not in text:
            raise ValueError(f"Expected {begin} and {end} in the document.")
        before, _, rest = text.partition(begin)
        text = f"{before}{begin}\n\n{table}\n\n{end}{rest.partition(end)[2]}"
    return text


def written(text: str) -> str:
    """The document with the tables of all that is kept."""
    for platform in FILES:
        text = inserted(text, rendered(platform, kept(platform)))
    return text


def write() -> None:
    """Brings the document's tables up to date."""
    DOCUMENT.write_text(written(DOCUMENT.read_text()))
