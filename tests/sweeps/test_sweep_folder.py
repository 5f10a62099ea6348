"""Who works on a cell, and how a cell stands: from its folder alone, whatever process died there."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from fedsim import record
from fedsim.config import Config, Speed
from fedsim.sweeps import folder
from fedsim.sweeps.cells import Sweep, cells

HOLDS = """
import sys
from pathlib import Path
from fedsim.sweeps import folder
with folder.claim(Path(sys.argv[1])) as is_mine:
    print(is_mine, flush=True)
    sys.stdin.read()
"""


def holding(place: Path, environment: dict[str, str]) -> tuple[subprocess.Popen[str], str]:
    """A process that has tried to claim a cell, and lives until its standard input ends; whether it has it, in its words."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDS, str(place)], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )  # fmt: skip
    assert process.stdout is not None
    return process, process.stdout.readline().strip()


def elsewhere(place: Path, age: float) -> None:
    """A claim of another host whose last sign of life is so many seconds old."""
    place.mkdir(exist_ok=True)
    (place / folder.CLAIM).write_text("elsewhere process 1 since 2026-11-29T06:00:00+00:00")
    os.utime(place / folder.CLAIM, (time.time() - age,) * 2)


def test_a_cell_that_a_process_has_is_not_taken_and_is_free_when_that_one_goes(
    tmp_path: Path, environment: dict[str, str]
) -> None:
    place = tmp_path / "cell"
    first, said = holding(place, environment)
    assert said == "True"
    second, said = holding(place, environment)
    assert said == "False"
    second.communicate()
    assert folder.state(place) == "running"  # the refused one has not given back what is not its own
    assert f"process {first.pid} since" in folder.holder(place)
    with folder.claim(place) as is_mine:
        assert not is_mine
    first.communicate()
    assert folder.state(place) == "waiting"
    assert not (place / folder.CLAIM).exists()
    with folder.claim(place) as is_mine:
        assert is_mine


def test_a_killed_process_gives_its_cell_back_at_once(tmp_path: Path, environment: dict[str, str]) -> None:
    place = tmp_path / "cell"
    process, _ = holding(place, environment)
    process.kill()
    process.communicate()
    assert (place / folder.CLAIM).read_text()  # nobody has tidied up
    assert folder.state(place) == "waiting"
    assert folder.holder(place) == ""
    with folder.claim(place) as is_mine:
        assert is_mine
        assert folder.state(place) == "running"


def test_the_claim_of_another_host_holds_while_it_gives_signs_of_life(tmp_path: Path) -> None:
    place = tmp_path / "cell"
    elsewhere(place, folder.SILENT / 2)
    assert folder.state(place) == "running"
    assert folder.holder(place).startswith("elsewhere process 1")
    with folder.claim(place) as is_mine:
        assert not is_mine
    elsewhere(place, folder.SILENT + 1)
    assert folder.state(place) == "waiting"
    with folder.claim(place) as is_mine:
        assert is_mine
        assert f"process {os.getpid()}" in folder.holder(place)


def test_a_claim_gives_signs_of_life_and_what_another_host_has_taken_over_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folder, "BEAT", 0.02)
    place = tmp_path / "cell"
    with folder.claim(place) as is_mine:
        assert is_mine
        os.utime(place / folder.CLAIM, (0, 0))
        until = time.monotonic() + 10
        while (place / folder.CLAIM).stat().st_mtime < 1 and time.monotonic() < until:
            time.sleep(0.01)
        assert time.time() - (place / folder.CLAIM).stat().st_mtime < 60
        elsewhere(place, 0)
    assert "elsewhere" in (place / folder.CLAIM).read_text()


def test_a_claim_that_is_not_written_yet_holds_for_a_moment(tmp_path: Path) -> None:
    (tmp_path / folder.CLAIM).touch()
    assert folder.claimed(tmp_path)
    os.utime(tmp_path / folder.CLAIM, (time.time() - folder.MADE - 1,) * 2)
    assert not folder.claimed(tmp_path)


def test_without_locks_of_the_system_signs_of_life_decide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder, "locked", lambda file, wait=False: None)
    with folder.claim(tmp_path) as first, folder.claim(tmp_path) as second:
        assert first and not second
    with folder.claim(tmp_path) as is_mine:
        assert is_mine


def test_of_many_that_try_at_once_one_has_it(tmp_path: Path) -> None:
    """Also where a dead process has left its claim, which all of them find at once."""
    for left in ("", f"{os.uname().nodename} process 1 since then"):
        place, at_once, tried, had = tmp_path / f"cell{len(left)}", threading.Barrier(16), threading.Barrier(16), []
        place.mkdir()
        if left:
            (place / folder.CLAIM).write_text(left)

        def take(place: Path = place, at_once=at_once, tried=tried, had=had) -> None:
            at_once.wait()
            with folder.claim(place) as is_mine:
                had.append(is_mine)
                tried.wait()

        threads = [threading.Thread(target=take) for _ in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(had) == [False] * 15 + [True]


def test_how_a_cell_stands(tmp_path: Path) -> None:
    assert folder.state(tmp_path / "cell") == "waiting"
    place = tmp_path / "cell"
    with folder.claim(place):
        assert folder.state(place) == "running"
    assert folder.state(place) == "waiting"
    (place / record.CONFIG).touch()
    assert folder.state(place) == "stopped"
    folder.fail(place, ValueError("Expected lr=-1 > 0;\nmore"))
    assert folder.state(place) == "failed" and folder.over(place)
    assert folder.error_of(place) == "Expected lr=-1 > 0;"
    with folder.claim(place):
        assert folder.state(place) == "running"
    (place / record.SUMMARY).touch()
    assert folder.state(place) == "done" and folder.over(place)


def test_errors_of_before_are_kept_under_numbers(tmp_path: Path) -> None:
    for message in ("first", "second"):
        folder.fail(tmp_path, message)
        folder.forgive(tmp_path)
    assert folder.state(tmp_path) == "waiting"
    assert ["first" in (tmp_path / f"error-{n}.json").read_text() for n in (1, 2)] == [True, False]
    folder.forgive(tmp_path)  # another process has been quicker


def test_clearing_keeps_the_claim_and_errors_of_before(tmp_path: Path) -> None:
    folder.fail(tmp_path, "first")
    folder.forgive(tmp_path)
    (tmp_path / "checkpoints" / "3").mkdir(parents=True)
    (tmp_path / record.CONFIG).touch()
    with folder.claim(tmp_path):
        folder.clear(tmp_path)
        assert sorted(entry.name for entry in tmp_path.iterdir()) == [folder.CLAIM, "error-1.json"]


def test_a_cell_is_found_by_its_key_under_any_readable_name(tmp_path: Path) -> None:
    base = Config(backbone="mlp", peft="full", rounds=3)
    cell = cells(Sweep(base=base, grid={"lr": [1e-3]}, repeat=2))[1]
    (tmp_path / f"other-words-{cell.key}").mkdir()
    assert folder.places(tmp_path, [cell])[cell.key].name == f"other-words-{cell.key}"


def test_cells_are_read_as_they_were_written(tmp_path: Path) -> None:
    base = Config(rounds=3)
    sweep = Sweep(
        base=base,
        grid={"targets": [("query",), ("query", "value")], "lanes": [1, 2]},
        seeds=2,
        repeat=2,
        speed=Speed(checkpoint_every=2),
    )
    made = cells(sweep)
    folder.write(tmp_path, base, made, made[:1], {})
    asked = folder.Asked(tmp_path)
    assert (asked.base, asked.cells, asked.tuning) == (base, made, made[:1])
    assert [cell.key for cell in asked.cells] == [cell.key for cell in made]
    with pytest.raises(ValueError, match="to hold a sweep"):
        folder.Asked(tmp_path / "nothing")


def test_another_base_or_a_single_run_is_refused(tmp_path: Path) -> None:
    base = Config(backbone="mlp", peft="full", rounds=3)
    made = cells(Sweep(base=base, grid={"lr": [1e-3]}))
    folder.write(tmp_path, base, made, [], {})
    folder.refuse_another(tmp_path, base.replace(lr=7.0), set())
    folder.refuse_another(tmp_path, base.replace(batch_size=7), {"batch_size"})
    with pytest.raises(ValueError, match="rounds is 3, not 4"):
        folder.refuse_another(tmp_path, base.replace(rounds=4), set())
    (tmp_path / record.CONFIG).touch()
    with pytest.raises(ValueError, match="to hold no single run"):
        folder.refuse_another(tmp_path, base, set())


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "cell").touch()
    with pytest.raises(OSError, match="cell"), folder.claim(tmp_path / "cell"):
        pass
