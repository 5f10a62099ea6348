"""Numbers for people, the summary of a run, two runs side by side: checked by hand."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from fedsim import record, units
from fedsim.config import Config, Speed
from fedsim.report import summaries
from fedsim.report import tables as report


def line(number: int, **changes) -> dict:
    made = {
        "round": number,
        "phase": "peft",
        "loss": 1.0,
        "accuracy": 0.5,
        "validation": {"loss": 2.0, "accuracy": [0.2, 0.6, 0.6, 0.4][number - 1]},
        "bytes_up": 100,
        "bytes_down": 200,
        "setup_bytes": 5000 if number == 1 else 0,
        "clients": 10,
        "reported": 9,
        "nonfinite": 1 if number == 3 else 0,
        "examples": 80,
        "seconds": 3.0 if number == 1 else 1.0,
        "compile_seconds": 2.0 if number == 1 else 0.0,
    }
    return made | changes


def summary() -> dict:
    return summaries.summary(
        [line(i) for i in (1, 2, 3, 4)],
        start={"validation": {"loss": 3.0, "accuracy": 0.05}, "test": None},
        final={"validation": {"loss": 2.0, "accuracy": 0.4}, "test": {"loss": 2.0, "accuracy": 0.41}},
        full={"bytes_up": 1000, "bytes_down": 2000},
        parameters={"trained": 10, "frozen": 90},
        seconds=12.5,
        stopped="rounds",
    )


def console(width: int = 80) -> Console:
    return Console(file=io.StringIO(), width=width, highlight=False)


def text(c: Console) -> str:
    assert isinstance(c.file, io.StringIO)
    return c.file.getvalue()


def test_summary_by_hand() -> None:
    s = summary()
    assert s["bytes"] == {"up": 400, "down": 800, "total": 1200, "setup": 5000, "with_setup": 6200}
    # 4 rounds: 9 of 10 clients send 1000 bytes back, all 10 are sent 2000
    assert s["full_fine_tuning_bytes"] == {
        "up": 36_000,
        "down": 80_000,
        "total": 116_000,
        "setup": 0,
        "with_setup": 116_000,
    }
    assert s["ratio"] == 116_000 / 1200
    assert s["ratio_with_setup"] == 116_000 / 6200
    assert s["best"] == {"round": 2, "accuracy": 0.6}  # the first of equals
    assert s["clients"] == 40
    assert s["examples"] == 320
    assert s["nonfinite"] == 1
    assert s["seconds_in_rounds"] == 6.0
    assert s["compile_seconds"] == 2.0
    assert s["clients_per_second"] == 10.0
    assert s["examples_per_second"] == 80.0
    assert s["final"]["test"]["accuracy"] == 0.41
    assert s["start"]["test"] is None


def test_summary_of_no_rounds_divides_by_nothing() -> None:
    s = summaries.summary(
        [], start={}, final={}, full={"bytes_up": 1, "bytes_down": 1}, parameters={}, seconds=0.0, stopped="x"
    )
    assert s["ratio"] is None
    assert s["best"] is None
    assert s["clients_per_second"] is None


def test_summary_with_unevaluated_rounds() -> None:
    lines = [line(1, validation=None), line(2, validation={"loss": None, "accuracy": None})]
    s = summaries.summary(
        lines, start={}, final={}, full={"bytes_up": 1, "bytes_down": 1}, parameters={}, seconds=1, stopped="x"
    )
    assert s["best"] is None


def test_printed_summary_fits_80_columns_and_holds_exact_bytes() -> None:
    c = console()
    report.print_summary(summary(), more=[report.Row("head alone", 0.3, 0.31, 30, 2**31, 2**33, 61.0)], console=c)
    shown = text(c)
    rows = [x.split() for x in shown.splitlines()]
    assert ["start", "0.050", "–", "0", "0", "B", "0", "B", "–", "–"] in rows
    assert ["head", "alone", "0.300", "0.310", "30", "2.00", "GiB", "8.00", "GiB", "1:01", "min", "–"] in rows
    assert ["this", "run", "0.400", "0.410", "4", "400", "B", "800", "B", "12.5", "s", "96.7x"] in rows
    assert ["full", "fine-tuning*", "–", "–", "4", "35.2", "KiB", "78.1", "KiB", "–", "–"] in rows
    assert "Exact bytes: up 400, down 800, set-up 5,000." in shown
    assert "of which 2.0 s went into compiling and 4.0 s into rounds." in shown
    assert "116,000 B" in shown
    assert "18.7x" in shown
    assert "1 replies were left out" in shown
    assert "…" not in shown


@pytest.mark.parametrize(
    ("n", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.00 KiB"),
        (10 * 1024, "10.0 KiB"),
        (1_048_575, "1.00 MiB"),
        (90_000_000, "85.8 MiB"),
        (999 * 2**20, "999 MiB"),
        (1000 * 2**20, "0.98 GiB"),
        (2**60, "1024 PiB"),
    ],
)
def test_size(n: int, text: str) -> None:
    assert units.size(n) == text


def test_exact_size() -> None:
    assert units.exact_size(2**70 + 1).startswith(f"{2**70 + 1:,} B (")
    assert units.exact_size(5) == "5 B"
    assert units.exact_size(1_234_567) == "1,234,567 B (1.18 MiB)"
    assert units.exact_size(65_517 * 2**20) == f"{65_517 * 2**20:,} B (63.98 GiB)"
    assert units.mebibytes(2**20 * 1023, 3) == "1,023.000 MiB"


def test_scores_of_a_run_that_diverges_stay_short() -> None:
    found = [units.share(x) for x in (None, float("nan"), 0.12345, 12.5, 1234.56, 1.04e29, float("inf"))]
    assert found == ["–", "–", "0.123", "12.500", "1234.6", "1e+29", "inf"]


def test_short_times_keep_their_digits() -> None:
    found = [units.short(x) for x in (0.0, 1.23e-5, 0.000999, 0.0042, 0.99, 1.0, 75.0)]
    assert found == ["0 s", "12.3 µs", "999 µs", "4.2 ms", "990 ms", "1.0 s", "1:15 min"]


@pytest.mark.parametrize(
    ("name", "words", "drawn"),
    [
        ("plain", "plain", "plain"),
        ("$x_$", "$x_$", r"\$x_\$"),
        ("cls[/b]", "cls[/b]", "cls[/b]"),
        ("\x1b[31mred\n\u202e", r"\x1b[31mred\n\u202e", r"\x1b[31mred\n\u202e"),
        ("_hidden", "_hidden", " _hidden"),
        ("Équipe 東京 क्‍ष", "Équipe 東京 क्‍ष", "Équipe 東京 क्‍ष"),
    ],
)
def test_names_are_plain_words(name: str, words: str, drawn: str) -> None:
    assert (units.words(name), units.drawn(name)) == (words, drawn)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.123, "0.12 s"),
        (12.34, "12.3 s"),
        (59.96, "1:00 min"),
        (125, "2:05 min"),
        (3599.6, "1:00:00 h"),
        (3725, "1:02:05 h"),
    ],
)
def test_duration(seconds: float, text: str) -> None:
    assert units.duration(seconds) == text


def test_times() -> None:
    assert [units.times(x) for x in (None, 0.5, 4.14, 312.4, 12345.0)] == ["–", "0.5x", "4.1x", "312x", "12,345x"]


def run(name: str, about: dict | None = None, summary: dict | None = None, **options) -> record.Run:
    speed = Speed(lanes=options.pop("lanes", "auto"))
    return record.Run(Path("runs") / name, Config(**options), speed, about or {}, [line(1), line(2)], summary, {})


def test_compare_names_differences_first_and_then_results() -> None:
    a = run("one", {"versions": {"jax": "0.10"}, "git": {"commit": "abc"}, "device": {"count": 1}}, rank=4)
    b = run("two", {"versions": {"jax": "0.11"}, "git": None, "device": {"count": 1}}, summary(), seed=1, lanes=8)
    found = report.compare(a, b)
    assert found["config"] == {"rank": (4, 8), "seed": (0, 1)}
    assert found["speed"] == {"lanes": ("auto", 8)}
    assert found["machine"] == {"jax": ("0.10", "0.11"), "commit": ("abc", None)}
    results = found["results"]
    assert results["bytes up"] == (200, 200)
    assert results["bytes with set-up"] == (5600, 5600)
    assert results["validation accuracy"] == (0.6, 0.4)  # without a summary: of the last evaluated round
    assert results["test accuracy"] == (None, 0.41)
    assert results["seconds"] == (4.0, 12.5)
    assert results["rounds"] == (2, 2)
    assert results["ended"] == ("not yet", "rounds")
    c = console()
    assert report.print_comparison(a, b, console=c) == found
    shown = text(c)
    assert shown.index("config") < shown.index("rank") < shown.index("lanes") < shown.index("results")
    assert ["validation", "accuracy", "0.6000", "0.4000", "-0.2000"] in [x.split() for x in shown.splitlines()]
    assert ["seconds", "4.0", "s", "12.5", "s", "×3.12"] in [x.split() for x in shown.splitlines()]


def test_compare_of_equal_configs_says_so() -> None:
    c = console()
    found = report.print_comparison(run("a"), run("b"), console=c)
    assert found["config"] == {}
    assert "The two runs have the same config." in text(c)


def test_compare_of_a_run_without_rounds() -> None:
    found = report.compare(run("a")._replace(rounds=[]), run("b"))
    assert found["results"]["validation accuracy"] == (None, 0.6)


def test_a_narrow_table_keeps_accuracy_bytes_and_time_and_says_what_it_left_out() -> None:
    for width, without in ((80, ()), (60, ("fewer", "rounds")), (52, ("fewer", "rounds", "valid."))):
        c = console(width)
        report.print_summary(summary(), name="lora (this run)", console=c)
        shown = text(c)
        assert width == 80 or all(len(row) <= width for row in shown.splitlines()), "folded, not cut"
        row = next(row for row in shown.splitlines() if row.lstrip().startswith("lora"))
        assert all(part in row for part in ("0.410", "400 B", "800 B", "12.5 s")) and "…" not in shown
        assert (f"Too narrow for {', '.join(without)}" in shown) == bool(without)


def test_bytes_are_compared_over_equal_rounds_only() -> None:
    full = report.Row(report.FULL, None, None, 4, 1000, 1000)
    assert report.fewer(report.Row("same", rounds=4, up=10, down=10), full) == 100
    assert report.fewer(report.Row("longer", rounds=500, up=10, down=10), full) is None
    assert report.fewer(full, full) is None


def test_full_fine_tuning_is_not_compared_with_itself() -> None:
    c = console()
    report.print_summary(summary(), name="full (this run)", is_full=True, console=c)
    assert "not run" not in text(c) and "fewer" not in text(c) and "full (this run)" in text(c)


def test_a_summary_without_scores_is_printed() -> None:
    nothing = {"loss": None, "accuracy": None}
    broken = summary() | {
        "final": {"validation": nothing, "test": nothing, "clients": {"global": {"clients": 0, "nonfinite": 7}}}
    }
    c = console()
    report.print_summary(broken, console=c)
    assert "not finite on the test set" in text(c) and "7 more without finite outputs" in text(c)


def test_compare_leaves_out_options_that_mean_nothing_for_the_kind() -> None:
    a, b = run("a", peft="full", rank=4, targets=("*",)), run("b", peft="full", rank=8)
    assert report.compare(a, b)["config"] == {}
    c = run("c", peft="lora", rank=8, targets=("[!0]*",))
    shown, out = report.compare(a, b, c), console(120)
    assert shown["config"]["rank"] == (None, None, 8) and shown["config"]["peft"] == ("full", "full", "lora")
    assert "bias_patch" not in shown["config"] and len(shown["results"]["rounds"]) == 3
    assert report.print_comparison(a, b, c, console=out) == shown
    assert "[!0]*" in text(out)
