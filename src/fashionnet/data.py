"""Fashion-MNIST as tensors: `keras.datasets.fashion_mnist.load_data()` and `validation_split`.

The whole set is 55 MB and sits in memory, so there is no loader and no worker. The test set stays
sealed: its files are opened by `Dataset.open_test` and by nothing before it.
"""

from __future__ import annotations

import hashlib
import math
import os
import struct
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fashionnet import sources
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


@dataclass(frozen=True, eq=False)
class Examples:
    """Pictures and what they show.

    Attributes:
        images: uint8, (N, 28, 28) gray or (N, 3, H, W) RGB, 0 to 255.
        labels: int64, (N,), indices into the class names.
    """

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device) -> Examples:
        """Returns the examples on `device`; themselves where they are there already."""
        return Examples(self.images.to(device), self.labels.to(device))

    def __getitem__(self, part: slice) -> Examples:
        """Returns a part; its tensors are views, nothing is copied."""
        return Examples(self.images[part], self.labels[part])

    def __repr__(self) -> str:
        return f"<{len(self)} examples>"


@dataclass(frozen=True, eq=False)
class Dataset:
    """A set of labelled pictures with a sealed test set.

    Attributes:
        name: As in the configuration, `data=NAME`.
        class_names: One a label.
        image_shape: Of one picture, (height, width) or (3, height, width).
        train: The training set, of which `split` takes the validation set.
        num_test: Number of test pictures, known without opening them.
        sources: sha256 of each source file, unpacked.
        read_test: Reads the test set from the disk and verifies its checksums.
        num_validation: How many examples, the last of `train`, the data themselves set apart for
            validation; None where `validation_split` says so.
        counts: How many pictures each of `sources` holds, where these are of the user's own.
        order_sha256: Of which pictures the rows of the training and the test set are, where
            `sources` does not say it.
    """

    name: str
    class_names: tuple[str, ...]
    image_shape: tuple[int, ...]
    train: Examples
    num_test: int
    sources: dict[str, str]
    read_test: Callable[[], Examples] = field(repr=False)
    num_validation: int | None = None
    counts: dict[str, int] = field(default_factory=dict)
    order_sha256: str = ""

    def split(self, validation_split: float, limit: int | None = None) -> tuple[Examples, Examples]:
        """Returns the training and the validation part, as views; see the function `split`.

        Raises:
            UserError: As `split`.
        """
        first, last = self.split_ranges(validation_split, limit)
        return self.train[first.start : first.stop], self.train[last.start : last.stop]

    def split_ranges(
        self, validation_split: float, limit: int | None = None
    ) -> tuple[range, range]:
        """Returns which examples of `train` are trained and validated on.

        Raises:
            UserError: As `split`.
        """
        num = len(self.train)
        if self.num_validation is None:
            return split_ranges(num, validation_split, limit)
        trained, _ = split_ranges(num - self.num_validation, 0, limit)
        return trained, range(num - self.num_validation, num)

    def open_test(self) -> Examples:
        """Opens the seal of the test set: a use that is to be counted.

        Raises:
            UserError: It is damaged and cannot be fetched again.
        """
        return self.read_test()


def default_root() -> Path:
    """Returns the data folder: `$FASHIONNET_DATA`, or a folder in the user's cache."""
    if chosen := os.environ.get("FASHIONNET_DATA"):
        return Path(chosen).expanduser()
    import platformdirs

    return platformdirs.user_cache_path("fashionnet", appauthor=False) / "data"


def fashion_mnist(
    root: str | Path | None = None,
    classes: Sequence[str] | None = None,
    first: str | Path | None = None,
) -> Dataset:
    """Loads the training set; the first time, it fetches all four files (30 MB).

    Looks in `root` and in `root/FashionMNIST/raw` (torchvision's layout), for files packed or not;
    then tries Debian's installed package, torchvision's mirrors and `apt-get download`. Every
    file is verified by checksum; a damaged one is named and replaced.

    Args:
        root: The data folder, `data.root` in the configuration. None: `default_root()`.
        classes: Names of the classes to take, whose labels are their places in this list. None:
            all ten.
        first: A folder to look in before `root`. It is read from alone: nothing is fetched,
            unpacked or mended there.

    Raises:
        UserError: `root` is no folder, the files can neither be found nor fetched, or there is no
            such class.
    """
    kept = None if classes is None else _labels_of(classes)
    folder, before = _data_folder(root), Path(first).absolute() if first else None
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


def split(
    train: Examples, validation_split: float, limit: int | None = None
) -> tuple[Examples, Examples]:
    """Takes the last part as the validation set, unshuffled, as Keras' `validation_split` does.

    Args:
        train: N examples.
        validation_split: In [0, 1); 0.1 of 60,000 gives 54,000 and 6,000. With 0 the validation
            set is empty.
        limit: Train on the first `limit` examples of the training part only. None: on all.

    Returns:
        The training and the validation part, as views.

    Raises:
        UserError: `validation_split` is out of range or leaves a part empty, or `limit` is.
    """
    first, last = split_ranges(len(train), validation_split, limit)
    return train[first.start : first.stop], train[last.start : last.stop]


def split_ranges(
    num: int, validation_split: float, limit: int | None = None
) -> tuple[range, range]:
    """Returns which of `num` examples are trained and validated on; arguments as in `split`.

    Raises:
        UserError: As `split`.
    """
    if not 0 <= validation_split < 1:
        raise UserError(f"validation_split={validation_split} must be at least 0 and less than 1")
    # keras.src.trainers.data_adapters.array_slicing.train_validation_split, rounding included
    boundary = math.floor(num * (1.0 - validation_split))
    if boundary == 0 or (boundary == num and validation_split > 0):
        empty = "training" if boundary == 0 else "validation"
        raise UserError(
            f"validation_split={validation_split} of {num} images leaves no {empty} image"
        )
    if limit is not None and not 1 <= limit <= boundary:
        raise UserError(
            f"data.limit={limit} must be between 1 and the {boundary} images of the training part"
        )
    return range(boundary if limit is None else limit), range(boundary, num)


def split_sha256(parts: Iterable[Iterable[int]], order_sha256: str = "") -> str:
    """Returns the hash of a split: the numbers of the examples of each part, in order.

    Args:
        order_sha256: says which pictures have these numbers, see `Dataset`.
    """
    digest = hashlib.sha256(order_sha256.encode())
    for part in parts:
        numbers = np.fromiter(part, "<i8")
        digest.update(len(numbers).to_bytes(8, "little") + numbers.tobytes())
    return digest.hexdigest()


def parse_idx(content: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Reads the IDX format of LeCun's MNIST page, for unsigned bytes.

    Args:
        content: The whole file: 0, 0, 8, number of dimensions; the big-endian 32-bit size of each
            dimension; the values in row-major order.

    Returns:
        The values in their shape, as a view of `content`.

    Raises:
        UserError: It is no such file, or longer or shorter than its header says.
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
        UserError: They are not `num_examples` pictures of 28 by 28 and as many labels of 0 to 9.
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
    relabelled = places[examples.labels]
    chosen = relabelled >= 0
    return Examples(examples.images[chosen], relabelled[chosen])


def _data_folder(root: str | Path | None) -> Path:
    """Returns the absolute folder: the test set may be opened after a change of directory."""
    try:
        folder = Path(root or default_root()).expanduser().absolute()
    except RuntimeError as error:  # ~nobody
        raise UserError(f"data.root={root}: {error}") from error
    for path in (folder, *folder.parents):
        if path.exists():
            if not path.is_dir():
                raise UserError(f"data.root={folder}: {path} is a file, choose a folder")
            break
    return folder
