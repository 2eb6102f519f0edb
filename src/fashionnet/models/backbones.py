"""Networks of torchvision and timm without their final layer."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from torch import nn

from fashionnet.errors import UserError, shortened
from fashionnet.system import extras
from fashionnet.system.torchvision_import import import_torchvision

DEFAULT_SIZE = 224
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
LIBRARIES = ("torchvision", "timm")
_SEQUENCES = ("features", "blocks", "stages", "layers")
_TIMM_NAME = re.compile(r"\w+(\.\w+)?", re.ASCII)  # an architecture, and a tag of its weights


@dataclass(frozen=True)
class Input:
    """The pictures that a network was pretrained on.

    Attributes:
        size: side in pixels.
        mean, std: numbers that normalized its pixels, which are in 0..1; one for each channel.
    """

    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


def expected_input(library: str, name: str) -> Input:
    """Returns the input that a library describes for an architecture; builds and fetches nothing.

    Raises:
        UserError: as in `build`.
    """
    if library == "timm":
        timm = _timm(name)
        config = timm.get_pretrained_cfg(name)
        found = timm.data.resolve_data_config(pretrained_cfg=config.to_dict()) if config else {}
        size = found.get("input_size", (3, DEFAULT_SIZE, DEFAULT_SIZE))[-1]
        return Input(size, found.get("mean", IMAGENET_MEAN), found.get("std", IMAGENET_STD))
    preset = _torchvision(library, name).get_model_weights(name)["DEFAULT"].transforms()
    return Input(preset.crop_size[0], tuple(preset.mean), tuple(preset.std))


def build(library: str, name: str) -> tuple[nn.Module, int]:
    """Builds an architecture with random weights and without its final layer.

    Returns:
        The network, (N, 3, H, W) to features (N, D), and D.

    Raises:
        UserError: no such library or architecture, or one that does not end in a Linear layer.
    """
    if library == "timm":
        network = _timm(name).create_model(name, num_classes=0)
        return network, int(getattr(network, "head_hidden_size", network.num_features))
    models = _torchvision(library, name)
    # A vision transformer has weights for each place in a picture of its pretraining's size.
    size = {"image_size": expected_input(library, name).size} if name.startswith("vit_") else {}
    network = models.get_model(name, weights=None, **size)
    linears = [key for key, module in network.named_modules() if isinstance(module, nn.Linear)]
    last = linears[-1] if linears else None
    if last is None or name.startswith(("inception", "googlenet", "squeezenet")):
        raise UserError(f"model.name={name} has no final Linear layer that could be replaced")
    parent, _, child = last.rpartition(".")
    holder = network.get_submodule(parent)
    width = int(getattr(holder, child).in_features)
    setattr(holder, child, nn.Identity())
    return network, width


def _check(name: object) -> None:
    if not isinstance(name, str):
        raise UserError(f"model.name={shortened(name)} is not a name")


def _torchvision(library: str, name: str) -> Any:
    """Returns torchvision's models, if `name` is one of them."""
    from fashionnet.system.spelling import closest

    _check(name)
    if library != "torchvision":
        raise UserError(
            f"model.library={shortened(library)} is not known; choose {' or '.join(LIBRARIES)}"
        )
    import_torchvision()
    from torchvision import models

    known = models.list_models(module=models)
    if name not in known:
        raise UserError(
            f"model.name={shortened(name)} is not a classification model of torchvision"
            f"{closest(name, known)}"
        )
    return models


def _timm(name: str) -> Any:
    """Returns timm, if `name` is one of its models."""
    from fashionnet.system.spelling import closest

    _check(name)
    try:
        import_torchvision()  # which timm imports, and which may need help
        import timm
    except ImportError:
        raise extras.missing("model.library=timm needs timm", "timm") from None
    # timm would fetch or open other forms of a name: hf-hub:OWNER/NAME, local-dir:FOLDER.
    if not _TIMM_NAME.fullmatch(name) or not timm.is_model(name):
        near = closest(name, timm.list_models())
        raise UserError(f"model.name={shortened(name)} is not a model of timm{near}")
    return timm


def stages(backbone: nn.Module) -> list[nn.Module]:
    """Returns the parts of a backbone that have weights, from the picture to the features.

    A sequence called `features` (torchvision), `blocks` or `stages` (timm) counts as its parts.
    """
    found: list[nn.Module] = []
    for name, part in backbone.named_children():
        is_sequence = name in _SEQUENCES and isinstance(part, nn.Sequential)
        found += part.children() if is_sequence else [part]
    return [part for part in found if any(True for _ in part.parameters())]
