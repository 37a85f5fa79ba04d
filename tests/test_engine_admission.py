"""Who is admitted when some hold pages that others wait for."""

from __future__ import annotations

import pytest
from tests.engine_rig import make_request
from tests.receiving_rig import KvRig, sent

from microserve.engine.outputs import Opened
from microserve.engine.request import State
from microserve.runtime.errors import Busy

PROMPT = list(range(1, 15))  # 14 tokens: three whole pages of 4, and two tokens


def test_who_holds_pages_passes_who_waits_for_them() -> None:
    """Otherwise each would wait for the other for ever."""
    sender, receiver = KvRig(), KvRig(pages=8)
    old = receiver.submit(make_request([1] * 13, max_tokens=12, ignore_eos=True))
    receiver.step()
    lease = receiver.lease([2] * 12)
    receiver.run()
    assert old.state is State.PREEMPTED
    request = receiver.generate([2] * 12, lease, 12, count=1)
    receiver.push(sender, sent(sender, [2] * 12), lease, receiver.claim(lease, 0, 12), 0)
    receiver.end_claim(1)
    receiver.run()
    assert receiver.seen[request].tokens == receiver.expected(request, 1)
    assert receiver.seen[old].tokens == receiver.expected(old, 12)
    receiver.assert_empty()


def test_neither_leases_nor_sends_take_pages_from_who_waits_for_them() -> None:
    rig = KvRig(pages=8)
    held = rig.lease([1] * 13)
    large = rig.submit(make_request([40] * 20, max_tokens=1))
    rig.step()
    assert rig.scheduler.short
    with pytest.raises(Busy):
        rig.prepare([2])
    with pytest.raises(Busy):
        rig.send([2])
    waiting = rig.prepare([2], admit_by=rig.clock() + 5)
    rig.receiving.release(held.id, rig.clock())
    rig.turn()
    assert waiting not in rig.answers
    rig.run()
    assert rig.seen[large].tokens == rig.expected(large, 1)
    assert not rig.scheduler.short
    rig.turn(0.1)
    answer = rig.answers[waiting]
    assert isinstance(answer, Opened)
    rig.receiving.release(answer.lease.id, rig.clock())
    rig.assert_empty()


def test_who_waits_for_pages_and_ends_is_waited_for_no_more() -> None:
    rig = KvRig(pages=8, share=1.0)
    held = rig.lease([1] * 13)
    large = rig.submit(make_request([40] * 20, max_tokens=1))
    rig.step()
    rig.abort(large)
    rig.receiving.release(rig.lease([2]).id, rig.clock())
    rig.receiving.release(held.id, rig.clock())
    rig.assert_empty()


def test_a_lease_leaves_a_page_for_every_running_request() -> None:
    rig = KvRig(pages=8, share=1.0)
    request = rig.submit(make_request([1] * 13, max_tokens=12, ignore_eos=True))
    rig.step()
    with pytest.raises(Busy):
        rig.prepare([2] * 13)
    lease = rig.lease([2] * 12)
    rig.run()
    assert rig.scheduler.load().preemptions == 1  # it grew by that page, and then by one more
    rig.receiving.release(lease.id, rig.clock())
    rig.run()
    assert rig.seen[request].tokens == rig.expected(request, 12)
    rig.assert_empty()


def test_a_request_whose_kv_does_not_come_has_the_turn_of_its_arrival() -> None:
    rig = KvRig(max_running=1)
    running = rig.submit(make_request([7], max_tokens=3, ignore_eos=True))
    rig.step()
    lease = rig.lease(PROMPT, 13)
    request = rig.generate(PROMPT, lease, 13, wait=1.0)
    later = rig.submit(make_request([8], max_tokens=3, ignore_eos=True))
    rig.turn(1.1)
    rig.run()
    order = [each for each in rig.plans if each.started]
    assert [plan.started[0].sequence for plan in order] == [running.id, request.id, later.id]
    rig.assert_empty()


def test_load_counts_what_is_to_be_computed() -> None:
    sender, rig = KvRig(), KvRig(max_running=1)
    rig.submit(make_request([7], max_tokens=9, ignore_eos=True))
    rig.step()
    lease = rig.lease(PROMPT, 12)
    request = rig.generate(PROMPT, lease, 12)
    load = rig.scheduler.load()
    assert (load.waiting, load.queued_tokens, load.leased_pages) == (1, 0, 4)
    claim = rig.claim(lease, 0, 12)
    rig.push(sender, sent(sender, PROMPT[:12]), lease, claim, 0)
    load = rig.scheduler.load()
    assert (load.waiting, load.queued_tokens) == (1, 2)
    rig.end_claim(claim)
    rig.run()
    assert rig.seen[request].tokens == rig.expected(request, 5)
    rig.assert_empty()
