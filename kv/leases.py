"""Leases: the right of a prepared receive to its pages, and the claims of senders on ranges of them.

    open ──▶ claim (a sender's right to write a range) ──▶ arrived … ──▶ claim ended ──▶ consume | commit | close

The rules, and why nothing leaks and nothing is corrupted:

* A range has at most one writer, ever. A second claim that overlaps one of any outcome is refused.
* A page is safe when its push was notified, or when no claim on it is open. A lease that closes sends the pages that
  are not safe to quarantine; they come back when their claim ends or their sender is proven dead, never by a timer.
* Leases hold at most a share of the pool, so that two engines cannot fill with leases that wait for each other.
* A lease has a term, renewed by whoever uses it, and a longest life.

Pure: page numbers, token ids and `now` (monotonic seconds) as an argument; called from one thread.
"""

from __future__ import annotations

import heapq
from typing import TYPE_CHECKING

import numpy as np

from microserve.kv.lease import Claim, Lease, Sender
from microserve.kv.pages import EMPTY, IntegrityError, PageArray, PageState
from microserve.runtime.errors import Conflict, LeaseNotFound

if TYPE_CHECKING:
    from collections.abc import Callable

    from microserve.kv.cache import KvCache
    from microserve.kv.prefix import PrefixLock
    from microserve.kv.radix import TokenArray

DEGRADED_AFTER = 60.0
"""Seconds of quarantine after which the engine says that it is degraded."""


class LeaseTable:
    """The leases and claims of one engine's pool."""

    def __init__(
        self,
        cache: KvCache,
        *,
        share: float = 0.5,
        term: float = 30.0,
        life: float = 300.0,
        draw_id: Callable[[], int],
    ) -> None:
        """`share` of the pool for leases at most; `term` and `life` in seconds; `draw_id` gives ids nobody guesses."""
        self._cache = cache
        self.limit(share=share, term=term, life=life)
        self._draw_id = draw_id
        self._leases: dict[int, Lease] = {}
        self._claims: dict[int, tuple[Claim, Lease]] = {}
        """Open claims by id, those of closed leases included."""
        self._next_claim = 1
        self._deadlines: list[tuple[float, int]] = []
        self._counts = dict.fromkeys(
            ("opened", "consumed", "committed", "closed", "expired", "claims", "arrived_pages", "stray_arrivals"), 0
        )

    def limit(self, *, share: float, term: float, life: float) -> None:
        """Other limits, for leases that are opened or renewed from now on."""
        self._most = max(1, int(self._cache.total_pages * share))
        self._term = term
        self._life = life

    def __len__(self) -> int:
        return len(self._leases)

    # --- leases ------------------------------------------------------------------------------------------------------

    def never_fits(self, tokens: int, reserve_tokens: int = 0, matched: int = 0) -> bool:
        """Whether a prompt of so many tokens, `matched` of them cached, needs more pages than leases may ever hold."""
        return self._needed(tokens, reserve_tokens, matched) > self._most

    def _needed(self, tokens: int, reserve_tokens: int, matched: int) -> int:
        """Pages for what is not cached of a prompt, and for output."""
        size = self._cache.page_size
        # When all is cached, the last page is recomputed for its logits, and a shared page is never written.
        return -(-(tokens + reserve_tokens) // size) - matched // size + (matched >= tokens)

    def open(
        self, tokens: TokenArray, end: int, reserve_tokens: int, now: float, *, owner: object = None, keep: int = 0
    ) -> Lease | None:
        """Locks what is cached of the prompt and leases pages for the rest. None, and nothing changed: no room now.

        `end` <= len(tokens): KV of positions below it is awaited where it is not cached. `reserve_tokens`: tokens of
        output that room is kept for beside the prompt's own. `keep` pages stay available for others.
        """
        cache, size = self._cache, self._cache.page_size
        lock = cache.acquire(tokens)
        matched = lock.length
        awaited = max(0, -(-end // size) - matched // size)
        needed = max(awaited, self._needed(len(tokens), reserve_tokens, matched))
        held = self._cache.allocator.count(PageState.LEASED) + self._cache.allocator.count(PageState.QUARANTINED)
        room = held + needed <= self._most and cache.available() >= needed + keep
        pages = cache.allocate(needed, PageState.LEASED) if room else None
        if pages is None:
            cache.release(lock)
            return None
        lease = Lease(self._draw_id(), tokens, end, lock, pages[:awaited], pages[awaited:], size, owner)
        lease.dies = now + self._life
        self._leases[lease.id] = lease
        self._renew(lease, now)
        self._counts["opened"] += 1
        return lease

    def get(self, lease_id: int) -> Lease:
        """An open lease. Raises `LeaseNotFound`."""
        lease = self._leases.get(lease_id)
        if lease is None:
            raise LeaseNotFound(f"there is no lease {lease_id}: it has ended, has expired, or never was", param="lease")
        return lease

    def owned_by(self, owner: object) -> list[Lease]:
        """The open leases of an owner."""
        return [lease for lease in self._leases.values() if lease.owner is owner]

    def attach(self, lease_id: int, who: object, now: float) -> Lease:
        """`who` waits for the lease's KV from now on, and bounds the wait. Raises `LeaseNotFound` and `Conflict`."""
        lease = self.get(lease_id)
        if lease.attached is not None:
            raise Conflict(f"lease {lease_id} is in use already", param="lease")
        lease.attached = who
        self._renew(lease, now)
        return lease

    def consume(self, lease: Lease, now: float) -> tuple[PrefixLock, PageArray]:
        """Ends a lease whose pages the caller takes over: the lock, and pages (now OWNED) from `matched` on.

        No claim may be open on a page that has not arrived: a writer may still write it. Raises `IntegrityError`.
        """
        if len(lease.unsafe()):
            raise IntegrityError(f"lease {lease.id} is consumed while a sender may write its pages")
        self._forget(lease)
        pages = np.concatenate((lease.pages, lease.reserve))
        self._cache.convert(pages, PageState.LEASED, PageState.OWNED)
        self._counts["consumed"] += 1
        return lease.lock, pages

    def commit(self, lease: Lease, now: float) -> int:
        """Whole pages of `[0, received)` enter the prefix tree; the rest ends as in `close`. Returns their tokens."""
        cache, size = self._cache, self._cache.page_size
        whole = lease.received // size
        fresh = max(0, whole - lease.matched // size)
        lock, kept = lease.lock, lease.pages[:fresh]
        rest = np.setdiff1d(np.concatenate((lease.pages[fresh:], lease.reserve)), self._quarantine(lease, now))
        self._forget(lease)
        self._cache.convert(rest, PageState.LEASED, PageState.FREE)
        if fresh:
            cache.convert(kept, PageState.LEASED, PageState.OWNED)
            lock = cache.insert(lease.tokens[: whole * size], np.concatenate((lock.pages, kept)), lock)
        cache.release(lock)
        self._counts["committed"] += 1
        return max(lease.matched, whole * size)

    def close(self, lease: Lease, now: float) -> str:
        """Ends a lease and drops what it received: "freed", or "quarantined" when some pages come back later."""
        quarantined = self._quarantine(lease, now)
        rest = np.setdiff1d(np.concatenate((lease.pages, lease.reserve)), quarantined)
        self._forget(lease)
        self._cache.convert(rest, PageState.LEASED, PageState.FREE)
        self._cache.release(lease.lock)
        self._counts["closed"] += 1
        return "quarantined" if len(quarantined) else "freed"

    # --- senders -----------------------------------------------------------------------------------------------------

    def claim(self, lease_id: int, begin: int, end: int, sender: Sender, now: float) -> int:
        """The right of `sender` to write positions `[begin, end)`; returns the claim's id. Renews the lease.

        `begin` stands at a page, `end` at a page or at the lease's end. Raises `LeaseNotFound`, `InvalidRequest`, and
        `Conflict` when part of the range was claimed before, or given up.
        """
        lease = self.get(lease_id)
        first, last = lease.span(begin, end)
        for other in lease.claims:
            if other.overlaps(first, last):
                raise Conflict(f"part of [{begin}, {end}) of lease {lease_id} has a writer already", param="begin")
        if not lease.awaited[first:last].all():
            raise Conflict(f"part of [{begin}, {end}) of lease {lease_id} is not awaited any more", param="begin")
        claim = Claim(self._next_claim, sender, first, last)
        self._next_claim += 1
        lease.claims.append(claim)
        self._claims[claim.id] = (claim, lease)
        self._renew(lease, now)
        self._counts["claims"] += 1
        return claim.id

    def arrived(self, lease_id: int, claim_id: int, first: int, count: int, now: float) -> Lease | None:
        """Our transport says that pages `[first, first + count)` of the claim were written. None: nobody waits."""
        lease = self._leases.get(lease_id)
        claim = next((each for each in lease.claims if each.id == claim_id), None) if lease is not None else None
        if lease is None or claim is None or not 0 <= first < first + count <= claim.last - claim.first:
            self._counts["stray_arrivals"] += 1
            return None
        written = slice(claim.first + first, claim.first + first + count)
        lease.there[written] = True
        lease.awaited[written] = False
        self._counts["arrived_pages"] += count
        self._renew(lease, now)
        return lease

    def claim_ended(self, claim_id: int, error: str, now: float) -> Lease | None:
        """The sender's transport has finished: done, or failed with `error`. Idempotent. The lease, if it is open.

        After a failure nothing more comes for the range. After "done" what was not notified yet is on its way.
        """
        entry = self._claims.pop(claim_id, None)
        if entry is None:
            return None
        claim, lease = entry
        claim.open = False
        if len(claim.quarantined):
            self._cache.convert(claim.quarantined, PageState.QUARANTINED, PageState.FREE)
            claim.quarantined = EMPTY
        if self._leases.get(lease.id) is not lease:
            return None
        if error:
            lease.awaited[claim.first : claim.last] = False
        self._renew(lease, now)
        return lease

    def forgo(self, lease_id: int, begin: int, end: int, now: float) -> str:
        """Nothing more comes for `[begin, end)`: "freed", "quarantined" (a sender may still write in it), or "unknown".

        Raises `InvalidRequest` for a range that is not the lease's.
        """
        lease = self._leases.get(lease_id)
        if lease is None:
            return "unknown"
        if begin == end:
            return "freed"
        first, last = lease.span(begin, end)
        lease.awaited[first:last] = False
        self._renew(lease, now)
        return "quarantined" if len(lease.unsafe(first, last)) else "freed"

    def sender_dead(self, engine_id: str, epoch: int, now: float) -> list[Lease]:
        """That incarnation of a sender (and every earlier one) writes nothing more: proven, not guessed.

        Ends its claims as failed. Returns the open leases that they were on.
        """
        dead = [
            claim.id for claim, _ in self._claims.values() if claim.sender[0] == engine_id and claim.sender[1] <= epoch
        ]
        changed = (self.claim_ended(claim_id, "the sender is dead", now) for claim_id in dead)
        return [lease for lease in dict.fromkeys(changed) if lease is not None]

    def unsafe(self, lease: Lease) -> int:
        """Pages of an open lease that a sender may write at any moment."""
        return len(lease.unsafe())

    def quarantined_senders(self) -> set[Sender]:
        """Senders whose open claims keep pages in quarantine."""
        return {claim.sender for claim, _ in self._claims.values() if len(claim.quarantined)}

    # --- time --------------------------------------------------------------------------------------------------------

    def sweep(self, now: float) -> list[Lease]:
        """The leases whose time is over: those that nobody is attached to are closed; the others their owner ends."""
        over = []
        while self._deadlines and self._deadlines[0][0] <= now:
            _, lease_id = heapq.heappop(self._deadlines)
            lease = self._leases.get(lease_id)
            if lease is None:
                continue
            until = self._until(lease)
            if until > now:
                heapq.heappush(self._deadlines, (until, lease_id))
                continue
            over.append(lease)
            if lease.attached is None:
                self._counts["expired"] += 1
                self.close(lease, now)
        return over

    def next_deadline(self) -> float | None:
        """When `sweep` may have something to do."""
        while self._deadlines and self._deadlines[0][1] not in self._leases:
            heapq.heappop(self._deadlines)
        return self._deadlines[0][0] if self._deadlines else None

    def quarantined_since(self) -> float | None:
        """When the oldest page in quarantine came there; None without any."""
        since = [claim.quarantined_at for claim, _ in self._claims.values() if len(claim.quarantined)]
        return min(since) if since else None

    def degraded_at(self) -> float | None:
        """When pages will have been in quarantine for so long that somebody should look; None without any there."""
        since = self.quarantined_since()
        return None if since is None else since + DEGRADED_AFTER

    def degraded(self, now: float) -> bool:
        """Whether somebody should look."""
        at = self.degraded_at()
        return at is not None and at <= now

    # --- looking at it -----------------------------------------------------------------------------------------------

    def statistics(self) -> dict[str, float]:
        """Counters and gauges by name."""
        values = {name: float(count) for name, count in self._counts.items()}
        return values | {"open": float(len(self._leases)), "open_claims": float(len(self._claims))}

    def check_integrity(self, *, deep: bool = True) -> None:
        """Raises `IntegrityError` unless LEASED and QUARANTINED pages are exactly those of leases and of claims.

        Not `deep`: as many, without a look at which.
        """
        allocator = self._cache.allocator
        for state, parts in (
            (PageState.LEASED, [part for lease in self._leases.values() for part in (lease.pages, lease.reserve)]),
            (PageState.QUARANTINED, [claim.quarantined for claim, _ in self._claims.values()]),
        ):
            if (count := sum(map(len, parts))) != allocator.count(state):
                raise IntegrityError(f"{count} pages are {state.name}, counted as {allocator.count(state)}")
            if not deep:
                continue
            pages = np.concatenate([EMPTY, *parts])
            if len(np.unique(pages)) != len(pages):
                raise IntegrityError(f"a {state.name} page belongs to two")
            if len(wrong := allocator.astray(pages, state)):
                raise IntegrityError(f"pages that should be {state.name} are not: {wrong[:8].tolist()}")
        for lease in self._leases.values():
            if not lease.lock.held:
                raise IntegrityError(f"lease {lease.id} has lost its lock")
            if (lease.there & lease.awaited).any():
                raise IntegrityError(f"lease {lease.id} awaits a page that is there")
        for claim, lease in self._claims.values():
            if not claim.open:
                raise IntegrityError(f"claim {claim.id} has ended and is kept")
            if self._leases.get(lease.id) is lease and len(claim.quarantined):
                raise IntegrityError(f"claim {claim.id} has pages in quarantine, and its lease is open")

    # --- inner -------------------------------------------------------------------------------------------------------

    def _quarantine(self, lease: Lease, now: float) -> PageArray:
        for claim in lease.claims:
            if claim.open:
                pages = lease.unsafe_of(claim)
                self._cache.convert(pages, PageState.LEASED, PageState.QUARANTINED)
                claim.quarantined = pages
                claim.quarantined_at = now
        return np.concatenate([EMPTY, *(claim.quarantined for claim in lease.claims if claim.open)])

    def _forget(self, lease: Lease) -> None:
        if self._leases.pop(lease.id, None) is not lease:
            raise IntegrityError(f"lease {lease.id} ended twice")
        # An open claim of a closed lease is kept until it ends: late messages about it must be known.

    def _renew(self, lease: Lease, now: float) -> None:
        before = lease.expires
        lease.expires = now + self._term
        if before == 0.0:
            heapq.heappush(self._deadlines, (self._until(lease), lease.id))

    @staticmethod
    def _until(lease: Lease) -> float:
        return lease.dies if lease.attached is not None else min(lease.expires, lease.dies)


__all__ = ["DEGRADED_AFTER", "Lease", "LeaseTable", "Sender"]
