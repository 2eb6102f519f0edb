"""Learning curves: a figure against a key of the configuration, for one the number of pictures."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fashionnet import config as configs, intervals
from fashionnet.curves import COLOURS
from fashionnet.errors import UserError
from fashionnet.groups import METRICS, Group

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
    values = set()
    for group in groups:
        config = group.members[0].config
        value = _value(config, key, group.name)
        figures = [member.figures[metric] for member in group.members]
        known = [figure for figure in figures if figure is not None]
        if len(known) < len(figures):
            raise UserError(f"{group.name} has no {METRICS[metric].label}: no validation set")
        curves.setdefault(_without(group.name, key), []).append((value, known))
        values.add(value)
    if len(values) < 2:
        raise UserError(f"--against {key}: all runs have the same value, {values.pop():g}")
    return [Curve(name, sorted(points)) for name, points in curves.items()]


def _value(config: Mapping[str, Any], key: str, group: str) -> float:
    node: Any = config
    for part in key.split("."):
        node = node.get(part) if isinstance(node, Mapping) else None
    if isinstance(node, bool) or not isinstance(node, int | float):
        near = configs.closest(key, _numbers(config))
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


def _without(name: str, key: str) -> str:
    """Returns a group's name without what it says of a key."""
    parts = [part for part in name.split(" ") if not part.startswith(f"{key}=")]
    return " ".join(parts) or "all"


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
        axes.errorbar(places, means, halves, color=colour, marker="o", capsize=3, label=curve.name)
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
