"""Files that are either complete or absent, and safe access to folders that strangers made.

A run directory that someone sent may hold pipes, links that lead elsewhere, and endless files and
folders. Everything that is read from such a folder or written into it is opened here.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import secrets
import shutil
import stat
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from fashionnet.errors import UserError

TEMPORARY = ".*.tmp"  # matches what a process killed in `atomic_write` leaves
MOST_FOLDERS = 64  # nested in each other; Python's own walks recurse, and fail near a thousand
_MOST_LINKS = 40  # from one to the next, as Linux follows
_LONGEST_NAME = 50  # of a file in that of its temporary file: in all at most 255 bytes


@contextlib.contextmanager
def atomic_write(path: Path, *, durable: bool = True) -> Iterator[IO[bytes]]:
    """Opens a file that replaces `path` only once it is complete and on the disk.

    If the body or the disk fails, `path` stays as it was and no temporary file is left. A link at
    `path` is replaced, not followed. The file keeps the permissions of the one it replaces if that
    belongs to the user; otherwise it has the permissions of a new file.

    Args:
        durable: whether the file survives a loss of power; without it, ten thousand files take
            seconds, not minutes.
    """
    temporary = path.with_name(f".{path.name[:_LONGEST_NAME]}.{secrets.token_hex(8)}.tmp")
    # "x" creates the file or fails, and so never follows a link.
    file = open(temporary, "xb")  # noqa: SIM115
    try:
        with file:
            _keep_permissions(path, file)
            yield file
            file.flush()
            if durable:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        name_file(error, path)  # closing the file may have failed as well
        raise
    if durable:
        _sync_folder(path.parent)


def _keep_permissions(path: Path, file: IO[bytes]) -> None:
    """Gives a file the permissions of the user's own file at `path`, if there is one."""
    with contextlib.suppress(OSError):  # no such file, or a file system without permissions
        before = path.lstat()
        if stat.S_ISREG(before.st_mode) and before.st_uid == os.geteuid():
            os.fchmod(file.fileno(), before.st_mode & 0o777)


def open_appending(path: Path) -> IO[str]:
    """Opens a text file to append to; a link is not followed, see `own_copy`.

    Raises:
        UserError: `path` is a link, a pipe or a device.
    """
    own_copy(path)
    return open(path, "a", encoding="utf-8", opener=_own)


def own_copy(path: Path) -> None:
    """Replaces a file that has a second name, e.g. in a backup, by a copy before it is written to.

    Raises:
        UserError: `path` is a link, a pipe or a device.
    """
    with contextlib.suppress(FileNotFoundError):
        found = path.lstat()
        if not stat.S_ISREG(found.st_mode):
            raise UserError(f"{path} is not a file of its own; remove it")
        if found.st_nlink > 1:
            with atomic_write(path) as copy, open(path, "rb", opener=_own) as file:
                shutil.copyfileobj(file, copy)


def _own(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)


def _sync_folder(folder: Path) -> None:
    """Writes a folder's names to the disk, so that a loss of power does not undo a rename."""
    with contextlib.suppress(OSError):  # some network folders do not support it
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def file_sha256(file: IO[bytes]) -> str:
    """Returns the sha256 of what an open file holds from here on."""
    digest = hashlib.sha256()
    while part := file.read(2**20):
        digest.update(part)
    return digest.hexdigest()


def write_json(path: Path, value: Any) -> None:
    """Writes `value` as indented JSON, atomically."""
    with atomic_write(path) as file:
        file.write((json.dumps(value, indent=2) + "\n").encode())


def name_file(error: BaseException, path: Path) -> None:
    """Adds the file's name to an error of the disk; a failed write does not report it."""
    if isinstance(error, OSError) and error.filename is None:
        error.filename = str(path)


def check_place(path: Path, what: str) -> None:
    """Refuses a path where `write_output` cannot write, before any work is done.

    Args:
        what: the file in words, for the message.

    Raises:
        UserError: it is a folder, or its folder cannot be used.
    """
    descriptor = _descriptor(path)
    if descriptor is not None:
        with contextlib.suppress(OSError):
            os.fstat(descriptor)
            return
    elif is_pipe_or_device(path):
        if os.access(path, os.W_OK) and not path.is_socket():
            return
    elif not path.is_dir() and path.parent.is_dir() and os.access(path.parent, os.W_OK):
        return
    raise UserError(f"{what} {path} cannot be written; choose a folder that you may use")


def write_output(path: Path, content: bytes) -> None:
    """Writes a file that the user named, atomically; a pipe or a device is written into.

    Raises:
        OSError: it cannot be written.
        UserError: it is a device or pipe that takes nothing.
    """
    if not is_pipe_or_device(path):
        with atomic_write(path) as file:
            file.write(content)
        return
    descriptor = _descriptor(path)
    try:
        if descriptor is None:
            opened = os.open(path, os.O_WRONLY | os.O_NOCTTY)
        else:  # opened again, a file would be written from its beginning
            for stream in (sys.stdout, sys.stderr):
                stream.flush()
            opened = os.dup(descriptor)
        with open(opened, "wb") as file:
            file.write(content)
    except OSError as error:
        name_file(error, path)
        if error.errno in (errno.EBADF, errno.ENXIO, errno.EINVAL, errno.ENODEV):
            raise UserError(f"{path} cannot be written ({error.strerror})") from None
        raise


def is_pipe_or_device(path: Path) -> bool:
    """Returns whether a path names a pipe or device, which is written into and never replaced."""
    if _descriptor(path) is not None:
        return True
    try:
        mode = path.stat().st_mode
    except OSError:
        return False
    return not stat.S_ISREG(mode) and not stat.S_ISDIR(mode)


def _descriptor(path: Path) -> int | None:
    """Returns N of `/dev/fd/N`, or of a link to it such as `/dev/stdout`; else None."""
    with contextlib.suppress(OSError):
        for _ in range(_MOST_LINKS):
            folder = os.path.realpath(path.parent)
            if folder in (f"/proc/{os.getpid()}/fd", "/dev/fd") and path.name.isdecimal():
                return int(path.name)
            if not path.is_symlink():
                return None
            path = Path(folder, os.readlink(path))
    return None


def as_typed(path: Path) -> str:
    """Returns a path as a user would type it in the current folder."""
    relative = os.path.relpath(path)
    return relative if not relative.startswith("..") else str(path)


def missing_folders(folder: Path) -> list[Path]:
    """Returns which of `folder` and the folders above it do not exist, the deepest first.

    Raises:
        UserError: more than `MOST_FOLDERS` are missing; `Path.mkdir` recurses.
    """
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    if len(missing) > MOST_FOLDERS:
        raise UserError(
            f"{missing[-1]} cannot be made with {len(missing) - 1} folders nested in it; the limit "
            f"is {MOST_FOLDERS}"
        )
    return missing


def remove_empty(folders: Iterable[Path]) -> None:
    """Removes the given folders, the deepest first, up to one that is not empty."""
    for path in folders:
        try:
            path.rmdir()
        except OSError:
            return


def refuse_strange(path: Path, folder: Path) -> None:
    """Refuses a `path` that leads out of `folder`, or is neither a file nor a folder.

    A path that does not exist yet is fine.

    Raises:
        UserError: `path` is a link to elsewhere, a pipe or a device.
    """
    try:
        inside = path.resolve().is_relative_to(folder.resolve())
        mode = path.stat().st_mode if inside else 0
    except FileNotFoundError:
        return
    except (OSError, RuntimeError) as error:  # RuntimeError: links in a circle
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path} cannot be read ({reason}); check its rights") from None
    if not inside:
        raise UserError(f"{path} leads out of {folder} by a link; put the file itself there")
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise UserError(f"{path} is neither a file nor a folder; remove it")


def refuse_strange_below(folder: Path) -> None:
    """Refuses a folder that holds anything `refuse_strange` refuses.

    This is called before anything is written into a folder that may be a stranger's.
    """
    for parent, folders, names in walk(folder):
        for name in (*folders, *names):
            refuse_strange(Path(parent, name), folder)


def walk(
    folder: Path,
    *,
    follow_links: bool = False,
    skip_deep: bool = False,
    on_error: Callable[[OSError], object] = lambda error: None,
) -> Iterator[tuple[Path, list[str], list[str]]]:
    """Yields each folder, the folders in it and its other files, from the top, sorted by name.

    It works like `os.walk`, but without recursion. A folder that the caller removes from the list
    is not entered.

    Args:
        folder: the root; depths are counted from it.
        skip_deep: whether folders nested deeper than `MOST_FOLDERS` are skipped, not refused.
        on_error: receives the error of a folder that cannot be read.

    Raises:
        UserError: folders are nested too deeply.
    """
    rest = [(folder, 0)]
    while rest:
        parent, depth = rest.pop()
        if depth > MOST_FOLDERS:
            if skip_deep:
                continue
            raise UserError(
                f"{folder} has folders nested more than {MOST_FOLDERS} deep; move or remove them"
            )
        folders: list[str] = []
        names: list[str] = []
        try:
            with os.scandir(parent) as entries:
                for entry in entries:
                    (folders if _is_folder(entry) else names).append(entry.name)
        except OSError as error:
            on_error(error)
            continue
        folders.sort()
        names.sort()
        yield parent, folders, names
        for name in reversed(folders):
            if follow_links or not (parent / name).is_symlink():
                rest.append((parent / name, depth + 1))


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False


def remove(*paths: Path) -> None:
    """Removes files, links (not their targets) and folders with their content, if they exist.

    Raises:
        UserError: folders are nested too deeply; nothing was removed.
    """
    for path in paths:
        for _ in walk(path) if not path.is_symlink() else ():  # `shutil.rmtree` recurses
            pass
    for path in paths:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def remove_temporary(folder: Path, pattern: str = TEMPORARY) -> None:
    """Removes what processes killed in `atomic_write` left; the caller holds the folder's lock."""
    for left in folder.glob(pattern):
        with contextlib.suppress(OSError):  # a folder, or another user's file
            left.unlink()


def open_inside(path: Path, folder: Path) -> IO[bytes]:
    """Opens a regular file in `folder` for reading; it never waits for a pipe's writer.

    Raises:
        FileNotFoundError: the file does not exist.
        UserError: it is not a regular file, cannot be read, or a link leads out of `folder`.
    """
    refuse_strange(path, folder)
    try:
        # It is checked again once it is open, when nobody can replace it.
        file = open(path, "rb", opener=_without_waiting)  # noqa: SIM115
    except FileNotFoundError:
        raise
    except IsADirectoryError:
        raise UserError(f"{path} is a folder, not a file") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); check its rights") from None
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise UserError(f"{path} is not a regular file")
    return file


def _without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)


def read_bounded(path: Path, folder: Path, limit: int) -> bytes:
    """Returns the content of a file in `folder`, at most `limit` bytes.

    Raises:
        FileNotFoundError: the file does not exist.
        UserError: it is larger, or `open_inside` refuses it.
    """
    with open_inside(path, folder) as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise UserError(f"{path} is larger than the limit of {limit} bytes")
    return content


def read_json(path: Path, folder: Path, limit: int) -> Any:
    """Returns the value in a JSON file in `folder`, at most `limit` bytes.

    Raises:
        FileNotFoundError: the file does not exist.
        UserError: it is not JSON, is nested too deeply, is larger, or `open_inside` refuses it.
    """
    content = read_bounded(path, folder, limit)
    try:
        return json.loads(content)
    except RecursionError:
        raise UserError(f"{path} is damaged: it is nested too deeply") from None
    except ValueError as error:
        raise UserError(f"{path} is damaged: {error}") from None
