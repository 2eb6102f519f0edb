"""What differs between two runs: configuration, environment, results; and from which epoch on."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fashionnet import config as configs, record
from fashionnet.console import visible
from fashionnet.errors import UserError, first_line
from fashionnet.files import read_bounded
from fashionnet.runs import HISTORY
from fashionnet.schema import figure, group, integer

_MAX_HISTORY_BYTES = 16 * 2**20  # as many epochs as a record has hashes of
# Keras' columns, and whatever else is measured; validation is left out where there is none.
_ROW = group({"epoch": integer(1, 2**31), "loss": figure, "accuracy": figure}, rest=figure)

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
    "input",
    "git",
)
RESULTS = ("status", "epochs_done", "best_epoch", "validation", "test", "weights_sha256")

# How far two runs of one seed may part by rounding alone, on other machines or thread counts:
# the lesson's step done in another order of additions moved training loss by up to 0.5 %,
# validation loss by up to 7 %, training accuracy by up to 0.0012, validation accuracy by 0.007.
RELATIVE = {"loss": 0.01, "val_loss": 0.1}
ABSOLUTE = {"accuracy": 0.005, "val_accuracy": 0.02}
BOUNDS = "loss 1 %, val_loss 10 % (relative); accuracy 0.005, val_accuracy 0.02 (absolute)"


@dataclass(frozen=True)
class Difference:
    """A figure, setting or fact that is not the same in two runs; `epoch` where it has one."""

    key: str
    first: Any
    second: Any
    epoch: int | None = None

    def __str__(self) -> str:
        where = f"epoch {self.epoch}, " if self.epoch is not None else ""
        return f"{where}{visible(self.key)}: {_short(self.first)} -> {_short(self.second)}"


@dataclass(frozen=True)
class RecordedRun:
    """What a run directory says of itself, read without trusting it; no weights are opened."""

    path: Path
    record: dict[str, Any]
    history: list[dict[str, Any]]
    patch: bytes


def read(run_dir: str | Path) -> RecordedRun:
    """Reads a run's record, history and patch.

    Raises:
        UserError: it is no run, or one of the files is damaged.
    """
    path = Path(run_dir)
    values = record.read(path)
    rows = read_history(path, values["config"]["epochs"])
    try:
        patch = read_bounded(path / record.PATCH, path, 2 * record.MAX_PATCH_BYTES)
    except FileNotFoundError:
        patch = b""
    return RecordedRun(path, values, rows, patch)


def read_history(path: Path, most: int) -> list[dict[str, Any]]:
    """Returns the rows of a run's history, at most so many; [] where it has none yet.

    Raises:
        UserError: the file is damaged.
    """
    history = path / HISTORY
    rows: list[dict[str, Any]] = []
    try:
        for line in read_bounded(history, path, _MAX_HISTORY_BYTES).decode().splitlines():
            rows.append(json.loads(line))
            _ROW(rows[-1], f"line {len(rows)}")
            if rows[-1]["epoch"] != len(rows) or len(rows) > most:
                raise UserError("its lines are not those of epochs 1, 2, …")
    except FileNotFoundError:
        return []
    except (ValueError, RecursionError) as error:  # UserError as well
        raise UserError(f"{history} is damaged: {first_line(error)}") from None
    return rows


def of_config(first: RecordedRun, second: RecordedRun) -> list[Difference]:
    """Returns the configuration's keys that differ, those without effect on numbers included."""
    return _of(first.record["config"], second.record["config"])


def of_environment(first: RecordedRun, second: RecordedRun) -> list[Difference]:
    """Returns what differs in packages, torch build, machine, threads, device and code."""
    found = _of(_part(first.record, ENVIRONMENT), _part(second.record, ENVIRONMENT))
    if first.patch != second.patch:
        found.append(Difference(record.PATCH, len(first.patch), len(second.patch)))
    return found


def of_results(first: RecordedRun, second: RecordedRun) -> list[Difference]:
    """Returns what differs in what came out, and in the data and weights that went in."""
    found = of_beginning(first, second)
    if (epoch := of_epochs(first, second)) is not None:
        found.append(epoch)
    return found + _of(_part(first.record, RESULTS), _part(second.record, RESULTS))


def of_beginning(first: RecordedRun, second: RecordedRun) -> list[Difference]:
    """Returns what differs in checksums of the data, the split and the initial weights."""
    keys = ("sha256", "split_sha256")
    found = _of(*({"data": _part(run.record["data"], keys)} for run in (first, second)))
    return found + _of(*(_part(run.record, ("initial_weights_sha256",)) for run in (first, second)))


def of_epochs(first: RecordedRun, second: RecordedRun) -> Difference | None:
    """Returns the first epoch and quantity at which two runs part, to the bit; None if none.

    Compared are the epochs that both have: every column of the history but the seconds, then the
    hash of the weights.
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


def beyond_tolerance(first: RecordedRun, second: RecordedRun) -> Difference | None:
    """Returns the first figure that differs by more than `BOUNDS` allow; None if none does."""
    for index, (row, other) in enumerate(zip(first.history, second.history, strict=False)):
        for key, bound in (RELATIVE | ABSOLUTE).items():
            a, b = row.get(key), other.get(key)
            if a is None or b is None:  # of a validation set that one of them does not have
                if a is not b:
                    return Difference(key, a, b, index + 1)
            elif not abs(a - b) <= bound * (abs(a) if key in RELATIVE else 1):
                return Difference(key, a, b, index + 1)
    return None


def _of(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[Difference]:
    return [
        Difference(key, at(first, key), at(second, key))
        for key in configs.differing_keys(first, second)
    ]


def at(values: Mapping[str, Any], dotted: str) -> Any:
    """Returns the value at a dotted key; package names may hold no dot, file names do."""
    for key, value in values.items():
        if key == dotted:
            return value
        if dotted.startswith(f"{key}.") and isinstance(value, Mapping):
            return at(value, dotted.removeprefix(f"{key}."))
    return None


def _part(values: Mapping[str, Any], keys: Sequence[str]) -> dict[str, Any]:
    return {key: values.get(key) for key in keys}


def _same(a: Any, b: Any) -> bool:
    both_nan = isinstance(a, float) and isinstance(b, float) and math.isnan(a) and math.isnan(b)
    return both_nan or (type(a) is type(b) and bool(a == b))


def _short(value: Any) -> str:
    text = visible(str(value))
    return text if len(text) <= 60 else f"{text[:12]}…"
