"""Photos of your own as a data set: a folder for each class.

`data.root` holds a folder of photos for each class, as for Keras' `image_dataset_from_directory`,
or `train/` and `val/` or `test/` with such folders in them.

* With class folders alone, or `train/` alone, `test_split` of each class is held out for the test.
* With `train/` and one of `val/` and `test/`, that one is the test set.
* With all three, `val/` is the validation set, and `validation_split` is not used.

The training photos come in a seeded order that is stratified throughout: the last part, which
`validation_split` takes, and the first `data.limit` hold each class in proportion, to within less
than one photo. If equal classes cannot all have the same number, the seed decides which do.

Each photo is decoded once, into a cache that knows it by the hash of its content. Every file is
hashed on every load, so a photo that changed is a new photo.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from fashionnet.data import picture_files, pictures
from fashionnet.data.examples import Dataset, Examples
from fashionnet.data.folders import data_folder, default_root
from fashionnet.data.photos import cache as decoded, finding, ordering
from fashionnet.data.photos.finding import Photo
from fashionnet.errors import UserError

log = logging.getLogger(__name__)

SIZES = range(8, 1025)
TRANSFORM = 2  # counted up when `decode` gives other pixels, or the cache another format
_MAX_UNREADABLE = 0.05  # of the photos; one is always allowed
_MAX_IMBALANCE = 10


def photos(
    root: str | Path | None,
    size: int = 224,
    seed: int = 0,
    test_split: float = 0.2,
    cache: Path | None = None,
) -> Dataset:
    """Loads a folder of photos; the first time, it decodes them into the cache.

    Damaged photos are skipped with a warning, up to 5 % of all (one is always allowed).

    Args:
        root: the folder, `data.root` in the configuration.
        size: the pixels of a side, see `decode`.
        seed: decides the order, and the split if `root` has no test set of its own.
        test_split: the fraction of each class that is then held out, at least one photo and never
            all.
        cache: its folder; None takes `photos` in `default_root()`.

    Returns:
        The data set. Its images are RGB, (N, 3, size, size), mapped from a file. Class names are
        the sorted names of the folders. `sources` holds the sha256 of what `sha256sum` prints of
        the photos in a folder, sorted by path.

    Raises:
        UserError: the folder does not exist, its classes cannot be learned or differ between its
            parts, too many photos are damaged, or the cache cannot be written or is damaged.
    """
    if not root:
        raise UserError("data.root=FOLDER is needed for data=photos")
    if size not in SIZES:
        raise UserError(f"data.size={size} must be {SIZES.start} to {SIZES.stop - 1}")
    if not 0 < test_split < 1:
        raise UserError(f"data.test_split={test_split} must be above 0 and below 1")
    folder = data_folder(root)
    if not folder.is_dir():
        raise UserError(f"data.root={folder} is not a folder; check the path")
    class_names, parts = finding.find(folder)
    for part, members in parts.items():
        paths = [folder / photo.path for photo in members]
        hashes = decoded.in_parallel(decoded.sha256, paths, "checking photos")
        parts[part] = [replace(photo, sha256=h) for photo, h in zip(members, hashes, strict=True)]
    sources = {part: ordering.manifest_sha256(members) for part, members in parts.items()}
    counts = {part: len(members) for part, members in parts.items()}

    store = (cache or default_root() / "photos").absolute() / f"{size}-v{TRANSFORM}"
    everything = [photo for members in parts.values() for photo in members]
    unreadable = decoded.decode_new(store, folder, everything, size)
    if len(unreadable) > max(1, _MAX_UNREADABLE * len(everything)):
        raise UserError(
            f"{len(unreadable)} of {len(everything)} photos in {folder} cannot be read, more than "
            f"{_MAX_UNREADABLE:.0%}; repair or remove {_pairs(unreadable.items())}"
        )
    for part, members in parts.items():
        parts[part] = [photo for photo in members if photo.path not in unreadable]
    finding.check_counts(parts, class_names, folder)
    train, test, num_validation = ordering.arranged(parts, seed, test_split)
    if unreadable:
        log.warning("%d photos cannot be read: %s", len(unreadable), _pairs(unreadable.items()))
    if alike := decoded.alike(store, test, train, size):
        log.warning(
            "%d test photos look like training photos, so the test accuracy may be too high; "
            "remove one of each pair: %s",
            *(len(alike), _pairs(alike)),
        )
    _report_classes(train, class_names)
    return Dataset(
        name="photos",
        class_names=class_names,
        image_shape=(3, size, size),
        train=_examples(store, train, size),
        num_test=len(test),
        sources=sources,
        read_test=partial(_examples, store, test, size),
        num_validation=num_validation,
        counts=counts,
        order_sha256=ordering.order_sha256(train, test),
    )


def read(path: str | Path, size: int) -> pictures.Picture:
    """Reads one photo for a prediction, with the pixels it would have in a data set.

    Raises:
        UserError: the file is missing, is not a picture, is damaged, or is too large to be opened
            safely.
    """
    with picture_files.named(path), picture_files.open_file(path) as file:
        pixels = torch.from_numpy(decoded.decode(file.read(), size))
    return pictures.Picture(str(path), pixels, (f"cropped to {size}x{size}",))


def _examples(store: Path, members: Sequence[Photo], size: int) -> Examples:
    labels = torch.tensor([photo.label for photo in members])
    return Examples(decoded.read(store, members, size), labels)


def _report_classes(train: Sequence[Photo], class_names: Sequence[str]) -> None:
    counts = Counter(photo.label for photo in train)
    listed = ", ".join(f"{name} {counts[label]}" for label, name in enumerate(class_names))
    log.info("Training photos, before validation_split: %s", listed)
    most, least = max(counts, key=counts.__getitem__), min(counts, key=counts.__getitem__)
    if counts[most] > _MAX_IMBALANCE * counts[least]:
        log.warning(
            "Class %r has %d training photos and %r has %d; accuracy says little about the latter",
            *(class_names[most], counts[most], class_names[least], counts[least]),
        )


def _pairs(pairs: Iterable[tuple[str, str]]) -> str:
    return finding.listed([f"{first!r} ({second})" for first, second in pairs])
