"""A run directory, read without trusting it; the commands that only look take no second for torch.

Each part is read when it is first asked for. Nothing of the directory is executed: weights are read
without unpickling, and only targets on this machine's allow-list are built.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fashionnet.config import compose, schema
from fashionnet.errors import UserError, first_line
from fashionnet.runs import record
from fashionnet.runs.forms import figure, group, integer
from fashionnet.runs.record import Record
from fashionnet.system import locks
from fashionnet.system.files import read_bounded, refuse_strange_below, walk

if TYPE_CHECKING:
    import torch
    from torch import nn

_MAX_HISTORY_BYTES = 16 * 2**20  # as many epochs as a record has hashes of
# Keras' columns and any other figures; without a validation set its columns are left out.
_ROW = group({"epoch": integer(1, 2**31), "loss": figure, "accuracy": figure}, rest=figure)


@dataclass(frozen=True, eq=False)
class SavedRun:
    """A run directory as a reader sees it.

    Attributes:
        record: the checked values of `run.json`.
    """

    path: Path
    record: dict[str, Any]

    @cached_property
    def config(self) -> schema.Config:
        """The checked configuration that the record holds.

        Raises:
            UserError: it does not fit the schema.
        """
        values = self.record["config"]
        try:
            # What is recorded is resolved; a stranger's could read the environment, or never end.
            if "${" in json.dumps(values):
                raise UserError("its configuration holds an interpolation, ${...}")
            merged = OmegaConf.merge(OmegaConf.structured(schema.Config), values)
            assert isinstance(merged, DictConfig)
            return compose.typed(merged)
        except (UserError, OmegaConfBaseException) as error:
            problem = compose.explain(error)
            raise UserError(f"{self.path / record.NAME} is damaged: {problem}") from None

    @contextlib.contextmanager
    def on_device(self, asked: str | None) -> Iterator[tuple[torch.device, nn.Module]]:
        """Computes in the body as the run did; yields a device and the model on it.

        Args:
            asked: as in a run's configuration; None takes the run's own if this machine has it.
        """
        from fashionnet.system import devices

        place, given = devices.device_of_run(asked, self.record.get("device")), self.config
        precision = self.record.get("precision", given.precision)
        with devices.started(
            place, given.threads, given.deterministic, given.tf32, precision
        ) as device:
            yield device, self.model.to(device)

    @cached_property
    def history(self) -> list[dict[str, Any]]:
        """The rows of the history, one an epoch; [] where it has none yet.

        Raises:
            UserError: the file is damaged.
        """
        path, config = self.path / record.HISTORY, self.record["config"]
        steps = config.get("steps") or self.record.get("budget", {}).get("steps")
        most = config.get("epochs") or steps or 0  # a run of N steps has at most N epochs
        rows: list[dict[str, Any]] = []
        try:
            for line in read_bounded(path, self.path, _MAX_HISTORY_BYTES).decode().splitlines():
                rows.append(json.loads(line))
                _ROW(rows[-1], f"line {len(rows)}")
                if rows[-1]["epoch"] != len(rows) or len(rows) > most:
                    raise UserError("its lines are not those of epochs 1, 2, …")
        except FileNotFoundError:
            return []
        except (ValueError, RecursionError) as error:  # UserError as well
            raise UserError(f"{path} is damaged: {first_line(error)}") from None
        return rows

    @cached_property
    def patch(self) -> bytes:
        """What the code of the run had changed since its commit; empty where nothing was kept."""
        try:
            path = self.path / record.PATCH
            return read_bounded(path, self.path, 2 * record.MAX_PATCH_BYTES)
        except FileNotFoundError:
            return b""

    @cached_property
    def model(self) -> nn.Module:
        """The network with its final weights, on the CPU, in evaluation mode.

        Raises:
            UserError: weights that are damaged or do not fit the recorded model.
        """
        from fashionnet.runs import network

        return network.load(self.path, self.record, self.config)


def read(run_dir: str | Path) -> SavedRun:
    """Reads a run's record; the rest when it is asked for.

    Raises:
        UserError: it is not a run, or its record is damaged.
    """
    path = Path(run_dir)
    return SavedRun(path, record.read(path))


def completed(path: Path, config: schema.Config) -> SavedRun | None:
    """Returns the completed run of this very configuration that lies in `path`, if one does.

    Raises:
        UserError: what lies there is damaged.
    """
    if not (path / record.NAME).exists():
        return None
    run = read(path)
    counts = [schema.that_counts(each) for each in (run.record["config"], schema.as_dict(config))]
    return run if counts[0] == counts[1] and run.record["status"] == "completed" else None


def count_test_use(run_dir: Path) -> None:
    """Adds one to the uses of the test set in the run's record, before the set is read.

    Raises:
        UserError: the run never evaluated the test set, or its record cannot be written.
    """
    with _amended(run_dir) as values:
        if values["status"] != "completed":
            raise UserError(
                f"{run_dir} is {values['status']}: the test set stays sealed until a run completes"
            )
        test = values["test"] or {"evaluations": 0}
        values["test"] = {**test, "evaluations": test["evaluations"] + 1}


def note_test(run_dir: Path, figures: Mapping[str, float]) -> None:
    """Adds the test figures to the record of a run that left its test set sealed."""
    with _amended(run_dir) as values:
        values["test"] = {**figures, **values["test"]}


@contextlib.contextmanager
def _amended(run_dir: Path) -> Iterator[dict[str, Any]]:
    """Yields the record of a run, locked, and writes it at the end of the body."""
    with locks.exclusive(run_dir):
        values = record.read(run_dir)
        refuse_strange_below(run_dir)
        yield values
        Record(run_dir, values).update()


def find(folder: Path) -> list[Path]:
    """Returns the run directories below `folder`, itself included, in order of their names.

    Raises:
        UserError: the folder does not exist.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder")
    found = []
    for parent, folders, names in walk(folder, skip_deep=True):
        if record.NAME in names:
            found.append(parent)
            folders.clear()  # a run holds no other run
    return found
