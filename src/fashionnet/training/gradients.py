"""From a batch to `parameter.grad`: autograd for any model, by hand for a plain MLP, and shared.

All are called `gradients(x, labels, mix) -> logits` and leave the gradient of the batch's mean loss
in `parameter.grad`; the loop does not know which it has. The one by hand takes the same masks, does
the same arithmetic in the same order and agrees to rounding; it is faster because it builds no
graph and writes into buffers that it keeps.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fashionnet.errors import UserError
from fashionnet.models.layers import dropouts
from fashionnet.models.transfer import Transfer
from fashionnet.system import devices, processes
from fashionnet.system.rows import Rows
from fashionnet.training import evaluation
from fashionnet.training.augmentation import Mix
from fashionnet.training.by_hand import ByHand
from fashionnet.training.objective import Objective

CHOICES = ("auto", "autograd", "by_hand")


class Autograd:
    """Forward, loss and backward of any model by torch's autograd.

    Attributes:
        losses: of the last batch, float (N,); None where they are the cross-entropy of the logits.
    """

    losses: Tensor | None = None
    mode: Callable[[], AbstractContextManager[object]] = nullcontext

    def __init__(self, model: nn.Module, objective: Objective | None = None) -> None:
        self._model = model
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._objective = objective or Objective(model)
        # Whether it minimizes cross-entropy in full precision.
        self.is_plain = self._objective.is_cross_entropy and devices.precision() == "float32"

    def __call__(self, x: Tensor, labels: Tensor, mix: Mix | None = None) -> Tensor:
        """Returns the detached logits of `x`, float (N, C); labels are int64 (N,)."""
        logits = evaluation.forward(self._model, x)
        loss, self.losses = self._objective(logits, labels, mix)
        gradients = torch.autograd.grad(loss, self._parameters, allow_unused=True)
        for parameter, gradient in zip(self._parameters, gradients, strict=True):
            parameter.grad = gradient
        return logits.detach()


def unused_weights(name: str) -> UserError:
    """Returns the error for weights without a gradient, in a job of several processes."""
    return UserError(
        f"the model's {name} takes no part in its output, and several processes share the "
        "gradients of all weights or none: freeze it, or use one process"
    )


class _Called(nn.Module):
    """A model that, called with None, returns the sum of all that it trains.

    The first backward pass fixes the layout of the gradients that DistributedDataParallel sends,
    and with it the order in which those of three or more processes are added. That pass comes
    before the first step, so that a resumed run is bit-identical to an uninterrupted one.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor | None) -> Tensor:
        """Returns the model's output, or a scalar with a gradient for each trained parameter."""
        if x is None:
            return torch.stack(
                [p.sum().float() for p in self.parameters() if p.requires_grad]
            ).sum()
        output: Tensor = self.model(x)
        return output


def _changes_buffers(model: nn.Module) -> bool:
    """Returns whether training may change buffers of a model, e.g. means of a normalization."""
    model.train()  # layers that are frozen stay in evaluation mode
    return any(
        module.training and any(buffer is not None for buffer in module._buffers.values())
        for module in model.modules()
        if not isinstance(module, Transfer)  # its own are constants
    )


class Distributed:
    """The gradients of a global batch, of which each process computes its own rows.

    Each row's loss counts 1/N of the global batch of N. DistributedDataParallel averages the
    gradients over the P processes, so that a process with n rows minimizes

        loss = P · n / N · mean over its rows        average of d loss = d of the whole mean

    A process to which a short batch leaves no row computes the first one with weight 0. Batch
    normalization in training sees a process' own rows alone.

    Attributes:
        losses: as in `Autograd`, for the process' own rows.
    """

    losses: Tensor | None = None
    mode: Callable[[], AbstractContextManager[object]] = nullcontext

    def __init__(self, model: nn.Module, objective: Objective | None = None) -> None:
        # A filter of 1 x 1 has two names for the same layout, and torch warns of two layouts.
        warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
        # Views of the sent buffers save a copy of all gradients each way.
        self._parallel = DistributedDataParallel(_Called(model), gradient_as_bucket_view=True)
        # Set here because the argument has another name from torch 2.13 on.
        self._parallel.broadcast_buffers = _changes_buffers(model)
        self._parallel(None).backward()
        self._objective = objective or Objective(model)
        self._trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self._masks = [layer.masks for _, layer in dropouts(model)]

    def __call__(self, x: Tensor, labels: Tensor, mix: Mix | None = None) -> Tensor:
        """Returns the detached logits of this process' rows of a global batch (N, …)."""
        own = processes.own_rows(len(labels))
        num = own.stop - own.start
        taken = own if num else Rows(0, 1, own.total)
        for masks in self._masks:
            masks.rows = taken
        try:
            logits = evaluation.forward(self._parallel, x[taken.part])
        finally:
            for masks in self._masks:
                masks.rows = None
        mix = mix and Mix(mix.labels[taken.part], mix.fraction)
        mean, losses = self._objective(logits, labels[taken.part], mix)
        self.losses = losses if losses is None else losses[:num]
        loss = mean * (num * processes.world_size() / own.total)
        for _, parameter in self._trained:
            parameter.grad = None
        loss.backward()
        unused = [name for name, parameter in self._trained if parameter.grad is None]
        if unused:  # then nothing of their bucket was sent
            raise unused_weights(unused[0])
        return logits.detach()[:num]


def choose(
    choice: str, model: nn.Module, objective: Objective | None = None
) -> Autograd | ByHand | Distributed:
    """Returns the configured way: `auto` is by hand where model and objective allow it.

    Several processes share each batch by autograd.

    Args:
        choice: one of `CHOICES`.
        objective: what is minimized; None: the model's own loss, or cross-entropy.

    Raises:
        UserError: `by_hand` for a model or an objective that it does not support, or for several
            processes.
    """
    if processes.world_size() > 1:
        if choice == "by_hand":
            raise UserError("gradients=by_hand is for one process; several take autograd")
        return Distributed(model, objective)
    objective = objective or Objective(model)
    is_plain = objective.is_cross_entropy and devices.precision() == "float32"
    if choice == "by_hand" and not is_plain:
        raise UserError(
            f"gradients=by_hand computes plain cross-entropy in float32, and "
            f"{type(model).__qualname__} minimizes another loss; use gradients=autograd"
        )
    if choice == "by_hand" or (choice == "auto" and is_plain and ByHand.supports(model)):
        return ByHand(model)
    return Autograd(model, objective)
