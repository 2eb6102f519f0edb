"""Finds what a network cannot process before the first step, by passes that change nothing."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from fashionnet.data.examples import Examples
from fashionnet.errors import UserError, first_line, is_out_of_memory
from fashionnet.models import layers
from fashionnet.models.transfer import Transfer
from fashionnet.system import processes, seeds
from fashionnet.training import evaluation, gradients
from fashionnet.training.evaluation import dtype_of, scaled
from fashionnet.training.objective import Objective
from fashionnet.training.state import TrainState

# Two pictures stand for a batch of more numbers than this: a pass of large ones takes as long as
# a step, and only a batch of one is special, to batch normalization.
_MOST_NUMBERS = 2**20
# Faults of a program, which keep their traceback.
_FAULTS = (NameError, AttributeError, ImportError)


def check(fit: TrainState, train: Examples, num_classes: int) -> None:
    """Passes pictures through a network as an evaluation and an epoch's first and last step do.

    The network, its batch statistics and all random generators stay as they are.

    Args:
        fit: a fit that is about to start.
        train: examples that it trains on, on any device.

    Raises:
        UserError: the network refuses a batch, or does not return finite logits of the classes; the
            message names the key to change.
    """
    num, batch_size = len(train), fit.batch_size
    first, last = min(batch_size, num), num % batch_size
    with _unchanged(fit.model, fit.device):
        fit.model.eval()
        _pass(fit, train, 1, num_classes)
        fit.model.train()
        for _, layer in layers.dropouts(fit.model):
            layer.training = False  # its masks are the fit's own
        sizes = {rows: _rows(rows, train) for rows in (first, last) if rows}
        try:
            _pass(fit, train, sizes[first], num_classes)
        except _Misfit as misfit:
            if sizes[first] > 1:
                raise
            raise UserError(
                f"batch_size={batch_size} and {num} training pictures make batches of which a "
                f"process gets one picture, and the network cannot take that ({misfit.reason}); "
                f"use batch_size={2 * processes.world_size()} or more"
            ) from misfit
        if last and sizes[last] != sizes[first]:
            try:
                _pass(fit, train, sizes[last], num_classes)
            except _Misfit as misfit:
                raise _last_batch(fit, num, misfit) from misfit


class _Misfit(UserError):
    """A batch that a network refuses; `reason` is the network's own message."""

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


def _rows(batch: int, train: Examples) -> int:
    """Returns how many pictures stand for the smallest part of a batch that a process gets."""
    rows = max(1, batch // processes.world_size())
    return rows if rows * train.images[0].numel() <= _MOST_NUMBERS else min(rows, 2)


def _pass(fit: TrainState, train: Examples, num: int, num_classes: int) -> None:
    """Passes `num` pictures through the network in its present mode; in training, also backward."""
    model = fit.model
    at = torch.arange(num) % len(train)
    images = train.images[at.to(train.images.device)].to(fit.device)
    labels = train.labels[at.to(train.labels.device)].to(fit.device)
    x = scaled(images, fit.scale, torch.empty_like(images, dtype=dtype_of(model)))
    with torch.set_grad_enabled(model.training):
        with _explained(model, x):
            logits = evaluation.forward(model, x)
        _check_logits(model, logits, num, num_classes)
        if not model.training:
            return
        with _explained(model, x):
            loss, own = Objective(model)(logits, labels)
            trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
            found = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
        unused = [name for name, each in zip(trained, found, strict=True) if each is None]
        if unused and processes.world_size() > 1:
            raise gradients.unused_weights(unused[0])
    if own is not None and not bool(torch.isfinite(own).all()):
        raise UserError(f"the loss of {_name(model)} is nan or infinite before the first step")


@contextlib.contextmanager
def _explained(model: nn.Module, x: Tensor) -> Iterator[None]:
    """Turns what a network raises about a batch into a user error; a program's faults stay."""
    try:
        yield
    except Exception as error:
        if isinstance(error, (UserError, *_FAULTS)) or is_out_of_memory(error):
            raise
        reason = first_line(error)[:200]
        if isinstance(model, Transfer):
            said = str(model.misfit(x.shape[-1], error))
        else:
            said = f"{_name(model)} cannot take a batch of the shape {tuple(x.shape)}: {reason}"
        raise _Misfit(said, reason) from error


def _check_logits(model: nn.Module, logits: object, num: int, num_classes: int) -> None:
    if not isinstance(logits, Tensor):
        raise UserError(
            f"{_name(model)} returns a {type(logits).__name__}, and logits are needed: a tensor of "
            f"the shape (pictures, classes), here ({num}, {num_classes})"
        )
    if logits.shape != (num, num_classes) or not logits.is_floating_point():
        kind = str(logits.dtype).removeprefix("torch.")
        raise UserError(
            f"{_name(model)} returns {kind} {tuple(logits.shape)} for {num} pictures, and float "
            f"logits of {num_classes} classes are needed: ({num}, {num_classes}); a class whose "
            "constructor has num_classes gets that number"
        )
    if not bool(torch.isfinite(logits).all()):
        raise UserError(
            f"{_name(model)} gives nan or infinite logits before the first step; look at its "
            "initial weights (model.pretrained), and at what pixels are divided by and normalized "
            "with (data.scale, model.mean, model.std)"
        )


def _last_batch(fit: TrainState, num: int, misfit: _Misfit) -> UserError:
    """Returns the error for a last batch that is too small for the network."""
    last = num % fit.batch_size
    is_pretrained = isinstance(fit.model, Transfer) and fit.model.pretrained is not None
    return UserError(
        f"the last batch of an epoch has {last} of the {num} training pictures, and the network "
        f"cannot take it ({misfit.reason}); use data.limit={num - last}, a batch_size other than "
        f"{fit.batch_size}{', or model.batch_norm=frozen' if is_pretrained else ''}"
    )


def _name(model: nn.Module) -> str:
    return f"the model {type(model).__module__}.{type(model).__qualname__}"


@contextlib.contextmanager
def _unchanged(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Restores a network's modes and buffers and the global generators after the body."""
    modes = [(module, module.training) for module in model.modules()]
    buffers = [
        (module, name, buffer, buffer.clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    generators = seeds.global_state(device)
    try:
        yield
    finally:
        seeds.load_global_state(generators, device)
        with torch.no_grad():
            for module, name, buffer, before in buffers:
                module._buffers[name] = buffer.copy_(before)
        for module, mode in modes:
            module.training = mode
        if device.type == "cuda":
            torch.cuda.empty_cache()
