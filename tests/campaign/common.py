"""What the parts of the campaign share: how a case may end, and the count of the ends."""

from __future__ import annotations

import dataclasses
import json
import random
import re
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

TIMES = {"seconds", "compile_seconds", "clients_per_second", "examples_per_second", "flops_per_second", "mfu"}
TIMES |= {"most_memory", "server_seconds"}

RIGHT, REFUSED = "right", "refused"  # the result of an undisturbed run; a clear error
WRONG, LOST, UNCLEAR = (
    "wrong",
    "lost",
    "unclear",
)  # another result; work that was done is gone; a traceback, or words without a name
BAD = (WRONG, LOST, UNCLEAR)


@dataclasses.dataclass
class Tally:
    """How the cases of one part ended, and what to look at."""

    part: str
    ends: Counter[str] = dataclasses.field(default_factory=Counter)
    bad: list[str] = dataclasses.field(default_factory=list)

    def add(self, case: str, end: str, said: object = "") -> None:
        """Counts a case; one that ended badly is kept in words."""
        self.ends[end] += 1
        if end in BAD:
            self.bad.append(f"{case}: {end}: {said}"[:600])

    @property
    def cases(self) -> int:
        """How many there were."""
        return sum(self.ends.values())

    def __str__(self) -> str:
        ends = ", ".join(f"{self.ends[end]} {end}" for end in (RIGHT, REFUSED, *BAD))
        return f"{self.part}: {self.cases} cases: {ends}"


def judged(
    call: Callable[[], Any], expected: Any, same: Callable[[Any, Any], bool], named: str = ""
) -> tuple[str, str]:
    """How a call ends, and its words.

    Args:
        expected: the result of an undisturbed case.
        same: whether two results are the same.
        named: what a clear error has to name.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a damaged checkpoint is said, and the one before it taken
            found = call()
    except ValueError as error:
        return (REFUSED if clear(str(error), named) else UNCLEAR), str(error)
    except Exception as error:
        return UNCLEAR, f"{type(error).__name__}: {error}"
    return (RIGHT, "") if same(expected, found) else (WRONG, repr(found)[:300])


def clear(words: str, named: str = "") -> bool:
    """Whether an error says what was expected, names what it is about, and is no library's traceback."""
    return bool(re.search(r"\bExpected\b", words)) and named in words and "Traceback" not in words


def lines(run: Path) -> list[dict[str, Any]]:
    """The rounds of a run without what tells time, and without the checksum over it."""
    rows = [json.loads(line) for line in (run / "rounds.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in (*TIMES, "checksum")} for row in rows]


def damage(file: Path, kind: str, rng: random.Random, other: Path | None = None) -> None:
    """Damages a file: `truncate`, `flip` (one bit), `garble` (a stretch), `empty`, `delete`, or `replace` by another one."""
    content = bytearray(file.read_bytes())
    if kind == "delete":
        file.unlink()
        return
    if kind == "replace" and other is not None and other.is_file():
        content = bytearray(other.read_bytes())
    elif kind == "truncate":
        content = content[: rng.randrange(len(content) or 1)]
    elif kind == "flip" and content:
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    elif kind == "garble" and content:
        start = rng.randrange(len(content))
        stretch = content[start : start + 64]
        content[start : start + 64] = bytes(rng.randrange(256) for _ in stretch)
    elif kind == "empty":
        content = bytearray()
    file.write_bytes(content)


DAMAGES = ("truncate", "flip", "garble", "empty", "delete", "replace")
