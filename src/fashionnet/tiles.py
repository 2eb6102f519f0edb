"""Small pictures side by side, as PNG files: examples of each class, weights of the first layer."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import nn

from fashionnet.data import Examples

_GAP = 1  # pixels between tiles
_MOST_TILES = 256
_EXAMPLES_OF_CLASS = 10
_ENLARGED = 2  # pixels of a picture's pixel, each way
_LABEL_WIDTH, _LABEL_SIZE = 92, 14  # pixels


def examples(shown: Examples, class_names: Sequence[str]) -> bytes:
    """Draws the first ten examples of each class, a row for each class, its name beside it.

    Args:
        shown: images uint8 (N, H, W), labels (N,).
    """
    labels, height = shown.labels.cpu(), shown.images.shape[1]
    width = shown.images.shape[2]
    rows = np.zeros((len(class_names), _EXAMPLES_OF_CLASS, height, width), np.uint8)
    for label, row in enumerate(rows):
        chosen = (labels == label).nonzero().flatten()[:_EXAMPLES_OF_CLASS]
        row[: len(chosen)] = shown.images.cpu()[chosen].numpy()
    tiles = _side_by_side(rows.reshape(-1, height, width), _EXAMPLES_OF_CLASS, between=64)
    picture = Image.new("L", (_LABEL_WIDTH + tiles.shape[1], tiles.shape[0]), 255)
    picture.paste(Image.fromarray(tiles), (_LABEL_WIDTH, 0))
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(_LABEL_SIZE)
    step = _ENLARGED * (height + _GAP)
    for place, name in enumerate(class_names):
        draw.text((4, step * (place + 0.5)), name, 0, font, anchor="lm")
    return _png(picture)


def first_layer(model: nn.Module, image_shape: Sequence[int]) -> NDArray[np.float32] | None:
    """Returns the weights that each neuron of the first layer looks at a picture with.

    Returns:
        (neurons, H, W), or None for a model whose first layer with weights is no Linear over all
        pixels of a picture.
    """
    layers = (layer for layer in model.modules() if getattr(layer, "weight", None) is not None)
    first = next(layers, None)
    if not isinstance(first, nn.Linear) or len(image_shape) != 2:
        return None
    if first.in_features != image_shape[0] * image_shape[1]:
        return None
    weights = first.weight.detach().float().cpu().numpy()
    return np.asarray(weights.reshape(-1, *image_shape))


def weights(looks: NDArray[np.float32]) -> bytes:
    """Draws what neurons look for: red where a bright pixel excites one, blue where it inhibits.

    Args:
        looks: (neurons, H, W); all share one scale, whose ends are the largest weight but for the
            hundredth part that is larger still. The first 256 are drawn.
    """
    looks = looks[:_MOST_TILES]
    end = float(np.quantile(np.abs(looks), 0.99)) or 1.0
    shades = np.rint(128 + 127 * np.clip(looks / end, -1, 1)).astype(np.uint8)
    columns = 2 ** math.ceil(math.log2(len(looks)) / 2 + 0.25)  # wider than high
    picture = Image.fromarray(_side_by_side(shades, min(columns, len(looks)), between=0))
    picture.putpalette(_blue_white_red())
    return _png(picture)


def _blue_white_red() -> list[int]:
    """Returns a palette, RGB after RGB: gray for 0, then blue (1) over white (128) to red (255)."""
    blue, white, red = (33, 102, 172), (255, 255, 255), (178, 24, 43)
    places = np.arange(1, 256)
    channels = [
        np.interp(places, (1, 128, 255), ends) for ends in zip(blue, white, red, strict=True)
    ]
    return [160, 160, 160, *(int(value) for value in np.rint(np.stack(channels, 1)).flatten())]


def _side_by_side(tiles: NDArray[np.uint8], columns: int, between: int) -> NDArray[np.uint8]:
    """Returns tiles (N, H, W) as one picture, row by row, with lines of a shade between them."""
    count, height, width = tiles.shape
    rows = -(-count // columns)
    padded = np.full((rows * columns, height + _GAP, width + _GAP), between, np.uint8)
    padded[:count, :height, :width] = tiles
    grid = padded.reshape(rows, columns, height + _GAP, width + _GAP).transpose(0, 2, 1, 3)
    joined = grid.reshape(rows * (height + _GAP), -1)[:-_GAP, :-_GAP]
    return joined.repeat(_ENLARGED, 0).repeat(_ENLARGED, 1)


def _png(picture: Image.Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, "png")
    return file.getvalue()
