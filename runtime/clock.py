"""Time as a collaborator: production code is given a clock, tests give it one that they move."""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    """Monotonic seconds. The origin means nothing; only differences do."""

    def __call__(self) -> float: ...


def monotonic() -> float:
    """The machine's monotonic clock, in seconds."""
    return time.monotonic()


class ManualClock:
    """A clock that stands still until a test advances it."""

    def __init__(self, start: float = 1000.0) -> None:
        self._now = start

    def __call__(self) -> float:
        return self._now

    def advance(self, seconds: float) -> None:
        if seconds < 0:
            raise ValueError(f"time cannot go back ({seconds} s)")
        self._now += seconds
