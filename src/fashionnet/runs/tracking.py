"""What a run reports: progress for people, history for machines, curves in TensorBoard."""

from __future__ import annotations

import contextlib
import copy
import json
import logging
import sys
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import OmegaConf

from fashionnet.config.schema import Config
from fashionnet.data.examples import Examples
from fashionnet.errors import visible
from fashionnet.runs import checkpoint
from fashionnet.runs.directory import LOG, Run
from fashionnet.runs.record import HISTORY
from fashionnet.runs.tensorboard import Board
from fashionnet.system import processes
from fashionnet.system.files import atomic_write, name_file, open_appending
from fashionnet.system.signals import Stop
from fashionnet.training.loop import Watcher
from fashionnet.training.state import Row, TrainState

if TYPE_CHECKING:
    from tqdm import tqdm

log = logging.getLogger("fashionnet")

DETAIL = {"is_detail": True}  # marks a log line, by `extra`, that a sweep's console is spared

_SECONDS_BETWEEN_REFRESHES = 0.1
# A large network's checkpoint after each short epoch would take more time than it could ever save.
_MOST_TIME_SAVING = 0.05
_NO_TIME_SECONDS = 0.1


class Tracker(Watcher):
    """Follows a fit: progress bar or lines, `history.jsonl`, TensorBoard, checkpoints.

    It reads the fit and never changes it; the checkpoint's history is the truth, from which file
    and curves are written anew when a run is resumed.
    """

    def __init__(self, run: Run, fit: TrainState, config: Config, stop: Stop | None = None) -> None:
        super().__init__(stop)
        self._run = run
        self._fit = fit
        self._checkpoint_seconds = config.checkpoint.every_seconds
        self._restores = config.early_stopping.restore_best_weights
        self._saved = self._refreshed = time.monotonic()
        self._save_seconds = 0.0  # what the last checkpoint took
        self._bar: tqdm[Any] | None = None
        self._on_terminal = sys.stdout.isatty()
        with atomic_write(run.path / HISTORY):  # a new file: what was there may have other names
            pass
        self._history = open_appending(run.path / HISTORY)
        self._board = Board(run.path / "tensorboard", fit.history)
        self._image_shape: Sequence[int] = ()
        for row in fit.history:
            self._write(row)

    def introduce(self, table: str, train: Examples, classes: Sequence[str], held_out: int) -> None:
        """Shows in TensorBoard what the run is: configuration, network, pictures.

        Args:
            table: the model's summary.
            train: what it trains on; some of each class are shown.
            held_out: how many pictures it is validated on.
        """
        from fashionnet.runs import tiles

        values = self._run.record.values
        settings = OmegaConf.to_yaml(OmegaConf.create(values["config"]))
        self._image_shape = train.images.shape[1:]
        about = {"command": values["command"], "config": settings, "summary": table}
        self._board.describe(
            {title: _as_typed(visible(text, keep="\n")) for title, text in about.items()}
        )
        name = f"{self._run.path.name} {values['config_hash'][:8]}"
        self._board.begin_session(name, values, held_out > 0)
        self._board.show("train/examples", tiles.examples(train, classes), 0)
        if (self._fit.epoch, self._fit.step) == (1, 0):
            self._show_weights(0)

    def epoch_started(self, fit: TrainState, num_steps: int) -> None:
        """Opens the epoch's progress bar, on a terminal."""
        if self._on_terminal:
            from tqdm import tqdm

            title = f"epoch {fit.epoch}/{fit.last_epoch or '?'}"
            self._bar = tqdm(
                total=num_steps,
                initial=fit.step,
                desc=title,
                unit="step",
                leave=False,
                file=sys.stdout,
            )

    def steps_taken(self, fit: TrainState, num_steps: int) -> None:
        """Moves the bar, and writes a checkpoint if one is due."""
        now = time.monotonic()
        if self._bar is not None and now - self._refreshed >= _SECONDS_BETWEEN_REFRESHES:
            figures = fit.progress()
            self._bar.set_postfix(
                loss=f"{figures.loss:.4f}", accuracy=f"{figures.accuracy:.4f}", refresh=False
            )
            self._bar.update(fit.step - self._bar.n)
            self._refreshed = now
        self._note_budget(fit)
        if now - self._saved >= self._checkpoint_seconds and fit.step < num_steps:
            self.save(fit)

    def _note_budget(self, fit: TrainState) -> None:
        """Records the number of steps of a training that fits into a time, once it is known."""
        plan = fit.budget.plan() if fit.budget else {}
        if plan and plan != self._run.record.values.get("budget"):
            self._run.record.update(budget=plan)

    def epoch_ended(self, fit: TrainState, row: Row) -> None:
        """Writes the epoch's line, curves and checkpoint."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
        self._note_budget(fit)
        log.info(epoch_line(row, fit.last_epoch))
        self._write(row)
        self._board.add(row)
        if _is_shown(row["epoch"]) or fit.stopped or row["epoch"] == fit.last_epoch:
            self._show_weights(row["epoch"])
        if self._pays_to_save() or fit.stopped or row["epoch"] == fit.last_epoch:
            self.save(fit)

    def _pays_to_save(self) -> bool:
        """Returns whether a checkpoint is due, or takes little of the time since the last one."""
        since = time.monotonic() - self._saved
        little = max(_NO_TIME_SECONDS, _MOST_TIME_SAVING * since)
        is_due = since >= self._checkpoint_seconds
        return is_due or (not self.is_shared and self._save_seconds <= little)

    def interrupted(self, fit: TrainState) -> None:
        """Writes a checkpoint of the very step."""
        self.save(fit)

    def save(self, fit: TrainState) -> None:
        """Writes `last.pt`: all that the fit needs to go on from here."""
        began = time.monotonic()
        checkpoint.save(fit.state_dict(), self._run.checkpoints / checkpoint.LAST)
        self._saved = time.monotonic()
        self._save_seconds = self._saved - began

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, failed: type[BaseException] | None, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()
        end_session = partial(self._board.end_session, succeeded=failed is None)
        for end in (end_session, self._history.close, self._board.close):
            # A full disk refuses what is left in a buffer once more, and without the file's name.
            with contextlib.suppress(OSError) if failed else contextlib.nullcontext():
                end()
        self._run.record.values["weight_hashes"] = self._fit.weight_hashes
        if failed is None and self._restores:  # the weights changed after the last checkpoint
            self.save(self._fit)
        # The error that is being raised reports a full disk.
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

    def _show_weights(self, epoch: int) -> None:
        """Shows what the first layer's neurons look for at an epoch's end; 0 is before training."""
        from fashionnet.runs import tiles

        looks = tiles.first_layer(self._fit.model, self._image_shape)
        if looks is not None:
            self._board.show("train/weights", tiles.weights(looks), epoch)

    def _write(self, row: Row) -> None:
        try:
            self._history.write(json.dumps(row) + "\n")
            self._history.flush()
        except OSError as error:
            name_file(error, self._run.path / HISTORY)
            raise


@contextlib.contextmanager
def tracked(
    run: Run,
    fit: TrainState,
    config: Config,
    stop: Stop,
    table: str,
    parts: tuple[Examples, Examples],
    classes: Sequence[str],
) -> Iterator[Watcher]:
    """Yields what follows a fit: a `Tracker` in the process that writes the run.

    Args:
        table: the model's summary.
        parts: what the fit trains on, and what it is validated on.
        classes: names of the classes.
    """
    if not run.record.writes:
        yield Watcher(stop)
        return
    with Tracker(run, fit, config, stop) as tracker:
        tracker.introduce(table, parts[0], classes, len(parts[1]))
        yield tracker


def epoch_line(row: Row, epochs: int) -> str:
    """Returns an epoch's plain line, in the order of Keras' history."""
    names = ("loss", "accuracy", "val_loss", "val_accuracy")
    figures = "  ".join(f"{name} {row[name]:.4f}" for name in names if name in row)
    return f"epoch {row['epoch']}/{epochs or '?'}  {figures}  {row['epoch_seconds']:.2f} s"


def _is_shown(epoch: int) -> bool:
    """Returns whether an epoch's weights are shown: 1, 2, 5, 10, 20, 50, …, a few of any fit."""
    return str(epoch).rstrip("0") in ("1", "2", "5")


def _as_typed(text: str) -> str:
    """Returns Markdown that shows a text in lines and columns as it is."""
    return f"```\n{text}\n```"


class _Formatter(logging.Formatter):
    """Shows what a terminal would act on; what is put into a line cannot begin another one."""

    def format(self, record: logging.LogRecord) -> str:
        shown = copy.copy(record)
        if isinstance(record.args, tuple):
            shown.args = tuple(
                a if isinstance(a, int | float) else visible(str(a)) for a in record.args
            )
        return visible(super().format(shown), keep="\n\t")


@contextlib.contextmanager
def console(brief: bool = False) -> Iterator[None]:
    """Lets the package's log lines through to stdout in the body, in one process of a job.

    Args:
        brief: whether those that are marked as `DETAIL` are for the log file alone.
    """
    handler = (
        logging.StreamHandler(sys.stdout) if processes.is_main_process() else logging.NullHandler()
    )
    handler.setFormatter(_Formatter())
    handler.addFilter(lambda record: not (brief and hasattr(record, *DETAIL)))
    with _handling(handler):
        yield


class _LogFile(logging.FileHandler):
    """A log file whose full disk is an error, where logging would print a traceback and go on."""

    def _open(self) -> Any:
        return open_appending(Path(self.baseFilename))

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if error is not None:
            name_file(error, Path(self.baseFilename))
            raise error


@contextlib.contextmanager
def log_file(run: Run) -> Iterator[None]:
    """Copies the package's log lines to the run's `train.log`, from one process of a job."""
    if not processes.is_main_process():
        yield
        return
    handler = _LogFile(run.path / LOG, encoding="utf-8")
    handler.setFormatter(_Formatter("%(asctime)s %(levelname)s %(message)s"))
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
