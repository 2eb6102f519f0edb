"""Photos of your own as a data set: a folder for each class.

`data.root` holds a folder of photos for each class, as for Keras' `image_dataset_from_directory`,
or `train/` and `val/` or `test/` with such folders in them.

* With class folders alone, or `train/` alone, `test_split` of each class is held out for the test.
* With `train/` and one of `val/` and `test/`, that one is the test set.
* With all three, `val/` is the validation set, whatever `validation_split` says.

The training photos come in a seeded order that is stratified throughout: the last part, which
`validation_split` takes, and the first `data.limit` hold each class in proportion, to within less
than one photo. Where equal classes cannot all have the same number, the seed decides which do.

Each photo is decoded once, into a cache that is memory-mapped, so that pixels are read from the
disk as they are needed. An entry of the cache is known by what is in every file, never by file
times, and takes from older entries what these have decoded: another seed only copies.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import heapq
import io
import itertools
import json
import logging
import os
import shutil
import stat
import unicodedata
import uuid
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NoReturn, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from fashionnet.data import pictures
from fashionnet.data.examples import Dataset, Examples
from fashionnet.data.folders import default_root
from fashionnet.errors import UserError
from fashionnet.system import locks, seeds
from fashionnet.system.files import TEMPORARY, name_file, remove, walk, write_json

log = logging.getLogger(__name__)

SIZES = range(8, 1025)
# Those that Pillow knows for the formats in `pictures`, and the JPEGs of cameras with two lenses.
SUFFIXES = (
    *(".apng", ".bmp", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".mpo", ".pbm", ".pfm", ".pgm"),
    *(".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp"),
)
INDEX = "index.json"
TRANSFORM = 1  # to be counted up when `decode` gives other pixels
_ORDER = 2  # to be counted up when the same photos are split or ordered differently

# Other names that people give to the parts of their data.
_ROLES = {"train": "train", "training": "train", "test": "test", "testing": "test"}
_ROLES |= dict.fromkeys(("val", "valid", "validation"), "val")
# What systems put beside a user's files; so is whatever begins with a dot.
_SYSTEMS = {"__macosx", "__pycache__", "@eadir", "@tmp", "@recycle", "#recycle", "#snapshot"}
_SYSTEMS |= {"$recycle.bin", "recycler", "system volume information", "lost+found", "found.000"}
_SYSTEMS |= {"thumbs.db", "desktop.ini"}
_MAX_UNREADABLE = 0.05  # of the photos; one may always be
_MAX_IMBALANCE = 10
# Two photos look alike whose 64-bit difference hashes differ by no more bits, and whose 8x9 gray
# thumbnails by no more of 255 levels on average. Of 397 photos of insects this finds 95 % of copies
# at half the size or JPEG quality 50, while no two of them are nearer than 10 bits.
_ALIKE_BITS, _ALIKE_LEVELS = 2, 4.0
_AT_A_TIME = 64  # photos in memory
_MAX_THREADS = 8
_NAMED = 5  # of a long list in a message

Pixels = NDArray[np.uint8]
Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Photo:
    """A file: its path below the root, with `/`, its class, and the sha256 of what is in it."""

    path: str
    label: int
    sha256: str = ""


Parts = dict[str, list[Photo]]


@dataclass
class _Ignored:
    """What lies in a data folder and is not taken for photos or classes."""

    files: Counter[str] = field(default_factory=Counter)  # by suffix, or by name
    folders: set[Path] = field(default_factory=set)

    def report(self) -> None:
        """Logs it."""
        if self.files:
            kinds = [f"{count} {suffix!r}" for suffix, count in self.files.most_common()]
            log.info("Ignored %d files that are not photos: %s", self.files.total(), _listed(kinds))
        if self.folders:
            names = [repr(str(path)) for path in sorted(self.folders)]
            log.info("Ignored %d hidden or system folders: %s", len(names), _listed(names))


def photos(
    root: str | Path | None,
    size: int = 224,
    seed: int = 0,
    test_split: float = 0.2,
    cache: Path | None = None,
) -> Dataset:
    """Loads a folder of photos; the first time, it decodes them into the cache.

    Damaged photos are skipped with a warning, up to 5 % of all (one may always be).

    Args:
        root: The folder, `data.root` in the configuration.
        size: Pixels of a side, see `decode`.
        seed: Of the order, and of the split where `root` has no test set of its own.
        test_split: Share of each class that is then held out, at least one photo and never all.
        cache: Its folder. None: `photos` in `default_root()`.

    Returns:
        The data set. Its images are RGB, (N, 3, size, size), mapped from the cache: not to be
        written to. Class names are the sorted names of the folders. `sources` holds the sha256 of
        what `sha256sum` prints of the photos in a folder, sorted by path.

    Raises:
        UserError: There is no such folder, its classes cannot be learnt or are not the same in its
            parts, too many photos are damaged, or the cache cannot be written or is damaged.
    """
    if not root:
        raise UserError("data.root=FOLDER is needed for data=photos")
    if size not in SIZES:
        raise UserError(f"data.size={size} must be {SIZES.start} to {SIZES.stop - 1}")
    if not 0 < test_split < 1:
        raise UserError(f"data.test_split={test_split} must be above 0 and below 1")
    folder = _folder(root)
    class_names, parts = _find(folder)
    parts = _hashed(folder, parts)
    sources = {part: _manifest_sha256(members) for part, members in parts.items()}
    key = json.dumps([_ORDER, sources, seed, test_split if len(parts) == 1 else None])
    store = (cache or default_root() / "photos").absolute() / f"{size}-v{TRANSFORM}"
    entry = store / hashlib.sha256(key.encode()).hexdigest()[:32]
    if not (entry / INDEX).is_file():
        with _lock(store):
            if not (entry / INDEX).is_file():  # nobody was quicker
                _build(entry, folder, parts, class_names, size, seed, test_split)
    index = _read_index(entry)
    _tell(index, class_names)
    return Dataset(
        name="photos",
        class_names=class_names,
        image_shape=(3, size, size),
        train=_examples(entry, index, "train", size),
        num_test=len(index["test"]["photos"]),
        sources=sources,
        read_test=partial(_examples, entry, index, "test", size),
        num_validation=index.get("num_validation"),
        counts={part: len(members) for part, members in parts.items()},
        order_sha256=_order_sha256(index),
    )


def decode(content: bytes, size: int) -> Pixels:
    """Makes a photo upright RGB on white, its shorter side 256/224 `size`, and crops the middle.

    It gives the pixels of torchvision's `Resize` (bicubic, antialiased) and `CenterCrop`; but a
    large photo is reduced to no less than twice of that first, which moves it by half a pixel.

    Returns:
        (3, size, size), 0 to 255.

    Raises:
        UserError: It is no picture, damaged, or too large to be opened safely.
    """
    shorter = round(size * 256 / 224)
    with pictures.decoded(io.BytesIO(content), enough=2 * shorter) as image:
        if 0 in image.size:
            raise UserError("it has no pixels; remove it")
        factor = max(1, min(image.size) // (2 * shorter))
        rgba = pictures.reduced_rgba(image, factor, steps=[])
        orientation = pictures.exif_orientation(image)
    rgb = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    if orientation in pictures.TURNS:
        rgb = rgb.transpose(pictures.TURNS[orientation])
    # Resizes no more than what the crop keeps: a panorama's full length might not fit in memory.
    spans = []
    for side in rgb.size:
        resized = int(shorter * side / min(rgb.size))
        first = round((resized - size) / 2)
        spans.append((first * side / resized, (first + size) * side / resized))
    (left, right), (upper, lower) = spans
    box = left, upper, right, lower
    crop = rgb.resize((size, size), Image.Resampling.BICUBIC, box=box)
    return np.ascontiguousarray(np.asarray(crop).transpose(2, 0, 1))


def read(path: str | Path, size: int) -> pictures.Picture:
    """Reads one photo as `photos` would, for a prediction.

    Raises:
        UserError: The file is missing, no picture, damaged, or too large to be opened safely.
    """
    try:
        with pictures.open_file(path) as file:
            pixels = decode(file.read(), size)
    except UserError as error:
        raise UserError(f"picture {str(path)!r}: {error}") from error
    except MemoryError as error:
        raise UserError(f"picture {str(path)!r}: no memory to open it; scale it down") from error
    return pictures.Picture(str(path), torch.from_numpy(pixels), (f"cropped to {size}x{size}",))


# --------------------------------------------------------------------------- finding the photos


def _folder(root: str | Path) -> Path:
    try:
        folder = Path(root).expanduser().absolute()
    except RuntimeError as error:  # ~nobody
        raise UserError(f"data.root={root}: {error}") from error
    if not folder.is_dir():
        what = "is a file; choose a folder" if folder.is_file() else "is no folder; check the path"
        raise UserError(f"data.root={folder} {what}")
    return folder


def _find(root: Path) -> tuple[tuple[str, ...], Parts]:
    """Returns the class names, and the photos of each part of `root`, in the order of `_parts`."""
    ignored = _Ignored()
    folders = _parts(root, ignored)
    classes = {part: _class_folders(folder, ignored) for part, folder in folders.items()}
    names, *others = classes.values()
    first, *rest = folders.values()
    for folder, found in zip(rest, others, strict=True):
        for name in sorted(set(names) ^ set(found)):
            here, missing = (folder, first) if name in found else (first, folder)
            raise UserError(f"class {name!r} is in {here} but not in {missing}; both need the same")
    if len(names) < 2:
        what = f"one class only, {next(iter(names))!r}" if names else "no class folders"
        raise UserError(f"{first} has {what}; put the photos of each class into a folder there")
    parts = {
        part: [
            Photo(path, label)
            for label, name in enumerate(names)
            for folder in classes[part][name]
            for path in sorted(_picture_files(folder, root, ignored))
        ]
        for part in folders
    }
    for part, folder in folders.items():
        _refuse_parts_as_classes(folder, classes[part], parts[part])
    ignored.report()
    _check_counts(parts, tuple(names), root)
    return tuple(names), parts


def _parts(root: Path, ignored: _Ignored) -> dict[str, Path]:
    """Returns the folders that hold class folders: training first, the one to report on last."""
    names = _subfolders(root, ignored)
    roles = {name: _ROLES[name.lower()] for name in names if name.lower() in _ROLES}
    kinds = set(roles.values())
    if not roles or (len(kinds) == 1 and len(roles) < len(names)):  # a train may be a vehicle
        return {"photos": root}
    if strays := sorted(set(names) - set(roles)):
        raise UserError(f"{root / strays[0]} is beside {', '.join(roles)}; move it elsewhere")
    have = f"{root} has the folders {', '.join(roles)}"
    if len(kinds) < len(roles) or "train" not in kinds:
        raise UserError(f"{have}; let it have one train and one val or test")
    order = ("train", "val", "test")
    return {name: root / name for name in sorted(roles, key=lambda name: order.index(roles[name]))}


def _class_folders(folder: Path, ignored: _Ignored) -> dict[str, list[Path]]:
    """Returns the folders of each class, by the class names in order.

    Names that differ only in Unicode normalization, as file systems and archives may change it,
    are one class, whose name is in composed form (NFC).
    """
    classes: dict[str, list[Path]] = {}
    for name in _subfolders(folder, ignored):
        try:
            name.encode()
        except UnicodeEncodeError:
            shown = repr(os.fsencode(folder / name))[2:-1]
            raise UserError(f"the name of the folder {shown} is not UTF-8; rename it") from None
        classes.setdefault(_normalized(name), []).append(folder / name)
    return dict(sorted(classes.items()))


def _normalized(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def _refuse_parts_as_classes(
    folder: Path, classes: Iterable[str], members: Iterable[Photo]
) -> None:
    """Refuses siblings like `train` and `dev` that hold the same folders of photos."""
    names = list(classes)
    inner: dict[str, set[str]] = {}  # of each class the folders below it that hold photos
    for photo in members:
        inner.setdefault(names[photo.label], set()).add(Path(photo.path).parent.name)
    for name, other in itertools.combinations(names, 2):
        # A class may keep its photos in one folder of a common name, `images` for one.
        same = (inner.get(name, set()) & inner.get(other, set())) - {name, other}
        if len(same) > 1:
            raise UserError(
                f"{name!r} and {other!r} in {folder} both hold {_listed(sorted(same))}, so they "
                "look like parts of the data, not like classes; name the parts train, val or test "
                f"(known are {', '.join(_ROLES)}) or let data.root name one of them. If they are "
                "classes, put the photos of each into its folder without such subfolders"
            )


def _subfolders(folder: Path, ignored: _Ignored) -> list[str]:
    """Returns the sorted names of the folders in `folder`; counts those that systems make."""
    try:
        names = sorted(path.name for path in folder.iterdir() if path.is_dir())
    except OSError as error:
        _refuse(error)
    ignored.folders.update(folder / name for name in names if not _is_users(name))
    return list(filter(_is_users, names))


def _is_users(name: str) -> bool:
    """Returns whether a file or folder is the user's, not one that a system hides or makes."""
    return not name.startswith(".") and name.lower() not in _SYSTEMS


def _refuse(error: OSError) -> NoReturn:
    reason = f"{error.filename} cannot be read ({error.strerror})"
    raise UserError(f"{reason}; check that it is there and that you may read it") from error


def _picture_files(folder: Path, root: Path, ignored: _Ignored) -> Iterator[str]:
    """Yields the paths, below `root`, of all that is named like a picture; counts the rest."""
    seen = set()
    for parent, folders, names in walk(folder, follow_links=True, on_error=_refuse):
        real = os.path.realpath(parent)
        ignored.folders.update(Path(parent, name) for name in folders if not _is_users(name))
        folders[:] = [] if real in seen else sorted(filter(_is_users, folders))
        for name in names if real not in seen else []:  # links may lead in a circle
            suffix = Path(name).suffix.lower()
            if suffix in SUFFIXES and _is_users(name):
                yield Path(parent, name).relative_to(root).as_posix()
            else:
                ignored.files[suffix or name] += 1
        seen.add(real)


def _check_counts(parts: Parts, class_names: Sequence[str], root: Path) -> None:
    """Refuses classes that have no photo in a part, or too few to be split."""
    least = 2 if len(parts) == 1 else 1
    for part, members in parts.items():
        counts = Counter(photo.label for photo in members)
        for label, name in enumerate(class_names):
            if counts[label] < least:
                folder = root / name if part == "photos" else root / part / name
                raise UserError(
                    f"{folder} has {counts[label]} photos that can be read, and {least} or more "
                    f"are needed ({' '.join(SUFFIXES)}); add some, or remove the folder"
                )


def _hashed(root: Path, parts: Parts) -> Parts:
    paths = [root / photo.path for members in parts.values() for photo in members]
    hashes = iter(list(_in_parallel(_sha256, paths, "checking photos")))
    return {
        part: [replace(photo, sha256=next(hashes)) for photo in members]
        for part, members in parts.items()
    }


def _manifest_sha256(members: Iterable[Photo]) -> str:
    listed = sorted((_normalized(photo.path), photo.sha256) for photo in members)
    lines = (f"{sha256}  {path}\n" for path, sha256 in listed)
    return hashlib.sha256("".join(lines).encode(errors="surrogateescape")).hexdigest()


def _order_sha256(index: Mapping[str, Any]) -> str:
    """Returns the hash of which photo is at which row of the training and the test set."""
    rows = [[row[1:] for row in index[part]["photos"]] for part in ("train", "test")]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


# --------------------------------------------------------------------------------- their order


def _ordered(parts: Parts, seed: int, test_split: float) -> tuple[Parts, int | None]:
    """Returns the training and the test photos in the order of their rows.

    The second value is how many of the training photos, the last, a folder of its own gave for
    validation; None where there is none.
    """
    train, *others = (_by_class(members, seed) for members in parts.values())
    validation: list[Photo] = []
    if others:
        *between, test = others
        validation = [photo for part in between for photo in _interleaved(part, seed)]
    else:
        held_out = [max(1, min(round(test_split * len(one)), len(one) - 1)) for one in train]
        test = [one[:count] for one, count in zip(train, held_out, strict=True)]
        train = [one[count:] for one, count in zip(train, held_out, strict=True)]
    ordered = {
        "train": _interleaved(train, seed) + validation,
        "test": _interleaved(test, seed),
    }
    return ordered, len(validation) or None


def _by_class(members: Iterable[Photo], seed: int) -> list[list[Photo]]:
    """Returns the photos of each class in a seeded order, by hashes: the same in every version."""
    classes: dict[int, list[Photo]] = {}
    for photo in members:
        classes.setdefault(photo.label, []).append(photo)
    return [
        sorted(one, key=lambda photo: _place(photo, seed, "photos")) for one in classes.values()
    ]


def _place(photo: Photo, seed: int, what: str) -> tuple[int, str]:
    return seeds.derive(seed, what, photo.sha256), _normalized(photo.path)


def _interleaved(classes: Sequence[Sequence[Photo]], seed: int) -> list[Photo]:
    """Spreads each class evenly: in what comes before and after any place, it has its share.

    Tijdeman's rule (1980, "The chairman assignment problem"): of those that are due at a place,
    the one whose time runs out first. It keeps the number of each class before every place, hence
    also after it, within less than one of the class's share. Of equals the seed chooses.

    It goes from the end to the beginning, which places rare classes early: a single photo is
    trained on, rather than validated on.
    """
    num, slack = sum(map(len, classes)), 2 * max(len(classes) - 1, 1)
    turns = sorted(
        (
            # Places are counted from 1; the shares of a class are num / len(one) places apart.
            -(-num * (slack * rank + 1) // (slack * len(one))),  # the first that it may take
            num * (slack * (rank + 1) - 1) // (slack * len(one)),  # the last
            _place(photo, seed, "turns"),
            label,
        )
        for label, one in enumerate(classes)
        for rank, photo in enumerate(one)
    )
    left = [list(one) for one in classes]
    due: list[tuple[int, tuple[int, str], int]] = []
    order = []
    upcoming = iter(turns)
    turn = next(upcoming, None)
    for place in range(1, num + 1):
        while turn is not None and turn[0] <= place:
            heapq.heappush(due, turn[1:])
            turn = next(upcoming, None)
        order.append(left[heapq.heappop(due)[-1]].pop())
    return order[::-1]


# ----------------------------------------------------------------------------------- the cache


def _build(
    entry: Path,
    root: Path,
    parts: Parts,
    class_names: Sequence[str],
    size: int,
    seed: int,
    test_split: float,
) -> None:
    """Makes an entry of the cache: under another name, until it is whole."""
    temporary = entry.with_name(f".{uuid.uuid4().hex}.tmp")
    everything = [photo for members in parts.values() for photo in members]
    try:
        temporary.mkdir()
        rows, reasons = _decode_new(everything, root, size, entry.parent, temporary / "new")
        unreadable = {p.path: reasons[p.sha256] for p in everything if p.sha256 in reasons}
        if len(unreadable) > max(1, _MAX_UNREADABLE * len(everything)):
            raise UserError(
                f"{len(unreadable)} of {len(everything)} photos in {root} cannot be read, and "
                f"{_MAX_UNREADABLE:.0%} may; mend or remove {_some(unreadable.items())}"
            )
        parts = {
            part: [photo for photo in members if photo.path not in unreadable]
            for part, members in parts.items()
        }
        _check_counts(parts, class_names, root)
        ordered, num_validation = _ordered(parts, seed, test_split)
        index: dict[str, Any] = {"unreadable": unreadable, "num_validation": num_validation}
        for part, members in ordered.items():
            sha256 = _write(temporary / part, (rows[photo.sha256] for photo in members))
            index[part] = {"sha256": sha256, "photos": [astuple(photo) for photo in members]}
        (temporary / "new").unlink()
        index["alike"] = _alike(temporary, ordered, size)
        write_json(temporary / INDEX, {"sha256": _index_sha256(index), "index": index})
        if not (entry / INDEX).is_file():  # without locks, another may have been quicker
            shutil.rmtree(entry, ignore_errors=True)
            temporary.rename(entry)
    except OSError as error:
        name_file(error, entry)
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _decode_new(
    members: Iterable[Photo], root: Path, size: int, store: Path, path: Path
) -> tuple[dict[str, Pixels], dict[str, str]]:
    """Decodes to the file `path` what no entry in `store` has.

    Returns:
        Of each sha256 the pixels, or why there are none.
    """
    wanted = {photo.sha256: photo for photo in members}
    rows = _known(wanted, store, size)
    new = [photo for sha256, photo in wanted.items() if sha256 not in rows]
    results = _in_parallel(partial(_attempt, root, size), new, "decoding photos")
    reasons, written = {}, []
    with open(path, "wb") as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of oddities in files that can be read all the same
        for photo, result in zip(new, results, strict=True):
            if isinstance(result, str):
                reasons[photo.sha256] = result
            else:
                file.write(result.data)
                written.append(photo.sha256)
    if written:
        rows |= zip(written, _mapped(path, size), strict=True)
    return rows, reasons


def _known(wanted: Mapping[str, Photo], store: Path, size: int) -> dict[str, Pixels]:
    """Returns the pixels, by the sha256 of the photo, that entries in `store` have already."""
    rows: dict[str, Pixels] = {}
    for path in sorted(store.glob(f"[!.]*/{INDEX}")):
        with contextlib.suppress(UserError):  # a damaged one is told of where it is used
            index = _read_index(path.parent)
            for part in ("train", "test"):
                names = [sha256 for *_, sha256 in index[part]["photos"]]
                if any(name in wanted and name not in rows for name in names):
                    rows |= zip(names, _checked(path.parent, index, part, size), strict=True)
    return rows


def _attempt(root: Path, size: int, photo: Photo) -> Pixels | str:
    """Returns the pixels of a photo, or why there are none."""
    with _opened(root / photo.path) as file:
        content = file.read(pictures.MAX_BYTES + 1)
    if len(content) > pictures.MAX_BYTES:
        return f"larger than {pictures.MAX_BYTES >> 20} MiB; scale it down or save it as JPEG"
    if hashlib.sha256(content).hexdigest() != photo.sha256:
        raise UserError(f"photo {root / photo.path} was changed meanwhile; start again")
    try:
        return decode(content, size)
    except UserError as error:
        return str(error)
    except MemoryError as error:
        raise UserError(f"no memory to open {root / photo.path}; scale it down") from error


def _alike(folder: Path, parts: Parts, size: int) -> list[tuple[str, str]]:
    """Returns test photos and the training photo that each looks like, see `_ALIKE_BITS`."""
    train, test = (_thumbnails(_mapped(folder / part, size)) for part in ("train", "test"))
    found = []
    for start in range(0, len(test), _AT_A_TIME):
        some = test[start : start + _AT_A_TIME]
        # (test photos at a time, training photos)
        num_bits = (64 - _hash_bits(some) @ _hash_bits(train).T) / 2
        levels = torch.cdist(some.flatten(1), train.flatten(1), p=1) / 72
        levels[num_bits > _ALIKE_BITS] = torch.inf
        nearest, places = levels.min(dim=1)
        for row in torch.nonzero(nearest <= _ALIKE_LEVELS).flatten().tolist():
            copy, original = parts["test"][start + row], parts["train"][int(places[row])]
            found.append((copy.path, original.path))
    return found


def _thumbnails(images: Pixels) -> Tensor:
    """Returns (N, 8, 9) gray, 0 to 255."""
    averaged = [
        [np.asarray(Image.fromarray(one).resize((9, 8), Image.Resampling.BOX)) for one in rgb]
        for rgb in images
    ]
    return torch.from_numpy(np.array(averaged)).float().mean(dim=1)


def _hash_bits(thumbnails: Tensor) -> Tensor:
    """Returns (N, 64), the difference hash: 1 where it gets brighter to the right, else -1."""
    return torch.where(thumbnails.diff(dim=2) > 0, 1.0, -1.0).flatten(1)


def _examples(entry: Path, index: Mapping[str, Any], part: str, size: int) -> Examples:
    labels = torch.tensor([label for _, label, _ in index[part]["photos"]])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return Examples(torch.from_numpy(_checked(entry, index, part, size)), labels)


def _read_index(entry: Path) -> dict[str, Any]:
    try:
        values = json.loads((entry / INDEX).read_bytes())
        index = dict(values["index"])
        if values["sha256"] == _index_sha256(index):
            return index
        reason = "its checksum is wrong"
    except OSError as error:
        _refuse(error)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        reason = str(error)
    raise UserError(f"the cache {entry} is damaged ({reason}); remove it to make it anew")


def _index_sha256(index: Mapping[str, Any]) -> str:
    """Returns the checksum that an index carries: a label in it decides what a photo teaches."""
    return hashlib.sha256(json.dumps(index, sort_keys=True).encode()).hexdigest()


def _checked(entry: Path, index: Mapping[str, Any], part: str, size: int) -> Pixels:
    path = entry / part
    if not path.is_file() or _sha256(path) != index[part]["sha256"]:
        raise UserError(f"the cache {entry} is damaged ({part}); remove it to make it anew")
    return _mapped(path, size)


def _mapped(path: Path, size: int) -> Pixels:
    """Returns (N, 3, size, size), not read before it is used."""
    return np.asarray(np.memmap(path, np.uint8, "r")).reshape(-1, 3, size, size)


def _write(path: Path, rows: Iterable[Pixels]) -> str:
    """Writes the pixels of one photo after the other; returns the sha256 of the file."""
    digest = hashlib.sha256()
    with open(path, "wb") as file:
        for row in rows:
            file.write(row.data)
            digest.update(row.data)
    return digest.hexdigest()


@contextlib.contextmanager
def _lock(store: Path) -> Iterator[None]:
    """Keeps other processes from decoding the same photos at the same time."""
    try:
        store.mkdir(parents=True, exist_ok=True)
        if not os.access(store, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise UserError(
            f"the cache of photos {store} cannot be written ({error.strerror}); "
            "let FASHIONNET_DATA name a folder that you may use"
        ) from error
    waiting = f"Another process is decoding photos into {store}; waiting for it"
    with locks.in_turn(store, waiting) as is_alone:
        if is_alone:
            for left in store.glob(TEMPORARY):  # of killed processes: none is at work now
                with contextlib.suppress(OSError):
                    remove(left)
        yield


# ------------------------------------------------------------------------- reading and telling


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """Opens a regular file; what the system refuses is the user's to mend."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # before open, which waits for a pipe's writer
            raise UserError(f"{path} is not a regular file; remove it")
        with open(path, "rb") as file:
            yield file
    except OSError as error:
        name_file(error, path)
        _refuse(error)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with _opened(path) as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _in_parallel(
    function: Callable[[Item], Result], items: Sequence[Item], title: str
) -> Iterator[Result]:
    """Yields the results in order, a few at a time; threads do, since Pillow runs without the GIL.

    A terminal sees a progress bar.
    """
    from tqdm import tqdm

    threads = ThreadPoolExecutor(min(os.cpu_count() or 1, _MAX_THREADS))
    try:
        with tqdm(total=len(items), desc=title, unit="photo", leave=False, disable=None) as bar:
            for start in range(0, len(items), _AT_A_TIME):
                for result in threads.map(function, items[start : start + _AT_A_TIME]):
                    yield result
                    bar.update()
    finally:
        threads.shutdown(cancel_futures=True)


def _tell(index: Mapping[str, Any], class_names: Sequence[str]) -> None:
    """Logs what there is to know of the photos, each time that they are loaded."""
    if unreadable := index["unreadable"]:
        log.warning("%d photos cannot be read: %s", len(unreadable), _some(unreadable.items()))
    if alike := index["alike"]:
        log.warning(
            "%d test photos look like training photos, so the test may flatter; "
            "remove one of each pair: %s",
            *(len(alike), _some(alike)),
        )
    counts = Counter(label for _, label, _ in index["train"]["photos"])
    listed = ", ".join(f"{name} {counts[label]}" for label, name in enumerate(class_names))
    log.info("Training photos, before validation_split: %s", listed)
    most, least = max(counts, key=counts.__getitem__), min(counts, key=counts.__getitem__)
    if counts[most] > _MAX_IMBALANCE * counts[least]:
        log.warning(
            "Class %r has %d training photos and %r has %d; accuracy will say little of the latter",
            *(class_names[most], counts[most], class_names[least], counts[least]),
        )


def _some(pairs: Iterable[tuple[str, str]]) -> str:
    """Returns the first few pairs in words, and how many more there are."""
    return _listed([f"{first!r} ({second})" for first, second in pairs])


def _listed(names: Sequence[str]) -> str:
    """Returns the first few names, and how many more there are."""
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more
