"""Learning curves: a figure against a key of the configuration, for one the number of pictures."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fashionnet.analysis import intervals, plots
from fashionnet.analysis.curves import COLOURS
from fashionnet.analysis.groups import METRICS, Group
from fashionnet.errors import UserError
from fashionnet.system import spelling

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Curve:
    """Groups that differ in nothing but one key.

    Attributes:
        points: the key's value, and the figure's values over the seeds; in order of the key.
    """

    name: str
    points: list[tuple[float, list[float]]]


def of(groups: Sequence[Group], key: str, metric: str) -> list[Curve]:
    """Gathers groups into curves.

    Args:
        key: dotted, of a number in the configuration, e.g. "data.limit".
        metric: one of `groups.METRICS`.

    Raises:
        UserError: a group has no such number or figure, or all have the same value.
    """
    curves: dict[str, list[tuple[float, list[float]]]] = {}
    values = [_value(group.members[0].config, key, group.name) for group in groups]
    names = _without([group.name for group in groups], values)
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
    node: Any = config
    for part in key.split("."):
        node = node.get(part) if isinstance(node, Mapping) else None
    if isinstance(node, bool) or not isinstance(node, int | float):
        near = spelling.closest(key, _numbers(config))
        raise UserError(f"--against {key}: it is no number in {group}{near}")
    return float(node)


def _numbers(node: Mapping[str, Any], prefix: str = "") -> list[str]:
    found = []
    for key, value in node.items():
        if isinstance(value, Mapping):
            found += _numbers(value, f"{prefix}{key}.")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found.append(f"{prefix}{key}")
    return found


def _without(names: Sequence[str], values: Sequence[float]) -> list[str]:
    """Returns the groups' names without what goes with a key, itself first of all.

    Args:
        names: of the groups, words `key=value` among them.
        values: of the key, in each.
    """
    words = [name.split(" ") for name in names]
    told = [dict(word.partition("=")[::2] for word in of_group) for of_group in words]
    gone = set()
    for key in {key for of_group in told for key in of_group}:
        pairs = {(value, said.get(key)) for value, said in zip(values, told, strict=True)}
        if len(pairs) == len(set(values)):
            gone.add(key)
    kept = [[word for word in of_group if word.partition("=")[0] not in gone] for of_group in words]
    return [" ".join(of_group) or "all" for of_group in kept]


def draw(curves: Sequence[Curve], key: str, metric: str) -> Figure:
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
        colour = COLOURS[i % len(COLOURS)]
        axes.errorbar(
            places,
            means,
            halves,
            color=colour,
            marker="o",
            capsize=3,
            label=plots.label(curve.name),
        )
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
    told = f"{seeds[0]}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
    figure.supxlabel(f"means over {told} seeds, with 95 % intervals", size=9, color="gray")
    return figure
