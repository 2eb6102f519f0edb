"""Loss and accuracy as Keras averages them: over examples, so a short last batch counts less."""

from __future__ import annotations

from dataclasses import dataclass

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


class RunningMetrics:
    """Sums of loss and right answers, kept on the device until they are read.

    Reading waits for the device, adding does not.
    """

    def __init__(self, device: torch.device) -> None:
        # Sums of 54,000 losses in float32 would lose the sixth digit; MPS has no float64.
        self._dtype = torch.float32 if device.type == "mps" else torch.float64
        self._loss_sums = torch.zeros(2, dtype=self._dtype, device=device)  # see _addends
        self._num_right = torch.zeros((), dtype=torch.int64, device=device)
        self._num = 0
        self._pooled: tuple[Tensor, ...] | None = None  # what all processes know by now

    def add(self, logits: Tensor, labels: Tensor, losses: Tensor | None = None) -> Tensor:
        """Adds a batch and returns its losses.

        Args:
            logits: float (N, C).
            labels: int64 (N,), in 0..C-1.
            losses: of each example, (N,), where a model has its own; None: their cross-entropy.

        Returns:
            The loss of each example, (N,).
        """
        if losses is None:
            losses = F.cross_entropy(logits, labels, reduction="none")
        self._loss_sums += _addends(losses.to(self._dtype)).sum(1)
        self._num_right += (logits.argmax(1) == labels).sum()
        self._num += len(labels)
        return losses

    def read(self) -> Metrics:
        """Returns the means over all that was added.

        Raises:
            ZeroDivisionError: nothing was added.
        """
        loss_sum = self._loss_sums.sum().item()
        return Metrics(loss_sum / self._num, self._num_right.item() / self._num)

    def pool(self) -> None:
        """Adds up what the processes of a job found, so that each has the sums of all; exactly."""
        if processes.world_size() == 1:
            return
        device = self._num_right.device
        parts = (self._loss_sums, self._num_right, torch.tensor(self._num, device=device))
        before = self._pooled or tuple(torch.zeros_like(part) for part in parts)
        news = [part - known for part, known in zip(parts, before, strict=True)]
        processes.sum_over_processes(*news)
        whole = [known + new for known, new in zip(before, news, strict=True)]
        self._loss_sums, self._num_right = whole[0].clone(), whole[1].clone()
        self._num = int(whole[2].item())
        self._pooled = tuple(whole)

    def state_dict(self) -> dict[str, Tensor | int]:
        """Returns the sums, for a checkpoint."""
        return {"loss_sums": self._loss_sums, "num_right": self._num_right, "num": self._num}

    def load_state_dict(self, state: dict[str, Tensor | int]) -> None:
        """Puts back what `state_dict` returned."""
        self._loss_sums.copy_(torch.as_tensor(state["loss_sums"]))
        self._num_right.copy_(torch.as_tensor(state["num_right"]))
        self._num = int(state["num"])
        num = torch.tensor(self._num, device=self._num_right.device)
        self._pooled = (self._loss_sums.clone(), self._num_right.clone(), num)


def _addends(losses: Tensor) -> Tensor:
    """Returns losses as multiples of 2^-16 and what remains of them as multiples of 2^-50, (2, N).

    The 53 bits of float64 hold sums of either without rounding, up to 2^37 and a million losses.
    So the sums are the same in any order and however an epoch is cut, by a signal for example.
    """
    coarse = (losses * 2**16).round() / 2**16
    fine = ((losses - coarse).nan_to_num() * 2**50).round() / 2**50  # nan where both are infinite
    return torch.stack((coarse, fine))
