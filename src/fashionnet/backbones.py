"""Networks without their final layer, and where their pretrained weights come from."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fashionnet import extras, seeds
from fashionnet.errors import UserError, first_line, shortened
from fashionnet.torchvision_import import import_torchvision

log = logging.getLogger(__name__)

DEFAULT_SIZE = 224
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
LIBRARIES = ("torchvision", "timm")
_SEQUENCES = ("features", "blocks", "stages", "layers")
_TIMM_NAME = re.compile(r"\w+(\.\w+)?", re.ASCII)  # an architecture, and a tag of its weights
_NAMED = 3  # keys that a misfit names
_DEEPEST = 4  # dictionaries in one another in which a file's weights are looked for
# Where a file holds several networks of the same kind, that of these is meant.
_USUAL = ("state_dict.", "model_state_dict.", "model.")
_SAVE = "save the weights alone: torch.save(model.state_dict(), FILE)"
_SECONDS_TO_HUB = 5.0


@dataclass(frozen=True)
class Input:
    """The pictures that a network was pretrained on.

    Attributes:
        size: pixels of a side.
        mean, std: what its pixels, 0..1, were normalized with, a number a channel.
    """

    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


def expected_input(library: str, name: str) -> Input:
    """Returns what its library says of an architecture's pretraining; nothing is built or fetched.

    Raises:
        UserError: as `build`.
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
    # A vision transformer has weights for each place in a picture of the pretraining's size.
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
    from fashionnet.refusals import closest

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
    from fashionnet.refusals import closest

    _check(name)
    try:
        import_torchvision()  # which timm imports, and which may need help
        import timm
    except ImportError:
        raise extras.missing("model.library=timm needs timm", "timm") from None
    # timm fetches or opens what is named in other ways: hf-hub:OWNER/NAME, local-dir:FOLDER.
    if not _TIMM_NAME.fullmatch(name) or not timm.is_model(name):
        near = closest(name, timm.list_models())
        raise UserError(f"model.name={shortened(name)} is not a model of timm{near}")
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
        UserError: the weights cannot be had, read, or do not fit, or are not finite numbers; the
            message names what is wrong.
    """
    with seeds.preserved():  # a library may build a network of its own to hold them
        state = _read(source, library, name)
    own = backbone.state_dict()
    state = _named_as(own, state, source)
    missing = sorted(own.keys() - state.keys() - _countable(own))
    if missing:
        raise UserError(
            f"model.pretrained={source} holds no weights of {name}: {len(missing)} keys are "
            f"missing in it ({', '.join(missing[:_NAMED])}, …)"
        )
    # Other keys in it are the final layer's, or it is of a larger network and is refused.
    extra = {key.rpartition(".")[0] for key in state.keys() - own.keys()}
    if len(extra) > _NAMED:
        raise UserError(
            f"model.pretrained={source} holds weights of another network than {name}: "
            f"{', '.join(sorted(extra)[:_NAMED])}, … have no place in it"
        )
    found = {key: _sound(key, state[key], own[key], source, name) for key in own if key in state}
    backbone.load_state_dict({**own, **found})


def _read(source: str, library: str, name: str) -> dict[str, Tensor]:
    if source == "imagenet":
        return _imagenet(library, name)
    if source.startswith("run:"):
        return _of_run(source, library, name)
    return read(Path(os.path.expanduser(source)))


def _named_as(
    own: Mapping[str, Tensor], state: Mapping[str, Tensor], source: str
) -> dict[str, Tensor]:
    """Returns those weights of `state` that belong to one network, under the names of `own`.

    Wrappers put something before every name: `module.`, `model.backbone.`, `state_dict.`; a
    compiled module also within it. What that is, the names themselves show.
    """
    state = {key.replace("_orig_mod.", ""): value for key, value in state.items()}
    needed = own.keys() - _countable(own)
    longest = max(needed, key=len)
    before = {key.removesuffix(longest) for key in state if key.endswith("." + longest)} | {""}
    counts = {prefix: sum(prefix + key in state for key in needed) for prefix in sorted(before)}
    whole = [prefix for prefix, count in counts.items() if count == len(needed)]
    if len(whole) > 1:
        usual = [prefix for prefix in whole if prefix.startswith(_USUAL)]
        if "" not in whole and len(usual) != 1:
            raise UserError(
                f"model.pretrained={source} holds several such networks, "
                f"{', '.join(prefix.rstrip('.') for prefix in whole[:_NAMED])}; save the state "
                "dict of one of them alone"
            )
        whole = [""] if "" in whole else usual
        log.info("Of the networks in %s, %s is taken", source, whole[0].rstrip(".") or "the outer")
    prefix = whole[0] if whole else max(counts, key=lambda each: counts[each])
    return {key.removeprefix(prefix): state[key] for key in state if key.startswith(prefix)}


def _countable(state: Mapping[str, Tensor]) -> set[str]:
    """Returns the counters of batches, which old files lack and evaluation does not use."""
    return {key for key in state if key.endswith("num_batches_tracked")}


def _sound(key: str, value: Tensor, own: Tensor, source: str, name: str) -> Tensor:
    """Returns a tensor of a file as a weight like `own`.

    Raises:
        UserError: it is of another shape, or not made of finite numbers that lie in memory.
    """
    problem = None
    if value.is_meta:
        problem = "has a shape and no values, a meta tensor"
    elif value.is_quantized:
        problem = "is quantized"
    elif value.layout != torch.strided or value.is_nested:
        problem = "is sparse or nested"
    elif value.shape != own.shape:
        raise UserError(
            f"model.pretrained={source} holds no weights of {name}: {key} is "
            f"{tuple(value.shape)} there, {tuple(own.shape)} here"
        )
    elif own.is_floating_point() and not value.is_floating_point():
        problem = f"is of {str(value.dtype).removeprefix('torch.')}, not of floating point"
    elif value.is_complex():
        problem = "is complex"
    if problem is not None:
        raise UserError(f"model.pretrained={source}: {key} {problem}; {_SAVE}")
    value = value.detach().to(own.dtype)
    if not torch.isfinite(value).all():
        raise UserError(
            f"model.pretrained={source}: {key} holds numbers that are nan or infinite; use a file "
            "of sound weights"
        )
    return value


def read(path: Path) -> dict[str, Tensor]:
    """Reads a file of weights; nothing in it is executed.

    Returns:
        The tensors as they are, by name. The names of those in dictionaries within it begin with
        the dictionary's: `state_dict.conv1.weight`.

    Raises:
        UserError: there is no such file, or it holds anything but named tensors.
    """
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "there is no such file"
        raise UserError(f"model.pretrained={path}: {what}")
    try:
        if path.suffix.lower() == ".safetensors":
            from safetensors.torch import load_file

            state: Any = load_file(path)
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of oddities: it is read, or refused in one line
                state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever damage or malice makes of the readers
        raise UserError(f"model.pretrained={path} {_why(error)}") from None
    found = dict(_flat(state)) if isinstance(state, Mapping) else {}
    if not found:
        raise UserError(f"model.pretrained={path} holds no weights by name; {_SAVE}")
    return found


def _why(error: Exception) -> str:
    """Returns what is wrong with a file that a reader refused; of its text no more than a name."""
    if isinstance(error, OSError) and error.strerror:
        return f"cannot be read: {error.strerror}"
    named = re.search(r"(?:GLOBAL|class) ([\w.]{1,80})", str(error))
    if named or "TorchScript" in str(error):
        what = named[1] if named else "a TorchScript program"
        return f"holds more than named tensors, {what}, and was not opened; {_SAVE}"
    return (
        f"is damaged, or holds more than named tensors, and was not opened: {type(error).__name__}"
    )


def _flat(
    state: Mapping[Any, Any], prefix: str = "", depth: int = 1
) -> Iterator[tuple[str, Tensor]]:
    """Yields the named tensors of a dictionary and of those within it."""
    for key, value in state.items():
        if isinstance(key, str) and isinstance(value, Tensor):
            yield prefix + key, value
        elif isinstance(key, str) and isinstance(value, Mapping) and depth < _DEEPEST:
            yield from _flat(value, f"{prefix}{key}.", depth + 1)


def _imagenet(library: str, name: str) -> dict[str, Tensor]:
    """Returns the weights that the library offers; they are fetched once and kept."""
    try:
        if library == "timm":
            with _hub_in_reach():
                network = _timm(name).create_model(name, pretrained=True, num_classes=0)
            return dict(network.state_dict())
        weights = _torchvision(library, name).get_model_weights(name)["DEFAULT"]
        state: dict[str, Tensor] = weights.get_state_dict(progress=True, check_hash=True)
        return state
    except UserError:
        raise
    except Exception as error:  # of the network, of a cut download, of a hub
        where = _where_to_put(library, name)
        raise UserError(
            f"the ImageNet weights of {name} cannot be fetched ({first_line(error)}); {where}"
        ) from None


@contextlib.contextmanager
def _hub_in_reach() -> Iterator[None]:
    """Lets the hub that timm fetches from be used in the body, or only what was kept of it.

    Out of reach, the hub's own client would try again for a minute, twice, and report each time.
    """
    try:
        from huggingface_hub import constants
        from huggingface_hub.utils import get_session  # type: ignore[attr-defined]
    except ImportError:  # timm then fetches from an address
        yield
        return
    was_offline = constants.HF_HUB_OFFLINE
    try:
        if not was_offline:
            get_session().head(constants.ENDPOINT, timeout=_SECONDS_TO_HUB)
    except Exception:  # of whichever client the hub uses
        constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = was_offline


def _where_to_put(library: str, name: str) -> str:
    if library == "timm":
        return f"fetch timm/{name} elsewhere and give its file: model.pretrained=PATH"
    url = _torchvision(library, name).get_model_weights(name)["DEFAULT"].url
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    return f"fetch {url} elsewhere and put it into {folder}, or give it by model.pretrained=PATH"


def record_of(source: str) -> dict[str, Any]:
    """Returns the record of the run that `source`, "run:RUN_DIR", names.

    Raises:
        UserError: there is none that can be read.
    """
    from fashionnet import record

    try:
        return record.read(_run_dir(source))
    except UserError as error:
        raise UserError(f"model.pretrained={source}: {error}") from error


def _run_dir(source: str) -> Path:
    return Path(os.path.expanduser(source.removeprefix("run:")))


def _of_run(source: str, library: str, name: str) -> dict[str, Tensor]:
    """Returns the backbone of an earlier run of this package."""
    from fashionnet import runs
    from fashionnet.transfer import Transfer

    try:
        run = runs.load(_run_dir(source))
    except UserError as error:
        raise UserError(f"model.pretrained={source}: {error}") from error
    node = run.config.model
    if not isinstance(run.model, Transfer):
        raise UserError(f"model.pretrained={source} has no backbone: it is of another model")
    if (node.get("library", "torchvision"), node.get("name", "resnet18")) != (library, name):
        raise UserError(f"model.pretrained={source} is of {node.get('name')}, this model is {name}")
    return run.model.backbone.state_dict()
