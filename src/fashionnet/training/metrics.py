"""Loss and accuracy as Keras averages them: over examples, so a short last batch counts less."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fashionnet.system import processes


@dataclass(frozen=True)
class Metrics:
    """Mean loss, cross-entropy (nats) unless a model has its own, and accuracy, in 0..1."""

    loss: float
    accuracy: float


@dataclass(frozen=True)
class Evaluation(Metrics):
    """The figures of a saved run.

    Attributes:
        other_data: How the data differ from those of the run, in words; None for the run's own.
    """

    other_data: str | None = None


class ExampleMetrics:
    """The loss of each example and whether its answer is correct, by position.

    They stay on the device until a mean is read. The mean does not depend on how the examples were
    cut into batches, processes or sessions.

    Args:
        num: the number of positions, e.g. the examples of an epoch.
        weights: some of the model's; losses have their device, and their dtype or float32 if that
            is wider.
    """

    def __init__(self, num: int, weights: Tensor) -> None:
        dtype = torch.promote_types(weights.dtype, torch.float32)
        # The losses, and 1 for each correct answer.
        self._values = torch.zeros(2, num, dtype=dtype, device=weights.device)

    def put(
        self,
        positions: slice | Tensor,
        logits: Tensor,
        labels: Tensor,
        losses: Tensor | None = None,
    ) -> None:
        """Enters a batch at its positions; nothing waits for the device.

        Args:
            positions: N of them; a tensor is int64 (N,).
            logits: float (N, C).
            labels: int64 (N,), in 0..C-1.
            losses: of each example, (N,), where a model has its own; None: their cross-entropy.
        """
        if losses is None:
            losses = F.cross_entropy(logits, labels, reduction="none")
        self._values[0, positions] = losses.to(self._values.dtype)
        self._values[1, positions] = (logits.argmax(1) == labels).to(self._values.dtype)

    def share(self, start: int, stop: int) -> None:
        """Gives every process what any of them entered from `start` to `stop`; once for each."""
        if processes.world_size() > 1:
            part = self._values[:, start:stop].contiguous()
            processes.sum_over_processes(part)  # the others' positions hold zeros: it is exact
            self._values[:, start:stop] = part

    def losses(self, start: int, stop: int) -> Tensor:
        """Returns the losses of some positions, on the device."""
        return self._values[0, start:stop]

    def mean(self, num: int | None = None) -> Metrics:
        """Returns the means over the first `num` positions, or all; this waits for the device.

        Raises:
            ValueError: there are none.
        """
        values = self._values[:, :num].cpu()
        if not values.numel():
            raise ValueError("a mean of no examples")
        # NumPy adds up pairwise on one thread, so that the bits do not depend on the threads.
        loss, accuracy = values.numpy().mean(1, dtype=np.float64).tolist()
        return Metrics(loss, accuracy)

    def first(self, num: int) -> Tensor:
        """Returns a copy of the first `num` positions, float (2, num), for a checkpoint."""
        return self._values[:, :num].clone()

    def restore(self, values: Tensor) -> None:
        """Puts back what `first` returned."""
        self._values[:, : values.shape[1]] = values


def joined(figures: Sequence[ExampleMetrics]) -> Tensor:
    """Puts the figures of several networks into common memory; returns it, (S, 2, num)."""
    values = torch.stack([each._values for each in figures])
    for each, own in zip(figures, values, strict=True):
        each._values = own
    return values
