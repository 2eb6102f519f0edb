"""Files that are either whole or not there: temporary file, fsync, rename."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any


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


def write_json(path: Path, value: Any) -> None:
    """Writes `value` as indented JSON, atomically."""
    with atomic_write(path) as file:
        file.write((json.dumps(value, indent=2) + "\n").encode())


def name_file(error: BaseException, path: Path) -> None:
    """Lets an error of the disk name the file; what a write raises does not."""
    if isinstance(error, OSError) and error.filename is None:
        error.filename = str(path)


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
