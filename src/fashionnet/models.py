"""The lesson's network and its dropout. Models return logits; softmax is for people."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fashionnet import seeds, targets
from fashionnet.errors import UserError, shortened
from fashionnet.ranks import Rows

# As many as a checkpoint holds, with the best weights and an optimizer's two moments beside them.
_MOST_PARAMETERS = 2**28
_MOST_LAYERS = 256

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
        shape = x.shape if rows is None else (rows.of, *x.shape[1:])
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


class MLP(nn.Sequential):
    """Flatten, then Dense+ReLU+Dropout for each hidden width, then Dense to the classes' logits.

    The lesson's network is `hidden=128, dropout=0.2`: 784 → 128 → 10, 101,770 parameters.
    Weights are Glorot-uniform and biases zero, as Keras' Dense layers start.

    Input: float (N, *input_shape); output: logits, float (N, num_classes).

    Args:
        hidden: width of the hidden layer, or a list of widths.
        dropout: share of hidden activations dropped in training, in 0..1; 0 leaves the layer out.
        input_shape: shape of one picture, e.g. (28, 28).
        num_classes: number of logits.

    Raises:
        UserError: a width below 1, more weights than a checkpoint holds, or a dropout outside 0..1.
    """

    def __init__(
        self,
        hidden: int | Sequence[int] = 128,
        dropout: float = 0.2,
        input_shape: Sequence[int] = (28, 28),
        num_classes: int = 10,
    ) -> None:
        widths: list[Any] = list(hidden) if isinstance(hidden, list | tuple) else [hidden]
        if not all(type(width) is int and width >= 1 for width in widths):
            raise UserError(
                f"model.hidden={shortened(hidden)} must be a width of 1 or more, or a list of them"
            )
        sides = [math.prod(input_shape), *widths, num_classes]
        num = sum((fan_in + 1) * fan_out for fan_in, fan_out in itertools.pairwise(sides))
        if num > _MOST_PARAMETERS or len(widths) > _MOST_LAYERS:
            raise UserError(
                f"model.hidden={shortened(hidden)} makes a network of {shortened(num)} parameters "
                f"and a depth of {len(widths)}; at most {_MOST_PARAMETERS} and {_MOST_LAYERS} "
                "can be trained"
            )
        if isinstance(dropout, bool) or not isinstance(dropout, int | float):
            raise UserError(f"model.dropout={shortened(repr(dropout))} is not a number in 0..1")
        layers: list[nn.Module] = [nn.Flatten()]
        fan_in = math.prod(input_shape)
        for width in widths:
            layers += [dense(fan_in, width), nn.ReLU()]
            layers += [Dropout(dropout)] if dropout else []
            fan_in = width
        super().__init__(*layers, dense(fan_in, num_classes))


def dense(fan_in: int, fan_out: int) -> nn.Linear:
    """Returns a Linear layer initialised as Keras' Dense: Glorot-uniform weights, zero bias.

    Source: Glorot & Bengio 2010; limits ± sqrt(6 / (fan_in + fan_out)).
    """
    layer = nn.Linear(fan_in, fan_out)
    nn.init.xavier_uniform_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def build(
    node: Mapping[str, Any],
    input_shape: Sequence[int],
    num_classes: int,
    seed: int,
) -> nn.Module:
    """Builds the configured model on the CPU, its initial weights a function of `seed` alone.

    The global generators start from it. Nothing is loaded; see `transfer.load_pretrained`.
    """
    seeds.seed_everything(seed)
    model = targets.build(node, "model", input_shape=tuple(input_shape), num_classes=num_classes)
    if not isinstance(model, nn.Module):
        raise UserError(
            f"model._target_={node['_target_']} built a {type(model).__name__}, "
            "which is no torch.nn.Module"
        )
    lazy = [name for name, p in model.named_parameters() if nn.parameter.is_lazy(p)]
    if lazy:
        raise UserError(
            f"model._target_={node['_target_']}: {lazy[0]} has no shape before the first batch; "
            "take layers whose inputs have a given size, not lazy ones"
        )
    return model


def dropouts(model: nn.Module) -> Iterable[tuple[str, Dropout]]:
    """Yields the name and layer of each `Dropout` of the package in `model`."""
    for name, module in model.named_modules():
        if isinstance(module, Dropout):
            yield name, module


def start_streams(model: nn.Module, seed: int, device: torch.device) -> None:
    """Starts the dropout streams of `model` from `seed`, on `device`."""
    for name, layer in dropouts(model):
        layer.masks.start(seeds.generator(seed, "dropout", name, device=device))


def num_parameters(model: nn.Module) -> int:
    """Returns the number of numbers in the model's parameters."""
    return sum(parameter.numel() for parameter in model.parameters())
