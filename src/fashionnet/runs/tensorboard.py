"""What a run shows in TensorBoard: curves, HParams, texts, examples, weights of the first layer."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fashionnet.config import schema
from fashionnet.runs import event_files
from fashionnet.runs.event_files import EventFile
from fashionnet.system.files import walk

_TRAIN, _VALIDATION = "train", "validation"


class Board:
    """A run's TensorBoard folder: two writers, the same tags, so that both splits share a chart.

    The tags epoch_loss and epoch_accuracy are those of keras.callbacks.TensorBoard; steps are
    1-based epochs. Texts and pictures stand with the training curves.
    """

    def __init__(self, folder: Path, history: Sequence[Mapping[str, Any]] = ()) -> None:
        """Opens the folder; what was there gives way to the same curves, drawn once.

        Args:
            history: the rows of the epochs done before a resume. Pictures of these epochs stay,
                for they cannot be drawn again.
        """
        self._folder = folder
        self._files: dict[str, EventFile] = {}
        self._hparams_in: str | None = None
        before = [parent / name for parent, _, names in walk(folder) for name in names]
        self._shown: set[tuple[str, int]] = set()  # tags and steps of pictures
        for path in event_files.files_in(folder / _TRAIN):
            for event in event_files.images_of(path):
                if event.step <= len(history):
                    self._file(_TRAIN).write(event)
                    self._shown |= {(value.tag, event.step) for value in event.summary.value}
        for row in history:
            self.add(row)
        for path in before:  # last: a kill until here loses nothing
            path.unlink()

    def add(self, row: Mapping[str, Any]) -> None:
        """Adds an epoch's figures, a row of the history."""
        # Not Keras' epoch_learning_rate: TensorBoard opens the first two charts by name, and
        # people come for accuracy and loss.
        rate = event_files.scalar("learning_rate", row["lr"])
        for split, prefix, others in ((_TRAIN, "", [rate]), (_VALIDATION, "val_", [])):
            if f"{prefix}loss" in row:
                loss = event_files.scalar("epoch_loss", row[f"{prefix}loss"])
                accuracy = event_files.scalar("epoch_accuracy", row[f"{prefix}accuracy"])
                self._file(split).add(row["epoch"], loss, accuracy, *others)

    def describe(self, texts: Mapping[str, str]) -> None:
        """Adds texts, title to Markdown."""
        self._file(_TRAIN).add(0, *(event_files.text(title, text) for title, text in texts.items()))

    def begin_session(self, name: str, record: Mapping[str, Any], has_validation: bool) -> None:
        """Gives the run its row in the HParams tab, with the validation curves as its metrics.

        Args:
            name: of the row, its "trial".
            record: of the run, at its start.
        """
        self._hparams_in = _VALIDATION if has_validation else _TRAIN
        row = event_files.session_start(name, hparams(record))
        self._file(self._hparams_in).add(0, row)

    def end_session(self, succeeded: bool) -> None:
        """Notes in the HParams tab how the run ended."""
        if self._hparams_in is not None:
            self._file(self._hparams_in).add(0, event_files.session_end(succeeded))

    def show(self, title: str, png: bytes, step: int) -> None:
        """Adds a picture, unless it was added before a resume."""
        if (title, step) not in self._shown:
            self._file(_TRAIN).add(step, event_files.image(title, png))
            self._shown.add((title, step))

    def _file(self, split: str) -> EventFile:
        if split not in self._files:
            self._folder.mkdir(exist_ok=True)  # not those above: the run may have been deleted
            self._files[split] = EventFile(self._folder / split)
        return self._files[split]

    def close(self) -> None:
        """Closes the files."""
        with contextlib.ExitStack() as stack:  # each of them, even if another fails
            for file in self._files.values():
                stack.callback(file.close)


def hparams(record: Mapping[str, Any]) -> dict[str, bool | int | float | str]:
    """Returns what the HParams tab lists of a run: groups by their choices, other keys dotted.

    Keys that are null stay out: a column of numbers and a word would be sorted as words.
    """
    found: dict[str, Any] = {}

    def note(node: Mapping[str, Any], prefix: str) -> None:
        for key, value in node.items():
            if isinstance(value, Mapping):
                note(value, f"{prefix}{key}.")
            elif value is not None and key != "_target_":
                plain = isinstance(value, bool | int | float | str)
                found[f"{prefix}{key}"] = value if plain else str(value)

    note(schema.that_counts(record["config"]), "")
    found.pop("data.name", None)  # the choice of `data`, once more
    return found | dict(record["choices"])
