"""Keras' Dense and Dropout; masks are drawn many batches at a time."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fashionnet.errors import UserError, shortened
from fashionnet.system import seeds
from fashionnet.system.rows import Rows

# Masks drawn at a time: one call for random bits costs about as much as one small batch's.
_BATCHES_PER_DRAW = 64
_NUMBERS_PER_DRAW = 2**22


class MaskStream:
    """A stream of dropout masks, drawn from its own generator many batches at a time.

    A plain object beside its layer, because setting an attribute of a Module costs more than
    cutting out a mask.

    Args:
        keep: the share of ones, in 0..1. 32 bits decide on each, so it is met within 2**-32; on
            MPS 24 bits do.
    """

    def __init__(self, keep: float) -> None:
        self._keep = keep
        self._generator: torch.Generator | None = None
        self._words = torch.empty(0)
        self._bank = torch.empty(0)
        self._drawn = self._used = 0
        self._state_before_bank: Tensor | None = None
        self.rows: Rows | None = None  # of the global batch, where processes share it

    def next(self, x: Tensor) -> Tensor:
        """Returns the next mask, of the shape, dtype and device of `x`: 0 or 1/keep.

        It is a view that stays valid until the next call. Where processes share a batch, it is cut
        from the whole batch's mask, so that the run of several is the run of one.
        """
        rows = self.rows
        shape = x.shape if rows is None else (rows.total, *x.shape[1:])
        size = math.prod(shape)
        first = self._used
        if first + size > self._drawn:
            # Memory that comes and goes by the megabyte costs more than the bits that fill it;
            # but where autograd may still need the last masks, they are not written over.
            batches = max(1, min(_BATCHES_PER_DRAW, _NUMBERS_PER_DRAW // size)) if size else 0
            self._draw(size * batches, x.device, torch.is_inference_mode_enabled())
            first = 0
        self._used = first + size
        mask = self._bank[first : first + size].view(shape)
        if rows is not None:
            mask = mask[rows.part]
        if x.dtype == torch.float32:
            return mask
        return mask.ne(0).to(x.dtype).mul_(1 / self._keep)

    def start(self, generator: torch.Generator) -> None:
        """Begins anew with `generator`; a stream never begun follows torch's global seed."""
        self._generator = generator
        self._drawn = self._used = 0

    def state_dict(self) -> dict[str, Any]:
        """Returns where the stream stands, for a checkpoint: tensors and numbers only."""
        if self._generator is None:
            return {}
        before = self._state_before_bank if self._drawn else self._generator.get_state()
        return {"generator": before, "bank": self._drawn, "used": self._used}

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Puts the stream back where `state_dict` found it."""
        if not state:
            return
        generator = torch.Generator(device)
        generator.set_state(state["generator"])
        self.start(generator)
        if state["bank"]:
            self._draw(state["bank"], device, reuse=False)
        self._used = state["used"]

    @torch.inference_mode(False)  # by-hand gradients run in it; autograd could not use the bank
    def _draw(self, size: int, device: torch.device, reuse: bool) -> None:
        if self._generator is None:  # used outside a run
            seed = int(torch.randint(2**63 - 1, ()))
            self._generator = torch.Generator(device).manual_seed(seed)
        self._state_before_bank = self._generator.get_state()
        if not reuse or (self._bank.numel(), self._bank.device) != (size, device):
            self._words = torch.empty((size + 1) // 2, dtype=torch.int64, device=device)
            self._bank = torch.empty(size, device=device)
        draw = _DRAWS.get(device.type, _draw_by_bits)
        draw(self._bank, self._words, self._keep, self._generator)
        self._bank.mul_(1 / self._keep)
        self._drawn, self._used = size, 0


def _draw_by_bits(bank: Tensor, words: Tensor, keep: float, generator: torch.Generator) -> None:
    """Fills `bank`, float32 (N,), with ones and zeros; `words` is int64 (N/2,) to work in."""
    words.random_(-(2**63), None, generator=generator)
    bits = words.view(torch.int32)[: len(bank)]  # uniform over all 2**32 values
    highest = max(round(keep * 2**32), 1) - 1 - 2**31  # fits int32, also at keep = 1
    torch.le(bits, highest, out=bank)


def _draw_by_floats(bank: Tensor, _words: Tensor, keep: float, generator: torch.Generator) -> None:
    """Does the same where torch draws no integers of the full range, MPS until torch 2.11."""
    bank.uniform_(generator=generator).lt_(keep)


_DRAWS = {"mps": _draw_by_floats}


class Dropout(nn.Module):
    """Dropout as Keras': zeroes a share `rate` of the inputs and scales the rest by 1/(1-rate).

    Differs from `torch.nn.Dropout` in where its random bits come from: an own stream, a function
    of the run's seed and the layer's position (`start_streams`), drawn many batches at a time,
    which costs a tenth.

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


def start_streams(model: nn.Module, seed: int, device: torch.device) -> None:
    """Starts the dropout streams of `model` from `seed`, on `device`."""
    for name, layer in dropouts(model):
        layer.masks.start(seeds.generator(seed, "dropout", name, device=device))


def dense(fan_in: int, fan_out: int) -> nn.Linear:
    """Returns a Linear layer initialised as Keras' Dense: Glorot-uniform weights, zero bias.

    Source: Glorot & Bengio 2010; limits ± sqrt(6 / (fan_in + fan_out)).
    """
    layer = nn.Linear(fan_in, fan_out)
    nn.init.xavier_uniform_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer
