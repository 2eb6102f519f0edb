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
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fashionnet import ranks
from fashionnet.errors import UserError
from fashionnet.models import Dropout, dropouts
from fashionnet.ranks import Rows
from fashionnet.transfer import Transfer

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
        logits: Tensor = self._model(x)
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
        own = ranks.own_rows(len(labels))
        num = own.stop - own.start
        taken = own if num else Rows(0, 1, own.of)
        for part in self._cuts:
            part.rows = taken
        try:
            logits: Tensor = self._parallel(x[taken.part])
        finally:
            for part in self._cuts:
                part.rows = None
        mean, losses = self._loss(logits, labels[taken.part])
        self.losses = losses if losses is None else losses[:num]
        loss = mean * (num * ranks.count() / own.of)
        for _, parameter in self._trained:
            parameter.grad = None
        loss.backward()
        unused = [name for name, parameter in self._trained if parameter.grad is None]
        if unused:  # of what was to be sent with them nothing was
            raise unused_weights(unused[0])
        return logits.detach()[:num]


@dataclass
class _Layer:
    """A Linear layer with what follows it, and the buffers of one batch size."""

    weight: Tensor  # (out, in)
    weight_t: Tensor  # its view as (in, out)
    bias: Tensor  # (out,)
    weight_grad: Tensor
    bias_grad: Tensor
    dropout: Dropout | None
    output: Tensor  # (N, out)
    delta: Tensor  # (N, out), the gradient of the loss by the layer's output before ReLU
    delta_t: Tensor  # its view as (out, N)


class ByHand:
    """The gradients of Flatten → (Linear → ReLU → Dropout?)* → Linear, written out.

    With h the input of the last layer, z = h Wᵀ + b its logits and p = softmax(z):

        δ = (p - onehot(labels)) / N        dW = δᵀ h        db = Σ δ over the batch
        δ' = (δ W) · [h > 0] / keep         and so on, a layer down

    A unit's [h > 0] is 0 where ReLU or dropout silenced it, so one comparison does for both.
    """

    losses: Tensor | None = None  # such a model has none of its own
    mode: Callable[[], AbstractContextManager[object]] = torch.inference_mode

    def __init__(self, model: nn.Module) -> None:
        self._stack = _dense_stack(model)
        if not self._stack:
            raise UserError(
                "gradients=by_hand needs a plain stack of Flatten, Linear, ReLU and Dropout; "
                "use gradients=autograd for this model"
            )
        for linear, _ in self._stack:
            linear.weight.grad = torch.zeros_like(linear.weight)
            linear.bias.grad = torch.zeros_like(linear.bias)
        self._buffers: dict[int, tuple[list[_Layer], Tensor]] = {}

    @staticmethod
    def supports(model: nn.Module) -> bool:
        """Returns whether `model` is such a stack, with every parameter trained."""
        return bool(_dense_stack(model))

    def __call__(self, x: Tensor, labels: Tensor) -> Tensor:
        """Returns the logits of `x`, float (N, C); labels are int64 (N,)."""
        num = len(labels)
        layers, minus_one_hot = self._buffers.get(num) or self._make_buffers(num)
        inputs = [x.view(num, -1)]
        for layer in layers[:-1]:
            output = torch.addmm(layer.bias, inputs[-1], layer.weight_t, out=layer.output)
            output.relu_()
            if layer.dropout is not None:
                output.mul_(layer.dropout.masks.next(output))
            inputs.append(output)
        last = layers[-1]
        logits = torch.addmm(last.bias, inputs[-1], last.weight_t)
        torch.softmax(logits, 1, out=last.delta)
        minus_targets = minus_one_hot.index_select(0, labels)
        torch.add(minus_targets, last.delta, alpha=1 / num, out=last.delta)
        for depth in range(len(layers) - 1, -1, -1):
            layer = layers[depth]
            torch.mm(layer.delta_t, inputs[depth], out=layer.weight_grad)
            torch.sum(layer.delta, 0, out=layer.bias_grad)
            if depth:
                below = layers[depth - 1]
                keep = below.dropout.keep if below.dropout is not None else 1.0
                torch.addmm(
                    below.delta, layer.delta, layer.weight, beta=0, alpha=1 / keep, out=below.delta
                )
                _relu_backward(below.delta, below.output, 0, grad_input=below.delta)
        return logits

    def _make_buffers(self, num: int) -> tuple[list[_Layer], Tensor]:
        """Makes what batches of `num` need; a fit has two sizes at the most.

        Returns:
            The layers' buffers, and -1/num times each class' one-hot vector, (C, C).
        """
        layers = []
        for linear, dropout in self._stack:
            assert linear.weight.grad is not None and linear.bias.grad is not None
            weight = linear.weight.detach()
            output = weight.new_empty((num, linear.out_features))
            delta = torch.empty_like(output)
            layers.append(
                _Layer(
                    weight=weight,
                    weight_t=weight.t(),
                    bias=linear.bias.detach(),
                    weight_grad=linear.weight.grad,
                    bias_grad=linear.bias.grad,
                    dropout=dropout,
                    output=output,
                    delta=delta,
                    delta_t=delta.t(),
                )
            )
        last = layers[-1].bias
        self._buffers[num] = layers, torch.eye(len(last), dtype=last.dtype).to(last) / -num
        return self._buffers[num]


_relu_backward = torch.ops.aten.threshold_backward.grad_input


def _dense_stack(model: nn.Module) -> list[tuple[nn.Linear, Dropout | None]]:
    """Returns each Linear of a plain dense stack with the Dropout behind it; else []."""
    modules = list(model) if isinstance(model, nn.Sequential) else []
    if not modules or not _flattens(modules[0]) or _is_altered(model):
        return []
    stack: list[tuple[nn.Linear, Dropout | None]] = []
    rest = modules[1:]
    while rest:
        linear, rest = rest[0], rest[1:]
        if type(linear) is not nn.Linear or linear.bias is None:
            return []
        if rest and type(rest[0]) is not nn.ReLU:
            return []
        dropout = rest[1] if len(rest) > 1 and type(rest[1]) is Dropout else None
        stack.append((linear, dropout))
        if not rest:
            shared = len(list(model.parameters())) < 2 * len(stack)
            return [] if shared else stack
        rest = rest[1 if dropout is None else 2 :]
    return []  # a ReLU or Dropout behind the last Linear


def _flattens(module: nn.Module) -> bool:
    """Returns whether a module is a Flatten of all but the batch."""
    return type(module) is nn.Flatten and (module.start_dim, module.end_dim) == (1, -1)


def _is_altered(model: nn.Module) -> bool:
    """Returns whether an own forward, hooks or frozen weights make it more than its layers."""
    own = type(model).forward is not nn.Sequential.forward or "forward" in vars(model)
    frozen = any(not parameter.requires_grad for parameter in model.parameters())
    hooked = any(parameter._backward_hooks for parameter in model.parameters()) or any(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        for module in model.modules()
    )
    return own or frozen or hooked


def choose(choice: str, model: nn.Module) -> Autograd | ByHand | Distributed:
    """Returns the configured way: `auto` is by hand where the model allows it.

    Several processes share each batch by autograd.

    Raises:
        UserError: `by_hand` for a model it cannot do, or for several processes.
    """
    if ranks.count() > 1:
        if choice == "by_hand":
            raise UserError("gradients=by_hand is for one process; several take autograd")
        return Distributed(model)
    if choice == "by_hand" or (choice == "auto" and ByHand.supports(model)):
        return ByHand(model)
    return Autograd(model)
