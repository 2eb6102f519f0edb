"""Photos of one's own: how they are found, split, ordered, decoded and kept."""

from __future__ import annotations

import errno
import io
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import unicodedata
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from PIL import Image, ImageOps

from fashionnet import data as datasets
from fashionnet.data import photos as module, picture_files
from fashionnet.data.examples import Dataset, Examples
from fashionnet.data.photos import cache as cached, finding, ordering, photos
from fashionnet.data.photos.cache import decode
from fashionnet.errors import UserError
from tests.data.conftest import encoded, forked, without_root

ORIENTATION = 0x0112
SIZE = 16


def noise(seed: int, size: tuple[int, int] = (40, 30)) -> Image.Image:
    """A picture like no other."""
    values = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(values)


def scene(seed: int, size: tuple[int, int]) -> Image.Image:
    """A picture of soft colors like no other, of which a larger copy shows the same."""
    return noise(seed, (5, 4)).resize(size, Image.Resampling.BILINEAR)


def put(path: Path, content: bytes | Image.Image) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else encoded(content))
    return path


def fill(root: Path, first: int = 0, **counts: int) -> Path:
    """Puts pictures that are all different, numbered from `first`, into class folders."""
    for name, count in counts.items():
        for i in range(first, first + count):
            put(root / name / f"{i:03}.png", noise(i))
        first += count
    return root


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def load(cache: Path) -> Callable[..., Dataset]:
    """Loads small, with a cache of the test's own."""

    def load(root: Path | str, size: int = SIZE, **options: Any) -> Dataset:
        return photos(root, size, cache=cache, **options)

    return load


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """12 ants and 8 bees, without a test set."""
    return fill(tmp_path / "photos", ants=12, bees=8)


@pytest.fixture
def parted(tmp_path: Path) -> Path:
    """6 ants and 4 bees to train on; 2 and 3 in val/."""
    fill(tmp_path / "parted/train", ants=6, bees=4)
    fill(tmp_path / "parted/val", first=50, ants=2, bees=3)
    return tmp_path / "parted"


Load = Callable[..., Dataset]


def prints(examples: Examples) -> list[bytes]:
    """The pixels of each picture."""
    return [image.numpy().tobytes() for image in examples.images]


def same(first: Dataset, second: Dataset) -> bool:
    pairs = [(first.train, second.train), (first.open_test(), second.open_test())]
    return all(
        torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels) for a, b in pairs
    )


def entries(cache: Path) -> list[Path]:
    """The files of decoded photos."""
    return sorted(cache.glob(f"{SIZE}-*/[!.]*"))


def logged(caplog: pytest.LogCaptureFixture, level: int = logging.WARNING) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == level]


# ------------------------------------------------------------------------------------ what comes


def test_dataset(root: Path, load: Load, capfd: pytest.CaptureFixture[str]) -> None:
    before = sorted(root.rglob("*"))
    dataset = load(root)
    assert sorted(root.rglob("*")) == before
    assert capfd.readouterr().err == ""  # no bar where there is no terminal
    assert dataset.name == "photos"
    assert dataset.class_names == ("ants", "bees")
    assert dataset.image_shape == (3, SIZE, SIZE)
    assert dataset.train.images.shape == (16, 3, SIZE, SIZE)
    assert dataset.train.images.dtype == torch.uint8
    assert dataset.train.labels.dtype == torch.int64
    assert dataset.num_test == len(dataset.open_test()) == 4
    assert torch.bincount(dataset.train.labels).tolist() == [10, 6]
    assert torch.bincount(dataset.open_test().labels).tolist() == [2, 2]


def test_pixels_and_labels_belong_together(root: Path, load: Load) -> None:
    dataset = load(root)
    label_of = {
        decode(path.read_bytes(), SIZE).tobytes(): label
        for label, name in enumerate(dataset.class_names)
        for path in (root / name).iterdir()
    }
    seen: dict[bytes, int] = {}
    for examples in (dataset.train, dataset.open_test()):
        seen |= dict(zip(prints(examples), examples.labels.tolist(), strict=True))
    assert seen == label_of


def test_sources_are_what_sha256sum_says(parted: Path, load: Load) -> None:
    for part, sha256 in load(parted).sources.items():
        command = f"find {part} -type f | LC_ALL=C sort | xargs sha256sum | sha256sum"
        printed = subprocess.check_output(command, shell=True, cwd=parted, text=True)
        assert printed.split()[0] == sha256


def test_cache_is_in_the_data_folder(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASHIONNET_DATA", str(tmp_path / "mine"))
    photos(root, SIZE)
    assert len(entries(tmp_path / "mine/photos")) == 20


def test_test_set_is_there_after_a_change_of_directory(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    dataset = photos("photos", SIZE, cache=Path("here"))
    monkeypatch.chdir("/")
    assert len(dataset.open_test()) == 4


def test_training_leaves_the_test_pixels_closed(root: Path, cache: Path, load: Load) -> None:
    train = set(prints(load(root).train))
    for path in entries(cache):
        if path.read_bytes()[: 3 * SIZE * SIZE] not in train:
            damage(path)
    dataset = load(root)
    assert set(prints(dataset.train)) == train
    with pytest.raises(UserError, match="damaged"):
        dataset.open_test()


# --------------------------------------------------------------------------------------- folders


@pytest.mark.parametrize("name", ["val", "valid", "Testing", "VALIDATION"])
def test_second_folder_is_the_test_set(parted: Path, name: str, load: Load) -> None:
    (parted / "val").rename(parted / name)
    dataset = load(parted)
    assert torch.bincount(dataset.train.labels).tolist() == [6, 4]
    assert torch.bincount(dataset.open_test().labels).tolist() == [2, 3]
    assert list(dataset.sources) == ["train", name]


def test_other_files_are_ignored_and_counted(
    root: Path, load: Load, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    before = load(root)
    for name in (".DS_Store", "notes.txt", "more.txt", "._000.png", "README"):
        put(root / "ants" / name, b"not a picture")
    put(root / "list.csv", b"")
    put(root / ".git/a.png", noise(99))
    put(root / "__MACOSX/a.png", noise(99))
    caplog.clear()
    assert same(load(root), before)
    files, folders = [line for line in logged(caplog, logging.INFO) if "Ignored" in line]
    assert "5 files" in files and "2 '.txt'" in files
    assert "2 hidden or system folders" in folders and "photos/__MACOSX'" in folders


def test_folders_that_systems_make_and_no_others_are_left_out(root: Path, load: Load) -> None:
    for i, name in enumerate(("__MACOSX", "@eaDir", "$RECYCLE.BIN", ".ipynb_checkpoints")):
        fill(root, first=60 + 10 * i, **{name: 3})
        put(root / "ants" / name / "a.png", noise(65 + 10 * i))
    names = ("__background__", "_", "@home", "#1", "lost", "con")
    fill(root, first=120, **dict.fromkeys(names, 2))
    put(root / "ants/__0.jpg", encoded(noise(99), "JPEG"))
    dataset = load(root)
    assert set(dataset.class_names) == {"ants", "bees", *names}
    assert len(dataset.train) + dataset.num_test == 20 + 12 + 1


def test_every_suffix_is_read(tmp_path: Path, load: Load) -> None:
    Image.init()
    known = Image.registered_extensions()
    of_pillow = {suffix for suffix, kind in known.items() if kind in picture_files._FORMATS}
    assert of_pillow <= set(finding.SUFFIXES)
    suffixes = (*finding.SUFFIXES, ".JPG", ".Jpe")
    modes = {".pfm": "F", ".pbm": "1", ".pgm": "L"}
    for i, suffix in enumerate(suffixes):
        image = noise(i).convert(modes.get(suffix, "RGB"))
        put(tmp_path / "p/a" / f"{i}{suffix}", encoded(image, known[suffix.lower()]))
    dataset = load(fill(tmp_path / "p", first=50, b=2))
    assert len(dataset.train) + dataset.num_test == len(suffixes) + 2


def test_deeper_folders_and_links(root: Path, tmp_path: Path, load: Load) -> None:
    fill(tmp_path / "elsewhere", first=70, more=3)
    put(root / "ants/monday/early/a.png", noise(80))
    (root / "ants/more").symlink_to(tmp_path / "elsewhere/more")
    (root / "ants/one.png").symlink_to(put(tmp_path / "b.png", noise(81)))
    (root / "ants/circle").symlink_to(root / "ants")
    (root / "wasps").symlink_to(fill(tmp_path / "far", first=90, wasps=2) / "wasps")
    dataset = load(root)
    assert len(dataset.train) + dataset.num_test == 20 + 3 + 1 + 1 + 2
    assert dataset.class_names == ("ants", "bees", "wasps")


REFUSED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "class missing in val": (
        lambda root: shutil.rmtree(root / "val/bees"),
        "class 'bees' is in .*train but not in .*val; ",
    ),
    "class missing in train": (
        lambda root: fill(root / "val", wasps=1),
        "class 'wasps' is in .*val but not in .*train; ",
    ),
    "no photo in val": (
        lambda root: deque(map(os.unlink, (root / "val/ants").iterdir())),
        "val/ants has 0 photos.*1 or more.*; add",
    ),
    "two names": (lambda root: fill(root / "valid", ants=1, bees=1), "train, val, valid; keep"),
    "no train": (
        lambda root: (root / "train").rename(root / "test"),
        "test, val; keep one train",
    ),
    "stray": (lambda root: fill(root / "extra", ants=1), "extra is beside train, val; move"),
    "one class": (
        lambda root: deque(map(shutil.rmtree, root.glob("*/ants"))),
        "train has one class only, 'bees'; put",
    ),
}


def test_a_validation_folder_beside_a_test_folder_is_the_validation_set(
    parted: Path, load: Load
) -> None:
    two = load(parted)
    assert two.num_validation is None  # val/ is what is reported
    fill(parted / "test", ants=2, bees=3)
    three = load(parted)
    assert (three.num_validation, three.num_test) == (two.num_test, 5)
    assert len(three.train) == len(two.train) + two.num_test
    for fraction, limit in ((0.1, None), (0.5, 2)):  # validation_split decides nothing
        train, validation = three.split(fraction, limit)
        assert torch.equal(train.images, two.train.images[:limit])
        assert sorted(prints(validation)) == sorted(prints(two.open_test()))
        assert sorted(validation.labels) == sorted(two.open_test().labels)
    assert sorted(three.open_test().labels.tolist()) == [0, 0, 1, 1, 1]


PARTS_LIKE_CLASSES = [
    ("train", "dev"),
    ("fold1", "fold2", "fold3"),
    ("seg_train/seg_train", "seg_test/seg_test", "seg_pred"),
    ("train/fold1", "train/fold2", "test/fold1", "test/fold2"),
]


@pytest.mark.parametrize("folders", PARTS_LIKE_CLASSES, ids=" ".join)
def test_parts_are_not_taken_for_classes(
    tmp_path: Path, folders: tuple[str, ...], load: Load
) -> None:
    for i, folder in enumerate(folders):
        fill(tmp_path / "p" / folder, first=10 * i, cats=2, dogs=2)
    with pytest.raises(UserError, match=r"both hold cats, dogs, so .*name the parts train, val or"):
        load(tmp_path / "p")


LAYOUTS: dict[str, tuple[tuple[str, ...], tuple[str, str], int]] = {
    "train alone": (("train/ants", "train/bees"), ("ants", "bees"), 4),
    "a train is a vehicle": (("bus", "train"), ("bus", "train"), 4),
    "a common name inside": (("cats/images", "dogs/images", "dogs/more"), ("cats", "dogs"), 6),
    "capitals and -ing": (("TRAINing/a", "TRAINing/b", "Valid/a", "Valid/b"), ("a", "b"), 8),
}


@pytest.mark.parametrize("what", LAYOUTS)
def test_layouts(tmp_path: Path, what: str, load: Load) -> None:
    folders, class_names, num = LAYOUTS[what]
    for i, folder in enumerate(folders):
        fill(tmp_path / "p", first=10 * i, **{folder: 2})
    dataset = load(tmp_path / "p")
    assert dataset.class_names == class_names
    assert len(dataset.train) + dataset.num_test == num


COMPOSED, DECOMPOSED = (unicodedata.normalize(form, "Käfer") for form in ("NFC", "NFD"))


def test_names_that_differ_in_normalization_are_one_class(tmp_path: Path, load: Load) -> None:
    fill(tmp_path / "p/train", ants=4, **{COMPOSED: 3})
    fill(tmp_path / "p/train", first=10, **{DECOMPOSED: 2})
    fill(tmp_path / "p/val", first=20, **{DECOMPOSED: 3, "ants": 1})
    dataset = load(tmp_path / "p")
    assert dataset.class_names == (COMPOSED, "ants") == tuple(sorted((COMPOSED, "ants")))
    assert torch.bincount(dataset.train.labels).tolist() == [5, 4]
    assert torch.bincount(dataset.open_test().labels).tolist() == [3, 1]


def test_a_copy_whose_names_were_normalized_is_the_same_data(tmp_path: Path, load: Load) -> None:
    first = load(fill(tmp_path / "p", ants=4, **{COMPOSED: 3}))
    second = load(fill(tmp_path / "q", ants=4, **{DECOMPOSED: 3}))
    assert (first.sources, first.class_names) == (second.sources, second.class_names)
    assert same(first, second)


def test_class_whose_name_is_not_utf_8_is_refused(root: Path, load: Load) -> None:
    fill(root, first=60, **{os.fsdecode(b"caf\xe9"): 2})
    with pytest.raises(
        UserError, match=r"the name of the folder .*/caf\\xe9 is not UTF-8"
    ) as refusal:
        load(root)
    str(refusal.value).encode()


@pytest.mark.parametrize("what", REFUSED)
def test_folders_that_are_refused(parted: Path, what: str, load: Load) -> None:
    change, message = REFUSED[what]
    change(parted)
    with pytest.raises(UserError, match=message):
        load(parted)


def test_folders_and_values_that_cannot_be_taken(root: Path, tmp_path: Path, load: Load) -> None:
    (tmp_path / "empty").mkdir()
    for folder, message in (
        ("", r"data\.root=FOLDER is needed for data=photos"),
        (tmp_path / "empty", "has no class folders; put the photos of each class"),
        (root / "nowhere", r"data\.root=.*nowhere is not a folder; check the path"),
        (root / "ants/000.png", r"000\.png is a file; choose a folder"),
        ("~nobody-of-that-name/photos", r"data\.root=~nobody-of-that-name"),
    ):
        with pytest.raises(UserError, match=message):
            load(folder)
    for options in ({"size": 7}, {"size": 1025}, {"test_split": 0.0}, {"test_split": 1.0}):
        ((key, value),) = options.items()
        with pytest.raises(UserError, match=rf"data\.{key}={value} must be"):
            load(root, **options)


@pytest.mark.parametrize("size", [8, 255, 1024])
def test_sizes(tmp_path: Path, size: int, load: Load) -> None:
    dataset = load(fill(tmp_path / "p", a=2, b=2), size)
    assert dataset.train.images.shape == (2, 3, size, size)


# ----------------------------------------------------------------------------------------- order


@pytest.mark.parametrize("test_split, held_out", [(0.01, [1, 1]), (0.5, [6, 4]), (0.99, [11, 7])])
def test_each_class_keeps_a_photo_in_both(
    root: Path, test_split: float, held_out: list[int], load: Load
) -> None:
    dataset = load(root, test_split=test_split)
    assert torch.bincount(dataset.open_test().labels).tolist() == held_out


def test_seed_decides_order_and_split(root: Path, parted: Path, load: Load, tmp_path: Path) -> None:
    first, again, other = load(root), photos(root, SIZE, cache=tmp_path / "b"), load(root, seed=1)
    assert same(first, again)
    assert prints(first.train) != prints(other.train)
    assert set(prints(first.open_test())) != set(prints(other.open_test()))
    one, two = load(parted), load(parted, seed=1)  # with a test set of its own
    assert prints(one.train) != prints(two.train)
    for part, other_part in ((one.train, two.train), (one.open_test(), two.open_test())):
        assert set(prints(part)) == set(prints(other_part))


def test_order_is_pinned() -> None:
    members = [finding.Photo(f"{i}", i % 2, f"{i:064x}") for i in range(8)]
    *parts, num_validation = ordering.arranged({"photos": members}, seed=0, test_split=0.25)
    assert num_validation is None
    assert ["".join(photo.path for photo in part) for part in parts] == ["072516", "34"]


def test_validation_set_and_limit_are_stratified(tmp_path: Path, load: Load) -> None:
    dataset = load(fill(tmp_path / "p", ants=60, bees=30, wasps=12))
    train, validation = dataset.split(0.25, limit=34)
    assert torch.bincount(validation.labels).tolist() == pytest.approx([12, 6, 2.5], abs=1)
    assert torch.bincount(train.labels).tolist() == pytest.approx([20, 10, 4], abs=1)


def labeled(counts: Sequence[int]) -> list[list[finding.Photo]]:
    """Classes of so many photos, all of different content."""
    return [
        [finding.Photo(f"{label}/{i}", label, f"{label}-{i}") for i in range(count)]
        for label, count in enumerate(counts)
    ]


@settings(deadline=None)
@given(
    counts=st.lists(st.integers(1, 60), min_size=2, max_size=12),
    seed=st.integers(0, 2**40),
)
def test_every_head_and_tail_has_each_class_in_proportion(counts: list[int], seed: int) -> None:
    order = [photo.label for photo in ordering.interleaved(labeled(counts), seed)]
    assert Counter(order) == dict(enumerate(counts))
    found = dict.fromkeys(range(len(counts)), 0)
    for length, label in enumerate(order, 1):  # what a head has too few, the tail has too many
        found[label] += 1
        for each, count in enumerate(counts):
            assert abs(found[each] * len(order) - count * length) < len(order)


def test_classes_without_a_photo_in_a_part_are_named(
    tmp_path: Path, load: Load, caplog: pytest.LogCaptureFixture
) -> None:
    dataset = load(fill(tmp_path / "p", a=5, b=5, c=5, d=5))
    datasets.warn_of_absent_classes(dataset.class_names, *dataset.split(0.5))
    datasets.warn_of_absent_classes(dataset.class_names, *dataset.split(0))
    assert not logged(caplog)
    parts = dataset.split(0.1, limit=2)
    datasets.warn_of_absent_classes(dataset.class_names, *parts)
    for name, part, line in zip(("training", "validation"), parts, logged(caplog), strict=True):
        absent = [repr("abcd"[label]) for label in range(4) if label not in part.labels]
        assert len(absent) == 2
        assert line == f"No {name} picture shows {', '.join(absent)}"


def test_the_seed_decides_which_of_equal_classes_have_one_more() -> None:
    heads, tails = set(), set()
    for seed in range(40):
        order = [photo.label for photo in ordering.interleaved(labeled([4] * 10), seed)]
        heads.add(frozenset(order[:4]))
        tails.add(frozenset(order[-4:]))
    for found in (heads, tails):
        assert len(found) > 20
        assert set().union(*found) == set(range(10))


@pytest.mark.parametrize("counts", [[100] * 9 + [1], [1] + [50] * 9, [30, 1], [200, 200, 2, 1]])
def test_the_one_photo_of_a_rare_class_is_trained_on(counts: list[int]) -> None:
    for seed in range(5):
        order = [photo.label for photo in ordering.interleaved(labeled(counts), seed)]
        assert set(order[: int(0.9 * len(order))]) == set(range(len(counts)))


# ---------------------------------------------------------------------------------------- pixels


def is_near(pixels: Any, image: Image.Image, levels: float = 2.0) -> bool:
    expected = np.asarray(image.convert("RGB"), dtype=float).transpose(2, 0, 1)
    return bool(np.abs(pixels - expected).max() <= levels)


def plain(image: Image.Image, size: int) -> Image.Image:
    """What torchvision's Resize and CenterCrop do, word for word."""
    shorter = round(size * 256 / 224)
    width, height = (int(shorter * side / min(image.size)) for side in image.size)
    left, upper = round((width - size) / 2), round((height - size) / 2)
    resized = image.resize((width, height), Image.Resampling.BICUBIC)
    return resized.crop((left, upper, left + size, upper + size))


@pytest.mark.parametrize("box", [(40, 30), (30, 41), (300, 17), (1, 5)])
@pytest.mark.parametrize("size", [8, 21, 32])
def test_resized_and_cropped_as_torchvision_does(box: tuple[int, int], size: int) -> None:
    image = scene(0, box)
    assert is_near(decode(encoded(image), size), plain(image, size))


def test_picture_of_the_right_size_keeps_its_values() -> None:
    image = noise(0, (41, 32))  # 28 * 256 / 224 = 32
    assert is_near(decode(encoded(image), 28), image.crop((6, 2, 34, 30)), 0)


RED, GRAY = (255, 0, 0), (90, 90, 90)
CMYK_RED = (0, 255, 255, 0)
MODES: dict[str, tuple[Image.Image, str, tuple[int, ...], int]] = {
    "RGBA": (Image.new("RGBA", (40, 30), "red"), "PNG", RED, 0),
    "P": (Image.new("RGB", (40, 30), "red").convert("P"), "GIF", RED, 0),
    "CMYK JPEG": (Image.new("CMYK", (40, 30), CMYK_RED), "JPEG", RED, 3),
    "CMYK TIFF": (Image.new("CMYK", (40, 30), CMYK_RED), "TIFF", RED, 0),
    "WEBP": (Image.new("RGB", (40, 30), "red"), "WEBP", RED, 6),
    "large JPEG": (Image.new("RGB", (900, 700), "red"), "JPEG", RED, 3),
    "large CMYK JPEG": (Image.new("CMYK", (900, 700), CMYK_RED), "JPEG", RED, 3),
    "1": (Image.new("1", (40, 30), 1), "PNG", (255, 255, 255), 1),
    "L": (Image.new("L", (40, 30), 90), "PNG", GRAY, 1),
    "LA": (Image.new("LA", (40, 30), (90, 255)), "PNG", GRAY, 1),
    "LA half": (Image.new("LA", (40, 30), (55, 128)), "PNG", (155, 155, 155), 1),
    "RGBA transparent": (Image.new("RGBA", (40, 30), (9, 9, 9, 0)), "PNG", (255, 255, 255), 1),
    "I;16": (Image.fromarray(np.full((30, 40), 90 * 257, np.uint16)), "PNG", GRAY, 1),
}


@pytest.mark.parametrize("name", MODES)
def test_colors_and_grays_of_all_modes(name: str) -> None:
    image, kind, color, levels = MODES[name]
    expected = np.array(color)[:, None, None]
    assert np.abs(decode(encoded(image, kind), SIZE) - expected).max() <= levels


def test_palette_with_transparency_is_laid_on_white() -> None:
    image = Image.new("P", (40, 30), 0)
    image.putpalette([0, 0, 0, 255, 0, 0])
    image.paste(1, (0, 0, 20, 30))
    pixels = decode(encoded(image, "PNG", transparency=0), 28)
    assert pixels[:, 14, 3].tolist() == [255, 0, 0]
    assert pixels[:, 14, -4].tolist() == [255, 255, 255]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied(orientation: int) -> None:
    image = scene(0, (41, 30))
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    content = encoded(image, "PNG", exif=exif)
    with Image.open(io.BytesIO(content)) as stored:
        upright = ImageOps.exif_transpose(stored)
        assert is_near(decode(content, 28), plain(upright, 28))


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_large_photo_is_reduced_without_harm(kind: str) -> None:
    image = scene(0, (1100, 801))
    content = encoded(image, kind)
    assert is_near(decode(content, 64), plain(image, 64), 12)  # half a pixel apart


def test_animation_gives_its_first_frame() -> None:
    frames = [Image.new("RGB", (40, 30), color) for color in ("red", "blue")]
    content = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert (decode(content, SIZE) == np.array(RED)[:, None, None]).all()


def test_ribbon_needs_little_memory() -> None:
    assert decode(encoded(Image.new("L", (60_000, 1), 90)), 64).shape == (3, 64, 64)


def test_picture_without_pixels_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        picture_files, "decoded", lambda *_, **__: nullcontext(Image.new("L", (0, 5)))
    )
    with pytest.raises(UserError, match="it has no pixels; remove it"):
        decode(b"", SIZE)


# ----------------------------------------------------------------------------------------- cache


@pytest.fixture
def decodings(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes that photos were decoded to."""
    calls: list[int] = []
    original = cached.decode

    def decode(content: bytes, size: int) -> Any:
        calls.append(size)
        return original(content, size)

    monkeypatch.setattr(cached, "decode", decode)
    return calls


def test_what_was_decoded_is_not_decoded_again(
    root: Path, load: Load, decodings: list[int]
) -> None:
    first = load(root)
    assert len(decodings) == 20
    assert same(load(root), first)
    load(root, seed=1)
    assert load(root, seed=1, test_split=0.4).num_test == 5 + 3
    root = root.rename(root.with_name("moved"))
    assert same(load(root), first)
    (root / "ants/000.png").rename(root / "bees/other.png")
    (root / "bees").rename(root / "wasps")
    dataset = load(root)
    assert dataset.class_names == ("ants", "wasps")
    labels = torch.cat([dataset.train.labels, dataset.open_test().labels])
    assert torch.bincount(labels).tolist() == [11, 9]
    assert len(decodings) == 20


def test_what_is_new_is_decoded(
    root: Path, load: Load, decodings: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = load(root)
    path, content = root / "ants/003.png", encoded(noise(77))
    status = path.stat()
    path.write_bytes(content)  # another photo at the same time
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    fill(root, first=60, bees=2)
    decodings.clear()
    after = load(root)
    assert len(decodings) == 1 + 2
    assert decode(content, SIZE).tobytes() in prints(after.train) + prints(after.open_test())
    assert before.sources != after.sources
    assert load(root, SIZE + 1).train.images.shape[-1] == SIZE + 1
    assert len(decodings) == 3 + 22
    monkeypatch.setattr(module, "TRANSFORM", module.TRANSFORM + 1)
    load(root)
    assert len(decodings) == 25 + 22


def test_interrupted_decoding_goes_on_where_it_stopped(
    root: Path, cache: Path, load: Load, decodings: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = cached.decode

    def decode(content: bytes, size: int) -> Any:
        if len(decodings) >= 6:
            raise KeyboardInterrupt
        return counted(content, size)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(cached, "decode", decode)
        load(root)
    assert not list(cache.glob("*/.*.tmp"))
    kept = len(entries(cache))
    assert 0 < kept < 20
    decodings.clear()
    assert len(load(root).train) == 16
    assert len(decodings) == 20 - kept


def decode_slowly(root: Path, cache: Path, seconds: float) -> None:
    """Loads photos; each decoding takes so long and is noted in a file."""
    original = cached.decode

    def decode(content: bytes, size: int) -> Any:
        time.sleep(seconds)
        with open(root / "notes", "a") as file:
            file.write("decode ")
        return original(content, size)

    cached.decode = decode
    assert len(photos(root, SIZE, cache=cache).open_test()) == 4


def test_killed_decoding_loses_nothing(
    root: Path, cache: Path, load: Load, decodings: list[int]
) -> None:
    process = forked(decode_slowly, root, cache, 0.1)
    while len(entries(cache)) < 3 and process.is_alive():
        time.sleep(0.01)
    process.kill()
    process.join()
    kept = entries(cache)
    left = put(kept[0].with_name(".0.tmp"), b"")
    assert len(load(root).train) == 16
    assert 0 < len(decodings) == 20 - len(kept) < 20
    assert not left.exists()


def test_two_processes_at_once_decode_once(root: Path, cache: Path, load: Load) -> None:
    processes = [forked(decode_slowly, root, cache, 0.1) for _ in range(2)]
    for process in processes:
        process.join(timeout=120)
    assert [process.exitcode for process in processes] == [0, 0]
    assert (root / "notes").read_text().split() == ["decode"] * 20
    load(root)


def test_without_locks_nothing_breaks(
    root: Path, cache: Path, load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", fail)
    with ThreadPoolExecutor(2) as threads:
        first, second = threads.map(lambda _: load(root), range(2))
    assert same(first, second)
    assert len(entries(cache)) == 20 and not list(cache.glob("*/.*.tmp"))


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)


def test_damaged_cache_is_reported(root: Path, cache: Path, load: Load) -> None:
    before = load(root)
    for path in entries(cache):
        damage(path)
    with pytest.raises(UserError, match=r"cached photo .* is damaged; remove .*-v") as refusal:
        load(root)
    assert str(entries(cache)[0].parent) in str(refusal.value)
    shutil.rmtree(cache)
    assert same(load(root), before)


@pytest.mark.parametrize("change", [lambda path: os.truncate(path, 100), Path.unlink])
def test_incomplete_cache_is_completed(
    root: Path, cache: Path, load: Load, change: Callable[[Path], Any], decodings: list[int]
) -> None:
    before = load(root)
    for path in entries(cache)[:4]:
        change(path)
    decodings.clear()
    assert same(load(root), before)
    assert len(decodings) == 4
    entries(cache)[0].unlink()
    assert not same(load(root, seed=1), before)


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that everyone can reach, unlike those of pytest."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        yield Path(name)


def test_read_only_cache_is_used_as_it_is(open_folder: Path) -> None:
    root, cache = fill(open_folder / "p", a=3, b=3), open_folder / "cache"
    first = photos(root, SIZE, cache=cache)
    cache.chmod(0o555)
    with without_root():
        assert same(photos(root, SIZE, cache=cache), first)


def test_cache_that_cannot_be_written(open_folder: Path) -> None:
    root = fill(open_folder / "p", a=3, b=3)
    for cache in (open_folder / "cache", root / "a/000.png"):
        with (
            without_root(),
            pytest.raises(UserError, match=r"cache.*cannot be written.*FASHIONNET_DATA"),
        ):
            photos(root, SIZE, cache=cache)


@pytest.mark.parametrize("closed", ["p", "p/a", "p/a/000.png"])
def test_photos_that_one_may_not_read(open_folder: Path, closed: str) -> None:
    root, cache = fill(open_folder / "p", a=3, b=3), open_folder / "cache"
    cache.mkdir()
    cache.chmod(0o777)
    (open_folder / closed).chmod(0)
    try:
        with without_root(), pytest.raises(UserError, match=r"cannot be read .*; check") as refusal:
            photos(root, SIZE, cache=cache)
    finally:
        (open_folder / closed).chmod(0o755)
    assert closed in str(refusal.value)


@pytest.mark.parametrize("limit", [500, 5000])  # in an entry; where the set is put together
def test_full_disk_leaves_nothing(root: Path, cache: Path, load: Load, limit: int) -> None:
    resource = pytest.importorskip("resource")
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(OSError, match="File too large") as refusal:
            load(root)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert str(cache) in refusal.value.filename
    assert not list(cache.glob("*/.*.tmp"))


# ------------------------------------------------------------------------------------ bad photos


BAD = {
    "text.jpg": b"hello\n" * 50,
    "empty.png": b"",
    "cut.jpg": encoded(noise(0), "JPEG")[:-300],
    "phone.jpg": b"\0\0\0\x18ftypheic" + b"\0" * 99,
    "bomb.ppm": b"P6 60000 60000 255\n",
}


@pytest.mark.usefixtures("little_memory")
@pytest.mark.parametrize("name", BAD)
def test_one_unreadable_photo_is_skipped(
    root: Path, name: str, load: Load, caplog: pytest.LogCaptureFixture
) -> None:
    put(root / "ants" / name, BAD[name])
    first = load(root)
    assert len(first.train) + first.num_test == 20
    assert any(f"1 photos cannot be read: 'ants/{name}'" in line for line in logged(caplog))
    caplog.clear()
    assert same(load(root), first)
    assert any(name in line for line in logged(caplog))  # each time


def test_photo_of_many_bytes_is_skipped(
    root: Path, load: Load, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(picture_files, "MAX_BYTES", 1 << 20)
    os.truncate(put(root / "ants/large.png", noise(0)), (1 << 20) + 1)
    assert len(load(root).train) == 16
    assert "larger than 1 MiB" in logged(caplog)[0]


def test_five_percent_and_always_one_may_be_unreadable(
    tmp_path: Path, load: Load, caplog: pytest.LogCaptureFixture
) -> None:
    root = fill(tmp_path / "p", a=76, b=76)
    for i in range(8):
        put(root / "a" / f"bad{i}.jpg", b"bad %d" % i)
    dataset = load(root)
    assert len(dataset.train) + dataset.num_test == 152
    (message,) = logged(caplog)
    assert message.startswith("8 photos") and message.endswith(" and 3 more")
    assert message.count(".jpg") == 5
    put(root / "b/bad.jpg", b"bad")
    with pytest.raises(UserError, match=r"9 of 161 photos in .* than 5%; repair or remove 'a/bad0"):
        load(root)
    few = fill(tmp_path / "q", a=2, b=2)
    put(few / "a/bad.png", b"bad")
    assert len(load(few).train) == 2
    put(few / "b/bad.png", b"bad")
    with pytest.raises(UserError, match="2 of 6 photos"):
        load(few)


@pytest.mark.parametrize("other", ["bad.png", "notes.txt"])
def test_class_of_one_photo_cannot_be_split(root: Path, other: str, load: Load) -> None:
    fill(root, first=60, wasps=1)
    put(root / "wasps" / other, b"bad")
    with pytest.raises(
        UserError, match=r"wasps has 1 photos that can be read.* 2 or more.*\.jpeg.*; add"
    ):
        load(root)


@pytest.mark.parametrize(
    "change, message",
    [
        (Path.unlink, r"cannot be read .*; check that it is there"),
        (lambda path: put(path, noise(99)), "was changed meanwhile; start again"),
    ],
)
def test_photo_that_vanishes_or_changes(
    root: Path, load: Load, change: Any, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = cached.decode_new

    def decode_new(*arguments: Any) -> Any:
        change(root / "ants/003.png")
        return original(*arguments)

    monkeypatch.setattr(cached, "decode_new", decode_new)
    with pytest.raises(UserError, match=rf"ants/003\.png {message}"):
        load(root)


def test_link_to_nowhere_and_pipe(root: Path, load: Load) -> None:
    (root / "ants/lost.png").symlink_to(root / "nothing.png")
    with pytest.raises(UserError, match=r"lost\.png cannot be read .*; check that it is there"):
        load(root)
    (root / "ants/lost.png").unlink()
    os.mkfifo(root / "ants/pipe.png")
    with pytest.raises(UserError, match=r"pipe\.png is not a regular file; remove it"):
        load(root)


def test_lack_of_memory_names_the_photo(
    root: Path, load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    def decoded(*_: Any, **__: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(picture_files, "decoded", decoded)
    with pytest.raises(UserError, match=r"no memory to open .*\.png; scale it down"):
        load(root)


def test_names_of_any_bytes(root: Path, load: Load, caplog: pytest.LogCaptureFixture) -> None:
    name = os.fsdecode(b"caf\xe9 \n.png")
    put(root / "ants" / name, noise(60))
    put(root / "ants" / f"bad{name}", b"bad")
    first = load(root)
    assert same(load(root), first)
    assert "\n" not in logged(caplog)[0]


# -------------------------------------------------------------------------------- what is logged


def test_copies_across_the_split_are_reported(
    parted: Path, load: Load, caplog: pytest.LogCaptureFixture
) -> None:
    photo = scene(0, (320, 240))
    put(parted / "train/ants/scene.png", photo)
    put(parted / "val/ants/compressed.jpg", encoded(photo.resize((160, 120)), "JPEG", quality=50))
    put(parted / "val/bees/000.png", (parted / "train/ants/000.png").read_bytes())
    for _ in range(2):  # decoded and from the cache
        caplog.clear()
        load(parted)
        (message,) = logged(caplog)
        assert message.startswith("2 test photos look like training photos")
        assert "'val/ants/compressed.jpg' (train/ants/scene.png)" in message
        assert "'val/bees/000.png' (train/ants/000.png)" in message


def test_other_photos_are_not_alike(
    tmp_path: Path, load: Load, caplog: pytest.LogCaptureFixture
) -> None:
    load(fill(tmp_path / "different", a=60, b=60), test_split=0.5)
    for i in range(20):
        faint = scene(i, (40, 30)).point(lambda value: 120 + value // 16)
        put(tmp_path / "faint" / "ab"[i % 2] / f"{i}.png", faint)
        flat = Image.new("L", (40, 30), 12 * i)
        put(tmp_path / "flat" / "ab"[i % 2] / f"{i}.png", flat)
    load(tmp_path / "faint")
    load(tmp_path / "flat")
    assert not logged(caplog)


def test_counts_and_imbalance_are_reported(
    tmp_path: Path, load: Load, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    load(fill(tmp_path / "p", a=50, b=5, c=5))
    assert not logged(caplog)
    assert logged(caplog, logging.INFO)[-1].endswith(": a 40, b 4, c 4")
    load(fill(tmp_path / "q", a=55, b=4, c=9))
    (message,) = logged(caplog)
    assert "'a' has 44" in message and "'b' has 3" in message


# ---------------------------------------------------------------------------------------- memory

MEMORY = """
import sys, threading, time
from pathlib import Path
import torch
from fashionnet.data.photos import photos

def anonymous():
    line = next(line for line in open("/proc/self/status") if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024

peak = 0
def watch():
    global peak
    while True:
        peak = max(peak, anonymous())
        time.sleep(0.002)

torch.set_num_threads(1)
threading.Thread(target=watch, daemon=True).start()
for folder in sys.argv[1:]:
    dataset = photos(folder, 224, cache=Path(folder, "cache"))
    for batch in torch.randperm(len(dataset.train)).split(32):
        dataset.train.images[batch].float().mean()
    print(peak)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")
def test_memory_does_not_grow_with_the_photos(tmp_path: Path) -> None:
    photo = encoded(scene(0, (96, 72)), "JPEG")  # small: what decoding needs for it is no noise
    folders = [tmp_path / "150", tmp_path / "450"]
    for folder in folders:
        for i in range(int(folder.name)):  # what follows the end of a JPEG makes another file of it
            put(folder / "ab"[i % 2] / f"{i}.jpg", photo + f"{folder.name} {i}".encode())
    line = [sys.executable, "-c", MEMORY, *map(str, folders)]
    few, many = map(int, subprocess.check_output(line, text=True).split())
    bytes_each = (many - few) / 300  # 150,528 if the decoded photos were kept
    assert few + 20_000 * bytes_each < 2e9, (few, many)


def test_a_run_tests_on_the_photos_that_it_began_with(root: Path, load: Load) -> None:
    dataset = load(root)
    expected = prints(load(root).open_test())
    for path in list(root.rglob("*.png")):
        path.unlink()
    fill(root, first=60, ants=3, bees=3)
    load(root)  # as another run does meanwhile
    assert prints(dataset.open_test()) == expected
