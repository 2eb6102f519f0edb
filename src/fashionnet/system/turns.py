"""Functions that take turns: each runs in a thread of its own, and one of them at a time."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, Generic, TypeVar

T = TypeVar("T")

_local = threading.local()


class Worker(Generic[T]):
    """A function that runs in its turns alone, and pauses where it calls `pause`.

    Args:
        function: what to run.
        saved: called in the thread at the end of each turn; it returns a function that is called at
            the start of the next one, to restore what other threads change.

    Attributes:
        request: what the function passed to `pause`; None before its first turn and at its end.
        error: what it raised, if it did.
        is_ended: whether it returned or raised.
    """

    def __init__(self, function: Callable[[], T], saved: Callable[[], Callable[[], None]]) -> None:
        self.request: Any = None
        self.error: BaseException | None = None
        self.is_ended = False
        self._function, self._saved = function, saved
        self._result: T | None = None
        self._resumed, self._paused = threading.Semaphore(0), threading.Semaphore(0)
        # A second Ctrl-C leaves paused threads behind, which must not keep the process.
        self._thread = threading.Thread(target=self._run, daemon=True)

    def resume(self) -> None:
        """Gives the function a turn, and waits until it pauses or ends."""
        self.request = None
        restore = self._saved()
        if self._thread.ident is None:
            self._thread.start()
        else:
            self._resumed.release()
        self._paused.acquire()
        restore()

    def result(self) -> T:
        """Returns what the function returned, or raises what it raised; it has ended."""
        if self.error is not None:
            raise self.error
        return self._result  # type: ignore[return-value]

    def _run(self) -> None:
        _local.worker = self
        try:
            self._result = self._function()
        except BaseException as error:
            self.error = error
        self.is_ended = True
        self._paused.release()

    def _pause(self, request: object) -> None:
        self.request = request
        restore = self._saved()
        self._paused.release()
        self._resumed.acquire()
        restore()


def pause(request: object) -> None:
    """Ends the turn of the function that calls it; returns when it has the next one."""
    worker: Worker[Any] = _local.worker
    worker._pause(request)
