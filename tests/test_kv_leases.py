"""Leases rule by rule: room, shares, terms, and how they end."""

from __future__ import annotations

import pytest
from tests.lease_rig import PROMPT, cached, counts, opened, table

from microserve.kv.pages import IntegrityError
from microserve.runtime.errors import Conflict, InvalidRequest, LeaseNotFound


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


def test_commit_keeps_whole_pages_without_a_gap() -> None:
    cache, leases = table()
    lease = opened(leases, end=14)
    claim = leases.claim(lease.id, 0, 14, ("a", 1), 0.0)
    leases.arrived(lease.id, claim, 0, 2, 0.0)
    leases.arrived(lease.id, claim, 3, 1, 0.0)
    assert leases.commit(lease, 0.0) == 8
    assert cache.match(PROMPT).pages.tolist() == lease.pages[:2].tolist()
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
    assert leases.never_fits(32, 1)
    assert not leases.never_fits(36, 1, matched=8)
    assert leases.never_fits(36, 1, matched=4)
    # Of one that is all cached, a page is computed again.
    assert not leases.never_fits(64, 28, matched=64)
    assert leases.never_fits(64, 29, matched=64)
    leases.close(held[0], 0.0)
    opened(leases, PROMPT + 500)


def test_what_does_not_exist_is_said() -> None:
    _, leases = table()
    with pytest.raises(LeaseNotFound):
        leases.get(7)
    with pytest.raises(LeaseNotFound):
        leases.attach(7, "me", 0.0)
    with pytest.raises(LeaseNotFound):
        leases.claim(7, 0, 4, ("a", 1), 0.0)
    assert leases.forgo(7, 0, 4, 0.0) == "unknown"
    assert leases.claim_ended(7, "", 0.0) is None


def test_a_page_kept_available_for_others_is_not_leased() -> None:
    cache, leases = table(pages=16)
    cached(cache, PROMPT)
    held = cache.allocate(8)
    assert held is not None
    # Eight are left, three of them cached; the lease locks those and needs one more.
    assert leases.open(PROMPT, 14, 0, 0.0, keep=5) is None
    assert (len(leases), cache.statistics().locks, counts(cache)) == (0, 0, {"free": 5, "owned": 8, "cached": 3})
    lease = leases.open(PROMPT, 14, 0, 0.0, keep=4)
    assert lease is not None
    assert cache.available() == 4
    leases.close(lease, 0.0)
    cache.free(held)


def test_a_lease_evicts_what_nobody_uses_but_never_what_it_shares() -> None:
    cache, leases = table(pages=8, share=1.0)
    cached(cache, PROMPT + 100)
    cached(cache, PROMPT[:12])
    lease = leases.open(PROMPT, 14, 8, 0.0)
    assert lease is not None
    assert (lease.matched, len(lease.pages), len(lease.reserve)) == (12, 1, 2)
    assert counts(cache) == {"cached": 5, "leased": 3}
    assert leases.open(PROMPT + 200, 14, 8, 0.0) is None
    assert cache.match(PROMPT).length == 12
    leases.close(lease, 0.0)


def test_room_is_leased_for_the_whole_prompt_and_for_output() -> None:
    _, leases = table()
    lease = leases.open(PROMPT, 5, 3, 0.0)
    assert lease is not None
    assert (len(lease.pages), len(lease.reserve)) == (2, 3)  # [0, 5) is awaited; 17 tokens have room


def test_an_end_behind_what_is_cached_awaits_nothing() -> None:
    cache, leases = table()
    cached(cache, PROMPT)
    lease = opened(leases, end=5)
    assert (lease.matched, lease.end, len(lease.pages), len(lease.reserve)) == (12, 5, 0, 1)
    assert (lease.received, lease.waiting) == (12, False)
    with pytest.raises(InvalidRequest):
        leases.claim(lease.id, 0, 4, ("a", 1), 0.0)
    assert leases.commit(lease, 0.0) == 12


def test_owners_leases_are_found_by_who_they_are() -> None:
    _, leases = table(pages=64)
    mine, yours = object(), object()
    first, second = (leases.open(PROMPT, 13, 0, 0.0, owner=mine) for _ in range(2))
    assert leases.open(PROMPT, 13, 0, 0.0, owner=yours) is not None
    assert leases.owned_by(mine) == [first, second]
    assert first is not None
    leases.close(first, 0.0)
    assert leases.owned_by(mine) == [second]


def test_commit_uses_what_somebody_else_cached_meanwhile() -> None:
    cache, leases = table()
    lease = opened(leases, end=12)
    claim = leases.claim(lease.id, 0, 12, ("a", 1), 0.0)
    leases.arrived(lease.id, claim, 0, 3, 0.0)
    cached(cache, PROMPT[:8])
    before = cache.match(PROMPT).pages.tolist()
    assert leases.commit(lease, 0.0) == 12
    assert cache.match(PROMPT).pages.tolist()[:2] == before
    assert counts(cache) == {"free": 29, "cached": 3}
    assert leases.claim_ended(claim, "", 0.0) is None
    cache.check_integrity()


def test_a_lease_that_ends_gives_its_prefix_back_when_the_steps_in_flight_have_retired() -> None:
    cache, leases = table()
    cached(cache, PROMPT)
    lease = opened(leases)
    step = cache.begin_step()
    leases.close(lease, 0.0)
    assert counts(cache) == {"free": 29, "cached": 3}  # no step names a leased page, so it is free at once
    assert cache.evict() == 0
    cache.retire_step(step)
    assert cache.evict() == 3


def test_a_lease_ends_once() -> None:
    _, leases = table()
    lease = opened(leases)
    leases.close(lease, 0.0)
    for end in (leases.close, leases.commit, leases.consume):
        with pytest.raises(IntegrityError):
            end(lease, 0.0)


def test_an_expired_lease_is_gone_for_everybody() -> None:
    cache, leases = table(term=10.0)
    lease = opened(leases)
    assert leases.next_deadline() == 10.0
    assert leases.sweep(9.9) == []
    assert leases.sweep(10.0) == [lease]
    assert leases.next_deadline() is None
    assert leases.statistics()["expired"] == 1.0
    with pytest.raises(LeaseNotFound, match="has expired"):
        leases.get(lease.id)
    with pytest.raises(LeaseNotFound, match="has expired"):
        leases.claim(lease.id, 0, 4, ("a", 1), 10.0)
    assert leases.forgo(lease.id, 0, 4, 10.0) == "unknown"
    assert counts(cache) == {"free": 32}


@pytest.mark.parametrize("use", ["attach", "claim", "arrived", "claim_ended", "forgo"])
def test_whoever_uses_a_lease_renews_it(use: str) -> None:
    _, leases = table(term=10.0)
    lease = opened(leases)
    claim = leases.claim(lease.id, 0, 4, ("a", 1), 0.0)
    match use:
        case "attach":
            leases.attach(lease.id, "me", 5.0)
        case "claim":
            leases.claim(lease.id, 4, 8, ("b", 1), 5.0)
        case "arrived":
            leases.arrived(lease.id, claim, 0, 1, 5.0)
        case "claim_ended":
            leases.claim_ended(claim, "", 5.0)
        case _:
            leases.forgo(lease.id, 8, 12, 5.0)
    assert leases.sweep(14.9) == []


@pytest.mark.parametrize("use", ["stray", "conflict", "invalid"])
def test_what_is_refused_renews_nothing(use: str) -> None:
    _, leases = table(term=10.0)
    lease = opened(leases)
    claim = leases.claim(lease.id, 0, 4, ("a", 1), 0.0)
    match use:
        case "stray":
            leases.arrived(lease.id, claim, 3, 1, 5.0)
        case "conflict":
            with pytest.raises(Conflict):
                leases.claim(lease.id, 0, 4, ("b", 1), 5.0)
        case _:
            with pytest.raises(InvalidRequest):
                leases.forgo(lease.id, 1, 4, 5.0)
    assert leases.sweep(10.0) == [lease]


def test_what_happened_is_counted() -> None:
    _, leases = table(pages=64)
    held = [opened(leases) for _ in range(4)]
    claim = leases.claim(held[0].id, 0, 13, ("a", 1), 0.0)
    leases.arrived(held[0].id, claim, 0, 4, 0.0)
    leases.arrived(held[1].id, claim, 0, 4, 0.0)
    leases.commit(held[0], 0.0)
    leases.consume(held[1], 0.0)
    leases.close(held[2], 0.0)
    assert leases.statistics() == {
        "opened": 4.0,
        "consumed": 1.0,
        "committed": 1.0,
        "closed": 1.0,
        "expired": 0.0,
        "claims": 1.0,
        "arrived_pages": 4.0,
        "stray_arrivals": 1.0,
        "open": 1.0,
        "open_claims": 1.0,
    }


def test_check_integrity_finds_what_is_broken_and_counts_alone_when_it_shall_be_quick() -> None:
    cache, leases = table()
    lease, other = opened(leases), opened(leases, PROMPT + 100)
    pages, swapped = lease.pages, lease.pages.copy()
    lease.pages = pages[1:]
    for deep in (True, False):
        with pytest.raises(IntegrityError, match="7 pages are LEASED, counted as 8"):
            leases.check_integrity(deep=deep)
    swapped[0] = other.pages[0]
    lease.pages = swapped
    leases.check_integrity(deep=False)
    with pytest.raises(IntegrityError, match="belongs to two"):
        leases.check_integrity()
    swapped[0] = 31
    with pytest.raises(IntegrityError, match=r"should be LEASED are not: \[31\]"):
        leases.check_integrity()
    lease.pages = pages
    lease.there[0] = True
    with pytest.raises(IntegrityError, match="awaits a page that is there"):
        leases.check_integrity()
    lease.awaited[0] = False
    leases.check_integrity()
    cache.release(lease.lock)
    with pytest.raises(IntegrityError, match="lost its lock"):
        leases.check_integrity()
