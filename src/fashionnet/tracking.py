"""What a run tells while it goes: progress for people, history for machines, TensorBoard curves."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from fashionnet import checkpoint
from fashionnet.config import Config
from fashionnet.files import name_file
from fashionnet.interruption import Stop
from fashionnet.loop import Fit, Row, Watcher
from fashionnet.runs import HISTORY, LOG, Run

if TYPE_CHECKING:
    from tqdm import tqdm

log = logging.getLogger("fashionnet")

_SECONDS_BETWEEN_REFRESHES = 0.1


class Tracker(Watcher):
    """Follows a fit: progress bar or lines, `history.jsonl`, TensorBoard, checkpoints.

    It reads the fit and never changes it; the checkpoint's history is the truth, from which file
    and curves are written anew when a run is resumed.
    """

    def __init__(self, run: Run, fit: Fit, config: Config, stop: Stop | None = None) -> None:
        super().__init__(stop)
        self._run = run
        self._fit = fit
        self._epochs = config.epochs
        self._checkpoint_seconds = config.checkpoint.every_seconds
        self._restores = config.early_stopping.restore_best_weights
        self._saved = self._refreshed = time.monotonic()
        self._bar: tqdm[Any] | None = None
        self._on_terminal = sys.stdout.isatty()
        self._history = open(run.path / HISTORY, "w", encoding="utf-8")  # noqa: SIM115
        self._curves = Curves(run.path / "tensorboard")
        for row in fit.history:
            self._write(row)

    def epoch_started(self, fit: Fit, num_steps: int) -> None:
        """Opens the epoch's progress bar, on a terminal."""
        if self._on_terminal:
            from tqdm import tqdm

            title = f"epoch {fit.epoch}/{self._epochs}"
            self._bar = tqdm(
                total=num_steps,
                initial=fit.step,
                desc=title,
                unit="step",
                leave=False,
                file=sys.stdout,
            )

    def steps_taken(self, fit: Fit, num_steps: int) -> None:
        """Moves the bar, and writes a checkpoint if one is due."""
        now = time.monotonic()
        if self._bar is not None and now - self._refreshed >= _SECONDS_BETWEEN_REFRESHES:
            figures = fit.running.read()
            self._bar.set_postfix(
                loss=f"{figures.loss:.4f}", accuracy=f"{figures.accuracy:.4f}", refresh=False
            )
            self._bar.update(fit.step - self._bar.n)
            self._refreshed = now
        if now - self._saved >= self._checkpoint_seconds and fit.step < num_steps:
            self.save(fit)

    def epoch_ended(self, fit: Fit, row: Row) -> None:
        """Writes the epoch's line, curves and checkpoint."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
        log.info(epoch_line(row, self._epochs))
        self._write(row)
        self.save(fit)

    def interrupted(self, fit: Fit) -> None:
        """Writes a checkpoint of the very step."""
        self.save(fit)

    def save(self, fit: Fit) -> None:
        """Writes `last.pt`: all that the fit needs to go on from here."""
        checkpoint.save(fit.state_dict(), self._run.checkpoints / checkpoint.LAST)
        self._saved = time.monotonic()

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, failed: type[BaseException] | None, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()
        for close in (self._history.close, self._curves.close):
            # A full disk refuses what is left in a buffer once more, and without the file's name.
            with contextlib.suppress(OSError) if failed else contextlib.nullcontext():
                close()
        self._run.record.values["weight_hashes"] = self._fit.weight_hashes
        if failed is None and self._restores:  # the weights changed after the last checkpoint
            self.save(self._fit)
        # A full disk is told of by the error that is under way.
        with contextlib.suppress(OSError) if failed else contextlib.nullcontext():
            self._save_best()

    def _save_best(self) -> None:
        """Writes `best.pt`, whose weights every `last.pt` holds too while the fit goes on."""
        if self._fit.best_weights is not None:
            state = {
                "model": self._fit.best_weights,
                "epoch": self._fit.best_epoch,
                "val_loss": self._fit.best_loss,
            }
            checkpoint.save(state, self._run.checkpoints / checkpoint.BEST)

    def _write(self, row: Row) -> None:
        try:
            self._history.write(json.dumps(row) + "\n")
            self._history.flush()
        except OSError as error:
            name_file(error, self._run.path / HISTORY)
            raise
        self._curves.add(row)


class Curves:
    """TensorBoard curves: two writers, the same tags, so that both splits share a chart.

    Tags are those of keras.callbacks.TensorBoard; steps are 1-based epochs.
    """

    def __init__(self, folder: Path) -> None:
        shutil.rmtree(folder, ignore_errors=True)  # a resumed run draws its curve anew, once
        self._folder = folder
        self._files: dict[str, IO[bytes]] = {}

    def add(self, row: Row) -> None:
        """Adds an epoch's figures and flushes them."""
        train = {"loss": row["loss"], "accuracy": row["accuracy"], "learning_rate": row["lr"]}
        self._add("train", row["epoch"], train)
        if "val_loss" in row:
            held_out = {"loss": row["val_loss"], "accuracy": row["val_accuracy"]}
            self._add("validation", row["epoch"], held_out)

    def _add(self, split: str, epoch: int, figures: dict[str, float]) -> None:
        # TensorBoard's records on an ordinary file: its EventFileWriter would import TensorFlow
        # wherever that is installed, which takes longer than the lesson.
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.record_writer import RecordWriter

        now = time.time()
        events = []
        if split not in self._files:
            self._folder.mkdir(exist_ok=True)  # not those above: the run may have been deleted
            (self._folder / split).mkdir()
            name = f"events.out.tfevents.{now:.6f}.{socket.gethostname()}.{os.getpid()}"
            self._files[split] = open(self._folder / split / name, "wb")  # noqa: SIM115
            events.append(Event(wall_time=now, file_version="brain.Event:2"))
        values = [Summary.Value(tag=f"epoch_{k}", simple_value=v) for k, v in figures.items()]
        events.append(Event(wall_time=now, step=epoch, summary=Summary(value=values)))
        writer = RecordWriter(self._files[split])
        try:
            for event in events:
                writer.write(event.SerializeToString())
            writer.flush()
        except OSError as error:
            name_file(error, self._folder / split)
            raise

    def close(self) -> None:
        """Closes the files."""
        with contextlib.ExitStack() as stack:  # each of them, even if another fails
            for file in self._files.values():
                stack.callback(file.close)


def epoch_line(row: Row, epochs: int) -> str:
    """Returns an epoch's plain line, in the order of Keras' history."""
    names = ("loss", "accuracy", "val_loss", "val_accuracy")
    figures = "  ".join(f"{name} {row[name]:.4f}" for name in names if name in row)
    return f"epoch {row['epoch']}/{epochs}  {figures}  {row['epoch_seconds']:.2f} s"


@contextlib.contextmanager
def console() -> Iterator[None]:
    """Lets the package's log lines through to stdout while the body runs."""
    handler = logging.StreamHandler(sys.stdout)
    with _handling(handler):
        yield


class _LogFile(logging.FileHandler):
    """A log file whose full disk is an error, where logging would print a traceback and go on."""

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if error is not None:
            name_file(error, Path(self.baseFilename))
            raise error


@contextlib.contextmanager
def log_file(run: Run) -> Iterator[None]:
    """Copies the package's log lines to the run's `train.log` while the body runs."""
    handler = _LogFile(run.path / LOG, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    with _handling(handler):
        yield


@contextlib.contextmanager
def _handling(handler: logging.Handler) -> Iterator[None]:
    before = log.level, log.propagate
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False  # a notebook's root logger would say everything twice
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.level, log.propagate = before
        handler.close()
