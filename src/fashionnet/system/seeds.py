"""Independent random streams, each a pure function of the run's seed and a name.

No part of a run draws from a shared generator. The order of epoch e depends on `(seed, e)` alone
and the masks of a dropout layer on `(seed, layer)`, so that logging, validation or a second job in
the same process cannot change the numbers of another part.
"""

from __future__ import annotations

import contextlib
import hashlib
import random
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor


def derive(seed: int, *names: str | int) -> int:
    """Returns the 63-bit seed of the stream called `names` of a run's `seed`."""
    text = "/".join(str(part) for part in (seed, *names))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def generator(seed: int, *names: str | int, device: torch.device | str = "cpu") -> torch.Generator:
    """Returns a generator on `device` at the start of the stream called `names`."""
    return torch.Generator(device).manual_seed(derive(seed, *names))


def seed_everything(seed: int) -> None:
    """Seeds the global generators of Python, NumPy and torch (every device).

    Initial weights and users' own modules draw from them; fashionnet's parts do not during a fit.
    """
    random.seed(derive(seed, "python"))
    np.random.seed(derive(seed, "numpy") % 2**32)
    torch.manual_seed(derive(seed, "torch"))


def global_state(device: torch.device) -> dict[str, Any]:
    """Returns the state of the global generators as tensors and numbers, for a checkpoint.

    Users' own modules draw from them, e.g. `torch.nn.Dropout`.

    Args:
        device: the run's device; of torch's generators, the state holds the CPU's and this
            device's. No other device is touched.
    """
    version, words, gauss = random.getstate()
    numpy = np.random.get_state(legacy=False)
    return {
        "python": {"version": version, "words": torch.tensor(words), "gauss": gauss},
        "numpy": {
            "keys": torch.from_numpy(numpy["state"]["key"].astype(np.int64)),
            "position": numpy["state"]["pos"],
            "has_gauss": numpy["has_gauss"],
            "gauss": numpy["gauss"],
        },
        "torch": torch.get_rng_state(),
        "device": None if device.type == "cpu" else _library(device).get_rng_state(*_index(device)),
    }


def load_global_state(state: Mapping[str, Any], device: torch.device) -> None:
    """Restores the state that `global_state` returned.

    Args:
        device: a device of the same type; its index may differ.
    """
    python, numpy = state["python"], state["numpy"]
    random.setstate((python["version"], tuple(python["words"].tolist()), python["gauss"]))
    keys = numpy["keys"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", keys, numpy["position"], numpy["has_gauss"], numpy["gauss"]))
    torch.set_rng_state(state["torch"])
    if device.type != "cpu":
        _library(device).set_rng_state(state["device"].cpu(), *_index(device))


def _library(device: torch.device) -> Any:
    """Returns `torch.cuda` or `torch.mps`."""
    return getattr(torch, device.type)


def _index(device: torch.device) -> tuple[torch.device, ...]:
    """Returns the argument that selects one of several devices; MPS has only one."""
    return (device,) if device.type == "cuda" else ()


@contextlib.contextmanager
def preserved() -> Iterator[None]:
    """Restores the global generators after the body.

    Loading weights must not change a run's streams, and reading a run must not change the caller's.
    CUDA's generators are restored if CUDA is initialized; this never initializes it.
    """
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        if cuda:
            torch.cuda.set_rng_state_all(cuda)


def epoch_order(seed: int, epoch: int, num_examples: int) -> Tensor:
    """Returns the order in which 1-based `epoch` visits the examples.

    Returns:
        A permutation, int64 of shape (num_examples,), drawn on the CPU so that every device
        gets the same.
    """
    stream = generator(seed, "order", epoch)
    return torch.randperm(num_examples, generator=stream)
