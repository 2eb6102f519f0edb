"""Learning curves: groups that differ in one key, drawn against it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fashionnet.analysis import learning_curves
from fashionnet.analysis.groups import Gathered, gather
from fashionnet.errors import UserError
from tests.conftest import Commands, WriteRun


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


def gathered(folder: Path) -> Gathered:
    return gather([folder])


def test_a_curve_for_what_else_differs_with_its_points_in_order(runs: Path) -> None:
    curves = learning_curves.of(gathered(runs).groups, "data.limit", "test_accuracy")
    assert [(curve.name, [place for place, _ in curve.points]) for curve in curves] == [
        ("model=mlp", [500, 1000]),
        ("model=mlp_no_dropout", [500, 1000]),
    ]
    figures = [values for curve in curves for _, values in curve.points]
    expected = [[0.55, 0.56], [0.6, 0.61], [0.45, 0.46], [0.5, 0.51]]
    assert np.array(figures) == pytest.approx(np.array(expected))


def test_what_goes_with_the_key_does_not_cut_a_curve_up(
    tmp_path: Path, write_run: WriteRun
) -> None:
    for model in ("mlp", "mlp_no_dropout"):
        for limit, epochs in ((50, 10), (100, 5), (500, 5)):
            config = {"data.limit": limit, "epochs": epochs}
            write_run(tmp_path / f"{model}-{limit}", 0, model=model, config=config)
    curves = learning_curves.of(gathered(tmp_path).groups, "data.limit", "test_accuracy")
    assert [(curve.name, len(curve.points)) for curve in curves] == [
        ("model=mlp", 3),
        ("model=mlp_no_dropout", 3),
    ]


def test_the_plot_shows_means_and_intervals(runs: Path) -> None:
    curves = learning_curves.of(gathered(runs).groups, "data.limit", "test_accuracy")
    figure = learning_curves.draw(curves, "data.limit", "test_accuracy")
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
    ("key", "said"),
    [
        ("data.limits", r"it is no number in .*did you mean data\.limit"),
        ("model._target_", "it is no number"),
        ("batch_size", "all runs have the same value, 32"),
    ],
)
def test_what_is_no_axis_is_refused(runs: Path, key: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        learning_curves.of(gathered(runs).groups, key, "test_accuracy")


def test_the_command_writes_it(runs: Path, commands: Commands) -> None:
    commands.succeed(*("compare", ".", "--plot", "curve.png", "--against", "data.limit"), cwd=runs)
    assert (runs / "curve.png").read_bytes().startswith(b"\x89PNG")
    said = commands.fail("compare", ".", "--against", "data.limit", cwd=runs)
    assert "--against is for a plot" in said
