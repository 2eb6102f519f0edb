"""Checkpoints: plain tensors and numbers, written whole or not at all, read without unpickling."""

from __future__ import annotations

import hashlib
import io
import logging
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fashionnet.errors import UserError
from fashionnet.files import atomic_write

log = logging.getLogger(__name__)

LAST, PREVIOUS, BEST = "last.pt", "previous.pt", "best.pt"


def save(state: Mapping[str, Any], path: Path) -> None:
    """Writes `state` to `path` atomically; a `last.pt` that was there stays as `previous.pt`."""
    path.parent.mkdir(exist_ok=True)
    with atomic_write(path) as file:
        whole = io.BytesIO()  # torch tells a full disk as a RuntimeError
        torch.save(dict(state), whole)
        file.write(whole.getbuffer())
        if path.name == LAST and path.exists():
            file.flush()
            os.fsync(file.fileno())  # between the two renames nothing may fail
            os.replace(path, path.with_name(PREVIOUS))


def load(path: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Reads a checkpoint onto `device`; only tensors and plain values are ever built.

    Raises:
        UserError: the file is missing, damaged, or holds anything else.
    """
    try:
        with zipfile.ZipFile(path) as archive:  # torch does not look at the checksums
            if (damaged := archive.testzip()) is not None:
                raise UserError(f"{path} is damaged: the checksum of {damaged} is wrong")
        state = torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path} is missing: the run wrote no checkpoint yet") from None
    except UserError:
        raise
    except Exception as error:  # torch raises whatever a damaged pickle makes it trip over
        raise UserError(f"{path} is damaged or no checkpoint: {_first_line(error)}") from None
    if not isinstance(state, dict) or "model" not in state:
        raise UserError(f"{path} is no checkpoint of this package")
    return state


def load_newest(folder: Path) -> dict[str, Any] | None:
    """Returns the newest sound checkpoint of a run, or None if it wrote none.

    A damaged `last.pt` is named in a warning and the one before it is taken.

    Raises:
        UserError: there are checkpoints, and none is sound.
    """
    problems = []
    for path in (folder / LAST, folder / PREVIOUS):
        if path.exists():
            try:
                return load(path)
            except UserError as error:
                problems.append(str(error))
                log.warning("%s; trying the one before it", error)
    if problems:
        raise UserError(f"{'; '.join(problems)}; overwrite=true starts the run anew")
    return None


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


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
