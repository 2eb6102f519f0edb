"""Pretrained weights: a library's, a file's or an earlier run's; read, checked and loaded."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fashionnet.config import targets
from fashionnet.errors import UserError, first_line
from fashionnet.models.backbones import _timm, _torchvision
from fashionnet.models.transfer import Transfer
from fashionnet.runs import saved
from fashionnet.runs.network import run_dir_of
from fashionnet.system import seeds

log = logging.getLogger(__name__)

_NAMED = 3  # keys that a misfit names
_DEEPEST = 4  # dictionaries in one another in which a file's weights are looked for
# Where a file holds several networks of the same kind, that of these is meant.
_USUAL = ("state_dict.", "model_state_dict.", "model.")
_SAVE = "save the weights alone: torch.save(model.state_dict(), FILE)"
_SECONDS_TO_HUB = 5.0


def load_pretrained(model: nn.Module) -> None:
    """Puts pretrained weights into a new model, where it takes such; nothing is drawn.

    Building draws initial weights, from the run's seed alone. Loading comes after it, so that the
    head, and all that is random in the fit, follow the seed and not where weights came from.

    Raises:
        UserError: as `load`.
    """
    if isinstance(model, Transfer) and model.pretrained is not None:
        load(model.backbone, model.pretrained, model.library, model.name)


def load(backbone: nn.Module, source: str, library: str, name: str) -> None:
    """Puts pretrained weights into a backbone; those of a final layer are left out.

    Args:
        source: "imagenet", "run:RUN_DIR", or a file: .safetensors, or what torch.save wrote.

    Raises:
        UserError: the weights cannot be had, read, or do not fit, or are not finite numbers; the
            message names what is wrong.
    """
    with seeds.preserved():  # a library may build a network of its own to hold them
        if source == "imagenet":
            state = _imagenet(library, name)
        elif source.startswith("run:"):
            state = _of_run(source, library, name)
        else:
            state = read(Path(os.path.expanduser(source)))
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
        UserError: the file does not exist, or holds anything but named tensors.
    """
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "the file does not exist"
        raise UserError(f"model.pretrained={path}: {what}")
    try:
        if path.suffix.lower() == ".safetensors":
            from safetensors.torch import load_file

            state: Any = load_file(path)
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of oddities: it is read, or refused in one line
                state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged or hostile file makes the readers raise anything
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
    except Exception:  # any error of the hub's client
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


def _of_run(source: str, library: str, name: str) -> dict[str, Tensor]:
    """Returns the backbone of an earlier run of this package."""
    try:
        run = saved.read(run_dir_of(source))
        node, model = run.config.model, run.model
    except UserError as error:
        raise UserError(f"model.pretrained={source}: {error}") from error
    if not isinstance(model, Transfer):
        raise UserError(f"model.pretrained={source} has no backbone: it is of another model")
    if (node.get("library", "torchvision"), node.get("name", "resnet18")) != (library, name):
        raise UserError(f"model.pretrained={source} is of {node.get('name')}, this model is {name}")
    return model.backbone.state_dict()


def pretrained_source(node: Mapping[str, Any]) -> str | None:
    """Returns what a model's node would load pretrained weights from; None where it loads none.

    Raises:
        UserError: as `targets.located`.
    """
    factory = targets.located(node, "model")
    is_transfer = isinstance(factory, type) and issubclass(factory, Transfer)
    if not is_transfer or node.get("trained") == "scratch":
        return None
    return str(node.get("pretrained", "imagenet"))
