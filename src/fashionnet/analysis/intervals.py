"""Means and paired differences of groups of runs, with 95 % intervals (Student t).

All results are pandas tables; pandas and scipy are imported on use.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fashionnet.analysis.groups import METRICS, ON_VALIDATION, Group
from fashionnet.system import extras

if TYPE_CHECKING:
    from pandas import DataFrame

LEVEL = 0.95
NOTHING_SHOWN = "no difference shown at this number of seeds"


def check_installed() -> None:
    """Refuses to go on without pandas and scipy, before any work is done.

    Raises:
        UserError: one is missing.
    """
    extras.require("comparisons need pandas and scipy", "plots", "pandas", "scipy.special")


def half_width(num: int, sd: float) -> float:
    """Returns half the width of the interval of a mean; nan where one value has none.

    Args:
        num: how many values the mean is of.
        sd: their standard deviation, with `num - 1` as divisor.
    """
    from scipy.special import stdtrit  # quantiles of Student's t; scipy.stats takes long to import

    return float(stdtrit(num - 1, (1 + LEVEL) / 2)) * sd / math.sqrt(num) if num > 1 else math.nan


def run_table(groups: Sequence[Group]) -> DataFrame:
    """Returns a row a run: group, seed, run, epochs and each of `METRICS`."""
    import pandas as pd

    rows = [
        {
            "group": group.name,
            "seed": member.seed,
            "run": member.name,
            "epochs": len(member.rows),
            **member.figures,
        }
        for group in groups
        for member in group.members
    ]
    return pd.DataFrame(rows).astype(dict.fromkeys(METRICS, float))


def group_table(table: DataFrame) -> DataFrame:
    """Returns a row for each group and metric: group, metric, num_seeds, mean, sd, low, high.

    Args:
        table: from `run_table`. Missing figures are nan and not counted.
    """
    long = table.melt(["group"], list(METRICS), var_name="metric")
    parts = long.groupby(["group", "metric"], sort=False)["value"].agg(["count", "mean", "std"])
    order = [(group, metric) for group in table["group"].unique() for metric in METRICS]
    parts = parts.loc[order].reset_index().rename(columns={"count": "num_seeds", "std": "sd"})
    return _with_ends(parts, "num_seeds")


def paired_table(table: DataFrame, groups: Sequence[Group], metrics: Sequence[str]) -> DataFrame:
    """Returns how each group differs from the first, seed by seed.

    Returns:
        A row for each later group and metric: group, against, metric, num_pairs, mean (of group
        minus against), sd, low, high, and what the interval supports in words. Groups whose figures
        were not measured on the same examples have no pairs.
    """
    import pandas as pd

    first, *others = groups
    rows: list[dict[str, Any]] = []
    for group in others:
        pairs = [table[table["group"] == each.name].set_index("seed") for each in (group, first)]
        for metric in metrics:
            values = (pairs[0][metric] - pairs[1][metric]).dropna()
            if not measured_alike(group, first, metric):
                values = values.iloc[:0]
            row = {"group": group.name, "against": first.name, "metric": metric}
            rows.append(row | {"num_pairs": len(values), "mean": values.mean(), "sd": values.std()})
    columns = ["group", "against", "metric", "num_pairs", "mean", "sd"]
    differences = _with_ends(pd.DataFrame(rows, columns=columns), "num_pairs")
    by_name = {group.name: group for group in groups}
    differences["supports"] = [
        supported(row.mean, row.low, row.high, METRICS[row.metric].label, row.group, row.against)
        if measured_alike(by_name[row.group], first, row.metric)
        else "not compared: measured on other data"
        for row in differences.itertuples()
    ]
    return differences


def measured_alike(group: Group, other: Group, metric: str) -> bool:
    """Returns whether a metric of both groups was measured on the same examples."""
    one, two = (each.members[0].record["data"] for each in (group, other))
    same_split = metric not in ON_VALIDATION or one.get("validation") == two.get("validation")
    return one.get("sha256") == two.get("sha256") and same_split


def supported(mean: float, low: float, high: float, label: str, group: str, against: str) -> str:
    """Returns in words the conclusion that a paired difference and its interval support."""
    if math.isnan(mean):
        return "not compared: no seed in common"
    if low > 0:
        return f"higher {label} in {group} than in {against}"
    if high < 0:
        return f"higher {label} in {against} than in {group}"
    return NOTHING_SHOWN


def _with_ends(parts: DataFrame, count: str) -> DataFrame:
    half = [half_width(num, sd) for num, sd in zip(parts[count], parts["sd"], strict=True)]
    return parts.assign(low=parts["mean"] - half, high=parts["mean"] + half)
