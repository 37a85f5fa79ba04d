"""Sends in the step thread: which pages are ready when, and whom a send may hold up."""

from __future__ import annotations

import pytest
from tests.engine_rig import PAGE, make_request
from tests.receiving_rig import KvRig

from microserve.engine.request import State
from microserve.runtime.errors import Busy, DeadlineExceeded, InternalError

PROMPT = list(range(1, 15))  # 14 tokens: three whole pages of 4, and two tokens
WHOLE = list(range(1, 17))  # four whole pages


def test_pages_are_ready_chunk_by_chunk_and_stay_until_the_send_is_finished() -> None:
    rig = KvRig(prefill_chunk=5)
    request = rig.send(PROMPT)
    rig.run()
    assert [(part.first, len(part.pages)) for part in rig.ready[request]] == [(0, 1), (1, 1), (2, 2)]
    assert (rig.reused[request], request.state) == (0, State.SENDING)
    assert rig.cache.match(PROMPT).length == 12
    assert rig.cache.evict() == 0
    rig.finish(request)
    rig.assert_empty()


def test_what_is_cached_is_ready_at_once() -> None:
    rig = KvRig()
    first = rig.send(PROMPT)
    rig.run()
    rig.finish(first)
    again = rig.send(WHOLE)
    assert [(part.first, len(part.pages)) for part in rig.ready[again]] == [(0, 3)]
    rig.run()
    assert rig.reused[again] == 12
    whole = rig.send(WHOLE)
    assert [(part.first, len(part.pages)) for part in rig.ready[whole]] == [(0, 4)]
    assert rig.reused[whole] == 16
    for request in (again, whole):
        rig.finish(request)
    rig.assert_empty()


def test_a_send_does_not_starve_decodes() -> None:
    rig = KvRig(pages=400, step_tokens=16)
    decoding = rig.submit(make_request([1, 2, 3], max_tokens=40, ignore_eos=True))
    rig.step()
    send = rig.send([1 + i % 40 for i in range(600)])
    for _ in range(30):
        before = len(rig.seen[decoding].tokens)
        rig.step()
        assert len(rig.seen[decoding].tokens) == before + 1
    rig.run()
    rig.finish(send)
    rig.assert_empty()


@pytest.mark.parametrize("steps", [0, 1, 2])
def test_a_stopped_send_computes_no_more_and_keeps_its_pages(steps: int) -> None:
    rig = KvRig(prefill_chunk=4)
    request = rig.send(PROMPT)
    for _ in range(steps):
        rig.step()
    rig.scheduler.stop_send(request)
    rig.run()
    assert len(rig.plans) == steps
    rig.scheduler.check_integrity()
    assert rig.cache.statistics().owned + rig.cache.statistics().cached == 4
    rig.finish(request)
    rig.finish(request)
    rig.assert_empty()


def test_a_step_that_fails_fails_the_send_and_its_pages_wait_for_the_transfer() -> None:
    rig = KvRig(prefill_chunk=4)
    request = rig.send(PROMPT)
    rig.step()
    rig.launch()
    rig.executor.drop_newest()
    rig.scheduler.fail(rig.launched.popleft(), Busy("broken"))
    rig.read()
    assert isinstance(rig.answers[request], Busy)
    assert request.state is State.SENDING
    rig.run()
    rig.finish(request)
    rig.assert_empty()


def test_decodes_wait_for_a_sends_pages_and_do_not_take_them() -> None:
    rig = KvRig(pages=8, max_context=64)
    send = rig.send(list(range(1, 17)))
    rig.run()
    request = rig.submit(make_request([20, 21, 22], max_tokens=20, ignore_eos=True))
    rig.run()
    assert rig.seen[request].end is None
    assert send.state is State.SENDING
    rig.finish(send)
    rig.run()
    assert rig.seen[request].tokens == rig.expected(request, 20)
    rig.assert_empty()


def test_a_send_without_room_is_busy_at_once() -> None:
    rig = KvRig(pages=8)
    held = rig.send(list(range(20)))
    with pytest.raises(Busy):
        rig.send(list(range(20, 40)))
    rig.run()
    rig.finish(held)
    rig.assert_empty()


def test_a_send_leaves_a_page_for_each_running_request() -> None:
    rig = KvRig(pages=16)
    for first in (1, 20):
        rig.submit(make_request([first, 2, 3], max_tokens=9, ignore_eos=True))
    rig.step()
    assert (rig.scheduler.running, rig.cache.available()) == (2, 14)
    with pytest.raises(Busy, match="13 pages"):
        rig.send([7] * 13 * PAGE)
    send = rig.send([7] * 12 * PAGE)
    assert rig.cache.available() == 2
    rig.run()
    rig.finish(send)
    rig.run()
    rig.assert_empty()


def test_no_send_begins_while_a_request_in_line_is_short_of_pages_but_for_one_that_needs_none() -> None:
    rig = KvRig(pages=16, share=1.0)
    cached = rig.submit(make_request([5] * 2 * PAGE, max_tokens=1))
    rig.run()
    assert rig.generated(cached)
    running = rig.submit(make_request([1, 2, 3], max_tokens=9, ignore_eos=True))
    rig.step()
    held = rig.lease([30] * 11 * PAGE)
    rig.submit(make_request([20] * 4 * PAGE, max_tokens=1))
    rig.step()
    assert (rig.scheduler.short, rig.scheduler.running, rig.cache.available()) == (True, 1, 4)
    with pytest.raises(Busy, match="1 pages"):
        rig.send([7])
    free = rig.send([5] * 2 * PAGE)
    assert len(rig.sent_pages(free)) == 2
    assert rig.cache.available() == 2, "what is sent is not evicted"
    rig.finish(free)
    rig.receiving.release(held.id, rig.clock())
    rig.run()
    assert rig.seen[running].tokens == rig.expected(running, 9)
    send = rig.send([7])
    rig.run()
    rig.finish(send)
    rig.assert_empty()


def test_a_step_that_follows_a_lost_one_leaves_nothing_in_the_tree() -> None:
    """At depth 2 it was launched on top of KV that does not exist."""
    rig = KvRig(depth=2, prefill_chunk=4)
    request = rig.send(PROMPT)
    rig.launch()
    rig.launch()
    rig.executor.collect()
    rig.scheduler.fail(rig.launched.popleft(), InternalError("lost"))
    rig.collect()
    assert isinstance(rig.answers[request], InternalError)
    assert rig.ready[request] == []
    assert rig.cache.match(PROMPT).length == 0
    rig.finish(request)
    rig.run()
    rig.assert_empty()
    assert rig.cache.statistics().cached == 0


def test_a_send_that_fails_is_told_once_and_keeps_its_pages() -> None:
    rig = KvRig(prefill_chunk=4)
    request = make_request(PROMPT, max_tokens=1, deadline=rig.clock() + 1)
    rig.submit_send(request)
    rig.step()
    rig.clock.advance(2.0)
    rig.run()
    assert isinstance(rig.answers[request], DeadlineExceeded)
    assert rig.scheduler.abort(request)
    assert request.state is State.SENDING
    assert len(rig.sent_pages(request)) == 1
    rig.finish(request)
    assert not rig.scheduler.abort(request)
    rig.assert_empty()


def test_as_many_sends_as_may_run_and_no_more() -> None:
    rig = KvRig(max_running=2)
    sends = [rig.send([n]) for n in (1, 2)]
    with pytest.raises(Busy, match="2 sends"):
        rig.send([3])
    rig.run()
    rig.finish(sends[0])
    sends.append(rig.send([3]))
    rig.run()
    for send in sends[1:]:
        rig.finish(send)
    rig.assert_empty()


def test_sends_take_no_place_in_line() -> None:
    """However many there are, those who wait are admitted, and get their share of every step."""
    rig = KvRig(pages=400, max_running=16, step_tokens=32)
    sends = [rig.send([n] * 60) for n in range(16)]
    request = rig.submit(make_request([40, 41], max_tokens=3, ignore_eos=True))
    rig.step()
    rig.step()
    assert rig.seen[request].tokens
    rig.run()
    assert rig.seen[request].tokens == rig.expected(request, 3)
    for send in sends:
        rig.finish(send)
    rig.assert_empty()


def test_a_request_waits_for_the_prefix_that_a_send_computes() -> None:
    rig = KvRig(pages=64, step_tokens=16)
    send = rig.send(list(range(1, 41)))
    rig.step()
    request = rig.submit(make_request([*range(1, 41), 1], max_tokens=2, ignore_eos=True))
    rig.run()
    assert rig.seen[request].tokens == rig.expected(request, 2)
    assert rig.generated(request).usage.cached_tokens == 40
    rig.finish(send)
    rig.assert_empty()


def test_nobody_waits_for_the_prefix_of_a_send_that_was_stopped() -> None:
    rig = KvRig(pages=64, step_tokens=16)
    send = rig.send(list(range(1, 41)))
    rig.step()
    request = rig.submit(make_request([*range(1, 41), 1], max_tokens=2, ignore_eos=True))
    rig.step()
    rig.scheduler.stop_send(send)
    rig.run()
    assert rig.seen[request].tokens == rig.expected(request, 2)
    rig.finish(send)
    rig.assert_empty()


def test_two_sends_of_one_prompt_share_what_is_in_the_tree() -> None:
    rig = KvRig(prefill_chunk=4, step_tokens=9)
    first, second = rig.send(PROMPT), rig.send(PROMPT)
    rig.run()
    assert rig.sent_pages(first)[:3].tolist() == rig.sent_pages(second)[:3].tolist()
    assert rig.sent_pages(first)[3] != rig.sent_pages(second)[3]
    for send in (first, second):
        rig.finish(send)
    rig.assert_empty()


def test_a_starved_decode_takes_no_pages_from_a_send_that_still_computes() -> None:
    rig = KvRig(pages=8, prefill_chunk=1)
    request = rig.submit(make_request([40] * 9, max_tokens=20, ignore_eos=True))
    while not rig.seen[request].tokens:
        rig.step()
    send = rig.send(WHOLE)
    while request.state is State.DECODE:
        rig.step()
    assert request.state is State.PREEMPTED
    assert send.state is State.PREFILL
    rig.run()
    assert len(rig.sent_pages(send)) == 4
    rig.finish(send)
    rig.run()
    assert rig.seen[request].tokens == rig.expected(request, 20)
    rig.assert_empty()
