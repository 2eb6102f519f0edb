"""The sets that a saved run is looked at on: its validation set, and the test set, counted."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fashionnet.errors import UserError

if TYPE_CHECKING:
    from fashionnet.data.examples import Examples
    from fashionnet.runs.saved import SavedRun

SPLITS = ("validation", "test")


@dataclass(frozen=True, eq=False)
class Chosen:
    """What a run is looked at on.

    Attributes:
        other_data: how the data differ from those of the run, in words; None for the run's own.
    """

    examples: Examples
    other_data: str | None


def examples_of(
    run: SavedRun, split: str, root: str | Path | None = None, only_own: str = ""
) -> Chosen:
    """Returns the examples of a split; a use of the test set is counted before it is read.

    Args:
        root: the data folder, which may hold other photos than the run's; None takes the run's
            own folder, if it is there, else the default, and refuses other data there.
        only_own: why other data are refused from `root` too, with the way out.

    Raises:
        UserError: no such split, no data, other data where these are refused or which have other
            classes, or a test use that cannot be counted.
    """
    from fashionnet import data as datasets
    from fashionnet.runs import saved

    if split not in SPLITS:
        raise UserError(f"split={split} is not known; choose {' or '.join(SPLITS)}")
    config = run.config
    dataset = datasets.load_recorded(config.data, run.record["data"]["image_shape"], root)
    now = datasets.describe(dataset, config.validation_split, config.data.limit)
    if split == "validation" and not now["validation"]:
        raise UserError(f"{run.path} held no validation set out (validation_split=0)")
    other = datasets.difference(run.record["data"], now)
    if other is not None:
        advice = only_own
        if not root:
            advice = "--data-root DIR names the data of the run, or others"
        elif list(run.record["data"]["class_names"]) != now["class_names"]:
            advice = "choose data of the same classes"
        if advice:
            raise datasets.OtherData(f"{run.path} was trained on other data: {other}; {advice}")
    if split == "test":
        saved.count_test_use(run.path)  # others, too: the run's own may be among them
        return Chosen(dataset.open_test(), other)
    _, examples = dataset.split(config.validation_split)
    return Chosen(examples, other)
