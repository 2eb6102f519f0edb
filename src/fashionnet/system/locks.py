"""Locks of folders: one process at a time; the system lets go of one when its process ends.

The lock is a file in the folder, held by filelock. It may lie in a stranger's folder, so it is
opened through no link, and through no second name of a file that lies elsewhere.
"""

from __future__ import annotations

import contextlib
import logging
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from fashionnet.errors import UserError
from fashionnet.system.files import missing_folders, name_file, remove_empty

if TYPE_CHECKING:
    from filelock import BaseFileLock

log = logging.getLogger(__name__)

NAME = ".lock"
_POLL_SECONDS = 0.1


@contextlib.contextmanager
def exclusive(folder: Path, *, remove: bool = False) -> Iterator[None]:
    """Keeps every other process that asks for it out of a folder while the body runs.

    Args:
        remove: whether the lock's file is removed at the end.

    Raises:
        UserError: another one has it, or what lies in its place is not a lock.
        OSError: the folder cannot be written to, or its file system has no locks.
    """
    lock = _acquired(folder, waiting=None)
    try:
        yield
    finally:
        try:
            if remove:  # while it is held: whoever opened it meanwhile notices, see `_acquired`
                (folder / NAME).unlink(missing_ok=True)
        finally:
            lock.release()


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Makes a folder to write to, and keeps every other process out while the body does.

    Where the body fails, the folders that were made for it go again.

    Raises:
        UserError: it cannot be written to, or another process is writing to it.
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

    For caches: a folder that cannot be written to, or whose file system has no locks, is entered
    without one.

    Args:
        waiting: the line to log where another process is in the folder.

    Yields:
        Whether there is a lock, so that nobody else is at work in the folder.

    Raises:
        UserError: what lies in the lock's place is not a lock.
    """
    lock = None
    try:
        lock = _acquired(folder, waiting)
    except OSError as error:
        log.debug("%s is used without a lock: %s", folder, error)
    try:
        yield lock is not None
    finally:
        if lock is not None:
            lock.release()


def _acquired(folder: Path, waiting: str | None) -> BaseFileLock:
    """Returns the lock of a folder, held; `waiting` None refuses instead of waiting."""
    from filelock import FileLock, Timeout

    path = folder / NAME
    while True:
        descriptor, is_new = _opened(path)
        try:
            _refuse_without_locks(descriptor, path)
            before = os.fstat(descriptor)
            # Some releases set the mode: let it be that of the file.
            lock = FileLock(path, mode=stat.S_IMODE(before.st_mode) & 0o777 | 0o600)
            try:
                lock.acquire(blocking=False)
            except Timeout:
                if waiting is not None:
                    log.info("%s", waiting)
                    lock.acquire(poll_interval=_POLL_SECONDS)
            # A holder may remove the file before it lets go: what was opened here may be gone.
            # As long as `descriptor` is open, no other file can pass for it.
            is_same = _names(path, before)
            if is_same and lock.is_locked:
                return lock
            lock.release(force=True)
            if is_same:
                raise UserError(f"{folder} is in use by another run or command; wait for its end")
        except OSError:
            if is_new:  # no file system for locks: leave no trace
                path.unlink(missing_ok=True)
            raise
        finally:
            os.close(descriptor)


def _refuse_without_locks(descriptor: int, path: Path) -> None:
    """Raises the OSError of a file system without locks.

    Releases of filelock differ there: some wait for ever, some take a mere file for the lock, which
    would outlive a process that is killed.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        fcntl.flock(descriptor, fcntl.LOCK_UN)
    except BlockingIOError:  # it has locks: another process holds this one
        pass
    except OSError as error:
        name_file(error, path)
        raise


def _opened(path: Path) -> tuple[int, bool]:
    """Opens a lock's file, made where there is none.

    Returns:
        Its descriptor, and whether it was made.

    Raises:
        UserError: there is something else: a link, a pipe, a file with a second name.
    """
    flags = os.O_RDWR | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    while True:
        with contextlib.suppress(FileExistsError):
            return os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o666), True
        try:
            found = path.lstat()
            if stat.S_ISREG(found.st_mode) and found.st_nlink <= 1:
                return os.open(path, flags), False
        except FileNotFoundError:  # removed since
            continue
        raise UserError(f"{path} is not a file of its own, as a lock must be; remove it")


def _names(path: Path, file: os.stat_result) -> bool:
    try:
        return os.path.samestat(path.lstat(), file)
    except FileNotFoundError:
        return False
