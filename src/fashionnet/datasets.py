"""The data set that a configuration names: Fashion-MNIST, or photos of your own."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from fashionnet import data
from fashionnet.config import DataConfig
from fashionnet.data import Dataset, Examples

log = logging.getLogger(__name__)


def load(config: DataConfig, photo_size: int = 224) -> Dataset:
    """Returns the data set of a configuration.

    Args:
        photo_size: pixels of a photo's side where `data.size` is null.

    Raises:
        UserError: it cannot be found or read, or has no such class.
    """
    if config.name == "photos":
        from fashionnet.photos import photos

        size = photo_size if config.size is None else config.size
        return photos(config.root, size, config.seed, config.test_split)
    return data.fashion_mnist(config.root, config.classes)


def warn_of_absent_classes(
    class_names: Sequence[str], train: Examples, validation: Examples
) -> None:
    """Logs which classes have no picture in a part: of what these are worth, it says nothing."""
    for part, examples in (("training", train), ("validation", validation)):
        present = set(examples.labels.unique().tolist())
        absent = [repr(name) for label, name in enumerate(class_names) if label not in present]
        if absent and len(examples):
            log.warning("No %s picture shows %s", part, ", ".join(absent))
