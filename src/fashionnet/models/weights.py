"""A model's weights as values: counted, hashed, copied, checked."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn


def num_parameters(model: nn.Module) -> int:
    """Returns the number of numbers in the model's parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


def weights_sha256(state: Mapping[str, Tensor]) -> str:
    """Returns the hash of a model's state: sorted names, dtypes, shapes and little-endian bytes."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        values = (
            tensor.numpy() if tensor.dtype != torch.bfloat16 else tensor.view(torch.int16).numpy()
        )
        digest.update(values.astype(values.dtype.newbyteorder("<"), copy=False).tobytes())
    return digest.hexdigest()


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """Returns a copy of the model's state that later steps do not change."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def all_finite(model: nn.Module) -> bool:
    """Returns whether every weight of the model is a finite number."""
    return all(bool(torch.isfinite(p).all()) for p in model.parameters())
