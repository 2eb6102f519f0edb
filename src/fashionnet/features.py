"""Features of a frozen backbone, computed once and kept: an epoch then costs a linear layer.

keras: features = base.predict(X_train), then a Dense layer is fitted to them.
"""

from __future__ import annotations

import hashlib
import logging
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch import nn

from fashionnet import ranks, runtime
from fashionnet.checkpoint import weights_sha256
from fashionnet.data import Examples, default_root
from fashionnet.files import atomic_write
from fashionnet.loop import batches_of, dtype_of, scaled
from fashionnet.transfer import Transfer

log = logging.getLogger(__name__)

_VERSION = 1  # of what a key stands for


def seen(model: nn.Module, examples: Examples, scale: float) -> Examples:
    """Returns examples as the trained part of a model sees them.

    Args:
        model: where it is a `Transfer` with a frozen backbone, the features of the pictures,
            float32 (N, D), take their place; else the examples are returned as they are.
        scale: pixels are divided by this.
    """
    if isinstance(model, Transfer) and model.is_head_only:
        return of(model, examples, scale)
    return examples


def of(model: Transfer, examples: Examples, scale: float) -> Examples:
    """Returns examples with what the backbone, as it stands, makes of their pictures."""
    if not len(examples):
        return examples
    path = cache_folder() / f"{_key(model, examples, scale)}.npy"
    with ranks.first_before_others():
        kept = _read(path, len(examples))
        if kept is None:
            kept = _computed(model, examples, scale)
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(path) as file:
                np.save(file, kept.cpu().numpy())
    return Examples(kept.to(examples.images.device), examples.labels)


def cache_folder() -> Path:
    """Returns where features are kept; the folder may be deleted at any time."""
    return default_root() / "features"


def _key(model: Transfer, examples: Examples, scale: float) -> str:
    """Returns the hash of all that the features depend on."""
    digest = hashlib.sha256()
    normalised = (scale, model.mean.flatten().tolist(), model.std.flatten().tolist())
    pictures = (tuple(examples.images.shape), examples.images.device.type)
    arithmetic = (str(model.precision), torch.__version__, runtime.num_cores())
    said = (_VERSION, model.size, model.head_stages, normalised, pictures, arithmetic)
    digest.update(repr(said).encode())
    digest.update(weights_sha256(model.backbone.state_dict()).encode())
    for part in examples.images.cpu().split(256):  # a map of a file is read piece by piece
        digest.update(part.contiguous().numpy().tobytes())
    return digest.hexdigest()


def _read(path: Path, num: int) -> torch.Tensor | None:
    """Returns kept features, or None where there are none that are sound."""
    try:
        values = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    sound = values.dtype == np.float32 and values.ndim == 2 and len(values) == num
    return torch.from_numpy(values) if sound else None


@torch.inference_mode()
def _computed(model: Transfer, examples: Examples, scale: float) -> torch.Tensor:
    was_training = model.training
    model.eval()
    log.info("computing the features of %d pictures, once", len(examples))
    parts: Iterable[torch.Tensor] = batches_of(examples.images)
    if sys.stderr.isatty():
        from tqdm import tqdm

        parts = tqdm(parts, desc="features", unit="batch", leave=False)
    dtype = dtype_of(model)
    with runtime.on_all_cores():  # the run's threads are for its small steps
        found = [
            model.features(scaled(part, scale, torch.empty_like(part, dtype=dtype)))
            for part in parts
        ]
    model.train(was_training)
    return torch.cat(found)
