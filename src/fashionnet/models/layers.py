"""Keras' Dense, Conv2D and Dropout."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from fashionnet.errors import UserError, shortened
from fashionnet.system import seeds
from fashionnet.system.rows import Rows

# A call for random bits costs as much as a small batch's masks, so many are drawn at once.
_BATCHES_PER_BANK = 64
_NUMBERS_PER_BANK = 2**22


class MaskStream:
    """The dropout masks of a layer, each a pure function of seed, layer, epoch and step.

    They are drawn a *bank* at a time: those of up to 64 consecutive steps, by one generator, whose
    seed is derived from the run's seed, the layer's name, the epoch and the bank's first step.

    A plain object beside its layer, because setting an attribute of a Module costs more than
    cutting out a mask.

    Args:
        keep: the fraction of ones, in 0..1. 32 bits decide on each, so it is met within 2**-32; on
            MPS 24 bits do.
    """

    def __init__(self, keep: float) -> None:
        self._keep = keep
        self._stream: tuple[int, str] | None = None  # the run's seed, the layer's name
        self._batch_size = 0
        self._epoch = self._step = self._calls = 0
        self._bank = torch.empty(0)
        self._masks: tuple[Tensor, ...] = ()  # of the bank's steps, each (batch size, *shape)
        self._shape: tuple[int, ...] | None = None  # of an example
        self._first = 0  # the bank's first step
        self._held = torch.empty(0)  # masks of some steps, (steps, batch size, width)
        self._held_step: int | None = None  # the one to take next
        self.rows: Rows | None = None  # of the global batch, where processes share it

    def start(self, seed: int, name: str, batch_size: int) -> None:
        """Begins the stream of a layer; a stream never begun follows torch's global seed.

        Args:
            seed: the run's.
            name: the layer's, within its model.
            batch_size: of a full batch, of all processes.
        """
        self._stream, self._batch_size = (seed, name), batch_size
        self._epoch, self._step, self._calls, self._masks = 1, 0, 0, ()

    def at(self, epoch: int, step: int) -> None:
        """Goes to a step, counted from 0 within its 1-based epoch."""
        if epoch != self._epoch:
            self._epoch, self._masks = epoch, ()
        self._step, self._calls, self._held_step = step, 0, None

    def hold(self, epoch: int, first: int, num: int) -> None:
        """Copies the masks of some steps to memory that stays where it is, for `at_held`.

        A stream that has given no mask yet holds none.
        """
        if self._shape is None:
            return
        shape = (self._batch_size, *self._shape)
        if self._held.shape != (num, *shape):
            self._held = self._bank.new_empty((num, *shape))
        step = first
        while step < first + num:
            self.at(epoch, step)
            start = self._within_bank(self._shape, self._bank.device)
            count = min(len(self._masks) - start, first + num - step)
            bank = self._bank.view(-1, *shape)[start : start + count]
            self._held[step - first : step - first + count].copy_(bank)
            step += count

    def at_held(self, step: int) -> None:
        """Goes to one of the steps that are held, counted from the first of them."""
        self._held_step, self._calls = step, 0

    def next(self, x: Tensor) -> Tensor:
        """Returns the mask of the step, of the shape, dtype and device of `x`: 0 or 1/keep.

        It is a view that stays valid until the next step. Where processes share a batch, it is cut
        from the whole batch's mask, so that the run of several is the run of one.
        """
        shape = x.shape if self.rows is None else (self.rows.total, *x.shape[1:])
        self._calls += 1
        if self._stream is None or self._calls > 1 or shape[0] > self._batch_size:
            mask = self._drawn_alone(shape, x.device)
        elif self._held_step is not None:
            mask = self._held[self._held_step]
        else:
            mask = self._of_bank(shape, x.device)
        if self.rows is not None:
            mask = mask[self.rows.part]
        if x.dtype == torch.float32:
            return mask
        return mask.ne(0).to(x.dtype).mul_(1 / self._keep)

    def _of_bank(self, shape: Sequence[int], device: torch.device) -> Tensor:
        at = self._within_bank(tuple(shape[1:]), device)
        mask = self._masks[at]
        return mask if shape[0] == self._batch_size else mask[: shape[0]]

    def _within_bank(self, shape: tuple[int, ...], device: torch.device) -> int:
        """Returns which of the bank's masks is the step's; draws the bank if need be."""
        at = self._step - self._first
        if not 0 <= at < len(self._masks) or self._shape != shape:
            self._draw_bank(shape, device)
            at = self._step - self._first
        return at

    @torch.inference_mode(False)  # by-hand gradients run in it; autograd could not use the bank
    def _draw_bank(self, shape: tuple[int, ...], device: torch.device) -> None:
        self._shape = shape
        size = self._batch_size * math.prod(shape)
        steps = max(1, min(_BATCHES_PER_BANK, _NUMBERS_PER_BANK // max(1, size)))
        self._first = self._step // steps * steps
        if (self._bank.numel(), self._bank.device) != (steps * size, device):
            self._bank = torch.empty(steps * size, device=device)
        self._fill(self._bank, self._epoch, self._first)
        self._masks = self._bank.view(steps, self._batch_size, *shape).unbind(0)

    @torch.inference_mode(False)
    def _drawn_alone(self, shape: Sequence[int], device: torch.device) -> Tensor:
        """Draws one mask for what no bank holds, e.g. a layer called twice in a step."""
        mask = torch.empty(*shape, device=device)
        self._fill(mask.view(-1), self._epoch, self._step, self._calls)
        return mask

    def _fill(self, mask: Tensor, *position: int) -> None:
        if self._stream is None:  # used outside a run
            seed = int(torch.randint(2**63 - 1, ()))
        else:
            seed = seeds.derive(self._stream[0], "dropout", self._stream[1], *position)
        draw = _DRAWS.get(mask.device.type, _draw_by_bits)
        draw(mask, self._keep, torch.Generator(mask.device).manual_seed(seed))
        mask.mul_(1 / self._keep)


def _draw_by_bits(mask: Tensor, keep: float, generator: torch.Generator) -> None:
    """Fills a float32 (N,) with ones and zeros; 32 bits decide on each."""
    words = torch.empty((len(mask) + 1) // 2, dtype=torch.int64, device=mask.device)
    words.random_(-(2**63), None, generator=generator)
    bits = words.view(torch.int32)[: len(mask)]  # uniform over all 2**32 values
    highest = max(round(keep * 2**32), 1) - 1 - 2**31  # fits int32, also at keep = 1
    torch.le(bits, highest, out=mask)


def _draw_by_floats(mask: Tensor, keep: float, generator: torch.Generator) -> None:
    """Does the same where torch draws no integers of the full range, MPS until torch 2.11."""
    mask.uniform_(generator=generator).lt_(keep)


_DRAWS = {"mps": _draw_by_floats}


class Dropout(nn.Module):
    """Dropout as Keras': zeroes a fraction `rate` of inputs and scales the rest by 1/(1-rate).

    Differs from `torch.nn.Dropout` in where its random bits come from: a stream of its own, a
    function of the run's seed, the layer's name, the epoch and the step. Drawing the masks of many
    batches at a time costs a tenth.

    Source: Srivastava et al. 2014, in the inverted form that Keras and torch use.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        if not 0 <= rate < 1:
            raise UserError(f"model.dropout={shortened(rate)} is not in 0..1; 0 turns dropout off")
        self.rate = rate
        self.keep = 1 - rate
        self.masks = MaskStream(self.keep)

    def forward(self, x: Tensor) -> Tensor:
        """Returns `x` in evaluation, and `x` times a fresh scaled mask in training."""
        if not self.training or self.rate == 0:
            return x
        return x * self.masks.next(x)

    def extra_repr(self) -> str:
        return f"rate={self.rate}"


def dropouts(model: nn.Module) -> Iterable[tuple[str, Dropout]]:
    """Yields the name and layer of each `Dropout` of the package in `model`."""
    for name, module in model.named_modules():
        if isinstance(module, Dropout):
            yield name, module


def start_streams(model: nn.Module, seed: int, batch_size: int) -> list[MaskStream]:
    """Starts the dropout streams of `model` and returns them."""
    found = []
    for name, layer in dropouts(model):
        layer.masks.start(seed, name, batch_size)
        found.append(layer.masks)
    return found


def dense(fan_in: int, fan_out: int) -> nn.Linear:
    """Returns a Linear layer initialized as Keras' Dense: Glorot-uniform weights, zero bias.

    Source: Glorot & Bengio 2010; limits ± sqrt(6 / (fan_in + fan_out)).
    """
    return _as_keras(nn.Linear(fan_in, fan_out))


def conv(channels: int, filters: int, size: int) -> nn.Conv2d:
    """Returns a Conv2d layer without padding, initialized as Keras' Conv2D: as `dense`.

    Args:
        channels: of its input.
        size: pixels of a filter's side.
    """
    return _as_keras(nn.Conv2d(channels, filters, size))


_Layer = TypeVar("_Layer", nn.Linear, nn.Conv2d)


def _as_keras(layer: _Layer) -> _Layer:
    assert layer.bias is not None
    nn.init.xavier_uniform_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer
