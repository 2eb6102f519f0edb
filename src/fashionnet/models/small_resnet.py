"""A residual network that is small and shallow enough to be trained in seconds on a CPU."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv2d_input

from fashionnet.errors import UserError, shortened

_PATCH, _STRIDE = 4, 2  # pixels of the first layer's filters, and from one to the next
_MOST_CHANNELS = 4096
_SMALL = 8  # pixels of a side up to which swapping pictures and channels is faster, in bfloat16


class SmallResNet(nn.Module):
    """Fixed cosine filters, then stages of 3 x 3 convolutions with batch normalization.

    The first layer takes pictures to half of their size. Its filters are the cosine patterns of
    4 x 4 pixels and their negatives, scaled so that each responds about as strongly as the others
    to a photo, in which fine patterns are faint. That is close to what whitening gives; they are
    not trained, which saves their gradients and those of the second layer's input.

    The first stage is a convolution whose result is halved by maxima before it is normalized, which
    saves time. Each further stage is a convolution and another one that adds to what the first
    found; it halves the picture unless it is the last. The maximum over the picture goes into a
    dense layer. `widths=[48, 96, 192]` has 639,594 parameters and needs 13 million multiplications
    for a picture of 28 x 28.

    In evaluation the logits are the mean of those of the picture and of its mirror image.

    Input: float (N, H, W) or (N, 3, H, W), usually in 0..1; output: logits, float (N, num_classes).

    Args:
        widths: number of channels of each stage.
        mirrored: whether evaluation looks at mirror images as well.
        input_shape: shape of one picture, (H, W) or (3, H, W).
        num_classes: number of logits.

    Raises:
        UserError: a number of channels out of range, or pictures too small for so many stages.

    Source: He et al. 2016, "Deep Residual Learning"; a fixed first layer after Jordan 2024, "94% on
    CIFAR-10 in 3.29 Seconds on a Single GPU".
    """

    def __init__(
        self,
        widths: Sequence[int] = (48, 96, 192),
        mirrored: bool = True,
        input_shape: Sequence[int] = (28, 28),
        num_classes: int = 10,
    ) -> None:
        super().__init__()
        given: list[Any] = list(widths) if isinstance(widths, list | tuple) else [widths]
        if not given or not all(type(width) is int for width in given):
            raise UserError(f"model.widths={shortened(widths)} must be a list of channel numbers")
        if not all(1 <= width <= _MOST_CHANNELS for width in given):
            raise UserError(
                f"model.widths={shortened(widths)}: each stage has 1 to {_MOST_CHANNELS} channels"
            )
        if min(input_shape[-2:]) < _STRIDE * 2 ** max(1, len(given) - 1):
            raise UserError(
                f"model.widths={shortened(widths)} makes {len(given)} stages, too many for "
                f"pictures of {input_shape[-2]} x {input_shape[-1]} pixels"
            )
        self.mirrored = mirrored
        self.is_gray = len(input_shape) == 2
        channels = 1 if self.is_gray else input_shape[0]
        layers: list[nn.Module] = [_cosines(channels), nn.ReLU()]
        channels *= 2 * _PATCH**2
        for number, width in enumerate(given):
            layers += [nn.MaxPool2d(2)] if number > 1 else []
            layers += [_convolution(channels, width, halves=not number)]
            layers += [_Residual(_convolution(width, width))] if number else []
            channels = width
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(channels, num_classes)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, x: Tensor) -> Tensor:
        """Returns the logits; in evaluation the mean over a picture and its mirror image."""
        if self.training or not self.mirrored:
            return self._logits(x)
        return (self._logits(x) + self._logits(x.flip(-1))) / 2

    def _logits(self, x: Tensor) -> Tensor:
        pictures = x.unsqueeze(1) if self.is_gray else x
        found = self.features(pictures.contiguous(memory_format=torch.channels_last))
        logits: Tensor = self.head(found.amax((2, 3)))
        return logits


class _Residual(nn.Module):
    """Adds to its input what a layer makes of it."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = x + self.layer(x)
        return found


class _Convolution(nn.Conv2d):
    """A 3 x 3 convolution that keeps the size, whose weights get their gradients fast on a CPU."""

    def __init__(self, channels: int, filters: int) -> None:
        super().__init__(channels, filters, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Returns the convolution, (N, filters, H, W)."""
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
        small = _SMALL if dtype == torch.bfloat16 else _SMALL // 2
        if not (self.training and x.is_cpu) or max(x.shape[-2:]) > small:
            return super().forward(x)
        found: Tensor = _Convolve.apply(x.to(dtype), self.weight.to(dtype))  # type: ignore[no-untyped-call]
        return found


class _Convolve(torch.autograd.Function):
    """A 3 x 3 convolution; its weights' gradient is itself computed as a convolution.

    The gradient of a filter's weight is a sum, over pictures and pixels, of the input times the
    gradient of the output. Such a sum is a convolution too: its pictures are the channels, its
    channels are the pictures, and its filters are the gradients of the output. For pictures of
    3 x 3 pixels oneDNN computes it two to three times faster than it computes weight gradients.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        """Returns the convolution of pictures (N, I, H, W) with weights (O, I, 3, 3)."""
        ctx.save_for_backward(x, weight)
        return F.conv2d(x, weight, padding=1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor]:
        """Returns the gradients of the pictures and of the weights."""
        (x, weight), (gradient,) = ctx.saved_tensors, gradients
        of_x = None
        if ctx.needs_input_grad[0]:
            of_x = conv2d_input(x.shape, weight, gradient, padding=1)
        pictures, filters = (tensor.transpose(0, 1).contiguous() for tensor in (x, gradient))
        return of_x, F.conv2d(pictures, filters, padding=1).transpose(0, 1)


def _convolution(channels: int, filters: int, halves: bool = False) -> nn.Sequential:
    """Returns a 3 x 3 convolution, a maximum over 2 x 2 pixels if it halves, norm and ReLU."""
    layers: list[nn.Module] = [_Convolution(channels, filters)]
    layers += [nn.MaxPool2d(2)] if halves else []
    return nn.Sequential(*layers, nn.BatchNorm2d(filters), nn.ReLU())


def _cosines(channels: int) -> nn.Conv2d:
    """Returns the first layer: of each channel all cosine patterns and their negatives.

    The pattern of frequencies u and v has the norm (1 + 2 u)(1 + 2 v) of the constant one's, about
    what makes them respond equally to the pictures of Fashion-MNIST.
    """
    pixels, frequencies = torch.arange(_PATCH) + 0.5, torch.arange(_PATCH)
    waves = torch.cos(math.pi / _PATCH * frequencies[:, None] * pixels)
    waves *= ((1 + 2 * frequencies) / waves.norm(dim=1))[:, None]
    patterns = torch.einsum("ui,vj->uvij", waves, waves).flatten(0, 1)
    patterns = torch.cat([patterns, -patterns])  # (2 P², P, P)
    layer = nn.Conv2d(channels, channels * len(patterns), _PATCH, _STRIDE, 1, bias=False)
    layer.weight.requires_grad_(False).zero_()
    for channel in range(channels):
        part = slice(channel * len(patterns), (channel + 1) * len(patterns))
        layer.weight[part, channel] = patterns
    return layer
