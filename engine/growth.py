"""Pages for sequences that grow, and who gives way when there are none."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

from microserve.engine.request import State
from microserve.kv.pages import PageState

if TYPE_CHECKING:
    from collections import Counter
    from collections.abc import Callable

    from microserve.engine.holdings import Holdings
    from microserve.engine.request import Request
    from microserve.engine.roster import Roster


class Growth:
    """Feeds decoding requests. `counts` gets the preemptions."""

    def __init__(self, roster: Roster, holdings: Holdings, counts: Counter[str]) -> None:
        self._roster = roster
        self._holdings = holdings
        self._counts = counts
        self._cache = holdings.cache
        self._page_size = holdings.cache.page_size

    def feed(self, finish: Callable[[Request], None]) -> bool:
        """A page for every decoding request whose next position needs one. False: there were not enough.

        `finish` ends a request that cannot go on, because it has the pool for itself already.
        """
        roster, cache = self._roster, self._cache
        needy = [
            request
            for request in roster.decoding.values()
            if request.scheduled == request.page_capacity and request.scheduled < request.end - 1
        ]
        if not needy:
            return True
        pages = cache.allocate(len(needy))
        if pages is not None:
            for request, page in zip(needy, pages.tolist(), strict=True):
                request.add_page(page, self._page_size)
            return True
        # Pages that come back when the steps in flight retire: nobody is preempted for as many.
        coming = self._holdings.coming()
        in_flight = self._holdings.in_flight
        for request in sorted(needy, key=lambda request: request.id):
            while request.state is State.DECODE:
                if (page_array := cache.allocate(1)) is not None:
                    request.add_page(int(page_array[0]), self._page_size)
                    break
                if coming > 0:
                    coming -= 1
                    break
                if roster.running == 1 and not self._awaits_others():
                    if not in_flight:
                        # Nothing is left to take: it has the pool for itself, except for what is pinned.
                        finish(request)
                    break
                victim = self._victim()
                held = victim.page_count
                self._preempt(victim)
                if in_flight and victim is not request:
                    coming += held
        return False

    def _awaits_others(self) -> bool:
        """Whether pages are held by sends or leases, which give them back in time."""
        pages = self._cache.allocator.count
        return self._roster.sends > 0 or pages(PageState.LEASED) + pages(PageState.QUARANTINED) > 0

    def _victim(self) -> Request:
        """Whoever arrived last. A send is spared: its pages may be on the wire, and it ends soon."""
        admitted = itertools.chain(self._roster.prefilling.values(), self._roster.decoding.values())
        return max((other for other in admitted if not other.sends), key=lambda other: other.id)

    def _preempt(self, victim: Request) -> None:
        roster = self._roster
        self._counts["preemptions"] += 1
        roster.prefilling.pop(victim.id, None)
        roster.decoding.pop(victim.id, None)
        victim.move(State.PREEMPTED)
        self._holdings.settle(victim)
        roster.waiting.add(victim)
