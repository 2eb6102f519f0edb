"""What a fit minimizes: cross-entropy, smoothed or weighted by class, or a model's own loss.

Keras: CategoricalCrossentropy(label_smoothing=...), and model.fit(class_weight=...).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fashionnet.config.schema import Config, mixes
from fashionnet.errors import UserError
from fashionnet.training.augmentation import Mix


class Objective:
    """The loss of a batch.

    A model with a method `loss(logits, labels)` decides itself what is minimized. It returns the
    loss of each example, (N,), or their mean, which then counts for each example.

    Args:
        model: the model of the logits.
        label_smoothing: fraction of a label that all classes share, in 0..1.
        class_weights: factors of the losses of each class' examples, float (C,); None for all 1.
        mixes: whether pictures are mixed with one another, and so are their labels.

    Attributes:
        is_cross_entropy: whether it is the plain cross-entropy of the labels.
    """

    def __init__(
        self,
        model: nn.Module,
        label_smoothing: float = 0.0,
        class_weights: Tensor | None = None,
        mixes: bool = False,
    ) -> None:
        own: Any = getattr(model, "loss", None)
        self._own: Callable[[Tensor, Tensor], Any] | None = own if callable(own) else None
        self._name = type(model).__qualname__
        self._label_smoothing, self._class_weights = label_smoothing, class_weights
        is_weighted = bool(label_smoothing) or class_weights is not None
        self.is_cross_entropy = not (callable(own) or is_weighted or mixes)

    def __call__(
        self, logits: Tensor, labels: Tensor, mix: Mix | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Returns the loss of a batch, and of its examples.

        Args:
            logits: float (N, C).
            labels: int64 (N,).
            mix: second labels of pictures that were mixed; both labels count, by their fractions.

        Returns:
            The mean, (), which is minimized, and the detached losses, (N,); None where these are
            the plain cross-entropies.
        """
        if self.is_cross_entropy and mix is None:
            return F.cross_entropy(logits, labels), None
        losses = self._losses(logits, labels)
        if mix is not None:
            others = self._losses(logits, mix.labels)
            losses = mix.fraction * losses + (1 - mix.fraction) * others
        return losses.mean(), losses.detach().expand(len(labels))

    def _losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        if self._own is not None:
            return self._checked(self._own(logits, labels), labels)
        losses = F.cross_entropy(
            logits, labels, reduction="none", label_smoothing=self._label_smoothing
        )
        weights = self._class_weights
        return losses if weights is None else losses * weights.to(losses.dtype)[labels]

    def _checked(self, losses: object, labels: Tensor) -> Tensor:
        if isinstance(losses, Tensor):
            if losses.is_floating_point() and losses.shape in ((), labels.shape):
                return losses
            found: object = tuple(losses.shape)
        else:
            found = type(losses).__name__
        raise UserError(
            f"{self._name}.loss must return a float tensor with the loss of each picture, here "
            f"({len(labels)},), or their mean, (); it returned {found}"
        )


def build(config: Config, model: nn.Module, labels: Tensor, num_classes: int) -> Objective:
    """Returns what a run minimizes.

    Args:
        labels: labels of the training part, int64 (N,).

    Raises:
        UserError: a model with a loss of its own, and a key that changes cross-entropy.
    """
    weights = None
    if config.class_weights == "balanced":
        device = next(model.parameters()).device
        weights = balanced_weights(labels, num_classes).to(device)
    keys = {
        "label_smoothing": config.label_smoothing,
        "class_weights": config.class_weights,
        "augmentation.cutmix": config.augmentation.cutmix,
        "augmentation.mixup": config.augmentation.mixup,
    }
    used = [f"{key}={value}" for key, value in keys.items() if value]
    if used and callable(getattr(model, "loss", None)):
        name = type(model).__qualname__
        raise UserError(
            f"{used[0]} changes cross-entropy, and {name} has a loss of its own; leave the key out"
        )
    return Objective(model, config.label_smoothing, weights, mixes(config.augmentation))


def balanced_weights(labels: Tensor, num_classes: int) -> Tensor:
    """Returns weights that make all classes count equally, float32 (C,) on the CPU.

    A class with n of N examples has the weight N / (n * the number of classes with examples), as in
    scikit-learn's `class_weight="balanced"`; a class without examples has 0. The mean weight of an
    example is 1.
    """
    counts = torch.bincount(labels.cpu(), minlength=num_classes).double()
    present = counts > 0
    return torch.where(present, counts.sum() / (present.sum() * counts), 0.0).float()
