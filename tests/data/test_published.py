"""Data sets by name: small ones in the real formats, from the archive to every command."""

from __future__ import annotations

import gzip
import hashlib
import io
import shutil
import struct
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from fashionnet.compare import compare
from fashionnet.config import schema
from fashionnet.config.schema import DataConfig
from fashionnet.data import fetching, load_recorded, pictures, published, sources
from fashionnet.data.sources import Published, Source
from fashionnet.errors import UserError
from fashionnet.evaluate import evaluate
from fashionnet.mistakes import mistakes
from fashionnet.predict import predict
from fashionnet.reproduce import reproduce
from fashionnet.system.torchvision_import import import_torchvision
from fashionnet.train import train
from tests.data.conftest import NOWHERE, Network, mirror

NAMES = ("mnist", "kmnist", "cifar10")
NUM_TRAIN, NUM_TEST = 200, 40


@pytest.fixture(autouse=True, scope="module")
def _quick(one_thread: None) -> None:
    """Small networks on one thread."""


def drawn(shape: tuple[int, ...], num: int, seed: int) -> tuple[Any, Any]:
    """Returns noisy pictures with a bright column for each class, and their labels."""
    draw = np.random.default_rng(seed)
    images, labels = draw.integers(0, 60, (num, *shape)), np.arange(num) % 10
    for image, label in zip(images, labels, strict=True):
        image[..., 4 + 2 * label : 6 + 2 * label] += 180
    return images.astype(np.uint8), labels.astype(np.uint8)


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@dataclass(frozen=True)
class Small:
    """A small data set in the form of a published one, and a folder with its packed files."""

    data: Published
    served: Path
    images: Any
    labels: Any


def small_idx(data: Published, served: Path) -> Published:
    parts: dict[str, tuple[Source, ...]] = {}
    for part, sized, num, seed in (
        ("train", data.train, NUM_TRAIN, 0),
        ("test", data.test, NUM_TEST, 1),
    ):
        made = []
        for source, values in zip(sized, drawn((28, 28), num, seed), strict=True):
            magic = struct.pack(f">HBB{values.ndim}I", 0, 8, values.ndim, *values.shape)
            content = magic + values.tobytes()
            packed = gzip.compress(content, mtime=0)
            (served / source.packed).write_bytes(packed)
            known = {
                "sha256": source.sha256 and sha256(content),
                "packed_sha256": source.packed_sha256 and sha256(packed),
            }
            made.append(replace(source, shape=values.shape, **known))
        parts[part] = tuple(made)
    return replace(data, **parts)


def archive(contents: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as packed:
        for name, content in contents.items():
            member = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            member.size = len(content)
            packed.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def small_cifar(data: Published, served: Path) -> Published:
    shape, contents, parts = data.image_shape, {"readme.html": b"<html>"}, {}
    for part, sized, num, seed in (
        ("train", data.train, NUM_TRAIN // len(data.train), 0),
        ("test", data.test, NUM_TEST, 1),
    ):
        images, labels = drawn(shape, num * len(sized), seed)
        records = np.concatenate([labels[:, None], images.reshape(len(images), -1)], axis=1)
        made = []
        for source, rows in zip(sized, records.reshape(len(sized), num, -1), strict=True):
            contents[source.name] = rows.tobytes()
            made.append(replace(source, shape=rows.shape, sha256=sha256(rows.tobytes())))
        parts[part] = made
    packed = archive(contents)
    (served / data.train[0].packed).write_bytes(packed)
    known = {
        part: tuple(replace(source, packed_sha256=sha256(packed)) for source in made)
        for part, made in parts.items()
    }
    return replace(data, train=known["train"], test=known["test"])


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Small]:
    found = {}
    for name in NAMES:
        served = tmp_path_factory.mktemp(name)
        data = replace(published.SETS[name], mirrors=(f"http://{name}.invalid/",))
        data = (small_cifar if name == "cifar10" else small_idx)(data, served)
        found[name] = Small(data, served, *drawn(data.image_shape, NUM_TRAIN, 0))
    return found


@pytest.fixture
def small(
    made: dict[str, Small], monkeypatch: pytest.MonkeyPatch, network: Network
) -> dict[str, Small]:
    """The small sets in place of the published ones, of which a mirror has none yet."""
    for name, each in made.items():
        monkeypatch.setitem(published.SETS, name, each.data)
    return made


def fetch(small: dict[str, Small], name: str, root: Path, network: Network) -> None:
    with mirror(small[name].served) as address:
        network(address)
        published.load(name, root)
    network(NOWHERE)


# ------------------------------------------------------------------------------ the table


def test_the_table_is_that_of_the_configuration() -> None:
    assert tuple(published.SETS) == schema.PUBLISHED
    assert len({data.folder for data in published.SETS.values()}) == len(published.SETS)


@pytest.mark.parametrize("name", ["MNIST", "KMNIST"])
def test_addresses_files_and_places_are_those_of_torchvision(name: str) -> None:
    theirs = getattr(import_torchvision().datasets, name)
    ours = published.SETS[name.lower()]
    assert list(ours.mirrors) == theirs.mirrors
    assert [file.packed for file in ours.files] == [packed for packed, _ in theirs.resources]
    assert ours.folder == Path(name, "raw")
    assert [label.partition(" ")[0] for label in theirs.classes] == list(ours.class_names)


def test_cifar10_is_the_binary_form_of_torchvisions() -> None:
    theirs, ours = import_torchvision().datasets.CIFAR10, published.SETS["cifar10"]
    assert ours.mirrors[0] + ours.train[0].packed == theirs.url.replace("python", "binary")
    batches = [name for name, _ in theirs.train_list + theirs.test_list]
    assert [file.name.removesuffix(".bin") for file in ours.files] == batches
    assert {file.size for file in ours.files} == {30_730_000}


# ---------------------------------------------------------------------- fetching and reading


@pytest.mark.parametrize("name", NAMES)
def test_a_set_is_fetched_once_and_read_again(
    name: str, small: dict[str, Small], tmp_path: Path, network: Network
) -> None:
    fetch(small, name, tmp_path, network)
    data, dataset = small[name].data, published.load(name, tmp_path)
    assert (dataset.name, dataset.image_shape) == (name, data.image_shape)
    assert np.array_equal(dataset.train.images.numpy(), small[name].images)
    assert np.array_equal(dataset.train.labels.numpy(), small[name].labels)
    assert (dataset.train.images.dtype, dataset.train.labels.dtype) == (torch.uint8, torch.int64)
    test = dataset.open_test()
    assert len(test) == dataset.num_test == NUM_TEST
    assert np.array_equal(test.images.numpy(), drawn(data.image_shape, NUM_TEST, 1)[0])
    kept = {path.name: sha256(path.read_bytes()) for path in (tmp_path / data.folder).iterdir()}
    assert kept == dataset.sources
    assert {path.parent for path in tmp_path.rglob("*") if path.is_file()} == {
        tmp_path,  # .lock
        tmp_path / data.folder,
    }


@pytest.mark.parametrize("name", NAMES)
def test_files_put_there_by_hand_are_used(
    name: str, small: dict[str, Small], tmp_path: Path
) -> None:
    shutil.copytree(small[name].served, tmp_path, dirs_exist_ok=True)
    assert np.array_equal(published.load(name, tmp_path).train.images, small[name].images)


@pytest.mark.parametrize("name", NAMES)
def test_a_damaged_file_is_set_aside_and_fetched_again(
    name: str, small: dict[str, Small], tmp_path: Path, network: Network
) -> None:
    fetch(small, name, tmp_path, network)
    bad = tmp_path / small[name].data.folder / small[name].data.train[0].kept[0]
    content = bytearray(bad.read_bytes())
    content[-9] ^= 1
    bad.write_bytes(content)
    with pytest.raises(UserError, match="is damaged or another file: sha256"):
        published.load(name, tmp_path)
    fetch(small, name, tmp_path, network)
    assert bad.with_name(f"{bad.name}.damaged").read_bytes() == content
    assert np.array_equal(published.load(name, tmp_path).train.images, small[name].images)


@pytest.mark.parametrize("name", NAMES)
def test_another_archive_is_never_read(
    name: str, small: dict[str, Small], tmp_path: Path, network: Network
) -> None:
    data, served = small[name].data, tmp_path / "served"
    shutil.copytree(small[name].served, served)
    first = data.train[0]
    other = archive({first.name: bytes(first.size)})
    if name != "cifar10":
        other = gzip.compress(bytes(first.size))
    (served / first.packed).write_bytes(other)
    with mirror(served) as address:
        network(address)
        with pytest.raises(UserError, match=rf"{first.packed} is damaged or another file: .*sha"):
            published.load(name, tmp_path / "data")
    assert [path.name for path in (tmp_path / "data").rglob("*")] == [".lock"]


@pytest.mark.parametrize("first", ["absent", "wrong"])
def test_the_next_mirror_is_tried(
    first: str,
    small: dict[str, Small],
    tmp_path: Path,
    network: Network,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data, served = small["mnist"].data, tmp_path / "served"
    shutil.copytree(small["mnist"].served, served)
    for source in data.files:
        (served / f"wrong-{source.packed}").write_bytes(gzip.compress(bytes(source.size)))
    mirrors = (f"http://first.invalid/{first}-", "http://second.invalid/")
    monkeypatch.setitem(published.SETS, "mnist", replace(data, mirrors=mirrors))
    with mirror(served) as address:
        network(address)
        dataset = published.load("mnist", tmp_path / "data")
    assert np.array_equal(dataset.train.images, small["mnist"].images)


def test_a_mirror_that_sends_too_much_is_left(
    small: dict[str, Small], tmp_path: Path, network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = replace(small["mnist"].data, megabytes=0)
    monkeypatch.setitem(published.SETS, "mnist", data)
    with mirror(small["mnist"].served) as address, pytest.raises(UserError) as refusal:
        network(address)
        published.load("mnist", tmp_path / "data")
    assert "it sends more than the file holds" in str(refusal.value)
    assert list(tmp_path.rglob("*-ubyte*")) == []


def test_an_archive_is_verified_before_it_is_opened(
    small: dict[str, Small], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = small["cifar10"].data.train[0]
    path = tmp_path / source.packed
    path.write_bytes(archive({source.name: bytes(source.size)}))
    monkeypatch.setattr(tarfile, "open", lambda *_: pytest.fail("another archive was opened"))
    with pytest.raises(sources.SourceError, match="damaged or another file"):
        sources.read_checked(path, source)


def test_an_archive_without_a_file_is_named(small: dict[str, Small], tmp_path: Path) -> None:
    source = small["cifar10"].data.train[0]
    packed = archive({"another.bin": bytes(source.size)})
    (tmp_path / source.packed).write_bytes(packed)
    with pytest.raises(sources.SourceError, match=r"holds no data_batch_1\.bin"):
        sources.read_checked(
            tmp_path / source.packed, replace(source, packed_sha256=sha256(packed))
        )


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.usefixtures("small")
def test_without_a_network_one_line_says_which_files_go_where(name: str, tmp_path: Path) -> None:
    data = published.SETS[name]
    with pytest.raises(UserError) as refusal:
        published.load(name, tmp_path)
    message = str(refusal.value)
    assert "\n" not in message and "Debian" not in message
    names = ", ".join(dict.fromkeys(file.packed for file in data.files))
    assert message.startswith(f"no {names} in {tmp_path}, and fetching failed: http://")
    assert f"of {data.title}" in message and f"into {tmp_path / data.folder}, or " in message
    assert ("packed or not" in message) == (name != "kmnist")
    assert message.endswith("point data.root at a folder that has them")


@pytest.mark.parametrize("form", ["packed", "unpacked"])
@pytest.mark.parametrize("name", ["mnist", "kmnist"])
def test_another_sets_files_of_the_same_names_stay_where_they_are(
    name: str, form: str, small: dict[str, Small], tmp_path: Path, network: Network
) -> None:
    for source in small[name].data.files:
        path = tmp_path / (source.packed if form == "packed" else source.name)
        path.write_bytes(gzip.compress(bytes(source.size)) if form == "packed" else b"other")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    fetch(small, name, tmp_path, network)
    assert np.array_equal(published.load(name, tmp_path).train.images, small[name].images)
    assert before == {path: path.read_bytes() for path in before}


def test_a_recorded_folder_is_read_and_never_written_to(
    small: dict[str, Small], tmp_path: Path, network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetching, "_lock", None)  # the only way to write
    shutil.copytree(small["cifar10"].served, tmp_path, dirs_exist_ok=True)
    dataset = load_recorded(DataConfig("cifar10", root=str(tmp_path)), (3, 32, 32))
    assert np.array_equal(dataset.train.images, small["cifar10"].images)
    assert len(dataset.open_test()) == NUM_TEST


# --------------------------------------------------------------------------- by every command


def column(shape: Sequence[int], label: int) -> Image.Image:
    images, labels = drawn(tuple(shape), 10, 2)
    image = images[labels == label][0]
    return Image.fromarray(image if image.ndim == 2 else image.transpose(1, 2, 0))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "model"),
    [("mnist", "mlp"), ("kmnist", "cnn"), ("cifar10", "mlp"), ("cifar10", "cnn")],
)
def test_every_command_works_on_it(
    name: str,
    model: str,
    small: dict[str, Small],
    tmp_path: Path,
    network: Network,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("FASHIONNET_DATA", str(tmp_path / "data"))
    monkeypatch.chdir(tmp_path)
    fetch(small, name, tmp_path / "data", network)
    overrides = (f"data={name}", f"model={model}", "epochs=8", "batch_size=10", "device=cpu")
    run = train(*overrides, run_dir=tmp_path / "run")
    recorded = run.record["data"]
    assert recorded["sha256"] == dict(file.kept for file in small[name].data.files)
    assert (recorded["train"], recorded["validation"], recorded["test"]) == (180, 20, 40)
    assert run.record["test"]["accuracy"] > 0.9
    assert evaluate("run", "test").accuracy == run.record["test"]["accuracy"]
    assert mistakes("run").diagnosis.accuracy == run.record["validation"]["accuracy"]
    assert reproduce("run").verdict == "identical"
    assert compare("run").groups
    column(recorded["image_shape"], 3).save("three.png")
    (answer,) = predict("run", ["three.png"])
    assert answer.steps == () and answer.best_guess == small[name].data.class_names[3]


# ----------------------------------------------------------------- pictures of handwriting


def seven(paper: str, ink: str) -> Image.Image:
    """Returns a photo of a seven, whose mass is not in the middle of its box."""
    image = Image.new("RGB", (400, 500), paper)
    draw = ImageDraw.Draw(image)
    draw.line([(120, 150), (280, 150), (180, 370)], fill=ink, width=24)
    return image


@pytest.mark.parametrize(("paper", "ink"), [("white", "#555"), ("black", "#aaa")])
def test_a_digit_ends_as_mnists_do(paper: str, ink: str) -> None:
    pixels, steps = pictures.prepare(seven(paper, ink), pictures.FORMS["mnist"])
    assert pixels.max() == 255 and pixels[0].max() == 0
    rows, columns = (pixels.amax(axis).nonzero().flatten() for axis in (1, 0))
    assert rows[-1] - rows[0] + 1 == 20 > columns[-1] - columns[0] + 1
    mass = pixels.double() / pixels.sum()
    place = torch.arange(28.0, dtype=torch.float64)
    for axis in (0, 1):
        assert abs(float(mass.sum(axis) @ place) - 14) <= 0.5
    assert rows[0] > 4  # a box in the middle would begin there
    assert "sharpened" not in steps and "padded to 28x28" in steps


def test_a_character_ends_as_kuzushiji_mnists_do() -> None:
    pixels, _ = pictures.prepare(seven("white", "#555"), pictures.FORMS["kmnist"])
    rows = pixels.amax(1).nonzero().flatten()
    assert (int(rows[0]), int(rows[-1]), int(pixels.max())) == (0, 27, 255)


def test_a_run_on_digits_predicts_with_their_form(
    small: dict[str, Small], tmp_path: Path, network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASHIONNET_DATA", str(tmp_path / "data"))
    fetch(small, "mnist", tmp_path / "data", network)
    train("data=mnist", "epochs=1", "model.hidden=4", "device=cpu", run_dir=tmp_path / "run")
    seven("white", "#555").save(tmp_path / "seven.png")
    (answer,) = predict(tmp_path / "run", [tmp_path / "seven.png"])
    assert next(step for step in answer.steps if step.startswith("scaled to")).endswith("x20")
