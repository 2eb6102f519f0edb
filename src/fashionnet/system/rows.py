"""Which rows of a batch this process computes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Rows:
    """The rows of a global batch that this process computes.

    Attributes:
        start, stop: the first row, and the one after the last.
        total: rows of the whole batch.
    """

    start: int
    stop: int
    total: int

    @property
    def part(self) -> slice:
        return slice(self.start, self.stop)
