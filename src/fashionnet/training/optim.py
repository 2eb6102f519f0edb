"""Keras' Adam, and building whichever optimizer the configuration names.

An optimizer here is anything with torch.optim's `step`, `state_dict`, `load_state_dict` and
`param_groups`; it reads the gradients from `parameter.grad`.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from fashionnet.config import targets
from fashionnet.errors import UserError
from fashionnet.models.transfer import Transfer


class Optimizer(Protocol):
    """The part of torch.optim.Optimizer that a fit uses."""

    param_groups: list[dict[str, Any]]

    def step(self) -> Any: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> Any: ...


class Adam:
    """Adam as Keras computes it, by torch's fused kernel.

    Keras: p -= α * m / (sqrt(v) + ε) with α = lr * sqrt(1 - β2^t) / (1 - β1^t), where ε is Kingma &
    Ba's "epsilon hat", which is not bias-corrected.
    torch: p -= lr / (1 - β1^t) * m / (sqrt(v / (1 - β2^t)) + eps).
    At t = ∞ torch's corrections are 1. With that, and α as the rate, it is Keras' form.

    `torch.optim.Adam` takes three times as long a step for a small network, and a second to import.

    Args:
        params: the parameters to train, all on one device; float32 or float64. Or groups of them,
            each a dict of "params" and its own "lr", as torch.optim takes them.
        lr: learning rate, above 0.
        beta_1, beta_2: decay of the running means of gradient and squared gradient, in 0..1.
        epsilon: Keras' default is 1e-7.
        weight_decay: each step multiplies the weights by 1 - lr * weight_decay, as Keras' AdamW.

    Source: Kingma & Ba 2015, section 2; Loshchilov & Hutter 2019; keras.optimizers.Adam, AdamW.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        beta_1: float = 0.9,
        beta_2: float = 0.999,
        epsilon: float = 1e-7,
        weight_decay: float = 0.0,
    ) -> None:
        for name, beta in (("beta_1", beta_1), ("beta_2", beta_2)):
            if not 0 <= beta < 1:
                raise UserError(f"optimizer.{name}={beta} is not in 0..1")
        if not epsilon > 0:
            raise UserError(f"optimizer.epsilon={epsilon} must be above 0")
        if not weight_decay >= 0:
            raise UserError(f"optimizer.weight_decay={weight_decay} must be 0 or more")
        given: list[Any] = list(params)
        groups = given if given and isinstance(given[0], dict) else [{"params": given}]
        shared = {"lr": lr, "betas": (beta_1, beta_2), "eps": epsilon, "weight_decay": weight_decay}
        self.param_groups: list[dict[str, Any]] = [shared | group for group in groups]
        self._groups = [_Moments(list(group["params"])) for group in self.param_groups]
        self._steps = 0
        first = next((m.weights[0] for m in self._groups if m.weights), torch.empty(0))
        # As in Keras, the rate has the weights' precision.
        self._rounded = np.float64 if first.dtype == torch.float64 else np.float32
        self._infinity = torch.full((), math.inf, device=first.device)

    def step(self, factors: Tensor | None = None) -> None:
        """Takes one step along the gradients in `parameter.grad`.

        Args:
            factors: one step of what `next_factors` returned, (groups, 2), on the weights' device;
                None for those of the next step.
        """
        given: Any = self.next_factors() if factors is None else factors
        for group, moments, (rate, kept) in zip(
            self.param_groups, self._groups, given, strict=True
        ):
            weights, gradients, means, squares = moments.of_step()
            if group["weight_decay"] and weights:
                torch._foreach_mul_(weights, kept)
            torch._fused_adam_(
                weights,
                gradients,
                means,
                squares,
                [],
                [self._infinity] * len(weights),
                lr=rate,
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                weight_decay=0.0,
                eps=group["eps"],
                amsgrad=False,
                maximize=False,
            )

    def next_factors(self) -> list[tuple[float, float]]:
        """Counts a step, and returns for each group its corrected rate and what decay leaves."""
        self._steps += 1
        factors = []
        for group in self.param_groups:
            beta_1, beta_2 = group["betas"]
            correction = math.sqrt(1 - beta_2**self._steps) / (1 - beta_1**self._steps)
            rate = float(self._rounded(group["lr"] * correction))
            decay = group["lr"] * group["weight_decay"]
            factors.append((rate, float(self._rounded(1 - decay)) if decay else 1.0))
        return factors

    def rebind(self) -> None:
        """Takes the memory that the parameters have now; it was replaced."""
        for moments in self._groups:
            moments.rebind()

    def state_dict(self) -> dict[str, Any]:
        """Returns the step count and both running means; tensors and numbers only."""
        return {
            "steps": self._steps,
            "lr": [group["lr"] for group in self.param_groups],
            "means": [mean for moments in self._groups for mean in moments.means],
            "squares": [square for moments in self._groups for square in moments.squares],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores what `state_dict` returned."""
        self._steps = state_dict["steps"]
        own = self.state_dict()
        for group, lr in zip(self.param_groups, state_dict["lr"], strict=True):
            group["lr"] = lr
        for key in ("means", "squares"):
            for source, target in zip(state_dict[key], own[key], strict=True):
                target.copy_(source)


class _Moments:
    """A group's weights with the running means of their gradients and of the squares of these."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self._parameters = parameters
        self.rebind()
        self.means = [torch.zeros_like(weight) for weight in self.weights]
        self.squares = [torch.zeros_like(weight) for weight in self.weights]

    def rebind(self) -> None:
        # Detached aliases share the weights' memory and let a step run outside no_grad.
        self.weights = [parameter.detach() for parameter in self._parameters]

    def of_step(self) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
        """Returns weights, gradients, means and squares of the parameters that a step used."""
        weights: list[Tensor] = []
        gradients: list[Tensor] = []
        means: list[Tensor] = []
        squares: list[Tensor] = []
        for i, parameter in enumerate(self._parameters):
            gradient = parameter.grad
            if gradient is None:
                continue
            # The kernel walks memory and ignores strides: a gradient laid out otherwise than its
            # weight would be added to the wrong places.
            if gradient.stride() != parameter.stride():
                gradient = torch.empty_like(self.weights[i]).copy_(gradient)
            weights.append(self.weights[i])
            gradients.append(gradient)
            means.append(self.means[i])
            squares.append(self.squares[i])
        return weights, gradients, means, squares


def build(node: Mapping[str, Any], model: nn.Module, backbone_lr: float = 1.0) -> Optimizer:
    """Builds the configured optimizer over the parameters that take gradients.

    A weight decay does not apply to biases and the parameters of normalizations, which have one
    dimension.

    Args:
        backbone_lr: learning rate of a pretrained backbone, as a fraction of the head's.
    """
    trained: list[Any] = [p for p in model.parameters() if p.requires_grad]
    if not trained:
        raise UserError("the model has no parameter to train")
    if isinstance(model, Transfer) and "lr" in node:
        trained = model.parameter_groups(node["lr"], backbone_lr)
    if node.get("weight_decay"):
        trained = _by_decay(trained)
    optimizer: Optimizer = targets.build(node, "optimizer", trained)
    _check_step(optimizer)
    return optimizer


def _by_decay(trained: list[Any]) -> list[dict[str, Any]]:
    """Splits parameters, or groups of them, into those that decay and those that do not."""
    found: list[dict[str, Any]] = []
    for group in trained if isinstance(trained[0], dict) else [{"params": trained}]:
        decaying = [p for p in group["params"] if p.ndim > 1]
        others = [p for p in group["params"] if p.ndim <= 1]
        found += [{**group, "params": decaying}] if decaying else []
        found += [{**group, "params": others, "weight_decay": 0.0}] if others else []
    return found


def _check_step(optimizer: Optimizer) -> None:
    """Refuses an optimizer whose step asks for more than the gradients of a batch.

    Raises:
        UserError: it needs a closure, as LBFGS does, or sparse gradients.
    """
    name = type(optimizer).__name__
    needed = [
        parameter.name
        for parameter in inspect.signature(optimizer.step).parameters.values()
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    ]
    what = f"its step needs {' and '.join(needed)}" if needed else ""
    if isinstance(optimizer, torch.optim.SparseAdam):
        what = "it needs sparse gradients"
    if what:
        raise UserError(
            f"optimizer {name} cannot be used: {what}, and the loop computes dense gradients of "
            "one batch; choose one that steps from those, e.g. optimizer=adam or optimizer=sgd"
        )
