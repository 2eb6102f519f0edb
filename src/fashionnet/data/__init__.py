"""Data sets: loading the one that a configuration names and comparing it with a recorded one."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

from fashionnet.config.schema import PUBLISHED, DataConfig
from fashionnet.data import arrays, published
from fashionnet.data.examples import Dataset, Examples, split_sha256
from fashionnet.errors import UserError

log = logging.getLogger(__name__)

# Data sets that somebody holds, by what they were loaded from.
_in_use: WeakValueDictionary[str, Dataset] = WeakValueDictionary()


class OtherData(UserError):
    """The data differ from those of a run."""


def load(config: DataConfig, photo_size: int = 224) -> Dataset:
    """Returns the data set of a configuration; jobs that run side by side share it.

    Args:
        photo_size: the pixels of a photo's side if `data.size` is null.

    Raises:
        UserError: it cannot be found or read, or a class does not exist.
    """
    key = f"{config} {photo_size}"
    dataset = _in_use.get(key)
    if dataset is None:
        dataset = _in_use[key] = _load(config, photo_size)
    return dataset


def _load(config: DataConfig, photo_size: int) -> Dataset:
    if config.name == "photos":
        from fashionnet.data.photos import photos

        size = photo_size if config.size is None else config.size
        return photos(config.root, size, config.seed, config.test_split)
    if config._target_ is not None:
        target, split = config._target_, config.test_split
        return arrays.from_function(config.name, target, config.root, config.seed, split)
    if config.name == "npz":
        return arrays.from_file(config.root, config.seed, config.test_split)
    return published.load(config.name, config.root, config.classes)


def load_recorded(
    config: DataConfig, image_shape: Sequence[int], root: str | Path | None = None
) -> Dataset:
    """Returns the data set that a run's record names.

    The record may be a stranger's, so the recorded folder is never written to.

    Args:
        image_shape: of a picture, as recorded.
        root: the folder that the user names instead; None takes the recorded one, or the default
            if that does not hold the files of a published data set.

    Raises:
        UserError: as `load`, or the photos are not where they were.
    """
    if root:
        return load(replace(config, root=str(root)), image_shape[-1])
    if config._target_ is not None:
        return load(config, image_shape[-1])
    folder = recorded_place(config)
    if config.name in PUBLISHED:
        return published.load(config.name, None, config.classes, first=folder)
    if folder is None:
        raise UserError(
            f"the data of the run were in {config.root}, which cannot be read here; "
            "--data-root names where they are now"
        )
    return load(replace(config, root=str(folder)), image_shape[-1])


def recorded_place(config: DataConfig) -> Path | None:
    """Returns the data folder or file that a run's record names; None if it is not here."""
    try:
        place = Path(config.root or "").expanduser().absolute()
        is_there = place.is_file() if config.name == "npz" else place.is_dir()
        return place if config.root and is_there else None
    except (OSError, RuntimeError, ValueError):  # ~nobody, or a NUL
        return None


def describe(dataset: Dataset, validation_split: float, limit: int | None) -> dict[str, Any]:
    """Returns what identifies a data set and its split, for the record of a run.

    Args:
        limit: as in `Dataset.split`; it may exceed the set.
    """
    train, validation = dataset.split_ranges(validation_split)
    train = train[:limit]
    described: dict[str, Any] = {
        "name": dataset.name,
        "sha256": dict(dataset.sources),
        "train": len(train),
        "validation": len(validation),
        "test": dataset.num_test,
        "split_sha256": split_sha256((train, validation), dataset.order_sha256),
        "image_shape": list(dataset.image_shape),
        "class_names": list(dataset.class_names),
    }
    return described | ({"counts": dict(dataset.counts)} if dataset.counts else {})


def difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """Returns in words how data differ from those in a record; None if they do not.

    Args:
        before: the record's description of its data.
        now: what `describe` returns for the others, or the part of it that is to be compared.
    """
    found = [
        f"{what}: {_in_words(before[key])} then, {_in_words(now[key])} now"
        for key, what in (("name", "data"), ("class_names", "classes"), ("image_shape", "shape"))
        if key in now and before[key] != now[key]
    ]
    old, new = before["sha256"], now["sha256"]
    counts, counts_now = (each.get("counts", {}) for each in (before, now))
    for part in [part for part in {**old, **new} if old.get(part) != new.get(part)]:
        if part in old and part in new:
            num, num_now = counts.get(part), counts_now.get(part)
            now_what = "as many now, other files or names" if num == num_now else f"{num_now} now"
            found.append(f"{part} has changed ({num} pictures then, {now_what})")
        else:
            found.append(f"{part} is {'new' if part in new else 'gone'}")
    sizes = ("train", "validation", "test")
    if not found and any(before[key] != now[key] for key in (*sizes, "split_sha256") if key in now):
        old, new = (", ".join(f"{data[key]} for {key}" for key in sizes) for data in (before, now))
        found.append(f"the same pictures are split differently ({old} then; {new} now)")
    return "; ".join(found) or None


def _in_words(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def warn_of_absent_classes(
    class_names: Sequence[str], train: Examples, validation: Examples
) -> None:
    """Logs which classes have no picture in a part, whose figures do not cover them."""
    for part, examples in (("training", train), ("validation", validation)):
        present = set(examples.labels.unique().tolist())
        absent = [repr(name) for label, name in enumerate(class_names) if label not in present]
        if absent and len(examples):
            log.warning("No %s picture shows %s", part, ", ".join(absent))
