"""Progress: plain aligned lines without a terminal, a live display on one, honest time left."""

import io
import re
import time

import pytest
from rich.console import Console

from fedsim.report.progress import Progress, header, plain_line


def line(number: int, **changes) -> dict:
    made = {
        "round": number,
        "phase": "peft",
        "loss": 1.2345,
        "accuracy": 0.5,
        "validation": {"loss": 2.0, "accuracy": 0.25},
        "total_bytes_up": number * 2**20,
        "total_bytes_down": number * 2**21,
        "seconds": 3.0,
        "compile_seconds": 0.0,
        "clients_per_second": 12.345,
        "flops_per_second": 45.67e9,
        "mfu": None,
        "lane_occupancy": 0.9,
        "row_occupancy": 0.75,
        "examples_per_second": 345.0,
        "most_memory": 3 * 2**29,
    }
    return made | changes


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def plain() -> Console:
    return Console(file=io.StringIO(), width=200)


def text(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_plain_lines_one_a_round_aligned_and_without_control_characters() -> None:
    console, clock = plain(), Clock()
    with Progress(120, console=console, clock=clock) as progress:
        progress.message("loading [bold]weights[/bold]")
        for i in (1, 2, 120):
            clock.now += 3.0
            changes = {"validation": None, "loss": None, "clients_per_second": None} if i == 2 else {}
            progress.update(line(i, **changes))
    rows = text(console).splitlines()
    assert rows[0] == "loading [bold]weights[/bold]"
    assert rows[1] == header(120)
    assert len(rows) == 5
    assert {len(row) for row in rows[1:]} == {len(header(120))}
    assert len(header(999)) < 90
    assert " ".join(rows[2].split()) == "1/120 peft 1.234 0.500 0.250 1.00 MiB 2.00 MiB 12.3 45.7 5:57 min"
    assert rows[3].split()[2:5] == ["–", "0.500", "–"]
    assert re.fullmatch(r"[^\x00-\x1f\x7f]*", "".join(rows))


def test_columns_stay_aligned_for_large_numbers() -> None:
    wide = line(100, total_bytes_up=999 * 2**30, total_bytes_down=2**53, clients_per_second=12345.6, loss=12.5)
    assert len(plain_line(wide, 100, 359_999.0)) == len(header(100))


def test_quiet_says_nothing() -> None:
    console = Console(file=io.StringIO(), width=100, force_terminal=True)
    with Progress(3, quiet=True, console=console) as progress:
        progress.message("x")
        progress.update(line(1))
    assert text(console) == ""


def test_time_left_leaves_compiling_out_and_one_slow_round() -> None:
    clock = Clock()
    with Progress(100, quiet=True, console=plain(), clock=clock) as progress:
        assert progress.left() is None
        clock.now += 99.0  # loading, and 22 s of the round
        progress.update(line(1, seconds=22.0, compile_seconds=20.0))
        assert progress.left() == 99 * 2.0
        for i, seconds in ((2, 2.0), (3, 50.0), (4, 2.0)):
            clock.now += seconds
            progress.update(line(i))
        assert progress.left() == 96 * 2.0


def test_time_left_is_not_guessed_from_the_head_alone() -> None:
    clock = Clock()
    with Progress(10, head_rounds=2, quiet=True, console=plain(), clock=clock) as progress:
        for i in (1, 2):
            clock.now += 0.1
            progress.update(line(i, phase="head", seconds=0.1))
            assert progress.left() is None
        clock.now += 30.0  # the PEFT part is added, then a round of 4 s
        progress.update(line(3, seconds=4.0))
        assert progress.left() == 7 * 4.0
    with Progress(10, head_rounds=10, quiet=True, console=plain(), clock=clock) as progress:
        clock.now += 0.5
        progress.update(line(1, phase="head", seconds=0.5))
        assert progress.left() == pytest.approx(4.5)


def test_live_display_shows_round_bytes_and_time_left() -> None:
    console, clock = Console(file=io.StringIO(), width=90, force_terminal=True, color_system=None), Clock()
    with Progress(20, console=console, clock=clock) as progress:
        progress.message("compiling")
        clock.now += 2.0
        progress.update(line(1, seconds=2.0))
        clock.now += 2.0
        progress.update(line(2, validation=None, clients_per_second=None))
        progress.message("saving")
    last = text(console).split("round 2/20")[-1]
    for part in ("peft", "4.0 s", "36.0 s left", "loss 1.234", "accuracy 0.500", "up 2.00 MiB", "down 4.00 MiB"):
        assert part in last, part
    assert "accuracy 0.250" in last  # the last evaluation stays
    assert "saving" in last and "compiling" not in last, "what went on before a round does not stay"
    assert all(len(row) <= 90 for row in re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", last).splitlines())


def test_live_display_says_what_the_machine_does() -> None:
    for changes, shown in (({}, "45.7 GFLOP/s"), ({"mfu": 0.4123}, "MFU 41.2%")):
        console = Console(file=io.StringIO(), width=100, force_terminal=True, color_system=None)
        with Progress(20, console=console) as progress:
            progress.update(line(1, **changes))
        assert shown in text(console) and "lanes 90% full" in text(console)
        assert "345 examples/s" in text(console) and "rows 75% real" in text(console) and "1.50 GiB" in text(console)
    assert plain_line(line(1, mfu=0.4123), 20, None).split()[-2:] == ["41.2%", "–"]
    assert plain_line(line(1, flops_per_second=None), 20, None).split()[-2:] == ["–", "–"]


def test_live_display_is_narrow_enough_for_80_columns() -> None:
    console = Console(file=io.StringIO(), width=80, force_terminal=True, color_system=None)
    with Progress(2000, console=console) as progress:
        progress.message("m" * 200)
        progress.update(line(1999, total_bytes_up=999 * 2**30, total_bytes_down=999 * 2**30))
    shown = text(console)
    assert "accuracy 0.250" in shown
    assert "lanes 90% full" in shown
    assert "down 999 GiB" in shown


def test_an_error_ends_the_live_display() -> None:
    console = Console(file=io.StringIO(), width=80, force_terminal=True)
    with pytest.raises(KeyboardInterrupt), Progress(3, console=console) as progress:
        progress.update(line(1))
        raise KeyboardInterrupt
    assert "\x1b[?25h" in text(console)  # the cursor is shown again


def test_a_narrow_live_display_keeps_loss_accuracy_bytes_and_time() -> None:
    console = Console(file=io.StringIO(), width=60, force_terminal=True, color_system=None)
    clock = Clock()
    with Progress(440, kind="lora", console=console, clock=clock) as progress:
        for i in (438, 439):
            clock.now += 3.0
            progress.update(line(i, total_bytes_up=999 * 2**30, total_bytes_down=999 * 2**30))
    last = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text(console)).split("round 439/440")[-1]
    for part in ("lora", "3.0 s left", "loss 1.234", "accuracy 0.500", "accuracy 0.250", "up 999 GiB", "down 999 GiB"):
        assert part in last, part
    assert "GFLOP/s" not in last and "…" not in last
    assert all(len(row) <= 60 for row in last.splitlines()[1:])


def test_the_bar_is_as_full_as_the_time() -> None:
    """After the head's 400 rounds of 0.1 s and one of 9 s, 40 are left: an eighth of the time, not nine tenths."""
    clock = Clock()
    with Progress(440, head_rounds=400, quiet=True, console=plain(), clock=clock) as progress:
        for i in range(1, 401):
            clock.now += 0.1
            progress.update(line(i, phase="head", seconds=0.1))
        assert progress._bar(80).columns[1]._cells[0].pulse, "nothing is known of the rounds to come"
        clock.now += 9.0
        progress.update(line(401, seconds=9.0))
        bar = progress._bar(80).columns[1]._cells[0]
        assert bar.completed / bar.total == pytest.approx(49 / (49 + 39 * 9))


def test_after_a_resume_the_time_left_is_that_of_the_rounds_before() -> None:
    """The first round after it has loading and tracing in it; where it goes on from is said."""
    console, clock = plain(), Clock()
    with Progress(100, console=console, clock=clock) as progress:
        progress.resume([line(i, seconds=2.0) for i in range(1, 51)])
        assert progress.left() == 50 * 2.0
        clock.now += 60.0
        progress.update(line(51, seconds=12.0))
        assert progress.left() == 49 * 2.0
    assert "going on after round 50 of 100" in text(console)


def test_silence_is_broken_with_what_goes_on_and_how_far() -> None:
    console = plain()
    with Progress(3, console=console, every=0.05) as progress:
        progress.message("loading the weights")
        progress.far("computing the frozen features", 1280, 18821)
        deadline = time.monotonic() + 10
        while "1,280" not in text(console) and time.monotonic() < deadline:
            time.sleep(0.01)
    assert "computing the frozen features: 1,280 of 18,821, after" in text(console)
    said = text(console)
    time.sleep(0.2)
    assert text(console) == said, "nothing is said after the end"


def test_a_note_is_said_once_and_stays_above_the_live_display() -> None:
    for console in (plain(), Console(file=io.StringIO(), width=90, force_terminal=True, color_system=None)):
        with Progress(3, console=console) as progress:
            for i in (1, 2):
                progress.update(line(i))
                progress.note(f"round {i}: [b]\x1b[31m", once="x")
        assert text(console).count("round 1: [b]\\x1b[31m") == 1 and "round 2: [b]" not in text(console)


class Closed(io.StringIO):
    """A pipe whose reader has gone, or a terminal that knows no dash."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error

    def write(self, text: str) -> int:
        raise self.error


@pytest.mark.parametrize("error", [BrokenPipeError("gone"), UnicodeEncodeError("ascii", "–", 0, 1, "no")])
@pytest.mark.parametrize("terminal", [False, True])
def test_a_display_that_fails_ends_nothing(
    error: Exception, terminal: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    with Progress(3, console=Console(file=Closed(error), width=90, force_terminal=terminal)) as progress:
        progress.message("x")
        progress.update(line(1))
        progress.note("y")
    assert capsys.readouterr().err.count("The progress cannot be shown") == 1


def test_the_phase_is_the_kind_that_is_trained() -> None:
    assert plain_line(line(1), 20, None, "full").split()[1] == "full"
    assert plain_line(line(1, phase="head"), 20, None, "full").split()[1] == "head"
    console = plain()
    with Progress(3, kind="adapter+bias+norm", console=console) as progress:
        progress.update(line(1))
    rows = text(console).splitlines()
    assert len({len(row) for row in rows}) == 1 and "adapter+bia…" in rows[1]
