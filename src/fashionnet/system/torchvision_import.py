"""torchvision, also beside a torch that its compiled operators were not built for."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

import torch

_MISSING_SCHEMA = "operator torchvision::nms does not exist"

# A Library takes its definitions back when it is collected, so the module keeps it.
_schemas: list[torch.library.Library] = []


def import_torchvision() -> ModuleType:
    """Imports torchvision, with the schemas of its operators declared where they are missing.

    A torchvision built for CUDA cannot load its operators beside a CPU-only torch, and its import
    fails at the first schema it then misses (pytorch/vision#9085). Its datasets, models and
    transforms use none of these operators.

    Returns:
        The module `torchvision`.

    Raises:
        ImportError: torchvision is not installed.
    """
    try:
        return importlib.import_module("torchvision")
    except RuntimeError as error:
        if _MISSING_SCHEMA not in str(error) or _schemas:
            raise
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]  # what the failed import left half done
    library = torch.library.Library("torchvision", "DEF")
    for operator in ("nms", "qnms"):
        library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _schemas.append(library)
    return importlib.import_module("torchvision")
