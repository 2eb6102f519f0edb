"""Small pictures side by side: which are shown, where, and in which colors."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from fashionnet.data.examples import Examples
from fashionnet.models import cnn, mlp
from fashionnet.runs import tiles


def opened(png: bytes) -> np.ndarray:
    """Returns a PNG file's pixels as RGB, (height, width, 3)."""
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


def tile(pixels: np.ndarray, row: int, column: int, height: int, width: int) -> np.ndarray:
    """Returns a tile of a grid in its own pixels: tiles are enlarged twice, one pixel apart."""
    grid = pixels[::2, ::2]
    top, left = row * (height + 1), column * (width + 1)
    return grid[top : top + height, left : left + width]


def test_examples_are_the_first_ten_of_each_class_in_the_classes_order() -> None:
    labels = torch.tensor([2, 0, 1] * 20)
    images = torch.arange(60, dtype=torch.uint8)[:, None, None].expand(60, 4, 3) * 4
    png = tiles.examples(Examples(images.contiguous(), labels), ("a", "b", "c"))
    grid = opened(png)[:, -(2 * (10 * 4 - 1)) :]
    for row, label in enumerate((0, 1, 2)):
        expected = [int(index) * 4 for index in (labels == label).nonzero()[:10]]
        shown = [int(tile(grid, row, column, 4, 3)[0, 0, 0]) for column in range(10)]
        assert shown == expected


def test_examples_have_the_names_of_their_classes_beside_them() -> None:
    examples = Examples(torch.zeros(4, 28, 28, dtype=torch.uint8), torch.tensor([0, 1, 0, 1]))
    named, unnamed = (opened(tiles.examples(examples, (name, ""))) for name in ("Trouser", ""))
    different = (named != unnamed).any(2)
    assert different[:57].any() and not different[57:].any()
    assert not different[:, 92:].any()  # none over the tiles


def test_a_class_without_examples_has_an_empty_row() -> None:
    examples = Examples(torch.full((3, 2, 2), 200, dtype=torch.uint8), torch.zeros(3).long())
    grid = opened(tiles.examples(examples, ("a", "b")))[:, 92:]
    assert (tile(grid, 0, 2, 2, 2) == 200).all()
    assert (tile(grid, 0, 3, 2, 2) == 0).all() and (tile(grid, 1, 0, 2, 2) == 0).all()


def test_first_layer_of_the_lessons_network() -> None:
    model = mlp.MLP(5, 0.0, (2, 3), 4)
    looks = tiles.first_layer(model, (2, 3))
    weight = next(layer for layer in model if isinstance(layer, nn.Linear)).weight
    assert looks is not None and looks.shape == (5, 2, 3)
    assert np.array_equal(looks.reshape(5, 6), weight.detach().numpy())


@pytest.mark.parametrize("shape", [(28, 28), (3, 28, 28)])
def test_first_filters_of_a_convolutional_network(shape: tuple[int, ...]) -> None:
    model = cnn.CNN([6, 4], input_shape=shape)
    looks = tiles.first_layer(model, shape)
    weight = next(layer for layer in model if isinstance(layer, nn.Conv2d)).weight
    assert looks is not None and np.array_equal(looks, weight.detach().numpy().reshape(-1, 3, 3))
    pixels = opened(tiles.weights(looks))
    assert pixels.shape[0] >= 3 * 8  # each weight is 8 pixels wide


def test_no_picture_of_a_first_layer_that_does_not_see_whole_pictures() -> None:
    convolution = nn.Sequential(nn.Conv2d(1, 2, 1), nn.Flatten(), nn.Linear(4, 2))
    assert tiles.first_layer(convolution, (3, 3)) is None
    assert tiles.first_layer(nn.Sequential(nn.Linear(5, 2)), (2, 3)) is None
    assert tiles.first_layer(nn.Flatten(), (2, 3)) is None
    assert tiles.first_layer(nn.Sequential(nn.Linear(12, 2)), (3, 2, 2)) is None


def test_weights_are_red_above_zero_blue_below_and_white_between() -> None:
    looks = np.zeros((3, 10, 10), np.float32)
    looks[0, 0], looks[1, 0] = 2, -2
    pixels = opened(tiles.weights(looks))
    positive, negative, nothing = (tile(pixels, 0, column, 10, 10) for column in range(3))
    assert (positive[0] == (178, 24, 43)).all() and (negative[0] == (33, 102, 172)).all()
    assert (positive[1:] == 255).all() and (nothing == 255).all()


def test_half_a_weight_is_between_white_and_red() -> None:
    looks = np.full((1, 12, 12), 4, np.float32)
    looks[0, 0, 1] = 2
    pixels = opened(tiles.weights(looks))
    red, middle = pixels[0, 0].astype(int), pixels[0, 2].astype(int)
    assert (abs(middle - (red + 255) / 2) <= 2).all()


def test_one_large_weight_does_not_make_the_others_pale() -> None:
    looks = np.full((4, 20, 20), 1, np.float32)
    looks[0, 0, 0] = 1000
    assert (tile(opened(tiles.weights(looks)), 0, 1, 20, 20) == (178, 24, 43)).all()


def test_weights_stand_in_rows_and_are_wider_than_high() -> None:
    looks = np.zeros((128, 28, 28), np.float32)
    looks[17] = 1
    pixels = opened(tiles.weights(looks))
    assert pixels.shape == (2 * (8 * 29 - 1), 2 * (16 * 29 - 1), 3)
    assert (tile(pixels, 1, 1, 28, 28) == (178, 24, 43)).all()


def test_weights_of_any_number_of_neurons() -> None:
    for neurons in (1, 2, 3, 5, 10, 200, 1000):
        pixels = opened(tiles.weights(np.ones((neurons, 4, 4), np.float32)))
        assert pixels.shape[0] % 2 == 0 and pixels.size
    assert opened(tiles.weights(np.zeros((2, 3, 3), np.float32))).min() == 160  # the line between


def test_at_most_256_neurons_are_drawn() -> None:
    many = tiles.weights(np.ones((100_000, 2, 2), np.float32))
    assert opened(many).shape == opened(tiles.weights(np.ones((256, 2, 2), np.float32))).shape
