"""Checkpoints: plain tensors and numbers, written whole or not at all, read without unpickling."""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
import os
import pickletools
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.nn.parameter import is_lazy

from fashionnet import ranks
from fashionnet.errors import UserError, first_line, is_out_of_memory
from fashionnet.files import atomic_write, open_inside
from fashionnet.transfer import Transfer

if TYPE_CHECKING:
    from fashionnet.loop import Fit

log = logging.getLogger(__name__)

LAST, PREVIOUS, BEST = "last.pt", "previous.pt", "best.pt"
FROZEN = "frozen.pt"
MAX_BYTES = 4 * 2**30
_MAX_MASKS = 2**28  # numbers that a dropout layer draws at once: a batch's, or a few million
_DROPPED_BYTES = 2**26  # of layers that are built and give way to others: a library's final one
_MAX_PICKLE = 8 * 2**20  # names, shapes and plain values; the history takes 85 bytes an epoch

# All that the pickle of a checkpoint may name, as it stands there.
_STORAGES = ("Bool", "Byte", "Char", "Short", "Int", "Long", "Half", "BFloat16", "Float", "Double")
_GLOBALS = {
    "collections OrderedDict",
    "torch._utils _rebuild_tensor_v2",
    *(f"torch {name}Storage" for name in _STORAGES),
}
# What torch raises of a state that it cannot take in.
_MISFITS = (RuntimeError, TypeError, ValueError, AttributeError, LookupError, ArithmeticError)


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


class State(dict[str, Any]):
    """What a checkpoint holds, and the file that it was read from."""

    def __init__(self, values: Mapping[str, Any], path: Path) -> None:
        super().__init__(values)
        self.path = path


def load(path: Path, device: torch.device | str = "cpu") -> State:
    """Reads a checkpoint onto `device`; only tensors and plain values are ever built.

    The file may be a stranger's: it lies in its run, one folder up, and is opened there alone; its
    sizes are checked before it is unpacked, and what it would build before it is built.

    Raises:
        UserError: the file is missing, damaged, or holds anything else.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of oddities: it is read, or refused in one line
            with open_inside(path, path.absolute().parent.parent) as file:
                content, parts = _checked_archive(file, path)
            state = torch.load(content, map_location=device, weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path} is missing: the run wrote no checkpoint yet") from None
    except Exception as error:  # UserError, or whatever damage trips over
        if isinstance(error, UserError) or is_out_of_memory(error):  # the file may be sound
            raise
        # Of torch's words none: they would advise to trust the file.
        told = isinstance(error, zipfile.BadZipFile | OSError)
        why = first_line(error) if told else "its contents do not fit"
        raise UserError(f"{path} is damaged or no checkpoint: {why}") from None
    _refuse_tall_tales(state, parts, path)
    if not isinstance(state, dict) or not isinstance(state.get("model"), dict):
        raise UserError(f"{path} is no checkpoint of this package")
    return State(state, path)


def _checked_archive(file: IO[bytes], path: Path) -> tuple[io.BytesIO, int]:
    """Reads the parts of a checkpoint that count, checksums included.

    Returns:
        A new archive for torch, and the size of its pickle in bytes. torch does not get the file:
        it looks at no checksum, and two readers of zip may see two archives in one file.
    """
    size = os.fstat(file.fileno()).st_size
    if size > MAX_BYTES:
        raise UserError(f"{path} is larger than the {MAX_BYTES >> 30} GiB of a checkpoint")
    content = io.BytesIO()
    with zipfile.ZipFile(file) as archive, zipfile.ZipFile(content, "w") as copy:
        members = archive.infolist()
        # torch packs nothing, so that what is unpacked cannot be larger than the file.
        if any(
            member.compress_type != zipfile.ZIP_STORED or member.compress_size != member.file_size
            for member in members
        ):
            raise UserError(f"{path} is no checkpoint: its parts are compressed")
        if sum(member.file_size for member in members) > size:
            raise UserError(f"{path} is damaged: its parts are larger than itself")
        top = members[0].filename.partition("/")[0] if members else ""
        named = {member.filename: member for member in members}
        pickled = named.get(f"{top}/data.pkl")
        if pickled is None:
            raise UserError(f"{path} is damaged or no checkpoint: it holds no data.pkl")
        if pickled.file_size > _MAX_PICKLE:
            raise UserError(f"{path} is no checkpoint: its data.pkl is larger than any run's")
        for name, member in named.items():
            inner = name.removeprefix(f"{top}/")
            if inner in ("data.pkl", "byteorder", "version") or inner.startswith("data/"):
                part = archive.read(member)
                if member is pickled:
                    _refuse_other_globals(part, path)
                copy.writestr(f"archive/{inner}", part)
    content.seek(0)
    return content, pickled.file_size


def _refuse_other_globals(pickled: bytes, path: Path) -> None:
    """Refuses a pickle that names anything but tensors.

    `weights_only` executes nothing, but would still build a `bytearray` of any size.
    """
    for opcode, argument, _ in pickletools.genops(pickled):
        if opcode.name == "GLOBAL" and argument not in _GLOBALS:
            raise UserError(
                f"{path} holds more than tensors and plain values and was not opened; it names "
                f"{str(argument)[:80]!r}"
            )


def _refuse_tall_tales(state: Any, most: int, path: Path) -> None:
    """Refuses values that unfold to more than the file holds.

    Args:
        state: what was read.
        most: bytes of the pickle; each part takes one there, unless it is named again and again.
        path: the file, for messages.
    """
    rest = [state]
    while rest:
        value, parts = rest.pop(), []
        if isinstance(value, dict):
            if not all(isinstance(key, str | int) for key in value):
                raise UserError(f"{path} is damaged: a key in it is neither a word nor a number")
            parts = [*value.values()]
            if isinstance(value, OrderedDict):
                parts += vars(value).values()  # e.g. the versions of a model's layers
        elif isinstance(value, list | tuple):
            parts = list(value)
        elif isinstance(value, Tensor):
            if value.numel() * value.element_size() > value.untyped_storage().nbytes():
                raise UserError(f"{path} is damaged: a tensor claims more values than it holds")
        elif not isinstance(value, bool | int | float | str | None):
            raise UserError(f"{path} is damaged: it holds a {type(value).__name__}")
        most -= len(parts)
        if most < 0:
            raise UserError(f"{path} is damaged: it holds parts of itself over and over")
        rest += parts


def newest(folder: Path) -> Path:
    """Returns `last.pt`, or `previous.pt` where a run was killed between the two renames."""
    last, previous = folder / LAST, folder / PREVIOUS
    return previous if previous.exists() and not last.exists() else last


def load_newest(folder: Path) -> State | None:
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


def load_model(path: Path, build: Callable[[], nn.Module]) -> nn.Module:
    """Returns the model that `build` makes, with the weights of a checkpoint and of `frozen.pt`.

    A stranger's record may ask for a model of any size: building ends where its parameters take
    much more memory than the weights in the files.

    Raises:
        UserError: a file is refused by `load`, or does not fit the model.
    """
    state, frozen = load(path), path.with_name(FROZEN)
    states = [state, load(frozen)] if frozen.exists() else [state]
    try:
        held = sum(_num_bytes(each["model"]) for each in states)
        with _no_larger_than(2 * held + _DROPPED_BYTES):
            model = build()
        problem = _difference(state["model"], model.state_dict(), "the model")
        if problem is None:
            model.load_state_dict(state["model"])
    except UserError:
        raise
    except (*_MISFITS, AssertionError, MemoryError) as error:
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
        save({"model": frozen}, folder / FROZEN)
    return frozen


def restore_frozen(model: nn.Module, folder: Path) -> None:
    """Puts back what `save_frozen` wrote.

    Raises:
        UserError: it is missing, damaged, or of another model.
    """
    if isinstance(model, Transfer) and model.frozen_state():
        path = folder / FROZEN
        _put_frozen(model, [ranks.from_first(lambda: load(path))], path)


def _put_frozen(model: nn.Module, states: Sequence[State], path: Path) -> None:
    """Puts the state of `frozen.pt` into a model that needs it."""
    if isinstance(model, Transfer) and (frozen := model.frozen_state()):
        if not states:
            raise UserError(f"{path} is missing: it holds what the fit does not change")
        problem = _difference(states[0]["model"], frozen, "the model")
        if problem is not None:
            raise UserError(f"{path} does not fit the recorded model: {problem}")
        model.load_frozen_state(states[0]["model"])


def restore(fit: Fit, state: State) -> None:
    """Puts a fresh fit back where a checkpoint found it.

    Raises:
        UserError: the checkpoint is of another model, optimizer or kind of device, or not of a fit.
    """
    here, there = fit.device.type, str(state.get("device"))[:20]
    if there != here:
        raise UserError(
            f"{state.path} does not fit this run: it is of a fit on {there}, whose random streams "
            f"cannot continue on {here}; use device={there} where there is one, or overwrite=true "
            "to start the run anew"
        )
    try:
        problem = _difference(state, _form_of(fit, state)) or _impossible(state)
        if problem is None:
            fit.load_state_dict(state)
    except LookupError as error:
        problem = f"{error} is missing there"
    except _MISFITS as error:
        if is_out_of_memory(error):
            raise
        problem = first_line(error)
    if problem is not None:
        raise UserError(
            f"{state.path} does not fit this run: {problem}; overwrite=true starts the run anew"
        )


@dataclass(frozen=True)
class _Optional:
    """The form of what may be None as well."""

    form: Any


def _form_of(fit: Fit, state: State) -> dict[str, Any]:
    """Returns a state like that of `fit` once it is under way."""
    form = fit.state_dict()
    for part in (form, form["early_stopping"]):
        for key in [key for key, value in part.items() if value is None]:
            is_weights = key in ("best_weights", "unrestored")
            part[key] = _Optional(form["model"] if is_weights else 0.0)
    form["history"] = [_row_form(row) for row in state["history"]]
    form["weight_hashes"] = [""] * len(form["history"])
    form["generators"]["python"]["gauss"] = _Optional(0.0)
    optimizer = form["optimizer"]
    if optimizer.get("state") == {}:  # torch's optimizers make theirs at their first step
        _step_nowhere(fit)
        made, found = fit.optimizer.state_dict()["state"], state["optimizer"]["state"]
        optimizer["state"] = {key: made[key] for key in made if key in found}
    return form


def _row_form(row: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the form of an epoch's line in the history: figures, those of Keras among them."""
    names = ["loss", "accuracy", "lr", "epoch_seconds"]
    names += ["val_loss", "val_accuracy"] if "val_loss" in row else []
    return {"epoch": 0} | dict.fromkeys([*names, *row.keys() - {"epoch"}], 0.0)


def _step_nowhere(fit: Fit) -> None:
    """Steps along gradients of zero; what that changes, the checkpoint is to overwrite."""
    parameters = [p for group in fit.optimizer.param_groups for p in group["params"]]
    gradients = [parameter.grad for parameter in parameters]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    fit.optimizer.step()
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient


def _impossible(state: State) -> str | None:
    """Returns what no fit can have come to, in a state of the right form; None if nothing."""
    if not (1 <= state["epoch"] == len(state["history"]) + 1 and state["step"] >= 0):
        return "its epoch is not the one after its history"
    if bool(state["step"]) != bool(state["running"]["num"]):
        return "its metrics are not those of its steps"
    if not 0 <= state["generators"]["numpy"]["position"] <= 624:  # NumPy would read beyond
        return "its generators stand nowhere"
    if not all(0 <= d["used"] <= d["bank"] <= _MAX_MASKS for d in state["dropout"].values()):
        return "its dropout masks are of another network"
    return None


def _difference(found: Any, form: Any, name: str = "its state") -> str | None:
    """Says where `found` has other keys, shapes or types than `form`; None where it has not."""
    if isinstance(form, _Optional):
        return None if found is None else _difference(found, form.form, name)
    parts: list[tuple[Any, Any, str]] = []
    if isinstance(form, Mapping) and isinstance(found, Mapping):
        if odd := sorted(map(str, found.keys() ^ form.keys())):
            where = "is missing there" if odd[0] in map(str, form) else "is there and not here"
            return f"{odd[0]} of {name} {where}"
        parts = [(found[key], form[key], f"{key} of {name}") for key in form]
        alike = True
    elif isinstance(form, list | tuple) and isinstance(found, list | tuple):
        pairs = zip(found, form, strict=False)
        parts = [(*both, f"part {i} of {name}") for i, both in enumerate(pairs)]
        alike = len(found) == len(form)
    elif isinstance(form, Tensor) and isinstance(found, Tensor):
        alike = (found.shape, found.dtype) == (form.shape, form.dtype)
    else:
        alike = type(found) is type(form) or (type(found), type(form)) == (int, float)
    if not alike:
        return f"{name} is {_in_words(found)} there and {_in_words(form)} here"
    return next((text for part in parts if (text := _difference(*part)) is not None), None)


def _in_words(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
    size = f" of {len(value)}" if isinstance(value, list | tuple | dict) else ""
    return f"a {type(value).__name__}{size}"


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
