"""A model's weights as values: counted, hashed, copied, checked."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn


def num_parameters(model: nn.Module) -> int:
    """Returns the number of numbers in the model's parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


def weights_sha256(state: Mapping[str, Tensor]) -> str:
    """Returns the hash of a model's state: sorted names, dtypes, shapes and little-endian bytes."""
    digest = hashlib.sha256()
    copied = on_host(dict(state))
    for name in sorted(state):
        tensor = copied[name].detach().contiguous()
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
    return bool(torch.stack([p.isfinite().all() for p in model.parameters()]).all())


def on_host(state: Any) -> Any:
    """Returns a state, nested dicts and lists, with the tensors of another device on the CPU.

    The device is waited for once for each dtype, where a copy of each tensor would wait each time.
    """
    away: dict[torch.dtype, dict[int, Tensor]] = {}
    for tensor in _tensors(state):
        if tensor.device.type != "cpu":
            away.setdefault(tensor.dtype, {})[id(tensor)] = tensor
    copies: dict[int, Tensor] = {}
    for tensors in away.values():
        copies |= zip(tensors, joined_copies(list(tensors.values())), strict=True)
    return _replaced(state, copies)


def joined_copies(tensors: list[Tensor]) -> list[Tensor]:
    """Returns copies on the CPU of tensors of one dtype and device, moved as one."""
    flat = torch.cat([tensor.detach().reshape(-1) for tensor in tensors]).cpu()
    parts = flat.split([tensor.numel() for tensor in tensors])
    return [part.clone().view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


def _tensors(state: Any) -> Iterator[Tensor]:
    if isinstance(state, Tensor):
        yield state
    elif isinstance(state, dict | list):
        for part in state.values() if isinstance(state, dict) else state:
            yield from _tensors(part)


def _replaced(state: Any, copies: Mapping[int, Tensor]) -> Any:
    if isinstance(state, Tensor):
        return copies.get(id(state), state)
    if isinstance(state, dict):
        replaced = copy.copy(state)  # with the attributes of a model's state
        replaced.update((key, _replaced(part, copies)) for key, part in state.items())
        return replaced
    return [_replaced(part, copies) for part in state] if isinstance(state, list) else state
