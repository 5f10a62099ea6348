"""`benchmarks/compare.py`: which figures moved, what is refused, files as a commit has them, no two figures of one path."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "compare.py"
COMMITTED = [f for f in (ROOT / "benchmarks" / "results").glob("*.json") if not f.stem.endswith("-small")]
COMMITTED += [ROOT / "experiments" / "results" / "client_count.json"]


@pytest.fixture(scope="module")
def compare() -> ModuleType:
    spec = importlib.util.spec_from_file_location("benchmark_compare", SCRIPT)
    assert spec is not None and spec.loader is not None
    sys.modules["benchmark_compare"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def result(results: object, **changes: object) -> dict:
    about = {"benchmark": "lanes", "options": {"repeats": 3}, "processor": "A", "cores": 2}
    return {**about, "results": results, **changes}


def test_figures_are_found_wherever_they_lie(compare: ModuleType) -> None:
    tree = {
        "rows": [{"name": "fast", "seconds": [1, 2.0]}, {"clients": 10, "bytes": 7, "cohorts": {"5": {"plan": [3.0]}}}],
        "same_bits": True,
        "word": "x",
        "none": None,
        "nothing": [],
    }
    assert dict(compare.figures(tree)) == {
        "rows / fast / seconds": [1.0, 2.0],
        "rows / clients 10 / bytes": [7.0],
        "rows / clients 10 / cohorts / 5 / plan": [3.0],
    }


@pytest.mark.parametrize("file", sorted(COMMITTED), ids=lambda file: file.name)
def test_every_figure_of_a_committed_file_has_a_path_of_its_own(compare: ModuleType, file: Path) -> None:
    found = compare.read(str(file))
    paths = [path for path, _ in compare.figures(found["results"], keys=compare.ROWS.get(found["benchmark"], ()))]
    assert len(paths) > 3 and len(paths) == len(set(paths))
    assert compare.by_path(found).keys() == set(paths)


def test_rows_are_named_by_all_that_tells_them_apart(compare: ModuleType) -> None:
    rows = [
        {"workload": "W1", "system": system, "repeats": [[s, s + 1]], "loss": s} for system, s in (("a", 1), ("b", 2))
    ]
    found = result(rows, benchmark="peers")
    assert compare.by_path(found) == {
        "workload W1, system a / repeats": [1, 2],  # of all rounds
        "workload W1, system a / loss": [1],
        "workload W1, system b / repeats": [2, 3],
        "workload W1, system b / loss": [2],
    }
    again = result([rows[0], rows[0] | {"loss": 3}], benchmark="peers")  # started twice
    assert compare.by_path(again)["workload W1, system a / loss"] == [1, 3]
    shapes = [{"work": "w2", "lanes": 4, "widths": widths, "seconds": [1.0]} for widths in ([8], [0, 8])]
    assert list(compare.by_path(result(shapes, benchmark="batch_shapes"))) == [
        "work w2, lanes 4, widths 8 / seconds",
        "work w2, lanes 4, widths 0 8 / seconds",
    ]


def test_figures_that_cannot_be_told_apart_are_refused(compare: ModuleType) -> None:
    unclear = result([{"work": "a", "lanes": 1, "seconds": 1}, {"work": "a", "lanes": 2, "seconds": 2}])
    with pytest.raises(ValueError, match=r"'work a / lanes' is there twice; give its rows a `name`"):
        compare.compare(unclear, unclear)


def test_client_count_and_profiles_are_compared(compare: ModuleType, tmp_path: Path) -> None:
    def read(content: object) -> dict:
        (tmp_path / "file.json").write_text(json.dumps(content))
        return compare.read(str(tmp_path / "file.json"))

    cell = {"form": "mlp", "members": 5, "population": 10, "lanes": 4, "seconds": 0.5, "processes": 1}
    cell |= {"git": {"commit": "a"}, "versions": {"jax": "1"}}
    store = {**cell, "form": "memory", "gather_ms": 2}
    found = read({"cells": {"mlp / 5 / 10": cell, "memory / 5 / 10": store}})
    assert (found["benchmark"], found["git"], found["versions"]) == ("client_count", {"commit": "a"}, {"jax": "1"})
    name = "form mlp, members 5, population 10, devices 1, lanes 4, least_seconds 4.0 / seconds"
    assert next(iter(compare.by_path(found))) == name
    assert "form memory, members 5, population 10 / gather_ms" in compare.by_path(found)
    newer = {**cell, "devices": 1, "least_seconds": 4.0, "seconds": 1.0}
    rows, _ = compare.compare(found, read({"cells": {"mlp / 5 / 10 / 1 x 4 lanes / 4 s": newer}}))
    assert [(row.name, row.ratio) for row in rows] == [(name, 2.0)]

    profile = {
        "schema": 1,
        "python": "3",
        "config": {"lr": 1.0},
        "speed": {"lanes": 2},
        "phase": "peft",
        "peak": {"x": 1},
    }
    profile |= {"base": {"seconds": [1.0, 2.0]}, "sweep": [{"changes": {"lanes": n}, "seconds": [n]} for n in (1, 2)]}
    found = read(profile)
    assert compare.by_path(found) == {
        "base / seconds": [1, 2],
        "sweep / changes lanes 1 / seconds": [1],
        "sweep / changes lanes 2 / seconds": [2],
    }
    _, notes = compare.compare(found, read(profile | {"speed": {"lanes": 4}}))
    assert notes == ["not the same work, options differ: lanes 2 -> 4"]


def test_a_figure_moved_only_beyond_the_spread_of_both(compare: ModuleType) -> None:
    old = result({"a": [1.0, 1.2, 1.1], "b": [1.0, 1.2, 1.1], "c": 4, "zero": 0})
    new = result({"a": [2.0, 2.4, 2.2], "b": [1.2, 1.5, 1.3], "c": 6, "zero": 1})
    rows, notes = compare.compare(old, new)
    assert [(r.name, r.ratio and round(r.ratio, 9), r.moved) for r in rows] == [
        ("a", 2.0, True),
        ("b", round(1.3 / 1.1, 9), False),  # the ranges touch
        ("c", 1.5, None),
        ("zero", None, None),
    ]
    assert notes == []
    rows, _ = compare.compare(new, old)
    assert rows[0].ratio == 0.5 and rows[0].moved


def test_what_makes_ratios_doubtful_is_said(compare: ModuleType) -> None:
    old = result({"a": 1, "gone": 1}, git={"commit": "f" * 40, "changed": True})
    new = result({"a": 1, "come": 1}, processor="B", options={"repeats": 5})
    notes = "\n".join(compare.compare(old, new)[1])
    for part in ("options differ: repeats 3 -> 5", "another machine", "processor differs: A -> B"):
        assert part in notes
    for part in ("only in the old one: gone", "only in the new one: come", "the old one was measured with changes"):
        assert part in notes


def test_different_benchmarks_and_other_files_are_refused(compare: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"of one benchmark, not of 'lanes' and 'allocator'"):
        compare.compare(result({}), result({}, benchmark="allocator"))
    (tmp_path / "other.json").write_text('{"a": 1}')
    (tmp_path / "broken.json").write_text("{")
    for name, reason in (("other.json", "to have `benchmark`"), ("broken.json", "to hold JSON"), ("no.json", "a file")):
        with pytest.raises(ValueError, match=reason):
            compare.read(str(tmp_path / name))


def test_the_command_compares_a_file_with_an_older_commit(tmp_path: Path, environment: dict[str, str]) -> None:
    def git(*args: str) -> None:
        who = ["-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false"]
        subprocess.run(["git", *who, *args], cwd=tmp_path, check=True, capture_output=True)

    def command(*args: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, str(SCRIPT), *args],
            cwd=tmp_path, env=environment, capture_output=True, text=True, check=False,
        )  # fmt: skip

    git("init", "-q")
    file = tmp_path / "results" / "lanes.json"
    file.parent.mkdir()
    file.write_text(json.dumps(result({"a": [1.0, 1.2, 1.1]})))
    git("add", ".")
    git("commit", "-q", "-m", "first")
    file.write_text(json.dumps(result({"a": [3.0, 3.6, 3.3]})))
    for args in (("results/lanes.json", "--against", "HEAD"), ("HEAD:results/lanes.json", "results/lanes.json")):
        done = command(*args)
        assert done.returncode == 0, done.stderr
        assert ["a", "1.1", "3.3", "3.000", "moved"] in [line.split() for line in done.stdout.splitlines()]
    for args, reason in (
        (("results/lanes.json", "--against", "nowhere"), "Expected commit 'nowhere' to have results/lanes.json"),
        (("results/lanes.json",), "Expected two files, or one with --against REV, not 1"),
    ):
        done = command(*args)
        assert done.returncode == 1 and reason in done.stderr and "Traceback" not in done.stderr
