"""What differs between two runs: configuration, environment, results, and the first epoch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fashionnet.config import schema
from fashionnet.config.schema import at
from fashionnet.errors import visible
from fashionnet.runs import record
from fashionnet.runs.saved import SavedRun

ENVIRONMENT = (
    "packages",
    "torch_build",
    "python",
    "platform",
    "processor",
    "gpu",
    "device",
    "threads",
    "processes",
    "deterministic",
    "precision",
    "input",
    "git",
)
RESULTS = ("status", "epochs_done", "best_epoch", "validation", "test", "weights_sha256")

# How far two runs of one seed may diverge by rounding alone, on other machines or thread counts:
# the lesson's step with another order of additions moved training loss by up to 0.5 %,
# validation loss by up to 7 %, training accuracy by up to 0.0012, validation accuracy by 0.007.
RELATIVE = {"loss": 0.01, "val_loss": 0.1}
ABSOLUTE = {"accuracy": 0.005, "val_accuracy": 0.02}
BOUNDS = "loss 1 %, val_loss 10 % (relative); accuracy 0.005, val_accuracy 0.02 (absolute)"


@dataclass(frozen=True)
class Difference:
    """A figure, setting or fact that differs between two runs."""

    key: str
    first: Any
    second: Any
    epoch: int | None = None

    def __str__(self) -> str:
        where = f"epoch {self.epoch}, " if self.epoch is not None else ""
        return f"{where}{visible(self.key)}: {_short(self.first)} -> {_short(self.second)}"


def of_config(first: SavedRun, second: SavedRun) -> list[Difference]:
    """Returns the configuration keys that differ, also those without effect on the numbers."""
    return _of(first.record["config"], second.record["config"])


def of_environment(first: SavedRun, second: SavedRun) -> list[Difference]:
    """Returns what differs in packages, torch build, machine, threads, device and code."""
    found = _of(_part(first.record, ENVIRONMENT), _part(second.record, ENVIRONMENT))
    if first.patch != second.patch:
        found.append(Difference(record.PATCH, len(first.patch), len(second.patch)))
    jobs = [run.record.get("group", {}).get("jobs", 1) for run in (first, second)]
    # On a CPU the steps of a group have the bits of each of its runs alone.
    if jobs[0] != jobs[1] and first.record["device"] != "cpu":
        found.append(Difference("group.jobs", *jobs))
    return found


def of_results(first: SavedRun, second: SavedRun) -> list[Difference]:
    """Returns what differs in the results, the data and the initial weights."""
    found = of_beginning(first, second)
    if (epoch := of_epochs(first, second)) is not None:
        found.append(epoch)
    return found + _of(_part(first.record, RESULTS), _part(second.record, RESULTS))


def of_beginning(first: SavedRun, second: SavedRun) -> list[Difference]:
    """Returns what differs in checksums of the data, the split and the initial weights."""
    keys = ("sha256", "split_sha256")
    found = _of(*({"data": _part(run.record["data"], keys)} for run in (first, second)))
    return found + _of(*(_part(run.record, ("initial_weights_sha256",)) for run in (first, second)))


def of_epochs(first: SavedRun, second: SavedRun) -> Difference | None:
    """Returns the first epoch and quantity at which two runs are not bit-identical, or None.

    It compares the epochs that both have: every column of the history except the seconds, then
    the hash of the weights.
    """
    hashes = [run.record.get("weight_hashes", []) for run in (first, second)]
    for index, (row, other) in enumerate(zip(first.history, second.history, strict=False)):
        for key in dict.fromkeys([*row, *other]):
            if key != "epoch_seconds" and not _same(row.get(key), other.get(key)):
                return Difference(key, row.get(key), other.get(key), index + 1)
        weights = [listed[index] if index < len(listed) else None for listed in hashes]
        if None not in weights and weights[0] != weights[1]:
            return Difference("weights", weights[0], weights[1], index + 1)
    return None


def beyond_tolerance(first: SavedRun, second: SavedRun) -> Difference | None:
    """Returns the first figure that differs by more than `BOUNDS` allow, or None."""
    for index, (row, other) in enumerate(zip(first.history, second.history, strict=False)):
        for key, bound in (RELATIVE | ABSOLUTE).items():
            a, b = row.get(key), other.get(key)
            if a is None or b is None:  # one of them has no validation set
                if a is not b:
                    return Difference(key, a, b, index + 1)
            elif not abs(a - b) <= bound * (abs(a) if key in RELATIVE else 1):
                return Difference(key, a, b, index + 1)
    return None


def _of(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[Difference]:
    return [
        Difference(key, at(first, key), at(second, key))
        for key in schema.differing_keys(first, second)
    ]


def _part(values: Mapping[str, Any], keys: Sequence[str]) -> dict[str, Any]:
    return {key: values.get(key) for key in keys}


def _same(a: Any, b: Any) -> bool:
    both_nan = isinstance(a, float) and isinstance(b, float) and math.isnan(a) and math.isnan(b)
    return both_nan or (type(a) is type(b) and bool(a == b))


def _short(value: Any) -> str:
    text = visible(str(value))
    return text if len(text) <= 60 else f"{text[:12]}…"
