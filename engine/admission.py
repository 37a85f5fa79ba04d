"""Who of the line is admitted to the next step, and with which pages."""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING

import numpy as np

from microserve.engine.request import HOLDING, NEVER, State
from microserve.runtime.errors import InternalError

if TYPE_CHECKING:
    from collections import Counter

    from microserve.engine.holdings import Holdings
    from microserve.engine.limits import Limits
    from microserve.engine.plan import PageArray
    from microserve.engine.request import Request
    from microserve.engine.roster import Roster
    from microserve.kv.cache import PrefixLock

_FEW_PREFILLS = 8
"""Prompts that are admitted though the budget is spoken for, so that a short one is not behind every long one."""
_LOOKAHEAD = 16
"""Requests that wait for another's prefix and may be passed, per step."""
_RETRY_STEPS = 16
"""Steps after which a request that found no pages looks again, even if no page came back."""


class _Outcome(enum.Enum):
    ADMITTED = enum.auto()
    DEFERRED = enum.auto()
    """Not now: another request computes its prefix, or its received KV has just gone into the prefix tree."""
    NO_PAGES = enum.auto()


class Admission:
    """Takes requests out of the line. `counts` gets what was looked up and found."""

    def __init__(self, roster: Roster, holdings: Holdings, limits: Limits, counts: Counter[str]) -> None:
        self._roster = roster
        self._holdings = holdings
        self._limits = limits
        self._counts = counts
        self._cache = holdings.cache
        self._page_size = holdings.cache.page_size
        self._blocked_at: int | None = None
        """Pages that were available when the head of the line did not fit."""
        self._blocked_steps = 0
        self._short: Request | None = None

    @property
    def short(self) -> bool:
        """Whether somebody in line waits for pages: until it has them, no lease and no send takes any."""
        return self._short is not None

    def places(self) -> int:
        """Requests that may run besides those that do. A send takes no place: it comes out of turn."""
        roster = self._roster
        sends = sum(request.sends for request in roster.prefilling.values())
        return self._limits.max_running - roster.running + sends

    def ended(self, request: Request) -> None:
        """`request` has ended: others may fit now."""
        self._blocked_at = None
        if self._short is request:
            self._short = None

    def admit(self, budget: int, step: int) -> None:
        """Admits from the head of the line, for a step that has `budget` tokens for prompts.

        Passed are those who wait for a prefix; and whoever needs pages is passed by those who hold theirs already:
        they give them back by running.
        """
        roster = self._roster
        if not roster.waiting:
            return
        places = self.places()
        if places <= 0:
            return
        # Many sends must not keep others from being admitted, either.
        prefilling = [request.remaining for request in roster.prefilling.values() if not request.sends]
        count, backlog = len(prefilling), sum(prefilling)
        short = False
        for request in roster.waiting.first(places + _LOOKAHEAD):
            if places == 0 or (count >= _FEW_PREFILLS and backlog >= budget):
                return
            outcome = self._try(request, step)
            if outcome is _Outcome.NO_PAGES:
                short = True
                break
            if outcome is _Outcome.ADMITTED:
                places -= 1
                count += 1
                backlog += request.remaining
        if short:
            for request in roster.waiting.received()[:places]:
                self._admit_received(request, step)

    def _try(self, request: Request, step: int) -> _Outcome:
        if request.kv is not None:
            return self._admit_received(request, step)
        if self._defers(request):
            return _Outcome.DEFERRED
        if request.in_flight or self._blocked():
            return _Outcome.NO_PAGES
        return self._admit(request, step)

    def _blocked(self) -> bool:
        """Whether looking for pages again would be in vain: a look-up costs more, the longer the prompt."""
        if self._blocked_at is None or not self._roster.running:
            return False
        self._blocked_steps += 1
        if self._blocked_steps < _RETRY_STEPS and self._cache.available() <= self._blocked_at:
            return True
        self._blocked_at = None
        return False

    def _admit(self, request: Request, step: int) -> _Outcome:
        known, cache, builders = request.known, self._cache, self._holdings.builders
        # At least the last token is computed: its logits choose the next one.
        lock = cache.acquire(request.history[:known], known - 1)
        cached = lock.length
        key = self._holdings.builds(request, cached)
        if (owner := builders.get(key)) is not None and self._defer(request, owner, cached):
            cache.release(lock)
            return _Outcome.DEFERRED
        needed = -(-known // self._page_size) - len(lock.pages)
        # Every running request may need a page soon; without that reserve, the newcomer would be preempted at once.
        pages = cache.allocate(needed) if cache.available() >= needed + self._roster.running else None
        if pages is None:
            cache.release(lock)
            self._blocked_at = cache.available()
            self._blocked_steps = 0
            self._short = request
            return _Outcome.NO_PAGES
        self._blocked_at = self._short = None
        if request.cached is None:
            request.cached = min(cached, request.prompt_length)
            self._counts["hit"] += cached
            self._counts["lookup"] += known
        self._begin(request, lock, pages, step)
        request.builds = key
        builders[key] = request
        return _Outcome.ADMITTED

    def _admit_received(self, request: Request, step: int) -> _Outcome:
        """Admits a request with the KV that other engines sent.

        The last token is computed in any case, and never into a page that the tree shares.
        """
        kv, known, cache = request.kv, request.known, self._cache
        if kv is None:
            raise InternalError(f"request {request.sub_id or request.id} has no received KV")
        # Only a prompt that is longer than the one that it was prepared for lacks pages.
        more = cache.allocate(max(0, -(-known // self._page_size) - kv.pages))
        request.kv = None
        if more is None:
            kv.keep()
            return _Outcome.DEFERRED
        lock, pages, begin = kv.take()
        matched = lock.length
        if matched > known - 1:
            whole, lock = lock, cache.acquire(request.history[:known], known - 1)
            cache.release(whole)
            begin = lock.length  # the page behind it is a fresh one
        request.cached = min(lock.length, request.prompt_length)
        self._counts["hit"] += lock.length
        self._counts["lookup"] += known
        self._begin(request, lock, np.concatenate((pages, more)) if len(more) else pages, step)
        request.scheduled = request.computed = max(lock.length, min(begin, known - 1))
        return _Outcome.ADMITTED

    def _begin(self, request: Request, lock: PrefixLock, pages: PageArray, step: int) -> None:
        self._roster.waiting.discard(request)
        request.move(State.PREFILL)
        # The last token is never an input.
        request.hold(lock, pages, self._page_size, -(-(request.end - 1) // self._page_size))
        request.insert_at = request.known
        request.progressed = step
        self._roster.prefilling[request.id] = request

    # --- prefixes that others compute --------------------------------------------------------------------------------

    def _defer(self, request: Request, owner: Request, cached: int) -> bool:
        """Whether `request` should wait for `owner`, which computes at least half of what `request` needs."""
        length = min(owner.known, request.known - 1)
        differ = np.flatnonzero(owner.history[:length] != request.history[:length])
        common = int(differ[0]) if len(differ) else length
        common -= common % self._page_size
        if 2 * (common - cached) < request.known - cached:
            return False
        request.waits_for = (owner, common)
        return self._defers(request)

    def _defers(self, request: Request) -> bool:
        """Whether what `request` waits for is still on its way."""
        if request.waits_for is None:
            return False
        owner, until = request.waits_for
        if owner.state in HOLDING and owner.shared_pages * self._page_size < until and owner.insert_at != NEVER:
            owner.insert_at = min(owner.insert_at, until)
            return True
        request.waits_for = None
        return False
