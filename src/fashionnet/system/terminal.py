"""A command and its terminal: streams that may be lost, text that must not act, Ctrl-C.

`begin` comes with the first import of a command and `prepare` with its `main`; a notebook or a
script that imports the package keeps its own streams and signal handlers.
"""

from __future__ import annotations

import contextlib
import csv
import io
import os
import signal
import sys
from collections.abc import Iterable, Iterator, Sequence
from types import FrameType
from typing import Any

import fashionnet
from fashionnet.errors import OutputLost, visible

EXIT_READER_GONE = 128 + 13  # as shells count a death by SIGPIPE
_SECONDS_BETWEEN_TRIES = 0.02

# ------------------------------------------------------------------------------------ streams


class _Terminal(io.TextIOWrapper):
    """Standard output or error of a command.

    Unprintable text is written as `visible` shows it; what the encoding does not have is replaced.
    A stream that takes nothing more raises `OutputLost`, or goes on as /dev/null if it `survives`.
    """

    def __init__(self, stream: io.TextIOWrapper, errors: str, survives: bool) -> None:
        how: dict[str, Any] = {
            "encoding": stream.encoding,
            "errors": errors,
            "line_buffering": stream.line_buffering,
            "write_through": stream.write_through,
        }
        try:
            super().__init__(stream.buffer, **how)
        except OSError:  # it was a file when the process started, and is a pipe now
            descriptor = io.FileIO(stream.fileno(), "wb", closefd=False)
            super().__init__(io.BufferedWriter(descriptor), **how)
        self.survives = survives
        self._loss: OutputLost | None = None

    def write(self, text: str) -> int:
        # A progress bar begins each line that it writes over with a carriage return.
        rest = text.lstrip("\r")
        lines = (visible(line, keep="\t") for line in rest.split("\n"))
        self._try(super().write, text[: len(text) - len(rest)] + "\n".join(lines))
        return len(text)

    def flush(self) -> None:
        self._try(super().flush)

    def _try(self, act: Any, *arguments: str) -> None:
        try:
            act(*arguments)
        except OSError as error:
            self._divert()
            if not (self.survives and isinstance(error, BrokenPipeError)):  # nobody misses it
                self._loss = OutputLost(error.errno, error.strerror)
        if self._loss is not None and not self.survives:
            raise self._loss

    def _divert(self) -> None:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, self.fileno())
        os.close(null)


def prepare() -> None:
    """Makes the process' own standard output and error those of a command; may be called again."""
    import logging

    logging.raiseExceptions = False  # a stream that is lost would be reported line by line
    for name, errors, survives in (("stdout", "replace", False), ("stderr", "", True)):
        stream = getattr(sys, name)
        if stream is None:  # it was closed when the process started
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8", errors="replace"))  # noqa: SIM115
        elif type(stream) is io.TextIOWrapper and stream is getattr(sys, f"__{name}__"):
            setattr(sys, name, _Terminal(stream, errors or stream.errors or "replace", survives))


def survive() -> None:
    """Lets the process go on from here without standard output, should that be lost: it trains."""
    prepare()
    if isinstance(sys.stdout, _Terminal):
        sys.stdout.survives = True


@contextlib.contextmanager
def surviving() -> Iterator[None]:
    """Lets the body go on without standard output, should that be lost: it leaves files."""
    out = sys.stdout
    if not isinstance(out, _Terminal) or out.survives:
        yield
        return
    out.survives = True
    try:
        yield
        out.flush()
    finally:
        out.survives = False


def flush() -> None:
    """Writes out what standard output still holds.

    Raises:
        OutputLost: it cannot be written.
    """
    if sys.stdout is not None:
        sys.stdout.flush()


# ------------------------------------------------------------------------------------- Ctrl-C

_waiting: set[int] = set()  # signals that came during an import
_resent: set[int] = set()  # those of them that are on their way again


def begin() -> None:
    """Lets Ctrl-C end this process in one line, also where an exception would not do it.

    Also gives it the standard streams that were closed: another file would take their numbers, and
    what is printed would be written into that.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
    sys.excepthook = _excepthook
    sys.unraisablehook = _unraisablehook


def _excepthook(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    if issubclass(kind, KeyboardInterrupt):
        fashionnet._end_in_one_line(signal.SIGINT, None)
    sys.__excepthook__(kind, error, trace)


def _unraisablehook(unraisable: Any) -> None:
    """Sends a signal again whose exception was lost in a destructor."""
    if isinstance(unraisable.exc_value, KeyboardInterrupt):
        _resend(getattr(unraisable.exc_value, "number", signal.SIGINT))
    else:
        sys.__unraisablehook__(unraisable)


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Lets Ctrl-C raise KeyboardInterrupt in the body of a command, and does without it after."""
    if signal.getsignal(signal.SIGINT) is not fashionnet._end_in_one_line:  # see `begin`
        yield
        return
    signal.signal(signal.SIGINT, _raise)
    try:
        yield
    finally:
        # The last word is said: a traceback of the interpreter's end would say nothing more.
        signal.signal(signal.SIGINT, signal.SIG_IGN)


def _raise(number: int, frame: FrameType | None) -> None:
    if not is_postponed(number, frame):
        raise KeyboardInterrupt


def is_postponed(number: int, frame: FrameType | None) -> bool:
    """Returns whether a signal struck an import, and sends it again until that is over.

    An exception in the middle of a library's import may be taken for a missing module, or leave
    half of the library. The same signal once more is not postponed.
    """
    is_resent = number in _resent
    _resent.discard(number)
    if not _is_importing(frame) or (number in _waiting and not is_resent):
        _waiting.discard(number)
        return False
    _waiting.add(number)
    _resend(number)
    return True


def _is_importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


def _resend(number: int) -> None:
    import threading

    def send() -> None:
        _resent.add(number)
        signal.pthread_kill(main, number)  # os.kill might choose another thread

    main = threading.main_thread().ident or 0
    timer = threading.Timer(_SECONDS_BETWEEN_TRIES, send)
    timer.daemon = True
    timer.start()


def aligned(rows: Sequence[Sequence[str]], num_left: int) -> str:
    """Returns a table as text: the first `num_left` columns flush left, the others flush right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        pairs = list(zip(row, widths, strict=True))
        left = [cell.ljust(width) for cell, width in pairs[:num_left]]
        right = [cell.rjust(width) for cell, width in pairs[num_left:]]
        lines.append("  ".join(left + right).rstrip())
    return "\n".join(lines)


def as_csv(head: Iterable[str], rows: Iterable[Iterable[object]]) -> bytes:
    """Returns a table as CSV, numbers in full precision; None is an empty cell."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    for row in (head, *rows):
        writer.writerow(visible(cell) if isinstance(cell, str) else cell for cell in row)
    return text.getvalue().encode()
