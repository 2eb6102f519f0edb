"""Means and paired differences of groups of runs, with Student's 95 % intervals."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from scipy import stats

from fashionnet.analysis import intervals
from fashionnet.analysis.groups import Group, gather

if TYPE_CHECKING:
    from tests.conftest import WriteRun

A = {0: 0.871, 1: 0.868, 2: 0.875, 3: 0.870}
B = {1: 0.880, 2: 0.884, 3: 0.877, 9: 0.5}


def write(write_run: WriteRun, folder: Path, accuracies: dict[int, float], **other: Any) -> None:
    for seed, accuracy in accuracies.items():
        test = {"loss": 0.4, "accuracy": accuracy, "evaluations": 1}
        write_run(folder / str(seed), seed, test=test, **other)


@pytest.fixture
def groups(write_run: WriteRun, tmp_path: Path) -> list[Group]:
    write(write_run, tmp_path / "a", A)
    write(write_run, tmp_path / "b", B, model="mlp_no_dropout")
    return gather([tmp_path]).groups


def test_half_width_is_students() -> None:
    # By hand: the quantile of three degrees of freedom is 3.18245 in every table.
    assert intervals.half_width(4, 2.0) == pytest.approx(3.18245, rel=1e-5)
    assert intervals.half_width(2, 1.0) == pytest.approx(12.7062 / math.sqrt(2), rel=1e-5)
    assert intervals.half_width(5, 0.0) == 0
    assert math.isnan(intervals.half_width(1, math.nan))
    assert math.isnan(intervals.half_width(0, math.nan))


def test_means_and_intervals_are_scipys(groups: list[Group]) -> None:
    table = intervals.group_table(intervals.run_table(groups)).set_index(["group", "metric"])
    for name, values in (("model=mlp", A), ("model=mlp_no_dropout", B)):
        row = table.loc[(name, "test_accuracy")]
        figures = list(values.values())
        low, high = stats.t.interval(0.95, 3, np.mean(figures), stats.sem(figures))
        assert row["num_seeds"] == 4
        assert row[["mean", "sd", "low", "high"]].tolist() == pytest.approx(
            [np.mean(figures), np.std(figures, ddof=1), low, high], rel=1e-12
        )


def test_differences_are_paired_by_the_seeds_that_both_have(groups: list[Group]) -> None:
    (row,) = intervals.paired_table(
        intervals.run_table(groups), groups, ["test_accuracy"]
    ).itertuples()
    differences = [B[seed] - A[seed] for seed in (1, 2, 3)]
    low, high = stats.t.interval(0.95, 2, np.mean(differences), stats.sem(differences))
    assert (row.group, row.against, row.num_pairs) == ("model=mlp_no_dropout", "model=mlp", 3)
    assert (row.mean, row.low, row.high) == pytest.approx((np.mean(differences), low, high))
    test = stats.ttest_rel([B[seed] for seed in (1, 2, 3)], [A[seed] for seed in (1, 2, 3)])
    assert (test.pvalue < 0.05) == (low > 0)
    assert row.supports == "higher test accuracy in model=mlp_no_dropout than in model=mlp"


def test_every_group_is_compared_with_the_first(
    write_run: WriteRun, tmp_path: Path, groups: list[Group]
) -> None:
    write(write_run, tmp_path / "c", A, config={"model.hidden": 64})
    groups = gather([tmp_path]).groups
    table = intervals.paired_table(intervals.run_table(groups), groups, ["test_accuracy", "gap"])
    assert table["against"].unique().tolist() == [groups[0].name]
    assert table["group"].tolist() == [g.name for g in groups[1:] for _ in range(2)]


@pytest.mark.parametrize(
    ("interval", "expected"),
    [
        ((0.2, 0.1, 0.3), "higher loss in B than in A"),
        ((-0.2, -0.3, -0.1), "higher loss in A than in B"),
        ((0.1, -0.1, 0.3), intervals.NOTHING_SHOWN),
        ((0.0, 0.0, 0.0), intervals.NOTHING_SHOWN),
        ((0.1, 0.0, 0.2), intervals.NOTHING_SHOWN),
        ((0.2, math.nan, math.nan), intervals.NOTHING_SHOWN),  # one pair
        ((math.nan, math.nan, math.nan), "not compared: no seed in common"),
    ],
)
def test_what_is_supported(interval: tuple[float, float, float], expected: str) -> None:
    assert intervals.supported(*interval, "loss", "B", "A") == expected


def test_one_pair_and_none(write_run: WriteRun, tmp_path: Path) -> None:
    write(write_run, tmp_path / "a", {0: 0.8, 1: 0.8})
    write(write_run, tmp_path / "b", {1: 0.9, 2: 0.9}, config={"batch_size": 64})
    write(write_run, tmp_path / "c", {7: 0.9}, config={"batch_size": 99})
    groups = gather([tmp_path]).groups
    one, none = intervals.paired_table(
        intervals.run_table(groups), groups, ["test_accuracy"]
    ).itertuples()
    assert (one.num_pairs, one.mean) == (1, pytest.approx(0.1))
    assert math.isnan(one.low)
    assert one.supports == intervals.NOTHING_SHOWN
    assert none.num_pairs == 0
    assert none.supports == "not compared: no seed in common"


def test_figures_of_other_data_are_not_compared(write_run: WriteRun, tmp_path: Path) -> None:
    data = {"sha256": {"images": "a" * 64}, "split_sha256": "d" * 64, "validation": 6000}
    write_run(tmp_path / "a")
    write_run(tmp_path / "b", config={"data.limit": 99}, data=data)  # the same validation set
    write_run(tmp_path / "c", config={"validation_split": 0.2}, data=data | {"validation": 12000})
    write_run(tmp_path / "d", data=data | {"sha256": {"images": "c" * 64}})
    first, *others = gather([tmp_path]).groups
    alike = [
        [intervals.measured_alike(other, first, metric) for metric in ("test_accuracy", "gap")]
        for other in others
    ]
    assert alike == [[True, True], [True, False], [False, False]]
    groups = [first, *others]
    table = intervals.paired_table(intervals.run_table(groups), groups, ["gap"])
    assert table["num_pairs"].tolist() == [1, 0, 0]
    assert table["supports"].tolist()[1:] == ["not compared: measured on other data"] * 2
