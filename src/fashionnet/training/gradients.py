"""From a batch to `parameter.grad`: autograd for any model, by hand for a plain MLP, and shared.

All are called `gradients(x, labels) -> logits` and leave the gradient of the batch's mean loss in
`parameter.grad`, cross-entropy unless the model has a loss of its own; the loop does not know which
it has. The one by hand takes the same masks, does the same arithmetic in the same order and agrees
to rounding; it is faster because it builds no graph and writes into buffers that it keeps.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fashionnet.errors import UserError
from fashionnet.models.layers import dropouts
from fashionnet.models.transfer import Transfer
from fashionnet.system import devices, processes
from fashionnet.system.rows import Rows
from fashionnet.training import evaluation
from fashionnet.training.by_hand import ByHand

CHOICES = ("auto", "autograd", "by_hand")


class Autograd:
    """Forward, cross-entropy and backward of any model by torch's autograd.

    A model with a method `loss(logits, labels)` says itself what is minimized.

    Attributes:
        losses: the model's own losses of the last batch, float (N,); None where it has none, and
            they are the cross-entropy of the logits.
    """

    losses: Tensor | None = None
    mode: Callable[[], AbstractContextManager[object]] = nullcontext

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._loss = loss_of(model)

    def __call__(self, x: Tensor, labels: Tensor) -> Tensor:
        """Returns the detached logits of `x`, float (N, C); labels are int64 (N,)."""
        logits = evaluation.forward(self._model, x)
        loss, self.losses = self._loss(logits, labels)
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


def loss_of(model: nn.Module) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor | None]]:
    """Returns what computes the loss of a batch, from logits (N, C) and labels (N,).

    It returns the mean, which is minimized, and, where the model has a `loss(logits, labels)` of
    its own, the detached losses of the examples, (N,). A model's `loss` gives these, or their mean,
    which then counts for each example of the batch.
    """
    own: Any = getattr(model, "loss", None)
    if not callable(own):
        return lambda logits, labels: (F.cross_entropy(logits, labels), None)

    def loss(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        losses = own(logits, labels)
        is_tensor = isinstance(losses, Tensor) and losses.is_floating_point()
        if not is_tensor or losses.shape not in ((), labels.shape):
            found = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
            raise UserError(
                f"{type(model).__qualname__}.loss must return a float tensor with the loss of each "
                f"picture, here ({len(labels)},), or their mean, (); it returned {found}"
            )
        return losses.mean(), losses.detach().expand(len(labels))

    return loss


class _Called(nn.Module):
    """A model that can also be called with nothing, which only adds up all it trains.

    The first backward pass settles where each gradient lies in what DistributedDataParallel sends,
    and with that in which order three and more processes' are added. So that a run that goes on
    adds in the order of one that never stopped, that pass comes before the first step.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor | None) -> Tensor:
        """Returns the model's output, or a number with a gradient for each trained parameter."""
        if x is None:
            return torch.stack(
                [p.sum().float() for p in self.parameters() if p.requires_grad]
            ).sum()
        output: Tensor = self.model(x)
        return output


class Distributed:
    """The gradients of a global batch, of which each process computes its own rows.

    Each row's loss counts 1/N of the global batch of N, so that the gradients, which
    DistributedDataParallel averages over the P processes, are those of one process; of n rows:

        loss = P · n / N · mean over the process' rows        mean of d loss = d of the whole mean

    A process that a short batch leaves no row takes the first one, and counts it as nothing. Batch
    normalization in training sees a process' own rows alone.

    Attributes:
        losses: as `Autograd`, of the process' own rows.
    """

    losses: Tensor | None = None
    mode: Callable[[], AbstractContextManager[object]] = nullcontext

    def __init__(self, model: nn.Module) -> None:
        if any(m.cutmix and not m.is_head_only for m in model.modules() if isinstance(m, Transfer)):
            raise UserError("model.cutmix needs the pictures of a whole batch: use one process")
        # A filter of 1 x 1 has two names for the same layout, and torch warns of two layouts.
        warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
        # Views of what is sent save a copy of all gradients each way.
        self._parallel = DistributedDataParallel(_Called(model), gradient_as_bucket_view=True)
        self._parallel(None).backward()
        self._loss = loss_of(model)
        self._trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self._cuts: list[Any] = [layer.masks for _, layer in dropouts(model)]
        self._cuts += [module for module in model.modules() if isinstance(module, Transfer)]

    def __call__(self, x: Tensor, labels: Tensor) -> Tensor:
        """Returns the detached logits of this process' rows of a global batch (N, …)."""
        own = processes.own_rows(len(labels))
        num = own.stop - own.start
        taken = own if num else Rows(0, 1, own.total)
        for part in self._cuts:
            part.rows = taken
        try:
            logits = evaluation.forward(self._parallel, x[taken.part])
        finally:
            for part in self._cuts:
                part.rows = None
        mean, losses = self._loss(logits, labels[taken.part])
        self.losses = losses if losses is None else losses[:num]
        loss = mean * (num * processes.world_size() / own.total)
        for _, parameter in self._trained:
            parameter.grad = None
        loss.backward()
        unused = [name for name, parameter in self._trained if parameter.grad is None]
        if unused:  # of what was to be sent with them nothing was
            raise unused_weights(unused[0])
        return logits.detach()[:num]


def choose(choice: str, model: nn.Module) -> Autograd | ByHand | Distributed:
    """Returns the configured way: `auto` is by hand where the model allows it.

    Several processes share each batch by autograd.

    Raises:
        UserError: `by_hand` for a model it cannot do, or for several processes.
    """
    if processes.world_size() > 1:
        if choice == "by_hand":
            raise UserError("gradients=by_hand is for one process; several take autograd")
        return Distributed(model)
    may_choose = choice == "auto" and devices.precision() == "float32"
    if choice == "by_hand" or (may_choose and ByHand.supports(model)):
        return ByHand(model)
    return Autograd(model)
