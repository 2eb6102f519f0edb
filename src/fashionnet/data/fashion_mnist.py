"""Fashion-MNIST as tensors: `keras.datasets.fashion_mnist.load_data()`."""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from fashionnet.data import sources
from fashionnet.data.examples import Dataset, Examples
from fashionnet.data.folders import data_folder
from fashionnet.errors import UserError

CLASS_NAMES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
_IDX_UNSIGNED_BYTE = 0x08
_MAX_IDX_DIMS = 4


def fashion_mnist(
    root: str | Path | None = None,
    classes: Sequence[str] | None = None,
    first: str | Path | None = None,
) -> Dataset:
    """Loads the training set; the first time, it fetches all four files (30 MB).

    It looks in `root` and `root/FashionMNIST/raw` (torchvision's layout) for files, packed or not;
    then it tries Debian's installed package, torchvision's mirrors and `apt-get download`. Every
    file is verified by checksum; a damaged one is named and replaced.

    Args:
        root: the data folder, `data.root` in the configuration; None takes `default_root()`.
        classes: names of the classes to take, whose labels are their places in this list; None
            takes all ten.
        first: a folder to look in before `root`. It is only read from: nothing is fetched,
            unpacked or repaired there.

    Raises:
        UserError: `root` is not a folder, the files can neither be found nor fetched, or a class
            does not exist.
    """
    kept = None if classes is None else _labels_of(classes)
    folder, before = data_folder(root), Path(first).absolute() if first else None
    num_test = sources.TEST[0].shape[0]
    return Dataset(
        name="fashion_mnist",
        class_names=CLASS_NAMES if classes is None else tuple(classes),
        image_shape=sources.TRAIN[0].shape[1:],
        train=_read_examples(folder, sources.TRAIN, kept, before),
        num_test=num_test if kept is None else num_test // len(CLASS_NAMES) * len(kept),
        sources={source.name: source.sha256 for source in sources.FILES},
        read_test=partial(_read_examples, folder, sources.TEST, kept, before),
    )


def _labels_of(classes: Sequence[str]) -> list[int]:
    for name in classes:
        if name not in CLASS_NAMES:
            raise UserError(
                f"data.classes: no class is called {name}; {', '.join(CLASS_NAMES)} are"
            )
    if len(set(classes)) != len(classes) or len(classes) < 2:
        raise UserError(f"data.classes={list(classes)} must name two or more classes, each once")
    return [CLASS_NAMES.index(name) for name in classes]


def parse_idx(content: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Reads the IDX format of LeCun's MNIST page, for unsigned bytes.

    Args:
        content: the whole file: 0, 0, 8, number of dimensions; the big-endian 32-bit size of each
            dimension; the values in row-major order.

    Returns:
        The values in their shape, as a view of `content`.

    Raises:
        UserError: it is not an IDX file, or is longer or shorter than its header says.
    """
    if len(content) < 4 or tuple(content[:3]) != (0, 0, _IDX_UNSIGNED_BYTE):
        raise UserError("not an IDX file of unsigned bytes: its magic number is wrong")
    num_dims = int(content[3])
    start = 4 + 4 * num_dims
    if not 1 <= num_dims <= _MAX_IDX_DIMS or len(content) < start:
        raise UserError(f"IDX header of {num_dims} dimensions in a file of {len(content)} bytes")
    shape = struct.unpack(f">{num_dims}I", content[4:start].tobytes())
    if len(content) - start != math.prod(shape):
        raise UserError(f"IDX header says {shape}, the file has {len(content) - start} values")
    return content[start:].reshape(shape)


def examples_from_idx(
    images: NDArray[np.uint8], labels: NDArray[np.uint8], num_examples: int
) -> Examples:
    """Makes tensors of the contents of two IDX files; the images share their memory.

    Raises:
        UserError: they are not `num_examples` pictures of 28 by 28 and as many labels of 0 to 9.
    """
    pixels, classes = parse_idx(images), parse_idx(labels)
    if pixels.shape != (num_examples, 28, 28) or classes.shape != (num_examples,):
        raise UserError(
            f"expected {num_examples} images of (28, 28) and their labels, "
            f"found shapes {pixels.shape} and {classes.shape}"
        )
    if (classes >= len(CLASS_NAMES)).any():
        raise UserError(f"labels must be 0 to {len(CLASS_NAMES) - 1}, found {classes.max()}")
    return Examples(torch.from_numpy(pixels), torch.from_numpy(classes).long())


def _read_examples(
    root: Path,
    pair: tuple[sources.Source, sources.Source],
    kept: Sequence[int] | None = None,
    first: Path | None = None,
) -> Examples:
    found = sources.read_in_place(first, pair) if first else None
    images, labels = found or sources.load(root, pair)
    examples = examples_from_idx(images, labels, pair[0].shape[0])
    if kept is None:
        return examples
    places = torch.full((len(CLASS_NAMES),), -1)
    places[list(kept)] = torch.arange(len(kept))
    relabeled = places[examples.labels]
    chosen = relabeled >= 0
    return Examples(examples.images[chosen], relabeled[chosen])
