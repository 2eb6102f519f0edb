"""The convolutional network; that it is Keras' is shown in test_parity.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fashionnet import models
from fashionnet.config import compose
from fashionnet.errors import UserError
from fashionnet.models.cnn import CNN
from fashionnet.models.layers import Dropout


def built(*overrides: str, shape: tuple[int, ...] = (28, 28)) -> torch.nn.Module:
    config = compose.typed(compose.compose("model=cnn", *overrides))
    return models.build(config.model, shape, 10, 0)


def test_it_is_the_network_of_the_tutorials() -> None:
    model = built()
    assert sum(parameter.numel() for parameter in model.parameters()) == 34_826
    names = [type(module).__name__ for module in model.children()]
    block = ["Conv2d", "ReLU", "MaxPool2d"]
    assert names == ["Unflatten", *block, *block, "Flatten", "Dropout", "Linear"]


@pytest.mark.parametrize("shape", [(28, 28), (3, 32, 32), (20, 30)])
def test_gray_and_color_pictures_of_any_size(shape: tuple[int, ...]) -> None:
    logits = built("model.filters=[4,5]", shape=shape)(torch.rand(3, *shape))
    assert logits.shape == (3, 10)


def test_without_dropout_there_is_no_such_layer() -> None:
    model = built("model.dropout=0", "model.filters=4")
    assert not any(isinstance(module, Dropout) for module in model.children())


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"filters": 0}, "model.filters=0 must be 1 to 4096 filters"),
        ({"filters": [32, "64"]}, "must be 1 to 4096 filters"),
        ({"filters": [4] * 4}, "4 convolutions, too many for pictures of 28 x 28 pixels"),
        ({"dropout": 1.0}, "model.dropout=1.0 is not in 0..1"),
        ({"dropout": "half"}, "model.dropout='half' is not a number"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError, match=named):
        CNN(**arguments)
