"""Data sets of your own: arrays in a file, or from a function."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fashionnet.data import arrays, pictures
from fashionnet.errors import UserError
from tests.conftest import Commands, FinishedRun


def given(num: int = 60, color: bool = True, **changes: Any) -> dict[str, Any]:
    """Returns arrays of three classes, whose pictures show which they are."""
    draw = np.random.default_rng(0)
    labels = draw.integers(0, 3, num)
    images = draw.integers(0, 60, (num, 6, 8, 3)).astype(np.uint8)
    images[np.arange(num), :, :, labels] += 150
    values = {"images": images if color else images[..., 0], "labels": labels}
    return values | {"class_names": ["red", "green", "blue"]} | changes


def saved(folder: Path, **values: Any) -> Path:
    np.savez(
        folder / "own.npz", **{key: value for key, value in values.items() if value is not None}
    )
    return folder / "own.npz"


def with_test(num: int = 60) -> dict[str, Any]:
    values = given(num)
    return values | {"test_images": values["images"][:9], "test_labels": values["labels"][:9]}


@pytest.mark.parametrize("color", [True, False])
def test_a_file_with_a_test_set_keeps_its_order(tmp_path: Path, color: bool) -> None:
    values = given(color=color)
    test = {"test_images": values["images"][:9], "test_labels": values["labels"][:9]}
    dataset = arrays.from_file(saved(tmp_path, **values, **test))
    assert dataset.image_shape == ((3, 6, 8) if color else (6, 8))
    assert dataset.class_names == ("red", "green", "blue")
    assert (len(dataset.train), dataset.num_test) == (60, 9)
    assert dataset.train.labels.tolist() == values["labels"].tolist()
    pixels = dataset.train.images.numpy()
    shown = pixels.transpose(0, 2, 3, 1) if color else pixels
    assert np.array_equal(shown, values["images"])
    assert torch.equal(dataset.open_test().images, dataset.train.images[:9])


def test_a_file_without_a_test_set_is_split_by_the_seed(tmp_path: Path) -> None:
    path = saved(tmp_path, **given())
    one, again, other = (arrays.from_file(path, seed, 0.25) for seed in (0, 0, 1))
    assert (len(one.train), one.num_test, len(one.open_test())) == (45, 15, 15)
    assert one.order_sha256 == again.order_sha256 != other.order_sha256
    every = torch.cat([one.train.images, one.open_test().images]).flatten(1)
    assert sorted(every.sum(1).tolist()) == sorted(
        given()["images"].reshape(60, -1).sum(1).tolist()
    )


def test_names_of_classes_may_be_absent(tmp_path: Path) -> None:
    assert arrays.from_file(saved(tmp_path, **given(class_names=None))).class_names == (
        "0",
        "1",
        "2",
    )


def test_the_test_set_of_a_file_is_read_when_it_is_opened(tmp_path: Path) -> None:
    path = saved(tmp_path, **with_test())
    dataset = arrays.from_file(path)
    np.savez(path, **with_test(61))
    with pytest.raises(UserError, match="changed while it was used"):
        dataset.open_test()


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "no images": ({"images": None}, "holds no array images"),
    "no labels": ({"labels": None}, "holds no array labels"),
    "floats": ({"images": np.zeros((60, 6, 8))}, r"images must be uint8 .* not float64"),
    "two channels": ({"images": np.zeros((60, 6, 8, 2), np.uint8)}, "images must be uint8"),
    "flat": ({"images": np.zeros((60, 48), np.uint8)}, "images must be uint8"),
    "large": ({"images": np.zeros((2, 1025, 1), np.uint8), "labels": [0, 1]}, "at most 1024"),
    "texts": ({"labels": np.array(["a"] * 60)}, "labels must be integers"),
    "pairs": ({"labels": np.zeros((60, 2), int)}, "labels must be integers"),
    "counts": ({"labels": np.zeros(59, int)}, "60 images and 59 labels"),
    "negative": ({"labels": np.arange(60) % 3 - 1}, "count classes from 0"),
    "nine names": (
        {"labels": np.arange(60) % 10, "class_names": list("abcdefghi")},
        "9 class_names, and labels up to 9",
    ),
    "one class": ({"labels": np.zeros(60, int), "class_names": None}, "nothing to learn"),
    "equal names": ({"class_names": ["a", "a", "b"]}, "must be distinct"),
    "empty": ({"images": np.zeros((0, 6, 8), np.uint8), "labels": np.zeros(0, int)}, "no picture"),
    "test pictures alone": ({"test_images": np.zeros((9, 6, 8, 3), np.uint8)}, "test_images alone"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arrays_are_named(tmp_path: Path, case: str) -> None:
    changes, message = WRONG[case]
    with pytest.raises(UserError, match=message):
        arrays.from_file(saved(tmp_path, **given(**changes)))


@pytest.mark.parametrize(
    ("test", "message"),
    [
        ({"test_images": np.zeros((9, 6, 7, 3), np.uint8)}, "another shape"),
        ({"test_labels": np.full(9, 3)}, "the label 3, which no class has"),
        ({"test_images": np.zeros((8, 6, 8, 3), np.uint8)}, "8 test_images and 9 test_labels"),
    ],
)
def test_a_wrong_test_set_is_named(tmp_path: Path, test: dict[str, Any], message: str) -> None:
    dataset = arrays.from_file(saved(tmp_path, **with_test() | test))
    with pytest.raises(UserError, match=message):
        dataset.open_test()


class Harmful:
    """Leaves a file where it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("unpickled",)


def test_pickled_objects_are_refused_unread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = saved(tmp_path, **given(class_names=np.array([Harmful()] * 3, object)))
    with pytest.raises(UserError, match="pickled objects, which are not read"):
        arrays.from_file(path)
    assert not Path("unpickled").exists()


@pytest.mark.parametrize("content", [b"", b"PK", b"not a zip file", b"PK\x03\x04" + bytes(99)])
def test_another_file_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "own.npz").write_bytes(content)
    with pytest.raises(UserError, match=r"not a \.npz file"):
        arrays.from_file(tmp_path / "own.npz")


def test_a_cut_off_file_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path, **given())
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"not a \.npz file"):
        arrays.from_file(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        arrays.from_file(tmp_path / "own.npz")
    with pytest.raises(UserError, match=r"data\.root=FILE\.npz is needed"):
        arrays.from_file(None)


# ------------------------------------------------------------------------------- by command


MODULE = """\
import numpy as np


def load(root=None):
    with np.load(root or "own.npz") as file:
        return dict(file)


def wrong():
    return [1, 2]
"""
OWN = {"FASHIONNET_ALLOW": "mydata.load,mydata.wrong"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("own")
    saved(folder, **with_test(200))
    (folder / "mydata.py").write_text(MODULE)
    Image.new("RGB", (300, 200), (20, 240, 30)).save(folder / "green.png")
    return folder


WAYS = {
    "npz": ("data=npz", "data.root=own.npz"),
    "function": ("data=function", "data._target_=mydata.load"),
}


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_a_set_of_your_own_works_with_every_command(
    commands: Commands, folder: Path, way: str
) -> None:
    environment = commands.importing(folder) | OWN
    small = ("epochs=3", "device=cpu", f"hydra.run.dir={way}")
    commands.succeed("train", *WAYS[way], *small, cwd=folder, **environment)
    run = FinishedRun(folder / way)
    assert run.record["data"]["class_names"] == ["red", "green", "blue"]
    assert run.record["test"]["accuracy"] > 0.9 and run.record["test"]["evaluations"] == 1
    for command in ("mistakes", "reproduce", "export"):
        commands.succeed(command, way, cwd=folder, **environment)
    said = commands.succeed("evaluate", way, "--split", "test", "--json", cwd=folder, **environment)
    assert json.loads(said)["accuracy"] == run.record["test"]["accuracy"]
    said = commands.succeed("predict", way, "green.png", cwd=folder, **environment)
    assert said.startswith("green.png: green") and "resized to 8x6" in said


@pytest.mark.slow
def test_a_strangers_run_calls_no_function(commands: Commands, folder: Path) -> None:
    environment = commands.importing(folder) | OWN
    overrides = (*WAYS["function"], "epochs=1", "device=cpu", "hydra.run.dir=stranger")
    commands.succeed("train", *overrides, cwd=folder, **environment)
    done = commands.run("evaluate", "stranger", cwd=folder, **commands.importing(folder))
    assert done.returncode == 2
    assert done.stderr.startswith("error: data._target_=mydata.load is not on the allow-list")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("data=npz",), "data.root=FILE.npz is needed"),
        (("data=function",), "data=function needs data._target_"),
        (("data=npz", "data._target_=mydata.load"), "is not for data.name=npz"),
        (("data=function", "data._target_=mydata.wrong"), "returned a list"),
        (("data=function", "data._target_=mydata.gone"), "is not on the allow-list"),
        (("data=npz", "data.root=own.npz", "data.classes=[red]"), "data.classes is for Fashion"),
    ],
)
def test_a_wrong_configuration_is_named(
    commands: Commands, folder: Path, overrides: tuple[str, ...], message: str
) -> None:
    environment = commands.importing(folder) | OWN
    done = commands.run("train", *overrides, "hydra.run.dir=no", cwd=folder, **environment)
    assert done.returncode == 2 and message in done.stderr
    assert done.stderr.count("\n") == 1 and not (folder / "no").exists()


def test_a_picture_of_the_right_size_is_taken_as_it_is(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (6, 8, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "own.png")
    read = pictures.read_resized(tmp_path / "own.png", (3, 6, 8))
    assert read.steps == () and np.array_equal(read.pixels.permute(1, 2, 0).numpy(), pixels)
    gray = pictures.read_resized(tmp_path / "own.png", (3, 4))
    assert gray.pixels.shape == (3, 4) and gray.steps == ("resized to 4x3",)
