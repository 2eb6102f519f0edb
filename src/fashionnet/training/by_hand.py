"""The gradients of a plain MLP, derived by hand.

It uses the same masks as autograd, does the same arithmetic in the same order, and agrees to
rounding. It is faster because it builds no graph and writes into buffers that it keeps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fashionnet.errors import UserError
from fashionnet.models.layers import Dropout


@dataclass
class _Layer:
    """A Linear layer of S networks with what follows it, and the buffers of one batch size."""

    weight: Tensor  # (S, out, in)
    weight_t: Tensor  # its view as (S, in, out)
    bias: Tensor  # (S, 1, out)
    weight_grad: Tensor
    bias_grad: Tensor  # (S, out)
    dropouts: list[Dropout]  # one a network, or none
    output: Tensor  # (S, N, out)
    outputs: tuple[Tensor, ...]  # its views as (N, out)
    delta: Tensor  # (S, N, out), the gradient of the loss by the layer's output before ReLU
    delta_t: Tensor  # its view as (S, out, N)


@dataclass
class _Stacked:
    """The parameters of a Linear layer of S networks in common memory, and their gradients."""

    weight: Tensor
    bias: Tensor
    weight_grad: Tensor
    bias_grad: Tensor
    dropouts: list[Dropout]


class ByHand:
    """The gradients of Flatten → (Linear → ReLU → Dropout?)* → Linear, written out.

    With h the input of the last layer, z = h Wᵀ + b its logits and p = softmax(z):

        δ = (p - onehot(labels)) / N        dW = δᵀ h        db = Σ δ over the batch
        δ' = (δ W) · [h > 0] / keep         and so on, a layer down

    A unit's [h > 0] is 0 where ReLU or dropout silenced it, so one comparison does for both.

    Several networks of the same shape may share each operation: S of them, each with its own
    parameters, batches and masks. Their parameters then lie in common memory.

    Args:
        models: the networks; one, as a rule.
    """

    losses: Tensor | None = None
    mode: Callable[[], AbstractContextManager[object]] = torch.inference_mode

    def __init__(self, *models: nn.Module) -> None:
        stacks = [_dense_stack(model) for model in models]
        if not all(stacks):
            raise UserError(
                "gradients=by_hand needs a plain stack of Flatten, Linear, ReLU and Dropout; "
                "use gradients=autograd for this model"
            )
        self._stack = [_stacked(layers) for layers in zip(*stacks, strict=True)]
        self._networks = len(models)
        self._buffers: dict[int, tuple[list[_Layer], Tensor, Tensor]] = {}

    @staticmethod
    def supports(model: nn.Module) -> bool:
        """Returns whether `model` is such a stack, with every parameter trained."""
        return bool(_dense_stack(model))

    def __call__(self, x: Tensor, labels: Tensor, mix: object = None) -> Tensor:
        """Computes the gradients of all networks, each of its own batch.

        Args:
            x: float (S·N, …), network after network.
            labels: int64 (S·N,).

        Returns:
            The logits, (S·N, C).
        """
        assert mix is None
        num = len(labels) // self._networks
        layers, minus_one_hot, errors = self._buffers.get(num) or self._make_buffers(num)
        inputs = [x.view(self._networks, num, -1)]
        for layer in layers[:-1]:
            output = torch.baddbmm(layer.bias, inputs[-1], layer.weight_t, out=layer.output)
            output.relu_()
            for dropout, own in zip(layer.dropouts, layer.outputs, strict=False):
                own.mul_(dropout.masks.next(own))
            inputs.append(output)
        last = layers[-1]
        logits = torch.baddbmm(last.bias, inputs[-1], last.weight_t)
        torch.softmax(logits, 2, out=last.delta)
        torch.add(minus_one_hot.index_select(0, labels), errors, alpha=1 / num, out=errors)
        for depth in range(len(layers) - 1, -1, -1):
            layer = layers[depth]
            torch.bmm(layer.delta_t, inputs[depth], out=layer.weight_grad)
            torch.sum(layer.delta, 1, out=layer.bias_grad)
            if depth:
                below = layers[depth - 1]
                scale = 1 / below.dropouts[0].keep if below.dropouts else 1.0
                torch.baddbmm(
                    below.delta, layer.delta, layer.weight, beta=0, alpha=scale, out=below.delta
                )
                _relu_backward(below.delta, below.output, 0, grad_input=below.delta)
        return logits.view_as(errors)

    def _make_buffers(self, num: int) -> tuple[list[_Layer], Tensor, Tensor]:
        """Makes what batches of `num` need; a fit has two sizes at the most.

        Returns:
            The layers' buffers, -1/num times each class' one-hot vector, (C, C), and a view of the
            last layer's delta, (S·N, C).
        """
        layers = []
        for part in self._stack:
            networks, width, _ = part.weight.shape
            output = part.weight.new_empty((networks, num, width))
            delta = torch.empty_like(output)
            layers.append(
                _Layer(
                    weight=part.weight,
                    weight_t=part.weight.transpose(1, 2),
                    bias=part.bias.unsqueeze(1),
                    weight_grad=part.weight_grad,
                    bias_grad=part.bias_grad,
                    dropouts=part.dropouts,
                    output=output,
                    outputs=output.unbind(0),
                    delta=delta,
                    delta_t=delta.transpose(1, 2),
                )
            )
        errors = layers[-1].delta.flatten(0, 1)
        classes = torch.eye(errors.shape[1], dtype=errors.dtype).to(errors)
        self._buffers[num] = layers, classes / -num, errors
        return self._buffers[num]


def _stacked(layers: Sequence[tuple[nn.Linear, Dropout | None]]) -> _Stacked:
    """Puts the parameters of a layer of several networks into common memory."""
    found = []
    for name in ("weight", "bias"):
        parameters = [getattr(linear, name) for linear, _ in layers]
        if len(parameters) == 1:
            common = parameters[0].detach().unsqueeze(0)
        else:
            common = torch.stack([parameter.detach() for parameter in parameters])
        gradient = torch.zeros_like(common)
        for parameter, values, own in zip(parameters, common, gradient, strict=True):
            if len(parameters) > 1:
                parameter.data = values
            parameter.grad = own
        found += [common, gradient]
    weight, weight_grad, bias, bias_grad = found
    dropouts = [dropout for _, dropout in layers if dropout is not None]
    return _Stacked(weight, bias, weight_grad, bias_grad, dropouts)


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
