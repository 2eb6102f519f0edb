"""Pictures of a diagnosis: the gallery of mistakes, the confusion matrix, calibration.

Each function returns a matplotlib figure, which a notebook shows as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fashionnet.analysis.diagnosis import Diagnosis, Mistake

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_TRUE, _PREDICTED = "tab:blue", "tab:red"
_BARS: dict[str, Any] = {"align": "edge", "edgecolor": "white", "linewidth": 0.8}
_CELL = (3.1, 1.78)  # in inches, as all below: a picture and ten bars
_HEAD = 0.65  # above the cells
_SIDE = 1.2  # of a picture
_LONGEST = 0.88  # the bar of a certainty
_MOST_BARS = 12  # of a picture; with more classes, those of the most probable
_MOST_COUNTED = 40  # classes of which the confusion matrix shows the counts, not the shades alone
_MOST_NAMED = 60  # classes that it names; with more, some of them


def gallery(diagnosis: Diagnosis, shown: Sequence[Mistake], images: NDArray[np.uint8]) -> Figure:
    """Draws wrong answers, each with its probabilities.

    Args:
        shown: the mistakes, in the order to draw them in; may be empty.
        images: (len(shown), H, W) gray or (len(shown), 3, H, W) RGB, what they look like.
    """
    from matplotlib.figure import Figure

    columns = min(4, max(2, len(shown)))  # two are as wide as the head
    rows = -(-len(shown) // columns)
    width, height = _CELL[0] * columns, _CELL[1] * rows + _HEAD
    figure = Figure(figsize=(width, height))
    # One pair of axes in inches, from the upper left: a pair for each picture takes long to draw.
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    middle = width / 2
    line: dict[str, Any] = {"va": "center", "size": 10}
    title = f"{diagnosis.split} set: {diagnosis.count_mistakes(len(shown))}"
    axes.text(middle, 0.27, title, ha="center", va="center", size=13)
    axes.text(middle - 0.1, 0.53, "■ predicted", color=_PREDICTED, ha="right", **line)
    axes.text(middle + 0.1, 0.53, "■ true", color=_TRUE, ha="left", **line)
    for place, (mistake, image) in enumerate(zip(shown, images, strict=True)):
        row, column = divmod(place, columns)
        corner = _CELL[0] * column, _HEAD + _CELL[1] * row
        _draw_mistake(axes, corner, diagnosis.class_names, mistake, image)
    axes.set(xlim=(0, width), ylim=(height, 0), aspect="auto")  # last: imshow sets them, too
    return figure


def _draw_mistake(
    axes: Axes,
    corner: tuple[float, float],
    names: Sequence[str],
    mistake: Mistake,
    image: NDArray[np.uint8],
) -> None:
    left, top = corner[0] + 0.12, corner[1]
    title = f"{_shortened(mistake.true, 17)} taken for {_shortened(mistake.predicted, 17)}"
    sure = f"{mistake.probability:.2%} sure, no. {mistake.index}"
    axes.text(left, top + 0.18, title, va="center", size=9.5)
    axes.text(left, top + 0.34, sure, va="center", size=8, color="gray")
    upper, lower, start = top + 0.46, top + 0.46 + _SIDE, left + 2
    extent = (left, left + _SIDE, lower, upper)
    looks = image if image.ndim == 2 else image.transpose(1, 2, 0)
    axes.imshow(looks, cmap="gray", vmin=0, vmax=255, interpolation="nearest", extent=extent)
    special = {mistake.true: _TRUE, mistake.predicted: _PREDICTED}
    shown = _shown_bars(mistake, names)
    names = [names[i] for i in shown]
    step = _SIDE / len(names)
    heights = upper + step * (np.arange(len(names)) + 0.5)
    lengths = _LONGEST * np.array(mistake.probabilities)[shown]
    colors = [special.get(name, "gray") for name in names]
    axes.barh(heights, lengths, 0.8 * step, start, color=colors)
    axes.plot([start, start], [upper, lower], color="black", linewidth=0.8)
    for name, height in zip(names, heights.tolist(), strict=True):
        # Colored as well: the bar of the true class is often too short to be seen.
        color = special.get(name, "black")
        text = axes.text(start - 0.04, height, _shortened(name, 14), size=7, color=color)
        text.set(ha="right", va="center_baseline")


def _shown_bars(mistake: Mistake, names: Sequence[str]) -> list[int]:
    """Returns which classes get a bar: all, or the true one and the most probable of many."""
    if len(names) <= _MOST_BARS:
        return list(range(len(names)))
    likely = np.argsort(-np.array(mistake.probabilities), kind="stable").tolist()
    first = likely[:_MOST_BARS]
    true = names.index(mistake.true)
    return first if true in first else [*first[:-1], true]


def _shortened(name: str, most: int) -> str:
    """Returns a name with its middle left out, since many names differ only at their end."""
    half = (most - 1) // 2
    return name if len(name) <= most else f"{name[:half]}…{name[len(name) - half :]}"


def confusion(diagnosis: Diagnosis) -> Figure:
    """Draws the confusion matrix: rows true, columns predicted, blue for correct, red for wrong."""
    from matplotlib.figure import Figure

    counts, names = diagnosis.confusion, diagnosis.class_names
    diagonal = np.eye(len(names), dtype=bool)
    # Each has its own scale: a hundred mistakes would be invisible beside 900 correct answers.
    wrong = np.where(diagonal, 0, counts) / max(1, counts[~diagonal].max())
    correct = np.where(diagonal, counts, 0) / max(1, counts[diagonal].max())
    shades = wrong - correct
    side = min(14.0, max(8.0, 0.35 * len(names)))
    figure = Figure(figsize=(side + 0.5, side), layout="constrained")
    axes = figure.subplots()
    axes.imshow(0.85 * shades, cmap="RdBu_r", vmin=-1, vmax=1, interpolation="nearest")
    size = min(9.0, 250 / len(names))
    for (i, j), count in np.ndenumerate(counts if len(names) <= _MOST_COUNTED else counts[:0]):
        color = "white" if abs(shades[i, j]) > 0.6 else "black" if count else "lightgray"
        axes.text(j, i, f"{count:,}", ha="center", va="center", size=size, color=color)
    places = range(0, len(names), -(-len(names) // _MOST_NAMED))
    labels = [_shortened(names[place], 30) for place in places]
    upright: dict[str, Any] = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"}
    if len(names) > 20:
        upright |= {"rotation": 90, "va": "center"}
        axes.tick_params(labelsize=7)
    axes.set_xticks(places, labels, **upright)
    axes.set_yticks(places, labels)
    axes.set(xlabel="predicted", ylabel="true")
    if len(names) > _MOST_COUNTED:
        most = (counts[diagonal].max(), counts[~diagonal].max())
        axes.set_xlabel(
            "predicted; darkest blue: {:,} correct, darkest red: {:,} wrong".format(*most)
        )
    num, num_correct = len(diagnosis.labels), int(diagnosis.correct.sum())
    axes.set_title(
        f"{diagnosis.split} set: {num_correct:,} of {num:,} correct ({diagnosis.accuracy:.2%})"
    )
    return figure


def calibration(diagnosis: Diagnosis) -> Figure:
    """Draws the reliability diagram, and below it how many predictions each bin holds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 7), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1.4))
    _draw_reliability(upper, diagnosis)
    _draw_counts(lower, diagnosis)
    return figure


def _draw_reliability(axes: Axes, diagnosis: Diagnosis) -> None:
    lows, highs, _, confidence, accuracy = np.array(
        [astuple(part) for part in diagnosis.bins if part.count], dtype=float
    ).T
    axes.bar(lows, accuracy, highs - lows, color=_TRUE, alpha=0.6, label="accuracy", **_BARS)
    axes.plot(confidence, accuracy, "o", color="black", markersize=4, label="at mean probability")
    axes.plot([0, 1], [0, 1], color="black", linestyle="--", linewidth=1, label="perfect")
    axes.set(xlim=(0, 1), ylim=(0, 1.02), ylabel="accuracy")
    axes.set_title(
        f"{diagnosis.split} set: expected calibration error {diagnosis.calibration_error:.4f}"
    )
    axes.legend(loc="upper left")
    axes.grid(alpha=0.3)
    axes.set_axisbelow(True)


def _draw_counts(axes: Axes, diagnosis: Diagnosis) -> None:
    counts = [part.count for part in diagnosis.bins]
    widths = [part.high - part.low for part in diagnosis.bins]
    drawn = axes.bar([part.low for part in diagnosis.bins], counts, widths, color="gray", **_BARS)
    axes.bar_label(drawn, [f"{count:,}" for count in counts], padding=2, size=8)
    axes.set_ylim(0, 1.15 * max(counts))
    axes.set(xlabel="probability of the prediction", ylabel="predictions")
    axes.grid(alpha=0.3, axis="y")
    axes.set_axisbelow(True)
