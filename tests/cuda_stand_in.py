"""A CUDA that this machine does not have: there, and not initialized.

`install` lets torch say that there is a CUDA device. Whatever needs an initialized CUDA raises, as
it does in a process that has not called `torch.cuda.init` yet.
"""

from __future__ import annotations

import types
from typing import Any

import torch

# What torch answers, or puts off, without an initialized CUDA.
_WITHOUT_CUDA = {
    "device_count",
    "is_available",
    "is_initialized",
    "manual_seed",
    "manual_seed_all",
    "seed",
    "seed_all",
}

calls: list[str] = []  # what was called, in order


def install(num_devices: int = 1) -> None:
    """Puts the stand-in in the place of `torch.cuda`'s functions, for the rest of the process."""
    state = {"initialized": False}

    def init() -> None:
        calls.append("init")
        state["initialized"] = True

    for name, function in list(vars(torch.cuda).items()):
        is_own = isinstance(function, types.FunctionType) and not name.startswith("_")
        if is_own and name not in _WITHOUT_CUDA:
            setattr(torch.cuda, name, _guarded(name, state))
    torch.cuda.init = init
    torch.cuda.is_available = lambda: True
    torch.cuda.device_count = lambda: num_devices
    torch.cuda.is_initialized = lambda: state["initialized"]
    torch.cuda._lazy_init = _guarded("_lazy_init", state)


def _guarded(name: str, state: dict[str, bool]) -> Any:
    def call(*_: object, **__: object) -> None:
        calls.append(name)
        if not state["initialized"]:
            raise RuntimeError(f"torch.cuda.{name}: CUDA is not initialized")

    return call
