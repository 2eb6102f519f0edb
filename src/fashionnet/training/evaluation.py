"""Evaluating a network: logits, loss and accuracy, class probabilities."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fashionnet.data.examples import Examples
from fashionnet.system import devices, processes
from fashionnet.training.metrics import ExampleMetrics, Metrics

_EVALUATION_BATCH = 1000
_EVALUATION_BYTES = 32 * 2**20  # of pictures as floats; activations take many times as much


def scaled(images: Tensor, scale: float, out: Tensor) -> Tensor:
    """Returns `out`, filled with pictures as the model takes them: its dtype, divided by `scale`.

    Features of a frozen backbone, which are floats, are not divided.

    `X / 255.0` of the lesson. The quotient is rounded once, as NumPy's float64 quotient is when
    Keras converts it to float32.
    """
    out.copy_(images)
    return out if scale == 1 or images.is_floating_point() else out.div_(scale)


def dtype_of(model: nn.Module) -> torch.dtype:
    """Returns the dtype of the model's weights, which is that of the pictures it takes."""
    return next(model.parameters()).dtype


def forward(model: nn.Module, x: Tensor) -> Tensor:
    """Returns the model's output for a batch in the run's precision, as float32 or wider."""
    with devices.forward_precision(x.device):
        output: Tensor = model(x)
    is_narrow = isinstance(output, Tensor) and output.dtype in (torch.bfloat16, torch.float16)
    return output.float() if is_narrow else output


@torch.inference_mode()
def logits_of(model: nn.Module, images: Tensor, scale: float) -> Tensor:
    """Returns the model's logits for pictures, with dropout off: float (N, C)."""
    was_training = model.training
    model.eval()
    weight = next(model.parameters())
    parts = [
        forward(model, scaled(part, scale, weight.new_empty(part.shape)))
        for part in batches_of(images)
    ]
    model.train(was_training)
    return torch.cat(parts)


def batches_of(images: Tensor) -> tuple[Tensor, ...]:
    """Returns pictures in batches for evaluation: a thousand, or fewer where they are large."""
    bytes_each = 4 * images[0].numel() if len(images) else 1
    size = max(1, min(_EVALUATION_BATCH, _EVALUATION_BYTES // bytes_each))
    return torch.split(images, size)


def evaluate(model: nn.Module, examples: Examples, scale: float) -> Metrics:
    """Returns loss and accuracy over `examples`, dropout off, as `model.evaluate` does.

    Raises:
        ValueError: there are no examples.
    """
    if not len(examples):
        raise ValueError("there are no examples to evaluate on")
    figures = ExampleMetrics(len(examples), next(model.parameters()))
    own = processes.own_rows(len(examples)).part
    if own.start < own.stop:
        figures.put(own, logits_of(model, examples.images[own], scale), examples.labels[own])
    figures.share(0, len(examples))
    return figures.mean()


def probabilities(model: nn.Module, images: Tensor, scale: float) -> Tensor:
    """Returns the class probabilities of pictures, as `model.predict` of a softmax network does.

    Args:
        images: uint8 (N, 28, 28), on any device.

    Returns:
        float (N, C) on the CPU; each row adds up to 1.
    """
    return torch.softmax(logits_of(model, images, scale), 1).cpu()
