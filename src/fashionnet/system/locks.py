"""Locks of folders: one process at a time. The system releases a lock when its process ends.

The lock is a file in the folder, locked by flock(2). The folder may be a stranger's, so the file is
opened neither through a link nor through the second name of a file that lies elsewhere.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from fashionnet.errors import UserError
from fashionnet.system.files import missing_folders, name_file, remove_empty

log = logging.getLogger(__name__)

NAME = ".lock"


@contextlib.contextmanager
def exclusive(folder: Path, *, remove: bool = False) -> Iterator[None]:
    """Keeps every other process that asks for it out of a folder while the body runs.

    Args:
        remove: whether the lock's file is removed at the end.

    Raises:
        UserError: another process holds the lock, or a file in its place is not a lock.
        OSError: the folder cannot be written to, or its file system has no locks.
    """
    descriptor = _locked(folder, waiting=None)
    try:
        yield
    finally:
        if remove:  # before the release: a process that opened the file notices, see `_locked`
            with contextlib.suppress(OSError):
                (folder / NAME).unlink(missing_ok=True)
        os.close(descriptor)


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Makes a folder to write to and keeps every other process out while the body runs.

    If the body fails, the folders that were made for it are removed again.

    Raises:
        UserError: the folder cannot be written to, or another process is writing to it.
    """
    made = missing_folders(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise UserError(f"{folder} cannot be written to; choose another folder with --out")
        with exclusive(folder, remove=True):
            yield
    except BaseException:
        remove_empty(made)
        raise


@contextlib.contextmanager
def in_turn(folder: Path, waiting: str) -> Iterator[bool]:
    """Waits until no other process is in a folder, and keeps them out while the body runs.

    This is for caches: a folder that cannot be written to, or whose file system has no locks, is
    used without one.

    Args:
        waiting: the line to log if another process is in the folder.

    Yields:
        Whether the folder is locked, so that no other process is at work in it.

    Raises:
        UserError: a file in the lock's place is not a lock.
    """
    descriptor = None
    try:
        descriptor = _locked(folder, waiting)
    except OSError as error:
        log.debug("%s is used without a lock: %s", folder, error)
    try:
        yield descriptor is not None
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _locked(folder: Path, waiting: str | None) -> int:
    """Locks a folder and returns the descriptor; with `waiting=None` it refuses to wait."""
    path = folder / NAME
    while True:
        descriptor, is_new = _opened(path)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if waiting is None:
                    raise UserError(
                        f"{folder} is in use by another run or command; wait for its end"
                    ) from None
                log.info("%s", waiting)
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            # The process that held the lock may have removed the file before it released it.
            if _is_at(path, os.fstat(descriptor)):
                return descriptor
        except BaseException as error:
            os.close(descriptor)
            if is_new and isinstance(error, OSError):  # no locks here: leave no trace
                path.unlink(missing_ok=True)
            name_file(error, path)
            raise
        os.close(descriptor)


def _opened(path: Path) -> tuple[int, bool]:
    """Opens a lock's file and makes it if there is none.

    Returns:
        The descriptor, and whether the file was made.

    Raises:
        UserError: a link, a pipe or a file with a second name lies there.
    """
    flags = os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK
    while True:
        with contextlib.suppress(FileExistsError):
            return os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o666), True
        try:
            found = path.lstat()
            if stat.S_ISREG(found.st_mode) and found.st_nlink <= 1:
                return os.open(path, flags), False
        except FileNotFoundError:  # removed meanwhile
            continue
        raise UserError(f"{path} is not a file of its own, as a lock must be; remove it")


def _is_at(path: Path, file: os.stat_result) -> bool:
    try:
        return os.path.samestat(path.lstat(), file)
    except FileNotFoundError:
        return False
