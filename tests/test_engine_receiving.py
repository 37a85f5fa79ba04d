"""Received KV in the step thread: two rigs, pages copied by hand. The fake executor checks every page."""

from __future__ import annotations

import pytest
from tests.engine_rig import PAGE, make_request
from tests.receiving_rig import EPOCH, KvRig, sent

from microserve.engine.outputs import Opened
from microserve.engine.request import State
from microserve.runtime.errors import (
    Busy,
    Cancelled,
    Conflict,
    DeadlineExceeded,
    InvalidRequest,
    LeaseNotFound,
    LeaseTooLarge,
    StaleEpoch,
)
from microserve.runtime.messages import Committed

PROMPT = list(range(1, 15))  # 14 tokens: three whole pages of 4, and two tokens
WHOLE = list(range(1, 17))  # four whole pages


@pytest.fixture(params=[1, 2], ids=["depth1", "depth2"])
def pair(request: pytest.FixtureRequest) -> tuple[KvRig, KvRig]:
    return KvRig(depth=request.param), KvRig(depth=request.param)


# --- the way of the paper ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", [-1, -2, 12, 8, 4])
def test_what_was_sent_is_not_computed_again(pair: tuple[KvRig, KvRig], end: int) -> None:
    sender, receiver = pair
    end = end % len(PROMPT)
    lease = receiver.lease(PROMPT, end, expect=5)
    request = receiver.generate(PROMPT, lease, end)
    assert request.state is State.RECEIVING
    assert not receiver.step()
    pages = sent(sender, PROMPT[:end])
    claim = receiver.claim(lease, 0, end)
    receiver.push(sender, pages, lease, claim, 0)
    receiver.end_claim(claim)
    receiver.run()
    assert receiver.seen[request].tokens == receiver.expected(request, 5)
    assert [(part.start, part.length) for part in receiver.plans[0].slices] == [(end, len(PROMPT) - end)]
    generated = receiver.generated(request)
    assert (generated.received_tokens, generated.recomputed_tokens, generated.usage.cached_tokens) == (end, 0, 0)
    receiver.assert_empty()


@pytest.mark.parametrize("prompt", [PROMPT, WHOLE, [1], [1, 2, 3, 4], [1, 2, 3, 4, 5]])
def test_begin_may_be_the_prompts_length(pair: tuple[KvRig, KvRig], prompt: list[int]) -> None:
    """Then the last token alone is computed, for its logits."""
    sender, receiver = pair
    lease = receiver.lease(prompt, expect=3)
    claim = receiver.claim(lease, 0, len(prompt))
    receiver.push(sender, sent(sender, prompt), lease, claim, 0)
    request = receiver.generate(prompt, lease, len(prompt))
    receiver.run()
    assert receiver.seen[request].tokens == receiver.expected(request, 5)
    assert [part.start for part in receiver.plans[0].slices] == [len(prompt) - 1]
    receiver.end_claim(claim)
    receiver.assert_empty()


@pytest.mark.parametrize("prompt", [PROMPT, WHOLE])
def test_a_prompt_that_is_cached_needs_no_sender_and_no_shared_page_is_written(
    pair: tuple[KvRig, KvRig], prompt: list[int]
) -> None:
    _, receiver = pair
    first = receiver.submit(make_request(prompt, max_tokens=3, ignore_eos=True))
    receiver.run()
    lease = receiver.lease(prompt, len(prompt) - 1, expect=3)
    assert lease.matched == len(prompt) // PAGE * PAGE
    request = receiver.generate(
        prompt, lease, len(prompt) - 1 if prompt is PROMPT else lease.matched, count=3, wait=0.0
    )
    if prompt is PROMPT:
        receiver.turn()
    receiver.run()
    assert receiver.seen[request].tokens == receiver.seen[first].tokens
    receiver.assert_empty()


def test_a_prefix_that_the_receiver_has_is_not_awaited(pair: tuple[KvRig, KvRig]) -> None:
    sender, receiver = pair
    receiver.submit(make_request(PROMPT[:9], max_tokens=1))
    receiver.run()
    lease = receiver.lease(PROMPT, 13)
    assert (lease.matched, len(lease.pages)) == (8, 2)
    request = receiver.generate(PROMPT, lease, 13)
    claim = receiver.claim(lease, 8, 13)
    receiver.push(sender, sent(sender, PROMPT[:13])[2:], lease, claim, 0)
    receiver.run()
    assert receiver.seen[request].tokens == receiver.expected(request, 5)
    generated = receiver.generated(request)
    assert (generated.received_tokens, generated.usage.cached_tokens) == (5, 8)
    receiver.end_claim(claim)
    receiver.assert_empty()


def test_two_senders_fill_one_lease(pair: tuple[KvRig, KvRig]) -> None:
    sender, receiver = pair
    lease = receiver.lease(PROMPT, 13)
    request = receiver.generate(PROMPT, lease, 13)
    pages = sent(sender, PROMPT[:13])
    late, early = receiver.claim(lease, 8, 13, "b"), receiver.claim(lease, 0, 8, "a")
    receiver.push(sender, pages[2:], lease, late, 2)
    receiver.end_claim(late)
    assert not receiver.step()
    receiver.push(sender, pages[:2], lease, early, 0)
    receiver.end_claim(early)
    receiver.run()
    assert receiver.seen[request].tokens == receiver.expected(request, 5)
    receiver.assert_empty()


def test_pages_may_come_before_anybody_waits_for_them(pair: tuple[KvRig, KvRig]) -> None:
    sender, receiver = pair
    lease = receiver.lease(PROMPT, 13)
    claim = receiver.claim(lease, 0, 13)
    receiver.push(sender, sent(sender, PROMPT[:13]), lease, claim, 0)
    receiver.end_claim(claim)
    request = receiver.generate(PROMPT, lease, 13)
    assert request.state is State.WAITING
    receiver.run()
    assert receiver.seen[request].tokens == receiver.expected(request, 5)
    receiver.assert_empty()


def test_the_senders_word_is_not_enough(pair: tuple[KvRig, KvRig]) -> None:
    """Done means that it is on its way at the latest; here it has arrived when our own transport says so."""
    sender, receiver = pair
    lease = receiver.lease(PROMPT, 13)
    request = receiver.generate(PROMPT, lease, 13)
    claim = receiver.claim(lease, 0, 13)
    receiver.end_claim(claim)
    assert receiver.scheduler.waiting == 0
    receiver.push(sender, sent(sender, PROMPT[:13]), lease, claim, 0)
    assert receiver.scheduler.waiting == 1
    receiver.run()
    assert receiver.generated(request).received_tokens == 13
    receiver.assert_empty()


# --- what does not come --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["failed", "forgo", "wait", "dead"])
@pytest.mark.parametrize("arrived", [0, 1, 2])
def test_what_does_not_come_is_computed_here(pair: tuple[KvRig, KvRig], how: str, arrived: int) -> None:
    sender, receiver = pair
    lease = receiver.lease(PROMPT, 13)
    request = receiver.generate(PROMPT, lease, 13, wait=2.0)
    claim = receiver.claim(lease, 0, 13)
    pages = sent(sender, PROMPT[:13])
    if arrived:
        receiver.push(sender, pages[:arrived], lease, claim, 0)
    assert request.state is State.RECEIVING
    match how:
        case "failed":
            receiver.end_claim(claim, "the link broke")
        case "forgo":
            assert receiver.receiving.forgo(lease.id, 0, 13, receiver.clock()) == "quarantined"
        case "wait":
            receiver.turn(1.9)
            assert request.state is State.RECEIVING
            receiver.turn(0.2)
        case _:
            receiver.receiving.sender_dead("a", 1, receiver.clock())
    receiver.read()
    quarantined = 4 - arrived if how in ("forgo", "wait") else 0
    assert receiver.cache.statistics().quarantined == quarantined
    receiver.run()
    assert receiver.seen[request].tokens == receiver.expected(request, 5)
    generated = receiver.generated(request)
    assert (generated.received_tokens, generated.recomputed_tokens) == (PAGE * arrived, 13 - PAGE * arrived)
    receiver.end_claim(claim, "at last")
    receiver.assert_empty()


@pytest.mark.parametrize("how", ["fails", "forgone", "dies"])
def test_what_lies_behind_begin_is_not_waited_for(pair: tuple[KvRig, KvRig], how: str) -> None:
    """The lease awaits a part of a page that nobody was asked to send, as behind an early first token."""
    _, receiver = pair
    lease = receiver.lease(PROMPT, 13)
    request = receiver.generate(PROMPT, lease, 12)
    claim = receiver.claim(lease, 0, 12)
    assert not receiver.step()
    if how == "fails":
        receiver.end_claim(claim, "torn")
    elif how == "dies":
        receiver.receiving.sender_dead("a", 1, receiver.clock())
    else:
        receiver.end_claim(claim, "torn")
        receiver.receiving.forgo(lease.id, 0, 12, receiver.clock())
    receiver.run()
    assert receiver.seen[request].tokens == receiver.expected(request, 5)
    assert receiver.generated(request).recomputed_tokens == 12
    receiver.assert_empty()


def test_pages_in_quarantine_come_back_by_proof_and_never_by_time(pair: tuple[KvRig, KvRig]) -> None:
    _, receiver = pair
    lease = receiver.lease(PROMPT, 13)
    claim = receiver.claim(lease, 0, 13)
    assert receiver.receiving.release(lease.id, receiver.clock()) == "quarantined"
    receiver.turn(100_000.0)
    assert receiver.cache.statistics().quarantined == 4
    assert receiver.leases.degraded(receiver.clock())
    receiver.receiving.sender_dead("a", 0, receiver.clock())  # an earlier incarnation proves nothing
    assert receiver.cache.statistics().quarantined == 4
    receiver.end_claim(claim)
    assert receiver.cache.statistics().quarantined == 0
    assert [kind for kind, _ in receiver.events] == ["quarantined"]
    receiver.assert_empty()


def test_a_late_writer_does_not_touch_recomputed_pages(pair: tuple[KvRig, KvRig]) -> None:
    _, receiver = pair
    lease = receiver.lease(PROMPT, 13)
    request = receiver.generate(PROMPT, lease, 13, wait=0.0)
    claim = receiver.claim(lease, 0, 13)
    targets = lease.pages.copy()
    receiver.turn(0.1)
    receiver.step()
    receiver.executor.pool[targets] = 999  # the push that nobody waits for lands after all
    receiver.run()
    assert receiver.seen[request].tokens == receiver.expected(request, 5)
    receiver.arrive(lease, claim, 0, 4)
    receiver.end_claim(claim)
    receiver.assert_empty()


def test_a_claim_behind_begin_that_is_open_costs_fresh_pages_and_no_wrong_token(pair: tuple[KvRig, KvRig]) -> None:
    sender, receiver = pair
    lease = receiver.lease(PROMPT, 12)
    request = receiver.generate(PROMPT, lease, 8)
    pages = sent(sender, PROMPT[:12])
    wanted, beyond = receiver.claim(lease, 0, 8), receiver.claim(lease, 8, 12)
    receiver.push(sender, pages[:2], lease, wanted, 0)
    target = int(lease.pages[2])
    receiver.step()
    receiver.executor.pool[target] = 999
    receiver.run()
    assert receiver.seen[request].tokens == receiver.expected(request, 5)
    for claim in (wanted, beyond):
        receiver.end_claim(claim)
    receiver.assert_empty()


# --- commit --------------------------------------------------------------------------------------------------------


def test_commit_waits_for_what_is_on_its_way_and_keeps_whole_pages(pair: tuple[KvRig, KvRig]) -> None:
    sender, receiver = pair
    lease = receiver.lease(PROMPT)
    claim = receiver.claim(lease, 0, 14)
    ticket = receiver.commit(lease)
    assert ticket not in receiver.answers
    receiver.push(sender, sent(sender, PROMPT), lease, claim, 0)
    assert receiver.answers[ticket] == Committed(committed_until=12)
    assert receiver.cache.match(PROMPT).length == 12
    receiver.end_claim(claim)
    receiver.assert_empty()
    request = receiver.submit(make_request(PROMPT, max_tokens=5, ignore_eos=True))
    receiver.run()
    assert receiver.seen[request].tokens == receiver.expected(request, 5)


def test_commit_keeps_what_came_when_the_rest_does_not(pair: tuple[KvRig, KvRig]) -> None:
    sender, receiver = pair
    lease = receiver.lease(PROMPT)
    claim = receiver.claim(lease, 0, 14)
    receiver.push(sender, sent(sender, PROMPT)[:2], lease, claim, 0)
    ticket = receiver.commit(lease, wait=1.0)
    receiver.turn(1.1)
    assert receiver.answers[ticket] == Committed(committed_until=8)
    assert receiver.cache.statistics().quarantined == 2
    receiver.end_claim(claim, "failed")
    receiver.assert_empty()


# --- room ----------------------------------------------------------------------------------------------------------


def test_leases_hold_at_most_their_share_and_the_next_waits_its_turn() -> None:
    rig = KvRig(pages=16)
    first = rig.lease(list(range(20)))
    with pytest.raises(Busy):
        rig.prepare(list(range(20, 40)))
    waiting = rig.prepare(list(range(20, 40)), admit_by=rig.clock() + 5)
    behind = rig.prepare([7], admit_by=rig.clock() + 5)
    rig.turn(0.1)
    assert waiting not in rig.answers
    assert behind not in rig.answers
    rig.receiving.release(first.id, rig.clock())
    rig.turn(0.1)
    assert isinstance(rig.answers[waiting], Opened)
    assert isinstance(rig.answers[behind], Opened)
    late = rig.prepare(list(range(20)), admit_by=rig.clock() + 5)
    rig.turn(5.1)
    assert isinstance(rig.answers[late], Busy)
    for answer in (rig.answers[waiting], rig.answers[behind]):
        assert isinstance(answer, Opened)
        rig.receiving.release(answer.lease.id, rig.clock())
    rig.assert_empty()


def test_a_lease_leaves_a_page_for_each_running_request() -> None:
    rig = KvRig(pages=16, share=1.0)
    for first in (1, 20):
        rig.submit(make_request([first, 2, 3], max_tokens=9, ignore_eos=True))
    rig.step()
    assert (rig.scheduler.running, rig.cache.available()) == (2, 14)
    with pytest.raises(Busy):
        rig.prepare([7] * 13 * PAGE)
    lease = rig.lease([7] * 12 * PAGE)
    assert (rig.cache.available(), len(lease.pages)) == (2, 12)
    rig.receiving.release(lease.id, rig.clock())
    rig.run()
    rig.assert_empty()


def test_no_lease_is_granted_while_a_request_in_line_is_short_of_pages() -> None:
    rig = KvRig(pages=16, share=1.0)
    running = rig.submit(make_request([1, 2, 3], max_tokens=9, ignore_eos=True))
    rig.step()
    held = rig.lease([30] * 11 * PAGE)
    rig.submit(make_request([20] * 4 * PAGE, max_tokens=1))
    rig.step()
    assert (rig.scheduler.short, rig.scheduler.running, rig.cache.available()) == (True, 1, 4)
    with pytest.raises(Busy):
        rig.prepare([7])
    rig.receiving.release(held.id, rig.clock())
    rig.run()
    assert rig.seen[running].tokens == rig.expected(running, 9)
    rig.receiving.release(rig.lease([7]).id, rig.clock())
    rig.assert_empty()


def test_a_prompt_that_never_fits_is_refused_at_once() -> None:
    rig = KvRig(pages=16)
    with pytest.raises(LeaseTooLarge, match="40 tokens, 0 of them cached; this engine never leases room"):
        rig.prepare(list(range(40)), admit_by=rig.clock() + 5)
    rig.lease(list(range(20)))
    waiting = rig.prepare(list(range(20, 40)), admit_by=rig.clock() + 5)
    with pytest.raises(LeaseTooLarge):
        rig.prepare(list(range(40)), admit_by=rig.clock() + 5)
    rig.turn(5.0)
    assert isinstance(rig.answers[waiting], Busy)
    rig.receiving.owner_lost("router", rig.clock())
    rig.assert_empty()


@pytest.mark.parametrize(("known", "fits"), [(8, True), (7, False), (10, True)])
def test_what_is_cached_needs_no_lease(known: int, fits: bool) -> None:
    """Leases may hold 8 of 32 pages. The prompt has 16, or 10 of them and all cached."""
    rig = KvRig(pages=32, share=0.25)
    prompt = list(range(16 * PAGE if known != 10 else 10 * PAGE))
    first = rig.submit(make_request([*prompt[: known * PAGE], 48], max_tokens=1))
    rig.run()
    assert rig.generated(first).usage.completion_tokens == 1
    assert rig.cache.match(prompt).length == known * PAGE
    if not fits:
        with pytest.raises(LeaseTooLarge, match="64 tokens, 28 of them cached"):
            rig.prepare(prompt, admit_by=rig.clock() + 5)
        rig.assert_empty()
        return
    # There is no room for output, which is the first to be done without.
    lease = rig.lease(prompt, expect=100)
    assert (lease.matched, len(lease.pages) + len(lease.reserve) <= 8) == (known * PAGE, True)
    rig.receiving.release(lease.id, rig.clock())
    rig.assert_empty()


def test_a_preparation_that_waits_is_refused_when_what_it_needs_does_not_fit_any_more() -> None:
    rig = KvRig(pages=32, share=0.25)
    prompt = list(range(16 * PAGE))
    rig.submit(make_request([*prompt[: 8 * PAGE], 48], max_tokens=1))
    rig.run()
    rig.lease([40] * PAGE)
    waiting = rig.prepare(prompt, admit_by=rig.clock() + 5)
    behind = rig.prepare([41], admit_by=rig.clock() + 5)
    assert waiting not in rig.answers
    assert rig.cache.evict() == 8
    rig.turn(0.1)
    assert isinstance(rig.answers[waiting], LeaseTooLarge)
    assert isinstance(rig.answers[behind], Opened)
    rig.receiving.owner_lost("router", rig.clock())
    rig.assert_empty()


def test_room_for_output_is_kept_and_used() -> None:
    rig = KvRig(pages=16)
    lease = rig.lease(PROMPT, 12, expect=10)
    assert (len(lease.pages), len(lease.reserve)) == (3, 3)
    request = rig.generate(PROMPT, lease, 12, count=10, wait=0.0)
    rig.turn(0.1)
    rig.run()
    assert rig.seen[request].tokens == rig.expected(request, 10)
    rig.assert_empty()


# --- endings -------------------------------------------------------------------------------------------------------


def test_an_abort_while_it_waits_closes_the_lease(pair: tuple[KvRig, KvRig]) -> None:
    _, receiver = pair
    lease = receiver.lease(PROMPT, 13)
    request = receiver.generate(PROMPT, lease, 13)
    assert receiver.abort(request)
    assert request.state is State.ABORTED
    receiver.assert_empty()


def test_deadlines_hold_while_it_waits(pair: tuple[KvRig, KvRig]) -> None:
    _, receiver = pair
    lease = receiver.lease(PROMPT, 13)
    request = make_request(PROMPT, max_tokens=5, deadline=receiver.clock() + 1)
    receiver.start(request, lease, 13)
    receiver.clock.advance(1.5)
    receiver.run()
    assert isinstance(receiver.error(request), DeadlineExceeded)
    receiver.assert_empty()


def test_a_release_ends_whoever_waits(pair: tuple[KvRig, KvRig]) -> None:
    _, receiver = pair
    lease = receiver.lease(PROMPT, 13)
    request = receiver.generate(PROMPT, lease, 13)
    assert receiver.receiving.release(lease.id, receiver.clock()) == "freed"
    receiver.read()
    assert isinstance(receiver.error(request), Cancelled)
    assert receiver.receiving.release(lease.id, receiver.clock()) == "unknown"
    receiver.assert_empty()


def test_a_lost_router_takes_its_leases_with_it_but_not_those_in_use(pair: tuple[KvRig, KvRig]) -> None:
    _, receiver = pair
    idle, used = receiver.lease(PROMPT, 13), receiver.lease(WHOLE, 15)
    request = receiver.generate(WHOLE, used, 15, wait=1.0)
    assert receiver.receiving.owner_lost("router", receiver.clock()) == 1
    with pytest.raises(LeaseNotFound):
        receiver.leases.get(idle.id)
    receiver.turn(1.1)
    receiver.run()
    assert receiver.seen[request].tokens == receiver.expected(request, 5)
    receiver.assert_empty()


def test_a_lease_expires_when_nobody_uses_it(pair: tuple[KvRig, KvRig]) -> None:
    _, receiver = pair
    lease = receiver.lease(PROMPT, 13)
    receiver.turn(29.0)
    receiver.claim(lease, 0, 8)  # renews it
    receiver.turn(29.0)
    receiver.leases.get(lease.id)
    receiver.turn(1.1)
    with pytest.raises(LeaseNotFound):
        receiver.leases.get(lease.id)
    assert receiver.events[0][0] == "lease_expired"
    receiver.receiving.sender_dead("a", 1, receiver.clock())
    receiver.assert_empty()


# --- refusals ------------------------------------------------------------------------------------------------------


def test_what_is_wrong_is_refused_and_changes_nothing(pair: tuple[KvRig, KvRig]) -> None:
    _, receiver = pair
    lease = receiver.lease(PROMPT, 13)
    for begin, end in ((1, 13), (0, 6), (0, 14), (4, 4), (8, 4)):
        with pytest.raises(InvalidRequest):
            receiver.claim(lease, begin, end)
    with pytest.raises(StaleEpoch):
        receiver.receiving.claim(lease.id, EPOCH - 1, 0, 13, ("a", 1), receiver.clock())
    with pytest.raises(LeaseNotFound):
        receiver.receiving.claim(1, EPOCH, 0, 13, ("a", 1), receiver.clock())
    claim = receiver.claim(lease, 4, 8)
    for begin, end in ((0, 13), (4, 8), (0, 8), (4, 12)):
        with pytest.raises(Conflict):
            receiver.claim(lease, begin, end, "b")
    receiver.end_claim(claim, "failed")
    with pytest.raises(Conflict):
        receiver.claim(lease, 4, 8, "b")  # a range has one writer, ever
    for begin, prompt in ((14, PROMPT), (13, WHOLE[::-1]), (13, PROMPT[:4])):
        with pytest.raises((InvalidRequest, Conflict)):
            receiver.generate(prompt, lease, begin)
    receiver.generate(PROMPT, lease, 13, wait=0.0)
    with pytest.raises(Conflict):
        receiver.commit(lease)
    receiver.turn(0.1)
    receiver.run()
    receiver.assert_empty()


def test_notifications_that_nobody_awaits_are_counted_and_harmless(pair: tuple[KvRig, KvRig]) -> None:
    _, receiver = pair
    lease = receiver.lease(PROMPT, 13)
    claim = receiver.claim(lease, 0, 8)
    for number, first, count in ((claim + 1, 0, 1), (claim, 2, 1), (claim, 0, 3), (claim, 1, 0)):
        receiver.arrive(lease, number, first, count)
    assert receiver.leases.statistics()["stray_arrivals"] == 4
    assert lease.received == 0
    receiver.end_claim(claim)
    receiver.receiving.release(lease.id, receiver.clock())
    receiver.assert_empty()


def test_what_is_matched_is_used_only_for_the_prompt_that_it_is_of(pair: tuple[KvRig, KvRig]) -> None:
    """Even behind `begin`."""
    _, receiver = pair
    receiver.submit(make_request(WHOLE, max_tokens=1))
    receiver.run()
    lease = receiver.lease(WHOLE)
    assert lease.matched == 16
    with pytest.raises(InvalidRequest, match="prepared for"):
        receiver.generate([*WHOLE[:8], 40, 41, 42, 43, 44], lease, 8)
    request = receiver.generate([*WHOLE[:9]], lease, 8)  # shorter is as good
    receiver.run()
    assert receiver.seen[request].tokens == receiver.expected(request, 5)
    receiver.assert_empty()


def test_a_prompt_may_go_on_behind_what_was_announced(pair: tuple[KvRig, KvRig]) -> None:
    sender, receiver = pair
    lease = receiver.lease(PROMPT, 12)
    claim = receiver.claim(lease, 0, 12)
    receiver.push(sender, sent(sender, PROMPT[:12]), lease, claim, 0)
    receiver.end_claim(claim)
    request = receiver.generate([*PROMPT[:12], 40, 41, 42, 43, 44, 45, 46, 47, 48], lease, 12)
    receiver.run()
    assert receiver.seen[request].tokens == receiver.expected(request, 5)
    assert receiver.generated(request).received_tokens == 12
    receiver.assert_empty()


def test_what_came_is_kept_when_there_are_no_pages_for_the_rest() -> None:
    sender, receiver = KvRig(), KvRig(pages=8)
    lease = receiver.lease(PROMPT, 12)
    claim = receiver.claim(lease, 0, 12)
    receiver.push(sender, sent(sender, PROMPT[:12]), lease, claim, 0)
    receiver.end_claim(claim)
    held = receiver.send([40] * 13)  # the other four pages
    request = receiver.generate([*PROMPT[:12], *[41] * 9], lease, 12)
    receiver.step()
    assert request.state is State.WAITING
    assert receiver.cache.match(PROMPT).length == 12
    assert len(receiver.leases) == 0
    receiver.run()
    receiver.finish(held)
    receiver.run()
    assert receiver.seen[request].tokens == receiver.expected(request, 5)
    generated = receiver.generated(request)
    assert (generated.received_tokens, generated.recomputed_tokens) == (12, 0)
    receiver.assert_empty()
