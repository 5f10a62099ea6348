"""Who runs the cells: in which order, beside whom, what becomes of errors and of processes that die."""

from __future__ import annotations

import errno
import importlib.util
import json
import os
import signal
import stat
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fedsim
from fedsim import record, stops
from fedsim.config import Config, Speed
from fedsim.record.files import read_json
from fedsim.sweeps import cell as one
from fedsim.sweeps import clusters, crew, folder, launchers, sweep, worker
from fedsim.sweeps.board import Board
from fedsim.sweeps.cells import Cell, Sweep, cells
from fedsim.sweeps.work import begin_at, work_here

BASE = Config(backbone="mlp", peft="full", rounds=3)


def planned(study: Path, **grid: list[Any]) -> list[Cell]:
    """The cells of a sweep that nobody has begun."""
    made = cells(Sweep(base=BASE, grid=grid or {"lr": [1e-3, 2e-3, 3e-3, 4e-3]}))
    folder.write(study, BASE, made, [], {})
    return made


def board_of(study: Path, made: list[Cell]) -> Board:
    """A board that shows nothing."""
    board = Board(study, quiet=True)
    board.begin(made, study / folder.CELLS, "test")
    return board


def ends(cell: Cell, place: Path, shared: object = None) -> None:
    """A cell that is over at once: it says who ran it, as often as it is run."""
    with (place / "ran").open("a") as file:
        file.write(f"{threading.get_ident()}\n")
    (place / record.SUMMARY).touch()


def states(study: Path, made: list[Cell]) -> list[str]:
    """How the cells stand."""
    return [folder.state(place) for place in folder.places(study / folder.CELLS, made).values()]


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
    assert folder.error_of(place) == "ValueError: Expected a b c."
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

WORKER = """
import os, signal, sys, time
from pathlib import Path
from fedsim import record
from fedsim.sweeps import folder, worker

study, which = Path(sys.argv[1]), sys.argv[2]
asked = folder.Asked(study)
for cell in asked.cells:
    place = study / which / cell.name
    if folder.state(place) not in ("waiting", "stopped"):
        continue
    with folder.claim(place) as is_mine:
        if is_mine and not folder.over(place):
            worker.say(f"{worker.BEGINS} {cell.name}")
            ACTION
            (place / "ran").open("a").write(f"{os.getpid()} {os.environ.get('JAX_NUM_CPU_DEVICES')} {sys.argv[3:]}\\n")
            (place / record.SUMMARY).touch()
            worker.say(f"{worker.ENDED} {cell.name}")
"""


@pytest.fixture
def crew_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """`crew_of(action)`: processes of a crew do that in each cell instead of running it; gives the sweep's folder."""

    def made(action: str) -> Path:
        (tmp_path / "worker.py").write_text(WORKER.replace("ACTION", action))
        inner = crew.command_of

        def command(*args: Any, **named: Any) -> list[str]:
            _, _, module, *rest = inner(*args, **named)
            assert module == "fedsim.sweeps.worker"
            return [sys.executable, str(tmp_path / "worker.py"), *rest]

        monkeypatch.setattr(crew, "command_of", command)
        monkeypatch.setattr("fedsim.sweeps.board.LOOK", 0.02)
        return tmp_path / "study"

    return made


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
    assert sum(begun) == crew.DEATHS


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
        ("submitit_local(partitoin='gpu')", 2, "options of launcher=submitit_local that submitit takes"),
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


def test_processes_of_submitit_run_the_cells(crew_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("submitit")
    study = crew_of("time.sleep(0.2)")
    made = planned(study)
    (study.parent / "sitecustomize.py").write_text(PATCHED.format(worker=str(study.parent / "worker.py")))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(study.parent), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setattr(clusters, "LOOK", 0.1)
    launchers.find("submitit_local", 2)(study / folder.CELLS, made, board_of(study, made), False)
    ran = [(study / folder.CELLS / cell.name / "ran").read_text().splitlines() for cell in made]
    assert [len(each) for each in ran] == [1] * 4
    assert all("'--led'" in each[0] for each in ran)


# In the processes of submitit, where a test cannot patch: the crew of this file's processes.
PATCHED = """
import sys
if any("submitit" in word for word in sys.orig_argv):
    from fedsim.sweeps import crew
    inner = crew.command_of
    crew.command_of = lambda *args, **named: [sys.executable, {worker!r}, *inner(*args, **named)[3:]]
"""

SBATCH = """#!PYTHON
# Slurm for tests: one array, each of whose tasks is a process of this machine, and which is queued again as Slurm does it.
import os, re, subprocess, sys
text = open(sys.argv[1]).read()
count = re.search(r"--array=0-(\\d+)%", text)
with open("FOLDER/submitted", "a") as file:
    file.write(text + "\\n=====\\n")
tasks = range(int(count[1]) + 1) if count else [None]
for task in tasks:
    own = {"SLURM_JOB_ID": "77", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "1", "SLURM_JOB_NUM_NODES": "1"}
    if task is not None:
        own |= {"SLURM_ARRAY_JOB_ID": "77", "SLURM_ARRAY_TASK_ID": str(task)}
    again = f"FOLDER/again{task}"
    loop = f"while true; do echo >> FOLDER/starts; rm -f {again}; bash {sys.argv[1]}; [ -e {again} ] || break; done"
    out = open(f"FOLDER/task{task}.out", "a")
    subprocess.Popen(["bash", "-c", loop], env={**os.environ, **own}, stdout=out, stderr=out, start_new_session=True)
print("Submitted batch job 77")
"""
SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do case $1 in --output|--error) shift 2;; *) shift;; esac; done
exec "$@"
"""
SCONTROL = """#!/bin/bash
touch FOLDER/again${SLURM_ARRAY_TASK_ID:-None}
"""


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Slurm of this machine: sbatch, srun, scontrol and sacct as far as submitit needs them; gives its folder."""
    place = tmp_path / "slurm"
    place.mkdir()
    scripts = {"sbatch": SBATCH, "srun": SRUN, "scontrol": SCONTROL, "sacct": "#!/bin/bash\necho 'JobID|State'\n"}
    for name, text in scripts.items():
        file = place / name
        file.write_text(text.replace("PYTHON", sys.executable).replace("FOLDER", str(place)))
        file.chmod(file.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", os.pathsep.join([str(place), os.environ["PATH"]]))
    return place


def test_slurm_gets_one_array_and_a_job_that_is_taken_away_goes_on(
    slurm: Path, crew_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first process to get there asks for a preemption as Slurm does, by SIGUSR2 to submitit's process, its parent."""
    pytest.importorskip("submitit")
    study = crew_of(
        "signal.signal(signal.SIGINT, lambda *_: ((place / 'stopped').touch(), sys.exit(130)))\n"
        "            first = cell.config.lr == 1e-3 and not (place / 'stopped').exists()\n"
        "            first and os.kill(os.getppid(), signal.SIGUSR2)\n"
        "            time.sleep(60 if first else 0.2)"
    )
    made = planned(study)
    (study.parent / "sitecustomize.py").write_text(PATCHED.format(worker=str(study.parent / "worker.py")))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(study.parent), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setattr(clusters, "LOOK", 0.1)
    work = launchers.find("slurm(partition='gpu', timeout_min=90, gpus_per_node=1)", 2)
    work(study / folder.CELLS, made, board_of(study, made), False)
    submitted = (slurm / "submitted").read_text()
    assert submitted.count("=====") == 1
    for line in ("--array=0-1%2", "--partition=gpu", "--time=90", "--gpus-per-node=1"):
        assert f"#SBATCH {line}" in submitted
    place = study / folder.CELLS / made[0].name
    assert (place / "stopped").exists() and (place / "ran").exists()
    until = time.monotonic() + 60  # the other task may have ended the cell before
    while len((slurm / "starts").read_text().splitlines()) < 3 and time.monotonic() < until:
        time.sleep(0.05)
    assert len((slurm / "starts").read_text().splitlines()) == 3  # two tasks, one of which was queued again
    ran = [(study / folder.CELLS / cell.name / "ran").read_text().splitlines() for cell in made]
    assert [len(each) for each in ran] == [1] * 4


def test_ctrl_c_leaves_the_jobs_of_slurm_and_the_same_command_looks_at_them_again(
    slurm: Path, crew_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("submitit")
    study = crew_of("time.sleep(0.5)")
    made = planned(study)
    (study.parent / "sitecustomize.py").write_text(PATCHED.format(worker=str(study.parent / "worker.py")))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(study.parent), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setattr(clusters, "LOOK", 0.1)
    work = launchers.find("slurm", 2)
    board = board_of(study, made)

    def stop() -> None:
        raise stops.Stop("Stopped.", signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(board, "wait", stop)
        with pytest.raises(KeyboardInterrupt, match=r"jobs of Slurm go on \(scancel 77 ends them\)"):
            work(study / folder.CELLS, made, board, False)
    work(study / folder.CELLS, made, board_of(study, made), False)
    assert states(study, made) == ["done"] * 4
    assert (slurm / "submitted").read_text().count("=====") == 1


def test_jobs_that_end_without_a_cell_are_told_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = planned(tmp_path)
    monkeypatch.setattr(clusters, "LOOK", 0.0)
    monkeypatch.setattr("fedsim.sweeps.board.LOOK", 0.0)
    started: list[int] = []

    def start(number: int) -> list[Any]:
        started.append(number)
        return ["job"] * number

    with pytest.raises(OSError, match="3 times they have ended without one, the last with: no such partition"):
        clusters.watch(board_of(tmp_path, made), tmp_path / folder.CELLS, made, 8, start, lambda job: True,
                       lambda job: "no such partition", [])  # fmt: skip
    assert started == [4] * 3


@pytest.mark.slow
def test_tasks_of_ray_run_the_cells(crew_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip(
        "ray", reason="Ray is an extra that the test environment leaves out: pip install 'fedsim-jax[ray]'"
    )
    study = crew_of("time.sleep(0.2)")
    made = planned(study)
    (study.parent / "sitecustomize.py").write_text(PATCHED.replace('"submitit"', '"ray"').format(
        worker=str(study.parent / "worker.py")))  # fmt: skip
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(study.parent), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setattr(clusters, "LOOK", 0.1)
    launchers.find("ray(num_cpus=0.5)", 2)(study / folder.CELLS, made, board_of(study, made), False)
    ran = [(study / folder.CELLS / cell.name / "ran").read_text().splitlines() for cell in made]
    assert [len(each) for each in ran] == [1] * 4
