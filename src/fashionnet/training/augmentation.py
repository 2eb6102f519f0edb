"""Random changes to training pictures, for any model, on the run's device.

Pictures are as the model takes them, float (N, H, W) or (N, C, H, W), usually in 0..1. What is
random is a function of the run's seed, the epoch and the step, so that nothing of it is in a
checkpoint. It is drawn for a whole batch, so that several processes see what one would see.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fashionnet.config.schema import AugmentationConfig, mixes
from fashionnet.errors import UserError
from fashionnet.models.transfer import Transfer
from fashionnet.system import seeds

# Sides of a rectangle that is erased, as fractions of the picture's.
_LEAST_ERASED, _MOST_ERASED = 0.15, 0.4


@dataclass(frozen=True)
class Mix:
    """The second labels of a batch whose pictures were mixed with one another.

    Attributes:
        labels: int64 (N,), of the picture that was mixed into each.
        fraction: float (), how much of each picture is its own, in 0..1.
    """

    labels: Tensor
    fraction: Tensor


class Augmentation:
    """Changes batches at random, as the configuration's `augmentation` says.

    Args:
        config: how much of each change.
        seed: the run's.
    """

    def __init__(self, config: AugmentationConfig, seed: int) -> None:
        self._config = config
        self._seed = seed

    def __call__(
        self, x: Tensor, labels: Tensor, epoch: int, step: int
    ) -> tuple[Tensor, Mix | None]:
        """Returns a changed copy of a whole batch, and how its pictures were mixed.

        Args:
            x: pictures, float (N, H, W) or (N, C, H, W).
            labels: int64 (N,).
            epoch: 1-based.
            step: within the epoch, from 0.
        """
        config = self._config
        draw = _Draw(seeds.generator(self._seed, "augmentation", epoch, step, device=x.device))
        changed = x.unsqueeze(1) if x.ndim == 3 else x
        mix = None
        if config.flip:
            changed = flipped(changed, config.flip, draw)
        if config.shift or config.crop:
            changed = moved(changed, config.shift, config.crop, draw)
        if config.erase:
            changed = erased(changed, config.erase, draw)
        if mixes(config):
            changed, mix = mixed(changed, labels, config.cutmix, config.mixup, draw)
        return changed.view(x.shape), mix


def build(config: AugmentationConfig, model: nn.Module, seed: int) -> Augmentation | None:
    """Returns the configured augmentation; None where nothing is to change.

    Raises:
        UserError: the model trains on features of pictures, which are computed once.
    """
    if config == AugmentationConfig():
        return None
    if isinstance(model, Transfer) and model.is_head_only:
        raise UserError(
            "augmentation needs a backbone that is trained: model.trained=head computes the "
            "features of each picture once; use augmentation=none, or model.trained=all"
        )
    return Augmentation(config, seed)


class _Draw:
    """Random numbers of one step, on its device."""

    def __init__(self, generator: torch.Generator) -> None:
        self._options: dict[str, Any] = {"generator": generator, "device": generator.device}

    def uniform(self, *shape: int) -> Tensor:
        """Returns floats in 0..1, without 1."""
        return torch.rand(shape, **self._options)

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        """Returns int64 in low..high, the ends included."""
        return torch.randint(low, high + 1, shape, **self._options)

    def rectangles(self, heights: Tensor, widths: Tensor, sides: torch.Size) -> Tensor:
        """Returns where rectangles of these sizes lie, each at random within its picture.

        Args:
            heights, widths: int64 (N, 1), pixels.
            sides: height and width of a picture.

        Returns:
            bool (N, 1, H, W), true inside the rectangle.
        """
        spans = []
        for length, side in zip((heights, widths), sides, strict=True):
            start = (self.uniform(len(length), 1) * (side - length + 1)).long()
            places = torch.arange(side, device=length.device)
            spans.append((start <= places) & (places < start + length))
        return spans[0][:, None, :, None] & spans[1][:, None, None, :]


def flipped(x: Tensor, probability: float, draw: _Draw) -> Tensor:
    """Returns pictures, each mirrored left to right with a probability."""
    chosen = draw.uniform(len(x)) < probability
    return torch.where(chosen.view(-1, 1, 1, 1), x.flip(-1), x)


def moved(x: Tensor, shift: float, crop: float, draw: _Draw) -> Tensor:
    """Returns random squares of pictures, enlarged to the whole, and shifted.

    A square has 1 - `crop` to 1 of the picture's sides. A shift is of whole pixels, up to `shift`
    of the sides each way; the picture's edges are continued. Both happen in one interpolation.
    """
    num, (high, wide) = len(x), x.shape[-2:]
    zoom = 1 - crop * draw.uniform(num, 1)
    places = []
    for side in (
        wide,
        high,
    ):  # a picture goes from -1 to 1, and the centers of its pixels to `edge`
        edge, most = 1 - 1 / side, round(shift * side)
        pixels = draw.integers(-most, most, num, 1)
        center = (2 * draw.uniform(num, 1) - 1) * (1 - zoom) + 2 * pixels / side
        own = torch.linspace(-edge, edge, side, device=x.device)
        places.append((zoom * own + center).clamp(-edge, edge).to(x.dtype))
    across, down = places[0][:, None, :], places[1][:, :, None]
    grid = torch.stack((across.expand(num, high, wide), down.expand(num, high, wide)), 3)
    return F.grid_sample(x, grid, align_corners=False)


def erased(x: Tensor, probability: float, draw: _Draw) -> Tensor:
    """Returns pictures, in each of which a random rectangle becomes noise with a probability.

    Source: Zhong et al. 2020, Random Erasing Data Augmentation.
    """
    heights, widths = (
        draw.integers(round(_LEAST_ERASED * side), round(_MOST_ERASED * side), len(x), 1)
        for side in x.shape[-2:]
    )
    chosen = draw.uniform(len(x)) < probability
    inside = draw.rectangles(heights, widths, x.shape[-2:]) & chosen.view(-1, 1, 1, 1)
    return torch.where(inside, draw.uniform(*x.shape).to(x.dtype), x)


def mixed(
    x: Tensor, labels: Tensor, cutmix: float, mixup: float, draw: _Draw
) -> tuple[Tensor, Mix]:
    """Returns a batch whose pictures are mixed with one another, with a probability.

    Each takes something of the picture before it, which is a random one: with probability `cutmix`
    a rectangle, of one place in all and of the picture's own proportions; with probability `mixup`
    a fraction of every pixel. How much a picture keeps is uniform in 0..1, Beta(1, 1). All of it is
    computed on the device, which nothing waits for.

    Source: Yun et al. 2019, CutMix; Zhang et al. 2018, mixup.
    """
    kind, taken = draw.uniform(), draw.uniform()
    heights, widths = ((taken.sqrt() * side).round().long().view(1, 1) for side in x.shape[-2:])
    is_cut, is_blended = kind < cutmix, (cutmix <= kind) & (kind < cutmix + mixup)
    inside = draw.rectangles(heights, widths, x.shape[-2:])
    weight = torch.where(is_cut, inside.to(x.dtype), (is_blended * taken).to(x.dtype))
    own = torch.where(is_cut, 1 - inside.float().mean(), 1 - is_blended * taken)
    return torch.lerp(x, x.roll(1, 0), weight), Mix(labels.roll(1, 0), own)
