"""What a user got wrong, in one line, and text that is safe to put into that line.

Parts raise `UserError` where they see the mistake. `system.command_line.reported` is the one place
that turns it into `error: …` on stderr and exit status 2. Anything else is a fault of the program
and keeps its traceback.
"""

from __future__ import annotations

import errno
import re
import signal
import unicodedata

# The operating system's refusals that a user can mend: a full disk, missing permissions, a wrong
# path, a disk that fails or cannot lock.
_MENDABLE = {
    errno.ENOSPC: "free some space or choose another folder",
    errno.EDQUOT: "free some space or choose another folder",
    errno.EFBIG: "raise the file size limit or choose another folder",
    errno.EROFS: "choose a folder that can be written to",
    errno.EACCES: "choose a folder that you may use",
    errno.EPERM: "choose a folder that you may use",
    errno.ENOENT: "choose another path",
    errno.ENOTDIR: "choose another path",
    errno.EISDIR: "choose another path",
    errno.EEXIST: "choose another path",
    errno.ENAMETOOLONG: "choose a shorter path",
    errno.EIO: "check the disk or choose another folder",
    errno.ESTALE: "check the disk or choose another folder",
    errno.ENOLCK: "choose a folder whose file system can lock files",
    errno.ENOSYS: "choose a folder whose file system can lock files",
    errno.EOPNOTSUPP: "choose a folder whose file system can lock files",
}

# torch raises a RuntimeError with these words if memory runs out, on any device.
_NO_MEMORY = re.compile(
    "can't allocate memory|not enough memory|out of memory|storage size calculation overflowed",
    re.IGNORECASE,
)
_ASKED = re.compile(r"tried to allocate [\d.]+ \w+", re.IGNORECASE)


class UserError(ValueError):
    """A mistake of the caller's; the message names the key, file or value and the way out."""


class AlreadyReported(UserError):
    """An error that another process of the job has reported already."""


class Interrupted(KeyboardInterrupt):
    """A signal ended the work; what was done is saved, and the same command goes on from there."""

    def __init__(self, number: int) -> None:
        super().__init__(f"interrupted by {signal.Signals(number).name}")
        self.number = number
        self.status = 128 + number  # as shells count


def one_line(error: BaseException) -> str | None:
    """Returns an error as a line for a user, or None if it is a fault of the program."""
    if isinstance(error, UserError):
        return visible(" ".join(str(error).split()))
    if isinstance(error, OutputLost):
        return f"cannot write to standard output: {error.strerror}"
    if is_out_of_memory(error):
        asked = _ASKED.search(str(error))
        size = f" ({asked[0].lower()})" if asked else ""
        return f"out of memory{size}; a smaller batch_size or a smaller model needs less"
    if isinstance(error, OSError) and error.errno in _MENDABLE:
        where = f" {error.filename!r}" if error.filename is not None else ""
        return f"cannot use{where}: {error.strerror}; {_MENDABLE[error.errno]}"
    return None


def shortened(value: object, most: int = 80) -> str:
    """Returns a value as text for a message: of a long one its beginning, or its size."""
    if isinstance(value, int) and abs(value) >= 10**most:
        # Python refuses to print numbers of thousands of digits.
        return f"{'-' if value < 0 else ''}1e{int(value.bit_length() * 0.30103)}"
    try:
        text = str(value)
    except (ValueError, RecursionError):
        text = f"a {type(value).__name__}"
    return text if len(text) <= most else f"{text[: most // 2]}… ({len(text)} characters)"


def first_line(error: BaseException) -> str:
    """Returns the first line of what `error` says, or its kind where it says nothing."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


def is_out_of_memory(error: BaseException) -> bool:
    """Returns whether `error` says that memory is short: Python's, the system's or torch's."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    is_torchs = isinstance(error, RuntimeError) and _NO_MEMORY.search(str(error)) is not None
    return isinstance(error, MemoryError) or is_torchs


def interruption(error: BaseException) -> KeyboardInterrupt | None:
    """Returns the Ctrl-C or signal behind `error`; None where there is none.

    A library that is struck in the middle of something may fail over what it had not finished.
    """
    seen: list[BaseException] = []
    rest: list[BaseException | None] = [error]
    while rest:
        each = rest.pop()
        if isinstance(each, KeyboardInterrupt):
            return each
        if each is not None and each not in seen:
            seen.append(each)
            rest += [each.__cause__, each.__context__]
    return None


def visible(text: str, keep: str = "") -> str:
    """Returns `text` with each unprintable character as an escape, e.g. `\\x1b` or `\\u202e`.

    Unprintable are control characters, what reorders or hides text, and lone surrogates.

    Args:
        keep: unprintable characters that stay, e.g. "\\n" for a text of several lines.
    """
    if text.isprintable():
        return text
    return "".join(
        c
        if c in keep or c.isprintable() or unicodedata.category(c) == "Zs"  # wide spaces, …
        else c.encode("unicode_escape").decode()
        for c in text
    )


class OutputLost(OSError):
    """Standard output takes nothing more: its reader is gone, or its disk is full."""
