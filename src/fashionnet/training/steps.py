"""Taking the steps of a chunk: gradients of each batch, then the optimizer.

`Eager` takes them one by one. On a GPU, whose kernels for a small network take less time than their
launches, `captured.Captured` takes many of them as one CUDA graph.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fashionnet.system import processes
from fashionnet.system.signals import Stop

if TYPE_CHECKING:
    from fashionnet.training.state import TrainState

_SECONDS_BETWEEN_EXCHANGES = 0.5
_SECONDS_BETWEEN_LOOKS = 0.25


@dataclass(frozen=True)
class Chunk:
    """Consecutive batches of an epoch, the last of which may be short.

    Attributes:
        x: pictures as the model takes them, float (S·B, …).
        labels: int64 (S·B,).
        first: the step within the epoch of the first batch, from 0.
        fractions: how much of the training is done before each step, in 0..1.
        ends_epoch: whether the epoch's last step is among them.
    """

    x: Tensor
    labels: Tensor
    first: int
    fractions: list[float]
    ends_epoch: bool

    def part(self, start: int, stop: int, batch_size: int) -> Chunk:
        """Returns some of the chunk's batches."""
        examples = slice(start * batch_size, stop * batch_size)
        return Chunk(
            self.x[examples],
            self.labels[examples],
            self.first + start,
            self.fractions[start:stop],
            self.ends_epoch and stop >= len(self.fractions),
        )


@dataclass(frozen=True)
class Taken:
    """What came out of a chunk's steps.

    Attributes:
        logits: float (N, C), of the examples that this process computed.
        losses: float (N,), where they are not the cross-entropy of the logits.
        num_steps: how many were taken; a signal ends a chunk early.
        is_interrupted: whether a signal arrived, in any process.
        is_due: whether losses are to be looked at, a few times a second.
    """

    logits: Tensor
    losses: Tensor | None
    num_steps: int
    is_interrupted: bool
    is_due: bool


class Eager:
    """Takes one step after another, and looks for a signal after each."""

    def __init__(self) -> None:
        self.clock = Clock()

    def take(self, state: TrainState, chunk: Chunk, stop: Stop) -> Taken:
        """Takes the chunk's steps, until a signal arrives; `stop` then holds it."""
        logits: list[Tensor] = []
        losses: list[Tensor] = []
        is_interrupted = False
        for x, labels, fraction in batches(chunk, state.batch_size):
            step = chunk.first + len(logits)
            for masks in state.masks:
                masks.at(state.epoch, step)
            changed, mix = x, None
            if state.augment is not None:
                changed, mix = state.augment(x, labels, state.epoch, step)
            logits.append(state.gradients(changed, labels, mix))
            if state.gradients.losses is not None:
                losses.append(state.gradients.losses)
            state.learning_rate.set(fraction)
            state.optimizer.step()
            is_last = chunk.ends_epoch and len(logits) == len(chunk.fractions)
            if is_interrupted := self.clock.signaled(stop, is_last):
                break
        own_losses = torch.cat(losses) if losses else None
        is_due = self.clock.is_due()
        return Taken(torch.cat(logits), own_losses, len(logits), is_interrupted, is_due)


def batches(chunk: Chunk, batch_size: int) -> Iterator[tuple[Tensor, Tensor, float]]:
    """Yields pictures, labels and the fraction of each step."""
    parts = chunk.x.split(batch_size), chunk.labels.split(batch_size)
    yield from zip(*parts, chunk.fractions, strict=True)


class Clock:
    """Looks for signals and at the time, so that all processes of a job do the same.

    One process looks for a signal after each step. Several exchange what they received about twice
    a second, and at the end of an epoch. Each exchange fixes after how many steps the next one
    comes, from the seconds that the slowest process takes for a step.
    """

    def __init__(self) -> None:
        self._since = time.perf_counter()
        self._steps, self._interval = 0, 1
        self._has_exchanged = self._is_signaled = False

    def signaled(self, stop: Stop, at_once: bool) -> bool:
        """Returns whether any process received a signal, which `stop` then holds in all.

        Args:
            at_once: whether several processes exchange now in any case.
        """
        if processes.world_size() == 1:
            return stop.signal is not None
        self._steps += 1
        if self._is_signaled or (self._steps < self._interval and not at_once):
            return self._is_signaled
        now = time.perf_counter()
        microseconds = 1 + int(1e6 * (now - self._since) / self._steps)
        signal, slowest = processes.maxima(stop.signal or 0, microseconds)
        self._interval = max(1, int(1e6 * _SECONDS_BETWEEN_EXCHANGES) // slowest)
        self._since, self._steps, self._has_exchanged = now, 0, True
        if signal:
            stop.signal, self._is_signaled = signal, True
        return self._is_signaled

    def is_due(self) -> bool:
        """Returns, a few times a second, whether it is time to look at the losses."""
        if processes.world_size() > 1:
            has_exchanged, self._has_exchanged = self._has_exchanged, False
            return has_exchanged
        now = time.perf_counter()
        if now - self._since < _SECONDS_BETWEEN_LOOKS:
            return False
        self._since = now
        return True
