"""The files of a published data set in the data folder, fetched where they are not there."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from http.client import HTTPException
from pathlib import Path
from urllib.request import Request, urlopen

import numpy as np

from fashionnet.data import sources
from fashionnet.data.sources import Content, Published, Source, SourceError
from fashionnet.errors import UserError
from fashionnet.system import locks
from fashionnet.system.files import atomic_write, missing_folders, remove, remove_temporary

log = logging.getLogger(__name__)

Fetched = dict[Source, tuple[Content, Content]]  # the content, and what of it is kept, as bytes

DEBIAN = Path("/usr/share/datasets")  # where packages called dataset-NAME put NAME

_SILENCE_SECONDS = 20  # a network that is silent for longer counts as absent
_COMMAND_SECONDS = 900  # for 40 MB on a slow line
_DOWNLOADED_AT_ONCE = 2**18
_MOST_TIMES = 2  # what a mirror may send, as a multiple of what is expected
_SCRATCH = ".fetch-"  # how the names of scratch folders begin
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


def load(root: Path, data: Published, wanted: Sequence[Source]) -> list[Content]:
    """Reads files from the data folder and fetches what is missing or damaged there.

    The other files are not opened, but one that is absent is fetched as well, so that a missing
    test set is not discovered at the end of a training.

    Args:
        root: the data folder; made if it does not exist.
        data: the data set.
        wanted: those of its files to read.

    Returns:
        The content of each, its checksum verified.

    Raises:
        UserError: a file is missing or damaged, and no way to fetch it works.
    """
    with suppress(SourceError):  # e.g. a damaged file, which `_recover` names and replaces
        if all(_is_kept(root, data, source) for source in data.files):
            places = [_places(root, data, source)[0] for source in wanted]
            return list(map(sources.read_checked, places, wanted))
    with _lock(root, data):
        absent = [source for source in data.files if not _is_kept(root, data, source)]
        needed = [source for source in data.files if source in (*wanted, *absent)]
        recovered = _recover(root, data, needed)
    return [recovered[source] for source in wanted]


def read_in_place(root: Path, data: Published, wanted: Sequence[Source]) -> list[Content] | None:
    """Reads files from a folder that is not to be written to.

    Returns:
        The content of each. None if a file of the data set is missing or one of `wanted` is
        damaged: the user may not repair this folder.
    """
    contents: dict[Source, Content] = {}
    with suppress(OSError):
        if all(_places(root, data, source) for source in data.files):
            _read_any(root, data, wanted, contents)
    return [contents[source] for source in wanted] if len(contents) == len(wanted) else None


# ------------------------------------------------------------------------- the data folder


def _places(root: Path, data: Published, source: Source) -> list[Path]:
    """Returns where a file may lie and does, unpacked ones first, and first in its own folder.

    Directly in `root` there may be another data set's file of the same name.
    """
    names = dict.fromkeys((source.kept[0], source.packed))
    paths = [folder / name for name in names for folder in (root / data.folder, root)]
    return [path for path in paths if path.is_file()]


def _is_kept(root: Path, data: Published, source: Source, damaged: Container[Path] = ()) -> bool:
    intact = (path for path in _places(root, data, source) if path not in damaged)
    return any(path.name == source.kept[0] for path in intact)


def _read_any(
    root: Path, data: Published, wanted: Sequence[Source], contents: dict[Source, Content]
) -> dict[Path, str]:
    """Adds to `contents` what an intact copy in `root` holds; returns what damage it met."""
    damaged = {}
    for source in wanted:
        for path in _places(root, data, source):
            try:
                contents[source] = sources.read_checked(path, source)
                break
            except SourceError as error:
                damaged[path] = str(error)
    return damaged


def _recover(root: Path, data: Published, wanted: Sequence[Source]) -> dict[Source, Content]:
    """Names damaged files, fetches what no intact copy in the data folder holds, and unpacks."""
    contents: dict[Source, Content] = {}
    fetched: Fetched = {}
    damaged = _read_any(root, data, wanted, contents)
    for message in damaged.values():
        log.warning("%s", message)
    if missing := [source for source in wanted if source not in contents]:
        fetched = _fetch(root, data, missing, list(damaged.values()))
        contents |= {source: content for source, (content, _) in fetched.items()}
    # Only now: if fetching had failed, the next attempt could not name the damaged files.
    for path in damaged:
        if path.parent == root / data.folder:  # elsewhere it may be another data set's
            with suppress(OSError):  # a read-only folder
                path.replace(aside := path.with_name(f"{path.name}.damaged"))
                log.warning("Set the damaged file aside as %s", aside)
    for source in wanted:
        if not _is_kept(root, data, source, damaged):
            _, kept = fetched.get(source, (None, contents[source]))
            _keep(root / data.folder / source.kept[0], kept)
    return contents


def _keep(path: Path, content: Content) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as file:
            file.write(content.data)
    except OSError as error:
        log.warning(
            "Cannot keep %s, so the next run has to make it again: %s", path, error.strerror
        )


@contextmanager
def _lock(root: Path, data: Published) -> Iterator[None]:
    """Keeps other processes from preparing the same folder, and removes what killed ones left."""
    missing_folders(root)  # refuses too many
    with suppress(OSError):  # a folder that cannot be written to needs no guard
        root.mkdir(parents=True, exist_ok=True)
    waiting = f"Another process is preparing the data in {root}; waiting for it"
    with locks.in_turn(root, waiting) as is_alone:
        for folder in root.glob(f"{_SCRATCH}*") if is_alone else ():
            with suppress(OSError):
                remove(folder)
        for source in data.files if is_alone else ():
            remove_temporary(root / data.folder, f".{source.kept[0]}.*.tmp")
        yield


# -------------------------------------------------------------------------------- fetching


def _fetch(
    root: Path, data: Published, missing: Sequence[Source], damaged: Sequence[str]
) -> Fetched:
    """Tries the ways to get the files, in order, until one gives all that are missing."""
    ways: list[Callable[..., Fetched]] = [partial(_from_mirror, each) for each in data.mirrors]
    if data.debian:
        ways = [_from_installed_package, *ways, _from_apt]
    tried = []
    for way in ways:
        try:
            return way(root, data, missing)
        except SourceError as error:
            log.debug("%s", error)
            tried.append(str(error))
    names = ", ".join(dict.fromkeys(source.packed for source in missing))
    reasons = "".join(f" ({reason})" for reason in damaged)
    packed = ", packed or not," if all(source.sha256 for source in missing) else ""
    raise UserError(
        f"no {names} in {root}{reasons}, and fetching failed: {'; '.join(tried)}. "
        f"Put these files of {data.title}{packed} into {root / data.folder}, "
        "or point data.root at a folder that has them"
    )


def _read_all(data: Published, folder: Path, missing: Sequence[Source]) -> Fetched:
    fetched = {}
    for source in missing:
        if not (places := _places(folder, data, source)):
            raise SourceError(f"{folder} has no {source.packed}")
        content = sources.read_checked(places[0], source)
        kept = content if source.sha256 else np.fromfile(places[0], np.uint8)
        fetched[source] = content, kept
    return fetched


def _from_installed_package(root: Path, data: Published, missing: Sequence[Source]) -> Fetched:
    if not (folder := DEBIAN / data.debian).is_dir():
        raise SourceError(f"Debian's package dataset-{data.debian} is not installed")
    return _read_all(data, folder, missing)


def _from_mirror(address: str, root: Path, data: Published, missing: Sequence[Source]) -> Fetched:
    log.info("Fetching %s (%d MB) from %s", data.title, data.megabytes, address)
    with _scratch(root) as scratch:
        for name in dict.fromkeys(source.packed for source in missing):
            _download(f"{address}{name}", scratch / name, data.megabytes)
        return _read_all(data, scratch, missing)


def _download(address: str, path: Path, megabytes: int) -> None:
    """Writes what an address sends; nothing is known of it yet.

    Args:
        megabytes: of all files of the data set; one that is larger fills no disk.
    """
    from tqdm import tqdm

    request = Request(address, headers={"User-Agent": "fashionnet"})
    try:
        with urlopen(request, timeout=_SILENCE_SECONDS) as answer, open(path, "wb") as file:
            size = int(answer.headers.get("Content-Length") or 0) or None
            bar = tqdm(
                total=size, desc=path.name, unit="B", unit_scale=True, leave=False, disable=None
            )
            with bar:
                while part := answer.read(_DOWNLOADED_AT_ONCE):
                    file.write(part)
                    bar.update(len(part))
                    if file.tell() > _MOST_TIMES * megabytes * 10**6:
                        raise SourceError(f"{address}: it sends more than the file holds")
    except (OSError, HTTPException, ValueError) as error:  # ValueError: no number of bytes
        if isinstance(error, OSError) and error.errno in _DISK_FULL:
            raise  # no other way fares better
        reason = " ".join(str(error).split()) or type(error).__name__
        raise SourceError(f"{address}: {reason}") from error


def _from_apt(root: Path, data: Published, missing: Sequence[Source]) -> Fetched:
    """Fetches Debian's package into a scratch folder, with no rights beyond the user's."""
    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        raise SourceError("apt-get and dpkg-deb are not on this machine")
    package = f"dataset-{data.debian}"
    log.info("Fetching %s with apt-get: Debian's package %s", data.title, package)
    with _scratch(root) as scratch:
        # Its sandbox user could not enter a private folder.
        options = ["-oAPT::Sandbox::User=root", f"-oAcquire::http::Timeout={_SILENCE_SECONDS}"]
        download = ["apt-get", "download", package, *options]
        try:
            _call(download, scratch)
        except SourceError:  # a machine without package lists, or with old ones
            private = [f"-oDir::State::lists={scratch}/lists", f"-oDir::Cache={scratch}/cache"]
            for folder in ("lists/partial", "cache/archives/partial"):
                (scratch / folder).mkdir(parents=True)
            with suppress(SourceError):  # one dead repository of several does not matter
                _call(["apt-get", "update", *options, *private], scratch)
            _call([*download, *private], scratch)
        _call(["dpkg-deb", "-x", str(next(scratch.glob("*.deb"))), f"{scratch}/package"], scratch)
        unpacked = scratch / "package" / (DEBIAN / data.debian).relative_to("/")
        return _read_all(data, unpacked, missing)


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
