"""A small convolutional network, as tutorials build it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from fashionnet.errors import UserError, shortened
from fashionnet.models.layers import Dropout, conv, dense

_KERNEL = 3  # pixels of a filter's side
_POOLED = 2
_MOST_FILTERS = 4096


class CNN(nn.Sequential):
    """Conv2D+ReLU+MaxPool for each number of filters, then Flatten, Dropout and Dense to logits.

    `filters=[32, 64], dropout=0.5` is the "Simple MNIST convnet" of Keras' examples: 28 x 28 x 1 →
    26 x 26 x 32 → 13 x 13 x 32 → 11 x 11 x 64 → 5 x 5 x 64 → 1,600 → 10, 34,826 parameters.
    Filters have 3 x 3 pixels and no padding. Weights are Glorot-uniform and biases zero, as Keras'
    Conv2D and Dense layers start.

    Input: float (N, H, W) or (N, 3, H, W); output: logits, float (N, num_classes).

    Args:
        filters: number of filters of each convolution.
        dropout: the probability that an activation before the last layer is dropped in training; 0
            leaves the layer out.
        input_shape: shape of one picture, (H, W) or (3, H, W).
        num_classes: number of logits.

    Raises:
        UserError: a number of filters out of range, pictures too small for so many convolutions,
            or a dropout outside 0..1.
    """

    def __init__(
        self,
        filters: int | Sequence[int] = (32, 64),
        dropout: float = 0.5,
        input_shape: Sequence[int] = (28, 28),
        num_classes: int = 10,
    ) -> None:
        widths: list[Any] = list(filters) if isinstance(filters, list | tuple) else [filters]
        if not all(type(width) is int and 1 <= width <= _MOST_FILTERS for width in widths):
            raise UserError(
                f"model.filters={shortened(filters)} must be 1 to {_MOST_FILTERS} filters, or a "
                "list of such numbers"
            )
        if isinstance(dropout, bool) or not isinstance(dropout, int | float):
            raise UserError(f"model.dropout={shortened(repr(dropout))} is not a number in 0..1")
        channels = 1 if len(input_shape) == 2 else input_shape[0]
        sides = list(input_shape[-2:])
        layers: list[nn.Module] = [nn.Unflatten(1, (1, sides[0]))] if len(input_shape) == 2 else []
        for width in widths:
            layers += [conv(channels, width, _KERNEL), nn.ReLU(), nn.MaxPool2d(_POOLED)]
            channels = width
            sides = [(side - _KERNEL + 1) // _POOLED for side in sides]
            if min(sides) < 1:
                raise UserError(
                    f"model.filters={shortened(filters)} makes {len(widths)} convolutions, too "
                    f"many for pictures of {input_shape[-2]} x {input_shape[-1]} pixels"
                )
        layers += [nn.Flatten()]
        layers += [Dropout(dropout)] if dropout else []
        super().__init__(*layers, dense(channels * math.prod(sides), num_classes))
        # Convolutions are faster on pictures and filters whose channels lie beside one another.
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
