"""Loss and accuracy as Keras averages them: over examples, so a short last batch counts less."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Metrics:
    """Mean cross-entropy (nats) and the share of right answers, in 0..1."""

    loss: float
    accuracy: float


class RunningMetrics:
    """Sums of loss and right answers, kept on the device until they are read.

    Reading waits for the device, adding does not.
    """

    def __init__(self, device: torch.device) -> None:
        # Sums of 54,000 losses in float32 would lose the sixth digit; MPS has no float64.
        self._dtype = torch.float32 if device.type == "mps" else torch.float64
        self._loss_sum = torch.zeros((), dtype=self._dtype, device=device)
        self._num_right = torch.zeros((), dtype=torch.int64, device=device)
        self._num = 0

    def add(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Adds a batch and returns its losses.

        Args:
            logits: float (N, C).
            labels: int64 (N,), in 0..C-1.

        Returns:
            The cross-entropy of each example, of the dtype of `logits`, (N,).
        """
        losses = F.cross_entropy(logits, labels, reduction="none")
        self._loss_sum += losses.sum(dtype=self._dtype)
        self._num_right += (logits.argmax(1) == labels).sum()
        self._num += len(labels)
        return losses

    def read(self) -> Metrics:
        """Returns the means over all that was added.

        Raises:
            ZeroDivisionError: nothing was added.
        """
        return Metrics(self._loss_sum.item() / self._num, self._num_right.item() / self._num)

    def state_dict(self) -> dict[str, Tensor | int]:
        """Returns the sums, for a checkpoint."""
        return {"loss_sum": self._loss_sum, "num_right": self._num_right, "num": self._num}

    def load_state_dict(self, state: dict[str, Tensor | int]) -> None:
        """Puts back what `state_dict` returned."""
        self._loss_sum.copy_(torch.as_tensor(state["loss_sum"]))
        self._num_right.copy_(torch.as_tensor(state["num_right"]))
        self._num = int(state["num"])
