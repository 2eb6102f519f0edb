"""Features of a frozen backbone, computed once and kept. An epoch then costs a linear layer.

keras: features = base.predict(X_train), then a Dense layer is fitted to them.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import logging
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fashionnet.data.examples import Examples
from fashionnet.data.folders import default_root
from fashionnet.models.transfer import Transfer
from fashionnet.models.weights import weights_sha256
from fashionnet.system import devices, locks, processes
from fashionnet.system.files import atomic_write
from fashionnet.training.evaluation import batches_of, scaled

log = logging.getLogger(__name__)

NAME = "features.bin"
_VERSION = 2  # of the keys; another one computes all features anew
_DIGEST_BYTES = 32


def inputs(model: nn.Module, examples: Examples, scale: float) -> Examples:
    """Returns examples as the trained part of a model takes them.

    Args:
        model: any network. For a `Transfer` with a frozen backbone, the features of the pictures,
            float32 (N, D), take their place; for others the examples stay as they are.
        scale: divisor of the pixels.
    """
    if isinstance(model, Transfer) and model.is_head_only:
        return extract(model, examples, scale)
    return examples


def extract(model: Transfer, examples: Examples, scale: float) -> Examples:
    """Returns examples with the features that the backbone now computes from their pictures."""
    if not len(examples):
        return examples
    key = _key(model, examples, scale)
    folder = cache_folder() / key
    with contextlib.suppress(OSError):  # without a cache, features are computed each time
        folder.mkdir(parents=True, exist_ok=True)
    path = folder / NAME
    waiting = "another process computes the same features; waiting for it"
    with processes.main_process_first():
        kept = _read(path, key, len(examples))
        if kept is None:
            with locks.in_turn(folder, waiting):
                kept = _read(path, key, len(examples))
                if kept is None:
                    if path.exists():
                        log.warning("%s is damaged: its features are computed again", path)
                    kept = _computed(model, examples, scale).cpu()
                    _write(path, key, kept)
    return Examples(kept.to(examples.labels.device), examples.labels)


def cache_folder() -> Path:
    """Returns the folder of kept features, which may be deleted at any time."""
    return default_root() / "features"


def _key(model: Transfer, examples: Examples, scale: float) -> str:
    """Returns the hash of all that the features depend on."""
    digest = hashlib.sha256()
    normalized = (scale, model.mean.flatten().tolist(), model.std.flatten().tolist())
    network = (type(model).__qualname__, model.library, model.name, _version(model.library))
    facts = (_VERSION, network, model.size, model.head_stages, normalized)
    pictures = (tuple(examples.images.shape), examples.images.dtype)
    digest.update(repr((*facts, pictures, devices.arithmetic(examples.labels.device))).encode())
    digest.update(weights_sha256(model.backbone.state_dict()).encode())
    for part in examples.images.cpu().split(256):  # a map of a file is read piece by piece
        digest.update(part.contiguous().numpy().tobytes())
    return digest.hexdigest()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _digest(key: str, values: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Returns the sha256 of a key and the bytes of its features, as 32 bytes."""
    digest = hashlib.sha256(key.encode())
    digest.update(values.data)
    return np.frombuffer(digest.digest(), np.uint8)


def _read(path: Path, key: str, num: int) -> torch.Tensor | None:
    """Returns kept features, float32 (num, D), or None where there are none or they are damaged."""
    try:
        content = np.fromfile(path, np.uint8)
    except OSError:
        return None
    digest, values = content[:_DIGEST_BYTES], content[_DIGEST_BYTES:]
    if not np.array_equal(digest, _digest(key, values)):
        return None
    return torch.from_numpy(values.view("<f4").reshape(num, -1))


def _write(path: Path, key: str, features: torch.Tensor) -> None:
    """Keeps features, float32 (N, D), behind their digest; warns where they cannot be written."""
    values = features.numpy().astype("<f4", copy=False).reshape(-1).view(np.uint8)
    try:
        with atomic_write(path) as file:
            file.write(_digest(key, values).tobytes())
            file.write(values.data)
    except OSError as error:
        log.warning("The features are not kept: %s cannot be written (%s)", path, error.strerror)


@torch.inference_mode()
def _computed(model: Transfer, examples: Examples, scale: float) -> torch.Tensor:
    was_training = model.training
    model.eval()
    log.info("computing the features of %d pictures, once", len(examples))
    parts: Iterable[torch.Tensor] = batches_of(examples.images)
    if sys.stderr.isatty():
        from tqdm import tqdm

        parts = tqdm(parts, desc="features", unit="batch", leave=False)
    weight = next(model.parameters())
    precision = devices.forward_precision(weight.device)
    with precision, devices.on_all_cores():  # the run's threads are for its small steps
        found = [
            model.features(scaled(part, scale, weight.new_empty(part.shape))) for part in parts
        ]
    model.train(was_training)
    return torch.cat(found)
