"""Fashion-MNIST as tensors: `keras.datasets.fashion_mnist.load_data()`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

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
                f"data.classes: no class is called {name}; choose from {', '.join(CLASS_NAMES)}"
            )
    if len(set(classes)) != len(classes) or len(classes) < 2:
        raise UserError(f"data.classes={list(classes)} must name two or more classes, each once")
    return [CLASS_NAMES.index(name) for name in classes]


def _read_examples(
    root: Path,
    pair: tuple[sources.Source, sources.Source],
    kept: Sequence[int] | None = None,
    first: Path | None = None,
) -> Examples:
    contents = sources.read_in_place(first, pair) if first else None
    images, labels = (
        torch.from_numpy(source.values(content))
        for source, content in zip(pair, contents or sources.load(root, pair), strict=True)
    )
    examples = Examples(images, labels.long())
    if kept is None:
        return examples
    places = torch.full((len(CLASS_NAMES),), -1)
    places[list(kept)] = torch.arange(len(kept))
    relabeled = places[examples.labels]
    chosen = relabeled >= 0
    return Examples(examples.images[chosen], relabeled[chosen])
