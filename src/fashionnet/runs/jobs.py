"""The jobs of Hydra: a single run, a run of a sweep, and the summary of a sweep."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fashionnet.config import schema
from fashionnet.config.hydra_app import Job
from fashionnet.errors import visible
from fashionnet.runs import next_commands, record, saved
from fashionnet.system import launchers, submitted
from fashionnet.system.files import as_typed


@dataclass(frozen=True)
class Result:
    """What a run leaves: its directory, its record (`run.json`) and Keras' history."""

    run_dir: Path
    record: dict[str, Any]
    history: list[dict[str, Any]]

    @property
    def best_val_loss(self) -> float | None:
        """The lowest validation loss, what a sweeper minimizes; None without a validation set."""
        return min((row["val_loss"] for row in self.history if "val_loss" in row), default=None)


def run(job: Job, train: Callable[[Job], Result]) -> float | None:
    """Runs a job and returns the lowest validation loss, for a sweeper.

    A job that a launcher started again may have completed before it was killed.
    """
    is_first = not job.is_of_sweep and not launchers.is_restarted()
    return (_run_alone if is_first else _run_if_missing)(job, train).best_val_loss


def _run_alone(job: Job, train: Callable[[Job], Result]) -> Result:
    """Runs a single run and prints the commands that one may want next, or what continues it."""
    try:
        result = train(job)
    except KeyboardInterrupt:
        if launchers.rank() == 0 and (job.run_dir / record.NAME).exists():
            print(f"continue with: {next_commands.continuing(job.run_dir, job.config)}")
        raise
    if launchers.rank() == 0:
        advice = [f"  {line}" for line in next_commands.after(job.run_dir, result.record)]
        print(f"run: {visible(as_typed(job.run_dir))}", "next:", *advice, sep="\n")
    return result


def _run_if_missing(job: Job, train: Callable[[Job], Result]) -> Result:
    """Runs a job, or returns the result of a completed run of the same configuration."""
    before = None if job.config.overwrite else saved.completed(job.run_dir, job.config)
    if before is None:
        return train(job)
    _check_data(job.config, before.record, job.run_dir)
    print(f"completed before: {visible(as_typed(job.run_dir))}")
    return Result(job.run_dir, before.record, before.history)


def _check_data(config: schema.Config, record: Mapping[str, Any], run_dir: Path) -> None:
    """Refuses a completed run whose own data changed since: other jobs would train on others."""
    from fashionnet import data as datasets

    if config.data.name not in schema.PUBLISHED:
        dataset = datasets.load(config.data, record["data"]["image_shape"][-1])
        now = datasets.describe(dataset, config.validation_split, config.data.limit)
        if changed := datasets.difference(record["data"], now):
            raise datasets.OtherData(
                f"{as_typed(run_dir)} was trained on other data: {changed}; put these back as they "
                "were, or train anew with overwrite=true or another hydra.sweep.dir"
            )


def sweep_summary(folder: Path, since: float) -> str:
    """Returns how the runs of a sweep ended, with a line for each that is not complete.

    It is empty if no run of the sweep began.

    Args:
        since: when the sweep began, in seconds since 1970.
    """
    found = [(path, record.read(path)) for path in saved.find(folder)]
    counts = Counter(str(values["status"]) for _, values in found)
    counted = ", ".join(f"{count} {status}" for status, count in sorted(counts.items()))
    lines = [
        f"  {values['status']}: {visible(path.name)}: {visible(str(values.get('error', '')))}"
        for path, values in found
        if values["status"] != "completed"
    ]
    errors = tuple(str(values["error"]) for _, values in found if values.get("error"))
    refused = [line for line in submitted.failures(folder, since) if not line.endswith(errors)]
    lines += [f"  failed: {visible(line)}" for line in refused]  # of these no folder is left
    head = f"sweep {visible(as_typed(folder))}: {counted or 'no run'}"
    return "\n".join([head, *lines]) if counted or lines else ""
