"""The gradients of several networks of one shape at once, by torch.func, for any architecture."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from fashionnet.errors import first_line
from fashionnet.models.layers import MaskStream, dropouts

Tensors = dict[str, Tensor]


class _GivenMasks(MaskStream):
    """Stands in the skeleton for the masks of all networks: returns the mask that it was given."""

    def __init__(self, keep: float) -> None:
        super().__init__(keep)
        self.shape: tuple[int, ...] | None = None  # of the layer's input, once it was called
        self.mask: Tensor | None = None

    def next(self, x: Tensor) -> Tensor:
        self.shape = tuple(x.shape)
        return torch.ones_like(x) if self.mask is None else self.mask


class Stacked:
    """The gradients of S networks by torch.func: one forward and backward pass for all of them.

    Each network has its own parameters, batches and dropout masks. The parameters are put into
    common memory. To single passes the results agree to rounding.

    Args:
        models: networks of the same architecture, without statistics of batches, whose random
            numbers are those of the package's `Dropout`.
    """

    losses: Tensor | None = None
    mode: Callable[[], AbstractContextManager[object]] = nullcontext

    def __init__(self, *models: nn.Module) -> None:
        self._models = models
        self._skeleton = copy.deepcopy(models[0]).train()
        self._given: dict[str, _GivenMasks] = {}
        for name, layer in dropouts(self._skeleton):
            layer.masks = self._given[name] = _GivenMasks(layer.keep)
        self._parameters = _joined([dict(model.named_parameters()) for model in models])
        self._gradients: Tensors = {}
        for name, values in self._parameters.items():
            own = [dict(model.named_parameters())[name] for model in models]
            if own[0].requires_grad:
                self._gradients[name] = torch.zeros_like(values)
                for parameter, gradient in zip(own, self._gradients[name], strict=True):
                    parameter.grad = gradient
        self._buffers = _stack([dict(model.named_buffers()) for model in models])
        self._shapes: dict[int, dict[str, tuple[int, ...]]] = {}  # of masks, by the batch size

    def __call__(self, x: Tensor, labels: Tensor, mix: object = None) -> Tensor:
        """Computes the gradients of all networks, each of its own batch.

        Args:
            x: float (S·N, …), network after network.
            labels: int64 (S·N,).

        Returns:
            The logits, (S·N, C).
        """
        assert mix is None
        networks = len(self._models)
        x, labels = x.unflatten(0, (networks, -1)), labels.view(networks, -1)
        masks = self._masks(x[0])
        trained = {name: self._parameters[name] for name in self._gradients}
        frozen = {name: p for name, p in self._parameters.items() if name not in trained}
        found, logits = vmap(grad(self._loss, has_aux=True))(
            trained, frozen | self._buffers, masks, x, labels
        )
        for name, gradient in self._gradients.items():
            gradient.copy_(found[name])
        joined: Tensor = logits.detach().flatten(0, 1)
        return joined

    def _loss(
        self, trained: Tensors, others: Tensors, masks: Tensors, x: Tensor, labels: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Returns the loss of one network's batch, (), and its logits, (N, C)."""
        for name, given in self._given.items():
            given.mask = masks[name]
        logits = functional_call(self._skeleton, trained | others, (x,))
        return F.cross_entropy(logits, labels), logits

    def _masks(self, x: Tensor) -> Tensors:
        """Returns the masks of a step by layer, (S, *shape); `x` is the batch of one network."""
        if self._given and len(x) not in self._shapes:
            for given in self._given.values():
                given.mask = None
            with torch.no_grad():
                self._skeleton(x)
            self._shapes[len(x)] = {
                name: given.shape for name, given in self._given.items() if given.shape is not None
            }
        layers = [dict(dropouts(model)) for model in self._models]
        return {
            name: torch.stack([own[name].masks.next(x.new_empty(shape)) for own in layers])
            for name, shape in self._shapes.get(len(x), {}).items()
        }


def refusal(model: nn.Module, x: Tensor, labels: Tensor) -> str | None:
    """Returns why a network cannot be trained together with others; None if it can.

    Args:
        x: a few pictures as the model takes them, (N, …).
        labels: int64 (N,).
    """
    for module in model.modules():
        name = type(module).__name__
        if isinstance(module, nn.modules.batchnorm._NormBase):
            return f"{name} keeps statistics of its batches"
        if isinstance(module, nn.modules.dropout._DropoutNd):
            return f"torch's own {name} draws the same masks for all"
    pair = copy.deepcopy(model), copy.deepcopy(model)
    try:
        Stacked(*pair)(torch.cat([x, x]), torch.cat([labels, labels]))
    except Exception as error:
        return f"torch.func refuses it ({first_line(error)[:200]})"
    return None


def _joined(parameters: list[dict[str, nn.Parameter]]) -> Tensors:
    """Puts the parameters of networks into common memory; returns it by name, (S, …)."""
    common = _stack([{name: p.detach() for name, p in own.items()} for own in parameters])
    for name, values in common.items():
        for own, value in zip(parameters, values, strict=True):
            own[name].data = value
    return common


def _stack(values: list[dict[str, Any]]) -> Tensors:
    return {name: torch.stack([own[name] for own in values]) for name in values[0]}
