"""The lease table by itself: each rule, and random histories after which every page is where it belongs."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from microserve.kv.cache import KvCache
from microserve.kv.leases import DEGRADED_AFTER, LeaseTable
from microserve.kv.pages import IntegrityError, PageState
from microserve.runtime.errors import Conflict, InvalidRequest, LeaseNotFound

if TYPE_CHECKING:
    from microserve.kv.cache import PrefixLock
    from microserve.kv.leases import Lease

PAGE = 4
PROMPT = np.arange(1, 15, dtype=np.int32)  # 14 tokens: three whole pages, and two tokens


def table(pages: int = 32, **options: float) -> tuple[KvCache, LeaseTable]:
    cache = KvCache(pages, PAGE, clock=lambda: 0.0)
    ids = itertools.count(100)
    return cache, LeaseTable(cache, draw_id=lambda: next(ids), **options)  # type: ignore[arg-type]


def opened(leases: LeaseTable, prompt: np.ndarray = PROMPT, end: int = 13, *, now: float = 0.0) -> Lease:
    lease = leases.open(prompt, end, 0, now)
    assert lease is not None
    return lease


def cached(cache: KvCache, prompt: np.ndarray) -> None:
    lock = cache.acquire(prompt)
    whole = len(prompt) // PAGE
    pages = cache.allocate(whole - len(lock.pages))
    assert pages is not None
    cache.release(cache.insert(prompt[: whole * PAGE], np.concatenate((lock.pages, pages)), lock))


def counts(cache: KvCache) -> dict[str, int]:
    return {state.name.lower(): cache.allocator.count(state) for state in PageState if cache.allocator.count(state)}


def test_what_is_cached_is_locked_and_the_rest_is_leased() -> None:
    cache, leases = table()
    cached(cache, PROMPT[:9])
    lease = opened(leases)
    assert (lease.matched, lease.end, len(lease.pages), len(lease.reserve)) == (8, 13, 2, 0)
    assert cache.evict() == 0
    assert counts(cache) == {"free": 28, "cached": 2, "leased": 2}
    assert leases.close(lease, 1.0) == "freed"
    assert counts(cache) == {"free": 30, "cached": 2}
    assert cache.evict() == 2


def test_a_prompt_that_is_cached_whole_keeps_a_page_for_its_last_token() -> None:
    cache, leases = table()
    prompt = PROMPT[:12]
    cached(cache, prompt)
    lease = opened(leases, prompt, 12)
    assert (lease.matched, len(lease.pages), len(lease.reserve), lease.waiting) == (12, 0, 1, False)
    leases.close(lease, 0.0)


def test_a_range_has_one_writer_ever() -> None:
    _, leases = table()
    lease = opened(leases)
    first = leases.claim(lease.id, 4, 8, ("a", 1), 0.0)
    for begin, end in ((4, 8), (0, 8), (4, 13), (0, 13)):
        with pytest.raises(Conflict):
            leases.claim(lease.id, begin, end, ("b", 1), 0.0)
    leases.claim_ended(first, "failed", 0.0)
    with pytest.raises(Conflict):
        leases.claim(lease.id, 4, 8, ("b", 1), 0.0)
    leases.forgo(lease.id, 8, 12, 0.0)
    with pytest.raises(Conflict):
        leases.claim(lease.id, 8, 13, ("b", 1), 0.0)
    leases.claim(lease.id, 0, 4, ("b", 1), 0.0)
    done = leases.claim(lease.id, 12, 13, ("a", 1), 0.0)
    leases.claim_ended(done, "", 0.0)  # what it wrote has not been notified yet
    with pytest.raises(Conflict):
        leases.claim(lease.id, 12, 13, ("b", 1), 0.0)


@pytest.mark.parametrize(("begin", "end"), [(1, 8), (0, 7), (0, 14), (0, 0), (8, 4), (-4, 4), (12, 16)])
def test_ranges_stand_at_pages_and_within_the_lease(begin: int, end: int) -> None:
    _, leases = table()
    lease = opened(leases)
    with pytest.raises(InvalidRequest):
        leases.claim(lease.id, begin, end, ("a", 1), 0.0)
    leases.claim(lease.id, 12, 13, ("a", 1), 0.0)  # the lease's end may lie within a page


def test_only_pages_that_a_writer_may_still_write_are_quarantined() -> None:
    cache, leases = table()
    lease = opened(leases)
    claim = leases.claim(lease.id, 0, 8, ("a", 1), 0.0)
    leases.arrived(lease.id, claim, 1, 1, 0.0)
    assert leases.unsafe(lease) == 1
    assert leases.close(lease, 0.0) == "quarantined"
    assert counts(cache) == {"free": 31, "quarantined": 1}
    assert leases.quarantined_senders() == {("a", 1)}


@pytest.mark.parametrize("proof", ["done", "failed", "dead", "newer"])
def test_quarantine_comes_back_by_proof(proof: str) -> None:
    cache, leases = table()
    lease = opened(leases)
    claim = leases.claim(lease.id, 0, 8, ("a", 5), 0.0)
    leases.close(lease, 0.0)
    leases.sender_dead("a", 4, 1.0)  # an earlier incarnation
    leases.sender_dead("b", 9, 1.0)  # somebody else
    assert counts(cache)["quarantined"] == 2
    match proof:
        case "done":
            leases.claim_ended(claim, "", 1.0)
        case "failed":
            leases.claim_ended(claim, "it broke", 1.0)
        case "dead":
            leases.sender_dead("a", 5, 1.0)
        case _:
            leases.sender_dead("a", 6, 1.0)
    assert counts(cache) == {"free": 32}
    assert leases.claim_ended(claim, "", 2.0) is None
    leases.check_integrity()


def test_quarantine_never_comes_back_by_time() -> None:
    cache, leases = table()
    leases.claim(opened(leases).id, 0, 8, ("a", 1), 0.0)
    leases.sweep(30.0)
    assert counts(cache)["quarantined"] == 2
    assert not leases.degraded(30.0 + DEGRADED_AFTER - 1)
    assert leases.degraded(30.0 + DEGRADED_AFTER)
    leases.sweep(1e9)
    assert counts(cache)["quarantined"] == 2


def test_a_lease_is_renewed_by_use_and_ends_with_its_term_or_its_life() -> None:
    cache, leases = table(term=10.0, life=25.0)
    lease = opened(leases)
    leases.claim(lease.id, 0, 4, ("a", 1), 9.0)
    assert leases.sweep(11.0) == []
    assert leases.next_deadline() == 19.0
    leases.forgo(lease.id, 8, 12, 18.0)
    leases.forgo(lease.id, 8, 12, 24.0)
    assert leases.sweep(25.0) == [lease]
    with pytest.raises(LeaseNotFound):
        leases.get(lease.id)
    assert counts(cache) == {"free": 31, "quarantined": 1}


def test_an_attached_lease_is_not_closed_under_whoever_waits() -> None:
    _, leases = table(term=10.0, life=25.0)
    lease = opened(leases)
    leases.attach(lease.id, "me", 0.0)
    with pytest.raises(Conflict):
        leases.attach(lease.id, "you", 0.0)
    assert leases.sweep(24.0) == []
    assert leases.sweep(25.0) == [lease]
    leases.get(lease.id)
    leases.close(lease, 25.0)


def test_received_is_without_a_gap() -> None:
    _, leases = table()
    lease = opened(leases)
    late, early = leases.claim(lease.id, 8, 13, ("a", 1), 0.0), leases.claim(lease.id, 0, 8, ("b", 1), 0.0)
    leases.arrived(lease.id, late, 2, 2, 0.0)
    assert (lease.received, lease.waiting) == (0, True)
    leases.arrived(lease.id, early, 0, 1, 0.0)
    assert lease.received == 4
    leases.arrived(lease.id, early, 1, 1, 0.0)
    assert (lease.received, lease.waiting) == (13, False)


def test_arrivals_that_fit_no_claim_change_nothing() -> None:
    _, leases = table()
    lease = opened(leases)
    claim = leases.claim(lease.id, 4, 8, ("a", 1), 0.0)
    for lease_id, number, first, count in ((1, claim, 1, 1), (lease.id, 99, 1, 1), (lease.id, claim, 0, 1)):
        assert leases.arrived(lease_id, number, first, count, 0.0) is None
    assert leases.arrived(lease.id, claim, 1, 2, 0.0) is None
    assert leases.statistics()["stray_arrivals"] == 4
    assert lease.received == 0


def test_commit_keeps_whole_pages_without_a_gap() -> None:
    cache, leases = table()
    lease = opened(leases, end=14)
    claim = leases.claim(lease.id, 0, 14, ("a", 1), 0.0)
    leases.arrived(lease.id, claim, 0, 2, 0.0)
    leases.arrived(lease.id, claim, 3, 1, 0.0)
    assert leases.commit(lease, 0.0) == 8
    assert cache.match(PROMPT).length == 8
    assert counts(cache) == {"free": 29, "cached": 2, "quarantined": 1}


def test_consume_hands_pages_over_and_refuses_while_somebody_may_write() -> None:
    cache, leases = table()
    lease = leases.open(PROMPT, 12, 6, 0.0)
    assert lease is not None
    claim = leases.claim(lease.id, 0, 12, ("a", 1), 0.0)
    with pytest.raises(IntegrityError):
        leases.consume(lease, 0.0)
    leases.arrived(lease.id, claim, 0, 3, 0.0)
    lock, pages = leases.consume(lease, 0.0)
    assert (lock.length, len(pages), counts(cache)) == (0, 5, {"free": 27, "owned": 5})
    leases.claim_ended(claim, "", 0.0)
    cache.free(pages)
    cache.release(lock)


def test_leases_hold_a_share_and_two_tables_that_fill_each_other_do_not_wait() -> None:
    cache, leases = table(pages=16)
    held = [opened(leases, PROMPT + 100 * number) for number in range(2)]
    assert leases.open(PROMPT + 500, 13, 0, 0.0) is None
    assert cache.available() == 8
    assert leases.never_fits(33)
    assert not leases.never_fits(32)
    leases.close(held[0], 0.0)
    opened(leases, PROMPT + 500)


def test_what_does_not_exist_is_said() -> None:
    _, leases = table()
    for call in (lambda: leases.get(7), lambda: leases.attach(7, "me", 0.0)):
        with pytest.raises(LeaseNotFound):
            call()
    with pytest.raises(LeaseNotFound):
        leases.claim(7, 0, 4, ("a", 1), 0.0)
    assert leases.forgo(7, 0, 4, 0.0) == "unknown"
    assert leases.claim_ended(7, "", 0.0) is None


class Histories(RuleBasedStateMachine):
    """Leases, claims and ordinary use of the cache, in any order."""

    @initialize()
    def begin(self) -> None:
        self.cache, self.leases = table(pages=24, term=10.0, life=30.0)
        self.now = 0.0
        self.open: list[Lease] = []
        self.claims: list[tuple[int, Lease, int, int]] = []
        self.running: list[tuple[PrefixLock, np.ndarray]] = []
        self.steps: list[int] = []

    def _forget(self, lease: Lease) -> None:
        self.open = [each for each in self.open if each is not lease]

    @rule(length=st.integers(1, 30), seed=st.integers(0, 2), cut=st.integers(0, 3), reserve=st.integers(0, 9))
    def prepare(self, length: int, seed: int, cut: int, reserve: int) -> None:
        prompt = np.arange(length, dtype=np.int32) + 100 * seed
        lease = self.leases.open(prompt, max(0, length - cut), reserve, self.now)
        if lease is not None:
            self.open.append(lease)

    @rule(data=st.data())
    def claim(self, data: st.DataObject) -> None:
        if not self.open:
            return
        lease = data.draw(st.sampled_from(self.open))
        pages = len(lease.pages)
        first = data.draw(st.integers(0, pages))
        last = data.draw(st.integers(0, pages))
        begin, end = lease.matched + first * PAGE, min(lease.end, lease.matched + last * PAGE)
        sender = data.draw(st.sampled_from([("a", 1), ("a", 2), ("b", 1)]))
        try:
            number = self.leases.claim(lease.id, begin, end, sender, self.now)
        except (Conflict, InvalidRequest):
            return
        assert first < last
        self.claims.append((number, lease, first, last))

    @rule(data=st.data())
    def arrive(self, data: st.DataObject) -> None:
        if self.claims:
            number, lease, first, last = data.draw(st.sampled_from(self.claims))
            begin = data.draw(st.integers(first, last - 1))
            self.leases.arrived(lease.id, number, begin, data.draw(st.integers(1, last - begin)), self.now)

    @rule(data=st.data(), error=st.sampled_from(["", "broken"]))
    def end_claim(self, data: st.DataObject, error: str) -> None:
        if self.claims:
            self.leases.claim_ended(data.draw(st.sampled_from(self.claims))[0], error, self.now)

    @rule(epoch=st.integers(1, 2))
    def kill(self, epoch: int) -> None:
        self.leases.sender_dead("a", epoch, self.now)

    @rule(data=st.data(), how=st.sampled_from(["close", "commit", "consume", "forgo", "attach"]))
    def use(self, data: st.DataObject, how: str) -> None:
        if not self.open:
            return
        lease = data.draw(st.sampled_from(self.open))
        match how:
            case "close":
                assert self.leases.close(lease, self.now) in ("freed", "quarantined")
                self._forget(lease)
            case "commit":
                assert self.leases.commit(lease, self.now) % PAGE == 0
                self._forget(lease)
            case "consume" if not self.leases.unsafe(lease):
                self.running.append(self.leases.consume(lease, self.now))
                self._forget(lease)
            case "forgo" if lease.matched < lease.end:
                self.leases.forgo(lease.id, lease.matched, lease.end, self.now)
            case "attach" if lease.attached is None:
                self.leases.attach(lease.id, self, self.now)

    @rule(seconds=st.floats(0, 12))
    def wait(self, seconds: float) -> None:
        self.now += seconds
        for lease in self.leases.sweep(self.now):
            if lease.attached is not None:
                self.leases.close(lease, self.now)
            self._forget(lease)

    @rule(length=st.integers(4, 20), seed=st.integers(0, 2))
    def serve(self, length: int, seed: int) -> None:
        prompt = np.arange(length, dtype=np.int32) + 100 * seed
        lock = self.cache.acquire(prompt)
        pages = self.cache.allocate(length // PAGE - len(lock.pages))
        if pages is None:
            self.cache.release(lock)
            return
        whole = length // PAGE * PAGE
        lock = self.cache.insert(prompt[:whole], np.concatenate((lock.pages, pages)), lock)
        self.running.append((lock, np.empty(0, dtype=np.int32)))

    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        if self.running:
            lock, pages = self.running.pop(data.draw(st.integers(0, len(self.running) - 1)))
            self.cache.free(pages)
            self.cache.release(lock)

    @rule()
    def launch(self) -> None:
        self.steps.append(self.cache.begin_step())

    @rule()
    def retire(self) -> None:
        if self.steps:
            self.cache.retire_step(self.steps.pop(0))

    @invariant()
    def whole(self) -> None:
        self.cache.check_integrity()
        self.leases.check_integrity()
        leased = self.cache.allocator.count(PageState.LEASED) + self.cache.allocator.count(PageState.QUARANTINED)
        assert leased <= self.cache.total_pages // 2

    def teardown(self) -> None:
        for lease in self.open:
            self.leases.close(lease, self.now)
        for number, *_ in self.claims:
            self.leases.claim_ended(number, "", self.now)
        for lock, pages in self.running:
            self.cache.free(pages)
            self.cache.release(lock)
        for step in self.steps:
            self.cache.retire_step(step)
        self.whole()
        statistics = self.cache.statistics()
        assert statistics.free + statistics.cached == statistics.total
        assert statistics.locks == 0


Histories.TestCase.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
TestHistories = Histories.TestCase
