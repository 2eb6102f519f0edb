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
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

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
    path = Path(root).expanduser().absolute()
    sha256, lengths = _file_sha256(path), _lengths(path)
    given = _read(path, [name for name in _KNOWN if name in lengths and name not in _TEST])

    def read_test() -> Arrays:
        if _file_sha256(path) != sha256:
            raise UserError(f"{path} changed while it was used; start again")
        return _read(path, _TEST)

    test = {name: lengths[name] for name in _TEST if name in lengths}
    return _dataset("npz", str(path), given, test, {path.name: sha256}, seed, test_split, read_test)


def from_function(
    name: str, target: str, root: str | None, seed: int = 0, test_split: float = 0.2
) -> Dataset:
    """Calls an importable function and takes the arrays that it returns.

    Args:
        name: of the data set, for the record.
        target: the function's dotted name, which must be on the allow-list (`config.targets`).
        root: is passed on if the function has a parameter `root`.

    Raises:
        UserError: it is not allowed, cannot be imported, or returns something else.
    """
    found = targets.build({"_target_": target}, "data", root=root)
    if not isinstance(found, Mapping):
        raise UserError(f"{target} returned a {type(found).__name__}; return a dict of arrays")
    unknown = [key for key in found if key not in _KNOWN]
    if unknown:
        raise UserError(
            f"{target} returned an array {shortened(unknown[0])}; known are {', '.join(_KNOWN)}"
        )
    values = {key: np.asarray(value) for key, value in found.items() if value is not None}
    parts = {"train": _NEEDED, "test": _TEST}
    sources = {
        part: _arrays_sha256([values[key] for key in keys])
        for part, keys in parts.items()
        if all(key in values for key in keys)
    }
    test = {key: len(values[key]) for key in _TEST if key in values}
    return _dataset(name, target, values, test, sources, seed, test_split, lambda: values)


def _dataset(
    name: str,
    where: str,
    given: Arrays,
    test: Mapping[str, int],
    sources: dict[str, str],
    seed: int,
    test_split: float,
    read_test: Callable[[], Arrays],
) -> Dataset:
    """Checks arrays and makes a data set of them.

    Args:
        where: what they come from, for messages.
        given: the arrays but those of the test set.
        test: the lengths of the arrays of the test set.
        read_test: returns these.
    """
    for key in _NEEDED:
        if key not in given:
            raise UserError(f"{where} holds no array {key}; it needs images and labels")
    examples = _examples(where, given["images"], given["labels"], "")
    if not len(examples):
        raise UserError(f"{where} holds no picture")
    class_names = _class_names(where, given.get("class_names"), examples)
    shape = tuple(examples.images.shape[1:])
    if len(test) == 1:
        raise UserError(f"{where} holds {next(iter(test))} alone; give {' and '.join(_TEST)}")
    if test:
        opened = partial(_opened_test, where, read_test, shape, len(class_names))
        return Dataset(name, class_names, shape, examples, test["test_labels"], sources, opened)
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
        sources,
        lambda: Examples(examples.images[last], examples.labels[last]),
        order_sha256=hashlib.sha256(order.numpy().tobytes()).hexdigest(),
    )


def _opened_test(
    where: str, read: Callable[[], Arrays], shape: tuple[int, ...], num_classes: int
) -> Examples:
    given = read()
    examples = _examples(where, given["test_images"], given["test_labels"], "test_")
    if tuple(examples.images.shape[1:]) != shape:
        raise UserError(f"{where}: test_images have another shape than images")
    if not len(examples) or (label := int(examples.labels.max())) >= num_classes:
        found = f"the label {label}, which no class has" if len(examples) else "no picture"
        raise UserError(f"{where}: the test set holds {found}")
    return examples


def _examples(where: str, images: Any, labels: Any, prefix: str) -> Examples:
    """Returns checked pictures and labels, channels first."""
    images, labels = np.asarray(images), np.asarray(labels)
    shape = images.shape
    if (
        images.dtype != np.uint8
        or images.ndim not in (3, 4)
        or (images.ndim == 4 and shape[3] != 3)
    ):
        raise UserError(
            f"{where}: {prefix}images must be uint8 (N, H, W) or (N, H, W, 3), not "
            f"{images.dtype} {shape}"
        )
    if not all(1 <= side <= _MOST_SIDE for side in shape[1:3]):
        raise UserError(f"{where}: {prefix}images of {shape[1]} x {shape[2]} pixels; at most 1024")
    if labels.dtype.kind not in "iu" or labels.ndim != 1:
        raise UserError(
            f"{where}: {prefix}labels must be integers (N,), not {labels.dtype} {labels.shape}"
        )
    if len(images) != len(labels):
        raise UserError(
            f"{where}: {len(images)} {prefix}images and {len(labels)} {prefix}labels; give one "
            "label for each picture"
        )
    if len(labels) and not 0 <= labels.min() <= labels.max() < _MOST_CLASSES:
        raise UserError(
            f"{where}: {prefix}labels are {labels.min()} to {labels.max()}; count classes from 0"
        )
    pixels = torch.from_numpy(np.ascontiguousarray(images))
    if pixels.ndim == 4:
        pixels = pixels.permute(0, 3, 1, 2).contiguous()
    return Examples(pixels, torch.from_numpy(labels.astype(np.int64)))


def _class_names(where: str, given: Any, examples: Examples) -> tuple[str, ...]:
    num = int(examples.labels.max()) + 1
    names = [str(name) for name in (range(num) if given is None else np.asarray(given).tolist())]
    if len(names) < num:
        raise UserError(f"{where}: {len(names)} class_names, and labels up to {num - 1}")
    if len(names) < 2:
        raise UserError(f"{where}: one class only; there is nothing to learn")
    if len(set(names)) < len(names) or not all(0 < len(name) <= 1024 for name in names):
        raise UserError(f"{where}: class_names must be distinct texts of 1 to 1024 characters")
    return tuple(names)


def _lengths(path: Path) -> dict[str, int]:
    """Returns the length of each array in a file, without reading the arrays."""
    found = {}
    with _refused(path), zipfile.ZipFile(path) as packed:
        if sum(member.file_size for member in packed.infolist()) > _MOST_BYTES:
            raise UserError(f"{path} unpacks to more than {_MOST_BYTES >> 30} GB")
        for name in packed.namelist():
            with packed.open(name) as member:
                version = np.lib.format.read_magic(member)
                shape, _, dtype = _HEADERS[version](member)
            if dtype.hasobject:
                raise UserError(f"{path}: {name} holds pickled objects, which are not read")
            found[name.removesuffix(".npy")] = shape[0] if shape else 0
    return found


_HEADERS = {
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
    try:
        with open(path, "rb") as file:
            return file_sha256(file)
    except FileNotFoundError:
        raise UserError(f"data.root={path}: no such file; check the path") from None
    except OSError as error:
        raise UserError(f"data.root={path} cannot be read: {error.strerror}") from None


def _arrays_sha256(arrays: list[Any]) -> str:
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(f"{array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()
