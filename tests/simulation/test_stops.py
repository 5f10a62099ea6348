"""Ctrl-C and SIGTERM outside the rounds: one line that fits, the exit status, and a run that ends as one left alone."""

from __future__ import annotations

import gc
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from fedsim import record, stops
from moments import Place, signal_at
from remembers import TIMES

TYPED = """
    --dataset blobs.npz --backbone mlp --peft bias --lr 0.01 --clients 8 --clients-per-round 4 --min-size 6 --rounds 5
    --head-rounds 2 --head-lr 0.01 --local-test 0.3 --no-head-baseline --checkpoint-every 3 --devices 1 --lanes 2 --quiet
"""
OPTIONS = TYPED.split()
EVERY = "3"
READING, PREPARING = "fedsim.data:load", "fedsim.simulation.simulate:prepare"
TRAINING, DRAWING = "fedsim.simulation.simulate:train", "fedsim.report.plots:save"
SCORING, WRITING = "fedsim.simulation.personal:local_scores", "fedsim.record:finish"
READING_AGAIN = "Stopped while loading; nothing is lost; go on with: fedsim run --resume run"
END = "Stopped in the final evaluation, nothing is lost; go on with: fedsim run --resume run"


@pytest.fixture
def place(tmp_path: Path, environment: dict[str, str], blobs: Callable[..., Path]) -> Place:
    blobs(tmp_path)
    return Place(tmp_path, environment)


@pytest.fixture(scope="module")
def alone(
    tmp_path_factory: pytest.TempPathFactory, environment: dict[str, str], blobs: Callable[..., Path]
) -> record.Run:
    """The run that nothing happens to."""
    folder = tmp_path_factory.mktemp("alone")
    blobs(folder)
    assert Place(folder, environment).run(*OPTIONS, "--out", "run") == (0, "")
    return record.load(folder / "run")


def goes_on(place: Place, alone: record.Run) -> None:
    """The stopped run, resumed, has the lines, scores and bits of the one left alone."""
    assert place.run("--resume", "run") == (0, "")
    run = record.load(place.folder / "run")
    for a, b in zip(alone.rounds, run.rounds, strict=True):
        assert {k: v for k, v in a.items() if k not in TIMES} == {k: v for k, v in b.items() if k not in TIMES}
    assert (run.directory / record.TRAINED).read_bytes() == (alone.directory / record.TRAINED).read_bytes()
    assert run.summary and alone.summary and run.summary["final"] == alone.summary["final"]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_before_the_folder_is_there_nothing_is_left(place: Place, number: int) -> None:
    assert place.run(*OPTIONS, "--out", "run", hooks=(signal_at(READING, number),)) == (128 + number, stops.ANEW)
    assert not (place.folder / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("at", [PREPARING, TRAINING])
def test_while_weights_are_loaded_and_programs_compiled(place: Place, alone: record.Run, at: str) -> None:
    said = "Stopped before the first round; go on with: fedsim run --resume run"
    assert place.run(*OPTIONS, "--out", "run", hooks=(signal_at(at, signal.SIGTERM),)) == (143, said)
    goes_on(place, alone)


@pytest.mark.slow
def test_a_phase_that_has_ended_is_kept_and_a_resumed_run_says_so(place: Place, alone: record.Run) -> None:
    """The second phase is being prepared, though `--checkpoint-every` comes later; the resumed run is stopped there too."""
    said = "Stopped after round 2; go on with: fedsim run --resume run"
    rarely = [word if word != EVERY else "1000" for word in OPTIONS]
    assert place.run(*rarely, "--out", "run", hooks=(signal_at(PREPARING, signal.SIGTERM, 2),)) == (143, said)
    assert place.run("--resume", "run", hooks=(signal_at(READING, signal.SIGINT),)) == (130, READING_AGAIN)
    assert place.run("--resume", "run", hooks=(signal_at(PREPARING, signal.SIGINT),)) == (130, said)
    goes_on(place, alone)


def rounds_run(place: Place) -> bytes:
    return (place.folder / "run" / record.ROUNDS).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize(("at", "number"), [(SCORING, signal.SIGTERM), (WRITING, signal.SIGINT)])
def test_in_the_final_evaluation_no_round_is_lost(place: Place, alone: record.Run, at: str, number: int) -> None:
    assert place.run(*OPTIONS, "--out", "run", hooks=(signal_at(at, number),)) == (128 + number, END)
    assert (place.folder / "run" / record.CHECKPOINTS / "5").is_dir(), "the last round is on the disk"
    assert record.load(place.folder / "run").summary is None
    before = rounds_run(place)
    goes_on(place, alone)
    assert rounds_run(place) == before, "no round was done again"


@pytest.mark.slow
def test_while_pictures_are_drawn_the_numbers_are_there(place: Place, alone: record.Run) -> None:
    assert place.run(*OPTIONS, "--out", "run", hooks=(signal_at(DRAWING, signal.SIGTERM),)) == (143, END)
    assert record.load(place.folder / "run").summary is not None
    before = rounds_run(place)
    goes_on(place, alone)
    assert rounds_run(place) == before, "no round was done again"
    assert (place.folder / "run" / "accuracy_rounds.png").is_file()


def test_a_stop_says_where_and_a_second_one_the_same() -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM), sys.unraisablehook
    with stops.at_once(lambda: "outside"):
        with pytest.raises(stops.Stop, match="inside") as first, stops.at_once(lambda: "inside"):
            signal.raise_signal(signal.SIGTERM)
        assert (stops.status(first.value), first.value.hard) == (143, False)
        with pytest.raises(stops.Stop, match="inside") as second:  # while the first one closes files
            signal.raise_signal(signal.SIGINT)
        assert (stops.status(second.value), second.value.hard) == (130, True)
    with pytest.raises(stops.Stop, match="anew") as third, stops.at_once(lambda: "anew"):
        signal.raise_signal(signal.SIGINT)
    assert not third.value.hard, "what has ended is forgotten"
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM), sys.unraisablehook) == before


def test_after_a_round_the_second_signal_stops_at_once() -> None:
    with stops.after_round("go on") as asked:
        assert asked() is None
        signal.raise_signal(signal.SIGTERM)
        assert asked() == signal.SIGTERM
        with pytest.raises(KeyboardInterrupt, match="Stopped at once; go on"):
            signal.raise_signal(signal.SIGTERM)


def test_a_stop_that_python_drops_is_asked_for_again(capsys: pytest.CaptureFixture[str]) -> None:
    """An exception in a callback of the garbage collector, as JAX has one, goes nowhere."""
    came: list[str] = []

    def collected(phase: str, info: dict[str, int]) -> None:
        if not came:
            came.append(phase)
            signal.raise_signal(signal.SIGTERM)

    gc.callbacks.append(collected)
    try:
        with pytest.raises(stops.Stop, match="words") as stop, stops.at_once(lambda: "words"):
            gc.collect()
            time.sleep(5)
        assert not stop.value.hard
    finally:
        gc.callbacks.remove(collected)
    assert "ignored" not in capsys.readouterr().err


def test_a_stop_is_retold_with_its_signal() -> None:
    told = stops.reworded(stops.Stop("one", signal.SIGTERM, shared=True), "two")
    assert (str(told), stops.status(told), told.shared) == ("two", 143, True)
    assert stops.status(stops.reworded(KeyboardInterrupt(), "two")) == 130
