"""The four files of Fashion-MNIST: finding, checking and fetching them.

A file is known by the sha256 of what it holds *unpacked*, whoever packed it: torchvision's mirror
and Debian's package put the same bytes under different gzip headers. The unpacked file is at the
same time the cache of the parsed tensor: a header of 8 or 16 bytes, then the values as they are
used. It is hashed whenever it is read, so there is no index beside it that could disagree with it.

A `.gz` in the data folder is checked once; the unpacked file then carries its time, as gunzip
leaves it, and a `.gz` of another time is one that has changed and is checked again.
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
        name: Its name when unpacked; packed, `.gz` is appended.
        sha256: Of the unpacked file.
        shape: Of the tensor in it, one byte a value.
    """

    name: str
    sha256: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Bytes of the unpacked file: magic number, one 32-bit size a dimension, the values."""
        return 4 + 4 * len(self.shape) + math.prod(self.shape)


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

_SILENCE_SECONDS = 20  # after which a network that says nothing counts as absent
_COMMAND_SECONDS = 900  # for 40 MB on a slow line
_SCRATCH = ".fetch-"  # how the names of scratch folders begin
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


class SourceError(Exception):
    """A file that is not what it should be, or a way to fetch the files that does not work."""


def load(root: Path, wanted: Sequence[Source]) -> list[Content]:
    """Reads files from the data folder and fetches what is missing or damaged there.

    The other files are not opened; only where one is absent it is fetched as well, so that a
    missing test set is not found out about at the end of a training.

    Args:
        root: The data folder; made if it does not exist.
        wanted: The files to read.

    Returns:
        The content of each, its checksum verified.

    Raises:
        UserError: A file is missing or damaged, and no way to fetch it works.
    """
    contents = [_read_intact(root, source) for source in wanted]
    intact = [content for content in contents if content is not None]
    absent = [source for source in FILES if _first_file(_unpacked(root, source)) is None]
    if len(intact) == len(wanted) and not absent:
        return intact
    del contents, intact  # not to be held a second time
    with _lock(root):
        recovered = _recover(root, [source for source in FILES if source in (*wanted, *absent)])
    return [recovered[source] for source in wanted]


def read_in_place(root: Path, wanted: Sequence[Source]) -> list[Content] | None:
    """Reads files from a folder that is not to be written to.

    Returns:
        The content of each. None where one of the four files is missing or one of `wanted` is
        damaged: it is not the user's to mend.
    """
    try:
        places = {
            s: [p for p in _unpacked(root, s) + _packed(root, s) if p.is_file()] for s in FILES
        }
    except OSError:
        return None
    contents = []
    for source in wanted if all(places.values()) else ():
        for path in places[source]:
            with suppress(SourceError):
                contents.append(read_checked(path, source))
                break
    return contents if len(contents) == len(wanted) else None


def read_checked(path: Path, source: Source) -> Content:
    """Reads one file, packed or not, into one writable buffer.

    Raises:
        SourceError: It is not the published file; the message names it.
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
    """Gunzips into `size` bytes and never more, whatever the file would unpack to."""
    content = np.empty(size, np.uint8)
    filled = 0
    with gzip.open(path) as stream:
        while chunk := stream.read(min(1 << 20, size - filled)):
            content[filled : filled + len(chunk)] = np.frombuffer(chunk, np.uint8)
            filled += len(chunk)
        if filled < size or stream.read(1):  # reading past the end also checks gzip's own sum
            raise EOFError(f"unpacks to {'fewer' if filled < size else 'more'} than {size} bytes")
    return content


# ------------------------------------------------------------------------- the data folder


def _unpacked(root: Path, source: Source) -> list[Path]:
    return [root / source.name, root / RAW / source.name]


def _packed(root: Path, source: Source) -> list[Path]:
    return [root / f"{source.name}.gz", root / RAW / f"{source.name}.gz"]


def _first_file(paths: Sequence[Path]) -> Path | None:
    return next((path for path in paths if path.is_file()), None)


def _read_intact(root: Path, source: Source) -> Content | None:
    """Reads the unpacked file, or returns None where something asks for a closer look."""
    unpacked = _first_file(_unpacked(root, source))
    packed = _first_file(_packed(root, source))
    if unpacked is None:
        return None
    try:
        if packed is not None and packed.stat().st_mtime_ns != unpacked.stat().st_mtime_ns:
            return None
        return read_checked(unpacked, source)
    except (OSError, SourceError):
        return None  # to be named by the closer look


def _recover(root: Path, wanted: Sequence[Source]) -> dict[Source, Content]:
    """Looks at every copy in the data folder, names damaged ones and fetches what is missing."""
    contents: dict[Source, Content] = {}
    damaged: dict[Path, str] = {}
    for source in wanted:
        for path in _unpacked(root, source) + _packed(root, source):
            if path.is_file():
                try:
                    contents.setdefault(source, read_checked(path, source))
                except SourceError as error:
                    log.warning("%s", error)
                    damaged[path] = str(error)
    missing = [source for source in wanted if source not in contents]
    if missing:
        contents |= _fetch(root, missing, list(damaged.values()))
    # Only now: had fetching failed, the next attempt could not name the damaged files any more.
    for path in damaged:
        with suppress(OSError):  # a read-only folder
            path.replace(aside := path.with_name(f"{path.name}.damaged"))
            log.warning("Set the damaged file aside as %s", aside)
    for source in wanted:
        if _first_file(_unpacked(root, source)) is None:
            _keep(root / RAW / source.name, contents[source])
        _remember_packed(root, source)
    return contents


def _keep(path: Path, content: Content) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as file:
            file.write(content.data)
    except OSError as error:
        log.warning("Cannot keep %s, so the next run unpacks it again: %s", path, error.strerror)


def _remember_packed(root: Path, source: Source) -> None:
    """Gives the unpacked file the time of the `.gz` that has just been checked."""
    unpacked = _first_file(_unpacked(root, source))
    packed = _first_file(_packed(root, source))
    if unpacked is not None and packed is not None:
        with suppress(OSError):  # somebody else's file: it is checked again next time
            os.utime(unpacked, ns=(unpacked.stat().st_atime_ns, packed.stat().st_mtime_ns))


@contextmanager
def _lock(root: Path) -> Iterator[None]:
    """Keeps other processes from preparing the same folder at the same time."""
    missing_folders(root)  # refuses too many
    with suppress(OSError):  # a folder that cannot be written to needs no guard
        root.mkdir(parents=True, exist_ok=True)
    waiting = f"Another process is preparing the data in {root}; waiting for it"
    with locks.in_turn(root, waiting) as is_alone:
        if is_alone:
            _sweep(root)
        yield


def _sweep(root: Path) -> None:
    """Removes what killed processes left behind; the caller has the lock, so none is at work."""
    for folder in root.glob(f"{_SCRATCH}*"):
        with suppress(OSError):
            remove(folder)
    for source in FILES:
        remove_temporary(root / RAW, f".{source.name}.*.tmp")


# -------------------------------------------------------------------------------- fetching


def _fetch(root: Path, missing: Sequence[Source], damaged: Sequence[str]) -> dict[Source, Content]:
    """Tries the ways to get the files, in order, until one gives all that are missing."""
    tried = []
    for way in (_from_installed_package, _from_torchvision, _from_apt):
        try:
            return way(root, missing)
        except SourceError as error:
            log.debug("%s", error)  # of interest where no way is left, and then the error has it
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
        path = _first_file([folder / source.name, folder / f"{source.name}.gz"])
        if path is None:
            raise SourceError(f"{folder} has no {source.name}.gz")
        contents[source] = read_checked(path, source)
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
    with _scratch(root) as scratch:
        try:
            with _socket_timeout(_SILENCE_SECONDS), quiet:
                import_torchvision().datasets.FashionMNIST(scratch, download=True)
        except (ImportError, RuntimeError, OSError, EOFError, zlib.error, HTTPException) as error:
            if isinstance(error, OSError) and error.errno in _DISK_FULL:
                raise  # no other way fares better
            raise SourceError(f"torchvision: {' '.join(str(error).split())}") from error
        return _read_all(scratch / RAW, missing)


def _from_apt(root: Path, missing: Sequence[Source]) -> dict[Source, Content]:
    """Fetches Debian's package into a scratch folder; takes no rights beyond the user's."""
    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        raise SourceError("apt-get and dpkg-deb are not on this machine")
    log.info("Fetching Fashion-MNIST (31 MB) with apt-get: Debian's package %s", DEBIAN_PACKAGE)
    with _scratch(root) as scratch:
        download = ["apt-get", "download", DEBIAN_PACKAGE]
        try:
            _call(download, scratch)
        except SourceError:  # a machine without package lists, or with old ones
            private = [f"-oDir::State::lists={scratch}/lists", f"-oDir::Cache={scratch}/cache"]
            for folder in ("lists/partial", "cache/archives/partial"):
                (scratch / folder).mkdir(parents=True)
            with suppress(SourceError):  # one dead repository of several does not matter
                _call(["apt-get", "update", *private], scratch)
            _call([*download, *private], scratch)
        package = next(scratch.glob("*.deb"))
        _call(["dpkg-deb", "-x", str(package), str(scratch / "package")], scratch)
        return _read_all(scratch / "package" / DEBIAN_FOLDER.relative_to("/"), missing)


def _call(command: list[str], folder: Path) -> None:
    if command[0] == "apt-get":  # its sandbox user could not enter a private folder
        timeout = f"-oAcquire::http::Timeout={_SILENCE_SECONDS}"
        command = [*command, "-oAPT::Sandbox::User=root", timeout]
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
    """A folder inside the data folder, where the room is; gone afterwards."""
    root.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=_SCRATCH, dir=root))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _socket_timeout(seconds: float) -> Iterator[None]:
    """torchvision sets no limit of its own, and a silent network would hold it for ever."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
