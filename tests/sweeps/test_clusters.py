"""Slurm, by a small Slurm of this machine under submitit, and Ray: who starts the processes, and what becomes of their jobs."""

from __future__ import annotations

import os
import signal
import stat
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from crews import PATCHED, board_of, planned, states
from fedsim import stops
from fedsim.sweeps import clusters, folder, launchers


@pytest.mark.slow
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


def test_an_option_that_submitit_does_not_know_is_refused() -> None:
    pytest.importorskip("submitit")
    with pytest.raises(ValueError, match="options of launcher=submitit_local that submitit takes"):
        launchers.find("submitit_local(partitoin='gpu')", 2)


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


@pytest.mark.slow
def test_slurm_gets_one_array_and_a_job_that_is_taken_away_goes_on(
    slurm: Path, crew_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first process to get there says that the time is up, as Slurm does: by SIGUSR2 to submitit's process, its parent."""
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
    work = launchers.find("slurm(partition='gpu', timeout_min=1, gpus_per_node=1)", 2)
    work(study / folder.CELLS, made, board_of(study, made), False)
    submitted = (slurm / "submitted").read_text()
    assert submitted.count("=====") == 1
    for line in ("--array=0-1%2", "--partition=gpu", "--time=1", "--gpus-per-node=1"):
        assert f"#SBATCH {line}" in submitted
    place = study / folder.CELLS / made[0].name
    assert (place / "stopped").exists() and (place / "ran").exists()
    until = time.monotonic() + 60  # the other task may have ended the cell before
    while len((slurm / "starts").read_text().splitlines()) < 3 and time.monotonic() < until:
        time.sleep(0.05)
    assert len((slurm / "starts").read_text().splitlines()) == 3  # two tasks, one of which was queued again
    ran = [(study / folder.CELLS / cell.name / "ran").read_text().splitlines() for cell in made]
    assert [len(each) for each in ran] == [1] * 4


@pytest.mark.slow
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
