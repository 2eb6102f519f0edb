"""TensorBoard's event files, written and read back without TensorFlow.

TensorBoard's own EventFileWriter imports TensorFlow wherever that is installed, which takes longer
than the lesson; the records are simple, and TensorBoard's RecordWriter knows them.
"""

from __future__ import annotations

import os
import socket
import struct
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fashionnet.errors import visible
from fashionnet.system.files import name_file

_PREFIX = "events.out.tfevents."
_COLOUR_CHANNELS = {0: 1, 2: 3, 3: 3, 4: 2, 6: 4}  # of a PNG's colour type; 3 is a palette


class EventFile:
    """An event file that grows; what was added is on disk after each call.

    TensorBoard reads a folder's files in the order of their names, each to its end, and comes back
    to the last one alone: hence one growing file a folder.
    """

    def __init__(self, folder: Path, label: str = "") -> None:
        """Begins a file in `folder`, which is made with those above it.

        Args:
            label: the end of its name, to know it by.
        """
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.summary.writer.record_writer import RecordWriter

        now = time.time()
        folder.mkdir(parents=True, exist_ok=True)
        name = f"{_PREFIX}{now:.6f}.{socket.gethostname()}.{os.getpid()}{label and f'.{label}'}"
        self.path = folder / name
        self._file = open(self.path, "xb")  # noqa: SIM115  # a new file, and through no link
        self._writer = RecordWriter(self._file)
        self.write(Event(wall_time=now, file_version="brain.Event:2"))

    def add(self, step: int, *values: Any) -> None:
        """Adds `Summary.Value`s, made by the functions below, at a step."""
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        self.write(Event(wall_time=time.time(), step=step, summary=Summary(value=values)))

    def write(self, event: Any) -> None:
        """Adds an event as it is, for one of another file."""
        try:
            self._writer.write(event.SerializeToString())
            self._writer.flush()
        except OSError as error:
            name_file(error, self.path.parent)
            raise

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def scalar(tag: str, value: float) -> Any:
    """Returns a point of a curve."""
    from tensorboard.compat.proto.summary_pb2 import Summary

    return Summary.Value(tag=tag, simple_value=value)


def image(tag: str, png: bytes) -> Any:
    """Returns a picture, given as a PNG file."""
    from tensorboard.compat.proto.summary_pb2 import Summary

    width, height, _, colour_type = struct.unpack(">IIBB", png[16:26])  # the header of every PNG
    picture = Summary.Image(
        width=width,
        height=height,
        colorspace=_COLOUR_CHANNELS[colour_type],
        encoded_image_string=png,
    )
    return Summary.Value(tag=tag, image=picture)


def text(tag: str, markdown: str) -> Any:
    """Returns a text; TensorBoard shows it as Markdown."""
    from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
    from tensorboard.compat.proto.tensor_pb2 import TensorProto
    from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
    from tensorboard.compat.proto.types_pb2 import DT_STRING

    tensor = TensorProto(
        dtype=DT_STRING,
        tensor_shape=TensorShapeProto(),
        string_val=[markdown.encode(errors="backslashreplace")],
    )
    plugin = SummaryMetadata.PluginData(plugin_name="text")
    return Summary.Value(tag=tag, tensor=tensor, metadata=SummaryMetadata(plugin_data=plugin))


def session_start(name: str, hparams: Mapping[str, bool | int | float | str]) -> Any:
    """Returns what fills a row of the HParams tab: a run's hyper-parameters.

    It belongs into a file whose folder has the curves that are the row's metrics; a folder of its
    own would be listed as one more run, without a curve.

    Args:
        name: of the row; rows of the same name become one.
    """
    from tensorboard.plugins.hparams import metadata
    from tensorboard.plugins.hparams.plugin_data_pb2 import SessionStartInfo

    info = SessionStartInfo(group_name=visible(name), start_time_secs=time.time())
    for key, value in hparams.items():
        if isinstance(value, bool):
            info.hparams[key].bool_value = value
        elif isinstance(value, int | float):
            info.hparams[key].number_value = value
        else:
            info.hparams[key].string_value = visible(value)
    return _hparams_value(metadata.SESSION_START_INFO_TAG, session_start_info=info)


def session_end(succeeded: bool) -> Any:
    """Returns how the run ended, for the HParams tab."""
    from tensorboard.plugins.hparams import api_pb2, metadata
    from tensorboard.plugins.hparams.plugin_data_pb2 import SessionEndInfo

    status = api_pb2.STATUS_SUCCESS if succeeded else api_pb2.STATUS_FAILURE
    info = SessionEndInfo(status=status, end_time_secs=time.time())
    return _hparams_value(metadata.SESSION_END_INFO_TAG, session_end_info=info)


def _hparams_value(tag: str, **content: Any) -> Any:
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.plugins.hparams import metadata
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    described = metadata.create_summary_metadata(HParamsPluginData(**content))
    return Summary.Value(tag=tag, metadata=described, tensor=metadata.NULL_TENSOR)


def files_in(folder: Path) -> list[Path]:
    """Returns the event files of a folder, in the order in which TensorBoard reads them."""
    return sorted(folder.glob(f"{_PREFIX}*"))


def images_of(path: Path) -> list[Any]:
    """Returns a file's events that hold pictures, up to where it was torn by a kill."""
    from google.protobuf.message import DecodeError
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.tensorflow_stub import errors
    from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import PyRecordReader_New

    found = []
    reader = PyRecordReader_New(str(path))
    try:
        while True:
            reader.GetNext()
            event = Event.FromString(reader.record())
            if any(value.HasField("image") for value in event.summary.value):
                found.append(event)
    except (errors.OutOfRangeError, errors.DataLossError, DecodeError):
        return found
