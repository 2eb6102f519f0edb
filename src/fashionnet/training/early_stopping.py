"""Early stopping with the semantics of keras.callbacks.EarlyStopping (Keras 3)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from fashionnet.errors import UserError
from fashionnet.models.weights import snapshot


@dataclass
class EarlyStopping:
    """Counts the epochs since the monitored figure last improved, and says when to stop.

    An epoch improves if it beats the best so far by more than `min_delta`. Training stops at the
    end of the epoch at which `patience` epochs in a row have not improved; one that improves but
    does not beat `baseline` counts with them. With `restore_best_weights` the weights of the best
    epoch are put back at the end, however training ended. `patience=None` turns stopping off.

    Args:
        mode: whether less is better (`min`) or more (`max`); `auto` knows it by the monitor.
        baseline: what the monitored figure must beat, or None.
        start_from_epoch: epochs that pass before the first that is looked at.

    Source: keras.callbacks.EarlyStopping of Keras 3.
    """

    monitor: str = "val_loss"
    patience: int | None = None
    min_delta: float = 0.0
    restore_best_weights: bool = False
    mode: str = "auto"
    baseline: float | None = None
    start_from_epoch: int = 0
    wait: int = 0
    best: float | None = None
    best_weights: dict[str, Tensor] | None = field(default=None, repr=False)

    def stops_after(self, epoch: int, figures: Mapping[str, float], model: nn.Module) -> bool:
        """Takes in the figures of 1-based `epoch`; returns whether training should stop.

        Raises:
            UserError: the monitored figure is not among `figures`.
        """
        if self.patience is None and not self.restore_best_weights:
            return False
        if self.monitor not in figures:
            raise UserError(
                f"early_stopping.monitor={self.monitor} is not measured in this run; "
                f"it measures {', '.join(figures)}"
            )
        current = figures[self.monitor]
        if epoch <= self.start_from_epoch:
            return False
        self.wait += 1
        if self._improves(current, self.best):
            self.best = current
            if self.restore_best_weights:
                self.best_weights = snapshot(model)
            if self._improves(current, self.baseline):
                self.wait = 0
            return False
        # Keras never stops at its first epoch, for any patience.
        return self.patience is not None and self.wait >= self.patience and epoch > 1

    def restore(self, model: nn.Module) -> bool:
        """Puts the best epoch's weights back if that is asked for; returns whether it did."""
        if not self.restore_best_weights or self.best_weights is None:
            return False
        model.load_state_dict(self.best_weights)
        return True

    def _improves(self, current: float, reference: float | None) -> bool:
        return is_improvement(current, reference, self.monitor, self.min_delta, self.mode)

    def state_dict(self) -> dict[str, Any]:
        """Returns `wait`, `best` and the best weights, for a checkpoint."""
        return {"wait": self.wait, "best": self.best, "best_weights": self.best_weights}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Puts back what `state_dict` returned."""
        self.wait, self.best = state["wait"], state["best"]
        self.best_weights = state["best_weights"]


def is_better(loss: float, best: float | None) -> bool:
    """Returns whether `loss` is the lowest yet; nan never is."""
    return not math.isnan(loss) and (best is None or loss < best)


def is_improvement(
    current: float, best: float | None, monitor: str, min_delta: float, mode: str = "auto"
) -> bool:
    """Returns whether a figure beats the best so far by more than `min_delta`, as Keras judges.

    Args:
        monitor: the figure's name; with mode `auto`, an accuracy is better if it is higher.
        mode: `min`, `max` or `auto`.
    """
    if best is None:
        return True
    if mode == "max" or (mode == "auto" and monitor.endswith("accuracy")):
        return current - abs(min_delta) > best
    return current + abs(min_delta) < best
