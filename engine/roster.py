"""Where every request of the scheduler is. Decides nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

from microserve.engine.request import ADMITTED, State
from microserve.engine.waiting import Deadlines, WaitingLine
from microserve.kv.pages import IntegrityError
from microserve.runtime.messages import Load

if TYPE_CHECKING:
    from collections import Counter

    from microserve.engine.request import Request
    from microserve.kv.cache import CacheStatistics


class Roster:
    """Live requests by id, and by place. A request's state says in which place it is."""

    def __init__(self) -> None:
        self.live: dict[int, Request] = {}
        """Every request that is not final, or still named by a launched step."""
        self.waiting = WaitingLine()
        self.prefilling: dict[int, Request] = {}
        self.decoding: dict[int, Request] = {}
        self.receiving: dict[int, Request] = {}
        """Requests whose KV is on its way."""
        self.sending: dict[int, Request] = {}
        """Sends that compute no more and keep their pages."""
        self.sends = 0
        """Sends that are not final."""
        self.deadlines = Deadlines(self.live)

    @property
    def running(self) -> int:
        """Requests that steps compute for."""
        return len(self.prefilling) + len(self.decoding)

    def keep(self, request: Request) -> None:
        """Nothing more is launched for a send that was prefilling."""
        self.prefilling.pop(request.id, None)
        request.move(State.SENDING)
        self.sending[request.id] = request

    def leave(self, request: Request) -> None:
        """Takes `request` out of its place, before it moves to a final state."""
        self.waiting.discard(request)
        self.prefilling.pop(request.id, None)
        self.decoding.pop(request.id, None)
        self.receiving.pop(request.id, None)
        if self.sending.pop(request.id, None) is not None or (request.sends and request.state is State.PREFILL):
            self.sends -= 1

    def load(self, pages: CacheStatistics, counts: Counter[str], steps: int) -> Load:
        """A snapshot for others. Walks the line, so not for every step."""
        return Load(
            running=self.running,
            waiting=len(self.waiting) + len(self.receiving),
            queued_tokens=self.waiting.tokens() + sum(request.remaining for request in self.prefilling.values()),
            free_pages=pages.free,
            owned_pages=pages.owned,
            cached_pages=pages.cached,
            leased_pages=pages.leased,
            quarantined_pages=pages.quarantined,
            total_pages=pages.total,
            generated_tokens=counts["generated"],
            prefilled_tokens=counts["prefilled"],
            prefix_hit_tokens=counts["hit"],
            prefix_lookup_tokens=counts["lookup"],
            preemptions=counts["preemptions"],
            steps=steps,
        )

    def check_integrity(self) -> None:
        """Raises `IntegrityError` when a request is not where its state says."""
        places = {
            State.PREFILL: self.prefilling,
            State.DECODE: self.decoding,
            State.RECEIVING: self.receiving,
            State.SENDING: self.sending,
        }
        for request in self.live.values():
            for state, place in places.items():
                if (request.id in place) is not (request.state is state):
                    raise IntegrityError(f"request {request.id} is {request.state.value}, and not where that belongs")
            if (request in self.waiting) is not (request.state in (State.WAITING, State.PREEMPTED)):
                raise IntegrityError(f"request {request.id} is {request.state.value}, which is wrong for the line")
            if request.final and not request.in_flight:
                raise IntegrityError(f"request {request.id} is {request.state.value} and still held")
            if request.state in ADMITTED and not request.computed <= request.scheduled <= request.page_capacity:
                raise IntegrityError(f"request {request.id} computes beyond its {request.page_capacity} positions")
        if self.sends != sum(request.sends and not request.final for request in self.live.values()):
            raise IntegrityError(f"{self.sends} sends are counted, and others are live")
        for place in places.values():
            if lost := place.keys() - self.live.keys():
                raise IntegrityError(f"requests {sorted(lost)} run and are not live")
