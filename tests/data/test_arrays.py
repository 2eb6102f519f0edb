"""Data sets of your own: arrays in a file, or from a function."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fashionnet.data import arrays, pictures
from fashionnet.data.examples import Dataset
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
    "large": ({"images": np.zeros((2, 1025, 1), np.uint8), "labels": [0, 1]}, "1025 x 1 pixels"),
    "texts": ({"labels": np.array(["a"] * 60)}, "labels must be integers"),
    "pairs": ({"labels": np.zeros((60, 2), int)}, "labels must be integers"),
    "counts": ({"labels": np.zeros(59, int)}, "60 images and 59 labels"),
    "negative": ({"labels": np.arange(60) % 3 - 1}, "count classes from 0"),
    "from one": (
        {"labels": np.arange(60) % 10 + 1, "class_names": None},
        "labels are 1 to 10; count classes from 0, or give class_names",
    ),
    "from one, named": (
        {"labels": np.arange(60) % 10 + 1, "class_names": list("abcdefghij")},
        "10 class_names, and labels up to 10",
    ),
    "not a number": ({"labels": np.full(60, np.nan)}, "labels must be integers .* not float64"),
    "no dimension": ({"images": np.uint8(1)}, r"images must be uint8 .* not uint8 \(\)"),
    "channels first": ({"images": np.zeros((60, 3, 6, 8), np.uint8)}, "images must be uint8"),
    "pictures last": ({"images": np.zeros((6, 8, 60), np.uint8)}, "6 images and 60 labels"),
    "no pixels": ({"images": np.zeros((60, 0, 8), np.uint8)}, "0 x 8 pixels; give 1 to 1024"),
    "nine names": (
        {"labels": np.arange(60) % 10, "class_names": list("abcdefghi")},
        "9 class_names, and labels up to 9",
    ),
    "one class": ({"labels": np.zeros(60, int), "class_names": None}, "nothing to learn"),
    "equal names": ({"class_names": ["a", "a", "b"]}, "must be distinct"),
    "no name": ({"class_names": ["a", "", "b"]}, "texts of 1 to 1024 characters"),
    "one text": ({"class_names": "abc"}, r"class_names must be texts, not <U3 \(\)"),
    "bytes": ({"class_names": [b"a", b"b", b"c"]}, r"class_names must be texts, not \|S1"),
    "empty": ({"images": np.zeros((0, 6, 8), np.uint8), "labels": np.zeros(0, int)}, "no picture"),
    "test pictures alone": ({"test_images": np.zeros((9, 6, 8, 3), np.uint8)}, "test_images alone"),
    "another shape": (
        {"test_images": np.zeros((9, 6, 7, 3), np.uint8), "test_labels": np.zeros(9, int)},
        "test_images have another shape than images",
    ),
    "test counts": (
        {"test_images": np.zeros((8, 6, 8, 3), np.uint8), "test_labels": np.zeros(9, int)},
        "8 test_images and 9 test_labels",
    ),
    "no test pictures": (
        {"test_images": np.zeros((0, 6, 8, 3), np.uint8), "test_labels": np.zeros(0, int)},
        "test_images holds no picture",
    ),
    "a test of no dimension": (
        {"test_images": np.uint8(1), "test_labels": np.int64(0)},
        "test_images must be uint8",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arrays_are_named(tmp_path: Path, case: str) -> None:
    changes, message = WRONG[case]
    with pytest.raises(UserError, match=message):
        arrays.from_file(saved(tmp_path, **given(**changes)))


def test_a_test_label_that_no_class_has_is_named(tmp_path: Path) -> None:
    values = with_test() | {"test_labels": np.full(9, 3)}
    dataset = arrays.from_file(saved(tmp_path, **values))
    with pytest.raises(UserError, match="the test set holds the label 3, which no class has"):
        dataset.open_test()


@pytest.mark.filterwarnings("ignore:Stored array in format 3.0")
def test_a_structured_array_is_refused(tmp_path: Path) -> None:
    images = np.zeros(60, [("пиксель", np.uint8)])  # what version 3 of the format is for
    with pytest.raises(UserError, match=r"images\.npy is a structured array; save plain arrays"):
        arrays.from_file(saved(tmp_path, **given(images=images)))


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
    os.mkfifo(tmp_path / "pipe.npz")
    for name in ("own.npz", "pipe.npz"):
        with pytest.raises(UserError, match="no such file"):
            arrays.from_file(tmp_path / name)
    with pytest.raises(UserError, match=r"data\.root=~no-such-user/own\.npz: Could not determine"):
        arrays.from_file("~no-such-user/own.npz")
    with pytest.raises(UserError, match=r"data\.root=FILE\.npz is needed"):
        arrays.from_file(None)


# ------------------------------------------------------------------------------- a function


def raising() -> Any:
    raise RuntimeError("no disk\nat all")


def reading(what: str = "a number") -> Any:
    return int(what)


def refusing() -> Any:
    raise UserError("no such pictures; ask for others")


RETURNED: dict[str, tuple[Any, str]] = {
    "a generator": (lambda: iter([1]), "returned a list_iterator; return a dict of arrays"),
    "a pair": (lambda: tuple(given().values()), "returned a tuple; return a dict of arrays"),
    "another array": (lambda: given(imgs=1), "returned an array imgs; known are images, labels"),
    "objects": (lambda: given(images=np.array([None] * 60)), r"not object \(60,\)"),
    "a generator of pictures": (lambda: given(images=iter([1])), r"not object \(\)"),
    "several sizes": (lambda: given(labels=[[1], [1, 2]]), "labels is not an array: setting an"),
    "gradients": (
        lambda: given(images=torch.zeros(60, 6, 8, requires_grad=True)),
        "images is not an array: Can't call numpy",
    ),
    "objects to test on": (
        lambda: given(test_images=np.array([None] * 9), test_labels=np.zeros(9, int)),
        r"test_images must be uint8 .* not object \(9,\)",
    ),
    "no names": (lambda: given(class_names=[None, "a", "b"]), "must be texts, not object"),
    "an error": (
        raising,
        r"failed \(.*test_arrays\.py, line \d+\): RuntimeError: no disk$",
    ),
    "an error that a class may raise too": (
        reading,
        r"load failed \(.*test_arrays\.py, line \d+\): ValueError: invalid literal for int",
    ),
    "an error of its own": (refusing, "^no such pictures; ask for others$"),
    "an argument": (lambda path: path, r"load failed: TypeError: .* missing 1 required"),
}


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], Any]], Dataset]:
    """Loads what a function returns."""
    monkeypatch.setenv("FASHIONNET_ALLOW", f"{__name__}.load")

    def load_from(load: Callable[[], Any]) -> Dataset:
        monkeypatch.setattr(f"{__name__}.load", load, raising=False)
        return arrays.from_function("own", f"{__name__}.load", None)

    return load_from


@pytest.mark.parametrize("case", RETURNED)
def test_what_a_function_must_not_return_is_named(case: str, called: Any) -> None:
    load, message = RETURNED[case]
    with pytest.raises(UserError, match=message) as refusal:
        called(load)
    assert "\n" not in str(refusal.value)


def test_a_function_may_return_tensors_and_lists(called: Any) -> None:
    expected = called(given)
    values = {
        "images": torch.from_numpy(given()["images"]),
        "labels": given()["labels"].tolist(),
        "class_names": np.array(["red", "green", "blue"], object),
    }
    dataset = called(lambda: values)
    assert torch.equal(dataset.train.images, expected.train.images)
    assert torch.equal(dataset.train.labels, expected.train.labels)
    assert (dataset.class_names, dataset.sources) == (expected.class_names, expected.sources)


# ------------------------------------------------------------------------------- by command


MODULE = """\
import numpy as np
from torch import nn


def load(root=None):
    with np.load(root or "own.npz") as file:
        return dict(file)


def wrong():
    return [1, 2]


class Gray(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Flatten(), nn.Linear(6 * 8, 3))
"""
OWN = {"FASHIONNET_ALLOW": "mydata.load,mydata.wrong,mydata.Gray"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("own")
    saved(folder, **with_test(200))
    (folder / "mydata.py").write_text(MODULE)
    (folder / "conf/model").mkdir(parents=True)
    (folder / "conf/model/gray.yaml").write_text("_target_: mydata.Gray\n")
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
        (
            ("--config-dir", "conf", "data=npz", "data.root=own.npz", "model=gray"),
            "cannot take a batch of the shape (1, 3, 6, 8)",
        ),
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
