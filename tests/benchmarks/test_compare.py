"""`benchmarks/compare.py`: which figures moved, what is refused, files as a commit has them."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "compare.py"


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
