"""The overfitting plot: loss and accuracy by epoch, in training and validation, by group."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fashionnet.analysis import plots
from fashionnet.analysis.groups import CURVES, Group
from fashionnet.errors import UserError
from fashionnet.system.files import write_output

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from pandas import DataFrame

FORMATS = (".png", ".svg")
# Okabe and Ito's, which colour-blind people tell apart; their yellow is too pale for a line.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_SIZE = (9, 4.6)  # inches; at 100 dots an inch as wide as a README
_LINE = 0.21  # inches a line of the legend
_DPI = 200  # twice that, for screens with fine dots


def epoch_table(groups: Sequence[Group]) -> DataFrame:
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


def draw(groups: Sequence[Group]) -> Figure:
    """Draws loss on the left and accuracy on the right, one colour a group.

    Lines are means over the seeds that have the epoch, bands reach from the lowest to the highest.

    Raises:
        UserError: there are more groups than colours that can be told apart.
    """
    if len(groups) > len(COLOURS):
        raise UserError(
            f"the plot shows at most {len(COLOURS)} groups, here are {len(groups)}; give fewer runs"
        )
    from matplotlib.figure import Figure  # no pyplot: that would look for a display
    from matplotlib.ticker import MaxNLocator

    by_epoch = epoch_table(groups).groupby(["group", "epoch"])[list(CURVES)]
    parts = {name: by_epoch.agg(name) for name in ("mean", "min", "max")}
    figure = Figure(figsize=_SIZE, layout="constrained")
    panels = figure.subplots(1, 2)
    for axes, quantity in zip(panels, ("loss", "accuracy"), strict=True):
        for group, colour in zip(groups, COLOURS, strict=False):
            own = {name: table.loc[group.name] for name, table in parts.items()}
            _draw_group(axes, quantity, group, colour, own)
        _draw_best(axes, quantity, groups, parts["mean"])
        axes.set(title=quantity, xlabel="epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    _explain(figure, groups)
    return figure


def _draw_group(
    axes: Axes, quantity: str, group: Group, colour: str, parts: dict[str, DataFrame]
) -> None:
    epochs = parts["mean"].index
    dots = "." if len(epochs) == 1 else ""  # one point alone makes no line
    for column, line in ((quantity, "--"), (f"val_{quantity}", "-")):
        label = f"{plots.label(group.name)}, {'training' if line == '--' else 'validation'}"
        width = 1.4 if line == "--" else 2.0
        mean = parts["mean"][column]
        axes.plot(epochs, mean, line, color=colour, linewidth=width, marker=dots, label=label)
        if len(group.members) > 1:
            ends = parts["min"][column], parts["max"][column]
            axes.fill_between(epochs, *ends, color=colour, alpha=0.15, linewidth=0)


def _draw_best(axes: Axes, quantity: str, groups: Sequence[Group], mean: DataFrame) -> None:
    """Marks the epoch of each group's lowest mean validation loss."""
    size = 12.0
    for group, colour in zip(groups, COLOURS, strict=False):
        losses = mean.loc[group.name]["val_loss"].dropna()
        if len(losses):
            best = losses.idxmin()
            y = mean.loc[group.name][f"val_{quantity}"][best]
            point: dict[str, Any] = {"markersize": size, "markeredgecolor": "white"}
            point |= {"markeredgewidth": 0.7, "zorder": 3}
            axes.plot(best, y, "o", color=colour, **point)
            size = max(size - 4, 4)  # where they meet, none hides another


def _explain(figure: Figure, groups: Sequence[Group]) -> None:
    from matplotlib.lines import Line2D

    entries: list[tuple[Any, str]] = []
    for group, colour in zip(groups, COLOURS, strict=False):
        num = len(group.members)
        seeds = f"{num} seed{'s' if num > 1 else ''}"
        entries.append(
            (Line2D([], [], color=colour, linewidth=4), f"{plots.label(group.name)} ({seeds})")
        )
    grey: dict[str, Any] = {"color": "dimgray"}
    entries += [
        (Line2D([], [], linestyle="--", linewidth=1.4, **grey), "training"),
        (Line2D([], [], linewidth=2, **grey), "validation"),
        (Line2D([], [], linestyle="", marker="o", **grey), "lowest mean validation loss"),
    ]
    longest = max(len(label) for _, label in entries)
    columns = max(1, min(len(entries), 120 // (longest + 8)))
    lines = -(-len(entries) // columns)
    figure.set_figheight(_SIZE[1] + _LINE * max(lines - 2, 0))  # the panels keep their height
    handles, labels = zip(*entries, strict=True)
    figure.legend(handles, labels, loc="outside upper center", ncols=columns, frameon=False)
    told = ["Training: averages over the epoch, dropout on. Validation: at its end, dropout off."]
    if any(len(group.members) > 1 for group in groups):
        told.append("Lines: means over seeds. Bands: from the lowest seed to the highest.")
    if any(len(group.lengths) > 1 for group in groups):
        told.append("Some runs are shorter: an epoch shows the runs that have it.")
    figure.supxlabel("\n".join(told), fontsize=9, color="dimgray")


def save(figure: Figure, path: str | Path) -> None:
    """Writes a figure as PNG or SVG, by the ending of `path`; without one as PNG.

    Raises:
        OSError: the file cannot be written.
    """
    from matplotlib import rc_context

    path = Path(path)
    kind = "svg" if path.suffix.lower() == ".svg" else "png"
    content = io.BytesIO()
    # The same runs give the same file: no date, no random names.
    fixed: dict[str, Any] = {"metadata": {"Date": None}} if kind == "svg" else {}
    with rc_context({"svg.hashsalt": "fashionnet"}):
        plots.save(figure, content, format=kind, dpi=_DPI, **fixed)
    write_output(path, content.getvalue())
