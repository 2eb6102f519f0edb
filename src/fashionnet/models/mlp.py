"""The lesson's network."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

from torch import nn

from fashionnet.errors import UserError, shortened
from fashionnet.models.layers import Dropout, dense

# As many as a checkpoint holds, with the best weights and an optimizer's two moments beside them.
_MOST_PARAMETERS = 2**28
_MOST_LAYERS = 256


class MLP(nn.Sequential):
    """Flatten, then Dense+ReLU+Dropout for each hidden width, then Dense to the classes' logits.

    The lesson's network is `hidden=128, dropout=0.2`: 784 → 128 → 10, 101,770 parameters.
    Weights are Glorot-uniform and biases zero, as Keras' Dense layers start.

    Input: float (N, *input_shape); output: logits, float (N, num_classes).

    Args:
        hidden: width of the hidden layer, or a list of widths.
        dropout: the probability that a hidden activation is dropped in training; 0 leaves the
            layer out.
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
