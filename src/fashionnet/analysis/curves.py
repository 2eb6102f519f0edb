"""Curves of groups of runs: loss and accuracy by epoch, and a figure against a key.

Each drawing function returns a matplotlib figure, which a notebook shows as it is.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fashionnet.analysis import intervals, plots
from fashionnet.analysis.groups import CURVES, METRICS, Group
from fashionnet.config import schema
from fashionnet.config.source import leaves
from fashionnet.errors import UserError
from fashionnet.system import spelling

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from pandas import DataFrame

# Okabe and Ito's, which color-blind people can distinguish; their yellow is too pale for a line.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_SIZE = (9, 4.6)  # inches; at 100 dots an inch as wide as a README
_LINE = 0.21  # inches a line of the legend


@dataclass(frozen=True)
class Curve:
    """Groups that differ in nothing but one key.

    Attributes:
        points: the key's value and the figure's values over the seeds, in order of the key.
    """

    name: str
    points: list[tuple[float, list[float]]]


def _epoch_table(groups: Sequence[Group]) -> DataFrame:
    """Returns a row for each run and epoch: group, seed, epoch and Keras' four history keys."""
    import pandas as pd

    rows = [
        {"group": group.name, "seed": member.seed, "epoch": row["epoch"]}
        | {key: row.get(key) for key in CURVES}
        for group in groups
        for member in group.members
        for row in member.rows
    ]
    return pd.DataFrame(rows).astype(dict.fromkeys(CURVES, float))


def draw_history(groups: Sequence[Group]) -> Figure:
    """Draws loss on the left and accuracy on the right, one color a group.

    Lines are means over the seeds that have the epoch; bands span from the lowest to the highest.

    Raises:
        UserError: there are more groups than distinct colors.
    """
    if len(groups) > len(COLORS):
        raise UserError(
            f"the plot shows at most {len(COLORS)} groups, here are {len(groups)}; give fewer runs"
        )
    from matplotlib.figure import Figure  # no pyplot: that would look for a display
    from matplotlib.ticker import MaxNLocator

    by_epoch = _epoch_table(groups).groupby(["group", "epoch"])[list(CURVES)]
    parts = {name: by_epoch.agg(name) for name in ("mean", "min", "max")}
    figure = Figure(figsize=_SIZE, layout="constrained")
    panels = figure.subplots(1, 2)
    for axes, quantity in zip(panels, ("loss", "accuracy"), strict=True):
        for group, color in zip(groups, COLORS, strict=False):
            own = {name: table.loc[group.name] for name, table in parts.items()}
            _draw_group(axes, quantity, group, color, own)
        _draw_best(axes, quantity, groups, parts["mean"])
        axes.set(title=quantity, xlabel="epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    _explain(figure, groups)
    return figure


def _draw_group(
    axes: Axes, quantity: str, group: Group, color: str, parts: dict[str, DataFrame]
) -> None:
    epochs = parts["mean"].index
    dots = "." if len(epochs) == 1 else ""  # one point alone makes no line
    for column, line in ((quantity, "--"), (f"val_{quantity}", "-")):
        name = f"{plots.label(group.name)}, {'training' if line == '--' else 'validation'}"
        width = 1.4 if line == "--" else 2.0
        mean = parts["mean"][column]
        axes.plot(epochs, mean, line, color=color, linewidth=width, marker=dots, label=name)
        if len(group.members) > 1:
            ends = parts["min"][column], parts["max"][column]
            axes.fill_between(epochs, *ends, color=color, alpha=0.15, linewidth=0)


def _draw_best(axes: Axes, quantity: str, groups: Sequence[Group], mean: DataFrame) -> None:
    """Marks the epoch of each group's lowest mean validation loss."""
    size = 12.0
    for group, color in zip(groups, COLORS, strict=False):
        losses = mean.loc[group.name]["val_loss"].dropna()
        if len(losses):
            best = losses.idxmin()
            y = mean.loc[group.name][f"val_{quantity}"][best]
            point: dict[str, Any] = {"markersize": size, "markeredgecolor": "white"}
            point |= {"markeredgewidth": 0.7, "zorder": 3}
            axes.plot(best, y, "o", color=color, **point)
            size = max(size - 4, 4)  # where points meet, none hides another


def _explain(figure: Figure, groups: Sequence[Group]) -> None:
    from matplotlib.lines import Line2D

    entries: list[tuple[Any, str]] = []
    for group, color in zip(groups, COLORS, strict=False):
        num = len(group.members)
        seeds = f"{num} seed{'s' if num > 1 else ''}"
        entries.append(
            (Line2D([], [], color=color, linewidth=4), f"{plots.label(group.name)} ({seeds})")
        )
    gray: dict[str, Any] = {"color": "dimgray"}
    entries += [
        (Line2D([], [], linestyle="--", linewidth=1.4, **gray), "training"),
        (Line2D([], [], linewidth=2, **gray), "validation"),
        (Line2D([], [], linestyle="", marker="o", **gray), "lowest mean validation loss"),
    ]
    longest = max(len(words) for _, words in entries)
    columns = max(1, min(len(entries), 120 // (longest + 8)))
    lines = -(-len(entries) // columns)
    figure.set_figheight(_SIZE[1] + _LINE * max(lines - 2, 0))  # the panels keep their height
    handles, labels = zip(*entries, strict=True)
    figure.legend(handles, labels, loc="outside upper center", ncols=columns, frameon=False)
    explanation = [
        "Training: averages over the epoch, dropout on. Validation: at its end, dropout off."
    ]
    if any(len(group.members) > 1 for group in groups):
        explanation.append("Lines: means over seeds. Bands: from the lowest seed to the highest.")
    if any(len(group.lengths) > 1 for group in groups):
        explanation.append("Some runs are shorter: an epoch shows the runs that have it.")
    figure.supxlabel("\n".join(explanation), fontsize=9, color="dimgray")


def against(groups: Sequence[Group], key: str, metric: str) -> list[Curve]:
    """Gathers groups into curves.

    Args:
        key: dotted, of a number in the configuration, e.g. "data.limit".
        metric: one of `groups.METRICS`.

    Raises:
        UserError: a group has no such number or figure, or all have the same value.
    """
    curves: dict[str, list[tuple[float, list[float]]]] = {}
    values = [_value(group.members[0].config, key, group.name) for group in groups]
    names = _names_without([group.name for group in groups], values)
    for group, name, value in zip(groups, names, values, strict=True):
        figures = [member.figures[metric] for member in group.members]
        known = [figure for figure in figures if figure is not None]
        if len(known) < len(figures):
            raise UserError(f"{group.name} has no {METRICS[metric].label}: no validation set")
        curves.setdefault(name, []).append((value, known))
    if len(set(values)) < 2:
        raise UserError(f"--against {key}: all runs have the same value, {values[0]:g}")
    return [Curve(name, sorted(points)) for name, points in curves.items()]


def _value(config: Mapping[str, Any], key: str, group: str) -> float:
    value = schema.at(config, key)
    if isinstance(value, bool) or not isinstance(value, int | float):
        numbers = [name for name, number in leaves(config) if type(number) in (int, float)]
        near = spelling.closest(key, numbers)
        raise UserError(f"--against {key}: it is not a number in {group}{near}")
    return float(value)


def _names_without(names: Sequence[str], values: Sequence[float]) -> list[str]:
    """Returns the groups' names without the key and without the keys that vary with it.

    Args:
        names: of the groups, made of words `key=value`.
        values: of the key, in each group.
    """
    words = [name.split(" ") for name in names]
    settings = [dict(word.partition("=")[::2] for word in each) for each in words]
    gone = set()
    for key in {key for setting in settings for key in setting}:
        pairs = {(value, each.get(key)) for value, each in zip(values, settings, strict=True)}
        if len(pairs) == len(set(values)):
            gone.add(key)
    kept = [[word for word in each if word.partition("=")[0] not in gone] for each in words]
    return [" ".join(each) or "all" for each in kept]


def draw_against(curves: Sequence[Curve], key: str, metric: str) -> Figure:
    """Draws curves: means over the seeds, with their 95 % intervals where there are two or more."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for i, curve in enumerate(curves):
        places = [place for place, _ in curve.points]
        means = [statistics.mean(values) for _, values in curve.points]
        halves = [
            intervals.half_width(len(values), statistics.stdev(values)) if len(values) > 1 else 0.0
            for _, values in curve.points
        ]
        style: dict[str, Any] = {"color": COLORS[i % len(COLORS)], "marker": "o", "capsize": 3}
        axes.errorbar(places, means, halves, label=plots.label(curve.name), **style)
    if min(place for curve in curves for place, _ in curve.points) > 0:
        axes.set_xscale("log")
        ticks = sorted({place for curve in curves for place, _ in curve.points})
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
    axes.set(xlabel=key, ylabel=METRICS[metric].label)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    seeds = sorted({len(values) for curve in curves for _, values in curve.points})
    num = f"{seeds[0]}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
    figure.supxlabel(f"means over {num} seeds, with 95 % intervals", size=9, color="gray")
    return figure
