"""Files that are either whole or not there: temporary file, fsync, rename.

And files of strangers: a run directory that someone sent may hold pipes, links to elsewhere and
files without end, so what is read from one is opened here.
"""

from __future__ import annotations

import contextlib
import json
import os
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from fashionnet.errors import UserError

TEMPORARY = ".*.tmp"  # matches what a process killed in `atomic_write` leaves


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[IO[bytes]]:
    """Opens a file that takes the place of `path` only once it is whole and on the disk.

    Where the body or the disk fails, `path` stays as it was and no temporary file is left.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        name_file(error, path)
        raise
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Puts a folder's names on the disk: a loss of power may else bring back those of before."""
    with contextlib.suppress(OSError):  # Windows and some network folders know no such thing
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_json(path: Path, value: Any) -> None:
    """Writes `value` as indented JSON, atomically."""
    with atomic_write(path) as file:
        file.write((json.dumps(value, indent=2) + "\n").encode())


def name_file(error: BaseException, path: Path) -> None:
    """Lets an error of the disk name the file; what a write raises does not."""
    if isinstance(error, OSError) and error.filename is None:
        error.filename = str(path)


def check_place(path: Path, what: str) -> None:
    """Refuses a path where no file can be written, before any work is done.

    Args:
        what: the file in words, for the message.

    Raises:
        UserError: it is a folder, or its folder cannot be used.
    """
    if path.is_dir() or not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise UserError(f"{what} {path} cannot be written; choose a folder that you may use")


def as_typed(path: Path) -> str:
    """Returns a path as one would type it from here."""
    relative = os.path.relpath(path)
    return relative if not relative.startswith("..") else str(path)


def missing_folders(folder: Path) -> list[Path]:
    """Returns which of `folder` and those above it do not exist, the deepest first."""
    return [path for path in (folder, *folder.parents) if not path.exists()]


def remove_empty(folders: Iterable[Path]) -> None:
    """Removes the given folders, the deepest first, up to one that holds something."""
    for path in folders:
        try:
            path.rmdir()
        except OSError:
            return


def refuse_strange(path: Path, folder: Path) -> None:
    """Refuses a `path` that leads out of `folder`, or is neither a file nor a folder.

    A path where nothing is yet is fine.

    Raises:
        UserError: It is a link to elsewhere, a pipe, a device or the like.
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
        raise UserError(f"{path} leads out of {folder} by a link; put what it names there itself")
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise UserError(f"{path} is neither a file nor a folder; remove it")


def refuse_strange_below(folder: Path) -> None:
    """Refuses a `folder` through which one would read or write elsewhere, see `refuse_strange`."""
    for parent, folders, names in os.walk(folder):
        for name in (*folders, *names):
            refuse_strange(Path(parent, name), folder)


def open_inside(path: Path, folder: Path) -> IO[bytes]:
    """Opens a regular file for reading that lies in `folder` itself; waits for no pipe's writer.

    Raises:
        FileNotFoundError: There is none.
        UserError: It is no regular file, cannot be read, or a link leads out of `folder`.
    """
    refuse_strange(path, folder)
    try:
        # Checked again once it is open: nobody can exchange it then.
        file = open(path, "rb", opener=_without_waiting)  # noqa: SIM115
    except FileNotFoundError:
        raise
    except IsADirectoryError:
        raise UserError(f"{path} is a folder, not a file") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); check its rights") from None
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise UserError(f"{path} is no regular file")
    return file


def _without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def read_bounded(path: Path, folder: Path, limit: int) -> bytes:
    """Returns the content of a file of `folder`, at most `limit` bytes.

    Raises:
        FileNotFoundError: There is none.
        UserError: It is larger, or `open_inside` refuses it.
    """
    with open_inside(path, folder) as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise UserError(f"{path} is larger than the {limit} bytes that such a file may have")
    return content


def read_json(path: Path, folder: Path, limit: int) -> Any:
    """Returns the value in a JSON file of `folder`, at most `limit` bytes.

    Raises:
        FileNotFoundError: There is none.
        UserError: It is no JSON, nested too deeply, larger, or `open_inside` refuses it.
    """
    content = read_bounded(path, folder, limit)
    try:
        return json.loads(content)
    except RecursionError:
        raise UserError(f"{path} is damaged: it is nested too deeply") from None
    except ValueError as error:
        raise UserError(f"{path} is damaged: {error}") from None
