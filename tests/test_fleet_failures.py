"""What goes wrong between engines: nothing hangs beyond its deadline, no page is lost, no token is wrong.

That no page is lost, and that no call stays open, is checked by leaving `Fleet`; that no page holds wrong KV, by the
executors, which look at every page that they read.
"""

from __future__ import annotations

import asyncio

import pytest
from tests.fleet_calls import PAGE, expected, prompt_of
from tests.fleet_checks import LONG, PROMPT, WAIT, answers, evict, link_of, raises
from tests.fleet_rig import Fleet, run_fleet

from microserve.runtime.errors import (
    Busy,
    DeadlineExceeded,
    LeaseNotFound,
    MicroserveError,
    PeerLost,
    StaleEpoch,
    TransferFailed,
)
from microserve.runtime.ids import Peer
from microserve.runtime.messages import (
    Claim,
)

# --- senders fail ---


@pytest.mark.parametrize("seen", [True, False])
@pytest.mark.parametrize("moment", ["before", "during", "after"])
def test_a_sender_dies(moment: str, seen: bool) -> None:
    async def work(fleet: Fleet) -> None:
        a, b = fleet.engines
        kv = await fleet.prep_recv(b, LONG, end=-1)
        generating = fleet.generating(b, LONG, kv=kv)
        if moment == "during":
            fleet.hub.hold(a.transport_name)
        sending = fleet.sending(a, LONG, kv)
        if moment == "before":
            await fleet.until(lambda: a.core.scheduler.running)
        elif moment == "during":
            await fleet.until(lambda: any(send.pushing for send in a.core.sends._live))
        else:
            await sending
        died_at = fleet.clock()
        await a.kill(seen=seen)
        if moment != "after":
            await raises(PeerLost, sending)
        tokens, end = await generating
        assert tokens == expected(LONG)
        if moment == "after":
            assert end.received_tokens == 119
        else:
            # What is proven dead is not waited for; of what is not, `kv_wait` decides.
            assert fleet.clock() - died_at < (2.0 if seen else WAIT + 2)
            assert end.received_tokens + end.recomputed_tokens == 119
        if not seen and moment != "after":
            assert b.quarantined() > 0
            await fleet.add("a", epoch=2)
            await fleet.meet()
            await fleet.until(lambda: not b.quarantined(), limit=5.0)

    run_fleet(work)


def test_a_sender_dies_without_a_word() -> None:
    async def work(fleet: Fleet) -> None:
        a, b = fleet.engines
        kv = await fleet.prep_recv(b, LONG, end=-1)
        generating = fleet.generating(b, LONG, kv=kv)
        fleet.hub.hold(a.transport_name)
        sending = fleet.sending(a, LONG, kv, budget=20.0)
        await fleet.until(lambda: any(send.pushing for send in a.core.sends._live))
        died_at = fleet.clock()
        await a.kill(silently=True)
        tokens, _ = await generating
        assert tokens == expected(LONG)
        # Three seconds of silence, then /proc is looked at.
        assert fleet.clock() - died_at < 6.0
        await raises(PeerLost, sending)

    run_fleet(work)


async def leave_pages_in_our_buffers(fleet: Fleet) -> int:
    """`b` stops, and is sent pages of the send that is held; then `a` dies, and `b` has the proof. How many pages."""
    a, b = fleet.engines
    await fleet.until(lambda: any(send.pushing for send in a.core.sends._live))
    (send,) = a.core.sends._live
    b.frozen.clear()
    fleet.hub.late.add((a.transport_name, b.transport_name))
    fleet.hub.let_go()
    transfers = b.core.transfers
    assert transfers is not None
    await fleet.until(lambda: transfers._transport._buffers)  # type: ignore[attr-defined]
    await a.kill()
    await fleet.until(lambda: transfers._inbox)
    return send.pushing


def test_pages_of_a_dead_sender_are_not_free_before_we_have_looked() -> None:
    """What it sent may lie in our own buffers, and then it is our own look that writes it."""

    async def work(fleet: Fleet) -> None:
        a, b = fleet.engines
        fleet.hub.hold()
        kv = await fleet.prep_recv(b, LONG, end=-1)
        sending = fleet.sending(a, LONG, kv)
        await fleet.until(lambda: any(send.pushing for send in a.core.sends._live))
        assert await fleet.release(b, kv) == "quarantined"
        await leave_pages_in_our_buffers(fleet)
        pool = b.executor.pool
        before, transfers = pool.copy(), b.core.transfers
        assert transfers is not None
        b.core.steps.turn()
        assert (b.quarantined(), (pool == before).all()) == (30, True)
        transfers.turn()
        b.core.steps.turn()
        assert (b.quarantined(), (pool == before).all()) == (30, False)
        b.frozen.set()
        await fleet.until(lambda: not b.quarantined(), limit=1.0)
        await raises(PeerLost, sending)

    run_fleet(work)


def test_what_a_dead_sender_had_sent_counts() -> None:
    async def work(fleet: Fleet) -> None:
        a, b = fleet.engines
        fleet.hub.hold()
        kv = await fleet.prep_recv(b, LONG, end=-1)
        generating = fleet.generating(b, LONG, kv=kv)
        sending = fleet.sending(a, LONG, kv)
        pages = await leave_pages_in_our_buffers(fleet)
        b.core.steps.turn()
        b.frozen.set()
        tokens, end = await generating
        assert tokens == expected(LONG)
        assert (end.received_tokens, end.recomputed_tokens) == (pages * PAGE, 119 - pages * PAGE)
        assert pages > 0
        await raises(PeerLost, sending)

    run_fleet(work)


def test_a_push_fails() -> None:
    async def work(fleet: Fleet) -> None:
        a, b = fleet.engines
        fleet.hub.failing.add((a.transport_name, b.transport_name))
        kv = await fleet.prep_recv(b, LONG, end=-1)
        generating = fleet.generating(b, LONG, kv=kv)
        began = fleet.clock()
        error = await raises(TransferFailed, fleet.remote_send(a, LONG, kv))
        assert "pages could not be pushed to engine b" in error.message
        tokens, end = await generating
        assert tokens == expected(LONG)
        assert (end.received_tokens, end.recomputed_tokens) == (0, 119)
        assert fleet.clock() - began < 2.0
        assert ("push_failed", "b: the link was told to fail") in a.events
        fleet.hub.failing.clear()
        await fleet.until(lambda: link_of(a, "b").state == "ready")
        await evict(fleet, b)
        kv = await fleet.prep_recv(b, LONG, end=-1)
        await fleet.remote_send(a, LONG, kv)
        assert (await answers(fleet, b, LONG, kv=kv)).received_tokens == 119

    run_fleet(work)


def test_a_push_is_torn() -> None:
    async def work(fleet: Fleet) -> None:
        a, b = fleet.engines
        fleet.hub.tearing.add((a.transport_name, b.transport_name))
        kv = await fleet.prep_recv(b, LONG, end=-1)
        generating = fleet.generating(b, LONG, kv=kv)
        await raises(TransferFailed, fleet.remote_send(a, LONG, kv))
        tokens, end = await generating
        assert tokens == expected(LONG)
        assert end.recomputed_tokens == 119

    run_fleet(work)


def test_a_notification_is_lost() -> None:
    async def work(fleet: Fleet) -> None:
        a, b = fleet.engines
        fleet.hub.mute.add((a.transport_name, b.transport_name))
        kv = await fleet.prep_recv(b, LONG, end=-1)
        generating = fleet.generating(b, LONG, kv=kv)
        began = fleet.clock()
        # The sender's word is not enough.
        assert (await fleet.remote_send(a, LONG, kv)).computed == 119
        tokens, end = await generating
        assert tokens == expected(LONG)
        assert end.recomputed_tokens == 119
        assert WAIT <= fleet.clock() - began < WAIT + 1

    run_fleet(work)


def test_the_router_forgoes_what_does_not_come() -> None:
    async def work(fleet: Fleet) -> None:
        b = fleet["b"]
        kv = await fleet.prep_recv(b, LONG, end=-1)
        generating = fleet.generating(b, LONG, kv=kv)
        await asyncio.sleep(0.1)
        assert await fleet.forgo(b, kv, 0, 119) == "freed"
        tokens, end = await generating
        assert (tokens, end.recomputed_tokens) == (expected(LONG), 119)
        assert await fleet.forgo(b, kv, 0, 119) == "unknown"

    run_fleet(work)


def test_a_cancelled_send_gives_everything_back() -> None:
    async def work(fleet: Fleet) -> None:
        a, b = fleet.engines
        fleet.hub.hold()
        kv = await fleet.prep_recv(b, LONG, end=-1)
        sending = fleet.sending(a, LONG, kv)
        await fleet.until(lambda: any(send.pushing for send in a.core.sends._live))
        sending.cancel()
        await asyncio.gather(sending, return_exceptions=True)
        await asyncio.sleep(0.5)
        # Its push is under way: neither side may use the pages for anything else.
        assert len(a.core.sends) == 1
        assert await fleet.release(b, kv) == "quarantined"
        assert b.quarantined() == 30
        fleet.hub.let_go()
        await fleet.until(lambda: not b.quarantined() and not len(a.core.sends), limit=2.0)

    run_fleet(work)


def test_a_send_has_a_deadline() -> None:
    async def work(fleet: Fleet) -> None:
        a, b = fleet.engines
        fleet.hub.hold()
        kv = await fleet.prep_recv(b, LONG, end=-1)
        began = fleet.clock()
        await raises(DeadlineExceeded, fleet.remote_send(a, LONG, kv, budget=2.0))
        assert 2.0 <= fleet.clock() - began < 2.1
        fleet.hub.let_go()
        await fleet.until(lambda: not len(a.core.sends), limit=2.0)
        assert await fleet.release(b, kv) == "freed"

    run_fleet(work)


def test_a_send_without_room_is_busy_at_once() -> None:
    async def work(fleet: Fleet) -> None:
        a, b = fleet.engines
        held = await fleet.prep_recv(a, prompt_of(100, seed=1))
        kv = await fleet.prep_recv(b, PROMPT)
        began = fleet.clock()
        await raises(Busy, fleet.remote_send(a, PROMPT, kv))
        assert fleet.clock() - began < 0.1
        await fleet.release(a, held)
        # Nothing was claimed: the range has had no writer.
        assert (await fleet.remote_send(a, PROMPT, kv)).computed == 50
        await fleet.release(b, kv)

    run_fleet(work, pages=32, lease_share=0.9)


# --- receivers and routers fail ---


@pytest.mark.parametrize("moment", ["before", "during"])
def test_a_receiver_dies(moment: str) -> None:
    async def work(fleet: Fleet) -> None:
        a, b = fleet.engines
        kv = await fleet.prep_recv(b, LONG, end=-1)
        if moment == "during":
            fleet.hub.hold(a.transport_name)
            sending = fleet.sending(a, LONG, kv)
            await fleet.until(lambda: any(send.pushing for send in a.core.sends._live))
            await b.kill()
            fleet.hub.let_go()
            await raises(TransferFailed, sending)
        else:
            await b.kill()
            began = fleet.clock()
            error = await raises(PeerLost, fleet.remote_send(a, LONG, kv))
            assert error.message == "engine b of epoch 1 has ended"
            assert fleet.clock() - began < 2.0
        await fleet.until(lambda: not len(a.core.sends))
        await answers(fleet, a, LONG)

    run_fleet(work)


def test_a_receivers_machine_loses_power() -> None:
    async def work(fleet: Fleet) -> None:
        a, b = fleet.engines
        kv = await fleet.prep_recv(b, LONG, end=-1)
        await b.kill(silently=True)
        began = fleet.clock()
        await raises(MicroserveError, fleet.remote_send(a, LONG, kv))
        # The claim is not answered.
        assert fleet.clock() - began < 6.0
        await fleet.until(lambda: not len(a.core.sends))

    run_fleet(work)


def test_a_stale_address_after_a_restart_is_refused() -> None:
    async def work(fleet: Fleet) -> None:
        a, b = fleet.engines
        kv = await fleet.prep_recv(b, LONG, end=-1)
        await b.kill()
        again = await fleet.add("b", epoch=2)
        await fleet.meet()
        await raises(StaleEpoch, fleet.remote_send(a, LONG, kv))
        await raises(LeaseNotFound, fleet.generate(again, LONG, kv=kv))
        await raises(LeaseNotFound, fleet.commit(again, kv))
        assert await fleet.release(again, kv) == "unknown"
        assert fleet.hub.pushed == []

    run_fleet(work)


def test_a_stale_claim_is_refused_by_the_new_process_itself() -> None:
    async def work(fleet: Fleet) -> None:
        a, b = fleet.engines
        kv = await fleet.prep_recv(b, PROMPT)
        claim = Claim(lease=kv.lease, epoch=7, begin=0, end=48, engine_id="a", sender_epoch=1)
        link = link_of(a, "b")
        assert link.client is not None
        await raises(StaleEpoch, link.client.call(claim))
        assert await fleet.release(b, kv) == "freed"

    run_fleet(work)


SILENT = [False, True]
"""Whether it goes without a word, as a process that was stopped, or a machine without power; else connections break."""
HEARD = {False: 1.0, True: 6.0}
"""Seconds after which that is noticed at the latest; sessions are silent for three."""


@pytest.mark.parametrize("silently", SILENT)
def test_a_router_dies_between_prep_recv_and_remote_send(silently: bool) -> None:
    async def work(fleet: Fleet) -> None:
        a, b = fleet.engines
        kv = await fleet.prep_recv(b, LONG, router="dying")
        assert b.leased() > 0
        fleet.network.kill(Peer("router", "dying", 1), silently=silently)
        await fleet.until(lambda: not b.leased(), limit=HEARD[silently])
        # Another router that had the address finds nothing to write to.
        await raises(LeaseNotFound, fleet.remote_send(a, LONG, kv))

    run_fleet(work)


@pytest.mark.parametrize("silently", SILENT)
def test_a_router_dies_while_everything_runs(silently: bool) -> None:
    async def work(fleet: Fleet) -> None:
        a, b = fleet.engines
        fleet.hub.hold()
        kv = await fleet.prep_recv(b, LONG, end=-1, router="dying")
        work = [fleet.sending(a, LONG, kv, router="dying"), fleet.generating(b, LONG, kv=kv, router="dying")]
        await fleet.until(lambda: any(send.pushing for send in a.core.sends._live))
        fleet.network.kill(Peer("router", "dying", 1), silently=silently)
        await fleet.until(lambda: not a.core.verbs._live and not b.core.verbs._live, limit=HEARD[silently])
        await asyncio.sleep(0.1)
        assert b.quarantined() == 30
        fleet.hub.let_go()
        await fleet.until(lambda: not b.quarantined() and not a.core.verbs.live, limit=2.0)
        for task in work:
            task.cancel()
        await asyncio.gather(*work, return_exceptions=True)

    run_fleet(work)


def test_a_preparation_whose_caller_has_gone_opens_no_lease() -> None:
    async def work(fleet: Fleet) -> None:
        b = fleet["b"]
        held = await fleet.prep_recv(b, prompt_of(100, seed=1))
        waiting = asyncio.create_task(fleet.prep_recv(b, LONG, admit_by=30.0, router="dying"))
        other = asyncio.create_task(fleet.prep_recv(b, LONG, admit_by=30.0))
        await asyncio.sleep(0.5)
        other.cancel()
        fleet.network.kill(Peer("router", "dying", 1))
        await asyncio.sleep(0.5)
        await fleet.release(b, held)
        await asyncio.sleep(1.0)
        assert b.leased() == 0
        waiting.cancel()
        await asyncio.gather(waiting, other, return_exceptions=True)

    run_fleet(work)
