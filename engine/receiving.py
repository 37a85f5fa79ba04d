"""The receiver's side of moving KV, in the step thread: leases, and those who wait for what is on its way.

    prepare ──▶ lease ──▶ start: the request waits until [matched, begin) has really arrived ──▶ first in line
                     └──▶ commit: what arrived enters the prefix tree

What does not come (the sender failed, the router gave it up, the wait is over) is computed here, in fresh pages: what
did arrive enters the prefix tree, the lease ends, and the request goes on like any other. So an answer never depends
on the network.
"""

from __future__ import annotations

import heapq
import itertools
from collections import deque
from typing import TYPE_CHECKING

import numpy as np

from microserve.engine.link import peer_name
from microserve.engine.outputs import CommitTicket, Opened, Output, Prepare
from microserve.engine.request import Request
from microserve.runtime.errors import Busy, Cancelled, InvalidRequest, LeaseNotFound, LeaseTooLarge, StaleEpoch
from microserve.runtime.log import get_logger
from microserve.runtime.messages import Committed

if TYPE_CHECKING:
    from collections.abc import Callable

    from microserve.engine.scheduler import Scheduler
    from microserve.kv.cache import PrefixLock
    from microserve.kv.leases import Lease, LeaseTable
    from microserve.kv.pages import PageArray

_RETRY = 0.05
"""Seconds between attempts while preparations wait for pages that come back by themselves."""

_log = get_logger(__name__)


class _Kv:
    """The KV of one request. Implements `request.ReceivedKv`."""

    __slots__ = ("_lease", "_receiving", "begin", "pages")

    def __init__(self, receiving: Receiving, lease: Lease, begin: int) -> None:
        self._receiving = receiving
        self._lease = lease
        self.begin = begin
        self.pages = len(lease.lock.pages) + len(lease.pages) + len(lease.reserve)

    def take(self) -> tuple[PrefixLock, PageArray, int]:
        lock, pages = self._receiving.leases.consume(self._lease, self._receiving.now)
        return lock, pages, self.begin

    def keep(self) -> None:
        self._receiving.kept(self._lease, self.begin)

    def drop(self) -> None:
        self._receiving.dropped(self._lease)


class Receiving:
    """Joins the lease table with the scheduler. Called from the step thread alone."""

    def __init__(
        self, scheduler: Scheduler, leases: LeaseTable, *, epoch: int, event: Callable[[str, str], None]
    ) -> None:
        """`epoch` is ours: claims for another are refused. `event(kind, detail)` is told what operators should see."""
        self.leases = leases
        self._scheduler = scheduler
        self._epoch = epoch
        self._event = event
        self.now = 0.0
        """The time of the last call, monotonic seconds."""
        self._preparing: deque[Prepare] = deque()
        self._tried_at: tuple[int, float] | None = None
        """Pages that were available, and when, as the first in line found no room."""
        self._waiting: dict[int, Request | CommitTicket] = {}
        """Who waits for KV, by lease."""
        self._waits: list[tuple[float, int, int]] = []
        """(until, order, lease): when a wait is over."""
        self._order = itertools.count()

    # --- preparing ---------------------------------------------------------------------------------------------------

    def prepare(self, ticket: Prepare, now: float) -> None:
        """Opens a lease now, or as soon as there is room until `admit_by`.

        Raises `Busy` when there is none and the ticket does not wait, and `LeaseTooLarge` when leases can never hold
        what is not cached of the prompt.
        """
        self.now = now
        self._output_room(ticket)
        if not self._preparing and self._open(ticket, now):
            return
        if ticket.admit_by is None or ticket.admit_by <= now:
            raise self._busy()
        self._preparing.append(ticket)

    def abort_prepare(self, ticket: Prepare) -> None:
        """Nobody wants its lease any more; one that is open already is released by whoever got it. No output."""
        if ticket in self._preparing:
            self._preparing.remove(ticket)

    def _output_room(self, ticket: Prepare) -> int:
        """Output tokens that a lease can keep room for, at most as many as are expected. Raises `LeaseTooLarge`."""
        length, expect = len(ticket.tokens), ticket.expect_tokens
        if not self.leases.never_fits(length, expect):
            return expect
        # Looked up only where it decides: that costs more, the longer the prompt.
        matched = self._scheduler.cache.match(ticket.tokens).length
        while self.leases.never_fits(length, expect, matched):
            if not expect:
                raise LeaseTooLarge(
                    f"the prompt has {length} tokens, {matched} of them cached; this engine never leases room for the "
                    "rest",
                    param="prompt",
                )
            expect //= 2
        return expect

    def _open(self, ticket: Prepare, now: float) -> bool:
        expect = self._output_room(ticket)
        scheduler = self._scheduler
        lease = None
        if not scheduler.short:
            # As for an admission: every running request may need a page soon.
            keep = scheduler.running
            lease = self.leases.open(ticket.tokens, ticket.end, expect, now, owner=ticket.owner, keep=keep)
        if lease is None:
            self._tried_at = (self._scheduler.cache.available(), now)
            return False
        self._tried_at = None
        self._scheduler.tell(Output(ticket, Opened(lease), True))
        return True

    def _retry_preparations(self, now: float) -> None:
        for ticket in [each for each in self._preparing if each.admit_by is not None and each.admit_by <= now]:
            self._preparing.remove(ticket)
            self._scheduler.tell(Output(ticket, self._busy(), True))
        while self._preparing:
            if self._tried_at is not None:
                pages, at = self._tried_at
                if now - at < _RETRY and self._scheduler.cache.available() <= pages:
                    return
            ticket = self._preparing[0]
            try:
                if not self._open(ticket, now):
                    return
            except LeaseTooLarge as error:
                # What was cached of it as it came has been evicted.
                self._scheduler.tell(Output(ticket, error, True))
            self._preparing.popleft()

    def _busy(self) -> Busy:
        return Busy("no room for the KV of this prompt", param="admit_by", retry_after=self._scheduler.retry_after())

    # --- waiting for KV ----------------------------------------------------------------------------------------------

    def start(self, request: Request, lease_id: int, begin: int, wait_until: float, now: float) -> None:
        """`request` goes on from `begin` with the KV of a lease, as soon as that is there, or without it.

        Raises `LeaseNotFound`, `Conflict` (the lease is in use), `InvalidRequest` and `ContextLengthExceeded`, which
        leave the lease as it was.
        """
        self.now = now
        lease = self.leases.get(lease_id)
        if begin > max(lease.end, lease.matched):
            raise InvalidRequest(f"begin is {begin}, and the lease ends at {lease.end}", param="begin")
        # What is matched is used even behind `begin`.
        shared = min(max(begin, lease.matched), len(lease.tokens), request.known)
        if begin > shared or not np.array_equal(request.history[:shared], lease.tokens[:shared]):
            raise InvalidRequest("the prompt is not the one that the lease was prepared for", param="prompt")
        self._scheduler.check_prompt(request.prompt_length)
        self.leases.attach(lease_id, request, now)
        request.kv = _Kv(self, lease, begin)
        request.cached = min(lease.matched, request.prompt_length)
        self._scheduler.receive(request, now)
        if request.final:
            return
        self._wait(request, lease, wait_until)
        self._look(lease)

    def commit(self, ticket: CommitTicket, wait_until: float, now: float) -> None:
        """What arrives of a lease until then enters the prefix tree. Raises `LeaseNotFound` and `Conflict`."""
        self.now = now
        lease = self.leases.attach(ticket.lease, ticket, now)
        self._wait(ticket, lease, wait_until)
        self._look(lease)

    def abort_commit(self, ticket: CommitTicket, now: float) -> None:
        """Nobody waits for it any more: the lease ends. No output."""
        self.now = now
        if self._waiting.get(ticket.lease) is ticket:
            del self._waiting[ticket.lease]
            self.leases.close(self.leases.get(ticket.lease), now)

    def _wait(self, who: Request | CommitTicket, lease: Lease, until: float) -> None:
        self._waiting[lease.id] = who
        heapq.heappush(self._waits, (until, next(self._order), lease.id))

    def _look(self, lease: Lease, *, over: bool = False) -> None:
        """Something has changed for a lease: whoever waits for it goes on when all is there, or nothing more comes."""
        who = self._waiting.get(lease.id)
        if isinstance(who, CommitTicket):
            if over or not lease.waiting:
                self._end_commit(who, lease)
        elif who is not None and isinstance(kv := who.kv, _Kv):
            if kv.begin <= lease.received:
                self._go_on(who, lease, kv)
            elif over or not lease.waiting_below(kv.begin):
                # What lies behind `begin` may be awaited for ever: nobody need have been asked to send it.
                self._recompute(who, lease, kv)

    def _go_on(self, request: Request, lease: Lease, kv: _Kv) -> None:
        """All that `request` needs is there."""
        # What comes behind `begin` would be written beside our own: no claim on it is granted from here on.
        if lease.matched < lease.end:
            self.leases.forgo(lease.id, lease.matched, lease.end, self.now)
        if self.leases.unsafe(lease):
            self._recompute(request, lease, kv)
            return
        del self._waiting[lease.id]
        request.received = max(0, kv.begin - lease.matched)
        self._scheduler.received(request)

    def _recompute(self, request: Request, lease: Lease, kv: _Kv) -> None:
        """Part of the KV is not there, and nothing more is waited for."""
        del self._waiting[lease.id]
        _log.warning(
            "KV did not come and is computed here",
            every=10.0,
            burst=10,
            request=request.request_id,
            sub=request.sub_id,
            lease=f"{lease.id:x}",
            arrived=min(lease.received, kv.begin),
            awaited=kv.begin,
            quarantined=self.leases.unsafe(lease),
        )
        self._commit_for(request, lease, kv.begin)
        self._scheduler.not_received(request)

    def _commit_for(self, request: Request, lease: Lease, begin: int) -> None:
        """Whole pages that arrived enter the prefix tree, where `request` will look for them."""
        quarantined = self.leases.unsafe(lease)
        committed = min(self.leases.commit(lease, self.now), begin)
        request.received = max(0, committed - lease.matched)
        request.recomputed = max(0, begin - max(committed, lease.matched))
        self._tell_quarantined(lease, quarantined)

    def _end_commit(self, ticket: CommitTicket, lease: Lease) -> None:
        del self._waiting[lease.id]
        quarantined = self.leases.unsafe(lease)
        until = self.leases.commit(lease, self.now)
        self._tell_quarantined(lease, quarantined)
        self._scheduler.tell(Output(ticket, Committed(committed_until=until), True))

    # --- what others say ---------------------------------------------------------------------------------------------

    def claim(self, lease_id: int, epoch: int, begin: int, end: int, sender: tuple[str, int], now: float) -> int:
        """A sender's right to write a range; the claim's id. Raises as `LeaseTable.claim`, and `StaleEpoch`."""
        if epoch != self._epoch:
            raise StaleEpoch(f"the address is of epoch {epoch:x}, and this engine has {self._epoch:x}", param="address")
        return self.leases.claim(lease_id, begin, end, sender, now)

    def arrived(self, epoch: int, lease_id: int, claim_id: int, first: int, count: int, now: float) -> None:
        """Our own transport was notified that pages `[first, first + count)` of a claim have been written."""
        self.now = now
        if epoch != self._epoch:
            return
        lease = self.leases.arrived(lease_id, claim_id, first, count, now)
        if lease is not None:
            self._look(lease)

    def claim_ended(self, claim_id: int, error: str, now: float) -> None:
        """A sender's transport has finished with a claim. Idempotent."""
        self.now = now
        lease = self.leases.claim_ended(claim_id, error, now)
        if lease is not None:
            self._look(lease)

    def sender_dead(self, engine_id: str, epoch: int, now: float) -> None:
        """That incarnation of a sender, and every earlier one, is proven dead."""
        self.now = now
        for lease in self.leases.sender_dead(engine_id, epoch, now):
            self._look(lease)

    def forgo(self, lease_id: int, begin: int, end: int, now: float) -> str:
        """Nothing more comes for a range. "freed", "quarantined" or "unknown"."""
        self.now = now
        outcome = self.leases.forgo(lease_id, begin, end, now)
        if outcome != "unknown":
            self._look(self.leases.get(lease_id))
        return outcome

    def release(self, lease_id: int, now: float) -> str:
        """Ends a lease that nobody waits for, or fails whoever does. "freed", "quarantined" or "unknown"."""
        self.now = now
        try:
            lease = self.leases.get(lease_id)
        except LeaseNotFound:
            return "unknown"
        error = Cancelled("the lease was released while it was in use")
        who = lease.attached
        quarantined = self.leases.unsafe(lease)
        if isinstance(who, Request):
            # Its end closes the lease.
            self._scheduler.refuse(who, error)
        else:
            if isinstance(who, CommitTicket):
                del self._waiting[lease_id]
                self._scheduler.tell(Output(who, error, True))
            self.leases.close(lease, now)
        self._tell_quarantined(lease, quarantined)
        return "quarantined" if quarantined else "freed"

    def owner_lost(self, owner: object, now: float) -> int:
        """A session is gone: its leases end, except those that somebody uses. Returns how many did."""
        self.now = now
        for ticket in [each for each in self._preparing if each.owner is owner]:
            self._preparing.remove(ticket)
        ended = 0
        for lease in self.leases.owned_by(owner):
            if lease.attached is None:
                self.release(lease.id, now)
                ended += 1
        return ended

    # --- time --------------------------------------------------------------------------------------------------------

    def turn(self, now: float) -> None:
        """Once a turn of the step thread, and at `next_deadline` at the latest."""
        self.now = now
        for lease in self.leases.sweep(now):
            if lease.attached is None:
                owner = getattr(lease.owner, "peer", lease.owner)
                _log.warning(
                    "lease expired",
                    every=10.0,
                    burst=10,
                    lease=f"{lease.id:x}",
                    owner=owner,
                    matched=lease.matched,
                    end=lease.end,
                )
                self._event("lease_expired", f"lease {lease.id:x} of [{lease.matched}, {lease.end})")
            else:
                self._look(lease, over=True)
        while self._waits and self._waits[0][0] <= now:
            lease_id = heapq.heappop(self._waits)[2]
            who = self._waiting.get(lease_id)
            if who is not None:
                self._look(self.leases.get(lease_id), over=True)
        if self._preparing:
            self._retry_preparations(now)
        self._scheduler.cache.sweep()

    def degraded(self) -> bool:
        """Whether pages have been in quarantine for so long that somebody should look."""
        return self.leases.degraded(self.now)

    def kept(self, lease: Lease, begin: int) -> None:
        """There are no pages for what the request that the lease is attached to needs besides."""
        if isinstance(lease.attached, Request):
            self._commit_for(lease.attached, lease, begin)

    def dropped(self, lease: Lease) -> None:
        """The request that a lease was attached to has ended without it."""
        self._waiting.pop(lease.id, None)
        quarantined = self.leases.unsafe(lease)
        self.leases.close(lease, self.now)
        self._tell_quarantined(lease, quarantined)

    def next_deadline(self) -> float | None:
        """When `turn` should be called even if nothing else happens. Monotonic seconds."""
        while self._waits and self._waits[0][2] not in self._waiting:
            heapq.heappop(self._waits)
        times = [self._waits[0][0]] if self._waits else []
        if (swept := self.leases.next_deadline()) is not None:
            times.append(swept)
        if (pin := self._scheduler.cache.next_pin_end()) is not None:
            times.append(pin)
        if (degraded := self.leases.degraded_at()) is not None and degraded > self.now:
            times.append(degraded)
        if self._preparing:
            times.append(self.now + _RETRY)
        return min(times, default=None)

    def statistics(self) -> dict[str, float]:
        """Counters and gauges by name."""
        values = {f"lease_{name}": value for name, value in self.leases.statistics().items()}
        return values | {"lease_preparing": float(len(self._preparing)), "lease_waiting": float(len(self._waiting))}

    def check_integrity(self, *, deep: bool = True) -> None:
        """Raises `IntegrityError` when leases and page states disagree. Not `deep`: compares counts alone."""
        self.leases.check_integrity(deep=deep)

    # --- inner -------------------------------------------------------------------------------------------------------

    def _tell_quarantined(self, lease: Lease, pages: int) -> None:
        if pages:
            found = sorted(self.leases.quarantined_senders())
            senders = ", ".join(name for name, _ in found)
            named = " ".join(peer_name(name, epoch) for name, epoch in found)
            _log.warning("pages quarantined", every=10.0, burst=10, lease=f"{lease.id:x}", pages=pages, senders=named)
            self._event("quarantined", f"{pages} pages of lease {lease.id:x}: {senders} may still write them")
