"""Learning-rate schedules, as functions of the fraction of the training that is done.

A schedule maps a fraction f to a factor of every learning rate. At step t of T, f is (t - 1) / T:
0 at the first step, below 1 at the last. A schedule never counts steps, so that it fits a training
of any length. A schedule of a user's own is any function of f; if it has `depends_on_length =
False`, a completed run may be continued by more epochs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fashionnet.config import targets
from fashionnet.config.schema import Range
from fashionnet.errors import UserError, shortened
from fashionnet.training.early_stopping import is_improvement

if TYPE_CHECKING:
    from fashionnet.training.optim import Optimizer

Schedule = Callable[[float], float]

_WARMUP_START = 0.01  # the factor of the first step, which must not be 0


class Constant:
    """The optimizer's own learning rate.

    Args:
        warmup: fraction of the training over which the rate grows linearly to its full value.
    """

    def __init__(self, warmup: float = 0.0) -> None:
        self.warmup = _fraction("warmup", warmup)

    @property
    def depends_on_length(self) -> bool:
        """Whether more epochs change the rates of the steps before."""
        return self.warmup > 0

    def __call__(self, fraction: float) -> float:
        """Returns the factor of the learning rate, in 0..1, at a fraction of the training."""
        if fraction < self.warmup:
            return _WARMUP_START + (1 - _WARMUP_START) * fraction / self.warmup
        return self._after_warmup((fraction - self.warmup) / (1 - self.warmup))

    def _after_warmup(self, progress: float) -> float:
        """Returns the factor after the warm-up; `progress` grows from 0 to 1 over the rest."""
        return 1.0


class Cosine(Constant):
    """Falls from the full learning rate to 0 along half a cosine.

    Args:
        warmup: as in `Constant`.

    Source: Loshchilov & Hutter 2017, "SGDR"; keras.optimizers.schedules.CosineDecay.
    """

    depends_on_length = True

    def _after_warmup(self, progress: float) -> float:
        return 0.5 * (1 + math.cos(math.pi * progress))


class OneCycle:
    """Grows to the full learning rate and falls nearly to 0, each along a cosine or a line.

    Args:
        warmup: fraction of the training at which the rate is highest.
        start: the factor at the beginning.
        end: the factor at the end.
        anneal: "cosine" or "linear".

    Source: Smith & Topin 2019, "Super-Convergence", with the shape of torch's OneCycleLR.
    """

    depends_on_length = True

    def __init__(
        self,
        warmup: float = 0.3,
        start: float = 0.04,
        end: float = 4e-6,
        anneal: str = "cosine",
    ) -> None:
        self.warmup = _fraction("warmup", warmup)
        self.start = _number("start", start, 0, 1, is_low_open=True)
        self.end = _number("end", end, 0, 1)
        if anneal not in ("cosine", "linear"):
            raise UserError(f"schedule.anneal={shortened(anneal)} must be cosine or linear")
        self.anneal = anneal

    def __call__(self, fraction: float) -> float:
        """Returns the factor of the learning rate, in 0..1, at a fraction of the training."""
        if fraction < self.warmup:
            return self._between(self.start, 1.0, fraction / self.warmup)
        return self._between(1.0, self.end, (fraction - self.warmup) / (1 - self.warmup))

    def _between(self, start: float, end: float, progress: float) -> float:
        if self.anneal == "linear":
            return start + (end - start) * progress
        return end + (start - end) * 0.5 * (1 + math.cos(math.pi * progress))


class Step(Constant):
    """Multiplies the learning rate by a factor at certain fractions of the training.

    Args:
        at: the fractions, in ascending order.
        factor: by which the rate is multiplied at each.
        warmup: as in `Constant`.
    """

    depends_on_length = True

    def __init__(
        self, at: Sequence[float] = (0.5, 0.75), factor: float = 0.1, warmup: float = 0.0
    ) -> None:
        super().__init__(warmup)
        fractions = list(at) if isinstance(at, list | tuple) else [at]
        self.at = [_number("at", each, 0, 1, is_low_open=True) for each in fractions]
        if self.at != sorted(self.at):
            raise UserError(f"schedule.at={shortened(self.at)} must be in ascending order")
        self.factor = _number("factor", factor, 0, 1, is_low_open=True)

    def __call__(self, fraction: float) -> float:
        """Returns the factor of the learning rate, in 0..1, at a fraction of the training."""
        return super().__call__(fraction) * self.factor ** sum(fraction >= at for at in self.at)


class Plateau:
    """Multiplies the learning rate by a factor when a figure has stopped improving.

    The only schedule with a state: it looks at the figures of each epoch.

    Args:
        monitor: loss, accuracy, val_loss or val_accuracy.
        factor: by which the rate is multiplied.
        patience: epochs without improvement before that.
        min_delta: what counts as an improvement.
        cooldown: epochs after a reduction in which nothing is counted.
        min_lr: below which the rate of the optimizer's first group does not fall.

    Source: keras.callbacks.ReduceLROnPlateau.
    """

    depends_on_length = False

    def __init__(
        self,
        monitor: str = "val_loss",
        factor: float = 0.1,
        patience: int = 10,
        min_delta: float = 1e-4,
        cooldown: int = 0,
        min_lr: float = 0.0,
    ) -> None:
        if monitor not in ("loss", "accuracy", "val_loss", "val_accuracy"):
            raise UserError(
                f"schedule.monitor={shortened(monitor)} is not known; choose loss, accuracy, "
                "val_loss or val_accuracy"
            )
        self.monitor = monitor
        self.factor = _number("factor", factor, 0, 1, is_low_open=True)
        self.patience = _count("patience", patience)
        self.min_delta = _number("min_delta", min_delta, 0, 1e38)
        self.cooldown = _count("cooldown", cooldown)
        self.min_lr = _number("min_lr", min_lr, 0, 1e38)
        self._reduction = 1.0
        self._best: float | None = None
        self._wait = self._cooling = 0

    def __call__(self, fraction: float) -> float:
        """Returns the product of all reductions so far, in 0..1."""
        return self._reduction

    def after_epoch(self, figures: Mapping[str, float], lr: float) -> None:
        """Takes in the figures of an epoch.

        Args:
            lr: the first group's learning rate before any reduction.

        Raises:
            UserError: the monitored figure is not among them.
        """
        if self.monitor not in figures:
            raise UserError(
                f"schedule.monitor={self.monitor} is not measured in this run; it measures "
                f"{', '.join(figures)}"
            )
        if self._cooling:
            self._cooling, self._wait = self._cooling - 1, 0
        current = figures[self.monitor]
        if is_improvement(current, self._best, self.monitor, self.min_delta):
            self._best, self._wait = current, 0
        elif not self._cooling:
            self._wait += 1
            if self._wait >= self.patience and lr * self._reduction > self.min_lr:
                self._reduction = max(self._reduction * self.factor, self.min_lr / lr)
                self._cooling, self._wait = self.cooldown, 0

    def state_dict(self) -> dict[str, Any]:
        """Returns what `after_epoch` changes, for a checkpoint."""
        state = {"reduction": self._reduction, "best": self._best}
        return {**state, "wait": self._wait, "cooling": self._cooling}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what `state_dict` returned."""
        self._reduction, self._best = state["reduction"], state["best"]
        self._wait, self._cooling = state["wait"], state["cooling"]


class LearningRate:
    """Sets the learning rates of an optimizer along a schedule.

    Args:
        schedule: from the fraction of the training done to a factor of every rate.
    """

    def __init__(self, optimizer: Optimizer, schedule: Schedule) -> None:
        self.schedule = schedule
        self._groups = optimizer.param_groups
        self._initial = [float(group["lr"]) for group in self._groups if "lr" in group]
        # A constant rate is left to the optimizer, which some set themselves.
        self._is_constant = type(schedule) is Constant and not schedule.warmup

    @property
    def current(self) -> float:
        """The rate of the first group at the last step."""
        return float(self._groups[0]["lr"])

    def set(self, fraction: float) -> None:
        """Sets the rates of the step that begins at this fraction of the training."""
        if not self._is_constant:
            factor = self.schedule(fraction)
            for group, lr in zip(self._groups, self._initial, strict=True):
                group["lr"] = lr * factor

    def after_epoch(self, figures: Mapping[str, float]) -> None:
        """Passes an epoch's figures on to a schedule that looks at them."""
        if isinstance(self.schedule, Plateau):
            self.schedule.after_epoch(figures, self._initial[0])

    def state_dict(self) -> dict[str, Any]:
        """Returns the schedule's state, for a checkpoint; {} where it has none."""
        return self.schedule.state_dict() if isinstance(self.schedule, Plateau) else {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what `state_dict` returned."""
        if isinstance(self.schedule, Plateau):
            self.schedule.load_state_dict(state)


def build(node: Mapping[str, Any]) -> Schedule:
    """Builds the configured schedule.

    Raises:
        UserError: it is not on the allow-list, refuses its arguments, or is not a function.
    """
    schedule: Schedule = targets.build(node, "schedule")
    if not callable(schedule):
        raise UserError(
            f"schedule._target_={node['_target_']} built something that is not callable"
        )
    return schedule


def depends_on_length(schedule: Schedule) -> bool:
    """Returns whether a longer training would have had other rates from the start."""
    return bool(getattr(schedule, "depends_on_length", True))


def _fraction(key: str, value: Any) -> float:
    return _number(key, value, 0, 1, is_high_open=True)


def _count(key: str, value: Any) -> int:
    if type(value) is not int or value < 0:
        raise UserError(f"schedule.{key}={shortened(value)} must be 0 or more epochs")
    return value


def _number(
    key: str,
    value: Any,
    low: float,
    high: float,
    is_low_open: bool = False,
    is_high_open: bool = False,
) -> float:
    must = Range(low, high, is_low_open, is_high_open).refusal(value)
    if must is not None:
        raise UserError(f"schedule.{key}={shortened(value)} {must}")
    return float(value)
