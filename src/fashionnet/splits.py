"""The sets that a saved run is looked at on: its validation set, and the test set, counted."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from fashionnet.errors import UserError

if TYPE_CHECKING:
    from fashionnet.data import Examples
    from fashionnet.runs import SavedRun

SPLITS = ("validation", "test")


def check(split: str) -> None:
    """Refuses a name that is no split, before anything is read.

    Raises:
        UserError: it is none of `SPLITS`.
    """
    if split not in SPLITS:
        raise UserError(f"split={split} is not known; choose {' or '.join(SPLITS)}")


def examples_of(run: SavedRun, split: str, root: str | None = None) -> Examples:
    """Returns the examples of a split; a use of the test set is counted before it is read.

    Args:
        root: the data folder; None takes the run's, if it is there, else the default.

    Raises:
        UserError: no such split, no data, other data than the run was trained on, or a test use
            that cannot be counted.
    """
    from fashionnet import datasets, record, runs

    check(split)
    place = root or runs.data_root(run.config)
    size = run.record["data"]["image_shape"][-1]
    dataset = datasets.load(replace(run.config.data, root=place), size)
    described = {key: tuple(run.record["data"][key]) for key in ("image_shape", "class_names")}
    for key, value in described.items():
        if value != getattr(dataset, key):
            raise UserError(f"{run.path / record.NAME} describes other data: its {key} differ")
    if split == "test":
        runs.count_test_use(run.path)
        return dataset.open_test()
    _, examples = dataset.split(run.config.validation_split)
    if not len(examples):
        raise UserError(f"{run.path} held no validation set out (validation_split=0)")
    return examples
