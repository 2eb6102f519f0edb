"""The data sets that are published under a name, as tensors: `keras.datasets.NAME.load_data()`.

Addresses and file names are torchvision's. Of CIFAR-10 the binary form is taken, which has to be
parsed, not unpickled.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from fashionnet.data import fetching
from fashionnet.data.examples import Dataset, Examples
from fashionnet.data.folders import data_folder
from fashionnet.data.sources import Content, Published, Source
from fashionnet.errors import UserError


def _images_and_labels(tensors: Sequence[Content]) -> tuple[Tensor, Tensor]:
    """Two files as MNIST has them: (N, H, W) and (N,)."""
    images, labels = map(torch.from_numpy, tensors)
    return images, labels


def _records(tensors: Sequence[Content]) -> tuple[Tensor, Tensor]:
    """Any number of files as CIFAR-10 has them: (N, 1 + 3 * 32 * 32), the label first."""
    records = [torch.from_numpy(tensor) for tensor in tensors]
    images = torch.cat([each[:, 1:] for each in records]).view(-1, 3, 32, 32)
    return images, torch.cat([each[:, 0] for each in records])


def _idx(part: str, images: str, labels: str, is_packed: bool = False) -> tuple[Source, Source]:
    """Returns the two files of a part in MNIST's form, with their sha256, unpacked or packed."""

    def source(kind: str, shape: tuple[int, ...], sha256: str) -> Source:
        name, header = f"{part}-{kind}-ubyte", 4 + 4 * len(shape)  # a magic number and the shape
        known = ("", sha256) if is_packed else (sha256, "")
        return Source(name, shape, header, f"{name}.gz", *known)

    num = {"train": 60_000, "t10k": 10_000}[part]
    return source("images-idx3", (num, 28, 28), images), source("labels-idx1", (num,), labels)


def _cifar(**files: str) -> tuple[Source, ...]:
    """Returns files of CIFAR-10, by their names and sha256."""
    packed = "cifar-10-binary.tar.gz"
    packed_sha256 = "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"
    shape = (10_000, 1 + 3 * 32 * 32)
    return tuple(
        Source(f"{name}.bin", shape, 0, packed, sha256, packed_sha256)
        for name, sha256 in files.items()
    )


SETS = {
    "fashion_mnist": Published(
        title="Fashion-MNIST",
        class_names=(
            *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
            *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
        ),
        image_shape=(28, 28),
        folder=Path("FashionMNIST", "raw"),
        train=_idx(
            "train",
            "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
            "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
        ),
        test=_idx(
            "t10k",
            "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
            "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
        ),
        read=_images_and_labels,
        mirrors=("http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",),
        megabytes=30,
        debian="fashion-mnist",
    ),
    "mnist": Published(
        title="MNIST",
        class_names=tuple("0123456789"),
        image_shape=(28, 28),
        folder=Path("MNIST", "raw"),
        train=_idx(
            "train",
            "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
            "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
        ),
        test=_idx(
            "t10k",
            "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
            "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
        ),
        read=_images_and_labels,
        mirrors=(
            "https://ossci-datasets.s3.amazonaws.com/mnist/",
            "http://yann.lecun.com/exdb/mnist/",
        ),
        megabytes=12,
    ),
    "kmnist": Published(
        title="Kuzushiji-MNIST",
        class_names=("o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo"),
        image_shape=(28, 28),
        folder=Path("KMNIST", "raw"),
        train=_idx(
            "train",
            "51467d22d8cc72929e2a028a0428f2086b092bb31cfb79c69cc0a90ce135fde4",
            "e38f9ebcd0f3ebcdec7fc8eabdcdaef93bb0df8ea12bee65224341c8183d8e17",
            is_packed=True,
        ),
        test=_idx(
            "t10k",
            "edd7a857845ad6bb1d0ba43fe7e794d164fe2dce499a1694695a792adfac43c5",
            "20bb9a0ef54c7db3efc55a92eef5582c109615df22683c380526788f98e42a1c",
            is_packed=True,
        ),
        read=_images_and_labels,
        mirrors=("http://codh.rois.ac.jp/kmnist/dataset/kmnist/",),
        megabytes=21,
    ),
    "cifar10": Published(
        title="CIFAR-10",
        class_names=(
            *("airplane", "automobile", "bird", "cat", "deer"),
            *("dog", "frog", "horse", "ship", "truck"),
        ),
        image_shape=(3, 32, 32),
        folder=Path("cifar-10-batches-bin"),
        train=_cifar(
            data_batch_1="cee916563c9f80d84e3cc88e17fdc0941787f1244f00a67874d45b261883ada5",
            data_batch_2="a591ca11fa1708a91ee40f54b3da4784ccd871ecf2137de63f51ada8b3fa57ed",
            data_batch_3="bbe8596564c0f86427f876058170b84dac6670ddf06d79402899d93ceea26f67",
            data_batch_4="014e562d6e23c72197cc727519169a60359f5eccd8945ad5a09d710285ff4e48",
            data_batch_5="755304fc0b379caeae8c14f0dac912fbc7d6cd469eb67a1029a08a39453a9add",
        ),
        test=_cifar(test_batch="8e2eb146ae340b09e24670f29cabc6326dba54da8789dab6768acf480273f65b"),
        read=_records,
        mirrors=("https://www.cs.toronto.edu/~kriz/",),
        megabytes=170,
    ),
}


def load(
    name: str,
    root: str | Path | None = None,
    classes: Sequence[str] | None = None,
    first: str | Path | None = None,
) -> Dataset:
    """Loads the training set; the first time, it fetches all files.

    It looks in `root` and in the data set's own folder there, laid out as torchvision does, for
    files, packed or not; then it tries Debian's installed package, the mirrors and `apt-get
    download`. Every file is verified by checksum; a damaged one is named and replaced.

    Args:
        name: one of `SETS`.
        root: the data folder, `data.root` in the configuration; None takes `default_root()`.
        classes: names of the classes to take, whose labels are their places in this list; None
            takes all. Of Fashion-MNIST alone.
        first: a folder to look in before `root`. It is only read from: nothing is fetched,
            unpacked or repaired there.

    Raises:
        UserError: `root` is not a folder, the files can neither be found nor fetched, or a class
            does not exist.
    """
    data = SETS[name]
    kept = None if classes is None else _labels_of(classes, data.class_names)
    folder, before = data_folder(root), Path(first).absolute() if first else None
    return Dataset(
        name=name,
        class_names=data.class_names if classes is None else tuple(classes),
        image_shape=data.image_shape,
        train=_read_examples(folder, data, data.train, kept, before),
        num_test=data.num_test if kept is None else data.num_test // 10 * len(kept),
        sources=dict(source.kept for source in data.files),
        read_test=partial(_read_examples, folder, data, data.test, kept, before),
    )


def _labels_of(classes: Sequence[str], known: Sequence[str]) -> list[int]:
    for name in classes:
        if name not in known:
            raise UserError(
                f"data.classes: no class is called {name}; choose from {', '.join(known)}"
            )
    if len(set(classes)) != len(classes) or len(classes) < 2:
        raise UserError(f"data.classes={list(classes)} must name two or more classes, each once")
    return [known.index(name) for name in classes]


def _read_examples(
    root: Path,
    data: Published,
    part: Sequence[Source],
    kept: Sequence[int] | None = None,
    first: Path | None = None,
) -> Examples:
    contents = fetching.read_in_place(first, data, part) if first else None
    contents = contents or fetching.load(root, data, part)
    tensors = [source.values(each) for source, each in zip(part, contents, strict=True)]
    images, labels = data.read(tensors)
    if kept is None:
        return Examples(images, labels.long())
    places = torch.full((len(data.class_names),), -1)
    places[list(kept)] = torch.arange(len(kept))
    relabeled = places[labels.long()]
    chosen = relabeled >= 0
    return Examples(images[chosen], relabeled[chosen])
