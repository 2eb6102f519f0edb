"""A run's network: what a fit does not change of it is kept once, and all of it is read back."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.nn.parameter import is_lazy

from fashionnet import models
from fashionnet.config.schema import Config
from fashionnet.errors import UserError, first_line
from fashionnet.models import backbones
from fashionnet.models.transfer import Transfer, check_size
from fashionnet.runs import checkpoint, record as records
from fashionnet.runs.checkpoint import FROZEN, MISFITS, State, difference
from fashionnet.system import processes, seeds

_DROPPED_BYTES = 2**26  # of layers that are built and give way to others: a library's final one


def load(run_dir: Path, record: Mapping[str, Any], config: Config) -> nn.Module:
    """Returns the network of a run with its final weights, on the CPU, in evaluation mode.

    Args:
        record: the run's, checked.
        config: the configuration in it, checked.

    Raises:
        UserError: weights that are damaged or do not fit the recorded model.
    """
    shape, num_classes = record["data"]["image_shape"], len(record["data"]["class_names"])
    node = with_input(config.model, record)
    with seeds.preserved():  # building draws initial weights
        model = load_model(
            checkpoint.newest(run_dir / "checkpoints"),
            lambda: models.build(node, shape, num_classes, config.seed),
        )
    return model.eval()


def load_model(path: Path, build: Callable[[], nn.Module]) -> nn.Module:
    """Returns the model that `build` makes, with the weights of a checkpoint and of `frozen.pt`.

    A stranger's record may ask for a model of any size: building ends where its parameters take
    much more memory than the weights in the files.

    Raises:
        UserError: a file is refused by `load`, or does not fit the model.
    """
    state, frozen = checkpoint.load(path), path.with_name(FROZEN)
    states = [state, checkpoint.load(frozen)] if frozen.exists() else [state]
    try:
        held = sum(_num_bytes(each["model"]) for each in states)
        with _no_larger_than(2 * held + _DROPPED_BYTES):
            model = build()
        problem = difference(state["model"], model.state_dict(), "the model")
        if problem is None:
            model.load_state_dict(state["model"])
    except UserError:
        raise
    except (*MISFITS, AssertionError, MemoryError) as error:
        problem = first_line(error)
    except _TooLarge:
        problem = "it has fewer weights than the model"
    if problem is not None:
        raise UserError(f"{path} does not fit the recorded model: {problem}")
    _put_frozen(model, states[1:], frozen)
    return model


class _TooLarge(BaseException):
    """Ends the building of a model that is larger than its weights; no class may swallow it."""


@contextlib.contextmanager
def _no_larger_than(most: int) -> Iterator[None]:
    """Ends the body with `_TooLarge` once the parameters that it makes take over `most` bytes.

    A layer registers each parameter before it fills it, so that what is too much is never touched.
    """
    made: set[nn.Parameter] = set()  # what layers share counts once
    total = 0

    def register(_module: nn.Module, _name: str, parameter: nn.Parameter | None) -> None:
        nonlocal total
        if parameter is not None and parameter not in made and not is_lazy(parameter):
            made.add(parameter)
            total += parameter.nbytes
            if total > most:
                raise _TooLarge

    hook = register_module_parameter_registration_hook(register)
    try:
        yield
    finally:
        hook.remove()


def _num_bytes(state: Any) -> int:
    """Returns how many bytes the tensors of a model's state take, each storage counted once."""
    tensors = [each for each in state.values() if isinstance(each, Tensor)]
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def save_frozen(model: nn.Module, folder: Path) -> dict[str, Tensor]:
    """Writes what a fit does not change of a model, if anything, to `frozen.pt`; returns it."""
    frozen = model.frozen_state() if isinstance(model, Transfer) else {}
    if frozen:
        checkpoint.save({"model": frozen}, folder / FROZEN)
    return frozen


def restore_frozen(model: nn.Module, folder: Path) -> None:
    """Puts back what `save_frozen` wrote.

    Raises:
        UserError: it is missing, damaged, or of another model.
    """
    if isinstance(model, Transfer) and model.frozen_state():
        path = folder / FROZEN
        _put_frozen(model, [processes.from_main_process(lambda: checkpoint.load(path))], path)


def _put_frozen(model: nn.Module, states: Sequence[State], path: Path) -> None:
    """Puts the state of `frozen.pt` into a model that needs it."""
    if isinstance(model, Transfer) and (frozen := model.frozen_state()):
        if not states:
            raise UserError(f"{path} is missing: it holds what the fit does not change")
        problem = difference(states[0]["model"], frozen, "the model")
        if problem is not None:
            raise UserError(f"{path} does not fit the recorded model: {problem}")
        model.load_frozen_state(states[0]["model"])


def photo_size(node: Mapping[str, Any], recorded: Mapping[str, Any]) -> int:
    """Returns the pixels of a side that photos are decoded at where `data.size` is null.

    Args:
        node: of the model, in the configuration.
        recorded: the record of the run that is continued or read back; {} for a new one.
    """
    if recorded:
        return int(recorded["data"]["image_shape"][-1])
    check_size(node.get("size"))
    expected = _expected_input(node)
    return node.get("size") or (expected.size if expected else backbones.DEFAULT_SIZE)


def with_input(node: Mapping[str, Any], recorded: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a model's node with what pictures are normalized with, where its keys are null.

    That is what the run recorded, or the run whose weights it starts from; else what the library
    says, which may change with its version.

    Args:
        node, recorded: as `photo_size`.

    Raises:
        UserError: as `backbones.expected_input`.
    """
    expected = _expected_input(node)
    if expected is None:
        return dict(node)
    known: Any = recorded.get("input")
    source = node.get("pretrained")
    is_taken = isinstance(source, str) and source.startswith("run:")
    if not recorded and is_taken and node.get("trained") != "scratch":
        known = record_of(str(source)).get("input")
    if not isinstance(known, Mapping):
        known = asdict(expected)
    given = {key: known.get(key) for key in ("mean", "std") if node.get(key) is None}
    return {**node, **given}


def _expected_input(node: Mapping[str, Any]) -> backbones.Input | None:
    """Returns what the library of a node's network says of its pretraining; None without one."""
    is_own = node.get("_target_") == f"{Transfer.__module__}.{Transfer.__name__}"
    if not is_own and node.get("library") not in backbones.LIBRARIES:
        return None
    return backbones.expected_input(
        node.get("library", "torchvision"), node.get("name", "resnet18")
    )


def record_of(source: str) -> dict[str, Any]:
    """Returns the record of the run that `source`, "run:RUN_DIR", names.

    Raises:
        UserError: there is none that can be read.
    """
    try:
        return records.read(run_dir_of(source))
    except UserError as error:
        raise UserError(f"model.pretrained={source}: {error}") from error


def run_dir_of(source: str) -> Path:
    return Path(os.path.expanduser(source.removeprefix("run:")))
