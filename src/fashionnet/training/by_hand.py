"""The gradients of a plain MLP, derived by hand.

It uses the same masks as autograd, does the same arithmetic in the same order, and agrees to
rounding. It is faster because it builds no graph and writes into buffers that it keeps.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fashionnet.errors import UserError
from fashionnet.models.layers import Dropout


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

    losses: Tensor | None = None
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

    def __call__(self, x: Tensor, labels: Tensor, mix: object = None) -> Tensor:
        """Returns the logits of `x`, float (N, C); labels are int64 (N,)."""
        assert mix is None
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
