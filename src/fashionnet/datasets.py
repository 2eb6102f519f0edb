"""The data set that a configuration names: Fashion-MNIST, or photos of your own."""

from __future__ import annotations

from fashionnet import data
from fashionnet.config import DataConfig
from fashionnet.data import Dataset


def load(config: DataConfig) -> Dataset:
    """Returns the data set of a configuration.

    Raises:
        UserError: it cannot be found or read, or has no such class.
    """
    if config.name == "photos":
        from fashionnet.photos import photos

        return photos(config.root, config.size, config.seed, config.test_split)
    return data.fashion_mnist(config.root, config.classes)
