"""The cache: matching, locks, insertion, eviction, pins and steps in flight; then any history against a naive model."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, precondition, rule

from microserve.kv.cache import KvCache, PrefixLock
from microserve.kv.pages import IntegrityError, PageArray
from microserve.runtime.clock import ManualClock

PAGE = 4


def cache(pages: int = 16, clock: ManualClock | None = None) -> KvCache:
    return KvCache(pages, PAGE, clock=clock or ManualClock())


def tokens(*pages: int) -> np.ndarray:
    """A prompt of whole pages; equal numbers make equal pages."""
    return np.repeat(np.array(pages, dtype=np.int32), PAGE)


def fill(kv: KvCache, prompt: np.ndarray) -> PageArray:
    """Caches `prompt` as a request that came and went would; returns its pages."""
    lock = kv.acquire(prompt)
    own = kv.allocate(len(prompt) // PAGE - len(lock.pages))
    assert own is not None
    lock = kv.insert(prompt, np.concatenate([lock.pages, own]), lock)
    kv.release(lock)
    kv.check_integrity()
    return lock.pages


def test_an_empty_cache_matches_nothing_and_has_every_page_to_give() -> None:
    kv = cache()
    assert kv.match(tokens(1, 2)).length == 0
    lock = kv.acquire(tokens(1, 2))
    assert (lock.length, lock.pages.tolist()) == (0, [])
    assert kv.available() == 16
    kv.release(lock)
    kv.check_integrity()


def test_whole_pages_match_and_a_partial_page_does_not() -> None:
    kv = cache()
    pages = fill(kv, tokens(1, 2, 3))
    assert kv.match(tokens(1, 2, 3)).pages.tolist() == pages.tolist()
    assert kv.match(np.concatenate([tokens(1, 2), [3, 3, 3]])).length == 8
    assert kv.match(np.concatenate([tokens(1), [2, 2, 2, 9]])).length == 4
    assert kv.match(tokens(2, 1)).length == 0


def test_a_lock_is_limited_in_whole_pages() -> None:
    kv = cache()
    pages = fill(kv, tokens(1, 2, 3))
    lock = kv.acquire(tokens(1, 2, 3), limit=11)
    assert (lock.length, lock.pages.tolist()) == (8, pages[:2].tolist())
    kv.check_integrity()
    kv.release(lock)


def test_an_edge_splits_where_prompts_part_and_both_are_found() -> None:
    kv = cache()
    first = fill(kv, tokens(1, 2, 3, 4))
    second = fill(kv, tokens(1, 2, 7))
    assert second[:2].tolist() == first[:2].tolist()
    assert kv.match(tokens(1, 2, 3, 4)).pages.tolist() == first.tolist()
    assert kv.match(tokens(1, 2, 7)).pages.tolist() == second.tolist()
    assert kv.statistics().nodes == 3
    assert kv.statistics().cached == 5


def test_inserting_what_another_request_inserted_first_frees_the_copy() -> None:
    kv = cache()
    lock_a, lock_b = kv.acquire(tokens(1, 2)), kv.acquire(tokens(1, 2, 3))
    a, b = kv.allocate(2), kv.allocate(3)
    assert a is not None
    assert b is not None
    lock_a = kv.insert(tokens(1, 2), a, lock_a)
    lock_b = kv.insert(tokens(1, 2, 3), b, lock_b)
    assert lock_b.pages.tolist() == [*a.tolist(), int(b[2])]
    assert kv.statistics().cached == 3
    assert kv.statistics().free == 13
    kv.check_integrity()
    kv.release(lock_a)
    kv.release(lock_b)


def test_a_lock_is_released_exactly_once_and_consumed_by_insert() -> None:
    kv = cache()
    lock = kv.acquire(tokens(1))
    own = kv.allocate(1)
    assert own is not None
    longer = kv.insert(tokens(1), own, lock)
    with pytest.raises(IntegrityError, match="twice"):
        kv.release(lock)
    with pytest.raises(IntegrityError, match="released"):
        kv.insert(tokens(1), own, lock)
    kv.release(longer)
    with pytest.raises(IntegrityError, match="twice"):
        kv.release(longer)


def test_insert_refuses_pages_that_do_not_fit_the_tokens_or_the_lock() -> None:
    kv = cache()
    fill(kv, tokens(1))
    lock, own = kv.acquire(tokens(1, 2)), kv.allocate(2)
    assert own is not None
    with pytest.raises(IntegrityError, match="tokens for"):
        kv.insert(tokens(1, 2), own[:1], lock)
    with pytest.raises(IntegrityError, match="not those of the lock"):
        kv.insert(tokens(1, 2), own, lock)
    kv.release(lock)
    kv.free(own)
    kv.check_integrity()


def test_eviction_takes_the_least_recently_used_leaf_from_its_tail() -> None:
    kv = cache(8)
    old = fill(kv, tokens(1, 2, 3, 4))
    fill(kv, tokens(5, 6, 7, 8))
    kv.release(kv.acquire(tokens(5, 6, 7, 8)))
    got = kv.allocate(3)
    assert got is not None
    assert sorted(got.tolist()) == sorted(old[1:].tolist())
    assert kv.match(tokens(1, 2, 3, 4)).length == PAGE
    assert kv.match(tokens(5, 6, 7, 8)).length == 4 * PAGE
    kv.check_integrity()


def test_using_a_prefix_saves_it_from_eviction() -> None:
    kv = cache(8)
    fill(kv, tokens(1, 2, 3, 4))
    fill(kv, tokens(5, 6, 7, 8))
    kv.release(kv.acquire(tokens(1, 2, 3, 4)))
    assert kv.allocate(4) is not None
    assert kv.match(tokens(1, 2, 3, 4)).length == 4 * PAGE
    assert kv.match(tokens(5)).length == 0


def test_a_shared_parent_goes_after_its_children() -> None:
    kv = cache(8)
    fill(kv, tokens(1, 2, 3))
    fill(kv, tokens(1, 2, 4))
    assert kv.evict() == 4
    assert kv.statistics().free == 8
    assert kv.statistics().nodes == 0
    kv.check_integrity()


def test_locked_pages_are_not_available_and_too_much_changes_nothing() -> None:
    kv = cache(8)
    fill(kv, tokens(1, 2, 3, 4))
    lock = kv.acquire(tokens(1, 2))
    assert kv.available() == 6
    assert kv.allocate(7) is None
    assert kv.match(tokens(1, 2, 3, 4)).length == 4 * PAGE
    assert kv.allocate(6) is not None
    assert kv.match(tokens(1, 2, 3, 4)).length == 2 * PAGE
    kv.release(lock)
    assert kv.available() == 2
    kv.check_integrity()


def test_evicting_one_prompt_leaves_what_others_share() -> None:
    kv = cache()
    fill(kv, tokens(1, 2, 3))
    fill(kv, tokens(1, 2, 4, 5))
    assert kv.evict(tokens(1, 2)) == 0
    assert kv.evict(tokens(1, 2, 4, 5)) == 2
    assert kv.evict(tokens(9)) == 0
    assert kv.match(tokens(1, 2, 3)).length == 3 * PAGE
    kv.check_integrity()


def test_a_pin_holds_until_its_time_and_pinning_again_renews_it() -> None:
    clock = ManualClock()
    kv = cache(8, clock)
    fill(kv, tokens(1, 2))
    assert kv.pin(tokens(1, 2, 3), ttl=10.0) == 2 * PAGE
    assert kv.pin(tokens(9), ttl=10.0) == 0
    clock.advance(9.0)
    assert kv.pin(tokens(1, 2, 3), ttl=10.0) == 2 * PAGE
    clock.advance(9.0)
    assert kv.sweep() == 0
    assert kv.evict() == 0
    assert kv.statistics().pinned == 2
    clock.advance(1.0)
    assert kv.sweep() == 1
    assert kv.evict() == 2
    kv.check_integrity()


def test_the_first_end_of_a_pin_is_known_and_sweeping_ends_just_those_that_are_over() -> None:
    clock = ManualClock()
    kv = cache(8, clock)
    fill(kv, tokens(1, 2))
    fill(kv, tokens(3))
    assert (kv.next_pin_end(), kv.sweep()) == (None, 0)
    kv.pin(tokens(1, 2), ttl=10.0)
    kv.pin(tokens(1), ttl=5.0)
    kv.pin(tokens(3), ttl=7.0)
    assert kv.next_pin_end() == clock() + 5.0
    kv.pin(tokens(1), ttl=20.0)  # renewed: it is the last now
    assert kv.next_pin_end() == clock() + 7.0
    clock.advance(10.0)
    assert kv.next_pin_end() == clock() - 3.0
    assert (kv.sweep(), kv.sweep()) == (2, 0)
    assert kv.next_pin_end() == clock() + 10.0
    assert kv.evict() == 2
    assert kv.unpin(tokens(1)) == PAGE
    assert (kv.next_pin_end(), kv.statistics().pinned, kv.evict()) == (None, 0, 1)
    kv.check_integrity()


def test_a_pin_may_be_shortened_and_one_that_ends_during_a_step_waits_for_it() -> None:
    clock = ManualClock()
    kv = cache(8, clock)
    fill(kv, tokens(1, 2))
    kv.pin(tokens(1, 2), ttl=10.0)
    kv.pin(tokens(1, 2), ttl=1.0)
    step = kv.begin_step()
    clock.advance(1.0)
    assert (kv.sweep(), kv.next_pin_end(), kv.evict()) == (1, None, 0)
    kv.retire_step(step)
    assert kv.evict() == 2
    assert kv.statistics().locks == 0
    kv.check_integrity()


def test_check_integrity_looks_at_every_page_or_at_counts_alone() -> None:
    kv = cache()
    pages = fill(kv, tokens(1, 2))
    states = kv.allocator._states
    states[pages[0]], states[15] = states[15], states[pages[0]]  # as many in each state, and the wrong ones
    kv.check_integrity(deep=False)
    with pytest.raises(IntegrityError, match="free runs and page states disagree"):
        kv.check_integrity()
    states[pages[0]], states[15] = states[15], states[pages[0]]
    for owner, attribute in ((kv, "_evictable"), (kv._tree, "page_count")):
        setattr(owner, attribute, getattr(owner, attribute) + 1)
        for deep in (True, False):
            with pytest.raises(IntegrityError, match="counted"):
                kv.check_integrity(deep=deep)
        setattr(owner, attribute, getattr(owner, attribute) - 1)
    kv.check_integrity()


def test_unpin_ends_the_longest_pin_of_the_prompt() -> None:
    kv = cache()
    fill(kv, tokens(1, 2, 3))
    kv.pin(tokens(1), ttl=5.0)
    kv.pin(tokens(1, 2, 3), ttl=5.0)
    assert kv.unpin(tokens(1, 2, 3, 4)) == 3 * PAGE
    assert kv.evict() == 2
    assert kv.unpin(tokens(1, 2)) == PAGE
    assert kv.unpin(tokens(1, 2)) == 0
    assert kv.evict() == 1
    with pytest.raises(ValueError, match="lives longer"):
        kv.pin(tokens(1), ttl=0.0)


def test_what_is_given_back_during_a_step_waits_for_the_last_step_launched_before() -> None:
    kv = cache(4)
    fill(kv, tokens(1))
    lock, own = kv.acquire(tokens(1)), kv.allocate(1)
    assert own is not None
    first, second = kv.begin_step(), kv.begin_step()
    kv.free(own)
    kv.release(lock)
    assert (kv.available(), kv.statistics().owned) == (2, 1)
    kv.retire_step(first)
    assert kv.available() == 2
    third = kv.begin_step()
    kv.retire_step(second)
    assert (kv.available(), kv.statistics().owned) == (4, 0)
    kv.retire_step(third)
    with pytest.raises(IntegrityError, match="retires"):
        kv.retire_step(third)
    kv.check_integrity()


def test_the_largest_prefixes_are_listed_with_what_holds_them() -> None:
    kv = cache()
    fill(kv, tokens(1, 2, 3))
    fill(kv, tokens(1, 9))
    fill(kv, tokens(4))
    kv.pin(tokens(4), ttl=1.0)
    top = kv.largest_prefixes(2)
    assert [(info.tokens.tolist(), info.pages) for info in top] == [
        (tokens(1, 2, 3).tolist(), 3),
        (tokens(1, 9).tolist(), 2),
    ]
    assert [(info.references, info.pinned) for info in kv.largest_prefixes(3)] == [(0, False), (0, False), (1, True)]


def test_lookups_and_hits_are_counted_in_tokens_and_pins_are_not_lookups() -> None:
    kv = cache()
    fill(kv, tokens(1, 2))
    kv.pin(tokens(1, 2), ttl=1.0)
    kv.release(kv.acquire(tokens(1, 3)))
    stats = kv.statistics()
    assert (stats.lookup_tokens, stats.hit_tokens, stats.locks) == (4 * PAGE, PAGE, 1)


def test_the_eviction_queue_stays_small_under_reuse() -> None:
    kv = cache()
    fill(kv, tokens(1, 2))
    fill(kv, tokens(1, 3))
    for _ in range(1000):
        kv.release(kv.acquire(tokens(1, 2)))
    assert len(kv._leaves) <= 2 * kv.statistics().nodes + 65
    assert kv.evict() == 3


prompts = st.lists(st.integers(0, 2), min_size=0, max_size=6).map(lambda pages: tokens(*pages))


class AnyHistory(RuleBasedStateMachine):
    """Random requests against a dictionary from token tuples to pages; pages in use are never handed out twice."""

    requests = Bundle("requests")

    def __init__(self) -> None:
        super().__init__()
        self.clock = ManualClock()
        self.kv = KvCache(12, PAGE, clock=self.clock)
        self.open: list[tuple[PrefixLock, PageArray]] = []
        self.steps: list[int] = []
        self.in_flight: dict[int, set[int]] = {}

    @rule(target=requests, prompt=prompts, limit=st.none() | st.integers(0, 30))
    def start(self, prompt: np.ndarray, limit: int | None) -> object:
        expected = self.kv.match(prompt).length
        lock = self.kv.acquire(prompt, limit)
        cap = len(prompt) if limit is None else min(limit, len(prompt))
        assert lock.length == min(expected, cap // PAGE * PAGE)
        before, room = self.kv.available(), len(prompt) // PAGE - len(lock.pages)
        own = self.kv.allocate(room)
        assert (own is None) == (room > before)
        if own is None:
            self.kv.release(lock)
            return multiple()
        used = self.used()
        assert not used & set(own.tolist())
        assert self.kv.match(prompt).length >= lock.length
        self.open.append((lock, own))
        return (prompt, lock, own)

    def used(self) -> set[int]:
        pages = {int(page) for lock, own in self.open for page in (*lock.pages, *own)}
        for named in self.in_flight.values():
            pages |= named
        return pages

    def close(self, request: tuple[np.ndarray, PrefixLock, PageArray]) -> None:
        self.open = [entry for entry in self.open if entry[0] is not request[1]]

    @rule(request=consumes(requests))
    def finish(self, request: tuple[np.ndarray, PrefixLock, PageArray]) -> None:
        prompt, lock, own = request
        self.close(request)
        longer = self.kv.insert(prompt, np.concatenate([lock.pages, own]), lock)
        assert longer.length == len(prompt)
        assert self.kv.match(prompt).pages.tolist() == longer.pages.tolist()
        self.kv.release(longer)

    @rule(request=consumes(requests))
    def abort(self, request: tuple[np.ndarray, PrefixLock, PageArray]) -> None:
        _, lock, own = request
        self.close(request)
        self.kv.release(lock)
        self.kv.free(own)

    @rule()
    @precondition(lambda self: len(self.steps) < 3)
    def launch(self) -> None:
        named = {int(page) for lock, own in self.open for page in (*lock.pages, *own)}
        step = self.kv.begin_step()
        self.steps.append(step)
        self.in_flight[step] = named

    @rule()
    @precondition(lambda self: bool(self.steps))
    def retire(self) -> None:
        step = self.steps.pop(0)
        del self.in_flight[step]
        self.kv.retire_step(step)

    @rule(prompt=prompts, ttl=st.sampled_from([1.0, 5.0]))
    def pin(self, prompt: np.ndarray, ttl: float) -> None:
        assert self.kv.pin(prompt, ttl) == self.kv.match(prompt).length

    @rule(prompt=prompts)
    def unpin(self, prompt: np.ndarray) -> None:
        self.kv.unpin(prompt)

    @rule(seconds=st.sampled_from([1.0, 3.0]))
    def pass_time(self, seconds: float) -> None:
        self.clock.advance(seconds)
        self.kv.sweep()

    @rule(prompt=st.none() | prompts)
    def evict(self, prompt: np.ndarray | None) -> None:
        before = self.kv.statistics()
        freed = self.kv.evict(prompt)
        after = self.kv.statistics()
        assert after.free - before.free == freed
        if prompt is None:
            assert after.evictable == 0

    @invariant()
    def whole(self) -> None:
        self.kv.check_integrity()
        for lock, own in self.open:
            states = {self.kv.allocator.state_of(int(page)).name for page in lock.pages}
            assert states <= {"CACHED"}
            assert {self.kv.allocator.state_of(int(page)).name for page in own} <= {"OWNED"}
        stats = self.kv.statistics()
        assert stats.free + stats.owned + stats.cached == 12

    def teardown(self) -> None:
        for lock, own in self.open:
            self.kv.release(lock)
            self.kv.free(own)
        while self.steps:
            self.kv.retire_step(self.steps.pop(0))
        self.clock.advance(100.0)
        self.kv.sweep()
        stats = self.kv.statistics()
        assert (stats.owned, stats.locks, stats.free + stats.cached) == (0, 0, 12)
        assert self.kv.evict() == stats.cached
        assert self.kv.statistics().free == 12


AnyHistory.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestAnyHistory = AnyHistory.TestCase
