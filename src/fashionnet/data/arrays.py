"""A data set of your own: arrays in a `.npz` file, or what a function of yours returns.

Both give a mapping of these arrays:

    images        uint8 (N, H, W) gray or (N, H, W, 3) RGB, 0 to 255
    labels        integers (N,), from 0 to the number of classes less one
    class_names   texts, one for each label; may be absent: "0", "1", …
    test_images   as `images`; may be absent, together with `test_labels`
    test_labels   as `labels`

With a test set the training pictures keep their order, of which `validation_split` takes the end.
Without one, all are put into a seeded random order, of which `test_split` takes the end.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import math
import sys
import traceback
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from fashionnet.config import targets
from fashionnet.data.examples import Dataset, Examples
from fashionnet.errors import UserError, first_line, shortened
from fashionnet.system import seeds
from fashionnet.system.files import file_sha256

_NEEDED, _TEST = ("images", "labels"), ("test_images", "test_labels")
_KNOWN = (*_NEEDED, *_TEST, "class_names")
_MOST_SIDE, _MOST_CLASSES = 1024, 2**16
_MOST_BYTES = 2**34  # of arrays in a file, unpacked

Arrays = Mapping[str, Any]


def from_file(root: str | Path | None, seed: int = 0, test_split: float = 0.2) -> Dataset:
    """Loads the arrays of a `.npz` file, as `numpy.savez` writes it. Nothing is unpickled.

    Args:
        root: the file, `data.root` in the configuration.
        seed, test_split: of the random order and the fraction held out, without a test set.

    Raises:
        UserError: there is no such file, or it does not hold such arrays; the message names them.
    """
    if not root:
        raise UserError("data.root=FILE.npz is needed for data=npz")
    try:
        path = Path(root).expanduser().absolute()
    except RuntimeError as error:  # ~nobody
        raise UserError(f"data.root={root}: {error}") from error
    sha256, headers = _file_sha256(path), _headers(path)
    given = _read(path, [name for name in _KNOWN if name in headers and name not in _TEST])

    def read_test() -> Arrays:
        if _file_sha256(path) != sha256:
            raise UserError(f"{path} changed while it was used; start again")
        return _read(path, _TEST)

    test = {name: headers[name] for name in _TEST if name in headers}
    made = _dataset("npz", str(path), given, test, seed, test_split, read_test)
    return replace(made, sources={path.name: sha256})


def from_function(
    name: str, target: str, root: str | None, seed: int = 0, test_split: float = 0.2
) -> Dataset:
    """Calls an importable function and takes the arrays that it returns.

    Args:
        name: of the data set, for the record.
        target: the function's dotted name, which must be on the allow-list (`config.targets`).
        root: is passed on if the function has a parameter `root`.

    Raises:
        UserError: it is not allowed, cannot be imported, fails, or returns something else.
    """
    found = _called(target, root)
    if not isinstance(found, Mapping):
        raise UserError(f"{target} returned a {type(found).__name__}; return a dict of arrays")
    unknown = [key for key in found if key not in _KNOWN]
    if unknown:
        raise UserError(
            f"{target} returned an array {shortened(unknown[0])}; known are {', '.join(_KNOWN)}"
        )
    values = {key: _array(target, key, each) for key, each in found.items() if each is not None}
    test = {key: values[key] for key in _TEST if key in values}
    made = _dataset(name, target, values, test, seed, test_split, lambda: values)
    parts = {"train": _NEEDED} | ({"test": _TEST} if test else {})
    hashed = {part: _arrays_sha256(values[key] for key in keys) for part, keys in parts.items()}
    return replace(made, sources=hashed)


def _called(target: str, root: str | None) -> Any:
    function = targets.located({"_target_": target}, "data")
    try:
        takes_root = "root" in inspect.signature(function).parameters
        return function(root=root) if takes_root else function()
    except UserError:
        raise
    except Exception as error:  # the user's code may raise anything
        file = getattr(sys.modules.get(target.rpartition(".")[0]), "__file__", None)
        passed = traceback.extract_tb(error.__traceback__)
        lines = [at.lineno for at in passed if at.filename == file]
        place = f" ({file}, line {lines[-1]})" if lines else ""
        raise UserError(
            f"{target} failed{place}: {type(error).__name__}: {first_line(error)}"
        ) from error


def _array(target: str, key: str, value: Any) -> Any:
    try:
        return np.asarray(value)
    except (TypeError, ValueError, RuntimeError) as error:  # lists of several lengths, CUDA tensors
        raise UserError(f"{target}: {key} is not an array: {first_line(error)}") from None


def _dataset(
    name: str,
    where: str,
    given: Arrays,
    test: Arrays,
    seed: int,
    test_split: float,
    read_test: Callable[[], Arrays],
) -> Dataset:
    """Checks arrays and makes a data set of them, without its `sources`.

    Args:
        where: what they come from, for messages.
        given: the arrays but those of the test set.
        test: those of the test set, or what has their shapes and dtypes.
        read_test: returns these.
    """
    for key in _NEEDED:
        if key not in given:
            raise UserError(f"{where} holds no array {key}; it needs images and labels")
    examples = _examples(where, given["images"], given["labels"], "")
    class_names = _class_names(where, given.get("class_names"), examples)
    shape = tuple(examples.images.shape[1:])
    if len(test) == 1:
        raise UserError(f"{where} holds {next(iter(test))} alone; give {' and '.join(_TEST)}")
    if test:
        images, labels = (test[key] for key in _TEST)
        _check(where, images, labels, "test_")  # now, not when the training is done
        if images.shape[1:] != given["images"].shape[1:]:
            raise UserError(f"{where}: test_images have another shape than images")
        opened = partial(_opened_test, where, read_test, len(class_names))
        return Dataset(name, class_names, shape, examples, labels.shape[0], {}, opened)
    order = torch.randperm(len(examples), generator=seeds.generator(seed, "split"))
    num_test = round(test_split * len(order))
    if not 0 < num_test < len(order):
        raise UserError(
            f"data.test_split={test_split} of {len(order)} pictures leaves no "
            f"{'training' if num_test else 'test'} picture"
        )
    first, last = order[: len(order) - num_test], order[len(order) - num_test :]
    return Dataset(
        name,
        class_names,
        shape,
        Examples(examples.images[first], examples.labels[first]),
        num_test,
        {},
        lambda: Examples(examples.images[last], examples.labels[last]),
        order_sha256=hashlib.sha256(order.numpy().tobytes()).hexdigest(),
    )


def _opened_test(where: str, read: Callable[[], Arrays], num_classes: int) -> Examples:
    given = read()
    examples = _examples(where, given["test_images"], given["test_labels"], "test_")
    if (label := int(examples.labels.max())) >= num_classes:
        raise UserError(f"{where}: the test set holds the label {label}, which no class has")
    return examples


def _examples(where: str, images: Any, labels: Any, prefix: str) -> Examples:
    """Returns checked pictures and labels, channels first."""
    _check(where, images, labels, prefix)
    if not 0 <= labels.min() <= labels.max() < _MOST_CLASSES:
        raise UserError(
            f"{where}: {prefix}labels are {labels.min()} to {labels.max()}; count classes from 0"
        )
    pixels = torch.from_numpy(np.ascontiguousarray(images))
    if pixels.ndim == 4:
        pixels = pixels.permute(0, 3, 1, 2).contiguous()
    return Examples(pixels, torch.from_numpy(labels.astype(np.int64)))


def _check(where: str, images: Any, labels: Any, prefix: str) -> None:
    """Refuses arrays of the wrong dtype or shape, by these alone."""
    shape, num_labels = images.shape, math.prod(labels.shape)
    is_gray, is_color = len(shape) == 3, len(shape) == 4 and shape[-1] == 3
    if images.dtype != np.uint8 or not (is_gray or is_color):
        raise UserError(
            f"{where}: {prefix}images must be uint8 (N, H, W) or (N, H, W, 3), not "
            f"{images.dtype} {shape}"
        )
    if not all(1 <= side <= _MOST_SIDE for side in shape[1:3]):
        raise UserError(
            f"{where}: {prefix}images of {shape[1]} x {shape[2]} pixels; give 1 to {_MOST_SIDE}"
        )
    if labels.dtype.kind not in "iu" or len(labels.shape) != 1:
        raise UserError(
            f"{where}: {prefix}labels must be integers (N,), not {labels.dtype} {labels.shape}"
        )
    if shape[0] != num_labels:
        raise UserError(
            f"{where}: {shape[0]} {prefix}images and {num_labels} {prefix}labels; give one "
            "label for each picture"
        )
    if not num_labels:
        raise UserError(f"{where}: {prefix}images holds no picture")


def _class_names(where: str, given: Any, examples: Examples) -> tuple[str, ...]:
    low, high = int(examples.labels.min()), int(examples.labels.max())
    if given is None:
        if low:  # most often classes that are counted from 1
            raise UserError(
                f"{where}: labels are {low} to {high}; count classes from 0, or give class_names"
            )
        given = np.array([str(label) for label in range(high + 1)])
    names = given.tolist()
    if given.ndim != 1 or not all(isinstance(name, str) for name in names):
        raise UserError(f"{where}: class_names must be texts, not {given.dtype} {given.shape}")
    if len(names) <= high:
        raise UserError(f"{where}: {len(names)} class_names, and labels up to {high}")
    if len(names) < 2:
        raise UserError(f"{where}: one class only; there is nothing to learn")
    if len(set(names)) < len(names) or not all(0 < len(name) <= 1024 for name in names):
        raise UserError(f"{where}: class_names must be distinct texts of 1 to 1024 characters")
    return tuple(names)


class _Header(NamedTuple):
    """What the header of an array in a file says."""

    shape: tuple[int, ...]
    dtype: Any


def _headers(path: Path) -> dict[str, _Header]:
    """Returns the header of each array in a file, without reading the arrays."""
    found = {}
    with _refused(path), zipfile.ZipFile(path) as packed:
        if sum(member.file_size for member in packed.infolist()) > _MOST_BYTES:
            raise UserError(f"{path} unpacks to more than {_MOST_BYTES >> 30} GB")
        for name in packed.namelist():
            with packed.open(name) as member:
                version = np.lib.format.read_magic(member)
                if version not in _READ:
                    raise UserError(f"{path}: {name} is a structured array; save plain arrays")
                shape, _, dtype = _READ[version](member)
            if dtype.hasobject:
                raise UserError(f"{path}: {name} holds pickled objects, which are not read")
            found[name.removesuffix(".npy")] = _Header(shape, dtype)
    return found


_READ = {  # version 3 is for the names of structured arrays
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}


def _read(path: Path, names: Sequence[str]) -> dict[str, Any]:
    """Returns arrays of a file, by name."""
    with _refused(path), np.load(path, allow_pickle=False) as file:
        return {name: file[name] for name in names}


@contextlib.contextmanager
def _refused(path: Path) -> Iterator[None]:
    """Turns what NumPy and zipfile raise about a file into a user error."""
    try:
        yield
    except OSError as error:
        raise UserError(f"data.root={path} cannot be read: {error.strerror or error}") from None
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error, MemoryError) as error:
        raise UserError(f"{path} is not a .npz file of arrays: {first_line(error)[:200]}") from None


def _file_sha256(path: Path) -> str:
    if not path.is_file():  # a pipe would wait for its writer
        raise UserError(f"data.root={path}: no such file; check the path")
    try:
        with open(path, "rb") as file:
            return file_sha256(file)
    except OSError as error:
        raise UserError(f"data.root={path} cannot be read: {error.strerror}") from None


def _arrays_sha256(arrays: Iterable[Any]) -> str:
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(f"{array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()
