"""Restoring a fit from a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fashionnet.errors import UserError, first_line, is_out_of_memory
from fashionnet.runs.checkpoint import MISFITS, Nullable, State, difference
from fashionnet.training.metrics import ExampleMetrics
from fashionnet.training.state import TrainState


def restore(fit: TrainState, state: State) -> None:
    """Puts a fresh fit back where a checkpoint found it.

    Raises:
        UserError: the checkpoint is of another model, optimizer or kind of device, or not of a fit.
    """
    here, there = fit.device.type, str(state.get("device"))[:20]
    if there != here:
        raise UserError(
            f"{state.path} does not fit this run: it is of a fit on {there}, whose random streams "
            f"cannot continue on {here}; use device={there} where there is one, or overwrite=true "
            "to start the run anew"
        )
    try:
        problem = difference(state, _form_of(fit, state)) or _impossible(state)
        if problem is None:
            fit.load_state_dict(state)
    except LookupError as error:
        problem = f"{error} is missing there"
    except MISFITS as error:
        if is_out_of_memory(error):
            raise
        problem = first_line(error)
    if problem is not None:
        raise UserError(
            f"{state.path} does not fit this run: {problem}; overwrite=true starts the run anew"
        )


def _form_of(fit: TrainState, state: State) -> dict[str, Any]:
    """Returns a state like that of `fit` once it is under way."""
    form = fit.state_dict()
    for part in (form, form["early_stopping"]):
        for key in [key for key, value in part.items() if value is None]:
            is_weights = key in ("best_weights", "unrestored")
            part[key] = Nullable(form["model"] if is_weights else 0.0)
    form["history"] = [_row_form(row) for row in state["history"]]
    form["weight_hashes"] = [""] * len(form["history"])
    form["generators"]["python"]["gauss"] = Nullable(0.0)
    form["figures"] = _figures_form(fit, state)
    optimizer = form["optimizer"]
    if optimizer.get("state") == {}:  # torch's optimizers make theirs at their first step
        _step_nowhere(fit)
        made, found = fit.optimizer.state_dict()["state"], state["optimizer"]["state"]
        optimizer["state"] = {key: made[key] for key in made if key in found}
    return form


def _figures_form(fit: TrainState, state: State) -> Tensor | None:
    """Returns the form of the figures of an epoch's steps, the last of which may be short."""
    found, done = state["figures"], state["step"] * fit.batch_size
    if not done:
        return None
    num = found.shape[-1] if isinstance(found, Tensor) and found.ndim else 0
    is_possible = done - fit.batch_size < num <= done
    return ExampleMetrics(num if is_possible else done, next(fit.model.parameters())).first(done)


def _row_form(row: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the form of an epoch's line in the history: figures, those of Keras among them."""
    names = ["loss", "accuracy", "lr", "epoch_seconds"]
    names += ["val_loss", "val_accuracy"] if "val_loss" in row else []
    return {"epoch": 0} | dict.fromkeys([*names, *row.keys() - {"epoch"}], 0.0)


def _step_nowhere(fit: TrainState) -> None:
    """Steps along gradients of zero; what that changes, the checkpoint is to overwrite."""
    parameters = [p for group in fit.optimizer.param_groups for p in group["params"]]
    gradients = [parameter.grad for parameter in parameters]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    fit.optimizer.step()
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient


def _impossible(state: State) -> str | None:
    """Returns what no fit can have come to, in a state of the right form; None if nothing."""
    if not (1 <= state["epoch"] == len(state["history"]) + 1 and state["step"] >= 0):
        return "its epoch is not the one after its history"
    if not 0 <= state["generators"]["numpy"]["position"] <= 624:  # NumPy would read beyond
        return "its generators stand nowhere"
    return None
