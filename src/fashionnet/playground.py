"""The lesson's two toys in NumPy alone: one neuron, and a network that learns XOR.

python -m fashionnet.playground neuron
python -m fashionnet.playground neuron --inputs 1 2 --weights 0.5 -0.25 --activation sigmoid
python -m fashionnet.playground xor --ascii
python -m fashionnet.playground xor --learning-rate 50

Notebooks find the functions behind them in `fashionnet.toys`.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fashionnet import toys
from fashionnet.analysis import plots
from fashionnet.system.command_line import Parser, reported
from fashionnet.system.files import write_output
from fashionnet.toys import Floats, Weights, XorResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_PROG = "python -m fashionnet."
_NEURON = """One neuron, step by step: each input times its weight, the sum of these, plus a bias,
then the activation. The defaults are the lesson's numbers."""
_XOR = """Two inputs -> hidden ReLU neurons -> one sigmoid, trained on XOR by gradient descent.

With the defaults 99 of the seeds 0 to 99 solve it, all but 61; with --hidden 4 only 63 do. Try
--seed 61 to see training get stuck, and --learning-rate 50 to see it explode. A dead neuron gives 0
for all four points, so that no gradient reaches it any more."""

_AGREE = 1e-5  # correct gradients differ by less, wrong ones by far more
_LOW, _HIGH = -0.5, 1.5  # what the pictures show of both inputs
_SHADES = ".:+#"  # the probability of a 1, in quarters
_COLUMNS, _LINES = 41, 21  # the four points fall on characters


def neuron_steps(
    inputs: Sequence[float], weights: Sequence[float], bias: float, activation: str
) -> str:
    """Returns a neuron's calculation step by step; raises what `toys.neuron` raises."""
    products, weighted_sum, raw, activated = toys.neuron(inputs, weights, bias, activation)
    steps = [
        (f"input {x} * weight {w}", "=", product)
        for x, w, product in zip(inputs, weights, products, strict=True)
    ]
    steps += [("weighted sum", "=", weighted_sum), ("bias", "+", bias)]
    wide = max(len(name) for name, _, _ in steps)
    long = max(len(_figure(value)) for _, _, value in steps)
    lines = [f"{name:{wide}}  {sign} {_figure(value):>{long}}" for name, sign, value in steps]
    lines.append(f"{activation}(x) = {toys.ACTIVATIONS[activation].formula}")
    lines.append(f"raw {_figure(raw)} -> activated {_figure(activated)}")
    return "\n".join(lines)


def _figure(value: float) -> str:
    """Returns three decimals, or an exponent where these would hide the number."""
    plain = value == 0 or 1e-3 <= abs(value) < 1e6
    return f"{value:.3f}" if plain else f"{value:.3e}"


def loss_table(result: XorResult) -> str:
    """Returns the losses after 0, 1, 2, 5, 10, 20, 50, … epochs and at the end, one a line."""
    last = len(result.losses) - 1
    epochs = [n * 10**power for power in range(len(str(last))) for n in (1, 2, 5)]
    shown = [0, *(epoch for epoch in epochs if epoch < last), last]
    width = len(str(last))
    return "\n".join(f"epoch {n:{width}}  loss {_loss(result.losses[n])}" for n in shown)


def _loss(value: float) -> str:
    return f"{value:.4f}" if 1e-4 <= value < 1e6 else f"{value:.3e}"


def truth_table(result: XorResult) -> str:
    """Returns XOR with the network's probability of a 1 beside each line, and what is right."""
    lines = ["x1 x2  xor  predicted"]
    rows = zip(toys.POINTS, toys.TARGETS, result.predictions, result.correct, strict=True)
    for (x1, x2), target, probability, right in rows:
        verdict = "right" if right else "wrong"
        lines.append(f"{x1:2.0f} {x2:2.0f}  {target:3.0f}  {probability:9.4f}  {verdict}")
    return "\n".join(lines)


def verdict(result: XorResult) -> str:
    """Returns how training ended, in words, and what to try next."""
    losses, score = result.losses, f"{result.correct.sum()} of 4 right"
    dead = f"{result.num_dead} of {len(result.weights.output)} hidden neurons are dead"
    if not np.isfinite(losses[-1]):
        text = f"exploded: the loss is {losses[-1]} after epoch {len(losses) - 1}, {score}"
        return f"{text}; try a smaller --learning-rate"
    if result.exploded:
        rise = f"the loss rose from {_loss(losses[0])} to {_loss(losses.max())}"
        text = f"exploded: {rise} in epoch {losses.argmax()}, {score}, {dead}"
        return f"{text}; try a smaller --learning-rate"
    if result.solved:
        return f"solved: {score}"
    if losses[-1] < 0.99 * losses[9 * (len(losses) - 1) // 10]:  # by 1 % in the last tenth
        return f"not solved yet: {score} and the loss still falls; try more --epochs"
    smaller = ", a smaller --learning-rate" if losses.max() > losses[0] else ""
    return f"stuck: {score}, {dead}; try another --seed{smaller} or a larger --hidden"


def ascii_boundary(weights: Weights) -> str:
    """Returns what the network says between and around the four points, as text.

    The first input runs to the right and the second up, each from -0.5 to 1.5. The points
    themselves are shown as what XOR wants there, 0 or 1.
    """
    grid = _grid_predictions(weights, _COLUMNS, _LINES)
    lines = [[_shade(probability) for probability in row] for row in grid]
    for (x1, x2), target in zip(toys.POINTS, toys.TARGETS, strict=True):
        column = round((x1 - _LOW) / (_HIGH - _LOW) * (_COLUMNS - 1))
        line = round((x2 - _LOW) / (_HIGH - _LOW) * (_LINES - 1))
        lines[line][column] = f"{target:.0f}"
    quarters = "0 to 1/4 [.]  to 1/2 [:]  to 3/4 [+]  to 1 [#]"
    return "\n".join([*("".join(line) for line in reversed(lines)), f"says 1 with {quarters}"])


def _shade(probability: float) -> str:
    return "?" if np.isnan(probability) else _SHADES[min(int(4 * probability), 3)]


def _grid_predictions(weights: Weights, columns: int, lines: int) -> Floats:
    """Returns predictions (lines, columns), the lowest line first."""
    x1, x2 = np.meshgrid(np.linspace(_LOW, _HIGH, columns), np.linspace(_LOW, _HIGH, lines))
    points = np.stack([x1.ravel(), x2.ravel()], axis=1)
    return toys.predict(weights, points).reshape(lines, columns)


def plot(result: XorResult, path: str | Path) -> None:
    """Draws the decision boundary and the loss curve side by side, as a PNG.

    Raises:
        UserError: `plots.check` refuses the path.
        OSError: the file cannot be written.
    """
    plots.check(path, ".png")
    from matplotlib.figure import Figure  # no pyplot: that would look for a display

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    _draw_boundary(left, result)
    _draw_losses(right, result)
    figure.savefig(content := io.BytesIO(), format="png", dpi=120)
    write_output(Path(path), content.getvalue())


def _draw_boundary(axes: Axes, result: XorResult) -> None:
    # Rounded, since a network that says one half everywhere has no boundary but rounding noise.
    grid = _grid_predictions(result.weights, 201, 201).round(6)
    extent = (_LOW, _HIGH, _LOW, _HIGH)
    colors: dict[str, Any] = {"cmap": "RdBu_r", "vmin": 0, "vmax": 1, "alpha": 0.85}
    image = axes.imshow(grid, origin="lower", extent=extent, **colors)
    axes.figure.colorbar(image, ax=axes, label="predicted probability of a 1")
    if grid.min() < 0.5 < grid.max():  # false for nan, too
        axes.contour(grid, levels=[0.5], extent=extent, colors="black", linewidths=1.5)
    for (x1, x2), target, right in zip(toys.POINTS, toys.TARGETS, result.correct, strict=True):
        edge = "black" if right else "red"
        axes.plot(x1, x2, "o", markersize=20, color="white", markeredgecolor=edge, zorder=3)
        axes.text(x1, x2, f"{target:.0f}", ha="center", va="center", color=edge, zorder=4)
    axes.set(xlabel="first input", ylabel="second input", xticks=(0, 1), yticks=(0, 1))
    axes.set_title(f"decision boundary: {result.correct.sum()} of 4 right")


def _draw_losses(axes: Axes, result: XorResult) -> None:
    losses = result.losses
    finite = losses[np.isfinite(losses)]
    few = "o" if len(finite) < 50 else None  # one point alone makes no line
    axes.plot(finite, marker=few, linewidth=1.2)
    axes.set_xlim(0, len(losses) - 1)
    axes.axhline(np.log(2), color="gray", linestyle="--", linewidth=1)
    axes.annotate(
        "guessing: log 2",
        (1, np.log(2)),
        xycoords=axes.get_yaxis_transform(),
        xytext=(-4, 3),
        textcoords="offset points",
        ha="right",
        color="gray",
    )
    axes.set(xlabel="epoch", ylabel="binary cross-entropy")
    if finite.max() > 10 * finite.min():  # a smaller range has no round powers of ten to label
        axes.set_yscale("log")
    axes.set_title(f"loss: {_loss(losses[0])} before, {_loss(losses[-1])} after")
    axes.grid(alpha=0.3)


class _ToyParser(Parser):
    """The parser of one toy, as argparse makes it."""

    def __init__(self, prog: str, doc: str, **_: Any) -> None:
        super().__init__(prog.removeprefix(_PROG), doc)


def _parser() -> Parser:
    parser = Parser("playground", __doc__)
    toy = parser.add_subparsers(dest="toy", required=True, parser_class=_ToyParser)
    one = toy.add_parser("neuron", doc=_NEURON, help="one neuron, step by step")
    one.add_argument("--inputs", type=float, nargs="+", default=[0.5, 0.8, 0.2], metavar="X")
    one.add_argument("--weights", type=float, nargs="+", default=[0.9, -0.4, 0.3], metavar="W")
    one.add_argument("--bias", type=float, default=0.1, metavar="B")
    one.add_argument("--activation", default="relu", help=", ".join(toys.ACTIVATIONS))
    xor = toy.add_parser("xor", doc=_XOR, help="a network that learns XOR")
    xor.add_argument("--hidden", type=int, default=8, help="hidden neurons; default: 8")
    xor.add_argument("--learning-rate", type=float, default=0.5, help="default: 0.5")
    xor.add_argument("--epochs", type=int, default=1000, help="default: 1000")
    xor.add_argument("--seed", type=int, default=0, help="of the first weights; default: 0")
    xor.add_argument(
        "--check-gradients", action="store_true", help="compare backpropagation with differences"
    )
    xor.add_argument("--ascii", action="store_true", help="draw the decision boundary as text")
    xor.add_argument("--plot", metavar="FILE.png", help="draw boundary and loss; needs matplotlib")
    return parser


@reported()
def main() -> None:
    """The command: `python -m fashionnet.playground`."""
    given = _parser().parse_args()
    if given.toy == "neuron":
        text = neuron_steps(given.inputs, given.weights, given.bias, given.activation)
    else:
        if given.plot is not None:
            plots.check(given.plot, ".png", instead="--ascii")
        result = toys.train_xor(given.hidden, given.learning_rate, given.epochs, given.seed)
        parts = [loss_table(result), truth_table(result), verdict(result)]
        if given.check_gradients:
            parts.insert(0, _described_gradients(result.initial))
        if given.ascii:
            parts.insert(-1, ascii_boundary(result.weights))
        if given.plot is not None:
            plot(result, given.plot)
        text = "\n".join(parts)
    print(text)


def _described_gradients(weights: Weights) -> str:
    error = toys.gradient_error(weights)
    text = "agree" if error < _AGREE else "DIFFER"
    return f"gradients: backpropagation and differences {text}, largest relative error {error:.1e}"


if __name__ == "__main__":
    main()
