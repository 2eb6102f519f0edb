"""Plots of groups of runs: curves by epoch and learning curves, their words and files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image

from fashionnet.analysis import curves, plots
from fashionnet.analysis.groups import Group, gather
from fashionnet.errors import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from tests.conftest import Commands, WriteRun


@pytest.fixture
def groups(write_run: WriteRun, tmp_path: Path) -> list[Group]:
    """Two groups; of the first, the runs have 3 and 2 epochs."""
    first = [{"val_loss": v, "val_accuracy": 0.8} for v in (0.5, 0.3, 0.4)]
    second = [{"val_loss": v, "accuracy": 0.9} for v in (0.7, 0.6)]
    write_run(tmp_path / "runs/a0", 0, first, config={"epochs": 3})
    write_run(tmp_path / "runs/a1", 1, second, config={"epochs": 3})
    write_run(tmp_path / "runs/b0", 0, first, model="mlp_no_dropout", config={"epochs": 3})
    return gather([tmp_path / "runs"]).groups


def lines(axes: Axes) -> dict[str, Any]:
    labeled = {str(line.get_label()): line for line in axes.lines}
    return {label: line for label, line in labeled.items() if not label.startswith("_")}


def words(figure: Figure) -> str:
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    return "\n".join([*legend, figure.get_supxlabel()])


def test_curves_are_means_over_the_seeds_that_have_the_epoch(groups: list[Group]) -> None:
    loss, accuracy = curves.draw_history(groups).axes
    assert [axes.get_title() for axes in (loss, accuracy)] == ["loss", "accuracy"]
    drawn = lines(loss)
    assert list(drawn) == [
        *("model=mlp, training", "model=mlp, validation"),
        *("model=mlp_no_dropout, training", "model=mlp_no_dropout, validation"),
    ]
    validation = drawn["model=mlp, validation"]
    assert validation.get_xdata().tolist() == [1, 2, 3]
    assert validation.get_ydata().tolist() == pytest.approx([0.6, 0.45, 0.4])
    training = lines(accuracy)["model=mlp, training"]
    assert training.get_ydata().tolist() == pytest.approx([0.85, 0.85, 0.8])
    for axes in (loss, accuracy):
        for label, line in lines(axes).items():
            assert line.get_linestyle() == ("--" if label.endswith("training") else "-")
            assert line.get_color() == curves.COLORS["no_dropout" in label]


def test_bands_reach_from_the_lowest_seed_to_the_highest(groups: list[Group]) -> None:
    loss, _ = curves.draw_history(groups).axes
    bands = loss.collections  # training and validation of the one group that has two seeds
    assert len(bands) == 2
    corners = bands[1].get_paths()[0].vertices
    for epoch, low, high in ((1, 0.5, 0.7), (2, 0.3, 0.6), (3, 0.4, 0.4)):
        there = corners[corners[:, 0] == epoch, 1]
        assert (there.min(), there.max()) == pytest.approx((low, high))


def test_the_epoch_of_lowest_mean_validation_loss_is_marked(groups: list[Group]) -> None:
    loss, accuracy = curves.draw_history(groups).axes
    for axes, expected in (
        (loss, [[3, 0.4], [2, 0.3]]),
        (accuracy, [[3, 0.8], [2, 0.8]]),
    ):
        points = [line for line in axes.lines if line.get_marker() == "o"]
        found = [np.hstack(line.get_data()).tolist() for line in points]
        assert found == [pytest.approx(each) for each in expected]


def test_the_picture_explains_itself(groups: list[Group]) -> None:
    shown = words(curves.draw_history(groups))
    for part in (
        *("model=mlp (2 seeds)", "model=mlp_no_dropout (1 seed)", "training", "validation"),
        *("lowest mean validation loss", "Training: averages over the epoch, dropout on."),
        *("Bands: from the lowest seed to the highest.", "Some runs are shorter"),
    ):
        assert part in shown
    alone = words(curves.draw_history(groups[1:]))
    assert "Bands" not in alone
    assert "shorter" not in alone


def test_runs_without_validation_show_training_alone(write_run: WriteRun, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    (run.path / "history.jsonl").write_text('{"epoch": 1, "loss": 0.5, "accuracy": 0.8}\n')
    loss, _ = curves.draw_history(gather([tmp_path]).groups).axes
    assert not [line for line in loss.lines if line.get_marker() == "o"]
    training, validation = lines(loss).values()
    assert training.get_ydata().tolist() == [0.5]
    assert training.get_marker() == "."  # a point alone makes no line
    assert np.isnan(validation.get_ydata()).all()


def test_more_groups_than_colors_are_refused(write_run: WriteRun, tmp_path: Path) -> None:
    for size in range(8):
        write_run(tmp_path / str(size), config={"batch_size": 1 + size})
    groups = gather([tmp_path]).groups
    assert len(lines(curves.draw_history(groups[:7]).axes[0])) == 14
    with pytest.raises(UserError, match="at most 7 groups, here are 8"):
        curves.draw_history(groups)


def test_png_is_twice_as_wide_as_a_readme_and_not_blank(
    groups: list[Group], tmp_path: Path
) -> None:
    plots.write(curves.draw_history(groups), tmp_path / "plot.PNG")
    with Image.open(tmp_path / "plot.PNG") as picture:
        pixels = np.asarray(picture.convert("RGB"))
    assert pixels.shape[1] == 1800
    for color in curves.COLORS[:2]:
        wanted = [int(color[i : i + 2], 16) for i in (1, 3, 5)]
        assert (pixels == wanted).all(axis=2).sum() > 500


def test_svg_of_the_same_runs_is_the_same_file(groups: list[Group], tmp_path: Path) -> None:
    for name in ("one.svg", "two.svg"):
        plots.write(curves.draw_history(groups), tmp_path / name)
    one, two = ((tmp_path / name).read_text() for name in ("one.svg", "two.svg"))
    assert one == two
    assert "<svg" in one
    assert "lowest mean validation loss" in one  # matplotlib notes what the glyphs spell


@pytest.mark.parametrize("name", ["plot.jpg", "plot", "missing/plot.png", "folder.svg"])
def test_a_place_for_no_plot_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "folder.svg").mkdir()
    with pytest.raises(UserError, match=name):
        plots.check(tmp_path / name, *plots.FORMATS)


@pytest.fixture
def runs(tmp_path: Path, write_run: WriteRun) -> Path:
    """Two models on 1000 and on 500 pictures, two seeds of each; by name, the 1000 come first."""
    for model, start in (("mlp", 0.5), ("mlp_no_dropout", 0.4)):
        for limit in (1000, 500):
            for seed in (0, 1):
                accuracy = start + limit / 10_000 + seed / 100
                write_run(
                    tmp_path / f"{model}-{limit}-{seed}",
                    seed,
                    model=model,
                    config={"data.limit": limit},
                    test={"loss": 0.5, "accuracy": accuracy, "evaluations": 1},
                )
    return tmp_path


def test_a_curve_for_what_else_differs_with_its_points_in_order(runs: Path) -> None:
    drawn = curves.against(gather([runs]).groups, "data.limit", "test_accuracy")
    assert [(curve.name, [place for place, _ in curve.points]) for curve in drawn] == [
        ("model=mlp", [500, 1000]),
        ("model=mlp_no_dropout", [500, 1000]),
    ]
    figures = [values for curve in drawn for _, values in curve.points]
    expected = [[0.55, 0.56], [0.6, 0.61], [0.45, 0.46], [0.5, 0.51]]
    assert np.array(figures) == pytest.approx(np.array(expected))


def test_what_goes_with_the_key_does_not_cut_a_curve_up(
    tmp_path: Path, write_run: WriteRun
) -> None:
    for model in ("mlp", "mlp_no_dropout"):
        for limit, epochs in ((50, 10), (100, 5), (500, 5)):
            config = {"data.limit": limit, "epochs": epochs}
            write_run(tmp_path / f"{model}-{limit}", 0, model=model, config=config)
    drawn = curves.against(gather([tmp_path]).groups, "data.limit", "test_accuracy")
    assert [(curve.name, len(curve.points)) for curve in drawn] == [
        ("model=mlp", 3),
        ("model=mlp_no_dropout", 3),
    ]


def test_the_plot_shows_means_and_intervals(runs: Path) -> None:
    drawn = curves.against(gather([runs]).groups, "data.limit", "test_accuracy")
    figure = curves.draw_against(drawn, "data.limit", "test_accuracy")
    (axes,) = figure.axes
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("data.limit", "test accuracy")
    assert [text.get_text() for text in axes.get_legend().get_texts()] == [
        "model=mlp",
        "model=mlp_no_dropout",
    ]
    line = axes.containers[0][0]
    assert list(line.get_xdata()) == [500, 1000]
    assert list(line.get_ydata()) == pytest.approx([0.555, 0.605])
    # 12.7 is the t quantile of one degree of freedom; the standard error of two is 0.005.
    (bars,) = axes.containers[0][2]
    low, high = bars.get_segments()[0][:, 1]
    assert (high - low) / 2 == pytest.approx(12.706 * 0.005, rel=1e-3)


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("data.limits", r"it is not a number in .*did you mean data\.limit"),
        ("model._target_", "it is not a number"),
        ("batch_size", "all runs have the same value, 32"),
    ],
)
def test_what_cannot_be_an_axis_is_refused(runs: Path, key: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        curves.against(gather([runs]).groups, key, "test_accuracy")


def test_the_command_writes_it(runs: Path, commands: Commands) -> None:
    commands.succeed(*("compare", ".", "--plot", "curve.png", "--against", "data.limit"), cwd=runs)
    assert (runs / "curve.png").read_bytes().startswith(b"\x89PNG")
    message = commands.fail("compare", ".", "--against", "data.limit", cwd=runs)
    assert "--against needs --plot FILE" in message
