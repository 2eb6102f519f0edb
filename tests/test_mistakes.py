"""`python -m fashionnet.mistakes`: where a run is wrong, in pictures, tables and words."""

from __future__ import annotations

import csv
import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from fashionnet.analysis import diagrams
from fashionnet.analysis.diagnosis import Diagnosis
from fashionnet.data import published
from fashionnet.data.examples import Dataset, Examples
from fashionnet.errors import UserError
from fashionnet.evaluate import evaluate
from fashionnet.mistakes import Report, describe, mistakes
from fashionnet.runs import saved
from fashionnet.train import train
from fashionnet.training import evaluation

if TYPE_CHECKING:
    from tests.conftest import Commands, FinishedRun

CLASS_NAMES = published.SETS["fashion_mnist"].class_names
PICTURES = ("mistakes.png", "confusion.png", "calibration.png")
TABLES = ("mistakes.csv", "confusion.csv", "classes.csv", "calibration.csv")


@pytest.fixture
def copied(
    commands: Commands, small: tuple[FinishedRun, FinishedRun], tmp_path: Path
) -> FinishedRun:
    """A copy of a small run that a test may change."""
    shutil.copytree(small[0].path, tmp_path / "run")
    return commands.opened(tmp_path / "run")


@pytest.fixture(scope="module")
def report(
    small: tuple[FinishedRun, FinishedRun], tmp_path_factory: pytest.TempPathFactory
) -> Report:
    """The validation mistakes of the small run, written elsewhere."""
    return mistakes(small[0].path, num=20, out=tmp_path_factory.mktemp("report") / "deep/out")


def table(folder: Path, name: str) -> list[list[str]]:
    with open(folder / name, newline="") as file:
        return list(csv.reader(file))


def images_of(folder: Path) -> dict[str, list[bytes]]:
    """Returns the PNG files by tag, as TensorBoard reads a folder."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    tags = events.Tags()["images"]
    return {tag: [image.encoded_image_string for image in events.Images(tag)] for tag in tags}


def files_below(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ----------------------------------------------------------------------------- what is written


def test_the_command_writes_pictures_tables_and_tensorboard(
    commands: Commands, copied: FinishedRun
) -> None:
    before = files_below(copied.path)
    words = commands.succeed("mistakes", "run", cwd=copied.path.parent)
    folder = copied.path / "mistakes/validation"
    assert sorted(path.name for path in folder.iterdir()) == sorted(PICTURES + TABLES)
    assert words.splitlines()[0].startswith("validation  accuracy 0.")
    assert " taken for " in words and "nan" not in words
    assert words.splitlines()[-1].startswith("16 of ")
    assert words.splitlines()[-1].endswith(": run/mistakes/validation")
    images = images_of(copied.path / "tensorboard/mistakes")
    assert images == {
        f"validation/{name.removesuffix('.png')}": [(folder / name).read_bytes()]
        for name in PICTURES
    }
    after = files_below(copied.path)
    assert {path: after[path] for path in before} == before  # the test set is not counted
    assert len(after) == len(before) + 8

    commands.succeed("mistakes", "run", "--num", "3", cwd=copied.path.parent)
    assert len(table(folder, "mistakes.csv")) == 4
    assert len(files_below(copied.path)) == len(after)
    again = images_of(copied.path / "tensorboard/mistakes")
    gallery = again.pop("validation/mistakes")  # replaced, and there once
    assert gallery == [(folder / "mistakes.png").read_bytes()]
    assert again.items() <= images.items()


def test_json_holds_what_the_tables_hold(commands: Commands, copied: FinishedRun) -> None:
    arguments = ("mistakes", "run", "--json", "--num", "4", "--out", "out")
    found = json.loads(commands.succeed(*arguments, cwd=copied.path.parent))
    assert found["accuracy"] == copied.record["validation"]["accuracy"]
    assert found["num_examples"] == 6000
    assert found["num_mistakes"] == round(6000 * (1 - found["accuracy"]))
    assert len(found["mistakes"]) == 4
    assert np.sum(found["confusion"]) == 6000
    assert found["folder"] == "out"
    rows = table(copied.path.parent / "out", "mistakes.csv")
    assert [[m["index"], m["true"]] for m in found["mistakes"]] == [
        [int(row[0]), row[1]] for row in rows[1:]
    ]
    assert not (copied.path / "mistakes").exists()
    assert not (copied.path / "tensorboard/mistakes").exists()  # only beside the default


def test_tables(report: Report, small: tuple[FinishedRun, FinishedRun]) -> None:
    """They hold what the network says, in full precision."""
    run = saved.read(small[0].path)
    _, examples = published.load("fashion_mnist").split(run.config.validation_split)
    rows = evaluation.probabilities(run.model, examples.images, run.config.data.scale)

    head, *wrong = table(report.folder, "mistakes.csv")
    assert head == ["index", "true", "predicted", "probability", *CLASS_NAMES]
    assert len(wrong) == 20
    for index, true, predicted, probability, *each in wrong:
        assert true == CLASS_NAMES[examples.labels[int(index)]] != predicted
        assert [float(p) for p in each] == pytest.approx(rows[int(index)].tolist(), abs=1e-6)
        assert float(probability) == max(map(float, each))
        assert predicted == CLASS_NAMES[int(np.argmax([float(p) for p in each]))]
    sure = [float(row[3]) for row in wrong]
    assert sure == sorted(sure, reverse=True)
    is_wrong = rows.argmax(1) != examples.labels
    best = rows.max(1).values[is_wrong].topk(20).values
    assert sure == pytest.approx(best.tolist(), abs=1e-6)

    head, *counts = table(report.folder, "confusion.csv")
    assert head == ["true", *CLASS_NAMES]
    assert [row[0] for row in counts] == list(CLASS_NAMES)
    assert [[int(n) for n in row[1:]] for row in counts] == report.diagnosis.confusion.tolist()
    assert report.diagnosis.confusion.sum(1).tolist() == examples.labels.bincount().tolist()

    head, *classes = table(report.folder, "classes.csv")
    assert head == ["name", "precision", "recall", "f1", "support"]
    assert sum(int(row[4]) for row in classes) == 6000
    assert float(classes[0][1]) == report.diagnosis.classes[0].precision

    head, *bins = table(report.folder, "calibration.csv")
    assert head == ["low", "high", "count", "confidence", "accuracy"]
    assert sum(int(row[2]) for row in bins) == 6000
    assert bins[0] == ["0.0", "0.06666666666666667", "0", "", ""]  # no nan


def test_pictures_are_not_blank(report: Report) -> None:
    from PIL import Image

    for name in PICTURES:
        with Image.open(report.folder / name) as image:
            pixels = np.asarray(image.convert("RGB")).reshape(-1, 3)
        assert len(np.unique(pixels, axis=0)) > 100
        assert (pixels != 255).any(1).mean() > 0.1


def test_the_gallery_draws_a_hundred_at_most(
    small: tuple[FinishedRun, FinishedRun], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Any] = []
    gallery = diagrams.gallery

    def noted(diagnosis: Diagnosis, shown: Any, images: Any) -> Any:
        drawn.append((shown, images))
        return gallery(diagnosis, shown[:1], images[:1])

    monkeypatch.setattr(diagrams, "gallery", noted)
    found = mistakes(small[0].path, num=100_000, out=tmp_path)
    ((shown, images),) = drawn
    assert len(shown) == len(images) == 100
    held_out = published.load("fashion_mnist").train.images[54_000:]
    assert all((held_out[m.index].numpy() == im).all() for m, im in zip(shown, images, strict=True))
    assert (
        len(found.shown) == len(found.diagnosis.wrong) == len(table(tmp_path, "mistakes.csv")) - 1
    )
    num = f"{len(found.shown):,}"
    assert describe(found).splitlines()[-1].startswith(f"{num} of {num} mistakes, ")


def test_of_many_classes_those_that_go_wrong_most_are_told(tmp_path: Path) -> None:
    num = 300
    labels = np.arange(num).repeat(2)
    rows = np.eye(num)[labels]
    rows[7] = rows[0]  # a picture of class 3 taken for class 0
    names = tuple(f"class {i} of {num} with a name that is long" for i in range(num))
    found = Diagnosis("test", names, labels, rows)
    lines = describe(Report(found, found.mistakes(16), tmp_path)).splitlines()
    assert len(lines) < 60 and max(map(len, lines)) < 120
    assert lines[3].startswith("class 3 ")
    assert "the lowest f1 of 300 classes; all in classes.csv" in lines
    assert f"{names[3]} taken for {names[0]}: 1" in lines


def test_a_class_never_predicted_and_no_mistakes_are_told(tmp_path: Path) -> None:
    names = CLASS_NAMES
    always = Diagnosis("test", names, np.arange(10), np.eye(10)[np.zeros(10, int)])
    words = describe(Report(always, always.mistakes(16), tmp_path))
    assert words.splitlines()[4].split() == ["Trouser", "-", "0.0000", "0.0000", "1"]
    assert "nan" not in words
    perfect = Diagnosis("test", names, np.arange(10), np.eye(10))
    words = describe(Report(perfect, [], tmp_path))
    assert words.splitlines()[-1] == f"no mistakes among 10 pictures: {tmp_path}"


# -------------------------------------------------------------------------------- the test set


def test_the_test_set_is_counted_before_it_is_read(
    copied: FinishedRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = copied.record
    found = mistakes(copied.path, "test", num=2)
    assert copied.record == before | {"test": before["test"] | {"evaluations": 2}}
    assert found.diagnosis.accuracy == before["test"]["accuracy"]
    assert found.folder == copied.path / "mistakes/test"
    assert set(images_of(copied.path / "tensorboard/mistakes")) == {
        "test/mistakes",
        "test/confusion",
        "test/calibration",
    }

    def unreadable(_: Dataset) -> Examples:
        raise UserError("gone")

    monkeypatch.setattr(Dataset, "open_test", unreadable)
    with pytest.raises(UserError, match="gone"):
        mistakes(copied.path, "test")
    assert copied.record["test"]["evaluations"] == 3


def test_both_splits_stand_side_by_side(copied: FinishedRun) -> None:
    for part in ("test", "validation", "test"):
        mistakes(copied.path, part, num=1)
    images = images_of(copied.path / "tensorboard/mistakes")
    assert {tag: len(found) for tag, found in images.items()} == {
        f"{split}/{name}": 1
        for split in ("validation", "test")
        for name in ("mistakes", "confusion", "calibration")
    }


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"num": 0}, "num=0 must be at least 1"),
        ({"device": "tpu"}, "device=tpu is not known"),
        ({"out": "/dev/null/out"}, "/dev/null"),
    ],
)
def test_what_is_refused_uses_no_test_set(copied: FinishedRun, wrong: dict, named: str) -> None:
    with pytest.raises((UserError, OSError), match=named):
        mistakes(copied.path, "test", **wrong)
    assert copied.record["test"]["evaluations"] == 1
    assert not (copied.path / "mistakes").exists()


# ------------------------------------------------------------------------------ what is refused


def test_wrong_arguments_are_told(commands: Commands, tmp_path: Path) -> None:
    """In one line, with nothing left behind."""
    (tmp_path / "file").touch()
    line = commands.fail("mistakes", "nowhere", cwd=tmp_path)
    assert "nowhere" in line and "fashionnet.list" in line
    assert "--num" in commands.fail("mistakes", "nowhere", "--num", "many", cwd=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_folder_that_cannot_be_written_is_told(commands: Commands, copied: FinishedRun) -> None:
    here = copied.path.parent
    (here / "file").touch()
    for out in ("file", "file/out"):
        assert out in commands.fail("mistakes", "run", "--out", out, cwd=here)
    assert sorted(path.name for path in here.iterdir()) == ["file", "run"]


def test_a_folder_without_rights_is_told(
    copied: FinishedRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write anywhere
    with pytest.raises(UserError, match=r"cannot be written to; choose another folder with --out"):
        mistakes(copied.path, "test", out=copied.path.parent / "a/b")
    assert not (copied.path.parent / "a").exists()
    assert copied.record["test"]["evaluations"] == 1


def test_a_full_disk_leaves_no_half_file(
    copied: FinishedRun, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"mistakes\.png"):
        mistakes(copied.path, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_runs_that_are_not_sound_are_told(copied: FinishedRun) -> None:
    record = copied.record
    copied.edit(status="interrupted", test=None)
    with pytest.raises(UserError, match="interrupted: the test set stays sealed"):
        mistakes(copied.path, "test")
    assert mistakes(copied.path, num=1).diagnosis.accuracy == record["validation"]["accuracy"]
    shutil.rmtree(copied.path / "mistakes")
    copied.edit(config=record["config"] | {"validation_split": 0.0})
    with pytest.raises(UserError, match="validation_split=0"):
        mistakes(copied.path)
    copied.edit(**record | {"data": record["data"] | {"class_names": list("abcdefghij")}})
    for look in (mistakes, evaluate):
        with pytest.raises(UserError, match=r"other data: classes: a, b, .* then, T-shirt"):
            look(copied.path)
    copied.edit(**record)
    path = copied.path / "checkpoints/last.pt"
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(UserError, match=r"last\.pt .*damaged"):
        mistakes(copied.path)
    assert not (copied.path / "mistakes").exists()


def test_a_network_of_nan_is_told(copied: FinishedRun, tmp_path: Path) -> None:
    path = copied.path / "checkpoints/last.pt"
    state = torch.load(path, weights_only=True)
    next(iter(state["model"].values())).fill_(float("nan"))
    torch.save(state, path)
    with pytest.raises(UserError, match="nan"):
        mistakes(copied.path, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("place", ["mistakes", "tensorboard/mistakes"])
def test_links_in_a_strangers_run_are_refused(
    copied: FinishedRun, tmp_path: Path, place: str
) -> None:
    (tmp_path / "elsewhere").mkdir()
    (copied.path / place).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="leads out of"):
        mistakes(copied.path)
    assert not list((tmp_path / "elsewhere").iterdir())


def test_it_needs_matplotlib(commands: Commands, copied: FinishedRun, tmp_path: Path) -> None:
    missing = tmp_path / "missing"
    missing.mkdir()
    (missing / "matplotlib.py").write_text("raise ImportError\n")
    words = commands.line("mistakes", "run", "--split", "test")
    line = commands.error(commands.call(words, tmp_path, commands.importing(missing)))
    assert "[plots]" in line and "-m pip install" in line
    assert copied.record["test"]["evaluations"] == 1


# ----------------------------------------------------------------------------- other commands


def test_a_run_with_mistakes_goes_on(copied: FinishedRun) -> None:
    """More epochs continue it, and `overwrite` replaces it."""
    mistakes(copied.path, num=1)
    small = ("data.limit=1200", "batch_size=2", "device=cpu")
    assert len(train("epochs=3", *small, run_dir=copied.path).history) == 3
    mistakes(copied.path, num=1)
    train("epochs=1", *small, "overwrite=true", run_dir=copied.path)
    assert not (copied.path / "mistakes").exists()
    assert not (copied.path / "tensorboard/mistakes").exists()
