"""Sends as the scheduler sees them: prompts whose KV is computed for another engine, page by page, without a token."""

from __future__ import annotations

from typing import TYPE_CHECKING

from microserve.engine.outputs import Computed, Output, Ready
from microserve.engine.request import NEVER, State

if TYPE_CHECKING:
    from collections import Counter
    from collections.abc import Callable

    from microserve.engine.holdings import Holdings
    from microserve.engine.request import Request
    from microserve.engine.roster import Roster


class SendRequests:
    """Begins and stops sends, and tells which of their pages can go out. `tell` takes the outputs."""

    def __init__(
        self, roster: Roster, holdings: Holdings, counts: Counter[str], tell: Callable[[Output], None]
    ) -> None:
        self._roster = roster
        self._holdings = holdings
        self._counts = counts
        self._tell = tell
        self._page_size = holdings.cache.page_size

    def hold(self, request: Request, *, short: bool) -> int:
        """Locks what is cached of the prompt, and takes pages for the rest, unless others are `short` of them.

        Returns how many pages were missing; after 0 comes `begin`.
        """
        cache, known = self._holdings.cache, request.known
        lock = cache.acquire(request.history[:known])
        needed = -(-known // self._page_size) - len(lock.pages)
        # As for an admission: every running request may need a page soon. What is cached takes none.
        room = not needed or (not short and cache.available() >= needed + self._roster.running)
        pages = cache.allocate(needed) if room else None
        if pages is None:
            cache.release(lock)
            return max(1, needed)
        self._counts["hit"] += lock.length
        self._counts["lookup"] += known
        request.hold(lock, pages, self._page_size, 0)
        request.cached = lock.length
        return 0

    def begin(self, request: Request, step: int) -> None:
        """It is one of ours from now on: what is cached can go out, and the rest is computed."""
        roster = self._roster
        roster.sends += 1
        request.end = NEVER
        request.insert_at = request.known
        request.progressed = step
        if request.remaining:
            request.move(State.PREFILL)
            roster.prefilling[request.id] = request
            self._build(request)
        else:
            roster.keep(request)
        self.tell_ready(request)

    def stop(self, request: Request) -> None:
        """Computes no more of it; its pages are kept. No effect after the end."""
        if request.final or request.stopped:
            return
        request.stopped = True
        request.insert_at = NEVER
        if request.state is State.PREFILL:
            self._roster.keep(request)

    def advance(self, request: Request, computed: int) -> None:
        """A step has retired that computed its KV up to there."""
        # A stopped one may have lost a step before this one: what follows a gap is nobody's KV.
        if not request.stopped:
            request.computed = computed
            self.tell_ready(request)

    def tell_ready(self, request: Request) -> None:
        """Whole pages with complete KV enter the tree, and may be sent: from there on they are the tree's pages."""
        if request.computed > request.shared_pages * self._page_size:
            self._holdings.insert(request)
            if request.builds is not None:
                self._build(request)
        complete = request.computed >= request.known
        until = -(-request.computed // self._page_size) if complete else request.computed // self._page_size
        first = request.ready_pages
        if until > first:
            request.ready_pages = until
            self._tell(Output(request, Ready(first, request.pages[first:until].copy()), False))
        if complete:
            self._tell(Output(request, Computed(request.cached or 0), False))

    def _build(self, request: Request) -> None:
        """Whoever needs the part of the prefix tree that it computes next may wait for it."""
        builders = self._holdings.builders
        if request.builds is not None and builders.get(request.builds) is request:
            del builders[request.builds]
        request.builds = self._holdings.builds(request, request.shared_pages * self._page_size)
        builders.setdefault(request.builds, request)
