"""Networks without their final layer, and where their pretrained weights come from."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fashionnet import extras, seeds
from fashionnet.errors import UserError, first_line, shortened
from fashionnet.torchvision_import import import_torchvision

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
LIBRARIES = ("torchvision", "timm")
_SEQUENCES = ("features", "blocks", "stages", "layers")
_TIMM_NAME = re.compile(r"\w+(\.\w+)?", re.ASCII)  # an architecture, and a tag of its weights
_NAMED = 3  # keys that a misfit names


def build(library: str, name: str) -> tuple[nn.Module, int]:
    """Builds an architecture with random weights and without its final layer.

    Returns:
        The network, (N, 3, H, W) to features (N, D), and D.

    Raises:
        UserError: no such library or architecture, or one that does not end in a Linear layer.
    """
    if not isinstance(name, str):
        raise UserError(f"model.name={shortened(name)} is not a name")
    if library == "torchvision":
        return _torchvision_backbone(name)
    if library == "timm":
        return _timm_backbone(name)
    raise UserError(
        f"model.library={shortened(library)} is not known; choose {' or '.join(LIBRARIES)}"
    )


def _torchvision_backbone(name: str) -> tuple[nn.Module, int]:
    from fashionnet.config import closest

    import_torchvision()
    from torchvision import models

    known = models.list_models(module=models)
    if name not in known:
        near = closest(name, known)
        raise UserError(
            f"model.name={shortened(name)} is no classification model of torchvision{near}"
        )
    network = models.get_model(name, weights=None)
    linears = [key for key, module in network.named_modules() if isinstance(module, nn.Linear)]
    last = linears[-1] if linears else None
    if last is None or name.startswith(("inception", "googlenet", "squeezenet")):
        raise UserError(f"model.name={name} has no final Linear layer that could be replaced")
    parent, _, child = last.rpartition(".")
    holder = network.get_submodule(parent)
    width = int(getattr(holder, child).in_features)
    setattr(holder, child, nn.Identity())
    return network, width


def _timm_backbone(name: str) -> tuple[nn.Module, int]:
    from fashionnet.config import closest

    timm = _timm()
    # timm fetches or opens what is named in other ways: hf-hub:OWNER/NAME, local-dir:FOLDER.
    if not _TIMM_NAME.fullmatch(name) or not timm.is_model(name):
        near = closest(name, timm.list_models())
        raise UserError(f"model.name={shortened(name)} is no model of timm{near}")
    network = timm.create_model(name, num_classes=0)
    return network, int(getattr(network, "head_hidden_size", network.num_features))


def _timm() -> Any:
    try:
        import_torchvision()  # which timm imports, and which may need help
        import timm
    except ImportError:
        raise extras.missing("model.library=timm needs timm", "timm") from None
    return timm


def stages(backbone: nn.Module) -> list[nn.Module]:
    """Returns the parts of a backbone that have weights, from the picture to the features.

    The sequence that torchvision calls `features`, and timm `blocks` or `stages`, counts as its
    own parts.
    """
    found: list[nn.Module] = []
    for name, part in backbone.named_children():
        is_sequence = name in _SEQUENCES and isinstance(part, nn.Sequential)
        found += part.children() if is_sequence else [part]
    return [part for part in found if any(True for _ in part.parameters())]


def load(backbone: nn.Module, source: str, library: str, name: str) -> None:
    """Puts pretrained weights into a backbone; those of a final layer are left out.

    Args:
        source: "imagenet", "run:RUN_DIR", or a file: .safetensors, or what torch.save wrote.

    Raises:
        UserError: the weights cannot be had, read, or do not fit; the message names what is wrong.
    """
    with seeds.preserved():  # a library may build a network of its own to hold them
        state = _read(source, library, name)
    own = backbone.state_dict()
    missing = sorted(own.keys() - state.keys() - _countable(own))
    shapes = [key for key in own.keys() & state.keys() if own[key].shape != state[key].shape]
    if missing or shapes:
        told = f"{len(missing)} keys are missing in it ({', '.join(missing[:_NAMED])}, …)"
        if not missing:
            key = min(shapes)
            told = f"{key} is {tuple(state[key].shape)} there, {tuple(own[key].shape)} here"
        raise UserError(f"model.pretrained={source} holds no weights of {name}: {told}")
    # Other keys in it are the final layer's, or it is of a larger network and was refused above.
    extra = {key.rpartition(".")[0] for key in state.keys() - own.keys()}
    if len(extra) > _NAMED:
        raise UserError(
            f"model.pretrained={source} holds weights of another network than {name}: "
            f"{', '.join(sorted(extra)[:_NAMED])}, … have no place in it"
        )
    backbone.load_state_dict({**own, **{key: state[key] for key in own.keys() & state.keys()}})


def _read(source: str, library: str, name: str) -> dict[str, Tensor]:
    if source == "imagenet":
        return _imagenet(library, name)
    if source.startswith("run:"):
        return _of_run(source.removeprefix("run:"), library, name)
    return read(Path(source).expanduser())


def _countable(state: Mapping[str, Tensor]) -> set[str]:
    """Returns the counters of batches, which old files lack and evaluation does not use."""
    return {key for key in state if key.endswith("num_batches_tracked")}


def read(path: Path) -> dict[str, Tensor]:
    """Reads a file of weights; nothing in it is executed.

    Raises:
        UserError: there is no such file, or it holds anything but named tensors.
    """
    if not path.is_file():
        raise UserError(f"model.pretrained={path}: there is no such file")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state: Any = load_file(path)
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of oddities: it is read, or refused in one line
                state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever damage or malice makes of the readers
        raise UserError(
            f"model.pretrained={path} is damaged, or holds more than named tensors, and was not "
            f"opened: {type(error).__name__}"
        ) from None
    for key in ("state_dict", "model"):
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    if not isinstance(state, Mapping) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in state.items()
    ):
        raise UserError(f"model.pretrained={path} holds no weights by name")
    return {key.removeprefix("module."): value.float() for key, value in state.items()}


def _imagenet(library: str, name: str) -> dict[str, Tensor]:
    """Returns the weights that the library offers; they are fetched once and kept."""
    try:
        if library == "timm":
            network = _timm().create_model(name, pretrained=True)
            return dict(network.state_dict())
        import_torchvision()
        from torchvision import models

        weights = models.get_model_weights(name)["DEFAULT"]
        state: dict[str, Tensor] = weights.get_state_dict(progress=True, check_hash=True)
        return state
    except UserError:
        raise
    except Exception as error:  # of the network, of a cut download, of a hub
        where = _where_to_put(library, name)
        raise UserError(
            f"the ImageNet weights of {name} cannot be fetched ({first_line(error)}); {where}"
        ) from None


def _where_to_put(library: str, name: str) -> str:
    if library == "timm":
        return f"fetch timm/{name} elsewhere and give its file: model.pretrained=PATH"
    from torchvision import models

    url = models.get_model_weights(name)["DEFAULT"].url
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    return f"fetch {url} elsewhere and put it into {folder}, or give it by model.pretrained=PATH"


def _of_run(run_dir: str, library: str, name: str) -> dict[str, Tensor]:
    """Returns the backbone of an earlier run of this package."""
    from fashionnet import runs
    from fashionnet.transfer import Transfer

    run = runs.load(run_dir)
    node = run.config.model
    if not isinstance(run.model, Transfer):
        raise UserError(f"model.pretrained=run:{run_dir} has no backbone: it is of another model")
    if (node.get("library", "torchvision"), node.get("name", "resnet18")) != (library, name):
        raise UserError(
            f"model.pretrained=run:{run_dir} is of {node.get('name')}, this model is {name}"
        )
    return run.model.backbone.state_dict()
