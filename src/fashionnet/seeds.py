"""Independent random streams, each a pure function of the run's seed and a name.

A run draws nothing from a shared generator: the order of epoch e depends on `(seed, e)` alone and
the masks of a dropout layer on `(seed, layer)`, so that neither logging nor validation, nor a
second job in the same process, can shift what another part draws.
"""

from __future__ import annotations

import hashlib
import random

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

    fashionnet's own parts do not draw from them during a fit; initial weights and a user's own
    modules do.
    """
    random.seed(derive(seed, "python"))
    np.random.seed(derive(seed, "numpy") % 2**32)
    torch.manual_seed(derive(seed, "torch"))


def epoch_order(seed: int, epoch: int, num_examples: int) -> Tensor:
    """Returns the order in which 1-based `epoch` visits the examples.

    Returns:
        A permutation, int64 of shape (num_examples,), drawn on the CPU so that every device
        gets the same.
    """
    stream = generator(seed, "order", epoch)
    return torch.randperm(num_examples, generator=stream)
