"""What all commands have: their argument parser, and how they end."""

from __future__ import annotations

import argparse
import errno
import gc
import os
import signal
import sys
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from fashionnet.errors import (
    AlreadyReported,
    Interrupted,
    OutputLost,
    UserError,
    interruption,
    one_line,
)
from fashionnet.system import terminal

# Arguments that several commands take, and mean the same by.
_SHARED: dict[str, dict[str, Any]] = {
    "run_dir": {"metavar": "RUN_DIR"},
    "--device": {"help": "auto, cpu, cuda or mps; default: the run's own"},
    "--data-root": {"metavar": "DIR", "help": "folder of the data"},
    "--json": {"action": "store_true", "help": "print JSON, in full precision"},
}


class Parser(argparse.ArgumentParser):
    """An argument parser that refuses with a user error in one line."""

    def __init__(self, module: str, doc: str | None, *shared: str) -> None:
        """Makes the parser of a command.

        Args:
            shared: those of its arguments that other commands take as well.
        """
        super().__init__(
            prog=f"python -m fashionnet.{module}",
            description=textwrap.dedent(doc or ""),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        for name in shared:
            self.add_argument(name, **_SHARED[name])

    def error(self, message: str) -> NoReturn:
        """Raises what argparse would print with its usage."""
        raise UserError(f"{message}; see {self.prog} --help")


EXIT_USER_ERROR = 2
# Python's 700 make an import of torch look for garbage hundreds of times, and find none.
_OBJECTS_BETWEEN_COLLECTIONS = 50_000


_began: list[float] = []  # when the command began, until its first job asks for that
_imported = time.perf_counter()


def job_began() -> float:
    """Returns when the job that now begins began, as `time.perf_counter` counts.

    For the first one of a command that is when its process started; for others it is now.
    """
    return _began.pop() if _began else time.perf_counter()


def _process_seconds() -> float:
    """Returns for how long this process has run."""
    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        started = int(fields[19]) / os.sysconf("SC_CLK_TCK")
        return time.clock_gettime(time.CLOCK_BOOTTIME) - started
    except (OSError, AttributeError):  # not on macOS
        return time.perf_counter() - _imported


@contextmanager
def reported() -> Iterator[None]:
    """Makes its body a command: what goes wrong ends the process with one line on stderr.

    A user error ends with `error: …` and status 2; a signal with the status that shells give it,
    130 for Ctrl-C; a reader of standard output that went away, `| head`, with 141 and no line.
    """
    terminal.prepare()
    _began[:] = [time.perf_counter() - _process_seconds()]
    gc.set_threshold(_OBJECTS_BETWEEN_COLLECTIONS)
    try:
        with _in_one_line(), terminal.interruptible():
            try:
                yield
            finally:
                _flush(sys.exc_info()[1])
    finally:
        _began.clear()
        gc.freeze()  # Python looks for cycles at its end, through all that torch imported
        terminal.survive()  # Python writes out what is left at its end


def _flush(error: BaseException | None) -> None:
    """Writes out standard output; where an error is under way, that is the one to report."""
    try:
        terminal.flush()
    except OutputLost:
        if error is None or isinstance(error, SystemExit):  # e.g. after argparse's help
            raise


@contextmanager
def _in_one_line() -> Iterator[None]:
    try:
        yield
    except BaseException as error:
        line = one_line(error)
        struck = error if isinstance(error, KeyboardInterrupt) else None
        if line is None and not isinstance(error, SystemExit):
            struck = interruption(error)
        if struck is not None:
            ended = struck if isinstance(struck, Interrupted) else Interrupted(signal.SIGINT)
            print(ended, file=sys.stderr)
            raise SystemExit(ended.status) from None
        if line is None:
            raise
        if isinstance(error, OutputLost) and error.errno == errno.EPIPE:
            raise SystemExit(terminal.EXIT_READER_GONE) from None
        if not isinstance(error, AlreadyReported):
            print(f"error: {line}", file=sys.stderr)
        raise SystemExit(EXIT_USER_ERROR) from None
