"""Claims rule by rule: one writer a range, what arrives, what is given up, and what is quarantined until when."""

from __future__ import annotations

import pytest
from tests.lease_rig import PROMPT, counts, opened, table

from microserve.kv.leases import DEGRADED_AFTER
from microserve.kv.pages import IntegrityError
from microserve.runtime.errors import Conflict, InvalidRequest


def test_a_range_has_one_writer_ever() -> None:
    _, leases = table()
    lease = opened(leases)
    first = leases.claim(lease.id, 4, 8, ("a", 1), 0.0)
    for begin, end in ((4, 8), (0, 8), (4, 13), (0, 13)):
        with pytest.raises(Conflict):
            leases.claim(lease.id, begin, end, ("b", 1), 0.0)
    wide = opened(leases, PROMPT + 100)
    leases.claim(wide.id, 0, 12, ("a", 1), 0.0)
    for begin, end in ((4, 8), (8, 13)):
        with pytest.raises(Conflict):
            leases.claim(wide.id, begin, end, ("b", 1), 0.0)
    leases.claim(wide.id, 12, 13, ("b", 1), 0.0)
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


def test_received_is_without_a_gap() -> None:
    _, leases = table()
    lease = opened(leases)
    late, early = leases.claim(lease.id, 8, 13, ("a", 1), 0.0), leases.claim(lease.id, 0, 8, ("b", 1), 0.0)
    leases.arrived(lease.id, late, 0, 2, 0.0)
    assert (lease.received, lease.waiting) == (0, True)
    leases.arrived(lease.id, early, 0, 1, 0.0)
    assert lease.received == 4
    leases.arrived(lease.id, early, 1, 1, 0.0)
    assert (lease.received, lease.waiting) == (13, False)


def test_arrivals_that_fit_no_claim_change_nothing() -> None:
    _, leases = table()
    lease = opened(leases)
    claim = leases.claim(lease.id, 4, 8, ("a", 1), 0.0)
    for lease_id, number, first, count in ((1, claim, 0, 1), (lease.id, 99, 0, 1), (lease.id, claim, 1, 1)):
        assert leases.arrived(lease_id, number, first, count, 0.0) is None
    assert leases.arrived(lease.id, claim, 0, 2, 0.0) is None
    assert leases.statistics()["stray_arrivals"] == 4
    assert lease.received == 0


def test_quarantine_counts_towards_the_share() -> None:
    _, leases = table(pages=8)
    lease = opened(leases)
    claim = leases.claim(lease.id, 0, 4, ("a", 1), 0.0)
    leases.close(lease, 0.0)
    assert leases.open(PROMPT, 13, 0, 0.0) is None
    leases.claim_ended(claim, "", 0.0)
    assert leases.open(PROMPT, 13, 0, 0.0) is not None


@pytest.mark.parametrize("error", ["", "the link broke"])
def test_after_done_the_rest_is_on_its_way_and_after_a_failure_it_is_not(error: str) -> None:
    _, leases = table()
    lease = opened(leases)
    claim = leases.claim(lease.id, 0, 13, ("a", 1), 0.0)
    leases.arrived(lease.id, claim, 0, 1, 0.0)
    assert leases.claim_ended(claim, error, 0.0) is lease
    assert (lease.received, lease.waiting, leases.unsafe(lease)) == (4, not error, 0)
    assert leases.arrived(lease.id, claim, 1, 3, 0.0) is lease  # it came after all: written before the claim ended
    assert (lease.received, lease.waiting) == (13, False)


def test_what_is_given_up_is_awaited_no_more_and_stays_unsafe_until_its_writer_ends() -> None:
    cache, leases = table()
    lease = opened(leases)
    claim = leases.claim(lease.id, 0, 4, ("a", 1), 0.0)
    assert leases.forgo(lease.id, 4, 13, 0.0) == "freed"
    assert lease.waiting
    assert leases.forgo(lease.id, 0, 13, 0.0) == "quarantined"
    assert not lease.waiting
    with pytest.raises(IntegrityError, match="may write"):
        leases.consume(lease, 0.0)
    leases.arrived(lease.id, claim, 0, 1, 0.0)
    assert leases.forgo(lease.id, 0, 13, 0.0) == "freed"
    assert leases.forgo(lease.id, 4, 4, 0.0) == "freed"
    with pytest.raises(InvalidRequest):
        leases.forgo(lease.id, 0, 14, 0.0)
    assert leases.close(lease, 0.0) == "freed"
    assert counts(cache) == {"free": 32}


def test_a_dead_sender_fails_its_claims_and_nobody_elses() -> None:
    cache, leases = table()
    first, second = opened(leases), opened(leases)
    for lease in (first, second):
        leases.claim(lease.id, 0, 4, ("a", 3), 0.0)
        leases.claim(lease.id, 4, 8, ("a", 3), 0.0)
    other = leases.claim(first.id, 8, 12, ("b", 3), 0.0)
    newer = leases.claim(first.id, 12, 13, ("a", 4), 0.0)
    leases.close(second, 0.0)
    assert leases.sender_dead("a", 3, 0.0) == [first]
    assert first.waiting
    assert leases.unsafe(first) == 2
    assert counts(cache) == {"free": 28, "leased": 4}
    assert leases.sender_dead("a", 3, 0.0) == []
    leases.claim_ended(other, "it broke", 0.0)
    leases.claim_ended(newer, "it broke", 0.0)
    assert not first.waiting


def test_the_oldest_quarantine_says_since_when_somebody_should_look() -> None:
    _, leases = table()
    first, second = opened(leases), opened(leases)
    one = leases.claim(first.id, 0, 4, ("a", 1), 0.0)
    two = leases.claim(second.id, 0, 4, ("b", 1), 0.0)
    assert (leases.degraded_at(), leases.degraded(1e9)) == (None, False)  # a claim alone is nothing to look at
    leases.close(second, 3.0)
    leases.close(first, 7.0)
    assert leases.degraded_at() == 3.0 + DEGRADED_AFTER
    leases.claim_ended(two, "", 9.0)
    assert leases.degraded_at() == 7.0 + DEGRADED_AFTER
    assert leases.quarantined_senders() == {("a", 1)}
    leases.claim_ended(one, "it broke", 9.0)
    assert leases.degraded_at() is None
    assert leases.quarantined_senders() == set()
