"""What a run shows in TensorBoard, read back as TensorBoard reads it."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.summary.writer.record_writer import RecordWriter

from fashionnet.runs import event_records, tensorboard
from fashionnet.runs.tensorboard import Board

ROWS: list[dict[str, Any]] = [
    {
        **{"epoch": epoch, "loss": 1 / epoch, "accuracy": 0.5 + epoch / 100},
        **{"val_loss": 2 / epoch, "val_accuracy": 0.4 + epoch / 100, "lr": 0.5},
    }
    for epoch in (1, 2, 3)
]
RECORD: dict[str, Any] = {
    "config": {
        **{"seed": 0, "epochs": 3, "resume": "auto", "threads": None, "deterministic": False},
        "model": {"_target_": "fashionnet.models.mlp.MLP", "hidden": [8, 4], "dropout": 0.2},
        "data": {"name": "fashion_mnist", "root": "/home/of/a/user", "limit": None},
    },
    "choices": {"model": "mlp", "data": "fashion_mnist"},
}


def png(shade: int) -> bytes:
    file = io.BytesIO()
    Image.new("L", (3, 2), shade).save(file, "png")
    return file.getvalue()


def all_events(folder: Path) -> Iterator[Event]:
    """Yields the events of a folder, in TensorBoard's order."""
    from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader

    for path in sorted(folder.iterdir()):
        yield from LegacyEventFileLoader(str(path)).Load()


def shown(folder: Path) -> list[tuple[str, int, bytes]]:
    """Returns tag, step and content of each picture."""
    return [
        (value.tag, event.step, value.image.encoded_image_string)
        for event in all_events(folder)
        for value in event.summary.value
        if value.HasField("image")
    ]


def points(folder: Path, tag: str) -> list[tuple[int, float]]:
    return [
        (event.step, value.simple_value)
        for event in all_events(folder)
        for value in event.summary.value
        if value.tag == tag
    ]


def test_curves_have_keras_names_and_stand_on_one_chart(tmp_path: Path) -> None:
    opened = Board(tmp_path)
    for row in ROWS:
        opened.add(row)
    opened.close()
    for split, prefix in (("train", ""), ("validation", "val_")):
        for figure in ("loss", "accuracy"):
            expected = [(row["epoch"], row[prefix + figure]) for row in ROWS]
            found = points(tmp_path / split, f"epoch_{figure}")
            assert np.array(found) == pytest.approx(np.array(expected))
    assert points(tmp_path / "train", "learning_rate") == [(1, 0.5), (2, 0.5), (3, 0.5)]
    assert not points(tmp_path / "validation", "learning_rate")


def test_what_is_added_is_on_disk_at_once(tmp_path: Path) -> None:
    opened = Board(tmp_path)
    opened.add(ROWS[0])
    assert len(points(tmp_path / "train", "epoch_loss")) == 1
    opened.show("weights", png(1), 1)
    assert len(shown(tmp_path / "train")) == 1
    opened.close()


def test_a_resume_draws_its_curves_once_and_keeps_the_pictures_that_count(tmp_path: Path) -> None:
    first = Board(tmp_path)
    for step, row in enumerate(ROWS):
        first.show("weights", png(step), step)
        first.add(row)
    first.show("weights", png(3), 3)
    first.close()
    stale = tmp_path / "mistakes" / "events.out.tfevents.1.validation"
    stale.parent.mkdir()
    stale.write_bytes(b"of weights that are no more")
    resumed = Board(tmp_path, ROWS[:2])
    resumed.show("weights", png(99), 2)  # shown before
    resumed.add(ROWS[2])
    resumed.show("weights", png(33), 3)  # its epoch was cut short
    resumed.close()
    kept = [("weights", step, png(shade)) for step, shade in ((0, 0), (1, 1), (2, 2), (3, 33))]
    assert shown(tmp_path / "train") == kept
    assert [step for step, _ in points(tmp_path / "train", "epoch_loss")] == [1, 2, 3]
    assert len(list((tmp_path / "train").iterdir())) == 1
    assert not stale.exists()


def test_a_file_torn_by_a_kill_gives_the_pictures_before_the_tear(tmp_path: Path) -> None:
    first = Board(tmp_path)
    first.show("weights", png(0), 0)
    first.show("weights", png(1), 1)
    first.close()
    (path,) = (tmp_path / "train").iterdir()
    path.write_bytes(path.read_bytes()[:-20])
    resumed = Board(tmp_path, ROWS[:1])
    resumed.close()
    assert shown(tmp_path / "train") == [("weights", 0, png(0))]


def test_a_damaged_file_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "events.out.tfevents.1.x").write_bytes(b"\xff" * 1000)
    resumed = Board(tmp_path, ROWS[:1])
    resumed.close()
    assert [step for step, _ in points(tmp_path / "train", "epoch_loss")] == [1]
    assert len(list((tmp_path / "train").iterdir())) == 1


def test_hparams_are_what_counts_of_the_configuration() -> None:
    assert tensorboard.hparams(RECORD) == {
        **{"seed": 0, "epochs": 3, "deterministic": False, "model": "mlp"},
        **{"model.hidden": "[8, 4]", "model.dropout": 0.2, "data": "fashion_mnist"},
    }


@pytest.mark.parametrize("has_validation", [True, False])
def test_the_hparams_session_makes_no_run_of_its_own(tmp_path: Path, has_validation: bool) -> None:
    opened = Board(tmp_path)
    opened.begin_session("a run", RECORD, has_validation)
    opened.add(ROWS[0])
    opened.end_session(True)
    opened.close()
    sessions = [
        (path.name, value.tag)
        for path in sorted(tmp_path.iterdir())
        for event in all_events(path)
        for value in event.summary.value
        if value.metadata.plugin_data.plugin_name == "hparams"
    ]
    split = "validation" if has_validation else "train"
    tags = ("_hparams_/session_start_info", "_hparams_/session_end_info")
    assert sessions == [(split, tag) for tag in tags]
    assert {path.name for path in tmp_path.iterdir()} == {"train", "validation"}


def test_texts(tmp_path: Path) -> None:
    opened = Board(tmp_path)
    opened.describe({"config": "größer", "summary": "b"})
    opened.close()
    said = {
        value.tag: (value.metadata.plugin_data.plugin_name, value.tensor.string_val[0].decode())
        for event in all_events(tmp_path / "train")
        for value in event.summary.value
    }
    assert said == {"config": ("text", "größer"), "summary": ("text", "b")}


def test_a_picture_says_its_size_and_colors(tmp_path: Path) -> None:
    for mode, channels in (("L", 1), ("LA", 2), ("P", 3), ("RGB", 3), ("RGBA", 4)):
        file = io.BytesIO()
        Image.new(mode, (5, 7)).save(file, "png")
        image = tensorboard.image("a", file.getvalue()).image
        assert (image.width, image.height, image.colorspace) == (5, 7, channels)


@pytest.mark.parametrize("num", [0, 255, 256, 70_000])
def test_records_are_those_of_tensorboards_own_writer(num: int) -> None:
    content, file = np.random.default_rng(num).bytes(num), io.BytesIO()
    RecordWriter(file).write(content)
    assert event_records.record(content) == file.getvalue()
