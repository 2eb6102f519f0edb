"""Signals that end a run, after the current step is finished and a checkpoint is written."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

from fashionnet.errors import Interrupted
from fashionnet.system import terminal

# Ctrl-C; a terminal that is closed; `kill` and Slurm's end of time; Slurm's and submitit's
# warnings before it.
SIGNALS = (signal.SIGINT, signal.SIGHUP, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


class Stop:
    """Whether a signal asked the run to end.

    Inside `deferred`, a signal is only stored in `signal`, for the loop to check after each step.
    Otherwise, and at a second Ctrl-C, it raises `Interrupted` at once.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._is_deferred = False

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Stores the signal or raises; the handler that `signal.signal` calls."""
        again = number == signal.SIGINT and self.signal == signal.SIGINT
        if self._is_deferred and not again:
            if self.signal is None:  # Slurm may send several; the first one counts
                self.signal = number
        elif not terminal.is_postponed(number, frame):
            raise Interrupted(number)

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Holds signals back in the body; one that the body did not act on is raised at its end.

        If the body raises, signals stay held back: torchrun signals the processes of a job as soon
        as one of them fails, and the error must be recorded first.

        Raises:
            Interrupted: a signal arrived, and the body ended without raising.
        """
        self._is_deferred = True
        yield
        self._is_deferred = False
        self.raise_if_set()

    @contextlib.contextmanager
    def raising(self) -> Iterator[None]:
        """Lets signals raise at once in the body, within `deferred`: no work can be half done."""
        was_deferred, self._is_deferred = self._is_deferred, False
        try:
            yield
        finally:
            self._is_deferred = was_deferred

    def raise_if_set(self) -> None:
        """Raises `Interrupted` if a signal arrived."""
        if self.signal is not None:
            raise Interrupted(self.signal)


@contextlib.contextmanager
def watched() -> Iterator[Stop]:
    """Catches the signals that end a run while the body runs, then restores the handlers.

    The earlier handler is called once the body has ended: submitit's puts the job back into Slurm's
    queue, and the run must be saved by then. A signal that is ignored stays ignored: `nohup`
    ignores SIGHUP, and a shell ignores Ctrl-C for its background jobs. Python lets only the main
    thread catch signals; other threads leave the handlers alone.
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    caught = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, stop.handle) for number in caught}
    try:
        try:
            yield stop
        finally:
            for number, handler in before.items():
                signal.signal(number, handler if handler is not None else signal.SIG_DFL)
    except Interrupted as error:
        handler = before.get(signal.Signals(error.number))
        if callable(handler) and handler is not signal.default_int_handler:
            handler(error.number, None)
        raise
