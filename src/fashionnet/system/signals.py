"""Signals that end a run: first the step under way is finished and a checkpoint written."""

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
SIGNALS = tuple(
    getattr(signal, name)
    for name in ("SIGINT", "SIGHUP", "SIGTERM", "SIGUSR1", "SIGUSR2")
    if hasattr(signal, name)
)


class Stop:
    """Whether a signal asked the run to end.

    While `deferred`, a signal is only noted in `signal`, for the loop to see at its next step;
    otherwise, and at a second Ctrl-C, it raises `Interrupted` where it strikes.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._is_deferred = False

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Notes or raises; what `signal.signal` calls."""
        again = number == signal.SIGINT and self.signal == signal.SIGINT
        if self._is_deferred and not again:
            if self.signal is None:  # Slurm may send several; the first one counts
                self.signal = number
        elif not terminal.is_postponed(number, frame):
            raise Interrupted(number)

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Holds signals back while the body runs; one that the body did not act on strikes after.

        Where the body raises, signals stay held back: torchrun ends the processes of a job with one
        as soon as any of them failed, and the error must be recorded first.

        Raises:
            Interrupted: a signal came, and the body ended without raising.
        """
        self._is_deferred = True
        yield
        self._is_deferred = False
        self.raise_if_set()

    @contextlib.contextmanager
    def raising(self) -> Iterator[None]:
        """Lets signals strike at once in the body, within `deferred`: nothing can be half done."""
        was_deferred, self._is_deferred = self._is_deferred, False
        try:
            yield
        finally:
            self._is_deferred = was_deferred

    def raise_if_set(self) -> None:
        """Raises `Interrupted` if a signal came."""
        if self.signal is not None:
            raise Interrupted(self.signal)


@contextlib.contextmanager
def watched() -> Iterator[Stop]:
    """Catches the signals that end a run while the body runs, then puts the handlers back.

    A handler that was there before has its turn once the body is left: submitit's puts the job
    back into Slurm's queue, and the run must be saved by then. A signal that is ignored stays so:
    `nohup` ignores SIGHUP, a shell the Ctrl-C of what it runs in the background. Python lets only
    the main thread catch signals; in another they stay as they are.
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    heard = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, stop.handle) for number in heard}
    try:
        try:
            yield stop
        finally:
            for number, handler in before.items():
                signal.signal(number, handler if handler is not None else signal.SIG_DFL)
    except Interrupted as error:
        handler = before.get(error.number)
        if callable(handler) and handler is not signal.default_int_handler:
            handler(error.number, None)
        raise
