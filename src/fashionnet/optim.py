"""Keras' Adam, and building whichever optimizer the configuration names.

An optimizer here is anything with torch.optim's `step`, `state_dict`, `load_state_dict` and
`param_groups`; it reads the gradients from `parameter.grad`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fashionnet import targets
from fashionnet.errors import UserError


class Optimizer(Protocol):
    """The part of torch.optim.Optimizer that a fit uses."""

    param_groups: list[dict[str, Any]]

    def step(self) -> Any: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> Any: ...


class Adam:
    """Adam as Keras computes it, by torch's fused kernel.

    Keras: p -= lr * sqrt(1 - β2^t) / (1 - β1^t) * m / (sqrt(v) + ε), where ε is Kingma & Ba's
    "epsilon hat", which is not bias-corrected.
    torch: p -= lr / (1 - β1^t) * m / (sqrt(v / (1 - β2^t)) + eps).
    The two are equal at eps = ε / sqrt(1 - β2^t), which is what each step passes to the kernel.

    `torch.optim.Adam` would do the same at three times the cost a step for a small network, and
    importing it takes a second.

    Args:
        params: the parameters to train, all on one device; float32 or float64.
        lr: learning rate, above 0.
        beta_1, beta_2: decay of the running means of gradient and squared gradient, in 0..1.
        epsilon: Keras' default is 1e-7.

    Source: Kingma & Ba 2015, section 2; keras.optimizers.Adam.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float = 1e-3,
        beta_1: float = 0.9,
        beta_2: float = 0.999,
        epsilon: float = 1e-7,
    ) -> None:
        for name, beta in (("beta_1", beta_1), ("beta_2", beta_2)):
            if not 0 <= beta < 1:
                raise UserError(f"optimizer.{name}={beta} is not in 0..1")
        if not epsilon > 0:
            raise UserError(f"optimizer.epsilon={epsilon} must be above 0")
        self._parameters = list(params)
        self.param_groups: list[dict[str, Any]] = [
            {"params": self._parameters, "lr": lr, "betas": (beta_1, beta_2), "eps": epsilon}
        ]
        # Detached aliases share the weights' memory and let a step run outside no_grad.
        self._weights = [parameter.detach() for parameter in self._parameters]
        self._means = [torch.zeros_like(weight) for weight in self._weights]
        self._squares = [torch.zeros_like(weight) for weight in self._weights]
        self._steps = 0
        device = self._weights[0].device if self._weights else torch.device("cpu")
        self._step = torch.zeros((), device=device)  # one step count serves every parameter

    def step(self) -> None:
        """Takes one step along the gradients in `parameter.grad`."""
        group = self.param_groups[0]
        beta_1, beta_2 = group["betas"]
        self._steps += 1
        self._step.fill_(self._steps)
        weights: list[Tensor] = []
        gradients: list[Tensor] = []
        means: list[Tensor] = []
        squares: list[Tensor] = []
        for i, parameter in enumerate(self._parameters):
            gradient = parameter.grad
            if gradient is None:  # a parameter that this step did not use
                continue
            # The kernel walks memory and ignores strides: a gradient laid out otherwise than its
            # weight would be added to the wrong places.
            if gradient.stride() != parameter.stride():
                gradient = torch.empty_like(self._weights[i]).copy_(gradient)
            weights.append(self._weights[i])
            gradients.append(gradient)
            means.append(self._means[i])
            squares.append(self._squares[i])
        torch._fused_adam_(
            weights,
            gradients,
            means,
            squares,
            [],
            [self._step] * len(weights),
            lr=group["lr"],
            beta1=beta_1,
            beta2=beta_2,
            weight_decay=0.0,
            eps=group["eps"] / math.sqrt(1 - beta_2**self._steps),
            amsgrad=False,
            maximize=False,
        )

    def state_dict(self) -> dict[str, Any]:
        """Returns the step count and both running means; tensors and numbers only."""
        return {
            "steps": self._steps,
            "lr": self.param_groups[0]["lr"],
            "means": self._means,
            "squares": self._squares,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Puts back what `state_dict` returned."""
        self._steps = state_dict["steps"]
        self.param_groups[0]["lr"] = state_dict["lr"]
        _copy_all(state_dict["means"], self._means)
        _copy_all(state_dict["squares"], self._squares)


def _copy_all(sources: list[Tensor], into: list[Tensor]) -> None:
    for source, target in zip(sources, into, strict=True):
        target.copy_(source)


def build(node: Mapping[str, Any], parameters: Iterable[nn.Parameter]) -> Optimizer:
    """Builds the configured optimizer over the parameters that take gradients."""
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    if not trained:
        raise UserError("the model has no parameter to train")
    optimizer: Optimizer = targets.build(node, "optimizer", trained)
    return optimizer
