"""Plots: what is drawn is what was recorded; names come from the options that differ."""

from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from fedsim import record
from fedsim.config import Config, Speed
from fedsim.report import plots


def rounds(n: int = 6, head: int = 2, every: int = 1, price: int = 2**20) -> list[dict]:
    """Rounds that cost `price` bytes each way, ten times less in the head's phase."""
    made, total = [], 0
    for i in range(1, n + 1):
        total += price // 10 if i <= head else price
        seen = {"loss": 1.0, "accuracy": i / 10} if i % every == 0 else None
        made.append(
            {
                "round": i,
                "phase": "head" if i <= head else "peft",
                "accuracy": i / 10 + 0.05,
                "validation": seen,
                "total_bytes_up": total,
                "total_bytes_down": 2 * total,
            }
        )
    return made


def run(name: str = "one", lines: list[dict] | None = None, **options) -> record.Run:
    lines = rounds() if lines is None else lines
    return record.Run(Path("runs") / name, Config(**options), Speed(), {}, lines, None, {})


def axes_of(runs: list[list[dict]], against: str):
    axes = Figure().add_subplot()
    plots.draw(axes, runs, [f"run {i}" for i in range(len(runs))], against)
    return axes


def test_points_are_the_recorded_ones() -> None:
    axes = axes_of([rounds(every=2)], "rounds")
    curve, train, joined, _ = axes.get_lines()
    np.testing.assert_array_equal(curve.get_xydata(), [(2, 0.2), (4, 0.4), (6, 0.6)])
    np.testing.assert_allclose(train.get_ydata(), np.arange(1, 7) / 10 + 0.05)
    np.testing.assert_array_equal(joined.get_xydata(), [(2, 0.2)])  # the head's last round


def test_bytes_are_mib_both_ways() -> None:
    axes = axes_of([rounds(3, head=0)], "bytes")
    np.testing.assert_allclose(axes.get_lines()[0].get_xdata(), [3.0, 6.0, 9.0])
    assert axes.get_xscale() == "linear"
    assert axes.get_xlim()[0] == 0
    assert "MiB" in axes.get_xlabel()


def test_bytes_axis_is_logarithmic_only_where_runs_differ_much() -> None:
    assert axes_of([rounds(), rounds(price=2**21)], "bytes").get_xscale() == "linear"
    assert axes_of([rounds(), rounds(price=2**28)], "bytes").get_xscale() == "log"
    assert axes_of([rounds(), rounds(price=0)], "bytes").get_xscale() == "linear"


def test_several_runs_are_not_crowded_by_training_curves() -> None:
    labels = [t.get_text() for t in axes_of([rounds(), rounds()], "rounds").get_legend().get_texts()]
    assert labels == ["run 0", "run 1", "PEFT joins the head"]
    labels = [t.get_text() for t in axes_of([rounds(head=0)], "rounds").get_legend().get_texts()]
    assert labels == ["run 0, on the validation set", "on its training batches"]


def test_training_values_that_were_not_finite_are_left_out() -> None:
    lines = rounds(4, head=0)
    lines[1]["accuracy"] = None
    lines[2]["validation"] = {"loss": None, "accuracy": None}
    curve, train = axes_of([lines], "rounds").get_lines()
    assert list(curve.get_xdata()) == [1, 2, 4]
    assert list(train.get_xdata()) == [1, 3, 4]


def test_files_are_pictures(tmp_path: Path) -> None:
    paths = plots.save([run()], tmp_path / "plots")
    assert [p.name for p in paths] == ["accuracy_rounds.png", "accuracy_bytes.png"]
    wide = plots.overview([run(), run(lines=rounds(9, head=0), peft="bias")], tmp_path / "both.png", title="Two kinds")
    for path in (*paths, wide):
        pixels = imread(path)[..., :3]
        assert pixels.shape[0] >= 600
        # blue of the first run, and white paper
        assert (abs(pixels - np.array([0, 0x72, 0xB2]) / 255).max(-1) < 0.02).sum() > 500
        assert (pixels == 1).all(-1).mean() > 0.7
    orange = abs(imread(wide)[..., :3] - np.array([0xD5, 0x5E, 0]) / 255).max(-1) < 0.02
    assert orange.sum() > 500


def test_same_runs_give_the_same_file(tmp_path: Path) -> None:
    a, b = (plots.save([run()], tmp_path / name)[0].read_bytes() for name in ("a", "b"))
    assert a == b


def test_nothing_to_draw_is_an_error(tmp_path: Path) -> None:
    for lines in ([], rounds(every=100)):
        with pytest.raises(ValueError, match="Expected a validation accuracy in the rounds of lora"):
            plots.save([run(lines=lines, peft="lora")], tmp_path)


def test_labels_are_the_differing_options() -> None:
    assert plots.label([run(peft="bias")]) == ["bias"]
    assert plots.label([run(peft="lora"), run(peft="bias")]) == ["lora", "bias"]
    assert plots.label([run(rank=4), run(rank=8, seed=1)]) == ["rank=4, seed=0", "rank=8, seed=1"]
    assert plots.label([run(peft="lora", rank=4), run(peft="bias")]) == ["lora, rank=4", "bias"]
    assert plots.label([run("x"), run("y")]) == ["x", "y"]
    assert plots.label([run("x", seed=1), run("y", seed=1), run("z")]) == ["seed=1 (x)", "seed=1 (y)", "seed=0 (z)"]
    assert plots.label([run(targets=("query",)), run(targets=("query", "key"))]) == [
        "targets=query",
        "targets=query+key",
    ]


def test_lines_are_told_apart_without_colour() -> None:
    """By their markers, at places of their own and at the end; neighbours by their dashes too."""
    curves = axes_of([rounds(60, head=0)] * 7, "rounds").get_lines()[:7]
    assert len({curve.get_marker() for curve in curves}) == 7
    assert len({curve.get_linestyle() for curve in curves[:4]}) == 4
    places = [curve.get_markevery() for curve in curves]
    assert all(place[-1] == 59 and 5 <= len(place) <= 12 for place in places)
    assert len({tuple(place) for place in places}) == 7


def test_more_runs_than_colors_are_told_apart() -> None:
    curves = axes_of([rounds(head=0)] * 9, "rounds").get_lines()[:9]
    assert len({(c.get_color(), c.get_linestyle()) for c in curves}) == 9


def test_runs_of_one_method_share_a_colour_where_there_are_more_than_colours() -> None:
    runs = [run(peft=kind, seed=seed) for kind in ("lora", "bias", "full") for seed in range(3)]
    numbers = plots.methods(runs)
    assert numbers == [0, 0, 0, 1, 1, 1, 2, 2, 2] and plots.methods(runs[:7]) is None
    axes = Figure().add_subplot()
    plots.draw(axes, [rounds(head=0)] * 9, [f"run {i}" for i in range(9)], "rounds", numbers)
    curves = axes.get_lines()[:9]
    assert len({curve.get_color() for curve in curves}) == 3
    assert len({(c.get_color(), c.get_linestyle()) for c in curves}) == 9


def test_an_overview_takes_a_string_and_its_names_lie_below_the_curves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures: list[Figure] = []
    write = plots.write
    monkeypatch.setattr(plots, "write", lambda figure, path: (figures.append(figure), write(figure, path))[1])
    made = plots.overview(
        [run(peft=k) for k in ("lora", "bias", "full")], str(tmp_path / "network.png"), ["$a_$", "_b", "c"]
    )
    assert made == tmp_path / "network.png" and made.is_file()
    (figure,) = figures
    assert all(axes.get_legend() is None for axes in figure.axes)
    legend = figure.legends[0].get_window_extent()
    assert all(legend.y1 <= axes.get_window_extent().y0 for axes in figure.axes)
    assert len(figure.legends[0].get_texts()) == 4
