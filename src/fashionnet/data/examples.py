"""Labeled pictures in memory, the sealed test set, and Keras' `validation_split`.

A set sits in memory as tensors, so no loader and no worker is needed. The test set stays sealed:
only `Dataset.open_test` opens its files.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from fashionnet.errors import UserError
from fashionnet.system import devices


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
        """Returns the examples on `device`; themselves if they are there already.

        Pictures stay in the host's memory if they would take more than half of what the device has
        free; batches of them are copied as they are used.
        """
        fit = 2 * self.images.nbytes <= devices.free_memory_bytes(device)
        images = self.images.to(device) if fit or device.type == "cpu" else self.images
        return Examples(images, self.labels.to(device))

    def __getitem__(self, part: slice) -> Examples:
        """Returns a part; its tensors are views, nothing is copied."""
        return Examples(self.images[part], self.labels[part])

    def __repr__(self) -> str:
        return f"<{len(self)} examples>"


@dataclass(frozen=True, eq=False)
class Dataset:
    """A set of labeled pictures with a sealed test set.

    Attributes:
        name: as in the configuration, `data=NAME`.
        class_names: one for each label.
        image_shape: of one picture, (height, width) or (3, height, width).
        train: the training set, from which `split` takes the validation set.
        num_test: the number of test pictures, known without opening them.
        sources: the sha256 of each source file, unpacked.
        read_test: reads the test set from the disk and verifies its checksums.
        num_validation: how many examples, the last of `train`, the data themselves set apart for
            validation; None if `validation_split` decides.
        counts: how many pictures each of `sources` holds, if they are the user's own.
        order_sha256: the hash of which picture is in which row of the training and the test set,
            if `sources` does not determine it.
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
        """Returns the training and the validation part, as views; see `split_ranges`."""
        first, last = self.split_ranges(validation_split, limit)
        return self.train[first.start : first.stop], self.train[last.start : last.stop]

    def split_ranges(
        self, validation_split: float, limit: int | None = None
    ) -> tuple[range, range]:
        """Returns which examples of `train` are trained and validated on; see `split_ranges`."""
        num = len(self.train)
        if self.num_validation is None:
            return split_ranges(num, validation_split, limit)
        trained, _ = split_ranges(num - self.num_validation, 0, limit)
        return trained, range(num - self.num_validation, num)

    def open_test(self) -> Examples:
        """Opens the sealed test set; the caller counts this use.

        Raises:
            UserError: it is damaged and cannot be fetched again.
        """
        return self.read_test()


def split_ranges(
    num: int, validation_split: float, limit: int | None = None
) -> tuple[range, range]:
    """Takes the last part for validation, unshuffled, as Keras' `validation_split` does.

    Args:
        num: how many examples there are.
        validation_split: in [0, 1); 0.1 of 60,000 gives 54,000 and 6,000. With 0 the validation
            set is empty.
        limit: train on the first `limit` examples of the training part only; None takes all.

    Returns:
        Which examples are trained and validated on.

    Raises:
        UserError: `validation_split` or `limit` is out of range, or a part is left empty.
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
    """Returns the hash of a split: the indices of the examples of each part, in order.

    Args:
        order_sha256: determines which pictures have these indices, see `Dataset`.
    """
    digest = hashlib.sha256(order_sha256.encode())
    for part in parts:
        numbers = np.fromiter(part, "<i8")
        digest.update(len(numbers).to_bytes(8, "little") + numbers.tobytes())
    return digest.hexdigest()
