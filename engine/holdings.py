"""The pages of requests: what they own, what they share with the prefix tree, and what comes back when steps retire."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

import numpy as np

from microserve.engine.request import HOLDING, NEVER
from microserve.kv.pages import EMPTY, IntegrityError, PageState

if TYPE_CHECKING:
    from microserve.engine.request import Request
    from microserve.engine.roster import Roster
    from microserve.kv.cache import KvCache


class Holdings:
    """Moves pages between requests and the cache, as steps are launched and retire."""

    def __init__(self, cache: KvCache, roster: Roster) -> None:
        self.cache = cache
        self.builders: dict[tuple[int, bytes], Request] = {}
        """Prefilling requests, by where their uncached part begins and its first page."""
        self._roster = roster
        self._page_size = cache.page_size
        self._unretired: deque[int] = deque()
        self._done: set[int] = set()
        """Steps that are over, while an older one is not."""
        self._returning: deque[tuple[int, int]] = deque()
        """(step, pages): what was let go and comes back when that step retires."""
        self._forgotten: list[int] = []
        """Sequences that the executor is to forget with the next step."""

    # --- steps -------------------------------------------------------------------------------------------------------

    @property
    def in_flight(self) -> bool:
        """Whether steps are launched that may touch pages."""
        return bool(self._unretired)

    def begin_step(self) -> tuple[int, tuple[int, ...]]:
        """A step is about to be launched: its number, and the sequences that the executor forgets with it."""
        step = self.cache.begin_step()
        self._unretired.append(step)
        forgotten = tuple(self._forgotten)
        self._forgotten.clear()
        return step, forgotten

    def forget_again(self, sequences: tuple[int, ...]) -> None:
        """The executor may not have got as far as to forget them; to forget twice does no harm."""
        self._forgotten.extend(sequences)

    def retire(self, step: int) -> None:
        """`step` touches no page any more. The cache is told in order: a step may fail while an older one runs."""
        self._done.add(step)
        while self._unretired and self._unretired[0] in self._done:
            step = self._unretired.popleft()
            self._done.discard(step)
            self.cache.retire_step(step)
            while self._returning and self._returning[0][0] <= step:
                self._returning.popleft()

    def coming(self) -> int:
        """Pages that return when the steps in flight retire."""
        if not self._unretired:
            return 0
        leaving = sum(request.page_count for request in self._roster.live.values() if request.state not in HOLDING)
        return leaving + sum(pages for _, pages in self._returning)

    # --- requests ----------------------------------------------------------------------------------------------------

    def builds(self, request: Request, cached: int) -> tuple[int, bytes]:
        """The part of the prefix tree that `request` computes, if `cached` tokens of it are there."""
        return cached, request.history[cached : cached + self._page_size].tobytes()

    def insert(self, request: Request) -> None:
        """Complete pages with complete KV enter the prefix tree."""
        whole = min(request.computed, request.known) // self._page_size
        if request.lock is not None and whole > request.shared_pages:
            tokens = request.history[: whole * self._page_size]
            request.share(self.cache.insert(tokens, request.pages[:whole], request.lock))
        prefilled = request.computed >= request.known or request.generated > 0 or request.state not in HOLDING
        request.insert_at = NEVER if prefilled or request.stopped else request.known
        if prefilled and request.builds is not None:
            if self.builders.get(request.builds) is request:
                del self.builders[request.builds]
            request.builds = None

    def settle(self, request: Request) -> None:
        """Lets go of the pages of a request that no longer runs, once no launched step names them."""
        if request.in_flight:
            return
        if request.lock is not None:
            self.insert(request)
            if self._unretired:
                self._returning.append((self._unretired[-1], request.page_count))
            self.cache.free(request.pages[request.shared_pages :])
            self.cache.release(request.lock)
            if request.introduced:
                self._forgotten.append(request.id)
            request.let_go()
        if request.final:
            self._roster.live.pop(request.id, None)

    def check_integrity(self, *, deep: bool = True) -> None:
        """Raises `IntegrityError` when a page has two owners or none. Not `deep`: compares counts alone."""
        self.cache.check_integrity(deep=deep)
        parts = [request.pages[request.shared_pages :] for request in self._roster.live.values()]
        owned = sum(map(len, parts))
        if deep and len(np.unique(np.concatenate([EMPTY, *parts]))) != owned:
            raise IntegrityError("a page belongs to two requests")
        counted = self.cache.allocator.count(PageState.OWNED)
        # With a step in flight, pages that were let go count as owned until it has retired.
        if owned > counted or (owned < counted and not self._unretired):
            raise IntegrityError(f"requests own {owned} pages; the cache counts {counted}")
        for builder in self.builders.values():
            if builder.id not in self._roster.live:
                raise IntegrityError(f"request {builder.id} builds a prefix, and is not live")
