"""What a sweep has found: a row for each cell, tables over seeds, the best cell by validation, pictures."""

from __future__ import annotations

import csv
import io
import itertools
import json
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from fedsim import record
from fedsim.config import SMALLER, metric_of
from fedsim.record.files import read_json
from fedsim.record.lines import flat, rounds
from fedsim.record.schemas import SUMMARY_SHAPE
from fedsim.report.summaries import scored
from fedsim.sweeps import folder
from fedsim.sweeps.cells import AGAIN, FIELDS, METHOD, Cell, said

if TYPE_CHECKING:
    import pandas as pd
    from rich.console import Console

ANEW = "restore the file, or delete it and start the same command, which ends the cell anew"
CELLS_CSV, ROUNDS_CSV = "cells.csv", "rounds.csv"
Spread = tuple[float, float | None]  # mean, and deviation of a sample


class Setting(NamedTuple):
    """Cells that differ in their seeds alone."""

    varied: dict[str, Any]
    cells: list[Cell]
    rows: list[dict[str, Any]]  # of those that are done

    def over_seeds(self, column: str) -> Spread | None:
        """Mean and deviation of a column; None where no cell, or not every one that is done, has a value."""
        values = [row[column] for row in self.rows]
        if not values or any(value is None for value in values):
            return None
        return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None


class Study:
    """The results of a sweep, as its folder tells them.

    Example:
        study = fedsim.load_sweep("study")
        study.table()
        study.frame().groupby("peft").test.mean()
    """

    def __init__(self, directory: Path) -> None:
        asked = folder.Asked(directory)
        self.directory, self.base, self.cells, self.tuning = directory, asked.base, asked.cells, asked.tuning
        self.chosen = {method: each["options"] for method, each in asked.chosen.items()}  # on validation, by method
        self.edges = {method: each["edges"] for method, each in asked.chosen.items()}  # chosen options at an edge
        self.places = folder.places(directory / folder.CELLS, self.cells)
        self.columns = tuple(dict.fromkeys(name for cell in self.cells for name in cell.varied if name != "seed"))
        self._ended: dict[str, dict[str, Any]] = {}  # rows that do not change any more
        self._curves: dict[str, list[tuple[int, int, float]]] = {}

    def __repr__(self) -> str:
        states = [row["state"] for row in self.rows()]
        counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
        return f"<fedsim sweep {self.directory}: {len(states)} cells, {counts}>"

    # --- cells

    def rows(self) -> list[dict[str, Any]]:
        """A row for each cell: name, state, what varies, seed, scores, bytes, seconds, error."""
        return [self.row(cell) for cell in self.cells]

    def row(self, cell: Cell) -> dict[str, Any]:
        """The row of a cell; scores, bytes and seconds are None before it is done."""
        if cell.key in self._ended:
            return self._ended[cell.key]
        place = self.places[cell.key]
        state, metric = folder.state(place), metric_of(cell.config)
        found = {
            "name": place.name,
            "state": state,
            **{name: cell.varied.get(name) for name in self.columns},
            "seed": cell.config.seed,
            "metric": metric,
            **dict.fromkeys(NUMBERS),
            "error": folder.error_of(place) if state == "failed" else "",
        }
        if state == "done":
            try:
                found |= numbers(read_json(place / record.SUMMARY, SUMMARY_SHAPE, ANEW), metric)
            except ValueError as error:  # a damaged cell is told of, and hides no other
                return found | {"state": "failed", "error": str(error)}
            self._ended[cell.key] = found
        return found

    def runs(self) -> list[record.Run]:
        """The runs of all cells that are done."""
        return [record.load(self.places[cell.key]) for cell in self.cells if self.row(cell)["state"] == "done"]

    def frame(self) -> pd.DataFrame:
        """The rows as a pandas table.

        Raises:
            ValueError: pandas is not installed.
        """
        return frame_of(self.rows())

    def rounds(self) -> pd.DataFrame:
        """A row for each cell and round, as a pandas table; see docs/record.md for the columns.

        Raises:
            ValueError: pandas is not installed.
        """
        return frame_of(list(self.round_rows()))

    def round_rows(self) -> Iterator[dict[str, Any]]:
        """A row for each round of each cell that has begun."""
        for cell in self.cells:
            place = self.places[cell.key]
            if not (place / record.CONFIG).is_file():
                continue
            own = {
                "name": place.name,
                **{name: cell.varied.get(name) for name in self.columns},
                "seed": cell.config.seed,
            }
            for line in whole_lines(place):
                yield own | {name: value for name, value in flat(line).items() if name not in own}

    # --- over seeds

    def settings(self) -> list[Setting]:
        """The cells by what varies beside their seeds."""
        found: dict[str, Setting] = {}
        for cell in self.cells:
            varied = {name: value for name, value in cell.varied.items() if name not in AGAIN}
            setting = found.setdefault(json.dumps(record.plain(varied)), Setting(varied, [], []))
            setting.cells.append(cell)
            if (row := self.row(cell))["state"] == "done":
                setting.rows.append(row)
        return list(found.values())

    def best(self) -> dict[str, Any]:
        """The row of the cell with the best score on validation at its end; the test set has no say.

        Raises:
            ValueError: no cell is done.
        """
        scored_rows = [row for row in self.rows() if row["validation"] is not None]
        if not scored_rows:
            raise ValueError(
                f"Expected a cell of {self.directory} to be done with a score; start the same command again."
            )
        smaller = scored_rows[0]["metric"] in SMALLER
        return (min if smaller else max)(scored_rows, key=lambda row: row["validation"])

    def target(self) -> float | None:
        """A score on validation that every setting reaches on average: the worst of their means at the end."""
        means = [spread[0] for s in self.settings() if (spread := s.over_seeds("validation"))]
        if not means:
            return None
        return max(means) if self.metric in SMALLER else min(means)

    @property
    def metric(self) -> str:
        """The score that judges the cells, as the first one has it."""
        return metric_of(self.cells[0].config)

    def curve(self, cell: Cell) -> list[tuple[int, int, float]]:
        """(round, bytes sent so far both ways, score on validation) of each evaluation with a score."""
        if cell.key not in self._curves or cell.key not in self._ended:
            lines = whole_lines(self.places[cell.key])
            self._curves[cell.key] = [
                (line["round"], line["total_bytes_up"] + line["total_bytes_down"], line["validation"][self.metric])
                for line in scored(lines, self.metric)
            ]
        return self._curves[cell.key]

    def bytes_to(self, setting: Setting, target: float | None) -> tuple[int | None, int]:
        """Mean bytes at the first evaluation that reaches a score, and how many of the setting's cells do."""
        smaller, found = self.metric in SMALLER, []
        if target is None:
            return None, 0
        for cell in setting.cells:
            if self.row(cell)["state"] == "done":
                reached = [
                    sent for _, sent, value in self.curve(cell) if (value <= target if smaller else value >= target)
                ]
                found += reached[:1]
        return (round(statistics.mean(found)) if found else None), len(found)

    def shown(self) -> list[str]:
        """What tells settings apart: the columns without seeds, and without what was chosen for each method."""
        chosen = {name for options in self.chosen.values() for name in options}
        return [name for name in self.columns if name not in chosen and name not in AGAIN]

    def name_of(self, setting: Setting, columns: Sequence[str] | None = None) -> str:
        """A setting in words: `lora, clients_per_round=3`.

        Args:
            columns: these alone (default: all).
        """
        names = [name for name in self.shown() if name in (columns or self.columns)]
        shown = {name: setting.varied[name] for name in names if name in setting.varied}
        return ", ".join(value if isinstance(value, str) else f"{name}={said(value)}" for name, value in shown.items())

    # --- shown

    def table(self, *, target: float | None = None, console: Console | None = None) -> None:
        """Prints mean and deviation over seeds, bytes, and bytes to a score.

        Args:
            target: the score on validation (default: `self.target()`, which all settings reach).
        """
        from fedsim.sweeps.show import print_study

        print_study(self, self.target() if target is None else target, console)

    def plot(self, file: str | PathLike[str], x: Literal["rounds", "bytes"] = "rounds") -> Path:
        """Draws the score on validation, a colour for each method, a line for each setting and a band for its seeds.

        Raises:
            ValueError: no cell has a score.
        """
        from fedsim.sweeps.pictures import draw

        return draw(self, Path(file), x)

    # --- kept

    def write(self) -> None:
        """Writes cells.csv and rounds.csv anew, and both as .parquet where pyarrow is installed.

        Raises:
            OSError: they cannot be written.
        """
        with folder.alone(self.directory):
            save(self.directory / CELLS_CSV, self.rows())
            save(self.directory / ROUNDS_CSV, self.round_rows)

    def method_columns(self) -> list[str]:
        """The columns that make a method: axes of one's own, and options of the model, the algorithm and the optimizers."""
        mine = [
            name for name in self.columns if name in METHOD or (name not in FIELDS and name not in (*AGAIN, "draw"))
        ]
        return mine or [name for name in self.columns if name not in AGAIN][:1]


NUMBERS = ("validation", "test", "best", "best_round", "rounds", "parameters")
NUMBERS += ("bytes_up", "bytes_down", "bytes", "setup_bytes", "seconds")


def numbers(summary: Mapping[str, Any], metric: str) -> dict[str, Any]:
    """Scores, bytes and seconds of a finished cell."""
    final, best, sent = summary["final"], summary.get("best") or {}, summary["bytes"]
    return {
        "validation": (final["validation"] or {}).get(metric),
        "test": (final["test"] or {}).get(metric),
        "best": best.get(metric),
        "best_round": best.get("round"),
        "rounds": summary["rounds"],
        "parameters": summary["parameters"]["trained"],
        "bytes_up": sent["up"],
        "bytes_down": sent["down"],
        "bytes": sent["total"],
        "setup_bytes": sent["setup"],
        "seconds": summary["seconds"],
    }


def whole_lines(place: Path) -> Sequence[record.Round]:
    """The rounds of a cell; none of one that is under way, or has failed, while its files are not whole."""
    try:
        return rounds(place)
    except ValueError:
        if folder.state(place) == "done":
            raise
        return []


def load_sweep(directory: str | PathLike[str]) -> Study:
    """A sweep from its folder, finished or not.

    Raises:
        ValueError: the folder holds no sweep, or a damaged one.
    """
    return Study(Path(directory))


def is_sweep(directory: Path) -> bool:
    """Whether a folder holds a sweep."""
    return (directory / folder.SWEEP).is_file()


def frame_of(rows: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """Rows as a pandas table; raises `ValueError` where pandas is not installed."""
    try:
        import pandas as pd
    except ImportError:
        raise ValueError("Expected pandas to be installed for a table; pip install pandas, or use .rows().") from None
    return pd.DataFrame(rows)


def save(file: Path, rows: Any) -> None:
    """Writes rows as CSV, whole or not at all, and as .parquet beside it where pyarrow is installed.

    Args:
        rows: a list of them, or a function that gives them one by one, as often as it is called.
    """
    again = rows if callable(rows) else lambda: rows
    columns = list(dict.fromkeys(itertools.chain.from_iterable(again())))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: written(value) for name, value in row.items()} for row in again())
    content = text.getvalue().encode()
    record.write_bytes(file, content)
    try:
        from pyarrow import csv as arrow
        from pyarrow import parquet
    except ImportError:
        return
    if not columns:
        return
    whole = arrow.ReadOptions(block_size=min(len(content) + 1, 2**31 - 1))  # types are those of the first block
    read = arrow.read_csv(io.BytesIO(content), whole, arrow.ParseOptions(newlines_in_values=True))
    beside = io.BytesIO()
    parquet.write_table(read, beside)
    record.write_bytes(file.with_suffix(".parquet"), beside.getvalue())


def written(value: Any) -> Any:
    """A value as a cell of CSV: nothing for what is not known."""
    if isinstance(value, (tuple, list, dict)):
        return json.dumps(value)
    return "" if value is None or (isinstance(value, float) and math.isnan(value)) else value
