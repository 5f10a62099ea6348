"""Who runs the cells: in which order, beside whom, what becomes of errors and of processes that die."""

from __future__ import annotations

import errno
import importlib.util
import json
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fedsim
from crews import board_of, ends, planned, states
from fedsim import record, stops
from fedsim.config import Config, Speed
from fedsim.record.files import read_json
from fedsim.sweeps import cell as one
from fedsim.sweeps import crew, folder, launchers, sweep, worker
from fedsim.sweeps.cells import Cell, Sweep, cells
from fedsim.sweeps.work import begin_at, work_here

# --- which cell is next


@pytest.mark.parametrize(
    ("free", "groups", "begins"),
    [
        ("", "", None),
        ("--", "aa", None),
        ("++++", "aabb", 0),
        ("-++++++", "aaaaaaa", 4),  # somebody works from the left: the middle
        ("-++++++", "aaaaabb", 5),  # a border between groups, not the middle
        ("-++++++", "abbbbcc", 5),  # the border that is nearest to the middle (4)
        ("-++++++", "aabbccd", 4),
        ("++-++++", "aaaaaaa", 5),  # the longest row
        ("+-+", "aaa", 0),
    ],
)
def test_where_a_process_begins_beside_others(free: str, groups: str, begins: int | None) -> None:
    assert begin_at([letter == "+" for letter in free], groups) == begins


def test_two_processes_begin_with_different_data_and_run_every_cell_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = planned(tmp_path, lr=[1e-3, 2e-3, 3e-3], dataset=["a.npz", "b.npz"])
    monkeypatch.setattr(one, "keys", lambda config: (config.dataset, "", "", ""))
    both, order = threading.Barrier(2), []
    first = threading.local()

    def run(cell: Cell, place: Path, shared: object) -> None:
        if not hasattr(first, "has"):
            first.has = True
            order.append(cell.config.dataset)
            both.wait(20)
        time.sleep(0.02)
        ends(cell, place)

    monkeypatch.setattr(one, "run", run)
    work = work_here()
    threads = [
        threading.Thread(target=work, args=(tmp_path / folder.CELLS, made, board_of(tmp_path, made), False))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(order) == ["a.npz", "b.npz"]
    ran = [(place / "ran").read_text().split() for place in folder.places(tmp_path / folder.CELLS, made).values()]
    assert [len(each) for each in ran] == [1] * 6
    assert len({each[0] for each in ran}) == 2


def test_each_cell_is_looked_at_a_few_times_however_many_there_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = planned(tmp_path, lr=[1e-3 + n / 1e6 for n in range(200)])
    monkeypatch.setattr(one, "keys", lambda config: ("", "", "", ""))
    monkeypatch.setattr(one, "run", ends)
    looks, state = [], folder.state
    board = board_of(tmp_path, made)
    monkeypatch.setattr(folder, "state", lambda place: looks.append(place) or state(place))
    work_here()(tmp_path / folder.CELLS, made, board, False)
    assert states(tmp_path, made) == ["done"] * 200
    assert len(looks) <= 4 * 200 + 200  # the last 200 are this test's own


# --- what becomes of errors


def test_a_failed_cell_keeps_its_error_and_the_others_go_on_until_it_is_retried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken, ran = [True], []

    def run(cell: Cell, place: Path, shared: object) -> None:
        ran.append(cell.config.lr)
        if cell.config.lr == 2e-3 and broken:
            raise ValueError("Expected a b c.")
        ends(cell, place)

    monkeypatch.setattr(one, "run", run)
    made = planned(tmp_path)
    place = folder.places(tmp_path / folder.CELLS, made)[made[1].key]

    def again() -> None:
        work_here()(tmp_path / folder.CELLS, made, board_of(tmp_path, made), False)

    again()
    assert states(tmp_path, made) == ["done", "failed", "done", "done"]
    assert folder.error_of(place) == "Expected a b c."
    assert "in run" in json.loads((place / folder.ERROR).read_text())["traceback"]
    again()
    assert len(ran) == 4  # neither done nor failed cells run again by themselves
    broken.clear()
    sweep.forgive(tmp_path / folder.CELLS, made)
    again()
    assert ran[4:] == [2e-3]
    assert states(tmp_path, made) == ["done"] * 4


def test_a_full_disk_ends_the_sweep_and_fails_no_cell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(cell: Cell, place: Path, shared: object) -> None:
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        except OSError as error:
            raise OSError("Expected it to be written; make room.") from error

    monkeypatch.setattr(one, "run", run)
    made = planned(tmp_path)
    with pytest.raises(OSError, match="make room"):
        work_here()(tmp_path / folder.CELLS, made, board_of(tmp_path, made), False)
    assert states(tmp_path, made) == ["waiting"] * 4


def test_a_stop_says_that_the_same_command_goes_on_and_gives_the_cell_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(cell: Cell, place: Path, shared: object) -> None:
        raise stops.Stop(f"Stopped after round 7; {stops.way_on(place)}", signal.SIGTERM)

    monkeypatch.setattr(one, "run", run)
    made = planned(tmp_path)
    with pytest.raises(KeyboardInterrupt) as stop:
        work_here()(tmp_path / folder.CELLS, made, board_of(tmp_path, made), False)
    assert str(stop.value).startswith("Stopped after round 7 of lr=0.001-")
    assert "--resume" not in str(stop.value) and "same command" in str(stop.value)
    assert stops.status(stop.value) == 143
    assert states(tmp_path, made) == ["waiting"] * 4


@pytest.mark.slow
def test_a_cell_of_other_devices_or_another_jax_is_begun_anew_and_a_damaged_one_fails_alone(
    tmp_path: Path, blobs: Callable[..., Path]
) -> None:
    base = Config(
        dataset=str(blobs(tmp_path)), backbone="mlp", peft="head", clients=12, clients_per_round=4, min_size=3, rounds=2
    )
    speed = Speed(lanes=2, devices=1, checkpoint_every=1)
    made, study = cells(Sweep(base=base, grid={"lr": [1e-3, 2e-3]}, speed=speed)), tmp_path / "study"
    places = [study / folder.CELLS / cell.name for cell in made]
    for cell, place in zip(made, places, strict=True):
        fedsim.run(cell.config, cell.speed, out=place, quiet=True)
        (place / record.SUMMARY).unlink()
    about = read_json(places[0] / record.CONFIG, {})
    about["versions"]["jax"] = "0.0.1"
    record.write_json(places[0] / record.CONFIG, about)
    (places[1] / record.CONFIG).write_text("{")
    found = fedsim.sweep(base=base, grid={"lr": [1e-3, 2e-3]}, speed=speed, out=study, quiet=True)
    assert [row["state"] for row in found.rows()] == ["done", "failed"]
    assert record.load(places[0]).about["versions"]["jax"] != "0.0.1"
    assert "config.json" in found.rows()[1]["error"]
    (places[0] / record.SUMMARY).write_text("{")
    damaged = fedsim.load_sweep(study)
    assert [row["state"] for row in damaged.rows()] == ["failed", "failed"]
    assert "delete it and start the same command" in damaged.rows()[0]["error"]
    damaged.write()


# --- several processes


def test_several_processes_share_the_cells_cores_and_devices(crew_of: Callable[[str], Path]) -> None:
    study = crew_of("time.sleep(0.3)")
    made = planned(study)
    launchers.find("local", 2)(study / folder.CELLS, made, board_of(study, made), False)
    ran = [(study / folder.CELLS / cell.name / "ran").read_text().splitlines() for cell in made]
    assert [len(each) for each in ran] == [1] * 4
    assert len({each[0].split()[0] for each in ran}) == 2
    told = {tuple(each[0].split(maxsplit=2)[1:]) for each in ran}
    if len(os.sched_getaffinity(0)) == 2:
        assert {cores for _, cores in told} == {"['--cores', '0']", "['--cores', '1']"}
    assert len({devices for devices, _ in told}) == 1


def test_a_cell_that_kills_its_processes_is_given_up_and_the_others_go_on(crew_of: Callable[[str], Path]) -> None:
    study = crew_of("cell.config.lr == 2e-3 and os.kill(os.getpid(), signal.SIGKILL)")
    made = planned(study)
    launchers.find("local", 2)(study / folder.CELLS, made, board_of(study, made), False)
    assert states(study, made) == ["done", "failed", "done", "done"]
    error = folder.error_of(study / folder.CELLS / made[1].name)
    assert "3 have died in it (SIGKILL, as where memory runs out)" in error and "--retry" in error
    begun = [f"begins {made[1].name}" in log.read_text() for log in (study / folder.LOGS).iterdir()]
    assert crew.DEATHS <= sum(begun) <= crew.DEATHS + 1  # another may take it before the third death is seen


def test_a_process_that_dies_once_is_replaced(crew_of: Callable[[str], Path]) -> None:
    action = "(place / 'died').exists() or ((place / 'died').touch(), os.kill(os.getpid(), signal.SIGSEGV))"
    study = crew_of(action)
    made = planned(study)
    launchers.find("local", 1 + 1)(study / folder.CELLS, made, board_of(study, made), False)
    assert states(study, made) == ["done"] * 4


def test_processes_that_never_get_as_far_as_a_cell_are_told_of(crew_of: Callable[[str], Path]) -> None:
    study = crew_of("pass")
    made = planned(study)
    (study.parent / "worker.py").write_text("import sys\nsys.exit('ImportError: no such thing')\n")
    with pytest.raises(
        OSError, match=r"3 have ended before \(exit status 1\): ImportError: no such thing; see .*\.log"
    ):
        launchers.find("local", 2)(study / folder.CELLS, made, board_of(study, made), False)
    (study.parent / "worker.py").write_text(f"print('fedsim: Expected room.')\nraise SystemExit({worker.FAULT})\n")
    with pytest.raises(OSError, match=r"^Expected room\.$"):
        launchers.find("local", 2)(study / folder.CELLS, made, board_of(study, made), False)


def test_a_stop_is_passed_on_once_and_waited_for(crew_of: Callable[[str], Path]) -> None:
    study = crew_of(
        "signal.signal(signal.SIGTERM, lambda *_: (time.sleep(0.3), (place / 'stopped').touch(), sys.exit(143)))\n"
        "            (place / 'ready').touch(); time.sleep(60)"
    )
    made = planned(study)
    running = crew.Crew(study / folder.CELLS, made, 2)
    assert running.look()
    until = time.monotonic() + 30
    while len(list(study.rglob("ready"))) < 2 and time.monotonic() < until:
        time.sleep(0.02)
    assert all(os.getsid(each.process.pid) != os.getsid(0) for each in running.workers)  # out of the terminal's reach
    running.stop(signal.SIGTERM)
    assert len(list(study.rglob("stopped"))) == 2
    assert [each.process.poll() for each in running.workers] == [143, 143]
    assert states(study, made) == ["waiting"] * 4


def test_what_each_process_gets_of_the_machine(tmp_path: Path) -> None:
    def environments(jobs: int, environ: dict[str, str], **named: Any) -> list[dict[str, str]]:
        return [part.environment for part in crew.parts(jobs, environ, **named)]

    assert crew.parts(1, {"CUDA_VISIBLE_DEVICES": "0,1"}) == [crew.Part({}, ())]
    four = {"CUDA_VISIBLE_DEVICES": "2,3,5,7"}
    assert [e["CUDA_VISIBLE_DEVICES"] for e in environments(4, four)] == ["2", "3", "5", "7"]
    assert all("XLA_PYTHON_CLIENT_MEM_FRACTION" not in e for e in environments(4, four))
    shared = environments(3, {"CUDA_VISIBLE_DEVICES": "0,1"})
    assert [e["CUDA_VISIBLE_DEVICES"] for e in shared] == ["0", "1", "0"]
    assert {e["XLA_PYTHON_CLIENT_MEM_FRACTION"] for e in shared} == {"0.450"}
    cpu = {"JAX_PLATFORMS": "cpu", **four}
    parts = crew.parts(2, cpu, cores=range(5), devices=3)
    assert [part.cores for part in parts] == [(0, 2, 4), (1, 3)]
    assert {part.environment["JAX_NUM_CPU_DEVICES"] for part in parts} == {"3"}
    assert [part.cores for part in crew.parts(3, cpu, cores=range(2))] == [()] * 3  # more processes than cores
    assert environments(2, {**cpu, "JAX_NUM_CPU_DEVICES": "7"}) == [{}, {}]  # the user's own stays
    for name in ("nvidia0", "nvidia1", "nvidia10", "nvidiactl", "nvidia-uvm"):
        (tmp_path / name).touch()
    assert crew.visible_gpus({}, tmp_path) == ["0", "1", "10"]
    assert crew.visible_gpus({"JAX_PLATFORMS": "cpu"}, tmp_path) == []
    assert not crew.has_tpu({}, tmp_path)
    (tmp_path / "accel0").touch()
    assert crew.has_tpu({}, tmp_path) and not crew.has_tpu({"JAX_PLATFORMS": "cpu"}, tmp_path)


# --- launchers by their names


@pytest.mark.parametrize(
    ("name", "jobs", "said"),
    [
        ("slrm", 2, r"launcher='slrm' to be one of local, slurm, submitit_local, ray \(did you mean slurm\?\)"),
        ("local(jobs=2)", 2, "no options"),
        ("slurm('gpu')", 2, r"options by their names; write slurm\(OPTION=VALUE\)"),
        ("local", 0, "jobs=0 >= 1"),
        ("local", True, "jobs=True >= 1"),
    ],
)
def test_what_is_refused(name: str, jobs: int, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        launchers.find(name, jobs)


def test_arrays_in_memory_are_for_this_process_alone() -> None:
    data = fedsim.arrays(np.zeros((20, 3), np.float32), np.arange(20) % 2)
    launchers.find("local", 1, data)
    for name, jobs in (("local", 2), ("submitit_local", 1)):
        with pytest.raises(ValueError, match=r"numpy\.savez"):
            launchers.find(name, jobs, data)


@pytest.mark.parametrize("name", ["slurm(partition='gpu')", "ray"])
def test_a_package_that_is_missing_is_told_before_anything_runs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda package: None)
    with pytest.raises(ValueError, match=rf"pip install 'fedsim-jax\[{name.partition('(')[0]}\]'"):
        launchers.find(name, 2)


def test_without_slurm_slurm_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("submitit")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match="start it where sbatch is"):
        launchers.find("slurm", 2)
