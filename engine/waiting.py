"""Who waits for a place: those that ran or hold pages first, then new ones, both in order of arrival; whose time runs
out when; and how long the wait may be.
"""

from __future__ import annotations

import bisect
import enum
import heapq
import itertools
from collections import OrderedDict
from typing import TYPE_CHECKING

from microserve.engine.request import State

if TYPE_CHECKING:
    from collections.abc import Mapping

    from microserve.engine.request import Request


class WaitingLine:
    """The line in front of the engine. Adding, removing and looking at the head cost the same however long it is."""

    def __init__(self) -> None:
        self._preempted: list[Request] = []
        """Sorted by arrival. Each of them arrived before every new request that it must not lose its turn to."""
        self._new: OrderedDict[int, Request] = OrderedDict()

    def __len__(self) -> int:
        return len(self._preempted) + len(self._new)

    @property
    def new(self) -> int:
        """How many have never run."""
        return len(self._new)

    def add(self, request: Request) -> None:
        """At its place: the end, or among the preempted; who has received KV holds pages and goes there, too."""
        if request.state is State.PREEMPTED or request.kv is not None:
            bisect.insort(self._preempted, request, key=lambda other: other.id)
            return
        late = bool(self._new) and request.id < next(reversed(self._new))
        self._new[request.id] = request
        if late:
            # It waited for KV that did not come: its turn is that of its arrival.
            self._new = OrderedDict(sorted(self._new.items()))

    def discard(self, request: Request) -> None:
        """Takes `request` out, if it is in line."""
        if self._new.pop(request.id, None) is None and request in self._preempted:
            self._preempted.remove(request)

    def first(self, count: int) -> list[Request]:
        """The `count` next in line."""
        return list(itertools.islice(itertools.chain(self._preempted, self._new.values()), count))

    def received(self) -> list[Request]:
        """Those in line that hold the pages they need: their KV came from other engines."""
        return [request for request in self._preempted if request.kv is not None]

    def __contains__(self, request: Request) -> bool:
        return request.id in self._new or request in self._preempted

    def tokens(self) -> int:
        """Tokens that all who wait have to compute, as far as is known: without what the prefix tree may hold."""
        line = itertools.chain(self._preempted, self._new.values())
        return sum(request.known if request.kv is None else request.known - request.kv.begin for request in line)


class Budget(enum.Enum):
    """Which budget a deadline belongs to."""

    ADMIT = "admit_by"
    FIRST_TOKEN = "first_token_by"
    WHOLE = "deadline"


class Deadlines:
    """Deadlines of live requests, soonest first. An entry of a request that has ended is dropped when it comes up."""

    def __init__(self, live: Mapping[int, Request]) -> None:
        self._live = live
        self._heap: list[tuple[float, int, str]] = []

    def watch(self, request: Request) -> None:
        """Adds the deadlines that `request` has."""
        for budget in Budget:
            at: float | None = getattr(request, budget.value)
            if at is not None:
                heapq.heappush(self._heap, (at, request.id, budget.value))
        if len(self._heap) > 64 + 4 * len(self._live):
            self._heap = [entry for entry in self._heap if entry[1] in self._live]
            heapq.heapify(self._heap)

    def expired(self, now: float) -> list[tuple[Request, Budget]]:
        """Takes out those whose time is over."""
        found = []
        while self._heap and self._heap[0][0] <= now:
            _, identity, budget = heapq.heappop(self._heap)
            if (request := self._live.get(identity)) is not None:
                found.append((request, Budget(budget)))
        return found

    def next(self) -> float | None:
        """When the next one is due."""
        while self._heap and self._heap[0][1] not in self._live:
            heapq.heappop(self._heap)
        return self._heap[0][0] if self._heap else None


class Pace:
    """The recent time from one ending to the next."""

    def __init__(self) -> None:
        self.seconds = 0.05
        """An assumption, until there is a measurement."""
        self._last: float | None = None

    def ended(self, now: float) -> None:
        """A request has ended."""
        if self._last is not None:
            self.seconds += 0.1 * (now - self._last - self.seconds)
        self._last = now
