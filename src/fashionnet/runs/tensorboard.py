"""What a run shows in TensorBoard: curves, HParams, texts, examples, weights of the first layer.

The event files are written and read without TensorBoard's own EventFileWriter: that imports
TensorFlow if it is installed, which takes longer than the lesson.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fashionnet.config import schema
from fashionnet.config.source import leaves
from fashionnet.errors import visible
from fashionnet.runs import event_records
from fashionnet.system.files import name_file, walk

_TRAIN, _VALIDATION = "train", "validation"
_PREFIX = "events.out.tfevents."
_COLOR_CHANNELS = {0: 1, 2: 3, 3: 3, 4: 2, 6: 4}  # of a PNG's color type; 3 is a palette


class Board:
    """A run's TensorBoard folder: two writers, the same tags, so that both splits share a chart.

    The tags epoch_loss and epoch_accuracy are those of keras.callbacks.TensorBoard; steps are
    1-based epochs. Texts and pictures are among the training curves.
    """

    def __init__(self, folder: Path, history: Sequence[Mapping[str, Any]] = ()) -> None:
        """Opens the folder and replaces the files in it: the curves are drawn again, once.

        TensorBoard would purge old points itself if a new session said where it begins, but its
        HParams tab would go on showing how the old session ended.

        Args:
            history: the rows of the epochs done before a resume. The pictures of these epochs are
                copied from the old files; they cannot be drawn again.
        """
        self._folder = folder
        self._files: dict[str, EventFile] = {}
        self._hparams_in: str | None = None
        self._shown: set[tuple[str, int]] = set()  # tags and steps of pictures
        before = [parent / name for parent, _, names in walk(folder) for name in names]
        for path in sorted((folder / _TRAIN).glob(f"{_PREFIX}*")):
            for event in read_events(path):
                kept = [value for value in event.summary.value if value.HasField("image")]
                if kept and event.step <= len(history):
                    self._file(_TRAIN).add(event.step, *kept)
                    self._shown |= {(value.tag, event.step) for value in kept}
        for row in history:
            self.add(row)
        for path in before:  # last: a kill before this line loses nothing
            path.unlink()

    def add(self, row: Mapping[str, Any]) -> None:
        """Adds an epoch's figures, a row of the history."""
        # Not Keras' epoch_learning_rate: TensorBoard opens the first two charts by name, and
        # people come for accuracy and loss.
        rate = _value("learning_rate", simple_value=row["lr"])
        for split, prefix, others in ((_TRAIN, "", [rate]), (_VALIDATION, "val_", [])):
            if f"{prefix}loss" in row:
                curves = [
                    _value(f"epoch_{key}", simple_value=row[f"{prefix}{key}"])
                    for key in ("loss", "accuracy")
                ]
                self._file(split).add(row["epoch"], *curves, *others)

    def describe(self, texts: Mapping[str, str]) -> None:
        """Adds texts, title to Markdown."""
        self._file(_TRAIN).add(0, *(_text(title, text) for title, text in texts.items()))

    def begin_session(self, name: str, record: Mapping[str, Any], has_validation: bool) -> None:
        """Gives the run its row in the HParams tab, with the validation curves as its metrics.

        The row belongs into the folder with these curves; a folder of its own would be listed as
        one more run, without a curve.

        Args:
            name: of the row, its "trial"; rows of the same name become one.
            record: of the run, at its start.
        """
        from tensorboard.plugins.hparams import metadata
        from tensorboard.plugins.hparams.plugin_data_pb2 import SessionStartInfo

        info = SessionStartInfo(group_name=visible(name), start_time_secs=time.time())
        for key, value in hparams(record).items():
            if isinstance(value, bool):
                info.hparams[key].bool_value = value
            elif isinstance(value, int | float):
                info.hparams[key].number_value = value
            else:
                info.hparams[key].string_value = visible(value)
        self._hparams_in = _VALIDATION if has_validation else _TRAIN
        self._add_hparams(metadata.SESSION_START_INFO_TAG, session_start_info=info)

    def end_session(self, succeeded: bool) -> None:
        """Notes in the HParams tab how the run ended."""
        from tensorboard.plugins.hparams import api_pb2, metadata
        from tensorboard.plugins.hparams.plugin_data_pb2 import SessionEndInfo

        if self._hparams_in is not None:
            status = api_pb2.STATUS_SUCCESS if succeeded else api_pb2.STATUS_FAILURE
            info = SessionEndInfo(status=status, end_time_secs=time.time())
            self._add_hparams(metadata.SESSION_END_INFO_TAG, session_end_info=info)

    def _add_hparams(self, tag: str, **content: Any) -> None:
        from tensorboard.plugins.hparams import metadata
        from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

        assert self._hparams_in is not None
        described = metadata.create_summary_metadata(HParamsPluginData(**content))
        value = _value(tag, metadata=described, tensor=metadata.NULL_TENSOR)
        self._file(self._hparams_in).add(0, value)

    def show(self, title: str, png: bytes, step: int) -> None:
        """Adds a picture, unless it was added before a resume."""
        if (title, step) not in self._shown:
            self._file(_TRAIN).add(step, image(title, png))
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

    Keys that are null are left out: a column of numbers and a word would be sorted as words.
    """
    shown = {
        key: value if isinstance(value, bool | int | float | str) else str(value)
        for key, value in leaves(schema.that_counts(record["config"]))
        if not (value is None or isinstance(value, dict) or key.endswith("._target_"))
    }
    shown.pop("data.name", None)  # the choice of `data` says the same
    return shown | dict(record["choices"])


def replace_pictures(folder: Path, split: str, pictures: Mapping[str, bytes]) -> None:
    """Writes PNG files to a TensorBoard folder in the place of those of the same split."""
    before = list(folder.glob(f"{_PREFIX}*.{split}"))
    # The name is new because TensorBoard goes on in a known file from where it stopped reading.
    file = EventFile(folder, split)
    file.add(0, *(image(f"{split}/{name}", png) for name, png in pictures.items()))
    file.close()
    for old in before:
        old.unlink(missing_ok=True)


# -------------------------------------------------------------------------------- event files


class EventFile:
    """An event file that grows; what was added is on disk after each call.

    TensorBoard reads a folder's files in the order of their names, each to its end, and returns to
    the last one alone, so a folder has one growing file.
    """

    def __init__(self, folder: Path, label: str = "") -> None:
        """Begins a file in `folder`, which is made with those above it.

        Args:
            label: the end of its name.
        """
        now = time.time()
        folder.mkdir(parents=True, exist_ok=True)
        name = f"{_PREFIX}{now:.6f}.{socket.gethostname()}.{os.getpid()}{label and f'.{label}'}"
        self.path = folder / name
        self._file = open(self.path, "xb")  # noqa: SIM115  # a new file, and through no link
        self._write(wall_time=now, file_version="brain.Event:2")

    def add(self, step: int, *values: Any) -> None:
        """Adds `Summary.Value`s at a step."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        self._write(wall_time=time.time(), step=step, summary=Summary(value=values))

    def _write(self, **content: Any) -> None:
        from tensorboard.compat.proto.event_pb2 import Event

        try:
            self._file.write(event_records.record(Event(**content).SerializeToString()))
            self._file.flush()
        except OSError as error:
            name_file(error, self.path.parent)
            raise

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def read_events(path: Path) -> Iterator[Any]:
    """Yields a file's events, up to where it is damaged or was torn by a kill."""
    from google.protobuf.message import DecodeError
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.tensorflow_stub import errors
    from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import PyRecordReader_New

    reader = PyRecordReader_New(str(path))
    with contextlib.suppress(errors.OutOfRangeError, errors.DataLossError, DecodeError):
        while True:
            reader.GetNext()
            yield Event.FromString(reader.record())


def image(tag: str, png: bytes) -> Any:
    """Returns a picture, given as a PNG file, as a `Summary.Value`."""
    from tensorboard.compat.proto.summary_pb2 import Summary

    width, height, _, color_type = struct.unpack(">IIBB", png[16:26])  # the header of every PNG
    size = {"width": width, "height": height, "colorspace": _COLOR_CHANNELS[color_type]}
    return _value(tag, image=Summary.Image(**size, encoded_image_string=png))


def _text(tag: str, markdown: str) -> Any:
    from tensorboard.compat.proto.summary_pb2 import SummaryMetadata
    from tensorboard.compat.proto.tensor_pb2 import TensorProto
    from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
    from tensorboard.compat.proto.types_pb2 import DT_STRING

    content = [markdown.encode(errors="backslashreplace")]
    tensor = TensorProto(dtype=DT_STRING, tensor_shape=TensorShapeProto(), string_val=content)
    plugin = SummaryMetadata.PluginData(plugin_name="text")
    return _value(tag, tensor=tensor, metadata=SummaryMetadata(plugin_data=plugin))


def _value(tag: str, **content: Any) -> Any:
    from tensorboard.compat.proto.summary_pb2 import Summary

    return Summary.Value(tag=tag, **content)
