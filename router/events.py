"""What happened in the fleet, kept for operators: the last few hundred events, numbered."""

from __future__ import annotations

import time
from collections import Counter, deque
from typing import TYPE_CHECKING

from microserve.runtime.clock import Clock, monotonic
from microserve.runtime.messages import Events, FleetEvent

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

_MOST = 1000


class EventLog:
    """The newest events. A reader asks for what came after the number that it knows."""

    def __init__(self, *, now: Callable[[], float] = time.time, clock: Clock = monotonic, most: int = _MOST) -> None:
        self._events: deque[FleetEvent] = deque(maxlen=most)
        self._last = 0
        self._now = now
        self._clock = clock
        self._counts: Counter[str] = Counter()
        self._held: dict[tuple[str, str, str], tuple[float, int]] = {}

    def add(self, kind: str, *, engine: str = "", epoch: int = 0, detail: str = "", every: float | None = None) -> None:
        """Something happened. With `every`, the same kind and detail of one engine is told at most once in so many
        seconds, and then with how often it happened: a flood must not wash out the rest."""
        self._counts[kind] += 1
        if every is not None:
            now = self._clock()
            what = (kind, engine, detail)
            told, held = self._held.get(what, (-every, 0))
            if now - told < every:
                self._held[what] = (told, held + 1)
                return
            self._held[what] = (now, 0)
            if held:
                detail = f"{detail} (and {held} more before)"
        self._last += 1
        self._events.append(
            FleetEvent(seq=self._last, at=self._now(), kind=kind, engine=engine, epoch=epoch, detail=detail)
        )

    def after(self, seq: int, limit: int) -> Events:
        """Events with a larger number, oldest first, at most the newest `limit`."""
        # Numbers have no gaps: how many are newer follows from the last one.
        newer = min(max(0, self._last - seq), limit, len(self._events))
        start = len(self._events) - newer
        return Events(events=[self._events[index] for index in range(start, len(self._events))], last=self._last)

    @property
    def counts(self) -> Mapping[str, int]:
        """Events by kind since the start, told or held back."""
        return self._counts
