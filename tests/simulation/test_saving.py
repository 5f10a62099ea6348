"""What goes wrong while a checkpoint is written: a full disk, a second Ctrl-C. One line, and the former one is as it was."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from fedsim import record
from moments import Hook, Place, full_at, signal_at
from remembers import REMEMBERS

TYPED = """
    --dataset blobs.npz --backbone mlp --peft full --algorithm mine.py:fed_remembers --clients 8 --clients-per-round 4
    --min-size 6 --rounds 6 --lr 0.01 --no-head-baseline --checkpoint-every 2 --devices 1 --lanes 2 --quiet --out run
"""
SAVE, TRAIN = "fedsim.record.checkpoint:Checkpoints.save", "fedsim.simulation.simulate:train"
OURS, ORBAX = "fedsim.record.checkpoint:pack", "orbax.checkpoint:CheckpointManager.save"
BEHIND, WAIT = "orbax.checkpoint:AsyncCheckpointer.save", "orbax.checkpoint:CheckpointManager.wait_until_finished"
STOPPED = "Stopped at once; go on with: fedsim run --resume run"

pytestmark = pytest.mark.slow


@pytest.fixture
def place(tmp_path: Path, environment: dict[str, str], blobs: Callable[..., Path]) -> Place:
    blobs(tmp_path)
    (tmp_path / "mine.py").write_text(REMEMBERS)
    return Place(tmp_path, environment)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, environment: dict[str, str], blobs: Callable[..., Path]) -> bytes:
    """What the run trains that nothing happens to."""
    folder = tmp_path_factory.mktemp("alone")
    blobs(folder)
    (folder / "mine.py").write_text(REMEMBERS)
    assert Place(folder, environment).run(*TYPED.split()) == (0, "")
    return (folder / "run" / record.TRAINED).read_bytes()


def files(folder: Path) -> dict[Path, bytes]:
    """The finished checkpoints."""
    whole = [p for p in (folder / "run" / record.CHECKPOINTS).iterdir() if p.name.isdigit()]
    return {p: p.read_bytes() for step in whole for p in step.rglob("*") if p.is_file()}


def goes_on(place: Place, trained: bytes, expected: list[str]) -> None:
    """The usable checkpoints are these, and the run ends with the same bits."""
    assert (
        sorted({p.relative_to(place.folder / "run" / record.CHECKPOINTS).parts[0] for p in files(place.folder)})
        == expected
    )
    assert place.run("--resume", "run", "--quiet") == (0, ""), "no checkpoint is damaged"
    assert (place.folder / "run" / record.TRAINED).read_bytes() == trained


@pytest.mark.parametrize("size", [0, 100, 3000])
def test_a_full_disk_is_one_line(place: Place, trained: bytes, size: int) -> None:
    """Every array of the third checkpoint fails, or the larger ones."""
    status, said = place.run(*TYPED.split(), hooks=(full_at(ORBAX, size, 3),))
    where = place.folder / "run" / record.CHECKPOINTS
    assert (status, said) == (
        2,
        f"fedsim: Expected the checkpoint of round 6 to be written to {where} (File too large); make room or choose another "
        "disk, then resume: usable checkpoints are [2, 4].",
    )
    goes_on(place, trained, ["2", "4"])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("second", [(OURS, 2), (ORBAX, 2), (BEHIND, 2), (WAIT, 3)])
def test_a_second_signal_while_it_is_saved_stops_at_once(
    place: Place, trained: bytes, second: tuple[str, int], number: int
) -> None:
    """The first one comes in round 3, whose checkpoint it asks for; round 2's is whole."""
    hooks: tuple[Hook, ...] = signal_at(TRAIN, number, 3), signal_at(second[0], number, second[1])
    status, said = place.run(*TYPED.split(), hooks=hooks)
    assert status == 128 + number
    asked, _, last = said.partition("\n")
    assert asked.startswith("Stopping after this round (") and last.strip() == STOPPED
    goes_on(place, trained, ["2"])
