"""Checkpoints: plain tensors and numbers, written whole or not at all, read without unpickling."""

from __future__ import annotations

import io
import logging
import os
import pickletools
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from fashionnet.errors import UserError, first_line, interruption, is_out_of_memory
from fashionnet.models.weights import on_host
from fashionnet.system.files import atomic_write, open_inside

log = logging.getLogger(__name__)

LAST, PREVIOUS, BEST = "last.pt", "previous.pt", "best.pt"
FROZEN = "frozen.pt"
MAX_BYTES = 4 * 2**30
_MAX_PICKLE = 8 * 2**20  # names, shapes and plain values; the history takes 85 bytes an epoch

# All that the pickle of a checkpoint may name, as it stands there.
_STORAGES = ("Bool", "Byte", "Char", "Short", "Int", "Long", "Half", "BFloat16", "Float", "Double")
_GLOBALS = {
    "collections OrderedDict",
    "torch._utils _rebuild_tensor_v2",
    *(f"torch {name}Storage" for name in _STORAGES),
}
# What torch raises of a state that it cannot take in.
MISFITS = (RuntimeError, TypeError, ValueError, AttributeError, LookupError, ArithmeticError)


def save(state: Mapping[str, Any], path: Path) -> None:
    """Writes `state` to `path` atomically; a `last.pt` that was there stays as `previous.pt`."""
    path.parent.mkdir(exist_ok=True)
    with atomic_write(path) as file:
        whole = io.BytesIO()  # torch would raise a RuntimeError for a full disk
        torch.save(on_host(dict(state)), whole)
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


def load(path: Path) -> State:
    """Reads a checkpoint onto the CPU; only tensors and plain values are ever built.

    The file may be a stranger's: it lies in its run, one folder up, and is opened there alone; its
    sizes are checked before it is unpacked, and what it would build before it is built.

    Raises:
        UserError: the file is missing, damaged, or holds anything else.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of oddities: it is read, or refused in one line
            with open_inside(path, path.absolute().parent.parent) as file:
                content, pickle_bytes = _checked_archive(file, path)
            state = torch.load(content, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path} is missing: the run wrote no checkpoint yet") from None
    except Exception as error:  # UserError, or any error of a damaged file
        if isinstance(error, UserError) or is_out_of_memory(error):  # the file may be sound
            raise
        if (signaled := interruption(error)) is not None:  # torch may wrap a Ctrl-C
            raise signaled from None
        # torch's own message would advise to trust the file.
        is_plain = isinstance(error, zipfile.BadZipFile | OSError)
        why = first_line(error) if is_plain else "its contents do not fit"
        raise UserError(f"{path} is damaged or no checkpoint: {why}") from None
    _refuse_impossible_values(state, pickle_bytes, path)
    if not isinstance(state, dict) or not isinstance(state.get("model"), dict):
        raise UserError(f"{path} is not a checkpoint of this package")
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
            raise UserError(f"{path} is not a checkpoint: its parts are compressed")
        if sum(member.file_size for member in members) > size:
            raise UserError(f"{path} is damaged: its parts are larger than itself")
        top = members[0].filename.partition("/")[0] if members else ""
        named = {member.filename: member for member in members}
        pickled = named.get(f"{top}/data.pkl")
        if pickled is None:
            raise UserError(f"{path} is damaged or no checkpoint: it holds no data.pkl")
        if pickled.file_size > _MAX_PICKLE:
            raise UserError(f"{path} is not a checkpoint: its data.pkl is larger than any run's")
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


def _refuse_impossible_values(state: Any, most: int, path: Path) -> None:
    """Refuses values that a checkpoint does not hold, and more of them than fit into the file.

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


@dataclass(frozen=True)
class Nullable:
    """The form of what may be None as well."""

    form: Any


def difference(found: Any, form: Any, name: str = "its state") -> str | None:
    """Says where `found` has other keys, shapes or types than `form`; None where it has not."""
    if isinstance(form, Nullable):
        return None if found is None else difference(found, form.form, name)
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
    return next((text for part in parts if (text := difference(*part)) is not None), None)


def _in_words(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
    size = f" of {len(value)}" if isinstance(value, list | tuple | dict) else ""
    return f"a {type(value).__name__}{size}"
