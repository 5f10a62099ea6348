"""What does not fit is refused with figures; memory that runs out in mid-run costs half the lanes and no result."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import fedsim
from fedsim import host_memory
from fedsim.config import Config, Speed
from fedsim.engine import device_memory
from fedsim.engine.device_memory import Need, free_memory, refuse_too_large
from fedsim.simulation import simulate
from remembers import REMEMBERS

pytestmark = pytest.mark.usefixtures("compile_once")
GIB = 2**30


def test_the_error_says_needed_free_and_what_to_change() -> None:
    refuse_too_large(Need(5 * GIB, GIB), 5 * GIB, 8, 16, 1)
    with pytest.raises(ValueError, match=r"lanes=8 with batch_size=16 .* 5\.00 GiB beside the 1\.00 GiB") as caught:
        refuse_too_large(Need(5 * GIB, GIB), 2 * GIB, 8, 16, 1)
    assert "2.00 GiB are free: lower --lanes to about 3, or" in str(caught.value)
    with pytest.raises(ValueError, match=r"one of 4 that share the machine.* lower batch_size=16, or take --remat"):
        refuse_too_large(Need(5 * GIB, GIB), GIB // 2, 8, 16, 4)
    with pytest.raises(ValueError, match=r"needs more than its compiler accepts .* lower --lanes to about 4, or"):
        refuse_too_large(Need(math.inf, GIB), GIB, 8, 16, 1)


def test_host_devices_share_what_is_available(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_memory, "available", lambda: 4000)
    monkeypatch.setattr(host_memory, "total", lambda: 9000)
    cpu = jax.devices("cpu")[0]
    assert free_memory(cpu, 1) == 4000 and free_memory(cpu, 4) == 1000
    assert device_memory.device_memory(cpu) == 9000, "which all devices share: examples lie there once"


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, blobs: Callable[..., Path]) -> Config:
    return Config(
        dataset=str(blobs(tmp_path_factory.mktemp("data"))), backbone="mlp", peft="full", clients=8,
        clients_per_round=4, rounds=4, optimizer="sgd", lr=0.05, min_size=3,
    )  # fmt: skip


def exhausted(monkeypatch: pytest.MonkeyPatch, *, round: int, above: int, late: bool = False) -> list[tuple[int, int]]:
    """Lets a round run out of memory whenever more than `above` lanes are used; gives (round, lanes) of every call.

    `late`: when the clients have been trained, and what they keep has been written.
    """
    calls, real = [], simulate.exchange_round

    def exchange_round(key: Any, algorithm: Any, server: Any, cohort: Any) -> Any:
        calls.append((cohort.round, cohort.engine.lanes))
        if cohort.round == round and cohort.engine.lanes > above:
            if late:
                server, _, _ = real(key, algorithm, server, cohort)
            jax.tree.map(lambda a: a.delete(), server)  # as an input that was donated
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1099511627776 bytes.")
        return real(key, algorithm, server, cohort)

    monkeypatch.setattr(simulate, "exchange_round", exchange_round)
    return calls


def test_a_round_without_memory_goes_on_from_the_checkpoint(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Round 3 fails with 4 lanes: rounds 1 and 2 stand, 3 and 4 run with 2 and say that the bits may differ."""
    speed = Speed(devices=1, lanes=4, checkpoint_every=2, compilation_cache=False)
    whole = fedsim.run(config, speed, out=tmp_path / "whole", quiet=True)
    calls = exhausted(monkeypatch, round=3, above=2)
    run = fedsim.run(config, speed, out=tmp_path / "run")
    assert calls == [(1, 4), (2, 4), (3, 4), (3, 2), (4, 2)]
    assert [line["bitwise"] for line in whole.rounds] == [True] * 4
    assert [line["bitwise"] for line in run.rounds] == [True, True, False, False]
    assert "round 3 ran out of the device's memory with lanes=4; going on" in "".join(capsys.readouterr())
    for name, value in whole.parameters.items():
        np.testing.assert_allclose(run.parameters[name], value, rtol=1e-5, atol=1e-6)
    assert run.rounds[-1]["total_bytes_up"] == whole.rounds[-1]["total_bytes_up"]


@pytest.mark.slow
def test_before_the_first_checkpoint_it_starts_anew_and_may_halve_twice(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = exhausted(monkeypatch, round=2, above=1)
    speed = Speed(devices=1, lanes=4, checkpoint_every=4, compilation_cache=False)
    run = fedsim.run(config, speed, out=tmp_path / "run", quiet=True)
    assert calls == [(1, 4), (2, 4), (1, 2), (2, 2), (1, 1), (2, 1), (3, 1), (4, 1)]
    assert [line["round"] for line in run.rounds] == [1, 2, 3, 4] and not any(line["bitwise"] for line in run.rounds)


@pytest.mark.slow
@pytest.mark.parametrize(("every", "from_round"), [(2, 3), (9, 1)])
@pytest.mark.parametrize("algorithm", ["mine", "fed_sa_lora"])
def test_what_clients_keep_is_that_of_the_checkpoint(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, algorithm: str, every: int, from_round: int
) -> None:
    """Rows that the failed round has written to the file are forgotten, with a checkpoint (every 2) and without (9)."""
    (tmp_path / "mine.py").write_text(REMEMBERS)
    options: dict[str, Any] = {"algorithm": f"{tmp_path / 'mine.py'}:fed_remembers"}
    if algorithm == "fed_sa_lora":
        x = np.random.default_rng(0).integers(0, 255, (64, 16, 16, 3)).astype(np.uint8)
        np.savez(tmp_path / "images.npz", x=x, y=np.arange(64) % 2)
        options = {"dataset": str(tmp_path / "images.npz"), "backbone": "vit_tiny", "weights": "random"}
        options |= {"algorithm": algorithm, "peft": "lora"}
    config = dataclasses.replace(config, **options)
    speed = Speed(devices=1, lanes=4, checkpoint_every=every, compilation_cache=False)
    whole = fedsim.run(config, speed, out=tmp_path / "whole", quiet=True)
    calls = exhausted(monkeypatch, round=3, above=2, late=True)
    run = fedsim.run(config, speed, out=tmp_path / "run", quiet=True)
    assert calls == [(1, 4), (2, 4), (3, 4), *((r, 2) for r in range(from_round, 5))]
    assert (run.directory / "memory-peft.rows").stat().st_size > 0
    assert [line["bitwise"] for line in run.rounds] == [r < from_round for r in range(1, 5)]
    for name, value in whole.parameters.items():
        np.testing.assert_allclose(run.parameters[name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_stopped_run_keeps_the_lanes_that_fitted(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    speed = Speed(devices=1, lanes=4, checkpoint_every=1, compilation_cache=False)
    calls = exhausted(monkeypatch, round=2, above=2)
    append = simulate.record.append

    def stop_after_three(directory: Path, line: dict[str, Any]) -> None:
        append(directory, line)
        if line["round"] == 4:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(simulate.record, "append", stop_after_three)
        with pytest.raises(KeyboardInterrupt):
            fedsim.run(config, speed, out=tmp_path / "run", quiet=True)
    run = fedsim.run(resume=tmp_path / "run", quiet=True)
    assert calls[-2:] == [(4, 2), (4, 2)]
    assert [line["bitwise"] for line in run.rounds] == [True, False, False, False]


def test_a_single_lane_that_does_not_fit_ends_the_run(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exhausted(monkeypatch, round=1, above=0)
    with pytest.raises(ValueError, match=r"one lane with batch_size=\d+ .* in round 1 .*RESOURCE_EXHAUSTED.* --remat"):
        fedsim.run(config, Speed(devices=1, lanes=2, compilation_cache=False), out=tmp_path / "run", quiet=True)


def test_other_errors_of_the_device_are_not_caught(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> Any:
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")

    monkeypatch.setattr(simulate, "exchange_round", broken)
    with pytest.raises(jax.errors.JaxRuntimeError, match="something else"):
        fedsim.run(config, Speed(devices=1, lanes=2, compilation_cache=False), out=tmp_path / "run", quiet=True)
