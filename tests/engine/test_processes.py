"""Two processes and three on one machine, by `jax.distributed` and gloo, give what one process gives, and agree on everything."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import several_processes
from safetensors.numpy import load_file

import fedsim
from fedsim import record
from fedsim.cli.main import main
from fedsim.engine import processes
from remembers import REMEMBERS, TIMES

LIMIT = 900  # seconds that a pair of processes may take on a busy machine


def free_port() -> int:
    """A port of the loopback address that nobody listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def started(
    commands: Sequence[Sequence[str]], folder: Path, environment: dict[str, str], devices: Sequence[int] = (1, 1, 1)
) -> list[tuple[int, str, str]]:
    """Status, output and errors of processes that run side by side, each with so many devices."""
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}

    def start(command: Sequence[str], count: int) -> subprocess.Popen[str]:
        kept = environment | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"--xla_force_host_platform_device_count={count}"}
        return subprocess.Popen([sys.executable, *command], cwd=folder, env=kept, **pipes)

    running = [start(command, count) for command, count in zip(commands, devices, strict=False)]
    try:
        ended = [process.communicate(timeout=LIMIT) for process in running]
    finally:
        for process in running:
            process.kill()
    return [(process.returncode, out, error) for process, (out, error) in zip(running, ended, strict=True)]


def prepared(folder: Path, blobs: Callable[..., Path]) -> Path:
    blobs(folder)
    (folder / "mine.py").write_text(REMEMBERS)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, blobs: Callable[..., Path]) -> Path:
    return prepared(tmp_path_factory.mktemp("two"), blobs)


@pytest.fixture(scope="module")
def told(folder: Path, environment: dict[str, str]) -> list[dict[str, Any]]:
    """What each of two processes found; `several_processes.py` has the code."""
    at, script = f"127.0.0.1:{free_port()}", several_processes.__file__
    ended = started([[script, at, "2", str(i), str(folder)] for i in range(2)], folder, environment)
    assert [status for status, _, _ in ended] == [0, 0], "\n".join(error for _, _, error in ended)
    shown = [[line for line in out.splitlines() if "[Gloo]" not in line] for _, out, _ in ended]
    assert any("4/4" in line for line in shown[0]) and not shown[1], "process 1 is silent"
    return [json.loads((folder / f"{i}.json").read_text()) for i in range(2)]


@pytest.mark.slow
def test_two_processes_equal_one_device(told, folder, monkeypatch):
    """The engine on the contract's task: model, clients' memory, bytes; frozen features of texts."""
    monkeypatch.chdir(folder)
    expected, traffic = several_processes.contract(devices=1)
    traffic = json.loads(json.dumps(traffic))
    expected["features"], rows = several_processes.frozen_features(None)
    for i in range(2):
        assert 150 <= told[i]["feature rows"] < 0.7 * rows, "each computes its share"
        found = np.load(folder / f"{i}.npz")
        assert set(found) == set(expected)
        for name in expected:
            np.testing.assert_allclose(found[name], expected[name], rtol=1e-5, atol=1e-6, err_msg=f"{name} of {i}")
        assert told[i]["contract"] == traffic


@pytest.mark.slow
def test_three_processes_equal_one_device(folder, environment, monkeypatch, tmp_path):
    """Cohorts of six clients on three devices, of which each process plans all and computes its own."""
    at, script = f"127.0.0.1:{free_port()}", several_processes.__file__
    ended = started([[script, at, "3", str(i), str(tmp_path)] for i in range(3)], folder, environment)
    assert [status for status, _, _ in ended] == [0] * 3, "\n".join(error for _, _, error in ended)
    monkeypatch.chdir(folder)
    expected, traffic = several_processes.contract(devices=1)
    expected["features"], _ = several_processes.frozen_features(None)
    for i in range(3):
        assert json.loads((tmp_path / f"{i}.json").read_text())["contract"] == json.loads(json.dumps(traffic))
        found = np.load(tmp_path / f"{i}.npz")
        for name in expected:
            np.testing.assert_allclose(found[name], expected[name], rtol=1e-5, atol=1e-6, err_msg=f"{name} of {i}")


@pytest.mark.slow
def test_both_processes_hold_the_same_bits(told, folder):
    first, second = (np.load(folder / f"{i}.npz") for i in range(2))
    for name in first:
        np.testing.assert_array_equal(first[name], second[name], err_msg=name)
    assert told[0]["runs"] == told[1]["runs"]


@pytest.mark.slow
def test_a_run_of_two_processes_equals_one(told, folder, monkeypatch):
    monkeypatch.chdir(folder)
    one = fedsim.run(
        fedsim.Config(**several_processes.OPTIONS), fedsim.Speed(devices=1), out=folder / "one", quiet=True
    )
    two = record.load(folder / "whole")
    assert two.about["processes"] == 2 and two.about["device"]["count"] == 2
    for a, b in zip(one.rounds, two.rounds, strict=True):
        assert [a[k] for k in record.INTEGERS] == [b[k] for k in record.INTEGERS]
        assert a["validation"] == pytest.approx(b["validation"], rel=1e-5)
    for name in one.parameters:
        np.testing.assert_allclose(two.parameters[name], one.parameters[name], rtol=1e-5, atol=1e-6, err_msg=name)
    kept = [
        load_file(
            fedsim.export(run.directory, "memories", folder / f"kept {i}").parent
            / "memories-00001-of-00001.safetensors"
        )
        for i, run in enumerate((one, two, record.load(folder / "stopped")))
    ]
    for name, rows in kept[0].items():
        np.testing.assert_allclose(kept[1][name], rows, rtol=1e-5, atol=1e-6, err_msg=name)
        np.testing.assert_array_equal(kept[1][name], kept[2][name], err_msg="resumed")


@pytest.mark.slow
def test_ctrl_c_in_one_process_stops_both_and_resumed_equals_uninterrupted(told, folder):
    runs = told[0]["runs"]
    assert runs["stop"].startswith("Stopped after round 2; go on with: fedsim run --resume"), runs["stop"]
    whole, resumed = ([{k: v for k, v in line.items() if k not in TIMES} for line in lines] for lines in runs["lines"])
    assert whole == resumed and len(whole) == several_processes.ROUNDS
    assert runs["parameters"][0] == runs["parameters"][1]
    trained = [(folder / name / record.TRAINED).read_bytes() for name in ("whole", "stopped")]
    assert trained[0] == trained[1]


@pytest.mark.slow
def test_memory_that_runs_out_in_one_process_costs_both_half_the_lanes_and_no_result(told, folder):
    """Process 1 alone runs out in round 3, after the checkpoint of round 2, and in each evaluation in batches over ten."""
    first, second = (each["short"] for each in told)
    rounds = list(dict.fromkeys(map(tuple, first["asked"])))
    assert rounds == [(1, 2), (2, 2), (3, 2), (3, 1), (4, 1)], "(round, lanes)"
    assert [line["bitwise"] for line in first["lines"]] == [True, True, False, False]
    assert first["warned"] and not second["warned"], "process 1 is silent"
    assert first["own"] == second["own"] and first["asked"] == second["asked"]
    whole, short = record.load(folder / "whole"), record.load(folder / "short")
    for name, value in whole.parameters.items():
        np.testing.assert_allclose(short.parameters[name], value, rtol=1e-5, atol=1e-6, err_msg=name)
        np.testing.assert_array_equal(short.parameters[name], np.array(first["own"][name], np.float32), err_msg=name)
    for a, b in zip(first["lines"], whole.rounds, strict=True):
        assert [a[k] for k in record.INTEGERS] == [b[k] for k in record.INTEGERS]
        assert a["validation"] == pytest.approx(b["validation"], rel=1e-5)


@pytest.mark.slow
def test_what_two_processes_are_refused(told):
    for i in range(2):
        said = told[i]["refused"]
        assert said["agree"].startswith(
            "ValueError: Expected the options to be the same in all processes, but process 1"
        )
        assert said["by_first"] == "OSError: no such file"
        assert said["pmap"].startswith("ValueError: Expected parallel='pmap' with one process only")
        assert said["devices"].startswith("ValueError: Expected devices=99 <= 1")
        assert said["shared"] == "x" * 5000
    assert told[0]["refused"]["each"] == "ValueError: process 1 failed: no such file"
    assert told[1]["refused"]["each"] == "OSError: no such file"


@pytest.mark.slow
def test_checkpoints_of_two_processes_are_refused_by_one(told, folder, monkeypatch):
    """Two devices of one process sum in another way than two processes of one device."""
    monkeypatch.chdir(folder)
    (folder / "stopped" / record.SUMMARY).unlink()
    with pytest.raises(ValueError, match=r"devices is \d in this run, \[1, 1\] in the checkpoint"):
        fedsim.run(resume=folder / "stopped", quiet=True)


def command(folder: Path, number: int, at: str, *more: str) -> list[str]:
    (folder / "options.py").write_text(f"import fedsim\n\nconfig = fedsim.Config(**{several_processes.OPTIONS})\n")
    pair = ["--distributed", "--coordinator", at, "--processes", "2", "--process-id", str(number)]
    return ["-m", "fedsim", "run", "options.py", "--no-head-baseline", *pair, *more]


@pytest.mark.slow
def test_other_options_in_another_process_are_refused(folder, environment):
    at = f"127.0.0.1:{free_port()}"
    ended = started([command(folder, i, at, "--lr", str(0.1 + i)) for i in range(2)], folder, environment)
    for status, _, error in ended:
        assert status == 2 and "Traceback" not in error
        assert "Expected the command line to be the same in all processes, but process 1 of 2 has another" in error


@pytest.mark.slow
def test_other_numbers_of_devices_are_refused(folder, environment):
    at = f"127.0.0.1:{free_port()}"
    ended = started([command(folder, i, at) for i in range(2)], folder, environment, devices=(1, 2))
    for status, _, error in ended:
        assert status == 2 and "Traceback" not in error
        assert "Expected every process to have the same number of devices >= 1, not [1, 2]" in error


@pytest.mark.slow
def test_the_command_line_runs_and_resumes(told, folder, environment, monkeypatch):
    """`fedsim run --distributed` twice: a run, then its resumption, from the folder that process 0 alone has."""
    at = f"127.0.0.1:{free_port()}"
    ended = started(
        [command(folder, i, at, "--out", "line", "--local-test", "0.2") for i in range(2)], folder, environment
    )
    assert [status for status, _, _ in ended] == [0, 0], "\n".join(error for _, _, error in ended)
    assert "Folder: line" in ended[0][1] and "Folder" not in ended[1][1]
    assert record.load(folder / "line").summary["rounds"] == several_processes.ROUNDS
    (folder / "line" / record.SUMMARY).unlink()
    at = f"127.0.0.1:{free_port()}"
    pair = [[*command(folder, i, at)[:3], "--resume", "line", *command(folder, i, at)[5:]] for i in range(2)]
    ended = started(pair, folder, environment)
    assert [status for status, _, _ in ended] == [0, 0], "\n".join(error for _, _, error in ended)
    assert ended[0][1].count("Folder: line") == 1
    monkeypatch.chdir(folder)
    config = fedsim.Config(**several_processes.OPTIONS, local_test=0.2)
    alone, line = fedsim.run(config, fedsim.Speed(devices=1), out="alone", quiet=True), record.load("line")
    for name in alone.parameters:
        np.testing.assert_allclose(line.parameters[name], alone.parameters[name], rtol=1e-5, atol=1e-6)
    for a, b in zip(alone.clients(), line.clients(), strict=True):
        assert a["accuracy"] == b["accuracy"] and a["loss"] == pytest.approx(b["loss"], rel=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--process-id", "1"), "Expected --process-id with --distributed"),
        (("--distributed", "--dry-run"), "Expected --dry-run without --distributed"),
        (("--distributed", "--coordinator", "here"), "Expected coordinator='here' to be HOST:PORT"),
        (("--distributed", "--processes", "0"), "Expected processes=0 >= 1"),
        (("--distributed", "--processes", "2", "--process-id", "2"), "Expected process_id=2 to be from 0 to"),
    ],
)
def test_impossible_options(options, message, capsys):
    assert main(["run", *options]) == 2
    assert message in capsys.readouterr().err


def test_without_a_cluster_all_options_are_needed(environment, folder):
    ended = started([["-m", "fedsim", "run", "--distributed"]], folder, environment)
    assert ended[0][0] == 2 and "give --coordinator HOST:PORT" in ended[0][2], ended[0][2]


def test_one_process_needs_no_agreement():
    assert not processes.several() and processes.is_first()
    assert processes.by_first(lambda: 3) == processes.each(lambda: 3) == 3
    assert processes.all_true(True) and not processes.any_true(False)
    processes.agree("nothing", os.getpid())
