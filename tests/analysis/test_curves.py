"""The overfitting plot: its curves, what it says of them, and the files it becomes."""

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

    from tests.conftest import WriteRun


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
    labelled = {str(line.get_label()): line for line in axes.lines}
    return {label: line for label, line in labelled.items() if not label.startswith("_")}


def words(figure: Figure) -> str:
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    return "\n".join([*legend, figure.get_supxlabel()])


def test_curves_are_means_over_the_seeds_that_have_the_epoch(groups: list[Group]) -> None:
    loss, accuracy = curves.draw(groups).axes
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
            assert line.get_color() == curves.COLOURS["no_dropout" in label]


def test_bands_reach_from_the_lowest_seed_to_the_highest(groups: list[Group]) -> None:
    loss, _ = curves.draw(groups).axes
    bands = loss.collections  # training and validation of the one group that has two seeds
    assert len(bands) == 2
    corners = bands[1].get_paths()[0].vertices
    for epoch, low, high in ((1, 0.5, 0.7), (2, 0.3, 0.6), (3, 0.4, 0.4)):
        there = corners[corners[:, 0] == epoch, 1]
        assert (there.min(), there.max()) == pytest.approx((low, high))


def test_the_epoch_of_lowest_mean_validation_loss_is_marked(groups: list[Group]) -> None:
    loss, accuracy = curves.draw(groups).axes
    for axes, expected in (
        (loss, [[3, 0.4], [2, 0.3]]),
        (accuracy, [[3, 0.8], [2, 0.8]]),
    ):
        points = [line for line in axes.lines if line.get_marker() == "o"]
        found = [np.hstack(line.get_data()).tolist() for line in points]
        assert found == [pytest.approx(each) for each in expected]


def test_the_picture_says_what_one_sees(groups: list[Group]) -> None:
    told = words(curves.draw(groups))
    for said in (
        "model=mlp (2 seeds)",
        "model=mlp_no_dropout (1 seed)",
        "training",
        "validation",
        "lowest mean validation loss",
        "Training: averages over the epoch, dropout on.",
        "Bands: from the lowest seed to the highest.",
        "Some runs are shorter",
    ):
        assert said in told
    alone = words(curves.draw(groups[1:]))
    assert "Bands" not in alone
    assert "shorter" not in alone


def test_runs_without_validation_show_training_alone(write_run: WriteRun, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    (run.path / "history.jsonl").write_text('{"epoch": 1, "loss": 0.5, "accuracy": 0.8}\n')
    loss, _ = curves.draw(gather([tmp_path]).groups).axes
    assert not [line for line in loss.lines if line.get_marker() == "o"]
    training, validation = lines(loss).values()
    assert training.get_ydata().tolist() == [0.5]
    assert training.get_marker() == "."  # a point alone makes no line
    assert np.isnan(validation.get_ydata()).all()


def test_more_groups_than_colours_are_refused(write_run: WriteRun, tmp_path: Path) -> None:
    for size in range(8):
        write_run(tmp_path / str(size), config={"batch_size": 1 + size})
    groups = gather([tmp_path]).groups
    assert len(lines(curves.draw(groups[:7]).axes[0])) == 14
    with pytest.raises(UserError, match="at most 7 groups, here are 8"):
        curves.draw(groups)


def test_png_is_twice_as_wide_as_a_readme_and_not_blank(
    groups: list[Group], tmp_path: Path
) -> None:
    curves.save(curves.draw(groups), tmp_path / "plot.PNG")
    with Image.open(tmp_path / "plot.PNG") as picture:
        pixels = np.asarray(picture.convert("RGB"))
    assert pixels.shape[1] == 1800
    for colour in curves.COLOURS[:2]:
        wanted = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
        assert (pixels == wanted).all(axis=2).sum() > 500


def test_svg_of_the_same_runs_is_the_same_file(groups: list[Group], tmp_path: Path) -> None:
    for name in ("one.svg", "two.svg"):
        curves.save(curves.draw(groups), tmp_path / name)
    one, two = ((tmp_path / name).read_text() for name in ("one.svg", "two.svg"))
    assert one == two
    assert "<svg" in one
    assert "lowest mean validation loss" in one  # matplotlib notes what the glyphs spell


@pytest.mark.parametrize("name", ["plot.jpg", "plot", "missing/plot.png", "folder.svg"])
def test_a_place_for_no_plot_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "folder.svg").mkdir()
    with pytest.raises(UserError, match=name):
        plots.check(tmp_path / name, *curves.FORMATS)
