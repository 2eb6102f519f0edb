"""The data: its files, from every place they can come from, and the tensors made of them."""

from __future__ import annotations

import fcntl
import functools
import gc
import gzip
import hashlib
import logging
import math
import os
import shutil
import socket
import stat
import struct
import subprocess
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from fashionnet.data import fetching, folders, published, sources
from fashionnet.data.examples import split_ranges
from fashionnet.errors import UserError
from fashionnet.system.torchvision_import import import_torchvision
from tests.data.conftest import Network, forked, mirror, without_root

DATA = published.SETS["fashion_mnist"]
TRAIN_IMAGES, LABELS = DATA.train
TEST_IMAGES, TEST_LABELS = DATA.test

# When the published files were packed, as their gzip headers say.
PACKED_AT = {"train": 1_504_176_606, "t10k": 1_504_176_627}


# ------------------------------------------------------------------------------- fixtures


@pytest.fixture(scope="session")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the four real files, unpacked."""
    folder = tmp_path_factory.mktemp("unpacked")
    contents = fetching.load(folders.default_root().absolute(), DATA, DATA.files)
    for source, content in zip(DATA.files, contents, strict=True):
        content.tofile(folder / source.name)
    return folder


@pytest.fixture(scope="session")
def packed(unpacked: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the four real files as `.gz`, under another packer's headers."""
    folder = tmp_path_factory.mktemp("packed") / DATA.debian
    folder.mkdir()
    for source in DATA.files:
        content = (unpacked / source.name).read_bytes()
        (folder / f"{source.name}.gz").write_bytes(gzip.compress(content, 1))
    return folder


@pytest.fixture(scope="session")
def originals(unpacked: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the four `.gz` files exactly as they were published.

    GNU gzip at its usual level gives the published stream; the header adds the name and the time.
    """
    version = subprocess.run(["gzip", "--version"], capture_output=True, text=True, check=False)
    if "Free Software Foundation" not in version.stdout:
        pytest.skip("only GNU gzip packs as the published files are packed")
    folder = tmp_path_factory.mktemp("originals")
    for source in DATA.files:
        command = ["gzip", "-6", "-n", "-c", str(unpacked / source.name)]
        stream = subprocess.run(command, capture_output=True, check=True).stdout[10:]
        packed_at = struct.pack("<I", PACKED_AT[source.name.partition("-")[0]])
        header = b"\x1f\x8b\x08\x08" + packed_at + b"\x00\x03" + source.name.encode() + b"\x00"
        (folder / f"{source.name}.gz").write_bytes(header + stream)
    return folder


@pytest.fixture
def second_place(packed: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Good files where Debian's package would have installed them: fetching needs no network."""
    monkeypatch.setattr(fetching, "DEBIAN", packed.parent)
    return packed


@pytest.fixture
def no_second_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any attempt to fetch fails the test."""

    def refuse(*_: object) -> None:
        raise AssertionError("nothing should be fetched")

    monkeypatch.setattr(fetching, "_fetch", refuse)


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture) -> Any:
    """Returns the warnings since the last call."""

    def take() -> list[str]:
        texts = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
        caplog.clear()
        return texts

    return take


def copy_into(root: Path, folder: Path) -> Path:
    """Gives files second names, which costs nothing; the package never writes into a file."""
    root.mkdir(parents=True, exist_ok=True)
    for path in folder.iterdir():
        os.link(path, root / path.name)
    return root


def rewrite(path: Path, content: bytes) -> None:
    path.unlink()
    path.write_bytes(content)


def flip_bit(path: Path) -> None:
    """Alters one bit in the middle and keeps the length."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    rewrite(path, content)


def truncate(path: Path) -> None:
    content = path.read_bytes()
    rewrite(path, content[: len(content) // 2])


load = functools.partial(published.load, "fashion_mnist")


def load_pixels(root: Path) -> None:
    assert load(root).train.images.sum() == PIXELS


PIXELS = 3_431_114_169  # the sum of all training pixels: 60,000 · 784 · 72.94


# ---------------------------------------------------------------------------------- split


@pytest.mark.parametrize(
    ("num_examples", "validation_split", "num_train"),
    [
        (60_000, 0.1, 54_000),
        (60_000, 0.0, 60_000),
        (1000, 0.9, 99),  # 1000 * (1.0 - 0.9) is a little less than 100, and Keras rounds down
        (7, 0.5, 3),
    ],
)
def test_split_takes_the_last_part_as_keras_does(
    num_examples: int, validation_split: float, num_train: int
) -> None:
    parts = range(num_train), range(num_train, num_examples)
    assert split_ranges(num_examples, validation_split) == parts


@given(st.integers(1, 10_000), st.floats(0, 1, exclude_max=True))
def test_split_loses_and_repeats_nothing(num_examples: int, validation_split: float) -> None:
    boundary = math.floor(num_examples * (1.0 - validation_split))
    try:
        train, validation = split_ranges(num_examples, validation_split)
    except UserError:  # Keras refuses both as well
        assert boundary == 0 or (boundary == num_examples and validation_split > 0)
        return
    assert len(train) == boundary
    assert [*train, *validation] == list(range(num_examples))


def test_limit_shortens_the_training_part_alone_and_nothing_is_copied(unpacked: Path) -> None:
    assert split_ranges(100, 0.1, limit=7) == (range(7), range(90, 100))
    assert split_ranges(100, 0.1, limit=90)[0] == range(90)
    dataset = load(unpacked)
    train, validation = dataset.split(0.1, limit=7)
    assert (len(train), len(validation)) == (7, 6_000)
    for part, first in ((train, 0), (validation, 54_000)):
        assert part.images.data_ptr() == dataset.train.images[first:].data_ptr()


@pytest.mark.parametrize("limit", [0, 91])
def test_a_limit_out_of_range_is_named(limit: int) -> None:
    with pytest.raises(UserError, match=rf"data\.limit={limit}.* 90 "):
        split_ranges(100, 0.1, limit=limit)


@pytest.mark.parametrize("validation_split", [-0.1, 1.0, math.nan, 0.999, 1e-17])
def test_a_split_out_of_range_is_named(validation_split: float) -> None:
    with pytest.raises(UserError, match=rf"validation_split={validation_split}"):
        split_ranges(10, validation_split)


# --------------------------------------------------------------------------- the real set


def test_the_real_set(unpacked: Path) -> None:
    dataset = load(unpacked)
    assert (dataset.name, dataset.image_shape, dataset.num_test) == (
        "fashion_mnist",
        (28, 28),
        10_000,
    )
    test = dataset.open_test()
    assert (test.images.dtype, test.labels.dtype) == (torch.uint8, torch.int64)
    content = sources.read_checked(unpacked / TEST_IMAGES.name, TEST_IMAGES)
    assert np.shares_memory(content, TEST_IMAGES.values(content))
    for part, num_per_class in ((dataset.train, 6000), (test, 1000)):
        assert part.images.shape == (10 * num_per_class, 28, 28)
        assert part.labels.bincount().tolist() == [num_per_class] * 10
        assert dataset.class_names[part.labels[0]] == "Ankle boot"
    assert dataset.train.images.sum() == PIXELS
    assert dataset.sources == {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in unpacked.iterdir()
    }


def test_files_and_classes_are_those_of_torchvision(originals: Path) -> None:
    theirs = import_torchvision().datasets.FashionMNIST
    assert list(DATA.class_names) == theirs.classes
    assert dict(theirs.resources) == {
        path.name: hashlib.md5(path.read_bytes()).hexdigest() for path in originals.iterdir()
    }


def test_default_root_is_a_cache_folder_or_the_users_choice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("FASHIONNET_DATA", "~/somewhere")
    assert folders.default_root() == Path.home() / "somewhere"
    monkeypatch.delenv("FASHIONNET_DATA")
    assert folders.default_root().parts[-2:] == ("fashionnet", "data")


def test_a_root_that_cannot_be_one_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for root, message in (
        (tmp_path / "file", "file is a file"),
        (tmp_path / "file/further/below", "file is a file"),
        ("~no-such-user-here/data", "~no-such-user-here"),
    ):
        with pytest.raises(UserError, match=rf"data\.root=.*{message}"):
            load(root)


# ------------------------------------------------------------- files in the data folder


@pytest.mark.usefixtures("no_second_place")
@pytest.mark.parametrize("below", [Path(), DATA.folder], ids=["root", "raw"])
def test_packed_files_put_there_are_used_and_unpacked_once(
    tmp_path: Path, below: Path, packed: Path, warnings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy_into(tmp_path / below, packed)
    load_pixels(tmp_path)
    monkeypatch.setattr(fetching, "_recover", None)  # the only way to unpack
    monkeypatch.setattr(fetching, "_lock", None)
    for path in tmp_path.rglob("*.gz"):
        path.unlink()
    dataset = load(tmp_path)
    assert dataset.train.images.sum() == PIXELS
    assert len(dataset.open_test()) == 10_000
    assert not warnings()


@pytest.mark.usefixtures("no_second_place")
def test_root_may_be_relative_to_home_and_the_folder_may_change(
    tmp_path: Path, unpacked: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy_into(tmp_path / "home" / "data", unpacked)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert len(load("~/data").train) == 60_000
    monkeypatch.chdir(tmp_path / "home")
    dataset = load("data")
    monkeypatch.chdir("/")
    assert len(dataset.open_test()) == 10_000


def test_a_load_holds_the_set_once(unpacked: Path) -> None:
    tracemalloc.start()
    try:
        dataset = load(unpacked)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 1.05 * dataset.train.images.nbytes


@pytest.mark.parametrize(("form", "damage"), [("packed", flip_bit), ("unpacked", truncate)])
def test_a_damaged_file_is_named_and_fetched_again(
    tmp_path: Path,
    form: str,
    damage: Any,
    second_place: Path,
    request: pytest.FixtureRequest,
    warnings: Any,
) -> None:
    raw = copy_into(tmp_path / DATA.folder, request.getfixturevalue(form))
    bad = raw / (TRAIN_IMAGES.name + (".gz" if form == "packed" else ""))
    damage(bad)
    left = bad.read_bytes()
    load_pixels(tmp_path)
    named, aside = warnings()
    assert str(bad) in named and TRAIN_IMAGES.sha256 in named
    assert f"{bad}.damaged" in aside
    assert Path(f"{bad}.damaged").read_bytes() == left
    load_pixels(tmp_path)
    assert not warnings()


@pytest.mark.usefixtures("no_second_place")
def test_a_damaged_file_gives_way_to_another_copy(
    tmp_path: Path, packed: Path, unpacked: Path, warnings: Any
) -> None:
    bad = copy_into(tmp_path, unpacked) / TRAIN_IMAGES.name
    raw = copy_into(tmp_path / DATA.folder, packed)
    before = bad.stat()
    flip_bit(bad)
    os.utime(bad, ns=(before.st_atime_ns, before.st_mtime_ns))
    load_pixels(tmp_path)
    assert str(bad) in warnings()[0]
    sources.read_checked(raw / TRAIN_IMAGES.name, TRAIN_IMAGES)


WRONG: dict[str, tuple[str, Callable[[bytes], bytes], str]] = {
    "cut": (".gz", lambda content: content[:-1], "Compressed file ended"),
    "page": (".gz", lambda content: b"<html>404</html>", "Not a gzipped file"),
    "fewer": (".gz", lambda content: gzip.compress(bytes(LABELS.size - 1)), "to fewer than"),
    "other": (".gz", lambda content: gzip.compress(bytes(LABELS.size)), "unpacked: sha256"),
    "more": (".gz", lambda content: gzip.compress(bytes(LABELS.size + 1)), "to more than"),
    "bomb": (".gz", lambda content: gzip.compress(bytes(100_000_000)), "to more than"),
    "unpacked and cut": ("", lambda content: content[:-1], "60007 bytes"),
    "unpacked and longer": ("", lambda content: content + b"more", "60012 bytes"),
    "unpacked and other": ("", lambda content: bytes(LABELS.size), "sha256"),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_file_is_refused_and_named(
    tmp_path: Path, what: str, packed: Path, unpacked: Path
) -> None:
    suffix, alter, reason = WRONG[what]
    good = (packed if suffix else unpacked) / f"{LABELS.name}{suffix}"
    bad = tmp_path / good.name
    bad.write_bytes(alter(good.read_bytes()))
    tracemalloc.start()
    try:
        with pytest.raises(sources.SourceError, match=f"damaged.*: .*{reason}") as refusal:
            sources.read_checked(bad, LABELS)
        assert tracemalloc.get_traced_memory()[1] < 5_000_000
    finally:
        tracemalloc.stop()
    assert str(bad) in str(refusal.value) and LABELS.sha256 in str(refusal.value)


def test_a_far_too_large_file_is_not_read(tmp_path: Path) -> None:
    with open(tmp_path / LABELS.name, "wb") as file:
        file.truncate(1 << 40)  # a hole: it takes no room on the disk
    with pytest.raises(sources.SourceError, match=f"is damaged: {1 << 40} bytes, expected"):
        sources.read_checked(tmp_path / LABELS.name, LABELS)


@settings(max_examples=50)
@given(st.binary(max_size=200), st.booleans())
def test_a_packed_file_of_any_bytes_is_refused_and_named(content: bytes, magic: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"{TRAIN_IMAGES.name}.gz")
        path.write_bytes(b"\x1f\x8b\x08" + content if magic else content)
        with pytest.raises(sources.SourceError, match=path.name):
            sources.read_checked(path, TRAIN_IMAGES)


# ----------------------------------------------------------------------- the sealed test set


@pytest.mark.usefixtures("second_place")
def test_loading_does_not_open_the_test_set(tmp_path: Path, unpacked: Path, warnings: Any) -> None:
    copy_into(tmp_path, unpacked)
    flip_bit(tmp_path / TEST_IMAGES.name)
    dataset = load(tmp_path)
    assert not warnings()  # nobody has looked
    test = dataset.open_test()
    assert str(tmp_path / TEST_IMAGES.name) in warnings()[0]
    assert torch.equal(test.images, load(unpacked).open_test().images)


def test_a_missing_test_set_is_noticed_before_the_training(
    tmp_path: Path, unpacked: Path, second_place: Path
) -> None:
    copy_into(tmp_path, unpacked)
    (tmp_path / TEST_IMAGES.name).unlink()
    tracemalloc.start()
    try:
        dataset = load(tmp_path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 1.5 * dataset.train.images.nbytes  # fetching holds the training set once, too
    assert (tmp_path / DATA.folder / TEST_IMAGES.name).is_file()


# ------------------------------------------------------------------ folders that refuse


def test_a_read_only_folder_is_used_as_it_is(packed: Path, warnings: Any) -> None:
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        root = Path(shutil.copytree(packed, Path(name, "data")))
        root.chmod(0o555)
        try:
            with without_root():
                dataset = load(root)
                assert dataset.train.images.sum() == PIXELS
                assert len(dataset.open_test()) == 10_000
        finally:
            root.chmod(0o755)
        assert "Cannot keep" in warnings()[0]
        assert {path.name for path in root.iterdir()} == {path.name for path in packed.iterdir()}


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, packed: Path, warnings: Any) -> None:
    resource = pytest.importorskip("resource")
    raw = copy_into(tmp_path / DATA.folder, packed)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        load_pixels(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert any(TRAIN_IMAGES.name in warning for warning in warnings())
    small = [source.name for source in (LABELS, TEST_LABELS)]
    assert sorted(path.name for path in raw.iterdir() if path.suffix != ".gz") == sorted(small)


def test_a_folder_that_cannot_be_made_is_the_systems_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetching, "DEBIAN", Path("/nonexistent"))
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o555)
        with without_root(), pytest.raises(PermissionError):
            load(Path(name, "data"))


# ---------------------------------------------------------------------- several processes


def test_two_processes_at_once_both_succeed(tmp_path: Path, packed: Path) -> None:
    copy_into(tmp_path, packed)
    raw = tmp_path / DATA.folder
    before = os.umask(0o027)  # of a group with one data folder
    try:
        processes = [forked(load_pixels, tmp_path) for _ in range(2)]
    finally:
        os.umask(before)
    for process in processes:
        process.join(timeout=120)
    assert [process.exitcode for process in processes] == [0, 0]
    kept = {path.name: stat.S_IMODE(path.stat().st_mode) for path in raw.iterdir()}
    assert kept == {source.name: 0o640 for source in DATA.files}


def test_the_second_process_says_that_it_waits(
    tmp_path: Path, packed: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    copy_into(tmp_path, packed)
    with open(tmp_path / ".lock", "w") as lock, ThreadPoolExecutor(1) as thread:
        fcntl.flock(lock, fcntl.LOCK_SH)  # even this keeps out one that is to be alone
        loading = thread.submit(load, tmp_path)
        while "waiting" not in caplog.text and not loading.done():
            time.sleep(0.01)
        assert not (tmp_path / DATA.folder).exists()
        fcntl.flock(lock, fcntl.LOCK_UN)
        assert loading.result(timeout=60).train.images.sum() == PIXELS


# -------------------------------------------------------------------------------- fetching


@contextmanager
def silent_network() -> Iterator[str]:
    """Takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


def leftovers(root: Path) -> list[Path]:
    return [path for path in root.rglob("*") if ".fetch" in str(path) or path.suffix == ".tmp"]


def test_torchvision_fetches_from_its_mirror(
    tmp_path: Path, originals: Path, network: Network
) -> None:
    with mirror(originals) as address:
        network(address)
        load_pixels(tmp_path)
    kept = sorted(path.name for path in (tmp_path / DATA.folder).iterdir())
    assert kept == sorted(source.name for source in DATA.files)
    assert not leftovers(tmp_path)


def test_a_mirror_with_other_files_is_not_believed(
    tmp_path: Path, packed: Path, network: Network
) -> None:
    served = copy_into(tmp_path / "served", packed)
    rewrite(served / f"{LABELS.name}.gz", gzip.compress(bytes(LABELS.size)))
    with mirror(served) as address:
        network(address)
        with pytest.raises(UserError, match="is damaged or another file: unpacked: sha256"):
            load(tmp_path / "data")
    assert [path.name for path in (tmp_path / "data").rglob("*")] == [".lock"]


def test_a_silent_network_is_given_up(
    tmp_path: Path, network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetching, "_SILENCE_SECONDS", 0.3)
    with silent_network() as address:
        network(address)
        with pytest.raises(UserError, match="timed out"):
            load(tmp_path)
    assert socket.getdefaulttimeout() is None


@pytest.mark.usefixtures("network")
def test_without_any_source_one_line_lists_what_was_tried(tmp_path: Path) -> None:
    with pytest.raises(UserError) as refusal:
        load(tmp_path)
    message = str(refusal.value)
    assert "\n" not in message
    for source in DATA.files:
        assert f"{source.name}.gz" in message
    for part in ("is not installed", *DATA.mirrors, "refused>", "apt-get", "data.root"):
        assert part in message
    assert str(tmp_path / DATA.folder) in message
    assert not leftovers(tmp_path)


@pytest.mark.usefixtures("network")
def test_a_damaged_file_that_cannot_be_fetched_is_an_error_each_time(
    tmp_path: Path, packed: Path
) -> None:
    bad = copy_into(tmp_path, packed) / f"{TRAIN_IMAGES.name}.gz"
    truncate(bad)
    for _ in range(2):
        with pytest.raises(UserError) as refusal:
            load(tmp_path)
        assert str(bad) in str(refusal.value) and TRAIN_IMAGES.sha256 in str(refusal.value)
        assert LABELS.name not in str(refusal.value)  # only what is missing is asked for


def test_a_killed_fetch_leaves_nothing_that_counts(
    tmp_path: Path, packed: Path, network: Network, warnings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import_torchvision()  # here, so that the other process has it
    with silent_network() as address:
        network(address)
        process = forked(load_pixels, tmp_path)
        while not leftovers(tmp_path) and process.is_alive():
            time.sleep(0.01)
        process.kill()
        process.join()
    assert leftovers(tmp_path)
    (tmp_path / DATA.folder).mkdir(parents=True)
    (tmp_path / DATA.folder / f".{TRAIN_IMAGES.name}.123.tmp").write_bytes(b"half")
    monkeypatch.setattr(fetching, "DEBIAN", packed.parent)
    load_pixels(tmp_path)
    assert not leftovers(tmp_path)
    assert not warnings()


needs_apt = pytest.mark.skipif(
    shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None, reason="needs apt"
)


@needs_apt
@pytest.mark.slow
@pytest.mark.network
def test_apt_fetches_debians_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # As on a machine where nobody has run `apt-get update`.
    (tmp_path / "lists" / "partial").mkdir(parents=True)
    (tmp_path / "apt.conf").write_text(f'Dir::State::lists "{tmp_path}/lists";\n')
    monkeypatch.setenv("APT_CONFIG", str(tmp_path / "apt.conf"))
    root = tmp_path / "a folder"
    contents = fetching._from_apt(root, DATA, DATA.files)
    for source in DATA.files:
        assert hashlib.sha256(contents[source][0].data).hexdigest() == source.sha256
    assert not list(root.iterdir())


@needs_apt
def test_a_failing_apt_says_why(tmp_path: Path) -> None:
    with pytest.raises(sources.SourceError, match=r"apt-get download: E: .*such-package"):
        fetching._call(["apt-get", "download", "no-such-package-here"], tmp_path)


# ------------------------------------------------------------------------------ torchvision


def test_torchvision_can_be_imported_again_and_used() -> None:
    torchvision = import_torchvision()
    assert import_torchvision() is torchvision
    scaled = torchvision.transforms.functional.resize(torch.zeros(1, 28, 28), [14, 14])
    assert scaled.shape == (1, 14, 14)
    gc.collect()
    assert "iou_threshold" in str(torch._C._get_schema("torchvision::nms", ""))  # still declared
