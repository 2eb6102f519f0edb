"""A learning-rate range test: the training loss while the rate grows, and a rate to begin with.

python -m fashionnet.lr_find
python -m fashionnet.lr_find model=cnn batch_size=128 --plot rates.png

Overrides are those of fashionnet.train. From the run's initial weights, the rate grows by the same
factor in each step, from --low to --high, until the loss explodes. The suggestion is the rate at
which the smoothed loss falls fastest. Nothing is validated or tested, and no run directory is left.

Source: Smith 2017, "Cyclical Learning Rates for Training Neural Networks", section 3.3.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fashionnet.analysis import plots
from fashionnet.errors import UserError
from fashionnet.system.command_line import Parser, reported

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from fashionnet.config.schema import Config
    from fashionnet.training.state import TrainState

LOW, HIGH, STEPS = 1e-6, 10.0, 300
_SMOOTHING = 0.95  # the part of the running mean that a step keeps
_EXPLODED = 4  # times the lowest smoothed loss
_LEAST_STEPS = 20


@dataclass(frozen=True)
class RangeTest:
    """What a range test found.

    Attributes:
        rates: the learning rate of each step.
        losses: the mean loss of each step's batch.
        smoothed: their running mean, corrected for its start.
        suggestion: the rate at which `smoothed` falls fastest on its way to its lowest value;
            None if it never falls.
    """

    rates: list[float]
    losses: list[float]
    smoothed: list[float]
    suggestion: float | None


def lr_find(*overrides: str, low: float = LOW, high: float = HIGH, steps: int = STEPS) -> RangeTest:
    """Trains from the configured run's initial weights with a growing learning rate.

    Args:
        *overrides: as one would type them for a training.
        low, high: the rate of the first and the last step.
        steps: at most; fewer if the loss explodes.

    Raises:
        UserError: an override that is refused, rates that do not grow, too few steps, or a loss
            that is not finite from the start.
        Interrupted: a signal asked for an end.
    """
    from fashionnet import data as datasets, models
    from fashionnet.config import compose
    from fashionnet.runs import network, pretrained
    from fashionnet.system import devices, signals
    from fashionnet.training import dry_run, features, loop

    if not 0 < low < high < math.inf:
        raise UserError(f"--low {low} and --high {high}: the rate must grow, from above 0")
    if steps < _LEAST_STEPS:
        raise UserError(f"--steps {steps} is too few; give {_LEAST_STEPS} or more")
    config = compose.typed(compose.compose(*overrides))
    if "lr" not in config.optimizer:
        raise UserError("the optimizer has no learning rate, optimizer.lr, to look for")
    with (
        signals.watched() as stop,
        devices.started(
            config.device,
            config.threads,
            config.deterministic,
            config.tf32,
            config.precision,
        ) as device,
    ):
        dataset = datasets.load(config.data, network.photo_size(config.model, {}))
        num_classes = len(dataset.class_names)
        model = models.build(config.model, dataset.image_shape, num_classes, config.seed)
        pretrained.load_pretrained(model)
        model.to(device)
        train, _ = dataset.split(config.validation_split, config.data.limit)
        fit = _fit(config, model, train, num_classes, high / low, low)
        dry_run.check(fit, train, num_classes)
        inputs = features.inputs(model, train.to(device), fit.scale)
        losses: list[float] = []
        done = [0]  # steps of the epoch under way that are in `losses`

        class Keeper(loop.Watcher):
            def steps_taken(self, fit: TrainState, num_steps: int) -> None:
                losses.extend(_losses(fit, done[0]))
                done[0] = fit.step if fit.step < num_steps else 0

        # A loss that is no longer finite ends the test, as one that explodes.
        with stop.deferred(), contextlib.suppress(loop.Diverged):
            loop.fit(fit, inputs, inputs[:0], None, Keeper(stop), steps)
        losses += _losses(fit, done[0])
    return _found(losses, low, high, steps)


def _fit(
    config: Config, model: Any, train: Any, num_classes: int, growth: float, low: float
) -> TrainState:
    """Returns a fit whose rate begins with `low` and grows by the factor `growth`."""
    from fashionnet.training import augmentation, gradients, objective, optim, state
    from fashionnet.training.early_stopping import EarlyStopping

    minimized = objective.build(config, model, train.labels, num_classes)
    node = {**config.optimizer, "lr": low}
    return state.TrainState(
        model,
        optim.build(node, model, config.fine_tuning.backbone_lr),
        gradients.choose(config.gradients, model, minimized),
        EarlyStopping(),
        config.seed,
        config.batch_size,
        config.data.scale,
        schedule=lambda fraction: growth**fraction,
        augment=augmentation.build(config.augmentation, model, config.seed),
    )


def _losses(fit: TrainState, first: int) -> list[float]:
    """Returns the mean loss of each batch of the epoch under way, from step `first` on."""
    if fit.figures is None:
        return []
    losses = fit.figures.losses(first * fit.batch_size, fit.step * fit.batch_size)
    return (
        [float(batch.mean()) for batch in losses.cpu().split(fit.batch_size)] if len(losses) else []
    )


def _found(losses: Sequence[float], low: float, high: float, steps: int) -> RangeTest:
    """Returns what losses show, up to the step at which they explode."""
    smoothed: list[float] = []
    mean, lowest = 0.0, math.inf
    for step, loss in enumerate(losses, 1):
        mean = _SMOOTHING * mean + (1 - _SMOOTHING) * loss
        value = mean / (1 - _SMOOTHING**step)
        if not value <= _EXPLODED * lowest:
            break
        lowest = min(lowest, value)
        smoothed.append(value)
    num = len(smoothed)
    if num < 2:
        raise UserError(f"the loss is not finite from the start, at a rate of {low:g}")
    rates = [low * (high / low) ** (step / steps) for step in range(num)]
    bottom = min(range(num), key=smoothed.__getitem__)  # behind it the loss is unstable
    slopes = [smoothed[i + 1] - smoothed[i] for i in range(bottom)]
    steepest = min(range(bottom), key=slopes.__getitem__, default=None)
    suggestion = None if steepest is None else rates[steepest]
    return RangeTest(rates, list(losses[:num]), smoothed, suggestion)


def draw(found: RangeTest) -> Figure:
    """Draws the losses against the rate, and the suggestion."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(found.rates, found.losses, color="lightgray", linewidth=1, label="loss of a batch")
    axes.plot(found.rates, found.smoothed, color="tab:blue", label="running mean")
    if found.suggestion is not None:
        text = f"falls fastest: {found.suggestion:.1e}"
        axes.axvline(found.suggestion, color="tab:red", linestyle="--", label=text)
    axes.set(xscale="log", xlabel="learning rate", ylabel="training loss")
    axes.set_ylim(0, 1.5 * max(found.smoothed[: 1 + len(found.smoothed) // 2]))
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return figure


def report(found: RangeTest) -> str:
    """Returns the smoothed loss at some rates and the suggestion, in words."""
    num = len(found.rates)
    shown = sorted({round(i * (num - 1) / 9) for i in range(10)})
    lines = ["learning rate  loss, running mean"]
    lines += [f"{found.rates[i]:13.1e}  {found.smoothed[i]:18.4f}" for i in shown]
    if found.suggestion is None:
        return "\n".join([*lines, "the loss does not fall: try a smaller --low"])
    return "\n".join(
        [*lines, f"falls fastest at {found.suggestion:.1e}: optimizer.lr={found.suggestion:.1e}"]
    )


@reported()
def main() -> None:
    """The command: `python -m fashionnet.lr_find`."""
    parser = Parser("lr_find", __doc__)
    parser.add_argument("overrides", metavar="OVERRIDE", nargs="*")
    parser.add_argument("--low", type=float, default=LOW, metavar="LR", help=f"default: {LOW:g}")
    parser.add_argument("--high", type=float, default=HIGH, metavar="LR", help=f"default: {HIGH:g}")
    parser.add_argument("--steps", type=int, default=STEPS, metavar="N", help=f"default: {STEPS}")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw it: .png or .svg")
    parser.add_argument("--json", action="store_true", help="print JSON, full precision")
    given = parser.parse_intermixed_args()
    if given.plot is not None:
        plots.check(given.plot, *plots.FORMATS)
    found = lr_find(*given.overrides, low=given.low, high=given.high, steps=given.steps)
    if given.plot is not None:
        plots.write(draw(found), given.plot)
    print(json.dumps(asdict(found)) if given.json else report(found))


if __name__ == "__main__":
    main()
