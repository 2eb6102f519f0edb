"""Small pictures side by side, as PNG files: examples of each class, weights of the first layer."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import nn

from fashionnet.data.examples import Examples
from fashionnet.errors import visible

_GAP = 1  # pixels between tiles
_MOST_TILES = 256
_EXAMPLES_OF_CLASS = 10
_ENLARGED = 2  # pixels of a picture's pixel, each way
_LEAST_SIDE = 24  # pixels of a tile's longer side, e.g. of a filter, enlarged
_THUMBNAIL = 48  # pixels of a side, at most, before it is enlarged
_LABEL_WIDTH, _LABEL_SIZE = 92, 14  # pixels


def examples(shown: Examples, class_names: Sequence[str]) -> bytes:
    """Draws the first ten examples of each class in a row beside its name.

    Args:
        shown: images uint8 (N, H, W) or (N, 3, H, W), labels (N,).
    """
    labels = shown.labels.cpu()
    looks = []
    for label in range(len(class_names)):
        chosen = (labels == label).nonzero().flatten()[:_EXAMPLES_OF_CLASS]
        row = [_thumbnail(image.cpu().numpy()) for image in shown.images[chosen.to(labels.device)]]
        looks.append(row)
    shape = next(look.shape for row in looks for look in row)
    for row in looks:
        row.extend([np.zeros(shape, np.uint8)] * (_EXAMPLES_OF_CLASS - len(row)))
    tiles = _side_by_side(np.stack([look for row in looks for look in row]), _EXAMPLES_OF_CLASS, 64)
    picture = Image.fromarray(tiles)
    labeled = Image.new(picture.mode, (_LABEL_WIDTH + picture.width, picture.height), "white")
    labeled.paste(picture, (_LABEL_WIDTH, 0))
    draw, font = ImageDraw.Draw(labeled), ImageFont.load_default(_LABEL_SIZE)
    step = _ENLARGED * (shape[0] + _GAP)
    for place, name in enumerate(class_names):
        draw.text((4, step * (place + 0.5)), visible(name), "black", font, anchor="lm")
    return _png(labeled)


def _thumbnail(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Returns a picture (H, W) or (3, H, W) as a small one, (h, w) or (h, w, 3)."""
    if image.ndim == 3:
        image = image.transpose(1, 2, 0)
    if max(image.shape[:2]) <= _THUMBNAIL:
        return image
    small = Image.fromarray(np.ascontiguousarray(image))
    small.thumbnail((_THUMBNAIL, _THUMBNAIL))
    return np.asarray(small)


def first_layer(model: nn.Module, image_shape: Sequence[int]) -> NDArray[np.float32] | None:
    """Returns the weights of the first layer: of each neuron in the shape of a picture, or filters.

    Returns:
        (neurons, H, W) or, of a convolution, (filters · channels, height, width). None for a model
        whose first layer with weights is not a Linear over all pixels of a picture, nor a
        convolution of them with filters of several pixels.
    """
    layers = (layer for layer in model.modules() if getattr(layer, "weight", None) is not None)
    first = next(layers, None)
    if isinstance(first, nn.Conv2d) and max(first.kernel_size) > 1:
        shape: Sequence[int] = first.kernel_size
    elif isinstance(first, nn.Linear) and first.in_features == math.prod(image_shape):
        shape = image_shape
    else:
        return None
    if len(shape) != 2:  # a neuron that sees colors
        return None
    return np.asarray(first.weight.detach().float().cpu().numpy().reshape(-1, *shape))


def weights(looks: NDArray[np.float32]) -> bytes:
    """Draws the weights of neurons: red where they are positive, blue where negative.

    Args:
        looks: (neurons, H, W), of which the first 256 are drawn. All share one scale, which ends
            at the 99th percentile of the absolute weights.
    """
    looks = looks[:_MOST_TILES]
    end = float(np.quantile(np.abs(looks), 0.99)) or 1.0
    shades = np.rint(128 + 127 * np.clip(looks / end, -1, 1)).astype(np.uint8)
    columns = 2 ** math.ceil(math.log2(len(looks)) / 2 + 0.25)  # wider than high
    enlarged = max(_ENLARGED, _LEAST_SIDE // max(looks.shape[1:]))
    picture = Image.fromarray(_side_by_side(shades, min(columns, len(looks)), 0, enlarged))
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


def _side_by_side(
    tiles: NDArray[np.uint8], columns: int, between: int, enlarged: int = _ENLARGED
) -> NDArray[np.uint8]:
    """Returns tiles (N, H, W[, 3]) as one picture, row by row, with lines of a shade between."""
    count, height, width, *channels = tiles.shape
    rows, step = -(-count // columns), (height + _GAP, width + _GAP)
    padded = np.full((rows * columns, *step, *channels), between, np.uint8)
    padded[:count, :height, :width] = tiles
    grid = padded.reshape(rows, columns, *step, *channels).swapaxes(1, 2)
    joined = grid.reshape(rows * step[0], columns * step[1], *channels)[:-_GAP, :-_GAP]
    return joined.repeat(enlarged, 0).repeat(enlarged, 1)


def _png(picture: Image.Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, "png")
    return file.getvalue()
