"""Finding photos: which folders are parts and classes, and which files are photos."""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import stat
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import NoReturn

from fashionnet.errors import UserError
from fashionnet.system.files import name_file, walk

log = logging.getLogger(__name__)

# Those that Pillow knows for `picture_files._FORMATS`, and the JPEGs of cameras with two lenses.
SUFFIXES = (
    *(".apng", ".bmp", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".mpo", ".pbm", ".pfm", ".pgm"),
    *(".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp"),
)
# Names that people give to the parts of their data.
_ROLES = {"train": "train", "training": "train", "test": "test", "testing": "test"}
_ROLES |= dict.fromkeys(("val", "valid", "validation"), "val")
# What systems put beside a user's files, apart from names that begin with a dot.
_SYSTEMS = {"__macosx", "__pycache__", "@eadir", "@tmp", "@recycle", "#recycle", "#snapshot"}
_SYSTEMS |= {"$recycle.bin", "recycler", "system volume information", "lost+found", "found.000"}
_SYSTEMS |= {"thumbs.db", "desktop.ini"}
_NAMED = 5  # of a long list in a message


@dataclass(frozen=True)
class Photo:
    """A file: its path below the data folder, with `/`, its label and the sha256 of its content."""

    path: str
    label: int
    sha256: str = ""


Parts = dict[str, list[Photo]]  # by the names of their folders: training, validation, test


def find(root: Path) -> tuple[tuple[str, ...], Parts]:
    """Returns the class names and the photos of each part, the training part first.

    Raises:
        UserError: there are fewer than two classes, the parts have different ones, or a folder
            cannot be read.
    """
    ignored: set[Path] = set()
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
            for path in sorted(_photo_files(folder, root, ignored))
        ]
        for part in folders
    }
    for part, folder in folders.items():
        _refuse_parts_as_classes(folder, list(names), parts[part])
    _report(ignored)
    check_counts(parts, tuple(names), root)
    return tuple(names), parts


def _parts(root: Path, ignored: set[Path]) -> dict[str, Path]:
    """Returns the folders that hold class folders, in the order train, val, test."""
    names = _subfolders(root, ignored)
    roles = {name: _ROLES[name.lower()] for name in names if name.lower() in _ROLES}
    kinds = set(roles.values())
    if not roles or (len(kinds) == 1 and len(roles) < len(names)):  # a class may be called train
        return {"photos": root}
    if strays := sorted(set(names) - set(roles)):
        raise UserError(f"{root / strays[0]} is beside {', '.join(roles)}; move it elsewhere")
    if len(kinds) < len(roles) or "train" not in kinds:
        have = f"{root} has the folders {', '.join(roles)}"
        raise UserError(f"{have}; keep one train folder and one val or test folder")
    order = ("train", "val", "test")
    return {name: root / name for name in sorted(roles, key=lambda name: order.index(roles[name]))}


def _class_folders(folder: Path, ignored: set[Path]) -> dict[str, list[Path]]:
    """Returns the folders of each class, sorted by class name.

    Names that differ only in Unicode normalization, which file systems and archives may change,
    are one class; its name is in composed form (NFC).
    """
    classes: dict[str, list[Path]] = {}
    for name in _subfolders(folder, ignored):
        try:
            name.encode()
        except UnicodeEncodeError:
            shown = repr(os.fsencode(folder / name))[2:-1]
            raise UserError(f"the name of the folder {shown} is not UTF-8; rename it") from None
        classes.setdefault(unicodedata.normalize("NFC", name), []).append(folder / name)
    return dict(sorted(classes.items()))


def _refuse_parts_as_classes(folder: Path, names: Sequence[str], photos: Iterable[Photo]) -> None:
    """Refuses siblings like `train` and `dev` that hold the same folders of photos."""
    inner: dict[str, set[str]] = {name: set() for name in names}
    for photo in photos:
        inner[names[photo.label]].add(Path(photo.path).parent.name)
    for name, other in itertools.combinations(names, 2):
        # A class may keep its photos in one folder of a common name, e.g. `images`.
        same = (inner[name] & inner[other]) - {name, other}
        if len(same) > 1:
            raise UserError(
                f"{name!r} and {other!r} in {folder} both hold {listed(sorted(same))}, so they "
                "look like parts of the data, not like classes; name the parts train, val or test "
                f"(known are {', '.join(_ROLES)}) or let data.root name one of them. If they are "
                "classes, put the photos of each into its folder without such subfolders"
            )


def _subfolders(folder: Path, ignored: set[Path]) -> list[str]:
    """Returns the sorted names of the user's folders in `folder`."""
    try:
        names = sorted(path.name for path in folder.iterdir() if path.is_dir())
    except OSError as error:
        refuse(error)
    ignored.update(folder / name for name in names if not _is_users(name))
    return list(filter(_is_users, names))


def _is_users(name: str) -> bool:
    """Returns whether a file or folder is the user's, not one that a system hides or makes."""
    return not name.startswith(".") and name.lower() not in _SYSTEMS


def _photo_files(folder: Path, root: Path, ignored: set[Path]) -> Iterator[str]:
    """Yields the paths, below `root`, of the files that have the suffix of a picture."""
    visited = set()
    for parent, folders, names in walk(folder, follow_links=True, on_error=refuse):
        ignored.update(parent / name for name in folders if not _is_users(name))
        real = os.path.realpath(parent)
        if real in visited:  # links may form a circle
            folders.clear()
            continue
        visited.add(real)
        folders[:] = filter(_is_users, folders)
        for path in (parent / name for name in names):
            if path.suffix.lower() in SUFFIXES and _is_users(path.name):
                yield path.relative_to(root).as_posix()
            else:
                ignored.add(path)


@contextlib.contextmanager
def opened(path: Path) -> Iterator[BufferedReader]:
    """Opens a regular file.

    Raises:
        UserError: it is missing, cannot be read, or is not a regular file.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # before open, which waits for a pipe's writer
            raise UserError(f"{path} is not a regular file; remove it")
        with open(path, "rb") as file:
            yield file
    except OSError as error:
        name_file(error, path)
        refuse(error)


def refuse(error: OSError) -> NoReturn:
    """Turns the system's refusal of a file or folder into the user's error."""
    raise UserError(
        f"{error.filename} cannot be read ({error.strerror}); "
        "check that it is there and that you may read it"
    ) from error


def _report(ignored: set[Path]) -> None:
    folders = {path for path in ignored if path.is_dir()}
    if files := ignored - folders:
        kinds = Counter(path.suffix.lower() or path.name for path in files)
        counted = listed([f"{num} {kind!r}" for kind, num in kinds.most_common()])
        log.info("Ignored %d files that are not photos: %s", len(files), counted)
    if folders:
        names = listed([repr(str(path)) for path in sorted(folders)])
        log.info("Ignored %d hidden or system folders: %s", len(folders), names)


def check_counts(parts: Parts, class_names: Sequence[str], root: Path) -> None:
    """Refuses classes that have no photo in a part, or too few to be split.

    Raises:
        UserError: there is such a class.
    """
    least = 2 if len(parts) == 1 else 1
    for part, photos in parts.items():
        counts = Counter(photo.label for photo in photos)
        for label, name in enumerate(class_names):
            if counts[label] < least:
                folder = root / name if part == "photos" else root / part / name
                raise UserError(
                    f"{folder} has {counts[label]} photos that can be read, and {least} or more "
                    f"are needed ({' '.join(SUFFIXES)}); add some, or remove the folder"
                )


def listed(names: Sequence[str]) -> str:
    """Returns the first few names and how many more there are."""
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more
