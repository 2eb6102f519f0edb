"""A comparison of groups of runs: its tables, notes on how to read them, and its text."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from fashionnet.analysis import intervals
from fashionnet.analysis.groups import METRICS, Gathered, Group, LeftOut
from fashionnet.errors import visible
from fashionnet.system import terminal

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pandas import DataFrame

_PLACE = ("processor", "device", "threads")


@dataclass(frozen=True)
class Comparison:
    """What a comparison found.

    Attributes:
        runs: a row a run, see `intervals.run_table`.
        table: a row for each group and metric, see `intervals.group_table`.
        differences: of each group from the first, see `intervals.paired_table`.
        left_out: the runs that are in none of these, and why.
        notes: how to read the figures.
    """

    groups: list[Group]
    runs: DataFrame
    table: DataFrame
    differences: DataFrame
    left_out: list[LeftOut]
    notes: list[str]


def between(found: Gathered, metrics: Sequence[str]) -> Comparison:
    """Compares groups of runs, each with the first.

    Args:
        metrics: those of `METRICS` to have paired differences of.
    """
    runs = intervals.run_table(found.groups)
    table = intervals.group_table(runs)
    differences = intervals.paired_table(runs, found.groups, metrics)
    notes = [*_about_figures(found.groups, len(differences)), *_about_runs(found)]
    return Comparison(found.groups, runs, table, differences, found.left_out, notes)


def _about_figures(groups: Sequence[Group], num_differences: int) -> list[str]:
    single = [group.name for group in groups if len(group.members) == 1]
    notes = [
        "Training figures are averages over the epoch with dropout on; validation and test "
        "figures are taken with dropout off. Final: of the epoch whose weights a run ended with.",
        "Generalization gap: final training accuracy minus final validation accuracy.",
    ]
    if len(single) < len(groups):
        notes.append("±: the 95 % interval of a mean over seeds (Student t), half its width.")
    if single:
        notes.append(f"One seed only, so no interval: {', '.join(single)}.")
    if num_differences > 1:
        notes.append(
            f"The {num_differences} intervals of differences are 95 % each, not corrected for "
            "several comparisons: about one in twenty excludes zero even if nothing differs."
        )
    return notes


def _about_runs(found: Gathered) -> list[str]:
    first, *others = found.groups
    notes = []
    for group in found.groups:
        if len(group.lengths) > 1:
            notes.append(
                f"{group.name}: runs of {group.lengths[0]} to {group.lengths[-1]} epochs; the "
                "plot's mean and band at an epoch are over the runs that have it."
            )
    for group in others:
        if not intervals.measured_alike(group, first, "test_accuracy"):
            reason = "ran on other data", "their figures are not compared"
        elif not intervals.measured_alike(group, first, "val_loss"):
            reason = "has another validation set", "their validation figures are not compared"
        else:
            continue
        notes.append(f"WARNING: {group.name} {reason[0]} than {first.name}: {reason[1]}.")
    members = [member for group in found.groups for member in group.members]
    if len({tuple(str(member.record.get(key)) for key in _PLACE) for member in members}) > 1:
        notes.append("Fit seconds come from different processors, devices or thread counts.")
    return notes


def text(comparison: Comparison, width: int = 100) -> str:
    """Returns a comparison for a terminal: as many groups side by side as `width` columns hold."""
    rows = _rows(comparison)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    blocks, columns = [], [0]
    for column in range(1, len(widths)):
        if len(columns) > 1 and sum(widths[i] + 2 for i in [*columns, column]) > width + 2:
            blocks.append(_columns(rows, columns))
            columns = [0]
        columns.append(column)
    blocks.append(_columns(rows, columns))
    for group, differences in comparison.differences.groupby("group", sort=False):
        blocks.append(f"{group} minus {differences['against'].iloc[0]}, paired by seed")
        cells = [["", *row] for row in _difference_rows(differences)]
        blocks[-1] += "\n" + terminal.aligned(cells, num_left=len(cells[0]))
    return "\n\n".join([*blocks, "\n".join(_remarks(comparison))])


def markdown(comparison: Comparison) -> str:
    """Returns a comparison as Markdown tables and a list of notes."""
    head, *body = _rows(comparison)
    blocks = [_pipes(head, body)]
    for group, differences in comparison.differences.groupby("group", sort=False):
        against = differences["against"].iloc[0]
        head = [f"{group} minus {against}", "mean ± 95 % interval", "pairs of seeds", "supports"]
        blocks.append(_pipes(head, _difference_rows(differences)))
    return "\n\n".join([*blocks, "\n".join(f"* {n}" for n in _remarks(comparison))])


def _remarks(comparison: Comparison) -> list[str]:
    left_out = [f"left out: {run.run}: {run.reason}" for run in comparison.left_out]
    return [visible(remark) for remark in (*comparison.notes, *left_out)]


def plain(comparison: Comparison) -> dict[str, Any]:
    """Returns a comparison as plain values, in full precision; a missing figure is None."""
    groups: dict[str, dict[str, Any]] = {
        group.name: {
            "name": group.name,
            "runs": [member.name for member in group.members],
            "seeds": [member.seed for member in group.members],
            "figures": {},
        }
        for group in comparison.groups
    }
    for row in _records(comparison.table):
        groups[row.pop("group")]["figures"][row.pop("metric")] = row
    return {
        "groups": list(groups.values()),
        "differences": _records(comparison.differences),
        "left_out": [asdict(run) for run in comparison.left_out],
        "notes": comparison.notes,
    }


def _records(table: DataFrame) -> list[dict[str, Any]]:
    return [
        {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in row.items()}
        for row in table.to_dict("records")
    ]


def _rows(comparison: Comparison) -> list[list[str]]:
    """Returns the table of the groups as cells: a head, then a row for each metric."""
    groups = comparison.groups
    rows = [["", *(group.name for group in groups)]]
    rows.append(["seeds", *(str(len(group.members)) for group in groups)])
    for metric, figures in comparison.table.groupby("metric", sort=False):
        cells = (_figure(row, METRICS[metric].decimals) for row in figures.itertuples())
        rows.append([METRICS[metric].label, *cells])
    return rows


def _difference_rows(differences: DataFrame) -> list[list[str]]:
    return [
        [
            METRICS[row.metric].label,
            _figure(row, METRICS[row.metric].decimals, "+"),
            f"{row.num_pairs} pair{'' if row.num_pairs == 1 else 's'}",
            row.supports,
        ]
        for row in differences.itertuples()
    ]


def _figure(row: Any, decimals: int, sign: str = "") -> str:
    if math.isnan(row.mean):
        return "-"
    half = f" ± {row.high - row.mean:.{decimals}f}" if not math.isnan(row.high) else ""
    mean = round(row.mean, decimals) + 0.0  # no minus before a zero
    return f"{mean:{sign}.{decimals}f}{half}"


def _columns(rows: Sequence[Sequence[str]], columns: Sequence[int]) -> str:
    return terminal.aligned([[row[i] for i in columns] for row in rows], num_left=len(columns))


def _pipes(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    rows = [head, ["---"] * len(head), *body]
    return "\n".join(
        f"| {' | '.join(cell.replace('|', '&#124;') for cell in row)} |" for row in rows
    )
