"""The four files of Fashion-MNIST: finding, checking and fetching them.

A file is known by the sha256 of its *unpacked* content: torchvision's mirror and Debian's package
put the same bytes under different gzip headers. The unpacked file is also the cache of the parsed
tensor: a header of 8 or 16 bytes, then the values as they are used. It is hashed on every read.
"""

from __future__ import annotations

import errno
import gzip
import hashlib
import io
import logging
import math
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr, suppress
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fashionnet.errors import UserError
from fashionnet.system import locks
from fashionnet.system.files import atomic_write, missing_folders, remove, remove_temporary

log = logging.getLogger(__name__)

Content = NDArray[np.uint8]  # the bytes of one unpacked file


@dataclass(frozen=True)
class Source:
    """One of the published files.

    Attributes:
        name: its name when unpacked; packed, `.gz` is appended.
        sha256: of the unpacked file.
        shape: of the tensor in it, one byte a value.
    """

    name: str
    sha256: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Bytes of the unpacked file: magic number, one 32-bit size a dimension, the values."""
        return 4 + 4 * len(self.shape) + math.prod(self.shape)

    def values(self, content: Content) -> Content:
        """Returns the tensor in the file's content, as a view; the checksum covers the header."""
        return content[4 + 4 * len(self.shape) :].reshape(self.shape)


TRAIN = (
    Source(
        "train-images-idx3-ubyte",
        "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
        (60_000, 28, 28),
    ),
    Source(
        "train-labels-idx1-ubyte",
        "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
        (60_000,),
    ),
)
TEST = (
    Source(
        "t10k-images-idx3-ubyte",
        "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
        (10_000, 28, 28),
    ),
    Source(
        "t10k-labels-idx1-ubyte",
        "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
        (10_000,),
    ),
)
FILES = TRAIN + TEST

RAW = Path("FashionMNIST", "raw")  # torchvision's place below a data folder
DEBIAN_PACKAGE = "dataset-fashion-mnist"
DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")

_SILENCE_SECONDS = 20  # a network that is silent for longer counts as absent
_COMMAND_SECONDS = 900  # for 40 MB on a slow line
_SCRATCH = ".fetch-"  # how the names of scratch folders begin
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


class SourceError(Exception):
    """A file that is not what it should be, or a way to fetch the files that does not work."""


def load(root: Path, wanted: Sequence[Source]) -> list[Content]:
    """Reads files from the data folder and fetches what is missing or damaged there.

    The other files are not opened, but one that is absent is fetched as well, so that a missing
    test set is not discovered at the end of a training.

    Args:
        root: the data folder; made if it does not exist.
        wanted: the files to read.

    Returns:
        The content of each, its checksum verified.

    Raises:
        UserError: a file is missing or damaged, and no way to fetch it works.
    """
    with suppress(SourceError):  # e.g. a damaged file, which `_recover` names and replaces
        if all(_is_unpacked(root, source) for source in FILES):
            return [read_checked(_places(root, source)[0], source) for source in wanted]
    with _lock(root):
        absent = [source for source in FILES if not _is_unpacked(root, source)]
        recovered = _recover(root, [source for source in FILES if source in (*wanted, *absent)])
    return [recovered[source] for source in wanted]


def read_in_place(root: Path, wanted: Sequence[Source]) -> list[Content] | None:
    """Reads files from a folder that is not to be written to.

    Returns:
        The content of each. None if one of the four files is missing or one of `wanted` is
        damaged: the user may not repair this folder.
    """
    contents: dict[Source, Content] = {}
    with suppress(OSError):
        if all(_places(root, source) for source in FILES):
            _read_any(root, wanted, contents)
    return [contents[source] for source in wanted] if len(contents) == len(wanted) else None


def read_checked(path: Path, source: Source) -> Content:
    """Reads one file, packed or not, into one writable buffer.

    Raises:
        SourceError: it is not the published file; the message names it.
    """
    expected = f"expected {source.size} bytes with sha256 {source.sha256}"
    try:
        size = path.stat().st_size
        if path.suffix == ".gz":
            content, what = _unpack(path, source.size), "unpacked: "
        elif size != source.size:
            raise SourceError(f"{path} is damaged: {size} bytes, {expected}")
        else:
            content, what = np.fromfile(path, np.uint8), ""
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise SourceError(f"{path} is damaged: {error}; {expected}") from error
    except OSError as error:
        raise SourceError(f"{path} cannot be read: {error.strerror}; {expected}") from error
    sha256 = hashlib.sha256(content.data).hexdigest()
    if sha256 != source.sha256:
        raise SourceError(f"{path} is damaged: {what}sha256 {sha256}, {expected}")
    return content


def _unpack(path: Path, size: int) -> Content:
    """Gunzips into `size` bytes and never more, however much the file would unpack to."""
    content = np.empty(size, np.uint8)
    with gzip.open(path) as stream:
        filled = stream.readinto(content.data)
        if filled < size or stream.read(1):  # reading past the end also checks gzip's own sum
            raise EOFError(f"unpacks to {'fewer' if filled < size else 'more'} than {size} bytes")
    return content


# ------------------------------------------------------------------------- the data folder


def _places(root: Path, source: Source) -> list[Path]:
    """Returns where a file lies, unpacked ones first."""
    names = (source.name, f"{source.name}.gz")
    paths = [folder / name for name in names for folder in (root, root / RAW)]
    return [path for path in paths if path.is_file()]


def _is_unpacked(root: Path, source: Source) -> bool:
    return any(path.suffix != ".gz" for path in _places(root, source))


def _read_any(
    root: Path, wanted: Sequence[Source], contents: dict[Source, Content]
) -> dict[Path, str]:
    """Adds to `contents` what an intact copy in `root` holds; returns what damage it met."""
    damaged = {}
    for source in wanted:
        for path in _places(root, source):
            try:
                contents[source] = read_checked(path, source)
                break
            except SourceError as error:
                damaged[path] = str(error)
    return damaged


def _recover(root: Path, wanted: Sequence[Source]) -> dict[Source, Content]:
    """Names damaged files, fetches what no intact copy in the data folder holds, and unpacks."""
    contents: dict[Source, Content] = {}
    damaged = _read_any(root, wanted, contents)
    for message in damaged.values():
        log.warning("%s", message)
    if missing := [source for source in wanted if source not in contents]:
        contents |= _fetch(root, missing, list(damaged.values()))
    # Only now: if fetching had failed, the next attempt could not name the damaged files.
    for path in damaged:
        with suppress(OSError):  # a read-only folder
            path.replace(aside := path.with_name(f"{path.name}.damaged"))
            log.warning("Set the damaged file aside as %s", aside)
    for source in wanted:
        if not _is_unpacked(root, source):
            _keep(root / RAW / source.name, contents[source])
    return contents


def _keep(path: Path, content: Content) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as file:
            file.write(content.data)
    except OSError as error:
        log.warning("Cannot keep %s, so the next run unpacks it again: %s", path, error.strerror)


@contextmanager
def _lock(root: Path) -> Iterator[None]:
    """Keeps other processes from preparing the same folder, and removes what killed ones left."""
    missing_folders(root)  # refuses too many
    with suppress(OSError):  # a folder that cannot be written to needs no guard
        root.mkdir(parents=True, exist_ok=True)
    waiting = f"Another process is preparing the data in {root}; waiting for it"
    with locks.in_turn(root, waiting) as is_alone:
        for folder in root.glob(f"{_SCRATCH}*") if is_alone else ():
            with suppress(OSError):
                remove(folder)
        for source in FILES if is_alone else ():
            remove_temporary(root / RAW, f".{source.name}.*.tmp")
        yield


# -------------------------------------------------------------------------------- fetching


def _fetch(root: Path, missing: Sequence[Source], damaged: Sequence[str]) -> dict[Source, Content]:
    """Tries the ways to get the files, in order, until one gives all that are missing."""
    tried = []
    for way in (_from_installed_package, _from_torchvision, _from_apt):
        try:
            return way(root, missing)
        except SourceError as error:
            log.debug("%s", error)
            tried.append(str(error))
    names = ", ".join(f"{source.name}.gz" for source in missing)
    reasons = "".join(f" ({reason})" for reason in damaged)
    raise UserError(
        f"no {names} in {root}{reasons}, and fetching failed: {'; '.join(tried)}. "
        f"Put these files, packed or not, into {root / RAW}, "
        "or point data.root at a folder that has them"
    )


def _read_all(folder: Path, missing: Sequence[Source]) -> dict[Source, Content]:
    contents = {}
    for source in missing:
        if not (places := _places(folder, source)):
            raise SourceError(f"{folder} has no {source.name}.gz")
        contents[source] = read_checked(places[0], source)
    return contents


def _from_installed_package(root: Path, missing: Sequence[Source]) -> dict[Source, Content]:
    if not DEBIAN_FOLDER.is_dir():
        raise SourceError(f"Debian's package {DEBIAN_PACKAGE} is not installed")
    return _read_all(DEBIAN_FOLDER, missing)


def _from_torchvision(root: Path, missing: Sequence[Source]) -> dict[Source, Content]:
    from fashionnet.system.torchvision_import import import_torchvision

    log.info("Fetching Fashion-MNIST (30 MB) with torchvision")
    # Its progress bars are for people.
    quiet = nullcontext() if sys.stderr.isatty() else redirect_stderr(io.StringIO())
    before = socket.getdefaulttimeout()
    with _scratch(root) as scratch:
        try:
            socket.setdefaulttimeout(_SILENCE_SECONDS)  # torchvision itself would wait forever
            with quiet:
                import_torchvision().datasets.FashionMNIST(scratch, download=True)
        except (ImportError, RuntimeError, OSError, EOFError, zlib.error, HTTPException) as error:
            if isinstance(error, OSError) and error.errno in _DISK_FULL:
                raise  # no other way fares better
            raise SourceError(f"torchvision: {' '.join(str(error).split())}") from error
        finally:
            socket.setdefaulttimeout(before)
        return _read_all(scratch, missing)


def _from_apt(root: Path, missing: Sequence[Source]) -> dict[Source, Content]:
    """Fetches Debian's package into a scratch folder, with no rights beyond the user's."""
    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        raise SourceError("apt-get and dpkg-deb are not on this machine")
    log.info("Fetching Fashion-MNIST (31 MB) with apt-get: Debian's package %s", DEBIAN_PACKAGE)
    with _scratch(root) as scratch:
        # Its sandbox user could not enter a private folder.
        options = ["-oAPT::Sandbox::User=root", f"-oAcquire::http::Timeout={_SILENCE_SECONDS}"]
        download = ["apt-get", "download", DEBIAN_PACKAGE, *options]
        try:
            _call(download, scratch)
        except SourceError:  # a machine without package lists, or with old ones
            private = [f"-oDir::State::lists={scratch}/lists", f"-oDir::Cache={scratch}/cache"]
            for folder in ("lists/partial", "cache/archives/partial"):
                (scratch / folder).mkdir(parents=True)
            with suppress(SourceError):  # one dead repository of several does not matter
                _call(["apt-get", "update", *options, *private], scratch)
            _call([*download, *private], scratch)
        package = next(scratch.glob("*.deb"))
        _call(["dpkg-deb", "-x", str(package), str(scratch / "package")], scratch)
        return _read_all(scratch / "package" / DEBIAN_FOLDER.relative_to("/"), missing)


def _call(command: list[str], folder: Path) -> None:
    try:
        subprocess.run(
            command,
            cwd=folder,
            env=os.environ | {"LC_ALL": "C", "DEBIAN_FRONTEND": "noninteractive"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_COMMAND_SECONDS,
            check=True,
        )
    except subprocess.CalledProcessError as error:
        lines = error.stderr.strip().splitlines() or [f"exit status {error.returncode}"]
        reason = next((line for line in lines if line.startswith("E:")), lines[-1])
        raise SourceError(f"{' '.join(command[:2])}: {reason}") from error
    except (OSError, subprocess.TimeoutExpired) as error:
        raise SourceError(f"{' '.join(command[:2])}: {error}") from error


@contextmanager
def _scratch(root: Path) -> Iterator[Path]:
    """Makes a folder inside the data folder, where there is space; it is removed afterwards."""
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=_SCRATCH, dir=root, ignore_cleanup_errors=True) as name:
        yield Path(name)
