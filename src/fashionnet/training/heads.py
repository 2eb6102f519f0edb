"""Fits a fresh head before its backbone is trained, so that the head's errors do not spoil it.

Keras' guide to transfer learning: train the new top layers with the base frozen, then unfreeze.
"""

from __future__ import annotations

import logging
from dataclasses import asdict
from typing import Any

from torch import nn

from fashionnet.config.schema import FineTuningConfig
from fashionnet.data.examples import Examples
from fashionnet.errors import UserError
from fashionnet.models.transfer import Transfer
from fashionnet.models.weights import snapshot
from fashionnet.training import evaluation, features, gradients, loop
from fashionnet.training.early_stopping import EarlyStopping
from fashionnet.training.metrics import Metrics
from fashionnet.training.optim import Adam
from fashionnet.training.state import TrainState

log = logging.getLogger(__name__)


def check(model: nn.Module, fine_tuning: FineTuningConfig) -> None:
    """Refuses keys of `fine_tuning` for a model without a backbone.

    Raises:
        UserError: with the key.
    """
    default = vars(FineTuningConfig())
    given = [key for key, value in vars(fine_tuning).items() if value != default[key]]
    if given and not isinstance(model, Transfer):
        raise UserError(
            f"fine_tuning.{given[0]} is for a pretrained backbone, and {type(model).__qualname__} "
            "has none; leave it out, or use model=resnet18"
        )


def fit_first(
    fit: TrainState,
    train: Examples,
    validation: Examples,
    fine_tuning: FineTuningConfig,
    stop: Any = None,
) -> dict[str, Any] | None:
    """Fits the head alone to the features of the untouched backbone, for `head_epochs`.

    With early stopping's `restore_best_weights`, these weights come back at the end unless an epoch
    of fine-tuning is better on the validation set.

    This first fit minimizes plain cross-entropy, also with smoothed labels or class weights.

    Returns:
        Epochs and validation figures of the head, for the record; None where there is nothing to
        fit first, or where the fit continues from a checkpoint.

    Raises:
        UserError: as `loop.fit`.
        Interrupted: a signal stopped the fit; the next start fits the head anew.
    """
    model = fit.model
    epochs = fine_tuning.head_epochs
    if not epochs or (fit.epoch, fit.step) != (1, 0) or not isinstance(model, Transfer):
        return None
    if model.is_head_only or model.pretrained is None:
        return None
    inputs, held_out = (features.extract(model, part, fit.scale) for part in (train, validation))
    restore = EarlyStopping(restore_best_weights=len(validation) > 0)
    head = TrainState(
        model.head,
        Adam(model.head.parameters(), lr=fine_tuning.head_lr),
        gradients.choose("autograd", model.head),
        restore,
        fit.seed,
        fit.batch_size,
        fit.scale,
    )
    loop.fit(head, inputs, held_out, epochs, loop.Watcher(stop))
    found: dict[str, Any] = {"epochs": epochs}
    if len(validation):
        metrics = evaluation.evaluate(model.head, held_out, fit.scale)
        found |= asdict(metrics)
        _set_mark(fit, metrics)
        log.info("head alone: val_loss %.4f  val_accuracy %.4f", metrics.loss, metrics.accuracy)
    return found


def _set_mark(fit: TrainState, metrics: Metrics) -> None:
    """Makes the head's figure and weights the best so far, for early stopping."""
    stopping = fit.early_stopping
    if stopping.restore_best_weights and stopping.monitor.startswith("val_"):
        stopping.best = asdict(metrics)[stopping.monitor.removeprefix("val_")]
        stopping.best_weights = snapshot(fit.model)
